"""The patch merger of the Qwen vision towers."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.model import VisionEncoderConfig


class PatchMerger(MegatronModule):
    """Joins the patches of a merge unit to one visual token: norm, then an MLP over their concatenation.

    Args:
        joined_norm: normalise the concatenation rather than each patch (Qwen3-VL's deepstack levels).
    """

    def __init__(
        self,
        model: VisionEncoderConfig,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        joined_norm: bool = False,
    ) -> None:
        super().__init__(config)
        self.joined_size = model.hidden_size * model.spatial_merge_size**2
        self.norm_size = self.joined_size if joined_norm else model.hidden_size
        norm = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        linear = dict(config=config, init_method=config.init_method, bias=True, tp_group=groups.tp)
        self.norm = norm(self.norm_size, eps=model.norm_epsilon)
        self.linear_fc1 = ColumnParallelLinear(
            self.joined_size, self.joined_size, gather_output=False, skip_bias_add=False, **linear
        )
        self.linear_fc2 = RowParallelLinear(
            self.joined_size, model.out_size, input_is_parallel=True, skip_bias_add=False, **linear
        )

    def forward(self, hidden_P1H: Tensor) -> Tensor:
        """``[P, 1, H]`` to ``[V, out_size]``."""
        joined = self.norm(hidden_P1H.view(-1, self.norm_size)).view(-1, self.joined_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(joined)[0]))[0]
