"""
Text to tokens: data/NAME/tokenizer.json, train.bin, val.bin and meta.json, from any text you have.

    python prepare.py                                                   # Tiny Shakespeare, vocabulary 5,000
    python prepare.py --input=notes.txt --dataset=notes                 # a file, a folder, or a glob in quotes
    python prepare.py --input="blog/**/*.md" --dataset=blog --vocab_size=8000
    python prepare.py --input=posts.jsonl --dataset=posts --tokenizer=HuggingFaceTB/SmolLM2-135M    # to fine-tune it
    python prepare.py config/tiny_shakespeare.py                        # what train.py does by itself for a recipe

A .jsonl file holds a document per line, in its "text" field; any other file is one document of UTF-8 text. The last
tenth of the documents (of the text, where there is only one) becomes validation; the tokenizer is trained on the rest
alone. Each document ends with <|endoftext|>. Texts are read in pieces, so they may be larger than memory.

The .bin files are little-endian uint16 token ids without a header, as in nanoGPT.
"""

import codecs
import glob
import hashlib
import json
import sys
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from config import UserError, guard, override
from files import atomic, exclusive, file_sha256, read_json


@dataclass
class Settings:
    input: str = ""  # file, folder or glob; "shakespeare" is Tiny Shakespeare; empty: data/DATASET/input.txt
    dataset: str = "shakespeare"  # the result goes to data/DATASET/
    tokenizer: str = "bpe"  # bpe trains one; or a tokenizer.json, a directory or hub id that has one, or gpt2
    vocab_size: int = 5000  # of a trained tokenizer; at most 65536, what uint16 holds
    val_fraction: float = 0.1  # how much of the text is kept for validation


DATA = Path("data")
PIECE = 1 << 20  # characters per piece: large enough for speed, small enough that many fit in memory
TOKENIZER_BYTES = 256 << 20  # a larger sample makes no better tokenizer, but training on it takes the memory
MAX_VOCAB_SIZE = 65536  # what uint16 can number
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394
PLAY = Path(__file__).parent / "data" / "shakespeare" / "play.txt"  # used where there is no network


# ----------------------------------------------------------------------------------------------------------------------
# where the text comes from


def find_input(s: Settings) -> list[Path]:
    """The files to read, in a fixed order. UserError where there are none."""
    if s.input and s.input != "shakespeare":
        path = Path(s.input)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        elif path.is_file():  # before the glob: a name may have brackets in it
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(s.input, recursive=True)) if p.is_file())
        if not files:
            raise UserError(f"--input={s.input}: no such file, folder with files, or glob that matches one.")
        return files
    own = DATA / s.dataset / "input.txt"
    if own.is_file():
        return [own]
    if not s.input and s.dataset != "shakespeare":
        raise UserError(f"nothing to prepare: give --input=FILE, a folder or a glob, or put the text at {own}.")
    return [shakespeare()]


