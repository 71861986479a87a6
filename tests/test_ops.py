"""ops.py: each function against its plain twin."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import ops
from model import attend_fused


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("T, start", [(1, 0), (12, 0), (1, 9), (7, 5)])
@pytest.mark.parametrize("block", [256, 5])
def test_both_ways_of_attention_agree(H, K, T, start, block, monkeypatch):
    """Blocks of plain products on a CPU, the fused kernel elsewhere: the same values and gradients."""
    monkeypatch.setattr(ops, "QUERY_BLOCK", block)
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, start + T, 8), torch.randn(2, K, start + T, 8)
    sides = []
    for way in (ops.attend_in_blocks, attend_fused):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = way(*leaves, start)
        sides.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*sides))
    if T > 1:  # negative control: the same keys one position off
        assert (ops.attend_in_blocks(q[:, :, 1:], k, v, start + 1) - sides[1][0][:, :, :-1]).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_pieces_is_the_loss(rows, tied, monkeypatch):
    """Value and every gradient equal the plain way's, with ignored targets, whatever the size of the pieces."""
    model = tiny(tie_word_embeddings=tied)
    ids, targets = torch.randint(0, 512, (2, 30)), torch.randint(0, 512, (2, 30))
    targets[0, :11] = -100
    _, plain = model(ids, targets)
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(ops, "LOSS_ROWS", rows)
    none, pieces = model(ids, targets, loss_only=True)
    (3 * pieces).backward()  # a factor, as accumulation and loss scaling apply one
    assert none is None and pieces.dtype == torch.float32 and abs(float(plain - pieces)) < 1e-6
    for p, g in zip(model.parameters(), expected):
        assert (p.grad / 3 - g).abs().max() < 1e-6
    with torch.no_grad():
        assert abs(float(model(ids, targets, loss_only=True)[1] - plain)) < 1e-6
    targets[0, 11] = (targets[0, 11] + 1) % 512  # negative control: one target
    assert abs(float(model(ids, targets, loss_only=True)[1] - plain)) > 1e-4


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
        assert (ops.swiglu(gate.clone(), up) - expected).abs().max() < 1e-6
        assert (ops.swiglu(up.clone(), gate) - expected).abs().max() > 0.1, "negative control: the roles are not alike"
