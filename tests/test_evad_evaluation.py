"""evad.evaluation: average precision by hand, AVA's protocols, a model scored on a dataset."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from evad import EVAD, EVADConfig, data
from evad.ava import read_seconds
from evad.detector import EVADOutput
from evad.evaluation import (
    STRICT,
    Boxes,
    ScoredBoxes,
    average_precision,
    collect,
    evaluate,
    evaluate_ava,
    read_boxes,
    read_people,
    score,
)
from evad.evaluation.ava import EVALUATED
from evad.evaluation.average_precision import iou
from evad.evaluation.model import ClipOutcome
from evad.problems import DataError

AVA = Path(__file__).parent / "golden" / "ava_eval"
EXPECTED = json.loads((AVA / "expected.json").read_text())


def boxes(*rows):
    """Rows (image, label, x1, y1, x2, y2[, score])."""
    rows = [(*row, 1.0)[:7] for row in rows]
    table = np.array(rows, np.float64).reshape(-1, 7)
    return Boxes(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2:6], table[:, 6])


def random_boxes(rng, number, images, labels):
    corner = rng.random((number, 2))
    box = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, (number, 2))], 1)
    return Boxes(rng.integers(images, size=number), rng.integers(1, labels + 1, number), box, rng.random(number))


# Average precision, by hand


def test_iou_by_hand():
    a = np.array([[0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1.0]])
    b = np.array([[1, 1, 3, 3], [0, 0, 1, 1], [2, 0, 3, 1], [0, 0, 0, 1.0]])
    np.testing.assert_allclose(iou(a, b), [1 / 7, 1, 0, 0])


def test_average_precision_by_hand():
    """Three ground truths; detections by score: right, wrong, right, wrong, missing the third.

    Precision at the two hits 1/1 and 2/3, recall 1/3 and 2/3: AP = 1/3 * 1 + 1/3 * 2/3 = 5/9.
    """
    truth = boxes((0, 1, 0, 0, 1, 1), (0, 1, 2, 2, 3, 3), (1, 1, 0, 0, 1, 1))
    detections = boxes(
        (0, 1, 0, 0, 1, 1, 0.9), (0, 1, 5, 5, 6, 6, 0.8), (1, 1, 0, 0, 1, 0.9, 0.7), (2, 1, 0, 0, 1, 1, 0.6)
    )
    assert average_precision(detections, truth, [1])[0, 0] == pytest.approx(5 / 9)
    ap = average_precision(detections, truth, [1], [0.5, 0.95])[:, 0]
    assert ap == pytest.approx([5 / 9, 1 / 3])  # 0.9 of overlap is too little for 0.95


def test_precision_is_made_monotone():
    """Wrong, right, right: precision 0, 1/2, 2/3; the envelope is 2/3 at both hits."""
    truth = boxes((0, 1, 0, 0, 1, 1), (1, 1, 0, 0, 1, 1))
    detections = boxes((2, 1, 0, 0, 1, 1, 0.9), (0, 1, 0, 0, 1, 1, 0.8), (1, 1, 0, 0, 1, 1, 0.7))
    assert average_precision(detections, truth, [1])[0, 0] == pytest.approx(2 / 3)


def test_a_second_best_ground_truth_is_never_tried():
    """Two detections want the same of two overlapping ground truths; the second would do for the other one."""
    truth = boxes((0, 1, 0, 0, 10, 10), (0, 1, 0, 0, 10, 13))
    detections = boxes((0, 1, 0, 0, 10, 10, 0.9), (0, 1, 0, 0, 10, 11, 0.8))
    assert average_precision(detections, truth, [1])[0, 0] == pytest.approx(0.5)


def test_order_of_the_file_or_of_scores():
    """Two detections of one person, the better one last: in file order the worse takes the ground truth.

    Ranking is by score either way: hits are [right] or [wrong, right].
    """
    truth = boxes((0, 1, 0, 0, 1, 1))
    detections = boxes((0, 1, 0, 0, 1, 1, 0.3), (0, 1, 0, 0, 1, 1, 0.9))
    assert average_precision(detections, truth, [1], order="score")[0, 0] == 1
    assert average_precision(detections, truth, [1], order="file")[0, 0] == 0.5


def test_classes_without_truth_or_detections():
    truth, detections = boxes((0, 1, 0, 0, 1, 1), (0, 3, 0, 0, 1, 1)), boxes((0, 1, 0, 0, 1, 1), (0, 2, 0, 0, 1, 1))
    np.testing.assert_array_equal(average_precision(detections, truth, [1, 2, 3])[0], [1, np.nan, 0])
    np.testing.assert_array_equal(average_precision(boxes(), truth, [1, 2])[0], [0, np.nan])
    assert np.isnan(average_precision(detections, boxes(), [1])).all()
    assert evaluate_ava(detections, truth, [1, 2, 3]).mean == 0.5


@pytest.mark.parametrize("order", ["file", "score"])
def test_equals_a_plain_loop(order):
    rng = np.random.default_rng(0)
    truth, detections = random_boxes(rng, 300, 20, 4), random_boxes(rng, 900, 22, 4)
    detections.box[:400] = truth.box[rng.integers(300, size=400)] + rng.normal(0, 0.02, (400, 4))
    found = average_precision(detections, truth, [1, 2, 3, 4], [0.3, 0.5], order=order)
    for number, threshold in enumerate((0.3, 0.5)):
        for label in (1, 2, 3, 4):
            mine = [row for row in range(900) if detections.label[row] == label]
            taken, right = set(), {}
            for row in sorted(mine, key=lambda row: -detections.score[row]) if order == "score" else mine:
                there = np.nonzero((truth.image == detections.image[row]) & (truth.label == label))[0]
                value = [iou(detections.box[[row]], truth.box[[other]])[0] for other in there]
                best = int(np.argmax(value)) if value else None
                right[row] = best is not None and value[best] >= threshold and there[best] not in taken
                if right[row]:
                    taken.add(there[best])
            hits = [right[row] for row in sorted(mine, key=lambda row: -detections.score[row])]
            precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
            total = (truth.label == label).sum()
            expected = sum(max(precision[i:]) for i in range(len(hits)) if hits[i]) / total
            assert found[number, label - 1] == pytest.approx(expected, abs=1e-12)


def as_rows(found):
    """Each box with each class, box by box."""
    number, classes = found.scores.shape
    return Boxes(
        found.image.repeat(classes),
        np.tile(np.arange(1, classes + 1), number),
        found.box.repeat(classes, 0),
        found.scores.ravel().astype(np.float64),
    )


@pytest.mark.parametrize("match_order", ["file", "score"])
def test_boxes_with_a_score_for_each_class_count_as_their_rows(match_order):
    """Also with equal scores around the fiftieth of an image, excluded images and boxes of no width."""
    rng = np.random.default_rng(1)
    truth, some = random_boxes(rng, 200, 12, 7), random_boxes(rng, 400, 14, 1)
    person = rng.integers(200, size=300)
    some.box[:300], some.image[:300] = truth.box[person] + rng.normal(0, 0.02, (300, 4)), truth.image[person]
    some.box[5, 2] = some.box[5, 0]
    found = ScoredBoxes(some.image, some.box, (rng.integers(20, size=(400, 6)) / 20).astype(np.float32))
    expected, actual = (
        evaluate_ava(those, truth, [6, 2, 3, 7], excluded=[4], match_order=match_order)
        for those in (as_rows(found), found)
    )
    assert expected.mean > 0.01 and expected.detections[3] == 0
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_million_detections_in_a_minute():
    rng = np.random.default_rng(0)
    truth, detections = random_boxes(rng, 100_000, 20_000, 60), random_boxes(rng, 1_000_000, 20_000, 60)
    begin = time.perf_counter()
    average_precision(detections, truth, range(1, 61), STRICT)
    assert time.perf_counter() - begin < 60


# AVA


@pytest.fixture(scope="module")
def golden():
    images = {}
    truth, detections = (read_boxes(AVA / name, images) for name in ("gt.csv", "detections.csv"))
    return detections, truth, [images[key] for key in read_seconds(AVA / "excluded_timestamps.csv") if key in images]


def test_sixty_classes():
    assert list(EVALUATED) == json.loads((AVA / "classes.json").read_text())["whitelist"]


@pytest.mark.parametrize("name", ["file_order", "sorted_desc", "file_order_no_exclusions"])
def test_matches_the_released_evaluator(golden, name):
    detections, truth, excluded = golden
    scores = evaluate_ava(
        detections,
        truth,
        excluded=() if "no_exclusions" in name else excluded,
        match_order="score" if name == "sorted_desc" else "file",
    )
    expected = EXPECTED[name][0]
    assert scores.mean == pytest.approx(expected["mAP"], abs=1e-12)
    ap = [expected["per_class_AP"][str(label)] for label in scores.labels]
    np.testing.assert_allclose(scores.ap, [np.nan if value is None else value for value in ap], rtol=0, atol=1e-12)
    assert (scores.truths > 0).sum() == expected["n_classes_with_gt"]


def test_strict_matches_the_released_evaluator(golden):
    detections, truth, excluded = golden
    scores = evaluate_ava(detections, truth, excluded=excluded)
    expected = [row["mAP"] for row in EXPECTED["strict_file_order"]]
    np.testing.assert_allclose(scores.strict, expected, rtol=0, atol=1e-12)


def test_activitynet_keeps_fifty_boxes_of_an_image():
    """One person, right at rank 51 of the image: lost, unless all count."""
    wrong = [(0, 1, 0.5, 0.5, 0.6, 0.6, 0.9 - 0.001 * n) for n in range(50)]
    truth, detections = boxes((0, 1, 0, 0, 0.4, 0.4)), boxes((0, 1, 0, 0, 0.4, 0.4, 0.1), *wrong)
    assert evaluate_ava(detections, truth, [1], match_order="score").mean == 0
    assert evaluate_ava(detections, truth, [1], match_order="score", capacity=0).mean == pytest.approx(1 / 51)
    assert evaluate_ava(detections, truth, [1]).mean == pytest.approx(1 / 51)


# A model


class Oracle(torch.nn.Module):
    """Says what the targets of a dataset say, in its first proposals."""

    padded_size = EVAD.padded_size

    def __init__(self, dataset, wrong=0.0):
        super().__init__()
        self.config = EVADConfig.tiny(num_classes=len(dataset.labels))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.targets = iter([dataset[index].target for index in range(len(dataset))])
        self.wrong = wrong

    def forward(self, clips, boxes=None):
        B, n = len(clips), self.config.num_proposals
        person, box = torch.zeros(B, n, 2), torch.zeros(B, n, 4)
        person[..., 1] = 9
        actions = torch.full((B, n, self.config.num_classes), -9.0)
        kept = torch.arange(256).expand(B, -1)
        for row in range(B):
            target = next(self.targets)
            count = len(target["boxes"])
            box[row, :count], person[row, :count, 0] = target["boxes"] + self.wrong, 20.0
            actions[row, :count] = 18 * target["labels"] - 9
        return EVADOutput(person, box, actions, (kept,))


def test_a_model_that_knows_scores_one():
    dataset = data.Synthetic("val", clips=6)
    model = Oracle(dataset).train()
    done = []
    metrics = evaluate(model, dataset, batch_size=4, progress=lambda *counts: done.append(counts))
    assert model.training and done[-1] == (6, 6)
    assert metrics.frame.mean == metrics.person_ap == 1 and np.nanmean(metrics.action_ap) == 1
    assert metrics.frame.strict == pytest.approx(1)
    assert metrics.kept_inside == pytest.approx(metrics.truth_area)  # all were kept
    assert 0.02 < metrics.truth_area < 0.7
    assert set(metrics.summary()) >= {"mAP@0.5", "person_AP@0.5", "matched_action_mAP", "kept_inside_truth"}


def test_boxes_beside_people_score_nothing():
    dataset = data.Synthetic("val", clips=4)
    metrics = evaluate(Oracle(dataset, wrong=60.0), dataset)
    assert metrics.frame.mean == metrics.person_ap == 0 and np.isnan(metrics.action_ap).all()


def test_scores_a_real_model():
    dataset = data.Synthetic("val", clips=3)
    torch.manual_seed(0)
    model = EVAD(EVADConfig.tiny(num_classes=8))
    one, many = (evaluate(model, dataset, batch_size=size) for size in (1, 3))
    assert one.clips == many.clips == 3 and 0 <= one.selected_inside <= 1
    assert one.summary() == pytest.approx(many.summary(), abs=1e-3, nan_ok=True)


class Broken(data.Synthetic):
    """Clips of which the first cannot be read."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample._replace(target=sample.target | {"unreadable": torch.tensor(True)}) if index == 0 else sample


