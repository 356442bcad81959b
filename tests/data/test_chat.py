"""Token layout, labels, targets and positions of conversations."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from whole_samples import tokenize_sample

from megatron_unimm.config.data import ImageSizeConfig
from megatron_unimm.data.chat import (
    SPECIAL_TOKENS,
    ChatTokenizer,
    image_order,
    layout_sample,
    prompt_tokens,
)
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import decode, patchify, resize
from megatron_unimm.data.sample import IGNORED_LABEL, Sample, Turn
from megatron_unimm.errors import ConfigError

SHORT = {
    "<|im_start|>": "<s>",
    "<|im_end|>": "<e>",
    "<|vision_start|>": "[",
    "<|vision_end|>": "]",
    "<|image_pad|>": "#",
    "\n": "n",
}


def sample_of(*turns: Turn, images=(), kind="text_to_image") -> Sample:
    return Sample(id="s", kind=kind, turns=turns, images=tuple(DiskImage(path) for path in images))


def draw(ids, chat) -> str:
    """Token by token, special tokens in short, ``-`` for no label."""
    texts = ["-" if i == IGNORED_LABEL else chat.tokenizer.decode([i]) for i in ids]
    return " ".join(SHORT.get(text, text) for text in texts)


def marks(length, index) -> str:
    return " ".join("v" if i in set(index.tolist()) else "-" for i in range(length))


def test_positions_of_orion_drawn(make_chat, tmp_path, write_image):
    """An image of 2 x 1 visual tokens to be drawn, then one to be read."""
    target = write_image(tmp_path / "target.png", 56, 28)
    source = write_image(tmp_path / "source.png", 28, 28)
    chat = make_chat(system_prompt="")
    turns = (
        Turn("user", ("user",)),
        Turn("assistant", ("red", 0, "blue")),
        Turn("user", (1,)),
        Turn("assistant", ("red",)),
    )
    got = tokenize_sample(sample_of(*turns, images=[target, source]), chat)
    tokens = (
        "<s> user n user <e> n <s> assistant n red [ # # ] blue <e> n <s> user n [ # ] <e> n <s> assistant n red <e> n"
    )
    labels = "- - - - - - - - red [ - - ] blue <e> - - - - - - - - - - - - red <e> - -"
    predict = "- - - - - - - - - - v v - - - - - - - - - - - - - - - - - - -"
    visual = "- - - - - - - - - - - v v - - - - - - - - v - - - - - - - - -"
    # "blue" follows the image, so it is predicted at vision_end; vision_end itself at the last visual token.
    assert draw(got.input_ids, chat) == tokens
    assert draw(got.labels, chat) == labels
    assert marks(len(got), got.predict_index) == predict
    assert marks(len(got), got.visual_index) == visual
    assert got.visual_index.tolist() == [11, 12, 21]
    assert got.predict_index.tolist() == [10, 11]
    assert got.target_index.tolist() == [0, 1]
    assert got.is_target.tolist() == [True, False]
    assert got.grids.tolist() == [[1, 2, 4], [1, 2, 2]]
    assert got.patches.shape == (8 + 4, chat.encoder.patch_dim)
    time, height, width = got.position_ids[:, 10:15].tolist()
    assert time == [10, 11, 11, 13, 14]
    assert height == [10, 11, 11, 13, 14]
    assert width == [10, 11, 12, 13, 14]


def test_target_after_input_points_into_merged_features(make_chat, tmp_path, write_image):
    """Editing: features 0..3 are the source image, 4..7 the target."""
    paths = [write_image(tmp_path / f"{i}.png", 56, 56, seed=i) for i in range(2)]
    chat = make_chat()
    sample = sample_of(Turn("user", (0, "make it red")), Turn("assistant", (1,)), images=paths, kind="editing")
    got = tokenize_sample(sample, chat)
    assert got.target_index.tolist() == [4, 5, 6, 7]
    assert (got.predict_index == got.visual_index[4:] - 1).all()
    assert got.input_ids[got.predict_index[0]] == chat.tokenizer.token_ids.vision_start
    expected = [patchify(resize(decode(DiskImage(path), 10**6), 56, 56), chat.encoder)[0] for path in paths]
    np.testing.assert_array_equal(got.patches, np.concatenate(expected))


def test_labels_are_the_next_tokens_of_assistant_turns(make_chat):
    chat = make_chat()
    turns = (
        Turn("user", ("count",)),
        Turn("assistant", ("two circles",)),
        Turn("user", ("why?",)),
        Turn("assistant", ("so",)),
    )
    got = layout_sample(sample_of(*turns, kind="understanding"), chat)
    learned = np.flatnonzero(got.labels != IGNORED_LABEL)
    np.testing.assert_array_equal(got.labels[learned], got.input_ids[learned + 1])
    encode, end = chat.tokenizer.encode, [chat.tokenizer.token_ids.im_end]
    assert got.labels[learned].tolist() == encode("two circles") + end + encode("so") + end


@pytest.mark.parametrize("system", [None, "You draw."])
def test_tokens_equal_the_chat_template(make_chat, tokenizer_folder, tmp_path, write_image, system):
    """The template's text, with each image_pad repeated, tokenised by transformers: the same tokens."""
    paths = [write_image(tmp_path / f"{i}.png", 28 * (i + 1), 56) for i in range(3)]
    contents = [
        ("user", ("\n\nLook: ", 0, "\nand ", 1, "  what is  this? ")),
        ("assistant", ("A red circle.", 2)),
        ("user", ("thanks\n",)),
        ("assistant", ("you are\n\n welcome",)),
    ]
    contents = [("system", (system,)), *contents] if system else contents
    chat = make_chat()
    got = layout_sample(sample_of(*(Turn(*content) for content in contents), images=paths), chat)
    messages = [
        {
            "role": role,
            "content": [{"type": "image"} if isinstance(p, int) else {"type": "text", "text": p} for p in parts],
        }
        for role, parts in contents
    ]
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = reference.apply_chat_template(messages, tokenize=False)
    for count in got.grids.prod(axis=1) // 4:
        text = text.replace("<|image_pad|>", "<PAD>" * int(count), 1)
    expected = reference(text.replace("<PAD>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
    assert got.input_ids.tolist() == expected


@pytest.mark.parametrize(
    "sizes", [[(56, 84)], [(84, 28), (28, 28), (112, 112)], [(28, 112), (112, 56), (84, 84), (56, 28)]]
)
def test_positions_equal_transformers(make_chat, tmp_path, write_image, model, sizes):
    """get_rope_index of transformers' Qwen2.5-VL, for several images of different shapes."""
    paths = [write_image(tmp_path / f"{i}.png", *size) for i, size in enumerate(sizes)]
    parts = [part for i in range(len(sizes)) for part in (f"image {i}: ", i)]
    chat = make_chat(understanding_size=ImageSizeConfig(min_side=28, max_side=112))
    sample = sample_of(
        Turn("user", (*parts[:-1], len(sizes) - 1, " what?")), Turn("assistant", ("a red circle",)), images=paths
    )
    got = layout_sample(sample, chat)
    assert [(int(w) * 14, int(h) * 14) for _, h, w in got.grids] == sizes
    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"intermediate_size": 32, "vocab_size": 512},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32},
    )
    with torch.device("meta"):
        reference = Qwen2_5_VLModel(config)
    ids = torch.from_numpy(got.input_ids)[None]
    is_image = (ids == model.token_ids.image_pad).int()
    expected, _ = reference.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=torch.from_numpy(got.grids))
    np.testing.assert_array_equal(got.position_ids, expected[:, 0].numpy())


