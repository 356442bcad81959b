"""A small stage of MMCORE's VLM and samples for it, made by hand: no files, no tokenizer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import small_orion

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.queries import QueryVlmConfig, SiglipTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.chat import TokenSequence
from megatron_unimm.data.packing import build_row, plan_rows
from megatron_unimm.data.queries import QueryRow, QuerySample, QueryTokens, query_row

SMALL = (
    *(setting for setting in small_orion.SMALL if not setting.startswith(("method.", "stages."))),
    "queries.num_queries=6",
    "train.steps=8",
    "train.global_batch_size=8",
    "train.schedule={kind: constant, max_learning_rate: 1.0e-3, min_learning_rate: 1.0e-3}",
)
SIGLIP = (
    "queries.teacher={family: siglip, checkpoint: nowhere, size: {rule: square, side: 40}, encoder: {family: siglip,"
    " num_layers: 3, hidden_size: 32, num_heads: 2, mlp_size: 64, patch_size: 8, num_position_embeddings: 25}}"
)
"""Of the size of the SigLIP model in tests/convert."""
NEW = "{pattern: 'query_tokens.*'}, {pattern: 'query_connector.*'}, {pattern: '*', train: false}"
FROZEN_VLM = f"train.trainable=[{NEW}]"
LORA = ("queries.lora={rank: 4}", f"train.trainable=[{{pattern: 'backbone.*lora_*'}}, {NEW}]")

Part = tuple[str, int] | tuple[str, int, int]
"""``asks`` and ``answers`` with a number of words; ``reads`` and ``draws`` with rows and columns of patches, of the
vision encoder and of the teacher."""


def small_stage(repo: Path, *overrides: str) -> StageConfig:
    """The VLM's stage of the Shapes recipe with a two-layer model."""
    return load_recipe(repo / "configs/mmcore/shapes.yaml", [*SMALL, *overrides]).stages["vlm"]


def vlm_of(stage: StageConfig) -> QueryVlmConfig:
    assert stage.queries is not None
    return stage.queries


def make_sample(stage: StageConfig, name: str, *parts: Part) -> QuerySample:
    """A conversation of parts; words and pixels are random."""
    model, vlm = stage.model, vlm_of(stage)
    rng = np.random.default_rng(sum(name.encode()))
    teacher = vlm.teacher.encoder if isinstance(vlm.teacher, SiglipTeacher) else model.vision_encoder
    sequence = TokenSequence(model.token_ids, model.vision_encoder.spatial_merge_size)
    queries, grids, read = [np.zeros(0, dtype=np.int64)], [], 0
    for kind, *size in parts:
        if kind == "draws":
            queries.append(sequence.add_queries(vlm.num_queries, learned=True))
            grids.append((1, *size))
        elif kind == "reads":
            sequence.add_image(np.array([1, *size]), is_target=False)
            read += 1
        else:
            sequence.add_text(rng.integers(0, 100, size[0]).tolist(), learned=kind == "answers")
    kinds = {kind for kind, *_ in parts}
    sample_kind = "understanding" if "draws" not in kinds else "editing" if "reads" in kinds else "text_to_image"
    tokens = sequence.finish(name, sample_kind, model.vision_encoder.patch_dim)
    width, target_grids = tokens.patches.shape[1], np.array(grids, dtype=np.int64).reshape(-1, 3)
    patches, targets = (
        rng.standard_normal((int(each.prod(axis=1).sum()), columns)).astype(np.float32)
        for each, columns in ((tokens.grids, width), (target_grids, teacher.patch_dim))
    )
    layout = QueryTokens(
        tokens=replace(tokens, patches=patches),
        read_index=tuple(range(read)),
        read_drawn=(False,) * read,
        drawn_index=tuple(range(read, read + len(grids))),
        query_index=np.concatenate(queries),
        text_index=(),
    )
    return QuerySample(layout, (), target_grids, targets)


def make_samples(stage: StageConfig) -> list[QuerySample]:
    """Understanding, text to image, an edit, and an edit in two turns whose first picture is read again."""
    return [
        make_sample(stage, "understanding", ("asks", 4), ("reads", 4, 6), ("asks", 5), ("answers", 7)),
        make_sample(stage, "text to image", ("asks", 9), ("draws", 6, 4), ("answers", 1)),
        make_sample(stage, "edit", ("reads", 10, 4), ("asks", 6), ("answers", 2), ("draws", 4, 4), ("answers", 1)),
        make_sample(
            stage,
            "two turns",
            *(("reads", 4, 4), ("asks", 8), ("draws", 8, 6), ("reads", 8, 6), ("answers", 1)),
            *(("asks", 5), ("draws", 4, 4), ("answers", 3)),
        ),
    ]


def make_rows(samples: Sequence[QuerySample], stage: StageConfig, packing: bool = True) -> list[QueryRow]:
    """In as few rows as they need, or each in its own."""
    plan = plan_rows(
        [len(sample) for sample in samples],
        costs=[0.0] * len(samples),
        sequence_length=stage.data.sequence_length,
        num_rows_multiple=1,
        alignment=1,
        packing=packing,
    )
    return [_row([samples[number] for number in row], stage) for row in plan]


def _row(samples: Sequence[QuerySample], stage: StageConfig) -> QueryRow:
    tokens = build_row(
        [sample.layout.tokens for sample in samples],
        sequence_length=stage.data.sequence_length,
        alignment=1,
        pad_id=stage.model.token_ids.pad,
        patch_dim=stage.model.vision_encoder.patch_dim,
    )
    widths = [sample.target_patches.shape[1] for sample in samples if sample.target_patches is not None]
    return query_row(samples, tokens, 1, widths[0])
