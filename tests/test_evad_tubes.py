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
from evad.evaluation import Boxes, Linking, ScoredBoxes, average_precision, evaluate, evaluate_tubes
from evad.evaluation.average_precision import iou, trapezoids
from evad.evaluation.tubes import link, tube_iou
from evad.problems import DataError

LEFT, RIGHT = [0.1, 0.1, 0.3, 0.5], [0.6, 0.1, 0.8, 0.5]
SHORT = Linking(shortest=1)


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
        ({"gttubes": {"run/a": {0: [pixels([1, 2.5], LEFT)]}}}, "frame 2.5: frames must be different whole numbers"),
        ({"gttubes": {"run/a": {0: [pixels([0, 1], LEFT)]}}}, "frame 0: frames must be different whole numbers from 1"),
        ({"gttubes": {"run/a": {0: [pixels([1, 4, 4], LEFT)]}}}, "frame 4: frames must be different"),
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


def test_boxes_may_reach_outside_of_the_picture(tmp_path):
    """They are scored as published, and learned from as they are seen."""
    (tmp_path / "GT.pkl").write_bytes(
        pickle.dumps(
            contents(gttubes={"swing/b": {1: [pixels([1], [-0.1, 0, 0.5, 1.25])]}}, train_videos=[["swing/b"]])
        )
    )
    ((_, found),) = read_annotations(tmp_path / "GT.pkl").tubes["swing/b"]
    np.testing.assert_allclose(found.boxes, [[-0.1, 0, 0.5, 1.25]])
    write_frames(tmp_path / "media" / "swing" / "b", 6)
    section = {"name": "jhmdb", "annotations": str(tmp_path / "GT.pkl"), "media": str(tmp_path / "media")}
    np.testing.assert_allclose(data.build(section, "train").entries[0].boxes, [[0, 0, 0.5, 1]])


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
    config = EVADConfig.tiny(num_frames=4, frame_stride=2, short_side=30, frame_rate=25)
    assert torch.equal(data.build(section, "train", config)[0].clip, clip)  # frames, whatever their rate
    np.testing.assert_allclose(target["boxes"], [[4, 3, 12, 15]], rtol=1e-6)  # 80 x 60 pixels became 40 x 30
    assert target["labels"].tolist() == [[1, 0]]
    assert len(data.build(section | {"every": 2}, "train")) == len(data.build(section | {"every": 2}, "val")) == 3
    (tmp_path / "media" / "swing" / "b").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="no video or folder 'swing/b'"):
        data.build(section, "val")


# The published rules, by hand


def rows_of(*rows):
    """Boxes of class 1 in image 0: rows (x1, y1, x2, y2, score)."""
    table = np.array(rows, float).reshape(-1, 5)
    return Boxes(np.zeros(len(rows), int), np.ones(len(rows), int), table[:, :4], table[:, 4])


def published(detections, truth, thresholds=(0.5,)):
    return average_precision(detections, truth, [1], thresholds, second_best=True, area=trapezoids)[:, 0]


def test_area_by_trapezoids_by_hand():
    """Right, wrong, right of three: (recall, precision) goes (0, 1), (1/3, 1), (1/3, 1/2), (2/3, 2/3)."""
    assert trapezoids(np.array([True, False, True]), 3) == pytest.approx(1 / 3 + 1 / 3 * (1 / 2 + 2 / 3) / 2)
    assert trapezoids(np.array([False, True]), 1) == pytest.approx(1 / 4)  # not made monotone: 0 before, 1/2 at the hit
    assert trapezoids(np.array([True]), 1) == 1 and trapezoids(np.zeros(0, bool), 1) == 0


def test_a_ground_truth_taken_is_out_of_sight():
    """Both detections overlap the first of two ground truths most: IoU 1 and 10/11; the later one has 11/13 with the
    other, which a threshold of 0.9 does not admit. A third detection finds nothing left.
    """
    truth = rows_of((0, 0, 10, 10, 1), (0, 0, 10, 13, 1))
    detections = rows_of((0, 0, 10, 11, 0.8), (0, 0, 10, 10, 0.9))
    assert average_precision(detections, truth, [1])[0, 0] == 0.5  # by AVA's rule
    np.testing.assert_allclose(published(detections, truth, [0.5, 0.9]), [1, 0.5])
    others = (0, 0, 10, 11, 0.8), (0, 0, 10, 10, 0.9)
    ap = published(rows_of((0, 0, 10, 10, 0.95), *others), rows_of((0, 0, 10, 10, 1), (20, 0, 30, 10, 1)))
    assert ap == pytest.approx(0.5)  # right, wrong, wrong of two


