"""EVAD, an efficient video action detector: token pruning around the keyframe, on evad_kernels' operators."""

from .config import EVADConfig
from .detector import EVAD, Detections, EVADOutput, select_detections
from .tokens import Tokens

__all__ = ["EVAD", "Detections", "EVADConfig", "EVADOutput", "Tokens", "select_detections"]
