"""The target of a plan: multiply-adds of one image, a speed-up, or milliseconds of one forward."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from laconic.core.arguments import check_budget

Kind = Literal["macs", "macs-ratio", "speedup", "time"]
FORMS = (
    "multiply-adds of one image (2.3G, 230M), a speed-up measured on this machine (1.6x), the same ratio of multiply-adds "
    "(1.6x-macs), or the time of one forward (12ms)"
)
PATTERN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(G|M|x-macs|x|ms)")
UNITS: dict[str, tuple[Kind, float]] = {
    "G": ("macs", 1e9),
    "M": ("macs", 1e6),
    "x-macs": ("macs-ratio", 1.0),
    "x": ("speedup", 1.0),
    "ms": ("time", 1e-3),
}


@dataclass(frozen=True)
class Target:
    """A budget: ``value`` is in multiply-adds of one image, a ratio to the unreduced model, or seconds of one forward."""

    kind: Kind
    value: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Target:
        """Parse a budget such as 2.3G, 230M, 1.6x, 1.6x-macs or 12ms.

        Raises:
            TypeError: not a string. ValueError: another form, zero, or a ratio of at most 1.
        """
        check_budget(text)
        found = PATTERN.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"budget {text!r}: expected {FORMS}")
        kind, unit = UNITS[found[2]]
        value = float(found[1]) * unit
        if value <= 0:
            raise ValueError(f"budget {text!r} must be greater than 0; expected {FORMS}")
        if kind in ("macs-ratio", "speedup") and value <= 1:
            raise ValueError(f"budget {text!r}: the unreduced model is 1x, so there is nothing to do; give a ratio above 1")
        return cls(kind, value, text.strip())

    @property
    def measured(self) -> bool:
        """True if the budget is a time or a speed-up, which must be measured."""
        return self.kind in ("speedup", "time")

    def limit(self, base: float) -> float:
        """Return the highest cost allowed if the unreduced model costs ``base`` (multiply-adds, or seconds)."""
        return base / self.value if self.kind in ("macs-ratio", "speedup") else self.value

    def nearest(self, cost: float, base: float) -> str:
        """Return the tightest budget of this kind that ``cost`` meets, as text for `parse`, rounded so that it is met."""
        if self.kind in ("macs-ratio", "speedup"):
            return f"{math.floor(base / cost * 1000) / 1000:g}{'x' if self.kind == 'speedup' else 'x-macs'}"
        name, unit = ("ms", 1e-3) if self.kind == "time" else ("G", 1e9) if cost >= 1e9 else ("M", 1e6)
        return f"{math.ceil(cost / unit * 1000) / 1000:g}{name}"

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        return {"text": self.text, "kind": self.kind, "value": self.value}