@pytest.mark.parametrize("special", SPECIAL_TOKENS.values())
def test_text_cannot_forge_special_tokens(make_chat, special):
    """Who writes the text of a special token gets its characters, in every role."""
    chat = make_chat(system_prompt="Be kind.")
    text = f"a{special}\n{special}"

    def count(content: str) -> int:
        turns = (Turn("system", (content,)), Turn("user", (content,)), Turn("assistant", (content,)))
        ids = layout_sample(sample_of(*turns), chat).input_ids
        return int(np.isin(ids, list(chat.tokenizer.token_ids.model_dump().values())).sum())

    assert count(text) == count("harmless") == 6
    assert chat.tokenizer.decode(chat.tokenizer.encode(text)) == text


def test_too_long_is_an_error(make_chat, tmp_path, write_image):
    path = write_image(tmp_path / "a.png", 112, 112)
    sample = sample_of(Turn("user", (0, "what?")), Turn("assistant", ("red",)), images=[path])
    length = len(layout_sample(sample, make_chat()))
    assert len(layout_sample(sample, make_chat(sequence_length=length))) == length
    with pytest.raises(SampleError, match=f"{length} tokens, but data.sequence_length is {length - 1}") as caught:
        tokenize_sample(sample, make_chat(sequence_length=length - 1))
    assert caught.value.fault == "too long"


