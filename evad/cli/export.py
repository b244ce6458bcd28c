"""``evad export``: inference for other runtimes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..console import CommandError, bounded
from ._common import add_model_arguments, build

DESCRIPTION = """\
Write a model's inference to a file that runs without this package: ONNX of standard operators (.onnx), or a
torch.export program (.pt2). It takes any number of clips of one size, and gives person logits, boxes, action logits and
kept tokens. It is traced in float32 on the CPU unless --dtype or --device says otherwise. Expect a minute and more.
"""


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="a model for other runtimes: ONNX or torch.export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="FILE", help="ends in .onnx or .pt2")
    parser.add_argument(
        "--size",
        type=bounded(int, 16, 4096),
        nargs=2,
        metavar=("H", "W"),
        help="height and width of the clips, pixels [a square of the model's short side, 224 224 for vit_b]",
    )
    add_model_arguments(parser, device="cpu", dtype="float32")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..export import export_onnx, export_program

    if args.out.suffix not in (".onnx", ".pt2"):
        raise CommandError(f"FILE must end in .onnx or .pt2, got {args.out}")
    if not args.out.parent.is_dir():
        raise CommandError(f"{args.out.parent}: no such folder")
    built = build(args)
    size = tuple(args.size or (built.config.short_side,) * 2)
    if args.out.suffix == ".onnx":
        try:
            export_onnx(built.model, args.out, size)
        except ImportError as error:
            raise CommandError(f"{error.name} is missing: pip install 'evad-kernels[onnx]'") from error
    else:
        torch.export.save(export_program(built.model, size), args.out)
    if built.note:
        print(f"evad export: {built.note}", file=sys.stderr)
    made = built.summary()
    clips = f"clips [B, 3, {built.config.num_frames}, {size[0]}, {size[1]}]"
    print(f"{args.out}: {built.name}, {clips} {made['dtype']} on {made['device']}")
    return 0
