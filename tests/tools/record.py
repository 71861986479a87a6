"""
Record what the scripts of a checkout compute, to the last bit, and compare two records.

    python tests/tools/record.py --out=old.json                          # of the checkout that this file lies in
    python tests/tools/record.py --root=../other --out=new.json          # of another one; --only=train/ takes a part
    python tests/tools/record.py --compare=old.json,new.json             # exit code 1 if anything differs

It uses command lines and files and imports nothing of the project, so it records the code before and after a
refactoring alike. The checkout is copied to a temporary folder, uncommitted changes included, and all runs there, on
one thread each. Two records can be compared if the same machine made them with the same packages.

Each training case runs twice: once without a stop, and once with SIGTERM in the middle, after which the same command
finishes it. "resumed" says whether both end with the same log, weights and state.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

TIMED = re.compile("second|tok_per_s|mfu|memory|time|path")  # fields of log.jsonl that differ between any two runs
PATHS = ("input", "source", "tokenizer")  # fields of meta.json
LENIENT = ("log", "meta")  # a field here that only one record has is printed, but does not count as a difference
PLAY, TALKS = "--input=data/shakespeare/play.txt", "--input=data/chat/conversations.jsonl"
BASE = (
    f"{PLAY} --dataset=record --vocab_size=512 --hidden_size=64 --intermediate_size=128 --num_hidden_layers=2 "
    "--num_attention_heads=4 --num_key_value_heads=2 --max_position_embeddings=256 --block_size=64 "
    "--global_batch_size=8 --max_iters=60 --learning_rate=1e-2 --warmup_iters=5 --eval_interval=25 --eval_rows=20 "
    "--log_interval=1 --device=cpu --dtype=float32 --compile=off --peak_tflops=1"
)
OUTTYPES = ("f32", "f16", "bf16", "q8_0")
STOP = 20  # the step after which SIGTERM is sent
TRAINING = {  # what follows BASE
    "compiled": "--compile=on --dropout=0.1 --token_noise=0.1 --micro_batch_size=4",
    "adamw": "--max_iters=150 --sample_interval=50",
    "muon": "--optimizer=muon --lr_schedule=wsd --decay_fraction=0.8 --token_noise=0.1 --noise_until=0.7 --dropout=0.1 "
    "--weight_decay=1.5 --micro_batch_size=3 --sample_interval=30",
    "talks": f"{TALKS} --dataset=talks --init_from=out/adamw --tokenizer=out/adamw --block_size=256 "
    "--global_batch_size=4 --micro_batch_size=2 --learning_rate=1e-3 --min_lr=0",
    "bfloat16": "--dtype=bfloat16 --micro_batch_size=4 --max_iters=1000 --max_epochs=0.7 --patience=9",
    # first weights so large that float16 overflows and steps are skipped
    "float16": "--dtype=float16 --optimizer=muon --dropout=0.1 --lr_schedule=constant --initializer_range=2",
    "processes": "--optimizer=muon --dropout=0.1 --micro_batch_size=2",
}
DATA = {
    "text": f"{PLAY} --vocab_size=700",
    "talks": f"{TALKS} --tokenizer=data/record",
    "documents": "--input=documents.jsonl",
}
SAMPLES = {
    "greedy": "--temperature=0 --max_new_tokens=300 --dtype=float32",  # beyond the context of 256
    "filtered": "--top_k=40 --top_p=0.95 --min_p=0.02 --repetition_penalty=1.1 --num_samples=3 --seed=7",
    "bfloat16": "--top_p=0.8 --dtype=bfloat16",
    "int8": "--quantize=int8",
    "int8_greedy": "--quantize=int8 --temperature=0",
}


def sha(data) -> str:
    return hashlib.sha256(data).hexdigest()


def facts(t: torch.Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} {sha(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())}"


def weights(file: Path) -> dict:
    with safe_open(file, "pt") as f:
        return {name: facts(f.get_tensor(name)) for name in f.keys()}


def state(file: Path) -> list[str]:
    """Find every tensor of a state.pt and the numbers of its loss scaler, and sort them: their place in the file does
    not count. Single numbers and bytes (of random generators) are left out."""
    found, todo = [], [torch.load(file, weights_only=True)]
    for value in todo:
        if isinstance(value, dict):
            found += [f"{k} {value[k]!r}" for k in ("scale", "_growth_tracker") if k in value]
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, torch.Tensor) and value.dim() and value.dtype != torch.uint8:
            found.append(facts(value))
    return sorted(found)


def files(folder: Path, *patterns: str) -> dict:
    return {f.name: sha(f.read_bytes()) for pattern in patterns for f in sorted(folder.glob(pattern))}


def result(run: Path) -> dict:
    """Take what a run left in its folder; the log by columns, without its timings."""
    log = {}
    for i, line in enumerate((run / "log.jsonl").read_text().splitlines()):
        for key, value in json.loads(line).items():
            if not TIMED.search(key):
                log.setdefault(key, []).append([i, repr(value)])  # as text, since NaN is not equal to itself
    states = {f.name: state(f) for f in sorted(run.glob("*.pt"))}
    return dict(log=log, weights=weights(run / "model.safetensors"), **states, **files(run, "*.json", "*.jinja"))


class Recorder:
    """The cases, in a copy of a checkout: each method runs one and returns its record."""

    def __init__(self, work: Path):
        self.work = work
        cache = str(work / "inductor")
        fixed = dict(OMP_NUM_THREADS="1", PYTHONUTF8="1", PYTHONUNBUFFERED="1", TORCHINDUCTOR_CACHE_DIR=cache)
        self.environment = os.environ | fixed | dict(HF_HUB_OFFLINE="1")

    def run(self, command: str, stop: bool = False, stdin: str = "") -> str:
        """Run a script, return what it prints to stdout. With `stop`, send SIGTERM after the line of step STOP."""
        with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as errors:
            given.write(stdin)
            given.seek(0)
            place = dict(cwd=self.work, env=self.environment, encoding="utf-8")
            streams = dict(stdin=given, stdout=subprocess.PIPE, stderr=errors)
            process = subprocess.Popen([sys.executable, *command.split()], **place, **streams)
            printed, waiting = "", stop
            for line in process.stdout:
                printed += line
                if waiting and re.match(rf"step +{STOP}\b", line):
                    process.terminate()
                    waiting = False
            if waiting or bool(process.wait()) != stop:  # a run that is stopped ends with the signal's exit code
                errors.seek(0)
                ended = f"{'not stopped in time, ' if stop else ''}exit code {process.wait()}"
                raise RuntimeError(f"{command}\n{ended}\n{printed[-500:]}{errors.read()[-2000:]}")
        return printed

    @functools.cache  # noqa: B019
    def flag(self, script: str, *names: str) -> str:
        """Ask --help which of these names a flag has."""
        text = self.run(f"{script} --help")
        return next(name for name in names if f"--{name}=" in text)

    def train(self, name: str) -> dict:
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 " if name == "processes" else ""
        command, out = f"{launcher}train.py {BASE} {TRAINING[name]} --out_dir=out/{name}", self.work / "out"
        if not (out / name).exists():  # adamw's was made first
            self.run(command)
        whole = result(out / name)
        self.run(f"{command}_stopped", stop=True)
        self.run(f"{command}_stopped")
        found = [text for text, _ in differences(whole, result(out / f"{name}_stopped"))]
        return whole | dict(resumed=found or "equal") | (self.chat() if name == "talks" else {})

    def chat(self) -> dict:
        command = "chat.py --model=out/talks --device=cpu --max_new_tokens=60 --temperature="
        return {f"chat {t}": self.run(f"{command}{t}", stdin="help\nWho are you?\n") for t in (0, 0.7)}

    def data(self, name: str) -> dict:
        self.run(f"prepare.py {DATA[name]} --dataset=record_{name}")
        folder = self.work / f"data/record_{name}"
        meta = json.loads((folder / "meta.json").read_text())
        meta = {k: v for k, v in meta.items() if k not in PATHS and not TIMED.search(k)}
        return dict(meta=meta) | files(folder, "tokenizer.json", "*.bin", "*.jinja")

    def sample(self, name: str) -> dict:
        command = f"sample.py --model=out/adamw --prompt=The --device=cpu {SAMPLES[name]}"
        return {"fast": self.run(command), "slow": self.run(f"{command} --{self.flag('sample.py', 'use_c', 'fast')}=0")}

    def evaluate(self, dataset: str) -> dict:
        return dict(text=self.run(f"evaluate.py --model=out/adamw --dataset={dataset} --device=cpu --dtype=float32"))

    def gguf(self, outtype: str) -> dict:
        """Write the model to a GGUF file, and make a model of that again."""
        folder, back = self.work / f"out/gguf_{outtype}", self.work / f"out/back_{outtype}"
        self.run(f"export_gguf.py --model=out/adamw --outtype={outtype} --out_dir={folder}")
        (file,) = folder.glob("*.gguf")
        out = self.flag("import_gguf.py", "out", "out_dir")
        self.run(f"import_gguf.py --gguf={file} --{out}={back} --dtype=float32")
        reader = gguf.GGUFReader(file)
        tensors = {t.name: f"{t.tensor_type.name} {t.shape.tolist()} {sha(t.data.tobytes())}" for t in reader.tensors}
        keys = {key: sha(repr(field.contents()).encode()) for key, field in reader.fields.items()}
        found = dict(tensors=tensors, keys=keys, back=weights(back / "model.safetensors"))
        return found | files(folder, "Modelfile") | files(back, "*.json")


def differences(old, new, at: str = "") -> list[tuple[str, bool]]:
    """List what differs between two records, each with whether it counts."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [pair for k in old if k in new for pair in differences(old[k], new[k], f"{at} {k}".strip())]
        for word, keys in (("old", old.keys() - new.keys()), ("new", new.keys() - old.keys())):
            found += [(f"{at} fields only in {word}: {', '.join(sorted(keys))}", at not in LENIENT)] if keys else []
        return found
    if isinstance(old, list) and isinstance(new, list) and old != new:
        apart = [pair for pair in zip(old, new) if pair[0] != pair[1]]
        first = f", first {apart[0][0]} and {apart[0][1]}" if apart else ""
        return [(f"{at}: {len(apart)} differ of {len(old)} and {len(new)}{first}", True)]
    return [] if old == new else [(f"{at}: {str(old)[:150]!r} and {str(new)[:150]!r}", True)]


