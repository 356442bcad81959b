"""Section of low-rank adapters (LoRA)."""

from fnmatch import fnmatchcase

from pydantic import Field, field_validator

from megatron_unimm.config.base import Section

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "linear_out")
"""Linears of a trunk that take an adapter: Megatron-Core's names, and the output of FLUX's single blocks."""
SHARED_EXPERTS = "shared_experts"
"""A dense MLP beside the routed experts."""
ROUTED = ("experts", "router")
"""Parts of a mixture of experts that take none: routed experts see too few tokens each, and there are too many."""


class LoraConfig(Section):
    """Low-rank adapters beside frozen linears: W + (alpha / rank) B A (arXiv 2106.09685, section 4.1)."""

    rank: int = Field(default=16, gt=0)
    """Rows of A, columns of B."""
    alpha: float = Field(default=16.0, gt=0)
    """Over the rank, what B A is multiplied by: another rank then asks for no other learning rate."""
    modules: list[str] | None = Field(default=None, min_length=1)
    """Globs over names of linears as in checkpoints, or over the end of such names: ``linear_qkv``,
    ``self_attention.*``, ``layers.0.*.linear_fc1``. null for all linears of attention, dense MLPs and shared experts;
    routed experts and routers take no adapter."""

    @field_validator("modules")
    @classmethod
    def _check(cls, modules: list[str] | None) -> list[str] | None:
        for pattern in modules or ():
            named = [part for part in ROUTED if part in pattern.replace(SHARED_EXPERTS, "")]
            if named:
                raise ValueError(
                    f"pattern {pattern!r} names {named[0]}, but routed experts and routers take no adapter; name some "
                    f"of {', '.join(LINEARS)} outside of them"
                )
        return modules

    @property
    def patterns(self) -> tuple[str, ...]:
        """Globs, the default spelled out."""
        return LINEARS if self.modules is None else tuple(self.modules)

    def patterns_of(self, name: str) -> set[str]:
        """Those that match a linear's name."""
        return {pattern for pattern in self.patterns if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")}
