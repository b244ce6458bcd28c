"""Video in and out: decode by time, sample clips around keyframes, prepare them for the model, write annotated video.

Everything streams: an hour-long file needs no more memory than a second of it.

Time. Seconds are counted from the first frame of the video stream. A frame is shown from its presentation timestamp
until the next one's, so variable frame rate needs no special case. A clip is 16 frames, stride 4 at 30 frames per
second (reference: AVA at 30 fps, indices range(c - 32, c + 32, 4)): sample i is the frame shown at
``keyframe + (i - 8) * 4 / 30`` seconds, whatever the file's own rate. Samples before the first frame or after the last
one clamp to it.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type as SideData
from torch import Tensor

ROUNDING = 0.001  # containers round timestamps to a millisecond: a frame this late counts as shown
MAX_SIZE = 1333
FPS = 30.0  # of the frames that a stride counts: AVA's


# A frame keeps the threads that converted it until it is collected; in a forked worker that would never end.
_ONE_THREAD = {"threads": 1} if "threads" in (av.VideoFrame.reformat.__doc__ or "") else {}


class VideoError(ValueError):
    """The file is not a video that can be read."""


class Frame:
    """One decoded frame, still in the decoder's pixel format: half the memory of RGB, converted when looked at."""

    __slots__ = ("_frame", "_matrix", "time")

    def __init__(self, time: float, frame: av.VideoFrame, matrix: np.ndarray | None):
        self.time, self._frame, self._matrix = time, frame, matrix

    def rgb(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels as they should be looked at (upright), uint8 [H, W, 3]; enlarged to ``size`` (W, H) if given."""
        frame = self._frame
        if size is not None:
            width, height = reversed(size) if self._matrix is not None and _transposes(self._matrix) else size
            frame = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC", **_ONE_THREAD)
        return _upright(frame.to_ndarray(format="rgb24", **_ONE_THREAD), self._matrix)


class Video:
    """A video file, read by time.

    Attributes:
        width, height: Pixels of an upright frame.
        fps: Average frames per second, a float.
        duration: Seconds, or None where the file does not say.
        rotation: Degrees clockwise that the file asks frames to be turned by; done by ``Frame.rgb``.
        sample_aspect_ratio: Width over height of a pixel. Frames are not resampled to square pixels: neither training
            clips nor boxes are; ``VideoWriter`` passes it on.
        skipped: Frames (or packets) dropped so far because they were damaged.
        source, name: What was asked for, and what files about it are called.
    """

    live = False

    def __init__(self, path: str | Path):
        """Open ``path``.

        Raises:
            VideoError: missing, not a video, or no frame in it can be decoded.
        """
        self.path, self.source, self.name = Path(path), str(path), Path(path).stem
        if not self.path.exists():
            raise VideoError(f"{path}: no such file")
        if self.path.is_dir():
            raise VideoError(f"{path}: is a folder, not a video")
        self._begin()

    def _begin(self) -> None:
        self._container = None
        try:
            self._open()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise VideoError(f"{self.source}: not a video that can be read ({_reason(error)})") from error
        if self._stream is None:
            self.close()
            raise VideoError(f"{self.source}: has no video stream")
        self.skipped = 0
        self._coded: tuple[int, int] | None = None
        self.fps = float(self._stream.average_rate or self._stream.guessed_rate or 30)
        self.duration = self._stated_duration()
        self._zero = None if self._stream.start_time is None else self._stream.start_time * self._stream.time_base
        try:
            first = self._first_frame()
        except VideoError:
            self.close()
            raise
        matrix = first._matrix
        self.height, self.width = first.rgb().shape[:2]
        self.rotation = 0 if matrix is None else round(math.degrees(math.atan2(matrix[0, 1], matrix[0, 0]))) % 360
        ratio = self._stream.sample_aspect_ratio or Fraction(1)
        turned = matrix is not None and _transposes(matrix)
        self.sample_aspect_ratio = 1 / ratio if turned else ratio

    def _first_frame(self) -> Frame:
        return next(self.frames())

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._stream = None  # with which the decoder's threads end

    def frames(self, start: float = 0.0) -> Iterator[Frame]:
        """Frames in order of time, from the one shown at ``start`` (seconds) to the last.

        Damaged frames are left out and counted in ``skipped``. Only one iterator is alive at a time.

        Raises:
            VideoError: not one frame could be decoded.
        """
        self.skipped = 0
        shown = None  # the latest frame at or before start
        for attempt in (start, start - 10, 0.0):  # an inexact seek may land too late: go further back
            self._seek(max(attempt, 0.0))
            frames = self._decode()
            shown = next(frames, None)
            if attempt <= 0 or (shown is not None and shown.time <= start + ROUNDING):
                break
        if shown is None:
            raise VideoError(f"{self.source}: no frame could be decoded" + (f" after {start:g} s" if start > 0 else ""))
        for frame in frames:
            if frame.time > start + ROUNDING:
                yield shown
            shown = frame
        yield shown

    def _stated_duration(self) -> float | None:
        if self._stream.duration:
            return float(self._stream.duration * self._stream.time_base)
        return self._container.duration / av.time_base if self._container.duration else None

    def _open(self) -> None:
        self.close()
        self._container = av.open(str(self.path))
        self._choose_stream("AUTO")
        self._at_start = True

    def _choose_stream(self, thread_type: str) -> None:
        streams = [s for s in self._container.streams.video if not s.disposition & _COVER_ART]
        self._stream = streams[0] if streams else None
        if streams:
            self._stream.thread_type = thread_type

    def _seek(self, start: float) -> None:
        """Go to a place at or before ``start``; the beginning is reached by opening anew, for seeks may miss it."""
        try:
            if start > 0:
                target = int((start + float(self._zero or 0)) / self._stream.time_base)
                self._container.seek(target, stream=self._stream)
            elif not self._at_start:
                self._open()
        except (av.error.FFmpegError, OSError):
            self._open()
        self._at_start = False

    def _decode(self) -> Iterator[Frame]:
        """Whole frames from here on, with times that increase."""
        step = 1 / self.fps
        last = rotation = matrix = None
        for frame in self._raw_frames():
            if frame.is_corrupt:
                self.skipped += 1
                continue
            if frame.pts is None:
                time = 0.0 if last is None else last + step
            else:
                stamp = frame.pts * frame.time_base
                if self._zero is None or (self.live and last is None):
                    self._zero = stamp
                time = float(stamp - self._zero)
            if last is not None and (time <= last or self._beyond(time)):
                time = last + step  # damaged timestamp
            last = time
            if frame.rotation != rotation:  # rarely: reading side_data puts the frame into a reference cycle
                rotation, side_data = frame.rotation, frame.side_data.get(SideData.DISPLAYMATRIX)
                matrix = None if side_data is None else _matrix(side_data)
            if self._coded is None:
                self._coded = frame.width, frame.height
            elif self._coded != (frame.width, frame.height):  # a stream may change its size: keep the first
                frame = frame.reformat(*self._coded, **_ONE_THREAD)
            yield Frame(time, frame, matrix)

    def _beyond(self, time: float) -> bool:
        return self.duration is not None and time > 2 * self.duration + 60

    def _raw_frames(self) -> Iterator[av.VideoFrame]:
        failures = 0
        while failures < 100:  # in a row: the rest of the file is unreadable
            try:
                for packet in self._container.demux(self._stream):
                    try:
                        decoded = packet.decode()
                    except av.error.FFmpegError:
                        self.skipped += 1
                        continue
                    failures = 0
                    yield from decoded
                return
            except av.error.EOFError:
                return
            except (av.error.FFmpegError, OSError):
                failures += 1
                self.skipped += 1


class LiveVideo(Video):
    """A camera, an address or a pipe: read once, from now on, as it comes.

    Args:
        source: "-" for standard input, the path of a named pipe or of a camera, a camera's number (Linux and macOS), or
            an address such as rtsp://... or http://...
        timeout: Seconds without data after which the source has ended.
    """

    live = True

    def __init__(self, source: str, timeout: float = 10.0):
        self.source, self._timeout = source, timeout
        self._reading, self._closed = threading.Lock(), False
        self._address, self._format, self.name = _address(source)
        self.path = Path(self.name)
        self._begin()

    def close(self) -> None:
        """At once, or by the thread that is waiting for a frame, when that has come."""
        self._closed = True
        if self._reading.acquire(blocking=False):
            super().close()
            self._reading.release()

    def _open(self) -> None:
        options = {"fflags": "nobuffer", "rtsp_transport": "tcp"} if "://" in self._address else {}
        self._container = av.open(self._address, format=self._format, options=options, timeout=self._timeout)
        self._choose_stream("SLICE")  # threads that take a frame each would hold back as many frames

    def _first_frame(self) -> Frame:
        self._frames = self._decode()
        self._first = next(self._frames, None)
        if self._first is None:
            raise VideoError(f"{self.source}: no frame could be decoded")
        return self._first

    def frames(self, start: float = 0.0) -> Iterator[Frame]:
        """Frames from the first to the last that comes; once."""
        first, self._first = self._first, None
        if first is not None:
            yield first
        yield from self._frames

    def _stated_duration(self) -> None:
        return None

    def _raw_frames(self) -> Iterator[av.VideoFrame]:
        """Until the source ends, or says nothing for as long as the timeout."""
        packets = self._container.demux(self._stream)
        while True:
            with self._reading:
                try:
                    frames = next(packets).decode()
                except StopIteration:
                    return
                except av.error.InvalidDataError:
                    frames, self.skipped = [], self.skipped + 1
                except (av.error.FFmpegError, OSError):  # gone, or silent
                    return
            if self._closed:
                return self.close()
            yield from frames


def is_live(source: str) -> bool:
    """Whether ``LiveVideo`` reads it, rather than ``Video``."""
    path = Path(source)
    if source == "-" or "://" in source:
        return True
    if not path.exists():
        return source.isdecimal()
    return path.is_fifo() or path.is_char_device()


def _address(source: str) -> tuple[str, str | None, str]:
    """What FFmpeg opens, in which format (None: it finds out), and a name for files."""
    if source == "-":
        return "pipe:0", None, "stdin"
    if "://" in source:
        parts = urlsplit(source)
        return source, None, Path(parts.path).stem or parts.hostname or "stream"
    camera = {"linux": "v4l2", "darwin": "avfoundation"}.get(sys.platform)
    if source.isdecimal() and not Path(source).exists():
        if camera is None:
            raise VideoError(f"{source}: cameras are known by number on Linux and macOS only")
        return (f"/dev/video{source}" if camera == "v4l2" else source), camera, f"camera{source}"
    return source, "v4l2" if Path(source).is_char_device() else None, Path(source).stem


_COVER_ART = av.stream.Disposition.attached_pic


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _matrix(side_data) -> np.ndarray:
    """The 2x2 part [[a, b], [c, d]] of a display matrix: (x, y) is shown at (a*x + c*y, b*x + d*y)."""
    return np.frombuffer(bytes(side_data), np.int32, 9).reshape(3, 3)[:2, :2] / 65536


def _transposes(matrix: np.ndarray) -> bool:
    return abs(matrix[0, 1]) > abs(matrix[0, 0])


def _upright(image: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """``image`` turned and mirrored as a display matrix asks, to the nearest quarter turn."""
    if matrix is None:
        return image
    if _transposes(matrix):
        image, x, y = image.transpose(1, 0, 2), matrix[1, 0], matrix[0, 1]
    else:
        x, y = matrix[0, 0], matrix[1, 1]
    return np.ascontiguousarray(image[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1])


# Clips


class Clip(NamedTuple):
    """The samples around one keyframe."""

    time: float  # of the keyframe, seconds
    samples: list  # what the sampler's ``prepare`` made of each frame, in order


def sample_times(num_frames: int, stride: int, fps: float = FPS) -> list[float]:
    """Seconds from a clip's keyframe to each of its frames: (i - num_frames // 2) * stride / fps for frame i."""
    return [(i - num_frames // 2) * stride / fps for i in range(num_frames)]


class ClipSampler:
    """Cuts clips out of a stream of frames: one around every keyframe time, at ``first``, ``first + every``, ...

    A frame that no sample falls on is never prepared, one that several clips share is prepared once. What is held is
    the samples of the clips under way: those whose span (about two seconds) covers the present.
    """

    def __init__(
        self,
        every: float,
        *,
        first: float = 0.0,
        last: float = math.inf,
        num_frames: int = 16,
        stride: int = 4,
        fps: float = FPS,
        prepare: Callable[[Frame], object] = Frame.rgb,
    ):
        """
        Args:
            every: Seconds from keyframe to keyframe, above 0.
            first, last: Times of the first and (at most) the last keyframe, seconds.
            num_frames, stride, fps: As for ``sample_times``.
            prepare: Turns a Frame into what clips hold.
        """
        self._every, self._first, self._last = every, first, last
        self._offsets = sample_times(num_frames, stride, fps)
        self._prepare = prepare
        self._count = 0  # keyframes begun
        self._open: deque[Clip] = deque()
        self._shown: Frame | None = None

    @property
    def lead(self) -> float:
        """Seconds before a keyframe at which its clip begins."""
        return -self._offsets[0]

    @property
    def tail(self) -> float:
        """Seconds after a keyframe until which its clip lasts."""
        return self._offsets[-1]

    @property
    def next_time(self) -> float:
        """Time of the earliest keyframe whose clip is not complete; infinite where there is none."""
        time = self._open[0].time if self._open else self._time(self._count)
        return time if time <= self._last else math.inf

    def push(self, frame: Frame) -> Iterator[Clip]:
        """Take the next frame; yields clips that it completes."""
        if self._shown is not None:
            yield from self._advance(frame.time)
        self._shown = frame

    def finish(self) -> Iterator[Clip]:
        """The stream has ended: yields the clips of keyframes up to its last frame, late samples clamped to it."""
        if self._shown is None:
            return
        self._last = min(self._last, self._shown.time + ROUNDING)
        while self._open and self._open[-1].time > self._last:
            self._open.pop()
        yield from self._advance(math.inf)

    def _time(self, index: int) -> float:
        return self._first + index * self._every

    def _advance(self, until: float) -> Iterator[Clip]:
        """Give the shown frame to every sample due before a frame at ``until`` replaces it."""
        until -= ROUNDING
        while (time := self._time(self._count)) <= self._last and time - self.lead < until:
            self._open.append(Clip(time, []))
            self._count += 1
        prepared = None
        for clip in self._open:
            while len(clip.samples) < len(self._offsets) and clip.time + self._offsets[len(clip.samples)] < until:
                prepared = self._prepare(self._shown) if prepared is None else prepared
                clip.samples.append(prepared)
        while self._open and len(self._open[0].samples) == len(self._offsets):
            yield self._open.popleft()


def read_clip(video: Video, time: float, **sampling) -> Clip:
    """The clip around the frame shown at ``time``, found by seeking; ``sampling`` as for ``ClipSampler``.

    A ``time`` beyond the end gives the last frame's clip.
    """
    sampler = ClipSampler(1.0, first=time, last=time, **sampling)
    shown = None
    for frame in video.frames(max(0.0, time - sampler.lead)):
        for clip in sampler.push(frame):
            return clip
        shown = frame
    for clip in sampler.finish():
        return clip
    return read_clip(video, shown.time, **sampling)


# What the model sees


def resized(height: int, width: int, short_side: int, max_size: int = MAX_SIZE) -> tuple[int, int, float]:
    """Size after a resize of the short side to ``short_side`` (the long one to at most ``max_size``), and the ratio.

    Returns:
        (height, width, ratio): whole pixels, and the exact factor that boxes are multiplied by.
    """
    ratio = min(short_side / min(height, width), max_size / max(height, width))
    return max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5)), ratio


def resize(image: np.ndarray, short_side: int, max_size: int = MAX_SIZE) -> Tensor:
    """``image`` (uint8 [H, W, 3] RGB) bilinearly resized as in ``resized``: uint8 [3, h, w].

    Samples between pixel centres, without smoothing first: what the released models were trained on.
    """
    height, width, _ = resized(*image.shape[:2], short_side, max_size)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if (height, width) != image.shape[:2]:
        pixels = F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False)[0]
    return pixels.contiguous()


