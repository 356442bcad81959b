"""The tiny base model's answers against ``generate`` of transformers."""

from pathlib import Path

import torch
from tiny_checkpoint import DEEPSTACK, TOKENIZER, stage_config
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from megatron_unimm.convert.import_ import import_checkpoint
from megatron_unimm.convert.qwen3_vl import to_hf_config
from megatron_unimm.data.sample import Turn
from megatron_unimm.evaluate.shapes_qa import load_questions
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.sampling import DecodeSettings


def test_greedy_answers_are_those_of_transformers(tmp_path: Path) -> None:
    """Token by token, from the bf16 weights in fp32 on both sides."""
    import_checkpoint(TOKENIZER, tmp_path / "base")
    with Generator.load(tmp_path / "base") as generator:
        torch.set_num_threads(1)
        asked = [(q.question, q.picture) for q in load_questions(None, 12)]
        asked[3] = ("Describe the image in detail.", asked[3][1])
        prompts = [generator.prompt([Turn("user", (0, text))], [picture]) for text, picture in asked]
        answers = generator.answer(prompts, DecodeSettings(max_new_tokens=24))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(TOKENIZER, dtype=torch.float32).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.from_numpy(prompt.tokens.input_ids)[None]
        expected = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.from_numpy(prompt.tokens.patches),
            image_grid_thw=torch.from_numpy(prompt.tokens.grids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            max_new_tokens=24,
            do_sample=False,
        )
        assert answer.token_ids == expected[0, ids.shape[1] :].tolist()


def test_deepstack_answers_are_those_of_transformers(tmp_path: Path) -> None:
    """A random Qwen3-VL, which transformers' class holds; token by token."""
    model_config = stage_config(tmp_path / "base", *DEEPSTACK).model
    hf_config = to_hf_config(model_config)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(AutoConfig.for_model(**hf_config)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).write_bytes((TOKENIZER / name).read_bytes())
    import_checkpoint(tmp_path / "hf", tmp_path / "base")
    with Generator.load(tmp_path / "base") as generator:
        torch.set_num_threads(1)
        asked = load_questions(None, 6)
        prompts = [generator.prompt([Turn("user", (0, q.question, 1))], [q.picture] * 2) for q in asked]
        answers = generator.answer(prompts, DecodeSettings(max_new_tokens=12))
    ids = model_config.token_ids
    for prompt, answer in zip(prompts, answers, strict=True):
        read = torch.from_numpy(prompt.tokens.input_ids)[None]
        expected = model.generate(
            input_ids=read,
            attention_mask=torch.ones_like(read),
            pixel_values=torch.from_numpy(prompt.tokens.patches),
            image_grid_thw=torch.from_numpy(prompt.tokens.grids),
            mm_token_type_ids=(read == ids.image_pad).int(),
            max_new_tokens=12,
            do_sample=False,
            # What decoding never says where it may not draw.
            bad_words_ids=[[ids.image_pad], [ids.vision_start], [ids.vision_end]],
        )
        assert answer.token_ids == expected[0, read.shape[1] :].tolist()
