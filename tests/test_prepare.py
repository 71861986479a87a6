"""prepare.py: nothing lost, nothing leaked, nothing half written."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

from lib.files import exclusive
from lib.settings import UserError

import numpy as np
import pytest
from conftest import ROOT, TEXT, run_script
from tokenizers import Tokenizer

import prepare

HARD = [
    "naïve café 🦉🏽👩‍👩‍👧 漢字かな交じり文",
    "a\r\nb\r\n\r\n  c\rd",
    "x   12  345,6\n\n\n 7\t\t8 ",
    "\0\x01\x7f\x1c\x85\xa0\u2028\u3000",
    "<|endoftext|> is text here, <|im_start|> too",
    "It's we've I'll they'd 'twas ''S",
    "２３ ½ Ⅷ ٣٤ 1e-4 0x1F",
    " ",
    "\n",
    "لا إله עִבְרִית हिन्दी 한국어",
]


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
    """tiktoken works with our own pattern and ranks; both must cut and merge as Digits + ByteLevel do, on any text."""
    tokenizer = prepare.train_bpe([TEXT, *HARD], 600)
    tokenizer.encode_special_tokens = True
    fast = prepare.fast_encoder(tokenizer)
    alphabet = "ab Z'sst12٣½\n\r\t  .,!é漢🦉<|\0\x85\xa0"
    noise = ["".join(random.Random(i).choices(alphabet, k=60)) for i in range(300)]
    for text in HARD + noise + [TEXT]:
        assert fast(text).tolist() == tokenizer.encode(text).ids, repr(text)


def test_the_comparison_above_can_fail(monkeypatch):
    """Negative control: GPT-2's own pattern keeps digits together, so some ids must differ."""
    tokenizer = prepare.train_bpe([TEXT, "12 345 " * 500], 600)
    monkeypatch.setattr(prepare, "DIGITS_PATTERN", prepare.GPT2_PATTERN)
    fast = prepare.fast_encoder(tokenizer)
    assert any(fast(text).tolist() != tokenizer.encode(text).ids for text in HARD)


def test_a_disagreeing_tokenizer_is_encoded_by_its_own_library(monkeypatch, capsys):
    """The check that every run makes: tiktoken is not used where its ids differ."""
    tokenizer = prepare.train_bpe([TEXT, "a  b  c  12  34 " * 500], 400)  # with a token of two spaces
    monkeypatch.setattr(prepare, "DIGITS_PATTERN", prepare.GPT2_PATTERN)
    encode = prepare.make_encoder(tokenizer, "a  12")
    assert "slower" in capsys.readouterr().out
    assert encode("a  12").tolist() == tokenizer.encode("a  12").ids


def test_a_vocabulary_with_missing_bytes_drops_them_as_tokenizers_does():
    """SmolLM2's own lacks 21 bytes; tiktoken crashes on such a vocabulary unless they are numbered past its end."""
    spec = json.loads(prepare.train_bpe([TEXT], 300).to_str())
    for letter in "Ā", "Ą", "ÿ":  # the spellings of bytes 0, 4 and 255
        spec["model"]["vocab"].pop(letter)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    fast = prepare.fast_encoder(tokenizer)
    text = "a\0b\x04 news"
    assert fast(text).tolist() == tokenizer.encode(text).ids


def test_special_tokens_have_smollm2s_ids_and_all_bytes_are_there():
    """Even a tokenizer trained on plain letters encodes and decodes any text."""
    tokenizer = prepare.train_bpe(["only plain letters"], 300)
    assert [tokenizer.token_to_id(t) for t in prepare.SPECIAL] == [0, 1, 2]
    for text in HARD:
        tokenizer.encode_special_tokens = True
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_text_comes_back_and_each_document_ends_once(here):
    """train.bin + val.bin decode to the text; a literal <|endoftext|> in it is not the token."""
    meta = make("".join(HARD) + TEXT)
    both = np.concatenate([read("t", "train"), read("t", "val")])
    assert decode("t", both) == "".join(HARD) + TEXT + prepare.END
    assert (both == meta["eos_token_id"]).sum() == meta["documents"] == 1
    assert (len(read("t", "train")), len(read("t", "val"))) == (meta["train_tokens"], meta["val_tokens"])


def test_one_document_is_split_at_its_last_tenth_of_characters(here):
    """nanoGPT's split, so that figures on Tiny Shakespeare compare."""
    make("é" * 500 + TEXT[:1500])
    assert decode("t", read("t", "train")) == ("é" * 500 + TEXT[:1500])[:1800]


