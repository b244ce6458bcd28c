"""``_cells.cell_map`` in Triton: which kept token, if any, each cell of the dense grid holds.

A program owns a range of cells of one sample. It marks them dropped, then reads all positions of the sample (8 K bytes,
from L2) and takes those that fall into its range, so no two programs write one cell and the map needs no launch of its
own where a kernel reads only its own cells. Of equal positions the maximum of integers chooses: the order in which
threads arrive does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import blocks, launch, power_of_two

CELLS = 1024
BLOCK_K = 1024


@triton.jit
def own_cells(position, stride_k, K, slot, first, end, CELLS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Fills slot[first:end], at most CELLS of one sample, and makes it visible to the whole program.

    position [K] int64 and slot [cells] int32 are of that sample.
    """
    cell = first + tl.arange(0, CELLS)
    tl.store(slot + cell, tl.full([CELLS], -1, tl.int32), mask=cell < end)
    tl.debug_barrier()
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        at = tl.load(position + k.to(tl.int64) * stride_k, mask=k < K, other=-1)
        mine = (at >= first) & (at < end)
        tl.atomic_max(slot + tl.where(mine, at, 0), k, mask=mine, sem="relaxed")
    tl.debug_barrier()


@triton.jit(do_not_specialize=["stride_b", "K", "cells", "ranges"])
def cell_map_kernel(
    position,  # [B, K] int64
    stride_b,
    stride_k,
    slot,  # [B, cells] int32
    K,
    cells,
    ranges,  # of CELLS cells in a sample
    CELLS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) // ranges
    first = tl.program_id(0).to(tl.int64) % ranges * CELLS
    end = tl.minimum(first + CELLS, cells)
    own_cells(position + b * stride_b, stride_k, K, slot + b * cells, first, end, CELLS, BLOCK_K)


def ownership(cells: int) -> tuple[int, int]:
    """How many cells a program owns, and its warps: some 1,000 programs, for each reads all positions."""
    own = min(max(power_of_two(cells // 1024), 16), 256)
    return own, 4 if own <= 64 else 8


def cell_map(position: Tensor, cells: int) -> Tensor:
    """slot [B, cells] int32; a position outside is left out."""
    B, K = position.shape
    slot = position.new_empty(B, cells, dtype=torch.int32)
    ranges = blocks(cells, CELLS)
    launch(
        cell_map_kernel,
        (B * ranges,),
        position,
        position,
        *position.stride(),
        slot,
        K,
        cells,
        ranges,
        CELLS=CELLS,
        BLOCK_K=BLOCK_K,
    )
    return slot
