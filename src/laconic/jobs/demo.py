"""``laconic demo``: the main job. A real model, real photographs, five methods, one honest table and pictures of it all."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from laconic.jobs import compare, draw, machine, photos
from laconic.jobs.agreement import Agreement, agree, answers
from laconic.jobs.compare import Row, threads
from laconic.jobs.measure import Setting
from laconic.jobs.output import Refusal, Report, Table, sentence
from laconic.jobs.photos import Photo
from laconic.jobs.show import MODEL, Picture, draw_one, look
from laconic.jobs.variants import Variant, alternatives, parse_methods, reduced, unreduced
from laconic.jobs.weights import Loaded, load
from laconic.reducer import Method

LOG = logging.getLogger(__name__)
METHODS = ("etps", "dtps", "bat", "evit", "dynamicvit")
KEEPS = (0.7, 0.5)
HEADER = ("", "M params", "GMACs", "patch tokens", "implied", "measured", "(quartiles)", "cosine", "KL", "top-1")
EXPLAINED = (
    "implied: the unreduced model's multiply-adds by this one's. measured: its time, before and after, by this one's, median "
    "and quartiles over the rounds. How far each is from the unreduced model, mean over the photographs: cosine of "
    "the features before the head, KL divergence and agreement in the first class of the class probabilities."
)


@dataclass(frozen=True)
class DemoReport(Report):
    """The one table, on what it was measured, and the pictures."""

    model: str
    weights: str
    photographs: tuple[str, ...]
    rows: tuple[Row, ...]
    agreement: tuple[Agreement, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...]
    sheet: Path
    pictures: tuple[Picture, ...]

    def parts(self) -> Iterator[str | Table]:
        here, batch = self.environment, self.rows[0].batch_size
        yield f"{self.weights[0].upper()}{self.weights[1:]}."
        yield f"Photographs, as scikit-image ships them: {'; '.join(self.photographs)}."
        title = f"{self.model}, batch {batch}, {here['rounds']} rounds on {here['device']}, {threads(here)}"
        yield Table(title, HEADER, tuple(map(_cells, self.rows, self.agreement)))
        yield " ".join([EXPLAINED, *(f"{note[0].upper()}{note[1:]}." for note in self.notes)])
        yield f"\n{compare.verdict(self.rows)}"
        yield f"\nToken maps: {self.sheet}, and {len(self.pictures)} pictures beside it, one for every photograph and method."

    def to_json(self) -> dict[str, Any]:
        rows = [{**r.to_json(), "agreement": asdict(a)} for r, a in zip(self.rows, self.agreement, strict=True)]
        pictures = [{**vars(p), "file": str(p.file)} for p in self.pictures]
        out = {
            **vars(self),
            "rows": rows,
            "sheet": str(self.sheet),
            "pictures": pictures,
            "verdict": compare.verdict(self.rows),
        }
        del out["agreement"]
        plain: dict[str, Any] = json.loads(json.dumps(out))
        return plain


def _cells(row: Row, agreement: Agreement) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    facts = (row.label, f"{row.parameters / 1e6:.2f}", f"{row.macs / 1e9:.3f}", " ".join(map(str, row.tokens)))
    if row.kind == "base":
        return (*facts, "1", "1", "", "1", "0", "100%")
    speed = (f"{row.implied:.2f}x", f"{row.wall.median:.2f}x", f"({row.wall.low:.2f}-{row.wall.high:.2f})")
    return (*facts, *speed, number(agreement.cosine, ".4f"), number(agreement.kl, ".4f"), number(agreement.top1, ".0%"))


def demo(
    *,
    model: str = MODEL,
    weights: Path | None = None,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    batch_size: int = 4,
    photographs: int = 4,
    setting: Setting = Setting(rounds=5, threads=1),  # noqa: B008 (it is frozen)
    output: Path = Path("laconic-demo"),
) -> DemoReport:
    """Reduce a real model on real photographs, and see what it saves and what it changes.

    Prints one table (cost, measured speed beside random pruning, pooling, a lower resolution and a smaller model, distance
    from the unreduced model) and draws what became of every patch.

    Args:
        model: timm name.
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: timm's pretrained ones).
        method: a method (default: etps, dtps, bat, evit and dynamicvit).
        keep: keep rate of every reducing block (default: 0.7 and 0.5; pictures are of the first).
        batch_size: images in a batch, for the times.
        photographs: how many of the photographs that scikit-image ships.
        setting: how to measure.
        output: directory for the pictures.

    Raises:
        Refusal: no such model, weights that do not fit, no photographs, a file that cannot be written.
        LookupError, TypeError, ValueError: as `laconic.reduce_`.
    """
    if batch_size < 1 or photographs < 1:
        raise Refusal(f"--batch-size and --photographs must be at least 1, not {min(batch_size, photographs)}")
    configs, keeps = parse_methods(method or METHODS, ()), tuple(dict.fromkeys(keep or KEEPS))
    sources = photos.shipped(photographs)
    with machine.prepared(setting):
        LOG.info("loading %s", model)
        loaded = load(model, weights)
        LOG.info("reducing copies of %s, and proving each of them", model)
        variants, notes, strangers = _variants(model, loaded, configs, keeps)
        read = [photos.read(path, loaded.model) for path in sources]
        agreement = _agreement(variants, read, strangers)
        drawn = [v for v in variants if v.kind == "method" and v.keep == keeps[0]]
        sheet, pictures = _draw(output, drawn, read, loaded.remark)
        rows = compare.compare(variants, batch_size, setting, warmup=1)
        environment = machine.environment(setting)
    facts = (model, loaded.line, tuple(f"{path.name}, {source}" for path, source in sources.items()), tuple(rows))
    notes = [*_untrained(configs), *notes, *compare.busy(rows)]
    return DemoReport(*facts, tuple(agreement), environment, tuple(notes), sheet, tuple(pictures))


def _variants(
    name: str, loaded: Loaded, configs: Sequence[Method], keeps: Sequence[float]
) -> tuple[list[Variant], list[str], set[str]]:
    """The unreduced model, the methods, the alternatives; notes; and which of them have nothing in common with the first."""
    strangers = set[str]()

    def smaller(other: str) -> nn.Module:
        its = load(other)
        if its.random or loaded.random:  # random weights have nothing to agree on with others
            strangers.add(other)
        return its.model

    own = [reduced(loaded.model, config, keep) for keep in keeps for config in configs]
    others, notes = alternatives(name, loaded.model, keeps, smaller)
    return [unreduced("unreduced", loaded.model), *own, *others], notes, strangers


def _agreement(variants: Sequence[Variant], read: Sequence[Photo], strangers: set[str]) -> list[Agreement]:
    """How far each variant is from the first."""
    full, out = answers(variants[0].model, read, variants[0].image), [Agreement(1.0, 0.0, 1.0)]
    for variant in variants[1:]:
        if variant.name in strangers:
            out.append(Agreement())
            continue
        own = [photos.read(photo.path, variant.model) for photo in read] if variant.kind == "smaller" else read
        out.append(agree(answers(variant.model, own, variant.image), full))
    return out


def _draw(folder: Path, variants: Sequence[Variant], read: Sequence[Photo], remark: str) -> tuple[Path, list[Picture]]:
    """A picture of every stage for each method and photograph, and a sheet with the last stage of all of them."""
    pictures, panels = list[Picture](), [list[Any]() for _ in read]
    for variant in tqdm(variants, desc="drawing", unit="method", leave=False, disable=None):
        ledger = look(variant.model, read)
        for number, photo in enumerate(read):
            file = folder / f"{photo.path.stem}-{variant.name}-{variant.keep:g}.png"
            pictures.append(draw_one(file, photo, ledger, number, variant.name, f"{variant.keep:g}", remark))
            maps = draw.token_maps(photo.picture, draw.maps(ledger, number))
            panels[number] += [maps[-1]] if panels[number] else [maps[0], maps[-1]]
    titles = [f"{variants[0].tokens[0]} patches", *(f"{v.name}: {v.tokens[-1]} tokens" for v in variants)]
    heading = f"keep {variants[0].keep:g} at {len(variants[0].tokens) - 1} blocks: what is left{remark}"
    return draw.save_sheet(folder / "token-maps.png", panels, titles, heading), pictures


def _untrained(configs: Sequence[Method]) -> list[str]:
    names = [config.row.name for config in configs if config.row.learns]
    if not names:
        return []
    return [f"{sentence(names)} score tokens with a predictor that nobody has trained here, so what they keep is arbitrary"]
