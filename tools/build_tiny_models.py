"""Builds the tiny base VLM: a Qwen2.5-VL trained from scratch on the Shapes world, with plain transformers, on a CPU.

It plays the part of the pretrained checkpoint that the papers start from: it reads pictures and prompts, and has never
made a picture.

    python tools/build_tiny_models.py --to tools/base_models/shapes_vlm
    python tools/build_tiny_models.py --to BETTER --from tools/base_models/shapes_vlm    # goes on with its weights

Its conversations ask what pictures show and where, and what a picture would show after an edit, in words: what a
pretrained model knows before it learns to draw.

Two stages. The vision encoder first learns to tell what each visual token shows and where (by a linear layer on its
merged features, thrown away later): a cheap start that makes the features say colour, shape, size and place. Then all
weights learn conversations, with that first loss kept at a small weight.

Legend  B samples, L tokens, N images, P patches of an image (64), V visual tokens of an image (16), H hidden size.
With --steps the result depends on the seed, the number of threads and the versions of the libraries only; --minutes
fits the number of steps to the machine and is not repeatable.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention, apply_rotary_pos_emb_vision

from megatron_unimm.data.shapes import (
    COLOURS,
    SHAPES,
    Scene,
    ShapeObject,
    heldout_questions,
    make_conversation,
    render_array,
)
from megatron_unimm.data.shapes.conversations import free_scene, generator
from megatron_unimm.data.shapes.prompts import prompt_scene, sample_prompt
from megatron_unimm.data.shapes.scene import CANVAS, CELLS, SIZES, cell_of, pick
from megatron_unimm.data.shapes.text import (
    BRIEF_REQUESTS,
    IMAGE_MARK,
    at_cell,
    detailed_caption,
    joined,
    reading_order,
    request,
    with_article,
)

SYSTEM_PROMPT = "You are a helpful assistant."
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCAB_SIZE = 640
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5-VL's template, without its option to number the pictures."""

