"""dataloader.py: which tokens a row holds, and that every token of an epoch is predicted once."""

import tracemalloc

from lib.settings import UserError

import numpy as np
import pytest
import torch

from dataloader import Rows, validation_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to write x.bin to."""
    monkeypatch.chdir(tmp_path)


def test_an_epoch_predicts_every_token_once(here):
    """Rows are blocks from an offset, in some order, round the end: every target once, but for the remainder."""
    np.arange(1003, dtype="<u2").tofile("x.bin")
    rows = Rows("x.bin", 1003, 10, seed=1)
    epochs = []
    for epoch in range(3):
        data = np.stack([rows[i] for i in range(epoch * 100, epoch * 100 + 100)])
        assert ((data[:, 1:] - data[:, :-1]) % 1003 == 1).all(), "a target is the token that follows"
        seen = np.bincount(data[:, 1:].ravel(), minlength=1003)
        assert seen.max() == 1 and (seen == 0).sum() == 3
        epochs.append(data)
    assert not np.array_equal(epochs[0], epochs[1]), "each epoch has an order of its own"
    other = Rows("x.bin", 1003, 10, seed=2)
    assert np.array_equal(Rows("x.bin", 1003, 10, seed=1)[207], epochs[2][7])  # any row, without the ones before
    assert any(not np.array_equal(other[i], epochs[0][i]) for i in range(5))


def test_the_smallest_text_that_works_and_the_one_that_does_not(here):
    np.arange(11, dtype="<u2").tofile("x.bin")
    assert Rows("x.bin", 11, 10, 0)[5].shape == (11,)
    with pytest.raises(UserError, match="block_size=10 needs 11"):
        Rows("x.bin", 10, 10, 0)


def test_noise_is_a_function_of_the_row_and_spares_the_targets(tmp_path, monkeypatch):
    """A row has the same noise in any batch and another in the next epoch; about the share that was asked for."""
    monkeypatch.chdir(tmp_path)
    np.arange(20000, dtype="<u2").tofile("x.bin")
    clean, noisy = (
        Rows("x.bin", 20000, 100, 1),
        Rows("x.bin", 20000, 100, 1, noise=0.2, vocab_size=20000),
    )
    (x, y), (x_clean, y_clean) = noisy.batch(range(50), "cpu"), clean.batch(range(50), "cpu")
    assert torch.equal(y, y_clean) and 0.17 < float((x != x_clean).float().mean()) < 0.23
    assert torch.equal(noisy.batch(range(7, 9), "cpu")[0], x[7:9])
    changed = [(noisy.batch(range(r, r + 1), "cpu")[0] != clean.batch(range(r, r + 1), "cpu")[0])[0] for r in (3, 203)]
    assert not torch.equal(*changed)
    assert x.max() < 20000 and x.dtype == torch.int64


def test_validation_covers_every_token_once_and_always_alike(here):
    np.arange(105, dtype="<u2").tofile("x.bin")
    inputs, targets = validation_rows("x.bin", 105, 10, 99)
    assert targets[targets != -100].tolist() == list(range(1, 105))
    assert (targets - inputs)[targets != -100].eq(1).all() and inputs.min() >= 0
    few, _ = validation_rows("x.bin", 105, 10, 3)
    assert few[:, 0].tolist() == [0, 50, 100] and torch.equal(few, validation_rows("x.bin", 105, 10, 3)[0])


def test_a_validation_split_of_any_size_costs_its_rows_alone(here):
    """Ten billion tokens (a file with nothing in it but its length) and ten rows: kilobytes, where reading the split
    and choosing afterwards took 16 bytes a token. Negative control: the measure sees an array of that kind."""
    tokens = 10**10
    with open("x.bin", "wb") as f:
        f.truncate(2 * tokens)
    tracemalloc.start()
    rows, _ = validation_rows("x.bin", tokens, 256, 10)
    _, peak = tracemalloc.get_traced_memory()
    assert rows.shape == (10, 256) and peak < 2**20
    kept = np.zeros(2**20, dtype="<u2")
    assert tracemalloc.get_traced_memory()[1] > len(kept)
    tracemalloc.stop()
