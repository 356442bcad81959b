"""One section per method; the ``name`` field tells them apart."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron_unimm.config.base import Section
from megatron_unimm.config.flow import FlowConfig, SamplerConfig
from megatron_unimm.config.lora import LoraConfig
from megatron_unimm.config.model import VisionHeadConfig
from megatron_unimm.config.rl import FlowGrpoConfig

Trunk = Literal["backbone", "mmdit", "tokenizer"]
"""The part of a method that is spread over the whole layout."""


class LossWeights(Section):
    """Weights of eq. 4 of ORION (the paper's CE : MSE : KL)."""

    cross_entropy: float = Field(default=1.0, ge=0)
    mse: float = Field(default=1.0, ge=0)
    kl: float = Field(default=0.01, ge=0)


class OrionConfig(Section):
    """ORION, decoupling and alignment (papers: Hu et al., ICLR 2026)."""

    name: Literal["orion"] = "orion"
    trunk: ClassVar[Trunk] = "backbone"
    """The part that is spread over the whole layout; every method's section says so."""
    query_section: ClassVar[Literal["", "queries", "hieraquery"]] = ""
    """The section of the stage that says what query tokens its VLM has, if any; every method's section says so."""
    looks_back: ClassVar[bool] = False
    """Whether a picture that is drawn sees those before it; every method's section says so."""
    vision_head: VisionHeadConfig = VisionHeadConfig()
    loss_weights: LossWeights = LossWeights()
    token_noise: float = Field(default=0.0, ge=0)
    """Training adds Gaussian noise to the visual tokens that the model reads of an image which it generates, of a
    standard deviation that each image draws between 0 and this, in the tokens' units; what is regressed stays clean.
    The paper feeds the true tokens; a model that draws reads its own, whose errors it has then never seen (exposure
    bias, arXiv 1506.03099)."""

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Sizes of the method's own parts that tensor parallelism cuts, by name; every method's section has this."""
        if self.vision_head.kind == "mlp":
            return {"method.vision_head.expansion x hidden_size": self.vision_head.expansion * hidden_size}
        # The Q-Former is computed whole on every rank.
        return {"model.backbone.hidden_size": hidden_size} if self.vision_head.kind == "linear" else {}


class ConnectorConfig(Section):
    """Maps visual tokens to the condition of an image generator (Nexus-Gen, arXiv 2504.21356: the generation decoder's
    adapter)."""

    hidden_size: int | None = Field(default=None, gt=0)
    """Width between its two linear layers; null for that of the condition."""
    sources: bool = False
    """Whether visual tokens of source images join those of the picture, for editing."""


class OrionDecoderConfig(Section):
    """ORION's image decoder: a diffusion transformer that draws what visual tokens say (section 3.3.2; repurposed from
    Nexus-Gen's)."""

    name: Literal["orion_decoder"]
    trunk: ClassVar[Trunk] = "mmdit"
    query_section: ClassVar[Literal["", "queries", "hieraquery"]] = ""
    looks_back: ClassVar[bool] = False
    connector: ConnectorConfig = ConnectorConfig()
    flow: FlowConfig = FlowConfig()
    sampler: SamplerConfig = SamplerConfig(guidance_scale=1.0)
    """How pictures are drawn unless the command says otherwise."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples that are drawn from no condition (zeros for visual tokens), for classifier-free guidance; of
    edits, half of these keep their sources."""
    condition_noise: float = Field(default=0.0, ge=0)
    """Training adds Gaussian noise to the picture's own visual tokens (not to those of its sources), of a standard
    deviation that each sample draws between 0 and this, in the tokens' units. A language model regresses tokens with
    errors that the vision encoder's do not have; a decoder that has seen noise forgives them (conditioning
    augmentation, arXiv 2106.15282; over a vision encoder's features, RAE, arXiv 2510.11690)."""
    embedded_guidance: float = Field(default=3.5, ge=0)
    """What a guidance-distilled model (FLUX.1-dev) gets as its guidance scale."""

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Nothing beyond the diffusion transformer; the connector is whole on every rank."""
        return {}


class MMCoreLossWeights(Section):
    """Weights of eq. 2 of MMCORE, which the paper does not give."""

    llm: float = Field(default=1.0, ge=0)
    """λ_t."""
    vis: float = Field(default=1.0, ge=0)
    """λ_a."""


class VisualLatentsConfig(Section):
    """A VLM that predicts visual latents (MMCORE, arXiv 2604.19902, section 3.1)."""

    trunk: ClassVar[Trunk] = "backbone"
    query_section: ClassVar[Literal["", "queries", "hieraquery"]] = "queries"
    looks_back: ClassVar[bool] = False
    loss_weights: MMCoreLossWeights = MMCoreLossWeights()

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Nothing beyond the backbone and the connector of the queries."""
        return {}


class MMCoreConfig(VisualLatentsConfig):
    """MMCORE's first stage."""

    name: Literal["mmcore"]


class DropoutSchedule(Section):
    """A rate that goes from one value to another, linearly over the first steps of a stage."""

    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)
    steps: int = Field(default=0, ge=0)
    """0 has the last value from the beginning."""

    def at(self, step: int) -> float:
        """Of the step that comes after ``step`` others."""
        done = min(1.0, step / self.steps) if self.steps else 1.0
        return self.start + (self.end - self.start) * done


