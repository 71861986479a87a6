"""
Parity with transformers, part by part and whole, over the family; and for each comparison a mistake it must notice.

The comparisons are verify_hf.py's own: each yields rows, and a row that is not ok makes the command fail. Here they
run on tiny random models. The negative controls break one thing on our side and name the rows that must then fail.
"""

import copy
import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="parity is measured against transformers")

from lib.settings import UserError  # noqa: E402

import torch  # noqa: E402
from conftest import TEXT, save_hf_directory, tiny_hf  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import checkpoint  # noqa: E402
import model as smol  # noqa: E402
import sample  # noqa: E402
import verify_hf  # noqa: E402
from checkpoint import config_from_dict, config_to_dict, from_pretrained, read_tokenizer, save_pretrained  # noqa: E402
from fast import (
    ops,  # noqa: E402
    quantize,  # noqa: E402
)
from model import PRESETS, KVCache, RotaryEmbedding, SmolLM2, SmolLM2Config  # noqa: E402
from prepare import train_bpe  # noqa: E402
from verify_hf import error, load_original, token_ids  # noqa: E402

TIGHT = 1e-5  # two layers, logits of about 5: measured 6e-6 against transformers, 5e-6 between its own attentions


def lively(**changes):
    """tiny_hf with norm weights that are not all one, so that leaving them out would show."""
    hf = tiny_hf(**changes)
    for p in hf.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0, 0.1)
    return hf


@pytest.fixture
def directory(tmp_path):
    return save_hf_directory(tmp_path / "model", lively())


@pytest.fixture
def sides(directory):
    """The same files on both sides: (transformers, ours, path)."""
    return both(directory)


def both(path):
    hf, loading = load_original(path)
    assert not loading, loading
    return hf, from_pretrained(path, dtype=torch.float32), path


def rows_of(hf, model, path, *checks, tmp=None):
    """The rows of the checks named, by name."""
    ids, exact = token_ids(model, 3, 48, 1), verify_hf.in_double(hf)
    far = token_ids(model, 1, model.config.max_position_embeddings, 3)
    everything = dict(
        architecture=lambda: verify_hf.architecture(hf, model),
        weights=lambda: verify_hf.weights(hf, model, [], path),
        parts=lambda: verify_hf.parts(hf, model, token_ids(model, 2, min(64, far.size(1)), 2)),
        logits=lambda: verify_hf.logits(hf, model, exact, ids),
        far=lambda: verify_hf.far_logits(hf, model, exact, far),
        gradients=lambda: verify_hf.gradients(hf, model, exact, ids[:2]),
        cache=lambda: verify_hf.cache(hf, model, exact, ids),
        greedy=lambda: verify_hf.greedy(hf, model, ids[:, :9]),
        tokenizer=lambda: verify_hf.tokenizer(path),
        round_trip=lambda: verify_hf.round_trip(hf, model, ids, tmp / "again"),
        bits=lambda: verify_hf.bits_per_byte(path, TEXT, "cpu"),
        precision=lambda: verify_hf.precision(path, verify_hf.hf_logits(exact, ids, "sdpa"), ids, "cpu"),
    )
    return [row for name in checks for row in everything[name]()]


def failed(rows) -> list[str]:
    return [row.name for row in rows if row.ok is False]


# ----------------------------------------------------------------------------------------------------------------------
# what must agree


def test_every_part_alone(sides):
    """RMSNorm, RoPE, attention, MLP and block, each on the same input as transformers' own module."""
    rows = rows_of(*sides, "parts")
    assert [row.name for row in rows[1:]] == ["RMSNorm", "RoPE", "attention", "MLP", "block", "last RMSNorm"]
    assert not failed(rows)
    assert all(float(row.cells[1]) <= 1e-6 for row in rows), rows


def test_architecture_weights_logits_loss_and_gradients(sides):
    """The whole model: every setting, every tensor, logits of one and three rows, both losses, every gradient."""
    rows = rows_of(*sides, "architecture", "weights", "logits", "gradients")
    assert not failed(rows)
    names = [row.name for row in rows]
    assert {"rope_theta", "tensors, by name", "loss, in pieces"} <= set(names)
    assert len([n for n in names if n.startswith("gradient of every parameter")]) == 2


