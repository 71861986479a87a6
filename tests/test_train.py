"""train.py's promises, each with what would break it: stops, kills, full disks, other splits, bad numbers, damage.

The long version of the same, with fifty kills, is tests/tools/stress.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

from lib.files import Busy, file_sha256
from lib.settings import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, run_script, save_hf_directory, tiny_hf

import checkpoint
import dataloader
import evaluate
import gradients
import model as smol
import prepare
import resume
import sample
import train

SMALL = (
    "--input=t.txt --dataset=t --vocab_size=300 --out_dir=out/t --hidden_size=32 --intermediate_size=48 "
    "--num_hidden_layers=2 --num_attention_heads=4 --num_key_value_heads=2 --block_size=32 --global_batch_size=8 "
    "--micro_batch_size=8 --max_iters=12 --eval_interval=4 --eval_rows=20 --log_interval=1 --warmup_iters=2 "
    "--learning_rate=1e-2 --dtype=float32 --compile=off"
).split()
OF_TINY_HF = "--hidden_size=48", "--intermediate_size=80", "--num_attention_heads=6"  # the shape of that model


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a text in it; the data are made by the first run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT[:8000])
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    yield tmp_path
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)


def go(monkeypatch, *flags):
    """A run in this process, as the command line would start it; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *flags])
    try:
        train.main()
    except SystemExit as stopped:
        if stopped.code < 128:  # not a signal: a flag that is refused, or a mistake
            raise
        return stopped.code
    return 0


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a real signal while it takes `step`."""
    real = train.learning_rate_at

    def signalling(at, *rest):
        if at == step:
            os.kill(os.getpid(), number)
        return real(at, *rest)

    monkeypatch.setattr(train, "learning_rate_at", signalling)


def state(run="out/t"):
    return torch.load(f"{run}/state.pt", weights_only=True)


def log(run="out/t", key="loss"):
    rows = [json.loads(line) for line in open(f"{run}/log.jsonl", encoding="utf-8")]
    return {row["step"]: row[key] for row in rows if key in row}


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ----------------------------------------------------------------------------------------------------------------------
# the evaluation


def test_evaluation_is_the_mean_over_tokens_however_it_is_batched(here):
    """A mean of means would weigh the short last row like a full one."""
    model = train.SmolLM2(train.SmolLM2Config(120, 32, 48, 1, 4, 2, 8, 16)).eval()
    np.random.default_rng(0).integers(0, 120, 93).astype("<u2").tofile("x.bin")
    rows = dataloader.validation_rows("x.bin", 93, 16, 99)
    losses = []
    for inputs, targets in zip(*rows):
        n = int((targets != -100).sum())
        logits = model(inputs[None, :n])[0][0]
        losses += torch.nn.functional.cross_entropy(logits, targets[:n], reduction="none").tolist()
    for batch in (1, 4, 5, 64):
        assert abs(train.evaluate(model, rows, batch, contextlib.nullcontext) - np.mean(losses)) < 1e-5
    parts = [train.evaluate(model, [x[r::2] for x in rows], 4, contextlib.nullcontext) for r in (0, 1)]
    assert abs(np.mean(parts) - np.mean(losses)) > 1e-5, "negative control: the mean of two means is another number"


# ----------------------------------------------------------------------------------------------------------------------
# schedule and compile


def test_learning_rate_schedules():
    """Never 0 at the first step; the peak after warmup; min_lr at the end and ever after."""
    s = train.Settings(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=100)
    for schedule in ("cosine", "wsd", "constant"):
        s.lr_schedule = schedule
        rates = [train.learning_rate_at(i, s, 100) for i in range(120)]
        assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
        if schedule != "constant":
            assert rates[100] == rates[119] == 0.1 and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    s.lr_schedule, s.warmup_iters = "wsd", 200  # an end within the warmup is an end
    assert [train.learning_rate_at(i, s, 100) for i in (99, 100, 199)] == [0.5, 0.1, 0.1]
    s.warmup_iters = 10
    assert train.learning_rate_at(80, s, 100) == 1.0 and abs(train.learning_rate_at(90, s, 100) - 0.55) < 1e-9


def test_compiling_that_fails_is_said_and_gone_without(here, monkeypatch, capsys):
    """The first forward and backward is where it fails, so that is what is guarded: auto goes on, on says why not."""

    def broken(self, *_, **__):
        def call(*_, **__):
            raise RuntimeError("no working C++ compiler")

        self._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    monkeypatch.setattr(train, "pick_compile", lambda choice, *_: (True, "for the test"))
    go(monkeypatch, "--compile=auto", "--max_iters=4")
    out = capsys.readouterr().out
    assert "compiling failed" in out and "done: 4 steps" in out
    with pytest.raises(UserError, match="--compile=off"):
        go(monkeypatch, "--compile=on", "--out_dir=out/u")


def test_fine_tuning_survives_a_compiler_that_fails(here, monkeypatch, capsys):
    """It evaluates before step 1, so compiling is tried before that."""
    save_hf_directory(here / "base")

    def broken(self, *_, **__):
        self._compiled_call_impl = lambda *_, **__: 1 / 0

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    monkeypatch.setattr(train, "pick_compile", lambda choice, *_: (True, "for the test"))
    flags = ("--init_from=base", "--tokenizer=base", *OF_TINY_HF, "--dataset=own", "--max_iters=4")
    go(monkeypatch, *flags, "--compile=auto")
    out = capsys.readouterr().out
    assert out.index("compiling failed") < out.index("eval      0") and "done: 4 steps" in out


@pytest.mark.slow
def test_the_rehearsal_leaves_no_trace(here, monkeypatch):
    """It computes gradients of each size of micro-batch, and discards them: the weights and the first step's gradient
    are those of a run without it. Negative control: gradients that are kept are another first step."""
    go(monkeypatch, "--micro_batch_size=3", "--max_iters=2")
    with monkeypatch.context() as patch:
        patch.setattr(train, "rehearse", lambda run: None)
        go(patch, "--micro_batch_size=3", "--max_iters=2", "--out_dir=out/without")
    assert log(key="grad_norm") == log("out/without", "grad_norm") and same(
        state()["model"], state("out/without")["model"]
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "zero_grad", lambda *_, **__: None)
        go(patch, "--micro_batch_size=3", "--max_iters=2", "--out_dir=out/kept")
    assert log("out/kept", "grad_norm")[1] > 1.5 * log(key="grad_norm")[1]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_and_eager_train_alike_and_write_the_same_names(here, monkeypatch, dropout):
    """Blocks compiled in place: no _orig_mod prefix anywhere, and the same losses within rounding, and the same numbers
    dropped. A compiled run that stops and goes on is the same run to the last bit."""
    go(monkeypatch, "--max_iters=4", f"--dropout={dropout}")
    go(monkeypatch, "--max_iters=4", f"--dropout={dropout}", "--compile=on", "--out_dir=out/c")
    assert state("out/c")["model"].keys() == state()["model"].keys()
    assert [state(run)["progress"]["compile"] for run in ("out/t", "out/c")] == [False, True]
    for step, loss in log().items():
        assert abs(log("out/c")[step] - loss) < 1e-3
    checkpoint.load("out/c")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        go(patch, "--max_iters=4", f"--dropout={dropout}", "--compile=on", "--out_dir=out/stops")
    assert state("out/stops")["progress"]["step"] == 2
    go(monkeypatch, "--max_iters=4", f"--dropout={dropout}", "--compile=on", "--out_dir=out/stops")
    assert log("out/c") == log("out/stops") and same(state("out/c")["model"], state("out/stops")["model"])


def test_what_is_forgotten_is_printed_at_the_end(here, monkeypatch, capsys):
    """Texts beside the one that is learnt, before step 1 and, of the model that is kept, at the end; the first figure
    survives a stop. What cannot be read is refused before anything is trained."""
    save_hf_directory(here / "m")
    Path("a.txt").write_text(TEXT[:4000])
    tuned = ("--init_from=m", "--tokenizer=m", *OF_TINY_HF, "--dataset=own", "--also_eval=a.txt, t.txt")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        go(patch, *tuned)
    before = state()["progress"]["other_texts"]
    capsys.readouterr()
    go(monkeypatch, *tuned, "--learning_rate=1e-2")
    shown = dict(re.findall(r"also +(\S+): (.*)", capsys.readouterr().out))
    assert set(shown) == set(before) == {"a.txt", "t.txt"}
    for file, line in shown.items():
        now = float(line.split()[0])
        assert line == f"{now:.4f} bits per byte, {before[file]:.4f} before ({now / before[file] - 1:+.1%})"
        model, tokenizer = checkpoint.load("out/t")
        ids, size = evaluate.read_ids(tokenizer, Path(file))
        rows = dataloader.text_rows(ids, 32, 32, 20)
        loss = train.evaluate(model, rows, 8, contextlib.nullcontext)
        assert abs(loss / math.log(2) * len(ids) / size - now) < 1e-4
    go(monkeypatch, *tuned, "--max_iters=16", "--eval_rows=9", "--accept_changes=eval_rows")  # of other rows
    assert "before" not in capsys.readouterr().out.rpartition("also ")[2]
    for wrong in ("gone.txt", "a.txt,gone.txt"):
        with pytest.raises(UserError, match="gone.txt: No such file"):
            go(monkeypatch, f"--also_eval={wrong}", "--out_dir=out/new")
    assert not os.path.exists("out/new/model.safetensors")


def test_stopped_in_the_first_evaluation_it_is_made_up_for(here, monkeypatch, capsys):
    """What a model is before fine-tuning can only be measured then: the resume does it."""
    save_hf_directory(here / "m")
    tuned = ("--init_from=m", "--tokenizer=m", *OF_TINY_HF, "--dataset=own", "--also_eval=t.txt")
    with monkeypatch.context() as patch:
        real = train.evaluate

        def stopped(*arguments):
            patch.setattr(train, "evaluate", real)  # the second signal would quit at once
            os.kill(os.getpid(), signal.SIGINT)
            return real(*arguments)

        patch.setattr(train, "evaluate", stopped)
        go(patch, *tuned)
    assert state()["progress"]["step"] == 0 and not state()["progress"]["other_texts"]
    go(monkeypatch, *tuned)
    assert " before" in capsys.readouterr().out and 0 in log(key="val_loss")


# ----------------------------------------------------------------------------------------------------------------------
# resuming


def test_a_measured_dtype_is_measured_once(here, monkeypatch):
    """On a CPU --dtype=auto goes by speed, which a busy moment can turn: a run goes on with what it began with, unless
    another is accepted."""
    found = {"now": torch.bfloat16}
    monkeypatch.setattr(train, "pick_autocast", lambda name, device: (found["now"], "measured"))
    go(monkeypatch, "--dtype=auto", "--max_iters=4")
    found["now"] = torch.float32
    go(monkeypatch, "--dtype=auto", "--max_iters=6")
    assert state()["progress"]["cpu_dtype"] == "bfloat16"
    go(monkeypatch, "--dtype=auto", "--max_iters=8", "--accept_changes=dtype")
    assert state()["progress"]["cpu_dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("dtype, optimizer", [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_stopped_and_resumed_is_the_same_run_to_the_last_bit(here, monkeypatch, dtype, optimizer, capsys):
    """Weights, optimizer, losses, learning rates: with three stops, at steps that are no evaluation, as with none."""
    flags = [f"--dtype={dtype}", f"--optimizer={optimizer}", "--micro_batch_size=4"]
    flags += ["--dropout=0.2"] if (dtype, optimizer) != ("float32", "adamw") else []
    go(monkeypatch, *flags)
    for step, number in ((2, signal.SIGINT), (7, signal.SIGTERM), (9, signal.SIGINT)):
        with monkeypatch.context() as patch:
            stop_at(patch, step, number)
            go(patch, *flags, "--out_dir=out/stops")
        assert state("out/stops")["progress"]["step"] == step + 1
        assert "stopped at step" in capsys.readouterr().out
    go(monkeypatch, *flags, "--out_dir=out/stops")
    a, b = state(), state("out/stops")
    for key in ("config", "model", "optimizer", "scaler", "facts"):
        assert same(a[key], b[key]), key
    for key in ("loss", "lr", "grad_norm", "val_loss"):
        assert log(key=key) == log("out/stops", key)
    assert len(checkpoint.metadata("out/t")["crc32"]) == 8
    for name in os.listdir("out/t"):  # the model's files are equal byte by byte
        if name not in ("state.pt", "log.jsonl", ".lock"):
            assert file_sha256(f"out/t/{name}") == file_sha256(f"out/stops/{name}"), name


@pytest.mark.slow
def test_the_comparison_above_can_fail(here, monkeypatch):
    """Negative control: a resume that forgets the optimizer's moments is another run."""
    go(monkeypatch)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        go(patch, "--out_dir=out/stops")
    lost = state("out/stops")
    for entry in lost["optimizer"]["state"].values():
        entry["exp_avg"].zero_()
    torch.save(lost, "out/stops/state.pt")
    go(monkeypatch, "--out_dir=out/stops")
    assert not same(state()["model"], state("out/stops")["model"])


