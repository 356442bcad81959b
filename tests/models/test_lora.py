"""Low-rank adapters: against dense matrices, at the start, at every layout, through checkpoints, and merged."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_worker as worker
import pytest
import torch
from lora_worker import LORA, NUM_ROWS, TRUNKS, build_trunk, loss_of, shake, stage_config
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from pydantic import ValidationError
from torch import Tensor

from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.lora import LoraConfig
from megatron_unimm.config.parallel import ParallelConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.models import lora
from megatron_unimm.models.lora import add_lora, check_lora_used, merge_lora, merge_lora_in_place
from megatron_unimm.models.transformer_config import backbone_transformer_config
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.parallel.platform_meta import META, pretend_rank

World = tuple[Platform, ParallelGroups]
EXACT = 1e-12
"""Relative, in double."""
TOLERANCE = 1e-5
"""Relative, of losses and of each tensor, fp32. Measured 1.1e-6 on losses, 9.5e-7 on gradients, 1.2e-6 on weights and
optimizer state after a step."""
WORKER = Path(worker.__file__)
ONE_RANK = ("system.parallel.tensor=1", "system.parallel.sequence=false")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield worker.enter(stage_config("dense", *ONE_RANK))
    destroy_groups()


@dataclass(frozen=True)
class Pair:
    """A trunk without adapters, and one with the same weights and adapters that are not zero; the base is frozen."""

    stage: StageConfig
    plain: torch.nn.Module
    adapted: torch.nn.Module

    def loss(self, adapted: bool = True) -> Tensor:
        module = self.adapted if adapted else self.plain
        return torch.stack([loss_of(module, self.stage, number) for number in range(NUM_ROWS)]).sum()

    def adapters(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.adapted.named_parameters() if "lora_" in name}


def make_pair(trunk: str, world: World, *overrides: str, zero: bool = False) -> Pair:
    stage = stage_config(trunk, *ONE_RANK, *overrides)
    torch.manual_seed(0)
    plain = build_trunk(trunk, stage, *world, lora=None)
    shake(plain, "")
    adapted = build_trunk(trunk, stage, *world)
    adapted.load_state_dict(plain.state_dict(), strict=False)
    if not zero:
        shake(adapted, "lora_")
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return Pair(stage, plain, adapted)


class Loss(torch.nn.Module):
    """A pair's loss as a function of the plain trunk's weights."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.trunk, self.pair = pair.plain, pair

    def forward(self) -> Tensor:
        return self.pair.loss(adapted=False)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_shapes_on_a_rank_that_is_not_there() -> None:
    """Rank 3 of 4 on torch's meta device, as a dry run builds it. First, before the process joins a real job."""
    parallel = ("system.parallel.tensor=4", "system.parallel.sequence=true", "model.backbone.num_kv_heads=4")
    stage = stage_config("dense", *parallel)
    with pretend_rank(stage.system.parallel, rank=3, world_size=4) as groups:
        module = build_trunk("dense", stage, META, groups)
    layer = module.decoder.layers[0]
    assert layer.self_attention.linear_qkv.lora_a.weight.shape == (4, 32)
    assert layer.self_attention.linear_qkv.lora_b.weight.shape == (96 // 4, 4)
    assert layer.mlp.linear_fc1.lora_b.weight.shape == (96 // 4, 4)
    assert layer.mlp.linear_fc2.lora_a.weight.shape == (4, 48 // 4)
    assert layer.mlp.linear_fc2.lora_b.weight.shape == (32, 4)


# ---------------------------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("trunk", TRUNKS)
def test_forward_and_gradients_against_dense_matrices(trunk: str, world: World) -> None:
    """The reference: the plain trunk with W + (alpha / rank) B A for each adapted W, differentiated by torch."""
    pair = make_pair(trunk, world)
    for module in (pair.plain, pair.adapted):
        module.double()
    names = sorted({name.rpartition(".lora_")[0] for name in pair.adapters()})
    halves = {name: tensor.detach().clone().requires_grad_() for name, tensor in pair.adapters().items()}
    weights = {
        f"trunk.{name}.weight": pair.plain.get_parameter(f"{name}.weight").detach()
        + LORA.alpha / LORA.rank * halves[f"{name}.lora_b.weight"] @ halves[f"{name}.lora_a.weight"]
        for name in names
    }
    expected = torch.func.functional_call(Loss(pair), weights, ())
    gradients = torch.autograd.grad(expected, list(halves.values()))
    found = pair.loss()
    assert relative(found, expected) < EXACT
    assert relative(found, pair.loss(adapted=False)) > 1e-3, "the adapters say something"
    found.backward()
    for (name, tensor), gradient in zip(pair.adapters().items(), gradients, strict=True):
        assert gradient.norm() > 0, name
        assert relative(tensor.grad, gradient) < EXACT, name


@pytest.mark.parametrize("trunk", TRUNKS)
def test_start_is_the_base_model(trunk: str, world: World) -> None:
    """Bit for bit; tensors of the base keep their names; the random state is left alone; A is as drawn."""
    pair = make_pair(trunk, world, zero=True)
    assert torch.equal(pair.loss(), pair.loss(adapted=False))
    added = pair.adapted.state_dict().keys() - pair.plain.state_dict().keys()
    assert pair.plain.state_dict().keys() <= pair.adapted.state_dict().keys()
    assert added == pair.adapters().keys()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    add_lora(pair.plain, LORA, "torch", world[1].collection, worker.SEED)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = dict(pair.plain.named_parameters())
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in pair.adapters().items())
    spread = torch.cat([t.flatten() * t.shape[1] ** 0.5 for n, t in pair.adapters().items() if "lora_a" in n])
    assert spread.mean().abs() < 4 / len(spread) ** 0.5
    assert abs(spread.std() - 1) < 4 / len(spread) ** 0.5
    firsts = [tensor for name, tensor in pair.adapters().items() if name.endswith("linear_qkv.lora_a.weight")]
    assert len({tuple(tensor.flatten().tolist()) for tensor in firsts}) == len(firsts), "each linear has its own"


def test_another_seed_draws_another_start(world: World) -> None:
    stage = stage_config("dense", *ONE_RANK)
    trunks = [build_trunk("dense", stage, *world, lora=None) for _ in range(2)]
    for seed, trunk in enumerate(trunks):
        add_lora(trunk, LORA, "torch", world[1].collection, seed)
    first, second = (trunk.decoder.layers[1].mlp.linear_fc1.lora_a.weight for trunk in trunks)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_merged_is_unmerged(trunk: str, world: World) -> None:
    """In place and by tensor names: the same weights, the same loss, and the plain trunk's classes and names again."""
    pair = make_pair(trunk, world)
    before, state = pair.loss().detach(), {name: tensor.clone() for name, tensor in pair.adapted.named_parameters()}
    by_name = merge_lora(state, LORA.alpha)
    merge_lora_in_place(pair.adapted)
    weights = dict(pair.adapted.named_parameters())
    assert by_name.keys() == weights.keys() == dict(pair.plain.named_parameters()).keys()
    assert all(torch.equal(by_name[name], weight) for name, weight in weights.items())
    assert [type(module) for module in pair.adapted.modules()] == [type(module) for module in pair.plain.modules()]
    assert relative(pair.loss(), before) < 1e-5
    changed = [name for name, weight in pair.plain.named_parameters() if not torch.equal(weight, weights[name])]
    assert {name.removesuffix(".weight") for name in changed} == {
        name.rpartition(".lora_")[0] for name in state if "lora_" in name
    }


def test_merging_rounds_once() -> None:
    """bf16 weights: the sum of exact products, rounded to bf16."""
    weight, a, b = (worker.draw(*shape, seed=n).bfloat16() for n, shape in enumerate([(6, 5), (2, 5), (6, 2)]))
    state = {"x.weight": weight, "x.lora_a.weight": a, "x.lora_b.weight": b, "x.bias": torch.ones(6)}
    merged = merge_lora(state, alpha=3.0)
    assert list(merged) == ["x.weight", "x.bias"]
    exact = (weight.double() + 1.5 * b.double() @ a.double()).float().bfloat16()
    assert torch.equal(merged["x.weight"], exact)


@pytest.mark.parametrize("missing", ["x.weight", "x.lora_a.weight", "x.lora_b.weight"])
def test_merging_refuses_half_an_adapter(missing: str) -> None:
    state = {"x.weight": torch.ones(3, 4), "x.lora_a.weight": torch.ones(2, 4), "x.lora_b.weight": torch.ones(3, 2)}
    del state[missing]
    with pytest.raises(CheckpointError, match=f"x: has an adapter, but no tensor {missing}"):
        merge_lora(state, alpha=1.0)


@pytest.mark.parametrize("trunk", ["dense", "flux"])
@pytest.mark.parametrize(
    "recompute",
    ["{granularity: full, num_layers: 1}", "{granularity: selective, modules: [core_attn, mlp]}"],
    ids=["full", "selective"],
)
def test_recompute_gives_the_same_gradients(trunk: str, recompute: str, world: World) -> None:
    """With everything below the first adapter frozen: what comes into the layers has no gradient of its own."""
    pair = make_pair(trunk, world)
    pair.loss().backward()
    expected = {name: tensor.grad for name, tensor in pair.adapters().items()}
    again = make_pair(trunk, world, f"system.recompute={recompute}")
    assert again.adapted.config.recompute_granularity is not None
    again.loss().backward()
    for name, tensor in again.adapters().items():
        assert tensor.grad is not None, name
        assert torch.equal(tensor.grad, expected[name]), name


def test_bfloat16(world: World) -> None:
    """Adapters are in the dtype of the parameters; gradients agree with fp32's."""
    pair, exact = make_pair("dense", world, "system.precision.dtype=bfloat16"), make_pair("dense", world)
    assert {tensor.dtype for tensor in pair.adapters().values()} == {torch.bfloat16}
    pair.loss().backward()
    exact.loss().backward()
    for name, tensor in exact.adapters().items():
        assert relative(pair.adapters()[name].grad.float(), tensor.grad) < 0.1, name


# ---------------------------------------------------------------------------------------------- which linears


def names_with_adapters(trunk: str, world: World, config: LoraConfig) -> tuple[set[str], set[str]]:
    """Linears that got one, and patterns that matched."""
    module = build_trunk(trunk, stage_config(trunk, *ONE_RANK), *world, lora=None)
    used = add_lora(module, config, "torch", world[1].collection, 0)
    return {name.removesuffix(".lora_a") for name, _ in module.named_modules() if name.endswith(".lora_a")}, used


def test_default_is_all_but_routed_experts(world: World) -> None:
    found, _ = names_with_adapters("moe", world, LoraConfig())
    parts = ("self_attention.linear_qkv", "self_attention.linear_proj")
    shared = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
    assert found == {f"decoder.layers.{layer}.{part}" for layer in range(2) for part in (*parts, *shared)}
    flux, _ = names_with_adapters("flux", world, LoraConfig())
    stream = ("attention.linear_qkv", "attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert flux == {
        *(f"blocks.layers.0.{side}.{part}" for side in ("text", "image") for part in stream),
        *(f"blocks.layers.1.{part}" for part in ("attention.linear_qkv", "linear_fc1", "linear_out")),
    }


def test_patterns_choose(world: World) -> None:
    config = LoraConfig(modules=["layers.1.*.linear_qkv", "decoder.*.linear_fc2", "output_layer"])
    found, used = names_with_adapters("dense", world, config)
    assert found == {
        "decoder.layers.1.self_attention.linear_qkv",
        "decoder.layers.0.mlp.linear_fc2",
        "decoder.layers.1.mlp.linear_fc2",
    }
    assert used == {"layers.1.*.linear_qkv", "decoder.*.linear_fc2"}
    with pytest.raises(ConfigError, match=r"method\.lora\.modules\.2: pattern 'output_layer' matches none of the lin"):
        check_lora_used(used, config, "method.lora")
    check_lora_used(used, LoraConfig(modules=["decoder.*.linear_fc2"]), "method.lora")


@pytest.mark.parametrize("pattern", ["experts.*", "local_experts.0.linear_fc1", "mlp.router", "*router*"])
def test_routed_experts_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError, match="routed experts and routers take no adapter"):
        LoraConfig(modules=["linear_qkv", pattern])


def test_shared_experts_may_be_named(world: World) -> None:
    found, _ = names_with_adapters("moe", world, LoraConfig(modules=["shared_experts.*"]))
    assert len(found) == 4


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}, {"modules": []}])
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoraConfig(**wrong)


