"""Ming-Lite-Omni against a reference written from its published facts: logits at every layout, which expert each token
of which modality goes to, gradients of the gates, and a round trip that loses nothing."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from layout_worker import sample_fields, stage_of
from ming_reference import Ming, Mixture
from safetensors.torch import load_file, save_file
from test_families import GRIDS, IMAGE, TOLERANCE, assert_same_folder, make_sample, start_workers
from torch import Tensor

from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert import export_checkpoint, import_checkpoint, verify
from megatron_unimm.convert.ming import MING_LITE_OMNI, carried, to_hf_config, to_model_config
from megatron_unimm.data.packing import build_row
from megatron_unimm.data.sample import TokenizedSample
from megatron_unimm.errors import CheckpointError
from megatron_unimm.generate.cache import SequenceCache
from megatron_unimm.generate.checkpoint import no_training
from megatron_unimm.generate.staged import StagedModel, Step, decoding_mode
from megatron_unimm.models.gates import ModalityRouter, modality_mask
from megatron_unimm.models.vision import VisionInput
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.state import load_weights

LLM: dict[str, Any] = {
    "architectures": ["BailingMoeForCausalLM"],
    "eos_token_id": 81,
    "first_k_dense_replace": 0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "image_patch_token": IMAGE,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 24,
    "multi_gate": True,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_shared_experts": 2,
    "pad_token_id": 81,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 600000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_sliding_window": False,
    "vocab_size": 96,
}
VISION = {
    "depth": 4,
    "fullatt_block_indexes": [1, 3],
    "hidden_act": "silu",
    "hidden_size": 32,
    "in_channels": 3,
    "intermediate_size": 20,
    "model_type": "qwen2_5_vit",
    "num_heads": 2,
    "out_hidden_size": 40,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
}
PREVIEW = {
    "rope_scaling": {"type": "3D", "factor": None, "mrope_section": [2, 3, 3]},
    "norm_head": True,
    "first_k_dense_replace": 1,
}
"""Rotary positions and output layer of the preview; a dense layer, which the published code provides for."""
VARIANTS: dict[str, dict[str, Any]] = {"released": {}, "preview": PREVIEW}
EP2_TP2 = {"expert": 2, "tensor": 2, "sequence": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "ep2_tp2": (4, EP2_TP2),
}


def hf_config(variant: str) -> dict[str, Any]:
    return {
        "architectures": ["BailingMMNativeForConditionalGeneration"],
        "model_type": "bailingmm",
        "mlp_depth": 2,
        "torch_dtype": "float32",
        "audio_config": {"norm_query_embeds": True},
        "llm_config": LLM | VARIANTS[variant],
        "vision_config": VISION,
    }


def random_model(variant: str) -> Ming:
    """Weights of such a size that logits are of order 1 and no part is without influence."""
    torch.manual_seed(0)
    model = Ming(hf_config(variant)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data = torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5
        else:
            parameter.data = torch.randn_like(parameter) * 0.5
    return model


def write_folder(model: Ming, config: dict[str, Any], folder: Path) -> None:
    """As it is published: safetensors files with an index."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    half = len(tensors) // 2
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {name: names[place >= half] for place, name in enumerate(tensors)}
    for file in names:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VARIANT/hf, its checkpoint, and VARIANT/LAYOUT.npy; in bf16 hf_bf16, checkpoint_bf16, and that saved from 4
    ranks."""
    root = tmp_path_factory.mktemp("ming")
    tasks: list[tuple[int, dict[str, Any]]] = []
    for variant in VARIANTS:
        folder, config = root / variant, hf_config(variant)
        model = random_model(variant)
        write_folder(model, config, folder / "hf")
        sample = make_sample(14)
        np.savez(folder / "sample.npz", **sample)
        import_checkpoint(folder / "hf", folder / "checkpoint")
        length = -(-len(sample["input_ids"]) // 8) * 8
        for name, (ranks, parallel) in LAYOUTS.items():
            task = {"checkpoint": str(folder / "checkpoint"), "parallel": parallel, "to": str(folder / f"{name}.npy")}
            tasks.append((ranks, {**task, "row": str(folder / "sample.npz"), "length": length}))
        as_bf16 = config | {"torch_dtype": "bfloat16"}
        write_folder(model.to(torch.bfloat16), as_bf16, folder / "hf_bf16")
        import_checkpoint(folder / "hf_bf16", folder / "checkpoint_bf16")
        again = {"checkpoint": str(folder / "checkpoint_bf16"), "to": str(folder / "again"), "dtype": "bfloat16"}
        tasks.append((4, {**again, "parallel": {"pipeline": 2, "expert": 2}}))
    start_workers(tasks)
    return root


def reference_inputs() -> tuple[Tensor, Tensor, Tensor]:
    sample = make_sample(14)
    return torch.from_numpy(sample["input_ids"]), torch.from_numpy(sample["patches"]), torch.from_numpy(GRIDS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_reference(variant: str, layout: str, results: Path) -> None:
    with torch.no_grad():
        reference = random_model(variant)(*reference_inputs()).numpy()
    found = np.load(results / variant / f"{layout}.npy")
    assert 0.5 < reference.std() < 5
    worst = float(np.abs(found - reference).max())
    print(f"{variant:10} {layout:10} {worst:.1e}")
    assert worst <= TOLERANCE


# ---------------------------------------------------------------------------------------------- gates


@contextmanager
def on_one_rank(results: Path, variant: str, trains: bool = False) -> Iterator[tuple[Any, Any]]:
    """The chunk with its weights, and the method."""
    stage = stage_of({"checkpoint": str(results / variant / "checkpoint"), "parallel": {}, "length": 56})
    stage.train = no_training(1, trains=trains)
    platform, groups = setup.enter(stage)
    try:
        method, (chunk,) = setup.build_model(stage, platform, groups)
        load_weights([chunk], results / variant / "checkpoint", groups)
        yield chunk, method
    finally:
        destroy_groups()


def batch_of(chunk: Any, method: Any, results: Path, num_text: int | None = None) -> Any:
    """The sample, or so many tokens of its beginning, which are text."""
    fields = sample_fields(results / "released" / "sample.npz")
    if num_text is not None:
        fields |= {name: fields[name][:num_text] for name in ("input_ids", "labels")}
        fields |= {name: fields[name][:0] for name in ("patches", "grids", "is_target", "visual_index")}
        fields["position_ids"] = fields["position_ids"][:, :num_text]
    row = build_row([TokenizedSample(**fields)], sequence_length=56, alignment=1, pad_id=0, patch_dim=1176)
    return method.batch(row, chunk, torch.device("cpu"))


def routers_of(chunk: Any) -> list[ModalityRouter]:
    return [module for module in chunk.backbone.modules() if isinstance(module, ModalityRouter)]


def mixtures_of(model: Ming) -> list[Mixture]:
    return [module for module in model.modules() if isinstance(module, Mixture)]


def test_every_token_goes_to_the_experts_of_its_modality(results: Path) -> None:
    """Token by token and layer by layer; and the two gates do not agree, or this would show nothing."""
    reference, inputs = random_model("preview"), reference_inputs()
    routing: list[Tensor] = []
    with on_one_rank(results, "preview") as (chunk, method), torch.no_grad():
        for router in routers_of(chunk):
            router.register_forward_hook(lambda _, __, output: routing.append(output[1]))
        chunk(batch_of(chunk, method, results))
        reference(*inputs)
    expected = [torch.tensor(mixture.chosen) for mixture in mixtures_of(reference)]
    assert len(routing) == len(expected) == 3
    for found, wanted in zip(routing, expected, strict=True):
        assert torch.equal(found[: len(wanted)].nonzero()[:, 1].view(-1, 3), wanted)
    for mixture in mixtures_of(reference):
        mixture.image_gate = mixture.gate
    with torch.no_grad():
        reference(*inputs)
    is_image = inputs[0] == IMAGE
    others = torch.tensor(mixtures_of(reference)[0].chosen)
    assert torch.equal(others[~is_image], expected[0][~is_image])
    assert (others[is_image] != expected[0][is_image]).any(dim=1).float().mean() > 0.5


def test_swapped_gates_show(results: Path) -> None:
    """Ours and the reference change alike when the gates of text and images change places."""
    reference, inputs = random_model("released"), reference_inputs()
    seen: list[Tensor] = []
    with on_one_rank(results, "released") as (chunk, method), torch.no_grad():
        chunk.text_observer = lambda logits: seen.append(logits.clone())
        batch = batch_of(chunk, method, results)
        chunk(batch)
        for router in routers_of(chunk):
            text = router.weight.data
            router.weight.data, router.image_weight.data = router.image_weight.data, text
        chunk(batch)
        for mixture in mixtures_of(reference):
            mixture.gate, mixture.image_gate = mixture.image_gate, mixture.gate
        expected = reference(*inputs)
    assert (seen[0] - seen[1]).abs().max() > 0.1
    torch.testing.assert_close(seen[1], expected, rtol=0, atol=TOLERANCE)


def test_gates_learn_from_their_own_modality_alone(results: Path) -> None:
    """Gradients of all gates against the reference's; zero, not absent, where no token was a gate's own."""
    reference = random_model("preview")
    labels = torch.zeros(len(reference_inputs()[0]), dtype=torch.int64)
    torch.nn.functional.cross_entropy(reference(*reference_inputs()), labels, reduction="sum").backward()
    with on_one_rank(results, "preview", trains=True) as (chunk, method):
        chunk.train()
        chunk(batch_of(chunk, method, results))[0].backward()
        worst = 0.0
        for router, mixture in zip(routers_of(chunk), mixtures_of(reference), strict=True):
            for weight, gate in ((router.weight, mixture.gate), (router.image_weight, mixture.image_gate)):
                wanted = gate.weight.grad
                assert wanted is not None
                assert wanted.norm() > 1e-3
                worst = max(worst, ((weight.grad - wanted).norm() / wanted.norm()).item())
            assert mixture.audio_gate.weight.grad is None
            assert torch.equal(router.audio_weight.grad, torch.zeros_like(router.weight))
        print(f"gradients of gates: {worst:.1e}")
        assert worst < 1e-4
        chunk.zero_grad()
        chunk(batch_of(chunk, method, results, num_text=5))[0].backward()
        for router in routers_of(chunk):
            assert router.weight.grad.norm() > 1e-3
            assert torch.equal(router.image_weight.grad, torch.zeros_like(router.weight))


def test_a_gate_for_audio(results: Path) -> None:
    """Data has none yet, but the router knows it: text, image and audio among one another."""
    with on_one_rank(results, "released") as (chunk, _), torch.no_grad():
        router = routers_of(chunk)[0]
        hidden = torch.randn(9, 1, 64, generator=torch.Generator().manual_seed(0))
        kinds = torch.tensor([0, 1, 2, 2, 0, 1, 1, 0, 2])
        mask = torch.stack([kinds == 1, kinds == 2], dim=1)
        probabilities, routing = router(hidden, mask)
        gates = [router.weight, router.image_weight, router.audio_weight]
        scores = torch.stack([hidden[i, 0] @ gates[int(kind)].T for i, kind in enumerate(kinds)]).softmax(dim=-1)
        best, which = scores.topk(3)
        wanted = torch.zeros_like(scores).scatter(1, which, best / best.sum(dim=1, keepdim=True))
        assert torch.equal(routing, wanted > 0)
        torch.testing.assert_close(probabilities, wanted)


def test_visual_tokens_and_queries_are_an_images() -> None:
    """What stands between the marks of an image, read or drawn; the marks are text, as in the published code."""
    ids = torch.tensor([5, IMAGE + 1, IMAGE, IMAGE, IMAGE + 2, 7])
    mask = modality_mask(ids, to_model_config(hf_config("released")))
    assert mask is not None
    assert mask.int().tolist() == [[0, 0, 1, 1, 0, 0], [0] * 6]


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_gives_the_same(variant: str, results: Path) -> None:
    """Two prompts' worth of tokens, then one by one, through the cache: logits, positions and gates go on."""
    fields = sample_fields(results / variant / "sample.npz")
    visual, expected = fields["visual_index"], np.load(results / variant / "one.npy")
    steps = list(pairwise([0, 20, 40, *range(41, len(expected) + 1)]))
    with on_one_rank(results, variant) as (chunk, _), decoding_mode([chunk]):
        cpu = torch.device("cpu")
        encoder = chunk.stage.model.vision_encoder
        features = chunk.see(VisionInput.build(fields["patches"], fields["grids"], encoder, cpu, torch.float32))
        staged = StagedModel([chunk], chunk.stage.model, chunk.groups, cpu, torch.float32)
        cache = SequenceCache(1, len(expected), cpu)
        for start, stop in steps:
            inside = (visual >= start) & (visual < stop)
            positions = fields["position_ids"][:, start:stop]
            step = Step([stop - start], fields["input_ids"][start:stop], positions, visual[inside] - start)
            hidden = staged.run(step, features[torch.from_numpy(inside)] if inside.any() else None, cache)
            assert hidden is not None
            found = staged.logits(hidden)[0].numpy()
            np.testing.assert_allclose(found, expected[stop - 1], rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, results: Path, tmp_path: Path) -> None:
    """Straight back with the audio encoders; after loading and saving at PP2 x EP2 without what is not built."""
    folder = results / variant
    export_checkpoint(folder / "checkpoint_bf16", tmp_path / "back")
    assert_same_folder(folder / "hf_bf16", tmp_path / "back")
    export_checkpoint(folder / "again", tmp_path / "again")
    original = {k: v for file in (folder / "hf_bf16").glob("*.safetensors") for k, v in load_file(file).items()}
    expected = {name: tensor for name, tensor in original.items() if not carried(name)}
    assert 0 < len(expected) < len(original)
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    differences = verify(folder / "checkpoint_bf16", folder / "again").differences
    assert len(differences) == len(original) - len(expected)
    assert all(line.startswith("carried.") for line in differences)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((folder / "hf_bf16" / "config.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_is_read_and_written(variant: str) -> None:
    model = to_model_config(hf_config(variant))
    moe = model.backbone.moe
    assert moe is not None
    assert (moe.gates, moe.shared_expert_size, moe.first_layer) == (["image", "audio"], 48, int(variant == "preview"))
    assert (model.backbone.norm_epsilon, model.backbone.rope_theta) == (1e-5, 6e5)
    assert model.backbone.normalize_output == (variant == "preview")
    assert (model.token_ids.image_pad, model.token_ids.vision_start, model.token_ids.vision_end) == (90, 91, 92)
    assert to_model_config(to_hf_config(model)) == model
    written = to_hf_config(model)["llm_config"]
    known = {name: value for name, value in (LLM | VARIANTS[variant]).items() if name in written}
    assert len(known) > 25
    assert {name: written[name] for name in known} == known


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("llm_config", "rope_scaling", {"type": "video_rope", "factor": None}, "rope type 'video_rope' is not built"),
        ("llm_config", "norm_topk_prob", False, "llm_config.norm_topk_prob is False"),
        ("llm_config", "use_bias", True, "llm_config.use_bias is True"),
        (None, "mlp_depth", 3, "mlp_depth is 3; only 2, as published, is built"),
        ("llm_config", "first_k_dense_replace", 4, "no layer would have experts"),
        ("llm_config", "num_experts", None, "num_experts"),
    ],
)
def test_what_is_not_built_is_refused(section: str | None, field: str, value: object, message: str) -> None:
    config = copy.deepcopy(hf_config("released"))
    (config if section is None else config[section])[field] = value
    with pytest.raises(CheckpointError, match=message):
        to_model_config(config)


