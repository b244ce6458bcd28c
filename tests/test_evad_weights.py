"""The weights that come with the package are as good as their README says, on clips that they have not seen."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from evad import EVAD, load_checkpoint, read_config
from evad.data import build
from evad.evaluation import evaluate
from evad.weights import TINY

FRAME, PERSON = 65.0, 90.0  # the aim, per cent
ROWS = {"mAP@0.5": "frame mAP at IoU 0.5", "person_AP@0.5": "person AP", "matched_action_mAP": "action AP"}


def shipped(**changes):
    model = EVAD(dataclasses.replace(read_config(TINY), **changes))
    report = load_checkpoint(model, TINY)
    assert not report.missing and not report.unexpected
    return model.eval()


def unseen(clips):
    """Clips of the split that training never drew from."""
    dataset = build({"name": "synthetic", "clips": clips}, "test", read_config(TINY))
    return [dataset[index] for index in range(clips)]


@pytest.fixture(scope="module")
def clips():
    return unseen(400)


def scores(model, clips):
    """Numbers of the README's table, per cent."""
    torch.manual_seed(0)  # of random pruning
    summary = evaluate(model, clips, batch_size=16).summary()
    return {name: 100 * summary[name] for name in ROWS}


def test_is_small_and_loads():
    assert TINY.stat().st_size < 8 << 20
    assert next(shipped().parameters()).dtype == torch.float32


def test_finds_most_actors_in_a_few_clips():
    few = scores(shipped(), unseen(32))
    assert few["person_AP@0.5"] > 90 and few["matched_action_mAP"] > 65


@pytest.mark.slow
def test_scores_are_those_of_the_readme():
    text = Path(TINY).with_name("README.md").read_text()
    measured = scores(shipped(), unseen(int(re.search(r"On ([\d,]+) clips", text).group(1).replace(",", ""))))
    for name, row in ROWS.items():
        claim = float(re.search(rf"\| {row}[^|]* \| ([\d.]+)", text).group(1))
        assert measured[name] == pytest.approx(claim, abs=0.5)
    assert measured["mAP@0.5"] > FRAME and measured["person_AP@0.5"] > PERSON


@pytest.mark.slow
def test_attention_keeps_better_tokens_than_chance(clips):
    """At the same rate; the least important tokens are the control."""
    attention, random, least = (scores(shipped(pruning=how), clips) for how in ("attention", "random", "least"))
    for name in ("mAP@0.5", "matched_action_mAP"):
        assert attention[name] > max(random[name], least[name])


@pytest.mark.slow
def test_a_still_picture_tells_no_action(clips):
    """People are found in the keyframe alone, but what they do is in their motion."""
    model = shipped()
    keyframe = model.config.num_frames // 2
    still = [sample._replace(clip=sample.clip[:, keyframe, None].expand_as(sample.clip)) for sample in clips]
    seen = scores(model, still)
    assert seen["person_AP@0.5"] > PERSON and seen["matched_action_mAP"] < 25  # chance is 13
