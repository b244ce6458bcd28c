"""The encoder: a plain video ViT with keyframe-centric token pruning inside some blocks.

Source: EVAD, section 3.2, Eq. 1 and Table 6; the ViT is VideoMAE's (Tong et al., NeurIPS 2022).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import evad_kernels

from .config import EVADConfig
from .tokens import PositionTable, Tokens, keyframe_first


class DropPath(nn.Module):
    """Drop a residual branch of a sample with probability ``rate`` in training, and scale the kept ones."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * (keep.to(branch.dtype) / (1 - self.rate))


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Of each block: from 0 at the first to ``last``, in even steps."""
    return [last * number / max(depth - 1, 1) for number in range(depth)]


class Attention(nn.Module):
    """Multi-head self-attention; ``prune`` also drops the least important tokens, before the output projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        # With every token a keyframe token no importance is asked for: plain attention.
        output = evad_kernels.keyframe_attention(query, key, value, num_keyframe=x.shape[1]).output
        return self.proj(merge_heads(output))

    def prune(
        self, x: Tensor, *, num_keyframe: int, num_select: int, keyframe_weight: float, pruning: str = "attention"
    ) -> Pruned:
        """Attend, and keep the keyframe's rows and ``num_select`` others.

        Args:
            x: Normalised tokens, the keyframe's first, [B, N, C].
            num_keyframe: Tokens of the keyframe, in [0, N], and the class token before them, where there is one.
            num_select: Others to keep, in [0, N - num_keyframe].
            keyframe_weight: w_kf of Eq. 1: what the keyframe's queries count, at least 0.
            pruning: Which others stay: "attention", those of most importance; "class", those that the first token, the
                class token, attends to most; "least", those of least importance; "random".
        Returns:
            ``Pruned``: rows after the output projection, dtype of ``x``; ties go to the lower index.
        Raises:
            ValueError: a number out of its range.
        """
        query, key, value = self.heads(x)
        options = {"num_keyframe": num_keyframe, "keyframe_weight": keyframe_weight}
        if pruning == "attention":
            output, index, importance = evad_kernels.keyframe_attention_topk(
                query, key, value, num_select=num_select, **options
            )
            return Pruned(self.proj(merge_heads(output)), index, importance)
        output, importance = evad_kernels.keyframe_attention(query, key, value, **options)
        if pruning == "class":
            logits = query[:, :, :1].float() @ key.float().transpose(2, 3) * key.shape[3] ** -0.5  # [B, H, 1, N]
            importance = logits.softmax(3)[:, :, 0, num_keyframe:].mean(1)
        else:
            importance = -importance if pruning == "least" else torch.rand_like(importance)
        index = evad_kernels.select_tokens(importance, num_select)
        rows = evad_kernels.gather_tokens(merge_heads(output), index, num_keyframe=num_keyframe)
        return Pruned(self.proj(rows), index, importance)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [B, H, N, D]: views of one product."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # a key's bias changes no softmax
        return split_heads(F.linear(x, self.qkv.weight, bias), self.num_heads)


