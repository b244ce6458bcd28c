"""Registers an op with torch.library: schema, kernels, fake, autograd.

The dispatcher sees one op for all compiled backends (torch.compile treats it as opaque); where two serve one device,
the backend in force is asked for at each call. The reference is plain PyTorch and never goes through it.
``Library.define`` rather than ``custom_op``: 2 microseconds a call instead of 9.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from . import _backend

_library = torch.library.Library("evad_kernels", "DEF")


def register(
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    triton: str | None = None,
    cuda: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    differentiable: bool = True,
) -> torch._ops.OpOverload:
    """Define ``evad_kernels::<schema>`` and return its overload.

    Args:
        schema: Name and signature in torch.library's language; the name begins with that of the public op. Tensors that
            carry gradient are positional.
        cpu: The C++ kernel for CPU tensors.
        fake: Output shapes and strides from input shapes.
        triton: "module.function" of the Triton kernel, imported at its first call: importing Triton takes a second.
        cuda: The CUDA C++ kernel.
        backward: ``(ctx, *grad_outputs) -> grad of every input``. None: differentiating the op raises, so a second
            backward never gives silent zeros.
        setup_context: ``(ctx, inputs, output)``, what ``backward`` needs.
        differentiable: False for an op of integer results: it skips autograd, which costs 10 microseconds a call.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = {"cpu": cpu, "triton": None if triton is None else _on_first_call(triton), "cuda": cuda}
    for device in ("cpu", "cuda"):
        served = {b: kernel for b, kernel in kernels.items() if kernel is not None and _backend.DEVICE[b] == device}
        if served:
            _library.impl(name, _choosing(name, served, differentiable), device.upper())
    qualified = f"evad_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)

    if not differentiable:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return getattr(torch.ops.evad_kernels, name).default

    def raise_on_backward(ctx, *_):
        raise RuntimeError(f"{name}: the gradient is not differentiable (the op is once differentiable)")

    torch.library.register_autograd(qualified, backward or raise_on_backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.evad_kernels, name).default


def _on_first_call(path: str) -> Callable:
    """The function at "module.function" of this package, whose module is imported when it is first called."""
    module, function = path.split(".")
    found = None

    def call(*args):
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f".{module}", __package__), function)
        return found(*args)

    return call


def _choosing(name: str, kernels: dict[str, Callable], differentiable: bool) -> Callable:
    """A kernel that runs the backend in force, or raises where there is none.

    A backward may run, and a compiled graph or an exported program be called, where another backend is asked for, where
    the backend it was made with is missing, or in forward-mode AD.
    """
    op = max((op for op in _backend.IMPLEMENTED if name.startswith(op)), key=len)

    def in_force(args):
        return _backend.in_force(op, kernels, args[0] if isinstance(args[0], torch.Tensor) else args[0][0])

    def chosen(*args):
        return kernels[in_force(args)](*args)

    (only, kernel), *others = kernels.items()
    if others or _backend.MISSING[only] is not None:
        kernel = chosen

    def call(*args):
        if forward_ad._current_level >= 0:
            raise RuntimeError(_backend.refused(op, in_force(args), "forward-mode AD is for reference"))
        return kernel(*args)

    return call if differentiable else kernel
