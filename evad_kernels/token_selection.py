"""select_tokens and gather_tokens: which tokens a pruning layer keeps, and the rows of those.

    selected = the num_select highest of importance[b, :]
    kept[b]  = tokens[b, :num_keyframe], then tokens[b, num_keyframe + index[b, k]] for each k

Source: EVAD (Chen et al., ICCV 2023), section 3.2 and Fig. 3: "we preserve the top-k important non-keyframe tokens
concatenated with keyframe tokens". The paper leaves ties and order open: here a tie goes to the lower index, and kept
tokens stay in clip order. Both are exact: every backend gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backend, _check
from ._registration import register


def select_tokens(importance: Tensor, num_select: int) -> Tensor:
    """Find the tokens of highest importance in each sample.

    Args:
        importance: Score of each non-keyframe token, [B, M], floating point.
        num_select: How many to select, 0 to M.
    Returns:
        Their indices, [B, num_select], int64, ascending. Of equal importances the lower index wins; -0 equals +0; NaN
        is the lowest of all. Not differentiable.
    Raises:
        ValueError: a shape disagrees, or ``num_select`` is not in [0, M].
    """
    _check.tensor("select_tokens", "importance", importance, 2, "[B, M]")
    _check.floating("select_tokens", "importance", importance)
    M = importance.shape[1]
    _check.integer("select_tokens", "num_select", num_select, 0, M, f"[0, M = {M}]")
    if _backend.choose("select_tokens", importance) == "reference":
        return select_tokens_reference(importance, num_select)
    return _select(importance, num_select)


def select_tokens_reference(importance: Tensor, num_select: int) -> Tensor:
    """``select_tokens`` in plain PyTorch."""
    importance = importance.detach()
    unordered = importance.isnan()
    importance = importance.masked_fill(unordered, -torch.inf)
    order = importance.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, unordered.gather(1, order).int().argsort(dim=1, stable=True))  # NaN behind -inf
    return order[:, :num_select].sort(dim=1).values


def _select_cpu(importance: Tensor, num_select: int) -> Tensor:
    B, M = importance.shape
    index = importance.new_empty(B, num_select, dtype=torch.int64)
    _backend.native.select_tokens(
        importance.data_ptr(),
        *importance.stride(),
        B,
        M,
        num_select,
        _backend.DTYPE_CODE[importance.dtype],
        index.data_ptr(),
        torch.get_num_threads(),
    )
    return index


def _select_fake(importance, num_select):
    return importance.new_empty(importance.shape[0], num_select, dtype=torch.int64)


_select = register(
    "select_tokens(Tensor importance, SymInt num_select) -> Tensor",
    cpu=_select_cpu,
    fake=_select_fake,
)
