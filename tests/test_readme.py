import json
import re
from pathlib import Path

import pytest

import laconic
from benchmarks.readme import TOP, filled, main, read_runs

README = TOP / "README.md"


def test_the_tables_are_generated():
    runs = read_runs()
    assert filled(README.read_text(), runs) == README.read_text(), "python -m benchmarks.readme"
    assert "/tmp" not in json.dumps(runs)


def test_every_row_of_the_runs_stands_in_the_readme():
    demo, speed = read_runs()
    lines = README.read_text().splitlines()
    for row in demo["rows"]:
        label = row["name"] if row["keep"] is None else f"{row['name']} {row['keep']:g}"
        (line,) = [line for line in lines if line.startswith(f"| {label} |") and line.count("|") == 11]
        found = row["accuracy"]
        assert found is None or f"**{100 * found['top1']:.1f}**" in line
    assert sum(line.count("|") == 8 and "×**" in line for line in lines) == len(speed["rows"]) - 1


def test_a_readme_without_the_places_is_refused():
    with pytest.raises(ValueError, match="<!-- demo -->"):
        filled("# Laconic", read_runs())


def test_main_writes_what_filled_says(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(re.sub(r"\| (etps|random) .*\n", "", README.read_text()))
    main([str(copy)])
    assert copy.read_text() == README.read_text()


def test_what_the_readme_names_is_there():
    text = README.read_text() + Path(TOP / "docs" / "guide.md").read_text()
    for name in set(re.findall(r"(?<![.\w])laconic\.([A-Za-z_]+)\(", text)):
        assert hasattr(laconic, name), name
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text()):
        assert (TOP / link).exists(), link
