"""The page of ``laconic report``: its sections, token maps and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from laconic.cli import draw
from laconic.cli.report_rows import Change, Found, holders_of
from laconic.cli.variants import Variant, size_of
from laconic.data.preprocessing import config_for
from laconic.report.chart import Chart
from laconic.report.page import Cell, Code, Figure, Gallery, Grid, Image, Number, Section, packed, picture

WORST = 6  # pictures of the method that is judged
COARSE = 112  # pixels a side up to which pictures are stored exactly
MAPPED = (
    "Patches that share a token have their mean colour and a thin outline, a patch with a token of its own is as it was, "
    "dropped patches are dark. Point at a patch, or move to it with the arrow keys, and its token lights up."
)
FAILED = (
    "change: for class probabilities the share that the two answers do not have in common (total variation); for features one "
    "minus their cosine. The answer of a model without a head is that of the nearest other picture."
)


@dataclass(frozen=True)
class Shown:
    """Pictures of a page: names of all, the numbers of those that are drawn, and the figures."""

    names: tuple[str, ...]
    drawn: Gallery
    worst: Gallery
    worst_of: str


def show(
    base: nn.Module,
    images: Tensor,
    names: Sequence[str],
    drawn: Sequence[int],
    variants: Sequence[Variant],
    best: Found,
) -> Shown:
    """Draw the token maps of some pictures under all variants of methods, and those whose answer the best one changes most.

    Args:
        base: the unreduced model.
        images: all pictures as the model takes them, [N, channels, H, W].
        names: the name of each picture.
        drawn: numbers of the pictures to draw.
        variants: methods, the best first.
        best: the row whose failures are drawn.
    """
    looks = dict(zip(drawn, pictures_of(base, images[list(drawn)]), strict=True))
    maps, stills = list[dict[str, Any]](), dict[int, list[Image]]({number: [] for number in drawn})
    first = dict[str, str]()  # by method, its row that is drawn without a script
    grid: tuple[int, ...] = ()
    for variant in variants:
        found = holders_of(variant, images[list(drawn)])
        grid = found[0][0].grid
        whole = np.stack([np.stack([stage.holder for stage in stages]) for stages in found])
        maps.append({"label": variant.label, "blocks": [stage.block for stage in found[0]], "where": packed(whole)})
        if first.setdefault(variant.name, variant.label) == variant.label:
            for number, stages in zip(drawn, found, strict=True):
                stills[number].append(still(looks[number], stages[-1], variant.label))
    figures = [
        Figure([source(looks[n], names[n]), *stills[n]], names[n], [f"After the last block of {', '.join(first.values())}"], i)
        for i, n in enumerate(drawn)
    ]
    return Shown(
        tuple(names),
        Gallery(figures, {"grid": list(grid), "variants": maps}),
        _worst(base, images, names, variants[0], best),
        best.row.label,
    )


def _worst(base: nn.Module, images: Tensor, names: Sequence[str], variant: Variant, best: Found) -> Gallery:
    """Return the pictures whose answer changes most, each with its last map and both answers."""
    changes = best.changes[:WORST]
    numbers = [change.picture for change in changes]
    looks, found = pictures_of(base, images[numbers]), holders_of(variant, images[numbers])
    figures = list[Figure]()
    for change, look, stages in zip(changes, looks, found, strict=True):
        name = names[change.picture]
        lines = [f"unreduced: {change.before}", f"{best.row.label}: {change.after}", f"change {change.change:.3f}"]
        figures.append(Figure([source(look, name), still(look, stages[-1], best.row.label)], name, lines))
    return Gallery(figures)


def pictures_of(base: nn.Module, images: Tensor) -> list[NDArray]:
    """Return the pictures [H, W, 3] from 0 to 1 that a model takes as images [N, channels, H, W]."""
    config = config_for(base)
    mean, std = (np.array(config[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    return list((images.float().numpy() * std + mean).clip(0, 1).transpose(0, 2, 3, 1))


def source(look: NDArray, name: str) -> Image:
    """Return a picture for the page."""
    return Image(picture(look, exact=max(look.shape) <= COARSE), f"Picture {name}")


def still(look: NDArray, stage: draw.Map, label: str) -> Image:
    """Return a token map for the page."""
    painted = draw.paint(draw.enlarge(look, stage.grid), stage)
    return Image(
        picture(painted), f"Its {stage.tokens} tokens of {stage.holder.size} patches under {label}, after block {stage.block}"
    )


# ------------------------------------------------------------------------------------------------ sections
def sections(
    rows: Sequence[Found], chart: Chart, words: str, shown: Shown, about: Mapping[str, Any], notes: str
) -> list[Section]:
    """Return the sections of the page."""
    failures = [_failures(one, shown.names) for one in rows if one.row.kind == "method"]
    changed = Grid(
        "Pictures with another answer, and the largest change",
        ("row", "another answer", "largest change", "of picture"), failures,
    )  # fmt: skip
    facts = [(name, f"{value}") for name, value in (*about["environment"].items(), ("commit", about["commit"]))]
    return [
        Section("Score against measured speed", [chart, _table(rows, words), notes]),
        Section("What each method did to these pictures", [MAPPED, shown.drawn]),
        Section("Where it fails", [f"The pictures whose answer {shown.worst_of} changes most. {FAILED}", shown.worst, changed]),
        Section("Schedule and cost", [_cost(rows)]),
        Section("How it was measured", [Grid("Environment", ("", "value"), facts, words=2), Code(about["command"])]),
    ]


def _table(rows: Sequence[Found], words: str) -> Grid:
    """Return the table of all rows; a cell with an interval has the mean as its number."""
    header = ("row", "GMACs", "measured", "quartiles", words, "95 %", "over a smaller input", "95 %", "changed")
    lines = list[list[Cell]]()
    for one in rows:
        row, over = one.row, one.over
        lines.append(
            [
                row.label,
                Number(row.macs, f"{row.macs / 1e9:#.3g}"),
                "1" if row.kind == "base" else Number(row.wall.median, f"{row.wall.median:.2f}x"),
                "" if row.kind == "base" else f"{row.wall.low:.2f} to {row.wall.high:.2f}",
                Number(one.score.mean, f"{one.score.mean:.3f}"),
                f"{one.score.low:.3f} to {one.score.high:.3f}",
                "" if over is None else Number(over.mean, f"{over.mean:+.3f}"),
                "" if over is None else f"{over.low:+.3f} to {over.high:+.3f}",
                "" if one.changed is None else Number(one.changed, f"{one.changed:.1%}"),
            ]
        )
    return Grid("All rows", header, lines)


def _failures(one: Found, names: Sequence[str]) -> list[Cell]:
    worst: Change = one.changes[0]
    share = Number(one.changed or 0.0, f"{one.changed:.1%}")
    return [one.row.label, share, Number(worst.change, f"{worst.change:.3f}"), names[worst.picture]]


def _cost(rows: Sequence[Found]) -> Grid:
    """Return the table of what each row costs: input, parameters, tokens after each reducing block, time of a batch."""
    header = ("row", "input", "M parameters", "patch tokens", "implied", "ms a batch", "images/s")
    lines = list[list[Cell]]()
    for one in rows:
        row = one.row
        lines.append(
            [
                row.label,
                f"{size_of(row.image)}",
                Number(row.parameters, f"{row.parameters / 1e6:.2f}"),
                " ".join(map(str, row.tokens)),
                Number(row.implied, f"{row.implied:.2f}x"),
                Number(row.seconds.median, f"{row.seconds.median * 1e3:.1f}"),
                Number(row.images_per_second, f"{row.images_per_second:.1f}"),
            ]
        )
    return Grid(f"Batches of {rows[0].row.batch_size}; implied: by multiply-adds alone", header, lines)
