"""Streams: of a file nothing is lost, of a live source nothing late, memory is bounded, Ctrl-C leaves whole files."""

import gc
import http.server
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from evad import EVAD, EVADConfig, compiled
from evad.cli import main
from evad.detector import Scored
from evad.stream import ClipReader, LiveReader, Runner
from evad.video import Clip, ClipSampler, LiveVideo, Video, VideoError, is_live, normalize, read_clip, resize

BIKES = Path(__file__).parent / "media" / "bikes.mp4"
TINY = ["--model", "tiny", "--size", "48", "--device", "cpu", "--no-video"]
TICK = 0.04  # seconds, a frame of the streams here
SLOW = 0.3  # seconds that a slow model takes


def transport_stream(seconds):
    """MPEG-TS packets by frame: what cameras send."""
    import io

    sink, parts = io.BytesIO(), []
    with av.open(sink, "w", format="mpegts") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 5
        for number in range(round(25 * seconds)):
            picture = np.full((64, 96, 3), number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            parts.append(sink.getvalue())
            sink.seek(0), sink.truncate()
        container.mux(stream.encode(None))
    return [*parts, sink.getvalue()]


@pytest.fixture
def slow_model(monkeypatch):
    forward = EVAD.forward

    def slow(self, *arguments):
        time.sleep(SLOW)
        return forward(self, *arguments)

    monkeypatch.setattr(EVAD, "forward", slow)


@pytest.fixture
def server():
    """Serves /live.ts frame by frame, as fast as time goes by."""
    parts = transport_stream(4)

    class Live(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "video/mp2t")
            self.end_headers()
            begin = time.perf_counter()
            for number, part in enumerate(parts):
                time.sleep(max(0.0, begin + number * TICK - time.perf_counter()))
                try:
                    self.wfile.write(part)
                    self.wfile.flush()
                except OSError:
                    return

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Live) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/live.ts"
        server.shutdown()


