"""
What a text costs a model, in bits per byte: how well it predicts the next token, whatever its tokenizer.

    python evaluate.py --model=out/tiny_shakespeare --dataset=shakespeare_1k      # the validation part of a data set
    python evaluate.py --model=out/chat_smollm2 --text=notes.txt
    python evaluate.py --model=out/chat_smollm2 --block_size=512                  # the play of this repository

It prints two figures. "rows" cuts the text into rows of block_size tokens and reads each alone, so the first tokens of
a row are guessed from little: what train.py measures, and nanoGPT reports. "sliding" moves by half a row and counts its
second half, so that, from the first half row of the text on, each token has at least half a row before it: what the
model can do. Compare like with like.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from lib.device import pick_autocast, pick_device, prepare_process
from lib.files import file_sha256
from lib.settings import Count, NonNegativeInt, UserError, override, run_main

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import prepare
from checkpoint import find, load, newest_run
from dataloader import text_rows, to_device


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    text: str = ""  # a text file; empty: the play of this repository, unless a dataset is named
    dataset: str = ""  # or a folder under data/, whose validation part is read
    block_size: NonNegativeInt = 0  # tokens per row; 0 is the model's context, 512 at most
    eval_rows: Count = 2000  # at most this many rows, spread evenly; all of them if there are fewer
    batch_size: Count = 4  # rows at a time
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the products, as in train.py


@torch.no_grad()
def evaluate(model, rows, batch_size, autocast, rank=0, world=1, stopping=lambda: False) -> float | None:
    """Mean loss in nats per token over rows, (inputs, targets) or (inputs, targets, documents) of (N, T) each: the same
    number however the rows are shared out; None if stopped."""
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, processes that were asked to stop
    rows = [tensor[rank::world] for tensor in rows]
    for a in range(0, len(rows[0]), batch_size):
        if stopping():
            break
        batch = [tensor[a : a + batch_size] for tensor in rows]
        missing = batch_size - len(batch[0])
        if missing:  # one shape for all batches, so that a compiled model does not compile again; -100 is not counted
            batch = [F.pad(tensor, (0, 0, 0, missing), value=-100 if i == 1 else 0) for i, tensor in enumerate(batch)]
        count = int((batch[1] != -100).sum())
        with autocast():
            _, loss = model(*(to_device(tensor, model.device) for tensor in batch), loss_only=True)
        total += torch.tensor([float(loss) * count, count, 0.0], dtype=torch.float64)
    total[2] = float(stopping())  # asked once: a signal after this must not make one process decide otherwise
    if world > 1:
        total = total.to(model.device)
        dist.all_reduce(total)
    nats, tokens, stops = total.tolist()
    return None if stops else nats / tokens


def read_ids(tokenizer, file: Path) -> tuple[np.ndarray, int]:
    """The (N,) int64 ids of a text file and its size in bytes. UserError where it is no text, or too short."""
    text = "".join(prepare.read_text(file, None))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    if len(ids) < 2:
        raise UserError(f"{file}: too short to predict anything in it.")
    return ids, len(text.encode())


def validation_ids(name: str, folder: Path) -> tuple[np.ndarray, int]:
    """The same of a data set's validation part. UserError where the model in `folder` has another tokenizer."""
    meta, data = prepare.read_meta(name), prepare.DATA / name
    if "val_loss_tokens" in meta:
        raise UserError(f"{data} holds conversations, of which only the answers count: train.py prints their loss.")
    if file_sha256(folder / "tokenizer.json") != meta["tokenizer_sha256"]:
        raise UserError(f"{data} was made with another tokenizer than {folder} has. Give the text itself: --text=FILE")
    return np.fromfile(data / "val.bin", "<u2").astype(np.int64), meta["val_bytes"]


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    if s.text and s.dataset:
        raise UserError("--text and --dataset: give one of them.")
    prepare_process()
    path, device = s.model or newest_run(), pick_device(s.device)
    model, tokenizer = load(path, device, torch.float32)
    file = Path(s.text) if s.text else prepare.PLAY
    ids, size = validation_ids(s.dataset, find(path)) if s.dataset else read_ids(tokenizer, file)
    context = model.config.max_position_embeddings
    T = s.block_size or min(512, context)
    if not 2 <= T <= context:
        raise UserError(f"--block_size={T}: expected 2 to the model's context, {context}.")
    dtype, reason = pick_autocast(s.dtype, device)
    autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, torch.device(device).type, dtype)
    print(f"{path} on {s.dataset or file}: {size:,} bytes, {len(ids):,} tokens; {str(dtype)[6:]}: {reason}")
    for name, stride in (f"rows of {T} tokens", T), (f"sliding, at least {T // 2} tokens before each", T // 2):
        loss = evaluate(model, text_rows(ids, T, stride, s.eval_rows), s.batch_size, autocast)
        print(f"  {name:40} {loss / math.log(2) * len(ids) / size:.4f} bits per byte")


if __name__ == "__main__":
    run_main(main)
