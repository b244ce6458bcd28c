"""Token pruning by attention importance, for vision transformers that exist already: patch, use, unpatch.

    vit = timm.create_model("vit_base_patch16_224")
    evad_kernels.patch.timm(vit, keep_rate=0.7)  # blocks 3, 6 and 9 each keep 70 % of their tokens
    evad_kernels.patch.unpatch(vit)

A pruning block computes attention for all of its tokens, keeps the protected ones and those that received the most
attention (``keyframe_attention_topk``), and runs its output projection, its MLP and every later block on these alone.
Protected tokens are the class token and registers of an image model, a keyframe, any set that is the same in the whole
batch. Importance is the attention that a token receives, averaged over heads and over all queries of the block;
``protected_weight`` is what a protected query counts in that mean: with a large one the class token alone decides.

Source: EVAD (Chen et al., ICCV 2023), section 3.2, where the protected tokens are the keyframe's. That a model is
patched in place and takes one number follows ToMe (Bolya et al., ICLR 2023).

Nothing is global and no activation stays on a module: a block hands ``KeptTokens`` to the next. Parameters, their
names and checkpoints remain what they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import gather_tokens, keyframe_attention_topk, scatter_tokens

Rates = float | Mapping[int, float]


class KeptTokens(NamedTuple):
    """What a patched block hands to the next."""

    x: Tensor  # [B, K, C]
    position: Tensor  # [B, K] int64: which of the model's N tokens each is
    num_tokens: int  # N


class PrunedRows(NamedTuple):
    """What a module patched by ``attention`` returns."""

    rows: Tensor  # [B, K, C]: the protected tokens' rows, then the selected ones', in order
    index: Tensor  # [B, K - protected] int64, counted from the first token that is not protected, ascending
    importance: Tensor  # [B, N - protected]


class Pruning(NamedTuple):
    """How a block prunes."""

    keep_rate: float  # share of the block's tokens that it keeps, protected ones included; 1 prunes nothing
    protected: int  # how many, after ``order``
    protected_weight: float
    num_tokens: int | None  # tokens of the model where ``order`` was given for as many
    is_first: bool  # takes a tensor
    is_last: bool  # gives a tensor
    restore: bool


def timm(
    vit: nn.Module,
    keep_rate: Rates = 0.7,
    *,
    blocks: Sequence[int] | None = None,
    protected: int | Tensor | None = None,
    protected_weight: float = 1.0,
    dropped: str = "drop",
    fill: Tensor | None = None,
) -> nn.Module:
    """Make a timm VisionTransformer prune its tokens.

    Args:
        vit: The model, changed in place. Its blocks are timm's pre-norm ``Block`` with plain ``Attention``.
        keep_rate: Share of its tokens that a pruning block keeps, in (0, 1], protected tokens included, rounded up to
            whole tokens; or ``{block: share}``. Never fewer than the protected tokens.
        blocks: Which blocks prune, counted from 0; None: those at a quarter, half and three quarters of the depth, or
            the keys of ``keep_rate``.
        protected: Tokens that are never dropped: a number of first tokens, or a mask [N] bool (True: protected), the
            same for the whole batch. None: class token and registers (``num_prefix_tokens``). Prefix tokens are always
            protected.
        protected_weight: What a protected query counts in the importance, at least 0; other queries count 1.
        dropped: "drop": the model's last blocks, its norm and its head see kept tokens only, in the model's order
            behind the protected ones. "restore": after the last block every token is back at its place, dropped ones
            holding ``fill``. The outputs of blocks between (``forward_intermediates``) are not served.
        fill: [C], what a restored token holds; None: zeros.
    Returns:
        ``vit``. Where no block drops a token, its outputs are those of the model unpatched, bit for bit.
    Raises:
        ValueError: a number is out of range, or the model cannot be served; the message says why.
        TypeError: ``vit`` has no ``blocks``.
    """
    return _patch(
        "timm",
        vit,
        getattr(vit, "blocks", None),
        _TIMM,
        getattr(vit, "num_prefix_tokens", 0),
        keep_rate,
        blocks,
        protected,
        protected_weight,
        dropped,
        fill,
    )


def transformers(
    model: nn.Module,
    keep_rate: Rates = 0.7,
    *,
    blocks: Sequence[int] | None = None,
    protected: int | Tensor | None = None,
    protected_weight: float = 1.0,
    dropped: str = "drop",
    fill: Tensor | None = None,
) -> nn.Module:
    """Make a ViT or VideoMAE of Hugging Face transformers (5 or later) prune its tokens.

    Served are ViT, DeiT, ViTMAE, ViTMSN, I-JEPA, ViViT, DINOv2 (also with registers) and VideoMAE.

    A block that drops nothing runs as it did, through the attention interface of transformers, with whatever
    ``set_attn_implementation`` chose. That interface wants as many rows back as it gave, so a block that drops tokens
    calls the layer's own projections and the kernel.

    Args:
        model: The model, bare or inside a task model (``ViTForImageClassification``), changed in place.
        protected: As in ``timm``. None: class token, distillation token and registers; for a VideoMAE the middle slice
            of the clip, EVAD's keyframe, whose tokens move to the front as soon as any are dropped (the model's mean
            over tokens does not see their order).
        keep_rate, blocks, protected_weight, dropped, fill: As in ``timm``.
    Returns:
        ``model``. Where no block drops a token, its outputs are those of the model unpatched, bit for bit.
    Raises:
        ValueError: a number is out of range, or the model cannot be served; the message says why.
        TypeError: no layers of a ViT or VideoMAE are found.
    """
    for module in model.modules():
        layers = getattr(module, "layers", None) or getattr(module, "layer", None)
        if isinstance(layers, nn.ModuleList) and len(layers) and type(layers[0]).__name__ in _TRANSFORMERS:
            break
    else:
        raise TypeError(f"patch.transformers: model must have one of {list(_TRANSFORMERS)}, got {type(model).__name__}")
    name = type(layers[0]).__name__
    # A class token; a DeiT has a distillation token too.
    prefix = {"VideoMAELayer": 0, "IJepaLayer": 0, "DeiTLayer": 2}.get(name, 1)
    if name == "Dinov2WithRegistersLayer":
        prefix += model.config.num_register_tokens
    if protected is None and name == "VideoMAELayer":
        protected = _middle_slice(model.config)
    if dropped == "drop" and hasattr(model, "decoder"):
        raise ValueError(
            f"patch.transformers: dropped must be 'restore' for {type(model).__name__}, whose decoder "
            f"wants every token, got {dropped!r}"
        )
    rates = _rates("transformers", keep_rate, blocks, len(layers))
    first = min((block for block, rate in rates.items() if rate < 1), default=len(layers))
    for module in model.modules():  # a backbone gives out features of blocks; 0 is what enters the first
        stages = getattr(module, "out_indices", None) or ()
        if any(first < stage < len(layers) or (first < stage and dropped == "drop") for stage in stages):
            raise ValueError(
                f"patch.transformers: out_indices of {type(module).__name__} must be at most {first}, the first block "
                f"that prunes, or {len(layers)} with dropped='restore', got {list(stages)} and {dropped!r}"
            )
    return _patch(
        "transformers",
        model,
        layers,
        _TRANSFORMERS,
        prefix,
        keep_rate,
        blocks,
        protected,
        protected_weight,
        dropped,
        fill,
    )


def attention(
    module: nn.Module, keep_rate: float = 0.7, *, protected: int = 1, protected_weight: float = 1.0
) -> nn.Module:
    """Make an attention module of one's own return kept rows only.

    For a block that one writes oneself: the residual follows by ``gather_tokens(x, index, num_keyframe=protected)``.

    Args:
        module: Has ``qkv`` (a map from C to 3 * H * D), ``proj`` and ``num_heads``, and computes nothing else: a copy
            is tried on a few tokens, in training mode, so that a dropout shows. Changed in place: ``module(x)``, x
            [B, N, C], then returns ``PrunedRows``.
        keep_rate: Share of the tokens that are kept, in (0, 1], protected ones included.
        protected: How many of the first tokens are never dropped.
        protected_weight: What a protected query counts in the importance, at least 0; other queries count 1.
    Returns:
        ``module``.
    Raises:
        ValueError: a number is out of range, or the module cannot be served; the message says why.
    """
    if isinstance(module, _Patched):
        raise ValueError("patch.attention: module must not be patched already: unpatch it first")
    _require("attention", module, ("qkv", "proj", "num_heads"))
    _require_plain_attention("attention", module)
    _check_rate("attention", keep_rate)
    _check_weight("attention", protected_weight)
    if not isinstance(protected, int) or isinstance(protected, bool) or protected < 0:
        raise ValueError(f"patch.attention: protected must be an integer, at least 0, got {protected!r}")
    _try_attention(module)
    _become(module, _Attention, Pruning(keep_rate, protected, protected_weight, None, False, False, False))
    return module


def unpatch(model: nn.Module) -> nn.Module:
    """Take every patch off again: the model is, bit for bit, what it was.

    Returns:
        ``model``; one that was never patched is left as it is.
    """
    for module in model.modules():
        if isinstance(module, _Patched):
            module.__class__ = module.original
            del module.pruning
            module.__dict__.pop("records", None)
            for buffer in ("_order", "_fill"):
                module._buffers.pop(buffer, None)
                module._non_persistent_buffers_set.discard(buffer)
    return model


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[Tensor]]:
    """Note which tokens survive.

        with evad_kernels.patch.record(vit) as kept:
            vit(images)
        kept[-1]  # which of the model's tokens are left after the last pruning block

    Yields:
        A list to which every call of the model adds, for each block that drops tokens, the positions of those that
        are left, [B, K] int64, protected first. ``kept[-1]`` tells where the rows of the model's last hidden state
        came from, where they were not restored.
    """
    kept: list[Tensor] = []
    blocks = [module for module in model.modules() if isinstance(module, _Block)]
    for block in blocks:
        block.records = (*block.records, kept)
    try:
        yield kept
    finally:
        for block in blocks:
            block.records = tuple(record for record in block.records if record is not kept)


class _Patched:
    """Mixed into the class of a patched module; ``pruning`` says how it prunes."""

    original: type  # the class it had before
    family: type
    pruning: Pruning

    def __reduce__(self):
        # A class made here has no name to import it by: deepcopy and pickle rebuild it.
        return _empty, (self.family, self.original), self.__dict__

    def keep(self, N: int) -> int:
        return max(math.ceil(self.pruning.keep_rate * N), self.pruning.protected)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> PrunedRows:
        protected = self.pruning.protected
        output, index, importance = keyframe_attention_topk(
            query,
            key,
            value,
            num_keyframe=protected,
            num_select=self.keep(query.shape[2]) - protected,
            keyframe_weight=self.pruning.protected_weight,
            scale=scale,
        )
        return PrunedRows(output.transpose(1, 2).flatten(2), index, importance)


class _Attention(_Patched):
    """A module with ``qkv``, ``proj`` and ``num_heads``."""

    def forward(self, x: Tensor) -> PrunedRows:
        if self.pruning.protected > x.shape[1]:
            raise ValueError(f"patch: tokens must be at least protected = {self.pruning.protected}, got {x.shape[1]}")
        heads = _split_heads(self.qkv(x), self.num_heads)
        rows, index, importance = self.attend(*heads, getattr(self, "scale", None))
        return PrunedRows(self.proj(rows), index, importance)


class _Block(_Patched):
    """A pre-norm block, x + branch(attention(heads(x))), then ``rest``; tokens are dropped between the two."""

    attention_name: str | None = None  # the class of the only attention that is served; None: the block has one kind
    _order: Tensor | None  # [N] int64: the model's tokens with the protected ones first; None: as they are
    _fill: Tensor | None  # [C]
    records: tuple[list[Tensor], ...] = ()  # lists that ``record`` yielded and that are still open

    def forward(self, x: Tensor | KeptTokens, *args, **kwargs) -> Tensor | KeptTokens:
        _require_no_mask(*args, **kwargs)
        tokens = self._enter(x) if self.pruning.is_first else x
        if not isinstance(tokens, KeptTokens):
            raise TypeError(
                f"patch: input must be the KeptTokens of the block before, got {type(x).__name__}: call the model as a "
                "whole, and checkpoint with use_reentrant=False"
            )
        N = tokens.x.shape[1]
        if self.keep(N) < N:
            tokens = self._prune(tokens)
        else:
            tokens = tokens._replace(x=self.original.forward(self, tokens.x, *args, **kwargs))
        return self._leave(tokens) if self.pruning.is_last else tokens

    def _enter(self, x: Tensor) -> KeptTokens:
        B, N, _ = x.shape
        expected = self.pruning.num_tokens
        if expected not in (None, N):
            raise ValueError(f"patch: the model's tokens must be {expected}, as protected has, got {N}")
        if self.pruning.protected > N:
            raise ValueError(
                f"patch: the model's tokens must be at least the protected {self.pruning.protected}, got {N}"
            )
        return KeptTokens(x, torch.arange(N, device=x.device).expand(B, N), N)

    def _prune(self, tokens: KeptTokens) -> KeptTokens:
        if self._order is not None and tokens.x.shape[1] == tokens.num_tokens:  # the first that are dropped
            tokens = tokens._replace(x=tokens.x[:, self._order], position=tokens.position[:, self._order])
        rows, index, _ = self.attend(*self.heads(tokens.x))
        x, position = (gather_tokens(t, index, num_keyframe=self.pruning.protected) for t in tokens[:2])
        for record in self.records:
            record.append(position)
        return tokens._replace(x=self.rest(x + self.branch(rows)), position=position)

    def _leave(self, tokens: KeptTokens) -> Tensor:
        if not self.pruning.restore:
            return tokens.x
        fill = None if self._fill is None else self._fill.to(tokens.x.dtype)
        return scatter_tokens(tokens.x, tokens.position, grid=(1, 1, tokens.num_tokens), fill=fill)[:, 0, 0]


def _require_no_mask(*args, is_causal: bool = False, **kwargs) -> None:
    """No mask, or one that masks nothing: transformers makes such a one where it is exported."""
    message = "patch: attention masks are not served: call the model without one, or unpatch it"
    if is_causal:
        raise ValueError(message)
    for mask in (*args, *kwargs.values()):
        if isinstance(mask, Tensor):
            masks_nothing = (mask == 0 if mask.is_floating_point() else mask).all()
            if torch.compiler.is_compiling():
                torch._assert_async(masks_nothing, message)
            elif not masks_nothing:
                raise ValueError(message)


class _TimmBlock(_Block):
    attention_name = "Attention"  # others compute something else from the same parts
    needs = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attention_needs = ("qkv", "num_heads", "scale", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")

    @staticmethod
    def attention_of(block):
        return block.attn

    def heads(self, x):
        attn = self.attn
        query, key, value = _split_heads(attn.qkv(self.norm1(x)), attn.num_heads)
        return attn.q_norm(query).to(value.dtype), attn.k_norm(key).to(value.dtype), value, attn.scale

    def branch(self, rows):
        norm = getattr(self.attn, "norm", None)  # none before timm 1.0
        rows = self.attn.proj_drop(self.attn.proj(rows if norm is None else norm(rows)))
        return self.drop_path1(self.ls1(rows))

    def rest(self, x):
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class _ViTLayer(_Block):
    needs = ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout")
    attention_needs = ("q_proj", "k_proj", "v_proj", "o_proj", "num_attention_heads", "scaling")

    @staticmethod
    def attention_of(layer):
        return layer.attention

    def heads(self, x):
        return _project(self.attention, self.layernorm_before(x), ("q_proj", "k_proj", "v_proj"))

    def branch(self, rows):
        return self.dropout(self.attention.o_proj(rows))

    def rest(self, x):
        return x + self.dropout(self.mlp(self.layernorm_after(x)))


class _Dinov2Layer(_Block):
    needs = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
    attention_needs = _ViTLayer.attention_needs
    attention_of = _ViTLayer.attention_of

    def heads(self, x):
        return _project(self.attention, self.norm1(x), ("q_proj", "k_proj", "v_proj"))

    def branch(self, rows):
        return self.drop_path(self.layer_scale1(self.attention.o_proj(rows)))

    def rest(self, x):
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class _VideoMAELayer(_Block):
    needs = ("layernorm_before", "attention", "layernorm_after", "intermediate", "output")
    attention_needs = ("query", "key", "value", "num_attention_heads", "scaling")

    @staticmethod
    def attention_of(layer):
        return layer.attention.attention

    def heads(self, x):
        return _project(self.attention.attention, self.layernorm_before(x), ("query", "key", "value"))

    def branch(self, rows):
        return self.attention.output(rows, None)

    def rest(self, x):
        return self.output(self.intermediate(self.layernorm_after(x)), x)


_TIMM = {"Block": _TimmBlock}
_TRANSFORMERS = {
    **dict.fromkeys(("ViTLayer", "DeiTLayer", "ViTMAELayer", "ViTMSNLayer", "IJepaLayer", "VivitLayer"), _ViTLayer),
    **dict.fromkeys(("Dinov2Layer", "Dinov2WithRegistersLayer"), _Dinov2Layer),
    "VideoMAELayer": _VideoMAELayer,
}


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3*H*D] to query, key, value, views [B, H, N, D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _project(attention: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Query, key, value of x [B, N, C], views [B, H, N, D], by the projections of these names; and the scale."""
    projected = (getattr(attention, name)(x) for name in names)
    return (
        *(p.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2) for p in projected),
        attention.scaling,
    )


