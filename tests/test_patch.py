"""Patched vision transformers: real ones of transformers and, where it imports, timm, with random weights."""

import contextlib
import copy
import math
import pickle
import threading

import pytest
import torch
from torch import nn

from evad_kernels import gather_tokens, patch, scatter_tokens, use_backend

# Family: (make a model, what it takes [B, ...]). Depth 4, so blocks 1, 2 and 3 prune.


def _hugging_face(family, task="Model", **config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = {
        **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48},
        **{"image_size": 48, "patch_size": 8, "num_labels": 5},
        **config,
    }
    config = getattr(transformers, f"{family}Config")(**config)
    return getattr(transformers, f"{family}{task}")(config), (3, 48, 48)


def _vit(task="ForImageClassification", **config):
    return _hugging_face("ViT", task, **config)


def _videomae(task="ForVideoClassification", **config):
    return _hugging_face("VideoMAE", task, image_size=32, num_frames=8, **config)[0], (8, 3, 32, 32)


def _vivit():
    config = {"image_size": 32, "num_frames": 8, "tubelet_size": (2, 8, 8)}
    return _hugging_face("Vivit", **config)[0], (8, 3, 32, 32)


def _timm(**options):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        pytest.skip(f"timm does not import: {type(error).__name__}")
    options = {
        "img_size": 48,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 5,
        **options,
    }
    return timm.models.VisionTransformer(**options), (3, 48, 48)


FAMILIES = {
    "vit": _vit,
    "deit": lambda: _hugging_face("DeiT"),
    "mae": lambda: _hugging_face("ViTMAE", mask_ratio=0.0),
    "msn": lambda: _hugging_face("ViTMSN"),
    "ijepa": lambda: _hugging_face("IJepa"),
    "dinov2": lambda: _hugging_face("Dinov2", mlp_ratio=2),
    "dinov2 registers": lambda: _hugging_face("Dinov2WithRegisters", num_register_tokens=3, use_swiglu_ffn=True),
    "vivit": _vivit,
    "videomae": _videomae,
    "timm": _timm,
    "timm registers": lambda: _timm(reg_tokens=3, init_values=0.5, qk_norm=True, global_pool="avg"),
}


def build(family):
    """A model in evaluation mode with lively weights, inputs, and the function that patches it."""
    torch.manual_seed(0)
    model, shape = FAMILIES[family]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    apply = patch.timm if family.startswith("timm") else patch.transformers
    return model.eval(), torch.randn(2, *shape), apply


def answer(model, inputs):
    torch.manual_seed(1)  # a ViTMAE shuffles its tokens
    output = model(inputs)
    return output if isinstance(output, torch.Tensor) else output[0] if "logits" not in output else output.logits


def layers_of(model):
    for module in model.modules():
        for name in ("blocks", "layers", "layer"):
            layers = getattr(module, name, None)
            if isinstance(layers, (nn.ModuleList, nn.Sequential)):
                return layers


class Rebuilt:
    """Pruning written another way: the model's own blocks on all tokens, attention recomputed with its whole map."""

    def __init__(self, model, rates, protected):
        self.layers, self.rates, self.protected, self.kept = layers_of(model), rates, protected, []

    def importance(self, layer, x):
        """Mean attention over heads and queries, from the layer's own projections."""
        if hasattr(layer, "attn"):
            attn, x = layer.attn, layer.norm1(x)
            q, k, _ = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k = attn.q_norm(q), attn.k_norm(k)
        else:
            attn, x = layer.attention, getattr(layer, "layernorm_before", getattr(layer, "norm1", None))(x)
            attn = getattr(attn, "attention", attn)
            q, k = (
                getattr(attn, name if hasattr(attn, name) else f"{name[0]}_proj")(x)
                .reshape(*x.shape[:2], attn.num_attention_heads, -1)
                .transpose(1, 2)
                for name in ("query", "key")
            )
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean((1, 2))

    def __call__(self, x):
        for number, layer in enumerate(self.layers):
            N = x.shape[1]
            keep = max(math.ceil(self.rates.get(number, 1.0) * N), self.protected)
            if keep < N:
                score = self.importance(layer, x.detach())
                score[:, : self.protected] = math.inf
                rows = score.topk(keep).indices.sort().values
                self.kept.append(rows)
            x = layer(x)  # the block's MLP works row by row: rows dropped after it are rows dropped before it
            if keep < N:
                x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        return x


