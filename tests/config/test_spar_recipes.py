"""SPAR's recipes: they load, fit their machines, and have what the abstract says."""

from pathlib import Path

import pytest

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import dump, load_recipe
from megatron_unimm.config.methods import SparAlignmentConfig, SparConfig, SparTokenizerConfig
from megatron_unimm.errors import ConfigError

LARGE, SMALL = (f"configs/spar/{name}.yaml" for name in ("spar_3b", "shapes"))
WORLD_SIZES = {LARGE: 64 * 8, SMALL: 1}


@pytest.fixture(autouse=True)
def _in_repo(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)
    for name in ("DATA", "RUNS", "CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_recipes_load_and_fit(path: str, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert [(name, stage.after) for name, stage in recipe.stages.items()] == [
        ("tokenizer", None),
        ("tokenizer_adversarial", "tokenizer"),
        ("alignment", None),
        ("joint", "alignment"),
        ("sft", "joint"),
    ]
    for stage in recipe.stages.values():
        assert check_layout(stage, WORLD_SIZES[path]) >= 1
    (tmp_path / "dump.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "dump.yaml") == recipe


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_streams_are_asymmetric_and_held_to_the_encoder(path: str) -> None:
    """ "A lightweight semantic stream", "a Transformer-augmented pixel stream"; a discriminator in the second stage."""
    stages = load_recipe(path).stages
    first, second = stages["tokenizer"], stages["tokenizer_adversarial"]
    for stage in (first, second):
        assert isinstance(stage.method, SparTokenizerConfig)
        assert stage.tokenizer is not None
        assert stage.tokenizer.pixel is not None
        semantic, pixel = stage.tokenizer.semantic, stage.tokenizer.pixel
        assert semantic.num_layers * semantic.hidden_size**2 < pixel.num_layers * pixel.hidden_size**2 / 4
        assert min(stage.method.loss_weights.semantic, stage.method.loss_weights.latent) > 0
        assert (stage.method.adversarial is None) == (stage is first)


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_alignment_mixes_all_layers(path: str) -> None:
    stage = load_recipe(path).stages["alignment"]
    assert isinstance(stage.method, SparAlignmentConfig)
    assert stage.routing is not None
    assert stage.routing.mode == "dynamic"
    assert stage.routing.mixed(stage.model.backbone.num_layers) == list(range(stage.model.backbone.num_layers))


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["routing={mode: static}"], "reads the last layer; set it to null"),
        (["stages.alignment.routing.layers=[1, 9]"], r"routing.layers \[1, 9\] must lie in 0..3"),
        (["stages.alignment.routing.layers=[2, 1]"], "must ascend"),
        (["stages.alignment.routing.top_k=5"], "top_k 5 is more than the 4 layers"),
    ],
)
def test_wrong_routing_is_refused(overrides: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_recipe(SMALL, overrides)


@pytest.mark.parametrize("path", WORLD_SIZES)
def test_what_draws_is_in_the_tokenizers_space_and_taught_by_it(path: str) -> None:
    for name in ("joint", "sft"):
        stage = load_recipe(path).stages[name]
        assert isinstance(stage.method, SparConfig)
        assert stage.method.alignment is not None
        assert stage.method.alignment.teacher == "internal"
        assert stage.generator is not None
        assert stage.tokenizer is not None
        assert stage.generator.mmdit.latent_channels == stage.tokenizer.latent_channels
        assert stage.generator.token_pixels == stage.model.vision_encoder.token_pixels
        assert stage.routing is not None


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("generator.vae.pixels_per_latent=8", "pixels_per_latent is 8, but a visual token .* covers 16; make it 16"),
        ("tokenizer.latent_channels=16", "latent_channels is 32, but tokenizer.latent_channels 16"),
        ("stages.joint.method.alignment.layer=7", "alignment.layer is 7, but generator.mmdit has 6 layers"),
    ],
)
def test_a_latent_space_that_does_not_fit_is_refused(override: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_recipe(SMALL, [override])
