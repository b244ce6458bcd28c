"""roi_align_3d, roi_pool_3d: features of boxes straight from kept tokens, without the dense map.

    roi_align_3d[r, :, t, p, q] = mean of sampling_ratio^2 bilinear samples of frame t in bin (p, q) of box r
    roi_pool_3d[r]              = 1/T * sum_t max_{p,q} roi_align_3d[r, :, t, p, q]

A cell holds its kept token, or ``background``. Video, not volume: height and width are pooled in every frame, T is not.

Source: EVAD (Chen et al., ICCV 2023), section 3.3 (RoI of the rebuilt feature map), with detectron2's aligned RoIAlign
(He et al., Mask R-CNN, 2017) as EVAD uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, _boxes, _cells, _check
from ._boxes import Boxes
from ._registration import register


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
    return _samples(arguments)


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
    if _backend.choose("roi_pool_3d", tokens) == "reference":
        return _pool_reference(arguments)
    differentiable = tokens.requires_grad or (background is not None and background.requires_grad)
    return _pool(*_flat(arguments), torch.is_grad_enabled() and differentiable)[0]


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
    sampling_ratio: int
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


def _samples(arguments: _Arguments) -> Tensor:
    if _backend.choose("roi_align_3d", arguments.tokens) == "reference":
        return _align_reference(arguments)
    return _align(*_flat(arguments))


def _align_reference(arguments: _Arguments) -> Tensor:
    return _bins_reference(arguments).permute(0, 4, 2, 1, 3).to(arguments.tokens.dtype)


def _pool_reference(arguments: _Arguments) -> Tensor:
    # max over dim, not amax: its gradient goes to the first of equal values.
    largest = _bins_reference(arguments).max(3).values.max(1).values  # [R, T, C]
    return largest.mean(1).to(arguments.tokens.dtype)


def _bins_reference(arguments: _Arguments) -> Tensor:
    """[R, oh, T, ow, C] in float32 or wider."""
    op, tokens, position, background, boxes, grid, output, scale, sampling_ratio, aligned = arguments
    T, Gh, Gw = grid
    dense = _cells.dense_reference(op, tokens, position, background, T * Gh * Gw).unflatten(1, grid)
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32))
    return _boxes.bins_reference(
        dense, boxes, scale=scale, output=output, sampling_ratio=sampling_ratio, aligned=aligned
    )


# Registration. `background` is positional: autograd refuses keyword-only tensors.

_SAMPLING = "Tensor corners, Tensor? batch, SymInt[] grid, int[] output, float scale, int sampling_ratio, bool aligned"


def _flat(arguments: _Arguments) -> tuple:
    """In the order of the private ops' schemas."""
    _, tokens, position, background, boxes, *sampling = arguments
    return tokens, background, position, boxes.corners, boxes.batch, *sampling


def _run(kernel, op, tokens, background, position, sampling, *results):
    """Calls a forward kernel. Halves are widened first: a token is read by many boxes."""
    corners, batch, grid, output, scale, sampling_ratio, aligned = sampling
    dtype = tokens.dtype
    wide = torch.promote_types(dtype, torch.float32)
    tokens = _backend.rows(tokens.to(wide))
    background = None if background is None else background.to(wide).contiguous()
    corners, batch = corners.contiguous(), None if batch is None else batch.contiguous()
    slot = _cells.cell_map(op, position, math.prod(grid))
    kernel(
        (
            tokens.data_ptr(),
            *tokens.stride()[:2],
            slot.data_ptr(),
            _address(background),
            background is not None and background.ndim == 2,
        ),
        (*tokens.shape, *grid),
        _boxes.packed(corners, batch),
        (*output, sampling_ratio, aligned),
        scale,
        _backend.DTYPE_CODE[dtype],
        *(result.data_ptr() for result in results),
        torch.get_num_threads(),
    )


def _align_cpu(tokens, background, position, *sampling):
    samples = _align_fake(tokens, background, position, *sampling)
    _run(_backend.native.roi_align_3d_forward, "roi_align_3d", tokens, background, position, sampling, samples)
    return samples


