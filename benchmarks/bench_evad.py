"""The detector: what pruning gives of what it promises, by keep rate; against plain PyTorch; training; by part.

    python -m benchmarks.bench_evad            # measures, writes results/ and the tables, and prints them

On a CPU one clip at a time of the tiny and ViT-B models (about six minutes of a quiet two-core machine); on a GPU eight
clips of ViT-B and ViT-L in bfloat16, as captured graphs. Harvest is the speed-up of a keep rate over the share of
operations that it saves: 1 if time went as operations go.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evad.backbone
import evad.localization
import evad_kernels
from benchmarks import report
from benchmarks._boxes import draw_boxes
from benchmarks._harness import Contestants, Goal, draw, significant
from benchmarks.bench_keyframe_attention import composite
from benchmarks.ceilings import Work
from evad import EVAD, EVADConfig
from evad.profile import kept_bytes, part_seconds, profile
from evad.recipe import parameter_groups
from evad_kernels import _backend

RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
FEW = (1.0, 0.7)
TRAINED = (1.0, 0.9, 0.8, 0.7, 0.6)  # the paper's Fig. 8
HARVEST = 0.9


def case(preset: str, size: tuple[int, int], dtype: str, batch: int, rates=RATES, rivals: bool = True) -> dict:
    return {"preset": preset, "size": size, "dtype": dtype, "batch": batch, "rates": rates, "rivals": rivals}


CPU = {
    "float32 tiny 96": case("tiny", (96, 96), "float32", 1),
    "bfloat16 ViT-B 224": case("vit_b", (224, 224), "bfloat16", 1),
    "float32 ViT-B 224": case("vit_b", (224, 224), "float32", 1, FEW),
    "bfloat16 ViT-B 256": case("vit_b", (256, 256), "bfloat16", 1, FEW, rivals=False),
    "bfloat16 ViT-B 288": case("vit_b", (288, 288), "bfloat16", 1, rivals=False),
}
GPU = {
    "bfloat16 ViT-B 224": case("vit_b", (224, 224), "bfloat16", 8),
    "bfloat16 ViT-B 256": case("vit_b", (256, 256), "bfloat16", 8, FEW, rivals=False),
    "bfloat16 ViT-B 288": case("vit_b", (288, 288), "bfloat16", 8),
    "bfloat16 ViT-B 288x512": case("vit_b", (288, 512), "bfloat16", 8),
    "bfloat16 ViT-L 288": case("vit_l", (288, 288), "bfloat16", 8),
    "bfloat16 ViT-B 224, one clip": case("vit_b", (224, 224), "bfloat16", 1, FEW),
}
TRAINING_CPU = {
    "float32 tiny 96": case("tiny", (96, 96), "float32", 2, TRAINED),
    "bfloat16 ViT-B 224": case("vit_b", (224, 224), "bfloat16", 1, FEW, rivals=False),
}
TRAINING_GPU = {
    "bfloat16 ViT-B 224": case("vit_b", (224, 224), "bfloat16", 2, TRAINED),
    "bfloat16 ViT-B 224, 16 clips": case("vit_b", (224, 224), "bfloat16", 16, TRAINED),
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


def our_backend(like: Tensor) -> str:
    """What runs our ops: the automatic choice, or Triton where that is still chosen by name only."""
    chosen = _backend.choose("keyframe_attention_topk", like)
    return "triton" if like.is_cuda and chosen == "reference" else "auto"


def with_backend(name: str, function: Callable[[], object]) -> Callable[[], object]:
    def call():
        with evad_kernels.use_backend(name):
            return function()

    return call


def inputs(device, preset, size, dtype, batch):
    torch.manual_seed(0)
    model = EVAD(getattr(EVADConfig, preset)(keep_rate=0.7))
    return model.to(device), draw(batch, 3, model.config.num_frames, *size, seed=1, dtype=dtype, device=device)


def build(device, preset, size, dtype, batch, rates, rivals):
    dtype = getattr(torch, dtype)
    model, clips = inputs(device, preset, size, dtype, batch)
    model.to(dtype).eval()
    ours = our_backend(clips)
    detectors = {}
    for rate in rates:
        model.set_keep_rate(rate)
        with evad_kernels.use_backend(ours):
            detectors[rate] = model.compiled(clips.shape[1:], batch)
    model.set_keep_rate(0.7)

    def at(rate):
        return with_backend(ours, lambda: detectors[rate](clips))

    def on_torch_attention():
        with torch_attention():
            return model(clips)

    contestants = {f"rate {rate:.1f}": at(rate) for rate in rates if rate != 0.7}
    if rivals:
        plain = with_backend("reference", lambda: model(clips))
        contestants["backend reference"] = plain
        contestants["attention by torch's SDPA"] = on_torch_attention
        if clips.is_cuda:
            contestants["eager, our kernels"] = with_backend(ours, lambda: model(clips))
            for mode in ("default", "reduce-overhead"):
                compiled = torch.compile(model.forward, fullgraph=True, mode=mode)
                contestants[f"torch.compile, {mode}"] = with_backend("reference", functools.partial(compiled, clips))

    def check():
        with evad_kernels.use_backend(ours), torch.no_grad():
            for got, expected in zip(detectors[0.7](clips)[:3], model(clips)[:3], strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=0)
            if rivals and batch == 1:
                check_parts(model, clips)

    flops = 2e9 * batch * profile(model.config, tuple(size), 0.7).gflops
    return Contestants(at(0.7), contestants, check, Work(flops=flops, dtype=dtype))


def check_parts(model, clips):
    """Part by part in float32, ours against plain PyTorch, each from the same input.

    Not end to end: six localisation stages with random weights turn a rounding into pixels (NOTES.md).
    """
    dtype = clips.dtype
    model.float()
    encoded = model.encoder(clips.float())
    height, width = clips.shape[-2:]
    boxes = draw_boxes("people", 1, clips.device)
    whwh = torch.tensor([[width, height] * 2], dtype=torch.float32, device=clips.device)

    def parts():
        again = model.encoder(clips.float())
        stages = model.localization(model.pyramid(encoded.keyframes), whwh, every_stage=True)
        (actions,) = model.decoder(encoded, boxes, whwh, every_block=False)
        return again.kept, (again.tokens.x, *again.keyframes, stages.person_logits[0], stages.boxes[0], actions)

    (kept, ours), (expected, plain) = parts(), with_backend("reference", parts)()
    model.to(dtype)
    for got, reference in zip(kept, expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=0, atol=0)
    for got, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


def describe(device, preset, size, dtype, batch, rates, rivals):
    """Operations by rate, and time by part at rates 1.0 and 0.7 of the model without a graph."""
    model, clips = inputs(device, preset, size, getattr(torch, dtype), batch)
    model.to(clips.dtype).eval()
    costs = {f"{rate:.1f}": profile(model.config, tuple(size), rate) for rate in rates}
    parts = {}
    for rate in FEW:
        model.set_keep_rate(rate)
        with evad_kernels.use_backend(our_backend(clips)):
            taken = part_seconds(model, clips, repeats=3)
        parts[f"{rate:.1f}"] = {part: significant(1e3 * seconds) for part, seconds in taken.items()}
    return {
        "model": preset,
        "size": list(size),
        "batch": batch,
        "dtype": dtype,
        "gflops": {rate: significant(cost.gflops) for rate, cost in costs.items()},
        "gflops_paper": {rate: significant(cost.gflops_paper) for rate, cost in costs.items()},
        "gflops_by_part": {
            rate: {part: significant(value) for part, value in costs[rate].gflops_by_part.items()} for rate in parts
        },
        "ms_by_part": parts,
    }


def how_many(batch: int) -> str:
    return "one clip" if batch == 1 else f"{batch} clips"


def cases(on_cpu: dict, on_gpu: dict):
    """Marks those of the other device, which the fixture's device decides."""
    every = list(dict.fromkeys((*on_cpu, *on_gpu)))
    return pytest.mark.parametrize("name", every)


