"""What stands between pictures and the latents that a stage's diffusion transformer draws: a VAE of diffusers, or the
stage's own tokenizer."""

from megatron_unimm.config.mmdit import TokenizerSpaceConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.models.specs import layers_backend
from megatron_unimm.models.tokenizer.codec import TokenizerCodec
from megatron_unimm.models.tokenizer.model import Layers
from megatron_unimm.models.vae import Autoencoder, build_vae
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


def build_autoencoder(stage: StageConfig, platform: Platform, groups: ParallelGroups) -> Autoencoder:
    """It, frozen, with random weights, whole on this pipeline stage."""
    assert stage.generator is not None
    space = stage.generator.vae
    assert space is not None
    if not isinstance(space, TokenizerSpaceConfig):
        return build_vae(space).requires_grad_(False)
    assert stage.tokenizer is not None
    system = stage.system.model_copy(update={"precision": stage.system.precision.model_copy(update={"fp8": None})})
    backend = layers_backend(stage.system.layers, platform, fp8=False)
    layers = Layers(system, platform, backend, groups.alone())
    return TokenizerCodec(stage.tokenizer, stage.model.vision_encoder, layers).requires_grad_(False)
