"""evad.video: decoding by time, clips around keyframes, what the model sees, writing."""

import gc
import itertools
import json
import resource
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from evad.cli import main
from evad.video import Clip, ClipSampler, Frame, Video, VideoError, VideoWriter, normalize, read_clip, resize, resized

HERE = Path(__file__).parent
BIKES = HERE / "media" / "bikes.mp4"


def numbered(number, height=48, width=64):
    """A frame whose brightness tells its number, up to 16 (15 apart: codecs are not exact)."""
    return np.full((height, width, 3), 15 * number % 255, np.uint8)


def write_video(
    path, times, *, height=48, width=64, images=None, codec="mpeg4", prepare=lambda stream: None, **options
):
    """A video whose i-th frame is shown from ``times[i]`` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "10", **options})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 3000)
        prepare(stream)
        for index, time in enumerate(times):
            image = numbered(index, height, width) if images is None else images[index]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 3000), Fraction(1, 3000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def times_of(video, start=0.0):
    return [round(frame.time, 3) for frame in video.frames(start)]


# Decoding


def test_reads_what_the_file_says():
    with Video(BIKES) as video:
        assert (video.width, video.height, video.fps, video.rotation) == (640, 272, 25.0, 0)
        assert video.duration == pytest.approx(10.0)
        times = times_of(video)
        assert times == [round(i / 25, 3) for i in range(250)]
        assert video.skipped == 0


@pytest.mark.parametrize("start", [0.02, 0.04, 3.99, 7.5, 9.96, 50.0])
def test_seeks_to_the_frame_shown(start):
    with Video(BIKES) as video:
        expected = [t for t in times_of(video) if t <= start + 1e-6][-1:] + [t for t in times_of(video) if t > start]
        assert times_of(video, start) == expected
        frame = next(video.frames(start)).rgb()
        sequential = next(f for f in video.frames() if round(f.time, 3) == expected[0]).rgb()
        np.testing.assert_array_equal(frame, sequential)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_containers(tmp_path, suffix):
    codec = "mpeg2video" if suffix == ".ts" else "mpeg4"
    path = tmp_path / f"v{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(index), format="rgb24")))
        container.mux(stream.encode(None))
    with Video(path) as video:
        assert times_of(video) == pytest.approx([i / 30 for i in range(40)], abs=0.0011)
        assert times_of(video, 1.0) == pytest.approx([i / 30 for i in range(30, 40)], abs=0.0011)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(tmp_path, degrees):
    """The file asks for a turn by ``degrees`` clockwise; what is shown is upright."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48] = (250, 30, 30), (30, 250, 30), (30, 30, 250)

    def rotate(stream):
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_rotation(degrees)

    path = write_video(
        tmp_path / "v.mp4", [i / 30 for i in range(5)], height=64, width=96, images=[image] * 5, prepare=rotate
    )
    with Video(path) as video, av.open(str(path)) as container:
        turns = next(container.decode(video=0)).rotation // 90  # counter-clockwise, as FFmpeg counts
        upright = np.rot90(image, turns)
        assert (video.height, video.width) == upright.shape[:2]
        assert video.rotation == -90 * turns % 360
        shown = next(video.frames()).rgb()
        assert np.abs(shown.astype(int) - upright).mean() < 12
        larger = next(video.frames()).rgb((2 * video.width, 2 * video.height))
        assert np.abs(larger[::2, ::2].astype(int) - upright).mean() < 14


def test_mirrored():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    for matrix, expected in (
        ([[-1, 0], [0, 1]], image[:, ::-1]),
        ([[1, 0], [0, -1]], image[::-1]),
        ([[0, 1], [1, 0]], image.transpose(1, 0, 2)),
        ([[0, 1], [-1, 0]], np.rot90(image, -1)),
        ([[0, -1], [1, 0]], np.rot90(image, 1)),
    ):
        from evad.video import _upright

        np.testing.assert_array_equal(_upright(image, np.array(matrix)), expected)


