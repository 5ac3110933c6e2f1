"""Progress bars of long computations, if tqdm is installed; planning itself needs only torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ticking(total: int, title: str, unit: str) -> Iterator[Callable[[], object]]:
    """Show a progress bar inside the context; yield the function to call after each unit of work."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=title, unit=unit, leave=False, disable=None) as bar:
        yield bar.update
