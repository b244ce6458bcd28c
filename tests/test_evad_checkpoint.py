"""Checkpoints of every format, on small files made in that format."""

import argparse
import dataclasses
import json
import pickle
import warnings

import pytest
import torch

from evad import EVAD, EVADConfig
from evad.checkpoint import CheckpointError, load_checkpoint, read_config, released_names, save_checkpoint

CONFIG = EVADConfig.tiny(
    width=24,
    depth=4,
    pruning_blocks=(1,),
    pyramid_blocks=(0, 1, 2, 3),
    num_proposals=3,
    query_width=12,
    num_stages=2,
    query_mlp_width=16,
    dynamic_width=4,
    decoder_width=16,
    action_width=8,
    num_classes=5,
)
WIDTH = CONFIG.width


def model(seed=0, config=CONFIG):
    """A detector every parameter of which is random."""
    torch.manual_seed(seed)
    detector = EVAD(config)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.normal_()
    return detector


def released_state(source):
    return {released: source.get_parameter(name).detach().clone() for name, released in released_names(source).items()}


def assert_same(target, source, prefix=""):
    for name, parameter in target.named_parameters():
        if name.startswith(prefix):
            assert torch.equal(parameter, source.get_parameter(name)), name


def encoder_names(source):
    return {name for name, _ in source.named_parameters() if name.startswith("encoder.")}


# The keys of a released checkpoint, written out by hand for the parts a pattern could confuse.
RELEASED = {
    "encoder.patch_embed.weight": "patch_embed.proj.weight",
    "encoder.blocks.3.norm1.weight": "blocks.3.norm1.weight",
    "encoder.blocks.3.attn.q_bias": "blocks.3.attn.q_bias",
    "encoder.blocks.3.attn.qkv.weight": "blocks.3.attn.qkv.weight",
    "encoder.blocks.3.mlp.fc2.bias": "blocks.3.mlp.fc2.bias",
    "encoder.norm.bias": "norm.bias",
    "pyramid.lateral.0.weight": "fpn_lateral2.weight",
    "pyramid.output.3.bias": "fpn_output5.bias",
    "localization.proposal_boxes": "init_proposal_boxes.weight",
    "localization.proposal_features": "init_proposal_features.weight",
    "localization.stages.1.attn.qkv.weight": "det_head.s0_headseries.1.self_attn.in_proj_weight",
    "localization.stages.1.attn.qkv.bias": "det_head.s0_headseries.1.self_attn.in_proj_bias",
    "localization.stages.1.attn.proj.bias": "det_head.s0_headseries.1.self_attn.out_proj.bias",
    "localization.stages.1.interaction.weights.weight": "det_head.s0_headseries.1.inst_interact.dynamic_layer.weight",
    "localization.stages.1.interaction.norm1.weight": "det_head.s0_headseries.1.inst_interact.norm1.weight",
    "localization.stages.1.interaction.out.bias": "det_head.s0_headseries.1.inst_interact.out_layer.bias",
    "localization.stages.1.norm1.weight": "det_head.s0_headseries.1.norm1.weight",
    "localization.stages.1.fc1.weight": "det_head.s0_headseries.1.linear1.weight",
    "localization.stages.1.fc2.bias": "det_head.s0_headseries.1.linear2.bias",
    "localization.stages.1.score_tower.0.weight": "det_head.s0_headseries.1.cls_module.0.weight",
    "localization.stages.1.score_tower.1.bias": "det_head.s0_headseries.1.cls_module.1.bias",
    "localization.stages.1.box_tower.6.weight": "det_head.s0_headseries.1.reg_module.6.weight",
    "localization.stages.1.score.weight": "det_head.s0_headseries.1.class_logits.weight",
    "localization.stages.1.box.bias": "det_head.s0_headseries.1.bboxes_delta.bias",
    "decoder.mask_token": "det_head.mask_token",
    "decoder.project.weight": "det_head.encoder_to_decoder.weight",
    "decoder.blocks.1.attn.v_bias": "det_head.decoder.blocks.1.attn.v_bias",
    "decoder.classifiers.1.0.weight": "det_head.decoder.blocks.1.act_module.0.weight",
    "decoder.classifiers.1.1.bias": "det_head.decoder.blocks.1.act_module.1.bias",
    "decoder.classifiers.1.3.weight": "det_head.decoder.blocks.1.action_logits.weight",
}


