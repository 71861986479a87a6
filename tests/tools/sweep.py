"""
Train a recipe several times, with one thing changed at a time, and print the result of each variant. Nothing else
should run meanwhile. Variants are separated by a slash; the first group of arguments goes to all of them.

    python tests/tools/sweep.py config/tiny_shakespeare.py --max_iters=600 / --optimizer=adamw / --optimizer=muon
    python tests/tools/sweep.py --seeds=1,2,3 config/tiny_shakespeare.py / --token_noise=0 / --token_noise=0.1

It prints bits per byte of the validation text for the best model of each run: the mean over the seeds, and the largest
distance from it. "in rows" is train.py's figure, in rows of its block_size; "sliding" is evaluate.py's, in rows of the
model's context, 512 at most. So variants that differ in block_size cannot be compared. A recipe's max_epochs may end a
run before --max_iters: --max_epochs=0 turns that off. The runs stay under out/sweep/.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(flags: list[str], seed: str, out_dir: Path) -> dict:
    """Train once; return the time and the bits per byte of the best model. Exit if the run fails."""
    shutil.rmtree(out_dir, ignore_errors=True)
    train = [sys.executable, ROOT / "train.py", *flags, f"--seed={seed}", f"--out_dir={out_dir}"]
    done = subprocess.run(train, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(flags)}: exit code {done.returncode}\n{done.stdout[-2000:]}")
    log = [json.loads(line) for line in open(out_dir / "log.jsonl", encoding="utf-8")]
    best = min((row for row in log if "val_bpb" in row), key=lambda row: row["val_bpb"])
    data = next(line for line in done.stdout.splitlines() if line.startswith("data ")).split()[1].rstrip(":")
    measure = [sys.executable, ROOT / "evaluate.py", f"--model={out_dir}", f"--dataset={Path(data).name}"]
    measured = subprocess.run(measure, stdout=subprocess.PIPE, text=True, check=True)
    sliding = float(re.search(r"sliding.* ([\d.]+) bits per byte", measured.stdout)[1])
    return dict(
        best=best["val_bpb"], step=best["step"], last=log[-1]["step"], minutes=log[-1]["seconds"] / 60,
        sliding=sliding,
    )  # fmt: skip


def main():
    groups, seeds = [[]], ["1337"]
    for arg in sys.argv[1:]:
        if arg == "/":
            groups.append([])
        elif arg.startswith("--seeds="):
            seeds = arg.removeprefix("--seeds=").split(",")
        elif arg.startswith(("--seed=", "--out_dir=")):
            raise SystemExit(f"{arg}: sweep.py gives each run its own. For seeds: --seeds=1,2,3")
        else:
            groups[-1].append(arg)
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        raise SystemExit(__doc__.strip())
    common, variants = groups[0], groups[1:] or [[]]
    print(f"{'variant':<60} {'in rows':>14} {'sliding':>14} {'minutes':>14} {'best step':>12}", flush=True)
    for number, variant in enumerate(variants):
        rows = [run(common + variant, seed, Path(f"out/sweep/{number}-{seed}")) for seed in seeds]
        best, sliding, minutes = (spread([row[key] for row in rows]) for key in ("best", "sliding", "minutes"))
        steps = ",".join(str(row["step"]) for row in rows) + f" of {rows[0]['last']}"
        print(f"{' '.join(variant) or 'as it is':<60} {best:>14} {sliding:>14} {minutes:>14} {steps:>12}", flush=True)


def spread(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ±{max(abs(value - mean) for value in values):.3f}" if len(values) > 1 else f"{mean:.3f}"


if __name__ == "__main__":
    main()
