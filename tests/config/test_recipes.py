"""The recipes that ship: they load, fit their machines, and carry the numbers of their paper."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import dump, load_recipe
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.convert.qwen2_5_vl import to_model_config

LARGE, SMALL = "configs/orion/qwen2_5_vl_7b.yaml", "configs/orion/shapes.yaml"
DECODER, MIXTURE = "configs/orion/decoder_flux.yaml", "configs/orion/qwen3_vl_30b_a3b.yaml"
WORLD_SIZES = {LARGE: 64 * 8, SMALL: 1, DECODER: 64 * 8, MIXTURE: 64 * 8}
CHAIN = [("warm_up", None), ("pretrain", "warm_up"), ("sft", "pretrain")]
STAGES = {LARGE: CHAIN, MIXTURE: CHAIN, SMALL: [*CHAIN, ("decoder", None)], DECODER: [("decoder", None)]}

# Table 1 of ORION, as printed. A dash: the stage reads no images to understand.
TABLE_1 = """
                    | warm_up   | pretrain   | sft
Max learning rate   | 1e-3      | 1.0e-4     | 1.0e-4
Min learning rate   | 1e-3      | 0          | 1.0e-5
LR scheduler        | constant  | cosine     | cosine
Weight decay        | 0.1       | 0.1        | 0.1
Gradient norm clip  | 1.0       | 1.0        | 1.0
beta1               | 0.9       | 0.9        | 0.9
beta2               | 0.95      | 0.95       | 0.95
epsilon             | 1.0e-15   | 1.0e-15    | 1.0e-15
CE : MSE : KL       | 0:1:0     | 1:1:0.01   | 1:1:0.01
Warm-up ratio       | 0.05      | 0.05       | 0.05
Training epoch      | 2         | 2          | 1
Batch size          | 2048      | 4096       | 4096
Gen resolution      | (252,252) | (252,252)  | (252,252)
Und resolution      | -         | (56,1024)  | (56,1024)
"""


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    for name in ("DATA", "RUNS", "CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)


def table_row(name: str, stage: StageConfig) -> str:
    """What the recipe has for a row of Table 1, in the table's notation, with numbers as float() reads them."""
    train, weights = stage.train, stage.method.loss_weights
    gen, und = stage.data.generation_size, stage.data.understanding_size
    reads_images = any(source.kind != "text_to_image" for source in stage.data.sources.values())
    values: dict[str, Any] = {
        "Max learning rate": train.schedule.max_learning_rate,
        "Min learning rate": train.schedule.min_learning_rate,
        "LR scheduler": train.schedule.kind,
        "Weight decay": train.optimizer.weight_decay,
        "Gradient norm clip": train.optimizer.clip_norm,
        "beta1": train.optimizer.beta1,
        "beta2": train.optimizer.beta2,
        "epsilon": train.optimizer.epsilon,
        "CE : MSE : KL": f"{weights.cross_entropy:g}:{weights.mse:g}:{weights.kl:g}",
        "Warm-up ratio": train.schedule.warmup_ratio,
        "Training epoch": train.epochs,
        "Batch size": train.global_batch_size,
        "Gen resolution": f"({gen.min_side},{gen.max_side})",
        "Und resolution": f"({und.min_side},{und.max_side})" if reads_images else "-",
    }
    return str(values[name])


def test_7b_recipe_has_table_1() -> None:
    recipe = load_recipe(LARGE)
    header, *rows = [[cell.strip() for cell in line.split("|")] for line in TABLE_1.strip("\n").splitlines()]
    assert list(recipe.stages) == header[1:]
    assert len(rows) == 14
    for name, *printed in rows:
        for stage, expected in zip(header[1:], printed, strict=True):
            got = table_row(name, recipe.stages[stage])
            is_number = expected.replace(".", "").replace("e-", "").isdigit()
            assert (float(got) == float(expected)) if is_number else (got == expected), f"{name}, {stage}: {got}"


def test_7b_recipe_mixes_the_papers_sample_counts() -> None:
    """Section 3.3: 3.5M understanding, 5M (warm-up: 20M) text to image, 1.2M editing."""
    mixes = {
        name: {source.kind: source.weight for source in stage.data.sources.values()}
        for name, stage in load_recipe(LARGE).stages.items()
    }
    assert mixes == {
        "warm_up": {"text_to_image": 20.0},
        "pretrain": {"understanding": 3.5, "text_to_image": 5.0},
        "sft": {"understanding": 3.5, "text_to_image": 5.0, "editing": 1.2},
    }


def test_large_recipes_generate_81_visual_tokens() -> None:
    """Section 4.1: images are represented as 81 visual tokens."""
    for path in (LARGE, MIXTURE):
        stage = load_recipe(path).stages["sft"]
        assert (stage.data.generation_size.max_side // stage.model.vision_encoder.token_pixels) ** 2 == 81


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_recipes_load_and_fit(path: str) -> None:
    recipe = load_recipe(path)
    assert [(stage.name, stage.after) for stage in recipe.stages.values()] == STAGES[path]
    for stage in recipe.stages.values():
        assert check_layout(stage, WORLD_SIZES[path]) >= 1
        assert stage.train.trainable[-1].pattern == "*", "every parameter is covered"


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_recipes_survive_their_dump(path: str, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "dump.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe


def test_what_trains_is_the_same_at_all_sizes() -> None:
    def tables(recipe: Recipe) -> dict[str, list[tuple[str, bool]]]:
        return {
            name: [(rule.pattern, rule.train) for rule in stage.train.trainable]
            for name, stage in recipe.stages.items()
            if stage.method.name == "orion"
        }

    assert tables(load_recipe(LARGE)) == tables(load_recipe(SMALL))
    assert tables(load_recipe(LARGE))["warm_up"] == [("vision_head.*", True), ("*", False)]


def test_sources_of_small_and_large_are_of_the_same_kinds() -> None:
    for name, large in load_recipe(LARGE).stages.items():
        small = load_recipe(SMALL).stages[name]
        assert [s.kind for s in large.data.sources.values()] == [s.kind for s in small.data.sources.values()]


def test_data_folder_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/elsewhere")
    for path in WORLD_SIZES:
        for stage in load_recipe(path).stages.values():
            assert all(fnmatch(source.path, "/elsewhere/*") for source in stage.data.sources.values())


def test_shapes_recipe_is_the_shipped_base_model() -> None:
    """The recipe repeats the config of the base model in tools/, so that it can be read without it."""
    folder = Path("tools/base_models/shapes_vlm")
    published = json.loads((folder / "config.json").read_text())
    published_model, model = to_model_config(published), load_recipe(SMALL).stages["sft"].model
    assert model.vision_encoder == published_model.vision_encoder
    assert model.backbone == published_model.backbone
    tokens = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    assert model.token_ids.model_dump() == {
        "pad": tokens["<|endoftext|>"],
        "im_start": tokens["<|im_start|>"],
        "im_end": tokens["<|im_end|>"],
        "vision_start": tokens["<|vision_start|>"],
        "vision_end": tokens["<|vision_end|>"],
        "image_pad": tokens["<|image_pad|>"],
    }
