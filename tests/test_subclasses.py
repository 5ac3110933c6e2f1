"""Classes derived from timm's that handle tokens in a way of their own: refused, or right."""

from functools import partial

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

import laconic
from families import AT, EVERY, METHODS, VARIABLE, at, fill, images, rate
from kinds import (
    MERGES,
    answer_or_refusal,
    assert_close,
    batches,
    early,
    features,
    of_methods,
    off,
    reduced,
    refused,
    right_or_refused,
    run,
    same_provenance,
)

SHAPE = dict(img_size=96, patch_size=16, embed_dim=48, num_heads=3, depth=4, num_classes=10)
DROPS = sorted(name for name, row in laconic.methods().items() if row.rest == "dropped" and name not in VARIABLE)
MERGING = sorted(MERGES) if EVERY else ["dtps", "evit", "kmeans", "sit", "tofu", "tome"]
READS_A_MEAN = [name for name in METHODS if not laconic.methods()[name].class_readout]
FEW = ("ats", "dtps", "tome")


def new(kind, **changes):
    """Return a small model of this class with random weights, the same each time."""
    torch.manual_seed(0)
    return fill(kind(**{**SHAPE, **changes}).eval())


def is_left_as_it_was(model, x, expected, attributes):
    """Check that a refused call has changed nothing."""
    assert_close(run(model, x), expected, 0.0)
    assert [(type(module), set(vars(module))) for module in model.modules()] == attributes


def refused_at_once(kind, method, match=None, **changes):
    """Check that `reduce_` refuses a model of this class, and leaves it as it was."""
    model, x = new(kind, **changes), images("plain", 2)
    expected, attributes = run(model, x), [(type(module), set(vars(module))) for module in model.modules()]
    refused(lambda: laconic.reduce_(model, method, keep=rate(method), at=at(method)), match)
    is_left_as_it_was(model, x, expected, attributes)


def last_tokens(model, x):
    """Return what the last block gives: the tokens that are left, with all rows computed."""
    taken = []
    handle = model.blocks[-1].register_forward_hook(lambda module, args, out: taken.append(out))
    run(model, x)
    handle.remove()
    return taken[0]


def one_by_one(model, x):
    """Return the answers of the images of a batch, each run alone."""
    return torch.cat([run(model, image.unsqueeze(0)) for image in x])


# ------------------------------------------------------------------------------------------------ means of their own
class MeanOfPatches(VisionTransformer):
    """As MAE is fine-tuned: its features are the plain mean over the patch tokens."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.own_norm = nn.LayerNorm(kwargs["embed_dim"])

    def forward_features(self, x, **kwargs):
        x = self.blocks(self._pos_embed(self.patch_embed(x)))
        return self.own_norm(x[:, 1:].mean(1))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)

    def by_hand(self, x):
        """Return the answer to the tokens that the last block gives."""
        return self.head(self.own_norm(x[:, 1:].mean(1)))


class ClassTokenAndMean(VisionTransformer):
    """As DINO's linear evaluation: the class token, and beside it the mean of the patch tokens."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = nn.Linear(2 * kwargs["embed_dim"], kwargs["num_classes"])

    def forward_head(self, x, pre_logits=False):
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))

    def by_hand(self, x):
        return self.forward_head(self.norm(x))


class MeanInForward(VisionTransformer):
    """It asks for features and averages them in its forward."""

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 1:].mean(1))

    def by_hand(self, x):
        return self.head(self.norm(x)[:, 1:].mean(1))


class OwnPool(VisionTransformer):
    """Its pooling is a plain mean, whatever ``global_pool`` says."""

    def pool(self, x, pool_type=None):
        return x[:, self.num_prefix_tokens :].mean(1)

    def by_hand(self, x):
        return self.head(self.fc_norm(self.pool(self.norm(x))))


class OwnEva(Eva):
    """The same on another backbone: it has a forward_head of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, use_rot_pos_emb=True, global_pool="token")

    def forward_head(self, x, pre_logits=False):
        return self.head(x[:, 1:].mean(1))

    def by_hand(self, x):
        return self.head(self.norm(x)[:, 1:].mean(1))


class OwnQueries(VisionTransformer):
    """Its head attends to all tokens with a query of its own, by plain products."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.query = nn.Parameter(torch.randn(kwargs["embed_dim"]))

    def forward_head(self, x, pre_logits=False):
        weight = (x @ self.query).softmax(1)
        return self.head((weight.unsqueeze(2) * x).sum(1))

    def by_hand(self, x):
        return self.forward_head(self.norm(x))


