"""Times ours and every rival in one process, round by round, after checking that ours is right.

A round calls every contestant once, in an order that rotates, so a slow moment of the machine falls on all of them.
Results are medians with the 20th and 80th percentiles. On a GPU a round is several calls and one synchronisation, and
calls are replays of CUDA graphs where a contestant can be captured: what is compared is kernels, not Python. "ours,
launched" is ours as a plain call, which goals compare with a rival that no graph can hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import Ceilings, Work, captured
from evad_kernels import _backend, use_backend

ROOT = Path(__file__).parent.parent
PATIENCE = 5.0  # seconds: a rival that takes longer is called once


class Contestants(NamedTuple):
    """What a benchmark compares."""

    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object] | str]  # a string says why this rival cannot run here
    check: Callable[[], None]  # raises if ours is wrong; runs before anything is timed
    work: Work | None = None
    waits: tuple[str, ...] = ()  # rivals that wait for the device, so that no graph can hold them


class Goal(NamedTuple):
    """``value`` bounds what ``measure`` names.

    ``speed-up``: time(rival) / time(ours), at least ``value``. ``time``: time(ours) / time(rival), at most ``value``.
    ``harvest``: time(rival) / time(ours) / ``base``, at least ``value``, where ``base`` is how many times ours the
    rival's operations are. ``ms``: time(ours) in milliseconds, at most ``value``. ``floor``: time(ours) / the row's
    floor, at most ``value``. ``memory``: extra peak memory / ``base`` bytes (0: / the rival's), at most it.
    """

    measure: str
    value: float
    rival: str | tuple[str, ...] = ""  # of several the fastest
    base: float = 0

    def outcome(
        self,
        milliseconds: dict[str, float],
        memory: dict[str, float],
        floor: float | None = None,
        launched: Collection[str] = (),
    ) -> dict:
        """The goal in words, what was reached (None: not measured), and whether that meets it.

        Rivals in ``launched`` are compared with ours as it is launched, not with the replay of its graph.
        """
        several = (self.rival,) if isinstance(self.rival, str) else self.rival
        rival = min((name for name in several if name in milliseconds), key=milliseconds.get, default=None)
        name = several[0] if len(several) == 1 else f"the fastest of {', '.join(several)}"
        ours, theirs = milliseconds["ours"], milliseconds.get(rival)
        name += f" ({rival})" if rival and len(several) > 1 else ""
        if rival in launched:
            ours, name = milliseconds["ours, launched"], f"{name}, both launched"
        if self.measure == "memory":
            base = self.base or memory.get(several[0])
            reached = memory["ours"] / base if "ours" in memory and base else None
            text = f"extra memory at most {self.value:.0%} of {several[0]}"
        elif self.measure == "ms":
            reached, text = ours, f"at most {self.value:g} ms"
        elif self.measure == "floor":
            reached, text = floor and ours / floor, f"at most {self.value:.3g} times the floor"
        elif self.measure == "harvest":
            reached = theirs and theirs / ours / self.base
            text = f"{self.value:.0%} of {self.base:.3g}x, what the operations saved from {name} allow"
        elif self.measure == "speed-up":
            reached, text = theirs and theirs / ours, f"at least {self.value:g}x {name}"
        else:
            reached, text = theirs and ours / theirs, f"at most {self.value:g} of {name}"
        if reached is None:
            return {"goal": text, "reached": None, "met": False}
        met = reached >= self.value if self.measure in ("speed-up", "harvest") else reached <= self.value
        return {"goal": text, "reached": significant(reached), "met": bool(met)}


def either(on_cpu: dict, on_gpu: dict, later: Collection[str] = ()) -> pytest.MarkDecorator:
    """Cases of both devices; ``Contest.chosen`` skips those of the other. On a GPU ``later`` ones end the file."""
    cases = dict.fromkeys((*on_cpu, *on_gpu))
    return pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.later] * (x in later)) for x in cases])


class Contest:
    """The ``contest`` fixture: one row of results a call of ``run``."""

    def __init__(self, benchmark, stem: str, ceilings: Ceilings, smoke: bool, rows: list):
        self.benchmark, self.stem, self.ceilings, self.smoke, self.rows = benchmark, stem, ceilings, smoke, rows
        self.device = ceilings.device

    def chosen(self, case: str, on_cpu: dict[str, dict], on_gpu: dict[str, dict]) -> dict:
        """The arguments of a case here; skips one of the other device."""
        here, other = (on_cpu, "GPU") if self.device == "cpu" else (on_gpu, "CPU")
        if case not in here:
            pytest.skip(f"measured on a {other}")
        return here[case]

    def run(
        self,
        op: str,
        case: str,
        build: Callable[..., Contestants],
        arguments: dict,
        *,
        goals: tuple[Goal, ...] = (),
        memory_of: tuple[str, ...] = (),
        warm_up: dict | None = None,
        gradient: bool = False,
        headline: bool = False,
        seconds: float = 3.0,
        capture: bool = True,
        describe: Callable[[Contestants], dict] | None = None,
    ) -> None:
        """Check, time and record one case.

        Args:
            op: The public function measured.
            case: Names the row within the op.
            build: ``build(device=..., **arguments)`` makes the contestants. A module's function, because peak memory is
                measured by calling it again in a fresh process.
            goals: What the row should reach.
            memory_of: Contestants whose peak memory is measured too.
            warm_up: For that, arguments that make the case tiny.
            gradient: Whether autograd is on.
            headline: Whether the row stands in the README.
            seconds: How long to time, all contestants together.
            capture: Whether a GPU replays graphs of the contestants; False where they are graphs already.
            describe: What else the row holds, under "details"; called after timing.
        """
        with nullcontext() if gradient else torch.inference_mode(), self._stream():
            contestants = build(device=self.device, **arguments)
            contestants.check()
            functions = {"ours": contestants.ours}
            rivals = {**contestants.rivals, **self._other_backends(op, contestants.ours)}
            unavailable = {}
            for name, rival in rivals.items():
                # On a GPU torch.compile captures graphs in the second call, and replays them from the third on.
                reason = rival if isinstance(rival, str) else _first_calls(rival, 1 if self.device == "cpu" else 3)
                if reason is None:
                    functions[name] = rival
                else:
                    unavailable[name] = reason
            several, launched = self._several(functions, contestants.waits, capture and self.device != "cpu")
            samples = self._time(several, seconds)
            details = describe(contestants) if describe else {}
            if self.device == "cpu":
                memory = measure_memory(build, arguments, warm_up or {}, gradient, memory_of)
            else:
                memory = {name: bytes_on_gpu(functions[name]) for name in memory_of if name in functions}
        times = {name: _percentiles(values) for name, values in samples.items()}
        milliseconds = {name: time["ms"] for name, time in times.items()}
        floor = None if contestants.work is None else self.ceilings.floor(contestants.work)
        row = {
            "bench": self.stem,
            "op": op,
            "case": case,
            "headline": headline,
            "times": times,
            "unavailable": unavailable,
            "goals": [goal.outcome(milliseconds, memory, floor and floor["ms"], launched) for goal in goals],
        }
        row["goals"] += details.pop("goals", [])
        if floor:
            row["floor"] = {**floor, "reached": significant(floor["ms"] / milliseconds["ours"])}
        if launched:
            row["launched"] = launched
        if memory:
            row["memory_mb"] = {name: significant(value / 1e6) for name, value in memory.items()}
        if details:
            row["details"] = details
        self.rows.append(row)

    def first_calls(
        self,
        op: str,
        case: str,
        build: Callable[..., Contestants],
        arguments: dict,
        others: dict[str, dict],
        *,
        most: float,
        gradient: bool = False,
    ) -> None:
        """Time the first call of ours for each of ``others``, which changes ``arguments``, after a call with these.

        The goal is that the slowest takes at most ``most`` milliseconds. Nothing is checked: other rows do.
        """
        samples = {}

        def first(**changed):
            function = build(device=self.device, **{**arguments, **changed}).ours
            return self._once(functools.partial(self._calls, function), 1)

        def measure():
            samples.update((name, first(**changed)) for name, changed in others.items())

        with nullcontext() if gradient else torch.inference_mode(), self._stream():
            first()
            self.benchmark.pedantic(measure)
        goal = Goal("ms", most).outcome({"ours": 1e3 * max(samples.values())}, {})
        self.rows.append(
            {
                "bench": self.stem,
                "op": op,
                "case": case,
                "headline": False,
                "times": {"ours": _percentiles(list(samples.values()))},
                "unavailable": {},
                "goals": [{**goal, "goal": f"the slowest {goal['goal']}"}],
                "details": {"first_call_ms": {name: significant(1e3 * value) for name, value in samples.items()}},
            }
        )

    def _stream(self) -> contextlib.AbstractContextManager:
        """One stream for all that a row does: a backward runs where its forward did, and there it is captured."""
        return nullcontext() if self.device == "cpu" else torch.cuda.stream(torch.cuda.Stream())

    def _other_backends(self, op: str, ours: Callable) -> dict[str, Callable]:
        """The op (its name begins the row's) on the backends of a GPU that are not chosen by themselves."""
        op = op.partition(",")[0]
        if self.device == "cpu" or op not in _backend.IMPLEMENTED:
            return {}
        here = [name for name in _backend.IMPLEMENTED[op] if _backend.DEVICE[name] == "cuda"]
        chosen = next((name for name in here if _backend.unavailable(op, name) is None), None)
        return {f"ours, backend {name}": on_backend(name, ours) for name in here if name != chosen}

    def _several(
        self, functions: dict[str, Callable], waits: Collection[str], capture: bool
    ) -> tuple[dict[str, Callable[[int], None]], dict[str, str]]:
        """Each contestant as a function of how many calls to make, and those that no graph holds though asked for: why.

        Where ours is among these, the others are plain calls too.
        """
        calls = {name: functools.partial(self._calls, function) for name, function in functions.items()}
        if not capture:
            return calls, {}
        launched = {name: "waits for the device" for name in waits if name in functions}
        replays = {"ours, launched": calls["ours"]}
        for name in [name for name in functions if name not in launched]:
            try:
                replays[name] = functools.partial(self._calls, captured(functions[name]))
            except Exception as error:  # what cannot be captured is timed as users call it
                launched[name] = _first_line(error)
        return (calls, {"ours": launched["ours"]}) if "ours" in launched else (calls | replays, launched)

    def _time(self, several: dict[str, Callable[[int], None]], seconds: float) -> dict[str, list[float]]:
        """Seconds of one call, for every contestant and round."""
        calls = rounds = 1
        names, once = list(several), {}
        if not self.smoke:
            estimate = {name: self._once(several[name], 1) for name in names}
            once = {name: [first] for name, first in estimate.items() if first > PATIENCE and name != "ours"}
            names = [name for name in names if name not in once]
            estimate = {name: min(estimate[name], self._once(several[name], 1)) for name in names}
            calls = max(1, round((100e-6 if self.device == "cpu" else 2e-3) / estimate["ours"]))
            rounds = int(np.clip(seconds / (calls * sum(estimate.values())), 5, 300))
        samples = {name: [] for name in names}
        turn = iter(range(rounds + 1))

        def rivals_first():
            shift = next(turn) % len(names)
            for name in names[shift:] + names[:shift]:
                if name != "ours":
                    samples[name].append(self._once(several[name], calls))

        # pytest-benchmark times ours; its setup, which runs before every round, times the rivals.
        self.benchmark.pedantic(lambda: several["ours"](calls), setup=rivals_first, rounds=rounds)
        if self.benchmark.stats is None:  # --benchmark-disable
            return {**samples, **once, "ours": [self._once(several["ours"], calls)]}
        return {**samples, **once, "ours": [value / calls for value in self.benchmark.stats.stats.data]}

    def _calls(self, function: Callable, calls: int) -> None:
        for _ in range(calls):
            function()
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _once(self, several: Callable[[int], None], calls: int) -> float:
        begin = time.perf_counter()
        several(calls)
        return (time.perf_counter() - begin) / calls


def on_backend(name: str, function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with use_backend(name):
            return function()

    return call


def _first_calls(rival: Callable, number: int) -> str | None:
    """Calls a rival (which may compile now) and says why it cannot run, or None."""
    try:
        for _ in range(number):
            rival()
    except Exception as error:  # whatever a rival raises, it is recorded, not ours to fix
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


def _percentiles(samples: list[float]) -> dict:
    p20, median, p80 = (significant(1e3 * value) for value in np.percentile(samples, (20, 50, 80)))
    return {"ms": median, "p20": p20, "p80": p80, "rounds": len(samples)}


def significant(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def backward_of(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor | None = None
) -> Callable[[], tuple]:
    """The backward alone, again and again, on the graph of one forward, which the first call runs."""
    kept = []

    def call():
        if not kept:
            output = forward()
            drawn = draw(*output.shape, seed=3, dtype=output.dtype, device=output.device) if grad is None else grad
            kept.append((output, drawn))
        output, grad_output = kept[0]
        return torch.autograd.grad(output, leaves, grad_output, retain_graph=True, allow_unused=True)

    return call


def assert_same(ours: object, rival: object) -> None:
    """Two results of one value or several, bit for bit."""
    pair = (ours, rival) if isinstance(ours, Tensor) else (torch.cat([x.flatten() for x in y]) for y in (ours, rival))
    torch.testing.assert_close(*pair, rtol=0, atol=0)


# Peak memory: bytes at the peak of one call beyond what lay there before and beyond the results. On a CPU in a fresh
# process, because buffers that an earlier call left behind would hide what a call needs.


def bytes_on_gpu(function: Callable[[], object]) -> float:
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - _bytes(result)


def measure_memory(
    build: Callable, arguments: dict, warm_up: dict, gradient: bool, names: tuple[str, ...]
) -> dict[str, float]:
    """Bytes of a call on the CPU, for each contestant named."""
    if not sys.platform.startswith("linux"):
        return {}
    request = [
        build.__module__,
        build.__name__,
        {**arguments, "device": "cpu"},
        {**arguments, **warm_up, "device": "cpu"},
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # where this process found ``build``
    memory = {}
    for name in names:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks._harness", json.dumps([*request, gradient, name])]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if process.returncode != 0:
            raise RuntimeError(f"measuring the memory of {name} failed: {process.stderr[-2000:]}")
        memory[name] = float(process.stdout.splitlines()[-1])
    return memory


def _memory_of_one_call(module: str, build: str, arguments: dict, warm_up: dict, gradient: bool, name: str) -> float:
    build = getattr(importlib.import_module(module), build)

    def contestant(arguments):
        contestants = build(**arguments)
        return contestants.ours if name == "ours" else contestants.rivals[name]

    with nullcontext() if gradient else torch.inference_mode():
        contestant(warm_up)()  # loads libraries and code, starts threads
        function = contestant(arguments)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        result = function()
        return _status("VmHWM") - before - _bytes(result)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def _bytes(result: object) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(map(_bytes, result)) if isinstance(result, (tuple, list)) else 0


if __name__ == "__main__":
    print(_memory_of_one_call(*json.loads(sys.argv[1])))
