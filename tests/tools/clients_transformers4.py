"""
Check that transformers 4.57, the last release before 5, computes the same from a run as this code does. The test suite
has no such test, because this installs that release into its own environment (a minute and about 60 MB; torch comes
from the environment that runs this script).

    python tests/tools/clients_transformers4.py --model=out/tiny_shakespeare
    python tests/tools/clients_transformers4.py --model=out/tiny_shakespeare --env=.venv4     # keeps the environment

Compares, in fp32 on the CPU: token ids of difficult strings, logits, and greedy text. Negative control: a copy of the
directory that has theta only in rope_parameters, where transformers 5 writes it, must give other logits, because 4.57
reads rope_theta and silently takes 10000 without it. Exit code 0 if both come out as expected.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib.files import read_json, write_json
from lib.settings import UserError, override, run_main

import torch
from safetensors.torch import load_file

from checkpoint import load, newest_run
from sample import generate

VERSION = "4.57.6"
TOLERANCE = 1e-4
NEW_TOKENS = 40
PROMPTS = [
    "ROMEO:\nWhat", "The", "  we've  12 owls, x\n\n12", "It's 2 late,\r\n\ta  12 naïve é 漢字 🦉", "\n", "...!?", " a",
]  # fmt: skip


@dataclass
class Settings:
    model: str = ""  # model directory; empty: the newest run under out/
    env: str = ""  # folder of the environment, made if it does not exist; empty: a temporary one


# What runs in the other environment, without this repository: python -c THEIRS DIRECTORY PROMPTS NEW_TOKENS RESULT
THEIRS = """
import json, sys
import torch, transformers
from safetensors.torch import save_file
directory, prompts, new_tokens, result = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
tensors = {}
for i, prompt in enumerate(prompts):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        tensors[f"{i}.ids"], tensors[f"{i}.logits"] = ids[0], model(ids).logits[0]
        out = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    tensors[f"{i}.text"] = out[0, ids.size(1):].clone()
save_file(tensors, result)
print(transformers.__version__)
"""


def environment(folder: Path) -> Path:
    """Return the Python of an environment that has transformers VERSION, and torch from this script's environment."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / "complete").exists():
        print(f"installing transformers {VERSION} into {folder} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={VERSION}"])
        if done.returncode:
            raise UserError(f"pip could not install transformers {VERSION}; without a network this cannot be run.")
        # A .pth file adds our packages after the environment's own, so only what it lacks, torch, comes from ours.
        purelib = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        (Path(purelib.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (folder / "complete").touch()
    return python


def run_theirs(python: Path, directory: Path, folder: Path) -> tuple[dict, str]:
    """Run THEIRS on the model in `directory`; return its results, and the version of transformers."""
    result = folder / "result.safetensors"
    arguments = [str(directory), json.dumps(PROMPTS), str(NEW_TOKENS), str(result)]
    done = subprocess.run(
        [python, "-c", THEIRS, *arguments],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"transformers {VERSION} could not run {directory}:\n{done.stderr.strip()[-2000:]}")
    return load_file(result), done.stdout.strip()


@torch.no_grad()
def compare(model, tokenizer, theirs: dict) -> tuple[int, int, float]:
    """Return how many prompts have other tokens, how many another continuation, and the largest error of the logits."""
    tokens, texts, largest = 0, 0, 0.0
    for i, prompt in enumerate(PROMPTS):
        ids = theirs[f"{i}.ids"].tolist()
        tokens += ids != tokenizer.encode(prompt).ids
        text = [int(step) for step in generate(model, ids, NEW_TOKENS, temperature=0)]
        texts += text != theirs[f"{i}.text"].tolist()
        largest = max(largest, float((model(torch.tensor([ids]))[0][0] - theirs[f"{i}.logits"]).abs().max()))
    return tokens, texts, largest


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    directory = Path(s.model or newest_run()).resolve()
    model, tokenizer = load(directory, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment(Path(s.env).resolve() if s.env else folder / "env")
        theirs, version = run_theirs(python, directory, folder)
        tokens, texts, largest = compare(model, tokenizer, theirs)
        print(f"transformers {version} on {directory.name}, {len(PROMPTS)} prompts:")
        print(f"  {tokens} tokenized differently, {texts} continued differently, logits differ by up to {largest:.1e}")
        wrong = Path(shutil.copytree(directory, folder / "wrong", ignore=shutil.ignore_patterns("*.pt", "*.gguf")))
        config = read_json(wrong / "config.json")
        config.pop("rope_theta", None)
        write_json(wrong / "config.json", config)
        _, _, without = compare(model, tokenizer, run_theirs(python, wrong, folder)[0])
        print(f"  negative control, theta in rope_parameters alone: logits differ by {without:.1e}")
    problems = []
    if version != VERSION:
        problems.append(f"this was transformers {version}, not {VERSION}; remove {s.env}")
    if tokens or texts or largest > TOLERANCE:
        problems.append(f"not the same model (tolerance {TOLERANCE:.0e})")
    if model.config.rope_theta != 10000 and without < 10 * TOLERANCE:
        problems.append("the negative control came out equal, so this comparison proves nothing")
    if problems:
        raise UserError("; ".join(problems) + ".")
    print("the same")


if __name__ == "__main__":
    run_main(main)
