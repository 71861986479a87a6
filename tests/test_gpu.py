"""CUDA graphs in training and generating: the same numbers as without. On a CPU with a stand-in for the graph, which
shows that what surrounds it is right; on a machine with a CUDA GPU with the graph itself."""

import json
import sys
from types import SimpleNamespace

from lib import device as device_module
from lib.settings import UserError

import pytest
import torch
from conftest import TEXT, tiny

import gradients
import sample
import train
from fast import decode
from fast.decode import GpuDecoder
from fast.quantize import quantize
from model import KVCache

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU: the stand-in alone")
)
SMALL = (
    "--input=t.txt --dataset=t --vocab_size=300 --hidden_size=32 --intermediate_size=48 --num_hidden_layers=2 "
    "--num_attention_heads=4 --num_key_value_heads=2 --block_size=32 --global_batch_size=8 --micro_batch_size=8 "
    "--max_iters=12 --eval_interval=4 --eval_rows=20 --log_interval=1 --warmup_iters=2 --learning_rate=1e-2 "
    "--dtype=float32 --peak_tflops=1000"
).split()


class StandIn:
    """Computes anew, on its own copies of the inputs, where a graph would be replayed."""

    replays = 0

    def __init__(self, compute, *inputs):
        self.compute, self.inputs, self.result = compute, [tensor.clone() for tensor in inputs], None

    def __call__(self, *inputs):
        StandIn.replays += 1
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        result = self.compute(*self.inputs)
        self.result = result.clone() if self.result is None else self.result.copy_(result)
        return self.result


@pytest.fixture(params=["stand-in", CUDA])
def device(request, tmp_path, monkeypatch):
    """cpu or cuda, in an empty folder with a text in it; replays wherever they are not switched off."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(TEXT[:8000])
    monkeypatch.setattr(gradients, "launch_share", lambda compute: compute() * 0 + 1)
    StandIn.replays = 0
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(gradients, "can_replay", lambda run: run.s.compile != "off")
    for module in gradients, decode:
        monkeypatch.setattr(module, "Replay", StandIn)
    return "cpu"


def losses(monkeypatch, capsys, device, name, *flags):
    """Of all steps and evaluations of a run, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, f"--device={device}", f"--out_dir=out/{name}", *flags])
    train.main()
    rows = [json.loads(line) for line in open(f"out/{name}/log.jsonl", encoding="utf-8")]
    return torch.tensor([row.get("loss", row.get("val_loss")) for row in rows]), capsys.readouterr().out


def near(device, a, b) -> bool:
    """To the last bit with the stand-in; a GPU may add in another order."""
    return torch.equal(a, b) if device == "cpu" else torch.allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--optimizer=muon",
        "--micro_batch_size=3",  # 3 + 3 + 2 rows: the last by themselves
        "--dropout=0.3 --token_noise=0.2 --noise_until=0.5",
        "--dtype=float16",
        "--grad_clip=0",
    ],
)
def test_a_replayed_run_is_the_same(device, monkeypatch, capsys, flags):
    """Gradients start each step at zero, dropout differs from step to step, the rows are those of the step. Negative
    control: gradients that are not set to zero."""
    plain, said = losses(monkeypatch, capsys, device, "plain", *flags.split(), "--compile=off")
    assert "replay  " not in said and not StandIn.replays
    replayed, said = losses(monkeypatch, capsys, device, "replayed", *flags.split())
    assert "replay   on" in said and len(plain) == 15
    assert near(device, plain, replayed), (plain - replayed).abs().max()
    if device == "cpu":
        parts = 2 if "micro" in flags else 1
        assert StandIn.replays == 12 * parts + 1
    real = train.make_optimizer

    def forgetful(*arguments):
        optimizer = real(*arguments)
        optimizer.zero_grad = lambda set_to_none: None
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", forgetful)
    monkeypatch.setattr(gradients, "alike", lambda *norms: True)
    assert not near(device, plain, losses(monkeypatch, capsys, device, "wrong", *flags.split())[0])


def test_stopped_and_resumed_a_replayed_run_is_the_same(device, monkeypatch, capsys):
    whole, _ = losses(monkeypatch, capsys, device, "whole", "--dropout=0.2")
    losses(monkeypatch, capsys, device, "parts", "--dropout=0.2", "--max_iters=8", "--lr_decay_iters=12")
    parts, said = losses(monkeypatch, capsys, device, "parts", "--dropout=0.2", "--lr_decay_iters=12")
    assert "resume" in said and near(device, whole, parts)
    other, _ = losses(monkeypatch, capsys, device, "other", "--dropout=0.2", "--seed=2")
    assert not near(device, whole, other), "negative control: another seed is another run"


@pytest.mark.parametrize("fault", ["memory", "memory of cuBLAS", "memory beside it", "gradients", "old rows"])
def test_a_replay_that_fails_is_gone_without(device, monkeypatch, capsys, fault):
    """Where its memory is too small, alone or with what is computed beside it, or its gradients are other ones, those
    of the rows that it was recorded with included, the run is that without it."""
    real, grad = gradients.Replay, torch.autograd.grad

    def too_much(*arguments, **kw):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    class Faulty(real):
        def __init__(self, compute, *inputs):
            if fault == "memory":
                too_much()
            if fault == "memory of cuBLAS":
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            if fault == "memory beside it":
                monkeypatch.setattr(torch.autograd, "grad", too_much)
            swap = (lambda row: row.flip(-1)) if fault == "gradients" else lambda row: row
            super().__init__(lambda *rows: compute(*map(swap, rows)), *inputs)

        def __call__(self, *inputs):
            return super().__call__(*(self.inputs if fault == "old rows" else inputs))

    plain, _ = losses(monkeypatch, capsys, device, "plain", "--compile=off")
    monkeypatch.setattr(gradients, "Replay", Faulty)
    say = train.print_safe
    monkeypatch.setattr(
        train, "print_safe", lambda text: (monkeypatch.setattr(torch.autograd, "grad", grad), say(text))
    )
    found, said = losses(monkeypatch, capsys, device, "faulty")
    reason = "there is not enough memory for it" if "memory" in fault else "it has other gradients"
    assert f"replay   off: {reason}" in said
    assert near(device, plain, found)