def test_gradients_leave_nothing_behind(sides):
    """The check must not leave gradients or hooks that a later one would add to."""
    hf, model, path = sides
    first = rows_of(hf, model, path, "gradients")
    second = rows_of(hf, model, path, "gradients")
    assert [r.cells for r in first] == [r.cells for r in second]
    assert all(p.grad is None for p in model.parameters())


def test_cache_and_greedy_text(sides):
    """One prefill, chunks, token by token; prompts below, at and beyond the context; generate() on both sides."""
    rows = rows_of(*sides, "cache", "greedy")
    assert not failed(rows) and len(rows) == 12
    assert rows[-3].cells[:2] == rows[-2].cells[:2] == (3 * 55, 3 * 55)  # as many as a context of 64 leaves after 9


@pytest.mark.parametrize("B", [1, 3])
def test_unwritten_cache_rows_are_never_read(sides, B):
    """The room a cache keeps for later holds whatever it holds: NaN there must not reach a logit."""
    _, model, _ = sides
    ids = token_ids(model, B, 40, 0)
    cache, out = KVCache(model.config, B), []
    cache.reserve(64)
    for pair in cache.layers:
        for buffer in pair:
            buffer.fill_(torch.nan)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 12), (12, 13), (13, 40)):
            out.append(model(ids[:, start:end], cache=cache, start=start)[0])
        assert error(model(ids)[0], torch.cat(out, 1)) <= TIGHT


def test_a_later_token_changes_nothing_before_it(sides):
    """Causality, to the last bit, without a cache and inside a chunk that follows a cache."""
    _, model, _ = sides
    a = token_ids(model, 1, 30, 0)
    b = a.clone()
    b[0, 20] = (b[0, 20] + 1) % model.config.vocab_size
    for way in (lambda ids: model(ids)[0], lambda ids: verify_hf.cached_logits(model, ids, (7, 23))):
        with torch.no_grad():
            x, y = way(a), way(b)
        assert torch.equal(x[:, :20], y[:, :20])
        assert not torch.equal(x[:, 20:], y[:, 20:])


@pytest.mark.slow
def test_positions_up_to_8191(tmp_path):
    """The full context of the released models, in one layer: a base that is off tells most where angles are large."""
    hf, model, path = both(save_hf_directory(tmp_path / "m", lively(num_hidden_layers=1, max_position_embeddings=8192)))
    rows = rows_of(hf, model, path, "far", "parts")
    assert not failed(rows)
    assert {"positions 8184 to 8191, one by one", "RoPE tables, positions 0 to 8191"} <= {r.name for r in rows}


def test_round_trip(sides, tmp_path):
    """Saved by ours, read by both: bit-equal tensors and logits."""
    rows = rows_of(*sides, "round_trip", tmp=tmp_path)
    assert not failed(rows) and len(rows) == 5


def test_fewer_bits(sides):
    """bf16 and int8 stay within the errors that verify_hf.py allows; a bf16 norm is no worse than transformers'."""
    assert not failed(rows_of(*sides, "precision"))


def test_bits_per_byte_of_a_text(sides, monkeypatch):
    """int8 costs a text almost no bits; with scales a quarter too large it does, and the row fails."""
    _, model, path = sides
    rows = rows_of(*sides, "bits")
    assert not failed(rows) and [row.name for row in rows] == ["float32, 2,048 tokens", "bfloat16", "int8"]
    ids = read_tokenizer(path).encode(TEXT, add_special_tokens=False).ids[:2049]
    assert len(ids) == 2049, "the text is too short to check the number against"
    tokens = torch.tensor(ids)
    nats = model(tokens[:-1].view(-1, 64), tokens[1:].view(-1, 64))[1].item() * 2048
    size = len(read_tokenizer(path).decode(ids[1:]).encode())
    assert abs(float(rows[0].cells[0]) - nats / math.log(2) / size) < 1e-3
    monkeypatch.setattr(quantize, "int8_rows", wrong_scales(quantize.int8_rows))
    expect(rows_of(*sides, "bits"), ["int8"], ["bfloat16"])


