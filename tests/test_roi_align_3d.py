import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from evad_kernels import _backend, roi_align_3d, roi_pool_3d, use_backend
from evad_kernels.testing import DTYPES, assert_accurate, assert_registered, gradients, layouts, on_default_device

GOLDEN = Path(__file__).parent / "golden" / "op_roi_and_boxes.npz"

# name: (B, K, C, grid, n, options)
CASES = {
    "odd": (2, 37, 19, (3, 5, 7), 5, {}),
    "one cell": (1, 1, 1, (1, 1, 1), 3, {}),
    "all kept": (2, 24, 8, (2, 3, 4), 4, {}),
    "tubes": (2, 40, 21, (4, 5, 6), 3, {}),
    "not aligned": (1, 40, 67, (3, 6, 7), 7, {"aligned": False}),
    "one sample": (1, 30, 33, (2, 6, 7), 4, {"sampling_ratio": 1, "output_size": (3, 5)}),
    "many samples": (1, 50, 16, (2, 9, 8), 4, {"sampling_ratio": 5, "output_size": (2, 1), "spatial_scale": 0.1}),
    "many bins": (1, 20, 5, (2, 4, 5), 3, {"output_size": (17, 19)}),
    "paper 224": (1, 539, 384, (8, 14, 14), 12, {}),
    "five frames": (2, 40, 5, (5, 3, 4), 2, {"output_size": (3, 2)}),
    "long bins": (1, 90, 3, (1, 12, 13), 2, {"output_size": 2}),
    "nine columns": (1, 20, 3, (2, 3, 5), 2, {"output_size": (2, 9), "sampling_ratio": 3, "aligned": False}),
    "few tubes": (1, 20, 3, (3, 3, 4), 2, {"output_size": 3}),
}
INTERPRETED = ["five frames", "long bins", "nine columns", "few tubes"]  # what an interpreter can do in a moment
SMALL = [name for name in CASES if name != "paper 224"]
KERNELS = pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"], indirect=True)
POOL = pytest.mark.ops("roi_pool_3d")
OPS = {"roi_align_3d": roi_align_3d, "roi_pool_3d": roi_pool_3d}


def interpreted(backend):
    return backend == "triton" and _backend.INTERPRETED


