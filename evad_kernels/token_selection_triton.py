"""select_tokens and gather_tokens in Triton: one launch each, forward and backward.

select_tokens: one program a row. Bisection for the num_select-th largest key, by counting the keys above a trial: it
ends as soon as a trial parts the row in the right place, after some log2 M steps where values differ. Then a stable
compaction by prefix sums. Up to SHEET keys stay in registers (a row is read once, 4 M bytes), a longer row is read
again at each step. Writes 8 num_select bytes (and 4 M for the inverse map). No atomics: a histogram's would queue,
since importances share their high bits.
gather_tokens: programs own tiles of the result. Reads and writes it once; elements travel as integers of their size.
Backward: a program owns a range of tokens and finds their kept rows as _cells_triton.py does, from 8 num_select bytes
of L2; it copies, and sums in order where a token was kept more than once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _backend
from ._cells_triton import BLOCK_K, own_cells, ownership
from ._triton import Launch, bits, blocks, channels, launch, power_of_two, recorded, rounded
from .token_selection import _gather_backward_fake, _gather_fake, _select_fake, _select_with_slots_fake

SHEET = 4096  # keys of a row that a program holds at a time
INFINITY = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


@triton.jit
def order_key(value, BITS: tl.constexpr, INFINITY: tl.constexpr):
    """An unsigned integer that orders as the float of these bits: NaN lowest, -0 and +0 one value."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    pattern = value.to(tl.uint32) & (2 * SIGN - 1)
    magnitude = pattern & (SIGN - 1)
    key = tl.where(pattern > SIGN, 2 * SIGN - 1 - pattern, pattern | SIGN)
    return tl.where(magnitude > INFINITY, 0, key)


@triton.jit
def load_keys(importance, stride, j, M, BITS: tl.constexpr, INFINITY: tl.constexpr):
    """Keys of a row; 0, as of NaN, beyond its end."""
    value = tl.load(importance + j.to(tl.int64) * stride, mask=j < M, other=0)
    return tl.where(j < M, order_key(value, BITS, INFINITY), 0)


@triton.jit
def compact(key, j, low, high, rank, above_before, equal_before, index, slot, M):
    """Writes a sheet's part of a row's selection: keys from `high` on, and the first `rank` of those from `low` on."""
    above = (key >= high).to(tl.int32)
    equal = ((j < M) & (key >= low) & (key < high)).to(tl.int32)  # of one value, or none
    through = tl.cumsum(above + equal * 65536, 0)  # two counts, below 2**15 each, in one pass
    a = above_before + (through & 65535) - above
    e = equal_before + (through >> 16) - equal
    place = a + tl.minimum(e, rank)
    selected = (above == 1) | ((equal == 1) & (e < rank))
    tl.store(index + place, j.to(tl.int64), mask=selected)
    if slot is not None:
        tl.store(slot + j, tl.where(selected, place, -1), mask=j < M)
    return above_before + tl.sum(above, 0), equal_before + tl.sum(equal, 0)


@triton.jit(do_not_specialize=["stride_b", "M", "num_select"])
def select_tokens_kernel(
    importance,  # [B, M], as integers
    stride_b,
    stride_m,
    index,  # [B, num_select] int64
    slot,  # [B, M] int32 or None
    M,
    num_select,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    SHEET: tl.constexpr,
    WHOLE: tl.constexpr,  # a sheet holds the row
):
    b = tl.program_id(0).to(tl.int64)
    importance += b * stride_b
    j = tl.arange(0, SHEET)
    key = load_keys(importance, stride_m, j, M, BITS, INFINITY)
    low = tl.min(tl.where(j < M, key, 0xFFFFFFFF), 0)
    high = tl.max(key, 0) + 1
    if not WHOLE:
        for begin in range(SHEET, M, SHEET):
            key = load_keys(importance, stride_m, begin + j, M, BITS, INFINITY)
            low = tl.minimum(low, tl.min(tl.where(begin + j < M, key, 0xFFFFFFFF), 0))
            high = tl.maximum(high, tl.max(key, 0) + 1)

    rank = num_select  # how many below `high` are selected; at least as many are not below `low`
    while low + 1 < high:
        middle = low + ((high - low) >> 1)  # above 0, so that it counts no key beyond the row's end
        if WHOLE:
            count = tl.sum((key >= middle).to(tl.int32), 0)
        else:
            count = tl.full([], 0, tl.int32)
            for begin in range(0, M, SHEET):
                key = load_keys(importance, stride_m, begin + j, M, BITS, INFINITY)
                count += tl.sum((key >= middle).to(tl.int32), 0)
        rank = tl.where(count <= num_select, num_select - count, rank)
        high = tl.where(count <= num_select, middle, high)
        low = tl.where(count >= num_select, middle, low)

    index += b * num_select
    if slot is not None:
        slot += b * M
    if WHOLE:
        compact(key, j, low, high, rank, 0, 0, index, slot, M)
    else:
        above_before = tl.full([], 0, tl.int32)
        equal_before = tl.full([], 0, tl.int32)
        for begin in range(0, M, SHEET):
            key = load_keys(importance, stride_m, begin + j, M, BITS, INFINITY)
            above_before, equal_before = compact(
                key, begin + j, low, high, rank, above_before, equal_before, index, slot, M
            )


