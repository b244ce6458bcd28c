"""The ``contest`` fixture, and the end of a benchmark run: results/, the README's tables, a summary."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import report
from benchmarks._harness import Contest
from benchmarks.ceilings import Ceilings
from evad_kernels import _backend


def pytest_configure(config):
    config.benchmark_rows = []
    config.benchmark_ceilings = Ceilings(config.getoption("--benchmark-device"))
    if config.benchmark_ceilings.device != "cpu":
        _backend.ON_TRIAL.clear()  # here they are measured, no trial among the calls


def pytest_collection_modifyitems(config, items):
    if config.benchmark_ceilings.device != "cpu":  # machines are lent for minutes: rows that have goals come first
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), item.get_closest_marker("later") is not None))


@pytest.fixture
def contest(request, benchmark):
    config = request.config
    rows: list[dict] = []
    smoke = config.getoption("--benchmark-smoke")
    yield Contest(benchmark, request.path.stem.removeprefix("bench_"), config.benchmark_ceilings, smoke, rows)
    config.benchmark_rows += rows
    if config.benchmark_ceilings.device != "cpu":  # graphs of this row hold memory
        gc.collect()
        torch.cuda.empty_cache()
    if rows and not smoke:  # at once: a run that is stopped keeps what it measured
        report.record(rows, config.benchmark_ceilings)


def pytest_terminal_summary(terminalreporter, config):
    if not config.benchmark_rows:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(report.summary(config.benchmark_rows))
    if config.getoption("--benchmark-smoke"):
        terminalreporter.write_line("one round each: nothing was measured, nothing is written")
        return
    report.update()
    path = report.path_of(report.machine(config.benchmark_ceilings), config.benchmark_ceilings.device)
    terminalreporter.write_line(f"written: {path.relative_to(config.rootpath)}; tables and plot follow it")
