"""Chooses the decoder that a config names."""

from importlib.util import find_spec

from megatron_unimm.config.data import DecoderKind
from megatron_unimm.data.decode.interface import Decoder
from megatron_unimm.data.decode.pillow import PillowDecoder
from megatron_unimm.errors import ConfigError


def build_decoder(kind: DecoderKind, *, max_pixels: int, threads: int, device: int | None = None) -> Decoder:
    """The decoder of ``data.decoder``.

    Args:
        max_pixels: larger images are refused before decoding.
        threads: threads that decode, 0 for the caller's own.
        device: number of the GPU that DALI decodes on; without one, it decodes on the CPU.

    Raises:
        ConfigError: DALI is asked for and not installed.
    """
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if kind == "dali" and not installed:
        what = "DALI is not installed; pip install 'megatron_unimm[dali]', or set it to pillow or auto"
        raise ConfigError("data.decoder", what)
    if kind == "pillow" or not installed:
        return PillowDecoder(max_pixels=max_pixels, threads=threads)
    # The one import of the optional package: not before it is known to be there.
    from megatron_unimm.data.decode.dali import DaliDecoder

    return DaliDecoder(max_pixels=max_pixels, threads=threads, device=device)
