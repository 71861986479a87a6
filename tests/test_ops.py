"""ops.py: each function against its plain twin."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from torch.utils.flop_counter import FlopCounterMode

from fast import ops
from fast.quantize import quantize
from model import KVCache


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_pieces_is_the_loss(rows, tied, monkeypatch):
    """Value and every gradient equal the plain way's up to rounding, with ignored targets, whatever the size of the
    pieces. A processor may add in any order, so a few units in the last place of the value are allowed."""
    model = tiny(tie_word_embeddings=tied)
    ids, targets = torch.randint(0, 512, (2, 30)), torch.randint(0, 512, (2, 30))
    targets[0, :11] = -100
    _, plain = model(ids, targets)
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setitem(ops.LOSS_ROWS, "cpu", rows)
    none, pieces = model(ids, targets, loss_only=True)
    (3 * pieces).backward()  # a factor, as accumulation and loss scaling apply one
    rounding = 8 * torch.finfo(torch.float32).eps
    assert none is None and pieces.dtype == torch.float32 and abs(float(plain - pieces)) <= rounding * float(plain)
    for p, g in zip(model.parameters(), expected):
        assert (p.grad / 3 - g).abs().max() <= rounding * max(1, float(g.abs().max()))
    with torch.no_grad():
        assert abs(float(model(ids, targets, loss_only=True)[1] - plain)) <= rounding * float(plain)
    targets[0, 11] = (targets[0, 11] + 1) % 512  # negative control: one target
    assert abs(float(model(ids, targets, loss_only=True)[1] - plain)) > 10 * rounding * float(plain)


def test_the_loss_in_pieces_under_autocast_is_a_fp32_loss():
    """A bf16 loss has two or three digits: unfit to log. Within 1e-2 of fp32, and of type fp32."""
    model = tiny()
    ids, targets = torch.randint(0, 512, (2, 60)), torch.randint(0, 512, (2, 60))
    exact = model(ids, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        pieces = model(ids, targets, loss_only=True)[1]
        plain = model(ids, targets)[1]
    pieces.backward()
    assert pieces.dtype == plain.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0 < abs(float(pieces - exact)) < 1e-2 and abs(float(pieces - plain)) < 1e-3


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_long_prompt_may_go_through_fp32(kind, monkeypatch):
    """Where fp32 products are the faster ones, a bfloat16 or int8 model computes what its weights stand for in fp32, up
    to the last norm: nearer to the exact logits than in bfloat16, in chunks with a cache too."""
    model, exact = tiny(max_position_embeddings=128), tiny(max_position_embeddings=128)
    model.to(torch.bfloat16) if kind == "bfloat16" else quantize(model)
    for ours, theirs in zip(exact.modules(), model.modules()):
        if hasattr(ours, "weight"):
            ours.weight.data = theirs.weight.float()
        if hasattr(theirs, "scale"):
            ours.weight.data *= theirs.scale.float()[:, None]
    ids = torch.randint(0, 512, (1, 128))

    def error(faster: bool, least: int = 64):
        monkeypatch.setattr(ops, "bfloat16_speed", lambda: 0.5 if faster else 1.0)
        monkeypatch.setattr(ops, "WIDEN_FROM", least)
        cache = KVCache(model.config, 1, dtype=torch.bfloat16)
        parts = [model(ids[:, a : a + 64], cache=cache, start=a)[0] for a in (0, 64)]
        found = [model(ids)[0], torch.cat(parts, dim=1)]
        assert all(f.dtype == torch.bfloat16 for f in found)
        return [float((f.float() - exact(ids)[0]).square().mean().sqrt()) for f in found]

    with torch.no_grad():
        wide, narrow = error(True), error(False)
        assert max(wide) < 0.7 * min(narrow)
        assert error(True, least=129)[0] == narrow[0]  # too short to pay
        error(True)
        x, documents = torch.empty(1, 128, 1), (torch.arange(128)[None] > 70).long()
        assert ops.worth_widening(x)
        apart = model(ids, documents=documents)[0][:, 71:]
        assert (apart.float() - exact(ids[:, 71:])[0]).square().mean().sqrt() < 2 * wide[0]  # walls in fp32, too
        with torch.autocast("cpu", torch.bfloat16):
            assert not ops.worth_widening(x), "which casts weights itself, and keeps what it has cast"
    assert not ops.worth_widening(x), "training computes in what autocast says"


def test_swiglu_is_silu_of_the_gate_times_up():
    """With gradients out of place, without them in place: the same numbers, and the same gradients as the formula's."""
    gate, up = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 16, requires_grad=True)
    expected = F.silu(gate) * up
    found = ops.swiglu(gate, up)
    assert torch.equal(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (gate, up)), torch.autograd.grad(expected.sum(), (gate, up))
    ):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.allclose(ops.swiglu(gate.clone(), up), expected, rtol=1e-6, atol=1e-6)
        assert (ops.swiglu(up.clone(), gate) - expected).abs().max() > 0.1, "negative control: the roles are not alike"


