"""The command line ``evad``: one module a command, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

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


class CommandError(Exception):
    """Something that the user can put right; the message is the one line that is printed."""


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


def guarded(command: str, run: Callable[[], int], folder: Path | None = None) -> int:
    """The exit status of ``run``, which writes to ``folder``; what goes wrong becomes one line on stderr."""
    try:
        return run()
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our stdout has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        message = _explain(error, folder)
        if message is None:
            raise
        print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
        return 2


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # errors of writing, which name no file


def _explain(error: Exception, folder: Path | None) -> str | None:
    """What to tell the user, or None for an error that is ours."""
    import torch

    from ..problems import DataError
    from ..video import VideoError

    if isinstance(error, (CommandError, DataError, VideoError)):
        return str(error).rpartition(f"{type(error).__name__}: ")[2]  # from a worker process it comes with a traceback
    if isinstance(error, OSError):
        place = error.filename or (folder if error.errno in _DISK else None)
        return f"{place}: {error.strerror}" if place and error.strerror else str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error):
        return "out of memory: a smaller --size, --keep-rate or --model needs less"
    return None
