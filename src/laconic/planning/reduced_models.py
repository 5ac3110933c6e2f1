"""The models of the candidates of `laconic.tune`, of which each method is verified once at each input size."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from torch import nn

from laconic.analysis.break_even import quiet
from laconic.analysis.diagnose import shared_copy
from laconic.api import planned, reduce_
from laconic.core.backbone import find_host
from laconic.core.token_reduction import TokenReduction, reduction_of
from laconic.core.verify import attach_like
from laconic.planning.candidates import Candidate, Sizes
from laconic.planning.trials import Trial

RECENT = 32  # models that are kept, since a candidate is scored and timed several times


class ReducedModels:
    """The models of candidates; they share the weights of the user's model.

    Verification takes as long as several forwards, and depends on the method and the input size, not on the schedule. So the
    first candidate of a method and a size is verified, and others are made like it. `Tuned.apply` verifies the result.

    Args:
        sizes: the unreduced model at several input sizes.
        restore: as in `laconic.reduce_`.
    """

    def __init__(self, sizes: Sizes, restore: Literal["similar"] | bool) -> None:
        self.sizes, self.restore = sizes, restore
        self.verified = dict[tuple[Any, ...], TokenReduction]()
        self.recent = dict[str, nn.Module]()

    def of(self, trial: Trial) -> nn.Module:
        """Return the model of a candidate, in evaluation mode.

        Raises:
            ValueError, LookupError: the method does not work on the model.
        """
        base = self.sizes.at(trial.candidate.sides)
        assert base is not None
        if trial.candidate.is_plain:
            return base
        key = json.dumps(trial.described(), sort_keys=True)
        model = self.recent.pop(key, None) or self._made(base, trial)
        self.recent[key] = model
        if len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]
        return model

    def _made(self, base: nn.Module, trial: Trial) -> nn.Module:
        (config, schedule), model, kind = trial.applied(), shared_copy(base), kind_of(trial.candidate)
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if kind not in self.verified:
                reduce_(model, config, schedule=schedule, restore=self.restore)
                self.verified[kind] = reduction_of(model)
            else:
                host, entry = find_host(model)
                plan = planned(config, entry, host, None) if schedule is None else schedule
                attach_like(host, entry, TokenReduction(host, entry, config, plan, self.restore), self.verified[kind])
        return model.eval()


def kind_of(candidate: Candidate) -> tuple[Any, ...]:
    """Return what the verification of a candidate depends on: its input size and its methods."""
    return candidate.sides, candidate.config, candidate.first
