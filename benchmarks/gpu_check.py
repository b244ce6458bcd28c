"""Everything that only a GPU can show, with one report; needs no network. Three commands, each under ten minutes:

    python benchmarks/gpu_check.py --out DIR             # is it right: every op, tests, sanitizers; then `measure`
    python benchmarks/gpu_check.py --out DIR measure     # tiles of attention, then every op beside its rivals
    python benchmarks/gpu_check.py --out DIR evad        # the detector beside torch.compile, by keep rate; training
    python benchmarks/gpu_check.py --out DIR memcheck-triton tests-cuda    # some stages or groups, in this order
    python benchmarks/gpu_check.py --list

Each builds first, which takes seconds where it was built before. A stage has its own time limit and log; later stages
run though earlier ones fail. What is right runs side by side, what measures runs alone, the most telling first. What is
known is written into DIR every few seconds, should the machine stop: report.txt begins with the table of stages and has
every log; beside it lie results, rows as they were measured, and tuning, to be copied where the report says. Exit
status 0 only if every stage passed.

Some rivals and tests want more than torch: torchvision, flash-colreduce (`pip install --no-deps`), transformers, av.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
OPS = {  # file of tests -> public functions
    "keyframe_attention": ("keyframe_attention", "keyframe_attention_topk"),
    "roi_align_3d": ("roi_align_3d", "roi_pool_3d"),
    "pyramid_roi_align": ("pyramid_roi_align",),
    "scatter_tokens": ("scatter_tokens",),
    "token_selection": ("select_tokens", "gather_tokens"),
}
OP_TESTS = [f"tests/test_{name}.py" for name in (*OPS, "every_op", "evad_model")]
EVAD_TESTS = [f"tests/test_evad_{name}.py" for name in ("compiled", "static")]
EVAD_TESTS += ["tests/test_evad_stream.py"] if importlib.util.find_spec("av") else []
DETECTORS = {  # rows of bench_evad.py, the most telling first
    "224": "bench_forward and 224 and not one",
    "288": "bench_forward and ViT-B and 288 and not 288x512",
    "training": "bench_training",
    "one": "bench_forward and one",
    "ViT-L": "bench_forward and ViT-L",
    "288x512": "bench_forward and 288x512",
    "256": "bench_forward and 256",
}
REPORT_TAIL = 60_000  # characters of a log that the report keeps
GRACE = 20  # seconds between the request to end and the end: pytest names its failures, benchmarks write their rows
REWRITTEN = ("benchmarks/results/*.json", "benchmarks/results/*.png", "evad_kernels/*_tuning.py")  # by measuring
WANTED = ("torchvision", "flash_colreduce", "transformers", "av", "xdist", "pytest_timeout")


class Stage(NamedTuple):
    command: list[str]
    seconds: int
    beside: str = ""  # stages of one name that follow each other run at once
    environment: dict[str, str] = {}  # noqa: RUF012


class Result(NamedTuple):
    name: str
    outcome: str
    seconds: float


def pytest(workers: int, *arguments: str) -> list[str]:
    """Tests by ``workers`` at once (compiling is most of the time); one that hangs ends alone."""
    options = ["-p", "no:cacheprovider", "--durations=10", "-rfE", "--tb=short", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(workers), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        options += ["--timeout=120", "--timeout-method=thread"]
    return [PYTHON, "-m", "pytest", *options, *arguments]


def bench(name: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "--benchmark", "-rfE", "--tb=short", f"benchmarks/bench_{name}.py", *arguments]


def sanitizer(tool: str, backend: str) -> Stage:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, f"--tool={tool}", "--error-exitcode=9", PYTHON, "tests/gpu_cases.py", backend]
    # Without torch's cache every tensor is an allocation of its own: a step beyond it is seen.
    return Stage(command, 150, "sanitize", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


DESCRIBE = f"""
import importlib.util, subprocess, sys, torch, triton, evad_kernels
subprocess.run("nvidia-smi; nvcc --version; git log -1 --format='%h %s'; git status --short", shell=True)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "python", sys.version.split()[0])
print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
print("not installed:", *(name for name in {WANTED} if importlib.util.find_spec(name) is None))
print(evad_kernels.backends())
"""

STAGES = {
    "build": Stage(
        [PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."], 150, "build"
    ),
    "machine": Stage([PYTHON, "-c", DESCRIBE], 60),
    # Every op in a process of its own: what breaks one does not hide another; Triton's cache is warm after it.
    **{
        f"{backend}-{op}": Stage([PYTHON, "tests/gpu_cases.py", backend, op], 120, "ops")
        for backend in ("triton", "cuda")
        for op in itertools.chain.from_iterable(OPS.values())
    },
    "tests-gpu": Stage(pytest(4, "tests/test_gpu.py"), 270, "tests"),
    "tests-triton": Stage(pytest(10, "-m", "not slow", "-k", "triton and not any_width", *OP_TESTS), 270, "tests"),
    "tests-cuda": Stage(pytest(2, "-m", "not slow", "-k", "cuda", *OP_TESTS), 270, "tests"),
    "tests-evad": Stage(pytest(2, "-m", "not slow", *EVAD_TESTS), 270, "tests"),
    # Captured detectors on our kernels, which "auto" leaves alone until they are tested.
    "tests-evad-triton": Stage(
        pytest(2, "-m", "not slow", EVAD_TESTS[0]), 270, "tests", {"EVAD_KERNELS_BACKEND": "triton"}
    ),
    **{
        f"{tool}-{backend}": sanitizer(tool, backend)
        for tool in ("memcheck", "racecheck", "initcheck")
        for backend in ("triton", "cuda")
    },
    "tune": Stage([PYTHON, "-m", "benchmarks.tune_keyframe_attention", "--write", "--seconds", "110"], 140),
    "bench-attention": Stage(bench("keyframe_attention"), 230),
    "bench-roi": Stage(bench("roi_align_3d"), 90),
    "bench-selection": Stage(bench("token_selection"), 50),
    "bench-scatter": Stage(bench("scatter_tokens"), 50),
    "bench-pyramid": Stage(bench("pyramid_roi_align"), 50),
    "bench-patch": Stage(bench("patch"), 120),
    **{
        f"evad-{name}": Stage(bench("evad", "-k", chosen), 400 if name == "224" else 240)
        for name, chosen in DETECTORS.items()
    },
    "tests-all": Stage(pytest(14, "-m", "not slow", "tests"), 540),
}
GROUPS = {
    "build": ["build", "machine"],
    "ops": [name for name in STAGES if STAGES[name].beside == "ops"],
    "tests": [name for name in STAGES if STAGES[name].beside == "tests"],
    "sanitize": [name for name in STAGES if STAGES[name].beside == "sanitize"],
    "measure": ["tune", *(name for name in STAGES if name.startswith("bench-"))],
}
APART = {"evad": [f"evad-{name}" for name in DETECTORS]}  # named only: torch.compile takes long on whole models


def environment(stage: Stage) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    where = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return (
        os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), "PATH": where} | stage.environment
    )


def run(name: str, log: Path, end: float) -> Result:
    """Runs a stage until its limit or ``end``, its output into ``log``."""
    stage, begin = STAGES[name], time.monotonic()
    seconds = min(stage.seconds, end - begin - GRACE)
    if seconds < 5:
        log.touch()
        return Result(name, "no time left", 0.0)
    print(f"==> {name}, at most {seconds:.0f} s", flush=True)
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        try:
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env=environment(stage), start_new_session=True, **streams
            )
        except OSError as error:
            output.write(str(error))
            return Result(name, "failed to start", 0.0)
        try:
            status = process.wait(timeout=seconds)
            outcome = "ok" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            outcome = "stopped at its limit"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the stage's own session: workers that were left
        process.wait()
    return Result(name, outcome, time.monotonic() - begin)


def summary(log: Path) -> str:
    """The line of a log that says most."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines() if line.strip("= \n")]
    words = (" passed", " failed", " error", "ERROR SUMMARY", "goals met")
    telling = [line for line in lines if any(word in line for word in words)]
    return (telling or lines or [""])[-1][:100]