def test_the_published_matching_equals_a_plain_loop():
    rng = np.random.default_rng(0)

    def some(number):
        corner = rng.random((number, 2)) / 2
        box = np.concatenate([corner, corner + rng.uniform(0.3, 0.6, (number, 2))], 1)
        return Boxes(rng.integers(4, size=number), rng.integers(1, 3, number), box, rng.integers(9, size=number) / 9)

    truth, detections = some(40), some(300)
    found = average_precision(detections, truth, [1, 2], [0.3, 0.5], second_best=True, area=trapezoids)
    for number, threshold in enumerate((0.3, 0.5)):
        for label in (1, 2):
            left, hits = set(np.flatnonzero(truth.label == label)), []
            for row in (-detections.score).argsort(kind="stable"):
                if detections.label[row] == label:
                    there = sorted(other for other in left if truth.image[other] == detections.image[row])
                    value = [iou(detections.box[[row]], truth.box[[other]])[0] for other in there]
                    hits.append(bool(value) and max(value) >= threshold)
                    if hits[-1]:
                        left.remove(there[int(np.argmax(value))])
            assert found[number, label - 1] == pytest.approx(trapezoids(np.array(hits), (truth.label == label).sum()))


def test_tube_iou_by_hand():
    a = tube(range(1, 11), [0, 0, 1, 1])
    assert tube_iou(a, a) == 1
    assert tube_iou(a, tube(range(6, 16), [0, 0, 1, 1])) == pytest.approx(5 / 15)
    assert tube_iou(a, tube(range(6, 16), [0, 0, 1, 0.5])) == pytest.approx(5 / 15 * 0.5)
    assert tube_iou(a, tube(range(10, 12), [0, 0, 1, 1])) == pytest.approx(1 / 11)
    assert tube_iou(a, tube(range(20, 30), [0, 0, 1, 1])) == 0


def linked(frames, boxes, scores, linking=SHORT):
    return link(np.ones(len(frames), int), *(np.array(column) for column in (frames, boxes, scores)), linking)


def test_links_two_people_by_hand():
    """Two people who pass five frames; one of them is missed in frame 3, which is filled in between."""
    rows = [(frame, LEFT, 0.9) for frame in (1, 2, 4, 5)] + [(frame, RIGHT, 0.5 + frame / 100) for frame in range(1, 6)]
    first, second = linked(*zip(*rows, strict=True))
    assert first.score == pytest.approx(0.9) and second.score == pytest.approx(0.53)
    assert first.tube.frames.tolist() == second.tube.frames.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(first.tube.boxes, [LEFT] * 5)


def test_a_tube_takes_the_best_box_that_overlaps_enough():
    """In frame 2 a box far away scores more, one nearby less: the tube goes on nearby, the far box begins its own."""
    near = [0.12, 0.1, 0.32, 0.5]
    tubes = linked([1, 2, 2], [LEFT, RIGHT, near], [0.9, 0.95, 0.4])
    assert [scored.tube.frames.tolist() for scored in tubes] == [[2], [1, 2]]
    np.testing.assert_allclose(tubes[1].tube.boxes, [LEFT, near])


def test_the_tube_of_higher_mean_score_chooses_first():
    """In frame 2 two tubes would take the one box there, wide enough for both: the better one does."""
    tubes = linked([1, 1, 2], [[0, 0, 2, 1], [2, 0, 4, 1], [0, 0, 4, 1]], [0.6, 0.7, 0.9])
    assert [(scored.tube.frames.tolist(), scored.score) for scored in tubes] == [
        ([1, 2], pytest.approx(0.8)),
        ([1], 0.6),
    ]
    np.testing.assert_allclose(tubes[0].tube.boxes[0], [2, 0, 4, 1])


@pytest.mark.parametrize(("width", "tubes"), [(5.0, 1), (5.1, 2)])
def test_a_tube_goes_on_from_an_iou_of_a_fifth(width, tubes):
    assert len(linked([1, 2], [[0, 0, 1, 1], [0, 0, width, 1]], [0.9, 0.8])) == tubes


@pytest.mark.parametrize(("next", "tubes"), [(8, [[3, 4, 5, 6, 7, 8]]), (9, [[3], [9]])])
def test_a_tube_ends_after_five_frames(next, tubes):
    assert [scored.tube.frames.tolist() for scored in linked([3, next], [LEFT, LEFT], [0.9, 0.8])] == tubes


