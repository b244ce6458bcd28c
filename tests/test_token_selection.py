import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evad_kernels import _backend, gather_tokens, select_tokens, use_backend
from evad_kernels.testing import DTYPES, assert_accurate, assert_registered, gradients, layouts, on_default_device
from evad_kernels.token_selection import select_tokens_with_slots

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
    "very long": (2, 20000, 15000),
}


def importances(case, dtype, kind):
    """Scores as attention gives them, with many ties, or with every special value."""
    with torch.device("cpu"):  # the same on every device
        values = drawn_importances(case, kind)
    return on_default_device(values.to(dtype)), CASES[case][2]


def drawn_importances(case, kind):
    B, M, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    if kind == "attention":
        values = torch.randn(B, M, generator=generator, dtype=torch.float64).mul(0.3).softmax(1)
    elif kind == "ties":
        values = torch.randint(0, 4, (B, M), generator=generator, dtype=torch.float64)
    else:
        special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-310, -1e-310, 1.0, -1.0], dtype=torch.float64)
        values = special[torch.randint(0, len(special), (B, M), generator=generator)]
    return values


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


@pytest.mark.parametrize("kind", ["attention", "ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["odd", "one", "none", "all", "many rows", "long"])
def test_select_with_slots_inverts_index(backend, case, dtype, kind):
    importance, num_select = importances(case, dtype, kind)
    for _, strided in layouts(importance):
        index, slot = select_tokens_with_slots(strided, num_select)
        assert torch.equal(index, expected(importance, num_select))
        assert slot.shape == importance.shape and slot.dtype == torch.int32 and slot.is_contiguous()
        of = {(b, m): k for b, row in enumerate(index.tolist()) for k, m in enumerate(row)}
        assert slot.tolist() == [[of.get((b, m), -1) for m in range(slot.shape[1])] for b in range(slot.shape[0])]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_select_with_slots_edges(backend, shape):
    for num_select in {0, shape[1]}:
        index, slot = select_tokens_with_slots(torch.rand(shape), num_select)
        assert index.shape == (shape[0], num_select) and slot.shape == shape
    with pytest.raises(ValueError, match=r"num_select must be in \[0, M = 5\], got 6"):
        select_tokens_with_slots(torch.ones(1, 5), 6)


def test_select_registration():
    importance, num_select = importances("odd", torch.float32, "attention")
    for op in (torch.ops.evad_kernels.select_tokens, torch.ops.evad_kernels.select_tokens_with_slots):
        assert_registered(op.default, importance, num_select)
        assert_registered(op.default, importance.clone().requires_grad_(), num_select)


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
        (torch.ones(1, 1).expand(1, 2**31), 1, ValueError, r"importance must be \[B, M\] with M below 2\*\*31"),
        (torch.ones(1, 5), 2.0, TypeError, "num_select must be an integer"),
        (torch.ones(1, 5), True, TypeError, "num_select must be an integer"),
    ],
)
def test_select_rejects_bad_input(backend, importance, num_select, error, message):
    with pytest.raises(error, match=f"select_tokens: {message}"):
        select_tokens(on_default_device(importance), num_select)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_select_any_values(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    B, M = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 40))
    value = st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1.0, -1.0]) | st.floats(width=32)
    values = data.draw(st.lists(value, min_size=B * M, max_size=B * M))
    importance = torch.tensor(values, dtype=torch.float64).to(dtype).view(B, M)
    num_select = data.draw(st.integers(0, M))
    strided = data.draw(st.sampled_from([x for _, x in layouts(importance)]))
    too_many = data.draw(st.integers(M + 1, 2**63) | st.integers(-(2**63), -1))
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            assert torch.equal(select_tokens(strided, num_select), expected(importance, num_select)), backend
            with pytest.raises(ValueError, match=r"select_tokens: num_select must be in \[0, "):
                select_tokens(strided, too_many)


# gather_tokens: (B, N, C, num_keyframe, num_select); C of None is tokens [B, N]
GATHER_CASES = {
    "odd": (2, 63, 19, 7, 20),
    "values": (3, 63, None, 7, 20),
    "no keyframe": (2, 17, 3, 0, 17),
    "keyframe only": (2, 17, 3, 17, 0),
    "one channel": (2, 111, 1, 5, 30),
    "paper 224": (2, 1568, 768, 196, 902),
}


