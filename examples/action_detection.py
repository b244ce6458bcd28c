"""For action detection with boxes from outside: a detector finds people, a pruned video ViT says what they do.

    clip > VideoMAE whose blocks prune (patch.transformers) > kept tokens and where each came from (patch.record)
    kept tokens + boxes > one feature a box, without a dense map (roi_pool_3d) > action scores

``python examples/action_detection.py`` trains a tiny one, for a minute, on clips that it draws: nothing to download. On
real video, begin with ``VideoMAEModel.from_pretrained``. Needs Hugging Face transformers.
Source: Z. Tong et al., VideoMAE (NeurIPS 2022): two stages, a detector's boxes; EVAD (ICCV 2023): the pruning.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from evad_kernels import patch, roi_pool_3d

ACTIONS = {"left": (-3, 0), "right": (3, 0), "up": (0, -3), "down": (0, 3)}  # pixels a frame


class ActionDetector(nn.Module):
    """Scores of every action for every given box."""

    def __init__(self, vit: VideoMAEModel, num_actions: int, keep_rate: float = 0.7) -> None:
        super().__init__()
        config = vit.config
        side = config.image_size // config.patch_size
        self.grid, self.cell = (config.num_frames // config.tubelet_size, side, side), config.patch_size
        self.vit = patch.transformers(vit, keep_rate)  # the middle slice, where the boxes are, is never dropped
        self.blank = nn.Parameter(torch.zeros(config.hidden_size))  # what a dropped cell looks like to a box
        self.classify = nn.Linear(config.hidden_size, num_actions)

    def forward(self, clips: Tensor, boxes: Tensor) -> Tensor:
        """Classify what happens in each box.

        Args:
            clips: [B, T, 3, H, W], normalised.
            boxes: x1, y1, x2, y2 in pixels: [B, n, 4] in the middle frame, or a tracker's [B, n, slices, 4].
        Returns:
            Logits, [B, n, actions].
        """
        with patch.record(self.vit) as kept:
            tokens = self.vit(clips).last_hidden_state  # [B, K, C]
        people = roi_pool_3d(
            tokens, kept[-1], boxes, grid=self.grid, spatial_scale=1 / self.cell, background=self.blank
        )
        return self.classify(people).unflatten(0, boxes.shape[:2])


def draw(B: int, size: int = 64, frames: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Clips in which two textured squares move; their boxes in every second frame and the number of each one's action.

    A single frame does not tell the action.
    """
    moves = torch.tensor(list(ACTIONS.values()))
    labels = torch.randint(len(moves), (B, 2))
    start = torch.tensor([[8, 24], [40, 24]]) + torch.randint(-4, 5, (B, 2, 2))
    time = torch.arange(frames) - frames // 2
    corners = start[:, :, None] + time[:, None] * moves[labels][:, :, None]  # [B, 2, frames, 2]
    clips = torch.randn(B, frames, 3, size, size) / 4
    for b in range(B):
        for person in range(2):
            texture = 1 + torch.rand(3, 16, 16)
            for frame, (x, y) in enumerate(corners[b, person].clamp(0, size - 16)):
                clips[b, frame, :, y : y + 16, x : x + 16] = texture
    corners = corners[:, :, ::2].clamp(0, size - 16).float()
    return clips, torch.cat([corners, corners + 16], dim=-1), labels


def train(steps: int) -> list[float]:
    """Loss of every step."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=64,
        patch_size=8,
        num_frames=8,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=256,
    )
    model, losses = ActionDetector(VideoMAEModel(config), len(ACTIONS)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        clips, boxes, labels = draw(16)
        loss = F.cross_entropy(model(clips, boxes).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {loss.item():.3f}")
    return losses


if __name__ == "__main__":
    train(100)
