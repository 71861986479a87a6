"""
Rows of tokens from the .bin files of prepare.py: those of a training step, and those of an evaluation.

    rows = Rows("data/shakespeare/train.bin", tokens=299442, block_size=256, seed=1337)
    inputs, targets = rows.batch(range(0, 16), "cpu")  # (B, T) int64 each: rows 0 to 15 of the run

Row i of a run is a pure function of (seed, i). So the order of the data needs no saved state, survives a resume
exactly, and does not depend on the number of processes or on the micro-batch.
"""

import math
from pathlib import Path

from lib.settings import UserError

import numpy as np
import torch


def open_data(folder: Path, meta: dict, block_size: int, seed: int, token_noise: float, eval_rows: int):
    """Return the training rows of a data set (Rows or Conversations) and its validation rows, as tensors."""
    train, val, vocab_size = folder / "train.bin", folder / "val.bin", meta["vocab_size"]
    if "train_loss_tokens" in meta:
        if token_noise:
            raise UserError("--token_noise is for text, not for conversations.")
        rows = Conversations(train, block_size, seed, vocab_size)
        return rows, Conversations(val, block_size, seed, vocab_size).validation(eval_rows)
    rows = Rows(train, meta["train_tokens"], block_size, seed, token_noise, vocab_size)
    return rows, validation_rows(val, meta["val_tokens"], block_size, eval_rows, vocab_size)


class Rows:
    """Training rows of a text, by number. In each epoch the text is cut into blocks from a random offset, wrapping
    around at its end, and the blocks come in random order: every token is a target once, except a remainder shorter
    than a block.

    noise: the fraction of input tokens replaced by random ones, new ones in each epoch, so that no two epochs are
    alike (https://arxiv.org/abs/1703.02573).
    """

    def __init__(self, file, tokens: int, block_size: int, seed: int, noise: float = 0.0, vocab_size: int = 0):
        if tokens < block_size + 1:
            raise UserError(f"{file} has only {tokens:,} tokens. Use more text, or a --block_size below {tokens}.")
        self.file = open(file, "rb")  # not np.memmap, whose pages count as memory of this process
        self.tokens, self.T, self.seed, self.noise, self.vocab_size = tokens, block_size, seed, noise, vocab_size
        self.per_epoch, self.epoch = tokens // block_size, -1

    def __getitem__(self, row: int) -> np.ndarray:  # (T + 1,) int64
        epoch, i = divmod(row, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.offset = random.integers(self.tokens)
            self.order = random.permutation(self.per_epoch)
            self.epoch = epoch
        start = (self.offset + self.order[i] * self.T) % self.tokens
        before_end = min(self.T + 1, self.tokens - start)
        spans = (start, before_end), (0, self.T + 1 - before_end)
        return np.concatenate([read_ids(self.file, *span, self.vocab_size) for span in spans])

    def batch(self, rows: range, device):
        """Return inputs and targets of these rows, (B, T) int64 each. A target is the token that follows its input."""
        data = np.stack([self[row] for row in rows])
        inputs = data[:, :-1].copy()
        if self.noise:
            for i, row in enumerate(rows):
                random = np.random.Generator(np.random.PCG64([self.seed, row, 1]))
                noisy = random.random(self.T) < self.noise
                inputs[i, noisy] = random.integers(self.vocab_size, size=noisy.sum())
        return to_device(torch.from_numpy(inputs), device), to_device(torch.from_numpy(data[:, 1:]), device)

    def weight(self, rows: range) -> int:
        """Return the weight of these rows in the mean loss of a step."""
        return len(rows)

    def size(self, rows: range) -> int:
        """Count the input tokens of these rows."""
        return len(rows) * self.T

    def describe(self) -> str:
        return f"{self.per_epoch:,} rows"


class Conversations:
    """Training rows of conversations, by number. A row packs several, which do not attend to each other. Targets are
    the tokens that the loss mask selects, all others are -100.

    The mask file has a byte per token: 1 if it is trained on, 2 if a conversation begins. A conversation longer than a
    row is truncated, and left out if no answer remains. Each epoch visits the same rows in its own order.
    """

    def __init__(self, file, block_size: int, seed: int, vocab_size: int = 0):
        self.mask = np.fromfile(Path(file).with_suffix(".mask.bin"), np.uint8)
        begins = np.flatnonzero(self.mask == 2)
        full = np.diff([*begins, len(self.mask)])
        lengths = np.minimum(full, block_size + 1)
        counted, ends = np.append(self.mask == 1, False), np.stack((begins, begins + lengths), 1).ravel()
        loss_tokens = np.add.reduceat(counted, ends, dtype=np.int64)[::2]  # sums from each begin to its end
        self.cut, self.left_out = int((full > lengths).sum()), int((loss_tokens == 0).sum())
        self.begins, self.lengths, self.loss_tokens = (x[loss_tokens > 0] for x in (begins, lengths, loss_tokens))
        if len(self.begins) == 0:
            raise UserError(f"{file}: no conversation has an answer within --block_size={block_size} tokens.")
        self.file, self.T, self.seed, self.vocab_size = open(file, "rb"), block_size, seed, vocab_size
        self.packed = pack(self.lengths - 1, block_size)  # the last token of each is only a target
        self.per_epoch, self.epoch = len(self.packed), -1

    def __getitem__(self, row: int) -> list[int]:  # the numbers of its conversations
        epoch, i = divmod(row, self.per_epoch)
        if epoch != self.epoch:
            self.order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.per_epoch)
            self.epoch = epoch
        return self.packed[self.order[i]]

    def tensors(self, rows: list[list[int]]):
        """Return inputs, targets and documents (conversations numbered from 1; 0 is padding), (N, T) int64 each."""
        shape = len(rows), self.T
        inputs, targets, documents = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
        for row, conversations in enumerate(rows):
            end = 0
            for document, i in enumerate(conversations, 1):
                begin, length = int(self.begins[i]), int(self.lengths[i])
                ids = read_ids(self.file, begin, length, self.vocab_size)
                own, end = slice(end, end + length - 1), end + length - 1
                inputs[row, own], documents[row, own] = ids[:-1], document
                targets[row, own] = np.where(self.mask[begin + 1 : begin + length] == 1, ids[1:], -100)
        return tuple(map(torch.from_numpy, (inputs, targets, documents)))

    def batch(self, rows: range, device):
        """Return what tensors() makes of these rows, on the device."""
        return [to_device(tensor, device) for tensor in self.tensors([self[row] for row in rows])]

    def validation(self, limit: int):
        """Return the tensors of at most `limit` rows, evenly spaced."""
        return self.tensors([self.packed[i] for i in spread(self.per_epoch, limit)])

    def weight(self, rows: range) -> int:
        """Count the tokens of these rows that are trained on."""
        return sum(int(self.loss_tokens[self[row]].sum()) for row in rows)

    def size(self, rows: range) -> int:
        return sum(int(self.lengths[self[row]].sum()) - len(self[row]) for row in rows)

    def describe(self) -> str:
        packed = f"{self.per_epoch:,} rows with {len(self.begins):,} conversations"
        return f"{packed}; {self.cut:,} truncated to {self.T} tokens, {self.left_out:,} left out: no answer"