Pathways = Literal["both", "visual", "text"]


class MMCoreDrawing(Section):
    """What the stages of MMCORE share that train its diffusion transformer (section 3.2)."""

    trunk: ClassVar[Trunk] = "mmdit"
    query_section: ClassVar[Literal["", "queries", "hieraquery"]] = "queries"
    looks_back: ClassVar[bool] = True
    sampler: SamplerConfig = SamplerConfig(guidance_scale=3.0, image_guidance_scale=1.5)
    """How pictures are drawn unless the command says otherwise. ``image_guidance_scale`` is that of the visual
    latents, ``guidance_scale`` that of the words on top of them."""
    max_frames: int = Field(default=32, gt=0)
    """Pictures of a conversation that a transformer without rotary positions can tell apart (SD3: a vector that is
    added to each picture's tokens, zero at the start)."""
    embedded_guidance: float = Field(default=3.5, ge=0)
    """What a guidance-distilled model (FLUX.1-dev) gets as its guidance scale."""
    lora: LoraConfig | None = None
    """Low-rank adapters in the diffusion transformer, in place of training all of it."""
    pathways: Pathways = "both"
    """What pictures are drawn from, in training and after it: words and visual latents, or one of them alone.
    ``visual`` is MetaQuery's setting: "relying solely on query tokens yields significantly weaker performance compared
    to utilizing the full context" (section 3.1). The pathway that is left out stays as it began. For ablations: exports
    know ``both``."""

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Nothing beyond the diffusion transformer; the pathways are whole on every rank."""
        return {}


class PathwayDiffusionConfig(MMCoreDrawing):
    """A diffusion transformer that learns by flow matching to draw from words and visual latents of a VLM in place of
    text encoders, and with the pictures before in its context (MMCORE, section 3.2)."""

    flow: FlowConfig = FlowConfig()
    text_dropout: DropoutSchedule = DropoutSchedule(start=0.5, end=0.1, steps=2000)
    """Share of frames whose words are left out of the condition. "We apply a higher dropout rate to text embeddings
    during the early training stages … subsequently annealed"; the paper gives no rates."""
    visual_dropout: DropoutSchedule = DropoutSchedule(start=0.1, end=0.1)
    """The same for visual latents, drawn independently."""
    earlier_latents: bool = False
    """Whether a picture sees the visual latents of those that were drawn before it. The paper excludes them: "attending
    to historical visual tokens destabilizes the optimization landscape, leading to performance degradation" (section
    3.2). For that ablation: neither exports nor the policy know it."""
    vit_features: bool = False
    """Whether the clean tokens of earlier pictures get, beside latents of the VAE, what the VLM's vision encoder sees
    there, by a projection that is zero at the start. The paper tried it: "introducing these additional visual cues
    resulted in a marked performance degradation" (section 4.3, Impact of Visual Latents on Conditional VAEs). For that
    ablation: neither exports nor the policy know it."""


