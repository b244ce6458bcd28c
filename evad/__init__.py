"""EVAD, an efficient video action detector: token pruning around the keyframe, on evad_kernels' ops.

To be read in this order:

1. The paper: ``config``, ``tokens``, ``backbone``, ``pyramid``, ``localization``, ``decoder``, ``detector``.
2. Training and scores: ``losses``, ``recipe`` (``configs/``), ``data/``, ``training``, ``snapshots``; ``evaluation/``.
3. Weights: ``checkpoint``, ``weights/``. The AVA dataset's names and files: ``ava``. Bad data: ``problems``.
4. Services: ``video``, ``stream``, ``compiled``, ``export``. What it costs and shows: ``profile``, ``draw``.
5. ``cli/``: a command each, nothing but these.
"""

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