def make(case, dtype=torch.float32, repeated=False):
    """The same on every device."""
    with torch.device("cpu"):
        tokens, index, num_keyframe = drawn(case, dtype, repeated)
    return on_default_device(tokens), on_default_device(index), num_keyframe


def drawn(case, dtype, repeated):
    B, N, C, num_keyframe, num_select = GATHER_CASES[case]
    generator = torch.Generator().manual_seed(0)
    shape = (B, N) if C is None else (B, N, C)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
    tokens = tokens > 0 if dtype == torch.bool else (tokens * 50).to(dtype) if not dtype.is_floating_point else tokens
    M = N - num_keyframe
    if repeated and M:
        index = torch.randint(0, M, (B, num_select), generator=generator)
    else:
        index = torch.stack([torch.randperm(M, generator=generator)[:num_select].sort().values for _ in range(B)])
    return tokens.to(dtype), index, num_keyframe


def kept_rows(tokens, index, num_keyframe):
    """The paper's sentence, row by row."""
    rows = [
        [tokens[b, n] for n in range(num_keyframe)] + [tokens[b, num_keyframe + j] for j in index[b].tolist()]
        for b in range(tokens.shape[0])
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.int16, torch.complex64], ids=str)
@pytest.mark.parametrize("case", GATHER_CASES)
def test_gather_matches_rows(backend, case, dtype):
    tokens, index, num_keyframe = make(case, dtype)
    kept = gather_tokens(tokens, index, num_keyframe=num_keyframe)
    assert kept.dtype == dtype and torch.equal(kept, kept_rows(tokens, index, num_keyframe))


