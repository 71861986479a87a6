"""
Turns files into documents: texts, or rows of JSON that are texts or conversations, also compressed.

    source = Source(find_files(Path("posts.jsonl.gz")))
    for piece, ends in source.pieces(): ...  # of a text; or a whole conversation, its messages as JSON
"""

import fileinput
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lib.conversations import Unlearnable, check_messages
from lib.files import read_errors_as_user_error
from lib.settings import UserError, is_text

PIECE = 1 << 18  # characters per piece: large enough for speed, small enough that many fit in memory
BINARY = {b"%PDF-": "a PDF", b"PK\3\4": "an archive", b"\x89PNG": "an image", b"GGUF\3": "weights", b"PAR1": "Parquet"}
# The forms of a conversation as a row of data: the keys of what the user and the assistant say, or of both.
FORMS = {"messages": ["messages"], "ShareGPT": ["conversations"], "alpaca": ["instruction", "output"]}
FORMS |= {"pairs, the chosen answers": ["prompt", "chosen"], "pairs, the chosen": ["chosen"]}
FORMS |= {f"{a} and {b}": [a, b] for a in ("prompt", "question") for b in ("completion", "response", "answer")}


def find_files(path: Path) -> list[Path]:
    """Return the files of a file, folder or glob, each once, in a fixed order. Hidden files and folders, and folders
    behind links, are left out unless the path spells them out. UserError if there are none."""
    if path.is_file():  # before the glob: a name may contain brackets
        return [path]
    pattern = "**/*" if path.is_dir() else str(path.relative_to(path.anchor))
    pattern = re.sub(r"\*\*$", "**/*", re.sub(r"\*\*+(?=[^/*])|(?<=[^/*])\*\*+", "*", pattern))  # what glob.glob takes
    files = {}
    for file in sorted((path if path.is_dir() else Path(path.anchor)).glob(pattern)):
        if file.is_file() and not any(part.startswith(".") and part not in path.parts for part in file.parts):
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise UserError(f"{path}: no such file, and no folder or glob with files. Put the text there, or give --input.")
    return list(files.values())


def read_text(file: Path) -> Iterator[str]:
    """Yield the text of a file block by block, with its line ends unchanged and without a byte order mark."""
    remedy = f"Convert it (iconv -f latin1 -t utf-8 {str(file)!r}), or leave it out with a glob."
    with read_errors_as_user_error(file, remedy), fileinput.hook_compressed(file, "rb") as f:
        start = f.peek(8)
        if kind := next((kind for magic, kind in BINARY.items() if start.startswith(magic)), None):
            raise UserError(f"{file} is {kind}, not text. Leave it out with a glob, or save its text as a file.")
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        text = io.TextIOWrapper(f, encoding, newline="")
        yield from iter(lambda: text.read(PIECE), "")


def read_json(file: Path) -> Iterator[tuple[str, object]]:
    """Yield (place, row) for each row of JSON: one a line, or [i] of an array. Messages alone are a row."""
    with read_errors_as_user_error(file), fileinput.hook_compressed(file, "rb") as f:
        for n, line in enumerate(iter(lambda: f.readline(1 << 28), b""), 1):
            if n == 1 and re.match(rb"(?s)(\xef\xbb\xbf)?\s*\[(?!.*\]\s*$)", line):  # an array over several lines
                line += f.read(1 << 28)  # a larger one ends as broken JSON
            try:
                value = json.loads(line) if line.strip() else []
            except (ValueError, RecursionError) as error:
                at, expected = n - 1 + getattr(error, "lineno", 1), "an object a line, or an array below 256 MB"
                raise UserError(f"{file}, line {at}: expected JSON, {expected} (jq -c '.[]' makes lines).") from None
            alone = isinstance(value, list) and all(isinstance(m, dict) and m.keys() & {"role", "from"} for m in value)
            for i, r in enumerate(value if isinstance(value, list) and not (alone and value) else [value]):
                yield f"{file}, line {n}" + f" [{i}]" * (r is not value), dict(messages=r) if isinstance(r, list) else r


