"""evaluate.py: which tokens count, with how much context, and what the command prints."""

import math
import re
from contextlib import nullcontext

from lib.settings import UserError

import numpy as np
import pytest
import torch
from conftest import TEXT, run_script, save_hf_directory, tiny_hf

import prepare
from checkpoint import load
from dataloader import text_rows
from evaluate import evaluate, read_ids, validation_ids


@pytest.mark.parametrize("n", [2, 8, 9, 10, 17, 100])
@pytest.mark.parametrize("stride", [8, 4, 3])
def test_each_token_is_a_target_once(n, stride):
    """For any length, each token but the first counts once, after the tokens that precede it in the text."""
    ids = np.arange(1000, 1000 + n)
    inputs, targets = text_rows(ids, 8, stride)
    assert inputs.shape == targets.shape and inputs.shape[1] == 8 and targets.dtype == torch.int64
    assert sorted(targets[targets != -100].tolist()) == list(range(1001, 1000 + n))
    rows, columns = (targets != -100).nonzero(as_tuple=True)
    for row, column in zip(rows, columns):
        assert targets[row, column] == inputs[row, column] + 1
        assert row == 0 or column >= 8 - stride, "in later rows the first 8 - stride tokens are only context"


def test_few_rows_of_many():
    """They are evenly spaced from the first to the last, and no token counts twice."""
    inputs, targets = text_rows(np.arange(1000, 1100), 8, 8, limit=3)
    assert inputs[:, 0].tolist() == [1000, 1048, 1096] and (targets != -100).sum() == 8 + 8 + 3


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT[:3000], encoding="utf-8")
    prepare.prepare(prepare.Settings(input="t.txt", dataset="t", vocab_size=300))
    save_hf_directory(tmp_path / "m", tiny_hf(vocab_size=300))
    (tmp_path / "m/tokenizer.json").write_bytes((tmp_path / "data/t/tokenizer.json").read_bytes())
    return tmp_path / "m"


def by_hand(model, ids, T, stride) -> float:
    """Return the nats per token, computed one token at a time."""
    nats = []
    for at in range(1, len(ids)):
        row = 0 if at <= T else math.ceil((at - T) / stride)
        logits = model(torch.tensor(ids[row * stride : at])[None])[0][0, -1]
        nats.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[at])).item())
    return sum(nats) / len(nats)


@pytest.mark.slow
def test_the_command_prints_both_figures(model, tmp_path):
    """Bits per byte, in rows and sliding, equal those computed by hand. The two differ, so a mix-up would show."""
    shown = run_script("evaluate.py", "--model=m", "--text=t.txt", "--block_size=16", "--dtype=float32", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    rows, sliding = map(float, re.findall(r"([\d.]+) bits per byte", shown.stdout))
    loaded, tokenizer = load(model)
    ids, size = read_ids(tokenizer, tmp_path / "t.txt")
    for found, stride in ((rows, 16), (sliding, 8)):
        expected = by_hand(loaded, ids.tolist(), 16, stride) * len(ids) / math.log(2) / size
        assert abs(found - expected) < 1e-4
    assert abs(rows - sliding) > 1e-3


@pytest.mark.slow
def test_two_models_are_compared_side_by_side(model, tmp_path):
    """Each model uses its own tokenizer; the figures come in the given order, with the difference."""
    save_hf_directory(tmp_path / "n", tiny_hf(seed=1))  # 512 tokens instead of 300
    flags = ["--text=t.txt", "--block_size=16", "--dtype=float32"]
    alone = [run_script("evaluate.py", f"--model={name}", *flags, cwd=tmp_path).stdout for name in ("m", "n")]
    alone = [list(map(float, re.findall(r"([\d.]+) bits per byte", text))) for text in alone]
    shown = run_script("evaluate.py", "--model=m,n", *flags, cwd=tmp_path)
    found = re.findall(r"([\d.]+)  ([\d.]+) bits per byte \(([+-][\d.]+), ", shown.stdout)
    assert [list(map(float, row[:2])) for row in found] == [list(row) for row in zip(*alone)], shown
    assert all(abs(float(b) - float(a) - float(d)) < 2e-4 and abs(float(d)) > 0.01 for a, b, d in found)


def test_the_validation_part_is_what_train_measures(model, tmp_path):
    """--dataset reads val.bin. A data set with another tokenizer is refused."""
    shown = run_script("evaluate.py", "--model=m", "--dataset=t", "--block_size=16", "--dtype=float32", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    ids, size = validation_ids("t", model)
    meta = prepare.read_meta("t")
    assert (len(ids), size) == (meta["val_tokens"], meta["val_bytes"])
    loss = evaluate(load(model)[0], text_rows(ids, 16, 16), 4, nullcontext)
    assert f"{loss / math.log(2) * len(ids) / size:.4f} bits per byte" in shown.stdout
    (model / "tokenizer.json").write_text((model / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="another tokenizer"):
        validation_ids("t", model)


@pytest.mark.slow
def test_wrong_use_is_one_line(model, tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for flags, message in (
        (["--text=gone.txt"], "gone.txt"), (["--text=binary.txt"], "UTF-8"), (["--block_size=65"], "--block_size=65"),
        (["--text=t.txt", "--dataset=t"], "--dataset"), (["--dataset=nothing"], "nothing"),
    ):  # fmt: skip
        shown = run_script("evaluate.py", "--model=m", *flags, cwd=tmp_path)
        assert shown.returncode == 1 and message in shown.stderr and len(shown.stderr.splitlines()) == 1
