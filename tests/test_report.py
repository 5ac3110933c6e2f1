"""`laconic report` and the pages of other commands: their numbers, that they need nothing else, and a look in a browser."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import laconic
from browsing import SHOTS, TOP, WIDTHS, Visit, browser
from laconic.analysis.equal_time import Interval
from laconic.analysis.timing import Quartiles
from laconic.cli import app as cli
from laconic.cli import report_rows
from laconic.cli.compare import Row
from laconic.report import page as pages
from laconic.report.chart import Chart, Point

WORDS = [
    *("report", "scenes_vit_small", "--data", "scenes", "--limit", "16", "--method", "tome", "--method", "topk"),
    *("--keep", "0.5", "--rounds", "1", "--threads", "1", "--pictures", "3"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page and the JSON of a small report."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert cli.main([*WORDS, "--output", str(file)]) == 0
    return SimpleNamespace(file=file, html=file.read_text(), json=json.loads(file.with_suffix(".json").read_text()))


class Found(HTMLParser):
    """The elements of a page with their attributes, and the texts of some."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.stack, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.stack.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.stack:
            self.texts.append((*self.stack[-1], data))

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


def every_number(value):
    if isinstance(value, dict | list):
        return {number for item in (value.values() if isinstance(value, dict) else value) for number in every_number(item)}
    return {value} if isinstance(value, int | float) and not isinstance(value, bool) else set()


# ------------------------------------------------------------------------------------------------ the files
def test_the_numbers_of_the_page_are_those_of_the_json(made):
    shown = [float(attrs["value"]) for attrs in Found(made.html).of("data")]
    assert len(shown) > 5 * len(made.json["rows"])
    assert set(shown) <= every_number(made.json)
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', made.html, re.S)[1]
    assert json.loads(inside) == made.json
    assert made.json["verdict"]["sentence"] in re.sub(r"&#\d+;", "", made.html)


def test_the_page_asks_for_nothing(made):
    found = Found(made.html)
    for tag, attrs in found.elements:
        for name in ("src", "href", "data", "srcset", "xlink:href"):
            assert tag == "svg" or attrs.get(name, "data:").startswith(("data:", "#")), (tag, attrs)
    assert not re.search(r"@import|url\(\s*['\"]?http", re.search("<style>(.*?)</style>", made.html, re.S)[1])


def test_without_a_script_there_are_the_chart_the_tables_and_the_pictures(made):
    found = Found(made.html)
    rows = {row["label"] for row in made.json["rows"]}
    assert {"unreduced", "tome 0.5", "topk 0.5", "random 0.5", "avg-pool 0.5"} <= rows
    assert any(row["kind"] == "resolution" for row in made.json["rows"])
    assert rows <= {text for tag, attrs, text in found.texts if tag == "th" and attrs.get("scope") == "row"}
    assert len(found.of("svg")) == 1
    images = found.of("img")
    assert len(images) == 3 * (1 + 2) + 2 * 6  # three pictures with a map of two methods each, six failures
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in images)


def test_the_maps_of_the_page_are_those_of_provenance(made):
    text = re.search(r'<script type="application/json" class="data">(.*?)</script>', made.html, re.S)[1]
    maps = json.loads(text)
    from laconic.cli.eval_input import Reading, open_eval_input
    from laconic.cli.plan import readable

    reading = Reading(limit=16, workers=0)
    eval_input = open_eval_input("scenes_vit_small", "scenes", reading, None)
    images, _, _ = readable(eval_input.base, eval_input, reading)
    drawn = images[list(report_rows.spread(16, 3))]
    assert {variant["label"] for variant in maps["variants"]} == {"tome 0.5", "topk 0.5"}
    for variant in maps["variants"]:
        model = laconic.reduce_(eval_input.base, variant["label"].split()[0], keep=0.5)
        model(drawn)
        stages = laconic.provenance(model).stages
        where = np.frombuffer(base64.b64decode(variant["where"]), "<i2").reshape(3, len(stages), -1)
        assert variant["blocks"] == [stage.block for stage in stages]
        for number, stage in enumerate(stages):
            theirs = stage.where.numpy()
            for ours, other in zip(where[:, number], theirs, strict=True):
                assert (ours < 0).tolist() == (other < 0).tolist()
                assert (
                    len({*zip(ours.tolist(), other.tolist(), strict=True)}) == len({*ours.tolist()}) == len({*other.tolist()})
                )
        laconic.restore_(model)