def make(case, dtype=torch.float32, background="cells", seed=0):
    """Inputs, and the keyword arguments beside `background`; the same on every device."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        tokens, position, boxes, fill, options = _make(case, dtype, background, seed)
    fill = None if fill is None else fill.to(device)
    return tokens.to(device), position.to(device), boxes.to(device), fill, options


def _make(case, dtype, background, seed):
    B, K, C, grid, n, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    T, Gh, Gw = grid
    cells = T * Gh * Gw
    tokens = torch.randn(B, K, C, generator=generator, dtype=torch.float64).to(dtype)
    position = torch.stack([torch.randperm(cells, generator=generator)[:K] for _ in range(B)])
    shape = (B, n, T, 4) if "tubes" in case else (B, n, 4)
    boxes = torch.rand(shape, generator=generator)
    size = torch.tensor([Gw, Gh]) / options.get("spatial_scale", 1 / 16)
    low = (boxes[..., :2] * 1.4 - 0.3) * size  # some begin outside
    boxes = torch.cat([low, low + boxes[..., 2:] * size], -1)
    shape = {"none": None, "row": (C,), "cells": (cells, C)}[background]
    fill = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return tokens, position, boxes, fill, {"grid": grid, **options}


def expected(tokens, position, boxes, background, *, grid, **options):
    """Samples [R, C, T, oh, ow] in float64, sample by sample: four neighbours, written without separable weights."""
    options = {"output_size": 7, "spatial_scale": 1 / 16, "sampling_ratio": 2, "aligned": True, **options}
    oh, ow = options["output_size"] if isinstance(options["output_size"], tuple) else (options["output_size"],) * 2
    samples, scale = options["sampling_ratio"], options["spatial_scale"]
    offset = 0.5 if options["aligned"] else 0.0
    B, _, C = tokens.shape
    T, Gh, Gw = grid
    cells = T * Gh * Gw
    blank = torch.zeros(cells, C) if background is None else background.expand(cells, C)
    dense = blank.double().repeat(B, 1, 1)
    for b in range(B):
        dense[b, position[b]] = tokens[b].double()
    dense = dense.view(B, T, Gh, Gw, C)
    n = boxes.shape[1]
    result = torch.zeros(B * n, C, T, oh, ow, dtype=torch.float64)
    for r in range(B * n):
        for t in range(T):
            box = boxes[r // n, r % n] if boxes.ndim == 3 else boxes[r // n, r % n, t]
            x1, y1, x2, y2 = (value * scale - offset for value in box.double().tolist())
            if not (x2 >= x1 and y2 >= y1):
                continue
            width, height = x2 - x1, y2 - y1
            if not options["aligned"]:
                width, height = max(width, 1.0), max(height, 1.0)
            for p in range(oh):
                for q in range(ow):
                    total = torch.zeros(C, dtype=torch.float64)
                    for i in range(samples):
                        for j in range(samples):
                            y = y1 + height / oh * (p + (i + 0.5) / samples)
                            x = x1 + width / ow * (q + (j + 0.5) / samples)
                            if not (-1 <= y <= Gh and -1 <= x <= Gw):
                                continue
                            y, x = min(max(y, 0), Gh - 1), min(max(x, 0), Gw - 1)
                            top, left = math.floor(y), math.floor(x)
                            for row, of_row in ((top, 1 - (y - top)), (top + 1, y - top)):
                                for column, of_column in ((left, 1 - (x - left)), (left + 1, x - left)):
                                    if of_row * of_column > 0:
                                        total += of_row * of_column * dense[r // n, t, row, column]
                    result[r, :, t, p, q] = total / samples**2
    return result


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)  # those that compute in float64
@pytest.mark.parametrize("background", ["none", "row", "cells"])
@pytest.mark.parametrize("case", SMALL)
def test_matches_sample_by_sample(backend, case, background):
    tokens, position, boxes, fill, options = make(case, torch.float64, background)
    want = expected(tokens, position, boxes, fill, **options)
    samples = roi_align_3d(tokens, position, boxes, background=fill, **options)
    torch.testing.assert_close(samples, want, atol=1e-11, rtol=0)
    pooled = roi_pool_3d(tokens, position, boxes, background=fill, **options)
    torch.testing.assert_close(pooled, want.amax((-2, -1)).mean(-1), atol=1e-11, rtol=0)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(backend, op, case, dtype):
    if interpreted(backend):
        pytest.skip("backend triton: interpreted, test_gradient compares the results too")
    tokens, position, boxes, fill, options = make(case, dtype)

    def run(backend, x, fill, boxes):
        with use_backend(backend):
            return OPS[op](x, position, boxes, background=fill, **options)

    truth = run("reference", tokens.double(), fill.double(), boxes.double())
    assert_accurate(run(backend, tokens, fill, boxes), run("reference", tokens, fill, boxes), truth, label=op)


@KERNELS
@pytest.mark.parametrize("background", ["none", "row", "cells"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["odd", "tubes", "many bins", "paper 224", *INTERPRETED])
@pytest.mark.parametrize("op", OPS)
def test_gradient(backend, op, case, dtype, background):
    quick = (
        case in INTERPRETED
        and (dtype == torch.float32 or background == "row")
        and (case == "five frames" or (dtype, background) == (torch.float32, "cells"))
    )
    if interpreted(backend) and not quick:
        pytest.skip("backend triton: interpreted, smaller cases stand for it")
    tokens, position, boxes, fill, options = make(case, dtype, background)
    inputs = [tokens] if fill is None else [tokens, fill]

    def run(tokens, fill=None):
        at = boxes.to(torch.promote_types(tokens.dtype, torch.float32))
        return OPS[op](tokens, position, at, background=fill, **options)

    actual = gradients(run, inputs)
    with use_backend("reference"):
        reference = gradients(run, inputs)
        truth = gradients(run, [x.double() for x in inputs], rounding=dtype)
    labels = [op, "grad_tokens", "grad_background"]
    for label, *values in zip(
        labels, *((*outputs, *grads) for outputs, grads in (actual, reference, truth)), strict=False
    ):
        assert_accurate(*values, label=label)


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_golden(backend, case):
    if interpreted(backend):
        pytest.skip("backend triton: interpreted, smaller cases stand for it")
    golden = {key: torch.tensor(value) for key, value in np.load(GOLDEN).items() if key.startswith(case)}
    dense = golden[f"{case}/dense"]
    B, C, *grid = dense.shape
    tokens = dense.flatten(2).transpose(1, 2).contiguous().requires_grad_()
    position = torch.arange(tokens.shape[1]).expand(B, -1)
    boxes = golden[f"{case}/boxes"]
    samples = roi_align_3d(tokens, position, boxes, grid=tuple(grid))
    torch.testing.assert_close(samples, golden[f"{case}/roi_7x7"], atol=1e-6, rtol=0)
    pooled = roi_pool_3d(tokens, position, boxes, grid=tuple(grid)).view(B, -1, C)
    torch.testing.assert_close(pooled, golden[f"{case}/pooled"], atol=1e-6, rtol=0)
    (grad,) = torch.autograd.grad(pooled, tokens, golden[f"{case}/grad_coeff"])
    want = golden[f"{case}/grad_dense"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(grad, want, atol=1e-6, rtol=0)


def shuffled_rows(boxes):
    """[B, n, 4] as [R, 5] with the image first, and an order of the rows."""
    B, n, _ = boxes.shape
    rows = torch.cat([torch.arange(float(B)).repeat_interleave(n)[:, None], boxes.flatten(0, 1)], 1)
    order = torch.randperm(B * n, generator=torch.Generator().manual_seed(0), device="cpu")
    return rows, order.to(boxes.device)


@pytest.mark.parametrize("op", OPS)
def test_forms_of_boxes(backend, op):
    if interpreted(backend) and op == "roi_align_3d":
        pytest.skip("backend triton: interpreted, roi_pool_3d stands for it")
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "odd")
    want = OPS[op](tokens, position, boxes, background=fill, **options)
    rows, order = shuffled_rows(boxes)
    B, n, T = *boxes.shape[:2], options["grid"][0]
    tube = boxes[:, :, None].expand(B, n, T, 4)
    for name, form, rows_of_want in (
        ("list", list(boxes), want),
        ("uneven list", [boxes[0, :1], boxes[1]], want[[0, *range(n, 2 * n)]]),
        ("indexed", rows, want),
        ("indexed, shuffled", rows[order], want[order]),
        ("tube", tube, want),
        ("double", boxes.double(), want),
    ):
        got = OPS[op](tokens, position, form, background=fill, **options)
        assert got.dtype == want.dtype, name
        torch.testing.assert_close(got, rows_of_want, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@POOL
@KERNELS
def test_gradient_of_shuffled_boxes_goes_to_their_image(backend):
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "odd")
    rows, order = shuffled_rows(boxes)
    grads = {}
    for name in ("reference", backend):
        with use_backend(name):
            grads[name] = gradients(
                lambda x, f: roi_pool_3d(x, position, rows[order], background=f, **options), [tokens, fill]
            )[1]
    for actual, want in zip(grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(actual, want, atol=1e-6, rtol=1e-5)


@POOL
def test_strides(backend):
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "odd")
    want = roi_pool_3d(tokens, position, boxes, background=fill, **options)
    for argument, tensor in (("tokens", tokens), ("position", position), ("boxes", boxes), ("background", fill)):
        for name, strided in layouts(tensor):
            inputs = {"tokens": tokens, "position": position, "boxes": boxes, "background": fill, argument: strided}
            assert torch.equal(roi_pool_3d(**inputs, **options), want), f"{argument} {name}"


def test_registration():
    tokens, position, boxes, fill, options = make("odd")
    sampling = (list(options["grid"]), [7, 7], 1 / 16, 2, True)
    corners, batch = boxes.flatten(0, 1), torch.arange(2).repeat_interleave(5)
    for blank in (None, fill, fill[0]):
        for name in ("roi_align_3d", "roi_pool_3d"):
            blank = None if blank is None else blank.detach().clone().requires_grad_()
            leaf = tokens.clone().requires_grad_()
            for index in (None, batch):
                op = getattr(torch.ops.evad_kernels, name).default
                flag = (True,) if name == "roi_pool_3d" else ()
                assert_registered(op, leaf, blank, position, corners, index, *sampling, *flag)
    op = torch.ops.evad_kernels.roi_pool_3d.default
    assert_registered(op, tokens, None, position, corners, batch, *sampling, False)
    with pytest.raises(RuntimeError, match="save_largest must be true"):
        op(tokens.clone().requires_grad_(), None, position, corners, batch, *sampling, False)[0].sum().backward()


@POOL
@KERNELS
def test_inference_gives_the_bits_of_training(backend):
    tokens, position, boxes, _, options = make("five frames" if interpreted(backend) else "odd")
    trained = roi_pool_3d(tokens.clone().requires_grad_(), position, boxes, **options)
    assert torch.equal(roi_pool_3d(tokens, position, boxes, **options), trained)


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_graph_break(backend, op):
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "odd")
    tokens.requires_grad_()
    # The reference is a long graph of plain ops: tracing it is the question, not what the code generator makes of it.
    compiled = torch.compile(OPS[op], fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    for form in (list(boxes),) if interpreted(backend) else (boxes, list(boxes)):
        actual = compiled(tokens, position, form, background=fill, **options)
        want = OPS[op](tokens, position, form, background=fill, **options)
        torch.testing.assert_close(actual, want, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(x.square().sum(), tokens)[0] for x in (actual, want)]
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_one_graph_for_all_lengths():
    tokens, position, boxes, fill, options = make("odd")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(roi_pool_3d, fullgraph=True, dynamic=True, backend=count)
    for n, K in ((3, 36), (2, 30), (3, 21)):  # not 4, the size of a box: torch would take the two for one
        inputs = tokens[:, :K], position[:, :K], boxes[:, :n]
        want = roi_pool_3d(*inputs, background=fill, **options)
        assert torch.equal(compiled(*inputs, background=fill, **options), want)
    assert len(graphs) == 1


@POOL
def test_autocast(backend):
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "odd")
    want = roi_pool_3d(tokens, position, boxes, background=fill, **options)
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        assert torch.equal(roi_pool_3d(tokens, position, boxes, background=fill, **options), want)


@pytest.mark.parametrize("op", [roi_align_3d, roi_pool_3d])
def test_gradient_through_a_checkpoint(op):
    tokens, position, boxes, fill, options = make(SMALL[0])
    tokens.requires_grad_()
    (want,) = torch.autograd.grad(op(tokens, position, boxes, background=fill, **options).sum(), tokens)
    result = checkpoint(op, tokens, position, boxes, background=fill, **options, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(result.sum(), tokens)[0], want)


@KERNELS
@pytest.mark.parametrize("op", OPS)
def test_second_backward_raises(backend, op):
    tokens, position, boxes, fill, options = make("few tubes")
    tokens.requires_grad_()
    result = OPS[op](tokens, position, boxes, background=fill, **options)
    (grad,) = torch.autograd.grad(result.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(grad.sum(), tokens)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    from evad_kernels import _backend

    if (native := _backend.native) is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    tokens, position, boxes, fill, options = make("paper 224")
    tokens, fill = tokens[..., :101].contiguous(), fill[:, :101].contiguous()  # whole vectors, single ones, channels
    tokens[0, 7, 40] = math.nan
    before = native.cpu_isa()
    results = {}
    try:
        for name in (isa, before):
            native.set_isa_cap(name)
            for op in OPS.values():
                results.setdefault(name, []).extend(
                    x
                    for part in gradients(lambda x, f: op(x, position, boxes, background=f, **options), [tokens, fill])  # noqa: B023
                    for x in part
                )
    finally:
        native.set_isa_cap(before)
    for actual, want in zip(results[isa], results[before], strict=True):
        torch.testing.assert_close(actual, want, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("B", "K", "C", "n"), [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)], ids=["B", "K", "C", "n"]
)
@pytest.mark.parametrize("op", OPS)
def test_edges(backend, op, B, K, C, n):
    tokens = torch.ones(B, K, C, requires_grad=True)
    background = torch.full((6, C), 7.0, requires_grad=True)
    position = torch.arange(K).expand(B, K)
    boxes = torch.tensor([0.0, 0, 48, 32]).expand(B, n, 4)
    result = OPS[op](tokens, position, boxes, grid=(1, 2, 3), background=background)
    assert result.shape == ((B * n, C) if op == "roi_pool_3d" else (B * n, C, 1, 7, 7))
    if K == 0:
        torch.testing.assert_close(result, torch.full_like(result, 7.0))
    grad_tokens, grad_background = torch.autograd.grad(result.sum(), (tokens, background))
    assert grad_tokens.shape == tokens.shape and grad_background.shape == background.shape
    bins = 49 if op == "roi_align_3d" else 1
    torch.testing.assert_close(grad_tokens.sum() + grad_background.sum(), torch.tensor(float(B * n * C * bins)))
    for empty in (torch.zeros(0, 5), [torch.zeros(0, 4)] * B):
        assert OPS[op](tokens, position, empty, grid=(1, 2, 3)).shape[0] == 0


@POOL
def test_later_of_equal_positions_holds_the_cell(backend):
    tokens = torch.tensor([[[1.0], [2.0], [3.0]]], requires_grad=True)
    boxes = torch.tensor([[[8.0, 0, 8, 16], [24, 0, 24, 16]]])
    pooled = roi_pool_3d(tokens, torch.tensor([[1, 0, 1]]), boxes, grid=(1, 1, 2))
    assert pooled.flatten().tolist() == [2, 3]
    (grad,) = torch.autograd.grad(pooled.sum(), tokens)
    assert grad.flatten().tolist() == [0, 1, 1]


@POOL
def test_tie_goes_to_the_first_bin(backend):
    tokens = torch.ones(1, 16, 20, requires_grad=True)
    boxes = torch.tensor([[[0.0, 0, 64, 64]]])  # 2 x 2 bins of 2 x 2 cells, a sample in the middle of each
    pooled = roi_pool_3d(
        tokens, torch.arange(16)[None], boxes, grid=(1, 4, 4), output_size=2, sampling_ratio=2, spatial_scale=1 / 16
    )
    (grad,) = torch.autograd.grad(pooled[0, 3], tokens)
    want = torch.zeros(4, 4)
    want[:2, :2] = 0.25
    assert torch.equal(grad[0, :, 3].view(4, 4), want)
    assert grad[0, :, :3].count_nonzero() == 0


@POOL
@pytest.mark.parametrize(("first", "second"), [(9, 10), (0, 19)])
def test_tie_goes_to_the_first_bin_of_many_columns(backend, first, second):
    """Ten columns of bins, a cell each: the last of the first row comes before the first of the second."""
    tokens = torch.ones(1, 20, 1)
    tokens[0, [first, second]] = 2
    tokens.requires_grad_()
    boxes = torch.tensor([[[0.0, 0, 10, 2]]])
    options = {"grid": (1, 2, 10), "output_size": (2, 10), "sampling_ratio": 1, "spatial_scale": 1.0}
    (grad,) = torch.autograd.grad(roi_pool_3d(tokens, torch.arange(20)[None], boxes, **options), tokens)
    assert grad.flatten().nonzero().tolist() == [[first]]


@pytest.mark.parametrize("op", OPS)
def test_bin_that_is_wider_than_its_samples(backend, op):
    """Two samples in one bin of eight cells, in a row and in a column: between cells 1 and 2, and 5 and 6."""
    tokens = 2.0 ** torch.arange(8).view(1, 8, 1)
    for grid, box in (((1, 1, 8), [0.0, 0, 8, 1]), ((1, 8, 1), [0.0, 0, 1, 8])):
        options = {"grid": grid, "output_size": 1, "spatial_scale": 1.0}
        result = OPS[op](tokens, torch.arange(8)[None], torch.tensor([[box]]), **options)
        assert result.item() == (2 + 4 + 32 + 64) / 4


@POOL
def test_gradient_of_more_frames_than_owners(backend):
    """400 frames of three images: on a GPU a program owns two of the images, or what is left."""
    generator = torch.Generator().manual_seed(0)
    tokens, fill = (torch.randn(shape, generator=generator) for shape in ((3, 300, 1), (400, 1)))
    position = torch.stack([torch.randperm(400, generator=generator)[:300] for _ in range(3)])
    boxes = torch.tensor([[[0.0, 0, 1, 1]], [[0.25, 0, 1, 1]], [[0.5, 0.5, 3, 3]]])

    def run(x, f):
        return roi_pool_3d(x, position, boxes, background=f, grid=(400, 1, 1), output_size=1, spatial_scale=1.0)

    results = {}
    for name in ("reference", backend):
        with use_backend(name):
            outputs, grads = gradients(run, [tokens, fill])
            results[name] = (*outputs, *grads)
    for got, want in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@POOL
@pytest.mark.parametrize("largest", [2.0, math.nan])
@pytest.mark.parametrize("wide", [True, False])
def test_tie_goes_to_the_first_bin_of_long_boxes(backend, wide, largest):
    """Row by row, whichever axis a kernel takes first."""
    Gh, Gw = (4, 16) if wide else (16, 4)  # 8 x 8 bins: all weights are binary fractions
    tokens = torch.ones(1, Gh * Gw, 20)
    plane = tokens.view(Gh, Gw, 20)
    plane[2:, 2:] = largest  # of the first row of bins that is all these, the first column
    plane[:2, Gw - 2 :, 5:] = largest  # an earlier row, a later column
    plane[:, 1::2] = 1.0  # where gradients are compared: a gradient at a NaN is not defined
    boxes = torch.tensor([[[0.0, 0, 16 * Gw, 16 * Gh]]])
    grads = {}
    for name in ("reference", backend):
        with use_backend(name):
            leaf = tokens.clone().requires_grad_()
            pooled = roi_pool_3d(leaf, torch.arange(Gh * Gw)[None], boxes, grid=(1, Gh, Gw), output_size=8)
            (grad,) = torch.autograd.grad(pooled.sum(), leaf)
            grads[name] = grad.view(Gh, Gw, 20)[:, 1::2]
    assert torch.equal(grads[backend], grads["reference"])
    assert (grads[backend].flatten(0, 1).count_nonzero(0) > 0).all()
    assert not torch.equal(grads[backend][..., 4], grads[backend][..., 5])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_features_reach_the_bins_that_touch_them(backend, value):
    tokens, position, _, _, options = make("all kept")
    tokens[0, position[0] == 5] = value  # frame 0, row 1, column 1 of image 0
    boxes = torch.tensor([[0.0, 0, 63, 47], [40, 0, 63, 47], [0, 40, 63, 47]]).expand(2, 3, 4)
    samples = roi_align_3d(tokens, position, boxes, **options)
    touched = (~samples.isfinite()).any((1, 3, 4))
    assert touched.nonzero().tolist() == [[0, 0]]
    assert torch.equal(samples[0, :, 0].nan_to_num(0).isfinite(), torch.ones_like(samples[0, :, 0]).bool())
    assert samples[0, 0, 0, 6].isfinite().all() and not samples[0, 0, 0, 3, 3].isfinite()
    pooled = roi_pool_3d(tokens, position, boxes, **options)
    if value == -math.inf:  # smaller than the bins that do not touch it
        assert pooled.isfinite().all()
    else:
        assert (pooled[0].isnan() if math.isnan(value) else pooled[0] == value).all() and pooled[1:].isfinite().all()


@POOL
@KERNELS
def test_the_smallest_weight_touches_a_cell(backend):
    """A sample about 2^-26 of a cell beyond the first cell's centre: 1 - 2^-26 is 1 in float32."""
    tokens = torch.tensor([[[1.0], [math.nan]]])
    boxes = torch.tensor([[[5.955488681793213, 0, 10.044511795043945, 16]]])
    pooled = roi_pool_3d(
        tokens, torch.arange(2)[None], boxes, grid=(1, 1, 2), spatial_scale=1 / 16, output_size=1, sampling_ratio=1
    )
    assert pooled.isnan().all()


