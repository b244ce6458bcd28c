"""evad.ava: class names, labels files, detections in AVA's CSV format."""

import csv
import io
import json

import pytest

from evad import ava


def test_eighty_actions():
    assert len(set(ava.ACTIONS)) == 80
    assert [ava.ACTIONS[number - 1] for number in (1, 12, 14, 49, 64, 80)] == [
        "bend/bow (at the waist)",
        "stand",
        "walk",
        "ride (e.g., a bike, a car, a horse)",
        "fight/hit (a person)",
        "watch (a person)",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run\n\n jump \nstand\n", ("run", "jump", "stand")),
        ('["run", "jump"]', ("run", "jump")),
        ('item {\n  name: "run"\n  id: 1\n}\nitem {\n  name: "a (b)"\n  id: 3\n}\n', ("run", "class 2", "a (b)")),
        ('label {\n  name: "run"\n  label_id: 1\n  label_type: PERSON_MOVEMENT\n}\n', ("run",)),
        ("laufen\nmüde sein\n", ("laufen", "müde sein")),
    ],
    ids=["lines", "json", "items", "labels", "utf-8"],
)
def test_read_labels(tmp_path, text, expected):
    path = tmp_path / "labels"
    path.write_text(text, encoding="utf-8")
    assert ava.read_labels(path) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no labels"),
        (b"\n  \n", "no labels"),
        (b"[1, 2]", "list of names"),
        (b'["run"', "not valid JSON"),
        (b"\xff\xfe\x00run", "UTF-8"),
        (b'item { name: "a" id: 0 }', "start at 1"),
        (b'item { name: "a" id: 2 }\nitem { name: "b" id: 2 }', "different"),
        (b'item { title: "a" }', "no pair"),
    ],
)
def test_rejects_labels(tmp_path, data, message):
    path = tmp_path / "labels"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        ava.read_labels(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(902.0, "0902"), (0.0, "0000"), (0.5, "0000.5"), (12.3456, "0012.346"), (1798, "1798"), (0.9999, "0001")],
)
def test_format_time(seconds, text):
    assert ava.format_time(seconds) == text


def test_csv_rows():
    file = io.StringIO()
    writer = ava.CsvWriter(file)
    assert writer.write("a,b", 902.0, [[0.12345, 0, 1, 0.9999]], [[0.5, 0.123456]]) == 2
    assert writer.write("v", 1.5, [], []) == 0
    assert list(csv.reader(io.StringIO(file.getvalue()))) == [
        ["a,b", "0902", "0.123", "0.000", "1.000", "1.000", "1", "0.5000"],
        ["a,b", "0902", "0.123", "0.000", "1.000", "1.000", "2", "0.1235"],
    ]


def test_labels_round_trip_of_ava(tmp_path):
    path = tmp_path / "ava.json"
    path.write_text(json.dumps(ava.ACTIONS))
    assert ava.read_labels(path) == ava.ACTIONS
