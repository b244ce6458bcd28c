"""evad.data: AVA's format from videos and frames, released preprocessing, what is wrong said by file and line."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from evad import EVADConfig, ava, data
from evad.data import Synthetic, synthetic
from evad.data.clips import prepare_boxes
from evad.data.media import find
from evad.problems import DataError
from evad.video import resized

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "golden" / "op_preprocess.npz")
CASES = json.loads(str(GOLDEN["cases_json"]))
CLIP = {"num_frames": 16, "frame_stride": 4, "short_side": 48}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three synthetic clips on disk as AVA comes."""
    folder = tmp_path_factory.mktemp("written")
    synthetic.write(Synthetic("val", clips=3, size=(48, 64)), folder)
    return folder


def section(folder, **options):
    options = {
        "annotations": folder / "val.csv",
        "media": folder / "videos",
        "labels": folder / "labels.pbtxt",
    } | options
    return {"name": "csv"} | {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}


def frames_folder(folder, count=40, first=1, size=(36, 50)):
    """Numbered pictures whose brightness tells their number; number n is 5 * n."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        Image.fromarray(np.full((*size, 3), 5 * number, np.uint8)).save(folder / f"v_{number:06d}.png")
    return folder


def own(tmp_path, rows, **options):
    """A dataset of one's own: frames of video "v", and these lines."""
    if not (tmp_path / "media").exists():
        frames_folder(tmp_path / "media" / "v")
    (tmp_path / "labels.txt").write_text("fly\nhover\n")
    (tmp_path / "gt.csv").write_text("\n".join(rows) + "\n")
    paths = {"annotations": tmp_path / "gt.csv", "media": tmp_path / "media", "labels": tmp_path / "labels.txt"}
    options = paths | {"fps": 10.0, "frame_rate": 10.0, **CLIP, **options}
    split = options.pop("split", "val")
    return data.build(section(tmp_path, **options), split)


# Preprocessing


@pytest.mark.parametrize("number", range(len(CASES)))
def test_preprocessing_matches_golden(tmp_path, number):
    """From pictures in a folder to the clip, flipped as the golden case: pixels within a grey level, boxes exact."""
    case, name = CASES[number], f"case{number}/"
    frames = GOLDEN[name + "frames_bgr_hwc"][..., ::-1]
    (tmp_path / "media" / "v").mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "media" / "v" / f"{index}.png")
    rows = [f"v,0.1,{','.join(map(repr, box.tolist()))},1,0" for box in GOLDEN[name + "boxes_norm"].clip(0, 1)]
    options = {"flip": float(case["flipped"]), "max_size": case["max_size"], "short_sides": [case["short"]]}
    options |= {"short_side": case["short"], "num_frames": 2, "frame_stride": 1}
    clip, target, key = own(tmp_path, rows, split="train", **options)[0]
    assert key == ("v", 0.1)
    assert (clip - torch.from_numpy(GOLDEN[name + "out_cthw"])).abs().max() <= 0.0175
    np.testing.assert_allclose(target["boxes"], GOLDEN[name + "out_boxes"], rtol=0, atol=1e-5)
    height, width = case["h"], case["w"]
    boxes = prepare_boxes(
        GOLDEN[name + "boxes_norm"], (height, width), case["short"], case["max_size"], flip=case["flipped"]
    )
    np.testing.assert_allclose(boxes, GOLDEN[name + "out_boxes"], rtol=0, atol=1e-9)
    assert list(clip.shape[2:]) == list(resized(height, width, case["short"], case["max_size"])[:2])


# Videos and frames


def test_reads_back_what_synthetic_wrote(written):
    """Through the encoder, the decoder and the CSV: the same pictures, people and actions."""
    config = EVADConfig.tiny(short_side=48)
    read, made = data.build(section(written), "val", config), Synthetic("val", clips=3, size=(48, 64))
    assert read.labels == made.labels and len(read) == 3
    for index in range(3):
        (clip, target, key), expected = read[index], made[index]
        assert key == expected.key and clip.shape == expected.clip.shape
        assert (clip - expected.clip).abs().mean() < 0.15  # of a standard deviation: H.264 blurs the noise
        torch.testing.assert_close(target["boxes"], expected.target["boxes"], rtol=0, atol=0.02)
        assert torch.equal(target["labels"], expected.target["labels"])


