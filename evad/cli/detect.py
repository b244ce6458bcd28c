"""``evad detect``: people and their actions in videos."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from .. import ava, draw
from ..console import CommandError, bounded
from ..data.media import VIDEOS
from ..stream import ClipDetections, ClipReader, LiveReader, Runner
from ..video import ROUNDING, Clip, ClipSampler, Frame, LiveVideo, Video, VideoError, VideoWriter, is_live, resize
from ._common import (
    Built,
    Stopper,
    add_model_arguments,
    add_size_argument,
    build,
    configuration,
    from_all_ranks,
    placement,
    ranks,
    read_labels,
    say,
    writable_folder,
)

DESCRIPTION = """\
Find people in videos and tell what they do, at a keyframe every second.

Writes to the --out folder, for a video called party.mp4:
  party.annotated.mp4     the video with boxes, labels and scores; a keyframe's boxes stay until the next
  party.detections.csv    AVA's format: video_id, timestamp, x1, y1, x2, y2, action_id, score, for every action of
                          every box (as the released evaluation: where nobody reaches --threshold, of all boxes)
  party.detections.json   the people who reach --threshold, with their best actions, and what was run

A live source (a camera, an address, a pipe) is looked at as it comes: where the model falls behind, the newest
keyframe wins, the others are dropped and counted, and the video shows the boxes known when a frame came. The JSON's
latency_seconds count from when the keyframe came; a clip lasts 0.9 seconds longer. --no-live looks at every keyframe,
and lets the source wait.

Of several videos also detections.csv, all together. They are shared by the processes that torchrun starts; a video that
cannot be read is said and left out.

