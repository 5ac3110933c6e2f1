"""Recipes: everything a training run depends on, as one TOML file; its keys are the fields of these dataclasses."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from laconic.core.from_dict import build
from laconic.core.suggestions import nearest_names
from laconic.core.values import check_nesting, is_whole, parsed, shown
from laconic.training.recipe_sections import (
    About,
    AugmentationPart,
    DataPart,
    LossPart,
    MethodPart,
    ModelPart,
    OptimizationPart,
    StepPart,
)

__all__ = [
    "About",
    "AugmentationPart",
    "DataPart",
    "LossPart",
    "MethodPart",
    "ModelPart",
    "OptimizationPart",
    "Recipe",
    "StepPart",
    "from_json",
    "names",
    "read",
]


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run except the locations of its data and results."""

    about: About = field(default_factory=About)
    model: ModelPart = field(default_factory=ModelPart)
    method: MethodPart = field(default_factory=MethodPart)
    data: DataPart = field(default_factory=DataPart)
    augmentation: AugmentationPart = field(default_factory=AugmentationPart)
    optimization: OptimizationPart = field(default_factory=OptimizationPart)
    loss: LossPart = field(default_factory=LossPart)
    step: StepPart = field(default_factory=StepPart)
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_whole(self.seed) or self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {shown(self.seed)}")

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def replaced(self, settings: Sequence[str]) -> Recipe:
        """Return the recipe with settings such as ``optimization.lr=1e-4`` (values as in TOML; words need no quotes).

        Raises:
            ValueError: a setting is not of that form, a key is unknown, or a value has the wrong type.
        """
        tree = self.to_json()
        for text in settings:
            key, equals, value = text.partition("=")
            *path, last = key.strip().split(".")
            if not equals or not last:
                raise ValueError(f"setting {text!r}: expected KEY=VALUE, for example optimization.lr=1e-4")
            branch = tree
            for step, name in enumerate(path):
                if not isinstance(branch.get(name), dict):
                    known = ", ".join(k for k, v in branch.items() if isinstance(v, dict))
                    where, near = ".".join(path[: step + 1]), nearest_names(name, list(branch))
                    raise ValueError(f"setting {text!r}: a recipe has no part {where!r}.{near} There are: {known}")
                branch = branch[name]
            branch[last] = _value(value.strip())
        return from_json(tree)


def _value(text: str) -> Any:
    try:
        return parsed(tomllib.loads, f"value = {text}")["value"]
    except ValueError:
        return text


# ------------------------------------------------------------------------------------------------ reading
def names() -> list[str]:
    """Return the names of the recipes that come with laconic."""
    folder = resources.files("laconic") / "recipes"
    if not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def read(name: str) -> Recipe:
    """Read a recipe by its name, from a .toml file, or from the recipe.json of an earlier run.

    Raises:
        LookupError: no recipe or file has that name. ValueError: the file is not a recipe; the message names the wrong key.
    """
    text, is_toml = _text(name)
    try:
        return from_json(parsed(tomllib.loads if is_toml else json.loads, text))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"recipe {name} is not {'TOML' if is_toml else 'JSON'}: {error}") from error
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from error


def _text(name: str) -> tuple[str, bool]:
    """Return the text of a recipe's file, and True if it is TOML."""
    path = Path(name)
    if path.suffix in (".toml", ".json"):
        try:
            return path.read_text(encoding="utf-8"), path.suffix == ".toml"
        except OSError as error:
            raise LookupError(f"recipe {name} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {name} is not text ({error}); expected TOML, or the recipe.json of a run") from error
    known = names()
    if name not in known:
        part_of = [longer for longer in known if name in longer] if name else []
        near = f" Did you mean {' or '.join(map(repr, part_of[:3]))}?" if part_of else nearest_names(name, known)
        raise LookupError(
            f"no recipe is called {name!r}.{near} `laconic list --recipes` shows all {len(known)}; a file "
            "is given by its path, ending in .toml"
        )
    return (resources.files("laconic") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"), True


def from_json(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested tables.

    Raises:
        ValueError: a key is unknown (the message names the nearest one), or a value has the wrong type.
    """
    check_nesting(tree)
    return build(Recipe, tree)