def test_writes_from_the_command_line(tmp_path, monkeypatch):
    words = ["--train", "1", "--val", "2", "--size", "32", "48", "--seed", "4"]
    monkeypatch.setattr(sys, "argv", ["evad.data", str(tmp_path), *words])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("evad.data", run_name="__main__")
    assert len(list((tmp_path / "videos").iterdir())) == 3
    dataset = data.build(section(tmp_path), "val", EVADConfig.tiny(short_side=32))
    assert dataset[1].clip.shape == (3, 16, 32, 48)


@pytest.mark.parametrize(
    ("folder", "words", "message"),
    [
        ("file/below", [], "file/below"),
        ("full", ["--train", "0", "--val", "1"], "val.csv: No space left|full: No space left"),
        ("new", ["--train", "0", "--val", "0"], "--train and --val: there is no clip to write"),
        ("new", ["--val", "-1"], "--val: must be a whole number at least 0, got '-1'"),
    ],
)
def test_command_line_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, capfd, folder, words, message):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "val.csv").symlink_to("/dev/full")
    monkeypatch.setattr(sys, "argv", ["evad.data", str(tmp_path / folder), "--size", "32", "32", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("evad.data", run_name="__main__")
    err = capfd.readouterr().err.splitlines()
    assert err[-1].startswith("python -m evad.data: ") and re.search(message, err[-1])
    assert not (tmp_path / "new").exists()


def test_frames_are_the_released_ones(tmp_path):
    """Index c - 32 ... c + 28 in steps of 4 around the keyframe, clamped to the first and last."""
    dataset = own(tmp_path, ["v,2,0.1,0.1,0.5,0.5,1,0", "v,1,0.1,0.1,0.5,0.5,2,0"])
    for index, centre in ((0, 20), (1, 10)):
        expected = (centre + np.arange(-32, 32, 4)).clip(0, 39) + 1
        levels = dataset[index].clip[0, :, 10, 10] * 0.225 * 255 + 0.45 * 255
        assert (levels / 5).round().tolist() == expected.tolist()


def test_clips_of_folders_last_as_long_at_any_rate(tmp_path):
    """Frames at 10 a second for a model that counts them at 30: the nearest ones, as far from the keyframe in time."""
    dataset = own(tmp_path, ["v,2,0.1,0.1,0.5,0.5,1,0"], frame_rate=30.0)
    levels = dataset[0].clip[0, :, 10, 10] * 0.225 * 255 + 0.45 * 255
    expected = [21 + round((i - 8) * 4 / 30 * 10) for i in range(16)]
    assert (levels / 5).round().tolist() == expected and expected[0] == 10


def test_one_box_with_several_actions(tmp_path):
    """Lines with the same coordinates, as written, are one person; action 2 twice is one action."""
    rows = ["v,1,0.1,0.1,0.5,0.5,1,0", "v,1,0.1,0.1,0.5,0.5,2,0", "v,1,0.10,0.1,0.5,0.5,2,1", "v,1,0.1,0.1,0.5,0.5,2,0"]
    target = own(tmp_path, rows)[0].target
    assert target["labels"].tolist() == [[1, 1], [0, 1]]


def test_training_leaves_out_empty_and_excluded_seconds(tmp_path):
    rows = ["v,1,0.1,0.1,0.5,0.5,1,0", "v,2,,,,,,", "v,3,0.1,0.1,0.5,0.5,1,0"]
    (tmp_path / "excluded.csv").write_text("v,0003\n")
    options = {"exclude": tmp_path / "excluded.csv"}
    assert [entry.key[1] for entry in own(tmp_path, rows, split="train", **options).entries] == [1]
    dataset = own(tmp_path, rows, **options)
    assert [entry.key[1] for entry in dataset.entries] == [1, 2]
    assert dataset[1].target["boxes"].shape == (0, 4) and dataset[1].target["labels"].shape == (0, 2)


def test_augmentation_depends_on_seed_epoch_and_index(tmp_path):
    rows = [f"v,{second},0.1,0.1,0.3,0.5,1,0" for second in (1, 2, 3)]
    many = {"split": "train", "short_sides": [32, 40, 48], "seed": 5}
    dataset, again = (own(tmp_path, rows, **many) for _ in range(2))
    seen = set()
    for epoch in range(6):
        for one in (dataset, again):
            one.set_epoch(epoch)
        for index in (2, 0, 1):
            clip, target, _ = dataset[index]
            assert torch.equal(clip, again[index].clip)
            flipped = bool(target["boxes"][0, 0] > clip.shape[3] / 2)
            seen.add((clip.shape[2], flipped))
    assert seen == {(side, flipped) for side in (32, 40, 48) for flipped in (False, True)}
    still = own(tmp_path, rows, short_sides=[32, 40])
    assert still[0].clip.shape[2] == 48  # other splits are not augmented


@pytest.mark.parametrize(
    ("labels", "sided"),
    [
        ("walk left\nwalk right\njump\n", "walk left, walk right"),
        ("TurnLeft\nhold\n", "TurnLeft"),
        ("turn_RIGHT\nhold\n", "turn_RIGHT"),
        ("stand upright\nbright\nleftover\n", None),
    ],
)
def test_mirror_images_of_classes_with_sides_warn(tmp_path, recwarn, labels, sided):
    own(tmp_path, [GOOD])
    (tmp_path / "sides.txt").write_text(labels)
    for split, options in (("train", {}), ("train", {"flip": 0}), ("val", {})):
        own(tmp_path, [GOOD], split=split, labels=tmp_path / "sides.txt", **options)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (sided is not None)
    assert not said or f"({sided}): set flip to 0" in said[0]


def test_ava_starts_at_minute_fifteen(tmp_path):
    frames_folder(tmp_path / "media" / "v", count=45, first=0)
    (tmp_path / "gt.csv").write_text("v,0901,0.1,0.1,0.5,0.5,80,0\n")
    dataset = data.build(
        {"name": "ava", "annotations": str(tmp_path / "gt.csv"), "media": str(tmp_path / "media")}, "val"
    )
    assert dataset.labels == ava.ACTIONS and dataset[0].key == ("v", 901)
    assert round(float(dataset[0].clip[0, 8, 0, 0] * 0.225 + 0.45) * 255 / 5) == 30


# What is wrong


GOOD = "v,1,0.1,0.1,0.5,0.5,1,0"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("v,1,0.1,0.1,0.5,0.5,3,0", r"action_id must be in \[1, 2\], got 3"),
        ("v,1,0.1,0.1,0.5,1.5,1,0", "must lie in the picture.* 1.5"),
        ("v,1,0.5,0.1,0.1,0.5,1,0", "x1 < x2"),
        ("v,1,0.1,0.1,0.5,0.5", "7 or 8 fields, got 6"),
        ("v,one,0.1,0.1,0.5,0.5,1", "could not convert string"),
        ("v,1,nan,0.1,0.5,0.5,1", "not finite"),
        ("w,1,0.1,0.1,0.5,0.5,1", "no video or folder 'w'"),
        ("v,-1,0.1,0.1,0.5,0.5,1", "before the videos begin"),
    ],
)
def test_wrong_lines_are_named(tmp_path, capfd, row, message):
    with pytest.raises(DataError, match=f"gt.csv, line 2: .*{message}"):
        own(tmp_path, [GOOD, row])
    dataset = own(tmp_path, [GOOD, row, GOOD], on_error="skip")
    assert len(dataset) == 1 and dataset.problems.count == 1
    assert "gt.csv, line 2" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["missing frame", "broken frame", "after the end", "broken video", "video too short"])
