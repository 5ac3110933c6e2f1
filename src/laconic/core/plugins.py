"""Modules that register what they define when they are imported: methods of other packages, and laconic's own models.

Entry points of the group ``laconic.methods`` are loaded where a method is looked up by its name; the package of models, where
timm does not know an architecture. Both packages are above this one, so that they are named here and not imported.
"""

from __future__ import annotations

import importlib
import warnings
from functools import cache
from importlib.metadata import entry_points

GROUP = "laconic.methods"


@cache
def discover() -> None:
    """Load the entry points, once. A warning names each one that fails; the others still load."""
    importlib.import_module("laconic.methods")  # the methods that come with laconic
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


@cache
def register_architectures() -> None:
    """Register the architectures that come with laconic with timm, once."""
    importlib.import_module("laconic.models")
