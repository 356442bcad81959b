"""Recipes from files and overrides: what merges, what is refused, and that every message names the place."""

from pathlib import Path

import pytest

from megatron_unimm.config.base import as_now
from megatron_unimm.config.load import dump, load_recipe, load_stage, select_stage
from megatron_unimm.config.model import BackboneConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import ConfigError

MODEL = """
model:
  vision_encoder: {family: qwen2_5, num_layers: 2, hidden_size: 64, num_heads: 4, mlp_size: 128, out_size: 128}
  backbone:
    num_layers: 4
    hidden_size: 128
    num_heads: 8
    num_kv_heads: 2
    head_size: 16
    mlp_size: 256
    vocab_size: 512
    mrope_sections: [2, 3, 3]
method: {name: orion}
"""
RECIPE = (
    "name: small\n"
    + MODEL
    + """
data:
  sources:
    words: {path: words.jsonl, kind: understanding}
    images: {path: images.jsonl, kind: text_to_image, weight: 2}
train:
  steps: 10
  global_batch_size: 4
  optimizer: {beta2: 0.9}
  schedule: {max_learning_rate: 1e-3, min_learning_rate: 0}
  trainable:
    - {pattern: "vision_head.*", learning_rate_multiplier: 2}
    - {pattern: "*"}
stages:
  warm_up:
    data: {sources: {words: null}}
    train:
      schedule: {kind: constant, min_learning_rate: 1e-3}
      trainable: [{pattern: "*"}]
  sft:
"""
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good recipe of two stages, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    return Path("small.yaml")


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)
    return str(caught.value)


def edited(old: str, new: str) -> Path:
    assert old in RECIPE
    path = Path("edited.yaml")
    path.write_text(RECIPE.replace(old, new, 1))
    return path


def line_of(path: Path, text: str) -> int:
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


# --- what a file means


def test_stages_lie_on_shared_defaults(recipe: Path) -> None:
    warm_up, sft = load_recipe(recipe).stages.values()
    assert (warm_up.train.schedule.kind, sft.train.schedule.kind) == ("constant", "cosine")
    assert warm_up.train.schedule.max_learning_rate == sft.train.schedule.max_learning_rate == 1e-3
    assert warm_up.train.optimizer.beta2 == 0.9
    assert warm_up.train.optimizer.beta1 == 0.9, "a section that is given in part keeps its other defaults"
    assert [rule.pattern for rule in warm_up.train.trainable] == ["*"], "lists replace"
    assert len(sft.train.trainable) == 2


def test_null_leaves_a_source_out(recipe: Path) -> None:
    warm_up, sft = load_recipe(recipe).stages.values()
    assert list(warm_up.data.sources) == ["images"]
    assert list(sft.data.sources) == ["words", "images"]


def test_stages_know_their_names_and_order(recipe: Path) -> None:
    stages = load_recipe(recipe).stages
    assert [(name, stage.name, stage.after) for name, stage in stages.items()] == [
        ("warm_up", "warm_up", None),
        ("sft", "sft", "warm_up"),
    ]
    assert load_recipe(recipe, ["stages.sft.after=null"]).stages["sft"].after is None


def test_plain_exponents_are_numbers(recipe: Path) -> None:
    assert load_recipe(recipe, ["train.optimizer.epsilon=1e-7"]).stages["sft"].train.optimizer.epsilon == 1e-7


def test_base_files_chain(recipe: Path) -> None:
    Path("more").mkdir()
    Path("more/middle.yaml").write_text("base: ../small.yaml\ntrain: {steps: 20, seed: 3}\n")
    Path("more/top.yaml").write_text("base: middle.yaml\nname: top\nstages: {sft: {train: {steps: 30}}}\n")
    top = load_recipe("more/top.yaml")
    assert top.name == "top"
    assert [stage.train.steps for stage in top.stages.values()] == [20, 30]
    assert [stage.train.seed for stage in top.stages.values()] == [3, 3]


def test_several_bases(recipe: Path) -> None:
    """Later ones on top, the file itself on top of all."""
    Path("seed.yaml").write_text("train: {seed: 5, steps: 7}\n")
    Path("top.yaml").write_text("base: [small.yaml, seed.yaml]\nname: top\nstages: {sft: {train: {steps: 30}}}\n")
    stages = load_recipe("top.yaml").stages.values()
    assert [(stage.train.seed, stage.train.steps) for stage in stages] == [(5, 7), (5, 30)]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{num_layers: 2,", "model.vision_encoder.family: missing for stage warm_up"),
        ("{family: qwen, num_layers: 2,", "model.vision_encoder.family: wanted one of qwen2_5, qwen3, got qwen in"),
    ],
)
def test_the_family_of_a_tower_must_be_known(recipe: Path, written: str, message: str) -> None:
    path = edited("{family: qwen2_5, num_layers: 2,", written)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert message in str(error.value)


