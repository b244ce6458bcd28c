"""The numbers of EVAD: architecture (paper, Table 6), implementation (Appendix B), presets, released configurations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

TOKEN_ORDERS = ("position", "importance")
BLANKS = ("mask_token", "zeros")
INITIAL_BOXES = ("frame", "grid")
PRUNINGS = ("attention", "class", "random", "least")
DECODER_INPUTS = ("kept", "all")


@dataclass(frozen=True)
class EVADConfig:
    """Everything that defines a detector. The defaults are the paper's ViT-B at keep rate 0.7.

    Raises:
        ValueError: a field out of its range, or fields that contradict each other; the message names the field.
    """

    # Clip (Table 6, "data" and "cube")
    num_frames: int = 16  # frames a clip
    frame_stride: int = 4  # video frames from one frame of a clip to the next
    frame_rate: float = 30.0  # video frames a second that frame_stride counts, whatever the video's own rate
    short_side: int = 224  # pixels; 288 in the comparison with the state of the art
    pixel_mean: float = 0.45  # pixels in [0, 1] are normalised to (pixel - mean) / std, on all channels
    pixel_std: float = 0.225
    tubelet_size: int = 2  # frames a token spans
    patch_size: int = 16  # pixels a token spans, in height and width

    # Encoder (Table 6)
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    drop_path: float = 0.1  # of the last block, growing linearly from 0 at the first; training only
    position_size: int = 14  # the position table is position_size x position_size cells a frame (224 / 16)

    # Keyframe-centric token pruning (section 3.2)
    # Of the tokens that reach a pruning block, the keyframe's included, which always stay: three blocks at 0.7 leave
    # 34 %. 1 prunes nothing.
    keep_rate: float = 0.7
    pruning_blocks: tuple[int, ...] = (3, 6, 9)  # counted from 0
    keyframe_weight: float = 1.0  # w_kf of Eq. 1; the paper's best at keep rate 0.6 is 4
    # Which stay: the most important; those that a "class" token looks at; as controls "random", the "least" important.
    pruning: str = "attention"
    keep_keyframe: bool = True  # False: the keyframe's tokens are pruned like the others (Table 1c, unified pruning)
    token_order: str = "position"  # the paper; "importance" is what released checkpoints were trained with

    # Actor localisation (section 3.3, Appendix B)
    pyramid_blocks: tuple[int, ...] = (2, 5, 8, 11)  # their keyframe tokens become strides 1/4, 1/2, 1, 2 patches
    num_proposals: int = 100
    query_width: int = 256  # of proposal features and of the pyramid
    num_stages: int = 6
    query_heads: int = 8
    query_mlp_width: int = 2048
    dynamic_width: int = 64  # hidden width of the dynamic interaction
    score_layers: int = 1  # of the tower before the person logits
    box_layers: int = 3  # of the tower before the box deltas
    roi_size: int = 7  # RoI bins a side
    roi_sampling: int = 2  # samples a bin and axis
    canonical_size: float = 224.0  # pixels; a box of this side is pooled from the level of stride patch_size
    initial_boxes: str = "frame"  # every proposal starts as the whole frame (as released); "grid": side by side
    initial_deltas: float = 1.0  # scale of the layers that move boxes, at the start; near 0, boxes start where they are

    # Action classification (section 3.3, Appendix B)
    decoder_width: int = 384
    decoder_depth: int = 6  # 0: a box's feature is classified as it is (Table 1a, linear)
    decoder_input: str = "kept"  # tokens; "all": dropped ones too, as they were when they were dropped (Table 1d)
    decoder_heads: int = 6
    decoder_mlp_ratio: float = 4.0
    decoder_drop_path: float = 0.1
    action_width: int = 2048  # hidden width of an action classifier
    num_classes: int = 80
    roi_extension: tuple[float, float] = (0.4, 0.2)  # of a box's width and height, in all
    blank: str = "mask_token"  # a dropped cell: learned token + position code (as released), or the paper's "zeros"

    # Inference (Appendix B)
    person_threshold: float = 0.7

    # Losses (Appendix B)
    score_loss_weight: float = 2.0  # lambda_ce
    l1_loss_weight: float = 5.0
    giou_loss_weight: float = 2.0
    action_loss_weight: float = 12.0  # lambda_bce
    background_weight: float = 0.1  # of the class "background" in the cross entropy

    # Optimisation (Appendix B)
    epochs: int = 12
    batch_size: int = 16
    learning_rate: float = 2.5e-5
    head_learning_rate_scale: float = 8.0  # of the localisation stages and the decoder (released code)
    weight_decay: float = 1e-4
    decay_epochs: tuple[int, ...] = (5, 8)  # the learning rate falls tenfold
    warmup_epochs: float = 2.0
    warmup_learning_rate: float = 2.5e-6

    def __post_init__(self) -> None:
        for name, (kind, expected) in _LISTS.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, tuple(value))  # lists, as from JSON, are welcome
            except TypeError:
                _fail(name, expected, value)
            numbers = all(isinstance(number, kind) and not isinstance(number, bool) for number in getattr(self, name))
            self._require(name, numbers and all(0 <= number < math.inf for number in getattr(self, name)), expected)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "decoder_depth" else 1
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                _fail(field.name, f"an integer of at least {least}", value)
            if field.type == "bool" and not isinstance(value, bool):
                _fail(field.name, "true or false", value)
            if field.type == "float":
                expected, holds = _RANGES.get(field.name, _AT_LEAST_0)
                try:
                    object.__setattr__(self, field.name, float(value))  # YAML reads 1e-5 as text
                except (TypeError, ValueError):
                    _fail(field.name, expected, value)
                self._require(field.name, not isinstance(value, bool) and holds(getattr(self, field.name)), expected)
        weighs = self.keep_keyframe or self.keyframe_weight == 1
        self._require("keyframe_weight", weighs, "1 where keep_keyframe is False: no query counts as the keyframe's")
        for name, known in (
            ("pruning", PRUNINGS),
            ("token_order", TOKEN_ORDERS),
            ("decoder_input", DECODER_INPUTS),
            ("blank", BLANKS),
            ("initial_boxes", INITIAL_BOXES),
        ):
            self._require(name, getattr(self, name) in known, f"one of {known}")
        self._require("num_frames", self.num_frames % self.tubelet_size == 0, f"a multiple of {self.tubelet_size}")
        self._require("patch_size", self.patch_size % 4 == 0, "a multiple of 4 (the pyramid's first stride is 1/4)")
        for width, heads in (
            ("width", "num_heads"),
            ("query_width", "query_heads"),
            ("decoder_width", "decoder_heads"),
        ):
            self._require(heads, getattr(self, width) % getattr(self, heads) == 0, f"a divisor of {width}")
        blocks = self.pruning_blocks
        inside = all(0 <= block < self.depth for block in blocks)
        self._require(
            "pruning_blocks", inside and list(blocks) == sorted(set(blocks)), f"ascending in [0, {self.depth})"
        )
        blocks = self.pyramid_blocks
        inside = len(blocks) == 4 and all(0 <= block < self.depth for block in blocks)
        self._require(
            "pyramid_blocks", inside and list(blocks) == sorted(set(blocks)), f"four, ascending in [0, {self.depth})"
        )
        self._require("roi_extension", len(self.roi_extension) == 2, _LISTS["roi_extension"][1])

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            _fail(field, expected, getattr(self, field))

    @property
    def keyframe(self) -> int:
        """The keyframe among the frames of tokens: the middle one, counted from 0."""
        return self.num_frames // self.tubelet_size // 2

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Pixels a cell of each pyramid level spans."""
        return (self.patch_size // 4, self.patch_size // 2, self.patch_size, self.patch_size * 2)

    @property
    def size_divisor(self) -> int:
        """Clips are padded to multiples of this many pixels: the coarsest level's cell."""
        return self.patch_size * 2

    @classmethod
    def vit_b(cls, keep_rate: float = 0.7, **fields) -> EVADConfig:
        """The paper's ViT-B: 185 M parameters.

        Args:
            keep_rate: Share that every pruning block keeps of the tokens that reach it, the keyframe's included, in
                (0, 1]; 1 prunes nothing.
            fields: Other fields to replace. For a model without pruning the released one is ``roi_extension=(0, 0)``:
                there wider boxes only lose (Table 1f).
        Raises:
            ValueError: as the class.
        """
        return cls(keep_rate=keep_rate, **fields)

    @classmethod
    def vit_l(cls, keep_rate: float = 0.7, **fields) -> EVADConfig:
        """The paper's ViT-L: 440 M parameters; arguments and errors as ``vit_b``."""
        vit_l = {
            "width": 1024,
            "depth": 24,
            "num_heads": 16,
            "drop_path": 0.2,
            "pruning_blocks": (6, 12, 18),
            "pyramid_blocks": (5, 11, 17, 23),
            "decoder_width": 512,
            "decoder_depth": 12,
            "decoder_heads": 8,
            "batch_size": 8,
            "learning_rate": 1.25e-5,
        }
        return cls(keep_rate=keep_rate, **{**vit_l, **fields})

    @classmethod
    def tiny(cls, keep_rate: float = 0.7, **fields) -> EVADConfig:
        """A whole EVAD of 1.8 M parameters for 96 x 96 clips, small enough to train on two CPU cores.

        A token is 4 frames of 12 x 12 pixels (256 tokens a clip), half a second, so the keyframe sees some motion. The
        pyramid's canonical size is 48 pixels, so that actors of 30 to 70 pixels and the whole frame use different
        levels. Proposals start on a grid and stages hardly move them: from the released start, training from nothing
        stalls. Of 12 proposals fewer are background than of 100, so each weighs more. Arguments and errors as
        ``vit_b``.
        """
        tiny = {
            "short_side": 96,
            "tubelet_size": 4,
            "patch_size": 12,
            "width": 96,
            "depth": 6,
            "num_heads": 3,
            "position_size": 8,
            "pruning_blocks": (2, 3, 4),
            "pyramid_blocks": (1, 2, 3, 5),
            "num_proposals": 12,
            "query_width": 48,
            "num_stages": 3,
            "query_heads": 3,
            "query_mlp_width": 192,
            "dynamic_width": 16,
            "canonical_size": 48.0,
            "initial_boxes": "grid",
            "initial_deltas": 0.01,
            "decoder_width": 64,
            "decoder_depth": 2,
            "decoder_heads": 2,
            "action_width": 256,
            "drop_path": 0.0,
            "decoder_drop_path": 0.0,
            "background_weight": 0.4,
        }
        return cls(keep_rate=keep_rate, **{**tiny, **fields})

    @classmethod
    def from_official(cls, source: Mapping | str | Path) -> EVADConfig:
        """Read a configuration in the names of the released code; ``token_order`` becomes "importance".

        Args:
            source: Nested mappings ({"ViT": {"EMBED_DIM": 768, ...}, "MODEL": {...}}), or the path of a YAML file. An
                absent name has the ViT-B value. Sections other than ViT, MODEL, DETECTION, DATA and SOLVER describe a
                run, not the model, and are not read.
        Raises:
            ValueError: an option that EVAD here does not have, or has only at another value; the message names it. Or
                none of these sections, where there is anything.
            OSError: the file cannot be read.
        """
        if not isinstance(source, Mapping):
            import yaml

            try:
                source = yaml.safe_load(Path(source).read_text()) or {}
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"from_official: {source} must be a YAML file, got {error}") from error
            if not isinstance(source, Mapping):
                _fail("source", "a mapping of sections", type(source).__name__, "from_official")
        if source and not any(section in source for section in _SECTIONS):
            _fail("source", f"sections of {', '.join(_SECTIONS)}", sorted(map(str, source)), "from_official")
        return cls(**_official_fields(source))


