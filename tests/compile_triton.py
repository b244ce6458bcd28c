"""Compiles what a Triton module ships and prints what came out, a JSON line a kernel. Needs no GPU.

python compile_triton.py MODULE ARCHITECTURE    without TRITON_INTERPRET
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evad_kernels._triton import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX = re.compile(r"\b(UTC\w*MMA|\w*GMMA|HMMA|[DI]MMA)\b")


def compiled(launch, architecture):
    """Registers, memory and matrix instructions of one kernel."""
    signature, attributes = {}, {}
    for i, (name, kind) in enumerate(launch.signature.items()):
        kinds = {(i, j): element for j, element in enumerate(kind)} if isinstance(kind, tuple) else {(i,): kind}
        attributes |= {path: [["tt.divisibility", 16]] for path, kind in kinds.items() if kind.endswith(":16")}
        plain = tuple(kind.removesuffix(":16") for kind in kinds.values())
        signature[name] = plain if isinstance(kind, tuple) else plain[0]
    source = ASTSource(
        launch.kernel,
        signature,
        constexprs=launch.constants,
        attrs=attributes,
    )
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": launch.fp_fusion,
        "maxnreg": launch.max_registers,
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, flag, cubin.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    constants = [f"{name}={value}" for name, value in launch.constants.items() if name.isupper() or value is None]
    pointers = dict.fromkeys(kind[1:] for kind in signature.values() if str(kind).startswith("*"))
    return {
        "name": f"{launch.kernel.__name__}[{' '.join([*pointers, *constants])}] w{launch.num_warps}",
        "architecture": architecture,
        "registers": resources["REG"],
        "shared": kernel.metadata.shared,
        "stack": resources["STACK"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),  # resource usage calls them LOCAL:0
        "matrix": " ".join(sorted(set(MATRIX.findall(sass)))),
    }


def shipped(module, architecture, function):
    """The launches of a module, each once."""
    launches = getattr(importlib.import_module(f"evad_kernels.{module}"), function)(architecture)
    return list({repr(launch): launch for launch in (Launch(*launch) for launch in launches)}.values())


def main(module, architecture, function="shipped"):
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels do not compile"
    launches = shipped(module, architecture, function)
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(
            nth, *zip(*((module, architecture, function, i) for i in range(len(launches))), strict=True)
        ):
            print(json.dumps(row), flush=True)


def nth(module, architecture, function, i):
    return compiled(shipped(module, architecture, function)[i], architecture)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
