"""Layers on one GPU: how far bf16 and FP8 are from fp32, and how fast and large they are at 7B's shapes.

    python tools/bench/gpu_layers.py            one Hopper GPU, 5 minutes: one table, and a JSON in tools/bench/results/
    python tools/bench/gpu_layers.py --smoke    any machine: tiny shapes, to see that the script works

NOT YET RUN ON A GPU: written against the sources of megatron-core 0.16.1 and of Transformer Engine 2.9 to 2.11, and
tried with --smoke on CPU.

Numerics. A small ORION model of Qwen2.5-VL's shape (windowed and full vision layers, grouped keys, teacher, vision
head) with the same bf16-representable weights everywhere; the reference is the torch layers in fp32 without TF32.
Compared are the loss terms and the gradient of every trained tensor, by ‖g − g'‖ / ‖g‖ and by the largest difference
of one number.

Speed. Decoder layers of Qwen2.5-VL-7B (hidden 3584, 28 heads, 4 key-value heads, MLP 18944), text packed to 8192
tokens, a small vocabulary, so that layers are nearly all of the work. A step is forward, backward, gradient reduction,
clipping and AdamW; TFLOP/s and MFU are model FLOPs (megatron_unimm/models/flops.py) over the time of forward and
backward.

Every variant runs in a process of its own: its memory is its own, and a kernel that fails costs one row.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import Tensor

from megatron_unimm.config.layout import check_layout
from megatron_unimm.config.load import load_recipe
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.packing import build_row
from megatron_unimm.data.sample import IGNORED_LABEL, PackedRow, TokenizedSample
from megatron_unimm.methods.orion.model import OrionModel
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.flops import peak_tflops
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import sharding_metadata
from megatron_unimm.train.step import TrainStep

REPO = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
SECONDS_PER_VARIANT, SECONDS_PER_SMOKE_VARIANT = 150, 600
WARM_UP_STEPS, TIMED_STEPS = 4, 10
SEED = 1

Settings = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to compute the same model."""

    name: str
    layers: str
    dtype: str
    recipe: str | None = None
    """FP8 recipe of Transformer Engine."""

    def overrides(self) -> list[str]:
        fp8 = "null" if self.recipe is None else f"{{recipe: {self.recipe}}}"
        return [f"system.layers={self.layers}", f"system.precision={{dtype: {self.dtype}, fp8: {fp8}}}"]

    def lacking(self, platform: Platform) -> str:
        """Why it cannot run here; empty if it can."""
        if self.layers == "torch":
            return ""
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            return "not installed"
        if not platform.is_gpu:
            return "no GPU"
        return _recipe_lacking(self.recipe)


def _recipe_lacking(recipe: str | None) -> str:
    import transformer_engine.pytorch as te

    checks = {
        "delayed": te.is_fp8_available,
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }
    if recipe is None:
        return ""
    available, reason = checks[recipe](return_reason=True)
    return "" if available else reason


REFERENCE = Variant("torch fp32", "torch", "float32")
VARIANTS = (
    Variant("torch bf16", "torch", "bfloat16"),
    Variant("TE bf16", "transformer_engine", "bfloat16"),
    *(
        Variant(f"TE fp8 {recipe}", "transformer_engine", "bfloat16", recipe)
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    ),
)
BY_NAME = {variant.name: variant for variant in (REFERENCE, *VARIANTS)}

SMALL_MODEL = (
    "model.vision_encoder.num_layers=4",
    "model.vision_encoder.hidden_size=256",
    "model.vision_encoder.num_heads=4",
    "model.vision_encoder.mlp_size=684",  # of no multiple of 16, as in Qwen2.5-VL: the tower stays out of FP8
    "model.vision_encoder.full_attention_layers=[1, 3]",
    "model.vision_encoder.out_size=512",
    "model.backbone.num_layers=4",
    "model.backbone.hidden_size=512",
    "model.backbone.num_heads=8",
    "model.backbone.num_kv_heads=2",
    "model.backbone.head_size=64",
    "model.backbone.mlp_size=1408",
    "model.backbone.mrope_sections=[8, 12, 12]",
    "data.sequence_length=1024",
)
TINY_MODEL = (
    "model.vision_encoder.num_layers=2",
    "model.vision_encoder.hidden_size=32",
    "model.vision_encoder.mlp_size=44",
    "model.vision_encoder.full_attention_layers=[1]",
    "model.vision_encoder.out_size=64",
    "model.backbone.num_layers=2",
    "model.backbone.hidden_size=64",
    "model.backbone.num_heads=4",
    "model.backbone.head_size=16",
    "model.backbone.mlp_size=96",
    "model.backbone.mrope_sections=[2, 3, 3]",
    "data.sequence_length=256",
)
LAYERS_OF_7B = (
    "model.vision_encoder.num_layers=1",
    "model.vision_encoder.full_attention_layers=[0]",
    "model.vision_encoder.out_size=3584",
    "model.backbone.num_layers=4",
    "model.backbone.hidden_size=3584",
    "model.backbone.num_heads=28",
    "model.backbone.num_kv_heads=4",
    "model.backbone.head_size=128",
    "model.backbone.mlp_size=18944",
    "model.backbone.mrope_sections=[16, 24, 24]",
    "method.vision_head.kind=linear",
    "method.loss_weights.kl=0",
    "data.sequence_length=8192",
)


