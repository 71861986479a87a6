"""
The promises of train.py, tested by real kills and a full disk: minutes long, outside the normal suite.

    python tests/tools/stress.py                  # everything: about ten minutes on two cores
    python tests/tools/stress.py --kills=10       # fewer kills

It trains a small model in a folder of its own and (1) kills it with SIGKILL at fifty random instants, while training,
evaluating and saving, checking after each kill that the model directory loads, here and in transformers, and that no
more than one checkpoint interval is lost; (2) fills the disk under it; (3) stops it by signals at random steps; (4)
splits the work otherwise, over micro-batches and processes, also from one resume to the next. Each time the result is
compared with a run that nobody disturbed, to the last bit where one process computed it, the files by their sha256.
"""

import json
import os
import random
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
sys.path.insert(0, str(ROOT))

from lib.files import file_sha256  # noqa: E402
from lib.settings import NonNegativeInt, override  # noqa: E402

import checkpoint  # noqa: E402


@dataclass
class Settings:
    kills: NonNegativeInt = 50  # SIGKILLs
    stops: NonNegativeInt = 10  # SIGINTs and SIGTERMs
    seed: int = 0  # of the random instants


RUN = (
    "--dataset=play --vocab_size=1000 --hidden_size=96 --intermediate_size=256 --num_hidden_layers=3 "
    "--num_attention_heads=6 --num_key_value_heads=2 --block_size=64 --global_batch_size=8 --micro_batch_size=8 "
    "--max_iters=400 --eval_interval=10 --sample_interval=50 --log_interval=1 --learning_rate=3e-3 --compile=off"
).split()


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # the model is tiny, and two processes must share two cores


def command(out, *flags, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *RUN, f"--out_dir={out}", *flags]


