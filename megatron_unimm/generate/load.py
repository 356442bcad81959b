"""From a run's folder to a model that answers, whatever its method."""

from pathlib import Path

from megatron_unimm.checkpoint.manifest import read_meta
from megatron_unimm.errors import UserError
from megatron_unimm.generate.api import Generator, find_language_model
from megatron_unimm.generate.query_generator import QueryGenerator, draws_frames


def load_generator(
    model_dir: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    with_targets: bool = False,
    base: Path | None = None,
    decoder: Path | None = None,
) -> Generator:
    """As ``Generator.load``; a checkpoint that holds language model and diffusion transformer brings its own decoder.

    Raises:
        CheckpointError, ConfigError: as there.
        UserError: as there, or another decoder is given for a model that has one.
    """
    directory = find_language_model(model_dir)
    if not draws_frames(read_meta(directory)):
        return Generator.load(
            model_dir,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            with_targets=with_targets,
            base=base,
            decoder=decoder,
        )
    if decoder is not None:
        raise UserError(str(directory), "draws by itself; leave --decoder out")
    return QueryGenerator.open(directory, tensor, pipeline, context)
