"""keyframe_attention and keyframe_attention_topk in Triton.

Forward, a program a head and block of query rows: all keys pass by, the softmax is kept up to date on the way (Milakov
and Gimelshein 2018; Dao et al. 2022). Reads Q, K and V once (K and V again from L2), writes the output and two numbers
a row: its maximum and the logarithm of its sum.
Score, a program a head and block of non-keyframe keys: all query rows pass by, P is made again from those two numbers
and summed over the rows, in float32 within a block of rows, in float64 across blocks. Reads Q and K, writes 8 bytes a
key and head; a small second kernel takes the mean over heads. Plain attention has no score.
Backward: ``term`` is sum_j P_ij dP_ij of each row; ``query`` (a program a block of rows, all keys pass by) and ``key``
(a block of keys, all rows pass by) make P and dP again, so every gradient has one owner: no atomics, and the same bits
in every run. ``rows`` puts the kept rows first: the others take part only where a gradient arrives through the
importance, and then only in what it needs.

P = 2^((s - maximum) scale - log_sum), the difference first: the largest logit of a saturated row has 2^0 however large
it is, fused with the sum that follows or not. The score and the backward repeat the forward's products bit for bit.
A probability, or a logit's gradient, enters a product with 16-bit numbers as the sum of TERMS of them (high + low). One
alone leaves an error like that of rounding the result: the rule of accuracy allows it in the output of long sums only.
float32 is multiplied as such ("ieee"): tf32 would keep 11 of its 24 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _backend
from ._triton import INTERPRETED, Launch, architecture, blocks, launch, power_of_two, recorded, rounded
from .keyframe_attention import _backward_fake, _forward_fake, rows_first_strides
from .keyframe_attention_tuning import tile
from .token_selection import _gather, _select

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
FLOAT32 = torch.finfo(torch.float32)

BLOCK = 256  # tokens of a program that does one small thing a token
ONE_TERM_FROM = 1024  # keys from which the output is accurate enough with one 16-bit number a probability


class Form(NamedTuple):
    """What a kernel is compiled for."""

    ROWS: int  # of the tile of P: query rows
    KEYS: int
    D: int
    BLOCK_D: int  # D, or the power of two above
    SLICE: int  # of BLOCK_D: what one product of rows takes in; all where it is left to tensor cores
    VECTOR: int  # elements that strides count, and that rows are aligned to
    SIGN: int  # of the scale
    TERMS: int
    PRECISION: str
    LARGER: float = 1.0  # brings probabilities into the range of float16


# A kernel is compiled once for all sizes and strides.
RUNTIME = ["H", "N", "M", "plane", "num_keyframe", "num_select", "steps", "first", "end", "kept", "rows"]
MATRICES = ["query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value"]
RUNTIME += [f"{matrix}_{axis}" for matrix in MATRICES for axis in "bhn"]


@triton.jit
def _head(data, stride_b, stride_h, stride_n, head, H, FORM: tl.constexpr):
    """A head of [B, H, N, D] as a matrix: its address and the stride of its rows."""
    return data + (head // H * stride_b + head % H * stride_h) * FORM.VECTOR, stride_n.to(tl.int64) * FORM.VECTOR


@triton.jit
def _load(matrix, row, inside, begin, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """[rows, WIDTH] from column ``begin``; zeros beyond D and where not ``inside`` (None: all rows are)."""
    d = begin + tl.arange(0, WIDTH)
    at = matrix[0] + row.to(tl.int64)[:, None] * matrix[1] + d[None, :]
    if FORM.D == FORM.BLOCK_D:
        if inside is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=inside[:, None], other=0.0)
    else:
        if inside is None:
            return tl.load(at, mask=(d < FORM.D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=inside[:, None] & (d < FORM.D)[None, :], other=0.0)


@triton.jit
def _tile(matrix, row, inside, FORM: tl.constexpr):
    return _load(matrix, row, inside, 0, FORM.BLOCK_D, FORM)


@triton.jit
def _store(matrix, row, inside, x, FORM: tl.constexpr):
    d = tl.arange(0, FORM.BLOCK_D)
    at = matrix[0] + row.to(tl.int64)[:, None] * matrix[1] + d[None, :]
    tl.store(at, rounded(x, matrix[0].dtype.element_ty), mask=inside[:, None] & (d < FORM.D)[None, :])


@triton.jit
def _dot(a, b, acc, FORM: tl.constexpr):
    """a b + acc, in float32."""
    if INTERPRETED:  # it would multiply the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=FORM.PRECISION)


@triton.jit
def _dot_float32(p, x, acc, FORM: tl.constexpr):
    """p x + acc, p in float32 and x in the inputs' type: p as the sum of TERMS numbers of that type."""
    high = rounded(p, x.dtype)
    acc = _dot(high, x, acc, FORM)
    if FORM.TERMS == 2:
        acc = _dot(rounded(p - high.to(tl.float32), x.dtype), x, acc, FORM)
    return acc


