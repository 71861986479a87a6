"""prepare.py: nothing lost, nothing leaked, nothing half written."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys

from lib.files import exclusive
from lib.readers import PIECE, Source, find_files
from lib.settings import UserError

import numpy as np
import pytest
from conftest import ROOT, TEXT, run_script
from tokenizers import Tokenizer

import prepare

HARD = [
    "naïve café 🦉🏽👩‍👩‍👧 漢字かな交じり文", "a\r\nb\r\n\r\n  c\rd", "x   12  345,6\n\n\n 7\t\t8 ",
    "\0\x01\x7f\x1c\x85\xa0\u2028\u3000", "<|endoftext|> here", "It's we've I'll they'd 'twas ''S", "２３ ½ Ⅷ ٣٤ 1e-4",
    " ", "\n", "لا إله עִבְרִית हिन्दी 한국어",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, so that data/ is made there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(text, name="t", file="t.txt", **settings):
    path = prepare.Path(file)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return prepare.prepare(prepare.Settings(input=file, dataset=name, **({"vocab_size": 300} | settings)))


def read(name, part):
    return np.fromfile(f"data/{name}/{part}.bin", dtype="<u2")


def decode(name, ids):
    return Tokenizer.from_file(f"data/{name}/tokenizer.json").decode([int(i) for i in ids], skip_special_tokens=False)


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_fast_encoder_gives_the_ids_of_tokenizers():
    """tiktoken runs with our own pattern and ranks, which must split and merge any text as Digits + ByteLevel do.
    A vocabulary without some bytes, such as SmolLM2's, drops them."""
    tokenizer = prepare.train_bpe([TEXT], 600)
    assert [tokenizer.token_to_id(t) for t in prepare.SPECIAL] == [0, 1, 2], "as in SmolLM2"
    tokenizer.encode_special_tokens = True
    fast = prepare.fast_encoder(tokenizer)
    alphabet = "ab Z'sst12٣½\n\r\t  .,!é漢🦉<|\0\x85\xa0"
    noise = ["".join(random.Random(i).choices(alphabet, k=60)) for i in range(300)]
    for text in HARD + noise + [TEXT]:
        assert fast(text).tolist() == (ids := tokenizer.encode(text).ids) and tokenizer.decode(ids) == text, repr(text)
    spec = json.loads(tokenizer.to_str())
    for letter in "Ā", "Ą", "ÿ":  # the spellings of bytes 0, 4 and 255
        spec["model"]["vocab"].pop(letter)
    text, tokenizer = "a\0b\x04 news", Tokenizer.from_str(json.dumps(spec))
    assert prepare.fast_encoder(tokenizer)(text).tolist() == tokenizer.encode(text).ids


def test_text_comes_back_and_each_document_ends_once(here):
    """train.bin + val.bin decode to the text, cut before its last tenth of characters, as in nanoGPT. A text that
    spells <|endoftext|> does not contain the token."""
    text = "".join(HARD) + "é" * 500 + TEXT[:3000]
    meta = make(text)
    train, val = read("t", "train"), read("t", "val")
    cut = int(len(text) * 0.9)
    assert (decode("t", train), decode("t", val)) == (text[:cut], text[cut:] + prepare.END)
    assert (np.concatenate([train, val]) == meta["eos_token_id"]).sum() == meta["documents"] == 1
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])


def jsonl(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents)


def sides(name="t"):
    """Return the documents of both parts."""
    return [decode(name, read(name, part)).split(prepare.END)[:-1] for part in ("train", "val")]


def posts(n):
    """Return n different documents of 50 to 350 characters, sorted by date."""
    return [f"post of day {i} " + "words " * random.Random(i).randint(6, 55) for i in range(n)]


def test_few_documents_stay_whole_and_the_last_are_validation(here):
    """Fewer than ten documents are split in their order: none is cut, none is on both sides."""
    documents = [f"document {i} " + "words " * 5 for i in range(8)]
    meta = make(jsonl(documents), file="d.jsonl", val_fraction=0.25)
    assert sum(sides(), []) == documents and meta["documents"] == 8 and len(sides()[1]) == 2


