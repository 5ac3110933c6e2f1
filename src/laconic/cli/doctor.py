"""``laconic doctor``: what works on a model, and why the rest does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from laconic.analysis.diagnose import Report as Examination
from laconic.analysis.diagnose import doctor as examine
from laconic.cli.models import open_model
from laconic.cli.output import Report, Table
from laconic.core.files import Refusal


@dataclass(frozen=True)
class DoctorReport(Report):
    """What `laconic.doctor` found out about a model by this name."""

    name: str
    found: Examination

    def parts(self) -> Iterator[str | Table]:
        yield Table(self.name, ("", ""), tuple(self.found.facts().items()), words=2)
        rows = []
        for trial in self.found.trials:
            tokens = " ".join(map(str, trial.tokens))
            rows.append((trial.method, "yes" if trial.works else "no", tokens, trial.example or trial.reason))
        yield Table("Methods", ("method", "works", "patch tokens", "how, or why not"), tuple(rows), words=4, below=("how, or why not",))

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.found.to_json()}


def doctor(model: str, /) -> DoctorReport:
    """Examine a model: its blocks and tokens, the self-test, and for every method whether it works or why not.

    Args:
        model: timm name, or a directory that laconic.save wrote, or save_pretrained of transformers.

    Raises:
        Refusal: there is no such model, or laconic cannot reduce it.
    """
    found = examine(open_model(model))
    if found.refusal:
        raise Refusal(f"{model} cannot be reduced: {found.refusal}")
    return DoctorReport(model, found)
