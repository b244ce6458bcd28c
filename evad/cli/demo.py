"""``evad demo``: the main job, on a clip that is rendered here."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import evad_kernels

from .. import draw
from ..config import EVADConfig
from ..data.scene import Scene, random_scene
from ..video import Video, VideoWriter
from ..weights import TINY
from ._common import Built, add_model_arguments, build, read_labels, say, writable_folder
from .detect import detect
from .visualize import look, write

DESCRIPTION = """\
Render a short clip of moving actors, find people in it and what they do, and show which tokens are kept and what that
saves. Needs no download and no GPU: a tiny model comes with the package, taught on such clips, though not on this one.
Writes pictures, videos, CSV and JSON to the --out folder.
"""

SECONDS, FPS, SIZE, SEED = 4, 30, 480, 105
UNTRAINED = "boxes, labels and scores mean nothing. Tokens and costs are real."


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="the whole thing on a clip it renders itself",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("evad_demo"), metavar="DIR", help="folder [evad_demo]")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout, and nothing else")
    add_model_arguments(parser, default="tiny")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    folder = writable_folder(args.out)
    if args.checkpoint is None and args.model is None:
        args.checkpoint = TINY
    built = build(args)
    labels = read_labels(None, built.config.num_classes, args.checkpoint)
    path = folder / "demo.mp4"
    scene = random_scene(np.random.default_rng(SEED))
    frames = _render(scene, path)
    with Video(path) as video:
        found = detect(built, video, folder, labels)
        if found.interrupted:
            return 130
        seen = look(built, video, video.duration / 2, None, labels)
        files = {"clip": path, **found.files, **write(built, video, seen, folder, animate=True)}
    pruning = seen.pruning
    files["keyframe"] = folder / "demo.keyframe.png"
    Image.fromarray(found.picture).save(files["keyframe"])
    say("counting operations, timing kernels and reference ...")
    document = {
        "weights": built.weights,
        "model": built.summary(),
        "clip": {"frames": frames, "width": video.width, "height": video.height, "actors": len(scene.actors)},
        "tokens": [{"layer": name, "kept": len(kept), "of": pruning.total} for name, kept in pruning.layers],
        "cost": _cost(built, pruning),
        "keyframes": json.loads(found.files["json"].read_text(encoding="utf-8"))["keyframes"],
        "files": {name: str(path) for name, path in files.items()},
    }
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        _print(document, built, pruning.total)
    return 0


def _render(scene: Scene, path: Path) -> int:
    """Write the clip, with time 0 of the scene in its middle; returns the number of frames."""
    times = np.arange(SECONDS * FPS) / FPS
    with VideoWriter(path, SIZE, SIZE, FPS) as writer:
        for some in np.split(times, len(times) // 8):
            for time, image in zip(some, scene.render(some - SECONDS / 2, SIZE, SIZE), strict=True):
                writer.write(image, time)
    return len(times)


def _cost(built: Built, pruning: draw.Pruning) -> list[dict]:
    """Operations, and seconds on the kernels and on the reference, without and with pruning."""
    from ..profile import measure_in_turns, profile

    config, rate = built.config, built.config.keep_rate
    height, width = pruning.frames[0].shape[:2]
    clip = torch.randn(1, 3, config.num_frames, height, width, device=built.device, dtype=built.dtype)

    def inference(keep_rate: float, backend: str) -> None:
        built.model.set_keep_rate(keep_rate)
        with torch.inference_mode(), evad_kernels.use_backend(backend):
            built.model(clip)

    rates, backends = tuple(dict.fromkeys((1.0, rate))), {"kernels": "auto", "reference": "reference"}
    calls = {(r, name): partial(inference, r, backend) for r in rates for name, backend in backends.items()}
    seconds = measure_in_turns(calls, device=built.device, rounds=3)
    built.model.set_keep_rate(rate)
    return [
        {
            "keep_rate": r,
            "gflops": profile(config, (height, width), r).gflops,
            "gflops_vit_b": profile(EVADConfig.vit_b(), keep_rate=r).gflops,
            **{f"seconds_{name}": seconds[r, name] for name in backends},
        }
        for r in rates
    ]


def _print(document: dict, built: Built, total: int) -> None:
    """Tables; ``total`` is how many tokens a clip has."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(columns):
            made.add_column(column, justify="left" if number == 0 else "right")
        return made

    clip, rate = document["clip"], built.config.keep_rate
    console.print(
        f"\n[bold]EVAD demo[/]: {clip['actors']} actors in {clip['frames']} frames of {clip['width']} × "
        f"{clip['height']} pixels, model {built.name} ({document['model']['parameters'] / 1e6:.1f} M parameters)"
    )
    if built.weights == "random":
        console.print(f"[yellow]Random weights:[/] {UNTRAINED}\n")
    elif built.note:
        console.print(f"[yellow]{built.note}[/]\n")

    tokens = table("Tokens of one clip", "after", "tokens", "of all")
    tokens.add_row("patch embedding", str(total), "100%")
    for layer in document["tokens"]:
        tokens.add_row(layer["layer"], str(layer["kept"]), f"{layer['kept'] / total:.0%}")
    console.print(tokens)

    rates = [f"keep rate {row['keep_rate']:g}" for row in document["cost"]]
    cost = table("Cost of one clip", "", *rates, "ratio")
    for title, key, form, scale in (
        (f"{built.name}, GFLOPs", "gflops", ".2f", 1),
        ("vit_b (the paper's, 224 × 224), GFLOPs", "gflops_vit_b", ".1f", 1),
        (f"{built.name}, kernels, ms", "seconds_kernels", ".1f", 1e3),
        (f"{built.name}, plain PyTorch, ms", "seconds_reference", ".1f", 1e3),
    ):
        values = [row[key] * scale for row in document["cost"]]
        cost.add_row(title, *(format(value, form) for value in values), f"{values[-1] / values[0]:.2f}")
    console.print(cost)
    last = document["cost"][-1]
    times = last["seconds_reference"] / last["seconds_kernels"]
    console.print(f"at keep rate {rate:g} plain PyTorch takes {times:.1f} times as long as the kernels\n")

    people = table("People found", "time", "score", "x1  y1  x2  y2 (%)", "actions")
    people.columns[3].justify = "left"
    for keyframe in document["keyframes"]:
        for person in keyframe["people"]:
            place = "  ".join(f"{100 * value:3.0f}" for value in person["box"])
            actions = ", ".join(f"{draw.brief(action['label'])} {action['score']:.2f}" for action in person["actions"])
            people.add_row(f"{keyframe['time']:.1f} s", f"{person['score']:.2f}", place, actions)
    console.print(people)
    titles = {
        "clip": "the clip",
        "video": "with boxes",
        "keyframe": "one keyframe",
        "png": "kept tokens",
        "mp4": "kept tokens, moving",
        "attention": "what people attend to",
        "csv": "detections, AVA's format",
        "json": "detections",
    }
    for name, title in titles.items():
        if name in document["files"]:
            console.print(f"{title:<25} {document['files'][name]}", soft_wrap=True)
