"""The paper's experiments on synthetic clips: ``python -m benchmarks.paper``."""
