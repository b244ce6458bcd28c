"""The package as a whole: the build, the table of backends, what is public and how it is documented."""

import ast
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import evad_kernels
from evad_kernels import _backend, scatter_tokens, use_backend

ROOT = Path(__file__).parent.parent
BACKENDS = ("reference", "cpu", "triton", "cuda")

# The contract. Beside these, `backends` and `use_backend` are public.
SIGNATURES = {
    "keyframe_attention": "(query, key, value, *, num_keyframe, keyframe_weight=1.0, scale=None)",
    "select_tokens": "(importance, num_select)",
    "gather_tokens": "(tokens, index, *, num_keyframe=0)",
    "keyframe_attention_topk": "(query, key, value, *, num_keyframe, num_select, keyframe_weight=1.0, scale=None)",
    "scatter_tokens": "(tokens, position, *, grid, fill=None)",
    "roi_align_3d": "(tokens, position, boxes, *, grid, output_size=7, spatial_scale=0.0625, sampling_ratio=2, "
    "aligned=True, background=None)",
    "roi_pool_3d": "(tokens, position, boxes, *, grid, output_size=7, spatial_scale=0.0625, sampling_ratio=2, "
    "aligned=True, background=None)",
    "pyramid_roi_align": "(levels, boxes, *, strides=(4, 8, 16, 32), output_size=7, sampling_ratio=2, "
    "canonical_size=224, canonical_level=4)",
}


def run(*command, **options):
    """A subprocess's standard output; a failure shows the end of its error output."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    process = subprocess.run([str(part) for part in command], **options)
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{(process.stderr or '')[-4000:]}"
    return process.stdout


def fresh_python(code, python=sys.executable, **environment):
    """Runs ``code`` in a new interpreter that sees the checkout, and reads what it prints as JSON."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return json.loads(run(python, "-c", textwrap.dedent(code), env=environment, cwd=environment["PYTHONPATH"]))


@pytest.fixture
def native():
    if _backend.native is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    return _backend.native


# The native module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells what is mapped on Linux only")
def test_native_module_is_free_of_torch_and_cuda(native):
    loaded = fresh_python(f"""
        import importlib.util, json, sys
        spec = importlib.util.spec_from_file_location("evad_kernels._native", {native.__file__!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        libraries = sorted({{line.split("/")[-1].strip() for line in open("/proc/self/maps") if ".so" in line}})
        print(json.dumps([module.with_cuda in (True, False), "torch" in sys.modules, libraries]))
    """)
    usable, torch_imported, libraries = loaded
    assert usable and not torch_imported
    assert any(library.startswith("_native") for library in libraries)
    foreign = ("libtorch", "libc10", "libcudart", "libcuda.", "libcublas", "libnv")
    assert not [library for library in libraries if library.startswith(foreign)], libraries


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists the symbols of a library")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="symbols have versions on Linux only")
def test_native_module_has_no_symbol_that_another_build_could_lack(native):
    """What it does not define comes from Python or, by version, from the compiler's and the C library."""
    lines = run("nm", "-D", "--undefined-only", native.__file__).splitlines()
    foreign = []
    for kind, symbol in (line.split()[-2:] for line in lines):
        library = symbol.partition("@")[2].partition("_")[0]
        known = library in ("GLIBC", "GLIBCXX", "CXXABI", "GCC", "GOMP", "OMP") or symbol.startswith(("Py", "_Py"))
        if kind == "U" and not known:  # weak ones may be missing
            foreign.append(symbol)
    assert len(lines) > 50 and not foreign


def test_imports_without_a_gpu(native):
    assert fresh_python(
        "import json, evad_kernels; print(json.dumps(evad_kernels.backends()['scatter_tokens']))",
        CUDA_VISIBLE_DEVICES="",
        EVAD_KERNELS_BACKEND="auto",
        TRITON_INTERPRET="0",
    ) == {"reference": None, "cpu": None, "triton": _reason("triton"), "cuda": _reason("cuda")}


