"""Reads a folder of images with captions: ``a.jpg`` beside ``a.txt``, at any depth.

The names are listed at opening and kept in memory, about 200 bytes a sample; pack larger folders into shards.
"""

import os
from pathlib import Path
from typing import Any

from megatron_unimm.config.data import SampleKind, SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.sample import Sample
from megatron_unimm.data.sources.records import check_text_size, make_sample, parse_text
from megatron_unimm.data.sources.source import checked
from megatron_unimm.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".ppm", ".tif", ".tiff")

METADATA_NAMES = ("metadata.jsonl", "captions.jsonl", "metadata.json", "captions.json")
"""Files of conversations that, if a folder has one, stand in for the text files."""


class FolderSource:
    """Random access to the images of a folder, in the order of their paths.

    A sample's id is its path without the ending.

    Raises:
        DataError: there is no such folder, or it holds no images.
    """

    def __init__(self, source: SourceConfig, name: str) -> None:
        self._opened_with = (source, name)
        self.name = name
        self.kind: SampleKind = source.kind
        self._folder = source.path
        if not os.path.isdir(self._folder):
            raise DataError(self._folder, f"no such folder; correct data.sources.{name}.path")
        self._names = sorted(_image_names(self._folder))[: source.max_samples]
        if not self._names:
            raise DataError(self._folder, f"holds no images; correct data.sources.{name}.path")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._opened_with

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        """The sample of an image.

        Raises:
            SampleError: the caption is absent, no text or too large, or the image is no regular file.
        """
        where = self.where(index)
        stem = os.path.splitext(self._names[index])[0]
        if not os.path.isfile(where):
            raise SampleError(where, "is no regular file", "missing image")
        record = {"caption": _read_caption(os.path.join(self._folder, f"{stem}.txt"), self.kind, where)}
        return make_sample(
            record, [DiskImage(Path(where))], name=self.name, kind=self.kind, default_id=stem, where=where
        )

    def where(self, index: int) -> str:
        """The path of the image."""
        return os.path.join(self._folder, self._names[checked(index, len(self._names), self._folder)])


def metadata_file(folder: Path) -> Path | None:
    """The file of a folder that holds the captions of all its images, if there is one."""
    return next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)


def _image_names(folder: str) -> list[str]:
    """Paths of the images relative to the folder, without hidden files and folders."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = os.path.relpath(parent, folder)
        names += [
            file if relative == "." else os.path.join(relative, file)
            for file in files
            if not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES)
        ]
    return names


def _read_caption(path: str, kind: SampleKind, where: str) -> str | None:
    if not os.path.isfile(path):
        if kind == "reconstruction":
            return None
        raise SampleError(where, f"no caption file {path}", "malformed conversation")
    check_text_size(os.path.getsize(path), where)
    return parse_text(Path(path).read_bytes(), where)
