"""UCF101-24 and JHMDB: annotations without running code, clips by frame number, linking, video mAP by hand."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from evad import EVAD, EVADConfig, data
from evad.checkpoint import save_checkpoint
from evad.cli import main
from evad.data.tubes import Tube, read_annotations
from evad.evaluation import JHMDB, UCF101_24, Boxes, evaluate_tubes
from evad.evaluation.tubes import link, tube_iou
from evad.problems import DataError

LEFT, RIGHT = [0.1, 0.1, 0.3, 0.5], [0.6, 0.1, 0.8, 0.5]


def tube(frames, box):
    return Tube(np.array(frames), np.repeat(np.array([box], float), len(frames), 0))


def pixels(frames, box, size=(60, 80)):
    """A tube as the pickles have it."""
    height, width = size
    return np.array([[frame, *(np.array(box) * [width, height, width, height])] for frame in frames])


def contents(**changes):
    content = {
        "labels": ["run", "swing"],
        "gttubes": {"run/a": {0: [pixels(range(3, 9), LEFT)]}, "swing/b": {1: [pixels(range(1, 7), RIGHT)]}},
        "nframes": {"run/a": 10, "swing/b": 6},
        "resolution": {"run/a": (60, 80), "swing/b": (60, 80)},
        "train_videos": [["run/a"], ["swing/b"]],
        "test_videos": [["swing/b"], ["run/a"]],
    }
    return content | changes


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "GT.pkl"
    path.write_bytes(pickle.dumps(contents(), protocol=2))
    return path


def write_frames(folder, count):
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        Image.fromarray(np.full((60, 80, 3), 10 * number, np.uint8)).save(folder / f"{number:05d}.png")


# Annotations


@pytest.mark.parametrize("protocol", range(6))
def test_reads_annotations(tmp_path, protocol):
    (tmp_path / "GT.pkl").write_bytes(pickle.dumps(contents(), protocol=protocol))
    known = read_annotations(tmp_path / "GT.pkl")
    assert known.labels == ("run", "swing") and known.frames == {"run/a": 10, "swing/b": 6}
    assert known.videos("train", 2) == ("swing/b",) == known.videos("val", 1)
    ((label, found),) = known.tubes["run/a"]
    assert label == 1 and found.frames.tolist() == [3, 4, 5, 6, 7, 8]
    np.testing.assert_allclose(found.boxes, [LEFT] * 6)
    with pytest.raises(DataError, match=r"fold must be in \[1, 2\]"):
        known.videos("train", 3)


def test_reads_what_python_2_wrote(tmp_path):
    """Names and arrays as bytes: the modules and the string type of numpy 1 and Python 2."""
    text = pickle.dumps(contents(), protocol=2)
    text = text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "GT.pkl").write_bytes(text)
    assert len(read_annotations(tmp_path / "GT.pkl").tubes) == 2


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


class EvilToo:
    def __reduce__(self):
        return eval, ("__import__('os').system('echo code ran')",)


@pytest.mark.parametrize("thing", [Evil(), [{"labels": EvilToo()}], np.array([Evil()], object), torch.device("cpu")])
def test_runs_no_code(tmp_path, capfd, thing):
    (tmp_path / "GT.pkl").write_bytes(pickle.dumps(thing))
    with pytest.raises(DataError, match=r"GT.pkl: holds \S+, which annotations do not need"):
        read_annotations(tmp_path / "GT.pkl")
    assert "code ran" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "not laid out"),
        ({"resolution": {}}, "not laid out"),
        ({"gttubes": {"run/a": {0: [np.zeros((2, 4))]}}}, r"a tube must be \[n, 5\]"),
        (
            {"gttubes": {"run/a": {0: [pixels([1, 2], [2, 2, 3, 3])]}}},
            "run/a, tube 0, frame 1: the box is empty or outside",
        ),
        ({"gttubes": {"run/a": {7: [pixels([1], LEFT)]}}}, "run/a has a class"),
    ],
)
def test_wrong_annotations_are_named(tmp_path, changes, message):
    path = tmp_path / "GT.pkl"
    path.write_bytes(pickle.dumps(contents(**changes)))
    with pytest.raises(DataError, match=message):
        read_annotations(path)
    path.write_bytes(pickle.dumps({"labels": []}))
    with pytest.raises(DataError, match="must be a dictionary with gttubes"):
        read_annotations(path)
    path.write_bytes(b"\x80\x04no pickle")
    with pytest.raises(DataError, match="not a pickle that can be read"):
        read_annotations(path)
    with pytest.raises(DataError, match="No such file"):
        read_annotations(tmp_path / "none.pkl")


def test_annotations_within_some_frames(annotations):
    some = read_annotations(annotations).within({("run/a", 4), ("run/a", 8.0), ("swing/b", 9)})
    assert [(label, tube.frames.tolist(), len(tube.boxes)) for label, tube in some.tubes["run/a"]] == [(1, [4, 8], 2)]
    assert list(some.tubes) == ["run/a"]


# Clips


def test_clips_around_frames(tmp_path, annotations):
    """Training: annotated frames of the fold's videos; test: every frame. Samples step by frames, clamped."""
    write_frames(tmp_path / "media" / "run" / "a", 10)
    write_frames(tmp_path / "media" / "swing" / "b", 6)
    section = {"name": "jhmdb", "annotations": str(annotations), "media": str(tmp_path / "media"), "flip": 0}
    section |= {"num_frames": 4, "frame_stride": 2, "short_side": 30}
    train, test = (data.build(section, split) for split in ("train", "val"))
    assert [entry.key for entry in train.entries] == [("run/a", float(frame)) for frame in range(3, 9)]
    assert [entry.key for entry in test.entries] == [("swing/b", float(frame)) for frame in range(1, 7)]
    clip, target, _ = train[0]
    assert ((clip[0, :, 0, 0] * 0.225 + 0.45) * 255 / 10).round().tolist() == [1, 1, 3, 5]
    np.testing.assert_allclose(target["boxes"], [[4, 3, 12, 15]], rtol=1e-6)  # 80 x 60 pixels became 40 x 30
    assert target["labels"].tolist() == [[1, 0]]
    assert len(data.build(section | {"every": 2}, "train")) == len(data.build(section | {"every": 2}, "val")) == 3
    (tmp_path / "media" / "swing" / "b").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="no video or folder 'swing/b'"):
        data.build(section, "val")