TOKENS = {"deit": 38, "ijepa": 36, "timm registers": 40, "dinov2 registers": 40, "vivit": 65, "videomae": 64}
TOKENS = {family: TOKENS.get(family, 37) for family in FAMILIES}
PROTECTED = {"deit": 2, "ijepa": 0, "timm registers": 4, "dinov2 registers": 4, "videomae": 16}  # others: 1


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_rebuilt(family):
    """Features, their gradient, and which tokens are left."""
    model, inputs, apply = build(family)
    rates = {1: 0.7, 3: 0.5}
    order = None
    captured = []
    layers = layers_of(model)
    hook = layers[0].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    answer(model, inputs)
    hook.remove()
    x = captured[0].detach()
    protected = PROTECTED.get(family, 1)
    if family == "videomae":  # the keyframe's 16 tokens, slice 2 of 4
        order = torch.tensor([*range(32, 48), *range(32), *range(48, 64)])
    rebuilt = Rebuilt(model, rates, protected)
    want = rebuilt(x if order is None else x[:, order])
    upstream = torch.randn_like(want)
    parameters = dict(layers.named_parameters())
    want_grads = torch.autograd.grad((want * upstream).sum(), list(parameters.values()))

    apply(model, rates)
    last = []
    hook = layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with patch.record(model) as kept:
        answer(model, inputs)
    hook.remove()
    torch.testing.assert_close(last[0], want, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad((last[0] * upstream).sum(), list(parameters.values()))
    largest = max(grad.abs().max().item() for grad in want_grads)
    for name, got, expected in zip(parameters, grads, want_grads, strict=True):  # a key's bias has none but rounding
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * largest, msg=name)
    now = torch.arange(x.shape[1]) if order is None else order
    now = now.expand(2, -1)
    for position, rows in zip(kept, rebuilt.kept, strict=True):
        now = now.gather(1, rows)
        assert torch.equal(position, now)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keep_rate_1_and_unpatch_leave_the_model_as_it_was(family):
    model, inputs, apply = build(family)
    before, classes = answer(model, inputs), [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mask = torch.zeros(TOKENS[family], dtype=torch.bool)
    mask[-3:] = True
    for options in ({}, {"protected": 5}, {"protected": mask}, {"dropped": "restore", "protected": mask}):
        assert apply(model, 1.0, **options) is model
        assert torch.equal(answer(model, inputs), before)
        assert model.state_dict().keys() == state.keys()
        patch.unpatch(model)
    apply(model, 0.6)
    assert not torch.equal(answer(model, inputs), before)
    assert model.state_dict().keys() == state.keys()
    assert patch.unpatch(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    names = ("pruning", "records", "_order", "_fill")
    assert not any(hasattr(module, name) for module in model.modules() for name in names)
    assert torch.equal(answer(model, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_reference(family):
    model, inputs, apply = build(family)
    apply(model.train(), 0.6)
    grads = {}
    for backend in ("reference", "auto"):
        with use_backend(backend):
            model.zero_grad()
            answer(model, inputs).square().mean().backward()
        grads[backend] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert grads["auto"].keys() == grads["reference"].keys()
    largest = max(grad.abs().max().item() for grad in grads["reference"].values())
    for name, want in grads["reference"].items():  # a key's bias has none but rounding
        torch.testing.assert_close(grads["auto"][name], want, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert sum(grad.abs().sum() > 0 for grad in grads["auto"].values()) > 30


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "videomae", "timm", "timm registers"])
@torch.no_grad()
def test_compiles_without_graph_break(family):
    model, inputs, apply = build(family)
    apply(model, 0.6)
    want = answer(model, inputs)
    torch._dynamo.reset()
    torch.testing.assert_close(answer(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs), want)


@torch.no_grad()
def test_exports_with_any_batch():
    model, inputs, apply = build("vit")
    apply(model, 0.6)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (inputs,), dynamic_shapes={"pixel_values": {0: batch}}).module()
    for B in (1, 3):
        inputs = torch.randn(B, *inputs.shape[1:])
        assert torch.equal(answer(program, inputs), answer(model, inputs))


@pytest.mark.parametrize("family", ["vit", "timm"])
def test_trains_with_checkpointed_activations(family):
    model, inputs, apply = build(family)
    apply(model.train(), 0.6)
    grads = []
    for _ in range(2):
        model.zero_grad()
        answer(model, inputs).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        if family == "timm":
            model.set_grad_checkpointing()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    if family == "vit":  # the older kind of checkpoint takes tuples of tensors apart
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(
            TypeError, match=r"must be the KeptTokens of the block before, got tuple: .* use_reentrant=False"
        ):
            answer(model, inputs.requires_grad_())


@torch.no_grad()
def test_blocks_that_drop_nothing_go_through_the_attention_interface():
    model, inputs, _ = build("vit")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rows = []

    def counted(module, query, key, value, attention_mask, **kwargs):
        rows.append(query.shape[2])
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("counted", counted)
    patch.transformers(model, {1: 0.5})
    want = answer(model, inputs)
    model.set_attn_implementation("counted")
    assert torch.equal(answer(model, inputs), want)
    assert rows == [37, 19, 19]  # not block 1, where tokens are dropped


@torch.no_grad()
def test_restore_puts_tokens_back():
    model, inputs, _ = build("vit")
    layers, C = layers_of(model), 32
    fill = torch.full((C,), 7.0)
    patch.transformers(model, {1: 0.5}, dropped="restore", fill=fill)
    last = []
    layers[-1].register_forward_hook(lambda module, args, output: last.append(output))
    with patch.record(model) as kept:
        answer(model, inputs)
    (restored,), (position,) = last, kept
    assert restored.shape == (2, 37, C)
    patch.unpatch(model)
    patch.transformers(model, {1: 0.5})
    last.clear()
    answer(model, inputs)
    assert torch.equal(scatter_tokens(last[0], position, grid=(1, 1, 37), fill=fill)[:, 0, 0], restored)
    dropped = torch.ones(2, 37, dtype=torch.bool).scatter(1, position, False)
    assert (restored[dropped] == 7).all() and dropped.sum() == 2 * 18


@torch.no_grad()
def test_protected_mask_is_kept_and_comes_first():
    model, inputs, _ = build("vit")
    mask = torch.zeros(37, dtype=torch.bool)
    mask[[5, 20, 36]] = True
    patch.transformers(model, {0: 0.3, 1: 0.3}, protected=mask)
    with patch.record(model) as kept:
        answer(model, inputs)
    assert [k.shape[1] for k in kept] == [12, 4]
    assert kept[-1].tolist() == [[0, 5, 20, 36]] * 2  # never fewer than what is protected, the class token too
    with pytest.raises(ValueError, match="tokens must be 40, as protected has, got 37"):
        patch.unpatch(model)
        patch.transformers(model, 0.5, protected=torch.zeros(40, dtype=torch.bool))
        answer(model, inputs)


@torch.no_grad()
def test_protected_weight_lets_the_class_token_decide():
    model, inputs, _ = build("vit")
    layers, captured = layers_of(model), []
    hook = layers[1].register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    answer(model, inputs)
    hook.remove()
    attention, x = layers[1].attention, layers[1].layernorm_before(captured[0])
    q, k = (p(x).reshape(2, 37, 2, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    of_class_token = (q[:, :, :1] @ k.transpose(-1, -2) / 4).softmax(-1).mean((1, 2))[:, 1:]
    patch.transformers(model, {1: 0.5}, protected_weight=1e9)
    with patch.record(model) as kept:
        answer(model, inputs)
    assert torch.equal(kept[0][:, 1:] - 1, of_class_token.topk(18).indices.sort().values)


@torch.no_grad()
def test_copies_pickles_and_threads_do_not_meet():
    model, inputs, _ = build("vit")
    other = copy.deepcopy(model)
    patch.transformers(model, 0.6)
    patch.transformers(other, 0.9, dropped="restore")
    want = answer(model, inputs), answer(other, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(twin, inputs), want[0])
        patch.unpatch(twin)
        assert not torch.equal(answer(twin, inputs), want[0])
    assert torch.equal(answer(model, inputs), want[0])

    wrong = []

    def run(which):
        for _ in range(5):
            if not torch.equal(answer((model, other)[which], inputs), want[which]):
                wrong.append(which)

    threads = [threading.Thread(target=run, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class OwnAttention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_of_ones_own():
    torch.manual_seed(0)
    module, x = OwnAttention(24, 3), torch.randn(2, 21, 24)
    whole = module(x)
    assert patch.attention(module, 0.5, protected=2) is module
    rows, index, importance = module(x)
    assert rows.shape == (2, 11, 24) and index.shape == (2, 9) and importance.shape == (2, 19)
    torch.testing.assert_close(rows, gather_tokens(whole, index, num_keyframe=2))
    torch.testing.assert_close(index, importance.topk(9).indices.sort().values)
    with pytest.raises(ValueError, match="patched already"):
        patch.attention(module)
    with pytest.raises(ValueError, match="at least protected = 2, got 1"):
        module(x[:, :1])
    assert torch.equal(patch.unpatch(module)(x), whole)
    with pytest.raises(ValueError, match="Linear must have 'qkv', got one without"):
        patch.attention(nn.Linear(3, 3))

    torch.testing.assert_close(patch.attention(module, 1.0)(x).rows, whole)
    patch.attention(patch.unpatch(module), 0.5, protected=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), (rows, index, importance))


def test_rejects_attention_that_computes_more():
    class Normed(OwnAttention):
        def forward(self, x):
            return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))

    class Dropping(OwnAttention):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.1, self.training)

    class Telling(OwnAttention):
        def forward(self, x):
            return super().forward(x), None

    for kind in (Normed, Dropping, Telling):
        module = kind(24, 3).eval()
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=f"nothing else, got {kind.__name__}, whose results differ"):
            patch.attention(module)
        assert torch.equal(torch.get_rng_state(), state) and not module.training


@torch.no_grad()
def test_under_autocast_and_in_bfloat16():
    for model, inputs, context in (
        (*build("vit")[:2], torch.autocast("cpu", torch.bfloat16)),
        (build("vit")[0].bfloat16(), build("vit")[1].bfloat16(), contextlib.nullcontext()),
    ):
        patch.transformers(model, 0.6)
        results = []
        for backend in ("auto", "reference"):
            with use_backend(backend), context, patch.record(model) as kept:
                results.append((answer(model, inputs), kept))
        (actual, kept), (want, expected) = results
        assert actual.dtype == torch.bfloat16 and torch.equal(kept[0], expected[0])
        torch.testing.assert_close(actual, want, rtol=0.05, atol=0.05 * want.abs().max().item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rate": 0.0}, r"keep_rate must be in \(0, 1\], got 0.0"),
        ({"keep_rate": {4: 0.5}}, r"blocks must be integers in \[0, 4\), got 4"),
        ({"keep_rate": {1: 0.5}, "blocks": [1]}, "blocks must be None where keep_rate names them"),
        ({"blocks": []}, "blocks must be at least one, got none"),
        ({"protected": -1}, "protected must be a number of tokens or a mask"),
        ({"protected": torch.zeros(37)}, r"or a mask \[N\] bool, got \[37\] torch.float32"),
        ({"protected_weight": -1.0}, "protected_weight must be a finite number, at least 0, got -1.0"),
        ({"dropped": "keep"}, "dropped must be 'drop' or 'restore', got 'keep'"),
        ({"fill": torch.zeros(32)}, r"fill must be \[C\] = \[32\] with dropped='restore', got \[32\] and 'drop'"),
        ({"fill": torch.zeros(7), "dropped": "restore"}, r"fill must be \[C\] = \[32\] .* got \[7\] and 'restore'"),
    ],
)
def test_rejects_bad_options(options, message):
    model, inputs, _ = build("vit")
    before = answer(model, inputs)
    with pytest.raises(ValueError, match=message):
        patch.transformers(model, **options)
    assert torch.equal(answer(model, inputs), before)  # nothing was changed


