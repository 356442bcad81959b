"""Sizes and patches against transformers' image processors (their Pillow backends), over many sizes of images."""

import json

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from transformers import AutoImageProcessor
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from megatron_unimm.config.data import (
    BucketSizeConfig,
    ImageSize,
    ImageSizeConfig,
    PatchBudgetConfig,
    PixelSizeConfig,
    SquareSizeConfig,
)
from megatron_unimm.config.model import Qwen3VisionConfig, Qwen25VisionConfig
from megatron_unimm.data.images import PatchFormat, SiglipFormat, fit, num_patches, patchify
from megatron_unimm.data.sizes import check_size, crop_box, nearest_bucket, target_size
from megatron_unimm.errors import ConfigError

SMALL_TOWER = dict(num_layers=1, hidden_size=8, num_heads=1, mlp_size=8, out_size=8)
QWEN25 = Qwen25VisionConfig(family="qwen2_5", **SMALL_TOWER)
QWEN3 = Qwen3VisionConfig(family="qwen3", num_position_embeddings=16, **SMALL_TOWER)

SIZES = [
    *[(1, 1), (7, 5), (28, 28), (56, 56), (55, 57), (42, 70), (100, 60), (61, 333), (300, 300), (640, 480), (480, 640)],
    *[(199, 1), (3, 590), (14, 1400), (1024, 37), (1001, 999), (1280, 721)],
]
"""Width and height: tiny, exact multiples, halves between two multiples, ordinary, extreme."""


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def processor(tmp_path, settings: dict):
    """What AutoImageProcessor makes of a checkpoint's preprocessor_config.json, with the Pillow backend."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    return AutoImageProcessor.from_pretrained(tmp_path, backend="pil")


def patches_of(image: Image.Image, size: ImageSize, form: PatchFormat) -> tuple[np.ndarray, np.ndarray]:
    width, height = target_size(*image.size, size, form.patch_size * form.spatial_merge_size)
    pixels = np.asarray(fit(image, width, height, crop=size.crop, filter=size.filter))
    patches, grid = patchify(pixels, form)
    assert len(patches) == num_patches(width, height, form)
    return patches, grid


def qwen2_settings(**changes) -> dict:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        **changes,
    }


QWEN3_SETTINGS = qwen2_settings(
    image_processor_type="Qwen2VLImageProcessorFast",  # the name in the checkpoints
    size={"shortest_edge": 65536, "longest_edge": 16777216},
    patch_size=16,
    image_mean=[0.5, 0.5, 0.5],
    image_std=[0.5, 0.5, 0.5],
)
QWEN_CASES = {
    "qwen2_vl": (qwen2_settings(), PixelSizeConfig(rule="pixels", min_pixels=3136, max_pixels=12845056), QWEN25),
    "qwen2_vl_old_keys": (
        {**qwen2_settings(min_pixels=3136, max_pixels=1003520), "size": None},
        PixelSizeConfig(rule="pixels"),
        QWEN25,
    ),
    "qwen2_5_vl_small": (
        qwen2_settings(size={"shortest_edge": 50_000, "longest_edge": 60_000}),
        PixelSizeConfig(rule="pixels", min_pixels=50_000, max_pixels=60_000),
        QWEN25,
    ),
    "qwen3_vl": (QWEN3_SETTINGS, PixelSizeConfig(rule="pixels", min_pixels=65536, max_pixels=16777216), QWEN3),
    "qwen3_vl_small": (
        {**QWEN3_SETTINGS, "size": {"shortest_edge": 1024, "longest_edge": 40_000}, "resample": 2},
        PixelSizeConfig(rule="pixels", min_pixels=1024, max_pixels=40_000, filter="bilinear"),
        QWEN3,
    ),
}


@pytest.mark.parametrize("case", QWEN_CASES)
def test_qwen(case, tmp_path):
    """Measured difference of values: 4.8e-7."""
    settings, size, tower = QWEN_CASES[case]
    theirs = processor(tmp_path, {key: value for key, value in settings.items() if value is not None})
    for width, height in SIZES:
        expected = theirs(picture(width, height), return_tensors="np")
        patches, grid = patches_of(picture(width, height), size, tower)
        np.testing.assert_array_equal(grid, expected["image_grid_thw"][0], err_msg=f"{width}x{height}")
        np.testing.assert_allclose(patches, expected["pixel_values"], rtol=0, atol=1e-5, err_msg=f"{width}x{height}")


@pytest.mark.parametrize("case", QWEN_CASES)
def test_qwen_token_counts(case, tmp_path):
    """Of sizes drawn at random, without pixels."""
    settings, size, tower = QWEN_CASES[case]
    theirs = processor(tmp_path, {key: value for key, value in settings.items() if value is not None})
    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(np.log(20), np.log(4000), (2000, 2))).astype(int).tolist():
        if max(width, height) > 200 * min(width, height):
            continue
        ours = num_patches(*target_size(width, height, size, tower.token_pixels), tower)
        assert ours == theirs.get_number_of_image_patches(height, width), f"{width}x{height}"


def test_longer_than_transformers_allows():
    """Where transformers refuses, the sides stay whole visual tokens."""
    for width, height in [(1000, 3), (1, 5000), (100_000, 20)]:
        got = target_size(width, height, PixelSizeConfig(rule="pixels"), 28)
        assert min(got) == 28, f"{width}x{height}"
        assert max(got) % 28 == 0


SIGLIP_CASES = {
    "siglip": ({"size": {"height": 224, "width": 224}, "resample": 3}, 16, "bicubic"),
    "siglip_so400m_384": ({"size": {"height": 384, "width": 384}, "resample": 3}, 14, "bicubic"),
    "siglip2_fixed": ({"size": {"height": 256, "width": 256}, "resample": 2}, 16, "bilinear"),
}


@pytest.mark.parametrize("case", SIGLIP_CASES)
def test_siglip(case, tmp_path):
    """The processor hands whole images on; their patches are those that the tower's convolution sees, without the
    pixels that fill none. Measured difference: 1.2e-7."""
    settings, patch, filter = SIGLIP_CASES[case]
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    theirs = processor(tmp_path, {"image_processor_type": "SiglipImageProcessor", **means, **settings})
    side = settings["size"]["height"]
    size = SquareSizeConfig(rule="square", side=side, filter=filter)
    count = side // patch
    for width, height in SIZES:
        pixels = theirs(picture(width, height), return_tensors="np")["pixel_values"][0]
        whole = pixels[:, : count * patch, : count * patch].reshape(3, count, patch, count, patch)
        expected = whole.transpose(1, 3, 0, 2, 4).reshape(count * count, -1)
        patches, grid = patches_of(picture(width, height), size, SiglipFormat(patch))
        assert grid.tolist() == [1, count, count]
        np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-5, err_msg=f"{width}x{height}")


@pytest.mark.parametrize("budget", [1, 64, 256, 1024])
def test_siglip2_naflex(budget, tmp_path):
    """The processor's patches are (row, column, channel), ours (channel, row, column). Measured difference: 1.2e-7."""
    settings = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": budget, "patch_size": 16}
    theirs = processor(tmp_path, settings)
    size = PatchBudgetConfig(rule="max_patches", max_patches=budget)
    for width, height in SIZES:
        expected = theirs(picture(width, height), return_tensors="np")
        rows, columns = expected["spatial_shapes"][0]
        patches, grid = patches_of(picture(width, height), size, SiglipFormat(16))
        assert grid.tolist() == [1, rows, columns], f"{width}x{height}"
        assert expected["pixel_attention_mask"].sum() == len(patches) or rows * columns > budget
        wanted = expected["pixel_values"][0, : rows * columns].reshape(-1, 256, 3).transpose(0, 2, 1)
        np.testing.assert_allclose(patches, wanted.reshape(len(patches), -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [14, 16])
def test_siglip2_naflex_sizes(patch):
    """Of sizes drawn at random, without pixels."""
    rng = np.random.default_rng(1)
    sizes = np.exp(rng.uniform(0, np.log(5000), (1000, 2))).astype(int).tolist()
    for (width, height), budget in zip(sizes, rng.integers(1, 1500, 1000).tolist(), strict=True):
        expected = get_image_size_for_max_num_patches(height, width, patch, budget)
        got = target_size(width, height, PatchBudgetConfig(rule="max_patches", max_patches=budget), patch)
        assert got == expected[::-1], f"{width}x{height}, {budget}"


BUCKETS = BucketSizeConfig(rule="buckets", sizes=[(512, 512), (672, 384), (384, 672), (768, 352)])


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (100, 100, (512, 512)),
        (1920, 1080, (672, 384)),
        (1080, 1920, (384, 672)),
        (4000, 1000, (768, 352)),
        (132, 100, (512, 512)),  # 1.32 is nearer to 1 than to 1.75, by factor
        (133, 100, (672, 384)),
    ],
)
def test_nearest_bucket(width, height, expected):
    assert nearest_bucket(width, height, BUCKETS.sizes) == expected


