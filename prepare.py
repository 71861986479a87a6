"""
Text to tokens: data/NAME/tokenizer.json, train.bin, val.bin and meta.json, from any text you have.

    python prepare.py                                                   # Tiny Shakespeare, vocabulary 5,000
    python prepare.py --input=notes.txt --dataset=notes                 # a file, a folder, or a glob in quotes
    python prepare.py --input="blog/**/*.md" --dataset=blog --vocab_size=8000
    python prepare.py --input=posts.jsonl --dataset=posts --tokenizer=HuggingFaceTB/SmolLM2-135M    # to fine-tune it
    python prepare.py --input=talks.jsonl --dataset=talks --tokenizer=out/SmolLM2-135M-Instruct --show=3    # to chat
    python prepare.py config/tiny_shakespeare.py                        # what train.py does by itself for a recipe

A .jsonl file holds a document per line, in its "text" field, or a conversation per line, in "messages"
(conversations.py says what else it takes); any other file is one document of UTF-8 text. A tenth of the text becomes
validation, and the tokenizer is trained on the rest alone. Of ten different documents or more, a hash of the text
chooses which: evenly over the corpus, copies of a document together, the same ones in every run. Of fewer it is the
last ones, of one its last part. Each document ends with <|endoftext|>. Texts are read in pieces, so they may be larger
than memory.

The .bin files are little-endian uint16 token ids without a header, as in nanoGPT. Conversations have train.mask.bin and
val.mask.bin beside them, a byte for each token: 1 where it is to be learnt, 2 where a conversation begins, else 0.
"""

import codecs
import hashlib
import json
import os
import re
import shlex
import sys
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from lib.conversations import CHATML, Template, messages_of, read_chat_template
from lib.files import atomic, exclusive, file_sha256, load_tokenizer, read_errors_as_user_error, read_json
from lib.settings import NonNegativeInt, UserError, Within, check, override, print_safe, run_main

import numpy as np
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

MAX_VOCAB_SIZE = 65536  # what uint16 can number
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2


@dataclass
class Settings:
    input: str = ""  # file, folder or glob; shakespeare downloads Tiny Shakespeare; empty: data/DATASET/input.txt
    dataset: str = "shakespeare"  # the result goes to data/DATASET/
    tokenizer: str = "bpe"  # bpe trains one; or a tokenizer.json, a directory or hub id that has one, or gpt2
    # the smallest vocabulary is the bytes and the special tokens, the largest what uint16 holds
    vocab_size: Annotated[int, Within(256 + len(SPECIAL), MAX_VOCAB_SIZE)] = 5000  # of a trained tokenizer; to 65536
    val_fraction: Annotated[float, Within(above=0, below=1)] = 0.1  # how much of the text is kept for validation
    show: NonNegativeInt = 0  # print so many conversations of the training part, what is learnt of them in green


DATA = Path("data")
PIECE = 1 << 18  # characters per piece: large enough for speed, small enough that many fit in memory
STRETCH = 1 << 18  # characters without a space or line break that are held; a longer stretch is cut anywhere
LINE = 16 << 20  # characters of a line of a .jsonl file, which is held whole
MANY = 10  # different documents, from which a hash chooses those for validation
HASHES = 1 << 16
PORTION = 1 << 22  # characters of conversations that are rendered at once
COMPARED = 64 << 20  # bytes: before a run, an input that is smaller is compared by what it holds, not by its size alone
TOKENIZER_BYTES = 16 << 20  # of text that a tokenizer is trained on: more make hardly a better one
DISTINCT_BYTES = 2 << 20  # of different words in it: training takes up to 140 times as much memory
# Parts of a text for the trainer, which is quadratic in the length of a word; and about what it takes for a word.
STRETCHES = re.compile(r"(?s).{1,999}\S(?=[ \n])|.{1,1000}")
WORD = re.compile(r"[^\W\d]+|[^\w\s]+")
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE = DATA / "shakespeare" / "input.txt"  # the download is kept here
PLAY = Path(__file__).parent / "data" / "shakespeare" / "play.txt"  # used if there is no network


# ----------------------------------------------------------------------------------------------------------------------
# where the text comes from


def input_path(name: str, dataset: str) -> Path:
    """What a setting `input` stands for: itself, the download of Tiny Shakespeare, or if empty data/DATASET/input.txt,
    which for the default data set is that download."""
    return Path(name) if name not in ("", "shakespeare") else DATA / (name or dataset) / "input.txt"


