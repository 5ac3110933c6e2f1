"""Whatever is done to a model after `reduce_`: it answers as if that had been done before, or refuses."""

import copy
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from timm.layers import PatchDropout
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import laconic
from families import AT, EVERY, FIXED, VARIABLE, at, fill, images, make, rate
from kinds import (
    READ_BY_PLACE,
    answer_or_refusal,
    assert_close,
    batches,
    cases,
    early,
    features,
    of_methods,
    off,
    reduced,
    refused,
    right_or_refused,
    run,
    same_provenance,
    shapes,
)

FEW = ("ats", "dtps", "tome", "topk")


def changed(model, change):
    """Return the model after a change, which is the same one each time."""
    torch.manual_seed(7)
    change(model)
    return model


# ------------------------------------------------------------------------------------------------ the head and the pooling
class Mixing(nn.Module):
    """A norm that lets tokens see each other."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True)


def reset(*args):
    """Return the call of reset_classifier with these arguments, the new head having weights that matter."""

    def change(model):
        model.reset_classifier(*args)
        fill(model.head)

    return change


def set_to(name, value):
    """Return the setting of an attribute, or of that of a module inside."""

    def change(model):
        *path, last = name.split(".")
        setattr(model.get_submodule(".".join(path)), last, value() if callable(value) else value)

    return change


HEADS = {
    "reset_classifier(0)": reset(0),
    "reset_classifier(5)": reset(5),
    "reset_classifier(0, '')": reset(0, ""),
    "reset_classifier(5, '')": reset(5, ""),
    "reset_classifier(0, 'avg')": reset(0, "avg"),
    "reset_classifier(5, 'avg')": reset(5, "avg"),
    "reset_classifier(5, 'max')": reset(5, "max"),
    "global_pool = ''": set_to("global_pool", ""),
    "global_pool = 'avg'": set_to("global_pool", "avg"),
    "global_pool = 'avgmax'": set_to("global_pool", "avgmax"),
    "pool_include_prefix": set_to("pool_include_prefix", True),
    "another head": set_to("head", lambda: nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 7))),
    "no head": set_to("head", nn.Identity),
    "another fc_norm": set_to("fc_norm", lambda: nn.LayerNorm(48)),
    "another norm": set_to("norm", lambda: nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 48))),
    "a norm that mixes tokens": set_to("norm", Mixing),
}
WITH_CLASS_TOKEN = {"reset_classifier(0, 'token')": reset(0, "token"), "global_pool = 'token'": set_to("global_pool", "token")}


# ------------------------------------------------------------------------------------------------ weights and modules
class LowRank(nn.Module):
    """A linear layer with an adapter beside it, as LoRA is put in by hand."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def low_rank(model):
    for block in model.blocks:
        block.attn.qkv, block.mlp.fc2 = LowRank(block.attn.qkv), LowRank(block.mlp.fc2)


class Low(nn.Module):
    """A weight and what an adapter adds to it."""

    def __init__(self, weight):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, weight.shape[1])), nn.Parameter(torch.randn(weight.shape[0], 2) / 10)

    def forward(self, weight):
        return weight + self.up @ self.down


def parametrized(path):
    def change(model):
        for block in model.blocks:
            layer = block.get_submodule(path)
            parametrize.register_parametrization(layer, "weight", Low(layer.weight))

    return change


def weight_norm(model):
    for block in model.blocks:
        parametrizations.weight_norm(block.attn.qkv)
        parametrizations.weight_norm(block.attn.proj)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.parametrizations.weight.original0.mul_(1.3)


def pruned(model):
    """torch.nn.utils.prune makes the weight anew in a hook before each forward."""
    for block in model.blocks:
        prune.l1_unstructured(block.attn.qkv, "weight", 0.4)
        prune.l1_unstructured(block.mlp.fc1, "weight", 0.4)


def other_weights(model, **how):
    torch.manual_seed(9)
    other = make("plain").state_dict()
    own = {name: p for name, p in model.state_dict().items() if name in other and p.shape == other[name].shape}
    model.load_state_dict({name: torch.randn_like(p) * p.std() + p for name, p in own.items()}, strict=False, **how)


def scaled_data(model):
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(1.2)
            block.attn.qkv.weight.data = block.attn.qkv.weight.data + 0.01


def new_parameter(model):
    model.blocks[1].attn.qkv.weight = nn.Parameter(torch.randn(144, 48) * 0.2)
    model.blocks[3].attn.qkv.bias = None


def other_mlps(model):
    for block in model.blocks:
        block.mlp = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))


def fewer_heads(model):
    """As head pruning does it by hand: the attention of one block keeps one of its heads."""
    attn = model.blocks[1].attn
    attn.num_heads = 1
    if hasattr(attn, "attn_dim"):
        attn.attn_dim = 16
    attn.qkv, attn.proj = nn.Linear(48, 48), nn.Linear(16, 48)


