"""Training: the recipe's numbers; runs that are killed, damaged, divided over processes, or diverge."""

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from evad import EVAD, EVADConfig, load_checkpoint, read_config, training
from evad.checkpoint import read_labels
from evad.cli import main
from evad.data import DATASETS, Sample
from evad.data.actors import ACTIONS
from evad.recipe import Run, Training, configurations, learning_rate, parameter_groups, read_run
from evad.snapshots import TrainingError, last_good, read_snapshot, snapshots
from evad.training import Trainer

BIKES = Path(__file__).parent / "media" / "bikes.mp4"
MICRO = {
    "num_frames": 8,
    "depth": 4,
    "pruning_blocks": [1, 2],
    "pyramid_blocks": [0, 1, 2, 3],
    "num_proposals": 5,
    "num_stages": 2,
    "decoder_depth": 1,
    "num_classes": 3,
    "drop_path": 0.2,
    "width": 48,
    "query_width": 24,
    "query_mlp_width": 24,
    "decoder_width": 32,
    "action_width": 32,
}
TRAINING = {
    "epochs": 2,
    "batch_size": 4,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "learning_rate": 1e-3,
    "warmup_epochs": 0.5,
    "clip_norm": 1.0,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps are too small to share; and torch's products differ in bits with the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clips(torch.utils.data.Dataset):
    """Noise with up to two boxes; others in every epoch."""

    labels = ("a", "b", "c")

    def __init__(self, number=12, bad=None):
        self.number, self.bad, self.epoch = number, bad, 0

    def __len__(self):
        return self.number

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(1000 * self.epoch + index)
        corner = torch.rand(index % 3, 2, generator=draw) * 20
        labels = (torch.rand(index % 3, 3, generator=draw) < 0.5).float()
        clip = torch.randn(3, 8, 24, 48, generator=draw)
        if (self.epoch, index) == self.bad:
            clip[0, 0, 0, 0] = math.nan
        return Sample(clip, {"boxes": torch.cat([corner, corner + 12], dim=1), "labels": labels}, (str(index), 0.0))


class OneBox(Clips):
    """A single box in all clips: its batch has fewer than ranks, the others none."""

    def __getitem__(self, index):
        clip, target, key = super().__getitem__(index)
        return Sample(clip, {name: value[: index == 1] for name, value in target.items()}, key)


def micro_run(model=(), **training):
    return read_run({"model": {**MICRO, **dict(model)}, "training": {**TRAINING, **training}})


def fit(folder, run=None, clips=None, **options):
    return Trainer(run or micro_run(), clips or Clips(), folder, **options).fit()


def python(code, *arguments):
    """Run code in a fresh interpreter that can import this module; returns what it prints."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_evad_training as t\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The recipe


def test_learning_rate_is_the_released():
    config = EVADConfig.vit_b()
    released = {0: 2.5e-6, 1: 1.375e-5, 2: 2.5e-5, 4.99: 2.5e-5, 5: 2.5e-6, 7.99: 2.5e-6, 8: 2.5e-7, 12: 2.5e-7}
    for epoch, rate in released.items():
        assert learning_rate(epoch, config) == pytest.approx(rate, rel=1e-9)


def test_cosine():
    config = EVADConfig.tiny(epochs=10, learning_rate=1e-3, warmup_epochs=2, warmup_learning_rate=0)
    rates = {0: 0, 1: 5e-4, 2: 1e-3, 6: 5e-4, 10: 0, 11: 0}
    for epoch, rate in rates.items():
        assert learning_rate(epoch, config, "cosine") == pytest.approx(rate, abs=1e-12)
    assert learning_rate(0, EVADConfig.tiny(warmup_epochs=0, learning_rate=1e-3)) == 1e-3


def test_parameter_groups_are_the_released():
    config = EVADConfig.vit_b()
    with torch.device("meta"):
        model = EVAD(config)
    groups = parameter_groups(model, config)
    assert [len(group["params"]) for group in groups] == [59, 119, 109, 241]
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 1e-4), (1, 0), (8, 1e-4), (8, 0)]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, constant, decayed_head, constant_head = ([names[id(p)] for p in group["params"]] for group in groups)
    assert {"localization.proposal_boxes", "localization.proposal_features", "pyramid.lateral.0.weight"} <= {*decayed}
    assert "decoder.mask_token" in constant_head and "decoder.project.weight" in decayed_head
    assert all(name.startswith(("encoder", "pyramid")) for name in constant)


@pytest.mark.parametrize("name", ["ava_vit_b", "ava_vit_l", "jhmdb", "synthetic", "ucf101_24"])
def test_packaged_configurations(name):
    assert name in configurations()
    run = read_run(name)
    assert read_run(json.loads(json.dumps(run.document()))).document() == run.document()
    assert run.data["name"] in DATASETS


def test_ava_configurations_are_the_released():
    b, large = read_run("ava_vit_b"), read_run("ava_vit_l")
    assert b.config == EVADConfig.vit_b(short_side=288)
    released = {"learning_rate": 1e-5, "action_loss_weight": 6.0, "warmup_learning_rate": 2.5e-6}
    assert large.config == EVADConfig.vit_l(short_side=288, **released)
    for run in (b, large):
        assert (run.training.schedule, run.training.betas, run.training.clip_norm) == ("steps", (0.9, 0.999), 0)


def test_overrides():
    run = read_run("synthetic", ["training.epochs=3", "model.keep_rate=0.6", "data.val.clips=7", "model.preset=vit_b"])
    assert (run.config.epochs, run.config.keep_rate, run.config.width) == (3, 0.6, 768)
    assert run.data["val"] == {"clips": 7} and run.data["train"] == read_run("synthetic").data["train"]
    assert read_run({"data": {"train": None}}, ["data.train.clips=4"]).data == {"train": {"clips": 4}}


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("synthetik", [], "synthetik: no such file, .* did you mean synthetic"),
        ({"modle": {}}, [], "'modle' is no section; did you mean model"),
        ({"model": 3}, [], "model must be keys and values, got 3"),
        ({"training": {"learning_rat": 1}}, [], "training.learning_rat is no key; did you mean training.learning_rate"),
        ({"model": {"learning_rate": 1}}, [], "model.learning_rate is no key; did you mean training.learning_rate"),
        ({"model": {"preset": "vit_h"}}, [], "model.preset must be one of vit_b, vit_l, tiny, got 'vit_h'"),
        ({"model": {"keep_rate": 2}}, [], r"keep_rate must be in \(0, 1\], got 2"),
        ({"training": {"schedule": "linear"}}, [], "schedule must be one of steps, cosine, got 'linear'"),
        ({"training": {"accumulate": 0}}, [], "accumulate must be an integer of at least 1, got 0"),
        ({"training": {"clip_norm": "much"}}, [], "clip_norm must be numbers, got 'much'"),
        ({"training": {"betas": [0.9]}}, [], "betas must be two numbers"),
        ({}, ["epochs=3"], "--set: must be section.key=value"),
        ({}, ["training.epochs=[3"], "--set: the value of training.epochs must be YAML"),
        (
            {"training": {"betas": [0.9, 0.98]}},
            ["training.betas.0=0.8"],
            r"--set: training.betas must be keys and values to set training.betas.0, got \[0.9, 0.98\]",
        ),
        ({"data": {"name": "x"}}, ["data.name.a.b=1"], "--set: data.name must be keys .* set data.name.a.b, got 'x'"),
        ({"data": {"val": {"clips": 0}}}, ["data.val.clips.x=1"], "--set: data.val.clips must be keys .* got 0"),
        ({}, ["training.epoch=3"], "training.epoch is no key; did you mean training.epochs"),
    ],
)
def test_rejects_configurations(source, overrides, message):
    with pytest.raises(ValueError, match=message):
        read_run(source, overrides)


def test_a_folder_called_as_a_configuration_hides_nothing(tmp_path, monkeypatch):
    """`python -m evad.data synthetic` makes one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "synthetic").mkdir()
    assert read_run("synthetic").data["name"] == "synthetic"
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="mine: no such file"):
        read_run("mine")


