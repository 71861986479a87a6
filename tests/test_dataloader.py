"""dataloader.py: which tokens a row holds, and that an epoch trains on everything once."""

import tracemalloc

from lib.settings import UserError

import numpy as np
import pytest
import torch

from dataloader import Conversations, Rows, pack, validation_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in an empty folder, to write x.bin to."""
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# rows of a text


def test_an_epoch_predicts_every_token_once(here):
    """Rows are blocks from a random offset, wrapped around the end, in random order: every target comes once, except
    for the remainder. Text that is too short for a row is refused."""
    np.arange(1003, dtype="<u2").tofile("x.bin")
    rows = Rows("x.bin", 1003, 10, seed=1)
    epochs = []
    for epoch in range(3):
        data = np.stack([rows[i] for i in range(epoch * 100, epoch * 100 + 100)])
        assert ((data[:, 1:] - data[:, :-1]) % 1003 == 1).all(), "a target is the token that follows"
        seen = np.bincount(data[:, 1:].ravel(), minlength=1003)
        assert seen.max() == 1 and (seen == 0).sum() == 3
        epochs.append(data)
    assert not np.array_equal(epochs[0], epochs[1]), "each epoch has its own order"
    other = Rows("x.bin", 1003, 10, seed=2)
    assert np.array_equal(Rows("x.bin", 1003, 10, seed=1)[207], epochs[2][7])  # without loading the rows before
    assert any(not np.array_equal(other[i], epochs[0][i]) for i in range(5))
    assert Rows("x.bin", 11, 10, 0)[5].shape == (11,)
    with pytest.raises(UserError, match="block_size below 10"):
        Rows("x.bin", 10, 10, 0)


def test_ids_of_another_tokenizer_are_refused(here):
    """In training rows and in validation rows: an id beyond the vocabulary would be an index error, or worse."""
    np.arange(100, dtype="<u2").tofile("x.bin")
    with pytest.raises(UserError, match="beyond the vocabulary"):
        for row in range(20):
            Rows("x.bin", 100, 10, 0, vocab_size=99)[row]
    with pytest.raises(UserError, match="beyond the vocabulary"):
        validation_rows("x.bin", 100, 10, 99, 99)
    assert len(validation_rows("x.bin", 100, 10, 99, 100)[0]) == 10


def test_noise_is_a_function_of_the_row_and_spares_the_targets(here):
    """A row has the same noise in any batch, different noise in the next epoch, and about as much as was asked for."""
    np.arange(20000, dtype="<u2").tofile("x.bin")
    clean, noisy = Rows("x.bin", 20000, 100, 1), Rows("x.bin", 20000, 100, 1, noise=0.2, vocab_size=20000)
    (x, y), (x_clean, y_clean) = noisy.batch(range(50), "cpu"), clean.batch(range(50), "cpu")
    assert torch.equal(y, y_clean) and 0.17 < float((x != x_clean).float().mean()) < 0.23
    assert torch.equal(noisy.batch(range(7, 9), "cpu")[0], x[7:9])
    changed = [(noisy.batch(range(r, r + 1), "cpu")[0] != clean.batch(range(r, r + 1), "cpu")[0])[0] for r in (3, 203)]
    assert not torch.equal(*changed)
    assert x.max() < 20000 and x.dtype == torch.int64


def test_validation_covers_every_token_once_and_is_always_the_same(here):
    np.arange(105, dtype="<u2").tofile("x.bin")
    inputs, targets = validation_rows("x.bin", 105, 10, 99)
    assert targets[targets != -100].tolist() == list(range(1, 105))
    assert (targets - inputs)[targets != -100].eq(1).all() and inputs.min() >= 0
    few, _ = validation_rows("x.bin", 105, 10, 3)
    assert few[:, 0].tolist() == [0, 50, 100] and torch.equal(few, validation_rows("x.bin", 105, 10, 3)[0])


def test_a_validation_split_of_any_size_costs_its_rows_alone(here):
    """Ten rows out of ten billion tokens (a sparse file) take less than 1 MB. Negative control: the measurement notices
    an array."""
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


# ----------------------------------------------------------------------------------------------------------------------
# rows of conversations


def write_conversations(count: int, name="x") -> list[tuple[np.ndarray, np.ndarray]]:
    """Write random conversations of 2 to 80 tokens, a tenth with nothing to train on; return (ids, mask) of each."""
    random, conversations = np.random.default_rng(0), []
    for _ in range(count):
        length = random.integers(2, 80)
        mask = random.integers(0, 2, length) * (random.random() > 0.1)
        mask[0] = 2
        conversations.append((random.integers(500, size=length), mask))
    for part, file, dtype in ((0, f"{name}.bin", "<u2"), (1, f"{name}.mask.bin", "u1")):
        np.concatenate([c[part] for c in conversations]).astype(dtype).tofile(file)
    return conversations


@pytest.mark.parametrize("block_size", [16, 40, 100])
def test_a_row_holds_whole_conversations_and_trains_on_what_the_mask_selects(here, block_size):
    """Each conversation appears once per epoch, cut to the row's length, or is left out if nothing is left to train on.
    Target t is token t + 1 if the loss mask selects that token, else -100. Negative control: the mask of token t."""
    conversations = [(ids[: block_size + 1], mask[: block_size + 1]) for ids, mask in write_conversations(200)]
    kept = [(ids, mask) for ids, mask in conversations if (mask == 1).any()]
    rows, found = Conversations("x.bin", block_size, seed=1), []
    assert rows.left_out == len(conversations) - len(kept)
    for row in range(rows.per_epoch):
        inputs, targets, documents = (tensor[0].numpy() for tensor in rows.batch(range(row, row + 1), "cpu"))
        assert len(inputs) == block_size and (targets[documents == 0] == -100).all()
        assert rows.weight(range(row, row + 1)) == (targets != -100).sum()
        assert rows.size(range(row, row + 1)) == (documents != 0).sum()
        for document, i in enumerate(rows[row], 1):
            ids, mask = kept[i]
            own = documents == document
            assert inputs[own].tolist() == ids[:-1].tolist()
            assert targets[own].tolist() == np.where(mask[1:] == 1, ids[1:], -100).tolist()
            found.append((i, targets[own].tolist() == np.where(mask[:-1] == 1, ids[1:], -100).tolist()))
    assert sorted(i for i, _ in found) == list(range(len(kept))) and not all(same for _, same in found)
    with pytest.raises(UserError, match="no conversation has an answer within --block_size=0"):
        Conversations("x.bin", 0, seed=1)


def test_a_row_of_conversations_is_a_function_of_seed_and_number(here):
    """It is the same in any order, from another object, and in a batch of any size. Another seed gives another
    order."""
    write_conversations(200)
    straight = [Conversations("x.bin", 40, seed=1)[row] for row in range(300)]
    rows = Conversations("x.bin", 40, seed=1)
    for row in np.random.default_rng(0).permutation(300):
        assert rows[int(row)] == straight[row]
    assert straight[:100] != straight[rows.per_epoch : rows.per_epoch + 100], "each epoch has its own order"
    assert [Conversations("x.bin", 40, seed=2)[row] for row in range(300)] != straight
    whole = rows.batch(range(8, 16), "cpu")
    for micro in (1, 2, 3):
        parts = [rows.batch(range(a, min(a + micro, 16)), "cpu") for a in range(8, 16, micro)]
        assert all(torch.equal(torch.cat(tensors), all_) for tensors, all_ in zip(zip(*parts), whole, strict=True))


def test_packing_is_best_fit():
    """An example by hand, then random sizes: largest first, each goes into the fullest bin with enough room."""
    assert pack(np.array([3, 7, 5, 2, 10]), 10) == [[4], [1, 0], [2, 3]]
    sizes = np.random.default_rng(0).integers(1, 65, 200)
    bins = pack(sizes, 64)
    assert sorted(item for items in bins for item in items) == list(range(200))
    bin_of = {item: i for i, items in enumerate(bins) for item in items}
    room = {}
    for item in sorted(range(200), key=lambda n: -sizes[n]):
        enough = [left for left in room.values() if left >= sizes[item]]
        assert room.get(bin_of[item], 64) == min(enough, default=64)
        room[bin_of[item]] = room.get(bin_of[item], 64) - sizes[item]


def test_validation_conversations_are_all_there_or_spread(here):
    """A limit selects evenly spaced rows."""
    kept = [mask for _, mask in write_conversations(80) if (mask == 1).any()]
    inputs, targets, documents = Conversations("x.bin", 300, seed=1).validation(1000)
    assert documents.amax(1).sum() == len(kept) and (targets != -100).sum() == sum((mask == 1).sum() for mask in kept)
    some = Conversations("x.bin", 300, seed=1).validation(3)
    assert len(inputs) > 3 and len(some[0]) == 3
    assert all(any(torch.equal(row, x) for x in inputs) for row in some[0])
