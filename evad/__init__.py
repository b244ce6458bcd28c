"""EVAD, an efficient video action detector: token pruning around the keyframe, on evad_kernels' ops."""

from .checkpoint import CheckpointError, LoadReport, load_checkpoint, read_config, released_names, save_checkpoint
from .config import EVADConfig
from .detector import EVAD, Detections, EVADOutput, select_detections
from .tokens import Tokens

__all__ = [
    "EVAD",
    "CheckpointError",
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
