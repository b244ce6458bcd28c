"""Evaluation: average precision by the published protocols, and scoring a model on a dataset."""

from .ava import EVALUATED, AvaScores, evaluate_ava, read_boxes
from .average_precision import STRICT, Boxes, average_precision
from .model import Metrics, collect, evaluate, score

__all__ = [
    "EVALUATED",
    "STRICT",
    "AvaScores",
    "Boxes",
    "Metrics",
    "average_precision",
    "collect",
    "evaluate",
    "evaluate_ava",
    "read_boxes",
    "score",
]