def read_row(row, column: str) -> tuple[str, object]:
    """Return what a row of data is by its keys, and its text in blocks or its messages. UserError if it is neither."""
    text, keys = (row.get(column or "text"), row.keys()) if isinstance(row, dict) else (None, set())
    if isinstance(text, str) and is_text(text):
        return f"json, column {column or 'text'}", (text[i : i + PIECE] for i in range(0, len(text), PIECE))
    forms = {column: FORMS.get(column, [column])} if column else {} if "text" in keys else FORMS
    form = next((form for form in forms if keys >= set(forms[form])), None)
    if form is None:
        has = f"the keys {', '.join(keys):.200}; --column=NAME takes one" if keys else f"{row!s:.40}"
        raise UserError(f'expected a "text" that is text, or a conversation, found {has}')
    said = [row[key] for key in forms[form]]
    if form == "alpaca" and row.get("input"):
        said[0] = f"{said[0]}\n{row['input']}"
    turns = [t if isinstance(t, list) else [dict(role=r, content=t)] for r, t in zip(("user", "assistant"), said)]
    return f"json, {form}", turns[-1] if any(t in turns[-1] for t in turns[0]) else sum(turns, [])  # asked once


@dataclass
class Source:
    """The files of an input, and what prepare.py finds out to split it without holding it in memory."""

    files: list[Path]
    column: str = ""  # of a row: its text or messages; empty: "text", otherwise a conversation
    strict: bool = False  # refuse conversations that teach nothing instead of leaving them out
    chat: bool | None = None  # whether the documents are conversations
    bytes: int = 0  # of text: without byte order marks and without the JSON around it
    train_characters: int = 0  # where the validation text of a single document begins
    validation: Sequence[bool] = ()  # which of several documents are validation
    found: dict = field(default_factory=dict)  # what was read or left out: [how many, where first]

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """Yield (piece, whether it ends its document); a conversation is one, as JSON. Pieces are cut where GPT-2 and
        SmolLM2 cut, too, before a space or line break that follows other text: encoding piece by piece gives the ids of
        the whole. UserError if there are both texts and conversations."""
        self.chat, self.found = None, {}
        for place, row in (pair for file in self.files for pair in self.rows(file)):
            try:
                kind, blocks = ("text", row) if isinstance(row, Iterator) else read_row(row, self.column)
                chat = isinstance(blocks, list)
                blocks = [json.dumps(check_messages(blocks, row))] if chat else blocks
            except UserError as error:
                if self.strict or not isinstance(error, Unlearnable):
                    raise UserError(f"{place}: {error}.") from None
                kind, blocks, chat = f"left out, {error}", (), self.chat
            if self.chat not in (None, chat):
                raise UserError(f"{place}: {kind}, unlike those before. Leave one kind out.")
            self.chat, rest = chat, ""
            self.found.setdefault(kind, [0, place])[0] += 1
            for block in blocks:
                rest += block
                if len(rest) >= PIECE and not chat:
                    found = re.match(r"(?s).*\S(?=[ \n])", rest)  # goes to the end, and back from there once
                    cut = found.end() if found else len(rest) - 1  # text without such a place is cut anywhere
                    yield rest[:cut], False
                    rest = rest[cut:]
            if rest:
                yield rest, True

    def rows(self, file: Path) -> Iterator[tuple[str, object]]:
        """Yield (place, row) for each row of a file; of a file whose first row is unknown, (file, its text)."""
        named = file.name.lower().removesuffix(".gz").removesuffix(".bz2").endswith((".jsonl", ".ndjson"))
        start = "" if named else next(read_text(file), "").lstrip()
        if ".json" in file.suffixes and re.match(r"\[\s*\{", start):
            next(read_json(file))  # UserError if the array is broken, or too large
        with suppress(UserError, StopIteration):
            named = named or start[:1] in ("{", "[") and (self.column or read_row(next(read_json(file))[1], ""))
        return read_json(file) if named else iter([(str(file), read_text(file))])
