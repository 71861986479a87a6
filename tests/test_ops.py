"""fast/: each faster equivalent against its plain version, and how speed_up() attaches them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import fast
import model as smol
from fast import ops, speed_up
from fast.quantize import quantize
from model import KVCache, SmolLM2


@pytest.mark.parametrize("rows", [1, 7, 512])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_pieces_is_the_loss(rows, tied, monkeypatch):
    """Value and every gradient equal the plain ones up to rounding, with ignored targets, whatever the size of the
    pieces. A processor may add in any order, so a few units in the last place of the value are allowed."""
    model = speed_up(tiny(tie_word_embeddings=tied))
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
    """A bf16 loss has only two or three digits, too few to log. This one is fp32, and within 1e-2 of the exact loss."""
    model = speed_up(tiny())
    ids, targets = torch.randint(0, 512, (2, 60)), torch.randint(0, 512, (2, 60))
    exact = model(ids, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        pieces = model(ids, targets, loss_only=True)[1]
        plain = model(ids, targets)[1]
    assert pieces.dtype == plain.dtype == torch.float32
    assert 0 < abs(float(pieces - exact)) < 1e-2 and abs(float(pieces - plain)) < 1e-3


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_long_prompt_may_go_through_fp32(kind, monkeypatch):
    """If fp32 products are faster, a bfloat16 or int8 model runs its blocks in fp32, and gets closer to the exact
    logits than in bfloat16, also in chunks with a cache."""
    model, exact = speed_up(tiny(max_position_embeddings=128)), tiny(max_position_embeddings=128)
    model.to(torch.bfloat16) if kind == "bfloat16" else quantize(model)
    for ours, theirs in zip(exact.modules(), model.modules()):
        if hasattr(ours, "weight"):
            ours.weight.data = theirs.weight.float()
        if hasattr(theirs, "scale"):
            ours.weight.data *= theirs.scale.float()[:, None]
    ids = torch.randint(0, 512, (1, 128))

    def error(faster: bool):
        monkeypatch.setattr(ops, "bfloat16_speed", lambda: 0.5 if faster else 1.0)
        monkeypatch.setattr(ops, "WIDEN_FROM", 64)
        cache = KVCache(model.config, 1, dtype=torch.bfloat16)
        parts = [model(ids[:, a : a + 64], cache=cache, start=a)[0] for a in (0, 64)]
        found = [model(ids)[0], torch.cat(parts, dim=1)]
        assert all(f.dtype == torch.bfloat16 for f in found)
        return [float((f.float() - exact(ids)[0]).square().mean().sqrt()) for f in found]

    with torch.no_grad():
        narrow, wide = error(False), error(True)
        assert max(wide) < 0.7 * min(narrow)
        x = torch.empty(1, 128, 1, dtype=torch.bfloat16)
        assert ops.worth_widening(x) and not ops.worth_widening(x[:, :63])
        with torch.autocast("cpu", torch.bfloat16):
            assert not ops.worth_widening(x), "autocast casts the weights itself and caches the result"


def test_swiglu_in_place_is_that_of_model_py():
    """Without gradients it overwrites its own products and gives the same numbers; with gradients it is model.py's."""
    plain, fast = tiny().layers[0].mlp, speed_up(tiny()).layers[0].mlp
    x, grads = torch.randn(2, 5, 48), []
    for mlp in (plain, fast):
        mlp(x).square().sum().backward()
        grads.append(mlp.gate_proj.weight.grad)
    assert torch.equal(*grads)
    with torch.no_grad():
        assert (plain(x) - fast(x)).abs().max() < 1e-6
        fast.gate_proj, fast.up_proj = fast.up_proj, fast.gate_proj
        assert (plain(x) - fast(x)).abs().max() > 1e-3, "negative control: gate and up are swapped"


def test_a_faster_model_can_be_copied_and_saved():
    """speed_up() may be called twice; names, copies and pickles of the model stay as they are, and copies are fast."""
    plain, model = tiny(), speed_up(speed_up(tiny()))
    assert list(plain.state_dict()) == list(model.state_dict()) and isinstance(model, SmolLM2)
    ids = torch.randint(0, 512, (1, 9))
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        other = copied(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01)  # a copy that shares weights with the original would change
        assert torch.equal(other(ids)[0], plain(ids)[0]) and other.make_decoder
        plain.load_state_dict(model.state_dict())
    assert torch.equal(speed_up(model).to(torch.bfloat16)(ids)[0], plain.to(torch.bfloat16)(ids)[0])


