"""keyframe_attention and keyframe_attention_topk, which never make the map, against eager, SDPA and compilers."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

import evad_kernels
from benchmarks._harness import Contestants, Goal, assert_same, backward_of, draw, either
from benchmarks.ceilings import Work
from evad.profile import bfloat16_is_slow
from evad_kernels.testing import assert_accurate

ROWS = 128  # of a block of the composite and of the truth


# name: (arguments, goals); the sizes are those of ViT-B's first pruned layer at short sides 224, 288 and 384
def cases(dtype: str, *sizes: tuple[int, int], D: int = 64) -> dict[str, dict]:
    width = "" if D == 64 else f" D{D}"
    return {f"{dtype} N{N} B{B}{width}": {"B": B, "H": 12, "N": N, "D": D, "dtype": dtype} for B, N in sizes}


LENGTHS = (1568, 2592, 4608)
EVERY_LENGTH = [(8, N) for N in LENGTHS]
MAIN = cases("bfloat16", *EVERY_LENGTH)
OTHER = {**cases("bfloat16", *((1, N) for N in LENGTHS)), **cases("bfloat16", *EVERY_LENGTH, D=128)}  # no goals
ON_CPU = [(1, 1568), (8, 1568), (1, 784), (1, 2592), (1, 4608)]
TOPK = cases("bfloat16", *ON_CPU) | cases("float32", *ON_CPU)
TOPK_GPU = MAIN | OTHER | cases("float32", (8, 1568))
GOALS = {
    "bfloat16 N1568 B1": (Goal("speed-up", 8, "eager"), Goal("time", 0.9, "SDPA alone")),
    "float32 N1568 B1": (Goal("speed-up", 3.5, "eager"), Goal("time", 1.0, "SDPA alone")),
}
SDPA = tuple(f"SDPA {name}" for name in ("flash", "cudnn", "efficient"))
COLREDUCE = tuple(f"{name} + flash-colreduce" for name in SDPA)
GOALS_GPU = (
    Goal("speed-up", 4.5, "eager"),
    Goal("speed-up", 9, "eager, float32"),
    Goal("speed-up", 2, COLREDUCE),
)
FLEX = "FlexAttention, roles swapped"
PLAIN = {
    f"{dtype} {name}": {"B": 1, "H": H, "N": N, "D": 64, "dtype": dtype}
    for dtype in ("bfloat16", "float32")
    for name, H, N in (("encoder N1568", 12, 1568), ("decoder N639 H6", 6, 639))
}
PLAIN_GPU = {
    **MAIN,
    "bfloat16 decoder N639 B8": {"B": 8, "H": 6, "N": 639, "D": 64, "dtype": "bfloat16"},
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
BACKWARD_GPU = {name: {**shape, "through_importance": False} for name, shape in (MAIN | OTHER).items()} | {
    "bfloat16 N1568 B8, importance too": {**MAIN["bfloat16 N1568 B8"], "through_importance": True}
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
    torch._dynamo.config.recompile_limit = 100  # a graph for every shape
    return torch.compile(function, dynamic=False)


# Rivals on a GPU: the importance in float32, as ours.


def sdpa(name: str, query, key, value):
    """torch's attention by one of its libraries."""
    kinds = {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    with sdpa_kernel(kinds[name]):
        return F.scaled_dot_product_attention(query, key, value)


def with_colreduce(name: str, query, key, value, num_keyframe, num_select):
    """SDPA for the output, flash-colreduce for the column sums, topk, sort, gather."""
    from flash_colreduce import flash_colreduce

    received = flash_colreduce(query, key, reduction="sum")  # [B, H, N]
    importance = received[..., num_keyframe:].float().mean(1) / key.shape[2]
    return keep(sdpa(name, query, key, value), importance, num_keyframe, num_select)


def swapped_flex(attend, query, key, value, num_keyframe, num_select):
    """FlexAttention twice: output and log-sum-exp of rows; then the roles swapped, whose log-sum-exp is of columns."""
    output, aux = attend(query, key, value, return_aux=AuxRequest(lse=True))
    lse = aux.lse

    def minus_lse(score, b, h, key_row, query_row):
        return score - lse[b, h, query_row]

    columns = key[:, :, num_keyframe:]
    _, swapped = attend(columns, query, query, score_mod=minus_lse, return_aux=AuxRequest(lse=True))
    return keep(output, swapped.lse.exp().mean(1) / key.shape[2], num_keyframe, num_select)


def slow_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and bfloat16_is_slow(x.device)


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


def work_topk(B, H, N, D, dtype):
    """Both passes: the map once for the output, its columns that may be selected once more for their sums."""
    plain, columns = work(B, H, N, D, dtype), N - N // 8
    return plain._replace(
        flops=plain.flops + 2 * B * H * N * columns * D, exps=plain.exps + B * H * N * columns
    )  # bytes: queries and keys again, from cache


def rivals_on_gpu(query, key, value):
    N = query.shape[2]
    wide = [x.float() for x in (query, key, value)]
    rivals = {"eager, float32": lambda: eager(*wide, **counts(N))}
    for name in SDPA:
        rivals[f"{name} alone"] = functools.partial(sdpa, name, query, key, value)
        rivals[f"{name} + flash-colreduce"] = functools.partial(with_colreduce, name, query, key, value, **counts(N))
    return rivals


def build_topk(device, compilers=False, **shape):
    query, key, value = inputs(**shape, device=device)
    N = shape["N"]

    def ours():
        return evad_kernels.keyframe_attention_topk(query, key, value, **counts(N))

    rivals = {"eager": lambda: eager(query, key, value, **counts(N))}
    if slow_bfloat16(query) and (shape["B"] > 1 or N > 1568):
        rivals["eager"] = "its products would take minutes: torch has no fast bfloat16 on this CPU"
    if compilers:
        attend = compiled(flex_attention)
        rivals[FLEX] = lambda: swapped_flex(attend, query, key, value, **counts(N))
        rivals["compiled eager"] = lambda: compiled(eager)(query, key, value, **counts(N))
    elif query.is_cuda:
        rivals |= rivals_on_gpu(query, key, value)
    if query.is_cuda:
        return Contestants(ours, rivals, lambda: check_topk(ours(), query, key, value), work_topk(**shape))
    rivals |= {
        "SDPA alone": lambda: F.scaled_dot_product_attention(query, key, value),
        "SDPA + column sum": lambda: composite(query, key, value, **counts(N)),
    }
    if N == 1568 and shape["B"] == 1:
        if not slow_bfloat16(query):
            rivals["compiled eager"] = lambda: compiled(eager)(query, key, value, **counts(N))
        # On a CPU it gives no log-sum-exp, so the importance (a second pass with roles swapped) cannot be had from it.
        rivals["FlexAttention alone"] = lambda: compiled(flex_attention)(query, key, value)
    return Contestants(ours, rivals, lambda: check_topk(ours(), query, key, value), work(**shape))


def memory_goal(value, B, H, N, D, dtype):
    return Goal("memory", value, "the eager map", B * H * N**2 * getattr(torch, dtype).itemsize)


@either(TOPK, TOPK_GPU, later=TOPK_GPU.keys() - MAIN)
def bench_topk(contest, case):
    shape = contest.chosen(case, TOPK, TOPK_GPU)
    main = shape["N"] == 1568 and shape["D"] == 64
    if contest.device == "cpu":
        goals = GOALS.get(case, ())
        goals += (memory_goal(0.05, **shape),) if goals else ()
        memory_of = ("ours", "eager", "SDPA alone", "SDPA + column sum") if goals else ()
    else:
        goals = (*GOALS_GPU, memory_goal(0.02, **shape)) if case in MAIN else ()
        memory_of = ("ours", "eager", *COLREDUCE[:1])
    contest.run(
        "keyframe_attention_topk",
        case,
        build_topk,
        shape,
        goals=goals,
        memory_of=memory_of,
        warm_up={"N": 256},
        headline=main if contest.device == "cpu" else shape["D"] == 64,
        seconds=3.0 if contest.device == "cpu" else 1.0,
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

    padded = F.pad(grad_output, (0, 0, 0, N - rows))

    def alone():
        return torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, padded)

    def check():
        """The last clip of a batch: in float64 the maps of all would not fit."""
        index = fused(*leaves, **counts(N)).index[-1:]

        def on_reference(dtype):
            """Of the rows that ours keeps: a tie of roundings must not compare different tokens."""
            own = [leaf[-1:].detach().to(dtype).requires_grad_() for leaf in leaves]
            with evad_kernels.use_backend("reference"):
                output, importance = evad_kernels.keyframe_attention(*own, num_keyframe=N // 8)
            pairs = [(kept_rows(output, index, N // 8), grad_output), (importance, grad_importance)]
            outputs, grads = zip(*pairs[: 1 + through_importance], strict=True)
            return torch.autograd.grad(
                outputs, own, [grad[-1:].to(x.dtype) for grad, x in zip(grads, outputs, strict=True)]
            )

        results = through(fused), on_reference(leaves[0].dtype), on_reference(torch.double)
        for name, *triple in zip(("query", "key", "value"), *results, strict=True):
            assert_accurate(*(grad[-1:] for grad in triple), label=f"grad_{name}")

    rivals = {"eager": lambda: through(eager), "SDPA alone": alone}
    if leaves[0].is_cuda:
        del rivals["SDPA alone"]
        rivals |= {name: lambda name=name: torch.autograd.grad(sdpa(name, *leaves), leaves, padded) for name in SDPA}
    B, H, D, dtype = (shape[name] for name in ("B", "H", "D", "dtype"))
    backward_rows = N if through_importance else rows
    forward = work(**shape)
    flops = forward.flops + 10 * B * H * backward_rows * N * D
    floor = Work(2 * forward.bytes, flops, forward.exps + B * H * backward_rows * N, getattr(torch, dtype))
    return Contestants(lambda: through(fused), rivals, check, floor)


@either(BACKWARD, BACKWARD_GPU, later=OTHER)
def bench_backward(contest, case):
    on_cpu, main = contest.device == "cpu", case.partition(",")[0] in MAIN
    goals = (Goal("speed-up", 2.5 if on_cpu else 4, "eager"),) if on_cpu or main else ()
    contest.run(
        "keyframe_attention_topk, forward + backward",
        case,
        build_backward,
        contest.chosen(case, BACKWARD, BACKWARD_GPU),
        goals=goals + ((memory_goal(0.02, **MAIN[case]),) if not on_cpu and case in MAIN else ()),
        memory_of=() if on_cpu else ("ours", "eager"),
        gradient=True,
        headline=on_cpu or main,
        seconds=3.0 if on_cpu else 1.0,
    )


def build_backward_alone(device, **shape):
    """The backward of the kept rows beside full backwards of the fastest attentions, each on its own graph."""
    leaves = inputs(**shape, device=device, gradient=True)
    N, rows = shape["N"], sum(counts(shape["N"]).values())
    grad = draw(shape["B"], shape["H"], N, shape["D"], seed=3, dtype=leaves[0].dtype, device=device)

    def whole():
        return evad_kernels.keyframe_attention(*leaves, num_keyframe=N).output

    def ours():
        return evad_kernels.keyframe_attention_topk(*leaves, **counts(N)).output

    rivals = {"ours, all rows": whole, **{name: functools.partial(sdpa, name, *leaves) for name in SDPA}}
    rivals = {name: backward_of(forward, leaves, grad) for name, forward in rivals.items()}
    B, H, D, dtype = (shape[name] for name in ("B", "H", "D", "dtype"))
    work = Work(flops=10 * B * H * rows * N * D, exps=B * H * rows * N, dtype=getattr(torch, dtype))
    # What it computes is checked by the row of forward + backward.
    return Contestants(backward_of(ours, leaves, grad[:, :, :rows]), rivals, lambda: None, work)


@either({}, MAIN | OTHER, later=OTHER)
def bench_backward_alone(contest, case):
    contest.run(
        "keyframe_attention_topk, backward of kept rows",
        case,
        build_backward_alone,
        contest.chosen(case, {}, MAIN | OTHER),
        goals=(Goal("speed-up", 1.2, SDPA),) if case in MAIN else (),
        gradient=True,
        seconds=1.0,
    )


def build_importance(device, **shape):
    """Attention with its importance beside the fastest attention without."""
    query, key, value = inputs(**shape, device=device)
    N = shape["N"]

    def ours():
        return evad_kernels.keyframe_attention(query, key, value, num_keyframe=N // 8)

    def plain():
        return evad_kernels.keyframe_attention(query, key, value, num_keyframe=N).output

    def check():
        output, importance = (x[-1:] for x in ours())
        last = [x[-1:] for x in (query, key, value)]
        with evad_kernels.use_backend("reference"):
            references = evad_kernels.keyframe_attention(*last, num_keyframe=N // 8)
        for got, reference, true in zip((output, importance), references, truth(*last), strict=True):
            assert_accurate(got, reference, true, label="output and importance")

    rivals = {"ours, without importance": plain}
    rivals |= {name: functools.partial(sdpa, name, query, key, value) for name in SDPA}
    return Contestants(ours, rivals, check, work_topk(**shape))


@either({}, MAIN | OTHER, later=OTHER)
def bench_importance(contest, case):
    shape = contest.chosen(case, {}, MAIN | OTHER)
    plain = ("ours, without importance", *SDPA)
    contest.run(
        "keyframe_attention with importance",
        case,
        build_importance,
        shape,
        goals=(Goal("time", 1.5, plain),) if case in MAIN else (),
        seconds=0.5,
    )


def build_score(device, **shape):
    """The score pass alone, from the rows' log-sum-exp: its floor is the exponentials of the columns summed."""
    from evad_kernels import keyframe_attention_triton as kernels

    query, key, value = inputs(**shape, device=device)
    B, H, N, D, dtype = (shape[name] for name in ("B", "H", "N", "D", "dtype"))
    _, importance, lse = kernels.forward(query, key, value, N // 8, 1.0, D**-0.5)

    def ours():
        return kernels.score(query, key, lse, N // 8, 1.0, D**-0.5)

    pairs = B * H * N * (N - N // 8)
    work = Work(flops=2 * pairs * D, exps=pairs, dtype=getattr(torch, dtype))
    return Contestants(ours, {}, lambda: assert_same(ours(), importance), work)


@either({}, MAIN | OTHER, later=OTHER)
def bench_score(contest, case):
    shape = contest.chosen(case, {}, MAIN | OTHER)
    goals = (Goal("floor", 1.35),) if case in MAIN else ()
    contest.run("keyframe_attention, score pass", case, build_score, shape, goals=goals, seconds=0.5)


FIRST = {  # lengths that no other row has; below 1024 tokens other kernels serve
    f"bfloat16 B8, {what}, N1568 then {name}": (build, lengths, more)
    for what, build, more in (
        ("forward", build_topk, {}),
        ("forward + backward", build_backward, {"through_importance": False}),
    )
    for name, lengths in (("longer", (1571, 2003, 3001, 4601)), ("611", (611,)))
}


@either({}, FIRST)
def bench_first_call(contest, case):
    build, lengths, more = contest.chosen(case, {}, FIRST)
    contest.first_calls(
        "keyframe_attention_topk, first call of a length",
        case,
        build,
        MAIN["bfloat16 N1568 B8"] | more,
        {f"N{N}": {"N": N} for N in lengths},
        most=1000,
        gradient=build is build_backward,
    )


def build_plain(device, **shape):
    query, key, value = inputs(**shape, device=device)

    def ours():
        return evad_kernels.keyframe_attention(query, key, value, num_keyframe=shape["N"])

    def check():
        last = [x[-1:] for x in (query, key, value)]
        with evad_kernels.use_backend("reference"):
            reference = evad_kernels.keyframe_attention(*last, num_keyframe=shape["N"]).output
        assert_accurate(ours().output[-1:], reference, truth(*last)[0], label="output")

    alone = {"SDPA alone": lambda: F.scaled_dot_product_attention(query, key, value)}
    if query.is_cuda:
        alone = {name: functools.partial(sdpa, name, query, key, value) for name in SDPA}
    rivals = {
        **alone,
        "eager": lambda: (query * shape["D"] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value,
    }
    return Contestants(ours, rivals, check, work(**shape))


@either(PLAIN, PLAIN_GPU)
def bench_plain(contest, case):
    """Blocks that do not prune: every token counts as the keyframe's, and no importance is computed."""
    goal = Goal("speed-up", 1, "SDPA alone" if contest.device == "cpu" else SDPA)
    contest.run(
        "keyframe_attention",
        case,
        build_plain,
        contest.chosen(case, PLAIN, PLAIN_GPU),
        goals=(goal,),
        headline=True,
        seconds=3.0 if contest.device == "cpu" else 0.5,
    )


@either({}, MAIN, later=MAIN)
def bench_compilers(contest, case):
    """Rows of their own, the last: FlexAttention compiles for half a minute a length."""
    contest.run(
        "keyframe_attention_topk, beside compilers",
        case,
        build_topk,
        {**contest.chosen(case, {}, MAIN), "compilers": True},
        goals=(Goal("speed-up", 1.6, FLEX),),
        memory_of=("ours", FLEX),
        seconds=1.0,
    )
