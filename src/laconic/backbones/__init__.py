"""Supported model classes, one library or family a file; importing this package fills the tables of `laconic.core.backbone`."""

from laconic.backbones import cvt as cvt
from laconic.backbones import lvvit as lvvit
from laconic.backbones import open_clip as open_clip
from laconic.backbones import psvit as psvit
from laconic.backbones import pvt as pvt
from laconic.backbones import timm as timm
from laconic.backbones import timm_naflex as timm_naflex
from laconic.backbones import timm_refused as timm_refused
from laconic.backbones import timm_relative as timm_relative
from laconic.backbones import torchvision as torchvision
from laconic.backbones import transformers as transformers
from laconic.backbones import transformers_layers as transformers_layers
from laconic.backbones import transformers_video as transformers_video
from laconic.core.backbone import AttentionSteps as AttentionSteps
from laconic.core.backbone import BlockSpec as BlockSpec
from laconic.core.backbone import ModelSpec as ModelSpec
from laconic.core.backbone import StageSpec as StageSpec
from laconic.core.backbone import hosts as hosts
from laconic.core.backbone import register_block as register_block
from laconic.core.backbone import register_host as register_host
from laconic.core.backbone import register_refusal as register_refusal
