"""EVAD for clips of one shape, ready to run: on a GPU a CUDA graph, so that a call costs one launch and not a thousand.

What is captured is the forward as it stands, up to the threshold on person scores: it has no step that waits for the
device and no shape that depends on data (tests/test_evad_static.py), so a replay gives the bits of the eager model.

Memory. All graphs of a device share one pool: what one needs between its kernels, the others need too, never at once.
So they run one after the other, whatever threads and streams call them, and results are copied out before the next.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .detector import EVAD, Detections, EVADOutput, Scored, score_detections, select_detections

WARM_UP = 3  # calls before a capture: libraries choose algorithms, Triton compiles


class Compiled:
    """A detector for at most ``batch`` clips of ``clip_shape``, made by ``EVAD.compiled``.

    It keeps the model's keep rate, and on a GPU the backend of the moment, whatever becomes of the model. It shares the
    memory of its weights: steps of an optimiser and ``load_state_dict`` reach it, ``model.to`` does not.

    Any thread may call it, on any stream: a result is ready on the stream that was current at the call. Calls of
    detectors compiled for one GPU run one after the other.
    """

    def __init__(
        self,
        model: EVAD,
        clip_shape: Sequence[int],
        batch: int = 1,
        dtype: torch.dtype | None = None,
        *,
        engine: str = "eager",
    ) -> None:
        weight = model.encoder.patch_embed.weight
        self.device, self.dtype = weight.device, dtype or weight.dtype
        self.clip_shape, self.batch = tuple(clip_shape), batch
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"EVAD: batch must be an integer of at least 1, got {batch!r}")
        if not (self.dtype.is_floating_point or self.dtype == torch.uint8):
            raise TypeError(f"EVAD: dtype must be floating point or torch.uint8, got {self.dtype}")
        model.check(torch.empty(self.clip_shape, device="meta"))
        self.model = _twin(model)
        _fix_position_codes(self.model, self.clip_shape[-2:])
        self._run: Callable[[Tensor], tuple[EVADOutput, Scored]] = self._infer
        if engine != "eager":
            self._run = torch.compile(self._infer, fullgraph=True, dynamic=False, backend=engine)
        self._whole = engine != "eager"  # whether the number of clips is fixed, too
        self._graph = None
        if replays(self.device):
            with torch.inference_mode(False):  # else calls outside of inference mode could not write into it
                clips = torch.zeros(batch, *self.clip_shape, dtype=self.dtype, device=self.device)
            self._graph = _Graph(self._run, clips)

    def __call__(self, clips: Tensor | Sequence[Tensor]) -> EVADOutput:
        """``EVAD.forward`` of the clips, in evaluation mode.

        Args:
            clips: Up to ``batch`` clips, [b, 3, T, H, W] or a list of [3, T, H, W], on any device; pixels in 0 to 255
                where the detector was compiled for torch.uint8, else normalised. From pinned memory they are copied
                while the caller goes on: leave them alone until a result is read. Fewer than ``batch`` take as long on
                a GPU: the rest of the batch is computed and left out.
        Returns:
            ``EVADOutput`` of tensors that are the caller's own; on a GPU the same bits as the model gives for
            ``batch`` clips.
        Raises:
            ValueError, TypeError: clips of another shape or kind, or too many.
        """
        return self.run(clips)[0]

    def score(self, clips: Tensor | Sequence[Tensor]) -> Scored:
        """Boxes inside the clip and scores of all proposals; nothing waits for the device. Clips as for a call."""
        return self.run(clips)[1]

    def detect(self, clips: Tensor | Sequence[Tensor], threshold: float | None = None) -> list[Detections]:
        """``EVAD.detect`` of the clips: those of ``score`` whose person score reaches the threshold."""
        threshold = self.model.config.person_threshold if threshold is None else threshold
        return select_detections(self.score(clips), [self.clip_shape[-2:]] * len(clips), threshold, else_all=False)

    def run(self, clips: Tensor | Sequence[Tensor]) -> tuple[EVADOutput, Scored]:
        """What a call and ``score`` give, at once."""
        number = self._check(clips)
        if self._graph is not None:
            return _first(self._graph.replay(clips), number)
        with torch.no_grad():
            if self._whole:
                clips = _copy(clips, torch.zeros(self.batch, *self.clip_shape, dtype=self.dtype))
            elif not isinstance(clips, Tensor):
                clips = torch.stack(tuple(clips))
            return _first(self._run(clips.to(self.device, self.dtype)), number)

    def _infer(self, clips: Tensor) -> tuple[EVADOutput, Scored]:
        output = self.model(self._normalized(clips))
        return output, score_detections(output, [self.clip_shape[-2:]] * len(clips))

    def _normalized(self, clips: Tensor) -> Tensor:
        if clips.dtype != torch.uint8:
            return clips
        config = self.model.config  # in the order of video.normalize, for its bits
        return clips.float().mul(1 / (255 * config.pixel_std)).sub(config.pixel_mean / config.pixel_std)

    def _check(self, clips: Tensor | Sequence[Tensor]) -> int:
        """How many clips there are."""
        if not 1 <= len(clips) <= self.batch:
            raise ValueError(f"EVAD: clips must be 1 to {self.batch}, as compiled, got {len(clips)}")
        for clip in clips[:1] if isinstance(clips, Tensor) else clips:
            if tuple(clip.shape) != self.clip_shape:
                raise ValueError(f"EVAD: a clip must be {list(self.clip_shape)}, as compiled, got {list(clip.shape)}")
            if (clip.dtype == torch.uint8) != (self.dtype == torch.uint8):
                raise TypeError(f"EVAD: a clip must be {self.dtype}, as compiled, got {clip.dtype}")
        return len(clips)


class _Graph:
    """A function of one tensor, captured; its results lie in the pool, where the next replay writes."""

    def __init__(self, function: Callable[[Tensor], tuple[EVADOutput, Scored]], clips: Tensor) -> None:
        self.clips, self.device, self.pool = clips, clips.device, _Pool.of(clips.device)
        with self.pool.lock, torch.cuda.device(self.device), torch.no_grad():
            # Not on the stream of captures: so cuBLAS takes its workspace there in a capture, from the pool. Any other
            # would be freed under this graph when torch.compile captures graphs of its own ("reduce-overhead").
            for _ in range(WARM_UP):
                function(clips)
            self.graph = torch.cuda.CUDAGraph()
            # Waits for the device. Other threads, that decode or pin memory, may go on.
            with torch.cuda.graph(self.graph, self.pool.handle, self.pool.stream, capture_error_mode="thread_local"):
                self.results = function(clips)

    def replay(self, clips: Tensor | Sequence[Tensor]) -> tuple[EVADOutput, Scored]:
        """Results of the clips, and of what else lies in the input; copies."""
        with self.pool.lock, torch.cuda.device(self.device), torch.no_grad():
            stream = torch.cuda.current_stream()
            stream.wait_event(self.pool.free)
            _copy(clips, self.clips)
            self.graph.replay()
            output, scored = self.results
            copies = EVADOutput(*(x.clone() for x in output[:3]), tuple(x.clone() for x in output.kept))
            copies = copies, Scored(*(x.clone() for x in scored))
            self.pool.free.record(stream)
        return copies


class _Pool:
    """What the graphs of a device share."""

    _pools: dict[torch.device, _Pool] = {}  # noqa: RUF012
    _making = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # memory is shared between captures on one stream
        self.free = torch.cuda.Event()  # no replay is using the pool
        self.lock = threading.Lock()
        # A graph that is never freed: where a pool's last graph goes while cuBLAS's workspace lies in the pool, torch
        # fails an assertion in the next capture.
        self.anchor = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(device),
            torch.cuda.graph(self.anchor, self.handle, self.stream, capture_error_mode="thread_local"),
        ):
            self.anchored = torch.zeros(1, device=device)

    @classmethod
    def of(cls, device: torch.device) -> _Pool:
        with cls._making:
            if device not in cls._pools:
                cls._pools[device] = cls(device)
            return cls._pools[device]


class FixedCodes(nn.Module):
    """The codes of a ``PositionTable`` for one size, interpolated once."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        return self.codes


