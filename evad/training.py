"""The training loop: one batch after the other, alone or on many ranks, and from any snapshot as if never stopped.

Everything random is a function of the seed and of where the run is: the order of the clips of (seed, epoch), dropped
paths of (seed, step, rank), a dataset's augmentation of (seed, epoch, index). So a snapshot needs no generator's state
to go on bit for bit, on as many ranks as before.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from . import data
from .checkpoint import load_checkpoint, write_weights
from .config import EVADConfig
from .data import Batch, collate
from .detector import EVAD
from .evaluation import evaluate
from .losses import Counts, count
from .profile import bfloat16_is_slow
from .recipe import Run, Training, adamw, learning_rate
from .snapshots import CHECKPOINTS, TrainingError, claim, is_full, last_good, read_snapshot, snapshots, write_snapshot

Evaluate = Callable[[EVAD], dict[str, float]]


class Progress(NamedTuple):
    """One step, done."""

    step: int  # from 1
    steps: int  # of the whole run
    epoch: int  # from 0
    losses: dict[str, float]  # weighted terms and loss_total, of the whole batch
    learning_rate: float  # at scale 1
    gradient_norm: float
    clips_per_second: float  # of all ranks, lately
    seconds_left: float


class Result(NamedTuple):
    """What a run came to."""

    steps: int
    started_at: int  # the step it was resumed from; 0 for a new run
    interrupted: bool
    losses: dict[str, float]  # of the last step; rank 0 knows those of earlier sessions, too
    metrics: dict[str, float]  # of the last evaluation, likewise
    weights: Path | None  # None where interrupted


def prepare(run: Run) -> tuple[Run, Dataset, Dataset | None]:
    """The run with the classes of its data, the clips to learn from, and those to evaluate on, if it evaluates.

    Raises:
        ValueError: data that cannot be read, or has another number of classes than the configuration says.
    """
    clips = data.build(run.data, "train", run.config)
    classes = len(clips.labels)
    if "num_classes" in run.given and run.config.num_classes != classes:
        raise ValueError(f"model.num_classes must be {classes}, as the data has, got {run.config.num_classes}")
    config = dataclasses.replace(run.config, num_classes=classes)
    held_out = data.build(run.data, "val", config) if run.training.evaluate_every else None
    return run._replace(config=config), clips, held_out


def evaluation(run: Run, dataset: Dataset) -> Evaluate:
    """Score the model on a dataset, every rank on its share."""
    autocast = torch.bfloat16 if run.training.precision == "bfloat16" else None
    options = {"workers": run.training.workers, "autocast": autocast}
    return lambda model: evaluate(model, dataset, **options).summary()


class Learner(nn.Module):
    """The loss as a module's forward, which is what DistributedDataParallel hooks into."""

    def __init__(self, model: EVAD) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args) -> dict[str, Tensor]:
        return self.model.loss(*args)


