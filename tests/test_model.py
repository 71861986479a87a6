"""model.py, without transformers: counts, initialisation, the two ways of attention, the loss, int8, files.

The comparison with transformers, part by part, is tests/test_parity.py.
"""

import copy
import math
import os
import shutil

import pytest
import torch
from conftest import TINY

import model as m
from model import PRESETS, ModelError, SmolLM2, SmolLM2Config, atomic


def tiny(**changes):
    torch.manual_seed(0)
    return SmolLM2(SmolLM2Config.from_dict({"model_type": "llama"} | TINY | changes)).eval()


@pytest.mark.parametrize("name, count", [("135M", 134_515_008), ("360M", 361_821_120), ("1.7B", 1_711_376_384)])
def test_the_released_shapes_have_the_released_counts(name, count):
    """A tied head is one matrix; counting it twice or untying it would show here."""
    with torch.device("meta"):
        model = SmolLM2(PRESETS[name])
    n = model.num_parameters()
    assert n["total"] == count == n["embeddings"] + n["backbone"] == sum(p.numel() for p in model.parameters())


def test_every_parameter_is_initialised_by_rule():
    """Matrices with std initializer_range, those that write to the residual stream over sqrt(2 layers), norms 1."""
    model = tiny(hidden_size=192, intermediate_size=256, head_dim=32)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = TINY["initializer_range"] / (math.sqrt(2 * 2) if residual else 1)
            assert abs(float(p.std()) / expected - 1) < 0.05, name


def test_every_parameter_has_a_gradient():
    """A part that the loss does not reach would train as noise."""
    model = tiny(tie_word_embeddings=False)
    _, loss = model(torch.randint(0, 512, (2, 20)), torch.randint(0, 512, (2, 20)))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_tied_stays_tied():
    """Through copies, casts and moves: the head is the embedding by construction, not by assignment."""
    model = copy.deepcopy(tiny()).to(torch.float64)
    ids = torch.randint(0, 512, (1, 8))
    before = model(ids)[0]
    with torch.no_grad():
        model.embed_tokens.weight[300] += 1  # a row that no input reads
    assert not torch.equal(before[..., 300], model(ids)[0][..., 300])
    assert [n for n, _ in model.named_parameters() if "head" in n] == []


def test_nothing_leaks_from_the_future():
    """Changing token j leaves the logits before j bit-identical, and changes those from j on."""
    model, ids = tiny(), torch.randint(3, 512, (1, 30))
    changed = ids.clone()
    changed[0, 17] = 1
    a, b = model(ids)[0], model(changed)[0]
    assert torch.equal(a[:, :17], b[:, :17]) and not torch.equal(a[:, 17:], b[:, 17:])


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("T, start", [(1, 0), (12, 0), (1, 9), (7, 5)])
@pytest.mark.parametrize("block", [256, 5])
def test_both_ways_of_attention_agree(H, K, T, start, block, monkeypatch):
    """Blocks of plain products on a CPU, the fused kernel elsewhere: the same values and gradients."""
    monkeypatch.setattr(m, "QUERY_BLOCK", block)
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, start + T, 8), torch.randn(2, K, start + T, 8)
    sides = []
    for way in (m.attend_in_blocks, m.attend_fused):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = way(*leaves, start)
        sides.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*sides))
    if T > 1:  # negative control: the same keys one position off
        assert (m.attend_in_blocks(q[:, :, 1:], k, v, start + 1) - sides[1][0][:, :, :-1]).abs().max() > 1e-3


def test_rope_tables_stay_fp32_whatever_the_model_is_cast_to():
    """In bf16 positions 2047 and 2048 would be the same; model.to() must not round them."""
    model = tiny(max_position_embeddings=8192)
    expected = model.rotary.cos.clone(), model.rotary.sin.clone()
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        model.to(cast)
        assert model.rotary.cos.dtype == torch.float32
        assert torch.equal(model.rotary.cos, expected[0]) and torch.equal(model.rotary.sin, expected[1])
    frequency = 1.0 / (100000.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8))
    angle = (torch.tensor([1.0, 2047.0, 8191.0])[:, None] * frequency).double()
    assert (expected[0][[1, 2047, 8191], :4] - angle.cos()).abs().max() < 1e-6
    assert not any("rotary" in name for name in model.state_dict())


def test_positions_beyond_the_context_are_refused():
    model = tiny()
    model(torch.zeros(1, 64, dtype=torch.int64))
    for T, start in ((65, 0), (1, 64)):
        with pytest.raises(ModelError, match="context of 64"):
            model(torch.zeros(1, T, dtype=torch.int64), start=start)


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
    monkeypatch.setattr(m, "LOSS_ROWS", rows)
    none, pieces = model(ids, targets, logits_to_keep=-1)
    (3 * pieces).backward()  # a factor, as accumulation and loss scaling apply one
    assert none is None and pieces.dtype == torch.float32 and abs(float(plain - pieces)) < 1e-6
    for p, g in zip(model.parameters(), expected):
        assert (p.grad / 3 - g).abs().max() < 1e-6
    with torch.no_grad():
        assert abs(float(model(ids, targets, logits_to_keep=-1)[1] - plain)) < 1e-6
    targets[0, 11] = (targets[0, 11] + 1) % 512  # negative control: one target
    assert abs(float(model(ids, targets, logits_to_keep=-1)[1] - plain)) > 1e-4


