"""Vision encoders."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_unimm.config.model import Qwen25VisionConfig, VisionEncoder
from megatron_unimm.models.vision.input import VisionInput
from megatron_unimm.models.vision.qwen2_5 import Qwen25VisionEncoder
from megatron_unimm.models.vision.qwen3 import Qwen3VisionEncoder

__all__ = ["VisionInput", "VisionTower", "build_vision_encoder"]

VisionTower = Qwen25VisionEncoder | Qwen3VisionEncoder


def build_vision_encoder(
    model: VisionEncoder, config: TransformerConfig, backend: str, groups: ProcessGroupCollection
) -> VisionTower:
    """The tower that the config names. Its forward gives features ``[V, (1 + K) H]``: visual tokens, K deepstack
    levels beside each (none for Qwen2.5-VL)."""
    if isinstance(model, Qwen25VisionConfig):
        return Qwen25VisionEncoder(model, config, backend, groups)
    return Qwen3VisionEncoder(model, config, backend, groups)