def test_sample_aspect_ratio(tmp_path):
    def anamorphic(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    path = write_video(tmp_path / "v.mkv", [i / 30 for i in range(5)], prepare=anamorphic)
    with Video(path) as video:
        assert (video.width, video.height, video.sample_aspect_ratio) == (64, 48, Fraction(4, 3))
        with VideoWriter(tmp_path / "w.mp4", 64, 48, 30, video.sample_aspect_ratio) as writer:
            for frame in video.frames():
                writer.write(frame.rgb(), frame.time)
    with Video(tmp_path / "w.mp4") as video:
        assert video.sample_aspect_ratio == Fraction(4, 3)


def test_damaged_frames_are_left_out_and_counted(tmp_path):
    """Overwrite coded pictures in the middle: what is before and after them is still read."""
    data = bytearray(BIKES.read_bytes())
    with av.open(str(BIKES)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size and p.pos is not None]
    for position, size in packets[100:110]:
        data[position : position + size] = b"\xff" * size
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    with Video(path) as video:
        times = times_of(video)
        assert video.skipped > 0
        assert 200 <= len(times) < 250
        assert times[:90] == [round(i / 25, 3) for i in range(90)]
        assert times[-1] == 9.96
        assert times == sorted(set(times))


def test_truncated_stream_is_read_to_its_end(tmp_path):
    path = write_video(tmp_path / "v.mkv", [i / 30 for i in range(90)], width=128, height=96)
    data = path.read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    with Video(tmp_path / "half.mkv") as video:
        times = times_of(video)
        assert 10 < len(times) < 90
        assert times == pytest.approx([i / 30 for i in range(len(times))], abs=0.0011)


def test_size_that_changes_on_the_way(tmp_path):
    """Two streams one after the other, as a broadcast may have: all frames come in the first size, times go on."""
    data = b""
    for number, size in enumerate(((48, 64), (96, 80))):
        part = tmp_path / f"{number}.ts"
        write_video(part, [i / 30 for i in range(20)], height=size[0], width=size[1])
        data += part.read_bytes()
    (tmp_path / "both.ts").write_bytes(data)
    with Video(tmp_path / "both.ts") as video:
        frames = [(frame.time, frame.rgb().shape) for frame in video.frames()]
    assert len(frames) == 40
    assert {shape for _, shape in frames} == {(48, 64, 3)}
    assert [time for time, _ in frames] == pytest.approx([i / 30 for i in range(40)], abs=0.05)


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "audio", "cut"])
def test_rejects_what_is_no_video(tmp_path, kind):
    path = tmp_path / "input.mp4"
    expected = {"missing": "no such file", "folder": "is a folder", "audio": "no video stream"}
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a video\n" * 100)
    elif kind == "audio":
        path = tmp_path / "input.wav"
        write_audio(path)
    elif kind == "cut":
        path.write_bytes(BIKES.read_bytes()[:3000])  # an MP4 whose index is lost
    with pytest.raises(VideoError, match=expected.get(kind, "not a video that can be read")) as caught:
        Video(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_leaves_no_threads(tmp_path):
    """Threads that outlive a video would hang a worker process that is forked later and collects them."""
    gc.collect()
    gc.disable()
    try:
        before = len(list(Path("/proc/self/task").iterdir()))
        with Video(BIKES) as video, VideoWriter(tmp_path / "v.mp4", 640, 272, 25) as writer:
            for frame in itertools.islice(video.frames(1.0), 3):
                writer.write(frame.rgb(), frame.time)
                frame.rgb((1280, 544))
        del writer
        assert len(list(Path("/proc/self/task").iterdir())) <= before
    finally:
        gc.enable()


# Clips


def shown_at(times, moment):
    """The frame shown at a moment, clamped to the first and the last."""
    return max([i for i, time in enumerate(times) if time <= moment + 1e-6], default=0)


def clips_of(times, every, **options):
    sampler = ClipSampler(every, prepare=lambda frame: round(frame.time, 6), **options)
    clips = []
    for time in times:
        clips += sampler.push(Frame(time, None, None))
    return clips + list(sampler.finish())


VARIABLE = np.cumsum([0.0, 0.01, 0.2, 0.033, 0.033, 1.5, 0.02, 0.04, 0.04, 0.3, 0.05, 0.6, 0.7, 0.01, 0.033]).tolist()


@pytest.mark.parametrize(
    ("times", "every"),
    [
        ([i / 30 for i in range(150)], 1.0),
        ([i / 30 for i in range(150)], 0.1),
        ([i / 25 for i in range(100)], 0.7),
        ([i / 240 for i in range(700)], 1.0),
        ([i * 0.5 for i in range(12)], 1.0),
        ([0.0], 1.0),
        (VARIABLE, 0.25),
    ],
    ids=["30fps", "30fps-dense", "25fps", "240fps", "2fps", "one-frame", "variable"],
)
def test_samples_are_the_frames_shown(times, every):
    clips = clips_of(times, every)
    assert [clip.time for clip in clips] == pytest.approx(np.arange(0, times[-1] + 1e-9, every))
    for clip in clips:
        expected = [times[shown_at(times, clip.time + (i - 8) * 4 / 30)] for i in range(16)]
        assert clip.samples == pytest.approx(expected, abs=1e-6)


def test_samples_at_30_fps_are_the_released_ones():
    golden = np.load(HERE / "golden" / "op_preprocess.npz")
    clips = {round(30 * clip.time): clip for clip in clips_of([i / 30 for i in range(80)], 1 / 30)}
    for name, center in (("seq/center60_n80", 60), ("seq/center0_n27030", 0)):
        assert [round(30 * sample) for sample in clips[center].samples] == golden[name].tolist()


def test_timestamps_rounded_to_milliseconds():
    exact, rounded = ([i / 30 for i in range(90)], [round(i / 30, 3) for i in range(90)])
    for clip, expected in zip(clips_of(rounded, 1.0), clips_of(exact, 1.0), strict=True):
        assert clip.samples == pytest.approx(expected.samples, abs=0.001)


def test_prepares_a_frame_once_and_only_if_sampled():
    prepared = []
    sampler = ClipSampler(1.0, prepare=lambda frame: prepared.append(frame.time) or len(prepared))
    for i in range(300):
        list(sampler.push(Frame(i / 60, None, None)))
        assert len(sampler._open) <= 3
    assert len(prepared) == len(set(prepared)) < 100


def test_span_of_keyframes():
    clips = clips_of([i / 30 for i in range(150)], 0.5, first=1.25, last=2.8)
    assert [clip.time for clip in clips] == [1.25, 1.75, 2.25, 2.75]


@pytest.mark.parametrize("time", [0.0, 0.1, 4.0, 5.03, 9.9])
def test_read_clip_equals_streaming(time):
    prepare = lambda frame: round(frame.time, 3)  # noqa: E731
    with Video(BIKES) as video:
        clip = read_clip(video, time, prepare=prepare)
        times = times_of(video)
    assert clip == Clip(time, [times[shown_at(times, time + (i - 8) * 4 / 30)] for i in range(16)])


def test_read_clip_after_the_end_is_the_last():
    with Video(BIKES) as video:
        assert read_clip(video, 60.0, prepare=lambda frame: round(frame.time, 3)).samples[8:] == [9.96] * 8


def test_variable_frame_rate_of_a_file(tmp_path):
    times = [round(time, 3) for time in VARIABLE]
    path = write_video(tmp_path / "v.mkv", times)
    with Video(path) as video:
        assert times_of(video) == times
        clip = read_clip(video, 2.0, prepare=lambda frame: round(float(frame.rgb().mean()) / 15))
    assert clip.samples == [shown_at(times, 2.0 + (i - 8) * 4 / 30) for i in range(16)]


# What the model sees


GOLDEN = np.load(HERE / "golden" / "op_preprocess.npz")
CASES = json.loads(str(GOLDEN["cases_json"]))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_preprocessing_matches_golden(number):
    case = CASES[number]
    height, width, short, max_size = case["h"], case["w"], case["short"], case["max_size"]
    frames = GOLDEN[f"case{number}/frames_bgr_hwc"][..., ::-1]
    boxes = GOLDEN[f"case{number}/boxes_norm"] * [width, height, width, height]
    boxes = boxes.clip(0, [width - 1, height - 1] * 2)
    if case["flipped"]:
        frames = frames[:, :, ::-1]
        boxes[:, [0, 2]] = width - 1 - boxes[:, [2, 0]]
    out = normalize([resize(np.ascontiguousarray(frame), short, max_size) for frame in frames])
    expected = GOLDEN[f"case{number}/out_cthw"]
    assert list(out.shape) == list(expected.shape) == case["out"]
    assert np.abs(out.numpy() - expected).max() <= 1 / 255 / 0.225 + 1e-6  # one grey level
    new_height, new_width, ratio = resized(height, width, short, max_size)
    limits = [new_width - 1, new_height - 1] * 2
    np.testing.assert_allclose((boxes * ratio).clip(0, limits), GOLDEN[f"case{number}/out_boxes"], rtol=0, atol=1e-9)


def test_long_side_is_limited():
    assert resized(100, 1000, 224)[:2] == (133, 1333)
    assert resized(1, 5000, 224)[:2] == (1, 1333)


# Writing


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63), (1, 1)])
def test_writer_keeps_times_and_sizes(tmp_path, height, width):
    times = [0.0, 0.04, 0.5, 0.533333, 2.0]
    with VideoWriter(tmp_path / "v.mp4", width, height, 25) as writer:
        for index, time in enumerate(times):
            writer.write(numbered(4 * index, height, width), time)
    with Video(tmp_path / "v.mp4") as video:
        frames = list(video.frames())
        assert (video.height, video.width) == (height + height % 2, width + width % 2)
    assert [frame.time for frame in frames] == pytest.approx(times, abs=1e-4)
    assert [round(frame.rgb().mean() / 15) for frame in frames] == [0, 4, 8, 12, 16]


