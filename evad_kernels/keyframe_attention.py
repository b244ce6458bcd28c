"""keyframe_attention: softmax attention that also measures how important each non-keyframe token is.

    P = softmax(scale * Q K^T)          output = P V
    importance[b, j] = 1/N * sum_i w_i * mean_h P[b, h, i, num_keyframe + j]
    w_i = keyframe_weight for the keyframe's rows (the first num_keyframe), else 1

Source: EVAD (Chen et al., ICCV 2023), section 3.2 and Eq. 1. With g the gradient of the importance and c = 1/(N*H),
dP_ij = dO_i . V_j + c w_i g_j: both results are differentiated. ``keyframe_attention_topk`` drops, right after
attention, the query rows that are not selected; nothing later reads them, and their gradient is zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _backend, _check
from ._registration import register
from .token_selection import _select_native, gather_tokens_reference, select_tokens_reference

MOST_WEIGHT = torch.finfo(torch.float32).max


class KeyframeAttention(NamedTuple):
    """What ``keyframe_attention`` returns."""

    output: Tensor  # [B, H, N, D]
    importance: Tensor  # [B, N - num_keyframe]


class KeyframeAttentionTopk(NamedTuple):
    """What ``keyframe_attention_topk`` returns."""

    output: Tensor  # [B, H, num_keyframe + num_select, D]
    index: Tensor  # [B, num_select]
    importance: Tensor  # [B, N - num_keyframe]


def keyframe_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_keyframe: int,
    keyframe_weight: float = 1.0,
    scale: float | None = None,
) -> KeyframeAttention:
    """Attend, and sum the attention that each non-keyframe token receives.

    Args:
        query: [B, H, N, D], floating point; the keyframe's tokens are the first.
        key: Like ``query``.
        value: Like ``query``.
        num_keyframe: Tokens of the keyframe, 0 to N. N: plain attention, the importance is empty.
        keyframe_weight: What a keyframe query counts in the importance, at least 0; other queries count 1.
        scale: Factor of the logits. None: D ** -0.5.
    Returns:
        ``output`` [B, H, N, D], whose transpose to [B, N, H, D] is contiguous, and ``importance``
        [B, N - num_keyframe], float32 (float64 for float64 inputs). Gradient flows through both. Empty input gives
        empty output.
    Raises:
        ValueError: a shape disagrees, or a number is out of range.
        TypeError: not floating point, or dtypes differ.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing.
    """
    op = "keyframe_attention"
    num_keyframe, keyframe_weight, scale = _checked(op, query, key, value, num_keyframe, keyframe_weight, scale)
    if _backend.choose(op, query, triton=_triton_refusal(query)) == "reference":
        return keyframe_attention_reference(
            query, key, value, num_keyframe=num_keyframe, keyframe_weight=keyframe_weight, scale=scale
        )
    return KeyframeAttention(*_attention(query, key, value, num_keyframe, keyframe_weight, scale)[:2])


def keyframe_attention_topk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_keyframe: int,
    num_select: int,
    keyframe_weight: float = 1.0,
    scale: float | None = None,
) -> KeyframeAttentionTopk:
    """Attend, and keep the rows of the keyframe and of the most important other tokens.

    Equal to ``keyframe_attention``, ``select_tokens`` and ``gather_tokens`` in sequence.

    Args:
        query: [B, H, N, D], floating point; the keyframe's tokens are the first.
        key: Like ``query``.
        value: Like ``query``.
        num_keyframe: Tokens of the keyframe, 0 to N.
        num_select: How many of the other tokens are kept, 0 to N - num_keyframe.
        keyframe_weight: What a keyframe query counts in the importance, at least 0; other queries count 1.
        scale: Factor of the logits. None: D ** -0.5.
    Returns:
        ``output`` [B, H, num_keyframe + num_select, D], whose transpose to [B, K, H, D] is contiguous; ``index``
        [B, num_select] int64, ascending, counted from the first non-keyframe token (ties go to the lower index, NaN is
        lowest); ``importance`` [B, N - num_keyframe], float32 (float64 for float64 inputs). Gradient flows through
        ``output`` and ``importance``; while none arrives at the importance, dropped rows cost nothing in the backward.
        (Where a compiled function returns the importance, torch passes zeros for its gradient: every row takes part.)
        On a CPU ``output`` is the front of memory for all N rows.
    Raises:
        ValueError: a shape disagrees, or a number is out of range.
        TypeError: not floating point, or dtypes differ.
        RuntimeError: tensors on different devices, or a backend asked for by name that is missing.
    """
    op = "keyframe_attention_topk"
    num_keyframe, keyframe_weight, scale = _checked(op, query, key, value, num_keyframe, keyframe_weight, scale)
    M = query.shape[2] - num_keyframe
    num_select = _check.integer(op, "num_select", num_select, M, "N - num_keyframe")
    if _backend.choose(op, query, triton=_triton_refusal(query)) == "reference":
        return keyframe_attention_topk_reference(
            query,
            key,
            value,
            num_keyframe=num_keyframe,
            num_select=num_select,
            keyframe_weight=keyframe_weight,
            scale=scale,
        )
    output, importance, _, index = _attention_topk(query, key, value, num_keyframe, num_select, keyframe_weight, scale)
    return KeyframeAttentionTopk(output, index, importance)


def keyframe_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_keyframe: int,
    keyframe_weight: float = 1.0,
    scale: float | None = None,
) -> KeyframeAttention:
    """``keyframe_attention`` in plain PyTorch, the whole map in memory; autocast does not reach inside."""
    D = query.shape[-1]
    N = query.shape[2]
    dtype = _accumulation_dtype(query.dtype)
    with _backend.without_autocast(query.device):
        logits = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * (_default_scale(D) if scale is None else scale)
        attention = logits.softmax(dim=-1)  # [B, H, N, N]
        output = (attention @ value.to(dtype)).to(query.dtype)
        is_keyframe = torch.arange(N, device=query.device) < num_keyframe
        weight = torch.ones(N, dtype=dtype, device=query.device).masked_fill(is_keyframe, keyframe_weight)
        received = (weight[:, None] * attention[..., num_keyframe:].sum(dim=1)).sum(dim=1)  # [B, N - num_keyframe]
        importance = received / max(1, query.shape[1] * N)
    return KeyframeAttention(output, importance)


def keyframe_attention_topk_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_keyframe: int,
    num_select: int,
    keyframe_weight: float = 1.0,
    scale: float | None = None,
) -> KeyframeAttentionTopk:
    """``keyframe_attention_topk`` in plain PyTorch."""
    output, importance = keyframe_attention_reference(
        query, key, value, num_keyframe=num_keyframe, keyframe_weight=keyframe_weight, scale=scale
    )
    index = select_tokens_reference(importance, num_select)
    rows = output.transpose(1, 2)  # [B, N, H, D]
    kept = gather_tokens_reference(rows.flatten(2), index, num_keyframe=num_keyframe)
    return KeyframeAttentionTopk(kept.unflatten(2, rows.shape[2:]).transpose(1, 2), index, importance)


def _default_scale(D: int) -> float:
    return D**-0.5 if D > 0 else 1.0


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums run in, and so that of the importance: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _checked(op, query, key, value, num_keyframe, keyframe_weight, scale) -> tuple[int, float, float]:
    """Raise on bad input; its numbers."""
    _check.tensor(op, "query", query, 4, "[B, H, N, D]")
    _check.floating(op, "query", query)
    _check.countable(op, "query", query.shape[2], "[B, H, N, D] with N")
    for name, tensor in (("key", key), ("value", value)):
        _check.tensor(op, name, tensor, 4, "[B, H, N, D]")
        _check.same_dtype(op, name, tensor, "query", query)
        _check.same_device(op, name, tensor, "query", query)
        if tensor.shape != query.shape:
            _check.fail(op, name, f"[B, H, N, D] = {list(query.shape)}", list(tensor.shape))
    N, D = query.shape[2:]
    num_keyframe = _check.integer(op, "num_keyframe", num_keyframe, N, "N")
    keyframe_weight = _check.number(op, "keyframe_weight", keyframe_weight)
    if not 0 <= keyframe_weight <= MOST_WEIGHT:
        _check.fail(op, "keyframe_weight", "finite in float32 and at least 0", keyframe_weight)
    if scale is None:
        return num_keyframe, keyframe_weight, _default_scale(D)
    scale = _check.number(op, "scale", scale)
    if not -math.inf < scale < math.inf:
        _check.fail(op, "scale", "finite", scale)
    return num_keyframe, keyframe_weight, scale


def _triton_refusal(query: Tensor) -> str | None:
    """Why the Triton kernels cannot take ``query``, or None."""
    if query.shape[3] > 256:
        return "Triton kernels hold a row of a head on the chip, D is at most 256"
    if query.dtype == torch.bfloat16 and _backend.INTERPRETED:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


# Registration. The private ops also return the log-sum-exp of each row, from which the backward recomputes P (but the
# SIMD kernels, which sum again): lse [2, B, H, N] is lse[0] + |scale| * lse[1]. Triton puts the row's largest product
# in lse[1], beside which a small sum of exponentials would be lost in one float; the C++ kernels need 0 there, for they
# look for the maximum again.


def _head_rows(tensor: Tensor | None) -> tuple[int, ...]:
    """Address and strides [B, H, rows] for the native module."""
    return (0, 0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:3])


def _sizes(query: Tensor, num_keyframe: int) -> tuple[int, ...]:
    B, H, N, D = query.shape
    return B, H, N, D, num_keyframe


def _rows_first(query: Tensor, rows: int) -> Tensor:
    """Empty [B, H, rows, D] in the memory's order [B, rows, H, D]; no view, for to an op's views nobody may write."""
    B, H, _, D = query.shape
    return query.new_empty_strided((B, H, rows, D), rows_first_strides(rows, H, D))


def rows_first_strides(rows: int, H: int, D: int) -> tuple[int, ...]:
    return rows * H * D, D, H * D, 1


def _forward_cpu(query, key, value, num_keyframe, keyframe_weight, scale):
    B, H, N, _ = query.shape
    dtype = _accumulation_dtype(query.dtype)
    output = _rows_first(query, N)
    importance = query.new_empty(B, N - num_keyframe, dtype=dtype)
    lse = query.new_empty(2, B, H, N, dtype=dtype)
    lse[1] = 0
    if H == 0:
        importance.zero_()
    elif B > 0 and N > 0:
        query, key, value = _backend.rows(query), _backend.rows(key), _backend.rows(value)
        _backend.native.keyframe_attention_forward(
            _sizes(query, num_keyframe),
            scale,
            keyframe_weight,
            _backend.DTYPE_CODE[query.dtype],
            _head_rows(query),
            _head_rows(key),
            _head_rows(value),
            _head_rows(output),
            lse.data_ptr(),
            importance.data_ptr(),
            torch.get_num_threads(),
        )
    return output, importance, lse


def _forward_fake(query, key, value, num_keyframe, keyframe_weight, scale):
    B, H, N, _ = query.shape
    dtype = _accumulation_dtype(query.dtype)
    importance = query.new_empty(B, N - num_keyframe, dtype=dtype)
    return _rows_first(query, N), importance, query.new_empty(2, B, H, N, dtype=dtype)


def _forward_topk_cpu(query, key, value, num_keyframe, num_select, keyframe_weight, scale):
    output, importance, lse = _forward_cpu(query, key, value, num_keyframe, keyframe_weight, scale)
    index = _select_native(importance, num_select)
    B, H, N, D = query.shape
    K = num_keyframe + num_select
    if output.numel() > 0:
        _backend.native.keep_rows(  # [B, N, H, D] in memory: the kept rows move to its front
            output.data_ptr(),
            B,
            N,
            H * D * output.element_size(),
            num_keyframe,
            index.data_ptr(),
            num_select,
            torch.get_num_threads(),
        )
    kept = output.as_strided_((B, H, K, D), rows_first_strides(K, H, D))
    return kept, importance, lse, index


def _forward_topk_fake(query, key, value, num_keyframe, num_select, keyframe_weight, scale):
    _, importance, lse = _forward_fake(query, key, value, num_keyframe, keyframe_weight, scale)
    index = query.new_empty(query.shape[0], num_select, dtype=torch.int64)
    return _rows_first(query, num_keyframe + num_select), importance, lse, index


def _backward_cpu(
    query, key, value, grad_output, grad_importance, lse, index, num_keyframe, keyframe_weight, scale
) -> tuple[Tensor, Tensor, Tensor]:
    N = query.shape[2]
    grads = _backward_fake(
        query, key, value, grad_output, grad_importance, lse, index, num_keyframe, keyframe_weight, scale
    )
    if query.numel() == 0:
        return grads
    query, key, value = _backend.rows(query), _backend.rows(key), _backend.rows(value)
    grad_output = None if grad_output is None else _backend.rows(grad_output)
    grad_importance = None if grad_importance is None else grad_importance.contiguous()
    lse = torch.add(lse[0], lse[1], alpha=abs(scale))
    _backend.native.keyframe_attention_backward(
        _sizes(query, num_keyframe),
        scale,
        keyframe_weight,
        _backend.DTYPE_CODE[query.dtype],
        _head_rows(query),
        _head_rows(key),
        _head_rows(value),
        _head_rows(grad_output),
        lse.data_ptr(),
        0 if grad_importance is None or num_keyframe == N else grad_importance.data_ptr(),
        0 if index is None else index.data_ptr(),
        N - num_keyframe if index is None else index.shape[1],
        *map(_head_rows, grads),
        torch.get_num_threads(),
    )
    return grads


def _backward_fake(query, key, value, grad_output, grad_importance, lse, index, num_keyframe, keyframe_weight, scale):
    return tuple(_rows_first(query, query.shape[2]) for _ in range(3))


def _setup_context(ctx, inputs, output):
    query, key, value, ctx.num_keyframe, *_, ctx.keyframe_weight, ctx.scale = inputs
    lse, *index = output[2:]
    ctx.mark_non_differentiable(lse, *index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, lse, *index)


def _backward(ctx, grad_output, grad_importance, *_):
    query, key, value, lse, *index = ctx.saved_tensors
    nones = (None,) * (3 + len(index))
    if grad_output is None and grad_importance is None:
        return (None, None, None, *nones)
    grads = _attention_backward(
        query,
        key,
        value,
        grad_output,
        grad_importance,
        lse,
        index[0] if index else None,
        ctx.num_keyframe,
        ctx.keyframe_weight,
        ctx.scale,
    )
    return (*grads, *nones)


_attention_backward = register(
    "keyframe_attention_backward(Tensor query, Tensor key, Tensor value, Tensor? grad_output, Tensor? grad_importance, "
    "Tensor lse, Tensor? index, SymInt num_keyframe, float keyframe_weight, float scale) -> (Tensor, Tensor, Tensor)",
    cpu=_backward_cpu,
    triton="keyframe_attention_triton.backward",
    fake=_backward_fake,
)
_attention = register(
    "keyframe_attention(Tensor query, Tensor key, Tensor value, SymInt num_keyframe, float keyframe_weight, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    cpu=_forward_cpu,
    triton="keyframe_attention_triton.forward",
    fake=_forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_attention_topk = register(
    "keyframe_attention_topk(Tensor query, Tensor key, Tensor value, SymInt num_keyframe, SymInt num_select, "
    "float keyframe_weight, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_forward_topk_cpu,
    triton="keyframe_attention_triton.forward_topk",
    fake=_forward_topk_fake,
    backward=_backward,
    setup_context=_setup_context,
)