PATCH, MERGE, TEMPORAL = 8, 2, 2
GRID = CANVAS // PATCH
VISUAL_TOKENS = (GRID // MERGE) ** 2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IGNORED = -100


def model_config(ids: dict[str, int]) -> Qwen2_5_VLConfig:
    """The architecture; `ids` are the special tokens'."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 96,
            "num_heads": 4,
            "intermediate_size": 264,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "window_size": 32,
            "fullatt_block_indexes": [0, 2],
            "out_hidden_size": 128,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


# --- data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialogue:
    """A conversation as the base reads it: (human or gpt, text) turns and what its images show."""

    turns: tuple[tuple[str, str], ...]
    scenes: tuple[Scene, ...]


def _read_prompts(rng: np.random.Generator) -> Dialogue:
    """Text only: three requests for a picture, each answered by a description of the picture that the caption fixes."""
    turns: list[tuple[str, str]] = []
    for _ in range(3):
        prompt = sample_prompt(rng)
        turns += [("human", request(prompt.caption, rng)), ("gpt", detailed_caption(prompt_scene(prompt)))]
    return Dialogue(tuple(turns), ())


def _caption_prompt_picture(rng: np.random.Generator) -> Dialogue:
    """The picture of a prompt, answered by the prompt's caption and a detailed one."""
    prompt = sample_prompt(rng)
    scene = prompt_scene(prompt, rng)
    detailed = ("human", "Describe the image in detail."), ("gpt", detailed_caption(scene))
    short = BRIEF_REQUESTS[int(rng.integers(len(BRIEF_REQUESTS)))]
    return Dialogue((("human", IMAGE_MARK + short), ("gpt", prompt.caption), *detailed), (scene,))


def _ask_for_places(rng: np.random.Generator) -> Dialogue:
    """Six questions where something is in a picture, or what is at a place (half of the places hold something)."""
    scene = free_scene(rng, "train")
    found: dict[str, str] = {}
    while len(found) < 6:
        item = pick(rng, scene.objects)
        if rng.random() < 0.3:
            places = [at_cell(cell_of(other)) for other in reading_order(scene) if other.name == item.name]
            found[f"Where is the {item.name}?"] = joined(places)
        else:
            cell = cell_of(item) if rng.random() < 0.5 else pick(rng, CELLS)
            here = [f"{other.size} {other.name}" for other in reading_order(scene) if cell_of(other) == cell]
            found[f"What is {at_cell(cell)}?"] = joined([with_article(words) for words in here]) if here else "nothing"
    turns = [turn for question, answer in found.items() for turn in (("human", question), ("gpt", answer))]
    turns[0] = ("human", IMAGE_MARK + turns[0][1])
    return Dialogue(tuple(turns), (scene,))


def _describe_edits(seed: int, index: int) -> Dialogue:
    """A conversation in which pictures are edited; each is described where it would be drawn."""
    found = make_conversation("editing", seed, index)
    drawn = iter(found.scenes[sum(value.count(IMAGE_MARK) for who, value in found.turns if who == "human") :])
    turns = tuple(
        (who, detailed_caption(next(drawn)) if who == "gpt" and value == IMAGE_MARK else value)
        for who, value in found.turns
    )
    return Dialogue(turns, tuple(found.scenes[: sum(value.count(IMAGE_MARK) for _, value in turns)]))


def dialogue(seed: int, index: int) -> Dialogue:
    """Training sample `index`. Of twelve, one is text only, one captions a prompt's picture, two ask for places, three
    describe edits; the others are the world's conversations about pictures."""
    rng = generator(seed, index, 21)
    kind = index % 12
    if kind == 0:
        return _read_prompts(rng)
    if kind == 6:
        return _caption_prompt_picture(rng)
    if kind in (3, 9):
        return _ask_for_places(rng)
    if kind in (1, 5, 10):
        return _describe_edits(seed, index)
    found = make_conversation("understanding", seed, index)
    return Dialogue(found.turns, found.scenes)


@dataclass(frozen=True)
class Encoded:
    """A dialogue as tokens."""

    ids: list[int]
    """[L]."""
    labels: list[int]
    """[L]: the token that each position predicts, or IGNORED."""
    scenes: tuple[Scene, ...]


class DialogueEncoder:
    """Writes dialogues as ChatML tokens, the loss on the assistant's words and the token that ends its turn."""

    def __init__(self, tokenizer: Qwen2TokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.text: dict[str, list[int]] = {}

    def ids_of(self, text: str) -> list[int]:
        """Tokens of a text without special tokens, remembered: the world has few different sentences."""
        if text not in self.text:
            self.text[text] = self.tokenizer.encode(text)
        return self.text[text]

    def __call__(self, sample: Dialogue) -> Encoded:
        image = f"<|vision_start|>{'<|image_pad|>' * VISUAL_TOKENS}<|vision_end|>"
        ids = list(self.ids_of(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"))
        counted = [False] * len(ids)
        for who, value in sample.turns:
            role = "user" if who == "human" else "assistant"
            head, end = self.ids_of(f"<|im_start|>{role}\n"), self.ids_of("<|im_end|>")
            body = [token for _ in range(value.count(IMAGE_MARK)) for token in self.ids_of(image)]
            body += self.ids_of(value.replace(IMAGE_MARK, ""))
            line = self.ids_of("\n")
            ids += [*head, *body, *end, *line]
            learned = who == "gpt"
            counted += [False] * len(head) + [learned] * (len(body) + len(end)) + [False] * len(line)
        labels = [t if c else IGNORED for t, c in zip(ids[1:], counted[1:], strict=True)] + [IGNORED]
        return Encoded(ids, labels, sample.scenes)


def to_patches(images: np.ndarray) -> Tensor:
    """Normalised patches in the order of the Qwen processors; uint8 [N, H, W, 3] -> float [N * P, 3 * 2 * 8 * 8]."""
    scaled = (images.astype(np.float32) / 255 - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD)
    blocks = GRID // MERGE
    split = scaled.reshape(len(images), blocks, MERGE, PATCH, blocks, MERGE, PATCH, 3)
    ordered = split.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # [N, rows, columns, MERGE, MERGE, 3, PATCH, PATCH]
    frames = np.repeat(ordered[:, :, :, :, :, :, None], TEMPORAL, axis=6)
    return torch.from_numpy(np.ascontiguousarray(frames).reshape(len(images) * GRID * GRID, -1))


POINTS = 2
"""Points along each side of a visual token whose object the vision encoder names."""
BINS = 16
"""Steps of an object's coordinates that the vision encoder tells apart."""
_LOOK = (len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1)
VISUAL_CLASSES = (*_LOOK * POINTS**2, *_LOOK, BINS + 1, BINS + 1, 2, GRID // MERGE, GRID // MERGE)
"""What the vision encoder tells about a visual token, as numbers of classes: colour, shape and size under each of its
points; those of its main object (the one that covers it most) and where along x and y the middle of that object is;
whether that middle is inside the token; the token's own row and column. 0 is background."""


def _look(item: ShapeObject) -> tuple[int, int, int]:
    """Classes of colour, shape and size."""
    return tuple(COLOURS).index(item.colour) + 1, SHAPES.index(item.shape) + 1, tuple(SIZES).index(item.size) + 1


def _shares(middle: float, extent: float, pieces: int) -> np.ndarray:
    """How much of each of `pieces` equal pieces of [0, 1] the interval middle +- extent covers; float [pieces]."""
    starts = np.arange(pieces) / pieces
    return (
        np.clip(np.minimum(starts + 1 / pieces, middle + extent) - np.maximum(starts, middle - extent), 0, None)
        * pieces
    )


def _scene_classes(scene: Scene) -> np.ndarray:
    """Classes of one scene's visual tokens; int64 [rows, columns, classes]."""
    side = GRID // MERGE
    points = np.zeros((side * POINTS, side * POINTS, 3), dtype=np.int64)
    main = np.zeros((side, side, 6), dtype=np.int64)
    most = np.full((side, side), 0.05)
    for item in scene.objects:
        rows, columns = (_shares(middle, item.extent, side * POINTS) > 0.5 for middle in (item.y, item.x))
        points[np.ix_(rows, columns)] = _look(item)
        share = _shares(item.y, item.extent, side)[:, None] * _shares(item.x, item.extent, side)[None, :]
        main[share > most] = (*_look(item), int(item.x * BINS) + 1, int(item.y * BINS) + 1, 0)
        main[int(item.y * side), int(item.x * side), 5] = 1
        most = np.maximum(most, share)
    inside = points.reshape(side, POINTS, side, POINTS, 3).transpose(0, 2, 1, 3, 4).reshape(side, side, -1)
    place = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)
    return np.concatenate([inside, main, place], axis=-1)


def visual_classes(scenes: list[Scene]) -> Tensor:
    """Classes of all visual tokens, in the order of the merged features; int64 [N * V, classes]."""
    return torch.from_numpy(np.stack([_scene_classes(scene) for scene in scenes])).flatten(0, 2)


def positions(ids: list[int], image_token: int) -> np.ndarray:
    """Multimodal rotary positions of one sequence (time, height, width); int64 [3, L]."""
    side = GRID // MERGE
    columns: list[tuple[int, int, int]] = []
    at = index = 0
    while index < len(ids):
        if ids[index] != image_token:
            columns.append((at, at, at))
            at, index = at + 1, index + 1
        else:
            columns += [(at, at + row, at + column) for row in range(side) for column in range(side)]
            at, index = at + side, index + VISUAL_TOKENS
    return np.array(columns, dtype=np.int64).T


@dataclass(frozen=True)
class Batch:
    """Samples padded on the right; causal attention keeps the padding from being seen."""

    ids: Tensor
    """int64 [B, L]."""
    labels: Tensor
    """int64 [B, L]."""
    positions: Tensor
    """int64 [3, B, L]."""
    patches: Tensor
    """float [N * P, patch size], all images in order."""
    scenes: list[Scene]


def collate(samples: list[Encoded], pad: int, image_token: int) -> Batch:
    """Pad samples to the longest."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), length), pad)
    labels = torch.full((len(samples), length), IGNORED)
    places = torch.zeros(3, len(samples), length, dtype=torch.int64)
    for row, sample in enumerate(samples):
        size = len(sample.ids)
        ids[row, :size] = torch.tensor(sample.ids)
        labels[row, :size] = torch.tensor(sample.labels)
        places[:, row, :size] = torch.from_numpy(positions(sample.ids, image_token))
    scenes = [scene for sample in samples for scene in sample.scenes]
    return Batch(ids, labels, places, to_patches(np.stack([render_array(scene) for scene in scenes])), scenes)


def batches(encode: DialogueEncoder, seed: int, size: int, make: Callable[[list[Encoded]], Batch]) -> Iterator[Batch]:
    """Endless batches of new samples; sixteen batches at a time are sorted by length, so that little is padded."""
    start = 0
    while True:
        pool = sorted((encode(dialogue(seed, start + i)) for i in range(16 * size)), key=lambda sample: len(sample.ids))
        order = generator(seed, start, 22).permutation(16)
        for part in order:
            yield make(pool[part * size : (part + 1) * size])
        start += 16 * size


# --- tokenizer -------------------------------------------------------------------------------------------


def build_tokenizer(seed: int) -> Qwen2TokenizerFast:
    """A byte-level BPE of the world's own sentences, with Qwen's special tokens after it."""
    corpus = ["system", "user", "assistant", "\n", SYSTEM_PROMPT]
    for index in range(6000):
        corpus += [value.replace(IMAGE_MARK, "") for _, value in dialogue(seed, index).turns]
        corpus += [v.replace(IMAGE_MARK, "") for _, v in make_conversation("editing", seed, index).turns]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    learned = json.loads(raw.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2TokenizerFast(
        vocab=learned["vocab"], merges=merges, bos_token=None, unk_token=None, pad_token=None, eos_token=None
    )
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    return tokenizer


# --- training --------------------------------------------------------------------------------------------


ATTENTION = "sdpa_float"


def float_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """Attention in float32 whatever autocast says: its backward pass in bf16 takes five times as long on a CPU."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)


def batched_attention(
    self: Qwen2_5_VLVisionAttention, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any
) -> Tensor:
    """Stands in for the vision attention's forward, which treats windows one by one.

    Here all images have one size, so the windows (or images) between `cu_seqlens` are a batch.
    """
    split = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1))  # [patches, 3, heads, H / heads]
    query, key = apply_rotary_pos_emb_vision(split[:, 0], split[:, 1], *position_embeddings)
    parts = [part.unflatten(0, (len(cu_seqlens) - 1, -1)).transpose(1, 2) for part in (query, key, split[:, 2])]
    with torch.autocast("cpu", enabled=False):
        mixed = nn.functional.scaled_dot_product_attention(*(part.float() for part in parts))
    return self.proj(mixed.transpose(1, 2).reshape(hidden_states.shape))


def grids(count: int) -> Tensor:
    """Patches along time, height and width of each image; int64 [N, 3]."""
    return torch.tensor([[1, GRID, GRID]]).expand(count, 3)


def visual_features(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Merged features of all images, [N * V, H]."""
    return model.model.visual(batch.patches, grid_thw=grids(len(batch.scenes))).pooler_output


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [K, vocabulary] and labels [K] at the positions that have a label."""
    embedded = model.model.language_model.embed_tokens(batch.ids)
    is_image = (batch.ids == model.config.image_token_id)[..., None]
    embedded = embedded.masked_scatter(is_image, features.to(embedded.dtype))
    hidden = model.model.language_model(inputs_embeds=embedded, position_ids=batch.positions, use_cache=False)[0]
    chosen = batch.labels != IGNORED
    return model.lm_head(hidden[chosen]), batch.labels[chosen]


HEAD_SCALE = 8.0
"""The features are multiplied by this before they are read, so that they stay about as small as they start. Otherwise
they grow a hundred times larger than the embeddings of words, and the language model hardly changes them."""


def visual_loss(head: nn.Linear, features: Tensor, scenes: list[Scene]) -> Tensor:
    """Mean cross entropy of what the features tell about their tokens."""
    classes = visual_classes(scenes)
    parts = head(HEAD_SCALE * features).float().split(VISUAL_CLASSES, -1)
    return torch.stack([nn.functional.cross_entropy(p, classes[:, k]) for k, p in enumerate(parts)]).mean()


def schedule(done: float, warmup: float = 0.04) -> float:
    """Share of the peak learning rate after a share `done` of the stage: linear warm-up, then a cosine to 2%."""
    if done < warmup:
        return done / warmup + 1e-3
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (1 - warmup))))


