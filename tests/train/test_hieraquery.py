"""HieraQuery's stage on one rank: queries, condition, losses and gradients against a computation of each frame by
itself, and the VLM as it was before."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_decoder import generator_of
from small_diffusion import World
from small_hieraquery import (
    BY_THEMSELVES,
    SANA,
    chunk_of,
    make_sample,
    row_of,
    scales_of,
    several,
    small_stage,
    step_of,
)
from torch import Tensor

from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.config.hieraquery import MultiScaleConfig
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.chat import ChatFormat, ChatTokenizer
from megatron_unimm.data.frames import FrameSample
from megatron_unimm.data.sample import Turn
from megatron_unimm.errors import ConfigError, UserError
from megatron_unimm.generate.frame_painter import FrameRequest, Guided
from megatron_unimm.generate.scale_painter import ScalePainter
from megatron_unimm.generate.staged import decoding_mode
from megatron_unimm.methods.hieraquery.method import frame_work
from megatron_unimm.methods.hieraquery.model import conversation_of
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.vlm.batch import local_tokens, packed_context
from megatron_unimm.methods.vlm.model import FrozenParts, VlmModel
from megatron_unimm.models.mmdit.canvas import Canvas
from megatron_unimm.models.mmdit.frames import Frames
from megatron_unimm.models.mmdit.trunk import MMDiTInput
from megatron_unimm.models.scales import ScaleQueries, at_grids
from megatron_unimm.models.transformer_config import backbone_transformer_config
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.train.schedule import learning_rate
from megatron_unimm.train.step import TrainStep

# -- queries


def encoding(size: int, row: int, column: int) -> list[float]:
    """Eq. 3's P of one place: columns, then rows, sines, then cosines."""
    rates = [10000.0 ** (-number / (size / 4)) for number in range(size // 4)]
    return [f(place * rate) for place in (column, row) for f in (np.sin, np.cos) for rate in rates]


def config_of(stage: StageConfig, world: World):
    return backbone_transformer_config(stage.model.backbone, stage.system, world[0])


def test_queries_are_eq_1_to_3(repo: Path, world: World) -> None:
    """START, queries with their place, END; scale by scale, for each of two pictures."""
    stage = small_stage(repo)
    config = config_of(stage, world)
    queries = ScaleQueries(MultiScaleConfig(scales=[(1, 2), 2]), config.hidden_size, torch.float32)
    words = torch.randn(24, 1, config.hidden_size)
    # [ q q ] [ q q q q ] behind the third word, and again behind that.
    index = torch.tensor([4, 5, 8, 9, 10, 11, 14, 15, 18, 19, 20, 21])
    found = queries(words, index)
    length = config.init_method_std * 2**0.5
    places = [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0), (1, 1)]
    own = [
        weight + length * torch.tensor(encoding(config.hidden_size, *place), dtype=torch.float32)
        for weight, place in zip(queries.weight, places, strict=True)
    ]
    (start_1, end_1), (start_2, end_2) = queries.marks
    picture = [start_1, *own[:2], end_1, start_2, *own[2:], end_2]
    expected = [*words[:3, 0], *picture, *picture, words[23, 0]]
    torch.testing.assert_close(found[:, 0], torch.stack(expected))


def test_reused_marks_stay_as_they_are(repo: Path, world: World) -> None:
    """As Ming-Lite-Omni: queries of length 1, no encoding, the vocabulary's own marks."""
    config = config_of(small_stage(repo), world)
    queries = ScaleQueries(MultiScaleConfig(scales=[1, 2], mode="reuse"), config.hidden_size, torch.float32)
    torch.testing.assert_close(queries.weight.norm(dim=1), torch.ones(5))
    assert [name for name, _ in queries.named_parameters()] == ["weight"]
    words = torch.randn(10, 1, config.hidden_size)
    found = queries(words, torch.tensor([2, 5, 6, 7, 8]))
    assert torch.equal(found[[2, 5, 6, 7, 8], 0], queries.weight)
    assert torch.equal(found[[0, 1, 3, 4, 9]], words[[0, 1, 3, 4, 9]])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ("[0]", "no grid"),
        ("[4, 8]\n", ""),
        ("[8, 4]", "go up to 1"),
    ],
)
def test_scales_are_checked(repo: Path, settings: str, what: str) -> None:
    if not what:
        shares = scales_of(small_stage(repo, f"hieraquery.scales={settings.strip()}")).picture_scales
        assert (shares.queries, [float(share) for share in shares.shares]) == ((16, 64), [0.5, 1.0])
        assert shares.multiple == 2
        return
    with pytest.raises(ConfigError, match=what):
        small_stage(repo, f"hieraquery.scales={settings}")


