"""Reports fit the width they are printed in: no line is longer, no word is split, no list of tokens folds at 120."""

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
from laconic.planning.result import Plan
from laconic.planning.timing import Measured

MODEL = "vit_base_patch14_reg4_dinov2"
TOKENS = tuple(range(1369, 1369 - 13 * 61, -61))  # of a method that merges in each of twelve blocks
HERE = {"device": "AMD EPYC 9R14 96-Core Processor", "dtype": "bfloat16", "threads": 16, "rounds": 120, "compiled": False}
HERE |= {"torch": "2.15.0+cu132", "timm": "1.0.31", "date": "2026-11-28"}
NAMES = [("unreduced", "base", None), ("unreduced, class row only", "plain", None), ("dynamicvit+bat", "method", 0.75)]
NAMES += [("patch-slimming", "method", None), ("vit_small_patch14_reg4_dinov2", "smaller", None), ("input 476x462", "resolution", 0.75)]
SPREAD = Quartiles(10.254, 11.387, 12.493)


def measured(name, kind, keep):
    return Row(name, kind, keep, (518, 518), TOKENS, 86_580_000, 117_112_000_000, 128, SPREAD, 12.3456, SPREAD, SPREAD, 123_456_789)


def bench():
    return BenchReport(MODEL, tuple(measured(*one) for one in NAMES), HERE, ("a note on what was left out",))


def demo(labelled=True):
    shares = Shares(0.31, 0.42, 0.27)
    accuracy = Accuracy(1000, 0.8123, 0.9712, 1.23, 0.901, 0.0123, 0) if labelled else None
    judged = tuple(Judged(Agreement(0.99, 0.0123, 0.9), accuracy, Outcomes(shares, shares) if labelled else None) for _ in NAMES)
    pictures = (Picture(Path("laconic-demo/scene.png"), "scene", "bat", "0.7", TOKENS),)
    rows = tuple(measured(*one) for one in NAMES)
    return DemoReport(MODEL, "the weights", "the images", rows, judged, HERE, (), Path("laconic-demo/token-maps.png"), pictures)


def scored():
    def row(name, kind, keep):
        facts = (name, kind, keep, {}, (518, 518), TOKENS, 86_000_000, 117_112_000_000, 1.0, "bicubic", 50_000, 3)
        return Score(*facts, 0.81234, 0.97123, (0.80123, 0.82345), 1.23, 0.9012, 0.0123, 0, (1.2, 1.3, 1.4), 123.4, 8)

    read = DataReport("a folder of images", "val", 50_000, 1000, 0, (), ())
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
    one = Fidelity("a long name of a schedule", schedule, 117_112_000_000, 0.789, 256, Shift(), 0.91, (0.9, 0.93), 0.8, (0.78, 0.83))
    return one


def examined():
    path = "timm.models.vision_transformer.Block"
    reason = f"{path} computes attention and MLP side by side, so nothing can be done between them; use a method that works before"
    trials = [Trial(name, True, {"score": "mean-query"}, "", TOKENS[1:]) for name in KINDS]
    trials += [Trial("dynamicvit+bat", False, {}, reason, ())]
    found = Examination("VisionTransformer", "", "timm.models.vision_transformer.VisionTransformer", (path,) * 12, 5, True)
    return DoctorReport(MODEL, found.__class__(**{**vars(found), "trials": tuple(trials), "self_test": "passed"}), False)


def shown():
    pictures = [Picture(Path("maps/a-photograph-of-a-cat-bat-0.7.png"), "a-photograph-of-a-cat.jpeg", "bat", "0.7", TOKENS)]
    return ShowReport("the weights", tuple(pictures))