def test_import_leaves_cuda_alone():
    """Processes forked after CUDA was started cannot use it, and CUDA_VISIBLE_DEVICES is read when it starts."""
    assert fresh_python(
        """
        import json, torch

        def started(*_):
            raise AssertionError("asked CUDA")

        torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = started
        import evad_kernels

        tokens, position = torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
        print(json.dumps(evad_kernels.scatter_tokens(tokens, position, grid=(1, 1, 2)).flatten().tolist()))
        """,
        EVAD_KERNELS_BACKEND="auto",
        TRITON_INTERPRET="0",
    ) == [1, 1, 0, 0]


def _reason(backend):
    """Why a GPU backend of scatter_tokens is missing where no GPU is seen."""
    return "no CUDA device" if backend in _backend.IMPLEMENTED["scatter_tokens"] else "not implemented"


# backends() and use_backend()


def test_backends_is_a_table_of_reasons():
    table = evad_kernels.backends()
    for row in table.values():
        assert tuple(row) == BACKENDS
        assert row["reference"] is None
        assert all(reason is None or reason for reason in row.values())
    lines = str(table).splitlines()
    assert lines[0].split() == list(BACKENDS)
    assert [line.split()[0] for line in lines[1 : len(table) + 1]] == list(table)
    for reason in {reason for row in table.values() for reason in row.values() if reason}:
        assert any(line.endswith(reason) for line in lines)


def test_missing_native_module_is_explained_and_falls_back(tmp_path):
    package = tmp_path / "evad_kernels"
    shutil.copytree(ROOT / "evad_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_native_missing.txt").write_text("no C++ compiler was found\n")
    row, filled, warned, *messages = fresh_python(
        """
        import json, sys, warnings
        # An editable install would find the checkout's native module for this copy of the package.
        sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import evad_kernels, torch
        tokens, position = torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
        filled = evad_kernels.scatter_tokens(tokens, position, grid=(1, 1, 2)).flatten().tolist()
        messages = []
        try:
            with evad_kernels.use_backend("cpu"):
                evad_kernels.scatter_tokens(tokens, position, grid=(1, 1, 2))
        except RuntimeError as error:
            messages.append(str(error))
        try:  # as a program that was exported elsewhere calls it
            torch.ops.evad_kernels.scatter_tokens(tokens, position, None, 2)
        except RuntimeError as error:
            messages.append(str(error))
        warned = [str(warning.message) for warning in caught]
        print(json.dumps([evad_kernels.backends()["scatter_tokens"], filled, warned, *messages]))
        """,
        PYTHONPATH=str(tmp_path),
        TRITON_INTERPRET="0",
    )
    assert row["cpu"] == "no C++ compiler was found" and row["reference"] is None
    assert filled == [1, 1, 0, 0]
    assert any("no C++ compiler was found" in warning for warning in warned)
    assert messages == ["scatter_tokens: backend must be available, got 'cpu': no C++ compiler was found"] * 2


@pytest.mark.parametrize("with_openmp", [True, False])
def test_a_build_without_openmp_says_so(with_openmp):
    warned = fresh_python(f"""
        import json, sys, types, warnings
        sys.modules["evad_kernels._native"] = types.SimpleNamespace(with_openmp={with_openmp}, with_cuda=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import evad_kernels
        print(json.dumps([str(warning.message) for warning in caught if "evad_kernels" in str(warning.message)]))
    """)
    assert [("run on one thread" in message) for message in warned] == [True] * (not with_openmp)


def test_native_module_has_the_threads_that_its_import_asks_for(native):
    assert native.with_openmp is bool(re.search(rb"GOMP_|__kmpc_", Path(native.__file__).read_bytes()))


@pytest.mark.skipif(not _backend.INTERPRETED, reason="a CPU tensor has two kernels only where Triton interprets")
def test_an_op_without_a_kernel_that_can_serve_says_so(monkeypatch):
    """As a backward, a compiled graph or an exported program calls it, past the choice of the public function."""
    tokens, position = torch.ones(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
    with (
        use_backend("triton"),
        pytest.raises(RuntimeError, match="got 'triton': Triton kernels compute in float32, float64"),
    ):
        torch.ops.evad_kernels.scatter_tokens(tokens, position, None, 2)
    for backend in ("cpu", "triton"):
        monkeypatch.setitem(_backend.MISSING, backend, "not here")
    with pytest.raises(RuntimeError, match="scatter_tokens: backend must be available, got 'cpu': not here"):
        torch.ops.evad_kernels.scatter_tokens(tokens.float(), position, None, 2)


def call():
    return scatter_tokens(torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), grid=(1, 1, 2))


