"""Reward of a SigLIP model (arXiv 2303.15343): how well picture and text fit together.

Layout  n pictures, E the width of the shared embeddings. The model is transformers', from local files, float32, frozen
        and whole on every rank: each scores its own pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, SiglipConfig, SiglipModel

from megatron_unimm.errors import ConfigError
from megatron_unimm.rewards.reward import Float64, RewardPrompt


class SiglipReward:
    """The cosine of the embeddings of picture and text, or the probability that they belong together.

    Texts are padded and cut to the length of the model's text tower, as it was trained.

    Args:
        where: the reward's place in the recipe, for messages.
        path: folder of the whole model.
        batch_size: pictures that are looked at together.
        device: where the model lives.

    Raises:
        ConfigError: the folder holds no such model.
    """

    def __init__(
        self,
        where: str,
        path: str | Path,
        value: Literal["cosine", "probability"],
        batch_size: int,
        device: torch.device,
    ) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(
                f"{where}.path", f"no such folder: {path}; give the Hugging Face folder of a SigLIP model"
            )
        self.value = value
        self.batch_size = batch_size
        self.device = device
        local = {"trust_remote_code": False, "local_files_only": True}
        try:
            kind = AutoConfig.from_pretrained(str(folder), **local).model_type
            if kind != SiglipConfig.model_type:
                raise ConfigError(
                    f"{where}.path",
                    f"{path} holds a model of type {kind}, wanted siglip: both towers, of one resolution",
                )
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), **local)
            # Pillow's resizing: the published processors', and the same on every machine.
            self.processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **local)
            self.model = SiglipModel.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{where}.path",
                f"{path} is no folder of a whole SigLIP model: config.json, model.safetensors, tokenizer and "
                f"preprocessor_config.json ({error})",
            ) from error
        # transformers wraps the method in one that type checkers cannot follow.
        cast(nn.Module, self.model).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], prompts: Sequence[RewardPrompt]) -> Float64:
        values = [
            self._values(
                pictures[start : start + self.batch_size],
                [prompt.text for prompt in prompts[start : start + self.batch_size]],
            )
            for start in range(0, len(pictures), self.batch_size)
        ]
        return torch.cat(values).double().cpu().numpy() if values else np.zeros(0)

    def _values(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Tensor:
        """``[n]`` of a batch. A group's pictures share their text, which is read once."""
        distinct = list(dict.fromkeys(texts))
        rows = torch.tensor([distinct.index(text) for text in texts], device=self.device)
        cosine = (self._of_pictures(pictures) * self._of_texts(distinct)[rows]).sum(dim=1)
        if self.value == "cosine":
            return cosine
        return torch.sigmoid(cosine * self.model.logit_scale.exp() + self.model.logit_bias)

    def _of_pictures(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Embeddings ``[n, E]`` of length 1."""
        pixels = self.processor(images=list(pictures), return_tensors="pt", input_data_format="channels_last")
        return _unit(self.model.vision_model(pixel_values=pixels["pixel_values"].to(self.device)).pooler_output)

    def _of_texts(self, texts: list[str]) -> Tensor:
        """Embeddings ``[n, E]`` of length 1."""
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.model.text_model.config.max_position_embeddings,
            return_tensors="pt",
        )
        return _unit(self.model.text_model(**tokens.to(self.device)).pooler_output)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
