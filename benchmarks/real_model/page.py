"""``python -m benchmarks.real_model.page docs/evidence.md``: write the page of the evidence from the committed results."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_model import rows, trained, trained_tables
from benchmarks.real_model.compare import Estimate, Results
from benchmarks.real_model.rows import BASE, KEEPS, SMALLER, Row
from benchmarks.real_model.sets import SETS
from laconic.cli.output import NONE, markdown
from laconic.core.files import write_atomically

RESULTS, SPEED = Path("results/real-model.jsonl"), Path("results/real-model-speed.json")
READINGS = Path(__file__).with_name("readings.toml")
MANY = ("large-many", "medium", "small", "three-things", "five-grounds", "one-ground", "regions")
SECTIONS = ("answer", "object", "settings", "sites", "methods", "small", "trained")
OVER = "over a smaller input"  # heading of the differences to a smaller input at equal measured time


class Tables:
    """The tables of the page."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def cost(self, row: Row, sets: Sequence[str]) -> tuple[str, str, str]:
        """Return the name, the multiply-adds and the measured speed-up of a row."""
        lines = [self.results.lines.get(name, {}).get(row.key) for name in sets]
        macs = next((line["macs"] for line in lines if line), None)
        speed = self.results.speed.get(row.key)
        name = "unreduced" if row == BASE else row.key
        return name, NONE if macs is None else f"{macs / 1e9:.2f}", NONE if speed is None else f"{speed[1]:.2f}×"

    def answer(self) -> str:
        """Return the table of fidelity: how near the features are to the unreduced model's, on regions of photographs."""
        chosen = (BASE, *map(Row, SMALLER[1:6]), *_both(rows.late_merging(), rows.characters()))
        measures = ("class_cosine", "patch_cosine", "map_correlation")
        head = ["", "GMACs", "speed", "class token", OVER, "patches", OVER, "saliency map", OVER]
        found = []
        for row in sorted(chosen, key=self._speed):
            cells: list[str] = []
            for measure in measures:
                cells += [_level(self.results.mean("regions", row.key, measure)), self._over("regions", row, measure, 1)]
            if cells[0] != NONE:
                found.append([*self.cost(row, ("regions",)), *cells])
        return _table(head, found)

    def object(self) -> str:
        """Return the table of retrieval with large things: the same thing, its category, and a linear probe."""
        name, measures = "large-many", ("hits", "category_hits", "probe_hits")
        head = [
            "",
            "GMACs",
            "speed",
            "same thing, %",
            "− unreduced",
            OVER,
            "category, %",
            "− unreduced",
            "probe, %",
            "− unreduced",
        ]
        found = []
        for row in rows.few():
            cells: list[str] = []
            for measure in measures:
                cells += [_share(self.results.mean(name, row.key, measure)), self._difference(name, row, measure)]
                if measure == "hits":
                    cells.append(self._over(name, row, measure, 100))
            if cells[0] != NONE:
                found.append([*self.cost(row, (name,)), *cells])
        return _table(head, found)

    def settings(self) -> str:
        """Return the differences to the unreduced model in all settings: the same instance, in points."""
        known = [name for name in MANY if BASE.key in self.results.lines.get(name, {})]
        head = ["same instance, points", *(SETS[name].words for name in known)]
        found: list[list[str]] = [["unreduced, %", *(_share(self.results.mean(name, BASE.key, "hits")) for name in known)]]
        queries = [self.results.lines[name][BASE.key] for name in known]
        found.append(["queries", *(f"{line['queries'] * line['instances']:,}" for line in queries)])
        for row in rows.few()[1:]:
            cells = [self._difference(name, row, "hits") for name in known]
            if any(cell != NONE for cell in cells):
                found.append([row.key, *cells])
        if not known:
            return ""
        return _table(head, found)

    def sites(self) -> str:
        """Return the table of other blocks and keep rates."""
        chosen = (BASE, *rows.late_selection(), *rows.late_merging())
        head = [
            "",
            "GMACs",
            "speed",
            "same thing, %",
            "− unreduced",
            OVER,
            "category, %",
            "− unreduced",
            "probe, %",
            "− unreduced",
        ]
        found = []
        for row in chosen:
            own = _share(self.results.mean("large", row.key, "hits"))
            if own == NONE:
                continue
            cells = [own, self._difference("large", row, "hits"), self._over("large", row, "hits", 100)]
            for name, measure in (("large", "category_hits"), ("large", "probe_hits")):
                cells += [_share(self.results.mean(name, row.key, measure)), self._difference(name, row, measure)]
            found.append([*self.cost(row, ("large",)), *cells])
        return _table(head, found)

    def methods(self, name: str = "large") -> str:
        """Return the table of all methods on a set: points that the same thing is found more often, by keep rate."""
        names = list(dict.fromkeys(row.method for row in rows.every_method() if row.method))
        head = ["same thing, − unreduced, points", *(f"keep {keep:g}" for keep in KEEPS)]
        head += [f"class token, keep {keep:g}" for keep in KEEPS]
        found = []
        for method in names:
            here = [Row(method=method, keep=keep) for keep in KEEPS]
            cells = [self._difference(name, row, "hits") for row in here]
            cells += [_level(self.results.mean(name, row.key, "class_cosine")) for row in here]
            if any(cell != NONE for cell in cells):
                found.append([method, *cells])
        if not found:
            return ""
        for size in SMALLER:
            key = Row(size).key
            if (line := self.results.lines.get(name, {}).get(key)) is not None:
                found.append(
                    [
                        f"{key} ({line['macs'] / 1e9:.2f} G)",
                        self._difference(name, Row(size), "hits"),
                        "",
                        "",
                        "",
                        _level(self.results.mean(name, key, "class_cosine")),
                    ]
                )
        base = self.results.mean(name, BASE.key, "hits")
        return f"Unreduced: {_share(base)} %.\n\n{markdown(head, found)}"

    def small(self) -> str:
        """Return the table of all methods on things of 1-5 % of the area."""
        return self.methods("small")

    def trained(self) -> str:
        """Return the tables of the fine-tuned rows."""
        return trained_tables.tables() if trained.OUTPUT.is_file() else ""

    def _speed(self, row: Row) -> float:
        return self.results.speed.get(row.key, (0.0, 0.0, 0.0))[1]

    def _difference(self, name: str, row: Row, measure: str) -> str:
        return "" if row == BASE else _signed(self.results.difference(name, row.key, BASE.key, measure), 100)

    def _over(self, name: str, row: Row, measure: str, scale: int) -> str:
        return "" if row.plain else _signed(self.results.over_smaller_input(name, row.key, measure), scale)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without the columns that no row fills; nothing without rows."""
    if not any(row[0] not in ("unreduced", NONE) and "input" not in row[0] for row in rows):
        return ""  # nothing to compare yet
    used = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", NONE) for row in rows)]
    return markdown([head[i] for i in used], [[row[i] for i in used] for row in rows])


def _both(*groups: tuple[Row, ...]) -> list[Row]:
    """Return the rows with a method of all groups, once each."""
    return [row for row in dict.fromkeys(row for group in groups for row in group) if row.method]


def _level(value: Estimate | None) -> str:
    return NONE if value is None else f"{value.mean:.3f}"


def _share(value: Estimate | None) -> str:
    return NONE if value is None else f"{100 * value.mean:.1f}"


def _signed(value: Estimate | None, scale: int) -> str:
    if value is None:
        return NONE
    digits = 3 if scale == 1 else 1
    text = f"{scale * value.mean:+.{digits}f} ± {scale * value.half:.{digits}f}"
    return f"**{text}**" if value.clear else text


def page() -> str:
    """Return the page; tables without a row yet are left out with their section."""
    texts: dict[str, Any] = tomllib.loads(READINGS.read_text())
    tables = Tables(Results.read(RESULTS, SPEED))
    here = json.loads(SPEED.read_text())["8"]["environment"]
    machine = f"{here['device']}, one thread, torch {here['torch']}, timm {here['timm']}, {here['date'][:10]}"
    parts = [texts["head"]["text"].strip().replace("{machine}", machine)]
    made = [(texts[name], getattr(tables, name)()) for name in SECTIONS]
    for number, (text, table) in enumerate(((text, table) for text, table in made if table), 1):
        said = (f"## {number}. {text['title']}", text["question"].strip(), table, text["reading"].strip())
        parts += [*said, f"`{text['command']}`"]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page to the file given."""
    write_atomically(Path(sys.argv[1]), page())


if __name__ == "__main__":
    main()