MEANS = (MeanOfPatches, ClassTokenAndMean, MeanInForward, OwnPool, OwnEva, OwnQueries)
means = pytest.mark.parametrize("kind", MEANS, ids=lambda kind: kind.__name__)


@means
@pytest.mark.parametrize("method", MERGING)
def test_a_plain_mean_of_merged_tokens_is_refused(kind, method):
    refused_at_once(kind, method)


@means
@pytest.mark.parametrize("method", DROPS if EVERY else ["dynamicvit", "topk"])
def test_a_plain_mean_of_the_tokens_kept_is_right(kind, method):
    model, xs = reduced(method, model=new(kind)), batches("plain")
    answers = [run(model, x) for x in xs]
    for x, answer in zip(xs, answers, strict=True):
        tokens = last_tokens(model, x)
        assert tokens.shape[1] == 1 + laconic.provenance(model).final.size.shape[1] < 37
        assert_close(answer, model.by_hand(tokens).detach())
        assert_close(answer, one_by_one(model, x))
        assert_close(run(model, x), answer)
    assert_close(answers[0], run(reduced(method, model=new(kind), compute="all"), xs[0]))


@means
@pytest.mark.parametrize("method", sorted(set(READS_A_MEAN) - MERGES - set(DROPS)) if EVERY else ["adavit", "ats", "evovit"])
def test_a_plain_mean_where_every_image_has_its_own_number(kind, method):
    """In a batch, what fills up the shorter images must not count: an image's answer is what it is alone, or it is refused."""
    model, _ = answer_or_refusal(lambda: reduced(method, model=new(kind)))
    if model is None:
        refused_at_once(kind, method)
        return
    x = images("plain", 3)
    alone, refusal = answer_or_refusal(partial(one_by_one, model, x))
    if refusal is None:
        right_or_refused(partial(run, model, x), alone)


class OwnPoolOfSizes(VisionTransformer):
    """Its pooling is the usual one by another name, and what its class says."""

    def pool(self, x, pool_type=None):
        return super().pool(x, pool_type) * 1.5


def test_an_answer_of_nan_proves_nothing():
    model = new(MeanInForward)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    refused(lambda: laconic.reduce_(model, "tome", keep=0.6, at=AT), "differs by nan")
    assert laconic.reduce_(model, "topk", keep=0.6, at=AT) is model


class PlainAverage(VisionTransformer):
    """A class that says it averages and has its own plain mean for it."""

    def pool(self, x, pool_type=None):
        return x[:, 1:].mean(1)


def mean_over_patches(model, x):
    """Return the mean of the last tokens, each counted as often as it has patches."""
    tokens = model.norm(last_tokens(model, x))[:, model.num_prefix_tokens :]
    stage = laconic.provenance(model).final
    weight = (stage.size if stage.alive is None else stage.size * stage.alive).unsqueeze(2)
    return (weight * tokens).sum(1) / weight.sum(1)


@of_methods()
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("kind", [OwnPoolOfSizes, PlainAverage], ids=lambda kind: kind.__name__)
def test_a_pool_of_their_own_counts_sizes_or_is_refused(kind, pool, method):
    """A mean is one over patches, not over tokens, or it is refused."""
    if method not in READS_A_MEAN and (pool == "avg" or kind is PlainAverage):
        pytest.skip("it answers in the class token")
    if method == "adavit":
        pytest.skip("patches that its last block skips are back in the features, and skipped in the provenance")
    model, _ = answer_or_refusal(lambda: reduced(method, model=new(kind, global_pool=pool)))
    if model is None:
        assert kind is PlainAverage
        refused_at_once(kind, method, global_pool=pool)
        return
    x = images("plain", 2)
    with torch.no_grad():
        if kind is OwnPoolOfSizes:
            pooled = 1.5 * (mean_over_patches(model, x) if pool == "avg" else model.norm(last_tokens(model, x))[:, 0])
        else:
            pooled = mean_over_patches(model, x)
        expected = model.head(model.fc_norm(pooled))
    right_or_refused(partial(run, model, x), expected)