def find_input(s: Settings) -> list[Path]:
    """The files to read, each once, in a fixed order. Hidden files and folders, and folders behind links, are left out,
    but for those that --input spells out. UserError where there are none."""
    path = input_path(s.input, s.dataset)
    if path == SHAKESPEARE:
        return [shakespeare()]
    if path.is_file():  # before the glob: a name may have brackets in it
        return [path]
    if not s.input:
        raise UserError(f"nothing to prepare: give --input=FILE, a folder or a glob, or put the text at {path}.")
    pattern = "**/*" if path.is_dir() else str(path.relative_to(path.anchor))
    pattern = re.sub(r"\*\*$", "**/*", re.sub(r"\*\*+(?=[^/*])|(?<=[^/*])\*\*+", "*", pattern))  # what glob.glob takes
    files = {}
    for file in sorted((path if path.is_dir() else Path(path.anchor)).glob(pattern)):
        hidden = any(part.startswith(".") and part not in path.parts for part in file.parts)
        if file.is_file() and not hidden:
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise UserError(f"--input={s.input}: no such file, folder with files, or glob that matches one.")
    return list(files.values())


def shakespeare() -> Path:
    """data/shakespeare/input.txt, downloaded if it is not there. Without a network it prints a warning and returns the
    play that is part of this repository. UserError if the download is not Tiny Shakespeare."""
    path = SHAKESPEARE
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=5) as response:
            with tqdm(total=SHAKESPEARE_BYTES, unit="B", unit_scale=True, desc="Tiny Shakespeare", disable=None) as bar:
                text = b""
                while block := response.read(1 << 16):
                    text += block
                    bar.update(len(block))
    except OSError as error:  # no network, no such host, a time-out, a refusal: URLError is one
        print_safe(
            f"!! OFFLINE: Tiny Shakespeare could not be downloaded ({error}). Using {PLAY.name} instead, an original "
            f"play a tenth its size that comes with this project. For the real one, put it at {path}."
        )
        return PLAY
    if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{SHAKESPEARE_URL} gave {len(text):,} bytes that are not Tiny Shakespeare (wrong sha256); a proxy's page, "
            f"perhaps. Put the file at {path} by hand, or give --input."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_bytes(text)
    return path


def text_changed(dataset: str, meta: dict) -> bool:
    """Whether the input of a prepared data set is not what it was any more. One that has gone is no change."""
    path = input_path(meta.get("input", ""), dataset)
    if path == SHAKESPEARE and not path.is_file():
        return False  # the play, or a download that was deleted: none is made for this
    try:
        files = find_input(Settings(input=str(path)))
        size, sha256 = sum(os.path.getsize(file) for file in files), hashlib.sha256()
        for file in files if size < COMPARED else ():
            sha256.update(file.read_bytes())
    except (UserError, OSError):
        return False
    known = meta.get("source_bytes", size)  # earlier versions did not keep it
    return size != known or size < COMPARED and sha256.hexdigest() != meta["source_sha256"]


@dataclass
class Source:
    """What scan() counts: enough to split the input without holding it in memory."""

    files: list[Path]
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of text: without byte order marks and without the JSON around it
    sha256: str = ""  # of all the files' bytes
    file_bytes: int = 0
    chat: bool = False  # whether the documents are conversations
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(HASHES, np.int64))  # characters, by document's hash


def read_pieces(source: Source, sha256=None) -> Iterator[tuple[str, int, bool]]:
    """(piece, the hash of its document, whether it ends its document) for all the text; a conversation is one piece, as
    JSON. UserError names what cannot be read. `sha256`, if given, is updated with the files' bytes."""
    for file in source.files:
        if file.suffix.lower() != ".jsonl":
            if source.chat:
                raise UserError(f"{file} is no .jsonl file, and the others hold conversations. Leave it out.")
            yield from in_pieces(read_text(file, sha256))
            continue
        for text in read_jsonl(file, sha256, source.chat):
            if source.chat:
                yield text, text_hash(text), True
            else:
                yield from in_pieces(text[i : i + PIECE] for i in range(0, len(text), PIECE))


