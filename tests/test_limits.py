"""Small files that claim gigabytes: each is refused before memory is allocated, and genuine files are read as ever."""

import io
import json
import os
import resource
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform

import laconic
from families import AT, make, reduced
from laconic.checkpoints.meta_build import check_input
from laconic.checkpoints.model_spec import build
from laconic.checkpoints.official_weights import import_checkpoint
from laconic.checkpoints.save_load import load, save
from laconic.checkpoints.saved_files import RECORD, WEIGHTS
from laconic.cli import draw, image_io
from laconic.cli.app import main
from laconic.cli.weights import fill
from laconic.core import limits
from laconic.core.files import Refusal
from laconic.data import Prepared, Unreadable, decode, open_images, pictures
from laconic.data.named import TorchImages
from laconic.data.sizes import check_size, planned_size

TINY = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def little_memory(request):
    """No test may map more than 1.5 GiB beyond what is mapped already: what is not refused in time fails."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 2**29, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, colour=2, bits=8, pixels=False):
    """A PNG that claims a size; with ``pixels`` they are all there."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b"\0" * (width * channels * bits // 8 + 1)
    data = zlib.compress(row * height if pixels else b"\0")
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def as_file(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gif(width, height):
    data = bytearray(as_file(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def tiff(width, height):
    data = as_file(Image.new("I;16", (4321, 4)), "TIFF")
    data = data.replace(struct.pack("<HHII", 256, 4, 1, 4321), struct.pack("<HHII", 256, 4, 1, width))
    return data.replace(struct.pack("<HHII", 257, 4, 1, 4), struct.pack("<HHII", 257, 4, 1, height))


def bmp(width, height):
    data = bytearray(as_file(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def webp(width, height):
    data = bytearray(as_file(Image.new("RGB", (4, 4)), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", struct.unpack("<I", data[21:25])[0] & ~0xFFFFFFF | width - 1 | (height - 1) << 14)
    return bytes(data)


BOMBS = {
    "png": png(100_000, 100_000),
    "just above": png(8192, 8193),
    "16 bit": png(20_000, 20_000, colour=0, bits=16),
    "palette": png(30_000, 3_000, colour=3),
    "alpha": png(12_000, 12_000, colour=6),
    "gif": gif(65_535, 65_535),
    "tiff": tiff(50_000, 50_000),
    "bmp": bmp(40_000, 40_000),
    "webp": webp(16_383, 16_383),
}
WIDE = png(100_000, 2, pixels=True)


# ---------------------------------------------------------------------------------------------------- pictures
@pytest.mark.parametrize("kind", BOMBS)
def test_pictures_that_claim_too_many_pixels(kind):
    usual = Image.MAX_IMAGE_PIXELS
    with pytest.raises(Unreadable, match=r"picture\.png: it .* pixels, and the limit is 67,108,864 pixels.*LACONIC_LIMITS"):
        decode(BOMBS[kind], "picture.png")
    assert usual == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("data", [png(0, 5), png(5, 0), bmp(0, 4), png(4, 4), WIDE[:200]], ids=range(5))
def test_pictures_without_pixels_or_cut_off(data):
    with pytest.raises(Unreadable, match="x: "):
        decode(data, "x")


def test_sizes_do_not_depend_on_pillows_own_check(monkeypatch):
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda *args, **how: None)  # as plugins of others may come without
    with pytest.raises(Unreadable, match="it is 100,000 x 100,000: 10,000,000,000 pixels, and the limit is"):
        decode(BOMBS["png"], "x")
    with pytest.raises(Unreadable, match=r"it has no pixels \(0 x 4\)"):
        check_size("x", Image.new("RGB", (0, 4)))


def test_the_limit_of_pixels_is_kept_exactly_and_can_be_raised(monkeypatch):
    monkeypatch.setattr(limits, "PIXELS", 100)
    assert decode(png(10, 10, pixels=True), "x").size == (10, 10)
    with pytest.raises(Unreadable, match=r"it has 110 pixels, and the limit is 100 pixels.*LACONIC_LIMITS=2"):
        decode(png(10, 11, pixels=True), "x")
    monkeypatch.setenv("LACONIC_LIMITS", "2")
    assert decode(png(10, 11, pixels=True), "x").size == (10, 11)
    assert decode(png(10, 20, pixels=True), "x").size == (10, 20)
    with pytest.raises(Unreadable):
        decode(png(10, 21, pixels=True), "x")
    monkeypatch.setenv("LACONIC_LIMITS", "inf")
    assert decode(png(10, 210, pixels=True), "x").size == (10, 210)


@pytest.mark.parametrize("value", ["many", "0", "-1", "nan"])
def test_a_factor_that_is_none(value, monkeypatch):
    monkeypatch.setenv("LACONIC_LIMITS", value)
    with pytest.raises(ValueError, match="LACONIC_LIMITS must be a number above 0"):
        limits.check("it has", 1, 2)


def test_the_first_of_many_frames_is_all_that_is_decoded():
    frames = [Image.new("P", (64, 64), number) for number in range(50)]
    assert decode(as_file(frames[0], "GIF", save_all=True, append_images=frames[1:]), "x").size == (64, 64)


def noisy(mode, seed=0):
    draws = np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(draws.random((23, 17), np.float32) * 300)
    if mode.startswith("I"):
        grey = draws.integers(0, 60_000, (23, 17)).astype(np.uint16 if mode == "I;16" else np.int32)
        grey[0, 0] += 5_000 if mode == "I;16" else 90_000  # the largest value is in the first band
        return Image.fromarray(grey)
    return Image.fromarray(draws.integers(0, 256, (23, 17, 4), dtype=np.uint8), "RGBA").convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "F", "I", "I;16"])
def test_bands_make_no_difference(mode, monkeypatch):
    data = as_file(noisy(mode), "TIFF" if mode in ("F", "I", "I;16") else "PNG")
    whole = decode(data, "x")
    monkeypatch.setattr(pictures, "BAND", 17 * 5)
    assert np.array_equal(np.asarray(decode(data, "x")), np.asarray(whole))


def test_a_large_grey_picture_of_16_bits_takes_little_more_than_its_pixels():
    assert decode(png(8192, 4096, colour=0, bits=16, pixels=True), "x").size == (8192, 4096)


# ---------------------------------------------------------------------------------------------------- resizing
def transform(mode="center", size=(3, 48, 48), crop=0.9):
    return create_transform(size, is_training=False, crop_mode=mode, crop_pct=crop)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 48, 48), (3, 48, 64)])
@pytest.mark.parametrize("shape", [(100, 60), (61, 200), (33, 33), (5, 400)])
def test_the_planned_size_is_that_of_the_resize(mode, size, shape):
    made, image = transform(mode, size), Image.new("RGB", shape)
    found, expected = planned_size(shape, made), made.transforms[0](image).size
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1


def test_other_steps_of_transforms():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    assert planned_size((100, 200), v2.Compose([v2.Compose([v2.RandomHorizontalFlip()]), v2.Resize([50])])) == (50, 100)
    assert planned_size((100, 200), v2.Resize(50, max_size=60)) == (30, 60)
    assert planned_size((100, 200), v2.Compose([v2.CenterCrop(50), v2.Resize(1000)])) == (100, 200)
    assert planned_size((100, 200), lambda image: image) == (100, 200)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "1.png").write_bytes(WIDE)
    (tmp_path / "val" / "a" / "2.png").write_bytes(as_file(Image.new("RGB", (60, 40), (9, 9, 9))))
    return tmp_path