def stage_config(model: tuple[str, ...], variant: Variant) -> StageConfig:
    """The Shapes recipe's SFT stage with another model."""
    stage = load_recipe(REPO / "configs/orion/shapes.yaml", [*model, *variant.overrides()]).stages["sft"]
    check_layout(stage, world_size=1)
    return stage


# -- rows ------------------------------------------------------------------------------------------------------------


def make_sample(stage: StageConfig, length: int, grid: tuple[int, int] | None, generated: bool) -> TokenizedSample:
    """Random text, an image of a patch grid behind its fourth token; behind that every 16th position has a label."""
    encoder = stage.model.vision_encoder
    rng = np.random.default_rng(length)
    num_patches = grid[0] * grid[1] if grid else 0
    visual = 4 + np.arange(num_patches // encoder.spatial_merge_size**2)
    labels = np.full(length, IGNORED_LABEL)
    answer = labels[5 + len(visual) :: 16]
    answer[:] = rng.integers(0, stage.model.token_ids.pad, len(answer))
    none = visual[:0]
    return TokenizedSample(
        id=f"sample {length}",
        kind="text_to_image" if generated else "understanding",
        input_ids=rng.integers(0, stage.model.token_ids.pad, length),
        labels=labels,
        position_ids=np.tile(np.arange(length), (3, 1)),
        patches=rng.standard_normal((num_patches, encoder.patch_dim)).astype(np.float32),
        grids=np.array([[1, *grid]] if grid else np.zeros((0, 3)), dtype=np.int64),
        is_target=np.array([generated] * bool(grid), dtype=bool),
        visual_index=visual,
        predict_index=visual - 1 if generated else none,
        target_index=np.arange(len(visual)) if generated else none,
    )


def make_row(stage: StageConfig, samples: list[TokenizedSample]) -> PackedRow:
    return build_row(
        samples,
        sequence_length=stage.data.sequence_length,
        alignment=1,
        pad_id=stage.model.token_ids.pad,
        patch_dim=stage.model.vision_encoder.patch_dim,
    )


def mixed_row(stage: StageConfig) -> PackedRow:
    """One image that is read, one that is generated (neither fills whole windows), text, and a tail of padding."""
    length = stage.data.sequence_length
    samples = [(length * 7 // 16, (18, 14), False), (length // 4, (12, 10), True), (length // 8, None, False)]
    return make_row(stage, [make_sample(stage, *sample) for sample in samples])


def text_row(stage: StageConfig) -> PackedRow:
    """Text of lengths 8 : 6 : 4 : 4 : 4 : 3 : 2 : 1 that fill the row."""
    unit = stage.data.sequence_length // 32
    return make_row(stage, [make_sample(stage, unit * share, None, False) for share in (8, 6, 4, 4, 4, 3, 2, 1)])


# -- numerics --------------------------------------------------------------------------------------------------------


def named_parameters(model: OrionModel, groups: ParallelGroups) -> dict[str, Tensor]:
    """Parameters by name in a checkpoint, which torch and Transformer Engine layers share; also the frozen base."""
    metadata = sharding_metadata(groups)
    own = model.sharded_state_dict(metadata=metadata)
    base = model.base_sharded_state_dict(metadata)
    parts = [(entry, "") for entry in nested_values(own)] + [(entry, "base.") for entry in nested_values(base)]
    return {prefix + entry.key: entry.data for entry, prefix in parts if isinstance(entry, ShardedBase)}


def draw_weights(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own initial weights, rounded to bf16, so that every variant holds the same."""
    return {name: parameter.detach().bfloat16() for name, parameter in parameters.items()}


@torch.no_grad()
def put_weights(parameters: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """Copy weights in.

    Raises:
        AssertionError: the two models have different tensors.
    """
    assert parameters.keys() == weights.keys(), sorted(parameters.keys() ^ weights.keys())[:5]
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def losses_and_gradients(
    stage: StageConfig, platform: Platform, groups: ParallelGroups, weights: dict[str, Tensor] | None
) -> dict[str, Any]:
    """One forward and backward pass: {"weights", "losses" float32 [terms], "gradients"}, on the host.

    Args:
        weights: None keeps (and returns) the model's own initial ones.
    """
    torch.manual_seed(SEED)
    method, (model,) = setup.build_model(stage, platform, groups)
    parameters = named_parameters(model, groups)
    weights = draw_weights(parameters) if weights is None else weights
    put_weights(parameters, {name: weight.to(platform.device) for name, weight in weights.items()})
    row = mixed_row(stage)
    losses = model(method.batch(row, model, platform.device)) / torch.tensor(
        method.counts([row]), device=platform.device
    )
    (losses * torch.tensor(method.weights, device=platform.device)).sum().backward()
    gradients = {name: tensor.grad.float().cpu() for name, tensor in parameters.items() if tensor.grad is not None}
    return {
        "weights": {name: weight.cpu() for name, weight in weights.items()},
        "losses": losses.detach().cpu(),
        "gradients": gradients,
    }


def compare(found: dict[str, Any], reference: dict[str, Any]) -> Settings:
    """Errors of losses and gradients against the reference."""
    names = reference["gradients"].keys()
    assert found["gradients"].keys() == names, sorted(found["gradients"].keys() ^ names)[:5]
    difference = {name: found["gradients"][name] - reference["gradients"][name] for name in names}
    norms = {name: reference["gradients"][name].norm().item() for name in names}
    # A tensor whose gradient is (nearly) zero in truth, such as the bias of keys, has no relative error worth telling.
    floor = 1e-4 * sum(norm**2 for norm in norms.values()) ** 0.5
    relative = {name: difference[name].norm().item() / max(norms[name], floor) for name in names}
    worst = max(relative, key=lambda name: relative[name])
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    return {
        "loss_relative": ((found["losses"] - reference["losses"]).abs() / reference["losses"].abs()).max().item(),
        "loss_absolute": (found["losses"] - reference["losses"]).abs().max().item(),
        "gradient_relative": sum(tensor.norm().item() ** 2 for tensor in difference.values()) ** 0.5 / total,
        "gradient_absolute": max(tensor.abs().max().item() for tensor in difference.values()),
        "worst_tensor_relative": relative[worst],
        "worst_tensor": worst,
    }


# -- speed -----------------------------------------------------------------------------------------------------------


def measure_speed(stage: StageConfig, variant: Variant, platform: Platform, groups: ParallelGroups) -> Settings:
    """Median times of optimizer steps on one packed row, and peak memory."""
    torch.manual_seed(SEED)
    if platform.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    method, chunks = setup.build_model(stage, platform, groups)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    step = TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)
    row = text_row(stage)
    passes = time_calls(lambda: step.forward_backward([row]), platform)
    steps = time_calls(lambda: step.run([row], 1e-5), platform)
    tflops = method.row_flops(row) / passes / 1e12
    peak = peak_tflops(platform.device_name(), fp8=variant.recipe is not None)
    return {
        "forward_backward_ms": 1e3 * passes,
        "step_ms": 1e3 * steps,
        "tokens_per_second": stage.data.sequence_length / steps,
        "model_tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "peak_memory_gib": platform.max_memory_allocated() / 2**30,
    }


def time_calls(call: Callable[[], Any], platform: Platform) -> float:
    """Median seconds of a call; the first ones (compilation, FP8 history, allocation) are left out."""
    seconds = []
    for number in range(WARM_UP_STEPS + TIMED_STEPS):
        platform.synchronize()
        start = time.perf_counter()
        call()
        platform.synchronize()
        if number >= WARM_UP_STEPS:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# -- processes -------------------------------------------------------------------------------------------------------


def run_variant(variant: Variant, smoke: bool, reference_file: Path, result_file: Path) -> None:
    """What a child process does: numerics against the reference (or writing it), then speed."""
    torch.set_float32_matmul_precision("highest")
    stage = stage_config(TINY_MODEL if smoke else SMALL_MODEL, REFERENCE)
    platform, groups = setup.enter(stage)
    result: Settings = {"device": platform.device_name(), "status": variant.lacking(platform)}
    if not result["status"]:
        stage = stage_config(TINY_MODEL if smoke else SMALL_MODEL, variant)
        if variant == REFERENCE:
            torch.save(losses_and_gradients(stage, platform, groups, None), reference_file)
        else:
            reference = torch.load(reference_file, weights_only=True)
            found = losses_and_gradients(stage, platform, groups, reference["weights"])
            result |= compare(found, reference)
            del found, reference
            gc.collect()
            fast = stage_config(TINY_MODEL if smoke else LAYERS_OF_7B, variant)
            result |= measure_speed(fast, variant, platform, groups)
    destroy_groups()
    result_file.write_text(json.dumps(result))


def start_variant(variant: Variant, smoke: bool, folder: Path) -> Settings:
    """Run a variant in a child process; a failure becomes its status."""
    result_file = folder / "result.json"
    result_file.unlink(missing_ok=True)
    limit = SECONDS_PER_SMOKE_VARIANT if smoke else SECONDS_PER_VARIANT
    command = [sys.executable, __file__, "--variant", variant.name, "--folder", str(folder), *(["--smoke"] * smoke)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"status": f"took more than {limit} s"}
    if done.returncode or not result_file.exists():
        sys.stderr.write(f"-- {variant.name} failed --\n{done.stderr[-4000:]}\n")
        lines = [line for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
        return {"status": f"failed: {(lines or done.stderr.splitlines() or ['no output'])[-1][:120]}"}
    return json.loads(result_file.read_text())


COLUMNS: tuple[tuple[str, str, str], ...] = (
    # Heading, key in the result, format.
    ("loss\nrel", "loss_relative", ".1e"),
    ("loss\nabs", "loss_absolute", ".1e"),
    ("grad\nrel", "gradient_relative", ".1e"),
    ("grad\nabs", "gradient_absolute", ".1e"),
    ("worst\ntensor", "worst_tensor_relative", ".1e"),
    ("fwd+bwd\nms", "forward_backward_ms", ".1f"),
    ("step\nms", "step_ms", ".1f"),
    ("tokens/s", "tokens_per_second", ",.0f"),
    ("TFLOP/s", "model_tflops", ".3g"),
    ("MFU", "mfu", ".1%"),
    ("peak\nGiB", "peak_memory_gib", ".1f"),
)


def print_table(device: str, smoke: bool, results: dict[str, Settings]) -> None:
    from rich.console import Console
    from rich.table import Table

    speed = "speed at tiny shapes, which means nothing" if smoke else "speed of 7B-shaped layers, 8192 packed tokens"
    title = f"{device}: errors against torch fp32 on a small model; {speed}"
    table = Table("variant", *(heading for heading, _, _ in COLUMNS), "", title=title)
    for name, result in results.items():
        cells = [format(result[key], spec) if result.get(key) is not None else "" for _, key, spec in COLUMNS]
        table.add_row(name, *cells, result["status"] or result.get("worst_tensor", ""))
    Console(width=170).print(table)


def write_json(device: str, results: dict[str, Settings]) -> Path:
    """Hardware, versions, sizes and numbers: what a result needs to be compared with another."""
    RESULTS.mkdir(exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    file = RESULTS / f"gpu_layers_{name}_{now:%Y%m%d_%H%M}.json"
    wanted = ("torch", "megatron-core", "transformer-engine", "triton", "flash-attn")
    versions = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in wanted}
    model = {"numerics": SMALL_MODEL, "speed": LAYERS_OF_7B}
    content = {
        "device": device,
        "time": now.isoformat(),
        "versions": versions,
        "cuda": torch.version.cuda,
    }
    file.write_text(json.dumps(content | {"model": model, "results": results}, indent=1))
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--variant", choices=BY_NAME, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        files = (arguments.folder / "reference.pt", arguments.folder / "result.json")
        run_variant(BY_NAME[arguments.variant], arguments.smoke, *files)
        return 0
    if not torch.cuda.is_available() and not arguments.smoke:
        print("error: torch sees no GPU; to try the script itself, add --smoke", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        reference = start_variant(REFERENCE, arguments.smoke, Path(folder))
        if reference["status"]:
            print(f"error: the reference: {reference['status']}", file=sys.stderr)
            return 1
        results = {}
        for variant in VARIANTS:
            results[variant.name] = start_variant(variant, arguments.smoke, Path(folder))
            print(f"{variant.name}: {results[variant.name]['status'] or 'done'}", file=sys.stderr)
    print_table(reference["device"], arguments.smoke, results)
    if not arguments.smoke:
        print(f"written to {write_json(reference['device'], results)}")
    return 1 if any(result["status"].startswith(("failed", "took")) for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
