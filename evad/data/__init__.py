"""Datasets: each item is a ``Sample``, a clip with the boxes and actions in its keyframe.

``build`` makes one from a section of a configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch.utils.data import Dataset

from ..config import EVADConfig
from .ava import read_ava, read_csv
from .clips import Clips
from .sample import Batch, Sample, collate
from .synthetic import Synthetic
from .tubes import read_tubes

__all__ = ["DATASETS", "Batch", "Clips", "Sample", "Synthetic", "build", "collate"]

DATASETS: dict[str, Callable[..., Dataset]] = {
    "synthetic": Synthetic,
    "ava": read_ava,
    "csv": read_csv,
    "ucf101-24": read_tubes,
    "jhmdb": read_tubes,
}

_CLIP = ("num_frames", "frame_stride", "short_side", "pixel_mean", "pixel_std")  # a model's needs


def build(section: Mapping, split: str, config: EVADConfig | None = None) -> Dataset:
    """Make a dataset.

    Args:
        section: ``{"name": one of DATASETS, ...}``: the rest are that dataset's options. A mapping under the name of a
            split holds options of that split only: ``{"name": "synthetic", "val": {"clips": 400}}``.
        split: "train", "val", or what else the dataset has.
        config: The model's: its number of frames, stride, short side and normalisation, where ``section`` says nothing.
    Raises:
        ValueError: an unknown name or option, or a value that the dataset refuses; the message names it.
    """
    options = {key: value for key, value in section.items() if not isinstance(value, Mapping)}
    options |= section.get(split, {})
    name = options.pop("name", None)
    if name not in DATASETS:
        raise ValueError(f"data: name must be one of {', '.join(DATASETS)}, got {name!r}")
    known = _options(DATASETS[name])
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"data: {unknown[0]!r} is no option of {name}, which has {', '.join(known)}")
    if absent := [option for option, needed in known.items() if needed and option not in options]:
        raise ValueError(f"data: {name} needs the option {absent[0]!r}")
    if config is not None:
        options = {field: getattr(config, field) for field in _CLIP} | options
    return DATASETS[name](split, **options)


def _options(make: Callable[..., Dataset]) -> dict[str, bool]:
    """Options of a dataset, and whether each must be given."""
    parameters = dict(inspect.signature(make).parameters)
    if parameters.pop("options", None):
        parameters = dict(inspect.signature(read_ava).parameters) | parameters
    del parameters["split"]
    return {name: parameter.default is parameter.empty for name, parameter in parameters.items()}
