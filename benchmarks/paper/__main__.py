"""Train, evaluate and report the paper's experiments on synthetic clips.

python -m benchmarks.paper                   # everything that has no record yet, in the order of --list; the report
python -m benchmarks.paper --list            # the runs, and which have records
python -m benchmarks.paper --only shipped    # runs whose name begins so
python -m benchmarks.paper --report          # only the report

Kill it at any moment: the same command goes on. Of 40 kinds of run 35 are trained, 1,200 steps each (two of them 3,600)
after a start of 900 that a seed's runs share: seven to ten minutes a run on a quiet core. --jobs 2 makes two at once,
on half of the cores each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from evad.profile import bfloat16_is_slow
from evad.recipe import PRECISIONS

from . import report, runner
from .experiments import RUNS
from .schedule import make_all

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan = runner.Plan()
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="runs whose names begin so [all]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="[0 1 2]")
    parser.add_argument("--steps", type=int, default=plan.steps, help=f"of a run [{plan.steps}]")
    parser.add_argument("--start-steps", type=int, default=plan.start_steps, help=f"of a start [{plan.start_steps}]")
    parser.add_argument("--clips", type=int, default=plan.clips, help=f"that a model is scored on [{plan.clips}]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, help="of training [bfloat16; float32 where that is faster]")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of runs/ and REPORT.md [benchmarks/paper]")
    parser.add_argument("--work", type=Path, default=Path("evad_paper"), help="folder of checkpoints [evad_paper]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--list", action="store_true", help="print the runs and their seeds on record, then stop")
    parser.add_argument("--report", action="store_true", help="only write the report and the README's table")
    args = parser.parse_args(arguments)
    records = args.out / "runs"
    if args.list:
        known = report.read_records(records)
        for run in RUNS:
            print(f"{run.name:45} {run.kind:8} {' '.join(str(record['seed']) for record in known.get(run.name, ()))}")
        return
    if not args.report:
        precision = args.precision or ("float32" if bfloat16_is_slow(args.device) else "bfloat16")
        plan = runner.Plan(args.steps, args.start_steps, args.clips, device=args.device, precision=precision)
        make_all(plan, args.only, args.seeds, records, args.work, args.jobs)
    known = report.read_records(records)
    (args.out / "REPORT.md").write_text(report.text(known, report.read_records(HERE / "earlier")))
    print(args.out / "REPORT.md")
    if args.out == HERE:
        README.write_text(report.with_claims(README.read_text(), known))


if __name__ == "__main__":
    main()
