"""Models that take clips: VideoMAE and V-JEPA 2 of transformers, whose patches are tubelets on a grid of three sides."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

import families
import laconic
from clips import (
    AT,
    CLASSIFIERS,
    CLIPS,
    FRAMES,
    GRID,
    PATCHES,
    REFUSED,
    SERVED,
    answer,
    arguments,
    blocks,
    clips,
    make,
    pooled,
    reduced,
)
from families import BEFORE, EVERY, MIXERS, PARKING, VARIABLE, at, fill
from laconic.analysis.macs import counted, summary
from laconic.cli import draw
from laconic.core.backbone import find_host
from laconic.core.dense import nearest_held
from laconic.core.gather import arange_like
from laconic.core.token_reduction import reduction_of
from laconic.methods.ops import mean_query_attention, merge_neighbours
from test_laws import Hidden
from test_long import Largest
from test_transformers import enable_checkpointing

transformers = pytest.importorskip("transformers")

every_model = pytest.mark.parametrize("name", CLIPS)
on_classifiers = pytest.mark.parametrize("name", CLASSIFIERS)
WIDE = SERVED if EVERY else ["dtps", "tome"]
# every method on one of the classifiers, some on both
PAIRS = [(m, n) for i, m in enumerate(SERVED) for j, n in enumerate(CLASSIFIERS) if EVERY or m in WIDE or (i + j) % 2]
every_pair = pytest.mark.parametrize(("method", "name"), PAIRS)


def schedule():
    return laconic.Schedule.keep_counts({1: 40, 2: 25, 3: 15})


# ------------------------------------------------------------------------------------------------ laws
@every_pair
def test_keep_1_is_the_identity(method, name):
    model, x = make(name), clips()
    expected = answer(model, x)
    laconic.reduce_(model, method, **{**arguments(method), "keep": 1.0})
    assert torch.equal(answer(model, x), expected)


@every_pair
def test_tokens_are_removed_patches_are_counted_and_all_is_undone(method, name):
    model, x = make(name), clips()
    expected, keys = answer(model, x), list(model.state_dict())
    attributes = [set(vars(module)) for module in model.modules()]
    laconic.reduce_(model, method, **arguments(method))
    assert [key for key in model.state_dict() if "laconic." not in key] == keys
    fill(reduction_of(model))
    out = answer(model, x)
    provenance = laconic.provenance(model)
    assert provenance.grid == GRID
    for stage in provenance.stages:
        assert stage.grid == GRID
        held, gone = stage.size.sum(1), (stage.where < 0).sum(1)
        torch.testing.assert_close(held + gone, torch.full((3,), float(PATCHES)), rtol=1e-5, atol=0)
        if method not in MIXERS:
            count = (stage.where.unsqueeze(1) == arange_like(stage.size).unsqueeze(2)).sum(2)
            assert torch.equal(count.float(), stage.size)
        if method not in PARKING | VARIABLE:
            assert stage.size.shape[1] == reduction_of(model).counts()[stage.block] < PATCHES
    assert len(provenance.stages) == len(at(method, AT))
    singles = torch.cat([answer(model, clip[None]) for clip in x])
    torch.testing.assert_close(out, singles, rtol=1e-4, atol=1e-4)
    laconic.restore_(model)
    assert torch.equal(answer(model, x), expected)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert list(model.state_dict()) == keys


@every_model
@pytest.mark.parametrize("method", WIDE)
def test_a_batch_is_its_clips(method, name):
    model, x = reduced(name, method), clips()
    singles = torch.cat([pooled(model, clip[None]) for clip in x])
    torch.testing.assert_close(pooled(model, x), singles, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", sorted(REFUSED))
@on_classifiers
def test_methods_for_images_are_refused_by_name(method, name):
    model, x = make(name), clips()
    expected = answer(model, x)
    with pytest.raises((ValueError, LookupError), match=f"(?s)^{method} .*{REFUSED[method]}"):
        laconic.reduce_(model, method, **({} if method == "avit" else {"keep": 0.6}))
    assert not laconic.is_reduced(model)
    assert torch.equal(answer(model, x), expected)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("bat", {"merger": "spatial-pool"}, "takes clips"),
        ("tokenlearner", {"version": "1"}, "takes clips"),
        ("heuristic", {"count": "radius"}, "takes clips"),
    ],
)
def test_options_for_images_are_refused_by_name(method, options, said):
    given = {**arguments(method), **options}
    with pytest.raises(ValueError, match=f"(?s)^{method}.*{said}"):
        laconic.reduce_(make("vjepa2"), method, **given)


# ------------------------------------------------------------------------------------------------ positions
@every_model
@pytest.mark.parametrize("execution", ["removed", "packed"])
def test_removed_equals_hidden(name, execution):
    """Tokens that stay keep their positions: removing others is the same as hiding them, where all are in their places."""
    x = clips()
    removed = reduced(name, "topk", schedule=schedule())
    expected = answer(removed, x)
    assert reduction_of(removed).entry(4).origin is not None
    if execution == "packed":  # every clip has its own number of tokens
        x[0, 2:] = x[0, 1:2]
        models = [reduced(name, "dedup", execution=how, tolerance=0.0) for how in ("packed", "masked")]
        packed, masked = (answer(model, x) for model in models)
        torch.testing.assert_close(packed, masked, rtol=1e-4, atol=1e-4)
        assert (laconic.provenance(models[0]).final.size > 0).sum(1).tolist() == [32, 64, 64]
        return
    hidden = reduced(name, "topk", schedule=schedule())
    reduction = reduction_of(hidden)
    for block in AT:
        reduction.reducers[str(block)] = Hidden(mean_query_attention)
    found = answer(hidden, x)
    if expected.dim() == 3:  # the features of the kept tokens, in their order
        kept = removed if removed.training else reduction_of(removed).entry(4).origin
        found = found.gather(1, kept.unsqueeze(2).expand(expected.shape))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(reduction.entry(4)) == PATCHES


@on_classifiers
def test_a_merged_token_keeps_the_position_of_the_token_it_was_merged_into(name):
    model, x, seen = reduced(name, "tome", at=(1,), keep=0.6), clips(), []

    def look(module, args, kwargs):
        seen.append(kwargs.get("position_mask", args[1] if len(args) > 1 else None))

    for block in blocks(model)[2:]:
        attention = block.attention
        attention.register_forward_pre_hook(look, with_kwargs=True)
    answer(model, x)
    if name == "vjepa2":
        kept = laconic.provenance(model).final.kept
        assert len(seen) == 2
        assert all(torch.equal(mask, kept) for mask in seen)
        held = laconic.provenance(model).final.where.gather(1, kept)
        assert torch.equal(held, arange_like(kept))


# ------------------------------------------------------------------------------------------------ readout
@pytest.mark.parametrize("method", ["tome", "etps", "diffrate", "topk", "ats"])
def test_the_mean_of_videomae_is_over_patches(method):
    model, x, seen = reduced("videomae", method), clips(), []
    blocks(model)[-1].register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    logits, tokens = answer(model, x), reduction_of(model).entry(4)
    weight = (tokens.size if tokens.keep_mask is None else tokens.size * tokens.keep_mask).unsqueeze(2)
    mean = (seen[0] * weight).sum(1) / weight.sum(1)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.classifier(model.fc_norm(mean)), rtol=1e-4, atol=1e-4)
    assert tokens.merged == ((mean - seen[0].mean(1)).abs().max() > 1e-4)


@pytest.mark.parametrize("method", ["tome", "etps", "diffrate", "topk", "kmedoids"])
def test_the_pooler_of_vjepa2_counts_tokens_by_size(method):
    """In its self-attention and in its cross-attention: as if a token were there once for each of its patches."""
    model, x, seen = reduced("vjepa2", method), clips(), []
    model.vjepa2.encoder.layernorm.register_forward_hook(lambda module, args, out: seen.append(out))
    logits, tokens = answer(model, x), reduction_of(model).entry(4)
    assert seen[0].shape[1] < PATCHES
    laconic.restore_(model)
    with torch.no_grad():
        for clip in range(3):
            repeated = seen[0][clip].repeat_interleave(tokens.size[clip].long(), 0)
            expected = model.classifier(model.pooler(repeated[None]))
            torch.testing.assert_close(logits[clip : clip + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("restore", ["similar", "mean", "zeros"])
def test_the_pooler_does_not_attend_to_filled_patches(restore):
    x = clips()
    plain = answer(reduced("vjepa2", "topk"), x)
    torch.testing.assert_close(answer(reduced("vjepa2", "topk", restore=restore), x), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tome", "topk", "dtps"])
def test_the_predictor_reads_every_patch(method):
    model, x, seen = reduced("vjepa2-model", method), clips(), []
    model.predictor.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    layer = model.predictor.embeddings.predictor_embeddings
    layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        out = model(x)
    whole = answer(reduced("vjepa2-model", method, restore="mean"), x)
    assert out.predictor_output.last_hidden_state.shape == (3, PATCHES, 48)
    torch.testing.assert_close(seen[1], whole)  # in raster order, since the indices of the context are
    kept = answer(model, x)
    tokens = reduction_of(model).entry(4)
    assert kept.shape[1] == (PATCHES if tokens.merged else len(tokens))
    held = tokens.token_of_patch.clamp_min(0)
    if not tokens.merged:
        own = kept.gather(1, held.unsqueeze(2).expand(-1, -1, 48))
        torch.testing.assert_close(whole[tokens.token_of_patch >= 0], own[tokens.token_of_patch >= 0])
    with pytest.raises(ValueError, match="a reduced VJEPA2Model takes no context_mask"):
        model(x, context_mask=[torch.arange(4).expand(3, -1)], target_mask=[torch.arange(4).expand(3, -1)])


def test_the_predictor_of_the_model_in_a_classifier_reads_every_patch():
    model, x = reduced("vjepa2", "topk"), clips()
    with torch.no_grad():
        out = model.vjepa2(x)
    assert out.last_hidden_state.shape[1] < PATCHES
    assert out.predictor_output.last_hidden_state.shape == (3, PATCHES, 48)


# ------------------------------------------------------------------------------------------------ the grid
def test_dense_features_are_laid_out_on_the_grid():
    model, x = reduced("vjepa2-model", "topk"), clips()
    features = answer(model, x)
    rows = laconic.restore_dense(model, features)
    dense = laconic.restore_dense(model, features, layout="NCTHW")
    assert dense.shape == (3, 48, *GRID)
    assert torch.equal(dense.flatten(2).transpose(1, 2), rows)
    with pytest.raises(ValueError, match="grid of 4 x 4 x 4; use layout='NCTHW'"):
        laconic.restore_dense(model, features, layout="NCHW")
    with pytest.raises(ValueError, match="layout must be 'NLC' or 'NCHW'"):
        laconic.restore_dense(model, features, layout="NTCHW")


def test_the_nearest_patch_is_near_in_time_too():
    model, x = reduced("vjepa2-model", "topk", restore="nearest"), clips()
    out = answer(model, x)
    tokens = reduction_of(model).entry(4)
    found = nearest_held(tokens)
    place = np.stack(np.unravel_index(np.arange(PATCHES), GRID), 1)
    for clip in range(3):
        held = np.flatnonzero(tokens.token_of_patch[clip].numpy() >= 0)
        distance = ((place[:, None] - place[held][None]) ** 2).sum(2)
        assert found[clip].tolist() == held[distance.argmin(1)].tolist()
    assert torch.equal(out, out.gather(1, found.unsqueeze(2).expand(out.shape)))


def test_neighbours_merge_inside_their_frame():
    features = torch.randn(2, PATCHES, 8, generator=torch.Generator().manual_seed(0))
    for count in (63, 40, 24):
        group = merge_neighbours(features, GRID, count)
        for row in group.tolist():
            assert len(set(row)) == count
            assert all(first // 16 == patch // 16 for patch, first in enumerate(row))


def test_the_heuristic_keeps_the_middle_of_every_frame():
    model = laconic.reduce_(make("vjepa2"), "heuristic", at=(1,), keep=0.25)
    answer(model, clips())
    kept = laconic.provenance(model).final.kept[0].tolist()
    assert kept == [16 * frame + cell for frame in range(4) for cell in (5, 6, 9, 10)]


def test_token_maps_of_a_clip():
    model, x = reduced("vjepa2", "tome"), clips()
    answer(model, x)
    stages = draw.maps(laconic.provenance(model), 0)
    assert [stage.grid for stage in stages] == [GRID] * 3
    picture = x[0].movedim(1, 3).sigmoid().numpy()
    painted = draw.paint(picture, stages[-1])
    assert painted.shape == picture.shape
    place, patches = next(iter(stages[-1].groups.items()))
    frame, row, column = np.unravel_index(patches, GRID)
    inside = [painted[2 * f + 1, 8 * r + 4, 8 * c + 4] for f, r, c in zip(frame, row, column, strict=True)]
    assert np.ptp(np.stack(inside), axis=0).max() < 1e-6  # one colour in all frames
    members = np.isin(stages[-1].holder, [place]).reshape(GRID).repeat(2, 0).repeat(8, 1).repeat(8, 2)
    np.testing.assert_allclose(inside[0], picture[members].mean(0), rtol=1e-5)
    assert draw.token_maps(picture, stages)[0].shape[0] == FRAMES
    alone = draw.Map(np.arange(PATCHES), GRID, 0, PATCHES)  # every patch is a token: outlines of all patches in every frame
    outlined = (draw.paint(picture, alone) != picture).any(-1)
    row, column = np.indices((32, 32))
    assert (outlined == ((row % 8 == 0) & (row > 0)) | ((column % 8 == 0) & (column > 0))).all()


# ------------------------------------------------------------------------------------------------ inputs
@pytest.mark.parametrize("method", ["tome", "topk"])
def test_clips_of_another_length(method):
    """V-JEPA 2 takes clips of any length; VideoMAE has a position for each of its own frames."""
    model, longer = make("vjepa2"), clips(frames=12)
    expected = answer(model, longer)
    given = arguments(method)
    laconic.reduce_(model, method, **{**given, "keep": 1.0})
    assert torch.equal(answer(model, longer), expected)
    laconic.restore_(model)
    laconic.reduce_(model, method, example=longer[:1], **given)
    out = answer(model, longer)
    assert laconic.provenance(model).grid == (6, 4, 4)
    assert laconic.provenance(model).stages[0].where.shape[1] == 96
    torch.testing.assert_close(out, torch.cat([answer(model, clip[None]) for clip in longer]), rtol=1e-4, atol=1e-4)
    one = answer(model, longer[:, :1])  # a single frame is repeated
    assert laconic.provenance(model).grid == (1, 4, 4)
    assert one.shape == (3, 10)
    found = summary(model, example=longer)
    assert (found.image_size, found.batch_size) == ((12, 32, 32), 3)
    assert found.macs == 3 * counted(model, example=longer)
    assert "3 images of 12 x 32 x 32" in str(found)


@every_model
def test_an_empty_batch(name):
    model = reduced(name, "tome")
    assert answer(model, clips()[:0]).shape[0] == 0


@pytest.mark.unchecked
def test_inputs_and_models_that_are_refused():
    for name in CLASSIFIERS:
        with pytest.raises(ValueError, match=r"example must be a batch of clips \[B, frames, channels, height, width\], got"):
            laconic.reduce_(make(name), "topk", keep=0.5, score="mean-query", example=torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match="example has 4 channels, but the model takes 3"):
            laconic.reduce_(make(name), "topk", keep=0.5, score="mean-query", example=torch.randn(1, 8, 4, 32, 32))
    with pytest.raises(ValueError, match=r"example must be an image batch \[B, channels, height, width\], got \(1, 8, 3"):
        laconic.reduce_(families.make("plain"), "topk", keep=0.5, example=torch.randn(1, 8, 3, 96, 96))
    model = reduced("videomae-model", "topk")
    with pytest.raises(ValueError, match="a reduced VideoMAEModel takes no bool_masked_pos"):
        model(clips(), bool_masked_pos=torch.zeros(3, PATCHES, dtype=torch.bool))
    with pytest.raises(TypeError, match="VideoMAEForVideoClassification cannot be reduced: with use_mean_pooling=False it"):
        laconic.reduce_(make("videomae", use_mean_pooling=False), "topk", keep=0.5)
    config = transformers.VideoMAEConfig(**CLIPS["videomae"][2], decoder_hidden_size=24, decoder_num_hidden_layers=1)
    with pytest.raises(TypeError, match="VideoMAEForPreTraining cannot be reduced: it encodes the visible patches"):
        laconic.reduce_(transformers.VideoMAEForPreTraining(config), "topk", keep=0.5)


def test_eager_attention_is_fused_while_it_is_reduced():
    for name in CLASSIFIERS:
        model, x = make(name), clips()
        model.set_attn_implementation("eager")
        expected = answer(model, x)
        laconic.reduce_(model, "tome", keep=0.6, at=AT)
        torch.testing.assert_close(answer(model, x), answer(reduced(name, "tome"), x), rtol=1e-4, atol=1e-4)
        laconic.restore_(model)
        assert model.config._attn_implementation == "eager"
        assert torch.equal(answer(model, x), expected)


LONG = dict(hidden_size=24, num_attention_heads=2, num_hidden_layers=1, patch_size=4, frames_per_clip=64, crop_size=64)
LONG_METHODS = [("run-length", {}), ("tome", {})]
LONG_METHODS += [
    pytest.param(method, more, marks=pytest.mark.slow)
    for method, more in [
        *((method, {}) for method in ("ats", "dedup", "dtps", "etps", "heuristic", "pre-merge")),
        *(("topk", {"restore": fill}) for fill in ("nearest", "similar")),
    ]
]


@pytest.mark.parametrize(("method", "more"), LONG_METHODS)
def test_memory_is_linear_in_the_tokens(method, more):
    """At 8,192 tokens no tensor has as many elements as a sixteenth of all pairs, where the attention is fused."""
    model = make("vjepa2", **{**LONG, "num_pooler_layers": 1})
    x = torch.randn(1, 64, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    x[:, 32:] = x[:, 32:33]
    given = {**arguments(method), **more}
    given |= {"at": (0,)} if "at" in given else {}
    laconic.reduce_(model, method, example=x[:, 28:36], **given)
    with Largest() as largest:
        answer(model, x)
    stage = laconic.provenance(model).final
    assert stage.grid == (32, 16, 16)
    assert (stage.size > 0).sum() < 8192
    assert largest.most < 8192**2 / 16


# ------------------------------------------------------------------------------------------------ costs, files, the doctor
@pytest.mark.parametrize("method", [None, "topk", "tome"])
@every_model
def test_closed_forms_are_what_torch_counts(method, name):
    model = make(name) if method is None else reduced(name, method)
    found = summary(model)
    assert found.macs == counted(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert method is None or found.macs < found.baseline_macs


@pytest.mark.parametrize("method", ["dtps", "tome"])
@every_model
def test_saved_copied_and_pickled(method, name, tmp_path):
    model, x = reduced(name, method), clips()
    base, expected = answer(make(name), x), answer(model, x)
    laconic.save(model, tmp_path)
    loaded = laconic.load(tmp_path)
    assert type(loaded) is type(model)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(other, x), expected)
        assert laconic.provenance(other).grid == GRID
        assert torch.equal(answer(laconic.restore_(other), x), base)
    assert torch.equal(answer(model, x), expected)


@pytest.mark.parametrize(("name", "positions"), [("videomae", "absolute"), ("vjepa2", "rotary")])
def test_the_doctor_knows_clips(name, positions):
    found = laconic.doctor(make(name), ["dynamicvit", "etps", "tome", "spatial-pool"])
    assert found.supported
    assert (found.prefix, found.grid, found.positions, found.heads) == (0, GRID, positions, 3)
    assert found.facts()["patches"] == "4 x 4 x 4 = 64"
    assert {trial.method for trial in found.trials if trial.works} == {"dynamicvit", "etps", "tome"}
    assert next(trial.reason for trial in found.trials if not trial.works).startswith("spatial-pool pools")
    json.dumps(found.to_json())


# ------------------------------------------------------------------------------------------------ training, hooks, graphs
@pytest.mark.parametrize("method", ["tome", "dtps", "spvit"])
@on_classifiers
def test_gradients_reach_every_parameter(method, name):
    model, x = reduced(name, method).train(), clips()
    (model(x).logits.square().mean() + sum(laconic.losses(model).values())).backward()
    for key, p in model.named_parameters():
        if ".layer." in key or "laconic." in key or "pooler" in key:
            if "predictor" in key and "laconic" not in key:
                continue
            assert p.grad is not None, key
            assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("method", ["tome", "dtps"])
@on_classifiers
def test_gradient_checkpointing_changes_nothing(method, name):
    gradients = []
    for checkpointing in (False, True):
        model = reduced(name, method, at=(1,)).train()
        if checkpointing:
            enable_checkpointing(model, False)
        torch.manual_seed(3)
        (model(clips()).logits.square().mean() + sum(laconic.losses(model).values())).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-5, atol=1e-6)


@every_model
def test_hidden_states_shrink_and_hooks_see_them(name):
    model, x = reduced(name, "topk", schedule=schedule()), clips()
    expected, seen = answer(model, x), []
    blocks(model)[2].register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    more = {"skip_predictor": True} if name == "vjepa2-model" else {}
    with torch.no_grad():
        states = model(x, output_hidden_states=True, **more).hidden_states
    assert [state.shape[1] for state in states] == [64, 64, 40, 25, 15]
    assert torch.equal(seen[0], states[3])
    assert torch.equal(answer(model, x), expected)


@on_classifiers
def test_half_precision(name):
    model, x = reduced(name, "tome"), clips()
    half = answer(model.to(torch.bfloat16), x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = answer(reduced(name, "tome"), x)
    assert mixed.isfinite().all()


@pytest.mark.unchecked
@pytest.mark.parametrize("method", ["tome", pytest.param("topk", marks=pytest.mark.slow)])
@on_classifiers
def test_one_graph(method, name):
    torch._dynamo.reset()
    model, x = reduced(name, method), clips()
    expected = answer(model, x)
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_soft_training_agree_with_removal(monkeypatch):
    from laconic.methods import dynamicvit
    from laconic.methods.ops import topk_split

    for name in CLASSIFIERS:
        model, x = reduced(name, "dtps"), clips()
        expected = answer(model, x)
        counts, dead = iter([s.size.shape[1] for s in laconic.provenance(model).stages]), [torch.zeros(3, PATCHES) > 0]

        def decide(log_probs, counts=counts, dead=dead):
            kept = topk_split(log_probs[..., 0].masked_fill(dead[0], -99.0), next(counts))[0]
            keep = torch.zeros_like(log_probs[..., 0]).scatter(1, kept, 1.0)
            dead[0] = keep == 0
            return keep

        monkeypatch.setattr(dynamicvit, "gumbel_keep", decide)
        find_host(model)[0].laconic.train()
        torch.testing.assert_close(answer(model, x), expected, rtol=1e-3, atol=1e-3)


def test_methods_before_the_first_block_are_served():
    assert BEFORE - set(REFUSED) <= set(SERVED)
