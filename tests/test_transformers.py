"""transformers' vision models: every family with six methods that use the seam with the host each in another way."""

import contextlib
import copy
import json
import logging
import pickle
import warnings
from functools import partial

import pytest
import torch

import laconic
from families import EVERY, fill
from laconic.analysis.macs import counted, summary
from laconic.core.backbone import find_host
from laconic.methods.ops import class_attention, mean_query_attention
from test_laws import Hidden, arbitrary_score

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPE = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=96, patch_size=16)
WIDE = dict(SHAPE, intermediate_size=96)
TEXT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50, projection_size=48)
LABELS = dict(num_labels=10)
TOWERS = dict(vision_config=WIDE, text_config=TEXT)
FAMILIES = {  # model class, config class, config
    "vit": ("ViTForImageClassification", "ViTConfig", WIDE | LABELS),
    "vit-pooler": ("ViTModel", "ViTConfig", WIDE),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE | LABELS),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", SHAPE | LABELS | dict(mlp_ratio=2)),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", SHAPE | dict(mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2-reg": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        SHAPE | LABELS | dict(mlp_ratio=2),
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", WIDE | dict(num_register_tokens=4)),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", WIDE),
    "clip-mean": ("CLIPForImageClassification", "CLIPConfig", TOWERS | LABELS),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", WIDE),
    "siglip-mean": ("SiglipForImageClassification", "SiglipConfig", TOWERS | LABELS),
    "beit": ("BeitForImageClassification", "BeitConfig", WIDE | LABELS | dict(use_relative_position_bias=True)),
    "beit-shared": (
        "BeitForImageClassification",
        "BeitConfig",
        WIDE
        | LABELS
        | dict(use_shared_relative_position_bias=True, use_absolute_position_embeddings=True, use_mean_pooling=False),
    ),
}
METHODS = ("etps", "dtps", "tome", "bat", "topk", "ats") if EVERY else ("etps",)
NO_CLASS_TOKEN = ("siglip", "siglip-mean")
AT = (1, 2, 3)
every_family = pytest.mark.parametrize("family", FAMILIES)
every_pair = pytest.mark.parametrize(("method", "family"), [(m, f) for m in METHODS for f in FAMILIES])


def make(family, **changes):
    torch.manual_seed(0)
    model, config, arguments = FAMILIES[family]
    return fill(getattr(transformers, model)(getattr(transformers, config)(**arguments, **changes)).eval())


def images(batch=3, size=96):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def options(method, family):
    return {"score": "mean-query"} if family in NO_CLASS_TOKEN and method in ("etps", "bat", "topk", "ats", "diffrate") else {}


def reduce_(model, method, family, keep=0.6, at=AT, **more):
    keep = None if method == "ats" else keep  # it decides for every image
    laconic.reduce_(model, method, keep=keep, at=at, **options(method, family), **more)
    fill(model.get_submodule(inside(model)).laconic)
    return model


def inside(model):
    host, _ = find_host(model)
    return next(name for name, module in model.named_modules() if module is host)


def answer(model, x, **arguments):
    """What the head of the model says."""
    with torch.no_grad():
        out = model(pixel_values=x, **arguments)
    return next(out[name] for name in ("logits", "image_embeds", "pooler_output") if out.get(name) is not None)


@every_pair
def test_keep_1_is_the_identity(method, family):
    model, x = make(family), images()
    expected = answer(model, x)
    reduce_(model, method, family, keep=1.0)
    if method != "ats":
        assert torch.equal(answer(model, x), expected)


