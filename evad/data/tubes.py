"""UCF101-24 and JHMDB: every frame of a video annotated, as tubes of boxes.

Their annotations come as the pickles that Kalogeiton et al. published with the action tubelet detector (ICCV 2017):
``labels``, ``gttubes`` (video -> class -> arrays of frame, x1, y1, x2, y2 with frames from 1), ``nframes``,
``resolution`` (height, width), ``train_videos`` and ``test_videos`` (one list a fold).
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..problems import DataError, Problems
from ..video import MAX_SIZE
from .clips import Clips, Entry
from .media import Sampling, find


class Tube(NamedTuple):
    """One person's boxes in some frames of a video."""

    frames: np.ndarray  # [n] int64, from 1, ascending
    boxes: np.ndarray  # [n, 4] x1, y1, x2, y2; in annotations in parts of the picture, where they may reach outside


class Annotations(NamedTuple):
    labels: tuple[str, ...]
    tubes: dict[str, list[tuple[int, Tube]]]  # video -> (class from 1, tube)
    frames: dict[str, int]  # video -> number of frames
    sizes: dict[str, tuple[int, int]]  # video -> height, width
    train: tuple[tuple[str, ...], ...]  # a list of videos a fold
    test: tuple[tuple[str, ...], ...]

    def videos(self, split: str, fold: int) -> tuple[str, ...]:
        """Videos of a fold (from 1)."""
        folds = self.train if split == "train" else self.test
        if not 1 <= fold <= len(folds):
            raise DataError(f"fold must be in [1, {len(folds)}], as the annotations have them, got {fold}")
        return folds[fold - 1]

    def within(self, frames: Collection[tuple[str, int]]) -> Annotations:
        """What is annotated in some frames, (video, frame from 1)."""
        tubes: dict[str, list[tuple[int, Tube]]] = {}
        for video, some in self.tubes.items():
            for label, tube in some:
                there = np.array([(video, frame) in frames for frame in tube.frames.tolist()], bool)
                if there.any():
                    tubes.setdefault(video, []).append((label, Tube(tube.frames[there], tube.boxes[there])))
        return self._replace(tubes=tubes)


def read_annotations(path: str | Path, problems: Problems | None = None) -> Annotations:
    """Read a pickle of annotations; nothing but arrays and plain containers can come out of it.

    Raises:
        DataError: the file is missing, holds other things, or (policy "fail") a box or a frame that cannot be.
    """
    problems = Problems() if problems is None else problems
    content = _load(path)
    if not isinstance(content, dict) or not _KEYS.issubset(content):
        raise DataError(f"{path}: must be a dictionary with {', '.join(sorted(_KEYS))}")
    try:
        labels = tuple(str(label) for label in content["labels"])
        tubes = {
            str(video): [
                (int(label) + 1, tube)
                for label, rows in by_label.items()
                for number, array in enumerate(rows)
                if (tube := _tube(array, content["resolution"][video], f"{path}: {video}, tube {number}", problems))
            ]
            for video, by_label in content["gttubes"].items()
        }
        frames = {str(video): int(number) for video, number in content["nframes"].items()}
        sizes = {str(video): (int(height), int(width)) for video, (height, width) in content["resolution"].items()}
        folds = [tuple(tuple(map(str, videos)) for videos in content[key]) for key in ("train_videos", "test_videos")]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: is not laid out as annotations of tubes ({type(error).__name__}: {error})") from error
    for video, some in tubes.items():
        if any(not 1 <= label <= len(labels) for label, _ in some):
            raise DataError(f"{path}: {video} has a class that labels does not have")
    return Annotations(labels, tubes, frames, sizes, *folds)


_KEYS = {"labels", "gttubes", "nframes", "resolution", "train_videos", "test_videos"}


def _tube(array, resolution, where: str, problems: Problems) -> Tube | None:
    array = np.asarray(array, np.float64)
    if array.ndim != 2 or array.shape[1] != 5:
        raise ValueError(f"a tube must be [n, 5], got {list(array.shape)}")
    height, width = resolution
    boxes, frames = array[:, 1:] / [width, height, width, height], array[:, 0]
    seen = boxes.clip(0, 1)
    inside = np.isfinite(array).all(1) & (seen[:, :2] < seen[:, 2:]).all(1)
    once = np.isin(np.arange(len(frames)), np.unique(frames, return_index=True)[1])
    numbered = (frames >= 1) & (frames == np.floor(frames)) & once
    for frame in frames[~inside]:
        problems(f"{where}, frame {frame:g}: the box is empty or outside of the picture")
    for frame in frames[inside & ~numbered]:
        problems(f"{where}, frame {frame:g}: frames must be different whole numbers from 1")
    good = inside & numbered
    order = array[good, 0].argsort(kind="stable")
    return Tube(array[good, 0][order].astype(np.int64), boxes[good][order]) if good.any() else None


