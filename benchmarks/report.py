"""What the benchmarks wrote, as the README's tables and a plot: every number there comes from results/*.json.

python -m benchmarks.report
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import plots
from benchmarks.ceilings import Ceilings

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


# results/<machine>.json: the machine, and its rows; a row that is measured again replaces the old one


def machine(ceilings: Ceilings) -> dict:
    if ceilings.device == "cpu":
        threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
        name, vector = _cpu_name(), torch.backends.cpu.get_cpu_capability()
        flags = _cpu_flags()
        hardware = f"{name}, {threads}, {vector}{' with AMX bf16' if 'amx_bf16' in flags else ''}"
    else:
        hardware = torch.cuda.get_device_name(ceilings.device)
    software = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        software["triton"] = version("triton")
    if torch.version.cuda and ceilings.device != "cpu":
        software |= {"cuda": torch.version.cuda, "driver": _driver()}
    return {"hardware": hardware, "system": platform.platform(terse=True), **software, "ceilings": ceilings.summary()}


def _cpu_name() -> str:
    try:
        return re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


@functools.cache  # nvidia-smi takes most of a second, and every row is written at once
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _cpu_flags() -> set[str]:
    try:
        return set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    except (OSError, TypeError):
        return set()


def commit() -> str:
    """The commit measured; "+" where sources differ from it."""

    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "evad_kernels", "csrc", "evad", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("EVAD_KERNELS_COMMIT", "unknown")  # a copy of a checkout may come without .git


def path_of(here: dict, device: str) -> Path:
    """A machine's file."""
    slug = re.sub(r"\((r|tm)\)|processor|cpu @.*", "", here["hardware"].split(", ")[0].lower())
    cores = f"-{os.cpu_count()}-cores" if device == "cpu" else ""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", slug).strip("-") + cores + ".json")


def record(rows: list[dict], ceilings: Ceilings) -> Path:
    """Merge ``rows`` into this machine's file and return its path."""
    here = machine(ceilings)
    path = path_of(here, ceilings.device)
    stamp = {"commit": commit(), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    fresh = {identity(row): {**row, **stamp} for row in rows}
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {identity(row): row for row in kept} | fresh
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join("    " + json.dumps(row) for row in sorted(merged.values(), key=identity_order(merged)))
    draft = path.with_suffix(".draft")  # whoever stops this leaves a whole file
    draft.write_text(f'{{\n  "machine": {json.dumps(here)},\n  "rows": [\n{lines}\n  ]\n}}\n')
    return draft.replace(path)


def identity(row: dict) -> tuple[str, str]:
    return row["op"], row["case"]


def identity_order(rows: dict):
    """Benchmarks by name, ops of one and rows of an op in the order in which they ran."""
    order = {key: number for number, key in enumerate(rows)}
    ops = list(dict.fromkeys(op for op, _ in rows))
    return lambda row: (row["bench"], ops.index(row["op"]), order[identity(row)])


def load() -> list[dict]:
    """Every machine's file, and the names of its plots that there are; the machine that multiplies fastest first."""
    results = []
    for path in sorted(RESULTS.glob("*.json")):
        files = {name: file.name for name, file in plot_files(path).items() if file.exists()}
        results.append(json.loads(path.read_text()) | {"plots": files})
    return sorted(results, key=lambda result: -result["machine"]["ceilings"].get("matmul bfloat16 TFLOP/s", 0))


def plot_files(path: Path) -> dict[str, Path]:
    """Where the plots of a machine's file lie."""
    endings = {"attention": "", "harvest": "-harvest", "training": "-training"}
    return {name: path.with_name(f"{path.stem}{ending}.png") for name, ending in endings.items()}


# Tables


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, 3 - whole)}f}"


def cells(row: dict) -> dict[str, str]:
    """A row in words: what every table shows of it."""
    times = row["times"]
    ours = times["ours"]
    launched = row.get("launched", {}).keys() - {"ours"}
    rivals = (
        f"{name} {number(time['ms'] / times['ours, launched']['ms'])}x (both launched)"
        if name in launched
        else f"{name} {number(time['ms'] / ours['ms'])}x"
        for name, time in times.items()
        if name != "ours"
    )
    floor = row.get("floor")
    memory = row.get("memory_mb", {})
    return {
        "case": row["case"],
        "ms": f"{number(ours['ms'])} ({number(ours['p20'])}-{number(ours['p80'])})",
        "of floor": f"{floor['reached']:.0%} ({floor['bound']})" if floor else "",
        "rivals take, times ours": ", ".join(rivals),
        "extra memory, MB": ", ".join(f"{name} {number(value)}" for name, value in memory.items()),
        "goals": "; ".join(map(verdict, row["goals"])),
    }


