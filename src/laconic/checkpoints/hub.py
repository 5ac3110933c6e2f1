"""Reduced models on the Hugging Face Hub: a repository holds the files that `laconic.save` writes, and a model card.

Needs the extra ``hub`` (huggingface_hub), which is imported on use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from laconic.checkpoints.save_load import Place, load, save
from laconic.checkpoints.saved_files import RECORD, WEIGHTS
from laconic.core.optional_deps import need
from laconic.core.token_reduction import reduction_of

CARD = "README.md"
TEXT = """
# {title}

{architecture} reduced with [{method}](https://arxiv.org/abs/{paper}) by Laconic, a library of token reduction for vision
transformers: {summary}.

```python
import laconic

model = laconic.from_pretrained({repo!r})
```

| | |
|---|---|
| Method | `{method}` {options} |
| Schedule | `{schedule}` |
| Parameters | {parameters:,} |
"""


def save_pretrained(
    model: nn.Module,
    directory: Place,
    *,
    repo_id: str | None = None,
    model_args: Mapping[str, Any] | Literal["omit"] | None = None,
) -> None:
    """Save a model with `laconic.save`, and add a model card if there is none: a directory ready to be uploaded.

    Args:
        model: a reduced model.
        directory: created if it does not exist.
        repo_id: the name that the card's example loads; by default the name of the directory.
        model_args: see `laconic.save`.

    Raises:
        ImportError: huggingface_hub is not installed. Otherwise as `laconic.save`.
    """
    need("huggingface_hub", "hub")
    save(model, directory, model_args=model_args)
    card = Path(directory, CARD)
    if not card.exists():
        card.write_text(_card(model, Path(directory), repo_id or Path(directory).resolve().name), encoding="utf-8")


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    model_args: Mapping[str, Any] | Literal["omit"] | None = None,
    private: bool | None = None,
    token: str | None = None,
    **upload: Any,
) -> str:
    """Save a reduced model and upload it to a repository in one commit; return the URL of the commit.

    A model card that the repository already has is not changed.

    Args:
        model: a reduced model.
        repo_id: ``"user/name"``; the repository is created if it does not exist.
        model_args: see `laconic.save`.
        private: whether a new repository is private; None: the account's default.
        token: access token; by default that of the logged-in account.
        upload: further arguments of ``HfApi.upload_folder``: ``commit_message``, ``revision``, ``create_pr`` ...

    Raises:
        ImportError: huggingface_hub is not installed. ValueError: the model cannot be saved, see `laconic.save`; nothing
            was uploaded. Errors of the Hub are passed through.
    """
    api = need("huggingface_hub", "hub").HfApi(token=token)
    with TemporaryDirectory() as directory:
        save_pretrained(model, directory, repo_id=repo_id, model_args=model_args)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id, CARD, revision=upload.get("revision")):
            Path(directory, CARD).unlink()
        upload.setdefault("commit_message", "Upload a model reduced with Laconic")
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory, **upload).commit_url)


def from_pretrained(
    repo_id_or_directory: Place,
    *,
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    token: str | None = None,
    **download: Any,
) -> nn.Module:
    """Load a model with `laconic.load` from a repository on the Hub or from a directory, in eval mode.

    Args:
        repo_id_or_directory: ``"user/name"``, or a path; an existing directory takes precedence.
        model: see `laconic.load`.
        device: see `laconic.load`.
        revision: branch, tag or commit.
        token: access token that can read the repository; by default that of the logged-in account.
        download: further arguments of ``snapshot_download``: ``cache_dir``, ``force_download``, ``local_files_only`` ...

    Raises:
        ImportError: huggingface_hub is not installed. Errors of the Hub are passed through; otherwise as `laconic.load`.
    """
    if Path(repo_id_or_directory).is_dir():
        return load(repo_id_or_directory, model=model, device=device)
    repo = str(repo_id_or_directory)
    directory = need("huggingface_hub", "hub").snapshot_download(
        repo, revision=revision, token=token, allow_patterns=[RECORD, WEIGHTS], **download
    )
    return load(directory, model=model, device=device)


def _card(model: nn.Module, directory: Path, repo_id: str) -> str:
    """Return the text of a new model card: method, schedule and options from the record, and how to load the model."""
    record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    row = reduction_of(model).config.info
    architecture = record["model"].get("architecture") or record["model"]["class"].rpartition(".")[2]
    classes = record["model"].get("args", {}).get("num_classes")
    task = None if classes is None else "image-classification" if classes else "image-feature-extraction"
    data = need("huggingface_hub", "hub").ModelCardData(
        library_name="laconic", tags=["token-reduction", row.name, architecture], pipeline_tag=task
    )
    text = TEXT.format(
        title=repo_id.rpartition("/")[2],
        architecture=architecture,
        method=row.name,
        paper=row.paper,
        summary=row.title.rpartition(": ")[2],
        repo=repo_id,
        options=json.dumps(record["method"]["options"]) if record["method"]["options"] else "",
        schedule=json.dumps(record["schedule"]),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"
