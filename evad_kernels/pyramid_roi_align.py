"""pyramid_roi_align: RoIAlign on the pyramid level that fits each box.

    level(box) = floor(canonical_level + log2(sqrt(area) / canonical_size + eps)), clamped to the levels there are
    pyramid_roi_align[r, :, p, q] = mean of sampling_ratio^2 bilinear samples of that level in bin (p, q) of box r

Source: Feature Pyramid Networks (Lin et al., CVPR 2017), equation 1; detectron2's aligned RoIAlign. EVAD (Chen et al.,
ICCV 2023), section 3.2, samples its 100 queries so in each of the six localisation stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, _boxes, _check
from ._boxes import Boxes
from ._registration import register

EPSILON = 2.220446049250313e-16  # of log2's argument: a box of no area lies on the lowest level


def pyramid_roi_align(
    levels: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    *,
    strides: Sequence[int] = (4, 8, 16, 32),
    output_size: int | tuple[int, int] = 7,
    sampling_ratio: int = 2,
    canonical_size: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """Sample every box on the pyramid level of its size, chosen inside the kernel.

    Args:
        levels: Feature maps from the finest to the coarsest, each [B, C, h, w], floating point, any strides
            (channels-last memory saves the kernel a transposition).
        boxes: x1, y1, x2, y2 in pixels of the input, floating point: [B, n, 4], a list of B [n_b, 4], or [R, 5] with
            the batch index first. Kept in float32 or wider.
        strides: Pixels per cell of each level, each twice the one before. Levels are numbered from the rounded log2 of
            the first: 4, 8, 16, 32 are levels 2 to 5.
        output_size: Bins of a box, (oh, ow) or one number for both.
        sampling_ratio: Samples of a bin along each side, at least 1.
        canonical_size: Side in pixels, above 0, of the square box that belongs to ``canonical_level``.
        canonical_level: Number of that level.
    Returns:
        Samples, [B, n, C, oh, ow] for boxes [B, n, 4], else [R, C, oh, ow] in the order of the boxes. A sample more
        than one cell outside its level counts as 0, others clamp to the border; a reversed box or one with a NaN gives
        zeros. Gradient flows to ``levels``, not to ``boxes``. No box: an empty result.
    Raises:
        ValueError: a shape or number is out of range, or (on the CPU) a batch index is; a GPU gives such a box zeros.
        TypeError: wrong dtype.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing.
    """
    arguments = _checked(
        levels,
        boxes,
        strides=strides,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    if _backend.choose("pyramid_roi_align", levels[0]) == "reference":
        return _per_image(boxes, _reference(arguments))
    return _per_image(boxes, _sample(list(levels), arguments.boxes.corners, arguments.boxes.batch, *arguments[2:]))


def pyramid_roi_align_reference(levels: Sequence[Tensor], boxes: Tensor | Sequence[Tensor], **options) -> Tensor:
    """``pyramid_roi_align`` in plain PyTorch: every box on every level with two small matrix products, one left in."""
    return _per_image(boxes, _reference(_checked(levels, boxes, **options)))


def level_of(corners: Tensor, *, first: int, count: int, canonical_size: float, canonical_level: int) -> Tensor:
    """Index among ``count`` levels, of which the finest is number ``first``, of each box [R, 4]: [R] int64.

    A box that has no level (NaN) goes to the finest. log2 in float64: in float32 a GPU's is approximate.
    """
    size = ((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])).sqrt()
    octave = torch.log2((_boxes.divided(size, canonical_size) + EPSILON).double()).to(size.dtype)
    number = torch.floor(canonical_level + octave)
    return (number - first).nan_to_num(nan=0.0).clamp(0, count - 1).to(torch.int64)


class _Arguments(NamedTuple):
    levels: Sequence[Tensor]
    boxes: Boxes
    strides: tuple[float, ...]
    output: tuple[int, int]
    sampling_ratio: int
    canonical_size: float
    canonical_level: int
    first: int  # number of the finest level


def _checked(
    levels,
    boxes,
    *,
    strides=(4, 8, 16, 32),
    output_size=7,
    sampling_ratio=2,
    canonical_size=224,
    canonical_level=4,
) -> _Arguments:
    op = "pyramid_roi_align"
    if not isinstance(levels, (list, tuple)) or not levels:
        _check.fail(op, "levels", "a list of at least one tensor [B, C, h, w]", type(levels).__name__, TypeError)
    for level in levels:
        _check.tensor(op, "levels", level, 4, "tensors [B, C, h, w]")
        _check.floating(op, "levels", level)
        _check.same_dtype(op, "levels", level, "levels[0]", levels[0])
        _check.same_device(op, "levels", level, "levels[0]", levels[0])
        if level.shape[0] != levels[0].shape[0] or level.shape[1] != levels[0].shape[1]:
            _check.fail(op, "levels", f"[B, C, h, w] with [B, C] = {list(levels[0].shape[:2])}", list(level.shape))
        if level.shape[2] < 1 or level.shape[3] < 1:
            _check.fail(op, "levels", "at least 1 high and wide", list(level.shape))
    if not isinstance(strides, (list, tuple)):
        _check.fail(op, "strides", f"as many numbers as levels ({len(levels)})", type(strides).__name__, TypeError)
    strides = tuple(_boxes.positive(op, "strides", stride) for stride in strides)
    if len(strides) != len(levels):
        _check.fail(op, "strides", f"as many as levels ({len(levels)})", len(strides))
    if any(coarse != 2 * fine for fine, coarse in itertools.pairwise(strides)):
        _check.fail(op, "strides", "each twice the one before", strides)
    level = _check.as_integer(canonical_level)
    if level is None or abs(level) > _check.MAX_COUNT:
        _check.fail(op, "canonical_level", "an integer of 32 bits", canonical_level)
    return _Arguments(
        levels,
        _boxes.check_boxes(op, boxes, levels[0], "levels"),
        strides,
        _boxes.output_size(op, output_size),
        _boxes.sampling_ratio(op, sampling_ratio),
        _boxes.positive(op, "canonical_size", canonical_size),
        level,
        round(math.log2(strides[0])),
    )


def _per_image(boxes: Tensor | Sequence[Tensor], samples: Tensor) -> Tensor:
    """[R, ...] as [B, n, ...] where the boxes were [B, n, 4]."""
    if isinstance(boxes, Tensor) and boxes.ndim == 3:
        return samples.unflatten(0, boxes.shape[:2])
    return samples


def _reference(arguments: _Arguments) -> Tensor:
    """[R, C, oh, ow]. Every box is sampled on every level, all weights zero but on its own: shapes stay static."""
    levels, boxes, strides, output, sampling_ratio, canonical_size, canonical_level, first = arguments
    level_index = level_of(
        boxes.corners,
        first=first,
        count=len(levels),
        canonical_size=canonical_size,
        canonical_level=canonical_level,
    )
    dtype = levels[0].dtype
    total = 0
    for index, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        features = level.movedim(1, 3)[:, None].to(torch.promote_types(dtype, torch.float32))
        total = total + _boxes.bins_reference(
            features, boxes, scale=1 / stride, output=output, sampling_ratio=sampling_ratio, chosen=level_index == index
        )
    return total[:, :, 0].movedim(3, 1).to(dtype)


# Registration. No argument has a default: an omitted one beside a Tensor[] breaks the backward.

_SAMPLING = (
    "Tensor corners, Tensor? batch, float[] pixels_per_cell, int[] output, int sampling_ratio, float canonical_size, "
    "int canonical_level, int first"
)


def _run(kernel, levels, sampling, samples):
    """Calls a kernel: ``levels`` and ``samples`` [R, C, oh, ow] are features, or their gradients."""
    corners, batch, pixels_per_cell, output, sampling_ratio, *canonical = sampling
    corners, batch = corners.contiguous(), None if batch is None else batch.contiguous()
    kernel(
        [
            (level.data_ptr(), *level.stride(), *level.shape[2:], pixels)
            for level, pixels in zip(levels, pixels_per_cell, strict=True)
        ],
        (*levels[0].shape[:2], *canonical),
        _boxes.packed(corners, batch),
        (*output, sampling_ratio, True),
        _backend.DTYPE_CODE[samples.dtype],
        samples.data_ptr(),
        torch.get_num_threads(),
    )


def _forward_cpu(levels, *sampling):
    samples = _forward_fake(levels, *sampling)
    _run(_backend.native.pyramid_roi_align_forward, levels, sampling, samples)
    return samples


def _forward_fake(levels, corners, batch, pixels_per_cell, output, *_):
    return levels[0].new_empty(corners.shape[0], levels[0].shape[1], *output)


def _backward_cpu(grad_samples, B, sizes, *sampling):
    """The gradient of every level, [B, C, h, w], contiguous."""
    grad_levels = _backward_fake(grad_samples, B, sizes, *sampling)
    _run(_backend.native.pyramid_roi_align_backward, grad_levels, sampling, grad_samples.contiguous())
    return grad_levels


def _backward_fake(grad_samples, B, sizes, *_):
    C = grad_samples.shape[1]
    return [grad_samples.new_empty(B, C, *size) for size in zip(sizes[::2], sizes[1::2], strict=True)]


def _setup_context(ctx, inputs, output):
    levels, corners, batch, *ctx.sampling = inputs
    ctx.B = levels[0].shape[0]
    ctx.sizes = [size for level in levels for size in level.shape[2:]]
    ctx.save_for_backward(corners, batch)


def _backward(ctx, grad_samples):
    grad_levels = _sample_backward(grad_samples, ctx.B, ctx.sizes, *ctx.saved_tensors, *ctx.sampling)
    return grad_levels, None, None, *[None] * len(ctx.sampling)


_sample_backward = register(
    f"pyramid_roi_align_backward(Tensor grad_samples, SymInt B, SymInt[] sizes, {_SAMPLING}) -> Tensor[]",
    cpu=_backward_cpu,
    triton="pyramid_roi_align_triton.backward",
    fake=_backward_fake,
)
_sample = register(
    f"pyramid_roi_align(Tensor[] levels, {_SAMPLING}) -> Tensor",
    cpu=_forward_cpu,
    triton="pyramid_roi_align_triton.forward",
    fake=_forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