# ------------------------------------------------------------------------------------------------ prompts and other tokens
class Prompted(VisionTransformer):
    """Visual prompts behind the class token; ``counted``: num_prefix_tokens says so."""

    def __init__(self, counted=False, **kwargs):
        super().__init__(**kwargs, no_embed_class=True)
        self.prompts = nn.Parameter(torch.randn(1, 4, kwargs["embed_dim"]))
        if counted:
            self.num_prefix_tokens += 4

    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), x[:, 1:]], 1)


class PromptedInForward(Prompted):
    """The same, written into forward_features, as VPT's own code has it."""

    def _pos_embed(self, x):
        return VisionTransformer._pos_embed(self, x)

    def forward_features(self, x, **kwargs):
        x = self._pos_embed(self.patch_embed(x))
        x = torch.cat([x[:, :1], self.prompts.expand(len(x), -1, -1), x[:, 1:]], 1)
        return self.norm(self.blocks(x))


class PromptedAtTheEnd(Prompted):
    """Prompts behind the patches: they cannot be counted as a prefix."""

    def _pos_embed(self, x):
        x = VisionTransformer._pos_embed(self, x)
        return torch.cat([x, self.prompts.expand(len(x), -1, -1)], 1)


class Masked(VisionTransformer):
    """As MAE's encoder in pre-training: three quarters of the patches never enter the blocks."""

    def _pos_embed(self, x):
        x = super()._pos_embed(x)
        return torch.cat([x[:, :1], x[:, 1::4]], 1)


@pytest.mark.parametrize("kind", [Prompted, PromptedInForward, PromptedAtTheEnd, Masked], ids=lambda kind: kind.__name__)
@of_methods()
def test_tokens_that_are_no_patches_are_refused(kind, method):
    """They would be dropped and merged as if they were patches; the message names what has to count them."""
    refused_at_once(kind, method, "num_prefix_tokens")


@pytest.mark.parametrize("kind", [Prompted, PromptedInForward], ids=lambda kind: kind.__name__)
@of_methods()
def test_prompts_that_are_counted_are_a_prefix(kind, method):
    """As register tokens of timm's own: nothing touches them, and every patch is accounted for."""
    model = reduced(method, model=new(partial(kind, counted=True)))
    registers = new(VisionTransformer, reg_tokens=4, no_embed_class=True)
    own = dict(model.state_dict())
    own["reg_token"] = own.pop("prompts")
    registers = reduced(method, model=registers)
    registers.load_state_dict(own)
    for x in batches("plain"):
        assert_close(run(model, x), run(registers, x))
        same_provenance(laconic.provenance(model), laconic.provenance(registers))
        assert laconic.provenance(model).final.where.shape == (2, 36)
        assert_close(features(model, x), features(registers, x))
        assert_close(laconic.restore_dense(model, features(model, x)), laconic.restore_dense(registers, features(registers, x)))


class DeepPrompts(VisionTransformer):
    """New prompts in the place of the old ones before every block, as VPT-deep."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.deep = nn.ParameterList([torch.randn(1, 4, kwargs["embed_dim"]) for _ in range(kwargs["depth"])])
        self.num_prefix_tokens += 4

    def forward_features(self, x, **kwargs):
        x = self._pos_embed(self.patch_embed(x))
        x = torch.cat([x[:, :1], self.deep[0].expand(len(x), -1, -1), x[:, 1:]], 1)
        for prompts, block in zip(self.deep, self.blocks, strict=True):
            x = block(torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 5:]], 1))
        return self.norm(x)


@of_methods()
def test_prompts_of_every_block(method):
    """Features that the model changes between its blocks are still those of its forward."""
    plain, x = new(DeepPrompts), images("plain", 2)
    model, _ = answer_or_refusal(lambda: reduced(method, model=new(DeepPrompts)))
    if model is None:
        return
    whole = reduced(method, model=new(DeepPrompts), compute="all")
    expected = run(whole, x)
    assert off(expected, run(plain, x)) > 1e-3
    if right_or_refused(partial(run, model, x), expected):
        assert_close(run(model, x), one_by_one(model, x))
        identity = laconic.reduce_(new(DeepPrompts), method, keep=1.0, at=at(method))
        assert_close(run(identity, x), run(plain, x))


# ------------------------------------------------------------------------------------------------ ways to the features
class Wrapped(VisionTransformer):
    """Its forward goes by a wrapper of forward_features that is made once."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        own = self.forward_features
        self.features = lambda x: own(x) * torch.linspace(0.5, 1.5, kwargs["embed_dim"])

    def forward(self, x):
        return self.forward_head(self.features(x))


