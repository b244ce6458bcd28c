"""``evad evaluate``: mAP of detections in files, or of a model on a dataset."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .. import ava
from ..console import CommandError, bounded
from ..problems import POLICIES, Problems
from ._common import (
    Built,
    add_model_arguments,
    add_size_argument,
    build,
    ranks,
    say,
    say_skipped,
    skipped,
    writable_folder,
)

DESCRIPTION = """\
Score detections against ground truth, class by class.

Of files in AVA's CSV format (video_id, timestamp, x1, y1, x2, y2, action_id, score):
  evad evaluate --ground-truth val.csv --detections found.csv --exclude excluded.csv
Of a model on a dataset, also on several GPUs or machines with torchrun:
  evad evaluate --checkpoint FILE --data synthetic
  evad evaluate --checkpoint FILE --data CONFIG.yaml --split val

Prints a table and writes evaluation.json, evaluation.csv and evaluation.png (and detections.csv of a model) to the
--out folder. mAP counts classes that have ground truth; one without detections counts as 0.
"""

RULES = {
    "file": "detections take ground truth in the order of the file, as in the evaluator released with EVAD",
    "tubes": "as Kalogeiton et al. (ICCV 2017): best score first, a ground truth taken is out of sight, area by "
    "trapezoids, boxes of x2 - x1 + 1 pixels; tubes of linked detections against tubes of the ground truth",
    "score": "best score first, at most 50 labelled boxes an image, as in ActivityNet's get_ava_performance.py",
}

TUBES = ("ucf101-24", "jhmdb")


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="mAP of detections in files, or of a model on a dataset",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("evad_out"), metavar="DIR", help="folder [evad_out]")
    parser.add_argument("--json", action="store_true", help="print the JSON on stdout, and nothing else")
    parser.add_argument(
        "--baseline", type=Path, metavar="JSON", help="an earlier evaluation.json: its bars stand beside these"
    )
    group = parser.add_argument_group("how to score")
    group.add_argument(
        "--protocol",
        choices=("ava", *TUBES),
        help="ava: frame mAP as AVA; the others: frame mAP and video mAP of linked tubes [the --data's, else ava]",
    )
    group.add_argument(
        "--match-order",
        choices=("file", "score"),
        help="for ava, who takes a ground truth that two detections claim: the first of the file, as released, or the "
        "one of higher score, as ActivityNet's script [file]",
    )
    group.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="ids and names of the classes that count: a label map (.pbtxt), a table (.csv), a JSON list, or one name "
        "a line [AVA's 60; of a dataset its own]",
    )
    group = parser.add_argument_group("detections in files")
    group.add_argument(
        "--ground-truth",
        type=Path,
        metavar="FILE",
        help="annotations: CSV in AVA's format; the published pickle of UCF101-24 or JHMDB",
    )
    group.add_argument("--fold", type=bounded(int, 1), default=1, metavar="N", help="split of UCF101-24 or JHMDB [1]")
    group.add_argument(
        "--detections",
        type=Path,
        metavar="CSV",
        help="detections in AVA's format; of UCF101-24 and JHMDB the timestamp is the frame, from 1",
    )
    group.add_argument("--exclude", type=Path, metavar="CSV", help="video_id, timestamp of keyframes that do not count")
    group.add_argument(
        "--on-error", choices=POLICIES, default="fail", help="what to do about lines that cannot be read [fail]"
    )
    group = parser.add_argument_group("a model on a dataset")
    group.add_argument(
        "--data",
        metavar="NAME|FILE",
        help="synthetic, a YAML file with a dataset's options, or a configuration of the package (evad train --list)",
    )
    group.add_argument("--split", default="val", metavar="NAME", help="of the dataset [val]")
    group.add_argument(
        "--boxes",
        type=Path,
        metavar="CSV",
        help="people that another detector found (or annotations) in AVA's format, in place of localisation",
    )
    group.add_argument("--batch-size", type=bounded(int, 1), default=8, metavar="N", help="clips at a time [8]")
    group.add_argument("--workers", type=bounded(int, 0), default=2, metavar="N", help="processes that make clips [2]")
    group.add_argument("--limit", type=bounded(int, 1), metavar="N", help="only the first N clips [all]")
    group.add_argument("--threshold", type=bounded(float, 0, 1), metavar="SCORE", help="least person score [0.7]")
    add_size_argument(group)
    add_model_arguments(parser, dtype="float32")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    files = args.ground_truth is not None or args.detections is not None
    section = None if args.data is None else _section(args.data)
    if args.protocol is None:
        args.protocol = section["name"] if section and section.get("name") in TUBES else "ava"
    if files == (args.data is not None):
        raise CommandError("give either --ground-truth and --detections, or --data")
    if files and (args.ground_truth is None or args.detections is None):
        raise CommandError("--ground-truth and --detections belong together")
    if args.data is not None and args.exclude is not None:
        raise CommandError("--exclude: belongs to --ground-truth; a dataset has an option exclude")
    if args.protocol in TUBES:
        for name in ("match_order", "labels", "exclude"):
            if getattr(args, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')}: belongs to --protocol ava, not to {args.protocol}")
    args.match_order = args.match_order or "file"
    folder = writable_folder(args.out)
    baseline = _baseline(args.baseline)
    with ranks() as (rank, _):
        scored = _score_files(args) if files else _score_model(args, section, folder, rank)
        if scored is None:
            return 0
        document, title = scored
        from ..evaluation.report import print_table, write_report

        written = write_report(document, folder, baseline)
        if args.json:
            print(json.dumps(document, indent=2))
            return 0
        print_table(document, title)
        _print_summary(document)
        for path in written.values():
            print(path)
    return 0


def _score_files(args: argparse.Namespace) -> tuple[dict, str]:
    from ..data.tubes import read_annotations
    from ..evaluation import evaluate_ava, evaluate_tubes, read_boxes
    from ..evaluation.report import frame_document, tube_document

    classes = _classes(args.labels)
    problems, images = Problems(args.on_error), {}
    title = f"{args.detections} against {args.ground_truth}"
    if args.protocol in TUBES:
        truth = read_annotations(args.ground_truth, problems)
        detections = read_boxes(args.detections, images, problems, frames=True)
        frames = {video: truth.frames.get(video, 0) for video in truth.videos("test", args.fold)}
        known = [number for (video, frame), number in images.items() if frame <= frames.get(video, 0)]
        _remark(args.detections, detections, range(1, len(truth.labels) + 1), known)
        scores = evaluate_tubes(detections, images, truth, args.fold)
        document = {
            **_tube_rule(args.protocol, args.fold),
            "ground_truth": str(args.ground_truth),
            "detections": str(args.detections),
            "skipped_lines": problems.count,
        }
        return document | tube_document(scores, dict(enumerate(truth.labels, 1))), title
    truth = read_boxes(args.ground_truth, images, problems, truth=True)
    known = list(images.values())
    if not len(truth.image):
        raise CommandError(f"--ground-truth: {args.ground_truth} has no box in it")
    detections = read_boxes(args.detections, images, problems)
    keys = set() if args.exclude is None else ava.read_seconds(args.exclude)
    excluded = {images[key] for key in keys if key in images}
    _remark(args.ground_truth, truth, classes.names, known)
    _remark(args.detections, detections, classes.names, [*known, *excluded])
    scores = evaluate_ava(detections, truth, classes.counted, excluded=excluded, match_order=args.match_order)
    if not scores.truths.any():
        raise CommandError(f"--ground-truth: {args.ground_truth} has no box of the {len(classes.counted)} classes")
    document = {
        **_ava_rule(args.match_order),
        "ground_truth": str(args.ground_truth),
        "detections": str(args.detections),
        "keyframes": len(images) - len(excluded),
        "excluded": len(excluded),
        "skipped_lines": problems.count,
    }
    return document | frame_document(scores, classes.names), title


def _remark(path: Path, boxes, classes: Collection[int], images: Collection[int]) -> None:
    """Say in a line what is odd about the boxes of a file, if anything is."""
    counts = {
        "of classes that are not known": ~np.isin(boxes.label, list(classes)),
        "on no keyframe of the ground truth": ~np.isin(boxes.image, list(images)),
        "not in [0, 1]": (boxes.box < -ava.OUTSIDE).any(1) | (boxes.box > 1 + ava.OUTSIDE).any(1),
    }
    odd = [f"{mask.sum()} {what}" for what, mask in counts.items() if mask.any()]
    if odd:
        say(f"evad evaluate: {path}: of {len(boxes.label)} boxes, {', '.join(odd)}")


def _ava_rule(match_order: str) -> dict:
    return {"protocol": "ava", "match_order": match_order, "rule": RULES[match_order]}


def _tube_rule(protocol: str, fold: int) -> dict:
    from ..evaluation import Linking

    return {"protocol": protocol, "fold": fold, "rule": RULES["tubes"], "linking": Linking()._asdict()}


def _score_model(args: argparse.Namespace, section: dict, folder: Path, rank: int) -> tuple[dict, str] | None:
    """Document and title; None on ranks other than 0, which only do their share of the clips."""
    from torch.utils.data import Subset

    from .. import data
    from ..data.tubes import TubeClips
    from ..evaluation import collect, read_people, score
    from ..evaluation.report import frame_document, tube_document
    from ..evaluation.report import number as finite

    section = data.split_options(section, args.split)
    if args.protocol in TUBES and section.get("every", 1) != 1:
        raise CommandError("--data: video mAP links every frame, so its option every must be 1")
    built = build(args)
    if args.size is not None:
        section = section | {"short_side": args.size}
    try:
        dataset = data.build(section, args.split, built.config)
    except ValueError as error:
        raise CommandError(str(error)) from error
    labels = tuple(dataset.labels)
    if len(labels) != built.config.num_classes:
        raise CommandError(f"--data: {args.data} has {len(labels)} classes, the model {built.config.num_classes}")
    if args.protocol in TUBES and not isinstance(dataset, TubeClips):
        raise CommandError(f"--protocol: {args.protocol} needs a dataset of tubes, which {args.data} is not")
    own = ava.Classes(dict(enumerate(labels, 1)), dataset.counted)
    classes = own if args.labels is None else _classes(args.labels)
    lines, tubes = skipped(dataset), dataset if args.protocol in TUBES else None
    if args.limit is not None and args.limit < len(dataset):
        dataset = Subset(dataset, range(args.limit))
    if built.note and not rank:
        say(f"evad evaluate: {built.note}")
    threshold = built.config.person_threshold if args.threshold is None else args.threshold
    problems = Problems(args.on_error)
    people = None if args.boxes is None else read_people(args.boxes, threshold, problems)
    begin = time.perf_counter()
    with _progress(rank) as progress:
        results = collect(
            built.model,
            dataset,
            batch_size=args.batch_size,
            workers=args.workers,
            threshold=threshold,
            people=people,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    if rank:
        return None
    metrics = score(results, match_order=args.match_order, classes=classes.counted, tubes=tubes)
    _remark_people(args.boxes, people, results)
    _write_detections(results, folder / "detections.csv")
    document = {
        **(_ava_rule(args.match_order) if tubes is None else _tube_rule(args.protocol, tubes.fold)),
        "data": args.data,
        "split": args.split,
        "boxes": None if args.boxes is None else str(args.boxes),
        "weights": built.weights,
        "model": built.summary(),
        "clips_per_second": round(len(results) / seconds, 3),
        **{name: finite(value) for name, value in metrics.summary().items()},
        "clips": metrics.clips,
        "skipped": lines + problems.count + len(dataset) - len(results),
    }
    title = f"{_title(built)} on {args.data}, {args.split}"
    of_frames = frame_document if tubes is None else tube_document
    return document | of_frames(metrics.frame, classes.names), title


def _remark_people(path: Path | None, people: Mapping | None, results: Sequence) -> None:
    if people is None:
        return
    used = {found.key for found in results}
    total = sum(len(given.boxes) for given in people.values())
    unused = sum(len(given.boxes) for key, given in people.items() if key not in used)
    if not total:
        say(f"evad evaluate: {path}: has no box in it")
    elif unused:
        say(f"evad evaluate: {path}: of {total} boxes, {unused} on no keyframe that was evaluated")


def _title(built: Built) -> str:
    return f"{built.name} ({built.weights} weights), keep rate {built.config.keep_rate:g}"


def _section(source: str) -> dict:
    """The dataset's options: of a configuration (or its section ``data``), or only a name."""
    from .. import recipe
    from ..data import DATASETS

    packaged = recipe.configurations()
    if not Path(source).is_file():
        if source in DATASETS and (source == "synthetic" or source not in packaged):  # all others need options
            return {"name": source}
        if source not in packaged:
            known = dict.fromkeys([*DATASETS, *packaged])
            raise CommandError(f"--data: {source!r} is neither a file nor one of {', '.join(known)}")
    try:
        section = recipe.load(source)
    except ValueError as error:
        raise CommandError(f"--data: {error}") from error
    if isinstance(section, dict) and isinstance(section.get("data"), dict):
        section = section["data"]
    if not isinstance(section, dict):
        raise CommandError(f"--data: {source} holds no options of a dataset")
    return section


