"""Small random models of every kind of vision transformer that is supported, for checks that go over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import open_clip
import timm
import torch
from open_clip.transformer import VisionTransformer as OpenClipTower
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT
from torchvision.models.vision_transformer import ConvStemConfig

from families import SMALL, fill
from laconic.core.backbone import find_host

TEXT = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
TOWER: dict[str, object] = dict(image_size=96, patch_size=16, width=48, layers=4, heads=3, mlp_ratio=2.0, output_dim=48)


@dataclass(frozen=True)
class Kind:
    """A family of models: how to make a small one of 36 patches with random weights, and how to read its logits.

    ``where`` says which library has it, and ``logits`` makes [B, classes] of what the model gives.
    """

    where: str
    build: Callable[[], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor] = lambda model, images: model(images)
    size: int = 96

    def make(self) -> nn.Module:
        """The model, the same one each time, in evaluation mode."""
        torch.manual_seed(0)
        return fill(self.build().eval())

    def images(self, batch: int = 3) -> Tensor:
        """Random images, the same ones each time."""
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))

    def options(self, model: nn.Module, method: str) -> dict[str, str]:
        """What a method that scores by class attention needs on this model."""
        from families import CLASS_SCORED

        host, entry = find_host(model)
        return {"score": "mean-query"} if method in CLASS_SCORED and not entry.prefix(host)[1] else {}


def in_timm(name: str, size: int = 96, **changes: object) -> Kind:
    """A model that timm has under this name."""
    return Kind("timm", partial(timm.create_model, name, **{**SMALL, "img_size": size, **changes}), size=size)


def whole_clip() -> nn.Module:
    """An open_clip model with both its towers."""
    vision = dict(image_size=96, patch_size=16, width=48, layers=4, head_width=16)
    return open_clip.model.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)


def by_meaning(model: nn.Module, images: Tensor) -> Tensor:
    """Zero-shot logits of an open_clip model for five made-up texts."""
    texts = torch.arange(1, 41).view(5, 8)
    image, text = model.encode_image(images, normalize=True), model.encode_text(texts, normalize=True)
    return image @ text.T


def torchvision_vit(**changes: object) -> nn.Module:
    """torchvision's, small."""
    sizes = dict(image_size=96, patch_size=16, num_layers=4, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=10)
    return TorchvisionViT(**{**sizes, **changes})


def tower(**changes: object) -> Kind:
    """An image tower of open_clip; of several answers for one image the logits are all of them."""
    return Kind("open_clip", partial(OpenClipTower, **{**TOWER, **changes}), lambda model, images: model(images).flatten(1))


# a stem that halves the image four times, as in "Early convolutions help transformers see better"
STEM = [ConvStemConfig(channels, 3, 2) for channels in (8, 8, 16, 16)]
RELATIVE = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
NAFLEX = dict(pos_embed_grid_size=(6, 6))

ZOO: dict[str, Kind] = {
    "vit": in_timm("vit_tiny_patch16_224"),
    "deit3": in_timm("deit3_small_patch16_224"),
    "deit-distilled": in_timm("deit_tiny_distilled_patch16_224"),
    "dinov2": in_timm("vit_small_patch14_dinov2", 84),
    "dinov2-reg": in_timm("vit_small_patch14_reg4_dinov2", 84),
    "siglip": in_timm("vit_base_patch16_siglip_224"),
    "siglip-gap": in_timm("vit_base_patch16_siglip_gap_224"),
    "clip": in_timm("vit_base_patch16_clip_224"),
    "augreg-gap": in_timm("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
    "reg4-gap": in_timm("vit_medium_patch16_reg4_gap_256"),
    "qk-norm": in_timm("vit_tiny_patch16_224", qk_norm=True, global_pool="avg"),
    "respost": in_timm("vit_tiny_patch16_224", block_fn=ResPostBlock),
    "parallel": in_timm("vit_tiny_patch16_224", block_fn=ParallelScalingBlock),
    "flexivit": in_timm("flexivit_small"),
    "aimv2": in_timm("aimv2_large_patch14_224", 84),
    "hybrid": in_timm("vit_tiny_r_s16_p8_224", 192),
    "relpos": in_timm("vit_relpos_small_patch16_224"),
    "relpos-shared": in_timm("vit_srelpos_small_patch16_224"),
    "relpos-cls": in_timm("vit_relpos_base_patch16_clsgap_224"),
    "dinov3": in_timm("vit_small_patch16_dinov3"),
    "eva": in_timm("eva_large_patch14_196", 84),
    "eva02": in_timm("eva02_tiny_patch14_224", 84),
    "eva02-clip": in_timm("eva02_base_patch16_clip_224"),
    "rope-mixed": in_timm("vit_small_patch16_rope_mixed_224"),
    "rope-axial": in_timm("vit_small_patch16_rope_224"),
    "pe": in_timm("vit_pe_core_tiny_patch16_384"),
    "beit": in_timm("beit_base_patch16_224"),
    "beit-shared": in_timm("beit_base_patch16_224", **RELATIVE),
    "beitv2": in_timm("beitv2_base_patch16_224"),
    "naflex": in_timm("naflexvit_base_patch16_gap", **NAFLEX),
    "naflex-map": in_timm("naflexvit_base_patch16_siglip", **NAFLEX),
    "naflex-rope": in_timm("naflexvit_base_patch16_gap", rope_type="axial", **NAFLEX),
    "torchvision": Kind("torchvision", torchvision_vit),
    "torchvision-stem": Kind("torchvision", partial(torchvision_vit, conv_stem_configs=STEM)),
    "open-clip": tower(),
    "open-clip-gap": tower(pool_type="avg", final_ln_after_pool=True),
    "open-clip-custom": tower(qk_norm=True, scale_attn=True, ls_init_value=0.1),
    "open-clip-pool": tower(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2),
    "open-clip-two-pools": tower(attentional_pool="parallel", attn_pooler_queries=4, attn_pooler_heads=2),
    "open-clip-zero-shot": Kind("open_clip", whole_clip, by_meaning),
}
