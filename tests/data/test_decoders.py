"""The decoders: Pillow equals the reference path, DALI equals Pillow, and no image can harm another."""

import io
import logging
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from whole_samples import load_patches

from megatron_unimm.config.data import PixelSizeConfig
from megatron_unimm.config.model import Qwen25VisionConfig, SiglipConfig
from megatron_unimm.data.decode.build import build_decoder
from megatron_unimm.data.decode.header import read_encoded
from megatron_unimm.data.decode.interface import Decoder, ImageRequest
from megatron_unimm.data.decode.pillow import PillowDecoder
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import BytesImage, DiskImage
from megatron_unimm.data.images import SiglipFormat, decode, patchify, resize
from megatron_unimm.errors import ConfigError

LIMIT = 1_000_000
EXIF_ORIENTATION = 0x0112
ENCODER = Qwen25VisionConfig(
    family="qwen2_5", num_layers=1, hidden_size=8, num_heads=1, mlp_size=8, out_size=8, patch_size=14
)
needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None, reason="DALI is not installed"
)


def dali(**options) -> Decoder:
    from megatron_unimm.data.decode.dali import DaliDecoder

    return DaliDecoder(max_pixels=LIMIT, threads=2, **options)


DECODERS: dict[str, Callable[[], Decoder]] = {
    "pillow": lambda: PillowDecoder(max_pixels=LIMIT, threads=2),
    "pillow_inline": lambda: PillowDecoder(max_pixels=LIMIT, threads=0),
    "dali": dali,
    "dali_graph": lambda: dali(resize_in_graph=True),  # as on the GPU
}


