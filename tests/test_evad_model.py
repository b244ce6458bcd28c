"""The detector against the released code's numbers, against itself on other backends, and at its edges."""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import evad_kernels
from evad import EVAD, EVADConfig, EVADOutput, select_detections
from evad.checkpoint import released_names
from evad.decoder import extend_boxes
from evad.localization import move_boxes
from evad.tokens import PositionTable, Tokens, sincos_table
from evad_kernels.testing import on_default_device

GOLDEN = Path(__file__).parent / "golden"
TOKENS = {"atol": 1e-4, "rtol": 1e-4}
BOXES = {"atol": 5e-3, "rtol": 0}  # pixels

MICRO = {
    "num_frames": 8,
    "depth": 4,
    "pruning_blocks": (1, 2),
    "pyramid_blocks": (0, 1, 2, 3),
    "num_proposals": 5,
    "num_stages": 2,
    "decoder_depth": 2,
    "num_classes": 7,
}


def micro(keep_rate=0.7, *, seed=0, **fields):
    """A small detector whose attention is far from flat, so that importance tells tokens apart."""
    torch.manual_seed(seed)
    model = EVAD(EVADConfig.tiny(keep_rate, **{**MICRO, **fields})).eval()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


def clip(height=96, width=96, *, frames=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return on_default_device(torch.randn(3, frames, height, width, generator=generator, device="cpu"))


def load(name, kind):
    archive = np.load(GOLDEN / f"tiny_{name}_{kind}.npz", allow_pickle=False)
    return {
        key: torch.from_numpy(archive[key]) if archive[key].dtype.kind in "fiu" else archive[key] for key in archive
    }


def here(values):
    """The same values, tensors on the default device."""
    return {key: on_default_device(value) for key, value in values.items()}


@pytest.fixture(scope="module", params=["A", "C"])
def golden(request):
    """The name, weights and recorded values of a golden model."""
    return request.param, load(request.param, "weights"), load(request.param, "eval")


def golden_model(weights, token_order):
    config = EVADConfig.from_official(json.loads(str(weights["config_json"])))
    model = EVAD(dataclasses.replace(config, token_order=token_order)).eval()
    released = released_names(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[released[name]])
    return model


def golden_clip(values):
    return ((values["clip0_u8"].float() / 255 - 0.45) / 0.225)[None]


def record(module, into, name, pick=lambda output: output):
    module.register_forward_hook(lambda _, inputs, output: into.__setitem__(name, pick(output)))


@pytest.mark.parametrize("token_order", ["importance", "position"])
def test_matches_golden(golden, token_order, backend):
    name, weights, values = golden
    values = here(values)
    model = golden_model(weights, token_order)
    clips = golden_clip(values)
    prefix = "" if token_order == "importance" else "ordered/"
    seen = {}
    for i, block in enumerate(model.encoder.blocks):
        record(block, seen, f"block{i}_out", lambda output: getattr(output, "x", output))
    for i, stage in enumerate(model.localization.stages):
        record(stage, seen, f"stage{i}", lambda output: output)
    for i, block in enumerate(model.decoder.blocks):
        record(block, seen, f"dec{i}_out")
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(dec_in=inputs[0]))
    with torch.no_grad():
        predictions = model.predict(clips, every_stage=True)
        encoded = model.encoder(clips)
        tokens, grid = model.encoder.embed(clips)
        levels = model.pyramid(encoded.keyframes)
    assert grid == tuple(values["grid"].tolist())

    # Encoder. Tokens are recorded in clip order before the encoder, in released order after it.
    assert_close(tokens.x, values["tokens_embed"].gather(1, tokens.position[..., None].expand_as(tokens.x)), **TOKENS)
    codes = model.encoder.position_table(*grid[1:], torch.float32)
    assert_close(codes, values["pos_enc"][0], **TOKENS)
    pruning = model.config.pruning_blocks if name == "A" else ()
    assert len(predictions.kept) == len(pruning)
    kept, official = tokens.position, tokens.position  # rows of ours, rows as recorded
    for i in range(model.config.depth):
        if i in pruning:
            kept, official = predictions.kept[pruning.index(i)], values[f"prune{i}_kept_official_order"]
            num_keyframe = tokens.num_keyframe
            assert torch.equal(kept.sort().values, values[f"prune{i}_kept_sorted"])
            if token_order == "importance":
                assert torch.equal(kept, official)
            else:
                assert torch.equal(kept[:, :num_keyframe], official[:, :num_keyframe])
                assert (kept[:, num_keyframe:].diff() > 0).all()
        assert_close(seen[f"block{i}_out"], reordered(values[f"block{i}_out"], official, kept), **TOKENS)
    assert_close(encoded.tokens.x, reordered(values["enc_tokens"], official, kept), **TOKENS)

    # Localisation.
    for i, level in enumerate(levels):
        assert_close(level, values[f"fpn_p{i + 2}"], **TOKENS)
    for i in range(model.config.num_stages):
        features, boxes = seen[f"stage{i}"]
        assert_close(features, values[f"stage{i}_obj_features"], **TOKENS)
        assert_close(boxes, values[f"stage{i}_boxes"], **BOXES)
        assert_close(predictions.localized.boxes[i], values[f"stage{i}_boxes"], **BOXES)
        assert_close(predictions.localized.person_logits[i], values[f"stage{i}_person_logits"], **TOKENS)
    with torch.no_grad():
        roi = model.localization.pool(levels, values["stage0_in_boxes"])
    assert_close(roi[0], values["stage0_roi_features"], **TOKENS)

    # Classification.
    boxes = predictions.localized.boxes[-1]
    assert_close(extend_boxes(boxes, model.config.roi_extension, predictions.whwh), values["action_roi_boxes"], **BOXES)
    with torch.no_grad():
        placed, background = model.decoder.place(encoded)
    assert_close(model.decoder.position_table(*grid[1:], torch.float32), values["pos_dec"][0], **TOKENS)
    dense = evad_kernels.scatter_tokens(placed.x, placed.position, grid=grid, fill=background)
    assert_close(dense.permute(0, 4, 1, 2, 3), values[prefix + "dense_map"], **TOKENS)
    n = model.config.num_proposals
    assert_close(seen["dec_in"][:, -n:], values[prefix + "roi_features"], **TOKENS)
    assert_close(seen["dec_in"], values[prefix + "dec_in"], **TOKENS)
    for i in range(model.config.decoder_depth):
        assert_close(seen[f"dec{i}_out"], values[prefix + f"dec{i}_out"], **TOKENS)
        assert_close(predictions.action_logits[i], values[prefix + f"dec{i}_action_logits"], **TOKENS)


