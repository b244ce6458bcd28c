"""Cells of the dense grid and the kept tokens in them: what scatter_tokens and the RoI ops share.

``cell_map`` inverts ``position``: slot[b, cell] is the token at a cell, or -1 for a dropped one. Where two tokens name
one cell the later one has it, in every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backend, _check


def check_tokens_and_position(op: str, tokens: Tensor, position: Tensor) -> None:
    """tokens [B, K, C] floating point, position [B, K] int64, on one device."""
    _check.tensor(op, "tokens", tokens, 3, "[B, K, C]")
    _check.floating(op, "tokens", tokens)
    _check.tensor(op, "position", position, 2, "[B, K]")
    _check.int64(op, "position", position)
    _check.same_device(op, "position", position, "tokens", tokens)
    _check.countable(op, "tokens", tokens.shape[1], "[B, K, C] with K")
    if position.shape[0] != tokens.shape[0] or position.shape[1] != tokens.shape[1]:
        _check.fail(op, "position", f"[B, K] = {list(tokens.shape[:2])}", list(position.shape))


def check_fill(op: str, argument: str, fill: Tensor | None, tokens: Tensor, cells: int) -> None:
    """What a dropped cell holds: None, [C] or [cells, C], like ``tokens`` in dtype and device."""
    if fill is None:
        return
    C = tokens.shape[2]
    _check.tensor(op, argument, fill, (1, 2), f"[C] or [T*Gh*Gw, C] = [{C}] or [{cells}, {C}]")
    _check.same_dtype(op, argument, fill, "tokens", tokens)
    _check.same_device(op, argument, fill, "tokens", tokens)
    if fill.shape[-1] != C or (fill.ndim == 2 and fill.shape[0] != cells):
        _check.fail(op, argument, f"[C] or [T*Gh*Gw, C] = [{C}] or [{cells}, {C}]", list(fill.shape))


def cell_map(op: str, position: Tensor, cells: int) -> Tensor:
    """slot [B, cells] int32 by the native module; a position outside raises on the CPU and is left out on a GPU."""
    B, K = position.shape
    slot = position.new_empty(B, cells, dtype=torch.int32)
    _backend.launch("cell_map", position, op, position.data_ptr(), *position.stride(), B, K, cells, slot.data_ptr())
    return slot


def cell_map_reference(op: str, position: Tensor, cells: int) -> Tensor:
    """slot [B, cells] int64 in plain PyTorch; a position outside raises on the CPU and is left out elsewhere."""
    B, K = position.shape
    inside = (position >= 0) & (position < cells)
    if position.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(inside.all()):
        _check.fail(op, "position", f"in [0, {cells})", int(position[~inside][0]))
    target = torch.where(inside, position, cells)  # one cell beyond the grid takes what is outside
    token = torch.arange(K, device=position.device).expand(B, K)
    slot = torch.full((B, cells + 1), -1, dtype=torch.int64, device=position.device)
    return slot.scatter_reduce(1, target, token, "amax")[:, :cells]


def dense_reference(op: str, tokens: Tensor, position: Tensor, fill: Tensor | None, cells: int) -> Tensor:
    """[B, cells, C]: each token in its cell, ``fill`` elsewhere; plain PyTorch."""
    B, K, C = tokens.shape
    slot = cell_map_reference(op, position, cells)
    with_blank = torch.cat([tokens, tokens.new_zeros(B, 1, C)], dim=1)  # row K stands for a dropped cell
    dense = with_blank.gather(1, torch.where(slot < 0, K, slot)[..., None].expand(B, cells, C))
    return dense if fill is None else torch.where((slot < 0)[..., None], fill, dense)