@triton.jit(do_not_specialize=["index_stride_b", "N", "num_keyframe", "rows", "ranges"])
def gather_tokens_forward_kernel(
    tokens,  # [B, N, C]
    stride_b,
    stride_n,
    index,  # [B, rows - num_keyframe] int64
    index_stride_b,
    index_stride_k,
    kept,  # [B, rows, C]
    C,
    N,
    num_keyframe,
    rows,
    ranges,  # of ROWS rows in a sample
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) // ranges
    row = tl.program_id(0).to(tl.int64) % ranges * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    named = (row >= num_keyframe) & (row < rows)
    at = tl.load(index + b * index_stride_b + (row - num_keyframe) * index_stride_k, mask=named, other=-1)
    named = (at >= 0) & (at < N - num_keyframe)
    n = tl.where(row < num_keyframe, row, num_keyframe + tl.where(named, at, 0))
    inside = ((row < num_keyframe) | named)[:, None] & (c < C)[None, :]
    value = tl.load(tokens + b * stride_b + n[:, None] * stride_n + c[None, :], mask=inside, other=0)
    tl.store(kept + (b * rows + row)[:, None] * C + c[None, :], value, mask=(row < rows)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["index_stride_b", "K", "N", "num_keyframe", "ranges"])
def gather_tokens_backward_kernel(
    grad_kept,  # [B, num_keyframe + K, C]
    index,  # [B, K] int64
    index_stride_b,
    index_stride_k,
    slot,  # [B, N] int32, written on the way
    grad_tokens,  # [B, N, C]
    C,
    K,
    N,
    num_keyframe,
    ranges,  # of ROWS tokens in a sample
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SUM: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) // ranges
    first = tl.program_id(0).to(tl.int64) % ranges * ROWS
    end = tl.minimum(first + ROWS, N) - num_keyframe  # the program's range as `index` counts
    begin = tl.maximum(first - num_keyframe, 0)
    grad_kept += b * (num_keyframe + K) * C
    index += b * index_stride_b
    slot += b * N
    own_cells(index, index_stride_k, K, slot, begin, end, ROWS, BLOCK_K)

    n = first + tl.arange(0, ROWS)
    at = n - num_keyframe
    last = tl.load(slot + at, mask=(at >= 0) & (at < end), other=-1, cache_modifier=".cg")
    repeated = tl.full([], 2**31 - 1, tl.int32)  # the first kept row that is not the last of its token
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        to = tl.load(index + k.to(tl.int64) * index_stride_k, mask=k < K, other=-1)
        mine = (to >= begin) & (to < end)
        latest = tl.load(slot + tl.where(mine, to, 0), mask=mine, other=0, cache_modifier=".cg")
        repeated = tl.minimum(repeated, tl.min(tl.where(mine & (latest != k), k, 2**31 - 1), 0))
    stop = tl.max(last, 0) + 1

    source = tl.where(at < 0, n, num_keyframe + last.to(tl.int64))
    present = (at < 0) | (last >= 0)
    for offset in range(0, C, BLOCK_C):
        c = offset + tl.arange(0, BLOCK_C)
        inside = (n < N)[:, None] & (c < C)[None, :]
        grad = tl.load(grad_kept + source[:, None] * C + c[None, :], mask=inside & present[:, None], other=0)
        tl.store(grad_tokens + (b * N + n)[:, None] * C + c[None, :], grad, mask=inside)

    if repeated < stop:  # then the sums overwrite what was copied
        tl.debug_barrier()
        dtype: tl.constexpr = grad_kept.dtype.element_ty
        for offset in range(0, C, BLOCK_SUM):
            c = offset + tl.arange(0, BLOCK_SUM)
            total = tl.zeros([ROWS, BLOCK_SUM], tl.float64 if dtype == tl.float64 else tl.float32)
            copies = tl.zeros([ROWS], tl.int32)
            name = index + repeated.to(tl.int64) * index_stride_k
            row = grad_kept + (num_keyframe + repeated.to(tl.int64)) * C
            for _ in range(repeated, stop):
                copy = (at >= 0) & (n < N) & (at == tl.load(name))  # a token of this program that the row copies
                value = tl.load(row + c[None, :], mask=copy[:, None] & (c < C)[None, :], other=0)
                total += value.to(total.dtype)
                copies += copy.to(tl.int32)
                name += index_stride_k
                row += C
            inside = (copies > 1)[:, None] & (c < C)[None, :]
            tl.store(grad_tokens + (b * N + n)[:, None] * C + c[None, :], rounded(total, dtype), mask=inside)


