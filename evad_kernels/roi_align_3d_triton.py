"""roi_align_3d and roi_pool_3d in Triton, straight from kept tokens: no dense map, for the pool no [R, C, T, oh, ow].

Launches: the cell map, the boxes' tables (_boxes_triton.py), then one kernel each way.

Forward: a program owns (box, channels) and takes the frames four at a time: one pass over the box's rows serves them. A
row of the grid is summed over the columns of each bin once and kept, with the one before it, in registers; a bin is a
short sum of such rows (samples ascend, so older rows do not come back: the ring of csrc/roi_simd.h, two rows long). The
maximum and its bin stay in registers. Reads the cells a box touches, about 2.4 times each in a row of bins, from the
first-level cache; writes R C elements, or R C T oh ow.

Backward: a program owns (image, tile of one frame's cells, channels) and goes through the image's boxes in order: no
sum needs atomics or depends on the order of programs. Only the bin of the maximum carries gradient: a box adds an outer
product, the rows' weights in that bin times the columns'; for roi_align_3d the same of every bin, rows first. Reads
R T C bins (bytes) and R C gradients once for every tile of cells that a box touches, writes K C elements. The gradient
of the background is a sum of partial sums: one a program for [C]; for [cells, C] a program takes several images, and
there are as many partial sums of a cell as it takes to fill the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import _backend
from ._boxes import BoxesByImage
from ._boxes_triton import Tile, add_bins, box_tables, boxes_of, touches
from ._cells_triton import cell_map
from ._triton import Launch, blocks, launch, power_of_two, recorded, rounded
from .roi_align_3d import _align_fake, _backward_fake, _pool_fake

TAPS = 3  # columns of a bin whose loads go out together: as many as two samples touch where a bin is up to 2 cells wide
COLUMNS = 8  # of bins, in a tile of the forward
# Tiles, the same on sm_80, 90 and 100. Forward: [frames, COLUMNS, channels] by bytes of an element, rows of 128 bytes.
FORWARD = {2: Tile((4, COLUMNS, 64), 8, 128), 4: Tile((4, COLUMNS, 32), 8, 128)}
# Backward: [rows, columns, channels]; of the pool by bytes of an element.
ALIGN_BACKWARD = Tile((8, 8, 32), 32, 216)
POOL_BACKWARD = {2: Tile((8, 8, 32), 32, 168), 4: Tile((8, 8, 32), 32, 216)}
PROGRAMS = 768  # of a backward, at least, where images can be split


@triton.jit
def ordered(x):
    """float32 as an integer of the same order; -0 is 0, and a NaN the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def add_cells(
    total,
    tokens,
    stride_k,
    slot,
    background,
    background_stride,
    cell,
    weight,
    c,
    C,
    exists,
    ALIGNMENT: tl.constexpr,  # of rows, in bytes
):
    """total [FRAMES, COLUMNS, CHANNELS] plus weight [COLUMNS] times the cells [FRAMES, COLUMNS] where it is not 0."""
    touched = exists & (weight > 0)[None, :]
    k = tl.load(slot + cell, mask=touched, other=-1)
    row = tokens + k.to(tl.int64) * stride_k
    if background is None:
        touched = touched & (k >= 0)
    else:
        row = tl.where(k >= 0, row, background + cell.to(tl.int64) * background_stride)
        row = tl.multiple_of(row, (ALIGNMENT, ALIGNMENT))  # a choice of pointers has lost it
    features = tl.load(row[:, :, None] + c[None, None, :], mask=touched[:, :, None] & (c < C)[None, None, :], other=0)
    return total + weight[None, :, None] * features.to(tl.float32)


