"""Reports fit the width they are printed in: no line is longer, no word is split, no list of tokens folds at 120."""

import io
import re
from pathlib import Path

import pytest

from laconic.analysis.accuracy import Accuracy
from laconic.analysis.diagnose import Report as Examination
from laconic.analysis.diagnose import Trial
from laconic.analysis.summary import BlockCost, Summary
from laconic.analysis.timing import Quartiles
from laconic.cli.agreement import Agreement, Judged
from laconic.cli.bench import BenchReport
from laconic.cli.compare import Row
from laconic.cli.demo import DemoReport
from laconic.cli.doctor import KINDS, DoctorReport
from laconic.cli.eval import EvalReport
from laconic.cli.export import Files
from laconic.cli.export_speed import EAGER, Quantized, Speed
from laconic.cli.list import list_
from laconic.cli.output import Table, Verbatim
from laconic.cli.patch_outcomes import Outcomes, Shares
from laconic.cli.plan_report import PlanReport
from laconic.cli.scores import Score
from laconic.cli.show import Picture, ShowReport
from laconic.core.schedule import Schedule
from laconic.core.text_table import draw
from laconic.data import Report as DataReport
from laconic.planning.budget import Target
from laconic.planning.fidelity import Judged as Fidelity
from laconic.planning.fidelity import Mean
from laconic.planning.result import Comparison, Plan
from laconic.planning.timing import Measured

MODEL = "vit_base_patch14_reg4_dinov2"
TOKENS = tuple(range(1369, 1369 - 13 * 61, -61))  # of a method that merges in each of twelve blocks
HERE = {"device": "AMD EPYC 9R14 96-Core Processor", "dtype": "bfloat16", "threads": 16, "rounds": 120, "compiled": False}
HERE |= {"torch": "2.15.0+cu132", "timm": "1.0.31", "date": "2026-11-28"}
NAMES = [("unreduced", "base", None), ("unreduced, class row only", "plain", None), ("dynamicvit+bat", "method", 0.75)]
NAMES += [
    ("patch-slimming", "method", None),
    ("vit_small_patch14_reg4_dinov2", "smaller", None),
    ("input 476x462", "resolution", 0.75),
]
SPREAD = Quartiles(10.254, 11.387, 12.493)


def measured(name, kind, keep):
    return Row(
        name, kind, keep, (518, 518), TOKENS, 86_580_000, 117_112_000_000, 128, SPREAD, 12.3456, SPREAD, SPREAD, 123_456_789
    )


def bench():
    return BenchReport(MODEL, tuple(measured(*one) for one in NAMES), HERE, ("a note on what was left out",))


def demo(labelled=True):
    shares = Shares(0.31, 0.42, 0.27)
    accuracy = Accuracy(1000, 0.8123, 0.9712, (0.79, 0.83), 1.23, 0.901, 0.0123) if labelled else None
    judged = tuple(
        Judged(Agreement(0.99, 0.0123, 0.9), accuracy, Outcomes(shares, shares) if labelled else None) for _ in NAMES
    )
    pictures = (Picture(Path("laconic-demo/scene.png"), "scene", "bat", "0.7", TOKENS),)
    rows = tuple(measured(*one) for one in NAMES)
    return DemoReport(MODEL, "the weights", "the images", rows, judged, HERE, (), Path("laconic-demo/token-maps.png"), pictures)


def scored():
    def row(name, kind, keep):
        facts = (name, kind, keep, {}, (518, 518), TOKENS, 86_000_000, 117_112_000_000, 1.0, "bicubic", 50_000, 3)
        return Score(*facts, 0.81234, 0.97123, (0.80123, 0.82345), 1.23, 0.9012, 0.0123, 0, (1.2, 1.3, 1.4), 123.4, 8)

    read = DataReport(("cat", "dog"), (25_000, 25_000))
    return EvalReport(MODEL, "imagenet, val", "the weights", tuple(row(*one) for one in NAMES), read, HERE, "laconic eval", ())


def exported():
    speeds = []
    for runtime in (EAGER, "ONNX Runtime", "ONNX Runtime, int8", "OpenVINO", "torch.export, loaded"):
        for name, kind, _ in NAMES:
            base = kind == "base"
            speeds.append(Speed(name, runtime, 128, SPREAD, None if base else SPREAD, None if base else 0.912, 12.345))
    small = Quantized("etps 0.7", f"exported/{MODEL}.etps-0.7.int8.onnx", 23_400_000, 64, 0.0123, 0.98)
    return Files(MODEL, (), (small,), tuple(speeds), HERE)


