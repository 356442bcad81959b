"""Checkpoints: Megatron-Core's torch_dist format, hashed and committed by a marker written last. See ``store.py``."""

from megatron_unimm.checkpoint.manifest import committed_steps, is_committed, latest, prune, read_meta, step_directory
from megatron_unimm.checkpoint.ranks import new_io_group
from megatron_unimm.checkpoint.store import PendingSave, load, save

__all__ = [
    "PendingSave",
    "committed_steps",
    "is_committed",
    "latest",
    "load",
    "new_io_group",
    "prune",
    "read_meta",
    "save",
    "step_directory",
]
