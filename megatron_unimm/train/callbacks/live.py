"""The model that is training, as one that answers."""

from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.frame_painter import FramePainter
from megatron_unimm.generate.paint import Painter
from megatron_unimm.generate.query_generator import QueryGenerator
from megatron_unimm.methods.interface import DataSetup
from megatron_unimm.methods.mmcore.diffusion.method import frame_work
from megatron_unimm.train.loop import Loop
from megatron_unimm.train.setup import chat_format


def live_generator(loop: Loop, painter: Painter | None = None) -> Generator:
    """Answers with the weights as they are at each call; inside ``gathered_parameters``.

    Args:
        painter: draws for a language model that generates visual tokens.
    """
    stage, groups, platform = loop.stage, loop.groups, loop.platform
    chunks = [wrapped.module for wrapped in loop.train_step.chunks]
    if stage.method.trunk == "mmdit":
        work = frame_work(stage, DataSetup({}, lambda: chat_format(stage)))
        return QueryGenerator(FramePainter(chunks, stage, groups, platform, work, origin=stage.name))
    # A VLM with queries draws only with the diffusion transformer behind it.
    draws = not stage.method.needs_queries
    return Generator(
        chunks, stage, groups, platform, chat_format(stage), draws=draws, origin=stage.name, painter=painter
    )
