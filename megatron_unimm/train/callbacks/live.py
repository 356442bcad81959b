"""The model that is training, as one that answers."""

from megatron_unimm.generate.api import Generator
from megatron_unimm.generate.paint import Painter
from megatron_unimm.generate.query_generator import QueryGenerator, painter_of
from megatron_unimm.methods.interface import DataSetup
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
        painter_class = painter_of(loop.train_step.method.part_configs())
        work = painter_class.work_of(stage, DataSetup({}, lambda: chat_format(stage)))
        return QueryGenerator(painter_class(chunks, stage, groups, platform, work, origin=stage.name))
    # A VLM with queries draws only with the diffusion transformer behind it.
    draws = not stage.method.query_section
    return Generator(
        chunks, stage, groups, platform, chat_format(stage), draws=draws, origin=stage.name, painter=painter
    )