@pytest.mark.slow
def test_evaluating_and_sampling_leave_training_alone(here, monkeypatch):
    go(monkeypatch, "--eval_interval=12")
    go(monkeypatch, "--eval_interval=1", "--sample_interval=1", "--out_dir=out/often")
    assert log() == log("out/often") and same(state()["model"], state("out/often")["model"])
    assert len(log("out/often", "sample")) == 12


@pytest.mark.slow
def test_dropout_acts_in_training_alone(here, monkeypatch):
    """Each micro-batch drops its own numbers; evaluation and what is saved drop nothing."""
    shares, real = [], torch.nn.functional.dropout

    def noting(x, p, training):
        y = real(x, p, training)
        shares.append((training, float((y == 0).float().mean())))
        return y

    with monkeypatch.context() as patch:
        patch.setattr(smol.F, "dropout", noting)
        go(patch, "--dropout=0.25", "--max_iters=2", "--micro_batch_size=4")
    dropped = [share for training, share in shares if training]
    assert all(0.15 < share < 0.35 for share in dropped)
    # two micro-batches of two steps, each with two layers of two halves; the rehearsal repeats the first step's
    assert len(set(dropped)) >= 2 * 2 * 2 * 2
    assert {share for training, share in shares if not training} == {0.0}
    model, _ = checkpoint.load("out/t")
    assert model.train().layers[0].dropout == 0.0
    go(monkeypatch, "--max_iters=2", "--micro_batch_size=4", "--out_dir=out/none")  # negative control
    assert log("out/none")[2] != log()[2]


@pytest.mark.slow
def test_a_finished_run_says_so_and_more_steps_can_be_added(here, monkeypatch, capsys):
    """As the seed did, N steps and then some more; the schedule keeps the end it was given."""
    go(monkeypatch)
    capsys.readouterr()
    before = state()
    go(monkeypatch)
    assert "finished at step 12" in capsys.readouterr().out and same(before["model"], state()["model"])
    go(monkeypatch, "--max_iters=15")
    rates = log(key="lr")
    assert state()["progress"]["step"] == 15 and rates[13] == rates[15] == train.Settings.min_lr
    assert sorted(log()) == list(range(1, 16))


@pytest.mark.slow
def test_a_short_text_ends_the_run_early(here, monkeypatch, capsys):
    """A recipe made for a megabyte would read a page hundreds of times, and evaluate when it is known by heart. The
    whole schedule is shortened, warmup too, evaluations come often enough, and the command printed for more steps, or
    to go on beyond the limit, does so."""
    recipe = "--max_iters=1000 --max_epochs=1 --eval_interval=500 --warmup_iters=50 --sample_interval=400".split()
    go(monkeypatch, *recipe)
    out, rates = capsys.readouterr().out, log(key="lr")
    steps = math.ceil(prepare.read_meta("t")["train_tokens"] // 32 / 8)
    assert 8 < steps < 30 and state()["progress"]["step"] == steps and "max_epochs=1, instead of 1,000" in out
    assert max(rates, key=rates.get) <= steps // 4 + 1 and rates[steps] < rates[steps // 2] / 2
    assert len(log(key="val_loss")) >= 4 <= len(log(key="sample"))
    done = torchrun(*recipe, "--out_dir=out/two")  # two processes end at the same step, with the same losses
    assert done.returncode == 0 and f"in {steps} steps: max_epochs=1" in done.stdout, done.stderr[-2000:]
    two = log("out/two")
    assert two.keys() == log().keys() and all(abs(two[i] - loss) < 2e-5 for i, loss in log().items())
    go(monkeypatch, *recipe)
    said = re.search(r"More steps: python train.py (.*)", capsys.readouterr().out)[1]
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(said)])
    train.main()
    assert state()["progress"]["step"] == 2 * steps and len(log(key="val_loss")) >= 8


@pytest.mark.slow
def test_a_limit_in_epochs_may_change_in_the_middle(here, monkeypatch, capsys):
    """The warmup that the first limit shortened stays as it was begun: a number that nobody gave is no reason to
    refuse. What is said of the way to the schedule's end leads there."""
    recipe = ["--max_iters=1000", "--warmup_iters=100", "--eval_interval=500", "--max_epochs=2"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch, *recipe)
    warmup, end = state()["progress"]["warmup_iters"], state()["progress"]["lr_decay_iters"]
    assert warmup == end // 4 < 100
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        go(patch, *recipe, "--max_epochs=1")
    said = re.search(r"To go on to there: python train.py (.*)", capsys.readouterr().out)[1]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        go(patch, *recipe, "--max_epochs=3")
    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(said)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        stop_at(patch, 9)
        train.main()
    train.main()  # also where that command was stopped
    with pytest.raises(UserError, match="warmup_iters was 100, is 90"):  # negative control: what was given and changed
        go(monkeypatch, *recipe, "--warmup_iters=90")
    assert state()["progress"]["step"] == end and state()["settings"]["warmup_iters"] == 100
    go(monkeypatch, *recipe, "--out_dir=out/whole")
    assert log(key="lr") == log("out/whole", "lr") and log() == log("out/whole")


