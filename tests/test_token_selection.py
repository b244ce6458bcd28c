import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evad_kernels import select_tokens, use_backend
from evad_kernels.testing import DTYPES, assert_registered, layouts

NAN, INF = math.nan, math.inf

# name: (B, M, num_select)
CASES = {
    "odd": (2, 63, 20),
    "one": (1, 1, 1),
    "none": (2, 17, 0),
    "all": (2, 111, 111),
    "many rows": (9, 1000, 333),
    "paper 224": (8, 1372, 902),
    "long": (1, 5000, 1234),
}


def importances(case, dtype, kind):
    """Scores as attention gives them, with many ties, or with every special value."""
    B, M, num_select = CASES[case]
    generator = torch.Generator().manual_seed(0)
    if kind == "attention":
        values = torch.randn(B, M, generator=generator, dtype=torch.float64).mul(0.3).softmax(1)
    elif kind == "ties":
        values = torch.randint(0, 4, (B, M), generator=generator, dtype=torch.float64)
    else:
        special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-310, -1e-310, 1.0, -1.0], dtype=torch.float64)
        values = special[torch.randint(0, len(special), (B, M), generator=generator)]
    return values.to(dtype), num_select


def expected(importance, num_select):
    """The contract in Python's own order: NaN lowest, highest first, then lower index; ascending."""
    rows = []
    for row in importance.double().tolist():
        order = sorted(range(len(row)), key=lambda j: (math.isnan(row[j]), 0.0 if math.isnan(row[j]) else -row[j], j))
        rows.append(sorted(order[:num_select]))
    return torch.tensor(rows, dtype=torch.int64).view(importance.shape[0], num_select)


@pytest.mark.parametrize("kind", ["attention", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_select_matches_contract(backend, case, dtype, kind):
    importance, num_select = importances(case, dtype, kind)
    assert torch.equal(select_tokens(importance, num_select), expected(importance, num_select))


def test_select_ties_and_order(backend):
    importance = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [-0.0, 0.0, NAN, -INF, -0.0]])
    assert select_tokens(importance, 2).tolist() == [[1, 2], [0, 1]]
    assert select_tokens(importance, 4).tolist() == [[0, 1, 2, 4], [0, 1, 3, 4]]


def test_select_strides(backend):
    importance, num_select = importances("odd", torch.float32, "attention")
    for name, strided in layouts(importance):
        assert torch.equal(select_tokens(strided, num_select), expected(importance, num_select)), name
    row = importance[:1].expand(3, -1)
    assert torch.equal(select_tokens(row, num_select), expected(row, num_select))


def test_select_is_independent_of_threads(backend):
    importance, num_select = importances("many rows", torch.float32, "ties")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(select_tokens(importance, num_select))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_select_registration():
    importance, num_select = importances("odd", torch.float32, "attention")
    op = torch.ops.evad_kernels.select_tokens.default
    assert_registered(op, importance, num_select)
    assert_registered(op, importance.clone().requires_grad_(), num_select)


def test_select_carries_no_gradient(backend):
    importance = torch.rand(2, 9, requires_grad=True)
    assert not select_tokens(importance, 3).requires_grad
    with torch.inference_mode():
        assert select_tokens(torch.rand(2, 9), 3).shape == (2, 3)


def test_select_compiles_without_graph_break(backend):
    compiled = torch.compile(select_tokens, fullgraph=True, dynamic=True)
    for M, num_select in ((63, 20), (111, 30), (40, 39)):
        importance = torch.rand(2, M)
        assert torch.equal(compiled(importance, num_select), expected(importance, num_select))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_select_edges(backend, shape):
    for num_select in {0, shape[1]}:
        index = select_tokens(torch.rand(shape), num_select)
        assert index.shape == (shape[0], num_select) and index.dtype == torch.int64


@pytest.mark.parametrize(
    ("importance", "num_select", "error", "message"),
    [
        (torch.ones(5), 1, ValueError, r"importance must be \[B, M\], got \[5\]"),
        ([[1.0]], 1, TypeError, "importance must be a tensor"),
        (torch.ones(1, 5, dtype=torch.int64), 1, TypeError, "importance must be float32"),
        (torch.ones(1, 5), -1, ValueError, r"num_select must be in \[0, M = 5\], got -1"),
        (torch.ones(1, 5), 6, ValueError, r"num_select must be in \[0, M = 5\], got 6"),
        (torch.ones(1, 5), 2**63, ValueError, r"num_select must be in \[0, M = 5\]"),
        (torch.ones(1, 5), 2.0, TypeError, "num_select must be an integer"),
        (torch.ones(1, 5), True, TypeError, "num_select must be an integer"),
    ],
)
def test_select_rejects_bad_input(backend, importance, num_select, error, message):
    with pytest.raises(error, match=f"select_tokens: {message}"):
        select_tokens(importance, num_select)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_select_any_values(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    B, M = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 40))
    value = st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1.0, -1.0]) | st.floats(width=32)
    values = data.draw(st.lists(value, min_size=B * M, max_size=B * M))
    importance = torch.tensor(values, dtype=torch.float64).to(dtype).view(B, M)
    num_select = data.draw(st.integers(0, M))
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            assert torch.equal(select_tokens(importance, num_select), expected(importance, num_select)), backend
