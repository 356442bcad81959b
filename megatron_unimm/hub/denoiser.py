"""A diffusion transformer that sees the pictures before, on the blocks of diffusers' SD3Transformer2DModel and
FluxTransformer2DModel.

Their own forward draws a picture from its condition. It has one timestep for everything, so it cannot show a picture
those before it, which are clean; the blocks run here with a conditioning vector for each frame.

Legend  n frames, V condition tokens, U image tokens, t = V + U; N heads, D head size, H hidden size, C width of the
        condition, F values of a patch of latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig, Sd3Config
from megatron_unimm.hub.order import product
from megatron_unimm.models.mmdit.embedding import TIMESTEP_SCALE, sinusoid
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.mmdit.positions import flux_positions, table_index
from megatron_unimm.models.mmdit.rotary import axes_angles, rotate_pairs

Transformer = SD3Transformer2DModel | FluxTransformer2DModel
NORM_EPSILON = 1e-6
Segments = list[tuple[Tensor, Tensor]]
"""Queries and the keys that they see, int64 each."""


@dataclass(frozen=True)
class FrameRow:
    """Frames of conversations one behind the other, [text | image]. Those with a condition are drawn; the others are
    there clean (``models/mmdit/visibility.py``)."""

    frames: Frames
    text_frame: Tensor
    """int64 ``[V]``: the frame of each token."""
    image_frame: Tensor
    """int64 ``[U]``."""
    joint: Segments
    image: Segments
    """The same inside the image stream, for SD3.5's second attention."""
    position_index: Tensor | None = None
    """int64 ``[U]``: rows of SD3's table."""
    cos: Tensor | None = None
    """``[t, D / 2]`` of FLUX's rotary angles."""
    sin: Tensor | None = None

    @classmethod
    def build(cls, frames: Frames, model: ImageGeneratorConfig, device: torch.device) -> "FrameRow":
        """From numbers on the host."""
        text, image = (np.repeat(np.arange(len(frames)), counts) for counts in (frames.num_condition, frames.counts))
        joint, inside = _segments(frames)
        grids = [(int(rows), int(columns)) for rows, columns in frames.sizes]
        fields: dict[str, Tensor] = {}
        if isinstance(model.mmdit, Sd3Config):
            found = [table_index(rows, columns, model.mmdit.position_grid) for rows, columns in grids]
            fields["position_index"] = torch.from_numpy(np.concatenate(found)).to(device)
        else:
            assert isinstance(model.mmdit, FluxConfig)
            angles = _angles(model.mmdit, frames, np.concatenate([text, image]), grids, device)
            fields |= {"cos": angles.cos(), "sin": angles.sin()}
        return cls(
            frames=frames,
            text_frame=torch.from_numpy(text).to(device),
            image_frame=torch.from_numpy(image).to(device),
            joint=_on(joint, device),
            image=_on(inside, device),
            **fields,
        )


def _segments(frames: Frames) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
    """Joint and inside the image stream: a frame sees itself, and the clean ones before it in its sample."""
    num_text = int(frames.num_condition.sum())
    conditions = [np.arange(*pair) for pair in pairwise(np.cumsum([0, *frames.num_condition]).tolist())]
    pictures = [np.arange(*pair) for pair in pairwise(np.cumsum([0, *frames.counts]).tolist())]
    joint, inside = [], []
    for this in range(len(frames)):
        before = np.flatnonzero(
            (frames.sample == frames.sample[this]) & frames.is_clean & (frames.number < frames.number[this])
        )
        seen = [pictures[other] for other in before]
        own = [conditions[this], pictures[this] + num_text]
        joint.append((np.concatenate(own), np.concatenate([*(index + num_text for index in seen), *own])))
        inside.append((pictures[this], np.concatenate([*seen, pictures[this]])))
    return joint, inside


def _angles(
    model: FluxConfig,
    frames: Frames,
    frame_of_token: np.ndarray,
    grids: Sequence[tuple[int, int]],
    device: torch.device,
) -> Tensor:
    """Of all tokens: their frame's number, row and column (zeros for conditions)."""
    positions = np.zeros((3, len(frame_of_token)), dtype=np.int64)
    patches = np.concatenate([flux_positions(rows, columns) for rows, columns in grids], axis=1)
    positions[:, len(frame_of_token) - patches.shape[1] :] = patches
    positions[0] = frames.number[frame_of_token]
    return axes_angles(torch.from_numpy(positions).to(device), model.rotary_axes, model.rotary_theta)