def in_pieces(blocks: Iterable[str]) -> Iterator[tuple[str, int, bool]]:
    """A document in pieces of about PIECE characters. They are cut where every tokenizer of the byte-level family cuts,
    so encoding piece by piece gives the same ids as encoding the whole. Only where STRETCH characters, more than any
    word has, offer no such place, the cut falls anywhere. The hash is that of the first piece, 0 to HASHES - 1."""
    rest, document = "", None
    for block in blocks:
        rest += block
        if len(rest) >= PIECE and (cut := last_cut(rest) or (len(rest) >= STRETCH and len(rest) - 1)):
            document = text_hash(rest[:cut]) if document is None else document
            yield rest[:cut], document, False
            rest = rest[cut:]
    if rest:
        yield rest, text_hash(rest) if document is None else document, True


def text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=2).digest(), "big")


def read_jsonl(file: Path, sha256, chat: bool) -> Iterator[str]:
    """The text of each line, or the messages of each line as JSON; blank lines and empty texts are skipped. UserError
    gives the number of a bad line."""
    for number, line in enumerate(read_lines(file, sha256), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = json.dumps(messages_of(row)) if chat else row["text"]
            text.encode()  # half of a surrogate pair is JSON, but not text
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wanted = 'a JSON object with "messages"' if chat else 'a JSON object with a "text" field of text'
            raise UserError(f"{file}, line {number}: expected {wanted}.") from None
        if text:
            yield text


def holds_conversations(files: list[Path]) -> bool:
    """Whether the first line of the first .jsonl file is a conversation, by its keys."""
    lines = (line for file in files if file.suffix.lower() == ".jsonl" for line in read_lines(file, None))
    line = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # read_jsonl() names the line
        return False
    return (
        isinstance(row, dict) and "text" not in row and bool(row.keys() & {"messages", "conversations", "completion"})
    )


def read_text(file: Path, sha256) -> Iterator[str]:
    """The decoded text of a file, block by block, line ends unchanged. UserError gives the position of a bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        with open(file, "rb") as f:
            while True:
                block = f.read(PIECE)
                if sha256 is not None:
                    sha256.update(block)
                held = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    at = position - held + error.start
                    convert = f"Convert it with: iconv -f latin1 -t utf-8 {shlex.quote(str(file))}"
                    raise UserError(
                        f"{file}: not UTF-8 text (byte {at:,} is {error.object[error.start]:#04x}). "
                        f"{'Unpack it first' if file.suffix.lower() in PACKED else convert}, or leave it out with a "
                        "glob such as 'folder/**/*.txt'."
                    ) from None
                if position == 0:
                    text = text.removeprefix("\ufeff")  # the byte order mark of Windows
                position += len(block)
                if text:
                    yield text
                if not block:
                    return
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None


def read_lines(file: Path, sha256) -> Iterator[str]:
    """UserError for a line that is too long to hold."""
    line, number = [], 1  # the parts of a line that blocks have cut
    for text in read_text(file, sha256):
        *ends, rest = text.split("\n")
        for end in ends:
            yield "".join([*line, end])
            line, number = [], number + 1
        line.append(rest)
        if sum(map(len, line)) > LINE:
            raise UserError(f"{file}, line {number}: over {LINE:,} characters. Put that text into a .txt file.")
    yield "".join(line)


def last_cut(text: str) -> int:
    """The last place where a word ends and a space or line break begins; 0 if there is none."""
    found = re.match(r"(?s).*\S(?=[ \n])", text)  # goes to the end, and back from there once
    return found.end() if found else 0


def scan(files: list[Path]) -> Source:
    """Read all the input once and count it. UserError if some of it cannot be read, or there is no text in it."""
    source = Source(files, file_bytes=sum(os.path.getsize(file) for file in files), chat=holds_conversations(files))
    sha256 = hashlib.sha256()
    with tqdm(total=source.file_bytes, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for text, document, ends in read_pieces(source, sha256):
            size = len(text.encode())
            source.bytes += size
            source.characters += len(text)
            source.documents += ends
            source.sizes[document] += len(text)
            bar.update(size)
    if source.documents == 0:
        raise UserError(f"{', '.join(map(str, files[:3]))}: no text in it. An empty file cannot be trained on.")
    if source.chat and source.documents == 1:
        raise UserError(f"{files[0]}: too few conversations to split into training and validation.")
    source.sha256 = sha256.hexdigest()
    return source


def held_out(source: Source, val_fraction: float) -> np.ndarray | None:
    """(HASHES,) bool: whose documents are validation. In the order of the hashes, those that bring the validation text
    nearer to val_fraction of all are taken. None where there are fewer than MANY different documents."""
    found = np.flatnonzero(source.sizes)
    if len(found) < MANY:
        return None
    wanted, taken = val_fraction * source.characters, []
    for i in found:
        if source.sizes[i] / 2 <= wanted:
            taken.append(i)
            wanted -= source.sizes[i]
    taken = taken or [found[np.argmin(source.sizes[found])]]  # all of them are too large: the smallest
    chosen = np.zeros(HASHES, bool)
    chosen[taken[: len(found) - 1]] = True  # something must be left to train on
    return chosen


def split(source: Source, val_fraction: float) -> Iterator[tuple[str, bool, str]]:
    """("train" or "val", whether the piece ends its document, the piece). Of many documents, validation are those that
    held_out() says; of several, those that begin in the last val_fraction of the text, and at least the last one; of a
    single one its last characters, as in nanoGPT. UserError if the input is not what scan() has counted."""
    chosen = held_out(source, val_fraction)
    train_characters = int(source.characters * (1 - val_fraction))
    seen, documents, part = 0, 0, "train"
    for text, document, ends in read_pieces(source):
        if source.documents == 1:
            cut = max(0, train_characters - seen)
            if text[:cut]:
                yield "train", ends and cut >= len(text), text[:cut]
            if text[cut:]:
                yield "val", ends, text[cut:]
        else:
            if chosen is not None:
                part = "val" if chosen[document] else "train"
            yield part, ends, text
        seen += len(text)
        documents += ends
        if ends and (seen >= train_characters or documents == source.documents - 1):
            part = "val"
    if (seen, documents) != (source.characters, source.documents):
        raise UserError(f"{source.files[0]}, or a file beside it, changed while it was read. Run this again.")


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer, and text to ids


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE that cuts text as SmolLM2's does: digits one by one, then GPT-2's split into words. All 256
    bytes are in the alphabet, so every text can be encoded. llama.cpp knows this pre-tokenizer as "smollm". The
    vocabulary is smaller than asked where the text has no more pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    thread = threading.Thread(target=tokenizer.train_from_iterator, args=(texts, trainer), daemon=True)
    thread.start()  # the library does not look for Ctrl-C; join() does
    thread.join()
    return tokenizer


def trained_tokenizer(source: Source, vocab_size: int, val_fraction: float) -> tuple[Tokenizer, str, bytes]:
    """A tokenizer trained on the training part; returns the same three things as find_tokenizer()."""
    print_safe(f"training a tokenizer of {vocab_size:,} tokens on the training part ...")
    tokenizer = train_bpe(tokenizer_sample(source, val_fraction), vocab_size)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        print_safe(f"the text has pairs for {size:,} tokens only; that is the vocabulary now")
    return tokenizer, END, tokenizer.to_str(pretty=True).encode()


def tokenizer_sample(source: Source, val_fraction: float) -> list[str]:
    """The training text in parts of up to 1,000 characters. Where it is larger than TOKENIZER_BYTES, or has more than
    DISTINCT_BYTES of different words, parts spread evenly over it."""
    keep, credit, sample = min(1.0, TOKENIZER_BYTES / source.bytes), 0.0, []
    for part, _, text in split(source, val_fraction):
        credit += keep
        if part == "train" and credit >= 1.0:
            credit -= 1.0
            texts = [message["content"] for message in json.loads(text)] if source.chat else [text]
            sample += [part for text in texts for part in STRETCHES.findall(text)]
    while many_words(sample):
        del sample[1::2]
    return sample


def many_words(sample: list[str]) -> bool:
    """Whether the different words of the sample have more than DISTINCT_BYTES together."""
    seen, size = set(), 0
    for text in sample:
        new = set(WORD.findall(text)) - seen
        size += sum(len(word.encode()) for word in new)
        if size > DISTINCT_BYTES:
            return True
        seen |= new
    return False


def find_tokenizer(name: str) -> tuple[Tokenizer, str, bytes]:
    """An existing tokenizer, the text of the token that ends a document, and the bytes of its file. UserError if there
    is none of that name, it has no such token, or it has more tokens than uint16 can number."""
    path = Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        if path.exists() or name.startswith((".", "/", "~")) or name.endswith(".json"):
            raise UserError(f"--tokenizer={name}: no tokenizer.json there.")
        repository = "openai-community/gpt2" if name == "gpt2" else name
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(repository, "tokenizer.json"))
            hf_hub_download(repository, "tokenizer_config.json")
        except Exception as error:  # offline, unknown, gated, not a hub id: the library has a class for each
            raise UserError(
                f"--tokenizer={name}: not a file or directory here, and not to be had from huggingface.co "
                f"({type(error).__name__}). Expected bpe, a tokenizer.json, a directory or hub id with one, or gpt2."
            ) from None
    tokenizer = load_tokenizer(file)
    size, end = tokenizer.get_vocab_size(), END
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= size:
        raise UserError(f"{file} has {size:,} tokens, but ids up to {last:,}.")
    if tokenizer.token_to_id(END) is None:
        settings = file.with_name("tokenizer_config.json")
        end = read_json(settings).get("eos_token") if settings.is_file() else None
        end = end.get("content") if isinstance(end, dict) else end
        if not isinstance(end, str) or tokenizer.token_to_id(end) is None:
            raise UserError(f"{file} has no {END} and no eos_token: nothing to put between documents.")
    if size > MAX_VOCAB_SIZE:
        raise UserError(f"--tokenizer={name} has {size:,} tokens; a uint16 token file holds {MAX_VOCAB_SIZE:,}.")
    return tokenizer, end, file.read_bytes()


Encoder = Callable[[str], np.ndarray]  # text -> its ids, uint32; text that spells a special token stays text

# GPT-2's pattern, and the pattern that cuts as Digits followed by ByteLevel does: digits one by one, and white space
# before a digit kept whole. tests/test_prepare.py compares both with the tokenizers library.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""
DIGITS_PATTERN = r"""'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s+"""
HARD_TEXT = (
    "It's 2 late,\r\n\r\n  we've  12 owls 🦉🏽 漢字かな １２\t½ \0 <|endoftext|> l'été n'est-ce\n\n\n 7 !!! naïve"
)


def byte_letters() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones as themselves, the others as the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def fast_encoder(tokenizer: Tokenizer) -> Encoder | None:
    """The tokenizer through tiktoken, several times as fast as `tokenizers`; None where it is of another kind than
    GPT-2's byte-level BPE."""
    spec = json.loads(tokenizer.to_str())
    pre = spec["pre_tokenizer"]
    steps = () if pre is None else tuple(step["type"] for step in pre.get("pretokenizers", [pre]))
    patterns = {("Digits", "ByteLevel"): DIGITS_PATTERN, ("ByteLevel",): GPT2_PATTERN}
    if spec["model"]["type"] != "BPE" or spec["normalizer"] or steps not in patterns:
        return None
    letters = byte_letters()
    special = {token["content"] for token in spec["added_tokens"]}
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in special}
    if not all(letters.keys() >= set(token) for token in vocab):
        return None
    ranks = {bytes(letters[c] for c in token): i for token, i in vocab.items()}
    size = max(ranks.values()) + 1
    # SmolLM2's vocabulary lacks 21 bytes. `tokenizers` drops them from the text; tiktoken needs an id for every byte,
    # so they are numbered past the end, and those ids are dropped.
    for b in range(256):
        ranks.setdefault(bytes([b]), size + b)
    encoding = tiktoken.Encoding("own", pat_str=patterns[steps], mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> np.ndarray:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        return ids[ids < size]

    return encode


def make_encoder(tokenizer: Tokenizer, sample: str) -> Encoder:
    """The fast encoder if it gives the same ids as `tokenizers` on hard strings and on a sample of this text; otherwise
    `tokenizers` itself, with a message."""
    tokenizer.encode_special_tokens = True

    def plain(text):
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    fast = fast_encoder(tokenizer)
    if fast is None:
        print_safe("this tokenizer is not a GPT-2 style byte-level BPE: encoding with the tokenizers library, slower")
        return plain
    if not all(np.array_equal(fast(text), plain(text)) for text in (HARD_TEXT, sample[:20000])):
        print_safe("tiktoken disagrees with the tokenizers library on this tokenizer: encoding with the latter, slower")
        return plain
    return fast


def encode_all(encode: Encoder, pieces: Iterable[tuple]) -> Iterator[tuple]:
    """(*tags, text) in, (*tags, text, ids) out, in order, encoded on every core with a bounded number in flight."""
    threads = min(16, os.cpu_count() or 1)  # more would wait for the one that reads and writes
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for piece in pieces:
            waiting.append((piece, pool.submit(encode, piece[-1])))
            if len(waiting) > 2 * threads:
                piece, result = waiting.popleft()
                yield *piece, result.result()
        for piece, result in waiting:
            yield *piece, result.result()


# ----------------------------------------------------------------------------------------------------------------------
# the data folder


def prepare(s: Settings) -> dict:
    """Make data/DATASET from the settings; returns what its meta.json holds. An earlier data set of that name stays
    until all of the new one is written. UserError says what cannot be prepared."""
    check(Settings, **asdict(s))
    if Path(s.dataset).name != s.dataset or s.dataset in ("", ".", ".."):
        raise UserError(f"--dataset={s.dataset}: expected a plain name; the result goes to data/NAME/.")
    found = find_tokenizer(s.tokenizer) if s.tokenizer != "bpe" else None
    source, before = scan(find_input(s)), None
    with suppress(UserError):  # nothing there, or damaged
        before = input_path(read_meta(s.dataset).get("input", ""), s.dataset)
    try:
        with exclusive(DATA / s.dataset, "being prepared"):
            meta = write_data(s, source, *(found or trained_tokenizer(source, s.vocab_size, s.val_fraction)))
    except BrokenPipeError:  # of what is printed
        raise
    except OSError as error:  # of what is written: the reader names its files itself
        file = error.filename2 or error.filename or DATA / s.dataset
        raise UserError(f"{file} cannot be written ({error.strerror or error}).") from None
    train_tokens, val_tokens = meta["train_tokens"], meta["val_tokens"]
    kind = "conversation" if source.chat else "document"
    documents = f"1 {kind}" if source.documents == 1 else f"{source.documents:,} {kind}s"
    if before and os.path.abspath(before) != os.path.abspath(input_path(s.input, s.dataset)):
        print_safe(f"data/{s.dataset}: the data set of {before} is replaced")
    print_safe(
        f"data/{s.dataset}: {meta['source']}, {documents}, {source.bytes:,} bytes\n"
        f"  train {train_tokens:,} tokens, val {val_tokens:,} tokens, vocabulary {meta['vocab_size']:,}, "
        f"{source.bytes / (train_tokens + val_tokens):.2f} bytes per token"
    )
    if source.chat:
        train_loss, val_loss = meta["train_loss_tokens"], meta["val_loss_tokens"]
        learnt = f"  to be learnt: {train_loss:,} of the train and {val_loss:,} of the val tokens"
        print_safe(f"{learnt}; an answer ends with {meta['eos_token']}")
        show_conversations(DATA / s.dataset, s.show)
    return meta


def write_data(s: Settings, source: Source, tokenizer: Tokenizer, end: str, tokenizer_json: bytes) -> dict:
    """The files of data/DATASET, all or none; returns what meta.json holds."""
    folder = DATA / s.dataset
    names = ["meta.json", "tokenizer.json", "val.bin", "train.bin"]
    names += ["chat_template.jinja", "val.mask.bin", "train.mask.bin"] if source.chat else []
    with ExitStack() as stack:  # left in reverse order: meta.json, which describes the others, gets its name last
        files = {name: stack.enter_context(atomic(folder / name)) for name in names}
        if source.chat:
            counts, end = write_conversations(s, source, tokenizer, files)
        else:
            counts = write_bins(s, source, tokenizer, end, files["train.bin"], files["val.bin"])
        files["tokenizer.json"].write_bytes(tokenizer_json)
        by_hash = held_out(source, s.val_fraction) is not None
        meta = dict(
            vocab_size=tokenizer.get_vocab_size(), eos_token_id=tokenizer.token_to_id(end), eos_token=end,
            tokenizer=s.tokenizer, vocab_size_asked=s.vocab_size, val_fraction=s.val_fraction,
            tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
            **counts, documents=source.documents, input=s.input,
            validation="documents by hash" if by_hash else "last part" if source.documents == 1 else "last documents",
            source=s.input if len(source.files) > 1 else source.files[0].name,
            source_bytes=source.file_bytes, source_sha256=source.sha256,
        )  # fmt: skip
        files["meta.json"].write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        for file in files.values():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())  # a full disk may say so only here, and the earlier data set is still whole
        (folder / "meta.json").unlink(missing_ok=True)  # until the last rename the folder counts as unprepared
    return meta


