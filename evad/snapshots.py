"""Snapshots of a run: all it needs to go on, so that a run killed at any moment loses no more than a few steps.

A snapshot is a folder ``step_00001234`` with the weights (safetensors, as ``save_checkpoint`` writes them), the state
of the run (read with ``weights_only=True``) and the checksums of both. It is written under another name, flushed to the
disk, then renamed: whatever the name stands for is complete. What was damaged later is found by its checksum, and
the snapshot before it serves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from .checkpoint import write_weights
from .config import EVADConfig

CHECKPOINTS = "checkpoints"  # in a run's folder, the folder of its snapshots
WEIGHTS, STATE, CHECKSUMS = "model.safetensors", "state.pt", "sha256.json"
FULL = 1 << 20  # bytes; a disk with less is full
_NAME = re.compile(r"step_([0-9]{8,})")


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, and what is left of it."""


class Snapshot(NamedTuple):
    path: Path
    weights: dict[str, Tensor]
    state: dict


def write_snapshot(
    folder: Path,
    step: int,
    weights: Mapping[str, Tensor],
    config: EVADConfig,
    labels: Sequence[str],
    state: dict,
    *,
    keep: int,
) -> Path:
    """Write a snapshot, then delete those of later steps (a run that comes to this one starts before them, as they are
    damaged), and all but the ``keep`` newest.

    Raises:
        TrainingError: it cannot be written, for want of space, say; those that exist are untouched.
    """
    from safetensors import SafetensorError

    path = folder / f"step_{step:08d}"
    draft = folder / f".{path.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_weights(weights, config, draft / WEIGHTS, labels)
        torch.save(state, draft / STATE)
        checksums = {name: _checksum(draft / name) for name in (WEIGHTS, STATE)}
        (draft / CHECKSUMS).write_text(json.dumps(checksums))
        for name in (WEIGHTS, STATE, CHECKSUMS, "."):
            _flush(draft / name)
        _delete(path)  # damaged, or this run would have started from it
        draft.rename(path)
        _flush(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        reason = f"the disk of {folder} is full" if is_full(folder, error) else what
        shutil.rmtree(draft, ignore_errors=True)
        raise TrainingError(
            f"the checkpoint of step {step} cannot be written: {reason}; {last_good(folder)}"
        ) from error
    paths = snapshots(folder)
    newest = paths.index(path)
    for other in (*paths[newest + 1 :], *paths[: newest + 1][:-keep]):
        _delete(other)
    return path


def claim(folder: Path) -> IO:
    """Make a run's folder this process's for as long as it lives and the returned file is open, and clear
    what a run that was killed there left; nothing further down, where other runs may be.

    Raises:
        ValueError: another process has it: a run that was not killed, or not yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of those that load its data
    except BlockingIOError as error:
        file.close()
        raise ValueError(f"{folder} is in use by another process that trains") from error
    for left in list((folder / CHECKPOINTS).glob(".step_*")):  # by a run that was killed as it wrote or deleted
        shutil.rmtree(left, ignore_errors=True)
    return file


def read_snapshot(folder: Path) -> Snapshot | None:
    """The newest snapshot that is whole, on the CPU; a warning for each that is not. None where there is none.

    Raises:
        TrainingError: there are snapshots, and all are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = snapshots(folder)
    for path in reversed(paths):
        try:
            _verify(path)
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
            return Snapshot(path, load_file(path / WEIGHTS), state)
        except (OSError, ValueError, RuntimeError, AttributeError, pickle.UnpicklingError, SafetensorError) as error:
            warnings.warn(f"{path} is damaged ({error}): the checkpoint before it is used", stacklevel=2)
    if paths:
        raise TrainingError(f"all {len(paths)} checkpoints in {folder} are damaged; the newest is {paths[-1].name}")
    return None


def snapshots(folder: Path) -> list[Path]:
    """Oldest first; what is called otherwise, such as a copy, is none."""
    return sorted((path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def last_good(folder: Path) -> str:
    """For a message."""
    paths = snapshots(folder)
    for path in reversed(paths):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            _verify(path)
            return f"the last good checkpoint is {path}"
    return "there is no good checkpoint" if paths else "there is no checkpoint yet"


def _verify(path: Path) -> None:
    """Raise where a snapshot's files are not those that were written."""
    for name, checksum in json.loads((path / CHECKSUMS).read_text()).items():
        if _checksum(path / name) != checksum:
            raise ValueError(f"{name} is not what was written")


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Gone at once, as far as names go."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def is_full(folder: Path, error: Exception) -> bool:
    """Whether a write failed for want of space. torch and safetensors do not pass on what the system said; so ask while
    what there is of the file still takes up space."""
    said = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return said or shutil.disk_usage(folder).free < FULL
