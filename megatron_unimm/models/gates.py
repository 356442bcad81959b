"""A router of its own for every modality (Ming-Lite-Omni, arXiv 2506.09344): all tokens share the experts, and what a
token is says whose logits choose among them.

Drawn for the gates ``[image, audio]``, three tokens and four experts::

    token     is     mask: image audio     logits come from
    A         text           0     0       weight        [4, H]
    #         image          1     0       image_weight  [4, H]
    ~         audio          0     1       audio_weight  [4, H]

Every gate reads every token, and one of its logits is taken. So each gate has a gradient in every step, zero where no
token was its own, as overlapped reduction of gradients wants; the price is one thin product.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_unimm.config.model import ModelConfig


class ModalityRouter(TopKRouter):
    """Megatron-Core's router with more gates than one.

    Which modality a token has comes in by the argument ``padding_mask``, the one mask that Megatron-Core hands from the
    decoder to every router, through its recompute too. It leaves padding out of the balancing losses; here padding is
    a segment of text like any other.

    Args:
        gates: modalities besides text, in the order of the mask's columns.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, *, gates: list[str]
    ) -> None:
        super().__init__(config, pg_collection)
        self.names = [f"{gate}_weight" for gate in gates]
        for name in self.names:
            weight = torch.nn.Parameter(torch.empty_like(self.weight))
            if config.perform_initialization:
                assert config.init_method is not None
                config.init_method(weight)
            # Sums its gradient over ranks that have different tokens, as Megatron-Core says of its own.
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, weight)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and choice of experts, ``[t, E]`` each, of hidden states ``[t, 1, H]``.

        Args:
            padding_mask: bool ``[t, gates]``: of which modality a token is; text where it is of none.
        """
        assert padding_mask is not None, "PackedContext.modality says what tokens are"
        weights = [self.weight, *(self.get_parameter(name) for name in self.names)]
        logits = router_gating_linear(input, torch.cat(weights), None, torch.float32)  # [t, 1, (1 + gates) E]
        text, *others = logits.chunk(len(weights), dim=-1)  # [t, 1, E] each
        chosen = text
        for number, other in enumerate(others):
            chosen = torch.where(padding_mask[:, number, None, None], other, chosen)
        return self.routing(chosen)


def modality_mask(input_ids: Tensor, model: ModelConfig) -> Tensor | None:
    """What routers with several gates ask of tokens int64 ``[t]``: bool ``[gates, t]``, None for other models. Visual
    tokens are an image's, those that are read and those that are drawn, and so are queries; data has no audio."""
    moe = model.backbone.moe
    if moe is None or not moe.gates:
        return None
    is_image = input_ids == model.token_ids.image_pad
    return torch.stack([is_image if gate == "image" else torch.zeros_like(is_image) for gate in moe.gates])
