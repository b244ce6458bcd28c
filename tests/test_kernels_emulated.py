"""CUDA kernels that use no special hardware, run on the host thread by thread, against the CPU kernels: the same bits,
or, where the order of sums is another, the rule of accuracy.

Needs neither nvcc nor a GPU. ``emulation/cuda_runtime.h`` stands for CUDA; launches, not C++, are rewritten.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CSRC = TESTS.parent / "csrc"
# program of emulation/: stems whose kernels it compares, and what those on the CPU need
PROGRAMS = {
    "compare": (("cell_map", "scatter_tokens", "token_selection"), ()),
    "compare_roi": (("cell_map", "roi_align_3d"), ("cpu_isa", "roi_baseline")),
}

LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?), ([\w.]+), stream>>>(\([^;]*\));")
SHARED = re.compile(r"extern __shared__ [^;]*?(\w+)\[\];")


def emulated(source):
    """CUDA C++ with its launches and its dynamic shared memory in plain C++."""
    source = SHARED.sub(r"char* const \1 = emulated_shared();", source)
    return LAUNCH.sub(r"emulated_launch(\2, \3, [=] { \1\4; });", source)


def has_barriers(compiler):
    probe = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input="#include <barrier>\n",
        text=True,
        capture_output=True,
    )
    return probe.returncode == 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_emulated_kernels_match_cpu(program, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None or not has_barriers(compiler):
        pytest.skip("no g++ with C++20 barriers")
    for path in CSRC.iterdir():
        if path.suffix in (".h", ".cuh"):
            (tmp_path / path.name).write_text(emulated(path.read_text()))
    stems, beside = PROGRAMS[program]
    sources = [TESTS / "emulation" / f"{program}.cpp", *(CSRC / f"{stem}.cpp" for stem in stems + beside)]
    for stem in stems:
        sources.append(tmp_path / f"{stem}_emulated.cpp")
        sources[-1].write_text(emulated((CSRC / f"{stem}.cu").read_text()))
    include = [f"-I{folder}" for folder in (tmp_path, TESTS / "emulation")]
    command = [compiler, "-std=c++20", "-O1", "-pthread", *include, *map(str, sources), "-o", str(tmp_path / "compare")]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([tmp_path / "compare"], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
