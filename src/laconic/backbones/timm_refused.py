"""Models that resemble vision transformers but cannot drop tokens, and blocks with unsupported attention, with the reasons."""

from __future__ import annotations

from laconic.core.backbone import register_refusal

WINDOWS = "it attends in windows of its grid, which would be incomplete without the removed tokens"
POOLS = "it pools or shifts its tokens on their grid between blocks, and without the removed tokens there is no grid"
CHANNELS = "its attention is between channels or its convolutions mix neighbouring positions, so no tokens can be removed"
TWO = "it makes several attention calls in one block, so there is no single attention to score tokens with or to bias"
OWN = "its attention is not one scaled_dot_product_attention over all tokens, so it can be neither read nor biased"
CLASS_LATE = "its class token joins late and its attention mixes its heads outside scaled_dot_product_attention"
MERGES = "it merges neighbouring patches on their grid at the end, and without the removed tokens there is no grid"

_REFUSED = {
    WINDOWS: (
        "timm.models.swin_transformer.SwinTransformer",
        "timm.models.swin_transformer_v2.SwinTransformerV2",
        "timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr",
        "timm.models.maxxvit.MaxxVit",
        "timm.models.vision_transformer_sam.VisionTransformerSAM",
        "timm.models.hieradet_sam2.HieraDet",
        "timm.models.davit.DaVit",
        "timm.models.gcvit.GlobalContextVit",
        "timm.models.nest.Nest",
        "timm.models.tiny_vit.TinyVit",
        "timm.models.twins.Twins",
        "torchvision.models.swin_transformer.SwinTransformer",
        "torchvision.models.maxvit.MaxVit",
    ),
    POOLS: (
        "timm.models.hiera.Hiera",
        "timm.models.mvitv2.MultiScaleVit",
        "timm.models.pit.PoolingVisionTransformer",
        "timm.models.levit.Levit",
        "timm.models.levit.LevitDistilled",
        "timm.models.coat.CoaT",
        "timm.models.visformer.Visformer",
        "timm.models.volo.VOLO",
        "timm.models.efficientformer.EfficientFormer",
        "timm.models.efficientformer_v2.EfficientFormerV2",
        "timm.models.pvt_v2.PyramidVisionTransformerV2",
        "torchvision.models.video.mvit.MViT",
    ),
    CHANNELS: (
        "timm.models.xcit.Xcit",
        "timm.models.mlp_mixer.MlpMixer",
        "timm.models.metaformer.MetaFormer",
        "timm.models.convmixer.ConvMixer",
        "timm.models.convnext.ConvNeXt",
        "timm.models.resnet.ResNet",
        "open_clip.modified_resnet.ModifiedResNet",
        "torchvision.models.resnet.ResNet",
    ),
    CLASS_LATE: ("timm.models.cait.Cait",),
    OWN: ("timm.models.convit.ConVit", "timm.models.crossvit.CrossVit", "timm.models.tnt.TNT"),
    MERGES: (
        "timm.models.gemma4_vit.Gemma4VitEncoder",
        "timm.models.qwen3_vit.Qwen3VitEncoder",
        "timm.models.deepseek_vit.DeepseekVitEncoder",
    ),
    TWO: (
        "timm.models.vision_transformer.DiffParallelScalingBlock",
        "timm.models.vision_transformer.ParallelThingsBlock",
        "timm.layers.diff_attention.DiffAttention",
    ),
}
for _reason, _paths in _REFUSED.items():
    for _path in _paths:
        register_refusal(_path, _reason)
