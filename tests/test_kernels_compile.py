"""CUDA kernels compile for every architecture that they are meant for, and none spills. Needs nvcc, not a GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evad_kernels import _backend

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
ARCHITECTURES = (80, 90, 100)
FLAGS = ("-std=c++17", "-O3", "--fmad=false")  # as CMakeLists.txt has them

NVCC = shutil.which("nvcc")

# What ptxas -v says of each kernel, in this order.
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)"
    r"|(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"|Used (?P<registers>\d+) registers(?:.*, (?P<shared>\d+) bytes smem)?"
)


def parsed(report):
    kernels = []
    for match in REPORT.finditer(report):
        found = match.groupdict(default="0")
        if match["name"]:
            kernels.append(found)
        else:
            kernels[-1].update({key: value for key, value in found.items() if match[key]})
    return [{key: value if key == "name" else int(value) for key, value in kernel.items()} for kernel in kernels]


def readable(names):
    """Kernel and template arguments of mangled names."""
    if (demangle := shutil.which("c++filt") or shutil.which("cu++filt")) is None:
        return names
    lines = subprocess.run([demangle, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        re.sub(r"evad::|\(anonymous namespace\)::|^void |\(.*", "", re.sub(r"\(anonymous[^)]*\)::", "", x))
        for x in lines
    ]


@pytest.mark.skipif(NVCC is None, reason="nvcc not found: CUDA kernels are not compiled")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path, capsys):
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [architecture for architecture in ARCHITECTURES if f"sm_{architecture}" in known]
    assert targets, known
    run = subprocess.run(
        [NVCC, *FLAGS, "-Xptxas=-v", "-fatbin", "-o", str(tmp_path / "out.fatbin"), str(source)]
        + [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr.replace("ptxas info", ""), run.stderr
    kernels = parsed(run.stderr)
    assert {kernel["architecture"] for kernel in kernels} == set(targets), run.stderr
    assert all(kernel["registers"] for kernel in kernels), run.stderr
    names = readable([kernel["name"] for kernel in kernels])
    rows = sorted(
        (name, k["architecture"], k["registers"], k["shared"], k["stack"], k["stores"] + k["loads"])
        for name, k in zip(names, kernels, strict=True)
    )
    width = max(len(name) for name in names)
    with capsys.disabled():
        print(f"\n{'kernel':<{width}}  sm   registers  shared  stack  spilled")
        for name, architecture, registers, shared, stack, spilled in rows:
            print(f"{name:<{width}}  {architecture:<3}  {registers:9}  {shared:6}  {stack:5}  {spilled:7}")
    for name, architecture, _, _, stack, spilled in rows:
        assert stack == spilled == 0, f"{name} on sm_{architecture}: {stack} bytes of stack, {spilled} spilled"


LAUNCHES = (
    "cell_map('scatter_tokens', 0, 1, 1, 1, 1, 1, 0, 0)",
    "scatter_tokens_forward(0, 4, 4, 0, 0, False, 1, 4, 4, 0, 0, 0)",
    "scatter_tokens_backward(0, 0, 1, 1, 0, 1, 1, 4, 4, 0, 0, 0)",
    "scatter_tokens_backward_fill(0, 0, False, 1, 4, 4, 0, 0, 0, 0)",
    "select_tokens(0, 4, 1, 1, 4, 2, 0, 0, 0)",
    "gather_tokens_forward(0, 4, 4, 0, 1, 1, 1, 4, 4, 0, 1, 4, 0, 0)",
    "gather_tokens_backward(0, 0, 1, 1, 1, 4, 4, 0, 1, 0, 0, 0, 0)",
)


@pytest.mark.skipif(
    _backend.native is None or not _backend.native.with_cuda, reason="the native module was built without CUDA"
)
def test_launch_without_a_gpu_raises(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    calls = "".join(f"\ntry:\n    cuda.{call}\nexcept RuntimeError as error:\n    print(error)" for call in LAUNCHES)
    code = f"from evad_kernels._backend import native\ncuda = native.cuda{calls}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CSRC.parent)
    assert run.returncode == 0, run.stderr
    messages = run.stdout.splitlines()
    assert len(messages) == len(LAUNCHES) and all(": CUDA launch failed: " in message for message in messages), messages
