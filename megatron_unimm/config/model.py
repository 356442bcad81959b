"""Model sections: what is built, independent of how it is spread over ranks."""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section


class MoEConfig(Section):
    """Mixture-of-experts MLP of the backbone."""

    num_experts: int = Field(gt=1)
    """Number of routed experts per layer."""
    top_k: int = Field(gt=0)
    """Experts per token."""
    expert_mlp_size: int = Field(gt=0)
    """Hidden width of one expert."""
    shared_expert_size: int = Field(default=0, ge=0)
    """Hidden width of the fused shared expert; 0 for none."""
    aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the load-balancing loss."""
    z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss."""
    layer_frequency: int = Field(default=1, gt=0)
    """One MoE layer every this many layers (1: all)."""
    first_layer: int = Field(default=0, ge=0)
    """Layers before this one are dense."""
    gates: list[Literal["image", "audio"]] = Field(default_factory=list)
    """Modalities whose tokens have a router of their own in every MoE layer, beside that of text (Ming-Lite-Omni)."""

    def in_layer(self, number: int) -> bool:
        """Whether a decoder layer, 0 first, has experts."""
        return number >= self.first_layer and number % self.layer_frequency == 0

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if len(set(self.gates)) < len(self.gates):
            raise ValueError(f"gates {self.gates} name a modality twice")
        return self


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


class VisionEncoderConfig(Section):
    """What the vision towers of the Qwen VLMs share: a ViT with 2-D rotary positions and a patch merger at the end."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_size: int = Field(gt=0)
    patch_size: int = Field(default=14, gt=0)
    """Side of a patch in pixels."""
    temporal_patch_size: int = Field(default=2, gt=0)
    """Frames per patch; a still image is repeated this often."""
    spatial_merge_size: int = Field(default=2, gt=0)
    """Patches per side that the merger joins to one visual token."""
    in_channels: int = 3
    image_mean: list[float] = Field(default=CLIP_MEAN, min_length=3, max_length=3)
    """Of red, green and blue in [0, 1]; taken off before patches are cut."""
    image_std: list[float] = Field(default=CLIP_STD, min_length=3, max_length=3)
    out_size: int = Field(gt=0)
    """Width of a visual token as the tower gives it: the backbone's hidden size."""
    norm_epsilon: float = 1e-6

    @property
    def token_pixels(self) -> int:
        """Side in pixels of the square that one visual token covers."""
        return self.patch_size * self.spatial_merge_size

    @property
    def patch_dim(self) -> int:
        """Number of values in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


class ProjectorConfig(Section):
    """Between a tower's merger and the backbone: Linear, GELU, Linear (Ming-Lite-Omni's ``linear_proj``)."""

    in_size: int = Field(gt=0)
    """Width of the merger's output."""
    normalize: bool = True
    """Scale each visual token to length 1."""


class Qwen25VisionConfig(VisionEncoderConfig):
    """Qwen2.5-VL's tower: RMSNorm, gated MLP, windowed and full attention (arXiv 2502.13923, section 2.1.1)."""

    family: Literal["qwen2_5"]
    window_size: int = Field(default=112, gt=0)
    """Side of an attention window in pixels."""
    full_attention_layers: list[int] = Field(default_factory=list)
    """Zero-based layers with attention over the whole image; the others attend inside windows."""
    projector: ProjectorConfig | None = None
    """What follows the merger; None for nothing, as in Qwen2.5-VL."""
    deepstack_layers: ClassVar[list[int]] = []

    @property
    def merged_size(self) -> int:
        """Width of the merger's output."""
        return self.out_size if self.projector is None else self.projector.in_size


class Qwen3VisionConfig(VisionEncoderConfig):
    """Qwen3-VL's tower: LayerNorm, plain MLP, full attention, learned positions besides rotary ones, deepstack
    (technical report, arXiv 2511.21631, section 2)."""

    family: Literal["qwen3"]
    patch_size: int = Field(default=16, gt=0)
    """Side of a patch in pixels."""
    image_mean: list[float] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)
    """Of red, green and blue in [0, 1]; taken off before patches are cut."""
    image_std: list[float] = Field(default=[0.5, 0.5, 0.5], min_length=3, max_length=3)
    num_position_embeddings: int = Field(default=2304, gt=0)
    """Learned positions, a square grid that is interpolated to each image's grid of patches."""
    deepstack_layers: list[int] = Field(default_factory=list)
    """Zero-based layers whose output, merged like the last one, is added to the visual tokens after the backbone's
    layers 0, 1, 2, …; ascending."""

    @model_validator(mode="after")
    def _check(self) -> "Qwen3VisionConfig":
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings {self.num_position_embeddings} is no square number")
        layers = self.deepstack_layers
        if layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < self.num_layers):
            raise ValueError(f"deepstack_layers {layers} must ascend and lie in 0..{self.num_layers - 1}")
        return self


