"""Chooses the reader of a source by what its path points to.

================  =====================================================================================
format            path
================  =====================================================================================
webdataset        ends in ``.tar``, or a folder that directly holds ``*.tar``
parquet           ends in ``.parquet``, or a folder that directly holds ``*.parquet``
folder            any other folder; one with ``metadata.jsonl`` or ``captions.json`` is read from there
conversations     any other file
================  =====================================================================================

The first line that fits counts, unless the recipe's ``format`` says otherwise.
"""

from collections.abc import Mapping
from pathlib import Path

from megatron_unimm.config.data import SourceConfig, SourceFormat
from megatron_unimm.data.sources.conversations import ConversationSource
from megatron_unimm.data.sources.folder import FolderSource, metadata_file
from megatron_unimm.data.sources.source import Source
from megatron_unimm.data.sources.webdataset import WebDatasetSource
from megatron_unimm.errors import ConfigError, DataError

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_sources(sources: Mapping[str, SourceConfig], index_cache: str = "") -> dict[str, Source]:
    """Opens every source with a weight above 0, in the order of the recipe.

    Args:
        sources: by name.
        index_cache: ``data.index_cache``.

    Raises:
        ConfigError: no source has a weight above 0.
        DataError: a file cannot be opened.
    """
    drawn = {name: open_source(source, name, index_cache) for name, source in sources.items() if source.weight > 0}
    if not drawn:
        raise ConfigError(
            "data.sources", f"none of {len(sources)} sources has a weight above 0; name at least one to train on"
        )
    return drawn


def open_source(source: SourceConfig, name: str, index_cache: str = "") -> Source:
    """Opens one source.

    Args:
        source: where it lies.
        name: its name in the recipe.
        index_cache: ``data.index_cache``.

    Raises:
        DataError: its files cannot be opened.
        ConfigError: ``index_cache`` is no folder.
    """
    cache = Path(index_cache) if index_cache else None
    if cache is not None and not cache.is_dir():
        raise ConfigError("data.index_cache", f"no such folder: {cache}; make it, or leave the setting empty")
    chosen = find_format(source)
    if chosen == "webdataset":
        return WebDatasetSource(source, name, cache)
    if chosen == "parquet":
        # Only here, since pyarrow takes its time to load.
        from megatron_unimm.data.sources.parquet import ParquetSource

        return ParquetSource(source, name, cache)
    if chosen == "folder":
        metadata = metadata_file(Path(source.path))
        if metadata is None:
            return FolderSource(source, name)
        images = source.images or source.path
        return ConversationSource(source.model_copy(update={"path": str(metadata), "images": images}), name, cache)
    return ConversationSource(source, name, cache)


def find_format(source: SourceConfig) -> SourceFormat:
    """The format of a source, never ``auto`` (the table at the top of this file).

    Raises:
        DataError: the path names compressed archives.
    """
    if source.format != "auto":
        return source.format
    path = Path(source.path)
    if path.is_dir():
        suffixes = {file.suffix for file in path.iterdir() if not file.name.startswith(".")}
        return "webdataset" if ".tar" in suffixes else "parquet" if ".parquet" in suffixes else "folder"
    if source.path.endswith(COMPRESSED_SUFFIXES):
        raise DataError(source.path, "is compressed, so samples cannot be reached one by one; decompress it")
    if source.path.endswith(".tar"):
        return "webdataset"
    return "parquet" if source.path.endswith(".parquet") else "conversations"
