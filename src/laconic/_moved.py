"""Module and class names of version 0.1, for user code and pickles: each imports its successor, with a warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from typing import Any

MODULES = {
    "arguments": "core.arguments",
    "attach": "api",
    "attention": "core.attention",
    "block_forward": "core.block_forward",
    "calibrate": "methods.patch_slimming.calibration",
    "checkpoints": "checkpoints.save_load",
    "compression": "core.token_reduction",
    "cost": "analysis.macs",
    "deciding": "core.adaptive",
    "dense": "core.dense",
    "discovery": "core.plugins",
    "distill": "training.distillation",
    "diversity": "analysis.diversity",
    "doctor": "analysis.diagnose",
    "exporting.proof": "exporting.parity",
    "extras": "core.optional_deps",
    "files": "core.files",
    "fitting": "core.from_dict",
    "grid": "core.grid",
    "halving": "core.half_limit",
    "history": "core.history",
    "hosts": "core.backbone",
    "hub": "checkpoints.hub",
    "impact": "methods.patch_slimming.patch_importance",
    "importing": "checkpoints.official_weights",
    "input_size": "analysis.input_size",
    "intermediates": "core.intermediates",
    "jobs": "cli",
    "jobs.accuracy": "analysis.accuracy",
    "jobs.agreement": "cli.agreement",
    "jobs.bench": "cli.bench",
    "jobs.compare": "cli.compare",
    "jobs.demo": "cli.demo",
    "jobs.doctor": "cli.doctor",
    "jobs.draw": "cli.draw",
    "jobs.eval": "cli.eval",
    "jobs.evaluate": "analysis.evaluate",
    "jobs.exhibit": "cli.demo_input",
    "jobs.export": "cli.export",
    "jobs.export_speed": "cli.export_speed",
    "jobs.exported": "cli.exported",
    "jobs.fates": "cli.patch_outcomes",
    "jobs.list": "cli.list",
    "jobs.machine": "analysis.machine",
    "jobs.measure": "analysis.timing",
    "jobs.memory": "analysis.memory",
    "jobs.models": "cli.models",
    "jobs.output": "cli.output",
    "jobs.photos": "cli.image_io",
    "jobs.plan": "cli.plan",
    "jobs.plan_report": "cli.plan_report",
    "jobs.plan_scores": "cli.plan_scores",
    "jobs.plots": "cli.plots",
    "jobs.record": "cli.record",
    "jobs.scores": "cli.scores",
    "jobs.show": "cli.show",
    "jobs.subject": "cli.eval_input",
    "jobs.sweep": "cli.sweep",
    "jobs.train": "cli.train",
    "jobs.variants": "cli.variants",
    "jobs.weights": "cli.weights",
    "ledger": "analysis.provenance",
    "limits": "core.limits",
    "links": "core.links",
    "masking": "core.attention_bias",
    "mending": "methods.patch_slimming.block_finetuning",
    "methods.patch_slimming": "methods.patch_slimming.method",
    "mixin": "checkpoints.hub_mixin",
    "modes": "core.eval_mode",
    "observed": "analysis.per_image_cost",
    "packing": "core.packing",
    "parts": "methods.ops",
    "patching": "core.patching",
    "paying": "analysis.break_even",
    "readout": "core.readout",
    "readout_proof": "core.readout_check",
    "rebuild": "checkpoints.model_spec",
    "rebuild_transformers": "checkpoints.transformers_spec",
    "recipe": "training.recipe",
    "reducer": "core.method",
    "report": "analysis.summary",
    "rows": "core.gather",
    "running": "core.running_calls",
    "runtime": "core.runtime",
    "schedule": "core.schedule",
    "settings": "training.recipe_sections",
    "shapes": "core.shape_types",
    "sites": "core.block_context",
    "sparsity": "training.sparsity",
    "staging": "core.stages",
    "stopwatch": "analysis.stopwatch",
    "switches": "core.block_gates",
    "tokens": "core.tokens",
    "training.feeding": "training.input_pipeline",
    "training.running": "training.run_config",
    "training.searching": "training.rate_search_step",
    "training.soundness": "training.finite_checks",
    "training.warming": "training.schedule_changes",
    "trial": "checkpoints.meta_build",
    "values": "core.values",
    "verbs": "cli.commands",
    "verify": "core.verify",
    "work": "analysis.layer_macs",
}
NAMES: dict[str, dict[str, str]] = {
    "cli.commands": {"Verb": "Command", "VERBS": "COMMANDS"},
    "cli.demo_input": {"Exhibit": "DemoInput", "open_exhibit": "open_demo_input"},
    "cli.eval_input": {"Subject": "EvalInput", "open_subject": "open_eval_input"},
    "cli.patch_outcomes": {"Fate": "Outcomes", "fates": "outcomes"},
    "core.adaptive": {"Deciding": "AdaptiveMethod", "DecidingReducer": "AdaptiveReducer"},
    "core.attention": {"Seen": "AttentionView", "Watch": "AttentionTap"},
    "core.backbone": {
        "halves_of": "block_spec",
        "Halves": "BlockSpec",
        "Host": "ModelSpec",
        "Steps": "AttentionSteps",
        "Shape": "StageSpec",
    },
    "core.block_context": {"Site": "BlockContext"},
    "core.eval_mode": {"aside": "without_recording"},
    "core.gather": {"take": "gather_rows", "follow": "remap", "iota": "arange_like"},
    "core.method": {"Row": "MethodInfo", "Site": "BlockContext"},
    "core.patching": {"settle": "apply_settings", "unsettle": "restore_settings"},
    "core.stages": {"Staging": "Stages"},
    "core.token_reduction": {
        "Compression": "TokenReduction",
        "find_compression": "find_reduction",
        "compression_of": "reduction_of",
    },
    "methods.ops": {
        "lay": "scatter_back",
        "split": "topk_split",
        "share": "group_normalize",
        "demand": "require",
        "taking_away": "remove_schedule",
        "demand_class_token": "require_class_token",
        "Alone": "NoKeepRate",
        "Everywhere": "EveryBlock",
    },
}


class OldModule(types.ModuleType):
    """A module of version 0.1; its names are looked up in the module that replaced it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        new = str(new_name(self.__name__.removeprefix("laconic.")))
        names = {**NAMES.get(new.rpartition(".")[0], {}), **NAMES.get(new, {})}
        return getattr(importlib.import_module(f"laconic.{new}"), names.get(name, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the public function of this name, which importing an old module hides in the package."""
        name = self.__name__.removeprefix("laconic.")
        return getattr(self, name)(*args, **kwargs)


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find modules of version 0.1 by their old names; Python asks this finder only for modules that no other finder knows."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of an old name, or None."""
        package, _, old = fullname.partition(".")
        if package != "laconic" or new_name(old) is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return the replacement for an old module."""
        new = new_name(spec.name.removeprefix("laconic."))
        warnings.warn(f"{spec.name} is now laconic.{new}", DeprecationWarning, stacklevel=2)
        return OldModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: `OldModule` looks up names at access."""


def new_name(old: str) -> str | None:
    """Return the current name of a module of version 0.1 (both without ``laconic.``), or None."""
    if old in MODULES:
        return MODULES[old]
    parent, dot, leaf = old.rpartition(".")
    if not dot or parent not in MODULES:
        return None
    new = "backbones" if parent == "hosts" else MODULES[parent]
    return f"{new}.{leaf}" if importlib.util.find_spec(f"laconic.{new}.{leaf}") is not None else None


def install() -> None:
    """Install the finder of old names, once."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
