"""Load the weights that the authors of EViT, DynamicViT and TPS publish into a reduced model.

Their files use timm's parameter names for the backbone; DynamicViT and TPS add ``score_predictor.{stage}``. EViT's weights
do not tell the keep rate, but the training arguments in the same file do. No code in a file is executed.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laconic.api import reduce_, restore_
from laconic.checkpoints.meta_build import build_within
from laconic.checkpoints.model_spec import build
from laconic.checkpoints.save_load import Place, load_strictly
from laconic.checkpoints.saved_files import read_safetensors
from laconic.core import limits
from laconic.core.method import Method, resolve
from laconic.core.schedule import Schedule
from laconic.core.token_reduction import TokenReduction, reduction_of

EVIT = "2202.07800"  # the arXiv number of methods that the arguments in an EViT file apply to
DEIT = {192: "deit_tiny", 384: "deit_small", 768: "deit_base"}  # by width
LONGEST = 1000  # characters of a list of blocks in the training arguments
LIGHTNING = ("lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing")
_scalar: Any = np.float64(0).__reduce__()[0]


def _number(dtype: Any, data: Any) -> Any:
    """Return a numpy scalar of a file; ``data`` is required, since without it numpy allocates the size of any dtype."""
    return _scalar(dtype, data)


SAFE: list[Any] = [  # allowed in addition to torch's own list: training arguments, and accuracies stored as numpy scalars
    Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    *((dict, f"{module}.AttributeDict") for module in LIGHTNING),  # the hyper-parameters in a checkpoint of Lightning
]


def import_checkpoint(
    path_or_dict: Place | Mapping[str, Any],
    method: str | Method,
    *,
    model: nn.Module | None = None,
    keep: float | Sequence[float] | None = None,
    at: Sequence[int] | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    ema: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a model reduced by ``method`` with the weights that its authors published, in eval mode.

    Args:
        path_or_dict: a torch or safetensors file, or the object that torch.load returns for it. The weights may be under
            ``model``, ``net`` or ``state_dict``, with or without a ``module.`` prefix.
        method: a name with ``options``, or a config, as for `laconic.reduce_`.
        model: an unreduced model to reduce and fill in place; the weights are those of the vision transformer in it. Without
            it timm builds a DeiT-T, -S or -B, plain or distilled, with the input size and classes of the weights.
        keep: as for `laconic.reduce_`. For ``evit`` and ``topk``, if ``keep`` or ``at`` is not given, it is taken from the
            training arguments in the file, if there are any; so is EViT's ``fuse`` if the method is given by name.
        at: as for `laconic.reduce_`.
        schedule: a schedule in place of ``keep`` and ``at``.
        ema: load the averaged weights (``model_ema`` or ``state_dict_ema``).
        options: options of the method, if it is given by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, is not a checkpoint or holds other objects than tensors; a tensor is missing,
            unexpected or of another shape (they are listed); or the tensors, or the model that they need, take far more
            memory than the file (see `laconic.core.limits`). A given ``model`` is then restored.
        TypeError, LookupError: as `laconic.reduce_`.
    """
    config = resolve(method, options)
    content, source, held = _content(path_or_dict)
    weights = _unwrap(content, source, ema)
    held = limits.check_tensors(weights, source, held)
    if config.info.paper == EVIT:
        found = _evit_arguments(content.get("args"), source)
        if "fuse" in found and isinstance(method, str) and hasattr(config, "fuse") and "fuse" not in options:
            config = dataclasses.replace(config, **{"fuse": found["fuse"]})
        if schedule is None:
            keep, at = found.get("keep") if keep is None else keep, found.get("at") if at is None else at
    model = reduce_(
        _deit(weights, source, config.official_model, held) if model is None else model,
        config,
        keep=keep,
        at=at,
        schedule=schedule,
    )
    reduction = reduction_of(model)
    try:
        renamed = config.convert_official(weights, reduction.schedule.at)
        load_strictly(reduction.model, renamed, source, _advice(renamed, reduction))
    except ValueError:
        restore_(model)
        raise
    return model.eval()


def _content(place: Place | Mapping[str, Any]) -> tuple[Any, str, int | None]:
    """Return the content of a file or a dict, its name for messages, and the size of the file in bytes (None for a dict)."""
    if isinstance(place, Mapping):
        return place, "the given dict", None
    path = Path(place)
    return read_file(path), str(path), limits.check_file(path)


