"""decode.c against model.py: the same logits from the same weights and the same cache, in fp32, bf16 and int8.

The reference is model.py in fp32 that rounds everything that decode.c rounds: the weights, for int8 also the inputs of
the matrix products, and keys and values to the dtype of the cache. Only the order of additions may differ.
"""

import copy
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny

import model as smol
import sample
from fast import decode, speed_up
from fast.decode import Decoder
from fast.quantize import int8_rows, quantize
from model import KVCache

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="decode.c needs a C compiler (cc, gcc or clang)"
)
IDS = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(1))


def rounded(x):
    """Round as decode.c's to_bytes() does: to 127 steps on either side of 0, for every 32 numbers."""
    blocks = F.pad(x, (0, -x.size(-1) % 32)).unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step.clamp(min=1e-30)).round() * step).flatten(-2)[..., : x.size(-1)]


def pair(kind: str, **changes):
    """Make a model in `kind`, and one in fp32 with exactly the same, already rounded, weights; for int8 it also rounds
    the inputs of its products."""
    model = speed_up(tiny(**changes))
    exact = copy.deepcopy(model)
    with torch.no_grad():
        for p in exact.parameters():
            if kind != "float32":
                p.copy_(p.to(torch.bfloat16).float())
            if kind == "int8" and p.dim() == 2:
                q, scale = int8_rows(p)
                p.copy_(q.float() * scale.float()[:, None])
    if kind != "float32":
        model.to(torch.bfloat16)
    if kind == "int8":
        for module in exact.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
        if exact.lm_head is None:
            exact.head = lambda x: F.linear(rounded(x), exact.embed_tokens.weight)
    return (quantize(model) if kind == "int8" else model), exact


def decoded(model, ids=IDS, start: int = 0, cache=None, check=True, threads: int = 2):
    """Compute logits (B T, V) of ids (B, T), one position at a time."""
    decoder, cache = Decoder(model, check), cache or KVCache(model.config, len(ids), dtype=model.dtype)
    decoder.pick_threads = lambda: threads  # from the first token on, however busy the machine
    return torch.cat([decoder(column, cache, start + n) for n, column in enumerate(ids.T)])