def test_failures_are_the_largest_changes_with_both_answers(made):
    for row in made.json["rows"]:
        sizes = [change["change"] for change in row["changes"]]
        assert sizes == sorted(sizes, reverse=True)
        assert bool(sizes) == (row["kind"] == "method")
        if sizes:
            differ = sum(change["before"]["name"] != change["after"]["name"] for change in row["changes"])
            assert differ / 16 == row["changed"]
            assert 1 - np.mean(sizes) == pytest.approx(row["score"]["mean"], abs=1e-9)  # the score is what is in common


def test_an_output_is_refused_before_the_work(tmp_path, capsys):
    assert cli.main([*WORDS, "--output", str(tmp_path / "report.json")]) == 1
    assert "the JSON file is written next to it" in capsys.readouterr().err
    assert cli.main([*WORDS, "--output", str(tmp_path / "none" / "report.html")]) == 1
    assert cli.main([*WORDS[:-2], "--measure", "beauty", "--output", str(tmp_path / "r.html")]) == 1
    assert "same-answer, dense, labels, pairs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ the verdict
def found(kind, label, values, speed):
    one, took = Quartiles(speed, speed, speed), Quartiles(0.1, 0.1, 0.1)
    row = Row(label, kind, None, (8, 8), (4,), 1, 1, 1, took, 1.0, one, one)
    values = np.asarray(values, float)
    return report_rows.Found(row, Interval(float(values.mean()), 0.0, 0.0), values, None, None)


def test_the_verdict_compares_with_inputs_of_equal_time():
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    inputs = [found("base", "unreduced", np.ones(40), 1.0), found("resolution", "input", 0.6 + noise, 2.0)]
    half_way = 1 / 0.75  # takes three quarters of the time: a smaller input has 0.8 there
    for score, words in ((0.9, "ahead of"), (0.7, "behind")):
        verdict = report_rows.judged([*inputs, found("method", "ours", score + noise, half_way)])
        assert words in verdict.sentence("score")
        assert verdict.over.mean == pytest.approx(score - 0.8, abs=0.01)
    level = report_rows.judged([*inputs, found("method", "ours", 0.8 + noise / 2 + noise[::-1], half_way)])
    assert "not distinguishable from" in level.sentence("score")
    too_fast = report_rows.judged([*inputs, found("method", "ours", 0.9 + noise, 3.0)])
    assert too_fast.over is None
    assert "no comparison" in too_fast.sentence("score")


def test_the_pictures_that_choose_do_not_judge():
    inputs = [found("base", "unreduced", np.ones(40), 1.0), found("resolution", "input", np.full(40, 0.6), 2.0)]
    lucky = np.where(np.arange(40) % 2 == 0, 0.95, 0.6)  # good on the pictures that choose only
    verdict = report_rows.judged(
        [*inputs, found("method", "lucky", lucky, 4 / 3), found("method", "even", np.full(40, 0.85), 4 / 3)]
    )
    assert verdict.best.row.label == "lucky"
    assert verdict.over.mean == pytest.approx(-0.2)


# ------------------------------------------------------------------------------------------------ pages
def test_names_cannot_end_a_script():
    text = pages.build("</script><b>", ["<i>"], [], {"name": "</script><script>alert(1)</script>"})
    assert "<b>" not in text
    assert "<i>" not in text
    assert "alert(1)</script><" not in text.replace("</script>\n", "")
    assert len(re.findall("<script", text)) == 1


