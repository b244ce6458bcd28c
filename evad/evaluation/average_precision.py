"""Average precision of detections: matching to ground truth, precision and recall, per class.

Two rules. AVA's is PASCAL VOC 2010's as TensorFlow has it: a detection looks at the one ground truth of its image and
class that it overlaps most, and is right if their IoU reaches the threshold and no earlier detection was right about
that one; a second-best ground truth is never tried. AP is the area under the precision-recall curve, precision made
monotone. That of UCF101-24 and JHMDB (``second_best``, ``trapezoids``; see ``tubes``) differs in both.

Detections are taken in the order given, or best score first. Classes are dealt with one after the other, so that what
is in memory at a time is one class's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

Overlap = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of two arrays, row by row
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

    def of(self, label: int) -> Boxes:
        """Those of one class, in their order."""
        return self.take(self.label == label)


class ScoredBoxes(NamedTuple):
    """Boxes of many images, each detected as every class: what a detector gives.

    ``Boxes`` of the same would have a row for each class, 56 bytes a score.
    """

    image: np.ndarray  # [N] int64, which image
    box: np.ndarray  # [N, 4] float64: x1, y1, x2, y2
    scores: np.ndarray  # [N, classes], of classes 1, 2, ...

    def take(self, rows: np.ndarray) -> ScoredBoxes:
        """Some of them: a mask, or an index."""
        return ScoredBoxes(*(field[rows] for field in self))

    def of(self, label: int) -> Boxes:
        """As one class: all of them, in their order; none for a class that has no scores."""
        if not 1 <= label <= self.scores.shape[1]:
            return Boxes(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
        return Boxes(
            self.image, np.full(len(self.image), label), self.box, self.scores[:, label - 1].astype(np.float64)
        )


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes with their counterparts, both [N, 4]; 0 where either has no area."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clip(0).prod(1)
    areas = sum((box[:, 2:] - box[:, :2]).clip(0).prod(1) for box in (a, b))
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(shared / (areas - shared))


def mean(ap: np.ndarray) -> float:
    """Mean over classes with ground truth, NaN where there is none."""
    known = ap[~np.isnan(ap)]
    return float(known.mean()) if len(known) else float("nan")


def meetings(wanted: np.ndarray, held: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows of two arrays of keys that are equal, in parts that fit in memory.

    Yields:
        Rows of ``wanted`` that meet any, ascending [n]; how many each meets [n]; and which rows of ``held``, those of
        one row of ``wanted`` ascending, [sum of these numbers].
    """
    order = held.argsort(kind="stable")
    first, last = (np.searchsorted(held[order], wanted, side) for side in ("left", "right"))
    count = last - first
    some = np.nonzero(count)[0]
    for part in np.array_split(some, len(some) // 500_000 + 1):
        if len(part):
            number = count[part]
            begin = np.cumsum(number) - number
            yield part, number, order[np.arange(number.sum()) - np.repeat(begin - first[part], number)]


def near(
    wanted: np.ndarray,
    held: np.ndarray,
    boxes: np.ndarray,
    others: np.ndarray,
    least: float,
    overlap: Overlap = iou,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of equal keys (rows of ``wanted``, ascending, and of ``held``) that overlap by ``least``, and how much.

    Args:
        wanted, held: Keys, [N] and [M].
        boxes, others: What they are of, [N, ...] and [M, ...].
    """
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for some, number, theirs in meetings(wanted, held):
        mine = np.repeat(some, number)
        value = overlap(boxes[mine], others[theirs])
        good = value >= least
        parts.append((mine[good], theirs[good], value[good]))
    mine, theirs, value = map(np.concatenate, zip(*parts, strict=True))
    return mine, theirs, value


def take_turns(group: np.ndarray, taker: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Who gets what, if takers choose one after the other, each the first of its pairs that is still to be had.

    Every round settles one pair in each group, so there are as many rounds as things to take in the fullest one.

    Args:
        group, taker, taken: Pairs [n], int from 0; those of a group together, takers in their turn, and those of a
            taker from what it wants most. Groups share neither takers nor what they take.
    Returns:
        The pairs that come about.
    """
    served, gone = (np.zeros(some.max(initial=-1) + 1, bool) for some in (taker, taken))
    left, settled = np.arange(len(group)), [np.zeros(0, np.int64)]
    while len(left):
        now = left[np.diff(group[left], prepend=-1) != 0]
        served[taker[now]] = gone[taken[now]] = True
        settled.append(now)
        left = left[~served[taker[left]] & ~gone[taken[left]]]
    return np.concatenate(settled)


def best_match(detections: Boxes, truth: Boxes, overlap: Overlap = iou) -> tuple[np.ndarray, np.ndarray]:
    """The ground truth of the same image that each detection of a class overlaps most.

    Returns:
        Row in ``truth`` [N], of equals the first, -1 where there is none; and the overlap [N].
    """
    row, best = np.full(len(detections.image), -1), np.zeros(len(detections.image))
    for part, number, theirs in meetings(detections.image, truth.image):
        begin = np.cumsum(number) - number
        value = overlap(np.repeat(detections.box[part], number, 0), truth.box[theirs])
        best[part] = np.maximum.reduceat(value, begin)
        place = np.where(value == np.repeat(best[part], number), theirs, len(truth.image))
        row[part] = np.minimum.reduceat(place, begin)
    return row, best


class Pairs(NamedTuple):
    """Detections with ground truth that they overlap: as ``take_turns`` wants them."""

    group: np.ndarray  # [n] image
    detection: np.ndarray  # [n]
    truth: np.ndarray  # [n]
    overlap: np.ndarray  # [n]


def good_matches(detections: Boxes, truth: Boxes, taking: np.ndarray, least: float, overlap: Overlap = iou) -> Pairs:
    """All pairs of one image, of a class, that overlap by ``least``; of equals the first ground truth is wanted most.

    Args:
        taking: Detections in their turn, [N].
    """
    mine, theirs, value = near(detections.image, truth.image, detections.box, truth.box, least, overlap)
    turn = np.empty(len(taking), np.int64)
    turn[taking] = np.arange(len(taking))
    image = detections.image[mine]
    order = np.lexsort((theirs, -value, turn[mine], image))
    return Pairs(*(field[order] for field in (image, mine, theirs, value)))


def area_under_curve(hits: np.ndarray, total: int) -> float:
    """AP of detections, best first, that are ``hits`` or not, of ``total`` ground truths."""
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((precision * hits).sum() / total)


def trapezoids(hits: np.ndarray, total: int) -> float:
    """The same by straight lines from one point of the curve to the next, the first from precision 1 at recall 0."""
    precision = np.append(1, np.cumsum(hits) / np.arange(1, len(hits) + 1))
    return float(((precision[1:] + precision[:-1]) * hits).sum() / (2 * total))


def average_precision(
    detections: Boxes | ScoredBoxes,
    truth: Boxes,
    labels: Sequence[int],
    thresholds: Sequence[float] = (0.5,),
    *,
    order: str = "score",
    overlap: Overlap = iou,
    second_best: bool = False,
    area: Callable[[np.ndarray, int], float] = area_under_curve,
) -> np.ndarray:
    """AP of every class at every threshold.

    Args:
        detections, truth: Boxes; those of other classes than ``labels`` are left out.
        labels: The classes.
        thresholds: IoU from which a detection is right.
        order: In which detections take ground truth: "file" (as given) or "score" (best first; equals as given).
        overlap: IoU of two arrays of boxes, row by row.
        second_best: A ground truth that is taken is out of sight of later detections, which look at what is left.
        area: AP of detections that are right or not, best first, and a number of ground truths.
    Returns:
        [thresholds, labels] in [0, 1]: 0 for a class without detections, NaN for one without ground truth.
    """
    if order not in ("file", "score"):
        raise ValueError(f"average_precision: order must be 'file' or 'score', got {order!r}")
    result = np.full((len(thresholds), len(labels)), np.nan)
    for column, label in enumerate(labels):
        theirs = truth.of(label)
        if not len(theirs.image):
            continue
        mine = detections.of(label)
        ranking = (-mine.score).argsort(kind="stable")
        taking = ranking if order == "score" else np.arange(len(ranking))
        match = _right_of_many if second_best else _right_of_best
        for row, right in enumerate(match(mine, theirs, taking, thresholds, overlap)):
            result[row, column] = area(right[ranking], len(theirs.image))
    return result


def _right_of_best(
    detections: Boxes, truth: Boxes, taking: np.ndarray, thresholds: Sequence[float], overlap: Overlap
) -> Iterator[np.ndarray]:
    """Which detections are right, at each threshold, if each looks at the ground truth that it overlaps most."""
    row, best = best_match(detections, truth, overlap)
    for threshold in thresholds:
        right = np.zeros(len(taking), bool)
        good = taking[(best[taking] >= threshold) & (row[taking] >= 0)]
        right[good[np.unique(row[good], return_index=True)[1]]] = True
        yield right


def _right_of_many(
    detections: Boxes, truth: Boxes, taking: np.ndarray, thresholds: Sequence[float], overlap: Overlap
) -> Iterator[np.ndarray]:
    """The same if each looks at all that are not yet taken."""
    pairs = good_matches(detections, truth, taking, min(thresholds), overlap)
    for threshold in thresholds:
        right = np.zeros(len(taking), bool)
        good = Pairs(*(field[pairs.overlap >= threshold] for field in pairs))
        right[good.detection[take_turns(good.group, good.detection, good.truth)]] = True
        yield right
