"""EVAD: encoder with token pruning, actor localisation, action classification (Chen et al., ICCV 2023, Fig. 2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Encoder
from .config import EVADConfig
from .decoder import Decoder, clip_boxes
from .localization import Localization, Localized
from .losses import PERSON, Counts, detection_losses
from .pyramid import Pyramid

if TYPE_CHECKING:
    from .compiled import Compiled


class EVADOutput(NamedTuple):
    """Raw predictions for a batch; every shape is fixed by the config and the clips' size."""

    person_logits: Tensor  # [B, n, 2]: person, background
    boxes: Tensor  # [B, n, 4] x1, y1, x2, y2 in pixels of the clip, unclipped
    action_logits: Tensor  # [B, n, classes]
    kept: tuple[Tensor, ...]
    """Position [B, K] int64 after each pruning layer, the whole keyframe's first (where ``config.keep_keyframe`` is
    False, any of it, anywhere); empty at keep rate 1."""


class Detections(NamedTuple):
    """The actors of one clip."""

    boxes: Tensor  # [m, 4] x1, y1, x2, y2 in pixels, inside the clip
    person_scores: Tensor  # [m] in [0, 1]
    action_scores: Tensor  # [m, classes] in [0, 1], each class on its own


class Scored(NamedTuple):
    """Everyone who might be an actor, before a threshold: shapes are fixed, so a CUDA graph can hold it."""

    boxes: Tensor  # [B, n, 4] x1, y1, x2, y2 in pixels, inside the clip
    person_scores: Tensor  # [B, n] in [0, 1]
    action_scores: Tensor  # [B, n, classes] in [0, 1]


class Predictions(NamedTuple):
    """What training sees: the outputs of every localisation stage and decoder block."""

    localized: Localized
    action_logits: tuple[Tensor, ...]  # [B, n, classes] a classified decoder block
    kept: tuple[Tensor, ...]
    whwh: Tensor  # [B, 4] width, height, width, height of each clip without padding


