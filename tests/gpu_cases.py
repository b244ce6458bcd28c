"""Every op, forward and backward, as tests/test_gpu.py and compute-sanitizer run it.

python gpu_cases.py triton|cuda [OP ...]    ops (all) of a backend once on a GPU, with hostile inputs of odd sizes
"""

import math
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import evad_kernels as ek
from evad_kernels import _backend
from evad_kernels.token_selection import select_tokens_with_slots


class Case(NamedTuple):
    run: Callable[..., object]
    tensors: list[Tensor]  # on the CPU
    leaves: int  # how many of the first carry gradient


def cases(dtype=torch.bfloat16, B=2, N=1568, seed=0):
    """Op -> its case at the paper's first pruned layer, 8 slices of 14 rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    grid = (8, 14, N // 112)
    num_keyframe, num_select = N // 8, int(0.7 * N) - N // 8
    some = {"num_keyframe": num_keyframe, "keyframe_weight": 4.0}
    qkv = list(normal(3, B, N, 12, 64).transpose(2, 3).unbind())
    importance = normal(B, N - num_keyframe).float().softmax(1)
    index = torch.stack([torch.randperm(N - num_keyframe, generator=generator)[:num_select] for _ in range(B)])
    position = torch.stack([torch.randperm(N, generator=generator)[: N // 3] for _ in range(B)])
    low = torch.rand(B, 20, 2, generator=generator) * 200
    boxes = torch.cat([low, low + torch.rand(B, 20, 2, generator=generator) * 200], 2)
    kept, fill = normal(B, N // 3, 384), normal(N, 384)
    levels = [normal(B, 256, 56 >> i, 56 >> i) for i in range(4)]
    return {
        "keyframe_attention": Case(lambda *qkv: ek.keyframe_attention(*qkv, **some), qkv, 3),
        "keyframe_attention_topk": Case(
            lambda *qkv: ek.keyframe_attention_topk(*qkv, num_select=num_select, **some), qkv, 3
        ),
        "select_tokens": Case(
            lambda x: (ek.select_tokens(x, num_select), *select_tokens_with_slots(x, num_select)), [importance], 0
        ),
        "gather_tokens": Case(
            lambda x, index: ek.gather_tokens(x, index, num_keyframe=num_keyframe), [normal(B, N, 384), index], 1
        ),
        "scatter_tokens": Case(
            lambda x, fill, position: ek.scatter_tokens(x, position, grid=grid, fill=fill), [kept, fill, position], 2
        ),
        **{
            name: Case(
                lambda x, fill, position, boxes, op=op: op(x, position, boxes, grid=grid, background=fill),
                [kept, fill, position, boxes],
                2,
            )
            for name, op in (("roi_align_3d", ek.roi_align_3d), ("roi_pool_3d", ek.roi_pool_3d))
        },
        "pyramid_roi_align": Case(lambda *x: ek.pyramid_roi_align(x[:4], x[4]), [*levels, boxes], 4),
    }


def hostile(dtype):
    """Op -> its case with indices, positions and boxes outside, repeated or meaningless, and odd sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    far = torch.tensor([-1, 0, 5, 5, 41, 42, 2**31, -(2**31), 2**63 - 1, -(2**63), 7])
    outside = torch.stack([far, far.flip(0)])
    boxes = torch.tensor(
        [
            [math.nan, 0, 40, 40],
            [40, 0, 0, 40],
            [-math.inf, -math.inf, math.inf, math.inf],
            [3.4e38, 3.4e38, 3.4e38, 3.4e38],
            [-1e30, -1e30, 1e30, 1e30],
            [30, 17.25, 30, 17.25],
            [10, 11, 60, 47],
        ]
    ).expand(2, 7, 4)
    qkv = list(normal(3, 2, 67, 3, 40).transpose(2, 3).unbind())
    ties = torch.randint(0, 3, (2, 67), generator=generator).float()
    ties[0, ::5], ties[1, ::7] = math.nan, -math.inf
    kept, fill, grid = normal(2, 11, 19), normal(42, 19), (2, 3, 7)
    levels = [normal(2, 5, max(11 >> i, 1), max(13 >> i, 1)) for i in range(4)]
    return {
        "keyframe_attention": Case(lambda *qkv: ek.keyframe_attention(*qkv, num_keyframe=9), qkv, 3),
        "keyframe_attention_topk": Case(
            lambda *qkv: ek.keyframe_attention_topk(*qkv, num_keyframe=9, num_select=20), qkv, 3
        ),
        # A row that fits a block's registers, and one that does not.
        "select_tokens": Case(
            lambda x: (ek.select_tokens(x, 31), *select_tokens_with_slots(x.repeat(1, 70), 2500)), [ties], 0
        ),
        "gather_tokens": Case(
            lambda x, index: ek.gather_tokens(x, index, num_keyframe=3), [normal(2, 45, 19), outside], 1
        ),
        "scatter_tokens": Case(
            lambda x, fill, position: ek.scatter_tokens(x, position, grid=grid, fill=fill), [kept, fill, outside], 2
        ),
        **{
            name: Case(
                lambda x, fill, position, boxes, op=op: op(x, position, boxes, grid=grid, background=fill),
                [kept, fill, outside, boxes],
                2,
            )
            for name, op in (("roi_align_3d", ek.roi_align_3d), ("roi_pool_3d", ek.roi_pool_3d))
        },
        "pyramid_roi_align": Case(lambda *x: ek.pyramid_roi_align(x[:4], x[4]), [*levels, boxes], 4),
    }


def on(device, case):
    """The case's tensors there, the first of them leaves."""
    tensors = [x.to(device) for x in case.tensors]
    return [x.requires_grad_() if i < case.leaves else x for i, x in enumerate(tensors)]


def grad_outputs(outputs):
    """A fixed gradient for each output that carries one."""
    return [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x) for i, x in enumerate(carrying(outputs))
    ]


def carrying(outputs):
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [x for x in outputs if x.requires_grad]


def step(case, tensors, grads=None):
    """Outputs, then gradients of the leaves."""
    outputs = case.run(*tensors)
    wanted = carrying(outputs)
    found = torch.autograd.grad(wanted, tensors[: case.leaves], grads or grad_outputs(wanted)) if wanted else ()
    return [*([outputs] if isinstance(outputs, Tensor) else outputs), *found]


def main(backend, *ops):
    failed = 0
    for op in ops or _backend.IMPLEMENTED:
        if (reason := _backend.unavailable(op, backend)) is not None:
            print(f"{op}: backend {backend}: {reason}", flush=True)
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = hostile(dtype)[op]
            try:
                with ek.use_backend(backend):
                    step(case, on(_backend.DEVICE[backend], case))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            except Exception:
                traceback.print_exc()
                failed += 1
                print(f"{op} {dtype} failed", flush=True)
            else:
                print(f"{op} {dtype}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
