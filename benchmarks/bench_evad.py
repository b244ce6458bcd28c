"""The detector: what pruning gives of what it promises, by keep rate; against plain PyTorch; training; by part.

    python -m benchmarks.bench_evad            # measures, writes results/ and the tables, and prints them

On a CPU one clip at a time of the tiny and ViT-B models (about six minutes of a quiet two-core machine); on a GPU eight
clips of ViT-B and ViT-L in bfloat16, as captured graphs. Harvest is the speed-up of a keep rate over the share of
operations that it saves: 1 if time went as operations go.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

import evad.backbone
import evad.localization
import evad_kernels
from benchmarks import report
from benchmarks._boxes import draw_boxes
from benchmarks._harness import Contestants, Goal, draw, either, on_backend, significant
from benchmarks.bench_keyframe_attention import composite, eager
from benchmarks.ceilings import Work
from evad import EVAD, EVADConfig
from evad.profile import bfloat16_is_slow, kept_bytes, part_seconds, profile
from evad.recipe import adamw
from evad_kernels.keyframe_attention import KeyframeAttention

RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
FEW = (1.0, 0.7)
TRAINED = (1.0, 0.9, 0.8, 0.7, 0.6)  # the paper's Fig. 8
HARVEST = 0.9


def case(preset: str, size: tuple[int, int], dtype: str, batch: int, rates=RATES, rivals: bool = True) -> dict:
    return {"preset": preset, "size": size, "dtype": dtype, "batch": batch, "rates": rates, "rivals": rivals}


def training_case(
    preset: str, size: tuple[int, int], dtype: str, batch: int | None, rates=TRAINED, rivals=True
) -> dict:
    """``batch`` None: ``largest_batch``."""
    return {"preset": preset, "size": size, "dtype": dtype, "batch": batch, "rates": rates, "rivals": rivals}


FAST = "float32" if bfloat16_is_slow("cpu") else "bfloat16"  # on this CPU
CPU = {
    "float32 tiny 96": case("tiny", (96, 96), "float32", 1),
    "float32 ViT-B 224": case("vit_b", (224, 224), "float32", 1, FEW),
    f"{FAST} ViT-B 224": case("vit_b", (224, 224), FAST, 1),
    f"{FAST} ViT-B 256": case("vit_b", (256, 256), FAST, 1, FEW, rivals=False),
    f"{FAST} ViT-B 288": case("vit_b", (288, 288), FAST, 1, rivals=False),
}
GPU = {
    "bfloat16 ViT-B 224": case("vit_b", (224, 224), "bfloat16", 8),
    "bfloat16 ViT-B 256": case("vit_b", (256, 256), "bfloat16", 8, FEW, rivals=False),
    "bfloat16 ViT-B 288": case("vit_b", (288, 288), "bfloat16", 8),
    "bfloat16 ViT-B 288x512": case("vit_b", (288, 512), "bfloat16", 8),
    "bfloat16 ViT-L 288": case("vit_l", (288, 288), "bfloat16", 8),
    "bfloat16 ViT-B 224, one clip": case("vit_b", (224, 224), "bfloat16", 1, FEW),
}
COMPILERS = {  # modes of torch.compile: each takes a minute or more
    "bfloat16 ViT-B 224": ("default", "reduce-overhead"),
    "bfloat16 ViT-B 224, one clip": ("reduce-overhead",),
    "bfloat16 ViT-B 288": ("reduce-overhead",),
}
# Aims on an H100: 1,200 clips/s at 224 pixels and 600 at 288; a clip alone in 4 ms.
AIMS = {"bfloat16 ViT-B 224": 8 / 1.2, "bfloat16 ViT-B 288": 8 / 0.6, "bfloat16 ViT-B 224, one clip": 4.0}
MATRIX_SHARE = 0.75  # of the time; at most a quarter is other work
TRAINING_CPU = {
    "float32 tiny 96": training_case("tiny", (96, 96), "float32", 2),
    f"{FAST} ViT-B 224": training_case("vit_b", (224, 224), FAST, 1, FEW, rivals=False),
}
TRAINING_GPU = {
    "bfloat16 ViT-B 224": training_case("vit_b", (224, 224), "bfloat16", 2),
    "bfloat16 ViT-B 224, 16 clips": training_case("vit_b", (224, 224), "bfloat16", 16),
    "bfloat16 ViT-B 224, all that fit": training_case("vit_b", (224, 224), "bfloat16", None, FEW),
}


@contextlib.contextmanager
def attention_by(plain: Callable[..., Tensor], topk: Callable):
    """The detector's attention is torch's: ``plain`` of query, key, value, and ``topk`` where it prunes."""

    def whole(query, key, value, *, num_keyframe):
        return KeyframeAttention(plain(query, key, value), None)

    def pruning(query, key, value, *, num_keyframe, num_select, keyframe_weight):
        return topk(query, key, value, num_keyframe, num_select)

    kernels = SimpleNamespace(**{name: getattr(evad_kernels, name) for name in evad_kernels.__all__})
    kernels.keyframe_attention, kernels.keyframe_attention_topk = whole, pruning
    callers = (evad.backbone, evad.localization)
    for module in callers:
        module.evad_kernels = kernels
    try:
        yield
    finally:
        for module in callers:
            module.evad_kernels = evad_kernels


def torch_attention():
    """SDPA, and where it prunes a pass for the importance in float32, topk and gather."""
    return attention_by(F.scaled_dot_product_attention, composite)


def eager_attention():
    """The map in memory, in the model's dtype, everywhere."""
    return attention_by(eager_plain, eager)


