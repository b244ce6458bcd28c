"""What a detector costs, counted while it runs: operations by part, tokens after each layer, time, memory.

Operations are counted by torch's FLOP counter on tensors without memory, in the convention of the paper's tables: one
multiply-add is one operation; convolutions, linear layers, both products of attention, LayerNorm (5 an element) and
nearest upsampling (1 an element) count, the rest does not.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import evad_kernels

from .backbone import PruningBlock
from .config import EVADConfig
from .detector import EVAD
from .losses import detection_losses
from .recipe import adamw

PARTS = {
    "patch_embed": "encoder.patch_embed",
    "encoder": "encoder",
    "pyramid": "pyramid",
    "localization": "localization",
    "decoder": "decoder",
    "action_classifier": "decoder.classifiers",
}


def bfloat16_is_slow(device: torch.device | str) -> bool:
    """Whether matrix products in bfloat16 take longer than in float32: torch has none for x86 CPUs without AVX-512."""
    if torch.device(device).type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Profile(NamedTuple):
    """Cost of one clip."""

    gflops_paper: float  # the paper's convention: pruning blocks project every token, dropped ones too
    gflops: float  # what is executed
    gflops_by_part: dict[str, float]  # the same by part (keys of PARTS), adding up to it
    parameters: int
    tokens: tuple[int, ...]  # after each encoder block


def profile(model: EVAD | EVADConfig, size: tuple[int, int] | None = None, keep_rate: float | None = None) -> Profile:
    """Count the cost of one clip, without running the arithmetic.

    Args:
        model: A detector, or the configuration of one.
        size: Height and width of the clip, pixels; None for a square of ``config.short_side``.
        keep_rate: Another keep rate than the configuration's, in (0, 1].
    Raises:
        ValueError: a size or rate out of range.
    """
    config = model if isinstance(model, EVADConfig) else model.config
    height, width = size or (config.short_side, config.short_side)
    with torch.device("meta"):
        twin = EVAD(config).eval().requires_grad_(False)
        clip = torch.empty(1, 3, config.num_frames, height, width)
    if keep_rate is not None:
        twin.set_keep_rate(keep_rate)
    layers: list[tuple[int, int]] = []  # tokens before and after each block
    for block in twin.encoder.blocks:
        block.register_forward_hook(lambda _, inputs, output: layers.append((_count(inputs[0]), _count(output))))
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), evad_kernels.use_backend("auto"), counter:
        twin(clip)

    counts = {module: sum(ops.values()) / 2 for module, ops in counter.get_flop_counts().items()}  # torch's are 2 a mac
    by_part = {part: counts.get(f"EVAD.{module}", 0) for part, module in PARTS.items()}
    by_part["action_classifier"] = sum(
        counts.get(f"EVAD.decoder.classifiers.{i}", 0) for i in range(config.decoder_depth)
    )
    by_part["encoder"] -= by_part["patch_embed"]
    by_part["decoder"] -= by_part["action_classifier"]
    dropped = sum(
        counts[f"EVAD.encoder.blocks.{number}.attn.proj"] * (before / after - 1)
        for number, (before, after) in enumerate(layers)
        if isinstance(twin.encoder.blocks[number], PruningBlock)
    )
    return Profile(
        gflops_paper=(counts["Global"] + dropped) / 1e9,
        gflops=counts["Global"] / 1e9,
        gflops_by_part={part: count / 1e9 for part, count in by_part.items()},
        parameters=sum(parameter.numel() for parameter in twin.parameters()),
        tokens=tuple(after for _, after in layers),
    )


def _count(tokens) -> int:
    """Tokens in a block's input or output, ``Tokens`` or a tensor [B, N, C]."""
    return getattr(tokens, "x", tokens).shape[1]


def _attention(query, *_, **__) -> int:
    """Q K^T and P V over every row; a pruning kernel needs all of P for the importance."""
    B, H, N, D = query
    return 2 * 2 * B * H * N * N * D


def _layer_norm(x, *_, **__) -> int:
    return 2 * 5 * math.prod(x)


def _upsample(*_, out_shape, **__) -> int:
    return 2 * math.prod(out_shape)


# By torch's convention, two operations a multiply-add.
FORMULAS: dict = {
    torch.ops.evad_kernels.keyframe_attention: _attention,
    torch.ops.evad_kernels.keyframe_attention_topk: _attention,
    torch.ops.aten.native_layer_norm: _layer_norm,
    torch.ops.aten.upsample_nearest2d: _upsample,
}


