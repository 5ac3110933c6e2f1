"""A chart of a score against measured speed or cost: a Vega-Lite specification, an SVG of it, and Vega itself to inline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from laconic.core.optional_deps import need

VEGA_LITE = "6.4"  # of those that vl-convert holds
SERIES = ("#2f7fc1", "#cf5f1c", "#2a9166", "#a35bc0", "#c4487a", "#8b7a12", "#1a93a8", "#b0603f")  # 3:1 on white and on black
GREY = "#808080"
WIDTH, HEIGHT = 620, 380
MUTE = {"aria": False}  # the chart has one name; its marks have none worth reading


@dataclass(frozen=True)
class Point:
    """A row of a chart; ``low`` and ``high`` are the 95 % interval of y, ``x_low`` and ``x_high`` the quartiles of x."""

    label: str
    series: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    plain: bool = False  # True for what needs no method: it is grey


@dataclass(frozen=True)
class Chart:
    """Points with the titles of their axes; ``title`` describes the chart in words. In text, a chart is left out."""

    title: str
    x: str
    y: str
    points: tuple[Point, ...]

    def spec(self, width: int | str = WIDTH) -> dict[str, Any]:
        """Return the Vega-Lite specification, for a width in pixels or of its ``container``."""
        zoom = {"name": "zoom", "select": "interval", "bind": "scales"}
        chosen = {"name": "chosen", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}
        dim = {"condition": {"param": "chosen", "value": 1}, "value": 0.12}
        series, plain = self._series()
        colour = {"field": "series", "type": "nominal", "title": None, "scale": {"domain": series, "range": _range(plain)}}
        limits = {axis: self._limits(axis) for axis in ("x", "y")}
        x, y = _axis("x", self.x, limits["x"]), _axis("y", self.y, limits["y"])
        shown = {"color": colour, "opacity": dim}
        tips = [{"field": name, "title": title} for name, title in (("label", "row"), ("shown_x", self.x), ("shown_y", self.y))]
        dots = {**shown, "shape": {**colour, "scale": {"domain": series}}, "x": x, "y": y, "tooltip": tips}
        paths = {**shown, "x": x, "y": y, "order": {"field": "x"}}
        tall = {**shown, "x": x, "y": _axis("low", self.y, limits["y"]), "y2": {"field": "high"}}
        wide = {**shown, "y": y, "x": _axis("x_low", self.x, limits["x"]), "x2": {"field": "x_high"}}
        layers: list[dict[str, Any]] = [
            {"mark": {"type": "line", "strokeWidth": 1, "strokeDash": [4, 3], "clip": True, **MUTE}, "encoding": paths},
            {"mark": {"type": "rule", "strokeWidth": 1, "clip": True, **MUTE}, "encoding": tall},
            {"mark": {"type": "rule", "strokeWidth": 1, "clip": True, **MUTE}, "encoding": wide},
            {
                "mark": {"type": "point", "filled": True, "size": 70, "clip": True, **MUTE},
                "encoding": dots,
                "params": [zoom, chosen],
            },
        ]
        values = [{**asdict(p), "shown_x": f"{p.x:.3g}", "shown_y": _shown(p)} for p in self.points]
        whole = {"data": {"values": values}, "width": width, "height": HEIGHT, "layer": layers, "config": _config()}
        schema = f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE.split('.')[0]}.json"
        return {"$schema": schema, "background": None, "autosize": {"type": "fit", "contains": "padding"}, **whole}

    def svg(self) -> str:
        """Return the chart as SVG, for pages without JavaScript.

        Raises:
            ImportError: vl-convert-python is not installed.
        """
        drawn = str(need("vl_convert", "report").vegalite_to_svg(self.spec(), vl_version=VEGA_LITE))
        return re.sub(r" (?:role|aria-[a-z]+)=\"[^\"]*\"", "", drawn)  # the figure around it has the name of the whole

    def _limits(self, axis: str) -> list[float]:
        """Return the limits of an axis: those of the points that are no alternative, with a margin; the chart can be moved."""
        low, high = {"x": ("x_low", "x_high"), "y": ("low", "high")}[axis]
        points = [point for point in self.points if not point.plain] or list(self.points)
        ends = [getattr(one, name) for one in points for name in (axis, low, high) if getattr(one, name) is not None]
        first = self.points[0]
        ends.append(getattr(first, axis))  # the unreduced model
        margin = (max(ends) - min(ends)) / 6 or 0.1
        return [min(ends) - margin / 2, max(ends) + margin * (2 if axis == "x" else 0.5)]

    def _series(self) -> tuple[list[str], list[bool]]:
        known = {point.series: point.plain for point in self.points}
        return list(known), list(known.values())


@cache
def library() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script, to inline.

    Raises:
        ImportError: vl-convert-python is not installed.
    """
    return str(need("vl_convert", "report").javascript_bundle(vl_version=VEGA_LITE))


def _range(plain: Sequence[bool]) -> list[str]:
    colours = iter(SERIES * (1 + len(plain) // len(SERIES)))
    return [GREY if one else next(colours) for one in plain]


def _axis(field: str, title: str, limits: list[float]) -> dict[str, Any]:
    scale = {"zero": False, "nice": False, "domain": limits}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale}


def _shown(point: Point) -> str:
    interval = "" if point.low is None else f" ({point.low:.3f} to {point.high:.3f})"
    return f"{point.y:.3f}{interval}"


def _config() -> dict[str, Any]:
    """Return the looks; texts take their colour from the page."""
    lines = {"gridColor": GREY, "gridOpacity": 0.25, "domainColor": GREY, "tickColor": GREY, "labelFontSize": 12}
    legend = {
        **MUTE,
        "orient": "bottom",
        "columns": 4,
        "labelFontSize": 12,
        "symbolSize": 90,
        "columnPadding": 18,
        "labelLimit": 240,
    }
    return {
        "aria": False,
        "axis": {**lines, "titleFontSize": 13, "titleFontWeight": 500},
        "legend": legend,
        "view": {"stroke": None},
    }
