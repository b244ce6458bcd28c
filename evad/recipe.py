"""How a run learns: its configuration, its learning rate at every moment, its optimiser.

Source: EVAD, Appendix B; the parameter groups are the released code's.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .config import EVADConfig

PRESETS = ("vit_b", "vit_l", "tiny")
SCHEDULES = ("steps", "cosine")
PRECISIONS = ("float32", "bfloat16")
SHARDINGS = ("ddp", "fsdp")
SECTIONS = ("model", "training", "data")

# Fields of EVADConfig that a configuration file has under "training": they are of the run, not of the model.
OPTIMISATION = (
    "epochs",
    "batch_size",
    "learning_rate",
    "head_learning_rate_scale",
    "weight_decay",
    "decay_epochs",
    "warmup_epochs",
    "warmup_learning_rate",
)


@dataclass(frozen=True)
class Training:
    """What a run needs beyond ``EVADConfig``. The defaults are the paper's where it says something.

    Raises:
        ValueError: a field out of its range; the message names it.
    """

    seed: int = 0  # of new weights, of the order of the data and of dropped paths
    weights: str = ""  # a checkpoint to start from (VideoMAE's, say); none: random weights
    schedule: str = "steps"  # tenfold less at each of decay_epochs, or "cosine" down to 0; both after the warm-up
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    clip_norm: float = 0.0  # longest gradient; 0: any
    accumulate: int = 1  # parts that a rank's share of a batch is computed in, one after the other
    precision: str = "float32"  # "bfloat16": autocast; weights, sums and importance stay float32
    recompute: bool = False  # activations in the backward again, instead of keeping them
    sharding: str = "ddp"  # every rank holds the whole model; "fsdp": a part of it
    deterministic: bool = False  # on a GPU: the same bits on every run, where torch can, and slower; a CPU always does
    workers: int = 2  # processes that load clips, a rank; 0: the training process itself
    log_every: int = 10  # steps
    checkpoint_every: int = 0  # steps, beside every epoch's end; 0: only then
    keep_checkpoints: int = 3
    evaluate_every: int = 1  # epochs, and after the last; 0: never

    def __post_init__(self) -> None:
        least = {"accumulate": 1, "log_every": 1, "keep_checkpoints": 1}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                low = least.get(entry.name, 0)
                holds = isinstance(value, int) and not isinstance(value, bool) and value >= low
                self._require(entry.name, holds, f"an integer of at least {low}")
            if entry.type == "bool":
                self._require(entry.name, isinstance(value, bool), "true or false")
            if entry.type == "str":
                self._require(entry.name, isinstance(value, str), "text")
        for name, number in (("clip_norm", float), ("betas", lambda pair: tuple(map(float, pair)))):
            try:
                object.__setattr__(
                    self, name, number(getattr(self, name))
                )  # YAML reads 1e-5 as text, a tuple as a list
            except (TypeError, ValueError):
                self._require(name, False, "numbers")
        self._require("clip_norm", 0 <= self.clip_norm < math.inf, "a number of at least 0")
        self._require("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("sharding", SHARDINGS)):
            self._require(name, getattr(self, name) in known, f"one of {', '.join(known)}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"training: {name} must be {expected}, got {getattr(self, name)!r}")


class Run(NamedTuple):
    """Everything that decides what a run computes."""

    config: EVADConfig
    training: Training
    data: dict  # the section that evad.data.build reads
    given: frozenset[str]  # names of the fields of ``config`` that the configuration sets

    def document(self) -> dict:
        """For a file: what ``read_run`` read, with every default in its place."""
        model = dataclasses.asdict(self.config)
        training = {name: model.pop(name) for name in OPTIMISATION} | dataclasses.asdict(self.training)
        return {"model": model, "training": training, "data": self.data}


def configurations() -> list[str]:
    """Names of the configurations that come with the package."""
    files = (resources.files(__package__) / "configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_run(source: str | Path | Mapping, overrides: Iterable[str] = ()) -> Run:
    """Read a run's configuration.

    Args:
        source: The path of a YAML file, the name of one of ``configurations()``, or what such a file holds: sections
            ``model`` (``preset`` and fields of ``EVADConfig``), ``training`` (fields of ``Training``, and those of
            ``EVADConfig`` that are about optimisation) and ``data`` (for ``evad.data.build``).
        overrides: "section.key=value", in YAML's notation.
    Raises:
        ValueError: what cannot be used, named, with the nearest name that exists.
        OSError: the file cannot be read.
    """
    import yaml

    if isinstance(source, Mapping):
        where, document = "configuration", source
    else:
        where, document = str(source), load(source)
    if not isinstance(document, Mapping):
        raise ValueError(f"{where}: must be sections with keys, got {type(document).__name__}")
    sections = {name: {} for name in SECTIONS}
    for name, section in document.items():
        if name not in sections:
            raise ValueError(f"{where}: {name!r} is no section{_nearest(name, sections)}")
        if not isinstance(section, Mapping):
            raise ValueError(f"{where}: {name} must be keys and values, got {section!r}")
        sections[name] = {**section}
    for override in overrides:
        path, equals, text = override.partition("=")
        name, _, key = path.partition(".")
        if not equals or not key or name not in sections:
            raise ValueError(
                f"--set: must be section.key=value with a section of {', '.join(sections)}, got {override!r}"
            )
        section = sections[name]
        *parents, key = key.split(".")
        for depth, parent in enumerate(parents, start=1):
            inner = section.get(parent)
            if not isinstance(inner, Mapping | None):
                above = ".".join((name, *parents[:depth]))
                raise ValueError(f"--set: {above} must be keys and values to set {path}, got {inner!r}")
            section[parent] = {**(inner or {})}
            section = section[parent]
        try:
            section[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set: the value of {path} must be YAML, got {text!r}") from error

    model, training = sections["model"], sections["training"]
    preset = model.pop("preset", "tiny")
    if preset not in PRESETS:
        raise ValueError(f"{where}: model.preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    optimisation = [entry.name for entry in dataclasses.fields(Training)] + list(OPTIMISATION)
    architecture = [entry.name for entry in dataclasses.fields(EVADConfig) if entry.name not in OPTIMISATION]
    known = {"model": ["preset", *architecture], "training": optimisation}
    for name, keys in known.items():
        for key in sections[name]:
            if key not in keys:
                raise ValueError(f"{where}: {name}.{key} is no key{_nearest(f'{name}.{key}', _paths(known))}")
    fields = model | {name: training.pop(name) for name in OPTIMISATION if name in training}
    try:
        return Run(getattr(EVADConfig, preset)(**fields), Training(**training), sections["data"], frozenset(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def load(source: str | Path) -> object:
    """What a YAML file, or a configuration of the package, holds.

    Raises:
        ValueError: there is none, or it is not YAML.
    """
    import yaml

    path = Path(source)
    packaged = resources.files(__package__) / "configs" / f"{source}.yaml"
    absent = not path.exists() or path.is_dir()  # a folder may be called as a configuration is
    if not path.suffix and absent and packaged.is_file():
        path = packaged
    elif absent:
        raise ValueError(
            f"{source}: no such file, and no configuration of the package{_nearest(str(source), configurations())}"
        )
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: must be a YAML file ({error})") from error


def _paths(known: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{section}.{key}" for section, keys in known.items() for key in keys]


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    key = name.rpartition(".")[2]
    elsewhere = [path for path in known if path.rpartition(".")[2] == key]
    near = elsewhere or difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f": choose of {', '.join(known)}" if len(known) < 10 else ""


def learning_rate(epoch: float, config: EVADConfig, schedule: str = "steps") -> float:
    """The learning rate of parameters at scale 1 when ``epoch`` (from 0, with its fraction) of training is over."""
    if epoch < config.warmup_epochs:
        done = epoch / config.warmup_epochs
        return config.warmup_learning_rate + (config.learning_rate - config.warmup_learning_rate) * done
    if schedule == "cosine":
        done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.learning_rate * 0.1 ** sum(epoch >= decay for decay in config.decay_epochs)


def parameter_groups(model: nn.Module, config: EVADConfig) -> list[dict]:
    """Groups for AdamW: the head (localisation stages, decoder) learns at ``head_learning_rate_scale`` times the rate
    of the rest (``lr_scale``); vectors, biases and single tokens do not decay."""
    groups = [
        {"params": [], "lr_scale": scale, "weight_decay": decay}
        for scale in (1.0, config.head_learning_rate_scale)
        for decay in (config.weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        head = name.startswith(("localization.stages.", "decoder."))
        decays = parameter.ndim > 1 and not name.endswith(("bias", "mask_token", "class_token"))
        groups[2 * head + (not decays)]["params"].append(parameter)
    return groups


def adamw(model: nn.Module, config: EVADConfig, betas: tuple[float, float] = Training.betas) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``, one kernel a device for all; its learning rates are 0 until they are set."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=0.0, betas=betas, fused=True)
