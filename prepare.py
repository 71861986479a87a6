"""
Turns text into tokens: data/NAME/ with tokenizer.json, train.bin, val.bin and meta.json, from any text you have.

    python prepare.py                                                   # Tiny Shakespeare, vocabulary 5,000
    python prepare.py --input=notes.txt --dataset=notes                 # a file, a folder, or a glob in quotes
    python prepare.py --input="blog/**/*.md" --dataset=blog --vocab_size=8000
    python prepare.py --input=posts.jsonl --dataset=posts --tokenizer=HuggingFaceTB/SmolLM2-135M    # to fine-tune it
    python prepare.py --input=talks.jsonl --dataset=talks --tokenizer=out/SmolLM2-135M-Instruct --show=3    # to chat
    python prepare.py config/tiny_shakespeare.py                        # what train.py does by itself for a recipe

It reads text of any size, and rows of JSON that are texts or conversations (lib/readers.py). A tenth is held out for
validation: with ten or more different documents those that a hash of the text picks, so the split is stable and
duplicates stay together; with fewer the last ones; with one its tail. Each document ends with <|endoftext|>.
The .bin files are little-endian uint16 token ids without a header, as in nanoGPT. Conversations add train.mask.bin and
val.mask.bin, one byte per token: 1 if the loss counts it, 2 if a conversation begins there, else 0.
A data set belongs to its name: once data/NAME exists, train.py uses it as it is. Only this script replaces one.
"""

import hashlib
import json
import os
import re
import shlex
import sys
import threading
import time
import urllib.request
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Annotated

from lib.conversations import conversation_encoder
from lib.files import Busy, atomic, exclusive, file_sha256, load_tokenizer, read_errors_as_user_error, read_json
from lib.readers import Source, find_files
from lib.settings import Natural, UserError, Within, check, override, print_safe, run_main

import numpy as np
import tiktoken
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm

MAX_VOCAB_SIZE = 65536  # what uint16 can number
END = "<|endoftext|>"
SPECIAL = [END, "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2, as in SmolLM2
FILES = ["meta.json", "tokenizer.json", "val.bin", "train.bin", "chat_template.jinja", "val.mask.bin", "train.mask.bin"]


@dataclass
class Settings:
    input: str = ""  # file, folder or glob; shakespeare downloads Tiny Shakespeare; empty: data/DATASET/input.txt
    dataset: str = "shakespeare"  # the result goes to data/DATASET/
    tokenizer: str = "bpe"  # bpe trains one; or a tokenizer.json, a directory or hub id that has one, or gpt2
    vocab_size: Annotated[int, Within(256 + len(SPECIAL), MAX_VOCAB_SIZE)] = 5000  # of a trained tokenizer; to 65536
    val_fraction: Annotated[float, Within(above=0, below=1)] = 0.1  # share of the text held out for validation
    column: str = ""  # of rows of JSON, the key that is read, or a form such as alpaca; empty: text, else conversations
    strict: bool = False  # True refuses conversations that teach nothing, which are left out otherwise
    show: Natural = 0  # print this many training conversations, with what the loss counts in green


DATA = Path("data")
MANY = 10  # with this many different documents, a hash picks those for validation
TOKENIZER_BYTES = 16 << 20  # of text that a tokenizer is trained on: more hardly makes it better
WORDS = re.compile(r"(?s).{1,999}\S(?=[ \n])|.{1,1000}")  # at most 1,000 characters: the trainer is quadratic in a word
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE = DATA / "shakespeare" / "input.txt"  # the download is kept here
PLAY = Path(__file__).parent / "data" / "shakespeare" / "play.txt"  # used if there is no network


def input_path(name: str, dataset: str) -> Path:
    """Return what a setting `input` stands for: itself, the download of Tiny Shakespeare, or data/DATASET/input.txt."""
    return Path(os.path.expanduser(name)) if name not in ("", "shakespeare") else DATA / (name or dataset) / "input.txt"


def shakespeare() -> Path:
    """Return the file of Tiny Shakespeare, downloaded if need be, or with a warning the play of this repository."""
    SHAKESPEARE.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(SHAKESPEARE.with_name(".download.lock")):  # a second process waits for the first one's download
        if SHAKESPEARE.is_file():
            return SHAKESPEARE
        try:
            text = urllib.request.urlopen(SHAKESPEARE_URL, timeout=5).read()
        except Exception as error:  # no network, no such host, a time-out, a refusal, half an answer
            print_safe(f"!! OFFLINE: Tiny Shakespeare could not be downloaded ({error}). Put it at {SHAKESPEARE}.")
            print_safe(f"!! Using {PLAY.name} instead, a play a tenth its size that comes with this project.")
            return PLAY
        if hashlib.sha256(text).hexdigest() != SHAKESPEARE_SHA256:
            raise UserError(f"{SHAKESPEARE_URL} is a proxy's page, not Tiny Shakespeare. Put it at {SHAKESPEARE}.")
        with atomic(SHAKESPEARE) as temporary:
            temporary.write_bytes(text)
    return SHAKESPEARE


def warnings(dataset: str, meta: dict) -> list[str]:
    """Return a line if a data set is made from the play, or from a file with another size or modification time now."""
    path, then = input_path(meta["input"], dataset), (meta["source_bytes"], meta["source_mtime"])
    if path == SHAKESPEARE and meta["source"] == PLAY.name:
        return [f"data/{dataset} is {PLAY.name}, used without a network. Another --dataset tries the download again."]
    changed = path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) != then
    return [f"{path} has changed since data/{dataset} was made. Another --dataset takes the new one."] * changed


