"""The detector, one clip: pruned against unpruned, on our kernels against plain PyTorch and torch's SDPA."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import evad.backbone
import evad.localization
import evad_kernels
from benchmarks._boxes import draw_boxes
from benchmarks._harness import Contestants, Goal, draw
from benchmarks.bench_keyframe_attention import composite
from benchmarks.ceilings import Work
from evad import EVAD, EVADConfig

CASES = {
    "bfloat16 ViT-B 224": {"preset": "vit_b", "side": 224, "dtype": "bfloat16"},
    "float32 ViT-B 224": {"preset": "vit_b", "side": 224, "dtype": "float32"},
    "bfloat16 ViT-B 288": {"preset": "vit_b", "side": 288, "dtype": "bfloat16"},
}


@contextlib.contextmanager
def torch_attention():
    """The detector's attention is torch's: SDPA, and where it prunes a pass for the importance, topk and gather."""

    def plain(query, key, value, *, num_keyframe):
        return SimpleNamespace(output=F.scaled_dot_product_attention(query, key, value))

    def topk(query, key, value, *, num_keyframe, num_select, keyframe_weight):
        return composite(query, key, value, num_keyframe, num_select)

    kernels = SimpleNamespace(**{name: getattr(evad_kernels, name) for name in evad_kernels.__all__})
    kernels.keyframe_attention, kernels.keyframe_attention_topk = plain, topk
    callers = (evad.backbone, evad.localization)
    for module in callers:
        module.evad_kernels = kernels
    try:
        yield
    finally:
        for module in callers:
            module.evad_kernels = evad_kernels


def build(device, preset, side, dtype):
    torch.manual_seed(0)
    model = EVAD(getattr(EVADConfig, preset)(keep_rate=0.7)).to(device, getattr(torch, dtype)).eval()
    clips = draw(1, 3, model.config.num_frames, side, side, seed=1, dtype=getattr(torch, dtype), device=device)

    def forward(rate=0.7):
        model.set_keep_rate(rate)
        return model(clips)

    def on_reference(function):
        with evad_kernels.use_backend("reference"):
            return function()

    def on_torch_attention():
        with torch_attention():
            return forward()

    def check():
        """Part by part in float32, each from the same input.

        Not end to end: six localisation stages with random weights turn a rounding into pixels (NOTES.md).
        """
        model.float()
        encoded = model.encoder(clips.float())
        boxes = draw_boxes("people", 1, device)
        whwh = torch.full((1, 4), float(side), device=device)

        def parts():
            again = model.encoder(clips.float())
            stages = model.localization(model.pyramid(encoded.keyframes), whwh, every_stage=True)
            (actions,) = model.decoder(encoded, boxes, whwh, every_block=False)
            return again.kept, (again.tokens.x, *again.keyframes, stages.person_logits[0], stages.boxes[0], actions)

        (kept, ours), (expected, plain) = parts(), on_reference(parts)
        model.to(getattr(torch, dtype))
        for got, reference in zip(kept, expected, strict=True):
            torch.testing.assert_close(got, reference, rtol=0, atol=0)
        for got, reference in zip(ours, plain, strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)

    rivals = {
        "rate 1.0": lambda: forward(rate=1.0),
        "backend reference": lambda: on_reference(forward),
        "attention by torch's SDPA": on_torch_attention,
    }
    with FlopCounterMode(display=False) as counter:
        on_reference(forward)
    work = Work(flops=counter.get_total_flops(), dtype=getattr(torch, dtype))
    return Contestants(forward, rivals, check, work)


@pytest.mark.parametrize("case", CASES)
def bench_forward(contest, case):
    contest.run(
        "EVAD, keep rate 0.7, one clip",
        case,
        build,
        CASES[case],
        goals=(
            Goal("time", 0.65, "rate 1.0"),
            Goal("speed-up", 2, "backend reference"),
            Goal("speed-up", 1, "attention by torch's SDPA"),
        ),
        headline=True,
        seconds=12.0,
    )
