"""Model FLOPs of the tokenizer's rows: what is counted and how is said in ``models/flops.py``.

Counted are the vision encoder (once, and once more on what was drawn where the perceptual loss looks at it), the layers
of the streams and the decoder, and the linear layers at their ends. Left out are convolutions, which are no matrix
products, as for a VAE.

Legend  V cells, H hidden size of a stream, F width of its MLP, D of a visual token, C channels of a latent.
"""

import numpy as np

from megatron_unimm.config.methods import SparTokenizerConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.config.tokenizer import StreamLayersConfig
from megatron_unimm.models.flops import Work, vision_work
from megatron_unimm.models.trainable import is_frozen


def row_flops(grids: np.ndarray, stage: StageConfig) -> float:
    """Model FLOPs of pictures of patch grids ``[n, 3]``, forward and backward, over all ranks that share them."""
    return sum(work.cost(*gradient) for work, gradient in works(grids, stage))


def sample_flops(grids: np.ndarray, stage: StageConfig) -> float:
    """What a sample costs: a row has nothing but samples."""
    return row_flops(grids, stage)


def works(grids: np.ndarray, stage: StageConfig) -> list[tuple[Work, tuple[bool, bool]]]:
    """Each part with (its weights train, a gradient passes through)."""
    assert isinstance(stage.method, SparTokenizerConfig)
    rules, encoder = stage.train.trainable, stage.model.vision_encoder
    sees, learns = not is_frozen("vision_encoder", rules), not is_frozen("tokenizer", rules)
    embedding, rest = vision_work(encoder, grids)
    found = [(embedding, (sees, False)), (rest, (sees, sees)), *tokenizer_works(grids, stage, sees, learns)]
    if sees:
        found.append((embedding + rest, (False, False)))  # as it was at first
    if stage.method.loss_weights.perceptual:
        found.append((embedding + rest, (False, learns)))
    return found


def tokenizer_works(
    grids: np.ndarray, stage: StageConfig, sees: bool, learns: bool
) -> list[tuple[Work, tuple[bool, bool]]]:
    """Streams: in 2 V D H, layers, out 2 V H D, and to latents 2 V D C. Decoder: 2 V C H, layers, and to places
    2 V H c s² / 4. Readout: 2 V C D + 2 V D D."""
    model, encoder = stage.tokenizer, stage.model.vision_encoder
    assert model is not None
    sizes = grids.prod(axis=1).astype(np.float64) / encoder.spatial_merge_size**2
    cells, width, channels = float(sizes.sum()), encoder.out_size, model.latent_channels
    semantic = layers_work(model.semantic, sizes)
    semantic += Work(2 * cells * width * (2 * model.semantic.hidden_size + channels))
    decoder = layers_work(model.decoder, sizes)
    places = model.decoder.channels * encoder.token_pixels**2 / 4
    decoder += Work(2 * cells * model.decoder.hidden_size * (channels + places))
    readout = Work(2 * cells * width * (channels + width))
    found = [(semantic, (learns, sees)), (decoder, (learns, learns)), (readout, (learns, learns))]
    if model.pixel is not None:
        taps = len(model.pixel.encoder_layers) * encoder.spatial_merge_size**2 * encoder.hidden_size
        pixels = Work(2 * cells * model.pixel.hidden_size * 3 * encoder.token_pixels**2)
        joined = Work(2 * cells * model.pixel.hidden_size * taps)
        rest = layers_work(model.pixel, sizes) + Work(2 * cells * model.pixel.hidden_size * channels)
        found += [(pixels, (learns, False)), (joined, (learns, sees)), (rest, (learns, learns))]
    return found


def layers_work(model: StreamLayersConfig, sizes: np.ndarray) -> Work:
    """Over pictures of ``sizes`` cells: per layer 2 V H 4 H, 4 · pairs · H and 2 V H F twice."""
    cells, hidden = float(sizes.sum()), model.hidden_size
    layer = Work(2 * cells * hidden * (4 * hidden + 2 * model.mlp_size), 4 * hidden * float((sizes**2).sum()))
    return layer.times(model.num_layers)
