"""Laconic: fewer tokens, same answer. Token reduction for vision transformers.

model = laconic.reduce_(timm.create_model("deit_small_patch16_224", pretrained=True), "etps", keep=0.7)
"""

from laconic.attach import reduce_, restore_
from laconic.attention import Seen
from laconic.checkpoints import load, save
from laconic.cost import summary
from laconic.diversity import diversity_score
from laconic.doctor import doctor
from laconic.hosts import hosts
from laconic.hub import from_pretrained, push_to_hub, save_pretrained
from laconic.importing import import_checkpoint
from laconic.ledger import Provenance, Stage, losses, provenance, restore_dense
from laconic.methods import (
    BAT,
    DTPS,
    ETPS,
    AvgPool,
    DynamicViT,
    DynamicViTBAT,
    EViT,
    EViTBAT,
    Random,
    ToMe,
    TopK,
)
from laconic.reducer import Method, Prune, Reducer, Site, method, methods
from laconic.report import Summary
from laconic.schedule import Schedule, WarmIn
from laconic.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
    "BAT",
    "DTPS",
    "ETPS",
    "AvgPool",
    "DynamicViT",
    "DynamicViTBAT",
    "EViT",
    "EViTBAT",
    "Method",
    "Provenance",
    "Prune",
    "Random",
    "Reducer",
    "Schedule",
    "Seen",
    "Site",
    "Stage",
    "Summary",
    "ToMe",
    "Tokens",
    "TopK",
    "WarmIn",
    "diversity_score",
    "doctor",
    "from_pretrained",
    "hosts",
    "import_checkpoint",
    "load",
    "losses",
    "method",
    "methods",
    "provenance",
    "push_to_hub",
    "reduce_",
    "restore_",
    "restore_dense",
    "save",
    "save_pretrained",
    "summary",
]