# Patching.


def _patch(
    family, model, layers, served, prefix, keep_rate, blocks, protected, protected_weight, dropped, fill
) -> nn.Module:
    """What ``timm`` and ``transformers`` share; nothing is changed before everything is checked."""
    if not isinstance(layers, (nn.Sequential, nn.ModuleList)) or len(layers) == 0:
        raise TypeError(f"patch.{family}: model must have a list of blocks, got {type(model).__name__} with none")
    depth = len(layers)
    rates = _rates(family, keep_rate, blocks, depth)
    _check_weight(family, protected_weight)
    order, num_protected = _protected(family, protected, prefix)
    if dropped not in ("drop", "restore"):
        raise ValueError(f"patch.{family}: dropped must be 'drop' or 'restore', got {dropped!r}")
    first = min(rates)
    for layer in layers[first:]:
        if isinstance(layer, _Patched):
            raise ValueError(f"patch.{family}: model must not be patched already: unpatch it first")
        if type(layer).__name__ not in served:
            raise ValueError(f"patch.{family}: blocks must be of {sorted(served)}, got {type(layer).__qualname__}")
        mixin = served[type(layer).__name__]
        _require(family, layer, mixin.needs)
        if hasattr(layer, "window_size"):
            raise ValueError(f"patch.{family}: blocks must take tokens [B, N, C], got one that attends in windows")
        attention = mixin.attention_of(layer)
        if mixin.attention_name not in (None, type(attention).__name__):
            raise ValueError(
                f"patch.{family}: attention must be plain {mixin.attention_name}, got {type(attention).__name__}"
            )
        _require(family, attention, mixin.attention_needs)
        _require_plain_attention(family, attention)
    width = next(layers[first].parameters()).shape[-1]
    if fill is not None and (dropped == "drop" or list(fill.shape) != [width]):
        got = f"{list(fill.shape)} and {dropped!r}"
        raise ValueError(f"patch.{family}: fill must be [C] = [{width}] with dropped='restore', got {got}")
    for number, layer in enumerate(layers[first:], first):
        mixin = served[type(layer).__name__]
        pruning = Pruning(
            rates.get(number, 1.0),
            num_protected,
            float(protected_weight),
            None if order is None else len(order),
            number == first,
            number == depth - 1,
            dropped == "restore",
        )
        _become(layer, mixin, pruning)
        device = next(layer.parameters()).device
        for name, tensor in (("_order", order), ("_fill", fill)):
            tensor = None if tensor is None else tensor.detach().to(device)
            layer.register_buffer(name, tensor, persistent=False)
    return model


