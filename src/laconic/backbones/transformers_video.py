"""transformers' models for clips: VideoMAE and V-JEPA 2, versions 4.57 and 5; layers: `laconic.backbones.transformers_layers`.

Their patches are tubelets: patches of several frames. Neither has prefix tokens. VideoMAE's classifier averages the last tokens
outside the model that runs them, so merged tokens are restored to their patches, as in transformers' image models.

V-JEPA 2's classifier pools by attention, which runs on the reduced tokens: the logarithm of their sizes is added to its logits.
Its predictor, which `VJEPA2Model` runs unless it gets ``skip_predictor=True``, reads every patch by its index, and so gets
features of all patches again: it then sees the shapes and indices that it was trained with, which no subset of tokens of
different sizes would give it. ``skip_predictor=True`` saves its time and returns the kept tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laconic.backbones.transformers import common, pair
from laconic.core.backbone import MethodOverride, Rows, register_host, register_refusal


def _noise(m: Any, *size: int) -> Tensor:
    reference = next(m.parameters())
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(reference.device, reference.dtype)


# ------------------------------------------------------------------------------------------------ VideoMAE
def _videomae_example(m: Any) -> Tensor:
    return _noise(m, m.config.num_frames, m.config.num_channels, *pair(m.config.image_size))


def _videomae_grid_of(m: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = pair(m.config.patch_size)
    return size[0] // m.config.tubelet_size, size[1] // rows, size[2] // columns


def _reads_first_token(m: Any) -> str | None:
    if m.fc_norm is not None:
        return None
    return (
        "with use_mean_pooling=False it classifies by its first patch token as if that were a class token, and a method may "
        "drop or merge it; use a checkpoint with use_mean_pooling=True, or reduce the VideoMAEModel inside it"
    )


videomae = replace(
    common,
    path="transformers.models.videomae.modeling_videomae.VideoMAEModel",
    clips=True,
    prefix=lambda m: (0, False),
    pooling=lambda m: ("avg", False),
    positions=lambda m: m.embeddings.position_embeddings[0].to(next(m.parameters()).device),  # the table is no buffer
    grid=lambda m: _videomae_grid_of(m, (m.config.num_frames, *pair(m.config.image_size))),
    grid_of=_videomae_grid_of,
    example=_videomae_example,
    patch_embed=lambda m: m.embeddings.patch_embeddings,
    unsupported_kwargs=("bool_masked_pos", "head_mask"),
    rows=lambda m, before, after: {"embeddings": 0, "layernorm": after},
)
register_host(videomae)
register_refusal("transformers.models.videomae.modeling_videomae.VideoMAEForVideoClassification", _reads_first_token)
register_refusal(
    "transformers.models.videomae.modeling_videomae.VideoMAEForPreTraining",
    "it encodes the visible patches of a masked clip and reconstructs the others by their places; reduce a VideoMAEModel with "
    "its weights",
)


# ------------------------------------------------------------------------------------------------ V-JEPA 2
def _vjepa_grid(m: Any) -> tuple[int, ...]:
    return _vjepa_grid_of(m, (m.config.frames_per_clip, m.config.crop_size, m.config.crop_size))


def _vjepa_grid_of(m: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    tubelet, side = m.config.tubelet_size, m.config.patch_size
    frames = size[0] if size[0] >= tubelet else size[0] * tubelet  # a clip of fewer frames is repeated
    return frames // tubelet, size[1] // side, size[2] // side


def _vjepa_example(m: Any) -> Tensor:
    return _noise(m, m.config.frames_per_clip, m.config.in_chans, m.config.crop_size, m.config.crop_size)


def _predicted(
    readout: Any, own: Any, encoder_hidden_states: Tensor, context_mask: Any = None, target_mask: Any = None, **kw: Any
) -> Any:
    """Run the predictor on features of every patch; masks were made by the model for as many patches as it saw."""
    every = readout.every_patch(encoder_hidden_states)
    if every is not encoder_hidden_states:
        index = torch.arange(every.shape[1], device=every.device).expand(every.shape[0], -1)
        context_mask, target_mask = [index], [index]
    return own(every, context_mask, target_mask, **kw)


def _pooled(readout: Any, own: Any, hidden_state: Tensor) -> Tensor:
    """Run the attentive pooler; in all of its attention each token counts as many times as it has patches.

    Its layers get the bias as an argument, so that gradient checkpointing passes it again when it recomputes them.
    """
    bias, pooler = readout.key_bias(hidden_state), readout.host.pooler
    if bias is None:
        out: Tensor = own(hidden_state)
        return out
    mask = bias.unsqueeze(1).unsqueeze(1)  # [B, 1, 1, N], added to the logits
    for layer in pooler.self_attention_layers:
        hidden_state = layer(hidden_state, attention_mask=mask)[0]
    query = pooler.query_tokens.expand(hidden_state.shape[0], -1, -1)
    out = pooler.cross_attention_layer(query, hidden_state, attention_mask=mask)[0]
    return out.squeeze(1)


def _model_rows(m: Any, before: int, after: int) -> Mapping[str, Rows]:
    """Return the rows through the layers of the model; its predictor has two for every patch: the context, and a mask token."""
    ends = ("embeddings.predictor_embeddings", "proj")
    return {"encoder.layernorm": after, "predictor": lambda name: before if name in ends else 2 * before}


def _predictor_macs(m: Any, before: int, after: int) -> int:
    """Return the multiply-adds of the attention in the predictor."""
    return len(m.predictor.layer) * 2 * (2 * before) ** 2 * m.config.pred_hidden_size


def _pooler_macs(m: Any, before: int, after: int) -> int:
    """Return the multiply-adds of the attention in the pooler: self-attention of all tokens, then one query."""
    return 2 * after * (after * len(m.pooler.self_attention_layers) + 1) * m.config.hidden_size


def _classifier_rows(m: Any, before: int, after: int) -> Mapping[str, Rows]:
    """Return the rows through the layers of the classifier; the pooler ends with one query, keys and values are all tokens."""

    def rows(name: str) -> int:
        last = name.rpartition(".")[2]
        return after if name.startswith("self_attention_layers") or last in ("layer_norm1", "k_proj", "v_proj") else 1

    return {"vjepa2.encoder.layernorm": after, "pooler": rows, "classifier": 1}


def _overrides(m: Any) -> list[MethodOverride]:
    return [(m.predictor, "forward", _predicted)]


vjepa = replace(
    common,
    path="transformers.models.vjepa2.modeling_vjepa2.VJEPA2Model",
    clips=True,
    prefix=lambda m: (0, False),
    pooling=lambda m: ("avg", False),
    positions=lambda m: None,
    grid=_vjepa_grid,
    grid_of=_vjepa_grid_of,
    example=_vjepa_example,
    features=lambda m: (m.encoder, "forward"),
    final_norm=lambda m: m.encoder.layernorm,
    method_overrides=_overrides,
    patch_embed=lambda m: m.encoder.embeddings,
    unsupported_kwargs=("context_mask", "target_mask", "context_head_mask", "target_head_mask"),
    rows=_model_rows,
    extra_macs=_predictor_macs,
)
register_host(vjepa)
register_host(
    replace(
        vjepa,
        path="transformers.models.vjepa2.modeling_vjepa2.VJEPA2ForVideoClassification",
        contains_host=True,
        blocks=lambda m: list(m.vjepa2.encoder.layer),
        pooling=lambda m: ("map", False),
        restores_output=False,
        features=lambda m: (m.vjepa2.encoder, "forward"),
        final_norm=lambda m: m.vjepa2.encoder.layernorm,
        unsupported_reason=lambda m: vjepa.unsupported_reason(m.vjepa2),
        method_overrides=lambda m: [*_overrides(m.vjepa2), (m.pooler, "forward", _pooled)],
        patch_embed=lambda m: m.vjepa2.encoder.embeddings,
        unsupported_kwargs=(),
        rows=_classifier_rows,
        extra_macs=_pooler_macs,
    )
)
