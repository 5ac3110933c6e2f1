"""What the law tests share: methods of every kind, how answers are compared, and what counts as a refusal."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import laconic
from families import BEFORE, EVERY, FAMILIES, METHODS, at, fill, images, make, options, rate, serves

# variable numbers, learned, parking, merging, dropping; and all there are: squeezing, looking ahead, and mixing too
KINDS = ("ats", "dtps", "evovit", "tome", "topk")
EVERY_KIND = (*KINDS, "etps", "mctf", "sit")
# methods whose tokens may stand for unequally many patches: those that only drop, park or skip are left out
MERGES = {name for name, row in laconic.methods().items() if not row.rest.startswith(("dropped", "parked", "skipped"))}
MERGES |= {"diffrate", "tofu"}  # they drop some and merge some
READ_BY_PLACE = ("heuristic", "spatial-pool")  # methods that go by the place of a patch on the grid
LIBRARY = Path(laconic.__file__).parent


def cases(*families, kinds=KINDS):
    """Parametrise by ``method`` and ``family``: one method of each kind on the first family, one that merges on each other.

    With LACONIC_EVERY_PAIR all methods on all families.
    """
    first, *others = families or ("plain",)
    chosen = [(m, first) for m in METHODS if m in kinds]
    chosen += [(("tome", "etps")[i % 2], f) for i, f in enumerate(others)]
    if EVERY:
        chosen = [(m, f) for m in METHODS for f in FAMILIES if f != "naflex"]  # its features are a dict
    return pytest.mark.parametrize(("method", "family"), [(m, f) for m, f in chosen if serves(m, f)])


def early(method):
    """Return blocks of four to reduce at, so that the last one has nothing to do but to answer; avit must work there."""
    if method == "avit" or method in BEFORE:
        return at(method)
    return (1, 2) if method in ("evovit", "kmedoids") else (0, 2)  # those go by the attention of the block before


def of_methods(kinds=KINDS):
    """Parametrise by ``method`` alone."""
    return pytest.mark.parametrize("method", METHODS if EVERY else kinds)


def reduced(method, family="plain", model=None, **more):
    """Return a reduced model (``model``, or a new one of the family); what its method learns is random, the same each time."""
    model = make(family) if model is None else model
    given = {"keep": rate(method), "at": at(method), **options(method, family), **more}
    if given.get("schedule") is not None:
        given = {name: value for name, value in given.items() if name not in ("keep", "at")}
    laconic.reduce_(model, method, **given)
    torch.manual_seed(2)
    fill(model.laconic)
    return model


def batches(family, count=2, size=2):
    """Return several different batches of images of one shape."""
    return images(family, count * size).split(size)


def run(model, x):
    """Return the answer without gradients."""
    with torch.no_grad():
        return model(x)


def features(model, x):
    """Return the features without gradients."""
    with torch.no_grad():
        return model.forward_features(x)


def off(got, expected):
    """Return the largest difference relative to the largest value; infinite where shapes differ or something is NaN."""
    if isinstance(expected, tuple | list):
        return max(off(a, b) for a, b in zip(got, expected, strict=True))
    if got.shape != expected.shape or got.dtype != expected.dtype or not torch.isfinite(got).all():
        return float("inf")
    if not expected.numel():
        return 0.0
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()


def assert_close(got, expected, tolerance=1e-4, of=""):
    """Check that two answers are equal but for rounding."""
    difference = off(got, expected)
    assert difference <= tolerance, f"{of} {difference:.2g} off; shapes {shapes(got)} and {shapes(expected)}"


def shapes(x):
    """Return the shape of a tensor, or those of several."""
    return [tuple(t.shape) for t in x] if isinstance(x, tuple | list) else tuple(x.shape)


def is_clear(error):
    """Return True if the library itself has raised this error, in words; an error of torch or timm inside of it is no refusal."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    written = LIBRARY in Path(last.filename).parents and (last.line or "").startswith("raise")
    return written and type(error) in (ValueError, TypeError, LookupError, RuntimeError) and len(str(error)) > 30


def answer_or_refusal(get: Callable[[], object]):
    """Return (answer, None) or (None, the clear refusal); any other error is a failure."""
    try:
        return get(), None
    except Exception as error:
        if not is_clear(error):
            raise AssertionError(f"neither an answer nor a clear refusal: {type(error).__name__}: {error}") from error
        return None, error


def right_or_refused(get: Callable[[], object], expected, tolerance=1e-4, of=""):
    """Check that ``get()`` is ``expected``, or that it is refused clearly; return whether it is right."""
    got, refusal = answer_or_refusal(get)
    if refusal is None:
        assert_close(got, expected, tolerance, of)
    return refusal is None


def refused(get: Callable[[], object], match=None, kinds=(ValueError,)):
    """Check that ``get()`` is refused clearly by the library."""
    with pytest.raises(kinds, match=match) as caught:
        get()
    assert is_clear(caught.value), caught.value


def same_provenance(got, expected, images=slice(None), stages=slice(None)):
    """Check that two provenances say the same (the first of some images of the second)."""
    mine, theirs = got.stages, expected.stages[stages]
    assert [stage.block for stage in mine] == [stage.block for stage in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.where, b.where[images])
        assert torch.equal(a.kept, b.kept[images])
        assert_close(a.size, b.size[images], 1e-5)
        assert a.grid == b.grid
