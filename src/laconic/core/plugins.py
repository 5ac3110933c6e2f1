"""Methods of other packages, which register themselves when the entry points of the group ``laconic.methods`` are loaded."""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from importlib.metadata import entry_points

GROUP = "laconic.methods"


@cache
def discover() -> None:
    """Load the entry points, once. A warning names each one that fails; the others still load."""
    importlib.import_module("laconic.methods")  # the methods that come with laconic; that package is above this one
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:  # third-party modules may raise anything
            package = "an unknown package" if point.dist is None else point.dist.name
            warnings.warn(
                f"the method {point.name!r} of {package} cannot be loaded ({type(error).__name__}: {error}); laconic continues "
                "without it",
                stacklevel=2,
            )
