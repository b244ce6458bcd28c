"""benchmarks.paper: the whole, with two steps of a minute model; what it writes about records made up."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper import report, runner, schedule
from benchmarks.paper.experiments import EARLIER, EXPERIMENTS, RUNS
from benchmarks.paper.rendered import Rendered
from evad import EVADConfig
from evad.data import build

MINUTE = {
    "num_frames": 8,
    "short_side": 48,
    "patch_size": 12,
    "width": 24,
    "num_heads": 2,
    "depth": 4,
    "pruning_blocks": [1, 2, 3],
    "pyramid_blocks": [0, 1, 2, 3],
    "num_proposals": 4,
    "query_width": 16,
    "query_heads": 2,
    "num_stages": 1,
    "query_mlp_width": 16,
    "dynamic_width": 4,
    "decoder_width": 16,
    "decoder_heads": 2,
    "action_width": 16,
}
PLAN = runner.Plan(steps=2, start_steps=3, clips=2, batch_size=2, model=MINUTE)
NAMES = ["cost", "keep_rate=0.7,p", "keep_rate=0.7,keep", "keep_rate=0.7,decoder_", "keep_rate=0.7,times="]


def test_rows_and_trends_name_what_exists():
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    used = {row.run for experiment in EXPERIMENTS for row in experiment.rows}
    assert used == set(names)
    for experiment in EXPERIMENTS:
        labels = [row.label for row in experiment.rows]
        assert len(set(labels)) == len(labels)
        assert all({trend.high, trend.low} <= set(labels) for trend in experiment.trends)
    rates = {run.name: run.rates for run in RUNS}
    assert all(row.rate is None or row.rate in rates[row.run] for e in EXPERIMENTS for row in e.rows)


def test_runs_resumes_and_reports(tmp_path, monkeypatch):
    """Stopped before its last run, then started again: what is on record stays, the rest is made."""
    records, work = tmp_path / "runs", tmp_path / "work"
    make, calls = runner.make, []

    def stopping(run, *args):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(run.name)
        return make(run, *args)

    monkeypatch.setattr(runner, "make", stopping)
    with pytest.raises(KeyboardInterrupt):
        schedule.make_all(PLAN, NAMES, [5], records, work)
    before = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert len(before) == 6
    monkeypatch.setattr(runner, "make", make)
    made = schedule.make_all(PLAN, NAMES, [5], records, work)
    assert made == sum(run.name.startswith(tuple(NAMES)) for run in RUNS) - 6
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(list((work / "start=3,bfloat16").glob("*,seed=5"))) == 1
    record = json.loads((records / "keep_rate=0.7,pruning=random,seed=5,bfloat16.json").read_text())
    assert record["steps"] == 2 and record["model"]["pruning"] == "random" and record["machine"]["commit"]
    assert set(record["evaluations"]["by_rate"]) == {"0.7"}
    longer = json.loads((records / "keep_rate=0.7,times=3,seed=5,bfloat16.json").read_text())
    assert longer["steps"] == 6 and longer["run"] == "keep_rate=0.7,times=3" and longer["model"]["keep_rate"] == 0.7
    assert schedule.make_all(PLAN, NAMES, [5], records, work) == 0
    paper.main(["--report", "--out", str(tmp_path)])
    text = (tmp_path / "REPORT.md").read_text()
    assert "3 steps that only locate" in text and "| memory, 1.0 | 100 | 100.00 | 1 |" in text


def test_several_at_once_make_the_same(tmp_path):
    """Runs of two seeds in two processes: each after its seed's start, equal to a run of its own."""
    name = "keep_rate=0.7,pruning=random"
    assert schedule.make_all(PLAN, [name, "cost,keep_rate=0.7"], [5, 6], tmp_path / "runs", tmp_path / "work", 2) == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, os.cpu_count() // 2))  # as each of the two
    try:
        assert schedule.make_all(PLAN, [name], [6], tmp_path / "alone", tmp_path / "elsewhere") == 1
    finally:
        torch.set_num_threads(threads)
    two, alone = (
        json.loads((tmp_path / folder / f"{name},seed=6,bfloat16.json").read_text())["evaluations"]
        for folder in ("runs", "alone")
    )
    assert two == alone


BUSY_WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from benchmarks.paper.schedule import _begin
with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (1,)) as pool:
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process in /proc")
def test_processes_end_when_the_command_is_killed():
    """Even amid a run, where nothing asks whether the parent is there."""
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen([sys.executable, "-c", BUSY_WORKER], stdout=subprocess.PIPE, text=True, cwd=root) as command:
        worker = int(command.stdout.readline())
        os.kill(worker, 0)  # there is one
        command.kill()
    deadline = time.monotonic() + 60
    while is_running(worker):
        assert time.monotonic() < deadline, "the process goes on without its parent"
        time.sleep(0.05)


