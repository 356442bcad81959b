"""Saving and loading: any number of ranks to any other, killed and failing saves, damaged files, what is kept."""

import fractions
import functools
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.dist_checkpointing import load as megatron_load
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from megatron_unimm.checkpoint import store, torch_dist
from megatron_unimm.checkpoint.manifest import MANIFEST, MARKER, STEP_NAME
from megatron_unimm.errors import CheckpointError

ROWS, COLUMNS, LAYERS = 8, 6, 4


def full(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The global tensor of a name: the same on every rank."""
    shape = {
        "columns": (ROWS, COLUMNS),
        "rows": (ROWS, COLUMNS),
        "stacked": (LAYERS, 2, 3),
        "replicated": (5,),
        "scalar": (),
    }
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(shape[name], generator=generator).to(dtype)


def sharded(rank: int, size: int, *, empty: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A state dict with every kind of entry, spread over ``size`` ranks; ``empty`` to load into."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tensor, -1) if empty else tensor.clone()

    def split(name: str, dim: int) -> ShardedTensor:
        data = fill(full(name, dtype).chunk(size, dim)[rank])
        return ShardedTensor.from_rank_offsets(name, data, (dim, rank, size))

    per_rank = LAYERS // size
    layers = {
        f"layer_{number}": ShardedTensor.from_rank_offsets(
            "stacked", fill(full("stacked", dtype)[number]), (0, number, LAYERS), prepend_axis_num=1
        )
        for number in range(rank * per_rank, (rank + 1) * per_rank)
    }
    state: dict[str, Any] = {
        "model": {"rows": split("rows", 0), "columns": split("columns", 1), **layers},
        "replicated": ShardedTensor.from_rank_offsets("replicated", fill(full("replicated", dtype)), replica_id=rank),
        "scalar": ShardedTensor.from_rank_offsets("scalar", fill(full("scalar", dtype)), replica_id=(0, rank)),
        "fp8": ShardedObject(
            "layer._extra_state", None if empty else io.BytesIO(b"scales"), (1,), (0,), replica_id=rank
        ),
        "local": LocalNonpersistentObject(f"of rank {rank}"),
    }
    if not empty:
        state["optimizer"] = {
            "param_groups": [{"lr_mult": 1.0, "params": [0, 1]}, {"lr_mult": 0.1}],
            "step": torch.tensor(7),
        }
    return state


def check_loaded(state: dict[str, Any], rank: int, size: int) -> None:
    assert torch.equal(state["model"]["rows"], full("rows").chunk(size, 0)[rank])
    assert torch.equal(state["model"]["columns"], full("columns").chunk(size, 1)[rank])
    for name, layer in state["model"].items():
        if name.startswith("layer_"):
            assert torch.equal(layer, full("stacked")[int(name.removeprefix("layer_"))])
    assert torch.equal(state["replicated"], full("replicated"))
    assert torch.equal(state["scalar"], full("scalar"))
    assert state["fp8"].getvalue() == b"scales"
    assert state["local"] == f"of rank {rank}"
    assert state["optimizer"]["param_groups"] == [{"lr_mult": 1.0, "params": [0, 1]}, {"lr_mult": 0.1}]
    assert state["optimizer"]["step"] == 7


def save_alone(directory: Path, **changes: Any) -> Path:
    return store.save({**sharded(0, 1), **changes}, directory, {"step": 3}).wait()


def run_ranks(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on ``size`` new processes with gloo initialised; fails where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run, args=(size, port, function, arguments), nprocs=size)


def _run(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    function(rank, *arguments)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- one rank


def test_saves_and_loads_without_process_groups(tmp_path: Path) -> None:
    hf = tmp_path / "hf_files"
    hf.mkdir()
    (hf / "tokenizer.json").write_text("{}")
    directory = store.step_directory(tmp_path / "run", 3)
    state = sharded(0, 1)
    store.save(state, directory, {"step": 3, "model": {"name": "tiny"}}, hf_files=hf).wait()
    assert store.read_meta(directory) == {"step": 3, "model": {"name": "tiny"}}
    assert store.latest(tmp_path / "run") == directory
    assert (directory / "hf" / "tokenizer.json").read_text() == "{}"
    assert "hf/tokenizer.json" in json.loads((directory / MANIFEST).read_text())["files"]
    assert isinstance(state["model"]["rows"], ShardedTensor), "the state dict handed in is left as it is"
    check_loaded(store.load(sharded(0, 1, empty=True), directory), 0, 1)


def test_loads_into_the_tensors_that_are_there(tmp_path: Path) -> None:
    directory = save_alone(tmp_path / "step_00000003")
    wanted = sharded(0, 1, empty=True)
    target = wanted["model"]["rows"].data
    state = store.load(wanted, directory)
    assert state["model"]["rows"].data_ptr() == target.data_ptr()
    assert torch.equal(target, full("rows"))


def test_converts_floating_point_precision(tmp_path: Path) -> None:
    directory = tmp_path / "step_00000001"
    store.save(sharded(0, 1, dtype=torch.bfloat16), directory, {}).wait()
    state = store.load(sharded(0, 1, empty=True), directory)
    assert torch.equal(state["model"]["rows"], full("rows", torch.bfloat16).float())


def test_factories_split_on_save_and_merge_on_load(tmp_path: Path) -> None:
    def build(key: str, data: torch.Tensor, replica_id: Any, flattened_range: Any) -> dict[str, ShardedTensor]:
        gate, up = data.chunk(2)
        return {
            "gate": ShardedTensor.from_rank_offsets(key, gate, (0, 0, 2)),
            "up": ShardedTensor.from_rank_offsets(key, up, (0, 1, 2)),
        }

    def factory(data: torch.Tensor) -> dict[str, Any]:
        return {"fc1": ShardedTensorFactory("fc1", data, build, lambda parts: torch.cat([parts["gate"], parts["up"]]))}

    value = torch.randn(6, 3)
    store.save(factory(value), tmp_path / "c", {}).wait()
    assert torch.equal(store.load(factory(torch.zeros(6, 3)), tmp_path / "c")["fc1"], value)


def test_an_asynchronous_save_keeps_the_values_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = _hold_back_writing(monkeypatch)
    state = sharded(0, 1)
    meta = {"progress": {"step": 1}}
    pending = store.save(state, tmp_path / "step_00000001", meta, asynchronous=True)
    assert not pending.poll()
    meta["progress"]["step"] = 2
    assert not store.is_committed(tmp_path / "step_00000001")
    state["model"]["rows"].data.zero_()
    state["optimizer"]["step"].zero_()
    go_on.set()
    assert pending.wait() == tmp_path / "step_00000001"
    assert pending.poll()
    assert store.read_meta(pending.wait()) == {"progress": {"step": 1}}
    check_loaded(store.load(sharded(0, 1, empty=True), pending.wait()), 0, 1)


def _hold_back_writing(monkeypatch: pytest.MonkeyPatch) -> Any:
    go_on, original = threading.Event(), torch_dist.write_pieces

    @functools.wraps(original)
    def waits(*arguments: Any, **named: Any) -> Any:
        assert go_on.wait(60)
        return original(*arguments, **named)

    monkeypatch.setattr(store, "write_pieces", waits)
    return go_on


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failing_writer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_dist, "_write_piece", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.save(sharded(0, 1), tmp_path / "step_00000001", {}, asynchronous=asynchronous).wait()
    assert store.latest(tmp_path) is None


def test_values_that_could_not_be_loaded_are_refused_at_the_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="could not be loaded again"):
        save_alone(tmp_path / "c", odd=fractions.Fraction(1, 3))
    with pytest.raises(TypeError, match="JSON"):
        store.save(sharded(0, 1), tmp_path / "c", {"path": Path("x")})


def test_gaps_and_overlaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows: its 1 pieces hold 24 of 48 elements"):
        save_alone(tmp_path / "c", model={"rows": sharded(0, 2)["model"]["rows"]})


def test_large_parts_are_split_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dist, "MAX_FILE_BYTES", 100)
    directory = save_alone(tmp_path / "c")
    assert len(list(directory.glob("*.distcp"))) > 4
    check_loaded(store.load(sharded(0, 1, empty=True), directory), 0, 1)


def test_megatron_and_torch_read_the_same_folder(tmp_path: Path) -> None:
    directory = save_alone(tmp_path / "c")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            check_loaded(megatron_load(sharded(0, 1, empty=True), str(directory)), 0, 1)
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- several ranks


def test_two_ranks(tmp_path: Path) -> None:
    run_dir, of_one, failing = tmp_path / "run", tmp_path / "of_one", tmp_path / "failing"
    save_alone(of_one)
    run_ranks(_two_ranks, 2, run_dir, of_one, failing)
    for name in ("step_00000001", "step_00000002"):
        check_loaded(store.load(sharded(0, 1, empty=True), run_dir / name), 0, 1)
    # Two replicated tensors: rank 0 writes both, or one each where they share the work.
    names = ("replicated", "scalar")
    for step, writers in ((1, {"0", "1"}), (2, {"0"})):
        with torch_dist.Reader(store.step_directory(run_dir, step)) as reader:
            assert {chunk.file.split("_")[2] for name in names for chunk in reader.tensors[name].chunks} == writers
    assert store.latest(failing) == store.step_directory(failing, 2)


def _two_ranks(rank: int, run_dir: Path, of_one: Path, failing: Path) -> None:
    # One start of two processes for all of them, as that is what takes the time.
    group = store.new_io_group()
    _two_ranks_save(rank, run_dir, group)
    _two_ranks_load(rank, of_one)
    _one_rank_fails(rank, failing, group)


def _two_ranks_save(rank: int, run_dir: Path, group: dist.ProcessGroup | None) -> None:
    store.save(sharded(rank, 2), store.step_directory(run_dir, 1), {}, group=group, replicas=dist.group.WORLD)
    pending = store.save(sharded(rank, 2), store.step_directory(run_dir, 2), {}, asynchronous=True, group=group)
    total = torch.ones(1)
    dist.all_reduce(total)  # Training goes on over its own group meanwhile.
    assert total == 2
    pending.wait()
    assert store.latest(run_dir) == store.step_directory(run_dir, 2)
    check_loaded(store.load(sharded(rank, 2, empty=True), store.step_directory(run_dir, 2)), rank, 2)
    with pytest.raises(ValueError, match="process group of its own"):
        store.save(sharded(rank, 2), store.step_directory(run_dir, 9), {}, asynchronous=True)


def _two_ranks_load(rank: int, of_one: Path) -> None:
    check_loaded(store.load(sharded(rank, 2, empty=True), of_one), rank, 2)
    # What one rank cannot load, none does; and each says why.
    wanted = sharded(rank, 2, empty=True)
    if rank == 1:
        wanted["new"] = ShardedTensor.from_rank_offsets("new", torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"has no tensor new \[2\]"):
        store.load(wanted, of_one)


def _one_rank_fails(rank: int, run_dir: Path, group: dist.ProcessGroup | None) -> None:
    write_piece = torch_dist._write_piece

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        torch_dist._write_piece = full_disk
    pending = store.save(sharded(rank, 2), store.step_directory(run_dir, 1), {}, asynchronous=True, group=group)
    with pytest.raises(OSError if rank == 1 else CheckpointError, match="No space left on device"):
        pending.wait()
    with pytest.raises(OSError if rank == 1 else CheckpointError, match="No space left on device"):
        pending.poll()
    dist.barrier()
    assert not list(run_dir.iterdir()), "nothing of it is left"
    torch_dist._write_piece = write_piece
    store.save(sharded(rank, 2), store.step_directory(run_dir, 2), {}, asynchronous=True, group=group).wait()
    dist.barrier()
    assert not list(run_dir.glob("*.tmp"))


# ---------------------------------------------------------------------------------------------- killed and damaged

KILLED = """
import sys, time
from pathlib import Path
from megatron_unimm.checkpoint import store, torch_dist
from test_store import sharded
write_piece = torch_dist._write_piece
def slow(*arguments):
    chunk = write_piece(*arguments)
    print("written", flush=True)
    time.sleep(60)
    return chunk
run_dir = Path(sys.argv[1])
store.save(sharded(0, 1), store.step_directory(run_dir, 1), {}).wait()
torch_dist._write_piece = slow
store.save(sharded(0, 1), store.step_directory(run_dir, 2), {}, asynchronous=True).wait()
"""


def test_a_killed_save_leaves_the_last_good_one(tmp_path: Path, repo: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    path = f"{repo}{os.pathsep}{Path(__file__).parent}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repo, env={**os.environ, "PYTHONPATH": path}) as process:
        assert process.stdout is not None
        # Two threads say so, and may do it in one breath.
        assert process.stdout.readline().startswith(b"written")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "step_00000002.tmp").is_dir()
    assert store.latest(tmp_path) == store.step_directory(tmp_path, 1)
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        store.load(sharded(0, 1, empty=True), tmp_path / "step_00000002.tmp")
    check_loaded(store.load(sharded(0, 1, empty=True), store.step_directory(tmp_path, 1)), 0, 1)
    save_alone(store.step_directory(tmp_path, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_alone(store.step_directory(tmp_path, 3))


def test_every_damaged_file_is_found_and_named(saved: Path) -> None:
    for path in sorted(path for path in saved.iterdir() if path.name != MARKER):
        good = path.read_bytes()
        path.write_bytes(good[:-2] + bytes([good[-2] ^ 1]) + good[-1:])
        with pytest.raises(CheckpointError, match=f"{path.name}: damaged"):
            store.load(sharded(0, 1, empty=True), saved)
        path.write_bytes(good[:-1])
        with pytest.raises(CheckpointError, match=f"{path.name}: damaged"):
            store.load(sharded(0, 1, empty=True), saved)
        assert not store.is_committed(saved)
        path.write_bytes(good)
    (saved / "__0_1.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_1.distcp: damaged: the file is missing"):
        store.load(sharded(0, 1, empty=True), saved)


def test_nothing_is_read_from_a_changed_pickle(saved: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in (".metadata", "common.pt"):
        (saved / name).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(sharded(0, 1, empty=True), saved)
    assert not (tmp_path / "ran").exists()


def test_unfinished_and_foreign_folders_are_refused(saved: Path, tmp_path: Path) -> None:
    (saved / MARKER).unlink()
    cases = {
        saved: "not a finished checkpoint",
        tmp_path / "nowhere": "no such folder",
        tmp_path: "name one of its step_ folders",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            store.load(sharded(0, 1, empty=True), path)
    assert store.latest(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("rows", torch.zeros(ROWS, 7), r"tensor rows is \[8, 6\] torch.float32 there, but the model has \[8, 7\]"),
        ("rows", torch.zeros(ROWS, COLUMNS, dtype=torch.long), r"but the model has \[8, 6\] torch.int64"),
        ("other", torch.zeros(3), r"has no tensor other \[3\]: a checkpoint of another architecture"),
    ],
)
def test_another_architecture_is_named(saved: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    wanted = sharded(0, 1, empty=True)
    wanted["model"][name] = ShardedTensor.from_rank_offsets(name, tensor)
    with pytest.raises(CheckpointError, match=message):
        store.load(wanted, saved)


def test_left_over_and_absent_tensors(saved: Path) -> None:
    wanted = sharded(0, 1, empty=True)
    del wanted["model"]["rows"]
    with pytest.raises(CheckpointError, match=r"tensor rows \[8, 6\] has no place in the model"):
        store.load(wanted, saved)
    assert torch.equal(store.load(wanted, saved, may_be_unread=["ro*"])["replicated"], full("replicated"))
    head = torch.full((2,), 5.0)
    wanted["head"] = ShardedTensor.from_rank_offsets("vision_head.bias", head)
    state = store.load(wanted, saved, may_be_unread=["rows"], may_be_absent=["vision_head.*"])
    assert torch.equal(state["head"], torch.full((2,), 5.0))
    assert torch.equal(store.load(wanted, saved, strict=False)["scalar"], full("scalar"))


def test_fp8_state_may_be_absent(tmp_path: Path) -> None:
    state = sharded(0, 1)
    del state["fp8"]
    directory = store.save(state, tmp_path / "c", {}).wait()
    assert store.load(sharded(0, 1, empty=True), directory)["fp8"] is None
    with pytest.raises(CheckpointError, match="has no object rng"):
        store.load({"rng": ShardedObject("rng", None, (1,), (0,))}, directory)


def test_padding_of_the_vocabulary_may_differ(tmp_path: Path) -> None:
    def embedding(rows: int) -> dict[str, Any]:
        data = torch.arange(rows, dtype=torch.float32).unsqueeze(1)
        return {"e": ShardedTensor.from_rank_offsets("e", data, allow_shape_mismatch=True)}

    store.save(embedding(6), tmp_path / "c", {}).wait()
    assert store.load(embedding(8), tmp_path / "c")["e"].flatten().tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert store.load(embedding(4), tmp_path / "c")["e"].flatten().tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------- what is kept


def make_steps(run_dir: Path, *steps: int) -> None:
    for step in steps:
        store.save({"x": ShardedTensor.from_rank_offsets("x", torch.zeros(1))}, store.step_directory(run_dir, step), {})


def steps_in(run_dir: Path) -> list[int]:
    return sorted(int(match[1]) for path in run_dir.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def test_prune_keeps_the_last_and_the_milestones(tmp_path: Path) -> None:
    make_steps(tmp_path, 100, 200, 300, 400, 500)
    gone = store.prune(tmp_path, keep_last=2, keep_every_steps=200)
    assert [path.name for path in gone] == ["step_00000100", "step_00000300"]
    assert steps_in(tmp_path) == [200, 400, 500]
    assert store.prune(tmp_path, keep_last=2, keep_every_steps=200) == []
    store.prune(tmp_path, keep_last=1)
    assert steps_in(tmp_path) == [500]


def test_prune_counts_only_good_ones(tmp_path: Path) -> None:
    make_steps(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step_00000001" / MARKER).unlink()
    (tmp_path / "step_00000004" / MARKER).unlink()
    (tmp_path / "step_00000003" / "index.json").write_text("")
    assert store.latest(tmp_path) == store.step_directory(tmp_path, 2)
    store.prune(tmp_path, keep_last=1)
    # 1 never got its marker and is old; 3 is damaged, for someone to look at; 4 might be just being committed.
    assert steps_in(tmp_path) == [2, 3, 4]
    assert store.prune(tmp_path / "nowhere", keep_last=1) == []


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_alone(tmp_path / "step_00000003", scalar=ShardedTensor.from_rank_offsets("scalar", torch.tensor(1.0)))
    before = time.time()
    save_alone(tmp_path / "step_00000003")
    check_loaded(store.load(sharded(0, 1, empty=True), tmp_path / "step_00000003"), 0, 1)
    assert (tmp_path / "step_00000003" / MARKER).stat().st_mtime >= before - 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
