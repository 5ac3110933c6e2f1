"""transformers' ViT, DeiT, DINOv2 (with registers), DINOv3, BEiT, CLIP and SigLIP vision models; versions 4.57 and 5.

Names of submodules differ between the versions, so entries check which exist; layers: `transformers_layers`. The model's
forward refuses attention masks, so a mask that reaches a layer was made by the model itself: a boolean one in export, which
hides nothing, or BEiT's shared bias. A reduced model returns ``hidden_states`` of the kept tokens and, if tokens were merged, a
``last_hidden_state`` with all patches, because heads outside the model average it (DINOv2, CLIP, SigLIP).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laconic.core.backbone import MethodOverride, ModelSpec, Setting, register_host, register_refusal

FUSED = "sdpa"
NEEDS_GRID = "it reads tokens on their grid, and a reduced model has no full grid; for other uses reduce the backbone inside it"


def _blocks(m: Any) -> list[Any]:
    inner = getattr(m, "encoder", None) or getattr(m, "model", None) or m
    return list(inner.layers if hasattr(inner, "layers") else inner.layer)


def pair(size: Any) -> tuple[int, int]:
    """Return a size as height and width: it is a pair already, or one number for both."""
    height, width = size if isinstance(size, Iterable) else (size, size)
    return height, width


def _grid(m: Any) -> tuple[int, int]:
    (height, width), (rows, columns) = pair(m.config.image_size), pair(m.config.patch_size)
    return height // rows, width // columns


def _positions(m: Any) -> Tensor | None:
    table = getattr(m.embeddings, "position_embeddings", None)
    if table is None:
        table = getattr(getattr(m.embeddings, "position_embedding", None), "weight", None)
    rows, columns = _grid(m)
    return None if table is None else table.view(-1, table.shape[-1])[-rows * columns :]


def _example(m: Any) -> Tensor:
    reference = next(m.parameters())
    size = (1, m.config.num_channels, *pair(m.config.image_size))
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(reference.device, reference.dtype)


def _unsupported_reason(m: Any) -> str | None:
    name = m.config._attn_implementation
    if name not in (FUSED, "eager"):
        return f"its attention implementation is {name!r}, not supported; call model.set_attn_implementation('sdpa') first"
    if m.config.output_attentions:
        return (
            "its config requests attention weights, which fused attention cannot return; set config.output_attentions = False"
        )
    inside = getattr(getattr(_blocks(m)[0], "attention", None), "attention", None)
    if type(inside).__name__ == "BeitSelfAttention":  # 4.57 fixes the implementation when the model is created
        return "it was created with eager attention; create or load it with attn_implementation='sdpa'"
    return None


def _settings(m: Any) -> list[Setting]:
    return [(m.config, "_attn_implementation", FUSED)]


def _grid_of(m: Any, size: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = pair(m.config.patch_size)
    return size[0] // rows, size[1] // columns


def _final_norm(m: Any) -> Any:
    """Return the norm on the last tokens; None for CLIP, whose last norm is applied to the class token only."""
    if hasattr(m, "pre_layrnorm") or hasattr(getattr(m, "vision_model", None), "pre_layrnorm"):
        return None
    return next((getattr(m, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(m, name)), None)


def _rows(m: Any, before: int, after: int) -> dict[str, int]:
    last = 1 if hasattr(m, "pre_layrnorm") else after  # CLIP's last norm is applied to the class token only
    return {"pre_layrnorm": before, "layernorm": after, "norm": after, "post_layernorm": last, "pooler": 1}


common = ModelSpec(
    path="",
    blocks=_blocks,
    prefix=lambda m: (1, True),
    positions=_positions,
    grid=_grid,
    dim=lambda m: m.config.hidden_size,
    heads=lambda m: m.config.num_attention_heads,
    example=_example,
    pooling=lambda m: ("token", False),
    unsupported_reason=_unsupported_reason,
    settings=_settings,
    unsupported_kwargs=("attention_mask", "head_mask"),
    restores_output=True,
    features=lambda m: (m, "forward"),
    final_norm=_final_norm,
    grid_of=_grid_of,
    patch_embed=lambda m: m.embeddings,
    rows=_rows,
)


def _registers(m: Any) -> tuple[int, bool]:
    return 1 + m.config.num_register_tokens, True


def _probed(readout: Any, own: Any, query: Tensor, key: Tensor, value: Tensor, **kw: Any) -> Any:
    """Bias SigLIP's probe attention so that each token is weighted by the number of patches it holds."""
    heads, bias = readout.host.head.attention.num_heads, readout.key_bias(key)
    if bias is not None:
        kw["attn_mask"] = bias.repeat_interleave(heads, 0).unsqueeze(1)  # [B H, 1, N], added to the logits
    return own(query, key, value, **kw)


