"""The promises of train.py, each with what would break it: stops, kills, full disks, changed settings, bad numbers.

Most tests call train.main() in this process; signals, kills and several processes are real. The long version of the
same, with many kills, is tests/tools/stress.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

from lib.files import file_sha256
from lib.settings import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, save_hf_directory, tiny_hf

import checkpoint
import dataloader
import prepare
import sample
import train
from evaluate import evaluate

slow = pytest.mark.slow
SMALL = (
    "--input=t.txt --dataset=t --vocab_size=300 --out_dir=out/t --hidden_size=32 --intermediate_size=48 "
    "--num_hidden_layers=2 --num_attention_heads=4 --num_key_value_heads=2 --block_size=32 --global_batch_size=8 "
    "--micro_batch_size=8 --max_iters=12 --eval_interval=4 --eval_rows=20 --log_interval=1 --warmup_iters=2 "
    "--learning_rate=1e-2 --dtype=float32 --compile=off --peak_tflops=1"
).split()
OF_TINY_HF = "--hidden_size=48", "--intermediate_size=80", "--num_attention_heads=6"  # the shape of tiny_hf()
TUNED = "--init_from=base", "--dataset=own", *OF_TINY_HF  # fine-tunes the model in base/


@contextlib.contextmanager
def inside(folder):
    """Work in a folder that has a text; restore the signal handlers that a run replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("t.txt").write_text(TEXT[:8000])
        yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def here(tmp_path):
    """Work in a folder that holds only a text; the first run makes the data set."""
    with inside(tmp_path):
        yield tmp_path


def go(monkeypatch, *flags, recipe=SMALL) -> int:
    """Run train.py in this process, as the command line would start it; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *recipe, *flags])
    try:
        train.main()
    except SystemExit as stopped:
        if stopped.code < 128:  # not a signal: a flag that is refused
            raise
        return stopped.code
    return 0


def resume(monkeypatch, run="out/t", *flags) -> int:
    """Resume a run from its folder alone, with these flags."""
    return go(monkeypatch, f"--out_dir={run}", *flags, recipe=())


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a real signal while it takes the step after `step`."""
    real = train.learning_rate_at

    def signalling(at, *rest):
        if at == step:
            os.kill(os.getpid(), number)
        return real(at, *rest)

    monkeypatch.setattr(train, "learning_rate_at", signalling)


def go_until(monkeypatch, step, *flags, number=signal.SIGINT, **keywords):
    """Run train.py until a signal stops it after `step`."""
    with monkeypatch.context() as patch:
        stop_at(patch, step - 1, number)
        assert go(patch, *flags, **keywords) == 128 + number


def state(run="out/t", name="state.pt"):
    return torch.load(f"{run}/{name}", weights_only=True)


def step_of(run="out/t") -> int:
    return state(run)["progress"]["step"]


def lines(run="out/t") -> list[dict]:
    return [json.loads(line) for line in open(f"{run}/log.jsonl", encoding="utf-8")]


def log(run="out/t", key="loss") -> dict:
    return {row["step"]: row[key] for row in lines(run) if key in row}


def numbers(run="out/t") -> dict:
    """Everything in the log that is the same in every run with the same settings."""
    return {key: log(run, key) for key in ("loss", "lr", "grad_norm", "val_loss", "best", "sample")}


def same(a, b) -> bool:
    """Compare to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_run(a, b, keys=("loss", "lr", "grad_norm", "val_loss")) -> bool:
    """Compare two finished runs to the last bit: the log, the weights, the optimizers and the scaler."""
    parts = "config", "model", "optimizers", "scaler", "facts"
    return all(log(a, key) == log(b, key) for key in keys) and all(same(state(a)[p], state(b)[p]) for p in parts)


def close(a: dict, b: dict, limit: float) -> bool:
    return a.keys() == b.keys() and all(abs(a[i] - b[i]) < limit for i in a)


def files_of(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.name != ".lock"}


def write_chats(file="chats.jsonl"):
    turns = lambda i: [("user", f"What is {i}?"), ("assistant", f"It is {i * i}, {'so ' * (i % 5)}I say.")]
    rows = [{"messages": [dict(role=role, content=text) for role, text in turns(i)]} for i in range(60)]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------------------
# stopping and resuming

WAYS = dict(
    adamw=[],
    muon=["--optimizer=muon", "--lr_schedule=wsd", "--decay_fraction=0.5"],
    bfloat16=["--dtype=bfloat16", "--micro_batch_size=3"],
    float16=["--dtype=float16", "--optimizer=muon"],
    dropout_and_noise=["--dropout=0.2", "--token_noise=0.2", "--noise_until=0.75", "--micro_batch_size=4"],
    conversations=["--dataset=chats", "--input=chats.jsonl", "--block_size=64", "--dropout=0.2"],
)


@slow
@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_stopped_and_resumed_is_the_same_run_to_the_last_bit(here, monkeypatch, flags):
    """Three stops by real signals, at steps without an evaluation, change nothing: not the losses, not the weights, not
    a byte of the model. The original command resumes, and so does the folder alone."""
    write_chats()
    go(monkeypatch, *flags)
    go_until(monkeypatch, 3, *flags, "--out_dir=out/stops")
    go_until(monkeypatch, 6, *flags, "--out_dir=out/stops", number=signal.SIGTERM)
    assert step_of("out/stops") == 6
    go_until(monkeypatch, 10, "--out_dir=out/stops", number=signal.SIGHUP, recipe=())
    resume(monkeypatch, "out/stops")
    assert same_run("out/t", "out/stops")
    names = files_of("out/t").keys() - {"state.pt", "stable.pt", "log.jsonl"}
    assert all(file_sha256(f"out/t/{name}") == file_sha256(f"out/stops/{name}") for name in names)


@slow
def test_the_comparison_above_can_fail(here, monkeypatch):
    """Negative control: a resume that forgets the optimizer's moments is another run."""
    go(monkeypatch)
    go_until(monkeypatch, 6, "--out_dir=out/stops")
    lost = state("out/stops")
    for entry in lost["optimizers"][0]["state"].values():
        entry["exp_avg"].zero_()
    torch.save(lost, "out/stops/state.pt")
    resume(monkeypatch, "out/stops")
    assert not same_run("out/t", "out/stops", keys=()) and log() != log("out/stops")


@slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_and_eager_train_alike(here, monkeypatch):
    """Blocks are compiled in place: the same names, the same losses up to rounding, the same dropout masks. A
    compiled run that is stopped and resumed is the same to the last bit."""
    flags = "--max_iters=4", "--dropout=0.3"
    go(monkeypatch, *flags)
    go(monkeypatch, *flags, "--compile=on", "--out_dir=out/compiled")
    assert state("out/compiled")["model"].keys() == state()["model"].keys()
    assert close(log(), log("out/compiled"), 1e-3)
    go_until(monkeypatch, 2, *flags, "--compile=on", "--out_dir=out/stops")
    resume(monkeypatch, "out/stops")
    assert same_run("out/compiled", "out/stops")


