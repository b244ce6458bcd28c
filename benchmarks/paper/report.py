"""Writes REPORT.md from the records: the paper's number and ours side by side, and which trends hold.

A trend is asked of the differences between two rows, one a seed: between runs of the same precision, whose start is the
same, and their mean where a seed has them in several. It holds if the 95 % interval of the differences' mean (Student's
t) lies above what is asked, does not if it lies below, and is undecided else.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import t as student

from .experiments import EARLIER, EXPERIMENTS, RUNS, Experiment, Row, Trend

CLAIM = 3  # seeds from which a difference in accuracy is claimed
BEGIN, END = "<!-- paper: begin -->", "<!-- paper: end -->"
Records = Mapping[str, Sequence[dict]]  # by run, in the order of their origins


class Origin(NamedTuple):
    """What the runs that are compared with each other share: their start's weights are of this precision and seed."""

    precision: str  # "" of what is not trained
    seed: int


def _origin(record: dict) -> Origin:
    return Origin(record.get("precision", ""), record["seed"])


def read_records(folder: Path) -> Records:
    records: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        records.setdefault(record["run"], []).append(record)
    return {run: sorted(some, key=_origin) for run, some in records.items()}


def values(row: Row, records: Records) -> dict[Origin, float]:
    """A row's numbers, per cent."""
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
            found[_origin(record)] = 100 * value
    return found


def _quiet(record: dict) -> bool:
    """Whether nothing else ran beside it: else its time says nothing."""
    return (record["machine"]["load"] or 0.0) <= record["machine"]["threads"] + 0.5


class Comparison(NamedTuple):
    """A trend in the records: how far its higher row is above its lower, per cent."""

    paper: float | None
    gaps: list[float]  # one a seed that has all rows
    least: float  # that the paper asks for
    counted: bool  # no matter of seeds: one measurement

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gaps)

    @property
    def claimed(self) -> bool:
        return len(self.gaps) >= CLAIM

    @property
    def margin(self) -> float:
        """Half of the interval of the mean."""
        n = len(self.gaps)
        return float(student.ppf(0.975, n - 1)) * statistics.stdev(self.gaps) / n**0.5 if n > 1 else 0.0

    @property
    def verdict(self) -> str:
        if self.mean - self.margin > self.least:
            return "holds"
        return "does not hold" if self.mean + self.margin < self.least else "undecided"


def compare(trend: Trend, experiment: Experiment, records: Records) -> Comparison | None:
    """None where no seed has all rows in one precision."""
    rows = [next(row for row in experiment.rows if row.label == label) for label in trend.labels]
    ours = [values(row, records) for row in rows]
    shared = set.intersection(*map(set, ours)) - _unlike(rows, records)
    if not shared:
        return None

    def difference(of: Sequence[float]) -> float:
        return sum(sign * number for sign, number in zip((1, -1, -1, 1), of, strict=False))

    counted = {record["kind"] for row in rows for record in records[row.run]} == {"cost"}
    paper = None if None in [row.paper for row in rows] else difference([row.paper for row in rows])
    least = 0.0 if trend.within is None else -trend.within
    by_seed: dict[int, list[float]] = {}
    for origin in sorted(shared):
        by_seed.setdefault(origin.seed, []).append(difference([of[origin] for of in ours]))
    return Comparison(paper, [statistics.fmean(by_seed[seed]) for seed in sorted(by_seed)], least, counted)


def _unlike(rows: Sequence[Row], records: Records) -> set[Origin]:
    """Origins whose runs differ in their start's weights all the same, as far as the records say."""
    found: dict[Origin, set[str]] = {}
    for record in (record for row in rows for record in records.get(row.run, ())):
        if "start_sha256" in record:
            found.setdefault(_origin(record), set()).add(record["start_sha256"])
    return {origin for origin, starts in found.items() if len(starts) > 1}


def verdict(trend: Trend, experiment: Experiment, records: Records) -> str:
    """One sentence: what the paper says, and what the records say about it."""
    words = f"{trend.words} ({trend.rows})"
    found = compare(trend, experiment, records)
    if found is None:
        return f"{words}: **not run**"
    asked = "" if trend.within is None else f", asked for: at least {found.least:+.1f}"
    if found.claimed:
        answer = f"{found.verdict} ({found.mean:+.2f} ± {found.margin:.2f}{asked})"
        return f"{words}: {answer if found.verdict == 'holds' else f'**{answer}**'}"
    seeds = len(found.gaps)
    seen = "seen" if found.mean > found.least else "**not seen**"
    why = "measured once" if found.counted else f"no claim from {seeds} seed{'s' * (seeds > 1)}"
    return f"{words}: {seen}, {why} ({found.mean:+.2f}{asked})"


