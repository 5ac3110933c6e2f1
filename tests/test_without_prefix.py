"""Adaptive methods on models without prefix tokens: one token stays, and packages of nothing are seen nowhere."""

import pytest
import torch

import clips
import laconic
from families import AT, VARIABLE, fill, images, make, options
from laconic.core.adaptive import AdaptiveReducer, at_least_one
from laconic.core.grid import GridMap
from laconic.core.token_reduction import reduction_of
from laconic.core.tokens import Tokens

MODELS = ("gap", "siglip", *clips.CLASSIFIERS)
EXECUTIONS = ("packed", "padded", "masked")
every_model = pytest.mark.parametrize("name", MODELS)


def inputs(name):
    return clips.clips() if name in clips.CLIPS else images(name)


def run(model, x):
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def reduced(name, method, execution, seed=2, **more):
    model = clips.make(name) if name in clips.CLIPS else make(name)
    given = {"score": "mean-query"} if options(method, "gap") else {}
    laconic.reduce_(model, method, at=AT, execution=execution, **given, **more)
    torch.manual_seed(seed)
    fill(reduction_of(model))
    return model


def emptied(name, method, execution, monkeypatch):
    """A reduced model whose method would drop every token of the first and the third image at its first block."""
    model = reduced(name, method, execution)
    blocks = sorted(reduction_of(model).reducers, key=int)

    def some(tokens, keep):
        return keep * torch.tensor([0.0, 1.0, 0.0])[-len(keep) :].view(-1, 1) if len(keep) == 3 else keep * 0.0

    if method == "adavit":
        reducer = reduction_of(model).reducers[blocks[0]]
        monkeypatch.setattr(type(reducer), "decide", lambda self, logits, threshold: some(None, torch.ones_like(logits)))
    else:
        own = AdaptiveReducer.hide
        monkeypatch.setattr(
            AdaptiveReducer, "hide", staticmethod(lambda tokens, keep, into=None: own(tokens, some(tokens, keep), into))
        )
    return model


@every_model
@pytest.mark.parametrize("method", sorted(VARIABLE - {"avit", "dedup", "run-length", "spvit"}))
def test_one_token_stays_in_every_execution(name, method, monkeypatch):
    x, outputs = inputs(name), []
    for execution in EXECUTIONS:
        if method == "ltmp" and execution == "masked":
            continue  # another function by definition
        with monkeypatch.context() as patch:
            model = emptied(name, method, execution, patch)
            outputs.append(run(model, x))
            provenance = laconic.provenance(model)
            singles = run(model, x[:1])
        assert outputs[-1].isfinite().all()
        torch.testing.assert_close(singles, outputs[-1][:1], rtol=1e-4, atol=1e-4)
        if method != "adavit":
            first = provenance.stages[0]
            assert (first.size > 0).sum(1)[[0, 2]].tolist() == [1, 1]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


def test_the_first_visible_token_is_the_one():
    x = torch.randn(3, 4, 8)
    tokens = Tokens.start(x, 0, False)
    keep = torch.tensor([[0.0, 0, 0, 0], [0.0, 1, 0, 0], [0.0, 0, 0, 0]], requires_grad=True)
    mask = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 1, 1], [0.0, 0, 1, 1]])
    found = at_least_one(tokens.replace(keep_mask=mask), keep)
    assert found.tolist() == [[1.0, 0, 0, 0], [0.0, 1, 0, 0], [0.0, 0, 1, 0]]
    found.sum().backward()
    assert keep.grad[1].tolist() == [1.0] * 4
    assert torch.equal(at_least_one(Tokens.start(torch.cat([x[:, :1], x], 1), 1, True), keep), keep)
    hidden = AdaptiveReducer.hide(tokens, keep.detach())
    assert hidden.token_of_patch.tolist() == [[0, -1, -1, -1], [-1, 1, -1, -1], [0, -1, -1, -1]]
    assert hidden.size.tolist() == [[1.0, 0, 0, 0], [0.0, 1, 0, 0], [1.0, 0, 0, 0]]


# ------------------------------------------------------------------------------------------------ packages
@pytest.mark.parametrize("name", ["gap", "videomae", "vjepa2-model"])
@pytest.mark.parametrize("seed", [2, 5])
def test_packages_do_not_depend_on_the_batch_or_the_execution(name, seed):
    """A clip that drops nothing at a block has an empty package, in the place of a token that a later block drops."""
    x, outputs, empty = inputs(name), [], 0
    for execution in EXECUTIONS:
        model = reduced(name, "spvit", execution, restore=None if name == "videomae" else "zeros", seed=seed)

        def look(x, model=model):
            with torch.no_grad():
                return model.forward_features(x) if name == "gap" else clips.answer(model, x)

        outputs += [look(x), torch.cat([look(one[None]) for one in x])]
        look(x)
        tokens = reduction_of(model).entry(4)
        empty += int(((tokens.size <= 0) & (tokens.keep_mask_or_ones > 0)).sum())
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)
    assert empty > 0 or (name, seed) != ("videomae", 5)


@pytest.mark.parametrize("name", ["gap", "vjepa2-model", "videomae-model"])
def test_restored_patches_have_the_features_of_their_token(name):
    for execution in EXECUTIONS:
        model = reduced(name, "spvit", execution, restore="zeros")
        x, seen = inputs(name), []
        part = model.blocks[-1] if name == "gap" else clips.blocks(model)[-1]
        part.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            dense = model.forward_features(x) if name == "gap" else clips.answer(model, x)
        tokens, host = reduction_of(model).entry(4), reduction_of(model)
        norm = host.entry_of_host.final_norm(model) or (lambda x: x)
        with torch.no_grad():
            expected = tokens.dense(norm(seen[0]))
        torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4)


def test_a_visible_token_without_a_patch_fills_no_cell():
    tokens = Tokens.start(torch.randn(1, 4, 3), 0, False)
    tokens = tokens.append(torch.full((1, 1, 3), 7.0), torch.tensor([[2]]))  # an empty package in the place of patch 2
    tokens = tokens.soft_drop(torch.tensor([[1.0, 1, 0, 1, 1]]), torch.tensor([[0, 1, 3, 3, 4]]))  # patch 2 goes to token 3
    tokens = tokens.keep(torch.tensor([[0, 1, 3, 4, 2]]))  # hidden tokens come last
    filled = GridMap.of(tokens).fill(tokens.x)
    assert torch.equal(filled[0], tokens.x[0][[0, 1, 2, 2]])
