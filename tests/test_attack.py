"""A cross-section of the cases in tests/tools/attack.py, and its judge(), which must notice every kind of failure."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/tools"))
import attack  # noqa: E402

CROSS_SECTION = """
flags/train --learning_rate=nan
flags/train --num_key_value_heads=3
flags/sample --model=missing
recipes/syntax error
texts/binary
texts/CRLF
texts/jsonl {"text": null}
models/'head_dim': 7
models/cut
models/NaN
models/tokenizer cut
models/export
runs/state.pt: pickle
runs/state.pt: cut
runs/fixed hidden_size=64
runs/changed eval_interval=5
runs/log garbage
runs/train.bin cut
signals/stepping SIGTERM
""".strip().splitlines()


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """Run the tool once on the whole cross-section; return case -> what was wrong, for those that failed."""
    command = [sys.executable, str(ROOT / "tests/tools/attack.py"), "--only=" + ",".join(CROSS_SECTION)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert f"{len(CROSS_SECTION)} cases, " in done.stdout, done.stdout + done.stderr
    lines = [line.removeprefix("FAILED ") for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    found = {case: line for line in lines for case in CROSS_SECTION if line.startswith(f"{case}: ")}
    assert len(found) == len(lines) and done.returncode == (1 if found else 0)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("attack")  # in one process, so that the tool runs only once
@pytest.mark.parametrize("case", CROSS_SECTION)
def test_case(failures, case):
    assert not failures.get(case)


# What a script does wrong -> what judge() must report. The case expects exit code 1 and the word "flag".
CONTROLS = {
    "raise KeyError('flag')": "traceback",
    "import time; time.sleep(60)": "hung",
    "print('done')": "exit code 0, expected 1",
    "import sys; sys.exit(3)": "exit code 3",
    "import os; os.kill(os.getpid(), 9)": "exit code -9",
    "import sys; sys.exit('an error occurred')": "does not say 'flag'",
    "import sys; sys.exit('flag\\n' * 30)": "a message of 30 lines",
    "import sys; sys.exit('flag' * 5000)": "20,00",
    "import sys; open('new.txt', 'w'); sys.exit('flag')": "touched: new.txt",
    "import sys; open('old.txt', 'a').write('x'); sys.exit('flag')": "touched: old.txt",
    "import os, sys; os.unlink('old.txt'); sys.exit('flag')": "touched: old.txt",
    "import sys; open('may.txt.tmp', 'w'); sys.exit('flag')": "touched: may.txt.tmp",
    "import sys, tempfile; tempfile.mkdtemp(); sys.exit('flag')": "in TMPDIR",
    "import sys, subprocess as s; s.Popen(['sleep', '60']); sys.exit('flag')": "left 1 processes running",
    "import sys; open('may.txt', 'w'); sys.exit('flag')": "",  # nothing is wrong
}


@pytest.mark.slow
@pytest.mark.parametrize("text", CONTROLS)
def test_control_judge(tmp_path, monkeypatch, text):
    """Each of these scripts must fail, except the last one, which does nothing wrong."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old.txt").write_text("old")
    (tmp_path / "script.py").write_text(text)
    monkeypatch.setattr(attack, "ROOT", tmp_path)
    case = attack.Case("control/case", "script.py", 1, "flag", leaves="may.*")
    wrong = attack.judge(case, tmp_path / "folder", seconds=1 if "hung" in CONTROLS[text] else 20)
    assert CONTROLS[text] in wrong if CONTROLS[text] else not wrong


def test_control_names():
    """The table has at least 150 cases, among them the whole cross-section."""
    names = {case.name for case in attack.table()}
    assert 150 <= len(names) <= 300 and set(CROSS_SECTION) <= names
