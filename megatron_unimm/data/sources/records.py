"""From the fields of a record, whatever file it came from, to a sample.

A record has ``conversations``, a list of ``{"from": "human" or "gpt" or "system", "value": text}`` in which the k-th
``<image>`` stands for the k-th image, or else ``caption`` or ``text``, from which ``captions.py`` makes a conversation.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from megatron_unimm.config.data import SampleKind
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import ImageFile
from megatron_unimm.data.sample import Sample, Turn
from megatron_unimm.data.sources.captions import caption_turns

IMAGE_MARK = "<image>"
ROLES: dict[str, Literal["system", "user", "assistant"]] = {"system": "system", "human": "user", "gpt": "assistant"}
READ_HERE = ("conversations", "caption", "text", "id", "image", "images", "file_name")
"""Keys of a record that become the sample; the others go along with it."""
UTF8_BOM = b"\xef\xbb\xbf"

MAX_TEXT_BYTES = 16 << 20
"""Bytes of one line, member or caption file; more is no conversation, and would only fill the memory."""

MAX_ID_CHARACTERS = 1000


def make_sample(
    record: Mapping[str, Any], files: Sequence[ImageFile], *, name: str, kind: SampleKind, default_id: str, where: str
) -> Sample:
    """The sample of a record.

    Args:
        record: ``conversations``, or ``caption`` or ``text``; ``id`` if it has one.
        files: its images, in order.
        name: of the source; the first part of the sample's id.
        kind: of the source.
        default_id: stands in for ``id``.
        where: the place of the record, for messages.

    Raises:
        SampleError: turns are malformed, or the images do not match them.
    """
    identity = _identity(record, default_id)
    caption = _caption(record, where)
    if record.get("conversations") is not None or (caption is None and kind != "reconstruction"):
        turns, num_marks = _parse_turns(record, where)
        if num_marks != len(files):
            raise SampleError(
                where, f"{num_marks} {IMAGE_MARK} marks but {len(files)} images; give one path per mark", "image count"
            )
        _check_kind(turns, kind, where)
    else:
        text = (caption or "").replace(IMAGE_MARK, "").strip()
        turns = caption_turns(text, len(files), kind, identity, where)
    metadata = {key: value for key, value in record.items() if key not in READ_HERE}
    return Sample(id=f"{name}/{identity}", kind=kind, turns=turns, images=tuple(files), metadata=metadata)


def parse_json(text: bytes, where: str, advice: str) -> object:
    """What a JSON text holds.

    Raises:
        SampleError: it is not valid.
    """
    try:
        return json.loads(text.removeprefix(UTF8_BOM))
    except (ValueError, RecursionError) as error:
        raise SampleError(where, f"not valid JSON ({error}); {advice}", "malformed conversation") from error


def parse_object(text: bytes, where: str, advice: str) -> dict[str, Any]:
    """As `parse_json`, for an object."""
    return as_object(parse_json(text, where, advice), where)


def as_object(item: object, where: str) -> dict[str, Any]:
    """The item, if it is an object.

    Raises:
        SampleError: it is not.
    """
    if not isinstance(item, dict):
        raise SampleError(
            where, f"expected an object with 'conversations', found {type(item).__name__}", "malformed conversation"
        )
    return item


def parse_text(text: bytes, where: str) -> str:
    """A caption file's text.

    Raises:
        SampleError: it is not UTF-8.
    """
    try:
        return text.removeprefix(UTF8_BOM).decode()
    except UnicodeDecodeError as error:
        raise SampleError(where, f"caption is not UTF-8 ({error.reason})", "malformed conversation") from error


def check_text_size(num_bytes: int, where: str) -> None:
    """Refuses texts that no conversation can be, before they are read.

    Raises:
        SampleError: more than MAX_TEXT_BYTES.
    """
    if num_bytes > MAX_TEXT_BYTES:
        raise SampleError(where, f"text of {num_bytes} bytes; at most {MAX_TEXT_BYTES} are read", "text too large")


def image_names(record: Mapping[str, Any], where: str) -> list[str]:
    """The paths that a record gives for its images, under ``image``, ``images`` or ``file_name``.

    Raises:
        SampleError: they are neither a text nor a list of texts.
    """
    keys = ("image", "images", "file_name")
    images = next((record[key] for key in keys if record.get(key) is not None), [])
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and _is_unicode(image) for image in images):
        raise SampleError(where, "'image' is neither a path nor a list of paths", "malformed conversation")
    return images


def _identity(record: Mapping[str, Any], default: str) -> str:
    identity = record.get("id")
    if isinstance(identity, int):
        return str(identity)
    if isinstance(identity, str) and 0 < len(identity) <= MAX_ID_CHARACTERS and _is_unicode(identity):
        return identity
    return default


def _caption(record: Mapping[str, Any], where: str) -> str | None:
    caption = next((record[key] for key in ("caption", "text") if record.get(key) is not None), None)
    if caption is not None and (not isinstance(caption, str) or not _is_unicode(caption)):
        raise SampleError(where, "the caption is not a text", "malformed conversation")
    return caption


def _parse_turns(record: Mapping[str, Any], where: str) -> tuple[tuple[Turn, ...], int]:
    """Returns the turns and the number of image marks in them."""
    entries = record.get("conversations")
    if not isinstance(entries, list) or not entries:
        raise SampleError(where, "'conversations' is absent or empty; give a list of turns", "malformed conversation")
    turns, num_images = [], 0
    for number, entry in enumerate(entries, start=1):
        turn, num_images = _parse_turn(entry, num_images, f"turn {number}", where)
        turns.append(turn)
    if all(turn.role != "assistant" for turn in turns):
        raise SampleError(where, "no turn is from gpt, so there is nothing to learn", "malformed conversation")
    return tuple(turns), num_images


def _parse_turn(entry: object, num_images: int, place: str, where: str) -> tuple[Turn, int]:
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), str):
        raise SampleError(where, f"{place} is not an object with 'from' and a text 'value'", "malformed conversation")
    role = entry.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise SampleError(where, f"{place} is from {role!r}; known roles: {', '.join(ROLES)}", "malformed conversation")
    if not _is_unicode(entry["value"]):
        raise SampleError(where, f"{place} holds half a surrogate pair, which no text can", "malformed conversation")
    parts: list[str | int] = []
    for number, text in enumerate(entry["value"].split(IMAGE_MARK)):
        if number:
            parts.append(num_images)
            num_images += 1
        if text:
            parts.append(text)
    return Turn(role=ROLES[role], parts=tuple(parts)), num_images


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; JSON's escapes can write one that cannot, and the tokenizer would stop the run."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_kind(turns: tuple[Turn, ...], kind: SampleKind, where: str) -> None:
    has_target = any(turn.role == "assistant" and any(isinstance(part, int) for part in turn.parts) for turn in turns)
    # A document may show all its images to the assistant, who then only writes.
    if kind not in ("understanding", "interleaved") and not has_target:
        raise SampleError(
            where, f"a sample of kind {kind} needs an {IMAGE_MARK} in a gpt turn, found none", "image count"
        )
