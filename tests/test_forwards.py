"""The state of a forward belongs to that forward: threads, checkpointing, kept features, hooks, failures, copies, memory."""

import copy
import gc
import io
import pickle
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from torch import nn

import laconic
from families import AT, AVERAGED, EVERY, METHODS, images, make, serves
from kinds import (
    EVERY_KIND,
    MERGES,
    answer_or_refusal,
    assert_close,
    batches,
    cases,
    features,
    of_methods,
    reduced,
    refused,
    right_or_refused,
    run,
    same_provenance,
    shapes,
)

ROUNDS = 200 if EVERY else 6
FORWARDS = 1000 if EVERY else 20
WITH_LOSSES = ["dtps", "dynamicvit", "spvit"]


# ------------------------------------------------------------------------------------------------ threads
def in_threads(*works):
    """Start these functions at once, each in its own thread, with thread switches as often as can be; return their results."""
    barrier, interval = threading.Barrier(len(works)), sys.getswitchinterval()

    def start(work):
        torch.set_num_threads(1)  # every thread has a number of its own
        barrier.wait()
        return work()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            futures = [pool.submit(start, work) for work in works]
            return [future.result() for future in futures]
    finally:
        sys.setswitchinterval(interval)


def sleep(module, args):
    """Forward pre-hook: another thread runs here, for certain."""
    time.sleep(random.random() * 0.002)


@cases("plain", "gap", "dinov2-reg")
@pytest.mark.parametrize("sleeping", [False, True])
def test_two_threads_answer_as_one(method, family, sleeping):
    model, todo = reduced(method, family), batches(family)
    if sleeping:
        model.blocks[2].register_forward_pre_hook(sleep)
    expected = [(run(model, x), laconic.provenance(model)) for x in todo]

    def serve(x, answer, where):
        for _ in range(ROUNDS):
            assert_close(run(model, x), answer)
            same_provenance(laconic.provenance(model), where)

    in_threads(*[partial(serve, x, *both) for x, both in zip(todo, expected, strict=True)])


@cases("plain", "distilled", kinds=("ats", "etps", "tome", "topk"))
def test_features_beside_a_classifying_thread(method, family):
    """The thread that classifies needs the class token alone; the other gets every token all the same."""
    model, (x, y) = reduced(method, family, at=(1, 2)), batches(family)
    wanted, answer = features(model, x), run(model, y)

    def give_features():
        for _ in range(ROUNDS):
            assert_close(features(model, x), wanted)

    def classify():
        for _ in range(ROUNDS):
            assert_close(run(model, y), answer)

    in_threads(give_features, classify)


