"""Makes a run's record: trains (and resumes) through evad.training, evaluates, measures.

A record is a JSON file, written when the run is complete. What a run needs to go on after a kill, its checkpoints, lies
in the work folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from evad import EVAD, EVADConfig, load_checkpoint, read_config
from evad.checkpoint import save_checkpoint
from evad.data import build, collate
from evad.evaluation import evaluate
from evad.profile import profile_training
from evad.recipe import read_run
from evad.training import Trainer, prepare
from evad.weights import TINY

from .experiments import BASE, Run, run_name
from .rendered import Rendered


class Plan(NamedTuple):
    """How long and on what everything runs."""

    steps: int = 1200  # of every run, after its start
    start_steps: int = 900  # of the start that a seed's runs share
    clips: int = 1000  # of the split "test", which nothing is trained on
    batch_size: int = 16
    device: str = "cpu"
    precision: str = "bfloat16"  # of training's matrix products
    model: Mapping = MappingProxyType({})  # replaces fields of every model: a test's smaller ones


def record_path(folder: Path, run: Run, seed: int, precision: str) -> Path:
    trained = f",{precision}" if run.kind == "train" else ""
    return folder / f"{run.name},seed={seed}{trained}.json"


def make(run: Run, seed: int, plan: Plan, records: Path, work: Path, say: Callable[[str], None]) -> bool:
    """Complete a run, unless its record is there; returns whether there was something to do."""
    path = record_path(records, run, seed, plan.precision)
    if path.exists():
        return False
    begin = time.perf_counter()
    results = {"train": _trained, "shipped": _shipped, "cost": _cost}[run.kind](run, seed, plan, work, say)
    record = {
        "run": run.name,
        "kind": run.kind,
        "seed": seed,
        **results,
        "seconds_of_last_session": round(time.perf_counter() - begin, 1),
        "machine": _machine(plan.device),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(path)
    return True


def make_start(seed: int, plan: Plan, work: Path, say: Callable[[str], None]) -> Path:
    """What a seed's runs begin with, unless it is there: all but the decoder of a model that locates, unpruned.

    Without it every run stands still for hundreds of steps. It does not recognise: an encoder that has, with all
    tokens, chooses badly among them for long (benchmarks/NOTES.md).
    """
    model = {"keep_rate": 1.0, "action_loss_weight": 0.0}
    folder = work / f"start={plan.start_steps},{plan.precision}" / f"located,seed={seed}"
    return _without_decoder(_fit(folder, model, seed, plan, plan.start_steps, "", work, say))


def _trained(run: Run, seed: int, plan: Plan, work: Path, say) -> dict:
    weights = make_start(seed, plan, work, say)
    steps = run.times * plan.steps
    folder = weights.parents[1] / f"steps={steps}" / f"{run_name(**run.model)},seed={seed}"
    path = _fit(folder, run.model, seed, plan, steps, str(weights), work, say)
    model = EVAD(read_config(path)).to(plan.device)
    load_checkpoint(model, path)
    model.config = dataclasses.replace(model.config, action_loss_weight=EVADConfig().action_loss_weight)
    return {
        "model": {**BASE, **plan.model, **run.model},
        "steps": steps,
        "start_steps": plan.start_steps,
        "start_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "batch_size": plan.batch_size,
        "precision": plan.precision,
        "evaluations": _evaluate(model, run.rates, seed, plan, work),
    }


def _fit(folder: Path, model: dict, seed: int, plan: Plan, steps: int, weights: str, work: Path, say) -> Path:
    """Train, or go on training, in a folder of its own; returns the weights."""
    path = folder / "model.safetensors"
    if path.exists():
        return path
    run = read_run(
        {
            "model": {**BASE, **plan.model, **model},
            "training": {
                **read_run("synthetic").document()["training"],
                "seed": seed,
                "epochs": 1,
                "batch_size": plan.batch_size,
                "precision": plan.precision,
                "warmup_epochs": 0.05,
                "weights": weights,
                "evaluate_every": 0,
                "checkpoint_every": 50,
                "keep_checkpoints": 2,
                "workers": 1 if steps >= 50 else 0,
            },
            "data": {"name": "synthetic", "seed": 2 * seed + bool(weights), "clips": steps * plan.batch_size},
        }
    )
    run, clips, _ = prepare(run)
    if weights:  # else they are seen once
        clips = Rendered(clips, work / "clips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the start lacks a decoder
        trainer = Trainer(run, clips, folder, device=plan.device)
        trainer.fit(
            lambda now: (
                now.step % 50 or say(f"  {folder.name}: {now.step} of {now.steps}, {now.seconds_left:.0f} s left")
            )
        )
    return path


def _without_decoder(path: Path) -> Path:
    """A model's weights but the decoder's, in a file beside them."""
    target = path.with_name("without_decoder.safetensors")
    if not target.exists():
        model = EVAD(read_config(path))
        load_checkpoint(model, path)
        del model.decoder
        draft = target.with_suffix(".draft")
        save_checkpoint(model, draft)
        draft.replace(target)
    return target


def _shipped(run: Run, seed: int, plan: Plan, work: Path, say) -> dict:
    model = EVAD(dataclasses.replace(read_config(TINY), **run.model)).to(plan.device)
    load_checkpoint(model, TINY)
    return {"model": dict(run.model), "steps": 0, "evaluations": _evaluate(model, run.rates, seed, plan, work)}


def _evaluate(model: EVAD, rates: tuple[float, ...], seed: int, plan: Plan, work: Path) -> dict:
    """Summaries by keep rate."""
    found = {}
    clips = build({"name": "synthetic", "clips": plan.clips}, "test", model.config)  # the same for all seeds
    clips = Rendered(clips, work / "clips")
    for rate in dict.fromkeys((model.config.keep_rate, *rates)):
        model.set_keep_rate(rate)
        torch.manual_seed(seed)  # of random pruning
        metrics = evaluate(model.eval(), clips, batch_size=16)
        numbers = metrics.summary() | {
            f"action_AP: {label}": float(value) for label, value in zip(clips.labels, metrics.action_ap, strict=True)
        }
        found[str(rate)] = {name: None if value != value else round(value, 5) for name, value in numbers.items()}
    return {"own_rate": next(iter(found)), "clips": plan.clips, "by_rate": found}


def _cost(run: Run, seed: int, plan: Plan, work: Path, say) -> dict:
    """One clip's training step."""
    fields = {**run.model, **plan.model}
    preset = fields.pop("preset")
    torch.manual_seed(seed)
    model = EVAD(getattr(EVADConfig, preset)(**fields)).to(plan.device).train()
    clips = build({"name": "synthetic", "clips": 1}, "test", model.config)
    clip, targets, _ = collate([clips[0]])
    targets = [target | {"labels": torch.zeros(len(target["boxes"]), model.config.num_classes)} for target in targets]
    cost = profile_training(model, clip.to(plan.device), targets, repeats=3)
    return {
        "model": fields | {"preset": preset},
        "cost": {"saved": sum(cost.saved_bytes.values()), "seconds": cost.seconds, "peak_bytes": cost.peak_bytes},
    }


def _machine(device: str) -> dict:
    """What a number was made on."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
