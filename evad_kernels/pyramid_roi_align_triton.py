"""pyramid_roi_align in Triton: the boxes' tables (_boxes_triton.py: level and weights), then one kernel each way.

One launch for all boxes and levels: no box is looked for by level, nothing is asked of the device.

Forward: a program owns (box, channels) and finds the box's level in the table. As in roi_align_3d_triton.py a row of
the level is summed over the columns of each bin once and kept with the one before it. Levels are read where they lie:
lanes run along the channels of channels-last memory, along the bins of a row otherwise. Reads the cells a box touches,
in whole sectors, and writes R C oh ow elements.

Backward: a program owns (image, tile of one level's cells, channels) and adds the boxes of its image on its level, in
order: deterministic without atomics, and every element of the gradients is written once. Reads the gradient, channels
last, once for every tile that a box touches: 2 to 6 of 8 x 8 cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._boxes import BoxesByImage
from ._boxes_triton import Levels, Tile, add_bins, box_tables, boxes_of, touches
from ._triton import Launch, blocks, launch, plain, power_of_two, recorded, rounded, unspecialised
from .pyramid_roi_align import _backward_fake, _forward_fake

TAPS = 3  # columns of a bin whose loads go out together: as many as two samples touch where a bin is up to 2 cells wide

# Tiles, the same on sm_80, 90 and 100.
FORWARD = Tile((32, 8), 4, 128)  # [channels, bins of a row]
BACKWARD = Tile((8, 8, 32), 32, 216)  # [rows, columns, channels]


@triton.jit
def add_cells(total, cells, stride_c, c, C, weight, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """total [CHANNELS, COLUMNS] plus weight [COLUMNS] times ``cells``, pointers [COLUMNS], where it is not 0."""
    cells = tl.multiple_of(cells, ALIGNMENT)  # a choice of levels has lost it
    at = cells[None, :] + c[:, None] * stride_c
    touched = (weight > 0)[None, :] & (c < C)[:, None]
    if CHANNELS_LAST:
        features = tl.load(at, mask=touched, other=0)
    else:  # in one dimension lanes run along the bins: of two without known contiguity Triton 3.6 takes the first
        SIZE: tl.constexpr = total.shape[0] * total.shape[1]
        features = tl.load(tl.reshape(at, [SIZE]), mask=tl.reshape(touched, [SIZE]), other=0)
        features = tl.reshape(features, total.shape)
    return total + weight[None, :] * features.to(tl.float32)


@triton.jit(do_not_specialize=["boxes_per_image", "C", "oh", "ow", "height", "width"])
def pyramid_roi_align_forward_kernel(
    levels,  # of [B, C, h, w], finest first
    strides,  # of image, channel, row and column of every level; unspecialised
    weight,  # BoxTables
    window,
    level,
    batch,  # [R] int64, or None
    samples,  # [R, C, oh, ow]
    boxes_per_image,
    C,
    oh,
    ow,
    height,  # of the tables
    width,
    LEVELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # all levels
    ALIGNMENT: tl.constexpr,  # of cells, in bytes
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = r // boxes_per_image if batch is None else tl.load(batch + r)
    mine = tl.load(level + r)
    features = levels[0]
    stride_b, stride_c, stride_h, stride_w = strides[0], strides[1], strides[2], strides[3]
    for index in tl.static_range(1, LEVELS):
        features = tl.where(mine == index, levels[index], features)
        stride_b = tl.where(mine == index, strides[4 * index], stride_b)
        stride_c = tl.where(mine == index, strides[4 * index + 1], stride_c)
        stride_h = tl.where(mine == index, strides[4 * index + 2], stride_h)
        stride_w = tl.where(mine == index, strides[4 * index + 3], stride_w)
    stride_b, stride_c = plain(tl.cast(stride_b, tl.int64)), plain(tl.cast(stride_c, tl.int64))
    stride_h, stride_w = plain(tl.cast(stride_h, tl.int64)), plain(tl.cast(stride_w, tl.int64))
    features += b * stride_b
    if CHANNELS_LAST:
        stride_c = 1
    rows = weight + r * (height * oh + width * ow)
    columns = rows + height * oh
    first = window + r * 2 * (oh + ow)
    end = first + oh + ow

    for first_column in range(0, ow, COLUMNS):
        q = first_column + tl.arange(0, COLUMNS)
        first_x = tl.load(first + oh + q, mask=q < ow, other=0)
        taps = tl.load(end + oh + q, mask=q < ow, other=0) - first_x
        most_taps = tl.max(taps)
        of_column = ()
        for tap in tl.static_range(TAPS):
            of_column += (tl.load(columns + (first_x + tap) * ow + q, mask=tap < taps, other=0),)

        newer = tl.zeros([CHANNELS, COLUMNS], tl.float32)  # sums of the last two rows, by column of bins
        older = tl.zeros([CHANNELS, COLUMNS], tl.float32)
        newer_y, older_y = -1, -1
        for p in range(oh):
            bin = tl.zeros([CHANNELS, COLUMNS], tl.float32)
            for y in range(tl.load(first + p), tl.load(end + p)):
                of_row = tl.load(rows + y * oh + p)
                if of_row > 0:
                    if (y != newer_y) & (y != older_y):
                        older, older_y = newer, newer_y
                        newer, newer_y = tl.zeros([CHANNELS, COLUMNS], tl.float32), y
                        cells = features + y * stride_h + first_x * stride_w
                        for tap in tl.static_range(TAPS):
                            newer = add_cells(
                                newer, cells + tap * stride_w, stride_c, c, C, of_column[tap], CHANNELS_LAST, ALIGNMENT
                            )
                        for i in range(TAPS, most_taps):
                            more = tl.load(columns + (first_x + i) * ow + q, mask=i < taps, other=0)
                            newer = add_cells(
                                newer, cells + i * stride_w, stride_c, c, C, more, CHANNELS_LAST, ALIGNMENT
                            )
                    if y == newer_y:
                        bin += of_row * newer
                    else:
                        bin += of_row * older
            at = ((r * C + c)[:, None] * oh + p) * ow + q[None, :]
            inside = (c < C)[:, None] & (q < ow)[None, :]
            tl.store(samples + at, rounded(bin, samples.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles", "boxes_per_image", "oh", "ow", "height", "width"])
def pyramid_roi_align_backward_kernel(
    grad_samples,  # [R, oh, ow, C]
    weight,  # BoxTables
    window,
    span,
    level,
    order,  # BoxesByImage
    begin,
    grad_levels,  # of [B, C, h, w] contiguous, finest first
    sizes,  # height and width of every level, unspecialised
    tiles,  # of all levels
    boxes_per_image,
    C,
    oh,
    ow,
    height,  # of the tables
    width,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,  # at least oh and ow
):
    tile, b = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mine = tl.full((), 0, tl.int32)
    grad_level, h, w = grad_levels[0], plain(sizes[0]), plain(sizes[1])
    begin_tile, next_tile = 0, tl.cdiv(h, ROWS) * tl.cdiv(w, COLUMNS)
    for index in tl.static_range(1, LEVELS):
        is_beyond = tile >= next_tile
        mine = tl.where(is_beyond, index, mine)
        grad_level = tl.where(is_beyond, grad_levels[index], grad_level)
        level_h, level_w = plain(sizes[2 * index]), plain(sizes[2 * index + 1])
        h = tl.where(is_beyond, level_h, h)
        w = tl.where(is_beyond, level_w, w)
        begin_tile = tl.where(is_beyond, next_tile, begin_tile)
        next_tile += tl.cdiv(level_h, ROWS) * tl.cdiv(level_w, COLUMNS)
    tiles_x = tl.cdiv(w, COLUMNS)
    first_y = (tile - begin_tile) // tiles_x * ROWS
    first_x = (tile - begin_tile) % tiles_x * COLUMNS
    y = first_y + tl.arange(0, ROWS)
    x = first_x + tl.arange(0, COLUMNS)

    total = tl.zeros([ROWS, COLUMNS, CHANNELS], tl.float32)
    first_box, end_box = boxes_of(b, order, begin, boxes_per_image)
    for i in range(first_box, end_box):
        r = tl.cast(i, tl.int64) if order is None else tl.load(order + i)
        is_near = touches(span + r * 4, first_y, first_y + ROWS, first_x, first_x + COLUMNS)
        if is_near & (tl.load(level + r) == mine):
            rows = weight + r * (height * oh + width * ow)
            columns = rows + height * oh
            bins = window + r * 2 * (oh + ow)
            total = add_bins(total, grad_samples + r * oh * ow * C, C, c, rows, columns, bins, y, x, h, w, oh, ow, BINS)
    at = ((tl.cast(b, tl.int64) * C + c)[None, None, :] * h + y[:, None, None]) * w + x[None, :, None]
    inside = (c < C)[None, None, :] & (y < h)[:, None, None] & (x < w)[None, :, None]
    tl.store(grad_level + at, rounded(total, grad_level.dtype.element_ty), mask=inside)


def forward(levels, corners, batch, pixels_per_cell, output, *sampling):
    samples = _forward_fake(levels, corners, batch, pixels_per_cell, output)
    (B, C), R, (oh, ow) = levels[0].shape[:2], corners.shape[0], output
    sizes = [size for level in levels for size in level.shape[2:]]
    tables = _tables(corners, batch, B, sizes, pixels_per_cell, output, *sampling)
    channels_last = all(level.stride(1) == 1 or C == 1 for level in levels)
    channels, columns = map(min, FORWARD.shape, map(power_of_two, (C, ow)))
    launch(
        pyramid_roi_align_forward_kernel,
        (R, blocks(C, channels)),
        samples,
        tuple(levels),
        unspecialised(stride for level in levels for stride in level.stride()),
        tables.weight,
        tables.window,
        tables.level,
        None if batch is None else batch.contiguous(),
        samples,
        R // max(B, 1),
        C,
        oh,
        ow,
        max(sizes[::2]),
        max(sizes[1::2]),
        LEVELS=len(levels),
        CHANNELS_LAST=channels_last,
        ALIGNMENT=_alignment(levels) if channels_last else levels[0].element_size(),
        TAPS=TAPS,
        CHANNELS=channels,
        COLUMNS=columns,
        num_warps=FORWARD.warps(channels, columns),
        fp_fusion=True,
        max_registers=FORWARD.registers,
    )
    return samples


def _alignment(levels):
    """Bytes, at most 16, that divide the address of every cell of channels-last levels."""
    strides = [level.stride(axis) * level.element_size() for level in levels for axis in (0, 2, 3)]
    return math.gcd(16, *strides, *(level.data_ptr() for level in levels))


def backward(grad_samples, B, sizes, corners, batch, pixels_per_cell, output, *sampling):
    grad_levels = _backward_fake(grad_samples, B, sizes)
    (R, C), (oh, ow) = grad_samples.shape[:2], output
    tables = _tables(corners, batch, B, sizes, pixels_per_cell, output, *sampling)
    rows, columns, channels = map(min, BACKWARD.shape, map(power_of_two, (max(sizes[::2]), max(sizes[1::2]), C)))
    tiles = sum(blocks(h, rows) * blocks(w, columns) for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    launch(
        pyramid_roi_align_backward_kernel,
        (tiles * B, blocks(C, channels)),
        grad_samples,
        grad_samples.permute(0, 2, 3, 1).contiguous(),
        tables.weight,
        tables.window,
        tables.span,
        tables.level,
        *BoxesByImage.of(batch, B),
        tuple(grad_levels),
        unspecialised(sizes),
        tiles,
        R // max(B, 1),
        C,
        oh,
        ow,
        max(sizes[::2]),
        max(sizes[1::2]),
        LEVELS=len(grad_levels),
        ROWS=rows,
        COLUMNS=columns,
        CHANNELS=channels,
        BINS=power_of_two(max(output)),
        num_warps=BACKWARD.warps(rows, columns, channels),
        fp_fusion=True,
        max_registers=BACKWARD.registers,
    )
    return grad_levels


def _tables(corners, batch, B, sizes, pixels_per_cell, output, sampling_ratio, canonical_size, canonical_level, first):
    rule = Levels(canonical_size, canonical_level, first)
    scales = [1 / pixels for pixels in pixels_per_cell]
    return box_tables(
        corners, batch, B, sizes=sizes, scales=scales, output=output, sampling_ratio=sampling_ratio, rule=rule
    )


def shipped(architecture: int) -> Iterator[Launch]:
    """Every kernel as the paper's shapes launch it."""
    for dtype, channels_last, indexed in (
        (torch.bfloat16, True, False),
        (torch.float32, False, False),
        (torch.float16, False, True),
    ):
        B, C, n, pixels_per_cell, sampling = 8, 256, 100, [4.0, 8.0, 16.0, 32.0], ([7, 7], 2, 224.0, 4, 2)
        form = torch.channels_last if channels_last else torch.contiguous_format
        levels = [torch.empty(B, C, s, s, dtype=dtype, device="meta").to(memory_format=form) for s in (56, 28, 14, 7)]
        corners = torch.empty(B * n, 4, device="meta")
        batch = torch.empty(B * n, dtype=torch.int64, device="meta") if indexed else None
        sizes = [size for level in levels for size in level.shape[2:]]
        grad_samples = _forward_fake(levels, corners, batch, pixels_per_cell, sampling[0])
        yield from recorded(architecture, forward, levels, corners, batch, pixels_per_cell, *sampling)
        yield from recorded(architecture, backward, grad_samples, B, sizes, corners, batch, pixels_per_cell, *sampling)