def best_attention():
    """SDPA where it does not prune, the map where it does: what torch.compile makes most of."""
    return attention_by(F.scaled_dot_product_attention, eager)


def eager_plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value


def under(context: Callable, function: Callable[[], object]) -> Callable[[], object]:
    """``function`` where a context manager is in force and the other ops are plain PyTorch."""

    def call():
        with context(), evad_kernels.use_backend("reference"):
            return function()

    return call


def inputs(device, preset, size, dtype, batch):
    torch.manual_seed(0)
    model = EVAD(getattr(EVADConfig, preset)(keep_rate=0.7))
    return model.to(device), draw(batch, 3, model.config.num_frames, *size, seed=1, dtype=dtype, device=device)


def build(device, preset, size, dtype, batch, rates, rivals, modes=()):
    dtype = getattr(torch, dtype)
    model, clips = inputs(device, preset, size, dtype, batch)
    model.to(dtype).eval()
    detectors = {}
    for rate in rates:
        model.set_keep_rate(rate)
        detectors[rate] = model.compiled(clips.shape[1:], batch)
    model.set_keep_rate(0.7)

    def on_torch_attention():
        with torch_attention():
            return model(clips)

    contestants = {f"rate {rate:.1f}": functools.partial(detectors[rate], clips) for rate in rates if rate != 0.7}
    if rivals:
        contestants["backend reference"] = on_backend("reference", lambda: model(clips))
        contestants["attention by torch's SDPA"] = on_torch_attention
        if clips.is_cuda:
            contestants["eager"] = under(eager_attention, lambda: model(clips))
            contestants["eager, our kernels"] = lambda: model(clips)
    if modes:

        @functools.cache
        def inductor():
            return model.compiled(clips.shape[1:], batch, engine="inductor")

        contestants["ours, engine inductor"] = lambda: inductor()(clips)
    for mode in modes:
        compiled = torch.compile(model.forward, fullgraph=True, mode=mode)
        contestants[f"torch.compile, {mode}"] = under(best_attention, functools.partial(compiled, clips))

    def check():
        with torch.no_grad():
            got, expected = detectors[0.7](clips), model(clips)
            assert all(x.isfinite().all() for x in got[:3])
            if not clips.is_cuda:  # there describe() says whether the bits are the same, and tests insist on it
                for a, b in zip(got[:3], expected[:3], strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
            if rivals:
                check_parts(model, clips[:1])

    flops = 2e9 * batch * profile(model.config, tuple(size), 0.7).gflops
    return Contestants(functools.partial(detectors[0.7], clips), contestants, check, Work(flops=flops, dtype=dtype))


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

    (kept, ours), (expected, plain) = parts(), on_backend("reference", parts)()
    model.to(dtype)
    for got, reference in zip(kept, expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=0, atol=0)
    for got, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


def describe(contestants, device, preset, size, dtype, batch, rates, rivals):
    """Operations by rate, and time by part at rates 1.0 and 0.7 of the model without a graph; on a GPU by kernel."""
    model, clips = inputs(device, preset, size, getattr(torch, dtype), batch)
    model.to(clips.dtype).eval()
    costs = {f"{rate:.1f}": profile(model.config, tuple(size), rate) for rate in rates}
    parts = {}
    for rate in FEW:
        model.set_keep_rate(rate)
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
        **(on_gpu(contestants.ours, model, clips) if clips.is_cuda else {}),
    }


