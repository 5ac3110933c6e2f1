"""open_clip's VisionTransformer: by itself, and as the image tower of a CLIP that answers zero-shot."""

import open_clip
import pytest
import torch
from open_clip.transformer import VisionTransformer

import host_laws
import laconic
from families import AT, fill
from host_laws import WIDE, reduced, run
from laconic.core.history import History, mark
from laconic.core.token_reduction import reduction_of
from laconic.core.tokens import Tokens
from zoo import TEXT, TOWER, ZOO, whole_clip

KIND = ZOO["open-clip"]
TOWERS = ["open-clip", "open-clip-gap", "open-clip-custom", "open-clip-pool", "open-clip-two-pools", "open-clip-zero-shot"]
every = pytest.mark.parametrize("method", WIDE)
kinds = pytest.mark.parametrize("kind", TOWERS)


@kinds
@pytest.mark.parametrize("method", ["tome", "bat"])
def test_keep_1_is_the_identity(kind, method):
    host_laws.keeps_its_answer_where_nothing_is_reduced(ZOO[kind], method)


@every
def test_tokens_leave(method):
    host_laws.lets_tokens_leave(KIND, method)


@kinds
def test_tokens_leave_every_tower(kind):
    host_laws.lets_tokens_leave(ZOO[kind], "etps")


@every
def test_a_batch_equals_its_images_one_by_one(method):
    host_laws.does_not_mix_images(KIND, method)


@every
def test_restore_gives_the_original_back(method):
    host_laws.can_be_undone(KIND, method)


@kinds
def test_restore_gives_every_tower_back(kind):
    host_laws.can_be_undone(ZOO[kind], "tome")


@kinds
def test_removed_equals_hidden(kind):
    host_laws.answers_as_if_what_left_were_hidden(ZOO[kind])


@pytest.mark.parametrize("kind", ["open-clip", "open-clip-pool", "open-clip-zero-shot"])
def test_gradients_reach_every_parameter(kind):
    host_laws.trains(ZOO[kind], "bat")


@pytest.mark.parametrize("kind", TOWERS[:-1])
def test_its_work_is_counted(kind):
    host_laws.is_counted(ZOO[kind])


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", ["open-clip-pool", pytest.param("open-clip-zero-shot", marks=pytest.mark.slow)])
def test_one_graph(kind):
    host_laws.compiles(ZOO[kind], "tome")


