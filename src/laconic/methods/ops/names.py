"""Rules that rename the authors' weights to ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

LOG = logging.getLogger(__name__)
New = str | Callable[[re.Match[str]], str]  # like the replacements of `re.sub`


def renamed(weights: Mapping[str, Tensor], *rules: tuple[str, *tuple[New, ...]]) -> dict[str, Tensor]:
    """Return the weights under new names, by the first rule (pattern, new name, ...) whose pattern matches the whole name.

    A renamed weight replaces one that had its new name before.
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
    """Concatenate separate layers: ``….{part}.…`` of all parts, in their order, become ``….{whole}.…``.

    If a part is missing, the others are unchanged, and loading will report them.
    """
    out = dict(weights)
    for name in weights:
        every = [name.replace(f".{parts[0]}.", f".{part}.") for part in parts]
        if f".{parts[0]}." in name and all(one in weights for one in every):
            out[name.replace(f".{parts[0]}.", f".{whole}.")] = torch.cat([out.pop(one) for one in every])
    return out


def last_copies(weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Return the last of several copies, named by the two groups of ``pattern``; warn if copies differ."""
    out, differing = dict[str, Tensor](), set[str]()
    for name, tensor in weights.items():
        if found := re.fullmatch(pattern, name):
            name = f"{found[1]}.{found[2]}"
            if name in out and not torch.equal(out[name], tensor):
                differing.add(found[1])
        out[name] = tensor
    if differing:
        LOG.warning("the copies of %s differ; the last one is used, as in the authors' code", ", ".join(sorted(differing)))
    return out
