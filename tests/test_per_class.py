"""Accuracy per class and confusion matrices: the counting, and the files of `laconic eval --per-class`."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from laconic.analysis.evaluate import Processes, answers
from laconic.analysis.per_class import OTHER, Confusion
from laconic.cli import per_class, plots
from laconic.cli.eval import eval_
from laconic.core.files import Refusal
from laconic.data import Prepared
from test_eval import MODEL_ARGS, READING, TINY, Fixed, Told

pytestmark = pytest.mark.usefixtures("no_pretrained_weights")

LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 0]


def told(first, outputs=4):
    """Answers of a model whose first classes are given; None where it answers nothing finite."""
    logits = torch.zeros(len(first), outputs)
    for i, number in enumerate(first):
        logits[i] = float("nan") if number is None else torch.eye(outputs)[number]
    return Told(logits.tolist())


def plain(images):
    """The loader of a set, in which a pixel is the number of its image."""
    return torch.utils.data.DataLoader(
        Prepared(images, lambda image: torch.full((3, 4, 4), float(image.getpixel((0, 0))[0])), replace=False), 4
    )


def confusion(first, labels=LABELS, classes=3, outputs=4, broken=()):
    images = Fixed(labels, broken, classes)
    return Confusion.of(answers(told(first, outputs), plain(images)), images.classes)


def test_the_counts_are_those_of_scikit_learn():
    first = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0]
    found = confusion(first, outputs=3)
    assert found.rows() == confusion_matrix(LABELS, first).tolist()
    assert found.names == ("a", "b", "c")
    assert found.balanced == pytest.approx(balanced_accuracy_score(LABELS, first))
    precision, recall, _, images = precision_recall_fscore_support(LABELS, first)
    assert [score.top1 for score in found.scores()] == pytest.approx(recall.tolist())
    assert [score.precision for score in found.scores()] == pytest.approx(precision.tolist())
    assert [score.images for score in found.scores()] == images.tolist()
    assert [(score.taken_for, score.taken) for score in found.scores()] == [("b", 1), ("a", 1), ("a", 1)]


def test_answers_outside_the_data_and_images_that_were_not_read():
    found = confusion([0, 3, None, 1, 1, 2, 2, 2, 2, 0], broken=(0,))
    assert found.names == ("a", "b", "c", OTHER)
    assert found.rows() == [[1, 0, 0, 2], [0, 2, 0, 0], [0, 0, 4, 0]]
    first = found.scores()[0]
    assert (first.images, first.top1, first.taken_for, first.taken) == (3, 1 / 3, OTHER, 2)


def test_a_class_without_images_has_no_accuracy():
    found = confusion([0, 0, 0, 1, 1, 2, 2, 2, 2, 0], classes=4)
    last = found.scores()[3]
    assert (last.images, last.top1, last.interval, last.precision, last.taken) == (0, None, None, None, 0)
    assert found.balanced == 1.0
    assert "–" in str(next(iter(per_class.tables((("x", found),)))))


def test_processes_count_once():
    images, model = Fixed(LABELS, (), 3), told([0, 1, 2, 1, 0, 2, 2, 1, 0, 0], 3)
    whole, total = answers(model, plain(images)), []

    def gather(table):
        total.append(table)
        return sum(total)

    for rank in range(2):
        part = torch.utils.data.DataLoader(plain(images).dataset, 4, sampler=range(rank, len(images), 2))
        both = answers(model, part, processes=Processes(rank, 2, gather))
    assert torch.equal(Confusion.of(both, images.classes).counts, Confusion.of(whole, images.classes).counts)


# ---------------------------------------------------------------------------------------------------- laconic eval --per-class
def test_eval_per_class(tmp_path):
    given = {"data": "scenes", "reading": READING, "method": ("etps",), "keep": (0.5,), "model_args": MODEL_ARGS}
    report = eval_(TINY, **given, output=tmp_path / "out.csv", per_class=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [
            "out.csv",
            "out.json",
            "out.classes.csv",
            *(f"out.confusion.{label}.{kind}" for label in ("unreduced", "etps-0.5") for kind in ("csv", "png")),
        ]
    )
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out.classes.csv").read_text())))
    assert len(lines) == 2 * 24
    own = [line for line in lines if line["variant"] == "etps 0.5"]
    right = sum(float(line["top1"]) * int(line["images"]) / 100 for line in own if line["top1"])
    assert right / 20 == pytest.approx(report.rows[1].top1, abs=1e-3)
    matrix = list(csv.reader(io.StringIO((tmp_path / "out.confusion.unreduced.csv").read_text())))
    counts = np.array([[int(cell) for cell in row[1:]] for row in matrix[1:]])
    assert matrix[0][1:] == [row[0] for row in matrix[1:]]
    assert (counts.sum(), np.trace(counts) / 20) == (20, pytest.approx(report.rows[0].top1))
    picture = np.asarray(Image.open(tmp_path / "out.confusion.etps-0.5.png"))
    assert picture.std() > 1
    facts = json.loads((tmp_path / "out.json").read_text())["per_class"]
    assert [entry["variant"] for entry in facts] == ["unreduced", "etps 0.5"]
    assert facts[0]["confusion"]["counts"] == counts.tolist()
    assert "--per-class" in report.command
    text = " ".join(str(report).split())
    assert "unreduced: balanced accuracy" in text
    assert "out.confusion.unreduced.png" in text


def test_without_the_option_nothing_is_added(tmp_path):
    report = eval_(TINY, data="scenes", reading=READING, model_args=MODEL_ARGS, output=tmp_path / "out.csv")
    assert (report.classes, report.files) == ((), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.json"]


def test_without_matplotlib_it_is_refused_before_the_work(tmp_path, monkeypatch):
    def missing():
        raise Refusal("drawing needs matplotlib")

    monkeypatch.setattr(plots, "check_matplotlib", missing)
    with pytest.raises(Refusal, match="matplotlib"):
        eval_(TINY, data="no such data", output=tmp_path / "out.csv", per_class=True)


def test_of_many_classes_the_worst_are_printed():
    counts = torch.diag(torch.arange(1, 41))
    counts[7, 3] = 100
    found = Confusion(tuple(f"class {i}" for i in range(40)), torch.cat([counts, torch.zeros(40, 1, dtype=torch.long)], 1))
    table = next(iter(per_class.tables((("x", found),))))
    assert len(table.rows) == per_class.PRINTED
    assert table.rows[0][0] == "class 7"
    assert table.rows[0][-1] == "class 3 (100)"
    assert "30 of 40 classes" in table.title
    assert per_class.draw(found, "$x$").startswith(b"\x89PNG")
