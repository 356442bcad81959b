"""The Shapes world: a procedural world of coloured shapes that needs no download and scores itself."""

from megatron_unimm.data.shapes.conversations import KINDS, Conversation, make_conversation
from megatron_unimm.data.shapes.eval_sets import geneval_prompts, heldout_questions, retrieval_pairs
from megatron_unimm.data.shapes.heldout import HELD_OUT, scene_is_held_out, text_is_held_out
from megatron_unimm.data.shapes.history import HISTORY_TYPES
from megatron_unimm.data.shapes.prompts import (
    PROMPT_KINDS,
    Prompt,
    Requirement,
    prompt_from_dict,
    prompt_is_held_out,
    prompt_scene,
    sample_prompt,
)
from megatron_unimm.data.shapes.questions import QUESTION_TYPES, Question
from megatron_unimm.data.shapes.render import render, render_array
from megatron_unimm.data.shapes.scene import (
    CANVAS,
    COLOURS,
    SHAPES,
    Scene,
    ShapeObject,
    sample_free_scene,
    scene_from_list,
)
from megatron_unimm.data.shapes.scorer import Score, find_objects, is_correct, score, shows_scene
from megatron_unimm.data.shapes.write import DEFAULT_MIX, WrittenShapes, write_eval_sets, write_shapes

__all__ = [
    "CANVAS",
    "COLOURS",
    "DEFAULT_MIX",
    "HELD_OUT",
    "HISTORY_TYPES",
    "KINDS",
    "PROMPT_KINDS",
    "QUESTION_TYPES",
    "SHAPES",
    "Conversation",
    "Prompt",
    "Question",
    "Requirement",
    "Scene",
    "Score",
    "ShapeObject",
    "WrittenShapes",
    "find_objects",
    "geneval_prompts",
    "heldout_questions",
    "is_correct",
    "make_conversation",
    "prompt_from_dict",
    "prompt_is_held_out",
    "prompt_scene",
    "render",
    "render_array",
    "retrieval_pairs",
    "sample_free_scene",
    "sample_prompt",
    "scene_from_list",
    "scene_is_held_out",
    "score",
    "shows_scene",
    "text_is_held_out",
    "write_eval_sets",
    "write_shapes",
]
