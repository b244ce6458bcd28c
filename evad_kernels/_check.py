"""One wording of errors: ``{op}: {argument} must be {expected}, got {actual}``."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

MAX_COUNT = 2**31 - 1  # kernels name tokens and cells by int32

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fail(op: str, argument: str, expected: str, actual: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise ``error`` in the one wording."""
    actual = describe(actual) if isinstance(actual, Tensor) else actual  # one element would print as a number
    raise error(f"{op}: {argument} must be {expected}, got {actual}")


def describe(tensor: object) -> str:
    """Shape and dtype of a tensor, or the type of anything else."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def tensor(op: str, argument: str, value: object, ndim: int | Sequence[int], layout: str) -> None:
    """``value`` is a tensor with one of the numbers of dimensions; ``layout`` is its shape in words, "[B, K, C]"."""
    if not isinstance(value, Tensor):
        fail(op, argument, f"a tensor {layout}", type(value).__name__, TypeError)
    if value.ndim not in ((ndim,) if isinstance(ndim, int) else ndim):
        fail(op, argument, layout, list(value.shape))


def floating(op: str, argument: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        fail(op, argument, "float32, float64, float16 or bfloat16", str(value.dtype).removeprefix("torch."), TypeError)


def int64(op: str, argument: str, value: Tensor) -> None:
    if value.dtype != torch.int64:
        fail(op, argument, "int64", str(value.dtype).removeprefix("torch."), TypeError)


def same_dtype(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        expected = f"of the dtype of {other} ({str(like.dtype).removeprefix('torch.')})"
        fail(op, argument, expected, str(value.dtype).removeprefix("torch."), TypeError)


def same_device(op: str, argument: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.device != like.device:
        fail(op, argument, f"on the device of {other} ({like.device})", value.device, RuntimeError)


def countable(op: str, argument: str, size: int, meaning: str) -> None:
    """``size`` fits int32; ``meaning`` is the layout in words, "[B, K, C] with K"."""
    if size > MAX_COUNT:
        fail(op, argument, f"{meaning} below 2**31", size)


def grid(op: str, value: Sequence[int]) -> tuple[int, int, int]:
    """``(T, Gh, Gw)``, all at least 1, below 2**31 cells."""
    if not isinstance(value, (list, tuple)):
        fail(op, "grid", "three integers (T, Gh, Gw)", type(value).__name__, TypeError)
    sizes = tuple(as_integer(size) for size in value)
    if len(sizes) != 3 or any(size is None for size in sizes):
        fail(op, "grid", "three integers (T, Gh, Gw)", value)
    if min(sizes) < 1:
        fail(op, "grid", "at least 1 in every dimension", sizes)
    if sizes[0] * sizes[1] * sizes[2] > MAX_COUNT:
        fail(op, "grid", "of fewer than 2**31 cells", sizes)
    return sizes


def as_integer(value: object) -> int | torch.SymInt | None:
    """``value`` as an integer, NumPy's too; None if it is none, as True is none."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    return int(value) if isinstance(value, numbers.Integral) else None


def number(op: str, argument: str, value: float) -> float:
    """``value`` as a Python number, also of NumPy's; no tensor: its gradient would be lost in silence."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        return value
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    fail(op, argument, "a number", type(value).__name__, TypeError)


def integer(op: str, argument: str, value: int, high: int, name: str) -> int:
    """``value`` as an integer in [0, high]; ``name`` says what ``high`` is, "M"."""
    # The range is put in words only on failure: formatting a symbolic size would fix it under torch.compile.
    count = value if type(value) is int else as_integer(value)  # on the path of every call
    if count is None:
        fail(op, argument, f"an integer in [0, {name} = {high}]", type(value).__name__, TypeError)
    if not 0 <= count <= high:
        fail(op, argument, f"in [0, {name} = {high}]", count)
    return count
