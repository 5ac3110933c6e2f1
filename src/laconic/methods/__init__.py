"""One file a method; the import here registers it. Every config imported here is a public name of `laconic` too.

`squeeze` (TPS) and `decouple` (BAT) hold steps that several methods share.
"""

from typing import TYPE_CHECKING

from laconic.methods.adavit import AdaViT as AdaViT
from laconic.methods.atc import ATC as ATC
from laconic.methods.ats import ATS as ATS
from laconic.methods.avit import AViT as AViT
from laconic.methods.bat import BAT as BAT
from laconic.methods.conv_pool import ConvPool as ConvPool
from laconic.methods.diffrate import DiffRate as DiffRate
from laconic.methods.dpc_knn import DPCKNN as DPCKNN
from laconic.methods.dtps import DTPS as DTPS
from laconic.methods.dynamicvit import DynamicViT as DynamicViT
from laconic.methods.dynamicvit_bat import DynamicViTBAT as DynamicViTBAT
from laconic.methods.etps import ETPS as ETPS
from laconic.methods.evit import EViT as EViT
from laconic.methods.evit_bat import EViTBAT as EViTBAT
from laconic.methods.evovit import EvoViT as EvoViT
from laconic.methods.heuristic import Heuristic as Heuristic
from laconic.methods.iared import IARED as IARED
from laconic.methods.kmeans import KMeans as KMeans
from laconic.methods.kmedoids import KMedoids as KMedoids
from laconic.methods.ltmp import LTMP as LTMP
from laconic.methods.mctf import MCTF as MCTF
from laconic.methods.mlp_pool import MLPPool as MLPPool
from laconic.methods.patch_slimming import PatchSlimming as PatchSlimming
from laconic.methods.patchmerger import PatchMerger as PatchMerger
from laconic.methods.pitome import PiToMe as PiToMe
from laconic.methods.pool import AvgPool as AvgPool
from laconic.methods.pool import MaxPool as MaxPool
from laconic.methods.sinkhorn import Sinkhorn as Sinkhorn
from laconic.methods.sit import SiT as SiT
from laconic.methods.spatial_pool import SpatialPool as SpatialPool
from laconic.methods.spvit import SPViT as SPViT
from laconic.methods.svite import SViTE as SViTE
from laconic.methods.tofu import ToFu as ToFu
from laconic.methods.tokenlearner import TokenLearner as TokenLearner
from laconic.methods.tome import ToMe as ToMe
from laconic.methods.topk import Random as Random
from laconic.methods.topk import TopK as TopK
from laconic.reducer import Method

if not TYPE_CHECKING:  # type checkers read the imports above
    __all__ = sorted(n for n, v in globals().items() if isinstance(v, type) and issubclass(v, Method) and v is not Method)