@cases("plain", "gap")
def test_gradients_of_images_in_two_threads(method, family):
    """Each thread's backward pass computes its own blocks again."""
    model, todo = reduced(method, family), batches(family)

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x)[0]

    expected = [gradient(x) for x in todo]
    model.set_grad_checkpointing(True)

    def serve(x, wanted):
        for _ in range(ROUNDS // 2):
            assert_close(gradient(x), wanted, 1e-3)

    in_threads(*[partial(serve, *one) for one in zip(todo, expected, strict=True)])


@of_methods(("ats", "etps"))
def test_every_thread_has_a_last_forward_of_its_own(method):
    model, (x, y) = reduced(method), batches("plain")
    run(model, x)
    mine = laconic.provenance(model)

    def elsewhere():
        with pytest.raises(RuntimeError, match="has not run"):
            laconic.provenance(model)
        kept = features(model, y)
        return kept, laconic.provenance(model)

    ((kept, theirs),) = in_threads(elsewhere)
    same_provenance(laconic.provenance(model), mine)
    same_provenance(laconic.provenance(kept), theirs)  # features know their forward in any thread
    run(model, y)
    same_provenance(laconic.provenance(model), theirs)


# ------------------------------------------------------------------------------------------------ checkpointing
def loss_of(model, x):
    """Return a loss of one batch that every token has a part in, with the method's own."""
    out = model(x)
    return (out[0] if isinstance(out, tuple) else out).square().mean() + sum(laconic.losses(model).values())


def three_views(model, xs):
    losses = [loss_of(model, x) for x in xs]
    (losses[0] + 2 * losses[1] + losses[0] * losses[2]).backward()


def one_after_the_other(model, xs):
    losses = [loss_of(model, x) for x in xs]
    for loss in (losses[1], losses[2], losses[0]):
        loss.backward()


def teacher_between(model, xs):
    student = model(xs[0])
    teacher = run(model, xs[1])
    (student - teacher).square().mean().backward()


def evaluation_between(model, xs):
    loss = loss_of(model, xs[0])
    run(model.eval(), xs[1])
    model.train()
    loss.backward()


def backward_in_another_thread(model, xs):
    losses = [loss_of(model, x) for x in xs[:2]]
    in_threads(sum(losses).backward)


def other_shape_between(model, xs):
    loss = loss_of(model, xs[0])
    run(model, xs[1][:1])
    loss.backward()


SITUATIONS = (
    three_views,
    one_after_the_other,
    teacher_between,
    evaluation_between,
    backward_in_another_thread,
    other_shape_between,
)


def gradients(model, situation, xs, checkpointing):
    """Return the gradients of all parameters that a situation gives."""
    model.train().set_grad_checkpointing(checkpointing)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    situation(model, xs)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, expected):
    """Check two sets of gradients, each tensor by its own size."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient.abs().max() > 1e-6:
            assert_close(got[name], gradient, 1e-3, name)


@cases("plain", "gap")
def test_interleaved_forwards_with_checkpointing_have_the_gradients_of_none(method, family):
    model, xs = reduced(method, family), batches(family, 3)
    for situation in SITUATIONS:
        expected = gradients(model, situation, xs, False)
        same_gradients(gradients(model, situation, xs, True), expected)


@pytest.fixture
def reentrant():
    """Let timm's gradient checkpointing be re-entrant."""
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(False)


@cases("plain", "gap")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the teacher's, without gradients
def test_reentrant_checkpointing_has_the_gradients_of_none_or_is_refused(method, family, reentrant):
    model, xs = reduced(method, family), batches(family, 3)
    for situation in (three_views, one_after_the_other, teacher_between):
        expected = gradients(model, situation, xs, False)
        got, refusal = answer_or_refusal(partial(gradients, model, situation, xs, True))
        if refusal is not None:
            assert "re-entrant" in str(refusal)
            assert method not in ("etps", "tome", "topk")  # those hand on nothing but features
            return
        same_gradients(got, expected)


# ------------------------------------------------------------------------------------------------ kept features
@cases("plain", "gap", "siglip", "qk-norm", "dinov2-reg", "eva02", "beit", kinds=EVERY_KIND)
def test_heads_in_any_order_and_image_by_image(method, family):
    model, xs = reduced(method, family), batches(family, 3)
    expected = [run(model, x) for x in xs]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            kept = [model.forward_features(x) for x in xs]
            for i in (2, 0, 1, 0):
                assert_close(model.forward_head(kept[i]), expected[i])
                one_by_one = [model.forward_head(kept[i][j : j + 1]) for j in (1, 0)]
                assert_close(torch.cat(one_by_one[::-1]), expected[i])
            assert_close(model.forward_head(kept[1].detach()), expected[1])
            assert_close(model.forward_head(kept[0][1:]), expected[0][1:])
            assert_close(model.head(model.forward_head(kept[0], pre_logits=True)), expected[0])


@cases("plain", "gap")
def test_heads_of_kept_features_in_training(method, family):
    """The losses of several batches, each through its own features, have the gradients of whole forwards."""
    xs, found = batches(family, 3), []
    for kept in (False, True):
        model = reduced(method, family).train()
        torch.manual_seed(3)
        outs = [(model.forward_features if kept else model)(x) for x in xs]
        outs = [model.forward_head(f) for f in outs] if kept else outs
        sum(out.square().mean() for out in outs).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    same_gradients(found[1], found[0])