def reordered(rows, position, wanted):
    """Rows [1, K, C] at ``position`` in the order of the positions ``wanted``."""
    order = position.argsort()[0, wanted.argsort().argsort()[0]]
    assert torch.equal(position[0, order], wanted[0])
    return rows[:, order]


def test_importance_matches_golden(backend):
    weights, values = load("A", "weights"), here(load("A", "eval"))
    model = golden_model(weights, "importance")
    position = None
    for i in model.config.pruning_blocks:
        if position is None:
            with torch.no_grad():
                position = model.encoder.embed(golden_clip(values))[0].position
        attn, x = model.encoder.blocks[i].attn, model.encoder.blocks[i].norm1(values[f"block{i - 1}_out"])
        with torch.no_grad():
            _, index, importance = attn.prune(x, num_keyframe=60, num_select=10, keyframe_weight=1.0)
        expected = values[f"prune{i}_importance_dense"].gather(1, position[:, 60:])
        assert_close(importance, expected, atol=1e-7, rtol=1e-4)
        best = torch.from_numpy(np.argsort(-expected[0].cpu().numpy(), kind="stable")[:10].copy())
        assert torch.equal(index[0].cpu(), best.sort().values)
        position = values[f"prune{i}_kept_official_order"]


@pytest.mark.parametrize("token_order", ["importance", "position"])
def test_detections_match_golden(golden, token_order):
    _, weights, values = golden
    model = golden_model(weights, token_order)
    threshold = json.loads(str(weights["config_json"]))["MODEL"]["SparseRCNN"]["PERSON_THRESHOLD"]
    assert model.config.person_threshold == threshold
    clips = golden_clip(values)
    height, width = clips.shape[-2:]
    (detections,) = select_detections(model(clips), [(height, width)], threshold)
    original_height, original_width = values["clip0_meta"][:2].tolist()
    boxes = detections.boxes / torch.tensor([width, height] * 2)
    assert_close(boxes, values["out_boxes"][:, 1:], atol=5e-3 / height, rtol=0)
    actions = values["out_actions" if token_order == "importance" else "ordered/out_actions"]
    assert_close(detections.action_scores, actions, **TOKENS)
    everyone = select_detections(model(clips), [(height, width)], threshold=0.0)[0]
    assert_close(everyone.person_scores, values["out_person_scores"][0], **TOKENS)
    scale = torch.tensor([original_width / width, original_height / height] * 2)
    assert_close(everyone.boxes * scale, values["out_person_boxes"][0], atol=2e-2, rtol=0)


