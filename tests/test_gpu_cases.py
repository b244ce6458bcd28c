"""The cases that test_gpu.py and compute-sanitizer run, without a GPU: what they ask is possible, and `cpu` does it."""

import gpu_cases
import pytest
import torch

from evad_kernels import _backend, use_backend

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