def test_rejects_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    for text, message in (("- 1", "must be sections with keys, got list"), ("a: [", "must be a YAML file")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_run(path)


def test_training_takes_numbers_as_yaml_reads_them():
    assert Training(clip_norm="1e-1", betas=[0.9, "98e-2"]) == Training(clip_norm=0.1, betas=(0.9, 0.98))


# A run


def test_writes_logs_and_weights(tmp_path):
    seen, scores = [], iter([0.5, 0.75])
    run = micro_run(keep_checkpoints=2)
    result = Trainer(run, Clips(), tmp_path, evaluate=lambda model: {"score": next(scores)}).fit(seen.append)
    assert (result.steps, result.started_at, result.metrics) == (6, 0, {"score": 0.75})
    assert [progress.step for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert [progress.epoch for progress in seen] == [0, 0, 0, 1, 1, 1]
    assert seen[-1].losses == result.losses and set(result.losses) >= {"loss_ce", "loss_bce", "loss_total"}
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert len(log) == 7 and log[0].startswith("step,epoch,learning_rate,loss_ce,")
    assert (tmp_path / "evaluation.csv").read_text() == "step,epochs,score\n3,1,0.5\n6,2,0.75\n"
    assert [path.name for path in snapshots(tmp_path / "checkpoints")] == ["step_00000005", "step_00000006"]
    model = EVAD(run.config)
    assert read_config(result.weights) == run.config and read_labels(result.weights) == Clips.labels
    assert not load_checkpoint(model, result.weights).missing
    assert_close(dict(model.named_parameters()), read_snapshot(tmp_path / "checkpoints").weights, atol=0, rtol=0)


def test_learns(tmp_path):
    """The same four clips again and again: the loss falls by half."""
    run = micro_run(model={"drop_path": 0.0}, epochs=25, learning_rate=2e-3, checkpoint_every=0)
    clips, losses = Clips(4), []
    clips.set_epoch = lambda epoch: None
    Trainer(run, clips, tmp_path).fit(lambda progress: losses.append(progress.losses["loss_total"]))
    assert losses[-1] < losses[0] / 2


def test_accumulation_equals_one_part(tmp_path):
    """Parts of a batch, each with its share of the boxes, give the whole batch's gradient."""
    torch.set_default_dtype(torch.float64)
    try:
        weights = []
        for accumulate in (1, 2):
            run = micro_run(model={"drop_path": 0.0}, accumulate=accumulate, epochs=1)
            fit(tmp_path / str(accumulate), run)
            weights.append(read_snapshot(tmp_path / str(accumulate) / "checkpoints").weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(*weights, atol=1e-9, rtol=0)  # only the order of sums differs, and what Adam makes of it


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"recompute": True}], ids=str)
def test_options(options, tmp_path):
    plain, other = (fit(tmp_path / name, micro_run(epochs=1, **o)) for name, o in (("a", {}), ("b", options)))
    assert other.losses["loss_total"] == pytest.approx(
        plain.losses["loss_total"], rel=0 if "recompute" in options else 0.1
    )


