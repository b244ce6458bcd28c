"""Options and fixtures of the whole test suite.

pytest                                  tests/
pytest -m slow                          the tests that take minutes; plain pytest skips them and says so
pytest --benchmark                      benchmarks/, into benchmarks/results/ and the README's tables
pytest --benchmark --benchmark-smoke    every benchmark once, nothing written
"""

from collections import Counter

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("evad_kernels")
    group.addoption("--benchmark", action="store_true", help="Run benchmarks/ instead of tests/.")
    group.addoption("--benchmark-smoke", action="store_true", help="With --benchmark: a quick try, nothing written.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--benchmark-device", default=device, help=f"With --benchmark: where it runs (here {device}).")


def pytest_configure(config):
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
    skips = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skips)
    terminalreporter.write_line(f"{len(skips)} skipped" + (":" if skips else ""))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:6d}  {reason}")


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """torch.empty is filled with NaN, so an output element that is never written is found."""
    if request.config.getoption("--benchmark"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs a test once a backend that this machine has."""
    import evad_kernels
    from evad_kernels import _backend

    if (reason := _backend.MISSING[request.param]) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with evad_kernels.use_backend(request.param):
        yield request.param
