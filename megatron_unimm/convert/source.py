"""A Hugging Face folder as its family sees it: the model's tensors, those that are carried along, a language model
beside it, and our own parts."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_unimm.checkpoint.folder import CARRIED, LANGUAGE_MODEL
from megatron_unimm.config.base import Section
from megatron_unimm.config.mmdit import ImageGeneratorConfig
from megatron_unimm.config.model import ModelConfig
from megatron_unimm.convert.families import family_of
from megatron_unimm.convert.parts import PARTS, check_parts, part_metas
from megatron_unimm.convert.pipeline import PIPELINE, read_model
from megatron_unimm.convert.reader import HfFolder, read_added_tokens, read_config
from megatron_unimm.convert.table import Box, Family, Mapping, same
from megatron_unimm.convert.transforms import Shape


@dataclass(frozen=True)
class Entry:
    """A Megatron tensor, and the folder that its sources are in."""

    mapping: Mapping
    folder: HfFolder

    @property
    def dtype(self) -> torch.dtype:
        return self.folder.tensors[self.mapping.names[0]].dtype

    def read(self, box: Box) -> Tensor:
        """A part of it, made from the files."""
        return box.forward([self.folder.read(name, number) for name, number in box.sources])


@dataclass(frozen=True)
class Member:
    """A model of the folder that a Hugging Face class loads."""

    family: Family
    config: Section
    layout: str

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        architecture = self.config.model_dump(mode="json")
        return {"family": self.family.name, "layout": self.layout, "architecture": architecture}


class HfModel(AbstractContextManager["HfModel"]):
    """Everything of a folder that a checkpoint will hold, in order.

    Raises:
        CheckpointError: the folder is incomplete, not of a known family, or has a missing, left over or misshapen
            tensor.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self.entries: list[Entry] = []
        self.parts: dict[str, dict[str, Any]] = {}
        """Our own parts beside the model, and their configs."""
        self.model = self._add_model(path)
        beside = path / LANGUAGE_MODEL
        self.language_model = self._add_model(beside) if (path / PIPELINE).is_file() and beside.is_dir() else None
        """Beside an image generator."""
        shapes = {part: self._add_part(path / part) for part in PARTS if (path / part).is_dir()}
        spoken, drawn = (self.language_model or self.model).config, self.model.config
        check_parts(
            shapes,
            self.parts.get("query_tokens"),
            spoken if isinstance(spoken, ModelConfig) else None,
            drawn if isinstance(drawn, ImageGeneratorConfig) else None,
            str(path),
        )

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        beside = {} if self.language_model is None else {LANGUAGE_MODEL: self.language_model.meta()}
        return {**self.model.meta(), **beside, **part_metas(self.parts)}

    def _add_model(self, path: Path) -> Member:
        found = read_model(path)
        family: Family = family_of(found, str(path))
        config: Section = family.to_config(found, read_added_tokens(path))
        folder = self._stack.enter_context(HfFolder(path, family.hub_name, family.folders(config)))
        layout = family.layout_of(config, {name: info.shape for name, info in folder.tensors.items()})
        mappings = family.mappings(config, layout)
        folder.check(mappings, family.tied(config), family.carried)
        mappings += [
            same(name, folder.tensors[name].shape, CARRIED) for name in sorted(folder.tensors) if family.carried(name)
        ]
        self.entries += [Entry(mapping, folder) for mapping in mappings]
        return Member(family, config, layout)

    def _add_part(self, path: Path) -> dict[str, Shape]:
        """Shapes of its tensors."""
        self.parts[path.name] = read_config(path)
        folder = self._stack.enter_context(HfFolder(path))
        shapes = {name: folder.tensors[name].shape for name in sorted(folder.tensors)}
        self.entries += [Entry(same(name, shape, f"{path.name}."), folder) for name, shape in shapes.items()]
        return shapes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
