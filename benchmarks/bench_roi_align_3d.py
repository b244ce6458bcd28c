"""roi_pool_3d straight from kept tokens, against plain PyTorch with separable weights and against the dense map."""

from __future__ import annotations

import pytest
import torch

import evad_kernels
from benchmarks._boxes import draw_boxes, torchvision_roi_align, with_batch_index
from benchmarks._harness import Contestants, Goal, draw
from benchmarks.ceilings import Work
from evad_kernels._boxes import axis_weights
from evad_kernels.testing import assert_accurate

GRID, KEPT, C = (8, 14, 14), 539, 384  # ViT-B at 224 after three prunings at 0.7, the decoder's width
CELLS = GRID[0] * GRID[1] * GRID[2]

# name: (arguments, goals of the forward)
CASES = {
    "float32 people B1": {"B": 1, "boxes": "people", "dtype": "float32"},
    "bfloat16 people B1": {"B": 1, "boxes": "people", "dtype": "bfloat16"},
    "float32 whole frame B1": {"B": 1, "boxes": "whole frame", "dtype": "float32"},
    "float32 people B8": {"B": 8, "boxes": "people", "dtype": "float32"},
}
GOALS = {"float32 people B1": (Goal("ms", 2.5), Goal("speed-up", 15, "plain torch, separable"))}


def build(device, B, boxes, dtype, backward=False):
    dtype = getattr(torch, dtype)
    tokens = draw(B, KEPT, C, seed=0, dtype=dtype, device=device).requires_grad_(backward)
    background = draw(CELLS, C, seed=1, dtype=dtype, device=device).requires_grad_(backward)
    generator = torch.Generator().manual_seed(2)
    position = torch.stack([torch.randperm(CELLS, generator=generator)[:KEPT].sort().values for _ in range(B)])
    position, boxes = position.to(device), draw_boxes(boxes, B, device)
    leaves = [tokens, background]
    roi_align = torchvision_roi_align()

    def pool(tokens=tokens, background=background):
        return evad_kernels.roi_pool_3d(tokens, position, boxes, grid=GRID, background=background)

    def on_reference(*leaves):
        with evad_kernels.use_backend("reference"):
            return pool(*leaves)

    def dense_map():
        return background.expand(B, CELLS, C).scatter(1, position[..., None].expand(B, KEPT, C), tokens)

    def frame_by_frame():
        """One matrix product a frame, its bins reduced at once."""
        x1, y1, x2, y2 = (boxes / 16 - 0.5).unbind(-1)
        rows, columns = axis_weights(y1, y2, GRID[1], 7, 2, True), axis_weights(x1, x2, GRID[2], 7, 2, True)
        weights = torch.einsum("bnyh,bnxw->bnyxhw", rows, columns).flatten(4).flatten(1, 3)  # [B, n*49, Gh*Gw]
        total = 0
        for frame in dense_map().float().unflatten(1, (GRID[0], -1)).unbind(1):
            total = total + (weights @ frame).unflatten(1, (-1, 49)).amax(2)
        return (total / GRID[0]).flatten(0, 1).to(dtype)

    def dense():
        frames = dense_map().unflatten(1, GRID).permute(0, 1, 4, 2, 3).flatten(0, 1)  # [B*T, C, Gh, Gw]
        every_frame = boxes[:, None].expand(B, GRID[0], -1, 4).flatten(0, 1)
        bins = roi_align(
            frames.float(), with_batch_index(every_frame), 7, spatial_scale=1 / 16, sampling_ratio=2, aligned=True
        )
        return bins.amax((-2, -1)).unflatten(0, (B, GRID[0], -1)).mean(1).flatten(0, 1).to(dtype)

    def timed(function):
        """The call, or, for the backward, only that part of it."""
        if not backward:
            return function
        output = function()
        grad = draw(*output.shape, seed=3, dtype=dtype, device=device)
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)

    def check():
        wide = [leaf.detach().double().requires_grad_(backward) for leaf in leaves]
        ours, reference, truth = pool(), on_reference(), on_reference(*wide)
        assert_accurate(ours, reference, truth, label="features")
        torch.testing.assert_close(
            frame_by_frame(), reference, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
        )
        if backward:
            grad = draw(*ours.shape, seed=3, dtype=dtype, device=device)
            grads = (
                torch.autograd.grad(output, inputs, grad.to(output.dtype))
                for output, inputs in ((ours, leaves), (reference, leaves), (truth, wide))
            )
            for name, *triple in zip(("tokens", "background"), *grads, strict=True):
                assert_accurate(*triple, label=f"grad_{name}")

    rivals = {
        "plain torch, separable": timed(on_reference),
        "plain torch, frame by frame": timed(frame_by_frame),
        "dense map + torchvision": roi_align if isinstance(roi_align, str) else timed(dense),
    }
    read = tokens.nbytes + background.nbytes * (1 - KEPT / CELLS)
    features = boxes.shape[0] * boxes.shape[1] * C * tokens.element_size()
    work = Work(bytes=(tokens.nbytes + background.nbytes if backward else read) + features)
    return Contestants(timed(pool), rivals, check, work)


@pytest.mark.parametrize("case", CASES)
def bench_pool(contest, case):
    contest.run(
        "roi_pool_3d",
        case,
        build,
        CASES[case],
        goals=GOALS.get(case, ()),
        memory_of=("ours", "plain torch, separable") if case in GOALS else (),
        warm_up={"boxes": "whole frame"},
        headline=case.endswith("people B1"),
        seconds=2.0,
    )


@pytest.mark.parametrize("case", ["float32 people B1", "bfloat16 people B1"])
def bench_pool_backward(contest, case):
    contest.run(
        "roi_pool_3d, backward to tokens and background",
        case,
        build,
        {**CASES[case], "backward": True},
        goals=(Goal("speed-up", 10, "plain torch, separable"),),
        gradient=True,
        headline=True,
        seconds=2.0,
    )


def build_align(device, dtype):
    dtype = getattr(torch, dtype)
    tokens = draw(1, KEPT, C, seed=0, dtype=dtype, device=device)
    background = draw(CELLS, C, seed=1, dtype=dtype, device=device)
    position = torch.randperm(CELLS, generator=torch.Generator().manual_seed(2))[None, :KEPT].to(device)
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
