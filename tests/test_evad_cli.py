"""The command line: what each command writes and prints, and one line for what cannot be done."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evad import EVAD, EVADConfig, ava
from evad.checkpoint import released_names, save_checkpoint
from evad.cli import main
from evad.video import Video, normalize

HERE = Path(__file__).parent
BIKES = HERE / "media" / "bikes.mp4"
TINY = ["--model", "tiny", "--size", "48", "--device", "cpu"]
PRESET = EVADConfig.tiny()


def run(capfd, *argv):
    """Exit status, stdout, stderr of one command."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as exit:
        status = exit.code
    out, err = capfd.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def short_video(tmp_path_factory):
    """The first 2 s of bikes.mp4."""
    from evad.video import VideoWriter

    path = tmp_path_factory.mktemp("short") / "two seconds.mp4"
    with Video(BIKES) as video, VideoWriter(path, video.width, video.height, video.fps) as writer:
        for frame in video.frames():
            if frame.time >= 2:
                break
            writer.write(frame.rgb(), frame.time)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of ours whose weights are not those that --model tiny starts with."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_checkpoint(EVAD(EVADConfig.tiny(0.6, num_classes=3)), path)
    return path


# detect


def test_detect_writes_video_csv_and_json(tmp_path, capfd):
    status, out, err = run(capfd, "detect", BIKES, "--every", "1.5", "--end", "3.5", "--out", tmp_path, *TINY)
    assert status == 0
    assert "random weights" in err
    files = [tmp_path / f"bikes.{suffix}" for suffix in ("detections.csv", "detections.json", "annotated.mp4")]
    assert out.split() == [str(path) for path in files]

    document = json.loads(files[1].read_text())
    assert document["weights"] == "random"
    assert not document["interrupted"]
    assert (document["frames"], document["skipped_frames"]) == (88, 0)
    assert document["video"]["width"] == 640 and document["video"]["duration"] == 10.0
    assert document["labels"] == list(ava.ACTIONS)
    assert [keyframe["time"] for keyframe in document["keyframes"]] == [0.0, 1.5, 3.0]
    for keyframe in document["keyframes"]:
        assert 1 <= len(keyframe["people"]) <= PRESET.num_proposals
        assert keyframe["tokens_kept"] == sorted(keyframe["tokens_kept"], reverse=True)
        for person in keyframe["people"]:
            assert all(0 <= value <= 1 for value in person["box"]) and 0 <= person["score"] <= 1
            assert len(person["actions"]) == 3
            assert all(action["label"] == ava.ACTIONS[action["id"] - 1] for action in person["actions"])

    rows = list(csv.reader(files[0].open()))
    assert {len(row) for row in rows} == {8}
    assert {row[0] for row in rows} == {"bikes"}
    assert list(dict.fromkeys(row[1] for row in rows)) == ["0000", "0001.5", "0003"]
    assert len(rows) % 80 == 0
    assert [int(row[6]) for row in rows[:80]] == list(range(1, 81))
    assert all(re.fullmatch(r"[01]\.\d{3}", value) for row in rows for value in row[2:6])
    assert all(re.fullmatch(r"[01]\.\d{4}", row[7]) for row in rows)

    with Video(files[2]) as video:
        assert (video.width, video.height) == (1280, 544)  # enlarged until text can be read
        frames = list(video.frames())
    assert [frame.time for frame in frames] == pytest.approx([i / 25 for i in range(88)], abs=1e-3)
    with Video(BIKES) as video:
        original = next(video.frames(2.0)).rgb()
    drawn = np.asarray(Image.fromarray(frames[50].rgb()).resize((640, 272)))
    assert 0.005 < (np.abs(drawn.astype(int) - original) > 60).any(2).mean() < 0.5  # boxes on top of the same picture


def test_detect_json_is_all_of_stdout(short_video, tmp_path, capfd):
    status, out, _ = run(capfd, "detect", short_video, "--out", tmp_path, "--json", "--no-video", *TINY)
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "two seconds.detections.json").read_text())
    assert [keyframe["time"] for keyframe in json.loads(out)["keyframes"]] == [0.0, 1.0]
    assert not list(tmp_path.glob("*.mp4"))