# ---------------------------------------------------------------------------------------------- fused norm


class FusedNorm(ColumnParallelLinear):
    """What Transformer Engine's linear with a norm promises, on a CPU: by request it hands out the normed input."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection, with_bias: bool) -> None:
        arguments = dict(config=config, init_method=config.init_method, tp_group=groups.tp)
        super().__init__(config.hidden_size, 12, bias=with_bias, skip_bias_add=with_bias, **arguments)
        self.layer_norm_weight = torch.nn.Parameter(torch.linspace(0.5, 2.0, config.hidden_size))
        self.return_layernorm_output = False

    def forward(self, input_: Tensor) -> tuple:
        normed = torch.nn.functional.rms_norm(input_, input_.shape[-1:], self.layer_norm_weight)
        output, bias = super().forward(normed)
        if not self.return_layernorm_output:
            return output, bias
        return (output, bias, normed) if bias is not None else ((output, normed), None)


@pytest.mark.parametrize("with_bias", [False, True])
def test_adapter_reads_behind_a_fused_norm(with_bias: bool, world: World) -> None:
    platform, groups = world
    stage = stage_config("dense", *ONE_RANK)
    config = backbone_transformer_config(stage.model.backbone, stage.system, platform)
    linear = FusedNorm(config, groups.collection, with_bias)
    inputs = worker.draw(5, 1, config.hidden_size, seed=0)
    plain = linear(inputs)[0]
    lora._adapt(linear, lora.LoraNormedColumn, lora.Cut(0, (12,), groups.collection.tp), LORA, "x")
    shake(linear, "lora_")
    output, bias = linear(inputs)
    assert bias is linear.bias
    normed = torch.nn.functional.rms_norm(inputs, inputs.shape[-1:], linear.layer_norm_weight)
    update = normed @ linear.lora_a.weight.T @ linear.lora_b.weight.T * LORA.alpha / LORA.rank
    torch.testing.assert_close(output, plain + update, rtol=1e-5, atol=1e-6)
    merge_lora_in_place(linear)
    assert type(linear) is FusedNorm
    torch.testing.assert_close(linear(inputs)[0], output, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- layouts


LAYOUTS = {
    "dense/tp2": {"tensor": 2},
    "dense/tp2_sp": {"tensor": 2, "sequence": True},
    "dense/pp2": {"pipeline": 2},
    "moe/ep2": {"expert": 2},
    "moe/tp2_sp": {"tensor": 2, "sequence": True},
    "flux/tp2": {"tensor": 2},
    "flux/tp2_sp": {"tensor": 2, "sequence": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one rank and of every layout."""
    root = tmp_path_factory.mktemp("lora")
    start_worker(root, 1, [{"trunk": trunk, "name": name} for trunk in TRUNKS for name in ("init", "one")])
    tasks = []
    for key, parallel in LAYOUTS.items():
        trunk, name = key.split("/")
        tasks.append({"trunk": trunk, "name": name, "parallel": ParallelConfig(**parallel).model_dump()})
    start_worker(root, 2, tasks)
    return root


