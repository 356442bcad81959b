"""What methods have in common that draw the frames of conversations (``data/frames.py``) with a VLM beside."""

from pathlib import Path

import torch

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.frames import FrameRow
from megatron_unimm.data.packing import round_up
from megatron_unimm.data.sizes import smallest_area
from megatron_unimm.methods.drawing.method import floats, rows_between_stages, stored
from megatron_unimm.methods.drawing.model import PictureInput
from megatron_unimm.models.mmdit.canvas import Place, grids_of


def picture_input(row: FrameRow, place: Place) -> PictureInput:
    """A row's pictures, for the first and the last stage."""
    latents = None if row.latents is None else stored(row.latents, place)
    pixels = None if latents is not None else floats(row.pixels, place)
    token_of = torch.from_numpy(row.token_of).to(place.device, non_blocking=True)
    return PictureInput(pixels, latents, list(grids_of(row.pictures)), floats(row.noise, place), token_of)


def num_vectors(stage: StageConfig) -> int | None:
    """Conditioning vectors of a row that travels through a pipeline: as many as the smallest pictures, at all their
    scales, would need. None without a pipeline: as many as frames."""
    parallel, data, scales = stage.system.parallel, stage.data, stage.scales
    if parallel.pipeline == 1:
        return None
    assert data.drawing_size is not None
    assert stage.generator is not None
    finest = smallest_area(data.drawing_size, stage.generator.token_pixels)
    smallest = sum(max(1, int(finest * share * share)) for share in scales.shares)
    pictures = data.sequence_length // smallest + 1
    return round_up(pictures * len(scales.shares), parallel.tensor if parallel.sequence else 1)


def travelling_rows(stage: StageConfig) -> int:
    """As of all methods that draw."""
    return rows_between_stages(stage, num_vectors(stage))


def model_parts(stage: StageConfig) -> dict[str, Path]:
    """Where parts come from that the checkpoint of the stage before does not hold."""
    generator, base = Path(stage.generator_checkpoint), Path(stage.base_checkpoint)
    return {"mmdit": generator, "vae": generator, "vision_encoder": base, "backbone": base}
