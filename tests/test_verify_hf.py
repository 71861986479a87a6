"""The verify_hf.py command: what it prints, and its exit code, when the two sides agree and when they do not."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("transformers", reason="verify_hf.py compares with transformers")

import torch  # noqa: E402
from conftest import ROOT, run_script, tiny_hf  # noqa: E402

import checkpoint  # noqa: E402
import verify_hf  # noqa: E402
from config import guard  # noqa: E402
from files import file_sha256  # noqa: E402
from model import SmolLM2Config  # noqa: E402


def run(monkeypatch, capsys, *arguments):
    """The command inside this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["verify_hf.py", *arguments])
    try:
        guard(verify_hf.main)
        code = 0
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


def lines_that_fail(out: str) -> list[str]:
    return [line.strip() for line in out.splitlines() if line.endswith("FAIL")]


SECTIONS = (
    "architecture", "weights", "each part alone", "logits", "logits along 64 tokens", "training",
    "KV cache against none", "greedy text", "tokenizer", "saved and read again", "fewer bits",
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
    for name in ("hidden_size", "RMSNorm", "attention", "token by token", "against tokenizers"):
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
        "import checkpoint, verify_hf, config\n"
        "from model import SmolLM2Config\n"
        "verify_hf.PRESETS = {'135M': SmolLM2Config(64, 16, 16, 1, 2, 1, 8, 32)}\n"
        "verify_hf.checkpoint.from_pretrained = lambda *a, **k: print('ready', flush=True) or time.sleep(60)\n"
        "config.guard(verify_hf.main)\n"
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
