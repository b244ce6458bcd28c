import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evad_kernels import _backend, pyramid_roi_align, use_backend
from evad_kernels.testing import DTYPES, assert_accurate, assert_registered, gradients, layouts, on_default_device

GOLDEN = Path(__file__).parent / "golden" / "op_roi_and_boxes.npz"

# name: (B, C, height and width of the finest level, n, options)
CASES = {
    "odd": (2, 19, (37, 45), 6, {}),
    "one level": (1, 5, (9, 7), 4, {"strides": (16,), "output_size": (3, 2)}),
    "patch 12": (2, 67, (32, 32), 7, {"strides": (3, 6, 12, 24), "canonical_size": 96, "output_size": (5, 6)}),
    "five levels": (1, 8, (64, 64), 8, {"strides": (2, 4, 8, 16, 32), "sampling_ratio": 3, "canonical_level": 3}),
    "paper 224": (1, 256, (56, 56), 40, {}),
    "two levels": (2, 5, (9, 11), 2, {"strides": (4, 8), "output_size": (3, 2), "canonical_size": 20}),
    "long bins": (1, 3, (23, 26), 2, {"strides": (8, 16), "output_size": (2, 9), "canonical_size": 600}),
}
INTERPRETED = ["two levels", "long bins"]  # what an interpreter can do in a moment
KERNELS = pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"], indirect=True)
SMALL = [name for name in CASES if name != "paper 224"]


def interpreted(backend):
    return backend == "triton" and _backend.INTERPRETED