@cases("plain", "gap", "siglip")
def test_a_head_on_features_of_no_forward(method, family):
    """A class token is read without sizes; where sizes are needed and not known, it is refused."""
    model, (x, y) = reduced(method, family), batches(family)
    expected, kept = run(model, x), features(model, x)
    run(model, y)
    for copied in (kept.clone(), kept + 0, torch.stack(list(kept)), copy.deepcopy(kept)):
        with torch.no_grad():
            if family not in AVERAGED:
                assert_close(model.forward_head(copied), expected)
            elif method in MERGES:
                refused(partial(model.forward_head, copied))
            else:
                right_or_refused(partial(model.forward_head, copied), expected)


@cases("plain", "gap")
def test_blocks_by_hand_in_turns(method, family):
    """Two forwards that a caller runs block by block, in turns, are as two calls of the model."""
    model, xs = reduced(method, family), batches(family)
    expected = [(run(model, x), laconic.provenance(model)) for x in xs]
    with torch.no_grad():
        streams = [model.norm_pre(model._pos_embed(model.patch_embed(x))) for x in xs]
        for block in model.blocks:
            streams = [block(x) for x in streams]
        for stream, (answer, where) in zip(streams, expected, strict=True):
            same_provenance(laconic.provenance(stream), where)
            assert_close(model.forward_head(model.norm(stream)), answer)  # the norm of "gap" is none, and comes after its mean


def provenance_of(model, x):
    """Return the provenance of one clean forward."""
    run(model, x)
    return laconic.provenance(model)


# ------------------------------------------------------------------------------------------------ provenance and dense maps
def views_of(kept, prefix):
    """Yield views of features of a batch that belong to the forward, with the images that they are of."""
    yield kept, slice(None)
    yield kept.detach(), slice(None)
    yield kept[1:], slice(1, None)
    yield kept[0:1], slice(0, 1)
    yield kept[::2], slice(None, None, 2)
    yield kept[:, prefix:], slice(None)
    yield kept[1:, prefix:].detach(), slice(1, None)


def strangers_to(kept):
    """Yield tensors of the same shape, or nearly, of which it is not known what forward they are of."""
    yield kept.clone()
    yield kept * 2
    yield kept.flip(0)
    yield kept[[1, 0]]
    yield copy.deepcopy(kept.detach())
    yield pickle.loads(pickle.dumps(kept.detach()))
    yield torch.randn_like(kept)


@cases("plain", "gap", "dinov2-reg", "eva02")
def test_features_of_older_batches_know_where_their_patches_went(method, family):
    model, xs = reduced(method, family), batches(family, 3, 3)
    fresh = []
    for x in xs:
        f = features(model, x)
        fresh.append((f, laconic.provenance(model), dense_by_hand(f, laconic.provenance(model).final, model.num_prefix_tokens)))
    for f, where, dense in (fresh[1], fresh[0], fresh[2]):
        for view, part in views_of(f, model.num_prefix_tokens):
            same_provenance(laconic.provenance(view), where, part)
            assert_close(laconic.restore_dense(model, view), dense[part])
        nchw = laconic.restore_dense(model, f, layout="NCHW")
        assert_close(nchw.flatten(2).transpose(1, 2), dense)
        assert_close(laconic.restore_dense(where, f.clone()), dense)  # of a forward that is named
        assert_close(laconic.restore_dense(laconic.provenance(f), 2 * f), 2 * dense)
    answer = run(model, xs[0])
    same_provenance(laconic.provenance(answer), fresh[0][1])
    same_provenance(laconic.provenance(answer[1:]), fresh[0][1], slice(1, None))