def verdict(goal: dict) -> str:
    if goal["reached"] is None:
        return f"not measured: {goal['goal']}"
    return f"{'met' if goal['met'] else 'MISSED'}: {goal['goal']} ({number(goal['reached'])})"


def missed(rows: list[dict]) -> list[str]:
    """Goals that are not met; one that was not measured is not."""
    return [
        f"{row['op']}, {row['case']}: {goal['goal']}, "
        + ("not measured" if goal["reached"] is None else f"reached {number(goal['reached'])}")
        for row in rows
        for goal in row["goals"]
        if not goal["met"]
    ]


def agreements(rows: list[dict]) -> list[str]:
    """How far approximations agree with what they approximate, a line a row."""
    return [
        f"{row['op']}, {row['case']}: "
        + "; ".join(
            f"{name} " + ", ".join(f"{measure} {number(value)}" for measure, value in measures.items())
            for name, measures in row["details"]["agreement"].items()
        )
        for row in rows
        if "agreement" in row.get("details", {})
    ]


def reasons(rows: list[dict], what: str) -> list[str]:
    """Why a rival did not run ("unavailable") or not as a graph ("launched"); a line an op, rival and reason."""
    cases = {}
    for row in rows:
        for rival, reason in row.get(what, {}).items():
            cases.setdefault((row["op"], rival, reason), []).append(row["case"])
    return [
        f"{op}, {found[0] if len(found) == 1 else f'{len(found)} cases'}: {rival}: {reason}"
        for (op, rival, reason), found in cases.items()
    ]