def test_a_picture_that_a_resize_would_blow_up_is_unreadable(folder):
    prepared = Prepared(open_images("", "val", folder), transform(size=(3, 224, 224)), replace=False)
    image, label, index, failed = prepared[0]
    assert (label, index, failed) == (0, 0, 0)
    assert image.shape == (3, 224, 224)
    assert prepared[1][3] == -1
    assert "which the model's transform resizes to 12,400,000 x 248" in prepared.failure(0).reason
    assert torch.equal(Prepared(prepared.images, prepared.transform)[0][0], prepared[1][0])


def test_a_picture_that_a_resize_would_make_vanish_is_unreadable(folder):
    prepared = Prepared(open_images("", "val", folder), transform("border"), replace=False)
    assert prepared[0][3] == 0
    assert "resizes to 53 x 0" in prepared.failure(0).reason


def test_show_refuses_pictures_in_one_sentence(tmp_path, capsys, folder):
    code = main(["show", str(folder / "val/a/1.png"), "--model", "scenes_vit_tiny", "--output", str(tmp_path / "out")])
    assert code == 1
    assert "1.png cannot be read as an image: it is 100,000 x 2, which" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model = timm.create_model(TINY, depth=1, embed_dim=48).eval()
    for kind, data in BOMBS.items():
        (tmp_path / f"{kind}.png").write_bytes(data)
        with pytest.raises(Refusal, match=r"\.png cannot be read as an image: .*LACONIC_LIMITS"):
            image_io.read(tmp_path / f"{kind}.png", model)


