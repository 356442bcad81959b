"""Reading conversation files: what is understood, and how each mistake is told."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_unimm.config.data import SourceConfig
from megatron_unimm.data.faults import SampleError
from megatron_unimm.data.image_files import DiskImage
from megatron_unimm.data.sample import Turn
from megatron_unimm.data.sources.conversations import ConversationSource
from megatron_unimm.data.sources.opening import open_sources
from megatron_unimm.errors import ConfigError, DataError


def conversation(*turns, **fields) -> dict:
    return {"id": 7, "conversations": [{"from": role, "value": value} for role, value in turns], **fields}


def open_file(path, kind="understanding", **fields) -> ConversationSource:
    return ConversationSource(SourceConfig(path=str(path), kind=kind, **fields), "src")


GOOD = conversation(("human", "Hi"), ("gpt", "Hello"))


def test_orion_example(tmp_path, write_jsonl, write_image):
    """The data format example of appendix A.2, read as it stands in the paper."""
    write_image(tmp_path / "000.jpg")
    prompt = "Can you make an image of an ancient library hidden in a deep forest?"
    example = {
        "id": 0,
        "image": "./000.jpg",
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": "<image>"}],
    }
    (tmp_path / "data.json").write_text(json.dumps([example]))
    sample = open_file(tmp_path / "data.json", kind="text_to_image")[0]
    assert (sample.id, sample.kind, sample.images) == ("src/0", "text_to_image", (DiskImage(tmp_path / "000.jpg"),))
    assert sample.turns == (Turn("user", (prompt,)), Turn("assistant", (0,)))


def test_images_are_numbered_over_turns(tmp_path, write_jsonl, write_image):
    for name in "abc":
        write_image(tmp_path / "img" / f"{name}.png")
    entry = conversation(
        ("system", "S"),
        ("human", "<image>\nand <image> differ"),
        ("gpt", "Yes: <image>"),
        image=["a.png", "b.png", str(tmp_path / "img" / "c.png")],
    )
    source = open_file(write_jsonl(tmp_path / "d.jsonl", [entry]), images=str(tmp_path / "img"))
    sample = source[0]
    assert [turn.parts for turn in sample.turns] == [("S",), (0, "\nand ", 1, " differ"), ("Yes: ", 2)]
    assert [file.name for file in sample.images] == ["a.png", "b.png", "c.png"]


def test_random_access_equals_reading_all(tmp_path):
    """Blank lines, Windows line ends, a byte order mark, and non-ASCII text move byte offsets but not samples."""
    texts = [f"Grüße 你好 {i} " + "x" * (i * 37 % 101) for i in range(200)]
    lines = [json.dumps(conversation(("human", text), ("gpt", "ok")), ensure_ascii=False) for text in texts]
    content = "\ufeff" + "\r\n".join(line + ("\r\n \r\n" if i % 7 == 0 else "") for i, line in enumerate(lines))
    path = tmp_path / "d.jsonl"
    path.write_bytes(content.encode())
    source = open_file(path)
    assert len(source) == 200
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: source[i].turns[0].parts[0], reversed(range(200))))
    assert got == texts[::-1]
    numbered = [n for n, line in enumerate(content.split("\r\n"), start=1) if line.strip()]
    assert [source.where(i) for i in range(200)] == [f"{path}:{n}" for n in numbered]


def test_max_samples(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD] * 5)
    assert len(open_file(path, max_samples=3)) == 3
    assert open_file(path, max_samples=3)[2].turns[1].parts == ("Hello",)
    assert len(open_file(path, max_samples=9)) == 5
    with pytest.raises(IndexError, match="sample 3 of 3"):
        open_file(path, max_samples=3)[3]


def asked(text, **fields) -> dict:
    return conversation(("human", text), ("gpt", "y"), **fields)


MALFORMED = [
    ("{not json", "not valid JSON"),
    ("[1]", "expected an object with 'conversations', found list"),
    (conversation(), "'conversations' is absent or empty"),
    ({"id": 1}, "'conversations' is absent or empty"),
    (conversation(("robot", "x")), "turn 1 is from 'robot'; known roles: system, human, gpt"),
    (conversation(("human", 3)), "turn 1 is not an object with 'from' and a text 'value'"),
    (conversation(("human", "x")), "no turn is from gpt"),
    (asked("x", image=5), "neither a path nor a list"),
    (asked("\ud800"), "turn 1 holds half a surrogate pair"),
    ("[" * 100_000, "not valid JSON"),
]
IMAGES = [
    (asked("<image> <image>", image="a.png"), "image count", "2 <image> marks but 1 images"),
    (asked("x", image="a.png"), "image count", "0 <image> marks but 1 images"),
    (asked("<image>", image="no.png"), "missing image", "no image file"),
    (asked("<image>", image="../out.png"), "path outside the image folder", "outside"),
    (asked("<image>", image="/etc/passwd"), "path outside the image folder", "outside"),
]


@pytest.mark.parametrize(
    ("entry", "fault", "what"), [*((entry, "malformed conversation", what) for entry, what in MALFORMED), *IMAGES]
)
def test_each_mistake_is_told_with_its_line(tmp_path, write_jsonl, write_image, entry, fault, what):
    write_image(tmp_path / "in" / "a.png")
    write_image(tmp_path / "out.png")
    path = write_jsonl(tmp_path / "in" / "file.jsonl", [GOOD, entry, GOOD])
    source = open_file(path)
    with pytest.raises(SampleError) as caught:
        source[1]
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.where, error.fault) == (f"{path}:2", fault)
    assert what in error.what
    assert source[0].turns == source[2].turns


def test_generation_kinds_need_a_target(tmp_path, write_jsonl, write_image):
    write_image(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "d.jsonl", [conversation(("human", "<image>"), ("gpt", "no"), image="a.png")])
    with pytest.raises(SampleError, match="kind editing needs an <image> in a gpt turn"):
        open_file(path, kind="editing")[0]


def test_wrong_files(tmp_path, write_jsonl):
    with pytest.raises(DataError, match=r"no such file; correct data\.sources\.src\.path"):
        open_file(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="holds no samples"):
        open_file(write_jsonl(tmp_path / "empty.jsonl", ["", ""]))
    with pytest.raises(DataError, match=r"no such folder; correct data\.sources\.src\.images"):
        open_file(write_jsonl(tmp_path / "d.jsonl", [GOOD]), images=str(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"broken\.json: not valid JSON"):
        open_file(write_jsonl(tmp_path / "broken.json", ["[{"]))


def test_json_array_names_the_item(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([GOOD, {}], indent=2))
    source = open_file(tmp_path / "d.json")
    assert len(source) == 2
    with pytest.raises(SampleError) as caught:
        source[1]
    assert caught.value.where == f"{tmp_path / 'd.json'}[1]"


def test_sources_of_weight_zero_are_not_opened(tmp_path, write_jsonl):
    path = str(write_jsonl(tmp_path / "d.jsonl", [GOOD]))
    absent = SourceConfig(path="absent.jsonl", kind="understanding", weight=0)
    assert list(open_sources({"off": absent, "on": SourceConfig(path=path, kind="understanding")})) == ["on"]
    with pytest.raises(ConfigError, match="none of 1 sources has a weight above 0"):
        open_sources({"off": absent})
