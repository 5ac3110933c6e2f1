"""Write a model that is not reduced, so that `laconic.load` and the command line open it like a reduced one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save as to_bytes
from torch import nn

from laconic.checkpoints.model_spec import describe_model
from laconic.checkpoints.save_load import FORMAT, RECORD, WEIGHTS
from laconic.core.backbone import unwrapped
from laconic.core.files import write_atomically
from laconic.data.model_record import record_metadata, record_of


def save_plain(model: nn.Module, directory: Path, *, model_args: Mapping[str, Any] | Literal["omit"] | None = None) -> None:
    """Write an unreduced model to a directory: weights that timm can load, and how to build the model.

    Args:
        model: the model, or a wrapper of one.
        directory: created if it does not exist; the two files in it are replaced.
        model_args: as for `laconic.save`.

    Raises:
        ValueError: timm does not build the model from its name and ``model_args``; nothing is written.
        Refusal: a file cannot be written.
    """
    from laconic import __version__

    model = unwrapped(model)
    entry = describe_model(model, None, model_args)
    record = {"laconic": __version__, "format": FORMAT, "model": entry, "method": None, "schedule": None}
    if data := record_of(model):
        record["data"] = data
    weights = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    write_atomically(directory / WEIGHTS, to_bytes(weights, metadata=record_metadata(model) or {"format": "pt"}))
    write_atomically(directory / RECORD, json.dumps(record, indent=2) + "\n")