@triton.jit
def _dot_rows(a, a_tile, b, b_tile, FORM: tl.constexpr):
    """Rows of a times rows of b. a, b: (matrix, row, inside), and the same rows as tiles."""
    if FORM.SLICE == FORM.BLOCK_D:
        return _dot(a_tile, tl.trans(b_tile), None, FORM)
    else:  # products without tensor cores hold their operands in registers
        product = tl.full([a_tile.shape[0], b_tile.shape[0]], 0.0, tl.float32)
        for begin in range(0, FORM.BLOCK_D, FORM.SLICE):
            a_slice = _load(a[0], a[1], a[2], begin, FORM.SLICE, FORM)
            b_slice = _load(b[0], b[1], b[2], begin, FORM.SLICE, FORM)
            product = _dot(a_slice, tl.trans(b_slice), product, FORM)
        return product


@triton.jit
def _logits(a, a_tile, b, b_tile, FORM: tl.constexpr):
    """Products with the sign of the scale: the largest is the largest logit. A scale of 0 leaves NaN as it is."""
    product = _dot_rows(a, a_tile, b, b_tile, FORM)
    return product if FORM.SIGN == 1 else product * FORM.SIGN


@triton.jit
def _statistics(lse, plane, row, inside):
    """Maximum and log2 of the sum of rows of the softmax; where not ``inside`` every probability becomes 0."""
    maximum = tl.load(lse + plane + row, mask=inside, other=0.0)
    return maximum, tl.load(lse + row, mask=inside, other=float("inf")) * LOG2E


