"""What every ``<op>_triton.py`` shares: how a kernel is launched, and how what ships is written down without a GPU.

Each of those modules exposes ``shipped(architecture)``: it runs the op's own Python on shapes without memory, and
``launch`` records instead of launching. So the kernels that tests/test_kernels_compile.py compiles are those that users
run, specialised as Triton does it at run time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _backend

INTERPRETED = tl.constexpr(_backend.INTERPRETED)


class Launch(NamedTuple):
    """A kernel and all that its machine code depends on beside the architecture."""

    kernel: triton.runtime.JITFunction
    signature: dict[str, Any]  # "*bf16", "i32", "constexpr", or a tuple of them; ":16" behind a multiple of 16
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool = False
    max_registers: int | None = None


class _Recording(NamedTuple):
    architecture: int
    launches: list[Launch]


_recording: _Recording | None = None


def launch(
    kernel: triton.runtime.JITFunction,
    programs: Sequence[int],
    where: Tensor,
    *arguments: object,
    num_warps: int = 4,
    num_stages: int = 1,
    fp_fusion: bool = False,
    max_registers: int | None = None,
    **constants: object,
) -> None:
    """Run ``kernel`` on ``where``'s device, on its current stream; nothing where ``programs`` has a zero.

    ``fp_fusion`` lets the compiler join a product and a sum: faster, and rounded otherwise than on the CPU. Without
    ``max_registers``, of a thread, ptxas may spill some to let one more program onto a multiprocessor.
    """
    if 0 in programs:
        return
    if _recording is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature, fixed = specialised(kernel, named)
        _recording.launches.append(Launch(kernel, signature, fixed, num_warps, num_stages, fp_fusion, max_registers))
        return
    options = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": fp_fusion,
        "maxnreg": max_registers,
    }
    with torch.cuda.device(where.device) if where.is_cuda else contextlib.nullcontext():
        kernel[tuple(programs)](*arguments, **options, **constants)


def architecture(where: Tensor) -> int:
    """90 for compute capability 9.0; 90 too where kernels are interpreted."""
    if _recording is not None:
        return _recording.architecture
    return _capability(where.device.index) if where.is_cuda else 90


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def recorded(architecture: int, function: Callable, *arguments: object) -> list[Launch]:
    """What ``function(*arguments)``, tensors on the meta device, would launch on ``architecture``."""
    global _recording
    _recording = _Recording(architecture, [])
    try:
        function(*arguments)
        return _recording.launches
    finally:
        _recording = None


TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def specialised(kernel: triton.runtime.JITFunction, named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Signature and constants as Triton makes them of a call: 1 is a constant, multiples of 16 are known as such."""
    signature, constants = {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, named[parameter.name]
        special = not parameter.do_not_specialize
        if isinstance(value, tuple) and not parameter.is_constexpr:
            signature[name] = tuple(_kind(element, True) for element in value)
        else:
            signature[name] = "constexpr" if parameter.is_constexpr else _kind(value, special)
        if signature[name] == "constexpr":
            constants[name] = value
    return signature, constants


def _kind(value: object, special: bool) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}:16"  # torch aligns memory to more than that
    if value is None or (special and type(value) is int and value == 1):
        return "constexpr"
    if type(value) is int:
        return ("i32" if -(2**31) <= value < 2**31 else "i64") + (":16" if special and value % 16 == 0 else "")
    return {bool: "u1", float: "fp32"}[type(value)]


def unspecialised(integers: Iterable[int]) -> tuple[int, ...]:
    """Integers of at least 0 for a kernel that reads them with ``plain``, compiled once for all their values.

    Of a tuple's elements Triton takes 1 for a constant and notes which are multiples of 16, whatever do_not_specialize
    says: these are odd, and 3 at least.
    """
    return tuple(2 * i + 3 for i in integers)


@triton.jit
def plain(x):
    """The integer that ``unspecialised`` was given."""
    return (x - 3) >> 1


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The least power of two that is at least ``size``, and 1."""
    return 1 << max(size - 1, 0).bit_length()


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the element's size, for kernels that copy."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def channels(tensor: Tensor, rows: int, num_warps: int = 4) -> int:
    """Channels of a tile of ``rows`` rows that gives a thread at most 128 bytes, without a remainder if it can be."""
    C = tensor.shape[-1]
    even = C & -C
    most = max(32 * num_warps * 128 // (rows * tensor.element_size()), 16)
    return min(even if even >= 64 else power_of_two(C), most)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, to nearest even: Triton's interpreter truncates where the result is bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