def test_released_names():
    names = released_names(model())
    assert {name: names[name] for name in RELEASED} == RELEASED
    with torch.device("meta"):
        names = released_names(EVAD(EVADConfig.vit_b()))
    assert len(names) == len(set(names.values())) == 528


def test_own_file(tmp_path):
    source, target = model(1), model(2, config=CONFIG)
    path = tmp_path / "evad.safetensors"
    save_checkpoint(source, path)
    assert read_config(path) == CONFIG
    report = load_checkpoint(target, path)
    assert_same(target, source)
    assert len(report.loaded) == len(list(source.parameters())) and report.missing == report.unexpected == ()
    renamed = tmp_path / "evad.ckpt"  # known by content, not by suffix
    path.rename(renamed)
    assert load_checkpoint(model(2), str(renamed)).missing == () and read_config(str(renamed)) == CONFIG


def test_own_state_dict(tmp_path):
    source, target = model(1), model(2).bfloat16()
    torch.save({f"module.{name}": tensor for name, tensor in source.state_dict().items()}, tmp_path / "evad.pt")
    report = load_checkpoint(target, tmp_path / "evad.pt")
    assert_same(target, source.bfloat16())
    assert report.missing == report.unexpected == () and target.encoder.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model", "module", "model_state"])
def test_released_checkpoint(tmp_path, name):
    config = dataclasses.replace(CONFIG, token_order="importance")
    source, target = model(1), model(2, config)
    state = {**released_state(source), "criterion.empty_weight": torch.tensor([1.0, config.background_weight])}
    content = {"epoch": 3, name: state, "optimizer_state": {"state": {}}, "cfg": "ViT:\n", "amp": None}
    torch.save(content, tmp_path / "evad.pyth")
    report = load_checkpoint(target, tmp_path / "evad.pyth")
    assert_same(target, source)
    assert report.missing == report.unexpected == ()
    state["criterion.empty_weight"][1] = 0.5
    torch.save(content, tmp_path / "evad.pyth")
    with pytest.warns(UserWarning, match=r"1 not in the model: criterion\.empty_weight"):
        assert load_checkpoint(target, tmp_path / "evad.pyth").unexpected == ("criterion.empty_weight",)


def test_released_checkpoint_warns_of_another_token_order(tmp_path):
    torch.save({"model_state": released_state(model())}, tmp_path / "evad.pyth")
    with pytest.warns(UserWarning, match="trained with token_order='importance'"):
        load_checkpoint(model(), tmp_path / "evad.pyth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(model(config=dataclasses.replace(CONFIG, token_order="importance")), tmp_path / "evad.pyth")
        load_checkpoint(model(config=dataclasses.replace(CONFIG, keep_rate=1.0)), tmp_path / "evad.pyth")


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])  # v1; v2 where torch.compile's wrapper was saved
@pytest.mark.parametrize("prefix", ["encoder.", "backbone."])
def test_videomae_pretrained(tmp_path, prefix, compiled):
    """The encoder under a prefix; a decoder as wide as ours continues in ours; the rest is reported."""
    source, target, before = model(1), model(2), model(2)
    state = released_state(source)
    pretrained = {
        f"{prefix}{key}": tensor for key, tensor in state.items() if key.startswith(("patch", "blocks", "norm"))
    }
    for key, tensor in state.items():
        if key.startswith(("det_head.decoder.blocks.0", "det_head.encoder_to")) and "act" not in key:
            pretrained[key.removeprefix("det_head.")] = tensor
    pretrained["decoder.head.weight"] = pretrained["mask_token"] = torch.zeros(2)
    pretrained = {compiled + key: tensor for key, tensor in pretrained.items()}
    torch.save({"model": pretrained, "args": argparse.Namespace(lr=0.1)}, tmp_path / "videomae.pth")
    with pytest.warns(UserWarning, match="not in the file.*2 not in the model"):
        report = load_checkpoint(target, tmp_path / "videomae.pth")
    assert_same(target, source, "encoder.")
    assert_same(target, source, "decoder.blocks.0.")
    assert_same(target, source, "decoder.project.")
    assert_same(target, before, "decoder.blocks.1.")
    assert_same(target, before, "localization.")
    assert report.unexpected == ("decoder.head.weight", "mask_token")
    assert set(report.loaded) | set(report.missing) == {name for name, _ in target.named_parameters()}