def test_the_loss_in_pieces_under_autocast_is_a_fp32_loss():
    """A bf16 loss has two or three digits: unfit to log. Within 1e-2 of fp32, and of type fp32."""
    model = tiny()
    ids, targets = torch.randint(0, 512, (2, 60)), torch.randint(0, 512, (2, 60))
    exact = model(ids, targets)[1]
    with torch.autocast("cpu", torch.bfloat16):
        pieces = model(ids, targets, logits_to_keep=-1)[1]
        plain = model(ids, targets)[1]
    pieces.backward()
    assert pieces.dtype == plain.dtype == torch.float32 and all(
        p.grad.dtype == torch.float32 for p in model.parameters()
    )
    assert 0 < abs(float(pieces - exact)) < 1e-2 and abs(float(pieces - plain)) < 1e-3


def test_int8_rows_are_within_half_a_step():
    """No row needs more than 127 steps and no weight is off by more than half of one, plus nothing for the scale."""
    weight = torch.randn(64, 48) * torch.logspace(-4, 2, 64)[:, None]
    weight[5] = 0
    q, scale = m.int8_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16 and q.abs().max() <= 127
    assert ((q.float() * scale.float()[:, None] - weight).abs() <= 0.5001 * scale.float()[:, None]).all()


@pytest.mark.parametrize("tied", [True, False])
def test_int8_model_is_near_and_its_two_ways_agree(tied):
    """Few rows take the packed kernel, many the widened product; both must be the dequantised model's logits."""
    model = tiny(tie_word_embeddings=tied)
    ids = torch.randint(0, 512, (1, 40))
    exact, n = model(ids)[0], model.num_parameters()
    model.quantize()
    assert model.num_parameters() == n
    many, few = model(ids)[0].float(), torch.cat([model(ids[:, :i])[0].float()[:, -1:] for i in (1, 2, 3)], 1)
    scale = exact.std()
    assert (many - exact).abs().mean() < 0.05 * scale and (few - many[:, :3]).abs().max() < 0.1 * scale
    with pytest.raises(ModelError, match="only 'int8'"):
        tiny().quantize("int3")


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_compiled_decoding_is_the_same_model(kind):
    """One row, compiled, multiplies as a sum; eager by the library. Same logits from the same weights."""
    plain = tiny().to(torch.float32 if kind == "float32" else torch.bfloat16)
    fast = copy.deepcopy(plain)
    if kind == "int8":
        plain.quantize(), fast.quantize()
    fast.compile_for_generation()
    ids, found = torch.randint(3, 512, (1, 24)), []
    for model in (plain, fast):
        cache = m.KVCache(model.config, 1, dtype=model.dtype)
        with torch.inference_mode():
            steps = [model(ids[:, :7], cache=cache)[0][:, -1]]
            steps += [model(ids[:, i : i + 1], cache=cache, start=i)[0][:, -1] for i in range(7, 24)]
        found.append(torch.stack(steps).float())
    far = (found[0][1:] - found[1][:-1]).abs().mean()  # negative control: one position off
    near, allowed = (found[0] - found[1]).abs().mean(), 1e-6 if kind == "float32" else 0.02 * float(found[0].std())
    assert near < allowed < 0.1 * far


@pytest.mark.parametrize(
    "wrong",
    [dict(num_key_value_heads=4), dict(head_dim=7), dict(hidden_size=0), dict(vocab_size="many"),
     dict(num_hidden_layers=1.5)],
)  # fmt: skip
def test_impossible_shapes_are_refused_by_name(wrong):
    with pytest.raises(ModelError, match=next(iter(wrong))):
        SmolLM2Config(**({f: TINY[f] for f in SmolLM2Config.__dataclass_fields__ if f in TINY} | wrong))


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_atomic_leaves_old_or_new_and_no_litter(tmp_path):
    """If the body fails half way, the old content stays and the temporary file goes."""
    file = tmp_path / "x.json"
    m.write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), atomic(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert m.read_json(file) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]
    m.write_json(file, {"a": 2})
    assert m.read_json(file) == {"a": 2} and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_an_oserror_and_leaves_the_old_weights(tmp_path, monkeypatch):
    """safetensors reports a full disk as an error class of its own; callers must be able to catch OSError."""
    model = tiny()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    real = m.save_file
    monkeypatch.setattr(m, "save_file", lambda tensors, path, metadata: real(tensors, "/dev/full", metadata))
    with torch.no_grad():
        model.norm.weight += 1
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_saved_and_loaded_is_bit_equal(tmp_path):
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        again = SmolLM2.from_pretrained(tmp_path)
        ids = torch.randint(0, 512, (2, 20))
        assert again.config == model.config and torch.equal(again(ids)[0], model(ids)[0])
        half = SmolLM2.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.rotary.cos.dtype == torch.float32
