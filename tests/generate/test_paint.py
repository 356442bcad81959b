"""Pictures from visual tokens: against diffusers on the same weights, and against the algebra of guidance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_decoder import FLUX, PLAIN, SQUARE, difference, make_decoder, painter_of, requests, tokens
from torch import Tensor

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.flow import SamplerConfig
from megatron_unimm.convert import export_checkpoint
from megatron_unimm.generate import paint
from megatron_unimm.generate.paint import Painter, PaintRequest

TOLERANCE = 1e-5
"""Largest absolute difference of latents of order 1 from those of diffusers (measured 2.9e-6)."""
SEED = 7


def latents(
    painter: Painter,
    asked: Sequence[PaintRequest],
    size: tuple[int, int] = (64, 64),
    seed: int = SEED,
    **sampler: Any,
) -> Tensor:
    settings = SamplerConfig(**({"steps": 3, "guidance_scale": 1.0} | sampler))
    return painter.latents(asked, size, settings, seed)


# -- diffusers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """The decoder as diffusers loads it."""

    transformer: Any
    vae: AutoencoderKL
    connector: dict[str, Tensor]

    @classmethod
    def of(cls, checkpoint: Path, folder: Path) -> "Exported":
        export_checkpoint(checkpoint, folder)
        kind = FluxTransformer2DModel if read_meta(checkpoint)["family"] == "flux" else SD3Transformer2DModel
        with Reader(checkpoint) as reader:
            names = [name for name in reader.tensors if name.startswith("connector.")]
            connector = {name.removeprefix("connector."): reader.read(name) for name in names}
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        return cls(kind.from_pretrained(folder / "transformer").eval(), vae.eval(), connector)

    def condition(self, request: PaintRequest, kept: float = 1.0) -> Tensor:
        """``[1, V, C]``: Linear, LayerNorm, ReLU, Linear, LayerNorm; a vector for sources; ``kept`` 0 is nothing."""
        visual = torch.cat([request.visual_tokens, *request.sources]) * kept
        is_source = torch.arange(len(visual)) >= len(request.visual_tokens)
        w = self.connector

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

        hidden = F.relu(norm(visual @ w["linear_1.weight"].T + w["linear_1.bias"], "norm_1"))
        found = norm(hidden @ w["linear_2.weight"].T + w["linear_2.bias"], "norm_2")
        return (found + is_source[:, None] * w["source"])[None]


def draw_sd3(ref: Exported, request: PaintRequest, rows: int, columns: int, steps: int, guidance: float) -> Tensor:
    """StableDiffusion3Pipeline's loop on given noise and conditions: latents (1, C, h, w)."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    state = unpatched(noise(request.number, rows * columns), rows, columns)
    condition = torch.cat([ref.condition(request, 0.0), ref.condition(request)])
    pooled = ref.connector["pooled"].expand(2, -1)
    for t in scheduler.timesteps:
        velocity = ref.transformer(
            hidden_states=torch.cat([state, state]),
            timestep=t.expand(2),
            encoder_hidden_states=condition,
            pooled_projections=pooled,
        ).sample
        free, asked = velocity.chunk(2)
        state = scheduler.step(free + guidance * (asked - free), t, state, return_dict=False)[0]
    return state


def draw_flux(ref: Exported, request: PaintRequest, rows: int, columns: int, steps: int, guidance: float) -> Tensor:
    """FluxPipeline's loop, with its true classifier-free guidance beside the embedded one of 2.5."""
    count = rows * columns
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(count, 256, 4096, 0.5, 1.15))
    state = noise(request.number, count)[None]
    ids = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    image_ids = torch.cat([torch.zeros(count, 1), ids.reshape(-1, 2)], dim=1)

    def velocity(t: Tensor, kept: float) -> Tensor:
        condition = ref.condition(request, kept)
        return ref.transformer(
            hidden_states=state,
            timestep=t.expand(1) / 1000,
            guidance=torch.tensor([2.5]),
            pooled_projections=ref.connector["pooled"][None],
            encoder_hidden_states=condition,
            txt_ids=torch.zeros(condition.shape[1], 3),
            img_ids=image_ids,
        ).sample

    for t in scheduler.timesteps:
        free, asked = velocity(t, 0.0), velocity(t, 1.0)
        state = scheduler.step(free + guidance * (asked - free), t, state, return_dict=False)[0]
    return unpatched(state[0], rows, columns)


def noise(number: int, count: int) -> Tensor:
    """What a seed and a number stand for, on every machine: ``[U, F]``."""
    generator = np.random.Generator(np.random.Philox(key=[SEED, number]))
    return torch.from_numpy(generator.standard_normal((count, 16), dtype=np.float32))


def unpatched(patches: Tensor, rows: int, columns: int) -> Tensor:
    """``[U, 4 · 2 · 2]`` to (1, 4, 2 rows, 2 columns)."""
    cut = patches.reshape(rows, columns, 4, 2, 2)
    return cut.permute(2, 0, 3, 1, 4).reshape(1, 4, 2 * rows, 2 * columns)


