"""Qwen2.5-VL between Hugging Face and Megatron: exact both ways, complete at full size, refuses what is not whole."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_unimm.checkpoint import store, torch_dist
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.cli.main import run
from megatron_unimm.config.model import MoEConfig, VisionHeadConfig
from megatron_unimm.convert import export, export_checkpoint, import_checkpoint, inspect_path, reader, verify
from megatron_unimm.convert.qwen2_5_vl import QWEN2_5_VL, hub_name, to_hf_config, to_model_config
from megatron_unimm.convert.transforms import (
    ChannelsFirst,
    ChannelsFirstOutput,
    ConvToLinear,
    Copy,
    FusedQkv,
    GateUp,
    QkvInterleave,
    Squeeze,
    Transform,
    Transpose,
)
from megatron_unimm.errors import CheckpointError

# config.json of Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct, as on the hub, without values that concern sampling.
HUB_7B: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
HUB_3B: dict[str, Any] = {
    **HUB_7B,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "vision_config": {**HUB_7B["vision_config"], "out_hidden_size": 2048},
}
TINY_TENSORS = 42 + 14 + 1
"""Hugging Face tensors of the tiny model below: Megatron fuses 14 of them into others; plus its output layer."""


def tiny_config(*, tied: bool) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied, image_token_id=90, vision_start_token_id=91
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models as transformers saves them, with some files beside the weights."""
    folders = {}
    for name in ("untied", "tied"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config(tied=name == "tied")).to(torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 92, "content": "<|im_start|>"}]}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "modeling_odd.py").write_text("raise SystemExit")
        folders[name] = folder
    return folders


@pytest.fixture
def hf(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the untied model that a test may spoil."""
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in models["untied"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def newer_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers' modules in place of the hub's."""

    def rename(name: str) -> str:
        if name.startswith("visual."):
            return "model." + name
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    return {rename(name): tensor for name, tensor in tensors.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


# ---------------------------------------------------------------------------------------------- transforms


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (Copy(), [(3, 4)]),
        (QkvInterleave(num_heads=6, num_kv_heads=2, head_size=3), [(18, 5), (6, 5), (6, 5)]),
        (QkvInterleave(num_heads=6, num_kv_heads=2, head_size=3), [(18,), (6,), (6,)]),
        (FusedQkv(QkvInterleave(2, 2, 3)), [(18, 5)]),
        (FusedQkv(QkvInterleave(2, 2, 3)), [(18,)]),
        (FusedQkv(QkvInterleave(6, 2, 3)), [(30, 5)]),
        (GateUp(), [(4, 3), (4, 3)]),
        (ConvToLinear(kernel=(3, 2, 4, 4)), [(5, 3, 2, 4, 4)]),
        (Transpose(), [(4, 3)]),
        (ChannelsFirst(channels=3), [(5, 12)]),
        (ChannelsFirstOutput(channels=3), [(12, 5)]),
        (ChannelsFirstOutput(channels=3), [(12,)]),
        (Squeeze(), [(1, 4, 3)]),
    ],
)
def test_transforms_are_exact_both_ways(transform: Transform, shapes: list[tuple[int, ...]]) -> None:
    sources = [torch.randn(shape).bfloat16() for shape in shapes]
    fused = transform.forward(*sources)
    assert tuple(fused.shape) == transform.shape(shapes)
    back = transform.inverse(fused)
    assert len(back) == len(sources)
    for one, other in zip(back, sources, strict=True):
        assert torch.equal(one, other)


def test_layouts_against_their_definition() -> None:
    # Rows are numbered so that each shows where it came from: 100 q, 200 k, 300 v, plus the row's number.
    q, k, v = 100 + torch.arange(8), 200 + torch.arange(4), 300 + torch.arange(4)
    grouped = [100, 101, 102, 103, 200, 201, 300, 301, 104, 105, 106, 107, 202, 203, 302, 303]
    assert QkvInterleave(num_heads=4, num_kv_heads=2, head_size=2).forward(q, k, v).tolist() == grouped
    per_head = [100, 101, 200, 201, 300, 301, 102, 103, 202, 203, 302, 303]
    assert FusedQkv(QkvInterleave(2, 2, 2)).forward(torch.cat([q[:4], k, v])).tolist() == per_head
    assert FusedQkv(QkvInterleave(4, 2, 2)).forward(torch.cat([q, k, v])).tolist() == grouped
    assert GateUp().forward(torch.tensor([1, 2]), torch.tensor([3, 4])).tolist() == [1, 2, 3, 4]
    conv, patches = torch.randn(4, 3, 2, 2, 2).double(), torch.randn(5, 3, 2, 2, 2).double()
    linear = ConvToLinear(kernel=(3, 2, 2, 2)).forward(conv)
    expected = torch.nn.functional.conv3d(patches, conv, stride=2).flatten(1)
    torch.testing.assert_close(patches.flatten(1) @ linear.T, expected)


