"""``evad profile``: what a model costs."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from ..config import EVADConfig
from ._common import add_model_arguments, configuration, number, placement

DESCRIPTION = """\
Count what one clip costs: operations and parameters by part, tokens after each layer; and run it for time and memory.

One multiply-add is one operation, as in the paper's tables. gflops_paper follows those tables (a pruning layer projects
every token); gflops is what is executed here (only the tokens it keeps).
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
        type=number(int, 16, 4096),
        nargs=2,
        metavar=("H", "W"),
        help="height and width of the clip, pixels [a square of the model's short side, 224 224 for vit_b]",
    )
    parser.add_argument("--no-time", action="store_true", help="count only: do not run the model")
    parser.add_argument("--repeats", type=number(int, 1), default=5, metavar="N", help="timed runs [5]")
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
    from ..profile import measure, profile

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
    if not args.no_time:
        torch.manual_seed(0)
        model = EVAD(config).to(device, dtype).eval()
        clip = torch.randn(1, 3, config.num_frames, height, width, device=device, dtype=dtype)
        with torch.inference_mode():
            taken = measure(lambda: model(clip), device=device, repeats=args.repeats)
        document |= {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": taken.seconds,
            "seconds_p20": taken.seconds_p20,
            "seconds_p80": taken.seconds_p80,
            "peak_bytes": taken.peak_bytes,
        }
    return document


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
    for part, title in PARTS.items():
        gflops = document["gflops_by_part"][part]
        parameters = document["parameters_by_part"][part] / 1e6
        table.add_row(title, f"{gflops:.2f}", f"{gflops / document['gflops']:.0%}", f"{parameters:.2f} M")
    console.print(table)
    console.print(f"by the paper's convention: {document['gflops_paper']:.2f} GFLOPs")
    saved = 1 - document["gflops"] / document["gflops_unpruned"]
    console.print(f"keep rate 1: {document['gflops_unpruned']:.2f} GFLOPs, so pruning saves {saved:.0%}")
    console.print(f"tokens after each layer: {' '.join(map(str, document['tokens']))}", soft_wrap=True)
    if "seconds" in document:
        low, high = (1e3 * document[key] for key in ("seconds_p20", "seconds_p80"))
        threads = f", {document['threads']} threads" if document["device"] == "cpu" else ""
        where = f"{document['device']}{threads}, {document['dtype']}"
        console.print(f"time: {1e3 * document['seconds']:.0f} ms, p20 to p80 {low:.0f} to {high:.0f} ms ({where})")
        if document["peak_bytes"] is not None:
            console.print(f"peak memory beyond the weights: {document['peak_bytes'] / 2**20:.0f} MiB")
