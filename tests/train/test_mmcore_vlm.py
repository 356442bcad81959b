"""MMCORE's VLM: eq. 1 and 2 of whole steps against transformers, pooling against its definition, and what gets
gradients."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from small_mmcore import FROZEN_VLM, LORA, SIGLIP, make_rows, make_sample, make_samples, small_stage, vlm_of
from torch import Tensor
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from megatron_unimm.checkpoint.store import save
from megatron_unimm.config.queries import QueryVlmConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.convert import import_checkpoint
from megatron_unimm.convert.qwen2_5_vl import to_hf_config
from megatron_unimm.data.queries import QueryRow, QuerySample
from megatron_unimm.data.sample import IGNORED_LABEL
from megatron_unimm.errors import CheckpointError, ConfigError
from megatron_unimm.methods.alignment import cosine_loss
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.model import MMCoreVlm
from megatron_unimm.methods.registry import build_method
from megatron_unimm.models.queries import QueryConnector, pooled_to_grid
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import check_base, load_base, load_weights
from megatron_unimm.train.step import TrainStep

World = tuple[Platform, ParallelGroups]
ROOM = "data.sequence_length=256"
# Two heads of 64 in the connector.
WIDE = ("model.vision_encoder.out_size=128", "model.backbone.hidden_size=128", "model.backbone.head_size=32")
WIDE = (*WIDE, "model.backbone.mrope_sections=[4,6,6]")


def train_step(stage: StageConfig, world: World) -> TrainStep:
    """A step over a random model whose teacher is another one; biases and norms are random, too."""
    platform, groups = world
    torch.manual_seed(0)
    method, chunks = setup.build_model(stage, platform, groups)
    for parameter in chunks[0].parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    return TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)


def model_of(step: TrainStep) -> MMCoreVlm:
    return step.chunks[0].module


def gradients(step: TrainStep, rows: Sequence[QueryRow]) -> tuple[Tensor, dict[str, Tensor]]:
    losses = step.forward_backward(rows)
    named = model_of(step).named_parameters()
    return losses, {name: parameter.main_grad.clone() for name, parameter in named if parameter.requires_grad}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every gradient to 1e-5 of its norm."""
    total = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * total, name


# -- the grid, and pooling to it


def test_grid_of_every_number_of_queries() -> None:
    """A factorisation as square as there is, lying; K x K for squares."""
    for number in range(1, 129):
        rows, columns = QueryVlmConfig(num_queries=number).grid
        assert rows * columns == number
        assert rows <= columns
        assert not [other for other in range(rows + 1, math.isqrt(number) + 1) if number % other == 0]
    assert [QueryVlmConfig(num_queries=number).grid for number in (1, 4, 64, 121)] == [(1, 1), (2, 2), (8, 8), (11, 11)]
    assert [QueryVlmConfig(num_queries=number).grid for number in (32, 127, 128)] == [(4, 8), (1, 127), (8, 16)]


def brute_pooled(features_VF: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Each cell the mean of all patches that share some area with it."""

    def shared(cell: int, cells: int, patches: int) -> list[int]:
        return [p for p in range(patches) if p * cells < (cell + 1) * patches and (p + 1) * cells > cell * patches]

    square, made = features_VF.unflatten(0, size), []
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows, columns = shared(i, grid[0], size[0]), shared(j, grid[1], size[1])
            made.append(torch.stack([square[row, column] for row in rows for column in columns]).mean(0))
    return torch.stack(made)


@pytest.mark.parametrize("sizes", [[(27, 27)], [(4, 6)], [(9, 9), (2, 3), (9, 9), (8, 8), (1, 1)]], ids=str)
def test_pooling_is_the_mean_over_cells(sizes: list[tuple[int, int]]) -> None:
    """For every N, pictures in their order, also where the grid is finer than the patches."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(rows * columns, 3, generator=generator) for rows, columns in sizes]
    for number in range(1, 129):
        grid = QueryVlmConfig(num_queries=number).grid
        expected = torch.cat([brute_pooled(part, size, grid) for part, size in zip(parts, sizes, strict=True)])
        found = pooled_to_grid(torch.cat(parts), sizes, grid)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_pooling_that_divides_is_a_plain_mean() -> None:
    """8 x 8 patches to 4 x 4 cells of 2 x 2, and to as many cells as patches: themselves."""
    features = torch.arange(64.0)[:, None]
    blocks = features.view(4, 2, 4, 2).mean(dim=(1, 3)).flatten()
    assert torch.equal(pooled_to_grid(features, [(8, 8)], (4, 4))[:, 0], blocks)
    assert torch.equal(pooled_to_grid(features, [(8, 8)], (8, 8)), features)


# -- the objective


def test_eq_1_of_known_vectors() -> None:
    """Same direction 0, orthogonal 1, opposite 2, whatever the lengths; a sum over queries; no gradient to v."""
    latents = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, -2.0]], requires_grad=True)
    target = torch.tensor([[7.0, 0.0], [0.0, 0.1], [0.0, 5.0]], requires_grad=True)
    loss = cosine_loss(latents, target)
    assert loss.item() == pytest.approx(0 + 1 + 2)
    loss.backward()
    assert target.grad is None
    # d(-cos)/du = -(v̂ - cos û) / |u|
    torch.testing.assert_close(latents.grad, torch.tensor([[0.0, 0.0], [0.0, -1.0], [0.0, 0.0]]))