_WHOLE = Integral, "a list of whole numbers of at least 0"
_LISTS: dict[str, tuple[type, str]] = {
    "pruning_blocks": _WHOLE,
    "pyramid_blocks": _WHOLE,
    "roi_extension": (Real, "two numbers of at least 0"),
    "decay_epochs": (Real, "a list of numbers of at least 0"),
}

_Range = tuple[str, Callable[[float], bool]]  # in words and as a test, which NaN does not pass
_AT_LEAST_0: _Range = "a number of at least 0", lambda value: 0 <= value < math.inf
_ABOVE_0: _Range = "a number above 0", lambda value: 0 < value < math.inf
_BELOW_1: _Range = "in [0, 1)", lambda value: 0 <= value < 1
_RANGES: dict[str, _Range] = {  # of the other floating-point fields: _AT_LEAST_0
    "frame_rate": _ABOVE_0,
    "pixel_mean": ("a finite number", math.isfinite),
    "pixel_std": _ABOVE_0,
    "mlp_ratio": _ABOVE_0,
    "drop_path": _BELOW_1,
    "keep_rate": ("in (0, 1]", lambda value: 0 < value <= 1),
    "canonical_size": _ABOVE_0,
    "decoder_mlp_ratio": _ABOVE_0,
    "decoder_drop_path": _BELOW_1,
    "person_threshold": ("in [0, 1]", lambda value: 0 <= value <= 1),
}


