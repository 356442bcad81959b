"""What a checkpoint holds, and where a stage starts from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from megatron_unimm.checkpoint.fallback import Tell, newest_intact
from megatron_unimm.checkpoint.folder import AVERAGE_PREFIX, CARRIED, HF_FOLDER, LANGUAGE_MODEL
from megatron_unimm.checkpoint.manifest import find_checkpoint, latest, read_meta, step_directory
from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.checkpoint.store import PendingSave, load, save
from megatron_unimm.checkpoint.torch_dist import Reader
from megatron_unimm.config.base import Section, as_now
from megatron_unimm.config.load import dump
from megatron_unimm.config.mmdit import TokenizerSpaceConfig
from megatron_unimm.config.queries import SiglipTeacher
from megatron_unimm.config.recipe import StageConfig
from megatron_unimm.errors import CheckpointError
from megatron_unimm.methods.interface import Method
from megatron_unimm.methods.stage_model import StageModel
from megatron_unimm.models.lora import ADAPTERS
from megatron_unimm.parallel.groups import ParallelGroups
from megatron_unimm.train.average import WeightAverage
from megatron_unimm.train.optimizer import gathered_parameters

NEW_PARTS = (
    "vision_head.*",
    "connector.*",
    "query_tokens.*",
    "query_connector.*",
    "pathways.*",
    "frame_embedding.*",
    "vit_features.*",
    "scale_connector.*",
    "scale_adapters.*",
    "alignment_projector.*",
    "tokenizer.*",
    "discriminator.*",
    "*.layer_router.*",
    ADAPTERS,
)
"""Parts that a base model may lack; they keep their fresh weights."""
OF_TRAINING = ("optimizer.*", "discriminator.*")
"""What a checkpoint may hold that served its stage alone."""


SHARDING = "fully_reshardable"
"""Megatron-Core's name for optimizer state with the shapes of parameters."""


def checkpoint_folder(run_dir: Path, stage_name: str) -> Path:
    """Folder of a stage's ``step_`` folders."""
    return run_dir / stage_name / "checkpoints"


def sharding_metadata(groups: ParallelGroups) -> dict[str, Any]:
    """How Megatron-Core describes tensors: one key per layer, optimizer state shaped like its parameters, so that
    any layout reads any other's."""
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": SHARDING,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.collection.dp_cp,
    }


def model_state(chunks: Sequence[MegatronModule], groups: ParallelGroups) -> dict[str, Any]:
    """Sharded state of the trained model: this rank's chunks."""
    metadata = sharding_metadata(groups)
    return {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}


def load_weights(
    chunks: Sequence[StageModel],
    directory: Path,
    groups: ParallelGroups,
    elsewhere: Mapping[str, Path] | None = None,
    unread: Sequence[str] = (),
) -> None:
    """Fill the model from a base model or another run's checkpoint, whatever its layout.

    Args:
        elsewhere: checkpoints (or folders of stages) of parts (a name's first word) that ``directory`` may lack as a
            whole. A diffusion transformer that is in neither keeps its fresh weights.
        unread: globs of tensors that it may hold besides.

    Raises:
        CheckpointError: it is of another architecture; names the first tensor that differs.
    """
    with Reader(directory) as reader:
        held = {_part_of(key) for key in reader.tensors}
    lacking = {part: path for part, path in (elsewhere or {}).items() if part not in held}
    state = model_state(chunks, groups)
    own = _with_parts(state, lambda part: part not in lacking)
    for other in dict.fromkeys(lacking.values()):
        names = {part for part, path in lacking.items() if path == other}
        imported = _with_parts(state, lambda part, names=names: part in names)
        for number, chunk in enumerate(chunks):
            for tensor in imported[f"model{number}"].values():
                tensor.key = chunk.imported_name(tensor.key)
        load(imported, find_checkpoint(other), may_be_unread=("*",))
    new = NEW_PARTS if "mmdit" in held else (*NEW_PARTS, "mmdit.*")
    load(own, directory, may_be_absent=new, may_be_unread=(*OF_TRAINING, f"{CARRIED}*", *unread))


def _part_of(key: str) -> str:
    return key.split(".", 1)[0]


def _with_parts(state: Mapping[str, Any], chosen: Callable[[str], bool]) -> dict[str, Any]:
    """Of a model's sharded state, the tensors of chosen parts."""
    return {
        chunk: {key: value for key, value in tensors.items() if chosen(_part_of(value.key))}
        for chunk, tensors in state.items()
    }


