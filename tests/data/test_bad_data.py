"""Every kind of malformed data is told of with its reason, and costs nothing but itself."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_unimm.cli.main import run
from megatron_unimm.config.data import DataConfig, SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.images import decode, image_size
from megatron_unimm.data.sources.opening import open_source
from megatron_unimm.data.sources.source import Source

pytestmark = pytest.mark.timeout(120)

LIMIT = DataConfig().max_image_pixels


@pytest.fixture(scope="module")
def maker(repo: Path) -> Iterator[ModuleType]:
    """tools/make_bad_data.py, whose tables say what is expected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo / "tools"))
        import make_bad_data

        yield make_bad_data


@pytest.fixture(scope="module")
def folder(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad") / "data"


@pytest.fixture(scope="module")
def sources(maker: ModuleType, folder: Path) -> list:
    return maker.make_bad_data(folder)


def fault_of(source: Source, index: int) -> SampleError | None:
    """What is found wrong with a sample when it is read as training reads it."""
    try:
        for file in source[index].images:
            width, height = image_size(file, LIMIT)
            assert decode(file, LIMIT).shape == (height, width, 3)
    except SampleError as error:
        return error
    return None


def test_there_are_many_kinds(maker: ModuleType) -> None:
    tables = (maker.IMAGES, maker.NO_FILES, maker.LINES, maker.SHARDS, maker.TABLES, maker.CAPTIONS)
    assert sum(map(len, tables)) + len(maker.broken_archives()) + len(maker.broken_tables()) > 100


def test_every_kind_is_told_and_passed_over(sources: list, folder: Path) -> None:
    wrong = []
    for bad in sources:
        source = open_source(SourceConfig(path=str(folder / bad.path), kind=bad.kind), "bad")
        found = [fault_of(source, index) for index in range(len(source))]
        for index, (name, expected, error) in enumerate(zip(bad.names, bad.faults, found, strict=False)):
            # Pillow refuses the largest images itself.
            is_bomb = expected == "image too large" and "decompression bomb" in str(error)
            if (error and error.fault) != expected and not is_bomb:
                wrong.append(f"{bad.path}[{index}], {name}: expected {expected}, got {error and error.fault}: {error}")
            if error is not None:
                text = str(error)
                text.encode()  # Can be written to a log.
                assert str(folder) in text
                assert str(folder) in source.where(index)
                assert len(text) < 12_000
        if len(found) != len(bad.faults):
            wrong.append(f"{bad.path}: {len(found)} samples, expected {len(bad.faults)}")
    assert not wrong, "\n".join(wrong)


def test_packing_keeps_what_is_good(sources: list, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same through the command: the good ones are packed, every bad one is one line."""
    for path in ("images/images.jsonl", "lines/lines.jsonl", "shards", "tables", "captions"):
        bad = next(source for source in sources if source.path == path)
        to = folder.parent / f"packed-{Path(path).name}"
        arguments = ["data", "pack", "--from", str(folder / path), "--to", str(to), "--kind", bad.kind, "--decode"]
        assert run(arguments) == 0
        printed = capsys.readouterr()
        num_bad = sum(fault is not None for fault in bad.faults)
        assert len(printed.err.splitlines()) == num_bad
        assert all(line.startswith("left out (") for line in printed.err.splitlines())
        packed = open_source(SourceConfig(path=str(to), kind="text_to_image"), "packed")
        assert len(packed) == len(bad.faults) - num_bad
        assert all(fault_of(packed, index) is None for index in range(len(packed)))


def test_inspect_tells_the_reasons(sources: list, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = next(source for source in sources if source.path == "shards")
    assert run(["data", "inspect", str(folder / "shards"), "--check", "--count", "0", "--kind", "text_to_image"]) == 1
    out = capsys.readouterr().out
    assert f"of {len(bad.faults)} cannot be used" in out
    assert "(unsafe member)" in out
    assert "(damaged file)" in out
