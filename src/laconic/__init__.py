"""Laconic: fewer tokens, same answer. Token reduction for vision transformers.

model = laconic.reduce_(timm.create_model("deit_small_patch16_224", pretrained=True), "etps", keep=0.7)
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from laconic.attach import reduce_, restore_
from laconic.attention import Seen
from laconic.calibrate import calibrate
from laconic.cost import summary
from laconic.doctor import doctor
from laconic.hosts import hosts
from laconic.ledger import Provenance, Stage, losses, provenance, restore_dense
from laconic.methods import (
    ATC,
    ATS,
    BAT,
    DPCKNN,
    DTPS,
    ETPS,
    IARED,
    LTMP,
    MCTF,
    AdaViT,
    AvgPool,
    AViT,
    ConvPool,
    DiffRate,
    DynamicViT,
    DynamicViTBAT,
    EViT,
    EViTBAT,
    EvoViT,
    Heuristic,
    KMeans,
    KMedoids,
    MaxPool,
    MLPPool,
    PatchMerger,
    PatchSlimming,
    PiToMe,
    Random,
    Sinkhorn,
    SiT,
    SpatialPool,
    SPViT,
    SViTE,
    ToFu,
    TokenLearner,
    ToMe,
    TopK,
)
from laconic.reducer import Method, Prune, Reducer, Site, method, methods
from laconic.report import Summary
from laconic.schedule import Schedule, WarmIn
from laconic.sparsity import StructuredSparsity, UnstructuredSparsity
from laconic.tokens import Tokens

if TYPE_CHECKING:
    from laconic.checkpoints import load, save
    from laconic.diversity import diversity_score
    from laconic.exporting import ExportReport, export
    from laconic.hub import from_pretrained, push_to_hub, save_pretrained
    from laconic.importing import import_checkpoint
    from laconic.planning import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "ATC",
    "ATS",
    "BAT",
    "DPCKNN",
    "DTPS",
    "ETPS",
    "IARED",
    "LTMP",
    "MCTF",
    "AViT",
    "AdaViT",
    "AvgPool",
    "ConvPool",
    "DiffRate",
    "DynamicViT",
    "DynamicViTBAT",
    "EViT",
    "EViTBAT",
    "EvoViT",
    "ExportReport",
    "Heuristic",
    "KMeans",
    "KMedoids",
    "MLPPool",
    "MaxPool",
    "Method",
    "PatchMerger",
    "PatchSlimming",
    "PiToMe",
    "Plan",
    "Provenance",
    "Prune",
    "Random",
    "Reducer",
    "SPViT",
    "SViTE",
    "Schedule",
    "Seen",
    "SiT",
    "Sinkhorn",
    "Site",
    "SpatialPool",
    "Stage",
    "StructuredSparsity",
    "Summary",
    "ToFu",
    "ToMe",
    "TokenLearner",
    "Tokens",
    "TopK",
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
]

if not TYPE_CHECKING:
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