def test_many_documents_are_held_out_evenly(here, monkeypatch):
    """The last tenth of posts by date, or of a folder from a to z, has another distribution than the rest. Negative
    control: the rule for few documents, which takes them."""

    def evenly(val):
        thirds = [sum(3 * documents.index(d) // len(documents) == third for d in val) for third in range(3)]
        return all(len(val) / 6 < n < len(val) / 1.8 for n in thirds)

    documents = posts(400)
    (here / "in").mkdir()
    for i, document in enumerate(documents):
        (here / "in" / f"{i:03}.txt").write_text(document)
    make(jsonl(documents), file="d.jsonl", name="jsonl")
    meta = prepare.prepare(prepare.Settings(input="in", dataset="t", vocab_size=300))
    train, val = sides()
    assert (train, val) == tuple(sides("jsonl")) and evenly(val)
    assert sorted(train + val) == sorted(documents)
    assert abs(meta["val_bytes"] / (meta["train_bytes"] + meta["val_bytes"]) - 0.1) < 0.005
    monkeypatch.setattr(prepare, "MANY", 1000)
    make(jsonl(documents), file="d.jsonl")
    assert not evenly(sides()[1])


def test_copies_of_a_document_are_on_one_side(here):
    """A text that was memorized in training measures nothing in validation. The order of the documents has no
    effect."""
    documents = posts(60) * 3
    make(jsonl(documents), file="d.jsonl")
    train, val = sides()
    assert not set(train) & set(val)
    random.Random(0).shuffle(documents)
    make(jsonl(documents), name="shuffled", file="e.jsonl")
    assert sorted(sides("shuffled")[1]) == sorted(val)


def test_both_sides_have_a_document_whatever_their_sizes(here):
    """Even if each is larger than what validation should get, or one is nearly all of the text."""
    for documents in (posts(10), [*posts(10), "giant " * 3000]):
        for fraction in (0.001, 0.999):
            make(jsonl(documents), file="d.jsonl", val_fraction=fraction)
            assert all(sides()) and sorted(sum(sides(), [])) == sorted(documents)


def test_the_tokenizer_is_not_trained_on_the_validation_text(here):
    """Another validation text must give the same tokenizer; another training text must not."""
    a = make(TEXT[:9000] + "a" * 1000)["tokenizer_sha256"]
    b = make(TEXT[:9000] + "z" * 1000)["tokenizer_sha256"]
    c = make("qq" + TEXT[2:9000].replace("salt", "soot") + "z" * 1000)["tokenizer_sha256"]
    assert a == b != c


def test_pieces_change_nothing(here, monkeypatch):
    """A text larger than memory is encoded piece by piece; the ids must be those of the whole."""
    text = ("".join(HARD) + TEXT) * 3
    whole = make(text, name="whole")
    monkeypatch.setattr("lib.readers.PIECE", 97)
    pieces = make(text, name="pieces")
    assert whole["tokenizer_sha256"] == pieces["tokenizer_sha256"]
    for part in ("train", "val"):
        assert np.array_equal(read("whole", part), read("pieces", part))


def test_same_input_same_files(here):
    """The files do not depend on the time of day, or on the threads that encode. An existing tokenizer's file is copied
    byte for byte, so its hash stays the one in the model's metadata."""
    prepare.train_bpe([TEXT], 400).save("tokenizer.json")
    for tokenizer in ("bpe", "tokenizer.json"):
        meta = make(TEXT, tokenizer=tokenizer)
        first = snapshot(here / "data/t")
        prepare.prepare(prepare.Settings(input="t.txt", dataset="t", tokenizer=tokenizer, vocab_size=300))
        assert snapshot(here / "data/t") == first
    assert first["tokenizer.json"] == (here / "tokenizer.json").read_bytes()
    assert meta["vocab_size"] == 400 and meta["eos_token"] == prepare.END


@pytest.mark.parametrize(
    "text, settings, message",
    [
        (b"ab", {}, "too short"), (b"fine so far \xff\xfe", {}, "t.txt is damaged.*iconv"),
        (TEXT, {"vocab_size": 70000}, "at most 65,?536"), (TEXT, {"name": "../x"}, "expected a plain name"),
        (TEXT, {"tokenizer": "./nowhere"}, "nor available"), (TEXT, {"tokenizer": "t.txt"}, "is damaged"),
        (TEXT, {"tokenizer": "no/such-tokenizer"}, "nor available"),
    ],
)  # fmt: skip
def test_bad_input_says_why_and_leaves_what_was_there(here, text, settings, message):
    """An earlier data set must survive every failed attempt to replace it."""
    make(TEXT)
    before = snapshot(here / "data/t")
    with pytest.raises(UserError, match=message):
        make(text, **settings)
    assert snapshot(here / "data/t") == before


def test_bad_jsonl_names_its_line(here):
    """Broken JSON, no "text", a "text" that is not text, Latin-1."""
    for bad in ("{broken", '{"txt": "x"}', '{"text": 5}', '["x"]', '{"text": "\\ud800"}', '"\xff"'):
        with pytest.raises(UserError, match=r"^d.jsonl, line 3( \[0\])?: "):
            make(b'{"text": "fine"}\n\n' + bad.encode("latin-1") + b"\n", file="d.jsonl")


CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ferrywoman."}]


@pytest.mark.parametrize("extra", [{"modality": "text"}, {"tags": [{"text": "x"}]}, {"text": "a row"}])
def test_conversations_are_known_by_their_keys(here, extra):
    """The word "text" in a value, or in a key inside one, does not turn a conversation into a document. Negative
    control: a key called "text" does."""
    rows = [{"messages": [CHAT[0] | {"content": f"Question {i}?"}, CHAT[1]]} | extra for i in range(20)]
    meta = make("".join(json.dumps(row) + "\n" for row in rows), file="d.jsonl")
    assert meta["documents"] == 20 and ("train_loss_tokens" in meta) == ("text" not in extra)


def test_conversations_and_texts_are_not_mixed(here):
    """As in a folder with conversations and a README."""
    os.mkdir("folder")
    (here / "folder/a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (here / "folder/README.md").write_text("# Talks\n")
    with pytest.raises(UserError, match="a.jsonl, line 1: json, messages, unlike"):
        prepare.prepare(prepare.Settings(input="folder", dataset="t", vocab_size=300))


@pytest.mark.parametrize("when", ["in the middle", "at the last moment"])
def test_a_full_disk_leaves_the_old_data(here, monkeypatch, when):
    """All of the old data stays and none of the new, even if the disk turns out to be full only at the end."""
    make(TEXT)
    before = snapshot(here / "data/t")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(*((prepare, "encode_all") if when == "in the middle" else (os, "fsync")), full)
        make(TEXT * 2)
    assert snapshot(here / "data/t") == before


def test_kill_9_in_the_middle_leaves_the_old_data(here):
    """A real process is killed while it writes: the folder holds what it held."""
    make(TEXT)
    before = snapshot(here / "data/t")
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); import prepare; real = prepare.encode_all\n"
        "def dies(e, p):\n    yield next(real(e, p)); os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare.encode_all = dies; prepare.prepare(prepare.Settings(input='t.txt', dataset='t', vocab_size=310))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=here).returncode == -signal.SIGKILL
    after = snapshot(here / "data/t")
    assert {k: v for k, v in after.items() if not k.endswith(".tmp")} == before
    prepare.prepare(prepare.Settings(input="t.txt", dataset="t", vocab_size=300))  # removes what the killed one left
    assert snapshot(here / "data/t") == before


@pytest.mark.slow
@pytest.mark.parametrize("old, new", [("t.txt", "d.jsonl"), ("d.jsonl", "t.txt")])
def test_a_signal_at_any_moment_leaves_the_old_or_the_new_data_set(here, monkeypatch, old, new):
    """SIGTERM, which run_main() makes a SystemExit, before each operation on a file: the data set is the old one, later
    the new one, without a file of the other. Negative control: before finish_renames() runs, it may be neither."""
    (here / "t.txt").write_text(TEXT[:5000])
    rows = [{"messages": [CHAT[0] | {"content": f"Question {i}?"}, CHAT[1]]} for i in range(20)]
    (here / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make = lambda name: prepare.prepare(prepare.Settings(input=name, dataset="t", vocab_size=300))
    files = lambda: {name: hash(data) for name, data in snapshot(here / "data/t").items() if name[-4:] != ".tmp"}
    whole, torn, found, left = [(make(name), files())[1] for name in (old, new)], [], [], []
    stopping = lambda real: lambda *args, **options: real(*args, **options) if left.pop() else sys.exit(143)
    while False not in left:  # until there is no operation left to stop before
        make(old)
        left[:] = [True] * 99 + [False] + [True] * len(found)
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
            for owner, name in ((os, "fsync"), (os, "replace"), (prepare.Path, "unlink")):
                patch.setattr(owner, name, stopping(getattr(owner, name)))
            make(new)
        torn.append(files() not in whole)
        prepare.read_meta("t")
        found.append(whole.index(files()))  # fails if it is neither
    assert found == sorted(found) and found[8] == 0 and found[-2] == 1 and any(torn)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "meta.json"])
def test_altered_data_are_noticed(here, name):
    """meta.json has the sizes or the hash of the files beside it. The message names the file that is wrong, and the
    command in it makes the data set again."""
    prepare.train_bpe([TEXT], 400).save("tok enizer.json")
    before = make(TEXT, file="my text.txt", tokenizer="tok enizer.json", val_fraction=0.2)
    file = prepare.DATA / "t" / name
    for damage in (lambda: os.truncate(file, 10), lambda: file.write_text("{}"), file.unlink):
        damage()
        with pytest.raises(UserError, match=f"^data/t/{name} .*Make it again with: ") as error:
            prepare.read_meta("t")
    if name != "meta.json":  # it says how the data set was made
        command = str(error.value).partition("Make it again with: python ")[2]
        subprocess.run(f"{sys.executable} {ROOT}/{command}", shell=True, cwd=here, check=True, capture_output=True)
        assert prepare.read_meta("t") == before


# ----------------------------------------------------------------------------------------------------------------------
# a data set belongs to its name


def resolve(*flags, **settings):
    given = dict.fromkeys(settings, "recipe") | dict.fromkeys(flags, "flag")
    return prepare.resolve(prepare.Settings(**({"dataset": "t"} | settings)), given)


def test_a_data_set_is_used_as_it_is(here):
    """Without the flags that made it, with them, and with a recipe for another text, tokenizer and vocabulary. A flag
    that asks for another data set is refused by name. A text that has changed since is noticed. Nothing is
    overwritten."""
    meta = make(TEXT, vocab_size=320)
    before = snapshot(here / "data/t")
    (here / "other.txt").write_text(TEXT[:9000])
    assert resolve() == meta
    assert resolve("input", "vocab_size", "tokenizer", input="./t.txt", vocab_size=320, tokenizer="bpe") == meta
    other = dict(input="other.txt", tokenizer="gpt2", vocab_size=400, val_fraction=0.2)
    assert resolve(**other) == meta and not prepare.warnings("t", meta)
    for flag in other:
        with pytest.raises(UserError, match=f"data/t was made with {flag}=.*--dataset") as error:
            resolve(flag, **other)
        assert "prepare.py" not in str(error.value)
    os.utime("t.txt", (1, 1))
    assert "has changed" in prepare.warnings("t", meta)[0] and resolve() == meta
    assert snapshot(here / "data/t") == before


def test_a_missing_data_set_is_made_and_the_same_request_fits_it(here):
    """Even if the text has fewer tokens than asked for, or an existing tokenizer has another number."""
    (here / "t.txt").write_text(TEXT[:1000])
    prepare.train_bpe([TEXT], 310).save("tokenizer.json")
    for name, tokenizer in (("a", "bpe"), ("b", "tokenizer.json")):
        request = dict(dataset=name, input="t.txt", vocab_size=3000, tokenizer=tokenizer)
        meta = resolve(**request)
        assert meta["vocab_size"] < 3000 and resolve(*request, **request) == meta
        assert resolve("vocab_size", **(request | dict(vocab_size=meta["vocab_size"]))) == meta


def test_a_data_set_that_another_process_makes_is_waited_for(here, monkeypatch):
    """Two runs may start at once, or the processes of torchrun, on one machine or on several that share a disk."""
    (here / "t.txt").write_text(TEXT)
    settings = dict(input="t.txt", vocab_size=300)
    for environment, name in ({}, "s"), (dict(RANK="8", LOCAL_RANK="1"), "t"), (dict(RANK="8", LOCAL_RANK="0"), "u"):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        sleeps = lambda _, name=name: (here / f"data/{name}/meta.json").write_text("{}")
        monkeypatch.setattr(prepare.time, "sleep", sleeps)
        with exclusive(here / "data" / name, "being prepared"), pytest.raises(UserError, match="meta.json is damaged"):
            resolve(dataset=name, **settings)  # it has waited for that file


def test_a_run_takes_over_when_the_maker_of_its_data_set_is_killed(here, monkeypatch):
    """It waits while the other process lives, and after kill -9 it makes the data set itself. It would wait forever for
    a lock that the killed one leaves behind."""
    (here / "t.txt").write_text(TEXT)
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import prepare\n"
    code += "prepare.encode_all = lambda *_: print('writing', flush=True) or time.sleep(60)\n"
    code += "prepare.prepare(prepare.Settings(input='t.txt', dataset='t', vocab_size=300))"
    maker, found = subprocess.Popen([sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE), []

    def sleep(_):
        found.append((here / "data/t/meta.json").is_file())
        assert len(found) < 9, "it waits for a process that has ended"
        (maker.kill(), maker.wait()) if len(found) == 3 else None

    assert b"writing\n" in iter(maker.stdout.readline, b"")
    monkeypatch.setattr(prepare.time, "sleep", sleep)
    resolve(input="t.txt", vocab_size=300)
    assert found == [False, False, False, True] and maker.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_replacing_another_text_is_said(here):
    """Only prepare.py overwrites a data set, and it names the text that is replaced. The same input in another spelling
    replaces nothing; nor does an attempt that fails."""
    (here / "a.txt").write_text(TEXT[:3000])
    (here / "b.txt").write_text(TEXT[3000:6000])
    said = []
    for name in ("a.txt", "./a.txt", "b.txt", "missing.txt", "a.txt"):
        done = run_script("prepare.py", f"--input={name}", "--dataset=t", "--vocab_size=300", cwd=here)
        assert (done.returncode == 0) == (name != "missing.txt"), done.stderr
        said += [line for line in done.stdout.splitlines() if "is replaced" in line]
    assert said == [f"data/t: the data set made from {name} is replaced" for name in ("a.txt", "b.txt")]


@pytest.mark.slow
def test_the_name_of_a_data_set_has_no_meaning(here):
    """A name that begins with "shakespeare" takes its own text or none, and "shakespeare" as an input is the download
    under any name. Without any setting prepare.py makes that data set."""
    named = "--dataset=shakespeare_mine", "--vocab_size=300"
    (here / "data/shakespeare").mkdir(parents=True)
    (here / "data/shakespeare/input.txt").write_text(TEXT[:3000])  # as the download leaves it
    done = run_script("prepare.py", *named, cwd=here)
    assert done.returncode == 1 and "Put the text there" in done.stderr, done.stdout
    (here / "data/shakespeare_mine").mkdir()
    (here / "data/shakespeare_mine/input.txt").write_text(TEXT[:4000])
    for flags, size in ((named, 4000), ((*named, "--input=shakespeare"), 3000), (("--vocab_size=300",), 3000)):
        done = run_script("prepare.py", *flags, cwd=here)
        assert done.returncode == 0 and f"{len(TEXT[:size].encode()):,} bytes" in done.stdout, done.stderr
    assert all('input = "shakespeare"' in file.read_text() for file in (ROOT / "config").glob("*shakespeare.py"))


def test_without_the_download_the_play_of_this_repository_is_used_with_a_warning(here, monkeypatch, capsys):
    """A proxy's login page is refused. Without a network there is a warning, the play, and a working data set."""
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>Please log in</html>"))
    with pytest.raises(UserError, match="not Tiny Shakespeare"):
        prepare.prepare(prepare.Settings())
    assert not (here / "data/shakespeare/input.txt").exists()
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *_, **__: 1 / 0)
    meta = prepare.prepare(prepare.Settings(vocab_size=400))
    assert "OFFLINE" in capsys.readouterr().out
    assert meta["source"] == "play.txt" and meta["train_tokens"] > 10_000


@pytest.mark.slow
def test_two_first_runs_at_once_read_the_whole_download(here):
    """Two processes download Tiny Shakespeare at once to a slow disk, and each reads all of it. Negative control:
    without the lock, one reads half of it."""
    code = f"""
import contextlib, hashlib, io, sys, time; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r}); import prepare
text = b"To be, or not to be" * 10000
def slow(self, data):
    with open(self, "wb") as f:
        for half in data[:len(data) // 2], data[len(data) // 2:]:
            f.write(half); f.flush(); time.sleep(0.5)
Path.write_bytes = slow
prepare.urllib.request.urlopen = lambda *_, **__: io.BytesIO(text)
prepare.SHAKESPEARE_SHA256 = hashlib.sha256(text).hexdigest()
if sys.argv[2] == "at once":
    prepare.FileLock = lambda _: contextlib.nullcontext()
time.sleep(float(sys.argv[1]))
print(prepare.shakespeare().read_bytes() == text)
"""
    for turns in ("in turns", "at once"):
        both = [[sys.executable, "-c", code, delay, turns] for delay in ("0", "0.7")]
        both = [subprocess.Popen(command, cwd=here, stdout=-1, stderr=-3) for command in both]
        assert ([process.communicate(timeout=60)[0] for process in both] == [b"True\n"] * 2) == (turns == "in turns")
        (here / "data/shakespeare/input.txt").unlink(missing_ok=True)


@pytest.mark.slow
def test_a_long_text_without_a_word_boundary_is_prepared(here):
    """DNA, or Chinese on one line, is cut for the trainer, which is quadratic in a word's length. 20 s is a hang."""
    for letters in ("🦉", "".join(random.Random(0).choices("acgt", k=1000))):
        text = letters * (400_000 // len(letters))
        (here / "t.txt").write_text(text)
        assert max(len(piece) for piece, _ in Source([here / "t.txt"]).pieces()) <= 2 * PIECE
        done = run_script("prepare.py", "--input=t.txt", "--dataset=t", "--vocab_size=400", cwd=here, timeout=20)
        assert done.returncode == 0, done.stderr
        assert decode("t", np.concatenate([read("t", "train"), read("t", "val")])) == text + prepare.END


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(here):
    """The peak memory for a text of 12 MB stays near that for 2 MB."""
    code = (
        f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import prepare; prepare.TOKENIZER_BYTES = 1 << 18\n"
        "prepare.prepare(prepare.Settings(input='t.txt', dataset='t', vocab_size=300))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for times in (10, 60):
        (here / "t.txt").write_text("".join(random.Random(0).choices("abcdefghij", k=200_000)) * times)
        done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, timeout=60)
        peaks.append(int(done.stdout.splitlines()[-1]) // 1024)
    assert peaks[1] < peaks[0] + 40, f"{peaks} MB"


@pytest.mark.slow
def test_ctrl_c_ends_the_training_of_a_tokenizer(here):
    """The library does not look for signals, and 1,000,000 letters in one word would take hours."""
    code = f"import os, sys, threading; sys.path.insert(0, {str(ROOT)!r}); import prepare\n"
    code += "threading.Timer(0.5, os.kill, (os.getpid(), 2)).start(); prepare.train_bpe(['a' * 1_000_000], 400)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, stderr=-3).returncode in (-signal.SIGINT, 130)


# ----------------------------------------------------------------------------------------------------------------------
# folders, globs, files that are something else


def test_hidden_files_and_folders_are_left_out(here):
    """.git and .obsidian are not the notes, unless --input spells them out."""
    for name in ("a.md", "sub/b.md", ".git/objects/c.md", "sub/.obsidian/d.md", ".e.md"):
        (here / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "notes" / name).write_text("text")

    def found(where):
        return [str(p) for p in find_files(prepare.Path(where))]

    assert found("notes") == found("notes/**/*.md") == found("notes/**") == ["notes/a.md", "notes/sub/b.md"]
    assert found(f"{here}/notes/**/*.md") == [f"{here}/notes/a.md", f"{here}/notes/sub/b.md"]
    assert found("notes/*") == found("notes/**.md") == found("./n?tes/*.md") == ["notes/a.md"]
    assert found("notes/.git/**/*.md") == found("notes/.git") == ["notes/.git/objects/c.md"]
    for where in ("nowhere", "nowhere/*.md", "*.txt"):
        with pytest.raises(UserError, match="no such file"):
            found(where)
    (here / "notes/loop").symlink_to(here / "notes")
    (here / "notes/z.md").symlink_to(here / "notes/a.md")
    assert len(found("notes")) == len(found("notes/**/*.md")) == 2, "each file once, so none is in both parts"


def test_a_byte_order_mark_and_line_ends(here):
    """A byte order mark at the beginning of a file is not part of the text, one inside it is. Line ends do not
    change."""
    make(b"\xef\xbb\xbfa\r\nb\rc \xef\xbb\xbf" * 2 + b"d" * 50)
    whole = decode("t", np.concatenate([read("t", "train"), read("t", "val")]))
    assert whole == "a\r\nb\rc \ufeff\ufeffa\r\nb\rc \ufeff" + "d" * 50 + prepare.END


def test_other_kinds_are_encoded_by_their_own_library(here, capsys):
    """With a normalizer, or a token in another spelling than ByteLevel's, tiktoken is not used."""
    spec = json.loads(prepare.train_bpe([TEXT[:5000]], 300).to_str())
    model = spec["model"] | {"vocab": spec["model"]["vocab"] | {"a b": 300}}
    for other in (spec | dict(model=model), spec | dict(normalizer={"type": "NFC"})):
        (here / "tokenizer.json").write_text(json.dumps(other))
        make(TEXT, tokenizer="tokenizer.json")
        assert "slower" in capsys.readouterr().out
        assert (
            read("t", "train").tolist()
            == Tokenizer.from_file("tokenizer.json").encode(TEXT[: int(len(TEXT) * 0.9)]).ids
        )


def test_a_disagreeing_tokenizer_is_encoded_by_its_own_library(monkeypatch, capsys):
    """Every run makes this check. Negative control: before, the right pattern passes it; GPT-2's gives other ids."""
    tokenizer = prepare.train_bpe([TEXT, "a  b  c  12  34 " * 500], 400)  # with a token of two spaces
    assert prepare.make_encoder(tokenizer, "a  12") and "slower" not in capsys.readouterr().out
    monkeypatch.setattr(prepare, "DIGITS_PATTERN", prepare.GPT2_PATTERN)
    encode, fast = prepare.make_encoder(tokenizer, "a  12"), prepare.fast_encoder(tokenizer)
    assert "slower" in capsys.readouterr().out
    assert encode("a  12").tolist() == tokenizer.encode("a  12").ids != fast("a  12").tolist()


def test_a_tokenizer_that_cannot_be_used_is_named(here):
    """Truncated, another kind of JSON, ids with gaps, no token to end a document."""
    good = json.loads(prepare.train_bpe([TEXT[:5000]], 300).to_str())
    vocab = good["model"]["vocab"]
    far = good | {"model": good["model"] | {"vocab": vocab | {"Ġfar": 10**9}}}
    other = {"other" if token == prepare.END else token: i for token, i in vocab.items()}
    endless = good | {"added_tokens": [], "model": good["model"] | {"vocab": other}}
    for text in (json.dumps(good)[:5000], "[]", "", json.dumps(far), json.dumps(endless)):
        (here / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="^tokenizer.json (is damaged|has)"):
            make(TEXT, tokenizer="tokenizer.json")
    (here / "tokenizer_config.json").write_text('{"eos_token": {"content": "other"}}')
    assert make(TEXT, tokenizer="tokenizer.json")["eos_token"] == "other"
