"""Vision heads f(·) of ORION's eq. 2: from a hidden state to the next visual token. All map ``[n, H]`` to ``[n, H]``.

The three kinds of the paper's ablation (Table 4): a linear map (Emu, Nexus-Gen), the paper's MLP, and a Q-Former of
comparable size.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_unimm.config.model import VisionHeadConfig


class LinearVisionHead(MegatronModule):
    """One linear map without bias."""

    def __init__(self, model: VisionHeadConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.linear = ColumnParallelLinear(
            size,
            size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )

    def forward(self, hidden_nH: Tensor) -> Tensor:
        return self.linear(hidden_nH)[0]


class MlpVisionHead(MegatronModule):
    """One hidden layer of ``expansion`` times the width, GELU (appendix A.4)."""

    def __init__(self, model: VisionHeadConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        size, inner = config.hidden_size, config.hidden_size * model.expansion
        linear = dict(config=config, init_method=config.init_method, bias=True, skip_bias_add=False, tp_group=groups.tp)
        self.linear_fc1 = ColumnParallelLinear(size, inner, gather_output=False, **linear)
        self.linear_fc2 = RowParallelLinear(inner, size, input_is_parallel=True, **linear)

    def forward(self, hidden_nH: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden_nH)[0]))[0]


class QFormerVisionHead(MegatronModule):
    """Stacked self-attention layers over [query token, hidden state]; the query's output is the next visual token
    (appendix A.4).

    The paper gives no more than "stacked self-attention layers" and "a single query token"; the two-token sequence,
    pre-norm layers and an MLP of twice the width (which brings its size near the MLP head's at two layers) are our
    reading. Computed whole on every tensor-parallel rank.
    """

    def __init__(self, model: VisionHeadConfig, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.query_token = torch.nn.Parameter(
            torch.empty(size, dtype=config.params_dtype).normal_(std=config.init_method_std)
        )
        layer = torch.nn.TransformerEncoderLayer(
            size,
            model.num_heads,
            dim_feedforward=2 * size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            dtype=config.params_dtype,
        )
        self.layers = torch.nn.TransformerEncoder(layer, model.num_layers, enable_nested_tensor=False)
        self.projection = torch.nn.Linear(size, size, dtype=config.params_dtype)

    def forward(self, hidden_nH: Tensor) -> Tensor:
        query = self.query_token.expand_as(hidden_nH)
        pair = torch.stack([query, hidden_nH], dim=1)  # [n, 2, H]
        return self.projection(self.layers(pair)[:, 0])


VISION_HEADS = {"linear": LinearVisionHead, "mlp": MlpVisionHead, "q_former": QFormerVisionHead}


def build_vision_head(
    model: VisionHeadConfig, config: TransformerConfig, groups: ProcessGroupCollection
) -> MegatronModule:
    """The head that the config names. ``config`` must not be sequence parallel: heads read gathered positions."""
    return VISION_HEADS[model.kind](model, config, groups)
