"""Synthetic clips: actors whose actions only motion tells apart, rendered on the fly or written to disk.

``Synthetic`` is a dataset like any other. ``write`` makes videos, annotations in AVA's format and a label map of it,
which ``evad.data.ava`` reads back: also ``python -m evad.data FOLDER``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import ava
from ..video import FPS, VideoWriter, normalize, sample_times
from .actors import ACTIONS
from .sample import Sample
from .scene import Scene, random_scene

KEYFRAME = 2  # second of a written video that the keyframe is at
VISIBLE = 0.4  # an actor counts if at least this part of the box is in the picture


class Synthetic(Dataset):
    """Random scenes: ``clips`` an epoch, new ones in every epoch of training.

    A clip depends on (seed, split, epoch, index) and nothing else.
    """

    labels = ACTIONS
    counted = tuple(range(1, len(ACTIONS) + 1))  # ids of the classes that evaluation counts

    def __init__(
        self,
        split: str = "train",
        *,
        clips: int = 4000,
        seed: int = 0,
        fresh: bool = True,
        size: tuple[int, int] | None = None,
        num_frames: int = 16,
        frame_stride: int = 4,
        frame_rate: float = 30.0,
        short_side: int = 96,
        pixel_mean: float = 0.45,
        pixel_std: float = 0.225,
    ) -> None:
        """
        Args:
            split: "train", "val" or any other name: each has clips of its own.
            clips: Number of clips, at least 1.
            seed: Of everything random, at least 0.
            fresh: Whether ``set_epoch`` gives the split "train" new clips.
            size: Height and width in pixels; None for a square of ``short_side``.
            num_frames, frame_stride, frame_rate: When frames are, as ``evad.video.sample_times`` has it.
            short_side: Pixels, where ``size`` is None.
            pixel_mean, pixel_std: Pixels in [0, 1] become (pixel - mean) / std.
        """
        if clips < 1 or seed < 0:
            raise ValueError(f"synthetic: clips must be at least 1 and seed at least 0, got {clips} and {seed}")
        self.split, self.clips, self.seed, self.fresh = split, clips, seed, fresh and split == "train"
        self.height, self.width = (short_side, short_side) if size is None else size
        self.times = np.array(sample_times(num_frames, frame_stride, frame_rate))
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.epoch = 0

    def __len__(self) -> int:
        return self.clips

    def set_epoch(self, epoch: int) -> None:
        """Choose the clips of an epoch (from 0)."""
        self.epoch = epoch if self.fresh else 0

    def scene(self, index: int) -> Scene:
        if not 0 <= index < self.clips:
            raise IndexError(f"synthetic: index must be in [0, {self.clips}), got {index}")
        split = int.from_bytes(self.split.encode(), "little")
        return random_scene(np.random.default_rng([self.seed, split, self.epoch, index]), self.width / self.height)

    def video_id(self, index: int) -> str:
        epoch = f"_{self.epoch}" if self.fresh else ""
        return f"synthetic_{self.split}{epoch}_{index:06d}"

    def annotations(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [M, 4] in pixels, inside the picture, and labels [M, classes] of the actors who can be seen."""
        boxes = scene.boxes() * self.height
        inside = boxes.clip(0, [self.width - 1, self.height - 1] * 2)
        area, visible = ((b[:, 2:] - b[:, :2]).clip(0).prod(1) for b in (boxes, inside))
        labels = np.array([[name in actor.actions for name in ACTIONS] for actor in scene.actors])
        seen = visible >= VISIBLE * area
        return inside[seen].astype(np.float32), labels[seen].astype(np.float32)

    def render(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A clip before normalisation: uint8 [T, H, W, 3], and its target."""
        scene = self.scene(index)
        frames = torch.from_numpy(scene.render(self.times, self.height, self.width))
        boxes, labels = self.annotations(scene)
        return frames, {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}

    def sample(self, index: int, frames: Tensor, target: dict[str, Tensor]) -> Sample:
        """What ``render`` gave, ready for the model."""
        clip = normalize(frames.permute(0, 3, 1, 2), self.pixel_mean, self.pixel_std)
        return Sample(clip, target, (self.video_id(index), float(KEYFRAME)))

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, *self.render(index))


def write(dataset: Synthetic, folder: str | Path) -> None:
    """Write a dataset as AVA comes: ``videos/*.mp4``, ``<split>.csv``, an empty exclusion list and ``labels.pbtxt``."""
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    (folder / f"{dataset.split}_excluded_timestamps.csv").touch()
    items = (f'item {{\n  name: "{name}"\n  id: {number}\n}}\n' for number, name in enumerate(ACTIONS, 1))
    (folder / "labels.pbtxt").write_text("".join(items))
    times = np.arange(round((KEYFRAME + dataset.times[-1]) * FPS) + 2) / FPS
    size = dataset.height, dataset.width
    with open(folder / f"{dataset.split}.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        for index in range(len(dataset)):
            scene, name = dataset.scene(index), dataset.video_id(index)
            with VideoWriter(folder / "videos" / f"{name}.mp4", dataset.width, dataset.height, FPS) as writer:
                for some in np.array_split(times, -(-len(times) // 16)):
                    for time, image in zip(some, scene.render(some - KEYFRAME, *size), strict=True):
                        writer.write(image, time)
            boxes, labels = dataset.annotations(scene)
            for person, (box, actions) in enumerate(zip(boxes / (size[::-1] * 2), labels, strict=True)):
                for action in np.nonzero(actions)[0]:
                    place = [f"{value:.4f}" for value in box]
                    rows.writerow((name, ava.format_time(KEYFRAME), *place, action + 1, person))
