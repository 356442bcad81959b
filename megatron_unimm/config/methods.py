"""One section per method; the ``name`` field tells them apart."""

from typing import Literal

from pydantic import Field

from megatron_unimm.config.base import Section
from megatron_unimm.config.model import VisionHeadConfig


class LossWeights(Section):
    """Weights of eq. 4 of ORION (the paper's CE : MSE : KL)."""

    cross_entropy: float = Field(default=1.0, ge=0)
    mse: float = Field(default=1.0, ge=0)
    kl: float = Field(default=0.01, ge=0)


class OrionConfig(Section):
    """ORION, decoupling and alignment (papers: Hu et al., ICLR 2026)."""

    name: Literal["orion"] = "orion"
    vision_head: VisionHeadConfig = VisionHeadConfig()
    loss_weights: LossWeights = LossWeights()

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Sizes of the method's own parts that tensor parallelism cuts, by name; every method's section has this."""
        if self.vision_head.kind == "mlp":
            return {"method.vision_head.expansion x hidden_size": self.vision_head.expansion * hidden_size}
        # The Q-Former is computed whole on every rank.
        return {"model.backbone.hidden_size": hidden_size} if self.vision_head.kind == "linear" else {}


MethodConfig = OrionConfig
