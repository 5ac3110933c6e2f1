"""Methods before the first block on every kind of model of every library."""

import pytest
import torch

import host_laws
import laconic
import test_transformers
from families import BEFORE
from laconic.core.backbone import find_host
from laconic.core.patch_layer import find_patch_layer
from laconic.core.token_reduction import reduction_of
from zoo import ZOO

# of several stages, or with a patch embedding of several layers
REFUSED = {
    name
    for name in ZOO
    if name.startswith(("pvt", "cvt", "lvvit", "psvit", "lv-vit", "ps-vit")) or "stem" in name or name == "hybrid"
}
HOSTS = sorted(set(ZOO) - REFUSED)
every_host = pytest.mark.parametrize("name", HOSTS)


def halved(kind):
    """Images whose lower half repeats the upper one."""
    x = kind.images()
    x[:, :, kind.size // 2 :] = x[:, :, : kind.size // 2]
    return x


@every_host
@pytest.mark.parametrize("method", sorted(BEFORE - {"dedup"}))
def test_constant_counts(name, method):
    kind = ZOO[name]
    host_laws.keeps_its_answer_where_nothing_is_reduced(kind, method)
    host_laws.lets_tokens_leave(kind, method)
    host_laws.does_not_mix_images(kind, method)


@every_host
def test_equal_patches(name):
    kind = ZOO[name]
    model, x = kind.make(), halved(kind)
    other = kind.images()
    expected = host_laws.run(kind, model, other)
    laconic.reduce_(model, "dedup")
    assert torch.equal(host_laws.run(kind, model, other), expected)  # no two patches are equal
    out = host_laws.run(kind, model, x)
    stage = laconic.provenance(model).final
    assert stage.size.shape[1] == stage.where.shape[1] // 2 == 18
    assert torch.equal(stage.where[:, :18], stage.where[:, 18:])
    singles = torch.cat([host_laws.run(kind, model, one[None]) for one in x])
    torch.testing.assert_close(out, singles, rtol=1e-4, atol=1e-4)


@every_host
def test_restore(name):
    host_laws.can_be_undone(ZOO[name], sorted(BEFORE)[len(name) % 3])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_without_a_layer_for_patches_are_refused(name):
    model = ZOO[name].make()
    with pytest.raises(LookupError, match="patch embedding"):
        find_patch_layer(*find_host(model))
    with pytest.raises(LookupError, match="use a method that works in blocks"):
        laconic.reduce_(model, "pre-merge", keep=0.5)
    assert not laconic.is_reduced(model)


@pytest.mark.parametrize("name", ["open-clip", "torchvision"])
def test_the_layer_is_replaced_only_while_reduced(name):
    model = ZOO[name].make()
    layer = find_patch_layer(*find_host(model)).layer
    kind = type(layer)
    laconic.reduce_(model, "pre-merge", keep=0.5)
    assert type(layer) is not kind
    assert isinstance(layer, kind)
    assert reduction_of(model).embeds
    laconic.restore_(model)
    assert type(layer) is kind


@pytest.mark.parametrize("family", list(test_transformers.FAMILIES))
@pytest.mark.parametrize("method", sorted(BEFORE))
def test_transformers_models(family, method):
    model, x = test_transformers.make(family), test_transformers.images()
    x[:, :, 48:] = x[:, :, :48]
    expected = test_transformers.answer(model, x)
    laconic.reduce_(model, method, keep=1.0)
    assert torch.equal(test_transformers.answer(model, x), expected)
    laconic.restore_(model)
    laconic.reduce_(model, method, **({} if method == "dedup" else {"keep": 0.5}))
    out = test_transformers.answer(model, x)
    assert laconic.provenance(reduction_of(model).model).final.size.shape[1] == 18
    singles = torch.cat([test_transformers.answer(model, one[None]) for one in x])
    torch.testing.assert_close(out, singles, rtol=1e-4, atol=1e-4)
    laconic.restore_(model)
    assert torch.equal(test_transformers.answer(model, x), expected)