def test_writer_without_h264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with VideoWriter(tmp_path / "v.mp4", 64, 48, 30) as writer:
        assert writer.codec == "mpeg4"
        for index in range(10):
            writer.write(numbered(index), index / 30)
    with Video(tmp_path / "v.mp4") as video:
        assert len(times_of(video)) == 10


def test_writer_finishes_the_file_on_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "v.mp4", 64, 48, 30) as writer:
        for index in range(20):
            writer.write(numbered(index), index / 30)
        raise KeyboardInterrupt
    with Video(tmp_path / "v.mp4") as video:
        assert len(times_of(video)) == 20


# Memory


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory as Linux reports it")
def test_memory_does_not_grow_with_the_video(tmp_path):
    """Decode, sample and write 80 s: it levels out (caches of decoder and encoder fill first)."""
    path = write_video(tmp_path / "v.mp4", [i / 10 for i in range(800)], height=240, width=320)
    sampler = ClipSampler(1.0, prepare=lambda frame: resize(frame.rgb(), 224))
    clips, resident = 0, []
    with Video(path) as video, VideoWriter(tmp_path / "w.mp4", 320, 240, 10) as writer:
        for frame in video.frames():
            clips += sum(1 for _ in sampler.push(frame))
            writer.write(frame.rgb(), frame.time)
            resident.append(resident_bytes())
        clips += sum(1 for _ in sampler.finish())
    assert (clips, len(resident)) == (80, 800)
    assert max(resident) - max(resident[:400]) < 20e6  # these 40 s are 92 MB of pixels


def test_frames_are_freed_without_the_collector():
    """No reference cycle keeps a frame: its pixels are memory that the collector does not see."""
    gc.collect()
    gc.disable()
    try:
        with Video(BIKES) as video:
            for frame in itertools.islice(video.frames(), 50):
                assert frame.time < 2
            alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
    finally:
        gc.enable()
    assert alive < 10


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads resident memory as Linux reports it")
def test_memory_of_detect_does_not_grow_with_the_video(tmp_path, capfd, monkeypatch):
    """The whole command, decoding in a thread, batch by batch: it levels out, too."""
    path = write_video(tmp_path / "v.mp4", [i / 10 for i in range(400)], height=240, width=320)
    resident = []

    class Watched(VideoWriter):
        def write(self, *args):
            super().write(*args)
            resident.append(resident_bytes())

    monkeypatch.setattr("evad.cli.detect.VideoWriter", Watched)
    options = ["--model", "tiny", "--batch", "4", "--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(["detect", str(path), *options]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (len(document["keyframes"]), document["frames"], len(resident)) == (40, 400, 400)
    assert max(resident) - max(resident[:200]) < 30e6  # these 20 s are 46 MB of pixels
