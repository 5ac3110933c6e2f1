"""One file a method; importing it here registers it."""

from laconic.methods.bat import BAT, DynamicViTBAT, EViTBAT
from laconic.methods.dynamicvit import DynamicViT
from laconic.methods.evit import EViT
from laconic.methods.pool import AvgPool
from laconic.methods.tome import ToMe
from laconic.methods.topk import Random, TopK
from laconic.methods.tps import DTPS, ETPS

__all__ = ["BAT", "DTPS", "ETPS", "AvgPool", "DynamicViT", "DynamicViTBAT", "EViT", "EViTBAT", "Random", "ToMe", "TopK"]