def test_clips_that_cannot_be_read(tmp_path, written, kind):
    """The message names the file; with "skip" the clip is black, nobody is in it, and it is marked and counted."""
    row, expected = "v,2,0.1,0.1,0.5,0.5,1,0", "v_000021.png"
    if kind == "after the end":
        row, expected = "v,9,0.1,0.1,0.5,0.5,1,0", "has no frame 91, the last is 40"
    own(tmp_path, [row])
    if kind == "missing frame":
        (tmp_path / "media" / "v" / "v_000021.png").unlink()
    elif kind == "broken frame":
        (tmp_path / "media" / "v" / "v_000021.png").write_bytes(b"no picture")
    elif "video" in kind:
        row, expected = "w,2,0.1,0.1,0.5,0.5,1,0", "w.mp4"
        whole = next((written / "videos").glob("*.mp4")).read_bytes()
        (tmp_path / "media" / "w.mp4").write_bytes(whole if "short" in kind else whole[:900])
        row = row.replace(",2,", ",20,") if "short" in kind else row
    with pytest.raises(DataError, match=expected):
        own(tmp_path, [row])[0]
    dataset = own(tmp_path, [row], on_error="skip")
    batch = next(iter(DataLoader(dataset, 1, collate_fn=data.collate, num_workers=1)))
    assert batch.clips.shape[:3] == (1, 3, 16) and len(batch.targets[0]["boxes"]) == 0
    assert batch.targets[0]["unreadable"]
    assert dataset.problems.count == 1  # though a worker met it


