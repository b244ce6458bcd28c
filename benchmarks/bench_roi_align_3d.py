"""roi_pool_3d straight from kept tokens, against plain PyTorch with separable weights and against the dense map."""

from __future__ import annotations

import math

import torch

import evad_kernels
from benchmarks._boxes import draw_boxes, torchvision_roi_align, with_batch_index
from benchmarks._harness import Contestants, Goal, backward_of, draw, either
from benchmarks.ceilings import Work
from evad_kernels._boxes import axis_weights
from evad_kernels.testing import assert_accurate

# ViT-B after three prunings at 0.7, the decoder's width: grid -> kept tokens
KEPT, C = {(8, 14, 14): 539, (8, 18, 18): 890, (8, 18, 32): 1582}, 384
GRID = (8, 14, 14)
STRIDE = 16

# name: (arguments, goals of the forward)
CASES = {
    "float32 people B1": {"B": 1, "boxes": "people", "dtype": "float32"},
    "bfloat16 people B1": {"B": 1, "boxes": "people", "dtype": "bfloat16"},
    "float32 whole frame B1": {"B": 1, "boxes": "whole frame", "dtype": "float32"},
    "float32 people B8": {"B": 8, "boxes": "people", "dtype": "float32"},
}
ON_GPU = {"B": 8, "boxes": "people", "dtype": "bfloat16"}
CASES_GPU = {
    **{f"bfloat16 {grid[1]}x{grid[2]} B8": {**ON_GPU, "grid": grid} for grid in KEPT},
    **{f"bfloat16 14x14 B8, {count} box{'es' * (count > 1)} a clip": {**ON_GPU, "count": count} for count in (1, 1000)},
    "float32 14x14 B8": {**ON_GPU, "dtype": "float32"},
    "bfloat16 14x14 B1": {**ON_GPU, "B": 1},
    "bfloat16 14x14 B8, whole frame": {**ON_GPU, "boxes": "whole frame"},
}
HUNDRED = tuple(CASES_GPU)[:3]  # boxes a clip
CALLS, FOLDED = "dense map + torchvision, a call a frame", "dense map + torchvision"
GOALS = {"float32 people B1": (Goal("ms", 2.5), Goal("speed-up", 15, "plain torch, separable"))}


def build(device, B, boxes, dtype, grid=GRID, count=100, backward=False):
    dtype, kept, cells = getattr(torch, dtype), KEPT[grid], math.prod(grid)
    tokens = draw(B, kept, C, seed=0, dtype=dtype, device=device).requires_grad_(backward)
    background = draw(cells, C, seed=1, dtype=dtype, device=device).requires_grad_(backward)
    generator = torch.Generator().manual_seed(2)
    position = torch.stack([torch.randperm(cells, generator=generator)[:kept].sort().values for _ in range(B)])
    size = {"height": STRIDE * grid[1], "width": STRIDE * grid[2]}
    position, boxes = position.to(device), draw_boxes(boxes, B, device, count=count, **size)
    leaves = [tokens, background]
    roi_align = torchvision_roi_align()

    def pool(tokens=tokens, background=background):
        clips = len(tokens)
        return evad_kernels.roi_pool_3d(tokens, position[:clips], boxes[:clips], grid=grid, background=background)

    def on_reference(*leaves):
        with evad_kernels.use_backend("reference"):
            return pool(*leaves)

    def dense_map():
        return background.expand(B, cells, C).scatter(1, position[..., None].expand(B, kept, C), tokens)

    def frame_by_frame():
        """One matrix product a frame, its bins reduced at once."""
        x1, y1, x2, y2 = (boxes / 16 - 0.5).unbind(-1)
        rows, columns = axis_weights(y1, y2, grid[1], 7, 2, True), axis_weights(x1, x2, grid[2], 7, 2, True)
        weights = torch.einsum("bnyh,bnxw->bnyxhw", rows, columns).flatten(4).flatten(1, 3)  # [B, n*49, Gh*Gw]
        total = 0
        for frame in dense_map().float().unflatten(1, (grid[0], -1)).unbind(1):
            total = total + (weights @ frame).unflatten(1, (-1, 49)).amax(2)
        return (total / grid[0]).flatten(0, 1).to(dtype)

    def calls():
        frames = dense_map().unflatten(1, grid).permute(1, 0, 4, 2, 3).float()  # [T, B, C, Gh, Gw]
        rows = with_batch_index(boxes)
        bins = torch.stack([roi_align(frame, rows, 7, 1 / 16, 2, True) for frame in frames])
        return bins.amax((-2, -1)).mean(0).to(dtype)

    def dense():
        frames = dense_map().unflatten(1, grid).permute(0, 1, 4, 2, 3).flatten(0, 1)  # [B*T, C, Gh, Gw]
        every_frame = boxes[:, None].expand(B, grid[0], -1, 4).flatten(0, 1)
        bins = roi_align(
            frames.float(), with_batch_index(every_frame), 7, spatial_scale=1 / 16, sampling_ratio=2, aligned=True
        )
        return bins.amax((-2, -1)).unflatten(0, (B, grid[0], -1)).mean(1).flatten(0, 1).to(dtype)

    def timed(function):
        """The call, or, for the backward, only that part of it."""
        return backward_of(function, leaves) if backward else function

    def check():
        """All clips; the first of many boxes, whose bins in float64 would not fit."""
        some = tokens if B * count <= 800 else tokens[:1].detach().requires_grad_(backward)
        own, wide = (
            [x.detach().to(t).requires_grad_(backward) for x in (some, background)] for t in (dtype, torch.double)
        )
        ours, reference, truth = pool(*own), on_reference(*own), on_reference(*wide)
        assert_accurate(ours, reference, truth, label="features")
        if some is tokens:
            torch.testing.assert_close(
                frame_by_frame(), reference, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
            )
        if backward:
            grad = draw(*ours.shape, seed=3, dtype=dtype, device=device)
            grads = (
                torch.autograd.grad(output, inputs, grad.to(output.dtype))
                for output, inputs in ((ours, own), (reference, own), (truth, wide))
            )
            for name, *triple in zip(("tokens", "background"), *grads, strict=True):
                assert_accurate(*triple, label=f"grad_{name}")

    rivals = {
        "plain torch, separable": timed(on_reference),
        "plain torch, frame by frame": timed(frame_by_frame),
        FOLDED: roi_align if isinstance(roi_align, str) else timed(dense),
    }
    if device != "cpu":
        rivals[CALLS] = roi_align if isinstance(roi_align, str) else timed(calls)
    if backward and B * count > 800:  # the graphs of all would not fit
        rivals = {name: rivals[name] for name in (FOLDED, CALLS)}
    read = tokens.nbytes + background.nbytes * (1 - kept / cells)
    features = boxes.shape[0] * boxes.shape[1] * C * tokens.element_size()
    work = Work(bytes=(tokens.nbytes + background.nbytes if backward else read) + features)
    return Contestants(timed(pool), rivals, check, work)


