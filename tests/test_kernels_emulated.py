"""CUDA kernels that use no special hardware, run on the host thread by thread: they give the bits of the CPU kernels.

Needs neither nvcc nor a GPU. ``emulation/cuda_runtime.h`` stands for CUDA; launches, not C++, are rewritten.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
STEMS = ("cell_map", "scatter_tokens", "token_selection")

LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?), 0, stream>>>(\([^;]*\));")


def emulated(source):
    """CUDA C++ with its launches in plain C++."""
    return LAUNCH.sub(r"emulated_launch(\2, [=] { \1\3; });", source)


def has_barriers(compiler):
    probe = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <barrier>\n",
        text=True,
        capture_output=True,
    )
    return probe.returncode == 0


def test_emulated_kernels_match_cpu(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not has_barriers(compiler):
        pytest.skip("no g++ with C++20 barriers")
    for path in CSRC.iterdir():
        if path.suffix in (".h", ".cuh"):
            (tmp_path / path.name).write_text(emulated(path.read_text()))
    sources = [TESTS / "emulation" / "compare.cpp", *(CSRC / f"{stem}.cpp" for stem in STEMS)]
    for stem in STEMS:
        sources.append(tmp_path / f"{stem}_emulated.cpp")
        sources[-1].write_text(emulated((CSRC / f"{stem}.cu").read_text()))
    include = [f"-I{folder}" for folder in (tmp_path, TESTS / "emulation")]
    command = [compiler, "-std=c++20", "-O1", "-pthread", *include, *map(str, sources), "-o", str(tmp_path / "compare")]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([tmp_path / "compare"], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
