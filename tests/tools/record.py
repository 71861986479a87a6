"""
Record what the scripts of a checkout compute, to the last bit, and compare two records.

    python tests/tools/record.py --out=old.json                  # of this checkout; --only=train/ records a part
    python tests/tools/record.py --root=../other --out=new.json  # of another checkout
    python tests/tools/record.py --compare=old.json,new.json     # exit code 1 if anything differs

It uses command lines and files and imports nothing of the project, so that a refactoring cannot change it. It works in
a temporary copy of the checkout, uncommitted changes included. Two records can be compared if the same machine made
them with the same packages. Each training case runs once without a stop, and once with SIGTERM in the middle, after
which the same command finishes it; "resumed" says whether both end with the same log, weights and state.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

OTHER = re.compile("second|tok_per_s|mfu|memory|time|path|^input$|^source$|^tokenizer$")  # differ between any two runs
LENIENT = ("log", "meta")  # a field here that only one record has is printed, but does not count as a difference
PLAY, TALKS = "--input=data/shakespeare/play.txt", "--input=data/chat/conversations.jsonl"
BASE = (
    f"{PLAY} --dataset=record --vocab_size=512 --hidden_size=64 --intermediate_size=128 --num_hidden_layers=2 "
    "--num_attention_heads=4 --num_key_value_heads=2 --max_position_embeddings=256 --block_size=64 "
    "--global_batch_size=8 --max_iters=60 --learning_rate=1e-2 --warmup_iters=5 --eval_interval=25 --eval_rows=20 "
    "--log_interval=1 --device=cpu --dtype=float32 --compile=off --peak_tflops=1"
)
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
DATA = dict(
    text=f"{PLAY} --vocab_size=700", talks=f"{TALKS} --tokenizer=data/record", documents="--input=documents.jsonl"
)
SAMPLES = {
    "greedy": "--temperature=0 --max_new_tokens=300 --dtype=float32",  # beyond the context of 256
    "filtered": "--top_k=40 --top_p=0.95 --min_p=0.02 --repetition_penalty=1.1 --num_samples=3 --seed=7",
    "bfloat16": "--top_p=0.8 --dtype=bfloat16",
    "int8": "--quantize=int8",
    "int8_greedy": "--quantize=int8 --temperature=0",
}


def sha(data) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path, *patterns: str) -> dict:
    return {f.name: sha(f.read_bytes()) for pattern in patterns for f in sorted(folder.glob(pattern))}


def facts(t: torch.Tensor) -> str:
    return f"{t.dtype} {list(t.shape)} {sha(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy())}"


def weights(file: Path) -> dict:
    return {name: facts(tensor) for name, tensor in load_file(file).items()}


def state(file: Path) -> list[str]:
    """List the tensors of a state.pt and the numbers of its loss scaler, sorted, without those of random generators."""
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


def result(run: Path) -> dict:
    """Collect what a run left in its folder, with the log by columns and without its timings."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    columns = {key for row in rows for key in row if not OTHER.search(key)}
    log = {k: [[i, repr(row[k])] for i, row in enumerate(rows) if k in row] for k in columns}  # as text: NaN != NaN
    states = {f.name: state(f) for f in sorted(run.glob("*.pt"))}
    return dict(log=log, weights=weights(run / "model.safetensors"), **states, **files(run, "*.json", "*.jinja"))


