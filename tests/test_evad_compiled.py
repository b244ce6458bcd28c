"""``EVAD.compiled``: the eager model's bits from a detector of one shape; on a GPU from a CUDA graph."""

import contextlib
import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from evad import EVAD, EVADConfig, compiled
from evad_kernels import use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


def micro(rate=0.7, **fields):
    torch.manual_seed(0)
    small = {"num_frames": 8, "depth": 4, "pruning_blocks": (1, 2), "pyramid_blocks": (0, 1, 2, 3), "num_stages": 2}
    return EVAD(EVADConfig.tiny(rate, **{**small, "decoder_depth": 2, "num_proposals": 5, **fields})).eval().to(DEVICE)


def draw(number, height=72, width=96, seed=1):
    return torch.randn(number, 3, 8, height, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_same_bits(actual, expected):
    assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("fields", [{}, {"token_order": "importance"}, {"blank": "zeros"}])
@pytest.mark.parametrize("rate", [0.6, 1.0])
def test_gives_the_models_bits(rate, fields):
    model = micro(rate, **fields)
    detector = model.compiled((3, 8, 70, 101), 2)  # padded inside
    for seed in range(3):
        clips = draw(2, 70, 101, seed)
        with torch.no_grad():
            assert_same_bits(detector(clips), model(clips))
        assert_same_bits(detector(list(clips)), detector(clips))
        for actual, expected in zip(detector.detect(clips, 0.4), model.detect(clips, 0.4), strict=True):
            assert_same_bits(actual, expected)


def test_shapes_side_by_side():
    model = micro()
    shapes = [(72, 96), (96, 96), (48, 120)]
    detectors = [model.compiled((3, 8, *shape), 2) for shape in shapes]
    results = []
    for seed in range(3):  # results stay whole while other shapes run
        for shape, detector in zip(shapes, detectors, strict=True):
            results.append((detector(draw(2, *shape, seed)), draw(2, *shape, seed)))
    with torch.no_grad():
        for actual, clips in results:
            assert_same_bits(actual, model(clips))


@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_fewer_clips_are_the_first_of_a_whole_batch(engine):
    model = micro()
    clips = draw(3)
    detector = model.compiled(clips.shape[1:], 3, engine=engine)
    whole = detector(clips)
    for number in (1, 2):
        part = detector(clips[:number])
        assert part.kept[0].shape[0] == number and len(detector.detect(clips[:number])) == number
        assert torch.equal(part.kept[-1], whole.kept[-1][:number])
        tolerance = {"atol": 0, "rtol": 0} if DEVICE == "cuda" or engine != "eager" else {"atol": 1e-4, "rtol": 1e-4}
        assert_close(part.action_logits, whole.action_logits[:number], **tolerance)


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_engines_of_torch_compile(engine):
    model = micro()
    clips = draw(2)
    detector = model.compiled(clips.shape[1:], 2, engine=engine)
    with torch.no_grad():
        assert_close(detector(clips), model(clips), atol=2e-4, rtol=1e-4)
    for actual, expected in zip(detector.detect(clips, 0.0), model.detect(clips, 0.0), strict=True):
        assert_close(actual, expected, atol=5e-3, rtol=0)


def test_pixels_are_normalised_on_the_device():
    pytest.importorskip("av", reason="PyAV is not installed")
    from evad.video import normalize

    model = micro()
    pixels = torch.randint(0, 256, (8, 3, 72, 96), dtype=torch.uint8)
    clip = normalize(list(pixels), model.config.pixel_mean, model.config.pixel_std).to(DEVICE)
    detector = model.compiled(clip.shape, dtype=torch.uint8)
    with torch.no_grad():
        tolerance = {"atol": 0, "rtol": 0} if DEVICE == "cpu" else {"atol": 1e-4, "rtol": 1e-4}
        assert_close(detector(pixels.transpose(0, 1)[None]), model(clip[None]), **tolerance)


def test_keeps_its_rate_and_follows_the_weights():
    model, clips = micro(), draw(1)
    detector = model.compiled(clips.shape[1:])
    before = detector(clips)
    model.set_keep_rate(0.5)
    model.train()
    assert_same_bits(detector(clips), before)
    assert [kept.shape[1] for kept in before.kept] != [kept.shape[1] for kept in model(clips).kept]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
        model.eval().set_keep_rate(0.7)
        assert_same_bits(detector(clips), model(clips))
    model.double()  # takes other memory: the detector keeps the old
    assert detector(clips).action_logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((3, 16, 72, 96),), ValueError, "must have 8 frames, got 16"),
        (((8, 72, 96),), ValueError, r"must be \[3, T, H, W\]"),
        (((3, 8, 72, 96), 0), ValueError, "batch must be an integer of at least 1, got 0"),
        (((3, 8, 72, 96), 1, torch.int64), TypeError, "dtype must be floating point or torch.uint8"),
    ],
)
def test_rejects_bad_shapes(arguments, error, message):
    with pytest.raises(error, match=f"EVAD: .*{message}"):
        micro().compiled(*arguments)