@every_pair
def test_tokens_leave_the_batch_does_not_matter_and_all_is_put_back(method, family):
    model, x = make(family), images()
    expected, keys, attributes = answer(model, x), list(model.state_dict()), [set(vars(m)) for m in model.modules()]
    settings = json.dumps(model.config.to_dict())
    reduce_(model, method, family)
    y = answer(model, x)
    assert (y - expected).abs().max() > 1e-3
    counts = [stage.size.shape[1] for stage in laconic.provenance(model).stages]
    assert 36 > counts[0] >= counts[1] >= counts[2]
    singles = torch.cat([answer(model, image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(y, singles, rtol=1e-4, atol=1e-4)
    assert [name for name in model.state_dict() if "laconic." not in name] == keys
    laconic.restore_(model)
    assert torch.equal(answer(model, x), expected)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert list(model.state_dict()) == keys
    assert json.dumps(model.config.to_dict()) == settings
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["topk", "random"])
@every_family
def test_removed_equals_hidden(method, family):
    x, schedule = images(), laconic.Schedule.keep_counts({1: 22, 2: 14, 3: 9})
    removed = laconic.reduce_(make(family), method, schedule=schedule, **options(method, family))
    expected = answer(removed, x)
    hidden = laconic.reduce_(make(family), method, schedule=schedule, **options(method, family))
    reduction = find_host(hidden)[0].laconic
    by_attention = mean_query_attention if family in NO_CLASS_TOKEN else class_attention
    for stage, block in enumerate(AT):
        reduction.reducers[str(block)] = Hidden(by_attention if method == "topk" else partial(arbitrary_score, stage))
    torch.testing.assert_close(answer(hidden, x), expected, rtol=1e-4, atol=1e-4)
    assert len(reduction.entry(4)) == 36


@pytest.mark.parametrize("method", ["etps", "dtps", "bat", "topk", "ats"])
@pytest.mark.parametrize("family", ["vit", "dinov2-reg", "dinov3", "clip-mean", "siglip", "siglip-mean"])
def test_permuted_patches_give_the_same_answer(method, family):
    model, x = reduce_(make(family), method, family), images()
    expected, (host, entry) = answer(model, x), find_host(model)
    order, prefix = torch.randperm(36, generator=torch.Generator().manual_seed(2)), entry.prefix(host)[0]
    host.embeddings.register_forward_hook(lambda m, args, e: torch.cat([e[:, :prefix], e[:, prefix:][:, order]], 1))
    if hasattr(host, "rope_embeddings"):
        host.rope_embeddings.register_forward_hook(lambda m, args, tables: tuple(table[order] for table in tables))
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what reads all tokens
def last_tokens(model, x):
    """(the last tokens as the head would see them without laconic, what laconic knows of them)"""
    host, seen = find_host(model)[0], []
    norm = next((getattr(host, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(host, name)), None)
    part = find_host(model)[1].blocks(host)[-1] if hasattr(host, "pre_layrnorm") else norm  # CLIP hands them on as they are
    hook = part.register_forward_hook(lambda m, args, y: seen.append(y[0] if isinstance(y, tuple) else y))
    said = answer(model, x)
    hook.remove()
    return said, seen[0], host.laconic.entry(4)


def mean(y, tokens):
    """Over patches, each token as often as it has any."""
    weight = (tokens.size if tokens.keep_mask is None else tokens.size * tokens.keep_mask).unsqueeze(2)
    return (y[:, tokens.prefix :] * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("method", ["tome", "etps", "bat", "diffrate", "topk", "ats"])
@pytest.mark.parametrize("family", ["dinov2", "dinov2-reg", "clip-mean", "siglip-mean", "beit"])
def test_means_are_over_patches(method, family):
    model = reduce_(make(family), method, family)
    said, y, tokens = last_tokens(model, images())
    pooled = mean(y, tokens)
    if "dinov2" in family:
        pooled = torch.cat([y[:, 0], pooled], 1)
    if family == "beit":
        pooled = model.beit.pooler.layernorm(pooled)
    with torch.no_grad():
        torch.testing.assert_close(said, model.classifier(pooled), rtol=1e-4, atol=1e-4)
    unweighted = y[:, tokens.prefix :].mean(1)
    assert tokens.merged == ((mean(y, tokens) - unweighted).abs().max() > 1e-4)


@pytest.mark.parametrize("method", ["tome", "etps", "diffrate", "topk"])
def test_the_probe_of_siglip_counts_tokens_by_size(method):
    model = reduce_(make("siglip"), method, "siglip")
    said, y, tokens = last_tokens(model, images())
    laconic.restore_(model)
    head = find_host(model)[0].head
    with torch.no_grad():
        for b in range(3):
            repeated = y[b].repeat_interleave(tokens.size[b].long(), 0)
            torch.testing.assert_close(said[b : b + 1], head(repeated.unsqueeze(0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["vit-pooler", "dinov3", "siglip"])
def test_merged_tokens_go_back_to_their_patches(family):
    x = images()
    for method, restore, length in (("tome", None, 36), ("diffrate", None, 36), ("topk", None, 9), ("topk", True, 36)):
        model = make(family)
        plan = laconic.Schedule.keep_counts({1: 22, 2: 14, 3: 9})
        laconic.reduce_(model, method, schedule=plan, restore=restore, **options(method, family))
        with torch.no_grad():
            y = model(x).last_hidden_state
            assert torch.equal(model(x, return_dict=False)[0], y)
        tokens = find_host(model)[0].laconic.entry(4)
        assert y.shape[1] == tokens.prefix + length
        if length == 36:
            for b in range(3):
                gone, held = tokens.token_of_patch[b] < 0, tokens.token_of_patch[b].clamp_min(0)
                first = tokens.origin[b, held]  # the patch in whose place the same token stands
                patches = y[b, tokens.prefix :]
                torch.testing.assert_close(patches[~gone], patches[first][~gone])
                torch.testing.assert_close(patches[gone], patches[~gone].mean(0).expand(int(gone.sum()), -1))
            dense = laconic.restore_dense(model, y, layout="NCHW")
            assert torch.equal(dense.flatten(2).transpose(1, 2), y[:, tokens.prefix :])


@every_family
def test_hidden_states_shrink(family):
    model, x = reduce_(make(family), "topk", family), images()
    expected = answer(model, x)
    with torch.no_grad():
        states = model(pixel_values=x, output_hidden_states=True).hidden_states
        if states is None:  # some heads of version 4 do not hand them on
            states = find_host(model)[0](x, output_hidden_states=True).hidden_states
    prefix = find_host(model)[1].prefix(find_host(model)[0])[0]
    assert [s.shape[1] - prefix for s in states] == [36, 36, 22, 14, 9]
    assert torch.equal(answer(model, x), expected)
    laconic.restore_(model)
    laconic.reduce_(model, "topk", keep=0.6, **options("topk", family))  # what capturing left behind is no patch


@pytest.mark.parametrize("method", ["tome", "topk"])
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3", "clip-mean", "siglip-mean", "beit", "beit-shared"])
def test_images_of_another_size(method, family):
    """BEiT would resize its bias to the number of tokens there are."""
    model, x = make(family), images(size=128)
    flag = {} if family in ("dinov2", "dinov3", "clip-mean") else {"interpolate_pos_encoding": True}
    if family == "clip-mean":  # its head does not hand on the flag
        model = find_host(model)[0]
        flag = {"interpolate_pos_encoding": True}
    expected = answer(model, x, **flag)
    reduce_(model, method, family, keep=1.0)
    assert torch.equal(answer(model, x, **flag), expected)
    laconic.restore_(model)
    reduce_(model, method, family)
    y = answer(model, x, **flag)
    assert laconic.provenance(model).stages[0].where.shape[1] == 64
    if family == "beit":
        torch.testing.assert_close(y, answer(model, x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, torch.cat([answer(model, i.unsqueeze(0), **flag) for i in x]), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ what is refused, and said
@pytest.mark.unchecked
@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip"])
def test_attention_weights_and_masks_are_refused(family):
    model, x = reduce_(make(family), "topk", family), images()
    host = find_host(model)[0]
    if transformers.__version__ >= "5" or family == "clip":  # version 4 warns by itself that fused attention has no weights
        with pytest.raises(ValueError, match="takes no output_attentions"):
            answer(model, x, output_attentions=True)
    name = "attention_mask" if transformers.__version__ >= "5" else "head_mask"
    with pytest.raises(ValueError, match=f"a reduced {type(host).__name__} takes no {name}"):
        host(x, **{name: torch.ones(3, 37)})
    answer(model, x)


def eager(family):
    model = make(family)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("family", ["vit", "dinov3", "clip-mean", "siglip"])
def test_eager_attention_is_fused_while_it_is_reduced(family, caplog):
    x, model = images(), eager(family)
    expected, host = answer(model, x), find_host(model)[0]
    with caplog.at_level(logging.INFO, "laconic"):
        reduce_(model, "topk", family)
    assert [r.getMessage() for r in caplog.records] == [
        f"{type(host).__name__}: attn_implementation is 'sdpa' while it is reduced; it was 'eager'"
    ]
    torch.testing.assert_close(answer(model, x), answer(reduce_(make(family), "topk", family), x))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        laconic.restore_(twin)
        assert find_host(twin)[0].config._attn_implementation == "eager"
        assert torch.equal(answer(twin, x), expected)
    with pytest.raises(LookupError):
        laconic.reduce_(make("siglip"), "etps", keep=0.5)
    siglip = eager("siglip")
    with pytest.raises(LookupError):  # refused after the setting
        laconic.reduce_(siglip, "etps", keep=0.5)
    assert find_host(siglip)[0].config._attn_implementation == "eager"


@pytest.mark.unchecked
def test_models_that_cannot_be_reduced_say_why():
    model = make("vit")
    model.vit.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2'.*model.set_attn_implementation\('sdpa'\) first"):
        laconic.reduce_(model, "topk", keep=0.5)
    model = eager("vit")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="config.output_attentions = False"):
        laconic.reduce_(model, "topk", keep=0.5)
    model = reduce_(make("vit"), "tome", "vit")
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="made 0 calls of scaled_dot_product_attention"):
        answer(model, images())
    model = laconic.reduce_(make("vit"), "tome", at=(1,), keep=0.6)
    for part in find_host(model)[1].blocks(find_host(model)[0])[3].modules():  # it has the sizes to add, and nobody looks
        if hasattr(part, "config"):
            part.config = eager("vit").config
    with pytest.raises(RuntimeError, match="block 3 .*made 0 calls of scaled_dot_product_attention"):
        answer(model, images())
    segmenting = transformers.BeitConfig(**WIDE, use_mean_pooling=True)
    with pytest.raises(TypeError, match="BeitForMaskedImageModeling cannot be reduced: it reads tokens on their grid"):
        laconic.reduce_(transformers.BeitForMaskedImageModeling(segmenting), "topk", keep=0.5)
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**SHAPE))
    with pytest.raises(TypeError, match="Dinov2Backbone cannot be reduced: it reads tokens on their grid"):
        laconic.reduce_(backbone, "topk", keep=0.5)
    config = {k: v for k, v in WIDE.items() if k != "image_size"}
    naflex = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**config, num_patches=36))
    with pytest.raises(TypeError, match="padded to one length .*NaFlex.*SiglipModel in transformers, which can be reduced"):
        laconic.reduce_(naflex, "topk", keep=0.5)


def test_a_class_readout_needs_a_head_that_reads_the_class_token():
    laconic.reduce_(make("vit"), "avit")
    for family in ("dinov2", "siglip", "beit"):
        with pytest.raises(LookupError, match="gives its result in the class token"):
            laconic.reduce_(make(family), "avit")


# ------------------------------------------------------------------------------------------------ costs, files, the doctor
@pytest.mark.parametrize("method", [None, "topk", "tome", "bat"] if EVERY else [None, "tome"])
@every_family
def test_closed_forms_are_what_torch_counts(method, family):
    model = make(family)
    if method is not None:
        reduce_(model, method, family)
    found = summary(model)
    assert found.macs == counted(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert method is None or found.macs < found.baseline_macs


@pytest.mark.parametrize("method", ["dtps", "tome"])
@every_family
def test_saved_and_loaded(method, family, tmp_path):
    model, x = make(family), images()
    base = answer(model, x)
    reduce_(model, method, family)
    expected = answer(model, x)
    laconic.save(model, tmp_path / "ours")
    loaded = laconic.load(tmp_path / "ours")
    assert type(loaded) is type(model)
    assert torch.equal(answer(loaded, x), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(twin, x), expected)
        assert torch.equal(answer(laconic.restore_(twin), x), base)
    model.save_pretrained(tmp_path / "theirs")
    plain = type(model).from_pretrained(tmp_path / "theirs").eval()
    assert torch.equal(answer(plain, x), base)


def test_a_constructor_s_flags_are_saved(tmp_path):
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**WIDE), add_pooling_layer=False).eval()
    laconic.reduce_(model, "topk", keep=0.5)
    laconic.save(model, tmp_path)
    assert json.loads((tmp_path / "laconic.json").read_text())["model"]["args"]["add_pooling_layer"] is False
    with torch.no_grad():
        assert torch.equal(laconic.load(tmp_path)(images()).last_hidden_state, model(images()).last_hidden_state)


@pytest.mark.unchecked
def test_only_classes_of_transformers_are_built(tmp_path):
    laconic.save(reduce_(make("vit"), "topk", "vit"), tmp_path)
    record = json.loads((tmp_path / "laconic.json").read_text())
    for path in ("os.system", "transformers.models.vit.modeling_vit.nn.Linear", "transformers.pipelines.pipeline"):
        (tmp_path / "laconic.json").write_text(json.dumps(record | {"model": record["model"] | {"class": path}}))
        with pytest.raises(ValueError, match="is not a model class of transformers; laconic builds no other"):
            laconic.load(tmp_path)
    wrong = record["model"] | {"args": {"depth": 3}}
    (tmp_path / "laconic.json").write_text(json.dumps(record | {"model": wrong}))
    with pytest.raises(ValueError, match="cannot build transformers.models.vit.*or build it yourself"):
        laconic.load(tmp_path)


def test_the_doctor_reads_a_directory_of_theirs(tmp_path):
    from laconic.cli.doctor import doctor
    from laconic.core.files import Refusal

    make("dinov3").save_pretrained(tmp_path / "dinov3")
    found = doctor(str(tmp_path / "dinov3")).found
    assert found.supported
    assert (found.prefix, found.grid, found.positions, found.heads) == (5, (6, 6), "rotary", 3)
    assert {t.method for t in found.trials if t.works} >= set(METHODS)
    (tmp_path / "dinov3" / "config.json").write_text('{"model_type": "vit", "architectures": ["pipeline"]}')
    with pytest.raises(Refusal, match="does not hold a model that transformers saved"):
        doctor(str(tmp_path / "dinov3"))


# ------------------------------------------------------------------------------------------------ text and images
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_zero_shot(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**TOWERS)
    model, x = fill(getattr(transformers, f"{name}Model")(config).eval()), images()
    texts = {"input_ids": torch.randint(0, 50, (2, 7))}

    def run():
        with torch.no_grad():
            return model(**texts, pixel_values=x)

    base = run()
    laconic.reduce_(model, "tome", keep=0.6, at=AT)
    out = run()
    assert torch.equal(out.text_embeds, base.text_embeds)
    assert out.logits_per_image.shape == (3, 2)
    assert not torch.allclose(out.image_embeds, base.image_embeds)
    with torch.no_grad():
        features = model.get_image_features(x)
    features = features if isinstance(features, torch.Tensor) else features.pooler_output
    torch.testing.assert_close(features / features.norm(dim=-1, keepdim=True), out.image_embeds)
    laconic.restore_(model)
    assert torch.equal(run().logits_per_image, base.logits_per_image)


# ------------------------------------------------------------------------------------------------ training, graphs
def enable_checkpointing(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("method", ["tome", "dtps"])
@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov3", "clip-mean", "siglip", "beit"])
def test_gradient_checkpointing_changes_nothing(method, family):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = reduce_(make(family), method, family, at=(1,)).train()  # behind it sizes are added, and nothing else is done
        if checkpointing:
            enable_checkpointing(model, False)
        ran = []
        for block in find_host(model)[1].blocks(find_host(model)[0]):
            layer = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
            layer.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        torch.manual_seed(3)
        out = model(pixel_values=images())
        out = out.logits if "logits" in out else out.pooler_output
        (out.square().mean() + sum(laconic.losses(model).values())).backward()
        calls.append(len(ran))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name], rtol=1e-5, atol=1e-6)
    assert calls == [4, 8]  # each ran again, once


