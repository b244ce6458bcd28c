"""AVA v2.2: its 80 action classes, and detections in its CSV format."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

ACTIONS = (
    "bend/bow (at the waist)",
    "crawl",
    "crouch/kneel",
    "dance",
    "fall down",
    "get up",
    "jump/leap",
    "lie/sleep",
    "martial art",
    "run/jog",
    "sit",
    "stand",
    "swim",
    "walk",
    "answer phone",
    "brush teeth",
    "carry/hold (an object)",
    "catch (an object)",
    "chop",
    "climb (e.g., a mountain)",
    "clink glass",
    "close (e.g., a door, a box)",
    "cook",
    "cut",
    "dig",
    "dress/put on clothing",
    "drink",
    "drive (e.g., a car, a truck)",
    "eat",
    "enter",
    "exit",
    "extract",
    "fishing",
    "hit (an object)",
    "kick (an object)",
    "lift/pick up",
    "listen (e.g., to music)",
    "open (e.g., a window, a car door)",
    "paint",
    "play board game",
    "play musical instrument",
    "play with pets",
    "point to (an object)",
    "press",
    "pull (an object)",
    "push (an object)",
    "put down",
    "read",
    "ride (e.g., a bike, a car, a horse)",
    "row boat",
    "sail boat",
    "shoot",
    "shovel",
    "smoke",
    "stir",
    "take a photo",
    "text on/look at a cellphone",
    "throw",
    "touch (an object)",
    "turn (e.g., a screwdriver)",
    "watch (e.g., TV)",
    "work on a computer",
    "write",
    "fight/hit (a person)",
    "give/serve (an object) to (a person)",
    "grab (a person)",
    "hand clap",
    "hand shake",
    "hand wave",
    "hug (a person)",
    "kick (a person)",
    "kiss (a person)",
    "lift (a person)",
    "listen to (a person)",
    "play with kids",
    "push (another person)",
    "sing to (e.g., self, a person, a group)",
    "take (an object) from (a person)",
    "talk to (e.g., self, a person, a group)",
    "watch (a person)",
)  # action_id is the index + 1


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Names of a model's action classes, in the order of their ids.

    Args:
        path: A text file with one name a line; a JSON list of names; or a label map (.pbtxt: ``name: "..."`` with
            ``id: N`` or ``label_id: N``, from 1). A label map with gaps gives "class N" for the ids it leaves out.
    Raises:
        ValueError: the file is none of these, is empty, or repeats an id.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: labels must be UTF-8 text, got {error.reason} at byte {error.start}") from error
    if text.lstrip().startswith("["):
        return _nonempty(path, _json_labels(path, text))
    pairs = re.findall(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d+)', text)
    if not pairs:
        if re.search(r"^\s*(item|label)\s*\{", text, re.MULTILINE):
            raise ValueError(f'{path}: a label map must pair name: "..." with id: N, found no pair')
        return _nonempty(path, [line.strip() for line in text.splitlines() if line.strip()])
    names = {int(number): name for name, number in pairs}
    if len(names) != len(pairs) or min(names) < 1 or max(names) > 100_000:
        raise ValueError(f"{path}: label ids must be different and start at 1")
    return tuple(names.get(number, f"class {number}") for number in range(1, max(names) + 1))


def _json_labels(path, text) -> list[str]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: JSON labels must be a list of names")
    return names


def _nonempty(path, names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"{path}: no labels in it")
    return tuple(names)


def format_time(seconds: float) -> str:
    """A keyframe's timestamp as AVA writes it: "0902"; part seconds keep up to three decimals, "0902.5"."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole:04d}" + f".{thousandths:03d}".rstrip("0") * bool(thousandths)


class CsvWriter:
    """Detections in AVA's format, a row a box and action, no header:

    video_id, timestamp, x1, y1, x2, y2 (parts of the picture's width and height, 3 decimals), action_id (from 1),
    score (4 decimals). Rows are written as they come, so an interrupted file is valid up to its last keyframe.
    """

    def __init__(self, file: IO[str]):
        self._file = file
        self._writer = csv.writer(file, lineterminator="\n")

    def write(
        self, video_id: str, seconds: float, boxes: Iterable[Sequence[float]], scores: Iterable[Sequence[float]]
    ) -> int:
        """One keyframe's detections: ``boxes`` in parts of the picture, ``scores`` of every action for each box.

        Returns:
            The number of rows.
        """
        time, rows = format_time(seconds), 0
        for box, actions in zip(boxes, scores, strict=True):
            place = [f"{value:.3f}" for value in box]
            self._writer.writerows(
                (video_id, time, *place, action_id, f"{score:.4f}") for action_id, score in enumerate(actions, 1)
            )
            rows += len(actions)
        self._file.flush()
        return rows