def is_running(pid):
    """Whether a process that is not a child of this one works; one that nobody waits for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_rendered_clips_are_the_datasets(tmp_path):
    clips = build({"name": "synthetic", "clips": 3}, "train", EVADConfig.tiny(short_side=48))
    rendered = Rendered(clips, tmp_path)
    for _ in ("rendered", "read"):
        for index in (2, 0):
            ours, theirs = rendered[index], clips[index]
            assert torch.equal(ours.clip, theirs.clip) and ours.key == theirs.key
            assert all(torch.equal(ours.target[name], theirs.target[name]) for name in theirs.target)
    assert len(rendered) == 3 and len(list(tmp_path.glob("*/*"))) == 2
    other = build({"name": "synthetic", "clips": 3, "seed": 1}, "train", EVADConfig.tiny(short_side=48))
    assert not torch.equal(Rendered(other, tmp_path)[0].clip, clips[0].clip)


def fake(run, seed, **metrics):
    kind = next(r.kind for r in RUNS if r.name == run)
    by_rate = {"0.7": {name.replace("mAP", "mAP@0.5"): value for name, value in metrics.items()}}
    machine = {"device": "a machine", "threads": 1, "torch": "2", "commit": "abc"}
    evaluations = {"own_rate": "0.7", "clips": 9, "by_rate": by_rate}
    steps = {"steps": 7, "start_steps": 8, "batch_size": 2, "precision": "float8"} if kind == "train" else {"steps": 0}
    return {"run": run, "seed": seed, "kind": kind, "evaluations": evaluations, "machine": machine, **steps}


@pytest.mark.parametrize(
    ("attention", "random", "words"),
    [
        ((0.6, 0.7, 0.8), (0.5, 0.6, 0.7), "holds (+10.00 ± 0.00)"),
        ((0.5, 0.6, 0.7), (0.6, 0.7, 0.8), "**does not hold (-10.00 ± 0.00)**"),
        # Gaps of 8, 10 and 12: their deviation is 2, t of two degrees of freedom 4.303, 4.303 * 2 / sqrt(3) = 4.97.
        ((0.58, 0.70, 0.82), (0.5, 0.6, 0.7), "holds (+10.00 ± 4.97)"),
        ((0.6, 0.7, 0.8), (0.6, 0.6, 0.5), "**undecided (+13.33 ± 37.95)**"),
        ((0.6,), (0.5,), "seen, no claim from 1 seed (+10.00)"),
        ((0.5, 0.5), (0.6, 0.6), "**not seen**, no claim from 2 seeds (-10.00"),
        ((0.6,), (), "**not run**"),
    ],
)
def test_verdicts(attention, random, words):
    records = {
        name: [fake(name, seed, mAP=value) for seed, value in enumerate(values)]
        for name, values in (("keep_rate=0.7", attention), ("keep_rate=0.7,pruning=random", random))
    }
    experiment = next(e for e in EXPERIMENTS if e.title.startswith("Table 1b"))
    assert f"attention is above random (attention (GAP) against random): {words}" in report.verdict(
        experiment.trends[0], experiment, records
    )


def test_time_counts_on_a_quiet_machine_alone():
    experiment = next(e for e in EXPERIMENTS if e.title.startswith("Figure 8"))
    for load, expected in ((1.2, {("", 0): 75.0}), (3.0, {})):
        records = {
            f"cost,keep_rate={rate}": [
                {"kind": "cost", "seed": 0, "cost": {"seconds": rate + 0.2}, "machine": {"load": load, "threads": 1}}
            ]
            for rate in (1.0, 0.7)
        }
        assert report.values(experiment.rows[3], records) == pytest.approx(expected)


def test_within_is_asked_of_the_difference():
    experiment = next(e for e in EXPERIMENTS if e.title.startswith("Table 1d"))
    for gap, words in ((-0.4, ": holds"), (-0.6, ": **does not hold")):
        records = {
            "keep_rate=0.7": [fake("keep_rate=0.7", seed, mAP=0.5 + gap / 100) for seed in range(3)],
            "keep_rate=0.7,decoder_input=all": [fake("keep_rate=0.7,decoder_input=all", s, mAP=0.5) for s in range(3)],
        }
        assert words in report.verdict(experiment.trends[0], experiment, records)


def test_the_readme_claims_what_the_records_say():
    readme = paper.README.read_text()
    records = report.read_records(paper.HERE / "runs")
    assert readme == report.with_claims(readme, records), "run python -m benchmarks.paper --report"
    expected = report.text(records, report.read_records(paper.HERE / "earlier"))
    assert (paper.HERE / "REPORT.md").read_text() == expected, "run python -m benchmarks.paper --report"
    with pytest.raises(ValueError, match="must hold the markers"):
        report.with_claims("no markers", records)


def test_only_three_seeds_make_a_claim():
    names = ("keep_rate=0.7", "keep_rate=1.0", "keep_rate=0.7,pruning=random", "keep_rate=0.7,pruning=least")
    records = {name: [fake(name, seed, mAP=0.5) for seed in range(3)] for name in names[1:3]}
    records[names[0]] = [fake(names[0], seed, mAP=0.5 + (seed - 0.5) / 100) for seed in range(3)]
    records[names[3]] = [fake(names[3], seed, mAP=0.2) for seed in range(2)]
    table = report.claims(records)
    # Gaps of -0.5, 0.5 and 1.5: 4.303 / sqrt(3) = 2.48 around 0.5.
    row = "attention is above random (attention (GAP) against random) | +0.6 | +0.5 (-2.0 to +3.0) | undecided |"
    assert f"| Table 1b: {row}" in table and "least important" not in table
    # Asked in three tables of the same runs, said once.
    assert "| Table 1a, Table 1b, Table 2a: with the decoder, 0.7 is as good as 1.0 (" in table
    assert table.count("| +0.0 | +0.5 (-2.0 to +3.0) | undecided (at least -1.0) |") == 1


def test_a_difference_of_differences():
    """The decoder gains 3 points at rate 0.7 and 1 at 1.0, so it makes up for 2; the paper's, 8.0 and 4.1."""
    levels = {"0.7": 0.73, "0.7,decoder_depth=0": 0.70, "1.0": 0.81, "1.0,decoder_depth=0": 0.80}
    runs = {f"keep_rate={name}": level for name, level in levels.items()}
    records = {run: [fake(run, seed, mAP=level + seed / 100) for seed in range(3)] for run, level in runs.items()}
    experiment = next(e for e in EXPERIMENTS if e.title.startswith("Table 1a"))
    found = report.compare(experiment.trends[-1], experiment, records)
    assert found.gaps == pytest.approx([2.0] * 3) and found.paper == pytest.approx(3.9) and found.verdict == "holds"