def scan(source: Source, val_fraction: float):
    """Read all the input once, say what it holds, and choose the validation part. UserError if it is too short."""
    sizes, hashes, ended = array("q"), array("H"), True  # of each document: characters, and 16 bits of its hash
    for text, ends in tqdm(source.pieces(), unit=" pieces", desc="reading", disable=None):
        if ended:
            sizes.append(0)
            hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=2).digest(), "big"))
        sizes[-1], source.bytes, ended = sizes[-1] + len(text), source.bytes + len(text.encode()), ends
    unit = "conversation" if source.chat else "document"
    found = [f"{what}: {n:,} {unit}{'s' * (n > 1)} (first {at})" for what, (n, at) in source.found.items()]
    if len(sizes) < (2 if source.chat else 1):
        raise UserError("; ".join([f"{source.files[0]}: too short to split into training and validation text", *found]))
    print_safe("\n".join(found))
    source.validation = choose_validation(np.array(sizes), np.array(hashes), val_fraction)
    source.train_characters = int(sum(sizes) * (1 - val_fraction))


def choose_validation(sizes: np.ndarray, hashes: np.ndarray, val_fraction: float) -> np.ndarray:
    """Return (documents,) bool: which are validation. Of MANY different ones, in the order of their hashes, those that
    bring the validation text nearer to val_fraction of all; of fewer, those that begin in that part of the text."""
    found, of_hash = np.unique(hashes), np.bincount(hashes, sizes)
    if len(found) < MANY:
        chosen = np.cumsum(sizes) - sizes >= int(sizes.sum() * (1 - val_fraction))
        chosen[0], chosen[-1] = False, True  # neither part may be empty
        return chosen
    wanted, taken = val_fraction * sizes.sum(), []
    for i in found:
        if of_hash[i] / 2 <= wanted:
            taken.append(i)
            wanted -= of_hash[i]
    taken = taken or [found[np.argmin(of_hash[found])]]  # all of them are too large: the smallest
    return np.isin(hashes, taken[: len(found) - 1])  # something must be left to train on