@pytest.mark.parametrize("slow", [True, False])
def test_says_where_bfloat16_is_slow(tmp_path, monkeypatch, recwarn, slow):
    monkeypatch.setattr(training, "bfloat16_is_slow", lambda device: slow)
    fit(tmp_path, micro_run(epochs=1, precision="bfloat16"))
    assert ["float32 is several times faster" in str(warning.message) for warning in recwarn].count(True) == slow


def test_starts_from_given_weights(tmp_path):
    first = fit(tmp_path / "a", micro_run(epochs=1))
    run = micro_run(epochs=1, weights=str(first.weights), learning_rate=0, warmup_learning_rate=0)
    second = fit(tmp_path / "b", run)
    weights = [read_snapshot(path.parent / "checkpoints").weights for path in (first.weights, second.weights)]
    assert_close(*weights, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "accumulate": 2}, "batch_size must be a multiple of ranks . accumulate = 1 . 2, got 3"),
        ({"batch_size": 16}, "12 clips are less than one batch of 16"),
        ({"sharding": "fsdp"}, "sharding fsdp must be started by torchrun"),
    ],
)
def test_rejects_runs(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer(micro_run(**changes), Clips(), tmp_path)


# Killed, stopped, damaged, diverged


def kill_at_random(folder, kills, workers="0"):
    """Train in ``folder/whole`` undisturbed; in ``folder/killed``, in processes that are killed at random moments until
    one comes to the end. Prints how many were killed."""
    torch.set_num_threads(1)
    folder, run = Path(folder), micro_run(workers=int(workers))
    fit(folder / "whole", run)
    begin = time.perf_counter()
    fit(folder / "warm", run)
    seconds, moment = time.perf_counter() - begin, random.Random(0)
    while (killed := times_killed(folder / "killed", run, int(kills), seconds, moment)) < 3:
        shutil.rmtree(folder / "killed")  # at its end too soon: the run that was timed had other programs beside it
        seconds /= 2
    print(killed)


def times_killed(folder, run, kills, seconds, moment):
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            fit(folder, run)
            os._exit(0)
        if killed < kills:
            time.sleep(moment.uniform(0.1, 0.5) * seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return killed
        killed += 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_random_ends_the_same(workers, tmp_path):
    killed = int(python("t.kill_at_random(*sys.argv[1:])", tmp_path, 8, workers))
    assert killed >= 3
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    states = [read_snapshot(path / "checkpoints").state for path in (whole, killed)]
    assert_close(states[0]["optimizer"]["state"], states[1]["optimizer"]["state"], atol=0, rtol=0)
    logs = [
        [line.rpartition(",")[0] for line in (path / "log.csv").read_text().splitlines()] for path in (whole, killed)
    ]
    assert logs[0] == logs[1]  # but for the speed
    assert [path.name for path in killed.rglob(".*")] == [".lock"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    expected = fit(tmp_path).weights.read_bytes()
    for name in (".step_00000003.deleted", ".step_00000009.draft"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert fit(tmp_path).weights.read_bytes() == expected
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]


def test_what_a_run_further_down_writes_is_not_cleared(tmp_path):
    draft = tmp_path / "other" / "checkpoints" / ".step_00000001.draft"
    draft.mkdir(parents=True)
    Trainer(micro_run(), Clips(), tmp_path)
    assert draft.exists()


def test_stopped_goes_on(tmp_path):
    expected = fit(tmp_path / "whole")
    steps = []
    result = Trainer(micro_run(checkpoint_every=0), Clips(), tmp_path / "cut").fit(
        steps.append, lambda: len(steps) == 2
    )
    assert (result.interrupted, result.steps, result.weights) == (True, 2, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = fit(tmp_path / "cut")
    assert any("resumed with training.checkpoint_every = 1, was 0" in str(warning.message) for warning in caught)
    assert rest.started_at == 2 and rest.weights.read_bytes() == expected.weights.read_bytes()
    done = fit(tmp_path / "cut")
    assert done.started_at == 6 and done.weights.read_bytes() == expected.weights.read_bytes()


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.3}, {"betas": [0.5, 0.6]}, {"head_learning_rate_scale": 3.0}], ids=str
)
def test_resumed_with_other_settings_learns_by_them(change, tmp_path):
    fit(tmp_path, micro_run(epochs=1))
    with pytest.warns(UserWarning, match=f"resumed with training.{next(iter(change))}"):
        resumed = Trainer(micro_run(epochs=2, **change), Clips(), tmp_path)
    fresh = Trainer(micro_run(epochs=2, **change), Clips(), tmp_path / "fresh")
    assert resumed.started_at == 3
    groups = [
        [{key: value for key, value in group.items() if key != "params"} for group in trainer.optimizer.param_groups]
        for trainer in (resumed, fresh)
    ]
    assert groups[0] == groups[1]


def test_evaluation_missed_by_a_kill_is_made(tmp_path):
    def killed(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, evaluate=killed)
    fit(tmp_path, evaluate=lambda model: {"score": 1.0})
    assert (tmp_path / "evaluation.csv").read_text() == "step,epochs,score\n3,1,1.0\n6,2,1.0\n"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "cut"),
        ("model.safetensors", "flip"),
        ("state.pt", "flip"),
        ("state.pt", "gone"),
        ("sha256.json", "cut"),
    ],
)
def test_damaged_checkpoint_gives_way_to_the_one_before(name, damage, trained, tmp_path):
    folder, weights = trained
    (tmp_path / "run").mkdir()
    subprocess.run(["cp", "-r", folder / "checkpoints", tmp_path / "run"], check=True)
    newest = snapshots(tmp_path / "run" / "checkpoints")[-1] / name
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 64
        newest.write_bytes(content)
    else:
        newest.unlink()
    assert last_good(tmp_path / "run" / "checkpoints").endswith(
        "the last good checkpoint is " + str(newest.parents[1] / "step_00000005")
    )
    with pytest.warns(UserWarning, match="step_00000006 is damaged .*: the checkpoint before it is used"):
        result = fit(tmp_path / "run")
    assert result.started_at == 5 and result.weights.read_bytes() == weights


