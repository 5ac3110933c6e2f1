"""The result of `laconic.tune`: the rows that were judged, and the one that was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laconic.analysis.equal_time import Interval
from laconic.analysis.timing import Quartiles
from laconic.api import reduce_
from laconic.core.method import resolve
from laconic.core.schedule import Schedule
from laconic.planning.budget import Target
from laconic.planning.candidates import Sides, set_size
from laconic.planning.repair import Repaired

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class TunedRow:
    """An input size, and a method with its schedule (None: unreduced), and how it was judged.

    ``search`` is the mean score on the images that chose (None for rows that miss the target and cannot be chosen), ``score``
    that on the held-out ones; ``over`` is the difference to a smaller input that takes as long (None for smaller inputs, and
    outside of their range). ``repaired`` says what a repair of this row did, if there was one.
    """

    name: str
    sides: Sides | None
    method: Mapping[str, Any] | None
    schedule: Schedule | None
    macs: int
    speed: Quartiles
    search: float | None
    score: Interval
    over: Interval | None
    repaired: Repaired | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON."""
        return {
            **vars(self),
            "sides": None if self.sides is None else list(self.sides),
            "method": None if self.method is None else dict(self.method),
            "schedule": None if self.schedule is None else self.schedule.to_json(),
            "speed": vars(self.speed),
            "score": vars(self.score),
            "over": None if self.over is None else vars(self.over),
            "repaired": None if self.repaired is None else self.repaired.to_json(),
        }

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> TunedRow:
        """Build a row from the output of `to_json`."""
        over, sides, schedule, repaired = (fields.get(name) for name in ("over", "sides", "schedule", "repaired"))
        made = {
            "sides": None if sides is None else tuple(sides),
            "schedule": None if schedule is None else Schedule.of(schedule),
            "speed": Quartiles(**fields["speed"]),
            "score": Interval(**fields["score"]),
            "over": None if over is None else Interval(**over),
            "repaired": None if repaired is None else Repaired.of_json(repaired),
        }
        return cls(**{**fields, **made})


@dataclass(frozen=True)
class Tuned:
    """The result of `laconic.tune`. ``images`` are the numbers of images that chose and that judged.

    ``parameters`` are the scales and biases of the chosen row, if it was repaired; they are not part of the JSON.
    """

    target: Target
    measure: str
    own: Sides
    images: tuple[int, int]
    rows: tuple[TunedRow, ...]
    chosen: str
    notes: tuple[str, ...] = ()
    parameters: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def best(self) -> TunedRow:
        """The row that was chosen."""
        return next(row for row in self.rows if row.name == self.chosen)

    def apply(self, model: M, **options: Any) -> M:
        """Set the input size of a model and reduce it, in place, as the chosen row says; return it.

        Args:
            model: a model like the one that was tuned, unreduced.
            options: further arguments of `laconic.reduce_`, such as ``restore=True``.

        Raises:
            ValueError: the model takes no images of the chosen size, the repaired parameters are missing or do not fit, or as
                `laconic.reduce_`.
        """
        row = self.best
        if row.repaired is not None:
            self._load(model)
        if row.sides is not None:
            set_size(model, row.sides)
        if row.method is None:
            return model
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in row.method["options"].items()}
        return reduce_(model, resolve(row.method["name"], given), schedule=row.schedule, **options)

    def _load(self, model: nn.Module) -> None:
        """Set the repaired parameters of a model."""
        if not self.parameters:
            raise ValueError(
                f"{self.chosen}: the repaired parameters are not in the JSON, but in the .safetensors file next to it: give "
                "them as Tuned.of_json(fields, safetensors.torch.load_file(path))"
            )
        own = dict(model.named_parameters())
        strange = [name for name, value in self.parameters.items() if name not in own or own[name].shape != value.shape]
        if strange:
            raise ValueError(f"the repaired parameters are of another model: {strange[0]} does not fit")
        with torch.no_grad():
            for name, value in self.parameters.items():
                own[name].copy_(value)

    def to_json(self) -> dict[str, Any]:
        """Return all fields but the parameters as plain JSON."""
        plain = {"target": self.target.to_json(), "rows": [row.to_json() for row in self.rows]}
        own = {name: value for name, value in vars(self).items() if name != "parameters"}
        return {**own, **plain, "own": list(self.own), "images": list(self.images), "notes": list(self.notes)}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any], parameters: Mapping[str, Tensor] | None = None) -> Tuned:
        """Build a result from the output of `to_json`, or from a file of ``laconic tune --output``.

        Args:
            fields: the JSON.
            parameters: of the chosen row, if it was repaired: the content of the .safetensors file next to the JSON.
        """
        own = {known.name: fields[known.name] for known in dataclasses.fields(cls) if known.name != "parameters"}
        made = {
            "target": Target.parse(fields["target"]["text"]),
            "rows": tuple(TunedRow.of_json(row) for row in fields["rows"]),
            **{name: tuple(fields[name]) for name in ("own", "images", "notes")},
        }
        return cls(**{**own, **made}, parameters=parameters or {})