def split(source: Source) -> Iterator[tuple[str, bool, str]]:
    """Yield ("train" or "val", whether the piece ends its document, the piece) for all the text."""
    number, seen, last = 0, 0, len(source.validation) - 1
    for text, ends in source.pieces():
        cut = 0 if source.validation[min(number, last)] else len(text)
        if last == 0:  # a single document is cut, as in nanoGPT
            cut = max(0, source.train_characters - seen)
        if text[:cut]:
            yield "train", ends and cut >= len(text), text[:cut]
        if text[cut:]:
            yield "val", ends, text[cut:]
        number, seen = number + ends, seen + len(text)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE that cuts text as SmolLM2's does ("smollm" in llama.cpp): digits one by one, then GPT-2's
    split into words. All 256 bytes are in it. It has fewer tokens if the text has no more pairs to merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trainer = BpeTrainer(vocab_size=vocab_size, **options)
    thread = threading.Thread(target=tokenizer.train_from_iterator, args=(texts, trainer), daemon=True)
    thread.start()  # the library does not look for Ctrl-C; join() does
    thread.join()
    return tokenizer


def trained_tokenizer(source: Source, vocab_size: int) -> Tokenizer:
    """Train a tokenizer on the training part; of a text larger than TOKENIZER_BYTES, on evenly spread pieces."""
    print_safe(f"training a tokenizer of {vocab_size:,} tokens on the training part ...")
    every, sample = -(-source.bytes // TOKENIZER_BYTES), []
    for i, (part, _, text) in enumerate(split(source)):
        if part == "train" and i % every == 0:
            texts = [message["content"] for message in json.loads(text)] if source.chat else [text]
            sample += [words for text in texts for words in WORDS.findall(text)]
    return train_bpe(sample, vocab_size)


def find_tokenizer(name: str) -> tuple[Tokenizer, str, Path]:
    """Return an existing tokenizer, the token that ends a document, and its file. UserError if it cannot be used."""
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        from huggingface_hub import snapshot_download

        repository = "openai-community/gpt2" if name == "gpt2" else name
        try:
            file = Path(snapshot_download(repository, allow_patterns=["tokenizer*.json", "*.jinja"]), "tokenizer.json")
        except Exception as error:  # offline, unknown, gated, not a hub id: the library has a class for each
            where = f"neither here nor available from huggingface.co ({type(error).__name__})"
            raise UserError(f"--tokenizer={name}: {where}. Expected bpe, a file, a folder, a hub id or gpt2.") from None
    tokenizer, settings, end = load_tokenizer(file), file.with_name("tokenizer_config.json"), END
    size, last = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=0)
    if not last < size <= MAX_VOCAB_SIZE:
        raise UserError(f"{file} has {size:,} tokens, the last id is {last:,}; expected at most {MAX_VOCAB_SIZE:,}.")
    if tokenizer.token_to_id(END) is None:
        end = read_json(settings).get("eos_token") if settings.is_file() else None
        end = end.get("content") if isinstance(end, dict) else end
        if not isinstance(end, str) or tokenizer.token_to_id(end) is None:
            raise UserError(f"{file} has no {END} and no eos_token: nothing to put between documents.")
    return tokenizer, end, file


# GPT-2's pattern, and the pattern that cuts as Digits followed by ByteLevel does: digits one by one, and white space
# before a digit kept whole. tests/test_prepare.py compares both with the tokenizers library.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""
DIGITS_PATTERN = r"""'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s+"""
HARD_TEXT = "It's 2 late,\r\n\r\n  we've  12 owls 🦉🏽 漢字かな １２\t½ \0 <|endoftext|> l'été\n\n\n 7 !!! naïve"