def wrong_scales(int8_rows):
    """int8_rows with scales a quarter too large."""

    def altered(weight):
        q, scale = int8_rows(weight)
        return q, scale * 1.25

    return altered


def test_tokenizer(sides):
    """The ids of hard strings, and a row that says so where there is no tokenizer."""
    _, _, path = sides
    rows = rows_of(*sides, "tokenizer")
    assert not failed(rows) and len(rows) == 3
    (path / "tokenizer.json").unlink()
    (row,) = rows_of(*sides, "tokenizer")
    assert row.ok is None and row.name == "no tokenizer in this directory"


# ----------------------------------------------------------------------------------------------------------------------
# the family: head layouts, bases, files, formats


@pytest.mark.parametrize("shape", ["135M", "360M", pytest.param("1.7B", marks=pytest.mark.slow)])
def test_released_shapes(shape, tmp_path):
    """9/3, 15/5 and 32/32 heads at their real width and base; only depth, vocabulary, MLP and context are cut."""
    full = PRESETS[shape]
    config = replace(
        full, num_hidden_layers=1 + (full.hidden_size < 2000), vocab_size=512, max_position_embeddings=128,
        intermediate_size=768,
    )  # fmt: skip
    verify_hf.save_random_model(tmp_path, config, seed=0)
    hf, model, path = both(tmp_path)
    assert model.config.rope_theta == hf.config.rope_parameters["rope_theta"] == full.rope_theta
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (
        full.num_attention_heads, full.num_key_value_heads,
    )  # fmt: skip
    rows = rows_of(hf, model, path, "architecture", "weights", "parts", "logits", "far", "gradients", "greedy")
    assert not failed(rows)


def as_transformers_4(path):
    """Rewrite config.json with the keys that transformers 4 wrote (and the released SmolLM2 files have)."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config |= dict(rope_scaling=None, rope_interleaved=False, is_llama_config=True, transformers_version="4.40.1")
    del config["head_dim"]  # older files leave it to be derived
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("written_by", ["transformers 5", "transformers 4", "nanoSmol"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("files", ["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_kind_of_directory(tmp_path, written_by, dtype, files, tied):
    """config.json of either generation or ours, fp32 or bf16, one file or shards, with and without a head."""
    hf = lively(tie_word_embeddings=tied).to(getattr(torch, dtype))
    hf.save_pretrained(tmp_path, max_shard_size="40KB" if files == "shards" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (files == "shards")
    if written_by == "transformers 4":
        as_transformers_4(tmp_path)
    elif written_by == "nanoSmol":
        again = from_pretrained(tmp_path)
        for file in tmp_path.iterdir():
            file.unlink()
        save_pretrained(again, tmp_path)
    first = next(tmp_path.glob("*.safetensors"))
    with safe_open(first, framework="pt") as f:
        assert f.get_tensor(next(iter(f.keys()))).dtype == getattr(torch, dtype)
    hf, model, path = both(tmp_path)
    assert model.config.rope_theta == 100000.0 and model.config.tie_word_embeddings == tied
    assert not failed(rows_of(hf, model, path, "architecture", "weights", "logits"))


@pytest.mark.parametrize("eos", [2, [2, 0]])
def test_instruct_special_tokens(tmp_path, eos):
    """The Instruct models' bos 1, eos 2 (or a list) and pad 2 are read, kept by a round trip, and change no logit."""
    path = save_hf_directory(tmp_path / "m", lively(bos_token_id=1, eos_token_id=eos, pad_token_id=2))
    hf, model, path = both(path)
    assert model.config.eos_ids == {2, 0} if isinstance(eos, list) else {2}
    assert not failed(rows_of(hf, model, path, "architecture", "logits", "greedy", "round_trip", tmp=tmp_path))


