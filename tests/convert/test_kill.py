"""A conversion that is killed: its target is never taken for finished, and a second run succeeds."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_unimm.checkpoint import manifest
from megatron_unimm.checkpoint.manifest import MARKER, is_committed
from megatron_unimm.convert import export as export_module
from megatron_unimm.convert import export_checkpoint, import_checkpoint, verify
from megatron_unimm.errors import CheckpointError

KILLS = 10
Work = Callable[[Path, Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 40 MB, so that a conversion takes a noticeable time, in several files."""
    text = {
        "vocab_size": 20000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 16, 16], "rope_theta": 1e6},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 384}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "fullatt_block_indexes": [1]},
        image_token_id=90,
        vision_start_token_id=91,
        vision_end_token_id=92,
    )
    folder = tmp_path_factory.mktemp("source")
    Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10MB")
    return folder


def started(work: Work, source: Path, target: Path) -> multiprocessing.Process:
    # A fork has everything imported; what is timed is the conversion.
    process = multiprocessing.get_context("fork").Process(target=work, args=(source, target))
    process.start()
    return process  # type: ignore[return-value]


def kill_at_random_points(work: Work, source: Path, target: Path, finished: Callable[[Path], bool]) -> None:
    process = started(work, source, target)
    begin = time.monotonic()
    process.join()
    duration = time.monotonic() - begin
    assert process.exitcode == 0
    assert finished(target)
    shutil.rmtree(target)
    chance = random.Random(0)
    early = 0
    for _ in range(KILLS):
        process = started(work, source, target)
        time.sleep(chance.uniform(0, duration))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if finished(target):  # the kill came too late; where that is often, the machine was busier before
            shutil.rmtree(target)
            duration *= 0.7
            continue
        early += 1
        work(source, target)
        assert finished(target)
        assert not list(target.parent.glob("*.tmp")), "nothing half-written stays behind"
        assert verify(source, target).identical
        shutil.rmtree(target)
    assert early >= KILLS // 2


def test_killed_imports(source: Path, tmp_path: Path) -> None:
    kill_at_random_points(import_checkpoint, source, tmp_path / "checkpoint", is_committed)


def test_killed_exports(source: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    import_checkpoint(source, checkpoint)
    # The folder gets its name when all is in it: that it is there says that it is whole.
    kill_at_random_points(export_checkpoint, checkpoint, tmp_path / "back", Path.is_dir)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def test_killed_just_before_the_marker(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest window: all is written and named, but not marked as finished."""
    target, write = tmp_path / "checkpoint", manifest.write_bytes

    def killed_at_marker(path: Path, data: bytes) -> manifest.FileRecord:
        if path.name == MARKER:
            raise Killed
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_bytes", killed_at_marker)
        with pytest.raises(Killed):
            import_checkpoint(source, target)
    assert target.is_dir()
    assert not is_committed(target)
    with pytest.raises(CheckpointError, match="not a finished checkpoint"):
        export_checkpoint(target, tmp_path / "back")
    import_checkpoint(source, target)
    assert verify(source, target).identical


def test_an_error_half_way_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle: the error is told, and what was written goes away."""
    checkpoint = tmp_path / "checkpoint"
    import_checkpoint(source, checkpoint)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "_write_companions", full)
    with pytest.raises(OSError, match="No space left"):
        export_checkpoint(checkpoint, tmp_path / "back")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