def dense_by_hand(f, stage, prefix):
    """Return the features [B, P, C] of every patch: of the token that holds it, or zeros."""
    tokens = f[:, prefix:]
    index = stage.where.clamp_min(0).unsqueeze(-1).expand(-1, -1, f.shape[2])
    return tokens.gather(1, index) * (stage.where >= 0).unsqueeze(-1)


@cases("plain", "gap")
@pytest.mark.parametrize("gradient", [False, True])
def test_features_of_no_forward_are_refused(method, family, gradient):
    model, x = reduced(method, family), images(family, 2)
    other = copy.deepcopy(model)
    with torch.set_grad_enabled(gradient):
        kept, theirs = model.forward_features(x), other.forward_features(x)
        for stranger in strangers_to(kept):
            refused(partial(laconic.restore_dense, model, stranger))
            refused(partial(laconic.provenance, stranger))
        refused(partial(laconic.restore_dense, model, theirs))
        refused(partial(laconic.restore_dense, model, kept[:, 2:]))  # a patch is missing
        refused(partial(laconic.restore_dense, model, kept.transpose(1, 2)))
        refused(partial(laconic.provenance, x))
    same_provenance(laconic.provenance(theirs), laconic.provenance(kept))


@cases("plain", "gap", "dinov2-reg")
@pytest.mark.parametrize("place", ["blocks.1", "blocks.2", "blocks.3", "blocks.3.norm1"])
def test_a_hook_that_restores_maps_inside_a_forward(method, family, place):
    """As Grad-CAM's reshape_transform: the map is of the images that are running, not of those before."""
    inside = place.endswith("norm1")  # its features are the result of an operation; the last stage is that of block 2
    model, (x, y) = reduced(method, family, at=(1, 2) if inside and method != "avit" else AT), batches(family)
    layer, taken, seen = model.get_submodule(place), [], []
    handle = layer.register_forward_hook(lambda module, args, out: taken.append(out))
    stages = provenance_of(model, x).stages
    handle.remove()
    stage = stages[-1] if inside else next(stage for stage in stages if stage.block == int(place[-1]))
    layer.register_forward_hook(lambda module, args, out: seen.append(laconic.restore_dense(model, out, layout="NCHW")))
    if len(taken[0]) != len(x):  # the tokens of all images in one row are no map
        refused(partial(run, model, x))
        return
    for other in (y, y[:1], x):
        run(model, other)
    assert_close(seen[-1].flatten(2).transpose(1, 2), dense_by_hand(taken[0], stage, model.num_prefix_tokens))


@cases("plain", "gap")
def test_a_hook_sees_the_running_forward_as_far_as_it_got(method, family):
    model, (x, y) = reduced(method, family), batches(family)
    whole, seen = provenance_of(model, x), []
    model.blocks[2].register_forward_pre_hook(lambda *args: seen.append(laconic.provenance(model)))
    model.blocks[2].register_forward_hook(lambda *args: seen.append(laconic.provenance(model)))
    run(model, y)
    seen.clear()
    run(model, x)
    same_provenance(seen[0], whole, stages=slice(1))
    same_provenance(seen[1], whole, stages=slice(2))
    same_provenance(laconic.provenance(model), whole)


@cases("plain", "gap")
def test_gradients_of_features_are_laid_out_by_the_forward_that_is_named(method, family):
    model, (x, y) = reduced(method, family), batches(family)
    kept = model.forward_features(x)
    where = laconic.provenance(kept)
    run(model, y)
    (gradient,) = torch.autograd.grad(model.forward_head(kept).square().sum(), kept)
    assert_close(laconic.restore_dense(where, gradient), dense_by_hand(gradient, where.final, model.num_prefix_tokens))


