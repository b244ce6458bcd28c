"""``evad profile``: what a model costs."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from ..config import EVADConfig
from ..console import CommandError, bounded
from ._common import add_model_arguments, configuration, placement

DESCRIPTION = """\
Count what one clip costs: operations and parameters by part, tokens after each layer; and run it for time and memory.

One multiply-add is one operation, as in the paper's tables. gflops_paper follows those tables (a pruning layer projects
every token); gflops is what is executed here (only the tokens it keeps).

With --train also a training step: time forward and backward by part, and what each part keeps in memory for the
backward (--dtype bfloat16 is autocast then, over weights in float32).
"""

PARTS = {
    "patch_embed": "patch embedding",
    "encoder": "encoder",
    "pyramid": "keyframe pyramid",
    "localization": "actor localisation",
    "decoder": "context refinement decoder",
    "action_classifier": "action classifier",
}


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="operations, parameters, tokens, time and memory of a model",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--size",
        type=bounded(int, 16, 4096),
        nargs=2,
        metavar=("H", "W"),
        help="height and width of the clip, pixels [a square of the model's short side, 224 224 for vit_b]",
    )
    parser.add_argument("--train", action="store_true", help="measure training steps, not inference")
    parser.add_argument("--batch", type=bounded(int, 1), metavar="N", help="clips at a time [1; with --train 2]")
    parser.add_argument(
        "--recompute", action="store_true", help="with --train: compute activations again instead of keeping them"
    )
    parser.add_argument("--no-time", action="store_true", help="count only: do not run the model")
    parser.add_argument("--repeats", type=bounded(int, 1), default=5, metavar="N", help="timed runs [5]")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else")
    add_model_arguments(parser, checkpoint=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    document = measure_cost(args)
    if args.json:
        print(json.dumps(document, indent=2))
    else:
        _print(document)
    return 0


def measure_cost(args: argparse.Namespace) -> dict:
    """What the command reports, as JSON has it."""
    from ..detector import EVAD
    from ..profile import measure, part_seconds, profile

    config, name = configuration(args)
    device, dtype = placement(args)
    height, width = args.size or (config.short_side, config.short_side)
    cost = profile(config, (height, width))
    document = {
        "model": name,
        "size": [height, width],
        "keep_rate": config.keep_rate,
        "gflops_paper": cost.gflops_paper,
        "gflops": cost.gflops,
        "gflops_unpruned": profile(config, (height, width), 1.0).gflops,
        "gflops_by_part": cost.gflops_by_part,
        "parameters": cost.parameters,
        "parameters_by_part": _parameters_by_part(config),
        "tokens": list(cost.tokens),
    }
    batch = args.batch or (2 if args.train else 1)
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
    }
    torch.manual_seed(0)
    if args.train:
        document |= where | {"training": _train(args, config, device, dtype, (batch, height, width))}
    elif not args.no_time:
        model = EVAD(config).to(device, dtype).eval()
        clips = torch.randn(batch, 3, config.num_frames, height, width, device=device, dtype=dtype)
        with torch.inference_mode():
            taken = measure(lambda: model(clips), device=device, repeats=args.repeats)
        by_part = part_seconds(model, clips, args.repeats)
        document |= where | taken._asdict() | {"seconds_by_part": by_part}
    return document


def _train(args: argparse.Namespace, config: EVADConfig, device, dtype, shape: tuple[int, int, int]) -> dict:
    from ..detector import EVAD
    from ..profile import profile_training

    if dtype == torch.float16:
        raise CommandError("--dtype: float16 needs a scaled loss; train in bfloat16 or float32")
    batch, height, width = shape
    model = EVAD(config).to(device).train()
    model.set_recomputation(args.recompute)
    clips = torch.randn(batch, 3, config.num_frames, height, width, device=device)
    targets = random_targets(batch, (height, width), config.num_classes)
    cost = profile_training(model, clips, targets, autocast=dtype == torch.bfloat16, repeats=args.repeats)
    return {
        "recompute": args.recompute,
        "steps_per_second": 1 / cost.seconds,
        "clips_per_second": batch / cost.seconds,
        **cost._asdict(),
        "memory_counted_by": "autograd's saved-tensor hooks; the peak by "
        + ("CUDA's allocator" if device.type == "cuda" else "the resident set of the process"),
    }


def random_targets(number: int, size: tuple[int, int], num_classes: int) -> list[dict[str, torch.Tensor]]:
    """Three actors a clip, each with two actions; matched anew, a random model's loss costs what any does."""
    height, width = size
    low = torch.rand(number, 3, 2) * 0.5
    boxes = torch.cat([low, low + 0.1 + torch.rand(number, 3, 2) * 0.4], dim=2) * torch.tensor([width, height] * 2)
    labels = torch.zeros(number, 3, num_classes).scatter_(2, torch.randint(num_classes, (number, 3, 2)), 1.0)
    return [{"boxes": b, "labels": labels_} for b, labels_ in zip(boxes, labels, strict=True)]


