"""
Compare the golden run of tests/test_golden.py with its record to the last bit, or record it again.

    python tests/tools/golden.py                   # prints the largest difference; exit code 1 if it is not 0
    python tests/tools/golden.py --record=true     # writes tests/golden/log.json: only if the numbers should change
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from lib.settings import override  # noqa: E402

import test_golden as t  # noqa: E402
import torch  # noqa: E402

import prepare  # noqa: E402


@dataclass
class Settings:
    record: bool = False  # write the record instead of comparing with it


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ours = t.stopped_and_resumed()
        meta = prepare.read_meta("golden")
        os.chdir(t.ROOT)
    ours["data"] = {key: meta[key] for key in t.GOLDEN["data"]}
    if s.record:
        (t.ROOT / "tests/golden/log.json").write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")
        return
    print(f"largest relative difference: {t.furthest(ours)}")
    if ours != t.GOLDEN:
        raise SystemExit("not equal to the last bit")
    print("equal to the last bit")


if __name__ == "__main__":
    main()
