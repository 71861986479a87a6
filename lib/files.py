"""
Atomic writes, JSON, hashes, the lock of a folder, and readable errors for files that cannot be read.

    with atomic("out/run/config.json") as temporary: temporary.write_text(...)
    with exclusive(Path("out/run"), "being trained in"): ...

This file imports no torch, so that prepare.py starts at once.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

from lib.settings import UserError

from filelock import FileLock, Timeout
from tokenizers import Tokenizer


@contextmanager
def atomic(path):
    """Write a file completely or not at all: `with atomic(path) as temporary:` write to temporary, which is renamed to
    `path` once it is on the disk.

    After a crash at any moment `path` is the old file or the new one. The folder is synced too, since otherwise the
    rename can be lost. If the body raises, the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value: dict):
    """Write indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Read a file that holds a JSON object."""
    with read_errors_as_user_error(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, expected an object in braces")
        return value


@contextmanager
def read_errors_as_user_error(path, remedy: str = "Copy it again from where it came."):
    """Turn whatever reading a damaged file can raise into a UserError that names the file. Wrap only the lines that
    parse it, so that no bug of our own is reported as damage."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} not found. {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception as error:
        reason = first_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is damaged, or not what it should be ({reason:.200}). {remedy}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, or its class name if it has no text."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def load_tokenizer(file: Path) -> Tokenizer:
    """Read a tokenizer.json. Text that spells a special token stays text: only a program (a chat template, prepare.py
    between documents) may insert the token itself."""
    with read_errors_as_user_error(file, "A model needs its own tokenizer: copy it from where the model came."):
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    tokenizer.encode_special_tokens = True
    return tokenizer


def file_sha256(path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Busy(UserError):
    """Another process holds the lock of a folder."""


@contextmanager
def exclusive(folder: Path, doing: str):
    """Hold the lock of a folder, which is made if need be. Raises Busy if another process holds it. The operating
    system releases the lock when a process ends, also after kill -9."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise Busy(f"{folder} is {doing} by another process right now. Wait for it, or stop it.") from None
    with lock:
        yield