def test_a_chart_holds_its_points_and_their_limits():
    points = (Point("a", "a", 1.0, 1.0, plain=True), Point("b", "b", 2.0, 0.5, 0.4, 0.6), Point("c", "a", 9.0, 0.1, plain=True))
    spec = Chart("t", "x", "y", points).spec()
    assert [value["x"] for value in spec["data"]["values"]] == [1, 2, 9]
    low, high = spec["layer"][-1]["encoding"]["x"]["scale"]["domain"]
    assert low < 1 < 2 < high < 9


@pytest.mark.parametrize(
    "words", [["eval", "scenes_vit_small", "--data", "scenes", "--limit", "8", "--method", "topk"], ["list"]]
)
def test_every_command_writes_its_report_as_a_page(words, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert cli.main([*words, "--json", "--html", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)[1]
    assert json.loads(inside) == report
    assert f"laconic {' '.join(words)}" in file.read_text()
    assert cli.main([*words, "--html", str(tmp_path / "none" / "page.html")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_a_page_next_to_the_files_of_a_command(tmp_path, capsys):
    words = ["eval", "scenes_vit_small", "--data", "scenes", "--limit", "8", "--output", str(tmp_path / "eval.csv")]
    assert cli.main([*words, "--html", str(tmp_path / "eval.html")]) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"eval.csv", "eval.json", "eval.html"}


@pytest.mark.parametrize("module", ["jinja2", "vl_convert"])
def test_a_missing_library_is_named_before_the_work(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for words in (["list", "--html", str(tmp_path / "page.html")], [*WORDS, "--output", str(tmp_path / "report.html")]):
        assert cli.main(words) == 1
        assert 'pip install "laconic[report]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_committed_build_is_that_of_the_sources():
    digest = hashlib.sha256()
    for file in sorted((TOP / "playground" / "src").iterdir()):
        digest.update(f"{file.name}\n{file.read_text()}".encode())
    built = list(Path(laconic.__file__).parent.glob("*/static/*.js"))
    assert built
    for file in built:
        assert digest.hexdigest()[:16] in file.read_text().splitlines()[0], f"{file}: run make front"


# ------------------------------------------------------------------------------------------------ in a browser
@pytest.mark.browser
def test_the_report_in_a_browser(made):
    with browser() as opened:
        for name, width in WIDTHS.items():
            visit = Visit(opened, width, color_scheme="dark" if name == "phone" else "light")
            page = visit.page
            page.goto(made.file.as_uri())
            page.wait_for_selector(".plot svg .mark-symbol")
            page.wait_for_selector("canvas")
            assert (visit.outside(made.file.as_uri()), visit.said) == ([], [])
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            reduced = page.evaluate("document.querySelector('canvas').toDataURL()")
            page.locator(".block").fill("0")
            assert "100 of 100 tokens" in page.locator(".state").text_content()
            whole = page.evaluate("document.querySelector('canvas').toDataURL()")
            page.locator("canvas").first.hover()
            assert "Patch in row" in page.locator(".state").text_content()
            assert len({reduced, whole, page.evaluate("document.querySelector('canvas').toDataURL()")}) == 3
            page.mouse.move(0, 0)
            page.locator("canvas").first.focus()
            page.keyboard.press("ArrowDown")
            page.keyboard.press("ArrowRight")
            assert page.locator(".state").text_content().startswith("Patch in row 1, column 2: a token of its own")
            assert visit.violations() == []
            visit.shoot(f"report-{name}")
    assert {file.name for file in SHOTS.glob("report-*.png")} >= {"report-wide.png", "report-phone.png"}


@pytest.mark.browser
def test_the_report_without_scripts_in_a_browser(made):
    with browser() as opened:
        visit = Visit(opened, java_script_enabled=False)
        visit.page.goto(made.file.as_uri())
        assert visit.page.locator("form").is_hidden()
        assert visit.page.locator(".plot svg").is_visible()
        assert all(image.is_visible() for image in visit.page.locator("img").all())
        assert visit.outside(made.file.as_uri()) == []
        visit.shoot("report-no-script")