class Measurement(NamedTuple):
    """Time and memory of a call."""

    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    peak_bytes: int | None  # beyond what was held before the call; None where the system does not tell


def measure(function: Callable[[], object], *, device: torch.device | str = "cpu", repeats: int = 5) -> Measurement:
    """Time ``function()`` after one warm-up call, and the memory that it needs at its peak.

    Args:
        function: What to run: ``lambda: model(clips)``.
        device: Where it runs.
        repeats: Timed calls, at least 1.
    """
    cuda = torch.device(device).type == "cuda"
    function()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident(reset_peak=True)
    seconds = [_seconds(function, device) for _ in range(repeats)]
    if cuda:
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        after = _resident(peak=True)
        peak = None if before is None or after is None else max(after - before, 0)
    ordered = sorted(seconds)
    return Measurement(
        statistics.median(seconds), ordered[round(0.2 * (repeats - 1))], ordered[round(0.8 * (repeats - 1))], peak
    )


def measure_in_turns(
    functions: Mapping[Hashable, Callable[[], object]], *, device: torch.device | str = "cpu", rounds: int = 5
) -> dict[Hashable, float]:
    """Median seconds of each function after a warm-up call. All run once a round, so a busy machine is busy for all."""
    for function in functions.values():
        function()
    taken = [{name: _seconds(function, device) for name, function in functions.items()} for _ in range(rounds)]
    return {name: statistics.median(seconds[name] for seconds in taken) for name in functions}


def _seconds(function: Callable[[], object], device: torch.device | str) -> float:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# Training. A step's modules run in the order of PARTS, and its backward in the opposite one: autograd takes the newest
# operation that is ready. So a part's backward begins when the first gradient of its results arrives.

TRAINED = ("encoder", "pyramid", "localization", "decoder")


class TrainingCost(NamedTuple):
    """Time and memory of a training step."""

    seconds: float  # a step, median; nothing is synchronised inside
    seconds_p20: float
    seconds_p80: float
    forward_seconds: dict[str, float]  # by part (TRAINED) and "loss", medians; the device is waited for after each
    backward_seconds: dict[str, float]  # the same parts
    optimizer_seconds: float
    saved_bytes: dict[str, int]  # by part and "loss": what the forward keeps for the backward, each memory once
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak_bytes: int | None  # of a step, beyond weights and the optimizer's state; None where the system does not tell
    peak_bytes_by_part: dict[str, int] | None  # of that, by the end of each part's forward and backward; on a GPU only


def profile_training(
    model: EVAD, clips: Tensor, targets: list[dict[str, Tensor]], *, autocast: bool = False, repeats: int = 5
) -> TrainingCost:
    """Run training steps and measure them; the model's weights change.

    Kept memory is counted through autograd's saved-tensor hooks. The peak is that of CUDA's allocator on a GPU, of the
    process elsewhere.

    Args:
        model: A detector, in training mode, in float32.
        clips: [B, 3, T, H, W] on its device.
        targets: As for ``EVAD.loss``.
        autocast: Whether matrix products run in bfloat16.
        repeats: Timed steps, at least 1.
    """
    cuda = clips.is_cuda
    optimizer = adamw(model, model.config)

    def step(watch: _Watch | None = None) -> None:
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=autocast):
            predictions = model.predict(clips, every_stage=True)
            with watch.part("loss") if watch else contextlib.nullcontext():
                total = detection_losses(predictions, targets, model.config)["loss_total"]
        if watch:
            watch.turn()
        total.backward()
        if watch:
            watch.stamp("encoder")
        optimizer.step()
        if watch:
            watch.stamp("optimizer")
            gradients.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
        optimizer.zero_grad()

    gradients: list[int] = []
    taken = measure(step, device=clips.device, repeats=repeats)
    watches = []
    for _ in range(repeats):
        with _Watch(model, cuda) as watch:
            step(watch)
        watches.append(watch)
    parts = (*TRAINED, "loss")
    last = watches[-1]
    return TrainingCost(
        *taken[:3],
        {part: statistics.median(watch.forward[part] for watch in watches) for part in parts},
        {part: statistics.median(watch.backward[part] for watch in watches) for part in parts},
        statistics.median(watch.backward["optimizer"] for watch in watches),
        {part: last.saved.get(part, 0) for part in parts},
        sum(parameter.nbytes for parameter in model.parameters()),
        gradients[-1],
        sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)),
        taken.peak_bytes,
        {part: max(watch.peaks[part] for watch in watches) for part in parts} if cuda else None,
    )