def test_rejects_models_it_cannot_serve():
    model, inputs, _ = build("vit")
    patch.transformers(model)
    with pytest.raises(ValueError, match="patched already"):
        patch.transformers(model)
    with pytest.raises(ValueError, match="tokens must be at least the protected 40, got 37"):
        patch.transformers(patch.unpatch(model), protected=40)(inputs)
    mask = torch.ones(2, 37)
    model = patch.transformers(_vit()[0])
    model.vit(inputs, attention_mask=mask)  # masks nothing
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="attention masks are not served"):
        model.vit(inputs, attention_mask=mask)
    with pytest.raises(TypeError, match=r"model must have one of \['ViTLayer', .* 'VideoMAELayer'\], got Linear"):
        patch.transformers(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must have a list of blocks, got Linear with none"):
        patch.timm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"attention dropout must be 0 .* got 0.1"):
        patch.transformers(_vit(attention_probs_dropout_prob=0.1)[0])
    for task, make in (("ForMaskedImageModeling", _vit), ("ForPreTraining", _videomae)):
        with pytest.raises(
            ValueError, match=f"dropped must be 'restore' for .*{task}, whose decoder wants every token"
        ):
            patch.transformers(make(task)[0])
    holder = nn.Module()
    holder.blocks = nn.Sequential(nn.Identity(), nn.Identity())
    with pytest.raises(ValueError, match=r"blocks must be of \['Block'\], got Identity"):
        patch.timm(holder)


