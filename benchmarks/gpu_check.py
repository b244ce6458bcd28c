"""Everything that only a GPU can show, with one report; needs no network. Three commands, each under ten minutes:

    python benchmarks/gpu_check.py --out DIR                  # is it right: every op, tests, sanitizers
    python benchmarks/gpu_check.py --out DIR attention        # tiles of attention, then attention beside its rivals
    python benchmarks/gpu_check.py --out DIR measure evad     # the other ops; the detector, as far as time goes
    python benchmarks/gpu_check.py --out DIR memcheck-triton tests-cuda    # some stages or groups, in this order
    python benchmarks/gpu_check.py --list

A stage has its own time limit and log; later stages run though earlier ones fail. What is right runs side by side, what
measures runs alone, the most telling first. What is known is written into DIR every few seconds, should the machine
stop: report.txt begins with the table of stages and has every log; beside it lie results, rows as they were measured,
and tuning, to be copied where the report says, before the next command: it goes on from them. Exit status 0 only if
every stage passed.

The limits of a command add up to less than 9.5 minutes, so no stage starves another; `evad` alone takes what is left.
The first command compiles most of the time, on all cores. While nvcc builds, every op runs once in Triton (150 s at
most), which leaves its kernels in Triton's cache; then all tests and three sanitizers run at once (400 s at most), ten
processes for the tests of Triton. `attention` needs no nvcc and does not build; others build in seconds where it was
done before. Beside the build Triton compiles what `evad` needs.

EVAD_KERNELS_COMMIT says which commit is measured where a copy of the checkout has no .git. Some rivals and tests want
more than torch: torchvision, flash-colreduce (`pip install --no-deps`), transformers, av.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import os
import re
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
ATTENTION_DTYPES = [("bfloat16",), ("float16",), ("float32",)]
OP_TESTS = [f"tests/test_{name}.py" for name in (*OPS, "every_op", "evad_model")]
EVAD_TESTS = [f"tests/test_evad_{name}.py" for name in ("compiled", "static")]
EVAD_TESTS += ["tests/test_evad_stream.py"] if importlib.util.find_spec("av") else []
DETECTORS = {  # rows of bench_evad.py, the most telling first
    "224": "bench_forward and 224 and not one",
    "288": "bench_forward and ViT-B and 288 and not 288x512",
    "training": "bench_training",
    "one": "bench_forward and one",
    "compilers": "bench_compilers",
    "ViT-L": "bench_forward and ViT-L",
    "288x512": "bench_forward and 288x512",
    "256": "bench_forward and 256",
}
REPORT_TAIL = 60_000  # characters of a log that the report keeps
MINUTES = 9.5  # of a command
ERRORS = 9  # exit status of a sanitizer that found some
GRACE = 20  # seconds between the request to end and the end: pytest names its failures, benchmarks write their rows
REWRITTEN = ("benchmarks/results/*.json", "evad_kernels/*_tuning.py")  # by measuring; pictures follow from the rows
KERNELS = [  # words in the names of our kernels, those of CUDA as they are in the object file and in a report
    "evad",
    *sorted(
        {
            name
            for path in ROOT.glob("evad_kernels/*_triton.py")
            for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
        }
    ),
]
OUT = "{out}"  # in a command: the report's folder
WANTED = ("torchvision", "flash_colreduce", "transformers", "av", "xdist", "pytest_timeout")


_running: set[subprocess.Popen] = set()


class Stage(NamedTuple):
    command: list[str]
    seconds: int
    beside: str = ""  # stages of one name that follow each other run at once
    lane: str = ""  # but of one lane one after the other
    environment: dict[str, str] = {}  # noqa: RUF012
    blamed: str = ""  # what fails with ERRORS has passed unless its log has this


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
        options += ["--timeout=250", "--timeout-method=signal"]  # a test may compile a hundred kernels
    return [PYTHON, "-m", "pytest", *options, *arguments]


def bench(name: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "--benchmark", "-rfE", "--tb=short", f"benchmarks/bench_{name}.py", *arguments]


def sanitizer(tool: str, backend: str, seconds: int) -> Stage:
    """Our kernels under compute-sanitizer; what it says of torch's, or of calls that torch tries, does not count.

    initcheck must see all kernels: what one that is left out has written, it takes for never written. (racecheck before
    2026.1 takes some synchronisation of warp groups, so wgmma, for a race: NVIDIA's release notes.)
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = [f"--tool={tool}", f"--error-exitcode={ERRORS}", "--report-api-errors=no", "--print-limit=1000"]
    if tool != "initcheck":
        options += [option for name in KERNELS for option in ("--kernel-name", f"kns={name}")]
    command = [program, *options, PYTHON, "tests/gpu_cases.py", backend]
    # Without torch's cache every tensor is an allocation of its own: a step beyond it is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    blamed = rf"(?m)^=+ +at .*({'|'.join(KERNELS)})|^=+ (Target application|Internal Sanitizer Error)| failed$"
    return Stage(command, seconds, "tests", tool, environment, blamed)


# What pip does needs setuptools >= 77, which reads the licence; the module itself needs CMake alone.
BUILD = f"""
only=$({PYTHON} -c 'import torch; print("-DCMAKE_CUDA_ARCHITECTURES=%d%d-real" % torch.cuda.get_device_capability())')
export CMAKE_ARGS="$only $CMAKE_ARGS"
{PYTHON} -m pip install -q --no-build-isolation --no-deps -e . && echo built by pip && exit
echo pip could not, so by cmake:
cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE={PYTHON} -DEVAD_OUTPUT_DIRECTORY=$PWD/evad_kernels $CMAKE_ARGS &&
cmake --build build/cmake --parallel && echo built by cmake
"""


DESCRIBE = f"""
import importlib.util, subprocess, sys, torch, triton, evad_kernels
subprocess.run("nvidia-smi; nvcc --version; compute-sanitizer --version; git log -1 --format='%h %s'", shell=True)
subprocess.run("git status --short; echo $EVAD_KERNELS_COMMIT", shell=True)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "python", sys.version.split()[0])
print("torch", torch.__version__, "CUDA", torch.version.cuda, "triton", triton.__version__)
print("not installed:", *(name for name in {WANTED} if importlib.util.find_spec(name) is None))
print(evad_kernels.backends())
"""

# Triton compiles for a minute or two what the detector needs: beside the build, not before the first row of evad.
WARM = """
import torch
from benchmarks import bench_evad
from evad_kernels import _backend

_backend.ON_TRIAL.clear()
"""
FORWARD = """
model, clips = bench_evad.inputs("cuda", "vit_b", (224, 224), torch.%s, %d)
model.to(clips.dtype).eval()
with torch.no_grad():
    for rate in bench_evad.FEW:
        model.set_keep_rate(rate)
        model(clips)
torch.cuda.synchronize()
"""
STEP = """
bench_evad.build_training("cuda", "vit_b", (224, 224), "bfloat16", 2, (), False).ours()
torch.cuda.synchronize()
"""


STAGES = {
    "build": Stage(["bash", "-c", BUILD], 150, "build"),
    **{
        f"warm-{name}": Stage([PYTHON, "-c", WARM + code], 120, "build")
        for name, code in (
            ("bfloat16", FORWARD % ("bfloat16", 8)),
            ("float32", FORWARD % ("float32", 1)),
            ("training", STEP),
        )
    },
    # Every op in a process of its own: what breaks one does not hide another; Triton's cache is warm after it.
    # Attention has some 25 kernels a dtype, which a process compiles one by one.
    **{
        "-".join((backend, op, *dtype)): Stage([PYTHON, "tests/gpu_cases.py", backend, op, *dtype], 150, beside)
        for backend, beside in (("triton", "build"), ("cuda", "tests"))
        for op in itertools.chain.from_iterable(OPS.values())
        for dtype in (ATTENTION_DTYPES if op in OPS["keyframe_attention"] and backend == "triton" else [()])
    },
    "machine": Stage([PYTHON, "-c", DESCRIBE], 60, "tests", "evad-triton"),
    "tests-triton": Stage(pytest(10, "-m", "not slow", "-k", "triton and not any_width", *OP_TESTS), 400, "tests"),
    "tests-gpu": Stage(pytest(3, "tests/test_gpu.py"), 400, "tests"),
    "tests-cuda": Stage(pytest(2, "-m", "not slow", "-k", "cuda", *OP_TESTS), 200, "tests", "cuda"),
    "tests-evad": Stage(pytest(2, "-m", "not slow", *EVAD_TESTS), 200, "tests", "cuda"),
    # Captured detectors on Triton's kernels, whatever their trial says.
    "tests-evad-triton": Stage(
        pytest(2, "-m", "not slow", EVAD_TESTS[0]), 340, "tests", "evad-triton", {"EVAD_KERNELS_BACKEND": "triton"}
    ),
    **{
        f"{tool}-{backend}": sanitizer(tool, backend, seconds)
        for tool in ("memcheck", "racecheck", "initcheck")
        for backend, seconds in (("triton", 260), ("cuda", 140))
    },
    "tune": Stage([PYTHON, "-m", "benchmarks.tune_keyframe_attention", "--write", "--seconds", "110"], 140),
    "bench-attention": Stage(bench("keyframe_attention"), 400),
    "bench-roi": Stage(bench("roi_align_3d"), 90),
    "bench-selection": Stage(bench("token_selection"), 50),
    "bench-scatter": Stage(bench("scatter_tokens"), 50),
    "bench-pyramid": Stage(bench("pyramid_roi_align"), 50),
    "profile": Stage([PYTHON, "-m", "benchmarks.profile_kernels", "--out", OUT], 100),
    **{
        f"evad-{name}": Stage(bench("evad", "-k", chosen), 400 if name == "compilers" else 240)
        for name, chosen in DETECTORS.items()
    },
    "bench-patch": Stage(bench("patch"), 120),
    "tests-all": Stage(pytest(14, "-m", "not slow", "-k", "not any_width", "tests"), 540),
}
SANITIZE = [name for name in STAGES if name.partition("check-")[0] in ("mem", "race", "init")]
RIGHT = {  # what runs where nothing is named
    "ops": [name for name in STAGES if name.startswith(("triton-", "cuda-"))],
    "tests": [name for name in STAGES if STAGES[name].beside == "tests" and name.startswith(("machine", "tests-"))],
    "sanitize": SANITIZE,
}
GROUPS = RIGHT | {
    "warm": [name for name in STAGES if name.startswith("warm-")],
    "attention": ["tune", "bench-attention"],
    "measure": ["bench-roi", "bench-selection", "bench-scatter", "bench-pyramid", "profile"],
    "evad": [*(f"evad-{name}" for name in DETECTORS), "bench-patch"],
}


def environment(stage: Stage) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    where = os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    ours = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(paths), "PATH": where}
    if stage.beside:  # thirty processes would each have a thread a core, and spin while these wait for one
        ours["OMP_NUM_THREADS"] = "1"
    return os.environ | ours | stage.environment


