"""From video to detections with decoding, copying and computing at the same time.

A recorded video is decoded in a thread that runs ahead until its queue is full, so every keyframe is looked at and
memory is bounded. A live one is decoded as it comes: where the model falls behind, the newest clip wins and others are
dropped, so what is reported is never older than the rest of a clip after its keyframe (0.9 seconds) and two runs of the
model, however long the source goes on.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled
from .compiled import Compiled
from .detector import EVAD, Detections, Scored, select_detections
from .video import ROUNDING, Clip, ClipSampler, Frame, Video


class Step(NamedTuple):
    """What one more frame came to."""

    frame: Frame | None  # None after the last one
    clips: tuple[Clip, ...]  # that it completed
    next_time: float  # of the earliest keyframe whose clip is not complete, seconds


class ClipReader:
    """Frames and clips of a video in order, decoded in a thread; to be iterated once and closed.

    Args:
        video: Open; it belongs to the thread until ``close``.
        sampler: What cuts the clips.
        start, end: Where to begin, and the last frame's time, seconds.
        ahead: Most steps that wait to be taken.
    """

    def __init__(self, video: Video, sampler: ClipSampler, start: float = 0.0, end: float = math.inf, ahead: int = 32):
        self._steps: queue.Queue[Step | BaseException | None] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._patience = 1.0 if video.live else None  # a live source may say nothing for long
        self._thread = threading.Thread(target=self._run, args=(video, sampler, start, end), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        while (step := self._steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step

    def close(self) -> None:
        """End the thread, wherever it is."""
        self._closed.set()
        self._thread.join(self._patience)

    def _run(self, video: Video, sampler: ClipSampler, start: float, end: float) -> None:
        try:
            for frame in video.frames(start):
                clips = tuple(sampler.push(frame))
                self._put(Step(frame, clips, sampler.next_time))
                if self._closed.is_set() or frame.time > end:
                    break
            self._put(Step(None, tuple(sampler.finish()), sampler.next_time))
        except BaseException as error:  # is raised where the steps are taken
            self._put(error)
        self._put(None)

    def _put(self, step: Step | BaseException | None) -> None:
        while not self._closed.is_set():
            try:
                return self._steps.put(step, timeout=0.1)
            except queue.Full:
                pass


class LiveReader:
    """The newest clip of a live video, decoded in a thread as it comes.

    Args:
        video: Open.
        sampler: What cuts the clips.
        end: The last frame's time, seconds; clips go on for the sampler's tail.
        frames: How many of the latest frames are held for ``take_frames``; older ones are dropped.

    Attributes:
        clips, dropped_clips: Clips so far, and those that a newer one replaced before they were taken.
        came, dropped_frames: Frames so far, and those that were held but not taken in time.
        ended: Whether the source has ended; a clip and frames may still wait.
    """

    def __init__(self, video: Video, sampler: ClipSampler, end: float = math.inf, frames: int = 0):
        self.clips = self.dropped_clips = self.came = self.dropped_frames = 0
        self.ended = False
        self._error: BaseException | None = None
        self._newest: tuple[Clip, float] | None = None
        self._clock: deque[tuple[float, float]] = deque()  # a frame's time, and the clock then
        self._frames: deque[Frame] = deque()
        self._most = frames
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(video, sampler, end), daemon=True)
        self._thread.start()

    def take(self, timeout: float) -> tuple[Clip, float] | None:
        """The newest clip that was not taken, and when its keyframe came (``time.perf_counter``); None after a time."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self.ended, timeout)
            if self._error is not None:
                raise self._error
            newest, self._newest = self._newest, None
            return newest

    def take_frames(self) -> list[Frame]:
        """Frames since the last call, the latest ``frames`` of them."""
        with self._changed:
            frames = list(self._frames)
            self._frames.clear()
            return frames

    def close(self) -> None:
        """End the thread; one that waits for a source that says nothing ends when it speaks, or with the process."""
        self._closed = True
        self._thread.join(1.0)

    def _run(self, video: Video, sampler: ClipSampler, end: float) -> None:
        try:
            for frame in video.frames():
                if self._closed or frame.time > end + sampler.tail:
                    break
                self._clock.append((frame.time, time.perf_counter()))
                self._give(sampler.push(frame), frame if frame.time <= end else None)
                self._seen(sampler.next_time)
            if not self._closed:
                self._give(sampler.finish(), None)
        except BaseException as error:  # is raised where the clips are taken
            self._error = error
        with self._changed:
            self.ended = True
            self._changed.notify()

    def _give(self, clips: Iterator[Clip], frame: Frame | None) -> None:
        complete = list(clips)  # outside of the lock: this prepares pictures
        with self._changed:
            for clip in complete:
                self.clips += 1
                self.dropped_clips += self._newest is not None
                self._newest = clip, self._seen(clip.time)
                self._changed.notify()
            if frame is not None:
                self.came += 1
                if self._most:
                    self._frames.append(frame)
                if len(self._frames) > self._most:
                    self._frames.popleft()
                    self.dropped_frames += 1

    def _seen(self, at: float) -> float:
        """When the frame shown at a time came; those before it are forgotten."""
        while len(self._clock) > 1 and self._clock[1][0] <= at + ROUNDING:
            self._clock.popleft()
        return self._clock[0][1]