@triton.jit(do_not_specialize=["boxes_per_image", "T", "Gh", "Gw", "oh", "ow"])
def roi_3d_forward_kernel(
    tokens,  # [B, K, C]
    stride_b,
    stride_k,
    slot,  # [B, cells] int32
    background,  # [C], [cells, C] or None
    background_stride,  # of a cell: 0 or C
    weight,  # BoxTables
    window,
    batch,  # [R] int64, or None
    result,  # samples [R, C, T, oh, ow] or pooled [R, C]
    largest,  # [R, T, C], or None
    boxes_per_image,
    C,
    T,
    Gh,
    Gw,
    oh,
    ow,
    POOL: tl.constexpr,
    TUBES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TAPS: tl.constexpr,
    FRAMES: tl.constexpr,  # 1 for tubes
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b = r // boxes_per_image if batch is None else tl.load(batch + r)
    tokens += b * stride_b
    slot += b * T * Gh * Gw
    DTYPE: tl.constexpr = result.dtype.element_ty
    NONE: tl.constexpr = -(2**31)

    mean = tl.zeros([CHANNELS], tl.float32)
    for first_frame in range(0, T, FRAMES):
        t = first_frame + tl.arange(0, FRAMES)
        item = r * T + first_frame if TUBES else r
        rows = weight + item * (Gh * oh + Gw * ow)
        columns = rows + Gh * oh
        first = window + item * 2 * (oh + ow)
        end = first + oh + ow
        top = tl.full([FRAMES, CHANNELS], NONE, tl.int32)
        top_bin = tl.zeros([FRAMES, CHANNELS], tl.int32)
        for first_column in range(0, ow, COLUMNS):
            q = first_column + tl.arange(0, COLUMNS)
            first_x = tl.load(first + oh + q, mask=q < ow, other=0)
            taps = tl.load(end + oh + q, mask=q < ow, other=0) - first_x
            most_taps = tl.max(taps)
            of_column = ()
            for tap in tl.static_range(TAPS):
                of_column += (tl.load(columns + (first_x + tap) * ow + q, mask=tap < taps, other=0),)
            exists = (t < T)[:, None] & (q < ow)[None, :]

            newer = tl.zeros([FRAMES, COLUMNS, CHANNELS], tl.float32)  # sums of the last two rows, by column of bins
            older = tl.zeros([FRAMES, COLUMNS, CHANNELS], tl.float32)
            newer_y, older_y = -1, -1
            best = tl.full([FRAMES, COLUMNS, CHANNELS], float("-inf"), tl.float32)
            best_p = tl.zeros([FRAMES, COLUMNS, CHANNELS], tl.int32)
            for p in range(oh):
                bin = tl.zeros([FRAMES, COLUMNS, CHANNELS], tl.float32)
                for y in range(tl.load(first + p), tl.load(end + p)):
                    of_row = tl.load(rows + y * oh + p)
                    if of_row > 0:
                        if (y != newer_y) & (y != older_y):
                            older, older_y = newer, newer_y
                            newer, newer_y = tl.zeros([FRAMES, COLUMNS, CHANNELS], tl.float32), y
                            cell = (t * Gh + y)[:, None] * Gw + first_x[None, :]
                            for tap in tl.static_range(TAPS):
                                newer = add_cells(
                                    newer,
                                    tokens,
                                    stride_k,
                                    slot,
                                    background,
                                    background_stride,
                                    cell + tap,
                                    of_column[tap],
                                    c,
                                    C,
                                    exists,
                                    ALIGNMENT,
                                )
                            for i in range(TAPS, most_taps):
                                more = tl.load(columns + (first_x + i) * ow + q, mask=i < taps, other=0)
                                newer = add_cells(
                                    newer,
                                    tokens,
                                    stride_k,
                                    slot,
                                    background,
                                    background_stride,
                                    cell + i,
                                    more,
                                    c,
                                    C,
                                    exists,
                                    ALIGNMENT,
                                )
                        if y == newer_y:
                            bin += of_row * newer
                        else:
                            bin += of_row * older
                if POOL:
                    if largest is None:
                        best = tl.maximum(best, bin, propagate_nan=tl.PropagateNan.ALL)
                    else:
                        take = (best == best) & ~(bin <= best)  # a NaN, and the first of equal ones
                        best = tl.where(take, bin, best)
                        best_p = tl.where(take, p, best_p)
                else:
                    at = ((r * C + c)[None, None, :] * T + t[:, None, None]) * oh + p
                    inside = exists[:, :, None] & (c < C)[None, None, :]
                    tl.store(result + at * ow + q[None, :, None], rounded(bin, DTYPE), mask=inside)
            if POOL:
                is_bin = (q < ow)[None, :, None]
                key = tl.where(is_bin, ordered(best), NONE)
                block_top = tl.max(key, axis=1)
                if largest is not None:
                    bins = tl.where(is_bin & (key == block_top[:, None, :]), best_p * ow + q[None, :, None], oh * ow)
                    block_bin = tl.min(bins, axis=1)
                    block_bin = tl.where(block_top == top, tl.minimum(block_bin, top_bin), block_bin)
                    top_bin = tl.where(block_top >= top, block_bin, top_bin)
                top = tl.maximum(top, block_top)
        if POOL:
            mean += tl.sum(tl.where((t < T)[:, None], unordered(top), 0), axis=0)
            if largest is not None:
                inside = (t < T)[:, None] & (c < C)[None, :]
                at = (r * T + t)[:, None] * C + c[None, :]
                tl.store(largest + at, top_bin.to(largest.dtype.element_ty), mask=inside)
    if POOL:
        tl.store(result + r * C + c, rounded(mean / T, DTYPE), mask=c < C)


@triton.jit
def box_and_gradient(
    i,
    R,
    order,
    span,
    largest,
    grad,
    first_y,
    first_x,
    t,
    c,
    C,
    T,
    TUBES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Item of box i, at most the last; whether it weighs in the tile; for the pool, its maxima's bins and gradient."""
    i = tl.minimum(tl.cast(i, tl.int64), R - 1)
    r = i if order is None else tl.load(order + i)
    item = r * T + t if TUBES else r
    is_near = touches(span + item * 4, first_y, first_y + ROWS, first_x, first_x + COLUMNS)
    bin, g = tl.zeros_like(c), tl.zeros_like(c).to(tl.float32)
    if largest is not None:
        bin = tl.load(largest + (r * T + t) * C + c, mask=c < C, other=0).to(tl.int32)
        g = tl.load(grad + r * C + c, mask=c < C, other=0).to(tl.float32) / T
    return item, is_near, bin, g


@triton.jit(
    do_not_specialize=["boxes_per_image", "R", "B", "images", "K", "T", "Gh", "Gw", "oh", "ow", "tiles", "tiles_x"]
)
def roi_3d_backward_kernel(
    grad,  # of samples, [R, T, oh, ow, C], or of pooled, [R, C]
    largest,  # [R, T, C], or None
    slot,  # [B, cells] int32
    weight,  # BoxTables
    window,
    span,
    order,  # BoxesByImage
    begin,
    grad_tokens,  # [B, K, C]
    partial,  # [groups, cells, C] or [groups, T * tiles, C] float32, or None
    boxes_per_image,
    R,
    B,
    images,  # of a program
    K,
    C,
    T,
    Gh,
    Gw,
    oh,
    ow,
    tiles,  # of a frame
    tiles_x,
    TUBES: tl.constexpr,
    PER_CELL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BINS: tl.constexpr,  # at least oh and ow
):
    tile, group = tl.program_id(0) % (T * tiles), tl.program_id(0) // (T * tiles)
    t = tile // tiles
    first_y = tile % tiles // tiles_x * ROWS
    first_x = tile % tiles_x * COLUMNS
    y = first_y + tl.arange(0, ROWS)
    x = first_x + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = (y < Gh)[:, None] & (x < Gw)[None, :]
    cell = (t * Gh + y)[:, None] * Gw + x[None, :]
    dropped_sum = tl.zeros([ROWS, COLUMNS, CHANNELS], tl.float32)

    for b in range(group * images, tl.minimum((group + 1) * images, B)):
        total = tl.zeros([ROWS, COLUMNS, CHANNELS], tl.float32)
        first_box, end_box = boxes_of(b, order, begin, boxes_per_image)
        # What is read of the next box is on its way while one is added: the loop waits for little else.
        item, is_near, bin, g = box_and_gradient(
            first_box, R, order, span, largest, grad, first_y, first_x, t, c, C, T, TUBES, ROWS, COLUMNS
        )
        for i in range(first_box, end_box):
            next_item, next_is_near, next_bin, next_g = box_and_gradient(
                i + 1, R, order, span, largest, grad, first_y, first_x, t, c, C, T, TUBES, ROWS, COLUMNS
            )
            if is_near:
                rows = weight + item * (Gh * oh + Gw * ow)
                columns = rows + Gh * oh
                if largest is None:
                    r = item // T if TUBES else item
                    bins = window + item * 2 * (oh + ow)
                    of_frame = grad + (r * T + t) * oh * ow * C
                    total = add_bins(total, of_frame, C, c, rows, columns, bins, y, x, Gh, Gw, oh, ow, BINS)
                else:
                    p, q = bin // ow, bin % ow
                    of_row = tl.load(rows + y[:, None] * oh + p[None, :], mask=(y < Gh)[:, None], other=0)
                    of_column = tl.load(columns + x[:, None] * ow + q[None, :], mask=(x < Gw)[:, None], other=0)
                    total += (g[None, :] * of_row)[:, None, :] * of_column[None, :, :]
            item, is_near, bin, g = next_item, next_is_near, next_bin, next_g
        image = tl.cast(b, tl.int64)
        k = tl.load(slot + image * T * Gh * Gw + cell, mask=exists, other=0)
        kept = exists & (k >= 0)
        to = grad_tokens + (image * K + k)[:, :, None] * C + c[None, None, :]
        inside = kept[:, :, None] & (c < C)[None, None, :]
        tl.store(to, rounded(total, grad_tokens.dtype.element_ty), mask=inside)
        if partial is not None:
            dropped_sum += tl.where((exists & ~kept)[:, :, None], total, 0)

    if partial is not None:
        if PER_CELL:
            inside = exists[:, :, None] & (c < C)[None, None, :]
            at = (tl.cast(group, tl.int64) * T * Gh * Gw + cell)[:, :, None] * C + c[None, None, :]
            tl.store(partial + at, dropped_sum, mask=inside)
        else:
            at = (tl.cast(group, tl.int64) * T * tiles + tile) * C + c
            tl.store(partial + at, tl.sum(tl.sum(dropped_sum, axis=0), axis=0), mask=c < C)


def align(tokens, background, position, corners, batch, grid, output, *sampling):
    samples = _align_fake(tokens, background, position, corners, batch, grid, output)
    _forward(tokens, background, position, corners, batch, grid, output, sampling, samples, None)
    return samples


def pool(tokens, background, position, corners, batch, grid, output, *sampling_and_flag):
    pooled, largest = _pool_fake(tokens, background, position, corners, batch, grid, output, *sampling_and_flag)
    *sampling, save_largest = sampling_and_flag
    bins = largest if save_largest else None
    _forward(tokens, background, position, corners, batch, grid, output, sampling, pooled, bins)
    return pooled, largest


def _forward(tokens, background, position, corners, batch, grid, output, sampling, result, largest):
    """Fills ``result``, samples or pooled by its dimensions, and ``largest``."""
    B, _, C = tokens.shape
    R, (T, Gh, Gw), (oh, ow) = corners.shape[0], grid, output
    tokens = _backend.rows(tokens)
    background = None if background is None else background.contiguous()
    tables = _tables(corners, batch, B, grid, output, *sampling)
    tubes = corners.ndim == 3
    tile = FORWARD[tokens.element_size()]
    frames, columns, channels = map(
        min, tile.shape, (1 if tubes else power_of_two(T), power_of_two(ow), power_of_two(C))
    )
    launch(
        roi_3d_forward_kernel,
        (R, blocks(C, channels)),
        tokens,
        tokens,
        *tokens.stride()[:2],
        cell_map(position, T * Gh * Gw),
        background,
        C if background is not None and background.ndim == 2 else 0,
        tables.weight,
        tables.window,
        None if batch is None else batch.contiguous(),
        result,
        largest,
        R // max(B, 1),
        C,
        T,
        Gh,
        Gw,
        oh,
        ow,
        POOL=result.ndim == 2,
        TUBES=tubes,
        ALIGNMENT=_alignment(tokens, background),
        TAPS=TAPS,
        FRAMES=frames,
        COLUMNS=columns,
        CHANNELS=channels,
        num_warps=tile.warps(frames, columns, channels),
        fp_fusion=True,
        max_registers=tile.registers,
    )


def _alignment(tokens, background):
    """Bytes, at most 16, that divide the address of every row."""
    strides = [stride * tokens.element_size() for stride in tokens.stride()[:2]]
    if background is not None:
        strides += [background.data_ptr(), background[0].nbytes if background.ndim == 2 else 0]
    return math.gcd(16, tokens.data_ptr(), *strides)


def backward(grad, largest, position, corners, batch, grid, output, *sampling_and_fill):
    *sampling, background_ndim = sampling_and_fill
    (B, K), C = position.shape, grad.shape[1]
    R, (T, Gh, Gw), (oh, ow) = corners.shape[0], grid, output
    _, grad_background = _backward_fake(grad, largest, position, corners, batch, grid, *sampling_and_fill)
    grad_tokens = grad.new_zeros(B, K, C)
    if R == 0:
        return grad_tokens, grad_background.zero_()
    grad = grad.contiguous() if grad.ndim == 2 else grad.permute(0, 2, 3, 4, 1).contiguous()
    tables = _tables(corners, batch, B, grid, output, *sampling)
    tile = ALIGN_BACKWARD if largest is None else POOL_BACKWARD[grad.element_size()]
    rows, columns, channels = map(min, tile.shape, map(power_of_two, (Gh, Gw, C)))
    tiles_x = blocks(Gw, columns)
    tiles = tiles_x * blocks(Gh, rows)
    images = 1
    if background_ndim == 2 and B:
        groups = min(B, blocks(PROGRAMS, max(T * tiles * blocks(C, channels), 1)))
        images = blocks(B, groups)
    groups = blocks(B, images)
    shape = (groups, T * Gh * Gw if background_ndim == 2 else T * tiles, C)
    partial = grad.new_empty(shape, dtype=torch.float32) if background_ndim else None
    launch(
        roi_3d_backward_kernel,
        (T * tiles * groups, blocks(C, channels)),
        grad,
        grad,
        None if largest is None else largest.contiguous(),
        cell_map(position, T * Gh * Gw),
        tables.weight,
        tables.window,
        tables.span,
        *BoxesByImage.of(batch, B),
        grad_tokens,
        partial,
        R // max(B, 1),
        R,
        B,
        images,
        K,
        C,
        T,
        Gh,
        Gw,
        oh,
        ow,
        tiles,
        tiles_x,
        TUBES=corners.ndim == 3,
        PER_CELL=background_ndim == 2,
        ROWS=rows,
        COLUMNS=columns,
        CHANNELS=channels,
        BINS=power_of_two(max(output)),
        num_warps=tile.warps(rows, columns, channels),
        fp_fusion=True,
        max_registers=tile.registers,
    )
    if background_ndim:
        over = 0 if background_ndim == 2 else (0, 1)
        grad_background = partial.sum(over, dtype=torch.float64).to(grad.dtype)
    return grad_tokens, grad_background


def _tables(corners, batch, B, grid, output, scale, sampling_ratio, aligned):
    return box_tables(
        corners,
        batch,
        B,
        sizes=grid[1:],
        scales=(scale,),
        output=output,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
    )


def shipped(architecture: int) -> Iterator[Launch]:
    """Every kernel as the paper's shapes launch it."""
    for dtype, background_ndim in ((torch.bfloat16, 2), (torch.float32, 2), (torch.float16, 1)):
        B, n, C, grid, sampling = 8, 100, 384, (8, 14, 14), ((7, 7), 1 / 16, 2, True)
        tokens = torch.empty(B, 539, C, dtype=dtype, device="meta")
        position = torch.empty(B, 539, dtype=torch.int64, device="meta")
        background = tokens[0, 0] if background_ndim == 1 else tokens.new_empty(math.prod(grid), C)
        corners = torch.empty(B * n, 4, device="meta")
        batch = torch.empty(B * n, dtype=torch.int64, device="meta") if background_ndim == 1 else None
        inputs = tokens, background, position, corners, batch, grid, *sampling
        boxes = position, corners, batch, grid, *sampling, background_ndim
        pooled, largest = _pool_fake(*inputs, True)
        yield from recorded(architecture, pool, *inputs, True)
        yield from recorded(architecture, backward, pooled, largest, *boxes)
        if background_ndim == 2:
            yield from recorded(architecture, align, *inputs)
            yield from recorded(architecture, pool, *inputs, False)
            yield from recorded(architecture, backward, _align_fake(*inputs), None, *boxes)
