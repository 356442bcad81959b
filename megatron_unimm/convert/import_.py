"""Hugging Face folder to Megatron checkpoint, tensor by tensor, without a GPU, a process group or much memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_unimm.checkpoint.folder import save_files
from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.checkpoint.torch_dist import Piece, serialise, write_pieces
from megatron_unimm.convert.folders import check_target, companions, nothing_half_written
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.source import Entry, HfModel


def import_checkpoint(hf_dir: Path, ckpt_dir: Path) -> None:
    """Make a Megatron checkpoint of a Hugging Face folder. Dtypes stay; tokenizer and config files go to ``hf/``.

    Parts of ours that :func:`export_checkpoint` wrote beside the model are taken back in. A target that a killed import
    left unfinished is written anew; what it left behind under its temporary name is removed.

    Raises:
        CheckpointError: the folder is incomplete, not of a known family, has a missing, left over or misshapen
            tensor, or the target exists or has no room.
    """
    with HfModel(hf_dir) as model:
        meta: dict[str, Any] = {"kind": "base_model", "source": str(hf_dir.resolve()), **model.meta}
        pieces = [piece for entry in model.entries for piece in _pieces(entry)]
        total = sum(piece.nbytes for piece in pieces)
        check_target(ckpt_dir, total)
        with nothing_half_written(ckpt_dir), progress("import", total) as advance:
            save_files(
                ckpt_dir,
                # One file at a time, so that one tensor at a time is in memory.
                lambda folder: write_pieces(folder, 0, pieces, threads=1, on_bytes=advance),
                meta,
                common=serialise("values beside the tensors", {}),
                ranks=Ranks.alone(),
                hf_files=companions(hf_dir),
            )


def _pieces(entry: Entry) -> Iterator[Piece]:
    for box in entry.mapping.boxes():
        yield Piece(
            key=entry.mapping.megatron,
            global_shape=entry.mapping.megatron_shape,
            offset=box.offset,
            shape=box.shape,
            dtype=entry.dtype,
            load=partial(entry.read, box),
        )