@torch.no_grad()
def test_backbone_gives_out_whole_maps_or_is_refused():
    for stages, options in ((["stage2", "stage4"], {"dropped": "restore"}), (["stage4"], {})):
        with pytest.raises(
            ValueError, match="out_indices of Dinov2Backbone must be at most 1, the first block that prunes"
        ):
            patch.transformers(_hugging_face("Dinov2", "Backbone", out_features=stages)[0], **options)
    model, shape = _hugging_face("Dinov2", "Backbone", out_features=["stage1", "stage4"])
    images = torch.randn(2, *shape)
    before = model.eval()(images).feature_maps
    after = patch.transformers(model, dropped="restore")(images).feature_maps
    assert torch.equal(after[0], before[0]) and after[1].shape == (2, 32, 6, 6)
    assert (after[1] != before[1]).any()


def test_rejects_timm_models_it_cannot_serve():
    message = "attention must be plain Attention, got DiffAttention"
    with pytest.raises(ValueError, match=message):
        patch.timm(_timm(attn_layer="diff")[0])
    import timm

    for name, message in {
        "samvit_base_patch16": "blocks must take tokens .* got one that attends in windows",
        "beit_base_patch16_224": "Block must have 'ls1', got one without",
        "eva02_tiny_patch14_224": r"blocks must be of \['Block'\], got EvaBlock",
        "swin_tiny_patch4_window7_224": "must have a list of blocks, got SwinTransformer with none",
    }.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises((ValueError, TypeError), match=message):
            patch.timm(model)