class _Watch:
    """Times the parts of one step and counts what they keep."""

    def __init__(self, model: EVAD, cuda: bool) -> None:
        self.model, self.cuda = model, cuda
        self.forward: dict[str, float] = {}
        self.backward: dict[str, float] = {}
        self.saved: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.before = torch.cuda.memory_allocated() if cuda else 0
        self._current, self._begin = "loss", 0.0
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def __enter__(self) -> _Watch:
        self._stack = contextlib.ExitStack()
        for part, following in itertools.pairwise((*TRAINED, "loss")):
            module, timed = getattr(self.model, part), self._timed(part)

            def leave(module, inputs, result, timed=timed, following=following):
                next(timed, None)
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda _: self.stamp(following))

            enter = module.register_forward_pre_hook(lambda *_, timed=timed: next(timed))
            self._stack.callback(enter.remove)
            self._stack.callback(module.register_forward_hook(leave).remove)
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        timed = self._timed(name)
        next(timed)
        yield
        next(timed, None)

    def turn(self) -> None:
        """The forward is over, the backward begins."""
        self._begin = self._now()

    def stamp(self, part: str) -> None:
        """``part``'s backward is over, if it was not before."""
        if part not in self.backward:
            now = self._now()
            self.backward[part], self._begin = now - self._begin, now
            self._note_peak(part)

    def _timed(self, part: str) -> Iterator[None]:
        begin, outer, self._current = self._now(), self._current, part
        yield
        self.forward[part], self._current = self._now() - begin, outer
        self._note_peak(part)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _note_peak(self, part: str) -> None:
        if self.cuda:
            peak = torch.cuda.max_memory_allocated() - self.before
            self.peaks[part] = max(self.peaks.get(part, 0), peak)
            torch.cuda.reset_peak_memory_stats()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._kept:
            self._kept.add(storage.data_ptr())
            self.saved[self._current] = self.saved.get(self._current, 0) + storage.nbytes()
        return tensor


@torch.no_grad()
def part_seconds(model: EVAD, clips: Tensor, repeats: int = 5) -> dict[str, float]:
    """Median time of inference by part (keys of PARTS, and "rest"), the device waited for around each.

    Args:
        model: A detector in evaluation mode.
        clips: [B, 3, T, H, W] on its device.
        repeats: Runs after one to warm up, at least 1.
    """
    begun: dict[str, float] = {}
    taken: dict[str, float] = {}

    def now() -> float:
        if clips.is_cuda:
            torch.cuda.synchronize(clips.device)
        return time.perf_counter()

    def end(part: str) -> None:
        taken[part] = now() - begun[part]

    modules = {part: model.get_submodule(name) for part, name in PARTS.items() if part != "action_classifier"}
    modules["action_classifier"] = model.decoder.classifiers[-1]
    handles = []
    for part, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda *_, part=part: begun.__setitem__(part, now())))
        handles.append(module.register_forward_hook(lambda *_, part=part: end(part)))
    samples = []
    try:
        for _ in range(repeats + 1):
            begin = now()
            model(clips)
            taken["rest"] = now() - begin
            for part, inside in (("encoder", "patch_embed"), ("decoder", "action_classifier")):
                taken[part] -= taken[inside]
            taken["rest"] -= sum(taken[part] for part in PARTS)
            samples.append(dict(taken))
    finally:
        for handle in handles:
            handle.remove()
    return {part: statistics.median(sample[part] for sample in samples[1:]) for part in (*PARTS, "rest")}


def kept_bytes(model: EVAD, clips: Tensor, targets: list[dict[str, Tensor]], *, autocast: bool = False) -> int:
    """What a training step's forward keeps for its backward, each memory once, by autograd's saved-tensor hooks."""
    with _Watch(model, False) as watch, torch.autocast(clips.device.type, torch.bfloat16, enabled=autocast):
        model.loss(clips, targets)
    return sum(watch.saved.values())


def _resident(*, peak: bool = False, reset_peak: bool = False) -> int | None:
    """Bytes of this process in memory, now or at the peak since the last reset; None where /proc does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    field = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)), None)
