"""decode.c against model.py: the same logits from the same weights and the same cache, in fp32, bf16 and int8.

The reference for all is the plain forward pass in fp32 on what decode.c rounds, as it rounds it: the weights, for int8
the inputs of their products, too, keys and values to the dtype of the cache. Nothing else may differ but the
order of additions.
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

from lib.settings import UserError

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY

import model as smol
import sample
from checkpoint import config_from_dict
from fast import decode
from fast.decode import Decoder
from fast.quantize import int8_rows, quantize
from model import KVCache, SmolLM2

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="decode.c needs a C compiler (cc, gcc or clang)"
)
IDS = torch.randint(3, 512, (1, 40), generator=torch.Generator().manual_seed(1))


def rounded(x):
    """decode.c's to_bytes(): 127 steps on either side of 0 for every 32 numbers."""
    blocks = F.pad(x, (0, -x.size(-1) % 32)).unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step.clamp(min=1e-30)).round() * step).flatten(-2)[..., : x.size(-1)]


def pair(kind: str, **changes):
    """The model in `kind`, and in fp32 a model of exactly the same, already rounded, weights; for int8 it rounds what
    meets them."""
    torch.manual_seed(0)
    model = SmolLM2(config_from_dict({"model_type": "llama"} | TINY | changes)).eval()
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


def decoded(model, ids=IDS, start: int = 0, cache=None, check=True):
    """Logits (T, V) of ids (1, T), one token after the other."""
    decoder, cache = Decoder(model, check), cache or KVCache(model.config, 1, dtype=model.dtype)
    decoder.alone_took = math.inf  # all threads from the first token on, however busy the machine
    return torch.cat([decoder([int(i)], cache, start + n) for n, i in enumerate(ids[0])])