@slow
def test_evaluating_and_sampling_leave_training_alone(here, monkeypatch):
    go(monkeypatch, "--eval_interval=12", "--dropout=0.2")
    go(monkeypatch, "--eval_interval=1", "--sample_interval=3", "--dropout=0.2", "--out_dir=out/often")
    assert log() == log("out/often") and same(state()["model"], state("out/often")["model"])
    assert list(log("out/often", "sample")) == [3, 6, 9, 12] and len(log("out/often", "val_loss")) == 12


def test_dropout_acts_in_training_alone(here, monkeypatch):
    """The saved model has no dropout, and its loss is the one that was logged. Negative control: without dropout the
    training losses differ."""
    go(monkeypatch, "--dropout=0.25", "--max_iters=4")
    model, _ = checkpoint.load("out/t")
    assert model.train().layers[0].dropout == 0.0
    rows = dataloader.text_rows(np.fromfile("data/t/val.bin", "<u2").astype(np.int64), 32, 32, 20)
    assert abs(evaluate(model.eval(), rows, 8, contextlib.nullcontext) - log(key="val_loss")[4]) < 1e-5
    go(monkeypatch, "--max_iters=4", "--out_dir=out/none")
    assert log("out/none")[2] != log()[2]


def test_killed_between_the_model_and_its_state_the_log_says_the_same(here, monkeypatch):
    """The model of step 8 is written before its state. After a kill in between, a resume repeats step 8, which is the
    best again; the log has no line twice, and no line that is cut short. The first state is written before the first
    model; otherwise a run could neither resume nor start over."""
    real, real_model = checkpoint.save_state, checkpoint.save_pretrained

    def killed(path, *rest):
        if rest[3]["step"] == 8:
            raise SystemExit(137)
        real(path, *rest)

    def model_with_state(model, path, metadata):
        assert metadata["step"] == "0" or Path(path, "state.pt").is_file()
        real_model(model, path, metadata)

    monkeypatch.setattr(checkpoint, "save_pretrained", model_with_state)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", killed)
        assert go(patch) == 137
    assert step_of() == 4 and checkpoint.metadata("out/t")["step"] == "8"
    with open("out/t/log.jsonl", "a") as f:
        f.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    go(monkeypatch)
    go(monkeypatch, "--out_dir=out/whole")
    assert same_run("out/t", "out/whole", keys=("loss", "val_loss", "best")) and sum(log(key="best").values()) > 1
    assert [row["step"] for row in lines() if "loss" in row] == list(range(1, 13))


@slow
def test_a_signal_in_the_last_step_or_an_evaluation_is_a_stop(here, monkeypatch):
    """`train.py first && train.py second` must not start the second run before the last evaluation of the first. A
    resume also makes up for the evaluation at step 0 of fine-tuning."""
    go_until(monkeypatch, 12)
    assert step_of() == 12 and 12 not in log(key="val_loss")
    resume(monkeypatch)
    go(monkeypatch, "--out_dir=out/whole")
    assert log(key="best") == log("out/whole", "best") and same(state()["model"], state("out/whole")["model"])
    real = train.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", interrupted)
        assert go(patch, "--max_iters=4", "--lr_decay_iters=12", "--out_dir=out/short") == 128 + signal.SIGTERM
        save_hf_directory(here / "base")
        assert go(patch, *TUNED, "--max_iters=2", "--out_dir=out/tuned") == 128 + signal.SIGTERM
    resume(monkeypatch, "out/short")
    resume(monkeypatch, "out/tuned")
    assert log("out/short", "val_loss") == {4: log(key="val_loss")[4]} and [*log("out/tuned", "val_loss")] == [0, 2]


# ----------------------------------------------------------------------------------------------------------------------
# a run remembers its settings

VARIED = (  # a run in which every setting matters, stopped at step 4 of 8
    "--max_iters=8 --lr_schedule=wsd --decay_fraction=0.25 --token_noise=0.2 --dropout=0.2 --eval_rows=9 "
    "--eval_interval=2"
).split()
CHANGED = dict(  # what a flag changes each setting to; those that are not here must be refused
    eval_interval=3, eval_rows=3, patience=1, log_interval=3, sample_interval=5, global_batch_size=4,
    micro_batch_size=2, block_size=16, max_iters=7, max_epochs=0.3, learning_rate=5e-3, min_lr=5e-3, warmup_iters=6,
    lr_schedule="constant", lr_decay_iters=40, decay_fraction=0.5, token_noise=0.1, noise_until=0.75, dropout=0.1,
    weight_decay=0.5, beta1=0.5, beta2=0.5, grad_clip=0.1, seed=7, device="cpu", dtype="bfloat16", compile="on",
    peak_tflops=2.0,
)  # fmt: skip
PRINTED = dict(  # these change no number of the run, so the effect is what is printed
    device="device   cpu", micro_batch_size="micro-batches of 2,", compile="compile  on", peak_tflops="2,000 GFLOP/s"
)  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(train.Settings)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Make a folder with out/t, a run that was stopped at step 4, and out/whole, its copy, resumed without a change."""
    with inside(tmp_path_factory.mktemp("stopped")) as folder, pytest.MonkeyPatch.context() as patch:
        go_until(patch, 4, *VARIED)
        shutil.copytree("out/t", "out/whole")
        resume(patch, "out/whole")
    return folder


@pytest.fixture
def again(stopped, tmp_path):
    """Work in a copy of that folder."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    with inside(tmp_path):
        yield tmp_path


@slow
@pytest.mark.parametrize("key", CHANGED)
def test_a_flag_that_changes_a_setting_takes_effect(again, monkeypatch, capsys, key):
    """The change is printed, stored and logged, and affects the numbers after step 4, never before. No setting may be
    accepted and then ignored."""
    then, now = state()["settings"][key], CHANGED[key]
    if key == "patience":
        monkeypatch.setattr(train, "evaluate", lambda *_, **__: 9.0)  # never better than at step 4
    if key == "compile":
        monkeypatch.setattr(train.machine, "compile_for_training", lambda model: None)
        monkeypatch.setattr(train.machine, "check_compiled", lambda *_: None)
    resume(monkeypatch, "out/t", f"--{key}={now}")
    out = capsys.readouterr().out
    assert f"{key}: {then} -> {now} (flag)" in out
    assert state()["settings"][key] == now
    assert dict(step=4, setting=key, old=then, new=now) in lines()
    ours, whole = numbers(), numbers("out/whole")
    assert all(ours[k][step] == whole[k][step] for k in ("loss", "lr", "grad_norm") for step in range(1, 5))
    if key in PRINTED:
        assert PRINTED[key] in out
    else:
        assert ours != whole or not same(state()["model"], state("out/whole")["model"])


