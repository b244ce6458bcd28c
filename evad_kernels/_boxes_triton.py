"""``_boxes`` on a GPU: what a box weighs along each axis, made once a box before the RoI kernels that sample with it.

A program takes one side of one box (of a tube: in one frame) and writes

    weight [cell, bin]      the weight of every cell of the axis in every bin: the mean over the bin's samples
    window [2, bin]         first cell, and one beyond the last, that weigh in a bin
    span [2]                the same of all bins

with the arithmetic of csrc/roi_boxes.h. Some 0.8 KB a box at 14 x 14 cells: it stays in L2. Kernels then need no box
arithmetic in their loops over frames and channels, know zeros without computing them, and a gradient finds the weight
of any cell in the bin of the maximum with one load. In the dtype of the boxes and without fused multiply-adds, so that
a sample lies outside where the reference says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import launch, plain, power_of_two, unspecialised

TILE = 256  # cells x bins of a step of a program


class BoxTables(NamedTuple):
    """What kernels read of boxes; an item is a box, or a tube in one frame."""

    weight: Tensor  # [items, height * oh + width * ow] float32: rows [cell, bin], then columns
    window: Tensor  # [items, 2, oh + ow] int32: first cell and end of every bin
    span: Tensor  # [items, 4] int32: first cell and end of the rows, of the columns
    level: Tensor | None  # [items] int32


class Tile(NamedTuple):
    """What a program holds in registers: of ``shape``, ``each`` elements a thread, which may use ``registers``."""

    shape: tuple[int, ...]
    each: int
    registers: int

    def warps(self, *shape: int) -> int:
        """For a tile of ``shape`` where the whole one is too large."""
        return min(max(math.prod(shape) // (32 * self.each), 1), 8)


class Levels(NamedTuple):
    """The rule that gives a box its level (pyramid_roi_align)."""

    canonical_size: float
    canonical_level: int
    first: int  # number of the finest level


@triton.jit
def divided(x, y):
    """x / y, rounded to nearest: `/` of float32 is not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, tl.full((), y, tl.float32))
    else:
        return x / tl.full((), y, x.dtype)


@triton.jit
def pyramid_level(x1, y1, x2, y2, RULE: tl.constexpr, COUNT: tl.constexpr):
    """Index among COUNT levels by RULE (Levels) of a box; one without a level goes to the finest."""
    BOX: tl.constexpr = x1.dtype
    area = (x2 - x1) * (y2 - y1)
    size = tl.sqrt(area) if area.dtype == tl.float64 else tl.sqrt_rn(area)
    fraction = divided(size, RULE[0]) + tl.full((), 2.220446049250313e-16, BOX)
    octave = tl.log2(fraction.to(tl.float64)).to(BOX)  # in float32 a GPU's log2 is approximate
    level = tl.floor(octave + RULE[1]) - RULE[2]
    return tl.where(level > 0, tl.where(level < COUNT - 1, level, COUNT - 1), 0).to(tl.int32)