class Pruned(NamedTuple):
    """Attention's result over kept tokens."""

    rows: Tensor  # [B, num_keyframe + num_select, C]
    index: Tensor  # [B, num_select], among non-keyframe tokens, ascending
    importance: Tensor  # [B, N - num_keyframe]


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*C] to query, key, value, views [B, H, N, D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(output: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, C], a view of what keyframe_attention returns."""
    return output.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Two linear layers with a GELU between them: [..., C] to [..., C]."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PruningBlock(Block):
    """A block with keyframe-centric token pruning between attention and MLP (Fig. 3)."""

    def forward(self, tokens: Tokens, num_select: int, config: EVADConfig) -> Tokens:
        """Tokens after the block: the keyframe's and ``num_select`` others, chosen as ``config`` says."""
        x, position, num_keyframe = tokens
        if num_select == position.shape[1] - num_keyframe:
            return tokens._replace(x=super().forward(x))
        first = num_keyframe + x.shape[1] - position.shape[1]  # rows that stay: a class token has no position
        rows, index, importance = self.attn.prune(
            self.norm1(x),
            num_keyframe=first,
            num_select=num_select,
            keyframe_weight=config.keyframe_weight,
            pruning=config.pruning,
        )
        if config.token_order == "importance":
            order = descending(importance.gather(1, index))
            index = index.gather(1, order)
            rows = evad_kernels.gather_tokens(rows, order, num_keyframe=first)
        x = evad_kernels.gather_tokens(x, index, num_keyframe=first) + self.drop_path(rows)
        position = evad_kernels.gather_tokens(position, index, num_keyframe=num_keyframe)
        return Tokens(x + self.drop_path(self.mlp(self.norm2(x))), position, num_keyframe)


def descending(importance: Tensor) -> Tensor:
    """Index [B, K] that sorts importance [B, K]: highest first, ties by index, NaN last (as select_tokens has them)."""
    return importance.nan_to_num(-math.inf, math.inf, -math.inf).argsort(dim=1, descending=True, stable=True)


class Encoded(NamedTuple):
    """What the encoder hands to the two branches."""

    tokens: Tokens  # normalised, for the decoder: the kept ones, or all
    grid: tuple[int, int, int]  # (T, Gh, Gw)
    keyframes: tuple[Tensor, ...]  # [B, C, Gh, Gw] after each of config.pyramid_blocks
    kept: tuple[Tensor, ...]  # position [B, K] after each pruning block

    def clip(self, number: int) -> Encoded:
        """One clip of the batch, as a batch of one."""
        x, position, num_keyframe = self.tokens
        tokens = Tokens(x[number, None], position[number, None], num_keyframe)
        return Encoded(tokens, self.grid, *(tuple(t[number, None] for t in ts) for ts in (self.keyframes, self.kept)))


def without_class_token(tokens: Tokens) -> Tokens:
    """The tokens that have a cell."""
    extra = tokens.x.shape[1] - tokens.position.shape[1]
    return tokens._replace(x=tokens.x[:, extra:]) if extra else tokens


def call(block: nn.Module, *args, recompute: bool):
    """``block(*args)``; with ``recompute`` its activations are not kept for the backward, but computed again."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class PatchEmbed(nn.Conv3d):
    """A convolution whose patches do not overlap, as one matrix product: in bfloat16 on a CPU seven times faster."""

    def forward(self, clips: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, width, t, h, w]."""
        for dim, side in zip((2, 4, 6), self.kernel_size, strict=True):
            clips = clips.unflatten(dim, (-1, side))
        patches = clips.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, t, h, w, C * kernel]
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class Encoder(nn.Module):
    """Clip to kept tokens and keyframe maps."""

    def __init__(self, config: EVADConfig) -> None:
        super().__init__()
        self.config = config
        self.keep_rate = config.keep_rate
        self.recompute = False
        num_frames = config.num_frames // config.tubelet_size
        patch = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embed = PatchEmbed(3, config.width, kernel_size=patch, stride=patch)
        self.position_table = PositionTable(num_frames, config.position_size, config.width)
        self.blocks = nn.ModuleList(
            (PruningBlock if number in config.pruning_blocks else Block)(
                config.width, config.num_heads, config.mlp_ratio, rate
            )
            for number, rate in enumerate(drop_path_rates(config.drop_path, config.depth))
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        if config.pruning == "class":
            self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, config.width))

    def forward(self, clips: Tensor) -> Encoded:
        """Encode normalised clips [B, 3, T, H, W], H and W multiples of the patch size."""
        tokens, grid = self.embed(clips)
        if self.config.pruning == "class":
            tokens = tokens._replace(x=torch.cat([self.class_token.expand(len(tokens.x), -1, -1), tokens.x], dim=1))
        keyframes, kept = [], []
        every = tokens  # each token as it was last seen
        for number, block in enumerate(self.blocks):
            if isinstance(block, PruningBlock):
                every = self.update(every, tokens)
                select = self.num_select(tokens.position.shape[1], tokens.num_keyframe)
                tokens = call(block, tokens, select, self.config, recompute=self.recompute)
                kept.append(tokens.position)
            else:
                tokens = tokens._replace(x=call(block, tokens.x, recompute=self.recompute))
            if number in self.config.pyramid_blocks:
                # Dense: of a slice, torch.compile and the convolution disagree whether it is channels-last.
                keyframes.append(self.keyframe(tokens, grid).clone(memory_format=torch.channels_last))
        tokens = without_class_token(self.update(every, tokens) if self.config.decoder_input == "all" else tokens)
        return Encoded(
            tokens._replace(x=self.norm(tokens.x)), grid, tuple(keyframes), tuple(kept) if self.keep_rate < 1 else ()
        )

    def keyframe(self, tokens: Tokens, grid: tuple[int, int, int]) -> Tensor:
        """The keyframe's tokens as a map [B, C, Gh, Gw]; 0 where one was dropped."""
        tokens = without_class_token(tokens)
        if self.config.keep_keyframe:
            return tokens.x[:, : tokens.num_keyframe].transpose(1, 2).unflatten(2, grid[1:])
        cells = evad_kernels.scatter_tokens(tokens.x, tokens.position, grid=grid)
        return cells[:, self.config.keyframe].permute(0, 3, 1, 2)

    def update(self, every: Tokens, tokens: Tokens) -> Tokens:
        """All tokens, with ``tokens`` as they are now; only where the decoder wants them."""
        if self.config.decoder_input == "kept":
            return every
        every, tokens = without_class_token(every), without_class_token(tokens)
        place = every.position.argsort(dim=1).gather(1, tokens.position)
        return every._replace(x=every.x.scatter(1, place[..., None].expand_as(tokens.x), tokens.x))

    def embed(self, clips: Tensor) -> tuple[Tokens, tuple[int, int, int]]:
        """Tokens of every tubelet, with their position codes, and the grid they come from."""
        x = self.patch_embed(clips)  # [B, C, T, Gh, Gw]
        B, _, T, Gh, Gw = x.shape
        x = x.flatten(2).transpose(1, 2) + self.position_table(Gh, Gw, self.patch_embed.weight.dtype)
        position = torch.arange(T * Gh * Gw, device=x.device).expand(B, -1)
        x, position = (keyframe_first(cells, self.config.keyframe, Gh * Gw) for cells in (x, position))
        return Tokens(x, position, Gh * Gw if self.config.keep_keyframe else 0), (T, Gh, Gw)

    def num_select(self, num_tokens: int, num_keyframe: int) -> int:
        """Non-keyframe tokens that a pruning block keeps: ceil(keep_rate * N) in all, the keyframe's first."""
        return max(math.ceil(self.keep_rate * num_tokens) - num_keyframe, 0)