def test_detect_shows_progress(short_video, tmp_path, capfd, monkeypatch):
    """On a terminal: how far, clips and frames a second, time left."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    status, _, err = run(capfd, "detect", short_video, "--out", tmp_path, "--no-video", *TINY)
    assert status == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    assert re.search(r"2\.0 s of video, \d+\.\d clips/s, \d+ frames/s, left \d:\d\d:\d\d", shown), shown


def test_detect_model_file(short_video, tmp_path, capfd):
    """--model PATH: a configuration in the released names."""
    with np.load(HERE / "golden" / "tiny_A_weights.npz") as golden:
        (tmp_path / "small.yaml").write_text(str(golden["config_json"]))  # JSON is YAML
    options = ("--model", tmp_path / "small.yaml", "--size", "48", "--no-video", "--json", "--device", "cpu")
    status, out, _ = run(capfd, "detect", short_video, "--end", "0", "--out", tmp_path, *options)
    assert status == 0
    with torch.device("meta"):
        model = EVAD(EVADConfig.from_official(tmp_path / "small.yaml"))
    document = json.loads(out)
    assert document["model"]["name"] == "small" and document["model"]["keep_rate"] == model.config.keep_rate == 0.7
    assert document["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert len(document["keyframes"][0]["tokens_kept"]) == 3


def test_detect_is_repeatable(short_video, tmp_path, capfd):
    for name in ("a", "b"):
        assert run(capfd, "detect", short_video, "--out", tmp_path / name, "--no-video", *TINY)[0] == 0
    texts = [(tmp_path / name / "two seconds.detections.csv").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1]


def test_detect_equals_the_library(short_video, tmp_path, capfd, checkpoint):
    """The CSV holds what the released evaluation scores of the clip around the keyframe, scaled to the picture."""
    from evad import select_detections
    from evad.checkpoint import load_checkpoint, read_config
    from evad.video import read_clip, resize

    arguments = ("--start", "1", "--end", "1.5", "--no-video", "--device", "cpu", "--out", tmp_path)
    status, _, err = run(capfd, "detect", short_video, "--checkpoint", checkpoint, *arguments)
    assert status == 0 and "random" not in err
    model = EVAD(read_config(checkpoint)).eval()
    load_checkpoint(model, checkpoint)
    with Video(short_video) as video:
        clip = read_clip(video, 1.0, prepare=lambda frame: resize(frame.rgb(), 96))
    pixels = normalize(clip.samples)
    with torch.no_grad():
        found = select_detections(model([pixels]), [pixels.shape[-2:]])[0]
    rows = list(csv.reader((tmp_path / "two seconds.detections.csv").open()))
    assert len(rows) == found.action_scores.numel() and {row[1] for row in rows} == {"0001"}
    scale = torch.tensor([pixels.shape[3], pixels.shape[2]] * 2)
    boxes = torch.tensor([[float(value) for value in row[2:6]] for row in rows[::3]])
    scores = torch.tensor([float(row[7]) for row in rows]).view(-1, 3)
    torch.testing.assert_close(boxes, found.boxes / scale, rtol=0, atol=1.1e-3)
    torch.testing.assert_close(scores, found.action_scores, rtol=0, atol=1.1e-4)


@pytest.mark.parametrize("rate", [30.0, 15.0])
def test_training_detect_and_visualize_see_the_same_clip(short_video, tmp_path, capfd, monkeypatch, rate):
    """Frames as far apart as the checkpoint's configuration says."""
    from evad import data
    from evad.cli import visualize
    from evad.stream import Runner

    (tmp_path / "gt.csv").write_text("two seconds,1,0.1,0.1,0.5,0.5,1,0\n")
    (tmp_path / "labels.txt").write_text("run\njump\nstand\n")
    config, path = EVADConfig.tiny(num_classes=3, short_side=48, frame_rate=rate), tmp_path / "mine.safetensors"
    files = {"annotations": tmp_path / "gt.csv", "labels": tmp_path / "labels.txt", "media": short_video.parent}
    section = {"name": "csv", "flip": 0} | {name: str(file) for name, file in files.items()}
    trained = data.build(section, "train", config)[0].clip
    assert (trained[:, 1:] != trained[:, :-1]).any((0, 2, 3)).sum() == (15 if rate == 30 else 8)  # the rest is clamped

    clips, looks, submit, look = [], [], Runner.submit, visualize.look
    monkeypatch.setattr(Runner, "submit", lambda self, some, *rest: clips.extend(some) or submit(self, some, *rest))
    monkeypatch.setattr(visualize, "look", lambda *words: looks.append(look(*words)) or looks[0])
    save_checkpoint(EVAD(config), path)
    arguments = ("--checkpoint", path, "--device", "cpu", "--out", tmp_path)
    assert run(capfd, "detect", short_video, "--start", "1", "--end", "1", "--no-video", *arguments)[0] == 0
    assert run(capfd, "visualize", short_video, "--time", "1", *arguments)[0] == 0
    assert len(clips) == 1 and torch.equal(normalize(clips[0].samples), trained)
    seen = np.stack(looks[0].pruning.frames)
    assert torch.equal(normalize(torch.from_numpy(seen).permute(0, 3, 1, 2)), trained)
    assert looks[0].pruning.times == pytest.approx([(i - 8) * 4 / rate for i in range(16)])


