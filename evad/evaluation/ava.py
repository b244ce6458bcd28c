"""Frame mAP as AVA is scored.

``match_order="file"`` is the evaluator released with EVAD: detections take ground truth in the order of the file, and
all of them count. ``match_order="score"`` is ActivityNet's own get_ava_performance.py: best score first, and only the
50 best labelled boxes of an image count. Detections of one image in descending order of score give the same in both.
Of equal scores the first ranks first; both evaluators leave that to a sort that is not stable.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..ava import EVALUATED, read_rows
from ..problems import Problems
from .average_precision import STRICT, Boxes, ScoredBoxes, average_precision, mean

CAPACITY = 50  # labelled boxes of an image that ActivityNet's script keeps


class AvaScores(NamedTuple):
    """Fractions, in [0, 1]."""

    labels: tuple[int, ...]
    ap: np.ndarray  # [labels] at IoU 0.5: 0 without detections, NaN without ground truth
    strict: np.ndarray  # [10] mAP at IoU 0.5, 0.55, ... 0.95
    truths: np.ndarray  # [labels] number of ground truths
    detections: np.ndarray  # [labels] number of detections

    @property
    def mean(self) -> float:
        """mAP at IoU 0.5, over classes that have ground truth; NaN where none has."""
        return mean(self.ap)

    def summary(self) -> dict[str, float]:
        """The numbers to log."""
        return {"mAP@0.5": self.mean, "mAP@0.5:0.95": float(self.strict.mean())}


def evaluate_ava(
    detections: Boxes | ScoredBoxes,
    truth: Boxes,
    labels: Sequence[int] = EVALUATED,
    *,
    excluded: Collection[int] = (),
    match_order: str = "file",
    capacity: int | None = None,
) -> AvaScores:
    """Score detections.

    Args:
        detections, truth: With one numbering of images. Other classes and excluded images are left out, and detections
            of no width or height.
        labels: The classes that count.
        excluded: Images that do not count.
        match_order: "file" or "score", see above.
        capacity: Labelled boxes of an image that count, best first; 0 for all; None for 50 with "score", else all.
    """
    if capacity is None:
        capacity = CAPACITY if match_order == "score" else 0
    detections, truth = (boxes.take(~np.isin(boxes.image, list(excluded))) for boxes in (detections, truth))
    if capacity:
        detections = _best(detections, labels, capacity)
    detections = detections.take((detections.box[:, :2] < detections.box[:, 2:]).all(1))
    ap = average_precision(detections, truth, labels, STRICT, order=match_order)
    counts = [np.array([len(boxes.of(label).image) for label in labels]) for boxes in (truth, detections)]
    return AvaScores(tuple(labels), ap[0], np.array([mean(row) for row in ap]), *counts)


def _best(boxes: Boxes | ScoredBoxes, labels: Sequence[int], capacity: int) -> Boxes:
    """The best ``capacity`` labelled boxes of every image, of classes ``labels``; of equals the first."""
    if isinstance(boxes, ScoredBoxes):
        return _best_of_scored(boxes, labels, capacity)
    boxes = boxes.take(np.isin(boxes.label, labels))
    order = np.lexsort((-boxes.score, boxes.image))
    image = boxes.image[order]
    rank = np.arange(len(image)) - np.searchsorted(image, image)
    keep = np.zeros(len(image), bool)
    keep[order[rank < capacity]] = True
    return boxes.take(keep)


def _best_of_scored(boxes: ScoredBoxes, labels: Sequence[int], capacity: int) -> Boxes:
    """The same, image by image: all of their rows at a time may not fit in memory."""
    columns = np.array(sorted({label - 1 for label in labels if 1 <= label <= boxes.scores.shape[1]}), np.int64)
    order, kept = boxes.image.argsort(kind="stable"), [np.zeros((2, 0), np.int64)]
    for rows in np.split(order, np.flatnonzero(np.diff(boxes.image[order])) + 1):
        flat = (-boxes.scores[np.ix_(rows, columns)]).ravel().argsort(kind="stable")[:capacity]
        if len(flat):
            row, column = np.divmod(flat, len(columns))
            kept.append(np.stack([rows[row], columns[column]]))
    row, column = np.concatenate(kept, 1)
    row, column = np.stack([row, column])[:, np.lexsort((column, row))]
    return Boxes(boxes.image[row], column + 1, boxes.box[row], boxes.scores[row, column].astype(np.float64))


def read_boxes(
    path: str | Path,
    images: dict[tuple[str, float], int],
    problems: Problems | None = None,
    *,
    truth: bool = False,
    frames: bool = False,
) -> Boxes:
    """Boxes of a CSV in AVA's format; ``images`` numbers (video id, second), and new ones are added to it.

    Args:
        truth: They are ground truth, whose boxes must lie in the picture and have an area; detections may be anything.
        frames: Timestamps are numbers of frames, from 1.
    Raises:
        DataError: see ``evad.ava.read_rows``; a box or a frame that cannot be.
    """
    problems = Problems() if problems is None else problems
    image, label, box, score = [], [], [], []
    for row in read_rows(path, problems):
        if frames and not (row.second >= 1 and row.second.is_integer()):
            problems(f"{path}, line {row.line}: the timestamp must be a frame's number, from 1, got {row.second:g}")
            continue
        number = images.setdefault((row.video, row.second), len(images))
        if truth and row.place and row.wrong:
            problems(f"{path}, line {row.line}: {row.wrong}")
        elif row.place:
            image.append(number)
            label.append(row.action)
            box.append(row.box)
            score.append(row.score)
    table = np.array(box, np.float64).reshape(-1, 4)
    return Boxes(np.array(image, np.int64), np.array(label, np.int64), table, np.array(score, np.float64))