@pytest.mark.parametrize(
    ("clips", "error", "message"),
    [
        (torch.zeros(3, 3, 8, 72, 96), ValueError, "clips must be 1 to 2, as compiled, got 3"),
        ([], ValueError, "clips must be 1 to 2, as compiled, got 0"),
        (torch.zeros(1, 3, 8, 72, 97), ValueError, r"a clip must be \[3, 8, 72, 96\], as compiled"),
        (torch.zeros(1, 3, 8, 72, 96, dtype=torch.uint8), TypeError, "a clip must be torch.float32, as compiled"),
    ],
)
def test_rejects_other_clips(clips, error, message):
    with pytest.raises(error, match=f"EVAD: .*{message}"):
        micro().compiled((3, 8, 72, 96), 2)(clips)


def test_threads():
    model = micro()
    shapes = [(72, 96), (96, 96)]
    detectors = [model.compiled((3, 8, *shape), 1) for shape in shapes]
    with torch.no_grad():
        expected = {(i, seed): model(draw(1, *shapes[i], seed)) for i in (0, 1) for seed in range(4)}
    if DEVICE == "cuda":
        torch.cuda.synchronize()  # streams of the threads wait for nothing
    failures = []

    def work(seed):
        stream = torch.cuda.stream(torch.cuda.Stream()) if DEVICE == "cuda" else contextlib.nullcontext()
        with stream:
            for i in (0, 1, 0, 1):
                actual = detectors[i](draw(1, *shapes[i], seed))
                if DEVICE == "cuda":
                    torch.cuda.current_stream().synchronize()
                if not torch.equal(actual.action_logits, expected[i, seed].action_logits):
                    failures.append((i, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


@on_gpu
def test_graphs_share_memory():
    model = micro()
    big = model.compiled((3, 8, 192, 192), 8)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    small = [model.compiled((3, 8, 192, side), 8) for side in (168, 144, 120)]
    torch.cuda.synchronize()
    inputs = sum(8 * 3 * 8 * 192 * side * 4 for side in (168, 144, 120))
    assert torch.cuda.memory_reserved() - before <= inputs + 32 * 2**20
    assert len({id(detector._graph.pool) for detector in (big, *small)}) == 1


@on_gpu
def test_outlives_the_workspaces_of_cublas():
    """torch.compile frees them all when it captures its own graphs."""
    model, clips = micro(), draw(2)
    detector = model.compiled(clips.shape[1:], 2)
    before = detector(clips)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    taken = [torch.full((2**20,), float("nan"), device=DEVICE) for _ in range(64)]  # what was freed, if anything was
    assert_same_bits(detector(clips), before)
    assert all(x.isnan().all() for x in taken)


@on_gpu
def test_compiles_again_when_every_detector_before_is_gone():
    model, clips = micro(), draw(2)
    results = []
    for _ in range(2):
        detector = model.compiled(clips.shape[1:], 2)
        results.append(detector(clips))
        del detector
        gc.collect()
        torch.cuda.empty_cache()
    assert_same_bits(*results)


class Graph:
    """A CUDA graph's stand-in: a replay computes again."""

    function = clips = results = None

    def replay(self):
        for old, new in zip(leaves(self.results), leaves(self.function(self.clips)), strict=True):
            old.copy_(new)


def leaves(results):
    output, scored = results
    return [*output[:3], *output.kept, *scored]


@use_backend("auto")  # on the CPU, whatever backend the other tests are asked to run on
def test_every_replay_follows_the_last_and_gives_copies(monkeypatch):
    """The steps around a capture and a replay, with a stand-in for CUDA: order, streams, one lock, copies."""
    steps = []

    def note(name):
        return lambda *arguments, **_: steps.append(name)

    stream = SimpleNamespace(wait_event=note("wait for free"))
    event = SimpleNamespace(record=note("free"))
    captured_on = []  # only captures run there, so what a library keeps for a stream lies in the pool

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert pool == "pool" and capture_error_mode == "thread_local"
        captured_on.append(stream)
        steps.append("capture")
        yield
        steps.append("captured")

    fakes = {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device: "captures",
        "Event": lambda: event,
        "CUDAGraph": Graph,
        "graph": capture,
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda: stream,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(compiled, "replays", lambda device: True)
    monkeypatch.setattr(compiled._Pool, "_pools", {})
    model = micro().cpu()
    clips = draw(3).cpu()
    detector = model.compiled(clips.shape[1:], 3)
    assert steps == ["capture", "captured"] * 2 and captured_on == ["captures"] * 2  # the pool's anchor, the detector
    graph = detector._graph
    graph.graph.function, graph.graph.clips, graph.graph.results = detector._run, graph.clips, graph.results
    steps.clear()
    first = detector(clips)
    assert steps == ["wait for free", "free"]
    second = detector(clips.flip(0)[:2])
    with torch.no_grad():
        assert_same_bits(first, model(clips))
        expected = model(torch.cat([clips.flip(0)[:2], clips[2:]]))  # the rest of the batch is what lay there
    assert_same_bits(second.action_logits, expected.action_logits[:2])
    with torch.inference_mode():
        other = model.compiled((3, 8, 96, 96))
    assert other._graph.pool is graph.pool
    assert not other._graph.clips.is_inference()  # calls may come from outside
