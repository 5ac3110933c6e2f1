"""Small random models of every supported family, and what each method needs to run on them."""

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
}
NO_CLASS_TOKEN = {"siglip", "gap"}
ROTARY = {"dinov3", "eva02", "rope-mixed", "pe"}
METHODS = sorted(laconic.methods())
CLASS_SCORED = {name for name, row in laconic.methods().items() if row.score == "class attention"}
MIXERS = {name for name, row in laconic.methods().items() if row.rest.startswith("mixed")}  # every token goes everywhere
AT = (1, 2, 3)


def make(family, **changes):
    torch.manual_seed(0)
    name, kwargs = FAMILIES[family]
    model = timm.create_model(name, **{**SMALL, **kwargs, **changes}).eval()
    return fill(model)


def fill(module):
    """LayerScale, biases and scorers start at next to nothing: make every parameter matter."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
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
    """Parallel blocks have no place between attention and MLP."""
    return family != "parallel" or laconic.methods()[method].moment == "before"


def reduced(method, family, keep=0.6, **changes):
    model = laconic.reduce_(make(family, **changes), method, keep=keep, at=AT, **options(method, family))
    fill(model.laconic)
    return model


PAIRS = [(m, f) for m in METHODS for f in FAMILIES if serves(m, f)]
