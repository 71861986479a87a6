"""prepare.py: nothing lost, nothing leaked, nothing half written."""

import json
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TEXT, run_script
from tokenizers import Tokenizer

import prepare
from config import UserError
from files import exclusive

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


def test_documents_stay_whole_and_on_one_side(here):
    """Several documents are split between documents: none is cut, none is on both sides."""
    documents = [f"document {i} " + "words " * (i % 7) for i in range(50)]
    text = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    meta = make(text, file="d.jsonl")
    train = decode("t", read("t", "train")).split(prepare.END)[:-1]
    val = decode("t", read("t", "val")).split(prepare.END)[:-1]
    assert train + val == documents and meta["documents"] == 50
    assert 3 <= len(val) <= 8


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
        (TEXT, {"vocab_size": 70000}, "65536"),
        (TEXT, {"vocab_size": 100}, "259"),
        (TEXT, {"val_fraction": 1.5}, "between 0 and 1"),
        (TEXT, {"tokenizer": "./nowhere"}, "no tokenizer.json there"),
        (TEXT, {"tokenizer": "t.txt"}, "not a tokenizer"),
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
    for bad in ("{broken", '{"txt": "x"}', '{"text": 5}', '["x"]'):
        with pytest.raises(UserError, match="line 2"):
            make('{"text": "fine"}\n' + bad + "\n", file="d.jsonl")


def test_a_full_disk_leaves_the_old_data(here, monkeypatch):
    """The error comes in the middle of the write; nothing of the old may be gone, nothing of the new may stay."""
    make(TEXT)
    before = snapshot(here / "data/t")
    real = prepare.encode_all

    def fails(encode, pieces):
        yield next(real(encode, pieces))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "encode_all", fails)
    with pytest.raises(OSError):
        make(TEXT * 2)
    assert snapshot(here / "data/t") == before


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
