"""Kernels for video transformers that run on fewer tokens: attention with keyframe-weighted importance and top-k,
token scatter, and 3D RoIAlign straight on pruned tokens."""

from ._backend import backends, use_backend
from .keyframe_attention import keyframe_attention, keyframe_attention_topk
from .pyramid_roi_align import pyramid_roi_align
from .roi_align_3d import roi_align_3d, roi_pool_3d
from .scatter_tokens import scatter_tokens
from .token_selection import gather_tokens, select_tokens

from . import patch as patch  # isort: skip  (needs the ops above)

__version__ = "0.1.0"

__all__ = [
    "backends",
    "gather_tokens",
    "keyframe_attention",
    "keyframe_attention_topk",
    "pyramid_roi_align",
    "roi_align_3d",
    "roi_pool_3d",
    "scatter_tokens",
    "select_tokens",
    "use_backend",
]