def test_a_tied_head_written_twice(directory):
    """Some tools store the tied head as lm_head.weight as well: the same numbers are read, other numbers refused."""
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert not failed(rows_of(*both(directory), "weights", "logits"))
    tensors["lm_head.weight"][3, 5] += 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight is a different matrix"):
        from_pretrained(directory)


# ----------------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": {"type": "linear", "rope_theta": 1e5, "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta is missing"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_key_value_heads": 4}, "must be a multiple of num_key_value_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(directory, change, named):
    """A setting that is ignored makes a model that writes fluent nonsense; None here removes the key."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")) | change
    config = {k: v for k, v in config.items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as error:
        from_pretrained(directory)
    assert named in str(error.value)


def test_all_that_is_wrong_is_named_at_once():
    """One message names everything that has to change."""
    wrong = config_to_dict(SmolLM2Config(), torch.float32) | {"hidden_act": "relu", "mlp_bias": True}
    with pytest.raises(UserError, match="hidden_act='relu'.*mlp_bias=True"):
        config_from_dict(wrong)


@pytest.mark.parametrize("what", ["missing", "extra", "misshapen"])
def test_tensors_that_do_not_fit_are_refused_by_name(directory, what):
    """transformers warns and fills in random numbers; ours names the tensor and stops."""
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "extra":
        name = "model.layers.1.self_attn.k_proj.bias"
        tensors[name] = torch.zeros(16)
    else:
        tensors[name] = tensors[name][:8].contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        from_pretrained(directory)


# ----------------------------------------------------------------------------------------------------------------------
# negative controls: break one thing, and the rows named here must fail (and those beside them must not)


def expect(rows, fail=(), keep=()):
    """Every prefix in `fail` has rows, all failed; every prefix in `keep` has rows, none failed."""
    for prefixes, ok in ((fail, False), (keep, True)):
        for prefix in prefixes:
            found = [row.ok for row in rows if row.name.startswith(prefix)]
            assert found and all(o is ok for o in found), f"{prefix}: {found}, expected {ok}"


def test_control_wrong_theta(sides):
    """A base of 10000, the usual one, where the files say 100000."""
    hf, model, path = sides
    model.config = replace(model.config, rope_theta=10000.0)
    model.rotary = RotaryEmbedding(model.config)
    expect(rows_of(hf, model, path, "architecture"), ["rope_theta"], ["hidden_size", "parameters"])
    rows = rows_of(hf, model, path, "parts", "logits", "far", "gradients", "greedy")
    fail = ["RoPE tables", "attention", "block", "1 x 48", "3 x 48", "positions", "loss", "gradient", "3 prompts"]
    expect(rows, fail, ["RMSNorm", "MLP"])


def test_control_interleaved_rope(sides, monkeypatch):
    """Meta's pairing of neighbours instead of the checkpoint's split halves."""

    def interleaved(x, cos, sin):
        cos, sin = cos[..., : cos.size(-1) // 2], sin[..., : sin.size(-1) // 2]
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    monkeypatch.setattr(smol, "rotate", interleaved)
    monkeypatch.setattr(verify_hf, "rotate", interleaved)
    rows = rows_of(*sides, "parts", "logits", "greedy")
    assert next(row for row in rows if row.name == "RoPE").ok is False
    fail = ["attention", "block", "1 x 48", "3 x 48", "3 prompts", "the first prompt alone"]
    expect(rows, fail, ["RMSNorm", "MLP", "RoPE tables"])


def test_control_repeat_for_repeat_interleave(sides, monkeypatch):
    """Query head h must read key/value head h // G; tiling the heads gives it h % K."""

    def tiled(q, k, v, start, walls=None):
        G, S = q.size(1) // k.size(1), k.size(2)
        k, v = k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1)
        mask = torch.arange(S) <= torch.arange(start, S)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    monkeypatch.setattr(smol, "attend", tiled)
    rows = rows_of(*sides, "parts", "logits", "gradients")
    expect(rows, ["attention", "block", "1 x 48", "3 x 48", "loss", "gradient"], ["RMSNorm", "MLP", "RoPE"])


