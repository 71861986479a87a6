"""
What prepare.py made, as rows of tokens: the rows of a training step, and the rows of the evaluation.

    rows = Rows("data/shakespeare/train.bin", tokens=299442, block_size=256, seed=1337)
    inputs, targets = rows.batch(range(0, 16), "cpu")       # (B, T) int64 each: rows 0 to 15 of the run

Row i of a run is a pure function of (seed, i). So the order of the data needs no saved state, survives a resume
exactly, and does not depend on the number of processes or on the micro-batch. Conversations() does the same for those,
with several to a row.

Shapes: B batch, T time (block_size), N rows.
"""

import math
from pathlib import Path

from lib.settings import UserError

import numpy as np
import torch


class Rows:
    """Training rows by their number. Each epoch cuts the text into blocks from an offset of its own, wrapping round at
    the end, and visits them in an order of its own. Over an epoch every token is predicted once, but for a remainder
    shorter than a block.

    noise: the share of the inputs, never of the targets, that becomes a token drawn from the whole vocabulary, a
    different one in every epoch: "blank noising" without the blank (https://arxiv.org/abs/1703.02573). A text that is
    read many times is then never the same twice.
    """

    def __init__(self, file, tokens: int, block_size: int, seed: int, noise: float = 0.0, vocab_size: int = 0):
        if tokens < block_size + 1:
            raise UserError(
                f"{file} has {tokens:,} tokens; --block_size={block_size} needs {block_size + 1:,}. Use more text, or "
                f"--block_size={max(1, tokens - 1)} or less."
            )
        self.name, self.file = file, open(file, "rb")  # not np.memmap: its pages would count as memory of this process
        self.tokens, self.T, self.seed, self.noise, self.vocab_size = tokens, block_size, seed, noise, vocab_size
        self.per_epoch = tokens // block_size
        self.epoch = -1

    def read(self, start: int, count: int) -> np.ndarray:
        self.file.seek(2 * start)
        return checked(self.file.read(2 * count), count, self.name, self.vocab_size)

    def __getitem__(self, row: int) -> np.ndarray:  # (T + 1,) int64
        epoch, i = divmod(row, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.offset = random.integers(self.tokens)
            self.order = random.permutation(self.per_epoch)
            self.epoch = epoch
        start = (self.offset + self.order[i] * self.T) % self.tokens
        first = min(self.T + 1, self.tokens - start)
        return np.concatenate((self.read(start, first), self.read(0, self.T + 1 - first)))

    def batch(self, rows: range, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of these rows, (B, T) int64 each. Targets come one token later, and without noise."""
        data = np.stack([self[row] for row in rows])
        inputs = data[:, :-1].copy()
        if self.noise:
            for i, row in enumerate(rows):
                random = np.random.Generator(np.random.PCG64([self.seed, row, 1]))
                hit = random.random(self.T) < self.noise
                inputs[i, hit] = random.integers(self.vocab_size, size=hit.sum())
        return to_device(torch.from_numpy(inputs), device), to_device(torch.from_numpy(data[:, 1:]), device)

    def weight(self, rows: range) -> int:
        """What these rows weigh in the loss of a step, which is a mean over tokens."""
        return len(rows)

    def size(self, rows: range) -> int:
        """Tokens that the model reads of them."""
        return len(rows) * self.T


def checked(data: bytes, count: int, file, vocab_size: int) -> np.ndarray:
    """`data` as (count,) int64 ids. UserError where the file has been cut short, or holds ids of another tokenizer."""
    ids = np.frombuffer(data, dtype="<u2").astype(np.int64)
    if len(ids) < count or (vocab_size and ids.max(initial=0) >= vocab_size):
        what = "has been cut short" if len(ids) < count else f"holds ids beyond the vocabulary of {vocab_size:,}"
        raise UserError(f"{file} {what}. Make it again with prepare.py.")
    return ids


class Conversations:
    """Training rows by their number, each packed with whole conversations. Only what is to be learnt is a target; the
    rest, and what is left of a row, is -100. Conversations in one row do not see each other.

    The mask of prepare.py has a byte for each token: 1 where it is learnt, 2 where a conversation begins.
    A conversation longer than a row is cut at its end; one with nothing to learn before the cut is left out. Which
    share a row is settled once; each epoch visits the rows in an order of its own.
    """

    def __init__(self, file, block_size: int, seed: int, vocab_size: int = 0):
        mask = np.fromfile(Path(file).with_suffix(".mask.bin"), np.uint8)
        begins = np.flatnonzero(mask == 2)
        lengths = np.diff([*begins, len(mask)])
        before = np.concatenate(([0], np.cumsum(mask == 1)))  # learnt tokens before each
        learnt = before[begins + np.minimum(lengths, block_size + 1)] - before[begins]
        self.cut, self.left_out = int((lengths > block_size + 1).sum()), int((learnt == 0).sum())
        self.begins, self.lengths, self.learnt = (x[learnt > 0] for x in (begins, lengths, learnt))
        self.lengths = np.minimum(self.lengths, block_size + 1)
        if len(self.begins) == 0:
            raise UserError(f"{file}: no conversation has an answer within --block_size={block_size} tokens.")
        self.name, self.ids, self.mask, self.vocab_size = file, open(file, "rb"), mask, vocab_size
        self.rows = pack(self.lengths - 1, block_size)  # the last token of each is a target alone
        self.row_learnt, self.row_size = (
            [int(of_each[row].sum()) for row in self.rows] for of_each in (self.learnt, self.lengths - 1)
        )
        self.T, self.seed, self.per_epoch = block_size, seed, len(self.rows)
        self.epoch, self.order = -1, None

    def place(self, row: int) -> int:
        """Which of the packed rows is row `row` of the run."""
        epoch, i = divmod(row, self.per_epoch)
        if epoch != self.epoch:
            self.order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.per_epoch)
            self.epoch = epoch
        return int(self.order[i])

    def numbers(self, row: int) -> list[int]:
        """The conversations that row `row` of the run holds."""
        return self.rows[self.place(row)]

    def read(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of conversation n."""
        begin, length = int(self.begins[n]), int(self.lengths[n])
        self.ids.seek(2 * begin)
        ids = checked(self.ids.read(2 * length), length, self.name, self.vocab_size)
        return ids, self.mask[begin : begin + length]

    def filled(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and documents of rows of these conversations, (N, T) int64 each. A document's number is its
        place in the row, from 1 on; 0 is what is left of the row."""
        shape = len(rows), self.T
        inputs, targets, documents = np.zeros(shape, np.int64), np.full(shape, -100), np.zeros(shape, np.int64)
        for row, numbers in enumerate(rows):
            end = 0
            for place, n in enumerate(numbers, 1):
                ids, mask = self.read(n)
                own, end = slice(end, end + len(ids) - 1), end + len(ids) - 1
                inputs[row, own], documents[row, own] = ids[:-1], place
                targets[row, own] = np.where(mask[1:] == 1, ids[1:], -100)
        return tuple(map(torch.from_numpy, (inputs, targets, documents)))

    def batch(self, rows: range, device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets and documents of these rows, (B, T) int64 each."""
        return tuple(to_device(t, device) for t in self.filled([self.numbers(row) for row in rows]))

    def weight(self, rows: range) -> int:
        return sum(self.row_learnt[self.place(row)] for row in rows)

    def size(self, rows: range) -> int:
        return sum(self.row_size[self.place(row)] for row in rows)

    def describe(self) -> str:
        """How many there are, what was cut, and how much of the rows is padding."""
        padding = 1 - (self.lengths - 1).sum() / (self.per_epoch * self.T)
        return (
            f"{len(self.begins):,} conversations in {self.per_epoch:,} rows, {padding:.1%} padding; {self.cut:,} "
            f"longer than {self.T} tokens, cut; {self.left_out:,} without an answer in that, left out"
        )


def pack(sizes: np.ndarray, room: int) -> list[list[int]]:
    """Numbers 0 .. len(sizes)-1 in as few rows as best fit finds: the largest first, each where it leaves least room.
    No size is beyond `room`."""
    rows = []
    of_room = [[] for _ in range(room + 1)]  # the rows that have so much room left
    there = np.arange(room + 1) == room  # whether there is one; an empty row can always be had
    for n in np.argsort(-sizes, kind="stable"):
        size = int(sizes[n])
        least = size + int(there[size:].argmax())
        if least == room:
            rows.append([])
            row = len(rows) - 1
        else:
            row = of_room[least].pop()
            there[least] = bool(of_room[least])
        rows[row].append(int(n))
        of_room[least - size].append(row)
        there[least - size] = True
    return rows


def validation_conversations(file, block_size: int, limit: int, vocab_size: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs, targets and documents (N, T) of the held-out conversations; of more than `limit` rows, that many at even
    distances."""
    held = Conversations(file, block_size, seed=0, vocab_size=vocab_size)
    n = held.per_epoch
    chosen = range(n) if n <= limit else np.linspace(0, n - 1, limit).round().astype(int)
    return held.filled([held.rows[i] for i in chosen])


def validation_rows(
    file, tokens: int, block_size: int, limit: int, vocab_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (N, T) of all of the validation split, the last row filled up with -100, which no loss counts;
    if there are more than `limit`, of that many at even distances. Always the same rows in the same order, and no
    others are read."""
    n = math.ceil((tokens - 1) / block_size)
    chosen = range(n) if n <= limit else np.linspace(0, n - 1, limit).round().astype(int)
    rows = np.full((len(chosen), block_size + 1), -100, dtype=np.int64)
    with open(file, "rb") as f:
        for row, i in zip(rows, chosen):
            f.seek(2 * int(i) * block_size)
            count = min(block_size + 1, tokens - int(i) * block_size)
            row[:count] = checked(f.read(2 * count), count, file, vocab_size)
    rows = torch.from_numpy(rows)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


def text_rows(ids: np.ndarray, block_size: int, stride: int, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (N, T) of a whole text, given as (tokens,) ids: rows of block_size tokens that begin every
    `stride` tokens. Each token but the first is a target once, in the first row that reads it. Of more than `limit`
    rows, that many at even distances; 0 is all."""
    starts = np.arange(0, max(1, len(ids) - 1 - block_size + stride), stride)
    if limit and len(starts) > limit:
        starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]
    at = starts[:, None] + np.arange(block_size + 1)
    rows = np.where(at < len(ids), ids[np.minimum(at, len(ids) - 1)], -100)
    inputs, targets = rows[:, :-1].clip(min=0), rows[:, 1:].copy()
    targets[starts > 0, : block_size - stride] = -100  # the row before has these
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on `device`; from pinned memory the copy to a GPU runs beside the computation."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
