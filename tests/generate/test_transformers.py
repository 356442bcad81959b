"""The tiny base model's answers against ``generate`` of transformers."""

from pathlib import Path

import torch
from tiny_checkpoint import TOKENIZER
from transformers import Qwen2_5_VLForConditionalGeneration

from megatron_unimm.convert.import_ import import_checkpoint
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
