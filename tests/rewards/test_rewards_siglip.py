"""The SigLIP reward against transformers' own forward, on a tiny random model with a tiny tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    BertConfig,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_unimm.errors import ConfigError
from megatron_unimm.rewards.reward import RewardPrompt
from megatron_unimm.rewards.siglip import SiglipReward

WORDS = ["<pad>", "<unk>", "a", "red", "blue", "circle", "square", "left", "of"]
TEXTS = ["a red circle", "a blue square", "a red circle", "a blue square left of a red circle of a red circle", "what"]
LENGTH = 8
CPU = torch.device("cpu")
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            text_config={**TINY, "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "projection_size": 32},
            vision_config={**TINY, "image_size": 32, "patch_size": 8},
        )
    )
    with torch.no_grad():
        # Far enough apart that pairs differ; transformers starts with embeddings that nearly coincide.
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.0)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_input_names=["input_ids"]
    ).save_pretrained(path)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Of several sizes, one of them not square."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [(32, 32), (64, 64), (40, 24), (32, 32), (50, 50)]]


def prompts(texts: list[str] = TEXTS) -> list[RewardPrompt]:
    return [RewardPrompt(text) for text in texts]


@pytest.fixture(scope="module")
def theirs(folder: Path, pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and probabilities of the pairs, from SiglipModel.forward."""
    model = SiglipModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    texts = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        out = model(**texts, **processor(images=pictures, return_tensors="pt"))
    return (out.image_embeds @ out.text_embeds.T).diagonal().numpy(), out.logits_per_image.sigmoid().diagonal().numpy()


@pytest.mark.parametrize("batch_size", [2, 32])
def test_values_of_transformers(
    folder: Path, pictures: list[np.ndarray], theirs: tuple[np.ndarray, np.ndarray], batch_size: int
) -> None:
    """Largest difference measured: 1.2e-7."""
    for value, expected in zip(("cosine", "probability"), theirs, strict=True):
        ours = SiglipReward("rewards.s", folder, value, batch_size, CPU)(pictures, prompts())  # type: ignore[arg-type]
        assert ours.dtype == np.float64
        print(f"\n{value}: {ours}, largest difference {abs(ours - expected).max():.1e}")
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        assert np.ptp(expected) > 0.01, "the pairs hardly differ, so the test says nothing"


def test_order_and_number(folder: Path, pictures: list[np.ndarray]) -> None:
    reward = SiglipReward("rewards.s", folder, "cosine", 2, CPU)
    forward = reward(pictures, prompts())
    backward = reward(pictures[::-1], prompts()[::-1])
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-6)
    assert reward([], []).shape == (0,)


def test_it_is_frozen(folder: Path) -> None:
    model = SiglipReward("rewards.s", folder, "cosine", 2, CPU).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards.s.path: no such folder: google/siglip"):
        SiglipReward("rewards.s", "google/siglip-base-patch16-224", "cosine", 2, CPU)
    with pytest.raises(ConfigError, match="is no folder of a whole SigLIP model"):
        SiglipReward("rewards.s", tmp_path, "cosine", 2, CPU)


def test_folder_of_something_else(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="holds a model of type bert, wanted siglip"):
        SiglipReward("rewards.s", tmp_path, "cosine", 2, CPU)


@pytest.mark.parametrize("absent", ["tokenizer.json", "preprocessor_config.json", "model.safetensors"])
def test_folder_of_a_part(folder: Path, tmp_path: Path, absent: str) -> None:
    for file in folder.iterdir():
        if file.name != absent:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="is no folder of a whole SigLIP model"):
        SiglipReward("rewards.s", tmp_path, "cosine", 2, CPU)
