"""ORION's forward pass and objective against transformers and against itself: packed or not, recomputed or not."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_orion import make_sample, small_stage
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.convert import import_checkpoint
from megatron_unimm.convert.qwen2_5_vl import to_hf_config
from megatron_unimm.data.packing import pack
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample
from megatron_unimm.methods.registry import build_method
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import load_base, load_weights
from megatron_unimm.train.step import TrainStep

World = tuple[Platform, ParallelGroups]


def train_step(stage: StageConfig, world: World, seed: int = 0) -> TrainStep:
    """A step over a random model whose frozen base is another one."""
    platform, groups = world
    torch.manual_seed(seed)
    method, chunks = setup.build_model(stage, platform, groups)
    for parameter in chunks[0].parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    return TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)


def samples_of(stage: StageConfig) -> list[TokenizedSample]:
    """Read images and generated ones of several sizes, and a sample with two images."""
    single = [
        make_sample(stage, f"s{i}", 30 + 7 * i, grid, i % 2 == 1)
        for i, grid in enumerate([(4, 4), (6, 4), (10, 6), (4, 8)])
    ]
    return [*single, two_images(make_sample(stage, "a", 20, (4, 6), False), make_sample(stage, "b", 31, (8, 4), True))]


def two_images(first: TokenizedSample, second: TokenizedSample) -> TokenizedSample:
    """One sample that reads the first image and draws the second: what editing is."""
    shift, rows = len(first), len(first.visual_index)
    return TokenizedSample(
        id="two",
        kind="editing",
        input_ids=np.concatenate([first.input_ids, second.input_ids]),
        labels=np.concatenate([first.labels, second.labels]),
        position_ids=np.concatenate([first.position_ids, second.position_ids + shift], axis=1),
        patches=np.concatenate([first.patches, second.patches]),
        grids=np.concatenate([first.grids, second.grids]),
        is_target=np.concatenate([first.is_target, second.is_target]),
        visual_index=np.concatenate([first.visual_index, second.visual_index + shift]),
        predict_index=second.predict_index + shift,
        target_index=second.target_index + rows,
    )


def rows_of(samples: list[TokenizedSample], stage: StageConfig, packing: bool) -> list[PackedRow]:
    return pack(
        samples,
        sequence_length=stage.data.sequence_length,
        num_rows_multiple=1,
        alignment=1,
        packing=packing,
        pad_id=stage.model.token_ids.pad,
    )


def gradients(step: TrainStep, rows: list[PackedRow]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = step.forward_backward(rows)
    named = step.chunks[0].module.named_parameters()
    return losses, {name: parameter.main_grad.clone() for name, parameter in named if parameter.requires_grad}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every gradient to 1e-5 of its norm (measured: 2e-6)."""
    total = sum(gradient.square().sum() for gradient in expected.values()).sqrt()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * total, name


def test_packed_equals_unpacked(repo: Path, world: World) -> None:
    """A packed row's losses and gradients are the sum over its samples run alone, several images included."""
    stage = small_stage(repo, "data.sequence_length=256")
    step = train_step(stage, world)
    samples = samples_of(stage)
    packed = rows_of(samples, stage, packing=True)
    alone = rows_of(samples, stage, packing=False)
    assert len(packed) == 1
    assert len(alone) == len(samples)
    losses, packed_gradients = gradients(step, packed)
    expected_losses, expected = gradients(step, alone)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert losses.min() > 0
    assert_same(packed_gradients, expected)


@pytest.mark.parametrize(
    "overrides", [("system.recompute.granularity=selective",), ("system.recompute.granularity=full",)]
)
def test_recompute_changes_nothing(overrides: tuple[str, ...], repo: Path, world: World) -> None:
    stage, recomputed = (
        small_stage(repo, "data.sequence_length=256"),
        small_stage(repo, "data.sequence_length=256", *overrides),
    )
    rows = rows_of(samples_of(stage), stage, packing=True)
    losses, expected = gradients(train_step(stage, world), rows)
    found_losses, found = gradients(train_step(recomputed, world), rows)
    torch.testing.assert_close(found_losses, losses, rtol=1e-6, atol=0)
    assert_same(found, expected)


