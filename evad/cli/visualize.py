"""``evad visualize``: which tokens each pruning layer keeps, and which of them actors attend to."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import draw
from ..config import EVADConfig
from ..console import CommandError, bounded
from ..detector import EVADOutput, score_detections
from ..video import Video, VideoWriter, normalize, read_clip, resize, sample_times
from ._common import (
    Built,
    add_model_arguments,
    add_size_argument,
    build,
    read_labels,
    say,
    writable_folder,
)

DESCRIPTION = """\
Show which tokens each pruning layer keeps around one keyframe of a video (paper, Figures 4 and 11), and which of
them each person found attends to (Figure 12).

Across: time, one column a slice of tokens, the keyframe outlined. Down: the input, then every pruning layer, with what
it drops faded out; or every person, bright where the decoder's last layer looks to tell what the person does. Written
to the --out folder, for a video called party.mp4: party.pruning.png, party.attention.png, and with --mp4
party.pruning.mp4, the first as moving pictures.
"""

ANIMATION_FPS, ANIMATION_ROUNDS = 7.5, 3  # a clip's own pace, shown three times


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "visualize",
        help="which tokens each pruning layer keeps, and actors attend to",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", metavar="VIDEO", help="any file that FFmpeg reads")
    parser.add_argument(
        "--time", type=bounded(float, 0), metavar="SECONDS", help="of the keyframe [the middle of the video]"
    )
    parser.add_argument("--out", type=Path, default=Path("evad_out"), metavar="DIR", help="folder [evad_out]")
    parser.add_argument("--mp4", action="store_true", help="write moving pictures, too")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON on stdout, and nothing else")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="names of the classes, as for detect [the --checkpoint's, or AVA's]"
    )
    add_size_argument(parser)
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with Video(args.video) as video:
        if args.time is not None and video.duration is not None and args.time > video.duration:
            raise CommandError(f"--time: {args.time:g} s is after the end of {video.path} ({video.duration:.2f} s)")
        folder = writable_folder(args.out)
        built = build(args)
        if built.note:
            say(f"evad visualize: {built.note}")
        time = (video.duration or 0.0) / 2 if args.time is None else args.time
        labels = read_labels(args.labels, built.config.num_classes, args.checkpoint)
        seen = look(built, video, time, args.size, labels)
        files = write(built, video, seen, folder, args.mp4)
    pruning = seen.pruning
    if args.json:
        layers = [
            {
                "layer": name,
                "tokens_kept": len(kept),
                "of": pruning.total,
                "per_slice": pruning.kept(index).sum((1, 2)).tolist(),
            }
            for index, (name, kept) in enumerate(pruning.layers)
        ]
        document = {
            "weights": built.weights,
            "model": built.summary(),
            "time": round(seen.time, 3),
            "grid": list(pruning.grid),
            "keyframe": pruning.keyframe,
            "layers": layers,
            "people": [
                {
                    "box": [round(float(value), 5) for value in actor.label.box],
                    "score": round(actor.label.score, 5),
                    "actions": [{"label": name, "score": round(score, 5)} for name, score in actor.label.actions],
                    "attention_per_slice": [round(float(value), 5) for value in actor.attention.sum((1, 2))],
                }
                for actor in seen.actors
            ],
            "files": {name: str(path) for name, path in files.items()},
        }
        print(json.dumps(document, indent=2))
    else:
        for name, kept in pruning.layers:
            say(f"{name}: {len(kept)} of {pruning.total} tokens kept")
        for path in files.values():
            print(path)
    return 0


class Seen(NamedTuple):
    """What a model made of one clip."""

    time: float  # of the keyframe, seconds
    pruning: draw.Pruning
    actors: list[draw.Attending]  # most certain first; none where the decoder has no block


@torch.inference_mode()
def look(built: Built, video: Video, time: float, size: int | None, labels: Sequence[str]) -> Seen:
    """What the model keeps of the clip around ``time``, and what the people it finds there attend to."""
    config = built.config
    short_side = config.short_side if size is None else size
    clip = read_clip(
        video,
        time,
        num_frames=config.num_frames,
        stride=config.frame_stride,
        fps=config.frame_rate,
        prepare=lambda frame: resize(frame.rgb(), short_side),
    )
    pixels = normalize(clip.samples, config.pixel_mean, config.pixel_std).to(built.device, built.dtype)
    output, attention = built.model.attention([pixels]) if config.decoder_depth else (built.model([pixels]), None)
    height, width = built.model.padded_size([pixels.shape[-2:]])
    grid = config.num_frames // config.tubelet_size, height // config.patch_size, width // config.patch_size
    layers = [
        (f"layer {block + 1}", positions[0].cpu().numpy())
        for block, positions in zip(config.pruning_blocks, output.kept, strict=bool(output.kept))
    ]
    frames = [sample.permute(1, 2, 0).numpy() for sample in clip.samples]
    times = sample_times(config.num_frames, config.frame_stride, config.frame_rate)
    pruning = draw.Pruning(frames, times, config.tubelet_size, config.patch_size, grid, config.keyframe, layers)
    actors = [] if attention is None else _actors(output, attention[0], pixels.shape[-2:], config, labels)
    return Seen(clip.time, pruning, actors)


def _actors(output: EVADOutput, attention: Tensor, size, config: EVADConfig, labels) -> list[draw.Attending]:
    """The people of the clip who are certain enough, else the most certain one."""
    boxes, persons, actions = (part[0].float().cpu() for part in score_detections(output, [size]))
    order = persons.argsort(descending=True, stable=True)
    certain = int((persons >= config.person_threshold).sum())
    actors = []
    for row in order[: max(certain, 1)].tolist():
        best = actions[row].topk(min(2, len(labels)))
        named = [(labels[index], score) for score, index in zip(*(part.tolist() for part in best), strict=True)]
        box = (boxes[row] / torch.tensor([size[1], size[0]] * 2)).tolist()
        label = draw.Label(box, float(persons[row]), named)
        actors.append(draw.Attending(label, attention[row].float().cpu().numpy()))
    return actors


def write(built: Built, video: Video, seen: Seen, folder: Path, animate: bool) -> dict[str, Path]:
    """Draw and write the files."""
    pruning = seen.pruning
    title = "Which tokens EVAD keeps" if pruning.layers else "EVAD at keep rate 1: every token is kept"
    parts = [f"{video.path.name} at {seen.time:.2f} s", f"{built.name}, keep rate {built.config.keep_rate:g}"]
    if built.weights in ("random", "partial"):
        parts.append(f"{built.weights} weights: this shows the mechanism, not what a trained model does")
    subtitle = "  ·  ".join(parts)
    files = {"png": folder / f"{video.path.stem}.pruning.png"}
    draw.pruning_figure(pruning, title, subtitle).save(files["png"])
    if seen.actors:
        files["attention"] = folder / f"{video.path.stem}.attention.png"
        question = "Where EVAD looks to tell what each person does"
        draw.attention_figure(pruning, seen.actors, question, subtitle).save(files["attention"])
    if animate:
        files["mp4"] = folder / f"{video.path.stem}.pruning.mp4"
        pictures = list(draw.pruning_animation(pruning, title, subtitle))
        height, width = pictures[0].shape[:2]
        with VideoWriter(files["mp4"], width, height, ANIMATION_FPS) as writer:
            for index, picture in enumerate(pictures * ANIMATION_ROUNDS):
                writer.write(picture, index / ANIMATION_FPS)
    return files