def test_short_and_weak_tubes_are_dropped():
    frames = np.arange(1, 16)
    boxes, scores = np.array([LEFT] * 15), np.full(15, 0.5)
    assert len(linked(frames, boxes, scores, Linking())) == 1
    assert not linked(frames[1:], boxes[1:], scores[1:], Linking())  # 14 frames
    assert len(linked(frames, boxes, scores / 50, Linking())) == 1  # 0.01
    assert not linked(frames, boxes, scores / 51, Linking())


def test_suppresses_what_overlaps_a_better_box_by_more_than_three_tenths():
    double, beside = [0, 0, 10, 4], [0, 0, 10, 3]  # IoU 0.4 and 0.3 with the best
    tubes = linked([1, 1, 1], [double, beside, [0, 0, 10, 10]], [0.8, 0.7, 0.9])
    np.testing.assert_allclose([scored.tube.boxes[0] for scored in tubes], [[0, 0, 10, 10], beside])


def test_ten_boxes_of_a_frame_are_linked():
    boxes = [[2 * n, 0, 2 * n + 1, 1] for n in range(12)]
    assert [scored.tube.boxes[0, 0] for scored in linked([1] * 12, boxes, np.arange(12) / 12)] == list(range(22, 2, -2))


def test_suppresses_tubes_that_overlap_a_better_one():
    """A tube of frames 1 to 10 against one of 7 to 10, with 3 and then 9 tenths of its boxes: IoU 0.12 and 0.36."""
    boxes = [[0, 0, 10, 10]] * 10 + [[0, 0, 10, 3]] * 4
    frames = [*range(1, 11), *range(7, 11)]
    first, second = linked(frames, boxes, [0.9] * 10 + [0.8] * 4, SHORT._replace(overlap=0.5))
    assert len(first.tube.frames) == 10 and len(second.tube.frames) == 4  # 4 / 10 * 0.3
    wide = [[0, 0, 10, 10]] * 10 + [[0, 0, 10, 9]] * 4
    assert len(linked(frames, wide, [0.9] * 10 + [0.8] * 4, SHORT._replace(nms=1, overlap=0.95))) == 1  # 4 / 10 * 0.9


def test_linking_equals_a_plain_loop():
    """Many groups at once against one at a time, tube by tube and box by box."""
    rng = np.random.default_rng(1)
    corner = rng.random((600, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.3, 0.9, (600, 2))], 1)
    group, frames, scores = rng.integers(5, size=600), rng.integers(1, 40, 600), rng.random(600)
    linking = Linking(shortest=3, best=3, nms=0.5)

    def one_iou(a, b):
        return iou(boxes[[a]], boxes[[b]])[0]

    expected = []
    for number in range(5):
        ended, going = [], []
        for frame in range(1, 40):
            free = []
            for row in sorted(np.flatnonzero((group == number) & (frames == frame)), key=lambda row: -scores[row]):
                if len(free) < 3 and all(one_iou(row, other) <= 0.5 for other in free):
                    free.append(row)
            for rows in sorted(going, key=lambda rows: -scores[rows].mean()):
                near = [row for row in free if one_iou(rows[-1], row) >= 0.2]
                if near:
                    rows.append(near[0])
                    free.remove(near[0])
                elif frame - frames[rows[-1]] >= 5:
                    ended.append(rows)
                    going = [other for other in going if other is not rows]
            going += [[row] for row in free]
        tubes = [(rows, scores[rows].mean()) for rows in ended + going if frames[rows[-1]] - frames[rows[0]] >= 2]
        expected += [(number, frames[rows].tolist(), score) for rows, score in sorted(tubes, key=lambda one: -one[1])]
    found = link(group, frames, boxes, scores, linking._replace(tube_nms=1))
    assert len(found) == len(expected) > 20
    for scored, (number, when, score) in zip(found, expected, strict=True):
        assert (scored.group, scored.score) == (number, pytest.approx(score))
        assert scored.tube.frames.tolist() == list(range(when[0], when[-1] + 1))


def scores_of(tmp_path, rows, linking=SHORT, **changes):
    """Rows (video, frame, class, box, score) against ``contents`` on fold 1 of both videos."""
    both = ["run/a", "swing/b"]
    (tmp_path / "GT.pkl").write_bytes(pickle.dumps(contents(test_videos=[both], train_videos=[[]], **changes)))
    images = {}
    image = [images.setdefault((row[0], float(row[1])), len(images)) for row in rows]
    table = Boxes(*(np.array(column) for column in (image, *zip(*(row[2:] for row in rows), strict=True))))
    return evaluate_tubes(table, images, read_annotations(tmp_path / "GT.pkl"), 1, linking)