def run(name: str, log: Path, out: Path, end: float) -> Result:
    """Runs a stage until its limit or ``end``, its output into ``log``."""
    stage, begin = STAGES[name], time.monotonic()
    seconds = min(stage.seconds, end - begin - GRACE)
    if seconds < 5:
        return Result(name, "no time left", 0.0)
    print(f"==> {name}, at most {seconds:.0f} s", flush=True)
    with log.open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        command = [str(out) if word == OUT else word for word in stage.command]
        try:
            process = subprocess.Popen(command, cwd=ROOT, env=environment(stage), start_new_session=True, **streams)
        except OSError as error:
            output.write(str(error))
            return Result(name, "failed to start", 0.0)
        _running.add(process)
        try:
            status = process.wait(timeout=seconds)
            outcome = "ok" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            outcome = "stopped at its limit"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
        kill(process)
        process.wait()
        _running.discard(process)
    text = log.read_text(errors="replace")
    if outcome == f"failed ({ERRORS})" and stage.blamed and not re.search(stage.blamed, text):
        outcome = "ok, ours at least"
    if outcome == "ok" and "pytest" in stage.command and not re.search(r"\b\d+ passed\b", text):
        outcome = "nothing ran"  # every test was skipped
    return Result(name, outcome, time.monotonic() - begin)


