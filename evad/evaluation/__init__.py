"""Evaluation: average precision by the published protocols, and scoring a model on a dataset."""

from .ava import EVALUATED, AvaScores, evaluate_ava
from .average_precision import STRICT, Boxes, average_precision
from .model import Metrics, evaluate

__all__ = ["EVALUATED", "STRICT", "AvaScores", "Boxes", "Metrics", "average_precision", "evaluate", "evaluate_ava"]
