"""Trained weights that come with the package; README.md beside them says how they were made and how good they are."""

from pathlib import Path

TINY = Path(__file__).with_name("tiny.safetensors")  # EVADConfig.tiny, 8 actions of evad.data.synthetic
