"""The command line ``evad``: one module a command, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..console import guarded

PROGRAM = "evad"

DESCRIPTION = """\
EVAD: finds people in video and tells what they do, with a transformer that drops most of its tokens on the way.

  evad demo                     the whole thing on a clip it renders itself; nothing to download
  evad detect party.mp4         boxes, labels and scores: annotated video, CSV in AVA's format, JSON
  evad train                    teach a model: on your data, or on synthetic clips
  evad evaluate                 mAP of detections in files, or of a model on a dataset
  evad visualize party.mp4      which tokens each pruning layer keeps, as a picture
  evad profile                  operations, parameters, tokens, time and memory of a model
  evad export model.onnx        a model for other runtimes: ONNX or torch.export
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (try {self.prog} -h)", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    from . import demo, detect, evaluate, export, profile, train, visualize

    parser = _Parser(prog=PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for command in (demo, detect, train, evaluate, visualize, profile, export):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0, 2 for input that cannot be used (one line on stderr says why), 130 after Ctrl-C.
    """
    try:
        import av  # noqa: F401
        import matplotlib  # noqa: F401
        import PIL  # noqa: F401
        import rich  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        print(f"{PROGRAM}: {error.name} is missing: pip install 'evad-kernels[evad]'", file=sys.stderr)
        return 2
    args, unknown = build_parser().parse_known_args(argv)
    command = f"{PROGRAM} {args.command}"
    if unknown:  # parse_args would name the program without the command
        print(f"{command}: unrecognized arguments: {' '.join(unknown)} (try {command} -h)", file=sys.stderr)
        return 2
    return guarded(command, lambda: args.run(args), getattr(args, "out", None))