def normalize(samples: Sequence[Tensor], mean: float = 0.45, std: float = 0.225) -> Tensor:
    """Resized frames (uint8 [3, h, w]) as one clip for the model: float32 [3, T, h, w], (pixel / 255 - mean) / std."""
    return torch.stack(tuple(samples), 1).float().mul_(1 / (255 * std)).sub_(mean / std)


# Writing


class VideoWriter:
    """Writes frames with their own times to an MP4: H.264 where the encoder is built in, else MPEG-4 part 2.

    ``close`` (or leaving the ``with`` block, by an exception too) finishes the file: it plays up to the last frame
    written.
    """

    def __init__(self, path: str | Path, width: int, height: int, fps: float, sample_aspect_ratio: Fraction | int = 1):
        self.path = Path(path)
        self.codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._size = width + width % 2, height + height % 2  # 4:2:0 has no odd sizes
        self._container = av.open(str(path), "w", format="mp4")
        options = {"crf": "20", "preset": "veryfast"} if self.codec == "libx264" else {"qscale": "3"}
        rate = Fraction(fps).limit_denominator(1001)
        self._stream = self._container.add_stream(self.codec, rate=rate, options=options)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self._stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        self._last = -1
        self._whole = True

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, image: np.ndarray, time: float) -> None:
        """Add a frame, uint8 [H, W, 3], shown from ``time`` seconds on; times increase."""
        height, width = image.shape[:2]
        right, below = self._size[0] - width, self._size[1] - height
        if right or below:
            image = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(format="yuv420p", **_ONE_THREAD)
        self._last = max(self._last + 1, round(time * _TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, _TICKS)
        self._mux(frame)

    def _mux(self, frame: av.VideoFrame | None) -> None:
        packets = self._stream.encode(frame)
        self._whole = False  # FFmpeg may crash if it is used again after a write that failed
        self._container.mux(packets)
        self._whole = True

    def close(self) -> None:
        if self._container is None:
            return
        container = self._container
        try:
            if self._whole:
                self._mux(None)
        finally:
            self._container = None
            container.close()


_TICKS = 30000  # per second: 24, 25, 30, 50, 60 and n/1001 fall on whole ticks
