"""What the RoI benchmarks share: the boxes, and the rivals that need torchvision."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE, COUNT = 224, 100


def draw_boxes(kind: str, B: int, device: str) -> Tensor:
    """[B, 100, 4], pixels: people of all sizes, cut at the border; or the whole frame, where EVAD's queries begin."""
    if kind == "whole frame":
        return torch.tensor([0.0, 0.0, SIDE, SIDE], device=device).repeat(B, COUNT, 1)
    generator = torch.Generator().manual_seed(7)
    centre = SIDE * torch.rand(B, COUNT, 2, generator=generator)
    height = SIDE * (0.15 + 0.75 * torch.rand(B, COUNT, 1, generator=generator))
    size = torch.cat([height * (0.3 + 0.4 * torch.rand(B, COUNT, 1, generator=generator)), height], dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, SIDE).to(device)


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