def test_golden_boxes_and_codes():
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "op_roi_and_boxes.npz").items()}
    boxes, whwh = golden["ext/boxes"], golden["ext/whwh"][None]
    for extension in ((0.4, 0.2), (0, 0)):
        extended = extend_boxes(boxes[None], extension, whwh)[0]
        assert_close(extended, golden[f"ext/out_{extension[0]}_{extension[1]}"], atol=1e-5, rtol=0)
    assert_close(move_boxes(boxes, golden["delta/deltas"]), golden["delta/out"], atol=1e-4, rtol=1e-6)
    assert_close(sincos_table(32, 12), golden["sincos/32x12"], atol=1e-6, rtol=0)
    for width in (768, 384):
        assert_close(sincos_table(1568, width)[::97, ::31], golden[f"sincos/1568x{width}"], atol=1e-6, rtol=0)
    assert_close(sincos_table(784, 24)[None], golden["sincos/interp_in_4x14x14_d24"], atol=1e-6, rtol=0)
    codes = PositionTable(4, 14, 24)(18, 24, torch.float32)
    assert_close(codes[None], golden["sincos/interp_out_18x24"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("vit_b", 185_360_000), ("vit_l", 439_535_000), ("tiny", 1_800_000)]
)
def test_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = EVAD(getattr(EVADConfig, preset)())
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-4, abs=5e3)


@pytest.mark.parametrize("blank", ["mask_token", "zeros"])
@pytest.mark.parametrize("token_order", ["position", "importance"])
def test_kernels_match_reference(token_order, blank):
    model = micro(0.6, token_order=token_order, blank=blank, keyframe_weight=4.0)
    clips = [clip(96, 96), clip(70, 101)]
    with torch.no_grad():
        actual = model(clips)
        with evad_kernels.use_backend("reference"):
            expected = model(clips)
    assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    for a, b in zip(actual.kept, expected.kept, strict=True):
        assert torch.equal(a, b)


