"""The losses against the released code's numbers, against their definitions written another way, and at their edges."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from evad import EVAD, EVADConfig
from evad.checkpoint import released_names
from evad.evaluation.average_precision import iou
from evad.losses import Counts, count, detection_losses, giou, match

GOLDEN = Path(__file__).parent / "golden"


def load(name, kind):
    archive = np.load(GOLDEN / f"tiny_{name}_{kind}.npz", allow_pickle=False)
    return {
        key: torch.from_numpy(archive[key]) if archive[key].dtype.kind in "fiu" else archive[key] for key in archive
    }


@pytest.mark.parametrize("token_order", ["importance", "position"])
@pytest.mark.parametrize("name", ["A", "C"])
def test_matches_golden(name, token_order, backend):
    weights, train, clip = load(name, "weights"), load(name, "train"), load(name, "eval")["clip0_u8"]
    golden = {key: value for key, value in train.items() if not key.startswith("ordered/")}
    if token_order == "position":  # not every gradient array has a twin
        golden = {key: value for key, value in golden.items() if not key.startswith("grad/")}
        golden |= {key.removeprefix("ordered/"): value for key, value in train.items() if key.startswith("ordered/")}
    config = EVADConfig.from_official(json.loads(str(weights["config_json"])))
    model = EVAD(dataclasses.replace(config, token_order=token_order)).train()
    released = released_names(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[released[parameter_name]])
    clips = ((clip.float() / 255 - 0.45) / 0.225)[None]
    targets = [{"boxes": golden["gt0_boxes_xyxy"], "labels": golden["gt0_actions"]}]

    predictions = model.predict(clips, every_stage=True)
    localized = predictions.localized
    matching = match(
        torch.stack(localized.person_logits),
        torch.stack(localized.boxes),
        [targets[0]["boxes"]],
        predictions.whwh,
        config,
    )
    for stage in range(config.num_stages):
        pairs = zip(matching.proposal[stage].tolist(), matching.target[stage].tolist(), strict=True)
        assert set(pairs) == set(map(tuple, golden[f"match_stage{stage}_img0"].T.tolist()))

    losses = model.loss(clips, targets)
    names = json.loads(str(golden["loss_names"]))
    assert set(losses) == {*names, "loss_total"}
    assert_close(torch.stack([losses[term] for term in names]), golden["loss_weighted"], atol=1e-4, rtol=1e-4)
    assert_close(losses["loss_total"], golden["loss_total_mean"], atol=1e-4, rtol=1e-4)

    losses["loss_total"].backward()
    gradients = {released[parameter_name]: parameter.grad for parameter_name, parameter in model.named_parameters()}
    names = json.loads(str(golden["grad_names"]))
    assert set(names) == set(gradients)
    norms = torch.stack([gradients[parameter].norm() for parameter in names])
    floor = 1e-6 * golden["grad_norms"].max().item()  # of gradients that are rounding, as a key bias's
    assert_close(norms, golden["grad_norms"], atol=floor, rtol=1e-3)
    arrays = [key for key in golden if key.startswith("grad/")]
    assert len(arrays) >= 18
    for key in arrays:
        difference = (gradients[key.removeprefix("grad/")] - golden[key]).norm()
        assert difference <= 1e-3 * golden[key].norm() + floor, key


MICRO = {
    "num_frames": 8,
    "depth": 4,
    "pruning_blocks": (1, 2),
    "pyramid_blocks": (0, 1, 2, 3),
    "num_proposals": 5,
    "num_stages": 2,
    "decoder_depth": 2,
    "num_classes": 3,
    "drop_path": 0.0,
    "decoder_drop_path": 0.0,
}


def micro(**fields):
    torch.manual_seed(0)
    return EVAD(EVADConfig.tiny(0.7, **{**MICRO, **fields}))


def clips_and_targets(*numbers, size=(72, 96), seed=1):
    """One random clip for each number of boxes."""
    draw = torch.Generator().manual_seed(seed)
    height, width = size
    targets = []
    for number in numbers:
        corner, extent = torch.rand(2, number, 2, generator=draw)
        corner, extent = corner * 0.6, 0.1 + extent * 0.3
        boxes = torch.cat([corner, corner + extent], dim=1) * torch.tensor([width, height, width, height])
        targets.append({"boxes": boxes, "labels": (torch.rand(number, 3, generator=draw) < 0.4).float()})
    return torch.randn(len(numbers), 3, 8, height, width, generator=draw), targets


def predictions(model, clips):
    with torch.no_grad():
        return model.predict(clips, every_stage=True)


def pairwise_giou(a, b):
    """From the definition, one pair at a time."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    union = area_a + area_b - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def test_giou():
    golden = np.load(GOLDEN / "op_roi_and_boxes.npz", allow_pickle=False)
    boxes = torch.from_numpy(golden["ext/boxes"])
    assert_close(giou(boxes[:12, None], boxes[None, 12:]), torch.from_numpy(golden["giou/out"]), atol=1e-6, rtol=1e-5)
    pairs = boxes[:12].repeat_interleave(12, 0), boxes[12:].repeat(12, 1)
    evaluated = iou(*(box.double().numpy() for box in pairs)).reshape(12, 12)
    np.testing.assert_allclose(evaluated, golden["giou/iou"], atol=1e-6, rtol=1e-5)
    a, b = [0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 6.0, 6.0]
    assert giou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(4 / 28 - 8 / 36)
    assert pairwise_giou(a, b) == pytest.approx(4 / 28 - 8 / 36)
    point = torch.tensor([3.0, 3.0, 3.0, 3.0], requires_grad=True)  # no area at all: no NaN
    giou(point, point.detach()).backward()
    assert point.grad.isfinite().all()