def test_clips_that_cannot_be_read_do_not_count():
    torch.manual_seed(0)
    model = EVAD(EVADConfig.tiny(num_classes=8))
    dataset = Broken("val", clips=5)
    found = collect(model, dataset, batch_size=2)
    assert [one.index for one in found] == [1, 2, 3, 4]
    whole = collect(model, data.Synthetic("val", clips=5), batch_size=2)
    assert score(found).summary() == pytest.approx(score(whole[1:]).summary(), nan_ok=True)
    with pytest.raises(DataError, match="has no clip that can be read"):
        evaluate(model, Broken("val", clips=1))


def evaluate_a_share(rank, folder):
    """One of two ranks: scores five clips, then one that cannot be read; writes down what it is told."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = EVAD(EVADConfig.tiny(num_classes=8))
    dataset = data.Synthetic("val", clips=5)
    told = [len(collect(model, dataset)), evaluate(model, dataset).summary()]
    try:
        evaluate(model, Broken("val", clips=1))
    except DataError as error:
        told.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


def test_two_ranks_know_the_scores_of_one(tmp_path):
    torch.multiprocessing.spawn(evaluate_a_share, (tmp_path,), nprocs=2)
    torch.manual_seed(0)
    alone = evaluate(EVAD(EVADConfig.tiny(num_classes=8)), data.Synthetic("val", clips=5)).summary()
    for rank, collected in enumerate((5, 0)):
        number, told, error = json.loads((tmp_path / f"{rank}.json").read_text())
        assert number == collected
        assert told == pytest.approx(alone, nan_ok=True, abs=1e-5)
        assert error == "the dataset has no clip that can be read"


def test_given_boxes_in_place_of_localisation(tmp_path):
    """With the annotations as boxes a model of random weights finds everybody; a box is matched with its actions."""
    dataset = data.Synthetic("val", clips=5, short_side=48)
    rows = []
    for index in (0, 1, 3, 4):  # nobody is given for clip 2
        sample = dataset[index]
        for number, box in enumerate((sample.target["boxes"] / 48).tolist()):
            rows.append(",".join(map(str, (sample.key[0], 2, *box, "", 0.9 - 0.01 * number))))
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    torch.manual_seed(0)
    model = EVAD(EVADConfig.tiny(num_classes=8, short_side=48))
    people = read_people(tmp_path / "boxes.csv", 0.7)
    results = collect(model, dataset, people=people, batch_size=3)
    for index, found in enumerate(results):
        truth = dataset[index].target["boxes"].numpy() / 48
        np.testing.assert_allclose(found.boxes, truth[:0] if index == 2 else truth, atol=1e-6)
        assert found.actions.shape == (len(found.boxes), 8)
        assert np.isnan(found.truth_actions).any() == (index == 2)
    metrics = score(results)
    given = sum(len(found.boxes) for found in results)
    assert metrics.person_ap == pytest.approx(given / sum(len(found.truth) for found in results))
    annotations = "v,2,0.1,0.1,0.5,0.5,3,0\nv,2,0.1,0.1,0.5,0.5,4,0\nv,3,0.1,0.1,0.5,0.5,1,7\n"
    (tmp_path / "annotations.csv").write_text(annotations)
    assert [boxes.scores.tolist() for boxes in read_people(tmp_path / "annotations.csv").values()] == [[1], [1]]


def test_action_ap_of_matched_boxes_by_hand():
    """Two people found, one not. Class 1: scores 0.9 (no) and 0.8 (yes): AP 1/2. Class 2: 0.7 (yes): AP 1."""
    nan = np.full((1, 2), np.nan)
    one = {"boxes": np.zeros((0, 4)), "persons": np.zeros(0), "actions": np.zeros((0, 2))}
    one |= {"proposals": np.zeros((0, 4)), "proposal_persons": np.zeros(0), "inside": (0.5, 0.25, 0.5)}
    first = ClipOutcome(
        0,
        ("a", 0),
        **one,
        truth=np.ones((2, 4)),
        labels=np.array([[0, 1], [1, 0]]),
        truth_actions=np.array([[0.9, 0.7], [0.8, 0.1]]),
    )
    second = ClipOutcome(1, ("b", 0), **one, truth=np.ones((1, 4)), labels=np.array([[1, 1]]), truth_actions=nan)
    metrics = score([first, second])
    np.testing.assert_allclose(metrics.action_ap, [0.5, 1.0])
    assert (metrics.kept_inside, metrics.selected_inside, metrics.truth_area) == (0.5, 0.25, 0.5)
    assert metrics.frame.mean == 0


def test_rejects_an_order():
    with pytest.raises(ValueError, match="'file' or 'score', got 'best'"):
        average_precision(boxes(), boxes(), [1], order="best")
