"""torchvision's RoIAlign: against its definition, sample by sample, and against itself where it imports."""

import inspect
import math

import pytest
import torch

from evad_kernels import ops_compat
from evad_kernels.ops_compat import RoIAlign, roi_align

BOXES = [  # batch, x1, y1, x2, y2: inside, over the edge, outside, less than a cell, more than the map, a line
    [0, 1.0, 2.0, 9.0, 11.5],
    [1, -3.0, -2.0, 6.0, 5.0],
    [0, 30.0, 30.0, 40.0, 44.0],
    [1, 4.2, 4.2, 4.6, 4.9],
    [0, 0.0, 0.0, 22.0, 18.0],
    [1, 2.0, 3.0, 9.0, 3.0],
]
TORCHVISIONS_BOXES = [[0, 0, 0, 9, 9], [0, 0, 5, 4, 9], [0, 5, 5, 9, 9], [1, 0, 0, 9, 9]]  # of its test_ops.py
CASES = {
    "two samples": {"sampling_ratio": 2},
    "two samples, aligned": {"sampling_ratio": 2, "aligned": True},
    "adaptive": {"sampling_ratio": -1},
    "adaptive, aligned": {"sampling_ratio": 0, "aligned": True},
    "scaled": {"spatial_scale": 0.5, "sampling_ratio": 3, "aligned": True},
    "scaled, adaptive": {"spatial_scale": 0.5},
}


def torchvision_ops():
    try:
        from torchvision import ops
    except (ImportError, RuntimeError) as error:  # one built for another torch raises RuntimeError
        pytest.skip(f"torchvision does not import: {type(error).__name__}")
    return ops


def bilinear(image, y, x):
    """All channels of an image [C, H, W] between cells."""
    _, H, W = image.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return torch.zeros(len(image), dtype=image.dtype)
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    top, left = min(int(y), max(H - 2, 0)), min(int(x), max(W - 2, 0))
    bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * image[:, top, left] + dx * image[:, top, right]
    return (1 - dy) * upper + dy * ((1 - dx) * image[:, bottom, left] + dx * image[:, bottom, right])


