"""Options and fixtures of the whole test suite."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, so an output element that is never written is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs a test once a backend that this machine has."""
    import evad_kernels
    from evad_kernels import _backend

    if (reason := _backend.MISSING[request.param]) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with evad_kernels.use_backend(request.param):
        yield request.param