def _align_fake(tokens, background, position, corners, batch, grid, output, *_):
    return tokens.new_empty(corners.shape[0], tokens.shape[2], grid[0], *output)


def _pool_cpu(tokens, background, position, *sampling_and_flag):
    sampling = sampling_and_flag[:-1]
    pooled, largest = _pool_fake(tokens, background, position, *sampling_and_flag)
    # An empty tensor has the address 0: then the bins are not told.
    _run(_backend.native.roi_pool_3d_forward, "roi_pool_3d", tokens, background, position, sampling, pooled, largest)
    return pooled, largest


def _pool_fake(
    tokens, background, position, corners, batch, grid, output, scale, sampling_ratio, aligned, save_largest
):
    """pooled [R, C] and the bin of the largest sample, [R, T, C] (bytes if they can tell the bins), or [0]."""
    R, C = corners.shape[0], tokens.shape[2]
    index = torch.uint8 if math.prod(output) <= 256 else torch.int32
    return tokens.new_empty(R, C), tokens.new_empty((R, grid[0], C) if save_largest else (0,), dtype=index)


def _pool_cuda(tokens, background, position, *sampling_and_flag):
    sampling, save_largest = sampling_and_flag[:-1], sampling_and_flag[-1]
    pooled, largest = _pool_fake(tokens, background, position, *sampling_and_flag)
    if sampling[1] is not None:
        pooled.zero_()  # for a box of no image
    if pooled.numel() == 0:
        return pooled, largest
    tokens = _backend.rows(tokens)
    background = None if background is None else background.contiguous()
    per_cell = background is not None and background.ndim == 2
    boxes = _CudaBoxes(tokens, (*tokens.shape, *sampling[2]), *sampling)
    slot = _cells.cell_map("roi_pool_3d", position, math.prod(sampling[2]))
    work = boxes.work(per_cell, grad_background=False)
    _backend.launch(
        "roi_pool_3d_forward",
        tokens,
        (tokens.data_ptr(), *tokens.stride()[:2], slot.data_ptr(), _address(background), per_cell),
        *boxes.arguments,
        pooled.data_ptr(),
        largest.data_ptr() if save_largest else 0,
        work.data_ptr(),
    )
    return pooled, largest


def _pool_backward_cuda(grad, largest, position, *sampling_and_fill):
    sampling, background_ndim = sampling_and_fill[:-1], sampling_and_fill[-1]
    grad, largest = grad.contiguous(), largest.contiguous()
    _, grad_background = _backward_fake(grad, largest, position, *sampling_and_fill)
    grad_tokens = grad.new_zeros(*position.shape, grad.shape[1])
    if grad.numel() == 0 or position.shape[0] == 0:
        return grad_tokens, grad_background.zero_()
    boxes = _CudaBoxes(grad, (*grad_tokens.shape, *sampling[2]), *sampling)
    slot = _cells.cell_map("roi_pool_3d", position, math.prod(sampling[2]))
    work = boxes.work(background_ndim == 2, grad_background=background_ndim > 0)
    _backend.launch(
        "roi_pool_3d_backward",
        grad,
        slot.data_ptr(),
        background_ndim == 2,
        *boxes.arguments,
        grad.data_ptr(),
        largest.data_ptr(),
        grad_tokens.data_ptr(),
        grad_background.data_ptr() if background_ndim else 0,
        work.data_ptr(),
    )
    return grad_tokens, grad_background


