"""select_tokens and gather_tokens against torch.topk + sort and torch.gather."""

from __future__ import annotations

import pytest
import torch

import evad_kernels
from benchmarks._harness import Contestants, Goal, assert_same, draw
from benchmarks.ceilings import Work

KEYFRAME = 196
# name: batch, non-keyframe tokens, of which selected
SELECT = {
    "224 B1": (1, 1372, 902),
    "224 B8": (8, 1372, 902),
    "384 B1": (1, 4608 - 576, 3226 - 576),
    "8 x 8192": (8, 8192, 4096),
}
GATHER = {
    f"{dtype} 224 B{B}": {"B": B, "N": 1568, "count": 902, "C": 768, "dtype": dtype}
    for dtype in ("bfloat16", "float32")
    for B in (1, 8)
}


def build_select(device, B, M, count):
    # Distinct values, so that topk's free choice among equals does not matter.
    generator = torch.Generator().manual_seed(0)
    importance = torch.stack([torch.randperm(M, generator=generator) for _ in range(B)]).to(device, torch.float32) / M

    def topk_sort():
        return importance.topk(count, dim=1).indices.sort(dim=1).values

    def ours():
        return evad_kernels.select_tokens(importance, count)

    rivals = {
        "topk + sort": topk_sort,
        "stable sort + sort": lambda: (
            importance.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
        ),
    }
    work = Work(bytes=4 * B * M + 8 * B * count)
    return Contestants(ours, rivals, lambda: assert_same(ours(), topk_sort()), work)


@pytest.mark.parametrize("case", SELECT)
def bench_select(contest, case):
    B, M, count = SELECT[case]
    contest.run(
        "select_tokens",
        case,
        build_select,
        {"B": B, "M": M, "count": count},
        goals=(Goal("speed-up", 1, "topk + sort"),),
        headline=case == "224 B1",
        seconds=1.0,
    )


def build_gather(device, B, N, count, C, dtype, gradient=False):
    tokens = draw(B, N, C, seed=0, dtype=getattr(torch, dtype), device=device).requires_grad_(gradient)
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(N - KEYFRAME, generator=generator)[:count].sort().values for _ in range(B)])
    index = index.to(device)
    grad = draw(B, KEYFRAME + count, C, seed=2, dtype=tokens.dtype, device=device)

    def gathered():
        rows = (index + KEYFRAME)[..., None].expand(B, count, C)
        return torch.cat([tokens[:, :KEYFRAME], tokens.gather(1, rows)], dim=1)

    def indexed():
        batch = torch.arange(B, device=device)[:, None]
        return torch.cat([tokens[:, :KEYFRAME], tokens[batch, index + KEYFRAME]], dim=1)

    def through(function):
        return lambda: torch.autograd.grad(function(), tokens, grad)[0] if gradient else function()

    ours = through(lambda: evad_kernels.gather_tokens(tokens, index, num_keyframe=KEYFRAME))
    rivals = {"cat + torch.gather": through(gathered), "cat + indexing": through(indexed)}
    copied = 2 * grad.nbytes
    work = Work(bytes=2 * copied - grad.nbytes + tokens.nbytes if gradient else copied)
    return Contestants(ours, rivals, lambda: assert_same(ours(), through(gathered)()), work)


@pytest.mark.parametrize("case", GATHER)
def bench_gather(contest, case):
    contest.run(
        "gather_tokens",
        case,
        build_gather,
        GATHER[case],
        goals=(Goal("speed-up", 1, "cat + torch.gather"),),
        headline=case == "float32 224 B1",
        seconds=1.0,
    )


def bench_gather_backward(contest):
    contest.run(
        "gather_tokens, forward + backward",
        "float32 224 B1",
        build_gather,
        {**GATHER["float32 224 B1"], "gradient": True},
        goals=(Goal("speed-up", 1, "cat + torch.gather"),),
        gradient=True,
        seconds=1.0,
    )
