import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evad_kernels
from evad_kernels import scatter_tokens, use_backend
from evad_kernels.testing import DTYPES, assert_accurate, assert_registered, gradients, layouts, on_default_device

# name: (B, K, C, grid)
CASES = {
    "odd": (2, 37, 19, (3, 5, 7)),
    "one cell": (1, 1, 1, (1, 1, 1)),
    "all kept": (2, 24, 8, (2, 3, 4)),
    "many rows": (1, 700, 33, (8, 11, 13)),
    "many tokens": (1, 1100, 70, (5, 16, 16)),
    "paper 224": (2, 539, 384, (8, 14, 14)),
}


def make(case, dtype=torch.float32, fill=None, seed=0):
    """The same on every device."""
    with torch.device("cpu"):
        tokens, position, grid, fill = drawn(case, dtype, fill, seed)
    return on_default_device(tokens), on_default_device(position), grid, on_default_device(fill)


def drawn(case, dtype, fill, seed):
    B, K, C, grid = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    cells = grid[0] * grid[1] * grid[2]
    tokens = torch.randn(B, K, C, generator=generator, dtype=torch.float64).to(dtype)
    position = torch.stack([torch.randperm(cells, generator=generator)[:K] for _ in range(B)])
    shape = {"none": None, "row": (C,), "cells": (cells, C)}[fill or "none"]
    fill = None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return tokens, position, grid, fill


def expected(tokens, position, grid, fill):
    """The paper's sentence, cell by cell."""
    B, _, C = tokens.shape
    cells = grid[0] * grid[1] * grid[2]
    blank = torch.zeros(cells, C, dtype=tokens.dtype) if fill is None else fill.expand(cells, C)
    dense = blank.repeat(B, 1, 1)
    for b in range(B):
        for k, cell in enumerate(position[b].tolist()):
            dense[b, cell] = tokens[b, k]
    return dense.view(B, *grid, C)