The annotated video has no sound. Ctrl-C stops after the clip under way and leaves these files whole up to there.
"""


HELD_SECONDS = 4.0  # of a live video's frames that wait to be written, at most
HELD_BYTES = 2 << 30  # of a recorded video's frames that wait for their keyframe's boxes, about


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "detect",
        help="boxes, labels and scores for a video",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "video",
        nargs="+",
        metavar="VIDEO",
        help="any file that FFmpeg reads, a folder of them, or a list of their paths (.txt, one a line); or a live "
        "source: a camera's number, an address (rtsp://, http://, ...), a named pipe, - for standard input",
    )
    parser.add_argument("--out", type=Path, default=Path("evad_out"), metavar="DIR", help="folder [evad_out]")
    parser.add_argument(
        "--json", action="store_true", help="print the JSON on stdout, of several videos a list, and nothing else"
    )
    parser.add_argument("--no-video", action="store_true", help="write no annotated video")
    parser.add_argument(
        "--batch",
        type=bounded(int, 1),
        metavar="N",
        help="clips at a time; fewer where the frames that wait for them would take 2 GiB [8 on a GPU, else 1]",
    )
    parser.add_argument(
        "--live",
        action=argparse.BooleanOptionalAction,
        help="drop keyframes rather than fall behind [for a camera, an address or a pipe]",
    )
    group = parser.add_argument_group("what to look at")
    group.add_argument(
        "--every", type=bounded(float, 0.01), default=1.0, metavar="SECONDS", help="from keyframe to keyframe [1]"
    )
    group.add_argument(
        "--start", type=bounded(float, 0), default=0.0, metavar="SECONDS", help="begin here, by seeking [0]"
    )
    group.add_argument("--end", type=bounded(float, 0), metavar="SECONDS", help="stop here [the end]")
    add_size_argument(group)
    group = parser.add_argument_group("what to report")
    group.add_argument(
        "--threshold", type=bounded(float, 0, 1), metavar="SCORE", help="least score of a person [the model's, 0.7]"
    )
    group.add_argument(
        "--top", type=bounded(int, 1), default=3, metavar="N", help="actions shown a person; the CSV has all [3]"
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes: one a line, a JSON list, or a label map (.pbtxt) [the --checkpoint's, or AVA's]",
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sources = _videos(args.video)
    several = len(sources) > 1
    if not several and not is_live(str(sources[0])):
        with Video(sources[0]) as video:
            _check_span(video, args.start, args.end)
    config, _ = configuration(args)
    placement(args)
    labels = read_labels(args.labels, config.num_classes, args.checkpoint)
    folder = writable_folder(args.out)
    with ranks() as (rank, world):
        built = build(args)
        if built.note and not rank:
            say(f"evad detect: {built.note}")
        runner = Runner(built.model, args.batch or (8 if built.device.type == "cuda" else 1))
        files, failed, interrupted = [], [], False
        for source in sources[rank::world]:
            try:
                with open_video(source) as video:
                    _check_span(video, args.start, args.end)
                    result = detect(
                        built,
                        video,
                        folder,
                        labels,
                        every=args.every,
                        start=args.start,
                        end=args.end,
                        size=args.size,
                        threshold=args.threshold,
                        top=args.top,
                        annotate=not args.no_video,
                        live=video.live if args.live is None else args.live,
                        runner=runner,
                    )
            except (VideoError, CommandError) as error:
                if not several:
                    raise
                failed.append(str(error))
                say(f"evad detect: {error}")
                continue
            files.append(result.files)
            if not args.json:
                _report(result)
            if interrupted := result.interrupted:
                break
        failed, files = from_all_ranks(failed), from_all_ranks(files)
        if rank:
            return 130 if interrupted else 0
        if several:
            files.sort(key=lambda written: written["csv"])
            _merge([written["csv"] for written in files], folder / "detections.csv")
            if not args.json:
                print(folder / "detections.csv")
        if args.json:
            _print_json([written["json"] for written in files], several)
        if failed:
            say(f"evad detect: {len(failed)} of {len(sources)} videos could not be read")
        return 130 if interrupted else 2 if failed else 0


def _videos(words: list[str]) -> list[Path] | list[str]:
    """The videos that are meant: files, those in folders, and those that a list (.txt, one a line) names; or a source
    that is live."""
    if any(map(is_live, words)):
        if len(words) > 1:
            raise CommandError(f"{next(filter(is_live, words))}: a live source is looked at alone")
        return words
    paths: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEOS)
            if not found:
                raise CommandError(f"{path}: is a folder without videos ({', '.join(VIDEOS)})")
            paths += found
        elif path.suffix.lower() == ".txt" and path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise CommandError(f"{path}: a list of videos must be UTF-8 text, one a line") from error
            paths += [path.parent / line.strip() for line in lines if line.strip()]
        else:
            paths.append(path)
    if not paths:
        raise CommandError(f"{words[0]}: names no video")
    stems: dict[str, Path] = {}
    for path in paths:
        if stems.setdefault(path.stem, path) != path:
            raise CommandError(f"{stems[path.stem]} and {path} would write the same files; run them one by one")
    return list(dict.fromkeys(paths))


def _merge(parts: list[Path], path: Path) -> None:
    with open(path, "wb") as merged:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, merged)


def _print_json(parts: list[Path], several: bool) -> None:
    for place, part in enumerate(parts):
        if several:
            print("[" if place == 0 else ",")
        with open(part, encoding="utf-8") as file:
            shutil.copyfileobj(file, sys.stdout)
    if several:
        print("]" if parts else "[]")
    sys.stdout.flush()


def _check_span(video: Video, start: float, end: float | None) -> None:
    if video.live and start > 0:
        raise CommandError(f"--start: {video.source} is live, it begins now")
    if video.duration is not None and start > video.duration:
        raise CommandError(f"--start: {start:g} s is after the end of {video.source} ({video.duration:.2f} s)")
    if end is not None and end < start:
        raise CommandError(f"--end: {end:g} s is before --start, {start:g} s")


class Result(NamedTuple):
    """What ``detect`` did."""

    files: dict[str, Path]  # "csv", "json" and, unless switched off, "video"
    keyframes: int
    people: int
    frames: int
    skipped: int
    seconds: float  # in the model, all keyframes
    wall_seconds: float
    live: LiveReader | None  # which counts what was dropped
    interrupted: bool
    picture: np.ndarray | None  # an annotated keyframe, about the middle; none without an annotated video


def detect(
    built: Built,
    video: Video,
    folder: Path,
    labels: tuple[str, ...],
    *,
    every: float = 1.0,
    start: float = 0.0,
    end: float | None = None,
    size: int | None = None,
    threshold: float | None = None,
    top: int = 3,
    annotate: bool = True,
    live: bool = False,
    runner: Runner | None = None,
) -> Result:
    """Run the model around the keyframes of ``video`` and write the files.

    Args:
        built: The model.
        video: Open; the caller closes it.
        folder: Where the files go; it exists.
        labels: Name of each class, in order.
        every: From keyframe to keyframe, seconds, above 0.
        start, end: First and last keyframe, seconds; None for the video's end.
        size: Short side of what the model sees, pixels; None for the model's.
        threshold: Least score of a person in the JSON and in the video, in [0, 1]; None for the model's.
        top: Actions shown a person, at least 1; the CSV has all.
        annotate: Write the video with boxes.
        live: Drop keyframes rather than fall behind.
        runner: What runs the model, and how many clips at a time; None for one by one.
    Returns:
        ``Result``; after Ctrl-C of what was done, with ``interrupted``.
    Raises:
        CommandError: no frame is shown at ``start`` or later.
        VideoError, OSError: the video cannot be read, or a file not written.
    """
    config = built.config
    size = config.short_side if size is None else size
    threshold = config.person_threshold if threshold is None else threshold
    end = math.inf if end is None else end
    runner = runner or Runner(built.model)
    stem = video.name
    files = {"csv": folder / f"{stem}.detections.csv", "json": folder / f"{stem}.detections.json"}
    if annotate:
        files["video"] = folder / f"{stem}.annotated.mp4"
    scale = draw.legible_scale(video.width, video.height)
    canvas = video.width * scale, video.height * scale
    sampler = ClipSampler(
        every,
        first=start,
        last=end,
        num_frames=config.num_frames,
        stride=config.frame_stride,
        fps=config.frame_rate,
        prepare=lambda frame: resize(frame.rgb(), size),
    )
    note = "" if built.weights not in ("random", "partial") else f"{built.weights} weights: this means nothing yet"
    overlay = draw.Overlay(*canvas, [], note)
    waiting: deque[Frame] = deque()  # to be written when their keyframe's boxes are known
    keyframes = people = frames = 0
    model_seconds, begin = 0.0, time.perf_counter()
    picture, middle = None, _middle(video, start, end)
    reader: LiveReader | None = None

    with ExitStack() as stack:
        stop = stack.enter_context(Stopper())
        csv_file = stack.enter_context(open(files["csv"], "w", encoding="utf-8", newline=""))
        csv_writer = ava.CsvWriter(csv_file)
        document = _Document(stack.enter_context(open(files["json"], "w", encoding="utf-8")))
        document.begin(
            weights=built.weights,
            video=_describe(video),
            model=built.summary() | {"short_side": size},
            every=every,
            threshold=threshold,
            labels=list(labels),
        )
        stack.push(lambda kind, *_: document.end(interrupted=True) if kind else None)
        writer = None
        if annotate:
            writer = VideoWriter(files["video"], *canvas, video.fps, video.sample_aspect_ratio)
            stack.enter_context(writer)
        progress = stack.enter_context(_progress(video, start, end))

        def write(frame: Frame) -> None:
            nonlocal frames
            frames += 1
            if writer is not None:
                writer.write(overlay.on(frame.rgb(canvas)), max(0.0, frame.time - start))

        def record(clip: Clip, found: ClipDetections, latency: float | None = None) -> None:
            """Write a keyframe's detections; its boxes are drawn from now on."""
            nonlocal overlay, keyframes, people, model_seconds, picture
            model_seconds += found.seconds
            keyframes += 1
            placed = _placed(found)
            csv_writer.write(stem, clip.time, placed.boxes, placed.actions)
            shown = _people(placed, threshold, labels, top, built.weights == "random")
            people += len(shown)
            document.add(_keyframe(clip.time, shown, found, latency))
            overlay = draw.Overlay(*canvas, [person.label for person in shown], note)
            if waiting and (picture is None or clip.time <= middle):
                nearest = min(waiting, key=lambda frame: abs(frame.time - clip.time))
                picture = overlay.on(nearest.rgb(canvas))

        def every_keyframe() -> None:
            nonlocal frames
            held = HELD_BYTES // (video.width * video.height * 3 // 2)  # 8 bits, colour at half the resolution
            ahead = min(256, max(16, math.ceil(video.fps * every * runner.batch)))
            steps = ClipReader(video, sampler, max(0.0, start - sampler.lead), end + sampler.tail, ahead)
            stack.callback(steps.close)
            under_way: deque[Clip] = deque()  # complete, results not written
            pending: list[Clip] = []  # of these, not submitted

            def write_known(next_time: float) -> None:
                known = under_way[0].time if under_way else next_time
                while waiting and waiting[0].time < known - ROUNDING:
                    write(waiting.popleft())

            def take(results: list[tuple[Clip, ClipDetections]], next_time: float) -> None:
                for clip, found in results:
                    record(clip, found)
                    under_way.popleft()
                    write_known(next_time)
                    if stop.requested:
                        return

            for step in steps:
                for clip in step.clips:
                    pending.append(clip)
                    under_way.append(clip)
                    if len(pending) == runner.batch:
                        take(runner.submit(pending, threshold), step.next_time)
                        pending = []
                    if stop.requested:
                        break
                if stop.requested:
                    break
                if step.frame is None:
                    if pending:
                        take(runner.submit(pending, threshold), step.next_time)
                    take(runner.finish(), step.next_time)
                elif start - ROUNDING <= step.frame.time <= end:
                    if writer is None:
                        frames += 1
                    else:
                        waiting.append(step.frame)
                write_known(step.next_time)
                if len(waiting) > held:
                    take(runner.submit(pending, threshold) if pending else runner.finish(), step.next_time)
                    pending = []
                if step.frame is not None:
                    progress(step.frame.time, keyframes, frames)
            if stop.requested:
                return
            if not keyframes:
                raise CommandError(f"--start: no frame of {video.source} is shown at {start:g} s or later")
            while waiting:
                write(waiting.popleft())

        def newest_keyframe() -> LiveReader:
            nonlocal frames
            held = math.ceil(video.fps * HELD_SECONDS) if annotate else 0
            reader = LiveReader(video, sampler, end, held)
            stack.callback(reader.close)
            while not stop.requested:
                ended = reader.ended
                taken = reader.take(timeout=0.1)
                for frame in reader.take_frames():
                    write(frame)
                if writer is None:
                    frames = reader.came
                if taken is not None:
                    clip, seen = taken
                    for _, found in runner.submit([clip], threshold) + runner.finish():
                        record(clip, found, time.perf_counter() - seen)
                    progress(clip.time, keyframes, frames)
                elif ended:
                    break
            return reader

        if live:
            reader = newest_keyframe()
        else:
            every_keyframe()
        wall_seconds = time.perf_counter() - begin
        document.end(
            frames=frames,
            skipped_frames=video.skipped,
            **({} if reader is None else _dropped(reader)),
            interrupted=stop.requested,
            model_seconds=round(model_seconds, 4),
            wall_seconds=round(wall_seconds, 4),
            files={name: str(path) for name, path in files.items()},
        )
        interrupted = stop.requested
    return Result(
        files, keyframes, people, frames, video.skipped, model_seconds, wall_seconds, reader, interrupted, picture
    )


