"""Methods of other packages: whatever registers itself when the entry points of the group ``laconic.methods`` are loaded."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from importlib.metadata import entry_points

GROUP = "laconic.methods"


@cache
def discover() -> None:
    """Load them, once. One that fails is named in a warning, and the others go on."""
    importlib.import_module("laconic.methods")  # the methods that come with laconic; that package is above this one
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # whatever other people's modules raise
            package = "an unknown package" if point.dist is None else point.dist.name
            warnings.warn(
                f"the method {point.name!r} of {package} cannot be loaded ({type(error).__name__}: {error}); laconic goes on "
                "without it",
                stacklevel=2,
            )
