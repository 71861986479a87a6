"""Forty steps of a tiny fp32 run, recorded: losses, learning rates and gradient norms stay the same. They differ by
2e-06 from what commit 3606efd recorded first: the loss's gradient is divided by the count later now, and attention is
PyTorch's kernel. The run has an evaluation every ten steps, ragged micro-batches, noise on the inputs, and a stop by a
real signal after step 17.

tests/golden/log.json is the record; tests/golden/run is the folder of that run as the signal left it, so it is an old
state.pt too. `python tests/tools/golden.py` compares to the last bit, which holds on one kind of processor.
"""

import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import prepare
import train

GOLDEN = ROOT / "tests" / "golden"
STOP = 17  # the signal arrives during the step that takes the count from 16 to 17
FLAGS = (
    f"--input={ROOT / 'data/shakespeare/play.txt'} --tokenizer={GOLDEN / 'run'} --dataset=golden --out_dir=out/golden "
    "--hidden_size=16 --intermediate_size=24 --num_hidden_layers=2 --num_attention_heads=4 --num_key_value_heads=2 "
    "--block_size=16 --global_batch_size=6 --micro_batch_size=4 --max_iters=40 --eval_interval=10 --eval_rows=20 "
    "--log_interval=1 --sample_interval=20 --warmup_iters=4 --learning_rate=1e-2 --min_lr=1e-3 --token_noise=0.1 "
    "--device=cpu --dtype=float32 --compile=off"
).split()
KEYS = "loss lr grad_norm val_loss val_bpb train_loss"


def go(monkeypatch, *flags):
    """A run to its end, or to the SIGINT that stops it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *FLAGS, *flags])
    try:
        train.main()
    except SystemExit as stopped:
        assert stopped.code == 128 + signal.SIGINT


def stop_after(monkeypatch, step: int):
    """Send this process a real SIGINT during the step that takes the count to `step`."""
    real = train.learning_rate_at

    def signalling(at, *rest):
        if at == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(at, *rest)

    monkeypatch.setattr(train, "learning_rate_at", signalling)


def numbers(run) -> dict:
    """{"loss": {"1": 5.7, ...}, ...} from the log of a run, and the samples' text."""
    rows = [json.loads(line) for line in Path(run, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {key: {str(r["step"]): r[key] for r in rows if key in r} for key in (*KEYS.split(), "sample")}


def furthest(ours: dict, golden: dict) -> float:
    """The largest relative difference of any number; infinite where one is missing on either side."""
    worst = 0.0
    for key in KEYS.split():
        if ours[key].keys() != golden[key].keys():
            return math.inf
        worst = max([worst, *(abs(ours[key][s] / v - 1) for s, v in golden[key].items() if v is not None)])
    return worst


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum depends on how many share it
    yield tmp_path
    torch.set_num_threads(threads)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)


def golden() -> dict:
    return json.loads((GOLDEN / "log.json").read_text(encoding="utf-8"))


def test_the_golden_run(here, monkeypatch):
    """A change of the model, the optimizer, the data order, the schedule or the loop that moves a number shows here."""
    with monkeypatch.context() as patch:
        stop_after(patch, STOP)
        go(patch)
    assert torch.load("out/golden/state.pt", weights_only=True)["progress"]["step"] == STOP
    go(monkeypatch)
    ours = numbers("out/golden")
    assert furthest(ours, golden()) < 1e-5
    assert ours["sample"].keys() == golden()["sample"].keys()


def test_an_old_run_goes_on_where_3606efd_stopped_it(here, monkeypatch):
    """state.pt, model.safetensors and log.jsonl as that commit wrote them: read, resumed, and ended alike."""
    shutil.copytree(GOLDEN / "run", "out/golden")
    go(monkeypatch)
    assert furthest(numbers("out/golden"), golden()) < 1e-5


@pytest.mark.parametrize(
    "flag", ["--seed=1", "--token_noise=0", "--weight_decay=0.2", "--beta2=0.99", "--grad_clip=0.5"]
)
def test_the_comparison_can_fail(here, monkeypatch, flag):
    """Negative control: another seed, no noise, or other settings of the optimizer are another run."""
    go(monkeypatch, flag)
    assert furthest(numbers("out/golden"), golden()) > 1e-4


def test_the_data_are_the_recorded_ones(here):
    """The same ids in the same files; if this fails alone, look at prepare.py, not at train.py."""
    meta = prepare.prepare(prepare.Settings(input=str(ROOT / "data/shakespeare/play.txt"), dataset="golden",
                                            tokenizer=str(GOLDEN / "run")))  # fmt: skip
    assert {k: meta[k] for k in golden()["data"]} == golden()["data"]
