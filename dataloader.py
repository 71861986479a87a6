"""
What prepare.py made, as rows of tokens: the rows of a training step, and the rows of the evaluation.

    rows = Rows("data/shakespeare/train.bin", tokens=299442, block_size=256, seed=1337)
    inputs, targets = rows.batch(range(0, 16), "cpu")       # (B, T) int64 each: rows 0 to 15 of the run

Row i of a run is a pure function of (seed, i). So the order of the data needs no saved state, survives a resume
exactly, and does not depend on the number of processes or on the micro-batch.

Shapes: B batch, T time (block_size), N rows.
"""

import math
from pathlib import Path

import numpy as np
import torch

import prepare
from config import UserError


def find_data(data: prepare.Settings) -> tuple[Path, dict]:
    """The folder of a prepared data set and its meta.json. UserError where it was made with another tokenizer or
    vocabulary than `data` asks for."""
    folder, meta = prepare.DATA / data.dataset, prepare.read_meta(data.dataset)
    compared = {"tokenizer": (data.tokenizer, meta["tokenizer"])}
    if data.tokenizer == "bpe":
        compared["vocab_size"] = (data.vocab_size, meta["vocab_size_asked"])
    for key, (asked, made) in compared.items():
        if asked != made:
            raise UserError(
                f"{folder} was prepared with {key}={made}, asked is {asked}. Prepare it anew with: python prepare.py "
                f"--dataset={data.dataset} --{key}={asked} (and --input), or use another --dataset."
            )
    return folder, meta


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
        self.file = open(file, "rb")  # not np.memmap: its pages would count as memory of this process
        self.tokens, self.T, self.seed, self.noise, self.vocab_size = tokens, block_size, seed, noise, vocab_size
        self.per_epoch = tokens // block_size
        self.epoch = -1

    def read(self, start: int, count: int) -> np.ndarray:
        self.file.seek(2 * start)
        return np.frombuffer(self.file.read(2 * count), dtype="<u2").astype(np.int64)

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


def validation_rows(file, tokens: int, block_size: int, limit: int) -> torch.Tensor:
    """All of the validation split as rows (N, T + 1), the last one filled up with -100, which no loss counts; if there
    are more than `limit`, that many of them at even distances. Always the same rows in the same order, and no others
    are read."""
    n = math.ceil((tokens - 1) / block_size)
    chosen = range(n) if n <= limit else np.linspace(0, n - 1, limit).round().astype(int)
    rows = np.full((len(chosen), block_size + 1), -100, dtype=np.int64)
    with open(file, "rb") as f:
        for row, i in zip(rows, chosen):
            f.seek(2 * int(i) * block_size)
            piece = np.frombuffer(f.read(2 * (block_size + 1)), dtype="<u2")
            row[: len(piece)] = piece
    return torch.from_numpy(rows)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on `device`; from pinned memory the copy to a GPU runs beside the computation."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