class Scaled(VisionTransformer):
    """Its features are those of its base, scaled."""

    def forward_features(self, x, **kwargs):
        return super().forward_features(x, **kwargs) * torch.linspace(0.5, 1.5, self.embed_dim)


class Checkpointed(VisionTransformer):
    """Its forward has all features computed again for the gradient."""

    def forward(self, x):
        f = checkpoint(self.forward_features, x, use_reentrant=False)
        return self.forward_head(f * torch.linspace(0.5, 1.5, self.embed_dim))


class InAutocast(VisionTransformer):
    """Its forward switches autocast off around the features."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            f = self.forward_features(x)
        return self.forward_head(f * torch.linspace(0.5, 1.5, self.embed_dim))


class ByBlocks(VisionTransformer):
    """It runs its blocks itself, in a loop."""

    def forward_features(self, x, **kwargs):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) * torch.linspace(0.5, 1.5, self.embed_dim)


WAYS = (Wrapped, Scaled, Checkpointed, InAutocast, ByBlocks)


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
@of_methods(FEW)
def test_a_forward_that_goes_another_way_to_its_features(kind, method):
    model, xs = reduced(method, model=new(kind), at=early(method)), batches("plain")
    base = new(VisionTransformer)
    with torch.no_grad():
        for p in base.norm.parameters():
            p.mul_(torch.linspace(0.5, 1.5, 48))
    right = reduced(method, model=base, compute="all", at=early(method))
    expected = [run(right, x) for x in xs]
    for x, answer in zip(xs, expected, strict=True):
        assert_close(run(model, x), answer)
    for one in (model, right):
        sum(one(x).square().mean() for x in xs).backward()
    for mine, theirs in zip(model.blocks.parameters(), right.blocks.parameters(), strict=True):
        if theirs.grad is not None and theirs.grad.abs().max() > 1e-6:
            assert_close(mine.grad, theirs.grad, 1e-3)


class WithFeatures(VisionTransformer):
    """It gives its features beside its answer: every token is read."""

    def forward(self, x):
        f = self.forward_features(x)
        return self.forward_head(f), f


class WithLayers(VisionTransformer):
    """Its answer is of the class tokens of several blocks."""

    def forward(self, x):
        x, found = self._pos_embed(self.patch_embed(x)), []
        for block in self.blocks:
            x = block(x)
            found.append(self.norm(x)[:, 0])
        return self.head(torch.stack(found).mean(0)), x


class WithHighest(VisionTransformer):
    """Its head takes the highest of all tokens."""

    def forward_head(self, x, pre_logits=False):
        return self.head(x.amax(1))


class Twice(VisionTransformer):
    """It runs its blocks twice in one forward: the image and its mirror image."""

    def forward(self, x):
        one, other = self.forward_features(x), self.forward_features(x.flip(3))
        return self.forward_head(one) + self.forward_head(other), one


@pytest.mark.parametrize("kind", [WithFeatures, WithLayers, WithHighest, Twice], ids=lambda kind: kind.__name__)
@of_methods(FEW)
def test_a_forward_that_reads_more_than_the_class_token(kind, method):
    """All rows are there for who reads them."""
    at, x = early(method), images("plain", 2)
    model, _ = answer_or_refusal(lambda: reduced(method, model=new(kind), at=at))
    whole, _ = answer_or_refusal(lambda: reduced(method, model=new(kind), at=at, compute="all"))
    assert (model is None) == (whole is None)
    if model is None:
        return
    expected = run(whole, x)
    assert_close(run(model, x), expected)
    if isinstance(expected, tuple):
        where = laconic.provenance(run(model, x)[1]).final.where
        assert where.shape == (2, 36)


@of_methods(FEW)
def test_both_views_of_one_forward_are_counted_by_their_own_sizes(method):
    """A forward with two passes through the blocks, pooled by a mean: each by its own tokens."""
    model, refusal = answer_or_refusal(lambda: reduced(method, model=new(Twice, global_pool="avg")))
    if refusal is not None:
        return
    plain = reduced(method, model=new(VisionTransformer, global_pool="avg"))
    plain.load_state_dict(model.state_dict())
    for x in batches("plain"):
        expected = run(plain, x) + run(plain, x.flip(3))
        right_or_refused(lambda x=x: run(model, x)[0], expected)
        one, other = features(model, x), features(model, x.flip(3))
        assert_close(model.forward_head(one).detach() + model.forward_head(other).detach(), expected)