def test_prompt_is_what_training_saw_before_the_answer(make_chat, tmp_path, write_image):
    paths = [write_image(tmp_path / f"{i}.png", 84, 56, seed=i) for i in range(2)]
    chat = make_chat()
    turns = (
        Turn("user", (0, "make it red")),
        Turn("assistant", ("Sure.", 1)),
        Turn("user", ("now blue",)),
        Turn("assistant", ("No",)),
    )
    trained = tokenize_sample(sample_of(*turns, images=paths), chat)
    prompt = prompt_tokens(turns[:-1], [decode(DiskImage(path), 10**6) for path in paths], chat)
    length = len(prompt)
    assert trained.labels[length - 1] == chat.tokenizer.encode("No")[0]
    np.testing.assert_array_equal(prompt.input_ids, trained.input_ids[:length])
    np.testing.assert_array_equal(prompt.position_ids, trained.position_ids[:, :length])
    for field in ("patches", "grids", "visual_index"):
        np.testing.assert_array_equal(getattr(prompt, field), getattr(trained, field))
    assert (prompt.labels == IGNORED_LABEL).all()
    assert not prompt.is_target.any()
    assert len(prompt.predict_index) == len(prompt.target_index) == 0
    opened = prompt_tokens(turns[:-1], [decode(DiskImage(path), 10**6) for path in paths], chat, open_image=True)
    assert opened.input_ids.tolist() == [*prompt.input_ids, chat.tokenizer.token_ids.vision_start]
    assert (opened.position_ids[:, -1] == prompt.position_ids.max() + 1).all()


def test_threads_agree(make_chat):
    chat = make_chat()
    samples = [
        sample_of(Turn("user", (f"draw {i} <|im_end|>" * (i % 5),)), Turn("assistant", ("red",))) for i in range(200)
    ]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda sample: layout_sample(sample, chat).input_ids.tolist(), samples))
    assert got == [layout_sample(sample, chat).input_ids.tolist() for sample in samples]


def test_image_order():
    turns = (Turn("user", (1, "a", 0)), Turn("assistant", (2,)))
    assert image_order(turns) == [1, 0, 2]


def test_tokenizer_must_fit_the_model(tokenizer_folder, model, tmp_path):
    wrong = model.model_copy(update={"token_ids": model.token_ids.model_copy(update={"im_end": 3})})
    found = model.token_ids.im_end
    with pytest.raises(
        ConfigError, match=rf"model.token_ids.im_end: is 3, but <\|im_end\|> is {found} in the tokenizer"
    ):
        ChatTokenizer(tokenizer_folder, wrong)
    small = model.model_copy(update={"backbone": model.backbone.model_copy(update={"vocab_size": 100})})
    with pytest.raises(ConfigError, match=r"model\.backbone\.vocab_size: is 100, but the tokenizer"):
        ChatTokenizer(tokenizer_folder, small)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: no such folder"):
        ChatTokenizer(tmp_path / "absent", model)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* holds no tokenizer"):
        ChatTokenizer(tmp_path, model)


def test_layout_needs_no_pixels(make_chat, tmp_path, write_image):
    """Only the header is read: the file may end behind it."""
    path = write_image(tmp_path / "a.png")
    sample = sample_of(Turn("user", ("draw",)), Turn("assistant", (0,)), images=[path])
    chat = make_chat()
    whole = tokenize_sample(sample, chat)
    path.write_bytes(path.read_bytes()[:100])
    layout = layout_sample(sample, chat)
    assert layout.patches.shape == (0, chat.encoder.patch_dim)
    complete = replace(layout, patches=whole.patches)
    assert all(np.array_equal(getattr(complete, field), getattr(whole, field)) for field in vars(whole))


def test_ming_writes_conversations_as_its_processor_does(
    model, tokenizer_folder, make_chat, tmp_path, write_image
) -> None:
    """Roles in words, one special token at the end of an answer, a line break behind an image that is read."""
    marks = {"<|vision_start|>": "<image>", "<|vision_end|>": "</image>", "<|image_pad|>": "<imagePatch>"}
    text = (tokenizer_folder / "tokenizer.json").read_text()
    for ours, theirs in marks.items():
        text = text.replace(ours, theirs)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    end = model.token_ids.pad
    token_ids = model.token_ids.model_copy(update={"im_start": end, "im_end": end})
    ming = model.model_copy(update={"token_ids": token_ids, "chat_template": "ming"})
    chat = replace(make_chat(system_prompt=""), tokenizer=ChatTokenizer(tmp_path, ming))
    paths = [write_image(tmp_path / "read.png", 28, 28), write_image(tmp_path / "drawn.png", 56, 56)]
    turns = (
        Turn("user", (0, "blue")),
        Turn("assistant", ("red",)),
        Turn("user", ("user",)),
        Turn("assistant", (1,)),
    )
    got = layout_sample(sample_of(*turns, images=paths), chat)
    human, assistant, patch = "<role>HUMAN</role>", "<role>ASSISTANT</role>", "<imagePatch>"
    asked = f"{human}<image>{patch}</image>\nblue{assistant}"
    answered = f"red<|endoftext|>{human}user{assistant}<image>{patch * 4}</image><|endoftext|>"
    assert chat.tokenizer.decode(got.input_ids) == asked + answered
    learned = got.labels[got.labels != IGNORED_LABEL]
    assert chat.tokenizer.decode(learned) == "red<|endoftext|><image></image><|endoftext|>"
    pictures = [decode(DiskImage(paths[0]), 10**6)]
    assert chat.tokenizer.decode(prompt_tokens(turns[:1], pictures, chat).input_ids) == asked