def write_bins(s: Settings, source: Source, tokenizer: Tokenizer, end: str, train_file: Path, val_file: Path) -> dict:
    """Encode all the text into the two token files; returns the tokens and the bytes of text of each, as meta.json
    names them. UserError if the text is too short to split."""
    vocab_size, eos = tokenizer.get_vocab_size(), tokenizer.token_to_id(end)
    encode = make_encoder(tokenizer, next((text for text, *_ in read_pieces(source)), ""))
    counts = dict(train_tokens=0, val_tokens=0, train_bytes=0, val_bytes=0)
    bar = tqdm(total=source.bytes, unit="B", unit_scale=True, desc="encoding", disable=None)
    with open(train_file, "wb") as train, open(val_file, "wb") as val, bar:
        for part, ends, text, ids in encode_all(encode, split(source, s.val_fraction)):
            ids = np.append(ids, eos) if ends else ids
            assert ids.size == 0 or ids.max() < vocab_size, f"token id {ids.max()} in a vocabulary of {vocab_size}"
            (train if part == "train" else val).write(ids.astype("<u2").tobytes())
            size = len(text.encode())
            counts[f"{part}_tokens"] += len(ids)
            counts[f"{part}_bytes"] += size
            bar.update(size)
    if min(counts["train_tokens"], counts["val_tokens"]) < 2:
        raise UserError(f"{source.files[0]}: too short to split into training and validation text.")
    return counts