def expected(features, boxes, size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """The definition, one sample after the other, in float64."""
    oh, ow = size
    result = torch.zeros(len(boxes), features.shape[1], oh, ow, dtype=torch.float64)
    shift = 0.5 if aligned else 0.0
    for r, (b, *corners) in enumerate(boxes):
        x1, y1, x2, y2 = (corner * spatial_scale - shift for corner in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows = sampling_ratio if sampling_ratio > 0 else math.ceil(height / oh)
        columns = sampling_ratio if sampling_ratio > 0 else math.ceil(width / ow)
        image = features[int(b)].double()
        for p in range(oh):
            for q in range(ow):
                samples = [
                    bilinear(
                        image,
                        y1 + (p + (i + 0.5) / rows) * height / oh,
                        x1 + (q + (j + 0.5) / columns) * width / ow,
                    )
                    for i in range(rows)
                    for j in range(columns)
                ]
                if samples:
                    result[r, :, p, q] = torch.stack(samples).mean(0)
    return result


@pytest.mark.parametrize("case", CASES)
def test_matches_definition(case):
    features = torch.randn(2, 3, 12, 15, generator=torch.Generator().manual_seed(0))
    for size in ((3, 4), (1, 1)):
        want = expected(features, BOXES, size, **CASES[case])
        actual = roi_align(features, torch.tensor(BOXES), size, **CASES[case])
        torch.testing.assert_close(actual.double(), want, rtol=0, atol=2e-6)
        assert torch.equal(RoIAlign(size, **{"spatial_scale": 1.0, "sampling_ratio": -1, **CASES[case]})(
            features, torch.tensor(BOXES)), actual)  # fmt: skip


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 4e-3)],
)
def test_forward_as_torchvision_tests_it(aligned, contiguous, dtype, tolerance):
    """Its shapes, boxes and tolerances, boxes in the features' type; and bfloat16, which it has not on a CPU."""
    features = torch.rand(2, 50, 10, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    features = features if contiguous else features.permute(0, 1, 3, 2)
    actual = RoIAlign((5, 5), 1, -1, aligned)(features, torch.tensor(TORCHVISIONS_BOXES, dtype=dtype))
    want = expected(features, TORCHVISIONS_BOXES, (5, 5), aligned=aligned)
    torch.testing.assert_close(actual, want.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("contiguous", [True, False])
def test_backward_as_torchvision_tests_it(contiguous):
    features = torch.rand(1, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    features = features if contiguous else features.permute(0, 1, 3, 2)
    boxes = torch.tensor([[0, 0, 0, 4, 4], [0, 0, 2, 3, 4], [0, 2, 2, 4, 4]], dtype=torch.float64)
    align = RoIAlign((2, 2), spatial_scale=1, sampling_ratio=1)
    assert torch.autograd.gradcheck(lambda x: align(x, boxes), (features,), atol=1e-5)


def test_is_one_call_in_a_traced_module():
    traced = torch.fx.symbolic_trace(RoIAlign((5, 5), 1, -1))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]
    features, boxes = torch.rand(2, 3, 5, 5), torch.tensor(TORCHVISIONS_BOXES, dtype=torch.float32)
    assert torch.equal(traced(features, boxes), roi_align(features, boxes, (5, 5)))


def test_compiles_without_graph_break():
    features, boxes = torch.randn(2, 3, 12, 15), torch.tensor(BOXES)
    compiled = torch.compile(RoIAlign((3, 4), 0.5, 2, aligned=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, boxes), roi_align(features, boxes, (3, 4), 0.5, 2, aligned=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_matches_torchvision(case, contiguous, dtype, tolerance):
    theirs = torchvision_ops().roi_align
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 12, 15, generator=generator).to(dtype)
    features = features if contiguous else features.permute(0, 1, 3, 2)
    many = torch.randint(0, 10, (1000, 5), generator=generator)  # as torchvision draws them
    many[:, 0] %= 2
    many[:, 3:] += many[:, 1:3]  # some are lines or points
    boxes = torch.cat([torch.tensor(BOXES), torch.tensor(TORCHVISIONS_BOXES), many]).to(dtype)
    for form in (boxes, [boxes[boxes[:, 0] == b, 1:] for b in range(2)]):
        results = []
        for function in (roi_align, theirs):
            leaf = features.clone().requires_grad_()
            result = function(leaf, form, (3, 4), **CASES[case])
            result.square().sum().backward()
            results.append((result.detach(), leaf.grad))
        (ours, grad), (want, want_grad) = results
        torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad, want_grad, rtol=tolerance, atol=tolerance * want_grad.abs().max().item())


def test_signatures_are_torchvisions():
    theirs = torchvision_ops()
    for name, ours in (("roi_align", roi_align), ("RoIAlign", RoIAlign)):
        parameters, want = (inspect.signature(x).parameters.values() for x in (ours, getattr(theirs, name)))
        assert [(p.name, p.default) for p in parameters] == [(p.name, p.default) for p in want]


def test_moves_a_detector_of_torchvision_over(monkeypatch):
    torchvision_ops()
    from torchvision.models import detection
    from torchvision.ops import poolers

    torch.manual_seed(0)
    build = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = build(weights=None, weights_backbone=None, num_classes=5, box_score_thresh=0.0).eval()
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 80)]
    with torch.no_grad():
        want = model(images)
        monkeypatch.setattr(poolers, "roi_align", roi_align)
        actual = model(images)
    assert all(len(detections["boxes"]) > 10 for detections in want)
    torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [2, -1])
