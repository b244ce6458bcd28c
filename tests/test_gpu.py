"""What only a GPU can show of its backends: that they pass their trial; selection in many random cases; the same bits
in every run, on any stream and in a graph's replay, whatever the form of boxes and fill (none waits for the host);
boxes of any kind on any grid; memory that grows with the number of tokens.
"""

import gpu_cases
import pytest
import torch

from evad_kernels import _backend, _trial, keyframe_attention, keyframe_attention_topk, select_tokens, use_backend
from evad_kernels.testing import assert_accurate, gradients
from evad_kernels.token_selection import select_tokens_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    """Runs a test on a backend of the GPU."""
    of_test = "keyframe_attention_topk" if "attention" in request.node.name else "select_tokens"
    parameters = request.node.callspec.params
    op = gpu_cases.op_of(parameters.get("name", parameters.get("op", of_test)))
    if (reason := _backend.unavailable(op, request.param)) is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


every_op = pytest.mark.parametrize("op", _backend.IMPLEMENTED)
every_case = pytest.mark.parametrize("name", gpu_cases.cases(B=1, N=112))


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernels_pass_their_trial(kernels, op, dtype):
    assert _trial.failure(op, torch.device("cuda", 0), dtype) is None


@every_case
def test_same_bits_in_100_runs(kernels, name):
    case = gpu_cases.cases()[name]
    tensors = gpu_cases.on("cuda", case)
    first = gpu_cases.step(case, tensors)
    for run in range(99):
        assert same(gpu_cases.step(case, tensors), first), run


