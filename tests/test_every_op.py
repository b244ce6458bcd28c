"""What every op promises alike: bits that do not depend on threads or on the kind of call, and torch's thread count."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import evad_kernels as ek
from evad_kernels import _backend
from evad_kernels.testing import gradients, on_default_device

GRID, KEPT, C = (8, 14, 14), 539, 96
CELLS = GRID[0] * GRID[1] * GRID[2]


def draw(*shape, seed):
    return on_default_device(torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"))


def positions():
    order = torch.Generator("cpu").manual_seed(0)
    return on_default_device(torch.stack([torch.randperm(CELLS, generator=order, device="cpu")[:KEPT] for _ in "ab"]))


def boxes():
    corners = 150 * draw(2, 30, 2, seed=1).abs()
    return torch.cat([corners, corners + 100 * draw(2, 30, 2, seed=2).abs() + 4], dim=-1)


def attend(op, **options):
    def run(query, key, value):
        return tuple(x for x in op(query, key, value, num_keyframe=98, **options) if x.is_floating_point())

    return run, [draw(2, 3, 784, 32, seed=seed) for seed in range(3)]


def on_tokens(op, *arguments, background="background"):
    def run(tokens, blank):
        return op(tokens, positions(), *arguments, grid=GRID, **{background: blank})

    return run, [draw(2, KEPT, C, seed=0), draw(C, seed=1)]


def pyramid():
    levels = [draw(2, C, 56 >> level, 56 >> level, seed=level) for level in range(4)]
    return lambda *levels: ek.pyramid_roi_align(list(levels), boxes()), levels


def select():
    return lambda importance: ek.select_tokens(importance, 9000), [draw(2, 20000, seed=0)]


def gather():
    index = on_default_device(torch.arange(0, 1372, 2, device="cpu").expand(2, -1))
    return lambda tokens: ek.gather_tokens(tokens, index, num_keyframe=196), [draw(2, CELLS, 4 * C, seed=0)]


# name: () -> (function, its floating inputs), large enough for more than one thread
CALLS = {
    "keyframe_attention": lambda: attend(ek.keyframe_attention),
    "keyframe_attention_topk": lambda: attend(ek.keyframe_attention_topk, num_select=400),
    "select_tokens": select,
    "gather_tokens": gather,
    "scatter_tokens": lambda: on_tokens(ek.scatter_tokens, background="fill"),
    "roi_align_3d": lambda: on_tokens(ek.roi_align_3d, boxes()),
    "roi_pool_3d": lambda: on_tokens(ek.roi_pool_3d, boxes()),
    "pyramid_roi_align": pyramid,
}


def everything(name):
    """Outputs and gradients."""
    run, inputs = CALLS[name]()
    if name == "select_tokens":
        return [run(*inputs)]
    outputs, grads = gradients(run, inputs)
    return [*outputs, *grads]


def equal(actual, expected):
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def test_no_op_is_left_out():
    assert set(CALLS) == set(_backend.IMPLEMENTED) == set(ek.__all__) - {"backends", "use_backend"}


@pytest.mark.parametrize("name", CALLS)
def test_bits_do_not_depend_on_the_number_of_threads(name):
    if _backend.native is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    threads, results = torch.get_num_threads(), []
    try:
        with ek.use_backend("cpu"):
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(everything(name))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(result, results[0]) for result in results[1:])


def heads(number):
    run, _ = attend(ek.keyframe_attention)
    return run, [draw(1, number, 784, 32, seed=seed) for seed in range(3)]


def one_panel_of_one_frame():
    position, corners = torch.arange(49).expand(4, -1), torch.tensor([[[5.0, 7.0, 60.0, 80.0]] * 4] * 4)
    return lambda tokens: ek.roi_align_3d(tokens, position, corners, grid=(1, 7, 7)), [draw(4, 49, 16, seed=0)]


# Fewer tasks than threads; or one, were it not cut by images.
FEW_TASKS = {
    "one head": lambda: heads(1),
    "two heads": lambda: heads(2),
    "one panel of one frame": one_panel_of_one_frame,
}


COUNT_THREADS = """
import json, os, sys, time
import torch
sys.path.insert(0, sys.argv[1])
from test_every_op import CALLS, FEW_TASKS, as_tuple