def read_file(path: Path) -> Any:
    """Return the content of a torch or safetensors file, without executing code of it.

    Raises:
        FileNotFoundError: no such file. ValueError: it is damaged, or holds other objects than tensors and plain values.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}; download it first, from the link of the method's authors")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a file; read a directory that laconic.save wrote with laconic.load")
    limits.check_file(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with path.open("rb") as file:
        try:
            with torch.serialization.safe_globals(SAFE):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # parsers raise many types of errors for bytes that are not a checkpoint
            raise ValueError(f"{path} {_fault(error, path.suffix)}") from error


def _fault(error: Exception, suffix: str) -> str:
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign or suffix == ".pkl":
        what = f"objects of {foreign[1]}" if foreign else "a pickle of another library (MegEngine's .pkl are)"
        return (
            f"holds {what}; unpickling them could run any code, so laconic reads tensors and plain values only. If you trust "
            "the file, open it where its library is installed and write the weights as tensors: "
            "torch.save({name: torch.as_tensor(array) for name, array in weights.items()}, 'weights.pth')"
        )
    reason = str(error).partition("\n")[0]
    return (
        f"is damaged, cut short or not a checkpoint ({type(error).__name__}: {reason}); compare its size with the original "
        "and download it again"
    )


def _unwrap(content: Any, source: str, ema: bool) -> dict[str, Tensor]:
    wanted = ("model_ema", "state_dict_ema") if ema else ("model", "net", "state_dict")
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}; expected a dict of weights")
    inner = next((content[name] for name in wanted if isinstance(content.get(name), Mapping)), None)
    weights = content if inner is None and not ema else inner
    if not weights or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()):
        raise ValueError(
            f"{source} has no {'averaged ' if ema else ''}weights under {', '.join(wanted)}; it has "
            f"{', '.join(map(str, list(content)[:10])) or 'nothing'}. Pass the dict that maps names to tensors, or change ema="
        )
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): value for name, value in weights.items()}
    return dict(weights)


def _evit_arguments(args: Any, source: str) -> dict[str, Any]:
    """Return keep, at and fuse from EViT's training arguments, as far as they are present."""
    args = vars(args) if isinstance(args, Namespace) else args if isinstance(args, Mapping) else {}
    found: dict[str, Any] = {}
    try:
        if args.get("base_keep_rate") is not None:
            found["keep"] = float(args["base_keep_rate"])
        if args.get("fuse_token") is not None:
            found["fuse"] = bool(args["fuse_token"])
        if args.get("drop_loc") is not None:
            found["at"] = _blocks(args["drop_loc"])
    except (ValueError, TypeError, SyntaxError, ArithmeticError, RuntimeError) as error:
        shown = {name: str(args.get(name))[:LONGEST] for name in ("base_keep_rate", "fuse_token", "drop_loc")}
        raise ValueError(f"the training arguments in {source} are not EViT's ({shown}: {error}); pass keep= and at=") from error
    return found


def _blocks(given: Any) -> tuple[int, ...]:
    if isinstance(given, str):
        if len(given) > LONGEST:
            raise ValueError(f"drop_loc is a text of {len(given):,} characters")
        given = ast.literal_eval(given)
    blocks = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(block, int) for block in blocks):
        raise TypeError("drop_loc is no list of blocks")
    return blocks


def _advice(weights: Mapping[str, Tensor], reduction: TokenReduction) -> str:
    name, learned = reduction.config.info.name, any(key.startswith(("laconic.", "score_predictor.")) for key in weights)
    if learned and not any(True for _ in reduction.parameters()):
        return f"\nThe file has a learned score, and {name} does not use one; dynamicvit and dtps do."
    if reduction.config.info.learns and not learned:
        return f"\nThe file has no learned score, which {name} needs: load the weights first, then laconic.reduce_ and train."
    ours = any(".predictor." in key for key in reduction.state_dict(prefix="."))
    if ours and any(key.startswith("score_predictor.") for key in weights):
        return f"\nThe file has more stages than the blocks {list(reduction.schedule.at)}; pass as many in at=."
    return "\nIf the file is of another architecture or input size, build that model and pass it as model=."


def _deit(weights: Mapping[str, Tensor], source: str, more: Mapping[str, Any], held: int) -> nn.Module:
    """Build the DeiT that fits the shapes; any other difference is found when the weights are loaded."""
    shape, distilled = list(weights["pos_embed"].shape) if "pos_embed" in weights else [], "dist_token" in weights
    _, length, width = shape if len(shape) == 3 else (0, 0, 0)
    side = math.isqrt(max(0, length - 1 - distilled))
    if width not in DEIT or side == 0 or side * side != length - 1 - distilled:
        raise ValueError(
            f"{source} is not of a DeiT-T, -S or -B (pos_embed [1, {1 + distilled} + n * n, 192, 384 or 768]): pos_embed is "
            f"{shape or 'missing'}. Build the model it belongs to and pass it as model="
        )
    patch, head = weights.get("patch_embed.proj.weight"), weights.get("head.weight")
    channels = patch.shape[1] if patch is not None and tuple(patch.shape[2:]) == (16, 16) else 3
    classes = head.shape[0] if head is not None and head.dim() == 2 else 0
    args = {"img_size": 16 * side, "num_classes": classes, "in_chans": channels, **more}
    name = f"{DEIT[width]}{'_distilled' * distilled}_patch16_224"
    return build_within(partial(build, name, "", args), source, held, len(weights))
