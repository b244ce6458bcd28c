"""Inference never waits for the device, whatever the machine: no value is read back, no shape depends on data, nothing
is copied there but the clips. A training step waits for it once, for the matching.

The detector runs on meta tensors, which have shapes and no values: reading one raises. What would be a copy from the
CPU is seen because a CPU tensor then takes part.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evad_kernels
from evad import EVAD, EVADConfig
from evad.detector import EVADOutput, score_detections, select_detections

FROM_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray, torch.Tensor.new_tensor)
READ_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class Values(TorchFunctionMode):
    """Refuses tensors made of Python's numbers: on a GPU each is a copy from the host."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in FROM_HOST, func
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Refuses operations that a CUDA graph could not hold."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func._schema.name.partition("::")[2]
        result = func(*args, **(kwargs or {}))
        assert not name.startswith(READ_BACK), name
        assert not name.startswith("index") or all(x.dtype != torch.bool for x in tree_leaves(args[1]) if x is not None)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in tensors), f"{name}: a tensor on the CPU takes part"
        return result


@contextmanager
def on_device():
    with Values(), Operations() as operations:
        yield operations


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.fixture(params=["auto", "reference"])
def any_backend(request, monkeypatch):
    """The ops as opaque kernels, and as the plain PyTorch that a GPU runs until the kernels are chosen there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    with evad_kernels.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("rate", [0.7, 1.0])
@pytest.mark.parametrize("token_order", ["position", "importance"])
@pytest.mark.parametrize("blank", ["mask_token", "zeros"])
def test_inference_never_waits(any_backend, rate, token_order, blank):
    model = on_meta(lambda: EVAD(EVADConfig.tiny(rate, token_order=token_order, blank=blank)).eval())
    clips = torch.empty(2, 3, 16, 90, 130, device="meta")  # padded
    with torch.no_grad(), on_device() as operations:
        for given in (clips, [clips[0], clips[1, :, :, :50]]):
            output = model(given)
            scored = score_detections(output, [clip.shape[-2:] for clip in given])
            assert [list(x.shape) for x in scored] == [[2, 12, 4], [2, 12], [2, 12, model.config.num_classes]]
        model(clips, [torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")])  # another detector's boxes
    assert operations.calls > 1000


@pytest.mark.parametrize(
    "fields", [{"pruning": "random"}, {"keep_keyframe": False}, {"decoder_input": "all"}, {"decoder_depth": 0}]
)
def test_ablations_never_wait(fields):
    model = on_meta(lambda: EVAD(EVADConfig.tiny(0.7, **fields)).eval())
    with torch.no_grad(), on_device():
        model(torch.empty(2, 3, 16, 90, 130, device="meta"))


@pytest.mark.parametrize("preset", ["vit_b", "vit_l"])
def test_no_shape_depends_on_data(preset):
    """The whole of a paper's model as one graph without a symbol."""
    model = on_meta(lambda: EVAD(getattr(EVADConfig, preset)(0.7)).eval())
    with torch.no_grad(), on_device():
        output = model(torch.empty(8, 3, 16, 288, 512, device="meta"))
    tokens = 8 * 18 * 32
    for kept in output.kept:
        tokens = -(-tokens * 7 // 10)
        assert kept.shape == (8, tokens)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_waits_once(monkeypatch, recompute):
    """All stages and clips are matched after one copy to the host; forward, losses and backward make no other."""
    copied = {"from host": [], "to host": []}

    def download(tensor):
        copied["to host"].append(list(tensor.shape))
        return torch.zeros(tensor.shape)

    class Transfers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func._schema.name.partition("::")[2]
            result = func(*args, **(kwargs or {}))
            assert not name.startswith(READ_BACK), name
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            here, there = (any(x.device.type == device for x in tensors) for device in ("cpu", "meta"))
            made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            if here and not there and any(x.device.type == "meta" for x in made):
                copied["from host"].append(list(made[0].shape))
            assert not (here and there), f"{name}: a tensor on the CPU takes part"
            return result

    monkeypatch.setattr(torch.Tensor, "cpu", download)
    monkeypatch.setattr(torch, "get_device_module", lambda device: torch.cpu)  # what recomputation asks meta for
    model = on_meta(lambda: EVAD(EVADConfig.tiny(0.7, num_classes=9)).train())
    model.set_recomputation(recompute)
    clips = torch.empty(2, 3, 16, 90, 130, device="meta")
    targets = [{"boxes": torch.rand(number, 4) * 90, "labels": torch.ones(number, 9)} for number in (3, 1)]
    with Transfers():
        model.loss(clips, targets)["loss_total"].backward()
    stages, proposals = model.config.num_stages, model.config.num_proposals
    assert copied["to host"] == [[stages, 2, proposals, 3]]
    assert copied["from host"] == [[4, 4], [4, 9], [stages, 4, 3]]  # boxes, labels, who answers for whom
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: 1 if (x > 0).any() else 0,
        lambda x: x + torch.tensor([1.0], device=x.device),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_the_proof_sees_offences(offence):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), on_device():
        offence(torch.empty(3, device="meta"))


def test_scores_are_what_detections_are_selected_from():
    torch.manual_seed(0)
    sizes = [(70, 101), (96, 96)]
    output = EVADOutput(torch.randn(2, 5, 2), 200 * torch.rand(2, 5, 4) - 50, torch.randn(2, 5, 7), ())
    scored = score_detections(output, sizes)
    for detections, again in zip(select_detections(output, sizes), select_detections(scored, sizes), strict=True):
        assert_close(detections, again, atol=0, rtol=0)
    everyone = select_detections(output, sizes, 0.0)
    for clip, (height, width) in enumerate(sizes):
        assert_close(everyone[clip], type(everyone[clip])(*(x[clip] for x in scored)), atol=0, rtol=0)
        assert (scored.boxes[clip] <= torch.tensor([width - 1, height - 1] * 2)).all() and (scored.boxes >= 0).all()
