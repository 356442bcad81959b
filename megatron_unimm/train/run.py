"""``unimm train``: one stage, start to end."""

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_unimm.checkpoint.ranks import new_io_group
from megatron_unimm.config.load import dump
from megatron_unimm.config.recipe import Recipe, StageConfig
from megatron_unimm.parallel.groups import destroy_groups
from megatron_unimm.train import setup
from megatron_unimm.train.callbacks.default import default_callbacks
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_unimm.train.state import Checkpointer, find_start
from megatron_unimm.train.step import TrainStep

logger = logging.getLogger(__name__)


def train_stage(recipe: Recipe, stage: StageConfig, run_dir: Path, resume: str = "auto", dry_run: bool = False) -> int:
    """Train one stage; returns the exit code of the command (0 done, 75 stopped by a signal after saving).

    Args:
        run_dir: folder of all stages of the run.
        resume: ``auto``, ``never`` or a checkpoint's folder.
        dry_run: stop after building the model without memory.

    Raises:
        UserError: anything that the user can mend.
    """
    if dry_run:
        from megatron_unimm.train.dry_run import dry_run_stage

        return dry_run_stage(stage)
    start = find_start(stage, run_dir, resume)
    platform, groups = setup.enter(stage)
    try:
        io_group = new_io_group()
        method, chunks = setup.build_model(stage, platform, groups)
        setup.fill(chunks, stage, method, start, groups)
        loader, total_steps = setup.open_data(stage, method, platform, groups)
        wrapped = wrap_data_parallel(chunks, stage, groups)
        optimizer = build_optimizer(wrapped, stage, groups)
        step = TrainStep(stage, method, wrapped, optimizer, platform, groups)
        folder = setup.stage_folder(run_dir, stage)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(dump(stage))
        checkpointer = Checkpointer(stage, method, run_dir, wrapped, optimizer, step.average, groups, io_group)
        loop = Loop(stage, total_steps, loader, step, checkpointer, default_callbacks(stage, folder))
        if start.resume:
            loop.restore(checkpointer.restore(start.directory))
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
        return loop.run()
    finally:
        destroy_groups()
