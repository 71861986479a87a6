"""model.py without transformers: parameter counts, initialization, RoPE tables, the attention mask.

The comparison with transformers, part by part, is tests/test_parity.py.
"""

import copy
import math
import types

import pytest
import torch
from conftest import TINY, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import model as smol
from model import PRESETS, KVCache, RotaryEmbedding, SmolLM2, SmolLM2Config


@pytest.mark.parametrize("name, count", [("135M", 134_515_008), ("360M", 361_821_120), ("1.7B", 1_711_376_384)])
def test_the_released_shapes_have_the_released_counts(name, count):
    """A tied head is one matrix; counting it twice or untying it would show here."""
    with torch.device("meta"):
        model = SmolLM2(PRESETS[name])
    n = model.num_parameters()
    assert n["total"] == count == n["embeddings"] + n["backbone"] == sum(p.numel() for p in model.parameters())


def test_every_parameter_is_initialised_by_rule():
    """Matrices have std initializer_range, over sqrt(2 layers) if they write to the residual stream; norms are 1."""
    model = tiny(hidden_size=192, intermediate_size=256, head_dim=32)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = TINY["initializer_range"] / (math.sqrt(2 * 2) if residual else 1)
            assert abs(float(p.std()) / expected - 1) < 0.05, name


def test_tied_stays_tied():
    """After copies and casts, too: the head is the embedding by construction, not by assignment."""
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


def test_positions_beyond_the_context_are_refused():
    """The RoPE tables end there, so a slice of them would be shorter than the input."""
    model = tiny()
    model(torch.zeros(1, 64, dtype=torch.int64))
    for T, start in ((65, 0), (1, 64)):
        with pytest.raises(ValueError, match="context is 64"):
            model(torch.zeros(1, T, dtype=torch.int64), start=start)


def config(**changes):
    return SmolLM2Config(**({f: TINY[f] for f in SmolLM2Config.__dataclass_fields__ if f in TINY} | changes))


@pytest.mark.parametrize("wrong", [dict(num_key_value_heads=4), dict(head_dim=7)], ids=str)
def test_impossible_shapes_are_refused_by_name(wrong):
    """Six query heads cannot share four key/value heads, and RoPE needs pairs of dimensions."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


def test_rope_tables_are_computed_on_the_cpu():
    """A GPU's power function rounds differently; a model must have the same tables on whichever device it is built."""
    with torch.device("meta"):  # stands in for another device; a table on it has no values
        rotary = RotaryEmbedding(config())
    assert rotary.cos.device.type == rotary.sin.device.type == "cpu"
    assert torch.equal(rotary.cos, tiny().rotary.cos)
    with torch.inference_mode():
        rotary.at(slice(1), torch.device("meta"))
    assert not rotary.cos.is_inference(), "training must be able to use tables that generate() moved"


@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("T, start", [(1, 0), (12, 0), (1, 9), (7, 5), (600, 0), (70, 600)])
def test_attention_is_its_formula(H, K, T, start):
    """PyTorch's kernels give the values and gradients of the formula. The gradients of keys and values are sums over
    all queries, up to 25 for the longest input, and rounding grows with them (7e-5 on an EPYC without AVX-512)."""
    q, k, v = torch.randn(2, H, T, 8), torch.randn(2, K, start + T, 8), torch.randn(2, K, start + T, 8)
    past = torch.ones(T, start + T, dtype=torch.bool).tril(start)
    mask = past if T > 1 and start > 0 else None  # what SmolLM2.forward passes

    def formula(q, k, v, _):
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        return (q @ k.mT / 8**0.5).masked_fill(~past, -torch.inf).softmax(-1) @ v

    sides = []
    for way in (formula, smol.attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = way(*leaves, mask)
        sides.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)))
    sizes = (1, 1, *(max(1, float(a.abs().max())) for a in sides[0][2:]))
    assert all((a - b).abs().max() < 1e-5 * size for a, b, size in zip(*sides, sizes))
    if T > 1:  # negative control: each query sees one key too many
        wrong = smol.attend(q[:, :, :-1], k, v, past.roll(-1, 0)[:-1])
        assert (wrong - sides[0][0][:, :, :-1]).abs().max() > 1e-3


def test_all_layers_share_one_mask():
    """A chunk after cached tokens needs an attention mask; making one per layer would cost more than the attention."""
    model, masks = tiny(num_hidden_layers=3), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: masks.append(args[5]))
    cache = KVCache(model.config, 1)
    for start, chunk in ((0, [5, 6, 7]), (3, [8, 9]), (5, [10])):
        model(torch.tensor([chunk]), cache=cache, start=start)
    assert masks[:3] == [None] * 3 == masks[6:], "a whole pass is causal by default, and a single query sees all"
    assert masks[3] is masks[4] is masks[5] and masks[3].tolist() == [[True] * 4 + [False], [True] * 5]


@pytest.mark.parametrize(
    "major, dtype, masked, shared",
    [(8, torch.bfloat16, False, True), (8, torch.float16, False, True), (8, torch.float32, False, False),
     (8, torch.bfloat16, True, False), (7, torch.float16, False, False)],
)  # fmt: skip
def test_heads_share_keys_on_a_gpu_only_in_flash_attention(major, dtype, masked, shared, monkeypatch):
    """With a mask, in fp32 or on an old GPU, PyTorch would store the T x S scores; keys are repeated instead. No GPU
    is needed: fake tensors have only a device and a shape."""
    gpu, seen = types.SimpleNamespace(major=major), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    attention = lambda q, k, v, mask, is_causal, enable_gqa: seen.append((k.size(1), enable_gqa))
    monkeypatch.setattr(smol.F, "scaled_dot_product_attention", attention)
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, 4, 8, device="cuda", dtype=dtype) for heads in (6, 2))
        smol.attend(q, k, k, torch.ones(4, 4, device="cuda", dtype=torch.bool) if masked else None)
    assert seen == [(2, True) if shared else (6, False)]
