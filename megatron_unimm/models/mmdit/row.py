"""What all layers of a diffusion transformer share about a row: where its two streams lie, and which vector each token
goes by.

A row has the text stream of all its pictures in front and their image stream behind. Context parallelism gives each
rank a slice of both, sequence parallelism cuts that again:

    row, T tokens                       [ text ················ | image ······························ ]
    context rank 0 of 2, t tokens       [ text ········ | image ··············· ]
    its tensor rank 1 of 2, s tokens    [ ···· | ······· ]              what layers hand on, ``[s, 1, H]``
"""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_unimm.models.mmdit.attention import JointContext
from megatron_unimm.models.mmdit.modulation import VectorOfToken
from megatron_unimm.models.mmdit.pictures import PictureBatches
from megatron_unimm.models.mmdit.visibility import TokenTable, local_index


@dataclass
class MMDiTRow(PackedSeqParams):
    """Handed from Megatron-Core's block to every layer untouched."""

    qkv_format: str = "thd"
    joint: JointContext | None = None
    """What sees what, and rotary positions of this context rank's t tokens."""
    num_text: int = 0
    """Text tokens among this rank's s."""
    num_vectors: int = 0
    """Conditioning vectors of the row, n."""
    text_vectors: VectorOfToken | None = None
    """Of this rank's text tokens."""
    image_vectors: VectorOfToken | None = None
    """Of its image tokens."""
    all_vectors: VectorOfToken | None = None
    """Of both."""
    stream_order: Tensor | None = None
    """int64 ``[t]``: brings tokens as tensor-parallel ranks gather them (text, image, text, image) into streams; None
    where they come so."""
    gathered_order: Tensor | None = None
    """int64 ``[t]``: its inverse."""
    pictures: PictureBatches | None = None
    """Which image tokens lie together, for layers that convolve over them (SANA)."""

    @classmethod
    def build(
        cls,
        table: TokenTable,
        vector_of_token: np.ndarray,
        num_vectors: int,
        joint: JointContext,
        device: torch.device,
        dtype: torch.dtype,
        *,
        context: tuple[int, int] = (0, 1),
        sequence: tuple[int, int] = (0, 1),
    ) -> "MMDiTRow":
        """The part of one rank.

        Args:
            table: the row's T tokens.
            vector_of_token: int64 ``[T]``.
            dtype: that layers compute in.
            context, sequence: (rank, size); a size of 1 where sequence parallelism is off.
        """
        (rank, size), (tensor_rank, tensor_size) = context, sequence
        mine = local_index(table, rank, size)  # [t]
        num_text = table.num_text // size
        assert num_text % tensor_size == 0, (num_text, tensor_size)
        assert (len(mine) - num_text) % tensor_size == 0, (len(mine) - num_text, tensor_size)
        text, image = np.split(vector_of_token[mine], [num_text])
        parts = [np.split(stream, tensor_size) for stream in (np.arange(num_text), np.arange(num_text, len(mine)))]
        gathered = np.concatenate([half for pair in zip(*parts, strict=True) for half in pair])  # [t]
        orders = (np.argsort(gathered), gathered) if tensor_size > 1 else (None, None)
        tensors = [None if values is None else torch.from_numpy(values).to(device) for values in orders]
        own = [np.split(stream, tensor_size)[tensor_rank] for stream in (text, image)]
        text_vectors, image_vectors, all_vectors = (
            VectorOfToken.build(index, num_vectors, device, dtype) for index in (*own, np.concatenate(own))
        )
        return cls(
            joint=joint,
            num_text=num_text // tensor_size,
            num_vectors=num_vectors,
            text_vectors=text_vectors,
            image_vectors=image_vectors,
            all_vectors=all_vectors,
            stream_order=tensors[0],
            gathered_order=tensors[1],
        )

    def streams(self, hidden_s1H: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's text and image tokens."""
        return hidden_s1H[: self.num_text], hidden_s1H[self.num_text :]

    def to_streams(self, gathered: Tensor) -> Tensor:
        """``[t, ...]`` as tensor-parallel ranks gather tokens, in the order [text | image]."""
        return gathered if self.stream_order is None else gathered.index_select(0, self.stream_order)

    def to_gathered(self, streams: Tensor) -> Tensor:
        """The way back."""
        return streams if self.gathered_order is None else streams.index_select(0, self.gathered_order)