def fast_encoder(tokenizer: Tokenizer) -> Callable | None:
    """Return a function from text to ids that uses tiktoken, several times as fast as the tokenizer, and keeps special
    tokens in the text as text. None if the tokenizer is not a GPT-2 style BPE of bytes."""
    spec = json.loads(tokenizer.to_str())
    pre, patterns = spec["pre_tokenizer"], {("Digits", "ByteLevel"): DIGITS_PATTERN, ("ByteLevel",): GPT2_PATTERN}
    steps = () if pre is None else tuple(step["type"] for step in pre.get("pretokenizers", [pre]))
    plain = all(token["special"] for token in spec["added_tokens"])  # others are looked for in the text, too
    if spec["model"]["type"] != "BPE" or spec["normalizer"] or steps not in patterns or not plain:
        return None
    # GPT-2's spelling of bytes: the printable ones as themselves, the others as the letters from U+0100 on
    alphabet = ByteLevel.alphabet()
    others = iter(sorted(letter for letter in alphabet if ord(letter) > 255))
    letters = {chr(b) if chr(b) in alphabet else next(others): b for b in range(256)}
    special = {token["content"] for token in spec["added_tokens"]}
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in special}
    if not all(letters.keys() >= set(token) for token in vocab):
        return None
    ranks = {bytes(letters[c] for c in token): i for token, i in vocab.items()}
    # SmolLM2's vocabulary lacks 21 bytes. `tokenizers` drops them from the text; tiktoken needs an id for every byte,
    # so they are numbered past the end, and those ids are dropped.
    size = max(ranks.values()) + 1
    ranks = {bytes([b]): size + b for b in range(256)} | ranks
    encoding = tiktoken.Encoding("own", pat_str=patterns[steps], mergeable_ranks=ranks, special_tokens={})
    return lambda text: (ids := encoding.encode_to_numpy(text, disallowed_special=()))[ids < size]


def make_encoder(tokenizer: Tokenizer, sample: str) -> Callable:
    """Return the fast encoder if it gives the same ids as `tokenizers` on hard strings and on a sample of this text;
    otherwise `tokenizers` itself, with a message."""
    tokenizer.encode_special_tokens = True
    plain = lambda text: np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)
    fast = fast_encoder(tokenizer)
    if fast and all(np.array_equal(fast(text), plain(text)) for text in (HARD_TEXT, sample[:20000])):
        return fast
    print_safe("tiktoken cannot encode as this tokenizer does: encoding with the tokenizers library, slower")
    return plain


def encode_all(encode: Callable, pieces: Iterable[tuple]) -> Iterator[tuple]:
    """Turn (*tags, text) into (*tags, text, ids), in order, on every core and with a bounded number in flight."""
    threads, waiting = min(16, os.cpu_count() or 1), deque()  # more would wait for the one that reads and writes
    with ThreadPoolExecutor(threads) as pool:
        for piece in chain(pieces, repeat(None, 2 * threads)):  # None: takes nothing up, and lets one out
            waiting.append(piece and (piece, pool.submit(encode, piece[-1])))
            if len(waiting) > 2 * threads and (first := waiting.popleft()):
                yield *first[0], first[1].result()


def prepare(s: Settings, replace: bool = True) -> dict:
    """Make data/DATASET from the settings and return its meta.json. An earlier data set of that name stays until all of
    the new one is written, or for good if not `replace`."""
    check(Settings, **asdict(s))
    if Path(s.dataset).name != s.dataset or s.dataset in ("", ".", ".."):
        raise UserError(f"--dataset={s.dataset}: expected a plain name; the result goes to data/NAME/.")
    found = find_tokenizer(s.tokenizer) if s.tokenizer != "bpe" else None
    path, before, folder = input_path(s.input, s.dataset), None, DATA / s.dataset
    source = Source([shakespeare()] if path == SHAKESPEARE else find_files(path), s.column, s.strict)
    scan(source, s.val_fraction)
    with suppress(UserError):  # none there, or a damaged one
        before = input_path(read_meta(s.dataset)["input"], s.dataset)
    with exclusive(folder, "being prepared"):
        if not replace and (folder / "meta.json").is_file():
            return read_meta(s.dataset)
        meta = write_data(s, source, *(found or (trained_tokenizer(source, s.vocab_size), END, None)))
    if before and os.path.abspath(before) != os.path.abspath(path):
        print_safe(f"{folder}: the data set made from {before} is replaced")
    print_safe(f"{folder}: {meta['source']}, {source.bytes:,} bytes")
    line = "  train {train_tokens:,} tokens, val {val_tokens:,} tokens, vocabulary {vocab_size:,}, ".format(**meta)
    print_safe(line + f"{source.bytes / (meta['train_tokens'] + meta['val_tokens']):.2f} bytes per token")
    if source.chat:
        line = "  in the loss: train {train_loss_tokens:,}, val {val_loss_tokens:,}; an answer ends with {eos_token}"
        print_safe(line.format(**meta))
        show_conversations(folder, s.show)
    return meta


