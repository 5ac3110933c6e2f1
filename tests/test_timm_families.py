"""timm beyond VisionTransformer and Eva: relative positions (BEiT), patches of any image (NaFlexVit), and what is refused."""

import importlib

import pytest
import timm
import torch
from timm.layers import DiffAttention
from timm.models.naflexvit import batch_patchify
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelThingsBlock

import host_laws
import laconic
from families import AT, SMALL, fill, make
from host_laws import WIDE, reduced, run
from laconic.core.attention import AttentionView
from laconic.core.backbone import REFUSED, find_host
from zoo import NAFLEX, ZOO

RELATIVE = ["relpos", "relpos-shared", "relpos-cls", "beitv2"]


# ------------------------------------------------------------------------------------------------ relative positions
@pytest.mark.parametrize("kind", RELATIVE)
@pytest.mark.parametrize("method", ["topk", "ats"])
def test_relative_positions_do_not_mix_images(kind, method):
    host_laws.does_not_mix_images(ZOO[kind], method)


@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_positions_stay_right(kind):
    host_laws.answers_as_if_what_left_were_hidden(ZOO[kind])


@pytest.mark.parametrize("kind", RELATIVE)
@pytest.mark.parametrize("method", ["etps", "dtps"])
def test_with_relative_positions_all_can_be_undone(kind, method):
    host_laws.keeps_its_answer_where_nothing_is_reduced(ZOO[kind], method)
    host_laws.can_be_undone(ZOO[kind], method)


@pytest.mark.parametrize("kind", ["beit", "beit-shared"])
def test_a_token_keeps_the_bias_of_its_own_place(kind, monkeypatch):
    """What its attention adds for a pair of tokens is what it added for the patches in whose places they stand."""
    model, seen, own = ZOO[kind].make(), [], laconic.core.attention.narrowed
    laconic.reduce_(model, "topk", schedule=laconic.Schedule.keep_counts({1: 20}))
    monkeypatch.setattr(laconic.core.attention, "narrowed", lambda mask, rows: seen.append((mask, rows)) or own(mask, rows))
    run(ZOO[kind], model, ZOO[kind].images())
    assert len(seen) == 2  # blocks 2 and 3
    kept = laconic.provenance(model).final.kept
    for mask, rows in seen:
        assert torch.equal(rows, torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1))
        for few, of_image, whole in zip(own(mask, rows), rows, mask.expand(3, -1, -1, -1), strict=True):
            assert torch.equal(few, whole[:, of_image][:, :, of_image])


@pytest.mark.parametrize("kind", ["beit", "relpos-cls"])
def test_its_head_counts_patches(kind):
    """Its mean over merged tokens equals that over all patches."""
    model = reduced(ZOO[kind], "tome")
    with torch.no_grad():
        few = model.forward_features(ZOO[kind].images())
        whole = torch.cat([few[:, :1], laconic.restore_dense(model, few)], 1)
        logits = model.forward_head(few)
        laconic.restore_(model)
        expected, plain = model.forward_head(whole), model.forward_head(few)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("alive", [None, torch.tensor([[1.0, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]])])
def test_the_mean_query_meets_the_mean_bias(alive):
    """The attention of the mean query: logits are linear in the query, and so is what is added to them."""
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    mask = torch.randn(1, 2, 7, 7)
    if alive is not None:  # nobody sees what has left, but what has left sees itself
        hidden = torch.nn.functional.pad(alive, (1, 0), value=1.0)[:, None, None].log().expand(-1, 1, 7, -1)
        mask = mask + torch.where(torch.eye(7, dtype=torch.bool), 0.0, hidden.clamp_min(-60))
    seen = AttentionView(q, k, v, mask, 0.5, 1, True, alive)
    count = torch.ones(2, 6) if alive is None else alive
    logits = (q @ k.transpose(2, 3) * 0.5 + mask)[:, :, 1:]
    mean = (logits * count[:, None, :, None]).sum(2) / count.sum(1)[:, None, None]
    torch.testing.assert_close(seen.mean_query, mean.softmax(2).mean(1)[:, 1:])


@pytest.mark.parametrize("kind", ["beit", "beit-shared", "relpos", "relpos-shared", "naflex", "naflex-map", "naflex-rope"])
def test_work_is_counted(kind):
    host_laws.is_counted(ZOO[kind])


# ------------------------------------------------------------------------------------------------ NaFlexVit
def as_patches(images, size=16, padding=0):
    """What NaFlex loaders give for these images: patches, their coordinates, and which are no padding."""
    patches, (height, width) = batch_patchify(images, (size, size))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    coordinates = torch.stack([rows, columns], 2).flatten(0, 1).expand(len(images), -1, -1)
    valid = torch.ones(coordinates.shape[:2], dtype=torch.bool)
    return {
        "patches": torch.nn.functional.pad(patches, (0, 0, 0, padding)),
        "patch_coord": torch.nn.functional.pad(coordinates, (0, 0, 0, padding)),
        "patch_valid": torch.nn.functional.pad(valid, (0, padding)),
    }


@pytest.mark.parametrize("rope", ["none", "axial", "mixed"])
@pytest.mark.parametrize("method", ["etps", "tome", "ats"])
def test_patches_are_as_good_as_the_image(rope, method):
    model = timm.create_model("naflexvit_base_patch16_gap", **{**SMALL, "rope_type": rope, **NAFLEX})
    options = {"score": "mean-query"} if method != "tome" else {}
    laconic.reduce_(fill(model.eval()), method, keep=None if method == "ats" else 0.6, at=AT, **options)
    x = ZOO["naflex"].images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model(as_patches(x)), expected, rtol=1e-4, atol=1e-4)
        assert laconic.provenance(model).final.size.shape[1] < 36
        features = model.forward_features(**as_patches(x))
        torch.testing.assert_close(model.forward_head(**features), expected, rtol=1e-4, atol=1e-4)


