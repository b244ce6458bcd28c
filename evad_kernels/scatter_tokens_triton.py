"""scatter_tokens in Triton: forward one launch, backward two, with a fill's gradient three (of one row: four).

Forward: a program owns a range of cells of one sample. It inverts the positions for its range (_cells_triton.py), then
writes each of its rows once, from the token or the fill. Reads K C + dropped C elements, writes cells C; the positions
come from L2, 8 K bytes a program.
Backward: row k is the gradient of its cell; the map of all cells says whether a later token took it. The gradient of
the fill reads the dropped rows only. Each sum has one owner and is float64, in one order: no atomics.
Forward and grad_tokens copy bits: elements travel as integers of their size, one kernel for float16 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _backend
from ._cells_triton import BLOCK_K, cell_map, own_cells, ownership
from ._triton import Launch, bits, blocks, channels, launch, recorded, rounded
from .scatter_tokens import _backward_fake, _forward_fake

ROWS = 16  # tokens or cells of a program in the backward
RUN = 64  # rows in a partial sum of the fill's gradient
BLOCK_SUM = 64  # channels of a program that sums


@triton.jit(do_not_specialize=["position_stride_b", "K", "cells", "ranges"])
def scatter_tokens_forward_kernel(
    tokens,  # [B, K, C]
    stride_b,
    stride_k,
    position,  # [B, K] int64
    position_stride_b,
    position_stride_k,
    fill,  # [C], [cells, C] or None
    fill_stride,  # of a cell: 0 or C
    slot,  # [B, cells] int32, written on the way
    dense,  # [B, cells, C]
    K,
    C,
    cells,
    ranges,  # of CELLS cells in a sample
    CELLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) // ranges
    first = tl.program_id(0).to(tl.int64) % ranges * CELLS
    end = tl.minimum(first + CELLS, cells)
    slot += b * cells
    own_cells(position + b * position_stride_b, position_stride_k, K, slot, first, end, CELLS, BLOCK_K)

    cell = first + tl.arange(0, CELLS)
    exists = cell < end
    k = tl.load(slot + cell, mask=exists, other=-1, cache_modifier=".cg")
    kept = k >= 0
    token = tokens + b * stride_b + k.to(tl.int64) * stride_k
    for begin in range(0, C, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        inside = exists[:, None] & (c < C)[None, :]
        row = tl.load(token[:, None] + c[None, :], mask=inside & kept[:, None], other=0)
        if fill is not None:
            blank = fill + cell[:, None] * fill_stride + c[None, :]
            row = tl.where(kept[:, None], row, tl.load(blank, mask=inside & ~kept[:, None], other=0))
        tl.store(dense + (b * cells + cell)[:, None] * C + c[None, :], row, mask=inside)


@triton.jit(do_not_specialize=["position_stride_b", "K", "cells", "ranges"])
def scatter_tokens_backward_kernel(
    grad_dense,  # [B, cells, C]
    position,  # [B, K] int64
    position_stride_b,
    position_stride_k,
    slot,  # [B, cells] int32
    grad_tokens,  # [B, K, C]
    K,
    C,
    cells,
    ranges,  # of ROWS tokens in a sample
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) // ranges
    k = tl.program_id(0).to(tl.int64) % ranges * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = tl.load(position + b * position_stride_b + k * position_stride_k, mask=k < K, other=-1)
    inside = (cell >= 0) & (cell < cells)
    cell = b * cells + tl.where(inside, cell, 0)
    placed = inside & (tl.load(slot + cell, mask=inside, other=-1) == k)
    row = tl.load(grad_dense + cell[:, None] * C + c[None, :], mask=placed[:, None] & (c < C)[None, :], other=0)
    tl.store(grad_tokens + (b * K + k)[:, None] * C + c[None, :], row, mask=(k < K)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=["B", "cells"])
def scatter_tokens_backward_cells_kernel(
    grad_dense,  # [B, cells, C]
    slot,  # [B, cells] int32
    grad_fill,  # [cells, C]
    B,
    C,
    cells,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (cell < cells)[:, None] & (c < C)[None, :]
    total = tl.zeros([ROWS, BLOCK_C], tl.float64)
    row = cell
    for _ in range(B):
        dropped = tl.load(slot + row, mask=cell < cells, other=0) < 0
        grad = tl.load(grad_dense + row[:, None] * C + c[None, :], mask=dropped[:, None] & inside, other=0)
        total += grad.to(tl.float64)
        row += cells
    grad = rounded(total.to(tl.float32), grad_fill.dtype.element_ty)
    tl.store(grad_fill + cell[:, None] * C + c[None, :], grad, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def scatter_tokens_backward_run_kernel(
    grad_dense,  # [rows, C]
    slot,  # [rows] int32
    partial,  # [runs, C] float64
    C,
    rows,
    RUN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    row = run * RUN + tl.arange(0, RUN)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dropped = tl.load(slot + row, mask=row < rows, other=0) < 0
    grad = tl.load(grad_dense + row[:, None] * C + c[None, :], mask=dropped[:, None] & (c < C)[None, :], other=0)
    tl.store(partial + run * C + c, tl.sum(grad.to(tl.float64), axis=0), mask=c < C)


@triton.jit(do_not_specialize=["runs"])
def scatter_tokens_backward_sum_kernel(
    partial,  # [runs, C] float64
    grad_fill,  # [C]
    C,
    runs,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float64)
    for begin in range(0, runs, ROWS):
        run = begin + tl.arange(0, ROWS)
        inside = (run < runs)[:, None] & (c < C)[None, :]
        total += tl.load(partial + run.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0)
    grad = rounded(tl.sum(total, axis=0).to(tl.float32), grad_fill.dtype.element_ty)
    tl.store(grad_fill + c, grad, mask=c < C)


def forward(tokens: Tensor, position: Tensor, fill: Tensor | None, cells: int) -> Tensor:
    B, K, C = tokens.shape
    dense = _forward_fake(tokens, position, fill, cells)
    tokens = bits(_backend.rows(tokens))
    fill_stride = C if fill is not None and fill.ndim == 2 else 0
    own, num_warps = ownership(B * cells)
    ranges = blocks(cells, own)
    launch(
        scatter_tokens_forward_kernel,
        (B * ranges if C else 0,),
        tokens,
        tokens,
        *tokens.stride()[:2],
        position,
        *position.stride(),
        None if fill is None else bits(fill.contiguous()),
        fill_stride,
        position.new_empty(B, cells, dtype=torch.int32),
        bits(dense),
        K,
        C,
        cells,
        ranges,
        CELLS=own,
        BLOCK_K=BLOCK_K,
        BLOCK_C=channels(tokens, own, num_warps),
        num_warps=num_warps,
    )
    return dense


def backward(grad_dense: Tensor, position: Tensor, fill_ndim: int) -> tuple[Tensor, Tensor]:
    B, cells, C = grad_dense.shape
    K = position.shape[1]
    grad_dense = grad_dense.contiguous()
    grad_tokens, grad_fill = _backward_fake(grad_dense, position, fill_ndim)
    slot = cell_map(position, cells)
    block = channels(grad_dense, ROWS)
    launch(
        scatter_tokens_backward_kernel,
        (B * blocks(K, ROWS), blocks(C, block)),
        grad_dense,
        bits(grad_dense),
        position,
        *position.stride(),
        slot,
        bits(grad_tokens),
        K,
        C,
        cells,
        blocks(K, ROWS),
        ROWS=ROWS,
        BLOCK_C=block,
    )
    if fill_ndim == 2:
        launch(
            scatter_tokens_backward_cells_kernel,
            (blocks(cells, ROWS), blocks(C, BLOCK_SUM)),
            grad_dense,
            grad_dense,
            slot,
            grad_fill,
            B,
            C,
            cells,
            ROWS=ROWS,
            BLOCK_C=BLOCK_SUM,
        )
    if fill_ndim == 1:
        runs = blocks(B * cells, RUN)
        partial = grad_dense.new_empty(runs, C, dtype=torch.float64)
        launch(
            scatter_tokens_backward_run_kernel,
            (runs, blocks(C, BLOCK_SUM)),
            grad_dense,
            grad_dense,
            slot,
            partial,
            C,
            B * cells,
            RUN=RUN,
            BLOCK_C=BLOCK_SUM,
        )
        launch(
            scatter_tokens_backward_sum_kernel,
            (blocks(C, BLOCK_SUM),),
            grad_dense,
            partial,
            grad_fill,
            C,
            runs,
            ROWS=RUN,
            BLOCK_C=BLOCK_SUM,
        )
    return grad_tokens, grad_fill


def shipped(architecture: int) -> Iterator[Launch]:
    """Every kernel as the paper's shapes launch it."""
    for dtype, fill_ndim in ((torch.bfloat16, 2), (torch.float32, 1), (torch.bfloat16, 0)):
        for B, (T, Gh, Gw) in ((1, (8, 14, 14)), (8, (8, 18, 32))):
            cells, C = T * Gh * Gw, 384
            K = int(0.35 * cells)
            tokens = torch.empty(B, K, C, dtype=dtype, device="meta")
            position = torch.empty(B, K, dtype=torch.int64, device="meta")
            fill = (None, tokens[0, 0], tokens.new_empty(cells, C))[fill_ndim]
            yield from recorded(architecture, forward, tokens, position, fill, cells)
            yield from recorded(architecture, backward, tokens.new_empty(B, cells, C), position, fill_ndim)