@pytest.mark.parametrize("key", [key for key in FIELDS if key not in CHANGED and key != "out_dir"])
def test_a_flag_that_changes_a_fixed_setting_is_refused(again, monkeypatch, key):
    """The error names it and says how to continue, and no byte of the run changes."""
    other = dict(optimizer="muon", init_from="elsewhere", tie_word_embeddings="false").get(key, 64)
    before = files_of("out/t")
    with pytest.raises(UserError, match=f"{key} was .*python train.py --out_dir=out/t"):
        resume(monkeypatch, "out/t", f"--{key}={other}", "--learning_rate=5e-3")
    assert files_of("out/t") == before


@slow
def test_a_changed_recipe_is_followed_reported_or_refused(again, monkeypatch, capsys):
    """When the recipe of a run changes, settings that change no number follow it. The others keep the run's values, so
    the numbers stay the same, and the output says which flag changes them. Fixed settings are refused."""
    recipe, before = Path("recipe.py"), files_of("out/t")
    recipe.write_text('learning_rate = 0.5\nweight_decay = 9\nlog_interval = 2\ninput = "other.txt"\nmax_iters = 8\n')
    go(monkeypatch, "--out_dir=out/t", recipe=["recipe.py"])
    out = capsys.readouterr().out
    assert re.search(r"learning_rate: 0.01 kept.* 0.5; --learning_rate=0.5 ", out) and "--weight_decay=9.0" in out
    assert "log_interval: 1 -> 2 (recipe)" in out and "max_iters:" not in out and "other.txt" not in out
    assert [row["setting"] for row in lines() if "setting" in row] == ["log_interval"]
    assert same(state()["model"], state("out/whole")["model"]) and list(log()) == [1, 2, 3, 4, 6, 8]
    for name, content in before.items():
        Path("out/t", name).write_bytes(content)
    recipe.write_text("hidden_size = 64\nlearning_rate = 0.5\n")
    with pytest.raises(UserError, match="hidden_size was 32, the recipe says 64"):
        go(monkeypatch, "--out_dir=out/t", recipe=["recipe.py"])
    go(monkeypatch, "--out_dir=out/t", "--hidden_size=32", "--learning_rate=0.5", recipe=["recipe.py"])  # flags win
    assert log(key="lr")[5] == 0.5


@slow
def test_folders_may_be_renamed(again, monkeypatch):
    """After the run's folder and the data set's are renamed, the run continues as if they had always had these names.
    Data with other contents are refused under any name. Deleted data are made again."""
    os.rename("out/t", "out/renamed")
    os.rename("data/t", "data/moved")
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        resume(patch, "out/renamed", "--dataset=moved")
    shutil.rmtree("data/moved")
    shutil.copytree("out/renamed", "out/other")
    resume(monkeypatch, "out/renamed")
    assert same_run("out/renamed", "out/whole") and Path("data/moved/train.bin").is_file()
    Path("t.txt").write_text(TEXT[500:9000])
    prepare.prepare(prepare.Settings(input="t.txt", dataset="moved", vocab_size=300))
    with pytest.raises(UserError, match="data/moved is not the data set"):
        resume(monkeypatch, "out/other")
    assert step_of("out/other") == 6