def write_conversations(s: Settings, source: Source, tokenizer: Tokenizer, files: dict[str, Path]) -> tuple[dict, str]:
    """Encode all conversations with the model's chat template, or ChatML where it has none. Returns what meta.json says
    of them (bytes are those of the answers), and the token that ends an answer. UserError where one has nothing to
    learn, or the template ends answers with no token of its own."""
    tokenizer.encode_special_tokens = True
    template = template_for(s.tokenizer, tokenizer)
    files["chat_template.jinja"].write_text(template.text, encoding="utf-8")
    counts = {f"{part}_{what}": 0 for part in ("train", "val") for what in ("tokens", "loss_tokens", "bytes")}
    waiting, held, end = {"train": [], "val": []}, {"train": 0, "val": 0}, None
    with ExitStack() as stack:
        out = {name: stack.enter_context(open(file, "wb")) for name, file in files.items() if name.endswith(".bin")}
        bar = stack.enter_context(tqdm(total=source.documents, unit=" talks", desc="encoding", disable=None))

        def encode(part: str):
            nonlocal end
            for messages, (ids, learnt) in zip(waiting[part], template.encode(waiting[part])):
                last = next((i for i, chosen in zip(reversed(ids), reversed(learnt)) if chosen), None)
                end = end or (tokenizer.id_to_token(last) if last in template.special.values() else None)
                if last is None or end is None:
                    what = "nothing to learn" if last is None else "an answer that no special token ends"
                    raise UserError(f"{source.files[0]}: a conversation has {what}: {json.dumps(messages)[:200]}")
                out[f"{part}.bin"].write(np.array(ids, "<u2").tobytes())
                out[f"{part}.mask.bin"].write(bytes([2, *learnt[1:]]))
                answers = [m["content"] for m in messages if m["role"] == "assistant"]
                for what, more in dict(
                    tokens=len(ids), loss_tokens=sum(learnt), bytes=len("".join(answers).encode())
                ).items():
                    counts[f"{part}_{what}"] += more
                bar.update(1)
            waiting[part] = []

        for part, _, text in split(source, s.val_fraction):
            waiting[part].append(json.loads(text))
            held[part] += len(text)
            if len(waiting[part]) == 500 or held[part] > PORTION:
                encode(part)
                held[part] = 0
        encode("train")
        encode("val")
    if not (counts["train_loss_tokens"] and counts["val_loss_tokens"]):
        raise UserError(f"{source.files[0]}: too few conversations to split into training and validation.")
    return counts, end


