"""Clusters: what their GPUs have, and what share of it training gets."""

from dataclasses import dataclass

from megatron_unimm.config.wording import suggest_or_list
from megatron_unimm.errors import ConfigError
from megatron_unimm.train.flops import peak_tflops

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    device_name: str
    """As torch calls it, for its peak (``train/flops.py``)."""
    memory_gib: float
    """What torch reports as its total, a little less than the data sheet's."""
    memory_gb_per_s: float
    """HBM bandwidth (data sheet)."""
    node_gb_per_s: float
    """To another GPU of the node, in one direction: half of what data sheets of NVLink give."""
    network_gb_per_s: float
    """To another node, in one direction: the GPU's own adapter."""


GPUS = {
    # NVIDIA's data sheets of each GPU; networks of DGX H100, H200 and B200: eight ConnectX-7 of 400 Gb/s per node,
    # DGX A100: eight of 200 Gb/s.
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.1, 3350.0, 450.0, 50.0),
    "h200": Gpu("NVIDIA H200", 139.0, 4800.0, 450.0, 50.0),
    "h800": Gpu("NVIDIA H800", 79.1, 3350.0, 200.0, 50.0),
    "h20": Gpu("NVIDIA H20", 95.0, 4000.0, 450.0, 50.0),
    "b200": Gpu("NVIDIA B200", 178.0, 8000.0, 900.0, 50.0),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 79.1, 2039.0, 300.0, 25.0),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 39.4, 1555.0, 300.0, 25.0),
    "a800": Gpu("NVIDIA A800-SXM4-80GB", 79.1, 2039.0, 200.0, 25.0),
}
"""By the name that ``unimm plan --gpu`` takes."""


@dataclass(frozen=True)
class Shares:
    """What training is assumed to get of the numbers above. Of a cluster at hand, measure and correct them."""

    products: float = 0.68
    """Of the peak, large dense products. bf16 8192³ was measured at 0.78 on an H200; layers have smaller ones."""
    experts: float = 0.45
    """Of the peak, grouped products of experts."""
    attention: float = 0.45
    """Of the peak, attention, forward and backward (FlashAttention-3, arXiv 2407.08608, section 4.1: bf16, causal,
    sequences of a few thousand tokens)."""
    memory: float = 0.8
    """Of HBM. Copies were measured at 0.89 on an H200."""
    node: float = 0.75
    """Of NVLink, in collectives."""
    network: float = 0.8
    """Of the adapter, in collectives."""
    passes: float = 6.0
    """Times that each byte that a layer keeps goes over HBM outside products: written, read again in either pass, and
    its gradient written and read."""
    hidden_reduce: float = 0.9
    """Of the last micro-batch's backward pass (forward pass, for gathered parameters), what can hide communication of
    gradients where ``system.overlap`` says so."""
    hidden_tensor: float = 0.8
    """Of tensor-parallel communication, what user buffers hide (``system.overlap.tensor_parallel``)."""
    hidden_tensor_backward: float = 0.5
    """The same in the backward pass without them: inputs are gathered beside the product before."""
    hidden_context: float = 0.7
    """Of the ring of keys and values."""


RUNTIME_GIB = 3.0
"""CUDA context and libraries, cuBLAS workspaces, buffers of NCCL's communicators."""
FRAGMENTATION = 0.05
"""Of what activations take, lost between blocks of torch's allocator."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> float:
        """Bytes of a GPU."""
        return self.gpu.memory_gib * GIB

    def peak(self, fp8: bool) -> float:
        """FLOP/s of a GPU."""
        peak = peak_tflops(self.gpu.device_name, fp8)
        assert peak is not None, f"{self.gpu.device_name} has a peak in train/flops.py"
        return peak * 1e12

    def bandwidth(self, span: int, shares: Shares) -> float:
        """Bytes per second and GPU in a group of neighbouring ranks that spans so many."""
        if span <= self.gpus_per_node:
            return self.gpu.node_gb_per_s * 1e9 * shares.node
        return self.gpu.network_gb_per_s * 1e9 * shares.network


def gpu_of(name: str) -> Gpu:
    """A kind of GPU by its name.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in GPUS:
        raise ConfigError("--gpu", f"{name} is not known{suggest_or_list(name, GPUS)}")
    return GPUS[name]
