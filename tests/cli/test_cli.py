"""The command line as a user meets it: help, exit codes, and errors of one line."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from megatron_unimm.cli import main
from megatron_unimm.errors import UserError


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """All commands under a group, as words."""
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += [(*path, name)] + (commands(command, (*path, name)) if isinstance(command, click.Group) else [])
    return found


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Adds a command ``fail`` that raises."""

    def add(error: BaseException) -> None:
        @click.command("fail")
        def fail() -> None:
            raise error

        monkeypatch.setitem(main.unimm.commands, "fail", fail)

    return add


def test_help_is_there_at_once() -> None:
    """Measured 0.15 s. The best of three, and a wide limit, for busy machines; an import of torch alone takes 2 s."""

    def seconds() -> float:
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "megatron_unimm.cli", "--help"], check=True, capture_output=True)
        return time.monotonic() - started

    assert min(seconds() for _ in range(3)) < 1.5


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, megatron_unimm.cli.main; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not {"torch", "megatron", "pydantic", "numpy", "rich"} & set(found.stdout.split())


@pytest.mark.parametrize("path", commands(main.unimm), ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*path, "--help"], capsys)
    assert code == 0
    if path not in (("convert",), ("data",), ("health",)):  # groups list their commands
        assert "Example" in out
        assert f"unimm {' '.join(path)}" in out.split("Example")[1]


def test_no_arguments_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([], capsys)
    assert code == 2
    assert "train" in out + err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "error: unimm: No such command 'trian'."),
        (["train"], "error: unimm train: Missing argument 'RECIPE'."),
        (["train", "x.yaml", "--stag", "sft"], "error: unimm train: No such option"),
        (["data", "shapes", "--to", "x", "--count", "0"], "error: unimm data shapes: Invalid value for '--count'"),
        (["train", "nowhere/x.yaml"], "error: nowhere/x.yaml: no such recipe"),
        (
            ["train", "configs/orion/shapes.yaml"],
            "error: stage: recipe orion_shapes has 4 stages, choose one with --stage",
        ),
        (
            ["train", "configs/orion/shapes.yaml", "--stage", "stf"],
            "error: stage: recipe orion_shapes has no stage stf, did",
        ),
        (
            ["train", "configs/orion/shapes.yaml", "train.optimizer.beta3=1"],
            "error: train.optimizer.beta3: unknown key on the command line, did you mean beta2?",
        ),
        (["convert", "inspect", "nowhere"], "error: unimm convert inspect: Invalid value for 'PATH'"),
    ],
)
def test_wrong_usage_and_config_is_one_line(
    arguments: list[str], line: str, repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo)
    code, out, err = run(arguments, capsys)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_user_error(raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    raising(UserError("a.b", "5, wanted 4;\n  take 4"))
    assert run(["fail"], capsys) == (2, "", "error: a.b: 5, wanted 4; take 4\n")


def test_rank_is_named_under_a_launcher(
    raising: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    raising(UserError("a", "b"))
    assert run(["fail"], capsys)[2] == "[rank 3] error: a: b\n"


def test_interrupt(raising: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]) -> None:
    raising(KeyboardInterrupt())
    code, _, err = run(["fail"], capsys)
    assert code == 130
    assert "Traceback" not in err


def test_mistakes_of_ours_keep_their_traceback(raising: Callable[[BaseException], None]) -> None:
    raising(AssertionError("ours"))
    with pytest.raises(AssertionError, match="ours"):
        main.run(["fail"])


def test_codes_of_commands_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("requeue")
    def requeue() -> int:
        return 75

    monkeypatch.setitem(main.unimm.commands, "requeue", requeue)
    assert main.run(["requeue"]) == 75


def test_train_hands_on_its_arguments(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repo)
    monkeypatch.delenv("RUNS", raising=False)
    calls = []
    stand_in = SimpleNamespace(train_stage=lambda *args, **kwargs: calls.append((args, kwargs)) or 75)
    monkeypatch.setitem(sys.modules, "megatron_unimm.train.run", stand_in)
    recipe = "configs/orion/shapes.yaml"
    assert run(["train", recipe, "--stage", "sft", "train.steps=3"], capsys)[0] == 75
    assert run(["train", recipe, "--stage", "sft", "--run-dir", "x", "--resume", "never"], capsys)[0] == 75
    (first, options), (_, second) = calls
    assert (first[0].name, first[1].name, first[1].train.steps) == ("orion_shapes", "sft", 3)
    assert options == {"run_dir": Path("runs/orion_shapes"), "resume": "auto"}
    assert second == {"run_dir": Path("x"), "resume": "never"}


def test_shapes_then_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["data", "shapes", "--to", str(tmp_path), "--count", "10"], capsys)
    assert code == 0
    assert "understanding" in out
    code, out, _ = run(["data", "inspect", str(tmp_path / "train"), "--count", "1", "--check"], capsys)
    assert code == 0
    assert "text_to_image.jsonl: " in out
    assert "user      " in out
    assert "0 of " in out

    images = tmp_path / "train" / "text_to_image.jsonl"
    lines = images.read_text().splitlines()
    images.write_text("\n".join([json.dumps({"conversations": []}), *lines[1:]]))
    code, out, _ = run(["data", "inspect", str(images), "--check", "--count", "0"], capsys)
    assert code == 1
    assert f"{images}:1: " in out
    code, _, err = run(["data", "shapes", "--to", str(tmp_path), "--count", "10"], capsys)
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    """The environment of the tests can train on CPU, so the doctor is content."""
    code, out, _ = run(["doctor"], capsys)
    assert code == 0
    for name in ("torch", "megatron-core", "transformer-engine", "apex", "memory", "disk"):
        assert name in out


def test_doctor_on_missing_and_broken_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_unimm.cli.doctor import _check_module

    (tmp_path / "broken_package.py").write_text("raise OSError('libsomething.so')")
    (tmp_path / "half_package.py").write_text("import no_such_dependency")
    (tmp_path / "old_package.py").write_text("__version__ = '1.2'")
    monkeypatch.syspath_prepend(str(tmp_path))

    def state(name: str, *, required: bool) -> tuple[str, bool]:
        finding = _check_module(name, ">=2", "pip install it", required=required)
        return finding.state, finding.is_fatal

    assert state("no-such-package", required=True) == ("missing", True)
    assert state("no-such-package", required=False) == ("optional", False)
    assert state("broken-package", required=True) == ("broken", True)
    assert state("half-package", required=True) == ("broken", True)
    assert state("old-package", required=True) == ("too old or new", True)