def open_video(source: Path | str) -> Video:
    return LiveVideo(str(source)) if is_live(str(source)) else Video(source)


def _dropped(reader: LiveReader) -> dict[str, int]:
    return {"dropped_keyframes": reader.dropped_clips, "dropped_frames": reader.dropped_frames}


# One clip


class _Placed(NamedTuple):
    """Detections, the boxes in parts of the picture."""

    boxes: list[list[float]]
    scores: list[float]
    actions: list[list[float]]


class _Person(NamedTuple):
    label: draw.Label
    actions: list[dict]


def _placed(found: ClipDetections) -> _Placed:
    height, width = found.size
    boxes = found.detections.boxes / found.detections.boxes.new_tensor([width, height, width, height])
    return _Placed(boxes.tolist(), found.detections.person_scores.tolist(), found.detections.action_scores.tolist())


def _people(found: _Placed, threshold: float, labels: tuple[str, ...], top: int, random: bool) -> list[_Person]:
    """Who reaches the threshold, highest score first. Of random weights, which tell nobody apart: the best three."""
    order = sorted(range(len(found.scores)), key=lambda row: -found.scores[row])
    rows = order[:3] if random else [row for row in order if found.scores[row] >= threshold]
    people = []
    for row in rows:
        scores = found.actions[row]
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top]
        actions = [{"id": index + 1, "label": labels[index], "score": round(scores[index], 4)} for index in best]
        label = draw.Label(found.boxes[row], found.scores[row], [(labels[index], scores[index]) for index in best])
        people.append(_Person(label, actions))
    return people