class Trainer:
    """A run in a folder, which it resumes where the folder has one.

    Args:
        run: What to compute.
        dataset: Map-style; items are ``evad.data.Sample``. Its ``set_epoch``, if any, is called before every epoch.
        folder: Receives ``checkpoints/``, ``log.csv`` (one row every ``log_every`` steps), ``evaluation.csv``,
            ``tensorboard/`` if that package is there, and at the end ``model.safetensors``. All ranks read it, rank 0
            writes: on several machines, one that they share.
        device: Of this rank.
        evaluate: Called after an epoch, on every rank, with the model in evaluation mode; returns named numbers, which
            rank 0 logs.
    Raises:
        ValueError: a batch that cannot be divided as asked; a folder that another process trains in, that holds a run
            of another model or data, or that not all ranks find at the same step.
        TrainingError: a folder whose checkpoints are all damaged.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        evaluate: Evaluate | None = None,
    ) -> None:
        self.run, self.config, self.training = run, run.config, run.training
        self.dataset, self.evaluate, self.labels = dataset, evaluate, tuple(dataset.labels)
        self.folder, self.device = Path(folder), torch.device(device)
        self.snapshots = self.folder / CHECKPOINTS
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        parts = self.world * self.training.accumulate
        if self.config.batch_size % parts:
            raise ValueError(
                f"training: batch_size must be a multiple of ranks * accumulate = {self.world} * "
                f"{self.training.accumulate}, got {self.config.batch_size}"
            )
        self.epoch_steps = len(dataset) // self.config.batch_size
        if not self.epoch_steps:
            raise ValueError(f"data: {len(dataset)} clips are less than one batch of {self.config.batch_size}")
        self.steps = self.epoch_steps * self.config.epochs
        if self.training.precision == "bfloat16" and bfloat16_is_slow(self.device):
            warnings.warn(
                "training.precision = bfloat16: torch has no fast bfloat16 here, float32 is several times faster",
                stacklevel=2,
            )
        self.claimed = claim(self.folder) if self.rank == 0 else None
        if self.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(self.training.seed)
        self.model = EVAD(self.config).train()
        if self.training.weights and not snapshots(self.snapshots):
            load_checkpoint(self.model, self.training.weights)
        self.model.set_recomputation(self.training.recompute)
        self.losses = self._distribute()
        self.optimizer = adamw(self.model, self.config, self.training.betas)
        self.step = self.started_at = self._resume()
        self.log = Log(self.folder, self.step) if self.rank == 0 else None
        self.losses_now, self.metrics = ({}, {}) if self.log is None else self.log.last()

    def fit(
        self,
        report: Callable[[Progress], None] = lambda progress: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Train to the end.

        Args:
            report: Called after every step, on rank 0.
            stop: Asked after every step; once it is true on any rank, a checkpoint is written and the run ends.
        Raises:
            TrainingError: a loss or gradient that is not finite; a full disk.
        """
        self.report, self.stop = report, stop
        try:
            return self._fit()
        except (OSError, SafetensorError) as error:
            if not is_full(self.folder, error):
                raise
            left = last_good(self.snapshots)
            raise TrainingError(f"step {self.step}: the disk of {self.folder} is full; {left}") from error
        finally:
            if self.log is not None:
                self.log.close()

    def _fit(self) -> Result:
        if self.step and self.step % self.epoch_steps == 0:  # killed between a checkpoint and its evaluation?
            self._evaluate(self.step // self.epoch_steps)
        while self.step < self.steps:
            epoch = self.step // self.epoch_steps
            if self._epoch(epoch) == "stopped":
                return Result(self.step, self.started_at, True, self.losses_now, self.metrics, None)
            self._evaluate(epoch + 1)
        path = self.folder / "model.safetensors"
        weights, _ = self._state()
        if self.rank == 0:
            draft = path.with_name(f".{path.name}.draft")
            write_weights(weights, self.config, draft, self.labels)
            draft.replace(path)
        return Result(self.step, self.started_at, False, self.losses_now, self.metrics, path)

    def _epoch(self, epoch: int) -> str:
        """The rest of an epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._parts(epoch),
            collate_fn=collate,
            num_workers=self.training.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        parts, pace = iter(loader), Pace()
        while self.step < (epoch + 1) * self.epoch_steps:
            rate = learning_rate(self.step / self.epoch_steps, self.config, self.training.schedule)
            self.losses_now, norm = self._update([next(parts) for _ in range(self.training.accumulate)], rate)
            self.step += 1
            seconds = pace.tick()
            speed, left = self.config.batch_size / seconds, (self.steps - self.step) * seconds
            progress = Progress(self.step, self.steps, epoch, self.losses_now, rate, norm, speed, left)
            ended = self.step % self.epoch_steps == 0
            if self.rank == 0:
                if self.step % self.training.log_every == 0 or ended:
                    self.log.write(progress)
                self.report(progress)
            stopped = self._any(self.stop())
            every = self.training.checkpoint_every
            if ended or stopped or (every and self.step % every == 0):
                self._save()
            if stopped:
                return "stopped"
        return "ended"

    def _parts(self, epoch: int) -> list[list[int]]:
        """This rank's clips of the epoch's remaining batches, in the parts that are computed at a time."""
        draw = torch.Generator().manual_seed(_mix(self.training.seed, epoch))
        order = torch.randperm(len(self.dataset), generator=draw)
        batches = order[: self.epoch_steps * self.config.batch_size].view(self.epoch_steps, self.world, -1)
        rest = batches[self.step - epoch * self.epoch_steps :, self.rank]
        return rest.reshape(len(rest) * self.training.accumulate, -1).tolist()

    def _update(self, parts: Sequence[Batch], rate: float) -> tuple[dict[str, float], float]:
        """One step of the optimiser; returns the batch's losses and the gradient's norm."""
        torch.manual_seed(_mix(self.training.seed, self.step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        counts = self._counts(parts)
        total = {}
        for number, (clips, targets, _) in enumerate(parts, start=1):
            clips = _to(clips, self.device)
            with self._synchronised(number == len(parts)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bfloat16"):
                    losses = self.losses(clips, targets, counts)
                (losses["loss_total"] / len(parts)).backward()
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach() / len(parts)
        values = torch.stack(list(total.values()))
        if self.world > 1:
            dist.all_reduce(values)
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        *values, norm_value = torch.cat([values / self.world, norm[None].to(values)]).tolist()
        losses = dict(zip(total, values, strict=True))
        self._check(losses, norm_value)
        if self.training.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.training.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses, norm_value

    def _counts(self, parts: Sequence[Batch]) -> Counts:
        """Of the whole batch, per rank and part: the mean of all parts' gradients is then the whole batch's."""
        counts = [count(part.targets, self.config.num_proposals) for part in parts]
        counts = torch.tensor(counts, dtype=torch.float64).sum(0).to(self.device, torch.float32)
        if self.world > 1:
            dist.all_reduce(counts)
        return Counts(*(counts / self.world / len(parts)))

    def _check(self, losses: dict[str, float], norm: float) -> None:
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        if not bad and np.isfinite(norm):
            return
        what = f"the loss is not finite ({', '.join(bad)})" if bad else "the gradient is not finite"
        raise TrainingError(f"step {self.step + 1}: {what}; {last_good(self.snapshots)}")

    def _distribute(self) -> Callable[..., dict[str, Tensor]]:
        """Put the model where it trains; returns what computes the loss there."""
        if self.training.sharding == "fsdp":
            if not dist.is_initialized():
                raise ValueError("training: sharding fsdp must be started by torchrun, on more than one rank")
            mesh = dist.init_device_mesh(self.device.type, (self.world,))
            for part in (*self.model.encoder.blocks, *self.model.localization.stages, *self.model.decoder.blocks):
                fully_shard(part, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            for stage in self.model.localization.stages:
                register_fsdp_forward_method(stage, "person_logits")
            register_fsdp_forward_method(self.model, "loss")
            return self.model.loss
        self.model.to(self.device)
        if self.world == 1:
            return self.model.loss
        return DistributedDataParallel(
            Learner(self.model),
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=self.config.blank == "zeros",  # the mask token
            gradient_as_bucket_view=True,
        )

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager:
        """Gradients are averaged over the ranks with the last part only."""
        if self.training.sharding == "fsdp":
            self.model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return self.losses.no_sync()
        return contextlib.nullcontext()

    def _any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return flags.item() > 0

    def _agree(self, step: int) -> None:
        """Raise a ValueError, on every rank, where not all begin after the same step."""
        if self.world == 1:
            return
        steps = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(steps, torch.tensor([step], device=self.device))
        ranks = {}
        for rank, other in enumerate(torch.cat(steps).tolist()):
            ranks.setdefault(other, []).append(str(rank))
        if len(ranks) > 1:
            found = "; ".join(f"after step {other} on rank {', '.join(ranks[other])}" for other in sorted(ranks))
            raise ValueError(f"{self.folder}: must be one folder that all ranks share, but they begin {found}")

    def _evaluate(self, epochs: int) -> None:
        """If an evaluation is due after this many epochs, and has not been made."""
        every = self.training.evaluate_every
        due = every and (epochs % every == 0 or epochs == self.config.epochs)
        made = self._any(self.rank == 0 and self.log.has_evaluation(epochs))
        if self.evaluate is None or not due or made:
            return
        self.metrics = self.evaluate(self._whole_model())
        self.model.train()
        if self.rank == 0:
            self.log.write_evaluation(epochs, self.step, self.metrics)

    def _whole_model(self) -> EVAD:
        """The model as one module on this rank, which may call it as often as it likes, whatever the others do."""
        if self.training.sharding != "fsdp":
            return self.model.eval()
        model = EVAD(self.config).to(self.device).eval()
        model.load_state_dict(get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True)))
        return model

    # Checkpoints

    def _state(self) -> tuple[dict, dict]:
        """Weights, and the optimizer's state by parameter names; whole, on the CPU."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_state_dict(self.model, self.optimizer, options=options)

    def _save(self) -> None:
        weights, optimizer = self._state()
        if self.rank:
            return
        epoch, iteration = divmod(self.step, self.epoch_steps)
        state = {
            "run": json.dumps(self.run.document()),
            "step": self.step,
            "epoch": epoch,
            "iteration": iteration,
            "epoch_steps": self.epoch_steps,
            "optimizer": optimizer,
        }
        keep = self.training.keep_checkpoints
        write_snapshot(self.snapshots, self.step, weights, self.config, self.labels, state, keep=keep)

    def _resume(self) -> int:
        """Take over the newest good checkpoint, if there is one; returns the step it was written after."""
        snapshot = read_snapshot(self.snapshots)
        self._agree(snapshot.state["step"] if snapshot else 0)
        if snapshot is None:
            return 0
        state, now = snapshot.state, json.loads(json.dumps(self.run.document()))
        defaults = json.loads(json.dumps(Run(EVADConfig(), Training(), {}, frozenset()).document()))
        before = {name: defaults[name] | section for name, section in json.loads(state["run"]).items()}  # of older code
        differences, of_evaluation = (
            _differences(*(_settings(document, split, self.config) for document in (before, now)))
            for split in ("train", "val")
        )
        of_evaluation = [difference for difference in of_evaluation if difference not in differences]
        if state["epoch_steps"] != self.epoch_steps:
            differences.append(("data: steps an epoch", state["epoch_steps"], self.epoch_steps))
        for name, then, current in differences:
            # A run that stopped at a bad clip may go on without it: what came before is the same. Files may have moved.
            changeable = name.startswith("training.") or name in ("data.on_error", "data.media")
            if not changeable or name == "training.batch_size":
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {then!r}, not {current!r}: another folder begins anew"
                )
        if state["step"] > self.steps:
            raise ValueError(
                f"{self.folder} holds a run after {state['step'] / self.epoch_steps:.4g} epochs, more than "
                f"training.epochs = {self.config.epochs}: another folder begins anew"
            )
        differences += [(name.replace("data.", "data.val."), *values) for name, *values in of_evaluation]
        for name, then, current in differences:
            if self.rank == 0:
                warnings.warn(f"{self.folder}: resumed with {name} = {current!r}, was {then!r}", stacklevel=3)
        # Loading fills in the optimizer's state by a step that must not change anything; it takes the groups' settings,
        # too, where this run's hold.
        settings = [{**group} for group in self.optimizer.param_groups]
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=snapshot.weights,
            optim_state_dict=state["optimizer"],
            options=options,
        )
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group |= own | {"params": group["params"]}
        return state["step"]


