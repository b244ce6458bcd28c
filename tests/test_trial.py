"""Kernels that no GPU has run yet: ``auto`` tries them before it takes them; here in Triton's interpreter."""

import contextlib
import threading
import types
import warnings

import pytest
import torch

import evad_kernels
from evad_kernels import _backend, _trial, scatter_tokens, use_backend
from evad_kernels._triton import launch

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not _backend.INTERPRETED, reason="runs where Triton interprets")


@pytest.fixture
def on_trial(monkeypatch):
    """Triton's kernels serve the CPU alone, and no trial was held."""
    monkeypatch.setattr(_backend, "_verdicts", {})
    for op in _backend.IMPLEMENTED:
        monkeypatch.setitem(_backend.IMPLEMENTED, op, ("triton",))


def call(**how):
    tokens = torch.arange(6.0, **how).view(1, 2, 3)
    return scatter_tokens(tokens, torch.tensor([[3, 1]]), grid=(1, 2, 3))


def broken(*_, **__):
    raise RuntimeError("an illegal instruction")


def counted(monkeypatch, module):
    """A list that grows by one with each launch of a module."""
    launches = []

    def count(*arguments, **options):
        launches.append(arguments[0])
        launch(*arguments, **options)

    monkeypatch.setattr(module, "launch", count)
    return launches


@interpreted
@pytest.mark.parametrize("op", _backend.IMPLEMENTED)
def test_kernels_pass(op, on_trial):
    dtype = torch.float32 if op.startswith("keyframe_attention") else torch.bfloat16  # the interpreter's limit
    assert _backend._passes(op, "triton", CPU, dtype), _backend._verdicts


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_what_is_only_copied_has_a_case(dtype, on_trial):
    assert _trial.failure("gather_tokens", CPU, dtype) is None


@pytest.mark.parametrize("op", _backend.IMPLEMENTED)
def test_a_wrong_result_or_gradient_fails(op, monkeypatch):
    """Each result that an op has, off by a hundredth."""
    step, at = _trial._step, []

    def wrong(run, function, tensors, leaves, dtype):
        results = step(run, function, tensors, leaves, dtype)
        if function is getattr(evad_kernels, op):
            result = results[at[0]].detach()
            results[at[0]] = result * 1.01 + 0.01 if result.is_floating_point() else result + 1
        return results

    monkeypatch.setattr(_trial, "_step", wrong)
    tensors, leaves, run = _trial.case(op, torch.float32)
    results = step(run, _trial._reference(op), tensors, leaves, torch.float32)
    for number in range(len(results)):
        at[:] = [number]
        assert f"result {number}" in _trial.failure(op, CPU, torch.float32)


@interpreted
def test_auto_takes_what_passed_and_tries_it_once(on_trial, monkeypatch):
    from evad_kernels import scatter_tokens_triton

    launches = counted(monkeypatch, scatter_tokens_triton)
    with warnings.catch_warnings(), torch.inference_mode(), torch.autocast("cpu"):
        warnings.simplefilter("error")
        first = call()
        tried = len(launches)
        assert torch.equal(first, call()) and len(launches) == tried + 1 and tried > 2
    with use_backend("reference"):
        assert torch.equal(first, call())
    assert list(_backend._verdicts.values()) == [None]
    assert evad_kernels.backends()["scatter_tokens"]["triton"] == _backend.UNTESTED


@interpreted
def test_auto_leaves_alone_what_failed(on_trial, monkeypatch):
    from evad_kernels import scatter_tokens_triton

    monkeypatch.setattr(scatter_tokens_triton, "launch", broken)
    with pytest.warns(
        UserWarning, match=r"scatter_tokens: the triton kernels failed .* an illegal instruction"
    ) as seen:
        results = [call() for _ in range(3)]
    assert len(seen) == 1 and seen[0].filename == __file__
    with use_backend("reference"):
        assert all(torch.equal(result, call()) for result in results)
    assert "an illegal instruction" in evad_kernels.backends()["scatter_tokens"]["triton"]
    with use_backend("triton"), pytest.raises(RuntimeError, match="an illegal instruction"):
        call()


@interpreted
@pytest.mark.parametrize("works", [True, False])
def test_torch_compile_holds_the_trial_while_it_traces(works, on_trial, monkeypatch):
    from evad_kernels import scatter_tokens_triton

    if not works:
        monkeypatch.setattr(scatter_tokens_triton, "launch", broken)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(call, fullgraph=True, backend=keep, dynamic=False)()
    assert torch.equal(compiled, call())
    assert ("torch.ops.evad_kernels" in graphs[0].code) == works


def test_no_trial_in_a_backward(on_trial, monkeypatch):
    """On a GPU the trial's backward would wait for the thread that waits for the trial."""
    monkeypatch.setattr(_backend, "_try", broken)
    x = torch.ones(1, requires_grad=True)
    chosen = []
    x.register_hook(lambda gradient: chosen.append(_backend.choose("scatter_tokens", gradient)))
    x.sum().backward()
    assert chosen == ["reference"] and not _backend._verdicts


@interpreted
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_trial_that_breaks_off(error, on_trial, monkeypatch):
    """Where memory was short it is held again; anything else is a failure."""

    def fail(*_):
        raise error

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(_trial, "failure", fail)
        call()
    again = error is torch.OutOfMemoryError
    call()
    assert (None in _backend._verdicts.values()) == again and not _backend._trying and not _backend._trials.locked()


def test_pyramid_case_has_boxes_of_every_level():
    *levels, boxes = _trial.case("pyramid_roi_align", torch.float32).tensors
    assert len(levels) == 4
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    assert set((4 + (area.sqrt() / 32).log2()).floor().clamp(2, 5).int().flatten().tolist()) == {2, 3, 4, 5}


@interpreted
def test_other_threads_go_on_while_one_tries(on_trial, monkeypatch):
    """The trial's choice of a backend is its thread's alone."""
    seen = []
    failure = _trial.failure

    def watched(*arguments):
        assert _backend._asked() == "triton"
        thread = threading.Thread(target=lambda: seen.append(_backend._asked()))
        thread.start()
        thread.join()
        return failure(*arguments)

    monkeypatch.setattr(_trial, "failure", watched)
    call()
    assert seen == ["auto"] and _backend._asked() == "auto" and list(_backend._verdicts.values()) == [None]


def test_no_trial_in_a_capture_or_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_backend, "_verdicts", {})
    monkeypatch.setattr(_backend, "_try", broken)
    monkeypatch.setitem(_backend.MISSING, "triton", None)
    monkeypatch.setitem(_backend.DEVICE, "triton", "cuda")
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    for available, capturing in ((False, False), (True, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with pytest.warns(UserWarning, match="plain PyTorch is captured") if capturing else contextlib.nullcontext():
            assert _backend.choose("scatter_tokens", on_gpu) == "reference"
    assert not _backend._verdicts