def table(rows: list[dict], columns: tuple[str, ...]) -> str:
    """Markdown, op by op."""
    lines = ["| op, case | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    op = None
    for row in rows:
        if row["op"] != op:
            op = row["op"]
            lines.append(f"| **{op}** |" + " |" * len(columns))
        shown = cells(row)
        lines.append(f"| {row['case']} | " + " | ".join(shown[column] for column in columns) + " |")
    return "\n".join(lines)


def heading(here: dict) -> str:
    software = ", ".join(f"{name} {here[name]}" for name in ("torch", "triton", "cuda", "driver") if name in here)
    rates = (f"{name.rpartition(' ')[0]} {rate:g} {name.rpartition(' ')[2]}" for name, rate in here["ceilings"].items())
    return f"**{here['hardware']}**; {software}. Ceilings, measured: {', '.join(rates)}."


def outcome(rows: list[dict]) -> str:
    """How many goals are met, and those that are not."""
    goals, misses = [goal for row in rows for goal in row["goals"]], missed(rows)
    unknown = sum(goal["reached"] is None for goal in goals)
    text = f"Goals met: {len(goals) - len(misses)} of {len(goals)}{f', {unknown} not measured' if unknown else ''}."
    return "\n".join(
        [text + (" Missed:" if misses else ""), *([""] if misses else []), *(f"* {miss}" for miss in misses)]
    )


def tables(results: list[dict], headlines: bool) -> str:
    """Markdown: for every machine its rows, or its headline rows alone, and the goals missed in any row.

    Of headlines those of the first machine are seen, the others' unfold.
    """
    columns = ("ms", "of floor", "rivals take, times ours") + (() if headlines else ("extra memory, MB", "goals"))
    parts = []
    for place, result in enumerate(results):
        folded = headlines and place > 0
        rows = result["rows"]
        parts += [f"<details><summary>{result['machine']['hardware']}</summary>"] if folded else []
        commits = sorted({f"{row['commit']} ({row['date']})" for row in rows})
        parts.append(heading(result["machine"]))
        parts.append(table([row for row in rows if row["headline"] or not headlines], columns))
        folder = f"{RESULTS.relative_to(ROOT)}/" if headlines else ""
        parts += picture(
            result, "attention", "keyframe_attention_topk: time against tokens, peers and the floor", folder
        )
        if not headlines and (lines := agreements(rows)):
            parts.append("Agreement with the unpatched model (random weights: no accuracy):")
            parts.append("\n".join(f"* {line}" for line in lines))
        for what, title in (
            ("unavailable", "Rivals that did not run:"),
            ("launched", "Timed as plain calls, for no graph holds them (other calls on a GPU are replays of graphs):"),
        ):
            if not headlines and (lines := reasons(rows, what)):
                parts += [title, "\n".join(f"* {line}" for line in lines)]
        parts.append(f"{outcome(rows)}\n\nCommit measured: {', '.join(commits)}.")
        parts += ["</details>"] if folded else []
    return "\n\n".join(parts)


def picture(result: dict, name: str, words: str, folder: str = "") -> list[str]:
    return [f"![{words}]({folder}{result['plots'][name]})"] if name in result.get("plots", {}) else []


def with_tables(readme: str, results: list[dict]) -> str:
    """``readme`` with what stands between the markers replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md must hold the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables(results, headlines=True)}\n{END}{after}"


def summary(rows: list[dict]) -> str:
    """The rows of one run, for a terminal."""
    lines, op = [], None
    for row in rows:
        if row["op"] != op:
            op = row["op"]
            lines.append(op)
        shown = cells(row)
        floor = f"   of floor {shown['of floor']}" if shown["of floor"] else ""
        lines.append(f"  {row['case']:36} {shown['ms']:>24} ms{floor}")
        lines.append(f"      rivals take {shown['rivals take, times ours']}")
        lines += [f"      extra memory, MB: {shown['extra memory, MB']}"] if shown["extra memory, MB"] else []
        lines += [f"      {goal}" for goal in shown["goals"].split("; ") if goal]
        lines += [f"      agreement: {line.partition(': ')[2]}" for line in agreements([row])]
        lines += [f"      {name} did not run: {reason}" for name, reason in row["unavailable"].items()]
        lines += [f"      {name} is no graph: {reason}" for name, reason in row.get("launched", {}).items()]
    misses = missed(rows)
    goals = sum(len(row["goals"]) for row in rows)
    return "\n".join([*lines, f"{goals - len(misses)} of {goals} goals met"])


# The detector's tables: rows with "details" (bench_evad.py), beside what the paper has of them

FRAMES = 16  # a clip; the paper counts frames a second
PAPER_SPEED = {  # ViT-B, short side -> keep rate: frames/s on an A100, batch 8 (Tables 2 and 3); ViT-L in Table 4
    ("vit_b", 224): {"1.0": 298, "0.9": 328, "0.8": 377, "0.7": 411, "0.6": 427},
    ("vit_b", 256): {"1.0": 219, "0.7": 334},
    ("vit_b", 288): {"1.0": 171, "0.9": 179, "0.8": 216, "0.7": 240, "0.6": 263},
    ("vit_l", 288): {"0.7": 153},
}
PAPER_GFLOPS = {
    ("vit_b", 224): {"1.0": 223.8, "0.9": 186.3, "0.8": 157.0, "0.7": 134.2, "0.6": 116.3},
    ("vit_b", 256): {"1.0": 311.9, "0.7": 182.3},
    ("vit_b", 288): {"1.0": 424.5, "0.9": 346.3, "0.8": 287.4, "0.7": 242.8, "0.6": 208.9},
    ("vit_l", 288): {"0.7": 737},
}
PAPER_MAP = {
    ("vit_b", 224): {"1.0": 30.5, "0.9": 30.6, "0.8": 30.5, "0.7": 30.7, "0.6": 30.2},
    ("vit_b", 256): {"1.0": 31.2, "0.7": 31.4},
    ("vit_b", 288): {"1.0": 32.1, "0.9": 32.2, "0.8": 32.1, "0.7": 32.3, "0.6": 31.4},
    ("vit_l", 288): {"0.7": 39.7},
}
PAPER_TRAINING_SAVED = {"memory": 0.47, "time": 0.36}  # at keep rate 0.7 (section 4.3, Fig. 8)


def milliseconds(row: dict) -> dict[str, float]:
    """Keep rate -> time of a batch."""
    times = {name.removeprefix("rate "): time["ms"] for name, time in row["times"].items() if name.startswith("rate ")}
    times["0.7"] = row["times"]["ours"]["ms"]
    return dict(sorted(times.items(), reverse=True))


def harvest(row: dict) -> dict[str, float]:
    """Keep rate -> speed-up over rate 1 by the share of operations saved."""
    times, gflops = milliseconds(row), row["details"]["gflops"]
    return {rate: times["1.0"] / ms * gflops[rate] / gflops["1.0"] for rate, ms in times.items()}


def lines_of(head: tuple[str, ...], rows: list[tuple]) -> str:
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(text + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def harvest_table(rows: list[dict]) -> str:
    body = []
    for row in rows:
        times, gflops, got = milliseconds(row), row["details"]["gflops"], harvest(row)
        clips = row["details"]["batch"]
        for rate, ms in times.items():
            ideal = gflops["1.0"] / gflops[rate]
            speed = f"{number(times['1.0'] / ms)}x of {number(ideal)}x"
            name = f"{row['case']}, {clips} clip{'s' * (clips > 1)}" if rate == "1.0" else ""
            body.append((name, rate, number(gflops[rate]), number(1e3 * clips / ms), speed, f"{got[rate]:.2f}"))
    head = ("model", "keep rate", "GFLOPs a clip", "clips/s", "speed-up of what operations allow", "harvest")
    return lines_of(head, body)


def parts_table(rows: list[dict], peaks: dict[str, float]) -> str:
    body = []
    for row in rows:
        details = row["details"]
        peak = peaks.get(f"matmul {details['dtype']} TFLOP/s")
        before, after = details["ms_by_part"]["1.0"], details["ms_by_part"]["0.7"]
        for place, part in enumerate(after):
            gflops = details["gflops_by_part"]["0.7"].get(part)
            rate = 2e-3 * gflops * details["batch"] / (after[part] * 1e-3) if gflops else None  # TFLOP/s, 2 a mac
            body.append(
                (
                    "" if place else row["case"],
                    part.replace("_", " "),
                    f"{number(before[part])}, {before[part] / sum(before.values()):.0%}",
                    f"{number(after[part])}, {after[part] / sum(after.values()):.0%}",
                    f"{rate / peak:.0%}" if rate and peak else "",
                )
            )
    return lines_of(("model", "part", "ms at rate 1.0, share", "ms at 0.7, share", "of the matrix peak at 0.7"), body)


def paper_tables(rows: list[dict]) -> str:
    """Tables 2, 3 and 4, theirs and ours."""
    ours = {}  # (preset, short side, rate) -> GFLOPs and frames/s of the largest batch
    rows = [row for row in rows if row["details"]["dtype"] == "bfloat16"] or rows
    dtype = ", ".join(dict.fromkeys(row["details"]["dtype"] for row in rows))
    for row in rows:
        details = row["details"]
        if details["size"][0] == details["size"][1]:
            for rate, ms in milliseconds(row).items():
                entry = details["batch"], details["gflops_paper"][rate], 1e3 * FRAMES * details["batch"] / ms
                key = details["model"], details["size"][0], rate
                ours[key] = max(ours.get(key, entry), entry)

    def rows_of(keys):
        for preset, side, rate in keys:
            if (preset, side, rate) in ours:
                _, gflops, speed = ours[preset, side, rate]
                theirs = (table[preset, side].get(rate, "") for table in (PAPER_MAP, PAPER_GFLOPS, PAPER_SPEED))
                yield preset, side, rate, *theirs, f"{gflops:.1f}", number(speed)

    head = ("model", "short side", "keep rate", "paper: mAP", "GFLOPs", "frames/s (A100)", "ours: GFLOPs")
    head += (f"frames/s ({dtype})",)
    tables = {
        "Table 2, keep rates": [("vit_b", side, rate) for side in (224, 288) for rate in PAPER_SPEED["vit_b", side]],
        "Table 3, resolutions": [
            ("vit_b", side, rate)
            for side, rate in ((224, "1.0"), (256, "0.7"), (256, "1.0"), (288, "0.7"), (288, "1.0"))
        ],
        "Table 4, models": [("vit_b", 288, "0.7"), ("vit_l", 288, "0.7")],
    }
    found = {name: list(rows_of(keys)) for name, keys in tables.items()}
    return "\n\n".join(f"{name}\n\n{lines_of(head, body)}" for name, body in found.items() if body)


def training_table(rows: list[dict]) -> str:
    body = []
    for row in rows:
        times, memory = milliseconds(row), row["details"]["training_mb"]
        fit = row["details"].get("clips_that_fit", {})
        for rival, name in (("backend reference", "0.7, plain PyTorch"), ("eager", "0.7, eager")):
            if rival in row["times"] and rival in memory:
                times[name] = row["times"][rival]["ms"]
                memory = memory | {f"rate {name}": memory[rival]}
                fit = fit | {f"rate {name}": fit[rival]} if fit else fit
        for rate, ms in times.items():
            case, megabytes = row["case"] if rate == next(iter(times)) else "", memory.get(f"rate {rate}")
            of_memory = "", ""  # it did not fit
            if megabytes is not None and "rate 1.0" in memory:
                of_memory = number(megabytes), f"{1 - megabytes / memory['rate 1.0']:.0%}"
            saved = f"{1 - ms / times['1.0']:.0%}" if "1.0" in times else ""
            line = (case, rate, number(ms), saved, *of_memory)
            body.append((*line, fit.get(f"rate {rate}", "")) if fit else line)
    theirs = ", ".join(f"{saved:.0%} of {what}" for what, saved in PAPER_TRAINING_SAVED.items())
    by = rows[0]["details"]["mb_by"]
    head = ("model", "keep rate", "ms a step", "saved", "MB", "saved")
    head += ("clips that fit, in proportion",) if any(len(line) > len(head) for line in body) else ()
    return f"{lines_of(head, body)}\n\nMemory: {by}. The paper saves {theirs} at keep rate 0.7 (Fig. 8, GPU)."


def harvest_curve(row: dict) -> plots.Curve:
    times, gflops = milliseconds(row), row["details"]["gflops"]
    return (
        row["case"],
        {rate: times["1.0"] / ms for rate, ms in times.items()},
        {rate: gflops["1.0"] / gflops[rate] for rate in times},
    )


def training_curve(row: dict) -> plots.Curve:
    memory = {name.removeprefix("rate "): value for name, value in row["details"]["training_mb"].items()}
    times = milliseconds(row)
    rates = [rate for rate in times if rate in memory and "1.0" in memory and "1.0" in times]
    return row["case"], {rate: memory[rate] for rate in rates}, {rate: times[rate] for rate in rates}


def detector_rows(result: dict) -> tuple[list[dict], list[dict]]:
    """Rows of the detector's inference, and of its training."""
    rows = [row for row in result["rows"] if "details" in row]
    return tuple([row for row in rows if key in row["details"]] for key in ("ms_by_part", "training_mb"))


def draw_plots(result: dict, path: Path) -> None:
    """The plots of a machine's file, beside it."""
    files, (inference, training) = plot_files(path), detector_rows(result)
    plots.attention(result["rows"], files["attention"])
    plots.harvest(map(harvest_curve, inference), files["harvest"])
    plots.training(map(training_curve, training), PAPER_TRAINING_SAVED, files["training"])


def detector_tables(result: dict) -> str:
    """Markdown of what bench_evad.py measured on a machine; empty where it has not."""
    inference, training = detector_rows(result)
    parts = []
    if inference:
        peaks = result["machine"]["ceilings"]
        parts += ["### The detector by keep rate", harvest_table(inference)]
        parts += picture(result, "harvest", "speed-up by keep rate, and as operations go")
        parts += ["### Its parts", parts_table(inference, peaks)]
    if inference and (tables := paper_tables(inference)):
        parts += ["### The paper's tables", tables]
    if training:
        parts += ["### Training", training_table(training)]
        parts += picture(result, "training", "memory and time of a training step by keep rate")
    return "\n\n".join([f"## {result['machine']['hardware']}", *parts]) if parts else ""


def all_tables(results: list[dict]) -> str:
    """results/README.md."""
    source = "Written by `python -m benchmarks.report` from the JSON files here."
    detector = filter(None, map(detector_tables, results))
    return "\n\n".join(["# Results", source, tables(results, headlines=False), *detector]) + "\n"


def update() -> None:
    """The plots, the README's tables and those beside the results, from what lies in results/."""
    for path in RESULTS.glob("*.json"):
        draw_plots(json.loads(path.read_text()), path)
    readme, results = ROOT / "README.md", load()
    readme.write_text(with_tables(readme.read_text(), results))
    if results:
        (RESULTS / "README.md").write_text(all_tables(results))


if __name__ == "__main__":
    update()
