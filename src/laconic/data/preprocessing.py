"""The preprocessing of a model: its own record if it has one, else timm's data config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from laconic.core.backbone import find_host, unwrapped
from laconic.data.model_record import record_of


def transform_for(model: nn.Module, crop: float | None = None) -> Callable[[Any], Tensor]:
    """Return timm's evaluation transform at the current input size of the model."""
    from timm.data import create_transform  # type: ignore[attr-defined]

    return create_transform(**config_for(model, crop), is_training=False)


def config_for(model: nn.Module, crop: float | None = None) -> dict[str, Any]:
    """Return the preprocessing of this model: input_size, interpolation, mean, std, crop_pct, crop_mode.

    The values are those of the model's record (see `laconic.data.model_record`), else those of timm. input_size is the
    current input size of the model; timm itself would use that of the pretrained weights, also for a model created with
    another size. ``crop`` replaces crop_pct.

    Raises:
        ValueError: ``crop`` is not above 0 and at most 1.
    """
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop must be a share above 0 and at most 1, not {crop}")
    plain = unwrapped(model)
    host, entry = find_host(plain)
    config = config_at(plain, (3, *entry.example(host).shape[2:]))
    return config if crop is None else {**config, "crop_pct": crop}


def config_at(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, Any]:
    """Return the preprocessing of a timm model for images [channels, height, width] of this size; otherwise as `config_for`."""
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    size = {"input_size": input_size}
    config: dict[str, Any] = resolve_model_data_config(model, args=size)  # type: ignore[no-untyped-call]
    own = record_of(model).get("preprocessing", {})
    config |= {name: tuple(value) if isinstance(value, list) else value for name, value in own.items() if name in config}
    return config | size
