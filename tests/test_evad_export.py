"""Exported inference runs elsewhere, with the same results: another process without this package, and onnxruntime."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evad import EVAD, EVADConfig, export, load_checkpoint, read_config
from evad.cli import main
from evad.detector import EVADOutput, select_detections
from evad.export import export_onnx, export_program, output_names
from evad.video import Video, normalize, read_clip, resize
from evad.weights import TINY

BIKES = Path(__file__).parent / "media" / "bikes.mp4"
SIZE = (48, 72)


def build(keep_rate, **fields):
    torch.manual_seed(0)
    config = EVADConfig.tiny(keep_rate=keep_rate)
    return EVAD(dataclasses.replace(config, num_stages=1, decoder_depth=1, **fields)).eval()


def expected(model, clips):
    with torch.no_grad():
        person_logits, boxes, action_logits, kept = model(clips)
    return dict(zip(output_names(model), (person_logits, boxes, action_logits, *kept), strict=True))


def assert_same(actual, want):
    for (name, expectation), result in zip(want.items(), actual, strict=True):
        result = torch.as_tensor(result)
        assert result.shape == expectation.shape and result.dtype == expectation.dtype, name
        if name.startswith("kept"):
            assert torch.equal(result, expectation), name
        else:
            torch.testing.assert_close(result, expectation, rtol=1e-4, atol=5e-3 if name == "boxes" else 1e-4, msg=name)


def outputs_elsewhere(folder, load, clips):
    """Outputs of a program that the expression ``load`` loads in ``folder``, by a process without this package."""
    torch.save(clips, folder / "clips.pt")
    code = (
        f"import sys, torch\nprogram = {load}\n"
        "torch.save(program(torch.load('clips.pt')), 'outputs.pt')\n"
        "assert 'evad' not in sys.modules and 'evad_kernels' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "outputs.pt")


def test_program_runs_in_a_process_without_this_package(tmp_path):
    model = build(0.7, depth=4, pruning_blocks=(1, 2), pyramid_blocks=(0, 1, 2, 3))
    torch.export.save(export_program(model.train(), SIZE), tmp_path / "evad.pt2")
    assert model.training
    clips = torch.randn(3, 3, 16, *SIZE)  # traced with 2
    outputs = outputs_elsewhere(tmp_path, "torch.export.load('evad.pt2').module()", clips)
    assert_same(outputs, expected(model.eval(), clips))


@pytest.mark.slow
def test_aotinductor_package_runs_in_a_process_without_this_package(tmp_path):
    model = build(0.7, depth=4, pruning_blocks=(1, 2), pyramid_blocks=(0, 1, 2, 3))
    package = str(tmp_path / "evad.pt2")
    torch._inductor.aoti_compile_and_package(export_program(model, SIZE), package_path=package)
    clips = torch.randn(3, 3, 16, *SIZE)
    outputs = outputs_elsewhere(tmp_path, "torch._inductor.aoti_load_package('evad.pt2')", clips)
    assert_same(outputs, expected(model, clips))


@pytest.mark.slow
@pytest.mark.parametrize("keep_rate", [1.0, 0.6])
def test_onnx_gives_the_same_boxes_and_scores(tmp_path, keep_rate):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = build(keep_rate, depth=4, pruning_blocks=(1, 2), pyramid_blocks=(0, 1, 2, 3))
    export_onnx(model, tmp_path / "evad.onnx", SIZE)
    session = onnxruntime.InferenceSession(tmp_path / "evad.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == output_names(model)
    for B in (1, 2):
        clips = torch.randn(B, 3, 16, *SIZE)
        outputs = session.run(None, {"clips": clips.numpy()})
        assert all(isinstance(output, np.ndarray) for output in outputs)
        assert_same(outputs, expected(model, clips))


@pytest.mark.slow
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_onnx_finds_the_same_people_in_a_video(tmp_path, keep_rate):
    """The shipped model on nine clips of a real video: every proposal, and what is detected."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = EVAD(read_config(TINY)).eval()
    load_checkpoint(model, TINY)
    model.set_keep_rate(keep_rate)
    with Video(BIKES) as video:
        prepare = lambda frame: resize(frame.rgb(), model.config.short_side)  # noqa: E731
        clips = [normalize(read_clip(video, float(t), prepare=prepare).samples) for t in range(1, 10)]
    clips = torch.stack(clips)
    size = tuple(clips.shape[-2:])
    export_onnx(model, tmp_path / "evad.onnx", size)
    session = onnxruntime.InferenceSession(tmp_path / "evad.onnx", providers=["CPUExecutionProvider"])
    outputs = [torch.from_numpy(output) for output in session.run(None, {"clips": clips.numpy()})]
    assert_same(outputs, expected(model, clips))
    actual = select_detections(EVADOutput(*outputs[:3], tuple(outputs[3:])), [size] * len(clips), 0.3)
    detected = model.detect(clips, threshold=0.3)
    assert sum(len(found.boxes) for found in detected) > 0
    for found, want in zip(actual, detected, strict=True):
        for got, expectation in zip(found, want, strict=True):
            torch.testing.assert_close(got, expectation, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize(
    ("options", "dtype"), [((), torch.float32), (("--dtype", "bfloat16"), torch.bfloat16)], ids=["default", "asked"]
)
def test_command_exports_float32_on_the_cpu(tmp_path, capsys, monkeypatch, options, dtype):
    """Also where there is a GPU, on which other commands run in bfloat16; and the line says so."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(export, "export_program", lambda model, size: seen.append(model))
    monkeypatch.setattr(torch.export, "save", lambda program, path: None)
    assert main(["export", str(tmp_path / "evad.pt2"), "--model", "tiny", *options]) == 0
    weight = seen[0].encoder.patch_embed.weight
    assert (weight.device.type, weight.dtype) == ("cpu", dtype)
    assert f"clips [B, 3, 16, 96, 96] {str(dtype).removeprefix('torch.')} on cpu" in capsys.readouterr().out


def test_command_rejects_bad_input(tmp_path, capsys):
    assert main(["export", str(tmp_path / "model.bin")]) == 2
    assert "FILE must end in .onnx or .pt2" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "none" / "model.onnx")]) == 2
    assert "no such folder" in capsys.readouterr().err
