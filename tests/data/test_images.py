"""Decoding, sizes, and patches against transformers' processor."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from whole_samples import load_patches

from megatron_unimm.config.data import ImageSizeConfig
from megatron_unimm.config.model import Qwen25VisionConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import TRANSPOSE, decode, image_size, patchify, resize, target_size

LIMIT = 1_000_000
EXIF_ORIENTATION = 0x0112


def encoder(**fields) -> Qwen25VisionConfig:
    return Qwen25VisionConfig(
        family="qwen2_5", num_layers=1, hidden_size=8, num_heads=1, mlp_size=8, out_size=8, **fields
    )


def random_image(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(100, 60), (61, 333), (300, 300), (56, 84)])
@pytest.mark.parametrize(
    "fields", [{}, {"patch_size": 8, "spatial_merge_size": 1}, {"patch_size": 4, "spatial_merge_size": 4}]
)
def test_patches_equal_transformers(width, height, fields):
    """Same resized pixels, same order, same normalisation. Measured difference: 2.4e-7."""
    config = encoder(**fields)
    processor = Qwen2VLImageProcessorPil(patch_size=config.patch_size, merge_size=config.spatial_merge_size)
    picture = random_image(width, height)
    expected = processor(Image.fromarray(picture), return_tensors="np")
    rows, columns = (int(n) * config.patch_size for n in expected["image_grid_thw"][0, 1:])
    patches, grid = patchify(resize(picture, columns, rows), config)
    assert patches.dtype == np.float32
    np.testing.assert_array_equal(grid, expected["image_grid_thw"][0])
    np.testing.assert_allclose(patches, expected["pixel_values"], atol=1e-5, rtol=0)


def test_patch_order_drawn():
    """4 x 4 pixels, patches of one pixel, merge 2: the pixels of a visual token are neighbours."""
    config = encoder(patch_size=1, spatial_merge_size=2, temporal_patch_size=1)
    picture = np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4, 1), 3, axis=2)
    red = patchify(picture, config)[0][:, 0]
    pixels = np.rint((red * 0.26862954 + 0.48145466) * 255).astype(int)
    assert pixels.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


@pytest.mark.parametrize(
    ("width", "height", "limits", "expected"),
    [
        (64, 64, (252, 252), (252, 252)),  # 9 x 9 visual tokens
        (4000, 4000, (252, 252), (252, 252)),
        (640, 480, (252, 252), (252, 196)),  # 189 / 28 = 6.75
        (480, 640, (252, 252), (196, 252)),
        (300, 200, (56, 1024), (308, 196)),  # kept, rounded to whole tokens
        (2048, 1024, (56, 1024), (1036, 504)),
        (10, 20, (56, 1024), (28, 56)),
        (1000, 3, (56, 1024), (1008, 28)),  # at least one token
        (42, 70, (56, 1024), (56, 56)),  # halves go to even: 1.5 -> 2, 2.5 -> 2
    ],
)
def test_target_size(width, height, limits, expected):
    size = ImageSizeConfig(min_side=limits[0], max_side=limits[1])
    assert target_size(width, height, size, 28) == expected


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    """The stored image is turned by the inverse; decoding gives back the upright one, whose size the header tells."""
    upright = np.zeros((24, 40, 3), dtype=np.uint8)
    upright[:12, :20] = (255, 0, 0)
    upright[12:, 20:] = (0, 0, 255)
    inverse = {6: TRANSPOSE[8], 8: TRANSPOSE[6]}.get(orientation, TRANSPOSE.get(orientation))
    stored = Image.fromarray(upright)
    stored = stored.transpose(inverse) if inverse is not None else stored
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, quality=100, lossless=True, subsampling=0) if suffix != "tiff" else stored.save(
        path, exif=exif
    )
    assert image_size(DiskImage(path), LIMIT) == (40, 24)
    assert np.abs(decode(DiskImage(path), LIMIT).astype(int) - upright).max() <= 3  # JPEG


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[:, 0] = (255, 0, 0, 255)
    rgba[:, 1] = (255, 0, 0, 0)
    rgba[:, 2] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    row = decode(DiskImage(tmp_path / "a.png"), LIMIT)[0].tolist()
    assert row == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_palette_transparency_is_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    for name in ("a.png", "a.gif"):
        image.save(tmp_path / name, transparency=1)
        assert decode(DiskImage(tmp_path / name), LIMIT)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_modes(tmp_path):
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    Image.new("LA", (2, 2), (77, 255)).save(tmp_path / "grey_alpha.png")
    Image.fromarray(np.full((2, 2), 0x8001, dtype=np.uint16)).save(tmp_path / "grey16.png")
    Image.fromarray(np.full((2, 2), 0x8001, dtype=np.uint16)).save(tmp_path / "grey16.tiff")
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    values = {path.name: decode(DiskImage(path), LIMIT)[0, 0].tolist() for path in tmp_path.iterdir()}
    red = values.pop("cmyk.jpg")
    assert red[0] >= 250 and max(red[1:]) <= 5  # noqa: PT018
    assert values == {
        "grey.png": [77] * 3,
        "bits.png": [255] * 3,
        "grey_alpha.png": [77] * 3,
        "grey16.png": [128] * 3,
        "grey16.tiff": [128] * 3,
    }


def test_16_bit_rgb_keeps_the_high_byte(tmp_path):
    """Written by hand, as Pillow does not write it: one pixel (0x8001, 0x00ff, 0xffff)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 0x8001, 0x00FF, 0xFFFF))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert decode(DiskImage(tmp_path / "a.png"), LIMIT)[0, 0].tolist() == [0x80, 0, 0xFF]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    assert decode(DiskImage(tmp_path / f"a.{suffix}"), LIMIT)[0, 0].tolist() == [255, 0, 0]


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("L", (100, 50)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:60])  # nothing but the header is left to read
    for read in (image_size, decode):
        with pytest.raises(SampleError, match=r"100x50 is 5000 pixels, data\.max_image_pixels allows 4999") as caught:
            read(DiskImage(tmp_path / "a.png"), 4999)
        assert caught.value.fault == "image too large"
    assert image_size(DiskImage(tmp_path / "a.png"), 5000) == (100, 50)


def test_damage(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    Image.fromarray(random_image(64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    Image.fromarray(random_image(64, 64)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:2000])
    for name in ("text.png", "eps.png", "absent.png"):
        with pytest.raises(SampleError, match=f"{name}: is no readable image"):
            image_size(DiskImage(tmp_path / name), LIMIT)
    for name in ("cut.png", "cut.jpg"):
        assert image_size(DiskImage(tmp_path / name), LIMIT) == (64, 64)
        with pytest.raises(SampleError, match=f"{name}: cannot be decoded") as caught:
            decode(DiskImage(tmp_path / name), LIMIT)
        assert caught.value.fault == "unreadable image"


def test_damaged_exif_is_ignored(tmp_path):
    Image.fromarray(random_image(32, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no TIFF header")
    assert image_size(DiskImage(tmp_path / "a.jpg"), LIMIT) == (32, 16)
    assert decode(DiskImage(tmp_path / "a.jpg"), LIMIT).shape == (16, 32, 3)


def test_load_patches_follows_the_planned_grid(tmp_path):
    Image.fromarray(random_image(200, 90)).save(tmp_path / "a.png")
    config = encoder()
    patches = load_patches(DiskImage(tmp_path / "a.png"), np.array([1, 4, 8]), config, LIMIT)
    expected, grid = patchify(resize(random_image(200, 90), 112, 56), config)
    assert grid.tolist() == [1, 4, 8]
    np.testing.assert_array_equal(patches, expected)
