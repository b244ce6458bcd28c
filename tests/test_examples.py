"""The examples learn what they draw, and what they say of themselves is true."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))


def load(name):
    (path,) = (path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_vit_detector():
    vitdet = load("vitdet")
    torch.manual_seed(0)
    model, (images, boxes, labels) = vitdet.Detector().eval(), vitdet.draw(2)
    output = model(images)
    assert output.boxes.shape == (2, 20, 4) and output.class_logits.shape == (2, 20, 4)
    assert ((boxes >= 0) & (boxes <= 128)).all() and (boxes[:, 0, 2] <= 64).all() and (boxes[:, 1, 0] >= 64).all()
    # The map is dense, and cells whose tokens were dropped hold the fill.
    dense = model.vit(images).flatten(2).transpose(1, 2)
    blank = (dense == model.vit.blank + model.vit.code).all(-1)
    assert dense.shape == (2, 64, 64) and blank.sum(1).tolist() == [64 - 34] * 2  # 64 > 52 > 42 > 34
    torch.testing.assert_close(vitdet.iou(boxes, boxes).diagonal(dim1=1, dim2=2), torch.ones(2, 2))

    losses = vitdet.train(12)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    model.train()
    vitdet.loss_of(model(images, boxes), boxes, labels).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_action_detector_with_boxes_from_outside():
    pytest.importorskip("transformers", reason="transformers is not installed")
    action_detection = load("action_detection")
    losses = action_detection.train(30)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

    clips, tubes, labels = action_detection.draw(3)
    assert clips.shape == (3, 8, 3, 64, 64) and tubes.shape == (3, 2, 4, 4) and labels.shape == (3, 2)
    config = action_detection.VideoMAEConfig(
        image_size=64, patch_size=8, num_frames=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = action_detection.ActionDetector(action_detection.VideoMAEModel(config), 4)
    still = tubes[:, :, 2]  # [B, n, 4]: a box of the middle frame says as much as a tube that does not move
    torch.testing.assert_close(model(clips, still), model(clips, still[:, :, None].expand(-1, -1, 4, -1)))
    model(clips, tubes).square().sum().backward()
    assert model.blank.grad.abs().sum() > 0 and model.vit.get_input_embeddings().projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_reads_well(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 150 and lines[0].startswith('"""For ')
    assert f"python examples/{path.name}" in path.read_text()
    assert not re.search(r"from_pretrained\(|https?://", path.read_text())
    assert path.name in Path(__file__).parents[1].joinpath("README.md").read_text()