@pytest.mark.parametrize(
    ("classes", "dtype"), [(400, torch.float32), (710, torch.float16)], ids=["v1", "v2"]
)  # v2's distilled ViT-B: of all Kinetics' 710 classes, in half precision
def test_videomae_finetuned(tmp_path, classes, dtype):
    source, target = model(1).to(dtype).float(), model(2)
    state = {key: tensor for key, tensor in released_state(source).items() if key.startswith(("patch", "blocks"))}
    state |= {"fc_norm.weight": torch.ones(WIDTH), "head.weight": torch.ones(classes, WIDTH)}
    torch.save({"module": {key: tensor.to(dtype) for key, tensor in state.items()}}, tmp_path / "videomae.pth")
    with pytest.warns(UserWarning, match="not in the file"):
        report = load_checkpoint(target, tmp_path / "videomae.pth")
    assert set(report.loaded) == encoder_names(source) - {"encoder.norm.weight", "encoder.norm.bias"}
    assert report.unexpected == ("fc_norm.weight", "head.weight")
    for name in report.loaded:
        assert torch.equal(target.get_parameter(name), source.get_parameter(name))


def hugging_face_state(source, *, biases, pretrained):
    """The encoder, and for a pre-trained model the decoder's first block, in Hugging Face's keys."""
    state = {
        "videomae.embeddings.patch_embeddings.projection.weight": source.encoder.patch_embed.weight,
        "videomae.embeddings.patch_embeddings.projection.bias": source.encoder.patch_embed.bias,
    }
    parts = [(f"videomae.encoder.layer.{i}.", block) for i, block in enumerate(source.encoder.blocks)]
    if pretrained:
        state["encoder_to_decoder.weight"] = source.decoder.project.weight
        state |= {"videomae.layernorm.weight": source.encoder.norm.weight, "mask_token": torch.zeros(1)}
        state["videomae.layernorm.bias"] = source.encoder.norm.bias
        parts.append(("decoder.decoder_layers.0.", source.decoder.blocks[0]))
    else:
        state["classifier.weight"] = torch.zeros(7, WIDTH)
    for prefix, block in parts:
        attention, width = f"{prefix}attention.attention.", len(block.attn.q_bias)
        for name, weight in zip(("query", "key", "value"), block.attn.qkv.weight.split(width), strict=True):
            state[f"{attention}{name}.weight"] = weight
        if biases == "separate":
            state |= {f"{attention}q_bias": block.attn.q_bias, f"{attention}v_bias": block.attn.v_bias}
        else:
            state |= {f"{attention}query.bias": block.attn.q_bias, f"{attention}value.bias": block.attn.v_bias}
            state[f"{attention}key.bias"] = torch.ones(width)
        for theirs, ours in {
            "attention.output.dense": block.attn.proj,
            "layernorm_before": block.norm1,
            "layernorm_after": block.norm2,
            "intermediate.dense": block.mlp.fc1,
            "output.dense": block.mlp.fc2,
        }.items():
            state |= {f"{prefix}{theirs}.weight": ours.weight, f"{prefix}{theirs}.bias": ours.bias}
    return {key: tensor.detach().clone() for key, tensor in state.items()}


