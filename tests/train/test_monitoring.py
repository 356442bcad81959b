"""What a run writes for people to read: TensorBoard, the console, the log."""

import io
import json
import logging
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from megatron.core.transformer import transformer_config
from megatron.core.transformer.moe.router import TopKRouter
from rich.console import Console as RichConsole
from rich.logging import RichHandler
from small_orion import make_row, small_stage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.loader import StepBatch
from megatron_unimm.data.plan import BadSample
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import log, setup
from megatron_unimm.train.attempt import AttemptLog
from megatron_unimm.train.callbacks.base import Callback
from megatron_unimm.train.callbacks.console import Console, skipped_line, summary
from megatron_unimm.train.callbacks.default import default_callbacks
from megatron_unimm.train.callbacks.metrics_file import MetricsFile
from megatron_unimm.train.callbacks.moe_balance import MoEBalance
from megatron_unimm.train.callbacks.tensorboard import TensorBoard, scalars
from megatron_unimm.train.events import EventLog
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.poison import SkippedSteps
from megatron_unimm.train.record import Record
from megatron_unimm.train.safety import Safety
from megatron_unimm.train.saving import Saver
from megatron_unimm.train.step import TrainStep
from megatron_unimm.train.stragglers import Straggler
from megatron_unimm.train.watchdog import Watchdog
from megatron_unimm.train.wording import clock, compact

MOE = "model.backbone.moe={num_experts: 4, top_k: 2, expert_mlp_size: 32}"
SCALARS = {
    *(f"{group}/{term}" for group in ("loss", "loss_weighted") for term in ("cross_entropy", "mse", "kl")),
    "loss_weighted/total",
    "learning_rate/x1",
    "gradient_norm/all",
    "gradient_norm/vision_encoder",
    "gradient_norm/vision_head",
    *(f"gradient_norm/backbone.{part}" for part in ("embedding", "decoder", "output_layer")),
    "skipped_steps/all",
    "skipped_steps/since_last_record",
    *(f"speed/{unit}_per_second" for unit in ("tokens", "images", "samples")),
    "speed/step_seconds",
    "speed/model_tflops_per_device",
    "speed/mfu",
    *(f"time/{phase}" for phase in ("data", "forward_backward", "reduce", "optimizer", "save", "other")),
    *(f"goodput/{what}" for what in ("share", "restarts", "lost_steps")),
    "memory/peak_gib",
    "data/padding_share",
    "data/faults/all",
    "data/faults/drawn/too_long",
    "data/faults/understanding/broken_image",
    *(f"data/{share}/{source}" for share in ("share", "share_requested") for source in ("understanding", "drawn")),
    "moe/imbalance/layer_00",
    "moe/imbalance/layer_01",
}
"""Every tag of a run with experts, and with bad samples of two kinds."""


class Rows:
    """A loader of the same two rows for ever."""

    def __init__(self, stage: StageConfig) -> None:
        self.rows = [make_row(stage), make_row(stage)]

    def __next__(self) -> StepBatch:
        drawn = {"understanding": 1, "drawn": 3}
        left_out = BadSample("drawn", SampleError("somewhere", "is too long", "too long"))
        broken = BadSample("understanding", SampleError("elsewhere", "is broken", "unreadable image"))
        return StepBatch(0, self.rows, drawn, [left_out], [broken])

    def state_dict(self) -> dict[str, int]:
        return {}

    def waiting_for(self) -> str:
        return "nothing"

    def close(self) -> None: ...


@pytest.fixture
def stage(repo: Path) -> StageConfig:
    return small_stage(
        repo,
        MOE,
        f"data.tokenizer={repo}/tools/base_models/shapes_vlm",
        "data.sources={understanding: {path: x, kind: understanding, weight: 1}, "
        "drawn: {path: x, kind: text_to_image, weight: 4}, text_to_image: null, editing: null}",
        "train.logging={every_steps: 1, text_every_steps: 2, peak_tflops: 1.0e-3}",
    )