def make(case, dtype=torch.float32, seed=0):
    """Levels, boxes and the keyword arguments; the same on every device."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        levels, boxes, options = _make(case, dtype, seed)
    return [level.to(device) for level in levels], boxes.to(device), options


def _make(case, dtype, seed):
    B, C, (height, width), n, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    strides = options.get("strides", (4, 8, 16, 32))
    levels = [
        torch.randn(B, C, -(-height >> i), -(-width >> i), generator=generator, dtype=torch.float64).abs().to(dtype)
        for i in range(len(strides))
    ]
    span = torch.tensor([width, height]) * strides[0]
    low = (torch.rand(B, n, 2, generator=generator) * 1.2 - 0.2) * span
    size = (
        span * 2.0 ** -(5 * torch.rand(B, n, 1, generator=generator)) * (0.5 + torch.rand(B, n, 2, generator=generator))
    )
    return levels, torch.cat([low, low + size], -1), options


def expected(levels, boxes, **options):
    """Samples [B, n, C, oh, ow] in float64, sample by sample."""
    options = {"strides": (4, 8, 16, 32), "output_size": 7, "sampling_ratio": 2, **options}
    strides, samples = options["strides"], options["sampling_ratio"]
    oh, ow = options["output_size"] if isinstance(options["output_size"], tuple) else (options["output_size"],) * 2
    B, n, _ = boxes.shape
    first = round(math.log2(strides[0]))
    result = torch.zeros(B, n, levels[0].shape[1], oh, ow, dtype=torch.float64)
    for b in range(B):
        for i in range(n):
            x1, y1, x2, y2 = boxes[b, i].double().tolist()
            side = math.sqrt((x2 - x1) * (y2 - y1))
            number = math.floor(
                options.get("canonical_level", 4) + math.log2(side / options.get("canonical_size", 224))
            )
            index = min(max(number - first, 0), len(levels) - 1)
            level = levels[index][b].double()
            height, width = level.shape[1:]
            x1, y1, x2, y2 = (value / strides[index] - 0.5 for value in (x1, y1, x2, y2))
            for p in range(oh):
                for q in range(ow):
                    for j in range(samples**2):
                        y = y1 + (y2 - y1) / oh * (p + (j // samples + 0.5) / samples)
                        x = x1 + (x2 - x1) / ow * (q + (j % samples + 0.5) / samples)
                        if not (-1 <= y <= height and -1 <= x <= width):
                            continue
                        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                        top, left = int(y), int(x)
                        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                        upper = level[:, top, left] * (left + 1 - x) + level[:, top, right] * (x - left)
                        lower = level[:, bottom, left] * (left + 1 - x) + level[:, bottom, right] * (x - left)
                        result[b, i, :, p, q] += (upper * (top + 1 - y) + lower * (y - top)) / samples**2
    return result


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)  # those that compute in float64
@pytest.mark.parametrize("case", SMALL)
def test_matches_sample_by_sample(backend, case):
    levels, boxes, options = make(case, torch.float64)
    actual = pyramid_roi_align(levels, boxes, **options)
    torch.testing.assert_close(actual, expected(levels, boxes, **options), atol=1e-11, rtol=0)


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference_with_gradient(backend, case, dtype):
    if interpreted(backend) and case not in INTERPRETED:
        pytest.skip("backend triton: interpreted, smaller cases stand for it")
    levels, boxes, options = make(case, dtype)

    def run(*levels):
        at = boxes.to(torch.promote_types(levels[0].dtype, torch.float32))
        return pyramid_roi_align(levels, at, **options)

    (actual,), actual_grads = gradients(run, levels)
    with use_backend("reference"):
        (reference,), reference_grads = gradients(run, levels)
        (truth,), truth_grads = gradients(run, [level.double() for level in levels], rounding=dtype)
    assert_accurate(actual, reference, truth, label="samples")
    for index, grads in enumerate(zip(actual_grads, reference_grads, truth_grads, strict=True)):
        assert_accurate(*grads, label=f"grad_levels[{index}]")


def test_golden(backend):
    if interpreted(backend):
        pytest.skip("backend triton: interpreted, smaller cases stand for it")
    golden = {key: torch.tensor(value) for key, value in np.load(GOLDEN).items() if key.startswith("ml/")}
    levels = [golden[f"ml/p{number}"] for number in (2, 3, 4, 5)]
    actual = pyramid_roi_align(levels, golden["ml/boxes"])
    torch.testing.assert_close(actual.flatten(0, 1), golden["ml/out"], atol=1e-6, rtol=0)
    # Levels that hold their own number tell which one was sampled.
    numbered = [torch.full_like(level, number) for number, level in zip((2, 3, 4, 5), levels, strict=True)]
    number = pyramid_roi_align(numbered, golden["ml/boxes"]).flatten(2).amax(-1).flatten()
    assert torch.equal(number.round().long(), golden["ml/levels"])


@KERNELS
def test_level_changes_where_the_reference_says(backend):
    """Sizes a few roundings around every power of two: float32 arithmetic, the same in the kernel."""
    levels = [torch.full((1, 1, 64 >> i, 64 >> i), float(i)) for i in range(4)]
    sides = []
    for side in map(np.float32, (56, 112, 224, 448, 896)):
        for _ in range(4):
            side = np.nextafter(side, np.float32(0))
        for _ in range(8):
            sides.append(side)
            side = np.nextafter(side, np.float32(1e9))
    sides = torch.tensor(np.stack(sides))[:, None]
    boxes = torch.cat([torch.zeros(len(sides), 2), sides, sides], 1)[None]
    got = {}
    for name in ("reference", backend):
        with use_backend(name):
            got[name] = pyramid_roi_align(levels, boxes, output_size=1, sampling_ratio=1).flatten()
    assert got["reference"].unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(got[backend], got["reference"])


def test_forms_of_boxes(backend):
    levels, boxes, options = make("two levels" if interpreted(backend) else "odd")
    B, n, _ = boxes.shape
    want = pyramid_roi_align(levels, boxes, **options)
    assert want.shape[:3] == (B, n, levels[0].shape[1])
    want = want.flatten(0, 1)
    rows = torch.cat([torch.arange(float(B)).repeat_interleave(n)[:, None], boxes.flatten(0, 1)], 1)
    order = torch.randperm(B * n, generator=torch.Generator().manual_seed(0), device="cpu").to(boxes.device)
    assert torch.equal(pyramid_roi_align(levels, list(boxes), **options), want)
    assert torch.equal(pyramid_roi_align(levels, [boxes[0, :1], boxes[1]], **options), want[[0, *range(n, 2 * n)]])
    assert torch.equal(pyramid_roi_align(levels, rows[order], **options), want[order])
    assert pyramid_roi_align(levels, boxes.double(), **options).dtype == torch.float32


def test_strides(backend):
    levels, boxes, options = make("two levels" if interpreted(backend) else "odd")
    want = pyramid_roi_align(levels, boxes, **options)
    kinds = [dict(layouts(level)) for level in levels]
    for kind, level in zip(kinds, levels, strict=True):
        kind["channels-last"] = level.contiguous(memory_format=torch.channels_last)
    for name in kinds[0]:
        strided = [kind[name] for kind in kinds]
        torch.testing.assert_close(
            pyramid_roi_align(strided, boxes, **options), want, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, strided in layouts(boxes):
        assert torch.equal(pyramid_roi_align(levels, strided, **options), want), name


def test_registration():
    levels, boxes, _ = make("odd")
    levels = [level.requires_grad_() for level in levels]
    sampling = ([4.0, 8.0, 16.0, 32.0], [7, 7], 2, 224.0, 4, 2)
    op = torch.ops.evad_kernels.pyramid_roi_align.default
    for batch in (None, torch.arange(2).repeat_interleave(6)):
        assert_registered(op, levels, boxes.flatten(0, 1), batch, *sampling)


def test_compiles_without_graph_break(backend):
    levels, boxes, options = make("two levels" if interpreted(backend) else "odd")
    levels = [level.requires_grad_() for level in levels]
    # The reference is a long graph of plain ops: tracing it is the question, not what the code generator makes of it.
    compiled = torch.compile(pyramid_roi_align, fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    actual = compiled(levels, boxes, **options)
    want = pyramid_roi_align(levels, boxes, **options)
    torch.testing.assert_close(actual, want, atol=1e-5, rtol=1e-5)
    for grads in zip(*(torch.autograd.grad(x.square().sum(), levels) for x in (actual, want)), strict=True):
        torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_autocast(backend):
    levels, boxes, options = make("two levels" if interpreted(backend) else "odd")
    want = pyramid_roi_align(levels, boxes, **options)
    with torch.autocast(boxes.device.type, dtype=torch.bfloat16):
        assert torch.equal(pyramid_roi_align(levels, boxes, **options), want)


@KERNELS
def test_second_backward_raises(backend):
    levels, boxes, options = make("two levels")
    levels[0].requires_grad_()
    samples = pyramid_roi_align(levels, boxes, **options)
    (grad,) = torch.autograd.grad(samples.square().sum(), levels[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(grad.sum(), levels[0])


@pytest.mark.parametrize(("B", "C", "n"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)], ids=["B", "C", "n"])
def test_edges(backend, B, C, n):
    levels = [torch.ones(B, C, 8 >> i, 8 >> i, requires_grad=True) for i in range(4)]
    boxes = torch.tensor([0.0, 0, 32, 32]).expand(B, n, 4)
    samples = pyramid_roi_align(levels, boxes)
    assert samples.shape == (B, n, C, 7, 7)
    grads = torch.autograd.grad(samples.sum(), levels)
    torch.testing.assert_close(grads[0].sum(), torch.tensor(49.0 * B * n * C))
    assert all(grad.shape == level.shape and not grad.any() for grad, level in zip(grads[1:], levels[1:], strict=True))
    for empty in (torch.zeros(0, 5), [torch.zeros(0, 4)] * B):
        assert pyramid_roi_align(levels, empty).shape == (0, C, 7, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_special_features_reach_the_bins_that_touch_them(backend, value):
    levels = [torch.ones(1, 3, 16 >> i, 16 >> i) for i in range(4)]
    levels[0][0, 1, 5, 5] = value
    levels[1][:] = value
    boxes = torch.tensor([[[0.0, 0, 63, 63], [40, 40, 63, 63]]])
    samples = pyramid_roi_align(levels, boxes)[0]
    assert samples[1].isfinite().all() and samples[0, [0, 2]].isfinite().all()
    assert not samples[0, 1].isfinite().all() and samples[0, 1, 5:].isfinite().all()


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


@KERNELS
def test_gradient_of_shuffled_boxes_goes_to_their_image(backend):
    levels, boxes, options = make("two levels")
    rows = torch.cat([torch.arange(2.0).repeat_interleave(2)[:, None], boxes.flatten(0, 1)], 1)[[3, 0, 2, 1]]
    results = {}
    for name in ("reference", backend):
        with use_backend(name):
            results[name] = gradients(lambda *x: pyramid_roi_align(x, rows, **options), levels)[1]
    for actual, want in zip(results[backend], results["reference"], strict=True):
        torch.testing.assert_close(actual, want, atol=1e-6, rtol=1e-5)


@KERNELS
def test_hostile_boxes(backend):
    levels, _, options = make("two levels")
    boxes = torch.tensor(
        [
            [math.nan, 0, 40, 40],
            [40, 0, 0, 40],
            [-math.inf, -math.inf, math.inf, math.inf],
            [0, 0, math.inf, 20],
            [-1e30, -1e30, 1e30, 1e30],
            [3.4e38, 3.4e38, 3.4e38, 3.4e38],
            [-(2.0**31), 8, 2.0**31, 8],
            [30, 17.25, 30, 17.25],
            [-4, -4, 0, 0],
            [44, 36, 44, 36],
            [1e-30, -0.0, 30, 200],
        ]
    )
    options |= {"sampling_ratio": 3}
    results = {}
    for name in ("reference", backend):
        with use_backend(name):
            outputs, grads = gradients(lambda *x: pyramid_roi_align(x, [boxes, boxes[:1]], **options), levels)
            results[name] = (*outputs, *grads)
    for got, want in zip(results[backend], results["reference"], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@KERNELS
def test_bitwise_repeatable(backend):
    levels, boxes, options = make("two levels" if interpreted(backend) else "paper 224")
    outputs, grads = gradients(lambda *x: pyramid_roi_align(x, boxes, **options), levels)
    for _ in range(1 if interpreted(backend) else 3):
        again = gradients(lambda *x: pyramid_roi_align(x, boxes, **options), levels)
        assert all(map(torch.equal, (*outputs, *grads), (*again[0], *again[1])))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_box(data):
    levels, _, options = make("odd")
    coordinate = st.one_of(st.sampled_from(HOSTILE), st.floats(-100, 600, width=32))
    boxes = torch.tensor(data.draw(st.lists(st.tuples(*[coordinate] * 4), min_size=1, max_size=4)))
    options = {"sampling_ratio": data.draw(st.integers(1, 4)), "output_size": data.draw(st.integers(1, 9))}
    results = {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            outputs, grads = gradients(lambda *x: pyramid_roi_align(x, [boxes, boxes[:1]], **options), levels)
            results[backend] = (*outputs, *grads)
    for got, want in zip(results["cpu"], results["reference"], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    for box, of_box in zip(boxes.tolist(), results["cpu"][0], strict=False):
        if not (box[2] >= box[0] and box[3] >= box[1]):
            assert of_box.count_nonzero() == 0


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    B, C = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    side = st.integers(1, 20)
    levels = [torch.randn(B, C, data.draw(side), data.draw(side), generator=generator) for _ in range(4)]
    levels = [data.draw(st.sampled_from([x for _, x in layouts(level)])) for level in levels]
    boxes = 100 * torch.rand(B, data.draw(st.integers(0, 5)), 4, generator=generator)
    boxes[..., 2:] += boxes[..., :2]
    results = {}
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            outputs, grads = gradients(lambda *x: pyramid_roi_align(x, boxes), levels)
            results[backend] = (*outputs, *grads)
    for got, want in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_sizes_beyond_32_bits_are_sizes():
    levels = [torch.empty(1, 4096, 8 >> i, 8 >> i, device="meta") for i in range(4)]
    samples = pyramid_roi_align(levels, torch.empty(1, 20_000, 4, device="meta"), output_size=(7, 7))
    assert samples.shape == (1, 20_000, 4096, 7, 7) and samples.numel() > 2**31


@pytest.mark.parametrize("bad", [-1.0, 2.0, math.nan, math.inf])
def test_rejects_batch_index_outside(backend, bad):
    levels, _, _ = make("odd")
    boxes = torch.tensor([[bad, 0, 0, 9, 9]])
    if boxes.is_cuda:  # it cannot say so without a sync: zeros
        assert not pyramid_roi_align(levels, boxes).any()
        return
    with pytest.raises(ValueError, match=r"pyramid_roi_align: boxes' batch index must be in \[0, 2\), got"):
        pyramid_roi_align(levels, boxes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"levels": []}, TypeError, "levels must be"),
        ({"levels": torch.ones(1, 3, 8, 8)}, TypeError, "levels must be"),
        ({"levels": [torch.ones(2, 3, 8)] * 4}, ValueError, "levels must be"),
        ({"levels": [torch.ones(2, 3, 8, 8), torch.ones(2, 4, 4, 4)]}, ValueError, "levels must be"),
        ({"levels": [torch.ones(2, 3, 8, 8), torch.ones(2, 3, 4, 4).double()]}, TypeError, "levels must be"),
        ({"levels": [torch.ones(2, 3, 8, 0)] * 4}, ValueError, "levels must be"),
        ({"levels": [torch.ones(2, 3, 8, 8).int()] * 4}, TypeError, "levels must be float32"),
        ({"strides": 4}, TypeError, "strides must be"),
        ({"strides": (4, 8)}, ValueError, "strides must be"),
        ({"strides": (4, 8, 16, 33)}, ValueError, "strides must be"),
        ({"strides": (0, 0, 0, 0)}, ValueError, "strides must be"),
        ({"boxes": torch.zeros(1, 3, 4)}, ValueError, "boxes must be"),
        ({"boxes": torch.zeros(2, 3, 8, 4)}, ValueError, "boxes must be"),
        ({"boxes": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "boxes must be float32"),
        ({"boxes": torch.zeros(2, 3, 4, device="meta")}, RuntimeError, "boxes must be on the device of levels"),
        ({"output_size": (0, 7)}, ValueError, "output_size must be"),
        ({"sampling_ratio": 0}, ValueError, "sampling_ratio must be"),
        ({"canonical_size": 0}, ValueError, "canonical_size must be"),
        ({"canonical_level": 4.5}, ValueError, "canonical_level must be"),
        ({"canonical_level": True}, ValueError, "canonical_level must be an integer of 32 bits, got True"),
        ({"canonical_level": 10**20}, ValueError, "canonical_level must be an integer of 32 bits, got 1000"),
    ],
)
def test_rejects_bad_input(backend, change, error, message):
    arguments = {"levels": [torch.ones(2, 3, 8 >> i, 8 >> i) for i in range(4)], "boxes": torch.zeros(2, 3, 4)}
    arguments |= {name: on_default_device(value) for name, value in change.items()}
    with pytest.raises(error, match=f"pyramid_roi_align: {message}"):
        pyramid_roi_align(**arguments)