WEIGHTS = {
    "load_state_dict": other_weights,
    "load_state_dict(assign=True)": partial(other_weights, assign=True),
    "data": scaled_data,
    "new parameters": new_parameter,
    "low rank adapters": low_rank,
    "parametrize qkv": parametrized("attn.qkv"),
    "parametrize proj": parametrized("attn.proj"),
    "parametrize fc1": parametrized("mlp.fc1"),
    "weight_norm": weight_norm,
    "prune": pruned,
    "other MLPs": other_mlps,
    "one head": fewer_heads,
    "another norm1": set_to("blocks.3.norm1", lambda: nn.LayerNorm(48)),
    "no ls1": set_to("blocks.1.ls1", lambda: nn.Linear(48, 48)),
    "another norm_pre": set_to("norm_pre", lambda: nn.LayerNorm(48)),
    "double": lambda model: model.double(),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "share_memory": lambda model: model.share_memory(),
    "checkpointing": lambda model: model.set_grad_checkpointing(),
}


def ask(model, x):
    """Return the answer to images in the model's own dtype."""
    return run(model, x.to(next(model.parameters()).dtype))


def answers_as_changed_before(method, family, change):
    """Check that a change after `reduce_` gives what it gives before, with all rows computed, or that it is refused.

    Where `reduce_` refuses the changed model, it must give what the same change of a model with all rows computed gives.

    Returns:
        True if it is right, False if it is refused.
    """
    x, after = images(family, 2), reduced(method, family)
    run(after, x)
    learned = after.laconic.state_dict()
    before, _ = answer_or_refusal(lambda: reduced(method, family, changed(make(family), change), compute="all"))
    if before is None:
        before, refusal = answer_or_refusal(lambda: changed(reduced(method, family, compute="all"), change))
    _, refusal = answer_or_refusal(lambda: changed(after, change))
    if refusal is not None:
        return False
    before.laconic.load_state_dict(learned)
    expected, refusal = answer_or_refusal(partial(ask, before, x))
    if refusal is not None:
        refused(partial(ask, after, x), kinds=(ValueError, RuntimeError))
        return False
    right = right_or_refused(partial(ask, after, x), expected)
    if right:  # and so are the features that are kept, in the head
        kept = features(after, x.to(expected.dtype))
        ask(after, -x)
        right_or_refused(lambda: after.forward_head(kept).detach(), expected)
    return right


@cases("plain", "gap", "siglip", kinds=("ats", "topk"))
def test_changes_of_the_head(method, family):
    for name, change in {**HEADS, **(WITH_CLASS_TOKEN if family == "plain" else {})}.items():
        if family == "siglip" and name.startswith(("global_pool", "pool_include")):
            continue  # its pooling is its attention pool
        right = answers_as_changed_before(method, family, change)
        if name in (
            "reset_classifier(0)",
            "reset_classifier(5)",
            "another head",
            "no head",
            "another norm",
            "reset_classifier(0, '')",
        ):
            assert right, name


@cases("plain", "gap", kinds=("dtps", "topk"))
def test_changes_of_weights_and_modules(method, family):
    for name, change in WEIGHTS.items():
        assert answers_as_changed_before(method, family, change), name


@pytest.mark.parametrize("method", ["avit"])
def test_an_answer_in_the_class_token_needs_one_that_is_read(method):
    for change in (reset(5, "avg"), set_to("global_pool", "avg")):
        model = changed(reduced(method), change)
        refused(partial(run, model, images("plain")), "class token")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@of_methods()
def test_another_dtype(method, dtype):
    x, after, before = images("plain", 2).to(dtype), reduced(method), make("plain").to(dtype)
    learned = after.laconic.state_dict()
    after.to(dtype)
    laconic.reduce_(before, method, keep=rate(method), at=at(method))
    before.laconic.load_state_dict(learned)
    got = run(after, x)
    assert got.dtype == dtype
    assert_close(got, run(before, x), 1e-4 if dtype == torch.float64 else 5e-2)


# ------------------------------------------------------------------------------------------------ images of another shape
SHAPES = ((192, 48), (48, 192), (96, 128), (64, 64))


