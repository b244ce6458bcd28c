"""Keyframe maps of a plain ViT to a feature pyramid (section 3.3; FPN: Lin et al., CVPR 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .config import EVADConfig


class Pyramid(nn.Module):
    """Four keyframe maps of one stride to four levels of strides 1/4, 1/2, 1 and 2 patches."""

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(config.width, config.query_width, 1) for _ in range(4))
        self.output = nn.ModuleList(nn.Conv2d(config.query_width, config.query_width, 3, padding=1) for _ in range(4))
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, keyframes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Levels, finest first, each [B, query_width, h, w], from keyframe maps [B, C, Gh, Gw] in block order."""
        shallow, second, third, deep = keyframes
        scaled = (resize(shallow, 4), resize(second, 2), third, resize(deep, 0.5))
        merged = [lateral(x) for lateral, x in zip(self.lateral, scaled, strict=True)]
        for level in (2, 1, 0):
            merged[level] = merged[level] + resize(merged[level + 1], 2)
        return tuple(output(x) for output, x in zip(self.output, merged, strict=True))


def resize(x: Tensor, factor: float) -> Tensor:
    """Maps [B, C, h, w] with ``factor`` times the cells a side, copied from the nearest (below 1, left out)."""
    return F.interpolate(x, scale_factor=factor, mode="nearest")
