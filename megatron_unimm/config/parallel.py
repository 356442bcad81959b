"""How a model is spread over ranks, and in which precision it computes."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section


class ParallelConfig(Section):
    """Sizes of the parallel axes. Data parallel size is what is left of the world size."""

    tensor: int = Field(default=1, gt=0)
    sequence: bool = False
    """Shard activations between tensor-parallel regions along the sequence (needs tensor > 1)."""
    pipeline: int = Field(default=1, gt=0)
    virtual_pipeline: int = Field(default=1, gt=0)
    """Model chunks per pipeline rank (interleaved schedule); 1 for none."""
    context: int = Field(default=1, gt=0)
    expert: int = Field(default=1, gt=0)
    expert_tensor: int = Field(default=1, gt=0)
    layers_per_stage: list[int] | None = None
    """Backbone layers of each pipeline stage, in order, virtual stages included; null splits evenly."""


class Fp8Config(Section):
    """FP8 with Transformer Engine. Present means on."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    format: Literal["e4m3", "hybrid"] = "hybrid"
    first_last_layers_bf16: bool = False
    """Keep the first and the last layer in bf16 (not with the delayed recipe)."""


class PrecisionConfig(Section):
    """Numbers of the forward and backward pass. Gradients are reduced and master weights kept in fp32."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: Fp8Config | None = None


class RecomputeConfig(Section):
    """Activation recompute."""

    granularity: Literal["none", "selective", "full"] = "none"
    modules: list[Literal["core_attn", "mlp", "moe", "moe_act", "layernorm"]] = Field(default=["core_attn"])
    """What the selective kind recomputes."""
    num_layers: int = Field(default=1, gt=0)
    """Layers per recomputed block of the full kind."""


class OverlapConfig(Section):
    """Communication hidden behind computation (GPU)."""

    grad_reduce: bool = False
    param_gather: bool = False
    tensor_parallel: bool = False
    """User buffers of Transformer Engine; needs sequence parallel."""


class SystemConfig(Section):
    """Everything about where and how it runs."""

    platform: Literal["auto", "cuda", "cpu"] = "auto"
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """Implementation of the transformer layers; auto takes Transformer Engine on a GPU where it is installed."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    overlap: OverlapConfig = OverlapConfig()
    cuda_graph: Literal["none", "local", "transformer_engine"] = "none"
    """mcore's CUDA graphs of the vision head-free decoder layers; fixed shapes only."""
    cpu_threads: int = Field(default=0, ge=0)
    """Torch threads per rank on CPU; 0 divides the cores by the ranks of the node."""
    timeout_minutes: float = Field(default=10.0, gt=0)
    """Collectives that take longer end the job."""
    watchdog_minutes: float | None = Field(default=8.0, gt=0)
    """A rank that comes no further for so long makes all ranks write down their stacks and end with exit code 70, to be
    started again; starting up, the first step, checkpoints and evaluations may take six times that. null for never."""

    @model_validator(mode="after")
    def _check(self) -> "SystemConfig":
        if self.watchdog_minutes is not None and self.watchdog_minutes >= self.timeout_minutes:
            raise ValueError(
                f"watchdog_minutes {self.watchdog_minutes:g} is not below timeout_minutes {self.timeout_minutes:g}, so "
                "that collectives would end first and the stuck rank stay unknown; lower it or raise timeout_minutes"
            )
        return self
