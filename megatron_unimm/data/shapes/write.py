"""Writes the Shapes world as files: JSON lines with images beside them, and the same samples as WebDataset shards.

Layout of ``to/<split>/``::

    understanding.jsonl  text_to_image.jsonl  editing.jsonl    one record per line, the format of ORION's appendix A.2
    interleaved.jsonl                                          the same; only where the mix asks for it
    images/<id>.<n>.jpg|png                                    image n (0, 1, ...) of a sample
    shards/<kind>-000000.tar                                   <id>.json and <id>.<n>.jpg|png of each sample
    index.json                                                 what was written and from which seed
"""

import io
import json
import math
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from megatron_unimm.data.shapes.conversations import KINDS, Conversation, make_conversation
from megatron_unimm.data.shapes.eval_sets import geneval_prompts, heldout_questions, retrieval_pairs
from megatron_unimm.data.shapes.render import render
from megatron_unimm.data.shapes.scene import CANVAS, Scene, Split
from megatron_unimm.data.shapes.text import IMAGE_MARK
from megatron_unimm.errors import UserError

DEFAULT_MIX: Mapping[str, float] = {"understanding": 0.4, "text_to_image": 0.35, "editing": 0.25}
JPEG_QUALITY = 95


@dataclass(frozen=True)
class WrittenShapes:
    """What `write_shapes` wrote."""

    folder: Path
    counts: dict[str, int]
    jsonl: dict[str, Path]
    shards: tuple[Path, ...]