def claims(records: Records) -> str:
    """A table of the trends that there are seeds enough for; what several of the paper's tables ask is one row."""
    found: dict[tuple, tuple[list[str], Trend, Comparison]] = {}
    for experiment in EXPERIMENTS:
        rows = {row.label: row._replace(label="", paper=None) for row in experiment.rows}
        for trend in experiment.trends:
            comparison = compare(trend, experiment, records)
            if comparison is None or not comparison.claimed:
                continue
            same = (*(rows[label] for label in trend.labels), trend.within)
            found.setdefault(same, ([], trend, comparison))[0].append(experiment.title.split(":")[0])
    lines = ["| what the paper shows | paper | ours, mean and its 95 % interval | |", "| --- | --- | --- | --- |"]
    for titles, trend, comparison in found.values():
        paper = "" if comparison.paper is None else f"{comparison.paper:+.1f}"
        low, high = comparison.mean - comparison.margin, comparison.mean + comparison.margin
        asked = "" if trend.within is None else f" (at least {comparison.least:+.1f})"
        what = f"{', '.join(titles)}: {trend.words} ({trend.rows})"
        ours = f"{comparison.mean:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {what} | {paper} | {ours} | {comparison.verdict}{asked} |")
    return "\n".join(lines)


def with_claims(readme: str, records: Records) -> str:
    """``readme`` with what stands between the markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the markers {BEGIN} and {END}")
    return f"{before}{begin}\n{claims(records)}\n{end}{after}"


def table(experiment: Experiment, records: Records) -> list[str]:
    """Its rows, with two columns for each precision that some were trained in."""
    ours = {row: values(row, records) for row in experiment.rows}
    precisions = sorted({origin.precision for some in ours.values() for origin in some} - {""}) or [""]
    heads = [f"{experiment.unit}, {name}" if len(precisions) > 1 else experiment.unit for name in precisions]
    lines = [
        "| | paper |" + "".join(f" ours, {head} | seeds |" for head in heads),
        "| --- | --- |" + " --- | --- |" * len(heads),
    ]
    for row, found in ours.items():
        line = f"| {row.label} | {'' if row.paper is None else f'{row.paper:g}'} |"
        for precision in precisions:
            # What is not trained stands in the first.
            names = (precision, "") if precision == precisions[0] else (precision,)
            some = [value for origin, value in found.items() if origin.precision in names]
            cell = f"{statistics.fmean(some):.2f}" if some else "not run"
            line += f" {cell} ± {statistics.stdev(some):.2f} |" if len(some) > 1 else f" {cell} |"
            line += f" {len(some) or ''} |"
        lines.append(line)
    return lines


def text(records: Records, earlier: Records) -> str:
    done = sum(len(some) for some in records.values())
    lines = [
        "# The paper's experiments on synthetic clips",
        "",
        "Written by `python -m benchmarks.paper --report` from the records in `runs/`; no number is typed by hand. The "
        "paper's are of AVA and a pre-trained ViT-B, ours of a tiny model on `evad.data.synthetic`: compare "
        "differences, not levels.",
        "",
        f"{done} runs are recorded, of {len(RUNS)} kinds {sum(run.name in records for run in RUNS)}. ± in a table is "
        f"the standard deviation over seeds. A difference in accuracy is claimed from {CLAIM} seeds: it holds if the "
        "95 % interval of its mean lies above what is asked, does not if below, and is undecided else. All seeds are "
        "scored on the same clips, so intervals leave out what other clips would change; comparisons share runs, "
        "`keep_rate=0.7` most of all, so they are not independent. A seed's runs in another precision had another "
        "start: runs are compared within a precision, and where a seed has a difference in both, their mean is its "
        "one. Frame mAP is AVA's as released: detections in the order of their proposals.",
        "",
        *_how(records),
        "",
        f"## What {CLAIM} seeds say",
        "",
        claims(records),
        "",
        f"## {EARLIER.title}",
        "",
        EARLIER.note,
        "",
        *table(EARLIER, earlier),
        "",
        *(f"* {verdict(trend, EARLIER, earlier)}" for trend in EARLIER.trends),
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