# ------------------------------------------------------------------------------------------------ forwards in forwards
@cases("plain", "gap", kinds=("ats", "dtps", "tome"))
@pytest.mark.parametrize("place", ["blocks.1", "blocks.3", "norm"])
def test_a_forward_inside_a_forward(method, family, place):
    """A hook calls the model on other images of the same shape: both answers are right."""
    model, (x, y) = reduced(method, family), batches(family)
    answers, inside, depth = [run(model, one) for one in (x, y)], [], []
    wanted, whole = features(model, y), provenance_of(model, x)

    def call(module, args):
        if not depth:
            depth.append(1)
            inside.append((run(model, y), features(model, y)))
            depth.pop()

    handle = model.get_submodule(place).register_forward_pre_hook(call)
    assert_close(run(model, x), answers[0])
    same_provenance(laconic.provenance(model), whole)
    for mine, theirs in zip(inside[0], (answers[1], wanted), strict=True):
        assert_close(mine, theirs)
    kept = features(model, x)
    assert_close(model.forward_head(kept).detach(), answers[0])
    handle.remove()
    model.get_submodule(place).register_forward_hook(lambda module, args, out: call(module, args))
    assert_close(run(model, x), answers[0])


@cases("plain", kinds=EVERY_KIND)
@pytest.mark.parametrize("place", ["attn.qkv", "mlp"])
def test_a_forward_inside_half_a_block(method, family, place):
    """The attention that the method looks at is not that of the forward inside."""
    model, (x, y) = reduced(method, family), batches(family)
    expected, depth, inside = [run(model, one) for one in (x, y)], [], []

    def call(module, args):
        if not depth:
            depth.append(1)
            try:
                inside.append(run(model, y))
            finally:
                depth.pop()

    model.blocks[2].get_submodule(place).register_forward_pre_hook(call)
    if right_or_refused(partial(run, model, x), expected[0]):
        assert_close(inside[0], expected[1])


class Stop(Exception):
    """What a hook raises midway."""


@cases("plain", "gap", kinds=("ats", "dtps", "tome"))
@pytest.mark.parametrize("place", ["blocks.1", "blocks.3", "norm", "blocks.2.mlp", "head"])
def test_a_forward_that_fails_midway_leaves_the_one_before(method, family, place):
    model, (x, y) = reduced(method, family), batches(family)
    before, answers = provenance_of(model, x), [run(model, one) for one in (x, y)]
    failed, kept = provenance_of(model, y), features(model, x)

    def stop(module, args):
        raise Stop

    handle = model.get_submodule(place).register_forward_pre_hook(stop)
    for call in (model, model.forward_features) if place != "head" else (model,):
        with pytest.raises(Stop), torch.no_grad():
            call(y)
        # the tokens of a forward whose head fails have been through all blocks: it may count as complete
        left = laconic.provenance(model)
        one = failed if place == "head" and torch.equal(left.final.where, failed.final.where) else before
        same_provenance(left, one)
        same_provenance(laconic.provenance(kept), before)
    handle.remove()
    assert_close(model.forward_head(kept).detach(), answers[0])
    for one, answer in zip((x, y), answers, strict=True):
        assert_close(run(model, one), answer)
    same_provenance(laconic.provenance(model), failed)


# ------------------------------------------------------------------------------------------------ losses
@of_methods(WITH_LOSSES)
def test_losses_are_of_the_last_forward_in_training(method):
    model, (x, y) = reduced(method).train(), batches("plain")
    torch.manual_seed(3)
    model(x)
    wanted = {name: value.item() for name, value in laconic.losses(model).items()}
    assert wanted or method not in WITH_LOSSES
    run(model.eval(), y)
    in_threads(partial(run, model, y))
    features(model, y[:1])
    for training in (False, True):
        found = laconic.losses(model.train(training))
        assert {name: value.item() for name, value in found.items()} == wanted
    if wanted and any(value.requires_grad for value in found.values()):
        sum(found.values()).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.laconic.parameters())


@of_methods(WITH_LOSSES)
def test_losses_of_another_thread_are_not_mine(method):
    model, (x, y) = reduced(method).train(), batches("plain")

    def losses(one):
        torch.manual_seed(3)
        model(one)
        time.sleep(0.01)
        return {name: value.item() for name, value in laconic.losses(model).items()}

    mine = losses(x)
    in_threads(partial(losses, y))
    assert {name: value.item() for name, value in laconic.losses(model).items()} == mine