def test_a_run_that_cannot_be_recorded_is_refused(device, monkeypatch, capsys):
    """What a broken recording leaves behind on a GPU is not to be trusted."""
    monkeypatch.setattr(gradients, "Replay", lambda *_: (_ for _ in ()).throw(RuntimeError("stream is capturing")))
    with pytest.raises(UserError, match="stream is capturing.*--compile=off"):
        losses(monkeypatch, capsys, device, "broken")


def test_a_gpu_that_does_not_wait_replays_nothing(device, monkeypatch, capsys):
    monkeypatch.setattr(gradients, "launch_share", lambda compute: 0.5)
    found, said = losses(monkeypatch, capsys, device, "busy")
    assert "replay   off: Python takes 50% of a micro-batch's time" in said and not StandIn.replays
    assert near(device, found, losses(monkeypatch, capsys, device, "plain", "--compile=off")[0])


def test_launch_share(monkeypatch):
    """The time until the last kernel is started, of the time until it has ended."""
    clock, synchronized = iter([0.0, 3.0, 4.0]), []
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: synchronized.append(1))
    assert device_module.launch_share(lambda: synchronized.append(0)) == 0.75 and synchronized == [1, 0, 1]


def test_what_is_replayed(monkeypatch):
    """One process with a GPU and text. Conversations have rows of no fixed shape, and of several processes the
    gradients are exchanged on the way."""
    run = SimpleNamespace(device="cuda", world=1, chat=False, s=train.Settings())
    assert gradients.can_replay(run)
    for change in (dict(device="cpu"), dict(device="mps"), dict(world=2), dict(chat=True)):
        assert not gradients.can_replay(SimpleNamespace(**vars(run) | change))
    assert not gradients.can_replay(SimpleNamespace(**vars(run) | dict(s=train.Settings(compile="off"))))


@pytest.mark.parametrize("rows, kind", [(1, "float32"), (3, "float32"), (1, "int8")])
def test_recorded_text_is_the_same(device, monkeypatch, rows, kind):
    """Through caches that grow, and past the context, where the cache is written from its beginning again. Negative
    control: a position off."""
    monkeypatch.setattr(decode, "ROOM", 8)
    model = tiny().to(device)  # a context of 64
    if kind == "int8":
        quantize(model)
    prompt = torch.randint(3, 512, (rows, 5))
    found = {}
    for name in ("plain", "recorded"):
        cache = KVCache(model.config, rows, model.device, model.dtype)
        logits, decoder = sample.prefill(model, prompt.to(device), cache), GpuDecoder(model)
        found[name] = []
        for position, token in enumerate(torch.randint(3, 512, (59, rows), generator=torch.Generator().manual_seed(1))):
            if name == "recorded":
                logits = decoder(token.tolist(), cache, 5 + position)
            else:
                logits = sample.prefill(model, token[:, None].to(device), cache, 5 + position)
            found[name].append(logits)
        found[name] = torch.stack(found[name]).float().cpu()
    plain, recorded = found["plain"], found["recorded"]
    allowed = 1e-4 if kind == "float32" else 0.1 * float(plain.std())
    assert (plain - recorded).abs().max() < allowed < (plain[1:] - recorded[:-1]).abs().max()
    if kind == "int8":  # rounded to bfloat16: greedy text may differ
        return

    used = []  # a CPU would take decode.c
    monkeypatch.setattr(sample, "pick_decoder", lambda model, rows: used.append(rows) or GpuDecoder(model))
    texts = [
        torch.stack(list(sample.generate(model, prompt, 150, temperature=0, stop_ids=[], fast=fast))).cpu()
        for fast in (True, False)
    ]
    assert torch.equal(*texts) and used == [rows] and texts[0].shape == (150, rows)


@pytest.mark.parametrize("fault", ["recording", "logits", "old token", "old position"])
def test_a_text_that_cannot_be_recorded_is_refused(device, monkeypatch, fault):
    """Not answered by something else: the message names the way without."""

    class Faulty(decode.Replay):
        def __init__(self, compute, *inputs):
            if fault == "recording":
                raise RuntimeError("operation not permitted when stream is capturing")
            self.kept = token, place = [tensor.clone() for tensor in inputs]
            wrong = {
                "logits": lambda new, at: compute(new, at).flip(-1),
                "old token": lambda new, at: compute(token, at),
                "old position": lambda new, at: compute(new, place),
            }
            super().__init__(wrong[fault], *inputs)

    monkeypatch.setattr(decode, "Replay", Faulty)
    model = tiny().to(device)
    monkeypatch.setattr(sample, "pick_decoder", lambda model, rows: GpuDecoder(model))
    with pytest.raises(UserError, match="--fast=False"):
        list(sample.generate(model, [5, 6, 7], 3, stop_ids=[]))
    assert len(list(sample.generate(model, [5, 6, 7], 3, stop_ids=[], fast=False))) == 3