@pytest.mark.parametrize("repeated", [False, True], ids=["unique", "repeated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATHER_CASES)
def test_gather_gradient(backend, case, dtype, repeated):
    tokens, index, num_keyframe = make(case, dtype, repeated)

    def run(tokens):
        return gather_tokens(tokens, index, num_keyframe=num_keyframe)

    _, actual = gradients(run, [tokens])
    assert torch.equal(actual[0], gradients(run, [tokens])[1][0])  # the same bits again
    with use_backend("reference"):
        _, reference = gradients(run, [tokens])
        _, truth = gradients(run, [tokens.double()])
    assert_accurate(actual[0], reference[0], truth[0], label="grad_tokens")


@pytest.fixture
def cpu_kernels():
    if _backend.native is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    with use_backend("cpu"), torch.device("cpu"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [1, 63, 64, 101])
def test_gather_gradient_adds_copies_in_order(cpu_kernels, dtype, C):
    generator = torch.Generator().manual_seed(0)
    B, M, num_keyframe, num_select = 2, 23, 3, 100
    index = torch.randint(0, M - 5, (B, num_select), generator=generator)
    grad_kept = torch.randn(B, num_keyframe + num_select, C, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.zeros(B, num_keyframe + M, C, dtype=dtype, requires_grad=True)
    (actual,) = torch.autograd.grad(gather_tokens(tokens, index, num_keyframe=num_keyframe), tokens, grad_kept)

    total = torch.zeros(tokens.shape, dtype=torch.promote_types(dtype, torch.float32))
    total[:, :num_keyframe] = grad_kept[:, :num_keyframe]
    for b in range(B):
        for k, m in enumerate(index[b].tolist()):
            total[b, num_keyframe + m] += grad_kept[b, num_keyframe + k]
    assert torch.equal(actual, total.to(dtype))


def test_gather_gradient_looks_for_no_copy(cpu_kernels):
    """The time of repeated tokens does not grow with what lies between the copies."""
    M, C = 20_000, 8
    tokens = torch.zeros(1, M, C, requires_grad=True)

    def seconds(index):
        kept = gather_tokens(tokens, index[None])
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            torch.autograd.grad(kept, tokens, torch.ones_like(kept), retain_graph=True)
            times.append(time.perf_counter() - begin)
        return min(times)

    far, near = torch.arange(M // 2).repeat(4), torch.arange(M // 2).repeat_interleave(4)
    assert seconds(far) < 30 * seconds(near)


def test_gather_gradient_of_copies_far_apart(backend):
    """Over a thousand rows: a copy far behind its first, and two that both come late."""
    index = torch.arange(1200)
    index[1150], index[1199] = 7, 1100
    tokens = torch.zeros(1, 1202, 1, requires_grad=True)
    row = torch.arange(1202.0)
    kept = gather_tokens(tokens, index[None], num_keyframe=2)
    (grad,) = torch.autograd.grad(kept, tokens, row[None, :, None])
    expected = row.clone()
    expected[2 + 7] += 2 + 1150
    expected[2 + 1100] += 2 + 1199
    expected[2 + 1150] = expected[2 + 1199] = 0
    assert torch.equal(grad.flatten(), expected)


def test_gather_gradient_of_complex_tokens(backend):
    tokens, index, num_keyframe = make("odd", torch.complex64, repeated=True)
    tokens.requires_grad_()
    kept = gather_tokens(tokens.conj(), index, num_keyframe=num_keyframe)
    assert torch.equal(kept, kept_rows(tokens.conj(), index, num_keyframe))
    (grad,) = torch.autograd.grad((kept * kept.conj()).real.sum(), tokens)
    count = torch.zeros(tokens.shape[:2]).index_put_(
        (torch.arange(2)[:, None], num_keyframe + index), torch.ones(()), True
    )
    count[:, :num_keyframe] = 1
    torch.testing.assert_close(grad, 2 * count[..., None] * tokens.detach())


def test_gather_strides(backend):
    for case in ("odd", "values", "one channel"):
        tokens, index, num_keyframe = make(case)
        want = kept_rows(tokens, index, num_keyframe)
        for name, strided in layouts(tokens):
            assert torch.equal(gather_tokens(strided, index, num_keyframe=num_keyframe), want), name
        for name, strided in layouts(index):
            assert torch.equal(gather_tokens(tokens, strided, num_keyframe=num_keyframe), want), name
        shared = tokens[:1].expand_as(tokens)
        assert torch.equal(gather_tokens(shared, index), kept_rows(shared, index, 0))


def test_gather_registration():
    op = torch.ops.evad_kernels.gather_tokens.default
    for case in ("odd", "values"):
        tokens, index, num_keyframe = make(case)
        assert_registered(op, tokens.clone().requires_grad_(), index, num_keyframe)
    position, index, num_keyframe = make("values", torch.int64)
    assert_registered(torch.ops.evad_kernels.gather_tokens_integers.default, position, index, num_keyframe)


def test_gather_compiles_without_graph_break(backend):
    tokens, index, num_keyframe = make("odd")
    tokens.requires_grad_()
    kept = torch.compile(gather_tokens, fullgraph=True)(tokens, index, num_keyframe=num_keyframe)
    assert torch.equal(kept, kept_rows(tokens, index, num_keyframe))
    (grad,) = torch.autograd.grad(kept.square().sum(), tokens)
    chosen = torch.zeros(tokens.shape[:2], dtype=torch.bool).scatter(1, num_keyframe + index, True)
    chosen[:, :num_keyframe] = True
    torch.testing.assert_close(grad, torch.where(chosen[..., None], 2 * tokens.detach(), 0))


def test_gather_second_backward_raises():
    tokens, index, _ = make("odd")
    tokens.requires_grad_()
    with use_backend("cpu"):
        kept = gather_tokens(tokens, index)
    (grad,) = torch.autograd.grad(kept.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(grad.sum(), tokens)


def test_gather_keeps_autocast_and_inference_mode_out(backend):
    tokens, index, num_keyframe = make("odd")
    with torch.autocast(tokens.device.type, torch.bfloat16), torch.inference_mode():
        kept = gather_tokens(tokens, index, num_keyframe=num_keyframe)
    assert torch.equal(kept, kept_rows(tokens, index, num_keyframe))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0)], ids=str)
def test_gather_edges(backend, shape):
    tokens = torch.ones(shape, requires_grad=True)
    for num_keyframe, num_select in ((shape[1], 0), (0, 0), (0, shape[1])):
        index = torch.arange(num_select).expand(shape[0], num_select)
        kept = gather_tokens(tokens, index, num_keyframe=num_keyframe)
        assert kept.shape == (shape[0], num_keyframe + num_select, *shape[2:])
        (grad,) = torch.autograd.grad(kept.sum(), tokens)
        assert grad.shape == tokens.shape


@pytest.mark.parametrize("bad", [-1, 4, 2**31, -(2**63), 2**63 - 1])
def test_gather_rejects_index_outside(backend, bad):
    if backend in ("triton", "cuda"):  # a GPU cannot say so without a sync: such a row is zeros
        tokens = torch.ones(1, 6, 3, requires_grad=True)
        kept = gather_tokens(tokens, torch.tensor([[0, bad]]), num_keyframe=2)
        assert kept[..., 0].tolist() == [[1, 1, 1, 0]]
        (grad,) = torch.autograd.grad(kept.sum(), tokens)
        assert grad[..., 0].tolist() == [[1, 1, 1, 0, 0, 0]]
        # Beside a token that was kept twice, too: what is outside is no copy of a keyframe's row.
        grads = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0])[None, :, None].expand(1, 7, 3)
        kept = gather_tokens(tokens, torch.tensor([[0, bad, 0, bad, 1]]), num_keyframe=2)
        (grad,) = torch.autograd.grad(kept, tokens, grads)
        assert grad[..., 0].tolist() == [[2, 3, 5 + 11, 17, 0, 0]]
        assert not gather_tokens(torch.ones(1, 2, 3), torch.tensor([[0]]), num_keyframe=2)[:, 2].any()
        return
    with pytest.raises(ValueError, match=r"gather_tokens: index must be in \[0, 4\), got"):
        gather_tokens(torch.ones(1, 6, 3), torch.tensor([[0, bad]]), num_keyframe=2)
    with pytest.raises(ValueError, match=r"gather_tokens: index must be in \[0, 0\), got 0"):
        gather_tokens(torch.ones(1, 2, 3), torch.tensor([[0]]), num_keyframe=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": torch.ones(5)}, ValueError, "tokens must be"),
        ({"tokens": None}, TypeError, "tokens must be a tensor"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, ValueError, "index must be"),
        ({"index": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, "index must be .* with B = 2"),
        ({"index": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "index must be int64"),
        ({"index": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, RuntimeError, "index must be on the device"),
        (
            {"tokens": torch.ones(2, 1).expand(2, 2**31)},
            ValueError,
            r"tokens must be .* N below 2\*\*31, got 2147483648",
        ),
        (
            {"index": torch.zeros(2, 1, dtype=torch.int64).expand(2, 2**31)},
            ValueError,
            r"index must be .* below 2\*\*31",
        ),
        ({"num_keyframe": -1}, ValueError, r"num_keyframe must be in \[0, N = 5\], got -1"),
        ({"num_keyframe": 6}, ValueError, r"num_keyframe must be in \[0, N = 5\], got 6"),
        ({"num_keyframe": 1.0}, TypeError, "num_keyframe must be an integer"),
    ],
)
def test_gather_rejects_bad_input(backend, change, error, message):
    arguments = {"tokens": torch.ones(2, 5, 3), "index": torch.zeros(2, 4, dtype=torch.int64), "num_keyframe": 1}
    arguments.update((name, on_default_device(value)) for name, value in change.items())
    with pytest.raises(error, match=f"gather_tokens: {message}"):
        gather_tokens(**arguments)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_gather_any_shape(data):
    B, N = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 30))
    num_keyframe = data.draw(st.integers(0, N))
    C = data.draw(st.none() | st.integers(0, 40))
    num_select = data.draw(st.integers(0, 12)) if num_keyframe < N else 0
    index = torch.randint(0, max(1, N - num_keyframe), (B, num_select))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]))
    tokens = torch.randn((B, N) if C is None else (B, N, C)).mul(9).to(dtype)
    want = kept_rows(tokens, index, num_keyframe) if num_keyframe + num_select else tokens[:, :0]
    tokens, index = (data.draw(st.sampled_from([x for _, x in layouts(t)])) for t in (tokens, index))
    wrong = index.clone()
    if num_select:
        outside = st.integers(-(2**63), -1) | st.integers(N - num_keyframe, 2**63 - 1)
        wrong[data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, num_select - 1))] = data.draw(outside)
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            assert torch.equal(gather_tokens(tokens, index, num_keyframe=num_keyframe), want), backend
            if num_select:
                with pytest.raises(ValueError, match=r"gather_tokens: index must be in \[0, "):
                    gather_tokens(tokens, wrong, num_keyframe=num_keyframe)
