"""Map weight names of transformers' ports of PVT and CvT to the names that the authors and Laconic use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Names = Sequence[tuple[str, str]]  # (pattern, replacement)

PVT: Names = (
    (r"^classifier\.", "head."),
    (r"^pvt\.encoder\.layer_norm\.", "norm."),
    (r"^pvt\.encoder\.patch_embeddings\.\d\.cls_token", "cls_token"),
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.position_embeddings", "pos_embed{stage}"),
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.projection\.", "patch_embed{stage}.proj."),
    (r"^pvt\.encoder\.patch_embeddings\.(\d)\.layer_norm\.", "patch_embed{stage}.norm."),
    (r"^pvt\.encoder\.block\.(\d)\.", "block{stage}."),
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.sequence_reduction\.", ".attn.sr."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.self\.(key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_norm_(\d)\.", r".norm\1."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
)
CVT: Names = (
    (r"^classifier\.", "head."),
    (r"^layernorm\.", "norm."),
    (r"^cvt\.encoder\.stages\.(\d)\.", r"stage\1."),
    (r"\.embedding\.convolution_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.embedding\.convolution_embeddings\.normalization\.", ".patch_embed.norm."),
    (r"\.layers\.", ".blocks."),
    (r"\.attention\.attention\.convolution_projection_([a-z])[a-z]*\.convolution_projection\.", r".attn.conv_proj_\1."),
    (r"\.attention\.attention\.projection_([a-z])[a-z]*\.", r".attn.proj_\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".bn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)


def renamed(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return the weights under new names; ``{stage}`` in a replacement is the stage number in the match, counted from 1."""
    out = {}
    for name, tensor in weights.items():
        for pattern, new in names:
            name = re.sub(pattern, _counted(new) if "{stage}" in new else new, name)
        out[name] = tensor
    return out


def _counted(new: str) -> Any:
    return lambda match: new.format(stage=int(match[1]) + 1)
