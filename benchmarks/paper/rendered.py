"""Clips rendered once, which takes as long as to learn from them: all runs of a seed learn from the same."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.utils.data import Dataset

from evad.data import Sample
from evad.data.synthetic import Synthetic


class Rendered(Dataset):
    """The first epoch of a synthetic dataset, kept in a folder: a file a clip, written when it is first asked for.

    The folder's clips are those of the package that rendered them. Any number of processes may share it.
    """

    def __init__(self, clips: Synthetic, folder: Path) -> None:
        self.clips, self.labels = clips, clips.labels
        every = round(1000 * (clips.times[-1] - clips.times[0]) / max(len(clips.times) - 1, 1))
        kind = f"{clips.split},seed={clips.seed},{len(clips.times)}x{clips.height}x{clips.width},every={every}ms"
        self.folder = folder / kind
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Sample:
        path = self.folder / f"{index}.pt"
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}")
            torch.save(self.clips.render(index), draft)
            draft.replace(path)
        return self.clips.sample(index, *torch.load(path))