def test_runs_are_compared_within_a_start():
    names = ("keep_rate=0.7", "keep_rate=0.7,pruning=random")
    records = {name: [fake(name, seed, mAP=0.5) | {"start_sha256": "a"} for seed in range(3)] for name in names}
    records[names[0]][1]["start_sha256"] = "b"
    experiment = next(e for e in EXPERIMENTS if e.title.startswith("Table 1b"))
    assert len(report.compare(experiment.trends[0], experiment, records).gaps) == 2
    records[names[1]][2]["precision"] = "float16"
    assert len(report.compare(experiment.trends[0], experiment, records).gaps) == 1


def test_a_seed_counts_once_whatever_its_precisions():
    """Seed 0 has a gap of 10 and one of 20, seeds 1 and 2 one each: 15, 12 and 15."""
    levels = {"keep_rate=0.7": (0.6, 0.62, 0.65), "keep_rate=0.7,pruning=random": (0.5, 0.5, 0.5)}
    records = {name: [fake(name, seed, mAP=level) for seed, level in enumerate(of)] for name, of in levels.items()}
    for name, level in (("keep_rate=0.7", 0.7), ("keep_rate=0.7,pruning=random", 0.5), ("keep_rate=1.0", 0.8)):
        records.setdefault(name, []).append(fake(name, 0, mAP=level) | {"precision": "float16"})
    experiment = next(e for e in EXPERIMENTS if e.title.startswith("Table 1b"))
    assert report.compare(experiment.trends[0], experiment, records).gaps == pytest.approx([15.0, 12.0, 15.0])
    unit = experiment.unit
    lines = report.table(experiment, records)
    assert lines[0] == f"| | paper | ours, {unit}, float16 | seeds | ours, {unit}, float8 | seeds |"
    assert "| attention (GAP) | 30.5 | 70.00 | 1 | 62.33 ± 2.52 | 3 |" in lines
    assert "| no pruning | 30.5 | 80.00 | 1 | not run |  |" in lines
    for some in records.values():
        some[:] = [record for record in some if record["precision"] == "float8"]
    lines = report.table(experiment, records)
    assert lines[0] == f"| | paper | ours, {unit} | seeds |"
    assert "| attention (GAP) | 30.5 | 62.33 ± 2.52 | 3 |" in lines and "| no pruning | 30.5 | not run |  |" in lines


def test_report_without_records_says_not_run():
    text = report.text({}, {})
    assert text.count("**not run**") == sum(len(experiment.trends) for experiment in (*EXPERIMENTS, EARLIER))
    assert "holds (" not in text and "holds |" not in text
