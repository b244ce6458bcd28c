"""EVADConfig: the paper's numbers, released configurations, refusals."""

import dataclasses
import json

import pytest

from evad import EVADConfig

RELEASED = {
    "ViT": {
        "TUBELET_SIZE": 2,
        "PATCH_SIZE": 16,
        "EMBED_DIM": 48,
        "DEPTH": 8,
        "NUM_HEADS": 4,
        "FPN_INDICES": [1, 3, 5, 7],
    },
    "DATA": {"NUM_FRAMES": 8, "PATH_TO_DATA_DIR": "anywhere"},
    "MODEL": {
        "KTP": {"KEEP_RATES": [1, 1, 0.6, 1, 0.6, 1, 0.6, 1], "ENHANCED_WEIGHT": 4},
        "CRD": {"ROI_EXTENSION": [0.0, 0.0], "DEPTH": 2},
        "SparseRCNN": {"NUM_PROPOSALS": 10, "NUM_HEADS": 3, "USE_FOCAL": False},
    },
    "SOLVER": {"BASE_LR": 1e-5, "STEPS": [0, 4, 7]},
    "NUM_GPUS": 8,
}


def released(**changes):
    """RELEASED with options replaced: released(ViT={"DEPTH": 12})."""
    config = json.loads(json.dumps(RELEASED))
    for section, options in changes.items():
        for name, value in options.items():
            if isinstance(value, dict):
                config[section].setdefault(name, {}).update(value)
            else:
                config.setdefault(section, {})[name] = value
    return config


def test_presets_are_the_papers():
    b, large = EVADConfig.vit_b(), EVADConfig.vit_l(0.6, num_classes=21)
    assert b == EVADConfig() and b.keep_rate == 0.7
    assert (b.width, b.depth, b.pruning_blocks, b.decoder_width, b.decoder_depth) == (768, 12, (3, 6, 9), 384, 6)
    assert (large.width, large.depth, large.pruning_blocks) == (1024, 24, (6, 12, 18))
    assert (large.decoder_width, large.decoder_depth, large.keep_rate, large.num_classes) == (512, 12, 0.6, 21)
    assert (b.num_proposals, b.query_width, b.num_stages, b.person_threshold) == (100, 256, 6, 0.7)
    assert (b.score_loss_weight, b.l1_loss_weight, b.giou_loss_weight, b.action_loss_weight) == (2, 5, 2, 12)
    assert (b.epochs, b.learning_rate, b.decay_epochs, b.weight_decay) == (12, 2.5e-5, (5, 8), 1e-4)
    assert (b.keyframe, b.strides, b.size_divisor) == (4, (4, 8, 16, 32), 32)


def test_survives_json():
    config = EVADConfig.tiny(0.5)
    assert EVADConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_configurations_from_before_frame_rate_mean_30():
    fields = dataclasses.asdict(EVADConfig.tiny())
    del fields["frame_rate"]
    assert EVADConfig(**fields).frame_rate == EVADConfig.from_official(RELEASED).frame_rate == 30


def test_reads_released_names(tmp_path):
    config = EVADConfig.from_official(RELEASED)
    assert (config.width, config.depth, config.num_frames, config.pyramid_blocks) == (48, 8, 8, (1, 3, 5, 7))
    assert (config.keep_rate, config.pruning_blocks, config.keyframe_weight) == (0.6, (2, 4, 6), 4)
    assert (config.num_stages, config.query_heads, config.decoder_depth) == (3, 8, 2)
    assert (config.learning_rate, config.decay_epochs) == (1e-5, (4, 7))
    assert config.token_order == "importance"
    path = tmp_path / "evad.yaml"
    path.write_text(json.dumps(RELEASED))  # JSON is YAML
    assert EVADConfig.from_official(path) == EVADConfig.from_official(str(path)) == config


def test_absent_names_have_the_vit_b_values():
    assert EVADConfig.from_official({}) == EVADConfig.vit_b(token_order="importance")