@pytest.mark.parametrize(("width", "height"), [(100, 100), (1920, 1080), (3, 500), (500, 3), (1, 1), (101, 77)])
@pytest.mark.parametrize("target", [(512, 512), (672, 384), (384, 672), (700, 7)])
def test_crop_box(width, height, target):
    """As large as fits, of the target's aspect ratio to a pixel, centred to half a pixel."""
    left, top, right, bottom = crop_box(width, height, *target)
    cut_width, cut_height = right - left, bottom - top
    assert cut_width == width or cut_height == height
    assert abs(cut_width - cut_height * target[0] / target[1]) <= max(1, target[0] / target[1])
    assert 0 <= (width - right) - left <= 1
    assert 0 <= (height - bottom) - top <= 1


def test_buckets_are_whole_visual_tokens():
    check_size(BUCKETS, 32, "data.generation_size")
    with pytest.raises(ConfigError) as caught:
        check_size(BUCKETS, 28, "data.generation_size")
    assert str(caught.value) == (
        "data.generation_size.sizes: 512x512, 672x384, 384x672, 768x352: sides must be multiples of 28 pixels, the "
        "side of a visual token"
    )


def test_kinds_in_a_recipe():
    """A long side needs no kind, as it always was; of the others the kind is written."""
    parse = TypeAdapter(ImageSize).validate_python
    assert parse({"min_side": 56, "max_side": 1024}) == ImageSizeConfig(min_side=56, max_side=1024)
    for size in (BUCKETS, PixelSizeConfig(rule="pixels"), PatchBudgetConfig(rule="max_patches")):
        assert parse(size) == size
        assert parse(size.model_dump()) == size
    with pytest.raises(ValidationError, match="'long_side', 'pixels', 'square', 'max_patches', 'buckets'"):
        parse({"rule": "round", "side": 3})
    with pytest.raises(ValidationError, match="min_pixels 5 is larger than max_pixels 4"):
        parse({"rule": "pixels", "min_pixels": 5, "max_pixels": 4})
    with pytest.raises(ValidationError, match="0x5 has no pixels"):
        parse({"rule": "buckets", "sizes": [[0, 5]]})
