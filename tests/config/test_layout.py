"""Every rule of ``check_layout``: what passes, and the line that says why not."""

from pathlib import Path

import pytest

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError

MOE = "model.backbone.moe={num_experts: 8, top_k: 2, expert_mlp_size: 96, shared_expert_size: 64}"
MODEL = (
    "model.backbone.vocab_size=512",
    "model.backbone.num_layers=6",
    "model.backbone.num_heads=8",
    "model.backbone.num_kv_heads=2",
    "model.backbone.hidden_size=256",
    "model.backbone.mlp_size=512",
    "model.vision_encoder.out_size=256",
    "model.vision_encoder.num_heads=4",
    "model.vision_encoder.mlp_size=352",
    "data.sequence_length=1024",
)
"""Sizes that the numbers below divide or do not."""
ROWS = ("train.global_batch_size=null", "stages.sft.train.global_batch_size=null")
FP8 = ("system.precision.fp8={}", "system.precision.dtype=bfloat16")


@pytest.fixture
def shapes(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Shapes recipe, whose sizes ``MODEL`` replaces."""
    monkeypatch.chdir(repo)
    return Path("configs/orion/shapes.yaml")


def stage_with(path: Path, *settings: str) -> StageConfig:
    """The SFT stage; settings without a section are of ``system.parallel``."""
    overrides = [s if "." in s.partition("=")[0] else f"system.parallel.{s}" for s in settings]
    return load_recipe(path, [*MODEL, *overrides]).stages["sft"]


@pytest.mark.parametrize(
    ("settings", "world_size", "data_parallel"),
    [
        ([], 1, 1),
        ([], 6, 6),
        (["tensor=2"], 6, 3),
        (["tensor=4", "sequence=true"], 8, 2),
        (["pipeline=3", "virtual_pipeline=2"], 3, 1),
        (["pipeline=4", "layers_per_stage=[0, 2, 2, 2]"], 4, 1),
        (["tensor=2", "sequence=true", "context=2", "pipeline=2"], 16, 2),
        ([MOE, "expert=4"], 8, 8),
        ([MOE, "expert=2", "expert_tensor=2", "tensor=2", "sequence=true"], 4, 2),
        ([*FP8, "tensor=2", "sequence=true"], 4, 2),
        (["system.overlap={grad_reduce: true, param_gather: true}"], 2, 2),
        ([*ROWS, "train.global_batch_rows=12"], 4, 4),
        ([*ROWS, "train.global_batch_rows=12", "pipeline=3", "virtual_pipeline=2"], 6, 2),
    ],
)
def test_layouts_that_fit(shapes: Path, settings: list[str], world_size: int, data_parallel: int) -> None:
    assert check_layout(stage_with(shapes, *settings), world_size) == data_parallel


@pytest.mark.parametrize(
    ("settings", "world_size", "where", "what"),
    [
        (
            [*ROWS, "train.global_batch_rows=10"],
            4,
            "train.global_batch_rows",
            "10 is no multiple of data parallel 4 = 4; take 12",
        ),
        (
            [*ROWS, "train.global_batch_rows=8", "pipeline=3", "virtual_pipeline=2"],
            6,
            "train.global_batch_rows",
            "8 is no multiple of data parallel 2 x pipeline 3 = 6; take 12",
        ),
        (["tensor=4"], 6, "system.parallel", "tensor 4 x pipeline 1 x context 1 = 4 does not divide 6 ranks"),
        (
            [MOE, "expert=4"],
            6,
            "system.parallel",
            "expert_tensor 1 x expert 4 x pipeline 1 = 4 does not divide 6 ranks",
        ),
        (["tensor=3"], 3, "system.parallel.tensor", "3 does not divide model.backbone.num_heads 8"),
        (["tensor=8"], 8, "system.parallel.tensor", "8 does not divide model.vision_encoder.num_heads 4"),
        (
            ["tensor=4", "model.vision_encoder.mlp_size=354"],
            4,
            "system.parallel.tensor",
            "4 does not divide model.vision_encoder.mlp_size 354",
        ),
        (["tensor=4", "model.backbone.mlp_size=510"], 4, "system.parallel.tensor", "model.backbone.mlp_size 510"),
        (["tensor=4", "model.backbone.vocab_size=510"], 4, "system.parallel.tensor", "model.backbone.vocab_size 510"),
        (
            ["tensor=4", "model.backbone.num_heads=12", "model.backbone.num_kv_heads=6"],
            4,
            "system.parallel.tensor",
            "4 is neither a divisor nor a multiple of model.backbone.num_kv_heads 6",
        ),
        (
            [
                "tensor=3",
                "model.backbone={num_heads: 6, num_kv_heads: 3, mlp_size: 513, vocab_size: 513}",
                "model.vision_encoder={num_heads: 6, mlp_size: 351}",
            ],
            3,
            "system.parallel.tensor",
            "3 does not divide method.vision_head.expansion x hidden_size 2048",
        ),
        (["sequence=true"], 1, "system.parallel.sequence", "true, but tensor is 1"),
        ([MOE, "tensor=2"], 2, "system.parallel.sequence", "false, but tensor is 2 and the model has experts"),
        (["expert=2"], 2, "system.parallel.expert", "2, but model.backbone.moe is null"),
        (["expert_tensor=2"], 2, "system.parallel.expert_tensor", "2, but model.backbone.moe is null"),
        ([MOE, "expert=3"], 3, "system.parallel.expert", "3 does not divide model.backbone.moe.num_experts 8"),
        (
            [MOE, "expert_tensor=5"],
            5,
            "system.parallel.expert_tensor",
            "5 does not divide model.backbone.moe.expert_mlp_size",
        ),
        (
            [MOE, "model.backbone.moe.shared_expert_size=65", "tensor=2", "sequence=true"],
            2,
            "system.parallel.tensor",
            "2 does not divide model.backbone.moe.shared_expert_size 65",
        ),
        (["virtual_pipeline=2"], 1, "system.parallel.virtual_pipeline", "2, but pipeline is 1"),
        (["pipeline=4"], 4, "system.parallel.pipeline", "= 4 does not divide model.backbone.num_layers 6"),
        (["pipeline=2", "virtual_pipeline=2"], 2, "system.parallel.pipeline", "= 4 does not divide"),
        (
            ["pipeline=2", "layers_per_stage=[6]"],
            2,
            "system.parallel.layers_per_stage",
            "has 1 numbers, but pipeline 2",
        ),
        (["pipeline=2", "layers_per_stage=[2, 3]"], 2, "system.parallel.layers_per_stage", "[2, 3] sums to 5, but"),
        (["pipeline=2", "layers_per_stage=[7, -1]"], 2, "system.parallel.layers_per_stage", "none negative"),
        (
            ["tensor=4", "sequence=true", "data.sequence_length=1022"],
            4,
            "data.sequence_length",
            "1022 is not a multiple of tensor 4 = 4; take 1024",
        ),
        (
            ["tensor=2", "sequence=true", "context=2", "data.sequence_length=1020"],
            4,
            "data.sequence_length",
            "1020 is not a multiple of tensor 2 x 2 x context 2 = 8; take 1024",
        ),
        (["context=2", "data.sequence_length=1022"], 2, "data.sequence_length", "2 x context 2 = 4; take 1024"),
        (
            ["system.layers=torch", "system.recompute={granularity: selective, modules: [layernorm]}"],
            1,
            "system.recompute.modules",
            "layernorm can only be recomputed in Transformer Engine layers",
        ),
        (["system.overlap.param_gather=true"], 1, "system.overlap.param_gather", "system.overlap.grad_reduce is false"),
        (
            ["system.overlap.tensor_parallel=true"],
            1,
            "system.overlap.tensor_parallel",
            "system.parallel.sequence is false",
        ),
        (["system.cuda_graph=local", "system.platform=cpu"], 1, "system.cuda_graph", "set, but system.platform is cpu"),
        ([*FP8, "system.platform=cpu"], 1, "system.precision.fp8", "set, but system.platform is cpu"),
        ([*FP8, "system.layers=torch"], 1, "system.precision.fp8", "set, but system.layers is torch"),
        (["system.precision.fp8={}"], 1, "system.precision.dtype", "float32, but fp8 is set"),
        (
            [*FP8, "model.backbone.mlp_size=520"],
            1,
            "system.precision.fp8",
            "mlp_size / tensor is 520, no multiple of 16",
        ),
        ([*FP8, "data.sequence_length=1000"], 1, "data.sequence_length", "FP8 recipe tensorwise; take 1008"),
        (
            [*FP8, "system.precision.fp8.recipe=blockwise", "tensor=4", "sequence=true", "data.sequence_length=768"],
            4,
            "data.sequence_length",
            "768 over 4 ranks is no multiple of the 128 rows of FP8 recipe blockwise; take 1024",
        ),
        (
            [*FP8, "system.precision.fp8.recipe=mxfp8", "context=2", "data.sequence_length=96"],
            2,
            "data.sequence_length",
            "96 over 2 ranks is no multiple of the 32 rows of FP8 recipe mxfp8; take 128",
        ),
        (
            [*FP8, "system.precision.fp8={recipe: delayed, first_last_layers_bf16: true}"],
            1,
            "system.precision.fp8.first_last_layers_bf16",
            "the recipe is delayed",
        ),
        (
            [
                *FP8,
                "system.precision.fp8.recipe=delayed",
                "system.recompute={granularity: selective, modules: [layernorm]}",
            ],
            1,
            "system.recompute.modules",
            "layernorm",
        ),
    ],
)
def test_layouts_that_do_not_fit(shapes: Path, settings: list[str], world_size: int, where: str, what: str) -> None:
    stage = stage_with(shapes, *settings)
    with pytest.raises(ConfigError) as caught:
        check_layout(stage, world_size)
    assert caught.value.where == where
    assert what in caught.value.what


def with_sana(recipe: str, repo: Path, tmp_path: Path, *overrides: str) -> StageConfig:
    """The last stage of a recipe whose image generator is SANA."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: [{repo}/configs/{recipe}.yaml, {repo}/configs/models/sana_1600m.yaml]\nname: mine\n")
    return list(load_recipe(path, overrides).stages.values())[-1]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("{tensor: 2, sequence: true, pipeline: 2}", ""),
        (
            "{context: 2}",
            "system.parallel.context: 2, but the convolutions of generator.mmdit (family sana) see a picture whole",
        ),
        ("{tensor: 7}", "system.parallel.tensor: 7 does not divide generator.mmdit.num_cross_heads 20"),
        ("{tensor: 4}", "system.parallel.tensor: 4 does not divide generator.mmdit.num_heads 70"),
    ],
)
def test_a_trunk_of_sana(layout: str, message: str, repo: Path, tmp_path: Path) -> None:
    alone = "{tensor: 1, sequence: false, pipeline: 1, virtual_pipeline: 1, layers_per_stage: null, context: 1}"
    overrides = [f"system.parallel={alone}", f"system.parallel={layout}"]
    stage = with_sana("orion/decoder_flux", repo, tmp_path, *overrides)
    if not message:
        assert check_layout(stage, 8) == 2
        return
    with pytest.raises(ConfigError) as caught:
        check_layout(stage, 56)
    assert str(caught.value).startswith(message)


def test_methods_that_need_a_transformer_that_looks_back(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method mmcore_\w+ shows a picture those before it, which .* sana cannot"):
        with_sana("mmcore/qwen2_5_vl_7b", repo, tmp_path)
    with pytest.raises(ConfigError, match=r"sana cannot; take sd3 or flux, or set method.shows_sources to false"):
        with_sana("hieraquery/ming_lite_omni", repo, tmp_path)
