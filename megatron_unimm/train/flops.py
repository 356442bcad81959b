"""The peak of known GPUs in TFLOP/s, which MFU is a share of."""

import re

from megatron_unimm.config.recipe import StageConfig

PEAK_TFLOPS = (
    # Words of torch's device name, and bf16 TFLOP/s without sparsity. From NVIDIA's data sheets, which print twice that
    # "with sparsity".
    (("GB300",), 2500.0),  # GB300 NVL72: 360 PFLOP/s sparse / 72 / 2
    (("GB200",), 2500.0),  # GB200 NVL72: 360 PFLOP/s sparse / 72 / 2
    (("B300",), 2250.0),  # HGX B300: 36 PFLOP/s sparse / 8 / 2
    (("B200",), 2250.0),  # HGX B200: 36 PFLOP/s sparse / 8 / 2
    (("GH200",), 989.4),  # an H100 die
    (("H200", "NVL"), 835.5),  # H200 data sheet: 1,671 sparse
    (("H200",), 989.4),  # H200 data sheet: 1,979 sparse; the same die as the H100 SXM
    (("H100", "PCIe"), 756.5),  # H100 data sheet: 1,513 sparse
    (("H100", "NVL"), 835.5),  # H100 data sheet: 1,671 sparse
    (("H100",), 989.4),  # H100 SXM5: architecture white paper, table 3, 989.4 dense
    (("H800",), 989.4),  # an H100 with fewer links
    (("H20",), 148.0),
    (("A100",), 312.0),  # A100 data sheet
    (("A800",), 312.0),  # an A100 with fewer links
    (("L40S",), 362.05),  # L40S data sheet: 733 sparse, 362.05 dense
    (("L40",), 181.05),  # L40 data sheet
    (("L4",), 121.0),  # L4 data sheet: 242 sparse
    (("A10",), 125.0),  # A10 data sheet
)
"""First match wins."""


def peak_tflops(device_name: str, fp8: bool) -> float | None:
    """Peak of one GPU in TFLOP/s: bf16, or twice that with FP8 (on every GPU that has it). None: not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    for needed, peak in PEAK_TFLOPS:
        if words.issuperset(needed):
            return 2 * peak if fp8 else peak
    return None


def stage_peak_tflops(stage: StageConfig, device_name: str) -> float | None:
    """What a stage's MFU is a share of, in TFLOP/s: ``train.logging.peak_tflops``, else the table's bf16 or FP8 peak.

    None for fp32 and for devices that are not in the table.
    """
    if stage.train.logging.peak_tflops is not None:
        return stage.train.logging.peak_tflops
    if stage.system.precision.dtype != "bfloat16":
        return None
    return peak_tflops(device_name, fp8=stage.system.precision.fp8 is not None)
