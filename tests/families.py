"""Small random models of every supported family, and what each method needs to run on them."""

import os

import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

import laconic

SMALL = dict(embed_dim=48, num_heads=3, depth=4, num_classes=10)
FAMILIES = {
    "plain": ("vit_tiny_patch16_224", dict(img_size=96)),
    "deit3": ("deit3_small_patch16_224", dict(img_size=96)),
    "distilled": ("deit_tiny_distilled_patch16_224", dict(img_size=96)),
    "dinov2-reg": ("vit_small_patch14_reg4_dinov2", dict(img_size=84)),
    "siglip": ("vit_base_patch16_siglip_224", dict(img_size=96)),
    "gap": ("vit_tiny_patch16_224", dict(img_size=96, class_token=False, global_pool="avg")),
    "qk-norm": ("vit_tiny_patch16_224", dict(img_size=96, qk_norm=True, global_pool="avg")),
    "respost": ("vit_tiny_patch16_224", dict(img_size=96, block_fn=ResPostBlock)),
    "parallel": ("vit_tiny_patch16_224", dict(img_size=96, block_fn=ParallelScalingBlock)),
    "dinov3": ("vit_small_patch16_dinov3", dict(img_size=96)),
    "eva02": ("eva02_tiny_patch14_224", dict(img_size=84)),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", dict(img_size=96)),
    "pe": ("vit_pe_core_tiny_patch16_384", dict(img_size=96)),
    "beit": ("beit_base_patch16_224", dict(img_size=96)),
    "beit-shared": ("beit_base_patch16_224", dict(img_size=96, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)),
    "naflex": ("naflexvit_base_patch16_gap", dict(img_size=96, pos_embed_grid_size=(6, 6))),
}
NO_CLASS_TOKEN = {"siglip", "gap", "naflex"}
ROTARY = {"dinov3", "eva02", "rope-mixed", "pe"}
# they compare the frames of a clip; models that take images refuse them (tests/test_run_length.py)
OF_CLIPS = {name for name, row in laconic.methods().items() if row.clips}
METHODS = sorted(set(laconic.methods()) - OF_CLIPS)
CLASS_SCORED = {name for name, row in laconic.methods().items() if row.score == "class attention"}
# families that do not read the class token
AVERAGED = {"siglip", "gap", "qk-norm", "dinov3", "eva02", "pe", "beit", "beit-shared", "naflex"}
VARIABLE = {name for name, row in laconic.methods().items() if row.count == "variable"}
PARKING = {name for name, row in laconic.methods().items() if row.rest.startswith("parked")}
FIXED = {"conv-pool", "mlp-pool", "patchmerger", "sinkhorn", "sit", "tokenlearner"}  # learned for one number of tokens
MIXERS = {name for name, row in laconic.methods().items() if row.rest.startswith("mixed")}  # every token goes everywhere
AT = (1, 2, 3)
# they work before the first block only
BEFORE = {name for name, row in laconic.methods().items() if row.config.before_blocks} - OF_CLIPS


def make(family, **changes):
    torch.manual_seed(0)
    name, kwargs = FAMILIES[family]
    model = timm.create_model(name, **{**SMALL, **kwargs, **changes}).eval()
    return fill(model)


def fill(module):
    """LayerScale, biases and scorers start at next to nothing: make every parameter matter."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() < 2:
                p.add_(torch.randn_like(p) * 0.2)
            else:
                p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 3 else 1.5 * p[0].numel() ** -0.5))
    return module


def images(family, batch=3):
    size = FAMILIES[family][1]["img_size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def options(method, family):
    return {"score": "mean-query"} if family in NO_CLASS_TOKEN and method in CLASS_SCORED else {}


def serves(method, family):
    """Parallel blocks have no place between attention and MLP; some methods answer in the class token alone."""
    row = laconic.methods()[method]
    if row.class_readout and family in AVERAGED:
        return False
    return family != "parallel" or not row.config().build(SITE).overrides("between")


def at(method, usual=AT):
    """The reducing blocks of a method in these tests."""
    return (0,) if method in BEFORE | OF_CLIPS else (0, *usual[1:]) if method == "two-stage" else usual


def rate(method, keep=0.6):
    """Methods that decide for every image take no keep rate; two-stage merges before the blocks only at low ones."""
    return None if method in VARIABLE else keep / 2 if method == "two-stage" and keep < 1 else keep


def reduced(method, family, keep=0.6, **changes):
    model = laconic.reduce_(make(family, **changes), method, keep=rate(method, keep), at=at(method), **options(method, family))
    fill(model.laconic)
    return model


def observe(model, look):
    """Call ``look(before, after)`` wherever a reducer of this model works."""

    def around(own, tokens, *arguments):
        left = own(tokens, *arguments)
        look(tokens, left)
        return left

    model.laconic.around = around


SITE = laconic.BlockContext(
    0, 1, 48, 3, 0.6, before=36, after=21, grid=(6, 6), depth=4, schedule=laconic.Schedule.rates(0.6, AT)
)
WIDE = {"etps", "tome"}  # each uses the seam with the host in another way
EVERY = bool(os.environ.get("LACONIC_EVERY_PAIR"))  # every method on every family: make test-slow


def pairs(*families):
    """Every method on these families, and those of `WIDE` on all."""
    return [(m, f) for m in METHODS for f in FAMILIES if serves(m, f) and (EVERY or m in WIDE or f in families)]


PAIRS = pairs("plain")
PAIRS_TOO = pairs("plain", "siglip") if EVERY else PAIRS