@pytest.mark.unchecked
@pytest.mark.slow
def test_export():
    host_laws.exports(KIND, "etps")


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = reduced(KIND, "bat").train()
        model.set_grad_checkpointing(checkpointing)
        model(KIND.images()).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, g in gradients[0].items():
        torch.testing.assert_close(g, gradients[1][name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ pooling
def merged_at_the_end(model):
    """What its pooling gets if half of the patches have become one token, and the same with a token for every patch."""
    reduction, patches = reduction_of(model), torch.arange(36).expand(2, -1)
    tokens = Tokens.start(torch.randn(2, 37, 48), 1, True)
    lead = torch.cat([patches[:, :1], patches[:, 18:]], 1)
    weight = (patches % 18 == 0).float().masked_fill(patches >= 18, 1.0)  # the first speaks for all of its half
    merged = tokens.merge((patches - 17).clamp_min(0), weight, lead)
    mark(merged.x, History(reduction, merged, reduction.depth - 1, (), 0))
    return merged.x, torch.cat([merged.x[:, :1], merged.dense(merged.patches)], 1)


@pytest.mark.parametrize(
    "changes",
    [
        dict(pool_type="avg"),
        dict(pool_type="avg", final_ln_after_pool=True),
        dict(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
        dict(attentional_pool="parallel", attn_pooler_queries=4, attn_pooler_heads=2),
        dict(attentional_pool="cascade", attn_pooler_queries=4, attn_pooler_heads=2),
    ],
    ids=["mean", "mean-then-norm", "attention", "parallel", "cascade"],
)
def test_a_merged_token_counts_as_often_as_it_has_patches(changes):
    """Pooling merged tokens equals pooling all patches with the features of their token."""
    model = fill(VisionTransformer(**{**TOWER, **changes}).eval())
    laconic.reduce_(model, "tome", keep=0.6, at=AT)
    few, whole = merged_at_the_end(model)
    with torch.no_grad():
        pooled, tokens = model._pool(few)
        laconic.restore_(model)
        expected, _ = model._pool(whole)
        plain, _ = model._pool(few)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3  # they would have counted once each
    assert model.attn_pool is not None or tokens.shape[1] == 19


def test_all_tokens_go_out_as_they_are():
    model = fill(VisionTransformer(**TOWER, pool_type="avg", output_tokens=True).eval())
    laconic.reduce_(model, "tome", keep=0.6, at=AT)
    with torch.no_grad():
        pooled, tokens = model(KIND.images())
    stage = laconic.provenance(model).final
    assert tokens.shape == (3, stage.size.shape[1], 48)
    weighed = (tokens * stage.size.unsqueeze(2)).sum(1) / stage.size.sum(1, keepdim=True)
    torch.testing.assert_close(pooled, weighed @ model.proj, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ CLIP
def test_zero_shot_classification_through_a_reduced_tower():
    model, kind = ZOO["open-clip-zero-shot"].make(), ZOO["open-clip-zero-shot"]
    x, texts = kind.images(), torch.arange(1, 41).view(5, 8)
    with torch.no_grad():
        text, full = model.encode_text(texts), model.encode_image(x)
        by_tower = laconic.reduce_(model, "etps", keep=0.6, at=AT).encode_image(x)
        assert torch.equal(model.encode_text(texts), text)
        image, meaning, scale = model(x, texts)
    assert (by_tower - full).abs().max() > 1e-3
    assert image.shape == (3, 24)
    assert meaning.shape == (5, 24)
    torch.testing.assert_close(image, torch.nn.functional.normalize(by_tower, dim=-1))
    assert laconic.provenance(model).final.size.shape[1] == 9
    # the same by the tower alone
    laconic.restore_(model)
    laconic.reduce_(model.visual, "etps", keep=0.6, at=AT)
    with torch.no_grad():
        assert torch.equal(model.encode_image(x), by_tower)
    assert not [name for name, _ in model.transformer.named_modules() if "laconic" in name]


def test_a_tower_of_timm_is_timms_own_model():
    vision = dict(image_size=224, timm_model_name="vit_tiny_patch16_224", timm_pool="", timm_proj="linear")
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT).eval()
    laconic.reduce_(model, "etps", keep=0.5)
    assert reduction_of(model).host_path == "timm.models.vision_transformer.VisionTransformer"
    with torch.no_grad():
        assert model.encode_image(torch.randn(2, 3, 224, 224)).shape == (2, 24)
    assert laconic.provenance(model).final.size.shape == (2, 25)


def test_coca_reads_the_tokens_of_a_reduced_tower():
    vision = dict(image_size=96, patch_size=16, width=48, layers=4, head_width=16, attentional_pool=True, attn_pooler_heads=2)
    decoder = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1, attn_pooler_heads=2)
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    cfg = dict(vision_cfg={**vision, "output_tokens": True, "attn_pooler_queries": 4}, text_cfg=text, multimodal_cfg=decoder)
    model = fill(open_clip.coca_model.CoCa(embed_dim=32, **cfg).eval())
    laconic.reduce_(model, "tome", keep=0.6, at=AT)
    with torch.no_grad():
        out = model(KIND.images(), torch.arange(1, 25).view(3, 8))
    assert all(t.isfinite().all() for t in out.values())
    assert laconic.provenance(model).final.size.shape[1] == 7


@pytest.mark.parametrize("indices", [None, 2, [0, 3]])
def test_intermediates_are_on_all_patches(indices):
    model, x = whole_clip().eval(), KIND.images()
    options = dict(image_indices=indices, image_output_fmt="NCHW", intermediates_only=True)
    with torch.no_grad():
        base = model.forward_intermediates(x, **options)["image_intermediates"]
        same = laconic.reduce_(model, "topk", keep=1.0).forward_intermediates(x, **options)["image_intermediates"]
        laconic.restore_(model)
        few = laconic.reduce_(model, "topk", keep=0.5).forward_intermediates(x, **options)["image_intermediates"]
    assert all(map(torch.equal, same, base))
    assert [f.shape for f in few] == [f.shape for f in base]
    assert (few[-1] == 0).all(1).sum(dim=(1, 2)).tolist() == [36 - 5] * 3


# ------------------------------------------------------------------------------------------------ refusals
def test_patch_dropout_is_refused():
    model = VisionTransformer(**TOWER, patch_dropout=0.5)
    with pytest.raises(ValueError, match="create it with patch_dropout=0"):
        laconic.reduce_(model, "topk", keep=0.7)
    model.patch_dropout.prob = 0.0
    laconic.reduce_(model, "topk", keep=0.7)


def test_sequence_first_attention_is_refused():
    model = VisionTransformer(**TOWER)
    model.transformer.resblocks[2].attn.batch_first = False
    with pytest.raises(ValueError, match="batch_first=False"):
        laconic.reduce_(model, "topk", keep=0.7)


def test_a_resnet_tower_is_refused_with_the_reason():
    vision = dict(image_size=64, layers=(1, 1, 1, 1), width=8)
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)
    with pytest.raises(TypeError, match="ModifiedResNet cannot be reduced: .* no tokens can be removed"):
        laconic.reduce_(model, "topk", keep=0.7)


def test_run_is_by_the_kind():
    kind = ZOO["open-clip-zero-shot"]
    assert run(kind, kind.make(), kind.images()).shape == (3, 5)