@pytest.mark.parametrize("C", [16, 256])
def test_the_same_bits_in_every_run(sampling_ratio, C):
    boxes = torch.tensor(BOXES).repeat(10, 1) * torch.tensor([1, 1.5, 1.5, 1.5, 1.5])
    upstream, threads, runs = torch.randn(60, C, 7, 7), torch.get_num_threads(), []
    features = torch.randn(2, C, 40, 40)
    try:
        for number in (1, 2, 2, 2, 3):
            torch.set_num_threads(number)
            leaf = features.clone().requires_grad_()
            result = roi_align(leaf, boxes, 7, sampling_ratio=sampling_ratio)
            runs.append((result.detach(), *torch.autograd.grad(result, leaf, upstream)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("sampling_ratio", [2, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_once(sampling_ratio, dtype):
    features = torch.randn(2, 3, 12, 15).to(dtype)
    wide = roi_align(features.float(), torch.tensor(BOXES), 3, sampling_ratio=sampling_ratio)
    actual = roi_align(features, torch.tensor(BOXES), 3, sampling_ratio=sampling_ratio)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, wide.to(dtype))


@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_edges(sampling_ratio):
    features = torch.randn(2, 3, 4, 5)
    assert roi_align(features, torch.zeros(0, 5), 2, sampling_ratio=sampling_ratio).shape == (0, 3, 2, 2)
    assert roi_align(features, [torch.zeros(0, 4)] * 2, 2, sampling_ratio=sampling_ratio).shape == (0, 3, 2, 2)
    bad = torch.tensor([[0, 3.0, 3.0, 1.0, 1.0], [1, math.nan, 0.0, 2.0, 2.0]])
    assert not roi_align(features, bad, 2, sampling_ratio=sampling_ratio, aligned=True).any()


def test_an_adaptive_box_needs_no_map_of_its_own():
    """Two maps of 8 MB and 2,000 boxes, whose maps would be 16 GB; in the order given, from either image."""
    maps = torch.zeros(2, 1, 1024, 2048) + torch.tensor([1.0, 2.0])[:, None, None, None]
    maps.requires_grad_()
    image = torch.arange(2000) % 2
    boxes = torch.tensor([3.0, 3.0, 7.0, 7.0]).expand(2000, 4)
    bins = roi_align(maps, torch.cat([image[:, None].float(), boxes], 1), 1)
    assert torch.equal(bins[:, 0, 0, 0], image + 1.0)
    (grad,) = torch.autograd.grad(bins.sum(), maps)
    torch.testing.assert_close(grad.sum((1, 2, 3)), torch.full((2,), 1000.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 4, 5)}, ValueError, r"roi_align: input must be \[B, C, H, W\]"),
        ({"input": torch.zeros(1, 3, 4, 5, dtype=torch.int64)}, TypeError, "roi_align: input must be float32"),
        ({"input": torch.zeros(1, 3, 0, 5)}, ValueError, "with at least one cell, got"),
        (
            {"boxes": torch.zeros(2, 3)},
            ValueError,
            r"boxes must be \[R, 5\], or a list of B \[n_b, 4\] with B = 1, got",
        ),
        (
            {"boxes": torch.zeros(1, 2, 4)},
            ValueError,
            r"boxes must be \[R, 5\], or a list of B \[n_b, 4\] with B = 1, got",
        ),
        (
            {"boxes": [torch.zeros(2, 5)]},
            ValueError,
            r"boxes must be \[R, 5\], or a list of B \[n_b, 4\] with B = 1, got",
        ),
        ({"boxes": [torch.zeros(2, 4).tolist()]}, TypeError, r"boxes must be a tensor or tensors \[R, 5\], or"),
        ({"boxes": torch.tensor([[1.0, 0, 0, 1, 1]])}, ValueError, r"batch index must be in \[0, 1\), got 1"),
        ({"boxes": torch.tensor([[0.0, 0, 0, 1e6, 1]])}, ValueError, "at most 4096 cells a bin and side"),
        ({"output_size": 0}, ValueError, "output_size must be an integer or a pair"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be a finite number above 0, got 0.0"),
        ({"sampling_ratio": 1.5}, ValueError, "sampling_ratio must be an integer, got 1.5"),
        ({"sampling_ratio": True}, ValueError, "sampling_ratio must be an integer, got True"),
    ],
)
@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_rejects_bad_input(change, error, message, sampling_ratio):
    if "4096" in message and sampling_ratio > 0:
        pytest.skip("only an adaptive bin may have too many cells")
    arguments = {"input": torch.zeros(1, 3, 4, 5), "boxes": torch.tensor([[0.0, 0, 0, 2, 2]]), "output_size": 2}
    with pytest.raises(error, match=f"^roi_align: .*{message.removeprefix('roi_align: ')}"):
        ops_compat.roi_align(**{**arguments, "sampling_ratio": sampling_ratio, **change})
