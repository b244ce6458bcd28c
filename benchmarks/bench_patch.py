"""Patched vision transformers against the same models unpatched, and against eager pruning as in EViT.

Models are Hugging Face's, weights are random. So the agreement with the unpatched model says how far pruning moves the
outputs of such a network, and nothing about accuracy on images.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import evad_kernels
from benchmarks._harness import Contestants, Goal, draw, significant
from benchmarks.ceilings import Work
from evad.profile import bfloat16_is_slow
from evad_kernels import patch

TOME = (
    "not run (CC-BY-NC); published: 511 instead of 309 images/s, 1.65x, for ViT-B/16 at r = 13 on a V100 "
    "(README of facebookresearch/ToMe at 049a705)"
)
CASES = {
    f"{dtype} {model} B{B}, {schedule}": {"model": model, "B": B, "schedule": schedule, "dtype": dtype}
    for dtype, model, B, schedule in (
        ("bfloat16", "ViT-B/16 224", 8, "3 x 0.7"),
        ("bfloat16", "ViT-B/16 448", 2, "3 x 0.7"),
        ("bfloat16", "VideoMAE-B", 1, "3 x 0.7"),
        ("bfloat16", "ViT-B/16 224", 8, "13 a block"),
        ("float32", "ViT-B/16 224", 8, "3 x 0.7"),
        ("float32", "ViT-B/16 448", 2, "3 x 0.7"),
        ("float32", "VideoMAE-B", 1, "3 x 0.7"),
    )
}


def create(model: str) -> torch.nn.Module:
    import transformers  # takes seconds

    torch.manual_seed(0)
    if model == "VideoMAE-B":
        return transformers.VideoMAEModel(transformers.VideoMAEConfig()).eval()
    config = transformers.ViTConfig(image_size=int(model.split()[1]))
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def views(model: str, B: int, seed: int) -> torch.Tensor:
    """Blurred noise: images with some structure, or clips in which it drifts."""
    if model == "VideoMAE-B":
        still = draw(B, 3, 18, 18, seed=seed, dtype=torch.float32, device="cpu")
        large = F.interpolate(still, (288, 288), mode="bicubic")
        return torch.stack([large[..., 4 * t : 4 * t + 224, 2 * t : 2 * t + 224] for t in range(16)], dim=1)
    side = int(model.split()[1])
    return F.interpolate(draw(B, 3, 14, 14, seed=seed, dtype=torch.float32, device="cpu"), (side, side), mode="bicubic")


def rates(schedule: str, num_tokens: int) -> float | dict[int, float]:
    """``keep_rate`` of a patch: "3 x 0.7" is the default; "13 a block" leaves as many tokens as ToMe with r = 13."""
    if schedule == "3 x 0.7":
        return 0.7
    left = [num_tokens - 13 * block for block in range(13)]
    return {block: (left[block + 1] - 0.5) / left[block] for block in range(12)}  # rounded up to whole tokens


def evit(query, key, value, *, num_keyframe, num_select, keyframe_weight, scale):
    """EViT (Liang et al., ICLR 2022) in plain PyTorch: the whole map, its class token's row, topk; nothing is fused.

    A VideoMAE has no class token: the mean of all rows.
    """
    attention = (query * scale @ key.transpose(-1, -2)).softmax(-1)
    received = attention[:, :, 0] if num_keyframe == 1 else attention.mean(2)
    importance = received.mean(1)[:, num_keyframe:]
    index = importance.topk(num_select).indices
    return gather(attention @ value, index, num_keyframe), index, importance


def gather(rows, index, num_keyframe):
    """The first rows and those that ``index`` counts after them; rows [B, N], [B, N, C] or [B, H, N, D]."""
    first = torch.arange(num_keyframe, device=index.device).expand(index.shape[0], -1)
    index = torch.cat([first, index + num_keyframe], dim=1)
    axis = max(rows.ndim - 2, 1)
    return rows.take_along_dim(index.view(index.shape[0], *[1] * (axis - 1), -1, *[1] * (rows.ndim - 1 - axis)), axis)


@contextlib.contextmanager
def eager_pruning():
    """A patched model prunes by plain PyTorch."""
    kernels = patch.keyframe_attention_topk, patch.gather_tokens
    patch.keyframe_attention_topk = evit
    patch.gather_tokens = lambda tokens, index, *, num_keyframe: gather(tokens, index, num_keyframe)
    try:
        yield
    finally:
        patch.keyframe_attention_topk, patch.gather_tokens = kernels


def build(device, model, B, schedule, dtype):
    dtype = getattr(torch, dtype)
    plain, pruned = (create(model).to(device, dtype) for _ in range(2))
    if model == "VideoMAE-B":  # its codes stay on the CPU: each call would wait for a copy, and no graph hold one
        for vit in (plain, pruned):
            vit.embeddings.position_embeddings = vit.embeddings.position_embeddings.to(device, dtype)
    num_tokens = 1568 if model == "VideoMAE-B" else (int(model.split()[1]) // 16) ** 2 + 1
    patch.transformers(pruned, rates(schedule, num_tokens))
    inputs = views(model, B, seed=1).to(device, dtype)

    def ours(x=inputs):
        return pruned(x).last_hidden_state

    def unpatched(x=inputs):
        return plain(x).last_hidden_state

    def eager(x=inputs):
        with eager_pruning():
            return ours(x)

    def check():
        """In float32, against the reference: the same tokens, the same features."""
        pruned.float()
        results = []
        for backend in ("auto", "reference"):
            with evad_kernels.use_backend(backend), patch.record(pruned) as kept:
                results.append((ours(inputs[:1].float()), kept))
        pruned.to(dtype)
        (got, kept), (expected, expected_kept) = results
        assert len(kept) == len(expected_kept) > 0
        for position, want in zip(kept, expected_kept, strict=True):
            torch.testing.assert_close(position, want, rtol=0, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)

    with evad_kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        ours()
    rivals = {"unpatched": unpatched, "EViT, eager": eager}
    if schedule == "13 a block":
        rivals["ToMe"] = TOME
    return Contestants(ours, rivals, check, Work(flops=counter.get_total_flops(), dtype=dtype))


def agreement(contestants, device, model, dtype):
    """Cosine of the features that a classifier sees, and how often a random classifier answers as unpatched."""
    samples = [sample.to(device, getattr(torch, dtype)) for sample in views(model, 8, seed=2).split(1)]
    classifier = draw(768, 1000, seed=3, dtype=torch.float32, device=device)

    def features(forward):
        rows = [forward(sample).float() for sample in samples]
        return torch.cat([x.mean(1) if model == "VideoMAE-B" else x[:, 0] for x in rows])

    want = features(contestants.rivals["unpatched"])
    answers = {}
    for name, forward in (("ours", contestants.ours), ("EViT, eager", contestants.rivals["EViT, eager"])):
        got = features(forward)
        alike = ((got @ classifier).argmax(1) == (want @ classifier).argmax(1)).float().mean().item()
        cosine = F.cosine_similarity(got, want).mean().item()
        answers[name] = {"cosine": significant(cosine), "top-1": significant(alike)}
    return {"agreement": answers}


@pytest.mark.parametrize("case", CASES)
def bench_forward(contest, case):
    pytest.importorskip("transformers", reason="transformers is not installed")
    if CASES[case]["dtype"] == "bfloat16" and bfloat16_is_slow(contest.device):
        pytest.skip("torch has no fast bfloat16 on this CPU")
    contest.run(
        "patched ViT",
        case,
        build,
        CASES[case],
        goals=(Goal("speed-up", 1, "unpatched"), Goal("speed-up", 1, "EViT, eager")),
        headline=CASES[case]["schedule"] == "3 x 0.7",
        describe=lambda contestants: agreement(contestants, contest.device, CASES[case]["model"], CASES[case]["dtype"]),
        seconds=8.0,
    )
