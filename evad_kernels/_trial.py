"""A trial of a GPU's kernels on the GPU itself, before ``auto`` takes them.

Without a GPU they are compiled, interpreted and emulated, which does not show what a GPU makes of them. So where
``auto`` would first take such kernels (``_backend.ON_TRIAL``) on a device and dtype, a small case runs, forward and
backward, and is compared with the reference on the CPU: its error against float64 is at most twice the reference's and
``TINY``. It waits for the device, and takes as long as Triton compiles, which at the first call it would anyway.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .testing import DTYPES

TINY = 1e-5  # of the largest value: this looks for what is broken, tests/ for what is less accurate than it should be


class Case(NamedTuple):
    """An op's call: ``call(op, *tensors)`` runs the op or its reference."""

    tensors: list[Tensor]  # on the CPU; the first of them are leaves
    leaves: int
    call: Callable[..., Tensor | tuple[Tensor, ...]]


def case(op: str, dtype: torch.dtype) -> Case:
    """A case that takes the op's kernels through whole tiles and the rest of one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    def some(B: int, count: int, of: int) -> Tensor:
        return torch.stack([torch.randperm(of, generator=generator, device="cpu")[:count] for _ in range(B)])

    if op.startswith("keyframe_attention"):
        B, H, N, D, num_keyframe = 2, 2, 150, 64, 19
        qkv = list(normal(3, B, N, H, D).transpose(2, 3).unbind())
        options = {"num_keyframe": num_keyframe, "keyframe_weight": 4.0}
        if op == "keyframe_attention":
            return Case(qkv, 3, lambda attend, *qkv: attend(*qkv, **options))
        reference = _reference("keyframe_attention")
        importance = reference(*(x.double() for x in qkv), **options).importance.sort(dim=1, descending=True).values
        gap = (importance[:, :-1] - importance[:, 1:]).amin(dim=0)  # the choice must not hang on a rounding
        options["num_select"] = int(gap[40:100].argmax()) + 41
        return Case(qkv, 3, lambda attend, *qkv: attend(*qkv, **options))
    if op == "select_tokens":
        return Case([normal(3, 700)], 0, lambda select, importance: select(importance, 333))
    if op == "gather_tokens":
        tensors = [normal(2, 100, 72), some(2, 50, 88)]
        return Case(tensors, 1, lambda gather, tokens, index: gather(tokens, index, num_keyframe=12))
    grid = (2, 7, 9)
    cells = math.prod(grid)
    # Inside the frame: beyond its edge bins are equal but for rounding, and either may be the largest.
    corner, side = 50 * torch.rand(2, 2, 3, 2, generator=generator, dtype=torch.float32, device="cpu")
    boxes = torch.cat([corner, corner + side + 10], dim=-1)
    if op == "pyramid_roi_align":
        levels = [normal(2, 72, 28 >> i, 36 >> i) for i in range(4)]
        boxes = boxes * torch.tensor([0.5, 1.0, 2.0], device="cpu")[:, None]  # some of each level
        return Case([*levels, boxes], 4, lambda align, *x: align(x[:4], x[4], canonical_size=32.0))
    tokens, position, fill = normal(2, 80, 72), some(2, 80, cells), normal(cells, 72)
    if op == "scatter_tokens":
        tensors = [tokens, fill, position]
        return Case(tensors, 2, lambda scatter, x, fill, position: scatter(x, position, grid=grid, fill=fill))
    return Case(
        [tokens, fill, position, boxes],
        2,
        lambda pool, x, fill, position, boxes: pool(x, position, boxes, grid=grid, background=fill),
    )


def failure(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with ``op`` as it now runs on ``device``, or None. Waits for the device."""
    tensors, leaves, run = case(op, dtype)
    leaves = leaves if dtype in DTYPES else 0
    wide = [x.double() if dtype in DTYPES and x.dtype == dtype else x for x in tensors]
    plain = _step(run, _reference(op), tensors, leaves, dtype)
    truth = _step(run, _reference(op), wide, leaves, dtype)
    call = getattr(importlib.import_module(__package__), op)
    actual = _step(run, call, [x.to(device) for x in tensors], leaves, dtype)
    for number, (a, p, t) in enumerate(zip(actual, plain, truth, strict=True)):
        if a.shape != p.shape or a.dtype != p.dtype:
            return f"result {number}: {list(a.shape)} {a.dtype}, expected {list(p.shape)} {p.dtype}"
        if a.dtype not in DTYPES:
            if not torch.equal(a.cpu(), t):
                return f"result {number} differs"
            continue
        error, plain_error = ((x.detach().double().cpu() - t.detach()).abs().max().item() for x in (a, p))
        allowed = 2 * plain_error + TINY * t.abs().max().item()
        if not error <= allowed:
            return f"result {number}: error {error:.3e}, allowed {allowed:.3e}"
    return None


def _reference(op: str) -> Callable:
    names = {"keyframe_attention_topk": "keyframe_attention", "roi_pool_3d": "roi_align_3d"}
    names |= {"select_tokens": "token_selection", "gather_tokens": "token_selection"}
    module = importlib.import_module(f".{names.get(op, op)}", __package__)
    return getattr(module, f"{op}_reference")


def _step(run: Callable, op: Callable, tensors: list[Tensor], leaves: int, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients of the leaves for fixed gradients of the outputs, rounded to ``dtype``."""
    tensors = [x.detach().requires_grad_(i < leaves) for i, x in enumerate(tensors)]
    outputs = run(op, *tensors)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in outputs if x.requires_grad]
    if not wanted:
        return outputs
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype).to(x) for x in wanted
    ]
    return [*outputs, *torch.autograd.grad(wanted, tensors[:leaves], grads)]