class MMCoreDiffusionConfig(PathwayDiffusionConfig):
    """MMCORE's second stage: a text-to-image diffusion transformer goes on training (section 3.2)."""

    name: Literal["mmcore_diffusion"]


class MMCorePolicyConfig(MMCoreDrawing):
    """MMCORE's last stage, "Reinforcement Learning with Human Feedback" (section 3.2), which the paper says no more of:
    Flow-GRPO (arXiv 2505.05470) on the diffusion transformer."""

    name: Literal["mmcore_policy"]
    grpo: FlowGrpoConfig


class RepresentationAlignmentConfig(Section):
    """Hidden states of the diffusion transformer are drawn to what the VLM's vision encoder sees of the picture
    (HieraQuery, section 3.2; REPA, arXiv 2410.06940). The paper gives neither layer nor weight."""

    layer: int = Field(default=8, ge=1)
    """After which of its layers (REPA: 8)."""
    weight: float = Field(default=0.5, ge=0)
    """Of the loss (REPA: 0.5)."""
    projector_size: int = Field(default=2048, gt=0)
    """Hidden width of the projector (REPA: 2048)."""


class HieraQueryConfig(Section):
    """HieraQuery: a diffusion transformer draws a picture at several scales, each from query tokens of its own that a
    frozen VLM reads, coarse to fine (papers: sections 3 and 4.2)."""

    name: Literal["hieraquery"]
    trunk: ClassVar[Trunk] = "mmdit"
    query_section: ClassVar[Literal["", "queries", "hieraquery"]] = "hieraquery"
    flow: FlowConfig = FlowConfig()
    sampler: SamplerConfig = SamplerConfig(guidance_scale=5.0)
    """How pictures are drawn unless the command says otherwise (guidance of 5 as in Ming-Lite-Omni's code). Source
    pictures are there with and without the condition."""
    shows_sources: bool = True
    """Whether a picture sees the latents of those before it in its conversation. Where not, all that is known of these
    is what the VLM's queries say, and every picture is drawn by itself. A transformer that sees one picture at a time
    (SANA) needs false."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of pictures, at each scale by itself, that are drawn from no condition (zeros), for guidance. The paper
    gives none; MetaQuery has 0.1."""
    alignment: RepresentationAlignmentConfig | None = RepresentationAlignmentConfig()
    """null for none."""
    max_frames: int = Field(default=8, gt=0)
    """Pictures of a conversation that a transformer without rotary positions can tell apart (SD3: a vector that is
    added to each picture's tokens, zero at the start). Without ``shows_sources`` only the first vector is used."""
    embedded_guidance: float = Field(default=3.5, ge=0)
    """What a guidance-distilled model (FLUX.1-dev) gets as its guidance scale."""

    @model_validator(mode="after")
    def _check(self) -> "HieraQueryConfig":
        if self.sampler.image_guidance_scale != 1.0:
            scale = self.sampler.image_guidance_scale
            raise ValueError(
                f"sampler.image_guidance_scale is {scale}, but there is one condition alone; leave it at 1"
            )
        return self

    @property
    def looks_back(self) -> bool:
        """Whether a picture sees those before it."""
        return self.shows_sources

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Nothing beyond the diffusion transformer and the connector of the section hieraquery."""
        return {}


class TokenizerLossWeights(Section):
    """Of SPAR's tokenizer. The text gives none; those of perceptual and self-distillation are UniLIP's (arXiv
    2507.23278)."""

    l1: float = Field(default=1.0, ge=0)
    """Of pixels in [-1, 1]."""
    l2: float = Field(default=1.0, ge=0)
    perceptual: float = Field(default=1.1, ge=0)
    """Over features of the base model's vision encoder."""
    semantic: float = Field(default=1.0, ge=0)
    """Self-distillation: the semantic stream to the visual tokens of the encoder as it was at first, by the cosine."""
    latent: float = Field(default=1.0, ge=0)
    """The same of what is read out of the latents."""


