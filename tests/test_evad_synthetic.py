"""evad.data: synthetic clips, what a dataset gives, batches, datasets from a configuration."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from evad import EVADConfig, data
from evad.data import Synthetic
from evad.data.actors import ACTIONS, Actor, Pose, skeleton
from evad.data.capsules import paint
from evad.data.scene import random_scene

LONG = np.array([3.6, 4.8])
TIMES = (np.arange(16) - 8) * 4 / 30


def scenes(number, aspect=1.0):
    return [random_scene(np.random.default_rng([5, index]), aspect) for index in range(number)]


def same(a, b):
    return torch.equal(a.clip, b.clip) and all(torch.equal(a.target[key], b.target[key]) for key in a.target)


# Painting


@pytest.mark.parametrize("centre", [(20.0, 15.0), (19.3, 15.8), (1.0, 2.0), (39.5, 29.0)])
def test_covers_the_area_of_a_capsule(centre):
    """Length 6 and radius 3 anywhere in the picture: 6 * 6 + pi * 9 pixels, less what lies outside."""
    canvas = np.zeros((1, 100, 100, 3), np.float32)
    start = np.array([[centre]]) + 30
    paint(canvas, start, start + LONG, np.full((1, 1), 3.0), np.ones((1, 1, 3)))
    assert canvas[..., 0].sum() == pytest.approx(36 + 9 * np.pi, rel=0.02)
    cut = np.zeros((1, 30, 40, 3), np.float32)
    paint(cut, start - 30, start - 30 + LONG, np.full((1, 1), 3.0), np.ones((1, 1, 3)))
    np.testing.assert_allclose(cut, canvas[:, 30:60, 30:70], atol=1e-5)


def test_paints_in_order_and_skips_what_is_not_there():
    canvas = np.zeros((2, 8, 8, 3), np.float32)
    ends = np.array([[[4, 4], [4, 4], [np.nan, np.nan]], [[4, 4], [99, 4], [4, -50]]], float)
    paint(canvas, ends, ends, np.full((2, 3), 3.0), np.arange(1, 4)[:, None] * np.ones((2, 3, 3)))
    assert canvas[0, 4, 4, 0] == 2 and canvas[1, 4, 4, 0] == 1


# Actors


def test_upright_body():
    """Standing straight: one body height tall, feet on the ground, as wide to the left as to the right."""
    start, end = skeleton(Pose(yaw=0.0))
    assert start.shape == end.shape == (1, 12, 3)
    top = max(start[..., 1].max(), end[..., 1].max()) + 0.1
    assert 0.9 < top < 1.05
    assert min(start[..., 1].min(), end[..., 1].min()) == pytest.approx(0.055)
    assert start[..., 0].max() == pytest.approx(-start[..., 0].min())


def test_what_each_action_moves():
    """From the scenes themselves, by the boxes' and joints' paths over two seconds."""
    seen = set()
    for scene in scenes(150):
        for actor in scene.actors:
            start, end = skeleton(actor.pose(TIMES))
            path = actor.at(TIMES)
            moves = np.ptp(start, 0).max() + np.ptp(end, 0).max() > 1e-9
            assert moves == (actor.actions != ("hold still",)) or actor.speed
            for action in actor.actions:
                seen.add(action)
                if action == "walk left":
                    assert (np.diff(path) < 0).all()
                elif action == "walk right":
                    assert (np.diff(path) > 0).all()
                else:
                    assert actor.speed == 0 or action == "wave"
                if action == "jump":
                    assert np.ptp(actor.pose(TIMES).lift) > 0.25
    assert seen == set(ACTIONS)


def test_a_thing_changes_hands():
    pair = next(
        [a for a in scene.actors if a.actions == ("hand over",)]
        for scene in scenes(100)
        if any(a.actions == ("hand over",) for a in scene.actors)
    )
    time = np.linspace(0, 1 / pair[0].rate, 50)
    hand = np.zeros((50, 2))
    has = np.stack([np.isfinite(actor.thing_at(time, hand, hand)[:, 0]) for actor in pair])
    assert (has.sum(0) == 1).all() and has[0].any() and has[1].any()


def test_a_still_actor_may_have_any_pose_of_a_moving_one():
    """At the keyframe every joint of nearly all moving actors is where it may be in a still one: no frame tells."""
    poses: dict[str, list] = {}
    for scene in scenes(900):
        for actor in scene.actors:
            pose = Pose(*(np.ravel(value)[0] for value in actor.pose(np.zeros(1))))
            poses.setdefault(actor.actions[-1], []).append(pose._replace(yaw=np.angle(np.exp(1j * pose.yaw))))
    still = np.array(poses.pop("hold still"))
    low, high = still.min(0) - 0.1, still.max(0) + 0.1  # radians
    assert set(poses) == set(ACTIONS) - {"hold still"}
    for action, some in poses.items():
        inside = ((np.array(some) >= low) & (np.array(some) <= high)).all(1)
        assert inside.mean() > 0.9, action


# Scenes


def test_actors_fill_a_third_of_the_picture():
    """Large enough to be told apart in 96 pixels, and rarely in each other's way."""
    dataset = Synthetic("val", clips=150)
    covered, shared = [], []
    for index in range(len(dataset)):
        boxes, _ = dataset.annotations(dataset.scene(index))
        layers = np.zeros((96, 96), int)
        for x1, y1, x2, y2 in boxes.round().astype(int):
            layers[y1 : y2 + 1, x1 : x2 + 1] += 1
        covered.append((layers > 0).mean())
        shared.append((layers > 1).mean())
    assert 0.25 < np.mean(covered) < 0.45
    assert np.mean(shared) < 0.1


