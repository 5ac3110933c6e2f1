"""Build a page: sections of paragraphs, tables, charts and pictures, as one HTML file with its styles, scripts and images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import laconic
from laconic.core.optional_deps import need
from laconic.report.chart import Chart, library

STATIC = Path(__file__).parent / "static"
QUALITY = 85  # of a JPEG


@dataclass(frozen=True)
class Number:
    """A number in a table: ``text`` is shown, and ``value`` is what the JSON of the report has."""

    value: int | float
    text: str


Cell = str | Number


@dataclass(frozen=True)
class Grid:
    """A table of a page; the first ``words`` columns are set to the left, the others to the right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


@dataclass(frozen=True)
class Code:
    """Text to copy, such as a command."""

    text: str


@dataclass(frozen=True)
class Image:
    """A picture in the page: ``uri`` holds its bytes, ``alt`` describes it."""

    uri: str
    alt: str


@dataclass(frozen=True)
class Figure:
    """Pictures next to each other with one caption; ``number`` is set if a script draws maps on the first of them."""

    images: Sequence[Image]
    caption: str
    lines: Sequence[str] = ()
    number: int | None = None


@dataclass(frozen=True)
class Gallery:
    """Figures in a grid. With ``maps`` (see `packed`), a script draws each block of each variant on their first pictures."""

    figures: Sequence[Figure]
    maps: dict[str, Any] | None = None


Part = str | Grid | Chart | Code | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    parts: Sequence[Part]


def build(title: str, lead: Sequence[str], sections: Sequence[Section], data: Any, source: str = "") -> str:
    """Return a page as HTML.

    Args:
        title: its heading.
        lead: paragraphs under the heading, the first of which is set large.
        sections: the content.
        data: the same numbers as plain JSON, which the page holds in the element ``data``.
        source: the command that wrote it.

    Raises:
        ImportError: jinja2 or, for a chart, vl-convert-python is not installed.
    """
    jinja = need("jinja2", "report")
    place = jinja.Environment(
        loader=jinja.FileSystemLoader(STATIC),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
    )
    place.filters["kind"] = lambda part: type(part).__name__
    place.filters["embedded"] = embedded
    parts = [part for section in sections for part in section.parts]
    charts, maps = any(isinstance(p, Chart) for p in parts), any(isinstance(p, Gallery) and p.maps for p in parts)
    scripts = [library()] * charts + [(STATIC / "report.js").read_text(encoding="utf-8")] * (charts or maps)
    style = (STATIC / "page.css").read_text(encoding="utf-8")
    facts = {"title": title, "lead": lead, "sections": sections, "data": data, "source": source, "version": laconic.__version__}
    return str(place.get_template("page.html").render(**facts, style=style, scripts=scripts))


def embedded(value: Any) -> Any:
    """Return a value as JSON that is safe inside of a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return need("markupsafe", "report").Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def picture(values: NDArray, *, exact: bool = False) -> str:
    """Return a picture [H, W, 3] from 0 to 1 as a data URI: JPEG, or PNG where it is to be exact."""
    from PIL import Image as Pillow

    content = io.BytesIO()
    image = Pillow.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    kind = "png" if exact else "jpeg"
    image.save(content, format=kind, **({"optimize": True} if exact else {"quality": QUALITY}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def packed(holders: NDArray) -> str:
    """Return maps of patches to tokens as base64 of little-endian int16; -1: the patch was dropped."""
    return base64.b64encode(holders.astype("<i2").tobytes()).decode()