@functools.cache
def _patched(family: type, original: type) -> type:
    """The class of a patched ``original``."""
    return type(f"Pruned{original.__name__}", (family, original), {"original": original, "family": family})


def _become(module: nn.Module, family: type, pruning: Pruning) -> None:
    module.__class__ = _patched(family, type(module))
    module.pruning = pruning


def _empty(family: type, original: type) -> nn.Module:
    cls = _patched(family, original)
    return cls.__new__(cls)


def _rates(family, keep_rate, blocks, depth) -> dict[int, float]:
    if isinstance(keep_rate, Mapping):
        if blocks is not None:
            raise ValueError(f"patch.{family}: blocks must be None where keep_rate names them, got {blocks!r}")
        rates = dict(keep_rate)
    else:
        if blocks is None:
            blocks = sorted({depth // 4, depth // 2, 3 * depth // 4})
        rates = dict.fromkeys(blocks, keep_rate)
    for number, rate in rates.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < depth:
            raise ValueError(f"patch.{family}: blocks must be integers in [0, {depth}), got {number!r}")
        _check_rate(family, rate)
    if not rates:
        raise ValueError(f"patch.{family}: blocks must be at least one, got none")
    return rates


def _protected(family, protected, prefix) -> tuple[Tensor | None, int]:
    """The order that brings protected tokens to the front (None: they are there) and how many they are."""
    if protected is None:
        return None, prefix
    if isinstance(protected, Tensor):
        if protected.ndim != 1 or protected.dtype != torch.bool:
            raise ValueError(
                f"patch.{family}: protected must be a number of tokens or a mask [N] bool, "
                f"got {list(protected.shape)} {protected.dtype}"
            )
        mask = protected.detach().cpu().clone()
        mask[:prefix] = True
        return torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]]), int(mask.sum())
    if not isinstance(protected, int) or isinstance(protected, bool) or protected < 0:
        raise ValueError(f"patch.{family}: protected must be a number of tokens or a mask [N] bool, got {protected!r}")
    return None, max(protected, prefix)