def test_scales_of_the_paper() -> None:
    """Section 6.3: 0.25, 0.5 and 1 of the finest side, 336 queries; any grids and shares for its ablations."""
    default = MultiScaleConfig().picture_scales
    assert (default.queries, list(map(float, default.shares)), default.multiple) == ((16, 64, 256), [0.25, 0.5, 1.0], 4)
    one = MultiScaleConfig(scales=[(16, 21)]).picture_scales
    assert (one.queries, one.shares) == ((336,), (1,))
    more = MultiScaleConfig(scales=[(4, 8), (8, 12), (16, 24)], shares=[0.25, 0.5, 1.0])
    assert more.num_queries == 512


# -- losses and gradients


def single_condition(step: TrainStep, sample: FrameSample) -> list[Tensor]:
    """Tokens of each drawn view's condition, scale by scale, from a VLM that reads this sample alone, and a connector
    that reads one scale of one picture alone."""
    chunk, queries = chunk_of(step), sample.queries
    hidden = chunk.vlm.condition(conversation_of(chunk.vlm, row_of(step.stage, [sample])))  # [Q, H]
    adapters, total = chunk.scale_adapters, sum(queries)
    found, start = [], 0
    pictures = len(sample.layout.drawn_index)
    for scale, count in enumerate(queries):
        for picture in range(pictures):
            own = hidden[picture * total + start : picture * total + start + count]
            inward = adapters.inward.linear_2(F.gelu(adapters.inward.linear_1(own)))
            refined = chunk.scale_connector.refine(inward, (count,))
            outward = adapters.outward.linear_2(F.gelu(adapters.outward.linear_1(refined)))
            view = scale * sample.num_pictures + int(np.flatnonzero(sample.is_drawn[: sample.num_pictures])[picture])
            kept = float(sample.visual_uniform[view] >= 0.3)
            found.append((outward + adapters.place[start : start + count]) * kept)
        start += count
    return found