def test_another_family_replaces_the_section(recipe: Path) -> None:
    tower = "{family: qwen3, num_layers: 3, hidden_size: 64, num_heads: 4, mlp_size: 128, out_size: 128}"
    encoder = load_recipe(recipe, [f"model.vision_encoder={tower}"]).stages["sft"].model.vision_encoder
    assert (encoder.family, encoder.num_layers, encoder.patch_size) == ("qwen3", 3, 16)


def test_anchors_and_merge_keys(recipe: Path) -> None:
    path = edited("  optimizer: {beta2: 0.9}", "  optimizer: &o {beta2: 0.9}")
    path.write_text(path.read_text() + "    train:\n      optimizer: {<<: *o, beta1: 0.5}\n")
    optimizer = load_recipe(path).stages["sft"].train.optimizer
    assert (optimizer.beta1, optimizer.beta2) == (0.5, 0.9)


# --- environment variables


def test_variables_expand(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/somewhere")
    monkeypatch.delenv("ELSEWHERE", raising=False)
    path = edited("words.jsonl", '"${WHERE}/${ELSEWHERE:-a/b}/$${x}.jsonl"')
    sources = load_recipe(path).stages["sft"].data.sources
    assert sources["words"].path == "/somewhere/a/b/${x}.jsonl"


def test_unset_variable(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WHERE", raising=False)
    path = edited("words.jsonl", '"${WHERE}/w.jsonl"')
    line = line_of(path, "WHERE")
    assert refusal(path).startswith(f"data.sources.words.path: WHERE is not set in edited.yaml:{line}; export WHERE=")
    assert "cannot read '${1}'" in refusal(recipe, 'base_checkpoint="${1}"')


# --- overrides


def test_overrides_of_all_and_of_one_stage(recipe: Path) -> None:
    stages = load_recipe(recipe, ["train.steps=5", "stages.sft.train.steps=7", "name=other"]).stages
    assert [stage.train.steps for stage in stages.values()] == [5, 7]
    stages = load_recipe(recipe, ["stages.sft.train.steps=7", "train.steps=5"]).stages
    assert [stage.train.steps for stage in stages.values()] == [5, 5], "the later override wins"


def test_override_of_a_list_item(recipe: Path) -> None:
    rules = load_recipe(recipe, ["train.trainable.0.train=false"]).stages["sft"].train.trainable
    assert (rules[0].pattern, rules[0].train, rules[0].learning_rate_multiplier) == ("vision_head.*", False, 2)


def test_override_with_flow_values_merges_mappings(recipe: Path) -> None:
    stage = load_recipe(recipe, ["train.schedule={warmup_ratio: 0.1}", "system.precision.fp8.recipe=blockwise"]).stages[
        "sft"
    ]
    assert stage.train.schedule.warmup_ratio == 0.1
    assert stage.train.schedule.max_learning_rate == 1e-3
    assert stage.system.precision.fp8 is not None
    assert stage.system.precision.fp8.recipe == "blockwise"


def test_override_of_a_source_skips_stages_without_it(recipe: Path) -> None:
    warm_up, sft = load_recipe(recipe, ["data.sources.words.path=other.jsonl"]).stages.values()
    assert "words" not in warm_up.data.sources
    assert sft.data.sources["words"].path == "other.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer.beta3=1", "train.optimizer.beta3: unknown key on the command line, did you mean beta2?"),
        ("trian.steps=1", "trian.steps: unknown key on the command line, did you mean train?"),
        ("train.steps=abc", "train.steps: wanted an integer, got abc on the command line"),
        ("train.steps=1.5", "train.steps: wanted an integer, got 1.5 on the command line"),
        ("train.steps=0", "train.steps: wanted a number > 0, got 0 on the command line"),
        ("train.optimizer.beta1=1", "train.optimizer.beta1: wanted a number < 1, got 1 on the command line"),
        ("train.seed=.nan", "train.seed: wanted a finite number, got .nan on the command line"),
        ("data.packing=perhaps", "data.packing: wanted true or false, got perhaps on the command line"),
        ("train=5", "train: wanted a section (keys and values), got 5 on the command line"),
        ("train.trainable=5", "train.trainable: wanted a list, got 5 on the command line"),
        ("name=7", "name: wanted a string, got 7 on the command line"),
        ("system.platform=gpu", "system.platform: wanted one of auto, cuda, cpu, got gpu on the command line"),
        (
            "method.name=oryon",
            "method.name: wanted one of orion, orion_decoder, mmcore, mmcore_diffusion, mmcore_policy, hieraquery, "
            "spar_tokenizer, spar_alignment, spar, got oryon on the command line, did you mean orion?",
        ),
        ("steps", "steps: not of the form key.name=value, e.g. train.steps=5"),
        ("train..steps=5", "train..steps=5: not of the form key.name=value, e.g. train.steps=5"),
        ("stages.sft=5", "stages.sft: name the stage and a key in it, e.g. stages.sft.train.steps=5"),
        (
            "stages.stf.train.steps=5",
            "stages.stf.train.steps: no stage stf, did you mean sft?; the stages: warm_up, sft",
        ),
        ("stages.sft.after=x", "recipe: stages.sft.after is x, but the stages are warm_up, sft, in small.yaml:1"),
        ("train.trainable.0.pattern=*", "quote it: 'train.trainable.0.pattern=\"*\"'"),
        ("train.trainable.5.train=false", "is a list of 1; wanted a number below that, got 5"),
        ("train.steps.half=1", "train.steps.half: train.steps is 10 in small.yaml:21, it has no half inside"),
        ("data.sources.new.path=x", "data.sources.new.kind: missing for stage warm_up on the command line; add it"),
    ],
)
def test_refused_overrides(recipe: Path, override: str, message: str) -> None:
    assert message in refusal(recipe, override)