class Reference:
    """The two sums of one sample, from transformers' model and thirty lines of torch."""

    def __init__(self, folder: Path, model: MMCoreVlm, vlm: QueryVlmConfig) -> None:
        load = Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.student = load(folder / "student", dtype=torch.float32, attn_implementation="eager").eval()
        self.teacher = load(folder / "teacher", dtype=torch.float32, attn_implementation="eager").eval()
        self.queries, self.connector, self.vlm = model.query_tokens.weight, model.query_connector, vlm

    def terms(self, sample: QuerySample) -> Tensor:
        tokens = sample.layout.tokens
        embeddings = self.student.get_input_embeddings()(torch.from_numpy(tokens.input_ids)).clone()
        if len(tokens.grids):
            seen = self.student.model.visual(torch.from_numpy(tokens.patches), grid_thw=torch.from_numpy(tokens.grids))
            embeddings[torch.from_numpy(tokens.visual_index)] = seen.pooler_output
        for place, position in enumerate(sample.layout.query_index.tolist()):
            embeddings[position] = self.queries[place % self.vlm.num_queries]
        positions = torch.from_numpy(tokens.position_ids)[:, None]
        output = self.student.model.language_model(inputs_embeds=embeddings[None], position_ids=positions)
        hidden = output.last_hidden_state[0]
        labels = torch.from_numpy(tokens.labels)
        llm = F.cross_entropy(self.student.lm_head(hidden), labels, ignore_index=IGNORED_LABEL, reduction="sum")
        return torch.stack([llm, sum(self.alignment(sample, hidden), torch.zeros(()))])

    def alignment(self, sample: QuerySample, hidden: Tensor) -> list[Tensor]:
        """1 - uᵀv / |u| |v| of each query."""
        bounds, number, made = np.cumsum([0, *sample.target_grids.prod(axis=1)]), self.vlm.num_queries, []
        for picture, grid in enumerate(sample.target_grids):
            patches = torch.from_numpy(sample.target_patches[bounds[picture] : bounds[picture + 1]])
            features = self.teacher.model.visual(patches, grid_thw=torch.from_numpy(grid[None])).pooler_output
            wanted = brute_pooled(features, (int(grid[1]) // 2, int(grid[2]) // 2), self.vlm.grid)
            places = torch.from_numpy(sample.layout.query_index[picture * number : (picture + 1) * number])
            latents = connected(hidden[places], self.connector)
            made += [1 - u @ v / (u @ u).sqrt() / (v @ v).sqrt() for u, v in zip(latents, wanted, strict=True)]
        return made


def connected(hidden_NH: Tensor, connector: QueryConnector) -> Tensor:
    """What the connector makes of one picture's queries, written out."""
    hidden = hidden_NH

    def normed(values: Tensor, weight: Tensor) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    if connector.layers is not None:
        for layer in connector.layers.layers:
            attention, mlp = layer.self_attention, layer.mlp
            mixed = normed(hidden, layer.input_layernorm.weight) @ attention.linear_qkv.weight.T
            q, k, v = mixed.unflatten(-1, (-1, 3, 64)).permute(2, 1, 0, 3)  # [heads, N, 64] each
            scores = (q @ k.transpose(1, 2) / 8).softmax(-1)
            hidden = hidden + (scores @ v).transpose(0, 1).flatten(1) @ attention.linear_proj.weight.T
            gate, up = (normed(hidden, layer.pre_mlp_layernorm.weight) @ mlp.linear_fc1.weight.T).chunk(2, -1)
            hidden = hidden + (F.silu(gate) * up) @ mlp.linear_fc2.weight.T
        hidden = normed(hidden, connector.layers.final_layernorm.weight)
    first, *rest = connector.projection
    hidden = hidden @ first.weight.T + first.bias
    for last in rest:
        hidden = F.gelu(hidden) @ last.weight.T + last.bias
    return hidden


CONNECTORS = {
    "mlp": (),
    "linear": ("queries.connector.projection=linear",),
    "2 layers": ("queries.connector.num_layers=2",),
    "8 x 8": ("queries.num_queries=64", "data.sequence_length=512"),
}


@pytest.fixture(scope="module")
def transformers_pair(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Two random Hugging Face models, student and teacher, and their imports."""
    folder = tmp_path_factory.mktemp("mmcore_pair")
    config = to_hf_config(small_stage(repo, *WIDE).model)
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.for_model(**config))
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer = repo / "tools/base_models/shapes_vlm/tokenizer.json"
        (folder / name / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        import_checkpoint(folder / name, folder / f"{name}_imported")
    return folder


@pytest.mark.parametrize("connector", CONNECTORS)
def test_terms_equal_transformers(connector: str, transformers_pair: Path, repo: Path, world: World) -> None:
    """Eq. 1 and the cross entropy of every kind of sample, packed, with a vision encoder that trains, against
    transformers' model and brute force, sample by sample (measured: 2e-7 relative)."""
    stage = small_stage(repo, *WIDE, ROOM, *CONNECTORS[connector])
    step = train_step(stage, world)
    model = model_of(step)
    load_weights([model], transformers_pair / "student_imported", step.groups)
    load_base([model], {"vision_encoder": transformers_pair / "teacher_imported"}, step.groups)
    samples = make_samples(stage)
    reference = Reference(transformers_pair, model, vlm_of(stage))
    with torch.no_grad():
        expected = torch.stack([reference.terms(sample) for sample in samples]).sum(dim=0)
    rows = make_rows(samples, stage)
    counts = step.method.counts(rows)
    labels = [sample.layout.tokens.labels for sample in samples]
    assert counts == [sum(int((each != IGNORED_LABEL).sum()) for each in labels), 4 * vlm_of(stage).num_queries]
    found = step.forward_backward(rows) * torch.tensor(counts)
    print(f"{connector}: {((found - expected) / expected).abs().max():.1e}")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "overrides", [(), ("queries.connector.num_layers=2",), (SIGLIP,)], ids=["plain", "layers", "siglip"]
)
def test_packed_equals_unpacked(overrides: tuple[str, ...], repo: Path, world: World) -> None:
    """Losses and gradients of a packed row are those of its samples run alone, those without a picture among them."""
    stage = small_stage(repo, ROOM, *overrides)
    step = train_step(stage, world)
    samples = make_samples(stage)
    packed, alone = make_rows(samples, stage), make_rows(samples, stage, packing=False)
    assert (len(packed), len(alone)) == (1, len(samples))
    losses, found = gradients(step, packed)
    expected_losses, expected = gradients(step, alone)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert losses.min() > 0.1
    assert_same(found, expected)


def test_eq_2_weighs_the_terms(repo: Path, world: World) -> None:
    """λ_t L_llm + λ_a L_vis: the gradient is the weighted sum of the two terms' gradients."""

    def found(llm: float, vis: float) -> dict[str, Tensor]:
        stage = small_stage(repo, ROOM, f"method.loss_weights={{llm: {llm}, vis: {vis}}}")
        return gradients(train_step(stage, world), make_rows(make_samples(stage), stage))[1]

    text, visual, both = found(1, 0), found(0, 1), found(0.5, 3)
    assert_same(both, {name: 0.5 * text[name] + 3 * visual[name] for name in both})
    assert not text["query_connector.projection.0.weight"].any(), "the words ask nothing of it"
    assert not visual["backbone.output_layer.weight"].any()
    # Words behind a picture read its queries.
    assert min(text["query_tokens.weight"].norm(), visual["query_tokens.weight"].norm()) > 1e-6


def test_nothing_is_learned_from_a_broken_sample(repo: Path, world: World) -> None:
    """Its queries stand in the row; losses, counts and gradients are those of the others."""
    stage = small_stage(repo, ROOM)
    step = train_step(stage, world)
    samples = make_samples(stage)
    tokens = samples[2].layout.tokens
    silent = replace(tokens, labels=np.full_like(tokens.labels, IGNORED_LABEL))
    broken = replace(samples[2], learned=False, layout=replace(samples[2].layout, tokens=silent))
    rows = make_rows([*samples[:2], broken, samples[3]], stage)
    without = make_rows([*samples[:2], samples[3]], stage)
    assert step.method.counts(rows) == step.method.counts(without)
    losses, found = gradients(step, rows)
    expected_losses, expected = gradients(step, without)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert_same(found, expected)


# -- what trains


def parts_that_change(step: TrainStep, rows: Sequence[QueryRow], steps: int = 3) -> set[str]:
    """Names of parameters that an optimizer's steps change, companions included."""
    before = {name: parameter.clone() for name, parameter in model_of(step).named_parameters()}
    for _ in range(steps):
        assert step.run(rows, 1e-3).skip.item() == 0
    after = dict(model_of(step).named_parameters())
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize("teacher", [(), (SIGLIP,)], ids=["vision_encoder", "siglip"])
def test_full_fine_tuning_reaches_everything_but_the_teacher(
    teacher: tuple[str, ...], repo: Path, world: World
) -> None:
    """Every parameter of every part gets a gradient and moves; the teacher has none and stays bit for bit."""
    stage = small_stage(repo, ROOM, "queries.connector.num_layers=2", *teacher)
    step = train_step(stage, world)
    rows = make_rows(make_samples(stage), stage)
    _, found = gradients(step, rows)
    assert {name.split(".")[0] for name in found} == {"vision_encoder", "backbone", "query_tokens", "query_connector"}
    assert [name for name, gradient in found.items() if not gradient.any()] == []
    model = model_of(step)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in frozen} == {"base.siglip" if teacher else "base.vision_encoder"}
    everything = {name for name, _ in model.named_parameters()}
    assert parts_that_change(step, rows) == everything - frozen
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_frozen_vlm_with_a_connector(layers: int, repo: Path, world: World) -> None:
    """Table 1, first part: queries and connector move and nothing else; the student's own encoder is the teacher."""
    stage = small_stage(repo, ROOM, FROZEN_VLM, f"queries.connector.num_layers={layers}")
    step = train_step(stage, world)
    model = model_of(step)
    assert len(model.query_connector.layers.layers) == layers
    assert not list(model.base.parameters())
    new = {name for name, _ in model.named_parameters() if name.startswith(("query_tokens.", "query_connector."))}
    rows = make_rows(make_samples(stage), stage)
    first = step.forward_backward(rows)[1]
    assert parts_that_change(step, rows, steps=5) == new
    assert step.forward_backward(rows)[1] < first


def test_frozen_tower_after_another_stage_keeps_the_bases_as_teacher(repo: Path, world: World) -> None:
    """Its own may have been changed there."""
    stage = small_stage(repo, ROOM, FROZEN_VLM).model_copy(update={"after": "vlm"})
    teacher = model_of(train_step(stage, world)).base
    assert [name for name, _ in teacher.named_children()] == ["vision_encoder"]


def test_lora(repo: Path, world: World) -> None:
    """Adapters, queries and connector move and nothing else."""
    stage = small_stage(repo, ROOM, *LORA)
    step = train_step(stage, world)
    changed = parts_that_change(step, make_rows(make_samples(stage), stage))
    names = {name for name, _ in model_of(step).named_parameters()}
    assert changed == {name for name in names if "lora_" in name or name.startswith("query_")}
    assert len([name for name in changed if "lora_" in name]) == 2 * 4 * stage.model.backbone.num_layers


@pytest.mark.parametrize("kind", ["words", "picture"])
def test_every_part_takes_part(kind: str, repo: Path, world: World) -> None:
    """Rows of words alone, and of a picture from which no word is learned: every parameter that trains has a gradient,
    as ranks that wait for one another's want it, and that of what has nothing to learn is zero."""
    stage = small_stage(repo, ROOM, "queries.connector.num_layers=2")
    torch.manual_seed(0)
    method, (model,) = setup.build_model(stage, *world)
    sample = make_sample(stage, kind, ("asks", 5), ("draws", 4, 4) if kind == "picture" else ("answers", 9))
    tokens = sample.layout.tokens
    if kind == "picture":
        tokens = replace(tokens, labels=np.full_like(tokens.labels, IGNORED_LABEL))
    (row,) = make_rows([replace(sample, layout=replace(sample.layout, tokens=tokens))], stage)
    output = model(method.batch(row, model, world[0].device))
    assert (output > 0).tolist() == [kind == "words", kind == "picture"]
    output.sum().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    idle = ("query_tokens.", "query_connector.") if kind == "words" else ("backbone.output_layer.",)
    assert not any(gradient.any() for name, gradient in trained.items() if name.startswith(("vision_encoder.", *idle)))
    assert any(gradient.any() for name, gradient in trained.items() if name.startswith("backbone.decoder."))


# -- SigLIP as the teacher


def test_siglip_teacher_is_transformers_tower_pooled(tmp_path: Path, repo: Path, world: World) -> None:
    """From pixels: a random SiglipVisionModel, imported; the targets are its features of the patches, averaged by hand
    (measured: 2e-6)."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.SiglipVisionConfig(**sizes, patch_size=8, image_size=40)
    tower = transformers.SiglipVisionModel(config).eval()
    for parameter in tower.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tower.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "siglip")

    stage = small_stage(repo, ROOM, SIGLIP, f"queries.teacher.checkpoint={tmp_path / 'siglip'}")
    step = train_step(stage, world)
    model = model_of(step)
    parts = step.method.base_parts()
    assert parts["siglip"] == tmp_path / "siglip"
    load_base([model], {"siglip": parts["siglip"]}, step.groups)
    pixels = torch.randn(2, 3, 40, 40)
    cut = pixels.unflatten(2, (5, 8)).unflatten(4, (5, 8)).permute(0, 2, 4, 1, 3, 5)  # [2, rows, columns, 3, 8, 8]
    sample = make_sample(stage, "two", ("asks", 3), ("draws", 5, 5), ("asks", 2), ("draws", 5, 5), ("answers", 1))
    sample = replace(sample, target_patches=cut.reshape(50, -1).numpy())
    (row,) = make_rows([sample], stage)
    found = model._targets(step.method.batch(row, model, step.platform.device).alignment)
    with torch.no_grad():
        features = tower(pixels).last_hidden_state  # [2, 25, 32]
    expected = torch.cat([brute_pooled(each, (5, 5), vlm_of(stage).grid) for each in features])
    assert found.shape == (2 * 6, 32)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_teacher_of_another_architecture(tmp_path: Path, repo: Path, world: World) -> None:
    """Heads have no say in any tensor's shape: only the checkpoint's own word tells them."""
    plain = small_stage(repo, ROOM, SIGLIP)
    for name, architecture in (("base", plain.model), ("siglip", vlm_of(plain).teacher.encoder)):
        save({}, tmp_path / name, {"kind": "base_model", "architecture": architecture.model_dump(mode="json")})
    folders = (f"base_checkpoint={tmp_path}/base", f"queries.teacher.checkpoint={tmp_path}/siglip")

    def check(*overrides: str) -> None:
        stage = small_stage(repo, ROOM, SIGLIP, *folders, *overrides)
        check_base(stage, build_method(stage, *world).base_parts())

    check()
    check("queries.teacher.encoder.pooling_head=false")
    with pytest.raises(CheckpointError, match=r"encoder.num_heads is 2 there, 4 in the recipe") as found:
        check("queries.teacher.encoder.num_heads=4")
    assert found.value.where == str(tmp_path / "siglip")
    with pytest.raises(CheckpointError, match=r"queries.teacher.encoder.family is None there, siglip in the recipe"):
        check(f"queries.teacher.checkpoint={tmp_path}/base")
    with pytest.raises(CheckpointError, match="nowhere"):
        check(f"queries.teacher.checkpoint={tmp_path}/nowhere")


def test_teacher_that_sees_less_than_a_patch(repo: Path, world: World) -> None:
    stage = small_stage(repo, ROOM, SIGLIP, "queries.teacher.size.side=7")
    method = build_method(stage, *world)
    with pytest.raises(ConfigError, match="smaller than a patch, which is 8 x 8 pixels") as caught:
        method.work(DataSetup({}, lambda: None))
    assert caught.value.where == "queries.teacher.size"