def write_data(s: Settings, source: Source, tokenizer: Tokenizer, end: str, tokenizer_file: Path | None) -> dict:
    """Write the files of data/DATASET, all or none, and return what meta.json holds."""
    folder = DATA / s.dataset
    clear = lambda: [(folder / f"{name}.tmp").unlink(missing_ok=True) for name in FILES]
    clear()  # what a run left that was killed
    tokenizer_json = tokenizer_file.read_bytes() if tokenizer_file else tokenizer.to_str(pretty=True).encode()
    files = {name: folder / f"{name}.tmp" for name in (FILES if source.chat else FILES[:4])}
    try:
        if source.chat:
            encode, end, template = conversation_encoder(tokenizer, tokenizer_file)
            files["chat_template.jinja"].write_text(template, encoding="utf-8")
        else:
            encode = make_encoder(tokenizer, next(source.pieces())[0])
        counts = write_bins(source, encode, tokenizer.token_to_id(end), files)
        files["tokenizer.json"].write_bytes(tokenizer_json)
        stats, hashes = [file.stat() for file in source.files], "".join(map(file_sha256, source.files))
        meta = dict(
            vocab_size=tokenizer.get_vocab_size(), eos_token_id=tokenizer.token_to_id(end), eos_token=end,
            tokenizer=s.tokenizer, vocab_size_asked=s.vocab_size, val_fraction=s.val_fraction,
            tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(), **counts, documents=len(source.validation),
            input=s.input, column=s.column, source=s.input if len(stats) > 1 else source.files[0].name,
            source_bytes=sum(stat.st_size for stat in stats), source_mtime=max(stat.st_mtime_ns for stat in stats),
            source_sha256=hashes if len(stats) == 1 else hashlib.sha256(hashes.encode()).hexdigest(),
        )  # fmt: skip
        for name in files.keys() - {"meta.json"}:
            with open(files[name], "rb+") as f:
                os.fsync(f.fileno())  # a full disk may show only here, and the earlier data set is still whole
        with atomic(files["meta.json"]) as temporary:  # last, since it says that the others are complete
            temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    except BaseException:
        clear()
        raise
    (folder / "meta.json").unlink(missing_ok=True)  # from here on finish_renames() completes what is interrupted
    finish_renames(folder, nullcontext())
    return meta


def finish_renames(folder: Path, lock=None):
    """Give the new files their names, also those of a prepare.py that was stopped meanwhile: meta.json.tmp without
    meta.json means that all of them are complete."""
    if (folder / "meta.json.tmp").is_file() and not (folder / "meta.json").is_file():
        with suppress(Busy, FileNotFoundError), lock or exclusive(folder, "being prepared"):  # or it is done by now
            chat = '"train_loss_tokens"' in (folder / "meta.json.tmp").read_text(encoding="utf-8")
            for name in () if chat else FILES[4:]:  # of conversations that were replaced
                (folder / name).unlink(missing_ok=True)
            for name in FILES[::-1]:  # meta.json, which describes the others, comes last
                if (folder / f"{name}.tmp").is_file():
                    os.replace(folder / f"{name}.tmp", folder / name)


def write_bins(source: Source, encode: Callable, eos: int, files: dict[str, Path]) -> dict:
    """Encode all the text into the token files and masks; return what meta.json counts: tokens, tokens in the loss, and
    bytes of text, which for conversations are those of the answers."""
    counts = Counter()
    with ExitStack() as stack:
        out = {name: stack.enter_context(open(file, "wb")) for name, file in files.items() if name.endswith(".bin")}
        bar = stack.enter_context(tqdm(total=source.bytes, unit="B", unit_scale=True, desc="encoding", disable=None))
        for part, ends, text, result in encode_all(encode, split(source)):
            bar.update(len(text.encode()))
            if source.chat:
                ids, mask, text = result
                out[f"{part}.mask.bin"].write(mask)
                counts[f"{part}_loss_tokens"] += mask.count(1)
            else:
                ids = np.append(result, eos) if ends else result
            out[f"{part}.bin"].write(ids.astype("<u2").tobytes())
            counts[f"{part}_tokens"] += len(ids)
            counts[f"{part}_bytes"] += len(text.encode())
    if min(counts["train_tokens"], counts["val_tokens"]) < 2:
        raise UserError(f"{source.files[0]}: too short to split into training and validation text.")
    return counts


