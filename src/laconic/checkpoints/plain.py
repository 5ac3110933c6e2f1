"""Write a model that is not reduced, so that `laconic.load` and the command line open it like a reduced one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from laconic.checkpoints.model_spec import describe_model
from laconic.checkpoints.saved_files import FORMAT, write_model
from laconic.core.backbone import unwrapped
from laconic.data.model_record import record_of


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
    write_model(directory, model.state_dict(), record)
