"""What must hold on every host, as functions of a kind of model (see `zoo`) and a method."""

import copy
import pickle

import torch

import laconic
from families import AT, EVERY, VARIABLE, at, fill, rate
from laconic.methods.ops import class_attention, mean_query_attention
from test_laws import Hidden

WIDE = (
    ("etps", "dtps", "tome", "bat", "topk", "ats") if EVERY else ("etps", "dtps", "tome")
)  # each uses the seam with the host in another way


def run(kind, model, images):
    with torch.no_grad():
        return kind.logits(model, images)


def reduced(kind, method, **more):
    """A reduced model of this kind, what the method has learned being random."""
    model = kind.make()
    laconic.reduce_(model, method, **{"keep": rate(method), "at": at(method), **kind.options(model, method), **more})
    fill(laconic.core.token_reduction.reduction_of(model))
    return model


def keeps_its_answer_where_nothing_is_reduced(kind, method):
    model, x = kind.make(), kind.images()
    expected = run(kind, model, x)
    laconic.reduce_(model, method, keep=1.0, at=at(method), **kind.options(model, method))
    assert torch.equal(run(kind, model, x), expected)


def lets_tokens_leave(kind, method):
    model, x = reduced(kind, method), kind.images()
    base = run(kind, kind.make(), x)
    assert (run(kind, model, x) - base).abs().max() > 1e-3
    counts = [36] + [stage.size.shape[1] for stage in laconic.provenance(model).stages]
    reduction = laconic.core.token_reduction.reduction_of(model)
    if method not in VARIABLE:
        assert counts[1:] == [reduction.counts(36)[block] for block in at(method)]
        assert counts == sorted(set(counts), reverse=True)
    assert counts[-1] < 36
    for stage in laconic.provenance(model).stages:
        torch.testing.assert_close(stage.size.sum(1) + (stage.where < 0).sum(1), torch.full((3,), 36.0))


def does_not_mix_images(kind, method):
    model, x = reduced(kind, method), kind.images()
    singles = torch.cat([run(kind, model, image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(run(kind, model, x), singles, rtol=1e-4, atol=1e-4)


def answers_as_if_what_left_were_hidden(kind):
    """Removing tokens is the same as keeping them where nobody sees them: the proof that positions stay right."""
    x, schedule = kind.images(), laconic.Schedule.keep_counts({1: 22, 2: 14, 3: 9})
    removed = reduced(kind, "topk", keep=None, at=None, schedule=schedule)
    expected = run(kind, removed, x)
    hidden = reduced(kind, "topk", keep=None, at=None, schedule=schedule)
    reduction = laconic.core.token_reduction.reduction_of(hidden)
    for block in AT:
        score = mean_query_attention if kind.options(kind.make(), "topk") else class_attention
        reduction.reducers[str(block)] = Hidden(score)
    torch.testing.assert_close(run(kind, hidden, x), expected, rtol=1e-4, atol=1e-4)
    assert len(reduction.entry(4)) == 36
    return hidden, removed


def can_be_undone(kind, method):
    model, x = kind.make(), kind.images()
    expected, keys = run(kind, model, x), {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(vars(m)) for m in model.modules()]
    laconic.reduce_(model, method, keep=rate(method), at=at(method), **kind.options(model, method))
    own = [name for name in model.state_dict() if "laconic." not in name]
    assert own == list(keys)
    run(kind, model, x)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(run(kind, other, x), run(kind, model, x))
    laconic.restore_(model)
    assert torch.equal(run(kind, model, x), expected)
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())


def trains(kind, method):
    """The gradient reaches every parameter of the blocks and of the method."""
    model, x = reduced(kind, method).train(), kind.images()
    host = laconic.core.token_reduction.reduction_of(model).model
    loss = kind.logits(model, x).square().mean() + sum(laconic.losses(model).values())
    loss.backward()
    for name, p in [(n, p) for n, p in host.named_parameters() if "blocks." in n or "layers." in n or n.startswith("laconic.")]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def is_counted(kind):
    """The closed form agrees with what torch counts, before and after tokens have left."""
    model = kind.make()
    for method in (None, "topk"):
        if method:
            laconic.reduce_(model, method, keep=0.6, at=AT, **kind.options(model, method))
        summary = laconic.summary(model, count=True)
        assert abs(summary.macs / summary.counted_macs - 1) < 1e-3


def compiles(kind, method):
    """One graph, and no second one for other images."""
    model, x = reduced(kind, method), kind.images()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(lambda images: kind.logits(model, images), fullgraph=True, backend="aot_eager")
        for images in (x, x + 1):
            torch.testing.assert_close(compiled(images), kind.logits(model, images), rtol=1e-4, atol=1e-4)


def exports(kind, method):
    """An exported program gives the same answers, for images it was not exported with."""
    model, x = reduced(kind, method), kind.images()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x + 1), model(x + 1), rtol=1e-4, atol=1e-4)