def _settings(document: dict, split: str, config: EVADConfig) -> dict[str, object]:
    """A run's settings by "section.key", every default in its place; of its data those that hold for a split."""
    sections = document | {"data": json.loads(json.dumps(data.settings(document["data"], split, config)))}
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def _differences(then: dict, now: dict) -> list[tuple[str, object, object]]:
    """Names, with both values."""
    return [(name, then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)]


class Pace:
    """Seconds a step takes, lately."""

    def __init__(self) -> None:
        self.last, self.seconds = time.perf_counter(), None

    def tick(self) -> float:
        now = time.perf_counter()
        taken, self.last = now - self.last, now
        self.seconds = taken if self.seconds is None else 0.9 * self.seconds + 0.1 * taken
        return self.seconds


class Log:
    """``log.csv``, ``evaluation.csv`` and TensorBoard's file of a run; rows after ``step``, of a run killed, go."""

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.steps, self.evaluations = folder / "log.csv", folder / "evaluation.csv"
        for path, numbers in ((self.steps, ("step",)), (self.evaluations, ("step", "epochs"))):
            rows = [row for row in _whole_rows(path, numbers) if int(row["step"]) <= step]
            draft = path.with_name(f".{path.name}.draft")
            draft.unlink(missing_ok=True)
            _write_rows(draft, rows)
            draft.replace(path)
        self.board = _tensorboard(folder / "tensorboard", step)

    def write(self, progress: Progress) -> None:
        row = {
            "step": progress.step,
            "epoch": progress.epoch,
            "learning_rate": progress.learning_rate,
            **progress.losses,
            "gradient_norm": progress.gradient_norm,
            "clips_per_second": round(progress.clips_per_second, 3),
        }
        _write_rows(self.steps, [row])
        self._show(row, "train")

    def last(self) -> tuple[dict[str, float], dict[str, float]]:
        """Losses and metrics of the last rows."""
        losses, metrics = ((_read_rows(path) or [{}])[-1] for path in (self.steps, self.evaluations))
        losses = {name: value for name, value in losses.items() if name.startswith("loss_")}
        metrics = {name: value for name, value in metrics.items() if name not in ("step", "epochs")}
        return tuple({name: _number(value) for name, value in row.items() if value} for row in (losses, metrics))

    def has_evaluation(self, epochs: int) -> bool:
        return any(row["epochs"] == str(epochs) for row in _read_rows(self.evaluations))

    def write_evaluation(self, epochs: int, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, "epochs": epochs, **metrics}
        _write_rows(self.evaluations, [row])
        self._show(row, "evaluation")

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _show(self, row: dict, group: str) -> None:
        if self.board is not None:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(f"{group}/{name}", value, row["step"])


def _read_rows(path: Path) -> list[dict]:
    """The whole rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _whole_rows(path: Path, numbers: Sequence[str]) -> list[dict]:
    """The rows of a log whose columns ``numbers`` are whole numbers; a file that is no such log is set aside."""
    try:
        rows = _read_rows(path)
        for row in rows:
            for name in numbers:
                int(row[name])
        return rows
    except (KeyError, ValueError, csv.Error) as error:
        aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
        path.replace(aside)
        what = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} cannot be read ({what}): set aside as {aside.name}, a new one begins", stacklevel=2)
        return []


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Append rows under the file's header, which the first row of all gives."""
    names = None
    if path.exists():
        with path.open(newline="") as file:
            names = next(csv.reader(file), None)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(
            file, names or (rows[0] if rows else ()), restval="", extrasaction="ignore", lineterminator="\n"
        )
        if names is None and rows:
            writer.writeheader()
        writer.writerows(rows)


def _tensorboard(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=step + 1)


def _to(clips: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    if isinstance(clips, Tensor):
        return clips.to(device, non_blocking=True)
    return [clip.to(device, non_blocking=True) for clip in clips]


def _mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
