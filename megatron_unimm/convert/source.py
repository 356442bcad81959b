"""A Hugging Face folder as its family sees it: the model's tensors, those that are carried along, and our own parts."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_unimm.config.base import Section
from megatron_unimm.convert.families import family_of
from megatron_unimm.convert.folders import PARTS
from megatron_unimm.convert.pipeline import read_model
from megatron_unimm.convert.reader import HfFolder, read_added_tokens, read_config
from megatron_unimm.convert.table import CARRIED, Box, Family, Mapping, same


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
        return box.forward([self.folder.read(name, box.slice) for name in self.mapping.names])


class HfModel(AbstractContextManager["HfModel"]):
    """Everything of a folder that a checkpoint will hold, in order.

    Raises:
        CheckpointError: the folder is incomplete, not of a known family, or has a missing, left over or misshapen
            tensor.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        config = read_model(path)
        self.family: Family = family_of(config, str(path))
        self.config: Section = self.family.to_config(config, read_added_tokens(path))
        folder = self._stack.enter_context(HfFolder(path, self.family.hub_name, self.family.folders(self.config)))
        self.layout = self.family.layout_of(self.config, {name: info.shape for name, info in folder.tensors.items()})
        mappings = self.family.mappings(self.config, self.layout)
        folder.check(mappings, self.family.tied(self.config), self.family.carried)
        mappings += [
            same(name, folder.tensors[name].shape, CARRIED)
            for name in sorted(folder.tensors)
            if self.family.carried(name)
        ]
        self.entries = [Entry(mapping, folder) for mapping in mappings]
        self.parts: dict[str, dict[str, Any]] = {}
        """Our own parts beside the model, and their configs."""
        for part in PARTS:
            if (path / part).is_dir():
                self._add_part(path / part)

    def _add_part(self, path: Path) -> None:
        self.parts[path.name] = read_config(path)
        folder = self._stack.enter_context(HfFolder(path))
        for name in sorted(folder.tensors):
            self.entries.append(Entry(same(name, folder.tensors[name].shape, f"{path.name}."), folder))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