def _keyframe(seconds: float, people: list[_Person], found: ClipDetections, latency: float | None) -> dict:
    return {
        "time": round(seconds, 3),
        "tokens_kept": found.tokens,
        "model_seconds": round(found.seconds, 4),
        **({} if latency is None else {"latency_seconds": round(latency, 4)}),
        "people": [
            {
                "box": [round(value, 4) for value in person.label.box],
                "score": round(person.label.score, 4),
                "actions": person.actions,
            }
            for person in people
        ],
    }


# Results


class _Document:
    """The JSON file, written as detections come: memory does not grow with the video."""

    def __init__(self, file: IO[str]):
        self._file, self._first, self._ended = file, True, False

    def begin(self, **fields) -> None:
        head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in fields.items())
        self._write("{\n" + head + '"keyframes": [')

    def add(self, keyframe: dict) -> None:
        self._write(("\n" if self._first else ",\n") + json.dumps(keyframe))
        self._first = False

    def end(self, **fields) -> None:
        if self._ended:
            return
        self._ended = True
        tail = "".join(f",\n{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        self._write("\n]" + tail + "\n}\n")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


def _describe(video: Video) -> dict:
    return {
        "path": video.source,
        "width": video.width,
        "height": video.height,
        "fps": round(video.fps, 4),
        "duration": None if video.duration is None else round(video.duration, 4),
        "rotation": video.rotation,
        "sample_aspect_ratio": str(Fraction(video.sample_aspect_ratio)),
    }


