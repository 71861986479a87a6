"""model.py and what lies around it, without transformers: counts, initialisation, the two ways of attention, the loss,
int8, files, and which script imports which.

The comparison with transformers, part by part, is tests/test_parity.py.
"""

import ast
import copy
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY

import checkpoint
import ops
from checkpoint import config_from_dict, from_pretrained, save_pretrained
from config import UserError
from device import compile_for_generation
from files import atomic, read_json, write_json
from model import PRESETS, KVCache, SmolLM2, SmolLM2Config, attend_fused
from quantize import Int8Embedding, Int8Linear, int8_rows, quantize


def tiny(**changes):
    torch.manual_seed(0)
    return SmolLM2(config_from_dict({"model_type": "llama"} | TINY | changes)).eval()


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


@pytest.mark.parametrize(
    "wrong",
    [dict(num_key_value_heads=4), dict(head_dim=7), dict(hidden_size=0), dict(vocab_size="many"),
     dict(num_hidden_layers=1.5)],
)  # fmt: skip
def test_impossible_shapes_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SmolLM2Config(**({f: TINY[f] for f in SmolLM2Config.__dataclass_fields__ if f in TINY} | wrong))


# ----------------------------------------------------------------------------------------------------------------------
# int8


def test_int8_rows_are_within_half_a_step():
    """No row needs more than 127 steps and no weight is off by more than half of one, plus nothing for the scale."""
    weight = torch.randn(64, 48) * torch.logspace(-4, 2, 64)[:, None]
    weight[5] = 0
    q, scale = int8_rows(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16 and q.abs().max() <= 127
    assert ((q.float() * scale.float()[:, None] - weight).abs() <= 0.5001 * scale.float()[:, None]).all()


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_widened_int8_is_the_plain_product(rows, dtype, tolerance):
    """Few rows or many: the product with the matrix that the int8 numbers and scales stand for; the embedding too."""
    q, scale = int8_rows(torch.randn(40, 48))
    weight = q.float() * scale.float()[:, None]
    x = torch.randn(rows, 48).to(dtype)
    plain, found = x.float() @ weight.T, Int8Linear(q, scale)(x)
    allowed = tolerance * float(plain.std())
    assert found.shape == (rows, 40) and (found.float() - plain).abs().max() < allowed
    shifted = Int8Linear(q, scale.roll(1))(x)  # negative control: each row with its neighbour's scale
    assert (shifted.float() - plain).abs().max() > allowed
    ids = torch.randint(0, 40, (2, rows))
    assert torch.equal(Int8Embedding(q, scale)(ids), F.embedding(ids, weight.to(torch.bfloat16)))


@pytest.mark.parametrize("tied", [True, False])
def test_int8_model_is_near_in_one_pass_and_token_by_token(tied):
    """Its logits are near those of the exact model, whether it reads many tokens at once or few."""
    model = tiny(tie_word_embeddings=tied)
    ids = torch.randint(0, 512, (1, 40))
    exact, n = model(ids)[0], model.num_parameters()
    quantize(model)
    assert model.num_parameters() == n
    many, few = model(ids)[0].float(), torch.cat([model(ids[:, :i])[0].float()[:, -1:] for i in (1, 2, 3)], 1)
    scale = exact.std()
    assert (many - exact).abs().mean() < 0.05 * scale and (few - many[:, :3]).abs().max() < 0.1 * scale


def test_a_tied_int8_head_shares_the_numbers_of_the_embedding():
    """One matrix in memory and one parameter in the count; an untied head has a matrix of its own."""
    model = quantize(tiny(tie_word_embeddings=True))
    head, embedding = model.lm_head, model.embed_tokens
    assert head.weight is embedding.weight and head.scale.data_ptr() == embedding.scale.data_ptr()
    assert model.num_parameters()["total"] == tiny().num_parameters()["total"]
    model = copy.deepcopy(model)
    assert model.lm_head.weight is model.embed_tokens.weight, "a copy must not untie them"
    untied = quantize(tiny(tie_word_embeddings=False))  # negative control
    assert untied.lm_head.weight.data_ptr() != untied.embed_tokens.weight.data_ptr()
    assert untied.num_parameters()["total"] == model.num_parameters()["total"] + 512 * 48


def test_another_kind_of_quantization_is_refused_by_name():
    with pytest.raises(UserError, match="'int3': only 'int8'"):
        quantize(tiny(), "int3")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_compiled_decoding_is_the_same_model(kind):
    """Compiled, a product of one row is a sum; eager, it is a call of a library. The logits are the same."""
    plain = tiny().to(torch.float32 if kind == "float32" else torch.bfloat16)
    fast = copy.deepcopy(plain)
    if kind == "int8":
        quantize(plain)
        quantize(fast)
    compile_for_generation(fast)
    ids, found = torch.randint(3, 512, (1, 24)), []
    for model in (plain, fast):
        cache = KVCache(model.config, 1, dtype=model.dtype)
        with torch.inference_mode():
            steps = [model(ids[:, :7], cache=cache)[0][:, -1]]
            steps += [model(ids[:, i : i + 1], cache=cache, start=i)[0][:, -1] for i in range(7, 24)]
        found.append(torch.stack(steps).float())
    far = (found[0][1:] - found[1][:-1]).abs().mean()  # negative control: one position off
    near, allowed = (found[0] - found[1]).abs().mean(), 1e-6 if kind == "float32" else 0.02 * float(found[0].std())
    assert near < allowed < 0.1 * far


# ----------------------------------------------------------------------------------------------------------------------
# files


def test_atomic_leaves_old_or_new_and_no_litter(tmp_path):
    """If the body fails half way, the old content stays and the temporary file is removed."""
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), atomic(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]
    write_json(file, {"a": 2})
    assert read_json(file) == {"a": 2} and os.listdir(tmp_path) == ["x.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_an_oserror_and_leaves_the_old_weights(tmp_path, monkeypatch):
    """safetensors reports a full disk as an error class of its own; callers must be able to catch OSError."""
    model = tiny()
    save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path, metadata: real(tensors, "/dev/full", metadata))
    with torch.no_grad():
        model.norm.weight += 1
    with pytest.raises(OSError):
        save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_saved_and_loaded_is_bit_equal(tmp_path):
    """Config and logits, tied and untied; loaded as bf16, the tables of RoPE stay fp32."""
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)
        save_pretrained(model, tmp_path)
        again = from_pretrained(tmp_path)
        ids = torch.randint(0, 512, (2, 20))
        assert again.config == model.config and torch.equal(again(ids)[0], model(ids)[0])
        half = from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.rotary.cos.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# which script imports which