def replays(device: torch.device) -> bool:
    """Whether a detector there is a captured graph."""
    return device.type == "cuda"


def _twin(model: EVAD) -> EVAD:
    """A model of its own in evaluation mode, on the same memory of weights."""
    # Whether a weight wants a gradient decides, even where none is recorded, how torch multiplies by it.
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo).eval()


@torch.no_grad()
def _fix_position_codes(model: EVAD, size: tuple[int, int]) -> None:
    """Replace the position tables by their codes for clips of this height and width."""
    Gh, Gw = (side // model.config.patch_size for side in model.padded_size([size]))
    for module, dtype in (
        (model.encoder, model.encoder.patch_embed.weight.dtype),
        (model.decoder, model.decoder.mask_token.dtype),
    ):
        module.position_table = FixedCodes(module.position_table(Gh, Gw, dtype))


def _copy(clips: Tensor | Sequence[Tensor], whole: Tensor) -> Tensor:
    """``whole``, with the clips in its first rows."""
    for place, clip in zip(whole, clips, strict=False):
        place.copy_(clip, non_blocking=True)
    return whole


def _first(results: tuple[EVADOutput, Scored], number: int) -> tuple[EVADOutput, Scored]:
    """Of the first clips only."""
    output, scored = results
    kept = tuple(x[:number] for x in output.kept)
    return EVADOutput(*(x[:number] for x in output[:3]), kept), Scored(*(x[:number] for x in scored))
