"""A reduced model with huggingface_hub's mixin: ``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` as methods.

`laconic` does not import this module, since it needs the extra ``hub``; use
``from laconic.checkpoints.hub_mixin import HubModel``. The functions of the same names in `laconic` need no wrapper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from laconic.checkpoints.save_load import load, save


class HubModel(nn.Module, ModelHubMixin, library_name="laconic", tags=["token-reduction"]):
    """Wrapper of a reduced model (``.model``) that is called with the same arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self.model, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> HubModel:
        download = {name: options.pop(name) for name in ("force_download", "local_files_only") if name in options}
        if Path(model_id).is_dir():
            return cls(load(model_id, **options))
        directory = snapshot_download(model_id, revision=revision, cache_dir=cache_dir, token=token, **download)
        return cls(load(directory, **options))