def test_gradients_match_reference():
    model = micro(0.6)
    clips = clip(72, 96)[None]

    def gradients():
        predictions = model.predict(clips, every_stage=True)
        total = sum(x.square().sum() for x in (*predictions.localized.person_logits, *predictions.action_logits))
        total = total + sum(boxes.sum() for boxes in predictions.localized.boxes)
        return torch.autograd.grad(total, list(model.parameters()))

    actual = gradients()
    with evad_kernels.use_backend("reference"):
        expected = gradients()
    for (name, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
        assert b.isfinite().all(), name
        assert_close(a, b, atol=1e-3 * b.abs().max().item() + 1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_kept_tokens():
    clips = clip()[None]
    by_position, by_importance = micro(0.8), micro(0.8, token_order="importance")
    with torch.no_grad():
        ascending, descending = by_position(clips).kept, by_importance(clips).kept
    assert [k.shape[1] for k in ascending] == [103, 83]  # ceil(0.8 * 128), ceil(0.8 * 103)
    keyframe = torch.arange(64, 128)  # 8 frames in tubelets of 4: the second of two
    for a, d in zip(ascending, descending, strict=True):
        assert torch.equal(a[0, :64], keyframe) and torch.equal(d[0, :64], keyframe)
        assert (a[0, 64:].diff() > 0).all() and not (d[0, 64:].diff() > 0).all()
        assert torch.equal(a.sort().values, d.sort().values)
    assert set(ascending[1][0].tolist()) < set(ascending[0][0].tolist())


def test_token_order_matters_after_the_encoder_only():
    clips = clip()[None]
    by_position, by_importance = micro(0.9), micro(0.9, token_order="importance")
    with torch.no_grad():
        a, b = by_position(clips), by_importance(clips)
        assert_close(a.boxes, b.boxes, **BOXES)
        assert_close(a.person_logits, b.person_logits, **TOKENS)
        assert (a.action_logits - b.action_logits).abs().max() > 1e-3
        by_position.set_keep_rate(1.0), by_importance.set_keep_rate(1.0)
        assert torch.equal(by_position(clips).action_logits, by_importance(clips).action_logits)


def test_equal_importance_keeps_order():
    """Ties go to the lower index in both orders: with values alike everywhere, the first tokens are kept, in order."""
    model = micro(0.7, token_order="importance")
    block = model.encoder.blocks[1]
    x = torch.randn(1, 1, 96).expand(1, 128, 96)
    tokens = Tokens(x, torch.arange(128)[None].roll(64, dims=1), 64)
    with torch.no_grad():
        kept = block(tokens, 10, model.config).position
    assert torch.equal(kept[0, 64:], tokens.position[0, 64:74])


def test_blank_zeros_pools_zeros_where_tokens_were_dropped():
    model = micro(0.6, blank="zeros")
    with torch.no_grad():
        encoded = model.encoder(clip()[None])
        placed, background = model.decoder.place(encoded)
        assert background is None
        boxes = torch.tensor([[[3.0, 5.0, 60.0, 90.0], [40.0, 40.0, 50.0, 50.0]]])
        pooled = model.decoder.pool(placed, background, boxes, encoded.grid)
        dense = evad_kernels.scatter_tokens(placed.x, placed.position, grid=encoded.grid)
        everywhere = Tokens(dense.flatten(1, 3), torch.arange(128)[None], 64)
        assert_close(pooled, model.decoder.pool(everywhere, None, boxes, encoded.grid))
    alike = [micro(1.0, blank=blank) for blank in ("zeros", "mask_token")]
    with torch.no_grad():
        assert_close(*(model(clip()[None]).action_logits for model in alike))


@pytest.mark.parametrize("built_at", [0.5, 1.0])
def test_set_keep_rate(built_at):
    clips = clip()[None]
    model = micro(built_at)
    for rate in (0.6, 1.0, 0.8):
        model.set_keep_rate(rate)
        assert model.config.keep_rate == rate
        with torch.no_grad():
            actual, expected = model(clips), micro(rate)(clips)
        assert_close(actual, expected, atol=0, rtol=0)
        assert len(actual.kept) == (0 if rate == 1 else 2)
    with pytest.raises(ValueError, match="keep_rate must be"):
        model.set_keep_rate(0.0)
    assert model.config.keep_rate == 0.8


def test_rate_below_the_keyframes_share_keeps_the_keyframe_alone(backend):
    model = micro(0.01)
    with torch.no_grad():
        output = model(clip()[None])
    assert [k.tolist() for k in output.kept] == [[list(range(64, 128))]] * 2
    assert all(x.isfinite().all() for x in output[:3])


@pytest.mark.parametrize("token_order", ["position", "importance"])
def test_rate_that_keeps_all_prunes_nothing(token_order):
    model = micro(0.9999, token_order=token_order)
    clips = clip()[None]
    with torch.no_grad():
        output = model(clips)
        model.set_keep_rate(1.0)
        plain = model(clips)
    assert torch.equal(output.action_logits, plain.action_logits) and torch.equal(output.boxes, plain.boxes)
    everything = [*range(64, 128), *range(64)]
    assert [k.tolist() for k in output.kept] == [[everything]] * 2 and plain.kept == ()


def test_keeps_all_at_the_second_layer_only():
    """What crashes the released code: ceil(rate * N) reaches N at a later pruning layer."""
    model = micro(0.992)  # of 128 tokens 127, of 127 tokens 126; of 2 x 1 cells as below, all
    model.set_keep_rate(1 - 1 / 127.5)
    with torch.no_grad():
        kept = model(clip()[None]).kept
    assert [k.shape[1] for k in kept] == [127, 127]
    assert torch.equal(*kept)


def test_kept_counts_are_the_papers():
    with torch.device("meta"):
        encoder = EVAD(EVADConfig.vit_b(num_stages=1, decoder_depth=1)).encoder
    for rate, keyframe, counts in [
        (0.7, 196, (1568, 1098, 769, 539)),
        (0.7, 324, (2592, 1815, 1271, 890)),
        (0.6, 196, (1568, 941, 565, 339)),
    ]:
        encoder.keep_rate = rate
        for before, after in itertools.pairwise(counts):
            assert keyframe + encoder.num_select(before, keyframe) == after


def test_padding():
    """A clip alone is the clip that its caller pads, but for the clip's own size, which places proposals."""
    model = micro(0.7)
    small = clip(70, 101)
    padded = torch.nn.functional.pad(small, (0, 120 - 101, 0, 72 - 70))
    with torch.no_grad():
        batch, whwh = model.batch([small])
        assert torch.equal(batch[0], padded) and whwh.tolist() == [[101, 70, 101, 70]]
        alone, by_caller = model.predict([small], every_stage=False), model.predict([padded], every_stage=False)
        for a, b in zip(alone.kept, by_caller.kept, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(alone.localized.boxes[0], by_caller.localized.boxes[0])
        assert_close(model(small[None]), model([small]), atol=0, rtol=0)
        for box in model.detect([small], threshold=0.0)[0].boxes:
            assert (box >= 0).all() and (box[2:] <= torch.tensor([100, 69])).all()


def test_mixed_sizes():
    model = micro(0.7)
    clips = [clip(70, 101), clip(72, 120, seed=2), clip(49, 97, seed=3)]  # all are padded to 72 x 120
    with torch.no_grad():
        together = model(clips)
        assert together.boxes.shape == (3, 5, 4)
        for i, single in enumerate(clips):
            alone = model([single])
            assert_close(together.boxes[i], alone.boxes[0], **BOXES)
            assert_close(together.action_logits[i], alone.action_logits[0], **TOKENS)
            assert torch.equal(together.kept[-1][i], alone.kept[-1][0])
        wide = model.batch([clip(25, 30), clip(30, 121)])
    assert wide[0].shape == (2, 3, 8, 48, 144) and wide[1].tolist() == [[30, 25, 30, 25], [121, 30, 121, 30]]


@pytest.mark.parametrize(
    ("clips", "error", "message"),
    [
        ([], ValueError, "at least one clip"),
        (torch.zeros(0, 3, 8, 96, 96), ValueError, "at least one clip"),
        (torch.zeros(3, 8, 96, 96), ValueError, r"clips must be \[B, 3, T, H, W\]"),
        ([torch.zeros(1, 8, 96, 96)], ValueError, r"a clip must be \[3, T, H, W\]"),
        ([torch.zeros(3, 8, 0, 96)], ValueError, r"a clip must be \[3, T, H, W\]"),
        ([torch.zeros(3, 16, 96, 96)], ValueError, "a clip must have 8 frames, got 16"),
        ([torch.zeros(3, 8, 96, 96, dtype=torch.uint8)], TypeError, "a clip must be floating point"),
        (["video.mp4"], TypeError, "a clip must be a tensor"),
    ],
)
def test_rejects_bad_clips(clips, error, message):
    with pytest.raises(error, match=f"EVAD: .*{message}"):
        micro()(clips)


def test_selects_detections():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]]).repeat(2, 1, 1)
    logits[1] = -logits[1].abs() * torch.tensor([1.0, 0.0])  # the second clip: nobody is a person
    boxes = torch.tensor([[-5.0, 2.0, 120.0, 40.0], [1.0, 2.0, 3.0, 4.0], [90.0, 50.0, 300.0, 400.0]]).repeat(2, 1, 1)
    output = EVADOutput(logits, boxes, torch.zeros(2, 3, 4), ())
    first, second = select_detections(output, [(48, 100), (60, 80)])
    assert first.boxes.tolist() == [[0, 2, 99, 40], [90, 47, 99, 47]]
    assert_close(first.person_scores, torch.tensor([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))]))
    assert_close(first.action_scores, torch.full((2, 4), 0.5))
    assert second.boxes.tolist() == [[0, 2, 79, 40], [1, 2, 3, 4], [79, 50, 79, 59]]
    assert len(select_detections(output, [(48, 100), (60, 80)], threshold=0.9)[0].boxes) == 1
    first, second = select_detections(output, [(48, 100), (60, 80)], else_all=False)
    assert (len(first.boxes), len(second.boxes)) == (2, 0)
    with pytest.raises(ValueError, match="EVAD: sizes must be one a clip, got 1 for 2 clips"):
        select_detections(output, [(48, 100)])