def worst_row(grad, exact) -> float:
    """The largest error of a row, relative to the row."""
    return float(((grad.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def test_float16_gradients_survive_a_large_vocabulary():
    """At 16,384 tokens most probabilities divided by 2,048 are below what float16 can hold, so the division must wait
    for the loss scale. Each row of the embedding's gradient, the rows of absent tokens included, and each row of the
    hidden gradient is within 1% of fp32's. Negative control: dividing first loses the absent tokens' rows."""
    torch.manual_seed(0)
    N, C, V, scale = 2048, 64, 16384, 65536.0
    x, weight = torch.randn(1, N, C), torch.randn(V, C) / 8
    targets = torch.randint(0, 1000, (1, N))  # 15,384 tokens are absent

    def gradients(dtype, factor):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = ops.cross_entropy_in_pieces(*leaves, targets)
        return [g / factor for g in torch.autograd.grad(loss * factor, leaves)]

    exact, half = gradients(torch.float32, 1.0), gradients(torch.float16, scale)
    assert worst_row(half[1], exact[1]) < 0.01 and worst_row(half[0][0], exact[0][0]) < 0.01
    logits_grad = ((x[0] @ weight.T).softmax(-1) / N).half()
    divided_first = logits_grad.T.float() @ x[0]
    assert worst_row(divided_first[1000:], exact[1][1000:]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_of_a_gpu_is_that_of_a_cpu(monkeypatch, dtype):
    """Its few passes compute the same loss and gradients, targets left out included. Negative control: no one_hot."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(2, 300, 64), torch.randn(1000, 64) / 8, torch.randint(0, 1000, (2, 300))
    targets[0, 5:50] = -100

    def found(add_loss):
        monkeypatch.setattr(ops, "add_loss", add_loss)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = ops.cross_entropy_in_pieces(*leaves, targets)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def without_one_hot(total, logits, *rest):
        logits.copy_(logits.softmax(-1))

    rounding = 1e-6 if dtype == torch.float32 else 5e-3
    cpu, gpu, wrong = map(found, (ops.add_loss, ops.add_loss_on_cuda, without_one_hot))
    for a, b, c in zip(cpu, gpu, wrong):
        assert (a - b).abs().max() <= rounding * a.abs().max() < (a - c).abs().max()


def test_without_gradients_the_loss_is_one_product():
    """Under no_grad the weights still say requires_grad; an evaluation that believed them would take three times as
    long, and a second matrix of the embedding's size. Negative control: with gradients there are three products."""
    x, weight = torch.randn(1, 40, 16), torch.randn(300, 16, requires_grad=True)
    targets = torch.randint(0, 300, (1, 40))
    counts = []
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            ops.cross_entropy_in_pieces(x, weight, targets)
        counts.append(counter.get_total_flops() // (2 * 40 * 16 * 300))
    assert counts == [1, 3]
