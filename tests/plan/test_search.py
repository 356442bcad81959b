"""The search, the shipped recipes' layouts, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from measure import orion

from megatron_unimm.cli import main
from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.plan.hardware import GIB, GPUS, Cluster, gpu_of
from megatron_unimm.plan.memory import PARTS
from megatron_unimm.plan.search import Plan, plan, search

H100 = Cluster(64, 8, GPUS["h100"])
SHIPPED = (
    ("configs/orion/qwen2_5_vl_7b.yaml", "sft"),
    ("configs/orion/qwen3_vl_30b_a3b.yaml", "sft"),
    ("configs/orion/decoder_flux.yaml", "decoder"),
    ("configs/mmcore/qwen2_5_vl_7b.yaml", "vlm"),
    ("configs/mmcore/qwen2_5_vl_7b.yaml", "diffusion"),
    ("configs/mmcore/qwen3_vl_30b_a3b.yaml", "vlm"),
    ("configs/mmcore/qwen3_vl_30b_a3b.yaml", "diffusion"),
)
"""Recipes for 64 x 8 H100, and the stages that their layouts were chosen for: the longest and largest."""


def layout_of(planned: Plan) -> tuple:
    system = planned.stage.system
    return system.parallel, system.recompute.granularity


def test_search_is_sorted_and_all_of_it_runs_and_fits(repo: Path) -> None:
    stage = orion(repo, "model.backbone.num_layers=4", "train.global_batch_size=512", "system.precision.dtype=bfloat16")
    tiny = Cluster(2, 4, replace(GPUS["h100"], memory_gib=3.2))  # 3 GiB are the runtime's
    found = search(stage, tiny)
    assert len({json.dumps(each.overrides) for each in found}) == len(found) > 10
    seconds = [round(each.step.seconds, 6) for each in found]
    assert seconds == sorted(seconds)
    for each in found:
        assert check_layout(each.stage, tiny.world_size) == each.step.data_size
        assert each.largest <= tiny.memory
    assert {each.stage.system.parallel.tensor for each in found} == {1, 2, 4}


def test_less_memory_leaves_fewer_layouts(repo: Path) -> None:
    stage = orion(repo, "model.backbone.num_layers=4", "data.sequence_length=16384", "train.global_batch_size=2048")
    clusters = [Cluster(1, 4, replace(GPUS["h100"], memory_gib=gib)) for gib in (79.1, 3.4, 0.5)]
    most, some, none = (search(stage, cluster) for cluster in clusters)
    assert len(most) >= len(some)
    assert any(each.stage.system.recompute.granularity != "none" for each in some)
    assert none == []


def test_time_is_the_sum_of_its_parts(repo: Path) -> None:
    """Without a pipeline nothing waits but what is listed."""
    stage = orion(repo, "system.precision.dtype=bfloat16", "system.parallel={tensor: 2, sequence: true}")
    step = plan(stage, Cluster(1, 8, GPUS["h100"])).step
    assert step.bubble == pytest.approx(0, abs=1e-12)
    assert step.seconds == pytest.approx(sum(step.busy.values()) + sum(step.waits.values()) + step.optimizer)
    assert step.mfu == pytest.approx(step.row_flops * step.rows / (step.seconds * 8 * 989.4e12))


def test_known_traffic_of_a_7b_layer(repo: Path) -> None:
    """Megatron-LM's count (arXiv 2205.05198, section 4.2.2): under sequence parallelism a layer gathers twice and
    scatters twice in the forward pass, (tensor - 1) / tensor of the hidden states each."""
    stage = load_recipe(repo / "configs/orion/qwen2_5_vl_7b.yaml", ["system.parallel.pipeline=1"]).stages["sft"]
    one, two = (plan(_with_layers(stage, count), Cluster(1, 4, GPUS["h200"])).step.sent["tensor"] for count in (27, 28))
    step = plan(stage, Cluster(1, 4, GPUS["h200"])).step
    hidden = 8192 * 3584 * 2
    # Forward twice (student and teacher), backward once, where gathers for weights' gradients come besides.
    per_layer = (2 * 4 + 6) * 3 / 4 * hidden
    assert (two - one) / step.micro_batches == pytest.approx(per_layer)


def _with_layers(stage: StageConfig, count: int) -> StageConfig:
    backbone = stage.model.backbone.model_copy(update={"num_layers": count})
    return stage.model_copy(update={"model": stage.model.model_copy(update={"backbone": backbone})})


@pytest.mark.slow
@pytest.mark.parametrize(("path", "stage_name"), SHIPPED)
def test_shipped_layouts_are_the_planners(path: str, stage_name: str, repo: Path) -> None:
    """Among its first three, and it fits, as it does in all other stages."""
    recipe = load_recipe(repo / path)
    stage = recipe.stages[stage_name]
    best = search(stage, H100)[:3]
    assert layout_of(plan(stage, H100)) in [layout_of(each) for each in best]
    for each in recipe.stages.values():
        planned = plan(each, H100)
        assert planned.fits, f"{each.name}: {planned.largest / GIB:.1f} GiB"


def test_command_prints_tables_and_json(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    target = tmp_path / "plan.json"
    cluster = ["--nodes", "1", "--gpus-per-node", "2", "--gpu", "h100"]
    arguments = ["plan", "configs/orion/shapes.yaml", "--stage", "decoder", *cluster, "--top", "3", "--to", str(target)]
    assert main.run(arguments) == 0
    out = capsys.readouterr().out
    for title in ("GiB per rank of 79.1", "a step of", "layouts fit; the fastest", "MFU"):
        assert title in out
    found = json.loads(target.read_text())["stages"]["decoder"]
    assert found["fits"] is True
    assert len(found["ranking"]) == 3
    memory = found["memory"][0]
    assert memory["total"] == pytest.approx(sum(memory[part] for part in PARTS))


def test_what_does_not_fit_is_refused_with_what_would(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    arguments = ["plan", "configs/orion/qwen2_5_vl_7b.yaml", "--stage", "sft", "--nodes", "2", "--gpus-per-node", "8"]
    layout = ["system.parallel={tensor: 1, sequence: false, pipeline: 1}"]
    assert main.run([*arguments, "--gpu", "h100", *layout]) == 2
    out, err = capsys.readouterr()
    assert "(too much)" in out
    message = re.fullmatch(
        r"error: system\.parallel: pipeline stage 0 of stage sft needs (\S+) GiB per rank \(most of it \w+, \S+\), "
        r"but a GPU has 79\.1; the fastest that fits \((\S+)\) is (.*)\n",
        err,
    )
    assert message is not None, err
    assert float(message[1]) > 79.1 > float(message[2])
    assert main.run([*arguments, "--gpu", "h100", *message[3].split()]) == 0


def test_too_few_gpus_and_unknown_ones(
    repo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo)
    arguments = ["plan", "configs/orion/qwen2_5_vl_7b.yaml", "--stage", "sft", "--nodes", "1", "--gpus-per-node"]
    assert main.run([*arguments, "8", "--gpu", "a100-40gb"]) == 2
    assert "no layout of 8 GPUs fits" in capsys.readouterr().err
    assert main.run([*arguments, "8", "--gpu", "h10"]) == 2
    assert capsys.readouterr().err.startswith("error: --gpu: h10 is not known, did you mean h100?")
    assert main.run([*arguments, "3", "--gpu", "h100"]) == 2
    assert "does not divide 3 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak(name: str) -> None:
    gpu = gpu_of(name)
    assert Cluster(1, 8, gpu).peak(fp8=False) > 1e14
    # Far apart is never faster.
    cluster = Cluster(2, 8, gpu)
    shares = pytest.importorskip("megatron_unimm.plan.hardware").Shares()
    assert cluster.bandwidth(8, shares) > cluster.bandwidth(16, shares)
