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
import torch

from .. import ava, draw
from ..data.media import VIDEOS
from ..video import ROUNDING, Clip, ClipSampler, Frame, Video, VideoError, VideoWriter, normalize, resize
from . import CommandError
from ._common import (
    Built,
    Stopper,
    add_model_arguments,
    add_size_argument,
    build,
    configuration,
    from_all_ranks,
    number,
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

Of several videos also detections.csv, all together. They are shared by the processes that torchrun starts; a video that
cannot be read is said and left out.

The annotated video has no sound. Ctrl-C stops after the clip under way and leaves these files whole up to there.
"""


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
        help="any file that FFmpeg reads, a folder of them, or a list of their paths (.txt, one a line)",
    )
    parser.add_argument("--out", type=Path, default=Path("evad_out"), metavar="DIR", help="folder [evad_out]")
    parser.add_argument(
        "--json", action="store_true", help="print the JSON on stdout, of several videos a list, and nothing else"
    )
    parser.add_argument("--no-video", action="store_true", help="write no annotated video")
    group = parser.add_argument_group("what to look at")
    group.add_argument(
        "--every", type=number(float, 0.01), default=1.0, metavar="SECONDS", help="from keyframe to keyframe [1]"
    )
    group.add_argument(
        "--start", type=number(float, 0), default=0.0, metavar="SECONDS", help="begin here, by seeking [0]"
    )
    group.add_argument("--end", type=number(float, 0), metavar="SECONDS", help="stop here [the end]")
    add_size_argument(group)
    group = parser.add_argument_group("what to report")
    group.add_argument(
        "--threshold", type=number(float, 0, 1), metavar="SCORE", help="least score of a person [the model's, 0.7]"
    )
    group.add_argument(
        "--top", type=number(int, 1), default=3, metavar="N", help="actions shown a person; the CSV has all [3]"
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
    paths = _videos(args.video)
    several = len(paths) > 1
    if not several:
        with Video(paths[0]) as video:
            _check_span(video, args.start, args.end)
    config, _ = configuration(args)
    placement(args)
    labels = read_labels(args.labels, config.num_classes, args.checkpoint)
    folder = writable_folder(args.out)
    with ranks() as (rank, world):
        built = build(args)
        if built.note and not rank:
            say(f"evad detect: {built.note}")
        files, failed, interrupted = [], [], False
        for path in paths[rank::world]:
            try:
                with Video(path) as video:
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
            say(f"evad detect: {len(failed)} of {len(paths)} videos could not be read")
        return 130 if interrupted else 2 if failed else 0


def _videos(words: list[str]) -> list[Path]:
    """The videos that are meant: files, those in folders, and those that a list (.txt, one a line) names."""
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
                lines = path.read_text(encoding="utf-8").splitlines()
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
    if video.duration is not None and start > video.duration:
        raise CommandError(f"--start: {start:g} s is after the end of {video.path} ({video.duration:.2f} s)")
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
    interrupted: bool
    picture: np.ndarray | None  # an annotated keyframe, about the middle


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
) -> Result:
    """Run the model around every keyframe of ``video`` and write the files; the options are those of the command."""
    config = built.config
    size = config.short_side if size is None else size
    threshold = config.person_threshold if threshold is None else threshold
    end = math.inf if end is None else end
    stem = video.path.stem
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
        prepare=lambda frame: resize(frame.rgb(), size),
    )
    note = "" if built.weights not in ("random", "partial") else f"{built.weights} weights: this means nothing yet"
    overlay = draw.Overlay(*canvas, [], note)
    waiting: deque[Frame] = deque()  # frames whose keyframe's boxes are not known yet
    keyframes = people = frames = 0
    model_seconds = 0.0
    picture, middle = None, _middle(video, start, end)

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

        def write_known() -> None:
            nonlocal frames
            while waiting and waiting[0].time < sampler.next_time - ROUNDING:
                frame = waiting.popleft()
                frames += 1
                if writer is not None:
                    writer.write(overlay.on(frame.rgb(canvas)), max(0.0, frame.time - start))

        def handle(clips: Iterator[Clip]) -> None:
            nonlocal overlay, keyframes, people, model_seconds, picture
            for clip in clips:
                found = _run_model(built, clip, threshold)
                model_seconds += found.seconds
                keyframes += 1
                csv_writer.write(stem, clip.time, found.boxes, found.actions)
                shown = _people(found, threshold, labels, top, built.weights == "random")
                people += len(shown)
                document.add(_keyframe(clip.time, shown, found))
                overlay = draw.Overlay(*canvas, [person.label for person in shown], note)
                if waiting and (picture is None or clip.time <= middle):
                    nearest = min(waiting, key=lambda frame: abs(frame.time - clip.time))
                    picture = overlay.on(nearest.rgb(canvas))
                write_known()
                if stop.requested:
                    return

        for frame in video.frames(max(0.0, start - sampler.lead)):
            handle(sampler.push(frame))
            if stop.requested or frame.time > end + sampler.tail:
                break
            if start - ROUNDING <= frame.time <= end:
                waiting.append(frame)
            write_known()
            progress(frame.time, keyframes)
        if not stop.requested:
            handle(sampler.finish())
        if not stop.requested:
            if not keyframes:
                raise CommandError(f"--start: no frame of {video.path} is shown at {start:g} s or later")
            write_known()
        document.end(
            frames=frames,
            skipped_frames=video.skipped,
            interrupted=stop.requested,
            model_seconds=round(model_seconds, 4),
            files={name: str(path) for name, path in files.items()},
        )
        interrupted = stop.requested
    return Result(files, keyframes, people, frames, video.skipped, model_seconds, interrupted, picture)


# One clip


class _Found(NamedTuple):
    boxes: list[list[float]]  # in parts of the picture
    scores: list[float]
    actions: list[list[float]]
    tokens: list[int]  # kept after each pruning layer
    seconds: float


class _Person(NamedTuple):
    label: draw.Label
    actions: list[dict]


@torch.inference_mode()
def _run_model(built: Built, clip: Clip, threshold: float) -> _Found:
    from ..detector import select_detections

    config = built.config
    begin = time.perf_counter()
    pixels = normalize(clip.samples, config.pixel_mean, config.pixel_std).to(built.device, built.dtype)
    height, width = pixels.shape[-2:]
    output = built.model([pixels])
    detections = select_detections(output, [(height, width)], threshold)[0]
    boxes = detections.boxes.float() / detections.boxes.new_tensor([width, height, width, height], dtype=torch.float32)
    return _Found(
        boxes.tolist(),
        detections.person_scores.tolist(),
        detections.action_scores.tolist(),  # which also waits for the device
        [positions.shape[1] for positions in output.kept],
        time.perf_counter() - begin,
    )


def _people(found: _Found, threshold: float, labels: tuple[str, ...], top: int, random: bool) -> list[_Person]:
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


def _keyframe(seconds: float, people: list[_Person], found: _Found) -> dict:
    return {
        "time": round(seconds, 3),
        "tokens_kept": found.tokens,
        "model_seconds": round(found.seconds, 4),
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
        "path": str(video.path),
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
def _progress(video: Video, start: float, end: float) -> Iterator[Callable[[float, int], None]]:
    """A bar on stderr with rate and time left; yields what is told the time reached and the keyframes done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    last = end if video.duration is None else min(end, video.duration)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[reached]:.1f} s of video, {task.fields[rate]:.1f} clips/s, left"),
        TimeRemainingColumn(),
    )
    begin = time.perf_counter()
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        total = None if math.isinf(last) else max(last - start, 1e-3)
        task = bar.add_task(video.path.name, total=total, reached=0.0, rate=0.0)

        def update(seconds: float, keyframes: int) -> None:
            reached = max(0.0, seconds - start)
            rate = keyframes / (time.perf_counter() - begin)
            bar.update(task, completed=reached, reached=reached, rate=rate)

        yield update


def _report(result: Result) -> None:
    say(
        f"{'stopped after' if result.interrupted else 'done:'} {result.keyframes} keyframes, {result.people} people, "
        f"{result.frames} frames; {result.seconds / max(result.keyframes, 1):.3f} s a clip in the model"
    )
    if result.skipped:
        say(f"{result.skipped} damaged frames were left out")
    for path in result.files.values():
        print(path)
