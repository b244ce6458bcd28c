"""keyframe_attention and keyframe_attention_topk, which never make the map, against eager, SDPA and compilers."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import evad_kernels
from benchmarks._harness import Contestants, Goal, draw
from benchmarks.ceilings import Work
from evad_kernels.testing import assert_accurate

ROWS = 128  # of a block of the composite and of the truth

# name: (arguments, goals); the sizes are those of ViT-B's first pruned layer at short sides 224, 288 and 384
TOPK = {
    f"{dtype} N{N} B{B}": {"B": B, "H": 12, "N": N, "D": 64, "dtype": dtype}
    for dtype in ("bfloat16", "float32")
    for B, N in ((1, 1568), (8, 1568), (1, 784), (1, 2592), (1, 4608))
}
GOALS = {
    "bfloat16 N1568 B1": (Goal("speed-up", 8, "eager"), Goal("time", 0.9, "SDPA alone")),
    "float32 N1568 B1": (Goal("speed-up", 3.5, "eager"), Goal("time", 1.0, "SDPA alone")),
}
PLAIN = {
    f"{dtype} {name}": {"B": 1, "H": H, "N": N, "D": 64, "dtype": dtype}
    for dtype in ("bfloat16", "float32")
    for name, H, N in (("encoder N1568", 12, 1568), ("decoder N639 H6", 6, 639))
}
BACKWARD = {
    f"{dtype} N1568 B1{', importance too' if through_importance else ''}": {
        "B": 1,
        "H": 12,
        "N": 1568,
        "D": 64,
        "dtype": dtype,
        "through_importance": through_importance,
    }
    for dtype, through_importance in (("bfloat16", False), ("float32", False), ("float32", True))
}


def inputs(B, H, N, D, dtype, device, gradient=False):
    drawn = (draw(B, H, N, D, seed=seed, dtype=getattr(torch, dtype), device=device) for seed in range(3))
    return [x.requires_grad_(gradient) for x in drawn]


def counts(N: int) -> dict[str, int]:
    """The keyframe is one frame of eight; 0.7 of the tokens are kept."""
    return {"num_keyframe": N // 8, "num_select": math.ceil(0.7 * N) - N // 8}


def kept_rows(output: Tensor, index: Tensor, num_keyframe: int) -> Tensor:
    """The keyframe's rows of [B, H, N, D], then the selected."""
    B, H, _, D = output.shape
    rows = (index + num_keyframe)[:, None, :, None].expand(B, H, index.shape[1], D)
    return torch.cat([output[:, :, :num_keyframe], output.gather(2, rows)], dim=2)


def keep(output: Tensor, importance: Tensor, num_keyframe: int, num_select: int) -> tuple[Tensor, Tensor, Tensor]:
    """What keyframe_attention_topk returns, from all rows: torch.topk, sort, gather."""
    index = importance.topk(num_select, dim=1).indices.sort(dim=1).values
    return kept_rows(output, index, num_keyframe), index, importance


# The rivals. They round the importance as their dtype does; only ours and the composite select exactly.


def eager(query, key, value, num_keyframe, num_select):
    """The map in memory, as the formula reads."""
    attention = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
    return keep(attention @ value, attention[..., num_keyframe:].mean((1, 2)), num_keyframe, num_select)


def composite(query, key, value, num_keyframe, num_select):
    """SDPA for the output; the scores again, a block of rows at a time, for their column sum."""
    output = F.scaled_dot_product_attention(query, key, value)
    query, key = query.float(), key.float()
    B, H, N, D = key.shape
    total = key.new_zeros(B, N)
    for rows in query.split(ROWS, dim=2):
        total += (rows * D**-0.5 @ key.transpose(-1, -2)).softmax(-1).sum((1, 2))
    return keep(output, total[:, num_keyframe:] / (H * N), num_keyframe, num_select)


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


def work(B, H, N, D, dtype):
    itemsize = getattr(torch, dtype).itemsize
    return Work(
        bytes=4 * B * H * N * D * itemsize, flops=4 * B * H * N * N * D, exps=B * H * N * N, dtype=getattr(torch, dtype)
    )


