"""Patch Slimming (Tang et al., CVPR 2022, arXiv:2106.02852): the method, and the calibration that chooses its patches."""

from laconic.methods.patch_slimming.method import PatchSlimming as PatchSlimming