def test_photographs_are_read_as_images_of_data_sets_are(tmp_path):
    (tmp_path / "a.png").write_bytes(as_file(noisy("RGBA")))
    photo = image_io.read(tmp_path / "a.png", timm.create_model(TINY, depth=1, embed_dim=48))
    assert np.array_equal(np.asarray(photo.image), np.asarray(decode(as_file(noisy("RGBA")), "x")))


def test_a_sheet_that_no_picture_can_hold(tmp_path):
    with pytest.raises(Refusal, match="pixels, more than a picture may have"):
        draw.save_sheet(tmp_path / "a.png", [[np.zeros((336, 336, 3))] * 200], ["x"] * 200, "")


# ---------------------------------------------------------------------------------------------------- sets of images
def test_files_that_are_devices_pipes_or_too_long(folder, monkeypatch):
    (folder / "val/a/3.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "val/a/4.png")
    images = open_images("", "val", folder)
    for number in (2, 3):
        with pytest.raises(Unreadable, match="not a regular file"):
            images.load(number)
    with open(folder / "val/a/2.png", "r+b") as file:
        file.truncate(2**40)  # takes no space on disk
    with pytest.raises(Unreadable, match="its file has 1,048,576.0 MiB, and the limit is 512.0 MiB"):
        images.load(1)


class Theirs:
    """A data set of torchvision: it opens its files itself."""

    classes = ("a",)

    def __init__(self, folder, kinds):
        self.files = []
        for kind in kinds:
            self.files.append(folder / f"{kind}.png")
            self.files[-1].write_bytes(BOMBS[kind])

    def __getitem__(self, i):
        return Image.open(self.files[i]).convert("RGB"), 0


def test_data_sets_of_torchvision(tmp_path):
    images = object.__new__(TorchImages)
    images.images, images.targets, images.title = Theirs(tmp_path, BOMBS), None, "theirs"
    for number in range(len(BOMBS)):
        for read in (images.load, images.label):
            with pytest.raises(Unreadable, match="theirs .*LACONIC_LIMITS"):
                read(number)


def tar_of(path, *infos):
    with tarfile.open(path, "w") as tar:
        for name, data in infos:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_header_of_a_tar_that_claims_gigabytes(tmp_path):
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("a/1.png")
        info.size, info.type = 8 * 2**30, kind
        (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10 * 512))
        with pytest.raises(ValueError, match="cannot be read as a tar file|no images"):
            open_images("", "val", tmp_path / "x.tar")


def test_tars_within_tars(tmp_path):
    path, data = tmp_path / "x.tar", as_file(Image.new("RGB", (8, 8)))
    path = tar_of(path, ("a/1.png", data))
    assert len(open_images("", "val", path)) == 1
    for _ in range(30):
        path = tar_of(path, ("b/x.tar", path.read_bytes()))
    with pytest.raises(ValueError, match="tars within tars"):
        open_images("", "val", path)


def test_sparse_images_in_a_tar(tmp_path):
    info = tarfile.TarInfo("a/1.png")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"00000000000\0", b"00000000000\0"
    header[483:495] = b"77777777777\0"  # 8 GiB
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(10 * 512))
    with pytest.raises(ValueError, match="as a sparse file"):
        open_images("", "val", tmp_path / "x.tar")


# ---------------------------------------------------------------------------------------------------- checkpoints
def deit(**changes):
    weights = {"cls_token": torch.zeros(1, 1, 192), "pos_embed": torch.zeros(1, 197, 192)}
    return {"model": weights | {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)} | changes}