@triton.jit
def _attend(queries, query_tile, keys, values, j, inside, scale, maximum, total, output, FORM: tl.constexpr):
    """One step of the online softmax: a block of keys."""
    key_tile = _tile(keys, j, inside, FORM)
    logits = _logits(queries, query_tile, (keys, j, inside), key_tile, FORM)
    if inside is not None:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    larger = tl.maximum(maximum, tl.max(logits, 1))
    shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row may begin with nothing but -inf
    probability = tl.exp2((logits - shift[:, None]) * scale)
    fade = tl.exp2((maximum - shift) * scale)
    total = total * fade + tl.sum(probability, 1)
    output = _dot_float32(probability, _tile(values, j, inside, FORM), output * fade[:, None], FORM)
    return larger, total, output


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_forward_kernel(
    query, query_b, query_h, query_n,  # [B, H, N, D]
    key, key_b, key_h, key_n,
    value, value_b, value_h, value_n,
    output, output_b, output_h, output_n,
    lse,  # [2, B, H, N]: of a row of the softmax the log of its sum, its maximum
    H,
    N,
    plane,  # B H N
    scale,  # |scale| log2(e)
    FORM: tl.constexpr,
):  # fmt: skip
    per_head = tl.cdiv(N, FORM.ROWS)
    head = (tl.program_id(0) // per_head).to(tl.int64)
    i = tl.program_id(0) % per_head * FORM.ROWS + tl.arange(0, FORM.ROWS)
    queries = _head(query, query_b, query_h, query_n, head, H, FORM), i, i < N
    query_tile = _tile(queries[0], i, i < N, FORM)
    keys = _head(key, key_b, key_h, key_n, head, H, FORM)
    values = _head(value, value_b, value_h, value_n, head, H, FORM)

    maximum = tl.full([FORM.ROWS], float("-inf"), tl.float32)
    total = tl.full([FORM.ROWS], 0.0, tl.float32)
    result = tl.full([FORM.ROWS, FORM.BLOCK_D], 0.0, tl.float32)
    whole = N // FORM.KEYS * FORM.KEYS
    for begin in range(0, whole, FORM.KEYS):
        j = begin + tl.arange(0, FORM.KEYS)
        maximum, total, result = _attend(
            queries, query_tile, keys, values, j, None, scale, maximum, total, result, FORM
        )
    if whole < N:
        j = whole + tl.arange(0, FORM.KEYS)
        maximum, total, result = _attend(
            queries, query_tile, keys, values, j, j < N, scale, maximum, total, result, FORM
        )

    outputs = _head(output, output_b, output_h, output_n, head, H, FORM)
    _store(outputs, i, i < N, result / total[:, None], FORM)
    tl.store(lse + head * N + i, tl.log2(total) * LN2, mask=i < N)
    tl.store(lse + plane + head * N + i, tl.where(maximum == float("-inf"), 0.0, maximum), mask=i < N)


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_score_kernel(
    query, query_b, query_h, query_n,  # [B, H, N, D]
    key, key_b, key_h, key_n,
    lse,  # [2, B, H, N]
    received,  # [B, H, M] float64: sum_i w_i P_ij of the non-keyframe keys
    H,
    N,
    M,  # N - num_keyframe
    plane,
    scale,
    log2_weight,  # of a keyframe row
    FORM: tl.constexpr,
):  # fmt: skip
    per_head = tl.cdiv(M, FORM.KEYS)
    head = (tl.program_id(0) // per_head).to(tl.int64)
    j = tl.program_id(0) % per_head * FORM.KEYS + tl.arange(0, FORM.KEYS)
    keys = _head(key, key_b, key_h, key_n, head, H, FORM), N - M + j, j < M
    key_tile = _tile(keys[0], N - M + j, j < M, FORM)
    queries = _head(query, query_b, query_h, query_n, head, H, FORM)
    lse += head * N

    column = tl.full([FORM.KEYS], 0.0, tl.float64)
    for begin in range(0, N, FORM.ROWS):
        i = begin + tl.arange(0, FORM.ROWS)
        row = tl.minimum(i, N - 1)  # the last again, of weight 0: an infinite key times a row of zeros is NaN
        maximum = tl.load(lse + plane + row)
        log_sum = tl.load(lse + i, mask=i < N, other=float("inf")) * LOG2E - tl.where(i < N - M, log2_weight, 0.0)
        query_tile = _tile(queries, row, None, FORM)
        logits = _logits(keys, key_tile, (queries, row, None), query_tile, FORM)  # [KEYS, ROWS]: a thread sums its own
        probability = tl.exp2((logits - maximum[None, :]) * scale - log_sum[None, :])
        column += tl.sum(probability, 1).to(tl.float64)
    tl.store(received + head * M + j, column, mask=j < M)


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_importance_kernel(received, importance, H, N, M, BLOCK: tl.constexpr):
    per_clip = tl.cdiv(M, BLOCK)
    b = (tl.program_id(0) // per_clip).to(tl.int64)
    j = tl.program_id(0) % per_clip * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for h in range(H):
        total += tl.load(received + (b * H + h) * M + j, mask=j < M, other=0.0)
    tl.store(importance + b * M + j, (total / (H * N)).to(tl.float32), mask=j < M)


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_backward_rows_kernel(
    index,  # [B, num_select] int64, ascending
    row,  # [B, N] int32: all tokens, the kept ones first, both in ascending order
    N,
    num_keyframe,
    num_select,
    steps,  # bits of num_select
    BLOCK: tl.constexpr,
):
    per_clip = tl.cdiv(N, BLOCK)
    b = (tl.program_id(0) // per_clip).to(tl.int64)
    i = tl.program_id(0) % per_clip * BLOCK + tl.arange(0, BLOCK)
    j = i - num_keyframe
    index += b * num_select
    low = tl.zeros([BLOCK], tl.int32)  # of the selected tokens so many are before this one
    high = low + num_select
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(index + middle, mask=low < high, other=2147483647) < j
        high = tl.where(before, high, middle)
        low = tl.where(before, middle + 1, low)
    selected = tl.load(index + low, mask=low < num_select, other=-1) == j
    slot = tl.where(selected, num_keyframe + low, num_keyframe + num_select + j - low)
    tl.store(row + b * N + tl.where(i < num_keyframe, i, slot), i, mask=i < N)


@triton.jit
def _token(row, head, H, N, r, inside):
    """Which tokens the rows r of the backward are."""
    if row is None:
        return r
    else:
        return tl.load(row + head // H * N + r, mask=inside, other=0)


@triton.jit
def _arriving(grad_importance, head, H, N, num_keyframe, j):
    """Gradient of the importance of keys, 0 for the keyframe's."""
    at = grad_importance + head // H * (N - num_keyframe) + j - num_keyframe
    return tl.load(at, mask=(j >= num_keyframe) & (j < N), other=0.0)


@triton.jit
def _weight(i, num_keyframe, keyframe_weight, share):
    """What a query row counts in the importance."""
    return tl.where(i < num_keyframe, keyframe_weight, 1.0) * share


@triton.jit
def _rows_of_map(
    queries, query_tile, grads, grad_tile, maximum, log_sum, weight, keys, values, grad_importance, head, H, N,
    num_keyframe, j, inside, scale, FORM: tl.constexpr,
):  # fmt: skip
    """P and dP of a block of rows and a block of keys, and those keys."""
    key_tile = _tile(keys, j, inside, FORM)
    logits = _logits(queries, query_tile, (keys, j, inside), key_tile, FORM)
    probability = tl.exp2((logits - maximum[:, None]) * scale - log_sum[:, None])
    if inside is not None:
        probability = tl.where(inside[None, :], probability, 0.0)
    grad = tl.zeros_like(probability)
    if grad_tile is not None:
        grad = _dot_rows(grads, grad_tile, (values, j, inside), _tile(values, j, inside, FORM), FORM)
    if grad_importance is not None:
        grad += weight[:, None] * _arriving(grad_importance, head, H, N, num_keyframe, j)[None, :]
    return probability, grad, key_tile


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_backward_term_kernel(
    query, query_b, query_h, query_n,  # [B, H, N, D]
    key, key_b, key_h, key_n,
    value, value_b, value_h, value_n,
    grad_output, grad_output_b, grad_output_h, grad_output_n,  # [B, H, kept, D] or None
    grad_importance,  # [B, N - num_keyframe] or None
    lse,  # [2, B, H, N]
    row,  # [B, N] or None
    term,  # [B, H, N] float32, in the order of row: sum_j P_ij dP_ij
    H,
    N,
    num_keyframe,
    first,  # of the rows of these programs
    end,
    kept,  # rows that have a gradient of the output
    plane,
    scale,
    keyframe_weight,
    share,  # 1 / (N H)
    FORM: tl.constexpr,
):  # fmt: skip
    per_head = tl.cdiv(end - first, FORM.ROWS)
    head = (tl.program_id(0) // per_head).to(tl.int64)
    r = first + tl.program_id(0) % per_head * FORM.ROWS + tl.arange(0, FORM.ROWS)
    i = _token(row, head, H, N, r, r < end)
    queries = _head(query, query_b, query_h, query_n, head, H, FORM), i, r < end
    query_tile = _tile(queries[0], i, r < end, FORM)
    grads = None
    grad_tile = None
    if grad_output is not None:
        grads = _head(grad_output, grad_output_b, grad_output_h, grad_output_n, head, H, FORM), r, r < kept
        grad_tile = _tile(grads[0], r, r < kept, FORM)
    keys = _head(key, key_b, key_h, key_n, head, H, FORM)
    values = _head(value, value_b, value_h, value_n, head, H, FORM)
    maximum, log_sum = _statistics(lse + head * N, plane, i, r < end)
    weight = _weight(i, num_keyframe, keyframe_weight, share)

    total = tl.full([FORM.ROWS], 0.0, tl.float32)
    whole = N // FORM.KEYS * FORM.KEYS
    for begin in range(0, whole, FORM.KEYS):
        j = begin + tl.arange(0, FORM.KEYS)
        probability, grad, _ = _rows_of_map(
            queries, query_tile, grads, grad_tile, maximum, log_sum, weight, keys, values, grad_importance, head, H, N,
            num_keyframe, j, None, scale, FORM,
        )  # fmt: skip
        total += tl.sum(probability * grad, 1)
    if whole < N:
        j = whole + tl.arange(0, FORM.KEYS)
        probability, grad, _ = _rows_of_map(
            queries, query_tile, grads, grad_tile, maximum, log_sum, weight, keys, values, grad_importance, head, H, N,
            num_keyframe, j, j < N, scale, FORM,
        )  # fmt: skip
        total += tl.sum(probability * grad, 1)
    tl.store(term + head * N + r, total, mask=r < end)


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_backward_query_kernel(
    query, query_b, query_h, query_n,  # [B, H, N, D]
    key, key_b, key_h, key_n,
    value, value_b, value_h, value_n,
    grad_output, grad_output_b, grad_output_h, grad_output_n,  # [B, H, kept, D] or None
    grad_importance,  # [B, N - num_keyframe] or None
    lse,  # [2, B, H, N]
    row,  # [B, N] or None
    term,  # [B, H, N]
    unit,  # [B, H] or None: the power of two that brings gradients of logits into the range of float16
    grad_query, grad_query_b, grad_query_h, grad_query_n,
    H,
    N,
    num_keyframe,
    first,
    end,
    kept,
    rows,  # rows that take part: the gradient of the others is zero
    plane,
    scale,
    keyframe_weight,
    share,
    factor,  # scale
    FORM: tl.constexpr,
):  # fmt: skip
    per_head = tl.cdiv(end - first, FORM.ROWS)
    head = (tl.program_id(0) // per_head).to(tl.int64)
    begin_row = first + tl.program_id(0) % per_head * FORM.ROWS
    r = begin_row + tl.arange(0, FORM.ROWS)
    i = _token(row, head, H, N, r, r < end)
    result = tl.full([FORM.ROWS, FORM.BLOCK_D], 0.0, tl.float32)
    if grad_output is not None or grad_importance is not None:  # noqa: SIM102 (known to the compiler, the next is not)
        if begin_row < rows:
            queries = _head(query, query_b, query_h, query_n, head, H, FORM), i, r < rows
            query_tile = _tile(queries[0], i, r < rows, FORM)
            grads = None
            grad_tile = None
            if grad_output is not None:
                grads = _head(grad_output, grad_output_b, grad_output_h, grad_output_n, head, H, FORM), r, r < kept
                grad_tile = _tile(grads[0], r, r < kept, FORM)
            keys = _head(key, key_b, key_h, key_n, head, H, FORM)
            values = _head(value, value_b, value_h, value_n, head, H, FORM)
            maximum, log_sum = _statistics(lse + head * N, plane, i, r < rows)
            weight = _weight(i, num_keyframe, keyframe_weight, share)
            row_term = tl.load(term + head * N + r, mask=r < rows, other=0.0)
            enlarge = 1.0 if unit is None else tl.load(unit + head)
            whole = N // FORM.KEYS * FORM.KEYS
            for begin in range(0, whole, FORM.KEYS):
                j = begin + tl.arange(0, FORM.KEYS)
                probability, grad, key_tile = _rows_of_map(
                    queries, query_tile, grads, grad_tile, maximum, log_sum, weight, keys, values, grad_importance,
                    head, H, N, num_keyframe, j, None, scale, FORM,
                )  # fmt: skip
                grad = probability * (grad - row_term[:, None]) * enlarge
                result = _dot_float32(grad, key_tile, result, FORM)
            if whole < N:
                j = whole + tl.arange(0, FORM.KEYS)
                probability, grad, key_tile = _rows_of_map(
                    queries, query_tile, grads, grad_tile, maximum, log_sum, weight, keys, values, grad_importance,
                    head, H, N, num_keyframe, j, j < N, scale, FORM,
                )  # fmt: skip
                grad = probability * (grad - row_term[:, None]) * enlarge
                result = _dot_float32(grad, key_tile, result, FORM)
            result *= factor / enlarge
    _store(_head(grad_query, grad_query_b, grad_query_h, grad_query_n, head, H, FORM), i, r < end, result, FORM)


@triton.jit
def _add_rows(
    keys, key_tile, values, value_tile, arriving, grad_key, grad_value, queries, grads, lse, row, term, head, H, N,
    num_keyframe, begin, kept, rows, plane, scale, keyframe_weight, share, enlarge, FORM: tl.constexpr,
):  # fmt: skip
    """What a block of rows adds to the gradients of a block of keys; inside, all is [KEYS, ROWS]."""
    r = begin + tl.arange(0, FORM.ROWS)
    i = _token(row, head, H, N, r, r < rows)
    maximum, log_sum = _statistics(lse, plane, i, r < rows)
    query_tile = _tile(queries, i, r < rows, FORM)
    logits = _logits(keys, key_tile, (queries, i, r < rows), query_tile, FORM)
    probability = tl.exp2((logits - maximum[None, :]) * scale - log_sum[None, :])
    grad = tl.zeros_like(probability)
    if grads is not None:
        grad_tile = _tile(grads, r, r < kept, FORM)
        grad_value = _dot_float32(probability * FORM.LARGER, grad_tile, grad_value, FORM)
        grad = _dot_rows(values, value_tile, (grads, r, r < kept), grad_tile, FORM)
    if arriving is not None:
        grad += arriving[:, None] * _weight(i, num_keyframe, keyframe_weight, share)[None, :]
    row_term = tl.load(term + r, mask=r < rows, other=0.0)
    grad = probability * (grad - row_term[None, :]) * enlarge
    return _dot_float32(grad, query_tile, grad_key, FORM), grad_value


@triton.jit(do_not_specialize=RUNTIME)
def keyframe_attention_backward_key_kernel(
    query, query_b, query_h, query_n,  # [B, H, N, D]
    key, key_b, key_h, key_n,
    value, value_b, value_h, value_n,
    grad_output, grad_output_b, grad_output_h, grad_output_n,  # [B, H, kept, D] or None
    grad_importance,  # [B, N - num_keyframe] or None
    lse,  # [2, B, H, N]
    row,  # [B, N] or None
    term,  # [B, H, N]
    unit,  # [B, H] or None
    grad_key, grad_key_b, grad_key_h, grad_key_n,
    grad_value, grad_value_b, grad_value_h, grad_value_n,
    H,
    N,
    num_keyframe,
    kept,
    rows,
    plane,
    scale,
    keyframe_weight,
    share,
    factor,
    FORM: tl.constexpr,
):  # fmt: skip
    per_head = tl.cdiv(N, FORM.KEYS)
    head = (tl.program_id(0) // per_head).to(tl.int64)
    j = tl.program_id(0) % per_head * FORM.KEYS + tl.arange(0, FORM.KEYS)
    keys = _head(key, key_b, key_h, key_n, head, H, FORM), j, j < N
    key_tile = _tile(keys[0], j, j < N, FORM)
    queries = _head(query, query_b, query_h, query_n, head, H, FORM)
    lse += head * N
    term += head * N
    arriving = None
    if grad_importance is not None:
        arriving = _arriving(grad_importance, head, H, N, num_keyframe, j)
    enlarge = 1.0 if unit is None else tl.load(unit + head)

    key_sum = tl.full([FORM.KEYS, FORM.BLOCK_D], 0.0, tl.float32)
    value_sum = tl.full([FORM.KEYS, FORM.BLOCK_D], 0.0, tl.float32)
    rest = 0
    if grad_output is not None:
        values = _head(value, value_b, value_h, value_n, head, H, FORM), j, j < N
        value_tile = _tile(values[0], j, j < N, FORM)
        grads = _head(grad_output, grad_output_b, grad_output_h, grad_output_n, head, H, FORM)
        rest = tl.cdiv(kept, FORM.ROWS) * FORM.ROWS
        for begin in range(0, rest, FORM.ROWS):
            key_sum, value_sum = _add_rows(
                keys, key_tile, values, value_tile, arriving, key_sum, value_sum, queries, grads, lse, row, term, head,
                H, N, num_keyframe, begin, kept, rows, plane, scale, keyframe_weight, share, enlarge, FORM,
            )  # fmt: skip
    if grad_importance is not None and (row is not None or grad_output is None):
        for begin in range(rest, rows, FORM.ROWS):
            key_sum, value_sum = _add_rows(
                keys, key_tile, None, None, arriving, key_sum, value_sum, queries, None, lse, row, term, head,
                H, N, num_keyframe, begin, kept, rows, plane, scale, keyframe_weight, share, enlarge, FORM,
            )  # fmt: skip

    grad_keys = _head(grad_key, grad_key_b, grad_key_h, grad_key_n, head, H, FORM)
    _store(grad_keys, j, j < N, key_sum * (factor / enlarge), FORM)
    grad_values = _head(grad_value, grad_value_b, grad_value_h, grad_value_n, head, H, FORM)
    _store(grad_values, j, j < N, value_sum * (1.0 / FORM.LARGER), FORM)


def forward(
    query: Tensor, key: Tensor, value: Tensor, num_keyframe: int, keyframe_weight: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, _ = query.shape
    M = N - num_keyframe
    output, importance, lse = _forward_fake(query, key, value, num_keyframe, keyframe_weight, scale)
    if H == 0:
        return output, importance.zero_(), lse
    vector, (query, key, value, _) = _common_vector(query, key, value, output)
    exponent, sign = _exponent(scale)
    form, tuned = _tuned("forward", query, vector, sign)
    launch(
        keyframe_attention_forward_kernel,
        (B * H * blocks(N, form.ROWS),),
        query,
        *_strided(vector, query, key, value, output),
        lse,
        H,
        N,
        B * H * N,
        exponent,
        **tuned,
    )
    if M > 0:
        importance = score(query, key, lse, num_keyframe, keyframe_weight, scale)
    return output, importance, lse


def score(query: Tensor, key: Tensor, lse: Tensor, num_keyframe: int, keyframe_weight: float, scale: float) -> Tensor:
    """The importance, from what ``forward`` wrote of each row's softmax."""
    B, H, N, _ = query.shape
    M = N - num_keyframe
    received = query.new_empty(B, H, M, dtype=torch.float64)
    importance = query.new_empty(B, M, dtype=torch.float32)
    vector, (query, key) = _common_vector(query, key)
    exponent, sign = _exponent(scale)
    form, tuned = _tuned("score", query, vector, sign)
    launch(
        keyframe_attention_score_kernel,
        (B * H * blocks(M, form.KEYS),),
        query,
        *_strided(vector, query, key),
        lse,
        received,
        H,
        N,
        M,
        B * H * N,
        exponent,
        math.log2(keyframe_weight) if keyframe_weight > 0 else -math.inf,
        **tuned,
    )
    launch(
        keyframe_attention_importance_kernel,
        (B * blocks(M, BLOCK),),
        query,
        received,
        importance,
        H,
        N,
        M,
        BLOCK=BLOCK,
    )
    return importance


def forward_topk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_keyframe: int,
    num_select: int,
    keyframe_weight: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output, importance, lse = forward(query, key, value, num_keyframe, keyframe_weight, scale)
    index = _select(importance, num_select)
    kept = _gather(output.transpose(1, 2).flatten(2), index, num_keyframe)  # [B, K, H * D]
    (B, H, _, D), K = query.shape, kept.shape[1]
    return kept.as_strided_((B, H, K, D), rows_first_strides(K, H, D)), importance, lse, index


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_output: Tensor | None,
    grad_importance: Tensor | None,
    lse: Tensor,
    index: Tensor | None,
    num_keyframe: int,
    keyframe_weight: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, _ = query.shape
    grads = _backward_fake(
        query, key, value, grad_output, grad_importance, lse, index, num_keyframe, keyframe_weight, scale
    )
    if query.numel() == 0:
        return grads
    grad_importance = None if grad_importance is None or num_keyframe == N else grad_importance.contiguous()
    kept = 0 if grad_output is None else grad_output.shape[2]
    grad_output = None if kept == 0 else grad_output
    taking_part = kept if grad_importance is None else N

    vector, (query, key, value, grad_output, *_) = _common_vector(query, key, value, grad_output, *grads)
    exponent, sign = _exponent(scale)
    plane, share = B * H * N, 1 / (N * H)
    row = None if index is None else _kept_first(index, N, num_keyframe)
    term = query.new_empty(B, H, N, dtype=torch.float32)
    half = query.dtype == torch.float16
    unit = _unit(value, grad_output, grad_importance, max(keyframe_weight, 1.0) * share) if half else None

    form, tuned = _tuned("query", query, vector, sign)
    with_output = min(blocks(kept, form.ROWS) * form.ROWS, N)  # rows of blocks that have a gradient of the output
    for first, end, grad in ((0, with_output, grad_output), (with_output, N, None)):
        tensors = _strided(vector, query, key, value, grad)
        launch(
            keyframe_attention_backward_term_kernel,
            (B * H * blocks(max(0, min(end, taking_part) - first), form.ROWS),),
            query,
            *tensors,
            grad_importance,
            lse,
            row,
            term,
            H,
            N,
            num_keyframe,
            first,
            min(end, taking_part),
            kept,
            plane,
            exponent,
            keyframe_weight,
            share,
            **tuned,
        )
        launch(
            keyframe_attention_backward_query_kernel,
            (B * H * blocks(end - first, form.ROWS),),
            query,
            *tensors,
            grad_importance,
            lse,
            row,
            term,
            unit,
            *_strided(vector, grads[0]),
            H,
            N,
            num_keyframe,
            first,
            end,
            kept,
            taking_part,
            plane,
            exponent,
            keyframe_weight,
            share,
            scale,
            **tuned,
        )
    form, tuned = _tuned("key", query, vector, sign)
    launch(
        keyframe_attention_backward_key_kernel,
        (B * H * blocks(N, form.KEYS),),
        query,
        *_strided(vector, query, key, value, grad_output),
        grad_importance,
        lse,
        row,
        term,
        unit,
        *_strided(vector, *grads[1:]),
        H,
        N,
        num_keyframe,
        kept,
        taking_part,
        plane,
        exponent,
        keyframe_weight,
        share,
        scale,
        **tuned,
    )
    return grads


def _exponent(scale: float) -> tuple[float, int]:
    """What a difference of products is multiplied with to give an exponent of 2, at least 0, and the scale's sign.

    A scale of 0 (or one that float32 takes for 0) has sign 0 and factor 1: 0 times an infinite difference is NaN.
    """
    exponent = min(abs(scale) * LOG2E.value, FLOAT32.max)
    return (1.0, 0) if exponent < FLOAT32.tiny else (exponent, 1 if scale > 0 else -1)


def _common_vector(*tensors: Tensor | None) -> tuple[int, list[Tensor | None]]:
    """How many elements all rows are aligned to, 16 bytes or 1, and the tensors with contiguous rows."""
    tensors = [None if x is None else _backend.rows(x) for x in tensors]
    given = [x for x in tensors if x is not None]
    vector = 16 // given[0].element_size()
    aligned = all(
        x.data_ptr() % 16 == 0
        and all(stride % vector == 0 for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
        for x in given
    )
    return vector if aligned else 1, tensors


def _strided(vector: int, *tensors: Tensor | None) -> list[Any]:
    """Each tensor and its strides in units of ``vector`` elements."""
    return [
        argument
        for x in tensors
        for argument in ((None, 0, 0, 0) if x is None else (x, *(stride // vector for stride in x.stride()[:3])))
    ]


def _tuned(kernel: str, query: Tensor, vector: int, sign: int) -> tuple[Form, dict[str, Any]]:
    """What to compile a kernel for, and the keywords of its launch."""
    N, D = query.shape[2:]
    block_d = max(16, power_of_two(D))
    half = query.element_size() == 2
    choice = tile(kernel, 0 if INTERPRETED else architecture(query), query.element_size(), block_d, N)
    form = Form(
        ROWS=choice.rows,
        KEYS=choice.keys,
        D=D,
        BLOCK_D=block_d,
        SLICE=block_d if half else max(16, block_d // 2) if INTERPRETED else 16,
        VECTOR=vector,
        SIGN=sign,
        TERMS=2 if half and (kernel != "forward" or N < ONE_TERM_FROM) else 1,
        PRECISION="ieee",
        LARGER=1024.0 if query.dtype == torch.float16 else 1.0,
    )
    return form, {
        "FORM": form,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
        "fp_fusion": True,
    }


def _kept_first(index: Tensor, N: int, num_keyframe: int) -> Tensor:
    """row [B, N] int32: the tokens, the kept ones first."""
    B, num_select = index.shape
    row = index.new_empty(B, N, dtype=torch.int32)
    launch(
        keyframe_attention_backward_rows_kernel,
        (B * blocks(N, BLOCK),),
        index,
        index,
        row,
        N,
        num_keyframe,
        num_select,
        num_select.bit_length(),
        BLOCK=BLOCK,
    )
    return row


def _unit(value: Tensor, grad_output: Tensor | None, grad_importance: Tensor | None, weight: float) -> Tensor:
    """[B, H] float32: the power of two that brings what a logit's gradient can be at most to 2^14, for float16."""

    def largest(x, dims):
        # One row of infinities would take every other row's gradient below the smallest number.
        return x.abs().nan_to_num_(nan=0, posinf=0).amax(dims).float()

    bound = value.new_zeros(value.shape[:2], dtype=torch.float32)
    if grad_output is not None:
        bound += largest(value, (2, 3)) * largest(grad_output, (2, 3)) * value.shape[3]
    if grad_importance is not None:
        bound += weight * largest(grad_importance, 1)[:, None]
    return torch.exp2((13 - torch.log2(bound).ceil()).clamp(-100, 100))


def shipped(architecture: int) -> Iterator[Launch]:
    """Every kernel as the paper's shapes launch it."""
    yield from recorded(architecture, _all_kernels, torch.bfloat16, 784, 64)
    yield from recorded(architecture, _all_kernels, torch.bfloat16, 1568, 64)


def shipped_rest(architecture: int) -> Iterator[Launch]:
    """The other types and widths that the table has rows for."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (16, 32, 40, 64, 128, 256):
            yield from recorded(architecture, _all_kernels, dtype, 784, D)


def _all_kernels(dtype: torch.dtype, N: int, D: int, B: int = 8, H: int = 12) -> None:
    qkv = torch.empty(B, N, 3, H, D, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    num_keyframe, num_select = N // 8, N // 2
    output, importance, lse, index = forward_topk(*qkv, num_keyframe, num_select, 4.0, D**-0.5)
    for grad_importance in (None, importance):
        backward(*qkv, output, grad_importance, lse, index, num_keyframe, 4.0, D**-0.5)
    backward(*qkv, qkv[0], None, lse, None, num_keyframe, 4.0, D**-0.5)
