"""Writes REPORT.md from the records: the paper's number and ours side by side, and which trends hold."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .experiments import EXPERIMENTS, RUNS, Experiment, Row, Trend

CLAIM = 3  # seeds from which a difference in accuracy is claimed
BEGIN, END = "<!-- paper: begin -->", "<!-- paper: end -->"
Records = Mapping[str, Sequence[dict]]  # by run, one a seed, in the order of seeds


def read_records(folder: Path) -> Records:
    records: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        records.setdefault(record["run"], []).append(record)
    return {run: sorted(some, key=lambda record: record["seed"]) for run, some in records.items()}


def values(row: Row, records: Records, unit: str) -> dict[int, float]:
    """A row's number by seed, in the experiment's unit."""
    found = {}
    for record in records.get(row.run, ()):
        if record["kind"] == "cost":
            whole = [r for r in records.get("cost,keep_rate=1.0", ()) if r["seed"] == record["seed"]]
            comparable = whole and (row.metric != "seconds" or all(map(_quiet, (record, *whole))))
            value = record["cost"][row.metric] / whole[0]["cost"][row.metric] if comparable else None
        else:
            evaluations = record["evaluations"]
            rate = evaluations["own_rate"] if row.rate is None else str(row.rate)
            value = evaluations["by_rate"].get(rate, {}).get(row.metric)
        if value is not None:
            found[record["seed"]] = 100 * value
    return found


def _quiet(record: dict) -> bool:
    """Whether nothing else ran beside it: else its time says nothing."""
    return (record["machine"]["load"] or 0.0) <= record["machine"]["threads"] + 0.5


class Comparison(NamedTuple):
    """A trend in the records: how far its higher row is above its lower, in the unit of the experiment."""

    paper: float | None
    gaps: list[float]  # one a seed that has both rows
    least: float  # that the paper asks for
    claimed: bool  # whether there are seeds enough, or it is no matter of seeds

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps)

    @property
    def holds(self) -> bool:
        return self.mean > 0 if self.least == 0 else self.mean >= self.least

    @property
    def every_seed(self) -> bool:
        return not min(self.gaps) <= self.least < max(self.gaps)


def compare(trend: Trend, experiment: Experiment, records: Records) -> Comparison | None:
    """None where no seed has both rows."""
    high, low = (next(row for row in experiment.rows if row.label == label) for label in (trend.high, trend.low))
    ours = [values(row, records, experiment.unit) for row in (high, low)]
    seeds = sorted(ours[0].keys() & ours[1].keys())
    if not seeds:
        return None
    kinds = {record["kind"] for row in (high, low) for record in records[row.run]}
    paper = None if None in (high.paper, low.paper) else high.paper - low.paper
    gaps = [ours[0][seed] - ours[1][seed] for seed in seeds]
    least = 0.0 if trend.within is None else -trend.within
    return Comparison(paper, gaps, least, kinds == {"cost"} or len(seeds) >= CLAIM)


def verdict(trend: Trend, experiment: Experiment, records: Records) -> str:
    """One sentence: what the paper says, and what the records say about it."""
    words = f"{trend.words} ({trend.high} against {trend.low})"
    found = compare(trend, experiment, records)
    if found is None:
        return f"{words}: **not run**"
    if not found.claimed:
        seen, seeds = "seen" if found.holds else "**not seen**", len(found.gaps)
        answer = f"{seen}, no claim from {seeds} seed{'s' * (seeds > 1)}"
    else:
        answer = ("holds" if found.holds else "**does not hold**") + ", but not for every seed" * (not found.every_seed)
    asked = "" if trend.within is None else f", asked for: at least {found.least:+.1f}"
    apart = f", seeds {min(found.gaps):+.2f} to {max(found.gaps):+.2f}" if len(found.gaps) > 1 else ""
    return f"{words}: {answer} ({found.mean:+.2f}{asked}{apart})"


def claims(records: Records) -> str:
    """A table of the trends that there are seeds enough for."""
    lines = ["| what the paper shows | paper | ours, mean (seeds) | |", "| --- | --- | --- | --- |"]
    for experiment in EXPERIMENTS:
        for trend in experiment.trends:
            found = compare(trend, experiment, records)
            if found is None or not found.claimed:
                continue
            paper = "" if found.paper is None else f"{found.paper:+.1f}"
            apart = f" ({min(found.gaps):+.1f} to {max(found.gaps):+.1f})" if len(found.gaps) > 1 else ""
            answer = (
                "does not hold" if not found.holds else "holds" if found.every_seed else "holds, not for every seed"
            )
            what = f"{experiment.title.split(':')[0]}: {trend.words} ({trend.high} against {trend.low})"
            lines.append(f"| {what} | {paper} | {found.mean:+.1f}{apart} | {answer} |")
    return "\n".join(lines)


def with_claims(readme: str, records: Records) -> str:
    """``readme`` with what stands between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the markers {BEGIN} and {END}")
    return f"{before}{begin}\n{claims(records)}\n{end}{after}"