def chosen(contest, on_cpu: dict, on_gpu: dict, name: str) -> dict:
    here, other = (on_cpu, "GPU") if contest.device == "cpu" else (on_gpu, "CPU")
    if name not in here:
        pytest.skip(f"measured on a {other}")
    return here[name]


@cases(CPU, GPU)
def bench_forward(contest, name):
    arguments = chosen(contest, CPU, GPU, name)
    config = getattr(EVADConfig, arguments["preset"])()
    saved = (profile(config, arguments["size"], 1.0).gflops) / profile(config, arguments["size"], 0.7).gflops
    goals = [Goal("harvest", HARVEST, "rate 1.0", saved)]
    if contest.device == "cpu" and name == "bfloat16 ViT-B 224":
        goals.append(Goal("time", 0.65, "rate 1.0"))
    if arguments["rivals"] and arguments["preset"] != "tiny":
        goals += [Goal("speed-up", 2 if contest.device == "cpu" else 3, "backend reference")]
        goals += [Goal("speed-up", 1, "attention by torch's SDPA")]
        goals += [Goal("speed-up", 1.5, f"torch.compile, {mode}") for mode in ("default", "reduce-overhead")]
    if name == "bfloat16 ViT-B 224, one clip":
        goals.append(Goal("ms", 4))
    contest.run(
        f"EVAD, keep rate 0.7, {how_many(arguments['batch'])}",
        name,
        build,
        arguments,
        goals=tuple(goal for goal in goals if goal.measure == "ms" or goal.rival),
        headline=True,
        seconds=12.0,
        describe=lambda _: describe(contest.device, **arguments),
    )


