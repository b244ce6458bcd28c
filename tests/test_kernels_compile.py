"""Kernels compile for every architecture that they are meant for, and none spills. Needs no GPU: nvcc for CUDA C++, for
Triton what it carries.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from evad_kernels import _backend

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
TRITON = sorted(path.stem for path in (TESTS.parent / "evad_kernels").glob("[!_]*_triton.py"))
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
def test_compiles_without_spills(source, tmp_path, record_property):
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
    for name, kernel in zip(readable([kernel["name"] for kernel in kernels]), kernels, strict=True):
        kernel |= {"name": name, "spills": kernel["stores"] + kernel["loads"], "matrix": ""}
    record_property("table", table(kernels))
    assert_no_spills(kernels)


def table(kernels):
    """A line a kernel and architecture; conftest.py prints it at the end, whichever process made it."""
    width = max(len(kernel["name"]) for kernel in kernels)
    lines = [f"{'kernel':<{width}}  sm   registers  shared  stack  spills  matrix unit"]
    for k in sorted(kernels, key=lambda k: (k["name"], k["architecture"])):
        numbers = f"{k['registers']:9}  {k['shared']:6}  {k['stack']:5}  {k['spills']:6}  {k['matrix']}"
        lines.append(f"{k['name']:<{width}}  {k['architecture']:<3}  {numbers}".rstrip())
    return "\n".join(lines)


# Before 3.9 Triton needs a few registers more for these. Their cap stays: without it fewer programs would be on a GPU.
SPILLS_OF_OLD_TRITON = {"pyramid_roi_align_forward_kernel": 16, "roi_3d_forward_kernel": 16}


def assert_no_spills(kernels, allowed=None):
    for k in kernels:
        where = f"{k['name']} on sm_{k['architecture']}"
        spills = (allowed or {}).get(k["name"].partition("[")[0], 0)
        assert k["spills"] <= spills, f"{where}: {k['spills']} spills, {spills} allowed"
        assert k["stack"] == 0 or spills, f"{where}: {k['stack']} bytes of stack"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("module", TRITON)
def test_triton_compiles_without_spills(module, architecture, record_property):
    kernels = compile_triton(module, architecture, "shipped", record_property)
    written = re.findall(r"^def (\w+_kernel)\(", (TESTS.parent / "evad_kernels" / f"{module}.py").read_text(), re.M)
    assert set(written) <= {k["name"].partition("[")[0] for k in kernels}  # nothing runs that was not compiled here


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_of_any_type_and_width_compiles_without_spills(architecture, record_property):
    compile_triton("keyframe_attention_triton", architecture, "shipped_rest", record_property)


def compile_triton(module, architecture, function, record_property):
    kernels = triton_script("compile_triton.py", module, architecture, function)
    assert kernels
    record_property("table", table(kernels))
    major, minor = (int(part) for part in version("triton").split(".")[:2])
    assert_no_spills(kernels, SPILLS_OF_OLD_TRITON if (major, minor) < (3, 9) else None)
    if module == "keyframe_attention_triton" and architecture == 90 and function == "shipped":
        for k in kernels:  # wgmma, never Ampere's mma, where anything is multiplied
            multiplies = not re.search("importance_kernel|rows_kernel|grad_output=None grad_importance=None", k["name"])
            assert k["matrix"] == "HGMMA" * multiplies, k
    return kernels


def triton_script(*arguments):
    """A script of tests/ where kernels are not interpreted: the JSON lines it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=TESTS,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(TESTS.parent)},
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


LAUNCHED = {  # in Triton, beside what torch does
    "keyframe_attention": 3,
    "select_tokens": 1,
    "select_tokens_with_slots": 1,
    "gather_tokens": 1,
    "gather_tokens, backward": 1,
    "scatter_tokens": 1,
    "scatter_tokens, backward": 2,
    "scatter_tokens, backward of cells": 3,
    "scatter_tokens, backward of one row": 4,
    "roi_align_3d": 3,
    "roi_align_3d, backward": 3,
    "roi_pool_3d": 3,
    "roi_pool_3d, backward": 3,
    "pyramid_roi_align": 2,
    "pyramid_roi_align, backward": 2,
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_launches_are_few_and_sizes_share_them():
    """What the heads of the modules say of launches; and a new size compiles nothing, a new range of sizes aside."""
    calls = {row["call"]: row for row in triton_script("record_triton.py")}
    assert {name: len(calls[name]["kernels"]) for name in LAUNCHED} == LAUNCHED
    # Positions have no channels: what lies between samples is a multiple of 16 or is not, and is compiled for both.
    assert {name for name, row in calls.items() if row["more"]} == {"gather_tokens of positions"}
    assert calls["gather_tokens of positions"]["more"] == 1


LAUNCHES = (
    "cell_map('scatter_tokens', 0, 1, 1, 1, 1, 1, 0, 0)",
    "scatter_tokens_forward(0, 4, 4, 0, 0, False, 1, 4, 4, 0, 0, 0)",
    "scatter_tokens_backward(0, 0, 1, 1, 0, 1, 1, 4, 4, 0, 0, 0)",
    "scatter_tokens_backward_fill(0, 0, False, 1, 4, 4, 0, 0, 0, 0)",
    "select_tokens(0, 4, 1, 1, 4, 2, 0, 0, 0, 0)",
    "gather_tokens_forward(0, 4, 4, 0, 1, 1, 1, 4, 4, 0, 1, 4, 0, 0)",
    "gather_tokens_backward(0, 0, 1, 1, 1, 4, 4, 0, 1, 0, 0, 0, 0)",
    "roi_pool_3d_work(False, (1, 2, 4, 1, 2, 2), (0, False, 0, 1, 1), (7, 7, 2, True), 0, True)",
    "roi_pool_3d_forward((0, 8, 4, 0, 0, False), (1, 2, 4, 1, 2, 2), (0, False, 0, 1, 1), (0, 0), (7, 7, 2, True), 1.0,"
    " 0, 0, 0, 0, 0)",
    "roi_pool_3d_backward(0, False, (1, 2, 4, 1, 2, 2), (0, False, 0, 1, 1), (0, 0), (7, 7, 2, True), 1.0,"
    " 0, 0, 0, 0, 0, 0, 0)",
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
