"""What the package's programs share: options that are numbers, and one line for what the user can put right."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path


class CommandError(Exception):
    """Something that the user can put right; the message is the one line that is printed."""


def bounded(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an ``int`` or ``float`` in [low, high], or (low, high] with ``above``."""
    bounds = f"above {low:g}" if above else f"at least {low:g}"
    bounds += "" if high == float("inf") else f" and at most {high:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low < value if above else low <= value) or not value <= high:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {expected} {bounds}, got {text!r}")
        return value

    return parse


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

    from .problems import DataError
    from .video import VideoError

    if isinstance(error, (CommandError, DataError, VideoError)):
        return str(error).rpartition(f"{type(error).__name__}: ")[2]  # from a worker process it comes with a traceback
    if isinstance(error, OSError):
        place = error.filename or (folder if error.errno in _DISK else None)
        return f"{place}: {error.strerror}" if place and error.strerror else str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error):
        return "out of memory: a smaller --size, --keep-rate or --model needs less"
    return None