def test_a_measured_dtype_is_measured_once(here, monkeypatch, capsys):
    """A busy machine can change the result of the measurement, so a run keeps the dtype that it began with. Negative
    control: a new run takes the other dtype."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(train.machine, "bfloat16_speed", lambda: 2.0)
    go_until(monkeypatch, 3, "--dtype=auto", "--max_iters=6")
    monkeypatch.setattr(train.machine, "bfloat16_speed", lambda: 0.5)
    capsys.readouterr()
    resume(monkeypatch)
    assert "bfloat16: as when this run began" in capsys.readouterr().out
    go(monkeypatch, "--dtype=bfloat16", "--max_iters=6", "--out_dir=out/whole")
    assert "bfloat16: as asked" in capsys.readouterr().out
    assert same_run("out/t", "out/whole")
    go(monkeypatch, "--dtype=auto", "--max_iters=6", "--out_dir=out/new")
    assert log("out/new") != log()


def test_the_choice_to_compile_is_made_once(here, monkeypatch):
    """A run keeps its choice of torch.compile, on or off, because compiling changes the rounding."""
    compiled, choice = [], {"now": True}
    monkeypatch.setattr(train.machine, "compile_for_training", lambda model: compiled.append(True))
    monkeypatch.setattr(train.machine, "check_compiled", lambda *_: None)
    monkeypatch.setattr(train.machine, "pick_compile", lambda *_: (choice["now"], "measured"))
    for run, first in (("out/t", True), ("out/u", False)):
        choice["now"] = first
        go_until(monkeypatch, 2, "--compile=auto", f"--out_dir={run}")
        choice["now"] = not first
        resume(monkeypatch, run)
    assert len(compiled) == 2


def test_more_steps_continue_at_the_end_of_the_schedule(here, monkeypatch):
    """The schedule keeps its original end. Starting a finished run again changes nothing. Fewer steps than it has done
    are refused."""
    go(monkeypatch, "--max_iters=6")
    before = state()
    resume(monkeypatch)
    assert same(before["model"], state()["model"])
    with pytest.raises(UserError, match="at step 6"):
        go(monkeypatch, "--max_iters=4")
    go(monkeypatch, "--max_iters=8")
    assert log(key="lr")[7] == log(key="lr")[8] == train.Settings.min_lr and list(log()) == list(range(1, 9))
    go(monkeypatch, "--max_iters=8", "--lr_decay_iters=6", "--out_dir=out/planned")
    assert same_run("out/t", "out/planned", keys=("loss", "lr"))


def test_a_setting_that_a_finished_run_is_given_is_kept(here, monkeypatch):
    """No step is left that would save the setting, but a resume without the flag must have it. Negative control:
    without a change, no byte of the run changes."""
    go(monkeypatch, "--max_iters=2")
    before = files_of("out/t")
    resume(monkeypatch)
    assert files_of("out/t") == before
    resume(monkeypatch, "out/t", "--weight_decay=0.5", "--log_interval=3")
    resume(monkeypatch)
    assert [state()["settings"][key] for key in ("weight_decay", "log_interval")] == [0.5, 3] and step_of() == 2


def test_a_block_size_beyond_the_context_is_refused_on_a_resume(here, monkeypatch):
    """The error is one line, and no byte of the run changes. Negative control: rows as long as the context."""
    go(monkeypatch, "--max_iters=1", "--max_position_embeddings=64")
    before = files_of("out/t")
    with pytest.raises(UserError, match="^--block_size=65 is longer than the model's context of 64 positions.$"):
        resume(monkeypatch, "out/t", "--block_size=65", "--max_iters=2")
    assert files_of("out/t") == before
    resume(monkeypatch, "out/t", "--block_size=64", "--max_iters=2")
    assert step_of() == 2


@pytest.mark.parametrize("flag, starts_over", [("--eval_rows=3", True), ("--weight_decay=0.2", False)])
def test_other_validation_rows_start_the_best_over(here, monkeypatch, flag, starts_over):
    """Losses over different rows cannot be compared, so the next evaluated model is kept although its loss is larger,
    even if the run is stopped before that evaluation."""
    go(monkeypatch, "--max_iters=4", "--lr_decay_iters=12")
    changed = state()
    changed["progress"]["best_val_loss"] = 0.1  # no later loss is better
    torch.save(changed, "out/t/state.pt")
    checkpoint.save_pretrained(checkpoint.load("out/t")[0], "out/t", dict(step="4", val_loss="0.1"))
    go_until(monkeypatch, 6, "--out_dir=out/t", "--max_iters=8", flag, recipe=())
    resume(monkeypatch)
    assert checkpoint.metadata("out/t")["step"] == ("8" if starts_over else "4") and log(key="best")[8] is starts_over


# ----------------------------------------------------------------------------------------------------------------------
# max_epochs, wsd, the data set, and how a run starts


@slow
def test_max_epochs_shortens_the_run_once(here, monkeypatch):
    """A recipe made for a megabyte would train for hundreds of epochs on a page. The whole schedule is shortened, with
    warmup and intervals, also in a resume. A flag may change the limit later; the schedule stays the same."""
    recipe = "--max_iters=1000 --max_epochs=1 --eval_interval=500 --warmup_iters=50 --sample_interval=400".split()
    go(monkeypatch, *recipe)
    rates, steps = log(key="lr"), math.ceil(prepare.read_meta("t")["train_tokens"] // 32 / 8)
    assert 8 < steps < 30 and step_of() == steps
    assert max(rates, key=rates.get) <= steps // 4 + 1 and rates[steps] < rates[steps // 2] / 2
    assert len(log(key="val_loss")) >= 4 <= len(log(key="sample"))
    go_until(monkeypatch, 3, *recipe, "--out_dir=out/stops")
    go_until(monkeypatch, 7, "--out_dir=out/stops", "--max_epochs=2", recipe=())  # would end at twice as many steps
    go_until(monkeypatch, 9, "--out_dir=out/stops", "--max_epochs=0.75", recipe=())
    resume(monkeypatch, "out/stops", "--max_epochs=1")
    assert same_run("out/t", "out/stops", keys=("loss", "lr"))


def test_the_printed_command_prolongs_what_max_epochs_ended(here, monkeypatch, capsys):
    """Also if a run evaluates only at its end: when shortened, it gets no other evaluations."""
    ends = ["--max_iters=1000", "--eval_interval=1000", "--sample_interval=2000", "--log_interval=2000"]
    go(monkeypatch, *ends, "--max_epochs=0.5")
    steps = step_of()
    assert list(log(key="val_loss")) == list(log(key="sample")) == list(log(key="lr")) == [steps] and steps > 1
    go(monkeypatch, recipe=re.search(r"train longer: python train.py (.*)", capsys.readouterr().out)[1].split())
    assert step_of() == 2 * steps


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_wsd_can_be_prolonged_from_the_start_of_its_decay(here, monkeypatch, optimizer):
    """Copy the folder, rename stable.pt to state.pt in the copy, and give it more steps: the result equals a run that
    was planned longer, to the last bit. Negative control: from state.pt, which has decayed, it is another run."""
    wsd = ["--lr_schedule=wsd", "--decay_fraction=0.5", "--global_batch_size=4", f"--optimizer={optimizer}"]
    wsd += ["--token_noise=0.2", "--noise_until=0.8"]  # noise to step 10 of 12, or to step 16 of 20
    go(monkeypatch, *wsd)
    assert state(name="stable.pt")["progress"]["step"] == 6
    shutil.copytree("out/t", "out/longer")
    os.replace("out/longer/stable.pt", "out/longer/state.pt")
    longer = "--max_iters=20", "--lr_decay_iters=20"
    go_until(monkeypatch, 8, "--out_dir=out/longer", *longer, recipe=())
    assert checkpoint.metadata("out/longer") == checkpoint.metadata("out/t"), "the better model stays for now"
    resume(monkeypatch, "out/longer")
    go(monkeypatch, *wsd, "--max_iters=20", "--out_dir=out/planned")
    assert same_run("out/longer", "out/planned") and log("out/longer", "lr")[10] == 0.01
    assert same(state("out/longer", "stable.pt")["model"], state("out/planned", "stable.pt")["model"])
    resume(monkeypatch, "out/t", *longer)
    assert not same(state()["model"], state("out/planned")["model"])


def test_a_data_set_belongs_to_its_name(here, monkeypatch, capsys):
    """A data set of prepare.py is used as it is, without its flags or with a recipe for another text, tokenizer and
    vocabulary. Negative control: each flag that asks for another is refused, and the advice overwrites nothing."""
    small = [flag for flag in SMALL if not flag.startswith(("--input", "--dataset", "--vocab_size"))]
    small += ["--dataset=notes", "--max_iters=1"]
    prepare.prepare(prepare.Settings(input="t.txt", dataset="notes", vocab_size=320))
    before = files_of("data/notes")
    Path("other.txt").write_text(TEXT[:9000])
    Path("recipe.py").write_text('input = "other.txt"\ntokenizer = "gpt2"\nvocab_size = 400\nval_fraction = 0.2\n')
    for run, flags in enumerate(([], ["recipe.py"], ["recipe.py", "--input=./t.txt", "--vocab_size=320"])):
        go(monkeypatch, f"--out_dir=out/{run}", recipe=[*flags, *small])
        assert "data/notes: t.txt" in capsys.readouterr().out
    for flag in ("input=other.txt", "tokenizer=gpt2", "vocab-size=400", "val_fraction=0.2"):
        with pytest.raises(UserError, match=f"data/notes .*--{flag.replace('-', '_')}.*--dataset") as refused:
            go(monkeypatch, f"--{flag}", "--out_dir=out/new", recipe=["recipe.py", *small])
        assert "prepare.py" not in str(refused.value)
    assert files_of("data/notes") == before and not Path("out/new").exists()


def test_scratch_starts_over_and_resume_insists(here, monkeypatch):
    """A start that fails leaves the old run as it was. A start that is killed leaves no old weights beside a new
    config, and at most initial weights, which the next start overwrites."""
    with pytest.raises(UserError, match="nothing to resume"):
        go(monkeypatch, "--init_from=resume")
    go(monkeypatch, "--max_iters=4")
    before = files_of("out/t")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory"):
        patch.setattr(train.SmolLM2, "forward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
        go(patch, "--init_from=scratch")
    assert files_of("out/t") == before
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(SystemExit(137)))
        assert go(patch, "--init_from=scratch", "--hidden_size=48") == 137
    assert not Path("out/t/model.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate_at", lambda *_: (_ for _ in ()).throw(SystemExit(137)))
        assert go(patch, "--hidden_size=48") == 137
    assert checkpoint.metadata("out/t")["untrained"] == "true" and not Path("out/t/state.pt").exists()
    go(monkeypatch, "--max_iters=2", "--hidden_size=48")
    go(monkeypatch, "--max_iters=2", "--init_from=scratch", "--seed=5")
    assert step_of() == 2 and list(log()) == [1, 2] and checkpoint.load("out/t")[0].config.hidden_size == 32
    go(monkeypatch, "--max_iters=4", "--init_from=resume")
    assert step_of() == 4


def test_a_folder_alone_resumes_and_never_begins(here, monkeypatch):
    """`train.py --out_dir=out/RUN` with a mistyped name, or for a run that was killed before it saved, must not train
    the default model there for hours."""
    with pytest.raises(UserError, match="nothing to resume"):
        resume(monkeypatch, "out/typo")
    assert not Path("out").exists()
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate_at", lambda *_: (_ for _ in ()).throw(SystemExit(137)))
        assert go(patch) == 137
    with pytest.raises(UserError, match="nothing to resume"):
        resume(monkeypatch)
    go(monkeypatch, "--max_iters=2")
    assert step_of() == 2


def test_scratch_does_not_replace_a_fine_tuned_run(here, monkeypatch):
    """Someone who wants to fine-tune again would get random weights and lose the run."""
    save_hf_directory(here / "base")
    go(monkeypatch, *TUNED, "--max_iters=1")
    before = files_of("out/t")
    with pytest.raises(UserError, match="fine-tuned from base"):
        go(monkeypatch, *TUNED, "--init_from=scratch")
    assert files_of("out/t") == before


def test_a_run_that_another_process_saves_meanwhile_is_not_replaced(here, monkeypatch):
    """A requeued job starts while the previous one saves for the first time: it sees no state.pt, and must look again
    once it holds the folder's lock."""
    go(monkeypatch, "--max_iters=4")
    os.rename("out/t/state.pt", "state.pt")
    os.remove("out/t/model.safetensors")
    real = prepare.resolve
    monkeypatch.setattr(prepare, "resolve", lambda *a: (os.rename("state.pt", "out/t/state.pt"), real(*a))[1])
    before = Path("state.pt").read_bytes()
    with pytest.raises(UserError, match="Run the command again"):
        go(monkeypatch, "--max_iters=8")
    assert Path("out/t/state.pt").read_bytes() == before
    monkeypatch.setattr(prepare, "resolve", real)
    go(monkeypatch, "--max_iters=8")
    assert step_of() == 8