def frame_losses(step: TrainStep, sample: FrameSample, view: int, condition: Tensor) -> tuple[Tensor, Tensor]:
    """Summed squared error, and summed 1 − cosine, of one view: the transformer sees its condition, it, and the clean
    pictures before it at its scale, and nothing else is there; or it alone."""
    chunk, generator, encoder = chunk_of(step), generator_of(step.stage), step.stage.model.vision_encoder
    side, patch, vae = generator.token_pixels, generator.mmdit.patch_size, generator.vae
    picture = int(sample.is_drawn[view - view % sample.num_pictures : view].sum())
    count = sample.num_pictures if sample.shows_sources else 1
    first, number = view - view % count, view % count
    x_0 = []
    for pixels, (rows, columns) in zip(
        np.split(sample.pixels, np.cumsum(sample.sizes.prod(axis=1))[:-1]), sample.sizes, strict=True
    ):
        pixels_of_view = F.fold(torch.from_numpy(pixels).T[None], (rows * side, columns * side), side, stride=side)
        if vae.family == "dc_ae":
            latents = chunk.vae.encode(pixels_of_view).latent * vae.scaling_factor
        else:
            latents = (chunk.vae.encode(pixels_of_view).latent_dist.mean - vae.shift_factor) * vae.scaling_factor
        x_0.append(F.unfold(latents, patch, stride=patch)[0].T)  # [U, F]
    uniform = torch.tensor(sample.uniform[view], dtype=torch.float64)
    t = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(uniform))
    numbers = np.random.Generator(np.random.Philox(key=sample.noise_seed + view))
    noise = torch.from_numpy(numbers.standard_normal(x_0[view].shape, np.float32))
    x_t = ((1 - t) * x_0[view] + t * noise).float()
    frames = Frames(
        sizes=sample.sizes[first : view + 1],
        num_condition=np.array([0] * number + [len(condition)]),
        sample=np.zeros(number + 1, dtype=np.int64),
        number=np.arange(number + 1),
        is_clean=np.arange(number + 1) < number,
    )
    canvas = Canvas.build(
        frames, len(condition), len(condition) + int(frames.counts.sum()), generator, chunk.place(None)
    )
    pooled, nothing = chunk.scale_adapters.pooled, torch.zeros_like(condition[0])
    has_pooled = generator.mmdit.pooled_size > 0
    assert (pooled is not None) == has_pooled
    is_sd3 = generator.mmdit.family == "sd3"
    inputs = MMDiTInput(
        condition=condition,
        patches=torch.cat([*x_0[first:view], x_t]),
        position_index=canvas.position_index,
        timestep=torch.tensor([0.0] * number + [float(t)]),
        pooled=torch.stack([pooled(nothing)] * number + [pooled(condition.mean(dim=0))]) if has_pooled else None,
        added=chunk.frame_embedding(torch.from_numpy(np.repeat(frames.number, frames.counts))) if is_sd3 else None,
    )
    seen: list[Tensor] = []
    layer = step.stage.method.alignment.layer
    handle = chunk.mmdit.blocks.layers[layer - 1].register_forward_hook(lambda *args: seen.append(args[2][0]))
    velocity = chunk.mmdit(canvas.row, inputs, None)[-len(noise) :]
    handle.remove()
    error = (velocity - (noise - x_0[view])).square().mean(dim=1).sum()
    patches = np.cumsum([0, *sample.target_grids.prod(axis=1)])
    grid = sample.target_grids[picture : picture + 1]
    images = VisionInput.build(
        sample.target_patches[patches[picture] : patches[picture + 1]], grid, encoder, noise.device, torch.float32
    )
    features = chunk.vlm.vision_encoder(images)[:, : encoder.out_size]
    laid = features.T.reshape(1, -1, int(grid[0, 1]) // 2, int(grid[0, 2]) // 2)
    wanted = F.interpolate(laid, tuple(sample.sizes[view]), mode="bilinear", antialias=True)[0].flatten(1).T
    found = chunk.alignment_projector(seen[0][-len(noise) :, 0])
    cosine = (found * wanted).sum(dim=1) / found.norm(dim=1) / wanted.norm(dim=1)
    return error, (1 - cosine).sum()


def expected_sums(step: TrainStep, samples: Sequence[FrameSample]) -> tuple[Tensor, Tensor]:
    flow, aligned = torch.zeros(()), torch.zeros(())
    for sample in samples:
        conditions = iter(single_condition(step, sample))
        for view in np.flatnonzero(sample.is_drawn):
            error, distance = frame_losses(step, sample, int(view), next(conditions))
            if sample.learned:
                flow, aligned = flow + error, aligned + distance
    return flow, aligned


@pytest.mark.parametrize("overrides", [(), BY_THEMSELVES, SANA], ids=["sd3", "by themselves", "sana"])
def test_losses_and_gradients_are_those_of_each_frame(repo: Path, world: World, overrides: tuple[str, ...]) -> None:
    """A packed row of several samples, scales and turns: both losses, and the gradient of every part that trains."""
    step = step_of(small_stage(repo, *overrides), world)
    samples = several(step.stage)
    row = row_of(step.stage, samples)
    counts = step.method.counts([row])
    means = step.forward_backward([row])
    flow, aligned = expected_sums(step, samples)
    torch.testing.assert_close(means[0] * counts[0], flow.detach(), rtol=2e-5, atol=1e-5)
    assert step.method.terms[-1] == "alignment"
    torch.testing.assert_close(means[-1] * counts[-1], aligned.detach(), rtol=2e-5, atol=1e-5)
    named = {name: p for name, p in chunk_of(step).named_parameters() if p.requires_grad}
    total = flow / counts[0] + 0.5 * aligned / counts[-1]
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    norm = torch.stack([gradient.square().sum() for gradient in gradients if gradient is not None]).sum().sqrt()
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        assert (parameter.main_grad - wanted).norm() <= 1e-4 * wanted.norm() + 1e-6 * norm, name
    reached = {name.split(".")[0] for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    embedding = set() if overrides == SANA else {"frame_embedding"}
    assert reached == {"mmdit", "vlm", "scale_connector", "scale_adapters", "alignment_projector"} | embedding
    trained = {name for name in named if name.startswith("vlm.")}
    assert trained == {"vlm.query_tokens.weight", "vlm.query_tokens.marks"}
    assert all(named[name].main_grad.norm() > 1e-6 for name in trained)


def test_a_rank_without_pictures_takes_part(repo: Path, world: World) -> None:
    """Every gradient is there, and zero: overlapped reduction waits for each."""
    step = step_of(small_stage(repo), world)
    row = row_of(step.stage, [])
    means = step.forward_backward([row])
    assert not means.any()
    named = {name: p for name, p in chunk_of(step).named_parameters() if p.requires_grad}
    assert all(not p.main_grad.any() for p in named.values())
    reached: set[str] = set()
    for name, parameter in named.items():
        parameter.register_hook(lambda gradient, name=name: reached.add(name))
    chunk_of(step)(step.method.batch(row, chunk_of(step), torch.device("cpu"))).sum().backward()
    assert reached == named.keys()


def test_without_alignment_there_is_no_such_term(repo: Path, world: World) -> None:
    step = step_of(small_stage(repo, "stages.editing.method.alignment=null"), world)
    samples = several(step.stage)
    row = row_of(step.stage, samples)
    assert "alignment" not in step.method.terms
    assert not hasattr(chunk_of(step), "alignment_projector")
    assert row.target_grids is None
    assert step.forward_backward([row])[0] > 0


def test_features_are_interpolated_picture_by_picture() -> None:
    """Coarser grids average, finer ones blend: two pictures of other sizes, in any order."""
    high, wide = torch.arange(8.0).reshape(4, 2), torch.arange(6.0).reshape(2, 3) + 10
    features = torch.cat([high.flatten(), wide.flatten()])[:, None]
    found = at_grids(features, [(4, 2), (2, 3)], [1, 0, 0], [(2, 3), (2, 2), (1, 1)])
    torch.testing.assert_close(found[:6], wide.flatten()[:, None])
    averaged = found[6:10, 0].reshape(2, 2)
    # The triangle of a grid half as fine: rows 1/8 (3, 3, 1) and its mirror image, renormalised at the border.
    rows = torch.tensor([[3.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 3.0]]) / 7
    torch.testing.assert_close(averaged, rows @ high)
    assert found[10, 0] == pytest.approx(3.5)


# -- the VLM


def test_the_vlm_answers_as_before_to_the_bit(repo: Path, world: World) -> None:
    """Logits of a conversation with an image: of a plain VLM, of the same one with all parts of the method, and of that
    after an optimizer step."""
    stage = small_stage(repo)
    step = step_of(stage, world)
    vlm = chunk_of(step).vlm
    plain = VlmModel(stage, *world, FrozenParts(vision_encoder=True, backbone=True)).eval()
    theirs = {name: value for name, value in vlm.state_dict().items() if isinstance(value, Tensor)}
    own = {name: value for name, value in theirs.items() if not name.startswith("query_tokens")}
    assert not plain.load_state_dict(own, strict=False).unexpected_keys
    before = {name: value.clone() for name, value in theirs.items()}
    sample = make_sample(stage, "asked", ("says", 4), ("shows", 2, 2), ("says", 6), ("draws", 2, 2))
    row = row_of(stage, [sample])
    asked = len(sample.layout) - scales_of(stage).num_queries - 4

    def logits(model: VlmModel) -> Tensor:
        conversation = row.conversation
        role = plain.role()
        local = local_tokens(conversation, role)
        context = packed_context(conversation, local, stage.model, role)
        encoder = stage.model.vision_encoder
        images = VisionInput.build(conversation.patches, conversation.grids, encoder, role.device, role.dtype)
        with torch.no_grad():
            rows = model.embed_tokens(
                torch.from_numpy(conversation.input_ids), model.see(images), torch.from_numpy(conversation.visual_index)
            )
            return model.text_logits(model.advance(rows, context)[:asked, 0])

    expected = logits(plain)
    assert torch.equal(logits(vlm), expected)
    step.run([row_of(stage, several(stage))], 1e-2)
    after = vlm.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"query_tokens.weight", "query_tokens.marks"}
    assert torch.equal(logits(vlm), expected)


def test_queries_do_not_change_what_stands_before_them(repo: Path, world: World) -> None:
    """Causal: hidden states before the queries are the same with other queries."""
    stage = small_stage(repo)
    chunk = chunk_of(step_of(stage, world))
    sample = make_sample(stage, "asked", ("says", 9), ("draws", 2, 2))
    batch = conversation_of(chunk.vlm, row_of(stage, [sample]))
    with torch.no_grad():
        before = chunk.vlm.last_hidden(batch)
        chunk.vlm.query_tokens.weight.add_(1.0)
        after = chunk.vlm.last_hidden(batch)
    first = int(sample.layout.query_index[0])
    assert torch.equal(before[:first], after[:first])
    assert not torch.allclose(before[first:], after[first:])


def test_learning_rate_of_the_paper() -> None:
    """Section 4.2: 1e-6, up to 5e-5, down to 1e-6."""
    stage_schedule = small_stage(Path(__file__).parents[2]).train.schedule
    schedule = stage_schedule.model_copy(
        update={"kind": "cosine", "initial_learning_rate": 1e-6, "max_learning_rate": 5e-5, "min_learning_rate": 1e-6}
    )
    schedule.warmup_ratio = 0.1
    rates = [learning_rate(step, 1000, schedule) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-6 + 4.9e-5 / 100)
    assert rates[99] == pytest.approx(5e-5)
    assert rates[-1] == pytest.approx(1e-6)
    assert max(rates) == pytest.approx(5e-5)


# -- drawing


@pytest.mark.parametrize("overrides", [(), SANA], ids=["sd3", "sana"])
def test_each_scale_is_drawn_from_its_own_tokens(repo: Path, world: World, overrides: tuple[str, ...]) -> None:
    """The guided velocity of an edit at each scale: v(∅) + s (v(c) − v(∅)), each from a row that holds nothing but the
    frames of one scale, for SANA the new one alone; and pictures of all scales."""
    stage = small_stage(repo, *overrides, f"data.tokenizer={repo}/tools/base_models/shapes_vlm")
    step = step_of(stage, world)
    chunk, generator, side = chunk_of(step), generator_of(stage), generator_of(stage).token_pixels
    tokenizer = ChatTokenizer(stage.data.tokenizer, stage.model)
    chat = ChatFormat(tokenizer, stage.model.vision_encoder, stage.data)
    painter = ScalePainter(
        [chunk], stage, step.groups, step.platform, frame_work(stage, DataSetup({}, lambda: chat)), origin="here"
    )
    given = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    turns = (Turn("user", (0, "Make it red.")),)
    plain = SamplerConfig(steps=2, guidance_scale=3.0)
    drawn = painter.paint([FrameRequest(turns, (given,), (64, 64), scale=scale) for scale in (0, 1)], plain)
    assert [picture.shape for picture in drawn] == [(32, 32, 3), (64, 64, 3)]
    with pytest.raises(UserError, match=r"image_guidance_scale: is 1.5"):
        painter.paint([FrameRequest(turns, (given,), (64, 64))], SamplerConfig(image_guidance_scale=1.5))
    for scale, tokens in enumerate((4, 16)):
        drawables = [painter.lay_out(FrameRequest(turns, (given,), (64, 64), scale=scale)) for _ in range(2)]
        state = torch.randn(2, tokens, generator.mmdit.patch_dim)
        with decoding_mode([chunk]):
            found = Guided(painter, drawables, plain).velocity(state, 0.6)
            clean = painter.clean_latents(drawables[:1])  # [u, F]; [0, F]
            before = int(stage.method.shows_sources)
            assert len(clean) == before * tokens
            sample = painter.work.with_patches(drawables[0].sample, (given,))
            whole = chunk.vlm.condition(conversation_of(chunk.vlm, painter.work.row([sample])))
            condition = chunk.tokens(whole, stage.scales.queries)[slice(0, 2) if scale == 0 else slice(2, 6)]
            parts = []
            for own in (condition, torch.zeros_like(condition)):
                frames = Frames(
                    sizes=np.array([[2 ** (scale + 1)] * 2] * (before + 1)),
                    num_condition=np.array([0] * before + [len(own)]),
                    sample=np.zeros(before + 1, dtype=np.int64),
                    number=np.arange(before + 1),
                    is_clean=np.array([True] * before + [False]),
                )
                length = len(own) + (before + 1) * tokens
                canvas = Canvas.build(frames, len(own), length, generator, chunk.place(None))
                pooled, added = None, None
                if not overrides:
                    pool, nothing = chunk.scale_adapters.pooled, torch.zeros_like(own[0])
                    pooled = torch.stack([pool(nothing), pool(own.mean(dim=0))])
                    added = chunk.frame_embedding(torch.from_numpy(np.repeat(frames.number, frames.counts)))
                inputs = MMDiTInput(
                    condition=own,
                    patches=torch.cat([clean, state[0]]),
                    position_index=canvas.position_index,
                    timestep=torch.tensor([0.0] * before + [0.6]),
                    pooled=pooled,
                    added=added,
                )
                parts.append(chunk.mmdit(canvas.row, inputs, None)[before * tokens :])
        expected = parts[1] + 3.0 * (parts[0] - parts[1])
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)
    assert side == 16