@pytest.mark.parametrize("index", range(6))
def test_boxes_hold_their_actors(index):
    """Without an actor the pixels outside of its box stay the same (things it carries apart)."""
    scene = scenes(6, 1.5)[index]
    scene = scene._replace(actors=tuple(Actor(*actor)._replace(thing="") for actor in scene.actors))
    scene = scene._replace(actors=tuple(a for a in scene.actors if not {"hand over", "pick up"} & set(a.actions)))
    frame, empty = (
        s.render(np.zeros(1), 192, 288)[0].astype(int) for s in (scene, scene._replace(actors=(), posts=scene.posts))
    )
    changed = np.abs(frame - empty).max(2) > 0
    boxes = scene.boxes() * 192
    inside = np.zeros_like(changed)
    for x1, y1, x2, y2 in boxes.clip(0):
        inside[int(y1) : int(np.ceil(y2)) + 1, int(x1) : int(np.ceil(x2)) + 1] = True
    assert not (changed & ~inside).any()
    for x1, y1, x2, y2 in boxes[-1:]:  # nobody stands before the nearest: its box is tight
        if x1 > 0 and y1 > 0 and x2 < 288 and y2 < 192 and not len(scene.posts):
            assert changed[int(y1) : int(y1) + 2].any() and changed[int(y2) - 1 : int(y2) + 1].any()
            assert changed[:, int(x1) : int(x1) + 2].any() and changed[:, int(x2) - 1 : int(x2) + 1].any()


def test_a_frame_does_not_depend_on_its_neighbours():
    for scene in scenes(4):
        together = scene.render(TIMES, 48, 64)
        np.testing.assert_array_equal(together, np.concatenate([scene.render([t], 48, 64) for t in TIMES]))


# Dataset


def test_samples():
    dataset = Synthetic("val", clips=8)
    assert len(dataset) == 8 and dataset.labels == ACTIONS
    for index in range(8):
        clip, target, key = dataset[index]
        assert clip.shape == (3, 16, 96, 96) and clip.dtype == torch.float32
        assert clip.min() >= -2.001 and clip.max() <= 2.4445
        boxes, labels = target["boxes"], target["labels"]
        assert boxes.dtype == labels.dtype == torch.float32
        assert boxes.shape == (len(labels), 4) and labels.shape[1] == len(ACTIONS)
        assert (boxes[:, :2] < boxes[:, 2:]).all() and boxes.min() >= 0 and boxes.max() <= 95
        assert (labels.sum(1) >= 1).all()
        assert key == (f"synthetic_val_{index:06d}", 2.0)
    with pytest.raises(IndexError):
        dataset[8]


def test_depends_on_seed_split_epoch_and_index_alone():
    first = Synthetic("train", clips=3, seed=1)
    assert same(first[2], Synthetic("train", clips=9, seed=1)[2])
    others = [Synthetic("train", clips=3, seed=2)[2], Synthetic("val", clips=3, seed=1)[2], first[1]]
    before = first[2]
    first.set_epoch(1)
    assert not any(same(before, other) for other in (*others, first[2]))
    fixed = Synthetic("train", clips=3, seed=1, fresh=False)
    fixed.set_epoch(1)
    assert same(fixed[2], before)


def test_workers_give_the_same():
    dataset = Synthetic("val", clips=4, short_side=48)
    batches = [list(DataLoader(dataset, 2, collate_fn=data.collate, num_workers=n)) for n in (0, 2)]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a.clips, b.clips) and a.keys == b.keys
        assert all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a.targets, b.targets, strict=True))


def test_collate_keeps_sizes():
    small, large = (Synthetic("val", clips=1, size=size)[0] for size in ((48, 64), (64, 64)))
    assert data.collate([small, small]).clips.shape == (2, 3, 16, 48, 64)
    assert [tuple(clip.shape[2:]) for clip in data.collate([small, large]).clips] == [(48, 64), (64, 64)]


def test_frames_follow_the_models_rate():
    config = EVADConfig.tiny(short_side=48, num_frames=8, frame_stride=2, frame_rate=10)
    dataset = data.build({"name": "synthetic", "clips": 1}, "val", config)
    assert dataset.times == pytest.approx([(i - 4) * 0.2 for i in range(8)])
    thirty = Synthetic("val", clips=1, short_side=48, num_frames=8, frame_stride=6)
    assert torch.equal(dataset[0].clip, thirty[0].clip)


def test_build():
    section = {"name": "synthetic", "seed": 3, "clips": 10, "val": {"clips": 4}}
    config = dataclasses.replace(EVADConfig.tiny(), num_frames=8, short_side=48)
    train, val = (data.build(section, split, config) for split in ("train", "val"))
    assert (len(train), len(val), val.seed) == (10, 4, 3)
    assert val[0].clip.shape == (3, 8, 48, 48)
    assert data.build(section | {"short_side": 32}, "val", config)[0].clip.shape == (3, 8, 32, 32)
    for split in ("test", "minival"):
        assert len(data.build(section | {split: {"clips": 5}}, split)) == 5
    assert len(data.build(section | {"test": {"clips": 5}}, "train")) == 10


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "name must be one of .*synthetic"),
        ({"name": "synthetik"}, "synthetik"),
        ({"name": "synthetic", "clps": 3}, "'clps' is no option of synthetic, which has clips"),
        ({"name": "synthetic", "clips": 0}, "at least 1"),
        (
            {"name": "synthetic", "valid": {"clips": 50}},
            "options of one split must be under train, val, test, got 'valid': {'clips': 50}",
        ),
    ],
)
def test_build_rejects(section, message):
    with pytest.raises(ValueError, match=message):
        data.build(section, "train")