def load_average(chunks: Sequence[MegatronModule], directory: Path, groups: ParallelGroups) -> None:
    """As :func:`load_weights`, with the running average of the weights where the checkpoint has one.

    Raises:
        CheckpointError: as there.
    """
    with Reader(directory) as reader:
        averaged = {key for key in reader.tensors if key.startswith(AVERAGE_PREFIX)}
    state = model_state(chunks, groups)
    for part in state.values():
        for tensor in part.values():
            if AVERAGE_PREFIX + tensor.key in averaged:
                tensor.key = AVERAGE_PREFIX + tensor.key
    load(state, directory, may_be_unread=("*",))


def load_base(chunks: Sequence[StageModel], parts: Mapping[str, Path], groups: ParallelGroups) -> None:
    """Fill the frozen companions (teacher, target tower, VAE), each from the imported checkpoint that it is a part
    of."""
    metadata = sharding_metadata(groups)
    for directory in dict.fromkeys(parts.values()):
        names = [part for part, its in parts.items() if its == directory]
        state = {
            f"model{number}.{part}": chunk.base_sharded_state_dict(part, metadata)
            for number, chunk in enumerate(chunks)
            for part in names
        }
        load(state, find_checkpoint(directory), may_be_unread=("*",))


def check_architecture(directory: Path, stage: StageConfig) -> dict[str, Any]:
    """Compare the model that a checkpoint says it holds with the one that the stage trains, field by field; returns
    the checkpoint's meta.

    Raises:
        CheckpointError: names the first field that differs, with both values.
    """
    if stage.method.trunk != "mmdit" or (stage.method.query_section and not _draws(directory)):
        return _check(directory, "model", stage.model)
    assert stage.generator is not None
    return _check(directory, "generator", stage.generator)


def _draws(directory: Path) -> bool:
    """Whether a checkpoint holds a diffusion transformer, perhaps with a language model beside it."""
    return "mmdit" in read_meta(directory).get("architecture", {})


def check_base(stage: StageConfig, parts: Mapping[str, Path]) -> None:
    """Compare the imported models that a stage's frozen companions come from with the recipe's.

    Args:
        parts: the method's ``base_parts``.

    Raises:
        CheckpointError: as :func:`check_architecture`.
    """
    _check(base_directory(stage), "model", stage.model)
    if stage.method.trunk == "mmdit":
        assert stage.generator is not None
        if not begins_anew(stage):
            _check(generator_directory(stage), "generator", stage.generator)
        if isinstance(stage.generator.vae, TokenizerSpaceConfig):
            assert stage.tokenizer is not None
            _check_part(tokenizer_directory(stage), "tokenizer", stage.tokenizer)
    if "siglip" in parts:
        assert stage.queries is not None
        assert isinstance(stage.queries.teacher, SiglipTeacher)
        encoder = stage.queries.teacher.encoder
        # Only features of patches are looked at: a tower may have a head that the recipe does without.
        unread = () if encoder.pooling_head else ("pooling_head",)
        _check(parts["siglip"], "queries.teacher.encoder", encoder, unread)


def _check(directory: Path, section: str, model: Section, unread: Sequence[str] = ()) -> dict[str, Any]:
    """As :func:`check_architecture`, for a section of the recipe; fields in ``unread`` may differ."""
    meta = read_meta(directory)
    if "architecture" in meta:
        theirs = flatten(as_now(meta["architecture"], model))
        ours = flatten(model.model_dump(mode="json"))
        for field, value in ours.items():
            if field not in unread and theirs.get(field) != value:
                raise CheckpointError(
                    str(directory),
                    f"is of another architecture: {section}.{field} is {theirs.get(field)} there, {value} in the "
                    "recipe; take the recipe of that model",
                )
    return meta


def _check_part(directory: Path, section: str, model: Section) -> None:
    """As :func:`check_architecture`, for a part that a checkpoint's meta describes beside its architecture."""
    theirs = read_meta(directory).get(section)
    if theirs is None:
        raise CheckpointError(str(directory), f"holds no {section}")
    theirs, ours = flatten(as_now(theirs, model)), flatten(model.model_dump(mode="json"))
    for field, value in ours.items():
        if theirs.get(field) != value:
            raise CheckpointError(
                str(directory),
                f"has another {section}: {section}.{field} is {theirs.get(field)} there, {value} in the recipe",
            )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@dataclass(frozen=True)
