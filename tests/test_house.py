"""Which script imports which: an arrow never turns back, and what starts at once loads little."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# each may import those before it
ORDER = "config files conversations ops model quantize device checkpoint decode sample chat".split()
DATA = ["prepare", "dataloader"]
MAY_IMPORT = {name: ORDER[:i] for i, name in enumerate(ORDER)} | {
    "prepare": ["config", "files", "conversations"],  # no torch: it must start at once
    "dataloader": ["config", "files", "prepare"],
    "optimizer": ["config"],
    "gradients": ["config", "device"],
    "resume": ["config", "files", "checkpoint", "optimizer"],
    "evaluate": ORDER + DATA,
    "train": ORDER + DATA + ["resume", "gradients", "optimizer", "evaluate"],
    "verify_hf": ORDER + DATA + ["resume", "gradients", "optimizer", "evaluate", "train"],
    "ggml": ["config", "files"],
    "export_gguf": ORDER + DATA + ["resume", "gradients", "optimizer", "evaluate", "train", "ggml"],
    "import_gguf": ORDER + DATA + ["ggml"],
    "app": ORDER + DATA + ["resume", "gradients", "optimizer", "evaluate", "train"],
    "bench": ORDER + DATA + ["resume", "gradients", "optimizer", "evaluate", "train", "ggml", "export_gguf"],
}


def imported(source: str) -> set[str]:
    """The first part of every name that a module imports at its top level, also below an `if` or a `try` there."""
    found, nodes = set(), list(ast.parse(source).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found


def forbidden_imports(name: str, source: str) -> set[str]:
    """The project's modules that `name` imports and may not."""
    return imported(source) & set(MAY_IMPORT) - set(MAY_IMPORT[name])


def test_no_script_imports_what_comes_after_it():
    """An import that turns back makes two files one: neither can be read, tested or started without the other."""
    files = {file.stem: file for file in ROOT.glob("*.py")} | {"config": ROOT / "config" / "__init__.py"}
    assert set(files) == set(MAY_IMPORT), "a script is missing in the table, or the table names one that is not there"
    for name, file in files.items():
        source = file.read_text(encoding="utf-8")
        assert not forbidden_imports(name, source), f"{name} imports {forbidden_imports(name, source)}"
        if name != "verify_hf":
            assert "transformers" not in imported(source), f"{name} imports transformers at the top"


@pytest.mark.parametrize(
    "name, source, found",
    [
        ("files", "import json\nfrom sample import generate", {"sample"}),
        ("ops", "import model as m, math", {"model"}),
        ("model", "import ops\nfrom config import UserError", set()),
        ("prepare", "try:\n    pass\nexcept ImportError:\n    import checkpoint", {"checkpoint"}),
        ("app", "class A:\n    import bench", {"bench"}),
        ("sample", "def main():\n    import train", set()),  # in a function it costs nothing before it is called
    ],
)
def test_control_imports(name, source, found):
    """The test above must see an import that turns back, wherever it stands at the top level."""
    assert forbidden_imports(name, source) == found


@pytest.mark.parametrize(
    "statement, absent, present",
    [("import prepare", "torch", "tokenizers"), ("import sample, train", "transformers", "torch")],
)
def test_what_starting_does_not_load(statement, absent, present):
    """torch takes over a second to import, and transformers several: who does not need one must not wait for it."""
    code = f"import sys; {statement}; print({absent!r} in sys.modules, {present!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stdout + done.stderr


def spin_when_torch_loads(statement: str, **environment) -> str:
    """The value of GOMP_SPINCOUNT at the moment at which torch is imported by `statement`."""
    code = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT')); sys.stdout.flush(); os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | environment
    done = subprocess.run([sys.executable, "-c", code + statement], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", sorted(set(MAY_IMPORT) - {"config", "files", "prepare", "conversations", "ggml"}))
def test_threads_are_told_how_to_wait_before_torch_is_loaded(script):
    """libgomp reads its setting once, when torch is loaded: a script that imports torch first would spin for
    milliseconds beside other programs. What the user has set is left alone."""
    if script == "app":
        pytest.importorskip("gradio")
    assert spin_when_torch_loads(f"import {script}") == ("None" if script == "ops" else "20000")  # ops has no settings


def test_the_users_own_way_of_waiting_is_left_alone():
    assert spin_when_torch_loads("import sample", GOMP_SPINCOUNT="7") == "7"
    assert spin_when_torch_loads("import sample", OMP_WAIT_POLICY="passive") == "None"


def test_the_lines_that_the_readme_counts_are_nearly_there():
    """A reader chooses by them what to read: none is off by more than a twentieth."""
    counted = 0
    for names, lines in re.findall(r"^\| (\[[^|]+) \| (\d+(?: \+ \d+)*) \|", (ROOT / "README.md").read_text(), re.M):
        files = re.findall(r"\]\(([\w.]+)\)", names)
        for file, said in zip(files, map(int, lines.split(" + ")), strict=True):
            there = len((ROOT / file).read_text().splitlines())
            assert abs(there - said) <= 0.05 * there, f"{file} has {there} lines, README.md says {said}"
            counted += 1
    assert counted > 20


def test_what_the_list_of_words_points_to_is_there():
    """Each file of its last column exists, and holds the names that stand behind it."""
    pointed = 0
    for line in (ROOT / "docs/words.md").read_text().splitlines()[6:]:
        for place in line.split("|")[3].split(";"):
            file, _, names = place.strip().partition(", ")
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^ *(class|def) {name}\b", (ROOT / file).read_text(), re.M), f"{file} has no {name}"
                pointed += 1
            assert (ROOT / file).is_file(), place
    assert pointed > 15


@pytest.mark.parametrize("flag", ["--seed=3", "--out_dir=out/mine"])
def test_a_sweep_gives_each_run_its_own_seed_and_folder(flag):
    """A flag that every run would have in common is refused before the first of them."""
    tool = [sys.executable, ROOT / "tests/tools/sweep.py", "config/tiny_shakespeare.py", "/", flag]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"{flag}: sweep.py gives each run its own" in done.stderr and not done.stdout