def _fail(field: str, expected: str, actual: object, where: str = "EVADConfig") -> None:
    raise ValueError(f"{where}: {field} must be {expected}, got {actual!r}")


# Released name -> our field.
_FIELDS = {
    "DATA.NUM_FRAMES": "num_frames",
    "DATA.SAMPLING_RATE": "frame_stride",
    "ViT.TUBELET_SIZE": "tubelet_size",
    "ViT.PATCH_SIZE": "patch_size",
    "ViT.EMBED_DIM": "width",
    "ViT.DEPTH": "depth",
    "ViT.NUM_HEADS": "num_heads",
    "ViT.MLP_RATIO": "mlp_ratio",
    "ViT.DROP_PATH_RATE": "drop_path",
    "ViT.FPN_INDICES": "pyramid_blocks",
    "MODEL.NUM_CLASSES": "num_classes",
    "MODEL.KTP.ENHANCED_WEIGHT": "keyframe_weight",
    "MODEL.CRD.ROI_EXTENSION": "roi_extension",
    "MODEL.CRD.EMBED_DIM": "decoder_width",
    "MODEL.CRD.DEPTH": "decoder_depth",
    "MODEL.CRD.NUM_HEADS": "decoder_heads",
    "MODEL.CRD.MLP_RATIO": "decoder_mlp_ratio",
    "MODEL.CRD.DROP_PATH_RATE": "decoder_drop_path",
    "MODEL.SparseRCNN.NUM_PROPOSALS": "num_proposals",
    "MODEL.SparseRCNN.NHEADS": "query_heads",
    "MODEL.SparseRCNN.DIM_FEEDFORWARD": "query_mlp_width",
    "MODEL.SparseRCNN.HIDDEN_DIM": "query_width",
    "MODEL.SparseRCNN.NUM_CLS": "score_layers",
    "MODEL.SparseRCNN.NUM_REG": "box_layers",
    "MODEL.SparseRCNN.NUM_HEADS": "num_stages",
    "MODEL.SparseRCNN.DIM_DYNAMIC": "dynamic_width",
    "MODEL.SparseRCNN.CLASS_WEIGHT": "score_loss_weight",
    "MODEL.SparseRCNN.GIOU_WEIGHT": "giou_loss_weight",
    "MODEL.SparseRCNN.L1_WEIGHT": "l1_loss_weight",
    "MODEL.SparseRCNN.ACTION_WEIGHT": "action_loss_weight",
    "MODEL.SparseRCNN.NO_OBJECT_WEIGHT": "background_weight",
    "MODEL.SparseRCNN.PERSON_THRESHOLD": "person_threshold",
    "MODEL.SparseRCNN.ACT_FC_DIM": "action_width",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": "roi_size",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "roi_sampling",
    "SOLVER.MAX_EPOCH": "epochs",
    "SOLVER.BASE_LR": "learning_rate",
    "SOLVER.LR_SCALE": "head_learning_rate_scale",
    "SOLVER.WEIGHT_DECAY": "weight_decay",
    "SOLVER.WARMUP_EPOCHS": "warmup_epochs",
    "SOLVER.WARMUP_START_LR": "warmup_learning_rate",
}

