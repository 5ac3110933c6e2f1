"""forward_intermediates of a reduced host: features of single blocks, on all patches again."""

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet

import laconic
from families import AT, EVERY, SMALL, fill, images, make, options

FAMILIES = ["plain", "dinov2-reg", "siglip", "dinov3", "rope-mixed", "beit-shared", "naflex"]
CALLS = {
    "all": {},
    "last two, normed": dict(indices=2, norm=True),
    "some, with prefix": dict(indices=[-1, 0], return_prefix_tokens=True),
    "tokens": dict(indices=[3, 1], output_fmt="NLC"),
    "early": dict(indices=[1], stop_early=True, intermediates_only=True),
}
families = pytest.mark.parametrize("family", FAMILIES)
calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


def intermediates(model, x, **call):
    with torch.no_grad():
        out = model.forward_intermediates(x, **call)
    return out if call.get("intermediates_only") else out[1]


def parts(found):
    """Features and prefix tokens, in one row."""
    return [part for one in found for part in (one if isinstance(one, tuple) else (one,))]


@families
@calls
def test_with_nothing_reduced_they_are_the_hosts_own(family, call):
    model, x = make(family), images(family)
    expected = intermediates(model, x, **call)
    laconic.reduce_(model, "etps", keep=1.0, at=AT, **options("etps", family))
    found = intermediates(model, x, **call)
    assert [type(one) for one in found] == [type(one) for one in expected]
    assert all(map(torch.equal, parts(found), parts(expected)))


@families
@calls
@pytest.mark.parametrize("method", ["topk", "etps"] if EVERY else ["etps"])
def test_every_patch_has_the_features_of_its_token(family, call, method):
    model, x = make(family), images(family)
    shapes = [part.shape for part in parts(intermediates(model, x, **call))]
    laconic.reduce_(model, method, keep=0.6, at=AT, **options(method, family))
    outputs = []
    handles = [block.register_forward_hook(lambda *given: outputs.append(given[2])) for block in model.blocks]
    found = intermediates(model, x, **call)
    for handle in handles:
        handle.remove()
    assert [part.shape for part in parts(found)] == shapes
    taken = call.get("indices", 4)
    taken = sorted(i % 4 for i in taken) if isinstance(taken, list) else range(4 - taken, 4)
    for block, one in zip(taken, found, strict=True):
        one, prefix = one if isinstance(one, tuple) else (one, None)
        tokens = laconic.core.token_reduction.reduction_of(model).entry(block + 1)
        features = model.norm(outputs[block]) if call.get("norm") else outputs[block]
        if prefix is not None:
            assert torch.equal(prefix, features[:, : tokens.prefix])
        dense = one if one.dim() == 3 else one.flatten(2).transpose(1, 2)
        for image in range(3):
            for patch, where in enumerate(tokens.token_of_patch[image].tolist()):
                expected = features[image, tokens.prefix + where] if where >= 0 else torch.zeros(48)
                assert torch.equal(dense[image, patch], expected)


@pytest.mark.parametrize("family", ["plain", "dinov3"])
def test_images_of_another_size(family):
    model = make(family, dynamic_img_size=True)
    x = torch.randn(2, 3, 64, 144)
    shapes = [f.shape for f in intermediates(model, x)]
    laconic.reduce_(model, "etps", keep=0.6, at=AT)
    assert [f.shape for f in intermediates(model, x)] == shapes == [(2, 48, 4, 9)] * 4


def test_where_every_patch_gets_its_token_back_anyway():
    """Evo-ViT's parked patches are in their places again after its last stage."""
    model, x = make("plain"), images("plain")
    laconic.reduce_(model, "evovit", keep=0.5, at=AT)
    assert [f.shape for f in intermediates(model, x)] == [(3, 48, 6, 6)] * 4


def test_after_the_last_block_they_may_be_whole_already():
    short, x = laconic.reduce_(make("plain"), "etps", keep=0.5, at=AT), images("plain")
    expected = intermediates(short, x)
    whole = laconic.reduce_(make("plain"), "etps", keep=0.5, at=AT, restore=True)
    assert all(map(torch.equal, intermediates(whole, x), expected))


def test_a_dict_of_results():
    model, x = laconic.reduce_(make("plain"), "topk", keep=0.5, at=AT), images("plain")
    with torch.no_grad():
        out = model.forward_intermediates(x, output_dict=True, return_prefix_tokens=True)
        assert torch.equal(out["image_features"], model.forward_features(x))
    assert [f.shape for f in out["image_intermediates"]] == [(3, 48, 6, 6)] * 4
    assert [f.shape for f in out["image_intermediates_prefix"]] == [(3, 1, 48)] * 4


def test_positions_by_their_usual_arguments():
    model, x = laconic.reduce_(make("plain"), "topk", keep=0.5, at=AT), images("plain")
    by_place = intermediates(model, x)
    with torch.no_grad():
        _, found = model.forward_intermediates(x, None, True, False, False, "NLC")
        (last,) = model.get_intermediate_layers(x, 1, reshape=True)
    assert all(torch.equal(a.flatten(2).transpose(1, 2), b) for a, (b, _) in zip(by_place, found, strict=True))
    assert torch.equal(last, by_place[-1])


@pytest.mark.unchecked
def test_faults_are_the_hosts_own():
    model = laconic.reduce_(make("plain"), "topk", keep=0.5, at=AT)
    with pytest.raises(AssertionError, match="Output format must be one of"):
        model.forward_intermediates(images("plain"), output_fmt="NHWC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(images("plain"), indices=[7])


def test_blocks_are_cut_off_before_not_after():
    model = laconic.reduce_(make("plain"), "topk", keep=0.5, at=AT)
    with pytest.raises(ValueError, match=r"laconic.restore_\(model\) first"):
        model.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="restore_"):
        FeatureGetterNet(model, out_indices=(1, 2))
    laconic.restore_(model)
    model.prune_intermediate_layers([1])
    laconic.reduce_(model, "topk", keep=0.5, at=(1,))
    assert [f.shape for f in intermediates(model, images("plain"))] == [(3, 48, 6, 6)] * 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_feature_extractors_of_timm(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 2), img_size=96, **{**SMALL, "num_classes": 0})
    model, x = fill(model.eval()), images("plain")
    with torch.no_grad():
        base = model(x)
        laconic.reduce_(model, "etps", keep=0.6, at=(1, 2))
        found = model(x)
        assert [f.shape for f in found] == [f.shape for f in base] == [(3, 48, 6, 6)] * 2
        assert not torch.equal(found[0], base[0])
        assert len(laconic.provenance(model).final.size[0]) == 14
        laconic.restore_(model)
        assert all(map(torch.equal, model(x), base))
