"""
log.jsonl: a JSON line for each log step, evaluation, sample and changed setting of a run.

    log = Log(Path("out/run/log.jsonl"), enabled=rank == 0)
    log.write(step=10, loss=3.2)
"""

import json
import math
from contextlib import suppress
from pathlib import Path

from lib.files import atomic
from lib.settings import print_safe


class Log:
    def __init__(self, path: Path, enabled: bool = True):
        self.path, self.enabled = path, enabled

    def drop_after(self, step: int, **last: int):
        """Drop what a resume at `step` is about to repeat: later lines, and lines with a key of `last` that are later
        than its value there."""
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):  # a kill may leave half a line
                entry = json.loads(line)
                if entry["step"] <= min([step, *(last[key] for key in last if key in entry)]):
                    kept.append(line + "\n")
        with atomic(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, **entry):
        """Append a line. A full disk does not end the run."""
        if not self.enabled:
            return
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[key] = None  # JSON has no NaN
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as error:
            print_safe(f"!! {self.path} could not be written ({error}); training continues")
