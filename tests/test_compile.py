"""torch.compile: one graph, no second compilation for the same shape, the answer of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._inductor.exc import InductorError

from families import METHODS, PAIRS, VARIABLE, images, reduced

pytestmark = pytest.mark.unchecked
FAMILIES = ("plain", "dinov3", "siglip")
QUICK = (
    "topk",
    "bat",
    "tome",
    "dtps",
    "etps",
    "evit",
    "ats",
    "evovit",
    "tokenlearner",
    "diffrate",
)  # the others are slow tests
DIFFERENT = ("topk", "bat", "tome", "dtps")  # rotary tables and the want of a class token touch each in its own way


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(*p, marks=() if p[0] in QUICK else pytest.mark.slow)
        for p in PAIRS
        if p[1] == "plain" or (p[0] in DIFFERENT and p[1] in FAMILIES)
    ],
)
def test_one_graph(method, family):
    model = reduced(method, family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (0, 1, 2):
            x = images(family) + seed
            eager = model(x)
            torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-4)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("dynamicvit", "bat")]


@pytest.mark.parametrize("method", ["dtps", *SLOW])
def test_training_compiles(method):
    model = reduced(method, "plain").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(images("plain")).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


BROKEN = pytest.mark.xfail(
    torch.__version__ >= "2.15",
    reason="torch's inductor writes C++ for avg-pool with an undeclared variable",
    raises=InductorError,
)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param(m, marks=BROKEN) if m == "avg-pool" else m for m in METHODS])
def test_with_inductor(method):
    model = reduced(method, "plain")
    compiled, x = torch.compile(model, fullgraph=True), images("plain")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("etps", "tome") else pytest.mark.slow) for m in METHODS if m not in VARIABLE]
)
def test_exported_with_a_batch_of_any_size(method):
    model, x = reduced(method, "plain"), images("plain")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},), strict=False)
    more = torch.randn(5, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method", ["etps", "topk", *[pytest.param(m, marks=pytest.mark.slow) for m in ("bat", "tome", "dtps")]]
)
def test_batches_of_many_sizes_make_two_graphs_at_most(method):
    """One for the first size, and one for any: not one for each."""
    counter = CompileCounter()
    model = reduced(method, "plain")
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for batch in (2, 2, 4, 4, 3, 6, 2):
            x = images("plain", batch)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 2