def feed(path, data):
    def write():
        with open(path, "wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


class FakeVideo:
    """Frames of an object each, of which it knows how many are alive."""

    live = True

    def __init__(self, number, tick=0.0, fail_at=None):
        self.number, self.tick, self.fail_at = number, tick, fail_at
        self.came, self.alive = [], weakref.WeakSet()

    def frames(self, start=0.0):
        for number in range(self.number):
            time.sleep(self.tick)
            if number == self.fail_at:
                raise VideoError("torn")
            frame = FakeFrame(number * TICK)
            self.came.append(time.perf_counter())
            self.alive.add(frame)
            yield frame


class FakeFrame:
    def __init__(self, time):
        self.time = time


def sampler(every=0.2, **span):
    return ClipSampler(every, num_frames=4, stride=2, fps=25.0, prepare=lambda frame: frame, **span)


# In order


def test_reader_gives_what_sampling_in_turn_gives():
    video, again = FakeVideo(40), sampler()
    steps = ClipReader(video, sampler(), ahead=4)
    got = [(step.frame and step.frame.time, [clip.time for clip in step.clips], step.next_time) for step in steps]
    want = []
    for frame in FakeVideo(40).frames():
        want.append((frame.time, [clip.time for clip in again.push(frame)], again.next_time))
    want.append((None, [clip.time for clip in again.finish()], again.next_time))
    assert got == want
    steps.close()


def test_reader_runs_ahead_by_no_more_than_asked():
    video = FakeVideo(1000)
    steps = ClipReader(video, sampler(), ahead=4)
    iterator = iter(steps)
    for _ in range(100):
        next(iterator)
        assert len(video.alive) < 4 + 20  # the queue, and the frames of clips that are open
    time.sleep(0.2)
    assert len(video.alive) < 4 + 20
    steps.close()
    assert not steps._thread.is_alive()


@pytest.mark.parametrize("kind", [ClipReader, LiveReader])
def test_readers_raise_what_their_thread_raised(kind):
    reader = kind(FakeVideo(10, fail_at=7), sampler())
    with pytest.raises(VideoError, match="torn"):
        list(reader) if kind is ClipReader else [reader.take(0.1) for _ in range(20)]
    reader.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("annotate", [False, True])
def test_frames_that_wait_for_a_batch_are_few(tmp_path, monkeypatch, annotate, late):
    """Whatever the batch, and where results come one batch late as on a GPU; with the results of single clips."""
    from evad import video
    from evad.cli import detect

    alive, most, batches = set(), [], []

    class Counted(video.Frame):
        def __init__(self, *words):
            super().__init__(*words)
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    submit, flying = Runner.submit, []

    def counted(runner, clips, threshold):
        batches.append(len(clips))
        results = submit(runner, clips, threshold)
        if late:
            flying.append(results)
            results = flying.pop(0) if len(flying) > 1 else []
        return results

    documents = []
    for batch, held in ((1, 250), (8, 60)):
        if batch > 1:
            monkeypatch.setattr(video, "Frame", Counted)
            monkeypatch.setattr(detect, "ClipReader", lambda *words: ClipReader(*words[:4], 4))
            monkeypatch.setattr(detect, "HELD_BYTES", held * 640 * 272 * 3 // 2)
            monkeypatch.setattr(Runner, "submit", counted)
            monkeypatch.setattr(Runner, "finish", lambda runner: flying.pop(0) if flying else [])
        words = ["detect", str(BIKES), "--out", str(tmp_path), *TINY[: -1 if annotate else None], "--batch", str(batch)]
        assert main(words) == 0
        documents.append(json.loads((tmp_path / "bikes.detections.json").read_text()))
    alone, together = documents
    assert together["frames"] == alone["frames"] == 250
    assert [found["time"] for found in together["keyframes"]] == [found["time"] for found in alone["keyframes"]]
    assert sum(batches) == 10 and (max(batches) < 8 if annotate else batches == [8, 2])
    # Those that wait, the queue's, one in each hand; a keyframe's wait until its clip is complete.
    assert max(most) < (60 if annotate else 0) + 4 + 8
    if annotate:
        with Video(tmp_path / "bikes.annotated.mp4") as written:
            assert sum(1 for _ in written.frames()) == 250


# Live


def test_newest_clip_wins_and_the_dropped_are_counted():
    video = FakeVideo(250, TICK / 10)
    reader, taken = LiveReader(video, sampler(), frames=10), []
    most = 0
    while not reader.ended:
        complete = reader.clips
        newest = reader.take(0.1)
        if newest is not None:
            taken.append(newest[0].time)
            assert newest[0].time >= (complete - 1) * 0.2 - 1e-6  # none newer was there
            time.sleep(0.1)
            del newest
        most = max(most, len(video.alive))
        if len(taken) % 3 == 0:
            assert len(reader.take_frames()) <= 10
    last = reader.take(0)
    assert reader.came == 250 and reader.clips == 50 == len(taken) + (last is not None) + reader.dropped_clips
    assert reader.dropped_clips > 10 and reader.dropped_frames > 10 and taken == sorted(taken)
    assert most < 60  # of 250: 10 held, a clip taken, one waiting, those open
    reader.close()
    del reader, last
    gc.collect()


def test_frames_after_the_end_complete_clips_and_do_not_count():
    reader = LiveReader(FakeVideo(60), sampler(last=1.0), 1.0, frames=100)
    reader._thread.join()
    frames = reader.take_frames()
    assert (len(frames), reader.came, reader.dropped_frames) == (26, 26, 0) and frames[-1].time == 1.0
    assert reader.clips == 6


@pytest.mark.parametrize("every", [0.04, 0.2, 1.0])
def test_age_counts_from_when_the_keyframe_came(every):
    """Not from when its clip was complete, two frames and more after it."""
    video = FakeVideo(60, TICK / 4)
    reader, ages = LiveReader(video, sampler(every)), []
    while not reader.ended:
        if (newest := reader.take(0.1)) is not None:
            clip, seen = newest
            frame = round(clip.time / TICK)
            assert video.came[frame] <= seen <= [*video.came, time.perf_counter()][frame + 1]
            ages.append(time.perf_counter() - seen)
            assert len(reader._clock) <= 10  # however long the next keyframe is away
    assert len(ages) >= 2 and min(ages[:-1]) >= 2 * TICK / 4  # the last ones were complete when the source ended
    reader.close()


def test_pipe_of_a_fast_writer(tmp_path, capfd, slow_model):
    pipe = tmp_path / "door.ts"
    os.mkfifo(pipe)
    data = b"".join(transport_stream(20))
    writer = feed(pipe, data)
    assert main(["detect", str(pipe), "--out", str(tmp_path), *TINY, "--every", "0.5"]) == 0
    writer.join(5)
    document = json.loads((tmp_path / "door.detections.json").read_text())
    times = [keyframe["time"] for keyframe in document["keyframes"]]
    assert document["dropped_keyframes"] > 0
    assert len(times) + document["dropped_keyframes"] == 40
    assert (document["frames"], document["dropped_frames"]) == (500, 0)
    assert times == sorted(times) and times[-1] == 19.5
    assert "dropped to stay up to date" in capfd.readouterr().err


def test_every_keyframe_of_a_pipe(tmp_path, slow_model):
    pipe = tmp_path / "door.ts"
    os.mkfifo(pipe)
    writer = feed(pipe, b"".join(transport_stream(3)))
    assert main(["detect", str(pipe), "--out", str(tmp_path), *TINY, "--no-live", "--batch", "2"]) == 0
    writer.join(5)
    document = json.loads((tmp_path / "door.detections.json").read_text())
    assert [keyframe["time"] for keyframe in document["keyframes"]] == [0, 1, 2]
    assert "dropped_keyframes" not in document


def test_latency_of_an_address_stays_bounded(tmp_path, server, slow_model):
    assert main(["detect", server, "--out", str(tmp_path), *TINY, "--every", "0.12"]) == 0
    document = json.loads((tmp_path / "live.detections.json").read_text())
    latencies = [keyframe["latency_seconds"] for keyframe in document["keyframes"]]
    runs = [keyframe["model_seconds"] for keyframe in document["keyframes"]]
    assert len(latencies) >= 3 and document["dropped_keyframes"] > 0
    # A clip lasts beyond its keyframe; complete while another runs, it waits for that and runs itself: the same at the
    # end as at the beginning. The first frames come at once, after the last ones nobody waits.
    tail = ClipSampler(1.0).tail
    assert tail < statistics.median(latencies[1:-1]) < tail + 2 * statistics.median(runs) + 0.5, (latencies, runs)
    assert document["video"]["path"] == server


def test_interrupted_live_source_leaves_whole_files(tmp_path):
    parts = transport_stream(6)
    command = [sys.executable, "-m", "evad", "detect", "-", "--out", str(tmp_path), *TINY[:-1]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=False)
    process.stdin.write(b"".join(parts[: len(parts) * 2 // 3]))  # and then says nothing
    process.stdin.flush()
    written = tmp_path / "stdin.detections.json"
    deadline = time.monotonic() + 90
    while not (written.exists() and b'"time"' in written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    document = json.loads(written.read_text())
    assert document["interrupted"] and document["keyframes"]
    with Video(tmp_path / "stdin.annotated.mp4") as video:
        assert len(list(video.frames())) == document["frames"] > 0


def test_what_is_live(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file.mp4").touch()
    assert all(map(is_live, ["-", "rtsp://door/1", "http://host/live.m3u8", "0", str(tmp_path / "pipe"), "/dev/null"]))
    assert not any(map(is_live, [str(tmp_path / "file.mp4"), "missing.mp4", str(tmp_path)]))
    with pytest.raises(VideoError, match="not a video that can be read"):
        LiveVideo("http://127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-", str(BIKES)], "-: a live source is looked at alone"),
        (["http://127.0.0.1:1/x"], "http://127.0.0.1:1/x: not a video"),
        ([str(BIKES), "--batch", "0"], "--batch: must be a whole number at least 1"),
    ],
)
def test_rejects_bad_sources(tmp_path, capfd, arguments, message):
    try:
        status = main(["detect", *arguments, "--out", str(tmp_path), *TINY])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and message in capfd.readouterr().err


def test_start_of_a_live_source(tmp_path, capfd, server):
    assert main(["detect", server, "--start", "1", "--out", str(tmp_path), *TINY]) == 2
    assert "is live, it begins now" in capfd.readouterr().err


# Batches


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_runner_gives_the_models_detections(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = EVAD(EVADConfig.tiny()).eval().to(device)
    with Video(BIKES) as video:
        clips = [read_clip(video, at, prepare=lambda frame: resize(frame.rgb(), 48)) for at in (1.0, 2.0, 3.0)]
    runner, results = Runner(model, 2), []
    for batch in (clips[:2], clips[2:], clips[:1]):
        results += runner.submit(batch, 0.0)
    results += runner.finish()
    assert [clip for clip, _ in results] == [*clips, clips[0]] and runner.finish() == []
    for clip, found in results:
        expected = model.detect([normalize(clip.samples).to(device)], 0.0)[0]
        assert found.size == (48, 113) and len(found.tokens) == len(model.config.pruning_blocks)
        for actual, want in zip(found.detections, expected, strict=True):
            torch.testing.assert_close(actual, want.cpu(), atol=1e-3, rtol=1e-4)


class FakeDetector:
    """Scores that tell the clip: its first pixel."""

    def __init__(self, log):
        self.log = log

    def run(self, clips):
        self.log.append(("run", clips[:, 0, 0, 0, 0].tolist()))
        first = clips[:, 0, 0, 0, 0].float()
        scored = Scored(first.view(-1, 1, 1).expand(-1, 2, 4), torch.ones(len(clips), 2), torch.zeros(len(clips), 2, 3))
        return SimpleNamespace(kept=(torch.zeros(len(clips), 7),)), scored


def test_batches_overlap_on_a_gpu(monkeypatch):
    """With a stand-in for CUDA: a batch is sent before the last one is waited for, in memory that is not in use."""
    log, empty = [], torch.empty
    names = itertools.cycle(["copied", "free"])  # of a batch's memory, in the order in which they are made

    def event():
        name = next(names)
        return SimpleNamespace(name=name, record=lambda stream: None, synchronize=lambda: log.append(("wait",)))

    stream = SimpleNamespace(wait_event=lambda event: log.append((event.name,)))
    fakes = {
        "Stream": lambda device: stream,
        "Event": event,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: stream,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: empty(*shape, **how))
    monkeypatch.setattr(compiled, "replays", lambda device: True)
    monkeypatch.setattr(EVAD, "compiled", lambda *_: FakeDetector(log))
    runner = Runner(EVAD(EVADConfig.tiny()), 2)
    clips = [Clip(float(n), [torch.full((3, 4, 5), n, dtype=torch.uint8)] * 16) for n in range(1, 8)]
    results = []
    for batch in (clips[:2], clips[2:4], clips[4:6], clips[6:]):
        results.append(runner.submit(batch, 0.5))
    results.append(runner.finish())
    assert [[clip.time for clip, _ in ready] for ready in results] == [[], [1, 2], [3, 4], [5, 6], [7]]
    for clip, found in (pair for ready in results for pair in ready):
        assert found.tokens == [7] and found.size == (4, 5) and found.detections.boxes.eq(clip.time).all()
    runs = [entry[1] for entry in log if entry[0] == "run"]
    assert runs == [[1, 2], [3, 4], [5, 6], [7]]
    order = [entry[0] for entry in log]
    assert order == ["free", "copied", "run", *["free", "copied", "run", "wait"] * 3, "wait"]


def test_batches_write_what_single_clips_write(tmp_path):
    for number in (1, 3):
        arguments = ["--out", str(tmp_path / str(number)), *TINY[:-1], "--end", "4", "--batch", str(number)]
        assert main(["detect", str(BIKES), *arguments]) == 0
    one, three = (
        np.loadtxt(tmp_path / name / "bikes.detections.csv", delimiter=",", usecols=range(1, 8)) for name in "13"
    )
    np.testing.assert_allclose(one, three, atol=2e-3)
    with Video(tmp_path / "1" / "bikes.annotated.mp4") as a, Video(tmp_path / "3" / "bikes.annotated.mp4") as b:
        for left, right in zip(a.frames(), b.frames(), strict=True):
            assert left.time == right.time
            assert np.abs(left.rgb().astype(int) - right.rgb()).mean() < 1
