"""model.py without transformers: counts, initialisation, RoPE's tables, what a position may see.

The comparison with transformers, part by part, is tests/test_parity.py.
"""

import copy
import math
import types

from lib.settings import UserError

import pytest
import torch
from conftest import TINY, tiny

import model as smol
from model import PRESETS, SmolLM2, SmolLM2Config, rope_tables


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
    """The tables of RoPE end there: a slice of them would come out shorter than the input."""
    model = tiny()
    model(torch.zeros(1, 64, dtype=torch.int64))
    for T, start in ((65, 0), (1, 64)):
        with pytest.raises(UserError, match="context of 64"):
            model(torch.zeros(1, T, dtype=torch.int64), start=start)


WRONG = [
    dict(num_key_value_heads=4), dict(head_dim=7), dict(hidden_size=0), dict(vocab_size="many"), dict(vocab_size="512"),
    dict(vocab_size=True), dict(vocab_size=None), dict(num_hidden_layers=1.5), dict(num_hidden_layers=10**9),
    dict(max_position_embeddings=10**9), dict(hidden_size=10**9), dict(num_attention_heads=10**9),
    dict(rope_theta=math.nan), dict(rope_theta=[1]), dict(rms_norm_eps="x"), dict(rms_norm_eps=-1e-5),
    dict(initializer_range=math.inf), dict(initializer_range=0.0), dict(tie_word_embeddings="false"),
    dict(tie_word_embeddings=1), dict(bos_token_id=True), dict(pad_token_id="0"), dict(eos_token_id=True),
    dict(eos_token_id=512), dict(eos_token_id=-1), dict(eos_token_id=[0, None]), dict(eos_token_id="</s>"),
]  # fmt: skip


def config(**changes):
    return SmolLM2Config(**({f: TINY[f] for f in SmolLM2Config.__dataclass_fields__ if f in TINY} | changes))


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_impossible_shapes_are_refused_by_name(wrong):
    """Whatever a config.json may hold: wrong types, numbers that are none, sizes that would fill the memory."""
    with pytest.raises(UserError, match=next(iter(wrong))):
        config(**wrong)


def test_sizes_that_are_too_large_together_are_refused():
    """Each within its bound, but a table of gigabytes, or more weights than any machine holds."""
    for wrong in (dict(max_position_embeddings=2**20, head_dim=128), dict(hidden_size=2**20, intermediate_size=2**20)):
        with pytest.raises(UserError, match="beyond any model"):
            config(**wrong)


def test_what_released_models_hold_is_taken():
    """A list of end tokens, an empty one, none; a pad id outside the vocabulary; theta as a whole number."""
    for fine in (dict(eos_token_id=[0, 2]), dict(eos_token_id=[]), dict(eos_token_id=None), dict(pad_token_id=-1)):
        config(**fine)
    assert config(rope_theta=10000, max_position_embeddings=2**20).rope_theta == 10000


def test_rope_tables_are_computed_on_the_cpu():
    """A GPU's power function rounds otherwise; a model has the same tables wherever it was built."""
    with torch.device("meta"):  # stands for another device: what follows it has no numbers
        cos, sin = rope_tables(config())
    assert cos.device.type == sin.device.type == "cpu" and torch.equal(cos, tiny().rotary.cos)


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("T, start", [(1, 0), (12, 0), (1, 9), (7, 5), (600, 0), (70, 600)])
def test_attention_is_its_formula(H, K, T, start):
    """Values and gradients of PyTorch's kernels against the formula, written out. The gradients of keys and values are
    sums over all queries, up to 25 at the longest, and rounding grows with them (7e-5 on an EPYC without AVX-512)."""
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, start + T, 8), torch.randn(2, K, start + T, 8)

    def formula(q, k, v, start):
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        future = torch.ones(T, start + T, dtype=torch.bool).triu(start + 1)
        return (q @ k.mT / 8**0.5).masked_fill(future, -torch.inf).softmax(-1) @ v

    sides = []
    for way in (formula, smol.attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = way(*leaves, start)
        sides.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)))
    sizes = (1, 1, *(max(1, float(a.abs().max())) for a in sides[0][2:]))
    assert all((a - b).abs().max() < 1e-5 * size for a, b, size in zip(*sides, sizes))
    if T > 1:  # negative control: each query sees one key too few
        assert (smol.attend(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], start) - sides[0][0][:, :, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("T, start", [(20, 0), (7, 13), (1, 19)])
def test_repeated_keys_are_shared_keys(T, start, monkeypatch):
    """Where the kernel takes no groups, keys and values are repeated; the result is that of the shared ones."""
    q, k, v = torch.randn(2, 6, T, 8), torch.randn(2, 2, start + T, 8), torch.randn(2, 2, start + T, 8)
    shared, seen = smol.attend(q, k, v, start), []
    real = smol.F.scaled_dot_product_attention
    monkeypatch.setattr(smol, "takes_groups", lambda q, mask: False)
    monkeypatch.setattr(
        smol.F,
        "scaled_dot_product_attention",
        lambda q, k, v, *a, **b: seen.append(k.size(1)) or real(q, k, v, *a, **b),
    )
    repeated = smol.attend(q, k, v, start)
    assert seen == [6] and (repeated - shared).abs().max() < 1e-6
    monkeypatch.setattr(smol, "takes_groups", lambda q, mask: True)
    assert torch.equal(smol.attend(q, k, v, start), shared) and seen == [6, 2]


def test_keys_are_shared_only_where_flash_attention_runs(monkeypatch):
    """A mask, fp32 or an old GPU: elsewhere PyTorch would write out the T x S scores."""
    gpu = types.SimpleNamespace(major=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)

    def shares(dtype, mask=None, kind="cuda"):
        return smol.takes_groups(types.SimpleNamespace(device=torch.device(kind), dtype=dtype), mask)

    assert shares(torch.bfloat16) and shares(torch.float16) and shares(torch.float32, "a mask", "cpu")
    assert not shares(torch.float32) and not shares(torch.bfloat16, "a mask")
    gpu.major = 7
    assert not shares(torch.float16)