@pytest.mark.parametrize("fill", ["none", "row", "cells"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(backend, case, dtype, fill):
    tokens, position, grid, fill = make(case, dtype, fill)
    dense = scatter_tokens(tokens, position, grid=grid, fill=fill)
    assert torch.equal(dense, expected(tokens, position, grid, fill))


@pytest.mark.parametrize("fill", ["none", "row", "cells"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["odd", "many rows", "many tokens"])
def test_gradient(backend, case, dtype, fill):
    tokens, position, grid, fill = make(case, dtype, fill)
    inputs = [tokens] if fill is None else [tokens, fill]

    def run(tokens, fill=None):
        return scatter_tokens(tokens, position, grid=grid, fill=fill)

    _, actual = gradients(run, inputs)
    with use_backend("reference"):
        _, reference = gradients(run, inputs)
        _, truth = gradients(run, [x.double() for x in inputs])
    for label, *grads in zip(["grad_tokens", "grad_fill"], actual, reference, truth, strict=False):
        assert_accurate(*grads, label=label)


def test_strides(backend):
    tokens, position, grid, _ = make("odd")
    want = expected(tokens, position, grid, None)
    for name, strided in layouts(tokens):
        assert torch.equal(scatter_tokens(strided, position, grid=grid), want), name
    for name, strided in layouts(position):
        assert torch.equal(scatter_tokens(tokens, strided, grid=grid), want), name


def test_registration():
    tokens, position, grid, fill = make("odd", fill="cells")
    cells = grid[0] * grid[1] * grid[2]
    for blank in (None, fill, fill[0]):
        blank = None if blank is None else blank.clone().requires_grad_()
        assert_registered(
            torch.ops.evad_kernels.scatter_tokens.default, tokens.clone().requires_grad_(), position, blank, cells
        )


def test_compiles_without_graph_break(backend):
    tokens, position, grid, fill = make("odd", fill="row")
    tokens.requires_grad_()
    compiled = torch.compile(scatter_tokens, fullgraph=True)
    dense = compiled(tokens, position, grid=grid, fill=fill)
    assert torch.equal(dense, expected(tokens, position, grid, fill))
    (grad,) = torch.autograd.grad(dense.square().sum(), tokens)
    torch.testing.assert_close(grad, 2 * tokens.detach())


def test_second_backward_raises():
    tokens, position, grid, _ = make("odd")
    tokens.requires_grad_()
    with use_backend("cpu"):
        dense = scatter_tokens(tokens, position, grid=grid)
    (grad,) = torch.autograd.grad(dense.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(grad.sum(), tokens)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["B", "K", "C"])
def test_edges(backend, shape):
    B, K, C = shape
    tokens = torch.ones(B, K, C, requires_grad=True)
    position = torch.arange(K).expand(B, K)
    dense = scatter_tokens(tokens, position, grid=(1, 2, 3), fill=torch.full((C,), 7.0))
    assert dense.shape == (B, 1, 2, 3, C)
    if K == 0:
        assert (dense == 7).all()
    (grad,) = torch.autograd.grad(dense.sum(), tokens)
    assert grad.shape == tokens.shape


def test_later_of_equal_positions_is_placed(backend):
    tokens = torch.tensor([[[1.0], [2.0], [3.0]]], requires_grad=True)
    dense = scatter_tokens(tokens, torch.tensor([[1, 0, 1]]), grid=(1, 1, 2))
    assert dense.flatten().tolist() == [2, 3]
    (grad,) = torch.autograd.grad(dense.sum(), tokens)
    assert grad.flatten().tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", [-1, 12, 2**31, -(2**63), 2**63 - 1])
def test_rejects_position_outside(backend, bad):
    tokens, position = torch.ones(1, 2, 3, requires_grad=True), torch.tensor([[0, bad]])
    if backend in ("triton", "cuda"):  # a GPU cannot say so without a sync: it leaves the fill
        dense = scatter_tokens(tokens, position, grid=(1, 3, 4), fill=torch.full((3,), 7.0))
        assert dense[0, 0, 0, 0].tolist() == [1, 1, 1] and (dense.flatten(1, 3)[0, 1:] == 7).all()
        (grad,) = torch.autograd.grad(dense.sum(), tokens)
        assert grad.tolist() == [[[1, 1, 1], [0, 0, 0]]]
        return
    with pytest.raises(ValueError, match=r"scatter_tokens: position must be in \[0, 12\), got"):
        scatter_tokens(tokens, position, grid=(1, 3, 4))


@pytest.mark.parametrize("position", [[[11], [-1]], [[12], [0]]], ids=["before", "behind"])
def test_position_outside_is_no_cell_of_another_sample(backend, position):
    if backend not in ("triton", "cuda"):
        pytest.skip("raises: test_rejects_position_outside")
    tokens = torch.ones(2, 1, 3, requires_grad=True)
    dense = scatter_tokens(tokens, torch.tensor(position), grid=(1, 3, 4))
    inside = [[0 <= cell < 12 for cell in row] for row in position]
    assert dense.flatten(1).sum(1).tolist() == [3 * sum(row) for row in inside]
    (grad,) = torch.autograd.grad(dense.sum(), tokens)
    assert grad.tolist() == [[[float(is_cell)] * 3 for is_cell in row] for row in inside]


@pytest.mark.parametrize("fill", [(1,), (2, 1)], ids=["row", "cells"])
def test_gradient_of_the_fill_is_summed_in_float64(backend, fill):
    if backend == "reference":
        pytest.skip("autograd sums in float32")
    fill = torch.zeros(fill, requires_grad=True)
    dense = scatter_tokens(torch.ones(3, 1, 1), torch.zeros(3, 1, dtype=torch.int64), grid=(1, 1, 2), fill=fill)
    (grad,) = torch.autograd.grad(dense[:, 0, 0, 1, 0], fill, torch.tensor([2.0**30, 1.0, -(2.0**30)]))
    assert grad.flatten()[-1] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.ones(5, 3)}, ValueError, "tokens must be"),
        ({"tokens": torch.ones(2, 5, 3, dtype=torch.int32)}, TypeError, "tokens must be float32"),
        ({"tokens": "x"}, TypeError, "tokens must be a tensor"),
        ({"position": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "position must be"),
        ({"position": torch.zeros(2, 5, dtype=torch.int32)}, TypeError, "position must be int64"),
        ({"grid": (1, 2)}, ValueError, "grid must be three integers"),
        ({"grid": 12}, TypeError, "grid must be three integers"),
        ({"grid": (0, 2, 2)}, ValueError, "grid must be at least 1"),
        ({"grid": (2**11, 2**10, 2**10)}, ValueError, r"grid must be of fewer than 2\*\*31 cells"),
        (
            {"tokens": torch.ones(1, 1, 1).expand(1, 2**31, 1)},
            ValueError,
            r"tokens must be \[B, K, C\] with K below 2\*\*31",
        ),
        ({"fill": torch.ones(4)}, ValueError, "fill must be"),
        ({"fill": torch.ones(3, dtype=torch.float64)}, TypeError, "fill must be of the dtype of tokens"),
        ({"fill": torch.ones(3, device="meta")}, RuntimeError, "fill must be on the device of tokens"),
    ],
)
def test_rejects_bad_input(backend, change, error, message):
    arguments = {"tokens": torch.ones(2, 5, 3), "position": torch.arange(5).expand(2, 5), "grid": (1, 2, 3)}
    arguments.update((name, on_default_device(value)) for name, value in change.items())
    with pytest.raises(error, match=f"scatter_tokens: {message}"):
        scatter_tokens(**arguments)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    B, C = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 70))
    grid = tuple(data.draw(st.integers(1, 6)) for _ in range(3))
    cells = grid[0] * grid[1] * grid[2]
    K, dtype = data.draw(st.integers(0, cells)), data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    tokens = torch.randn(B, K, C, generator=generator).to(dtype)
    position = torch.randint(0, cells, (B, K), generator=generator)  # some of them equal
    fill = data.draw(st.sampled_from([None, (C,), (cells, C)]))
    fill = None if fill is None else torch.randn(fill, generator=generator).to(dtype)
    want = expected(tokens, position, grid, fill)
    tokens, position = (data.draw(st.sampled_from([x for _, x in layouts(t)])) for t in (tokens, position))
    tokens.requires_grad_()
    dense = evad_kernels.scatter_tokens(tokens, position, grid=grid, fill=fill)
    assert torch.equal(dense, want)
    grad_dense = torch.randn(dense.shape, generator=generator).to(dtype)
    (grad,) = torch.autograd.grad(dense, tokens, grad_dense)
    with use_backend("reference"):
        dense = evad_kernels.scatter_tokens(tokens, position, grid=grid, fill=fill)
    assert torch.equal(grad, torch.autograd.grad(dense, tokens, grad_dense)[0])
    if B and K:
        position = position.clone()
        position[data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, K - 1))] = data.draw(
            st.integers(-(2**63), -1) | st.integers(cells, 2**63 - 1)
        )
        with pytest.raises(ValueError, match=r"scatter_tokens: position must be in \[0, "):
            evad_kernels.scatter_tokens(tokens, position, grid=grid, fill=fill)
