"""Query-based actor localisation in the keyframe: learned proposals, refined stage by stage.

Source: EVAD, section 3.3 and Appendix B; the head is that of Sparse R-CNN (Sun et al., CVPR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evad_kernels

from .backbone import merge_heads, split_heads
from .config import EVADConfig


class ProposalAttention(nn.Module):
    """Multi-head self-attention among the proposals of a clip."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = split_heads(self.qkv(x), self.num_heads)
        output = evad_kernels.keyframe_attention(query, key, value, num_keyframe=x.shape[1]).output
        return self.proj(merge_heads(output))


class DynamicInteraction(nn.Module):
    """A proposal's RoI through two layers whose weights the proposal itself writes."""

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        width, self.hidden_width = config.query_width, config.dynamic_width
        self.weights = nn.Linear(width, 2 * width * self.hidden_width)
        self.norm1 = nn.LayerNorm(self.hidden_width)
        self.norm2 = nn.LayerNorm(width)
        self.out = nn.Linear(width * config.roi_size**2, width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, features: Tensor, roi: Tensor) -> Tensor:
        """features [B, n, C], roi [B, n, C, oh, ow]: [B, n, C]."""
        B, n, C = features.shape
        first, second = self.weights(features).view(B * n, 2, -1).unbind(1)
        x = roi.view(B * n, C, -1).transpose(1, 2)  # [B*n, bins, C]
        x = F.relu(self.norm1(x @ first.view(-1, C, self.hidden_width)))
        x = F.relu(self.norm2(x @ second.view(-1, self.hidden_width, C)))
        return F.relu(self.norm3(self.out(x.view(B, n, -1))))


def tower(width: int, layers: int) -> nn.Sequential:
    """Layers before a prediction, [..., width] to the same: linear without bias, layer norm, ReLU, ``layers`` times."""
    return nn.Sequential(
        *(
            module
            for _ in range(layers)
            for module in (nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU())
        )
    )


class Stage(nn.Module):
    """One refinement: proposals attend to each other, look at their boxes, and move them."""

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        width = config.query_width
        self.attn = ProposalAttention(width, config.query_heads)
        self.norm1 = nn.LayerNorm(width)
        self.interaction = DynamicInteraction(config)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.query_mlp_width)
        self.fc2 = nn.Linear(config.query_mlp_width, width)
        self.norm3 = nn.LayerNorm(width)
        self.score_tower = tower(width, config.score_layers)
        self.score = nn.Linear(width, 2)
        self.box_tower = tower(width, config.box_layers)
        self.box = nn.Linear(width, 4)

    def forward(self, features: Tensor, boxes: Tensor, roi: Tensor) -> tuple[Tensor, Tensor]:
        """Refined features [B, n, C] and boxes [B, n, 4] from the RoIs [B, n, C, oh, ow] of ``boxes``."""
        features = self.norm1(features + self.attn(features))
        features = self.norm2(features + self.interaction(features, roi))
        features = self.norm3(features + self.fc2(F.relu(self.fc1(features))))
        return features, move_boxes(boxes, self.box(self.box_tower(features)))

    def person_logits(self, features: Tensor) -> Tensor:
        """[B, n, 2]: person, background."""
        return self.score(self.score_tower(features))


class Localized(NamedTuple):
    """Boxes and scores, one entry a stage, the last stage's last."""

    person_logits: tuple[Tensor, ...]  # [B, n, 2]; the last stage's alone unless every stage's were asked for
    boxes: tuple[Tensor, ...]  # [B, n, 4] x1, y1, x2, y2 in pixels, unclipped


class Localization(nn.Module):
    """Pyramid to boxes and person scores."""

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        self.config = config
        self.proposal_boxes = nn.Parameter(initial_boxes(config.num_proposals, config.initial_boxes))
        self.proposal_features = nn.Parameter(torch.randn(config.num_proposals, config.query_width))
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.num_stages))

    def _apply(self, fn, recurse=True):
        boxes = self.proposal_boxes

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            wide = torch.promote_types(applied.dtype, torch.float32)
            if applied.dtype != wide and (tensor is boxes or tensor is boxes.grad):
                return tensor.to(applied.device, wide)  # boxes are never in half: in bfloat16 a step is a pixel of 224
            return applied

        return super()._apply(apply, recurse)

    def forward(self, levels: Sequence[Tensor], whwh: Tensor, *, every_stage: bool) -> Localized:
        """Localise actors.

        Args:
            levels: The pyramid, finest first, each [B, C, h, w].
            whwh: Width, height, width, height of each clip without padding, [B, 4].
            every_stage: Also give the person logits of the stages before the last; training needs them.
        """
        B = whwh.shape[0]
        center, size = self.proposal_boxes.to(whwh.dtype).split(2, dim=1)
        boxes = torch.cat([center - size / 2, center + size / 2], dim=1) * whwh[:, None]  # [B, n, 4]
        features = self.proposal_features.expand(B, -1, -1)
        person_logits, stage_boxes = [], []
        for number, stage in enumerate(self.stages, start=1):
            features, boxes = stage(features, boxes, self.pool(levels, boxes))
            stage_boxes.append(boxes)
            boxes = boxes.detach()  # each stage answers for its own correction
            if every_stage or number == len(self.stages):
                person_logits.append(stage.person_logits(features))
        return Localized(tuple(person_logits), tuple(stage_boxes))

    def pool(self, levels: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """RoIs [B, n, C, oh, ow] of boxes [B, n, 4], each from the level of its size."""
        return evad_kernels.pyramid_roi_align(
            levels,
            boxes.detach(),
            strides=self.config.strides,
            output_size=self.config.roi_size,
            sampling_ratio=self.config.roi_sampling,
            canonical_size=self.config.canonical_size,
            canonical_level=round(math.log2(self.config.strides[0])) + 2,
        )


def initial_boxes(number: int, arrangement: str) -> Tensor:
    """Proposals [number, 4] before training: centre and size in parts of the frame's width and height."""
    if arrangement == "frame":
        return torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(number, 1)
    rows = math.isqrt(number)
    columns = -(-number // rows)
    cell = torch.arange(number)
    x, y = (cell % columns + 0.5) / columns, (cell // columns + 0.5) / rows
    return torch.stack([x, y, *(torch.full_like(x, 1.5 / side) for side in (columns, rows))], dim=1)  # overlapping


MAX_LOG_SCALE = math.log(100000 / 16)  # a stage enlarges a box by no more than this


def move_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes [B, n, 4] shifted by deltas / 2 of their size and scaled by exp(deltas)."""
    shift, scale = deltas.to(boxes.dtype).split(2, dim=-1)
    size = boxes[..., 2:] - boxes[..., :2]
    center = boxes[..., :2] + 0.5 * size + shift / 2 * size
    half = 0.5 * size * scale.clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([center - half, center + half], dim=-1)
