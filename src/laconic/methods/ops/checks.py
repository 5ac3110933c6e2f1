"""Checks with error messages that several methods share."""

from __future__ import annotations

from typing import Any

from laconic.core.tokens import Tokens


def require(owner: str, option: str, value: Any, fits: bool, wanted: str) -> None:
    """Raise a ValueError unless an option value ``fits``; ``wanted`` says what the option is or must be."""
    if not fits:
        raise ValueError(f"{owner}: {option} {wanted}, not {value!r}")


def require_class_token(tokens: Tokens, otherwise: str) -> None:
    """Raise a LookupError if there is no class token; ``otherwise`` says what it is needed for and what to do."""
    if not tokens.has_cls:
        raise LookupError(f"this backbone has no class token, {otherwise}")
