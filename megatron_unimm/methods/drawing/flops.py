"""Model FLOPs of a diffusion transformer that learns to draw: what is counted and how is said in ``models/flops.py``.

Legend  T tokens of the row (padding included), T_image of its image stream, T_text of its text stream, n pictures, H
hidden size, D head size, C width of the condition, P of the pooled one, F values of a patch of latents, m hidden width
and X width of the cross attention of SANA.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_unimm.config.methods import RepresentationAlignmentConfig
from megatron_unimm.config.mmdit import FluxConfig, MMDiT, SanaConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.flops import Work, vision_work
from megatron_unimm.models.mmdit.embedding import NUM_FREQUENCIES
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.trainable import is_frozen


@dataclass(frozen=True)
class MMDiTLoad:
    """What a row, or a part of one, asks of the diffusion transformer."""

    num_text: int
    num_image: int
    num_pictures: int
    joint_pairs: float
    """(query, key) pairs of the joint attention: Σ (V + U)² over pictures."""
    image_pairs: float
    """Of the image's attention to itself: Σ U²."""
    cross_pairs: float
    """Of the image's attention to its condition: Σ V U."""
    drawn: float
    """Image tokens without padding, which linear attention sums over: Σ U."""


def mmdit_cost(load: MMDiTLoad, stage: StageConfig, *before: str) -> float:
    """Embeddings, each by what can train before it, and all that follows them.

    Patches 2 T_image F H; condition 2 T_text C H; per picture the timestep's vector 2 · 256 H + 2 H² (the guidance
    scale's again), and the pooled condition's 2 P H + 2 H². SANA has two layers for the condition, 2 T_text H² more, no
    pooled one, and makes 6 more of the timestep's vector, 2 · 6 H².

    Args:
        before: the parts that make the condition.
    """
    assert stage.generator is not None
    mmdit, rules = stage.generator.mmdit, stage.train.trainable
    trains, condition_trains = not is_frozen("mmdit", rules), not all(is_frozen(part, rules) for part in before)
    entry = sum(work.cost(*gradient) for work, gradient in entry_works(mmdit, load, trains, condition_trains))
    return entry + mmdit_work(mmdit, load).cost(trains, trains or condition_trains)


def entry_works(
    mmdit: MMDiT, load: MMDiTLoad, trains: bool, condition_trains: bool
) -> list[tuple[Work, tuple[bool, bool]]]:
    """What enters the blocks, each part with (its weights train, a gradient passes through)."""
    hidden, count = mmdit.hidden_size, float(load.num_pictures)
    sinusoids = count * (1 + mmdit.guidance)
    data = Work(2 * hidden * (load.num_image * float(mmdit.patch_dim) + sinusoids * 2 * NUM_FREQUENCIES))
    condition = Work(2 * hidden * (load.num_text * float(mmdit.condition_size) + count * mmdit.pooled_size))
    behind_data, behind_condition = Work(2 * sinusoids * hidden**2), Work(2 * count * hidden**2)
    if isinstance(mmdit, SanaConfig):
        behind_data, behind_condition = Work(2 * count * 7 * hidden**2), Work(2 * load.num_text * float(hidden**2))
    return [
        (data, (trains, False)),
        (behind_data, (trains, trains)),
        (condition, (trains, condition_trains)),
        (behind_condition, (trains, trains or condition_trains)),
    ]


def mmdit_work(mmdit: MMDiT, load: MMDiTLoad) -> Work:
    """The blocks and the end: 2 · 2 H² per picture and 2 T_image H F."""
    return blocks_work(mmdit, load, range(mmdit.num_blocks)) + end_work(mmdit, load)


def blocks_work(mmdit: MMDiT, load: MMDiTLoad, layers: range) -> Work:
    """Blocks ``layers`` (zero-based).

    Joint block: per token QKV 2 · 3 H², output 2 H², MLP 2 · 8 H²; attention 4 pairs H; per picture and stream a
    modulation 2 · 6 H². SD3's last block takes only QKV from the text, whose modulation is 2 · 2 H². A second attention
    has QKV, output and pairs of the image alone, and adds 2 · 3 H² to its modulation. Single block: per token the same
    2 · 12 H², and per picture 2 · 3 H².

    SANA: per image token QKV and output 2 · 4 H², the cross attention's query and output 2 · 2 H X and 2 · 3 m H, per
    text token key and value 2 · 2 H X; linear attention makes and reads a matrix of D (D + 1) per head, 4 ΣU H (D + 1),
    and the cross attention is 4 pairs X. The convolution's 9 multiplications per channel are left out.
    """
    if isinstance(mmdit, SanaConfig):
        return _sana_block_work(mmdit, load).times(len(layers))
    square, hidden, count = 2.0 * mmdit.hidden_size**2, mmdit.hidden_size, load.num_pictures
    block = Work(12 * square * (load.num_text + load.num_image), 4 * load.joint_pairs * hidden)
    joint = block + Work(12 * square * count)
    if isinstance(mmdit, FluxConfig):
        single = block + Work(3 * square * count)
        num_joint = len([number for number in layers if number < mmdit.num_layers])
        return joint.times(num_joint) + single.times(len(layers) - num_joint)
    second = Work(square * (4 * load.num_image + 3 * count), 4 * load.image_pairs * hidden)
    last_text = Work(-square * (9 * load.num_text + 4 * count))
    num_second = len([number for number in layers if number in mmdit.dual_attention_layers])
    return joint.times(len(layers)) + second.times(num_second) + last_text.times(int(mmdit.num_layers - 1 in layers))