@pytest.mark.slow
def test_a_state_that_kept_the_shortened_warmup_goes_on(here, monkeypatch):
    """As versions of before 26 November 2026 wrote it: twice, since the first resume writes it anew."""
    recipe = ["--max_iters=1000", "--warmup_iters=100", "--eval_interval=500", "--max_epochs=1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch, *recipe)
    old = state()
    old["settings"]["warmup_iters"] = old["progress"].pop("warmup_iters")
    torch.save(old, "out/t/state.pt")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        go(patch, *recipe)
    go(monkeypatch, *recipe)
    go(monkeypatch, *recipe, "--out_dir=out/whole")
    assert log(key="lr") == log("out/whole", "lr") and log() == log("out/whole")


def test_more_steps_do_not_cut_the_schedule(here, monkeypatch, capsys):
    """A run that ends before its schedule is offered the rest of it. Stretched beyond its end the rate rises: said."""
    asked = ("--max_iters=4", "--lr_decay_iters=20")
    for _ in range(2):
        go(monkeypatch, *asked)
    said = re.search(r"More steps: (.*)", capsys.readouterr().out)[1]
    assert "--max_iters=8" in said and "accept_changes" not in said
    go(monkeypatch, *asked, "--max_iters=16", "--lr_decay_iters=40", "--accept_changes=lr_decay_iters")
    before, after = re.search(r"the learning rate goes from (\S+) to (\S+)", capsys.readouterr().out).groups()
    assert 9e-3 < float(before) < float(after) <= 1e-2


def test_an_evaluation_at_the_end_alone_stays_one(here, monkeypatch):
    """A recipe that keeps the last model, though an earlier one has a lower loss, must not get others on the way."""
    ends = ["--max_iters=1000", "--eval_interval=1000", "--sample_interval=2000"]
    go(monkeypatch, *ends, "--max_epochs=0.5", "--log_interval=2000", "--warmup_iters=1")
    (last,) = log(key="val_loss")
    assert last == state()["progress"]["step"] > 1 and list(log(key="sample")) == [last] == list(log(key="lr"))


@pytest.mark.slow
def test_a_limit_in_epochs_of_a_run_that_began_without_is_said(here, monkeypatch, capsys):
    """It would end at a high rate, without a word, or be refused with a number that nobody gave."""
    long = ["--max_iters=100", "--eval_interval=50"]
    for step, out_dir in ((3, "out/t"), (40, "out/beyond")):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            go(patch, *long, f"--out_dir={out_dir}")
    go(monkeypatch, *long, "--max_epochs=1")
    assert "before its schedule ends at 100. To go on to there:" in capsys.readouterr().out
    with pytest.raises(UserError, match="at step 41 already; max_epochs=1 .--max_epochs=0 lifts it. ends it at"):
        go(monkeypatch, *long, "--max_epochs=1", "--out_dir=out/beyond")


@pytest.mark.parametrize("most", ["1e308", "0.0001"])
def test_limits_in_epochs_without_meaning_do_no_harm(here, monkeypatch, most):
    go(monkeypatch, "--max_iters=2", f"--max_epochs={most}")
    assert state()["progress"]["step"] == (2 if most == "1e308" else 1)


@pytest.mark.slow
def test_a_model_too_large_for_its_text_is_warned_of(here, monkeypatch, capsys):
    """And one that is not, is not."""
    go(monkeypatch, "--max_iters=0", "--hidden_size=256", "--intermediate_size=512")
    assert "by heart" not in capsys.readouterr().out  # no step, nothing learnt
    go(monkeypatch, "--max_iters=50", "--hidden_size=256", "--intermediate_size=512", "--init_from=scratch")
    said = capsys.readouterr().out
    assert "parameters for each token of the text" in said and "a text this short" not in said
    go(monkeypatch, "--max_iters=50", "--out_dir=out/small")
    assert "by heart" not in capsys.readouterr().out
    wide = "--hidden_size=128", "--intermediate_size=192"  # 150 thousand parameters for a few thousand tokens
    go(monkeypatch, "--max_iters=5", *wide, "--out_dir=out/few")  # less than once through the text
    assert "by heart" not in capsys.readouterr().out
    go(monkeypatch, "--max_iters=200", "--max_epochs=4.5", *wide, "--out_dir=out/often")
    assert "!! a text this short is soon known by heart" in capsys.readouterr().out


def test_a_limit_that_limits_nothing_changes_nothing():
    """Also where it is above the steps asked for by less than one: schedule and intervals stay as they are."""
    for most in (0, 99.5, 100, 1e9):
        s = train.Settings(max_iters=100, warmup_iters=50, eval_interval=50)
        train.shorten(s, most)
        assert s == train.Settings(max_iters=100, warmup_iters=50, eval_interval=50)
    train.shorten(s, 98.5)
    assert (s.max_iters, s.warmup_iters, s.eval_interval) == (99, 24, 24)


@pytest.mark.slow
def test_settings_that_would_change_the_run_are_refused_by_name(here, monkeypatch):
    """All of them at once; leave can be given by name; what is free to change is free."""
    go(monkeypatch, "--max_iters=4")
    with pytest.raises(UserError) as refused:
        go(monkeypatch, "--learning_rate=5e-3", "--seed=1")
    assert str(refused.value).endswith("--accept_changes=learning_rate,seed")
    old = state()
    del old["settings"]["optimizer"]  # as before there was a choice
    torch.save(old, "out/t/state.pt")
    with pytest.raises(UserError) as refused:
        go(monkeypatch, "--learning_rate=5e-3", "--hidden_size=64", "--optimizer=muon")
    text = str(refused.value)
    assert "learning_rate was 0.01, is 0.005" in text and "hidden_size" in text and "optimizer was 'adamw'" in text
    assert "--accept_changes" not in text, "another shape or optimizer is no change to accept"
    go(monkeypatch, "--max_iters=6", "--learning_rate=5e-3", "--accept_changes=learning_rate")
    go(monkeypatch, "--max_iters=8", "--micro_batch_size=2", "--eval_interval=2", "--learning_rate=5e-3")
    assert state()["progress"]["step"] == 8


def test_other_data_under_a_run_are_refused(here, monkeypatch):
    go(monkeypatch, "--max_iters=4")
    (here / "t.txt").write_text(TEXT[500:9000])
    prepare.prepare(prepare.Settings(input="t.txt", dataset="t", vocab_size=300))
    with pytest.raises(UserError, match="the source sha256 was"):
        go(monkeypatch)
    with pytest.raises(UserError, match="made with vocab_size=300, and --vocab_size=400 asks for another"):
        go(monkeypatch, "--vocab_size=400", "--out_dir=out/new")


# what each setting is changed to on a resume, where it is no number that could be halved
OTHER = dict(
    lr_schedule="constant", dtype="bfloat16", eval_rows=3, seed=7, warmup_iters=6, lr_decay_iters=40, noise_until=0.75
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("key", [k for k in vars(train.Settings()) if k not in resume.MAY_CHANGE + resume.FIXED])
def test_every_change_that_is_accepted_has_its_effect(here, monkeypatch, key):
    """The same run, stopped at step 4, with one setting changed on the way: it must show in the losses, the rates, the
    gradients or the weights, and from step 5 on. A setting that is accepted and does nothing is a lie."""
    flags = ["--max_iters=8", "--lr_schedule=wsd", "--decay_fraction=0.25", "--token_noise=0.2", "--eval_rows=9"]
    flags += ["--dropout=0.2"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch, *flags)
    shutil.copytree("out/t", "out/changed")
    go(monkeypatch, *flags)
    then = state()["settings"][key]
    now = OTHER[key] if key in OTHER else then / 2 if isinstance(then, float) else then // 2
    go(monkeypatch, *flags, f"--{key}={now}", f"--accept_changes={key}", "--out_dir=out/changed")
    assert state("out/changed")["settings"][key] == now
    keys = ("loss", "lr", "grad_norm", "val_loss")
    ours, theirs = ({k: log(run, k) for k in keys} for run in ("out/t", "out/changed"))
    assert all(ours[k][step] == theirs[k][step] for k in keys[:3] for step in range(1, 5))
    assert ours != theirs or not same(state()["model"], state("out/changed")["model"])


@pytest.mark.slow
def test_a_resume_that_changes_nothing_is_the_same_run(here, monkeypatch):
    """Negative control of the test above: without a change nothing differs."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch, "--max_iters=8")
    shutil.copytree("out/t", "out/changed")
    go(monkeypatch, "--max_iters=8")
    go(monkeypatch, "--max_iters=8", "--out_dir=out/changed", "--accept_changes=weight_decay")
    assert log() == log("out/changed") and same(state()["model"], state("out/changed")["model"])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_noise_without_an_end_has_none(here, monkeypatch, schedule):
    """Also beyond the end of the schedule."""
    flags = ("--token_noise=0.3", f"--lr_schedule={schedule}", "--lr_decay_iters=4", "--eval_interval=4")
    go(monkeypatch, *flags, "--max_iters=4")
    go(monkeypatch, *flags, "--max_iters=8")
    go(monkeypatch, *flags, "--max_iters=8", "--out_dir=out/whole")
    assert log() == log("out/whole")
    go(monkeypatch, *flags, "--max_iters=8", "--noise_until=0.99", "--out_dir=out/ends")  # negative control
    assert log()[4] == log("out/ends")[4] and log()[5] != log("out/ends")[5]


@pytest.mark.slow
def test_noise_ends_where_it_is_told_to(here, monkeypatch):
    """As if the run had been stopped at that step and gone on without noise. More steps without a longer
    schedule do not move that step."""
    flags = ("--max_iters=8", "--token_noise=0.3", "--eval_interval=8")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch, *flags, "--noise_until=0.75", "--out_dir=out/until")
    go(monkeypatch, *flags, "--noise_until=0.75", "--out_dir=out/until", "--max_iters=10")  # over the step, prolonged
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        go(patch, *flags)
    shutil.copytree("out/t", "out/noisy")
    go(monkeypatch, *flags, "--token_noise=0", "--accept_changes=token_noise", "--max_iters=10")
    assert log() == log("out/until") and same(state()["model"], state("out/until")["model"])
    go(monkeypatch, *flags, "--out_dir=out/noisy", "--max_iters=10")  # negative control
    assert log()[6] == log("out/noisy")[6] and log()[7] != log("out/noisy")[7]


def test_a_run_goes_on_from_what_it_began_with_alone(here, monkeypatch):
    """Another init_from would be ignored, since the weights come from state.pt: refused. The recorded one is kept over
    a resume that does not name it."""
    for name in "ab":
        save_hf_directory(here / name)
    flags = ("--dataset=own", "--tokenizer=a", *OF_TINY_HF)
    go(monkeypatch, "--init_from=a", *flags, "--max_iters=1")
    go(monkeypatch, *flags, "--max_iters=2")
    assert state()["settings"]["init_from"] == "a"
    go(monkeypatch, "--init_from=a", *flags, "--max_iters=3")
    with pytest.raises(UserError, match="began with init_from=a, not b"):
        go(monkeypatch, "--init_from=b", *flags, "--max_iters=4")
    go(monkeypatch, *flags, "--out_dir=out/new", "--max_iters=1")
    with pytest.raises(UserError, match="began with init_from=auto, not a"):
        go(monkeypatch, *flags, "--out_dir=out/new", "--init_from=a")


def test_a_trained_model_is_not_overwritten(here, monkeypatch):
    """A downloaded model, and a run whose state.pt was deleted for space: refused with the ways out, every byte stays.
    A folder that holds first weights alone, from a run that was killed early, is begun again."""
    save_hf_directory(here / "out/t")
    go(monkeypatch, "--max_iters=4", "--out_dir=out/run")
    os.remove("out/run/state.pt")
    for run, flag in (("out/t", "--init_from=auto"), ("out/run", "--init_from=auto"), ("out/t", "--init_from=out/t")):
        before = {f: f.read_bytes() for f in (here / run).iterdir()}
        with pytest.raises(UserError, match="--init_from=scratch") as refused:
            go(monkeypatch, f"--out_dir={run}", flag)
        assert f"--init_from={run}" in str(refused.value)
        assert before == {f: f.read_bytes() for f in (here / run).iterdir()}
    go(monkeypatch, "--max_iters=4", "--out_dir=out/run", "--init_from=scratch")
    assert state("out/run")["progress"]["step"] == 4
    with monkeypatch.context() as patch:
        stop_at(patch, 1, signal.SIGINT)
        patch.setattr(train, "save", lambda run: False)
        with pytest.raises(UserError, match="which was not saved"):
            go(patch, "--out_dir=out/early")
    go(monkeypatch, "--max_iters=4", "--out_dir=out/early")


def test_a_model_never_stands_without_its_state(here, monkeypatch):
    """Killed between the first best model and the first state.pt, a run could neither go on nor begin again."""
    real = checkpoint.save_pretrained

    def killed(model, path, header):
        if header["step"] != "0":
            assert (here / "out/t/state.pt").is_file()
        real(model, path, header)

    monkeypatch.setattr(checkpoint, "save_pretrained", killed)
    go(monkeypatch, "--max_iters=4")
    assert checkpoint.metadata("out/t")["step"] == "4"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_wsd_can_be_prolonged_from_where_its_decay_began(here, monkeypatch, capsys, optimizer):
    """Twelve steps of which six decay, then the same schedule stretched to twenty: the end is, to the last bit, that of
    a run which was given twenty from the start. The better model of the first run stays until it is surpassed, and the
    same command again goes on instead of going back."""
    wsd = ("--lr_schedule=wsd", "--decay_fraction=0.5", "--global_batch_size=4", f"--optimizer={optimizer}")
    wsd += ("--token_noise=0.2", "--noise_until=0.8")  # noise to step 10 of 12, then to step 16 of 20
    go(monkeypatch, *wsd)
    assert torch.load("out/t/stable.pt", weights_only=True)["progress"]["step"] == 6
    kept = checkpoint.metadata("out/t")
    longer = ("--max_iters=20", "--lr_decay_iters=20", "--accept_changes=lr_decay_iters")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        go(patch, *wsd, *longer)
    assert state()["progress"]["step"] == 9 and checkpoint.metadata("out/t") == kept
    go(monkeypatch, *wsd, *longer)
    go(monkeypatch, *wsd, "--max_iters=20", "--out_dir=out/whole")
    assert same(state()["model"], state("out/whole")["model"]) and log() == log("out/whole")
    assert log(key="lr")[10] == 0.01 and log(key="lr")[20] < 0.002
    capsys.readouterr()
    go(
        monkeypatch, *wsd, "--max_iters=24", "--lr_decay_iters=20"
    )  # without leave to stretch it: said, with the command
    assert "!! the schedule ends at step 20" in capsys.readouterr().out


def test_a_stretch_without_its_state_is_said(here, monkeypatch, capsys):
    """stable.pt was deleted for space: the run goes on from the end, and says what that means. Where the decay had not
    begun nothing is missing, which is the control."""
    wsd = ("--lr_schedule=wsd", "--decay_fraction=0.5", "--global_batch_size=4")
    longer = ("--max_iters=16", "--lr_decay_iters=16", "--accept_changes=lr_decay_iters")
    for step, missing in ((4, False), (8, True)):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            go(patch, *wsd, f"--out_dir=out/{step}")
        Path(f"out/{step}/stable.pt").unlink(missing_ok=True)
        capsys.readouterr()
        go(monkeypatch, *wsd, *longer, f"--out_dir=out/{step}")
        assert ("stable.pt is missing: the rate rises again" in capsys.readouterr().out) == missing
        assert state(f"out/{step}")["progress"]["step"] == 16


def test_a_stretch_asks_when_the_decay_had_begun(here, monkeypatch, capsys):
    """Whether to go back is a matter of the decay_fraction that the run had, not of the one it is given now."""
    wsd = ("--lr_schedule=wsd", "--global_batch_size=4", "--max_iters=12")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        go(patch, *wsd, "--decay_fraction=0.5")  # decays from step 6
    changed = ("--max_iters=16", "--lr_decay_iters=16", "--accept_changes=lr_decay_iters,decay_fraction")
    go(monkeypatch, *wsd, "--decay_fraction=0.1", *changed)
    assert "back from step 9 to where its decay began" in capsys.readouterr().out
    assert log(key="lr")[7] == 0.01


def test_a_decay_that_is_moved_to_the_past_can_be_taken_back(here, monkeypatch, capsys):
    """A schedule cut so short that its decay would have begun before: the state of now is kept for a longer one, in
    place of an older, before anything else is saved, and the jump of the rate is said."""
    wsd, leave = ("--lr_schedule=wsd", "--decay_fraction=0.5"), "--accept_changes=lr_decay_iters"
    go(monkeypatch, *wsd)  # its decay began at step 6
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        go(patch, *wsd, "--max_iters=20", "--lr_decay_iters=20", leave)
    assert torch.load("out/t/stable.pt", weights_only=True)["progress"]["step"] == 6
    at_nine = state()["model"]
    capsys.readouterr()
    with monkeypatch.context() as patch:  # stopped before its first step
        patch.setattr(train, "evaluate", lambda *_, **__: None)
        go(patch, *wsd, "--max_iters=12", "--lr_decay_iters=12", "--eval_interval=9", leave)
    assert "the learning rate goes from 0.01 to 0.00505" in capsys.readouterr().out
    kept = torch.load("out/t/stable.pt", weights_only=True)
    assert kept["progress"]["step"] == 9 and same(kept["model"], at_nine)
    go(monkeypatch, *wsd, "--max_iters=12", "--lr_decay_iters=12")
    assert torch.load("out/t/stable.pt", weights_only=True)["progress"]["step"] == 9
    go(monkeypatch, *wsd, "--max_iters=24", "--lr_decay_iters=24", leave)
    assert "back from step 12 to where its decay began" in capsys.readouterr().out


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_goes_on_where_it_was_or_says_so(here, monkeypatch, capsys, schedule):
    """A stop in mid-decay and the same command: nothing is said, and the rates are those of a run without a stop, also
    where max_epochs shortens the schedule that was asked for. What is changed with leave is said where it shows."""
    flags = (f"--lr_schedule={schedule}", "--decay_fraction=0.5", "--max_iters=90", "--lr_decay_iters=90")
    flags += ("--max_epochs=0.5", "--warmup_iters=2", "--accept_changes=lr_decay_iters")  # ten steps
    go(monkeypatch, *flags, "--out_dir=out/whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        go(patch, *flags)
    shutil.copytree("out/t", "out/changed")
    capsys.readouterr()
    go(monkeypatch, *flags)
    assert "the learning rate goes" not in capsys.readouterr().out and log(key="lr") == log("out/whole", "lr")
    go(monkeypatch, *flags, "--learning_rate=5e-3", "--accept_changes=learning_rate", "--out_dir=out/changed")
    assert "the learning rate goes from" in capsys.readouterr().out


def test_a_decayed_cosine_has_no_stable_phase_to_go_back_to(here, monkeypatch, capsys):
    """A run that becomes a wsd one late is not sent back to a stable.pt of before; the jump of its rate is said."""
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        go(patch, "--decay_fraction=0.5")
    shutil.copy("out/t/state.pt", "out/t/stable.pt")
    capsys.readouterr()
    accepted = "--accept_changes=lr_schedule,lr_decay_iters"
    go(monkeypatch, "--lr_schedule=wsd", "--decay_fraction=0.5", "--max_iters=24", "--lr_decay_iters=24", accepted)
    out = capsys.readouterr().out
    assert "back from" not in out and re.search(r"the learning rate goes from \S+ to 0.01\n", out)
    assert torch.load("out/t/stable.pt", weights_only=True)["progress"]["step"] == 12


def test_a_run_without_a_step_has_no_schedule_yet(here, monkeypatch, capsys):
    """An evaluation alone (--max_iters=0), then the run: its rates are those of a run that began with its steps. The
    command that is printed then is the recipe's own. In a short text both are shortened alike."""
    save_hf_directory(here / "base")
    tune = ("--init_from=base", "--tokenizer=base", *OF_TINY_HF, "--dataset=own", "--min_lr=0", "--max_epochs=0.5")
    tune += ("--warmup_iters=90", "--lr_decay_iters=95")
    for schedule in ("--lr_schedule=cosine", "--lr_schedule=wsd"):
        out_dir = f"--out_dir=out/{schedule[-3:]}"
        for _ in range(2):
            go(monkeypatch, *tune, schedule, out_dir, "--max_iters=0")
        out = capsys.readouterr().out
        assert not {"--max_iters=0", "--max_epochs=0"} & set(re.search(r"More steps: (.*)", out)[1].split())
        go(monkeypatch, *tune, schedule, out_dir, "--max_iters=100")
        go(monkeypatch, *tune, schedule, "--max_iters=100", "--out_dir=out/whole")
        assert log(out_dir[10:], "lr") == log("out/whole", "lr") and 4 < len(log("out/whole", "lr")) < 90
        shutil.rmtree("out/whole")


def test_a_model_that_is_not_kept_is_not_called_the_best(here, monkeypatch, capsys):
    """After the way back to the stable phase the folder holds a decayed model: what is worse is no "best so far", on
    the terminal or in the log, and the folder is of one step from its first moment on."""
    wsd = ("--lr_schedule=wsd", "--decay_fraction=0.5", "--eval_interval=6")
    go(monkeypatch, *wsd)
    kept = checkpoint.metadata("out/t")
    capsys.readouterr()
    with monkeypatch.context() as patch:  # killed as soon as the log is shortened
        patch.setattr(train, "loop", lambda run: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            go(patch, *wsd, "--max_iters=24", "--lr_decay_iters=24", "--accept_changes=lr_decay_iters")
    assert f"best validation loss {float(kept['val_loss']):.4f}" in capsys.readouterr().out
    assert state()["progress"]["step"] == max(log()) == 6
    # better than at step 6, worse than the model that is kept
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: float(kept["val_loss"]) + 1e-3)
    go(monkeypatch, *wsd, "--max_iters=24", "--lr_decay_iters=24", "--accept_changes=lr_decay_iters")
    assert "best so far" not in capsys.readouterr().out and checkpoint.metadata("out/t") == kept
    assert log(key="best") == {6: True, 12: False, 18: False, 24: False}


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model-00001-of-2.safetensors"]
)
def test_a_model_of_any_kind_is_not_overwritten(here, monkeypatch, name):
    """What transformers saved before safetensors, and in shards, is somebody's work as well."""
    os.makedirs("out/t")
    Path("out/t", name).write_bytes(b"weights")
    with pytest.raises(UserError, match="--init_from=scratch"):
        go(monkeypatch)
    assert os.listdir("out/t") == [name]


@pytest.mark.parametrize("change, anew", [("--eval_rows=3", True), ("--weight_decay=0.2", False)])
def test_other_validation_rows_begin_the_search_for_the_best_anew(here, monkeypatch, capsys, change, anew):
    """A loss over other rows cannot be compared: the next model is kept, though its number may be larger."""
    go(monkeypatch, "--max_iters=4")
    s = torch.load("out/t/state.pt", weights_only=True)
    s["progress"]["best_val_loss"] = 0.1  # no later loss is better
    torch.save(s, "out/t/state.pt")
    checkpoint.save_pretrained(checkpoint.load("out/t")[0], "out/t", dict(step="4", val_loss="0.1"))
    go(monkeypatch, "--max_iters=8", change, f"--accept_changes={change[2:].partition('=')[0]}")
    assert ("the best is sought anew" in capsys.readouterr().out) == anew
    assert checkpoint.metadata("out/t")["step"] == ("8" if anew else "4")


def test_going_back_to_other_validation_rows_begins_anew_too(here, monkeypatch, capsys):
    """stable.pt was measured on twenty rows, the decay on ten: what the two call best cannot be compared."""
    wsd = ("--lr_schedule=wsd", "--decay_fraction=0.5")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        go(patch, *wsd)
    go(monkeypatch, *wsd, "--eval_rows=10", "--accept_changes=eval_rows")
    assert "other validation rows" in capsys.readouterr().out
    longer = ("--max_iters=16", "--lr_decay_iters=16", "--accept_changes=lr_decay_iters")
    go(monkeypatch, *wsd, "--eval_rows=10", "--accept_changes=eval_rows,lr_decay_iters", *longer[:2])
    out = capsys.readouterr().out
    assert "back from step 12" in out and "other validation rows" in out
    go(monkeypatch, *wsd, "--out_dir=out/u")
    capsys.readouterr()
    go(monkeypatch, *wsd, "--out_dir=out/u", *longer)  # the same rows all along
    out = capsys.readouterr().out
    assert "back from step 12" in out and "other validation rows" not in out


def test_another_size_of_step_says_which_rows_it_leaves_out(here, monkeypatch, capsys):
    """Rows are a function of the step's number alone, and how the text is cut into them one of their length."""
    go(monkeypatch, "--max_iters=4")
    said = {
        "--global_batch_size=16": "the next row is number 64 instead of 32; between: left out",
        "--global_batch_size=2": "the next row is number 8 instead of 32; between: read again",
        "--block_size=16": "another block_size: the text is cut into other rows",
        "--micro_batch_size=4": None,
    }
    for flag, line in said.items():
        shutil.copytree("out/t", f"out/{flag}")
        go(
            monkeypatch,
            "--max_iters=5",
            f"--out_dir=out/{flag}",
            flag,
            f"--accept_changes={flag[2:].partition('=')[0]}",
        )
        out = capsys.readouterr().out
        assert line in out if line else "!! another" not in out


def test_an_end_before_that_of_the_schedule_is_said(here, monkeypatch, capsys):
    """--max_iters of a resume moves the end of the run and not that of its schedule, either way."""
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch)
    capsys.readouterr()
    go(monkeypatch, "--max_iters=8")
    out = capsys.readouterr().out
    said = re.search(r"max_iters ends the run at step 8, before its schedule ends at 12. To end .*: python (.*)", out)
    assert said and "--lr_decay_iters=8" in said[1] and "--accept_changes=lr_decay_iters" in said[1]
    go(monkeypatch, "--max_iters=8")  # step 8 is taken: too late for that
    go(monkeypatch, "--max_iters=12")
    go(monkeypatch, "--max_iters=4", "--lr_decay_iters=8", "--out_dir=out/u")
    go(monkeypatch, "--max_iters=6", "--lr_decay_iters=8", "--out_dir=out/u")  # asked for
    assert "ends the run" not in capsys.readouterr().out