def test_gradient_of_nan_goes_to_the_first_bin_that_has_it(backend):
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "odd")
    tokens[0, :4, 2:9] = math.nan
    grads = {}
    for name in ("reference", backend):
        with use_backend(name):
            leaf = fill.clone().requires_grad_()
            pooled = roi_pool_3d(tokens, position, boxes, background=leaf, **options)
            grads[name] = torch.autograd.grad(pooled[pooled.isfinite()].sum() + pooled.sum(), leaf)[0]
    assert pooled.isnan().any() and not pooled.isnan().all()
    torch.testing.assert_close(grads[backend], grads["reference"], atol=1e-5, rtol=1e-5)


HOSTILE = [
    math.nan,
    math.inf,
    -math.inf,
    1e30,
    -1e30,
    3.4e38,
    -3.4e38,
    2.0**31,
    -(2.0**31),
    0.0,
    -0.0,
    1e-30,
    50.0,
    17.25,
]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_box(data):
    tokens, position, _, fill, options = make("odd")
    coordinate = st.one_of(st.sampled_from(HOSTILE), st.floats(-60, 150, width=32))
    boxes = torch.tensor(data.draw(st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=4)))
    options.update(
        aligned=data.draw(st.booleans()),
        sampling_ratio=data.draw(st.integers(1, 4)),
        output_size=data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
    )
    results = {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            results[backend] = [
                torch.cat([output.flatten() for output in part])
                for op in OPS.values()
                for part in gradients(
                    lambda x, f: op(x, position, [boxes, boxes[:1]], background=f, **options),  # noqa: B023
                    [tokens, fill],
                )
            ]
    for got, want in zip(results["cpu"], results["reference"], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    with use_backend("cpu"):
        samples = roi_align_3d(tokens, position, [boxes, boxes[:1]], background=fill, **options)
    for box, of_box in zip(boxes.tolist(), samples, strict=False):
        if not (box[2] >= box[0] and box[3] >= box[1]):
            assert of_box.count_nonzero() == 0


@KERNELS
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_hostile_boxes(backend, op, aligned):
    if interpreted(backend) and aligned == (op == "roi_align_3d"):
        pytest.skip("backend triton: interpreted, the other op stands for it")
    tokens, position, _, fill, options = make("few tubes")
    boxes = torch.tensor(
        [
            [math.nan, 0, 40, 40],
            [0, 0, 40, math.nan],
            [40, 0, 0, 40],
            [-math.inf, -math.inf, math.inf, math.inf],
            [0, 0, math.inf, 20],
            [-1e30, -1e30, 1e30, 1e30],
            [3.4e38, 3.4e38, 3.4e38, 3.4e38],
            [-(2.0**31), 8, 2.0**31, 8],
            [50, 17.25, 50, 17.25],
            [-16, -16, 0, 0],
            [64, 48, 64, 48],
            [1e-30, -0.0, 30, 200],
        ]
    )
    options |= {"aligned": aligned, "output_size": (2, 3), "sampling_ratio": 3}
    results = {}
    for name in ("reference", backend):
        with use_backend(name):
            outputs, grads = gradients(
                lambda x, f: OPS[op](x, position, [boxes], background=f, **options), [tokens, fill]
            )
            results[name] = (*outputs, *grads)
    for got, want in zip(results[backend], results["reference"], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@KERNELS
@pytest.mark.parametrize("op", OPS)
def test_bitwise_repeatable(backend, op):
    if interpreted(backend) and op == "roi_align_3d":
        pytest.skip("backend triton: interpreted, roi_pool_3d stands for it")
    tokens, position, boxes, fill, options = make("five frames" if interpreted(backend) else "paper 224")
    outputs, grads = gradients(lambda x, f: OPS[op](x, position, boxes, background=f, **options), [tokens, fill])
    for _ in range(1 if interpreted(backend) else 3):
        again = gradients(lambda x, f: OPS[op](x, position, boxes, background=f, **options), [tokens, fill])
        assert all(map(torch.equal, (*outputs, *grads), (*again[0], *again[1])))


def test_box_outside_and_box_of_no_area(backend):
    tokens, position, _, fill, options = make("all kept")
    boxes = torch.tensor([[500.0, 500, 600, 600], [-300, 0, -100, 40], [24, 24, 24, 24]]).expand(2, 3, 4)
    samples = roi_align_3d(tokens, position, boxes, background=fill, **options)
    assert samples[[0, 1, 3, 4]].count_nonzero() == 0
    centre = tokens[0, position[0] == 5][0]  # (24, 24) is the middle of cell (1, 1)
    torch.testing.assert_close(samples[2, :, 0], centre[:, None, None].expand(-1, 7, 7))


def test_samples_at_the_grids_edges(backend):
    """One sample a box. At -1 and at the last cell's end it is the cell at that edge, beyond them nothing."""
    tokens = torch.arange(1.0, 13).view(1, 12, 1)  # of 3 rows and 4 columns
    places = {(1.0, 1.0): 6, (-1.0, 1.0): 5, (-1.125, 1.0): 0, (4.0, 1.0): 8, (4.125, 1.0): 0}  # x, y
    places |= {(1.0, -1.0): 2, (1.0, -1.125): 0, (1.0, 3.0): 10, (1.0, 3.125): 0}
    boxes = torch.tensor([[x - 0.5, y - 0.5, x + 1.5, y + 1.5] for x, y in places])  # the middle, less half a cell
    options = {"grid": (1, 3, 4), "output_size": 1, "spatial_scale": 1.0, "sampling_ratio": 1}
    samples = roi_align_3d(tokens, torch.arange(12)[None], boxes[None], **options)
    assert samples.flatten().tolist() == list(places.values())


@KERNELS
@pytest.mark.parametrize("output_size", [(1, 70), (70, 1)], ids=str)
def test_more_bins_than_a_tile(backend, output_size):
    tokens, position, boxes, fill, options = make("long bins")
    options |= {"output_size": output_size, "sampling_ratio": 1}
    results = {}
    for name in ("reference", backend):
        with use_backend(name):
            outputs, grads = gradients(
                lambda x, f: roi_align_3d(x, position, boxes, background=f, **options), [tokens, fill]
            )
            results[name] = (*outputs, *grads)
    for got, want in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_tables_of_boxes_of_no_image():
    """On a GPU nobody has looked at the batch index before the kernel."""
    if not (_backend.INTERPRETED or torch.get_default_device().type == "cuda"):
        pytest.skip("Triton needs a GPU or its interpreter")
    from evad_kernels._boxes_triton import box_tables

    corners, batch = torch.tensor([[0.0, 0, 3, 3]]).expand(3, 4), torch.tensor([1, 2, -1])
    tables = box_tables(corners, batch, 2, sizes=[3, 4], scales=[1.0], output=(2, 2), sampling_ratio=1)
    assert tables.weight.any(1).tolist() == [True, False, False]
    assert (tables.span[1:, ::2] >= tables.span[1:, 1::2]).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    B, C, n = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 140)), data.draw(st.integers(0, 5))
    grid = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    cells = math.prod(grid)
    K = data.draw(st.integers(0, cells))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tokens = torch.randn(B, K, C, generator=generator)
    position = torch.zeros(B, K, dtype=torch.int64)
    for b in range(B):
        position[b] = torch.randperm(cells, generator=generator)[:K]
    boxes = torch.rand(B, n, 4, generator=generator) * 100
    boxes[..., 2:] += boxes[..., :2]
    options = {"grid": grid, "spatial_scale": data.draw(st.sampled_from([1 / 16, 1 / 7, 0.01, 1.0]))}
    for op in OPS.values():
        with use_backend("cpu"):
            actual = op(tokens, position, boxes, **options)
        with use_backend("reference"):
            want = op(tokens, position, boxes, **options)
        torch.testing.assert_close(actual, want, atol=1e-5, rtol=1e-5)


@POOL
def test_big_grid(backend):
    grid = (4, 64, 64)
    device = torch.get_default_device()
    tokens = torch.randn(1, 16384, 16, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    position = torch.randperm(16384, generator=torch.Generator().manual_seed(1), device="cpu")[None].to(device)
    boxes = torch.tensor([[[8.0, 8, 8, 8], [1016, 1016, 1016, 1016], [0, 0, 1024, 1024]]])
    pooled = roi_pool_3d(tokens, position, boxes, grid=grid)
    dense = torch.empty(16384, 16).index_copy_(0, position[0], tokens[0]).view(4, 64, 64, 16)
    torch.testing.assert_close(pooled[0], dense[:, 0, 0].mean(0))
    torch.testing.assert_close(pooled[1], dense[:, 63, 63].mean(0))


def test_sizes_beyond_32_bits_are_sizes():
    meta = torch.device("meta")
    tokens = torch.empty(1, 70_000, 512, device=meta)
    position = torch.empty(1, 70_000, dtype=torch.int64, device=meta)
    boxes = torch.empty(1, 400, 4, device=meta)
    shape = torch.ops.evad_kernels.roi_align_3d(
        tokens, None, position, boxes[0], None, [300, 300, 300], [7, 7], 1 / 16, 2, True
    ).shape
    assert shape == (400, 512, 300, 7, 7) and shape.numel() > 2**31


@pytest.mark.parametrize("bad", [-1, 12, 2**31, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("op", OPS)
def test_rejects_position_outside(backend, op, bad):
    if backend in ("triton", "cuda"):  # a GPU cannot say so without a sync: it leaves that token out
        tokens = torch.ones(1, 2, 3, requires_grad=True)
        boxes = torch.tensor([[[8.0, 8, 8, 8], [40, 40, 40, 40]]])  # the middle of two cells
        result = OPS[op](tokens, torch.tensor([[0, bad]]), boxes, grid=(1, 3, 4)).flatten(1)
        assert (result[0] == 1).all() and (result[1] == 0).all()
        (grad,) = torch.autograd.grad(result.sum(), tokens)
        assert (grad[0, 0] > 0).all() and (grad[0, 1] == 0).all()
        return
    with pytest.raises(ValueError, match=rf"{op}: position must be in \[0, 12\), got"):
        OPS[op](torch.ones(1, 2, 3), torch.tensor([[0, bad]]), torch.zeros(1, 1, 4), grid=(1, 3, 4))


@pytest.mark.parametrize("bad", [-1.0, 2.0, math.nan, math.inf, -1e30])
@pytest.mark.parametrize("op", OPS)
def test_rejects_batch_index_outside(backend, op, bad):
    boxes = torch.tensor([[0.0, 0, 0, 9, 9], [bad, 0, 0, 9, 9]])
    if boxes.is_cuda:  # nor this: zeros
        result = OPS[op](torch.ones(2, 2, 3), torch.arange(2).expand(2, 2), boxes, grid=(1, 3, 4))
        assert result[0].any() and not result[1].any()
        return
    with pytest.raises(ValueError, match=rf"{op}: boxes' batch index must be in \[0, 2\), got"):
        OPS[op](torch.ones(2, 2, 3), torch.arange(2).expand(2, 2), boxes, grid=(1, 3, 4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.ones(5, 3)}, ValueError, "tokens must be"),
        ({"tokens": torch.ones(2, 5, 3, dtype=torch.int32)}, TypeError, "tokens must be float32"),
        ({"position": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "position must be"),
        ({"position": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "position must be int64"),
        ({"boxes": torch.zeros(2, 3, 5)}, ValueError, "boxes must be"),
        ({"boxes": torch.zeros(3, 3, 4)}, ValueError, "boxes must be"),
        ({"boxes": torch.zeros(2, 3, 7, 4)}, ValueError, "boxes must be"),
        ({"boxes": torch.zeros(6, 4)}, ValueError, "boxes must be"),
        ({"boxes": [torch.zeros(3, 4)]}, ValueError, "boxes must be"),
        ({"boxes": [torch.zeros(3, 4), torch.zeros(2, 5)]}, ValueError, "boxes must be"),
        ({"boxes": [torch.zeros(3, 4), None]}, TypeError, "boxes must be"),
        ({"boxes": None}, TypeError, "boxes must be"),
        ({"boxes": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "boxes must be float32"),
        ({"boxes": torch.zeros(2, 3, 4, device="meta")}, RuntimeError, "boxes must be on the device of tokens"),
        ({"grid": (1, 2)}, ValueError, "grid must be three integers"),
        ({"grid": (0, 2, 2)}, ValueError, "grid must be at least 1"),
        ({"background": torch.ones(4)}, ValueError, "background must be"),
        ({"background": torch.ones(3, dtype=torch.float64)}, TypeError, "background must be of the dtype of tokens"),
        ({"output_size": 0}, ValueError, "output_size must be"),
        ({"output_size": (7, 7, 7)}, ValueError, "output_size must be"),
        ({"output_size": 2.5}, ValueError, "output_size must be"),
        ({"sampling_ratio": 0}, ValueError, "sampling_ratio must be"),
        ({"sampling_ratio": -1}, ValueError, "sampling_ratio must be"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be"),
        ({"spatial_scale": math.nan}, ValueError, "spatial_scale must be"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_rejects_bad_input(backend, op, change, error, message):
    arguments = {
        "tokens": torch.ones(2, 5, 3),
        "position": torch.arange(5).expand(2, 5),
        "boxes": torch.zeros(2, 3, 4),
        "grid": (1, 2, 3),
    }
    arguments |= {name: on_default_device(value) for name, value in change.items()}
    with pytest.raises(error, match=f"{op}: {message}"):
        OPS[op](**arguments)