def test_matching_costs_least():
    """Against every assignment there is."""
    model, config = micro(), micro().config
    clips, targets = clips_and_targets(3, 0, 2)
    (person_logits, boxes), _, _, whwh = predictions(model, clips)
    matching = match(torch.stack(person_logits), torch.stack(boxes), [t["boxes"] for t in targets], whwh, config)
    assert matching.clip.tolist() == [[0, 0, 0, 2, 2]] * 2
    assert [sorted(row) for row in matching.target.tolist()] == [[0, 1, 2, 3, 4]] * 2
    for stage, (clip, first) in itertools.product(range(2), [(0, 0), (2, 3)]):
        truth = targets[clip]["boxes"]
        person = person_logits[stage][clip].softmax(-1)[:, 0].tolist()
        cost = [
            [
                5 * ((box - true) / whwh[clip]).abs().sum().item()
                - 2 * person[proposal]
                - 2 * pairwise_giou(box.tolist(), true.tolist())
                for true in truth
            ]
            for proposal, box in enumerate(boxes[stage][clip])
        ]
        best = min(
            itertools.permutations(range(5), len(truth)),
            key=lambda proposals: sum(cost[proposal][true] for true, proposal in enumerate(proposals)),
        )
        rows = matching.clip[stage] == clip
        found = zip(matching.target[stage][rows].tolist(), matching.proposal[stage][rows].tolist(), strict=True)
        assert dict(found) == {first + true: proposal for true, proposal in enumerate(best)}


def test_terms_by_their_definitions():
    model = micro()
    config = model.config
    clips, targets = clips_and_targets(2, 3)
    (person_logits, boxes), action_logits, _, whwh = seen = predictions(model, clips)
    losses = detection_losses(seen, targets, config)
    truth, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    matching = match(torch.stack(person_logits), torch.stack(boxes), [t["boxes"] for t in targets], whwh, config)
    for stage, suffix in enumerate(("_0", "")):
        kind, l1, overlap = torch.ones(2, 5, dtype=torch.int64), 0.0, 0.0
        for clip, proposal, target in zip(*(rows[stage].tolist() for rows in matching), strict=True):
            kind[clip, proposal] = 0
            box = boxes[stage][clip, proposal]
            l1 += ((box - truth[target]) / whwh[clip]).abs().sum().item()
            overlap += 1 - pairwise_giou(box.tolist(), truth[target].tolist())
        ce = F.cross_entropy(person_logits[stage].flatten(0, 1), kind.flatten(), torch.tensor([1.0, 0.4]))
        assert losses[f"loss_ce{suffix}"].item() == pytest.approx(2 * ce.item(), rel=1e-5)
        assert losses[f"loss_bbox{suffix}"].item() == pytest.approx(5 * l1 / 5, rel=1e-5)
        assert losses[f"loss_giou{suffix}"].item() == pytest.approx(2 * overlap / 5, rel=1e-5)
    for block, suffix in enumerate(("_0", "")):  # both blocks: the proposals that the last stage matched
        logits = action_logits[block][matching.clip[1], matching.proposal[1]]
        bce = F.binary_cross_entropy_with_logits(logits, labels[matching.target[1]])
        assert losses[f"loss_bce{suffix}"].item() == pytest.approx(12 * bce.item(), rel=1e-5)
    terms = [value for name, value in losses.items() if name != "loss_total"]
    assert len(terms) == 8 and losses["loss_total"].item() == pytest.approx(sum(terms).item() / 8)


