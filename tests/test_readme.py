"""The README's code runs, and its table of ops is the table of backends."""

import re
from pathlib import Path

import pytest

from evad_kernels import _backend

README = Path(__file__).parents[1].joinpath("README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {number}" for number in range(len(BLOCKS))])
def test_code_runs(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_ops_table_is_the_backends_table():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|by name|) ?\| (yes|by name|) ?\|$", README, re.MULTILINE)
    assert {op for op, *_ in rows} == set(_backend.IMPLEMENTED)
    for op, *cells in rows:
        for backend, cell in zip(("cpu", "cuda"), cells, strict=True):
            assert bool(cell) == (backend in _backend.IMPLEMENTED[op]), (op, backend)