def jsonl(documents):
    return "".join(json.dumps({"text": d}) + "\n" for d in documents)


def sides(name="t"):
    """The documents of both parts."""
    return [decode(name, read(name, part)).split(prepare.END)[:-1] for part in ("train", "val")]


def posts(n):
    """Different documents of 50 to 350 characters, in an order that means something."""
    return [f"post of day {i} " + "words " * random.Random(i).randint(6, 55) for i in range(n)]


def test_few_documents_stay_whole_and_the_last_are_validation(here):
    """Under ten documents are split between documents, in their order: none is cut, none is on both sides."""
    documents = [f"document {i} " + "words " * 5 for i in range(8)]
    meta = make(jsonl(documents), file="d.jsonl", val_fraction=0.25)
    train, val = sides()
    assert train + val == documents and meta["documents"] == 8 and len(val) == 2
    assert meta["validation"] == "last documents"
    assert "--input=d.jsonl" in prepare.command("t", meta) and "--val_fraction=0.25" in prepare.command("t", meta)


def evenly(documents, val):
    """Whether validation takes about its share of each third of the corpus."""
    thirds = [sum(3 * documents.index(d) // len(documents) == third for d in val) for third in range(3)]
    return all(len(val) / 6 < n < len(val) / 1.8 for n in thirds)


@pytest.mark.parametrize("kind", ["posts by date", "a folder in alphabetical order"])
def test_many_documents_are_held_out_evenly(here, kind):
    """The last tenth of posts by date, or of a folder from a to z, is another distribution than the rest."""
    documents = posts(400)
    if kind == "posts by date":
        meta = make(jsonl(documents), file="d.jsonl")
    else:
        (here / "in").mkdir()
        for i, document in enumerate(documents):
            (here / "in" / f"{i:03}.txt").write_text(document)
        meta = prepare.prepare(prepare.Settings(input="in", dataset="t", vocab_size=300))
    train, val = sides()
    assert sorted(train + val) == sorted(documents) and not set(train) & set(val)
    assert evenly(documents, val) and meta["validation"] == "documents by hash"
    assert abs(meta["val_bytes"] / (meta["train_bytes"] + meta["val_bytes"]) - 0.1) < 0.005


def test_control_the_last_tenth_is_not_even(here, monkeypatch):
    """Negative control of the test above: the way of few documents fails it."""
    monkeypatch.setattr(prepare, "MANY", 1000)
    make(jsonl(posts(400)), file="d.jsonl")
    assert not evenly(posts(400), sides()[1])


def test_copies_of_a_document_are_on_one_side(here):
    """A text that is learnt by heart in training says nothing in validation. Nor do further documents move others."""
    documents = posts(60) * 3
    make(jsonl(documents), file="d.jsonl")
    train, val = sides()
    assert len(val) % 3 == 0 and not set(train) & set(val)
    random.Random(0).shuffle(documents)
    make(jsonl(documents), name="shuffled", file="e.jsonl")
    assert sorted(sides("shuffled")[1]) == sorted(val)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("giant", [False, True])
def test_both_sides_have_a_document_whatever_their_sizes(here, fraction, giant):
    """Also where each is larger than what validation should get, or one is nearly all of the text."""
    documents = posts(10)
    first = min(map(prepare.text_hash, documents))
    giants = (f"giant {i} " * 3000 for i in range(1000))
    documents += [next(g for g in giants if prepare.text_hash(g) < first)] * giant  # the first to be thought of
    make(jsonl(documents), file="d.jsonl", val_fraction=fraction)
    train, val = sides()
    assert train and val and sorted(train + val) == sorted(documents)
    if giant and fraction < 0.1:
        assert documents[-1] in train


def test_a_document_of_several_pieces_is_whole_and_on_one_side(here, monkeypatch):
    """The side is decided at a document's first piece, and the others follow it."""
    monkeypatch.setattr(prepare, "PIECE", 40)
    make(jsonl(posts(50)), file="d.jsonl")
    train, val = sides()
    assert sorted(train + val) == sorted(posts(50)) and val


def test_two_documents_are_one_each(here):
    """The smallest split: one document to train on, one to validate on; the blank line is no document."""
    make('{"text": "the first one"}\n\n{"text": "b"}\n', file="d.jsonl")
    assert decode("t", read("t", "val")) == "b" + prepare.END


def test_the_tokenizer_is_not_trained_on_the_validation_text(here):
    """Changing the validation text must not change the tokenizer; changing the training text must."""
    a = make(TEXT[:9000] + "a" * 1000)["tokenizer_sha256"]
    b = make(TEXT[:9000] + "z" * 1000)["tokenizer_sha256"]
    c = make("qq" + TEXT[2:9000].replace("salt", "soot") + "z" * 1000)["tokenizer_sha256"]
    assert a == b != c


def test_pieces_change_nothing(here, monkeypatch):
    """A text larger than memory is encoded piece by piece; the ids must be those of the whole."""
    text = ("".join(HARD) + TEXT) * 3
    whole = make(text, name="whole")
    monkeypatch.setattr(prepare, "PIECE", 97)
    pieces = make(text, name="pieces")
    assert whole["tokenizer_sha256"] == pieces["tokenizer_sha256"]
    for part in ("train", "val"):
        assert np.array_equal(read("whole", part), read("pieces", part))


@pytest.mark.slow
def test_pieces_cut_anywhere_would_change_something(monkeypatch):
    """Negative control of the test above."""
    tokenizer = prepare.train_bpe([TEXT], 500)
    encode = prepare.fast_encoder(tokenizer)
    cut = [i for i in range(1, 200) if encode(TEXT[:i]).tolist() + encode(TEXT[i:]).tolist() != encode(TEXT).tolist()]
    safe = prepare.last_cut(TEXT[:200])
    assert cut and safe not in cut


def test_folder_and_glob_read_in_a_fixed_order(here):
    """The order of a directory listing differs from machine to machine; the ids must not."""
    for name in ("b.txt", "a.txt", "c.md"):
        (here / "in").mkdir(exist_ok=True)
        (here / "in" / name).write_text(f"{name} " * 30)
    meta = prepare.prepare(prepare.Settings(input="in", dataset="f", vocab_size=300))
    assert meta["documents"] == 3 and decode("f", read("f", "train")).startswith("a.txt")
    assert prepare.prepare(prepare.Settings(input="in/*.txt", dataset="g", vocab_size=300))["documents"] == 2


def test_an_existing_tokenizer_is_taken_as_it_is(here):
    """Its file is copied byte for byte, so that its hash stays the one that the model's metadata name."""
    prepare.train_bpe([TEXT], 400).save("tokenizer.json")
    meta = make(TEXT, tokenizer="tokenizer.json")
    assert (here / "data/t/tokenizer.json").read_bytes() == (here / "tokenizer.json").read_bytes()
    assert meta["vocab_size"] == 400 and meta["eos_token"] == prepare.END


def test_same_input_same_files(here):
    """Nothing in the files depends on the time, or on the threads that encode."""
    make(TEXT)
    first = snapshot(here / "data/t")
    make(TEXT)
    assert snapshot(here / "data/t") == first


@pytest.mark.parametrize(
    "text, settings, message",
    [
        (b"", {}, "no text"),
        (b"ab", {}, "too short"),
        (b"fine so far \xff\xfe", {}, "not UTF-8 text (byte 12 is 0xff)"),
        (TEXT, {"vocab_size": 70000}, "at most 65,?536"),
        (TEXT, {"vocab_size": 100}, "259"),
        (TEXT, {"val_fraction": 1.5}, "above 0 and below 1"),
        (TEXT, {"tokenizer": "./nowhere"}, "no tokenizer.json there"),
        (TEXT, {"tokenizer": "t.txt"}, "damaged, or not what"),
    ],
)
def test_bad_input_says_why_and_leaves_what_was_there(here, text, settings, message):
    """An earlier data set must survive every failed attempt to replace it."""
    make(TEXT)
    before = snapshot(here / "data/t")
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        make(text, **settings)
    assert snapshot(here / "data/t") == before


@pytest.mark.slow
def test_the_same_as_a_user_sees_it(here):
    """Exit code 1, one or two lines, no traceback, no data folder."""
    (here / "empty.txt").write_text("")
    for arguments in (["--input=missing.txt"], ["--input=empty.txt"], ["--dataset=../x"], ["--dataset=new"]):
        done = run_script("prepare.py", *arguments, cwd=here)
        assert done.returncode == 1 and done.stderr.startswith("prepare.py: "), done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 2
    assert not (here / "data").exists()


def test_bad_jsonl_names_its_line(here):
    """Broken JSON, no "text", and a text that is none: the message leads to the line."""
    deep = "[" * 100_000  # a RecursionError
    for bad in ("{broken", '{"txt": "x"}', '{"text": 5}', '["x"]', '{"text": ["x"]}', '{"text": "\\ud800"}', deep):
        with pytest.raises(UserError, match="line 2"):
            make('{"text": "fine"}\n' + bad + "\n", file="d.jsonl")


CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A ferrywoman."}]


@pytest.mark.parametrize("extra", [{"modality": "text"}, {"tags": [{"text": "x"}]}, {}])
def test_conversations_are_known_by_their_keys(here, extra):
    """The word "text" in a value, or in a key inside one, makes no document of a conversation."""
    rows = [{"messages": [CHAT[0] | {"content": f"Question {i}?"}, CHAT[1]]} | extra for i in range(20)]
    (here / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_script("prepare.py", "--input=d.jsonl", "--dataset=d", "--vocab_size=300", cwd=here)
    assert done.returncode == 0 and "20 conversations" in done.stdout, done.stderr


def test_a_document_that_mentions_messages_is_a_document(here):
    """Negative control of the test above: a key called "text" makes a row a document."""
    (here / "d.jsonl").write_text(
        "".join(json.dumps({"text": f'Row {i}: "messages"', "id": i}) + "\n" for i in range(9))
    )
    done = run_script("prepare.py", "--input=d.jsonl", "--dataset=d", "--vocab_size=300", cwd=here)
    assert done.returncode == 0 and "9 documents" in done.stdout, done.stderr


def test_a_part_of_a_message_that_is_no_text_is_named(here):
    """Content in parts, as OpenAI writes it, is refused as a conversation, not as a document without "text"."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}, CHAT[1]]
    (here / "d.jsonl").write_text(json.dumps({"messages": parts}) + "\n")
    done = run_script("prepare.py", "--input=d.jsonl", "--dataset=d", "--vocab_size=300", cwd=here)
    assert done.returncode == 1 and "line 1: message 1 is not an object with a role and a content" in done.stderr


def test_a_full_disk_leaves_the_old_data(here, monkeypatch):
    """The error comes in the middle of the write; nothing of the old may be gone, nothing of the new may stay."""
    make(TEXT)
    before = snapshot(here / "data/t")
    real = prepare.encode_all

    def fails(encode, pieces):
        yield next(real(encode, pieces))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "encode_all", fails)
    with pytest.raises(UserError, match="data/t cannot be written .No space left"):
        make(TEXT * 2)
    assert snapshot(here / "data/t") == before


def test_a_disk_that_is_full_at_the_last_moment_leaves_the_old_data(here, monkeypatch):
    """What was written may turn out not to fit when it is synced: meta.json must not be gone by then."""
    make(TEXT)
    before = snapshot(here / "data/t")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        make(TEXT * 2)
    assert snapshot(here / "data/t") == before


def test_a_folder_that_cannot_be_made_is_named(here):
    """A file where the folder should be; a read-only disk goes the same way."""
    (here / "data").write_text("")
    with pytest.raises(UserError, match="data/t cannot be written"):
        make(TEXT)


def test_kill_9_in_the_middle_leaves_the_old_data(here):
    """A real process, killed while it writes: the folder holds what it held."""
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
    make(TEXT)  # the next run removes what the killed one left
    assert snapshot(here / "data/t") == before


def test_altered_data_are_noticed(here):
    """meta.json has the size or the hash of the files beside it."""
    make(TEXT)
    prepare.read_meta("t")
    file = here / "data/t/train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="Make it again with"):
        prepare.read_meta("t")
    make(TEXT)
    (here / "data/t/tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not the one that the .bin files were made with"):
        prepare.read_meta("t")
    make(TEXT)
    ids = read("t", "val")
    ids[::100] = 300
    ids.tofile("data/t/val.bin")
    with pytest.raises(UserError, match="val.bin holds token id 300, the vocabulary has 300"):
        prepare.read_meta("t")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "5", "[" * 100_000, '{"vocab_size": 300', "changed"])
def test_a_damaged_meta_is_one_line_that_names_it(here, text):
    """A KeyError or a TypeError somewhere in train.py leads nobody to the file."""
    meta = make(TEXT)
    text = json.dumps(meta | {"train_tokens": str(meta["train_tokens"])}) if text == "changed" else text
    (here / "data/t/meta.json").write_text(text)
    with pytest.raises(UserError, match="^data/t/meta.json is damaged.* --dataset=t$") as error:
        prepare.read_meta("t")
    assert len(str(error.value)) < 400


def test_the_command_that_makes_it_again_makes_the_same(here):
    """Without --input it would make Tiny Shakespeare, or fail."""
    prepare.train_bpe([TEXT], 400).save("tok enizer.json")
    for tokenizer in ("bpe", "tok enizer.json"):
        before = make(TEXT, file="my text.txt", tokenizer=tokenizer)
        (here / "data/t/train.bin").write_bytes(b"")
        with pytest.raises(UserError, match="Make it again with: ") as error:
            prepare.read_meta("t")
        command = str(error.value).partition("Make it again with: python ")[2]
        subprocess.run(f"{sys.executable} {ROOT}/{command}", shell=True, cwd=here, check=True, capture_output=True)
        assert prepare.read_meta("t") == before


@pytest.mark.slow
def test_replacing_another_text_is_said(here):
    """Only prepare.py overwrites a data set, and it names the text that is replaced. The same input again, by any
    spelling, replaces nothing; nor does an attempt that fails."""
    (here / "a.txt").write_text(TEXT[:3000])
    (here / "b.txt").write_text(TEXT[3000:6000])
    said = []
    for name in ("a.txt", "./a.txt", "b.txt", "missing.txt", "a.txt"):
        done = run_script("prepare.py", f"--input={name}", "--dataset=t", "--vocab_size=300", cwd=here)
        assert (done.returncode == 0) == (name != "missing.txt"), done.stderr
        said += [line for line in done.stdout.splitlines() if "is replaced" in line]
    assert said == [f"data/t: the data set of {name} is replaced" for name in ("a.txt", "b.txt")]


@pytest.mark.slow
def test_the_name_of_a_data_set_has_no_meaning(here):
    """A name that begins with "shakespeare" takes its own text or none, and "shakespeare" as an input is the download
    under any name. Without any setting prepare.py makes that data set."""
    named = "--dataset=shakespeare_mine", "--vocab_size=300"
    done = run_script("prepare.py", *named, cwd=here)
    assert done.returncode == 1 and "put the text at data/shakespeare_mine/input.txt" in done.stderr, done.stdout
    (here / "data/shakespeare").mkdir(parents=True)
    (here / "data/shakespeare/input.txt").write_text(TEXT[:3000])  # as the download leaves it
    assert run_script("prepare.py", *named, cwd=here).returncode == 1
    (here / "data/shakespeare_mine").mkdir()
    (here / "data/shakespeare_mine/input.txt").write_text(TEXT[:4000])
    for flags, size in ((named, 4000), ((*named, "--input=shakespeare"), 3000), (("--vocab_size=300",), 3000)):
        done = run_script("prepare.py", *flags, cwd=here)
        assert done.returncode == 0 and f"{len(TEXT[:size].encode()):,} bytes" in done.stdout, done.stderr
    recipes = [file for file in (ROOT / "config").glob("*shakespeare.py")]
    assert recipes and all('input = "shakespeare"' in file.read_text() for file in recipes)


def test_two_at_once_are_one_and_a_message(here):
    """Two processes that prepare the same data set would mix their files."""
    with exclusive(here / "data/t", "being prepared"), pytest.raises(UserError, match="by another process"):
        make(TEXT)
    make(TEXT)


def test_offline_the_play_of_this_repository_is_used_with_a_warning(here, monkeypatch, capsys):
    """No network: a warning, the play, and a working data set."""

    def offline(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", offline)
    meta = prepare.prepare(prepare.Settings(vocab_size=400))
    assert "OFFLINE" in capsys.readouterr().out
    assert meta["source"] == "play.txt" and meta["train_tokens"] > 10_000


def test_a_wrong_download_is_refused(here, monkeypatch):
    """A proxy's login page is not Shakespeare."""
    import io

    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>Please log in</html>"))
    with pytest.raises(UserError, match="not Tiny Shakespeare"):
        prepare.prepare(prepare.Settings())
    assert not (here / "data/shakespeare/input.txt").exists()


# ----------------------------------------------------------------------------------------------------------------------
# hostile text: memory and time do not grow with it

STRETCHES = {
    "letters": "a" * 400_000,
    "spaces": " " * 400_000,
    "digits": "7" * 400_000,
    "owls": "🦉" * 250_000,
    "tabs and spaces": "\t " * 200_000,
    "random letters": "".join(random.Random(0).choices("abcdefghij", k=200_000)),
}


@pytest.mark.parametrize("kind", STRETCHES)
def test_no_piece_grows_with_the_text(here, monkeypatch, kind):
    """A gigabyte without a space is held in pieces, too, and is scanned for a place to cut about once."""
    monkeypatch.setattr(prepare, "PIECE", 5000)
    monkeypatch.setattr(prepare, "STRETCH", 5000)
    scanned, real = [], prepare.last_cut
    monkeypatch.setattr(prepare, "last_cut", lambda text: scanned.append(len(text)) or real(text))
    text = STRETCHES[kind][:100_000]
    for file, content in (("t.txt", text), ("t.jsonl", jsonl([text]))):
        (here / file).write_text(content, newline="")
        scanned.clear()
        pieces = [(piece, ends) for piece, _, ends in prepare.read_pieces(prepare.Source([here / file]))]
        assert "".join(piece for piece, _ in pieces) == text
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        assert max(len(piece) for piece, _ in pieces) <= 10_000 and sum(scanned) <= 3 * len(text)


def test_a_document_that_ends_where_a_long_word_is_cut_has_its_end(here, monkeypatch):
    """The last piece is never empty: it carries the end of the document."""
    monkeypatch.setattr(prepare, "PIECE", 100)
    monkeypatch.setattr(prepare, "STRETCH", 100)
    for n in range(98, 103):
        (here / "t.txt").write_text("a" * n)
        pieces = list(prepare.read_pieces(prepare.Source([here / "t.txt"])))
        assert sum(ends for *_, ends in pieces) == 1 and sum(len(text) for text, *_ in pieces) == n


def sample_of(here, monkeypatch, text, **limits):
    for name, value in limits.items():
        monkeypatch.setattr(prepare, name, value)
    (here / "t.txt").write_text(text)
    return prepare.tokenizer_sample(prepare.scan([here / "t.txt"]), 0.1)


def test_the_tokenizers_sample_is_bounded_and_even(here, monkeypatch):
    """Training takes many times the memory of the words that differ, so neither may grow with the text."""
    text = " ".join(f"word{i}x" for i in range(30_000))  # no word twice, once the digits are cut off: "word", "x"
    sample = sample_of(here, monkeypatch, text, TOKENIZER_BYTES=50_000, DISTINCT_BYTES=10_000, PIECE=5000)
    assert 25_000 < sum(map(len, sample)) < 60_000
    positions = [text.index(part) / len(text) for part in sample]
    assert min(positions) < 0.1 and 0.8 < max(positions) <= 0.9
    assert np.histogram(positions, 3, (0, 0.9))[0].min() > len(sample) / 5

    letters = random.Random(0)
    text = " ".join("".join(letters.choices("abcdefghij", k=8)) for _ in range(30_000))
    sample = sample_of(here, monkeypatch, text, TOKENIZER_BYTES=1 << 20, DISTINCT_BYTES=20_000, PIECE=5000)
    words = {word for part in sample for word in part.split()}
    assert 8_000 < sum(map(len, words)) < 24_000
    positions = [text.index(part) / len(text) for part in sample]
    assert np.histogram(positions, 3, (0, 0.9))[0].min() > len(sample) / 5


def test_the_sample_of_ordinary_text_is_all_of_it_cut_at_words(here, monkeypatch):
    """A tokenizer of ordinary text must stay what it was: the same words, spaces and line ends."""
    text = TEXT + "  \n\n indented\n\tand  so on " + TEXT
    sample = sample_of(here, monkeypatch, text)
    assert "".join(sample) == text[: int(len(text) * 0.9)] and max(map(len, sample)) <= 1000
    assert prepare.train_bpe(sample, 600).to_str() == prepare.train_bpe(["".join(sample)], 600).to_str()


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRETCHES)
def test_a_long_text_without_a_word_boundary_is_prepared(here, kind):
    """The trainer is quadratic in the length of a word: five megabytes of one letter never ended. 20 s mean a hang."""
    (here / "t.txt").write_text(STRETCHES[kind], newline="")
    done = run_script("prepare.py", "--input=t.txt", "--dataset=t", "--vocab_size=400", cwd=here, timeout=20)
    assert done.returncode == 0, done.stderr
    both = np.concatenate([read("t", "train"), read("t", "val")])
    assert decode("t", both) == STRETCHES[kind] + prepare.END


@pytest.mark.slow
def test_ctrl_c_ends_the_training_of_a_tokenizer(here):
    """The library trains without looking for signals: 1,000,000 letters in one word would take hours."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare; print('go', flush=True)\n"
        "prepare.train_bpe(['a' * 1_000_000], 400)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            process.stdout.readline()
            time.sleep(0.5)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(20) in (-signal.SIGINT, 130)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one line", "owls", "jsonl"])
def test_memory_does_not_grow_with_the_text(here, kind):
    """The peak of a process that prepares 12 MB stays near that of one that prepares 2 MB."""
    line = "".join(random.Random(0).choices("abcdefghij", k=200_000))
    code = (
        f"import sys, resource; sys.path.insert(0, {str(ROOT)!r}); import prepare; prepare.DISTINCT_BYTES = 1 << 14\n"
        "prepare.TOKENIZER_BYTES = 1 << 20\n"
        "prepare.prepare(prepare.Settings(input=sys.argv[1], dataset='t', vocab_size=300))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for times in (10, 60):
        file = "t.jsonl" if kind == "jsonl" else "t.txt"
        text = {"one line": line, "owls": "🦉" * 50_000, "jsonl": jsonl([line[:2000]] * 100)}[kind]
        (here / file).write_text(text * times)
        done = subprocess.run([sys.executable, "-c", code, file], cwd=here, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) // 1024)
    assert peaks[1] < peaks[0] + 40, f"{peaks} MB"


def test_a_line_that_is_too_long_to_hold_is_named(here, monkeypatch):
    """A JSON text is held whole, so there must be an end to it."""
    monkeypatch.setattr(prepare, "LINE", 5000)
    monkeypatch.setattr(prepare, "PIECE", 1000)
    make(jsonl(["a b " * 1000] * 12), file="d.jsonl")
    with pytest.raises(UserError, match="line 2: over 5,000 characters"):
        make(jsonl(["fine", "a b " * 2000]), file="d.jsonl")


def test_as_many_threads_as_cores(monkeypatch):
    """Four threads are too many for two cores, and too few for sixteen."""
    seen, real = [], prepare.ThreadPoolExecutor
    monkeypatch.setattr(prepare, "ThreadPoolExecutor", lambda n: seen.append(n) or real(n))
    for cores in (1, 12, 200, None):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert [ids for *_, ids in prepare.encode_all(len, [("train", "a" * i) for i in range(50)])] == list(range(50))
    assert seen == [1, 12, 16, 1]


# ----------------------------------------------------------------------------------------------------------------------
# folders, globs, files that are something else


def test_hidden_files_and_folders_are_left_out(here):
    """.git and .obsidian are not the notes; a name that is written out is meant."""
    for name in ("a.md", "sub/b.md", ".git/objects/c.md", "sub/.obsidian/d.md", ".e.md"):
        (here / "notes" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "notes" / name).write_text("text")

    def found(where):
        return [str(p) for p in prepare.find_input(prepare.Settings(input=where))]

    assert found("notes") == found("notes/**/*.md") == found("notes/**") == ["notes/a.md", "notes/sub/b.md"]
    assert found(f"{here}/notes/**/*.md") == [f"{here}/notes/a.md", f"{here}/notes/sub/b.md"]
    assert found("notes/*") == found("notes/**.md") == found("./n?tes/*.md") == ["notes/a.md"]
    assert found("notes/.git/**/*.md") == found("notes/.git") == ["notes/.git/objects/c.md"]
    os.chdir(here / "notes/sub")
    assert found("../*.md") == ["../a.md"]
    for where in ("nowhere", "nowhere/*.md", "*.txt"):
        with pytest.raises(UserError, match="no such file"):
            found(where)


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_loop_of_links_reads_a_file_once(here):
    """glob.glob goes round 40 times, with two links 2^40 times: training text would be in the validation text."""
    (here / "in").mkdir()
    (here / "in/a.txt").write_text("text")
    for link in ("loop", "more"):
        (here / "in" / link).symlink_to(here / "in")
    (here / "in/z.txt").symlink_to(here / "in/a.txt")
    for where in ("in", "in/**/*.txt", "in/*/*.txt"):
        assert len(prepare.find_input(prepare.Settings(input=where))) == 1


def test_jsonl_in_capitals_is_jsonl(here):
    """As plain text its braces and quotes would be learnt."""
    assert make(jsonl(["the first", "the second"]), file="D.JSONL")["documents"] == 2


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.GZ"])
def test_a_packed_file_is_to_be_unpacked(here, name):
    """iconv makes nothing of it."""
    with pytest.raises(UserError, match="Unpack it first") as error:
        make(gzip.compress(TEXT.encode()), file=name)
    assert "iconv" not in str(error.value)


@pytest.mark.parametrize("piece", [5, 1000])
def test_the_position_of_a_bad_byte_counts_the_byte_order_mark(here, monkeypatch, piece):
    """The position is one in the file, in whichever block it falls; the mark itself is no text."""
    monkeypatch.setattr(prepare, "PIECE", piece)
    for before in ("", "fine", "é" * 20):
        bom = b"\xef\xbb\xbf" + before.encode()
        with pytest.raises(UserError, match=re.escape(f"byte {len(bom)} is 0xff")):
            make(bom + b"\xff and more")
    (here / "t.txt").write_bytes(b"\xef\xbb\xbfa \xef\xbb\xbf")
    assert "".join(text for text, *_ in prepare.read_pieces(prepare.Source([here / "t.txt"]))) == "a \ufeff"


@pytest.mark.parametrize("size", [0, 100, 25000, 40000])
def test_a_text_that_changes_while_it_is_read_is_named(here, monkeypatch, size):
    """What was counted and what is written must be the same text."""
    real = prepare.trained_tokenizer

    def changes(*arguments):
        result = real(*arguments)
        (here / "t.txt").write_text((TEXT * 2)[:size])
        return result

    monkeypatch.setattr(prepare, "trained_tokenizer", changes)
    with pytest.raises(UserError, match="changed while it was read"):
        make(TEXT)


# ----------------------------------------------------------------------------------------------------------------------
# hostile tokenizers


def spec(**changes):
    return json.loads(prepare.train_bpe([TEXT[:5000]], 300).to_str()) | changes


def replace(content):
    return {"type": "Replace", "pattern": {"String": "e"}, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        replace("e" * 1000),
        {"type": "Sequence", "normalizers": [replace("ee")] * 30},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace("eeee")] * 4}] * 4},
        {"type": "Prepend", "prepend": "x" * 100_000},
    ],
)
def test_a_normalizer_that_multiplies_text_is_refused_unrun(here, normalizer):
    """Thirty doublings make a gigabyte of one letter, so it must not be tried."""
    (here / "tokenizer.json").write_text(json.dumps(spec(normalizer=normalizer)))
    with pytest.raises(UserError, match="tokenizer.json .*many times as long"):
        make(TEXT, tokenizer="tokenizer.json")


def test_the_usual_normalizers_are_taken(here):
    """What Llama 2, Qwen and BERT have."""
    metaspace = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    for normalizer in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": metaspace}):
        (here / "tokenizer.json").write_text(json.dumps(spec(normalizer=normalizer)))
        assert make(TEXT, tokenizer="tokenizer.json")["vocab_size"] == 300


def test_a_damaged_tokenizer_is_one_line_that_names_it(here, monkeypatch):
    """Truncated, another kind of JSON, ids of 10^9, too large a file, an end token that is a number."""
    good = spec()
    model = good["model"]
    far = good | {"model": model | {"vocab": model["vocab"] | {"Ġfar": 10**9}}}
    for text in (json.dumps(good)[:5000], "[]", "5", "", "{}", "[" * 100_000, json.dumps(far)):
        (here / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="^tokenizer.json (is damaged|has)") as error:
            make(TEXT, tokenizer="tokenizer.json")
        assert len(str(error.value)) < 400
    with open(here / "tokenizer.json", "wb") as f:
        f.truncate(65 << 20)
    with pytest.raises(UserError, match="over 64 MB"):
        make(TEXT, tokenizer="tokenizer.json")
    endless = good | {"added_tokens": []}
    endless["model"]["vocab"] = {t: i for t, i in model["vocab"].items() if t != prepare.END} | {"other": 0}
    (here / "tokenizer.json").write_text(json.dumps(endless))
    for end in ("5", '["x"]', '{"content": 7}'):
        (here / "tokenizer_config.json").write_text(f'{{"eos_token": {end}}}')
        with pytest.raises(UserError, match="no eos_token"):
            make(TEXT, tokenizer="tokenizer.json")


def test_a_vocabulary_in_another_spelling_is_encoded_by_its_own_library(here):
    """A token with a plain space cannot be one of ByteLevel's: tiktoken is not tried, and nothing breaks."""
    model = spec()["model"]
    model["vocab"]["a b"] = len(model["vocab"])
    (here / "tokenizer.json").write_text(json.dumps(spec(model=model)))
    assert make(TEXT, tokenizer="tokenizer.json")["vocab_size"] == 301
