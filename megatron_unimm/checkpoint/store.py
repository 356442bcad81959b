"""Saving and loading of training state: Megatron-Core sharded state dicts in committed, hashed, reshardable folders.

Saving copies what this rank owns to host memory, then writes it, in a thread if asked to; the ranks talk to each other
over a gloo group of their own meanwhile. Nothing is forked or spawned. An error on any rank ends the save on all.
Loading checks every file against the manifest before anything in it is read, and fills the tensors of the state dict in
place, each rank reading only its own rows, so that any layout (TP, PP, EP, DP, virtual stages) can read what any other
wrote.
"""

import fnmatch
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import (
    extract_nonpersistent,
    extract_sharded_base,
    force_all_tensors_to_non_fp8,
)

from megatron_unimm.checkpoint.folder import hf_files_in, save_files
from megatron_unimm.checkpoint.manifest import (
    FileRecord,
    check_files,
    committed_steps,
    is_committed,
    latest,
    prune,
    read_manifest,
    read_meta,
    share_of_files,
    step_directory,
)
from megatron_unimm.checkpoint.ranks import Ranks, new_io_group, together
from megatron_unimm.checkpoint.torch_dist import (
    Blob,
    Index,
    Piece,
    Reader,
    TensorEntry,
    serialise,
    write_pieces,
)
from megatron_unimm.errors import CheckpointError

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

EXTRA_STATE = "._extra_state"
"""Megatron-Core's name for FP8 state. It may be absent (a base model, a run without FP8) and is then started afresh."""

ShardedStateDict = dict[str, Any]
ShardId = tuple[str, tuple[int, ...]]
"""Key and offset of a part of a global tensor."""


