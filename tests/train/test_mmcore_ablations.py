"""What MMCORE's diffusion transformer does otherwise in the paper's ablations: one pathway alone, visual latents of
earlier pictures in the context, features of the vision encoder beside those of the VAE. In training against a
computation in the open, and in drawing against training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_decoder import generator_of
from small_diffusion import MODELS, World, chunk_of, diffusion_step, make_frames, row_of, several, small_diffusion
from test_mmcore_diffusion import assert_same, batch_of, sample_losses, sums_and_gradients
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.data.frames import FrameSample, FrameWork
from megatron_unimm.data.queries import query_tokens
from megatron_unimm.data.sample import Turn
from megatron_unimm.generate.frame_painter import FrameRequest, Guided
from megatron_unimm.generate.pathway_painter import PathwayPainter
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.drawing.model import PictureInput
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.models.vit_features import VitFeatures, nearest
from megatron_unimm.train.setup import chat_format
from megatron_unimm.train.step import TrainStep

EARLIER, VIT = "method.earlier_latents=true", "method.vit_features=true"


# -- features of the vision encoder


def seen_by_the_vlm(step: TrainStep, sample: FrameSample) -> list[Tensor]:
    """``[u, H]`` for the clean tokens of each picture that is read, each looked at alone."""
    chunk, model, merge = chunk_of(step), step.stage.model, step.stage.model.vision_encoder.spatial_merge_size
    patches, grids = sample.layout.tokens.patches, sample.layout.tokens.grids
    found, start = [], 0
    for grid, size in zip(grids, sample.sizes, strict=False):
        one = patches[start : start + int(grid.prod())]
        start += len(one)
        features = chunk.vlm.vision_encoder(
            VisionInput.build(one, grid[None], model.vision_encoder, torch.device("cpu"), torch.float32)
        )
        rows, columns = int(grid[1]) // merge, int(grid[2]) // merge
        laid = features.detach().T.unflatten(1, (rows, columns))[None]  # [1, D, rows, columns]
        sampled = F.interpolate(laid, size=tuple(map(int, size)), mode="nearest-exact")[0].flatten(1).T
        scale = torch.rsqrt(sampled.square().mean(dim=1, keepdim=True) + 1e-6)
        found.append(chunk.vit_features.linear(sampled * scale * chunk.vit_features.norm.weight))
    return found


@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_loss_with_vit_features_equals_a_computation_frame_by_frame(model: str, repo: Path, world: World) -> None:
    step = diffusion_step(small_diffusion(repo, *MODELS[model], VIT), world)
    samples = several(step.stage)
    found, gradients = sums_and_gradients(step, [row_of(step.stage, samples)])
    total = sum(
        loss
        for sample in samples
        if sample.learned
        for loss, _, _ in sample_losses(step, sample, seen_by_the_vlm(step, sample))
    )
    assert isinstance(total, Tensor)
    torch.testing.assert_close(found[0], total.detach(), rtol=1e-5, atol=1e-5)
    trained = {name: p for name, p in chunk_of(step).named_parameters() if name.startswith("vit_features.")}
    wanted = torch.autograd.grad(total, list(trained.values()))
    assert_same({name: gradients[name] for name in trained}, dict(zip(trained, wanted, strict=True)))


def test_vit_features_begin_as_nothing(repo: Path, world: World) -> None:
    """Rows have the loss that they have without, bit for bit, until the projection has learned something."""
    step = diffusion_step(small_diffusion(repo, VIT), world)
    row = row_of(step.stage, several(step.stage))
    loss = step.forward_backward([row], forward_only=True)[0].item()
    fresh = VitFeatures(64, step.stage.generator.mmdit.hidden_size)
    chunk_of(step).vit_features.load_state_dict(fresh.state_dict())
    batch = batch_of(step, row)
    assert batch.condition is not None
    without = replace(batch, condition=replace(batch.condition, features=None))
    with torch.no_grad():
        sums = [chunk_of(step)(each)[0].item() for each in (batch, without)]
    assert sums[0] == sums[1] != loss * step.method.counts([row])[0]


def test_rows_without_earlier_pictures_train_the_projection_with_nothing(repo: Path, world: World) -> None:
    """Its gradients are there, so that overlapped reduction waits for none in vain."""
    step = diffusion_step(small_diffusion(repo, VIT), world)
    row = row_of(step.stage, [make_frames(step.stage, "picture", ("says", 5), ("draws", 2, 2))])
    chunk_of(step)(batch_of(step, row))[0].backward()
    assert all(p.main_grad.abs().max() == 0 for p in chunk_of(step).vit_features.parameters())


def test_nearest_takes_what_lies_over_the_centre() -> None:
    assert nearest((2, 3), (2, 3)).tolist() == list(range(6))
    assert nearest((4, 2), (2, 1)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert nearest((1, 2), (3, 5)).tolist() == [6, 8]  # row 1 of 3; columns 1 and 3 of 5


# -- one pathway


@pytest.mark.parametrize("pathway", ["visual", "text"])
def test_one_pathway_alone(pathway: str, repo: Path, world: World) -> None:
    """The other moves nothing, whatever the dropout says, and learns nothing."""
    always = ("method.text_dropout={start: 0.0, end: 0.0}", "method.visual_dropout={start: 0.0, end: 0.0}")
    step = diffusion_step(small_diffusion(repo, f"method.pathways={pathway}", *always), world)
    row = row_of(step.stage, several(step.stage))
    assert (row.text_kept.all(), row.visual_kept.all()) == (pathway == "text", pathway == "visual")
    assert (row.text_kept.any(), row.visual_kept.any()) == (pathway == "text", pathway == "visual")
    gradients = sums_and_gradients(step, [row])[1]
    for name in ("text", "visual"):
        learned = gradients[f"pathways.{name}.linear_1.weight"].abs().max() > 0
        assert learned == (name == pathway), name


def test_words_take_up_no_places_without_their_pathway(repo: Path) -> None:
    """The frames of a conversation then have a condition of N visual latents, and as many words as before otherwise."""
    turns = [Turn("user", ("a red circle left of a blue square",)), Turn("assistant", (0,))]
    for pathways, words in (("both", True), ("visual", False), ("text", True)):
        stage = small_diffusion(repo, f"method.pathways={pathways}", tokenizer_of(repo))
        work = frame_work(stage, DataSetup({}, lambda stage=stage: chat_format(stage)))
        sample = frames_of(work, turns)
        assert (sample.num_words[0] > 0) == words
        assert sample.num_condition[0] == sample.num_words[0] + 6
        assert len(work.row([sample]).text_kept) == sample.num_words[0]


def tokenizer_of(repo: Path) -> str:
    return f"data.tokenizer={repo}/tools/base_models/shapes_vlm"


def frames_of(work: FrameWork, turns: list[Turn]) -> FrameSample:
    """As training lays a conversation out."""
    sizes = [(64, 64)] * sum(isinstance(part, int) for turn in turns for part in turn.parts)
    layout = query_tokens("one", "interleaved", turns, sizes, work.chat, work.scales.queries)
    return work.frames_of(layout, turns, sizes, key=3)


# -- drawing is what training computes


DRAWN_WITH = {
    "plain": (),
    "earlier": (EARLIER,),
    "vit": (VIT,),
    "both": (EARLIER, VIT),
    "visual": ("method.pathways=visual", EARLIER),
    "text": ("method.pathways=text",),
}


@pytest.mark.parametrize("settings", DRAWN_WITH.values(), ids=DRAWN_WITH)
@pytest.mark.parametrize("model", ["dual", "flux"])
def test_a_velocity_is_that_of_training(settings: tuple[str, ...], model: str, repo: Path, world: World) -> None:
    """Of the second edit of a conversation, at t = 1 where the state is all that is left of the picture: it is that of
    the row that training makes of the conversation, with the first edit at t = 0."""
    step = diffusion_step(small_diffusion(repo, *MODELS[model], *settings, tokenizer_of(repo)), world)
    chunk, stage = chunk_of(step), step.stage
    work = frame_work(stage, DataSetup({}, lambda: chat_format(stage)))
    painter = PathwayPainter([chunk], stage, step.groups, step.platform, work, origin="here")
    rng = np.random.default_rng(0)
    pictures = tuple(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2))
    turns = (
        Turn("user", (0, "Make the circle green.")),
        Turn("assistant", ("Sure.", 1)),
        Turn("user", ("And now remove it.",)),
    )
    drawables = [painter.lay_out(FrameRequest(turns, pictures, (64, 64))) for _ in range(2)]
    assert drawables[0].sample.is_drawn.tolist() == [False, EARLIER in settings, True]
    tokens, width = drawables[0].tokens, generator_of(stage).mmdit.patch_dim
    states = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))
    plain = SamplerConfig(guidance_scale=1.0, image_guidance_scale=1.0)
    with decoding_mode(painter.chunks):
        guided = Guided(painter, drawables, plain)
        found = guided.velocity(states, 1.0)[0]
        clean = painter.clean_latents(drawables[:1])

    sample = frames_of(work, [*turns, Turn("assistant", (2,))])
    row = work.row([work.with_patches(sample, pictures)])
    batch = batch_of(step, row)
    assert batch.condition is not None
    kept = {name: torch.ones_like(vars(batch.condition)[name]) for name in ("text_kept", "visual_kept")}
    kept["visual_kept"] *= "method.pathways=text" not in settings
    timestep = torch.zeros_like(batch.timestep)
    timestep[len(row.frames) - 1] = 1.0
    noise = torch.zeros(len(row.token_of), width)
    noise[-tokens:] = states[0]
    latents = torch.cat([clean, torch.full((tokens, width), 7.0)])
    given = PictureInput(None, latents, [], noise, torch.from_numpy(row.token_of))
    velocities: list[Tensor] = []
    handle = chunk.mmdit.register_forward_hook(lambda module, inputs, output: velocities.append(output))
    with torch.no_grad():
        chunk(replace(batch, timestep=timestep, pictures=given, condition=replace(batch.condition, **kept)))
    handle.remove()
    expected = velocities[0][len(noise) - tokens : len(noise)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
