"""The policy as the shared loop sees it. Its loader gives prompts; what it trains on is drawn of them
(``train/rollout.py``)."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_unimm.config.methods import MMCorePolicyConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.prompts import PromptSample, PromptWork
from megatron_unimm.methods.drawing.frames import model_parts, num_vectors, travelling_rows
from megatron_unimm.methods.drawing.method import floats, timestep_vectors
from megatron_unimm.methods.drawing.model import PictureInput
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.methods.mmcore.diffusion.model import ConditionInput
from megatron_unimm.methods.mmcore.policy.losses import TERMS
from megatron_unimm.methods.mmcore.policy.model import MMCorePolicyModel, PolicyBatch, PolicyInput
from megatron_unimm.methods.mmcore.policy.rows import PolicyRow
from megatron_unimm.methods.vlm.queries import frozen_vlm
from megatron_unimm.models.mmdit.canvas import Canvas, Place
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform


class MMCorePolicy:
    """The policy for one stage: see ``methods/interface.py`` for the contract."""

    terms: tuple[str, ...] = TERMS
    weights: tuple[float, ...]

    def __init__(self, stage: StageConfig, platform: Platform, groups: ParallelGroups) -> None:
        assert isinstance(stage.method, MMCorePolicyConfig)
        assert stage.generator is not None
        self.stage = stage
        self.grpo = stage.method.grpo
        self.generator = stage.generator
        self.platform = platform
        self.groups = groups
        self.frozen = frozen_vlm(stage)
        self.weights = (1.0, self.grpo.kl_weight, 0.0, 0.0, 0.0)

    def build(self, virtual_stage: int, with_base: bool = True) -> MMCorePolicyModel:
        # Nothing is compared with pictures, so that the last stage needs no VAE.
        stage = self.stage.model_copy(update={"data": self.stage.data.model_copy(update={"latent_cache": "none"})})
        return MMCorePolicyModel(stage, self.platform, self.groups, self.frozen, virtual_stage)

    def work(self, data: DataSetup) -> PromptWork:
        """Prompts."""
        return PromptWork(frame_work(self.stage, data))

    def travelling_rows(self) -> int:
        return travelling_rows(self.stage)

    def base_parts(self) -> dict[str, Path]:
        return {}

    def model_parts(self) -> dict[str, Path]:
        return model_parts(self.stage)

    def counts(self, rows: Sequence[PolicyRow]) -> list[int]:
        """Pairs of a sample and a step."""
        return [sum(row.num_pairs for row in rows)] * len(TERMS)

    def batch(self, row: PolicyRow, model: MMCorePolicyModel, device: torch.device) -> PolicyBatch:
        place = model.place(num_vectors(self.stage))
        canvas = Canvas.build(row.frames, row.num_text, row.num_tokens, self.generator, place)
        at_an_end = model.pre_process or model.post_process
        state = row.state.to(place.device)
        return PolicyBatch(
            canvas=canvas,
            timestep=timestep_vectors(row.timestep, canvas, place),
            pictures=PictureInput(None, state, [], state) if at_an_end else None,
            loss=None,
            condition=_condition(row, place) if model.pre_process else None,
            policy=_policy(row, place) if model.post_process else None,
        )

    def row_flops(self, row: Any) -> float:
        return 0.0

    def sample_flops(self, sample: PromptSample) -> float:
        """All prompts cost about the same."""
        return 0.0

    def part_configs(self) -> dict[str, Any]:
        assert self.stage.queries is not None
        return {"queries": self.stage.queries.model_dump(mode="json"), "pathways": {}}


def _condition(row: PolicyRow, place: Place) -> ConditionInput:
    return ConditionInput(
        conversation=None,
        word_index=None,
        order=torch.from_numpy(row.condition_order).to(place.device),
        text_kept=floats(row.text_kept, place),
        visual_kept=floats(row.visual_kept, place),
        words=None if row.words is None else row.words.to(place.device, place.dtype),
        latents=None if row.latents is None else row.latents.to(place.device, place.dtype),
    )


def _policy(row: PolicyRow, place: Place) -> PolicyInput:
    values: dict[str, Any] = {field.name: vars(row)[field.name] for field in fields(PolicyInput)}
    return PolicyInput(**{name: _on_device(value, place.device) for name, value in values.items()})


def _on_device(value: Tensor | np.ndarray | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    tensor = (torch.from_numpy(value) if isinstance(value, np.ndarray) else value).to(device)
    return tensor.float() if tensor.dtype == torch.float64 else tensor
