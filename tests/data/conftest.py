"""A tiny tokenizer and model configuration, and helpers that write conversation files."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_unimm.config.data import DataConfig, ImageSizeConfig
from megatron_unimm.config.model import BackboneConfig, ModelConfig, Qwen25VisionConfig, TokenIds
from megatron_unimm.data.chat import SPECIAL_TOKENS, ChatFormat, ChatTokenizer

# As Qwen2.5-VL's template writes text and images (tools and videos left out).
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE whose roles are one token each, saved as a Hugging Face folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["system user assistant You are a helpful", "system", "user", "assistant", "red", "blue"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(words * 20, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS.values()])
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL_TOKENS["pad"])
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tokenizer_folder: Path) -> ModelConfig:
    """A tiny model with Qwen2.5-VL's patch geometry and the tiny tokenizer's special tokens."""
    backend = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    token_ids = {field: backend.token_to_id(text) for field, text in SPECIAL_TOKENS.items()}
    return ModelConfig(
        vision_encoder=Qwen25VisionConfig(
            family="qwen2_5", num_layers=1, hidden_size=32, num_heads=2, mlp_size=32, out_size=32
        ),
        backbone=BackboneConfig(
            num_layers=1,
            hidden_size=32,
            num_heads=2,
            num_kv_heads=1,
            head_size=16,
            mlp_size=32,
            vocab_size=512,
            mrope_sections=[2, 3, 3],
        ),
        token_ids=TokenIds(**token_ids),
    )


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path, model: ModelConfig) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_folder, model)


@pytest.fixture(scope="session")
def make_chat(tokenizer: ChatTokenizer, model: ModelConfig) -> Callable[..., ChatFormat]:
    """Builds a ChatFormat; keywords override fields of DataConfig."""

    def make(**settings: object) -> ChatFormat:
        defaults = {
            "generation_size": ImageSizeConfig(min_side=56, max_side=56),
            "understanding_size": ImageSizeConfig(min_side=28, max_side=112),
            "sequence_length": 256,
        }
        return ChatFormat(tokenizer, model.vision_encoder, DataConfig(decoder="pillow", **{**defaults, **settings}))

    return make


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Writes a random RGB image of a given width and height."""

    def write(path: Path, width: int = 56, height: int = 56, seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def write_jsonl() -> Callable[[Path, list], Path]:
    """Writes items as JSON lines; a text is written as it is."""

    def write(path: Path, items: list) -> Path:
        path.write_text("".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in items))
        return path

    return write
