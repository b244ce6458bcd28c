"""Builds the native module: calls CMake (CMakeLists.txt is the only description of the native build).

Without a C++ compiler the package still installs: the reason is written beside the package, where
``evad_kernels.backends()`` reads it, and ops fall back to plain PyTorch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MISSING = "_native_missing.txt"
# What CMake reads; as `depends` of the extension it comes into the source distribution.
DEPENDS = ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())]


def find_compiler() -> str | None:
    return os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


def missing_compiler() -> str | None:
    """Why there is no working C++17 compiler here, or None."""
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found when the package was installed (looked for $CXX, c++, g++, clang++)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <tuple>\nint main() { auto [code] = std::tuple(0); return code; }\n")
        command = [*compiler.split(), "-std=c++17", str(source), "-o", str(Path(folder, "probe"))]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            detail = getattr(error, "stderr", b"") or str(error).encode()
            end = detail.decode(errors="replace")[-300:]
            return f"the C++ compiler {compiler} could not build a C++17 program: {end}"
    return None


def build_digest() -> str:
    """Of all that decides what a build gives. A module carries its own, so that one which is there already is found."""
    compiler = subprocess.run([*find_compiler().split(), "--version"], capture_output=True, check=True).stdout
    variables = ("CMAKE_ARGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAARCHS", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH")
    settings = [*(os.environ.get(name, "") for name in variables), shutil.which("nvcc") or "", platform.machine()]
    sources = [Path(ROOT, path).read_bytes() for path in ("setup.py", *DEPENDS)]
    return hashlib.sha256(b"\0".join([compiler, *map(os.fsencode, (*settings, *DEPENDS)), *sources])).hexdigest()


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.parent / MISSING
        reason = missing_compiler()
        if reason is not None:
            message = f"{reason}; installing without native kernels: ops run in plain PyTorch"
            print(f"evad_kernels: WARNING: {message}", file=sys.stderr)
            note.write_text(reason + "\n")
            return
        note.unlink(missing_ok=True)
        digest = build_digest()
        earlier = ROOT / "evad_kernels" / target.name
        if earlier.exists() and digest.encode() in earlier.read_bytes():
            if earlier != target:
                shutil.copy2(earlier, target)
            return
        # A fresh folder each time: under build isolation a kept CMake cache points at a deleted ninja.
        with tempfile.TemporaryDirectory(prefix="evad_kernels_build_") as build:
            configure = [
                "cmake",
                *("-S", str(ROOT), "-B", build, "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DEVAD_OUTPUT_DIRECTORY={target.parent}",
                f"-DEVAD_OUTPUT_NAME={target.name}",
                f"-DEVAD_BUILD_DIGEST={digest}",
                *os.environ.get("CMAKE_ARGS", "").split(),
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", build], check=True)

    def get_outputs(self) -> list[str]:
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        """In-place builds write beside the sources already; a build without a compiler has nothing to copy."""
        package = ROOT / "evad_kernels"
        for extension in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(extension.name)
            for path in (built, built.parent / MISSING):
                if path.exists():
                    draft = package / f".{path.name}"
                    shutil.copy2(path, draft)
                    draft.replace(package / path.name)  # a process that has loaded the old one keeps it whole
            if built.exists():
                (package / MISSING).unlink(missing_ok=True)


native = Extension("evad_kernels._native", sources=[], depends=DEPENDS)
setup(ext_modules=[native], cmdclass={"build_ext": CMakeBuild})
