"""The dry run: every recipe at its real size, and what it finds."""

from itertools import pairwise
from pathlib import Path

import pytest
from small_orion import small_stage

from megatron_unimm.cli import main
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError
from megatron_unimm.methods.registry import footprints_of
from megatron_unimm.plan.pipeline import places
from megatron_unimm.train.dry_run import ChunkStep, dry_run_stage

REPO = Path(__file__).resolve().parents[2]
RECIPES = [path for path in sorted((REPO / "configs").rglob("*.yaml")) if "\nstages:" in path.read_text()]
STAGES = [
    (path.relative_to(REPO).as_posix(), stage)
    for path in RECIPES
    if path.name != "recipe.yaml"  # names no model
    for stage in load_recipe(path).stages
]


def check_chain(stage: StageConfig, steps: list[ChunkStep]) -> None:
    """One chunk after another through the model: layers, messages, and a gradient for all that trains."""
    parallel = stage.system.parallel
    assert len(steps) == parallel.pipeline * parallel.virtual_pipeline
    assert [step.num_layers for step in steps] == [len(place.layers) for rank in places(stage) for place in rank]
    through = sorted(steps, key=lambda step: (step.virtual_stage, step.pipeline_stage))
    for before, after in pairwise(through):
        assert before.sent == after.received
    assert through[0].received is None
    assert len(through[-1].sent) == 1  # sums of the loss terms
    for step in steps:
        assert step.num_gradients == step.num_trained_tensors
    assert sum(step.trained for step in steps) > 0


@pytest.mark.parametrize(("path", "stage_name"), STAGES)
def test_every_recipe_at_its_real_size(path: str, stage_name: str, repo: Path) -> None:
    """On 512 ranks, one of each pipeline stage."""
    stage = load_recipe(repo / path).stages[stage_name]
    check_chain(stage, dry_run_stage(stage, world_size=512, all_stages=True))


@pytest.mark.parametrize(
    "overrides",
    [
        (
            "system.parallel={tensor: 2, sequence: true, pipeline: 2, virtual_pipeline: 2}",
            "model.backbone.num_layers=4",
        ),
        ("system.parallel={context: 2, tensor: 2}", "system.recompute.granularity=full"),
        (
            "system.parallel={pipeline: 2, expert: 4, tensor: 2, sequence: true}",
            "model.backbone.moe={num_experts: 8, top_k: 2, expert_mlp_size: 48}",
        ),
        ("method.token_noise=0.5",),
        (
            "data.feature_cache=somewhere",
            "train.trainable=[{pattern: 'vision_encoder.*', train: false}, {pattern: '*'}]",
        ),
    ],
)
def test_layouts(overrides: tuple[str, ...], repo: Path) -> None:
    stage = small_stage(repo, "data.sequence_length=256", *overrides)
    check_chain(stage, dry_run_stage(stage, world_size=16, all_stages=True))


def test_any_rank_can_be_played(repo: Path) -> None:
    """The last of a pipeline has the heads, whatever its number; its parameters are those of the last stage's first."""
    stage = small_stage(repo, "system.parallel={pipeline: 2, tensor: 2}")
    (last,) = dry_run_stage(stage, world_size=16, rank=15)
    assert (last.rank, last.pipeline_stage) == (15, 1)
    first, second = dry_run_stage(stage, world_size=16, all_stages=True)
    assert (last.parameters, last.trained) == (second.parameters, second.trained)
    assert first.parameters != second.parameters


def test_what_is_printed(repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.setenv("DATA", "nowhere")
    arguments = ["train", "configs/orion/shapes.yaml", "--stage", "sft", "--dry-run", "--world-size", "2"]
    assert main.run([*arguments, "train.logging.decoder=configs"]) == 0
    out = capsys.readouterr().out
    assert "data.sources.editing.path: nowhere/train/editing.jsonl (missing)" in out
    assert "train.logging.decoder: configs (is there)" in out
    assert "stage sft: 2 ranks, data 2" in out
    stage = load_recipe(repo / "configs/orion/shapes.yaml").stages["sft"]
    weights = {name: source.weight for name, source in stage.data.sources.items()}
    for name, weight in weights.items():
        assert f"{name} {weight / sum(weights.values()):.1%}" in out
    assert "tensors" in out
    assert "vision_head" in out


def test_wrong_layouts_and_tables_are_refused(repo: Path) -> None:
    with pytest.raises(ConfigError, match="does not divide 3 ranks"):
        dry_run_stage(small_stage(repo, "system.parallel.tensor=2"), world_size=3)
    with pytest.raises(ConfigError, match="no_such_part"):
        dry_run_stage(small_stage(repo, "train.trainable=[{pattern: 'no_such_part.*'}, {pattern: '*'}]"), world_size=1)


def test_options_of_a_dry_run_go_with_it(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    assert main.run(["train", "configs/orion/shapes.yaml", "--stage", "sft", "--all-stages"]) == 2
    assert "go with --dry-run" in capsys.readouterr().err


def test_typical_rows_are_full_and_of_the_mix(repo: Path) -> None:
    """Kinds in the sources' proportions, and no room for another sample."""
    stage = load_recipe(repo / "configs/orion/qwen2_5_vl_7b.yaml").stages["sft"]
    row = footprints_of(stage).typical_row(stage, pixels=False)
    share = row.kinds.count("text_to_image") / len(row.kinds)
    assert share == pytest.approx(5.0 / 9.7, abs=1 / len(row.kinds))
    longest = max(end - start for start, end in pairwise(row.segment_bounds[:-1]))
    assert row.num_padding < longest
    drawn = footprints_of(stage).typical_row(stage, kinds=("text_to_image",), pixels=False)
    assert len(drawn.predict_index) == 81 * drawn.num_images