def template_for(name: str, tokenizer: Tokenizer) -> Template:
    """The template of the model directory or hub id that a tokenizer comes from; ChatML where there is none."""
    if Path(name).is_file():
        folder = Path(name).parent
    elif Path(name).is_dir() or name in ("bpe", "gpt2"):
        folder = Path(name)
    else:
        from checkpoint import find  # which costs the import of torch

        folder = find(name)
    text = read_chat_template(folder)
    if text is None:
        return Template(CHATML, tokenizer, {})
    return Template.of(folder, tokenizer)


def show_conversations(folder: Path, count: int):
    """Print the first conversations of the training part, token by token, what is learnt of them in green."""
    if count == 0:
        return
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    ids, mask = np.fromfile(folder / "train.bin", "<u2"), np.fromfile(folder / "train.mask.bin", np.uint8)
    begins = [*np.flatnonzero(mask == 2), len(mask)]
    for a, b in zip(begins[:count], begins[1:]):
        edges = [a, *(np.flatnonzero(np.diff((mask[a:b] == 1).astype(int))) + a + 1), b]
        for x, y in zip(edges, edges[1:]):
            text = tokenizer.decode(ids[x:y].tolist(), skip_special_tokens=False)
            print_safe(f"\033[32m{text}\033[0m" if mask[x] == 1 else text, end="")
        print_safe("")


