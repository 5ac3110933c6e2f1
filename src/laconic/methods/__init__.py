"""One file a method; importing it here registers it. `squeeze` (TPS) and `decouple` (BAT) hold what several share."""

from laconic.methods.bat import BAT
from laconic.methods.dtps import DTPS
from laconic.methods.dynamicvit import DynamicViT
from laconic.methods.dynamicvit_bat import DynamicViTBAT
from laconic.methods.etps import ETPS
from laconic.methods.evit import EViT
from laconic.methods.evit_bat import EViTBAT
from laconic.methods.pool import AvgPool
from laconic.methods.tome import ToMe
from laconic.methods.topk import Random, TopK

__all__ = ["BAT", "DTPS", "ETPS", "AvgPool", "DynamicViT", "DynamicViTBAT", "EViT", "EViTBAT", "Random", "ToMe", "TopK"]