def test_given_boxes_are_kept_and_their_padding_never():
    model = micro(0.7)
    given = [torch.tensor([[4.0, 5, 40, 50], [10, 10, 50, 60]]), torch.tensor([[10.0, 10, 50, 60]]), torch.zeros(0, 4)]
    for threshold in (0.0, 0.7, 1.0):
        found = model.detect(torch.cat([clip()[None]] * 3), threshold, given)
        assert all(torch.equal(some.boxes, boxes) for some, boxes in zip(found, given, strict=True))
        assert all((some.person_scores == 1).all() for some in found)


def test_detect_finds_nobody_where_nobody_reaches_the_threshold():
    model, clips = micro(), clip()[None]
    for detect in (model.detect, model.compiled(clips.shape[1:]).detect):
        (everyone,) = detect(clips, 0.0)
        best = float(everyone.person_scores.max())
        assert [len(part) for part in detect(clips, (best + 1) / 2)[0]] == [0, 0, 0]
        assert len(everyone.boxes) == model.config.num_proposals and len(detect(clips, best)[0].boxes) >= 1


def test_detect_leaves_the_mode_alone():
    model = micro(drop_path=0.9).train()
    first, second = (model.detect(clip()[None], 0.0)[0] for _ in range(2))
    assert model.training and model.encoder.training
    assert torch.equal(first.boxes, second.boxes) and not first.boxes.requires_grad


