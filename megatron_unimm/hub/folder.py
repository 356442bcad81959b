"""An exported folder of a model that draws: its parts, checked against one another, in float32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from megatron_unimm.checkpoint.folder import LANGUAGE_MODEL
from megatron_unimm.config.data import DataConfig
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.mmdit import FluxConfig, ImageGeneratorConfig, Sd3Config
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert.pipeline import TRANSFORMER, VAE
from megatron_unimm.convert.reader import read_config
from megatron_unimm.convert.source import HfModel
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.errors import CheckpointError
from megatron_unimm.hub.denoiser import Denoiser
from megatron_unimm.hub.language_model import LanguageModel, PutQueries

WEIGHTS = "model.safetensors"
PartT = TypeVar("PartT", bound=nn.Module)
LOADING = {"torch_dtype": torch.float32, "local_files_only": True, "low_cpu_mem_usage": False}


@dataclass(frozen=True)
class ExportedFolder:
    """What a folder says that it holds."""

    path: Path
    device: str
    generator: ImageGeneratorConfig
    spoken: ModelConfig
    """Its language model."""
    parts: dict[str, dict[str, Any]]
    """Our own parts, and how they are built."""
    settings: dict[str, Any]
    """How conversations become conditions and pictures (``convert/parts.py``)."""

    @classmethod
    def open(cls, path: Path, device: str, method: str, part: str) -> "ExportedFolder":
        """Compare a folder tensor by tensor with what it says.

        Args:
            method: that exported it, for errors.
            part: one of that method's own, which says how to draw.

        Raises:
            CheckpointError: it is incomplete, damaged, or of something else.
        """
        what = f"is no exported {method}"
        with HfModel(path) as found:
            generator, spoken = found.model.config, found.language_model and found.language_model.config
            if not isinstance(generator, ImageGeneratorConfig) or not isinstance(spoken, ModelConfig):
                raise CheckpointError(str(path), f"{what}: it has no language model beside a transformer")
            if generator.vae is None or part not in found.parts:
                raise CheckpointError(str(path), f"{what}: it has no {part}, or no VAE")
            settings = found.parts[part]
        if "sampler" not in settings:
            what = "does not say how to draw; export the checkpoint of a training run"
            raise CheckpointError(str(path / part), what)
        return cls(path, device, generator, spoken, found.parts, settings)

    @property
    def sampler(self) -> SamplerConfig:
        """What the checkpoint's recipe draws with."""
        return SamplerConfig.model_validate(self.settings["sampler"])

    def chat(self) -> ChatFormat:
        """How conversations are told to the language model.

        Raises:
            ConfigError: its tokenizer does not fit its language model.
        """
        tokenizer = ChatTokenizer(self.path / LANGUAGE_MODEL, self.spoken)
        return ChatFormat(tokenizer, self.spoken.vision_encoder, DataConfig.model_validate(self.settings["data"]))

    def language_model(self, put_queries: PutQueries) -> LanguageModel:
        """
        Raises:
            CheckpointError: transformers has no class for it.
        """
        folder = self.path / LANGUAGE_MODEL
        name = read_config(folder).get("model_type")
        if name not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            what = f"is of model_type {name}, which transformers has no class for; draw with `unimm generate`"
            raise CheckpointError(str(folder), what)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        return LanguageModel(self._ready(model), self.spoken.vision_encoder, put_queries)

    def denoiser(self) -> Denoiser:
        """The diffusion transformer.

        Raises:
            CheckpointError: it is of a family that only `unimm generate` draws with.
        """
        mmdit = self.generator.mmdit
        if not isinstance(mmdit, Sd3Config | FluxConfig):
            what = f"is of the family {mmdit.family}, which no pipeline here draws with; draw with `unimm generate`"
            raise CheckpointError(str(self.path / TRANSFORMER), what)
        kind = FluxTransformer2DModel if isinstance(mmdit, FluxConfig) else SD3Transformer2DModel
        transformer = self._ready(kind.from_pretrained(self.path / TRANSFORMER, **LOADING))
        embedding = self.weights("frame_embedding")["weight"] if isinstance(mmdit, Sd3Config) else None
        return Denoiser(transformer, self.generator, embedding, self.settings["embedded_guidance"])

    def vae(self) -> AutoencoderKL:
        vae = self._ready(AutoencoderKL.from_pretrained(self.path / VAE, **LOADING))
        vae.enable_tiling()  # as models/vae.py
        return vae

    def weights(self, part: str) -> dict[str, Tensor]:
        """Of one of our own parts."""
        return {name: tensor.float().to(self.device) for name, tensor in load_file(self.path / part / WEIGHTS).items()}

    def filled(self, module: PartT, part: str) -> PartT:
        """With a part's weights, to be computed with."""
        module.load_state_dict(self.weights(part))
        return self._ready(module)

    def _ready(self, model: Any) -> Any:
        return model.eval().to(self.device)
