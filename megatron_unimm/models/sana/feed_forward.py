"""SANA's Mix-FFN (arXiv 2410.10629, section 2.2): a gated MLP whose hidden layer is convolved over the picture, by
which a model without positions sees what lies beside what.

Legend  t image tokens of this rank's row, U of them without padding; m hidden width, H hidden size.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu, set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_unimm.models.mmdit.blocks import linear_options, recomputed
from megatron_unimm.models.mmdit.pictures import PictureBatches
from megatron_unimm.models.specs import layers_provider

KERNEL = 3


class DepthwiseConv(MegatronModule):
    """Each channel over its picture, 3 x 3 with zeros beyond the border. Tensor-parallel ranks share the channels."""

    def __init__(self, channels: int, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        mine = channels // groups.tp.size()
        self.tp_group = groups.tp
        self.weight = torch.nn.Parameter(torch.empty(mine, KERNEL**2, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(mine, dtype=config.params_dtype))
        assert config.init_method is not None
        # Drawn whole and cut, as Megatron-Core's linears are: the same at every layout.
        _initialize_affine_weight_cpu(
            self.weight,
            channels,
            KERNEL**2,
            mine,
            0,
            config.init_method,
            params_dtype=config.params_dtype,
            rank=groups.tp.rank(),
            world_size=groups.tp.size(),
        )
        set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(self, tokens_UC: Tensor, pictures: PictureBatches) -> Tensor:
        """``[U, C / tensor]``, tokens in the order of ``pictures``."""
        convolved = [convolve(grid, self.weight, self.bias) for grid in pictures.grids(tokens_UC)]
        return torch.cat([grid.flatten(0, 2) for grid in convolved])

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Cut along channels."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def convolve(grid_BRCF: Tensor, weight_FK: Tensor, bias_F: Tensor) -> Tensor:
    """Each of F channels of pictures ``[B, rows, columns, F]`` with its own kernel."""
    weight = weight_FK.view(-1, 1, KERNEL, KERNEL)
    grid = F.conv2d(grid_BRCF.permute(0, 3, 1, 2), weight, bias_F, padding=KERNEL // 2, groups=len(weight))
    return grid.permute(0, 2, 3, 1)


class MixFeedForward(MegatronModule):
    """Linear, SiLU, convolution, gate, linear. The hidden layer has value and gate of each of m channels side by side,
    so that a tensor-parallel rank has both of its own."""

    def __init__(self, config: TransformerConfig, backend: str, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        provider, hidden, width = layers_provider(backend), config.hidden_size, config.ffn_hidden_size
        assert width is not None
        self.linear_fc1 = provider.column_parallel_linear()(
            hidden, 2 * width, gather_output=False, **linear_options("fc1", config, groups)
        )
        self.depthwise = DepthwiseConv(2 * width, config, groups)
        self.linear_fc2 = provider.row_parallel_linear()(
            width, hidden, input_is_parallel=True, **linear_options("fc2", config, groups, bias=False)
        )

    def forward(self, hidden_s1H: Tensor, pictures: PictureBatches) -> Tensor:
        """``[s, 1, H]``; zeros at padding."""

        def run(hidden_s1H: Tensor) -> Tensor:
            grown = F.silu(self.linear_fc1(hidden_s1H)[0][:, 0])  # [t, 2 m / tensor]
            tokens = self.depthwise(grown.index_select(0, pictures.index), pictures)  # [U, 2 m / tensor]
            value, gate = tokens.unflatten(1, (-1, 2)).unbind(2)
            gated = value * F.silu(gate)  # [U, m / tensor]
            inside = gated.new_zeros(len(grown), gated.shape[1]).index_copy(0, pictures.index, gated)
            return self.linear_fc2(inside[:, None])[0]

        return recomputed(self.config, "mlp", run, hidden_s1H)