def test_video_map_by_hand(tmp_path):
    """Class 1: frames 3 to 8 of "run/a", found in 3 to 6 with 13 of the box's 25 rows: video IoU 4/6 * 13/25.

    Class 2: a wrong tube in "run/a" scores more than the perfect one in "swing/b": AP (0 + 1/2) / 2 for the video, and
    after six wrong boxes six right ones for the frames.
    """
    half = [LEFT[0], LEFT[1], LEFT[2], 18 / 60]
    rows = [("run/a", frame, 1, half, 0.8) for frame in range(3, 7)]
    rows += [("run/a", frame, 2, RIGHT, 0.9) for frame in range(1, 7)]
    rows += [("swing/b", frame, 2, RIGHT, 0.6) for frame in range(1, 7)]
    rows += [("elsewhere/c", 1, 1, LEFT, 1.0)]  # not in the fold
    scores = scores_of(tmp_path, rows)
    late = (1 / 7 + 2 / 8 + 3 / 9 + 4 / 10 + 5 / 11 + 6 / 12 / 2) / 6
    np.testing.assert_allclose(scores.frame_ap, [4 / 6, late])
    np.testing.assert_allclose(scores.video_ap[:3], [[1, 0.25], [0, 0.25], [0, 0.25]])
    assert scores.video_map() == pytest.approx({"0.2": 0.625, "0.5": 0.125, "0.75": 0.125, "0.5:0.95": 0.125})
    assert scores.truths.tolist() == [6, 6] and scores.detections.tolist() == [4, 12]
    assert scores_of(tmp_path, rows, Linking()).video_map()["0.2"] == 0  # all shorter than 15 frames
    frames_only = scores_of(tmp_path, rows, None)
    assert frames_only.summary() == {"mAP@0.5": scores.mean}


@pytest.mark.parametrize(("bottom", "ap"), [(17.6, 1), (17.4, 0)])
def test_a_box_has_its_last_pixel(tmp_path, bottom, ap):
    """Rows 6 to 30 are 25; 6 to 17.6 are 12.6, more than half, and 6 to 17.4 less (without the last one 11.6 of 24)."""
    rows = [("swing/b", frame, 2, [*RIGHT[:3], bottom / 60], 0.6) for frame in range(1, 7)]
    scores = scores_of(tmp_path, rows)
    assert scores.frame_ap[1] == scores.video_ap[1, 1] == ap


def test_perfect_detections_score_one(tmp_path):
    rows = [("run/a", frame, 1, LEFT, 0.8) for frame in range(3, 9)]
    rows += [("swing/b", frame, 2, RIGHT, 0.6) for frame in range(1, 7)]
    scores = scores_of(tmp_path, rows)
    assert scores.mean == 1 and set(scores.video_map().values()) == {1.0}


def test_ground_truth_after_the_last_frame_is_missed(tmp_path):
    """Its frames are no frames of the next video."""
    tubes = {"run/a": {0: [pixels(range(3, 13), LEFT)]}, "swing/b": {0: [pixels([1], LEFT)], 1: [pixels([1], RIGHT)]}}
    scores = scores_of(tmp_path, [("run/a", 3, 1, LEFT, 0.8)], gttubes=tubes, nframes={"run/a": 3, "swing/b": 6})
    assert scores.frame_ap[0] == pytest.approx(1 / 11) and scores.truths.tolist() == [11, 1]


@pytest.mark.parametrize("frame", [0, 2.5])
def test_rejects_what_is_no_frame(tmp_path, frame):
    with pytest.raises(DataError, match="swing/b: frames must be whole numbers from 1"):
        scores_of(tmp_path, [("swing/b", frame, 2, RIGHT, 0.9)])


def test_rejects_a_video_without_a_size(tmp_path):
    changes = {"gttubes": {"swing/b": {1: [pixels([1], RIGHT)]}}, "resolution": {"swing/b": (60, 80)}}
    with pytest.raises(DataError, match="run/a: the annotations must have its resolution"):
        scores_of(tmp_path, [("swing/b", 1, 2, RIGHT, 0.9)], **changes)


