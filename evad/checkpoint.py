"""Weights in and out of files: our own, the released EVAD's, VideoMAE's, Hugging Face's.

Every foreign key is translated to the released EVAD's name, and that to ours. Nothing is loaded in silence: what a file
lacks and what it has beyond the model is reported, and a tensor of another shape is an error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .config import EVADConfig
from .detector import EVAD


class CheckpointError(ValueError):
    """A file that cannot be read, or holds another model."""


class NoConfigError(CheckpointError):
    """The file says nothing of the model that it is for."""


class LoadReport(NamedTuple):
    """What ``load_checkpoint`` did."""

    loaded: tuple[str, ...]  # our parameter names
    missing: tuple[str, ...]  # our parameter names that the file does not have; they keep their values
    unexpected: tuple[str, ...]  # keys of the file that the model does not have

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} of {len(self.loaded) + len(self.missing)} parameters loaded"]
        for label, names in (("not in the file", self.missing), ("not in the model", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {label}: {_abridged(names)}")
        return "; ".join(lines)


def save_checkpoint(model: EVAD, path: str | Path, labels: Sequence[str] = ()) -> None:
    """Write a safetensors file for ``load_checkpoint``, ``read_config`` and ``read_labels``.

    Args:
        model: The detector; its weights keep their dtype, and its configuration is written beside them.
        path: The file; one that is there is replaced.
        labels: Names of the classes, in order; none may be given.
    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    write_weights(model.state_dict(), model.config, path, labels)


def write_weights(
    weights: Mapping[str, Tensor], config: EVADConfig, path: str | Path, labels: Sequence[str] = ()
) -> None:
    """``save_checkpoint`` of a state dictionary."""
    from safetensors.torch import save_file

    weights = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    about = {"config": dataclasses.asdict(config), "labels": list(labels)}
    save_file(weights, path, metadata={"evad": json.dumps(about)})  # one entry: safetensors shuffles several


