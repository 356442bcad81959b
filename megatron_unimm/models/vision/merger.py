"""The patch merger of the Qwen vision towers, and the projector that Ming-Lite-Omni has behind it."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.model import ProjectorConfig, Qwen25VisionConfig, VisionEncoderConfig


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
        out_size = model.merged_size if isinstance(model, Qwen25VisionConfig) else model.out_size
        self.norm = norm(self.norm_size, eps=model.norm_epsilon)
        self.linear_fc1, self.linear_fc2 = _two_linears(self.joined_size, self.joined_size, out_size, config, groups)

    def forward(self, hidden_P1H: Tensor) -> Tensor:
        """``[P, 1, H]`` to ``[V, merged size]``."""
        joined = self.norm(hidden_P1H.view(-1, self.norm_size)).view(-1, self.joined_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(joined)[0]))[0]


class Projector(MegatronModule):
    """Brings merged visual tokens to the backbone's width."""

    def __init__(
        self, model: ProjectorConfig, out_size: int, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.normalize = model.normalize
        self.linear_fc1, self.linear_fc2 = _two_linears(model.in_size, out_size, out_size, config, groups)

    def forward(self, merged_VM: Tensor) -> Tensor:
        """``[V, in_size]`` to ``[V, out_size]``."""
        projected = self.linear_fc2(F.gelu(self.linear_fc1(merged_VM)[0]))[0]
        return F.normalize(projected, dim=-1) if self.normalize else projected


def _two_linears(
    in_size: int, inner_size: int, out_size: int, config: TransformerConfig, groups: ProcessGroupCollection
) -> tuple[ColumnParallelLinear, RowParallelLinear]:
    shared = dict(config=config, init_method=config.init_method, bias=True, tp_group=groups.tp, skip_bias_add=False)
    return (
        ColumnParallelLinear(in_size, inner_size, gather_output=False, **shared),
        RowParallelLinear(inner_size, out_size, input_is_parallel=True, **shared),
    )
