"""lib/readers.py: each input that people really have, and what it must become, or how it must be refused."""

import bz2
import gzip
import json
from pathlib import Path

from lib.conversations import CHATML, Template
from lib.readers import Source, find_files
from lib.settings import UserError

import pytest
from conftest import TEXT
from test_chat import RELEASED, model_directory, theirs, turns

import prepare


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(name, data=None, **options) -> Source:
    if data is not None:
        Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return Source(find_files(Path(name)), **options)


def documents(it: Source) -> list:
    """Read a source to its end; return its texts, or its lists of messages."""
    found, pieces = [], []
    for piece, ends in it.pieces():
        pieces.append(piece)
        if ends:
            found.append(json.loads("".join(pieces)) if it.chat else "".join(pieces))
            pieces = []
    return found


def read(name, data=None, **options) -> list:
    return documents(source(name, data, **options))


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


TEXTS = [f'Row {i} said:\r\n"The lamp, it\'s lit"; 漢字\t🦉.' for i in range(12)]
ROWS = [dict(id=str(i), text=text, label="x") for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", lines(ROWS)), ("a.json", json.dumps(ROWS)), ("a.json", json.dumps(ROWS, indent=2)),
        ("a.jsonl", json.dumps(ROWS)), ("a.jsonl", json.dumps(ROWS, indent=1)), ("a.json", lines(ROWS)),
        ("a.ndjson", "\n\n" + lines(ROWS).replace("\n", "\r\n\r\n")), ("a.jsonl", "\ufeff" + lines(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2)), ("a.txt", json.dumps(ROWS)),
        ("a.json", "[\n" + lines(ROWS)[:-1].replace("\n", ",\n") + "\n]"),
    ],
)  # fmt: skip
def test_rows_are_found_whatever_stores_them(here, monkeypatch, name, data):
    """JSON lines, an array on one line or laid out, under any name; also compressed, and in pieces of 7 characters."""
    assert read(name, data) == TEXTS
    for suffix, pack in (".gz", gzip.compress), (".bz2", bz2.compress):
        assert read(name + suffix, pack(data.encode())) == TEXTS
    monkeypatch.setattr("lib.readers.PIECE", 7)
    assert read(name) == TEXTS


def test_text_is_read_as_it_is(here):
    """UTF-8 and UTF-16 with a byte order mark, compressed or not; line ends unchanged; also prose that looks like rows,
    and JSON that is neither texts nor conversations."""
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        data = "é\r\nb\rc 🦉\n".encode(encoding)
        assert read("a.txt", data) == read("a.txt.gz", gzip.compress(data)) == ["é\r\nb\rc 🦉\n"]
    assert read("a.txt", b"\xff\xfea\0b\0") == read("a.txt", b"\xfe\xff\0a\0b") == ["ab"]
    prose = "[1] A note\n", "{x, y} is a set\n", "text\nmore\n", "a\0b\x01", '{"name": "x"}\n', "[]", "[1, 2]", "{}"
    for text in prose:
        assert read("a.txt", text) == read("a.json", text) == [text]
    assert read("a.keymap", "[\n{'a': 1}, // a\n]") == ["[\n{'a': 1}, // a\n]"]
    assert read("a.json", json.dumps([dict(title="x")], indent=1)) == [json.dumps([dict(title="x")], indent=1)]


def test_a_column_can_be_chosen(here):
    """A key with texts or with messages. Without it the message names the keys that are there."""
    rows = [dict(title=f"T{i}", body=f"B{i}", talk=turns("q", f"a{i}")) for i in range(3)]
    assert read("a.jsonl", lines(rows), column="body") == ["B0", "B1", "B2"]
    assert read("a.jsonl", column="talk") == [row["talk"] for row in rows]
    assert read("a.json", json.dumps(rows), column="title") == ["T0", "T1", "T2"]
    with pytest.raises(UserError, match="^a.jsonl, line 1: expected .* the keys title, body, talk; --column=NAME"):
        read("a.jsonl")
    with pytest.raises(UserError, match="^a.jsonl, line 1: expected .* the keys title, body, talk; --column=NAME"):
        read("a.jsonl", column="text")