def forget():
    """Go back to the state of a new process: nothing loaded, no failure cached."""
    decode.library.cache_clear()
    decode.compile_error.cache_clear()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Copy decode.c into an empty folder, where nothing is compiled yet."""
    shutil.copy(decode.SOURCE, tmp_path)
    monkeypatch.setattr(decode, "SOURCE", tmp_path / "decode.c")
    forget()
    yield tmp_path
    forget()


SHAPES = {
    "grouped": {},
    "every head its own": dict(num_key_value_heads=6),
    "one for all": dict(num_attention_heads=5, num_key_value_heads=1, head_dim=20),
    "untied": dict(tie_word_embeddings=False),
    "wide": dict(hidden_size=192, intermediate_size=332, head_dim=64),  # as released models; 332 is no multiple of 64
    "no multiple of 16": dict(hidden_size=84, intermediate_size=140, head_dim=6, vocab_size=515),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_are_those_of_the_plain_pass(kind, shape, monkeypatch):
    """At all positions, starting with an empty cache. Any number of threads gives the same bits, since a single thread
    computes each row of a product. Negative control: the logits of the position before."""
    model, exact = pair(kind, **SHAPES[shape])
    dtype, attend = model.dtype, smol.attend
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol, "attend", lambda q, k, v, m: attend(q, k.to(dtype).float(), v.to(dtype).float(), m))
        expected = exact(IDS)[0][0]
    found, *others = (decoded(model, threads=threads) for threads in (1, 2, 3))  # the first compares with model.py, too
    assert found.dtype == torch.float32 and all(torch.equal(found, other) for other in others)
    error, spread = (found - expected).std(dim=-1), float(expected.std())
    assert error.min() < 1e-5 * spread
    # a number that its last bit rounds the other way changes everything computed after it
    assert error.max() < (0.05 if kind == "int8" else 2e-3) * spread
    assert (found[1:] - expected[:-1]).std(dim=-1).min() > 0.2 * spread


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", ["grouped", "no multiple of 16", "wide"])
@pytest.mark.parametrize("rows", [2, 8, 13, 16])
def test_several_texts_at_a_time_are_each_alone(rows, shape, kind):
    """Every row of a batch gets the logits that it gets alone, bit for bit on x86, in a group of 8 or in the remainder,
    also after more than one block of positions. Negative control: another row."""
    model, _ = pair(kind, **SHAPES[shape], max_position_embeddings=140)
    ids = torch.randint(3, 512, (rows, 140), generator=torch.Generator().manual_seed(4))
    cache = KVCache(model.config, rows, dtype=model.dtype)
    together = decoded(model, ids, cache=cache).unflatten(0, (140, rows)).transpose(0, 1)  # (B, T, V)
    for row in (0, rows // 2, rows - 1):
        alone = decoded(model, ids[row : row + 1])
        assert (together[row] - alone).abs().max() <= (0 if platform.machine() == "x86_64" else 1e-3)
        assert not torch.equal(together[row, 1:], together[(row + 1) % rows, 1:])
    with pytest.raises(IndexError, match="1 tokens for a cache of"):
        Decoder(model)(torch.tensor([5]), cache, 139)


@pytest.mark.parametrize("sharp", [1.0, 300.0])
def test_over_several_blocks_of_positions(sharp):
    """300 positions are three blocks, the last one short. With scores in the thousands nearly all attention weights are
    0, and the highest score may be in any block. Negative control: without the first position."""
    model, exact = pair("float32", max_position_embeddings=320)
    with torch.no_grad():
        for m in (model, exact):
            m.layers[0].self_attn.q_proj.weight.mul_(sharp)
    ids = torch.randint(0, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, other = exact(ids)[0][0], exact(ids[:, 1:])[0][0]
    found = decoded(model, ids)
    assert (found - expected).std() < 5e-5 and (found - expected).abs().max() < 1e-3
    assert (found[1:] - other).std() > 1e-3


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 3e38])
def test_a_diverged_int8_model_shows(wrong):
    """Rounding to bytes must keep NaN and infinity, which sample.py refuses. Numbers too small to divide by become 0.
    Negative control: the model as it is."""
    model, _ = pair("int8")
    assert decoded(model, IDS[:, :3], check=False).isfinite().all()
    model.layers[1].input_layernorm.weight.data[3] = 1e-38
    assert decoded(model, IDS[:, :3], check=False).isfinite().all()
    model.layers[1].input_layernorm.weight.data[3] = wrong
    assert not decoded(model, IDS[:, :3], check=False)[1:].isfinite().any()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_it_shares_the_cache_with_model_py(kind):
    """Each reads what the other wrote to the cache, also after the cache has grown."""
    model, _ = pair(kind)
    cache = KVCache(model.config, 1, dtype=model.dtype)
    ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(2))
    sample.prefill(model, ids[:, :30], cache)
    middle = decoded(model, ids[:, 30:50], 30, cache)
    with torch.inference_mode():
        end = model(ids[:, 50:], cache=cache, start=50)[0][0]
        expected = model(ids)[0][0]
    allowed = 2e-5 if kind == "float32" else 0.1 * float(expected.float().std())
    assert (middle - expected[30:50]).abs().max() < allowed and (end - expected[50:]).abs().max() < allowed
    decoder, small = Decoder(model), KVCache(model.config, 1, dtype=model.dtype)
    found = torch.cat([decoder(i, small, n) for n, i in enumerate(ids.T)])  # capacity 64, in one decoder
    assert (found - expected).abs().max() < allowed


def test_generate_uses_it_and_writes_the_same(hf_directory, monkeypatch):
    """On a CPU, up to MAX_ROWS rows go through decode.c; more rows, fp16, fast=False and a model that was loaded with
    fast=False do not. Greedy text is the same."""
    model, _ = sample.load(hf_directory)
    calls = []
    real = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, *a: calls.append(1) or real(self, *a))

    def text(model, prompt=(5, 6, 7), **more):
        calls.clear()
        steps = sample.generate(model, torch.tensor(prompt), 50, temperature=0, stop_ids=[], **more)
        return [i.tolist() for i in steps]

    fast = text(model)
    assert len(calls) == 49  # the first token comes from the prefill
    assert text(model, fast=False) == fast and not calls
    assert [i[:1] for i in text(model, [[5, 6, 7], [9, 8, 7]])] == fast and len(calls) == 49
    assert [i[:1] for i in text(model, [[5, 6, 7]] + [[9, 8, 7]] * decode.MAX_ROWS)] == fast and not calls
    text(copy.deepcopy(model).to(torch.float16))
    assert text(sample.load(hf_directory, fast=False)[0]) == fast and not calls


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_changed_model_is_noticed(kind, capsys, monkeypatch):
    """A changed model.py writes its own text, not that of the old architecture in decode.c, with one warning. Another
    model in the process is checked separately. Negative control: the unchanged model."""
    monkeypatch.setattr(decode, "warned", set())
    text = lambda m, **more: [i.tolist() for i in sample.generate(m, [5, 6, 7], 20, temperature=0, stop_ids=[], **more)]
    (same, _), (model, _) = pair(kind), pair(kind)
    text(same)
    assert decode.trusted[same] and not capsys.readouterr().err
    for layer in model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(F.relu(mlp.gate_proj(x)) * mlp.up_proj(x))
    plain = text(model, fast=False)
    assert plain == text(model) == text(model) and not decode.trusted[model]
    assert capsys.readouterr().err.count("warning: fast/decode.c and model.py disagree") == 1
    assert model.make_decoder(1) is None and same.make_decoder(1) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new",
    [("x * (x < 0 ? e : 1) / (1 + e)", "x > 0 ? x : 0"), ("= b * cos[i] + a", "= b * cos[i] - a"),
     ("group * G) * D;\n    float *parts", "group) * D;\n    float *parts"), ("* scale * weight[i]", "* scale")],
    ids=["SwiGLU", "RoPE", "heads", "RMSNorm"],
)  # fmt: skip
def test_a_changed_formula_in_c_is_noticed(elsewhere, old, new):
    """The check of the first token must notice each of these changes, for every kind of weights."""
    source = decode.SOURCE.read_text()
    assert source.count(old) == 1
    decode.SOURCE.write_text(source.replace(old, new))
    for kind in ("float32", "bfloat16", "int8"):
        model, _ = pair(kind)
        for layer in model.layers:
            layer.input_layernorm.weight.data[:24] *= 2  # trained norms are not all 1
        cache = KVCache(model.config, 1, dtype=model.dtype)
        sample.prefill(model, IDS[:, :20], cache)
        decoded(model, IDS[:, 20:21], 20, cache)
        assert not decode.trusted[model], kind


def test_autocast_is_no_disagreement(hf_directory):
    """train.py prints samples of fp32 weights while autocast computes products in bf16: decode.c stays exact."""
    model, _ = sample.load(hf_directory)
    with torch.no_grad():
        expected = model(IDS)[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (decoded(model) - expected).std() < 5e-6 < (model(IDS)[0][0] - expected).std()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are flags for x86")
@pytest.mark.parametrize("changed", ["-DPLAIN", "-mno-avx512vnni"])
def test_every_way_to_multiply_bytes_gives_the_same_bits(changed, elsewhere, monkeypatch):
    """Integer dot products are exact, so the processor's instruction for them, the one of older processors and plain C
    agree to the last bit. Negative control: bytes with a wrong sign do not."""
    shape = dict(hidden_size=192, intermediate_size=332)
    model, real = pair("int8", **shape)[0], subprocess.run
    expected = decoded(model)
    monkeypatch.setattr(subprocess, "run", lambda command, **k: real([*command, changed], **k))
    shutil.rmtree(elsewhere / "__pycache__")
    forget()
    assert torch.equal(decoded(model), expected)
    text = decode.SOURCE.read_text()
    decode.SOURCE.write_text(text.replace("(x >> 24);", "(x >> 24 & 255);").replace("_mm256_sign_epi8(b, a)", "b"))
    assert decode.SOURCE.read_text() != text
    forget()
    assert not torch.equal(decoded(pair("int8", **shape)[0], check=False), expected)


@pytest.mark.parametrize("source", [None, "this is not C"])
def test_without_a_compiler_model_py_writes_the_text(source, hf_directory, elsewhere, monkeypatch, capsys):
    """If there is no compiler, or decode.c does not compile, one line on stderr says so."""
    if source:
        decode.SOURCE.write_text(source)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(decode, "warned", set())
    model, _ = sample.load(hf_directory)
    for _ in range(2):
        assert len(list(sample.generate(model, [5, 6], 3, stop_ids=[]))) == 3
    said = capsys.readouterr().err
    assert said.count("note: using model.py instead of decode.c (slower)") == 1
    assert ("did not compile" if source else "no C compiler") in said


def test_no_memory_is_read_for_an_invalid_token():
    """decode.c does not check its arguments: an id that is one too large would read past the embedding."""
    model, _ = pair("float32")
    decoder, cache = Decoder(model), KVCache(model.config, 1)
    for token, position in ((512, 0), (-1, 0), (5, -1)):
        with pytest.raises(IndexError, match=rf"tokens \[{token}\] at position {position}"):
            decoder(torch.tensor([token]), cache, position)


def first_load(source):
    decode.SOURCE = Path(source)
    decode.library()


@pytest.mark.slow
def test_it_is_compiled_once_even_by_several_processes(elsewhere):
    """Four processes that start together all load it and leave one file. A changed source makes another file."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=first_load, args=(decode.SOURCE,)) for _ in range(4)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert [w.exitcode for w in workers] == [0] * 4
    assert len(list((elsewhere / "__pycache__").iterdir())) == 1
    with open(decode.SOURCE, "a") as f:
        f.write("/* changed */\n")
    forget()
    decode.library()
    assert len(list((elsewhere / "__pycache__").iterdir())) == 2


@pytest.mark.slow
def test_no_sanitizer_complains(elsewhere, tmp_path):
    """Reads and writes stay inside the tensors: decode.c runs under the address sanitizer, with sizes that are not
    multiples of 16."""
    run = tmp_path / "run.py"
    run.write_text(
        "import subprocess, sys; sys.path[:0] = sys.argv[1:3]\n"
        "real = subprocess.run\n"
        "subprocess.run = lambda c, **k: real([*c, '-fsanitize=address,undefined', '-fno-sanitize-recover'], **k)\n"
        "from test_decode import *; decode.SOURCE = Path(sys.argv[3])\n"
        "for kind in ('float32', 'bfloat16', 'int8'):\n"
        "    model = pair(kind, hidden_size=84, intermediate_size=140, head_dim=6, vocab_size=515)[0]\n"
        "    decoded(model)\n"
        "    decoded(model, IDS.expand(13, -1))\n"
        "print('clean')\n"
    )
    library = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_file():
        pytest.skip("the compiler comes without an address sanitizer")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, run, here.parent, here, decode.SOURCE], capture_output=True, text=True,
        env=os.environ | {"LD_PRELOAD": str(Path(library).resolve()), "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.endswith("clean\n"), done.stderr[-3000:]
