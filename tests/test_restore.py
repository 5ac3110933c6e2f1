"""Every patch has a token again after the last block, where that is asked for."""

import pytest
import torch

import laconic
from families import AT, METHODS, images, make, options, reduced
from families import fill as fill_parameters
from laconic.core.dense import FILLS
from laconic.core.tokens import Tokens


@pytest.mark.parametrize("method", ["etps", "bat", "topk", "diffrate"])
@pytest.mark.parametrize("family", ["plain", "siglip", "gap", "dinov3", "pe"])
def test_pooled_answers_are_those_of_the_tokens_left(method, family):
    """By class token, mean and attention pooling; dropped patches count nothing."""
    x = images(family)
    short = reduced(method, family)
    whole = laconic.reduce_(make(family), method, keep=0.6, at=AT, restore=True, **options(method, family))
    whole.load_state_dict(short.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(whole(x), short(x), rtol=1e-4, atol=1e-5)
        features = whole.forward_features(x)
    tokens = whole.laconic.entry(whole.laconic.depth)
    assert features.shape[1] == tokens.prefix + tokens.token_of_patch.shape[1] > tokens.prefix + len(tokens)


def test_a_patch_has_the_features_of_the_token_it_went_to():
    x, model = images("plain"), laconic.reduce_(make("plain"), "tome", keep=0.6, at=AT, restore=True)
    other = laconic.reduce_(make("plain"), "tome", keep=0.6, at=AT)
    with torch.no_grad():
        dense = laconic.restore_dense(other, other.forward_features(x))
        torch.testing.assert_close(model.forward_features(x)[:, 1:], dense)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_are_said_to_hold_every_patch_do(method):
    x, model = images("plain"), reduced(method, "plain")
    with torch.no_grad():
        model(x)
    for block in range(model.laconic.depth + 1):
        tokens = model.laconic.entry(block)
        assert not tokens.complete or bool((tokens.token_of_patch >= 0).all())


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("method", ["tome", "pitome", "two-stage", "etps", "evit"])
def test_where_no_patch_is_dropped_no_similarity_is_computed(method, fill, monkeypatch):
    x, plain = images("plain"), laconic.reduce_(make("plain"), method, keep=0.6)
    expected = laconic.restore_dense(plain, plain.forward_features(x))
    filled = laconic.reduce_(make("plain"), method, keep=0.6, restore=fill)
    monkeypatch.setattr(Tokens, "_most_similar", None)
    torch.testing.assert_close(filled.forward_features(x)[:, 1:], expected)


def test_it_is_saved_with_the_model(tmp_path):
    model = laconic.reduce_(make("plain"), "etps", keep=0.6, at=AT, restore=True)
    laconic.save(model, tmp_path)
    again = laconic.load(tmp_path)
    x = images("plain")
    with torch.no_grad():
        assert torch.equal(again.forward_features(x), model.forward_features(x))
    assert again.laconic.restore


@pytest.mark.parametrize("fill", ["last", "similar"])
@pytest.mark.parametrize("method", ["ats", "iared", "avit"])
def test_patches_that_are_only_hidden_are_filled_as_those_that_left(method, fill):
    x, found = images("plain"), []
    for execution in ("packed", "masked"):
        model = laconic.reduce_(make("plain"), method, at=AT, restore=fill, execution=execution)
        fill_parameters(model.laconic)
        with torch.no_grad():
            found.append(model.forward_features(x))
        absent = laconic.provenance(model).final.where < 0
        filled = found[-1][:, 1:][absent]
        assert len(filled) > 0
        assert fill == "similar" or len(filled.unique(dim=0)) == len(filled)  # each its own
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