class Start:
    """Where a stage starts."""

    directory: Path
    """Checkpoint to read weights from."""
    resume: bool
    """True: also optimizer, schedule and data position."""
    checked: bool = False
    """Every file was found to have its hash."""


def find_start(stage: StageConfig, run_dir: Path, resume: str, ranks: Ranks, tell: Tell) -> Start:
    """The stage's own newest intact checkpoint, else the previous stage's, else the base model; called on every rank.

    Args:
        resume: ``auto``, ``never`` or a checkpoint's folder.
        tell: hears of damaged checkpoints of the stage, which are set aside.

    Raises:
        CheckpointError: nothing is there to start from; says what to run first.
    """
    if resume not in ("auto", "never"):
        return Start(Path(resume), resume=True)
    if resume == "auto":
        own = newest_intact(checkpoint_folder(run_dir, stage.name), ranks, tell)
        if own is not None:
            return Start(own, resume=True, checked=True)
    return ranks.from_first(lambda: beginning(stage, run_dir))


def beginning(stage: StageConfig, run_dir: Path) -> Start:
    """Where a stage starts that has no checkpoint of its own."""
    if stage.after is not None:
        before = latest(checkpoint_folder(run_dir, stage.after))
        if before is None:
            folder = checkpoint_folder(run_dir, stage.after)
            raise CheckpointError(
                f"stage {stage.name}",
                f"starts from stage {stage.after}, which has no finished checkpoint in {folder}; "
                f"run --stage {stage.after} first",
            )
        return Start(before, resume=False)
    return Start(origin(stage), resume=False)


def base_directory(stage: StageConfig) -> Path:
    """The imported base model of a recipe."""
    if not stage.base_checkpoint:
        raise CheckpointError("base_checkpoint", "is not set; give the folder that `unimm convert import` wrote")
    return Path(stage.base_checkpoint)


def generator_directory(stage: StageConfig) -> Path:
    """The imported image generator of a recipe."""
    if not stage.generator_checkpoint:
        raise CheckpointError("generator_checkpoint", "is not set; give the folder that `unimm convert import` wrote")
    return Path(stage.generator_checkpoint)


def tokenizer_directory(stage: StageConfig) -> Path:
    """The trained tokenizer in whose latent space a recipe draws: its stage's newest checkpoint."""
    if not stage.tokenizer_checkpoint:
        what = "is not set; give the folder of the stage that trained the tokenizer"
        raise CheckpointError("tokenizer_checkpoint", what)
    return find_checkpoint(Path(stage.tokenizer_checkpoint))


def begins_anew(stage: StageConfig) -> bool:
    """Whether a diffusion transformer has no imported weights to start from, and need not: in a tokenizer's space."""
    assert stage.generator is not None
    return isinstance(stage.generator.vae, TokenizerSpaceConfig) and not stage.generator_checkpoint


def origin(stage: StageConfig) -> Path:
    """The imported checkpoint of what the stage trains; the language model's where that is a diffusion transformer
    without one."""
    if stage.method.trunk != "mmdit" or begins_anew(stage):
        return base_directory(stage)
    return generator_directory(stage)


