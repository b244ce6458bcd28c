"""Runs a detector over a dataset and scores it: boxes, actions, and which tokens it kept."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..ava import read_rows
from ..data.sample import Batch, collate
from ..data.tubes import TubeClips
from ..detector import EVAD, EVADOutput, select_detections
from ..losses import PERSON
from ..problems import DataError, Problems
from .ava import AvaScores, evaluate_ava
from .average_precision import Boxes, ScoredBoxes, area_under_curve, average_precision, iou, mean
from .tubes import LINKING, TubeScores, evaluate_tubes

MATCHED = 0.5  # IoU from which a proposal speaks for a ground-truth box


class Given(NamedTuple):
    """Boxes that another detector found in one keyframe."""

    boxes: np.ndarray  # [n, 4] in parts of the picture
    scores: np.ndarray  # [n]


NOBODY = Given(np.zeros((0, 4)), np.zeros(0))
People = Mapping[tuple[str, float], Given]  # video id and second -> boxes; a keyframe that is not in it has none


def read_people(path: str | Path, least: float = 0.0, problems: Problems | None = None) -> dict:
    """``People`` of a CSV in AVA's format: detections without actions, or annotations, whose boxes all score 1.

    Args:
        path: Lines of video_id, timestamp, x1, y1, x2, y2, an empty field or action_id, and score.
        least: Score below which a box is left out.
        problems: What to do about lines that cannot be read.
    """
    problems = Problems() if problems is None else problems
    found: dict[tuple[str, float], dict[tuple[str, ...], float]] = {}
    for row in read_rows(path, problems):
        if row.place and row.outside:
            problems(f"{path}, line {row.line}: {row.outside}")
        elif row.place:
            score = 1.0 if row.action else row.score  # of annotations the last field is a person's id
            boxes = found.setdefault((row.video, row.second), {})
            boxes[row.place] = max(score, boxes.get(row.place, 0.0))
    people = {}
    for key, boxes in found.items():
        good = {place: score for place, score in boxes.items() if score >= least}
        table = np.array([[float(value) for value in place] for place in good], np.float64).reshape(-1, 4)
        people[key] = Given(table, np.array(list(good.values()), np.float64))
    return people


class ClipOutcome(NamedTuple):
    """What the model made of one clip, and what is there. Boxes in parts of the picture."""

    index: int  # in the dataset
    key: tuple[str, float]
    boxes: np.ndarray  # [m, 4] detections, as inference gives them
    persons: np.ndarray  # [m] their person scores
    actions: np.ndarray  # [m, classes] their action scores
    proposals: np.ndarray  # [n, 4] all proposals
    proposal_persons: np.ndarray  # [n]
    truth: np.ndarray  # [M, 4]
    labels: np.ndarray  # [M, classes]
    truth_actions: np.ndarray  # [M, classes] scores of the proposal that overlaps each most; NaN below MATCHED
    inside: tuple[float, float, float]  # part inside ground truth: of kept tokens, the same but the keyframe's, of all


class Metrics(NamedTuple):
    """Fractions, in [0, 1]; NaN where there is nothing to measure."""

    frame: AvaScores | TubeScores  # by the dataset's own protocol
    person_ap: float  # all proposals by person score, at IoU 0.5
    action_ap: np.ndarray  # [classes] over ground-truth boxes with a proposal of IoU 0.5 or more, by its action scores
    kept_inside: float  # kept tokens in a ground-truth box (paper, Fig. 7), after the last pruning
    selected_inside: float  # the same without the keyframe's, which are always kept
    truth_area: float  # all tokens in a ground-truth box
    clips: int

    def summary(self) -> dict[str, float]:
        """The numbers to log."""
        return {
            **self.frame.summary(),
            "person_AP@0.5": self.person_ap,
            "matched_action_mAP": mean(self.action_ap),
            "kept_inside_truth": self.kept_inside,
            "selected_inside_truth": self.selected_inside,
            "truth_area": self.truth_area,
            "clips": self.clips,
        }


def evaluate(model: EVAD, dataset: Dataset, *, match_order: str = "file", **options) -> Metrics:
    """Score a detector on a dataset of ``evad.data``; every rank of torch.distributed does its share.

    Args:
        model: Evaluated in evaluation mode; its own mode is restored.
        dataset: Not augmented. ``TubeClips`` are scored as ``evad.evaluation.tubes`` says, on the frames that they
            have; others as AVA, where its ``counted``, if it has that, are the classes that the frame mAP counts.
        match_order: "file" (proposals in their order, as released) or "score"; see ``evad.evaluation.ava``.
        options: As for ``collect``.
    Returns:
        The same on every rank: the first scores, the others wait. With another number of ranks the same up to rounding.
    Raises:
        DataError: on every rank, if no clip can be read.
    """
    counted, tubes = getattr(dataset, "counted", None), dataset if isinstance(dataset, TubeClips) else None
    results, made = collect(model, dataset, **options), [None]
    rank, world = _place()
    if rank == 0:
        try:
            made = [score(results, match_order=match_order, classes=counted, tubes=tubes)]
        except DataError as error:
            made = [error]
    if world > 1:
        dist.broadcast_object_list(made, src=0)
    if isinstance(made[0], DataError):
        raise made[0]
    return made[0]


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def collect(
    model: EVAD,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    workers: int = 0,
    threshold: float | None = None,
    autocast: torch.dtype | None = None,
    people: People | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ClipOutcome]:
    """What a detector finds in every clip of a dataset that can be read, in order, on rank 0; nothing on the others.

    Args:
        batch_size: Clips at a time.
        workers: Processes that make clips; 0 makes them here.
        threshold: Least person score of a detection; None for the model's.
        autocast: Type to compute in; None for that of the weights.
        people: Another detector's boxes in place of localisation (paper, section 4.2); None to localise.
        progress: Told how many clips of this rank are done, of how many.
    """
    rank, world = _place()
    results = []
    share = range(rank, len(dataset), world)
    options = {"workers": workers, "threshold": threshold, "autocast": autocast, "people": people}
    for found in run(model, dataset, share, batch_size, **options):
        results.append(found)
        progress(len(results), len(share))
    if world > 1:
        gathered = None if rank else [None] * world
        dist.gather_object(results, gathered, dst=0)
        results = sorted(itertools.chain(*gathered or ()), key=lambda found: found.index)
    return results


def run(
    model: EVAD,
    dataset: Dataset,
    indices: Sequence[int],
    batch_size: int = 8,
    *,
    workers: int = 0,
    threshold: float | None = None,
    autocast: torch.dtype | None = None,
    people: People | None = None,
) -> Iterator[ClipOutcome]:
    """What the model finds in clips ``indices`` of a dataset, in their order, less what cannot be read; options as for
    ``collect``."""
    loader = DataLoader(Subset(dataset, indices), batch_size, num_workers=workers, collate_fn=collate)
    threshold = model.config.person_threshold if threshold is None else threshold
    weight, training, rows = next(model.parameters()), model.training, iter(indices)
    computing = contextlib.nullcontext() if autocast is None else torch.autocast(weight.device.type, autocast)
    model.eval()
    try:
        for batch in loader:
            clips = [clip.to(weight.device, weight.dtype, non_blocking=True) for clip in batch.clips]
            given = None if people is None else [people.get(key, NOBODY) for key in batch.keys]
            boxes = None if given is None else [_pixels(some, clip) for some, clip in zip(given, clips, strict=True)]
            with torch.inference_mode(), computing:
                output = model(torch.stack(clips) if isinstance(batch.clips, Tensor) else clips, boxes)
            everyone = _found(model, batch, output, threshold, given)
            for target, found, row in zip(batch.targets, everyone, rows, strict=False):
                if "unreadable" not in target:
                    yield found._replace(index=row)
    finally:
        model.train(training)


def _pixels(given: Given, clip: Tensor) -> Tensor:
    """Given boxes in pixels of a clip."""
    height, width = clip.shape[-2:]
    return torch.tensor(given.boxes * [width, height, width, height], dtype=torch.float32, device=clip.device)


def _found(
    model: EVAD, batch: Batch, output: EVADOutput, threshold: float, given: Sequence[Given] | None
) -> Iterator[ClipOutcome]:
    """What was found in each clip of a batch; ``index`` is its place in the batch."""
    output = EVADOutput(*(part.float().cpu() for part in output[:3]), tuple(kept.cpu() for kept in output.kept[-1:]))
    sizes = [tuple(clip.shape[-2:]) for clip in batch.clips]
    persons = output.person_logits.softmax(-1)[..., PERSON].numpy()
    actions = output.action_logits.sigmoid().numpy()
    patch = model.config.patch_size
    grid = [side // patch for side in model.padded_size(sizes)]
    for index, (size, target) in enumerate(zip(sizes, batch.targets, strict=True)):
        whwh = np.array((size[1], size[0]) * 2, np.float64)
        count = output.boxes.shape[1] if given is None else len(given[index].boxes)  # the others are padding
        one = EVADOutput(*(part[index : index + 1, :count] for part in output[:3]), ())
        boxes, scores, action_scores = (part.numpy() for part in select_detections(one, [size], threshold)[0])
        proposals = output.boxes[index, :count].numpy() / whwh
        truth = target["truth"].numpy() if "truth" in target else target["boxes"].numpy() / whwh
        kept = output.kept[-1][index].numpy() if output.kept else np.zeros(0, np.int64)
        yield ClipOutcome(
            index,
            batch.keys[index],
            boxes / whwh,
            scores if given is None else given[index].scores,
            action_scores,
            proposals,
            persons[index] if given is None else given[index].scores,
            truth,
            target["labels"].numpy(),
            _speaking(proposals, actions[index, :count], truth),
            _inside(truth * whwh, kept, grid, size, patch, model.config.keyframe),
        )


def _speaking(proposals: np.ndarray, actions: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Action scores of the proposal that overlaps each ground truth most, NaN where none does enough."""
    pairs = np.repeat(truth, len(proposals), 0), np.tile(proposals, (len(truth), 1))
    overlap = iou(*pairs).reshape(len(truth), len(proposals))
    if not overlap.size:
        return np.full((len(truth), actions.shape[1]), np.nan)
    return np.where(overlap.max(1)[:, None] >= MATCHED, actions[overlap.argmax(1)], np.nan)