@either(CASES, CASES_GPU, later=CASES_GPU.keys() - {*HUNDRED})  # of a GPU, those without goals
def bench_pool(contest, case):
    on_cpu = contest.device == "cpu"
    goals, memory_of = GOALS.get(case, ()), ("ours", "plain torch, separable") if case in GOALS else ()
    if not on_cpu and case in HUNDRED:
        goals = (Goal("speed-up", 15, CALLS), Goal("speed-up", 8, FOLDED), Goal("memory", 0.01, FOLDED))
        goals += (Goal("ms", 0.09),) if "14x14" in case else ()
        memory_of = ("ours", FOLDED, CALLS)
    contest.run(
        "roi_pool_3d",
        case,
        build,
        contest.chosen(case, CASES, CASES_GPU),
        goals=goals,
        memory_of=memory_of,
        warm_up={"boxes": "whole frame"},
        headline=case.endswith("people B1") if on_cpu else case in HUNDRED,
        seconds=2.0 if on_cpu else 0.5,
    )


BACKWARD = {name: {**CASES[name], "backward": True} for name in ("float32 people B1", "bfloat16 people B1")}
BACKWARD_GPU = {name: {**CASES_GPU[name], "backward": True} for name in tuple(CASES_GPU)[:5]}


@either(BACKWARD, BACKWARD_GPU)
def bench_pool_backward(contest, case):
    on_cpu = contest.device == "cpu"
    goals = (Goal("speed-up", 10, "plain torch, separable"),)
    if not on_cpu:
        goals = (Goal("speed-up", 25, (CALLS, FOLDED)),)
        goals += (Goal("memory", 0.01, FOLDED),) if case in HUNDRED else ()
        goals += (Goal("ms", 0.12),) if case == HUNDRED[0] else ()
    contest.run(
        "roi_pool_3d, backward to tokens and background",
        case,
        build,
        contest.chosen(case, BACKWARD, BACKWARD_GPU),
        goals=goals,
        memory_of=() if on_cpu else ("ours", FOLDED),
        gradient=True,
        headline=on_cpu or case in HUNDRED,
        seconds=2.0 if on_cpu else 0.5,
    )


def build_align(device, dtype):
    dtype = getattr(torch, dtype)
    kept, cells = KEPT[GRID], math.prod(GRID)
    tokens = draw(1, kept, C, seed=0, dtype=dtype, device=device)
    background = draw(cells, C, seed=1, dtype=dtype, device=device)
    position = torch.randperm(cells, generator=torch.Generator().manual_seed(2))[None, :kept].to(device)
    boxes = draw_boxes("people", 1, device)

    def align(tokens=tokens, background=background):
        return evad_kernels.roi_align_3d(tokens, position, boxes, grid=GRID, background=background)

    def on_reference(*inputs):
        with evad_kernels.use_backend("reference"):
            return align(*inputs)

    def check():
        truth = on_reference(tokens.double(), background.double())
        assert_accurate(align(), on_reference(), truth, label="samples")

    samples = 100 * C * GRID[0] * 49 * tokens.element_size()
    return Contestants(align, {"plain torch, separable": on_reference}, check, Work(bytes=tokens.nbytes + samples))


def bench_align(contest):
    contest.run("roi_align_3d", "float32 people B1", build_align, {"dtype": "float32"}, seconds=2.0)