def make_optimizer(modules: list[nn.Module], rate: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    weights = [p for module in modules for p in module.parameters()]
    matrices, vectors = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


@dataclass(frozen=True)
class Budget:
    """How long a stage runs: a number of steps, or seconds."""

    steps: int
    seconds: float | None = None

    def share(self, step: int, started: float) -> float:
        """What share of the stage is done before `step` (0-based)."""
        return step / self.steps if self.seconds is None else (time.monotonic() - started) / self.seconds


def train(
    name: str,
    budget: Budget,
    optimizer: torch.optim.AdamW,
    stream: Iterator[Batch],
    loss_of: Callable[[Batch], dict[str, Tensor]],
    every: int = 0,
    report: Callable[[], None] | None = None,
) -> None:
    """Minimise the sum of the losses until the budget is spent, with a report `every` so many steps."""
    peak = optimizer.param_groups[0]["lr"]
    started, step, recent = time.monotonic(), 0, []
    while (done := budget.share(step, started)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(done)
        with torch.autocast("cpu", torch.bfloat16):
            losses = loss_of(next(stream))
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append([float(value.detach()) for value in losses.values()])
        step += 1
        if step % 50 == 0:
            means = np.mean(recent, axis=0)
            recent = []
            shown = "  ".join(f"{key} {value:.4f}" for key, value in zip(losses, means, strict=True))
            print(f"{name} step {step}  {shown}  {time.monotonic() - started:.0f} s", flush=True)
        if report is not None and every and step % every == 0:
            report()


@torch.no_grad()
def question_accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    encode: DialogueEncoder,
    make: Callable[[list[Encoded]], Batch],
    count: int,
) -> dict[str, float]:
    """Share of held-out questions whose greedy answer is exactly right, by type and overall.

    Greedy decoding gives the right answer if and only if, fed the right answer, each likeliest token is right.
    """
    model.eval()
    items = heldout_questions(count)
    right: dict[str, list[bool]] = {}
    for start in range(0, count, 100):
        part = items[start : start + 100]
        asked = [
            Dialogue((("human", IMAGE_MARK + i.question.question), ("gpt", i.question.answer)), (i.scene,))
            for i in part
        ]
        batch = make([encode(sample) for sample in asked])
        logits, labels = answer_logits(model, batch, visual_features(model, batch))
        hits = (logits.argmax(-1) == labels).split((batch.labels != IGNORED).sum(1).tolist())
        for item, hit in zip(part, hits, strict=True):
            right.setdefault(item.question.type, []).append(bool(hit.all()))
    model.train()
    table = {kind: sum(values) / len(values) for kind, values in sorted(right.items())}
    return table | {"overall": sum(map(sum, right.values())) / count}


# --- files -----------------------------------------------------------------------------------------------


def save(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2TokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen2_5_VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16)
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    copy.generation_config = GenerationConfig(
        bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad, do_sample=False
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "min_pixels": (PATCH * MERGE) ** 2,
        "max_pixels": 256 * 256,
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL,
        "merge_size": MERGE,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


README = """# shapes_vlm

The tiny base VLM: a Qwen2.5-VL ({parameters:.2f} M parameters, bf16) trained {origin} on the Shapes world's
training split. It reads pictures of 64 x 64 pixels (16 visual tokens each) and prompts; it has never made a picture.

    {command}

rebuilds it. Seed {seed}; {minutes:.1f} minutes of wall clock and {cpu_minutes:.1f} of CPU time on {threads} threads
({steps} steps of {batch} samples, after {vision_steps} of the vision encoder alone).

Exact-match accuracy on {count} questions about held-out scenes (`heldout_questions`), measured on the bf16 weights:

| question | accuracy |
|---|---|
{rows}
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--from", dest="start", type=Path, help="folder of a model to go on with, instead of a new one")
    parser.add_argument("--steps", type=int, default=6000, help="steps of the second stage")
    parser.add_argument("--minutes", type=float, help="time of the second stage instead of --steps; not repeatable")
    parser.add_argument("--vision-steps", type=int, default=600, help="steps of the first stage")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate of the second stage")
    parser.add_argument("--save-every", type=int, default=0, help="save and measure every so many steps as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--questions", type=int, default=1200, help="held-out questions to measure on")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    started = time.monotonic()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start: Path | None = options.start
    tokenizer = build_tokenizer(options.seed) if start is None else Qwen2TokenizerFast.from_pretrained(start)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    AttentionInterface.register(ATTENTION, float_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    if start is None:
        model = Qwen2_5_VLForConditionalGeneration(model_config(ids))
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    model.train()
    model.set_attn_implementation(ATTENTION)
    for block in model.model.visual.blocks:
        block.attn.forward = MethodType(batched_attention, block.attn)
    head = nn.Linear(128, sum(VISUAL_CLASSES))
    encode = DialogueEncoder(tokenizer)

    def make(samples: list[Encoded]) -> Batch:
        return collate(samples, ids["<|endoftext|>"], ids["<|image_pad|>"])

    def vision_losses(batch: Batch) -> dict[str, Tensor]:
        return {"vision": visual_loss(head, visual_features(model, batch), batch.scenes)}

    def all_losses(batch: Batch) -> dict[str, Tensor]:
        features = visual_features(model, batch)
        logits, labels = answer_logits(model, batch, features)
        answers = nn.functional.cross_entropy(logits.float(), labels)
        return {"answers": answers, "vision": 0.3 * visual_loss(head, features, batch.scenes)}

    # Features that are trained already are only read.
    vision = make_optimizer([head] if start is not None else [model.model.visual, head], 2e-3)
    train(
        "vision",
        Budget(options.vision_steps),
        vision,
        batches(encode, options.seed + 1, options.batch, make),
        vision_losses,
    )
    everything = make_optimizer([model, head], options.rate)
    budget = Budget(options.steps, options.minutes * 60 if options.minutes else None)
    stream = batches(encode, options.seed, options.batch, make)

    def report() -> None:
        save(model, tokenizer, options.to)
        table = question_accuracy(model, encode, make, 300)
        print("  ".join(f"{kind} {value:.2f}" for kind, value in table.items()), flush=True)

    train("language", budget, everything, stream, all_losses, options.save_every, report)

    save(model, tokenizer, options.to)
    minutes, cpu_minutes = (time.monotonic() - started) / 60, time.process_time() / 60
    stored = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.to, dtype=torch.bfloat16).float()
    table = question_accuracy(stored, encode, make, options.questions)
    rows = "\n".join(f"| {kind} | {value:.3f} |" for kind, value in table.items())
    command = " ".join(["python tools/build_tiny_models.py", *arguments])
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    (options.to / "README.md").write_text(
        README.format(
            parameters=parameters,
            origin="from scratch" if start is None else f"on from {start}",
            command=command,
            seed=options.seed,
            minutes=minutes,
            cpu_minutes=cpu_minutes,
            threads=options.threads,
            steps=options.steps,
            batch=options.batch,
            vision_steps=options.vision_steps,
            count=options.questions,
            rows=rows,
        )
    )
    print(f"{parameters:.2f} M parameters, {minutes:.1f} minutes, {cpu_minutes:.1f} of CPU time\n{rows}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
