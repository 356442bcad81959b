"""HieraQuery's recipes: the paper's numbers, layouts on the hardware that they name, and sizes for all scales."""

from pathlib import Path

import pytest

from megatron_unimm.config.layout import check_layout, chunk_of_layer
from megatron_unimm.config.load import load_recipe
from megatron_unimm.data.sizes import check_size

LARGE = tuple(f"{vlm}{dit}" for vlm in ("ming_lite_omni", "qwen3_vl_30b_a3b") for dit in ("", "_sana"))


@pytest.mark.parametrize("name", [*LARGE, "shapes"])
def test_stages_and_sizes(name: str, repo: Path) -> None:
    """Three stages one after another; the VLM is frozen but for its queries; all scales have whole image tokens."""
    stages = load_recipe(repo / f"configs/hieraquery/{name}.yaml", []).stages
    assert {stage.name: stage.after for stage in stages.values()} == {
        "text_to_image": None,
        "reconstruction": "text_to_image",
        "editing": "reconstruction",
    }
    for stage in stages.values():
        rules = [(rule.pattern, rule.train) for rule in stage.train.trainable]
        assert rules[:2] == [("vlm.query_tokens.*", True), ("vlm.*", False)]
        assert [float(share) for share in stage.scales.shares] == [0.25, 0.5, 1.0]
        check_size(stage.data.drawing_size, stage.generator.token_pixels * stage.scales.multiple, "data.drawing_size")
        check_layout(stage, 1 if name == "shapes" else 512)
        # Section 4.2 has both; SANA sees one picture at a time.
        assert stage.generator.mmdit.family == ("sana" if name.endswith("_sana") else "sd3")
        assert stage.method.shows_sources != name.endswith("_sana")


@pytest.mark.parametrize("name", LARGE)
def test_numbers_of_the_paper(name: str, repo: Path) -> None:
    """Section 4.2 and 6.3."""
    for stage in load_recipe(repo / f"configs/hieraquery/{name}.yaml", []).stages.values():
        schedule, connector = stage.train.schedule, stage.hieraquery.connector
        rates = schedule.initial_learning_rate, schedule.max_learning_rate, schedule.min_learning_rate
        assert (schedule.kind, rates, stage.train.epochs) == ("cosine", (1e-6, 5e-5, 1e-6), 2)
        assert (connector.num_layers, connector.hidden_size) == (24, 896)
        assert stage.scales.queries == (16, 64, 256)


def test_the_chunk_that_has_a_layer(repo: Path) -> None:
    layout = "system.parallel={pipeline: 2, virtual_pipeline: 2, layers_per_stage: [1, 2, 2, 1]}"
    stage = load_recipe(repo / "configs/hieraquery/shapes.yaml", [layout]).stages["editing"]
    assert [chunk_of_layer(stage, layer) for layer in range(1, 7)] == [(0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1)]