@pytest.mark.parametrize("biases", ["separate", "linear"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folder(tmp_path, file, biases):
    from safetensors.torch import save_file

    source, target = model(1), model(2)
    state = hugging_face_state(source, biases=biases, pretrained=file.endswith("bin"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videomae"}))
    (torch.save if file.endswith("bin") else save_file)(state, tmp_path / file)
    with pytest.warns(UserWarning, match="not in the file"):
        report = load_checkpoint(target, tmp_path)
    for name in report.loaded:
        assert torch.equal(target.get_parameter(name), source.get_parameter(name)), name
    if file.endswith("bin"):
        decoder = {name for name, _ in source.named_parameters() if name.startswith("decoder.blocks.0.")}
        assert set(report.loaded) == encoder_names(source) | decoder | {"decoder.project.weight"}
        assert report.unexpected == ("mask_token",)
    else:
        assert set(report.loaded) == encoder_names(source) - {"encoder.norm.weight", "encoder.norm.bias"}
        assert report.unexpected == ("classifier.weight",)


def test_a_keys_bias_changes_nothing():
    """Why Hugging Face's key.bias may be left out: it shifts a query's logits by a constant."""
    query, key, bias = torch.randn(5, 8), torch.randn(6, 8), torch.randn(8)
    torch.testing.assert_close((query @ (key + bias).T).softmax(1), (query @ key.T).softmax(1))


def test_rejects_another_model(tmp_path):
    wide = model(1, config=dataclasses.replace(CONFIG, width=48))
    path = tmp_path / "wide.safetensors"
    save_checkpoint(wide, path)
    target, before = model(2), model(2)
    with pytest.raises(CheckpointError, match=r"checkpoint of another model: \S+ is \[.*48.*\] in the file, \["):
        load_checkpoint(target, path)
    assert_same(target, before)


def test_rejects_files_with_nothing_for_us(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"no parameter of EVAD; its keys: conv1\.weight"):
        load_checkpoint(model(), tmp_path / "resnet.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        load_checkpoint(model(), tmp_path / "nothing.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        load_checkpoint(model(), tmp_path / "tensor.pth")


@pytest.mark.parametrize("size", [0, 5, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_rejects_truncated_files(tmp_path, suffix, size):
    path = tmp_path / f"evad{suffix}"
    if suffix == ".pth":
        torch.save(released_state(model()), path)
    else:
        save_checkpoint(model(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * size) if isinstance(size, float) else size])
    with pytest.raises(CheckpointError, match=f"evad{suffix} "):
        load_checkpoint(model(), path)


class Untrusted:
    def __reduce__(self):
        return print, ("run while loading",)


def test_rejects_pickles_with_code(tmp_path, capsys):
    torch.save({"model": released_state(model()), "extra": Untrusted()}, tmp_path / "evad.pth")
    with pytest.raises(CheckpointError, match=r"holds more than weights \(.+\) and is not trusted$"):
        load_checkpoint(model(), tmp_path / "evad.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Untrusted()))
    with pytest.raises(CheckpointError):
        load_checkpoint(model(), tmp_path / "plain.pkl")
    assert capsys.readouterr().out == ""


def test_rejects_missing_and_foreign_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_checkpoint(model(), tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"nor is it a Hugging Face model folder: config\.json"):
        load_checkpoint(model(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(CheckpointError, match="checkpoint of another model: 'vit'"):
        load_checkpoint(model(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videomae"}))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_checkpoint(model(), tmp_path)


def test_rejects_files_without_configuration(tmp_path):
    from safetensors.torch import save_file

    torch.save({}, tmp_path / "evad.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata={"evad": '{"config": {"colour": 3}}'})
    for name, message in {
        "evad.pth": "no EVAD conf",
        "plain.safetensors": "no EVAD conf",
        "newer.safetensors": "colour",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path / name)