def test_detect_span_and_keep_rate(tmp_path, capfd):
    arguments = ("--start", "4", "--end", "5.2", "--every", "0.5", "--keep-rate", "1", "--out", tmp_path)
    status, out, _ = run(capfd, "detect", BIKES, *arguments, "--json", *TINY)
    document = json.loads(out)
    assert status == 0
    assert [keyframe["time"] for keyframe in document["keyframes"]] == [4.0, 4.5, 5.0]
    assert all(keyframe["tokens_kept"] == [] for keyframe in document["keyframes"])
    assert document["model"]["keep_rate"] == 1.0
    with Video(tmp_path / "bikes.annotated.mp4") as video:
        times = [frame.time for frame in video.frames()]
    assert len(times) == document["frames"] == 31
    assert times[0] == 0.0 and times[-1] == pytest.approx(1.2, abs=1e-3)


def test_detect_threshold_and_labels(short_video, tmp_path, capfd, checkpoint):
    labels = tmp_path / "labels.txt"
    labels.write_text("run\njump\nstand\n")
    options = ("--checkpoint", checkpoint, "--labels", labels, "--out", tmp_path, "--no-video", "--json", "--top", "2")
    status, out, _ = run(capfd, "detect", short_video, *options, "--threshold", "0", "--device", "cpu")
    people = [person for keyframe in json.loads(out)["keyframes"] for person in keyframe["people"]]
    assert status == 0
    assert json.loads(out)["weights"] == str(checkpoint)
    assert len(people) == 2 * PRESET.num_proposals
    assert all(len(person["actions"]) == 2 for person in people)
    assert {action["label"] for person in people for action in person["actions"]} <= {"run", "jump", "stand"}
    for keyframe in json.loads(out)["keyframes"]:
        scores = [person["score"] for person in keyframe["people"]]
        assert scores == sorted(scores, reverse=True)
    status, out, _ = run(capfd, "detect", short_video, *options, "--threshold", "1", "--device", "cpu")
    assert status == 0
    assert not any(keyframe["people"] for keyframe in json.loads(out)["keyframes"])  # nobody is that sure
    assert len(list(csv.reader((tmp_path / "two seconds.detections.csv").open()))) == 2 * PRESET.num_proposals * 3


def test_detect_turned_video(tmp_path, capfd):
    """A picture that is to be shown upright: detections and the annotated video are upright, too."""
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display matrix")
        stream.set_display_rotation(90)
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    status, out, _ = run(capfd, "detect", path, "--out", tmp_path, "--json", *TINY)
    document = json.loads(out)
    assert status == 0
    assert (document["video"]["width"], document["video"]["height"]) == (64, 96)
    with Video(tmp_path / "turned.annotated.mp4") as video:
        assert video.width * 96 == video.height * 64