def _inside(truth, kept, grid, size, patch, keyframe) -> tuple[float, float, float]:
    """Part of the kept tokens, of those outside the keyframe, and of all, whose centre lies in a box of ``truth``."""
    Gh, Gw = grid
    y, x = (np.arange(cells) * patch + patch / 2 for cells in grid)
    inside = np.zeros((Gh, Gw), bool)
    for x1, y1, x2, y2 in truth:
        inside |= ((y1 <= y) & (y <= y2))[:, None] & (x1 <= x) & (x <= x2)
    real = (y < size[0])[:, None] & (x < size[1])  # the others are padding
    held = inside.ravel()[kept % (Gh * Gw)]
    parts = held, held[kept // (Gh * Gw) != keyframe], inside[real]
    return tuple(float(part.mean()) if len(part) else float("nan") for part in parts)


def score(
    results: Sequence[ClipOutcome],
    *,
    match_order: str = "file",
    classes: Sequence[int] | None = None,
    tubes: TubeClips | None = None,
) -> Metrics:
    """Metrics of what was found in all clips.

    Args:
        match_order: As for ``evaluate``.
        classes: Ids (from 1) of those that AVA's frame mAP counts; None for all.
        tubes: The dataset, to score it by its own protocol in place of AVA's: ground truth of the clips' frames, all
            classes, and video mAP if it has every frame.
    """
    if not results:
        raise DataError("the dataset has no clip that can be read")
    labels = range(1, results[0].labels.shape[1] + 1) if classes is None else classes
    image = np.arange(len(results))
    truth = _boxes(image, [found.truth for found in results], [found.labels > 0 for found in results])
    everyone = [np.ones((len(found.proposals), 1)) for found in results]
    people = _boxes(image, [found.proposals for found in results], everyone)
    people = people._replace(score=np.concatenate([found.proposal_persons for found in results]).astype(np.float64))
    present = _boxes(image, [found.truth for found in results], [np.ones((len(found.truth), 1)) for found in results])
    inside = np.array([found.inside for found in results])
    with np.errstate(invalid="ignore"):
        means = [
            float(column[~np.isnan(column)].mean()) if (~np.isnan(column)).any() else np.nan for column in inside.T
        ]
    if tubes is None:
        frame = evaluate_ava(detections(results), truth, labels, match_order=match_order)
    else:
        images = {found.key: number for number, found in enumerate(results)}
        linking = LINKING if tubes.every == 1 else None
        frame = evaluate_tubes(detections(results), images, tubes.annotations.within(images), tubes.fold, linking)
    return Metrics(
        frame,
        float(average_precision(people, present, [1])[0, 0]),
        _action_ap(results),
        *means,
        len(results),
    )


def detections(results: Sequence[ClipOutcome]) -> ScoredBoxes:
    """All detections; images are numbered by their place."""
    image = np.repeat(np.arange(len(results)), [len(found.boxes) for found in results])
    boxes, scores = (np.concatenate([getattr(found, name) for found in results]) for name in ("boxes", "actions"))
    return ScoredBoxes(image, boxes.astype(np.float64), scores)


def _boxes(image: np.ndarray, boxes: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> Boxes:
    """A row for every box and label that is set, box by box; scores are 1."""
    number = np.repeat(image, [len(some) for some in boxes])
    row, label = np.nonzero(np.concatenate(labels))
    box = np.concatenate(boxes).astype(np.float64)[row]
    return Boxes(number[row], label + 1, box, np.ones(len(row)))


def _action_ap(results: Sequence[ClipOutcome]) -> np.ndarray:
    scores, labels = (np.concatenate([getattr(f, name) for f in results]) for name in ("truth_actions", "labels"))
    known = ~np.isnan(scores).any(1)
    scores, labels = scores[known], labels[known] > 0
    order = (-scores).argsort(0, kind="stable")
    hits = np.take_along_axis(labels, order, 0)
    return np.array([area_under_curve(column, column.sum()) if column.any() else np.nan for column in hits.T])