def pack(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing of items 0 .. N-1: the largest first, each into the fullest bin that
    still fits it. Returns the items of each bin."""
    bins, with_room = [], [[] for _ in range(capacity + 1)]  # with_room[r]: the bins that have room r left
    has_room = np.arange(capacity + 1) == capacity  # whether there are any; a new bin is always available
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        room = size + int(has_room[size:].argmax())
        if room == capacity:
            bins.append([])
            with_room[capacity].append(len(bins) - 1)
        chosen = with_room[room].pop()
        has_room[room] = with_room[room] or room == capacity
        bins[chosen].append(int(item))
        with_room[room - size].append(chosen)
        has_room[room - size] = True
    return bins


def validation_rows(file, tokens: int, block_size: int, limit: int, vocab_size: int = 0):
    """Return inputs and targets (N, T) of the validation split, of at most `limit` rows. No others are read."""
    rows = text_rows(np.memmap(file, "<u2", "r")[:tokens], block_size, block_size, limit)
    check_ids(torch.stack(rows).numpy(), file, vocab_size)
    return rows


def text_rows(ids: np.ndarray, block_size: int, stride: int, limit: int = 0):
    """Return inputs and targets (N, T) of a text: rows that begin every `stride` tokens, at most `limit` of them unless
    it is 0. Every token but the first is a target once, in the first row that reads it; other targets are -100."""
    count = math.ceil(max(1, len(ids) - 1 - block_size + stride) / stride)
    starts = stride * spread(count, limit)
    positions = starts[:, None] + np.arange(block_size + 1)
    rows = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
    rows[positions >= len(ids)] = -100
    inputs, targets = rows[:, :-1].clip(min=0), rows[:, 1:].copy()
    targets[starts > 0, : block_size - stride] = -100  # targets of the row before
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def spread(count: int, limit: int) -> np.ndarray:
    """Return 0 .. count-1, or if these are more than `limit`, that many of them, evenly spaced."""
    return np.arange(count) if not 0 < limit < count else np.linspace(0, count - 1, limit).round().astype(int)


def read_ids(file, start: int, count: int, vocab_size: int) -> np.ndarray:
    """Read `count` ids from an open file, as int64."""
    file.seek(2 * start)
    ids = np.frombuffer(file.read(2 * count), "<u2").astype(np.int64)
    check_ids(ids, file.name, vocab_size)
    return ids


def check_ids(ids: np.ndarray, file, vocab_size: int):
    """Raise UserError if an id is outside the vocabulary."""
    if ids.max(initial=0) >= (vocab_size or 2**16):
        raise UserError(f"{file} holds ids beyond the vocabulary of {vocab_size:,}. Make it again with prepare.py.")


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Copy a tensor to `device`; from pinned memory, a copy to a GPU overlaps with the computation."""
    is_cuda = torch.device(device).type == "cuda"
    return tensor.pin_memory().to(device, non_blocking=True) if is_cuda else tensor.to(device)