class _CudaBoxes:
    """Boxes, and what goes with them, as the CUDA kernels take them; keeps the tensors behind the addresses."""

    def __init__(self, like, sizes, corners, batch, grid, output, scale, sampling_ratio, aligned):
        self.like = like
        self.corners, self.batch = corners.contiguous(), None if batch is None else batch.contiguous()
        self.by_image = _boxes.BoxesByImage.of(batch, sizes[0])
        self.sizes, self.packed = sizes, _boxes.packed(self.corners, self.batch)
        self.sampling, self.dtype = (*output, sampling_ratio, aligned), _backend.DTYPE_CODE[like.dtype]
        rows = tuple(map(_address, self.by_image))
        self.arguments = sizes, self.packed, rows, self.sampling, scale, self.dtype

    def work(self, background_per_cell, *, grad_background):
        """Work memory for a call."""
        with torch.cuda.device(self.like.device):
            size = _backend.native.cuda.roi_pool_3d_work(
                background_per_cell, self.sizes, self.packed, self.sampling, self.dtype, grad_background
            )
        return self.like.new_empty(size, dtype=torch.uint8)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def _backward_cpu(grad, largest, position, *sampling_and_fill):
    """grad_tokens [B, K, C] and grad_background ([0], [C] or [cells, C]) from grad of the samples or pooled."""
    corners, batch, grid, output, scale, sampling_ratio, aligned, background_ndim = sampling_and_fill
    B, K = position.shape
    grad = grad.contiguous()
    largest = None if largest is None else largest.contiguous()
    corners, batch = corners.contiguous(), None if batch is None else batch.contiguous()
    slot = _cells.cell_map("roi_align_3d", position, math.prod(grid))
    _, grad_background = _backward_fake(grad, largest, position, *sampling_and_fill)
    grad_tokens = grad.new_zeros(B, K, grad.shape[1])
    _backend.native.roi_3d_backward(
        slot.data_ptr(),
        background_ndim == 2,
        (B, K, grad.shape[1], *grid),
        _boxes.packed(corners, batch),
        (*output, sampling_ratio, aligned),
        scale,
        _backend.DTYPE_CODE[grad.dtype],
        grad.data_ptr(),
        _address(largest),
        grad_tokens.data_ptr(),
        grad_background.data_ptr() if background_ndim else 0,
        torch.get_num_threads(),
    )
    return grad_tokens, grad_background


def _backward_fake(grad, largest, position, corners, batch, grid, *sampling_and_fill):
    C = grad.shape[1]
    shape = ((0,), (C,), (math.prod(grid), C))[sampling_and_fill[-1]]
    return grad.new_empty(*position.shape, C), grad.new_empty(shape)


def _setup_context(ctx, inputs, output):
    _, background, position, corners, batch, *sampling = inputs
    ctx.sampling, ctx.num_inputs = sampling[:5], len(inputs)
    ctx.background_ndim = 0 if background is None else background.ndim
    largest = output[1] if isinstance(output, (tuple, list)) else None
    ctx.save_for_backward(largest, position, corners, batch)


def _backward(ctx, grad, *_):
    largest, *saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
    if largest is not None and largest.ndim == 1:
        raise RuntimeError("roi_pool_3d: save_largest must be true for a backward, got false")
    background_ndim = ctx.background_ndim if ctx.needs_input_grad[1] else 0
    op = _align_backward if largest is None else _pool_backward
    grad_tokens, grad_background = op(grad, largest, *saved, *ctx.sampling, background_ndim)
    return grad_tokens, grad_background if background_ndim else None, *[None] * (ctx.num_inputs - 2)


_GRADIENT = f"(Tensor grad, Tensor? largest, Tensor position, {_SAMPLING}, int background_ndim) -> (Tensor, Tensor)"

_align_backward = register(
    f"roi_align_3d_backward{_GRADIENT}",
    cpu=_backward_cpu,
    triton="roi_align_3d_triton.backward",
    fake=_backward_fake,
)
_pool_backward = register(
    f"roi_pool_3d_backward{_GRADIENT}",
    cpu=_backward_cpu,
    triton="roi_align_3d_triton.backward",
    cuda=_pool_backward_cuda,
    fake=_backward_fake,
)
_align = register(
    f"roi_align_3d(Tensor tokens, Tensor? background, Tensor position, {_SAMPLING}) -> Tensor",
    cpu=_align_cpu,
    triton="roi_align_3d_triton.align",
    fake=_align_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_pool = register(
    f"roi_pool_3d(Tensor tokens, Tensor? background, Tensor position, {_SAMPLING}, bool save_largest)"
    " -> (Tensor, Tensor)",
    cpu=_pool_cpu,
    triton="roi_align_3d_triton.pool",
    cuda=_pool_cuda,
    fake=_pool_fake,
    backward=_backward,
    setup_context=_setup_context,
)
