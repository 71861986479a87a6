"""The verify_hf.py command: its output, its exit code, and its principle: our error against float64 may be twice that
of transformers. tests/test_parity.py has the checks one by one, and the mistakes that they must catch."""

import sys
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="verify_hf.py compares with transformers")

from lib.files import file_sha256  # noqa: E402
from lib.settings import run_main  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from conftest import run_script, save_hf_directory, tiny_hf  # noqa: E402

import checkpoint  # noqa: E402
import verify_hf  # noqa: E402
from model import SmolLM2Config  # noqa: E402

TINY = SmolLM2Config(
    vocab_size=512, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


def run(monkeypatch, capsys, *arguments):
    """Run the command in this process; return (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["verify_hf.py", *arguments])
    try:
        run_main(verify_hf.main)
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_a_directory_verifies(hf_directory):
    """As a user runs it: every section is there, every row agrees, exit code 0, and nothing else is printed."""
    done = run_script("verify_hf.py", f"--model={hf_directory}", "--seed=1")
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    titles = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    sections = "architecture", "weights", "each part alone", "logits", "logits along 64 tokens", "training", "KV cache"
    for section, title in zip((*sections, "greedy text", "fewer bits", "all "), titles[2:], strict=True):
        assert title.startswith(section), titles
    assert "FAIL" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 112


def test_a_tensor_altered_on_one_side_fails(hf_directory, monkeypatch, capsys):
    """If one weight matrix is 0.1% larger on our side, the exit code is 1, the matrix is named, and the rows that it
    affects are marked; the others still agree."""
    from_pretrained = checkpoint.from_pretrained

    def altered(path, *arguments, **keywords):
        model = from_pretrained(path, *arguments, **keywords)
        with torch.no_grad():
            model.layers[1].mlp.down_proj.weight.mul_(1.001)
        return model

    monkeypatch.setattr(checkpoint, "from_pretrained", altered)
    code, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}", "--seed=1")
    marked = [line.strip() for line in out.splitlines() if line.endswith("FAIL")]
    for name in ("of these bit-equal", "MLP", "block", "1 x 64 positions", "3 x 64 positions", "loss", "gradient"):
        assert any(line.startswith(name) for line in marked), f"{name} not among {marked}"
    assert not any(line.startswith(("hidden_size", "RMSNorm", "attention")) for line in marked), marked
    assert code == 1 and "model.layers.1.mlp.down_proj.weight" in out and "rows FAIL" in out.splitlines()[-1]


def test_a_tensor_that_transformers_made_up_fails(hf_directory, monkeypatch, capsys):
    """A tensor that is missing from the files: a warning in transformers, a failed row here."""
    load = verify_hf.LlamaForCausalLM.from_pretrained

    def incomplete(*arguments, **keywords):
        hf, found = load(*arguments, **keywords)
        return hf, found | {"missing_keys": {"model.layers.0.mlp.up_proj.weight"}}

    monkeypatch.setattr(verify_hf.LlamaForCausalLM, "from_pretrained", incomplete)
    code, out, _ = run(monkeypatch, capsys, f"--model={hf_directory}")
    assert code == 1 and "missing_keys: model.layers.0.mlp.up_proj.weight" in out


def test_files_in_bfloat16_and_no_tokenizer(tmp_path, monkeypatch, capsys):
    """transformers 5 would load these weights as bf16 by default, and the tolerances would mean nothing."""
    tiny_hf().to(torch.bfloat16).save_pretrained(tmp_path)
    assert verify_hf.load_original(tmp_path)[0].dtype == torch.float32
    code, out, _ = run(monkeypatch, capsys, f"--model={tmp_path}", "--seed=1", "--context=32")
    assert code == 0 and "logits along 32 tokens" in out, out


def test_random_weights(tmp_path, monkeypatch, capsys):
    """Without --model: weights from the printed seed, a new one each time. The same seed gives the same file."""
    monkeypatch.setattr(verify_hf, "PRESETS", {"135M": TINY, "360M": replace(TINY, num_hidden_layers=3)})
    seeds = set()
    for _ in range(2):
        code, out, _ = run(monkeypatch, capsys, "--shape=360M", "--context=32")
        assert code == 0 and "random weights in the 360M shape, seed " in out, out
        seeds.add(out.split("seed ")[1].split()[0])
    assert len(seeds) == 2
    folders = [verify_hf.save_random_model(tmp_path / name, TINY, seed) for name, seed in zip("abc", (5, 5, 6))]
    hashes = [file_sha256(folder / "model.safetensors") for folder in folders]
    assert hashes[0] == hashes[1] != hashes[2]
    assert checkpoint.from_pretrained(folders[0]).norm.weight.std() > 0.01  # ones would hide a norm that ignores them


@pytest.mark.parametrize(
    "arguments, expected, named",
    [
        (["--shape=2B"], 2, "--shape=2B: "),
        (["--model=no/such/folder"], 1, "no/such/folder: no such directory"),
    ],
)
def test_mistakes_end_in_one_line(monkeypatch, capsys, arguments, expected, named):
    capsys.readouterr()
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == expected and named in err and "Traceback" not in err


# ----------------------------------------------------------------------------------------------------------------------
# the principle


def test_the_truth_is_float64_throughout(hf_directory, monkeypatch):
    """transformers rounds to fp32 in its norms and its softmax even in a float64 model; the truth must not."""
    hf, _ = verify_hf.load_original(hf_directory)
    ids = verify_hf.token_ids(hf, 2, 40, 0)
    exact = verify_hf.in_double(hf)
    truth, half = verify_hf.hf_logits(exact, ids, "sdpa"), verify_hf.hf_logits(hf.double(), ids)
    monkeypatch.setattr(F, "scaled_dot_product_attention", textbook)
    again = verify_hf.hf_logits(exact, ids, "sdpa")
    assert truth.dtype == torch.float64
    assert verify_hf.error(truth, again) < 1e-13 < 1e-8 < verify_hf.error(truth, half)


def textbook(q, k, v, attn_mask=None, is_causal=False, **_):
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool).triu(1)
    return (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_rows_are_judged_by_the_error_of_transformers():
    """Our error may be twice its error, or the floor if it has none."""
    assert verify_hf.judged("", 1e-5, 2e-5).ok and not verify_hf.judged("", 1e-5, 2.1e-5).ok
    assert verify_hf.judged("", 0.0, 1e-6, 1e-6).ok and not verify_hf.judged("", 0.0, 1.1e-6, 1e-6).ok
    assert verify_hf.judged("", 0.0, 0.0).ok and not verify_hf.judged("", 0.0, 1e-9).ok


def test_activations_in_the_thousands_pass(tmp_path, monkeypatch, capsys):
    """The released models have them. No fixed tolerance fits both these and a random model; the principle does."""
    hf = tiny_hf()
    hf.model.layers[0].mlp.down_proj.weight.data.mul_(3000)
    ids = verify_hf.token_ids(hf, 1, 40, 0)
    assert hf.model(ids, output_hidden_states=True).hidden_states[1].abs().max() > 1000
    path = save_hf_directory(tmp_path, hf)
    for seed in range(2):
        code, out, _ = run(monkeypatch, capsys, f"--model={path}", f"--seed={seed}")
        assert code == 0, out


def test_a_large_model_is_compared_end_to_end_with_its_first_layers(tmp_path, monkeypatch, capsys):
    path = save_hf_directory(tmp_path, tiny_hf(num_hidden_layers=7))
    per_layer = checkpoint.from_pretrained(path).num_parameters()["backbone"] / 7
    monkeypatch.setattr(verify_hf, "AFFORDABLE", 3.5 * per_layer)
    code, out, _ = run(monkeypatch, capsys, f"--model={path}", "--seed=1")
    assert code == 0 and out.index("each part alone") < out.index("the first 3 of 7 layers") < out.index(
        "logits: error"
    )


def test_the_input_is_a_portion_of_the_text(hf_directory):
    """The seed chooses where it starts; at its end the text starts over. Without a text the ids are random."""
    model, text = checkpoint.from_pretrained(hf_directory), list(range(10, 30))
    found = verify_hf.token_ids(model, 2, 25, 3, text).flatten().tolist()
    assert all((b - a) % 20 == 1 for a, b in zip(found, found[1:])) and set(found) == set(text)
    assert found != verify_hf.token_ids(model, 2, 25, 4, text).flatten().tolist()
    assert len(verify_hf.token_ids(model, 2, 25, 3).unique()) > 30
