"""What to do about data that cannot be used: stop at the first, or leave it out and count."""

from __future__ import annotations

import sys

import torch

POLICIES = ("fail", "skip")
SHOWN = 5  # messages of what is left out


class DataError(ValueError):
    """Data that cannot be used; the message names the file, and the line where there is one."""


class Problems:
    """Called with a message for each: raises (policy "fail") or counts ("skip", with the first few on stderr).

    The count is shared with worker processes.
    """

    def __init__(self, policy: str = "fail") -> None:
        if policy not in POLICIES:
            raise ValueError(f"on_error must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.policy = policy
        self._count = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def count(self) -> int:
        return int(self._count)

    def __call__(self, message: str, cause: Exception | None = None) -> None:
        if self.policy == "fail":
            raise DataError(message) from cause
        self._count += 1
        if self.count <= SHOWN:
            print(f"skipped: {message}", file=sys.stderr, flush=True)
        elif self.count == SHOWN + 1:
            print("skipped: more of that kind; they are counted", file=sys.stderr, flush=True)