ORDER = "config files ops model quantize device checkpoint decode sample".split()  # each may import those before it
DATA = ["prepare", "dataloader"]
MAY_IMPORT = {name: ORDER[:i] for i, name in enumerate(ORDER)} | {
    "prepare": ["config", "files"],  # no torch: it must start at once
    "dataloader": ["config", "files", "prepare"],
    "train": ORDER + DATA,
    "verify_hf": ORDER + DATA + ["train"],
    "export_gguf": ORDER + DATA + ["train"],
    "app": ORDER + DATA + ["train"],
    "bench": ORDER + DATA + ["train", "export_gguf"],
}


def imported(source: str) -> set[str]:
    """The first part of every name that a module imports at its top level, also below an `if` or a `try` there."""
    found, nodes = set(), list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found


def forbidden_imports(name: str, source: str) -> set[str]:
    """The project's modules that `name` imports and may not."""
    return imported(source) & set(MAY_IMPORT) - set(MAY_IMPORT[name])


def test_no_script_imports_what_comes_after_it():
    """An import that turns back makes two files one: neither can be read, tested or started without the other."""
    files = {file.stem: file for file in ROOT.glob("*.py")} | {"config": ROOT / "config" / "__init__.py"}
    assert set(files) == set(MAY_IMPORT), "a script is missing in the table, or the table names one that is not there"
    for name, file in files.items():
        source = file.read_text(encoding="utf-8")
        assert not forbidden_imports(name, source), f"{name} imports {forbidden_imports(name, source)}"
        if name != "verify_hf":
            assert "transformers" not in imported(source), f"{name} imports transformers at the top"


@pytest.mark.parametrize(
    "name, source, found",
    [
        ("files", "import json\nfrom sample import generate", {"sample"}),
        ("ops", "import model as m, math", {"model"}),
        ("model", "import ops\nfrom config import UserError", set()),
        ("prepare", "try:\n    pass\nexcept ImportError:\n    import checkpoint", {"checkpoint"}),
        ("app", "class A:\n    import bench", {"bench"}),
        ("sample", "def main():\n    import train", set()),  # in a function it costs nothing before it is called
    ],
)
def test_control_imports(name, source, found):
    """The test above must see an import that turns back, wherever it stands at the top level."""
    assert forbidden_imports(name, source) == found


@pytest.mark.parametrize(
    "statement, absent, present",
    [("import prepare", "torch", "tokenizers"), ("import sample, train", "transformers", "torch")],
)
def test_what_starting_does_not_load(statement, absent, present):
    """torch takes over a second to import, and transformers several: who does not need one must not wait for it."""
    code = f"import sys; {statement}; print({absent!r} in sys.modules, {present!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stdout + done.stderr
