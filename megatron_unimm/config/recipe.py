"""A recipe: named stages, each a full description of one training run."""

from pydantic import Field, model_validator

from megatron_unimm.config.base import Section
from megatron_unimm.config.data import DataConfig
from megatron_unimm.config.hieraquery import MultiScaleConfig
from megatron_unimm.config.methods import (
    HieraQueryConfig,
    MethodConfig,
    SparAlignmentConfig,
    SparConfig,
    SparTokenizerConfig,
)
from megatron_unimm.config.mmdit import ImageGeneratorConfig, TokenizerSpaceConfig
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.config.parallel import SystemConfig
from megatron_unimm.config.queries import PictureScales, QueryVlmConfig
from megatron_unimm.config.routing import RoutingConfig
from megatron_unimm.config.tokenizer import TokenizerConfig
from megatron_unimm.config.train import TrainConfig


class StageConfig(Section):
    """One stage, complete: what stands at the top of a recipe file, overridden by the stage's own part."""

    name: str
    """The stage's name, from its key under ``stages``."""
    model: ModelConfig
    generator: ImageGeneratorConfig | None = None
    """What draws, for stages that train it."""
    queries: QueryVlmConfig | None = None
    """What makes of the language model one that predicts visual latents, for methods that do."""
    hieraquery: MultiScaleConfig | None = None
    """What makes of it one that says what to draw at several scales, for the method of that name."""
    tokenizer: TokenizerConfig | None = None
    """Between pictures and latents, for methods that make their own."""
    routing: RoutingConfig | None = None
    """Mixes the language model's layers for every token, for methods that read the mixture; null for the last layer."""
    method: MethodConfig
    data: DataConfig = DataConfig()
    train: TrainConfig
    system: SystemConfig = SystemConfig()
    after: str | None = None
    """The stage whose last checkpoint this one starts from; null starts from the base model."""
    base_checkpoint: str = ""
    """Imported base model (``unimm convert import``): start of the first stage, and the frozen teacher of all."""
    generator_checkpoint: str = ""
    """Imported image generator: start of the first stage that trains it, and the frozen VAE of all. May be left out
    where the diffusion transformer begins anew, in the latent space of a tokenizer."""
    tokenizer_checkpoint: str = ""
    """A trained tokenizer (its stage's folder, or a checkpoint), for stages that draw in its latent space."""

    @model_validator(mode="after")
    def _check(self) -> "StageConfig":
        section = self.method.query_section
        if section and {"queries": self.queries, "hieraquery": self.hieraquery}[section] is None:
            raise ValueError(f"method {self.method.name} has query tokens; give its section {section} ({{}} will do)")
        if self.method.trunk == "mmdit":
            if self.generator is None:
                raise ValueError(f"method {self.method.name} trains an image generator; give its section generator")
            if self.generator.vae is None:
                raise ValueError(f"method {self.method.name} draws through a VAE; give its section generator.vae")
            if self.method.looks_back and not self.generator.mmdit.looks_back:
                by_itself = isinstance(self.method, HieraQueryConfig)
                raise ValueError(
                    f"method {self.method.name} shows a picture those before it, which generator.mmdit.family "
                    f"{self.generator.mmdit.family} cannot; take sd3 or flux"
                    f"{', or set method.shows_sources to false' if by_itself else ''}"
                )
            if isinstance(self.generator.vae, TokenizerSpaceConfig):
                self._check_latent_space(self.generator.vae)
            if self.data.drawing_size is None:
                raise ValueError(f"method {self.method.name} draws pictures; give their size, data.drawing_size")
        if isinstance(self.method, SparConfig):
            assert self.generator is not None
            if not isinstance(self.generator.vae, TokenizerSpaceConfig):
                what = "draws in a tokenizer's latent space; give generator.vae family: tokenizer"
                raise ValueError(f"method {self.method.name} {what}")
        if isinstance(self.method, HieraQueryConfig | SparConfig) and self.method.alignment is not None:
            assert self.generator is not None
            layer, count = self.method.alignment.layer, self.generator.mmdit.num_blocks
            if layer > count:
                raise ValueError(f"method.alignment.layer is {layer}, but generator.mmdit has {count} layers")
        if self.tokenizer is not None:
            self.tokenizer.check(self.model.vision_encoder)
        if self.routing is not None:
            if not isinstance(self.method, SparAlignmentConfig | SparConfig):
                raise ValueError(f"routing is set, but method {self.method.name} reads the last layer; set it to null")
            self.routing.mixed(self.model.backbone.num_layers)
        if isinstance(self.method, SparTokenizerConfig):
            self._check_tokenizer(self.method)
        return self

    def _check_latent_space(self, space: TokenizerSpaceConfig) -> None:
        if not isinstance(self.method, SparConfig):
            raise ValueError(f"generator.vae.family is tokenizer, in whose space method {self.method.name} cannot draw")
        if self.tokenizer is None:
            raise ValueError("generator.vae.family is tokenizer; give the section tokenizer")
        side, channels = self.model.vision_encoder.token_pixels, self.tokenizer.latent_channels
        if space.pixels_per_latent != side:
            raise ValueError(
                f"generator.vae.pixels_per_latent is {space.pixels_per_latent}, but a visual token of "
                f"model.vision_encoder covers {side}; make it {side}"
            )
        if space.latent_channels != channels:
            raise ValueError(
                f"generator.vae.latent_channels is {space.latent_channels}, but tokenizer.latent_channels {channels}; "
                "make them equal"
            )

    def _check_tokenizer(self, method: SparTokenizerConfig) -> None:
        if self.tokenizer is None:
            raise ValueError(f"method {method.name} trains a tokenizer; give its section tokenizer ({{}} will do)")
        caches = [name for name in ("feature_cache", "latent_cache", "condition_cache") if vars(self.data)[name]]
        if caches:
            raise ValueError(f"method {method.name} reads pixels; leave data.{caches[0]} empty")
        layers, number = method.perceptual_layers, self.model.vision_encoder.num_layers
        if layers != sorted(set(layers)) or any(not 0 <= layer < number for layer in layers):
            raise ValueError(f"method.perceptual_layers {layers} must ascend and lie in 0..{number - 1}")

    @property
    def scales(self) -> PictureScales:
        """At which a method with query tokens draws pictures."""
        if self.hieraquery is not None and self.method.query_section == "hieraquery":
            return self.hieraquery.picture_scales
        assert self.queries is not None
        return self.queries.scales


class Recipe(Section):
    """A recipe file, resolved."""

    name: str
    stages: dict[str, StageConfig] = Field(min_length=1)
    """Stages in the order in which they run."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        for key, stage in self.stages.items():
            if stage.name != key:
                raise ValueError(f"stage {key} calls itself {stage.name}; make them the same")
            if stage.after is not None and stage.after not in self.stages:
                raise ValueError(f"stages.{key}.after is {stage.after}, but the stages are {', '.join(self.stages)}")
            if key in self.stages_before(stage.after):
                raise ValueError(f"stages.{key}.after leads back to {key}; the chain needs a first stage (after: null)")
        return self

    def stages_before(self, name: str | None) -> list[str]:
        """The chain of stages that leads to ``name``, last first and ``name`` itself included."""
        chain: list[str] = []
        while name is not None and name in self.stages and name not in chain:
            chain.append(name)
            name = self.stages[name].after
        return chain