def _middle(video: Video, start: float, end: float) -> float:
    last = end if video.duration is None else min(end, video.duration)
    return start if math.isinf(last) else (start + last) / 2


@contextmanager
def _progress(video: Video, start: float, end: float) -> Iterator[Callable[[float, int, int], None]]:
    """A bar on stderr with rates and time left; yields what is told the time reached, the keyframes and frames done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    last = end if video.duration is None else min(end, video.duration)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[reached]:.1f} s of video, {task.fields[rates]}, left"),
        TimeRemainingColumn(),
    )
    begin = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        total = None if math.isinf(last) else max(last - start, 1e-3)
        task = bar.add_task(Path(video.source).name, total=total, reached=0.0, rates="")

        def update(seconds: float, keyframes: int, frames: int) -> None:
            reached, passed = max(0.0, seconds - start), time.perf_counter() - begin
            rates = f"{keyframes / passed:.1f} clips/s, {frames / passed:.0f} frames/s"
            bar.update(task, completed=reached, reached=reached, rates=rates)

        yield update


def _report(result: Result) -> None:
    say(
        f"{'stopped after' if result.interrupted else 'done:'} {result.keyframes} keyframes, {result.people} people, "
        f"{result.frames} frames ({result.frames / result.wall_seconds:.0f}/s); "
        f"{result.seconds / max(result.keyframes, 1):.3f} s a clip in the model"
    )
    if result.live is not None:
        say(f"dropped to stay up to date: {result.live.dropped_clips} keyframes, {result.live.dropped_frames} frames")
    if result.skipped:
        say(f"{result.skipped} damaged frames were left out")
    for path in result.files.values():
        print(path)