def start(out) -> subprocess.Popen:
    return subprocess.Popen(
        command(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD
    )  # fmt: skip


def finish(out, *flags, processes=1, code=0) -> str:
    done = subprocess.run(command(out, *flags, processes=processes), capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def state(out):
    return torch.load(f"{out}/state.pt", weights_only=True)


def entries(out, key) -> dict:
    rows = []
    for line in Path(out, "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass  # half a line, from a kill
    return {row["step"]: row[key] for row in rows if key in row}


def same_run(a, b) -> str:
    """What differs between two finished runs; empty if nothing does, to the last bit."""
    x, y = state(a), state(b)
    wrong = [f"weights {k}" for k in x["model"] if not torch.equal(x["model"][k], y["model"][k])]
    for i, entry in x["optimizer"]["state"].items():
        wrong += [f"optimizer {i} {k}" for k, v in entry.items() if not torch.equal(v, y["optimizer"]["state"][i][k])]
    wrong += [key for key in ("loss", "lr", "grad_norm", "val_loss", "sample") if entries(a, key) != entries(b, key)]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        wrong += [f"sha256 of {name}"] if file_sha256(Path(a, name)) != file_sha256(Path(b, name)) else []
    return ", ".join(wrong[:5])


def loads(out):
    """Weights, config and tokenizer belong together, here and in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = checkpoint.load(out)
    ids = torch.tensor([tokenizer.encode("Softly, mother.").ids])
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(out)("Softly, mother.")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        difference = float((theirs(ids).logits - model(ids)[0]).abs().max())
    assert difference < 1e-4, f"transformers reads another model: {difference}"


def kills(n):
    started, lost, where, loaded = time.time(), [], [], 0
    for i in range(n):
        run = start("out/kills")
        last, resumed = 0, 0
        for line in run.stdout:  # count the wait from the first step, so that imports do not swallow it
            if line.startswith("resume"):
                resumed = int(line.split("at step ")[1].split(",")[0])
            if line.startswith(("step ", "eval ")) and "|" in line:
                last = int(line.split()[1])
                break
        time.sleep(random.random() * 1.5)
        run.send_signal(signal.SIGKILL)
        rest = run.communicate()[0].splitlines()
        said = [line for line in rest if line.startswith(("step ", "eval ")) and "|" in line]
        where.append("evaluating or saving" if said and said[-1].startswith("eval ") else "training")
        reached = max([last, *(int(line.split()[1]) for line in said)])
        kept = state("out/kills")["progress"]["step"] if Path("out/kills/state.pt").exists() else 0
        lost.append(reached - kept)
        assert 0 <= lost[-1] <= 10, f"kill {i}: {reached} steps done, {kept} kept"
        loads("out/kills")
        loaded += 1
        if run.returncode == 0 or reached >= 390:  # it got to its end: begin again, kills go on
            shutil.rmtree("out/kills")
        print(f"  kill {i + 1:>2}: from step {resumed} to {reached} ({where[-1]}), kept {kept}", flush=True)
    finish("out/kills")
    assert not [f for f in os.listdir("out/kills") if "tmp" in f], "stale temporary files"
    differs = same_run("out/kills", "out/whole")
    assert not differs, differs
    print(
        f"kills: {n} x SIGKILL ({where.count('training')} while training, {n - where.count('training')} while "
        f"evaluating or saving), {loaded} x the folder loaded here and in transformers, at most {max(lost)} steps "
        f"repeated (an interval is 10), the end bit-equal to the undisturbed run; {time.time() - started:.0f} s"
    )


def stops(n):
    started, steps = time.time(), []
    for _ in range(n):
        run = start("out/stops")
        for line in run.stdout:
            if line.startswith("step ") and "|" in line:
                break
        time.sleep(random.random() * 1.5)
        number = random.choice((signal.SIGINT, signal.SIGTERM))
        run.send_signal(number)
        rest = run.communicate()[0]
        stopped = run.returncode == 128 + number and "Go on with: python" in rest
        assert stopped or run.returncode == 0 and "done: " in rest, rest
        steps.append(state("out/stops")["progress"]["step"])
    finish("out/stops")
    differs = same_run("out/stops", "out/whole")
    assert not differs, differs
    print(f"stops: {n} x SIGINT or SIGTERM at steps {steps}, the end bit-equal; {time.time() - started:.0f} s")


def full_disk():
    """A file system of 24 MB where the right to mount one is there; else a limit on the size of files, which the kernel
    enforces in the middle of a write just so."""
    started, folder = time.time(), Path("small")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        print("full disk: skipped, no right to mount a small file system here")
        return
    try:
        finish("small/run", "--max_iters=20", "--lr_decay_iters=400")
        before = (folder / "run/state.pt").read_bytes()
        free = shutil.disk_usage(folder).free
        (folder / "ballast").write_bytes(b"x" * (free - 200_000))
        text = finish("small/run", "--max_iters=60", "--lr_decay_iters=400", code=1)
        failed = text.count("could not be written")
        assert failed and "ended at step 60, which was not saved" in text
        assert (folder / "run/state.pt").read_bytes() == before, "the previous state must stay as it was"
        assert not list(folder.glob("run/*.tmp"))
        loads(folder / "run")
        (folder / "ballast").unlink()
        finish("small/run", "--lr_decay_iters=400")
        finish("out/decay", "--lr_decay_iters=400")
        differs = same_run("small/run", "out/decay")
        assert not differs, differs
        print(
            f"full disk: {failed} saves failed with a warning, the previous checkpoint stayed byte for byte, training "
            f"went on; with room again the run resumed from it to a bit-equal end; {time.time() - started:.0f} s"
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def splits():
    started, worst = time.time(), {}
    ways = {
        "micro-batch 4": [("--micro_batch_size=4", 1, 400)],
        "micro-batch 3": [("--micro_batch_size=3", 1, 400)],
        "2 processes": [("--micro_batch_size=8", 2, 400)],
        "1, then 2, then 1 process": [("--micro_batch_size=8", n, m) for n, m in ((1, 100), (2, 200), (1, 400))],
    }
    for i, (name, parts) in enumerate(ways.items()):
        for micro, processes, until in parts:
            flags = (micro, f"--max_iters={until}", "--lr_decay_iters=400", "--dtype=float32")
            finish(f"out/split{i}", *flags, processes=processes)
        if not Path("out/exact").exists():
            finish("out/exact", "--lr_decay_iters=400", "--dtype=float32")
        ours, whole = entries(f"out/split{i}", "loss"), entries("out/exact", "loss")
        assert ours.keys() == whole.keys(), "other steps were logged"
        early = max(abs(ours[s] - whole[s]) for s in range(1, 11))
        late = abs(entries(f"out/split{i}", "val_loss")[400] - entries("out/exact", "val_loss")[400])
        assert early < 2e-5 and late < 0.02, (name, early, late)
        worst[name] = f"{early:.1e} over the first 10 steps, {late:.1e} in the last validation loss"
    print("splits (largest difference of the loss, fp32; training magnifies rounding as it goes):")
    for name, text in worst.items():
        print(f"  {name}: {text}")
    print(f"  {time.time() - started:.0f} s")


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    random.seed(s.seed)
    home, folder = os.getcwd(), tempfile.mkdtemp(prefix="stress")
    os.chdir(folder)
    try:
        play = f"--input={ROOT / 'data/shakespeare/play.txt'}"
        prepare = [sys.executable, str(ROOT / "prepare.py"), play, "--dataset=play", "--vocab_size=1000"]
        subprocess.run(prepare, check=True)
        finish("out/whole")
        print(f"undisturbed: 400 steps, best {min(entries('out/whole', 'val_loss').values()):.4f}")
        kills(s.kills)
        stops(s.stops)
        full_disk()
        splits()
        print("nothing was lost")
    finally:
        os.chdir(home)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