def test_damaged_checkpoints_ahead_cost_no_good_one(tmp_path):
    fit(tmp_path, micro_run(epochs=1))
    folder = tmp_path / "checkpoints"
    for path in snapshots(folder)[1:]:
        (path / "state.pt").write_bytes(b"")
    after = []
    run = micro_run(epochs=1, keep_checkpoints=1)
    with pytest.warns(UserWarning, match="damaged"):
        trainer = Trainer(run, Clips(), tmp_path)
    assert trainer.started_at == 1
    trainer.fit(stop=lambda: after.append([path.name for path in snapshots(folder)]))
    assert after == [["step_00000001", "step_00000002", "step_00000003"], ["step_00000002"]]
    assert [path.name for path in snapshots(folder)] == ["step_00000003"] and read_snapshot(folder).state["step"] == 3


def test_copies_beside_checkpoints_are_left_alone(tmp_path):
    fit(tmp_path, micro_run(epochs=1, keep_checkpoints=1))
    kept = tmp_path / "checkpoints" / "step_00000003"
    copies = [kept.with_name(f"{kept.name}{end}") for end in ("_best", "_1", ".bak", " copy")]
    for copy in copies:
        shutil.copytree(kept, copy)
    assert fit(tmp_path, micro_run(epochs=2, keep_checkpoints=1)).started_at == 3
    assert fit(tmp_path, micro_run(epochs=2, keep_checkpoints=1)).started_at == 6
    assert all((copy / "state.pt").exists() for copy in copies)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run's folder, and its weights."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, fit(folder).weights.read_bytes()


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    fit(tmp_path, micro_run(epochs=1, keep_checkpoints=1))
    (tmp_path / "checkpoints" / "step_00000003" / "state.pt").write_bytes(b"")
    assert last_good(tmp_path / "checkpoints") == "there is no good checkpoint"
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(TrainingError, match=r"all 1 checkpoints in .* damaged"),
    ):
        fit(tmp_path, micro_run(epochs=1))


