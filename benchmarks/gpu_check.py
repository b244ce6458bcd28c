"""Everything that only a GPU can show, in one command with one report; needs no network.

    python benchmarks/gpu_check.py                            # all stages, under ten minutes, into gpu_check/
    python benchmarks/gpu_check.py --out DIR build sanitize   # some stages or groups, in this order
    python benchmarks/gpu_check.py --minutes 25 evad         # the whole detector beside torch.compile, by keep rate
    python benchmarks/gpu_check.py --list

A stage has its own time limit and log; later stages run though earlier ones fail. Tests run beside each other, so do
sanitizers; what measures runs alone. report.txt begins with the table of stages, then has every log; beside it lie the
files that measuring rewrote. Exit status 0 only if every stage passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
OPS = ("scatter_tokens", "token_selection", "keyframe_attention", "roi_align_3d", "pyramid_roi_align")
OP_TESTS = [f"tests/test_{op}.py" for op in OPS]
EVAD_TESTS = ("static", "compiled", "stream")
WORKERS = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # compiling is most of the time
REPORT_TAIL = 60_000  # characters of a log that the report keeps
REWRITTEN = ("README.md", "benchmarks/results/*", "evad_kernels/*_tuning.py")  # by measuring


class Stage(NamedTuple):
    command: list[str]
    seconds: int
    beside: str = ""  # stages of one name that follow each other run at once
    environment: dict[str, str] = {}  # noqa: RUF012


class Result(NamedTuple):
    name: str
    outcome: str
    seconds: float


def pytest(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "--durations=10", "-rf", *arguments]


def sanitizer(tool: str, backend: str) -> Stage:
    command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", PYTHON, "tests/gpu_cases.py", backend]
    # Without torch's cache every tensor is an allocation of its own: a step beyond it is seen.
    return Stage(command, 150, "sanitize", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)})


DESCRIBE = """
import subprocess, sys, torch, triton, evad_kernels
subprocess.run("nvidia-smi; nvcc --version; git log -1 --format='%h %s'; git status --short", shell=True)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "python", sys.version.split()[0])
print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
print(evad_kernels.backends())
"""

STAGES = {
    "build": Stage([PYTHON, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."], 150),
    "machine": Stage([PYTHON, "-c", DESCRIBE], 60),
    "tests-triton": Stage(pytest(*WORKERS, "-m", "not slow", "-k", "triton", *OP_TESTS), 240, "tests"),
    "tests-cuda": Stage(pytest(*WORKERS, "-m", "not slow", "-k", "cuda", *OP_TESTS), 240, "tests"),
    "tests-gpu": Stage(pytest(*WORKERS, "tests/test_gpu.py"), 240, "tests"),
    "tests-evad": Stage(pytest(*(f"tests/test_evad_{name}.py" for name in EVAD_TESTS)), 240, "tests"),
    **{
        f"{tool}-{backend}": sanitizer(tool, backend)
        for tool in ("memcheck", "racecheck", "initcheck")
        for backend in ("triton", "cuda")
    },
    "tune": Stage([PYTHON, "-m", "benchmarks.tune_keyframe_attention", "--write"], 240),
    "benchmark": Stage(pytest("--benchmark", "--ignore=benchmarks/bench_evad.py", "benchmarks"), 300),
    "benchmark-evad": Stage([PYTHON, "-m", "benchmarks.bench_evad"], 1200),
}
GROUPS = {
    "build": ["build", "machine"],
    "tests": [name for name in STAGES if STAGES[name].beside == "tests"],
    "sanitize": [name for name in STAGES if STAGES[name].beside == "sanitize"],
    "measure": ["tune", "benchmark"],
}
APART = {"evad": ["benchmark-evad"]}  # named only: torch.compile takes long on whole models


def run(name: str, log: Path, end: float) -> Result:
    """Runs a stage until its limit or ``end``, its output into ``log``."""
    stage, begin = STAGES[name], time.monotonic()
    seconds = min(stage.seconds, end - begin)
    if seconds < 5:
        log.touch()
        return Result(name, "no time left", 0.0)
    print(f"==> {name}, at most {seconds:.0f} s", flush=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True, **streams)
        except OSError as error:
            output.write(str(error))
            return Result(name, "failed to start", 0.0)
        try:
            status = process.wait(timeout=seconds)
            outcome = "ok" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the stage's own session
            process.wait()
            outcome = "stopped at its limit"
    return Result(name, outcome, time.monotonic() - begin)


def summary(log: Path) -> str:
    """The line of a log that says most."""
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines() if line.strip("= \n")]
    telling = [line for line in lines if any(word in line for word in (" passed", " failed", "SUMMARY", "Goals met"))]
    return (telling or lines or [""])[-1][:100]


def report(results: list[Result], logs: Path) -> tuple[str, str]:
    """The table of stages, and the table followed by every log."""
    rows = [f"{r.name:<17} {r.outcome:<20} {r.seconds:4.0f} s  {summary(logs / r.name)}".rstrip() for r in results]
    parts = [f"==== {r.name}\n{(logs / r.name).read_text(errors='replace')[-REPORT_TAIL:]}" for r in results]
    return "\n".join(rows), "\n\n".join(["\n".join(rows), *parts])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages or groups, in order; all by default")
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

    arguments.out.mkdir(parents=True, exist_ok=True)
    started, end = time.time(), time.monotonic() + 60 * arguments.minutes
    results: list[Result] = []
    table = ""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        for _, batch in itertools.groupby(names, key=lambda name: STAGES[name].beside or name):
            batch = list(batch)
            with ThreadPoolExecutor(len(batch)) as pool:
                results += pool.map(run, batch, [logs / name for name in batch], itertools.repeat(end))
            table, text = report(results, logs)
            (arguments.out / "report.txt").write_text(text)
    for path in itertools.chain.from_iterable(ROOT.glob(pattern) for pattern in REWRITTEN):
        if path.stat().st_mtime >= started:
            shutil.copy(path, arguments.out)
    print(table)
    return int(any(result.outcome != "ok" for result in results))


if __name__ == "__main__":
    sys.exit(main())
