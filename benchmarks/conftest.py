"""The ``contest`` fixture, and the end of a benchmark run: results/, the README's tables, a summary."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks._harness import Contest
from benchmarks.ceilings import Ceilings


def pytest_configure(config):
    config.benchmark_rows = []
    config.benchmark_ceilings = Ceilings(config.getoption("--benchmark-device"))


@pytest.fixture
def contest(request, benchmark):
    config = request.config
    return Contest(
        benchmark,
        request.path.stem.removeprefix("bench_"),
        config.benchmark_ceilings,
        config.getoption("--benchmark-smoke"),
        config.benchmark_rows,
    )


def pytest_terminal_summary(terminalreporter, config):
    if not config.benchmark_rows:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(report.summary(config.benchmark_rows))
    if config.getoption("--benchmark-smoke"):
        terminalreporter.write_line("one round each: nothing was measured, nothing is written")
        return
    path = report.record(config.benchmark_rows, config.benchmark_ceilings)
    report.update()
    terminalreporter.write_line(f"written: {path.relative_to(config.rootpath)}; tables and plot follow it")
