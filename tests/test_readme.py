import json
import re
from pathlib import Path

import laconic
from laconic.jobs.readme import TOP, filled, main

README = TOP / "README.md"


def test_the_tables_are_generated():
    run = json.loads((TOP / "results" / "demo.json").read_text())
    assert filled(README.read_text(), run) == README.read_text(), "python -m laconic.jobs.readme"
    assert "/tmp" not in json.dumps(run)


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
