"""Evaluation: average precision by the published protocols, and scoring a model on a dataset."""

from .ava import EVALUATED, AvaScores, evaluate_ava, read_boxes
from .average_precision import STRICT, Boxes, ScoredBoxes, average_precision
from .model import Metrics, collect, evaluate, read_people, score
from .tubes import Linking, TubeScores, evaluate_tubes

__all__ = [
    "EVALUATED",
    "STRICT",
    "AvaScores",
    "Boxes",
    "Linking",
    "Metrics",
    "ScoredBoxes",
    "TubeScores",
    "average_precision",
    "collect",
    "evaluate",
    "evaluate_ava",
    "evaluate_tubes",
    "read_boxes",
    "read_people",
    "score",
]
