"""timm's Beit and VisionTransformerRelPos: a bias for every pair of patches, in each block or shared by all blocks.

Both pool inside ``forward_head``, so that method is replaced.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from laconic.backbones.timm import (
    _block_attention,
    _block_mlp,
    _common,
    _eva_attention,
    _eva_mlp,
    _post_attention,
    _post_mlp,
)
from laconic.core.backbone import BlockSpec, register_block, register_host


def _forward_head(readout: Any, own: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
    out: Tensor = readout.pool(lambda weighed, kind: own(weighed, pre_logits=pre_logits), x)
    return out


def _bias_rows(bias: Any) -> int:
    """Return the rows through the network that computes a bias from distances of patches (0 if the bias is a table)."""
    return bias.rel_coords_log.shape[:2].numel() if hasattr(bias, "rel_coords_log") else 0


def _block_rows(block: Any, name: str) -> int | None:
    return _bias_rows(block.attn.rel_pos) if name.startswith("attn.rel_pos.") else None


def _rows(m: Any, before: int, after: int) -> dict[str, int]:
    pooled = 1 if m.global_pool else after
    rows = {"norm": after, "fc_norm": pooled, "head": pooled}
    return {**rows, "rel_pos_bias": 0, "shared_rel_pos": _bias_rows(getattr(m, "shared_rel_pos", None))}


register_block("timm.models.beit.Block", BlockSpec(_eva_attention, _eva_mlp, relative=True))
for _path, _halves in {
    "RelPosBlock": BlockSpec(_block_attention, _block_mlp, relative=True, rows=_block_rows),
    "ResPostRelPosBlock": BlockSpec(_post_attention, _post_mlp, relative=True, rows=_block_rows),
}.items():
    register_block(f"timm.models.vision_transformer_relpos.{_path}", _halves)
for _path in ("timm.models.beit.Beit", "timm.models.vision_transformer_relpos.VisionTransformerRelPos"):
    register_host(replace(_common, path=_path, rows=_rows, method_overrides=lambda m: [(m, "forward_head", _forward_head)]))
