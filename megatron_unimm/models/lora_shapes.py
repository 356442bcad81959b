"""Which linears of a language model's layers have low-rank adapters, and how wide they are: from the configuration
alone, for what counts FLOPs and memory. ``models/lora.py`` builds them.
"""

from dataclasses import dataclass

from megatron_unimm.config.lora import SHARED_EXPERTS, LoraConfig
from megatron_unimm.config.model import BackboneConfig


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear with an adapter, whole."""

    name: str
    """Of Megatron-Core: ``linear_qkv``, ``linear_proj``, ``linear_fc1``, ``linear_fc2``."""
    inputs: int
    outputs: int
    rank: int

    @property
    def by_rows(self) -> bool:
        """Tensor parallelism cuts its input."""
        return self.name in ("linear_proj", "linear_fc2")

    def weights(self, tensor: int) -> int:
        """Parameters of A and B on a rank: one of the two is cut."""
        whole, cut = (self.outputs, self.inputs) if self.by_rows else (self.inputs, self.outputs)
        return self.rank * (whole + cut // tensor)


def adapted_linears(model: BackboneConfig, lora: LoraConfig | None, layer: int) -> tuple[AdaptedLinear, ...]:
    """Of one layer (zero-based)."""
    if lora is None:
        return ()
    hidden, heads = model.hidden_size, model.num_heads * model.head_size
    moe = model.moe if model.moe is not None and model.moe.in_layer(layer) else None
    mlp, width = ("mlp", model.mlp_size) if moe is None else (f"mlp.{SHARED_EXPERTS}", moe.shared_expert_size)
    shapes = {
        "self_attention.linear_qkv": (hidden, heads + 2 * model.num_kv_heads * model.head_size),
        "self_attention.linear_proj": (heads, hidden),
    }
    if width:
        shapes |= {f"{mlp}.linear_fc1": (hidden, 2 * width), f"{mlp}.linear_fc2": (width, hidden)}
    return tuple(
        AdaptedLinear(name.rpartition(".")[2], *shape, lora.rank)
        for name, shape in shapes.items()
        if lora.patterns_of(f"decoder.layers.{layer}.{name}")
    )
