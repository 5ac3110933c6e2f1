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
from benchmarks.real_model.rows import BASE, KEEPS, LARGE_BASE, LARGE_SMALLER, SMALLER, Row
from benchmarks.real_model.sets import SETS
from laconic.cli.output import NONE, markdown
from laconic.core.files import write_atomically

RESULTS, SPEED = Path("results/real-model.jsonl"), Path("results/real-model-speed.json")
READINGS = Path(__file__).with_name("readings.toml")
MANY = ("large-many", "medium", "three-things", "five-grounds", "regions")
SECTIONS = ("answer", "object", "settings", "sites", "methods", "small", "large_input", "before", "trained")
OVER = "over a smaller input"  # heading of the differences to a smaller input at equal measured time
FEATURES = ("class_cosine", "patch_cosine", "map_correlation")
FEATURE_NAMES = ("class token", "patches", "saliency map")
RETRIEVAL = ("same thing, %", "− unreduced", OVER, "category, %", "− unreduced", "probe, %", "− unreduced")


class Tables:
    """The tables of the page."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def cost(self, row: Row, sets: Sequence[str]) -> tuple[str, str, str]:
        """Return the name, the multiply-adds and the measured speed-up of a row."""
        lines = [self.results.lines.get(name, {}).get(row.key) for name in sets]
        macs = next((line["macs"] for line in lines if line), None)
        speed = self.results.speed.get(row.key)
        name = "unreduced" if row == self.results.base else row.key
        return name, NONE if macs is None else f"{macs / 1e9:.2f}", NONE if speed is None else f"{speed[1]:.2f}×"

    def answer(self) -> str:
        """Return the table of fidelity: how near the features are to the unreduced model's, on regions of photographs."""
        chosen = (BASE, *map(Row, SMALLER[:6]), *_both(rows.late_merging(), rows.few()))
        return self._fidelity("views", sorted(chosen, key=self._speed))

    def large_input(self) -> str:
        """Return the table of fidelity at the larger input."""
        results = Results.read(RESULTS, SPEED, LARGE_BASE, LARGE_SMALLER)
        return Tables(results)._fidelity("views-518", sorted(rows.large_input(), key=lambda row: row.size != LARGE_BASE.size))

    def before(self) -> str:
        """Return the tables of reductions before the first block, at both input sizes."""
        large = Tables(Results.read(RESULTS, SPEED, LARGE_BASE, LARGE_SMALLER))
        found = [
            tables._fidelity(name, sorted(rows.before_blocks(base.size, smaller), key=tables._speed))
            for tables, name, base, smaller in (
                (self, "views", BASE, SMALLER[:6]),
                (large, "views-518", LARGE_BASE, LARGE_SMALLER),
            )
        ]
        return "\n\n".join(table for table in (*found, self.exponents()) if table)

    def exponents(self) -> str:
        """Return the table of class tokens by the exponent of the sizes of pre-merge."""
        found = []
        for usual, every in rows.exponents().items():
            means = [self.results.mean("views", row.key, "class_cosine") for row in every]
            if None not in means:
                found.append([usual.key, *map(_level, means)])
        return markdown(["class token", *(f"exponent {e:g}" for e in rows.EXPONENTS)], found) if found else ""

    def _fidelity(self, name: str, chosen: Sequence[Row]) -> str:
        head = ["", "GMACs", "speed", *(column for word in FEATURE_NAMES for column in (word, OVER))]
        found = []
        for row in chosen:
            cells: list[str] = []
            for measure in FEATURES:
                cells += [_level(self.results.mean(name, row.key, measure)), self._over(name, row, measure, 1)]
            if cells[0] != NONE:
                found.append([*self.cost(row, (name,)), *cells])
        return _table(head, found)

    def object(self) -> str:
        """Return the table of retrieval with large things: the same thing, its category, and a linear probe."""
        return self._retrieval("large-many", rows.few())

    def sites(self) -> str:
        """Return the table of other blocks and keep rates."""
        return self._retrieval("large", rows.late_selection())

    def _retrieval(self, name: str, chosen: Sequence[Row]) -> str:
        found = []
        for row in chosen:
            cells: list[str] = []
            for measure in ("hits", "category_hits", "probe_hits"):
                cells += [_share(self.results.mean(name, row.key, measure)), self._difference(name, row, measure)]
                if measure == "hits":
                    cells.append(self._over(name, row, measure, 100))
            if cells[0] != NONE:
                found.append([*self.cost(row, (name,)), *cells])
        return _table(["", "GMACs", "speed", *RETRIEVAL], found)

    def settings(self) -> str:
        """Return the differences to the unreduced model in all settings: the same instance, in points."""
        known = [name for name in MANY if BASE.key in self.results.lines.get(name, {})]
        head = ["same instance, points", *(SETS[name].words for name in known)]
        found: list[list[str]] = [["unreduced, %", *(_share(self.results.mean(name, BASE.key, "hits")) for name in known)]]
        queries = [self.results.lines[name][BASE.key] for name in known]
        found.append(["queries", *(f"{line['queries'] * line['instances']:,}" for line in queries)])
        for row in rows.fewest()[1:]:
            cells = [self._difference(name, row, "hits") for name in known]
            if any(cell != NONE for cell in cells):
                found.append([row.key, *cells])
        if not known:
            return ""
        return _table(head, found)

    def methods(self) -> str:
        """Return the table of all methods: fidelity by keep rate, and how often they find large things."""
        head = ["class token", *(f"keep {keep:g}" for keep in KEEPS), f"{OVER}, keep 0.5", "same thing, keep 0.5, − unreduced"]
        found = []
        for method in rows.training_free():
            here = {keep: Row(method=method, keep=keep, at=rows.usual_blocks(method)) for keep in KEEPS}
            cells = [_level(self.results.mean("views", row.key, "class_cosine")) for row in here.values()]
            over = self._over("views", here[0.5], "class_cosine", 1)
            found.append([method, *cells, over, self._difference("large", here[0.5], "hits")])
        found.sort(key=lambda cells: cells[3], reverse=True)
        return markdown(head, found) if any(set(cells[1:]) != {NONE} for cells in found) else ""

    def small(self) -> str:
        """Return the table of small things: found by the features of their own patches, and by the class token."""
        chosen = rows.small()
        head = [
            "",
            "GMACs",
            "speed",
            "same thing by its patches, %",
            "− unreduced",
            OVER,
            "saliency finds it, AUC",
            "− unreduced",
        ]
        found = []
        for row in dict.fromkeys(chosen):
            own = self.results.mean("small", row.key, "object_hits")
            if own is not None:
                cells = [
                    _share(own),
                    self._difference("small", row, "object_hits"),
                    self._over("small", row, "object_hits", 100),
                ]
                area = [_level(self.results.mean("small", row.key, "map_auc")), self._difference("small", row, "map_auc", 1)]
                found.append([*self.cost(row, ("small",)), *cells, *area])
        return _table(head, found)

    def trained(self) -> str:
        """Return the tables of the fine-tuned rows."""
        return trained_tables.tables() if trained.OUTPUT.is_file() else ""

    def _speed(self, row: Row) -> float:
        return self.results.speed.get(row.key, (0.0, 0.0, 0.0))[1]

    def _difference(self, name: str, row: Row, measure: str, scale: int = 100) -> str:
        return "" if row == BASE else _signed(self.results.difference(name, row.key, BASE.key, measure), scale)

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
    here = json.loads(SPEED.read_text())[BASE.key]["environment"]
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