def report(results: list[Result], logs: Path) -> tuple[str, str]:
    """The table of stages, and the table followed by every log."""
    rows = [f"{r.name:<30} {r.outcome:<20} {r.seconds:4.0f} s  {summary(logs / r.name)}".rstrip() for r in results]
    parts = [f"==== {r.name}\n{(logs / r.name).read_text(errors='replace')[-REPORT_TAIL:]}" for r in results]
    return "\n".join(rows), "\n\n".join(["\n".join(rows), *parts])


def rewritten(since: float) -> list[Path]:
    """What measuring wrote into the checkout."""
    paths = itertools.chain.from_iterable(ROOT.glob(pattern) for pattern in REWRITTEN)
    return [path for path in paths if path.stat().st_mtime >= since]


def save(out: Path, results: list[Result], logs: Path, since: float) -> str:
    """All that is known, into ``out``; the table of stages."""
    table, text = report(results, logs)
    changed = rewritten(since)
    hints = [f"copy {path.name} to {path.relative_to(ROOT).parent}/" for path in changed]
    hints += ["then: python -m benchmarks.report"] if changed else []
    table = "\n".join([table, *hints])
    (out / "report.txt").write_text("\n".join([*hints, text]))
    for path in changed:
        shutil.copy(path, out)
    return table


def batches(names: list[str]) -> Iterator[list[str]]:
    """Stages that run at once."""
    for _, batch in itertools.groupby(names, key=lambda name: STAGES[name].beside or name):
        yield list(batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages or groups, in order; by default all groups")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the report (gpu_check)")
    parser.add_argument("--minutes", type=float, default=9.5, help="nothing runs beyond this time (9.5)")
    parser.add_argument("--list", action="store_true", help="print stages and groups")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}, at most {stage.seconds} s" for name, stage in STAGES.items()))
        print("\n".join(f"{name}: {' '.join(stages)}" for name, stages in (GROUPS | APART).items()))
        return 0
    names = [name for asked in arguments.stages or GROUPS for name in (GROUPS | APART).get(asked, [asked])]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"no such stage: {' '.join(unknown)} (--list prints them)")
    names = list(dict.fromkeys(["build", *names]))

    arguments.out.mkdir(parents=True, exist_ok=True)
    started, end = time.time(), time.monotonic() + 60 * arguments.minutes
    results: list[Result] = []
    table = ""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for batch in batches(names):
            begin = time.monotonic()
            with ThreadPoolExecutor(len(batch)) as pool:
                running = {name: pool.submit(run, name, logs / name, end) for name in batch}
                while wait(running.values(), timeout=10).not_done:
                    for name in batch:
                        (logs / name).touch()
                    unfinished = (Result(name, "running", time.monotonic() - begin) for name in batch)
                    done = [
                        future.result() if future.done() else row
                        for future, row in zip(running.values(), unfinished, strict=True)
                    ]
                    save(arguments.out, [*results, *done], logs, started)
                results += [future.result() for future in running.values()]
            table = save(arguments.out, results, logs, started)
    print(table)
    return int(any(result.outcome != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())
