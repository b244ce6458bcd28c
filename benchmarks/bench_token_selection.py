"""select_tokens and gather_tokens against torch.topk + sort and torch.gather."""

from __future__ import annotations

import math

import torch

import evad_kernels
from benchmarks._harness import Contestants, Goal, assert_same, draw, either
from benchmarks.ceilings import Work
from evad_kernels.token_selection import select_tokens_with_slots

# name: batch, non-keyframe tokens, of which selected
SELECT = {
    "224 B1": (1, 1372, 902),
    "224 B8": (8, 1372, 902),
    "384 B1": (1, 4608 - 576, 3226 - 576),
    "8 x 8192": (8, 8192, 4096),
}
SELECT = {name: {"B": B, "M": M, "count": count} for name, (B, M, count) in SELECT.items()}
SELECT_GPU = {
    f"{size} B{B}": {"B": B, "M": N - N // 8, "count": math.ceil(0.7 * N) - N // 8}
    for B in (8, 1)
    for size, N in (("224", 1568), ("288", 2592), ("288x512", 4608))
} | {"8 x 8192": SELECT["8 x 8192"]}
GATHER = {
    f"{dtype} 224 B{B}": {"B": B, "N": 1568, "count": 902, "C": 768, "dtype": dtype}
    for dtype in ("bfloat16", "float32")
    for B in (1, 8)
}
GATHER_GPU = {
    f"bfloat16 {size} B{B}": {"B": B, "N": N, "count": math.ceil(0.7 * N) - N // 8, "C": 768, "dtype": "bfloat16"}
    for B in (8, 1)
    for size, N in (("224", 1568), ("288", 2592), ("288x512", 4608))
}


def draw_importance(device, B, M):
    """Distinct values, so that topk's free choice among equals does not matter."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(M, generator=generator) for _ in range(B)]).to(device, torch.float32) / M


def build_select(device, B, M, count):
    importance = draw_importance(device, B, M)

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
    return Contestants(ours, rivals, lambda: assert_same(ours(), topk_sort()), Work(bytes=4 * B * M + 8 * B * count))


@either(SELECT, SELECT_GPU, later=[case for case in SELECT_GPU if not case.endswith("B8")])
def bench_select(contest, case):
    on_cpu = contest.device == "cpu"
    contest.run(
        "select_tokens",
        case,
        build_select,
        contest.chosen(case, SELECT, SELECT_GPU),
        goals=(Goal("speed-up", 8 if not on_cpu and case.endswith("B8") else 1, "topk + sort"),),
        headline=case == ("224 B1" if on_cpu else "288x512 B8"),
        seconds=1.0 if on_cpu else 0.5,
    )


def build_select_with_map(device, B, M, count):
    """The kept indices and where each token went."""
    importance = draw_importance(device, B, M)
    place = torch.arange(count, device=device, dtype=torch.int32).expand(B, count)

    def ours():
        return select_tokens_with_slots(importance, count)

    def topk_sort():
        return importance.topk(count, dim=1).indices.sort(dim=1).values

    def topk_sort_map():
        index = topk_sort()
        return index, importance.new_full((B, M), -1, dtype=torch.int32).scatter_(1, index, place)

    def check():
        for got, expected in zip(ours(), topk_sort_map(), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)

    rivals = {"topk + sort": topk_sort, "topk + sort, map": topk_sort_map}
    return Contestants(ours, rivals, check, Work(bytes=8 * B * M + 8 * B * count))


@either(SELECT, SELECT_GPU, later=[case for case in SELECT_GPU if not case.endswith("B8")])
def bench_select_with_map(contest, case):
    on_cpu = contest.device == "cpu"
    contest.run(
        "select_tokens with inverse map",
        case,
        build_select_with_map,
        contest.chosen(case, SELECT, SELECT_GPU),
        goals=(
            Goal("speed-up", 8 if not on_cpu and case.endswith("B8") else 1, "topk + sort"),
            *((Goal("ms", 0.008),) if case == "288x512 B8" else ()),
        ),
        headline=case == "288x512 B8",
        seconds=1.0 if on_cpu else 0.5,
    )


def build_gather(device, B, N, count, C, dtype, gradient=False):
    tokens = draw(B, N, C, seed=0, dtype=getattr(torch, dtype), device=device).requires_grad_(gradient)
    generator = torch.Generator().manual_seed(1)
    keyframe = N // 8
    index = torch.stack([torch.randperm(N - keyframe, generator=generator)[:count].sort().values for _ in range(B)])
    index = index.to(device)
    grad = draw(B, keyframe + count, C, seed=2, dtype=tokens.dtype, device=device)

    def gathered():
        rows = (index + keyframe)[..., None].expand(B, count, C)
        return torch.cat([tokens[:, :keyframe], tokens.gather(1, rows)], dim=1)

    def indexed():
        batch = torch.arange(B, device=device)[:, None]
        return torch.cat([tokens[:, :keyframe], tokens[batch, index + keyframe]], dim=1)

    def through(function):
        return lambda: torch.autograd.grad(function(), tokens, grad)[0] if gradient else function()

    ours = through(lambda: evad_kernels.gather_tokens(tokens, index, num_keyframe=keyframe))
    rivals = {"cat + torch.gather": through(gathered), "cat + indexing": through(indexed)}
    copied = 2 * grad.nbytes
    work = Work(bytes=2 * copied - grad.nbytes + tokens.nbytes if gradient else copied)
    return Contestants(ours, rivals, lambda: assert_same(ours(), through(gathered)()), work)


@either(GATHER, GATHER_GPU, later=[case for case in GATHER_GPU if not case.endswith("B8")])
def bench_gather(contest, case):
    on_cpu = contest.device == "cpu"
    contest.run(
        "gather_tokens",
        case,
        build_gather,
        contest.chosen(case, GATHER, GATHER_GPU),
        goals=(
            Goal("speed-up", 1, "cat + torch.gather"),
            *((Goal("floor", 1 / 0.7),) if not on_cpu and case.endswith("B8") else ()),
        ),
        headline=case == ("float32 224 B1" if on_cpu else "bfloat16 288x512 B8"),
        seconds=1.0 if on_cpu else 0.5,
    )


BACKWARD = {"float32 224 B1": {**GATHER["float32 224 B1"], "gradient": True}}
BACKWARD_GPU = {"bfloat16 288x512 B8": {**GATHER_GPU["bfloat16 288x512 B8"], "gradient": True}}


@either(BACKWARD, BACKWARD_GPU)
def bench_gather_backward(contest, case):
    contest.run(
        "gather_tokens, forward + backward",
        case,
        build_gather,
        contest.chosen(case, BACKWARD, BACKWARD_GPU),
        goals=(Goal("speed-up", 1, "cat + torch.gather"),),
        gradient=True,
        seconds=1.0,
    )
