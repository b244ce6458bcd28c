"""Options and fixtures of the whole test suite.

pytest                                  tests/
pytest -n 2                             two at a time, as many as there are cores; a timing may fail that passes alone
pytest -m slow                          the tests that take minutes; plain pytest skips them and says so
pytest --benchmark                      benchmarks/, into benchmarks/results/ and the README's tables
pytest --benchmark --benchmark-smoke    every benchmark once, nothing written

Without a GPU, Triton kernels are interpreted on CPU tensors: what they compute is tested, their speed is not.
"""

import importlib.util
import os
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of evad_kernels
torch.backends.cudnn.allow_tf32 = False  # float32 convolutions of references and golden models are float32 on a GPU


def patch_triton_interpreter():
    """Three mends of Triton's interpreter, which the tests run.

    It patches its language again at each call of a device function: most of its time. Before Triton 3.9 it makes a
    number of an array of one element by ``int``, which NumPy 2.4 refuses. And its products are NumPy's, which on some
    CPUs add up in an order that depends on the tile; kernels count on products that repeat, as a GPU's do.
    """
    import numpy as np
    from triton import language
    from triton.runtime import interpreter

    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_unless_patched(function):
        used = [x for x in function.__globals__.values() if x is language or x is language.core]
        patched = not any(language.core.is_builtin(x.load) for x in used)
        return interpreter._LangPatchScope() if patched else patch(function)

    def create_dot(self, a, b, d, *options):
        if a.data.dtype not in (np.float16, np.float32):
            return multiply(self, a, b, d, *options)
        total = np.zeros_like(d.data)
        for k in range(a.data.shape[-1]):
            total += a.data[..., k, None].astype(total.dtype) * b.data[..., k, None, :].astype(total.dtype)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_unless_patched, patch_tensor_and_index
    multiply, interpreter.InterpreterBuilder.create_dot = interpreter.InterpreterBuilder.create_dot, create_dot


def pytest_addoption(parser):
    group = parser.getgroup("evad_kernels")
    group.addoption("--benchmark", action="store_true", help="Run benchmarks/ instead of tests/.")
    group.addoption("--benchmark-smoke", action="store_true", help="With --benchmark: a quick try, nothing written.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--benchmark-device", default=device, help=f"With --benchmark: where it runs (here {device}).")


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        patch_triton_interpreter()
    if not config.getoption("--benchmark"):
        return
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "benchmarks")]
    config.option.benchmark_quiet = True  # benchmarks/conftest.py prints a table that has the rivals too


def pytest_collection_modifyitems(config, items):
    if config.getoption("--benchmark-smoke"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        items[:] = [item for item in items if item in first.values()]
    named = config.option.markexpr or config.option.keyword or any("::" in argument for argument in config.args)
    if not named:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run by name or with -m slow"))


def pytest_terminal_summary(terminalreporter):
    for report in (report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])):
        for name, value in report.user_properties:
            if name == "table":
                terminalreporter.write_line(f"\n{report.nodeid}\n{value}")
    skips = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skips)
    terminalreporter.write_line(f"{len(skips)} skipped" + (":" if skips else ""))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:6d}  {reason}")


BROKEN_GPU = (
    "illegal memory access",
    "illegal instruction",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
)
_broken = False  # what fails after such an error in the same process says nothing


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    global _broken
    report = (yield).get_result()
    _broken |= report.failed and any(words in str(call.excinfo.value) for words in BROKEN_GPU)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if _broken and hasattr(item.config, "workerinput"):
        os._exit(3)  # of pytest -n: another process takes over, this test counts as failed


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch.empty is filled with NaN, so an output element that is never written is found."""
    if request.config.getoption("--benchmark"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request):
    """Runs a test on each backend of this machine that serves its ops; new tensors are on its device.

    Its ops are its parameter ``op``, or those of ``@pytest.mark.ops(...)``, or all of its file.
    """
    import evad_kernels
    from evad_kernels import _backend

    stem = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    parameters = request.node.callspec.params
    ops = [op for op in _backend.IMPLEMENTED if getattr(evad_kernels, op).__module__.endswith(f".{stem}")]
    named = parameters.get("op")
    marked = request.node.get_closest_marker("ops")
    if (name := getattr(named, "__name__", named)) in ops:
        ops = [name]
    elif marked is not None:
        ops = marked.args
    reasons = [_backend.unavailable(op, request.param) for op in ops or _backend.IMPLEMENTED]
    if reason := next(filter(None, reasons), None):
        pytest.skip(f"backend {request.param}: {reason}")
    if request.param == "triton":
        if _backend.INTERPRETED and not ops:
            pytest.skip("backend triton: a whole model takes the interpreter too long")
        if parameters.get("dtype") == torch.float64:
            pytest.skip("backend triton: float64 is for reference and cpu")
        if _backend.INTERPRETED and str(parameters.get("case")).startswith("paper"):
            pytest.skip("backend triton: the paper's shapes take the interpreter too long")
    on_gpu = _backend.DEVICE.get(request.param) == "cuda"
    with evad_kernels.use_backend(request.param), torch.device("cuda") if on_gpu else nullcontext():
        yield request.param
