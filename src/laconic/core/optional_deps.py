"""Import optional libraries at their use, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def missing(module: str, extra: str) -> str:
    """Return the message for an optional library that is not installed."""
    return f'this needs {module}, which is not installed: pip install "laconic[{extra}]"'


def need(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: it is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(missing(module, extra), name=module) from error
