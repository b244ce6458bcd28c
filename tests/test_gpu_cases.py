"""The cases that test_gpu.py and compute-sanitizer run, without a GPU: what they ask is possible, and `cpu` does it."""

import gpu_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evad_kernels import _backend, ops_compat, use_backend
from evad_kernels.pyramid_roi_align import level_of

GROUPS = {"cases": gpu_cases.cases, "hostile": gpu_cases.hostile, "forms": gpu_cases.forms}


def by_backend(case):
    """Outputs and gradients by `cpu` and by `reference`."""
    if (reason := _backend.MISSING["cpu"]) is not None:
        pytest.skip(f"backend cpu: {reason}")
    results = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            results.append(gpu_cases.step(case, gpu_cases.on("cpu", case)))
    return results


def assert_equal(case, tolerance, results=None):
    """Outputs and gradients, the first ``results`` of them."""
    for got, want in zip(*(all_of[:results] for all_of in by_backend(case)), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("group", GROUPS)
def test_no_op_is_left_out(group):
    drawn = GROUPS[group](torch.float32)
    assert {gpu_cases.op_of(name) for name in drawn} == set(_backend.IMPLEMENTED)


@pytest.mark.parametrize("name", gpu_cases.forms(torch.float32))
def test_forms(name):
    results = 1 if name in gpu_cases.NEARLY_EQUAL_BINS else None
    assert_equal(gpu_cases.forms(torch.float32)[name], 1e-4, results)


@pytest.mark.parametrize("name", gpu_cases.hostile(torch.float32))
def test_hostile(name):
    case = gpu_cases.hostile(torch.float32)[name]
    if any(x.dtype == torch.int64 for x in case.tensors) or "[R, 5]" in name:  # a CPU says so, a GPU leaves it out
        with pytest.raises(ValueError, match=r"must be in \[0, "):
            by_backend(case)
    else:
        assert_equal(case, 1e-5)


@pytest.mark.parametrize("name", [name for name in gpu_cases.cases(B=1, N=112) if "," in name])
def test_other_forms_of_boxes_and_fill(name):
    assert_equal(gpu_cases.cases(torch.float32, B=2, N=224)[name], 1e-4)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("op", gpu_cases.BOXES)
def test_chance(op, seed):
    assert_equal(gpu_cases.chance(op, seed), 2e-4)


class DividesLikeAGPU(TorchDispatchMode):
    """On a GPU torch divides by a Python number by multiplying with its reciprocal: one more rounding."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor) and args[0].is_floating_point():
            return args[0] * torch.tensor(1 / args[1], dtype=args[0].dtype)
        return op(*args, **(kwargs or {}))


def test_box_arithmetic_rounds_on_a_gpu_as_on_a_cpu():
    """Where a sample lies, on which level, and how many there are: steps that one rounding decides."""
    features = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0.0, 0, 0, side, side] for side in range(1, 64)])
    sides = torch.tensor([56.0, 112, 224, 448])[:, None] * (1 + torch.arange(-8, 9) * 2.0**-24)
    corners = torch.nn.functional.pad(sides.flatten()[:, None].expand(-1, 2), (2, 0))
    rule = {"first": 2, "count": 4, "canonical_level": 4}

    def results():
        yield from (ops_compat.roi_align(features, boxes, 7, sampling_ratio=-1, aligned=x) for x in (True, False))
        yield ops_compat.roi_align(features, boxes, 7, sampling_ratio=3)
        yield from (level_of(corners, canonical_size=size, **rule) for size in (224, 96))

    with use_backend("reference"):
        want = list(results())
        with DividesLikeAGPU():
            assert not torch.equal(boxes / 7, boxes / boxes.new_full((), 7))  # the mode works
            assert all(map(torch.equal, results(), want))


def test_a_backend_that_is_missing_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(_backend.MISSING, "cuda", "built without nvcc")
    assert gpu_cases.main("cuda", "keyframe_attention") == 0  # that has no CUDA kernel anywhere
    assert gpu_cases.main("cuda", "keyframe_attention", "select_tokens") == 1
    assert "select_tokens: backend cuda: built without nvcc" in capsys.readouterr().out
