"""Token maps: a photograph or a clip in which patches that share a token have their mean colour, and dropped ones are dark."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laconic.analysis.provenance import Provenance
from laconic.core import limits
from laconic.core.files import Refusal, write_atomically

SIDE = 336  # about as many pixels has the longer side of a picture
OUTLINE = 0.45  # of white in the line between two tokens
LINE = 1  # pixels
HEAT = 0.7  # weight of the colours of a heat map
QUALITY = 88  # of a JPEG
COARSE = 3  # a picture enlarged as often or more shows its pixels as they are
DPI = 130
LEGEND = "one colour, the mean of its patches: one token · as it was: a token of its own · dark: dropped"
DARK, SHADOW = 0.22, 0.07  # of a dropped patch's light what is left, and the grey over it


@dataclass(frozen=True)
class Map:
    """One image after one stage: ``holder[p]`` is the place of the token that holds patch p, or -1 where p was dropped.

    The grid of a clip has three sides: tubelets in time, rows, columns.
    """

    holder: np.ndarray  # [P]
    grid: tuple[int, ...]
    block: int
    tokens: int

    @property
    def groups(self) -> dict[int, np.ndarray]:
        """The patches of every token that holds more than one, by the token's place."""
        counts = Counter(self.holder.tolist())
        return {place: np.flatnonzero(self.holder == place) for place, n in sorted(counts.items()) if place >= 0 and n > 1}


def maps(provenance: Provenance, image: int) -> list[Map]:
    """The stages of one image of the last batch."""
    out = []
    for stage in provenance.stages:
        where, place = stage.where[image].cpu().numpy(), stage.kept[image].cpu().numpy()
        if len(np.unique(place)) < len(place):  # soft merges may put two tokens in one place: then by their first patch
            place = np.array([np.flatnonzero(where == token).min(initial=len(where)) for token in range(len(place))])
        holder = np.where(where < 0, -1, place[where.clip(0)])
        grid = stage.grid or (1, len(where))  # not known: in one row
        out.append(Map(holder, grid, stage.block, int((stage.size[image] > 0).sum())))
    return out


def paint(picture: np.ndarray, stage: Map) -> np.ndarray:
    """Fill the patches of every token of several patches with their mean colour, outline them, and darken what was dropped.

    ``picture`` is [H, W, 3] from 0 to 1, or a clip [T, H, W, 3], in which a token has one colour in all its frames. Patches
    with a token of their own stay as they are.
    """
    cells = [np.arange(pixels) * count // pixels for count, pixels in zip(stage.grid, picture.shape[:-1], strict=True)]
    holder = stage.holder.reshape(stage.grid)[np.ix_(*cells)]
    colour, grouped = np.zeros((stage.holder.size + 1, 3)), np.zeros(stage.holder.size + 1, bool)
    for place in stage.groups:
        colour[place], grouped[place] = picture[holder == place].mean(0), True
    grey = picture.mean(-1, keepdims=True)
    out = np.where((holder < 0)[..., None], DARK * grey + SHADOW, picture)
    out = np.where(grouped[holder][..., None], colour[holder], out)  # -1, dropped, is the last row: no group
    return np.where((_edges(holder) & (holder >= 0))[..., None], OUTLINE + (1 - OUTLINE) * out, out)


def _edges(holder: np.ndarray) -> np.ndarray:
    """Return the pixels whose left or upper neighbour belongs to another token."""
    edges = np.zeros(holder.shape, bool)
    edges[..., 1:, :] |= holder[..., 1:, :] != holder[..., :-1, :]
    edges[..., 1:] |= holder[..., 1:] != holder[..., :-1]
    return edges


def heat(picture: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the picture [H, W, 3] in grey under a heat map of values [H, W] between 0 and 1.

    Raises:
        Refusal: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise Refusal('drawing needs matplotlib: pip install "laconic[demo]"') from error
    coloured = np.asarray(colormaps["inferno"](values))[..., :3]
    return HEAT * coloured + (1 - HEAT) * picture.mean(2, keepdims=True)


def enlarge(picture: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """The picture in the size of the sheet, a whole number of pixels a patch; of a tiny one every pixel is a square.

    Of a clip every frame is enlarged.
    """
    from PIL import Image

    if picture.ndim == 4:
        return np.stack([enlarge(frame, grid[-2:]) for frame in picture])
    times = round(SIDE / max(picture.shape[:2]))
    if times >= COARSE:
        return picture.repeat(times, 0).repeat(times, 1).astype(np.float32)

    cell = max(2 * LINE + 2, round(SIDE / max(grid)))
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    larger = image.resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    return np.asarray(larger).astype(np.float32) / 255


def token_maps(picture: np.ndarray, stages: Sequence[Map]) -> list[np.ndarray]:
    """The enlarged picture (or clip), then a painted one for every stage."""
    large = enlarge(picture, stages[0].grid)
    return [large, *(paint(large, stage) for stage in stages)]


def save_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], heading: str) -> Path:
    """Write pictures as a sheet of rows, titles over the first row, as PNG or (by the suffix) as JPEG.

    Raises:
        Refusal: matplotlib is not there, the sheet is too large, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Refusal('drawing needs matplotlib: pip install "laconic[demo]"') from error
    (height, width), top, bottom, gap = rows[0][0].shape[:2], 54, 20, 8  # pixels
    across, down = len(titles) * (width + gap) + gap, len(rows) * (height + gap) + top + bottom
    if max(across, down) >= 2**16 or across * down > limits.PIXELS * limits.factor():
        raise Refusal(
            f"{path} would have {across:,} x {down:,} pixels, more than a picture may have; reduce at fewer blocks, or draw "
            "fewer images or methods at a time"
        )
    figure = Figure(figsize=(across / DPI, down / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            left, low = gap + j * (width + gap), down - top - i * (height + gap) - height
            figure.figimage((picture.clip(0, 1) * 255).round().astype(np.uint8), left, low, origin="upper")  # pixel by pixel
            if i == 0:
                figure.text((left + width / 2) / across, 1 - (top - 6) / down, titles[j], fontsize=9, ha="center", va="bottom")
    figure.text(gap / across, 1 - 8 / down, heading, fontsize=10, weight="bold", va="top")
    figure.text(gap / across, 6 / down, LEGEND, fontsize=8, color="0.35", va="bottom")
    data, jpeg = io.BytesIO(), path.suffix == ".jpg"
    figure.savefig(data, format="jpg" if jpeg else "png", pil_kwargs={"quality": QUALITY} if jpeg else {"compress_level": 3})
    write_atomically(path, data.getvalue())
    return path
