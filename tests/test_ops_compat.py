"""torchvision's RoIAlign: against its definition, sample by sample, and against itself where it imports."""

import math

import pytest
import torch

from evad_kernels import ops_compat
from evad_kernels.ops_compat import RoIAlign, roi_align

BOXES = [  # batch, x1, y1, x2, y2: inside, over the edge, outside, less than a cell, one side reversed
    [0, 1.0, 2.0, 9.0, 11.5],
    [1, -3.0, -2.0, 6.0, 5.0],
    [0, 30.0, 30.0, 40.0, 44.0],
    [1, 4.2, 4.2, 4.6, 4.9],
    [0, 0.0, 0.0, 22.0, 18.0],
]
CASES = {
    "two samples": {"sampling_ratio": 2},
    "two samples, aligned": {"sampling_ratio": 2, "aligned": True},
    "adaptive": {"sampling_ratio": -1},
    "adaptive, aligned": {"sampling_ratio": 0, "aligned": True},
    "scaled": {"spatial_scale": 0.5, "sampling_ratio": 3, "aligned": True},
    "scaled, adaptive": {"spatial_scale": 0.5},
}


def bilinear(plane, y, x):
    H, W = plane.shape
    if not (-1 <= y <= H and -1 <= x <= W):
        return 0.0
    y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
    top, left = min(int(y), max(H - 2, 0)), min(int(x), max(W - 2, 0))
    bottom, right = min(top + 1, H - 1), min(left + 1, W - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * plane[top, left] + dx * plane[top, right]
    return float((1 - dy) * upper + dy * ((1 - dx) * plane[bottom, left] + dx * plane[bottom, right]))


def expected(features, boxes, size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """The definition, one sample after the other, in float64."""
    oh, ow = size
    result = torch.zeros(len(boxes), features.shape[1], oh, ow, dtype=torch.float64)
    shift = 0.5 if aligned else 0.0
    for r, (b, *corners) in enumerate(boxes):
        x1, y1, x2, y2 = (corner * spatial_scale - shift for corner in corners)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        rows = sampling_ratio if sampling_ratio > 0 else max(math.ceil(height / oh), 1)
        columns = sampling_ratio if sampling_ratio > 0 else max(math.ceil(width / ow), 1)
        for c, plane in enumerate(features[int(b)].double()):
            for p in range(oh):
                for q in range(ow):
                    samples = [
                        bilinear(
                            plane,
                            y1 + (p + (i + 0.5) / rows) * height / oh,
                            x1 + (q + (j + 0.5) / columns) * width / ow,
                        )
                        for i in range(rows)
                        for j in range(columns)
                    ]
                    result[r, c, p, q] = sum(samples) / len(samples)
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


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_matches_torchvision(case, contiguous):
    try:
        from torchvision.ops import roi_align as theirs
    except (ImportError, RuntimeError) as error:  # one built for another torch raises RuntimeError
        pytest.skip(f"torchvision does not import: {type(error).__name__}")
    features = torch.randn(2, 5, 12, 15, dtype=torch.float64)
    features = features if contiguous else features.permute(0, 1, 3, 2)
    grads = []
    for function in (roi_align, theirs):
        leaf = features.clone().requires_grad_()
        for boxes in (torch.tensor(BOXES), [torch.tensor(BOXES)[:2, 1:], torch.tensor(BOXES)[2:, 1:]]):
            boxes = boxes.double() if isinstance(boxes, torch.Tensor) else [part.double() for part in boxes]
            result = function(leaf, boxes, (3, 4), **CASES[case])
            result.square().sum().backward()
            grads.append((result.detach(), leaf.grad.clone()))
    for ours, want in zip(grads[:2], grads[2:], strict=True):
        torch.testing.assert_close(ours, want)


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 4, 5)}, ValueError, r"roi_align: input must be \[B, C, H, W\]"),
        ({"input": torch.zeros(1, 3, 4, 5, dtype=torch.int64)}, TypeError, "roi_align: input must be float32"),
        ({"input": torch.zeros(1, 3, 0, 5)}, ValueError, "with at least one cell, got"),
        ({"boxes": torch.zeros(2, 3)}, ValueError, "boxes must be"),
        ({"boxes": torch.tensor([[1.0, 0, 0, 1, 1]])}, ValueError, r"batch index must be in \[0, 1\), got 1"),
        ({"boxes": torch.tensor([[0.0, 0, 0, 1e6, 1]])}, ValueError, "at most 4096 cells a bin and side"),
        ({"output_size": 0}, ValueError, "output_size must be an integer or a pair"),
        ({"spatial_scale": 0.0}, ValueError, "spatial_scale must be a finite number above 0, got 0.0"),
        ({"sampling_ratio": 1.5}, ValueError, "sampling_ratio must be an integer, got 1.5"),
    ],
)
def test_rejects_bad_input(change, error, message):
    arguments = {"input": torch.zeros(1, 3, 4, 5), "boxes": torch.tensor([[0.0, 0, 0, 2, 2]]), "output_size": 2}
    with pytest.raises(error, match=message):
        ops_compat.roi_align(**{**arguments, **change})
