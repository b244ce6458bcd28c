"""Average precision of detections: matching to ground truth, precision and recall, per class.

One rule for all protocols (PASCAL VOC 2010 as TensorFlow's and AVA's evaluators have it). A detection looks at the one
ground truth of its image and class that it overlaps most. It is right if their IoU reaches the threshold and no earlier
detection was right about that ground truth; a second-best ground truth is never tried. Detections are taken in the
order given, or best score first. AP is the area under the precision-recall curve, precision made monotone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

STRICT = tuple(np.linspace(0.5, 0.95, 10))  # the IoU thresholds that STRICT evaluation averages over


class Boxes(NamedTuple):
    """Boxes of many images: detections, or ground truth (whose scores nobody reads)."""

    image: np.ndarray  # [N] int64, which image (or video)
    label: np.ndarray  # [N] int64, which class
    box: np.ndarray  # [N, 4] float64: x1, y1, x2, y2 (or, for tubes, the row of a table)
    score: np.ndarray  # [N] float64

    def take(self, rows: np.ndarray) -> Boxes:
        """Some of them: a mask, or an index."""
        return Boxes(*(field[rows] for field in self))


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes with their counterparts, both [N, 4]; 0 where either has no area."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clip(0).prod(1)
    areas = sum((box[:, 2:] - box[:, :2]).clip(0).prod(1) for box in (a, b))
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(shared / (areas - shared))


def best_match(
    detections: Boxes, truth: Boxes, overlap: Callable[[np.ndarray, np.ndarray], np.ndarray] = iou
) -> tuple[np.ndarray, np.ndarray]:
    """The ground truth of the same image and class that each detection overlaps most.

    Returns:
        Row in ``truth`` [N], of equals the first, -1 where there is none; and the overlap [N].
    """
    labels = max(detections.label.max(initial=0), truth.label.max(initial=0)) + 1
    wanted, held = (boxes.image * labels + boxes.label for boxes in (detections, truth))
    order = held.argsort(kind="stable")
    first, last = (np.searchsorted(held[order], wanted, side) for side in ("left", "right"))
    count = last - first
    row, best = np.full(len(wanted), -1), np.zeros(len(wanted))
    some = np.nonzero(count)[0]
    for part in np.array_split(some, len(some) // 500_000 + 1):
        if not len(part):
            continue
        number = count[part]
        begin = np.cumsum(number) - number
        pairs = np.arange(number.sum()) - np.repeat(begin - first[part], number)
        value = overlap(np.repeat(detections.box[part], number, 0), truth.box[order[pairs]])
        best[part] = np.maximum.reduceat(value, begin)
        place = np.where(value == np.repeat(best[part], number), pairs, len(held))
        row[part] = order[np.minimum.reduceat(place, begin)]
    return row, best


def average_precision(
    detections: Boxes,
    truth: Boxes,
    labels: Sequence[int],
    thresholds: Sequence[float] = (0.5,),
    *,
    order: str = "score",
    overlap: Callable[[np.ndarray, np.ndarray], np.ndarray] = iou,
) -> np.ndarray:
    """AP of every class at every threshold.

    Args:
        detections, truth: Boxes; those of other classes than ``labels`` are left out.
        labels: The classes.
        thresholds: IoU from which a detection is right.
        order: In which detections take ground truth: "file" (as given) or "score" (best first; equals as given).
        overlap: IoU of two arrays of boxes, row by row.
    Returns:
        [thresholds, labels] in [0, 1]: 0 for a class without detections, NaN for one without ground truth.
    """
    if order not in ("file", "score"):
        raise ValueError(f"average_precision: order must be 'file' or 'score', got {order!r}")
    ranking = (-detections.score).argsort(kind="stable")
    row, best = best_match(detections, truth, overlap)
    result = np.full((len(thresholds), len(labels)), np.nan)
    for number, threshold in enumerate(thresholds):
        right = np.zeros(len(row), bool)
        taking = ranking if order == "score" else np.arange(len(row))
        taking = taking[(best[taking] >= threshold) & (row[taking] >= 0)]
        right[taking[np.unique(row[taking], return_index=True)[1]]] = True
        for column, label in enumerate(labels):
            total = (truth.label == label).sum()
            if total:
                hits = right[ranking[detections.label[ranking] == label]]
                result[number, column] = area_under_curve(hits, total)
    return result


def area_under_curve(hits: np.ndarray, total: int) -> float:
    """AP of detections, best first, that are ``hits`` or not, of ``total`` ground truths."""
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * hits).sum() / total)