@pytest.mark.parametrize("part", ["MLP", "loss"])
def test_what_is_changed_in_model_py_is_used(part, monkeypatch, capsys):
    """After a change of the MLP or the loss there, training and sampling must not use the old one. decode.c refuses a
    model without the parts that it knows."""
    if part == "MLP":
        monkeypatch.setattr(smol.MLP, "forward", lambda self, x: self.down_proj(self.up_proj(x).relu().square()))
    else:
        smooth = lambda x, targets: F.cross_entropy(x.float().flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        monkeypatch.setattr(smol, "cross_entropy", smooth)
    fast.changed.cache_clear()
    plain, model = tiny(), speed_up(tiny())
    ids, targets = torch.randint(0, 512, (2, 9)), torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        for a, b in zip(plain(ids, targets), model(ids, targets)):
            assert torch.equal(a, b)
        a, b = plain(ids, targets, loss_only=True)[1], model(ids, targets, loss_only=True)[1]
        assert torch.allclose(a, b, rtol=1e-6)  # other threads may add in another order
    assert f"the {part} in model.py is not the one in fast/" in capsys.readouterr().err
    if part == "MLP":
        del model.layers[0].mlp.gate_proj
        assert model.make_decoder(1) is None
    monkeypatch.undo()
    fast.changed.cache_clear()
    assert fast.changed() == set()


def loss_and_gradients(x, weight, targets, dtype, factor: float = 1.0):
    """Return the loss and its gradients of x and weight, scaled by `factor` on the way."""
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = ops.cross_entropy_in_pieces(*leaves, targets)
    return [loss.detach(), *(g / factor for g in torch.autograd.grad(loss * factor, leaves))]


def worst_row(grad, exact) -> float:
    """Return the largest error of a row, relative to the row."""
    return float(((grad.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.slow
def test_float16_gradients_survive_a_large_vocabulary():
    """At 16,384 tokens most probabilities divided by 2,048 are below what float16 can hold, so the division must come
    after loss scaling. Each row of the embedding's gradient, the rows of absent tokens included, and each row of the
    hidden gradient is within 1% of fp32's. Negative control: dividing first loses the absent tokens' rows."""
    N, C, V, scale = 2048, 64, 16384, 65536.0
    x, weight = torch.randn(1, N, C), torch.randn(V, C) / 8
    targets = torch.randint(0, 1000, (1, N))  # 15,384 tokens are absent

    _, exact_x, exact_w = loss_and_gradients(x, weight, targets, torch.float32)
    _, half_x, half_w = loss_and_gradients(x, weight, targets, torch.float16, scale)
    assert worst_row(half_w, exact_w) < 0.01 and worst_row(half_x[0], exact_x[0]) < 0.01
    logits_grad = ((x[0] @ weight.T).softmax(-1) / N).half()
    divided_first = logits_grad.T.float() @ x[0]
    assert worst_row(divided_first[1000:], exact_w[1000:]) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_of_a_gpu_is_that_of_a_cpu(monkeypatch, dtype):
    """add_loss_on_cuda() gives the same loss and gradients, also with ignored targets. Negative control: no one_hot."""
    x, weight, targets = torch.randn(2, 300, 64), torch.randn(1000, 64) / 8, torch.randint(0, 1000, (2, 300))
    targets[0, 5:50] = -100

    def found(add_loss):
        monkeypatch.setattr(ops, "add_loss", add_loss)
        return loss_and_gradients(x, weight, targets, dtype)

    def without_one_hot(total, logits, *rest):
        logits.copy_(logits.softmax(-1))

    rounding = 1e-6 if dtype == torch.float32 else 5e-3
    cpu, gpu, wrong = map(found, (ops.add_loss, ops.add_loss_on_cuda, without_one_hot))
    for a, b, c in zip(cpu, gpu, wrong):
        assert (a - b).abs().max() <= rounding * a.abs().max() < (a - c).abs().max()