@pytest.mark.parametrize("mode", ["bfloat16", "autocast", "float64"])
def test_dtypes(mode):
    model, clips = micro(1.0), clip()[None]
    with torch.no_grad():
        expected = model(clips)
        if mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                actual = model(clips)
        else:
            actual = model.to(getattr(torch, mode))(clips)
    assert actual.boxes.dtype == (torch.float64 if mode == "float64" else torch.float32)
    tolerance = 1e-4 if mode == "float64" else 0.15
    assert_close(actual.action_logits.float(), expected.action_logits, atol=tolerance, rtol=0)
    assert_close(actual.boxes.float(), expected.boxes, atol=3e3 * tolerance if mode != "float64" else 1e-2, rtol=0)
    model.float().set_keep_rate(0.6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(x.isfinite().all() for x in model(clips)[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_never_in_half(dtype):
    """Proposal boxes, and the gradient they hold, stay as exact as they were, however weights are cast."""
    model = micro(0.7)
    boxes = model.localization.proposal_boxes
    with torch.no_grad():
        boxes.copy_(torch.linspace(0.1, 0.9, boxes.numel()).view_as(boxes))  # of no half's numbers
    boxes.grad = boxes.detach() / 3
    exact, gradient = boxes.detach().clone(), boxes.grad.clone()
    for cast in (model.to(dtype), copy.deepcopy(model), model.compiled((3, model.config.num_frames, 64, 64)).model):
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype, torch.float32}
        assert cast.encoder.patch_embed.weight.dtype == cast.localization.proposal_features.dtype == dtype
        assert torch.equal(cast.localization.proposal_boxes, exact)
    assert torch.equal(model.localization.proposal_boxes.grad, gradient)
    assert model.double().localization.proposal_boxes.dtype == torch.float64
    assert model.half().localization.proposal_boxes.dtype == torch.float32
    assert model.to("meta").localization.proposal_boxes.is_meta


def test_training_sees_every_stage_and_trains_every_parameter():
    model = micro(0.7).train()
    predictions = model.predict(clip()[None], every_stage=True)
    assert [len(predictions.localized.person_logits), len(predictions.localized.boxes)] == [2, 2]
    assert len(predictions.action_logits) == 2
    total = sum(x.sum() for x in (*predictions.localized.person_logits, *predictions.action_logits))
    total = total + sum(x.sum() for x in predictions.localized.boxes)
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    first = model.localization(model.pyramid(model.encoder(clip()[None]).keyframes), predictions.whwh, every_stage=True)
    (grad,) = torch.autograd.grad(first.boxes[1].sum(), model.localization.proposal_boxes, allow_unused=True)
    assert grad is None  # each stage answers for its own correction of the boxes


def test_drop_path():
    branch = micro(drop_path=0.5).encoder.blocks[-1].drop_path
    assert torch.equal(branch(torch.ones(4, 2, 3)), torch.ones(4, 2, 3))
    torch.manual_seed(0)
    dropped = branch.train()(torch.ones(1000, 2, 3))
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all() and dropped.mean().item() == pytest.approx(1.0, abs=0.1)
    rates = [block.drop_path.rate for block in EVAD(EVADConfig.tiny(drop_path=0.3, **MICRO)).encoder.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initialisation():
    torch.manual_seed(0)
    with torch.device("meta"):
        model = EVAD(EVADConfig.vit_b(depth=4, pruning_blocks=(1,), pyramid_blocks=(0, 1, 2, 3), num_stages=1))
    assert model.decoder.mask_token.is_meta
    model = EVAD(EVADConfig.tiny(initial_boxes="frame", initial_deltas=1.0))
    bound = math.sqrt(6 / (64 + 64))  # as a [1, 1, 64] tensor: fan in and out are 64
    assert 0.8 * bound < model.decoder.mask_token.abs().max() <= bound
    assert torch.equal(model.localization.proposal_boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(12, 4))
    for name, parameter in model.named_parameters():
        if name.startswith("decoder") and name.endswith("bias") and "norm" not in name:
            assert (parameter == 0).all(), name
    assert (model.localization.stages[0].box.bias != 0).any()


def test_initialisation_on_a_grid():
    """Twelve proposals in 3 rows of 4, which the first stage hardly moves."""
    torch.manual_seed(0)
    model = EVAD(EVADConfig.tiny())
    boxes = model.localization.proposal_boxes
    assert_close(boxes[[0, 3, 11], :2], torch.tensor([[0.125, 1 / 6], [0.875, 1 / 6], [0.875, 5 / 6]]))
    assert_close(boxes[:, 2:], torch.tensor([[0.375, 0.5]]).expand(12, 2))
    with torch.no_grad():
        first = model.predict(torch.randn(1, 3, 16, 96, 96), every_stage=True).localized.boxes[0][0] / 96
    center, size = (first[:, 2:] + first[:, :2]) / 2, first[:, 2:] - first[:, :2]
    assert_close(torch.cat([center, size], dim=1), boxes.detach(), atol=0.02, rtol=0)


def test_position_table():
    table = PositionTable(2, 3, 8)
    expected = np.zeros((18, 8))
    for cell in range(18):
        for j in range(8):
            angle = cell / 10000 ** (2 * (j // 2) / 8)
            expected[cell, j] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
    assert_close(table(3, 3, torch.float64), torch.from_numpy(expected), atol=1e-6, rtol=0)
    assert table(2, 5, torch.float32).shape == (2 * 2 * 5, 8)
    assert torch.equal(table(9, 1, torch.float32), PositionTable(2, 3, 8)(9, 1, torch.float32))
    assert not torch.equal(table(9, 1, torch.float32), table(3, 3, torch.float32))  # as many cells, another layout
    for side in range(1, 9):
        table(side, 7, torch.float32)
    assert len(table._interpolated) == PositionTable.CACHED_SIZES
    assert table.state_dict() == {}
    rounded = PositionTable(2, 3, 8).bfloat16()
    assert rounded(3, 3, torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(rounded.float()(3, 3, torch.float32), table(3, 3, torch.float32))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_break(compiler):
    model = micro(0.6)
    clips = clip(72, 96)[None]
    with torch.no_grad():
        expected = model(clips)
        actual = torch.compile(model, fullgraph=True, backend=compiler)(clips)
    assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 130), st.integers(1, 130)), min_size=1, max_size=2),
    rate=st.floats(0.001, 1.0),
    token_order=st.sampled_from(["position", "importance"]),
    weight=st.sampled_from([0.0, 1.0, 8.0]),
)
def test_any_size_and_rate(sizes, rate, token_order, weight):
    model = micro(rate, token_order=token_order, keyframe_weight=weight)
    with torch.no_grad():
        output = model([clip(*size) for size in sizes])
    height, width = (-(-max(side) // 24) * 24 // 12 for side in zip(*sizes, strict=True))
    tokens, keyframe = 2 * height * width, height * width
    for kept in output.kept:
        tokens = max(keyframe, math.ceil(rate * tokens))
        assert kept.shape == (len(sizes), tokens)
        assert all(len(set(row)) == tokens and min(row) >= 0 and max(row) < 2 * keyframe for row in kept.tolist())
    assert all(x.isfinite().all() for x in output[:3])


# The paper's ablations


def decoder_tokens(model, clips):
    """What the encoder hands to the decoder."""
    return model.encoder(model.batch(clips)[0]).tokens


@pytest.mark.parametrize(
    "fields", [{"pruning": "random"}, {"pruning": "least"}, {"pruning": "class"}, {"decoder_depth": 0}]
)
@pytest.mark.parametrize("token_order", ["position", "importance"])
def test_ablations_learn(fields, token_order):
    model = micro(token_order=token_order, **fields).train()
    target = {"boxes": torch.tensor([[10.0, 10, 50, 80]]), "labels": torch.eye(7)[:1]}
    model.loss([clip()], [target])["loss_total"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_least_important_and_random_tokens():
    """Together the most and the least important half are all; random ones change with torch's seed alone."""
    kept = {}
    for pruning in ("attention", "least", "random"):
        model = micro(0.625, pruning=pruning, pruning_blocks=(1,))
        torch.manual_seed(3)
        (kept[pruning],) = (set(kept[0].tolist()) for kept in model(clip()[None]).kept)
        torch.manual_seed(3)
        assert kept[pruning] == set(model(clip()[None]).kept[0][0].tolist())
    keyframe = kept["attention"] & kept["least"]
    assert keyframe == set(range(64, 128)) and len(kept["attention"] | kept["least"]) == 2 * 80 - 64
    assert len({frozenset(some) for some in kept.values()}) == 3 and keyframe < kept["random"]


@pytest.mark.parametrize("fields", [{}, {"keep_keyframe": False}, {"decoder_input": "all"}])
def test_class_token_chooses(fields):
    """What it attends to most stays, and it itself, but neither branch gets it."""
    model = micro(0.625, pruning="class", pruning_blocks=(1,), **fields)
    encoder, seen = model.encoder, []
    encoder.blocks[1].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0]))
    encoded = encoder(clip()[None])
    (before,), (kept,) = seen, encoded.kept
    block, first = encoder.blocks[1], 1 + before.num_keyframe
    query, key, _ = block.attn.heads(block.norm1(before.x))
    shares = torch.einsum("bhd,bhnd->bhn", query[:, :, 0], key).div(query.shape[3] ** 0.5).softmax(2).mean(1)[0]
    best = shares[first:].topk(80 - before.num_keyframe).indices + before.num_keyframe
    assert set(kept[0].tolist()) == {
        *before.position[0, : before.num_keyframe].tolist(),
        *before.position[0, best].tolist(),
    }
    cells = 128 if fields.get("decoder_input") == "all" else 80
    assert encoded.tokens.x.shape[1] == encoded.tokens.position.shape[1] == cells
    assert all(level.shape[2:] == (8, 8) for level in encoded.keyframes)
    model.set_keep_rate(1.0)
    assert model(clip()[None]).kept == () and encoder(clip()[None]).tokens.x.shape[1] == 128


def test_unified_pruning_may_drop_the_keyframe():
    model, whole = (micro(0.7, keep_keyframe=keep, pruning_blocks=(2,)) for keep in (False, True))
    assert_close(model.encoder(clip()[None]).keyframes[0], whole.encoder(clip()[None]).keyframes[0])
    encoded = model.encoder(clip()[None])
    (kept,) = encoded.kept
    inside = (kept >= 64) & (kept < 128)
    assert kept.shape[1] == math.ceil(0.7 * 128) and 0 < inside.sum() < 64
    dropped = torch.ones(64, dtype=torch.bool).scatter(0, kept[inside] - 64, False).view(8, 8)
    after = encoded.keyframes[2][0]  # of the block that pruned
    assert (after[:, dropped] == 0).all() and (after[:, ~dropped] != 0).any(0).all()
    model.set_keep_rate(1.0)
    whole.set_keep_rate(1.0)
    assert_close(model(clip()[None]).boxes, whole(clip()[None]).boxes)


def test_decoder_gets_dropped_tokens_back():
    """Kept tokens are what they are without the others, dropped ones what a model pruning later would have seen."""
    model, usual = (micro(0.7, decoder_input=kind, pruning_blocks=(3,)) for kind in ("all", "kept"))
    every, kept = decoder_tokens(model, clip()[None]), decoder_tokens(usual, clip()[None])
    assert every.position[0].sort().values.tolist() == list(range(128)) and every.num_keyframe == 64
    rows = every.position.argsort(dim=1).gather(1, kept.position)
    assert_close(every.x[0, rows[0]], kept.x[0])
    usual.encoder.blocks[3] = torch.nn.Identity()
    before = decoder_tokens(usual, clip()[None])
    assert torch.equal(before.position, every.position)
    dropped = torch.ones(128, dtype=torch.bool).scatter(0, rows[0], False)
    assert_close(every.x[0, dropped], before.x[0, dropped])


def test_linear_head_sees_boxes_alone():
    model = micro(decoder_depth=0)
    assert not len(model.decoder.blocks) and len(model.decoder.classifiers) == 1
    assert model(clip()[None]).action_logits.shape == (1, 5, 7)
    with pytest.raises(ValueError, match="decoder_depth must be at least 1"):
        model.attention(clip()[None])


# What actors attend to


def test_decoder_attention():
    """The last block's attention map, written out."""
    model = micro()
    seen = {}
    model.decoder.blocks[-1].norm1.register_forward_hook(lambda _, inputs, result: seen.update(x=result))
    output, attention = model.attention([clip(90, 70)])
    usual = model([clip(90, 70)])
    assert all(torch.equal(a, b) for a, b in zip(output[:3], usual[:3], strict=True))
    assert attention.shape == (1, 5, 2, 8, 6)
    kept = output.kept[-1][0]
    flat = attention[0].flatten(1)
    assert (flat[:, kept] > 0).all() and flat.count_nonzero() == 5 * len(kept)
    last = model.decoder.blocks[-1].attn
    query, key = (part.unflatten(-1, (2, 32)) for part in last.qkv(seen["x"]).split(64, dim=-1)[:2])
    query = query + last.q_bias.view(2, 32)
    for actor, head in itertools.product(range(5), range(2)):
        if head == 0:
            expected = torch.zeros(len(kept))
        logits = key[0, :, head] @ query[0, len(kept) + actor, head] / math.sqrt(32)
        expected += logits.exp()[: len(kept)] / logits.exp().sum() / 2
        if head == 1:
            assert_close(flat[actor, kept], expected)
