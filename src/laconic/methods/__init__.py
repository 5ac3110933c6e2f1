"""Token reduction methods, one file each; importing a file registers its method. Steps shared by several methods are in `ops`.

`squeeze` (TPS) and `decouple` (BAT) hold the code shared by several methods of one paper. Calling the package returns the
registered methods: ``laconic.methods()`` maps each name to its `laconic.core.method.MethodInfo`.
"""

import sys
import types

from laconic.core.method import MethodInfo as MethodInfo
from laconic.core.method import methods as _registered
from laconic.methods.adaptive_patch import AdaptivePatch as AdaptivePatch
from laconic.methods.adavit import AdaViT as AdaViT
from laconic.methods.atc import ATC as ATC
from laconic.methods.ats import ATS as ATS
from laconic.methods.avit import AViT as AViT
from laconic.methods.bat import BAT as BAT
from laconic.methods.chain import Chain as Chain
from laconic.methods.conv_pool import ConvPool as ConvPool
from laconic.methods.dedup import Dedup as Dedup
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
from laconic.methods.patch_slimming.method import PatchSlimming as PatchSlimming
from laconic.methods.patchmerger import PatchMerger as PatchMerger
from laconic.methods.pitome import PiToMe as PiToMe
from laconic.methods.pool import AvgPool as AvgPool
from laconic.methods.pool import MaxPool as MaxPool
from laconic.methods.pre_merge import PreMerge as PreMerge
from laconic.methods.run_length import RunLength as RunLength
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
from laconic.methods.two_stage import TwoStage as TwoStage
from laconic.methods.zero_tprune import ZeroTPrune as ZeroTPrune


class _Package(types.ModuleType):
    """A callable package: `laconic.methods` is the module, ``laconic.methods()`` returns the registered methods."""

    def __call__(self) -> dict[str, MethodInfo]:
        """Return all registered methods by name, including the methods of other packages."""
        return _registered()


sys.modules[__name__].__class__ = _Package