def test_images_of_any_shape():
    model = reduced(ZOO["naflex"], "tome")
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 160)).shape == (2, 10)
    assert laconic.provenance(model).final.where.shape == (2, 40)


def test_padding_is_refused_with_what_to_do():
    model, x = reduced(ZOO["naflex"], "topk"), ZOO["naflex"].images()
    with pytest.raises(ValueError, match="this batch has padding .* batch images with the same number of patches"):
        model(as_patches(x, padding=3))
    with pytest.raises(ValueError, match="takes no attn_mask"):
        model({**as_patches(x), "attn_mask": torch.zeros(3, 1, 40, 40)})
    laconic.restore_(model)
    with torch.no_grad():
        torch.testing.assert_close(model(as_patches(x, padding=3)), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["naflex", "naflex-map", "naflex-rope"])
def test_naflex_positions_stay_right(kind):
    host_laws.answers_as_if_what_left_were_hidden(ZOO[kind])


def test_naflex_pools_count_patches():
    model = reduced(ZOO["naflex-map"], "tome")
    with torch.no_grad():
        few = model.forward_features(ZOO["naflex-map"].images())
        whole, logits = laconic.restore_dense(model, few), model.forward_head(few)
        laconic.restore_(model)
        expected, plain = model.forward_head(whole), model.forward_head(few)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [dict(patch_drop_rate=0.5)])
def test_naflex_patch_dropout_is_refused(changes):
    model = timm.create_model("naflexvit_base_patch16_gap", **{**SMALL, **NAFLEX, **changes})
    with pytest.raises(ValueError, match="create it with patch_drop_rate=0"):
        laconic.reduce_(model, "tome", keep=0.7)


# ------------------------------------------------------------------------------------------------ compile and export
@pytest.mark.unchecked
@pytest.mark.parametrize(("kind", "method"), [("beit", "etps"), ("naflex", "dtps")])
def test_one_graph(kind, method):
    host_laws.compiles(ZOO[kind], method)


@pytest.mark.unchecked
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["beit-shared", "naflex"])
def test_export(kind):
    host_laws.exports(ZOO[kind], "tome")


# ------------------------------------------------------------------------------------------------ what is refused, and why
WHY = {
    "swin_tiny_patch4_window7_224": "windows of its grid",
    "maxvit_tiny_rw_224": "windows of its grid",
    "samvit_base_patch16": "windows of its grid",
    "hiera_tiny_224": "pools or shifts its tokens",
    "xcit_nano_12_p16_224": "between channels",
    "cait_xxs24_224": "its class token joins late",
    "pvt_v2_b0": "pools or shifts its tokens",
    "convit_tiny": "not one scaled_dot_product_attention over all tokens",
}


@pytest.mark.parametrize("name", WHY)
def test_models_are_refused_with_the_reason(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=f"cannot be reduced: .*{WHY[name]}"):
        find_host(model)


def test_refusals_are_of_classes_that_there_are():
    for path in [path for path in REFUSED if path.split(".")[0] in ("timm", "torchvision", "open_clip")]:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__module__ == module


@pytest.mark.parametrize("block", [DiffParallelScalingBlock, ParallelThingsBlock])
def test_blocks_of_several_attentions_are_refused(block):
    with pytest.raises(TypeError, match=f"block 0 of VisionTransformer: .*{block.__name__} cannot be reduced: .*several"):
        laconic.reduce_(make("plain", block_fn=block), "topk", keep=0.7)


def test_differential_attention_is_refused():
    with pytest.raises(TypeError, match=r"DiffAttention cannot be reduced: .*several attention calls"):
        laconic.reduce_(make("plain", attn_layer=DiffAttention), "topk", keep=0.7)


def test_several_attention_calls_of_an_unknown_kind_are_refused():
    model = make("plain")
    own = type(model.blocks[2].attn).forward
    model.blocks[2].attn.forward = lambda x, **kw: (own(model.blocks[2].attn, x, **kw) + own(model.blocks[2].attn, x, **kw)) / 2
    with pytest.raises(ValueError, match=r"block 2 .*makes 2 attention calls; .* exactly one"):
        laconic.reduce_(model, "topk", keep=0.7)


@pytest.mark.parametrize("family", ["plain", "beit", "naflex", "dinov3"])
def test_attention_that_is_not_fused_is_refused_with_what_to_do(family):
    model = make(family)
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(ValueError, match=r"its attention is not fused. Switch it on \(timm.layers.set_fused_attn\(True\)"):
        laconic.reduce_(model, "dtps", keep=0.7)


# ------------------------------------------------------------------------------------------------ all kinds
def test_the_zoo_is_wide():
    assert len(ZOO) >= 25
    assert {kind.where for kind in ZOO.values()} >= {"timm", "torchvision", "open_clip"}


@pytest.mark.parametrize("kind", [k for k in ZOO if k not in ("beit", "beit-shared", "torchvision", "open-clip")])
def test_every_kind_can_be_reduced(kind):
    method = "dtps" if kind == "parallel" else "etps"
    host_laws.lets_tokens_leave(ZOO[kind], method)
    host_laws.keeps_its_answer_where_nothing_is_reduced(ZOO[kind], method)


@pytest.mark.slow
@pytest.mark.parametrize("method", WIDE)
@pytest.mark.parametrize("kind", ZOO)
def test_every_kind_with_many_methods(kind, method):
    if kind == "parallel" and method not in ("dtps",):
        pytest.skip("attention and MLP side by side: nothing between them")
    host_laws.does_not_mix_images(ZOO[kind], method)
    host_laws.can_be_undone(ZOO[kind], method)
