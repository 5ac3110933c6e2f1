"""Options that many methods have."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Literal

from laconic.reducer import Method, choice
from laconic.schedule import Schedule


def check_choices(config: Method) -> None:
    """Refuse a value that is not among those of its option's Literal.

    Raises:
        ValueError: says which option, and what it may be.
    """
    for option, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            choice(config.row.name, option, getattr(config, option), typing.get_args(hint))


def taking_away(owner: str, r: int | Sequence[int], blocks: Sequence[int]) -> Schedule:
    """The schedule of the option r: tokens to take away in every one of these blocks, one number or one for each.

    Raises:
        ValueError: another number of values than blocks.
    """
    each = (r,) * len(blocks) if isinstance(r, int) else r
    if len(each) != len(blocks):
        raise ValueError(f"{owner}: {len(each)} values of r for {len(blocks)} blocks")
    return Schedule.removing(dict(zip(blocks, each, strict=True)))
