"""scatter_tokens: pruned tokens back onto the dense space-time grid.

    dense[b, cell] = tokens[b, k] where position[b, k] = cell, else fill

Source: EVAD (Chen et al., ICCV 2023), section 3.3: "fill the preserved tokens into this feature map according to their
corresponding spatiotemporal positions, and pad the rest with zeros". A copy: results are bit-exact in every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backend, _cells, _check
from ._registration import register


def scatter_tokens(
    tokens: Tensor, position: Tensor, *, grid: tuple[int, int, int], fill: Tensor | None = None
) -> Tensor:
    """Place each kept token at its position and ``fill`` everywhere else.

    Args:
        tokens: Kept tokens, [B, K, C], floating point.
        position: Flat grid index t*Gh*Gw + y*Gw + x of each kept token, [B, K], int64, unique within a row (of equal
            positions the last one is placed).
        grid: Cells of the dense grid, (T, Gh, Gw).
        fill: What a dropped cell holds: None for zeros, [C], or [T*Gh*Gw, C]; same dtype as ``tokens``.
    Returns:
        Dense grid, [B, T, Gh, Gw, C]. Gradient flows to ``tokens`` and ``fill``.
    Raises:
        ValueError: a shape disagrees, or (on the CPU) a position is outside the grid; a GPU leaves the fill there.
        TypeError: ``tokens`` is not floating point, ``position`` not int64, or ``fill`` of another dtype.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing.
    """
    _cells.check_tokens_and_position("scatter_tokens", tokens, position)
    T, Gh, Gw = _check.grid("scatter_tokens", grid)
    _cells.check_fill("scatter_tokens", "fill", fill, tokens, T * Gh * Gw)
    if _backend.choose("scatter_tokens", tokens) == "reference":
        return scatter_tokens_reference(tokens, position, grid=grid, fill=fill)
    return _scatter(tokens, position, fill, T * Gh * Gw).unflatten(1, (T, Gh, Gw))


def scatter_tokens_reference(
    tokens: Tensor, position: Tensor, *, grid: tuple[int, int, int], fill: Tensor | None = None
) -> Tensor:
    """``scatter_tokens`` in plain PyTorch."""
    T, Gh, Gw = grid
    return _cells.dense_reference("scatter_tokens", tokens, position, fill, T * Gh * Gw).unflatten(1, (T, Gh, Gw))


# Registration. The private op returns [B, cells, C]; `fill` is positional: autograd refuses keyword-only tensors.


def _forward_native(tokens: Tensor, position: Tensor, fill: Tensor | None, cells: int) -> Tensor:
    B, _, C = tokens.shape
    slot = _cells.cell_map("scatter_tokens", position, cells)
    dense = tokens.new_empty(B, cells, C)
    if dense.numel() == 0:
        return dense
    tokens = _backend.rows(tokens)
    fill = None if fill is None else fill.contiguous()
    _backend.launch(
        "scatter_tokens_forward",
        tokens,
        tokens.data_ptr(),
        *tokens.stride()[:2],
        slot.data_ptr(),
        0 if fill is None else fill.data_ptr(),
        fill is not None and fill.ndim == 2,
        B,
        cells,
        C,
        _backend.DTYPE_CODE[tokens.dtype],
        dense.data_ptr(),
    )
    return dense


def _forward_fake(tokens, position, fill, cells):
    return tokens.new_empty(tokens.shape[0], cells, tokens.shape[2])


def _backward_native(grad_dense: Tensor, position: Tensor, fill_ndim: int) -> tuple[Tensor, Tensor]:
    """grad_tokens [B, K, C] and grad_fill ([0], [C] or [cells, C] by ``fill_ndim``)."""
    B, cells, C = grad_dense.shape
    K = position.shape[1]
    slot = _cells.cell_map("scatter_tokens", position, cells)
    grad_dense = grad_dense.contiguous()
    grad_tokens = grad_dense.new_empty(B, K, C)
    grad_fill = grad_dense.new_empty(_fill_shape(fill_ndim, cells, C))
    dtype = _backend.DTYPE_CODE[grad_dense.dtype]
    _backend.launch(
        "scatter_tokens_backward",
        grad_dense,
        grad_dense.data_ptr(),
        position.data_ptr(),
        *position.stride(),
        slot.data_ptr(),
        B,
        K,
        cells,
        C,
        dtype,
        grad_tokens.data_ptr(),
    )
    if fill_ndim:
        runs = 0 if fill_ndim == 2 else _backend.native.scatter_tokens_fill_runs(B, cells)
        partial = grad_dense.new_empty(runs, C, dtype=torch.float64)
        _backend.launch(
            "scatter_tokens_backward_fill",
            grad_dense,
            grad_dense.data_ptr(),
            slot.data_ptr(),
            fill_ndim == 2,
            B,
            cells,
            C,
            dtype,
            grad_fill.data_ptr(),
            partial.data_ptr(),
        )
    return grad_tokens, grad_fill


def _fill_shape(fill_ndim, cells, C):
    return ((0,), (C,), (cells, C))[fill_ndim]


def _backward_fake(grad_dense, position, fill_ndim):
    B, cells, C = grad_dense.shape
    grad_tokens = grad_dense.new_empty(B, position.shape[1], C)
    return grad_tokens, grad_dense.new_empty(_fill_shape(fill_ndim, cells, C))


def _setup_context(ctx, inputs, output):
    _, position, fill, _ = inputs
    ctx.save_for_backward(position)
    ctx.fill_ndim = 0 if fill is None else fill.ndim


def _backward(ctx, grad_dense):
    fill_ndim = ctx.fill_ndim if ctx.needs_input_grad[2] else 0
    grad_tokens, grad_fill = _scatter_backward(grad_dense, ctx.saved_tensors[0], fill_ndim)
    return grad_tokens, None, grad_fill if fill_ndim else None, None


_scatter_backward = register(
    "scatter_tokens_backward(Tensor grad_dense, Tensor position, int fill_ndim) -> (Tensor, Tensor)",
    cpu=_backward_native,
    triton="scatter_tokens_triton.backward",
    cuda=_backward_native,
    fake=_backward_fake,
)
_scatter = register(
    "scatter_tokens(Tensor tokens, Tensor position, Tensor? fill, SymInt cells) -> Tensor",
    cpu=_forward_native,
    triton="scatter_tokens_triton.forward",
    cuda=_forward_native,
    fake=_forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