# Tubes, by hand


def test_tube_iou_by_hand():
    a = tube(range(1, 11), [0, 0, 1, 1])
    assert tube_iou(a, a) == 1
    assert tube_iou(a, tube(range(6, 16), [0, 0, 1, 1])) == pytest.approx(5 / 15)
    assert tube_iou(a, tube(range(6, 16), [0, 0, 1, 0.5])) == pytest.approx(5 / 15 * 0.5)
    assert tube_iou(a, tube(range(20, 30), [0, 0, 1, 1])) == 0


def test_links_two_people_by_hand():
    """Two people who pass five frames; one of them is missed in frame 3, which is filled in between."""
    rows = [(frame, LEFT, 0.9) for frame in (1, 2, 4, 5)] + [(frame, RIGHT, 0.5 + frame / 100) for frame in range(1, 6)]
    frames, boxes, scores = (np.array(column) for column in zip(*rows, strict=True))
    first, second = link(frames, boxes, scores, JHMDB)
    assert first.score == pytest.approx(0.9) and second.score == pytest.approx(0.53)
    assert first.tube.frames.tolist() == second.tube.frames.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(first.tube.boxes, [LEFT] * 5)


def test_a_tube_takes_the_best_box_that_overlaps_enough():
    """In frame 2 a box far away scores more, one nearby less: the tube goes on nearby, the far box begins its own."""
    near = [0.12, 0.1, 0.32, 0.5]
    tubes = link(np.array([1, 2, 2]), np.array([LEFT, RIGHT, near]), np.array([0.9, 0.95, 0.4]), JHMDB)
    assert [scored.tube.frames.tolist() for scored in tubes] == [[2], [1, 2]]
    np.testing.assert_allclose(tubes[1].tube.boxes, [LEFT, near])


def test_tubes_end_and_short_ones_are_dropped():
    frames = np.array([1, 2, 3, 20, 21])
    tubes = link(frames, np.array([LEFT] * 5), np.ones(5), JHMDB)
    assert sorted(scored.tube.frames.tolist() for scored in tubes) == [[1, 2, 3], [20, 21]]
    assert [
        len(scored.tube.frames) for scored in link(frames, np.array([LEFT] * 5), np.ones(5), JHMDB._replace(shortest=3))
    ] == [3]
    assert not link(frames, np.array([LEFT] * 5), np.ones(5), UCF101_24)