# --- what is wrong with a file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("beta2: 0.9", "beta3: 0.9", "train.optimizer.beta3: unknown key in edited.yaml:{line}, did you mean beta2?"),
        (
            "global_batch_size: 4",
            "gobal_batch_size: 4",
            "train.gobal_batch_size: unknown key in edited.yaml:{line}, did",
        ),
        ("data:", "dtaa:", "dtaa: unknown key in edited.yaml:{line}, did you mean data?"),
        ("steps: 10", "steps: ten", "train.steps: wanted an integer, got ten in edited.yaml:{line}"),
        (
            "kind: constant",
            "kind: lineal",
            "stages.warm_up.train.schedule.kind: wanted one of constant, cosine, got lineal",
        ),
        ("num_heads: 8", "num_heads: 9", "model.backbone: num_heads 9 is not a multiple of num_kv_heads 2"),
        ("steps: 10", "steps: 10\n  epochs: 1", "train: give exactly one of epochs and steps (epochs=1.0, steps=10)"),
        (
            "min_learning_rate: 0}",
            "min_learning_rate: 1}",
            "min_learning_rate 1.0 is larger than max_learning_rate 0.001",
        ),
        ("name: small", "", "name: missing in edited.yaml:"),
        ("steps: 10", "steps: 10\n  steps: 11", "train.steps: written twice, in edited.yaml:21 and in edited.yaml:22"),
        ("steps: 10", "7: 10", "train.7: wanted a string as key"),
        ("steps: 10", "steps: [", "edited.yaml: not valid YAML:"),
        ("steps: 10", "steps: &a [*a]", "train.steps.0: contains itself in edited.yaml:21"),
        ("name: small", "base: 5", "base: wanted a recipe file or a list of them in edited.yaml:1, got 5"),
        ("name: small", "name: small\nafter: sft", "after: unknown key in edited.yaml:2"),
        ("  sft:", "  sft: 5", "stages.sft: wanted a section (keys and values) in edited.yaml:"),
        ("  sft:", "  sft: {name: stf}", "stages.sft.name: stf in edited.yaml:"),
        ("  sft:", "  sft: {after: sft}", "stages.sft.after leads back to sft"),
        (RECIPE[RECIPE.index("stages:") :], "", "stages: missing in edited.yaml:"),
    ],
)
def test_refused_files(recipe: Path, old: str, new: str, message: str) -> None:
    path = edited(old, new)
    if "{line}" in message:
        message = message.replace("{line}", str(line_of(path, new)))
    assert message in refusal(path)


