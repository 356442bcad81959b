"""MMCORE's recipes: they load, fit their machines, and carry what the paper says."""

from pathlib import Path

import pytest
import yaml

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import dump, load_recipe
from megatron_unimm.config.methods import MMCoreConfig, MMCoreDiffusionConfig
from megatron_unimm.config.model import SiglipConfig
from megatron_unimm.config.queries import SiglipTeacher
from megatron_unimm.config.recipe import StageConfig

DENSE, MIXTURE, SMALL = (f"configs/mmcore/{name}.yaml" for name in ("qwen2_5_vl_7b", "qwen3_vl_30b_a3b", "shapes"))
WORLD_SIZES = {DENSE: 64 * 8, MIXTURE: 64 * 8, SMALL: 1}
LARGE = (DENSE, MIXTURE)


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    for name in ("DATA", "RUNS", "CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)


def vlm_stage(path: str) -> StageConfig:
    return load_recipe(path).stages["vlm"]


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_recipes_load_and_fit(path: str, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    for stage in recipe.stages.values():
        assert check_layout(stage, WORLD_SIZES[path]) >= 1
    (tmp_path / "dump.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_all_of_the_vlm_trains_on_both_losses(path: str) -> None:
    """Section 3.1.1: the whole backbone is fine-tuned, on understanding and generation; eq. 2 has both terms."""
    stage = vlm_stage(path)
    assert [(rule.pattern, rule.train) for rule in stage.train.trainable] == [("*", True)]
    assert isinstance(stage.method, MMCoreConfig)
    assert min(stage.method.loss_weights.llm, stage.method.loss_weights.vis) > 0
    kinds = {source.kind for source in stage.data.sources.values()}
    assert kinds >= {"understanding", "text_to_image", "editing"}
    assert stage.queries is not None
    assert stage.queries.connector.num_layers == 0, "section 1: no explicit connector"


@pytest.mark.parametrize("path", LARGE)
def test_large_recipes_have_the_papers_figures(path: str) -> None:
    """Section 3.1.2: 64 queries, a grid of 8 x 8; Table 1: 50k steps."""
    stage = vlm_stage(path)
    assert stage.queries is not None
    assert (stage.queries.num_queries, stage.queries.grid) == (64, (8, 8))
    assert stage.train.steps == 50_000


def test_teacher_is_the_published_siglip() -> None:
    """The recipe repeats a model file, so that it can be read without it."""
    stage = vlm_stage(DENSE)
    assert stage.queries is not None
    assert isinstance(stage.queries.teacher, SiglipTeacher)
    published = yaml.safe_load(Path("configs/models/siglip_so400m_patch14_384.yaml").read_text())["siglip"]
    assert stage.queries.teacher.encoder == SiglipConfig.model_validate(published)
    assert stage.queries.latent_size(stage.model) == 1152


def test_own_teacher_has_whole_cells() -> None:
    """Pictures of 16 x 16 visual tokens, 2 x 2 of them for each query."""
    stage = vlm_stage(MIXTURE)
    assert stage.queries is not None
    side = stage.data.generation_size.max_side // stage.model.vision_encoder.token_pixels
    assert side == 2 * stage.queries.grid[0] == 2 * stage.queries.grid[1]


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_what_draws_trains_behind_the_frozen_vlm(path: str) -> None:
    """Section 3.2: more words than visual latents are left out at first, then as many; the fine-tuning after it keeps
    "the same dropout settings", learns more slowly, and starts from it."""
    recipe = load_recipe(path)
    first, second = recipe.stages["diffusion"], recipe.stages["diffusion_sft"]
    assert (first.after, second.after) == ("vlm", "diffusion")
    for stage in (first, second):
        rules = [(rule.pattern, rule.train) for rule in stage.train.trainable]
        assert rules == [("vlm.*", False), ("vae.*", False), ("*", True)]
        assert {source.kind for source in stage.data.sources.values()} == {"text_to_image", "editing", "interleaved"}
    assert isinstance(first.method, MMCoreDiffusionConfig)
    assert isinstance(second.method, MMCoreDiffusionConfig)
    assert first.method.text_dropout.at(0) > first.method.visual_dropout.at(0)
    for rates in ("text_dropout", "visual_dropout"):
        end, same = vars(first.method)[rates].end, vars(second.method)[rates]
        assert same.at(0) == same.at(10**6) == end
    assert second.train.schedule.max_learning_rate < first.train.schedule.max_learning_rate


@pytest.mark.parametrize("path", LARGE)
def test_fine_tuning_has_data_of_its_own(path: str) -> None:
    """Section 3.2: "a specialized high-quality dataset"."""
    recipe = load_recipe(path)
    paths = [
        {source.path for source in recipe.stages[name].data.sources.values()} for name in ("diffusion", "diffusion_sft")
    ]
    assert not paths[0] & paths[1]
