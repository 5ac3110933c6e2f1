"""Laconic's own PS-ViT: the plain layers after the sampling are its blocks, and those are reduced.

Patch tokens are in the order of their sampling points, column by column.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from laconic.backbones.lvvit import _common
from laconic.core.backbone import register_host


def _at(m: Any) -> tuple[int, ...]:
    depth = len(m.blocks)
    return tuple(sorted({round(depth * part / 4) for part in (1, 2, 3)}))  # 2, 5, 8 of 10, as in TPS


# the positions differ from image to image; the rest is LV-ViT's, as are the blocks
register_host(replace(_common, path="laconic.models.psvit.PSViT", positions=lambda m: None, at=_at))