def _siglip_overrides(m: Any) -> list[MethodOverride]:
    return [(m.head.attention, "forward", _probed)] if m.use_head else []


def _averaged(readout: Any, own: Any, x: Tensor) -> Tensor:
    out: Tensor = readout.pool(lambda weighed, kind: own(weighed), x)
    return out


def _averages(m: Any) -> bool:
    return getattr(m.pooler, "layernorm", None) is not None


def _shared_bias(readout: Any, own: Any, window: Any, *resized: Any, **to: Any) -> Tensor:
    """Make BEiT's shared bias (4.57: for every layer) for the image's own grid, without resizing it to the kept tokens."""
    out: Tensor = own(window)
    return out


def _beit_overrides(m: Any) -> list[MethodOverride]:
    shared = getattr(getattr(m, "encoder", None), "relative_position_bias", None)
    biases: list[MethodOverride] = [] if shared is None else [(shared, "forward", _shared_bias)]
    return [*biases, (m.pooler, "forward", _averaged)] if _averages(m) else biases


_both = replace(common, pooling=lambda m: ("token and avg", False))  # its classifier reads the class token and the mean
_siglip = replace(
    common,
    prefix=lambda m: (0, False),
    pooling=lambda m: ("map" if m.use_head else "avg", False),
    method_overrides=_siglip_overrides,
)
_beit = replace(
    common,
    pooling=lambda m: ("avg" if _averages(m) else "token", False),
    method_overrides=_beit_overrides,
)
for _path, _host in {
    "vit.modeling_vit.ViTModel": common,
    "deit.modeling_deit.DeiTModel": replace(common, prefix=lambda m: (2, True)),
    "dinov2.modeling_dinov2.Dinov2Model": _both,
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel": replace(_both, prefix=_registers),
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel": replace(common, prefix=_registers),
    "clip.modeling_clip.CLIPVisionModel": common,
    "clip.modeling_clip.CLIPVisionTransformer": common,  # 4.57: inside CLIPVisionModel
    "siglip.modeling_siglip.SiglipVisionModel": _siglip,
    "siglip.modeling_siglip.SiglipVisionTransformer": _siglip,
    "beit.modeling_beit.BeitModel": _beit,
}.items():
    register_host(replace(_host, path=f"transformers.models.{_path}"))
for _path in (
    "vit.modeling_vit.ViTForMaskedImageModeling",
    "deit.modeling_deit.DeiTForMaskedImageModeling",
    "beit.modeling_beit.BeitForMaskedImageModeling",
    "beit.modeling_beit.BeitForSemanticSegmentation",
    "beit.modeling_beit.BeitBackbone",
    "dinov2.modeling_dinov2.Dinov2Backbone",
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersBackbone",
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTBackbone",
):
    register_refusal(f"transformers.models.{_path}", NEEDS_GRID)
for _path in ("Siglip2VisionModel", "Siglip2VisionTransformer"):
    register_refusal(
        f"transformers.models.siglip2.modeling_siglip2.{_path}",
        "it takes sequences of patches padded to one length (NaFlex), and the number of kept tokens would depend on the "
        "padding; SigLIP 2 for images of a fixed size is a SiglipModel in transformers, which can be reduced",
    )
