"""For detectors on a plain image ViT: the ViT runs on fewer tokens, and the box heads still get a dense map.

    image > ViT whose blocks prune (keyframe_attention_topk, gather_tokens) > dense map (scatter_tokens)
          > simple feature pyramid > a proposal from every cell > class and box of the best (pyramid_roi_align)

``python examples/vitdet.py`` trains a tiny one, for a minute, on rectangles that it draws: nothing to download.
Source: Y. Li et al., ViTDet (ECCV 2022): a pyramid of one map; Z. Tian et al., FCOS (ICCV 2019): a cell's proposal.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evad_kernels as ek


class Block(nn.Module):
    """A ViT block that drops, between attention and MLP, the tokens that received the least attention."""

    def __init__(self, width: int, keep_rate: float) -> None:
        super().__init__()
        self.num_heads, self.keep_rate = width // 32, keep_rate
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        num_select = math.ceil(self.keep_rate * x.shape[1])
        rows, index, _ = ek.keyframe_attention_topk(*qkv, num_keyframe=0, num_select=num_select)
        x, position = ek.gather_tokens(x, index), ek.gather_tokens(position, index)
        x = x + self.proj(rows.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), position


class PruningViT(nn.Module):
    """Images [B, 3, H, W] to a dense map [B, C, H/16, W/16]; a dropped cell holds a learned token and its own code."""

    def __init__(self, size: int, width: int, keep_rates: tuple[float, ...]) -> None:
        super().__init__()
        self.grid = (1, size // 16, size // 16)
        self.embed = nn.Conv2d(3, width, 16, stride=16)
        self.code = nn.Parameter(0.02 * torch.randn(math.prod(self.grid), width))
        self.blank = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, keep_rate) for keep_rate in keep_rates)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.code
        position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        for block in self.blocks:
            x, position = block(x, position)
        dense = ek.scatter_tokens(self.norm(x), position, grid=self.grid, fill=self.blank + self.code)
        return dense[:, 0].permute(0, 3, 1, 2)


class Output(NamedTuple):
    objectness: Tensor  # [B, cells] logit of each cell of stride 8
    centers: Tensor  # [cells, 2] its x and y in pixels
    cells: Tensor  # [B, cells, 4] the box that each cell proposes
    proposals: Tensor  # [B, n, 4] those that the heads looked at
    class_logits: Tensor  # [B, n, classes + 1], the last one is background
    boxes: Tensor  # [B, n, 4] the proposals, refined


class Detector(nn.Module):
    def __init__(self, num_classes: int = 3, size: int = 128, width: int = 64, keep_rates=(1.0, 0.8, 0.8, 0.8)) -> None:
        super().__init__()
        self.vit = PruningViT(size, width, keep_rates)

        double, quadruple = (nn.ConvTranspose2d(width, width, side, stride=side) for side in (2, 4))
        self.pyramid = nn.ModuleList(  # strides 4, 8, 16, 32
            nn.Sequential(resize, nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(1, width))
            for resize in (quadruple, double, nn.Identity(), nn.MaxPool2d(2))
        )
        self.propose = nn.Conv2d(width, 1 + 4, 1)
        self.hidden = nn.Sequential(nn.Flatten(2), nn.Linear(49 * width, 128), nn.ReLU())
        self.classify, self.refine = nn.Linear(128, num_classes + 1), nn.Linear(128, 4)

    def forward(self, images: Tensor, true_boxes: Tensor | None = None) -> Output:
        """In training the heads see ``true_boxes`` [B, M, 4], too."""
        dense = self.vit(images)
        levels = [level(dense) for level in self.pyramid]
        objectness, reach = self.propose(levels[1]).flatten(2).transpose(1, 2).split((1, 4), dim=-1)
        y, x = (8 * (torch.arange(n, device=images.device) + 0.5) for n in levels[1].shape[2:])
        centers, (before, after) = torch.cartesian_prod(y, x).flip(-1), (16 * reach.clamp(max=2).exp()).split(2, dim=-1)
        cells = torch.cat([centers - before, centers + after], dim=-1)
        best = objectness.topk(20, dim=1).indices
        proposals = cells.take_along_dim(best, 1).detach()
        proposals = proposals if true_boxes is None else torch.cat([proposals, true_boxes], dim=1)
        hidden = self.hidden(ek.pyramid_roi_align(levels, proposals, canonical_size=64))
        boxes = proposals + 16 * self.refine(hidden)
        return Output(objectness[..., 0], centers, cells, proposals, self.classify(hidden), boxes)


def loss_of(output: Output, true_boxes: Tensor, labels: Tensor) -> Tensor:
    """Both stages: is something here, and which box? ``true_boxes`` [B, M, 4] in pixels, ``labels`` [B, M]."""
    centers, low, high = output.centers[:, None], true_boxes[:, None, :, :2], true_boxes[:, None, :, 2:]
    depth, which = torch.minimum(centers - low, high - centers).amin(-1).max(-1)
    here = depth > 4  # a cell proposes if its centre lies 4 pixels inside a box
    first = F.binary_cross_entropy_with_logits(output.objectness, here.to(output.objectness))
    first = first + F.l1_loss(output.cells[here], true_boxes.take_along_dim(which[..., None], 1)[here]) / 16
    overlap, which = iou(output.proposals, true_boxes).max(-1)
    here = overlap > 0.5
    label = labels.gather(1, which).where(here, output.class_logits.shape[-1] - 1)
    second = F.cross_entropy(output.class_logits.flatten(0, 1), label.flatten())
    return first + second + F.l1_loss(output.boxes[here], true_boxes.take_along_dim(which[..., None], 1)[here]) / 16


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Of every box [B, n, 4] with every box [B, m, 4]: [B, n, m]."""
    area_a, area_b = ((boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (a, b))
    low, high = torch.maximum(a[:, :, None, :2], b[:, None, :, :2]), torch.minimum(a[:, :, None, 2:], b[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (area_a[:, :, None] + area_b[:, None] - shared)


def draw(B: int, size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Images with a red, green or blue rectangle in each half; their boxes [B, 2, 4] and labels [B, 2]."""
    sides, labels = torch.randint(20, 60, (B, 2, 2)), torch.randint(3, (B, 2))
    corners = (torch.rand(B, 2, 2) * (torch.tensor([size // 2, size]) - sides)).long()
    corners[:, 1, 0] += size // 2
    boxes, images = torch.cat([corners, corners + sides], dim=-1), torch.randn(B, 3, size, size) / 2
    for i, (x1, y1, x2, y2) in enumerate(boxes.flatten(0, 1)):
        images[i // 2, labels[i // 2, i % 2], y1:y2, x1:x2] += 2
    return images, boxes.float(), labels


def train(steps: int) -> list[float]:
    """Loss of every step."""
    torch.manual_seed(0)
    model, losses = Detector(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        images, boxes, labels = draw(16)
        loss = loss_of(model(images, boxes), boxes, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {loss.item():.3f}")
    return losses


if __name__ == "__main__":
    train(200)
