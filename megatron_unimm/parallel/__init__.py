"""Devices, process groups, pipeline, context parallel attention. Importing it makes Megatron-Core usable on a
machine without a GPU."""

from megatron_unimm.parallel.platform import Platform, select_platform

__all__ = ["Platform", "select_platform"]