class Recorder:
    """The cases, in a copy of a checkout: each method runs one and returns its record."""

    def __init__(self, work: Path):
        fixed = dict(OMP_NUM_THREADS="1", PYTHONUTF8="1", PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
        self.work, self.environment = work, os.environ | fixed | dict(TORCHINDUCTOR_CACHE_DIR=f"{work}/inductor")

    def run(self, command: str, stop: bool = False, stdin: str = "") -> str:
        """Run a script and return what it prints to stdout. With `stop`, send SIGTERM after the line of step 20."""
        argv, pipes = [sys.executable, *command.split()], dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(argv, cwd=self.work, env=self.environment, encoding="utf-8", **pipes)
        stopped = stop and any(re.match(r"step +20\b", line) for line in process.stdout)
        if stopped:
            process.terminate()
        printed, errors = process.communicate(stdin)
        if stopped != stop or bool(process.returncode) != stop:  # a run that is stopped ends with the signal's code
            raise RuntimeError(f"{command}\nexit code {process.returncode}\n{printed[-500:]}{errors[-2000:]}")
        return printed

    def train(self, name: str) -> dict:
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 " if name == "processes" else ""
        command, out = f"{launcher}train.py {BASE} {TRAINING[name]} --out_dir=out/{name}", self.work / "out"
        if not (out / name).exists():  # adamw's was made first
            self.run(command)
        whole = result(out / name)
        self.run(f"{command}_stopped", stop=True)
        self.run(f"{command}_stopped")
        found = [text for text, _ in differences(whole, result(out / f"{name}_stopped"))]
        chat, said = "chat.py --model=out/talks --device=cpu --max_new_tokens=60 --temperature=", "help\nWho are you?\n"
        answers = {f"chat {t}": self.run(f"{chat}{t}", stdin=said) for t in (0, 0.7) if name == "talks"}
        return whole | dict(resumed=found or "equal") | answers

    def data(self, name: str) -> dict:
        self.run(f"prepare.py {DATA[name]} --dataset=record_{name}")
        folder = self.work / f"data/record_{name}"
        meta = {k: v for k, v in json.loads((folder / "meta.json").read_text()).items() if not OTHER.search(k)}
        return dict(meta=meta, **files(folder, "tokenizer.json", "*.bin", "*.jinja"))

    def sample(self, name: str) -> dict:
        command = f"sample.py --model=out/adamw --prompt=The --device=cpu {SAMPLES[name]}"
        return {"fast": self.run(command), "slow": self.run(f"{command} --fast=0")}

    def evaluate(self, dataset: str) -> dict:
        return dict(text=self.run(f"evaluate.py --model=out/adamw --dataset={dataset} --device=cpu --dtype=float32"))

    def gguf(self, outtype: str) -> dict:
        folder, back = self.work / f"out/gguf_{outtype}", self.work / f"out/back_{outtype}"
        self.run(f"export_gguf.py --model=out/adamw --outtype={outtype} --out_dir={folder}")
        (file,) = folder.glob("*.gguf")
        self.run(f"import_gguf.py --gguf={file} --out={back} --dtype=float32")
        reader = gguf.GGUFReader(file)
        tensors = {t.name: f"{t.tensor_type.name} {t.shape.tolist()} {sha(t.data.tobytes())}" for t in reader.tensors}
        keys = {key: sha(repr(field.contents()).encode()) for key, field in reader.fields.items()}
        found = dict(tensors=tensors, keys=keys, back=weights(back / "model.safetensors"))
        return found | files(folder, "Modelfile") | files(back, "*.json")


def differences(old, new, at: str = "") -> list[tuple[str, bool]]:
    """List what differs between two records, each with whether it counts."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = [pair for k in old if k in new for pair in differences(old[k], new[k], f"{at} {k}".strip())]
        lone = sorted(f"{k} ({'old' if k in old else 'new'})" for k in old.keys() ^ new.keys())
        return found + ([(f"{at} fields only in one record: {', '.join(lone)}", at not in LENIENT)] if lone else [])
    if isinstance(old, list) and isinstance(new, list) and old != new:
        apart = [pair for pair in zip(old, new) if pair[0] != pair[1]]
        return [(f"{at}: {len(apart)} differ of {len(old)} and {len(new)}, first {apart[:1]}", True)]
    return [] if old == new else [(f"{at}: {str(old)[:150]!r} and {str(new)[:150]!r}", True)]


def same(old: dict, new: dict, only: str) -> bool:
    """Print each case; return whether all are the same and none failed."""
    verdicts, missing = [], dict(error="it is not in this record")
    for name in [name for name in sorted(old.keys() | new.keys()) if only in name]:
        sides = old.get(name, missing), new.get(name, missing)
        found = [("error: " + side["error"], True) for side in sides if "error" in side] or differences(*sides)
        verdicts.append("different" if any(counts for _, counts in found) else "same")
        print("\n           ".join([f"{verdicts[-1]:10} {name}", *(text for text, _ in found)]))
    return "different" not in verdicts


def make(root: Path, only: str) -> dict:
    """Record a checkout: for each case its results, or the error that it ended with."""

    def do(kind: str, name: str) -> tuple[str, dict]:
        try:
            case = getattr(recorder, kind)(name)
        except Exception as error:
            case = dict(error=f"{type(error).__name__}: {error}")
        print(f"{kind}/{name}", case.get("error") or f"resumed: {case.get('resumed', '-')}", flush=True)
        return f"{kind}/{name}", case

    cases = dict(train=TRAINING, data=DATA, sample=SAMPLES, gguf=["f32", "f16", "bf16", "q8_0"], evaluate=["record"])
    chosen = [(kind, name) for kind, names in cases.items() for name in names if only in f"{kind}/{name}"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        work = Path(folder, "checkout")
        left_out = (".*", "out", "tests", "docs", "venv", "__pycache__", "*.bin", "*.pt", "*.gguf", "*.safetensors")
        shutil.copytree(root, work, ignore=shutil.ignore_patterns(*left_out))
        paragraphs = (work / "data/shakespeare/play.txt").read_text(encoding="utf-8").split("\n\n")
        (work / "documents.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in paragraphs))
        recorder = Recorder(work)
        recorder.run(f"train.py {BASE} {TRAINING['adamw']} --out_dir=out/adamw")  # other cases begin from its model
        return dict(sorted(pool.map(lambda case: do(*case), chosen)))


def main():
    s = dict(root=Path(__file__).parents[2], out="", compare="", only="")
    s |= dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    if s["compare"]:
        records = [json.loads(Path(file).read_text(encoding="utf-8")) for file in s["compare"].split(",")]
        raise SystemExit(0 if same(*records, s["only"]) else 1)
    if not s["out"]:
        raise SystemExit(__doc__)
    record = make(Path(s["root"]).resolve(), s["only"])
    Path(s["out"]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sound = [case.get("resumed", "equal") == "equal" and "error" not in case for case in record.values()]
    raise SystemExit(0 if sound and all(sound) else 1)


if __name__ == "__main__":
    main()