def test_frames_with_a_score_for_each_class_count_as_their_rows(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "GT.pkl").write_bytes(pickle.dumps(contents(test_videos=[["run/a", "swing/b"]], train_videos=[[]])))
    truth = read_annotations(tmp_path / "GT.pkl")
    keys = [(video, float(frame)) for video in ("run/a", "elsewhere", "swing/b") for frame in range(1, 9)]
    images = {key: number for number, key in enumerate(keys)}
    box = np.array([LEFT, RIGHT] * len(keys)) + rng.normal(0, 0.01, (2 * len(keys), 4))
    found = ScoredBoxes(np.arange(len(keys)).repeat(2), box, rng.random((len(box), 2)))
    rows = Boxes(found.image.repeat(2), np.tile([1, 2], len(box)), found.box.repeat(2, 0), found.scores.ravel())
    expected, actual = (evaluate_tubes(some, images, truth, 1, SHORT) for some in (rows, found))
    assert expected.mean > 0 and np.nanmax(expected.video_ap) > 0
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_found_scores_nothing(tmp_path):
    (tmp_path / "GT.pkl").write_bytes(pickle.dumps(contents()))
    nothing = Boxes(np.zeros(0, int), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
    scores = evaluate_tubes(nothing, {}, read_annotations(tmp_path / "GT.pkl"), 1)
    assert scores.mean == 0 and set(scores.video_map().values()) == {0.0}


# Command line


LONG = {"gttubes": {"swing/b": {1: [pixels(range(1, 16), RIGHT)]}}, "nframes": {"run/a": 10, "swing/b": 15}}


def test_evaluates_files_and_a_model(tmp_path, annotations, capfd):
    annotations.write_bytes(pickle.dumps(contents(**LONG)))
    lines = [f"swing/b,{frame},{','.join(map(str, RIGHT))},2,0.9" for frame in range(1, 16)]
    (tmp_path / "found.csv").write_text("\n".join(lines))
    words = ["evaluate", "--protocol", "jhmdb", "--ground-truth", str(annotations), "--detections"]
    assert main([*words, str(tmp_path / "found.csv"), "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["mAP@0.5"] == document["video_mAP@0.5:0.95"] == 1 and document["fold"] == 1
    assert "Kalogeiton" in document["rule"] and document["linking"]["overlap"] == 0.2
    assert not {"match_order", "mAP@0.75", "mAP@0.5:0.95", "mAP_by_iou"} & set(document)
    assert main([*words, str(tmp_path / "found.csv"), "--match-order", "file", "--out", str(tmp_path / "out")]) == 2
    assert "--match-order: belongs to --protocol ava" in capfd.readouterr().err
    (tmp_path / "found.csv").write_text("\n".join([*lines, lines[0].replace(",1,", ",1.5,", 1)]))
    assert main([*words, str(tmp_path / "found.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "found.csv, line 16: the timestamp must be a frame's number, from 1, got 1.5" in capfd.readouterr().err

    write_frames(tmp_path / "media" / "swing" / "b", 15)
    torch.manual_seed(0)
    config = EVADConfig.tiny(num_classes=2, short_side=48, num_proposals=4)
    model = EVAD(config)
    save_checkpoint(model, tmp_path / "m.safetensors")
    section = {"name": "jhmdb", "annotations": str(annotations), "media": str(tmp_path / "media")}
    (tmp_path / "data.yaml").write_text(json.dumps(section))
    words = ["evaluate", "--checkpoint", str(tmp_path / "m.safetensors"), "--data", str(tmp_path / "data.yaml")]
    words += ["--workers", "0", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*words, "--threshold", "0"]) == 0
    out = capfd.readouterr().out
    assert "video mAP at IoU 0.2:" in out and "swing" in out
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert not {"match_order", "mAP@0.75", "mAP@0.5:0.95", "mAP_by_iou"} & set(document)
    assert {"video_mAP@0.2", "video_mAP@0.5:0.95", "person_AP@0.5", "linking", "fold"} <= set(document)

    def trained(**changes):
        """As training evaluates."""
        metrics = evaluate(model, data.build(section | changes, "val", config), threshold=0.0)
        return {name: value for name, value in metrics.summary().items() if "mAP@" in name}

    assert trained() == pytest.approx({name: document[name] for name in trained()}, abs=1e-6)
    assert set(trained()) == {"mAP@0.5", *(f"video_mAP@{iou}" for iou in ("0.2", "0.5", "0.75", "0.5:0.95"))}
    assert set(trained(every=4)) == {"mAP@0.5"}

    (tmp_path / "data.yaml").write_text(
        json.dumps({"val": section, **{key: section[key] for key in ("name", "media")}, "on_error": "skip"})
    )
    (tmp_path / "media" / "swing" / "b" / "00003.png").unlink()  # others have frames 4 away, or clamp to 1 and 15
    assert main([*words, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["skipped"] and document["skipped"] + document["clips"] == 15
    assert [row["ground_truths"] for row in document["classes"]] == [0, document["clips"]]
    (tmp_path / "data.yaml").write_text(json.dumps(section | {"val": {"every": 2}}))
    assert main(words) == 2
    assert "every must be 1" in capfd.readouterr().err
