"""Section of Dynamic Token Routing (SPAR, arXiv 2606.23041: "enables each token to adaptively aggregate multi-layer
MLLM features based on its distinct semantic demands"). The abstract says no more; the rest is ours."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section


class RoutingConfig(Section):
    """A mixture of the states that a token has after several layers of the language model."""

    mode: Literal["dynamic", "static"] = "dynamic"
    """``dynamic``: a token's weights come from its own states. ``static``: one learned weight for each layer, the same
    for all tokens (ELMo, arXiv 1802.05365, eq. 1). No section at all takes the last layer."""
    layers: list[int] | None = None
    """Zero-based layers that are mixed; null for all."""
    top_k: int | None = Field(default=None, gt=0)
    """Layers that a token takes, those of its largest weights; null for all of them."""
    temperature: float = Field(default=1.0, gt=0)
    """What logits are divided by before the softmax."""

    @model_validator(mode="after")
    def _check(self) -> "RoutingConfig":
        if self.layers is not None and (not self.layers or self.layers != sorted(set(self.layers))):
            raise ValueError(f"layers {self.layers} must ascend, and be one at least")
        if self.top_k is not None and self.layers is not None and self.top_k > len(self.layers):
            raise ValueError(f"top_k {self.top_k} is more than the {len(self.layers)} layers")
        return self

    def mixed(self, num_layers: int) -> list[int]:
        """The layers that are mixed.

        Raises:
            ValueError: one of them is not there.
        """
        layers = list(range(num_layers)) if self.layers is None else self.layers
        if not 0 <= layers[0] <= layers[-1] < num_layers:
            raise ValueError(f"routing.layers {layers} must lie in 0..{num_layers - 1}")
        if self.top_k is not None and self.top_k > len(layers):
            raise ValueError(f"routing.top_k {self.top_k} is more than the {len(layers)} layers")
        return layers