class PendingSave:
    """A save that may still be under way. Wait for it before the next save and before the process ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seconds: float | None = None
        """What writing took, once it is over."""
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _run(self, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            work()
        except BaseException as error:  # Handed to the training loop by poll() and wait().
            self._error = error
        self.seconds = time.perf_counter() - began

    def _start(self, work: Callable[[], None]) -> None:
        # Not a daemon: a process that ends for another reason still finishes the checkpoint it had begun.
        self._thread = threading.Thread(target=self._run, args=(work,), name=f"save-{self.directory.name}")
        self._thread.start()

    def poll(self) -> bool:
        """Whether the checkpoint is committed. Raises what :func:`save` raises, if the save failed on any rank."""
        if self._thread is not None and self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> Path:
        """Block until the checkpoint is committed and return its folder. Raises as :meth:`poll`."""
        if self._thread is not None:
            self._thread.join()
        assert self.poll()
        return self.directory


def save(
    sharded_state_dict: ShardedStateDict,
    directory: Path,
    meta: Mapping[str, Any],
    *,
    asynchronous: bool = False,
    group: dist.ProcessGroup | None = None,
    replicas: dist.ProcessGroup | None = None,
    hf_files: Path | Mapping[str, Path] | None = None,
    threads: int = 2,
) -> PendingSave:
    """Write a checkpoint; called on every rank, with one save at a time per run.

    Args:
        sharded_state_dict: ShardedTensors, factories and ShardedObjects of this rank; of other values, rank
            0's are kept.
        directory: final folder, e.g. ``manifest.step_directory(run_dir, step)``. One that exists is replaced.
        meta: JSON values kept in the manifest (rank 0's).
        asynchronous: return once the tensors are copied to host memory, and write in a thread.
        group: ranks that save together; None for all. To save asynchronously, several ranks need a gloo group of their
            own (``new_io_group``).
        replicas: ranks that hold the same tensors (the data-parallel group): they share the copying and writing, which
            otherwise falls to the first of them alone.
        hf_files: folder whose files, if it exists, are copied to ``hf/`` of the checkpoint; or several, by the folder
            in it that they go to (empty for itself).
        threads: files that each rank writes at a time.

    Raises:
        OSError, ValueError: a rank could not write (CheckpointError on the other ranks), or the state dict is not one
            (RuntimeError there). In the asynchronous case ``poll`` and ``wait`` raise it.
    """
    ranks = Ranks.of(group)
    if asynchronous and ranks.size > 1 and group is None:
        raise ValueError(
            "an asynchronous save needs a process group of its own; make one with new_io_group() at the start"
        )
    # A copy, as training goes on to change it; and what is no JSON fails now rather than after everything is written.
    frozen_meta = json.loads(json.dumps(dict(meta)))
    tensors, common = _split(sharded_state_dict)
    values = list(nested_values(tensors))
    owned = _owned([value for value in values if isinstance(value, ShardedTensor)], replicas)
    pieces = [_piece(value, copy=asynchronous) for value in owned]
    blobs = [_blob(value) for value in values if isinstance(value, ShardedObject) and is_main_replica(value.replica_id)]
    other = serialise("values beside the tensors", common)
    # A base model that never was a Hugging Face folder has no such files.
    folders = {"": hf_files} if isinstance(hf_files, Path) else hf_files or {}
    companions = {
        (PurePosixPath(under) / name).as_posix(): path
        for under, folder in folders.items()
        for name, path in hf_files_in(folder).items()
    }

    def write(folder: Path) -> tuple[Index, dict[str, FileRecord]]:
        return write_pieces(folder, ranks.rank, pieces, blobs, threads=threads)

    def work() -> None:
        save_files(directory, write, frozen_meta, common=other, ranks=ranks, hf_files=companions)

    pending = PendingSave(directory)
    if asynchronous:
        pending._start(work)
    else:
        pending._run(work)
        pending.poll()
    return pending


def _split(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, dict[str, Any]]:
    """(ShardedTensors and ShardedObjects, other values to save) of a state dict, which is left as it is."""
    state: Any = extract_matching_values(sharded_state_dict, lambda value: True)[0]  # a copy of its dicts and lists
    apply_factories(state)
    force_all_tensors_to_non_fp8(state)
    _, state = extract_nonpersistent(state)
    tensors: Any
    tensors, other = extract_sharded_base(state)
    return tensors, other


def _owned(tensors: Sequence[ShardedTensor], replicas: dist.ProcessGroup | None) -> list[ShardedTensor]:
    """The tensors that this rank writes: the main replicas, or its share of them among ``replicas``."""
    if replicas is None or not dist.is_initialized():
        return [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
    ranks = Ranks.of(replicas)
    mine = [(_shard_id(tensor), _nbytes(tensor), is_main_replica(tensor.replica_id)) for tensor in tensors]
    holders: dict[ShardId, list[int]] = {}
    sizes: dict[ShardId, int] = {}
    written_here: set[ShardId] = set()  # Shards without a main replica among these ranks are written by others.
    for rank, shards in enumerate(ranks.all_gather(mine)):
        for shard, nbytes, main in shards:
            holders.setdefault(shard, []).append(rank)
            sizes[shard] = nbytes
            if main:
                written_here.add(shard)
    load = [0] * ranks.size
    owner: dict[ShardId, int] = {}
    for shard in sorted(written_here, key=lambda shard: (-sizes[shard], shard)):
        owner[shard] = min(holders[shard], key=lambda rank: (load[rank], rank))
        load[owner[shard]] += sizes[shard]
    # A rank may hold a shard twice (a tensor that two modules share); it writes it once.
    first = {_shard_id(tensor): tensor for tensor in reversed(tensors)}
    return [tensor for shard, tensor in first.items() if owner.get(shard) == ranks.rank]


def _shard_id(tensor: ShardedTensor) -> ShardId:
    return tensor.key, tuple(tensor.global_offset)


def _nbytes(tensor: ShardedTensor) -> int:
    return math.prod(tensor.local_shape) * tensor.dtype.itemsize


def _piece(tensor: ShardedTensor, *, copy: bool) -> Piece:
    data = tensor.data
    assert data is not None, f"{tensor.key}: nothing to save"
    values = data.detach()
    if copy:
        values = values.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return Piece(
        key=tensor.key,
        global_shape=tuple(tensor.global_shape),
        offset=tuple(tensor.global_offset),
        shape=_box_shape(tensor),
        dtype=values.dtype,
        load=lambda: values,
    )


def _box_shape(tensor: ShardedTensor) -> tuple[int, ...]:
    """Shape of the local part with the prepended axes (stacked layers), which are 1 long."""
    return (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)


def _blob(value: ShardedObject) -> Blob:
    # Megatron-Core and torch store the list of the objects that share a key; here it always has one.
    return Blob(key=value.unique_key, data=serialise(value.key, [value.data]))


# ---------------------------------------------------------------------------------------------- loading


def load(
    sharded_state_dict: ShardedStateDict,
    directory: Path,
    *,
    strict: bool = True,
    may_be_absent: Sequence[str] = (),
    may_be_unread: Sequence[str] = (),
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into the tensors of ``sharded_state_dict``, in place where it has them; called on every rank.

    Floating-point tensors may have another precision than the checkpoint's and are converted.

    Args:
        sharded_state_dict: what to read; ShardedTensors without data are allocated on the CPU.
        directory: a finished checkpoint.
        strict: every tensor asked for must be in the checkpoint, and every tensor of it be asked for by some rank.
        may_be_absent: globs over tensor names that the checkpoint may lack; such tensors keep their values.
        may_be_unread: globs over tensor names of the checkpoint that may be left, e.g. ``optimizer.*``.
        check: False where all its files have just been hashed (``fallback.newest_intact``).
        group: ranks that load together; None for all.

    Returns:
        the state dict with tensors in place of ShardedTensors, and the saved values beside them.

    Raises:
        CheckpointError: not finished, a damaged file, or a tensor that is missing, left over or of another shape.
    """
    ranks = Ranks.of(group)
    with together(ranks):
        manifest = read_manifest(directory)
        if check:
            check_files(directory, manifest, share_of_files(manifest, ranks.rank, ranks.size))
    force_all_tensors_to_non_fp8(sharded_state_dict)
    factories: Any
    state, nonpersistent, factories = load_preprocess(sharded_state_dict)
    sharded, _ = extract_sharded_base(state)
    with Reader(directory) as reader:
        absent = ("*",) if not strict else tuple(may_be_absent)
        unread = ("*",) if not strict else tuple(may_be_unread)
        with together(ranks):
            _check_wanted(list(nested_values(sharded)), reader, directory, absent)
        _check_left_over(list(nested_values(sharded)), reader, directory, unread, ranks)
        with together(ranks):
            result = reader.read_common()
            loaded = dict_list_map_outplace(lambda value: _read(value, reader), sharded)
    merge(result, nonpersistent)
    merge(result, loaded)
    return apply_factory_merges(result, factories)


def _check_wanted(wanted: Sequence[ShardedBase], reader: Reader, directory: Path, may_be_absent: Sequence[str]) -> None:
    """Refuse what the checkpoint lacks or has in another shape, before any tensor is touched."""
    for tensor in _tensors(wanted):
        entry = reader.tensors.get(tensor.key)
        if entry is None:
            if not _matches(tensor.key, may_be_absent):
                raise CheckpointError(
                    str(directory),
                    f"has no tensor {tensor.key} {list(tensor.global_shape)}: a checkpoint of another architecture",
                )
            if tensor.data is None:
                raise CheckpointError(str(directory), f"has no tensor {tensor.key}, which has no value yet")
        elif not _fits(tensor, entry):
            raise CheckpointError(
                str(directory),
                f"tensor {tensor.key} is {list(entry.shape)} {entry.dtype} there, but the model has "
                f"{list(tensor.global_shape)} {tensor.dtype}: a checkpoint of another architecture",
            )
    for value in wanted:
        if (
            isinstance(value, ShardedObject)
            and value.unique_key not in reader.blobs
            and not _object_may_be_absent(value, may_be_absent)
        ):
            raise CheckpointError(
                str(directory), f"has no object {value.unique_key}: it was saved by another kind of run"
            )


def _check_left_over(
    wanted: Sequence[ShardedBase], reader: Reader, directory: Path, may_be_unread: Sequence[str], ranks: Ranks
) -> None:
    """Refuse tensors of the checkpoint that no rank reads."""
    read = set().union(*ranks.all_gather({tensor.key for tensor in _tensors(wanted)}))
    left = [key for key in reader.tensors if key not in read and not _matches(key, may_be_unread)]
    if left:
        entry = reader.tensors[left[0]]
        raise CheckpointError(
            str(directory),
            f"tensor {left[0]} {list(entry.shape)} has no place in the model ({len(left)} such tensors): "
            "a checkpoint of another architecture",
        )


def _read(value: ShardedBase, reader: Reader) -> Any:
    if isinstance(value, ShardedObject):
        return reader.read_blob(value.unique_key)[0] if value.unique_key in reader.blobs else value.data
    assert isinstance(value, ShardedTensor), type(value)
    if value.data is None:
        value.init_data("cpu")
    assert value.data is not None
    target = value.data.detach()
    if value.key in reader.tensors:
        if value.allow_shape_mismatch:
            target.zero_()  # Rows of padding that the checkpoint does not have.
        reader.read_into(target.view(_box_shape(value)), value.key, tuple(value.global_offset))
    return target


def _fits(tensor: ShardedTensor, entry: TensorEntry) -> bool:
    """Same shape (but for rows of padding, where they are allowed), and both floating-point numbers or neither."""
    mine, theirs = tuple(tensor.global_shape), entry.shape
    same = mine[1:] == theirs[1:] and len(mine) == len(theirs) if tensor.allow_shape_mismatch else mine == theirs
    return same and tensor.dtype.is_floating_point == entry.dtype.is_floating_point


def _tensors(values: Sequence[ShardedBase]) -> Iterator[ShardedTensor]:
    return (value for value in values if isinstance(value, ShardedTensor))


def _object_may_be_absent(value: ShardedObject, may_be_absent: Sequence[str]) -> bool:
    return value.key.endswith(EXTRA_STATE) or _matches(value.key, may_be_absent)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
