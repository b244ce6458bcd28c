"""What the commands share: the model's options, building it, labels, output folders, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .. import ava, recipe
from ..config import TOKEN_ORDERS, EVADConfig
from ..console import CommandError, bounded
from ..recipe import PRESETS

if TYPE_CHECKING:
    from ..detector import EVAD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(
    parser: argparse.ArgumentParser,
    *,
    default: str = "vit_b",
    checkpoint: bool = True,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Options that say what model it is and where it runs; ``default``, ``device`` and ``dtype`` where they do not."""
    parser.set_defaults(default_model=default)
    group = parser.add_argument_group("model")
    own = "the --checkpoint's, where it says; else " if checkpoint else ""
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(PRESETS)}, or the path of a configuration (.yaml), for evad train or released "
        f"[{own}{default}]",
    )
    if checkpoint:
        group.add_argument(
            "--checkpoint",
            type=Path,
            metavar="FILE",
            help="weights: ours (.safetensors), or a released EVAD or VideoMAE file; without it they are random",
        )
        group.add_argument(
            "--token-order",
            choices=TOKEN_ORDERS,
            help="of kept tokens: importance is what the released checkpoints were trained with "
            "[importance with a .yaml, else position, as in the paper]",
        )
    group.add_argument(
        "--keep-rate",
        type=bounded(float, 0, 1, above=True),
        metavar="R",
        help="share of the tokens that each pruning layer keeps, above 0 to 1; 1 prunes nothing [the model's, 0.7]",
    )
    where = "cuda if there is one" if device == "auto" else device
    group.add_argument("--device", default=device, metavar="NAME", help=f"cpu, cuda, cuda:1, ... [{where}]")
    group.add_argument(
        "--dtype",
        choices=(*DTYPES, "auto"),
        default=dtype,
        help=f"of weights and tokens, never of boxes; auto is bfloat16 on a GPU, else float32 [{dtype}]",
    )


def add_size_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        type=bounded(int, 16, 4096),
        metavar="PIXELS",
        help="short side that frames are resized to before the model sees them [the model's, 224 for vit_b]",
    )


