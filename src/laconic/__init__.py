"""Laconic: fewer tokens, same answer. Token reduction for vision transformers.

model = laconic.reduce_(timm.create_model("deit_small_patch16_224", pretrained=True), "etps", keep=0.7)
"""

from laconic.attach import reduce_, restore_
from laconic.attention import Seen
from laconic.diversity import diversity_score
from laconic.hosts import hosts
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
    "ToMe",
    "Tokens",
    "TopK",
    "WarmIn",
    "diversity_score",
    "hosts",
    "losses",
    "method",
    "methods",
    "provenance",
    "reduce_",
    "restore_",
    "restore_dense",
]