def test_unpruned_configuration_keeps_the_papers_pruning_blocks():
    config = EVADConfig.from_official(released(MODEL={"KTP": {"KEEP_RATES": [1] * 8}}))
    assert (config.keep_rate, config.pruning_blocks) == (1.0, (2, 4, 6))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"ViT": {"USE_LEARNABLE_POS_EMB": True}}, "ViT.USE_LEARNABLE_POS_EMB"),
        ({"ViT": {"INIT_VALUES": 0.1}}, "ViT.INIT_VALUES"),
        ({"ViT": {"ROTARY": False}}, "ViT.ROTARY"),
        ({"MODEL": {"SparseRCNN": {"USE_FOCAL": True}}}, "MODEL.SparseRCNN.USE_FOCAL"),
        ({"MODEL": {"KTP": {"KEEP_RATES": [1, 1, 0.6, 1, 0.7, 1, 1, 1]}}}, "MODEL.KTP.KEEP_RATES"),
        ({"MODEL": {"KTP": {"KEEP_RATES": [0.7]}}}, "MODEL.KTP.KEEP_RATES"),
        ({"MODEL": {"ROI_BOX_HEAD": {"POOLER_TYPE": "ROIPool"}}}, "MODEL.ROI_BOX_HEAD.POOLER_TYPE"),
        ({"DETECTION": {"SPATIAL_SCALE_FACTOR": 8}}, "DETECTION.SPATIAL_SCALE_FACTOR"),
        ({"DATA": {"INPUT_CHANNEL_NUM": [3, 3]}}, "DATA.INPUT_CHANNEL_NUM"),
    ],
)
def test_rejects_released_option_we_do_not_have(changes, name):
    with pytest.raises(ValueError, match=f"from_official: {name} "):
        EVADConfig.from_official(released(**changes))


def test_rejects_a_mapping_of_something_else():
    with pytest.raises(ValueError, match=r"source must be sections of ViT, .*SOLVER, got \['model', 'training'\]"):
        EVADConfig.from_official({"model": {"preset": "tiny"}, "training": {}})


def test_rejects_broken_yaml(tmp_path):
    path = tmp_path / "evad.yaml"
    path.write_text("ViT: [1, 2")
    with pytest.raises(ValueError, match=r"evad\.yaml must be a YAML file"):
        EVADConfig.from_official(path)
    path.write_text("just words")
    with pytest.raises(ValueError, match="mapping of sections"):
        EVADConfig.from_official(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_rate", 0.0),
        ("keep_rate", 1.1),
        ("keep_rate", float("nan")),
        ("depth", 0),
        ("num_frames", 15),
        ("num_proposals", 2.5),
        ("frame_rate", 0),
        ("frame_rate", float("inf")),
        ("num_heads", 7),
        ("patch_size", 14),
        ("pruning_blocks", (3, 3)),
        ("pruning_blocks", (12,)),
        ("pyramid_blocks", (2, 5, 8)),
        ("token_order", "random"),
        ("blank", None),
        ("pruning", "cls"),
        ("keep_keyframe", 1),
        ("decoder_input", "none"),
        ("decoder_depth", -1),
        ("keyframe_weight", -1.0),
        ("keyframe_weight", "heavy"),
        ("person_threshold", 1.5),
        ("roi_extension", (0.4,)),
        ("roi_extension", (0.4, -0.1)),
        ("roi_extension", "ab"),
        ("drop_path", 1.0),
        ("decoder_drop_path", -0.1),
        ("pixel_mean", float("inf")),
        ("pixel_std", 0),
        ("canonical_size", 0),
        ("mlp_ratio", 0.0),
        ("initial_deltas", float("nan")),
        ("background_weight", -0.1),
        ("learning_rate", -1),
        ("learning_rate", float("nan")),
        ("weight_decay", float("inf")),
        ("weight_decay", True),
        ("warmup_epochs", -1),
        ("decay_epochs", ["a"]),
        ("decay_epochs", 5),
        ("decay_epochs", (5, float("nan"))),
        ("pruning_blocks", 3),
        ("pruning_blocks", (3.5,)),
        ("pyramid_blocks", ("2", "5", "8", "11")),
    ],
)
def test_rejects_bad_field(field, value):
    with pytest.raises(ValueError, match=f"EVADConfig: {field} must be"):
        EVADConfig.vit_b(**{field: value})


def test_rejects_a_weight_of_no_keyframe():
    with pytest.raises(ValueError, match="keyframe_weight must be 1 where keep_keyframe is False"):
        EVADConfig.tiny(keep_keyframe=False, keyframe_weight=4.0)


def test_takes_numbers_as_yaml_and_json_read_them():
    config = EVADConfig.vit_b(learning_rate="1e-5", decay_epochs=[], roi_extension=[0, 0], pruning_blocks=[])
    assert (config.learning_rate, config.decay_epochs, config.roi_extension) == (1e-5, (), (0, 0))