class Built(NamedTuple):
    """A model ready to run."""

    model: EVAD
    name: str
    weights: str  # "random", "partial" or the checkpoint's path
    note: str  # what the user must know about the weights, or ""
    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> EVADConfig:
        return self.model.config

    def summary(self) -> dict:
        """For JSON."""
        return {
            "name": self.name,
            "keep_rate": self.config.keep_rate,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def build(args: argparse.Namespace) -> Built:
    """The model that the options ask for, with its weights, in evaluation mode."""
    from ..detector import EVAD

    config, name = configuration(args)
    device, dtype = placement(args)
    torch.manual_seed(0)  # random weights are the same in every run
    model = EVAD(config)
    checkpoint = getattr(args, "checkpoint", None)
    if checkpoint is None:
        weights, note = "random", "random weights (no --checkpoint): boxes, labels and scores mean nothing"
    else:
        weights, note = _load(model, checkpoint, name)
    return Built(model.to(device, dtype).eval(), name, weights, note, device, dtype)


def configuration(args: argparse.Namespace) -> tuple[EVADConfig, str]:
    """The configuration that the options ask for, and its name."""
    from ..checkpoint import CheckpointError, NoConfigError, read_config

    checkpoint = getattr(args, "checkpoint", None)
    if checkpoint is not None and not checkpoint.exists():
        raise CommandError(f"--checkpoint: {checkpoint}: no such file")
    config, name = None, args.model
    if name is None and checkpoint is not None:
        try:
            config, name = read_config(checkpoint), checkpoint.stem
        except NoConfigError:
            pass  # not one of ours: it does not say what model it is
        except CheckpointError as error:
            raise CommandError(f"--checkpoint: {error}") from error
    if config is None and (name is None or name in PRESETS):
        name = name or args.default_model
        config = getattr(EVADConfig, name)()
    elif config is None:
        path = Path(name)
        if not path.is_file():
            raise CommandError(f"--model: {name!r} is neither {', '.join(PRESETS)} nor a file")
        try:
            config, name = _read_configuration(path), path.stem
        except (ValueError, TypeError) as error:
            raise CommandError(f"--model: {path} is not a configuration that can be used: {error}") from error
    fields = {"keep_rate": args.keep_rate, "token_order": getattr(args, "token_order", None)}
    fields = {field: value for field, value in fields.items() if value is not None}
    return dataclasses.replace(config, **fields), name


def _read_configuration(path: Path) -> EVADConfig:
    """The model of a configuration for ``evad train``, or a released one."""
    document = recipe.load(path)
    ours = isinstance(document, Mapping) and not document.keys().isdisjoint(recipe.SECTIONS)
    return recipe.read_run(path).config if ours else EVADConfig.from_official(path)


def placement(args: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    name = args.device
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device: no device is called {name!r}; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device: must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device: {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if args.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    from ..profile import bfloat16_is_slow

    if args.dtype == "bfloat16" and bfloat16_is_slow(device):
        _say_once("evad: --dtype bfloat16: torch has no fast bfloat16 on this CPU, float32 is several times faster")
    return device, DTYPES[args.dtype]


@functools.cache  # commands ask for the placement more than once
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _load(model, path: Path, name: str) -> tuple[str, str]:
    """Load a checkpoint; returns ``Built.weights`` and ``Built.note``."""
    from ..checkpoint import CheckpointError, load_checkpoint

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = load_checkpoint(model, path)
    except CheckpointError as error:
        raise CommandError(f"--checkpoint (--model {name}): {error}") from error
    notes = []
    if report.missing:
        total = len(report.loaded) + len(report.missing)
        lacking = f"{path} has no weights for {len(report.missing)} of {total} tensors ({report.missing[0]}, ...)"
        notes.append(f"{lacking}: those stay random, so boxes, labels and scores mean little")
    if report.unexpected:
        count, first = len(report.unexpected), report.unexpected[0]
        notes.append(f"{path} has {count} tensors that the model does not have ({first}, ...)")
    said = [str(warning.message) for warning in caught]
    # The report is in the notes; torch's own warnings name no file.
    notes += [text for text in said if text.startswith(str(path)) and text != f"{path}: {report}"]
    return "partial" if report.missing else str(path), "; ".join(notes)


def read_labels(path: Path | None, num_classes: int, checkpoint: Path | None = None) -> tuple[str, ...]:
    """Names of the model's classes: the file's, else the checkpoint's, else AVA's where the number fits."""
    if path is None:
        from ..checkpoint import CheckpointError
        from ..checkpoint import read_labels as carried_by

        with contextlib.suppress(CheckpointError, OSError):  # a file that cannot be read is refused when it is loaded
            if checkpoint is not None and len(labels := carried_by(checkpoint)) == num_classes:
                return labels
        if num_classes == len(ava.ACTIONS):
            return ava.ACTIONS
        return tuple(f"class {number}" for number in range(1, num_classes + 1))
    try:
        labels = ava.read_labels(path)
    except ValueError as error:
        raise CommandError(f"--labels: {error}") from error
    if len(labels) != num_classes:
        raise CommandError(f"--labels: {path} has {len(labels)} labels, the model {num_classes} classes")
    return labels


PATIENCE = 5.0  # seconds before a rank that lost another one exits: torchrun takes the first to exit for the cause


@contextlib.contextmanager
def ranks(backend: str = "gloo") -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started; yields this one's rank and their number, (0, 1) where it runs alone."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0, 1
        return
    dist.init_process_group(backend)
    try:
        yield dist.get_rank(), dist.get_world_size()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        say(f"rank {dist.get_rank()}: another rank has stopped; what it said tells why")
        time.sleep(PATIENCE)
        raise SystemExit(2) from error
    finally:
        dist.destroy_process_group()


def from_all_ranks(value: list) -> list:
    """The lists of all ranks as one, in the order of the ranks."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return value
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return [item for part in gathered for item in part]


def writable_folder(path: Path) -> Path:
    """``path`` as a folder that exists and can be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CommandError(f"--out: {path} is a file, not a folder") from error
    except OSError as error:
        raise CommandError(f"--out: {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise CommandError(f"--out: {path} is not writable")
    return path


def say(text: str) -> None:
    """A line for people; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def skipped(dataset) -> int:
    """How often a line or clip of it could not be used."""
    return getattr(getattr(dataset, "problems", None), "count", 0)


def say_skipped(command: str, count: int) -> None:
    times = "once" if count == 1 else f"{count} times"
    say(f"evad {command}: {times} a line or clip of the data could not be used and was skipped")


class Stopper:
    """While it is open Ctrl-C only sets ``requested``, so that files can be finished; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Stopper:
        try:
            self._before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not the main thread: signals go elsewhere
            self._before = None
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
