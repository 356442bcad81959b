"""Hugging Face folder to Megatron checkpoint, tensor by tensor, without a GPU, a process group or much memory."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_unimm.checkpoint.folder import save_files
from megatron_unimm.checkpoint.ranks import Ranks
from megatron_unimm.checkpoint.torch_dist import Piece, serialise, write_pieces
from megatron_unimm.convert.families import family_of
from megatron_unimm.convert.folders import VISION_HEAD, check_target, companions
from megatron_unimm.convert.progress import progress
from megatron_unimm.convert.reader import HfFolder, read_added_tokens, read_config
from megatron_unimm.convert.table import Mapping, expand


def import_checkpoint(hf_dir: Path, ckpt_dir: Path) -> None:
    """Make a Megatron checkpoint of a Hugging Face folder. Dtypes stay; tokenizer and config files go to ``hf/``.

    A ``vision_head/`` folder that :func:`export_checkpoint` wrote beside the model is taken back in.

    Raises:
        CheckpointError: the folder is incomplete, not of a known family, has a missing, left over or misshapen
            tensor, or the target exists or has no room.
    """
    config = read_config(hf_dir)
    family = family_of(config, str(hf_dir / "config.json"))
    model = family.to_model_config(config, read_added_tokens(hf_dir))
    mappings = expand(family.rows(model))
    meta: dict[str, Any] = {
        "kind": "base_model",
        "family": family.name,
        "architecture": model.model_dump(mode="json"),
        "source": str(hf_dir.resolve()),
    }
    with HfFolder(hf_dir, family.hub_name) as folder:
        folder.check(mappings, family.tied(model))
        pieces = [_piece(folder, mapping) for mapping in mappings]
        head_dir = hf_dir / VISION_HEAD
        if not head_dir.is_dir():
            _write(ckpt_dir, pieces, meta, companions(hf_dir))
            return
        meta[VISION_HEAD] = read_config(head_dir)
        with HfFolder(head_dir) as head:
            pieces += [_head_piece(head, name) for name in sorted(head.tensors)]
            _write(ckpt_dir, pieces, meta, companions(hf_dir))


def _write(ckpt_dir: Path, pieces: list[Piece], meta: dict[str, Any], hf_files: list[Path]) -> None:
    total = sum(piece.nbytes for piece in pieces)
    check_target(ckpt_dir, total)
    with progress("import", total) as advance:
        save_files(
            ckpt_dir,
            # One file at a time, so that one tensor at a time is in memory.
            lambda folder: write_pieces(folder, 0, pieces, threads=1, on_bytes=advance),
            meta,
            common=serialise("values beside the tensors", {}),
            ranks=Ranks.alone(),
            hf_files=hf_files,
        )


def _piece(folder: HfFolder, mapping: Mapping) -> Piece:
    shape = mapping.megatron_shape
    return Piece(
        key=mapping.megatron,
        global_shape=shape,
        offset=(0,) * len(shape),
        shape=shape,
        dtype=folder.tensors[mapping.names[0]].dtype,
        load=partial(read_mapped, folder, mapping),
    )


def read_mapped(folder: HfFolder, mapping: Mapping) -> Tensor:
    """The Megatron tensor of a mapping."""
    return mapping.transform.forward(*(folder.read(name) for name in mapping.names))


def _head_piece(head: HfFolder, name: str) -> Piece:
    info = head.tensors[name]
    return Piece(
        key=f"{VISION_HEAD}.{name}",
        global_shape=info.shape,
        offset=(0,) * len(info.shape),
        shape=info.shape,
        dtype=info.dtype,
        load=partial(head.read, name),
    )
