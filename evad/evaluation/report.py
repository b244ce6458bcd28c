"""Evaluations for people and machines: a table on the terminal, and JSON, CSV and a bar chart in a folder."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..draw import brief
from .ava import AvaScores
from .average_precision import STRICT, mean
from .tubes import TubeScores

INK, FAINT, GRID, OURS, THEIRS = "#1d2430", "#69717f", "#e3e6eb", "#e8590c", "#adb5bd"


def frame_document(scores: AvaScores, names: Mapping[int, str]) -> dict:
    """Frame mAP as JSON has it: fractions, None for a class without ground truth."""
    rows = zip(scores.labels, scores.ap, scores.truths, scores.detections, strict=True)
    classes = [
        {
            "id": int(label),
            "name": names.get(label, f"class {label}"),
            "AP": number(ap),
            "ground_truths": int(truths),
            "detections": int(found),
        }
        for label, ap, truths, found in rows
    ]
    return {
        "mAP@0.5": number(scores.mean),
        "mAP@0.75": number(scores.strict[5]),
        "mAP@0.5:0.95": number(mean(scores.strict)),
        "mAP_by_iou": {f"{iou:.2f}": number(value) for iou, value in zip(STRICT, scores.strict, strict=True)},
        "classes": classes,
    }


def tube_document(scores: TubeScores, names: Mapping[int, str]) -> dict:
    """Frame and video mAP as JSON has them."""
    frame = zip(scores.labels, scores.frame_ap, scores.video_ap[1], scores.truths, scores.detections, strict=True)
    classes = [
        {
            "id": int(label),
            "name": names.get(label, f"class {label}"),
            "AP": number(ap),
            "video_AP@0.5": number(video),
            "ground_truths": int(truths),
            "detections": int(found),
        }
        for label, ap, video, truths, found in frame
    ]
    return {**{name: number(value) for name, value in scores.summary().items()}, "classes": classes}


def number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def write_report(document: dict, folder: Path, baseline: dict | None = None) -> dict[str, Path]:
    """Write ``evaluation.json``, ``evaluation.csv`` (a line a class) and ``evaluation.png`` (bars of AP).

    Args:
        document: Has "classes" and "mAP@0.5", as ``frame_document`` makes them.
        folder: Exists.
        baseline: Another such document, whose bars stand beside these (paper, Fig. 9 and 10).
    """
    files = {kind: folder / f"evaluation.{kind}" for kind in ("json", "csv", "png")}
    files["json"].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    with open(files["csv"], "w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, list(document["classes"][0]), lineterminator="\n")
        rows.writeheader()
        rows.writerows(document["classes"])
    _bars(document, baseline, files["png"])
    return files


def print_table(document: dict, title: str) -> None:
    """Print AP of every class that has ground truth, best first, and the mean."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("id", justify="right")
    table.add_column("class")
    for name in ("AP", "ground truth", "detections"):
        table.add_column(name, justify="right")
    known = [row for row in document["classes"] if row["AP"] is not None]
    for row in sorted(known, key=lambda row: -row["AP"]):
        ap = f"{100 * row['AP']:.2f}"
        table.add_row(str(row["id"]), row["name"], ap, str(row["ground_truths"]), str(row["detections"]))
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    absent = len(document["classes"]) - len(known)
    if absent:
        console.print(f"{absent} of {len(document['classes'])} classes have no ground truth and do not count")


def _bars(document: dict, baseline: dict | None, path: Path) -> None:
    from matplotlib.figure import Figure

    rows = sorted((row for row in document["classes"] if row["AP"] is not None), key=lambda row: -row["AP"])
    before = {row["id"]: row["AP"] for row in baseline["classes"]} if baseline else {}
    figure = Figure(figsize=(max(6, 1.6 + 0.26 * len(rows)), 5.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    place, width = np.arange(len(rows)), 0.4 if baseline else 0.76
    if baseline:
        values = [100 * (before.get(row["id"]) or 0) for row in rows]
        axes.bar(place - width / 2, values, width, color=THEIRS, label=f"baseline, mAP {_percent(baseline)}")
    label = f"mAP {_percent(document)}"
    bars = axes.bar(place + (width / 2 if baseline else 0), [100 * row["AP"] for row in rows], width, color=OURS)
    bars.set_label(label)
    axes.set_xticks(
        place, [brief(row["name"]) for row in rows], rotation=60, ha="right", rotation_mode="anchor", fontsize=7
    )
    axes.set_ylabel("AP at IoU 0.5, %", color=INK)
    axes.set_ylim(0, 100)
    axes.set_xlim(-0.8, max(len(rows), 1) - 0.2)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
    figure.savefig(path)


def _percent(document: dict) -> str:
    return "-" if document["mAP@0.5"] is None else f"{100 * document['mAP@0.5']:.2f}"
