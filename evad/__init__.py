"""EVAD, an efficient video action detector: token pruning around the keyframe, on evad_kernels' ops."""

from .checkpoint import CheckpointError, LoadReport, load_checkpoint, read_config, released_names, save_checkpoint
from .compiled import Compiled
from .config import EVADConfig
from .detector import EVAD, Detections, EVADOutput, select_detections
from .tokens import Tokens

__all__ = [
    "EVAD",
    "CheckpointError",
    "Compiled",
    "Detections",
    "EVADConfig",
    "EVADOutput",
    "LoadReport",
    "Tokens",
    "load_checkpoint",
    "read_config",
    "released_names",
    "save_checkpoint",
    "select_detections",
]
