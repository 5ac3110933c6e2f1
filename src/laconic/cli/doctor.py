"""``laconic doctor``: the methods that work on a model, and the reasons why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from laconic.analysis.diagnose import Report as Examination
from laconic.analysis.diagnose import doctor as examine
from laconic.cli.models import open_model
from laconic.cli.output import Report, Table, sentence
from laconic.core.files import Refusal
from laconic.core.method import methods

LOG = logging.getLogger(__name__)
# one method of each kind; each stands for others that ask the same of a model
KINDS = {
    "etps": "pruning by class attention",
    "tome": "merging by similarity",
    "dynamicvit": "a learned score",
    "ats": "a count for each image",
    "mctf": "full attention",
}


@dataclass(frozen=True)
class DoctorReport(Report):
    """The report of `laconic.doctor` on a model by this name."""

    name: str
    found: Examination
    all: bool = True

    def parts(self) -> Iterator[str | Table]:
        yield Table(self.name, ("", ""), tuple(self.found.facts().items()), words=2)
        rows = []
        for trial in self.found.trials:
            tokens = " ".join(map(str, trial.tokens))
            rows.append((trial.method, "yes" if trial.works else "no", tokens, trial.example or trial.reason))
        header = ("method", "works", "patch tokens", "")
        yield Table("Methods", header, tuple(rows), words=4, below=("",))
        if not self.all:
            tried = sentence([f"{name} ({kind})" for name, kind in KINDS.items()])
            yield f"Tried: one method of each kind, {tried}. --all tries all {len(methods())} methods."

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "all": self.all, **self.found.to_json()}


def doctor(model: str, /, *, all: bool = False) -> DoctorReport:
    """Examine a model: its blocks and tokens, the self-test, and for methods whether they work or why not.

    By default one method of each kind is tried. Each takes a few forwards of the model.

    Args:
        model: timm name, or a directory that laconic.save wrote, or save_pretrained of transformers.
        all: try all methods (minutes, if the model is large).

    Raises:
        Refusal: there is no such model, or laconic cannot reduce it.
    """
    LOG.info("opening %s", model)
    opened = open_model(model)
    LOG.info("examining its blocks")
    found = examine(opened, announced(list(methods() if all else KINDS)))
    if found.refusal:
        raise Refusal(f"{model} cannot be reduced: {found.refusal}")
    return DoctorReport(model, found, all)


def announced(names: Sequence[str]) -> Iterator[str]:
    """Yield the names of methods, each logged as progress just before it is tried."""
    for number, name in enumerate(names, 1):
        LOG.info("trying %s (%d of %d)", name, number, len(names))
        yield name
