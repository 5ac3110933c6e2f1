"""Laconic: fewer tokens, same answer. Token reduction for vision transformers.

model = laconic.reduce_(timm.create_model("deit_small_patch16_224", pretrained=True), "etps", keep=0.7)

Every public name is imported at its first use, so that ``laconic --help`` needs no torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from laconic import _moved

__version__ = "0.1.0"

if TYPE_CHECKING:
    from laconic.analysis.diagnose import doctor as doctor
    from laconic.analysis.diversity import diversity_score as diversity_score
    from laconic.analysis.macs import summary as summary
    from laconic.analysis.provenance import Provenance as Provenance
    from laconic.analysis.provenance import Stage as Stage
    from laconic.analysis.provenance import losses as losses
    from laconic.analysis.provenance import provenance as provenance
    from laconic.analysis.provenance import restore_dense as restore_dense
    from laconic.analysis.summary import Summary as Summary
    from laconic.api import is_reduced as is_reduced
    from laconic.api import reduce_ as reduce_
    from laconic.api import reduced as reduced
    from laconic.api import restore_ as restore_
    from laconic.backbones import hosts as hosts
    from laconic.checkpoints.hub import from_pretrained as from_pretrained
    from laconic.checkpoints.hub import push_to_hub as push_to_hub
    from laconic.checkpoints.hub import save_pretrained as save_pretrained
    from laconic.checkpoints.official_weights import import_checkpoint as import_checkpoint
    from laconic.checkpoints.save_load import load as load
    from laconic.checkpoints.save_load import save as save
    from laconic.core.attention import AttentionView as AttentionView
    from laconic.core.block_context import BlockContext as BlockContext
    from laconic.core.method import Method as Method
    from laconic.core.method import Prune as Prune
    from laconic.core.method import Reducer as Reducer
    from laconic.core.method import method as method
    from laconic.core.schedule import Schedule as Schedule
    from laconic.core.schedule import WarmIn as WarmIn
    from laconic.core.tokens import Tokens as Tokens
    from laconic.exporting import ExportReport as ExportReport
    from laconic.exporting import export as export
    from laconic.methods import *  # noqa: F403
    from laconic.methods.patch_slimming.calibration import calibrate as calibrate
    from laconic.planning import Plan as Plan
    from laconic.planning import plan as plan
    from laconic.planning.repair import Repaired as Repaired
    from laconic.planning.repair import repair_ as repair_
    from laconic.planning.tune import tune as tune
    from laconic.planning.tuned import Tuned as Tuned
    from laconic.training.sparsity import StructuredSparsity as StructuredSparsity
    from laconic.training.sparsity import UnstructuredSparsity as UnstructuredSparsity
else:
    # No name here may be that of a module of this package: importing that module would bind its name over the function.
    _PUBLIC = {
        "analysis.diagnose": ("doctor",),
        "analysis.diversity": ("diversity_score",),
        "analysis.macs": ("summary",),
        "analysis.provenance": ("Provenance", "Stage", "losses", "provenance", "restore_dense"),
        "analysis.summary": ("Summary",),
        "api": ("is_reduced", "reduce_", "reduced", "restore_"),
        "backbones": ("hosts",),
        "checkpoints.hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
        "checkpoints.official_weights": ("import_checkpoint",),
        "checkpoints.save_load": ("load", "save"),
        "core.attention": ("AttentionView",),
        "core.block_context": ("BlockContext",),
        "core.method": ("Method", "Prune", "Reducer", "method"),
        "core.schedule": ("Schedule", "WarmIn"),
        "core.tokens": ("Tokens",),
        "exporting": ("ExportReport", "export"),
        "methods.patch_slimming.calibration": ("calibrate",),
        "planning": ("Plan", "plan"),
        "planning.repair": ("Repaired", "repair_"),
        "planning.tune": ("tune",),
        "planning.tuned": ("Tuned",),
        "training.sparsity": ("StructuredSparsity", "UnstructuredSparsity"),
    }
    _MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
    _RENAMED = {"Seen": "AttentionView", "Site": "BlockContext"}  # names of version 0.1

    def __getattr__(name: str) -> Any:
        """Import a public name, the config of a method, or a submodule, at its first use."""
        if name == "__all__":
            return sorted({*_MODULE_OF, *_configs(), "methods"})
        public = _RENAMED.get(name, name)
        if public in _MODULE_OF:
            value = getattr(importlib.import_module(f"laconic.{_MODULE_OF[public]}"), public)
        elif name[:1].isupper() and name in _configs():
            value = getattr(importlib.import_module("laconic.methods"), name)
        elif not name.startswith("__") and importlib.util.find_spec(f"laconic.{name}") is not None:
            value = importlib.import_module(f"laconic.{name}")
        else:
            raise AttributeError(f"module 'laconic' has no attribute {name!r}")
        return globals().setdefault(name, value)

    def _configs() -> list[str]:
        """Return the config classes of the methods that come with laconic."""
        package = importlib.import_module("laconic.methods")
        return [name for name, value in vars(package).items() if getattr(value, "info", None) is not None]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


_moved.install()
