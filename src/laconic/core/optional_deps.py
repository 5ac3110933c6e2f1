"""Optional libraries: imported where they are used, with an error that names the extra that brings them."""

from __future__ import annotations

import importlib
from typing import Any


def missing(module: str, extra: str) -> str:
    """What to say when an optional library is not there."""
    return f'this needs {module}, which is not installed: pip install "laconic[{extra}]"'


def need(module: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(missing(module, extra), name=module) from error