@pytest.fixture(params=[pytest.param(name, marks=needs_dali if "dali" in name else ()) for name in DECODERS])
def decoder(request) -> Iterator[Decoder]:
    with DECODERS[request.param]() as made:
        yield made


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with some grain, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    return Image.fromarray((smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> BytesImage:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return BytesImage(stream.getvalue(), f"a.{format.lower()}", f"memory:a.{format.lower()}")


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def png_of_16_bits() -> BytesImage:
    """RGB, which Pillow does not write: a ramp of 64 x 64 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    ramp = np.linspace(0, 65535, 64 * 64 * 3).astype(">u2").reshape(64, -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in ramp))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
    return BytesImage(content + chunk(b"IDAT", body) + chunk(b"IEND", b""), "a.png", "memory:a.png")


def animation(format: str, **options) -> BytesImage:
    return encoded(picture(80, 60, 1), format, save_all=True, append_images=[picture(80, 60, 2)], **options)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


KINDS: dict[str, Callable[[], BytesImage]] = {
    "jpeg": lambda: encoded(picture(200, 150), "JPEG", quality=90),
    "jpeg_444": lambda: encoded(picture(200, 150), "JPEG", subsampling=0),
    "jpeg_odd": lambda: encoded(picture(201, 133), "JPEG"),
    "jpeg_progressive": lambda: encoded(picture(200, 150), "JPEG", progressive=True),
    "jpeg_grey": lambda: encoded(picture(200, 150).convert("L"), "JPEG"),
    "jpeg_cmyk": lambda: encoded(picture(200, 150).convert("CMYK"), "JPEG"),
    "jpeg_rgb": lambda: encoded(picture(200, 150), "JPEG", keep_rgb=True),
    **{f"jpeg_exif{n}": lambda n=n: encoded(picture(200, 150), "JPEG", exif=oriented(n)) for n in (0, *range(1, 9), 9)},
    "png": lambda: encoded(picture(200, 150), "PNG"),
    "png_exif": lambda: encoded(picture(200, 150), "PNG", exif=oriented(6)),
    "png_grey": lambda: encoded(picture(200, 150).convert("L"), "PNG"),
    "png_alpha": lambda: encoded(with_alpha(picture(200, 150)), "PNG"),
    "png_grey_alpha": lambda: encoded(with_alpha(picture(200, 150)).convert("LA"), "PNG"),
    "png_palette": lambda: encoded(picture(200, 150).quantize(32), "PNG"),
    "png_palette_alpha": lambda: encoded(picture(200, 150).quantize(32), "PNG", transparency=3),
    "png_colour_key": lambda: encoded(Image.new("RGB", (200, 150), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    "png_bits": lambda: encoded(picture(200, 150).convert("1"), "PNG"),
    "png_grey16": lambda: encoded(
        Image.fromarray(np.arange(4096, dtype=np.uint16).repeat(16).reshape(256, 256) * 16), "PNG"
    ),
    "png_rgb16": png_of_16_bits,
    "png_animated": lambda: animation("PNG"),
    "gif": lambda: encoded(picture(200, 150), "GIF"),
    "gif_animated": lambda: animation("GIF"),
    "webp": lambda: encoded(picture(200, 150), "WEBP"),
    "webp_alpha": lambda: encoded(with_alpha(picture(200, 150)), "WEBP"),
    "webp_animated": lambda: animation("WEBP"),
    "bmp": lambda: encoded(picture(200, 150), "BMP"),
    "tiff": lambda: encoded(picture(200, 150), "TIFF"),
}


@pytest.fixture(scope="module")
def reference() -> Iterator[PillowDecoder]:
    with PillowDecoder(max_pixels=LIMIT, threads=2) as made:
        yield made


def test_every_kind_of_image(decoder, reference):
    """All in one batch, stretched, cropped, and with either filter.

    The mean difference is taken over an image; measured at most 0.25/255 with torch's resize and 0.21/255 with DALI's,
    in a pixel 2/255 and 3/255. Pillow's own decoder is exact. In how they decode they do not differ.
    """
    files = [make() for make in KINDS.values()]
    for crop in (False, True):
        for filter in ("bicubic", "bilinear"):
            requests = [ImageRequest(file, 168, 84, crop, filter) for file in files]
            for kind, expected, got in zip(KINDS, reference.pixels(requests), decoder.pixels(requests), strict=True):
                assert isinstance(expected, np.ndarray) and isinstance(got, np.ndarray)  # noqa: PT018
                assert got.shape == (84, 168, 3) and got.dtype == np.uint8  # noqa: PT018
                difference = np.abs(got.astype(int) - expected)
                limits = (0, 0) if isinstance(decoder, PillowDecoder) else (0.5, 3)
                assert difference.mean() <= limits[0], f"{kind}, {crop}, {filter}: {difference.mean()}"
                assert difference.max() <= limits[1], f"{kind}, {crop}, {filter}: {difference.max()}"


def test_decoding_alone_is_exact(decoder):
    """At an image's own size nothing is resized, and all bytes are Pillow's."""
    files = [make() for make in KINDS.values()]
    expected = [decode(file, LIMIT) for file in files]
    requests = [ImageRequest(f, e.shape[1], e.shape[0]) for f, e in zip(files, expected, strict=True)]
    for kind, want, got in zip(KINDS, expected, decoder.pixels(requests), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=kind)


def test_patches_are_those_of_the_reference(decoder):
    """Of images in one array, in the order of the requests; DALI within the rounding of pixels."""
    files = [KINDS[kind]() for kind in ("jpeg", "png_alpha", "jpeg_exif6")]
    sizes = [(112, 84), (56, 56), (84, 168)]
    grids = [np.array([1, height // 14, width // 14]) for width, height in sizes]
    rule = PixelSizeConfig(rule="pixels")
    requests = [ImageRequest.of_grid(file, grid, ENCODER, rule) for file, grid in zip(files, grids, strict=True)]
    assert [(request.width, request.height) for request in requests] == sizes
    loaded = decoder.load(requests, ENCODER)
    for file, grid, patches in zip(files, grids, loaded, strict=True):
        expected = load_patches(file, grid, ENCODER, LIMIT)
        assert isinstance(patches, np.ndarray) and patches.dtype == np.float32  # noqa: PT018
        exact = isinstance(decoder, PillowDecoder)
        np.testing.assert_allclose(patches, expected, rtol=0, atol=0 if exact else 3.1 / 255 / min(ENCODER.image_std))
        assert np.abs(patches - expected).mean() < 1 / 255
        assert patches.base is loaded[0].base


def test_siglip_patches(decoder):
    tower = SiglipConfig(family="siglip", num_layers=1, hidden_size=8, num_heads=1, mlp_size=8, patch_size=16)
    form = SiglipFormat.of(tower)
    (patches,) = decoder.load([ImageRequest(KINDS["png"](), 200, 150)], form)  # 8 and 6 pixels fill no patch
    assert patches.shape == (12 * 9, tower.patch_dim)
    np.testing.assert_array_equal(patches, patchify(decode(KINDS["png"](), LIMIT)[:144, :192], form)[0])


def test_crop_keeps_the_centre(decoder):
    """A wide image in three colours: of a square of it, only the middle one is left."""
    stripes = np.zeros((60, 180, 3), dtype=np.uint8)
    for part, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        stripes[:, 60 * part : 60 * part + 60] = colour
    (cropped,) = decoder.pixels([ImageRequest(encoded(Image.fromarray(stripes), "PNG"), 30, 30, crop=True)])
    np.testing.assert_array_equal(cropped, np.full((30, 30, 3), (0, 255, 0), dtype=np.uint8))


def broken_files() -> dict[str, BytesImage]:
    good = KINDS["jpeg"]().data
    end = good[-2:]
    return {
        "text": BytesImage(b"hello", "a.jpg", "memory:text"),
        "empty": BytesImage(b"", "a.jpg", "memory:empty"),
        "eps": BytesImage(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "a.jpg", "memory:eps"),
        "cut": BytesImage(good[: len(good) // 2], "a.jpg", "memory:cut"),
        "cut_png": BytesImage(KINDS["png"]().data[:3000], "a.png", "memory:cut_png"),
        # Cut, but with an end: only its decoding tells.
        "damaged_png": BytesImage(
            KINDS["png"]().data[:3000] + KINDS["png"]().data[-12:], "a.png", "memory:damaged_png"
        ),
        "headers_only": BytesImage(good[:400] + end, "a.jpg", "memory:headers_only"),
    }


def test_one_bad_image_harms_no_other(decoder, reference, tmp_path, caplog):
    """Whatever is wrong, the answer is the same from all decoders, and the next batch is none the worse."""
    bad = broken_files()
    good = [KINDS["jpeg"](), KINDS["png"](), KINDS["jpeg_cmyk"]()]
    large = encoded(Image.new("L", (1001, 1000)), "JPEG")
    files = [good[0], *bad.values(), good[1], large, DiskImage(tmp_path / "absent.jpg"), good[2]]
    requests = [ImageRequest(file, 84, 84) for file in files]
    with caplog.at_level(logging.ERROR):
        answers, expected = decoder.pixels(requests), reference.pixels(requests)
    for want, got in zip(expected, answers, strict=True):
        assert isinstance(got, SampleError) == isinstance(want, SampleError)
        if isinstance(got, SampleError):
            assert (str(got), got.fault) == (str(want), want.fault)
    assert [isinstance(got, np.ndarray) for got in answers].count(True) == len(good)
    faults = {str(answer.where): answer.fault for answer in answers if isinstance(answer, SampleError)}
    assert faults.pop(str(large)) == "image too large"
    assert set(faults.values()) == {"unreadable image"}
    again = decoder.pixels([ImageRequest(file, 84, 84) for file in good])
    for got, file in zip(again, good, strict=True):
        assert np.abs(got.astype(int) - resize(decode(file, LIMIT), 84, 84)).max() <= 2


@needs_dali
def test_a_failing_batch_is_done_with_pillow(reference, caplog):
    """DALI gives up on a damaged image that looks whole; its batch comes from Pillow, the next from DALI again."""
    files = [KINDS["jpeg"](), broken_files()["damaged_png"], KINDS["png"]()]
    requests = [ImageRequest(file, 84, 84) for file in files]
    with dali() as decoder:
        assert not read_encoded(files[1], LIMIT).only_pillow
        answers = decoder.pixels(requests)
        decoder.pixels(requests)
        assert decoder.num_failures == 2
        decoder.pixels(requests[:1])
        assert decoder.num_failures == 2
    expected = reference.pixels(requests)
    np.testing.assert_array_equal(answers[0], expected[0])
    np.testing.assert_array_equal(answers[2], expected[2])
    assert isinstance(answers[1], SampleError)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "DALI failed on a batch of 3 images from memory:a.jpeg on" in messages[0]
    assert "\n" not in messages[0]


@needs_dali
def test_another_size_than_the_header_tells(reference, monkeypatch):
    """What DALI decodes then is not the picture that was planned; Pillow does it."""
    request = ImageRequest(KINDS["jpeg"](), 84, 84)
    with dali() as decoder:
        monkeypatch.setattr(decoder, "_decode", lambda *_: [np.zeros((20, 30, 3), dtype=np.uint8)])
        np.testing.assert_array_equal(decoder.pixels([request])[0], reference.pixels([request])[0])


@needs_dali
def test_what_dali_decodes():
    """Photographs and drawings go to DALI; what it would decode differently does not."""
    for_pillow = {kind for kind, make in KINDS.items() if read_encoded(make(), LIMIT).only_pillow}
    assert set(KINDS) - for_pillow == {
        *("jpeg", "jpeg_444", "jpeg_odd", "jpeg_progressive", "jpeg_grey", "jpeg_rgb"),
        *(f"jpeg_exif{n}" for n in range(10)),
        *("png", "png_exif", "png_grey"),
    }


@needs_dali
def test_large_batches_are_divided(reference, monkeypatch):
    """By number and by pixels, so that DALI's buffers stay bounded; the order is kept."""
    monkeypatch.setattr("megatron_unimm.data.decode.dali.MAX_BATCH_PIXELS", 50_000)
    monkeypatch.setattr("megatron_unimm.data.decode.dali.MAX_BATCH", 3)
    files = [encoded(picture(*size, seed), "JPEG") for seed, size in enumerate([(200, 150)] * 3 + [(60, 40)] * 8)]
    requests = [ImageRequest(file, 56, 28) for file in files]
    with dali() as decoder:
        for want, got in zip(reference.pixels(requests), decoder.pixels(requests), strict=True):
            assert np.abs(got.astype(int) - want).max() <= 2


def test_no_images(decoder):
    assert decoder.load([], ENCODER) == []
    assert decoder.pixels([]) == []


def test_several_threads_may_ask(decoder):
    files = [encoded(picture(90, 60, seed), "JPEG") for seed in range(6)]
    alone = [decoder.pixels([ImageRequest(file, 56, 56)])[0] for file in files]
    answers: dict[int, np.ndarray] = {}

    def ask(index: int) -> None:
        (answers[index],) = decoder.pixels([ImageRequest(files[index], 56, 56)])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(files))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        np.testing.assert_array_equal(answers[index], expected)


def test_the_config_chooses(monkeypatch):
    with build_decoder("pillow", max_pixels=LIMIT, threads=1) as made:
        assert isinstance(made, PillowDecoder)
    for name in [name for name in sys.modules if name == "nvidia" or name.startswith("nvidia.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("megatron_unimm.data.decode.build.find_spec", lambda _: None)
    with build_decoder("auto", max_pixels=LIMIT, threads=1) as made:
        assert isinstance(made, PillowDecoder)
    with pytest.raises(ConfigError) as caught:
        build_decoder("dali", max_pixels=LIMIT, threads=1)
    assert str(caught.value) == (
        "data.decoder: DALI is not installed; pip install 'megatron_unimm[dali]', or set it to pillow or auto"
    )


@needs_dali
@pytest.mark.parametrize("kind", ["auto", "dali"])
def test_dali_is_taken_where_it_is_installed(kind):
    with build_decoder(kind, max_pixels=LIMIT, threads=1) as made:
        assert type(made).__name__ == "DaliDecoder"
