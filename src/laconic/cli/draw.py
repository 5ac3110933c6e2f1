"""Token maps: a photograph in which every group of patches that shares a token has one colour, and dropped ones are dark."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laconic.analysis.provenance import Provenance
from laconic.core import limits
from laconic.core.files import Refusal, write_atomically

SIDE = 336  # about as many pixels has the longer side of a picture
TINT = 0.52  # of a group's colour in its patches
BORDER = 2  # pixels
COARSE = 3  # a picture enlarged as often or more shows its pixels as they are
DPI = 130
LEGEND = "one colour: one token · as it was: a token of its own · dark: dropped"
DARK, SHADOW = 0.22, 0.07  # of a dropped patch's light what is left, and the grey over it


def _palette() -> np.ndarray:
    """36 colours [36, 3], the next one always far from those before it: hues a golden angle apart, in three shades.

    In OKLCH, where equal steps look equal; its way to sRGB is Ottosson's (2020).
    """
    number = np.arange(36)
    hue = number * 2.39996 + 0.5
    light, chroma = np.array([[0.74, 0.18], [0.60, 0.17], [0.87, 0.11]])[number // 12].T
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    cones = np.stack([long, middle, short])
    linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    return ((linear @ cones).T.clip(0, 1)) ** (1 / 2.2)


@dataclass(frozen=True)
class Map:
    """One image after one stage: ``holder[p]`` is the place of the token that holds patch p, or -1 where p was dropped."""

    holder: np.ndarray  # [P]
    grid: tuple[int, int]
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


def colours(stages: Sequence[Map]) -> list[dict[int, np.ndarray]]:
    """A colour for every group of every stage.

    A group keeps its colour as long as it has its place. A new one takes the colour that is used least in this stage
    and, if it can, by no neighbour.
    """
    palette, before, out = _palette(), dict[int, int](), []
    for stage in stages:
        chosen = {place: before[place] for place in stage.groups if place in before}
        for place, patches in stage.groups.items():
            if place not in chosen:
                near = {chosen.get(int(p)) for p in stage.holder[_around(patches, stage.grid)]}
                used = Counter(chosen.values())
                chosen[place] = min(range(len(palette)), key=lambda c: (used[c], c in near, c))
        before = {**before, **chosen}
        out.append({place: palette[c] for place, c in chosen.items()})
    return out


def _around(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the patches adjacent to any of these, corners too."""
    mask = np.zeros((grid[0] + 2, grid[1] + 2), bool)
    rows, columns = np.divmod(patches, grid[1])
    for down in range(3):
        for right in range(3):
            mask[rows + down, columns + right] = True
    return np.flatnonzero(mask[1:-1, 1:-1])


def paint(picture: np.ndarray, stage: Map, shades: Mapping[int, np.ndarray]) -> np.ndarray:
    """The picture [H, W, 3] with the groups of one stage tinted and bordered, and what was dropped darkened."""
    height, width = picture.shape[:2]
    rows = np.arange(height) * stage.grid[0] // height
    columns = np.arange(width) * stage.grid[1] // width
    holder = stage.holder.reshape(stage.grid)[rows[:, None], columns]
    colour, grouped = np.zeros((stage.holder.size + 1, 3)), np.zeros(stage.holder.size + 1, bool)
    for place, shade in shades.items():
        colour[place], grouped[place] = shade, True
    grey = picture.mean(2, keepdims=True)
    out = np.where((holder < 0)[..., None], DARK * grey + SHADOW, picture)
    strength = np.where(_edges(holder), 1.0, TINT) * grouped[holder]  # -1, dropped, is the last row: no group
    return out + strength[..., None] * (colour[holder] - out)


def _edges(holder: np.ndarray) -> np.ndarray:
    """The pixels whose token differs from that of a pixel within ``BORDER``; the edge of the picture counts as different."""
    height, width = holder.shape
    padded = np.pad(holder, BORDER, constant_values=-2)
    steps = [step for step in range(2 * BORDER + 1) if step != BORDER]
    edges = np.zeros(holder.shape, bool)
    for step in steps:
        edges |= padded[step : step + height, BORDER:-BORDER] != holder
        edges |= padded[BORDER:-BORDER, step : step + width] != holder
    return edges


def enlarge(picture: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The picture in the size of the sheet, a whole number of pixels a patch; of a tiny one every pixel is a square."""
    from PIL import Image

    times = round(SIDE / max(picture.shape[:2]))
    if times >= COARSE:
        return picture.repeat(times, 0).repeat(times, 1).astype(np.float32)

    cell = max(2 * BORDER + 2, round(SIDE / max(grid)))
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    larger = image.resize((grid[1] * cell, grid[0] * cell), Image.Resampling.BICUBIC)
    return np.asarray(larger).astype(np.float32) / 255


def token_maps(picture: np.ndarray, stages: Sequence[Map]) -> list[np.ndarray]:
    """The enlarged picture, then one painted picture for every stage."""
    large = enlarge(picture, stages[0].grid)
    return [large, *(paint(large, stage, shades) for stage, shades in zip(stages, colours(stages), strict=True))]


def save_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], heading: str) -> Path:
    """Write pictures as a sheet of rows, titles over the first row, as PNG.

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
    data = io.BytesIO()
    figure.savefig(data, format="png", pil_kwargs={"compress_level": 3})
    write_atomically(path, data.getvalue())
    return path