# Released name -> the one value that EVAD here has.
_FIXED = {
    "DATA.INPUT_CHANNEL_NUM": [3],
    "ViT.USE_LEARNABLE_POS_EMB": False,
    "ViT.DROP_RATE": 0,
    "ViT.ATTN_DROP_RATE": 0,
    "ViT.LAYER_DECAY": 1,
    "ViT.QKV_BIAS": True,
    "ViT.QK_SCALE": None,
    "ViT.INIT_VALUES": 0,
    "MODEL.CRD.USE_LEARNABLE_POS_EMB": False,
    "MODEL.CRD.DROP_RATE": 0,
    "MODEL.CRD.ATTN_DROP_RATE": 0,
    "MODEL.SparseRCNN.NUM_CLASSES": 1,
    "MODEL.SparseRCNN.DROPOUT": 0,
    "MODEL.SparseRCNN.ACTIVATION": "relu",
    "MODEL.SparseRCNN.NUM_ACT": 1,
    "MODEL.SparseRCNN.NUM_DYNAMIC": 2,
    "MODEL.SparseRCNN.DEEP_SUPERVISION": True,
    "MODEL.SparseRCNN.USE_FOCAL": False,
    "MODEL.SparseRCNN.SOFTMAX_POSE": False,
    "MODEL.SparseRCNN.KEYWAY": False,
    "MODEL.SparseRCNN.USE_FPN": True,
    "MODEL.SparseRCNN.PONY": False,
    "MODEL.SparseRCNN.WORKAROUND": False,
    "MODEL.SparseRCNN.NUM_EVAL_ACT_CLASSES": 0,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "DETECTION.ENABLE": True,
    "DETECTION.ALIGNED": True,
}

