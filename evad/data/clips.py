"""Clips cut from videos or folders of frames, with released augmentation and preprocessing.

As the released EVAD does it: mirror images, bilinear resizing of the short side in whole grey levels, then
(x - 0.45) / 0.225; boxes are clipped to the picture before and after. No crop, no change of colour.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..problems import DataError, Problems
from ..video import MAX_SIZE, VideoError, normalize, resize, resized
from .media import Sampling, read_frames
from .sample import Sample

# As a word: of "turn left", "TurnLeft" or "turn_left", not of "upright".
_SIDE = re.compile(r"(?<![A-Za-z])(?i:left|right)(?![a-z])|(?:Left|Right)(?![a-z])")


class Entry(NamedTuple):
    """One keyframe."""

    key: tuple[str, float]
    path: Path  # of the video or the folder of frames
    at: float  # keyframe: seconds from the beginning, or the frame's number from 0
    boxes: np.ndarray  # [M, 4] x1, y1, x2, y2 in parts of the picture
    labels: np.ndarray  # [M, classes] multi-hot


class Clips(Dataset):
    """Entries as samples. A clip that cannot be read fails, or (policy "skip") is counted: training has a black one
    without people in its place, evaluation leaves it out.

    Augmentation depends on (seed, epoch, index) and nothing else.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        labels: Sequence[str],
        sampling: Sampling,
        *,
        problems: Problems,
        short_sides: Sequence[int],
        counted: Sequence[int] | None = None,
        max_size: int = MAX_SIZE,
        flip: float = 0.0,
        seed: int = 0,
        pixel_mean: float = 0.45,
        pixel_std: float = 0.225,
    ) -> None:
        """
        Args:
            entries: The keyframes.
            labels: Names of the classes.
            sampling: Which frames a clip has.
            problems: What to do about clips that cannot be read.
            short_sides: Pixels of the short side, one of them at random.
            counted: Ids (from 1) of the classes that evaluation counts; None for all.
            max_size: Pixels that the long side has at most.
            flip: Probability of a mirror image; a warning where a label's name has "left" or "right" in it.
            seed: Of the choice of side and flip.
            pixel_mean, pixel_std: Pixels in [0, 1] become (pixel - mean) / std.
        """
        self.entries, self.labels, self.sampling, self.problems = list(entries), tuple(labels), sampling, problems
        self.short_sides, self.max_size, self.flip, self.seed = tuple(short_sides), max_size, flip, seed
        self.pixel_mean, self.pixel_std = pixel_mean, pixel_std
        self.counted = tuple(range(1, len(self.labels) + 1) if counted is None else counted)
        self.epoch = 0
        if not self.entries:
            raise DataError("the dataset has no keyframe in it")
        if flip > 0 and (sided := [name for name in self.labels if _SIDE.search(name)]):
            warnings.warn(
                f"data: flip = {flip:g} shows mirror images under unchanged labels, of which some tell left from right "
                f"({', '.join(sided)}): set flip to 0",
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.entries)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of an epoch (from 0)."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        draw = np.random.default_rng([self.seed, self.epoch, index])
        short_side = int(draw.choice(self.short_sides))
        flip = bool(draw.random() < self.flip)
        size = short_side, short_side

        def prepare(image: np.ndarray) -> Tensor:
            nonlocal size
            size = image.shape[:2]
            return resize(np.ascontiguousarray(image[:, ::-1]) if flip else image, short_side, self.max_size)

        boxes, labels, flags = entry.boxes, entry.labels, {}
        try:
            samples = read_frames(entry.path, entry.at, self.sampling, prepare)
        except VideoError as error:
            self.problems(f"{error} (for {entry.key[0]} at {entry.key[1]:g})", error)
            samples = [prepare(np.zeros((*size, 3), np.uint8))] * self.sampling.num_frames
            boxes, labels, flags = boxes[:0], labels[:0], {"unreadable": torch.tensor(True)}
        pixels = prepare_boxes(boxes, size, short_side, self.max_size, flip=flip)
        seen = (pixels[:, :2] < pixels[:, 2:]).all(1)
        target = {
            "boxes": torch.from_numpy(pixels[seen].astype(np.float32)),
            "labels": torch.from_numpy(labels[seen].astype(np.float32)),
            "truth": torch.from_numpy(boxes[seen]),  # as annotated, for evaluation
            **flags,
        }
        return Sample(normalize(samples, self.pixel_mean, self.pixel_std), target, entry.key)


def prepare_boxes(
    boxes: np.ndarray, size: tuple[int, int], short_side: int, max_size: int = MAX_SIZE, *, flip: bool = False
) -> np.ndarray:
    """Boxes [M, 4] in parts of a picture of ``size`` (H, W) as pixels of the resized, perhaps mirrored, picture."""
    height, width = size
    new_height, new_width, ratio = resized(height, width, short_side, max_size)
    boxes = (boxes * [width, height, width, height]).clip(0, [width - 1, height - 1] * 2)
    if flip:
        boxes = np.stack([width - 1 - boxes[:, 2], boxes[:, 1], width - 1 - boxes[:, 0], boxes[:, 3]], 1)
    return (boxes * ratio).clip(0, [new_width - 1, new_height - 1] * 2)