@slow
def test_scratch_leaves_no_chat_template_behind(here, monkeypatch):
    """With the template of an earlier chat model in the folder, chat.py would take a base model for a chat model.
    Negative control: the chat model has one."""
    write_chats()
    go(monkeypatch, "--dataset=c", "--input=chats.jsonl", "--block_size=64", "--max_iters=1")
    assert Path("out/t/chat_template.jinja").is_file()
    go(monkeypatch, "--init_from=scratch", "--max_iters=1")
    assert "chat_template.jinja" not in os.listdir("out/t") and step_of() == 1


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-2.safetensors"])
def test_a_model_without_a_state_is_not_overwritten(here, monkeypatch, name):
    """A downloaded model, or a run whose state.pt was deleted for space: refused, and every byte stays."""
    go(monkeypatch, "--max_iters=4")
    os.remove("out/t/state.pt")
    if name != "model.safetensors":
        os.rename("out/t/model.safetensors", f"out/t/{name}")
    before = files_of("out/t")
    with pytest.raises(UserError, match="--init_from=out/t"):
        go(monkeypatch)
    assert files_of("out/t") == before
    go(monkeypatch, "--max_iters=2", "--init_from=scratch")
    assert step_of() == 2


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_state_that_is_damaged_or_evil_is_refused(here, monkeypatch):
    """Cut short, one bit flipped, a pickle that would run code, weights that are not finite or of another shape: the
    error names the file, no code runs, and nothing changes."""
    go(monkeypatch, "--max_iters=4")
    before = files_of("out/t")
    good = before["state.pt"]
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    weights = state()["model"]
    values = [dict(model=Evil()), dict(step=3), state() | dict(model={})]
    values += [
        state() | dict(model=weights | {"norm.weight": bad}) for bad in (torch.full((32,), math.nan), torch.ones(3))
    ]
    bad = [good[: len(good) // 2], bytes(flipped), b"", b"text"]
    for value in values:
        torch.save(value, "bad.pt")
        bad.append(Path("bad.pt").read_bytes())
    for content in bad:
        Path("out/t/state.pt").write_bytes(content)
        with pytest.raises(UserError, match="out/t/state.pt.*--init_from=out/t"):
            resume(monkeypatch, "out/t", "--max_iters=6")
        assert not Path("ran").exists() and files_of("out/t") == before | {"state.pt": content}
    Path("out/t/state.pt").write_bytes(good)
    resume(monkeypatch, "out/t", "--max_iters=6")


def scripted(monkeypatch, losses: list[float]):
    """Make the evaluations return these losses, then only worse ones."""
    left = iter(losses)
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: next(left, 9.0))


def test_the_model_kept_is_the_best_and_overfitting_is_named(here, monkeypatch, capsys):
    """The folder holds the model with the lowest validation loss, not the last; patience also ends a resumed run."""
    flags = ["--max_iters=400", "--eval_interval=2", "--patience=4"]
    scripted(monkeypatch, [3.0, 2.5, 2.7, 2.6, 2.8, 2.9])
    go(monkeypatch, *flags)
    out, kept = capsys.readouterr().out, checkpoint.metadata("out/t")
    assert (kept["step"], kept["val_loss"]) == ("4", "2.5") and "overfitting since step 4" in out and step_of() == 12
    assert log(key="best") == {2: True, 4: True, 6: False, 8: False, 10: False, 12: False}
    resume(monkeypatch)
    assert step_of() == 12
    go(monkeypatch, *flags, "--max_iters=4", "--lr_decay_iters=400", "--out_dir=out/short")
    theirs = state("out/short")["model"]
    assert all(torch.equal(p, theirs[name]) for name, p in checkpoint.load("out/t")[0].named_parameters())


@contextlib.contextmanager
def full_disk(size=200_000):
    """Limit the size of a file: enough for the model of these tests, too little for its state."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_last_checkpoint_and_the_run(here, monkeypatch, capsys):
    """When saving fails half way, training goes on to its end and the last checkpoint stays intact; since the last step
    could not be saved, the run ends with an error. Once there is room, it continues."""
    go(monkeypatch, "--max_iters=4", "--lr_decay_iters=12")
    before = file_sha256("out/t/state.pt")
    with full_disk(), pytest.raises(UserError, match="step 12 could not be saved"):
        go(monkeypatch)
    assert "could not be written" in capsys.readouterr().out and list(log()) == list(range(1, 13))
    assert file_sha256("out/t/state.pt") == before and not list(Path("out/t").glob("*.tmp"))
    go(monkeypatch)
    go(monkeypatch, "--out_dir=out/whole")
    assert same_run("out/t", "out/whole")
    with full_disk(), pytest.raises(UserError, match="could not be saved"):
        go(monkeypatch, "--out_dir=out/new")
    assert not any(log("out/new", "best").values()) and checkpoint.metadata("out/new")["step"] == "0"


# ----------------------------------------------------------------------------------------------------------------------
# processes of their own: signals, kills, lost terminals, torchrun


def start(*flags, **keywords):
    """Start a run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **keywords,
    )  # fmt: skip


