"""``unimm train``: one stage, start to end."""

import logging
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.checkpoint.ranks import Ranks, new_io_group
from megatron_unimm.config.load import dump
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.data.prompts import PromptWork
from megatron_unimm.errors import CheckpointError
from megatron_unimm.methods.interface import LearnsFromRewards, Method
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.parallel.groups import ParallelGroups, destroy_groups
from megatron_unimm.parallel.platform import Platform
from megatron_unimm.train import setup
from megatron_unimm.train.attempt import AttemptLog
from megatron_unimm.train.callbacks.default import default_callbacks
from megatron_unimm.train.events import EventLog
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.poison import FILE as SKIPPED_STEPS
from megatron_unimm.train.poison import SkippedSteps
from megatron_unimm.train.rollout import Reference, Rollouts
from megatron_unimm.train.safety import Safety
from megatron_unimm.train.saving import Saver
from megatron_unimm.train.state import Checkpointer, Start, beginning, find_start, load_weights
from megatron_unimm.train.step import TrainStep
from megatron_unimm.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def train_stage(recipe: Recipe, stage: StageConfig, run_dir: Path, resume: str = "auto") -> int:
    """Train one stage; returns the exit code of the command (0 done, 75 stopped by a signal after saving).

    Args:
        run_dir: folder of all stages of the run.
        resume: ``auto``, ``never`` or a checkpoint's folder.

    Raises:
        UserError: anything that the user can mend.
    """
    folder = setup.stage_folder(run_dir, stage)
    with (
        AttemptLog(folder, list(recipe.stages)) as attempt,
        Watchdog(folder, stage.system.watchdog_minutes, attempt.events) as watchdog,
    ):
        try:
            return attempt.finish(_train(stage, run_dir, resume, attempt, watchdog))
        finally:
            destroy_groups()


def _train(stage: StageConfig, run_dir: Path, resume: str, attempt: AttemptLog, watchdog: Watchdog) -> int:
    """The attempt between joining the other ranks and leaving them."""
    platform, groups = setup.enter(stage)
    watchdog.connect()
    with ExitStack() as opened:
        try:
            loop = _prepare(stage, run_dir, resume, attempt, watchdog, platform, groups)
            opened.callback(loop.close)
            return loop.run()
        except Exception as error:
            first = watchdog.tell_error(error)
            if first is error:
                raise
            raise first from error


def _prepare(
    stage: StageConfig,
    run_dir: Path,
    resume: str,
    attempt: AttemptLog,
    watchdog: Watchdog,
    platform: Platform,
    groups: ParallelGroups,
) -> Loop:
    """The loop, with model, optimizer and data at the step that it begins or goes on with."""
    began = time.perf_counter()
    start = find_start(stage, run_dir, resume, Ranks.of(groups.host), partial(_tell_damage, attempt.events))
    io_group = new_io_group()
    method, chunks = setup.build_model(stage, platform, groups)
    setup.fill(chunks, stage, method, start, groups)
    reference = _reference(stage, method, chunks, run_dir, start, groups)
    loader, total_steps = setup.open_data(stage, method, start, platform, groups)
    wrapped = wrap_data_parallel(chunks, stage, groups)
    optimizer = build_optimizer(wrapped, stage, groups)
    step = TrainStep(stage, method, wrapped, optimizer, platform, groups)
    attempt.origin = str(start.directory)
    if dist.get_rank() == 0:
        attempt.folder.mkdir(parents=True, exist_ok=True)
        (attempt.folder / "config.yaml").write_text(dump(stage))
    checkpointer = Checkpointer(stage, method, run_dir, wrapped, optimizer, step.average, groups, io_group)
    saver = Saver(stage.train.checkpoint, checkpointer, groups.host, attempt.events)
    safety = Safety(saver, watchdog, SkippedSteps(attempt.folder / SKIPPED_STEPS, groups))
    rollouts = None
    if isinstance(method, LearnsFromRewards):
        assert isinstance(loader.work, PromptWork)
        rollouts = Rollouts(stage, method.grpo, wrapped, loader.work, reference, platform, groups)
    loop = Loop(stage, total_steps, loader, step, safety, default_callbacks(stage, attempt), rollouts)
    if start.resume:
        loop.restore(checkpointer.restore(start.directory, start.checked))
        if start.directory.parent.resolve() == checkpointer.folder.resolve():
            saver.step = loop.step
        if dist.get_rank() == 0:
            attempt.events.add("resume", step=loop.step, seconds=round(time.perf_counter() - began, 3))
    if dist.get_rank() == 0:
        origin = f"resuming at step {loop.step}" if start.resume else "starting"
        logger.info(
            "stage %s: %s from %s on %s, %d ranks",
            stage.name,
            origin,
            start.directory,
            platform.device_name(),
            dist.get_world_size(),
        )
        logger.info("what trains:\n%s", setup.describe_trainable(chunks))
    return loop


def _reference(
    stage: StageConfig,
    method: Method,
    chunks: list[StageModel],
    run_dir: Path,
    start: Start,
    groups: ParallelGroups,
) -> Reference | None:
    """The weights that the stage began with, also where it goes on from later ones."""
    if not isinstance(method, LearnsFromRewards) or not method.grpo.kl_weight:
        return None
    if start.resume:
        began = Ranks.of(groups.host).from_first(lambda: beginning(stage, run_dir))
        load_weights(chunks, began.directory, groups, method.model_parts())
    return Reference(chunks)


def _tell_damage(events: EventLog, directory: Path, place: Path, damage: CheckpointError) -> None:
    """A checkpoint was found damaged and set aside."""
    if dist.get_rank() == 0:
        what = (
            f"checkpoint {directory.name} is {damage.what.split(';')[0]} ({damage.where}); it is kept as {place.name}"
        )
        logger.error("%s; going back to the one before", what)
        events.add("trouble", what=what, step=int(directory.name.removeprefix("step_")))