META = dict(
    vocab_size=int, eos_token_id=int, eos_token=str, tokenizer=str, vocab_size_asked=int, tokenizer_sha256=str,
    train_tokens=int, val_tokens=int, train_bytes=int, val_bytes=int, documents=int, source=str, source_sha256=str,
)  # fmt: skip


def command(dataset: str, meta: dict) -> str:
    """The command that makes a data set again as it was made."""
    asked = dict(dataset=dataset, input=meta.get("input"), tokenizer=meta["tokenizer"])
    asked["vocab_size"] = meta["vocab_size_asked"]
    if meta.get("val_fraction", Settings.val_fraction) != Settings.val_fraction:
        asked["val_fraction"] = meta["val_fraction"]
    return "python prepare.py " + shlex.join(f"--{key}={value}" for key, value in asked.items() if value)


def read_meta(dataset: str) -> dict:
    """meta.json of data/DATASET. UserError if it is damaged, or the files beside it are not the ones it describes."""
    folder = DATA / dataset
    again = f"Make it again with: python prepare.py --input=TEXT --dataset={dataset}"
    with read_errors_as_user_error(folder / "meta.json", again):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        wrong = [k for k, kind in META.items() if type(meta.get(k)) is not kind or kind is int and meta[k] < 0]
        if wrong:
            raise ValueError(f"missing or wrong: {', '.join(wrong)}")
    again = f"Make it again with: {command(dataset, meta)}"
    for part in ("train", "val"):
        file = folder / f"{part}.bin"
        size = file.stat().st_size if file.is_file() else 0
        if size != 2 * meta[f"{part}_tokens"]:
            raise UserError(f"{file} has {size:,} bytes, meta.json says {2 * meta[f'{part}_tokens']:,}. {again}")
        largest = np.memmap(file, "<u2", "r")[:: size // 8192 + 1].max() if size else 0  # of some thousands
        if largest >= meta["vocab_size"]:
            raise UserError(f"{file} holds token id {largest}, the vocabulary has {meta['vocab_size']:,}. {again}")
        mask = file.with_suffix(".mask.bin")
        if f"{part}_loss_tokens" in meta and (not mask.is_file() or 2 * mask.stat().st_size != size):
            raise UserError(f"{mask} has not a byte for each token of {file}. {again}")
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file() or file_sha256(tokenizer) != meta["tokenizer_sha256"]:
        raise UserError(f"{tokenizer} is not the one that the .bin files were made with. {again}")
    return meta


def check_flags(s: Settings, given: set[str]):
    """UserError if a flag asks for another data set than data/DATASET, as it was made. `given` names the settings that
    are flags: what a recipe says of a data set serves to make one, and asks nothing of one that exists."""
    meta = read_meta(s.dataset)
    made = dict(
        input=input_path(meta.get("input", ""), s.dataset), tokenizer=meta["tokenizer"], vocab_size=meta["vocab_size"],
        val_fraction=meta.get("val_fraction", Settings.val_fraction),
    )  # fmt: skip
    asked = asdict(s) | dict(input=input_path(s.input, s.dataset))
    if s.vocab_size == meta["vocab_size_asked"]:  # a short text, or a tokenizer that was taken, has another number
        given = given - {"vocab_size"}
    for key, value in made.items():
        if key in given and os.path.abspath(str(asked[key])) != os.path.abspath(str(value)):  # as paths: "a" is "./a"
            raise UserError(
                f"data/{s.dataset} was made with {key}={value}, and --{key}={asked[key]} asks for another. Give that "
                f"one a name of its own with --dataset, or leave --{key} out to use data/{s.dataset} as it is."
            )


def main():
    (settings,) = override(sys.argv[1:], Settings, doc=__doc__, shared_with=str(Path(__file__).with_name("train.py")))
    prepare(settings)


if __name__ == "__main__":
    run_main(main)
