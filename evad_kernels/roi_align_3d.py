"""roi_align_3d, roi_pool_3d: features of boxes straight from kept tokens, without the dense map.

    roi_align_3d[r, :, t, p, q] = mean of sampling_ratio^2 bilinear samples of frame t in bin (p, q) of box r
    roi_pool_3d[r]              = 1/T * sum_t max_{p,q} roi_align_3d[r, :, t, p, q]

A cell holds its kept token, or ``background``. Video, not volume: height and width are pooled in every frame, T is not.

Source: EVAD (Chen et al., ICCV 2023), section 3.3 (RoI of the rebuilt feature map), with detectron2's aligned RoIAlign
(He et al., Mask R-CNN, 2017) as EVAD uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _boxes, _cells, _check
from ._boxes import Boxes


def roi_align_3d(
    tokens: Tensor,
    position: Tensor,
    boxes: Tensor | Sequence[Tensor],
    *,
    grid: tuple[int, int, int],
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 1 / 16,
    sampling_ratio: int = 2,
    aligned: bool = True,
    background: Tensor | None = None,
) -> Tensor:
    """Sample every box in every frame of the grid of kept tokens (pools over height and width, not over time).

    Args:
        tokens: Kept tokens, [B, K, C], floating point.
        position: Flat grid index t*Gh*Gw + y*Gw + x of each kept token, [B, K], int64, unique within a row (of equal
            positions the last one holds the cell).
        boxes: x1, y1, x2, y2 in pixels of the input, floating point: [B, n, 4], a list of B [n_b, 4], or [R, 5] with
            the batch index first; or tubes [B, n, T, 4], a box for every frame. Kept in float32 or wider.
        grid: Cells of the dense grid, (T, Gh, Gw).
        output_size: Bins of a box, (oh, ow) or one number for both.
        spatial_scale: Cells per pixel, above 0: 1/16 where a cell is 16 pixels wide.
        sampling_ratio: Samples of a bin along each side, at least 1.
        aligned: True: pixel centres lie at half coordinates (detectron2's aligned RoIAlign). False: no such shift, and
            sides are at least one cell (torchvision's ``aligned=False``).
        background: What a dropped cell holds: None for zeros, [C], or [T*Gh*Gw, C]; same dtype as ``tokens``.
    Returns:
        Samples, [R, C, T, oh, ow], rows in the order of the boxes (b*n+i). A sample more than one cell outside the
        grid counts as 0, others clamp to the border; a reversed box (x2 < x1) or one with a NaN gives zeros. NaN and
        infinity in a cell reach exactly the bins that touch it. Gradient flows to ``tokens`` and ``background``, not
        to ``boxes``. No box: an empty result.
    Raises:
        ValueError: a shape or number is out of range, or (on the CPU) a position or batch index is; a GPU leaves that
            token out and gives that box zeros.
        TypeError: wrong dtype.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing.
    """
    arguments = _checked(
        "roi_align_3d",
        tokens,
        position,
        boxes,
        grid=grid,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        background=background,
    )
    return _align_reference(arguments)


def roi_pool_3d(
    tokens: Tensor,
    position: Tensor,
    boxes: Tensor | Sequence[Tensor],
    *,
    grid: tuple[int, int, int],
    output_size: int | tuple[int, int] = 7,
    spatial_scale: float = 1 / 16,
    sampling_ratio: int = 2,
    aligned: bool = True,
    background: Tensor | None = None,
) -> Tensor:
    """One feature a box: the largest of its oh x ow samples in every frame, averaged over the frames.

    Args:
        tokens, position, boxes, grid, output_size, spatial_scale, sampling_ratio, aligned, background: As in
            ``roi_align_3d``.
    Returns:
        Features, [R, C], equal to ``roi_align_3d(...).amax((-2, -1)).mean(-1)`` up to rounding, without that tensor.
        The gradient goes to the largest bin of every frame; of equal ones to the first, row-major. A NaN is larger
        than any number.
    Raises:
        ValueError, TypeError, RuntimeError: As in ``roi_align_3d``.
    """
    arguments = _checked(
        "roi_pool_3d",
        tokens,
        position,
        boxes,
        grid=grid,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        background=background,
    )
    return _pool_reference(arguments)


def roi_align_3d_reference(tokens: Tensor, position: Tensor, boxes: Tensor | Sequence[Tensor], **options) -> Tensor:
    """``roi_align_3d`` in plain PyTorch: the dense map, then two small matrix products a box."""
    return _align_reference(_checked("roi_align_3d", tokens, position, boxes, **options))


def roi_pool_3d_reference(tokens: Tensor, position: Tensor, boxes: Tensor | Sequence[Tensor], **options) -> Tensor:
    """``roi_pool_3d`` in plain PyTorch, through all the samples."""
    return _pool_reference(_checked("roi_pool_3d", tokens, position, boxes, **options))


class _Arguments(NamedTuple):
    """The checked arguments of both ops."""

    op: str
    tokens: Tensor
    position: Tensor
    background: Tensor | None
    boxes: Boxes
    grid: tuple[int, int, int]
    output: tuple[int, int]
    scale: float
    samples: int
    aligned: bool


def _checked(
    op,
    tokens,
    position,
    boxes,
    *,
    grid,
    output_size=7,
    spatial_scale=1 / 16,
    sampling_ratio=2,
    aligned=True,
    background=None,
) -> _Arguments:
    _cells.check_tokens_and_position(op, tokens, position)
    T, Gh, Gw = grid = _check.grid(op, grid)
    _cells.check_fill(op, "background", background, tokens, T * Gh * Gw)
    return _Arguments(
        op,
        tokens,
        position,
        background,
        _boxes.check_boxes(op, boxes, tokens, "tokens", frames=T),
        grid,
        _boxes.output_size(op, output_size),
        _boxes.positive(op, "spatial_scale", spatial_scale),
        _boxes.sampling_ratio(op, sampling_ratio),
        bool(aligned),
    )


def _align_reference(arguments: _Arguments) -> Tensor:
    return _bins_reference(arguments).permute(0, 4, 2, 1, 3).to(arguments.tokens.dtype)


def _pool_reference(arguments: _Arguments) -> Tensor:
    # max over dim, not amax: its gradient goes to the first of equal values.
    largest = _bins_reference(arguments).max(3).values.max(1).values  # [R, T, C]
    return largest.mean(1).to(arguments.tokens.dtype)


def _bins_reference(arguments: _Arguments) -> Tensor:
    """[R, oh, T, ow, C] in float32 or wider."""
    op, tokens, position, background, boxes, grid, output, scale, samples, aligned = arguments
    T, Gh, Gw = grid
    dense = _cells.dense_reference(op, tokens, position, background, T * Gh * Gw).unflatten(1, grid)
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    return _boxes.bins_reference(dense, boxes, scale=scale, output=output, samples=samples, aligned=aligned)