# ------------------------------------------------------------------------------------------------ memory
def living():
    """Return how many tensors there are, and how many objects in all."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(one), torch.Tensor) for one in objects), len(objects)


@cases("plain", kinds=("dtps", "tome"))
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_of_many_forwards(method, family, training):
    model, x = reduced(method, family).train(training), images(family, 1)

    def forward():
        if training:
            loss_of(model, x).backward()
            model.zero_grad(set_to_none=True)
        else:
            run(model, x)
            model.forward_head(features(model, x))

    for _ in range(3):
        forward()
    tensors, objects = living()
    for _ in range(FORWARDS):
        forward()
    now = living()
    assert now[0] <= tensors
    assert now[1] < objects + FORWARDS  # not one object more for every forward


@cases("plain", "gap", "siglip", kinds=("ats", "dtps", "tome"))
def test_features_die_with_their_user(method, family):
    model, x, dead = reduced(method, family), images(family, 2), []

    def watch(module, args, out):
        dead.append(weakref.ref(out))

    for block in model.blocks:
        block.register_forward_hook(watch)
    kept = features(model, x)
    dead.append(weakref.ref(kept))
    dead.append(weakref.ref(kept.untyped_storage()))
    where = laconic.provenance(kept)
    laconic.restore_dense(model, kept)
    del kept
    gc.collect()
    assert [one() for one in dead] == [None] * len(dead)
    assert where.final.where.shape == (2, 36)  # what became of the patches lives as long as it is held


@cases("plain", kinds=("ats", "dtps", "tome"))
def test_features_of_a_training_step_die_after_it(method, family):
    if method == "iared":
        pytest.skip("its decisions wait for a reward, with the graph that they come from")
    model, x, dead = reduced(method, family).train(), images(family, 2), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: dead.append(weakref.ref(out)))
    loss = loss_of(model, x)
    loss.backward()
    del loss
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert [one() for one in dead] == [None] * len(dead)


# ------------------------------------------------------------------------------------------------ copies
def saved(thing):
    """Return a thing that was saved by torch and loaded again."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(thing, torch.Tensor))


def pickled(thing):
    """Return a thing that was pickled and loaded again."""
    return pickle.loads(pickle.dumps(thing))


COPIES = (copy.deepcopy, pickled, saved)


@cases("plain", "gap")
def test_features_are_saved_and_copied_as_plain_tensors(method, family):
    model, (x, y) = reduced(method, family), batches(family)
    kept, plain = features(model, x), features(model, x).clone()
    where = laconic.provenance(kept)
    assert len(pickle.dumps(kept)) <= len(pickle.dumps(plain)) + 64
    for way in COPIES:
        other = way(kept)
        assert torch.equal(other, plain)
        refused(partial(laconic.provenance, other))
        assert_close(laconic.restore_dense(where, other), laconic.restore_dense(model, kept))
    run(model, y)
    same_provenance(laconic.provenance(kept), where)


@cases("plain", "gap", "siglip", kinds=("ats", "dtps", "tome"))
@pytest.mark.parametrize("way", COPIES, ids=lambda way: way.__name__)
def test_copies_of_a_model_that_has_run(method, family, way):
    """A copy answers the same, has not run itself, and has nothing in common with the original."""
    model, (x, y) = reduced(method, family), batches(family)
    kept, pending = features(model, x), model(y)  # one forward with a graph that waits for its backward pass
    where, answer = laconic.provenance(model), run(model, x)
    other = way(model)
    with pytest.raises(RuntimeError, match="has not run"):
        laconic.provenance(other)
    assert_close(run(other, x), answer, 1e-6)
    refused(partial(laconic.restore_dense, other, kept))
    same_provenance(laconic.provenance(kept), laconic.provenance(other))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    assert_close(run(model, x), answer, 1e-6)
    changed = reduced(method, family)
    with torch.no_grad():
        for p in changed.parameters():
            p.mul_(1.1)
    assert_close(run(other, x), run(changed, x))
    run(other, y)
    run(model, y)
    same_provenance(laconic.provenance(model), where)
    pending.square().sum().backward()
    assert all(p.grad is None for p in other.parameters())
    laconic.restore_(other)
    assert_close(run(model, x), answer, 1e-6)


