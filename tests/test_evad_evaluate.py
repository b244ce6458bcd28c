"""``evad evaluate``: files against files, a model on a dataset, several processes, one line for what cannot be done."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evad import EVAD, EVADConfig, profile
from evad.checkpoint import save_checkpoint
from evad.cli import _common, evaluate, main
from evad.console import CommandError

AVA = Path(__file__).parent / "golden" / "ava_eval"
FILES = ["--ground-truth", AVA / "gt.csv", "--detections", AVA / "detections.csv"]
EXCLUDE = ["--exclude", AVA / "excluded_timestamps.csv"]


def run(capfd, *argv):
    """Exit status, stdout, stderr of ``evad evaluate``."""
    try:
        status = main(["evaluate", *(str(word) for word in argv)])
    except SystemExit as exit:
        status = exit.code
    return status, *capfd.readouterr()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    config = EVADConfig.tiny(num_classes=8, short_side=48, width=48, depth=6, num_heads=3)
    save_checkpoint(EVAD(config), path)
    return path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (EXCLUDE, 0.441896981778),
        ([*EXCLUDE, "--match-order", "score"], 0.482275239354),
        ([], 0.426657889300),
    ],
    ids=["as-released", "by-score", "no-exclusions"],
)
def test_ava_as_released(tmp_path, capfd, options, expected):
    status, out, err = run(capfd, "--protocol", "ava", *FILES, *options, "--json", "--out", tmp_path)
    document = json.loads(out)
    assert status == 0 and err == (
        f"evad evaluate: {AVA / 'detections.csv'}: of 1458 boxes, 2 on no keyframe of the ground truth\n"
    )
    assert document["mAP@0.5"] == pytest.approx(expected, abs=1e-12)
    assert len(document["classes"]) == 60
    assert json.loads((tmp_path / "evaluation.json").read_text()) == document


def test_table_csv_and_picture(tmp_path, capfd):
    status, out, _ = run(capfd, *FILES, *EXCLUDE, "--out", tmp_path)
    assert status == 0
    assert "mAP at IoU 0.5: 44.19" in out and "jump/leap" in out and "9 of 60 classes" in out
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    known = [float(row["AP"]) for row in rows if row["AP"]]
    assert len(rows) == 60 and np.mean(known) == pytest.approx(0.441896981778)
    with Image.open(tmp_path / "evaluation.png") as picture:
        assert picture.width > 800
    again = run(capfd, *FILES, "--out", tmp_path / "b", "--baseline", tmp_path / "evaluation.json")
    assert again[0] == 0 and (tmp_path / "b" / "evaluation.png").exists()


def test_classes_of_ones_own(tmp_path, capfd):
    """A labels file decides which classes count: one person, found."""
    (tmp_path / "labels.txt").write_text("fly\nhover\n")
    (tmp_path / "gt.csv").write_text("bird,3,0.1,0.1,0.4,0.4,2\nbird,4,,,,,\n")
    (tmp_path / "found.csv").write_text("bird,3,0.1,0.1,0.4,0.4,2,0.9\nbird,4,0.1,0.1,0.4,0.4,2,0.95\n")
    files = ("--ground-truth", tmp_path / "gt.csv", "--detections", tmp_path / "found.csv")
    status, out, _ = run(capfd, *files, "--labels", tmp_path / "labels.txt", "--json", "--out", tmp_path)
    document = json.loads(out)
    assert status == 0
    assert [(row["name"], row["AP"]) for row in document["classes"]] == [("fly", None), ("hover", 0.5)]
    assert document["mAP@0.5"] == 0.5 and document["keyframes"] == 2


def test_skips_and_counts_bad_lines(tmp_path, capfd):
    (tmp_path / "found.csv").write_text((AVA / "detections.csv").read_text() + "a,1,0.1\nb,x,1,1,1,1,1,1\n")
    arguments = (*FILES[:2], "--detections", tmp_path / "found.csv", *EXCLUDE, "--out", tmp_path, "--json")
    status, out, err = run(capfd, *arguments, "--on-error", "skip")
    assert status == 0 and json.loads(out)["skipped_lines"] == 2 and "line 1459" in err
    assert json.loads(out)["mAP@0.5"] == pytest.approx(0.441896981778)
    status, out, err = run(capfd, *arguments)
    assert status == 2 and not out
    assert f"{tmp_path / 'found.csv'}, line 1459: must have 7 or 8 fields, got 3" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [("a,3,10,10,500,400,1", "in the picture"), ("a,3,0.5,0.1,0.1,0.5,1", "x1 < x2")],
    ids=["pixels", "reversed"],
)
def test_names_boxes_of_the_ground_truth_that_cannot_be(tmp_path, capfd, line, message):
    (tmp_path / "gt.csv").write_text((AVA / "gt.csv").read_text() + line + "\n")
    arguments = ("--ground-truth", tmp_path / "gt.csv", *FILES[2:], *EXCLUDE, "--out", tmp_path, "--json")
    status, out, err = run(capfd, *arguments)
    assert status == 2 and not out
    assert f"{tmp_path / 'gt.csv'}, line 469: the box must" in err and message in err
    status, out, _ = run(capfd, *arguments, "--on-error", "skip")
    assert json.loads(out)["skipped_lines"] == 1
    assert json.loads(out)["mAP@0.5"] == pytest.approx(0.441896981778, abs=1e-12)


def test_says_what_of_the_files_does_not_count(tmp_path, capfd):
    (tmp_path / "gt.csv").write_text("a,3,0.1,0.1,0.4,0.4,1\na,3,0.1,0.1,0.4,0.4,99\n")
    (tmp_path / "found.csv").write_text("b,3,0.1,0.1,0.4,0.4,1,0.9\nb,4,10,10,40,40,99,0.9\na,3,0.1,0.1,0.4,0.4,2,1\n")
    files = ("--ground-truth", tmp_path / "gt.csv", "--detections", tmp_path / "found.csv", "--out", tmp_path)
    status, _, err = run(capfd, *files)
    assert status == 0
    assert "gt.csv: of 2 boxes, 1 of classes that are not known\n" in err
    assert "found.csv: of 3 boxes, 1 of classes that are not known, 2 on no keyframe of the ground truth, 1 not" in err


def on_disk(folder, labels="fly\nhover\n", **options):
    """A dataset's YAML of one's own: a video of 4 pictures, and another that is broken."""
    (folder / "media" / "v").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (48, 48), (number, 80, 0)).save(folder / "media" / "v" / f"{number}.png")
    (folder / "media" / "broken.mp4").write_bytes(bytes(5000))
    (folder / "labels.txt").write_text(labels)
    paths = {name: str(folder / path) for name, path in (("media", "media"), ("labels", "labels.txt"))}
    section = {"name": "csv", "fps": 1, "annotations": str(folder / "gt.csv"), **paths, **options}
    (folder / "data.yaml").write_text(json.dumps(section))
    return "--data", folder / "data.yaml", "--workers", 0, "--device", "cpu", "--size", 48, "--out", folder / "out"


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "two.safetensors"
    save_checkpoint(EVAD(EVADConfig.tiny(num_classes=2, short_side=48)), path)
    return path


def test_a_video_that_cannot_be_read_changes_no_score(tmp_path, capfd, two_classes):
    words = ("--checkpoint", two_classes, *on_disk(tmp_path, on_error="skip"), "--json")
    rows = "v,1,0.1,0.1,0.5,0.5,1,0\nv,2,0.1,0.1,0.9,0.9,2,0\n"
    documents = []
    for more in ("", "broken,1,0.1,0.1,0.5,0.5,1,0\nv,1,0.1,0.1,0.5,0.5,3,0\n"):
        (tmp_path / "gt.csv").write_text(rows + more)
        status, out, err = run(capfd, *words)
        assert status == 0, err
        documents.append(json.loads(out))
        assert {row[0] for row in csv.reader((tmp_path / "out" / "detections.csv").open())} == {"v"}
    assert [document.pop("skipped") for document in documents] == [0, 2]
    assert [document.pop("clips_per_second") > 0 for document in documents] == [True, True]
    assert documents[0] == documents[1]
    status, _, err = run(capfd, *words[:-1])
    assert "evad evaluate: 2 times a line or clip of the data could not be used and was skipped" in err
    (tmp_path / "gt.csv").write_text("broken,1,0.1,0.1,0.5,0.5,1,0\n")
    status, _, err = run(capfd, *words)
    assert status == 2 and "the dataset has no clip that can be read" in err


def test_scores_only_the_classes_of_the_label_map(tmp_path, capfd):
    words = on_disk(tmp_path, 'item { name: "fly" id: 1 }\nitem { name: "land" id: 8 }\n')
    (tmp_path / "gt.csv").write_text("v,1,0.1,0.1,0.5,0.5,8,0\n")
    save_checkpoint(EVAD(EVADConfig.tiny(num_classes=8, short_side=48)), tmp_path / "eight.safetensors")
    status, out, err = run(capfd, "--checkpoint", tmp_path / "eight.safetensors", *words, "--json")
    assert status == 0, err
    assert [(row["id"], row["name"]) for row in json.loads(out)["classes"]] == [(1, "fly"), (8, "land")]


def test_boxes_of_other_videos_are_said(tmp_path, capfd, two_classes):
    words = ("--checkpoint", two_classes, *on_disk(tmp_path), "--boxes", tmp_path / "boxes.csv")
    (tmp_path / "gt.csv").write_text("v,1,0.1,0.1,0.5,0.5,1,0\n")
    (tmp_path / "boxes.csv").write_text("w,1,0.1,0.1,0.5,0.5,,0.9\nv,1,0.1,0.1,0.5,0.5,,0.9\n")
    status, _, err = run(capfd, *words)
    assert status == 0 and "boxes.csv: of 2 boxes, 1 on no keyframe that was evaluated" in err
    (tmp_path / "boxes.csv").write_text("v,1,10,10,50,50,,0.9\n")
    status, _, err = run(capfd, *words)
    assert status == 2 and "boxes.csv, line 1: the box must lie in the picture" in err


def test_video_map_needs_tubes(tmp_path, capfd, checkpoint):
    words = ("--protocol", "jhmdb", "--data", "synthetic", "--checkpoint", checkpoint, "--out", tmp_path)
    status, _, err = run(capfd, *words)
    assert status == 2 and "--protocol: jhmdb needs a dataset of tubes" in err


def test_a_model(tmp_path, capfd, checkpoint):
    arguments = ("--checkpoint", checkpoint, "--data", "synthetic", "--limit", 3, "--workers", 0, "--device", "cpu")
    status, out, _ = run(capfd, *arguments, "--out", tmp_path, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["clips"] == 3 and len(document["classes"]) == 8 and document["classes"][3]["name"] == "jump"
    assert 0 <= document["person_AP@0.5"] <= 1 and document["clips_per_second"] > 0
    rows = list(csv.reader((tmp_path / "detections.csv").open()))
    assert {row[0] for row in rows} == {f"synthetic_val_{index:06d}" for index in range(3)}
    boxes = ("--boxes", tmp_path / "detections.csv", "--size", 24, "--out", tmp_path / "again")
    status, out, _ = run(capfd, *arguments, *boxes)
    assert status == 0 and "people: AP" in out and "clips" in out
    again = list(csv.reader((tmp_path / "again" / "detections.csv").open()))
    places = [np.array([row[2:6] for row in some], float) for some in (again, rows)]
    np.testing.assert_allclose(*places, atol=1 / 24)  # the same boxes, scored anew, clipped to fewer pixels


def test_a_model_runs_in_float32(tmp_path, capfd, checkpoint, monkeypatch):
    """Also on a GPU, where other commands choose bfloat16; that can be asked for."""
    chosen = []

    def refuse(args):
        chosen.append(_common.placement(args))
        raise CommandError("seen")

    monkeypatch.setattr(evaluate, "build", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for options in ((), ("--dtype", "bfloat16")):
        assert run(capfd, "--data", "synthetic", "--checkpoint", checkpoint, *options, "--out", tmp_path)[0] == 2
    assert chosen == [(torch.device("cuda:0"), torch.float32), (torch.device("cuda:0"), torch.bfloat16)]


def test_says_once_where_bfloat16_is_slow(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(profile, "bfloat16_is_slow", lambda device: True)
    _common._say_once.cache_clear()
    for options, lines in ((("float32",), 0), (("bfloat16",), 1), (("bfloat16",), 0)):
        assert (
            run(
                capfd,
                "--data",
                "synthetic",
                "--limit",
                1,
                "--workers",
                0,
                "--device",
                "cpu",
                "--dtype",
                *options,
                "--out",
                tmp_path,
            )[2].count("float32 is several times faster")
            == lines
        )


def test_names_of_the_package_beside_folders_of_that_name(tmp_path, capfd, checkpoint, monkeypatch):
    """`python -m evad.data synthetic` makes such a folder; evad train's names are known here, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    words = ("--checkpoint", checkpoint, "--limit", 2, "--workers", 0, "--device", "cpu", "--json", "--out", "out")
    status, out, err = run(capfd, "--data", "synthetic", *words)
    assert status == 0 and json.loads(out)["clips"] == 2, err
    status, _, err = run(capfd, "--data", "jhmdb", *words)
    assert status == 2 and "data/jhmdb/Frames: is not a folder" in err