def test_a_text_that_has_changed_is_not_taken_for_the_old_one(here, monkeypatch, capsys):
    """A run says so, with the command that prepares it anew, and takes the old one: a folder may have grown since. A
    text that was only touched, or has gone, is no change."""
    go(monkeypatch, "--max_iters=4")
    os.utime("t.txt")
    go(monkeypatch, "--max_iters=5")
    assert "changed since" not in capsys.readouterr().out
    text = Path("t.txt").read_bytes()
    Path("t.txt").write_bytes(text[:-1] + b"?")  # of the same size
    for run in "tu":
        go(monkeypatch, "--max_iters=6", f"--out_dir=out/{run}")
        said = re.search(
            "!! data/t was made .*changed since.* For the new one: python (.*) \\(", capsys.readouterr().out
        )
    assert same(state("out/u")["facts"], state()["facts"])
    run_script(*shlex.split(said[1]), cwd=here)
    go(monkeypatch, "--max_iters=6", "--out_dir=out/v")
    assert "changed since" not in capsys.readouterr().out and not same(state("out/v")["facts"], state()["facts"])
    os.remove("t.txt")
    go(monkeypatch, "--max_iters=4", "--out_dir=out/w")
    assert "changed since" not in capsys.readouterr().out


def files_of(folder) -> dict:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.name != ".lock"}


@pytest.mark.slow
def test_a_data_set_belongs_to_its_name(here):
    """What prepare.py made is used as it is: without its flags, and with a recipe for another text, tokenizer and
    vocabulary. Negative control: each flag that asks for another is refused, and what is advised overwrites nothing."""
    small = [flag for flag in SMALL if not flag.startswith(("--input", "--dataset", "--vocab_size"))]
    small += ["--dataset=notes", "--max_iters=1"]
    done = run_script("prepare.py", "--input=t.txt", "--dataset=notes", "--vocab_size=320", cwd=here)
    assert done.returncode == 0, done.stderr
    before = files_of("data/notes")
    Path("other.txt").write_text(TEXT[:9000])
    Path("recipe.py").write_text('input = "other.txt"\ntokenizer = "gpt2"\nvocab_size = 400\nval_fraction = 0.2\n')
    for run, flags in enumerate(([], ["recipe.py"], ["recipe.py", "--input=./t.txt", "--vocab_size=320"])):
        done = run_script("train.py", *flags, *small, f"--out_dir=out/{run}", cwd=here)
        assert done.returncode == 0 and "data/notes: t.txt" in done.stdout, done.stderr
    for flag in ("input=other.txt", "tokenizer=gpt2", "vocab-size=400", "val_fraction=0.2"):
        done = run_script("train.py", "recipe.py", *small, f"--{flag}", "--out_dir=out/new", cwd=here)
        assert done.returncode == 1 and "data/notes was made with" in done.stderr, done.stdout + done.stderr
        assert f"--{flag.replace('-', '_')} asks for another" in done.stderr and "--dataset" in done.stderr
        assert "prepare.py" not in done.stderr
    assert files_of("data/notes") == before


def test_an_input_without_a_dataset_of_its_own_is_not_taken_for_a_changed_text(here, monkeypatch):
    """Data that were made of data/DATASET/input.txt, and another --input: refused. The file by its own name is no
    other."""
    os.makedirs("data/t")
    shutil.copy("t.txt", "data/t/input.txt")
    go(monkeypatch, "--input=", "--max_iters=1")
    go(monkeypatch, "--input=data/t/input.txt", "--max_iters=1", "--out_dir=out/u")
    Path("notes.txt").write_text(TEXT[4000:12000])
    with pytest.raises(UserError, match="made with input=data/t/input.txt, and --input=notes.txt asks for another"):
        go(monkeypatch, "--input=notes.txt", "--max_iters=1", "--out_dir=out/v")
    go(monkeypatch, "--input=notes.txt", "--max_iters=1", "--out_dir=out/v", "--dataset=notes")


