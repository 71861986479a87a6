"""A cross-section of the table in tests/tools/attack.py, and the judge itself: it must see each way to end badly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "tools"))

import attack  # noqa: E402

CROSS_SECTION = """
flags/train --grad_clip=nan
flags/train --learning_rate=-1
flags/train --num_key_value_heads=0
flags/train --n_layer=2
flags/train the later wins
flags/prepare --val_fraction=1
flags/sample --temperature=inf
flags/sample --model=missing
flags/export_gguf --nonsense=1
combinations/--num_key_value_heads=3
combinations/--hidden_size=1000000000
recipes/syntax error
recipes/arithmetic
texts/binary
texts/jsonl lone surrogate
texts/CRLF
texts/symlink loop
tokenizers/prepare growing
tokenizers/sample cut
config/list
config/num_hidden_layers=1000000000
config/hidden_size='text'
weights/cut
weights/NaN
weights/stale index
export/as it is
export/template loops
state/evil pickle
state/settings empty
state/as it is
runs/downloaded model
runs/log garbage
data/no keys
data/train.bin cut
signals/train stepping SIGTERM
""".strip().splitlines()


@pytest.fixture(scope="module")
def fallen() -> dict[str, str]:
    """Case -> what was wrong with it, for those of the cross-section that fell. One start of the tool runs them all."""
    tool, only = str(ROOT / "tests/tools/attack.py"), "--only=" + ",".join(CROSS_SECTION)
    done = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", tool, only], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = done.communicate(timeout=600)
    except subprocess.TimeoutExpired:  # have it and its workers say where they are
        os.killpg(done.pid, signal.SIGABRT)
        stdout, stderr = done.communicate(timeout=60)
    assert f"{len(CROSS_SECTION)} cases, " in stdout, stdout + stderr
    lines = [line.removeprefix("FELL ") for line in stdout.splitlines() if line.startswith("FELL ")]
    found = dict(line.split(": ", 1) for line in lines)
    assert done.returncode == (1 if found else 0)
    return found


@pytest.mark.slow
@pytest.mark.xdist_group("attack")  # in one process, so that one start of the tool is enough
@pytest.mark.parametrize("case", CROSS_SECTION)
def test_case(fallen, case):
    assert not fallen.get(case)


# What a script may do wrong -> what the judge must say of it. The case allows exit code 1 and asks for the word "flag".
CONTROLS = {
    "raise KeyError('flag')": "traceback",
    "import time; time.sleep(60)": "hung",
    "print('done')": "exit code 0 on nonsense",
    "import sys; sys.exit(3)": "exit code 3",
    "import os; os.kill(os.getpid(), 9)": "exit code -9",
    "import sys; sys.exit('an error occurred')": "does not say 'flag'",
    "import sys; sys.exit('flag\\n' * 30)": "a message of 30 lines",
    "import sys; sys.exit('flag' * 5000)": "20,00",
    "import sys; open('new.txt', 'w'); sys.exit('flag')": "new: new.txt",
    "import sys; open('old.txt', 'a').write('x'); sys.exit('flag')": "changed: old.txt",
    "import os, sys; os.unlink('old.txt'); sys.exit('flag')": "gone: old.txt",
    "import sys; open('may.txt.tmp', 'w'); sys.exit('flag')": "new: may.txt.tmp",
    "import sys, tempfile; tempfile.mkdtemp(); sys.exit('flag')": "in TMPDIR",
    "import sys; x = b'x' * (300 << 20); sys.exit('flag')": "took 0.3 GB",
    "import sys, subprocess as s; s.Popen(['sleep', '60']); sys.exit('flag')": "left 1 processes running",
    "import sys; open('may.txt', 'w'); sys.exit('flag')": "",  # all in order
}


@pytest.mark.slow
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("text", CONTROLS)
def test_control_judge(tmp_path, text, real):
    """A judge that passes everything would pass every script: each of these must fall, and the last one must not."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    (tmp_path / "script.py").write_text(text)
    case = attack.Case("control", "case", str(tmp_path / "script.py"), 1, ("flag",), leaves="may.*", real=real)
    memory = 64 << 30  # what is started begins with the memory of this process, which the tests before have filled
    if "took" in CONTROLS[text]:
        held = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        if held > 250 << 20 or not real:
            pytest.skip(f"this process holds {held >> 20} MB, and what it starts begins with that")
        memory = 300 << 20
    wrong = attack.judge(case, folder, seconds=1 if "hung" in CONTROLS[text] else 20, memory=memory)
    assert CONTROLS[text] in wrong if CONTROLS[text] else not wrong


def test_control_names():
    """Each case of the cross-section is in the table, and the table has what it promises."""
    names = set(map(str, attack.table()))
    assert len(names) >= 250 and set(CROSS_SECTION) <= names
