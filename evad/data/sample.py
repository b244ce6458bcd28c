"""What a dataset gives: a clip with its target, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """One clip, ready for the model."""

    clip: Tensor  # [3, T, H, W] float32, normalised
    target: dict[str, Tensor]
    """"boxes" [M, 4] float32: x1, y1, x2, y2 in pixels of the clip; "labels" [M, classes] float32: multi-hot; perhaps
    "truth" [M, 4] float64: the boxes as annotated, in parts of the picture, never clipped; "unreadable", true, where
    the clip could not be read and black stands for it."""
    key: tuple[str, float]  # video id, second of the keyframe


class Batch(NamedTuple):
    clips: Tensor | list[Tensor]  # [B, 3, T, H, W], or a list where sizes differ
    targets: list[dict[str, Tensor]]
    keys: list[tuple[str, float]]


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples together: clips of one size are stacked, others stay a list (the model pads them)."""
    clips, targets, keys = (list(part) for part in zip(*samples, strict=True))
    return Batch(torch.stack(clips) if len({clip.shape for clip in clips}) == 1 else clips, targets, keys)