def _load(path: str | Path):
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, encoding="latin1").load()  # written by Python 2
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: is not a pickle that can be read ({error})") from error


class _Unpickler(pickle.Unpickler):
    """Admits what arrays and plain containers need, and nothing that could run code."""

    ADMITTED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("multiarray", "_reconstruct"),
            ("multiarray", "scalar"),
            ("numeric", "_frombuffer"),
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("builtins", "frozenset"),
        }
    )

    def find_class(self, module: str, name: str):
        short = {"__builtin__": "builtins"}.get(module, module)
        for prefix in ("numpy.core.", "numpy._core."):
            short = short.removeprefix(prefix)
        if (short, name) not in self.ADMITTED or (
            short in ("multiarray", "numeric") and not module.startswith("numpy.")
        ):
            raise DataError(f"holds {module}.{name}, which annotations do not need; it is not loaded")
        if short in ("multiarray", "numeric"):  # numpy 2 moved them
            root = "numpy._core" if hasattr(np, "_core") else "numpy.core"
            return getattr(importlib.import_module(f"{root}.{short}"), name)
        return getattr(importlib.import_module(short), name)


class TubeClips(Clips):
    """Clips that know their tubes, for video mAP."""

    annotations: Annotations
    fold: int
    every: int  # each how-manieth frame they have


def read_tubes(
    split: str,
    *,
    annotations: str,
    media: str,
    fold: int = 1,
    every: int = 1,
    on_error: str = "fail",
    flip: float = 0.5,
    seed: int = 0,
    short_sides: Sequence[int] | None = None,
    max_size: int = MAX_SIZE,
    num_frames: int = 16,
    frame_stride: int = 4,
    short_side: int = 224,
    pixel_mean: float = 0.45,
    pixel_std: float = 0.225,
) -> TubeClips:
    """Clips of UCF101-24 or JHMDB: in training around annotated frames, else around every frame.

    Args:
        split: "train" (augmented), or any other name for the videos of the test.
        annotations: The pickle (UCF101v2-GT.pkl, JHMDB-GT.pkl).
        media: Folder that has, for a video's name, a folder of numbered frames or a video file.
        fold: Which of the splits that the annotations have, from 1.
        every: Take only each ``every``-th frame. Video mAP needs all.
        on_error: "fail", or "skip" and count what cannot be used.
        flip, seed, short_sides, max_size: As for ``read_ava``.
        num_frames, frame_stride, short_side, pixel_mean, pixel_std: What the model needs. ``frame_stride`` counts the
            videos' own frames, as published: the model's ``frame_rate`` should be theirs, or ``evad detect`` sees
            clips of another pace.
    Raises:
        DataError: what is missing or wrong, and where.
    """
    problems, root, training = Problems(on_error), Path(media), split == "train"
    if not root.is_dir():
        raise DataError(f"{media}: is not a folder (media)")
    if every < 1:
        raise DataError(f"every must be at least 1, got {every}")
    known = read_annotations(annotations, problems)
    entries = []
    for video in known.videos(split, fold):
        path = find(root, video)
        if path is None:
            problems(f"{annotations}: {root} has no video or folder {video!r}")
            continue
        boxes: dict[int, list[tuple[int, np.ndarray]]] = {}
        for label, tube in known.tubes.get(video, ()):
            for frame, box in zip(tube.frames.tolist(), tube.boxes, strict=True):
                boxes.setdefault(frame, []).append((label, box))
        frames = sorted(boxes) if training else range(1, known.frames.get(video, 0) + 1)
        for frame in frames[::every]:
            people = boxes.get(frame, ())
            table = np.array([box for _, box in people], np.float64).reshape(-1, 4).clip(0, 1)
            labels = np.eye(len(known.labels), dtype=np.float32)[[label - 1 for label, _ in people]]
            entries.append(Entry((video, float(frame)), path, frame - 1, table, labels))
    if not entries:
        raise DataError(f"{annotations}: has no keyframe that can be used")
    clips = TubeClips(
        entries,
        known.labels,
        Sampling(num_frames, frame_stride, by_frame=True),
        problems=problems,
        short_sides=short_sides if training and short_sides else [short_side],
        max_size=max_size,
        flip=flip if training else 0.0,
        seed=seed,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
    )
    clips.annotations, clips.fold, clips.every = known, fold, every
    return clips
