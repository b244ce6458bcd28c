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
        TypeError: ``importance`` is not floating point, or ``num_select`` not an integer.
        RuntimeError: a backend asked for by name is missing.
    """
    num_select = _check_selection(importance, num_select)
    if _backend.choose("select_tokens", importance) == "reference":
        return select_tokens_reference(importance, num_select)
    return _select(importance, num_select)


def select_tokens_with_slots(importance: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
    """``select_tokens``, and the inverse of its result; on a GPU in the same launch.

    Args: as of ``select_tokens``.
    Returns:
        index: [B, num_select], int64.
        slot: [B, M], int32: k where ``index[b, k]`` is the token, -1 where it is not selected.
    Raises: as ``select_tokens``.
    """
    num_select = _check_selection(importance, num_select)
    if _backend.choose("select_tokens", importance) == "reference":
        index = select_tokens_reference(importance, num_select)
        slot = torch.full_like(importance, -1, dtype=torch.int32, memory_format=torch.contiguous_format)
        place = torch.arange(num_select, dtype=torch.int32, device=importance.device)
        return index, slot.scatter(1, index, place.expand_as(index))
    return _select_with_slots(importance, num_select)


def _check_selection(importance: Tensor, num_select: int) -> int:
    _check.tensor("select_tokens", "importance", importance, 2, "[B, M]")
    _check.floating("select_tokens", "importance", importance)
    M = importance.shape[1]
    _check.countable("select_tokens", "importance", M, "[B, M] with M")
    return _check.integer("select_tokens", "num_select", num_select, M, "M")


def select_tokens_reference(importance: Tensor, num_select: int) -> Tensor:
    """``select_tokens`` in plain PyTorch."""
    importance = importance.detach()
    unordered = importance.isnan()
    importance = importance.masked_fill(unordered, -torch.inf)
    order = importance.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, unordered.gather(1, order).int().argsort(dim=1, stable=True))  # NaN behind -inf
    return order[:, :num_select].sort(dim=1).values


def gather_tokens(tokens: Tensor, index: Tensor, *, num_keyframe: int = 0) -> Tensor:
    """Keep the keyframe's tokens and the selected ones.

    Args:
        tokens: All tokens, keyframe first, [B, N, C], or a value of each, [B, N] (``position``, a mask); any dtype.
        index: Which non-keyframe tokens to keep, counted from the first of them, [B, num_select], int64; in any order,
            repeated or not.
        num_keyframe: How many of the first tokens are kept as they are, 0 to N.
    Returns:
        [B, num_keyframe + num_select, C] or [B, num_keyframe + num_select]: the keyframe's rows, then the selected in
        the order of ``index``. The gradient of a repeated row is the sum.
    Raises:
        ValueError: a shape disagrees, or (on the CPU) an index is outside [0, N - num_keyframe). On a GPU such a row is
            zeros.
        TypeError: ``index`` is not int64, or ``num_keyframe`` not an integer.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing.
    """
    _check.tensor("gather_tokens", "tokens", tokens, (2, 3), "[B, N, C] or [B, N]")
    _check.tensor("gather_tokens", "index", index, 2, "[B, num_select]")
    _check.int64("gather_tokens", "index", index)
    _check.same_device("gather_tokens", "index", index, "tokens", tokens)
    B, N = tokens.shape[:2]
    _check.countable("gather_tokens", "tokens", N, "[B, N, C] or [B, N] with N")
    _check.countable("gather_tokens", "index", index.shape[1], "[B, num_select] with num_select")
    if index.shape[0] != B:
        _check.fail("gather_tokens", "index", f"[B, num_select] with B = {B}", list(index.shape))
    num_keyframe = _check.integer("gather_tokens", "num_keyframe", num_keyframe, N, "N")
    if _backend.choose("gather_tokens", tokens) == "reference":
        return gather_tokens_reference(tokens, index, num_keyframe=num_keyframe)
    gather = _gather if tokens.is_floating_point() or tokens.is_complex() else _gather_integers
    return gather(tokens, index, num_keyframe)


def gather_tokens_reference(tokens: Tensor, index: Tensor, *, num_keyframe: int = 0) -> Tensor:
    """``gather_tokens`` in plain PyTorch."""
    B, N = tokens.shape[:2]
    M = N - num_keyframe
    inside = (index >= 0) & (index < M)
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(inside.all()):
        _check.fail("gather_tokens", "index", f"in [0, {M})", int(index[~inside][0]))
    selected = torch.where(inside, num_keyframe + index, N)  # row N, of zeros, stands for an index outside
    row = torch.cat([torch.arange(num_keyframe, device=index.device).expand(B, num_keyframe), selected], dim=1)
    with_blank = torch.cat([tokens, tokens.new_zeros(B, 1, *tokens.shape[2:])], dim=1)
    if tokens.ndim == 3:
        row = row[..., None].expand(*row.shape, tokens.shape[2])
    return with_blank.gather(1, row)


# Registration.


def _select_native(importance: Tensor, num_select: int) -> Tensor:
    index = _select_fake(importance, num_select)
    _launch_select(importance, num_select, index, 0)
    return index


def _select_with_slots_native(importance: Tensor, num_select: int) -> tuple[Tensor, Tensor]:
    index, slot = _select_with_slots_fake(importance, num_select)
    _launch_select(importance, num_select, index, slot.data_ptr())
    return index, slot


def _launch_select(importance: Tensor, num_select: int, index: Tensor, slot: int) -> None:
    _backend.launch(
        "select_tokens",
        importance,
        importance.data_ptr(),
        *importance.stride(),
        *importance.shape,
        num_select,
        _backend.DTYPE_CODE[importance.dtype],
        index.data_ptr(),
        slot,
    )


def _select_fake(importance, num_select):
    return importance.new_empty(importance.shape[0], num_select, dtype=torch.int64)


def _select_with_slots_fake(importance, num_select):
    return _select_fake(importance, num_select), importance.new_empty(importance.shape, dtype=torch.int32)


_select = register(
    "select_tokens(Tensor importance, SymInt num_select) -> Tensor",
    cpu=_select_native,
    triton="token_selection_triton.select",
    cuda=_select_native,
    fake=_select_fake,
    differentiable=False,
)
_select_with_slots = register(
    "select_tokens_with_slots(Tensor importance, SymInt num_select) -> (Tensor, Tensor)",
    cpu=_select_with_slots_native,
    triton="token_selection_triton.select_with_slots",
    cuda=_select_with_slots_native,
    fake=_select_with_slots_fake,
    differentiable=False,
)


def _gather_native(tokens: Tensor, index: Tensor, num_keyframe: int) -> Tensor:
    B, N, C = _shape(tokens)
    kept = _gather_fake(tokens, index, num_keyframe)
    tokens = tokens if tokens.ndim == 2 else _backend.rows(tokens)
    _backend.launch(
        "gather_tokens_forward",
        tokens,
        tokens.data_ptr(),
        *tokens.stride()[:2],
        index.data_ptr(),
        *index.stride(),
        B,
        N,
        C,
        num_keyframe,
        index.shape[1],
        tokens.element_size(),
        kept.data_ptr(),
    )
    return kept


def _gather_fake(tokens, index, num_keyframe):
    return tokens.new_empty(tokens.shape[0], num_keyframe + index.shape[1], *tokens.shape[2:])


def _shape(tokens):
    return (*tokens.shape, 1) if tokens.ndim == 2 else tokens.shape


def _gather_backward_native(grad_kept: Tensor, index: Tensor, num_keyframe: int, N: int) -> Tensor:
    grad_tokens = _gather_backward_fake(grad_kept, index, num_keyframe, N)
    grad_kept = grad_kept.contiguous()
    if grad_kept.is_complex():  # a pair of channels
        grad_kept = torch.view_as_real(grad_kept).flatten(2)
    B, _, C = _shape(grad_kept)
    copies = index.new_empty(2, B, N - num_keyframe, dtype=torch.int32)
    _backend.launch(
        "gather_tokens_backward",
        grad_kept,
        grad_kept.data_ptr(),
        index.data_ptr(),
        *index.stride(),
        B,
        N,
        C,
        num_keyframe,
        index.shape[1],
        _backend.DTYPE_CODE[grad_kept.dtype],
        copies.data_ptr(),
        grad_tokens.data_ptr(),
    )
    return grad_tokens


def _gather_backward_fake(grad_kept, index, num_keyframe, N):
    return grad_kept.new_empty(grad_kept.shape[0], N, *grad_kept.shape[2:])


def _setup_context(ctx, inputs, output):
    tokens, index, ctx.num_keyframe = inputs
    ctx.save_for_backward(index)
    ctx.N = tokens.shape[1]


def _backward(ctx, grad_kept):
    return _gather_backward(grad_kept, ctx.saved_tensors[0], ctx.num_keyframe, ctx.N), None, None


_gather_backward = register(
    "gather_tokens_backward(Tensor grad_kept, Tensor index, SymInt num_keyframe, SymInt N) -> Tensor",
    cpu=_gather_backward_native,
    triton="token_selection_triton.gather_backward",
    cuda=_gather_backward_native,
    fake=_gather_backward_fake,
)
_gather = register(
    "gather_tokens(Tensor tokens, Tensor index, SymInt num_keyframe) -> Tensor",
    cpu=_gather_native,
    triton="token_selection_triton.gather",
    cuda=_gather_native,
    fake=_gather_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_gather_integers = register(
    "gather_tokens_integers(Tensor tokens, Tensor index, SymInt num_keyframe) -> Tensor",
    cpu=_gather_native,
    triton="token_selection_triton.gather",
    cuda=_gather_native,
    fake=_gather_fake,
    differentiable=False,
)