# ------------------------------------------------------------------------------------------------ empty batches
@pytest.mark.parametrize(
    ("method", "family"),
    [(m, "plain") for m in METHODS]
    + [(m, "gap") for m in METHODS if serves(m, "gap") and (EVERY or m in ("ats", "etps", "tome"))],
)
def test_an_empty_batch_has_an_empty_answer(method, family):
    base, model, x = make(family), reduced(method, family), images(family, 2)
    expected = run(base, x[:0])
    answer = run(model, x)
    got = run(model, x[:0])
    assert (shapes(got), got.dtype) == (shapes(expected), expected.dtype)
    assert features(model, x[:0]).shape[::2] == (0, base.embed_dim)
    assert_close(run(model, x), answer)


# ------------------------------------------------------------------------------------------------ chains of models
class Chain(nn.Module):
    """A reduced model whose dense features are the image of another reduced model."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(laconic.restore_dense(self.first, self.first.forward_features(x), layout="NCHW"))


@of_methods(("ats", "etps", "tome"))
@pytest.mark.parametrize("family", ["plain", "gap"])
def test_chained_models(method, family):
    if not serves(method, family):
        pytest.skip("it does not work on this family")
    first = reduced(method, family)
    second = reduced(method, family, model=make(family, in_chans=48, img_size=6, patch_size=1))
    chain, xs = Chain(first, second), batches(family)
    maps = [laconic.restore_dense(first, features(first, x), layout="NCHW") for x in xs]
    expected = [run(second, one) for one in maps]
    places = [provenance_of(second, one) for one in maps]
    for i in (1, 0, 1):
        assert_close(run(chain, xs[i]), expected[i])
        same_provenance(laconic.provenance(second), places[i])
        same_provenance(laconic.provenance(first), provenance_of(first, xs[i]))
    kept = [(features(first, x), features(second, one)) for x, one in zip(xs, maps, strict=True)]
    assert_close(second.forward_head(kept[0][1]).detach(), expected[0])
    assert_close(first.forward_head(kept[0][0]).detach(), run(first, xs[0]))
    in_threads(
        *[partial(lambda x, answer: assert_close(run(chain, x), answer), *one) for one in zip(xs, expected, strict=True)]
    )


@cases("plain", "gap")
def test_features_of_a_teacher_in_a_student(method, family):
    """Features of one reduced model in another one: counted by their own sizes, or refused."""
    teacher, (x, y) = reduced(method, family), batches(family)
    student = copy.deepcopy(teacher)
    expected, kept, taken = run(teacher, x), features(teacher, x), []
    run(student, y)
    with torch.no_grad():
        right_or_refused(partial(student.forward_head, kept), expected)
        teacher.blocks[1].register_forward_hook(lambda module, args, out: taken.append(out))
        teacher.blocks[2].register_forward_hook(lambda module, args, out: taken.append(out))
        run(teacher, x)
        right_or_refused(lambda: student.blocks[2](taken[0]), taken[1])


@of_methods(("etps", "tome"))
def test_a_student_inside_a_hook_of_its_teacher(method):
    teacher, (x, y) = reduced(method), batches("plain")
    student, inside = reduced(method, model=make("plain", global_pool="avg")), []
    answers = run(teacher, x), run(student, y)
    teacher.blocks[2].register_forward_hook(lambda *args: inside.append(run(student, y)))
    assert_close(run(teacher, x), answers[0])
    assert_close(inside[0], answers[1])
