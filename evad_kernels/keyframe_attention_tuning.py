"""The tile that each attention kernel works on, by architecture, type and width of a head.

``python -m benchmarks.tune_keyframe_attention`` measures candidates on a GPU and writes this table. Architectures that
are not in MEASURED have been compiled only: their rows are the largest tiles found that need no spill.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Query rows and keys that a program multiplies at once, and how it is launched."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


MEASURED = ()  # architectures

# (architecture, bytes of an element): kernel: [(least N, width, (rows, keys, warps, stages))]. A row serves heads up to
# its width, from its least N on; of several the last.
TABLE = {
    (80, 2): {
        "forward": [
            (0, 32, (128, 64, 8, 3)),
            (0, 64, (128, 64, 8, 3)),
            (0, 128, (128, 32, 8, 2)),
            (0, 256, (32, 32, 8, 1)),
        ],
        "score": [
            (0, 32, (128, 64, 4, 2)),
            (0, 64, (128, 64, 4, 2)),
            (0, 128, (128, 64, 4, 2)),
            (0, 256, (64, 64, 4, 2)),
        ],
        "query": [(0, 32, (64, 64, 4, 2)), (0, 64, (64, 32, 4, 2)), (0, 128, (32, 32, 8, 2)), (0, 256, (16, 32, 8, 1))],
        "key": [(0, 32, (32, 64, 4, 2)), (0, 64, (32, 64, 8, 2)), (0, 128, (32, 64, 8, 2)), (0, 256, (16, 64, 8, 1))],
    },
    (80, 4): {
        "forward": [
            (0, 32, (64, 16, 8, 1)),
            (0, 64, (64, 16, 8, 1)),
            (0, 128, (32, 16, 8, 1)),
            (0, 256, (32, 16, 8, 1)),
        ],
        "score": [(0, 32, (64, 64, 8, 1)), (0, 64, (64, 64, 8, 1)), (0, 128, (64, 64, 8, 1)), (0, 256, (64, 64, 8, 1))],
        "query": [(0, 32, (32, 16, 4, 1)), (0, 64, (32, 16, 4, 1)), (0, 128, (32, 16, 8, 1)), (0, 256, (16, 16, 8, 1))],
        "key": [(0, 32, (16, 64, 8, 1)), (0, 64, (16, 64, 8, 1)), (0, 128, (16, 32, 8, 1)), (0, 256, (16, 16, 8, 1))],
    },
    (90, 2): {
        "forward": [
            (0, 32, (128, 64, 8, 3)),
            (0, 64, (128, 64, 8, 3)),
            (0, 128, (128, 64, 8, 2)),
            (0, 256, (64, 16, 4, 1)),
        ],
        "score": [
            (0, 32, (128, 64, 4, 2)),
            (0, 64, (128, 64, 4, 2)),
            (0, 128, (128, 64, 4, 2)),
            (0, 256, (64, 64, 4, 2)),
        ],
        "query": [(0, 32, (64, 64, 4, 2)), (0, 64, (64, 64, 4, 2)), (0, 128, (64, 32, 4, 2)), (0, 256, (16, 16, 4, 1))],
        "key": [(0, 32, (32, 64, 4, 2)), (0, 64, (32, 64, 4, 2)), (0, 128, (16, 128, 8, 1)), (0, 256, (32, 32, 8, 1))],
    },
    (90, 4): {
        "forward": [
            (0, 32, (64, 16, 8, 1)),
            (0, 64, (64, 16, 8, 1)),
            (0, 128, (32, 16, 8, 1)),
            (0, 256, (16, 16, 8, 1)),
        ],
        "score": [(0, 32, (64, 64, 8, 1)), (0, 64, (64, 64, 8, 1)), (0, 128, (64, 64, 8, 1)), (0, 256, (64, 64, 8, 1))],
        "query": [(0, 32, (64, 16, 8, 1)), (0, 64, (32, 16, 4, 1)), (0, 128, (16, 16, 8, 1)), (0, 256, (16, 16, 4, 1))],
        "key": [(0, 32, (16, 64, 8, 1)), (0, 64, (16, 64, 8, 1)), (0, 128, (16, 32, 8, 1)), (0, 256, (16, 16, 8, 1))],
    },
    (100, 2): {
        "forward": [
            (0, 32, (128, 64, 8, 3)),
            (0, 64, (128, 64, 8, 3)),
            (0, 128, (128, 64, 8, 2)),
            (0, 256, (64, 64, 8, 2)),
        ],
        "score": [
            (0, 32, (128, 64, 4, 2)),
            (0, 64, (128, 64, 4, 2)),
            (0, 128, (128, 64, 4, 2)),
            (0, 256, (64, 64, 4, 2)),
        ],
        "query": [(0, 32, (64, 64, 4, 2)), (0, 64, (64, 64, 4, 2)), (0, 128, (64, 64, 8, 2)), (0, 256, (64, 32, 8, 1))],
        "key": [(0, 32, (32, 64, 4, 2)), (0, 64, (32, 64, 4, 2)), (0, 128, (32, 64, 8, 2)), (0, 256, (32, 64, 8, 1))],
    },
    (100, 4): {
        "forward": [
            (0, 32, (64, 16, 8, 1)),
            (0, 64, (64, 16, 8, 1)),
            (0, 128, (32, 16, 8, 1)),
            (0, 256, (32, 16, 8, 1)),
        ],
        "score": [(0, 32, (64, 64, 8, 1)), (0, 64, (64, 64, 8, 1)), (0, 128, (64, 64, 8, 1)), (0, 256, (64, 64, 8, 1))],
        "query": [(0, 32, (64, 16, 8, 1)), (0, 64, (64, 16, 8, 1)), (0, 128, (16, 16, 8, 1)), (0, 256, (16, 16, 4, 1))],
        "key": [(0, 32, (16, 64, 8, 1)), (0, 64, (16, 64, 8, 1)), (0, 128, (16, 32, 8, 1)), (0, 256, (16, 16, 8, 1))],
    },
}


def tile(kernel: str, architecture: int, element_size: int, block_d: int, N: int) -> Tile:
    """The tile of one launch; 0 is Triton's interpreter, where a small one lets small tests have several."""
    if architecture == 0:
        return Tile(64, 32, 4, 1)
    known = [known for known, _ in TABLE if known <= architecture]
    if architecture >= 110 and architecture not in known:  # consumer chips: 99 KB of shared memory and Ampere's mma
        known = [80]
    width = max(block_d, 32)
    rows = TABLE[max(known, default=80), element_size][kernel]
    return Tile(*[choice for least, served, choice in rows if least <= N and served == width][-1])
