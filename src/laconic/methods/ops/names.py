"""The authors' names of weights, turned into ours by small rules."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)
New = str | Callable[[re.Match[str]], str]  # as the replacements of `re.sub`


def renamed(weights: Mapping[str, Tensor], *rules: tuple[str, *tuple[New, ...]]) -> dict[str, Tensor]:
    """Weights under new names, each by the first rule whose pattern is the whole name: (pattern, new name, and others).

    A weight that gets a new name takes the place of one that had it before.
    """
    old, new = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in weights.items():
        for pattern, *names in rules:
            if found := re.fullmatch(pattern, name):
                new |= {found.expand(one) if isinstance(one, str) else one(found): tensor for one in names}
                break
        else:
            old[name] = tensor
    return old | new


def joined(weights: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> dict[str, Tensor]:
    """Layers that lie apart put together: ``….{part}.…`` of all parts, in their order, become ``….{whole}.…``.

    Where one of the parts is missing they stay, and will not fit.
    """
    out = dict(weights)
    for name in weights:
        every = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if f".{parts[0]}." in name and all(one in weights for one in every):
            out[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([out.pop(one) for one in every])
    return out


def last_copies(weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Of what lies there several times the last, named by the two groups of ``pattern``; it is said if copies differ."""
    out, differing = dict[str, Tensor](), set[str]()
    for name, tensor in weights.items():
        if found := re.fullmatch(pattern, name):
            name = f"{found[1]}.{found[2]}"
            if name in out and not torch.equal(out[name], tensor):
                differing.add(found[1])
        out[name] = tensor
    if differing:
        LOG.warning("the copies of %s differ; taken is the last, as by the authors' code", ", ".join(sorted(differing)))
    return out
