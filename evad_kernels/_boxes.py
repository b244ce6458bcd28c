"""Boxes and how they sample a grid: what roi_align_3d, roi_pool_3d and pyramid_roi_align share.

Sampling is detectron2's aligned RoIAlign: a box has oh x ow bins, a bin the mean of sampling_ratio^2 bilinear samples,
and a sample below -1 or above the size weighs nothing, others clamp to the border. Bilinear weights are separable: a
bin is a short weighted sum over rows of a short weighted sum over columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, _check

FORMS = "[B, n, 4], a list of B [n_b, 4], or [R, 5]"
TUBES = FORMS.replace(" or [R, 5]", " [R, 5], or [B, n, T, 4]")


class Boxes(NamedTuple):
    """Boxes of every accepted form, one row each, in the order b*n+i."""

    batch: Tensor | None  # [R] int64; None: row r belongs to r // (R / B)
    corners: Tensor  # x1, y1, x2, y2 in pixels, [R, 4] or, for tubes, [R, T, 4]; float32 or float64


def check_boxes(
    op: str,
    boxes: Tensor | Sequence[Tensor],
    like: Tensor,
    argument: str,
    *,
    frames: int | None = None,
    forms: str = FORMS,
) -> Boxes:
    """Bring ``boxes`` to one form, in float32 (float64 if they or the features are).

    Args:
        like: The features, [B, ...], named ``argument``; boxes lie on their device.
        frames: T if tubes [B, n, T, 4] are accepted.
        forms: Those that errors name, where the caller takes fewer.
    """
    B = like.shape[0]
    forms = forms if frames is None else TUBES
    parts = boxes if isinstance(boxes, (list, tuple)) else [boxes]
    for part in parts:
        if not isinstance(part, Tensor):
            _check.fail(op, "boxes", f"a tensor or tensors {forms}", type(part).__name__, TypeError)
        _check.floating(op, "boxes", part)
        _check.same_device(op, "boxes", part, argument, like)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in (like, *parts)) else torch.float32
    parts = [part.detach().to(dtype) for part in parts]
    shapes = [list(part.shape) for part in parts]

    if isinstance(boxes, (list, tuple)):
        if len(parts) != B or any(part.ndim != 2 or part.shape[1] != 4 for part in parts):
            _check.fail(op, "boxes", f"{forms} with B = {B}", f"a list of {shapes}")
        if B == 0:
            return Boxes(None, torch.zeros(0, 4, dtype=dtype, device=like.device))
        if B == 1:
            return Boxes(None, parts[0])
        batch = [part.new_full((part.shape[0],), b, dtype=torch.int64) for b, part in enumerate(parts)]
        return Boxes(torch.cat(batch), torch.cat(parts))

    (whole,) = parts
    if whole.ndim == 2 and whole.shape[1] == 5:
        batch = whole[:, 0].nan_to_num(nan=-1.0).to(torch.int64)
        if whole.device.type == "cpu" and not torch.compiler.is_compiling():
            check_batch(op, batch, B)
        return Boxes(batch, whole[:, 1:])
    if whole.ndim == 3 and whole.shape[0] == B and whole.shape[2] == 4:
        return Boxes(None, whole.flatten(0, 1))
    if whole.ndim == 4 and frames is not None and whole.shape[0] == B and list(whole.shape[2:]) == [frames, 4]:
        return Boxes(None, whole.flatten(0, 1))
    size = f"B = {B}" if frames is None else f"B = {B}, T = {frames}"
    _check.fail(op, "boxes", f"{forms} with {size}", shapes[0])


def check_batch(op: str, batch: Tensor, B: int) -> None:
    """Batch indices [R] int64 lie in [0, B); reads them, so on the CPU only."""
    if batch.numel() and (int(batch.min()) < 0 or int(batch.max()) >= B):
        offending = int(batch[(batch < 0) | (batch >= B)][0])
        _check.fail(op, "boxes' batch index", f"in [0, {B})", offending)


def packed(corners: Tensor, batch: Tensor | None) -> tuple[int, bool, int, int, int]:
    """Contiguous boxes as the native module takes them."""
    frames = corners.shape[1] if corners.ndim == 3 else 1
    is_double = corners.dtype == torch.float64
    return corners.data_ptr(), is_double, 0 if batch is None else batch.data_ptr(), corners.shape[0], frames


class BoxesByImage(NamedTuple):
    """Rows of boxes by image: of image b they are order[begin[b]] to order[begin[b + 1]], ascending."""

    order: Tensor | None  # [R] int64; None: image b has rows b*n to (b + 1)*n
    begin: Tensor | None  # [B + 1] int64

    @classmethod
    def of(cls, batch: Tensor | None, B: int) -> BoxesByImage:
        """Sorted on the device: no number of boxes is ever known to the host. Boxes of no image are in no range."""
        if batch is None:
            return cls(None, None)
        ascending, order = batch.sort(stable=True)
        return cls(order, torch.searchsorted(ascending, torch.arange(B + 1, device=batch.device)))


def output_size(op: str, value: int | Sequence[int]) -> tuple[int, int]:
    """``(oh, ow)``, both at least 1."""
    pair = tuple(_check.as_integer(size) for size in (value if isinstance(value, Sequence) else (value, value)))
    if len(pair) != 2 or any(size is None or size < 1 for size in pair):
        _check.fail(op, "output_size", "an integer or a pair of integers, at least 1", value)
    return pair


def sampling_ratio(op: str, value: int) -> int:
    """Samples a bin along each side, at least 1."""
    ratio = _check.as_integer(value)
    if ratio is None or ratio < 1:
        _check.fail(op, "sampling_ratio", "an integer, at least 1", value)
    return ratio


def positive(op: str, argument: str, value: float) -> float:
    """``value`` as a float, finite and above 0."""
    value = _check.number(op, argument, value)
    if not 0 < value < math.inf:
        _check.fail(op, argument, "a finite number above 0", value)
    return float(value)


def divided(x: Tensor, number: float) -> Tensor:
    """``x`` / ``number``, rounded to nearest: by a Python number torch multiplies with its reciprocal on a GPU."""
    return x / x.new_full((), number)


def axis_weights(
    low: Tensor, high: Tensor, size: int, bins: int, sampling_ratio: int | Callable[[Tensor], Tensor], aligned: bool
) -> Tensor:
    """Weight of every cell of one axis in every bin of every box.

    Args:
        low, high: The boxes' two sides, in cells, [...].
        size: Cells of the axis.
        bins: Of a box.
        sampling_ratio: Samples of a bin, or a function that makes them of the bins' widths in cells.
        aligned: False: sides are at least one cell, as in torchvision.
    Returns:
        Weights, [..., bins, size].
    """
    length = high - low
    if not aligned:
        length = length.clamp(min=1)
    width = divided(length, bins)[..., None, None]
    bin_index = torch.arange(bins, device=low.device)[:, None]
    if callable(sampling_ratio):
        taken = sampling_ratio(width)
        count = taken.clamp(min=1)
        samples = int(count.max()) if count.numel() else 1
    else:
        samples = taken = sampling_ratio
        count = low.new_full((), samples)
    sample = torch.arange(samples, device=low.device)
    at = low[..., None, None] + bin_index * width + (sample + 0.5) * width / count  # [..., bins, samples]
    inside = (at >= -1) & (at <= size) & (sample < taken)
    at = at.clamp(0, size - 1)[..., None]
    cell = torch.arange(size, device=low.device)
    before = at.floor()
    # Not 1 - |at - cell|: it rounds to 0 what a kernel still gives the next cell.
    tent = torch.where(cell == before, 1 - (at - before), torch.where(cell == before + 1, at - before, 0))
    return torch.where(inside[..., None], tent, 0).sum(-2) / count  # of [..., bins, samples, size]


def bins_reference(
    features: Tensor,
    boxes: Boxes,
    *,
    scale: float,
    output: tuple[int, int],
    sampling_ratio: int | Callable[[Tensor], Tensor],
    aligned: bool = True,
    chosen: Tensor | None = None,
) -> Tensor:
    """Every bin of every box, in plain PyTorch with two small matrix products.

    Args:
        features: Dense map, [B, T, Gh, Gw, C], float32 or float64.
        scale: Cells a pixel.
        output: (oh, ow).
        sampling_ratio: Samples a bin along each side, as ``axis_weights`` takes them.
        chosen: [R] bool, boxes to leave in; the others give zeros. None: all.
    Returns:
        [R, oh, T, ow, C].
    """
    B, _, Gh, Gw, _ = features.shape
    corners = boxes.corners if boxes.corners.ndim == 3 else boxes.corners[:, None]  # [R, T or 1, 4]
    offset = 0.5 if aligned else 0.0
    x1, y1, x2, y2 = (corners * scale - offset).unbind(-1)
    valid = (corners[..., 2] >= corners[..., 0]) & (corners[..., 3] >= corners[..., 1])  # false for NaN
    if chosen is not None:
        valid = valid & chosen[:, None]
    if boxes.batch is not None:
        known = (boxes.batch >= 0) & (boxes.batch < B)  # a GPU cannot raise: such a box gives zeros
        valid = valid & known[:, None]
        features = features[torch.where(known, boxes.batch, 0)] if B else features[:0]
    rows = axis_weights(y1, y2, Gh, output[0], sampling_ratio, aligned)
    rows = torch.where(valid[..., None, None], rows, 0)
    columns = axis_weights(x1, x2, Gw, output[1], sampling_ratio, aligned)
    # [B, n, T or 1, bins, size]; boxes with an index of their own are n = 1 of as many images.
    images = features.shape[0]
    n = 1 if boxes.batch is not None else corners.shape[0] // max(B, 1)
    rows, columns = (x.to(features.dtype).unflatten(0, (images, n)) for x in (rows, columns))

    finite = features.isfinite()
    known_finite = features.device.type == "cpu" and not torch.compiler.is_compiling() and bool(finite.all())
    if known_finite:
        return _two_products(features, rows, columns)
    # 0 * NaN is NaN: where features may be NaN or infinite, a bin takes them only from cells it really touches.
    result = _two_products(torch.where(finite, features, 0), rows, columns)
    touched_rows, touched_columns = ((x > 0).to(features.dtype) for x in (rows, columns))
    for special in (math.nan, math.inf, -math.inf):
        where = features.isnan() if math.isnan(special) else features == special
        touches = _two_products(where.to(features.dtype), touched_rows, touched_columns) > 0
        result = result + torch.where(touches, special, 0.0)
    return result


def _two_products(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, T, Gh, Gw, C] x [B, n, T or 1, oh, Gh] x [B, n, T or 1, ow, Gw] -> [B*n, oh, T, ow, C]."""
    with _backend.without_autocast(features.device):
        with_rows = torch.einsum("bntyh,bthwc->bnytwc", rows, features)
        return torch.matmul(columns[:, :, None], with_rows).flatten(0, 1)
