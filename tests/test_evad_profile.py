"""The cost of a detector: the paper's Tables 2, 3, 4 and 6, by counting."""

import platform
from functools import partial

import pytest
import torch

from evad import EVAD, EVADConfig
from evad.profile import PARTS, TRAINED, bfloat16_is_slow, measure, measure_in_turns, profile, profile_training

# GFLOPs in the paper, and more exactly by its convention.
PAPER = {
    ("vit_b", 224, 1.0): (223.8, 223.819),
    ("vit_b", 224, 0.9): (186.3, 186.292),
    ("vit_b", 224, 0.8): (157.0, 157.007),
    ("vit_b", 224, 0.7): (134.2, 134.169),
    ("vit_b", 224, 0.6): (116.3, 116.267),
    ("vit_b", 256, 1.0): (311.9, 311.885),
    ("vit_b", 256, 0.7): (182.3, 182.327),
    ("vit_b", 288, 1.0): (424.5, 424.528),
    ("vit_b", 288, 0.9): (346.3, 346.296),
    ("vit_b", 288, 0.8): (287.4, 287.381),
    ("vit_b", 288, 0.7): (242.8, 242.780),
    ("vit_b", 288, 0.6): (208.9, 208.880),
    ("vit_l", 224, 1.0): (707.9, 707.898),
    ("vit_l", 224, 0.7): (409.4, 409.419),
    ("vit_l", 288, 0.7): (737.0, 737.114),
}


@pytest.mark.parametrize(("preset", "size", "keep_rate"), PAPER)
def test_reproduces_the_papers_gflops(preset, size, keep_rate):
    paper, exact = PAPER[preset, size, keep_rate]
    cost = profile(getattr(EVADConfig, preset)(keep_rate), (size, size))
    assert cost.gflops_paper == pytest.approx(paper, rel=3e-3)
    assert cost.gflops_paper == pytest.approx(exact, rel=1e-4)
    assert list(cost.gflops_by_part) == list(PARTS)
    assert sum(cost.gflops_by_part.values()) == pytest.approx(cost.gflops)
    # What is not executed: the projection of rows that a pruning block drops.
    config = getattr(EVADConfig, preset)()
    kept = [(size // 16) ** 2 * 8, *(cost.tokens[block] for block in config.pruning_blocks)]
    dropped = kept[0] - kept[-1]
    assert cost.gflops_paper - cost.gflops == pytest.approx(dropped * config.width**2 / 1e9, abs=1e-9)


def test_tokens_and_parameters():
    cost = profile(EVADConfig.vit_b(1.0), keep_rate=0.7)
    assert cost.tokens == (*[1568] * 3, *[1098] * 3, *[769] * 3, *[539] * 3)
    assert cost.parameters == pytest.approx(185.36e6, rel=1e-4)
    assert cost.gflops_by_part["patch_embed"] == pytest.approx(1568 * 768 * 3 * 2 * 16 * 16 / 1e9)
    assert profile(EVADConfig.vit_b(1.0)).tokens == (1568,) * 12


def test_profiles_a_model_without_touching_it():
    model = EVAD(EVADConfig.tiny(0.6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost = profile(model, (96, 130), 0.8)
    assert cost.tokens[-1] == profile(model.config, (96, 144), 0.8).tokens[-1]
    assert model.config.keep_rate == 0.6 and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("machine", "capability", "slow"),
    [
        ("x86_64", "AVX2", True),
        ("AMD64", "DEFAULT", True),
        ("x86_64", "AVX512", False),
        ("x86_64", "AVX512_BF16", False),
        ("aarch64", "DEFAULT", False),
    ],
)
def test_where_bfloat16_is_slow(monkeypatch, machine, capability, slow):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bfloat16_is_slow("cpu") is slow and not bfloat16_is_slow("cuda")


def test_measure():
    block = 64 * 2**20
    result = measure(lambda: torch.ones(block // 4).sum(), repeats=3)
    assert 0 < result.seconds_p20 <= result.seconds <= result.seconds_p80
    assert result.peak_bytes is None or 0.5 * block < result.peak_bytes < 4 * block


def test_measures_in_turns():
    calls = []
    seconds = measure_in_turns({name: partial(calls.append, name) for name in "ab"}, rounds=3)
    assert calls == ["a", "b"] * 4 and set(seconds) == {"a", "b"} and min(seconds.values()) > 0


def training_cost(rate, recompute=False, seed=0):
    torch.manual_seed(seed)
    model = EVAD(EVADConfig.tiny(rate, drop_path=0.0, decoder_drop_path=0.0)).train()
    model.set_recomputation(recompute)
    targets = [{"boxes": torch.tensor([[10.0, 10.0, 50.0, 60.0]]), "labels": torch.ones(1, model.config.num_classes)}]
    return profile_training(model, torch.randn(1, 3, 16, 96, 96), targets, repeats=1), model


def test_profiles_training():
    cost, model = training_cost(0.7)
    parts = [*TRAINED, "loss"]
    assert list(cost.forward_seconds) == list(cost.backward_seconds) == list(cost.saved_bytes) == parts
    times = (*cost.forward_seconds.values(), *cost.backward_seconds.values(), cost.optimizer_seconds, cost.seconds)
    assert min(times) > 0 and min(cost.saved_bytes.values()) > 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert cost.weight_bytes == cost.gradient_bytes == 4 * parameters
    assert cost.optimizer_bytes >= 8 * parameters
    # The decoder keeps at least the input of each linear layer of its blocks.
    config, tokens = model.config, profile(model).tokens[-1] + model.config.num_proposals
    rows = 4 * tokens * config.decoder_width * (1 + 1 + 1 + config.decoder_mlp_ratio)
    assert config.decoder_depth * rows < cost.saved_bytes["decoder"] < 6 * config.decoder_depth * rows
    assert cost.peak_bytes_by_part is None  # a GPU's allocator tells


def test_what_saves_memory_in_training():
    (whole, _), (pruned, _), (recomputed, _) = (training_cost(*how) for how in ((1.0,), (0.6,), (1.0, True)))
    for part in ("encoder", "decoder"):
        assert pruned.saved_bytes[part] < 0.9 * whole.saved_bytes[part]
        assert recomputed.saved_bytes[part] < 0.4 * whole.saved_bytes[part]
    for part in ("pyramid", "localization"):
        assert pruned.saved_bytes[part] == whole.saved_bytes[part] == recomputed.saved_bytes[part]
