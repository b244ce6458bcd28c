"""Datasets: each item is a ``Sample``, a clip with the boxes and actions in its keyframe.

``build`` makes one from a section of a configuration.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence

from torch.utils.data import Dataset

from ..config import EVADConfig
from ..problems import DataError
from .ava import read_ava, read_csv
from .clips import Clips
from .sample import Batch, Sample, collate
from .synthetic import Synthetic
from .tubes import read_tubes

__all__ = ["DATASETS", "SPLITS", "Batch", "Clips", "Sample", "Synthetic", "build", "collate"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "synthetic": Synthetic,
    "ava": read_ava,
    "csv": read_csv,
    "ucf101-24": read_tubes,
    "jhmdb": read_tubes,
}

SPLITS = ("train", "val", "test")  # and any other that is asked for by its name

_CLIP = ("num_frames", "frame_stride", "frame_rate", "pixel_mean", "pixel_std")  # a model's, wherever it is used


def build(section: Mapping, split: str, config: EVADConfig | None = None) -> Dataset:
    """Make a dataset.

    Args:
        section: ``{"name": one of DATASETS, ...}``: the rest are that dataset's options. A mapping under the name of a
            split (one of ``SPLITS``, or ``split`` itself) holds options of that split only:
            ``{"name": "synthetic", "val": {"clips": 400}}``.
        split: "train", "val", or what else the dataset has.
        config: The model's: its clip (number, stride and rate of frames, normalisation), and its short side where
            ``section`` says nothing.
    Raises:
        ValueError: an unknown name, option or split, a value that the dataset refuses, or another clip than the
            model's; the message names it.
    """
    options = split_options(section, split)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in DATASETS:
        raise DataError(f"data: name must be one of {', '.join(DATASETS)}, got {name!r}")
    known = _options(DATASETS[name])
    if unknown := [option for option in options if option not in known]:
        raise DataError(f"data: {unknown[0]!r} is no option of {name}, which has {', '.join(known)}")
    needed = [option for option, parameter in known.items() if parameter.default is parameter.empty]
    if absent := [option for option in needed if option not in options]:
        raise DataError(f"data: {name} needs the option {absent[0]!r}")
    options = {option: _checked(option, value, known[option].annotation) for option, value in options.items()}
    if config is not None:
        clip = {field: getattr(config, field) for field in _CLIP if field in known}
        for field, own in clip.items():
            if options.get(field, own) != own:
                raise DataError(f"data: {field} must be the model's {own}, got {options[field]}")
        options = {"short_side": config.short_side} | clip | options
    return DATASETS[name](split, **options)


def settings(section: Mapping, split: str, config: EVADConfig) -> dict:
    """What ``build`` makes of a section: the options that hold for a split, and what the others then are. Unchecked."""
    options = _of_split(section, split)
    name = options.get("name")
    known = _options(DATASETS[name]) if name in DATASETS else {}
    defaults = {key: parameter.default for key, parameter in known.items() if parameter.default is not parameter.empty}
    models = {field: getattr(config, field) for field in ("short_side", *_CLIP) if field in known}
    return defaults | models | options


def split_options(section: Mapping, split: str) -> dict:
    """The options of ``section`` that hold for a split.

    Raises:
        ValueError: options under a name that is no split's, or something else than options under the split's.
    """
    own = section.get(split, {})
    if not isinstance(own, Mapping):
        raise DataError(f"data: {split} must be options of that split, got {own!r}")
    splits = dict.fromkeys((*SPLITS, split))
    for name, value in section.items():
        if isinstance(value, Mapping) and name not in splits:
            raise DataError(f"data: options of one split must be under {', '.join(splits)}, got {name!r}: {value!r}")
    return _of_split(section, split)


def _of_split(section: Mapping, split: str) -> dict:
    return {key: value for key, value in section.items() if not isinstance(value, Mapping)} | section.get(split, {})


def _options(make: Callable[..., Dataset]) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(make).parameters)
    if parameters.pop("options", None):
        parameters = dict(inspect.signature(read_ava).parameters) | parameters
    del parameters["split"]
    return parameters


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole_numbers(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(map(_whole, value))


# How an option is annotated -> what its value must be, in words and as a test.
_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "str": ("text", lambda value: isinstance(value, (str, os.PathLike))),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", _whole),
    "float": ("a number", lambda value: (_whole(value) or isinstance(value, float)) and math.isfinite(value)),
    "Sequence[int]": ("a list of whole numbers", _whole_numbers),
    "tuple[int, int]": ("two whole numbers", lambda value: _whole_numbers(value) and len(value) == 2),
}
_PIXELS = (16, 4096)
_RANGES = {
    "clips": (1, math.inf),
    "every": (1, math.inf),
    "flip": (0, 1),
    "fps": (0.01, math.inf),
    "frame_rate": (0.01, math.inf),
    "frame_stride": (1, math.inf),
    "max_size": _PIXELS,
    "num_frames": (1, math.inf),
    "pixel_std": (1e-6, math.inf),
    "seed": (0, math.inf),
    "short_side": _PIXELS,
    "short_sides": _PIXELS,
    "size": _PIXELS,
}


def _checked(option: str, value: object, annotation: str) -> object:
    """The value of an option that is annotated so; a number that YAML took for text, such as 1e-3, as a number."""
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    expected, holds = _KINDS[kind]
    if kind == "float" and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    good = holds(value)
    if option in _RANGES:
        low, high = _RANGES[option]
        expected += f" of at least {low:g}" + f" and at most {high:g}" * (high < math.inf)
        good = good and all(low <= number <= high for number in (value if isinstance(value, Sequence) else [value]))
    if not good:
        raise DataError(f"data: {option} must be {expected}, got {value!r}")
    return value