def _classes(path: Path | None) -> ava.Classes:
    """AVA's, or those of --labels, which all count."""
    try:
        known = ava.read_classes(path)
        return known if path is None else known._replace(counted=tuple(sorted(ava.read_label_map(path))))
    except ValueError as error:
        raise CommandError(f"--labels: {error}") from error


def _baseline(path: Path | None) -> dict | None:
    if path is None:
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if {"id", "AP"} <= set(document["classes"][0]) and "mAP@0.5" in document:
            return document
    except (UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError):
        pass
    raise CommandError(f"--baseline: {path} is no evaluation.json")


def _write_detections(results, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = ava.CsvWriter(file)
        for found in results:
            writer.write(*found.key, found.boxes, found.actions)


@contextmanager
def _progress(rank: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and time left, of rank 0 only; yields what is told the clips done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("clips, {task.fields[rate]:.1f} a second, left"))
    console = Console(stderr=True, quiet=rank > 0)
    begin = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=None, rate=0.0)
        yield lambda done, total: bar.update(
            task, completed=done, total=total, rate=done / (time.perf_counter() - begin)
        )


def _print_summary(document: dict) -> None:
    def percent(name: str) -> str:
        value = document.get(name)
        return "-" if value is None else f"{100 * value:.2f}"

    others = {"0.75": "mAP@0.75", "0.5:0.95": "mAP@0.5:0.95"}
    if document["protocol"] in TUBES:
        others = {}
    parts = [f"mAP at IoU 0.5: {percent('mAP@0.5')}", *(f"{iou}: {percent(name)}" for iou, name in others.items())]
    print("   ".join(parts))
    if document["protocol"] in TUBES:
        video = (f"{iou}: {percent(f'video_mAP@{iou}')}" for iou in ("0.2", "0.5", "0.75", "0.5:0.95"))
        print("video mAP at IoU " + "   ".join(video))
    print(f"({document['rule']})")
    if "person_AP@0.5" in document:
        print(f"people: AP {percent('person_AP@0.5')}; actions of people found: mAP {percent('matched_action_mAP')}")
        print(
            f"tokens inside ground truth: {percent('kept_inside_truth')} % of those kept, "
            f"{percent('truth_area')} % of all; {document['clips']} clips, {document['clips_per_second']:.2f} a second"
        )
    if count := document.get("skipped_lines", document.get("skipped")):
        say_skipped("evaluate", count)
