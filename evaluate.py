"""
How well a model predicts a text, in bits per byte, which compares models with different tokenizers.

    python evaluate.py --model=out/chat_smollm2 --text=notes.txt
    python evaluate.py --model=out/chat_smollm2,HuggingFaceTB/SmolLM2-135M --text=notes.txt       # side by side
    python evaluate.py --model=out/tiny_shakespeare --dataset=shakespeare         # the validation part of a data set

It prints two figures. "rows" cuts the text into rows of block_size tokens and reads each alone, so that the first
tokens of a row are predicted from little: train.py and nanoGPT report this. "sliding" moves by half a row and counts
the second half, so that each token has at least half a row before it: what the model can do. Compare like with like.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from lib.device import dtype_name, pick_autocast, pick_device, prepare_process
from lib.files import file_sha256, read_errors_as_user_error
from lib.settings import Count, Natural, UserError, override, run_main

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import prepare
from checkpoint import find, load, newest_run, read_config
from dataloader import text_rows, to_device


@dataclass
class Settings:
    model: str = ""  # model directory or hub id, or two of them, separated by a comma; empty: the newest run in out/
    text: str = ""  # a text file; empty: the play of this repository, unless there is a dataset
    dataset: str = ""  # or a folder in data/, whose validation part is read
    block_size: Natural = 0  # tokens per row; 0 is the model's context, but at most 512
    eval_rows: Count = 2000  # at most this many rows, evenly spread
    batch_size: Count = 4  # rows per forward pass
    device: str = "auto"  # cuda, mps, cpu; auto takes the first that is available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products, as in train.py


@torch.no_grad()
def evaluate(model, rows, micro_batch, autocast, rank=0, world=1, stop=lambda: False) -> float | None:
    """Return the mean loss in nats per token over rows: (inputs, targets) or (inputs, targets, documents), (N, T) each.
    The processes share the rows. None if stop() is true in one of them."""
    training, _ = model.training, model.eval()
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, processes that stop
    rows = [tensor[rank::world] for tensor in rows]
    for first in range(0, len(rows[0]), micro_batch):
        if stop():
            break
        batch = [tensor[first : first + micro_batch] for tensor in rows]
        missing = micro_batch - len(batch[0])  # a compiled model wants one shape; rows of -100 do not count
        batch = [F.pad(tensor, (0, 0, 0, missing), value=-100 if i == 1 else 0) for i, tensor in enumerate(batch)]
        count = int((batch[1] != -100).sum())
        with autocast():
            _, loss = model(*(to_device(tensor, model.device) for tensor in batch), loss_only=True)
        total += torch.tensor([float(loss) * count, count, 0.0], dtype=torch.float64)
    model.train(training)
    total[2] = float(stop())  # asked once, so that all processes decide alike
    if world > 1:
        total = total.to(model.device)
        dist.all_reduce(total)
    nats, tokens, stops = total.tolist()
    return None if stops else nats / tokens


def read_ids(tokenizer, file: Path) -> tuple[np.ndarray, int]:
    """Return the ids of a text file and its size in bytes."""
    with read_errors_as_user_error(file, "Expected a file of UTF-8 text."):
        text = file.read_bytes().decode("utf-8-sig")
        ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
        if len(ids) < 2:
            raise ValueError("too short to predict anything in it")
    return ids, len(text.encode())


def validation_ids(name: str, model: Path) -> tuple[np.ndarray, int]:
    """Return the ids of a data set's validation part and its size in bytes. `model` must have the same tokenizer."""
    meta, data = prepare.read_meta(name), prepare.DATA / name
    if "val_loss_tokens" in meta:
        raise UserError(f"{data} holds conversations, of which only the answers count: train.py prints their loss.")
    if file_sha256(model / "tokenizer.json") != meta["tokenizer_sha256"]:
        raise UserError(f"{data} was made with another tokenizer than {model}'s. Use the text itself: --text=FILE")
    return np.fromfile(data / "val.bin", "<u2").astype(np.int64), meta["val_bytes"]


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    models = [find(name) for name in s.model.split(",")] if s.model else [newest_run()]
    if s.text and s.dataset or len(models) > 2:
        raise UserError("expected --text or --dataset, not both, and at most two models.")
    context = min(read_config(model).max_position_embeddings for model in models)
    T, text = s.block_size or min(512, context), Path(s.text) if s.text else prepare.PLAY
    if not 2 <= T <= context:
        raise UserError(f"--block_size={T}: expected 2 to the model's context, {context}.")
    prepare_process()
    device = pick_device(s.device)
    dtype, reason = pick_autocast(s.dtype, device)
    autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, torch.device(device).type, dtype)
    print(f"{s.dataset or text} in {dtype_name(dtype)}: {reason}")

    measures = {f"rows of {T} tokens": T, f"sliding, at least {T // 2} tokens before each": T // 2}  # and their strides
    bits = {name: [] for name in measures}
    for path in models:
        model, tokenizer = load(path, device, torch.float32)
        ids, size = validation_ids(s.dataset, path) if s.dataset else read_ids(tokenizer, text)
        print(f"  {path}: {size:,} bytes, {len(ids):,} tokens")
        for name, stride in measures.items():
            loss = evaluate(model, text_rows(ids, T, stride, s.eval_rows), s.batch_size, autocast)
            bits[name].append(loss / math.log(2) * len(ids) / size)
    for name, found in bits.items():
        columns = "  ".join(f"{value:.4f}" for value in found)
        difference = f" ({found[1] - found[0]:+.4f}, {found[1] / found[0] - 1:+.1%})" if len(found) > 1 else ""
        print(f"  {name:40} {columns} bits per byte{difference}")


if __name__ == "__main__":
    run_main(main)