MATRIX = (
    re.compile(  # kernels that multiply matrices, by the names of cuBLAS, cuDNN, CUTLASS, ours and torch's attention
        r"gemm|gemv|nvjet|cutlass|cudnn|xmma|flash|fmha|keyframe_attention_(forward|score)", re.IGNORECASE
    )
)


def on_gpu(ours, model, clips):
    """Whether a replay gives the bits of the model; the time of its kernels, and how much of it is matrix work."""
    with torch.no_grad():
        same = all(map(torch.equal, ours()[:3], model(clips)[:3]))
    details = {"same_bits": same}
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
            ours()
            torch.cuda.synchronize()
        times: dict[str, float] = {}
        for event in record.events():
            if event.device_type == DeviceType.CUDA:  # the others are calls of the driver
                times[event.name] = times.get(event.name, 0) + event.time_range.elapsed_us() / 1e3
    except Exception as error:  # a machine may not allow it
        return {**details, "kernels": str(error)[:200]}
    total, matrix = sum(times.values()), sum(ms for name, ms in times.items() if MATRIX.search(name))
    if total == 0:
        return {**details, "kernels": "the profiler saw none"}
    longest = sorted(times, key=times.get, reverse=True)[:30]
    met = matrix / total >= MATRIX_SHARE
    goal = {"goal": f"at least {MATRIX_SHARE:.0%} of the time matrix work", "reached": significant(matrix / total)}
    return {
        **details,
        "kernels": {name[:80]: significant(times[name]) for name in longest},
        "matrix_share": significant(matrix / total),
        "goals": [{**goal, "met": met}],
    }


def how_many(batch: int) -> str:
    return "one clip" if batch == 1 else f"{batch} clips"


@either(CPU, GPU)
def bench_forward(contest, case):
    arguments = contest.chosen(case, CPU, GPU)
    on_cpu = contest.device == "cpu"
    config = getattr(EVADConfig, arguments["preset"])()
    saved = (profile(config, arguments["size"], 1.0).gflops) / profile(config, arguments["size"], 0.7).gflops
    goals = [Goal("harvest", HARVEST, "rate 1.0", saved)]
    if on_cpu and case == f"{FAST} ViT-B 224":
        goals.append(Goal("time", 0.65, "rate 1.0"))
    if arguments["rivals"] and arguments["preset"] != "tiny":
        goals += [Goal("speed-up", 2, "backend reference") if on_cpu else Goal("speed-up", 3, "eager")]
        goals += [Goal("speed-up", 1, "attention by torch's SDPA")]
    if not on_cpu and case in AIMS:
        goals.append(Goal("ms", AIMS[case]))
    contest.run(
        f"EVAD, keep rate 0.7, {how_many(arguments['batch'])}",
        case,
        build,
        arguments,
        goals=tuple(goals),
        headline=True,
        seconds=12.0 if on_cpu else 4.0,
        capture=False,
        describe=lambda contestants: describe(contestants, contest.device, **arguments),
    )


@either({}, COMPILERS)
def bench_compilers(contest, case):
    """Rows of their own: a run that is stopped while something compiles keeps all others."""
    modes = contest.chosen(case, {}, COMPILERS)
    contest.run(
        f"EVAD, keep rate 0.7, {how_many(GPU[case]['batch'])}, beside torch.compile",
        case,
        build,
        GPU[case] | {"rates": (0.7,), "rivals": False, "modes": modes},
        goals=(Goal("speed-up", 1.5, tuple(f"torch.compile, {mode}" for mode in modes)),),
        headline=True,
        seconds=4.0,
        capture=False,
    )