# Training


def training_inputs(device, preset, size, dtype, batch):
    from evad.cli.profile import random_targets

    model, clips = inputs(device, preset, size, torch.float32, batch)
    return model.train(), clips, random_targets(batch, size, model.config.num_classes)


def build_training(device, preset, size, dtype, batch, rates, rivals):
    model, clips, targets = training_inputs(device, preset, size, dtype, batch)
    optimizer = torch.optim.AdamW(parameter_groups(model, model.config), lr=0.0)

    def step(rate=0.7):
        model.set_keep_rate(rate)
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            total = model.loss(clips, targets)["loss_total"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    ours = our_backend(clips)
    contestants = {
        f"rate {rate:.1f}": with_backend(ours, functools.partial(step, rate)) for rate in rates if rate != 0.7
    }
    if rivals:
        contestants["backend reference"] = with_backend("reference", step)

    def check():
        losses = []
        for backend in (ours, "reference") if rivals and dtype == "float32" else (ours,):
            torch.manual_seed(0)  # the same paths are dropped
            losses.append(with_backend(backend, step)())
        assert losses[0].isfinite()
        torch.testing.assert_close(losses[0], losses[-1], rtol=1e-3, atol=1e-3)

    return Contestants(with_backend(ours, step), contestants, check)


def describe_training(contest, contestants, preset, size, dtype, batch, rates, rivals):
    """Memory of a step by rate: at the peak on a GPU, what the forward keeps elsewhere."""
    megabytes = {}
    if contest.device == "cpu":
        model, clips, targets = training_inputs("cpu", preset, size, dtype, batch)
        measured = {f"rate {rate:.1f}": (rate, "auto") for rate in rates}
        if rivals:
            measured["backend reference"] = (0.7, "reference")
        for name, (rate, backend) in measured.items():
            model.set_keep_rate(rate)
            with evad_kernels.use_backend(backend):
                megabytes[name] = kept_bytes(model, clips, targets, autocast=dtype == "bfloat16") / 1e6
        by = "kept for the backward, by autograd's saved-tensor hooks"
    else:
        for name, step in {"rate 0.7": contestants.ours, **contestants.rivals}.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            megabytes[name] = torch.cuda.max_memory_allocated() / 1e6
        by = "peak, weights and optimizer included, by CUDA's allocator"
    megabytes = {name: significant(value) for name, value in megabytes.items()}
    return {"model": preset, "size": list(size), "batch": batch, "dtype": dtype, "training_mb": megabytes, "mb_by": by}


@cases(TRAINING_CPU, TRAINING_GPU)
def bench_training(contest, name):
    arguments = chosen(contest, TRAINING_CPU, TRAINING_GPU, name)
    goals = () if contest.device == "cpu" else (Goal("speed-up", 2.5, "backend reference"),)
    contest.run(
        f"EVAD, training step at keep rate 0.7, {how_many(arguments['batch'])}",
        name,
        build_training,
        arguments,
        goals=goals,
        gradient=True,
        seconds=12.0,
        describe=lambda contestants: describe_training(contest, contestants, **arguments),
    )


if __name__ == "__main__":
    status = pytest.main(["--benchmark", "-q", "-rs", str(Path(__file__)), *sys.argv[1:]])
    print("\n\n".join(report.detector_tables(result) for result in report.load()))
    sys.exit(status)