@pytest.fixture
def keep_signals() -> Iterator[None]:
    """The loop takes signals over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def keep_logging() -> Iterator[None]:
    """setup_logging() is for a process of its own."""
    loggers = [logging.getLogger(name) for name in (None, log.PACKAGE, "py.warnings")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings():
        warnings.resetwarnings()
        yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.level, logger.handlers = level, handlers
        logger.manager._clear_cache()


def make_loop(stage: StageConfig, world: tuple, folder: Path, steps: int, callbacks: list[Callback]) -> Loop:
    """A loop with a real model and optimizer, without data files and checkpoints."""
    platform, groups = world
    method, chunks = setup.build_model(stage, platform, groups)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    step = TrainStep(stage, method, wrapped, build_optimizer(wrapped, stage, groups), platform, groups)
    saver = SimpleNamespace(under_way=lambda: None, poll=lambda: None, is_free=lambda _: False, finish=lambda *_: None)
    watchdog = Watchdog(folder, None, EventLog(folder, 0))
    safety = Safety(cast("Saver", saver), watchdog, SkippedSteps(folder / "skipped_steps.jsonl", groups))
    return Loop(stage, steps, Rows(stage), step, safety, callbacks)


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    return events.Reload()


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")}


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.mark.usefixtures("keep_signals")
def test_tensorboard_of_a_run_and_of_its_resume(
    stage: StageConfig, world: tuple[Platform, ParallelGroups], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every tag is there, on the stage's steps; after a resume at an earlier step nothing is drawn twice."""
    caplog.set_level(logging.INFO)
    make_loop(stage, world, tmp_path, 4, default_callbacks(stage, AttemptLog(tmp_path, ["sft"]))).run()
    events = read(tmp_path / "tensorboard")
    assert set(events.Tags()["scalars"]) == SCALARS
    assert all(list(curve(events, tag)) == [1, 2, 3, 4] for tag in SCALARS)
    assert curve(events, "data/share/drawn")[4] == 0.75
    assert curve(events, "data/share_requested/drawn")[4] == pytest.approx(0.8)
    assert curve(events, "data/faults/drawn/too_long")[4] == 4
    tflops, mfu = curve(events, "speed/model_tflops_per_device"), curve(events, "speed/mfu")
    assert mfu[4] == pytest.approx(tflops[4] / 1e-3)
    assert "num_experts: 4" in texts(events, "config")[0]
    assert "| `*` | 0.0001 |" in texts(events, "trainable")[0]
    samples = texts(events, "samples")
    assert list(samples) == [1, 2, 4]
    for word in ("**read**", "**drawn**", "prompt", "label", "predicted", "<20 visual tokens>"):
        assert word in samples[4]
    lines = [record.message for record in caplog.records if record.name.endswith("callbacks.console")]
    assert len(lines) == 4
    assert lines[0].startswith("step 1/4  ce ")

    resumed = make_loop(stage, world, tmp_path, 5, [TensorBoard(stage, tmp_path / "tensorboard")])
    resumed.step = 2
    resumed.run()
    again = read(tmp_path / "tensorboard")
    steps = [event.step for event in again.Scalars("loss/mse")]
    assert steps == [1, 2, 3, 4, 5]
    assert curve(again, "loss/mse")[2] == curve(events, "loss/mse")[2]
    assert curve(again, "loss/mse")[3] != curve(events, "loss/mse")[3], "of the second run, which began anew"


@pytest.mark.usefixtures("keep_signals")
def test_text_samples_show_what_the_model_predicts(
    stage: StageConfig, world: tuple[Platform, ParallelGroups], tmp_path: Path
) -> None:
    """Against the arg max of logits computed apart, before the first step."""
    loop = make_loop(stage, world, tmp_path, 1, [TensorBoard(stage, tmp_path)])
    row = loop.loader.rows[0]
    chunk = loop.train_step.chunks[0].module
    kept = []
    chunk.text_observer = kept.append
    with torch.no_grad():
        chunk(loop.train_step.method.batch(row, chunk, loop.platform.device))
    chunk.text_observer = None
    loop.run()
    labelled = (row.labels != -100).nonzero()[0]
    first_sample = kept[0].argmax(dim=-1).numpy()[labelled < row.segment_bounds[1]]
    text = setup.chat_format(stage).tokenizer.decode(first_sample.tolist())
    assert all(line in texts(read(tmp_path), "samples")[1] for line in text.split("\n"))


@pytest.mark.usefixtures("keep_signals")
def test_imbalance_of_a_router_that_always_takes_the_same(
    stage: StageConfig, world: tuple[Platform, ParallelGroups], tmp_path: Path
) -> None:
    """With zero weights all experts tie, and the same two of four get every token: twice the mean."""
    records: list[Record] = []

    class Keep(Callback):
        def on_record(self, loop: Loop, record: Record) -> None:
            records.append(record)

    loop = make_loop(stage, world, tmp_path, 2, [MoEBalance(), Keep()])
    for module in loop.train_step.chunks[0].modules():
        if isinstance(module, TopKRouter):
            module.weight.data.zero_()
            module.weight.requires_grad_(False)
    loop.train_step.forward_backward(loop.loader.rows)
    loop.run()
    assert records[0].extra["moe/imbalance/layer_00"] == 2.0


def make_record(**fields: object) -> Record:
    numbers = dict(step=120, total_steps=300, skipped_steps=0, skipped_now=0, memory_bytes=2**30, total_loss=0.5)
    speeds = dict(tokens_per_second=5234.0, images_per_second=3.0, samples_per_second=8.0, step_seconds=0.72)
    rest = dict(
        losses={"cross_entropy": 0.5123, "mse": 0.034},
        weighted={"cross_entropy": 0.5123, "mse": 0.034},
        learning_rates={"x1": 9.1e-5, "x0.1": 9.1e-6},
        module_norms={"vision_head": 0.2},
        gradient_norm=0.831,
        padding_share=0.1,
        draws=Counter(),
        faults={},
        model_tflops=400.0,
        mfu=None,
    )
    return Record(**(numbers | speeds | rest | fields))  # type: ignore[arg-type]


