"""pyramid_roi_align, which chooses the level inside, against its reference and against one call a level."""

from __future__ import annotations

import torch

import evad_kernels
from benchmarks._boxes import SIDE, draw_boxes, torchvision_roi_align, with_batch_index
from benchmarks._harness import Contestants, Goal, backward_of, draw, either
from benchmarks.ceilings import Work
from evad_kernels.pyramid_roi_align import level_of
from evad_kernels.testing import assert_accurate

STRIDES, C = (4, 8, 16, 32), 256
CASES = {
    "float32 people B1": {"B": 1, "boxes": "people", "dtype": "float32"},
    "bfloat16 people B1": {"B": 1, "boxes": "people", "dtype": "bfloat16"},
    "float32 whole frame B1": {"B": 1, "boxes": "whole frame", "dtype": "float32"},
    "float32 people B8": {"B": 8, "boxes": "people", "dtype": "float32"},
}
CASES_GPU = {
    "bfloat16 people B8": {"B": 8, "boxes": "people", "dtype": "bfloat16"},
    "bfloat16 whole frame B8": {"B": 8, "boxes": "whole frame", "dtype": "bfloat16"},
    "bfloat16 people B8, channels last": {"B": 8, "boxes": "people", "dtype": "bfloat16", "channels_last": True},
    "float32 people B8": {"B": 8, "boxes": "people", "dtype": "float32"},
    "bfloat16 people B1": {"B": 1, "boxes": "people", "dtype": "bfloat16"},
    "bfloat16 people B8, 1 box a clip": {"B": 8, "boxes": "people", "dtype": "bfloat16", "count": 1},
    "bfloat16 people B8, 1000 boxes a clip": {"B": 8, "boxes": "people", "dtype": "bfloat16", "count": 1000},
}
BACKWARD = {"float32 people B1": {**CASES["float32 people B1"], "backward": True}}
BACKWARD_GPU = {
    name: {**case, "backward": True}
    for name, case in CASES_GPU.items()
    if name in ("bfloat16 people B8", "bfloat16 whole frame B8") or "count" in case
}
TORCHVISION = "torchvision, level by level"


def build(device, B, boxes, dtype, count=100, channels_last=False, backward=False):
    dtype = getattr(torch, dtype)
    levels = [
        draw(B, C, SIDE // stride, SIDE // stride, seed=stride, dtype=dtype, device=device).requires_grad_(backward)
        for stride in STRIDES
    ]
    if channels_last:
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
    boxes = draw_boxes(boxes, B, device, count=count)
    roi_align = torchvision_roi_align()

    def align(levels=levels):
        return evad_kernels.pyramid_roi_align(levels, boxes[: len(levels[0])])

    def on_reference(levels=levels):
        with evad_kernels.use_backend("reference"):
            return align(levels)

    def level_by_level(sample):
        """As detectron2 does: the boxes of every level, a call for each, and the rows put back."""
        rows = with_batch_index(boxes)
        level = level_of(rows[:, 1:], first=2, count=4, canonical_size=224, canonical_level=4)
        output = rows.new_empty(len(rows), C, 7, 7, dtype=dtype)
        for number, (features, stride) in enumerate(zip(levels, STRIDES, strict=True)):
            chosen = (level == number).nonzero()[:, 0]
            output[chosen] = sample(features, rows[chosen], stride)
        return output.unflatten(0, boxes.shape[:2])

    def separable(features, rows, stride):
        # Clip by clip: for boxes of mixed clips the reference would copy a map for every box.
        clips = [(features[b : b + 1], rows[rows[:, 0] == b][None, :, 1:]) for b in range(B)]
        with evad_kernels.use_backend("reference"):
            parts = [evad_kernels.pyramid_roi_align([clip], own, strides=(stride,))[0] for clip, own in clips]
        return torch.cat(parts)

    def torchvision(features, rows, stride):
        align = roi_align(features.float(), rows, 7, spatial_scale=1 / stride, sampling_ratio=2, aligned=True)
        return align.to(dtype)

    def timed(function):
        return backward_of(function, levels) if backward else function

    def check():
        """All images; the first of many boxes, whose samples in float64 would not fit."""
        images = B if B * count <= 800 else 1
        own, wide = (
            [level[:images].detach().to(t).requires_grad_(backward) for level in levels] for t in (dtype, torch.double)
        )
        ours, reference, truth = align(own), on_reference(own), on_reference(wide)
        assert_accurate(ours, reference, truth, label="samples")
        if backward:
            grad = draw(*ours.shape, seed=3, dtype=dtype, device=device)
            grads = (
                torch.autograd.grad(output, inputs, grad.to(output.dtype))
                for output, inputs in ((ours, own), (reference, own), (truth, wide))
            )
            for number, triple in enumerate(zip(*grads, strict=True)):
                assert_accurate(*triple, label=f"grad_levels[{number}]")

    rivals = {
        "reference": timed(on_reference),
        "plain torch, level by level": timed(lambda: level_by_level(separable)),
        TORCHVISION: roi_align if isinstance(roi_align, str) else timed(lambda: level_by_level(torchvision)),
    }
    samples = boxes.shape[0] * boxes.shape[1] * C * 49 * levels[0].element_size()
    waits = () if backward else tuple(name for name in rivals if "level by level" in name)  # for boxes of a level
    return Contestants(timed(align), rivals, check, Work(bytes=2 * samples), waits)


@either(CASES, CASES_GPU)
def bench_forward(contest, case):
    on_cpu = contest.device == "cpu"
    goals = (Goal("speed-up", 10, "reference"),) if case == "float32 people B1" else ()
    contest.run(
        "pyramid_roi_align",
        case,
        build,
        contest.chosen(case, CASES, CASES_GPU),
        goals=goals if on_cpu else (Goal("speed-up", 4, TORCHVISION),),
        headline=case.endswith("people B1" if on_cpu else "people B8"),
        seconds=2.0 if on_cpu else 0.5,
    )


@either(BACKWARD, BACKWARD_GPU)
def bench_backward(contest, case):
    contest.run(
        "pyramid_roi_align, backward",
        case,
        build,
        contest.chosen(case, BACKWARD, BACKWARD_GPU),
        goals=() if contest.device == "cpu" else (Goal("speed-up", 4, TORCHVISION),),
        gradient=True,
        seconds=2.0 if contest.device == "cpu" else 0.5,
    )