def test_a_row_with_a_text_and_a_conversation_is_a_text(here):
    """As it always was. The name of the form as a column takes the conversation."""
    alpaca = dict(instruction="Where?", input="", output="There.", text="Below is ...")
    assert read("a.jsonl", lines([alpaca])) == ["Below is ..."]
    assert read("a.jsonl", column="alpaca") == [TALK]
    assert read("a.jsonl", lines([dict(messages=TALK, text="x")]), column="messages") == [TALK]


def test_what_is_no_text_is_named(here):
    """A PDF is not converted by iconv, whatever it is called. Latin-1 is, and a .gz that is cut is damaged."""
    magic = {b"%PDF-1.7\n%\xe2\xe3": "a PDF", b"\x89PNG\r\n\x1a\n\0": "an image", b"PK\3\4\0": "archive",
             b"GGUF\3\0\0\0": "weights", b"PAR1\x15\4": "Parquet"}  # fmt: skip
    for data, kind in magic.items():
        for pack in bytes, gzip.compress:
            with pytest.raises(UserError, match=f"^a.txt.* is .*{kind}.* with a glob") as error:
                read("a.txt.gz" if pack is gzip.compress else "a.txt", pack(data))
            assert "iconv" not in str(error.value)
    with pytest.raises(UserError, match="^a.txt is damaged.*iconv -f latin1 -t utf-8 'a.txt'"):
        read("a.txt", "one\ncafé olé".encode("cp1252"))
    with pytest.raises(UserError, match="a.gz is damaged"):
        read("a.gz", gzip.compress(TEXT.encode())[:-50])


@pytest.mark.parametrize(
    "name, line, data",
    [
        ("a.jsonl", 3, lines(ROWS[:2]) + '{"text": "cut'), ("a.jsonl", 3, '[\n{"text": "a"},\n{"text" "b"}]'),
        ("a.jsonl", 2, lines(ROWS[:1]) + "{'text': 'single'}\n" + lines(ROWS)), ("a.jsonl", 1, '{"text": "\\ud800"}'),
        ("a.jsonl", 2, '{"text":"a"}\n5'), ("a.jsonl", 3, lines(ROWS[:2]).encode() + b'{"text": "\xe9"}'),
        ("a.json", 3, '[\n{"text": "a"},\n{"text" "b"}]'),
        ("a.json", 13, lines(ROWS) + '{"text": null}'), ("a.jsonl", 2, '{"text":"a"}\n' + "[" * 100_000),
    ],
)  # fmt: skip
def test_a_broken_row_is_named_with_its_line(here, name, line, data):
    with pytest.raises(UserError, match=f"^{name}, line {line}: expected "):
        read(name, data)