class ClipDetections(NamedTuple):
    """A clip's detections, on the CPU."""

    detections: Detections  # of all where nobody reaches the threshold; boxes in pixels of the clip
    size: tuple[int, int]  # its height and width
    tokens: list[int]  # kept after each pruning layer
    seconds: float  # this clip's share of its batch's time


class Runner:
    """A model on clips of a video, batch by batch, as uint8: a quarter of float32 to copy.

    On a GPU each shape is a captured graph, a batch is copied from pinned memory while the one before is computed, and
    results come one batch late, so that what the caller does with them overlaps, too.
    """

    def __init__(self, model: EVAD, batch: int = 1) -> None:
        self.model, self.batch = model, batch
        self.device = model.encoder.patch_embed.weight.device
        self._detectors: dict[tuple[int, ...], Compiled] = {}
        self._stagings: dict[tuple[int, ...], list[_Staging]] = {}
        self._flying: tuple[Sequence[Clip], _Staging] | None = None
        self._copying = torch.cuda.Stream(self.device) if compiled.replays(self.device) else None

    def submit(self, clips: Sequence[Clip], threshold: float) -> list[tuple[Clip, ClipDetections]]:
        """Run at most ``batch`` clips; returns results that are ready: these on a CPU, the last ones on a GPU."""
        begin = time.perf_counter()
        shape = (3, len(clips[0].samples), *clips[0].samples[0].shape[1:])
        if shape not in self._detectors:
            self._detectors[shape] = self.model.compiled(shape, self.batch, torch.uint8)
        detector = self._detectors[shape]
        if self._copying is None:
            output, scored = detector.run([torch.stack(tuple(clip.samples), 1) for clip in clips])
            tokens = [kept.shape[1] for kept in output.kept]
            return _found(clips, scored, tokens, threshold, time.perf_counter() - begin)
        staging = self._staging(shape)
        staging.send(clips, detector, self._copying)
        staging.begin, staging.threshold = begin, threshold
        ready = self.finish()
        self._flying = clips, staging
        return ready

    def finish(self) -> list[tuple[Clip, ClipDetections]]:
        """Results of what is still under way."""
        if self._flying is None:
            return []
        (clips, staging), self._flying = self._flying, None
        scored = staging.receive()
        return _found(clips, scored, staging.tokens, staging.threshold, time.perf_counter() - staging.begin)

    def _staging(self, shape: tuple[int, ...]) -> _Staging:
        """One of two, the one that is not under way."""
        pair = self._stagings.setdefault(shape, [])
        if len(pair) < 2:
            pair.append(_Staging((self.batch, *shape), self.device))
            return pair[-1]
        pair.reverse()
        return pair[1]


class _Staging:
    """Memory on both sides of the bus for one batch on its way."""

    begin = threshold = 0.0
    tokens: list[int]
    scored: Scored

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self.there = torch.empty(shape, dtype=torch.uint8, device=device)
        self.copied, self.done = torch.cuda.Event(), torch.cuda.Event()
        self.done.record(torch.cuda.current_stream(device))  # what used that memory before is done with it

    def send(self, clips: Sequence[Clip], detector: Compiled, copying: torch.cuda.Stream) -> None:
        number = len(clips)
        for place, clip in zip(self.pinned, clips, strict=False):
            torch.stack(tuple(clip.samples), 1, out=place)
        copying.wait_event(self.done)
        with torch.cuda.stream(copying):
            self.there[:number].copy_(self.pinned[:number], non_blocking=True)
            self.copied.record(copying)
        stream = torch.cuda.current_stream(self.there.device)
        stream.wait_event(self.copied)
        output, scored = detector.run(self.there[:number])
        self.tokens = [kept.shape[1] for kept in output.kept]
        self.scored = Scored(*(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in scored))
        for here, there in zip(self.scored, scored, strict=True):
            here.copy_(there, non_blocking=True)
        self.done.record(stream)

    def receive(self) -> Scored:
        self.done.synchronize()
        return self.scored


def _found(
    clips: Sequence[Clip], scored: Scored, tokens: list[int], threshold: float, seconds: float
) -> list[tuple[Clip, ClipDetections]]:
    sizes: list[tuple[int, int]] = [tuple(clip.samples[0].shape[1:]) for clip in clips]
    detections = select_detections(Scored(*(_wide(x) for x in scored)), sizes, threshold)
    each = zip(clips, detections, sizes, strict=True)
    return [(clip, ClipDetections(found, size, tokens, seconds / len(clips))) for clip, found, size in each]


def _wide(values: Tensor) -> Tensor:
    return values.cpu().float()
