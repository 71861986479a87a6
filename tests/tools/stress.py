"""
Test the promises of train.py and prepare.py with real kills and a full disk: too slow for the test suite.

    python tests/tools/stress.py                                # everything: about fifteen minutes on two cores
    python tests/tools/stress.py --kills=10 --prepare_kills=10  # fewer kills

It kills prepare.py at random moments: data/NAME is then the old data set or the new one, whole, and train.py uses it.
It kills a small training run while it trains, evaluates and saves: the model directory loads, here and in transformers,
and at most one checkpoint interval is lost. Then it stops the run by signals, fills the disk, and splits the work over
other micro-batches and processes. Each result is compared with an undisturbed run: to the last bit if one process
computed it, and the files by their sha256.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PLAY = ROOT / "data/shakespeare/play.txt"
sys.path.insert(0, str(ROOT))

from lib.files import file_sha256  # noqa: E402
from lib.settings import Natural, override  # noqa: E402

import checkpoint  # noqa: E402
import prepare  # noqa: E402


@dataclass
class Settings:
    kills: Natural = 50  # SIGKILLs of train.py
    prepare_kills: Natural = 20  # SIGKILLs of prepare.py
    stops: Natural = 10  # SIGINTs and SIGTERMs
    seed: int = 0  # for the random moments


RUN = (
    "--dataset=play --hidden_size=96 --intermediate_size=256 --num_hidden_layers=3 --num_attention_heads=6 "
    "--num_key_value_heads=2 --block_size=64 --global_batch_size=8 --micro_batch_size=8 --max_iters=400 "
    "--eval_interval=10 --sample_interval=50 --log_interval=1 --learning_rate=3e-3 --compile=off"
).split()
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # the model is tiny, and two processes must share two cores


def command(out, *flags, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *RUN, f"--out_dir={out}", *flags]


def start(out) -> tuple[subprocess.Popen, int]:
    """Start a run and wait for its first step, so that no kill comes during the imports; return both."""
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = subprocess.Popen(command(out), env=ONE_THREAD, **streams)
    return run, next((int(line.split()[1]) for line in run.stdout if line.startswith("step ") and "|" in line), 0)


def finish(out, *flags, processes=1, code=0) -> str:
    done = subprocess.run(command(out, *flags, processes=processes), capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def state(out):
    return torch.load(f"{out}/state.pt", weights_only=True)


def entries(out, key) -> dict:
    rows = map(json.loads, Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


def assert_same(a, b):
    """Assert that two finished runs are equal to the last bit."""
    x, y = ([state(run)["model"], state(run)["optimizers"]] for run in (a, b))
    torch.testing.assert_close(x, y, rtol=0, atol=0)
    wrong = [key for key in ("loss", "lr", "grad_norm", "val_loss", "sample") if entries(a, key) != entries(b, key)]
    files = "model.safetensors", "config.json", "tokenizer.json"
    wrong += [name for name in files if file_sha256(Path(a, name)) != file_sha256(Path(b, name))]
    assert not wrong, f"{a} and {b} differ: {wrong}"


def loads(out):
    """Assert that weights, config and tokenizer load and belong together, here and in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = checkpoint.load(out)
    ids = torch.tensor([tokenizer.encode("Softly, mother.").ids])
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(out)("Softly, mother.")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids)[0], atol=1e-4, rtol=0)


def data_files(name) -> dict:
    """Hash the files of data/NAME; from meta.json take only what describes them, not the paths and times."""
    meta = prepare.read_meta(name)
    files = {f.name: file_sha256(f) for f in Path("data", name).iterdir() if f.name not in (".lock", "meta.json")}
    return files | {key: meta[key] for key in ("train_tokens", "val_tokens", "vocab_size", "source_sha256")}


