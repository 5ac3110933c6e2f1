"""Bad input gets a clear error and leaves the user's model as it was."""

import pytest
import timm
import torch
from torch import nn

import laconic
from families import FAMILIES, images, make

pytestmark = pytest.mark.unchecked  # bad arguments on purpose


def refused(model, error, match, method="etps", **kwargs):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [(m, set(vars(m)), m.training) for m in model.modules()]
    with pytest.raises(error, match=match):
        laconic.reduce_(model, method, **({"keep": 0.5} | kwargs))
    assert [(m, set(vars(m)), m.training) for m in model.modules()] == attributes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("error", "match", "kwargs"),
    [
        (LookupError, r"no method is called 'etsp'.*mean 'etps'", {"method": "etsp"}),
        (TypeError, "method must be a name or a config", {"method": 7}),
        (TypeError, r"no option 'similarty'.*'similarity'", {"similarty": "cosine"}),
        (TypeError, "belong inside the config", {"method": laconic.ETPS(), "fusing": "average"}),
        (ValueError, "similarity must be one of 'cosine'", {"similarity": "dot"}),
        (ValueError, "temperature must be positive", {"temperature": 0.0}),
        (ValueError, r"keep rate must be in \(0, 1\], got 0", {"keep": 0}),
        (ValueError, r"keep rate must be in \(0, 1\], got 1.5", {"keep": 1.5}),
        (ValueError, r"keep rate must be in \(0, 1\], got -0.1", {"keep": -0.1}),
        (ValueError, "got True", {"keep": True}),
        (ValueError, "got nan", {"keep": float("nan")}),
        (ValueError, "2 values for 3 blocks", {"keep": [0.5, 0.5]}),
        (ValueError, "say how many tokens to keep", {"keep": None}),
        (ValueError, r"blocks \[4\] are out of range; the model has blocks 0 to 3", {"at": [2, 4]}),
        (ValueError, "repeats a block", {"at": [2, 2]}),
        (ValueError, "rising order", {"at": [3, 2]}),
        (ValueError, "zero-based block numbers", {"at": [-1, 2]}),
        (ValueError, "no blocks", {"at": []}),
        (ValueError, "either schedule, or keep", {"schedule": laconic.Schedule.keep_counts({1: 3})}),
        (TypeError, "schedule must be", {"schedule": 3, "keep": None}),
        (ValueError, "one of 'keep', 'keep_counts', 'remove_counts'", {"schedule": {"at": [1], "kep": [0.5]}, "keep": None}),
        (ValueError, "whole numbers", {"schedule": {"at": [1], "leave": [0.5]}, "keep": None}),
        (ValueError, r"example must be an image batch.*got \(3, 96, 96\)", {"example": torch.zeros(3, 96, 96)}),
        (ValueError, "example must be an image batch.*str", {"example": "cat.png"}),
        (ValueError, "does not run on an image of shape", {"example": torch.zeros(1, 3, 50, 50)}),
        (ValueError, "give either r", {"method": "tome", "r": 4}),
        (ValueError, "3 values of r for 4 blocks", {"method": "tome", "r": (4, 2, 1), "keep": None}),
        (ValueError, "clusters must be a count or a fraction", {"method": "bat", "clusters": 1.5}),
        (ValueError, "1 values of clusters.*more reducing blocks", {"method": "bat", "clusters": (3,), "at": [1, 2]}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments(error, match, kwargs, training):
    refused(make("plain").train(training), error, match, **kwargs)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        laconic.reduce_("deit_small_patch16_224", "etps", keep=0.5)
    for not_reduced in (laconic.restore_, laconic.provenance, laconic.losses):
        with pytest.raises(ValueError, match="is not reduced; call laconic.reduce_"):
            not_reduced(make("plain"))


def test_unknown_models_and_blocks():
    refused(
        timm.create_model("resnet18"),
        TypeError,
        r"timm\.models\.resnet\.ResNet cannot be reduced: its attention is between channels",
    )
    unknown = nn.Sequential(nn.Linear(2, 2))
    refused(unknown, TypeError, r"does not know torch\.nn\.modules\.container\.Sequential\. Supported.*VisionTransformer")

    class Unheard(nn.Module):  # what is derived from a known block is known
        def __init__(self, **kwargs):
            super().__init__()
            self.block = timm.models.vision_transformer.Block(**kwargs)

        def forward(self, x):
            return self.block(x)

    known = r"block 0 of VisionTransformer: laconic does not know .*Unheard.*Supported block classes: .*Block"
    refused(make("plain", block_fn=Unheard), TypeError, known)
    several = r"block 0 of VisionTransformer: timm.*ParallelThingsBlock cannot be reduced: it makes several attention calls"
    refused(make("plain", block_fn=timm.models.vision_transformer.ParallelThingsBlock), TypeError, several)
    two = nn.ModuleList([make("plain"), make("plain")])
    refused(two, ValueError, "2 vision transformers")


def test_no_class_token():
    for family in ("siglip", "gap"):
        refused(make(family), LookupError, "no class token.*score='mean-query'")
    refused(make("parallel"), ValueError, "side by side.*dtps, dynamicvit")


def test_attention_that_is_not_fused():
    model = make("plain")
    for block in model.blocks:
        block.attn.fused_attn = False
    for method in ("etps", "dynamicvit"):
        refused(model, ValueError, "block 0 .*attention is not fused.*set_fused_attn", method=method)


def test_reduced_already():
    model = laconic.reduce_(make("plain"), "topk", keep=0.5)
    with pytest.raises(ValueError, match="reduced already"):
        laconic.reduce_(model, "etps", keep=0.5)
    assert model(images("plain")).shape == (3, 10)
    assert model.laconic.config == laconic.TopK()
    laconic.restore_(model)
    with pytest.raises(ValueError, match="is not reduced"):
        laconic.restore_(model)


def test_compiled_patched_or_empty_models():
    refused(torch.compile(make("plain")), ValueError, "already compiled")
    model = make("plain")
    model.blocks[1].compile()
    refused(model, ValueError, "already compiled")
    model = make("plain")
    model.blocks[2].forward = lambda x: x
    refused(model, ValueError, "put on it by another tool")
    with pytest.raises(ValueError, match="meta device"):
        laconic.reduce_(make("plain").to("meta"), "etps", keep=0.5)
    refused(make("plain", patch_drop_rate=0.5), ValueError, "patch dropout")


class LouderBlock(timm.models.vision_transformer.Block):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs) * 1.01


def test_a_block_that_does_not_do_what_its_class_says():
    model = make("plain")
    model.blocks[2].__class__ = LouderBlock
    refused(model, ValueError, "block 2 .*two halves differ from its forward")


def test_a_block_that_is_skipped():
    model = make("plain")
    forward = type(model).forward_features

    class Skipping(type(model)):
        def forward_features(self, x, **kwargs):
            x = self._pos_embed(self.patch_embed(x))
            return self.norm(self.blocks[0](x))

    model.__class__ = Skipping
    assert forward is not Skipping.forward_features
    refused(model, ValueError, "ran 1 of 4 blocks")


class Thief(laconic.Reducer):
    """Changes the class token."""

    def between(self, tokens, seen, n):
        return tokens.keep(torch.arange(n).expand(len(tokens.x), -1)).replace(x=tokens.x[:, : n + 1] * 2)


class Miser(laconic.Reducer):
    """Leaves more than was asked for."""

    def between(self, tokens, seen, n):
        return tokens.keep(torch.arange(n + 1).expand(len(tokens.x), -1))


@pytest.mark.parametrize(
    ("reducer", "error", "match"), [(Thief, ValueError, "prefix token"), (Miser, RuntimeError, "19.*says 18")]
)
def test_a_method_that_breaks_the_laws(reducer, error, match):
    class Broken(laconic.TopK):
        def build(self, site):
            return reducer()

    refused(make("plain"), error, match, method=Broken(), at=[1])


def test_misuse_of_a_reduced_model():
    model, x = laconic.reduce_(make("plain"), "topk", keep=0.5), images("plain")
    with pytest.raises(RuntimeError, match="not run forward"):
        laconic.provenance(model)
    model(x)
    with pytest.raises(ValueError, match="takes no attn_mask"):
        model.forward_features(x, attn_mask=torch.zeros(37, 37))
    with pytest.raises(RuntimeError, match="block 3 .* come from no block of this model"):
        model.blocks[3](torch.zeros(3, 37, 48))
    model.blocks[0](torch.zeros(3, 37, 48))
    with pytest.raises(ValueError, match="'NLC' or 'NCHW'"):
        laconic.restore_dense(model, model.forward_features(x), layout="NHWC")


def test_pooling_that_cannot_be_weighted():
    model = make("gap", global_pool="avgmax")
    refused(model, ValueError, "pooling 'avgmax' cannot weight merged tokens", method="tome")
    assert laconic.reduce_(model, "random", keep=0.5)(images("gap")).shape == (3, 10)


def test_reentrant_checkpointing_cannot_carry_decisions():
    model = laconic.reduce_(make("plain"), "dynamicvit", keep=0.5, at=[1, 2]).train()
    x = model._pos_embed(model.patch_embed(images("plain"))).requires_grad_()
    for block in model.blocks:
        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


def test_diversity_score():
    z = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="l1_induced"):
        laconic.diversity_score(z, "l2")
    with pytest.raises(ValueError, match=r"\[B, L, C\]"):
        laconic.diversity_score(z[0])


def test_families_are_what_is_registered():
    blocks = {type(b).__module__ + "." + type(b).__qualname__ for f in FAMILIES for b in make(f).blocks}
    assert blocks <= set(laconic.hosts()["blocks"])


def test_attention_switched_off_after_reducing():
    model = laconic.reduce_(make("plain"), "etps", keep=0.5, at=[1])
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(RuntimeError, match=r"block 1 .*made 0 calls of scaled_dot_product_attention"):
        model(images("plain"))
