"""What a detector costs, counted while it runs: operations by part, tokens after each layer, time, memory.

Operations are counted by torch's FLOP counter on tensors without memory, in the convention of the paper's tables: one
multiply-add is one operation; convolutions, linear layers, both products of attention, LayerNorm (5 an element) and
nearest upsampling (1 an element) count, the rest does not.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import evad_kernels

from .backbone import PruningBlock
from .config import EVADConfig
from .detector import EVAD

PARTS = {
    "patch_embed": "encoder.patch_embed",
    "encoder": "encoder",
    "pyramid": "pyramid",
    "localization": "localization",
    "decoder": "decoder",
    "action_classifier": "decoder.classifiers",
}


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
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    if cuda:
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        after = _resident(peak=True)
        peak = None if before is None or after is None else max(after - before, 0)
    ordered = sorted(seconds)
    return Measurement(
        statistics.median(seconds), ordered[round(0.2 * (repeats - 1))], ordered[round(0.8 * (repeats - 1))], peak
    )


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