def prepare_kills(n):
    """Kill prepare.py while it replaces one data set with another: text by text, text by conversations, and back."""
    whole, chat = {}, f"--tokenizer=data/play --input={ROOT}/data/chat"
    Path("short.txt").write_text(PLAY.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    ways = dict(short="--input=short.txt --vocab_size=400", long=f"--input={PLAY} --vocab_size=600")
    ways |= dict(few=f"{chat}/heldout.jsonl", many=f"{chat}/conversations.jsonl")
    make = lambda way, name: [sys.executable, f"{ROOT}/prepare.py", f"--dataset={name}", *ways[way].split()]
    for way in ways:
        began = time.time()
        subprocess.run(make(way, way), check=True, capture_output=True)
        whole[way], seconds = data_files(way), time.time() - began
    old, written = "short", Path("data/victim/meta.json.tmp")
    shutil.copytree("data/short", "data/victim")
    for i in range(n):
        new, began = random.choice([way for way in ways if way != old]), time.time()
        run = subprocess.Popen(make(new, "victim"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while i % 2 and run.poll() is None and not (written.exists() and written.stat().st_mtime >= began):
            time.sleep(0.001)  # every other kill comes just before the new files are renamed
        time.sleep(random.random() * (0.06 if i % 2 else seconds))
        run.kill()
        run.wait()
        finish("out/victim", "--dataset=victim", "--max_iters=1", "--init_from=scratch")
        kept = [way for way in (old, new) if whole[way].items() <= data_files("victim").items()]
        (old,) = kept  # fails if data/victim is neither
    for way in ("few", "short"):
        subprocess.run(make(way, "victim"), check=True, capture_output=True)
        assert data_files("victim") == whole[way], f"left over: {data_files('victim').keys() ^ whole[way].keys()}"
    print(f"prepare kills: {n}, the data set whole each time and used by train.py")


def kills(n):
    lost = []
    for i in range(n):
        run, first = start("out/kills")
        time.sleep(random.random() * 1.5)
        run.kill()
        reached = max([first, *map(int, re.findall(r"^(?:step|eval) +(\d+)", run.communicate()[0], re.M))])
        kept = state("out/kills")["progress"]["step"] if Path("out/kills/state.pt").exists() else 0
        lost.append(reached - kept)
        assert 0 <= lost[-1] <= 10, f"kill {i + 1}: {reached} steps done, {kept} kept"
        loads("out/kills")
        if run.returncode == 0 or reached >= 390:  # the run was nearly done: start over
            shutil.rmtree("out/kills")
    finish("out/kills")
    assert not [f for f in os.listdir("out/kills") if "tmp" in f], "stale temporary files"
    assert_same("out/kills", "out/whole")
    print(f"kills: {n}, at most {max(lost, default=0)} steps repeated, the end bit-equal")


def stops(n):
    for _ in range(n):
        run, _ = start("out/stops")
        time.sleep(random.random() * 1.5)
        number = random.choice((signal.SIGINT, signal.SIGTERM))
        run.send_signal(number)
        rest = run.communicate()[0]
        stopped = run.returncode == 128 + number and "Resume with: python train.py" in rest
        assert stopped or run.returncode == 0 and "done: " in rest, rest
    finish("out/stops")
    assert_same("out/stops", "out/whole")
    print(f"stops: {n} x SIGINT or SIGTERM at random moments, the end bit-equal")


def full_disk():
    """Fill a file system of 24 MB, if this user may mount one."""
    (folder := Path("small")).mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        return print("full disk: skipped, no right to mount a small file system here")
    try:
        finish("small/run", "--max_iters=20", "--lr_decay_iters=400")
        before = (folder / "run/state.pt").read_bytes()
        (folder / "ballast").write_bytes(b"x" * (shutil.disk_usage(folder).free - 200_000))
        failed = finish("small/run", "--max_iters=60", "--lr_decay_iters=400", code=1).count("could not be written")
        assert failed and (folder / "run/state.pt").read_bytes() == before, "the previous state must stay as it was"
        assert not list(folder.glob("run/*.tmp")), "stale temporary files"
        loads(folder / "run")
        (folder / "ballast").unlink()
        finish("small/run", "--lr_decay_iters=400")
        assert_same("small/run", "out/whole")
        print(f"full disk: {failed} saves failed, the previous checkpoint stayed; later the run got to a bit-equal end")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def splits():
    fixed = "--lr_decay_iters=400", "--dtype=float32"
    finish("out/exact", *fixed)
    whole, end = entries("out/exact", "loss"), entries("out/exact", "val_loss")[400]
    ways = {  # (micro-batch, processes, last step) of each part of the run
        "micro-batch 3": [(3, 1, 400)],
        "1, then 2, then 1 process": [(8, 1, 100), (8, 2, 200), (8, 1, 400)],
    }
    print("splits (largest difference of the loss, fp32; training magnifies rounding as it goes):")
    for i, (name, parts) in enumerate(ways.items()):
        for micro, processes, until in parts:
            flags = f"--micro_batch_size={micro}", f"--max_iters={until}"
            finish(f"out/split{i}", *flags, *fixed, processes=processes)
        ours = entries(f"out/split{i}", "loss")
        early = max(abs(ours[s] - whole[s]) for s in range(1, 11))
        late = abs(entries(f"out/split{i}", "val_loss")[400] - end)
        assert ours.keys() == whole.keys() and early < 2e-5 and late < 0.02, (name, early, late)
        print(f"  {name}: {early:.1e} over the first 10 steps, {late:.1e} in the last validation loss")


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    random.seed(s.seed)
    with tempfile.TemporaryDirectory(prefix="stress") as folder, contextlib.chdir(folder):
        play = [f"--input={PLAY}", "--dataset=play", "--vocab_size=1000"]
        subprocess.run([sys.executable, str(ROOT / "prepare.py"), *play], check=True)
        prepare_kills(s.prepare_kills)
        finish("out/whole")
        print(f"undisturbed: 400 steps, best {min(entries('out/whole', 'val_loss').values()):.4f}")
        kills(s.kills)
        stops(s.stops)
        full_disk()
        splits()
    print("nothing was lost")


if __name__ == "__main__":
    main()
