"""Frame mAP and video mAP of UCF101-24 and JHMDB, as Kalogeiton et al. published them.

The rules are those of the evaluation that came with the action tubelet detector (ICCV 2017), which MOC (Li et al., ECCV
2020) has, too; most published numbers of these two datasets follow it, some PASCAL VOC's. EVAD does not say which.

* Boxes are in pixels of the video and reach to the end of their last one: a box is x2 - x1 + 1 wide.
* Detections of a class, best score first, take the ground truth of their image that they overlap most, if the IoU
  reaches the threshold. It is then gone: a later detection may take the next. AP is the area under the precision-recall
  curve by trapezoids, from precision 1 at recall 0; precision is not made monotone.
* Frame mAP: an image is a frame. What overlaps a better box is not dropped; that is a detector's own affair.
* Video mAP: detections of a class are linked, frame by frame, and an image is a video. Of a frame's boxes the 10 best
  count that no better one overlaps by more than 0.3. Tubes, best mean score first, take the best box whose IoU with
  their last one is at least 0.2; boxes left over begin tubes; a tube that finds none for five frames ends. Tubes of
  less than 15 frames or a score below 0.01 are dropped, and then those that overlap a better one by more than 0.3.
* Spatio-temporal IoU: that of the sets of frames, times the mean IoU of boxes over frames in common.
* mAP is the mean over classes; video mAP at 0.5:0.95 the mean of ten of these.

A frame's detections are tubelets of one frame here, so frames that a tube passes over have no boxes of tubelets around
them: boxes are interpolated. Of equal scores the first comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..data.tubes import Annotations, Tube
from ..problems import DataError
from .average_precision import (
    STRICT,
    Boxes,
    Overlap,
    ScoredBoxes,
    average_precision,
    iou,
    mean,
    near,
    take_turns,
    trapezoids,
)

VIDEO_THRESHOLDS = (0.2, 0.5, 0.75)


class Linking(NamedTuple):
    """How detections become tubes; as published, for both datasets."""

    best: int = 10  # boxes of a class and frame that are looked at
    nms: float = 0.3  # boxes of a class that overlap a better one by more are dropped first
    overlap: float = 0.2  # IoU of a box with a tube's last one, from which it can continue the tube
    patience: int = 5  # frames after a tube's last box in which it may go on; those in between are filled in
    shortest: int = 15  # frames of a tube that counts
    least: float = 0.01  # score of a tube that counts
    tube_nms: float = 0.3  # the same as ``nms``, of whole tubes


LINKING = Linking()


class ScoredTube(NamedTuple):
    group: int  # video
    tube: Tube
    score: float  # mean of its boxes


class TubeScores(NamedTuple):
    """Fractions, in [0, 1]; NaN for a class without ground truth."""

    labels: tuple[int, ...]
    frame_ap: np.ndarray  # [labels] at IoU 0.5
    video_ap: np.ndarray | None  # [thresholds, labels], thresholds VIDEO_THRESHOLDS then STRICT; None if not asked for
    truths: np.ndarray  # [labels] boxes of the ground truth
    detections: np.ndarray  # [labels] boxes detected

    @property
    def mean(self) -> float:
        """Frame mAP at IoU 0.5."""
        return mean(self.frame_ap)

    def video_map(self) -> dict[str, float]:
        """Video mAP at 0.2, 0.5, 0.75 and, averaged, 0.5 to 0.95."""
        values = {f"{iou:g}": mean(row) for iou, row in zip(VIDEO_THRESHOLDS, self.video_ap, strict=False)}
        return values | {"0.5:0.95": float(np.mean([mean(row) for row in self.video_ap[len(VIDEO_THRESHOLDS) :]]))}

    def summary(self) -> dict[str, float]:
        """The numbers to log."""
        video = {} if self.video_ap is None else self.video_map()
        return {"mAP@0.5": self.mean, **{f"video_mAP@{iou}": value for iou, value in video.items()}}


def evaluate_tubes(
    detections: Boxes | ScoredBoxes,
    images: Mapping[tuple[str, float], int],
    truth: Annotations,
    fold: int,
    linking: Linking | None = LINKING,
) -> TubeScores:
    """Score detections of all frames of the test videos of a fold.

    Args:
        detections: Images numbered as in ``images``; boxes in parts of the picture. Of other videos: left out.
        images: (video, frame from 1) -> number.
        truth: The annotations.
        fold: Which split, from 1.
        linking: How detections become tubes; None for frame mAP only.
    Raises:
        DataError: a frame is no whole number from 1, or the annotations lack a video's size.
    """
    videos = {video: number for number, video in enumerate(truth.videos("test", fold))}
    if unsized := [video for video in videos if video not in truth.sizes]:
        raise DataError(f"{unsized[0]}: the annotations must have its resolution")
    labels = range(1, len(truth.labels) + 1)
    place = np.full((max(images.values(), default=-1) + 1, 2), -1)  # image -> video, frame
    for (video, frame), number in images.items():
        if frame < 1 or frame != int(frame):
            raise DataError(f"{video}: frames must be whole numbers from 1, got {frame:g}")
        place[number] = videos.get(video, -1), frame
    detections = detections.take(place[detections.image, 0] >= 0)
    video, frame = place[detections.image].T
    sizes = np.array([truth.sizes[name] for name in videos], np.float64).reshape(-1, 2)
    detections = detections._replace(image=video, box=_pixels(detections.box, sizes[video]))
    known = [
        (number, label, Tube(tube.frames, _pixels(tube.boxes, sizes[[number]])))
        for name, number in videos.items()
        for label, tube in truth.tubes.get(name, ())
    ]
    spans = max([*frame.tolist(), *(int(tube.frames.max()) for _, _, tube in known), 0]) + 1
    frame_truth = _frames(known, spans)
    frame_ap = _average_precision(detections._replace(image=video * spans + frame), frame_truth, labels)[0]
    counts = [np.array([len(boxes.of(label).image) for label in labels]) for boxes in (frame_truth, detections)]
    if linking is None:
        return TubeScores(tuple(labels), frame_ap, None, *counts)

    numbered = detections._replace(image=np.arange(len(frame)))
    found, label_of = [], []
    for label in labels:
        mine = numbered.of(label)
        tubes = link(video[mine.image], frame[mine.image], mine.box, mine.score, linking)
        found += tubes
        label_of += [label] * len(tubes)

    def overlap(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        pairs = zip(mine[:, 0].astype(int), theirs[:, 0].astype(int), strict=True)
        return np.array([tube_iou(found[i].tube, known[j][2]) for i, j in pairs])

    video_ap = _average_precision(
        _numbered(list(zip([tube.group for tube in found], label_of, strict=True)), [tube.score for tube in found]),
        _numbered([entry[:2] for entry in known], np.ones(len(known))),
        labels,
        (*VIDEO_THRESHOLDS, *STRICT),
        overlap,
    )
    return TubeScores(tuple(labels), frame_ap, video_ap, *counts)


def _average_precision(
    detections: Boxes, truth: Boxes, labels: Sequence[int], thresholds: Sequence[float] = (0.5,), overlap: Overlap = iou
) -> np.ndarray:
    return average_precision(detections, truth, labels, thresholds, overlap=overlap, second_best=True, area=trapezoids)


def _pixels(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes in parts of pictures of ``sizes`` (height, width), up to the end of their last pixels."""
    return boxes * sizes[:, [1, 0, 1, 0]] + [0, 0, 1, 1]


