"""``python -m evad.data FOLDER``: synthetic clips on disk, as AVA comes."""

from __future__ import annotations

import argparse
from pathlib import Path

from .synthetic import Synthetic, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evad.data", description=write.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=200, metavar="N", help="clips of the split train [200]")
    parser.add_argument("--val", type=int, default=50, metavar="N", help="clips of the split val [50]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(96, 96), metavar=("H", "W"), help="pixels [96 96]")
    args = parser.parse_args()
    for split, clips in (("train", args.train), ("val", args.val)):
        if clips > 0:
            write(Synthetic(split, clips=clips, seed=args.seed, fresh=False, size=tuple(args.size)), args.folder)


if __name__ == "__main__":
    main()
