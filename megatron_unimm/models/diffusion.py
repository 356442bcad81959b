"""The one place that chooses a diffusion transformer by its family."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_unimm.config.mmdit import MMDiT as MMDiTSection
from megatron_unimm.config.mmdit import SanaConfig
from megatron_unimm.models.mmdit.model import MMDiT
from megatron_unimm.models.mmdit.trunk import DiffusionTransformer
from megatron_unimm.models.sana.model import Sana


def build_diffusion_transformer(
    model: MMDiTSection,
    config: TransformerConfig,
    backend: str,
    groups: ProcessGroupCollection,
    pre_process: bool = True,
    post_process: bool = True,
    virtual_stage: int | None = None,
    tap_after: int | None = None,
) -> DiffusionTransformer:
    """One pipeline stage. ``backend``: see ``models/specs.py``; ``tap_after``: ``models/mmdit/trunk.py``."""
    rest = (config, backend, groups, pre_process, post_process, virtual_stage, tap_after)
    return Sana(model, *rest) if isinstance(model, SanaConfig) else MMDiT(model, *rest)
