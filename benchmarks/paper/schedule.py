"""Which runs are made, in which order, one by one or several at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from . import runner
from .experiments import RUNS, Run


def make_all(plan: runner.Plan, names: list[str], seeds: list[int], records: Path, work: Path, jobs: int = 1) -> int:
    """Make what has no record, a run with all its seeds before the next run; returns how many were made."""
    chosen = [run for run in RUNS if any(run.name.startswith(name) for name in names)]
    # There is one shipped model.
    todo = [(run, seed) for run in chosen for seed in (seeds[:1] if run.kind == "shipped" else seeds)]
    todo = [job for job in todo if not runner.record_path(records, *job, plan.precision).exists()]
    if jobs > 1:
        return sum(_at_once(plan, todo, records, work, jobs))
    return sum(_make(run, seed, plan, records, work) for run, seed in todo)


def _make(run: Run, seed: int, plan: runner.Plan, records: Path, work: Path) -> bool:
    _say(f"{run.name}, seed {seed}")
    return runner.make(run, seed, plan, records, work, _say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _at_once(
    plan: runner.Plan, todo: Sequence[tuple[Run, int]], records: Path, work: Path, jobs: int
) -> Iterator[bool]:
    """Make the runs in processes of their own, in order but for those that wait for their seed's start."""
    # Read-only mappings cannot be sent to a process.
    plan = plan._replace(model=dict(plan.model))
    waiting = [(run._replace(model=dict(run.model)), seed) for run, seed in todo]
    ready = {None}  # seeds that have their start; None for runs that need none
    starts = list(dict.fromkeys(seed for run, seed in todo if run.kind == "train"))
    going: dict[Future, int | None] = {}  # and which seed will be ready
    share = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, _begin, (share,)) as pool:
        while waiting or going:
            while len(going) < jobs:
                if starts:
                    seed = starts.pop(0)
                    going[pool.submit(runner.make_start, seed, plan, work, _say)] = seed
                    continue
                able = (i for i, (run, seed) in enumerate(waiting) if (seed if run.kind == "train" else None) in ready)
                if (index := next(able, None)) is None:
                    break
                going[pool.submit(_make, *waiting.pop(index), plan, records, work)] = None
            for done in wait(going, return_when=FIRST_COMPLETED).done:
                ready.add(going.pop(done))
                yield done.result() is True


def _begin(threads: int) -> None:
    """A process's first act: take its share of the threads, and see to it that it ends when its parent is killed."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