def start_worker(root: Path, ranks: int, tasks: list[dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(WORKER), str(root), json.dumps(tasks)], capture_output=True, text=True, timeout=300, check=False
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("[rank") or "rror" in line]
    assert done.returncode == 0, "\n".join(errors[-30:])


def tensors(path: Path) -> dict[str, Tensor]:
    with Reader(path) as reader:
        return {key: reader.read(key).clone() for key in reader.tensors}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_base_checkpoint_and_start_at_every_layout(layout: str, folder: Path) -> None:
    """A base checkpoint loads beside fresh adapters, which are those of one rank; adapters of one rank's checkpoint are
    cut and put together again without loss. All exact."""
    trunk = layout.split("/")[0]
    base, fresh = tensors(folder / trunk / "base"), tensors(folder / trunk / "one_fresh")
    assert all(torch.equal(fresh[key], value) for key, value in base.items())
    assert all("lora_" in key for key in fresh.keys() - base.keys())
    for mine, reference in (("fresh", "one_fresh"), ("again", "start")):
        found, expected = tensors(folder / f"{layout}_{mine}"), tensors(folder / trunk / reference)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), mine


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(layout: str, folder: Path) -> None:
    """Loss, the gradients of A and B, and weights and optimizer state after one AdamW step."""
    one, mine = folder / layout.split("/")[0] / "one", folder / layout
    expected, loss = (json.loads(path.with_suffix(".json").read_text())["loss"] for path in (one, mine))
    assert abs(loss - expected) / abs(expected) < TOLERANCE
    for kind in ("gradients", "after"):
        reference, found = tensors(Path(f"{one}_{kind}")), tensors(Path(f"{mine}_{kind}"))
        assert found.keys() == reference.keys()
        for key, value in reference.items():
            assert value.norm() > 0, key
            assert relative(found[key], value) < TOLERANCE, f"{kind} of {key}"


@pytest.mark.parametrize("trunk", TRUNKS)
def test_a_step_trains_the_adapters_alone(trunk: str, folder: Path) -> None:
    """All of them, by about the learning rate; the base stays as it was, and has no optimizer state."""
    before, after = tensors(folder / trunk / "start"), tensors(folder / trunk / "one_after")
    for key, value in before.items():
        step = (after[key] - value).abs().max()
        assert step < 1.01 * worker.LEARNING_RATE if "lora_" in key else step == 0, key
        assert step > 0.99 * worker.LEARNING_RATE or "lora_" not in key, key
    assert all("lora_" in key for key in after.keys() - before.keys())
    assert set(tensors(folder / trunk / "one_gradients")) == {key for key in before if "lora_" in key}


def test_tp2_continues_on_one_rank(folder: Path, world: World) -> None:
    """What TP2 trained is read by one rank, and computes the same as what one rank trained."""
    losses = []
    for name in ("one_after", "tp2_sp_after"):
        pair = make_pair("dense", world)
        state = {key: value for key, value in tensors(folder / "dense" / name).items() if "optimizer" not in key}
        pair.adapted.load_state_dict(state, strict=False)
        losses.append(pair.loss().detach())
    assert relative(losses[1], losses[0]) < TOLERANCE
