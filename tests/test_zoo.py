"""The contract of all backbones: what `laconic.reduce_` promises, on a small model of every family there is (`zoo`).

LACONIC_EVERY_PAIR=1 takes every method on every family, LACONIC_ZOO_METHODS=etps,tome these (`make compat`); else it is one.
"""

import copy
import os
from functools import partial

import pytest
import torch

import clips
import laconic
import test_lvvit_psvit
import test_pvt_cvt
import test_transformers
import zoo
from families import EVERY
from zoo import Kind


class Whole(Kind):
    """A kind that draws its own weights."""

    def make(self):
        return self.build()


def ours(module, name):
    return Whole("laconic", partial(module, name), size=48 if name.startswith("psvit") else 96)


def theirs(family):
    def answer(model, x):
        return next(v for n, v in model(pixel_values=x).items() if n in ("logits", "image_embeds", "pooler_output"))

    return Whole("transformers", partial(test_transformers.make, family), answer)


class Clips(Whole):
    """A kind that takes clips."""

    def images(self, batch=3):
        return clips.clips(batch)


ZOO = {
    **zoo.ZOO,
    **{name: ours(test_lvvit_psvit.make, name) for name in ("lvvit_small", "psvit_base_14")},
    **{name: ours(test_pvt_cvt.small, name) for name in ("pvt_tiny", "cvt_13")},
    **{f"transformers-{family}": theirs(family) for family in test_transformers.FAMILIES},
    **{
        f"transformers-{name}": Clips("transformers", partial(clips.make, name), lambda model, x: model(x).logits)
        for name in clips.CLASSIFIERS
    },
}
CHOSEN = os.environ.get("LACONIC_ZOO_METHODS")
METHODS = CHOSEN.split(",") if CHOSEN else sorted(laconic.methods()) if EVERY else ["dtps"]
REFUSALS = (TypeError, ValueError, LookupError)
PAIRS = [pytest.param(name, method, id=f"{name}/{method}") for name in ZOO for method in METHODS]


def built(name):
    """A model; with LACONIC_OLDER=1 (`make compat`) a test of one that the libraries do not have yet is skipped."""
    try:
        return ZOO[name].make()
    except (RuntimeError, TypeError) as error:
        if os.environ.get("LACONIC_OLDER") and ("Unknown model" in str(error) or "unexpected keyword" in str(error)):
            pytest.skip(f"not there: {error}")
        raise


def answer(name, model, x):
    with torch.no_grad():
        return ZOO[name].logits(model, x)


def reduced(name, model, method, keep=0.5, **options):
    """The model, reduced; without a class token by the mean query."""
    keep = None if laconic.methods()[method].count == "variable" else keep
    try:
        return laconic.reduce_(model, method, keep=keep, **options)
    except LookupError as error:
        if "score='mean-query'" not in str(error):
            raise
        return laconic.reduce_(model, method, keep=keep, score="mean-query", **options)


def refusal(name, model, method):
    """Reduces the model, or says why that was refused."""
    try:
        reduced(name, model, method)
    except REFUSALS as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_the_contract(name, method, record_property):
    """Tokens leave, a batch is its images, keys stay and load both ways, restore_ undoes it; or a refusal, and no harm."""
    model, x = built(name), ZOO[name].images(3)
    base, keys = answer(name, model, x), set(model.state_dict())
    refused = refusal(name, model, method)
    if refused:
        record_property("refused", refused)
        assert len(refused) > 40
        assert torch.equal(answer(name, model, x), base)
        assert set(model.state_dict()) == keys
        return
    out = answer(name, model, x)
    assert out.shape == base.shape
    assert out.isfinite().all()
    reduction = laconic.core.token_reduction.reduction_of(model)
    if laconic.methods()[method].count == "constant":
        assert not torch.equal(out, base)
        assert len(reduction.entry(reduction.depth)) < reduction.entry(reduction.depth).token_of_patch.shape[1]
    singles = torch.cat([answer(name, model, x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(singles, out, rtol=1e-3, atol=1e-4)
    assert {key for key in model.state_dict() if "laconic." not in key} == keys
    built(name).load_state_dict({key: value for key, value in model.state_dict().items() if key in keys})
    laconic.restore_(model)
    assert torch.equal(answer(name, model, x), base)


@pytest.mark.parametrize("name", ZOO)
def test_with_all_tokens_kept_it_is_the_model(name):
    model, x = built(name), ZOO[name].images(2)
    base = answer(name, model, x)
    assert torch.equal(answer(name, reduced(name, model, "dtps", keep=1.0), x), base)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("plain", "dinov3") else pytest.mark.slow) for n in ZOO])
def test_compile_without_graph_breaks(name):
    model, x = reduced(name, built(name), "dtps"), ZOO[name].images(2)
    expected = answer(name, model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answer(name, compiled, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.unchecked
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("plain", "siglip") else pytest.mark.slow) for n in ZOO])
def test_export(name):
    model, x = reduced(name, built(name), "dtps"), ZOO[name].images(2)

    class Answer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return ZOO[name].logits(self.model, x)

    expected = answer(name, model, x)
    exported = torch.export.export(Answer().eval(), (x,), strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_gradients_reach_every_weight(name):
    model, x = reduced(name, built(name), "dtps"), ZOO[name].images(2)
    model.train()
    torch.manual_seed(1)
    ZOO[name].logits(model, x).square().sum().backward()
    scorers = [p for n, p in model.named_parameters() if "laconic." in n]
    assert scorers
    assert all(p.grad is not None and p.grad.isfinite().all() for p in scorers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_a_copy_is_as_good(name):
    model, x = reduced(name, built(name), "dtps"), ZOO[name].images(2)
    out = answer(name, model, x)
    assert torch.equal(answer(name, copy.deepcopy(model), x), out)