def test_no_box():
    model = micro().train()
    clips, targets = clips_and_targets(0, 0)
    losses = model.loss(clips, targets)
    assert {name for name, value in losses.items() if value == 0} == {
        f"loss_{term}{suffix}" for term in ("bbox", "giou", "bce") for suffix in ("", "_0")
    }
    losses["loss_total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all((parameter.grad == 0).all() for parameter in model.decoder.parameters())


def test_more_boxes_than_proposals():
    clips, targets = clips_and_targets(7, 1)
    assert count(targets, 5) == Counts(clips=2, boxes=8, matched=6)
    losses = micro().loss(clips, targets)
    assert all(value.isfinite() for value in losses.values())


def test_counts_make_parts_add_up():
    """The mean of the parts' losses and gradients is the whole batch's, if both divide by the mean of the counts."""
    model = micro().double().train()
    clips, targets = clips_and_targets(3, 0, 1, 2, size=(24, 48))
    clips = clips.double()
    whole = model.loss(clips, targets)
    expected = torch.autograd.grad(whole["loss_total"], model.parameters())
    counts = Counts(*(torch.tensor(value / 2, dtype=torch.float64) for value in count(targets, 5)))
    halves = [model.loss(clips[half], targets[half], counts) for half in (slice(2), slice(2, 4))]
    for name, value in whole.items():
        assert_close((halves[0][name] + halves[1][name]) / 2, value)
    actual = torch.autograd.grad((halves[0]["loss_total"] + halves[1]["loss_total"]) / 2, model.parameters())
    for (name, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
        assert_close(a, b, atol=1e-9, rtol=1e-6, msg=lambda message, name=name: f"{name}: {message}")


def test_nan_is_seen_in_the_loss():
    model = micro()
    clips, targets = clips_and_targets(2)
    clips[0, 0, 0, 0, 0] = math.nan
    assert model.loss(clips, targets)["loss_total"].isnan()


@pytest.mark.parametrize("targets", [[], [{"boxes": torch.zeros(1, 5), "labels": torch.zeros(1, 3)}]])
def test_rejects_boxes_that_do_not_fit(targets):
    with pytest.raises(ValueError, match=r"EVAD: (targets must be one a clip|boxes of a target must be \[n, 4\])"):
        micro().loss(clips_and_targets(1)[0], targets)


def test_rejects_labels_that_do_not_fit():
    clips, targets = clips_and_targets(2)
    targets[0]["labels"] = targets[0]["labels"][:, :2]
    with pytest.raises(ValueError, match=r"EVAD: labels of a target must be \[2, 3\], got \[2, 2\]"):
        micro().loss(clips, targets)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_recomputation_changes_no_bit(drop_path):
    model = micro(drop_path=drop_path, decoder_drop_path=drop_path).train()
    clips, targets = clips_and_targets(2, 1)

    def step():
        torch.manual_seed(3)
        loss = model.loss(clips, targets)["loss_total"]
        return loss, *torch.autograd.grad(loss, model.parameters())

    expected = step()
    model.set_recomputation(True)
    for a, b in zip(step(), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast():
    model = micro().train()
    clips, targets = clips_and_targets(2, 1)
    expected = model.loss(clips, targets)["loss_total"]
    with torch.autocast("cpu", torch.bfloat16):
        actual = model.loss(clips, targets)["loss_total"]
    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected.item(), rel=0.05)
    actual.backward()


# Given boxes in the place of the localisation


def test_given_boxes_are_classified_as_its_own():
    model = micro().eval()
    clips, _ = clips_and_targets(0, 0)
    with torch.no_grad():
        own = model(clips)
        given = model(clips, boxes=own.boxes)
    assert torch.equal(given.boxes, own.boxes)
    assert_close(given.action_logits, own.action_logits)
    assert given.person_logits.softmax(-1).unique().tolist() == [0, 1]
    for a, b in zip(given.kept, own.kept, strict=True):
        assert torch.equal(a, b)


def test_given_boxes_of_different_numbers():
    """A clip's actions are those that it would get alone, whatever the others have."""
    model = micro().eval()
    clips, targets = clips_and_targets(3, 0, 1)
    boxes = [target["boxes"] for target in targets]
    with torch.no_grad():
        output = model(clips, boxes=boxes)
        found = model.detect(clips, boxes=boxes)
        assert [len(detections.boxes) for detections in found] == [3, 0, 1]
        for number in (0, 2):
            alone = model(clips[number, None], boxes=[boxes[number]])
            rows = len(boxes[number])
            assert_close(output.action_logits[number, :rows], alone.action_logits[0])
            assert torch.equal(output.boxes[number, :rows], boxes[number])
            assert found[number].person_scores.tolist() == [1.0] * rows
        nothing = model(clips, boxes=torch.zeros(3, 0, 4))
    assert nothing.action_logits.shape == (3, 0, 3)
    assert (output.action_logits[1] == -math.inf).all() and (output.boxes[1] == 0).all()


@pytest.mark.parametrize(
    ("boxes", "message"),
    [([torch.zeros(1, 4)], "boxes must be given for each clip"), (torch.zeros(2, 3, 5), r"must be \[n, 4\]")],
)
def test_rejects_given_boxes_that_do_not_fit(boxes, message):
    with pytest.raises(ValueError, match=f"EVAD: .*{message}"):
        micro()(clips_and_targets(1, 1)[0], boxes=boxes)
