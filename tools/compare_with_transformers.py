"""Asks a checkpoint, and its export under plain transformers, the same questions about held-out Shapes scenes.

    python tools/compare_with_transformers.py runs/quickstart runs/quickstart/exported

Both decode greedily in fp32. Prints how many answers agree, token by token; exit code 1 unless nearly all do (where two
tokens are equally likely, rounding decides).
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import megatron_unimm.parallel  # noqa: F401 - before Megatron-Core, on a machine without a GPU
from megatron_unimm.data.sample import Turn
from megatron_unimm.evaluate.shapes_qa import ANSWER_TOKENS, QuestionItem, load_questions, normalised
from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.sampling import DecodeSettings

ENOUGH = 0.98


def our_answers(checkpoint: Path, questions: list[QuestionItem]) -> list[str]:
    with Generator.load(checkpoint) as generator:
        prompts = [generator.prompt([Turn("user", (0, q.question))], [q.picture]) for q in questions]
        answers = generator.answer(prompts, DecodeSettings(max_new_tokens=ANSWER_TOKENS, images=False))
    return [answer.text for answer in answers]


def their_answers(folder: Path, questions: list[QuestionItem]) -> list[str]:
    """Image processor, tokenizer and model as anyone would load them. (AutoProcessor would do the first two at once,
    but wants torchvision for videos.)"""
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    answers = []
    for q in questions:
        content = [{"type": "image"}, {"type": "text", "text": q.question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        pictures = images(images=[Image.fromarray(q.picture)], return_tensors="pt")
        num_visual = int(pictures["image_grid_thw"].prod()) // images.merge_size**2
        inputs = tokenizer(text.replace(image_token, image_token * num_visual), return_tensors="pt")
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
        output = model.generate(**inputs, **pictures, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint, or a run's or stage's folder")
    parser.add_argument("folder", type=Path, help="its export")
    parser.add_argument("--questions", type=int, default=100)
    options = parser.parse_args()
    questions = load_questions(None, options.questions)
    ours, theirs = our_answers(options.checkpoint, questions), their_answers(options.folder, questions)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    right = [
        sum(normalised(a) == normalised(q.answer) for a, q in zip(s, questions, strict=True)) for s in (ours, theirs)
    ]
    print(f"{len(questions)} questions: {same} answers the same; right {right[0]} here, {right[1]} in transformers")
    return 0 if same >= ENOUGH * len(questions) else 1


if __name__ == "__main__":
    sys.exit(main())