SD3_SCHEDULE = {"shift": 3.0, "spacing": "sd3", "steps": 6}
FAMILIES = {
    "sd3": ((), draw_sd3, SD3_SCHEDULE),
    "dual": (("generator.mmdit.dual_attention_layers=[0,2]",), draw_sd3, SD3_SCHEDULE),
    # Of 4 or 6 steps, diffusers' shift in float32 rounds the last bit of one timestep otherwise than ours in float64;
    # times 1000, in the network's sines and cosines, it makes 2e-5 of latents.
    "flux": (FLUX, draw_flux, {"shift": "flux", "spacing": "uniform", "steps": 3}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_what_diffusers_draws(family: str, tmp_path: Path) -> None:
    """FlowMatchEulerDiscreteScheduler's loop with classifier-free guidance: latents, and the pictures of them."""
    overrides, draw, schedule = FAMILIES[family]
    checkpoint = make_decoder(tmp_path, PLAIN, *overrides)
    ref = Exported.of(checkpoint, tmp_path / "hf")
    sampler = SamplerConfig.model_validate({"solver": "euler", "guidance_scale": 3.0, **schedule})
    worst, spread = 0.0, []
    with painter_of(checkpoint) as painter, torch.no_grad():
        # Classifier-free guidance leaves sources in neither or both; they are of the next test.
        asked = [replace(request, sources=()) for request in requests()]
        pictures = painter.paint(asked, sampler, SEED)
        for request, drawn in zip(asked, pictures, strict=True):
            rows, columns = (4, 4) if request.grid is SQUARE else (3, 6)
            expected = draw(ref, request, rows, columns, sampler.steps, 3.0)
            found = painter.latents([request], (16 * columns, 16 * rows), sampler, SEED)[0]
            worst = max(worst, float((unpatched(found, rows, columns) - expected).abs().max()))
            spread.append(float(expected.std()))
            decoded = ref.vae.decode(expected / 1.3 + 0.1).sample[0].permute(1, 2, 0)
            wanted = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
            assert drawn.shape == (16 * rows, 16 * columns, 3)
            assert drawn.std() > 20
            assert np.abs(drawn - wanted).max() <= 1
    print(f"{family}: {worst:.1e}")
    assert min(spread) > 0.3
    assert worst <= TOLERANCE


# -- guidance ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoder"), PLAIN)


@pytest.fixture
def decoder(checkpoint: Path) -> Iterator[Painter]:
    """A decoder that takes sources."""
    with painter_of(checkpoint) as painter:
        yield painter


def velocity(painter: Painter, request: PaintRequest, own: float = 1.0, of_sources: float = 1.0) -> Tensor:
    """At t = 1, of a picture whose condition is there or left out: one step of Euler from there leads to ε − v."""
    shown = replace(
        request,
        visual_tokens=own * request.visual_tokens,
        sources=tuple(of_sources * source for source in request.sources),
    )
    return noise(request.number, 16) - latents(painter, [shown], steps=1)[0]


def test_two_conditions(decoder: Painter) -> None:
    """v(∅, ∅) + s_I (v(I, ∅) − v(∅, ∅)) + s_T (v(I, T) − v(I, ∅)), from three velocities worked out apart."""
    plain, _, edit, _, _ = requests()
    nothing, image, both = (velocity(decoder, edit, *kept) for kept in ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    assert min(float((one - other).abs().max()) for one, other in ((nothing, image), (image, both))) > 0.05
    for text_scale, image_scale in ((3.0, 1.5), (3.0, 1.0), (1.0, 2.0), (0.0, 1.0)):
        expected = nothing + image_scale * (image - nothing) + text_scale * (both - image)
        scales = {"guidance_scale": text_scale, "image_guidance_scale": image_scale}
        # Beside it one without a source, for which this is classifier-free guidance of its tokens.
        found = latents(decoder, [edit, plain], steps=1, **scales)
        torch.testing.assert_close(noise(edit.number, 16) - found[0], expected, rtol=0, atol=1e-5)
        without, with_ = velocity(decoder, plain, 0.0), velocity(decoder, plain)
        expected = without + text_scale * (with_ - without)
        torch.testing.assert_close(noise(plain.number, 16) - found[1], expected, rtol=0, atol=1e-5)


def test_renormalised_guidance(decoder: Painter) -> None:
    """A guided velocity is no longer than the conditional one, of each picture by itself."""
    plain = [request for request in requests() if not request.sources and request.grid is SQUARE]
    found = latents(decoder, plain, steps=1, guidance_scale=6.0, guidance_renorm_min=0.0)
    for request, state in zip(plain, found, strict=True):
        without, with_ = velocity(decoder, request, 0.0), velocity(decoder, request)
        guided = without + 6.0 * (with_ - without)
        expected = guided * min(1.0, float(with_.norm() / guided.norm()))
        torch.testing.assert_close(noise(request.number, 16) - state, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "conditions"),
    [
        ({"guidance_scale": 1.0}, [1, 1, 1, 1]),
        ({"guidance_scale": 1.0, "image_guidance_scale": 3.0}, [3, 3, 3, 3]),
        ({"guidance_scale": 2.0}, [3, 3, 3, 3]),
        ({"guidance_scale": 2.0, "guidance_interval": (0.4, 0.8)}, [1, 3, 3, 1]),
        ({"guidance_scale": 2.0, "guidance_interval": (0.5, 1.0)}, [3, 3, 1, 1]),
    ],
)
def test_velocities_that_are_computed(
    decoder: Painter, sampler: dict[str, Any], conditions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At t = 1, 0.75, 0.5, 0.25: nothing that guidance does not need, and without sources no more than two."""
    plain, _, edit, _, _ = requests()
    rows: list[int] = []
    run = Painter.run

    def counted(self: Painter, *inputs: Any) -> Tensor:
        rows.append(len(inputs[2]))
        return run(self, *inputs)

    monkeypatch.setattr(Painter, "run", counted)
    latents(decoder, [edit, plain], steps=4, shift=1.0, **sampler)
    assert rows == [count * 2 * 16 for count in conditions]
    rows.clear()
    latents(decoder, [plain], steps=4, shift=1.0, **sampler)
    without_sources = [2 if count > 1 and sampler["guidance_scale"] != 1 else 1 for count in conditions]
    assert rows == [count * 16 for count in without_sources]


def test_guidance_in_an_interval(decoder: Painter) -> None:
    """Two steps, the first guided and the second not, against the same two steps by hand."""
    plain = requests()[0]
    found = latents(decoder, [plain], steps=2, shift=1.0, guidance_scale=3.0, guidance_interval=(0.6, 1.0))[0]
    without, with_ = velocity(decoder, plain, 0.0), velocity(decoder, plain)
    half = noise(0, 16) - 0.5 * (without + 3.0 * (with_ - without))
    free = latents(decoder, [plain], steps=2, shift=1.0)[0]
    assert (found - free).abs().max() > 0.05

    class Halfway(Exception):
        pass

    states: list[Tensor] = []
    run = decoder.run

    def watched(canvas: Any, condition: Any, state: Tensor, timestep: Tensor) -> Tensor:
        velocity = run(canvas, condition, state, timestep)
        states.append(state - float(timestep[0]) * velocity)
        if float(timestep[0]) == 0.5:
            torch.testing.assert_close(state, half, rtol=0, atol=1e-5)
        return velocity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "run", watched)
        again = latents(decoder, [plain], steps=2, shift=1.0, guidance_scale=3.0, guidance_interval=(0.6, 1.0))[0]
    assert len(states) == 2
    torch.testing.assert_close(again, states[1], rtol=0, atol=1e-6)
    assert torch.equal(again, found)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_what_shares_the_batch(decoder: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = SamplerConfig(solver="dpm++2m", steps=4, guidance_scale=3.0, image_guidance_scale=1.5)
    asked = requests()
    together = decoder.paint(asked, sampler, SEED)
    assert [drawn.shape for drawn in together] == [(64, 64, 3), (48, 96, 3), (64, 64, 3), (48, 96, 3), (64, 64, 3)]
    order = [3, 4, 0, 2, 1]
    shuffled = decoder.paint([asked[place] for place in order], sampler, SEED)
    alone = [decoder.paint([request], sampler, SEED)[0] for request in asked]
    monkeypatch.setattr(paint, "PICTURES_AT_A_TIME", 2)
    in_parts = decoder.paint(asked, sampler, SEED)
    for place, drawn in enumerate(together):
        assert drawn.std() > 20
        for other in (shuffled[order.index(place)], alone[place], in_parts[place]):
            assert difference(drawn, other) <= 1
    assert decoder.paint([], sampler) == []


def test_pictures_depend_on_seed_number_tokens_and_sources(decoder: Painter) -> None:
    _, _, edit, _, _ = requests()
    first = decoder.paint([edit], seed=0)[0]
    assert np.array_equal(decoder.paint([edit], seed=0)[0], first)
    others = [
        decoder.paint([edit], seed=1)[0],
        *decoder.paint([replace(edit, number=9), replace(edit, visual_tokens=tokens(9)), replace(edit, sources=())]),
    ]
    assert all(difference(first, other) > 5 for other in others)
    assert difference(others[0], others[1]) > 5


def test_the_recipe_s_sampler_is_taken_unless_told_otherwise(decoder: Painter) -> None:
    request = requests()[0]
    recipe = decoder.config.sampler
    assert recipe == decoder.stage.method.sampler != SamplerConfig()
    drawn = decoder.paint([request])[0]
    assert np.array_equal(drawn, decoder.paint([request], recipe)[0])
    assert difference(drawn, decoder.paint([request], SamplerConfig(steps=2))[0]) > 5


def test_a_decoder_without_sources_does_not_look_at_them(tmp_path: Path) -> None:
    checkpoint = make_decoder(tmp_path, PLAIN, "stages.decoder.method.connector.sources=false")
    edit = requests()[2]
    with painter_of(checkpoint) as painter:
        assert not painter.takes_sources
        with_, without = (painter.paint([each])[0] for each in (edit, replace(edit, sources=())))
    assert np.array_equal(with_, without)
