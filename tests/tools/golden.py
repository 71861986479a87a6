"""
The golden run of tests/test_golden.py, compared to the last bit, or recorded anew.

    python tests/tools/golden.py                   # prints the largest difference; exit code 1 if it is not 0
    python tests/tools/golden.py --record=true     # writes tests/golden/log.json: only where the numbers should change
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from lib.settings import override  # noqa: E402

import pytest  # noqa: E402
import test_golden as t  # noqa: E402
import torch  # noqa: E402

import prepare  # noqa: E402


@dataclass
class Settings:
    record: bool = False  # write the record instead of comparing with it
    stopped: str = ""  # also copy the folder of the stopped run to this place


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    torch.set_num_threads(1)
    home, folder = os.getcwd(), tempfile.mkdtemp()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            t.stop_after(patch, t.STOP)
            t.go(patch)
        if s.stopped:
            shutil.copytree("out/golden", Path(home, s.stopped), ignore=shutil.ignore_patterns(".lock"))
        with pytest.MonkeyPatch.context() as patch:
            t.go(patch)
        ours = t.numbers("out/golden")
        meta = prepare.read_meta("golden")
    finally:
        os.chdir(home)
        shutil.rmtree(folder)
    ours["data"] = {k: meta[k] for k in ("train_tokens", "val_tokens", "tokenizer_sha256", "source_sha256")}
    if s.record:
        (t.GOLDEN / "log.json").write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        return
    print(f"largest relative difference: {t.furthest(ours, t.golden())}")
    if ours != t.golden():
        raise SystemExit("not equal to the last bit")
    print("equal to the last bit")


if __name__ == "__main__":
    main()
