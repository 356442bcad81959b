"""SPAR's alignment on one rank: who learns, what the balance is, what monitoring sees, and text without the mixture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_mmcore import SMALL, make_rows, make_samples

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.methods.spar.alignment.footprint import AlignmentFootprints
from megatron_unimm.methods.spar.alignment.method import SparAlignment
from megatron_unimm.methods.spar.alignment.model import SparVlm
from megatron_unimm.models.attention import PackedContext, Segments
from megatron_unimm.models.memory import Spread
from megatron_unimm.models.trainable import apply_rules
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.plan.pipeline import places
from megatron_unimm.train.callbacks.routing_maps import CELL, routing_map

World = tuple[Platform, ParallelGroups]
CPU = torch.device("cpu")


def small(repo: Path, *overrides: str) -> StageConfig:
    """The stage of the Shapes recipe with a two-layer model, which the tokenizer's stages must fit as well."""
    recipe = load_recipe(
        repo / "configs/spar/shapes.yaml",
        [
            *(setting for setting in SMALL if not setting.startswith("train.")),
            "tokenizer.pixel.encoder_layers=[0]",
            "stages.alignment.data.sequence_length=128",
            *(f"stages.alignment.{each}" for each in overrides),
        ],
    )
    return recipe.stages["alignment"]


def build(stage: StageConfig, world: World) -> tuple[SparAlignment, SparVlm]:
    method = SparAlignment(stage, *world)
    model = method.build(0).float()
    generator = torch.Generator().manual_seed(1)
    # Routers last, so that the others are the same with and without them.
    for name, parameter in sorted(model.named_parameters(), key=lambda each: "layer_router" in each[0]):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator) + ("norm" in name)
    apply_rules([model], stage.train.trainable)
    return method, model


def test_routers_queries_and_connector_learn(repo: Path, world: World) -> None:
    stage = small(repo, "routing={top_k: 1}")
    method, model = build(stage, world)
    (row,) = make_rows(make_samples(stage)[1:2], stage)
    seen: list[torch.Tensor] = []
    model.routing_observer = seen.append
    sums = model(method.batch(row, model, CPU))
    (weights,) = seen
    assert weights.shape == (6, 2), "of the queries of one picture, over two layers"
    assert torch.equal(weights.sort(1).values, torch.tensor([[0.0, 1.0]]).expand(6, 2))
    assert method.counts([row])[1:] == [6, 1], "queries, pictures"
    # Switch's balance, by its definition, of logits that a second pass gives.
    batch = method.batch(row, model, CPU)
    _, mixture = model.backbone.mixture(model.student(model.enter(batch), batch.context))
    share, mean = weights.mean(0), mixture.logits[batch.queries.index].softmax(1).mean(0)
    assert sums[2].item() == pytest.approx(2 * (share * mean).sum().item(), rel=1e-5)
    (sums @ torch.tensor([0.0, 1.0, 1.0])).backward()
    learned = {name for name, each in model.named_parameters() if each.grad is not None and each.grad.any()}
    assert {name.split(".")[0] for name in learned} == {"query_tokens", "query_connector", "backbone"}
    assert {name for name in learned if name.startswith("backbone")} == {
        f"backbone.decoder.layers.{layer}.layer_router.{part}" for layer in range(2) for part in ("weight", "bias")
    }


def test_text_is_that_of_a_model_without_routing(repo: Path, world: World) -> None:
    found = []
    for routing in ("{mode: dynamic}", "{top_k: 2, layers: [0, 1]}", "null"):
        _, model = build(small(repo, f"routing={routing}"), world)
        ids = torch.arange(12)
        context = PackedContext(segments={"full": Segments.build(np.array([0, 12]), causal=True, device=CPU)})
        with torch.no_grad():
            found.append(model.advance(model.embed_tokens(ids, None, None), context))
    assert found[0].shape == (12, 1, 64)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize("routing", ["{mode: dynamic}", "{mode: static, layers: [1]}", "null"])
def test_planned_weights_are_those_of_the_model(repo: Path, world: World, routing: str) -> None:
    trainable = "train.trainable=[{pattern: '*'}]" if routing == "null" else "train.steps=5"
    stage = small(repo, f"routing={routing}", trainable)
    _, model = build(stage, world)
    footprints = AlignmentFootprints()
    row = footprints.typical_row(stage, pixels=False)
    ((place,),) = places(stage)
    found = footprints.chunk(stage, Spread.of(stage.system, fused=False), place, row)
    assert found.trained.total == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert (found.trained + found.frozen).total == sum(each.numel() for each in model.parameters())


def test_routing_map() -> None:
    """A row for each layer, the first at the bottom, black where the weight is 1."""
    drawn = routing_map(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=np.float32))
    assert drawn.shape == (2 * CELL, 3 * CELL, 3)
    assert drawn[::CELL, ::CELL, 0].tolist() == [[255, 128, 0], [0, 128, 255]]