GAPS = {1: "fly", 7: "hover", 8: "land"}


def label_map(path, names):
    path.write_text("".join(f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in names.items()))
    return path


def test_classes_that_the_label_map_leaves_out_are_no_classes(tmp_path):
    labels = label_map(tmp_path / "gaps.pbtxt", GAPS)
    rows = [GOOD, "v,1,0.1,0.1,0.5,0.5,7,0", "v,1,0.1,0.1,0.5,0.5,2,0"]
    with pytest.raises(DataError, match=r"gt.csv, line 3: action_id must be in \[1, 8\], and in the label map, got 2"):
        own(tmp_path, rows, labels=labels)
    dataset = own(tmp_path, rows, labels=labels, on_error="skip")
    assert dataset.problems.count == 1 and dataset.counted == (1, 7, 8) and dataset.labels[1] == "class 2"
    assert dataset[0].target["labels"].tolist() == [[1, 0, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("numbers", [ava.EVALUATED, range(1, 81)], ids=["60", "80"])
def test_avas_own_label_maps(tmp_path, numbers):
    """All 80 classes are annotated and learnt, whichever of AVA's maps is given; the 60 are evaluated."""
    labels = label_map(tmp_path / "ava.pbtxt", {number: ava.ACTIONS[number - 1] for number in numbers})
    dataset = own(tmp_path, ["v,1,0.1,0.1,0.5,0.5,2,0"], labels=labels)
    assert dataset.labels == ava.ACTIONS and dataset.counted == ava.EVALUATED
    assert dataset[0].target["labels"][0, 1] == 1


@pytest.mark.parametrize("ending", [".mp4", ".MP4", ".MOV"])
def test_endings_of_videos_may_be_capitals(tmp_path, ending):
    path = tmp_path / f"party.1{ending}"
    path.touch()
    assert find(tmp_path, "party.1") == find(tmp_path, path.name) == path
    assert find(tmp_path, "party") is None


def test_wrong_paths(tmp_path):
    own(tmp_path, [GOOD])
    for option in ("annotations", "media", "labels"):
        with pytest.raises(DataError, match="nowhere"):
            data.build(
                {
                    **section(tmp_path),
                    "annotations": str(tmp_path / "gt.csv"),
                    "media": str(tmp_path / "media"),
                    "labels": str(tmp_path / "labels.txt"),
                    option: str(tmp_path / "nowhere"),
                },
                "val",
            )
    with pytest.raises(DataError, match="no keyframe"):
        own(tmp_path, ["v,1,,,,,,"], split="train")


def test_build_names_options():
    with pytest.raises(ValueError, match="csv needs the option 'annotations'"):
        data.build({"name": "csv", "media": "x", "labels": "y"}, "val")
    with pytest.raises(ValueError, match=r"'frames' is no option of csv, which has .*annotations.*exclude"):
        data.build({"name": "csv", "frames": "x"}, "val")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("start", "abc", "a number, got 'abc'"),
        ("start", float("nan"), "a number, got nan"),
        ("fps", 0, "a number of at least 0.01, got 0"),
        ("fps", -3, "a number of at least 0.01, got -3"),
        ("flip", "abc", "a number of at least 0 and at most 1, got 'abc'"),
        ("flip", 3, "a number of at least 0 and at most 1, got 3"),
        ("flip", True, "a number of at least 0 and at most 1, got True"),
        ("seed", -1, "a whole number of at least 0, got -1"),
        ("seed", 1.5, "a whole number of at least 0, got 1.5"),
        ("media", 3, "text, got 3"),
        ("annotations", None, "text, got None"),
        ("short_sides", 96, "a list of whole numbers of at least 16 and at most 4096, got 96"),
        ("short_sides", [], r"a list of whole numbers .*, got \[\]"),
        ("short_sides", [96, 0], r"a list of whole numbers of at least 16 .*, got \[96, 0\]"),
        ("short_side", 0, "a whole number of at least 16 and at most 4096, got 0"),
        ("max_size", 0, "a whole number of at least 16"),
        ("num_frames", 8, "the model's 16, got 8"),
        ("frame_stride", 1, "the model's 4, got 1"),
        ("frame_rate", 25, "the model's 30.0, got 25"),
        ("frame_rate", 0, "a number of at least 0.01, got 0"),
        ("pixel_mean", 0.2, "the model's 0.45, got 0.2"),
        ("pixel_std", 1, "the model's 0.225, got 1"),
        ("name", ["csv"], "one of synthetic, ava, csv"),
        ("val", 3, "options of that split, got 3"),
    ],
)
def test_values_of_options_are_named(written, option, value, message):
    with pytest.raises(DataError, match=f"^data: {option} must be {message}"):
        data.build(section(written) | {option: value}, "val", EVADConfig.tiny())


