"""What is special to the tile kernels: blocks of 32 rows and keys, widths padded to 32, two bfloat16 a probability."""

import pytest
import torch

from evad_kernels import _backend, keyframe_attention, keyframe_attention_topk, use_backend
from evad_kernels.testing import assert_accurate, gradients

native = _backend.native
pytestmark = pytest.mark.skipif(
    native is None or native.detected_isa() != "amx", reason="this machine or build has no AMX"
)


def make(B, H, N, D, query_scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(B, H, N, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.bfloat16() for x in (query_scale * query, key, value)]


def check(run, inputs):
    outputs, grads = gradients(run, inputs)
    with use_backend("reference"):
        reference_outputs, reference_grads = gradients(run, inputs)
        true_outputs, true_grads = gradients(run, [x.double() for x in inputs])
    labels = ("output", "importance", "grad_query", "grad_key", "grad_value")
    actual, reference = (*outputs, *grads), (*reference_outputs, *reference_grads)
    for label, *three in zip(labels, actual, reference, (*true_outputs, *true_grads), strict=True):
        assert_accurate(*three, label=label)
    return actual


# 289 begins a second task; 129 a second block of rows in the backward; N = 1 has a gradient of exactly zero.
@pytest.mark.parametrize("N", [1, 15, 16, 17, 31, 32, 33, 129, 289])
@pytest.mark.parametrize("D", [8, 40, 64])
def test_edges_of_blocks(N, D):
    check(lambda *qkv: keyframe_attention(*qkv, num_keyframe=N // 3, keyframe_weight=2.0), make(1, 2, N, D))


@pytest.mark.parametrize("D", [1, 7, 32, 72, 128, 256])
def test_widths(D):
    check(lambda *qkv: keyframe_attention(*qkv, num_keyframe=11), make(1, 1, 63, D))


# Logits that need no row maximum, that do in some rows, and that underflow in most places.
@pytest.mark.parametrize("query_scale", [0.01, 3.0, 6.0, 60.0])
def test_sizes_of_logits(query_scale):
    inputs = make(1, 2, 161, 64, query_scale)
    inputs[0][:, :, ::3] *= 0.1
    check(lambda *qkv: keyframe_attention(*qkv, num_keyframe=20), inputs)


def test_negative_scale():
    check(lambda *qkv: keyframe_attention(*qkv, num_keyframe=5, scale=-2.0), make(1, 1, 70, 24))


def test_rounds_as_the_reference_does():
    """One bfloat16 a probability would pass the rule of accuracy most times; two agree with the reference always."""
    for seed in range(20):
        inputs = make(1, 2, 63, 24, seed=seed)
        output = keyframe_attention(*inputs, num_keyframe=9).output
        truth = keyframe_attention(*(x.double() for x in inputs), num_keyframe=9).output
        assert (output.double() - truth).abs().max() <= 1.02 * (truth.bfloat16().double() - truth).abs().max()


def test_strides():
    """Views of one projection, rows at odd distances, give the same bits as contiguous tensors."""
    tensors = make(2, 3, 97, 40)
    wide = torch.full((2, 97, 3, 3 * 43), float("nan"), dtype=torch.bfloat16)

    def views(wide):
        return [wide[..., i * 43 : i * 43 + 40].permute(0, 2, 1, 3) for i in range(3)]

    for view, tensor in zip(views(wide), tensors, strict=True):
        view.copy_(tensor)
    wide.requires_grad_()
    strided = keyframe_attention(*views(wide), num_keyframe=12)
    outputs, grads = gradients(lambda *qkv: keyframe_attention(*qkv, num_keyframe=12), tensors)
    assert torch.equal(strided.output, outputs[0])
    assert torch.equal(strided.importance, outputs[1])
    generator = torch.Generator().manual_seed(0)  # as gradients draws
    arriving = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in strided]
    (grad_wide,) = torch.autograd.grad(list(strided), wide, arriving)
    for view, grad in zip(views(grad_wide), grads, strict=True):
        assert torch.equal(view, grad)


def test_same_bits_for_any_number_of_threads():
    inputs = make(2, 3, 353, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outputs, grads = gradients(lambda *qkv: keyframe_attention(*qkv, num_keyframe=40), inputs)
            results.append((*outputs, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("argument", range(3))
def test_not_finite_as_softmax(argument, value):
    for N in (1, 70):
        inputs = make(1, 2, N, 64)
        inputs[argument][0, 1, N // 2, 7] = value
        output, importance = keyframe_attention(*inputs, num_keyframe=N // 10)
        with use_backend("reference"):
            reference, reference_importance = keyframe_attention(*inputs, num_keyframe=N // 10)
        for a, b in ((output, reference), (importance, reference_importance)):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.isposinf(), b.isposinf())
            assert torch.equal(a.isneginf(), b.isneginf())


@pytest.mark.parametrize("query_scale", [0.01, 1.0, 4.0])
def test_selects_as_float64(query_scale):
    inputs = make(1, 4, 1583, 64, query_scale)
    index = keyframe_attention_topk(*inputs, num_keyframe=197, num_select=900).index
    true = keyframe_attention(*(x.double() for x in inputs), num_keyframe=197).importance
    kept = torch.zeros_like(true, dtype=torch.bool).scatter_(1, index, True)
    assert true[kept].min() >= true[~kept].max() * (1 - 1e-6)
