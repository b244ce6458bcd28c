"""AVA v2.1 and v2.2, and any data in AVA's format.

A CSV of annotations (video_id, timestamp, x1, y1, x2, y2, action_id, person_id; boxes in parts of the picture), a label
map, lists of excluded timestamps; videos, or folders of their frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..ava import Classes, Row, read_classes, read_rows, read_seconds
from ..problems import DataError, Problems
from ..video import MAX_SIZE
from .clips import Clips, Entry
from .media import Sampling, find


def read_ava(
    split: str,
    *,
    annotations: str,
    media: str,
    labels: str | None = None,
    exclude: str | None = None,
    start: float = 900.0,
    fps: float = 30.0,
    on_error: str = "fail",
    flip: float = 0.5,
    seed: int = 0,
    short_sides: Sequence[int] | None = None,
    max_size: int = MAX_SIZE,
    num_frames: int = 16,
    frame_stride: int = 4,
    frame_rate: float = 30.0,
    short_side: int = 224,
    pixel_mean: float = 0.45,
    pixel_std: float = 0.225,
) -> Clips:
    """AVA's clips: one around every annotated second.

    Args:
        split: "train" augments, and leaves out seconds without a box; others do neither.
        annotations: CSV file.
        media: Folder that has, for a video id, a folder of numbered frames or a video file of that name.
        labels: Label map, as ``evad.ava.read_classes`` takes it; None for AVA's 80 actions, of which 60 are evaluated.
        exclude: CSV of excluded timestamps.
        start: Timestamp at which the videos, or frames, begin: 900 for frames of minutes 15 to 30.
        fps: Frames a second in folders; a video file has its own.
        on_error: "fail", or "skip" and count what cannot be used.
        flip: Probability of a mirror image, in training. 0 for classes that tell left from right; their names warn.
        seed: Of augmentation.
        short_sides: Pixels; in training one of them at random. None for ``short_side``.
        max_size: Pixels of the long side at most.
        num_frames, frame_stride, frame_rate, short_side, pixel_mean, pixel_std: What the model needs.
    Raises:
        DataError: what is missing or wrong; file and line are named.
    """
    problems, root = Problems(on_error), Path(media)
    if not root.is_dir():
        raise DataError(f"{media}: is not a folder (media)")
    classes = _read_classes(labels)
    names = classes.labels
    excluded = read_seconds(exclude) if exclude else set()
    people: dict[tuple[str, float], dict[tuple[str, ...], set[int]]] = {}  # key -> box as written -> actions
    paths: dict[str, Path | None] = {}
    for row in read_rows(annotations, problems):
        key = row.video, row.second
        if key in excluded:
            continue
        where = f"{annotations}, line {row.line}"
        if row.video not in paths:
            paths[row.video] = find(root, row.video)
            if paths[row.video] is None:
                problems(f"{where}: {root} has no video or folder {row.video!r}")
        if paths[row.video] is None:
            continue
        if row.second < start:
            problems(f"{where}: the timestamp {row.second:g} is before the videos begin (start {start:g})")
            continue
        boxes = people.setdefault(key, {})
        if not row.place:
            continue
        if wrong := _wrong(row, classes):
            problems(f"{where}: {wrong}")
            continue
        boxes.setdefault(row.place, set()).add(row.action)
    training = split == "train"
    entries = [
        Entry(key, paths[key[0]], key[1] - start, *_arrays(boxes, len(names)))
        for key, boxes in people.items()
        if boxes or not training
    ]
    if not entries:
        raise DataError(f"{annotations}: has no keyframe that can be used")
    return Clips(
        entries,
        names,
        Sampling(num_frames, frame_stride, frame_rate, fps),
        counted=classes.counted,
        problems=problems,
        short_sides=short_sides if training and short_sides else [short_side],
        max_size=max_size,
        flip=flip if training else 0.0,
        seed=seed,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )


def read_csv(split: str, *, annotations: str, media: str, labels: str, start: float = 0.0, **options) -> Clips:
    """Data of one's own in AVA's format: as ``read_ava``, with its own labels and timestamps from the beginning."""
    return read_ava(split, annotations=annotations, media=media, labels=labels, start=start, **options)


def _wrong(row: Row, classes: Classes) -> str:
    """What is wrong with a line of annotations, or ""."""
    if row.action not in classes.names:
        mapped = ", and in the label map" * (len(classes.names) < len(classes.labels))
        return f"action_id must be in [1, {len(classes.labels)}]{mapped}, got {row.action}"
    return row.wrong


def _arrays(boxes: dict[tuple[str, ...], set[int]], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((len(boxes), num_classes), np.float32)
    for row, actions in enumerate(boxes.values()):
        labels[row, [action - 1 for action in actions]] = 1
    return np.array([list(map(float, place)) for place in boxes], np.float64).reshape(-1, 4), labels


def _read_classes(path: str | None) -> Classes:
    try:
        return read_classes(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror} (labels)") from error
    except ValueError as error:
        raise DataError(str(error)) from error