def test_suppresses_doubles():
    double = [0.11, 0.1, 0.31, 0.5]
    tubes = link(np.array([1, 1, 1]), np.array([LEFT, double, RIGHT]), np.array([0.8, 0.9, 0.7]), JHMDB)
    np.testing.assert_allclose([scored.tube.boxes[0] for scored in tubes], [double, RIGHT])


def scores_of(tmp_path, rows, **changes):
    """Rows (video, frame, class, box, score) against ``contents`` on fold 1 of both videos."""
    both = ["run/a", "swing/b"]
    (tmp_path / "GT.pkl").write_bytes(pickle.dumps(contents(test_videos=[both], train_videos=[[]], **changes)))
    images = {}
    image = [images.setdefault((row[0], float(row[1])), len(images)) for row in rows]
    table = Boxes(*(np.array(column) for column in (image, *zip(*(row[2:] for row in rows), strict=True))))
    return evaluate_tubes(table, images, read_annotations(tmp_path / "GT.pkl"), 1, JHMDB)


def test_video_map_by_hand(tmp_path):
    """Class 1: frames 3 to 8 of "run/a", found in 3 to 6 with half of the box: frame IoU 0.5, video IoU 4/6 * 0.5.

    Class 2: a wrong tube in "run/a" scores more than the perfect one in "swing/b": AP 1/2.
    """
    half = [LEFT[0], LEFT[1], LEFT[2], (LEFT[1] + LEFT[3]) / 2 + 1e-9]
    rows = [("run/a", frame, 1, half, 0.8) for frame in range(3, 7)]
    rows += [("run/a", frame, 2, RIGHT, 0.9) for frame in range(1, 7)]
    rows += [("swing/b", frame, 2, RIGHT, 0.6) for frame in range(1, 7)]
    rows += [("elsewhere/c", 1, 1, LEFT, 1.0)]  # not in the fold
    scores = scores_of(tmp_path, rows)
    np.testing.assert_allclose(scores.frame_ap, [4 / 6, 0.5])
    np.testing.assert_allclose(scores.video_ap[:3], [[1, 0.5], [0, 0.5], [0, 0.5]])
    assert scores.video_map() == pytest.approx({"0.2": 0.75, "0.5": 0.25, "0.75": 0.25, "0.5:0.95": 0.25})
    assert scores.truths.tolist() == [6, 6] and scores.detections.tolist() == [4, 12]


def test_perfect_detections_score_one(tmp_path):
    rows = [("run/a", frame, 1, LEFT, 0.8) for frame in range(3, 9)]
    rows += [("swing/b", frame, 2, RIGHT, 0.6) for frame in range(1, 7)]
    scores = scores_of(tmp_path, rows)
    assert scores.mean == 1 and set(scores.video_map().values()) == {1.0}


# Command line


def test_evaluates_files_and_a_model(tmp_path, annotations, capfd):
    lines = [f"swing/b,{frame},{','.join(map(str, RIGHT))},2,0.9" for frame in range(1, 7)]
    (tmp_path / "found.csv").write_text("\n".join(lines))
    words = ["evaluate", "--protocol", "jhmdb", "--ground-truth", str(annotations), "--detections"]
    assert main([*words, str(tmp_path / "found.csv"), "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["mAP@0.5"] == document["video_mAP@0.5:0.95"] == 1 and document["fold"] == 1

    write_frames(tmp_path / "media" / "swing" / "b", 6)
    torch.manual_seed(0)
    config = EVADConfig.tiny(num_classes=2, short_side=48, num_proposals=4)
    save_checkpoint(EVAD(config), tmp_path / "m.safetensors")
    section = {"name": "jhmdb", "annotations": str(annotations), "media": str(tmp_path / "media")}
    (tmp_path / "data.yaml").write_text(json.dumps(section))
    words = ["evaluate", "--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path / "data.yaml")]
    assert main([*words, "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    out = capfd.readouterr().out
    assert "video mAP at IoU 0.2:" in out and "swing" in out
    (tmp_path / "data.yaml").write_text(
        json.dumps({"val": section, **{key: section[key] for key in ("name", "media")}, "on_error": "skip"})
    )
    (tmp_path / "media" / "swing" / "b" / "00003.png").unlink()  # others have frames 4 away, or clamp to 1 and 6
    assert main([*words, "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["skipped"], document["clips"]) == (1, 5)
    assert [row["ground_truths"] for row in document["classes"]] == [0, 5]
    (tmp_path / "data.yaml").write_text(json.dumps(section | {"val": {"every": 2}}))
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "every must be 1" in capfd.readouterr().err