def test_another_models_folder_is_refused(tmp_path):
    fit(tmp_path, micro_run(epochs=1))
    with pytest.raises(
        ValueError, match=r"holds a run with model.keep_rate = 0.7, not 0.5: another folder begins anew"
    ):
        fit(tmp_path, micro_run(model={"keep_rate": 0.5}))
    with pytest.raises(ValueError, match="data: steps an epoch = 3, not 2"):
        fit(tmp_path, micro_run(epochs=1), Clips(8))


def test_a_run_from_before_a_field_goes_on(tmp_path, monkeypatch):
    """What its checkpoint does not say has the default; another value is another run."""
    with monkeypatch.context() as patch:
        document = Run.document
        patch.setattr(Run, "document", lambda run: _without(document(run), "frame_rate"))
        fit(tmp_path, micro_run(epochs=1))
    with pytest.raises(ValueError, match=r"holds a run with model.frame_rate = 30.0, not 25.0: another folder"):
        fit(tmp_path, micro_run(model={"frame_rate": 25}))
    assert fit(tmp_path, micro_run(epochs=2)).started_at == 3


def _without(document, field):
    del document["model"][field]
    return document


def test_a_run_that_stopped_at_a_bad_clip_goes_on_without_it(tmp_path):
    run = micro_run(epochs=1)
    fit(tmp_path, run._replace(data={**run.data, "on_error": "fail"}))
    again = micro_run(epochs=2)
    with pytest.warns(UserWarning, match="resumed with data.on_error = 'skip', was 'fail'"):
        assert fit(tmp_path, again._replace(data={**again.data, "on_error": "skip"})).started_at == 3