class Checkpointer:
    """Saves and restores a stage's training state; at most one save is under way."""

    def __init__(
        self,
        stage: StageConfig,
        method: Method,
        run_dir: Path,
        wrapped: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        average: WeightAverage | None,
        groups: ParallelGroups,
        io_group: dist.ProcessGroup | None,
    ) -> None:
        self.stage = stage
        self.method = method
        self.folder = checkpoint_folder(run_dir, stage.name)
        self.wrapped = wrapped
        self.optimizer = optimizer
        self.average = average
        self.groups = groups
        self.io_group = io_group
        self.pending: PendingSave | None = None
        """The last save, until it was waited for."""

    def save(self, step: int, progress: dict[str, Any], asynchronous: bool) -> Path:
        """Write ``step_…``; returns its folder once the tensors are copied (asynchronous) or committed.

        Args:
            progress: small JSON state: data position, skip counters.

        Raises:
            OSError, CheckpointError: as ``checkpoint.store.save``, of this save or of the one before.
        """
        self.wait()
        directory = step_directory(self.folder, step)
        came_from = origin(self.stage)
        trained = self.stage.generator if self.stage.method.trunk == "mmdit" else self.stage.model
        assert trained is not None
        meta = {
            "kind": "training",
            "family": read_meta(came_from)["family"],
            "architecture": trained.model_dump(mode="json"),
            **self.method.part_configs(),
            "stage": self.stage.name,
            "step": step,
            "progress": progress,
            "optimizer_steps": self._optimizer_steps(),
            "average_steps": None if self.average is None else float(self.average.steps),
            "config": dump(self.stage),
        }
        hf_files = {"": came_from / HF_FOLDER}
        if self.stage.method.trunk == "mmdit" and self.stage.method.query_section:
            language_model = base_directory(self.stage)
            meta["language_model"] = {
                "family": read_meta(language_model)["family"],
                "architecture": self.stage.model.model_dump(mode="json"),
            }
            hf_files[LANGUAGE_MODEL] = language_model / HF_FOLDER
        with gathered_parameters(self.wrapped):  # save() returns once they are copied
            self.pending = save(
                self._state(is_loading=False),
                directory,
                meta,
                asynchronous=asynchronous,
                group=self.io_group,
                replicas=self.groups.collection.dp_cp,
                hf_files=hf_files,
            )
        return directory

    def wait(self) -> None:
        """Until the last save is committed. Raises what it raised."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.wait()

    def restore(self, directory: Path, checked: bool = False) -> dict[str, Any]:
        """Fill model and optimizer; returns the checkpoint's meta.

        Args:
            checked: its files have just been hashed.
        """
        meta = check_architecture(directory, self.stage)
        if meta.get("kind") != "training":
            raise CheckpointError(
                str(directory), "is a base model without optimizer state; start from it with --resume never"
            )
        if self.average is not None and meta.get("average_steps") is None:
            raise CheckpointError(str(directory), "has no average of the weights; set train.ema_decay to null")
        unread = (f"{AVERAGE_PREFIX}*",) if self.average is None else ()
        state = load(self._state(is_loading=True), directory, may_be_unread=unread, check=not checked)
        state["optimizer"] = with_own_groups(state["optimizer"], self.optimizer, meta["optimizer_steps"])
        if self.average is not None:
            # Loading leaves out what is empty: the average of a stage of the pipeline in which nothing trains.
            self.average.load(state["optimizer"], state.get("average", {}), meta["average_steps"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        for wrapped in self.wrapped:
            wrapped.module.eval().train()
        return meta

    def _optimizer_steps(self) -> int:
        """Updates that were made. Stages of a pipeline in which nothing trains count none, perhaps the first rank's."""
        groups = [group for part in self.optimizer.chained_optimizers for group in _groups(part)]
        steps = torch.tensor(max((int(group["step"]) for group in groups), default=0))
        dist.all_reduce(steps, dist.ReduceOp.MAX, group=self.groups.host)
        return int(steps)

    def _state(self, is_loading: bool) -> dict[str, Any]:
        state = model_state([wrapped.module for wrapped in self.wrapped], self.groups)
        model, metadata = dict(state), sharding_metadata(self.groups)
        state["optimizer"] = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        if self.average is not None:
            state["average"] = self.average.sharded_state_dict(model, is_loading, metadata)
        return state


def with_own_groups(state: Any, optimizer: ChainedOptimizer, steps: int) -> Any:
    """A loaded optimizer state with this rank's own parameter groups in place of the checkpoint's.

    A checkpoint keeps the first rank's groups alone. Other stages of a pipeline may have others, and with experts
    spread over ranks there are two chained optimizers instead of one. Of what groups hold, only the count of updates
    is state: the rest comes from the recipe, and the learning rate from the schedule.
    """
    parts = optimizer.chained_optimizers
    if not parts:
        return state
    states = [state] if len(parts) == 1 else [state.get(number, {}) for number in range(len(parts))]
    for part, its in zip(parts, states, strict=True):
        if not part.is_stub_optimizer:
            its["optimizer"] = {"param_groups": [group | {"step": steps} for group in _groups(part)]}
            its["param_state_sharding_type"] = SHARDING
    return states[0] if len(parts) == 1 else dict(enumerate(states))


def _groups(part: MegatronOptimizer) -> list[dict[str, Any]]:
    """What the optimizer's groups hold beside parameters; none where nothing trains."""
    if part.is_stub_optimizer:
        return []
    assert isinstance(part, DistributedOptimizer)
    state: dict[str, Any] = part.state_dict()["optimizer"]
    return state["param_groups"]