HUGE = (1, 1 + 4000**2, 192)
CLAIMS = {
    "meta": (lambda: deit(pos_embed=torch.zeros(HUGE, device="meta")), r"pos_embed \[1, 16000001, 192\] in .* has no values"),
    "small meta": (lambda: deit(**{"head.bias": torch.zeros(10, device="meta")}), r"head.bias \[10\] in .* has no values"),
    "expanded": (lambda: deit(pos_embed=torch.zeros(1, 1, 1).expand(HUGE)), r"its tensors claim 11,71.* MiB, and the limit is"),
    "strided": (lambda: deit(pos_embed=torch.zeros(192).as_strided(HUGE, (0, 0, 1))), "its tensors claim"),
    "many": (lambda: deit(**{f"head{i}": torch.zeros(1).expand(10**7) for i in range(99)}), "its tensors claim"),
    "head": (lambda: deit(**{"head.weight": torch.zeros(1, 1).expand(10**8, 192)}), "its tensors claim"),
    "no bytes": (lambda: deit(**{"head.weight": torch.zeros(10**9, 0)}), "asks for a model that takes more than its weights"),
    "sparse": (
        lambda: deit(pos_embed=torch.sparse_coo_tensor(size=HUGE, check_invariants=True)),
        "pos_embed in .* is a torch.sparse_coo tensor",
    ),
    "quantized": (
        lambda: deit(pos_embed=torch.quantize_per_tensor(torch.zeros(1, 197, 192), 0.1, 0, torch.qint8)),
        "is a quantized",
    ),
    "attention": (
        lambda: deit(pos_embed=torch.zeros(1, 1 + 128**2, 192).half()),
        "attention weights take 3,07.* MiB, and the limit is",
    ),
    "image": (
        lambda: deit(pos_embed=torch.zeros(1, 1 + 260**2, 192, dtype=torch.int8)),
        "asks for a model for images of 17,305,600 pix",
    ),
}


@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning", "ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning", "ignore:Validating sparse:UserWarning")
@pytest.mark.parametrize("form", ["file", "old file", "dict"])
@pytest.mark.parametrize("kind", CLAIMS)
def test_checkpoints_that_claim_more_than_they_hold(kind, form, tmp_path):
    make_content, found = CLAIMS[kind]
    place = content = make_content()
    if form != "dict":
        place = tmp_path / "a.pth"
        torch.save(content, place, _use_new_zipfile_serialization=form == "file")
    with pytest.raises(ValueError, match=found):
        import_checkpoint(place, "evit", keep=0.7)
    model = make("plain").train()
    with pytest.raises(ValueError, match=r"a\.pth|the given dict"):
        import_checkpoint(place, "evit", model=model, keep=0.7, at=AT)
    with pytest.raises(ValueError, match="not reduced"):
        laconic.restore_(model)
    assert model.training


def test_expanded_tensors_within_the_limit_are_read():
    source = make("plain")
    weights = {**source.state_dict(), "head.bias": torch.tensor([0.5]).expand(10)}
    model = import_checkpoint(weights, "evit", model=make("plain"), keep=0.7, at=AT)
    assert torch.equal(model.head.bias, torch.full((10,), 0.5))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.int64])
def test_tensors_of_another_kind_are_no_weights(dtype, tmp_path):
    model, weights = make("plain"), make("plain").state_dict()
    weights["head.weight"] = weights["head.weight"].to(dtype)
    before = model.state_dict()["head.weight"].clone()
    with pytest.raises(ValueError, match=f"head.weight in the given dict is of {dtype}, but torch.float32 was expected"):
        import_checkpoint(weights, "evit", model=model, keep=0.7, at=AT)
    assert torch.equal(model.head.weight, before)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="but torch.float32 was expected"):
        fill(make("plain"), tmp_path / "a.pth")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_floating_weights_of_any_width_are_read(dtype):
    weights = {name: tensor.to(dtype) for name, tensor in make("plain").state_dict().items()}
    model = import_checkpoint(weights, "evit", model=make("plain"), keep=0.7, at=AT)
    assert torch.equal(model.head.weight, weights["head.weight"].float())


def packed(path, content, size):
    """A checkpoint as a compressed archive, one member of which unpacks to ``size`` bytes of nothing."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in members:
            new.writestr(name, data)
        new.writestr("archive/data/99", bytes(size))


def test_archives_that_unpack_to_far_more_than_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ALLOWANCE", 2**20)
    packed(tmp_path / "a.pth", deit(), 2**26)
    for read in (
        lambda: import_checkpoint(tmp_path / "a.pth", "evit", keep=0.7),
        lambda: fill(make("plain"), tmp_path / "a.pth"),
    ):
        with pytest.raises(ValueError, match=r"a\.pth is an archive of 0\.. MiB that unpacks to 6.* LACONIC_LIMITS=\d+"):
            read()
    data = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "b.pth").write_bytes(data[:-30] + b"?" * 30)  # its list of members cannot be found
    with pytest.raises(ValueError, match=r"b\.pth is damaged"):
        import_checkpoint(tmp_path / "b.pth", "evit", keep=0.7)
    np.savez_compressed(tmp_path / "a.npz", kernel=np.zeros(2**24, np.float32))
    with pytest.raises(ValueError, match="is an archive"):
        fill(make("plain"), tmp_path / "a.npz")


class Call:
    """Is pickled as a call of a function, which unpickling makes."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_calls_in_a_pickle_that_allocate(tmp_path):
    scalar = np.float64(0).__reduce__()[0]
    for content, found in (
        (deit() | {"best": Call(scalar, Call(np.dtype, "V500000000"))}, "is damaged"),
        (deit() | {"best": Call(bytearray, 3 * 10**9)}, "is damaged.*MemoryError"),
        (deit(extra=Call(torch.Tensor, 10**8)), "its tensors claim"),  # without values
        (deit(extra=Call(torch.Tensor, 10**9)), "is damaged"),
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=rf"a\.pth .*{found}"):
            import_checkpoint(tmp_path / "a.pth", "evit", keep=0.7)