def test_missing_keys_are_counted(recipe: Path) -> None:
    path = edited("    num_layers: 4\n", "")
    assert refusal(path).startswith("model.backbone.num_layers: missing for stage warm_up in edited.yaml:")
    path = edited("steps: 10\n  global_batch_size: 4\n", "stps: 10\n")
    assert refusal(path) == "train.stps: unknown key in edited.yaml:21, did you mean steps?"
    path = edited("    num_layers: 4\n", "    num_layer: 4\n")
    assert refusal(path).startswith("model.backbone.num_layer: unknown key in edited.yaml:")
    assert refusal(path).endswith("did you mean num_layers? (and 1 more)")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "give exactly one of global_batch_size and global_batch_rows (global_batch_size=None"),
        ("global_batch_size: 4\n  global_batch_rows: 2", "give exactly one of global_batch_size and global_batch_rows"),
    ],
)
def test_a_step_is_counted_in_one_way(recipe: Path, written: str, message: str) -> None:
    assert message in refusal(edited("global_batch_size: 4", written))


def test_base_cycle(recipe: Path) -> None:
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: a.yaml\n")
    assert refusal("a.yaml") == "base: files that name each other as base: a.yaml -> b.yaml -> a.yaml"


def test_recipe_that_does_not_exist(recipe: Path) -> None:
    assert refusal("smal.yaml") == "smal.yaml: no such recipe; did you mean small.yaml?"
    assert "in nowhere" in refusal("nowhere/x.yaml")


def test_files_that_are_no_text(recipe: Path) -> None:
    assert "cannot be read as a UTF-8 text file" in refusal(".")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a UTF-8 text file" in refusal("bytes.yaml")
    Path("empty.yaml").write_text("")
    assert "wanted a recipe with the keys base, name, model" in refusal("empty.yaml")


# --- dump


def test_dump_gives_back_the_same(recipe: Path) -> None:
    tricky = 'data.system_prompt="Cost: ${PRICE:-5}\\n1e-3 # ünï"'
    loaded = load_recipe(recipe, [tricky.replace("${", "$${"), "train.optimizer.epsilon=1e-15", "data.tokenizer='1e5'"])
    assert loaded.stages["sft"].data.system_prompt == "Cost: ${PRICE:-5}\n1e-3 # ünï"
    text = dump(loaded)
    Path("dump.yaml").write_text(text)
    again = load_recipe("dump.yaml")
    assert again == loaded
    assert dump(again) == text


def test_dump_of_a_stage(recipe: Path) -> None:
    stage = load_recipe(recipe).stages["sft"]
    Path("stage.yaml").write_text(dump(stage))
    assert load_stage("stage.yaml") == stage


def test_dump_names_every_field_in_schema_order(recipe: Path) -> None:
    lines = dump(load_recipe(recipe).stages["sft"]).splitlines()
    top = [line.partition(":")[0] for line in lines if line[0] not in " -"]
    assert top == list(StageConfig.model_fields)
    assert "  cpu_threads: 0" in lines


# --- select_stage


def test_select_stage(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert select_stage(loaded, "sft").name == "sft"
    with pytest.raises(ConfigError, match="recipe small has 2 stages, choose one with --stage: warm_up, sft"):
        select_stage(loaded, None)
    with pytest.raises(ConfigError, match=r"no stage stf, did you mean sft\?; its stages: warm_up, sft"):
        select_stage(loaded, "stf")


def test_another_rule_of_sizes_replaces_the_section(recipe: Path, repo: Path) -> None:
    data = load_recipe(recipe, ["data.understanding_size={rule: pixels, max_pixels: 50176}"]).stages["sft"].data
    assert data.understanding_size.model_dump() == {
        "rule": "pixels",
        "min_pixels": 3136,
        "max_pixels": 50176,
        "filter": "bicubic",
    }
    longer = load_recipe(repo / "configs/orion/shapes.yaml", ["data.generation_size.max_side=504"]).stages["sft"].data
    assert (longer.generation_size.rule, longer.generation_size.max_side) == ("long_side", 504)


def test_a_field_that_was_not_there_yet_means_its_default() -> None:
    """Checkpoints and caches say how their model is built; one made by an older version still fits."""
    config = BackboneConfig(
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_size=16,
        mlp_size=32,
        vocab_size=64,
        mrope_sections=[2, 3, 3],
    )
    now = config.model_dump(mode="json")
    older = {name: value for name, value in now.items() if name not in ("normalize_output", "positions")}
    assert as_now(older, config) == now
    assert as_now(older | {"vocab_size": 65}, config) == now | {"vocab_size": 65}
    assert as_now({"family": "siglip"}, config) == {"family": "siglip"}