def test_ava_counts_sixty_classes(tmp_path, capfd):
    """A dataset with AVA's 80 classes: the mean is over the 60 that AVA evaluates."""
    (tmp_path / "media" / "v").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (48, 48)).save(tmp_path / "media" / "v" / f"{number}.png")
    (tmp_path / "gt.csv").write_text("v,900,0.1,0.1,0.5,0.5,2,0\nv,900,0.1,0.1,0.5,0.5,80,0\n")
    section = {"name": "ava", "annotations": str(tmp_path / "gt.csv"), "media": str(tmp_path / "media")}
    (tmp_path / "data.yaml").write_text(json.dumps(section))
    words = ("--model", "tiny", "--size", 48, "--data", tmp_path / "data.yaml", "--workers", 0, "--device", "cpu")
    status, out, err = run(capfd, *words, "--json", "--out", tmp_path)
    assert status == 0, err
    assert [row["id"] for row in json.loads(out)["classes"] if row["AP"] is not None] == [80]
    assert len(json.loads(out)["classes"]) == 60


def test_two_processes_equal_one(tmp_path, checkpoint):
    """Started as torchrun starts them: 5 clips over two processes, rank 0 reports all."""
    (tmp_path / "data.yaml").write_text("data:\n  name: synthetic\n  val: {clips: 5}\n")
    words = [sys.executable, "-m", "evad", "evaluate", "--checkpoint", checkpoint, "--data", tmp_path / "data.yaml"]
    words += ["--workers", 0, "--device", "cpu", "--json", "--batch-size", 1, "--out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [str(word) for word in [*words, tmp_path / "two"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert outputs[1][0] == ""
    alone = subprocess.run([str(word) for word in [*words, tmp_path / "one"]], capture_output=True, text=True)
    two, one = json.loads(outputs[0][0]), json.loads(alone.stdout)
    assert two.pop("clips_per_second") and one.pop("clips_per_second")
    assert two == one and one["clips"] == 5
    found = [(tmp_path / name / "detections.csv").read_text() for name in ("one", "two")]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --ground-truth and --detections, or --data"),
        ([*FILES, "--data", "synthetic"], "either"),
        (FILES[:2], "belong together"),
        (["--ground-truth", "nowhere.csv", *FILES[2:]], "nowhere.csv: No such file"),
        ([*FILES, "--exclude", AVA / "expected.json"], "expected.json, line 1: must be a video id and a timestamp"),
        ([*FILES, "--labels", "nowhere.txt"], "nowhere.txt"),
        ([*FILES, "--baseline", AVA / "classes.json"], "is no evaluation.json"),
        ([*FILES, "--match-order", "best"], "--match-order"),
        (["--data", "nothing", "--model", "tiny"], "'nothing' is neither a file nor one of synthetic"),
        (["--data", "synthetic", "--checkpoint", "CHECKPOINT", "--boxes", "none.csv"], "none.csv: No such file"),
        (["--data", "synthetic", "--model", "tiny"], "has 8 classes, the model 80"),
        (
            ["--data", "WRONG", "--checkpoint", "CHECKPOINT"],
            "data: clips must be a whole number of at least 1, got 'x'",
        ),
    ],
)
def test_rejects(tmp_path, capfd, checkpoint, arguments, message):
    (tmp_path / "wrong.yaml").write_text("name: synthetic\nval: {clips: x}\n")
    places = {"CHECKPOINT": checkpoint, "WRONG": tmp_path / "wrong.yaml"}
    arguments = [places.get(word, word) for word in arguments]
    status, out, err = run(capfd, *arguments, "--out", tmp_path)
    assert status == 2 and not out
    assert message in err and err.count("\n") == 1