@pytest.fixture(scope="module")
def folder_of_videos(tmp_path_factory):
    """Two videos of 5 frames, one that is broken, and a file that is none."""
    from evad.video import VideoWriter

    folder = tmp_path_factory.mktemp("videos")
    for name in ("b", "a"):
        with VideoWriter(folder / f"{name}.mp4", 64, 48, 10) as writer:
            for frame in range(5):
                writer.write(np.full((48, 64, 3), 40 * frame, np.uint8), frame / 10)
    (folder / "broken.mp4").write_text("no video")
    (folder / "notes.md").touch()
    return folder


def test_detect_folder(tmp_path, capfd, folder_of_videos):
    arguments = ("--out", tmp_path, "--no-video", "--json", *TINY)
    status, out, err = run(capfd, "detect", folder_of_videos, *arguments)
    assert status == 2
    assert "broken.mp4: not a video" in err and "1 of 3 videos could not be read" in err
    documents = json.loads(out)
    assert [Path(document["video"]["path"]).name for document in documents] == ["a.mp4", "b.mp4"]
    rows = list(csv.reader((tmp_path / "detections.csv").open()))
    assert list(dict.fromkeys(row[0] for row in rows)) == ["a", "b"]
    assert len(rows) == sum(len((tmp_path / f"{name}.detections.csv").read_text().splitlines()) for name in "ab")
    (tmp_path / "list.txt").write_text(f"{folder_of_videos / 'b.mp4'}\n\n")
    status, out, _ = run(capfd, "detect", tmp_path / "list.txt", folder_of_videos / "a.mp4", *arguments)
    assert status == 0 and len(json.loads(out)) == 2