def show_conversations(folder: Path, count: int):
    """Print the first conversations of the training part, with what the loss counts in green."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    ids, mask = np.fromfile(folder / "train.bin", "<u2"), np.fromfile(folder / "train.mask.bin", np.uint8)
    begins = [*np.flatnonzero(mask == 2), len(mask)]
    for a, b in zip(begins[:count], begins[1:]):
        for counted, places in groupby(range(a, b), key=lambda i: mask[i] == 1):
            text = tokenizer.decode(ids[list(places)].tolist(), skip_special_tokens=False)
            print_safe(f"\033[32m{text}\033[0m" if counted else text, end="")
        print_safe("")


def read_meta(dataset: str) -> dict:
    """Return the meta.json of data/DATASET. UserError if it is damaged, or does not describe the files beside it."""
    folder = DATA / dataset
    finish_renames(folder)
    again = f"Make it again with: python prepare.py --input=TEXT --dataset={dataset}"
    with read_errors_as_user_error(folder / "meta.json", again):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {f"{part}.bin": 2 * meta[f"{part}_tokens"] for part in ("train", "val")}
        if "train_loss_tokens" in meta:
            sizes |= {f"{part}.mask.bin": meta[f"{part}_tokens"] for part in ("train", "val")}
        made = {key: meta[key] for key in ("input", "tokenizer", "val_fraction", "column") if key in meta}
        made |= dict(dataset=dataset, vocab_size=meta["vocab_size_asked"])
        again = "Make it again with: python prepare.py " + shlex.join(f"--{key}={made[key]}" for key in made)
        sizes["tokenizer.json"], tokenizer = None, meta["tokenizer_sha256"]
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or (file_sha256(file) != tokenizer if size is None else file.stat().st_size != size):
            raise UserError(f"{file} is missing, or not the file that meta.json describes. {again}")
    return meta


def resolve(s: Settings, given: dict[str, str]) -> dict:
    """Return the meta.json of data/DATASET, made from the settings if it does not exist.
    given: the settings that were given, each by "flag" or "recipe". A flag that contradicts an existing data set is a
    UserError. Under torchrun the first process of each machine makes it and the others look for its last file: if they
    waited in a collective call, they would give up after some minutes."""
    ready, first = DATA / s.dataset / "meta.json", "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"
    finish_renames(DATA / s.dataset)
    while not ready.is_file():
        with suppress(Busy):  # another process makes it
            prepare(s, replace=False) if first else None
        time.sleep(0.1)
    meta = read_meta(s.dataset)
    made, asked = (asdict(Settings()) | x | dict(input=input_path(x["input"], s.dataset)) for x in (meta, asdict(s)))
    if s.vocab_size == meta["vocab_size_asked"]:  # a short text, or an existing tokenizer, has another number of tokens
        asked["vocab_size"] = meta["vocab_size"]
    for key in ("input", "tokenizer", "vocab_size", "val_fraction", "column"):
        same = os.path.abspath(str(asked[key])) == os.path.abspath(str(made[key]))  # as paths: "a" is "./a"
        if given.get(key) == "flag" and not same:
            what = f"data/{s.dataset} was made with {key}={made[key]}, and --{key}={asked[key]} asks for another"
            raise UserError(f"{what}. Give that one a --dataset of its own, or leave --{key} out.")
    return meta


def main():
    prepare(*override(sys.argv[1:], Settings, doc=__doc__, shared_with=str(Path(__file__).with_name("train.py"))))


if __name__ == "__main__":
    run_main(main)