def select(importance: Tensor, num_select: int) -> Tensor:
    index = _select_fake(importance, num_select)
    _select(importance, num_select, index, None)
    return index


def select_with_slots(importance: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
    index, slot = _select_with_slots_fake(importance, num_select)
    _select(importance, num_select, index, slot)
    return index, slot


def _select(importance: Tensor, num_select: int, index: Tensor, slot: Tensor | None) -> None:
    B, M = importance.shape
    sheet = min(max(power_of_two(M), 256), SHEET)
    launch(
        select_tokens_kernel,
        (B if M and (num_select or slot is not None) else 0,),
        importance,
        bits(importance),
        *importance.stride(),
        index,
        slot,
        M,
        num_select,
        BITS=8 * importance.element_size(),
        INFINITY=INFINITY[importance.dtype],
        SHEET=sheet,
        WHOLE=sheet >= M,
        num_warps=min(max(sheet // 256, 4), 16),
    )


def gather(tokens: Tensor, index: Tensor, num_keyframe: int) -> Tensor:
    kept = _gather_fake(tokens, index, num_keyframe)
    source, target = (bits(_channels(x)) for x in (tokens if tokens.ndim == 2 else _backend.rows(tokens), kept))
    B, N, C = source.shape
    rows = kept.shape[1]
    block = channels(source, 16)
    tile = min(max(8192 // (block * source.element_size()), 16), 1024)  # 64 bytes a thread
    launch(
        gather_tokens_forward_kernel,
        (B * blocks(rows, tile), blocks(C, block)),
        tokens,
        source,
        *source.stride()[:2],
        index,
        *index.stride(),
        target,
        C,
        N,
        num_keyframe,
        rows,
        blocks(rows, tile),
        ROWS=tile,
        BLOCK_C=block,
    )
    return kept


def gather_backward(grad_kept: Tensor, index: Tensor, num_keyframe: int, N: int) -> Tensor:
    grad_tokens = _gather_backward_fake(grad_kept, index, num_keyframe, N)
    source, target = _channels(grad_kept.contiguous()), _channels(grad_tokens)
    B, _, C = source.shape
    own, num_warps = ownership(B * N)
    launch(
        gather_tokens_backward_kernel,
        (B * blocks(N, own) if C else 0,),
        grad_kept,
        source,
        index,
        *index.stride(),
        index.new_empty(B, N, dtype=torch.int32),
        target,
        C,
        index.shape[1],
        N,
        num_keyframe,
        blocks(N, own),
        ROWS=own,
        BLOCK_K=BLOCK_K,
        BLOCK_C=channels(source, own, num_warps),
        BLOCK_SUM=min(max(4096 // own, 16), power_of_two(C)),  # a step of the sums has few rows, and waits for each
        num_warps=num_warps,
    )
    return grad_tokens


def _channels(tensor: Tensor) -> Tensor:
    """[B, N, C], the same memory: a value is one channel, a complex number two."""
    tensor = torch.view_as_real(tensor).flatten(2) if tensor.is_complex() else tensor
    return tensor if tensor.ndim == 3 else tensor[..., None]


def shipped(architecture: int) -> Iterator[Launch]:
    """Every kernel as the paper's shapes launch it."""
    for N in (1568, 4608, 16384):
        num_keyframe = N // 8
        num_select = int(0.7 * N) - num_keyframe
        importance = torch.empty(8, N - num_keyframe, device="meta")
        yield from recorded(architecture, select, importance, num_select)
        yield from recorded(architecture, select_with_slots, importance, num_select)
        yield from recorded(architecture, select, importance.half(), num_select)
        index = torch.empty(8, num_select, dtype=torch.int64, device="meta")
        yield from recorded(architecture, gather, index.new_empty(8, N), index, num_keyframe)
        for dtype in (torch.bfloat16, torch.float32):
            tokens = torch.empty(8, N, 768, dtype=dtype, device="meta")
            yield from recorded(architecture, gather, tokens, index, num_keyframe)
            yield from recorded(architecture, gather_backward, tokens[:, : N // 2], index, num_keyframe, N)
