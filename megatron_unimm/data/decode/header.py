"""What the header of an image tells before it is decoded: whether it may be used, and who can decode it."""

from dataclasses import dataclass

from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from megatron_unimm.data.decode.interface import ImageRequest
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import BytesImage, ImageFile
from megatron_unimm.data.images import exif_orientation, open_image

TAIL_BYTES = 64
"""How near to the end of a file its end marker must be; cameras pad files, cut downloads lack it."""


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image whose header was read."""

    data: bytes
    orientation: int
    """EXIF orientation, 1 for upright."""
    width: int
    """In pixels, as stored: before the orientation is applied."""
    height: int
    only_pillow: str
    """Why only Pillow decodes it right; empty where any decoder does."""


def read_encoded(file: ImageFile, max_pixels: int) -> EncodedImage | SampleError:
    """Reads a whole file and looks at its header; nothing is decoded.

    The answer is a SampleError where the file cannot be read, is no image of a known format, or has more than
    ``max_pixels`` pixels.
    """
    try:
        with file.open() as stream:
            data = stream.read()
    except OSError as error:
        return SampleError(str(file), f"is no readable image ({error})", "unreadable image")
    try:
        with open_image(BytesImage(data, file.name, str(file)), max_pixels) as image:
            width, height = image.size
            return EncodedImage(data, exif_orientation(image), width, height, _only_pillow(image, data))
    except SampleError as fault:
        return fault.with_traceback(None)


def in_memory(request: ImageRequest, encoded: EncodedImage) -> ImageFile:
    """The file of a request as the bytes that were read of it already."""
    return BytesImage(encoded.data, request.file.name, str(request.file))


def _only_pillow(image: Image.Image, data: bytes) -> str:
    """Baseline and progressive JPEG, RGB or grey, and 8-bit PNG without transparency decode alike everywhere. They are
    nearly all of the web's images; of the rest, formats and decoders each have their own idea."""
    tail = data[-TAIL_BYTES:]
    if image.format == "JPEG":
        if image.mode not in ("RGB", "L"):
            return f"JPEG of mode {image.mode}"
        return "" if b"\xff\xd9" in tail else "no end marker"
    if image.format == "PNG":
        bit_depth = data[24]
        if image.mode not in ("RGB", "L") or bit_depth != 8:
            return f"PNG of mode {image.mode} with {bit_depth} bits"
        if "transparency" in image.info:
            return "PNG with a transparent colour"
        if isinstance(image, PngImageFile) and image.is_animated:
            return "animated PNG"
        return "" if b"IEND" in tail else "no end marker"
    return f"format {image.format}"
