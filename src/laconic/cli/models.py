"""Models for the commands: from timm or from a directory; at a lower resolution; the next smaller one."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.analysis.diagnose import shared_copy
from laconic.core.files import Refusal

SIZES = ("giant", "huge", "large", "base", "medium", "small", "tiny")  # a word of timm's names, from large to small


def create(name: str, *, seed: int = 0, **options: Any) -> nn.Module:
    """Create a timm model in evaluation mode, with random weights unless the options say otherwise.

    Raises:
        Refusal: timm has no model of that name.
    """
    import timm

    import laconic.models  # noqa: F401 (it registers ours with timm)

    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models('*vit*') lists them."
        raise Refusal(f"timm has no model called {name!r}, and there is no directory of that name; {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return timm.create_model(name, **options).eval()
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise Refusal(f"timm cannot create {name!r}: {error}") from error


def open_model(name: str) -> nn.Module:
    """Open a model by timm name (random weights), or from a directory of laconic.save or transformers' save_pretrained."""
    if not Path(name).is_dir():
        return create(name)
    from laconic.checkpoints.save_load import load_directory, saved_by

    try:
        return load_directory(name)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        raise Refusal(f"{name} does not hold a model that {saved_by(name)} saved: {error}") from error


# ------------------------------------------------------------------------------------------------ the alternatives
def lower_resolution(model: Any, patches: float) -> Any | None:
    """Return the model, with the same weights, for a smaller image of about ``patches`` patches; None if timm cannot."""
    embed = getattr(model, "patch_embed", None)
    grid, size = getattr(embed, "grid_size", None), getattr(embed, "img_size", None)
    if not hasattr(model, "set_input_size") or not grid or not size:
        return None
    factor = math.sqrt(patches / (grid[0] * grid[1]))
    small: Any = shared_copy(model)
    smaller = tuple(max(1, round(cells * factor)) * (pixels // cells) for cells, pixels in zip(grid, size, strict=True))
    try:
        small.set_input_size(img_size=smaller)
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError):
        return None
    return small


def smaller_name(name: str) -> str | None:
    """Return the name of the timm model one size down (deit_base… -> deit_small…), or None."""
    import timm

    architecture = name.partition(".")[0]
    found = re.search(rf"(?<=_)({'|'.join(SIZES)})(?=_|$)", architecture)
    if found is None:
        return None
    down = SIZES[SIZES.index(found[1]) + 1 :]
    candidates = (architecture[: found.start()] + size + architecture[found.end() :] for size in down)
    return next(filter(timm.is_model, candidates), None)