def test_detect_shares_videos_between_processes(tmp_path, folder_of_videos):
    """Started as torchrun starts them: each process does its videos, rank 0 prints and merges."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    videos = [str(folder_of_videos / f"{name}.mp4") for name in "ab"]
    words = [sys.executable, "-m", "evad", "detect", *videos, "--out", str(tmp_path), "--no-video", "--json", *TINY]
    started = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {"RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert [Path(document["video"]["path"]).stem for document in json.loads(outputs[0][0])] == ["a", "b"]
    assert outputs[1][0] == ""
    assert {line.split(",")[0] for line in (tmp_path / "detections.csv").read_text().splitlines()} == {"a", "b"}


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("as_json", [False, True])
def test_interrupt_leaves_valid_files(tmp_path, as_json):
    """Ctrl-C in the middle: exit status 130, and everything up to there can be read."""
    command = [sys.executable, "-m", "evad", "detect", str(BIKES), "--every", "0.04", "--out", str(tmp_path), *TINY]
    process = subprocess.Popen(
        command + ["--json"] * as_json, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    document = tmp_path / "bikes.detections.json"
    deadline = time.monotonic() + 120
    while not (document.exists() and document.read_text().count('"time"') >= 3) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    result = json.loads(document.read_text())
    assert result["interrupted"] and result["frames"] < 250
    if as_json:
        assert json.loads(out) == result
    times = {row[1] for row in csv.reader((tmp_path / "bikes.detections.csv").open())}
    assert times == {ava.format_time(keyframe["time"]) for keyframe in result["keyframes"]}
    with Video(tmp_path / "bikes.annotated.mp4") as video:
        assert sum(1 for _ in video.frames()) == result["frames"]


# visualize


@pytest.mark.parametrize("rate", ["0.7", "1"])
def test_visualize(tmp_path, capfd, rate):
    arguments = ("--time", "5", "--mp4", "--json", "--out", tmp_path, "--keep-rate", rate)
    status, out, err = run(capfd, "visualize", BIKES, *arguments, *TINY)
    assert status == 0 and "random weights" in err
    document = json.loads(out)
    total = int(np.prod(document["grid"]))
    layers = document["layers"]
    if rate == "1":
        assert layers == []
    else:
        assert [layer["layer"] for layer in layers] == [f"layer {block + 1}" for block in PRESET.pruning_blocks]
        assert layers[0]["tokens_kept"] == -(-total * 7 // 10)
    for layer in layers:
        assert sum(layer["per_slice"]) == layer["tokens_kept"]
        assert layer["per_slice"][document["keyframe"]] == total // document["grid"][0]
    with Image.open(document["files"]["png"]) as picture:
        assert picture.width > 600 and picture.height > 200
    with Video(document["files"]["mp4"]) as video:
        assert sum(1 for _ in video.frames()) == 3 * PRESET.num_frames
    assert document["people"]
    for person in document["people"]:
        assert len(person["attention_per_slice"]) == document["grid"][0] and len(person["actions"]) == 2
        assert 0 < sum(person["attention_per_slice"]) < 1  # the rest goes to actors
    with Image.open(document["files"]["attention"]) as picture:
        assert picture.width > 600 and picture.height > 200


def test_visualize_without_decoder(tmp_path, capfd):
    """A model whose decoder has no block has no attention to show."""
    path = tmp_path / "linear.safetensors"
    save_checkpoint(EVAD(EVADConfig.tiny(decoder_depth=0)), path)
    status, out, _ = run(capfd, "visualize", BIKES, "--checkpoint", path, "--out", tmp_path, "--json")
    assert status == 0 and json.loads(out)["people"] == [] and "attention" not in json.loads(out)["files"]


def test_refuses_a_configuration_of_another_version(tmp_path, capfd):
    """Rather than take the default model for it."""
    path = tmp_path / "newer.safetensors"
    about = {"config": {"width": 96, "field_of_a_later_version": 1}, "labels": []}
    save_file({"x": torch.zeros(1)}, path, metadata={"evad": json.dumps(about)})
    status, out, err = run(capfd, "visualize", BIKES, "--checkpoint", path, "--out", tmp_path)
    assert status == 2 and not out
    assert "carries a configuration of another version" in err and "field_of_a_later_version" in err


# profile


def test_profile_json(capfd):
    arguments = ("--model", "tiny", "--size", "96", "128", "--keep-rate", "0.5", "--repeats", "1", "--device", "cpu")
    status, out, _ = run(capfd, "profile", *arguments, "--json")
    document = json.loads(out)
    assert status == 0
    assert document["size"] == [96, 128] and document["keep_rate"] == 0.5
    assert document["gflops"] < document["gflops_paper"] < document["gflops_unpruned"]
    assert sum(document["gflops_by_part"].values()) == pytest.approx(document["gflops"])
    assert sum(document["parameters_by_part"].values()) == document["parameters"]
    assert len(document["tokens"]) == PRESET.depth
    assert document["seconds"] > 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="reads peak memory as Linux reports it")
def test_profile_peak_memory():
    """In a process of its own: what this one has freed would serve the model, too."""
    command = [sys.executable, "-m", "evad", "profile", *TINY[:2], "--size", "96", "96", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    peak = json.loads(done.stdout)["peak_bytes"]
    assert isinstance(peak, int) and 0 < peak < 1e9


def test_model_of_a_training_configuration(tmp_path, capfd):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {preset: tiny, keep_rate: 0.5, num_classes: 3}\ndata: {name: synthetic}\n")
    arguments = ("profile", "--size", "48", "48", "--no-time", "--device", "cpu", "--json", "--model")
    documents = []
    for words in (["tiny", "--keep-rate", "0.5"], [path]):
        status, out, _ = run(capfd, *arguments, *words)
        assert status == 0
        documents.append(json.loads(out))
    assert documents[0]["tokens"] == documents[1]["tokens"] and documents[1]["keep_rate"] == 0.5
    path.write_text("models: {preset: tiny}\n")
    assert "must be sections of ViT, MODEL" in rejected(capfd, *arguments, path)


def test_profile_training(capfd):
    arguments = ("--model", "tiny", "--size", "48", "72", "--train", "--repeats", "1", "--device", "cpu")
    status, out, _ = run(capfd, "profile", *arguments, "--recompute", "--dtype", "bfloat16", "--json")
    document = json.loads(out)
    assert status == 0 and document["batch"] == 2 and document["dtype"] == "bfloat16"
    cost = document["training"]
    assert cost["recompute"] and cost["clips_per_second"] == pytest.approx(2 * cost["steps_per_second"])
    assert list(cost["saved_bytes"]) == ["encoder", "pyramid", "localization", "decoder", "loss"]
    assert cost["memory_counted_by"].startswith("autograd's saved-tensor hooks")
    status, out, _ = run(capfd, "profile", *arguments, "--batch", "1")
    assert status == 0 and "a training step of one clip (cpu" in out and "loss and matching" in out
    assert "steps/s" in out and "kept for" in out
    status, _, err = run(capfd, "profile", *arguments, "--dtype", "float16")
    assert status == 2 and "--dtype: float16 needs a scaled loss" in err


def test_profile_table(capfd):
    status, out, _ = run(capfd, "profile", "--model", "vit_b", "--no-time")
    assert status == 0
    assert "185.36 M" in out and "time" not in out
    assert "1568 1568 1568 1098 1098 1098 769 769 769 539 539 539" in out


# demo


def test_demo(tmp_path, capfd):
    status, out, err = run(capfd, "demo", "--out", tmp_path / "demo", "--device", "cpu")
    assert status == 0, err
    assert "Random weights" not in out
    for name in ("layer 3", "GFLOPs", "kernels", "plain PyTorch", "People found"):
        assert name in out
    for name in ("demo.mp4", "demo.annotated.mp4", "demo.pruning.mp4"):
        with Video(tmp_path / "demo" / name) as video:
            assert video.width > 400
    for name in ("demo.keyframe.png", "demo.pruning.png"):
        with Image.open(tmp_path / "demo" / name) as picture:
            assert picture.width > 400


def test_demo_without_pruning_and_decoder(tmp_path, capfd):
    """Tokens are counted where no layer drops any; what a model does not give is left out."""
    path = tmp_path / "linear.safetensors"
    save_checkpoint(EVAD(EVADConfig.tiny(decoder_depth=0)), path)
    words = ("--checkpoint", path, "--keep-rate", "1", "--device", "cpu", "--out", tmp_path / "demo")
    status, out, err = run(capfd, "demo", *words)
    assert status == 0, err
    tokens = PRESET.num_frames // PRESET.tubelet_size * (PRESET.short_side // PRESET.patch_size) ** 2
    assert re.search(rf"patch embedding +{tokens} +100%", out)
    assert "demo.annotated.mp4" in out and "what people attend to" not in out


# What cannot be done: one line on stderr, exit status 2


def rejected(capfd, *argv):
    status, out, err = run(capfd, *argv)
    assert (status, out) == (2, ""), err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"evad {argv[0]}: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["detect"], "VIDEO"),
        (["detect", BIKES, "--foo"], "unrecognized arguments: --foo"),
        (["detect", BIKES, "--every", "0"], "--every: must be a number at least 0.01"),
        (["detect", BIKES, "--every", "x"], "--every: must be a number"),
        (["detect", BIKES, "--every", "nan"], "--every: must be a number"),
        (["detect", BIKES, "--keep-rate", "0"], "--keep-rate: must be a number above 0 and at most 1"),
        (["detect", BIKES, "--keep-rate", "1.5"], "--keep-rate"),
        (["detect", BIKES, "--size", "0"], "--size: must be a whole number"),
        (["detect", BIKES, "--size", "12.5"], "--size: must be a whole number"),
        (["detect", BIKES, "--threshold", "2"], "--threshold"),
        (["detect", BIKES, "--start", "11"], "--start: 11 s is after the end"),
        (["detect", BIKES, "--start", "2", "--end", "1"], "--end: 1 s is before --start"),
        (["detect", BIKES, "--model", "vit_x"], "--model: 'vit_x' is neither vit_b, vit_l, tiny nor a file"),
        (["detect", BIKES, "--model", BIKES], "--model"),
        (["detect", BIKES, "--device", "toaster"], "--device"),
        (["detect", BIKES, "--device", "cuda:99"], "--device: cuda:99 is not there"),
        (["detect", BIKES, "--dtype", "int8"], "--dtype"),
        (["detect", BIKES, "--checkpoint", "none.pth"], "--checkpoint: none.pth: no such file"),
        (["detect", BIKES, "--labels", "none.txt"], "none.txt: No such file"),
        (["detect", "none.mp4"], "none.mp4: no such file"),
        (["detect", BIKES, HERE / "bikes.mp4"], "would write the same files"),
        (["detect", HERE / "golden"], "is a folder without videos"),
        (["visualize", "none.mp4"], "none.mp4: no such file"),
        (["visualize", BIKES, "--time", "11"], "--time: 11 s is after the end"),
        (["visualize", BIKES, "--time", "-1"], "--time"),
        (["profile", "--size", "224"], "--size: expected 2 arguments"),
        (["profile", "--model", "none.yaml"], "--model"),
        (["demo", "--keep-rate", "-1"], "--keep-rate"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(HERE), "") if isinstance(value, list) else "",
)
def test_rejects_options(capfd, tmp_path, argv, message):
    out = [] if argv[0] == "profile" else ["--out", tmp_path / "out"]
    assert message in rejected(capfd, *argv, *out)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["text", "cut", "audio", "folder"])
def test_rejects_video(capfd, tmp_path, kind):
    path = tmp_path / "input.mp4"
    if kind == "text":
        path.write_text("this is not a video\n" * 50)
    elif kind == "cut":
        path.write_bytes(BIKES.read_bytes()[:3000])
    elif kind == "folder":
        path.mkdir()
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    line = rejected(capfd, "detect", path, "--out", tmp_path / "out", *TINY)
    assert str(path) in line


@pytest.mark.parametrize("kind", ["truncated", "another", "text", "pickle", "empty"])
def test_rejects_checkpoint(capfd, tmp_path, checkpoint, kind):
    path = tmp_path / f"{kind}.safetensors"
    if kind == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:-5000])
    elif kind == "another":
        path = checkpoint
    elif kind == "text":
        path.write_text("no weights here")
    elif kind == "empty":
        path.touch()
    else:
        path = tmp_path / "cut.pth"
        torch.save({"model": {"norm.weight": torch.ones(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    line = rejected(capfd, "detect", BIKES, "--checkpoint", path, "--out", tmp_path / "out", *TINY)
    assert "--checkpoint" in line and str(path) in line


def test_a_folder_is_a_checkpoint(capfd, tmp_path, checkpoint, short_video):
    """A run's, or one of its snapshots."""
    folder = tmp_path / "step_00000006"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(checkpoint.read_bytes())
    arguments = ("--size", "48", "--device", "cpu", "--end", "0", "--no-video", "--json", "--out", tmp_path)
    status, out, err = run(capfd, "detect", short_video, "--checkpoint", folder, *arguments)
    assert status == 0, err
    assert len(json.loads(out)["labels"]) == 3 and json.loads(out)["weights"] == str(folder)
    line = rejected(capfd, "detect", BIKES, "--checkpoint", tmp_path, "--out", tmp_path)
    assert f"--checkpoint: {tmp_path} has no model.safetensors of a run, nor is it" in line


