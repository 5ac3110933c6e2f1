"""Small DeiT-style models for the generated benchmark: 40 x 40 pixels, 100 patch tokens, a class token, 24 classes.

A stem of four convolutions (as in LV-ViT and many others) instead of one lets them learn from tens of thousands of images
instead of millions; the rest is timm's VisionTransformer. Their weights ship with laconic. They were trained by the recipes
of the same names (``laconic train --recipe scenes_vit_small``); the logs of those runs are in results/.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d, HybridEmbed, build_sincos2d_pos_embed  # type: ignore[attr-defined]
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

from laconic.checkpoints.model_spec import mismatch
from laconic.checkpoints.saved_files import read_safetensors
from laconic.core.token_reduction import reduction_of
from laconic.data.scenes import CLASSES

POSITION_SCALE = 0.3
FOLDER = Path(__file__).parents[1] / "weights"


def _cfg(name: str) -> dict[str, Any]:
    here = FOLDER / f"{name}.safetensors"
    facts = {
        "num_classes": len(CLASSES),
        "input_size": (3, 40, 40),
        "pool_size": None,
        "crop_pct": 1.0,
        "fixed_input_size": True,
    }
    look = {"interpolation": "bicubic", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "classifier": "head"}
    return {
        **facts,
        **look,
        "first_conv": "patch_embed.backbone.0.conv",
        "url": "",
        **({"file": str(here)} if here.is_file() else {}),
    }


default_cfgs = generate_default_cfgs({name: _cfg(name) for name in ("scenes_vit_small", "scenes_vit_tiny")})


def _create(name: str, pretrained: bool, sizes: dict[str, int], **options: Any) -> VisionTransformer:
    facts: dict[str, Any] = {"img_size": 40, "patch_size": 1, **sizes, **options}
    width = facts["embed_dim"]
    stem = ConvStem(
        depth=4,
        channels=(width // 4, width // 2, width, width),
        kernel_size=(3, 3, 3, 1),
        stride=(2, 1, 2, 1),
        padding=(1, 1, 1, 0),
        norm_layer=BatchNormAct2d,
    )
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    model = build_model_with_cfg(VisionTransformer, name, pretrained, embed_layer=embed, **facts)
    if not pretrained and model.pos_embed is not None:  # start from position embeddings that differ between patches
        grid = model.patch_embed.grid_size
        with torch.no_grad():
            model.pos_embed[0, model.num_prefix_tokens :] = POSITION_SCALE * build_sincos2d_pos_embed(list(grid), dim=width)
    return model


def has_scorer(name: str, method: str) -> bool:
    """Return True if laconic ships a trained scorer of a method for its weights of a model."""
    return (FOLDER / f"{name}.{method}.safetensors").is_file()


def load_scorer(model: nn.Module, name: str) -> bool:
    """Load the trained scorer that laconic ships for a reduced model's method; return False if there is none.

    The scorers were trained with the backbone frozen at its shipped weights.

    Args:
        model: a reduced model.
        name: the timm name of its backbone.

    Raises:
        ValueError: the model is not reduced, or the scorer does not fit it (for example, it is reduced at other blocks).
    """
    method = reduction_of(model).config.info.name
    file = FOLDER / f"{name}.{method}.safetensors"
    if not file.is_file():
        return False
    weights = read_safetensors(file)
    own = {key: tensor for key, tensor in model.state_dict().items() if key.startswith("laconic.")}
    difference = mismatch(own, weights, file.name, "the model")
    if difference:
        raise ValueError(
            f"the trained scorer of {method} for {name} does not fit this model; reduce {name} at the blocks of the default "
            f"schedule, or train a scorer of your own (laconic train)\n{difference}"
        )
    model.load_state_dict(weights, strict=False)  # strict=False: the file has no backbone tensors
    return True


@register_model
def scenes_vit_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The base model of the generated benchmark."""
    return _create("scenes_vit_small", pretrained, {"embed_dim": 64, "depth": 8, "num_heads": 2}, **kwargs)


@register_model
def scenes_vit_tiny(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A smaller model of the generated benchmark, for comparison."""
    return _create("scenes_vit_tiny", pretrained, {"embed_dim": 48, "depth": 6, "num_heads": 2}, **kwargs)
