"""Laconic: fewer tokens, same answer. Token reduction for vision transformers.

model = laconic.reduce_(timm.create_model("deit_small_patch16_224", pretrained=True), "etps", keep=0.7)
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from laconic.attach import reduce_ as reduce_
from laconic.attach import restore_ as restore_
from laconic.attention import Seen as Seen
from laconic.calibrate import calibrate as calibrate
from laconic.cost import summary as summary
from laconic.doctor import doctor as doctor
from laconic.hosts import hosts as hosts
from laconic.ledger import Provenance as Provenance
from laconic.ledger import Stage as Stage
from laconic.ledger import losses as losses
from laconic.ledger import provenance as provenance
from laconic.ledger import restore_dense as restore_dense
from laconic.methods import *  # noqa: F403
from laconic.reducer import Method as Method
from laconic.reducer import Prune as Prune
from laconic.reducer import Reducer as Reducer
from laconic.reducer import Site as Site
from laconic.reducer import method as method
from laconic.reducer import methods as methods
from laconic.report import Summary as Summary
from laconic.schedule import Schedule as Schedule
from laconic.schedule import WarmIn as WarmIn
from laconic.sparsity import StructuredSparsity as StructuredSparsity
from laconic.sparsity import UnstructuredSparsity as UnstructuredSparsity
from laconic.tokens import Tokens as Tokens

if TYPE_CHECKING:
    from laconic.checkpoints import load as load
    from laconic.checkpoints import save as save
    from laconic.diversity import diversity_score as diversity_score
    from laconic.exporting import ExportReport as ExportReport
    from laconic.exporting import export as export
    from laconic.hub import from_pretrained as from_pretrained
    from laconic.hub import push_to_hub as push_to_hub
    from laconic.hub import save_pretrained as save_pretrained
    from laconic.importing import import_checkpoint as import_checkpoint
    from laconic.planning import Plan as Plan
    from laconic.planning import plan as plan

__version__ = "0.1.0"

if not TYPE_CHECKING:  # type checkers read the imports above
    from laconic.methods import __all__ as _CONFIGS

    __all__ = [
        "ExportReport",
        "Method",
        "Plan",
        "Provenance",
        "Prune",
        "Reducer",
        "Schedule",
        "Seen",
        "Site",
        "Stage",
        "StructuredSparsity",
        "Summary",
        "Tokens",
        "UnstructuredSparsity",
        "WarmIn",
        "calibrate",
        "diversity_score",
        "doctor",
        "export",
        "from_pretrained",
        "hosts",
        "import_checkpoint",
        "load",
        "losses",
        "method",
        "methods",
        "plan",
        "provenance",
        "push_to_hub",
        "reduce_",
        "restore_",
        "restore_dense",
        "save",
        "save_pretrained",
        "summary",
        *_CONFIGS,
    ]

    # Reducing a model needs none of these modules: each is imported with the first use of one of its names, so that
    # `import laconic` stays quick. No name here may be a submodule's too (as doctor and hosts are): importing a submodule
    # binds its name in the package, over the function.
    _LATE = {
        "checkpoints": ("load", "save"),
        "diversity": ("diversity_score",),
        "exporting": ("ExportReport", "export"),
        "hub": ("from_pretrained", "push_to_hub", "save_pretrained"),
        "importing": ("import_checkpoint",),
        "planning": ("Plan", "plan"),
    }
    _MODULE_OF = {name: module for module, names in _LATE.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Import a late name, or a submodule that nothing has imported yet."""
        full = f"{__name__}.{_MODULE_OF.get(name, name)}"
        if name not in _MODULE_OF and importlib.util.find_spec(full) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(full)
        return globals().setdefault(name, getattr(module, name) if name in _MODULE_OF else module)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