def _frames(tubes: Sequence[tuple[int, int, Tube]], spans: int) -> Boxes:
    """Tubes (video, class, tube) as boxes of images numbered video * spans + frame."""
    if not tubes:
        return Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
    image = [number * spans + tube.frames for number, _, tube in tubes]
    label = [np.full(len(tube.frames), label) for _, label, tube in tubes]
    box = np.concatenate([tube.boxes for _, _, tube in tubes])
    return Boxes(np.concatenate(image), np.concatenate(label), box, np.ones(len(box)))


def _numbered(places: Sequence[tuple[int, int]], score: Sequence[float]) -> Boxes:
    """Tubes as ``Boxes`` whose box is their number."""
    video, label = np.array(places, np.int64).reshape(-1, 2).T
    return Boxes(video, label, np.arange(len(video), dtype=np.float64)[:, None], np.asarray(score, np.float64))


def tube_iou(a: Tube, b: Tube) -> float:
    """Spatio-temporal IoU: IoU of the sets of frames times the mean IoU of the boxes in common frames."""
    _, mine, theirs = np.intersect1d(a.frames, b.frames, assume_unique=True, return_indices=True)
    if not len(mine):
        return 0.0
    union = len(a.frames) + len(b.frames) - len(mine)
    return float(iou(a.boxes[mine], b.boxes[theirs]).sum() / union)  # sum = mean * common frames