def wait_for(process, text) -> str:
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"the run ended without printing {text!r}")


@slow
def test_kill_9_loses_at_most_an_interval_and_never_the_model(here, monkeypatch):
    """Killed at random instants, the same command continues, and the folder holds a whole model each time."""
    flags = "--max_iters=60", "--eval_interval=2"
    os.makedirs("out/t")
    for name in ("state.pt.tmp", "notes.tmp"):  # what a kill leaves behind, and a file of the user's
        Path("out/t", name).touch()
    for i in range(3):
        run = start(*flags)
        wait_for(run, "| loss")
        time.sleep(0.03 * i)
        run.kill()
        run.wait()
        checkpoint.load("out/t")
        if Path("out/t/state.pt").exists():
            assert step_of() >= max(log(), default=0) - 2
    resume(monkeypatch) if Path("out/t/state.pt").exists() else go(monkeypatch, *flags)
    go(monkeypatch, *flags, "--out_dir=out/whole")
    assert same_run("out/t", "out/whole")
    assert [name for name in os.listdir("out/t") if "tmp" in name] == ["notes.tmp"]


@slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_has_its_exit_code(here, name):
    """After SIGHUP the terminal is gone, so nothing reads the output."""
    run, number = start("--max_iters=100000"), getattr(signal, name)
    wait_for(run, "| loss")
    if name == "SIGHUP":
        run.stdout.close()
    run.send_signal(number)
    rest = "" if name == "SIGHUP" else run.stdout.read()
    assert run.wait(timeout=60) == 128 + number and step_of() > 0
    assert name == "SIGHUP" or (f"{name}: saving" in rest and "python train.py --out_dir=out/t" in rest)


@slow
def test_a_second_signal_quits_at_once(here):
    """It does not wait for the step, which takes seconds here, and does not save."""
    run = start("--global_batch_size=4000", "--eval_interval=100")
    wait_for(run, "| loss")
    run.send_signal(signal.SIGTERM)
    wait_for(run, "saving")
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 128 + signal.SIGTERM and "saved" not in run.stdout.read()
    assert not Path("out/t/state.pt").exists()