TALK = turns("Where?", "There.")
CALL = dict(role="assistant", content=None, tool_calls=[dict(id="c", function=dict(name="tide", arguments="{}"))])
part = lambda text: [dict(type="text", text=text)]
share = lambda *turns: [{"from": who, "value": text} for who, text in turns]
GPT = share(("human", "Where?"), ("gpt", "There."))
THERE = dict(role="assistant", content=part("There."))
FORMS = {
    "messages": dict(messages=TALK), "messages, metadata": dict(messages=TALK, meta=dict(text="x"), source="y"),
    "list": TALK, "ShareGPT list": GPT, "ShareGPT": dict(conversations=GPT, id=7),
    "a part": dict(messages=[TALK[0], THERE]),
    "two parts": dict(messages=[dict(role="user", content=part("Whe") + part("re?")), THERE]),
    "ShareGPT's others": dict(conversations=share(("user", "Where?"), ("assistant", "There."))),
    "alpaca": dict(instruction="Where?", input="", output="There."),
    "prompt": dict(prompt="Where?", completion="There."), "lists": dict(prompt=TALK[:1], completion=TALK[1:]),
    "prompt, response": dict(prompt="Where?", response="There."), "question": dict(question="Where?", answer="There."),
    "pairs": dict(prompt="Where?", chosen="There.", rejected="No."), "long pairs": dict(chosen=TALK, rejected=TALK),
    "pairs of answers": dict(prompt=TALK[:1], chosen=TALK[1:], rejected=TALK[1:]),
    "UltraFeedback": dict(prompt="Where?", messages=TALK, chosen=TALK, rejected=TALK),
    "binarized": dict(prompt="Where?", chosen=TALK, rejected=TALK),
    "API log": dict(messages=[TALK[0] | dict(name="a"), TALK[1] | dict(refusal=None, tool_calls=None)], tools="[]"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_messages(here, form):
    """One a line, in an array, and alone in it."""
    assert read("a.jsonl", lines([FORMS[form]] * 2)) == [TALK] * 2
    assert read("a.json", json.dumps([FORMS[form]] * 3, indent=2)) == [TALK] * 3
    assert read("a.json", json.dumps([FORMS[form]])) == [TALK]


def test_what_a_row_says_is_kept(here):
    """A system message beside the others, Alpaca's input, system messages anywhere."""
    system = dict(role="system", content="Be brief.")
    for row, wanted in (
        (dict(system="Be brief.", conversations=GPT), [system, *TALK]),
        (dict(system_prompt="Be brief.", question="Where?", response="There."), [system, *TALK]),
        (dict(system="Be brief.", messages=[system, *TALK]), [system, *TALK]),
        (dict(system=None, messages=TALK), TALK), (dict(system="", messages=TALK), TALK),
        (dict(instruction="Add.", input="1 2", output="3"), turns("Add.\n1 2", "3")),
        (dict(messages=[*TALK, system, *TALK]), [*TALK, system, *TALK]),
        (dict(messages=[*TALK, TALK[0]]), [*TALK, TALK[0]]),
        (dict(prompt=TALK[:1], completion=[TALK[1], *turns("And?", "Here.")]), [*TALK, *turns("And?", "Here.")]),
    ):  # fmt: skip
        assert read("a.jsonl", lines([row])) == [wanted]


LEFT_OUT = {
    "tool calls": [
        dict(messages=[TALK[0], CALL, dict(role="tool", content="low"), TALK[1]]), dict(messages=[TALK[0], CALL]),
        dict(messages=[TALK[0], CALL | dict(content=""), *TALK]), dict(messages=TALK, tools=[dict(name="tide")]),
        dict(messages=[dict(role="function", content="x"), *TALK]),
        dict(conversations=GPT + share(("function_call", "c"), ("observation", "o"), ("gpt", "d"))),
    ],
    "images or recordings": [
        dict(messages=[dict(role="user", content=[dict(type="image_url", image_url={})]), TALK[1]]),
        dict(image="a.png", conversations=GPT),
    ],
    "an empty assistant turn": [dict(messages=turns("Psst", " \n", "Where?", "There.")), dict(prompt="a", answer="")],
    "no assistant turn": [dict(messages=TALK[:1]), dict(messages=[])],
}  # fmt: skip


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_what_cannot_be_learned_is_left_out_and_counted(here, reason):
    """With the first line of each reason. --strict=true refuses it, and takes what can be learned."""
    rows = [dict(messages=TALK), *LEFT_OUT[reason], dict(messages=TALK)]
    it = source("a.jsonl", lines(rows))
    assert documents(it) == [TALK] * 2
    assert it.found == {
        "json, messages": [2, "a.jsonl, line 1"], f"left out, {reason}": [len(rows) - 2, "a.jsonl, line 2"],
    }  # fmt: skip
    with pytest.raises(UserError, match=f"^a.jsonl, line 2: {reason}"):
        read("a.jsonl", strict=True)
    assert read("a.jsonl", lines([rows[0], rows[-1]]), strict=True) == [TALK] * 2


BAD = [
    dict(messages=[TALK[0] | dict(content=5), TALK[1]]), dict(messages=turns("\ud800", "b")),
    dict(messages=turns(None, "b")), dict(conversations=share(("bing", "a"))), dict(completion="b"), {}, 5, None, [5],
    dict(messages=[TALK[0] | dict(role="bot"), TALK[1]]), dict(messages=3), dict(messages=["a"]), [[5]],
    dict(prompt=5, completion="b"), dict(prompt="a", completion=None), dict(system=5, messages=TALK),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_row_that_is_wrong_is_refused_with_its_line(here, bad):
    with pytest.raises(UserError, match=r"^a.jsonl, line 3( \[0\])?: "):  # [0]: the first of an array in that line
        read("a.jsonl", json.dumps(dict(messages=TALK)) + "\n\n" + json.dumps(bad))


@pytest.mark.parametrize("template", [RELEASED, CHATML], ids=["released", "ChatML"])
def test_ids_are_those_of_transformers_for_every_form(here, template):
    """Also with system messages in the middle."""
    path = model_directory(here / "m", template)
    own, other = Template.of(path, prepare.load_tokenizer(path / "tokenizer.json")), theirs(path)
    system = dict(role="system", content="Be brief.")
    rows = [*FORMS.values(), [*TALK, system, *TALK], dict(system="Be brief.", messages=TALK)]
    for messages in read("a.jsonl", lines(rows)):
        assert own.encode([messages])[0][0] == other.apply_chat_template(messages, return_dict=False)


def test_values_are_those_of_transformers(here):
    """It passes tools and documents as none. Negative control: a template that asks for something else."""
    path = model_directory(here / "m", RELEASED)
    own, other = Template.of(path, prepare.load_tokenizer(path / "tokenizer.json")), theirs(path)
    talk = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    for value in ("tools", "documents", "nothing"):
        asks = f"{{% if {value} is defined and {value} is none %}}<|im_start|>{{% endif %}}"
        own.text = other.chat_template = asks + talk
        ids = own.encode([TALK])[0][0]
        assert ids == other.apply_chat_template(TALK, return_dict=False)
        assert (ids[0] == own.special["<|im_start|>"]) == (value != "nothing")


def make(name, data, **settings):
    source(name, data)
    return prepare.prepare(prepare.Settings(input=name, dataset="t", **({"vocab_size": 300} | settings)))


def test_what_was_found_is_printed(here, capsys):
    """What was read, as what, and how much of it; also if nothing is left."""
    rows = [dict(instruction=f"Add {i}.", input="", output=f"It is {i}.") for i in range(1200)]
    make("a.json", json.dumps([*rows, dict(instruction="Add.", output="")], indent=1))
    said = capsys.readouterr().out
    assert "json, alpaca: 1,200 conversations (first a.json, line 1 [0])\n" in said
    assert "left out, an empty assistant turn: 1 conversation (first a.json, line 1 [1200])\n" in said
    make("a.txt", TEXT)
    assert "text: 1 document (first a.txt)\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="^a.jsonl: too short.*; left out, tool calls: 3.* .first a.jsonl, line 1"):
        make("a.jsonl", lines([dict(messages=[TALK[0], CALL])] * 3))


def test_a_column_belongs_to_the_data_set(here):
    """Another one is refused, and the command that makes the data set again has it."""
    make("a.jsonl", lines([dict(body=f"B{i}", title="T") for i in range(40)]), column="body")
    resolve = lambda **flags: prepare.resolve(prepare.Settings(dataset="t", **flags), dict.fromkeys(flags, "flag"))
    assert resolve(column="body")["column"] == resolve()["column"] == "body"
    with pytest.raises(UserError, match="made with column=body, and --column=title"):
        resolve(column="title")
    (prepare.DATA / "t/val.bin").unlink()
    with pytest.raises(UserError, match="--column=body"):
        prepare.read_meta("t")


def test_the_same_text_makes_the_same_data_whatever_stores_it(here):
    """Text, compressed text, UTF-16 and JSON give one train.bin and one val.bin. Negative control: another text."""
    made = []
    inputs = {
        "t.txt": TEXT.encode(), "t.txt.gz": gzip.compress(TEXT.encode()), "u.txt": TEXT.encode("utf-16"),
        "t.jsonl": lines([dict(text=TEXT)]).encode(), "t.json": json.dumps([dict(text=TEXT)], indent=1).encode(),
        "other.txt": TEXT[1:].encode(),
    }  # fmt: skip
    for name, data in inputs.items():
        make(name, data)
        made.append([(prepare.DATA / f"t/{part}.bin").read_bytes() for part in ("train", "val")])
    assert all(each == made[0] for each in made[:-1]) and made[-1] != made[0]