def encode_image(scene: Scene, canvas: int, as_jpeg: bool) -> bytes:
    """The scene's picture as a JPEG (quality 95, full chroma) or PNG file."""
    buffer = io.BytesIO()
    image = render(scene, canvas)
    if as_jpeg:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _encoded(name: str, conversation: Conversation, canvas: int) -> dict[str, bytes]:
    """Images by file name. Whether a sample has JPEG or PNG images follows from its number: every other one."""
    as_jpeg = int(name.rsplit("-", 1)[1]) % 2 == 0
    suffix = "jpg" if as_jpeg else "png"
    return {f"{name}.{n}.{suffix}": encode_image(s, canvas, as_jpeg) for n, s in enumerate(conversation.scenes)}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member. No time or owner is stored, so that equal samples give equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _counts(count: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Split `count` by the shares of `mix`, the rest going to the first kind."""
    unknown = set(mix) - set(KINDS)
    if unknown or not 0 < sum(mix.values()) < math.inf or min(mix.values()) < 0:
        raise UserError("mix", f"{dict(mix)} must give shares >= 0, not all 0, of {', '.join(KINDS)}")
    total = sum(mix.values())
    counts = {kind: int(count * mix[kind] / total) for kind in KINDS if mix.get(kind, 0) > 0}
    first = next(iter(counts))
    counts[first] += count - sum(counts.values())
    return counts


def _write_sample(
    name: str, conversation: Conversation, folder: Path, canvas: int, lines: TextIO, tar: tarfile.TarFile
) -> None:
    """One sample: a line, its images, and the same in the shard."""
    images = _encoded(name, conversation, canvas)
    line = json.dumps(conversation.to_dict(name, [f"images/{file}" for file in images]))
    lines.write(line + "\n")
    _add(tar, f"{name}.json", line.encode())
    for file, content in images.items():
        (folder / "images" / file).write_bytes(content)
        _add(tar, file, content)


def _write_kind(
    kind: str, number: int, make: Callable[[int], Conversation], folder: Path, canvas: int, shard_size: int
) -> list[Path]:
    """`number` samples of a kind as a JSON-lines file with images, and as shards; returns the shards."""
    shards: list[Path] = []
    with open(folder / f"{kind}.jsonl", "w", encoding="utf-8") as lines:
        for start in range(0, number, shard_size):
            shards.append(folder / "shards" / f"{kind}-{len(shards):06d}.tar")
            with tarfile.open(shards[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(start, min(start + shard_size, number)):
                    _write_sample(f"{kind}-{index:07d}", make(index), folder, canvas, lines, tar)
    return shards


def write_shapes(
    to: Path | str,
    count: int,
    seed: int = 0,
    split: Split = "train",
    *,
    canvas: int = CANVAS,
    mix: Mapping[str, float] = DEFAULT_MIX,
    shard_size: int = 1000,
) -> WrittenShapes:
    """Write `count` samples of a split to ``to/<split>/`` (see the top of this file).

    Args:
        to: folder of the world; made if absent.
        count: samples over all kinds.
        seed: sample i of a kind depends on (seed, split, kind, i) only, so a larger count extends a smaller one.
        split: ``train`` or ``heldout``.
        canvas: side of the images in pixels.
        mix: share of each kind; kinds that are absent are not written.
        shard_size: samples in one tar file.

    Raises:
        UserError: numbers out of range, an unknown split or kind, or a folder that already holds a world.
    """
    if count < 1 or canvas < 32 or shard_size < 1:
        raise UserError(
            "shapes", f"count {count} and shard_size {shard_size} must be at least 1, canvas {canvas} at least 32"
        )
    if split not in ("train", "heldout"):
        raise UserError("split", f"{split!r} must be train or heldout")
    counts = _counts(count, mix)
    folder = Path(to) / split
    if (folder / "index.json").exists():
        raise UserError(str(folder), "already holds a Shapes world; give another folder or delete this one")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    shards: list[Path] = []
    for kind, number in counts.items():
        make = partial(make_conversation, kind, seed, split=split)
        shards += _write_kind(kind, number, make, folder, canvas, shard_size)
    index = {
        "split": split,
        "seed": seed,
        "canvas": canvas,
        "counts": counts,
        "shards": [shard.name for shard in shards],
    }
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n")
    return WrittenShapes(folder, counts, {kind: folder / f"{kind}.jsonl" for kind in counts}, tuple(shards))


def _write_lines(folder: Path, name: str, records: list[tuple[dict[str, Any], Scene | None]], canvas: int) -> Path:
    """One evaluation list; records with a scene get an image."""
    path = folder / f"{name}.jsonl"
    with open(path, "w", encoding="utf-8") as lines:
        for number, (record, scene) in enumerate(records):
            identity: dict[str, Any] = {"id": f"{name}-{number:05d}"}
            if scene is not None:
                identity["image"] = f"images/{name}-{number:05d}.png"
                (folder / identity["image"]).write_bytes(encode_image(scene, canvas, as_jpeg=False))
            lines.write(json.dumps(identity | record) + "\n")
    return path


def write_eval_sets(
    to: Path | str,
    seed: int = 0,
    *,
    num_questions: int = 600,
    num_pairs: int = 256,
    num_prompts: int = 300,
    canvas: int = CANVAS,
) -> dict[str, Path]:
    """Write the evaluation lists to ``to/eval/``.

    ``questions.jsonl``  id, image, question, answer, type, scene, conversations (the format of ORION's appendix A.2)
    ``retrieval.jsonl``  id, image, caption, scene, geneval
    ``prompts.jsonl``    id, GenEval's tag, include, prompt
    """
    folder = Path(to) / "eval"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    questions: list[tuple[dict[str, Any], Scene | None]] = []
    for item in heldout_questions(num_questions, seed):
        asked = item.question
        turns = [
            {"from": "human", "value": IMAGE_MARK + asked.question},
            {"from": "gpt", "value": asked.answer},
        ]
        fields = {"question": asked.question, "answer": asked.answer, "type": asked.type, "kind": "understanding"}
        questions.append((fields | {"conversations": turns, "scene": item.scene.to_list()}, item.scene))
    pairs: list[tuple[dict[str, Any], Scene | None]] = [
        ({"caption": p.prompt.caption, "scene": p.scene.to_list(), "geneval": p.prompt.to_dict()}, p.scene)
        for p in retrieval_pairs(num_pairs, seed)
    ]
    prompts: list[tuple[dict[str, Any], Scene | None]] = [
        (p.to_dict(), None) for p in geneval_prompts(num_prompts, seed)
    ]
    return {
        "questions": _write_lines(folder, "questions", questions, canvas),
        "retrieval": _write_lines(folder, "retrieval", pairs, canvas),
        "prompts": _write_lines(folder, "prompts", prompts, canvas),
    }
