"""The benchmarks' machinery: goals, memory, tables. The benchmarks themselves run with `pytest --benchmark`."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from triton.runtime import JITFunction

from benchmarks import _harness, bench_evad, ceilings, gpu_check, profile_kernels, report, tune_keyframe_attention
from benchmarks._harness import Contestants, Goal, measure_memory
from benchmarks.ceilings import Ceilings, Work
from evad import EVAD, EVADConfig
from evad_kernels import keyframe_attention_tuning as tuning


def build_allocation(device, size):
    """Ours holds ``size`` MB beside its result, the rival four times that."""

    def hold(megabytes):
        return torch.ones(megabytes * 250_000, device=device).sum()

    return Contestants(lambda: hold(size), {"rival": lambda: hold(4 * size)}, lambda: None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory of a CPU op is read from Linux's /proc")
def test_peak_memory_is_what_a_call_needs_beside_its_result():
    memory = measure_memory(build_allocation, {"size": 40}, {"size": 1}, False, ("ours", "rival"))
    assert memory == {"ours": pytest.approx(40e6, rel=0.1), "rival": pytest.approx(160e6, rel=0.1)}


def test_goals_compare_with_the_rival_named():
    milliseconds = {"ours": 2.0, "eager": 16.0, "SDPA": 2.2}
    assert Goal("speed-up", 8, "eager").outcome(milliseconds, {}) == {
        "goal": "at least 8x eager",
        "reached": 8.0,
        "met": True,
    }
    assert not Goal("time", 0.9, "SDPA").outcome(milliseconds, {})["met"]
    assert Goal("ms", 2.5).outcome(milliseconds, {})["met"]
    assert not Goal("memory", 0.05, "the map", 100).outcome(milliseconds, {"ours": 6})["met"]


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        (Goal("speed-up", 2, "absent"), "at least 2x absent"),
        (Goal("speed-up", 2, ("absent", "another")), "at least 2x the fastest of absent, another"),
        (Goal("time", 0.9, "absent"), "at most 0.9 of absent"),
        (Goal("harvest", 0.9, "absent", 1.5), "90% of 1.5x, what the operations saved from absent allow"),
        (Goal("memory", 0.05, "the map", 100), "extra memory at most 5% of the map"),
        (Goal("memory", 0.05, "eager"), "extra memory at most 5% of eager"),
        (Goal("floor", 1.35), "at most 1.35 times the floor"),
    ],
)
def test_a_goal_that_was_not_measured_stays_in_the_count(goal, text):
    outcome = goal.outcome({"ours": 2.0, "eager": 16.0}, {})
    assert outcome == {"goal": text, "reached": None, "met": False}
    rows = [row("a", 1.0, 3.0, True), {**row("b", 1.0, 3.0, True), "goals": [outcome]}]
    assert report.outcome(rows) == f"Goals met: 1 of 2, 1 not measured. Missed:\n\n* op, b: {text}, not measured"
    assert f"      not measured: {text}\n1 of 2 goals met" in report.summary(rows)


def test_a_rival_without_a_graph_is_compared_with_ours_launched():
    milliseconds = {"ours": 1.0, "ours, launched": 4.0, "mask": 12.0, "scatter": 5.0}
    assert Goal("speed-up", 4, "mask").outcome(milliseconds, {}, launched=("mask",)) == {
        "goal": "at least 4x mask, both launched",
        "reached": 3.0,
        "met": False,
    }
    assert Goal("speed-up", 4, "scatter").outcome(milliseconds, {}, launched=("mask",))["met"]
    fastest = Goal("time", 0.5, ("scatter", "mask")).outcome(milliseconds | {"mask": 4.5}, {}, launched=("mask",))
    assert fastest["goal"] == "at most 0.5 of the fastest of scatter, mask (mask), both launched"
    assert fastest["reached"] == 0.8889
    assert "launched" not in Goal("memory", 0.5, "mask").outcome(milliseconds, {}, launched=("mask",))["goal"]


def contest(monkeypatch, **attributes):
    class Benchmark:
        stats = None

        def pedantic(self, function, setup=lambda: None, rounds=1):
            setup()
            function()

    found = _harness.Contest(Benchmark(), "op", Ceilings("cpu"), True, [])
    for name, value in attributes.items():
        monkeypatch.setattr(found, name, value)
    return found


def test_rows_say_what_no_graph_holds(monkeypatch):
    def capture(function):
        if function() == "refuses":
            raise RuntimeError("cannot be captured\nbecause")
        return lambda: f"{function()} replayed"

    monkeypatch.setattr(_harness, "captured", capture)
    functions = {name: lambda name=name: name for name in ("ours", "graph", "refuses", "waits")}
    here = contest(monkeypatch, _calls=lambda function, calls: function())
    several, launched = here._several(functions, ("waits", "did not run"), True)
    assert launched == {"waits": "waits for the device", "refuses": "RuntimeError: cannot be captured"}
    assert {name: call(1) for name, call in several.items()} == {
        "ours": "ours replayed",
        "graph": "graph replayed",
        "refuses": "refuses",
        "waits": "waits",
        "ours, launched": "ours",
    }
    plain, nothing = here._several(functions, ("waits",), False)
    assert not nothing and plain["graph"](1) == "graph"
    functions["ours"] = lambda: "refuses"  # then nothing is a replay: plain calls are compared with plain calls
    plain, launched = here._several(functions, (), True)
    assert list(launched) == ["ours"] and plain["graph"](1) == "graph" and "ours, launched" not in plain


def build_slow_rivals(device, seconds):
    def sleep(of):
        return lambda: time.sleep(of)

    return Contestants(sleep(seconds), {"mask": sleep(4 * seconds), "gone": "why"}, lambda: None, None, ("mask",))


def test_a_row_of_a_gpu(monkeypatch):
    here = contest(monkeypatch, device="cuda", _stream=contextlib.nullcontext)
    monkeypatch.setattr(_harness, "captured", lambda function: lambda: None)
    monkeypatch.setattr(_harness, "bytes_on_gpu", lambda function: 100)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    goals = Goal("speed-up", 2, "mask"), Goal("speed-up", 2, "gone"), Goal("memory", 2, "mask")
    here.run("an op", "case", build_slow_rivals, {"seconds": 5e-3}, goals=goals, memory_of=("ours", "mask"))
    (found,) = here.rows
    assert found["launched"] == {"mask": "waits for the device"} and found["unavailable"] == {"gone": "why"}
    ms = {name: of["ms"] for name, of in found["times"].items()}
    assert ms.keys() == {"ours", "mask", "ours, launched"} and ms["ours, launched"] >= 5
    assert found["goals"][0]["reached"] == pytest.approx(ms["mask"] / ms["ours, launched"], rel=1e-3)
    assert found["goals"][1] == {"goal": "at least 2x gone", "reached": None, "met": False}
    assert found["goals"][2]["reached"] == 1 and json.loads(json.dumps(found)) == found


def test_a_rival_that_takes_long_is_called_once(monkeypatch):
    monkeypatch.setattr(_harness, "PATIENCE", 0.01)
    here = contest(monkeypatch, smoke=False)
    taken = {"ours": 0.05, "long": 0.04, "short": 0.001}
    calls = dict.fromkeys(taken, 0)

    def several(name):
        def call(number):
            calls[name] += 1
            time.sleep(number * taken[name])

        return call

    samples = here._time({name: several(name) for name in taken}, 0.1)
    assert calls["long"] == len(samples["long"]) == 1 and samples["long"][0] >= 0.04
    assert calls["short"] > 2 and len(samples["short"]) >= 1


def test_bfloat16_where_it_is_slow_has_the_ceiling_of_float32(monkeypatch):
    monkeypatch.setattr(ceilings, "bfloat16_is_slow", lambda device: True)
    found = Ceilings("cpu")
    monkeypatch.setattr(found, "_rate", lambda key, make, amount: key)
    assert found.matmul(torch.bfloat16) == found.matmul(torch.float32) == ("matmul", torch.float32)


def test_reports_say_what_no_graph_holds():
    of_graphs = {**row("a", 1.0, 3.0, True), "launched": {"eager": "waits for the device"}, "commit": "c", "date": "d"}
    of_graphs["times"]["ours, launched"] = of_graphs["times"]["ours"] | {"ms": 1.5}
    assert "eager 2.00x (both launched), ours, launched 1.50x" in report.cells(of_graphs)["rivals take, times ours"]
    machine = {"hardware": "M", "torch": "2", "ceilings": {"copy GB/s": 10.0}}
    assert "* op, a: eager: waits for the device" in report.tables([{"machine": machine, "rows": [of_graphs]}], False)
    assert "eager is no graph: waits for the device" in report.summary([of_graphs])


def build_counted(device, calls, N):
    return Contestants(lambda: calls.append(N), {}, lambda: None)


def test_first_calls_are_of_lengths_not_seen(monkeypatch):
    here, calls = contest(monkeypatch), []
    others = {"N3": {"N": 3}, "N4": {"N": 4}}
    here.first_calls("op", "case", build_counted, {"calls": calls, "N": 2}, others, most=1000)
    assert calls == [2, 3, 4]
    (found,) = here.rows
    assert found["goals"][0]["goal"] == "the slowest at most 1000 ms" and found["goals"][0]["met"]
    assert found["details"]["first_call_ms"].keys() == others.keys() and found["times"]["ours"]["rounds"] == 2
    assert report.cells(found) and report.detector_tables({"machine": {"hardware": "M"}, "rows": [found]}) == ""


def test_a_backward_alone_repeats_on_one_graph():
    leaf, forwards = torch.ones(3, requires_grad=True), []
    backward = _harness.backward_of(lambda: forwards.append(0) or leaf * 2, [leaf], torch.arange(3.0))
    assert not forwards
    for _ in range(2):
        torch.testing.assert_close(backward(), (torch.tensor([0.0, 2.0, 4.0]),))
    assert len(forwards) == 1


def test_on_a_gpu_rows_with_goals_come_first():
    found = [(case.values[0], bool(case.marks)) for case in _harness.either({"a": 1}, {"b": 1}, later=["a"]).args[1]]
    assert found == [("a", True), ("b", False)]
    command = [sys.executable, "-m", "pytest", "--benchmark", "--benchmark-device", "cuda", "--collect-only"]
    command += ["benchmarks/bench_keyframe_attention.py"]
    lines = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    cases = [line.partition("::")[2] for line in lines if "::" in line]
    assert cases[0] == "bench_topk[bfloat16 N1568 B8]" and cases[-1] == "bench_compilers[bfloat16 N4608 B8]"
    first_without = next(number for number, case in enumerate(cases) if "D128" in case)
    for name in ("bench_backward", "bench_backward_alone", "bench_importance", "bench_score", "bench_first_call"):
        assert any(case.startswith(f"{name}[") for case in cases[:first_without]), name


def test_floor_is_the_longest_of_bytes_operations_and_exponentials():
    ceilings = Ceilings("cpu")
    ceilings._rates = {("matmul", torch.float32): 1e12, ("exp",): 1e9}
    assert ceilings.floor(Work(flops=1e9, exps=1e7)) == {"ms": 10.0, "bound": "exp"}
    assert ceilings.floor(Work(flops=2e10, exps=1e7)) == {"ms": 20.0, "bound": "flops"}


@pytest.mark.parametrize(("value", "text"), [(0.0421, "0.042"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")])
def test_number(value, text):
    assert report.number(value) == text


def row(case, ours, rival, met):
    times = {name: {"ms": ms, "p20": ms, "p80": ms, "rounds": 5} for name, ms in (("ours", ours), ("eager", rival))}
    goals = [{"goal": "at least 2x eager", "reached": rival / ours, "met": met}]
    return {
        "bench": "op",
        "op": "op",
        "case": case,
        "headline": True,
        "times": times,
        "unavailable": {},
        "goals": goals,
    }


def test_a_row_measured_again_replaces_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(Ceilings, "summary", lambda self: {"copy GB/s": 10.0})
    report.record([row("a", 1.0, 3.0, True), row("b", 1.0, 1.5, False)], Ceilings("cpu"))
    path = report.record([row("b", 1.0, 4.0, True)], Ceilings("cpu"))
    stored = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["times"]["eager"]["ms"]) for row in stored] == [("a", 3.0), ("b", 4.0)]
    assert all(row["commit"] and row["date"] for row in stored)


def test_tables_show_ratios_and_name_the_goals_missed(tmp_path):
    rows = [
        {**row("a", 1.0, 3.0, True), "commit": "c", "date": "d"},
        {**row("b", 1.0, 1.5, False), "commit": "c", "date": "d"},
    ]
    text = report.tables(
        [{"machine": {"hardware": "M", "torch": "2", "ceilings": {"copy GB/s": 10.0}}, "rows": rows}], True
    )
    assert "| a | 1.00 (1.00-1.00) |  | eager 3.00x |" in text
    assert "Goals met: 1 of 2. Missed:\n\n* op, b: at least 2x eager, reached 1.50" in text


def test_headlines_of_other_machines_unfold():
    rows = [{**row("a", 1.0, 3.0, True), "commit": "c", "date": "d"}]
    results = [
        {"machine": {"hardware": name, "torch": "2", "ceilings": {"copy GB/s": 10.0}}, "rows": rows} for name in "MN"
    ]
    text = report.tables(results, True)
    assert text.startswith("**M**;") and text.index("Goals met") < text.index("<details><summary>N</summary>\n\n**N**;")
    assert text.endswith("</details>") and text.count("<details>") == 1
    assert "<details>" not in report.tables(results, False)


def test_the_machine_that_multiplies_fastest_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for name, rate in (("a", 0.1), ("b", 700.0), ("c", 2.0)):
        machine = {"hardware": name, "ceilings": {"matmul bfloat16 TFLOP/s": rate}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": []}))
    assert [result["machine"]["hardware"] for result in report.load()] == ["b", "c", "a"]


def detector_row(case, size, ms, gflops, **details):
    times = {f"rate {rate}": value for rate, value in ms.items() if rate != "0.7"} | {"ours": ms["0.7"]}
    return {
        **row(case, 1.0, 1.0, True),
        "times": {name: {"ms": value, "p20": value, "p80": value, "rounds": 5} for name, value in times.items()},
        "details": {"model": "vit_b", "size": [size] * 2, "batch": 2, "dtype": "bfloat16", "gflops": gflops} | details,
    }


def test_detector_tables_show_the_harvest_and_the_papers_numbers():
    by_part = {"encoder": 75.0, "rest": 5.0}
    inference = detector_row(
        "bfloat16 ViT-B 224",
        224,
        {"1.0": 160.0, "0.7": 100.0, "0.5": 80.0},
        {"1.0": 200.0, "0.7": 100.0, "0.5": 80.0},
        gflops_paper={"1.0": 223.8, "0.7": 134.2, "0.5": 90.0},
        gflops_by_part={rate: {"encoder": 75.0} for rate in ("1.0", "0.7")},
        ms_by_part={"1.0": {"encoder": 150.0, "rest": 10.0}, "0.7": by_part},
    )
    memory = {"rate 1.0": 100.0, "rate 0.7": 60.0, "backend reference": 240.0}
    training = detector_row("step", 224, {"1.0": 300.0, "0.7": 200.0}, {}, training_mb=memory, mb_by="counting")
    training["times"]["backend reference"] = {"ms": 500.0, "p20": 500.0, "p80": 500.0, "rounds": 5}
    machine = {"hardware": "M", "ceilings": {"matmul bfloat16 TFLOP/s": 8.0}}
    text = report.detector_tables({"machine": machine, "rows": [inference, training, row("a", 1.0, 3.0, True)]})
    assert "| bfloat16 ViT-B 224, 2 clips | 1.0 | 200 | 12.5 | 1.00x of 1.00x | 1.00 |" in text
    assert "|  | 0.7 | 100 | 20.0 | 1.60x of 2.00x | 0.80 |" in text
    # 75 G multiply-adds of 2 clips in 75 ms are 4 TFLOP/s.
    assert "| bfloat16 ViT-B 224 | encoder | 150, 94% | 75.0, 94% | 50% |" in text
    assert "| vit_b | 224 | 0.7 | 30.7 | 134.2 | 411 | 134.2 | 320 |" in text  # 32 frames in 100 ms
    assert "Table 3, resolutions" in text and "Table 4" not in text
    assert "|  | 0.7 | 200 | 33% | 60.0 | 40% |" in text
    assert "|  | 0.7, plain PyTorch | 500 | -67% | 240 | -140% |" in text
    del training["times"]["rate 1.0"], memory["rate 1.0"]  # did not fit
    text = report.detector_tables({"machine": machine, "rows": [training]})
    assert "| step | 0.7 | 200 |  |  |  |" in text and report.training_curve(training) == ("step", {}, {})
    assert report.detector_tables({"machine": machine, "rows": [row("a", 1.0, 3.0, True)]}) == ""


def test_harvest_goal():
    goal = Goal("harvest", 0.9, "rate 1.0", 1.6)
    assert goal.outcome({"ours": 10.0, "rate 1.0": 15.2}, {})["met"]
    assert goal.outcome({"ours": 10.0, "rate 1.0": 12.0}, {}) == {
        "goal": "90% of 1.6x, what the operations saved from rate 1.0 allow",
        "reached": 0.75,
        "met": False,
    }


def test_agreement_is_shown_with_all_results_and_in_the_summary():
    approximate = {**row("a", 1.0, 3.0, True), "details": {"agreement": {"ours": {"cosine": 0.98, "top-1": 0.875}}}}
    machine = {"hardware": "M", "torch": "2", "ceilings": {"copy GB/s": 10.0}}
    rows = [{**approximate, "commit": "c", "date": "d"}, {**row("b", 1.0, 3.0, True), "commit": "c", "date": "d"}]
    assert "* op, a: ours cosine 0.980, top-1 0.875\n\n" in report.tables([{"machine": machine, "rows": rows}], False)
    assert "cosine" not in report.tables([{"machine": machine, "rows": rows}], True)
    assert "agreement: ours cosine 0.980, top-1 0.875" in report.summary([approximate])


def test_readme_tables_are_generated_from_the_results():
    readme = (report.ROOT / "README.md").read_text()
    assert readme == report.with_tables(readme, report.load()), "run python -m benchmarks.report"


def test_plots_are_shown_where_they_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.RESULTS.mkdir()
    machine = {"hardware": "M", "torch": "2", "ceilings": {"copy GB/s": 10.0}}
    rows = [
        {**row(f"bfloat16 N{N} B8", 1.0, 3.0, True), "op": op, "floor": {"ms": 0.5, "reached": 0.5, "bound": "exp"}}
        for op in ("keyframe_attention_topk", "keyframe_attention_topk, beside compilers")
        for N in (784, 1568)
    ]
    for name, found in (("with", rows), ("without", rows[2:])):
        found = [{**of_case, "commit": "c", "date": "d"} for of_case in found]
        (report.RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": found}))
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}")
    report.update()
    readme, beside = (tmp_path / "README.md").read_text(), (report.RESULTS / "README.md").read_text()
    assert readme.count("](results/with.png)") == 1 and "without.png" not in readme
    assert beside.count("](with.png)") == 1
    assert 2_000 < (report.RESULTS / "with.png").stat().st_size < 200_000


def test_plots_of_the_detector_are_drawn_from_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    report.RESULTS.mkdir()
    gflops = {"1.0": 4.0, "0.7": 3.0, "0.5": 2.0}
    times = {"rate 1.0": {"ms": 9.0}, "ours": {"ms": 7.0}, "rate 0.5": {"ms": 5.0}, "eager": {"ms": 20.0}}
    memory = {"rate 1.0": 100.0, "rate 0.7": 60.0, "eager": 300.0}
    measured = {"case": "tiny", "times": times, "details": {"ms_by_part": {}, "gflops": gflops}}
    trained = {"case": "tiny", "times": times, "details": {"training_mb": memory}}
    assert report.harvest_curve(measured) == (
        "tiny",
        {"1.0": 1.0, "0.7": 9 / 7, "0.5": 9 / 5},
        {"1.0": 1.0, "0.7": 4 / 3, "0.5": 2.0},
    )
    assert report.training_curve(trained) == ("tiny", {"1.0": 100.0, "0.7": 60.0}, {"1.0": 9.0, "0.7": 7.0})
    rows = [{"op": "EVAD"} | measured, {"op": "EVAD"} | trained]
    result, path = {"machine": {"ceilings": {}}, "rows": rows}, report.RESULTS / "machine.json"
    report.draw_plots(result, path)
    assert {file.name for file in report.RESULTS.glob("*.png")} == {"machine-harvest.png", "machine-training.png"}
    path.write_text(json.dumps(result))
    assert report.load()[0]["plots"] == {"harvest": "machine-harvest.png", "training": "machine-training.png"}


def test_result_tables_are_generated_from_the_results():
    path = report.RESULTS / "README.md"
    assert (path.read_text() if path.exists() else None) == (
        report.all_tables(report.load()) if report.load() else None
    )


def test_readme_needs_its_markers():
    with pytest.raises(ValueError, match="must hold the markers"):
        report.with_tables("no markers", [])


def test_goals_of_the_fastest_rival_and_of_the_floor():
    milliseconds = {"ours": 2.0, "flash": 5.0, "cudnn": 4.0}
    assert Goal("speed-up", 2, ("flash", "cudnn", "absent")).outcome(milliseconds, {}) == {
        "goal": "at least 2x the fastest of flash, cudnn, absent (cudnn)",
        "reached": 2.0,
        "met": True,
    }
    assert Goal("floor", 1.35).outcome(milliseconds, {}, 1.6)["reached"] == 1.25
    assert not Goal("memory", 0.01, "flash").outcome(milliseconds, {"ours": 2, "flash": 100})["met"]


def test_a_stage_that_is_stopped_leaves_what_it_wrote_and_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    child = "import subprocess, sys, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    script = f"import signal, time; signal.signal(signal.SIGINT, lambda *_: print('asked', flush=True)); {child}"
    stages = {"stuck": [sys.executable, "-c", script], "fails": [sys.executable, "-c", "print('1 failed'); exit(3)"]}
    stages |= {"missing": ["no-such-program"], "passes": [sys.executable, "-c", "print('2 passed')"], "build": ["true"]}
    monkeypatch.setattr(
        gpu_check, "STAGES", {name: gpu_check.Stage(command, 6, "all") for name, command in stages.items()}
    )
    monkeypatch.setattr(gpu_check, "GROUPS", {"attention": [], "evad": []})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *stages])
    begin = time.monotonic()
    assert gpu_check.main() == 1
    assert time.monotonic() - begin < 30
    text = (tmp_path / "report.txt").read_text()
    outcomes = {line.split()[0]: " ".join(line.split()[1:5]) for line in text.partition("====")[0].splitlines() if line}
    assert outcomes["stuck"].startswith("stopped at its limit") and "begun\nasked" in text
    assert outcomes["fails"].startswith("failed (3)") and outcomes["passes"].startswith("ok")
    assert outcomes["missing"].startswith("failed to start") and outcomes["build"].startswith("ok")


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("print('3 skipped in 1s')", "nothing ran"),
        ("print('12 passed, 3 skipped in 1s')", "ok"),
        ("print('1 failed, 12 passed'); exit(1)", "failed (1)"),
    ],
)
def test_a_stage_whose_tests_were_all_skipped_has_not_passed(monkeypatch, tmp_path, script, outcome):
    stage = gpu_check.Stage([sys.executable, "-c", script, "pytest"], 60)
    monkeypatch.setitem(gpu_check.STAGES, "stage", stage)
    assert gpu_check.run("stage", tmp_path / "log", tmp_path, time.monotonic() + 100).outcome == outcome


def check_in_a_process(tmp_path, child, seconds):
    """The command of a gpu_check of one stage, a script; begun as by a shell in the background, SIGINT ignored."""
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from benchmarks import gpu_check\n"
        "gpu_check.GRACE, gpu_check.GROUPS = 5, {'attention': ['waits'], 'evad': []}\n"
        f"gpu_check.STAGES = {{'waits': gpu_check.Stage([sys.executable, '-c', {child!r}], {seconds})}}\n"
        f"sys.argv = ['gpu_check', '--out', {str(tmp_path)!r}, 'waits']\n"
        "gpu_check.main()"
    )
    return [sys.executable, "-c", script]


def test_stages_are_asked_to_end_though_interrupts_were_ignored(tmp_path):
    child = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('asked')"
    subprocess.run(check_in_a_process(tmp_path, child, 6), cwd=report.ROOT, check=True, capture_output=True)
    assert (tmp_path / "report.txt").read_text().rstrip().endswith("asked")


def test_no_stage_outlives_the_check(tmp_path):
    alive = tmp_path / "alive"
    child = f"import pathlib, time\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    process = subprocess.Popen(check_in_a_process(tmp_path, child, 60), cwd=report.ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not alive.exists():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    time.sleep(0.2)
    last = alive.stat().st_mtime_ns
    time.sleep(1)
    assert alive.stat().st_mtime_ns == last


def test_what_comes_back_are_measurements_not_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for path in ("benchmarks/results/gpu.json", "benchmarks/results/cpu.png", "evad_kernels/op_tuning.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert {path.name for path in gpu_check.rewritten(0)} == {"gpu.json", "op_tuning.py"}


@pytest.mark.parametrize(("kernel", "outcome"), [("at::fill_kernel", "ok, ours at least"), ("evad::f", "failed (9)")])
def test_errors_of_kernels_that_are_not_ours_do_not_count(monkeypatch, tmp_path, kernel, outcome):
    said = f"========= Uninitialized __global__ memory read\n=========     at void {kernel}<int>(int)+0x10"
    script = f"print({said!r}); print('========= Host Frame: evad_kernels/_triton.py:1'); exit(9)"
    stage = gpu_check.sanitizer("initcheck", "cuda", 60)._replace(command=[sys.executable, "-c", script])
    monkeypatch.setitem(gpu_check.STAGES, "stage", stage)
    assert gpu_check.run("stage", tmp_path / "log", tmp_path, time.monotonic() + 100).outcome == outcome


def test_every_file_that_a_stage_names_exists():
    for stage in gpu_check.STAGES.values():
        for word in stage.command:
            if word.startswith(("tests/", "benchmarks/", "benchmarks.")):
                path = word.replace("benchmarks.", "benchmarks/", 1) + ".py" * word.startswith("benchmarks.")
                assert (gpu_check.ROOT / path).exists(), word
    assert set(tuning.TABLE[90, 2]) == set(tune_keyframe_attention.KERNELS)


@pytest.mark.parametrize("command", [[], ["attention"], ["measure"]], ids=str)
def test_no_stage_of_a_command_starves_another(command):
    assert gpu_check.longest(gpu_check.chosen(command)) <= 60 * gpu_check.MINUTES - gpu_check.GRACE


def test_what_the_detector_needs_is_compiled_beside_the_build():
    names = gpu_check.chosen(["measure", "evad"])
    assert names[:4] == ["build", *gpu_check.GROUPS["warm"]] and names[4] == "bench-roi"
    assert len(next(gpu_check.batches(names))) == 4
    assert "warm-float32" not in gpu_check.chosen(["measure"])


def test_every_stage_is_in_a_group_or_named_alone():
    grouped = {name for stages in gpu_check.GROUPS.values() for name in stages}
    assert set(gpu_check.STAGES) - grouped == {"build", "tests-all"}


@pytest.fixture
def fixed_ceilings(monkeypatch):
    monkeypatch.setattr(Ceilings, "summary", lambda self: {"copy GB/s": 10.0})
    monkeypatch.setattr(Ceilings, "copy", lambda self, size=0: 1e10)
    return Ceilings("cpu")


def test_profile_of_one_case(tmp_path, fixed_ceilings):
    name = "select_tokens with inverse map, 224 B1"
    assert profile_kernels.main(["--device", "cpu", "--out", str(tmp_path), name]) == 0
    (found,) = json.loads((tmp_path / "profile.json").read_text())["rows"]
    kernels = {kernel["kernel"]: kernel for kernel in found["kernels"]}
    ours = next(name for name in kernels if name.startswith("evad_kernels::"))
    assert kernels[ours]["launches"] == 1 and 0 < kernels[ours]["us"] <= found["us"]
    assert found["bytes"] == 8 * 1372 + 8 * 902
    assert found["of_ceiling"] == {"bytes": pytest.approx(1e6 * found["bytes"] / 1e10 / found["us"], rel=1e-2)}
    text = (tmp_path / "profile.md").read_text()
    assert f"### {name}\n\n" in text and "0.01819 MB (" in text and f"| {ours} | 1 |" in text


def test_a_profile_that_fails_does_not_hide_the_others(tmp_path, fixed_ceilings, monkeypatch):
    monkeypatch.setitem(profile_kernels.OPS, "gather_tokens", (lambda **_: 1 / 0, {"a": {}}, {}, False))
    asked = ["--device", "cpu", "--out", str(tmp_path), "gather_tokens", "inverse map, 224 B1"]
    assert profile_kernels.main(asked) == 1
    rows = json.loads((tmp_path / "profile.json").read_text())["rows"]
    assert {row["op"]: "error" in row for row in rows} == {
        "gather_tokens": True,
        "select_tokens with inverse map": False,
    }
    assert "ZeroDivisionError" in (tmp_path / "profile.md").read_text()
    assert profile_kernels.main([*asked, "--seconds", "0"]) == 1
    assert (tmp_path / "profile.md").read_text().count("no time left") == 2
    assert profile_kernels.main(["--device", "cpu", "no such case"]) == 1


def test_profiles_are_of_what_has_goals():
    """Every op of the benchmarks with a goal on a GPU, the first case of each before any second one."""
    cases = list(profile_kernels.every_case("cuda"))
    assert [op for op, _ in cases[: len(profile_kernels.OPS)]] == list(profile_kernels.OPS)
    for op, name in (("roi_pool_3d, backward", "1000 boxes"), ("scatter_tokens", "288x512"), ("gather_tokens", "224")):
        assert any(op == of_case and name in case for of_case, case in cases), (op, name)
    assert not any("B1" in case.split() or "float32" in case.split() for _, case in cases)


def test_a_tile_must_be_right_relative_to_what_is_wanted():
    want = (torch.full((3,), 6e-4), torch.full((3,), 2.0))
    tune_keyframe_attention.assert_near((want[0] * 1.005, want[1] * 0.995), want)
    with pytest.raises(AssertionError):
        tune_keyframe_attention.assert_near((want[0] * 1.05, want[1]), want)


def test_a_tile_must_not_spill(monkeypatch):
    kernel = JITFunction(add_nothing)

    def launch_one_of(tile, spills):
        monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: SimpleNamespace(n_spills=spills))
        monkeypatch.setitem(tune_keyframe_attention.KERNELS, "score", ("add_nothing",))
        monkeypatch.setattr(tune_keyframe_attention, "runs", lambda *_: {"score": lambda: (kernel[(1,)](), want)[1:]})
        monkeypatch.setattr(tune_keyframe_attention, "wanted", lambda *_: (want,))
        return tune_keyframe_attention.tried(torch.float32, 64, 64, "score", tile)

    want, tile = torch.ones(3), tuning.Tile(16, 16, 4, 1)
    assert launch_one_of(tile, 0) is None
    assert launch_one_of(tile, 12) == "spills 12 registers"


def add_nothing():
    pass


def test_measured_tiles_leave_the_others_as_they_are():
    best = tuning.Tile(128, 128, 8, 2)
    table = tune_keyframe_attention.table_with({(2, "forward", 64, 1024): best}, 90)
    assert (1024, 64, tuple(best)) in table[90, 2]["forward"]
    assert [row for row in table[90, 2]["forward"] if row[0] == 0] == tuning.TABLE[90, 2]["forward"]
    assert table[90, 4] == tuning.TABLE[90, 4] and table[90, 2]["key"] == tuning.TABLE[90, 2]["key"]
    unknown = tune_keyframe_attention.table_with({(2, "key", 64, 0): best}, 103)
    assert (0, 64, tuple(best)) in unknown[103, 2]["key"] and unknown[103, 2]["score"] == tuning.TABLE[100, 2]["score"]


def test_the_largest_batch_leaves_a_tenth_of_the_memory(monkeypatch):
    weights = 16 * sum(parameter.numel() for parameter in EVAD(EVADConfig.tiny()).parameters())
    called = []
    contestants = SimpleNamespace(rivals={"eager": lambda: called.append("step")})
    gpu = SimpleNamespace(total_memory=weights + 1_000_000_000)
    monkeypatch.setattr(bench_evad, "build_training", lambda *_, **__: contestants)
    monkeypatch.setattr(bench_evad, "peak_megabytes", lambda step: (weights + 2 * 10_000_000) / 1e6)  # 10 MB a clip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    assert bench_evad.largest_batch("cuda", "tiny", (96, 96), "float32") == 90
    assert called == ["step"]
