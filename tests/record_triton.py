"""Prints what calls launch in Triton, a JSON line a call: its kernels, and how many more its other sizes compile.

python record_triton.py    without TRITON_INTERPRET; needs no GPU
"""

import itertools
import json
import math

import torch

from evad_kernels import keyframe_attention_triton as attention
from evad_kernels import pyramid_roi_align_triton as pyramid
from evad_kernels import roi_align_3d_triton as roi
from evad_kernels import scatter_tokens_triton as scatter
from evad_kernels import token_selection_triton as selection
from evad_kernels._triton import recorded
from evad_kernels.pyramid_roi_align import _forward_fake as levels_fake
from evad_kernels.roi_align_3d import _align_fake, _pool_fake


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape):
    return empty(*shape, dtype=torch.int64)


def attend(N, B=8, H=12):
    attention.forward(*empty(B, N, 3, H, 64).permute(2, 0, 3, 1, 4), N // 8, 4.0, 0.125)


def every_attention(N, B=8, H=12):
    attention._all_kernels(torch.bfloat16, N, 64, B, H)


def select(M, B=8, slots=True):
    (selection.select_with_slots if slots else selection.select)(empty(B, M, dtype=torch.float32), M // 2)


def gather(N, B=8):
    selection.gather(empty(B, N, 768), indices(B, N // 2), N // 8)


def gather_positions(N, B=8):
    selection.gather(indices(B, N), indices(B, N // 2), N // 8)


def gather_backward(N, B=8):
    selection.gather_backward(empty(B, N // 2 + N // 8, 768), indices(B, N // 2), N // 8, N)


def scatter_tokens(cells, B=8):
    scatter.forward(empty(B, cells // 3, 384), indices(B, cells // 3), empty(cells, 384), cells)


def scatter_backward(cells, B=8, fill_ndim=0):
    scatter.backward(empty(B, cells, 384), indices(B, cells // 3), fill_ndim)


def on_grid(forward, result, backward=False, grid=(8, 14, 14), B=8, n=100, C=384):
    """``forward``, and of which ``result`` is the backward: (samples, None) or (pooled, largest)."""
    cells = math.prod(grid)
    boxes = indices(B, cells // 3), empty(B * n, 4, dtype=torch.float32), None, grid, (7, 7), 1 / 16, 2, True
    inputs = empty(B, cells // 3, C), None, *boxes
    if backward:
        roi.backward(*result(*inputs), *boxes, 0)
    else:
        forward(*inputs)


def aligned(*size):
    on_grid(roi.align, lambda *inputs: (_align_fake(*inputs), None), *size)


def pooled(*size):
    on_grid(lambda *inputs: roi.pool(*inputs, True), lambda *inputs: _pool_fake(*inputs, True), *size)


def on_pyramid(backward=False, finest=(56, 56), B=8, n=100):
    h, w = finest
    sizes = [(-(-h >> i), -(-w >> i)) for i in range(4)]
    levels = [empty(B, 256, *size).to(memory_format=torch.channels_last) for size in sizes]
    corners, sampling = empty(B * n, 4, dtype=torch.float32), ([7, 7], 2, 224.0, 4, 2)
    strides = [4.0, 8.0, 16.0, 32.0]
    if backward:
        sizes = [size for level in levels for size in level.shape[2:]]
        samples = levels_fake(levels, corners, None, strides, sampling[0])
        pyramid.backward(samples, B, sizes, corners, None, strides, *sampling)
    else:
        pyramid.forward(levels, corners, None, strides, *sampling)


GRIDS = [((8, 14, 14),), ((8, 16, 9), 3, 1), ((7, 10, 16), 1, 1000)]  # grid, clips, boxes a clip
LEVELS = [((56, 56),), ((64, 36), 3, 1), ((40, 48), 1, 1000)]  # finest level, clips, boxes a clip

# name -> function, its arguments by size
CALLS = {
    "keyframe_attention": (attend, [(1568,)]),
    "keyframe_attention from 1024 tokens": (
        every_attention,
        [(1024,), (1568,), (2592, 1), (4608, 3, 16), (16383, 1, 1)],
    ),
    "keyframe_attention up to 1023 tokens": (every_attention, [(1023,), (785,), (784, 1), (197, 3, 16), (50, 1, 2)]),
    "select_tokens": (lambda M, B=8: select(M, B, slots=False), [(1025,), (1372, 1), (2048, 3)]),
    "select_tokens_with_slots": (select, [(4097,), (4608, 1), (16384, 3)]),
    "gather_tokens": (gather, [(1568,), (1571, 1), (4608, 3), (50, 2)]),
    "gather_tokens of positions": (gather_positions, [(1568,), (1571, 1), (4608, 3), (50, 2)]),
    "gather_tokens, backward": (gather_backward, [(1568,), (1571,), (1100,), (12500, 1)]),
    "scatter_tokens": (scatter_tokens, [(1568,), (1571,), (1100,), (12500, 1)]),
    "scatter_tokens, backward": (scatter_backward, [(1568,), (1571, 1), (4608, 3), (50, 2)]),
    "scatter_tokens, backward of one row": (lambda n, B=8: scatter_backward(n, B, 1), [(1568,), (1571, 1), (4608, 3)]),
    "scatter_tokens, backward of cells": (lambda n, B=8: scatter_backward(n, B, 2), [(1568,), (1571, 1), (4608, 3)]),
    "roi_align_3d": (aligned, [(False, *size) for size in GRIDS]),
    "roi_align_3d, backward": (aligned, [(True, *size) for size in GRIDS]),
    "roi_pool_3d": (pooled, [(False, *size) for size in GRIDS]),
    "roi_pool_3d, backward": (pooled, [(True, *size) for size in GRIDS]),
    "pyramid_roi_align": (on_pyramid, [(False, *size) for size in LEVELS]),
    "pyramid_roi_align, backward": (on_pyramid, [(True, *size) for size in LEVELS]),
}

if __name__ == "__main__":
    for name, (function, sizes) in CALLS.items():
        first, *others = (recorded(90, function, *size) for size in sizes)
        known, more = set(map(repr, first)), set(map(repr, itertools.chain(*others)))
        kernels = [launch.kernel.__name__ for launch in first]
        print(json.dumps({"call": name, "kernels": kernels, "more": len(more - known)}))