PUBLISHED = {
    "head_dim": 128,
    "hidden_size": 2048,
    "image_patch_token": 126346,
    "intermediate_size": 5632,
    "max_position_embeddings": 32768,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "vocab_size": 126464,
}
"""Of ``llm_config`` in the config.json of 1.0; the other values are as above."""
PUBLISHED_VISION = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_size": 1280} | {
    "intermediate_size": 3456,
    "num_heads": 16,
    "out_hidden_size": 8192,
}


def test_the_model_file(repo: Path) -> None:
    """configs/models/ming_lite_omni.yaml is the published model: its config, and every tensor of the reference."""
    config = hf_config("released")
    config |= {"llm_config": LLM | PUBLISHED, "vision_config": VISION | PUBLISHED_VISION}
    text = (repo / "configs/models/ming_lite_omni.yaml").read_text()
    model = ModelConfig.model_validate(yaml.safe_load(text)["model"])
    assert to_model_config(config) == model
    mappings = MING_LITE_OMNI.mappings(model, "hub")
    ours = {name: shape for m in mappings for name, shape in zip(m.names, m.shapes, strict=True)}
    with torch.device("meta"):
        reference = Ming(config)
    theirs = {name: tuple(each.shape) for name, each in reference.named_parameters() if not carried(name)}
    assert ours == theirs
    assert sum(torch.Size(shape).numel() for shape in ours.values()) / 1e9 == pytest.approx(BILLIONS, abs=5e-4)


BILLIONS = 17.535