class AdversarialConfig(Section):
    """A patch discriminator beside the tokenizer. Both learn in one step, each from its own loss alone: the
    discriminator's hinge loss does not reach the pictures, nor the pictures' loss the discriminator. Its learning rate
    is a rule of ``train.trainable`` for ``discriminator.*``."""

    weight: float = Field(default=0.75, gt=0)
    """RAE's (arXiv 2510.11690)."""
    adaptive: bool = True
    """Multiply the weight, row by row, by the ratio of the gradients that the pixel losses and this one have at the
    decoder's last layer (VQGAN, arXiv 2012.09841, equation 7)."""
    channels: list[int] = Field(default=[64, 128, 256], min_length=1)
    """Of convolutions, each of which halves the picture."""
    norm_groups: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "AdversarialConfig":
        wrong = [channels for channels in self.channels[1:] if channels % self.norm_groups]
        if wrong:
            raise ValueError(f"channels {wrong} are no multiples of norm_groups {self.norm_groups}")
        return self


class SparAlignmentConfig(VisualLatentsConfig):
    """SPAR's alignment: the language model's layers, mixed for each query by Dynamic Token Routing (the stage's section
    routing; the last layer without it), say what the vision encoder sees (arXiv 2606.23041)."""

    name: Literal["spar_alignment"]
    balance_weight: float = Field(default=0.01, ge=0)
    """Of the routers' choices, see ``models/backbone/routing.py``; the text gives none."""


class SelfAlignmentConfig(RepresentationAlignmentConfig):
    """The same for SPAR: "leverages the unified tokenizer as an internal alignment teacher" (arXiv 2606.23041). The
    text gives neither layer, weight nor distance; those here are REPA's."""

    teacher: Literal["internal", "external"] = "internal"
    """``internal``: what the tokenizer's semantic stream has of the picture; ``external``: what the base model's vision
    encoder sees, as in REPA."""


class SparConfig(PathwayDiffusionConfig):
    """SPAR's joint training and fine-tuning: a diffusion transformer draws in the tokenizer's latent space, from what
    Dynamic Token Routing mixes of the language model's layers at every word and query (arXiv 2606.23041)."""

    name: Literal["spar"]
    alignment: SelfAlignmentConfig | None = SelfAlignmentConfig()
    """null for none."""


class SparTokenizerConfig(Section):
    """SPAR's first stage: the dual-stream tokenizer on pictures (arXiv 2606.23041)."""

    name: Literal["spar_tokenizer"]
    trunk: ClassVar[Trunk] = "tokenizer"
    query_section: ClassVar[Literal["", "queries", "hieraquery"]] = ""
    looks_back: ClassVar[bool] = False
    loss_weights: TokenizerLossWeights = TokenizerLossWeights()
    perceptual_layers: list[int] = Field(default_factory=list)
    """Zero-based layers of the vision encoder whose outputs the perceptual loss compares, beside its visual tokens."""
    adversarial: AdversarialConfig | None = None

    def tensor_sharded(self, hidden_size: int) -> dict[str, int]:
        """Nothing beyond the tokenizer."""
        return {}


METHODS: dict[str, type[Section]] = {
    "orion": OrionConfig,
    "orion_decoder": OrionDecoderConfig,
    "mmcore": MMCoreConfig,
    "mmcore_diffusion": MMCoreDiffusionConfig,
    "mmcore_policy": MMCorePolicyConfig,
    "hieraquery": HieraQueryConfig,
    "spar_tokenizer": SparTokenizerConfig,
    "spar_alignment": SparAlignmentConfig,
    "spar": SparConfig,
}
"""By name."""


def _orion_by_default(value: Any) -> Any:
    """Recipes of ORION's own stages may leave the name out."""
    return {"name": "orion", **value} if isinstance(value, dict) else value


AnyMethod = (
    OrionConfig
    | OrionDecoderConfig
    | MMCoreConfig
    | MMCoreDiffusionConfig
    | MMCorePolicyConfig
    | HieraQueryConfig
    | SparTokenizerConfig
    | SparAlignmentConfig
    | SparConfig
)
MethodConfig = Annotated[Annotated[AnyMethod, Field(discriminator="name")], BeforeValidator(_orion_by_default)]
