"""Laconic: fewer tokens, same answer. Token reduction for vision transformers.

model = laconic.reduce_(timm.create_model("deit_small_patch16_224", pretrained=True), "etps", keep=0.7)
"""

from laconic.attach import reduce_, restore_
from laconic.attention import Seen
from laconic.calibrate import calibrate
from laconic.checkpoints import load, save
from laconic.cost import summary
from laconic.diversity import diversity_score
from laconic.doctor import doctor
from laconic.exporting import ExportReport, export
from laconic.hosts import hosts
from laconic.hub import from_pretrained, push_to_hub, save_pretrained
from laconic.importing import import_checkpoint
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
from laconic.planning import Plan, plan
from laconic.reducer import Method, Prune, Reducer, Site, method, methods
from laconic.report import Summary
from laconic.schedule import Schedule, WarmIn
from laconic.sparsity import StructuredSparsity, UnstructuredSparsity
from laconic.tokens import Tokens

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