# ---------------------------------------------------------------------------------------------- the table at full size


@pytest.mark.parametrize("config", [HUB_7B, HUB_3B], ids=["7b", "3b"])
def test_the_table_is_the_published_model(config: dict[str, Any]) -> None:
    model = to_model_config(config)
    hf_config = Qwen2_5_VLConfig(**config)
    with torch.device("meta"):
        reference = Qwen2_5_VLForConditionalGeneration(hf_config)
    shapes = {hub_name(name): tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    mappings = QWEN2_5_VL.mappings(model, "hub")
    assert {name: shape for m in mappings for name, shape in zip(m.names, m.shapes, strict=True)} == shapes
    # 28 · 12 + 3 and 32 · 14 + 6; the 3B ties its output layer.
    assert len(shapes) == {28: 729, 36: 824}[model.backbone.num_layers]
    assert to_model_config(to_hf_config(model)) == model
    assert to_model_config(hf_config.to_dict()) == model.model_copy(), "hub form and transformers 5's form agree"


def test_values_of_the_7b() -> None:
    model = to_model_config(HUB_7B)
    assert (model.backbone.head_size, model.backbone.mrope_sections, model.backbone.vocab_size) == (
        128,
        [16, 24, 24],
        152064,
    )
    assert (model.vision_encoder.token_pixels, model.vision_encoder.full_attention_layers) == (28, [7, 15, 23, 31])
    assert not model.backbone.tie_embeddings
    assert to_model_config(HUB_3B).backbone.tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {}}, "quantized"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, "rope type 'yarn'"),
        ({"rope_scaling": None}, "has no 'mrope_section'"),
        ({"vision_config": {}}, "has no 'depth'"),
        ({"num_key_value_heads": 5}, "not a multiple of num_kv_heads 5"),
    ],
)
def test_configs_that_cannot_be_built(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        to_model_config({**HUB_7B, **change})


def test_a_model_of_ours_that_is_no_qwen2_5_vl() -> None:
    model = to_model_config(HUB_7B)
    model.backbone.moe = MoEConfig(num_experts=4, top_k=2, expert_mlp_size=8)
    with pytest.raises(CheckpointError, match="has a mixture of experts"):
        QWEN2_5_VL.rows(model)


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_round_trip(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    source, checkpoint, target = models[kind], tmp_path / "checkpoint", tmp_path / "exported"
    import_checkpoint(source, checkpoint)
    export_checkpoint(checkpoint, target)
    assert_same(weights(source), weights(target))
    assert len(weights(target)) == TINY_TENSORS - (kind == "tied")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "modeling_odd.py").exists()
    assert not (tmp_path / "exported.tmp").exists()
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(target)
    assert_same({hub_name(n): p.data for n, p in loaded.named_parameters()}, weights(source))
    meta = store.read_meta(checkpoint)
    assert meta["architecture"]["token_ids"]["im_start"] == 92
    assert meta["architecture"]["token_ids"]["image_pad"] == 90
    assert (meta["family"], meta["architecture"]["backbone"]["tie_embeddings"]) == ("qwen2_5_vl", kind == "tied")


def test_megatron_names_and_layouts(models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models["untied"], tmp_path / "c")
    hf_weights = weights(models["untied"])
    with Reader(tmp_path / "c") as checkpoint:
        shapes = {key.replace(".1.", ".{i}."): list(entry.shape) for key, entry in checkpoint.tensors.items()}
        fc1 = checkpoint.read("backbone.decoder.layers.1.mlp.linear_fc1.weight")
        qkv = checkpoint.read("backbone.decoder.layers.1.self_attention.linear_qkv.weight")
    layer, block = "backbone.decoder.layers.{i}", "vision_encoder.blocks.layers.{i}"
    assert {key: shape for key, shape in shapes.items() if ".0." not in key} == {
        "vision_encoder.patch_embed.weight": [32, 3 * 2 * 14 * 14],
        f"{block}.self_attention.linear_qkv.layer_norm_weight": [32],
        f"{block}.self_attention.linear_qkv.weight": [96, 32],
        f"{block}.self_attention.linear_qkv.bias": [96],
        f"{block}.self_attention.linear_proj.weight": [32, 32],
        f"{block}.self_attention.linear_proj.bias": [32],
        f"{block}.mlp.linear_fc1.layer_norm_weight": [32],
        f"{block}.mlp.linear_fc1.weight": [40, 32],
        f"{block}.mlp.linear_fc1.bias": [40],
        f"{block}.mlp.linear_fc2.weight": [32, 20],
        f"{block}.mlp.linear_fc2.bias": [32],
        "vision_encoder.merger.norm.weight": [32],
        "vision_encoder.merger.linear_fc1.weight": [128, 128],
        "vision_encoder.merger.linear_fc1.bias": [128],
        "vision_encoder.merger.linear_fc2.weight": [64, 128],
        "vision_encoder.merger.linear_fc2.bias": [64],
        "backbone.embedding.word_embeddings.weight": [96, 64],
        f"{layer}.self_attention.linear_qkv.layer_norm_weight": [64],
        f"{layer}.self_attention.linear_qkv.weight": [(4 + 2 + 2) * 16, 64],
        f"{layer}.self_attention.linear_qkv.bias": [(4 + 2 + 2) * 16],
        f"{layer}.self_attention.linear_proj.weight": [64, 64],
        f"{layer}.mlp.linear_fc1.layer_norm_weight": [64],
        f"{layer}.mlp.linear_fc1.weight": [80, 64],
        f"{layer}.mlp.linear_fc2.weight": [64, 40],
        "backbone.decoder.final_layernorm.weight": [64],
        "backbone.output_layer.weight": [96, 64],
    }
    assert torch.equal(fc1[:40], hf_weights["model.layers.1.mlp.gate_proj.weight"])
    second_key_head = hf_weights["model.layers.1.self_attn.k_proj.weight"][16:32]
    assert torch.equal(qkv[(4 + 2) * 16 : (4 + 3) * 16], second_key_head)


def test_newer_names_and_several_files(hf: Path, models: dict[str, Path], tmp_path: Path) -> None:
    tensors = newer_names(weights(hf))
    (hf / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, hf / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in files.items() for name in members}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    import_checkpoint(hf, tmp_path / "c")
    export_checkpoint(tmp_path / "c", tmp_path / "exported")
    assert_same(weights(models["untied"]), weights(tmp_path / "exported"))
    assert not (tmp_path / "c" / "hf" / "model.safetensors.index.json").exists()


def test_exports_several_files_with_an_index(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 60_000)
    import_checkpoint(models["untied"], tmp_path / "c")
    export_checkpoint(tmp_path / "c", tmp_path / "exported")
    index = json.loads((tmp_path / "exported" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "exported").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert_same(weights(models["untied"]), weights(tmp_path / "exported"))
    assert verify(models["untied"], tmp_path / "exported").identical


def test_training_checkpoint_with_optimizer_and_vision_head(models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models["untied"], tmp_path / "base")
    head = {"linear_fc1.weight": torch.randn(8, 4), "linear_fc1.bias": torch.randn(8)}
    with Reader(tmp_path / "base") as base:
        state = {key: ShardedTensor.from_rank_offsets(key, base.read(key).float()) for key in base.tensors}
    state |= {key: ShardedTensor.from_rank_offsets(f"vision_head.{key}", value) for key, value in head.items()}
    state["m"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.vision_head.linear_fc1.bias", torch.randn(8))
    meta = {**store.read_meta(tmp_path / "base"), "vision_head": VisionHeadConfig().model_dump(), "step": 5}
    trained = store.save(state, tmp_path / "step_00000005", meta, hf_files=tmp_path / "base" / "hf").wait()

    export_checkpoint(trained, tmp_path / "exported")
    assert_same(weights(tmp_path / "exported" / "vision_head"), head)
    assert json.loads((tmp_path / "exported" / "vision_head" / "config.json").read_text())["kind"] == "mlp"
    assert "Vision head" in (tmp_path / "exported" / "vision_head" / "README.md").read_text()
    assert_same(
        {name: tensor.float() for name, tensor in weights(models["untied"]).items()}, weights(tmp_path / "exported")
    )
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["dtype"] == "float32"
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert loaded.dtype == torch.float32

    import_checkpoint(tmp_path / "exported", tmp_path / "again")
    assert store.read_meta(tmp_path / "again")["vision_head"] == VisionHeadConfig().model_dump()
    for pair in ((trained, tmp_path / "again"), (tmp_path / "exported", trained)):
        assert verify(*pair).identical


def test_a_checkpoint_without_hugging_face_files_gets_a_config(models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models["untied"], tmp_path / "base")
    with Reader(tmp_path / "base") as base:
        state = {key: ShardedTensor.from_rank_offsets(key, base.read(key)) for key in base.tensors}
    store.save(state, tmp_path / "c", store.read_meta(tmp_path / "base")).wait()
    export_checkpoint(tmp_path / "c", tmp_path / "exported")
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert_same({hub_name(n): p.data for n, p in loaded.named_parameters()}, weights(models["untied"]))


def test_one_tensor_at_a_time(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most: list[int] = []
    built: list[int] = []
    read, write_piece = reader.HfFolder.read, torch_dist._write_piece

    def counted_read(folder: reader.HfFolder, name: str, number: int | None = None) -> Tensor:
        tensor = read(folder, name, number)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most.append(len(alive))
        return tensor

    def counted_write(*arguments: Any) -> Any:
        built.append(len(alive))
        return write_piece(*arguments)

    monkeypatch.setattr(reader.HfFolder, "read", counted_read)
    monkeypatch.setattr(torch_dist, "_write_piece", counted_write)
    import_checkpoint(models["untied"], tmp_path / "c")
    assert len(most) == TINY_TENSORS
    assert max(most) == 3, "q, k and v of one layer"
    assert max(built) <= 1, "all but the last are gone before the next is begun"


# ---------------------------------------------------------------------------------------------- refusals


def import_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(folder, folder.parent / "refused")
    assert not (folder.parent / "refused").exists()
    return str(caught.value)


def test_missing_left_over_and_misshapen_tensors(hf: Path) -> None:
    good = weights(hf)
    change_weights(hf, lambda tensors: {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    assert "tensor model.norm.weight [64] is missing; is the download complete?" in import_error(hf)
    change_weights(hf, lambda _: {**good, "visual.odd": torch.zeros(2)})
    assert "tensor visual.odd [2] has no place in the model" in import_error(hf)
    change_weights(hf, lambda _: {**good, "model.norm.weight": torch.zeros(65)})
    assert "tensor model.norm.weight is [65], but config.json makes it [64]" in import_error(hf)
    key = "model.layers.0.self_attn.k_proj.bias"
    change_weights(hf, lambda _: {**good, key: good[key].float()})
    assert "have several dtypes" in import_error(hf)
    change_weights(hf, lambda _: {**good, "model.language_model.norm.weight": torch.zeros(64)})
    assert "tensor model.norm.weight occurs twice" in import_error(hf)


def test_half_downloaded_folders(hf: Path) -> None:
    file = hf / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-10])
    assert f"has {len(good) - 10} bytes instead of {len(good)}; is the download complete?" in import_error(hf)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "has no safetensors header" in import_error(hf)
    file.write_bytes((4).to_bytes(8, "little") + b"{{}}")
    assert "damaged safetensors header" in import_error(hf)
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors: is missing; is the download complete?" in import_error(hf)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "is no safetensors file of this folder" in import_error(hf)
    index.write_text("[]")
    assert "is no index of safetensors files" in import_error(hf)
    index.unlink()
    file.unlink()
    assert "has no safetensors file" in import_error(hf)
    (hf / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights only" in import_error(hf)


def test_folders_of_other_kinds(hf: Path, tmp_path: Path) -> None:
    change_config(hf, architectures=["LlamaForCausalLM"])
    assert (
        "architectures ['LlamaForCausalLM'] cannot be converted; Qwen2_5_VLForConditionalGeneration, Qwen3VL"
        in import_error(hf)
    )
    (hf / "config.json").write_text("{")
    assert "is no JSON" in import_error(hf)
    (hf / "config.json").unlink()
    assert "has no config.json" in import_error(hf)
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        export_checkpoint(hf, tmp_path / "exported")


def test_a_tied_output_layer_that_is_stored(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in models["tied"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    embedding = weights(folder)["model.embed_tokens.weight"]
    change_weights(folder, lambda tensors: {**tensors, "lm_head.weight": embedding.clone()})
    import_checkpoint(folder, tmp_path / "c")
    assert verify(models["tied"], tmp_path / "c").identical
    change_weights(folder, lambda tensors: {**tensors, "lm_head.weight": embedding + 1})
    assert "ties lm_head.weight to model.embed_tokens.weight, but they differ" in import_error(folder)


def test_targets(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_checkpoint(models["untied"], tmp_path / "c")
    with pytest.raises(CheckpointError, match="exists already"):
        import_checkpoint(models["untied"], tmp_path / "c")
    (tmp_path / "empty").mkdir()
    export_checkpoint(tmp_path / "c", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="exists already"):
        export_checkpoint(tmp_path / "c", tmp_path / "empty")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"needs 0.1 GB, but 0.0 GB are free"):
        import_checkpoint(models["untied"], tmp_path / "deep" / "down")
    assert not (tmp_path / "deep").exists()


def test_export_checks_the_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models["untied"], tmp_path / "c")
    file = tmp_path / "c" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: damaged"):
        export_checkpoint(tmp_path / "c", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_export_of_another_architecture(models: dict[str, Path], tmp_path: Path) -> None:
    import_checkpoint(models["untied"], tmp_path / "base")
    meta = store.read_meta(tmp_path / "base")
    with Reader(tmp_path / "base") as base:
        state = {key: ShardedTensor.from_rank_offsets(key, base.read(key)) for key in base.tensors}
    norm = "backbone.decoder.final_layernorm.weight"
    cases = {
        "has no tensor backbone.decoder.final_layernorm": ({k: v for k, v in state.items() if k != norm}, meta),
        r"final_layernorm.weight is \[3\]": (
            {**state, norm: ShardedTensor.from_rank_offsets(norm, torch.ones(3))},
            meta,
        ),
        "tensor mmdit.x has no place": (
            {**state, "x": ShardedTensor.from_rank_offsets("mmdit.x", torch.ones(3))},
            meta,
        ),
        "family 'other' is unknown": (state, {**meta, "family": "other"}),
    }
    for number, (message, (tensors, values)) in enumerate(cases.items()):
        directory = store.save(tensors, tmp_path / str(number), values).wait()
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(directory, tmp_path / "exported")


# ---------------------------------------------------------------------------------------------- looking and comparing


def test_verify_names_what_differs(models: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    import_checkpoint(models["untied"], tmp_path / "c")
    report = verify(models["untied"], tmp_path / "c")
    assert (report.tensors, report.differences) == (43, ())
    assert report.bytes == sum(tensor.nbytes for tensor in weights(models["untied"]).values())

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.self_attn.v_proj.bias"][3] += 2
        return {**tensors, "model.norm.weight": tensors["model.norm.weight"].float()}

    change_weights(hf, change)
    first, second = verify(hf, tmp_path / "c").differences
    assert first.startswith("backbone.decoder.layers.1.self_attention.linear_qkv.bias: largest difference 2")
    assert second == "backbone.decoder.final_layernorm.weight: torch.float32 and torch.bfloat16, largest difference 0"
    (difference,) = verify(models["tied"], models["untied"]).differences[:1]
    assert difference.startswith("backbone.output_layer.weight is only in")


def printed(path: Path) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(inspect_path(path))
    return capture.get()


def test_inspect(models: dict[str, Path], tmp_path: Path) -> None:
    directory = store.step_directory(tmp_path / "run", 1)
    import_checkpoint(models["untied"], directory)
    text = printed(directory)
    assert "backbone.decoder.layers.{0..1}.self_attention.linear_qkv.weight" in text
    assert "family: qwen2_5_vl" in text
    assert "visual.blocks.{0..1}.attn.qkv.weight" in printed(models["untied"])
    (tmp_path / "run" / "step_00000002").mkdir()
    text = printed(tmp_path / "run")
    assert "step_00000001 │ finished" in text
    assert "step_00000002 │ unfinished or damaged" in text


RUN_TOOL = """
import runpy, sys
try:
    runpy.run_path({tool!r}, run_name="__main__")
except SystemExit as end:
    sys.exit(end.code or any(name.startswith("megatron.") for name in sys.modules) and "Megatron-Core was imported")
"""


def test_the_tool_is_the_command_and_needs_no_megatron(
    repo: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["import", "--from", str(models["untied"]), "--to", str(tmp_path / "c")]
    code = RUN_TOOL.format(tool=str(repo / "tools" / "convert_checkpoint.py"))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=repo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert store.is_committed(tmp_path / "c")
    assert run(["convert", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'c'}: exists already; choose another name or delete it\n"