@triton.jit(do_not_specialize=["B", "frames", "oh", "ow", "height", "width"])
def box_tables_kernel(
    corners,  # [items, 4] float32 or float64
    batch,  # [items / frames] int64, or None
    sizes,  # height and width of every level, finest first; unspecialised
    weight,
    window,
    span,
    level,
    B,
    frames,  # items of a box
    oh,
    ow,
    height,  # at most
    width,
    SCALES: tl.constexpr,  # cells a pixel of every level
    RULE: tl.constexpr,  # Levels
    SAMPLING_RATIO: tl.constexpr,
    ALIGNED: tl.constexpr,
    CELLS: tl.constexpr,
    BINS: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    is_row = tl.program_id(1) == 0
    BOX: tl.constexpr = corners.dtype.element_ty
    x1 = tl.load(corners + item * 4)
    y1 = tl.load(corners + item * 4 + 1)
    x2 = tl.load(corners + item * 4 + 2)
    y2 = tl.load(corners + item * 4 + 3)
    is_box = (x2 >= x1) & (y2 >= y1)  # not for NaN
    if batch is not None:
        b = tl.load(batch + item // frames)
        is_box = is_box & (b >= 0) & (b < B)

    size = plain(tl.where(is_row, sizes[0], sizes[1]))
    scale = tl.full((), SCALES[0], BOX)
    if level is not None:
        LEVELS: tl.constexpr = len(SCALES)
        mine = pyramid_level(x1, y1, x2, y2, RULE, LEVELS)
        for index in tl.static_range(1, LEVELS):
            of_level = plain(tl.where(is_row, sizes[2 * index], sizes[2 * index + 1]))
            size = tl.where(mine == index, of_level, size)
            scale = tl.where(mine == index, tl.full((), SCALES[index], BOX), scale)
        tl.store(level + item, mine, mask=is_row)

    bins = tl.where(is_row, oh, ow)
    OFFSET: tl.constexpr = 0.5 if ALIGNED else 0.0
    low = tl.where(is_row, y1, x1) * scale - OFFSET
    low = tl.where(is_box, low, float("nan"))  # what is no box samples nowhere
    length = tl.where(is_row, y2, x2) * scale - OFFSET - low
    if not ALIGNED:
        length = tl.where(length < 1, 1, length)
    bin_length = length / bins if length.dtype == tl.float64 else tl.div_rn(length, bins.to(BOX))

    weight += item * (height.to(tl.int64) * oh + width.to(tl.int64) * ow) + tl.where(is_row, 0, height * oh)
    window += item * 2 * (oh + ow) + tl.where(is_row, 0, oh)
    first_of_all, end_of_all = size, 0
    for first_bin in range(0, bins, BINS):
        bin = first_bin + tl.arange(0, BINS)
        start = low + bin.to(BOX) * bin_length
        first, end = tl.full([BINS], size, tl.int32), tl.zeros([BINS], tl.int32)
        for first_cell in range(0, size, CELLS):
            cell = first_cell + tl.arange(0, CELLS)[:, None]
            total = tl.zeros([CELLS, BINS], tl.float32)
            for sample in range(SAMPLING_RATIO):
                at = start + divided((sample + 0.5) * bin_length, SAMPLING_RATIO)
                inside = (at >= -1) & (at <= size)
                at = tl.where(inside & (at > 0), at, 0)
                before = tl.minimum(at.to(tl.int32), size - 1)
                after = tl.where(before < size - 1, at - before.to(BOX), 0)  # the weight of the cell after it
                total += tl.where(inside[None, :] & (cell == before[None, :]), (1 - after).to(tl.float32)[None, :], 0)
                total += tl.where(inside[None, :] & (cell == before[None, :] + 1), after.to(tl.float32)[None, :], 0)
            exists = (cell < size) & (bin < bins)[None, :]
            tl.store(weight + cell * bins + bin[None, :], divided(total, SAMPLING_RATIO), mask=exists)
            first = tl.minimum(first, tl.min(tl.where(exists & (total > 0), cell, size), axis=0))
            end = tl.maximum(end, tl.max(tl.where(exists & (total > 0), cell + 1, 0), axis=0))
        tl.store(window + bin, first, mask=bin < bins)
        tl.store(window + oh + ow + bin, end, mask=bin < bins)
        first_of_all = tl.minimum(first_of_all, tl.min(first))
        end_of_all = tl.maximum(end_of_all, tl.max(end))
    span += item * 4 + tl.where(is_row, 0, 2)
    tl.store(span, first_of_all)
    tl.store(span + 1, end_of_all)


def box_tables(
    corners: Tensor,
    batch: Tensor | None,
    B: int,
    *,
    sizes: Sequence[int],
    scales: Sequence[float],
    output: Sequence[int],
    sampling_ratio: int,
    aligned: bool = True,
    rule: Levels | None = None,
) -> BoxTables:
    """Tables of boxes [R, 4] or [R, T, 4]; ``sizes`` are the height and width of every level, ``rule`` chooses one."""
    oh, ow = output
    height, width = max(sizes[::2]), max(sizes[1::2])
    items = corners.shape[:-1].numel()
    integers = {"dtype": torch.int32, "device": corners.device}
    tables = BoxTables(
        torch.empty(items, height * oh + width * ow, dtype=torch.float32, device=corners.device),
        torch.empty(items, 2, oh + ow, **integers),
        torch.empty(items, 4, **integers),
        None if rule is None else torch.empty(items, **integers),
    )
    bins = min(power_of_two(max(output)), 64)
    launch(
        box_tables_kernel,
        (items, 2),
        corners,
        corners.contiguous(),
        None if batch is None else batch.contiguous(),
        unspecialised(sizes),
        *tables,
        B,
        corners.shape[1] if corners.ndim == 3 else 1,
        oh,
        ow,
        height,
        width,
        SCALES=tuple(scales),
        RULE=None if rule is None else tuple(rule),
        SAMPLING_RATIO=sampling_ratio,
        ALIGNED=aligned,
        CELLS=min(power_of_two(max(height, width)), TILE // bins),
        BINS=bins,
        num_warps=1,
    )
    return tables


@triton.jit
def boxes_of(b, order, begin, boxes_per_image):
    """The range of an image's boxes in ``order``, or among the rows themselves."""
    if order is None:
        return b * boxes_per_image, (b + 1) * boxes_per_image
    else:
        return tl.load(begin + b), tl.load(begin + b + 1)


@triton.jit
def touches(span, first_y, end_y, first_x, end_x):
    """Whether a box weighs in a tile of cells."""
    rows = (tl.load(span) < end_y) & (tl.load(span + 1) > first_y)
    return rows & (tl.load(span + 2) < end_x) & (tl.load(span + 3) > first_x)


@triton.jit
def touching(window, stride, bins, first_cell, end_cell, BINS: tl.constexpr):
    """The range of an axis' bins that weigh in cells [first_cell, end_cell)."""
    bin = tl.arange(0, BINS)
    first = tl.load(window + bin, mask=bin < bins, other=end_cell)
    end = tl.load(window + stride + bin, mask=bin < bins, other=0)
    hit = (first < end_cell) & (end > first_cell)
    return tl.min(tl.where(hit, bin, bins)), tl.max(tl.where(hit, bin + 1, 0))


@triton.jit
def add_bins(total, grad, C, c, rows, columns, window, y, x, height, width, oh, ow, BINS: tl.constexpr):
    """total [ROWS, COLUMNS, CHANNELS], of cells y and x, plus what arrives from one box's ``grad`` [oh, ow, C].

    ``rows``, ``columns`` and ``window`` are the box's tables.
    """
    first_p, end_p = touching(window, oh + ow, oh, tl.min(y), tl.max(y) + 1, BINS)
    first_q, end_q = touching(window + oh, oh + ow, ow, tl.min(x), tl.max(x) + 1, BINS)
    for q in range(first_q, end_q):
        of_rows = tl.zeros([y.shape[0], c.shape[0]], tl.float32)
        for p in range(first_p, end_p):
            g = tl.load(grad + (tl.cast(p, tl.int64) * ow + q) * C + c, mask=c < C, other=0).to(tl.float32)
            of_rows += tl.load(rows + y * oh + p, mask=y < height, other=0)[:, None] * g[None, :]
        of_column = tl.load(columns + x * ow + q, mask=x < width, other=0)
        total += of_rows[:, None, :] * of_column[None, :, None]
    return total