@pytest.mark.parametrize("field", ["num_frames", "frame_stride", "frame_rate", "pixel_mean", "pixel_std"])
def test_every_datasets_clip_is_the_models(written, field):
    own, other = getattr(EVADConfig.tiny(), field), 3
    for named in (section(written), {"name": "synthetic"}):
        with pytest.raises(DataError, match=f"^data: {field} must be the model's {own}, got 3$"):
            data.build(named | {"val": {field: other}}, "val", EVADConfig.tiny())
        data.build(named | {field: own}, "val", EVADConfig.tiny())
        data.build(named | {field: other}, "val")  # without a model, as it says


def test_values_of_synthetic_options_are_named():
    for option, value in (("clips", 0), ("clips", "1"), ("fresh", 1), ("size", [96]), ("size", [96, 1])):
        with pytest.raises(DataError, match=f"^data: {option} must be "):
            data.build({"name": "synthetic", option: value}, "val")


def test_numbers_that_yaml_takes_for_text(written):
    dataset = data.build(section(written, flip="0e-1", start=0, exclude=None, short_sides=None), "train")
    assert dataset.flip == 0


# Labels


@pytest.mark.parametrize("text", ["id,name\n1,run\n3,jump\n", "1,run,PERSON_MOVEMENT\n3,jump,X\n"])
def test_labels_in_a_table(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    assert ava.read_label_map(tmp_path / "labels.csv") == {1: "run", 3: "jump"}