def planned():
    schedule = Schedule.keep_counts({block: tokens for block, tokens in enumerate(TOKENS[1:])})
    facts = (117_112_000_000, 0.789, 256, Mean(0.0123, 0.0045), 0.91, (0.9, 0.93), 0.8, (0.78, 0.83))
    rows = tuple(Fidelity(name, schedule, *facts) for name in ("searched", "the papers' uniform schedule", "bat 0.75"))
    timed = Measured(SPREAD, SPREAD, SPREAD, 128, 120)
    options = {"method": {"name": "tome", "options": {}}, "target": Target.parse("1.6x"), "schedule": schedule}
    compared = Comparison(Mean(-0.01, 0.002), Mean(0.01, 0.02))
    plan = Plan(
        **options, macs=117_112_000_000, baseline_macs=151_000_000_000, measured=timed, judged=rows, comparison=compared
    )
    return PlanReport(plan, {"model": MODEL, "data": "imagenet, val", "weights": "the weights", "environment": HERE})


def examined():
    path = "timm.models.vision_transformer.Block"
    reason = (
        f"{path} computes attention and MLP side by side, so nothing can be done between them; use a method that works before"
    )
    trials = [Trial(name, True, {"score": "mean-query"}, "", TOKENS[1:]) for name in KINDS]
    trials += [Trial("dynamicvit+bat", False, {}, reason, ())]
    found = Examination(MODEL, "", "timm.models.vision_transformer.VisionTransformer", (path,) * 12)
    return DoctorReport(MODEL, found.__class__(**{**vars(found), "trials": tuple(trials), "self_test": "passed"}), False)


def shown():
    pictures = [Picture(Path("maps/a-photograph-of-a-cat-bat-0.7.png"), "a-photograph-of-a-cat.jpeg", "bat", "0.7", TOKENS)]
    return ShowReport("the weights", tuple(pictures))


def published():
    return list_(recipes=True)


REPORTS = (list_, published, bench, demo, lambda: demo(labelled=False), scored, exported, planned, examined, shown)


def printed(report, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = io.StringIO()
    report.write(text)
    return text.getvalue().rstrip()


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("make", REPORTS, ids=lambda make: make.__name__)
def test_a_report_fits_its_width(monkeypatch, make, columns):
    report = make()
    copied = {line for part in report.parts() if isinstance(part, Verbatim) for line in part.split("\n")}
    text = printed(report, columns, monkeypatch)
    long = [line for line in text.split("\n") if len(line) > columns and len(line.split()) > 1 and line not in copied]
    assert long == []
    words = set(text.split())
    for table in (part for part in report.parts() if isinstance(part, Table)):
        gone = draw(table.header, table.rows, columns, left=table.words, below=table.below, optional=table.optional)[1]
        kept = [place for place, name in enumerate(table.header) if name not in gone]
        assert {word for row in table.rows for place in kept for word in row[place].split()} <= words
        assert {word for place in kept for word in table.header[place].split()} <= words | {f"{word}:" for word in words} | {
            word.removesuffix(":") for word in words
        }
        assert set(gone) <= set(table.optional)
        assert not gone or f"at this width: {gone[0]}" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("make", [bench, demo, scored, examined, shown], ids=lambda make: make.__name__)
def test_token_counts_do_not_fold_at_120_columns(monkeypatch, make):
    text = printed(make(), 120, monkeypatch)
    tokens = " ".join(map(str, TOKENS if make is not examined else TOKENS[1:]))
    assert tokens in text


def test_nothing_is_left_out_where_there_is_room(monkeypatch):
    for make in REPORTS:
        assert "at this width" not in printed(make(), 400, monkeypatch)


def test_a_file_gets_paragraphs_that_are_not_wrapped(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert max(map(len, str(bench()).split("\n"))) > 300


def test_columns_of_a_table():
    header, rows = ("name", "a number", "words"), [("one", "1.5", "some words to wrap"), ("twenty-two", "22", "few")]
    assert draw(header, rows, 80, left=1)[0] == [
        "name        a number               words",
        "────────────────────────────────────────",
        "one              1.5  some words to wrap",
        "twenty-two        22                 few",
    ]
    lines, gone = draw(header, rows, 19, left=1, optional=("words",))
    assert (lines[:3], gone) == (["                 a", "name        number", "──────────────────"], ["words"])
    assert draw(header, rows, 19, left=1, below=("words",))[0][3:5] == ["one            1.5", "    words: some"]
    assert draw(("", ""), [("model", "vit")], 80, left=2)[0] == ["model  vit"]
    assert draw(("a", "b"), [], 80)[0] == ["a  b", "────"]


def test_a_table_that_fits_nowhere_is_paragraphs():
    lines, gone = draw(("", "one", "two"), [("label", "1" * 15, "2" * 15)], 24)
    assert (lines, gone) == (["label", "    one: " + "1" * 15, "    two: " + "2" * 15], [])


def test_a_summary_fits_80_columns():
    costs = tuple(BlockCost(block, 1370 - block, 1369 - block, 12_345_678_901, 123_456_789) for block in range(12))
    summary = Summary(
        MODEL, {"name": "dynamicvit+bat"}, "fvcore", 128, 86_580_000, 10**13, 2 * 10**13, TOKENS[1:], costs, 117 * 10**9
    )
    assert max(map(len, str(summary).split("\n"))) <= 80