def _sana_block_work(model: SanaConfig, load: MMDiTLoad) -> Work:
    hidden, cross = float(model.hidden_size), float(model.cross_size)
    image = load.num_image * hidden * (4 * hidden + 2 * cross + 3 * model.mlp_size)
    attention = 4 * load.drawn * hidden * (model.head_size + 1) + 4 * load.cross_pairs * cross
    return Work(2 * (image + load.num_text * hidden * 2 * cross), attention)


def end_work(mmdit: MMDiT, load: MMDiTLoad) -> Work:
    """The last modulation (SANA has a table), and the way to patches."""
    hidden = mmdit.hidden_size
    modulation = 0.0 if isinstance(mmdit, SanaConfig) else 4.0 * hidden**2 * load.num_pictures
    return Work(modulation + 2.0 * load.num_image * hidden * mmdit.patch_dim)


def mlp_share(mmdit: MMDiT) -> float:
    """Of a block's products, those of its MLP, about: 8 of 12 H²; SANA's 3 m of 4 H + 2 X + 3 m."""
    if not isinstance(mmdit, SanaConfig):
        return 8 / 12
    return 3 * mmdit.mlp_size / (4 * mmdit.hidden_size + 2 * mmdit.cross_size + 3 * mmdit.mlp_size)


def frames_load(num_text: int, num_image: int, frames: Frames) -> MMDiTLoad:
    """What frames in streams of so many tokens ask."""
    return MMDiTLoad(num_text, num_image, len(frames), *_pairs(frames))


def _pairs(frames: Frames) -> tuple[float, float, float, float]:
    """(query, key) pairs of the block-causal attention, of both streams and of the image's alone: a clean frame sees
    itself and the clean ones before, a noisy one with its condition itself, the same, and the shared conditions
    before. Then those of images with their conditions, and the image tokens."""
    joint = image = 0.0
    tokens = frames.counts.astype(np.float64)
    shared = np.zeros(len(frames)) if frames.num_shared is None else frames.num_shared
    for place in range(len(frames)):
        before = (frames.sample == frames.sample[place]) & (frames.number < frames.number[place])
        seen, condition = float(tokens[before & frames.is_clean].sum()), float(frames.num_condition[place])
        beside = 0.0 if frames.is_clean[place] else float(shared[before].sum())
        joint += (tokens[place] + condition) * (tokens[place] + condition + seen + beside)
        image += tokens[place] * (tokens[place] + seen)
    return joint, image, float((tokens * frames.num_condition).sum()), float(tokens.sum())


def alignment_works(
    num_tokens: int, grids: np.ndarray, stage: StageConfig, alignment: RepresentationAlignmentConfig
) -> tuple[Work, Work]:
    """The projector on so many image tokens, 2 (H P + P² + P F) each, and a frozen vision encoder on pictures of patch
    grids ``[n, 3]``."""
    encoder, inner = stage.model.vision_encoder, alignment.projector_size
    assert stage.generator is not None
    projector = Work(2.0 * num_tokens * inner * (stage.generator.mmdit.hidden_size + inner + encoder.out_size))
    if stage.data.feature_cache:  # Computed beforehand.
        return projector, Work(0.0)
    embedding, rest = vision_work(encoder, grids)
    return projector, embedding + rest


def alignment_flops(
    num_tokens: int,
    grids: np.ndarray,
    stage: StageConfig,
    alignment: RepresentationAlignmentConfig,
    condition: Sequence[str],
) -> float:
    """Of the alignment loss, forward and backward.

    Args:
        condition: parts that make the condition, to which a gradient passes where they train.
    """
    projector, tower = alignment_works(num_tokens, grids, stage, alignment)
    trains = not is_frozen("alignment_projector", stage.train.trainable)
    before = not all(is_frozen(part, stage.train.trainable) for part in ("mmdit", *condition))
    return projector.cost(trains, before) + tower.cost(trains=False, passes_gradient=False)
