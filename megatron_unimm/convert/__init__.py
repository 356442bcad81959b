"""Hugging Face folders to Megatron checkpoints and back: one declared table per family, streamed tensor by tensor."""

from megatron_unimm.convert.export import export_checkpoint
from megatron_unimm.convert.import_ import import_checkpoint
from megatron_unimm.convert.inspection import inspect_path
from megatron_unimm.convert.verification import VerifyReport, verify

__all__ = ["VerifyReport", "export_checkpoint", "import_checkpoint", "inspect_path", "verify"]