def compare(old: dict, new: dict, only: str) -> bool:
    """Print each case; return whether all are the same and none failed."""
    differing = 0
    for name in [name for name in sorted(old.keys() | new.keys()) if only in name]:
        sides = [record.get(name, dict(error="it is not in this record")) for record in (old, new)]
        found = [("error: " + side["error"], True) for side in sides if "error" in side] or differences(*sides)
        differs = any(counts for _, counts in found)
        differing += differs
        print("\n           ".join([f"{'different' if differs else 'same':10} {name}", *(text for text, _ in found)]))
    return not differing


def make(root: Path, only: str) -> dict:
    """Record a checkout: case by case what it came to, or the error that it ended with."""
    record = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "checkout")
        left_out = (".*", "out", "tests", "docs", "venv", "__pycache__", "*.bin", "*.pt", "*.gguf", "*.safetensors")
        shutil.copytree(root, work, ignore=shutil.ignore_patterns(*left_out))
        paragraphs = (work / "data/shakespeare/play.txt").read_text(encoding="utf-8").split("\n\n")
        (work / "documents.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in paragraphs))
        recorder = Recorder(work)
        recorder.run(f"train.py {BASE} {TRAINING['adamw']} --out_dir=out/adamw")  # other cases begin from its model
        lists = dict(train=TRAINING, data=DATA, sample=SAMPLES, gguf=OUTTYPES, evaluate=["record"])

        def do(kind: str, name: str):
            began = time.perf_counter()
            try:
                case = getattr(recorder, kind)(name)
            except Exception as error:
                case = dict(error=repr(error) if not isinstance(error, RuntimeError) else str(error))
            record[f"{kind}/{name}"] = case
            said = case.get("error") or (f"resumed: {case['resumed']}" if "resumed" in case else "")
            print(f"{time.perf_counter() - began:6.1f} s  {kind}/{name}  {said}", flush=True)

        with ThreadPoolExecutor(2) as pool:
            for kind, names in lists.items():
                for name in names:
                    if only in f"{kind}/{name}":
                        pool.submit(do, kind, name)
    return dict(sorted(record.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the checkout to record")
    parser.add_argument("--out", type=Path, help="the file that gets the record")
    parser.add_argument("--compare", help="two records: OLD,NEW")
    parser.add_argument("--only", default="", help="cases that have this in their name")
    s = parser.parse_args()
    if s.compare:
        old, new = (json.loads(Path(file).read_text(encoding="utf-8")) for file in s.compare.split(","))
        raise SystemExit(0 if compare(old, new, s.only) else 1)
    if not s.out:
        parser.error("give --out=FILE or --compare=OLD,NEW")
    record = make(s.root.resolve(), s.only)
    s.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not record or any("error" in case or case.get("resumed", "equal") != "equal" for case in record.values()):
        raise SystemExit("no case has this in its name" if not record else "not all cases are sound: see above")


if __name__ == "__main__":
    main()
