"""How many clips a second datasets make: rendered, decoded from videos, read from pictures; by worker processes.

python -m benchmarks.data_rate [--workers 0 2 8] [--clips 64] [--json]

A GPU is kept busy if this is more than it trains on. Videos are 3 s of 256 x 340 pixels as AVA's are after the usual
reduction (H.264, 30 fps), pictures are the same frames as JPEG; clips are 16 frames of short side 224.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from evad import data
from evad.data import Synthetic, synthetic
from evad.video import Video

BATCH = 4
PREFETCH = 2  # batches that a worker makes ahead


def prepare(folder: Path, videos: int) -> None:
    """Write the videos, and their frames as pictures."""
    synthetic.write(Synthetic("val", clips=videos, size=(256, 340)), folder)
    for path in (folder / "videos").glob("*.mp4"):
        pictures = folder / "pictures" / path.stem
        pictures.mkdir(parents=True)
        with Video(path) as video:
            for number, frame in enumerate(video.frames()):
                Image.fromarray(frame.rgb()).save(pictures / f"{number:06d}.jpg", quality=90)


def rate(dataset, workers: int, clips: int) -> float:
    """Clips a second, of ``clips`` after the first batches: those wait for the processes to start, and while they do,
    others are made ahead."""
    ahead = 1 + PREFETCH * workers
    order = np.arange(ahead * BATCH + clips) % len(dataset)
    options = {"num_workers": workers, "prefetch_factor": PREFETCH if workers else None, "collate_fn": data.collate}
    batches = iter(DataLoader(dataset, BATCH, sampler=order.tolist(), **options))
    for _ in range(ahead):
        next(batches)
    begin, made = time.perf_counter(), 0
    for batch in batches:
        made += len(batch.keys)
    return made / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, 4)
        files = {"annotations": str(folder / "val.csv"), "labels": str(folder / "labels.pbtxt")}
        datasets = {
            "synthetic 96 x 96, rendered": Synthetic("val", clips=args.clips),
            "videos 256 x 340, decoded": data.build({"name": "csv", "media": str(folder / "videos"), **files}, "val"),
            "pictures 256 x 340, read": data.build(
                {"name": "csv", "media": str(folder / "pictures"), "fps": 30.0, **files}, "val"
            ),
        }
        rows = [
            {"dataset": title, "workers": workers, "clips_per_second": round(rate(dataset, workers, args.clips), 2)}
            for title, dataset in datasets.items()
            for workers in args.workers
        ]
    if args.json:
        print(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg(), "rows": rows}, indent=2))
        return
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    for row in rows:
        print(f"{row['dataset']:<30} {row['workers']:>3} workers {row['clips_per_second']:>9.2f} clips/s")


if __name__ == "__main__":
    main()