def test_control_norm_without_its_fp32_cast(sides, monkeypatch):
    """In fp32 nothing changes; in bf16 the sum of squares loses its digits."""

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    monkeypatch.setattr(smol.RMSNorm, "forward", forward)
    expect(rows_of(*sides, "parts", "logits", "precision"), ["RMSNorm of bf16"], ["MLP", "last RMSNorm", "1 x 48"])


def test_control_rope_tables_rounded_with_the_model(sides, monkeypatch):
    """model.to(bfloat16) casts buffers too, unless the module puts them back."""
    monkeypatch.setattr(smol.RotaryEmbedding, "_apply", torch.nn.Module._apply)
    expect(rows_of(*sides, "logits", "precision"), ["RoPE tables of a bf16 model"], ["1 x 48"])


def test_control_untied_head(sides):
    """A head of its own where the files tie it to the embedding."""
    hf, model, path = sides
    model.config = replace(model.config, tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    rows = rows_of(hf, model, path, "architecture", "weights")
    expect(rows, ["tie_word_embeddings", "parameters", "tensors, by name"], ["hidden_size"])
    expect(rows_of(hf, model, path, "parts", "logits"), ["1 x 48", "3 x 48"], ["attention", "block"])


@pytest.mark.parametrize("how", ["written one early", "rotated one late"])
def test_control_one_off_cache_position(sides, monkeypatch, how):
    """A cache that is off by one still gives plausible text. All is right without a cache, and in the first chunk."""
    if how == "written one early":
        update, attend = smol.update_cache, smol.attend
        monkeypatch.setattr(smol, "update_cache", lambda c, k, v, start: update(c, k, v, max(start - 1, 0)))
        monkeypatch.setattr(smol, "attend", lambda q, k, v, *_: attend(q, k, v, k.size(2) - q.size(2)))
    else:
        forward = SmolLM2.forward

        def late(self, *args, start=0, **kwargs):
            tables = self.rotary
            right = tables.cos, tables.sin
            if start:
                tables.cos, tables.sin = (t.roll(-1, 0) for t in right)
            try:
                return forward(self, *args, start=start, **kwargs)
            finally:
                tables.cos, tables.sin = right

        monkeypatch.setattr(SmolLM2, "forward", late)
    rows = rows_of(*sides, "logits", "cache", "far")
    fail = ["chunks of", "token by token", "a context of 32", "positions 56 to 63, one", "positions 56 to 63, cached"]
    expect(rows, fail, ["1 x 48", "3 x 48", "one prefill", "positions 0 to 31", "positions 40 to 47"])


def test_control_a_chunk_that_sees_ahead(sides, monkeypatch):
    """No mask where something is cached: that is right for one token at a time, and wrong for a chunk."""

    def ahead(q, k, v, start, walls=None):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=start == 0 and q.size(2) > 1,
                                                                enable_gqa=True)  # fmt: skip

    monkeypatch.setattr(smol, "attend", ahead)
    rows = rows_of(*sides, "logits", "cache", "far")
    keep = ["1 x 48", "one prefill", "token by token", "positions 56 to 63, one"]
    expect(rows, ["chunks of", "positions 56 to 63, cached"], keep)


@pytest.mark.parametrize("what", ["scaled", "lost"])
def test_control_gradients(sides, monkeypatch, what):
    """One parameter whose gradient is a thousandth off, or that gets none; the loss does not show it."""
    _, model, _ = sides
    weight = model.layers[1].mlp.up_proj.weight
    if what == "scaled":
        weight.register_hook(lambda grad: grad * 1.001)  # verify_hf's own hook runs after this one
    else:
        forward = smol.MLP.forward
        monkeypatch.setattr(
            smol.MLP,
            "forward",
            lambda self, x: forward(self, x) if self is not model.layers[1].mlp else no_grad_up(self, x),
        )
    rows = rows_of(*sides, "gradients")
    expect(rows, ["gradient"], ["loss"])
    assert all("layers.1.mlp.up_proj.weight" in row.note for row in rows if row.ok is False)