def count():
    return len(os.listdir("/proc/self/task"))

def steps(name):
    run, inputs = {**CALLS, **FEW_TASKS}[name]()
    yield "forward", lambda: run(*inputs)
    if name != "select_tokens":
        inputs = [x.requires_grad_() for x in inputs]
        outputs = as_tuple(run(*inputs))
        grads = [torch.ones_like(x) for x in outputs]
        yield "backward", lambda: torch.autograd.grad(
            # One head's backward is one task, which wakes no thread: it must not end those of the forward.
            as_tuple(run(*inputs)) if name == "one head" else outputs, inputs, grads, retain_graph=True
        )

torch.set_num_threads(1)
calls = {(name, step): call for name in (*CALLS, *FEW_TASKS) for step, call in steps(name)}
for call in calls.values():
    call()
alone = count()
for (name, step), call in calls.items():
    for threads in (3, 2, 8, 3, 1, 2):
        torch.set_num_threads(threads)
        call()
        if threads > 1:  # the pool ends threads that a team leaves out, unless the team is of one
            for _ in range(100):  # and a thread needs a moment to end
                if count() == alone + threads - 1:
                    break
                time.sleep(0.01)
            print(json.dumps([name, step, threads, count() - alone + 1]))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc to count threads")
def test_takes_as_many_threads_as_torch():
    if _backend.native is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    here = os.path.dirname(__file__)
    environment = {**os.environ, "EVAD_KERNELS_BACKEND": "cpu"}
    command = [sys.executable, "-c", COUNT_THREADS, here]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    counts = [json.loads(line) for line in output.splitlines()]
    assert len(counts) == 5 * (2 * len(CALLS) - 1 + 2 * len(FEW_TASKS))
    assert [count for count in counts if count[2] != count[3]] == []


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(backend, name):
    run, inputs = CALLS[name]()
    expected = as_tuple(run(*inputs))
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        assert equal(as_tuple(run(*inputs)), expected)


@pytest.mark.parametrize("name", CALLS)
def test_inference_mode_changes_nothing(backend, name):
    run, inputs = CALLS[name]()
    outputs = as_tuple(run(*[x.requires_grad_() for x in inputs]))
    with torch.inference_mode():
        assert equal(as_tuple(run(*inputs)), [x.detach() for x in outputs])


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"select_tokens"}))
def test_outputs_may_be_written_to(backend, name):
    run, inputs = CALLS[name]()

    def doubled(*inputs):
        return tuple(output.mul_(2) for output in as_tuple(run(*inputs)))

    def twice(*inputs):
        return tuple(output * 2 for output in as_tuple(run(*inputs)))

    (outputs, grads), (expected, expected_grads) = gradients(doubled, inputs), gradients(twice, inputs)
    assert equal([*outputs, *grads], [*expected, *expected_grads])


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"select_tokens"}))
def test_forward_mode_agrees_with_the_backward(name):
    """A kernel has no tangents, so the automatic choice is the reference: none is lost in silence."""
    run, inputs = CALLS[name]()
    directions = [draw(*x.shape, seed=10 + i) for i, x in enumerate(inputs)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = as_tuple(run(*leaves))
    weights = [draw(*x.shape, seed=20 + i) for i, x in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, weights)
    products = [(grad * direction).double() for grad, direction in zip(grads, directions, strict=True)]
    expected, size = sum(x.sum() for x in products), sum(x.abs().sum() for x in products)

    _, by_function = torch.func.jvp(run, tuple(inputs), tuple(directions))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, direction) for x, direction in zip(inputs, directions, strict=True)]
        by_duals = [forward_ad.unpack_dual(x).tangent for x in as_tuple(run(*duals))]
    for tangents in (as_tuple(by_function), by_duals):
        actual = sum((x * weight).double().sum() for x, weight in zip(tangents, weights, strict=True))
        assert abs(actual - expected) <= 1e-5 * size


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"select_tokens"}))
def test_forward_mode_is_refused_by_a_kernel(name):
    if _backend.native is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    run, inputs = CALLS[name]()
    message = f"{name}: backend must be available, got 'cpu': forward-mode AD is for reference"
    with ek.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        torch.func.jvp(run, tuple(inputs), tuple(inputs))


