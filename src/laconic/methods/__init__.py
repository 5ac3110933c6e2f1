"""One file a method; importing it here registers it. `squeeze` (TPS) and `decouple` (BAT) hold what several share."""

from laconic.methods.adavit import AdaViT
from laconic.methods.atc import ATC
from laconic.methods.ats import ATS
from laconic.methods.avit import AViT
from laconic.methods.bat import BAT
from laconic.methods.conv_pool import ConvPool
from laconic.methods.diffrate import DiffRate
from laconic.methods.dpc_knn import DPCKNN
from laconic.methods.dtps import DTPS
from laconic.methods.dynamicvit import DynamicViT
from laconic.methods.dynamicvit_bat import DynamicViTBAT
from laconic.methods.etps import ETPS
from laconic.methods.evit import EViT
from laconic.methods.evit_bat import EViTBAT
from laconic.methods.evovit import EvoViT
from laconic.methods.heuristic import Heuristic
from laconic.methods.iared import IARED
from laconic.methods.kmeans import KMeans
from laconic.methods.kmedoids import KMedoids
from laconic.methods.ltmp import LTMP
from laconic.methods.mctf import MCTF
from laconic.methods.mlp_pool import MLPPool
from laconic.methods.patch_slimming import PatchSlimming
from laconic.methods.patchmerger import PatchMerger
from laconic.methods.pitome import PiToMe
from laconic.methods.pool import AvgPool, MaxPool
from laconic.methods.sinkhorn import Sinkhorn
from laconic.methods.sit import SiT
from laconic.methods.spatial_pool import SpatialPool
from laconic.methods.spvit import SPViT
from laconic.methods.svite import SViTE
from laconic.methods.tofu import ToFu
from laconic.methods.tokenlearner import TokenLearner
from laconic.methods.tome import ToMe
from laconic.methods.topk import Random, TopK

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
    "Heuristic",
    "KMeans",
    "KMedoids",
    "MLPPool",
    "MaxPool",
    "PatchMerger",
    "PatchSlimming",
    "PiToMe",
    "Random",
    "SPViT",
    "SViTE",
    "SiT",
    "Sinkhorn",
    "SpatialPool",
    "ToFu",
    "ToMe",
    "TokenLearner",
    "TopK",
]
