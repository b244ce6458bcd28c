"""The weights that come with the package are as good as their README says, on clips that they have not seen."""

import re
from pathlib import Path

import pytest
import torch

from evad import EVAD, load_checkpoint, read_config
from evad.data import build
from evad.evaluation import evaluate
from evad.weights import TINY


def shipped():
    model = EVAD(read_config(TINY))
    report = load_checkpoint(model, TINY)
    assert not report.missing and not report.unexpected
    return model.eval()


def scores(model, clips):
    """Frame mAP and person AP on the first ``clips`` of the split that training never drew from."""
    dataset = build({"name": "synthetic", "clips": clips}, "test", model.config)
    summary = evaluate(model, dataset, batch_size=16).summary()
    return 100 * summary["mAP@0.5"], 100 * summary["person_AP@0.5"]


def test_is_small_and_loads():
    assert TINY.stat().st_size < 8 << 20
    assert next(shipped().parameters()).dtype == torch.float32


@pytest.mark.slow
def test_scores_are_those_of_the_readme():
    text = Path(TINY).with_name("README.md").read_text()
    claimed = [
        float(re.search(rf"\| {name} \| ([\d.]+)", text).group(1)) for name in ("frame mAP at IoU 0.5", "person AP")
    ]
    for actual, claim in zip(scores(shipped(), 400), claimed, strict=True):
        assert actual == pytest.approx(claim, abs=0.5)