def _with_data(epochs, data):
    return micro_run(epochs=epochs)._replace(data=data)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"media": "a"}, {"media": "b"}, ["data.media = 'b', was 'a'"]),
        ({"train": {"media": "a"}}, {"train": {"media": "b"}}, ["data.media = 'b', was 'a'"]),
        ({}, {"train": {"on_error": "skip"}}, ["data.on_error = 'skip', was None"]),
        ({"name": "csv"}, {"name": "csv", "train": {"on_error": "skip"}}, ["data.on_error = 'skip', was 'fail'"]),
        ({"name": "csv"}, {"name": "csv", "flip": 0.5, "train": {"seed": 0}, "val": {"short_side": 96}}, []),
        ({"name": "synthetic"}, {"name": "synthetic", "fresh": True, "train": {"size": None}}, []),
        ({"clips": 4, "val": {"clips": 2}}, {"clips": 4, "val": {"clips": 3}}, ["data.val.clips = 3, was 2"]),
        ({"valid": {"clips": 2}, "clips": 4}, {"val": {"clips": 2}, "clips": 4}, ["data.val.clips = 2, was 4"]),
    ],
    ids=str,
)
def test_a_run_goes_on_with_data_that_is_the_same_to_it(then, now, said, tmp_path):
    fit(tmp_path, _with_data(1, then))
    with pytest.warns(UserWarning, match="resumed with") as warned:
        assert Trainer(_with_data(2, now), Clips(), tmp_path).started_at == 3
    messages = [str(warning.message).partition("resumed with ")[2] for warning in warned]
    assert [message for message in messages if message.startswith("data.")] == said


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"name": "csv"}, {"name": "csv", "flip": 0}, "data.flip = 0.5, not 0: another folder"),
        ({"train": {"clips": 4}}, {"train": {"clips": 5}}, "data.clips = 4, not 5: another folder"),
        ({"clips": 4}, {"clips": 5, "train": {"clips": 4}, "media": "a", "seed": 1}, "data.seed = None, not 1"),
    ],
    ids=str,
)
def test_another_datas_folder_is_refused(then, now, message, tmp_path):
    fit(tmp_path, _with_data(1, then))
    with pytest.raises(ValueError, match=f"holds a run with {message}"):
        Trainer(_with_data(2, now), Clips(), tmp_path)


def test_folder_in_use_is_refused(tmp_path):
    trainer = Trainer(micro_run(), Clips(), tmp_path)
    child = os.fork()
    if child == 0:
        try:
            Trainer(micro_run(), Clips(), tmp_path)
        except ValueError as error:
            os._exit(7 if "is in use by another process that trains" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert trainer.fit().steps == 6


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    clips = Clips(bad=(1, 7))
    with pytest.raises(
        TrainingError, match=r"step [456]: the loss is not finite \(loss_ce, .*loss_total\); the last good"
    ):
        fit(tmp_path, clips=clips)
    snapshot = read_snapshot(tmp_path / "checkpoints")
    assert 3 <= snapshot.state["step"] < 6 and all(tensor.isfinite().all() for tensor in snapshot.weights.values())
    assert fit(tmp_path, clips=Clips()).started_at == snapshot.state["step"]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\0\0" * 30], ids=["columns", "binary"])
@pytest.mark.parametrize("name", ["log", "evaluation"])
def test_a_log_that_cannot_be_read_is_set_aside(tmp_path, name, content):
    fit(tmp_path, micro_run(epochs=1), evaluate=lambda model: {"score": 1.0})
    path = tmp_path / f"{name}.csv"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{name}.csv cannot be read .*: set aside as {name}.damaged.csv"):
        assert fit(tmp_path, micro_run(epochs=2), evaluate=lambda model: {"score": 1.0}).started_at == 3
    assert path.with_name(f"{name}.damaged.csv").read_bytes() == content
    assert path.read_text().splitlines()[-1].startswith("6,")


def test_finished_run_tells_its_numbers_again(tmp_path):
    first = fit(tmp_path, evaluate=lambda model: {"score": 0.5, "nothing": math.nan})
    again = fit(tmp_path, evaluate=lambda model: {"score": 0.0})
    assert again.losses == pytest.approx(first.losses) and again.metrics == pytest.approx(first.metrics, nan_ok=True)


def test_fewer_epochs_than_done_are_refused(tmp_path, recwarn):
    fit(tmp_path)
    with pytest.raises(ValueError, match=r"holds a run after 2 epochs, more than training.epochs = 1"):
        fit(tmp_path, micro_run(epochs=1))
    assert not [warning for warning in recwarn if "resumed with" in str(warning.message)]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="writes what the package tensorboard reads")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(tmp_path, micro_run(epochs=1), evaluate=lambda model: {"score": 0.5})
    with pytest.warns(UserWarning, match="resumed with training.epochs"):
        fit(tmp_path, evaluate=lambda model: {"score": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss_total")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("evaluation/score")] == [0.5, 0.75]


def test_infinite_gradient_stops(tmp_path):
    trainer = Trainer(micro_run(), Clips(), tmp_path)
    trainer.model.encoder.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingError, match="step 1: the gradient is not finite; there is no checkpoint yet"):
        trainer.fit()


@pytest.mark.parametrize("part", ["weights", "state"])
def test_full_disk_keeps_the_last_good_checkpoint(part, tmp_path, monkeypatch):
    """Beside a limit on the size of files, which stops a real write half way: the error that a full disk gives."""
    trainer = Trainer(micro_run(), Clips(), tmp_path)

    def fill(progress):
        if progress.step == 3:
            monkeypatch.setattr("evad.snapshots.write_weights" if part == "weights" else "torch.save", full)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match=r"step 3 cannot be written: the disk of .* is full; the last good .*0002"):
        trainer.fit(fill)
    monkeypatch.undo()
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert fit(tmp_path).started_at == 2


