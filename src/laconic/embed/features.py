"""The features that a model is embedded by: its class token, its pooled output, or one vector for each patch."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn

from laconic.analysis.diagnose import shared_copy
from laconic.core.backbone import find_host
from laconic.planning.measures import answer_of, patch_features

Kind = Literal["pooled", "class", "patches"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier", "heads", "head")  # of libraries other than timm


def without_classifier(model: nn.Module) -> nn.Module:
    """Return a copy that shares the weights and answers with the vector that its classifier reads; pooling and norms stay."""
    copy: Any = shared_copy(model)
    host: Any = find_host(copy)[0]
    for module in {id(one): one for one in (copy, host)}.values():
        if not getattr(module, "num_classes", getattr(module, "num_labels", 1)):
            continue
        if hasattr(module, "reset_classifier"):
            module.reset_classifier(0)
            continue
        for name in CLASSIFIERS:
            if isinstance(getattr(module, name, None), nn.Linear | nn.Sequential):
                setattr(module, name, nn.Identity())
    return copy


def check_kind(model: nn.Module, kind: str) -> None:
    """Refuse features that a model does not have.

    Raises:
        ValueError: an unknown kind, or the class token of a model without one.
    """
    if kind not in KINDS:
        raise ValueError(f"features must be one of {', '.join(KINDS)}, not {kind!r}")
    host, entry = find_host(model)
    if entry.clips:
        raise ValueError(f"{entry.path} takes clips, and pictures are embedded one by one; give a model of images")
    if kind == "class" and not entry.shapes(host)[-1].has_cls:
        raise ValueError(f"{entry.path} has no class token; give features='pooled' or 'patches'")


def features_of(model: nn.Module, images: Tensor, kind: Kind) -> Tensor:
    """Return the features of a batch under a model that `without_classifier` returned: [B, C], or of patches [B, P, C].

    Patches that were merged have the features of their token, dropped ones those of the nearest patch that a token holds.

    Raises:
        ValueError: the model answers with something else.
    """
    if kind == "patches":
        return patch_features(model, images)
    host, entry = find_host(model)
    if kind == "pooled" or entry.pooling(host)[0] == "token":
        return answer_of(model, images)
    run: Any = getattr(host, "forward_features", host)
    tokens = run(images)
    return getattr(tokens, "last_hidden_state", tokens)[:, 0]