SHAPES = {
    "grouped": {},
    "every head its own": dict(num_key_value_heads=6),
    "one for all": dict(num_attention_heads=5, num_key_value_heads=1, head_dim=20),
    "untied": dict(tie_word_embeddings=False),
    "wide": dict(
        hidden_size=192, intermediate_size=332, head_dim=64
    ),  # as released models, and bytes beyond the last 64
    "no multiple of 16": dict(hidden_size=84, intermediate_size=140, head_dim=6, vocab_size=515),
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_logits_are_those_of_the_plain_pass(kind, shape, threads, monkeypatch):
    """All positions, from an empty cache on. Negative control: one token off is far off."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model, exact = pair(kind, **SHAPES[shape])
    dtype, attend = model.dtype, smol.attend
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(smol, "attend", lambda q, k, v, *a: attend(q, k.to(dtype).float(), v.to(dtype).float(), *a))
        expected = exact(IDS)[0][0]
    found = decoded(model)
    assert found.dtype == torch.float32
    error, spread = (found - expected).std(dim=-1), float(expected.std())
    assert error.min() < 1e-5 * spread
    # one number that is rounded the other way, for a difference in its last bit, moves all that come after it
    assert error.max() < (0.05 if kind == "int8" else 2e-3) * spread
    assert (found[1:] - expected[:-1]).std(dim=-1).min() > 0.2 * spread


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", ["grouped", "no multiple of 16", "wide"])
@pytest.mark.parametrize("rows", [2, 8, 13, 16])
def test_several_texts_at_a_time_are_each_alone(rows, shape, kind):
    """Every row of a batch gets the logits that it gets alone, bit for bit as GCC compiles it for x86: company changes
    no text, in a group of 8 or as one of the rest. Across a block of positions, too. Negative control: another row."""
    model, _ = pair(kind, **SHAPES[shape], max_position_embeddings=140)
    ids = torch.randint(3, 512, (rows, 140), generator=torch.Generator().manual_seed(4))
    decoder, cache = Decoder(model), KVCache(model.config, rows, dtype=model.dtype)
    together = torch.stack([decoder(column.tolist(), cache, n) for n, column in enumerate(ids.T)], dim=1)  # (B, T, V)
    for row in (0, rows // 2, rows - 1):
        alone = decoded(model, ids[row : row + 1])
        assert (together[row] - alone).abs().max() <= (0 if platform.machine() == "x86_64" else 1e-3)
        assert not torch.equal(together[row, 1:], together[(row + 1) % rows, 1:])
    with pytest.raises(IndexError, match="1 tokens for a cache of"):
        decoder([5], cache, 139)


@pytest.mark.parametrize("sharp", [1.0, 300.0])
def test_over_several_blocks_of_positions(sharp, monkeypatch):
    """300 positions are three blocks, the last one short. With scores in the thousands nearly all weights are 0, and
    the highest score may be in any block. Negative control: without the first position all later ones change."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
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
    """Rounding to bytes must not turn a number that is none into one: sample.py refuses such logits by name. Numbers
    too small to be divided by are 0. Negative control: the model as it is."""
    model, _ = pair("int8")
    assert decoded(model, IDS[:, :3], check=False).isfinite().all()
    model.layers[1].input_layernorm.weight.data[3] = 1e-38
    assert decoded(model, IDS[:, :3], check=False).isfinite().all()
    model.layers[1].input_layernorm.weight.data[3] = wrong
    assert not decoded(model, IDS[:, :3], check=False)[1:].isfinite().any()


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    """Each row of each product is one thread's, so a text does not depend on how many there were, or on the load."""
    model, _ = pair("bfloat16")

    def by(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return decoded(model)

    found = [by(threads) for threads in (1, 2, 3)]  # the first also compares with model.py, which must leave no trace
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_on_a_busy_machine_it_goes_alone_for_a_while(monkeypatch):
    """Where together takes twice as long as alone, 16 tokens go alone, then 32, until together pays again; alone takes
    longer, too, as the text grows. Another number of rows is timed anew."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, _ = pair("float32", max_position_embeddings=128)
    decoder, cache, threads = Decoder(model), KVCache(model.config, 1), []
    real = Decoder.learn_from
    took = {1: lambda n: 1 if n < 30 else 2, 2: lambda n: 3}  # seconds on so many threads
    monkeypatch.setattr(Decoder, "learn_from", lambda self, _: real(self, took[self.c.threads](len(threads))))
    for n in range(60):
        decoder([5], cache, n)
        threads.append(decoder.c.threads)
    assert threads == [1, 2, *[1] * 16, 2, *[1] * 32, 2, *[2] * 8]
    decoder([5, 5], KVCache(model.config, 2), 0)
    assert decoder.c.threads == 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_it_goes_on_from_a_prefill_and_back(kind):
    """The cache is model.py's own: what one writes the other reads, also after the buffers have grown."""
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
    found = torch.cat([decoder([int(i)], small, n) for n, i in enumerate(ids[0])])  # capacity 64, in one decoder
    assert (found - expected).abs().max() < allowed


def test_generate_takes_it_and_says_the_same(hf_directory, monkeypatch):
    """Rows on a CPU go through decode.c; more than MAX_ROWS, fp16 and fast=False do not. Greedy text is the same."""
    model, _ = sample.load(hf_directory)
    calls = []
    real = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, *a: calls.append(1) or real(self, *a))

    def text(model, prompt=(5, 6, 7), **more):
        calls.clear()
        return [
            i.tolist() for i in sample.generate(model, torch.tensor(prompt), 50, temperature=0, stop_ids=[], **more)
        ]

    fast = text(model)
    assert len(calls) == 49  # the first token comes with the prompt
    assert text(model, fast=False) == fast and not calls
    assert [i[:1] for i in text(model, [[5, 6, 7], [9, 8, 7]])] == fast and len(calls) == 49
    assert [i[:1] for i in text(model, [[5, 6, 7]] + [[9, 8, 7]] * decode.MAX_ROWS)] == fast and not calls
    text(copy.deepcopy(model).to(torch.float16))
    assert not calls


def test_logits_of_which_only_one_is_finite_are_no_agreement():
    """In units of the spread. Where neither is finite, sampling has a message; where one is, something is wrong."""
    plain = torch.tensor([[-1.0, 0.0, 1.0]])
    assert decode.difference(plain, plain) == 0 and decode.difference(1.5 * plain, plain) == pytest.approx(0.5)
    nan = plain * math.nan
    assert decode.difference(nan, nan) == 0
    for error in (decode.difference(nan, plain), decode.difference(plain, nan)):
        assert not error <= 1 and "not finite" in decode.by_how_much(error, 1)


def test_a_changed_model_is_noticed(hf_directory):
    """Whoever changes the forward pass in model.py must not be answered by the old one in decode.c."""
    model, _ = sample.load(hf_directory)
    model.layers[1].mlp.forward = lambda x: x * 0
    with pytest.raises(UserError, match="decode.c and model.py disagree"):
        list(sample.generate(model, [5, 6, 7], 3, temperature=0))
    assert len(list(sample.generate(model, [5, 6, 7], 3, temperature=0, stop_ids=[], fast=False))) == 3


def test_autocast_around_it_is_no_disagreement(hf_directory):
    """train.py prints samples of fp32 weights while products run in bf16: decode.c stays exact and is not accused."""
    model, _ = sample.load(hf_directory)
    with torch.no_grad():
        expected = model(IDS)[0][0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (decoded(model) - expected).std() < 5e-6 < (model(IDS)[0][0] - expected).std()


def test_weights_that_train_on_are_followed(hf_directory):
    """A decoder reads the weights where they are: the next text after a change is the changed model's."""
    model, _ = sample.load(hf_directory)
    before = decoded(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        expected = model(IDS)[0][0]
    assert (decoded(model) - expected).abs().max() < 2e-5 < (before - expected).abs().max()


def forget():
    """As in a new process: nothing loaded, no failure remembered."""
    decode.library.cache_clear()
    decode.compiling_fails.cache_clear()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """decode.c in a folder of its own, so that nothing is compiled yet."""
    shutil.copy(decode.SOURCE, tmp_path)
    monkeypatch.setattr(decode, "SOURCE", tmp_path / "decode.c")
    forget()
    yield tmp_path
    forget()


def test_rounding_what_meets_int8_costs_little(elsewhere, monkeypatch):
    """Beside the same int8 weights without it, and an outlier in each row: 6% of the logits' spread on random weights,
    whose logits are easily moved. Negative control: with one step for every 1,024 numbers the outlier costs 19%."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shape = dict(hidden_size=192, intermediate_size=320, head_dim=32)
    model, exact = pair("int8", **shape)
    for module in exact.modules():
        module._forward_pre_hooks.clear()
    del exact.head
    for m in (model, exact):
        with torch.no_grad():
            for norm in (layer.input_layernorm for layer in m.layers):
                norm.weight[5] = 50.0  # an outlier, as trained models have them
    with torch.no_grad():
        expected = exact(IDS)[0][0]
    cost = float((decoded(model) - expected).std() / expected.std())
    decode.SOURCE.write_text(decode.SOURCE.read_text().replace("BYTES_BLOCK 32", "BYTES_BLOCK 1024"))
    forget()
    coarse = float((decoded(model) - expected).std() / expected.std())
    assert 1e-3 < cost < 0.1 < coarse


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of x86")
@pytest.mark.parametrize("changed", ["-DPLAIN", "-mno-avx512vnni"])
def test_every_way_to_multiply_bytes_gives_the_same_bits(changed, elsewhere, monkeypatch):
    """The sums of products of bytes are exact, so the processor's instruction for them, that of older processors, and
    plain arithmetic agree to the last bit. Negative control: bytes with a wrong sign do not."""
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


def test_without_a_compiler_the_text_comes_all_the_same(hf_directory, elsewhere, monkeypatch, capsys):
    """And the command says why it is slower."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    model, _ = sample.load(hf_directory)
    assert "no C compiler" in decode.reason_against(model)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--model={hf_directory}", "--max_new_tokens=3"])
    sample.main()
    assert "slower than it need be, by model.py alone: no C compiler" in capsys.readouterr().err


def test_source_that_does_not_compile_is_a_reason(hf_directory, elsewhere):
    (elsewhere / "decode.c").write_text("this is not C")
    model, _ = sample.load(hf_directory)
    assert "decode.c did not compile" in decode.reason_against(model)
    assert not list((elsewhere / "__pycache__").iterdir())  # no litter


def fake_compiler(folder, monkeypatch, commands: str):
    """A program called cc, first in PATH."""
    (folder / "cc").write_text(f"#!/bin/sh\n{commands}\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_compiler_that_fails_is_asked_once(hf_directory, elsewhere, monkeypatch):
    """Each text would wait for it again; and one that says nothing must still give a reason."""
    fake_compiler(elsewhere, monkeypatch, f"echo asked >> {elsewhere / 'calls'}; exit 3")
    model, _ = sample.load(hf_directory)
    for _ in range(3):
        assert "decode.c did not compile" in decode.reason_against(model)
        list(sample.generate(model, [5, 6], 2))
    assert (elsewhere / "calls").read_text() == "asked\n"


def test_an_updated_compiler_compiles_again(elsewhere, monkeypatch):
    """What an old one made wrong must not outlive it; the path alone does not tell them apart."""
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    for update in ("", "# version 2"):
        fake_compiler(elsewhere, monkeypatch, f'exec {real} "$@" {update}')
        forget()
        decode.library()
    assert len(list((elsewhere / "__pycache__").iterdir())) == 2


def test_no_memory_is_read_for_a_token_that_is_none():
    """decode.c trusts its arguments: one token too far is a row beyond the embedding."""
    model, _ = pair("float32")
    decoder, cache = Decoder(model), KVCache(model.config, 1)
    for token, position in ((512, 0), (-1, 0), (5, -1)):
        with pytest.raises(IndexError, match=rf"tokens \[{token}\] at position {position}"):
            decoder([token], cache, position)
    with pytest.raises(UserError, match="context of 64"):
        decoder([5], cache, 64)


def first_load(source):
    decode.SOURCE = Path(source)
    decode.library()


@pytest.mark.slow
def test_it_is_compiled_once_and_two_at_a_time_do_not_meet(elsewhere):
    """Four processes at once on an empty folder all load it, and leave one file; a changed source is another file."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=first_load, args=(decode.SOURCE,)) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert [w.exitcode for w in workers] == [0] * 4
    (made,) = (elsewhere / "__pycache__").iterdir()
    stamp = made.stat().st_mtime_ns
    decode.library()
    assert made.stat().st_mtime_ns == stamp
    with open(decode.SOURCE, "a") as f:
        f.write("/* changed */\n")
    forget()
    decode.library()
    assert len(list((elsewhere / "__pycache__").iterdir())) == 2


def test_a_damaged_library_is_compiled_again(elsewhere):
    """A power cut may leave an empty file under the right name; that must not mean the slow path for ever."""
    decode.library()
    (made,) = (elsewhere / "__pycache__").iterdir()
    size = made.stat().st_size
    made.unlink()  # the old one stays mapped in this process
    made.write_bytes(b"")
    decode.library.cache_clear()
    assert decode.library().step and made.stat().st_size == size


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere, Windows knows no such modes")
def test_a_folder_that_cannot_be_written_is_no_obstacle(elsewhere):
    elsewhere.chmod(0o500)
    decode.library()
    elsewhere.chmod(0o700)
    assert not (elsewhere / "__pycache__").exists()


@pytest.mark.slow
def test_no_sanitizer_complains(elsewhere, tmp_path):
    """Reads and writes stay inside the tensors: a process of its own runs under the address sanitizer, on a shape whose
    sizes divide by nothing."""
    run = tmp_path / "run.py"
    run.write_text(
        "import sys, torch; sys.path[:0] = sys.argv[1:3]\n"
        "import subprocess\nfrom fast import decode\n"
        "real = subprocess.run\n"
        "subprocess.run = lambda c, **k: real([*c, '-fsanitize=address,undefined', '-fno-sanitize-recover'], **k)\n"
        "from pathlib import Path; decode.SOURCE = Path(sys.argv[3])\n"
        "from test_decode import pair, decoded, Decoder, KVCache\n"
        "for kind in ('float32', 'bfloat16', 'int8'):\n"
        "    model = pair(kind, hidden_size=84, intermediate_size=140, head_dim=6, vocab_size=515)[0]\n"
        "    decoded(model)\n"
        "    decoder, cache = Decoder(model), KVCache(model.config, 13, dtype=model.dtype)\n"
        "    decoder.alone_took = float('inf')\n"  # all threads
        "    for position in range(64):\n"
        "        decoder([5] * 13, cache, position)\n"
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
