"""Suggestions for misspelled names. Imports nothing but the standard library, so the command line can use it first."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest_names(name: str, known: Sequence[str]) -> str:
    """Return `` Did you mean ...?`` for an error message, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
