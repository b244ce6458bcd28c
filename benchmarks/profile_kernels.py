"""Which kernels an op's time goes to, beside its bytes, operations and the machine's ceilings: the profile of a miss.

    python -m benchmarks.profile_kernels --out DIR                  # what has a goal on a GPU (on a CPU: all)
    python -m benchmarks.profile_kernels --out DIR gather "N4608 B8"    # names that hold one of these
    python -m benchmarks.profile_kernels --list

Ours is built as the bench files build it; there it is checked and timed. Here a call is profiled alone, CALLS times: a
kernel's time is the median of what its launches take in a call, without the gaps between them. Bytes, operations and
exponentials are what the op must do at least (``Work``); per cents are of the rates that copies, matrix products and
exponentials reach here. The first case of every op comes first, and DIR/profile.json and .md hold what is known so far.
On a CPU the profiler sees operators, not kernels. Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_keyframe_attention as attention
from benchmarks import bench_pyramid_roi_align as pyramid
from benchmarks import bench_roi_align_3d as roi
from benchmarks import bench_scatter_tokens as scatter
from benchmarks import bench_token_selection as selection
from benchmarks import report
from benchmarks._harness import Contestants, significant
from benchmarks.ceilings import Ceilings
from evad_kernels import _backend

CALLS = 5
SHOWN = 12  # kernels of a case in profile.md
NO_GOAL = re.compile(r"\bB1\b|\bD128\b|\bfloat32\b|importance too")  # on a GPU


class Case(NamedTuple):
    build: Callable[..., Contestants]
    arguments: dict
    gradient: bool


OPS = {  # as the rows of results are called: how ours is built; cases on a CPU, on a GPU; whether autograd is on
    "keyframe_attention_topk": (attention.build_topk, attention.TOPK, attention.TOPK_GPU, False),
    "keyframe_attention_topk, backward of kept rows": (attention.build_backward_alone, {}, attention.MAIN, True),
    "keyframe_attention_topk, forward + backward": (
        attention.build_backward,
        attention.BACKWARD,
        attention.BACKWARD_GPU,
        True,
    ),
    "keyframe_attention, score pass": (attention.build_score, {}, attention.MAIN, False),
    "keyframe_attention with importance": (attention.build_importance, {}, attention.MAIN, False),
    "select_tokens with inverse map": (
        selection.build_select_with_map,
        selection.SELECT,
        selection.SELECT_GPU,
        False,
    ),
    "gather_tokens": (selection.build_gather, selection.GATHER, selection.GATHER_GPU, False),
    "scatter_tokens": (scatter.build, scatter.CASES, scatter.CASES_GPU, False),
    "roi_pool_3d": (roi.build, roi.CASES, roi.CASES_GPU, False),
    "roi_pool_3d, backward": (roi.build, roi.BACKWARD, roi.BACKWARD_GPU, True),
    "pyramid_roi_align": (pyramid.build, pyramid.CASES, pyramid.CASES_GPU, False),
    "pyramid_roi_align, backward": (pyramid.build, pyramid.BACKWARD, pyramid.BACKWARD_GPU, True),
}


def every_case(device: str) -> dict[tuple[str, str], Case]:
    """Op and case, the first of every op, then the second ones, ..."""
    by_op = [
        [((op, name), Case(build, arguments, gradient)) for name, arguments in of_device.items()]
        for op, (build, on_cpu, on_gpu, gradient) in OPS.items()
        for of_device in [
            on_cpu if device == "cpu" else {name: case for name, case in on_gpu.items() if not NO_GOAL.search(name)}
        ]
    ]
    return dict(filter(None, itertools.chain.from_iterable(itertools.zip_longest(*by_op))))


def launches(function: Callable[[], object], device: str) -> dict[str, list[float]]:
    """Kernels of one call, in order of their first launch, and the microseconds of each launch."""
    on_cpu = device == "cpu"
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as record:
        function()
        if not on_cpu:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in record.events():
        if on_cpu:
            found.setdefault(event.name, []).append(event.self_cpu_time_total)
        elif event.device_type == DeviceType.CUDA:  # the others are calls of the driver
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    return found


def kernels_of(function: Callable[[], object], device: str) -> list[dict]:
    """The kernels of a call, the longest first."""
    for _ in range(2):  # compiles, makes the graph of a backward
        function()
    calls = [launches(function, device) for _ in range(CALLS)]
    kernels = [
        {
            "kernel": name,
            "launches": round(median(len(call.get(name, ())) for call in calls)),
            "us": significant(median(sum(call.get(name, ())) for call in calls)),
        }
        for name in dict.fromkeys(itertools.chain.from_iterable(calls))
    ]
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def profiled(case: Case, ceilings: Ceilings) -> dict:
    """Kernels, and what the ceilings allow of their time."""
    with nullcontext() if case.gradient else torch.inference_mode():
        contestants = case.build(device=ceilings.device, **case.arguments)
        kernels = kernels_of(contestants.ours, ceilings.device)
    total = sum(kernel["us"] for kernel in kernels)
    if total == 0:
        raise RuntimeError("the profiler saw no kernel")
    work = contestants.work
    seconds = ceilings.seconds(work)
    return {
        "us": significant(total),
        "bytes": work.bytes,
        "flops": work.flops,
        "exps": work.exps,
        "of_ceiling": {what: significant(1e6 * least / total) for what, least in seconds.items() if least},
        "kernels": kernels,
    }


def section(row: dict) -> str:
    """A row as Markdown."""
    title = f"### {row['op']}, {row['case']}"
    if "error" in row:
        return f"{title}\n\n{row['error']}"
    amounts = {
        "bytes": f"{row['bytes'] / 1e6:.4g} MB",
        "flops": f"{row['flops'] / 1e9:.4g} GFLOP",
        "exp": f"{row['exps'] / 1e6:.4g} M exponentials",
    }
    parts = [f"{amounts[what]} ({share:.0%} of the ceiling)" for what, share in row["of_ceiling"].items()]
    lines = [
        (
            kernel["kernel"][:100].replace("|", "\\|"),
            kernel["launches"],
            report.number(kernel["us"]),
            f"{kernel['us'] / row['us']:.0%}",
        )
        for kernel in row["kernels"][:SHOWN]
    ]
    table = report.lines_of(("kernel", "launches", "us", "share"), lines)
    return f"{title}\n\n{report.number(row['us'])} us: {', '.join(parts)}.\n\n{table}"


def write(folder: Path, machine: dict, rows: list[dict]) -> None:
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    (folder / "profile.json").write_text(f'{{\n  "machine": {json.dumps(machine)},\n  "rows": [\n{lines}\n  ]\n}}\n')
    parts = ["# Profile of kernels", report.heading(machine), f"Commit: {report.commit()}.", *map(section, rows)]
    (folder / "profile.md").write_text("\n\n".join(parts) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="CASE", help='parts of names "OP, CASE"; by default all')
    parser.add_argument("--out", type=Path, default=Path("profile"), help="folder of profile.json and .md (profile)")
    parser.add_argument("--seconds", type=float, default=75, help="no case begins after this time (75)")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args(arguments)
    end = time.monotonic() + asked.seconds
    cases = {", ".join(key): (key, case) for key, case in every_case(asked.device).items()}
    chosen = [name for name in cases if not asked.names or any(part in name for part in asked.names)]
    if asked.list or not chosen:
        print("\n".join(cases))
        return int(not chosen)
    asked.out.mkdir(parents=True, exist_ok=True)
    ceilings = Ceilings(asked.device)
    if asked.device != "cpu":
        _backend.ON_TRIAL.clear()  # as in the benchmarks
    machine, rows = report.machine(ceilings), []
    for name in chosen:
        (op, case), built = cases[name]
        try:
            if time.monotonic() > end:
                raise TimeoutError("no time left")
            found = profiled(built, ceilings)
            print(f"{name}: {report.number(found['us'])} us, most of it {found['kernels'][0]['kernel'][:60]}")
        except Exception as error:  # one case that fails does not hide the others
            found = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            print(f"{name}: {found['error']}", flush=True)
        rows.append({"op": op, "case": case, **found})
        write(asked.out, machine, rows)
        gc.collect()
        if asked.device != "cpu":
            torch.cuda.empty_cache()
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