class EVAD(nn.Module):
    """Actors and their actions in the keyframe (the middle) of video clips.

    The weights are random until ``load_checkpoint``.
    """

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.pyramid = Pyramid(config)
        self.localization = Localization(config)
        self.decoder = Decoder(config)
        _initialize(self.localization.stages, self.decoder, config.initial_deltas)

    def forward(self, clips: Tensor | Sequence[Tensor], boxes: Tensor | Sequence[Tensor] | None = None) -> EVADOutput:
        """Predict boxes, person scores and action scores.

        Args:
            clips: Normalised clips, [B, 3, T, H, W] or a list of [3, T, H, W], floating point. T is
                ``config.num_frames``; sizes may differ within a list and are padded with zeros, right and bottom.
            boxes: None to localise actors; or another detector's boxes (paper, section 4.2), x1, y1, x2, y2 in each
                clip's pixels: [B, n, 4] or B tensors [n_b, 4].
        Returns:
            ``EVADOutput``; a clip's boxes are in its own pixels. Given boxes come back with person logits (0, -inf):
            score 1. Where clips have fewer boxes than others, rows of zeros with logits (-inf, 0), score 0, follow.
        Raises:
            ValueError, TypeError: clips of another layout, number of frames or dtype; boxes of another layout.
        """
        if boxes is not None:
            return self._classify(clips, boxes)
        localized, action_logits, kept, _ = self.predict(clips, every_stage=False)
        return EVADOutput(localized.person_logits[-1], localized.boxes[-1], action_logits[-1], kept)

    def loss(
        self,
        clips: Tensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """What training minimises: ``losses.detection_losses`` of the clips.

        Args:
            clips: As for ``forward``.
            targets: One dict a clip, on any device: ``boxes`` [M, 4] x1, y1, x2, y2 in its pixels; ``labels``
                [M, classes], multi-hot.
            counts: What sums are divided by; None for this batch's own.
        Returns:
            Every weighted term under its released name, and ``loss_total``, their mean.
        Raises:
            ValueError: targets that do not fit the clips, each other or the model.
        """
        if len(targets) != len(clips):
            raise ValueError(f"EVAD: targets must be one a clip, got {len(targets)} for {len(clips)} clips")
        for target in targets:
            _check_boxes(target["boxes"], "boxes of a target")
            expected = [len(target["boxes"]), self.config.num_classes]
            if list(target["labels"].shape) != expected:
                raise ValueError(f"EVAD: labels of a target must be {expected}, got {list(target['labels'].shape)}")
        return detection_losses(self.predict(clips, every_stage=True), targets, self.config, counts)

    def predict(self, clips: Tensor | Sequence[Tensor], *, every_stage: bool) -> Predictions:
        """``forward`` with intermediate outputs.

        Args:
            clips: As for ``forward``.
            every_stage: Give those of every localisation stage and decoder block, for training; else of the last alone.
        Returns:
            ``Predictions``.
        Raises:
            ValueError, TypeError: as ``forward``.
        """
        clips, whwh = self.batch(clips)
        encoded = self.encoder(clips)
        localized = self.localization(self.pyramid(encoded.keyframes), whwh, every_stage=every_stage)
        action_logits = self.decoder(encoded, localized.boxes[-1], whwh, every_block=every_stage)
        return Predictions(localized, action_logits, encoded.kept, whwh)

    @torch.no_grad()
    def attention(self, clips: Tensor | Sequence[Tensor]) -> tuple[EVADOutput, Tensor]:
        """``forward``, and what actors look at: the decoder's attention (paper, Fig. 12).

        Returns:
            ``EVADOutput``, and how much each actor attends to each token of the padded clip, [B, n, T, Gh, Gw], in the
            decoder's last block, mean over heads: 0 for dropped tokens; the sum is 1 less what goes to actors.
        Raises:
            ValueError: the decoder has no block.
        """
        if not self.decoder.blocks:
            raise ValueError("EVAD: decoder_depth must be at least 1 for attention, got 0")
        clips, whwh = self.batch(clips)
        encoded = self.encoder(clips)
        localized = self.localization(self.pyramid(encoded.keyframes), whwh, every_stage=False)
        boxes = localized.boxes[-1]
        (action_logits,) = self.decoder(encoded, boxes, whwh, every_block=False)
        output = EVADOutput(localized.person_logits[-1], boxes, action_logits, encoded.kept)
        return output, self.decoder.attention(encoded, boxes, whwh)

    def _classify(self, clips: Tensor | Sequence[Tensor], boxes: Tensor | Sequence[Tensor]) -> EVADOutput:
        """``forward`` with given boxes."""
        if len(boxes) != len(clips):
            raise ValueError(f"EVAD: boxes must be given for each clip, got {len(boxes)} for {len(clips)} clips")
        for given in boxes:
            _check_boxes(given, "boxes of a clip")
        clips, whwh = self.batch(clips)
        encoded = self.encoder(clips)
        boxes = [given.to(whwh) for given in boxes]
        most = max(map(len, boxes))
        if all(len(given) == most for given in boxes):
            (action_logits,) = self.decoder(encoded, torch.stack(boxes), whwh, every_block=False)
        else:  # clip by clip: actors attend to each other, so to rows of padding, too
            action_logits = [
                F.pad(
                    self.decoder(encoded.clip(number), given[None], whwh[number, None], every_block=False)[0][0],
                    (0, 0, 0, most - len(given)),
                    value=-math.inf,
                )
                for number, given in enumerate(boxes)
            ]
            action_logits = torch.stack(action_logits)
        padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
        here = torch.zeros(padded.shape[:2], dtype=torch.bool, device=whwh.device)
        for row, given in zip(here, boxes, strict=True):
            row[: len(given)] = True
        person = torch.stack([here, ~here], dim=-1)
        person_logits = torch.zeros_like(person, dtype=action_logits.dtype).masked_fill(~person, -math.inf)
        return EVADOutput(person_logits, padded, action_logits, encoded.kept)

    def set_recomputation(self, on: bool) -> None:
        """In training, keep no activations inside the encoder's and decoder's blocks but compute them again in the
        backward: less memory, about a third more time, the same numbers."""
        self.encoder.recompute = self.decoder.recompute = on

    @torch.no_grad()
    def detect(
        self,
        clips: Tensor | Sequence[Tensor],
        threshold: float | None = None,
        boxes: Tensor | Sequence[Tensor] | None = None,
    ) -> list[Detections]:
        """Detect actors: ``forward`` in evaluation mode, then ``select_detections`` of those who reach the threshold.

        Args:
            clips: As for ``forward``.
            threshold: Least person score, in [0, 1]; None for ``config.person_threshold``.
            boxes: As for ``forward``; all of them are kept.
        Returns:
            One ``Detections`` a clip, in its own pixels; empty where nobody reaches the threshold.
        Raises:
            ValueError, TypeError: as ``forward``.
        """
        training = self.training
        self.eval()
        try:
            output = self(clips, boxes)
        finally:
            self.train(training)
        sizes = [tuple(clip.shape[-2:]) for clip in clips]
        threshold = self.config.person_threshold if threshold is None else threshold
        return select_detections(output, sizes, threshold, else_all=False)

    def compiled(
        self,
        clip_shape: Sequence[int],
        batch: int = 1,
        dtype: torch.dtype | None = None,
        *,
        engine: str = "eager",
    ) -> Compiled:
        """This model for clips of one shape, faster: on a GPU a CUDA graph that gives the same bits.

        Args:
            clip_shape: (3, T, H, W) of every clip; several shapes live side by side and share memory.
            batch: Most clips at a time.
            dtype: Of the clips; None for the weights'. torch.uint8: pixels in 0 to 255, normalised on the device.
            engine: "eager", or a backend of torch.compile ("inductor"), which fuses, rounds otherwise and compiles for
                minutes; on a GPU its kernels are captured too.
        Returns:
            ``Compiled``, called as the model is; without a GPU it runs the model as it is.
        Raises:
            ValueError, TypeError: a shape, batch or dtype that the model cannot take.
        """
        from .compiled import Compiled

        return Compiled(self, clip_shape, batch, dtype, engine=engine)

    def set_keep_rate(self, rate: float) -> None:
        """Prune at another rate from now on, without retraining (paper, Fig. 5).

        Args:
            rate: Share that every pruning block keeps of the tokens that reach it, the keyframe's included, in (0, 1].
                Below the keyframe's share the keyframe alone is kept; a rate that keeps all prunes nothing. 1 turns
                pruning off.
        Raises:
            ValueError: ``rate`` is not in (0, 1]; the model keeps the one it had.
        """
        self.config = dataclasses.replace(self.config, keep_rate=rate)
        self.encoder.keep_rate = self.config.keep_rate

    def batch(self, clips: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Put clips into one tensor, as the encoder takes it.

        Args:
            clips: As for ``forward``.
        Returns:
            Clips [B, 3, T, H, W] of the weights' dtype, padded to multiples of ``config.size_divisor``; and each
            clip's own width, height, width, height [B, 4], at least float32.
        Raises:
            ValueError, TypeError: as ``forward``.
        """
        whole = isinstance(clips, Tensor)  # then any number of clips is one graph for an exporter
        if whole and clips.ndim != 5:
            raise ValueError(f"EVAD: clips must be [B, 3, T, H, W], got {list(clips.shape)}")
        if (clips.shape[0] if whole else len(clips)) == 0:
            raise ValueError("EVAD: clips must be at least one clip, got none")
        for clip in clips[:1] if whole else clips:
            self.check(clip)
        sizes = [clips.shape[-2:]] if whole else [clip.shape[-2:] for clip in clips]
        height, width = self.padded_size(sizes)
        if whole:
            padded = _pad(clips, height, width)
        else:
            padded = torch.stack([_pad(clip, height, width) for clip in clips])
        dtype = torch.promote_types(self.localization.proposal_boxes.dtype, torch.float32)
        whwh = _whwh(sizes, dtype, padded.device).expand(padded.shape[0], 4)
        return padded.to(self.encoder.patch_embed.weight.dtype), whwh

    def padded_size(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Height and width that clips of these heights and widths are padded to, pixels."""
        height, width = (_round_up(max(side), self.config.size_divisor) for side in zip(*sizes, strict=True))
        return height, width

    def check(self, clip: Tensor) -> None:
        """Refuse what is no clip for this model: floating point, [3, config.num_frames, H, W].

        Raises:
            ValueError, TypeError: it is another layout, number of frames or dtype; the message says which.
        """
        if not isinstance(clip, Tensor):
            raise TypeError(f"EVAD: a clip must be a tensor [3, T, H, W], got {type(clip).__name__}")
        if not clip.is_floating_point():
            raise TypeError(f"EVAD: a clip must be floating point, (pixel / 255 - mean) / std, got {clip.dtype}")
        if clip.ndim != 4 or clip.shape[0] != 3 or 0 in clip.shape:
            raise ValueError(f"EVAD: a clip must be [3, T, H, W], got {list(clip.shape)}")
        if clip.shape[1] != self.config.num_frames:
            raise ValueError(f"EVAD: a clip must have {self.config.num_frames} frames, got {clip.shape[1]}")


def score_detections(output: EVADOutput, sizes: Sequence[tuple[int, int]]) -> Scored:
    """Scores and clipped boxes of every proposal: what ``select_detections`` selects from.

    Args:
        output: Predictions for B clips.
        sizes: Height and width of each clip, pixels, without padding.
    Returns:
        ``Scored``, rows in the order of the proposals; scores float32.
    Raises:
        ValueError: ``sizes`` are not B.
    """
    if len(sizes) != output.boxes.shape[0]:
        raise ValueError(f"EVAD: sizes must be one a clip, got {len(sizes)} for {output.boxes.shape[0]} clips")
    whwh = _whwh(sizes, output.boxes.dtype, output.boxes.device)
    return Scored(
        clip_boxes(output.boxes, whwh[:, None]),
        output.person_logits.float().softmax(dim=-1)[..., PERSON],
        output.action_logits.float().sigmoid(),
    )


def select_detections(
    output: EVADOutput | Scored, sizes: Sequence[tuple[int, int]], threshold: float = 0.7, *, else_all: bool = True
) -> list[Detections]:
    """Turn raw predictions into detections; waits for the device once.

    Args:
        output: Predictions for B clips, or their scores.
        sizes: Height and width of each clip, pixels, without padding; scores have theirs already.
        threshold: Least person score, in [0, 1]. A box of score 0, which pads given boxes, is never kept.
        else_all: Keep all boxes of a clip where none reaches the threshold, as the released evaluation does.
    Returns:
        One ``Detections`` a clip, rows in the order of the proposals.
    Raises:
        ValueError: ``sizes`` are not B.
    """
    scored = score_detections(output, sizes) if isinstance(output, EVADOutput) else output
    possible = scored.person_scores > 0
    keep = possible & (scored.person_scores >= threshold)
    if else_all:
        keep = keep | (possible & ~keep.any(dim=1, keepdim=True))
    detections = []
    for clip, mask in zip(zip(*scored, strict=True), keep.cpu(), strict=True):
        rows = mask.nonzero()[:, 0].to(keep.device, non_blocking=True)
        detections.append(Detections(*(values[rows] for values in clip)))
    return detections


def _whwh(sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Width, height, width, height of each clip, [B, 4]; filled on the device, so that a CUDA graph can hold it."""
    sides = [torch.full((1,), side, dtype=dtype, device=device) for h, w in sizes for side in (w, h)]
    return torch.cat(sides).view(-1, 2).repeat(1, 2)


def _check_boxes(boxes: Tensor, name: str) -> None:
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"EVAD: {name} must be [n, 4], got {list(getattr(boxes, 'shape', [type(boxes).__name__]))}")


def _pad(clip: Tensor, height: int, width: int) -> Tensor:
    """Zeros at the right and the bottom; the clip itself, not a copy, where it has the size."""
    right, below = width - clip.shape[-1], height - clip.shape[-2]
    return F.pad(clip, (0, right, 0, below)) if right or below else clip


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor


@torch.no_grad()
def _initialize(stages: nn.Module, decoder: Decoder, delta_scale: float) -> None:
    """Xavier for every matrix of the new layers (Appendix B), the mask token too; no bias in the decoder's linears."""
    for module in (stages, decoder):
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    linears = [module for module in decoder.modules() if isinstance(module, nn.Linear)]
    linears += [linear for stage in stages for linear in (stage.attn.qkv, stage.attn.proj)]
    for linear in linears:
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    for stage in stages:
        stage.box.weight.mul_(delta_scale)
        stage.box.bias.mul_(delta_scale)