def truth(query, key, value):
    """Output and importance of one clip in float64, a block of rows at a time."""
    query, key, value = (x.double() for x in (query, key, value))
    _, H, N, D = key.shape
    output, total = [], key.new_zeros(1, N)
    for rows in query.split(ROWS, dim=2):
        attention = (rows * D**-0.5 @ key.transpose(-1, -2)).softmax(-1)
        output.append(attention @ value)
        total += attention.sum((1, 2))
    return torch.cat(output, dim=2), total[:, N // 8 :] / (H * N)


def check_topk(result, query, key, value):
    """The last clip of a batch: the output and the importance by the rule of accuracy, and no wrong token."""
    output, index, importance = (x[-1:] for x in result)
    query, key, value = (x[-1:].detach() for x in (query, key, value))
    keyframe = query.shape[2] // 8
    true_output, true_importance = truth(query, key, value)
    with evad_kernels.use_backend("reference"):
        reference, reference_importance = evad_kernels.keyframe_attention(query, key, value, num_keyframe=keyframe)
    assert_accurate(
        output, kept_rows(reference, index, keyframe), kept_rows(true_output, index, keyframe), label="output"
    )
    assert_accurate(importance, reference_importance, true_importance, label="importance")
    dropped = torch.ones_like(true_importance, dtype=torch.bool).scatter_(1, index, False)
    assert true_importance[~dropped].min() >= true_importance[dropped].max() * (1 - 1e-6), "a wrong token is kept"


def build_topk(device, **shape):
    query, key, value = inputs(**shape, device=device)
    N = shape["N"]

    def ours():
        return evad_kernels.keyframe_attention_topk(query, key, value, **counts(N))

    rivals = {
        "eager": lambda: eager(query, key, value, **counts(N)),
        "SDPA alone": lambda: F.scaled_dot_product_attention(query, key, value),
        "SDPA + column sum": lambda: composite(query, key, value, **counts(N)),
    }
    if N == 1568 and shape["B"] == 1:
        rivals["compiled eager"] = lambda: compiled(eager)(query, key, value, **counts(N))
        # On a CPU it gives no log-sum-exp, so the importance (a second pass with roles swapped) cannot be had from it.
        rivals["FlexAttention alone"] = lambda: compiled(flex_attention)(query, key, value)
    return Contestants(ours, rivals, lambda: check_topk(ours(), query, key, value), work(**shape))


@pytest.mark.parametrize("case", TOPK)
def bench_topk(contest, case):
    shape = TOPK[case]
    eager_map = shape["B"] * shape["H"] * shape["N"] ** 2 * getattr(torch, shape["dtype"]).itemsize
    main = shape["B"] == 1 and shape["N"] == 1568
    contest.run(
        "keyframe_attention_topk",
        case,
        build_topk,
        shape,
        goals=(*GOALS.get(case, ()), Goal("memory", 0.05, "the eager map", eager_map)),
        memory_of=("ours", "eager", "SDPA alone", "SDPA + column sum") if main else (),
        warm_up={"N": 256},
        headline=shape["N"] == 1568,
    )


def build_plain(device, **shape):
    query, key, value = inputs(**shape, device=device)

    def ours():
        return evad_kernels.keyframe_attention(query, key, value, num_keyframe=shape["N"])

    def check():
        with evad_kernels.use_backend("reference"):
            reference = evad_kernels.keyframe_attention(query, key, value, num_keyframe=shape["N"]).output
        assert_accurate(ours().output, reference, truth(query, key, value)[0], label="output")

    rivals = {
        "SDPA alone": lambda: F.scaled_dot_product_attention(query, key, value),
        "eager": lambda: (query * shape["D"] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value,
    }
    return Contestants(ours, rivals, check, work(**shape))


@pytest.mark.parametrize("case", PLAIN)
def bench_plain(contest, case):
    """Blocks that do not prune: every token counts as the keyframe's, and no importance is computed."""
    contest.run(
        "keyframe_attention", case, build_plain, PLAIN[case], goals=(Goal("speed-up", 1, "SDPA alone"),), headline=True
    )


def build_backward(device, through_importance, **shape):
    fused = evad_kernels.keyframe_attention_topk
    leaves = inputs(**shape, device=device, gradient=True)
    N = shape["N"]
    rows = sum(counts(N).values())
    grad_output = draw(shape["B"], shape["H"], rows, shape["D"], seed=3, dtype=leaves[0].dtype, device=device)
    grad_importance = draw(shape["B"], N - N // 8, seed=4, dtype=torch.float32, device=device)

    def through(function):
        output, _, importance = function(*leaves, **counts(N))
        if not through_importance:
            return torch.autograd.grad(output, leaves, grad_output)
        return torch.autograd.grad([output, importance], leaves, [grad_output, grad_importance.to(importance.dtype)])

    def sdpa():
        grad = F.pad(grad_output, (0, 0, 0, N - rows))
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, grad)

    def check():
        with evad_kernels.use_backend("reference"):
            reference = through(fused)
            wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
            # The same rows as ours: a tie of roundings must not compare different tokens.
            output, importance = evad_kernels.keyframe_attention(*wide, num_keyframe=N // 8)
        outputs = [kept_rows(output, fused(*leaves, **counts(N)).index, N // 8)]
        grads = [grad_output.double()]
        if through_importance:
            outputs, grads = [*outputs, importance], [*grads, grad_importance.double()]
        for name, *triple in zip(
            ("query", "key", "value"),
            through(fused),
            reference,
            torch.autograd.grad(outputs, wide, grads),
            strict=True,
        ):
            assert_accurate(*triple, label=f"grad_{name}")

    rivals = {"eager": lambda: through(eager), "SDPA alone": sdpa}
    B, H, D, dtype = (shape[name] for name in ("B", "H", "D", "dtype"))
    backward_rows = N if through_importance else rows
    forward = work(**shape)
    flops = forward.flops + 10 * B * H * backward_rows * N * D
    floor = Work(2 * forward.bytes, flops, forward.exps + B * H * backward_rows * N, getattr(torch, dtype))
    return Contestants(lambda: through(fused), rivals, check, floor)


@pytest.mark.parametrize("case", BACKWARD)
def bench_backward(contest, case):
    contest.run(
        "keyframe_attention_topk, forward + backward",
        case,
        build_backward,
        BACKWARD[case],
        goals=(Goal("speed-up", 2.5, "eager"),),
        gradient=True,
        headline=True,
    )
