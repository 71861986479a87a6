"""A playground on made-up runs, for test_app.py and test_app_browser.py. It runs in the process of the tests, so that
they can slow its generation down and count tokens."""

import json
import math
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from lib.conversations import CHATML
from lib.files import file_sha256

from conftest import save_hf_directory, tiny_hf

import app
from checkpoint import from_pretrained, save_pretrained

LOG = [
    dict(step=s, tokens=64 * s, loss=2 + 4 * math.exp(-s / 90), lr=1e-3 / (1 + s), tok_per_s=900.0 + s)
    for s in range(0, 300, 10)
]
EVALS = [
    dict(step=s, val_loss=v, val_ppl=math.exp(v), val_bpb=v / 2, train_loss=2.0, best=best)
    for s, v, best in ((0, 6.0, True), (100, 3.5, True), (200, 3.0, True), (290, 3.2, False))
]
SAMPLES = [dict(step=s, sample=f"<b>MARA</b>:\nWhat news at {s}?") for s in (100, 200)]


def make_run(path: Path, seed: int = 0, step: int = 200, evaluated: bool = True) -> Path:
    """Make a directory as train.py leaves it: a random tiny model, its tokenizer, metadata in the weights, a log."""
    save_hf_directory(path, tiny_hf(seed))
    facts = dict(step=str(step), tokenizer_sha256=file_sha256(path / "tokenizer.json"))
    facts |= dict(val_loss="3.0", val_bpb="1.5") if evaluated else dict(untrained="true")
    save_pretrained(from_pretrained(path), path, facts)
    rows = sorted(LOG + EVALS + SAMPLES, key=lambda row: row["step"])
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_chat_run(path: Path, seed: int = 0) -> Path:
    """Make a run with a chat template, answers that end at <|im_end|>, and a context of a few turns."""
    save_hf_directory(path, tiny_hf(seed, eos_token_id=2, max_position_embeddings=256))
    (path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return path


@contextmanager
def serving(root: Path, model: str = "", **arguments):
    """Serve the playground on the runs under root/out, in the working directory root; yield (url, demo, models)."""
    before = Path.cwd()
    os.chdir(root)
    demo = None
    try:
        models = app.Models(model, "cpu", None)
        demo = app.build(models)
        launch = app.launch_arguments(app.Settings()) | dict(server_port=None) | arguments
        _, url, _ = demo.launch(**launch, prevent_thread_lock=True)
        yield url, demo, models
    finally:
        if demo is not None:
            demo.server.force_exit = True  # do not wait for clients that are still connected
            demo.close(verbose=False)
        os.chdir(before)


class SlowGenerate:
    """Replaces app.generate: yields and counts the same tokens, takes `pause` seconds for each, never stops early."""

    def __init__(self, pause: float):
        self.pause, self.generate = pause, app.generate
        self.tokens, self.running, self.most_running, self.calls = 0, 0, 0, []
        self.ended = threading.Event()

    def __call__(self, model, ids, **settings):
        self.calls.append((ids, settings))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.ended.clear()
        try:
            for step in self.generate(model, ids, **settings | dict(stop_ids=[])):
                time.sleep(self.pause)
                self.tokens += 1
                yield step
        finally:
            self.running -= 1
            self.ended.set()

    def wait_for(self, tokens: int, timeout: float = 20):
        """Wait until this many tokens have been generated in total."""
        deadline = time.monotonic() + timeout
        while self.tokens < tokens:
            assert time.monotonic() < deadline, f"{self.tokens} tokens after {timeout} s, expected {tokens}"
            time.sleep(0.005)