@every_case
def test_second_stream(kernels, name):
    case = gpu_cases.cases()[name]
    tensors = gpu_cases.on("cuda", case)
    want = gpu_cases.step(case, tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # kernels of another stream would overtake what follows
        late = [(x.detach() * 1).requires_grad_(x.requires_grad) for x in tensors]
        got = gpu_cases.step(case, late)
    stream.synchronize()
    assert same(got, want)


@every_case
def test_graph_replay(kernels, name):
    case, other = gpu_cases.cases(seed=0)[name], gpu_cases.cases(seed=1)[name]
    tensors = gpu_cases.on("cuda", case)
    grads = gpu_cases.grad_outputs(case.run(*tensors))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gpu_cases.step(case, tensors, grads)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gpu_cases.step(case, tensors, grads)
    for values in (other, case):
        with torch.no_grad():
            for tensor, value in zip(tensors, values.tensors, strict=True):
                tensor.copy_(value)
        graph.replay()
        assert same(captured, gpu_cases.step(case, tensors, grads))


def assert_equal_to_reference(case, tolerance, results=None):
    """Outputs and gradients, the first ``results`` of them."""
    tensors = gpu_cases.on("cuda", case)
    got = gpu_cases.step(case, tensors)
    with use_backend("reference"):
        want = gpu_cases.step(case, tensors)
    for a, b in zip(got[:results], want[:results], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", gpu_cases.hostile(torch.float32))
def test_hostile_inputs_give_what_the_reference_gives(kernels, name):
    assert_equal_to_reference(gpu_cases.hostile(torch.float32)[name], 1e-5)


@pytest.mark.parametrize("name", gpu_cases.forms(torch.float32))
def test_forms_give_what_the_reference_gives(kernels, name):
    results = 1 if name in gpu_cases.NEARLY_EQUAL_BINS else None
    assert_equal_to_reference(gpu_cases.forms(torch.float32)[name], 1e-4, results)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("op", gpu_cases.BOXES)
def test_any_boxes_on_any_grid(kernels, op, seed):
    assert_equal_to_reference(gpu_cases.chance(op, seed), 2e-4)


@pytest.mark.parametrize(("N", "runs"), [(1568, 334), (2592, 333), (4608, 333)])
def test_attention_selects_exactly(kernels, N, runs):
    """No token is kept in the place of one that float64 finds more important by 1e-6 or more."""
    num_keyframe, num_select = N // 8, int(0.7 * N) - N // 8
    dtypes, spreads = (torch.bfloat16, torch.float16, torch.float32), (1.0, 0.01, 4.0, 0.1)  # 0.01: flat attention
    weight = torch.ones(N, dtype=torch.float64, device="cuda")
    weight[:num_keyframe] = 4.0
    wrong = []
    for run in range(runs):
        dtype, spread = dtypes[run % 3], spreads[run // 3 % 4]
        generator = torch.Generator("cuda").manual_seed(run)
        query, key, value = torch.randn(3, 1, 4, N, 64, generator=generator, device="cuda").to(dtype)
        query = query * spread
        got = keyframe_attention_topk(
            query, key, value, num_keyframe=num_keyframe, num_select=num_select, keyframe_weight=4.0
        )
        truth = torch.zeros(N, dtype=torch.float64, device="cuda")
        for q, k in zip(query[0].double(), key[0].double(), strict=True):
            truth += weight @ (q @ k.T / 8).softmax(1)
        truth = truth[num_keyframe:]
        kept = torch.zeros_like(truth, dtype=torch.bool).index_fill(0, got.index[0], True)
        wrong.append(torch.stack([truth[~kept].max() / truth[kept].min(), (kept.sum() != num_select).double()]))
    excess, miscounted = torch.stack(wrong).max(0).values.tolist()
    assert excess <= 1 + 1e-6 and not miscounted, (excess, miscounted)


def test_attention_of_16384_tokens(kernels, N=16384, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, 1, N, 64, generator=generator).to(device, torch.bfloat16)

    def run(*qkv):
        return keyframe_attention(*qkv, num_keyframe=N // 8, keyframe_weight=4.0)

    outputs, grads = gradients(run, qkv, rounding=torch.bfloat16)
    with use_backend("reference"):
        references, reference_grads = gradients(run, qkv, rounding=torch.bfloat16)
        truths, true_grads = gradients(run, qkv.double(), rounding=torch.bfloat16)
    results = zip((*outputs, *grads), (*references, *reference_grads), (*truths, *true_grads), strict=True)
    for label, three in zip(("output", "importance", "query", "key", "value"), results, strict=True):
        assert_accurate(*three, label=label)


@pytest.mark.parametrize("N", [1568, 2592, 4608])
def test_select_in_1000_random_cases(kernels, N):
    for run in range(1000):
        generator = torch.Generator("cuda").manual_seed(run)
        importance = torch.randn(2, N, generator=generator, device="cuda")
        if run % 3 == 1:
            importance = importance.round()  # ties
        elif run % 3 == 2:
            importance = 1 + importance * 1e-6  # flat
        num_select = (run * 7919) % (N + 1)
        assert torch.equal(select_tokens(importance, num_select), select_tokens_reference(importance, num_select)), run


def extra(case, tensors):
    """Bytes at the peak of a step beside inputs, outputs and gradients."""
    torch.cuda.empty_cache()  # what earlier tests left is handed out whole where less than 1 MB would remain of it
    result = gpu_cases.step(case, tensors)
    del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = gpu_cases.step(case, tensors)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(x.numel() * x.element_size() for x in result)


@every_op
def test_extra_memory_is_linear(kernels, op):
    used = []
    for N in (2240, 4480):
        case = gpu_cases.cases(B=1, N=N)[op]
        used.append(extra(case, gpu_cases.on("cuda", case)))
    assert used[1] <= 2.2 * used[0] + 2**20, used


def test_attention_forward_of_4480_tokens_needs_2_per_cent_of_the_map(kernels, B=8, N=4480):
    case = gpu_cases.cases(B=B, N=N)["keyframe_attention_topk"]
    with torch.no_grad():
        used = extra(case, [x.cuda() for x in case.tensors])
    assert used <= 0.02 * (B * 12 * N**2 * 2), used
