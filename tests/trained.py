"""A small run made by train.py from the play in this repository, for the tests that give it to other programs."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from conftest import ROOT, run_script

PLAY = ROOT / "data" / "shakespeare" / "play.txt"


@functools.cache  # once per test session; about seven seconds
def trained_run() -> Path:
    """Return the run's directory. Tests share it, so a test that writes to it must use copy_of_run() instead."""
    folder = Path(tempfile.mkdtemp(prefix="trained"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    arguments = (
        f"--input={PLAY} --dataset=play --vocab_size=512 --out_dir=out/play --hidden_size=64 --intermediate_size=128 "
        "--num_hidden_layers=2 --num_attention_heads=4 --num_key_value_heads=2 --block_size=64 --global_batch_size=8 "
        "--micro_batch_size=8 --max_iters=250 --eval_interval=125 --learning_rate=1e-2 --warmup_iters=5 "
        "--device=cpu --dtype=float32 --compile=off --peak_tflops=1"
    )
    # One thread: at this size a second gains nothing, and on a busy machine the two wait for each other at every step.
    done = run_script("train.py", *arguments.split(), cwd=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out" / "play"


def copy_of_run(path) -> Path:
    """Copy the run to `path`, where the test may change it; return the path."""
    return Path(shutil.copytree(trained_run(), path))
