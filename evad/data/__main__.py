"""``python -m evad.data FOLDER``: synthetic clips on disk, as AVA comes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..console import bounded, guarded
from .synthetic import Synthetic, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evad.data", description=write.__doc__)
    parser.add_argument("folder", type=Path)
    count = bounded(int, 0)
    parser.add_argument("--train", type=count, default=200, metavar="N", help="clips of the split train [200]")
    parser.add_argument("--val", type=count, default=50, metavar="N", help="clips of the split val [50]")
    parser.add_argument("--seed", type=count, default=0)
    size = bounded(int, 16, 4096)
    parser.add_argument("--size", type=size, nargs=2, default=(96, 96), metavar=("H", "W"), help="pixels [96 96]")
    args = parser.parse_args()
    if not args.train + args.val:
        parser.error("--train and --val: there is no clip to write")
    return guarded(parser.prog, lambda: _write(args), args.folder)


def _write(args: argparse.Namespace) -> int:
    for split, clips in (("train", args.train), ("val", args.val)):
        if clips:
            write(Synthetic(split, clips=clips, seed=args.seed, fresh=False, size=tuple(args.size)), args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