def test_training_arguments_that_are_no_lists_of_blocks():
    for blocks in ("-" * 10**6 + "1", torch.zeros(10**9, device="meta"), "(" * 900, ["3"], {}):
        content = {"model": make("plain").state_dict(), "args": {"base_keep_rate": 0.7, "drop_loc": blocks}}
        with pytest.raises(ValueError, match="training arguments in the given dict are not EViT's"):
            import_checkpoint(content, "evit", model=make("plain"))
    content["args"] = {"base_keep_rate": 10**400}
    with pytest.raises(ValueError, match="training arguments"):
        import_checkpoint(content, "evit", model=make("plain"))


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63])
def test_headers_of_safetensors_that_claim_too_much(length, tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for data in (struct.pack("<Q", length) + b"{}", struct.pack("<Q", len(header)) + header + bytes(64)):
        (tmp_path / "a.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
            import_checkpoint(tmp_path / "a.safetensors", "evit", keep=0.7)


# ---------------------------------------------------------------------------------------------------- saved models
@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sound")
    save(reduced("patchmerger", "plain"), directory)
    return directory


def edited(directory, path, **args):
    record = json.loads((directory / RECORD).read_text())
    inner = record
    for part in path.split("."):
        inner = inner[part]
    inner.update(args)
    (directory / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "args",
    [
        {"embed_dim": 10**6},
        {"depth": 10**5},
        {"depth": 10**5, "embed_dim": 8, "num_heads": 1},
        {"depth": 10**9},
        {"img_size": 10**6},
        {"img_size": 10**6, "pos_embed": "none"},
        {"img_size": 5000, "pos_embed": "none", "patch_size": 500},
        {"img_size": 3200, "pos_embed": "none"},
        {"num_classes": 10**6, "embed_dim": 480},
        {"num_classes": 10**12},
        {"mlp_ratio": 1e6},
        {"in_chans": 10**6},
        {"patch_size": 10**5},
        {"reg_tokens": 10**6, "img_size": [2**19, 2**19]},
    ],
    ids=str,
)
def test_records_that_ask_for_a_model_of_gigabytes(args, sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    edited(tmp_path, "model.args", **args)
    with pytest.raises(limits.TooLarge, match=r"laconic\.json (asks|sets) .*, and the limit is .*LACONIC_LIMITS=\d+"):
        load(tmp_path)


@pytest.mark.parametrize("size", [10**6, 10**7, 10**30])
def test_records_whose_method_asks_for_gigabytes(size, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ALLOWANCE", 2**20)
    save(reduced("evovit", "plain"), tmp_path)
    edited(tmp_path, "method.options", second_head=size)
    model = make("plain").train()
    for given in (None, model):
        with pytest.raises(limits.TooLarge, match=r"laconic\.json"):
            load(tmp_path, model=given)
    with pytest.raises(ValueError, match="not reduced"):
        laconic.restore_(model)


def test_a_limit_can_be_raised(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "INPUT_PIXELS", 96 * 96 - 1)
    with pytest.raises(limits.TooLarge, match="images of 9,216 pixels, and the limit is 9,215 pixels.*LACONIC_LIMITS=2"):
        load(sound)
    monkeypatch.setenv("LACONIC_LIMITS", "2")
    load(sound)


def test_records_that_are_too_long_or_too_deep(sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (tmp_path / RECORD).write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"laconic\.json is damaged .*nested too deep"):
        load(tmp_path)
    with open(tmp_path / RECORD, "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"laconic\.json is a file of 1,048,576\.0 MiB, and the limit is"):
        load(tmp_path)


def test_what_a_refused_build_leaves_behind(sound, tmp_path):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    edited(tmp_path, "model.args", embed_dim=10**6)
    with pytest.raises(limits.TooLarge):
        load(tmp_path)
    torch.nn.Linear(10**5, 10**5, device="meta")  # no limit is left on what others build
    torch.nn.ParameterList(torch.zeros(1, device="meta") for _ in range(3000))


@pytest.mark.parametrize("sizes", [[(4, 4)], [(2, 4), (2, 4)]])
def test_parameters_count_by_their_bytes_and_once(sizes, monkeypatch):
    monkeypatch.setattr(limits, "ALLOWANCE", 60)

    def built():
        tensors = [torch.nn.Parameter(torch.zeros(size, device="meta")) for size in sizes]
        torch.nn.ParameterList([*tensors, *tensors])

    with limits.building("x", 1, 1):  # 4 of 1 byte, and 60: as many as 16 floats
        built()
    monkeypatch.setattr(limits, "ALLOWANCE", 59)
    with pytest.raises(limits.TooLarge), limits.building("x", 1, 1):
        built()


def test_models_of_transformers(tmp_path):
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = library.ViTModel(library.ViTConfig(**sizes, image_size=64), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "theirs")
    save(laconic.reduce_(model, "topk", keep=0.7), tmp_path / "ours")
    from laconic.checkpoints.transformers_spec import from_directory

    assert load(tmp_path / "ours").config.hidden_size == 32
    assert from_directory(str(tmp_path / "theirs")).config.hidden_size == 32
    for args in ({"hidden_size": 10**5, "num_attention_heads": 1}, {"image_size": 10**6}, {"num_hidden_layers": 10**6}):
        shutil.copytree(tmp_path / "ours", tmp_path / "b", dirs_exist_ok=True)
        edited(tmp_path / "b", "model.config", **args)
        with pytest.raises(limits.TooLarge, match=r"laconic\.json asks for a model"):
            load(tmp_path / "b")
    for args in ({"hidden_size": 10**5, "num_attention_heads": 1}, {"num_hidden_layers": 10**6}, {"num_labels": 10**9}):
        shutil.copytree(tmp_path / "theirs", tmp_path / "c", dirs_exist_ok=True)
        config = json.loads((tmp_path / "c" / "config.json").read_text()) | args
        (tmp_path / "c" / "config.json").write_text(json.dumps(config))
        with pytest.raises(limits.TooLarge, match="LACONIC_LIMITS"):
            from_directory(str(tmp_path / "c"))


def test_models_of_transformers_without_a_table_of_positions(tmp_path):
    library = pytest.importorskip("transformers")
    from laconic.checkpoints.transformers_spec import from_directory

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    library.DINOv3ViTModel(library.DINOv3ViTConfig(**sizes)).save_pretrained(tmp_path)
    from_directory(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text()) | {"image_size": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(limits.TooLarge, match="for images of 1,000,000,000,000 pixels"):
        from_directory(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("deit_tiny_patch16_224", {"img_size": 1024}),
        ("deit_small_patch16_224", {"img_size": 1024}),
        ("vit_large_patch16_384", {"img_size": 1024}),
        ("beit_large_patch16_512", {}),
        ("eva02_large_patch14_448", {}),
        ("pvt_tiny", {"img_size": 1024}),
        ("cvt_13", {"img_size": 384}),
        ("lvvit_medium", {"img_size": 448}),
    ],
)
def test_genuine_models_are_within_the_limits(name, args):
    import laconic.models  # noqa: F401

    weights = build(name, "", args, "meta").state_dict()
    held = sum(tensor.numel() * 2 for tensor in weights.values())  # stored in half precision
    with limits.building("x", held, len(weights)):
        model = build(name, "", args, "meta")
    check_input(model, "x", held)


def test_weights_of_the_command_line(tmp_path, capsys):
    torch.save(deit(pos_embed=torch.zeros(1, 1, 1).expand(HUGE)), tmp_path / "a.pth")
    assert main(["show", "x.png", "--model", TINY, "--weights", str(tmp_path / "a.pth")]) == 1
    assert "its tensors claim" in capsys.readouterr().err
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert main(["show", "x.png", "--model", TINY, "--weights", str(tmp_path / "a.safetensors")]) == 1
    assert "does not hold the weights of" in capsys.readouterr().err
    assert not (tmp_path / WEIGHTS).exists()
