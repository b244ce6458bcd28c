"""What tests, benchmarks and users share to check a kernel: the rule of accuracy, layouts, registration.

The rule: err(kernel) <= 2 * err(reference in that dtype) + tiny, both against fp64 truth on the same rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def assert_accurate(actual: Tensor, reference: Tensor, truth: Tensor, *, label: str) -> None:
    """Hold ``actual`` to the rule of accuracy.

    Args:
        actual: The kernel's result.
        reference: The reference's result in the kernel's dtype, same shape.
        truth: The reference's result in float64 from the same (rounded) inputs.
        label: What is compared ("grad_query"); begins the message.
    Raises:
        AssertionError: shapes or dtypes differ, NaN or infinity stand in other places, or the error is larger than
            twice the reference's plus tiny: four float32 roundings of the largest true value (float64, where the
            reference is the truth: 1e-12 of it).
    """
    assert actual.shape == truth.shape, f"{label}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == reference.dtype, f"{label}: dtype {actual.dtype}, expected {reference.dtype}"
    if truth.numel() == 0:
        return
    roundings = 1e-12 if actual.dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    actual, reference, truth = (x.detach().double() for x in (actual, reference, truth))
    finite = truth.isfinite()
    torch.testing.assert_close(
        actual.isfinite(), finite & reference.isfinite(), msg=lambda m: f"{label}: NaN or infinity elsewhere. {m}"
    )
    finite = finite & reference.isfinite()
    if not finite.any():
        return
    error = (actual - truth)[finite].abs().max().item()
    reference_error = (reference - truth)[finite].abs().max().item()
    tiny = roundings * truth[finite].abs().max().item()
    assert error <= 2 * reference_error + tiny, (
        f"{label}: error {error:.3e}, allowed 2 x {reference_error:.3e} (reference) + {tiny:.1e}"
    )


def gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    seed: int = 0,
    rounding: torch.dtype = torch.float64,
):
    """Outputs of ``function(*inputs)`` and the gradients of its floating-point inputs for random output gradients.

    Output gradients are drawn in float64 from ``seed`` and rounded to the outputs' dtype, before that to ``rounding``:
    the truth for kernels in float16 gets the gradients that they get.
    """
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    generator = torch.Generator().manual_seed(seed)
    differentiable = [output for output in outputs if output.requires_grad]
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64, device="cpu") for o in differentiable]
    grad_outputs = [g.to(rounding).to(o.device, o.dtype) for g, o in zip(drawn, differentiable, strict=True)]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return outputs, torch.autograd.grad(differentiable, wanted, grad_outputs, materialize_grads=True)


def on_default_device(value: object) -> object:
    """CPU tensors (one or a list) on the default device, expanded dimensions still expanded; anything else as it is."""
    if isinstance(value, list):
        return [on_default_device(x) for x in value]
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return value
    memory = value[tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())]
    return memory.to(torch.get_default_device()).expand(value.shape)


def layouts(tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
    """The same values in other memory layouts, named.

    Contiguous; every dimension strided; the last two transposed; rows (the last dimension) contiguous but apart, as in
    a slice of channels or with a token left out, once aligned to 16 bytes and once to an element.
    """
    yield "contiguous", tensor.contiguous()
    padded = tensor.new_empty([2 * size + 1 for size in tensor.shape])
    strided = padded[tuple(slice(1, None, 2) for _ in tensor.shape)]
    strided.copy_(tensor)
    yield "strided", strided
    if tensor.ndim >= 2:
        yield "transposed", tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        *outer, width = tensor.shape
        for name, offset in (("rows apart", 0), ("rows apart, not aligned", 1)):
            padded = tensor.new_empty([2 * size + 1 for size in outer] + [width // 16 * 16 + 32])
            rows = padded[tuple(slice(1, None, 2) for _ in outer)][..., offset : offset + width]
            rows.copy_(tensor)
            yield name, rows


def assert_registered(op: torch._ops.OpOverload, *args: object) -> None:
    """torch.library.opcheck: schema, fake tensors, autograd, AOT dispatch with dynamic shapes."""
    torch.library.opcheck(op, args)