def read_config(path: str | Path) -> EVADConfig:
    """The configuration that a file of ``save_checkpoint`` carries.

    Raises:
        NoConfigError: the file carries no configuration.
        CheckpointError: the file cannot be read, or its configuration is another version's.
    """
    about = _about(Path(path))
    if about is None:
        raise NoConfigError(f"{path} carries no EVAD configuration: it is not a file of save_checkpoint")
    try:
        return EVADConfig(**about["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} carries a configuration of another version: {error}") from error


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The names of the classes that a file of ``save_checkpoint`` carries; empty where it carries none."""
    about = _about(Path(path))
    return () if about is None else tuple(about["labels"])


@torch.no_grad()
def load_checkpoint(model: EVAD, path: str | Path) -> LoadReport:
    """Load weights into ``model``; a warning and the report tell what was not in the file or not in the model.

    Args:
        model: The detector; its parameters keep their dtype and device.
        path: A file of ``save_checkpoint``, a released EVAD checkpoint, a VideoMAE v1 or v2 checkpoint (pre-trained or
            fine-tuned), a folder of Hugging Face's VideoMAE, or one of ``evad train``. Pickles are read with
            ``weights_only=True``.
    Returns:
        ``LoadReport``.
    Raises:
        CheckpointError: the file cannot be read, nothing in it fits, or a tensor has another shape (then nothing has
            been loaded).
        FileNotFoundError: no such file.
    """
    path = Path(path)
    weights = _read(path)
    parameters = dict(model.named_parameters())
    ours = {released: name for name, released in released_names(model).items()}
    found, unexpected = {}, []
    for key, tensor in weights.items():
        name = key if key in parameters else ours.get(_VIDEOMAE_PREFIX.sub(_without_prefix, key))
        if name is not None:
            found[name] = key
        elif not _is_loss_constant(key, tensor, model.config):
            unexpected.append(key)
    if not found:
        raise CheckpointError(f"{path} has no parameter of EVAD; its keys: {_abridged(weights)}")
    for name, key in found.items():
        if weights[key].shape != parameters[name].shape:
            raise CheckpointError(
                f"{path} is a checkpoint of another model: {key} is {list(weights[key].shape)} in the file, "
                f"{list(parameters[name].shape)} in the model"
            )
    for name, key in found.items():
        parameters[name].copy_(weights[key])
    missing = [name for name in parameters if name not in found]
    report = LoadReport(tuple(found), tuple(missing), tuple(unexpected))
    if missing or unexpected:
        warnings.warn(f"{path}: {report}", stacklevel=2)
    released = any(key.startswith("det_head.s0_headseries.") for key in weights)
    if released and model.config.token_order != "importance" and model.config.keep_rate < 1:
        warnings.warn(
            f"{path} has the released code's names, whose weights were trained with token_order='importance'; this "
            f"model has token_order={model.config.token_order!r} and classifies from tokens in other cells",
            stacklevel=2,
        )
    return report


# Our name -> the released key, by pattern; the first that matches.
_RELEASED = [
    (r"encoder\.patch_embed\.", "patch_embed.proj."),
    (r"encoder\.", ""),
    (r"pyramid\.lateral\.(\d)", lambda match: f"fpn_lateral{int(match[1]) + 2}"),
    (r"pyramid\.output\.(\d)", lambda match: f"fpn_output{int(match[1]) + 2}"),
    (r"localization\.proposal_(boxes|features)", r"init_proposal_\1.weight"),
    (r"localization\.stages\.(\d+)\.attn\.qkv\.", r"det_head.s0_headseries.\1.self_attn.in_proj_"),
    (r"localization\.stages\.(\d+)\.attn\.proj\.", r"det_head.s0_headseries.\1.self_attn.out_proj."),
    (r"localization\.stages\.(\d+)\.interaction\.weights\.", r"det_head.s0_headseries.\1.inst_interact.dynamic_layer."),
    (r"localization\.stages\.(\d+)\.interaction\.out\.", r"det_head.s0_headseries.\1.inst_interact.out_layer."),
    (r"localization\.stages\.(\d+)\.interaction\.", r"det_head.s0_headseries.\1.inst_interact."),
    (r"localization\.stages\.(\d+)\.fc", r"det_head.s0_headseries.\1.linear"),
    (r"localization\.stages\.(\d+)\.score_tower\.", r"det_head.s0_headseries.\1.cls_module."),
    (r"localization\.stages\.(\d+)\.box_tower\.", r"det_head.s0_headseries.\1.reg_module."),
    (r"localization\.stages\.(\d+)\.score\.", r"det_head.s0_headseries.\1.class_logits."),
    (r"localization\.stages\.(\d+)\.box\.", r"det_head.s0_headseries.\1.bboxes_delta."),
    (r"localization\.stages\.", "det_head.s0_headseries."),
    (r"decoder\.project\.", "det_head.encoder_to_decoder."),
    (r"decoder\.mask_token", "det_head.mask_token"),
    (r"decoder\.classifiers\.(\d+)\.3\.", r"det_head.decoder.blocks.\1.action_logits."),
    (r"decoder\.classifiers\.(\d+)\.", r"det_head.decoder.blocks.\1.act_module."),
    (r"decoder\.blocks\.", "det_head.decoder.blocks."),
]


def released_names(model: EVAD) -> dict[str, str]:
    """How released EVAD checkpoints call the parameters.

    Returns:
        Their key for each name of ``model.named_parameters()``, in that order; no key comes twice.
    """
    return {name: _rename(name, _RELEASED) for name, _ in model.named_parameters()}


def _rename(name: str, patterns: list) -> str:
    for pattern, replacement in patterns:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    return name


# Hugging Face's VideoMAE key (without "videomae.") -> VideoMAE's.
_HUGGING_FACE = [
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
]
_HUGGING_FACE_BLOCK = [
    (r"attention\.attention\.([qv]_bias)", r"attn.\1"),
    (r"attention\.attention\.query\.bias", "attn.q_bias"),
    (r"attention\.attention\.value\.bias", "attn.v_bias"),
    (r"attention\.attention\.qkv\.", "attn.qkv."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
]
_HUGGING_FACE_LAYER = re.compile(r"(?:(decoder)\.decoder_layers|encoder\.layer)\.(\d+)\.(.*)")


# Pre-training files put the encoder under "encoder." (v1) or "backbone."; their decoder continues in EVAD's decoder.
_VIDEOMAE_PREFIX = re.compile(r"^(backbone\.|encoder\.|(?=decoder\.|encoder_to_decoder\.))")


def _without_prefix(match: re.Match) -> str:
    return "" if match[0] else "det_head."


def _from_hugging_face(weights: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Hugging Face's VideoMAE keys as VideoMAE's, with query, key and value in one matrix."""
    weights = {key.removeprefix("videomae."): tensor for key, tensor in weights.items()}
    for key in list(weights):
        if key.endswith("attention.attention.query.weight"):
            parts = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if all(part in weights for part in parts):
                weights[key.replace(".query.", ".qkv.")] = torch.cat([weights.pop(part) for part in parts])
    for key, tensor in weights.items():
        layer = _HUGGING_FACE_LAYER.fullmatch(key)
        if layer is None:
            yield _rename(key, _HUGGING_FACE), tensor
        # A key's bias adds the same to a whole row of logits: the softmax, and so the model, is the same without it.
        elif layer[3] != "attention.attention.key.bias":
            prefix = "decoder.blocks" if layer[1] else "blocks"
            yield f"{prefix}.{layer[2]}.{_rename(layer[3], _HUGGING_FACE_BLOCK)}", tensor


def _is_loss_constant(key: str, tensor: Tensor, config: EVADConfig) -> bool:
    """The released loss keeps its class weights in the checkpoint; ours are in the config: the same, or unexpected."""
    expected = torch.tensor([1.0, config.background_weight])
    return key == "criterion.empty_weight" and tensor.shape == (2,) and torch.allclose(tensor.float(), expected)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder; Hugging Face's keys as VideoMAE's, all others as they are."""
    weights = _read_file(_file(path))
    for wrapper in ("module.", "_orig_mod."):  # of DDP; of torch.compile, in files of VideoMAE v2
        if all(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): tensor for key, tensor in weights.items()}
    if any(".attention.attention." in key for key in weights):
        weights = dict(_from_hugging_face(weights))
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    if _is_safetensors(path):
        return _read_safetensors(path)
    # VideoMAE's files hold their command line's argparse.Namespace, plain data.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            held = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # the rest is advice to trust the file
            what = f" ({held[1]})" if held else ""
            raise CheckpointError(f"{path} is broken, or holds more than weights{what} and is not trusted") from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a checkpoint, or is truncated: {error}") from error
    for name in ("model", "module", "model_state", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    tensors = content.items() if isinstance(content, Mapping) else ()
    weights = {key: tensor for key, tensor in tensors if isinstance(key, str) and isinstance(tensor, Tensor)}
    if not weights:
        raise CheckpointError(f"{path} holds no named tensors")
    return weights


def _file(path: Path) -> Path:
    """The file itself, or what a folder has: of Hugging Face, of a run or of one of its checkpoints."""
    ours = path / "model.safetensors"
    if path.is_dir() and not (path / "config.json").exists() and ours.is_file():
        return ours
    return _hugging_face_file(path) if path.is_dir() else path


def _hugging_face_file(folder: Path) -> Path:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no model.safetensors of a run, nor is it a Hugging Face model folder: config.json: {error}"
        ) from error
    if config.get("model_type") != "videomae":
        raise CheckpointError(
            f"{folder} is a checkpoint of another model: {config.get('model_type')!r}, not 'videomae'"
        )
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of header length, then a JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _open_safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _about(path: Path) -> dict | None:
    """What a file of save_checkpoint says of itself; None of another file."""
    path = _file(path)
    if not _is_safetensors(path):
        return None
    with _open_safetensors(path) as file:
        text = (file.metadata() or {}).get("evad")
    return None if text is None else json.loads(text)


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is truncated: {error}") from error


def _abridged(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