def _on(segments: Sequence[tuple[np.ndarray, np.ndarray]], device: torch.device) -> Segments:
    return [(torch.from_numpy(queries).to(device), torch.from_numpy(keys).to(device)) for queries, keys in segments]


class Denoiser:
    """The velocity of frames.

    Args:
        frame_embedding: ``[frames, H]``, added to the tokens of each frame by its number (SD3).
        guidance: scale that a guidance-distilled model (FLUX.1-dev) is told.
    """

    def __init__(
        self,
        transformer: Transformer,
        model: ImageGeneratorConfig,
        frame_embedding: Tensor | None,
        guidance: float,
    ) -> None:
        self.transformer = transformer
        self.model = model
        self.frame_embedding = frame_embedding
        self.guidance = guidance

    def __call__(
        self, row: FrameRow, condition_VC: Tensor, pooled: Tensor, patches_UF: Tensor, timestep_n: Tensor
    ) -> Tensor:
        """``[U, F]``; a patch is (channel, row, column).

        Args:
            pooled: the pooled condition of each frame ``[n, P]``, or of all ``[P]``.
            timestep_n: float32 in [0, 1], 1 is noise; 0 where the frame is clean.
        """
        net: Any = self.transformer
        activated = F.silu(self._vectors(timestep_n, pooled))  # [n, H]
        text, image = net.context_embedder(condition_VC), self._embed(patches_UF, row)  # [V, H], [U, H]
        for block in net.transformer_blocks:
            text, image = joint_block(block, text, image, activated, row)
        if isinstance(self.model.mmdit, FluxConfig):
            both, frame = torch.cat([text, image]), torch.cat([row.text_frame, row.image_frame])
            for block in net.single_transformer_blocks:
                both = single_block(block, both, activated, frame, row)
            image = both[len(text) :]
        scale, shift = product(net.norm_out.linear, activated).chunk(2, dim=-1)
        velocity = net.proj_out(_modulated(_norm(image), shift, scale, row.image_frame))
        return velocity if isinstance(self.model.mmdit, FluxConfig) else self._channels_first(velocity)

    def _vectors(self, timestep_n: Tensor, pooled: Tensor) -> Tensor:
        """What modulates the blocks, of each frame."""
        embed: Any = self.transformer.time_text_embed
        dtype = pooled.dtype
        vectors = embed.timestep_embedder(sinusoid(timestep_n * TIMESTEP_SCALE).to(dtype))
        if self.model.mmdit.guidance:
            guidance = torch.full_like(timestep_n, self.guidance)
            vectors = vectors + embed.guidance_embedder(sinusoid(guidance * TIMESTEP_SCALE).to(dtype))
        return vectors + embed.text_embedder(pooled.expand(len(timestep_n), -1))

    def _embed(self, patches_UF: Tensor, row: FrameRow) -> Tensor:
        net: Any = self.transformer
        if isinstance(self.model.mmdit, FluxConfig):
            return net.x_embedder(patches_UF)
        assert row.position_index is not None
        assert self.frame_embedding is not None
        convolution, table = net.pos_embed.proj, net.pos_embed.pos_embed[0]
        hidden = F.linear(patches_UF, convolution.weight.flatten(1), convolution.bias)
        hidden = hidden + table.index_select(0, row.position_index).to(hidden.dtype)
        number = torch.from_numpy(row.frames.number).to(hidden.device)[row.image_frame]
        return hidden + self.frame_embedding.index_select(0, number)

    def _channels_first(self, velocity_UF: Tensor) -> Tensor:
        """SD3 of diffusers gives a patch as (row, column, channel)."""
        side = self.model.mmdit.patch_size
        return velocity_UF.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2).flatten(1)