# Training


def training_inputs(device, preset, size, dtype, batch):
    from evad.cli.profile import random_targets

    model, clips = inputs(device, preset, size, torch.float32, batch)
    return model.train(), clips, random_targets(batch, size, model.config.num_classes)


def build_training(device, preset, size, dtype, batch, rates, rivals):
    model, clips, targets = training_inputs(device, preset, size, dtype, batch)
    optimizer = adamw(model, model.config)

    def step(rate=0.7):
        model.set_keep_rate(rate)
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            total = model.loss(clips, targets)["loss_total"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.detach()

    contestants = {f"rate {rate:.1f}": functools.partial(step, rate) for rate in rates if rate != 0.7}
    if rivals:
        contestants["backend reference"] = on_backend("reference", step)
        if clips.is_cuda:
            contestants["eager"] = under(eager_attention, step)

    def check():
        losses = []
        for backend in ("auto", "reference") if rivals and dtype == "float32" else ("auto",):
            torch.manual_seed(0)  # the same paths are dropped
            losses.append(on_backend(backend, step)())
        assert losses[0].isfinite()
        torch.testing.assert_close(losses[0], losses[-1], rtol=1e-3, atol=1e-3)

    return Contestants(step, contestants, check)


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
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                megabytes[name] = peak_megabytes(step)
        by = "peak, weights and optimizer included, by CUDA's allocator"
        fit = {name: fitting(megabyte, batch, preset) for name, megabyte in megabytes.items()}
    megabytes = {name: significant(value) for name, value in megabytes.items()}
    details = {"model": preset, "size": list(size), "batch": batch, "dtype": dtype}
    goals = []
    if "eager" in megabytes:
        reached = significant(megabytes["rate 0.7"] / megabytes["eager"])
        goals = [{"goal": "memory at most 45% of eager", "reached": reached, "met": reached <= 0.45}]
    details |= {"training_mb": megabytes, "mb_by": by, "goals": goals}
    return details if contest.device == "cpu" else {**details, "clips_that_fit": fit}


def peak_megabytes(step: Callable[[], object]) -> float:
    """Of the current GPU's memory during a call, weights and optimizer included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def largest_batch(device, preset, size, dtype) -> int:
    """Clips of the largest step that eager PyTorch can make at keep rate 0.7 with nine tenths of this GPU's memory."""
    few = 2
    step = build_training(device, preset, size, dtype, few, FEW, rivals=True).rivals["eager"]
    step()  # makes the optimizer's moments
    return int(0.9 * fitting(peak_megabytes(step), few, preset))


def fitting(megabytes: float, batch: int, preset: str) -> int:
    """Clips of a step that this GPU's memory holds, if what is no weight grows with the clips."""
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in EVAD(getattr(EVADConfig, preset)()).parameters())
    fixed = 16 * weights  # float32: weight, gradient, two moments of the optimizer
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int((memory - fixed) / max(1e6 * megabytes - fixed, 1) * batch)


@either(TRAINING_CPU, TRAINING_GPU)
def bench_training(contest, case):
    arguments = contest.chosen(case, TRAINING_CPU, TRAINING_GPU)
    if arguments["batch"] is None:
        where = {name: arguments[name] for name in ("preset", "size", "dtype")}
        arguments = arguments | {"batch": largest_batch(contest.device, **where)}
    contest.run(
        f"EVAD, training step at keep rate 0.7, {how_many(arguments['batch'])}",
        case,
        build_training,
        arguments,
        goals=() if contest.device == "cpu" else (Goal("speed-up", 2.5, "eager"),),
        gradient=True,
        seconds=12.0 if contest.device == "cpu" else 6.0,
        capture=False,
        describe=lambda contestants: describe_training(contest, contestants, **arguments),
    )


if __name__ == "__main__":
    status = pytest.main(["--benchmark", "-q", "-rs", str(Path(__file__)), *sys.argv[1:]])
    print("\n\n".join(report.detector_tables(result) for result in report.load()))
    sys.exit(status)
