"""What Megatron-Core 0.16 needs in order to run without a GPU: a few named stand-ins, installed once, only where
there is none.

Megatron-Core writes ``torch.cuda.…`` and ``device="cuda"`` literally in schedules, optimizers and MoE code. On a
machine without a GPU each of those is pointed at the CPU here. On a machine with a GPU this file does nothing.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

FACTORIES = (
    "zeros",
    "ones",
    "empty",
    "tensor",
    "full",
    "arange",
    "rand",
    "randn",
    "as_tensor",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
)
"""Tensor factories that Megatron-Core calls with ``device="cuda"``."""


class _Inert:
    """A stream or event on a device that works in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> "_Inert":
        return self

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def install_without_gpu() -> None:
    """Install every stand-in unless there is a GPU or they are in place already."""
    if torch.cuda.is_available() or (isinstance(torch.cuda.Stream, type) and issubclass(torch.cuda.Stream, _Inert)):
        return
    _import_megatron_uncompiled()
    _device_and_memory()
    _random_state()
    _streams()
    _factories()
    _tensor_methods()
    _megatron_functions()


def _import_megatron_uncompiled() -> None:
    """Megatron-Core compiles small fusions where it defines them; on CPU the compiler costs minutes and gains
    nothing."""
    compiler = torch.compile
    torch.compile = lambda function=None, **kwargs: function  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            # "Transformer Engine and Apex are not installed": true, and what `unimm doctor` tells.
            warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex).*")
            import megatron.core.distributed
            import megatron.core.models.gpt.gpt_layer_specs
            import megatron.core.optimizer
            import megatron.core.pipeline_parallel  # noqa: F401
    finally:
        torch.compile = compiler


def _nothing() -> Callable[..., None]:
    """A new function that does nothing (a new one each time: torch's compiler keeps a table of functions by
    identity)."""
    return lambda *args, **kwargs: None


def _device_and_memory() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = _nothing()
    torch.cuda.set_device = _nothing()
    torch.cuda.empty_cache = _nothing()
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *args, **kwargs: 0)


def _random_state() -> None:
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment,return-value]


def _streams() -> None:
    torch.cuda.Stream = _Inert  # type: ignore[assignment,misc]
    torch.cuda.Event = _Inert  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *args, **kwargs: _Inert()  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda *args, **kwargs: _Inert()  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.nvtx.range_push = _nothing()  # type: ignore[assignment]
    torch.cuda.nvtx.range_pop = _nothing()  # type: ignore[assignment]


def _is_gpu(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return redirected


def _factories() -> None:
    # `with torch.device("meta")` keys on the original factories through a cached set: fill the cache before they are
    # replaced.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _tensor_methods() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    original_type, original_to = torch.Tensor.type, torch.Tensor.to

    def typename(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers compare with 'torch.cuda.FloatTensor' to sort parameters by precision.
        result = original_type(self, *args, **kwargs)
        if args or kwargs:
            return result
        return result.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.")

    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str | torch.device) and _is_gpu(args[0]):
            args = ("cpu", *args[1:])
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original_to(self, *args, **kwargs)

    torch.Tensor.type = typename  # type: ignore[assignment,method-assign]
    torch.Tensor.to = moved  # type: ignore[assignment,method-assign]


def _megatron_functions() -> None:
    import megatron.core.tensor_parallel.random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    tensor_parallel_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    tensor_parallel_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # read without a guard where Transformer Engine is absent

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    token_dispatcher.maybe_move_tensor_to_cpu = to_host
