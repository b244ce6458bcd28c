"""scatter_tokens against torch.scatter on a filled grid and a boolean mask."""

from __future__ import annotations

import torch

import evad_kernels
from benchmarks._harness import Contestants, Goal, assert_same, draw, either
from benchmarks.ceilings import Work

# The decoder's width, and the tokens kept after three prunings at 0.7, by size of the clip.
SIZES = {"224": ((8, 14, 14), 539), "288": ((8, 18, 18), 890), "288x512": ((8, 18, 32), 1582)}
CASES = {
    f"{dtype} {size} B{B}, fill {fill}": {"B": B, "size": size, "fill": fill, "dtype": dtype}
    for dtype, size, B, fill in (
        ("float32", "224", 1, "none"),
        ("float32", "224", 1, "[C]"),
        ("float32", "224", 1, "[cells, C]"),
        ("bfloat16", "224", 1, "[cells, C]"),
        ("float32", "224", 8, "[cells, C]"),
        ("float32", "288", 1, "[cells, C]"),
    )
}
CASES_GPU = {
    f"{dtype} {size} B8, fill [cells, C]": {"B": 8, "size": size, "fill": "[cells, C]", "dtype": dtype}
    for dtype, size in (("bfloat16", "288x512"), ("bfloat16", "224"), ("bfloat16", "288"), ("float32", "288x512"))
}
C = 384


def build(device, B, size, fill, dtype, gradient=False):
    grid, K = SIZES[size]
    cells = grid[0] * grid[1] * grid[2]
    tokens = draw(B, K, C, seed=0, dtype=getattr(torch, dtype), device=device).requires_grad_(gradient)
    generator = torch.Generator().manual_seed(1)
    position = torch.stack([torch.randperm(cells, generator=generator)[:K].sort().values for _ in range(B)]).to(device)
    shape = {"none": None, "[C]": (C,), "[cells, C]": (cells, C)}[fill]
    blank = None if shape is None else draw(*shape, seed=2, dtype=tokens.dtype, device=device).requires_grad_(gradient)
    leaves = [tokens] if blank is None else [tokens, blank]
    grad = draw(B, *grid, C, seed=3, dtype=tokens.dtype, device=device)

    def filled():
        return tokens.new_zeros(B, cells, C) if blank is None else blank.expand(B, cells, C)

    def scattered():
        return filled().scatter(1, position[..., None].expand(B, K, C), tokens).unflatten(1, grid)

    def masked():
        kept = torch.zeros(B, cells, dtype=torch.bool, device=device).scatter_(1, position, True)
        dense = filled().clone()
        dense[kept] = tokens.flatten(0, 1)
        return dense.unflatten(1, grid)

    def through(function):
        return lambda: torch.autograd.grad(function(), leaves, grad) if gradient else function()

    ours = through(lambda: evad_kernels.scatter_tokens(tokens, position, grid=grid, fill=blank))

    def check():
        got, expected = ours(), through(scattered)()
        if gradient:  # torch sums the gradient of a fill in float32, in another order
            assert_same(got[0], expected[0])
            torch.testing.assert_close(got, expected)
        else:
            assert_same(got, expected)

    forward = grad.nbytes + tokens.nbytes + (0 if blank is None else min(blank.nbytes, grad.nbytes - tokens.nbytes))
    work = Work(bytes=2 * forward if gradient else forward)
    rivals = {"torch.scatter + fill": through(scattered), "boolean mask + fill": through(masked)}
    return Contestants(ours, rivals, check, work, waits=("boolean mask + fill",))


@either(CASES, CASES_GPU)
def bench_scatter(contest, case):
    on_cpu = contest.device == "cpu"
    goals = [Goal("speed-up", 1, "torch.scatter + fill")]
    if not on_cpu:
        goals += [Goal("speed-up", 4, "boolean mask + fill"), Goal("floor", 1 / 0.7)]
    contest.run(
        "scatter_tokens",
        case,
        build,
        contest.chosen(case, CASES, CASES_GPU),
        goals=tuple(goals),
        headline=case in ("float32 224 B1, fill [cells, C]", "bfloat16 288x512 B8, fill [cells, C]"),
        seconds=1.0 if on_cpu else 0.5,
    )


BACKWARD = {
    f"float32 224 B1, fill {fill}": {"B": 1, "size": "224", "fill": fill, "dtype": "float32", "gradient": True}
    for fill in ("none", "[cells, C]")
}
BACKWARD_GPU = {name: {**case, "gradient": True} for name, case in CASES_GPU.items() if "bfloat16 288x512" in name}


@either(BACKWARD, BACKWARD_GPU)
def bench_backward(contest, case):
    contest.run(
        "scatter_tokens, forward + backward",
        case,
        build,
        contest.chosen(case, BACKWARD, BACKWARD_GPU),
        goals=(Goal("speed-up", 1, "torch.scatter + fill"),),
        gradient=True,
        seconds=1.0,
    )