def kill(process: subprocess.Popen) -> None:
    """All that a stage left: it has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_at_once(*_) -> None:
    """Whoever stops this measures next, perhaps: no stage goes on. The report is some seconds old."""
    for process in tuple(_running):
        kill(process)
    os._exit(128 + signal.SIGTERM)


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


def batches(names: list[str]) -> Iterator[list[list[str]]]:
    """Lanes of stages; those of a batch run at once."""
    for _, batch in itertools.groupby(names, key=lambda name: STAGES[name].beside or name):
        lanes: dict[str, list[str]] = {}
        for name in batch:
            lanes.setdefault(STAGES[name].lane or name, []).append(name)
        yield list(lanes.values())


def longest(names: list[str]) -> int:
    """Seconds that stages take if each takes all that it may."""
    return sum(max(sum(STAGES[name].seconds for name in lane) for lane in lanes) for lanes in batches(names))


def chosen(asked: list[str]) -> list[str]:
    """Stages of what was asked for, stages or groups; the build first where something needs it."""
    names = [name for word in asked or RIGHT for name in GROUPS.get(word, [word])]
    builds = [] if names and set(names) <= set(GROUPS["attention"]) else ["build"]
    builds += GROUPS["warm"] if {*names} & {*GROUPS["evad"]} else []
    return list(dict.fromkeys([*builds, *names]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help="stages or groups, in order; by default ops, tests, sanitize"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the report (gpu_check)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"nothing runs beyond this time ({MINUTES})")
    parser.add_argument("--list", action="store_true", help="print stages and groups")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}, at most {stage.seconds} s" for name, stage in STAGES.items()))
        print("\n".join(f"{name}, {longest(stages)} s: {' '.join(stages)}" for name, stages in GROUPS.items()))
        return 0
    names = chosen(arguments.stages)
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"no such stage: {' '.join(unknown)} (--list prints them)")

    # Where a shell began this in the background it is ignored, and stages would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, end_at_once)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    started, end = time.time(), time.monotonic() + 60 * arguments.minutes
    begun: dict[str, float] = {}
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)

        def take_turns(lane: list[str]) -> None:
            for name in lane:
                (logs / name).touch()
                begun[name] = time.monotonic()
                results[name] = run(name, logs / name, out, end)

        def known() -> list[Result]:
            now = time.monotonic()
            return [results.get(name) or Result(name, "running", now - begun[name]) for name in names if name in begun]

        for lanes in batches(names):
            with ThreadPoolExecutor(len(lanes)) as pool:
                running = [pool.submit(take_turns, lane) for lane in lanes]
                while wait(running, timeout=10).not_done:
                    save(out, known(), logs, started)
            for lane in running:
                lane.result()
            table = save(out, known(), logs, started)
    print(table)
    return int(not all(result.outcome.startswith("ok") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
