"""Every op, forward and backward, as tests/test_gpu.py and compute-sanitizer run it.

python gpu_cases.py triton|cuda [OP ...]    ops (all) of a backend once on a GPU: hostile inputs, then forms that ship

A case's name is its op, or "op, what is special". tests/test_gpu_cases.py runs them without a GPU.
"""

import itertools
import math
import random
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import evad_kernels as ek
from evad_kernels import _backend
from evad_kernels.testing import layouts
from evad_kernels.token_selection import select_tokens_with_slots

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOXES = ("roi_align_3d", "roi_pool_3d", "pyramid_roi_align")  # ops that take boxes


class Case(NamedTuple):
    run: Callable[..., object]
    tensors: list[Tensor]  # on the CPU
    leaves: int  # how many of the first carry gradient


def op_of(name):
    return name.partition(",")[0]


class Draw:
    """Random tensors of one seed and type."""

    def __init__(self, dtype, seed=0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def heads(self, B, N, H, D):
        """Query, key and value as one projection leaves them."""
        return list(self.normal(3, B, N, H, D).transpose(2, 3).unbind())

    def some(self, B, count, of):
        """[B, count] different numbers below ``of``."""
        return torch.stack([torch.randperm(of, generator=self.generator)[:count] for _ in range(B)])

    def boxes(self, *shape, size=200):
        """Boxes [*shape, 4] that begin within ``size`` pixels and are no longer than that."""
        low, length = (torch.rand(*shape, 2, generator=self.generator) * size for _ in range(2))
        return torch.cat([low, low + length], -1)

    def rows(self, R, B, size=200):
        """Boxes [R, 5] of images in no order."""
        b = torch.randint(0, B, (R, 1), generator=self.generator).float()
        return torch.cat([b, self.boxes(R, size=size)], 1)


def scatter(tokens, position, fill, grid):
    if fill is None:
        return Case(lambda x, position: ek.scatter_tokens(x, position, grid=grid), [tokens, position], 1)
    return Case(
        lambda x, fill, position: ek.scatter_tokens(x, position, grid=grid, fill=fill), [tokens, fill, position], 2
    )


def gather(tokens, index, num_keyframe, leaves=1):
    return Case(lambda x, index: ek.gather_tokens(x, index, num_keyframe=num_keyframe), [tokens, index], leaves)


def roi(op, tokens, position, boxes, fill, grid, **options):
    """``boxes`` in any form."""
    parts = boxes if isinstance(boxes, list) else [boxes]

    def run(x, *others):
        background, position, *corners = others if fill is not None else (None, *others)
        form = corners if isinstance(boxes, list) else corners[0]
        return op(x, position, form, grid=grid, background=background, **options)

    tensors = [tokens, *([] if fill is None else [fill]), position, *parts]
    return Case(run, tensors, 1 if fill is None else 2)


def pyramid(levels, boxes, **options):
    parts = boxes if isinstance(boxes, list) else [boxes]
    return Case(
        lambda *x: ek.pyramid_roi_align(x[:4], list(x[4:]) if isinstance(boxes, list) else x[4], **options),
        [*levels, *parts],
        4,
    )


def cases(dtype=torch.bfloat16, B=2, N=1568, seed=0):
    """Name -> its case at the paper's first pruned layer, 8 slices of 14 rows; then other forms of boxes and fill."""
    draw = Draw(dtype, seed)
    grid = (8, 14, N // 112)
    num_keyframe, num_select = N // 8, int(0.7 * N) - N // 8
    some = {"num_keyframe": num_keyframe, "keyframe_weight": 4.0}
    qkv = draw.heads(B, N, 12, 64)
    importance = draw.normal(B, N - num_keyframe).float().softmax(1)
    index, position = draw.some(B, num_select, N - num_keyframe), draw.some(B, N // 3, N)
    kept, fill = draw.normal(B, N // 3, 384), draw.normal(N, 384)
    levels = [draw.normal(B, 256, 56 >> i, 56 >> i) for i in range(4)]
    boxes, rows, tubes = draw.boxes(B, 20), draw.rows(20 * B, B), draw.boxes(B, 20, 8)
    lists = [x[b:] for b, x in enumerate(draw.boxes(B, 20))]  # none as long as another
    roi_ops = {op: getattr(ek, op) for op in BOXES[:2]}
    return {
        "keyframe_attention": Case(lambda *qkv: ek.keyframe_attention(*qkv, **some), qkv, 3),
        "keyframe_attention_topk": Case(
            lambda *qkv: ek.keyframe_attention_topk(*qkv, num_select=num_select, **some), qkv, 3
        ),
        "select_tokens": Case(
            lambda x: (ek.select_tokens(x, num_select), *select_tokens_with_slots(x, num_select)), [importance], 0
        ),
        "gather_tokens": gather(draw.normal(B, N, 384), index, num_keyframe),
        "gather_tokens, positions": gather(torch.arange(N).repeat(B, 1), index, num_keyframe, 0),
        "scatter_tokens": scatter(kept, position, fill, grid),
        "scatter_tokens, one row fills": scatter(kept, position, fill[0], grid),
        "scatter_tokens, zeros fill": scatter(kept, position, None, grid),
        **{op: roi(f, kept, position, boxes, fill, grid) for op, f in roi_ops.items()},
        **{f"{op}, [R, 5]": roi(f, kept, position, rows, fill[0], grid) for op, f in roi_ops.items()},
        **{f"{op}, list": roi(f, kept, position, lists, None, grid) for op, f in roi_ops.items()},
        **{f"{op}, tubes": roi(f, kept, position, tubes, fill, grid) for op, f in roi_ops.items()},
        "pyramid_roi_align": pyramid(levels, boxes),
        "pyramid_roi_align, [R, 5]": pyramid(levels, rows),
        "pyramid_roi_align, list": pyramid(levels, lists),
    }


HOSTILE_BOXES = [
    [math.nan, 0, 40, 40],
    [40, 0, 0, 40],
    [-math.inf, -math.inf, math.inf, math.inf],
    [3.4e38, 3.4e38, 3.4e38, 3.4e38],
    [-1e30, -1e30, 1e30, 1e30],
    [30, 17.25, 30, 17.25],
    [10, 11, 60, 47],
]


def hostile(dtype):
    """Op -> its case with indices, positions and boxes outside, repeated or meaningless, and odd sizes."""
    draw = Draw(dtype)
    far = torch.tensor([-1, 0, 5, -1, 5, 41, -1, 42, 2**31, -(2**31), 2**63 - 1, -(2**63), 7])
    outside = torch.stack([far, far.flip(0)])
    boxes = torch.tensor(HOSTILE_BOXES).expand(2, 7, 4)
    of_no_image = torch.tensor([-1.0, 0, 1, 2, math.nan, math.inf, 1])[:, None]
    rows = torch.cat([of_no_image, boxes[0].flip(0)], 1)
    qkv = draw.heads(2, 67, 3, 40)
    ties = torch.randint(0, 3, (2, 67), generator=draw.generator).float()
    ties[0, ::5], ties[1, ::7] = math.nan, -math.inf
    kept, fill, grid = draw.normal(2, 13, 19), draw.normal(42, 19), (2, 3, 7)
    levels = [draw.normal(2, 5, max(11 >> i, 1), max(13 >> i, 1)) for i in range(4)]
    roi_ops = {op: getattr(ek, op) for op in BOXES[:2]}
    return {
        "keyframe_attention": Case(lambda *qkv: ek.keyframe_attention(*qkv, num_keyframe=9), qkv, 3),
        "keyframe_attention_topk": Case(
            lambda *qkv: ek.keyframe_attention_topk(*qkv, num_keyframe=9, num_select=20), qkv, 3
        ),
        # A row that fits a block's registers, and one that does not.
        "select_tokens": Case(
            lambda x: (ek.select_tokens(x, 31), *select_tokens_with_slots(x.repeat(1, 70), 2500)), [ties], 0
        ),
        "gather_tokens": gather(draw.normal(2, 45, 19), outside, 3),
        "scatter_tokens": scatter(kept, outside, fill, grid),
        **{op: roi(f, kept, outside, boxes, fill, grid) for op, f in roi_ops.items()},
        **{f"{op}, [R, 5]": roi(f, kept, outside, rows, fill[0], grid) for op, f in roi_ops.items()},
        "pyramid_roi_align": pyramid(levels, boxes),
        "pyramid_roi_align, [R, 5]": pyramid(levels, rows),
    }


# Of so many boxes two bins of some are equal but for rounding, and either may be the largest: it has the gradient.
NEARLY_EQUAL_BINS = ("roi_pool_3d, 8 frames", "roi_pool_3d, large frame", "roi_pool_3d, [R, 5]")


def forms(dtype):
    """Name -> a small case of a form that ships and that no hostile case takes."""
    draw = Draw(dtype)

    def attend(op, N, D=64, leave_out=0, **options):
        """``leave_out`` outputs of the last do not count: no gradient arrives through them."""
        options = {"num_keyframe": N // 8, "keyframe_weight": 4.0} | options
        qkv = draw.heads(1, N, 1, D)
        return Case(lambda *qkv: tuple(op(*qkv, **options))[: -leave_out or None], qkv, 3)

    def on_grid(op, grid, boxes, *, B=1, C=64, fill="cells", **options):
        cells = math.prod(grid)
        tokens, position = draw.normal(B, cells // 3 + 1, C), draw.some(B, cells // 3 + 1, cells)
        fill = {"cells": (cells, C), "row": (C,)}.get(fill)
        return roi(op, tokens, position, boxes, None if fill is None else draw.normal(*fill), grid, **options)

    align, pool = ek.roi_align_3d, ek.roi_pool_3d
    levels = [draw.normal(2, 64, 28 >> i, 36 >> i).contiguous(memory_format=torch.channels_last) for i in range(4)]
    lists = [draw.boxes(9), draw.boxes(0)]
    kept, position, fill, grid = draw.normal(2, 40, 64), draw.some(2, 40, 98), draw.normal(98, 64), (2, 7, 7)
    # Hundreds of boxes, for roi_pool_3d in CUDA: only then has a block several of them, so several warps (on an H100).
    return {
        # From 1024 keys on a probability is one number of 16 bits; 64 channels need no mask.
        "keyframe_attention, long": attend(ek.keyframe_attention, 1100),
        "keyframe_attention, plain": attend(ek.keyframe_attention, 200, num_keyframe=200),
        "keyframe_attention, wide": attend(ek.keyframe_attention, 150, 128),
        "keyframe_attention_topk, long": attend(ek.keyframe_attention_topk, 1100, num_select=600),
        "keyframe_attention_topk, output": attend(ek.keyframe_attention_topk, 200, num_select=90, leave_out=1),
        "select_tokens, 1372": Case(
            lambda x: select_tokens_with_slots(x, 902), [draw.normal(2, 1372).float().softmax(1)], 0
        ),
        "gather_tokens, 64 channels": gather(draw.normal(2, 100, 64), draw.some(2, 50, 88), 12),
        "gather_tokens, positions": gather(torch.arange(100).repeat(2, 1), draw.some(2, 50, 88), 12, 0),
        "scatter_tokens, 64 channels": scatter(kept, position, fill, grid),
        "scatter_tokens, one row fills": scatter(kept, position, fill[0], grid),
        "scatter_tokens, zeros fill": scatter(kept, position, None, grid),
        "roi_align_3d, 8 frames": on_grid(align, (8, 7, 9), draw.boxes(2, 5), B=2),
        "roi_align_3d, large frame": on_grid(align, (1, 36, 30), draw.boxes(1, 9, size=500)),
        "roi_align_3d, tubes": on_grid(align, (3, 6, 6), draw.boxes(2, 5, 3), B=2),
        "roi_align_3d, [R, 5]": on_grid(align, (2, 7, 7), draw.rows(9, 2), B=2, fill="row"),
        "roi_align_3d, list": on_grid(align, (2, 7, 7), lists, B=2, fill=None),
        "roi_pool_3d, 8 frames": on_grid(pool, (8, 14, 14), draw.boxes(2, 300), B=2),  # on chip: 4 frames of 8
        "roi_pool_3d, large frame": on_grid(pool, (2, 36, 30), draw.boxes(1, 300, size=500)),  # one
        "roi_pool_3d, too large a frame": on_grid(pool, (1, 45, 40), draw.boxes(1, 300, size=500)),  # none
        "roi_pool_3d, tubes": on_grid(pool, (4, 6, 6), draw.boxes(2, 300, 4), B=2),
        "roi_pool_3d, [R, 5]": on_grid(pool, (2, 7, 7), draw.rows(600, 2), B=2, fill="row"),  # two
        "roi_pool_3d, list": on_grid(pool, (2, 7, 7), lists, B=2, fill=None),
        "roi_pool_3d, 300 bins": on_grid(pool, (2, 7, 7), draw.boxes(2, 5), B=2, output_size=(15, 20)),  # not bytes
        "pyramid_roi_align, channels last": pyramid(levels, draw.boxes(2, 9)),
        "pyramid_roi_align, [R, 5]": pyramid(levels, draw.rows(9, 2)),
        "pyramid_roi_align, list": pyramid([x.contiguous() for x in levels], lists),
    }


def chance(op, seed):
    """A RoI op's case of any sizes, form of boxes, fill and layout, with hostile boxes among the others."""
    choose, draw = random.Random(seed), Draw(torch.float32, seed)
    B, n, T = choose.randint(1, 3), choose.randint(1, 12), choose.randint(1, 6)
    forms = ["boxes", "rows", "list"] + ["tubes"] * (op != "pyramid_roi_align")
    form = choose.choice(forms)
    boxes = draw.boxes(*((B, n, T) if form == "tubes" else (B, n)), size=300) - 60
    flat = boxes.view(-1, 4)
    for i in range(0, flat.shape[0], 3):
        flat[i] = torch.tensor(choose.choice(HOSTILE_BOXES))
    if form == "rows":
        boxes = torch.cat([torch.randint(0, B, (B * n, 1), generator=draw.generator), flat], 1)
    elif form == "list":
        boxes = [x[: choose.randint(0, n)] for x in boxes]
    options = {"output_size": (choose.randint(1, 9), choose.randint(1, 9)), "sampling_ratio": choose.randint(1, 3)}
    C = choose.choice([choose.randint(1, 140), 64, 128])
    if op == "pyramid_roi_align":
        levels = [draw.normal(B, C, choose.randint(1, 30), choose.randint(1, 30)) for _ in range(4)]
        return pyramid([choose.choice([x for _, x in layouts(level)]) for level in levels], boxes, **options)
    grid = T, choose.randint(1, 40), choose.randint(1, 50)
    cells = math.prod(grid)
    K = choose.randint(0, cells)
    fill = choose.choice([None, draw.normal(C), draw.normal(cells, C)])
    options |= {"aligned": choose.random() < 0.5, "spatial_scale": choose.choice([1 / 16, 1 / 7, 0.3])}
    return roi(getattr(ek, op), draw.normal(B, K, C), draw.some(B, K, cells), boxes, fill, grid, **options)


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


def main(backend, *words):
    """Runs a backend's cases, all or those of the ops and dtypes named ("bfloat16")."""
    failed = 0
    dtypes = [dtype for dtype in DTYPES if str(dtype).removeprefix("torch.") in words] or DTYPES
    for op in [word for word in words if word in _backend.IMPLEMENTED] or _backend.IMPLEMENTED:
        if (reason := _backend.unavailable(op, backend)) is not None:
            print(f"{op}: backend {backend}: {reason}", flush=True)
            failed += reason != _backend.NOT_IMPLEMENTED  # it should run, and does not
            continue
        for dtype, group in itertools.product(dtypes, (hostile, forms)):
            for name, case in group(dtype).items():
                if op_of(name) != op:
                    continue
                try:
                    with ek.use_backend(backend):
                        step(case, on(_backend.DEVICE[backend], case))
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                except Exception:
                    traceback.print_exc()
                    failed += 1
                    print(f"{name} {dtype} failed", flush=True)
                else:
                    print(f"{name} {dtype}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
