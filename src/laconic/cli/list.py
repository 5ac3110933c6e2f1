"""``laconic list``: the methods and the models that laconic knows, and the recipes that come with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import laconic.backbones
import laconic.methods  # noqa: F401 (both register what is listed)
from laconic.cli.output import Report, Table, Verbatim
from laconic.cli.shortlist import SHORTLIST, SOURCE
from laconic.core.backbone import hosts
from laconic.core.method import MethodInfo, methods
from laconic.training.recipe import Recipe, names, read

HEADER = ("method", "what it is", "where", "score", "other tokens", "count", "training", "adds", "matrix", "arXiv")
BELOW = ("other tokens", "score", "what it is")
RECIPES = ("recipe", "method", "model", "keep", "epochs", "top-1", "GMACs", "arXiv")


@dataclass(frozen=True)
class ListReport(Report):
    """The methods, and the model and block classes by full path."""

    methods: tuple[MethodInfo, ...]
    models: tuple[str, ...]
    blocks: tuple[str, ...]

    def parts(self) -> Iterator[str | Table]:
        advice = tuple((one.use, ", ".join(one.methods), one.why) for one in SHORTLIST)
        yield Table("Shortlist", ("use", "method", "why"), advice, words=3)
        yield SOURCE
        yield Table("Methods", HEADER, tuple(map(_cells, self.methods)), words=10, below=BELOW)
        yield (
            "where: before a block, ahead of its attention but knowing it, between attention and MLP, or after it. count: "
            "the same for all images, or each image's own. training: yes if it must be trained before use. adds: yes if it "
            "adds parameters to the model. matrix: yes if it needs all attention weights, which fused attention does not keep. "
            "other tokens: what happens to the tokens that are not kept."
        )
        yield Verbatim("\n  ".join(["Model classes", *self.models]))
        yield Verbatim("\n  ".join(["\nBlock classes", *self.blocks]) + "\n")
        yield f"Recipes to train by: {len(names())}; laconic list --recipes shows them."

    def to_json(self) -> dict[str, Any]:
        rows = [{f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "config"} for row in self.methods]
        for out, row in zip(rows, self.methods, strict=True):
            out["options"] = {f.name: _plain(f) for f in dataclasses.fields(row.config)}
        shortlist = [dataclasses.asdict(one) for one in SHORTLIST]
        return {"shortlist": shortlist, "methods": rows, "models": list(self.models), "blocks": list(self.blocks)}


def _cells(row: MethodInfo) -> tuple[str, ...]:
    needs, adds, matrix = ("yes" if fact else "no" for fact in (row.trained, row.learns, row.full_attention))
    return (row.name, row.title, row.phase, row.score, row.rest, row.count, needs, adds, matrix, row.paper)


def _plain(field: Any) -> dict[str, Any]:
    """Return an option's type and default, as JSON."""
    return {"type": str(field.type), "default": None if field.default is dataclasses.MISSING else field.default}


@dataclass(frozen=True)
class RecipesReport(Report):
    """The recipes by name."""

    recipes: dict[str, Recipe]

    def parts(self) -> Iterator[str | Table]:
        rows = tuple(_recipe_cells(name, recipe) for name, recipe in self.recipes.items())
        yield Table("Recipes", RECIPES, rows, words=3, below=("model", "keep", "arXiv"))
        yield "top-1 and GMACs: as published; empty where they are not. laconic train --recipe NAME --data FOLDER runs one."

    def to_json(self) -> dict[str, Any]:
        return {"recipes": [{"name": name, **recipe.to_json()} for name, recipe in self.recipes.items()]}


def _recipe_cells(name: str, recipe: Recipe) -> tuple[str, ...]:
    method, about = recipe.method, recipe.about
    keep = " ".join(f"{rate:g}" for rate in method.keep) if isinstance(method.keep, tuple) else _number(method.keep)
    facts = (keep, str(recipe.optimization.epochs), _number(about.top1), _number(about.gmacs), about.paper.partition(",")[0])
    return (name, method.name or "none", recipe.model.name, *facts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def list_(*, recipes: bool = False) -> ListReport | RecipesReport:
    """List the methods and the supported models, or the recipes.

    Args:
        recipes: list the recipes that come with laconic instead, with what was published for them.
    """
    if recipes:
        return RecipesReport({name: read(name) for name in names()})
    known = hosts()
    return ListReport(tuple(methods().values()), known["models"], known["blocks"])