def test_write_that_fails_half_way(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = Trainer(micro_run(), Clips(), tmp_path)
    try:
        with pytest.raises(
            TrainingError, match=r"checkpoint of step 2 cannot be written: .*; the last good .*00000001"
        ):
            trainer.fit(
                lambda now: now.step == 2 and resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, before[1])),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in snapshots(tmp_path / "checkpoints")] == ["step_00000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


# Many processes


SHARDINGS = ("ddp", "fsdp")


def divide(folder):
    """Train alone and, for each of SHARDINGS, in two processes that share every batch; then go on alone with all. Also
    alone and in two with ``OneBox``. All in float64."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    folder, model = Path(folder), {"drop_path": 0.0}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            store = f"file://{folder}/store"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            for sharding in SHARDINGS:
                run = micro_run(model, sharding=sharding, epochs=1, accumulate=2, checkpoint_every=0)
                fit(folder / sharding, run, evaluate=lambda model: {"rate": model.config.keep_rate})
            fit(folder / "ddp, one box", micro_run(model, epochs=1, accumulate=2), OneBox())
            torch.distributed.destroy_process_group()
            os._exit(0)
    fit(folder / "alone", micro_run(model, epochs=1))
    fit(folder / "alone, one box", micro_run(model, epochs=1), OneBox())
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    for name in ("alone", *SHARDINGS):
        shutil.copytree(folder / name, folder / f"{name}, then alone")
        assert fit(folder / f"{name}, then alone", micro_run(model, checkpoint_every=2)).started_at == 3


def test_two_processes_equal_one(tmp_path):
    python("t.divide(*sys.argv[1:])", tmp_path)
    alone = read_snapshot(tmp_path / "alone" / "checkpoints").weights
    start = EVAD(micro_run().config).state_dict()
    assert all((alone[name] - start[name]).abs().max() > 1e-4 for name in start if name.endswith("weight"))
    log = logged(tmp_path / "alone")
    for sharding in SHARDINGS:
        # float64: all that differs is the order of sums; Adam divides by its epsilon of 1e-8 at worst.
        assert_close(read_snapshot(tmp_path / sharding / "checkpoints").weights, alone, atol=1e-8, rtol=0)
        longer = (tmp_path / f"{name}, then alone" / "checkpoints" for name in (sharding, "alone"))
        assert_close(*(read_snapshot(path).weights for path in longer), atol=1e-8, rtol=0)
        assert_close(logged(tmp_path / sharding), log, atol=0, rtol=1e-6)
        assert (tmp_path / sharding / "evaluation.csv").read_text() == "step,epochs,rate\n3,1,0.7\n"
    assert_close(*(logged(tmp_path / f"{name}, one box") for name in ("ddp", "alone")), atol=0, rtol=1e-6)


def logged(folder):
    """The numbers of a run's log, but for the speed."""
    lines = (folder / "log.csv").read_text().splitlines()[1:]
    return torch.tensor([[float(number) for number in line.split(",")[:-1]] for line in lines])


def begin_apart(folder):
    """Two ranks, each in a folder of its own: the first finds a checkpoint there. Writes down what each raises."""
    torch.set_num_threads(1)
    folder, children = Path(folder), []
    fit(folder / "0", micro_run(epochs=1))
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            store = f"file://{folder}/store"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            try:
                Trainer(micro_run(), Clips(), folder / str(rank))
            except ValueError as error:
                (folder / f"{rank}.txt").write_text(str(error))
            torch.distributed.destroy_process_group()
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_ranks_that_begin_at_different_steps_are_refused(tmp_path):
    python("t.begin_apart(*sys.argv[1:])", tmp_path)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == (
            f"{tmp_path / str(rank)}: must be one folder that all ranks share, but they begin after step 0 on rank 1; "
            "after step 3 on rank 0"
        )


def test_a_rank_that_stops_tells_why_and_the_other_does_not(tmp_path):
    """One of four clips cannot be read, so one of two processes stops; the other has waited for it in a sum."""
    rows = []
    for clip in "abcd":
        (tmp_path / clip).mkdir()
        (tmp_path / clip / "0.png").write_bytes(b"no picture")
        if clip != "c":
            Image.new("RGB", (32, 32)).save(tmp_path / clip / "0.png")
        rows.append(f"{clip},0,0.1,0.1,0.9,0.9,1,0")
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    (tmp_path / "train.csv").write_text("\n".join(rows))
    data = {"name": "csv", "annotations": str(tmp_path / "train.csv"), "media": str(tmp_path)}
    data |= {"labels": str(tmp_path / "labels.txt"), "short_side": 32}
    training = {"epochs": 1, "batch_size": 4, "workers": 0, "evaluate_every": 0}
    (tmp_path / "run.yaml").write_text(json.dumps({"model": MICRO, "training": training, "data": data}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "evad", "train", "--device", "cpu", "--config", str(tmp_path / "run.yaml"), "--out"]
    started = [
        subprocess.Popen(
            [*words, str(tmp_path / "out")],
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], errors
    assert "Traceback" not in "".join(errors)
    broken = [f"{tmp_path / 'c' / '0.png'}: not a picture" in error for error in errors]
    assert sorted(broken) == [False, True]
    assert "another rank has stopped; what it said tells why" in errors[broken.index(False)]


# The command


def test_command_trains_and_goes_on(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    tiny = [f"--set=model.{name}={value}" for name, value in MICRO.items() if name != "num_classes"]
    changes = [
        "training.epochs=1",
        "training.workers=0",
        "training.batch_size=2",
        "data.train.clips=4",
        "data.val.clips=2",
    ]
    command = ["train", "--device", "cpu", "--out", str(tmp_path), *tiny, *(f"--set={change}" for change in changes)]
    assert main([*command, "--json"]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["steps"] == 2 and document["started_at"] == 0 and "mAP@0.5" in document["metrics"]
    assert "step 2/2, epoch 1, loss " in err and "the package tensorboard is not installed" in err
    assert main(command) == 0
    out, err = capfd.readouterr()
    assert out.strip() == str(tmp_path / "model.safetensors") and "goes on after step 2" in err
    written = (tmp_path / "config.yaml").read_text()
    assert main([*command, "--json", "--set=training.learning_rate=1"]) == 0
    again = json.loads(capfd.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert again["metrics"] == pytest.approx(document["metrics"]) and again["losses"] == document["losses"]
    assert again["skipped"] == 0 and (tmp_path / "config.yaml").read_text() == written
    folder = tmp_path / "found"
    weights = str(tmp_path / "model.safetensors")
    assert main(["detect", str(BIKES), "--checkpoint", weights, "--out", str(folder), "--end", "0.5", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["labels"] == list(ACTIONS)
    again = [
        "train",
        "--config",
        str(tmp_path / "config.yaml"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "again"),
        "--json",
    ]
    assert main(again) == 0
    assert json.loads(capfd.readouterr().out)["losses"] == document["losses"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "none.yaml: no such file, and no configuration of the package"),
        (["--set", "training.epoch=1"], "training.epoch is no key; did you mean training.epochs?"),
        (["--set", "model.num_classes=3"], "model.num_classes must be 8, as the data has, got 3"),
        (["--set", "data.name=nothing"], "data: name must be one of"),
        (["--set", "data.clip=1"], "'clip' is no option of synthetic"),
        (["--set", "training.betas.0=0.8"], "--set: training.betas must be keys and values"),
        (["--set", "data.train=3"], "data: train must be options of that split, got 3"),
        (["--set", "data.seed=-1"], "data: seed must be a whole number of at least 0, got -1"),
        (["--set", "data.num_frames=8"], "data: num_frames must be the model's 16, got 8"),
        (["--config", str(BIKES)], "bikes.mp4: must be a YAML file"),
        (["--set", "training.batch_size=9000"], "data: 8000 clips are less than one batch of 9000"),
        (["--set", "training.weights=none.pt"], "none.pt"),
    ],
)
def test_command_refuses(arguments, message, tmp_path, capfd):
    assert main(["train", "--device", "cpu", "--out", str(tmp_path), *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and err.startswith("evad train: ")


def test_command_lists_configurations(capfd):
    assert main(["train", "--list"]) == 0
    assert "synthetic" in capfd.readouterr().out.split()