@slow
@pytest.mark.parametrize("lost", ["> >(:)", "> /dev/full", ">&-"], ids=["pipe", "full disk", "closed"])
def test_losing_stdout_does_not_end_a_run(here, lost):
    """`train.py | head -1`, a log on a full disk, no stdout at all: the run goes on, and log.jsonl has every step."""
    command = shlex.join([sys.executable, str(ROOT / "train.py"), *SMALL])
    done = subprocess.run(["bash", "-c", f"{command} {lost}"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert list(log()) == list(range(1, 13)) and step_of() == 12


@slow
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(here):
    """The operating system holds the lock, so kill -9 releases it. The first run ignores SIGHUP, as with nohup, and is
    not stopped by it."""
    first = start("--max_iters=100000", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(first, "| loss")
    second = start()
    assert "being trained in by another process" in second.stdout.read() and second.wait() == 1
    first.send_signal(signal.SIGHUP)
    for _ in range(3):
        wait_for(first, "| loss")
    first.kill()
    first.wait()
    third = start("--max_iters=4", "--init_from=scratch")
    third.stdout.read()
    assert third.wait() == 0 and step_of() == 4


def test_micro_batches_do_not_matter(here, monkeypatch):
    """Losses and gradients are equal up to rounding, also for 8 = 3 + 3 + 2. Negative control: one row less."""
    for micro in (8, 3, 1):
        go(monkeypatch, f"--micro_batch_size={micro}", f"--out_dir=out/{micro}", "--max_iters=4")
        assert all(
            close(log("out/8", key), log(f"out/{micro}", key), 2e-5) for key in ("loss", "grad_norm", "val_loss")
        )
    go(monkeypatch, "--global_batch_size=7", "--max_iters=4")
    assert not close(log("out/8"), log(), 1e-3)


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(*flags, before="", timeout=240) -> subprocess.CompletedProcess:
    """Run train.py in two processes, after the Python lines in `before`."""
    Path("driver.py").write_text(
        f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r}); import train\n"
        f"import torch.distributed as dist\nrank = int(os.environ['RANK'])\n{before}\ntrain.run_main(train.main)\n"
    )
    command = [*LAUNCH, "driver.py" if before else str(ROOT / "train.py"), *SMALL, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_processes_do_not_matter(here, monkeypatch, optimizer):
    """One process, or first two and then one: the same losses and weights up to rounding, the same names."""
    flags = f"--optimizer={optimizer}", "--lr_decay_iters=12"
    go(monkeypatch, *flags)
    done = torchrun("--out_dir=out/two", "--micro_batch_size=3", "--max_iters=8", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    resume(monkeypatch, "out/two", "--max_iters=12")
    assert all(close(log(key=key), log("out/two", key), 2e-5) for key in ("loss", "val_loss"))
    a, b = state()["model"], state("out/two")["model"]
    assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3  # Adam magnifies rounding


@slow
def test_ctrl_c_stops_all_processes_saved(here, monkeypatch):
    """The signal goes to torchrun itself, as from a terminal or a scheduler; it passes the signal on and waits."""
    run = subprocess.Popen(
        [*LAUNCH, str(ROOT / "train.py"), *SMALL, "--max_iters=100000"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for(run, "| loss")
    run.send_signal(signal.SIGINT)
    rest = run.stdout.read()
    assert run.wait() != 0 and "saved. Resume with" in rest
    done = step_of()
    assert done > 0 and max(log()) == done
    resume(monkeypatch, "out/t", f"--max_iters={done + 1}")


@slow
@pytest.mark.parametrize("exchange, step", [(2, 3), (3, 9)], ids=["step", "evaluation"])
def test_a_signal_between_two_exchanges_stops_both_processes(here, exchange, step):
    """One of the processes gets a signal right after they have agreed to go on. It must not exit, since the other would
    wait for it: both save and stop at the next exchange. A step exchanges two numbers, an evaluation three."""
    signalled = (
        "real = dist.all_reduce; calls = []\n"
        f"def then_a_signal(t):\n    real(t); calls.append(1) if t.numel() == {exchange} else None\n"
        f"    if rank == 1 and t.numel() == {exchange} and len(calls) == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "dist.all_reduce = then_a_signal"
    )
    done = torchrun("--max_iters=1000", before=signalled)
    assert done.returncode != 0 and "exitcode  : 143" in done.stderr, done.stderr[-2000:]
    assert "stopped at step" in done.stdout and 'train.py", line' not in done.stderr and step_of() == step


@slow
def test_processes_that_see_different_files_are_told(here, monkeypatch):
    """Without a shared disk one process would resume and another start a new run, and they would average gradients."""
    go(monkeypatch, "--max_iters=4")
    before = files_of("out/t")
    done = torchrun("--max_iters=8", before="if rank == 1: sys.argv.append('--out_dir=out/other')")
    assert done.returncode != 0 and "the processes see different files" in done.stderr, done.stderr[-2000:]
    assert files_of("out/t") == before and not Path("out/other/model.safetensors").exists()


@slow
def test_two_processes_agree_that_nothing_was_saved(here):
    """Only the first writes, and it has no room for a state: both end with the same line, and neither waits."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    done = torchrun("--max_iters=4", before=limit)
    assert done.returncode != 0 and "could not be written" in done.stdout, done.stderr[-2000:]
    assert done.stderr.count("driver.py: step 4 could not be saved") == 2 and not Path("out/t/state.pt").exists()


@slow
def test_processes_join_after_the_preparation(here):
    """Preparing data may take longer than the timeout of the process group."""
    before = (
        "import datetime\nprepare, init = train.prepare.prepare, dist.init_process_group\n"
        "def slow(*a, **kw):\n    time.sleep(8); return prepare(*a, **kw)\ntrain.prepare.prepare = slow\n"
        "dist.init_process_group = lambda name: init(name, timeout=datetime.timedelta(seconds=5))"
    )
    done = torchrun("--max_iters=2", before=before)
    assert done.returncode == 0 and step_of() == 2, done.stderr[-2000:]


# ----------------------------------------------------------------------------------------------------------------------
# bad numbers, memory, the compiler


def poison(monkeypatch, steps):
    """Leave no target in the rows of these steps, so that loss and gradient are 0 / 0, as after an overflow."""
    real = dataloader.Rows.batch

    def batch(self, rows, device):
        inputs, targets = real(self, rows, device)
        return inputs, torch.full_like(targets, -100) if rows.start // 8 in steps else targets

    monkeypatch.setattr(dataloader.Rows, "batch", batch)


def test_a_bad_step_is_skipped_and_five_in_a_row_end_the_run(here, monkeypatch):
    """A bad step is skipped and counted. Four in a row do not end the run; five do, and the checkpoint before them
    stays."""
    poison(monkeypatch, {3, *range(5, 9)})
    go(monkeypatch, "--out_dir=out/four")
    assert state("out/four")["progress"]["skipped"] == 5 and step_of("out/four") == 12
    assert all(torch.isfinite(p).all() for p in state("out/four")["model"].values())
    poison(monkeypatch, set(range(5, 99)))
    with pytest.raises(UserError, match="five steps.*Resume from state.pt with a lower"):
        go(monkeypatch, "--max_iters=30")
    assert step_of() == 8 and all(torch.isfinite(p).all() for p in checkpoint.load("out/t")[0].parameters())


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=slow)])
@pytest.mark.parametrize("ends_by", ["evaluation", "signal", "five bad steps", "the end", "stable"])
def test_weights_that_are_not_finite_are_never_saved(here, monkeypatch, dtype, ends_by):
    """A learning rate of 1e39 after four good steps: whatever would save first, the last good state stays as it is,
    byte by byte, and a run with a lower rate continues from it."""
    flags = f"--dtype={dtype}", "--max_iters=30", "--grad_clip=0", "--eval_interval=100"
    go_until(monkeypatch, 4, *flags)
    before = {name: content for name, content in files_of("out/t").items() if name != "log.jsonl"}
    bad = ["--learning_rate=1e39"]
    bad += {"evaluation": ["--eval_interval=3"], "the end": ["--max_iters=6"]}.get(ends_by, [])
    bad += ["--lr_schedule=wsd", "--lr_decay_iters=12", "--decay_fraction=0.5"] if ends_by == "stable" else []
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Resume from state.pt with a lower"):
        stop_at(patch, 5 if ends_by == "signal" else -1)
        resume(patch, "out/t", *bad)
    assert {name: content for name, content in files_of("out/t").items() if name != "log.jsonl"} == before
    resume(monkeypatch, "out/t", "--learning_rate=1e-3", "--max_iters=6")
    assert step_of() == 6
    with pytest.raises(UserError, match="Start again"):
        go(monkeypatch, *flags, *bad, "--warmup_iters=0", "--eval_interval=2", "--out_dir=out/new")
    assert not Path("out/new/state.pt").exists()


@slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_trains_like_float32(here, monkeypatch, optimizer):
    """Losses and gradient norms agree, with the loss scaler. A run can switch between the two in a resume."""
    flags = f"--optimizer={optimizer}", "--max_iters=8", "--lr_decay_iters=12"
    for run, dtype, other in (("half", "float16", "float32"), ("exact", "float32", "float16")):
        go(monkeypatch, f"--dtype={dtype}", *flags, f"--out_dir=out/{run}")
        resume(monkeypatch, f"out/{run}", f"--dtype={other}", "--max_iters=12")
        assert bool(state(f"out/{run}")["scaler"]) == (other == "float16")
    for key in ("loss", "grad_norm"):
        half, exact = log("out/half", key), log("out/exact", key)
        assert all(abs(half[i] / exact[i] - 1) < 0.01 for i in exact), key


def little_memory(monkeypatch, rows: int, beside_gradients=False):
    """Let training run out of memory with more than `rows` at a time, or only if there are gradients already."""
    real = train.SmolLM2.forward

    def forward(self, input_ids, *arguments, **keywords):
        if self.training and len(input_ids) > rows and (not beside_gradients or self.norm.weight.grad is not None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, input_ids, *arguments, **keywords)

    monkeypatch.setattr(train.SmolLM2, "forward", forward)


@pytest.mark.parametrize("beside_gradients", [False, True])
def test_out_of_memory_halves_the_micro_batch_before_the_first_step(here, monkeypatch, capsys, beside_gradients):
    """The rows of a step stay the same, and so do the losses, up to rounding. With several micro-batches, memory may
    run out only when there are gradients from the first."""
    go(monkeypatch, "--max_iters=4")
    with monkeypatch.context() as patch:
        little_memory(patch, 2, beside_gradients)
        go(patch, "--max_iters=4", "--micro_batch_size=4", "--out_dir=out/small")
    out = capsys.readouterr().out
    assert "micro-batches of 2, processes: 1" in out and close(log(), log("out/small"), 2e-5)
    little_memory(monkeypatch, 0)
    with pytest.raises(UserError, match="out of memory"):
        go(monkeypatch, "--out_dir=out/none")
    assert not Path("out/none/model.safetensors").exists()


@slow
@pytest.mark.parametrize("broken", ["fails", "computes other gradients"])
def test_a_run_does_without_a_broken_compiler(here, monkeypatch, capsys, broken):
    """The compiler is tried before step 1, also when fine-tuning evaluates first. With auto the run continues
    uncompiled, with the numbers of an uncompiled run; with on it ends in an error."""

    def backend(graph, inputs):
        assert broken != "fails", "no C++ compiler"
        return lambda *arguments: tuple(1.5 * output for output in graph(*arguments))

    def compile(self, **_):
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend)

    save_hf_directory(here / "base")
    go(monkeypatch, *TUNED, "--max_iters=4", "--out_dir=out/plain")
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr(train.machine, "pick_compile", lambda choice, *_: (True, "for the test"))
    capsys.readouterr()
    go(monkeypatch, *TUNED, "--max_iters=4", "--compile=auto")
    assert capsys.readouterr().out.count("compiling failed") == 1
    assert same_run("out/t", "out/plain") and state()["progress"]["compile"] is False
    with pytest.raises(UserError, match="--compile=off"):
        go(monkeypatch, "--compile=on", "--out_dir=out/on")
    assert not Path("out/on/model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# the model that comes out, the one that goes in, and mistakes


def test_bits_per_byte_do_not_depend_on_the_tokenizer(here, monkeypatch):
    """A model that knows nothing needs log2(V) bits per token; the log must show that figure per byte."""
    monkeypatch.setattr(train, "evaluate", lambda model, *_, **__: math.log(model.config.vocab_size))
    for vocab in (300, 400):
        go(monkeypatch, f"--vocab_size={vocab}", f"--dataset=v{vocab}", f"--out_dir=out/v{vocab}", "--max_iters=4")
        meta = prepare.read_meta(f"v{vocab}")
        expected = math.log2(meta["vocab_size"]) * meta["val_tokens"] / meta["val_bytes"]
        assert abs(log(f"out/v{vocab}", "val_bpb")[4] - expected) < 1e-9


@slow
def test_transformers_reads_the_run_and_continues_alike(here, monkeypatch):
    """AutoModelForCausalLM and AutoTokenizer on out/RUN: the same ids, the same greedy text as generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    go(monkeypatch)
    theirs = AutoModelForCausalLM.from_pretrained("out/t", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("out/t")
    model, ours = checkpoint.load("out/t")
    ids = ours.encode("Is there news, 12?").ids
    assert tokenizer("Is there news, 12?")["input_ids"] == ids
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert [int(i) for i in sample.generate(model, ids, 12, temperature=0)] == expected


@slow
def test_fine_tuning_starts_where_transformers_is_and_gets_better(here, monkeypatch):
    """From a directory made by transformers, in bf16: fp32 master weights, its own tokenizer, and a first validation
    loss that is transformers' own on the same rows to 1e-3; a hundred steps lower it."""
    hf = tiny_hf().to(torch.bfloat16)
    save_hf_directory(here / "base", hf)
    go(monkeypatch, *TUNED, "--max_iters=100", "--eval_interval=50", "--learning_rate=3e-3", "--log_interval=50")
    ids = np.fromfile("data/own/val.bin", "<u2").astype(np.int64)
    hf, losses = hf.to(torch.float32), []
    with torch.no_grad():
        for inputs, targets in zip(*dataloader.text_rows(ids, 32, 32, 20)):
            n = int((targets != -100).sum())
            logits = hf(inputs[None, :n]).logits[0]
            losses += torch.nn.functional.cross_entropy(logits, targets[:n], reduction="none").tolist()
    found = log(key="val_loss")
    assert abs(found[0] - np.mean(losses)) < 1e-3 and found[100] < found[0] - 0.5
    assert all(p.dtype == torch.float32 for p in state()["model"].values())
    model, tokenizer = checkpoint.load("out/t")
    assert model.config.max_position_embeddings == 64 and tokenizer.get_vocab_size() == 512


@slow
def test_a_fine_tuned_run_resumes_however_its_source_is_spelled(here, monkeypatch):
    """Also if the source is not named, or is gone. Another source is refused."""
    save_hf_directory(here / "base")
    for i, source in enumerate(["--init_from=base", "--init_from=./base/", "--init_from=resume", "--seed=1337"], 1):
        go(monkeypatch, *TUNED[1:], source, f"--max_iters={i}")
    shutil.rmtree("base")
    resume(monkeypatch, "out/t", "--max_iters=5")
    assert step_of() == 5 and state()["settings"]["init_from"] == "base"
    for source in ("--init_from=out/t", "--init_from=other"):
        with pytest.raises(UserError, match="init_from was base"):
            resume(monkeypatch, "out/t", source)


@slow
def test_fine_tuning_keeps_the_models_shape_and_tokenizer(here, monkeypatch):
    """Flags for another shape are refused, those for its own are not. Data of another tokenizer are refused: the ids
    would mean other words. Data of the same tokenizer are accepted, whichever run they were made for."""
    save_hf_directory(here / "base")
    with pytest.raises(UserError, match="nothing"):
        go(monkeypatch, "--init_from=./nothing")
    with pytest.raises(UserError, match="num_hidden_layers=3.*rope_theta=9"):
        go(monkeypatch, *TUNED, "--num_hidden_layers=3", "--rope_theta=9")
    go(monkeypatch, *TUNED, "--max_iters=1")
    assert prepare.read_meta("own")["tokenizer"] == "base"
    go(monkeypatch, "--max_iters=1", "--out_dir=out/scratch")
    with pytest.raises(UserError, match="data/t was made with another tokenizer"):
        go(monkeypatch, "--init_from=base", *OF_TINY_HF, "--out_dir=out/new")
    assert not Path("out/new/model.safetensors").exists()
    go(monkeypatch, "--init_from=out/scratch", "--max_iters=1", "--out_dir=out/tuned")
    assert step_of("out/tuned") == 1


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--block_size=100000"], "--block_size"),
        (["--head_dim=7"], "head_dim"),
        (["--out_dir="], "--out_dir is empty"),
    ],
)
def test_mistakes_are_named_before_anything_starts(here, monkeypatch, flags, named):
    with pytest.raises(UserError, match=re.escape(named)):
        go(monkeypatch, *flags)
    assert not list(here.rglob("model.safetensors"))


# ----------------------------------------------------------------------------------------------------------------------
# what the terminal shows


def in_a_terminal(folder, *flags) -> str:
    """Run train.py with a pseudo-terminal as stdout and stderr; return all that was written to it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))  # otherwise it has no columns
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *flags]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # on Linux reading fails once the other end is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert process.wait() == 0, shown
    return shown.decode()


@slow
def test_a_terminal_shows_one_progress_line_and_a_pipe_none(here):
    """In a terminal one progress line is redrawn below the finished lines, and erased at the end, before the
    commands to continue with. A pipe or a file gets only the finished lines."""
    shown = in_a_terminal(here, "--log_interval=4", "--eval_interval=6")
    bars = [piece for piece in re.split(r"[\r\n]", shown) if "step/s" in piece or "s/step" in piece or "?step" in piece]
    assert bars and "0/12" in bars[0] and any("loss " in bar for bar in bars)
    for line in shown.replace("\r\n", "\n").split("\n"):
        assert "| loss" not in line or line.split("\r")[-1].startswith("step "), "no line shares its row with the bar"
    assert shown.rstrip().endswith("\nplot it: python plot.py --run=out/t")
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, "--out_dir=out/pipe"]
    piped = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert piped.returncode == 0 and "\r" not in piped.stdout + piped.stderr and "step      1 | loss" in piped.stdout