@pytest.mark.parametrize("way", ["set_input_size", "dynamic_img_size"])
@cases("plain", "gap", kinds=(*READ_BY_PLACE, "sit", "tome", "topk"))
def test_images_of_another_shape(method, family, way):
    """Also where they have as many patches: logits, provenance and maps are as if the model had been made for them."""
    for height, width in SHAPES:
        x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(4))
        dynamic = {"dynamic_img_size": True} if way == "dynamic_img_size" else {}
        after = reduced(method, family, make(family, **dynamic))
        if not dynamic:
            after.set_input_size(img_size=(height, width))
        base = make(family)
        base.set_input_size(img_size=(height, width))
        before, refusal = answer_or_refusal(partial(reduced, method, family, base))
        if method in FIXED and (height * width) // 256 != 36:
            refused(partial(run, after, x), kinds=(ValueError, RuntimeError))
            continue
        assert refusal is None
        expected = run(before, x)
        if not right_or_refused(partial(run, after, x), expected, of=f"{height} x {width}"):
            assert method not in ("topk", "tome", "ats")
            continue
        grid = (height // 16, width // 16)
        same_provenance(laconic.provenance(after), laconic.provenance(before))
        assert laconic.provenance(after).grid == laconic.provenance(after).final.grid == grid
        maps = [laconic.restore_dense(m, features(m, x), layout="NCHW") for m in (after, before)]
        assert maps[0].shape[2:] == grid
        assert_close(*maps)


@pytest.mark.parametrize("method", ["tome", "topk", "spatial-pool"])
def test_images_of_several_shapes_in_turns(method):
    """Features of each are laid out on the grid of their own images."""
    model = reduced(method, model=make("plain", dynamic_img_size=True))
    kept = []
    for height, width in (*SHAPES, (96, 96)):
        x = torch.randn(2, 3, height, width)
        kept.append((features(model, x), run(model, x), (height // 16, width // 16)))
    for f, answer, grid in kept[::-1]:
        assert laconic.provenance(f).grid == grid
        assert laconic.restore_dense(model, f, layout="NCHW").shape[2:] == grid
        assert_close(model.forward_head(f).detach(), answer)


@of_methods(("tome", "topk", "sit", "patch-slimming"))
def test_smaller_patches(method):
    base, after = make("plain"), reduced(method)
    after.set_input_size(patch_size=8)
    base.set_input_size(patch_size=8)
    x = images("plain", 2)
    if method in FIXED:
        refused(partial(run, after, x), kinds=(ValueError, RuntimeError))
    else:
        right_or_refused(partial(run, after, x), run(reduced(method, model=base), x))


# ------------------------------------------------------------------------------------------------ blocks
def cut_to(k):
    def change(model):
        model.blocks = model.blocks[:k]

    return change


def delete_last(model):
    del model.blocks[-1]


def append_one(model):
    model.blocks.append(fill(copy.deepcopy(make("plain").blocks[0])))


def reverse(model):
    model.blocks = nn.Sequential(*reversed(model.blocks))


def fresh_block(model):
    model.blocks[2] = fill(copy.deepcopy(make("plain").blocks[0]))


def leave_out_the_first(model):
    model.blocks = model.blocks[1:]


def leave_out_one_between(model):
    model.blocks = nn.Sequential(model.blocks[0], *model.blocks[2:])


def repeat_one(model):
    """The same block twice; in a model that is not reduced yet, a copy of it."""
    again = model.blocks[1] if hasattr(model, "laconic") else copy.deepcopy(model.blocks[1])
    model.blocks = nn.Sequential(*model.blocks[:2], again, *model.blocks[2:])


CUTS = {"[:3]": (3, cut_to(3)), "[:2]": (2, cut_to(2)), "del [-1]": (3, delete_last)}
# how the blocks are put together again, and where those that reduce are then
REBUILT = {
    "append": (append_one, {1: 1, 2: 2, 3: 3}),
    "reverse": (reverse, {3: 0, 2: 1, 1: 2}),
    "a fresh block": (fresh_block, {1: 1, 2: 2, 3: 3}),
    "the first left out": (leave_out_the_first, {1: 0, 2: 1, 3: 2}),
    "one between left out": (leave_out_one_between, {2: 1, 3: 2}),
    "one twice": (repeat_one, {1: 1, 2: 3, 3: 4}),
}


@cases("plain", "gap", kinds=FEW)
@pytest.mark.parametrize("way", CUTS)
def test_blocks_cut_off(method, family, way):
    """The blocks that are left do what they did, and the tokens that they leave are counted by their sizes."""
    depth, cut = CUTS[way]
    x, after = images(family, 2), reduced(method, family)
    run(after, x)
    cut(after)
    base = make(family)
    cut(base)
    at = tuple(block for block in AT if block < depth)
    before, refusal = answer_or_refusal(partial(reduced, method, family, base, at=at, compute="all"))
    assert refusal is None
    own = after.laconic.state_dict()
    before.laconic.load_state_dict({name: own[name] for name in before.laconic.state_dict()})
    expected = run(before, x)
    if right_or_refused(partial(run, after, x), expected):
        kept = features(after, x)
        run(after, -x)
        assert_close(after.forward_head(kept).detach(), expected)
        same_provenance(laconic.provenance(kept), laconic.provenance(features(before, x)))
        right_or_refused(partial(laconic.restore_dense, after, kept), laconic.restore_dense(before, features(before, x)))


@cases("plain", kinds=("dtps", "tome", "topk"))
@pytest.mark.parametrize("way", REBUILT)
def test_blocks_put_together_again(method, family, way):
    """Reducers belong to their blocks: they keep as many tokens as before, or at the same rates, or all of it is refused."""
    change, places = REBUILT[way]
    x, after = images(family, 2), reduced(method, family)
    counts, learned = after.laconic.counts(36), after.laconic.state_dict()
    changed(after, change)
    got, refusal = answer_or_refusal(partial(run, after, x))
    if refusal is not None:
        return
    right = [{"at": tuple(sorted(places.values()))}]
    if method not in VARIABLE and way != "reverse":
        right.append({"schedule": laconic.Schedule.keep_counts({new: counts[old] for old, new in places.items()})})
    differences = []
    for how in right:
        before = reduced(method, family, changed(make(family), change), compute="all", **how)
        for old, new in places.items():
            prefix = f"reducers.{old}."
            own = {name.removeprefix(prefix): value for name, value in learned.items() if name.startswith(prefix)}
            before.laconic.reducers[str(new)].load_state_dict(own)
        differences.append(off(got, run(before, x)))
    assert min(differences) <= 1e-4, differences


@cases("plain", "gap", kinds=FEW)
def test_pruning_of_intermediate_layers(method, family):
    x, after, base = images(family, 2), reduced(method, family), make(family)
    base.prune_intermediate_layers(2)
    _, refusal = answer_or_refusal(partial(after.prune_intermediate_layers, 2))
    if refusal is None:
        before = reduced(method, family, base, at=at(method), compute="all")
        right_or_refused(partial(run, after, x), run(before, x))
    else:
        assert_close(run(after, x), run(reduced(method, family), x))  # a refused call leaves the model as it was


@cases("plain", "gap", kinds=("dtps", "tome", "topk"))
@pytest.mark.parametrize("block", range(4))
def test_attention_of_one_block_that_is_not_fused(method, family, block):
    """The answer stays what it was, or it is said that the method cannot see this attention."""
    after, x = reduced(method, family), images(family, 2)
    expected = run(after, x)
    after.blocks[block].attn.fused_attn = False
    right_or_refused(partial(run, after, x), expected)


@cases("plain", kinds=FEW)
def test_patches_that_are_dropped_in_training(method, family):
    """timm's patch dropout, put in later: tokens are no longer the prefix and a grid."""
    model, x = reduced(method, family), images(family, 2)
    expected = run(model, x)
    model.patch_drop = PatchDropout(0.5, num_prefix_tokens=1).eval()
    assert_close(run(model, x), expected)
    refused(partial(run, model.train(), x), kinds=(ValueError, RuntimeError))


@cases("plain", kinds=FEW)
def test_prompts_that_are_put_in_later(method, family):
    model, x = reduced(method, family), images(family, 2)
    prompts = torch.randn(1, 4, 48)

    def insert(self):
        own = self._pos_embed
        self._pos_embed = lambda x: (lambda y: torch.cat([y[:, :1], prompts.expand(len(y), -1, -1), y[:, 1:]], 1))(own(x))

    insert(model)
    refused(partial(run, model, x), "num_prefix_tokens")
    model.num_prefix_tokens = 5
    base = make(family)
    insert(base)
    base.num_prefix_tokens = 5
    before = reduced(method, family, base, compute="all")
    if right_or_refused(partial(run, model, x), run(before, x)):
        assert laconic.provenance(model).final.where.shape == (2, 36)


# ------------------------------------------------------------------------------------------------ changes of one module
INSIDE = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp", "mlp.fc1", "mlp.fc2")
# block 1 has nothing to do, block 2 reduces, block 3 is the last
PATHS = ("blocks.1.attn.qkv", *(f"blocks.{i}.{name}" for i in (2, 3) for name in INSIDE), "norm", "head", "patch_embed")


def factors(x):
    """Return a factor for every channel: norms do not undo it."""
    return torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)


def scaled(out):
    return out * factors(out)


@contextmanager
def weights(model, path):
    """The weights of what comes last inside: the same function of the input, and nothing to be overlooked."""
    inside = {"attn": "attn.proj", "mlp": "mlp.fc2", "patch_embed": "patch_embed.proj"}.get(path.split(".")[-1])
    layer = model.get_submodule(path if inside is None else ".".join([*path.split(".")[:-1], inside]))
    old = [p.detach().clone() for p in layer.parameters()]
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(factors(p.transpose(0, -1)).view(-1, *[1] * (p.dim() - 1)))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(layer.parameters(), old, strict=True):
                p.copy_(value)


@contextmanager
def override(model, path):
    """``module.forward = ...``, as offloading hooks and adapters made by hand are put in."""
    module = model.get_submodule(path)
    own, there = module.forward, module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: scaled(own(*args, **kwargs))
    try:
        yield
    finally:
        if there is None:
            del module.forward
        else:
            module.forward = there


class Scaling:
    """In front of a module's class."""

    def forward(self, *args, **kwargs):
        return scaled(super().forward(*args, **kwargs))


@contextmanager
def class_swap(model, path):
    """``module.__class__ = ...``, as FSDP2 and quantisation do it."""
    module = model.get_submodule(path)
    own = type(module)
    module.__class__ = type("Scaling" + own.__name__, (Scaling, own), {})
    try:
        yield
    finally:
        module.__class__ = own


class Around(nn.Module):
    """A module in the place of another, which it calls."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs))


@contextmanager
def replacement(model, path):
    *parent, name = path.split(".")
    parent, own = model.get_submodule(".".join(parent)), model.get_submodule(path)
    setattr(parent, name, Around(own))
    try:
        yield
    finally:
        setattr(parent, name, own)


@contextmanager
def hook(model, path, **how):
    handle = model.get_submodule(path).register_forward_hook(lambda *args: scaled(args[-1]), **how)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def global_hook(model, path):
    target = model.get_submodule(path)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: scaled(out) if module is target else None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pre_hook_of_the_weight(model, path):
    """As torch's older weight_norm: the weights are set before each forward of the module."""
    module = model.get_submodule(path)
    inner = weights(model, path)

    def enter(*args):
        inner.__enter__()

    def leave(*args):
        nonlocal inner
        inner.__exit__(None, None, None)
        inner = weights(model, path)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


WAYS = {
    "weights": weights,
    "override": override,
    "class swap": class_swap,
    "replacement": replacement,
    "hook": hook,
    "hook with keywords": partial(hook, with_kwargs=True, always_call=True, prepend=True),
    "global hook": global_hook,
    "weights set in a hook": pre_hook_of_the_weight,
}


@functools.cache
def with_all_rows(method, family, at):
    """Return a model that computes all rows."""
    return reduced(method, family, at=at, compute="all")


@functools.cache
def changed_by_weights(method, family, at, path):
    """Return what a model with changed weights answers, with all rows computed."""
    model = with_all_rows(method, family, at)
    with weights(model, path):
        return run(model, images(family, 2))


@cases("plain", "gap", kinds=("ats", "topk"))
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_change_a_module_is_as_changed_weights(method, family, way):
    """A module may be changed by overrides, hooks, wrappers and classes; each is called, and taken away again it is gone."""
    at, x = early(method), images(family, 2)
    model = reduced(method, family, at=at)
    plain = run(model, x)
    for path in PATHS:
        if family == "gap" and path == "norm":
            continue  # it is an identity
        expected = changed_by_weights(method, family, at, path)
        assert off(expected, plain) > 1e-3, path
        with WAYS[way](model, path):
            assert_close(run(model, x), expected, of=path)
        assert_close(run(model, x), plain, of=f"after {path}")


@cases("plain", "gap", kinds=("dtps", "tome", "topk"))
@pytest.mark.parametrize("path", ["blocks.1.attn.qkv", "blocks.2.attn.proj", "blocks.3.norm1", "blocks.3.mlp.fc2"])
def test_changed_weights_are_as_before_it_was_reduced(method, family, path):
    """What the other ways are compared with."""
    at, x, base = early(method), images(family, 2), make(family)
    with weights(base, path):
        expected = run(reduced(method, family, base, at=at), x)
    assert_close(changed_by_weights(method, family, at, path), expected)


@cases("plain", "gap", kinds=("dtps", "topk"))
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("weights", "weights set in a hook")])
def test_every_way_to_change_a_whole_block(method, family, way):
    """What a block gives is changed on its way to the next one, or the change is refused."""
    at, x = early(method), images(family, 2)
    model, whole = reduced(method, family, at=at), reduced(method, family, at=at, compute="all")
    plain = run(model, x)
    for path in ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks"):
        handle = whole.get_submodule(path).register_forward_hook(lambda module, args, out: scaled(out))
        expected = run(whole, x)
        handle.remove()
        assert off(expected, plain) > 1e-3, path
        with WAYS[way](model, path):
            right = right_or_refused(partial(run, model, x), expected, of=path)
            assert right or way not in ("hook", "hook with keywords", "global hook"), path
        assert_close(run(model, x), plain, of=f"after {path}")


# ------------------------------------------------------------------------------------------------ methods of the model
def by_hand(model, x, where):
    """Return the answer step by step, with the pooled features or the answer scaled; pooling is linear in the features."""
    with torch.no_grad():
        pooled = model.pool(model.forward_features(x))
        if where == "answer":
            return scaled(model.head(model.fc_norm(pooled)))
        return model.head(model.fc_norm(scaled(pooled)))


SCALES = {"forward": "answer", "forward_head": "answer", "pool": "pooled", "forward_features": "pooled"}


@cases("plain", "gap", kinds=("dtps", "tome", "topk"))
@pytest.mark.parametrize("name", SCALES)
def test_methods_of_the_model_that_are_wrapped_on_the_instance(method, family, name):
    at, x = early(method), images(family, 2)
    model, whole = reduced(method, family, at=at), reduced(method, family, at=at, compute="all")
    plain = run(model, x)
    expected, own = by_hand(whole, x, SCALES[name]), getattr(model, name)
    assert off(expected, plain) > 1e-3
    setattr(model, name, lambda *args, **kwargs: scaled(own(*args, **kwargs)))
    right_or_refused(partial(run, model, x), expected)
    delattr(model, name)
    assert_close(run(model, x), plain)


@cases("plain", "gap", kinds=FEW)
def test_a_head_of_its_own_that_reads_all_tokens(method, family):
    """``model.forward_head = ...`` after `reduce_`: it gets every token."""
    at, x = early(method), images(family, 2)
    model, whole, seen = reduced(method, family, at=at), reduced(method, family, at=at, compute="all"), []

    def head(f, pre_logits=False):
        seen.append(f.shape)
        return model.head(f.amax(1) + f[:, -1])

    expected = (lambda f: whole.head(f.amax(1) + f[:, -1]).detach())(features(whole, x))
    model.forward_head = head
    if right_or_refused(partial(run, model, x), expected):
        assert seen == [features(whole, x).shape]


@cases("plain", "gap", kinds=("dtps", "tome", "topk"))
@pytest.mark.parametrize(
    "name",
    [
        *("forward_features", "norm.forward", "forward_head", "fc_norm.forward", "blocks.forward"),
        *("blocks.3.mlp.forward", "blocks.3.norm2.forward", "blocks.3.attn.forward", "blocks.2.attn.qkv.forward"),
    ],
)
def test_a_wrapper_that_records_sees_all_rows(method, family, name):
    at, x = early(method), images(family, 2)
    seen = []
    for rows in ("all", None):
        model, taken = reduced(method, family, at=at, compute=rows), []
        *path, last = name.split(".")
        owner = model.get_submodule(".".join(path))
        own = getattr(owner, last)

        def record(*args, own=own, taken=taken, **kwargs):
            out = own(*args, **kwargs)
            taken.append((args[0], out))
            return out

        setattr(owner, last, record)
        taken.append((run(model, x),))
        seen.append(taken)
    assert [shapes(one) for one in seen[1]] == [shapes(one) for one in seen[0]]
    for mine, theirs in zip(*seen, strict=True):
        assert_close(mine, theirs)


# ------------------------------------------------------------------------------------------------ hooks fire
def shape_of(value):
    """Return the shapes of tensors in what a hook was given."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return [shape_of(one) for one in value if one is not None] if isinstance(value, tuple | list) else None


def forward_hook(module, record):
    return module.register_forward_hook(lambda m, args, out: record(args, out))


def forward_pre_hook(module, record):
    return module.register_forward_pre_hook(lambda m, args: record(args))


def with_keywords(module, record):
    return module.register_forward_hook(lambda m, args, kwargs, out: record(args, out), with_kwargs=True, always_call=True)


def pre_with_keywords(module, record):
    return module.register_forward_pre_hook(lambda m, args, kwargs: record(args), with_kwargs=True, prepend=True)


def backward_hook(module, record):
    return module.register_full_backward_hook(lambda m, given, got: record(given, got))


def backward_pre_hook(module, record):
    return module.register_full_backward_pre_hook(lambda m, got: record(got))


def tensor_hook(module, record):
    return module.register_forward_hook(lambda m, args, out: out.register_hook(record) and None)


def only(target, record):
    return lambda m, *args: record(*args) if m is target else None


def global_forward_hook(module, record):
    return nn.modules.module.register_module_forward_hook(only(module, record))


def global_pre_hook(module, record):
    return nn.modules.module.register_module_forward_pre_hook(only(module, record))


def global_backward_hook(module, record):
    return nn.modules.module.register_module_full_backward_hook(only(module, record))


def global_backward_pre_hook(module, record):
    return nn.modules.module.register_module_full_backward_pre_hook(only(module, record))


HOOKS = (
    forward_hook,
    forward_pre_hook,
    with_keywords,
    pre_with_keywords,
    backward_hook,
    backward_pre_hook,
    tensor_hook,
    global_forward_hook,
    global_pre_hook,
    global_backward_hook,
    global_backward_pre_hook,
)


def fired(model, x, paths, hook):
    """Return what a hook at each of these modules saw in a forward pass (and a backward pass), in evaluation mode."""
    seen = {path: [] for path in paths}
    handles = [
        hook(model.get_submodule(path), lambda *values, path=path: seen[path].append([shape_of(v) for v in values]))
        for path in paths
    ]
    backward = hook is tensor_hook or "backward" in hook.__name__
    try:
        with torch.set_grad_enabled(backward):
            answer = model(x)
            if backward:
                answer.square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


# what does nothing in these models has the same hooks as what does
QUIET = ("attn.k_norm", "attn.norm", "attn.proj_drop", "drop_path1", "ls2", "drop_path2", "mlp.norm", "mlp.drop1", "mlp.drop2")


@cases("plain", "gap", kinds=("topk",))
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # global hooks fire for the first layers, too
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_every_hook_on_every_submodule_fires(method, family, hook):
    """Each hook fires as often as on the unreduced model, on all the rows that ``compute="all"`` gives; one hook at a time."""
    at, x = early(method), images(family, 1)
    base, model, whole = make(family), reduced(method, family, at=at), reduced(method, family, at=at, compute="all")
    inside = [name for name, _ in base.blocks[0].named_modules() if EVERY or name not in QUIET]
    paths = [f"blocks.{i}.{name}".rstrip(".") for i in (2, 3) for name in inside] + ["blocks", "norm", "fc_norm"]
    often, rows = fired(base, x, paths, hook), fired(whole, x, paths, hook)
    wrong = {}
    for path in paths if EVERY or "global" not in hook.__name__ else paths[::3]:
        got = fired(model, x, [path], hook)[path]
        if len(got) != len(often[path]) or got != rows[path]:
            wrong[path] = f"fired {len(got)} times, not {len(often[path])}; saw {got}, not {rows[path]}"
    assert not wrong, "\n".join(f"{path} {told}" for path, told in wrong.items())


@cases("plain", "gap", kinds=("tome", "topk"))
def test_hooks_on_weights_see_whole_gradients(method, family):
    at, x, found = early(method), images(family, 2), []
    for rows in ("all", None):
        model, seen = reduced(method, family, at=at, compute=rows), {}
        for name, p in model.named_parameters():
            p.register_hook(lambda g, name=name, seen=seen: seen.__setitem__(name, g.clone()))
            p.register_post_accumulate_grad_hook(
                lambda p, name=name, seen=seen: seen.__setitem__(f"{name} kept", p.grad.clone())
            )
        model(x).square().sum().backward()
        found.append(seen)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        if gradient.abs().max() > 1e-6:
            assert_close(found[1][name], gradient, 1e-3, name)


# ------------------------------------------------------------------------------------------------ other tools
@cases("plain", "gap", kinds=FEW)
def test_offloading_by_accelerate(method, family):
    accelerate = pytest.importorskip("accelerate")
    model, x = reduced(method, family), images(family, 2)
    expected = run(model, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    right_or_refused(partial(run, model, x), expected)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    model.to("cpu")
    assert_close(run(model, x), expected)


@cases("plain", kinds=FEW)
def test_hooks_of_accelerate_that_change_the_output(method, family):
    accelerate = pytest.importorskip("accelerate")

    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return scaled(output)

    model, x = reduced(method, family, at=early(method)), images(family, 2)
    for path in PATHS:
        layer = model.get_submodule(path)
        accelerate.hooks.add_hook_to_module(layer, Doubling())
        assert_close(run(model, x), changed_by_weights(method, family, early(method), path), of=path)
        accelerate.hooks.remove_hook_from_module(layer)


@pytest.mark.parametrize("save", [None, ["laconic"]])
@of_methods(("dynamicvit", "dtps", "topk"))
def test_peft(method, save):
    """LoRA on the backbone, what the method learns trained with it: every copy that is trained is the one that runs."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=save, init_lora_weights=False)
    x, plain = images("plain", 2), reduced(method)
    learns = bool(list(plain.laconic.parameters()))
    model = peft.get_peft_model(reduced(method), config).train()
    (model(x).square().sum() + 2 * sum(laconic.losses(model).values())).backward()
    trained = {n: p for n, p in model.named_parameters() if "reducers" in n and p.requires_grad}
    assert bool(trained) == (learns and save is not None)
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    model.eval()
    before = run(model, x)
    if trained:
        with torch.no_grad():
            for p in trained.values():
                p.add_(torch.randn_like(p))
        assert off(run(model, x), before) > 1e-4
    with model.disable_adapter():
        assert_close(run(model, x), run(plain, x))
    adapted = run(model, x)
    if save is None:
        assert_close(run(model.merge_and_unload(), x), adapted, 1e-3)


@of_methods(("dynamicvit", "tome"))
def test_peft_first(method):
    """A model that PEFT has wrapped already is reduced inside, or it is refused."""
    peft = pytest.importorskip("peft")
    x, config = images("plain", 2), peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    torch.manual_seed(5)
    first = peft.get_peft_model(make("plain"), config)
    state = {n: p for n, p in first.named_parameters() if "lora_" in n}
    later = peft.get_peft_model(reduced(method), config)
    later.load_state_dict(state, strict=False)
    _, refusal = answer_or_refusal(lambda: laconic.reduce_(first, method, keep=0.6, at=AT))
    if refusal is None:
        inner = first.get_base_model()
        inner.laconic.load_state_dict(reduced(method).laconic.state_dict())
        assert_close(run(first.eval(), x), run(later.eval(), x))


def replica_of(network, factor):
    """Return a replica as torch.nn.parallel.replicate makes them, with weights of its own."""
    index = {module: i for i, module in enumerate(network.modules())}
    copies = [module._replicate_for_data_parallel() for module in index]
    for module, i in index.items():
        for name, child in module._modules.items():
            copies[i]._modules[name] = copies[index[child]] if child is not None else None
        for name, p in module._parameters.items():
            if p is not None:
                setattr(copies[i], name, p.detach() * factor)
    return copies[0]


def with_weights_times(model, factor):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


@cases("plain", "gap")
def test_replicas_of_data_parallel(method, family):
    """Each runs its own weights, at once with the others, and the model has its own left."""
    model, xs = reduced(method, family), batches(family)
    expected = run(model, xs[0])
    wanted = [run(with_weights_times(reduced(method, family), factor), x) for factor, x in zip((1.3, 0.8), xs, strict=True)]
    replicas = [replica_of(model, factor) for factor in (1.3, 0.8)]
    for replica, x, answer in zip(replicas, xs, wanted, strict=True):
        assert_close(run(replica, x), answer)
    with torch.no_grad():
        for _ in range(5):
            answers = parallel_apply(replicas, xs)
            for got, answer in zip(answers, wanted, strict=True):
                assert_close(got, answer)
    assert_close(run(model, xs[0]), expected)


def parallel_apply(replicas, xs):
    """Run every replica in a thread of its own, as torch.nn.parallel.parallel_apply does on GPUs."""
    with ThreadPoolExecutor(len(replicas)) as pool:
        return list(pool.map(run, replicas, xs))


@cases("plain", "gap")
def test_functional_calls(method, family):
    """torch.func's call with other weights uses these; its gradients are those of a backward pass."""
    model, x = reduced(method, family), images(family, 2)
    expected = run(with_weights_times(reduced(method, family), 1.3), x)
    plain, state = run(model, x), {name: p.detach() * 1.3 for name, p in model.named_parameters()}
    assert_close(functional_call(model, state, (x,)).detach(), expected)
    assert_close(run(model, x), plain)
    model(x).square().mean().backward()
    own = {name: p.detach() for name, p in model.named_parameters()}
    got, refusal = answer_or_refusal(lambda: torch.func.grad(lambda s: functional_call(model, s, (x,)).square().mean())(own))
    if refusal is None:
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.abs().max() > 1e-6:
                assert_close(got[name], p.grad, 1e-3, name)


@cases("plain", "gap", kinds=FEW)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(method, family):
    """Over images, and over the weights of an ensemble; numbers that depend on the data cannot be had there, as torch says."""
    if method in VARIABLE:
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(lambda image: reduced(method, family)(image.unsqueeze(0))[0])(images(family, 2))
        return
    model, x = reduced(method, family), images(family, 2)
    plain = run(model, x)
    right_or_refused(lambda: torch.func.vmap(lambda image: model(image.unsqueeze(0))[0])(x).detach(), plain)
    models = [with_weights_times(reduced(method, family), factor) for factor in (1.0, 1.2)]
    states = [dict(one.named_parameters()) for one in models]
    stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
    right_or_refused(
        lambda: torch.func.vmap(lambda state: functional_call(model, state, (x,)))(stacked).detach(),
        torch.stack([run(one, x) for one in models]),
    )
    assert_close(run(model, x), plain)


@cases("plain", kinds=("ats", "dtps", "spatial-pool", "tome"))
@pytest.mark.unchecked  # sizes are tensors while it is traced
def test_traced_by_torch_jit(method, family):
    """A trace answers for other images what the model answers; also where every image keeps a number of its own."""
    model, (x, y) = reduced(method, family), batches(family)
    expected = run(model, y)

    def trace():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.jit.trace(model, x, check_trace=False)(y)

    right_or_refused(trace, expected)
    assert_close(run(model, y), expected)


class Sharded:
    """In front of a module's class, as FSDP2's FSDPModule is: it changes nothing."""


def like_fsdp(model):
    """Swap the classes of all blocks and of the model, as fully_shard does."""
    for module in (*model.blocks, model):
        module.__class__ = type("FSDP" + type(module).__name__, (Sharded, type(module)), {})


@cases("plain", "gap", kinds=FEW)
def test_classes_swapped_as_fsdp_does(method, family):
    model, x = reduced(method, family), images(family, 2)
    expected = run(model, x)
    like_fsdp(model)
    assert_close(run(model, x), expected)
    assert laconic.provenance(model).stages
    base = make(family)
    like_fsdp(base)
    before, refusal = answer_or_refusal(lambda: reduced(method, family, base))
    if refusal is None:
        assert_close(run(before, x), expected)


@cases("plain", "gap", kinds=FEW)
def test_blocks_wrapped_for_checkpointing(method, family):
    """torch's checkpoint_wrapper puts a module around each block."""
    model, whole, x = reduced(method, family), reduced(method, family), images(family, 2)
    expected = run(model, x)
    for i in range(4):
        model.blocks[i] = checkpoint_wrapper(model.blocks[i])
    if right_or_refused(partial(run, model, x), expected):
        found = []
        for one in (model, whole):
            torch.manual_seed(3)
            one.train()
            sum(one(view).square().mean() for view in (x, -x)).backward()
            found.append([p.grad for p in one.blocks.parameters() if p.grad is not None])
        for mine, theirs in zip(*found, strict=True):
            if theirs.abs().max() > 1e-6:
                assert_close(mine, theirs, 1e-3)


@cases("plain", "gap", kinds=FEW)
def test_autocast_wrapped_around_the_forward(method, family):
    """accelerate's mixed precision wraps ``model.forward`` on the instance, after or before `reduce_`."""
    x = images(family, 2)
    after, base = reduced(method, family), make(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(after, x)
    for model in (after, base):
        own = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(own)
    assert off(run(after, x), expected) < 5e-2
    before, refusal = answer_or_refusal(lambda: reduced(method, family, base))
    if refusal is None:
        assert off(run(before, x), expected) < 5e-2


@cases("plain", kinds=("tome",))
@pytest.mark.slow
@pytest.mark.unchecked
@pytest.mark.filterwarnings("ignore")
def test_blocks_compiled_one_by_one(method, family):
    """Regional compilation: right, or it is said that the whole model must be compiled."""
    model, x = reduced(method, family), images(family, 2)
    expected = run(model, x)
    for block in model.blocks:
        block.compile(backend="eager")
    right_or_refused(partial(run, model, x), expected)


# ------------------------------------------------------------------------------------------------ restore_ after changes
@cases("plain", "gap", kinds=FEW)
def test_restore_after_changes(method, family):
    """What was changed stays, and the rest is as it was."""
    x = images(family, 2)
    for name in ("reset_classifier(5)", "global_pool = ''", "another norm"):
        model, base = changed(reduced(method, family), HEADS[name]), changed(make(family), HEADS[name])
        run(model, x)
        laconic.restore_(model)
        assert_close(run(model, x), run(base, x), 1e-6, name)
    model, base = changed(reduced(method, family), low_rank), changed(make(family), low_rank)
    laconic.restore_(model)
    assert_close(run(model, x), run(base, x), 1e-6)