def shakespeare() -> Path:
    """data/shakespeare/input.txt, downloaded if it is not there. Without a network it prints a warning and returns the
    play that is part of this repository. UserError if the download is not Tiny Shakespeare."""
    path = DATA / "shakespeare" / "input.txt"
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
        print(
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


def read_pieces(files: list[Path], sha256=None) -> Iterator[tuple[str, bool]]:
    """(piece, whether it ends its document) for all the text. UserError names what cannot be read.
    `sha256`, if given, is updated with the files' bytes."""
    for file in files:
        read = read_jsonl if file.suffix == ".jsonl" else read_document
        yield from read(file, sha256)


def read_jsonl(file: Path, sha256) -> Iterator[tuple[str, bool]]:
    """Each line's text as one piece; blank lines and empty texts are skipped."""
    for number, line in enumerate(read_lines(file, sha256), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UserError(f'{file}, line {number}: expected a JSON object with a "text" field of text.')
        if text:
            yield text, True


def read_document(file: Path, sha256) -> Iterator[tuple[str, bool]]:
    """A text file in pieces of about PIECE characters. They are cut where every tokenizer of the byte-level family
    cuts, so encoding piece by piece gives the same ids as encoding the whole."""
    rest = ""
    for text in read_text(file, sha256):
        rest += text
        cut = last_cut(rest) if len(rest) >= PIECE else 0
        if cut:
            yield rest[:cut], False
            rest = rest[cut:]
    if rest:
        yield rest, True


def read_text(file: Path, sha256) -> Iterator[str]:
    """The decoded text of a file, block by block, line ends unchanged. UserError gives the position of a bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # skips a byte order mark
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
                    raise UserError(
                        f"{file}: not UTF-8 text (byte {at:,} is {error.object[error.start]:#04x}). Convert it with: "
                        f"iconv -f latin1 -t utf-8 {file}, or leave it out with a glob such as 'folder/**/*.txt'."
                    ) from None
                position += len(block)
                if text:
                    yield text
                if not block:
                    return
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}.") from None


def read_lines(file: Path, sha256) -> Iterator[str]:
    rest = ""
    for text in read_text(file, sha256):
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


def last_cut(text: str) -> int:
    """The last place where a word ends and a space or line break begins; 0 if there is none."""
    for i in range(len(text) - 1, 0, -1):
        if text[i] in " \n" and not text[i - 1].isspace():
            return i
    return 0


@dataclass
class Source:
    """What scan() counts: enough to split the input without holding it in memory."""

    files: list[Path]
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of text: without byte order marks and without the JSON around it
    sha256: str = ""  # of all the files' bytes


def scan(files: list[Path]) -> Source:
    """Read all the input once and count it. UserError if some of it cannot be read, or there is no text in it."""
    source = Source(files)
    sha256 = hashlib.sha256()
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for text, ends in read_pieces(files, sha256):
            size = len(text.encode())
            source.bytes += size
            source.characters += len(text)
            source.documents += ends
            bar.update(size)
    if source.documents == 0:
        raise UserError(f"{', '.join(map(str, files[:3]))}: no text in it. An empty file cannot be trained on.")
    source.sha256 = sha256.hexdigest()
    return source


def split(source: Source, val_fraction: float) -> Iterator[tuple[str, bool, str]]:
    """("train" or "val", whether the piece ends its document, the piece). The last val_fraction becomes validation: of
    a single document its last characters, as in nanoGPT; of several, those that begin in that part, and at least the
    last one."""
    train_characters = int(source.characters * (1 - val_fraction))
    seen, documents, part = 0, 0, "train"
    for text, ends in read_pieces(source.files):
        if source.documents == 1:
            cut = max(0, train_characters - seen)
            if text[:cut]:
                yield "train", ends and cut >= len(text), text[:cut]
            if text[cut:]:
                yield "val", ends, text[cut:]
        else:
            yield part, ends, text
        seen += len(text)
        documents += ends
        if ends and (seen >= train_characters or documents == source.documents - 1):
            part = "val"


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
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def trained_tokenizer(source: Source, vocab_size: int, val_fraction: float) -> tuple[Tokenizer, str, bytes]:
    """A tokenizer trained on the training part; returns the same three things as find_tokenizer()."""
    print(f"training a tokenizer of {vocab_size:,} tokens on the training part ...")
    tokenizer = train_bpe(tokenizer_sample(source, val_fraction), vocab_size)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        print(f"the text has pairs for {size:,} tokens only; that is the vocabulary now")
    return tokenizer, END, tokenizer.to_str(pretty=True).encode()


def tokenizer_sample(source: Source, val_fraction: float) -> Iterator[str]:
    """The training text, or pieces spread evenly over it where it is larger than TOKENIZER_BYTES."""
    keep, credit = min(1.0, TOKENIZER_BYTES / source.bytes), 0.0
    for part, _, text in split(source, val_fraction):
        credit += keep
        if part == "train" and credit >= 1.0:
            credit -= 1.0
            yield text


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
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} is not a tokenizer that the tokenizers library can read ({error}).") from None
    end = END
    if tokenizer.token_to_id(END) is None:
        settings = file.with_name("tokenizer_config.json")
        end = read_json(settings).get("eos_token") if settings.is_file() else None
        end = end.get("content") if isinstance(end, dict) else end
        if end is None or tokenizer.token_to_id(end) is None:
            raise UserError(f"{file} has no {END} and no eos_token: nothing to put between documents.")
    size = tokenizer.get_vocab_size()
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
        print("this tokenizer is not a GPT-2 style byte-level BPE: encoding with the tokenizers library, slower")
        return plain
    if not all(np.array_equal(fast(text), plain(text)) for text in (HARD_TEXT, sample[:20000])):
        print("tiktoken disagrees with the tokenizers library on this tokenizer: encoding with the latter, slower")
        return plain
    return fast


def encode_all(encode: Encoder, pieces: Iterable[tuple], threads: int = 4) -> Iterator[tuple]:
    """(*tags, text) in, (*tags, text, ids) out, in order, encoded on a few threads with a bounded number in flight."""
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


def check_settings(s: Settings):
    """UserError where a setting is out of its range."""
    if not 0 < s.val_fraction < 1:
        raise UserError(f"--val_fraction={s.val_fraction}: expected a fraction between 0 and 1 such as 0.1.")
    smallest = 256 + len(SPECIAL)
    if s.tokenizer == "bpe" and not smallest <= s.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size={s.vocab_size}: expected {smallest} (the bytes and the special tokens) to {MAX_VOCAB_SIZE} "
            "(what a uint16 token file holds)."
        )
    if Path(s.dataset).name != s.dataset or s.dataset in ("", ".", ".."):
        raise UserError(f"--dataset={s.dataset}: expected a plain name; the result goes to data/NAME/.")


def prepare(s: Settings) -> dict:
    """Make data/DATASET from the settings; returns what its meta.json holds. An earlier data set of that name stays
    until all of the new one is written. UserError says what cannot be prepared."""
    check_settings(s)
    files = find_input(s)
    source = scan(files)
    folder = DATA / s.dataset
    with exclusive(folder, "being prepared"):
        if s.tokenizer == "bpe":
            tokenizer, end, tokenizer_json = trained_tokenizer(source, s.vocab_size, s.val_fraction)
        else:
            tokenizer, end, tokenizer_json = find_tokenizer(s.tokenizer)
        with (  # left in reverse order: meta.json, which describes the others, gets its name last
            atomic(folder / "meta.json") as meta_file,
            atomic(folder / "tokenizer.json") as tokenizer_file,
            atomic(folder / "val.bin") as val_file,
            atomic(folder / "train.bin") as train_file,
        ):
            counts = write_bins(s, source, tokenizer, end, train_file, val_file)
            tokenizer_file.write_bytes(tokenizer_json)
            meta = dict(
                vocab_size=tokenizer.get_vocab_size(), eos_token_id=tokenizer.token_to_id(end), eos_token=end,
                tokenizer=s.tokenizer, vocab_size_asked=s.vocab_size,
                tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
                **counts, documents=source.documents, source=s.input if len(files) > 1 else files[0].name,
                source_bytes=sum(file.stat().st_size for file in files), source_sha256=source.sha256,
            )  # fmt: skip
            meta_file.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            (folder / "meta.json").unlink(missing_ok=True)  # until the last rename the folder counts as unprepared
    train_tokens, val_tokens = meta["train_tokens"], meta["val_tokens"]
    documents = "1 document" if source.documents == 1 else f"{source.documents:,} documents"
    print(
        f"data/{s.dataset}: {meta['source']}, {documents}, {source.bytes:,} bytes\n"
        f"  train {train_tokens:,} tokens, val {val_tokens:,} tokens, vocabulary {meta['vocab_size']:,}, "
        f"{source.bytes / (train_tokens + val_tokens):.2f} bytes per token"
    )
    return meta


def write_bins(s: Settings, source: Source, tokenizer: Tokenizer, end: str, train_file: Path, val_file: Path) -> dict:
    """Encode all the text into the two token files; returns the tokens and the bytes of text of each, as meta.json
    names them. UserError if the text is too short to split."""
    vocab_size, eos = tokenizer.get_vocab_size(), tokenizer.token_to_id(end)
    encode = make_encoder(tokenizer, next(text for text, _ in read_pieces(source.files)))
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


def read_meta(dataset: str) -> dict:
    """meta.json of data/DATASET. UserError if the files beside it are not the ones that it describes."""
    folder = DATA / dataset
    again = f"Make it again with: python prepare.py --dataset={dataset}"
    meta = read_json(folder / "meta.json")
    for part in ("train", "val"):
        file = folder / f"{part}.bin"
        size = file.stat().st_size if file.is_file() else 0
        if size != 2 * meta[f"{part}_tokens"]:
            raise UserError(f"{file} has {size:,} bytes, meta.json says {2 * meta[f'{part}_tokens']:,}. {again}")
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file() or file_sha256(tokenizer) != meta["tokenizer_sha256"]:
        raise UserError(f"{tokenizer} is not the one that the .bin files were made with. {again}")
    return meta


def main():
    (settings,) = override(sys.argv[1:], Settings, doc=__doc__, shared_with=str(Path(__file__).with_name("train.py")))
    prepare(settings)


if __name__ == "__main__":
    guard(main)
