"""Frame mAP and video mAP of UCF101-24 and JHMDB.

Frame mAP: every frame is an image; PASCAL VOC's average precision, best score first. Video mAP: detections of a class
are linked to tubes, frame by frame; a tube is right if its class is, and its spatio-temporal IoU with a ground-truth
tube reaches the threshold; average precision over tubes.

Linking is the greedy one of Singh et al. (ICCV 2017) and Kalogeiton et al. (ICCV 2017): tubes, best mean score first,
take the best box that overlaps their last one enough; boxes left over begin tubes; a tube that finds none for some
frames ends. Spatio-temporal IoU is theirs too: the temporal IoU times the mean IoU of boxes over frames in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..data.tubes import Annotations, Tube
from .ava import mean
from .average_precision import STRICT, Boxes, average_precision, iou

VIDEO_THRESHOLDS = (0.2, 0.5, 0.75)


class Linking(NamedTuple):
    """How detections become tubes."""

    best: int = 10  # boxes of a class and frame that are looked at
    nms: float = 0.3  # boxes of a class that overlap a better one by this much are dropped first
    overlap: float = 0.5  # IoU of a box with a tube's last one, from which it can continue the tube
    patience: int = 5  # frames without a box after which a tube ends; shorter gaps are filled in between
    shortest: int = 1  # frames of a tube that counts
    tube_nms: float = 0.3  # the same as ``nms``, of whole tubes


UCF101_24, JHMDB = Linking(shortest=15), Linking()


class ScoredTube(NamedTuple):
    tube: Tube
    score: float  # mean of its boxes


class TubeScores(NamedTuple):
    """Fractions, in [0, 1]; NaN for a class without ground truth."""

    labels: tuple[int, ...]
    frame_ap: np.ndarray  # [labels] at IoU 0.5
    video_ap: np.ndarray  # [thresholds, labels], thresholds VIDEO_THRESHOLDS then STRICT
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


def evaluate_tubes(
    detections: Boxes, images: Mapping[tuple[str, float], int], truth: Annotations, fold: int, linking: Linking
) -> TubeScores:
    """Score detections of all frames of the test videos of a fold.

    Args:
        detections: Images numbered as in ``images``; boxes in parts of the picture. Of other videos: left out.
        images: (video, frame from 1) -> number.
        truth: The annotations.
        fold: Which split, from 1.
        linking: How detections become tubes.
    """
    videos = {video: number for number, video in enumerate(truth.videos("test", fold))}
    labels = range(1, len(truth.labels) + 1)
    place = np.full((max(images.values(), default=-1) + 1, 2), -1)  # image -> video, frame
    for (video, frame), number in images.items():
        place[number] = videos.get(video, -1), frame
    detections = detections.take(np.isin(detections.label, labels))
    detections = detections.take(place[detections.image, 0] >= 0)
    video, frame = place[detections.image].T
    spans = max([*truth.frames.values(), *frame.tolist(), 0]) + 1
    frame_truth, tubes = _truth(truth, videos, spans)
    frame_ap = average_precision(detections._replace(image=video * spans + frame), frame_truth, labels)[0]

    found: list[tuple[int, int, ScoredTube]] = []
    group = video * (len(labels) + 1) + detections.label
    order = group.argsort(kind="stable")
    for rows in np.split(order, np.nonzero(np.diff(group[order]))[0] + 1):
        if len(rows):
            boxes, score = detections.box[rows], detections.score[rows]
            linked = link(frame[rows], boxes, score, linking)
            found += [(int(video[rows[0]]), int(detections.label[rows[0]]), tube) for tube in linked]
    thresholds = (*VIDEO_THRESHOLDS, *STRICT)
    scored, known = [tube for _, _, tube in found], [tube for _, _, tube in tubes]

    def overlap(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        pairs = zip(mine[:, 0].astype(int), theirs[:, 0].astype(int), strict=True)
        return np.array([tube_iou(scored[i].tube, known[j]) for i, j in pairs])

    video_ap = average_precision(
        _numbered([entry[:2] for entry in found], [tube.score for tube in scored]),
        _numbered([entry[:2] for entry in tubes], np.ones(len(tubes))),
        labels,
        thresholds,
        overlap=overlap,
    )
    counts = [np.array([(boxes.label == label).sum() for label in labels]) for boxes in (frame_truth, detections)]
    return TubeScores(tuple(labels), frame_ap, video_ap, *counts)


def _truth(truth: Annotations, videos: Mapping[str, int], spans: int) -> tuple[Boxes, list[tuple[int, int, Tube]]]:
    """Ground truth as boxes of images numbered video * spans + frame, and as tubes (video, class, tube)."""
    tubes = [(number, *entry) for video, number in videos.items() for entry in truth.tubes.get(video, ())]
    image = [number * spans + tube.frames for number, _, tube in tubes]
    label = [np.full(len(tube.frames), label) for _, label, tube in tubes]
    if not tubes:
        return Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0)), []
    box = np.concatenate([tube.boxes for _, _, tube in tubes])
    return Boxes(np.concatenate(image), np.concatenate(label), box, np.ones(len(box))), tubes


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


def link(frames: np.ndarray, boxes: np.ndarray, scores: np.ndarray, linking: Linking) -> list[ScoredTube]:
    """Tubes of one class in one video, best first.

    Args:
        frames: Frame of every detection, [N] int.
        boxes, scores: [N, 4], [N].
    """
    going: list[list[int]] = []  # rows of each tube under way
    ended: list[list[int]] = []
    order = np.lexsort((-scores, frames))
    for rows in np.split(order, np.nonzero(np.diff(frames[order]))[0] + 1):
        if not len(rows):
            break
        frame = frames[rows[0]]
        rows = suppress(rows, boxes, linking.nms, linking.best)
        late = [tube for tube in going if frame - frames[tube[-1]] > linking.patience]
        ended += late
        going = [tube for tube in going if not any(tube is other for other in late)]
        going.sort(key=lambda tube: -scores[tube].mean())
        free = list(rows)
        for tube in going:
            value = iou(np.repeat(boxes[[tube[-1]]], len(free), 0), boxes[free]) if free else np.zeros(0)
            near = [row for row, overlap in zip(free, value, strict=True) if overlap >= linking.overlap]
            if near:
                tube.append(near[0])  # free is sorted by score
                free.remove(near[0])
        going += [[row] for row in free]
    tubes = [ScoredTube(_filled(frames[rows], boxes[rows]), float(scores[rows].mean())) for rows in ended + going]
    tubes = [scored for scored in tubes if len(scored.tube.frames) >= linking.shortest]
    tubes.sort(key=lambda scored: -scored.score)
    kept: list[ScoredTube] = []
    for scored in tubes:
        if all(tube_iou(scored.tube, other.tube) < linking.tube_nms for other in kept):
            kept.append(scored)
    return kept


def suppress(rows: np.ndarray, boxes: np.ndarray, threshold: float, most: int) -> np.ndarray:
    """The first ``most`` of ``rows`` (best first) that no better one overlaps by ``threshold``."""
    kept: list[int] = []
    for row in rows:
        if len(kept) == most:
            break
        if not kept or iou(np.repeat(boxes[[row]], len(kept), 0), boxes[kept]).max() < threshold:
            kept.append(int(row))
    return np.array(kept, np.int64)


def _filled(frames: np.ndarray, boxes: np.ndarray) -> Tube:
    """A tube over all frames from the first to the last, boxes of missing ones in between."""
    every = np.arange(frames[0], frames[-1] + 1)
    return Tube(every, np.stack([np.interp(every, frames, column) for column in boxes.T], 1))