@pytest.mark.parametrize("name", ["", "gpu", "CPU", None, 3])
def test_rejects_unknown_backend(name):
    with pytest.raises(ValueError, match="use_backend: name must be one of"), use_backend(name):
        pass
    assert _backend._requested == "auto"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_asked_for_by_name_never_falls_back(backend):
    reason = _backend.unavailable("scatter_tokens", backend)
    with use_backend(backend):
        if reason is None and _backend.DEVICE.get(backend, "cpu") == "cpu":
            call()
        else:
            expected = reason or "which serves cuda"
            with pytest.raises(RuntimeError, match="scatter_tokens: backend must") as error:
                call()
            assert expected in str(error.value)


def test_untested_backend_is_taken_by_name_or_after_its_trial(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for backend in ("triton", "cuda"):
        monkeypatch.setitem(_backend.MISSING, backend, None)
        monkeypatch.setitem(_backend.DEVICE, backend, "cuda")
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    for op, backend in _backend.ON_TRIAL:
        assert backend in _backend.IMPLEMENTED[op]
        monkeypatch.setattr(_backend, "_passes", lambda *tried: False)
        assert _backend.choose(op, on_gpu) == "reference"
        monkeypatch.setattr(_backend, "_passes", lambda *tried, this=(op, backend): tried[:2] == this)
        assert _backend.choose(op, on_gpu) == backend
        with use_backend(backend):
            assert _backend.choose(op, on_gpu) == backend
        assert evad_kernels.backends()[op][backend] == _backend.UNTESTED
    assert _backend.UNTESTED in str(evad_kernels.backends())


def test_use_backend_nests_and_is_restored():
    assert _backend._requested == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert _backend._requested == "auto"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert _backend._requested == "reference"
    assert _backend._requested == "auto"


def test_environment_variable_chooses_the_backend():
    code = "import json; from evad_kernels import _backend; print(json.dumps(_backend._requested))"
    assert fresh_python(code, EVAD_KERNELS_BACKEND="reference") == "reference"
    assert fresh_python(code, EVAD_KERNELS_BACKEND="") == "auto"
    with pytest.raises(AssertionError, match="EVAD_KERNELS_BACKEND must be one of"):
        fresh_python(code, EVAD_KERNELS_BACKEND="fastest")


# What is public


@pytest.mark.parametrize("op", SIGNATURES)
def test_signature_is_the_contract(op):
    assert op in evad_kernels.__all__
    signature = inspect.signature(getattr(evad_kernels, op))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == SIGNATURES[op]


def test_every_public_name_is_in_the_contract():
    assert set(evad_kernels.__all__) == {*SIGNATURES, "backends", "use_backend"}
    assert set(evad_kernels.backends()) == set(SIGNATURES)


def test_results_of_several_values_are_named():
    query = torch.randn(1, 2, 6, 8)
    importance = evad_kernels.keyframe_attention(query, query, query, num_keyframe=2)
    topk = evad_kernels.keyframe_attention_topk(query, query, query, num_keyframe=2, num_select=3)
    assert importance._fields == ("output", "importance")
    assert topk._fields == ("output", "index", "importance")


@pytest.mark.parametrize("op", SIGNATURES)
def test_docstring_names_arguments_results_and_errors(op):
    function = getattr(evad_kernels, op)
    documentation = inspect.getdoc(function)
    first = documentation.splitlines()[0]
    assert first.endswith(".") and len(first) <= 120
    for section in ("Args:", "Returns:", "Raises:"):
        assert f"\n{section}\n" in documentation
    arguments = documentation.split("Args:\n")[1].split("Returns:\n")[0]
    for parameter in inspect.signature(function).parameters:
        assert parameter in arguments, parameter


# Layers


def imported(path):
    """(module, name or None) of every absolute import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "evad_kernels").rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_import_torch_and_numpy_only(path):
    packages = {module.split(".")[0] for module, _ in imported(path)} - sys.stdlib_module_names
    assert packages <= {"torch", "numpy", "triton"}


@pytest.mark.parametrize("path", sorted((ROOT / "evad").rglob("*.py")), ids=lambda path: path.stem)
def test_detector_uses_public_kernels_only(path):
    public = {*evad_kernels.__all__, "__version__"}
    for module, name in imported(path):
        if module.split(".")[0] == "evad_kernels":
            assert module == "evad_kernels" and (name is None or name in public), f"{module}.{name}"
    used = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "evad_kernels"
    }
    assert used <= public


# Distributions


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The sources alone: no build, no environment, no history."""
    folder = tmp_path_factory.mktemp("checkout") / "evad_kernels"
    unwanted = shutil.ignore_patterns(
        *(
            ".git",
            ".venv*",
            "venv*",
            "build",
            "dist",
            "*.egg-info",
            "__pycache__",
            "*.so",
            "_native_missing.txt",
            ".*_cache",
        )
    )
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


def probe(folder, backend, python=sys.executable):
    """Runs an op of the package installed in ``folder``, from elsewhere."""
    return fresh_python(
        f"""
        import json, evad_kernels, torch
        with evad_kernels.use_backend({backend!r}):
            position = torch.ones(1, 1, dtype=torch.int64)
            dense = evad_kernels.scatter_tokens(torch.ones(1, 1, 1), position, grid=(1, 1, 2))
        print(json.dumps([evad_kernels.__file__, dense.flatten().tolist()]))
        """,
        python,
        PYTHONPATH=str(folder),
        PYTHONWARNINGS="ignore",
    ) == [str(folder / "evad_kernels" / "__init__.py"), [0, 1]]


OPS = ("scatter_tokens", "token_selection", "roi_align_3d", "pyramid_roi_align", "keyframe_attention")


STAND_IN_FOR_CMAKE = """#!/bin/sh
for argument; do case $argument in
  -DEVAD_OUTPUT_DIRECTORY=*) folder=${argument#*=} ;;
  -DEVAD_OUTPUT_NAME=*) name=${argument#*=} ;;
  -DEVAD_BUILD_DIGEST=*) digest=${argument#*=} ;;
esac; done
[ -z "$digest" ] || { echo "$digest" > "$folder/$name"; echo "$digest" >> builds; }
"""


def test_builds_again_only_after_a_change(tmp_path):
    """So the README's second line does not compile what its first line has compiled."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip(
        "setuptools", "77", reason="setuptools 77 or later is not installed here (pip fetches it to build)"
    )
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "evad_kernels").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").write_text(STAND_IN_FOR_CMAKE)
    (tmp_path / "bin" / "cmake").chmod(0o755)

    def builds(**variables):
        environment = {**os.environ, **variables, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, env=environment)
        (module,) = (tmp_path / "evad_kernels").glob("_native*")
        done = (tmp_path / "builds").read_text().split()
        assert module.read_text().strip() == done[-1]
        return len(done)

    assert (builds(), builds(), builds(CXXFLAGS="-g")) == (1, 1, 2)
    with open(tmp_path / "csrc" / "parallel.h", "a") as file:
        file.write("// changed\n")
    assert builds(CXXFLAGS="-g") == 3
    assert builds(CXXFLAGS="-g", CUDAARCHS="80") == 4


def stand_in(path, script):
    """An executable shell script that stands for a compiler."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_before_cpp17_is_no_compiler(tmp_path):
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip(
        "setuptools", "77", reason="setuptools 77 or later is not installed here (pip fetches it to build)"
    )
    old = stand_in(
        tmp_path / "old", f'case $* in *c++17*) echo unknown option >&2; exit 1 ;; esac\nexec {compiler} "$@"'
    )
    command = (sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", tmp_path)
    run(*command, env={**os.environ, "CXX": str(old)}, cwd=ROOT)
    assert "unknown option" in (tmp_path / "evad_kernels" / "_native_missing.txt").read_text()


# The build by CMake: what a configuration says


def configuration(folder, *arguments, **variables):
    """What CMake says of a build in ``folder``."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    pytest.importorskip("pybind11")
    arguments = ("-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", *arguments)
    environment = {**os.environ, **variables}
    return run("cmake", "-S", ROOT, "-B", folder, *arguments, env=environment, stderr=subprocess.STDOUT)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
def test_a_warning_that_the_compiler_does_not_know_costs_no_instruction_set(tmp_path):
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("no C++ compiler")
    like_clang = stand_in(
        tmp_path / "c++",
        "case $* in *-Wno-maybe-uninitialized*) echo \"warning: unknown warning option '-Wno-maybe-uninitialized'\" >&2"
        f' ;; esac\nexec {compiler} "$@"',
    )
    told = [
        re.findall(r"(AVX2|AVX512|AMX): (yes|no)", configuration(tmp_path / name, "-DEVAD_CUDA=OFF", CXX=str(path)))
        for name, path in (("plain", compiler), ("like clang", like_clang))
    ]
    assert [isa for isa, _ in told[0]] == ["AVX2", "AVX512", "AMX"]
    assert told[0] == told[1] and ("AVX2", "yes") in told[1]


def configuration_with_nvcc(folder, release, **variables):
    """What CMake says where nvcc is of ``release``, and knows sm_90 from 11.8 on."""
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("no nvcc")
    folder.mkdir()
    script = f"case $* in --version) echo Cuda compilation tools, release {release}, V{release}.1; exit ;; esac\n"
    if release < "11.8":
        script += "case $* in *_90*) echo Unsupported gpu architecture >&2; exit 1 ;; esac\n"
    compiler = stand_in(folder / "nvcc", f'{script}exec {nvcc} "$@"')
    return configuration(folder / "build", "-DEVAD_CUDA=ON", CUDACXX=str(compiler), **variables)


def test_an_nvcc_too_old_for_the_gpus_is_left_alone(tmp_path):
    told = configuration_with_nvcc(tmp_path / "old", "11.5", CUDAARCHS="")
    assert re.search(r"nvcc 11\.5 .* 11\.8", told) and "architectures" not in told


def test_architectures_of_the_environment(tmp_path):
    """An older nvcc serves GPUs that it knows."""
    assert "architectures 80\n" in configuration_with_nvcc(tmp_path / "old", "11.5", CUDAARCHS="80")
    assert "architectures 80-real;90\n" in configuration_with_nvcc(tmp_path / "new", "11.8", CUDAARCHS="")


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "CMAKE_ARGS": "-DEVAD_CUDA=OFF"}
    run(sys.executable, "-m", "build", "--outdir", folder, checkout, env=environment)
    (wheel,), (_, *_) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    stated = re.search(r"makes a wheel of ([\d.]+) MB", ROOT.joinpath("README.md").read_text())[1]
    assert wheel.stat().st_size / 1e6 == pytest.approx(float(stated), rel=0.05)
    return wheel


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", ["this", "other"])
def test_wheel_passes_the_op_tests_elsewhere(wheel, interpreter, tmp_path):
    """In an environment that has an interpreter's packages but neither the sources nor what is installed to be edited.

    EVAD_KERNELS_OTHER_PYTHON names another interpreter of the same Python version, with another torch.
    """
    base = sys.executable if interpreter == "this" else os.environ.get("EVAD_KERNELS_OTHER_PYTHON")
    if base is None:
        pytest.skip("EVAD_KERNELS_OTHER_PYTHON names no interpreter with another torch")
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run(base, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", where).strip()
    Path(site, "packages.pth").write_text(run(base, "-c", where))
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    assert probe(Path(site), "cpu", python)
    (tmp_path / "tests").mkdir()
    for path in ("conftest.py", "pyproject.toml", *(f"tests/test_{stem}.py" for stem in OPS)):
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = (python, "-m", "pytest", "-m", "not slow", "-k", "cpu and (matches_reference or gradient)")
    output = run(*command, cwd=tmp_path, env=environment)
    assert int(re.search(r"(\d+) passed", output)[1]) > 400, output


@pytest.mark.slow
def test_installs_without_a_compiler(checkout, tmp_path):
    command = (sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", tmp_path / "site", checkout)
    output = run(*command, env={**os.environ, "CXX": str(tmp_path / "no-such-compiler")}, stderr=subprocess.STDOUT)
    assert "WARNING" in output and "installing without native kernels" in output
    assert probe(tmp_path / "site", "auto")
    assert "no-such-compiler" in (tmp_path / "site" / "evad_kernels" / "_native_missing.txt").read_text()