def test_the_line_of_a_record() -> None:
    line = "ce 0.512  mse 0.034  |g| 0.831  lr 9.1e-05  5.2k tok/s  0 skipped"
    assert summary(make_record()) == line
    assert "  mfu 40.4%  " in summary(make_record(mfu=0.4043))


def test_the_time_of_a_step_in_the_line() -> None:
    """Per cent, the largest first; what is below two is left out."""
    times = {"data": 0.03, "forward_backward": 0.8, "pipeline": 0.01, "reduce": 0.1, "optimizer": 0.06}
    assert "  5.2k tok/s (fb 80 reduce 10 opt 6 data 3 %)  " in summary(make_record(times=times))


def test_scalars_of_time_stragglers_and_goodput() -> None:
    ledger = dict(elapsed_seconds=20.0, wall_seconds=200.0, good_seconds=150.0, lost_steps=7, restarts=2)
    times = {"data": 0.1, "reduce": 0.2}
    tags = scalars(make_record(times=times, straggler=Straggler(37, "n5", 1.42), ledger=ledger), {})
    expected = {"time/data": 0.1, "time/reduce": 0.2, "straggler/rank": 37, "straggler/ratio": 1.42}
    expected |= {"goodput/share": 0.75, "goodput/restarts": 2, "goodput/lost_steps": 7}
    assert expected.items() <= tags.items()


@pytest.mark.usefixtures("world")
def test_records_after_a_resume(tmp_path: Path) -> None:
    """Those of steps that will be done again go, and so does one that was not written to its end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "los')
    file = MetricsFile(path)
    file.on_start(SimpleNamespace(step=2))
    file.on_record(SimpleNamespace(), make_record(step=3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_scalars_leave_out_what_is_not_known() -> None:
    tags = scalars(make_record(extra={"evaluation/score": 0.5}), {}, per_module=False)
    assert tags["evaluation/score"] == 0.5
    assert not {"speed/mfu", "gradient_norm/vision_head", "data/share/x"} & set(tags)


def test_a_skipped_step_names_the_worst_tensors() -> None:
    extra = {
        "skipped_tensor/backbone.a": 2.0,
        "skipped_tensor/vision_head.b": float("inf"),
        "moe/imbalance/layer_00": 1.0,
    }
    line = skipped_line(make_record(skipped_now=2, skipped_steps=5, extra=extra))
    assert line.startswith("step 120: 2 of the last steps skipped")
    assert line.endswith("(5 in all); largest in the last of them: vision_head.b inf, backbone.a 2")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (873.4, "873"), (5234, "5.2k"), (52_340, "52.3k"), (999_999, "1000k"), (3.2e10, "32.0G")],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (129.6, "02:10"), (3730, "1:02:10"), (273_600, "3d 04:00:00")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.usefixtures("world", "keep_logging")
def test_progress_bar_on_a_terminal(repo: Path) -> None:
    """It starts at the step of a resume, and a log line stands above it."""
    screen = io.StringIO()
    console = RichConsole(file=screen, force_terminal=True, width=160, color_system=None)
    logging.getLogger().addHandler(RichHandler(console=console))
    bar = Console()
    loop = SimpleNamespace(stage=small_stage(repo), total_steps=300, step=100)
    bar.on_start(loop)
    loop.step = 120
    bar.on_step(loop, None)
    bar.on_record(loop, make_record(skipped_now=1, skipped_steps=1))
    bar.on_end(loop)
    shown = screen.getvalue()
    assert "100/300" in shown
    assert "120/300" in shown
    assert "ce 0.512  mse 0.034" in shown
    assert "1 of the last steps skipped" in shown


@pytest.mark.usefixtures("keep_logging")
def test_log_of_another_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Warnings with the rank's number; nothing that the first rank says as well."""
    monkeypatch.setenv("RANK", "3")
    log.setup_logging()
    logging.getLogger("megatron_unimm.train").info("said by the first")
    logging.getLogger("megatron_unimm.train").warning("trouble here")
    warnings.warn("repeated by all", stacklevel=1)
    written = capsys.readouterr().err
    assert written.rstrip().endswith("[rank 3] trouble here")
    assert written.count("\n") == 1


@pytest.mark.usefixtures("keep_logging")
def test_log_of_the_first_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "0")
    log.setup_logging()
    log.setup_logging()  # a second call does not say everything twice
    logging.getLogger("megatron_unimm.train").info("step 1")
    logging.getLogger("megatron.core").info("not ours")
    warnings.warn("full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer.", stacklevel=1)
    warnings.warn("full scope of something else", stacklevel=1)
    written = capsys.readouterr().err
    assert written.count(" step 1\n") == 1
    assert "not ours" not in written
    assert "cuda_graph_scope" not in written
    assert "full scope of something else" in written


def test_filtered_warnings_are_still_megatrons() -> None:
    """A filter for a message that is gone would only hide something else one day."""
    source = Path(transformer_config.__file__).read_text()
    assert "full scope is deprecated. " in source
    core = Path(transformer_config.__file__).parents[1]
    assert "Transformer Engine and Apex are not installed" in (core / "optimizer/__init__.py").read_text()
    assert "WARNING: there is no optimizer on RANK" in (core / "optimizer/optimizer.py").read_text()
