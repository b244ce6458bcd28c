"""Tokens on their way through EVAD, and the codes that tell where they are.

Source: EVAD, sections 3.1 and 3.2; the codes are those of the Transformer (Vaswani et al., NeurIPS 2017), over space
and time as in VideoMAE (Tong et al., NeurIPS 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Tokens(NamedTuple):
    """Tokens of a batch of clips, the keyframe's first; inside the encoder a class token may come before them."""

    x: Tensor  # [B, N, C], or [B, 1 + N, C] with a class token
    position: Tensor  # [B, N] int64: t*Gh*Gw + y*Gw + x, where the token comes from
    num_keyframe: int  # the first this many are the keyframe's


def keyframe_first(cells: Tensor, keyframe: int, num_keyframe: int) -> Tensor:
    """Move the keyframe's cells of [B, T*Gh*Gw, ...] to the front; the other frames follow in time order."""
    start, stop = keyframe * num_keyframe, (keyframe + 1) * num_keyframe
    return torch.cat([cells[:, start:stop], cells[:, :start], cells[:, stop:]], dim=1)


def sincos_table(cells: int, width: int) -> Tensor:
    """Fixed codes [cells, width]: sine on even columns, cosine on odd, of cell / 10000^(2*(column//2)/width)."""
    column = torch.arange(width)
    frequency = 10000.0 ** (-2.0 * (column // 2).double() / width)
    angle = torch.arange(cells).double()[:, None] * frequency
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


class PositionTable(nn.Module):
    """Position codes of a space-time grid, fixed: interpolated in space to the clip's size, never in time.

    Args:
        num_frames: Frames of tokens.
        size: Cells a side of the table's frames.
        width: Channels of a code.
    """

    CACHED_SIZES = 4

    def __init__(self, num_frames: int, size: int, width: int) -> None:
        super().__init__()
        self.num_frames, self.size, self.width = num_frames, size, width
        self.register_buffer("table", sincos_table(num_frames * size * size, width), persistent=False)
        self._interpolated: dict[tuple, Tensor] = {}  # (height, width, device, dtype) -> codes

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Computed anew, for model.bfloat16().float() must not leave rounded codes behind.
        self.table = sincos_table(len(self.table), self.width).to(self.table.device)
        self._interpolated.clear()
        return self

    def forward(self, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Codes [T*height*width, C] of ``dtype`` for frames of height x width cells."""
        if (height, width) == (self.size, self.size):
            return self.table.to(dtype)
        # Neither a traced nor a captured tensor may outlive its graph.
        if torch.compiler.is_compiling() or (self.table.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._interpolate(height, width).to(dtype)
        key = (height, width, self.table.device, dtype)
        if key not in self._interpolated:
            while len(self._interpolated) >= self.CACHED_SIZES:
                del self._interpolated[next(iter(self._interpolated))]
            with torch.inference_mode(False), torch.no_grad():
                self._interpolated[key] = self._interpolate(height, width).to(dtype)
        return self._interpolated[key]

    def _interpolate(self, height: int, width: int) -> Tensor:
        frames = self.table.view(self.num_frames, self.size, self.size, self.width).permute(0, 3, 1, 2)
        frames = F.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False)
        return frames.permute(0, 2, 3, 1).reshape(-1, self.width)
