"""Model files in configs/models/: the published models, tensor by tensor, as transformers builds them from the same
numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.model import ModelConfig, SiglipConfig
from megatron_unimm.convert.families import family_of
from megatron_unimm.convert.pipeline import read_model
from megatron_unimm.convert.reader import read_added_tokens, read_config
from megatron_unimm.convert.siglip import to_hf_config as siglip_hf_config

FOLDER = Path("configs/models")
# Billions of parameters. The name of a model is a rounding of them (Qwen counts the decoder alone for some).
BILLIONS = {
    "qwen2_5_vl_3b": 3.755,
    "qwen2_5_vl_7b": 8.292,
    "qwen2_5_vl_32b": 33.453,
    "qwen2_5_vl_72b": 73.411,
    "qwen3_vl_4b": 4.438,
    "qwen3_vl_8b": 8.767,
    "qwen3_vl_30b_a3b": 31.071,
    "qwen3_vl_235b_a22b": 235.670,
}
SIGLIP_MILLIONS = {"siglip_so400m_patch14_384": 428.2, "siglip2_so400m_patch16_naflex": 427.9}
GENERATORS = {"sd3_medium", "sd3_5_medium", "sd3_5_large", "flux_1_dev", "sana_1600m"}
"""Tested in tests/convert/test_mmdit.py."""
NOT_IN_TRANSFORMERS = {"ming_lite_omni"}
"""Tested in tests/convert/test_ming.py."""
SHIPPED = {"shapes"}
"""In tools/base_models."""


def test_every_file_is_tested() -> None:
    tested = BILLIONS.keys() | SIGLIP_MILLIONS.keys() | GENERATORS | NOT_IN_TRANSFORMERS | SHIPPED
    assert {path.stem for path in FOLDER.iterdir()} == tested


def architecture(hf_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that transformers makes of a ``config.json``."""
    config = transformers.AutoConfig.for_model(**hf_config)
    with torch.device("meta"):
        model = getattr(transformers, hf_config["architectures"][0])(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", BILLIONS)
def test_vlm(name: str) -> None:
    model = ModelConfig.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"])
    family = family_of(hf_config := hf_config_of(model), name)
    assert family.to_config(hf_config, {}) == model
    mappings = family.mappings(model, family.layouts[0])
    ours = {hf_name: shape for m in mappings for hf_name, shape in zip(m.names, m.shapes, strict=True)}
    theirs = {family.hub_name(hf_name): shape for hf_name, shape in architecture(hf_config).items()}
    assert ours == theirs
    billions = sum(torch.Size(shape).numel() for shape in ours.values()) / 1e9
    assert billions == pytest.approx(BILLIONS[name], abs=5e-4)


def hf_config_of(model: ModelConfig) -> dict[str, Any]:
    from megatron_unimm.convert import qwen2_5_vl, qwen3_vl

    return (qwen2_5_vl if model.vision_encoder.family == "qwen2_5" else qwen3_vl).to_hf_config(model)


@pytest.mark.parametrize("name", SIGLIP_MILLIONS)
def test_siglip(name: str) -> None:
    model = SiglipConfig.model_validate(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["siglip"])
    family = family_of(hf_config := siglip_hf_config(model), name)
    assert family.to_config(hf_config, {}) == model
    ours = {n: s for m in family.mappings(model, "bare") for n, s in zip(m.names, m.shapes, strict=True)}
    assert ours == architecture(hf_config)
    assert sum(torch.Size(shape).numel() for shape in ours.values()) / 1e6 == pytest.approx(
        SIGLIP_MILLIONS[name], abs=0.1
    )


@pytest.mark.parametrize(("section", "folder"), [("model", "shapes_vlm"), ("generator", "shapes_mmdit")])
def test_the_shapes_world_has_the_shipped_models(section: str, folder: str) -> None:
    source = Path("tools/base_models") / folder
    config = read_model(source) if (source / "model_index.json").exists() else read_config(source)
    written = yaml.safe_load((FOLDER / "shapes.yaml").read_text())[section]
    kind = ModelConfig if section == "model" else ImageGeneratorConfig
    expected = family_of(config, folder).to_config(config, read_added_tokens(source) if section == "model" else {})
    assert kind.model_validate(written) == expected


def test_a_recipe_takes_its_model_from_a_file(tmp_path: Path) -> None:
    """Another model under the same training: its own section replaces the tower of another family."""
    here = Path.cwd()
    recipe = tmp_path / "orion_qwen3.yaml"
    recipe.write_text(
        f"base: [{here}/configs/orion/qwen2_5_vl_7b.yaml, {here}/configs/models/qwen3_vl_30b_a3b.yaml]\nname: mine\n"
    )
    stage = load_recipe(recipe).stages["sft"]
    assert stage.model == ModelConfig.model_validate(
        yaml.safe_load((FOLDER / "qwen3_vl_30b_a3b.yaml").read_text())["model"]
    )
    assert stage.train.optimizer.epsilon == 1e-15