def _middle_slice(config) -> Tensor:
    """Mask of the tokens of a VideoMAE clip's middle slice, EVAD's keyframe."""
    pair = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
    patch = config.patch_size if isinstance(config.patch_size, Sequence) else (config.patch_size,) * 2
    cells = (pair[0] // patch[0]) * (pair[1] // patch[1])
    slices = config.num_frames // config.tubelet_size
    return (torch.arange(slices * cells) // cells) == slices // 2


def _require(family, module, names) -> None:
    for name in names:
        if not hasattr(module, name):
            raise ValueError(f"patch.{family}: {type(module).__name__} must have {name!r}, got one without")


def _require_plain_attention(family, attention) -> None:
    rate = getattr(attention, "attn_drop", None)  # a module here, a number in transformers
    rate = getattr(rate, "p", getattr(attention, "attention_dropout", getattr(attention, "dropout_prob", 0.0)))
    if rate:
        raise ValueError(f"patch.{family}: attention dropout must be 0 (it would drop entries of the map), got {rate}")
    for name in ("gate", "rel_pos", "relative_position_bias_table", "rope"):
        if getattr(attention, name, None) is not None:
            raise ValueError(f"patch.{family}: attention must be plain softmax(q k) v, got one with {name!r}")


def _try_attention(module) -> None:
    """What the patch computes is what the module computes, where nothing is pruned."""
    width, parameter = getattr(module.qkv, "in_features", None), next(module.parameters(), None)
    if type(module).forward is nn.Module.forward or width is None or parameter is None or parameter.is_meta:
        return  # nothing to compare
    twin = copy.deepcopy(module).train()
    x = torch.randn(2, 16, width, generator=torch.Generator().manual_seed(0)).to(parameter)
    with torch.no_grad(), torch.random.fork_rng():
        want = twin(x)
        _become(twin, _Attention, Pruning(1.0, 0, 1.0, None, False, False, False))
        got = twin(x).rows
    if not isinstance(want, Tensor) or want.shape != got.shape or (got - want).abs().max() > 0.02 * want.abs().max():
        raise ValueError(
            "patch.attention: module must compute proj(softmax(scale q k) v) of its qkv and nothing else, "
            f"got {type(module).__name__}, whose results differ"
        )


def _check_rate(family, rate) -> None:
    if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate <= 1:
        raise ValueError(f"patch.{family}: keep_rate must be in (0, 1], got {rate!r}")


def _check_weight(family, weight) -> None:
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < math.inf:
        raise ValueError(f"patch.{family}: protected_weight must be a finite number, at least 0, got {weight!r}")