def joint_block(block: Any, text: Tensor, image: Tensor, activated_nH: Tensor, row: FrameRow) -> tuple[Tensor, Tensor]:
    """Two streams, ``[V, H]`` and ``[U, H]``, with one attention over both (``models/mmdit/blocks.py``). SD3's last
    block leaves the text as it is."""
    ends, with_dual = _variant(block)
    attention = block.attn
    on_text = product(block.norm1_context.linear, activated_nH).chunk(2 if ends else 6, dim=-1)
    on_image = product(block.norm1.linear, activated_nH).chunk(9 if with_dual else 6, dim=-1)
    shift, scale = on_text[::-1] if ends else on_text[:2]  # see models/mmdit/blocks.py
    normed = _norm(image)
    of_text = _heads(
        (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj),
        (attention.norm_added_q, attention.norm_added_k),
        attention.heads,
        _modulated(_norm(text), shift, scale, row.text_frame),
    )
    of_image = _own_heads(attention, _modulated(normed, on_image[0], on_image[1], row.image_frame))
    query, key, value = (torch.cat(pair) for pair in zip(of_text, of_image, strict=True))
    attended = _attend(query, key, value, row.joint, row)
    to_text, to_image = attended.split([len(text), len(image)])
    image = _gated(image, product(attention.to_out[0], to_image), on_image[2], row.image_frame)
    if with_dual:
        inside = _own_heads(block.attn2, _modulated(normed, on_image[6], on_image[7], row.image_frame))
        update = product(block.attn2.to_out[0], _attend(*inside, row.image, row))
        image = _gated(image, update, on_image[8], row.image_frame)
    image = _grown(block.ff, image, on_image, row.image_frame)
    if not ends:
        text = _gated(text, product(attention.to_add_out, to_text), on_text[2], row.text_frame)
        text = _grown(block.ff_context, text, on_text, row.text_frame)
    return text, image


def single_block(block: Any, both: Tensor, activated_nH: Tensor, frame: Tensor, row: FrameRow) -> Tensor:
    """FLUX's second kind: ``[t, H]`` of both streams, attention and MLP side by side."""
    shift, scale, gate = product(block.norm.linear, activated_nH).chunk(3, dim=-1)
    hidden = _modulated(_norm(both), shift, scale, frame)
    attended = _attend(*_own_heads(block.attn, hidden), row.joint, row)
    grown = F.gelu(product(block.proj_mlp, hidden), approximate="tanh")
    return _gated(both, product(block.proj_out, torch.cat([attended, grown], dim=-1)), gate, frame)


def _variant(block: object) -> tuple[bool, bool]:
    """Whether the text ends in a block, and whether the image has a second attention: SD3 only."""
    if not isinstance(block, JointTransformerBlock):
        return False, False
    return bool(block.context_pre_only), bool(block.use_dual_attention)


def _grown(mlp: Any, hidden: Tensor, on: Sequence[Tensor], frame: Tensor) -> Tensor:
    """Through a stream's MLP."""
    wide = F.gelu(product(mlp.net[0].proj, _modulated(_norm(hidden), on[3], on[4], frame)), approximate="tanh")
    return _gated(hidden, product(mlp.net[2], wide), on[5], frame)


def _own_heads(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    linears = (attention.to_q, attention.to_k, attention.to_v)
    return _heads(linears, (attention.norm_q, attention.norm_k), attention.heads, hidden)


def _heads(
    linears: Sequence[nn.Linear], norms: Sequence[Any], num_heads: int, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[., N, D]``."""
    query, key, value = (product(linear, hidden).unflatten(1, (num_heads, -1)) for linear in linears)
    query, key = (
        heads if norm is None else F.rms_norm(heads, heads.shape[-1:], norm.weight, norm.eps)
        for heads, norm in zip((query, key), norms, strict=True)
    )
    return query, key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, row: FrameRow) -> Tensor:
    """``[t, N, D]`` to ``[t, N D]``."""
    if row.cos is not None and row.sin is not None:
        query, key = rotate_pairs(query, row.cos, row.sin), rotate_pairs(key, row.cos, row.sin)
    attended = torch.zeros_like(query)
    for queries, keys in segments:
        q, k, v = query[queries], key[keys], value[keys]
        q, k, v = (heads.transpose(0, 1)[None] for heads in (q, k, v))  # [1, N, ., D]
        attended.index_copy_(0, queries, F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return attended.flatten(1)


def _norm(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPSILON)


def _modulated(normed: Tensor, shift_nH: Tensor, scale_nH: Tensor, frame: Tensor) -> Tensor:
    return torch.addcmul(shift_nH[frame] + normed, normed, scale_nH[frame])


def _gated(residual: Tensor, update: Tensor, gate_nH: Tensor, frame: Tensor) -> Tensor:
    return torch.addcmul(residual, update, gate_nH[frame])