def test_a_list_with_a_byte_order_mark(capfd, tmp_path):
    (tmp_path / "list.txt").write_text("none.mp4\n", encoding="utf-8-sig")
    assert f"{tmp_path / 'none.mp4'}: no such file" in rejected(capfd, "detect", tmp_path / "list.txt", *TINY)


def test_full_disk_names_the_folder(capfd, tmp_path, short_video):
    (tmp_path / "two seconds.detections.csv").symlink_to("/dev/full")
    status, _, err = run(capfd, "detect", short_video, "--end", "0", "--out", tmp_path, "--no-video", *TINY)
    assert status == 2 and err.strip().endswith(f"evad detect: {tmp_path}: No space left on device")


def test_full_disk_of_the_video(tmp_path, short_video):
    """In a process of its own: FFmpeg crashed when it was called after a header that could not be written."""
    (tmp_path / "two seconds.annotated.mp4").symlink_to("/dev/full")
    command = [sys.executable, "-m", "evad", "detect", str(short_video), "--end", "1", "--out", str(tmp_path), *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 2 and "annotated.mp4: No space left on device" in done.stderr


def test_partial_checkpoint_is_said(capfd, tmp_path, short_video):
    """An encoder alone, as VideoMAE has it: runs, and says that the rest is random."""
    model = EVAD(PRESET)
    names = [name for name in model.state_dict() if name.startswith("encoder.")]
    path = tmp_path / "encoder.pth"
    torch.save({name: model.state_dict()[name] for name in names}, path)
    arguments = ("--checkpoint", path, "--out", tmp_path, "--no-video", "--json")
    status, out, err = run(capfd, "detect", short_video, *arguments, *TINY)
    assert status == 0
    assert json.loads(out)["weights"] == "partial"
    assert f"has no weights for {len(model.state_dict()) - len(names)} of {len(model.state_dict())} tensors" in err


def test_what_loading_warns_of_is_said(capfd, tmp_path, short_video):
    """A released checkpoint with a tensor too many: neither that nor the order of tokens goes by in silence."""
    model = EVAD(PRESET)
    names = released_names(model)
    state = {names[name]: tensor for name, tensor in model.state_dict().items()} | {"ema.decay": torch.ones(1)}
    torch.save({"model_state": state}, tmp_path / "evad.pyth")
    arguments = ("--checkpoint", tmp_path / "evad.pyth", "--end", "0", "--out", tmp_path, "--no-video", "--json")
    status, out, err = run(capfd, "detect", short_video, *arguments, *TINY)
    assert status == 0 and json.loads(out)["weights"] == str(tmp_path / "evad.pyth")
    assert "evad.pyth has 1 tensors that the model does not have (ema.decay, ...)" in err
    assert "trained with token_order='importance'; this model has token_order='position'" in err
    status, _, err = run(capfd, "detect", short_video, *arguments, *TINY, "--token-order", "importance")
    assert status == 0 and "ema.decay" in err and "token_order" not in err


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "no labels"), (b"\xff\x00\xfe", "UTF-8"), (b"run\njump\n", "has 2 labels, the model 80")],
)
def test_rejects_labels(capfd, tmp_path, data, message):
    path = tmp_path / "labels.txt"
    path.write_bytes(data)
    assert message in rejected(capfd, "detect", BIKES, "--labels", path, "--out", tmp_path / "out", *TINY)