def no_grad_up(mlp, x):
    up = torch.nn.functional.linear(x, mlp.up_proj.weight.detach())
    return mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * up)


def test_control_loss_in_pieces(sides, monkeypatch):
    """A loss averaged over the masked targets too."""
    loss = ops.cross_entropy_in_pieces
    monkeypatch.setattr(ops, "cross_entropy_in_pieces", lambda x, w, t: loss(x, w, t) * (t != -100).float().mean())
    expect(rows_of(*sides, "gradients"), ["loss, in pieces"], ["loss, from the logits"])


def test_control_second_best_token(sides, monkeypatch):
    """A sampler that does not take the likeliest token, though every logit is right."""
    monkeypatch.setattr(sample, "next_token", lambda logits, *a, **k: logits.topk(2).indices[:, 1])
    expect(rows_of(*sides, "logits", "greedy"), ["3 prompts"], ["1 x 48"])


def test_control_tensors(sides):
    """One number of one tensor, changed by its last bit."""
    hf, model, path = sides
    with torch.no_grad():
        weight = model.layers[0].self_attn.v_proj.weight
        weight[2, 3] = torch.nextafter(weight[2, 3], torch.tensor(torch.inf))
    rows = rows_of(hf, model, path, "weights")
    expect(rows, ["of these bit-equal"], ["tensors, by name"])
    assert "model.layers.0.self_attn.v_proj.weight" in rows[-1].note


def test_control_what_transformers_did_not_find(sides):
    """A tensor that transformers filled with random numbers is a failed row, whatever the rest says."""
    hf, model, path = sides
    rows = list(verify_hf.weights(hf, model, ["missing_keys: lm_head.weight"], path))
    expect(rows, ["tensors missing"], ["tensors, by name"])


def test_control_a_save_that_rounds(sides, monkeypatch, tmp_path):
    """Weights written in bf16, which no logit within a tolerance would show for certain."""
    rounded = lambda model, path: save_pretrained(copy.deepcopy(model).to(torch.bfloat16).to(torch.float32), path)
    monkeypatch.setattr(checkpoint, "save_pretrained", rounded)
    expect(rows_of(*sides, "round_trip", tmp=tmp_path), ["tensors", "logits"], ["config.json"])


def test_control_int8_scale(sides, monkeypatch):
    """Scales a quarter too large: text would still look like text."""
    monkeypatch.setattr(quantize, "int8_rows", wrong_scales(quantize.int8_rows))
    expect(rows_of(*sides, "precision"), ["int8"], ["bf16", "RMSNorm of bf16"])


def test_control_tokenizer_without_digits(sides, monkeypatch):
    """The step that transformers' GPT2Tokenizer drops. On our side the row fails; in AutoTokenizer it is a note."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    _, _, path = sides  # a vocabulary with a token for two spaces: there the step makes a difference
    train_bpe([TEXT + "if 1:\n    print(2)\n        3  4\n" * 99], 512).save(str(path / "tokenizer.json"))

    def without_digits(path):
        tokenizer = read_tokenizer(path)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer

    class Stub:
        def from_pretrained(path, **_):
            return PreTrainedTokenizerFast(tokenizer_object=without_digits(path))

    with monkeypatch.context() as m:
        m.setattr(verify_hf, "AutoTokenizer", Stub)
        rows = rows_of(*sides, "tokenizer")
        assert [row.ok for row in rows] == [True, True, None] and "'a  12'" in rows[-1].note
    monkeypatch.setattr(checkpoint, "read_tokenizer", without_digits)
    expect(rows_of(*sides, "tokenizer"), ["against tokenizers", "against PreTrained"])


def test_control_nan():
    """A NaN compares false with everything; it must not slip through a maximum."""
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, torch.nan, 0.0]] * 2)
    assert error(good, good) == 0 and error(good, bad) == verify_hf.measure(good + 1, bad) == torch.inf
    assert verify_hf.judged("", 1.0, torch.inf).ok is verify_hf.judged("", 1.0, torch.nan).ok is False
