"""
Files that are whole or not there: atomic and durable writes, JSON, hashes, the lock of a folder, the log of a run.

    with atomic("out/run/config.json") as temporary: temporary.write_text(...)
    with exclusive(Path("out/run"), "being trained in"): ...

This file imports no torch, so that prepare.py starts at once.
"""

import hashlib
import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

from lib.settings import UserError

from filelock import FileLock, Timeout
from tokenizers import Tokenizer


@contextmanager
def atomic(path):
    """`with atomic(path) as temporary:` write the temporary file; it is renamed to `path` once it is on the disk.

    A crash at any instant leaves either the old file or the new one. The folder is synced as well: without that the
    rename itself can be lost. If the body raises, the temporary file is removed and the old one stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # Windows has no handle on a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value: dict):
    """Write `value` as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The parsed file, a JSON object. UserError where it is missing, or is anything else."""
    with read_errors_as_user_error(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, expected an object in braces")
        return value


@contextmanager
def read_errors_as_user_error(path, remedy: str = "Copy it again from where it came."):
    """Turn whatever reading a damaged or hostile file can raise into a UserError that names the file. For the few lines
    that parse a file, so that no bug of our own hides behind it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} not found. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(f"{path} is damaged, or not what it should be ({reason}). {remedy}") from None


def load_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json through the tokenizers library. UserError where it cannot be read, or would fill the memory."""
    with read_errors_as_user_error(file):
        if file.stat().st_size > 64 << 20:
            raise ValueError("over 64 MB; 65,536 tokens take a tenth of that")
        tokenizer = Tokenizer.from_file(str(file))
        if tokenizer.normalizer is not None and growth(json.loads(tokenizer.to_str())["normalizer"]) > 16:
            raise ValueError("its normalizer makes a text many times as long")
    return tokenizer


def growth(step: dict | None) -> int:
    """How many times as long a text may become in a normalizer of tokenizer.json, by what it puts in."""
    if step is None:
        return 1
    put_in = step.get("content") or step.get("prepend") or ""
    return max(1, len(put_in)) * math.prod(map(growth, step.get("normalizers", ())))


def file_sha256(path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Busy(UserError):
    """Another process holds the lock of a folder."""


@contextmanager
def exclusive(folder: Path, doing: str):
    """Only one process at a time in `folder`, which is made if need be. Busy while another holds the lock.

    The lock is the operating system's, which releases it when a process ends, also by kill -9.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(f"{folder} is {doing} by another process right now. Wait for it, or stop it.") from None
    try:
        yield
    finally:
        lock.release()


class Log:
    """log.jsonl: one line per log step, evaluation and sample. After a resume, lines beyond its step are dropped, and
    evaluations and samples that its state knows nothing of: those are about to happen again."""

    def __init__(self, path: Path, step: int, evaluated: int = -1, sampled: int = -1, say=print):
        self.path, self.say = path, say
        last = {"val_loss": evaluated, "sample": sampled}
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            rows = [
                (line, self.step_of(line), next((last[key] for key in last if f'"{key}"' in line), step))
                for line in lines
            ]
            kept = [line for line, at, known in rows if at <= min(step, known)]
            with atomic(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    @staticmethod
    def step_of(line: str) -> float:
        try:
            return float(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return math.inf  # half a line, from a kill

    def write(self, **entry):
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[key] = None  # JSON has no NaN
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as error:
            self.say(f"!! {self.path} could not be written ({error}); training goes on")