def test_reentrant_checkpointing_of_learned_decisions_is_refused():
    model = reduce_(make("vit"), "dtps", "vit").train()
    enable_checkpointing(model, True)
    with pytest.raises(RuntimeError, match="re-entrant gradient checkpointing cannot carry it"):
        model(pixel_values=images()).logits.sum().backward()


@pytest.mark.parametrize("method", ["dtps", "dynamicvit"])
@pytest.mark.parametrize("family", ["dinov2", "siglip", "siglip-mean", "beit", "dinov3"])
def test_soft_training_agrees_with_removal(method, family, monkeypatch):
    from laconic.methods import dynamicvit
    from laconic.methods.ops import topk_split

    model, x = reduce_(make(family), method, family), images()
    expected = answer(model, x)
    counts, dead = iter([s.size.shape[1] for s in laconic.provenance(model).stages]), [torch.zeros(3, 36, dtype=torch.bool)]

    def decide(log_probs):
        kept = topk_split(log_probs[..., 0].masked_fill(dead[0], -99.0), next(counts))[0]
        keep = torch.zeros_like(log_probs[..., 0]).scatter(1, kept, 1.0)
        dead[0] = keep == 0
        return keep

    monkeypatch.setattr(dynamicvit, "gumbel_keep", decide)
    find_host(model)[0].laconic.train()  # the model's own training changes its answer: dropout, coordinates
    torch.testing.assert_close(answer(model, x), expected, rtol=1e-3, atol=1e-3)


COMPILED = (("topk", "vit"), ("tome", "dinov2"), ("etps", "dinov3"), ("tome", "siglip"), ("topk", "beit-shared"))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("method", "family"),
    [("tome", "clip-mean"), *(pytest.param(*one, marks=pytest.mark.slow) for one in COMPILED)],
)
def test_one_graph(method, family):
    torch._dynamo.reset()
    model, x = reduce_(make(family), method, family), images()
    expected = answer(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answer(compiled, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.unchecked
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family"),
    [("topk", "vit"), ("tome", "dinov2"), ("topk", "dinov3"), ("tome", "siglip"), ("tome", "beit"), ("topk", "beit-shared")],
)
def test_exported(method, family):
    model, x = reduce_(make(family), method, family), images()
    expected = answer(model, x)
    with contextlib.suppress(AttributeError):
        model.config.return_dict = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (), {"pixel_values": x}, strict=False)
    torch.testing.assert_close(answer(program.module(), x), expected, rtol=1e-4, atol=1e-4)