VisionEncoder = Annotated[Qwen25VisionConfig | Qwen3VisionConfig, Field(discriminator="family")]


class SiglipConfig(Section):
    """SigLIP's vision tower (arXiv 2303.15343), and SigLIP 2's for any resolution (NaFlex, arXiv 2502.14786).

    SigLIP 2's models of one resolution are ``siglip``.
    """

    family: Literal["siglip", "siglip2"]
    """How learned positions are brought to another grid: bicubic, or bilinear with antialiasing."""
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_size: int = Field(gt=0)
    patch_size: int = Field(default=16, gt=0)
    """Side of a patch in pixels."""
    num_position_embeddings: int = Field(default=256, gt=0)
    """Learned positions, a square grid."""
    in_channels: int = 3
    norm_epsilon: float = 1e-6
    pooling_head: bool = True
    """Whether it has the attention that pools an image to one vector."""

    @model_validator(mode="after")
    def _check(self) -> "SiglipConfig":
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings {self.num_position_embeddings} is no square number")
        return self

    @property
    def patch_dim(self) -> int:
        """Number of values in one flattened patch."""
        return self.in_channels * self.patch_size**2


class BackboneConfig(Section):
    """The decoder of the Qwen VLMs and of Ming-Lite-Omni: RMSNorm, GQA, SwiGLU (dense or MoE), multimodal rotary."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    mlp_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    """Rows of the embedding table, as published (padding included)."""
    max_position: int = Field(default=32768, gt=0)
    tie_embeddings: bool = False
    normalize_output: bool = False
    """Read logits off the output layer's weight with each of its columns at length 1 (BailingMoE's ``norm_head``)."""
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_theta: float = 1e6
    mrope_sections: list[int]
    """Frequencies for time, height and width; their sum is head_size / 2."""
    mrope_interleaved: bool = False
    """False: chunked sections (Qwen2.5-VL). True: interleaved (Qwen3-VL)."""
    positions: Literal["multimodal", "sequential"] = "multimodal"
    """``sequential``: visual tokens count on as text does, on all three axes (Ming-Lite-Omni as released)."""
    norm_epsilon: float = 1e-6
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> "BackboneConfig":
        if self.moe is not None and self.moe.first_layer >= self.num_layers:
            raise ValueError(
                f"moe.first_layer is {self.moe.first_layer}, but num_layers is {self.num_layers}; no layer would have "
                "experts, set moe to null or lower it"
            )
        if sum(self.mrope_sections) * 2 != self.head_size:
            raise ValueError(
                f"mrope_sections {self.mrope_sections} sum to {sum(self.mrope_sections)}, but head_size "
                f"{self.head_size} needs {self.head_size // 2}; make the sections sum to half the head size"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class TokenIds(Section):
    """Special tokens of the tokenizer (defaults: Qwen2.5-VL). Their texts go by ``model.chat_template``."""

    pad: int = 151643
    im_start: int = 151644
    im_end: int = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    image_pad: int = 151655


class ModelConfig(Section):
    """The vision-language model."""

    vision_encoder: VisionEncoder
    backbone: BackboneConfig
    token_ids: TokenIds = TokenIds()
    chat_template: Literal["chatml", "ming"] = "chatml"
    """How conversations are written: as Qwen's models read them, or Ming-Lite-Omni, see ``data/chat.py``."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.vision_encoder.out_size != self.backbone.hidden_size:
            raise ValueError(
                f"vision_encoder.out_size {self.vision_encoder.out_size} differs from backbone.hidden_size "
                f"{self.backbone.hidden_size}; visual tokens enter the backbone as they are, make them equal"
            )
        levels = len(self.vision_encoder.deepstack_layers)
        if levels > self.backbone.num_layers:
            raise ValueError(
                f"vision_encoder.deepstack_layers names {levels} layers, but backbone.num_layers is "
                f"{self.backbone.num_layers}; each is added after a backbone layer of its own"
            )
        return self


class VisionHeadConfig(Section):
    """Maps a hidden state to the next visual token (ORION, section 3.2 and appendix A.4)."""

    kind: Literal["linear", "mlp", "q_former"] = "mlp"
    expansion: int = Field(default=8, gt=0)
    """Width of the MLP's hidden layer over its input width."""
    num_layers: int = Field(default=2, gt=0)
    """Self-attention layers of the Q-Former."""
    num_heads: int = Field(default=8, gt=0)
    """Heads of the Q-Former."""