# Names without effect on what the model computes: labels, a choice of memory, three of the focal loss (refused above),
# two that change nothing in the released code either.
_WITHOUT_EFFECT = {
    "MODEL.ARCH",
    "MODEL.MODEL_NAME",
    "ViT.USE_CHECKPOINT",
    "MODEL.SparseRCNN.ALPHA",
    "MODEL.SparseRCNN.GAMMA",
    "MODEL.SparseRCNN.PRIOR_PROB",
    "MODEL.SparseRCNN.JITTER_BOX",
    "MODEL.SparseRCNN.GT_BOXES_PROB",
}

_DERIVED = {
    "ViT.PRETRAIN_IMG_SIZE",
    "MODEL.KTP.KEEP_RATES",
    "DETECTION.ROI_XFORM_RESOLUTION",
    "DETECTION.SPATIAL_SCALE_FACTOR",
    "SOLVER.STEPS",
}

_SECTIONS = ("ViT", "MODEL", "DETECTION", "DATA", "SOLVER")
_COMPLETE = ("ViT.", "MODEL.", "DETECTION.")  # sections that define the model: an unknown name there is refused


def _official_fields(source: Mapping) -> dict:
    """Our fields from the released configuration's names."""
    options = dict(_flatten(source))
    fields = {}
    for name, value in options.items():
        if name in _FIELDS:
            fields[_FIELDS[name]] = value
        elif name in _FIXED:
            if value != _FIXED[name]:
                _fail(name, f"{_FIXED[name]!r} (no other value is implemented)", value, "from_official")
        elif name not in _DERIVED and name not in _WITHOUT_EFFECT and name.startswith(_COMPLETE):
            raise ValueError(f"from_official: {name} is an option that EVAD here does not have")

    depth = fields.get("depth", EVADConfig.depth)
    patch_size = fields.get("patch_size", EVADConfig.patch_size)
    fields["position_size"] = options.get("ViT.PRETRAIN_IMG_SIZE", 224) // patch_size
    fields["token_order"] = "importance"
    fields["pruning_blocks"], fields["keep_rate"] = _pruning(options.get("MODEL.KTP.KEEP_RATES"), depth)
    roi_size = fields.get("roi_size", EVADConfig.roi_size)
    for name, expected in (("ROI_XFORM_RESOLUTION", roi_size), ("SPATIAL_SCALE_FACTOR", patch_size)):
        if options.get(f"DETECTION.{name}", expected) != expected:
            _fail(f"DETECTION.{name}", f"{expected}, as the rest says", options[f"DETECTION.{name}"], "from_official")
    if "SOLVER.STEPS" in options:
        fields["decay_epochs"] = [step for step in options["SOLVER.STEPS"] if step > 0]
    return fields


def _pruning(keep_rates: list | None, depth: int) -> tuple[tuple[int, ...], float]:
    """Pruning blocks and the keep rate from one rate a block; where none prunes, the paper's blocks."""
    if keep_rates is not None and len(keep_rates) != depth:
        _fail("MODEL.KTP.KEEP_RATES", f"one rate for each of {depth} blocks", keep_rates, "from_official")
    blocks = tuple(block for block, rate in enumerate(keep_rates or ()) if rate < 1)
    if not blocks:
        return tuple(depth * quarter // 4 for quarter in (1, 2, 3)), EVADConfig.keep_rate if keep_rates is None else 1.0
    rates = {keep_rates[block] for block in blocks}
    if len(rates) > 1:
        _fail("MODEL.KTP.KEEP_RATES", "1 or one common rate", keep_rates, "from_official")
    return blocks, rates.pop()


def _flatten(source: Mapping, prefix: str = ""):
    for name, value in source.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
