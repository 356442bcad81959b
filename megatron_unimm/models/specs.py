"""The one file that chooses layer implementations: Transformer Engine on a GPU, torch elsewhere. Checkpoints of both
are the same."""

from collections.abc import Sequence
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_unimm.errors import ConfigError
from megatron_unimm.models.attention import PackedAttention
from megatron_unimm.models.gates import ModalityRouter
from megatron_unimm.models.norm import SequenceParallelNorm
from megatron_unimm.parallel.platform import Platform


class TorchLayers(LocalSpecProvider):
    """Megatron-Core's own linears with our norm and packed attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return SequenceParallelNorm


def layers_backend(choice: str, platform: Platform, fp8: bool) -> str:
    """``transformer_engine`` or ``torch`` for a config value that may say ``auto``.

    Raises:
        ConfigError: Transformer Engine or FP8 was asked for and is not to be had; never a silent fallback.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if choice == "auto":
        choice = "transformer_engine" if platform.is_gpu and HAVE_TE else "torch"
    if choice == "transformer_engine" and not (platform.is_gpu and HAVE_TE):
        lacking = (
            "no GPU"
            if not platform.is_gpu
            else "transformer-engine is not installed (pip install 'megatron_unimm[gpu]')"
        )
        raise ConfigError(
            "system.layers", f"transformer_engine was asked for, but there is {lacking}; use system.layers=torch"
        )
    if fp8 and choice != "transformer_engine":
        raise ConfigError(
            "system.precision.fp8",
            "FP8 needs Transformer Engine layers on a GPU; remove system.precision.fp8 or run there",
        )
    return choice


def layer_spec(
    backend: str,
    *,
    causal: bool,
    kind: str = "full",
    qk_norm: bool = False,
    num_experts: int | None = None,
    gates: Sequence[str] = (),
) -> ModuleSpec:
    """A pre-norm transformer layer: attention and a gated MLP or a mixture of experts.

    Args:
        backend: ``transformer_engine`` or ``torch``.
        kind: which segments its attention uses, see ``models/attention.py``.
        gates: modalities that have a router of their own, see ``models/gates.py``.
    """
    with_te = backend == "transformer_engine"
    provider = layers_provider(backend)
    norm = provider.layer_norm(rms_norm=True)
    mlp = get_mlp_module_spec_for_backend(
        provider, num_experts=num_experts, moe_grouped_gemm=with_te and num_experts is not None
    )
    if gates:
        assert isinstance(mlp.submodules, MoESubmodules)
        mlp.submodules.router = partial(ModalityRouter, gates=list(gates))
    qk = provider.layer_norm(rms_norm=True, for_qk=True) if qk_norm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_layer_norm_linear() if with_te else provider.column_parallel_linear(),
            core_attention=partial(PackedAttention, kind=kind, transformer_engine=with_te),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk,
            k_layernorm=qk,
        ),
    )
    # Transformer Engine fuses a norm into the linear behind it; the map gives both backends the fused names in
    # checkpoints.
    fused_names = {} if with_te else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not with_te and num_experts is None:
        fused_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if with_te else norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if num_experts is not None or not with_te else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=fused_names,
        ),
    )


def block_spec(backend: str, layers: list[ModuleSpec]) -> TransformerBlockSubmodules:
    """A stack of layers; its final norm is that of the backend."""
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=layers_provider(backend).layer_norm(rms_norm=True))


def layers_provider(backend: str) -> BackendSpecProvider:
    """Which classes make linears and norms, for blocks that are no pre-norm transformer layers."""
    return _transformer_engine() if backend == "transformer_engine" else TorchLayers()


def _transformer_engine() -> BackendSpecProvider:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