def table(experiment: Experiment, records: Records) -> list[str]:
    lines = [f"| | paper | ours, {experiment.unit} | seeds |", "| --- | --- | --- | --- |"]
    for row in experiment.rows:
        ours = list(values(row, records, experiment.unit).values())
        cell = "not run"
        if ours:
            cell = f"{statistics.fmean(ours):.2f}" + (f" ± {statistics.stdev(ours):.2f}" if len(ours) > 1 else "")
        paper = "" if row.paper is None else f"{row.paper:g}"
        lines.append(f"| {row.label} | {paper} | {cell} | {len(ours) or ''} |")
    return lines


def text(records: Records) -> str:
    done = sum(len(some) for some in records.values())
    lines = [
        "# The paper's experiments on synthetic clips",
        "",
        "Written by `python -m benchmarks.paper --report` from the records in `runs/`; no number is typed by hand. The "
        "paper's are of AVA and a pre-trained ViT-B, ours of a tiny model on `evad.data.synthetic`: compare "
        "differences, not levels.",
        "",
        f"{done} runs are recorded, of {len(RUNS)} kinds {sum(run.name in records for run in RUNS)}; "
        f"a difference in accuracy is claimed from {CLAIM} seeds. ± is the standard deviation over seeds.",
        "",
        *_how(records),
        "",
        f"## What {CLAIM} seeds say",
        "",
        claims(records),
    ]
    for experiment in EXPERIMENTS:
        lines += ["", f"## {experiment.title}", "", *table(experiment, records), ""]
        lines += [f"* {verdict(trend, experiment, records)}" for trend in experiment.trends]
        if experiment.note:
            lines += ["", experiment.note]
    return "\n".join(lines) + "\n"


def _how(records: Records) -> list[str]:
    """A line for each way that records were made."""
    ways: dict[str, list[dict]] = {}
    for record in (record for some in records.values() for record in some):
        machine = record["machine"]
        what = {"cost": "one training step", "shipped": "the shipped weights, evaluated"}.get(record["kind"])
        if record["kind"] == "train":
            what = (
                f"trained {record['steps']} steps of {record['batch_size']} clips in {record['precision']}, after a "
                f"start that a seed's runs share: {record['start_steps']} steps that only locate, without pruning"
            )
        on = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"
        ways.setdefault(f"{what}; {on}", []).append(record)
    lines = []
    for way, some in sorted(ways.items()):
        clips = {record["evaluations"]["clips"] for record in some if "evaluations" in record}
        scored = f'; scored on {" or ".join(map(str, sorted(clips)))} clips of the split "test"' if clips else ""
        names = ", ".join(f"`{record['run']}` ({record['seed']})" for record in some)
        lines.append(f"* {way}{scored}. Runs (seed): {names}")
    return lines
