"""``evad train``: teach a model, from a configuration file or out of the box."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..console import CommandError
from ._common import Stopper, from_all_ranks, placement, ranks, say, say_skipped, skipped, writable_folder

DESCRIPTION = """\
Train a detector. Without --config: a tiny one on synthetic clips rendered on the fly, nothing to download.

The --out folder receives checkpoints, log.csv, evaluation.csv, config.yaml and, at the end,
model.safetensors for evad detect --checkpoint. Started again with the same --out, a run goes on where it was, however
it ended. On several GPUs: torchrun --nproc-per-node 8 -m evad train ...
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="teach a model, on your data or on synthetic clips",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default="synthetic",
        metavar="NAME",
        help="a YAML file, or a configuration of the package (--list) [synthetic]",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="replace one value, as training.epochs=3 or model.keep_rate=0.6; may be repeated",
    )
    parser.add_argument("--out", type=Path, default=Path("evad_train"), metavar="DIR", help="folder [evad_train]")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu or cuda [cuda if there is one]")
    parser.add_argument("--list", action="store_true", help="print the package's configurations, then stop")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, and nothing else")
    parser.set_defaults(run=run, dtype="float32")


def run(args: argparse.Namespace) -> int:
    from .. import recipe, training
    from ..snapshots import TrainingError

    if args.list:
        print("\n".join(recipe.configurations()))
        return 0
    device = _device(args)
    with ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo") as (rank, _), _spoken_warnings(rank):
        first = rank == 0
        try:
            plan = recipe.read_run(args.config, args.overrides)
            folder = writable_folder(args.out)
            plan, clips, held_out = training.prepare(plan)
            evaluate = None if held_out is None else training.evaluation(plan, held_out)
            lines = skipped(clips) + skipped(held_out)
            trainer = training.Trainer(plan, clips, folder, device=device, evaluate=evaluate)
        except (ValueError, TrainingError) as error:
            raise CommandError(str(error)) from error
        if first:
            _describe(trainer)
        begin = time.perf_counter()
        try:
            with _progress(trainer.steps, plan.training.log_every) as report, Stopper() as stopper:
                result = trainer.fit(report, lambda: stopper.requested)
        except TrainingError as error:
            say(f"evad train: {error}")
            return 1
        count = lines + sum(from_all_ranks([skipped(clips) + skipped(held_out) - lines]))  # all read the same lines
        if first:
            _report(args, result, folder, time.perf_counter() - begin, count)
    return 130 if result.interrupted else 0


def _device(args: argparse.Namespace) -> torch.device:
    """The asked-for device; under torchrun, this rank's of that kind."""
    device, _ = placement(args)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _spoken_warnings(rank: int) -> Iterator[None]:
    """Warnings become lines for people; those of rank 0, for the others' are the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if rank else "default", UserWarning)
        for torchs in (
            "`broadcast_buffers` is deprecated",
            "FSDP2-wrapped module .* returned a view",
        ):  # nobody changes it
            warnings.filterwarnings("ignore", torchs)
        warnings.showwarning = lambda message, *_, **__: say(f"evad train: {message}")
        yield


def _describe(trainer) -> None:
    """Write down what runs, and say it in a line."""
    import yaml

    run, folder = trainer.run, trainer.folder
    document = json.loads(json.dumps(run.document()))  # tuples as lists
    path = folder / "config.yaml"
    if trainer.step < trainer.steps or not path.exists():  # else no step was, or will be, made with this one
        path.write_text(yaml.safe_dump(document, sort_keys=False, width=120))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    where = f"{trainer.device}, {trainer.world} ranks" if trainer.world > 1 else trainer.device
    say(
        f"evad train: {parameters / 1e6:.2f} M weights, {len(trainer.dataset)} clips, {len(trainer.labels)} actions, "
        f"{trainer.steps} steps of {run.config.batch_size} clips on {where}, into {folder}"
    )
    if trainer.started_at:
        say(f"evad train: goes on after step {trainer.started_at}")
    if trainer.log.board is None:
        say("evad train: no files for TensorBoard: the package tensorboard is not installed")


@contextlib.contextmanager
def _progress(steps: int, every: int) -> Iterator[Callable]:
    """Yields what is told of each step: a bar on a terminal, else a line every ``every`` steps."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:

        def line(now) -> None:
            if now.step % every == 0 or now.step == steps:
                say(f"step {now.step}/{steps}, {_facts(now)}")

        yield line
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("the first step", total=steps)
        yield lambda now: bar.update(task, completed=now.step, description=f"{now.step}/{steps}, {_facts(now)}")


def _facts(now) -> str:
    left = str(datetime.timedelta(seconds=round(now.seconds_left)))
    return (
        f"epoch {now.epoch + 1}, loss {now.losses['loss_total']:.4f}, {now.clips_per_second:.1f} clips/s, {left} left"
    )


def _report(args: argparse.Namespace, result, folder: Path, seconds: float, count: int) -> None:
    from ..evaluation.report import number

    if count:
        say_skipped("train", count)
    if args.json:
        numbers = {
            name: {key: number(value) for key, value in getattr(result, name).items()} for name in ("losses", "metrics")
        }
        document = {**result._asdict(), **numbers, "skipped": count, "folder": str(folder)}
        document |= {"weights": result.weights and str(result.weights), "seconds": round(seconds, 1)}
        print(json.dumps(document, indent=2, allow_nan=False))
        return
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    say(
        f"{'stopped after' if result.interrupted else 'done:'} step {result.steps}"
        + (f"; {metrics}" if metrics else "")
    )
    if result.interrupted:
        say("the same command goes on from here")
    else:
        print(result.weights)
