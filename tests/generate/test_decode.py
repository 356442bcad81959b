"""Decoding against the forward pass of training, and against itself in other batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import HIDDEN, V, picture, prompts
from torch import Tensor

from megatron_unimm.checkpoint.manifest import find_checkpoint
from megatron_unimm.config.load import dump
from megatron_unimm.data.chat import layout_sample
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.images import Image
from megatron_unimm.data.sample import Sample, Turn
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.decode import Answer, Prompt
from megatron_unimm.generate.sampling import DecodeSettings
from megatron_unimm.generate.session import Session
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.rotary import mrope_angles

TOLERANCE = 1e-4
SETTINGS = DecodeSettings(max_new_tokens=V + 14)


def whole_forward(generator: Generator, prompt: Prompt, answer: Answer) -> Tensor:
    """Hidden states ``[L, H]`` of prompt and answer in one pass, as in training: no cache, the mask of a segment."""
    model, chunk = generator.stage.model, generator.chunks[0]
    ids = np.concatenate([prompt.tokens.input_ids, answer.token_ids])
    visual = [*[generator.staged.see([prompt.tokens])] * bool(len(prompt.tokens.grids))]
    visual += [image.visual_tokens for image in answer.images]
    positions = torch.from_numpy(positions_of(ids, model.token_ids.vision_start, model.token_ids.image_pad))
    backbone = model.backbone
    angles = mrope_angles(positions, backbone.head_size, backbone.rope_theta, backbone.mrope_sections, False)
    segments = Segments.build(np.array([0, len(ids)]), causal=True, device=torch.device("cpu"))
    context = PackedContext.with_angles(angles, torch.float32, segments={"full": segments})
    index = torch.from_numpy(np.flatnonzero(ids == model.token_ids.image_pad))
    with decoding_mode([chunk]):  # type: ignore[list-item]
        embedded = chunk.embed_tokens(torch.from_numpy(ids), torch.cat(visual) if visual else None, index)
        return chunk.advance(embedded, context)[:, 0]


def positions_of(ids: np.ndarray, vision_start: int, image_pad: int) -> np.ndarray:
    """The layout of positions in words of one's own: text counts up, a 4 x 4 image has rows and columns."""
    positions, following = np.zeros((3, len(ids)), dtype=np.int64), 0
    place = 0
    for t, token in enumerate(ids):
        if token == image_pad:
            positions[:, t] = following + np.array([0, place // 4, place % 4])
            place += 1
            if place == V:
                following += 4
        else:
            positions[:, t] = following
            following += 1
        if token == vision_start:
            place = 0
    return positions


@pytest.mark.parametrize("number", range(4))
def test_equals_the_forward_pass_of_training(generator: Generator, number: int) -> None:
    """Every token is the best one, and every visual token the head's, given everything before it. Measured 1e-5."""
    prompt = prompts(generator)[number]
    answer = generator.answer([prompt], SETTINGS)[0]
    hidden = whole_forward(generator, prompt, answer)
    ids, start = np.array(answer.token_ids), len(prompt.tokens)
    token_ids = generator.stage.model.token_ids
    before = hidden[start - 1 : start - 1 + len(ids)]  # the states that the answer's tokens follow from
    with decoding_mode(generator.chunks):  # type: ignore[arg-type]
        logits = generator.chunks[0].text_logits(before)
        predicted = generator.chunks[0].next_visual(before[ids == token_ids.image_pad])
    logits[:, [token_ids.image_pad, token_ids.vision_end]] = float("-inf")
    is_text = (ids != token_ids.image_pad) & (ids != token_ids.vision_end)
    assert logits.argmax(dim=1)[is_text].tolist() == ids[is_text].tolist()
    assert is_text.sum() > 10
    if answer.images:
        made = torch.cat([image.visual_tokens for image in answer.images])
        torch.testing.assert_close(made, predicted, rtol=TOLERANCE, atol=TOLERANCE)


def test_logits_equal_those_of_training(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = prompts(generator)[1]
    seen: list[Tensor] = []
    original = generator.staged.logits

    def spy(hidden: Tensor) -> Tensor:
        seen.append(original(hidden).clone())
        return original(hidden)

    monkeypatch.setattr(generator.staged, "logits", spy)
    answer = generator.answer([prompt], SETTINGS)[0]
    hidden = whole_forward(generator, prompt, answer)[len(prompt.tokens) - 1 : -1]
    with decoding_mode(generator.chunks):  # type: ignore[arg-type]
        torch.testing.assert_close(
            torch.cat(seen), generator.chunks[0].text_logits(hidden), rtol=TOLERANCE, atol=TOLERANCE
        )


def test_positions_are_those_of_a_training_sample(generator: Generator, tmp_path: Path) -> None:
    """The layout of data/chat.py for an answer of an image, beside this file's own words that decoding is held to."""
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    turns = (Turn("user", (0, "Make it blue.")), Turn("assistant", (1, "Done.")))
    sample = layout_sample(Sample("s", "editing", turns, (DiskImage(tmp_path / "a.png"),) * 2), generator.chat)
    token_ids = generator.stage.model.token_ids
    expected = positions_of(sample.input_ids, token_ids.vision_start, token_ids.image_pad)
    assert np.array_equal(sample.position_ids, expected)
    prompt = generator.prompt(turns[:1], [picture(0)], open_image=True)
    length = len(prompt.tokens)
    assert np.array_equal(prompt.tokens.input_ids, sample.input_ids[:length])
    assert np.array_equal(prompt.tokens.position_ids, expected[:, :length])


def test_a_batch_of_unequal_prompts_equals_one_by_one(generator: Generator) -> None:
    """Measured 3e-5 between visual tokens: each is made from the one before."""
    together = generator.answer(prompts(generator), SETTINGS)
    alone = [generator.answer([prompt], SETTINGS)[0] for prompt in prompts(generator)]
    assert_equal(together, alone)
    assert len({tuple(answer.token_ids) for answer in alone}) == len(alone)


def assert_equal(answers: list[Answer], others: list[Answer]) -> None:
    for one, other in zip(answers, others, strict=True):
        assert one.token_ids == other.token_ids
        assert one.parts == other.parts
        for mine, theirs in zip(one.images, other.images, strict=True):
            torch.testing.assert_close(mine.visual_tokens, theirs.visual_tokens, rtol=TOLERANCE, atol=TOLERANCE)


def test_samples_do_not_depend_on_the_batch(generator: Generator) -> None:
    settings = replace(SETTINGS, temperature=1.5, top_p=0.95, seed=3)
    asked = prompts(generator)
    together = generator.answer(asked, settings)
    backwards = generator.answer(asked[::-1], settings, batch_size=2)[::-1]
    assert_equal(together, backwards)
    other = generator.answer(asked, replace(settings, seed=4))
    assert [answer.token_ids for answer in other] != [answer.token_ids for answer in together]


def test_an_image_has_all_its_tokens_and_then_its_end(generator: Generator) -> None:
    ids = generator.stage.model.token_ids
    image = [ids.image_pad] * V + [ids.vision_end]
    answer = generator.answer([prompts(generator)[2]], SETTINGS)[0]
    assert answer.token_ids[: V + 1] == image
    assert ids.image_pad not in answer.token_ids[V + 1 : V + 2]
    assert answer.images[0].visual_tokens.shape == (V, HIDDEN)
    assert answer.images[0].grid.tolist() == [1, 8, 8]
    assert answer.parts[0] == 0
    cut = generator.answer([prompts(generator)[2]], replace(SETTINGS, max_new_tokens=3))[0]
    assert cut.token_ids == image, "an image that has begun is finished"
    assert not cut.complete
    ended = generator.answer([prompts(generator)[2]], replace(SETTINGS, stop_after_image=True))[0]
    assert ended.token_ids == image
    assert ended.complete


def test_an_image_that_the_model_begins_itself(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, an image, text: the model is made to say vision_start as its third token and the end as its sixth."""
    ids = generator.stage.model.token_ids
    original, said = generator.staged.logits, []

    def steer(hidden: Tensor) -> Tensor:
        logits = original(hidden)
        said.append(None)
        forced = {3: ids.vision_start, 6: ids.im_end}.get(len(said))
        if forced is not None:
            logits[:, forced] = 1e4
        return logits

    monkeypatch.setattr(generator.staged, "logits", steer)
    answer = generator.answer([prompts(generator)[0]], SETTINGS)[0]
    assert answer.token_ids[2 : 4 + V] == [ids.vision_start] + [ids.image_pad] * V + [ids.vision_end]
    assert answer.token_ids[-1] == ids.im_end
    assert len(answer.token_ids) == 6 + V + 1
    assert answer.complete
    assert [type(part) for part in answer.parts] == [str, int, str]
    monkeypatch.undo()
    prompt = prompts(generator)[0]
    hidden = whole_forward(generator, prompt, answer)
    first = len(prompt.tokens) + 2
    with decoding_mode(generator.chunks):  # type: ignore[arg-type]
        predicted = generator.chunks[0].next_visual(hidden[first : first + V])
    torch.testing.assert_close(answer.images[0].visual_tokens, predicted, rtol=TOLERANCE, atol=TOLERANCE)


def test_given_images_are_seen_as_they_were_made(generator: Generator) -> None:
    """The same visual tokens, once through the tower and once given, lead to the same answer."""
    turns = [Turn("user", ("Draw.",)), Turn("assistant", (0,)), Turn("user", ("What is it?",))]
    through_tower = generator.prompt(turns, [picture(5)])
    with decoding_mode(generator.chunks):  # type: ignore[arg-type]
        tokens = generator.staged.see([through_tower.tokens])
    given = replace(through_tower, given={0: tokens})
    given = replace(given, tokens=replace(given.tokens, patches=np.zeros_like(given.tokens.patches)))
    assert_equal(generator.answer([given], SETTINGS), generator.answer([through_tower], SETTINGS))


def test_session_remembers(generator: Generator) -> None:
    session = Session(generator, replace(SETTINGS, max_new_tokens=8))
    session.say("Look.", [picture(0)])
    session.turns[1] = Turn("assistant", (1, "Here."))
    session.pictures.append(generator.answer([prompts(generator)[2]], SETTINGS)[0].images[0])
    second = session.say("And this?", [picture(1)])
    expected = generator.prompt(session.turns[:3], session.pictures[:3], number=3)
    assert sorted(expected.given) == [1]
    assert session.turns[2].parts == (2, "And this?")
    assert second.token_ids == generator.answer([expected], replace(SETTINGS, max_new_tokens=8))[0].token_ids
    session.reset()
    assert not session.turns
    assert not session.pictures


def test_a_prompt_that_is_too_long_is_refused(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="positions for 4096"):
        generator.answer([prompts(generator)[0]], replace(SETTINGS, max_new_tokens=5000))


def test_the_model_is_left_as_it_was(generator: Generator) -> None:
    chunk = generator.chunks[0]
    assert isinstance(chunk, torch.nn.Module)
    chunk.train()
    modes = [module.training for module in chunk.modules()]
    generator.answer([prompts(generator)[0]], SETTINGS)
    assert [module.training for module in chunk.modules()] == modes
    assert torch.is_grad_enabled()
    chunk.eval()


def test_finds_the_newest_checkpoint(tiny: Path, tmp_path: Path) -> None:
    step = tiny / "run/sft/checkpoints/step_00000001"
    for folder in (step, step.parent, tiny / "run/sft", tiny / "run"):
        assert find_checkpoint(folder) == step
    assert find_checkpoint(tiny / "base") == tiny / "base"
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        find_checkpoint(tmp_path)


def test_the_config_of_the_checkpoint_is_kept(generator: Generator) -> None:
    assert generator.stage.data.generation_size.max_side == 64
    assert "step_00000001" in generator.origin
    assert "kl: 0.0" in dump(generator.stage)