def link(
    group: np.ndarray, frames: np.ndarray, boxes: np.ndarray, scores: np.ndarray, linking: Linking = LINKING
) -> list[ScoredTube]:
    """Tubes, those of a group together, best first.

    Args:
        group: Video of every detection of a class, [N] int; detections of different ones do not meet.
        frames: Its frame, [N] int from 1.
        boxes, scores: [N, 4], [N].
    """
    if not len(group):
        return []
    order = np.lexsort((-scores, frames, group))
    spans = frames.max() + 1

    def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return iou(boxes[order[a]], boxes[order[b]])

    rows = order[suppress((group * spans + frames)[order], overlap, linking.nms, linking.best)]
    tube = _follow(group[rows], frames[rows], boxes[rows], scores[rows], linking)
    order = np.lexsort((frames[rows], tube))
    rows, tube = rows[order], tube[order]
    begin = np.flatnonzero(np.diff(tube, prepend=-1))
    end = np.append(begin[1:], len(rows))
    means = np.add.reduceat(scores[rows], begin) / (end - begin)
    length = frames[rows[end - 1]] - frames[rows[begin]] + 1
    counted = (means >= linking.least) & (length >= linking.shortest)
    tubes = [
        ScoredTube(int(group[rows[first]]), _filled(frames[rows[first:last]], boxes[rows[first:last]]), float(mean))
        for first, last, mean in zip(begin[counted], end[counted], means[counted], strict=True)
    ]
    tubes.sort(key=lambda scored: (scored.group, -scored.score))

    def tube_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([tube_iou(tubes[i].tube, tubes[j].tube) for i, j in zip(a, b, strict=True)])

    kept = suppress(np.array([scored.group for scored in tubes], np.int64), tube_overlap, linking.tube_nms)
    return [tubes[row] for row in kept]


def suppress(group: np.ndarray, overlap: Overlap, threshold: float, most: int | None = None) -> np.ndarray:
    """Rows that no better one kept of their group overlaps by more than ``threshold``; of these the first ``most``.

    Args:
        group: [N], those of a group together and best first.
        overlap: Of rows [n] with rows [n].
    """
    left, kept = np.arange(len(group)), []
    for _ in range(len(group) if most is None else most):
        begins = np.diff(group[left], prepend=-1) != 0
        kept.append(left[begins])
        better = left[begins][np.cumsum(begins) - 1][~begins]
        left = left[~begins]
        left = left[overlap(better, left) <= threshold]
        if not len(left):
            break
    return np.sort(np.concatenate(kept)) if kept else left


def _follow(
    group: np.ndarray, frames: np.ndarray, boxes: np.ndarray, scores: np.ndarray, linking: Linking
) -> np.ndarray:
    """The tube of every box; boxes of a frame and group come best first."""
    tube, count = np.empty(len(frames), np.int64), 0
    latest, total, length = (np.zeros(len(frames), kind) for kind in (np.int64, np.float64, np.int64))  # of tubes
    going = np.zeros(0, np.int64)  # tubes that may go on
    order = frames.argsort(kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(frames[order])) + 1):
        going = going[frames[rows[0]] - frames[latest[going]] <= linking.patience]
        going = going[np.lexsort((-total[going] / length[going], group[latest[going]]))]
        free = np.ones(len(rows), bool)
        last = latest[going]
        one, box, _ = near(group[last], group[rows], boxes[last], boxes[rows], linking.overlap)
        pairs = take_turns(group[rows[box]], one, box)
        tube[rows[box[pairs]]] = going[one[pairs]]
        free[box[pairs]] = False
        begun = np.arange(count, count + free.sum())
        tube[rows[free]], count = begun, count + len(begun)
        np.add.at(total, tube[rows], scores[rows])
        np.add.at(length, tube[rows], 1)
        latest[tube[rows]] = rows
        going = np.append(going, begun)
    return tube


def _filled(frames: np.ndarray, boxes: np.ndarray) -> Tube:
    """A tube over all frames from the first to the last, boxes of missing ones in between."""
    every = np.arange(frames[0], frames[-1] + 1)
    return Tube(every, np.stack([np.interp(every, frames, column) for column in boxes.T], 1))