def _parameters_by_part(config: EVADConfig) -> dict[str, int]:
    from ..detector import EVAD
    from ..profile import PARTS as MODULES

    with torch.device("meta"):
        model = EVAD(config)
    counts = dict.fromkeys(MODULES, 0)
    for name, parameter in model.named_parameters():
        holding = [part for part, module in MODULES.items() if name.startswith(module + ".")]
        counts[max(holding, key=lambda part: len(MODULES[part]))] += parameter.numel()
    return counts


def _print(document: dict) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    height, width = document["size"]
    title = f"{document['model']}, one clip of {height} × {width} pixels, keep rate {document['keep_rate']:g}"
    table = Table(
        title=title, title_justify="left", title_style="bold", show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("part", "total")
    table.add_column("GFLOPs", f"{document['gflops']:.2f}", justify="right")
    table.add_column("share", justify="right")
    table.add_column("parameters", f"{document['parameters'] / 1e6:.2f} M", justify="right")
    seconds = document.get("seconds_by_part")
    if seconds:
        table.add_column("ms", f"{1e3 * sum(seconds.values()):.1f}", justify="right")
        table.add_column("share", justify="right")
    for part, title in PARTS.items():
        gflops = document["gflops_by_part"][part]
        parameters = document["parameters_by_part"][part] / 1e6
        row = [f"{gflops:.2f}", f"{gflops / document['gflops']:.0%}", f"{parameters:.2f} M"]
        if seconds:
            row += [f"{1e3 * seconds[part]:.1f}", f"{seconds[part] / sum(seconds.values()):.0%}"]
        table.add_row(title, *row)
    console.print(table)
    console.print(f"by the paper's convention: {document['gflops_paper']:.2f} GFLOPs")
    saved = 1 - document["gflops"] / document["gflops_unpruned"]
    console.print(f"keep rate 1: {document['gflops_unpruned']:.2f} GFLOPs, so pruning saves {saved:.0%}")
    console.print(f"tokens after each layer: {' '.join(map(str, document['tokens']))}", soft_wrap=True)
    if "training" in document:
        _print_training(console, document)
    if "seconds" in document:
        low, high = (1e3 * document[key] for key in ("seconds_p20", "seconds_p80"))
        threads = f", {document['threads']} threads" if document["device"] == "cpu" else ""
        where = f"{document['device']}{threads}, {document['dtype']}, {_clips(document['batch'])}"
        console.print(f"time: {1e3 * document['seconds']:.0f} ms, p20 to p80 {low:.0f} to {high:.0f} ms ({where})")
        if document["peak_bytes"] is not None:
            console.print(f"peak memory beyond the weights: {document['peak_bytes'] / 2**20:.0f} MiB")


TRAINED = {part: PARTS[part] for part in ("encoder", "pyramid", "localization")} | {
    "decoder": "decoder, action classifiers",
    "loss": "loss and matching",
}


def _print_training(console, document: dict) -> None:
    from rich import box
    from rich.table import Table

    cost = document["training"]
    threads = f", {document['threads']} threads" if document["device"] == "cpu" else ""
    recompute = ", activations recomputed" if cost["recompute"] else ""
    where = f"{document['device']}{threads}, {document['dtype']}{recompute}"
    title = f"a training step of {_clips(document['batch'])} ({where})"
    table = Table(title=title, title_justify="left", show_footer=True, box=box.SIMPLE_HEAD, pad_edge=False)
    forward, backward, saved, peaks = (
        cost[key] for key in ("forward_seconds", "backward_seconds", "saved_bytes", "peak_bytes_by_part")
    )
    table.add_column("part", "total")
    for name, seconds in (("forward", forward), ("backward", backward)):
        table.add_column(f"{name}, ms", f"{1e3 * sum(seconds.values()):.0f}", justify="right")
    table.add_column("kept for the backward, MiB", f"{sum(saved.values()) / 2**20:.0f}", justify="right")
    if peaks:
        table.add_column("peak, MiB", f"{max(peaks.values()) / 2**20:.0f}", justify="right")
    for part, name in TRAINED.items():
        row = [f"{1e3 * forward[part]:.0f}", f"{1e3 * backward[part]:.0f}", f"{saved[part] / 2**20:.1f}"]
        table.add_row(name, *row, *([f"{peaks[part] / 2**20:.0f}"] if peaks else []))
    console.print(table)
    low, high = (1e3 * cost[key] for key in ("seconds_p20", "seconds_p80"))
    console.print(
        f"whole step: {1e3 * cost['seconds']:.0f} ms, p20 to p80 {low:.0f} to {high:.0f} ms, "
        f"{cost['steps_per_second']:.2f} steps/s; the optimizer {1e3 * cost['optimizer_seconds']:.0f} ms of it"
    )
    held = (f"{name} {cost[f'{name}_bytes'] / 2**20:.0f} MiB" for name in ("weight", "gradient", "optimizer"))
    peak = "" if cost["peak_bytes"] is None else f"; peak beyond {cost['peak_bytes'] / 2**20:.0f} MiB"
    console.print(f"memory: {', '.join(held)}{peak} (counted by {cost['memory_counted_by']})", soft_wrap=True)


def _clips(number: int) -> str:
    return "one clip" if number == 1 else f"{number} clips"