def test_rejects_output_folder(capfd, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        assert str(out) in rejected(capfd, "detect", BIKES, "--out", out, *TINY)
        assert str(out) in rejected(capfd, "demo", "--out", out)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_rejects_folder_without_permission(capfd, tmp_path):
    tmp_path.chmod(0o500)
    assert str(tmp_path) in rejected(capfd, "detect", BIKES, "--out", tmp_path, *TINY)
    tmp_path.chmod(0o700)


def test_as_a_program(tmp_path):
    """``python -m evad``: help lists the commands; a bad file is one line and exit status 2."""
    help = subprocess.run([sys.executable, "-m", "evad", "-h"], capture_output=True, text=True, cwd=HERE.parent)
    assert help.returncode == 0
    commands = ("demo", "detect", "train", "evaluate", "visualize", "profile", "export")
    assert all(f"evad {command}" in help.stdout for command in commands)
    command = [sys.executable, "-m", "evad", "detect", str(HERE / "conftest"), "--out", str(tmp_path)]
    bad = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.count("\n") == 1 and bad.stderr.startswith("evad detect: ")


@pytest.mark.parametrize("command", ["demo", "detect", "visualize", "profile"])
def test_help(capfd, command):
    status, out, _ = run(capfd, command, "-h")
    assert status == 0
    assert out.startswith(f"usage: evad {command}") and "--json" in out