def test_the_play_instead_of_shakespeare_is_said_in_every_run(here, monkeypatch, capsys):
    """Data that were prepared without a network stay the play, also where there is one later. Once the text is where it
    belongs, that is a change."""
    monkeypatch.setattr(
        prepare.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    flags = ("--input=shakespeare", "--dataset=mine", "--max_iters=1")
    for run in "ab":
        go(monkeypatch, *flags, f"--out_dir=out/{run}")
        said = re.search("this is the play, .* Tiny Shakespeare: (python .*) \\(", capsys.readouterr().out)
        assert said[1] == "python prepare.py --dataset=mine --input=shakespeare --tokenizer=bpe --vocab_size=300"
    os.makedirs("data/shakespeare")
    shutil.copy("t.txt", "data/shakespeare/input.txt")
    go(monkeypatch, *flags, "--out_dir=out/c")
    assert "changed since" in capsys.readouterr().out
    go(monkeypatch, "--max_iters=1")
    assert "the play" not in capsys.readouterr().out


def test_a_compiling_that_would_be_chosen_otherwise_now_is_said(here, monkeypatch, capsys):
    """A first short try is not compiled, and the run stays so; the line says how to change that."""
    auto = ("--compile=auto",)
    go(monkeypatch, "--max_iters=4", *auto)
    assert "compile  off: the run is about" in capsys.readouterr().out
    monkeypatch.setattr(train, "pick_compile", lambda *_: (True, "it is long"))
    go(monkeypatch, "--max_iters=5", *auto)
    out = capsys.readouterr().out
    assert "as when this run began (begun today it would be on: it is long; --compile=on changes it)" in out
    assert state()["progress"]["compile"] is False


def test_starting_over_never_leaves_old_weights_beside_a_new_shape(here, monkeypatch):
    """Killed while the folder is made ready, --init_from=scratch leaves one without a model, which can be begun."""
    go(monkeypatch, "--max_iters=4")
    scratch = ("--init_from=scratch", "--hidden_size=48", "--max_iters=4")

    def killed(*_, **__):
        raise SystemExit(137)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_pretrained", killed)
        assert go(patch, *scratch) == 137
    assert not os.path.exists("out/t/model.safetensors")
    go(monkeypatch, *scratch[1:])
    assert checkpoint.load("out/t")[0].config.hidden_size == 48


def test_a_resume_makes_the_folder_whole_again(here, monkeypatch):
    """Only state.pt is left of a run: the end has the files of a run that lost none, and a model as good."""
    go(monkeypatch, "--max_iters=4", "--lr_decay_iters=8")
    names = set(os.listdir("out/t"))
    for name in names - {"state.pt"}:
        os.remove(f"out/t/{name}")
    go(monkeypatch, "--max_iters=8", "--lr_decay_iters=8")
    assert set(os.listdir("out/t")) == names
    go(monkeypatch, "--max_iters=8", "--out_dir=out/whole")
    assert same(state()["model"], state("out/whole")["model"])
    checkpoint.load("out/t")


@pytest.mark.parametrize("several", [True, False])
def test_data_that_another_process_prepares(here, monkeypatch, several):
    """Under torchrun on two machines with one disk, both begin to prepare: the second waits for the first's last file.
    Without torchrun nobody is known to finish it: an error at once."""
    if several:
        monkeypatch.setenv("RANK", "8")
        monkeypatch.setenv("LOCAL_RANK", "0")
    waited = []

    def busy(_):
        raise Busy("data/t is being prepared by another process.")

    def sleep(seconds):
        waited.append(seconds)
        os.makedirs("data/t")
        Path("data/t/meta.json").write_text("{}")

    monkeypatch.setattr(prepare, "prepare", busy)
    monkeypatch.setattr(train.time, "sleep", sleep)
    with contextlib.nullcontext() if several else pytest.raises(UserError, match="being prepared"):
        train.prepare_data(train.Settings(), prepare.Settings(dataset="t"))
    assert len(waited) == several


@pytest.mark.slow
@pytest.mark.parametrize("then, now", [("float16", "float32"), ("float32", "float16"), ("bfloat16", "float16")])
def test_a_state_moves_between_precisions(here, monkeypatch, then, now):
    """fp16 has a loss scaler and the others have none: a state of either kind is gone on from in any precision."""
    go(monkeypatch, "--max_iters=4", f"--dtype={then}")
    go(monkeypatch, "--max_iters=8", f"--dtype={now}", "--accept_changes=dtype")
    assert bool(state()["scaler"]) == (now == "float16") and state()["progress"]["skipped"] == 0
    go(monkeypatch, "--max_iters=8", "--out_dir=out/u", "--lr_decay_iters=4")
    assert abs(log()[8] - log("out/u")[8]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_trains_like_float32(here, monkeypatch, optimizer):
    """Losses and gradient norms of the first steps, through GradScaler, on a CPU."""
    go(monkeypatch, "--dtype=float16", f"--optimizer={optimizer}")
    go(monkeypatch, "--out_dir=out/exact", f"--optimizer={optimizer}")
    for key in ("loss", "grad_norm"):
        half, exact = log(key=key), log("out/exact", key)
        assert all(abs(half[i] / exact[i] - 1) < 0.01 for i in exact), key


def test_fewer_steps_than_are_done_are_refused_and_lose_nothing(here, monkeypatch):
    """A state saved under a smaller max_iters than its step once counted as damaged."""
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        go(patch)
    before = file_sha256("out/t/state.pt")
    with pytest.raises(UserError, match="at step 7 already"):
        go(monkeypatch, "--max_iters=4")
    assert file_sha256("out/t/state.pt") == before
    go(monkeypatch)
    assert state()["progress"]["step"] == 12


def said_command(out: str) -> list[str]:
    """The flags of the command that a stopped run prints."""
    return shlex.split(re.search(r"Go on with: python train.py (.*)", out)[1])


def test_the_command_that_is_printed_goes_on(here, monkeypatch, capsys):
    """Also where the run began with --init_from=scratch, in which the same words would begin anew, and where the folder
    has a space in its name."""
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        go(patch, "--init_from=scratch", "--out_dir=out/a b")
    flags = said_command(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    assert sorted(log("out/a b")) == list(range(1, 13)) and state("out/a b")["progress"]["step"] == 12
    assert "resume" in capsys.readouterr().out


def test_a_model_that_could_not_be_written_is_not_called_kept(here, monkeypatch, capsys):
    """The folder holds step 4's; what is printed says so, and the next better one is written."""
    real = checkpoint.save_pretrained

    def full(model, path, header):
        if header["step"] == "8":
            raise OSError("No space left on device")
        real(model, path, header)

    monkeypatch.setattr(checkpoint, "save_pretrained", full)
    go(monkeypatch, "--max_iters=8")
    out = capsys.readouterr().out
    assert "could not be written" in out and "of step 4" in out and checkpoint.metadata("out/t")["step"] == "4"
    go(monkeypatch, "--max_iters=12", "--lr_decay_iters=12", "--accept_changes=lr_decay_iters")
    assert checkpoint.metadata("out/t")["step"] == "12"


def test_a_model_that_is_worse_than_one_that_was_lost_is_kept_and_not_called_the_best(here, monkeypatch, capsys):
    """Step 8 could not be written; step 12 is worse than it, and better than what the folder holds."""
    losses, real = {4: 3.0, 8: 2.5, 12: 2.7}, checkpoint.save_pretrained

    def full(model, path, header):
        if header["step"] == "8":
            raise OSError("No space left on device")
        real(model, path, header)

    monkeypatch.setattr(checkpoint, "save_pretrained", full)
    monkeypatch.setattr(train, "evaluate", lambda *_: losses[steps.pop(0)])
    steps = list(losses)
    go(monkeypatch)
    out = capsys.readouterr().out
    assert checkpoint.metadata("out/t")["step"] == "12" and "validation loss 2.7000, of step 12" in out
    assert log(key="best") == {4: True, 8: False, 12: False} and out.count("best so far") == 1


def test_one_bad_batch_ahead_does_not_lose_the_work(here, monkeypatch):
    """Weights are sound and the next rows overflow, as float16 has it now and then: the state is saved all the same."""
    real = dataloader.Rows.batch

    def batch(self, rows, device):
        inputs, targets = real(self, rows, device)
        return (inputs, targets) if rows.start != 8 * 7 else (inputs, torch.full_like(targets, -100))  # a loss of 0 / 0

    monkeypatch.setattr(dataloader.Rows, "batch", batch)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        go(patch)
    assert state()["progress"]["step"] == 7
    go(monkeypatch)
    assert state()["progress"]["step"] == 12 and state()["progress"]["skipped"] == 1


@pytest.mark.slow
def test_patience_counts_anew_in_a_prolonged_schedule(here, monkeypatch, capsys):
    """The stable phase cannot reach what the decay of the shorter run had reached: that must not end it."""
    flags = ("--lr_schedule=wsd", "--decay_fraction=0.5", "--eval_interval=2", "--patience=2")
    go(monkeypatch, *flags, "--max_iters=16")
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: 9.0)  # worse than the decayed model, and never better
    longer = ("--max_iters=40", "--lr_decay_iters=40", "--accept_changes=lr_decay_iters")
    capsys.readouterr()
    go(monkeypatch, *flags, *longer)
    out = capsys.readouterr().out
    assert "back from step 16 to where its decay began" in out and "stopping: no better" in out
    assert max(log(key="val_loss")) >= 12 and checkpoint.metadata("out/t")["step"] == "16", "the better model stays"


def test_weights_that_are_not_finite_are_not_gone_on_from(here, monkeypatch):
    """A state that an older version may have written: refused, not called whole."""
    go(monkeypatch, "--max_iters=4")
    bad = state()
    bad["model"]["norm.weight"][3] = math.nan
    torch.save(bad, "out/t/state.pt")
    with pytest.raises(UserError, match="not finite"):
        go(monkeypatch)


def test_a_fine_tuned_run_goes_on_however_its_source_is_spelled(here, monkeypatch):
    """The tokenizer of its data need not be named again."""
    save_hf_directory(here / "base")
    for i, flags in enumerate((["--init_from=base"], ["--init_from=resume"], [], ["--init_from=./base/"]), 1):
        go(monkeypatch, "--dataset=own", f"--max_iters={i}", *OF_TINY_HF, *flags)
    assert state()["progress"]["step"] == 4


def test_data_cut_short_or_of_another_tokenizer_are_named(here, monkeypatch):
    """One id beyond the vocabulary, or a file that is shorter than it was, in the middle of a run."""
    go(monkeypatch, "--max_iters=2")
    good, real = (here / "data/t/train.bin").read_bytes(), train.learning_rate_at
    for content, message in ((b"\xff" * len(good), "beyond the vocabulary"), (good[:100], "cut short")):
        (here / "data/t/train.bin").write_bytes(good)

        def damaging(at, *rest, content=content):
            if at == 2:
                (here / "data/t/train.bin").write_bytes(content)
            return real(at, *rest)

        monkeypatch.setattr(train, "learning_rate_at", damaging)
        with pytest.raises(UserError, match=message):
            go(monkeypatch, "--out_dir=out/v", "--init_from=scratch")


def test_starting_over_that_fails_leaves_the_old_run(here, monkeypatch):
    """--init_from=scratch removes the old run only once the first steps have been tried."""
    go(monkeypatch, "--max_iters=4")
    before = {f.name: f.read_bytes() for f in (here / "out/t").iterdir()}
    monkeypatch.setattr(train.SmolLM2, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(UserError, match="out of memory"):
        go(monkeypatch, "--init_from=scratch", "--seed=3")
    assert before == {f.name: f.read_bytes() for f in (here / "out/t").iterdir()}


def test_compiled_blocks_with_wrong_gradients_are_not_trained_with(here, monkeypatch, capsys):
    """A kernel that is wrong on one processor: found before the first step, said, and gone without."""

    def miscompiled(self, *_, **__):
        self._compiled_call_impl = lambda *a, **k: self.forward(*a, **k) * 1.5

    monkeypatch.setattr(torch.nn.Module, "compile", miscompiled)
    monkeypatch.setattr(train, "pick_compile", lambda choice, *_: (True, "for the test"))
    monkeypatch.setattr(torch.compiler, "set_stance", eager_means_uncompiled)
    go(monkeypatch, "--compile=auto", "--max_iters=4")
    out = capsys.readouterr().out
    assert "other gradients than the plain ones" in out and "done: 4 steps" in out
    with pytest.raises(UserError, match="--compile=off"):
        go(monkeypatch, "--compile=on", "--out_dir=out/u")


@contextlib.contextmanager
def eager_means_uncompiled(stance):
    """torch's own stance does not know of the test's stand-in for a compiled block."""
    kept = torch.nn.Module.__call__
    if stance == "force_eager":
        torch.nn.Module.__call__ = torch.nn.Module._call_impl
    yield
    torch.nn.Module.__call__ = kept


def test_scratch_starts_over_and_resume_insists(here, monkeypatch):
    with pytest.raises(UserError, match="nothing to resume"):
        go(monkeypatch, "--init_from=resume")
    go(monkeypatch, "--max_iters=4")
    go(monkeypatch, "--max_iters=2", "--init_from=scratch", "--seed=5")
    assert state()["progress"]["step"] == 2 and sorted(log()) == [1, 2]


def test_the_log_has_each_step_once_whatever_happened(here, monkeypatch):
    """Lines beyond the step that is resumed, and half a line from a kill, are dropped."""
    go(monkeypatch, "--max_iters=4")
    with open("out/t/log.jsonl", "a") as f:
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    go(monkeypatch, "--max_iters=8")
    steps = [json.loads(line)["step"] for line in open("out/t/log.jsonl") if "grad_norm" in line]
    assert steps == list(range(1, 9))


@pytest.mark.slow
def test_the_model_kept_is_the_best_and_overfitting_is_said(here, monkeypatch, capsys):
    """A run driven into overfitting: the folder holds the lowest validation loss, and patience ends it."""
    (here / "t.txt").write_text(TEXT[:3000])
    go(
        monkeypatch,
        "--max_iters=400",
        "--eval_interval=20",
        "--learning_rate=3e-2",
        "--patience=4",
        "--log_interval=50",
    )
    out = capsys.readouterr().out
    losses = log(key="val_loss")
    best = min(losses, key=losses.get)
    kept = checkpoint.metadata("out/t")
    assert kept["step"] == str(best) and abs(float(kept["val_loss"]) - losses[best]) < 1e-5
    assert best < max(losses) and f"overfitting since step {best}" in out and "stopping: no better" in out
    stopped = state()["progress"]["step"]
    flags = ("--max_iters=400", "--eval_interval=20", "--learning_rate=3e-2", "--patience=4", "--log_interval=50")
    go(monkeypatch, *flags)
    assert "stopped by patience" in capsys.readouterr().out and state()["progress"]["step"] == stopped
    model, _ = checkpoint.load("out/t")
    meta = prepare.read_meta("t")
    rows = dataloader.validation_rows("data/t/val.bin", meta["val_tokens"], 32, 20)
    assert abs(train.evaluate(model, rows, 8, contextlib.nullcontext) - losses[best]) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_a_state_that_is_damaged_or_evil_is_refused(here, monkeypatch):
    """Cut short, one bit flipped, a pickle that would run code: named, with the way out, and nothing has run."""
    go(monkeypatch, "--max_iters=4")
    good = (here / "out/t/state.pt").read_bytes()
    model = (here / "out/t/model.safetensors").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    torch.save({"model": Evil()}, "evil.pt")
    torch.save({"step": 3}, "other.pt")
    parts = []
    momentum = state()["optimizer"]
    momentum = momentum | {"state": {i: {"momentum_buffer": m["exp_avg"]} for i, m in momentum["state"].items()}}
    wrong = [("model", {}), ("optimizer", {"state": {0: {}}}), ("progress", {"step": "x"}), ("facts", [])]
    for part, value in [*wrong, ("optimizer", momentum)]:  # the last is of Muon, for AdamW
        torch.save(state() | {part: value}, "part.pt")
        parts.append((here / "part.pt").read_bytes())
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(2**20))
    for bad in (
        good[: len(good) // 2],
        bytes(flipped),
        b"",
        b"text",
        *((here / f).read_bytes() for f in ("evil.pt", "other.pt", "bomb.pt")),
        *parts,
    ):
        (here / "out/t/state.pt").write_bytes(bad)
        with pytest.raises(UserError, match="--init_from=scratch"):
            go(monkeypatch)
        assert not (here / "ran").exists()
    assert (here / "out/t/model.safetensors").read_bytes() == model
    (here / "out/t/state.pt").write_bytes(good)
    go(monkeypatch, "--max_iters=6")


def test_either_state_is_a_way_out_where_the_other_is_damaged(here, monkeypatch):
    """state.pt damaged: stable.pt takes its name, and the end is the same to the last bit. stable.pt damaged: the run
    itself stays whole, and without that file it can be prolonged from its end. A run without stable.pt is told of none.
    """
    wsd = ("--lr_schedule=wsd", "--decay_fraction=0.5")
    longer = ("--max_iters=16", "--lr_decay_iters=16", "--accept_changes=lr_decay_iters")
    go(monkeypatch, *wsd)
    end = state()["model"]
    Path("out/t/state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="Rename out/t/stable.pt to state.pt"):
        go(monkeypatch, *wsd)
    os.rename("out/t/stable.pt", "out/t/state.pt")
    go(monkeypatch, *wsd)
    assert same(end, state()["model"])
    Path("out/t/stable.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="state.pt beside it is not touched by this. Delete out/t/stable.pt") as told:
        go(monkeypatch, *wsd, *longer)
    assert "scratch" not in str(told.value) and same(end, state()["model"])
    os.remove("out/t/stable.pt")
    go(monkeypatch, *wsd, *longer)
    assert state()["progress"]["step"] == 16
    Path("out/t/state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError) as told:
        go(monkeypatch, *wsd, *longer)
    assert "stable.pt" not in str(told.value)


def test_a_stop_has_the_exit_code_of_its_signal(here, monkeypatch):
    """`train.py first && train.py second` must not begin the second with half of the first."""
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert go(patch) == 128 + signal.SIGINT
    assert go(monkeypatch) == 0 and state()["progress"]["step"] == 12


def test_killed_between_the_model_and_its_state_the_log_says_the_same(here, monkeypatch, capsys):
    """The model of step 8 is written before its state: after a kill in between, step 8 is evaluated again, and
    is the best again."""
    real = checkpoint.save_state

    def killed(*arguments):
        if arguments[4]["step"] == 8:
            raise SystemExit(137)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", killed)
        assert go(patch) == 137
    assert state()["progress"]["step"] == 4 and checkpoint.metadata("out/t")["step"] == "8"
    capsys.readouterr()
    go(monkeypatch)
    assert re.search(r"eval +8 .* best so far", capsys.readouterr().out)
    go(monkeypatch, "--out_dir=out/u")
    assert log(key="best") == log("out/u", key="best") and sum(log(key="best").values()) > 1


def test_a_folder_that_cannot_be_written_is_named(here, monkeypatch):
    """A full disk at the start, where the error of the system names no file."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_pretrained", full)
    with pytest.raises(UserError, match="^out/t could not be written .*No space left"):
        go(monkeypatch)


def test_a_stop_that_finds_the_disk_full_is_no_matter_of_the_rate(here, monkeypatch, capsys):
    """It says what the run goes on from, and with which command; a run to its end without room keeps no model, and
    says that."""
    stop_at(monkeypatch, 6)
    real = checkpoint.save_state

    def full(*arguments):
        if arguments[5]["max_iters"] != 12 or arguments[4]["step"] > 4:
            raise OSError("No space left on device")
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_state", full)
    with pytest.raises(UserError, match="at step 7, which was not saved .* Go on from step 4 with: python") as told:
        go(monkeypatch)
    assert "lower" not in str(told.value) and "the previous one is kept" in capsys.readouterr().out
    with pytest.raises(UserError, match="at step 7, which was not saved .*. Nothing was, yet."):
        go(monkeypatch, "--max_iters=20", "--out_dir=out/u")
    assert "there is none yet" in capsys.readouterr().out
    with pytest.raises(UserError, match="ended at step 5, which was not saved .*. Nothing was, yet."):
        go(monkeypatch, "--max_iters=5", "--out_dir=out/v", "--also_eval=t.txt")
    out = capsys.readouterr().out
    assert "no model of them was kept" in out and "sample.py" not in out and "also " not in out
    assert "best so far" not in out and not any(log("out/v", "best").values())


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run(here, monkeypatch, capsys):
    """The save fails half way; the previous state stays whole, training goes on, and the next save works."""
    real = torch.save
    go(monkeypatch, "--max_iters=4")
    before = state()

    def full(value, path):
        with open("/dev/full", "wb", buffering=0) as f:
            real(value, f)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="ended at step 8, which was not saved .* Go on from step 4 with: python"):
        go(monkeypatch, "--max_iters=8")
    assert "could not be written" in capsys.readouterr().out
    monkeypatch.setattr(torch, "save", real)
    assert same(before["model"], state()["model"]) and not list((here / "out/t").glob("*.tmp"))
    go(monkeypatch, "--max_iters=8")
    assert state()["progress"]["step"] == 8
    go(monkeypatch, "--max_iters=8", "--lr_decay_iters=4", "--out_dir=out/u")
    assert same(state("out/u")["model"], state()["model"])
    go(monkeypatch, "--max_iters=8", "--out_dir=out/v")  # its schedule ends at 8
    assert not same(state("out/v")["model"], state()["model"])


def start(*flags, **kw):
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **kw,
    )  # fmt: skip


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"the run ended without printing {text!r}")


@pytest.mark.slow
def test_kill_9_loses_at_most_an_interval_and_never_the_model(here, monkeypatch):
    """Killed at random instants, the same command goes on, and the folder holds a whole model each time."""
    flags = ("--max_iters=60", "--eval_interval=2")
    os.makedirs("out/t")
    for name in ("state.pt.tmp", "notes.tmp"):  # what a kill leaves, and a file of the user's
        Path("out/t", name).touch()
    for i in range(3):
        run = start(*flags)
        wait_for(run, "| loss")
        time.sleep(0.03 * i)
        run.kill()
        run.wait()
        checkpoint.load("out/t")
        done = [row for row in log(key="val_loss")] if os.path.exists("out/t/log.jsonl") else []
        if os.path.exists("out/t/state.pt"):
            assert state()["progress"]["step"] >= max(done, default=0) - 2
    go(monkeypatch, *flags)
    go(monkeypatch, *flags, "--out_dir=out/whole")
    assert same(state()["model"], state("out/whole")["model"]) and log() == log("out/whole")
    assert [f for f in os.listdir("out/t") if "tmp" in f] == ["notes.tmp"]


@pytest.mark.slow
def test_sigterm_saves_and_prints_the_command_that_goes_on(here):
    run = start("--max_iters=100000")
    wait_for(run, "| loss")
    run.send_signal(signal.SIGTERM)
    rest = run.stdout.read()
    assert run.wait() == 128 + signal.SIGTERM and "SIGTERM: saving" in rest
    assert re.search(r"stopped at step [\d,]+, saved. Go on with: python .*train.py --input=t.txt", rest)
    assert state()["progress"]["step"] > 0


@pytest.mark.slow
def test_a_lost_terminal_stops_a_run_in_order(here):
    """SIGHUP, with nobody left to read what is printed: saved, and the run goes on from there."""
    run = start("--max_iters=100000")
    wait_for(run, "| loss")
    run.stdout.close()
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=60) == 128 + signal.SIGHUP and state()["progress"]["step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["pipe", "full device", "closed"])
def test_losing_stdout_does_not_end_a_run(here, lost):
    """`train.py | head -1`, a log on a full disk, no stdout at all: the run goes on, and log.jsonl has every step."""
    command = [sys.executable, str(ROOT / "train.py"), *SMALL]
    if lost == "pipe":
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open("/dev/full", os.O_WRONLY)
    closing = ["sh", "-c", 'exec "$@" >&-', "sh"] if lost == "closed" else []
    done = subprocess.run([*closing, *command], stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert list(log()) == list(range(1, 13)) and state()["progress"]["step"] == 12


@pytest.mark.slow
def test_nohup_is_respected(here):
    """A run that was told to outlive its terminal is not stopped by SIGHUP."""
    run = start("--max_iters=100000", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(run, "| loss")
    run.send_signal(signal.SIGHUP)
    wait_for(run, "| loss")
    time.sleep(0.3)
    assert run.poll() is None
    run.kill()
    run.wait()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(here):
    """The lock is the operating system's: a kill -9 cannot leave it behind."""
    first = start("--max_iters=100000")
    wait_for(first, "| loss")
    second = start()
    assert "being trained in by another process" in second.stdout.read() and second.wait() == 1
    first.kill()
    first.wait()
    third = start("--max_iters=4", "--init_from=scratch")
    assert "done: 4 steps" in third.stdout.read() and third.wait() == 0


# ----------------------------------------------------------------------------------------------------------------------
# the split


@pytest.mark.slow
def test_micro_batches_do_not_matter(here, monkeypatch):
    """Gradients of a step equal to 1e-6 and losses alike, ragged splits (8 = 3 + 3 + 2) included."""
    gradients = {}
    real = torch.nn.utils.clip_grad_norm_

    for micro in (8, 4, 3, 1):
        seen = []

        def noting(parameters, limit, seen=seen):
            parameters = list(parameters)
            seen.append([p.grad.clone() for p in parameters])
            return real(parameters, limit)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
        go(monkeypatch, f"--micro_batch_size={micro}", f"--out_dir=out/m{micro}", "--max_iters=3")
        gradients[micro] = seen[0]
        assert all(abs(log(f"out/m{micro}")[i] - log("out/m8")[i]) < 1e-5 for i in (1, 2, 3))
    for micro in (4, 3, 1):
        assert max(float((a - b).abs().max()) for a, b in zip(gradients[8], gradients[micro])) < 1e-6


def torchrun(*flags, n=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *SMALL, *flags], capture_output=True, text=True, timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_processes_do_not_matter(here, monkeypatch, optimizer):
    """One process, two, and begun on two and ended on one: the same losses, the same weights."""
    flags = f"--optimizer={optimizer}", "--lr_decay_iters=12"
    go(monkeypatch, *flags)
    done = torchrun("--out_dir=out/two", "--micro_batch_size=2", "--max_iters=8", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    go(monkeypatch, "--out_dir=out/two", *flags)
    for key in ("loss", "val_loss"):
        one, two = log(key=key), log("out/two", key)
        assert one.keys() == two.keys() and all(abs(one[i] - two[i]) < 2e-5 for i in one), key
    a, b = state()["model"], state("out/two")["model"]
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3  # Adam's first steps magnify rounding
    assert a.keys() == b.keys(), "no module. prefix"


@pytest.mark.slow
def test_two_processes_go_back_to_the_stable_phase_together(here, monkeypatch):
    """A wsd schedule stretched by two processes is the run of one that was given all its steps."""
    wsd = ("--lr_schedule=wsd", "--decay_fraction=0.5", "--out_dir=out/two", "--micro_batch_size=4")
    go(monkeypatch, *wsd, "--max_iters=8")
    done = torchrun(*wsd, "--max_iters=12", "--lr_decay_iters=12", "--accept_changes=lr_decay_iters")
    assert done.returncode == 0 and "back from step 8 to where" in done.stdout, done.stderr[-2000:]
    go(monkeypatch, *wsd, "--out_dir=out/one")
    one, two = log("out/one"), log("out/two")
    assert one.keys() == two.keys() and all(abs(one[i] - two[i]) < 2e-5 for i in one)
    assert log("out/one", "lr") == log("out/two", "lr")


@pytest.mark.slow
def test_a_dying_process_ends_the_job(here):
    """One of two dies in the middle: the job ends with a message and a failure, it does not hang."""
    (here / "dies.py").write_text(
        f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); import train; real = train.learning_rate_at\n"
        "def at(step, *rest):\n    if step == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n"
        "    return real(step, *rest)\ntrain.learning_rate_at = at; train.main()"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dies.py", *SMALL]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode != 0 and "Signal 9" in done.stderr


DRIVER = f"""import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r}); import train
rank = int(os.environ['RANK'])
"""


def driven(body, *flags, timeout=120):
    """train.py on two processes, with a few lines of Python before it."""
    Path("driver.py").write_text(DRIVER + body + "\ntrain.run_main(train.main)")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "driver.py", *SMALL]
    return subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_no_thread_of_the_group_outlives_it(here):
    """A thread of gloo's that is still there when Python ends can abort the process, and fail a run that is done. The
    first figure is the control: while the run lasts there are such threads."""
    done = driven(
        "import contextlib\nfrom pathlib import Path\n"
        "def gloo(when):\n"
        "    names = []\n"
        "    for task in Path('/proc/self/task').iterdir():\n"
        "        with contextlib.suppress(OSError): names.append((task / 'comm').read_text())\n"  # it may have ended
        "    os.write(2, f'\\n{when} {sum(\"gloo\" in name for name in names)}\\n'.encode())\n"
        "real = train.loop\n"
        "def loop(run):\n    gloo('during'); real(run)\n"
        "train.loop = loop\n"
        "import atexit; atexit.register(gloo, 'after')\n",
        "--max_iters=2",
    )
    assert done.returncode == 0, done.stderr
    during, after = (
        [int(n) for n in re.findall(rf"^{when} (\d+)$", done.stderr, re.M)] for when in ("during", "after")
    )
    assert len(during) == 2 and min(during) > 0 and after == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("function", ["agree", "evaluate"])
def test_a_signal_between_two_exchanges_stops_both_processes(here, function):
    """Right after the processes have agreed to go on, one of them alone gets a signal: it must not leave, since the
    other will wait for it. Both stop at the next exchange, saved."""
    width = dict(agree=2, evaluate=3)[function]  # of what the two exchange
    done = driven(
        "import torch.distributed as dist\nreal = dist.all_reduce; calls = []\n"
        f"def then_a_signal(t):\n    real(t); calls.append(1) if t.numel() == {width} else None\n"
        f"    if rank == 1 and t.numel() == {width} and len(calls) == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "dist.all_reduce = then_a_signal",
        "--max_iters=1000", "--eval_interval=4",
    )  # fmt: skip
    assert done.returncode != 0 and "exitcode  : 143" in done.stderr, done.stderr[-2000:]  # of the one, by torchrun
    assert "stopped at step" in done.stdout and "Traceback" not in done.stdout
    assert state()["progress"]["step"] == (3 if function == "agree" else 9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_processes_that_see_different_runs_are_told(here, monkeypatch, dtype):
    """On machines without a common disk the first would go on and the other begin, and their gradients be averaged.
    With dtype=auto they agree on a dtype before they compare their runs: both must come to that."""
    go(monkeypatch, "--max_iters=4", f"--dtype={dtype}")
    done = driven("if rank == 1: sys.argv.append('--out_dir=out/other')", "--max_iters=8", f"--dtype={dtype}")
    assert done.returncode != 0 and "do not see the same run" in done.stderr, done.stderr[-2000:]
    assert state()["progress"]["step"] == 4


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_saved(here):
    """The signal goes to torchrun itself, as from a terminal or a scheduler; it tells its processes and waits."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.Popen(
        [*command, str(ROOT / "train.py"), *SMALL, "--max_iters=100000"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for(run, "| loss")
    run.send_signal(signal.SIGINT)
    rest = run.stdout.read()
    assert run.wait() != 0 and "stopped at step" in rest and "torchrun, as before, with" in rest
    assert state()["progress"]["step"] > 0


@pytest.mark.slow
def test_two_processes_agree_that_nothing_was_saved(here):
    """The first alone writes, and finds no room for a state (files may have 200 KB here): both end with the same line,
    and neither waits for the other."""
    done = driven("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n", "--max_iters=4")
    assert done.returncode != 0 and "state.pt could not be written" in done.stdout, done.stderr[-2000:]
    assert done.stderr.count("driver.py: ended at step 4, which was not saved") == 2, done.stderr[-3000:]
    assert "RuntimeError" not in done.stderr and not os.path.exists("out/t/state.pt")


@pytest.mark.slow
def test_what_is_forgotten_is_that_of_the_model_that_is_kept(here):
    """The first process may still be writing it when the second would read it."""
    save_hf_directory(here / "m")
    flags = ("--init_from=m", "--tokenizer=m", *OF_TINY_HF, "--dataset=own", "--also_eval=t.txt", "--max_iters=8")
    done = driven(
        "real = train.checkpoint.save_pretrained\n"
        "def slow(*a):\n    time.sleep(2); real(*a)\n"
        "train.checkpoint.save_pretrained = slow\n",
        *flags,
    )
    assert done.returncode == 0, done.stderr
    shown = float(re.search(r"also +t.txt: ([\d.]+)", done.stdout)[1])
    model, tokenizer = checkpoint.load("out/t")
    ids, size = evaluate.read_ids(tokenizer, Path("t.txt"))
    loss = train.evaluate(model, dataloader.text_rows(ids, 32, 32, 20), 8, contextlib.nullcontext)
    assert abs(loss / math.log(2) * len(ids) / size - shown) < 1e-3
    assert shown < state()["progress"]["other_texts"]["t.txt"] - 0.01


def test_a_left_over_local_rank_does_not_wait_for_others(here, monkeypatch):
    """Without RANK there are no others, and nobody else prepares the data."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    go(monkeypatch, "--max_iters=1")
    assert state()["progress"]["step"] == 1


@pytest.mark.slow
def test_slow_preparation_does_not_time_out_the_others(here):
    """Data that take longer to prepare than processes wait for each other: prepared before they join."""
    done = driven(
        "import datetime, torch.distributed as dist\n"
        "real, init = train.prepare.prepare, dist.init_process_group\n"
        "def slow(data):\n    time.sleep(6); return real(data)\n"
        "train.prepare.prepare = slow\n"
        "dist.init_process_group = lambda name: init(name, timeout=datetime.timedelta(seconds=3))",
        "--max_iters=2",
    )  # fmt: skip
    assert done.returncode == 0 and "done: 2 steps" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_rotary_tables_are_not_sent_round_at_every_step(here):
    """They are the same in every process for ever. Compiled blocks stay whole: optimize_ddp would cut them."""
    done = driven(
        "import torch\nreal = train.forward_backward\n"
        "def looking(run, *a, **k):\n"
        "    assert not run.trained.will_sync_module_buffers() and not torch._dynamo.config.optimize_ddp\n"
        "    return real(run, *a, **k)\ntrain.forward_backward = looking",
        "--max_iters=2",
    )  # fmt: skip
    assert done.returncode == 0 and "done: 2 steps" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused(here, monkeypatch):
    done = torchrun("--global_batch_size=7")
    assert done.returncode != 0 and "cannot be shared evenly by 2 processes" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# numbers and memory


def poison(monkeypatch, steps):
    """Make the loss and the gradient of certain steps not a number, as a bad row or an overflow would."""
    real = train.forward_backward

    def forward_backward(run, *arguments, **kw):
        loss = real(run, *arguments, **kw)
        if run.p.step in steps:
            loss *= math.nan
            for p in run.model.parameters():
                p.grad *= math.nan
        return loss

    monkeypatch.setattr(train, "forward_backward", forward_backward)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ends_by", ["evaluation", "signal", "five bad steps", "the end"])
def test_weights_that_are_not_finite_are_never_saved(here, monkeypatch, dtype, ends_by):
    """A learning rate of 1e30 after four good steps: whichever comes first, what the message calls the last good state
    is it, byte by byte, and the advice in the message works. In float16 as well."""
    flags = (f"--dtype={dtype}", "--max_iters=30", "--grad_clip=0")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        go(patch, *flags)
    files = "state.pt", "model.safetensors"
    before = [file_sha256(f"out/t/{name}") for name in files]
    bad = ["--learning_rate=1e30", "--accept_changes=learning_rate", "--eval_interval=100"]
    with monkeypatch.context() as patch:
        if ends_by == "signal":
            stop_at(patch, 5)
        bad += {"evaluation": ["--eval_interval=3"], "the end": ["--max_iters=6", "--lr_decay_iters=0"]}.get(
            ends_by, []
        )
        with pytest.raises(UserError, match="state.pt is of step 4 and whole"):
            go(patch, *flags, *bad)
    assert before == [file_sha256(f"out/t/{name}") for name in files]
    go(monkeypatch, *flags, "--max_iters=6", "--learning_rate=1e-3", "--accept_changes=learning_rate")
    assert state()["progress"]["step"] == 6


def test_before_the_first_checkpoint_the_advice_is_to_start_over(here, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint yet"):
        go(monkeypatch, "--learning_rate=1e30", "--grad_clip=0")
    go(monkeypatch)
    assert state()["progress"]["step"] == 12


def test_a_bad_step_is_skipped_counted_and_said(here, monkeypatch, capsys):
    poison(monkeypatch, {3, 4})
    go(monkeypatch)
    assert "skipped (2 so far)" in capsys.readouterr().out
    assert state()["progress"]["skipped"] == 2
    assert all(torch.isfinite(p).all() for p in state()["model"].values())


def test_five_bad_steps_in_a_row_end_the_run_with_the_checkpoint_whole(here, monkeypatch):
    poison(monkeypatch, set(range(5, 99)))
    with pytest.raises(UserError, match="five steps in a row"):
        go(monkeypatch, "--max_iters=30")
    assert state()["progress"]["step"] == 8
    assert all(torch.isfinite(p).all() for p in checkpoint.load("out/t")[0].parameters())


@pytest.mark.slow
def test_out_of_memory_beside_gradients_is_found_before_the_first_step(here, monkeypatch, capsys):
    """With accumulation the second micro-batch runs beside the gradients of the first: that is where memory ends."""
    real = train.SmolLM2.forward

    def forward(self, input_ids, *arguments, **kw):
        if self.training and len(input_ids) > 2 and self.norm.weight.grad is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, input_ids, *arguments, **kw)

    monkeypatch.setattr(train.SmolLM2, "forward", forward)
    go(monkeypatch, "--micro_batch_size=4", "--max_iters=4")
    out = capsys.readouterr().out
    assert out.index("micro-batch 2 from here on") < out.index("step      1 ") and "done: 4 steps" in out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rehearsal_leaves_room_for_the_optimizers_averages(here, monkeypatch, optimizer):
    """While the first micro-batch is tried, new memory has been taken that is as large as the state that the optimizer
    has after a step; on a resume, which has that state, none."""
    taken, real, room = [], gradients.forward_backward, torch.empty_like

    def trying(run, *arguments, **kw):
        alive = [t for t in (of() for of in taken) if t is not None]
        trial.setdefault("room", sum(t.numel() for t in alive))  # at the first micro-batch
        return real(run, *arguments, **kw)

    def noticed(p, *arguments, **kw):
        new = room(p, *arguments, **kw)
        taken.append(weakref.ref(new))
        return new

    monkeypatch.setattr(gradients, "forward_backward", trying)
    monkeypatch.setattr(torch, "empty_like", noticed)
    found = []
    for steps in (2, 4):
        trial = {}
        taken.clear()
        go(monkeypatch, f"--optimizer={optimizer}", f"--max_iters={steps}", "--eval_interval=2")
        found.append(trial["room"])
    averages = [t for entry in state()["optimizer"]["state"].values() for t in entry.values() if torch.is_tensor(t)]
    assert found == [sum(t.numel() for t in averages if t.dim()), 0]


def test_out_of_memory_says_what_to_make_smaller(here, monkeypatch):
    """The micro-batch while it can be; at one row, the row or the model. Several processes do not halve it alone."""
    run = SimpleNamespace(s=train.Settings(), micro=2, world=2, compiled=False)
    with pytest.raises(UserError, match="not enough memory: .*Try a smaller --micro_batch_size"):
        gradients.recover(run, RuntimeError("not enough memory: you tried to allocate 9 bytes"))
    run.micro = 1
    with pytest.raises(UserError, match="Try a smaller --block_size .*or a smaller model"):
        gradients.recover(run, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ZeroDivisionError):  # any other error is no question of memory
        gradients.recover(run, ZeroDivisionError("x"))


def test_a_run_needs_its_data_folder_for_tokens_alone(here, monkeypatch):
    """The tokenizer is read before the first step: a folder that is prepared again, or moved away, ends no run."""
    real = train.learning_rate_at

    def moving(at, *rest):
        if at == 2:
            os.rename("data/t/tokenizer.json", "data/t/gone.json")
        return real(at, *rest)

    monkeypatch.setattr(train, "learning_rate_at", moving)
    go(monkeypatch, "--sample_interval=4", "--max_iters=4")
    assert list(log(key="sample")) == [4]


def test_out_of_memory_at_the_first_step_halves_the_micro_batch(here, monkeypatch, capsys):
    """The rows of a step stay the same, so the losses do."""
    go(monkeypatch)
    real = train.SmolLM2.forward

    def forward(self, input_ids, *arguments, **kw):
        if self.training and len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, input_ids, *arguments, **kw)

    monkeypatch.setattr(train.SmolLM2, "forward", forward)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_, **__: 1.0)
        go(patch, "--out_dir=out/small")
    assert "micro-batch 2 from here on" in capsys.readouterr().out
    assert all(abs(log()[i] - log("out/small")[i]) < 1e-4 for i in log())
    monkeypatch.setattr(train.SmolLM2, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(UserError, match="out of memory"):
        go(monkeypatch, "--out_dir=out/none")


# ----------------------------------------------------------------------------------------------------------------------
# the model that comes out, and the one that goes in


def test_transformers_reads_the_run_and_continues_alike(here, monkeypatch):
    """AutoModelForCausalLM and AutoTokenizer on out/RUN: same ids, same logits, same greedy text as generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    go(monkeypatch)
    theirs = AutoModelForCausalLM.from_pretrained("out/t", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("out/t")
    model, ours = checkpoint.load("out/t")
    ids = ours.encode("Is there news, 12?").ids
    assert tokenizer("Is there news, 12?")["input_ids"] == ids
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert [int(i) for i in sample.generate(model, ids, 12, temperature=0)] == expected


@pytest.mark.slow
def test_fine_tuning_starts_where_transformers_is_and_gets_better(here, monkeypatch):
    """From a directory made by transformers, in bf16: fp32 master weights, its own tokenizer, and a first validation
    loss that is transformers' own on the same rows to 1e-3; a hundred steps lower it."""
    hf = tiny_hf().to(torch.bfloat16)
    save_hf_directory(here / "base", hf)
    flags = (
        "--init_from=base",
        "--tokenizer=base",
        *OF_TINY_HF,
        "--max_iters=100",
        "--eval_interval=50",
        "--learning_rate=3e-3",
    )
    go(monkeypatch, *flags, "--dataset=own")
    losses = log(key="val_loss")
    meta = prepare.read_meta("own")
    rows = dataloader.validation_rows("data/own/val.bin", meta["val_tokens"], 32, 20)
    hf, total, count = hf.to(torch.float32), 0.0, 0
    with torch.no_grad():
        for inputs, targets in zip(*rows):
            n = int((targets != -100).sum())
            logits = hf(inputs[None, :n]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, targets[:n], reduction="sum"))
            count += n
    assert abs(losses[0] - total / count) < 1e-3
    assert losses[100] < losses[0] - 0.5
    assert all(p.dtype == torch.float32 for p in state()["model"].values())
    model, tokenizer = checkpoint.load("out/t")
    assert model.config.max_position_embeddings == 64 and tokenizer.get_vocab_size() == 512
    go(monkeypatch, *flags, "--dataset=own", "--max_iters=104")  # the same command goes on, it does not begin again
    assert state()["progress"]["step"] == 104


def test_a_shape_that_fine_tuning_would_ignore_is_refused(here, monkeypatch):
    """The model has its own. What it has may be named, which is the control."""
    save_hf_directory(here / "base")
    flags = ("--init_from=base", "--tokenizer=base", *OF_TINY_HF, "--dataset=own", "--max_iters=1")
    with pytest.raises(UserError, match="--num_hidden_layers=3 was given, it has 2; --rope_theta=9.0 was given"):
        go(monkeypatch, *flags, "--num_hidden_layers=3", "--rope_theta=9")
    assert not (here / "out/t/model.safetensors").exists()
    go(monkeypatch, *flags)


def test_data_of_the_same_tokenizer_are_taken_by_any_name(here, monkeypatch):
    """What a run from scratch was trained on serves for fine-tuning its model, too, on a resume as well, without saying
    how the tokenizer was made. Negative control: a flag that was given is compared."""
    data, own = ("--dataset=d", "--vocab_size=301"), ("--init_from=out/t", "--dataset=d", "--out_dir=out/tuned")
    go(monkeypatch, *data, "--max_iters=2")
    unsaid = [flag for flag in SMALL if not flag.startswith(("--vocab_size", "--dataset", "--out_dir"))]
    monkeypatch.setattr(sys.modules[__name__], "SMALL", unsaid)
    go(monkeypatch, *own, "--max_iters=2")
    go(monkeypatch, *own, "--max_iters=4")
    assert state("out/tuned")["progress"]["step"] == 4
    with pytest.raises(UserError, match="made with tokenizer=bpe, and --tokenizer=out/u asks for another"):
        go(monkeypatch, *own, "--max_iters=6", "--tokenizer=out/u")
    with pytest.raises(UserError, match="made with vocab_size=301, and --vocab_size=300"):
        go(monkeypatch, *own, "--max_iters=6", "--vocab_size=300")


def test_fine_tuning_with_another_tokenizer_is_refused(here, monkeypatch):
    """The ids would mean other words to the model, and it would train all the same. A new data set gets the model's."""
    save_hf_directory(here / "base")
    with pytest.raises(UserError, match="no such directory"):
        go(monkeypatch, "--init_from=./nothing")
    assert not (here / "data").exists()
    go(monkeypatch, "--init_from=base", *OF_TINY_HF, "--dataset=new", "--out_dir=out/new", "--max_iters=1")
    assert prepare.read_meta("new")["tokenizer"] == "base"
    go(monkeypatch, "--max_iters=1")
    with pytest.raises(UserError, match="data/t was made with another tokenizer than base has"):
        go(monkeypatch, "--init_from=base", "--out_dir=out/u")
    assert not (here / "out/u/model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# what a user types


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--block_size=100000"], "--block_size="),
        (["--num_key_value_heads=3"], "must be a multiple"),
        (["--device=tpu"], "cannot be used here"),
        (["--accept_changes=lr"], "no such setting"),
        (["--accept_changes=hidden_size"], "cannot change its model's shape"),
        (["--input=missing.txt", "--dataset=new"], "no such file"),
        (["--out_dir="], "--out_dir is empty"),
        (["--lr_schedule=wsd", "--token_noise=0.1", "--noise_until=0.7"], "ends the noise before the decay"),
    ],
)
def test_mistakes_are_named_before_anything_starts(here, monkeypatch, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        go(monkeypatch, *flags)
    assert not (here / "out/t/model.safetensors").exists()


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(train.Settings) if f.type not in (str, bool)])
def test_no_setting_takes_a_number_that_means_nothing(here, monkeypatch, capsys, key, value):
    """-1, nan and inf are outside the range of every setting: a negative clip turns the gradient round, and a learning
    rate of nan ends with "done"."""
    with pytest.raises(SystemExit) as stopped:
        go(monkeypatch, f"--{key}={value}")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{key}={value}: got" in err and not list(here.glob("out"))


def test_a_schedule_that_makes_no_sense_is_warned_of(here, monkeypatch, capsys):
    """It may be meant, as in a first try of a few steps: so it runs."""
    go(monkeypatch, "--max_iters=4", "--warmup_iters=9", "--min_lr=0.5")
    out = capsys.readouterr().out
    assert "!! --warmup_iters=9" in out and "!! --min_lr=0.5" in out and "done: 4 steps" in out
    wsd = ("--max_iters=4", "--lr_schedule=wsd", "--decay_fraction=0.5")
    go(monkeypatch, *wsd, "--warmup_iters=3", "--out_dir=out/v")
    out = capsys.readouterr().out
    assert "!! --warmup_iters=3: by its end the decay has begun (--decay_fraction=0.5 of 4" in out
    assert "done: 4 steps" in out
    go(monkeypatch, "--max_iters=4", "--out_dir=out/u")
    go(monkeypatch, *wsd, "--warmup_iters=2", "--out_dir=out/w")
    assert "!!" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_as_a_user_sees_it(here):
    (here / "t.txt").write_text("short " * 20)
    done = run_script("train.py", *SMALL, cwd=here)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "tokens; --block_size=32 needs 33" in done.stderr


def test_bits_per_byte_do_not_depend_on_the_tokenizer(here, monkeypatch):
    """A model that knows nothing gives every vocabulary log2(V) bits a token; per byte that is what must be printed."""
    monkeypatch.setattr(train, "evaluate", lambda model, *_, **__: math.log(model.config.vocab_size))
    for vocab in (300, 400):
        go(monkeypatch, f"--vocab_size={vocab}", f"--dataset=v{vocab}", f"--out_dir=out/v{vocab}", "--max_iters=4")
        meta = prepare.read_meta(f"v{vocab}")
        expected = math.log2(meta["vocab_size"]) * meta["val_tokens"] / meta["val_bytes"]
        assert abs(log(f"out/v{vocab}", "val_bpb")[4] - expected) < 1e-9
