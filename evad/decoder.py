"""Action classification: a feature per actor from kept tokens, refined with those tokens as context.

Source: EVAD, section 3.3 (context refinement decoder, RoI extension).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evad_kernels

from .backbone import Block, Encoded, call, drop_path_rates
from .config import EVADConfig
from .tokens import PositionTable, Tokens


class Decoder(nn.Module):
    """Kept tokens and boxes to action logits."""

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        width, num_frames = config.decoder_width, config.num_frames // config.tubelet_size
        self.project = nn.Linear(config.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_table = PositionTable(num_frames, config.position_size, width)
        drop_path = drop_path_rates(config.decoder_drop_path, config.decoder_depth)
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, config.decoder_mlp_ratio, rate) for rate in drop_path
        )
        self.classifiers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, config.action_width, bias=False),
                nn.LayerNorm(config.action_width),
                nn.ReLU(),
                nn.Linear(config.action_width, config.num_classes),
            )
            for _ in drop_path or [None]
        )

    def forward(self, encoded: Encoded, boxes: Tensor, whwh: Tensor, *, every_block: bool) -> tuple[Tensor, ...]:
        """Classify the actions in boxes [B, n, 4].

        Args:
            encoded: The encoder's result.
            boxes: Boxes of actors in the keyframe, pixels.
            whwh: Width, height, width, height of each clip without padding, [B, 4].
            every_block: Also classify after the blocks before the last; training needs it.
        Returns:
            Action logits [B, n, classes], one entry a classified block, the last block's last.
        """
        tokens, actors = self.inputs(encoded, boxes, whwh)
        if not self.blocks:
            return (self.classifiers[0](actors),)
        x = torch.cat([tokens, actors], dim=1)
        logits = []
        for number, (block, classifier) in enumerate(zip(self.blocks, self.classifiers, strict=True), start=1):
            x = call(block, x, recompute=self.recompute)
            if every_block or number == len(self.blocks):
                logits.append(classifier(x[:, tokens.shape[1] :]))
        return tuple(logits)

    def attention(self, encoded: Encoded, boxes: Tensor, whwh: Tensor) -> Tensor:
        """How much each actor attends to each token in the last block: [B, n, T, Gh, Gw], mean over heads.

        A dropped token gets 0; an actor's weights add up to 1 less what goes to actors.
        """
        tokens, actors = self.inputs(encoded, boxes, whwh)
        x = torch.cat([tokens, actors], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        last, K = self.blocks[-1], tokens.shape[1]
        query, key, _ = last.attn.heads(last.norm1(x))
        logits = query[:, :, K:].float() @ key.float().transpose(2, 3) / query.shape[3] ** 0.5
        weights = logits.softmax(dim=3).mean(dim=1)[..., :K]  # [B, n, K]
        cells = evad_kernels.scatter_tokens(weights.transpose(1, 2), encoded.tokens.position, grid=encoded.grid)
        return cells.permute(0, 4, 1, 2, 3)

    def inputs(self, encoded: Encoded, boxes: Tensor, whwh: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks see.

        Args:
            encoded: The encoder's result.
            boxes: Boxes of actors in the keyframe, pixels, [B, n, 4]; no gradient flows to them.
            whwh: Width, height, width, height of each clip without padding, [B, 4].
        Returns:
            Tokens [B, K, C] and a feature per box [B, n, C], both of the decoder's width.
        """
        tokens, background = self.place(encoded)
        boxes = extend_boxes(boxes.detach(), self.config.roi_extension, whwh)
        return tokens.x, self.pool(tokens, background, boxes, encoded.grid)

    def place(self, encoded: Encoded) -> tuple[Tokens, Tensor | None]:
        """Tokens of the decoder's width with the codes of their cells, and what dropped cells hold."""
        _, Gh, Gw = encoded.grid
        position, num_keyframe = encoded.tokens.position, encoded.tokens.num_keyframe
        if self.config.token_order == "importance":
            position = torch.cat([position[:, :num_keyframe], position[:, num_keyframe:].sort(dim=1).values], dim=1)
        codes = self.position_table(Gh, Gw, self.mask_token.dtype)  # [cells, C]
        x = self.project(encoded.tokens.x) + F.embedding(position, codes)
        background = self.mask_token[0] + codes if self.config.blank == "mask_token" else None
        return Tokens(x, position, num_keyframe), background

    def pool(self, tokens: Tokens, background: Tensor | None, boxes: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """One feature [B, n, C] per box: the maximum over its bins in each frame, then the mean over frames."""
        features = evad_kernels.roi_pool_3d(
            tokens.x,
            tokens.position,
            boxes,
            grid=grid,
            output_size=self.config.roi_size,
            spatial_scale=1 / self.config.patch_size,
            sampling_ratio=self.config.roi_sampling,
            background=background,
        )
        return features.unflatten(0, boxes.shape[:2])


def extend_boxes(boxes: Tensor, extension: tuple[float, float], whwh: Tensor) -> Tensor:
    """Widen boxes [B, n, 4] by fractions of their width and height (a pixel counts itself), within the clip."""
    size = boxes[..., 2:] - boxes[..., :2] + 1
    margin = torch.cat([size[..., :1] * (extension[0] / 2), size[..., 1:] * (extension[1] / 2)], dim=-1)
    extended = torch.cat([boxes[..., :2] - margin, boxes[..., 2:] + margin], dim=-1)
    return clip_boxes(extended, whwh[:, None])


def clip_boxes(boxes: Tensor, whwh: Tensor) -> Tensor:
    """Boxes inside the clip: coordinates in [0, size - 1]."""
    return torch.minimum(boxes.clamp(min=0), whwh - 1)
