import pytest
import torch

from evad_kernels import _backend, keyframe_attention, keyframe_attention_topk, use_backend
from evad_kernels.testing import DTYPES, assert_accurate, gradients

# name: (B, H, N, D, num_keyframe, num_select, keyframe_weight)
CASES = {
    "odd": (2, 3, 63, 16, 10, 20, 3.0),
    "one token": (1, 1, 1, 8, 0, 1, 1.0),
    "no keyframe": (1, 2, 111, 4, 0, 50, 1.0),
    "all keyframe": (2, 1, 200, 80, 200, 0, 2.0),
    "more than a task": (1, 2, 301, 64, 49, 150, 4.0),
}
ISAS = ("baseline", "avx2", "avx512", "amx")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs a test once an instruction set that this machine has."""
    native = _backend.native
    if native is None or ISAS.index(request.param) > ISAS.index(native.detected_isa()):
        pytest.skip(f"this machine or build has no {request.param}")
    before = native.cpu_isa()
    native.set_isa_cap(request.param)
    yield request.param
    native.set_isa_cap(before)


def make(case, dtype=torch.float32, seed=0):
    """query, key and value, views of one [B, N, 3, H, D] tensor, and the op's keywords."""
    B, H, N, D, num_keyframe, num_select, keyframe_weight = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, N, 3, H, D, generator=generator, dtype=torch.float64).to(dtype)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    keywords = {"num_keyframe": num_keyframe, "keyframe_weight": keyframe_weight}
    return (query, key, value), keywords, num_select


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradient(isa, case, dtype):
    inputs, keywords, num_select = make(case, dtype)

    def everything(*qkv):
        return keyframe_attention(*qkv, **keywords)

    def output_only(*qkv):
        return keyframe_attention(*qkv, **keywords).output

    def topk(*qkv):
        return keyframe_attention_topk(*qkv, num_select=num_select, **keywords)

    def topk_output_only(*qkv):
        return keyframe_attention_topk(*qkv, num_select=num_select, **keywords).output

    for run in (everything, output_only, topk, topk_output_only):
        outputs, grads = gradients(run, inputs)
        with use_backend("reference"):
            reference_outputs, reference_grads = gradients(run, inputs)
            true_outputs, true_grads = gradients(run, [x.double() for x in inputs])
        for i, three in enumerate(zip(outputs, reference_outputs, true_outputs, strict=True)):
            if three[0].dtype == torch.int64:
                assert torch.equal(three[0], three[2])
            else:
                assert_accurate(*three, label=f"{run.__name__} output {i}")
        labels = ("grad_query", "grad_key", "grad_value")
        for label, *three in zip(labels, grads, reference_grads, true_grads, strict=True):
            assert_accurate(*three, label=f"{run.__name__} {label}")
