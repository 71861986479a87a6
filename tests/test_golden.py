"""
Forty steps of a tiny fp32 run, recorded: losses, learning rates and gradient norms stay the same.

The run has an evaluation every ten steps, ragged micro-batches, noise on the inputs, and a stop by a real signal after
step 17. tests/golden/log.json is the record. `python tests/tools/golden.py` compares to the last bit, which works only
on one kind of processor.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import prepare
import train

GOLDEN = json.loads((ROOT / "tests/golden/log.json").read_text(encoding="utf-8"))
STOP = 17  # the signal arrives during this step
DATA = dict(input=str(prepare.PLAY), dataset="golden", tokenizer="tokenizer")
FLAGS = [f"--{key}={value}" for key, value in DATA.items()] + (
    "--out_dir=out/golden --hidden_size=16 --intermediate_size=24 --num_hidden_layers=2 --num_attention_heads=4 "
    "--num_key_value_heads=2 --block_size=16 --global_batch_size=6 --micro_batch_size=4 --max_iters=40 --eval_rows=20 "
    "--eval_interval=10 --log_interval=1 --sample_interval=20 --warmup_iters=4 --learning_rate=1e-2 --min_lr=1e-3 "
    "--token_noise=0.1 --device=cpu --dtype=float32 --compile=off"
).split()
KEYS = "loss lr grad_norm val_loss val_bpb train_loss".split()


def write_tokenizer():
    """Write the recorded tokenizer to the working directory."""
    Path("tokenizer").mkdir(exist_ok=True)
    prepare.train_bpe([prepare.PLAY.read_text(encoding="utf-8")], 300).save("tokenizer/tokenizer.json")


def go(patch, *flags, stop: int = 0):
    """Train to the end, or to the SIGINT that this process sends itself during step `stop`. Return the log's numbers:
    {"loss": {"1": 5.7, ...}, ...}, and the text of the samples."""
    write_tokenizer()
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def signalling(*arguments, **keywords):  # called once per step
        steps.append(clip(*arguments, **keywords))
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return steps[-1]

    patch.setattr(torch.nn.utils, "clip_grad_norm_", signalling)
    patch.setattr(sys, "argv", ["train.py", *FLAGS, *flags])
    try:
        train.main()
    except SystemExit as stopped:
        assert stopped.code == 128 + signal.SIGINT
    rows = [json.loads(line) for line in Path("out/golden/log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: {str(r["step"]): r[key] for r in rows if key in r} for key in (*KEYS, "sample")}


def stopped_and_resumed():
    with pytest.MonkeyPatch.context() as patch:
        assert max(map(int, go(patch, stop=STOP)["loss"])) == STOP
    with pytest.MonkeyPatch.context() as patch:
        return go(patch)


def furthest(ours: dict) -> float:
    """Return the largest relative difference from the record; infinite if a number is missing on either side."""
    worst = 0.0
    for key in KEYS:
        if ours[key].keys() != GOLDEN[key].keys():
            return math.inf
        worst = max([worst, *(abs(ours[key][s] / v - 1) for s, v in GOLDEN[key].items() if v is not None)])
    return worst


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_golden_run(here):
    """A change to the model, optimizer, data order, schedule or loop that changes a number shows here."""
    ours = stopped_and_resumed()
    assert furthest(ours) < 1e-5
    assert ours["sample"].keys() == GOLDEN["sample"].keys()


@pytest.mark.parametrize(
    "flag",
    ["--seed=1", "--weight_decay=0.2"]
    + [pytest.param(flag, marks=pytest.mark.slow) for flag in ("--token_noise=0", "--beta2=0.99", "--grad_clip=0.5")],
)
def test_the_comparison_can_fail(here, monkeypatch, flag):
    """Negative control: another seed, no noise, or other settings of the optimizer give another run."""
    assert furthest(go(monkeypatch, flag)) > 1e-4


def test_the_data_are_the_recorded_ones(here):
    """The files and their ids are the same. If only this test fails, look at prepare.py, not at train.py."""
    write_tokenizer()
    meta = prepare.prepare(prepare.Settings(**DATA))
    assert {key: meta[key] for key in GOLDEN["data"]} == GOLDEN["data"]
