"""Qwen2.5's layers as HieraQuery's connector: against transformers, read in both directions, and back bit by bit."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.checkpoint.store import load
from megatron_unimm.config.hieraquery import LanguageConnectorConfig
from megatron_unimm.config.parallel import PrecisionConfig, SystemConfig
from megatron_unimm.convert.export import export_checkpoint
from megatron_unimm.convert.import_ import import_checkpoint
from megatron_unimm.models.scale_connector import ScaleConnector
from megatron_unimm.models.transformer_config import language_connector_transformer_config
from megatron_unimm.parallel.groups import destroy_groups, initialize_groups
from megatron_unimm.parallel.platform import select_platform
from megatron_unimm.train.state import sharding_metadata


def test_connector_is_the_language_model_without_its_mask(tmp_path: Path) -> None:
    """Two scales of two pictures, each by itself: transformers' hidden states with every position visible."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "ckpt")
    ours = LanguageConnectorConfig.model_validate(read_meta(tmp_path / "ckpt")["architecture"])
    system = SystemConfig(platform="cpu", precision=PrecisionConfig(dtype="float32"))
    platform = select_platform("cpu")
    groups = initialize_groups(system.parallel, platform, 0, 5)
    try:
        transformer = language_connector_transformer_config(ours, system, platform)
        connector = ScaleConnector(ours, transformer, "torch", groups.alone()).eval()
        state = connector.sharded_state_dict("scale_connector.", metadata=sharding_metadata(groups))
        state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        load({"model": state}, tmp_path / "ckpt", may_be_unread=("*",))
        hidden = torch.randn(2 * (4 + 9), 32)
        with torch.no_grad():
            found = connector.refine(hidden, (4, 9))
            for part, said in zip(hidden.split([4, 9, 4, 9]), found.split([4, 9, 4, 9]), strict=True):
                everything = torch.zeros(1, 1, len(part), len(part))
                expected = model.model(inputs_embeds=part[None], attention_mask=everything).last_hidden_state[0]
                torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
    finally:
        destroy_groups()
    export_checkpoint(tmp_path / "ckpt", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