def test_noise_on_visual_tokens(repo: Path, world: World) -> None:
    """What the student reads of images that it generates differs by the noise alone; images that are read, the teacher
    and the targets stay bit for bit; noise belongs to the draw, wherever in a row it stands."""
    clean, noisy = (
        small_stage(repo, "data.sequence_length=256", f"method.token_noise={noise}") for noise in (0.0, 0.5)
    )
    platform, groups = world
    method, (model,) = setup.build_model(noisy, platform, groups)
    samples = [replace(sample, noise_seed=1000 * i) for i, sample in enumerate(samples_of(noisy))]
    (row,) = rows_of(samples, noisy, packing=True)
    with_noise = method.batch(row, model, platform.device)
    without = build_method(clean, platform, groups).batch(row, model, platform.device)
    noise = with_noise.noise
    assert without.noise is None
    assert noise.shape == (len(row.visual_index), noisy.model.backbone.hidden_size)
    drawn = torch.ones(len(noise), dtype=torch.bool)
    drawn[with_noise.sight.read_rows] = False
    assert 0 < drawn.sum() < len(drawn)
    assert not noise[~drawn].any()
    with torch.no_grad():
        (student, teacher, target), (plain, its_teacher, its_target) = model._enter(with_noise), model._enter(without)
    assert torch.equal(teacher, its_teacher)
    assert torch.equal(target, its_target)
    added = torch.zeros_like(student[:, 0]).index_copy(0, with_noise.sight.visual_index, noise)
    torch.testing.assert_close(student[:, 0], plain[:, 0] + added, rtol=0, atol=1e-6)

    counts = np.split(np.arange(len(noise)), np.cumsum(row.grids.prod(axis=1) // 4)[:-1])
    deviations = [float(noise[where].std()) for where, target in zip(counts, row.is_target, strict=True) if target]
    assert max(deviations) < 0.5 * 1.1
    assert len(set(deviations)) == len(deviations)
    (alone,) = rows_of(samples[-1:], noisy, packing=True)
    last = method.batch(alone, model, platform.device).noise
    place = row.sample_ids.index(samples[-1].id)
    before = sum(len(next(s for s in samples if s.id == name).visual_index) for name in row.sample_ids[:place])
    assert torch.equal(noise[before : before + len(last)], last)


@pytest.mark.parametrize("kind", ["linear", "mlp", "q_former"])
def test_every_vision_head_learns(kind: str, repo: Path, world: World) -> None:
    """The warm-up's loss falls with each head of the ablation, and nothing else moves."""
    stage = small_stage(
        repo,
        f"method.vision_head.kind={kind}",
        "method.loss_weights={cross_entropy: 0, mse: 1, kl: 0}",
        "train.trainable=[{pattern: 'vision_head.*'}, {pattern: '*', train: false}]",
    )
    step = train_step(stage, world)
    before = {name: parameter.clone() for name, parameter in step.chunks[0].module.named_parameters()}
    rows = rows_of(samples_of(stage), stage, packing=True)
    losses = [step.run(rows, 1e-3).losses[1].item() for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in step.chunks[0].module.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("vision_head."), name


def test_bad_gradient_is_skipped(repo: Path, world: World) -> None:
    """One NaN pixel: the step is left out on every tensor, weights stay bit for bit, and the next step goes on."""
    stage = small_stage(repo)
    step = train_step(stage, world)
    good = rows_of(samples_of(stage)[:2], stage, packing=True)
    bad = [PackedRow(**{**vars(row), "patches": np.full_like(row.patches, np.nan)}) for row in good]
    assert step.run(good, 1e-3).skip.item() == 0
    before = {name: parameter.clone() for name, parameter in step.chunks[0].module.named_parameters()}
    assert step.run(bad, 1e-3).skip.item() == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in step.chunks[0].module.named_parameters())
    assert not step.worst.isfinite().all()
    result = step.run(good, 1e-3)
    assert result.skip.item() == 0
    assert result.losses.isfinite().all()
    assert step.guard.skipped.item() == 1


class Reference:
    """ORION's terms for one sample, from transformers' model and twenty lines of torch."""

    def __init__(self, folder: Path) -> None:
        load = Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.student = load(folder / "student", dtype=torch.float32, attn_implementation="eager").eval()
        self.teacher = load(folder / "teacher", dtype=torch.float32, attn_implementation="eager").eval()

    def features(
        self, model: Qwen2_5_VLForConditionalGeneration, sample: TokenizedSample, which: np.ndarray
    ) -> list[torch.Tensor]:
        """Merged features per image, for the chosen images."""
        bounds = np.concatenate([[0], np.cumsum(sample.grids.prod(axis=1))])
        made = []
        for image in np.flatnonzero(which):
            patches = torch.from_numpy(sample.patches[bounds[image] : bounds[image + 1]])
            output = model.model.visual(patches, grid_thw=torch.from_numpy(sample.grids[image : image + 1]))
            made.append(output.pooler_output)
        return made

    def terms(self, sample: TokenizedSample, head: torch.nn.Module) -> torch.Tensor:
        """(CE, MSE, KL) sums."""
        everything = np.ones_like(sample.is_target)
        base = self.features(self.teacher, sample, everything)
        own = self.features(self.student, sample, everything)
        seen = [base[i] if target else own[i] for i, target in enumerate(sample.is_target)]
        hidden, logits = self.forward(self.student, sample, torch.cat(seen))
        _, teacher_logits = self.forward(self.teacher, sample, torch.cat(base))
        labels = torch.from_numpy(sample.labels)
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        at = torch.from_numpy(sample.predict_index)
        target = torch.cat(base)[torch.from_numpy(sample.target_index)]
        mse = (head(hidden[at]) - target).square().mean(dim=-1).sum()
        kl = F.kl_div(logits[at].log_softmax(-1), teacher_logits[at].log_softmax(-1), log_target=True, reduction="sum")
        return torch.stack([ce, mse, kl])

    def forward(
        self, model: Qwen2_5_VLForConditionalGeneration, sample: TokenizedSample, visual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = model.get_input_embeddings()(torch.from_numpy(sample.input_ids)).clone()
        embeddings[torch.from_numpy(sample.visual_index)] = visual
        positions = torch.from_numpy(sample.position_ids)[:, None]
        output = model.model.language_model(inputs_embeds=embeddings[None], position_ids=positions, use_cache=False)
        hidden = output.last_hidden_state[0]
        return hidden, model.lm_head(hidden)


@pytest.fixture(scope="module")
def transformers_pair(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """Two random Hugging Face models, student and teacher, and their imports."""
    folder = tmp_path_factory.mktemp("pair")
    config = to_hf_config(small_stage(repo).model)
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


def test_terms_equal_transformers(transformers_pair: Path, repo: Path, world: World) -> None:
    """Eq. 1-3 of every sample kind, with a tower that trains, against transformers' model (measured: 3e-6 relative)."""
    stage = small_stage(repo, "data.sequence_length=256")
    step = train_step(stage, world)
    chunk = step.chunks[0].module
    load_weights([chunk], transformers_pair / "student_imported", step.groups)
    teacher = transformers_pair / "teacher_imported"
    load_base([chunk], {"backbone": teacher, "vision_encoder": teacher}, step.groups)
    samples = samples_of(stage)
    reference = Reference(transformers_pair)
    with torch.no_grad():
        expected = torch.stack([reference.terms(sample, chunk.vision_head) for sample in samples]).sum(dim=0)
    counts = torch.tensor(step.method.counts(rows_of(samples, stage, packing=True)), dtype=torch.float32)
    found = step.forward_backward(rows_of(samples, stage, packing=True)) * counts
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


class ApexLike(torch.optim.AdamW):
    """An Adam with the arguments of Apex's, that knows neither clipping nor skipping."""

    def __init__(self, params: Iterable, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)


def test_another_fused_adam_gives_the_same(repo: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped steps and a skipped one, with the kernel of another package."""
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=ApexLike))
    stages = [small_stage(repo, f"train.optimizer.implementation={name}") for name in ("torch", "apex")]
    good = rows_of(samples_of(stages[0])[:2], stages[0], packing=True)
    bad = [PackedRow(**{**vars(row), "patches": np.full_like(row.patches, np.nan)}) for row in good]
    trained = []
    for stage in stages:
        step = train_step(stage, world)
        results = [step.run(rows, 1e-3) for rows in (good, bad, good)]
        assert [result.skip.item() for result in results] == [0, 1, 0]
        assert results[0].gradient_norm > stage.train.optimizer.clip_norm
        trained.append({name: p.detach().clone() for name, p in step.chunks[0].module.named_parameters()})
    for name, parameter in trained[0].items():
        # An Adam with epsilon 1e-15 turns rounding of gradients that are truly zero (biases of keys) into steps.
        if "linear_qkv.bias" not in name:
            torch.testing.assert_close(trained[1][name], parameter, rtol=1e-4, atol=2e-5, msg=name)
