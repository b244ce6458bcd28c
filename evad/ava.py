"""AVA v2.1 and v2.2: the 80 action classes, label maps, and annotations and detections in its CSV format."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from .problems import DataError, Problems

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


# The classes that AVA evaluates, with at least 25 examples in each split.
EVALUATED = tuple(
    number
    for number in range(1, 81)
    if number not in {2, 16, 18, 19, 21, 23, 25, 31, 32, 33, 35, 39, 40, 42, 44, 50, 53, 55, 71, 75}
)
OUTSIDE = 1e-3  # parts of the picture that rounding may put a box outside


class Classes(NamedTuple):
    """Action classes, by id from 1."""

    names: dict[int, str]  # those that may be annotated
    counted: tuple[int, ...]  # those that evaluation counts

    @property
    def labels(self) -> tuple[str, ...]:
        """Names in the order of a model's outputs; "class N" for an id between them that has none."""
        return tuple(self.names.get(number, f"class {number}") for number in range(1, max(self.names) + 1))


def read_classes(path: str | Path | None) -> Classes:
    """The classes of data in AVA's format.

    Args:
        path: As for ``read_label_map``: its classes, and no others, are annotated, and count. But for AVA's own (None,
            its map of the 80 classes, or its map of the 60 that it evaluates) all 80 are annotated, and the 60 count.
    Raises:
        ValueError: as ``read_label_map``.
    """
    every = dict(enumerate(ACTIONS, 1))
    names = every if path is None else read_label_map(path)
    if names == every or tuple(sorted(names)) == EVALUATED:
        return Classes(every, EVALUATED)
    return Classes(names, tuple(sorted(names)))


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Names of a model's action classes, in the order of their ids.

    Args:
        path: As for ``read_label_map``. A map with gaps gives "class N" for the ids it leaves out.
    Raises:
        ValueError: the file is none of these, is empty, or repeats an id.
    """
    return Classes(read_label_map(path), ()).labels


def read_label_map(path: str | Path) -> dict[int, str]:
    """Action id (from 1) to name.

    Args:
        path: A text file with one name a line; a JSON list of names; a label map (.pbtxt: ``name: "..."`` with
            ``id: N`` or ``label_id: N``); or a table (.csv: id, name, with or without a line of titles).
    Raises:
        ValueError: the file is none of these, is empty, or repeats an id.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: labels must be UTF-8 text, got {error.reason} at byte {error.start}") from error
    if text.lstrip().startswith("["):
        pairs = list(enumerate(_json_labels(path, text), 1))
    elif pairs := [(int(number), name) for name, number in _ITEM.findall(text)]:
        pass
    elif re.search(r"^\s*(item|label)\s*\{", text, re.MULTILINE):
        raise ValueError(f'{path}: a label map must pair name: "..." with id: N, found no pair')
    elif Path(path).suffix.lower() == ".csv":
        rows = [row for row in csv.reader(text.splitlines()) if row]
        if rows and not rows[0][0].strip().isdigit():
            del rows[0]
        if not all(len(row) >= 2 and row[0].strip().isdigit() for row in rows):
            raise ValueError(f"{path}: a table of labels must have an id and a name in every line")
        pairs = [(int(row[0]), row[1].strip()) for row in rows]
    else:
        pairs = list(enumerate((line.strip() for line in text.splitlines() if line.strip()), 1))
    if not pairs:
        raise ValueError(f"{path}: no labels in it")
    names = dict(pairs)
    if len(names) != len(pairs) or min(names) < 1 or max(names) > 100_000:
        raise ValueError(f"{path}: label ids must be different and start at 1")
    return names


_ITEM = re.compile(r'name:\s*"([^"]*)"\s*(?:label_)?id:\s*(\d+)')


def _json_labels(path, text) -> list[str]:
    try:
        names = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: JSON labels must be a list of names")
    return names


def format_time(seconds: float) -> str:
    """A keyframe's timestamp as AVA writes it: "0902"; part seconds keep up to three decimals, "0902.5"."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole:04d}" + f".{thousandths:03d}".rstrip("0") * bool(thousandths)


class Row(NamedTuple):
    """A line of annotations or detections."""

    line: int  # from 1
    video: str
    second: float
    place: tuple[str, ...]  # x1, y1, x2, y2 as written, parts of the picture's width and height; empty: nobody is there
    action: int  # from 1; 0 where the line has none
    score: float  # of a detection; the person's id in annotations; 1 where the line has none

    @property
    def box(self) -> tuple[float, ...]:
        return tuple(map(float, self.place))

    @property
    def outside(self) -> str:
        """What is wrong if the box is not in the picture, or ""."""
        if all(-OUTSIDE <= value <= 1 + OUTSIDE for value in self.box):
            return ""
        return f"the box must lie in the picture, in [0, 1], got {', '.join(self.place)}"

    @property
    def wrong(self) -> str:
        """What is wrong with the box of somebody who is there, or ""."""
        x1, y1, x2, y2 = self.box
        empty = x1 >= x2 or y1 >= y2
        return self.outside or f"the box must have x1 < x2 and y1 < y2, got {', '.join(self.place)}" * empty


def read_rows(path: str | Path, problems: Problems | None = None) -> Iterator[Row]:
    """Lines of a CSV in AVA's format: video_id, timestamp, x1, y1, x2, y2, action_id[, score or person_id].

    A line of titles is passed over; a line without a box, as AVA has for seconds where nobody is, comes without place.

    Raises:
        DataError: the file cannot be read, or (policy "fail") a line is not of this format; file and line are named.
    """
    problems = Problems() if problems is None else problems
    for line, fields in _lines(path):
        if line == 1 and len(fields) > 1 and not _is_number(fields[1]):
            continue
        if len(fields) == 2 or (len(fields) > 2 and not any(field.strip() for field in fields[2:])):
            fields, place = fields[:2], ()
        else:
            place = tuple(field.strip() for field in fields[2:6])
        if len(fields) not in (2, 7, 8):
            problems(f"{path}, line {line}: must have 7 or 8 fields, got {len(fields)}")
            continue
        try:
            second = float(fields[1])
            action = int(fields[6]) if place and fields[6].strip() else 0
            score = float(fields[7]) if len(fields) == 8 and fields[7].strip() else 1.0
            if not all(math.isfinite(value) for value in (second, score, *map(float, place))):
                raise ValueError("a number is not finite")
        except ValueError as error:
            problems(f"{path}, line {line}: {error}", error)
            continue
        yield Row(line, fields[0], second, place, action, score)


def read_seconds(path: str | Path) -> set[tuple[str, float]]:
    """(video id, second) of every line of a list of excluded timestamps: video_id, timestamp.

    Raises:
        DataError: as ``read_rows``.
    """
    seconds = set()
    for line, fields in _lines(path):
        if len(fields) < 2 or not _is_number(fields[1]):
            raise DataError(f"{path}, line {line}: must be a video id and a timestamp, got {','.join(fields)!r}")
        seconds.add((fields[0], float(fields[1])))
    return seconds


def _lines(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: is not a CSV file in UTF-8 ({error})") from error


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


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