def test_forward_mode_is_refused_by_a_kernels_backward():
    if _backend.native is None:
        pytest.skip(f"backend cpu: {_backend.MISSING['cpu']}")
    tokens, index = torch.randn(1, 5, 3, device="cpu", requires_grad=True), torch.tensor([[0, 2]], device="cpu")
    with ek.use_backend("cpu"):
        kept = ek.gather_tokens(tokens, index)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD is for reference"):
        torch.autograd.grad(kept, tokens, forward_ad.make_dual(torch.ones_like(kept), torch.ones_like(kept)))


def test_a_jacobian_product_compiles_without_graph_break():
    tokens, index = draw(1, 5, 3, seed=0), on_default_device(torch.tensor([[0, 2]], device="cpu"))

    def tangent(x):
        return torch.func.jvp(lambda x: ek.gather_tokens(x, index), (x,), (x,))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens), ek.gather_tokens(tokens, index))


def numbers(integer, real):
    """name: a call whose every number is made by one of two types, small."""
    grid, wide = tuple(map(integer, (2, 3, 3))), {"output_size": (integer(2), integer(1)), "sampling_ratio": integer(2)}
    query, tokens, places = draw(1, 2, 9, 4, seed=0), draw(1, 6, 4, seed=1), torch.arange(6)[None]
    corners, levels = torch.tensor([[[3.0, 5.0, 30.0, 40.0]]]), [draw(1, 4, 8, 8, seed=2), draw(1, 4, 4, 4, seed=3)]
    attention = {"num_keyframe": integer(3), "keyframe_weight": real(2.5), "scale": real(0.5)}
    roi = {"grid": grid, "spatial_scale": real(0.0625), **wide}
    canonical = {"canonical_size": real(32.0), "canonical_level": integer(3), "strides": (real(4.0), real(8.0))}
    return {
        "keyframe_attention": lambda: ek.keyframe_attention(query, query, query, **attention),
        "keyframe_attention_topk": lambda: ek.keyframe_attention_topk(
            query, query, query, num_select=integer(2), **attention
        ),
        "select_tokens": lambda: ek.select_tokens(tokens[..., 0], integer(2)),
        "gather_tokens": lambda: ek.gather_tokens(tokens, places[:, :2], num_keyframe=integer(1)),
        "scatter_tokens": lambda: ek.scatter_tokens(tokens, places, grid=grid),
        "roi_align_3d": lambda: ek.roi_align_3d(tokens, places, corners, **roi),
        "roi_pool_3d": lambda: ek.roi_pool_3d(tokens, places, corners, **roi),
        "pyramid_roi_align": lambda: ek.pyramid_roi_align(levels, corners, **wide, **canonical),
    }


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_numpy_are_numbers(backend, name):
    actual, expected = (numbers(*types)[name]() for types in ((np.int64, np.float32), (int, float)))
    assert equal(as_tuple(actual), as_tuple(expected))


@pytest.mark.parametrize(
    ("name", "integer", "real", "message"),
    [
        ("keyframe_attention", bool, float, r"num_keyframe must be an integer in \[0, N = 9\], got bool"),
        ("keyframe_attention", int, np.array, "keyframe_weight must be a number, got ndarray"),
        ("select_tokens", torch.tensor, float, r"num_select must be an integer in \[0, M = 6\], got Tensor"),
        ("scatter_tokens", bool, float, r"grid must be three integers \(T, Gh, Gw\), got \(True, True, True\)"),
        ("roi_align_3d", int, torch.tensor, "spatial_scale must be a number, got Tensor"),
        ("pyramid_roi_align", int, np.array, "strides must be a number, got ndarray"),
    ],
)
def test_rejects_what_is_no_number(name, integer, real, message):
    with pytest.raises((TypeError, ValueError), match=f"{name}: {message}"):
        numbers(integer, real)[name]()
