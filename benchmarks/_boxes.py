"""What the RoI benchmarks share: the boxes, and the rivals that need torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE, COUNT = 224, 100


def draw_boxes(kind: str, B: int, device: str, *, count: int = COUNT, height: int = SIDE, width: int = SIDE) -> Tensor:
    """[B, count, 4], pixels: people of all sizes, cut at the border; or the whole frame, where EVAD's queries begin."""
    clip = torch.tensor([width, height], dtype=torch.float32)
    if kind == "whole frame":
        return torch.cat([torch.zeros(2), clip]).to(device).repeat(B, count, 1)
    generator = torch.Generator().manual_seed(7)
    centre = clip * torch.rand(B, count, 2, generator=generator)
    tall = height * (0.15 + 0.75 * torch.rand(B, count, 1, generator=generator))
    size = torch.cat([tall * (0.3 + 0.4 * torch.rand(B, count, 1, generator=generator)), tall], dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(min=0).minimum(clip.repeat(2)).to(device)


def with_batch_index(boxes: Tensor) -> Tensor:
    """[B, n, 4] as torchvision's [B*n, 5]."""
    batch = torch.arange(boxes.shape[0], device=boxes.device).repeat_interleave(boxes.shape[1])
    return torch.cat([batch[:, None].to(boxes.dtype), boxes.flatten(0, 1)], dim=1)


def torchvision_roi_align():
    """torchvision.ops.roi_align, or why there is none."""
    try:
        from torchvision.ops import roi_align
    except ImportError as error:
        return str(error)
    return roi_align
