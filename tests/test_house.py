"""The house rules: what may import what, how long files, functions and lines may be, and what starts without torch."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_core_alone import TEN_LINES

# The lines that each file may have. A budget may move from one file to another, but the totals may not rise.
LINES = {
    "model.py": 320,
    "dataloader.py": 210,
    "optimizer.py": 140,
    "checkpoint.py": 380,
    "train.py": 570,
    "sample.py": 240,
    "prepare.py": 430,
    "chat.py": 130,
    "evaluate.py": 130,
    "verify_hf.py": 500,
    "bench.py": 580,
    "plot.py": 104,
    "app.py": 600,
    "export_gguf.py": 256,
    "import_gguf.py": 230,
    "lib/settings.py": 230,
    "lib/files.py": 120,
    "lib/device.py": 160,
    "lib/conversations.py": 240,
    "lib/readers.py": 140,
    "lib/gguf_format.py": 110,
    "lib/parallel.py": 100,
    "lib/track.py": 80,
    "fast/__init__.py": 90,
    "fast/ops.py": 150,
    "fast/quantize.py": 80,
    "fast/decode.py": 270,
    "fast/decode.c": 420,
    "fast/graphs.py": 180,
}
CORE = ["model.py", "dataloader.py", "optimizer.py", "checkpoint.py", "train.py", "sample.py"]
# The limits of all files together. A new leaf script may raise "python" by its lines, to at most 7,300, and its tests
# may raise "tests", to at most 10,500.
TOTALS = {
    "python": 6460,
    "core lines": 1870,
    "core characters": 100000,
    "tests": 9800,
    "README words": 1400,
    "docs words": 9000,
}

# What each file may import of the project; "lib" and "fast" stand for all of their files.
MODELLING = ["lib", "model", "dataloader", "optimizer", "checkpoint", "sample"]
MAY_IMPORT = {
    "model": [],
    "dataloader": ["lib", "model"],
    "optimizer": ["lib", "model"],
    "checkpoint": ["lib", "model"],
    "sample": ["lib", "model", "dataloader", "optimizer", "checkpoint"],
    "prepare": ["lib"],
    "evaluate": [*MODELLING, "prepare"],
    "train": [*MODELLING, "prepare", "evaluate"],
    "lib": ["lib"],
    "fast": ["fast", "lib", "model", "checkpoint", "sample"],
}
COMMAND = [*MODELLING, "fast", "prepare", "evaluate"]  # the other scripts


def python_files() -> list[str]:
    return sorted(
        str(f.relative_to(ROOT)) for f in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("fast/*.py")]
    )


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


def forbidden_imports(file: str, source: str) -> set[str]:
    """The project's modules that a file imports and may not."""
    name = file.split("/")[0].removesuffix(".py")
    modules = {f.split("/")[0].removesuffix(".py") for f in python_files()}
    return imported(source) & modules - {*MAY_IMPORT.get(name, COMMAND), name}


def test_imports_point_one_way():
    """A file that imports what depends on it cannot be read, tested or started alone."""
    for file in python_files():
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not forbidden_imports(file, source), f"{file} imports {forbidden_imports(file, source)}"
        if file != "verify_hf.py":
            assert "transformers" not in imported(source), f"{file} imports transformers at the top"


@pytest.mark.parametrize(
    "file, source, found",
    [
        ("lib/files.py", "import json\nfrom sample import generate", {"sample"}),
        ("optimizer.py", "import train as t, math", {"train"}),
        ("chat.py", "from fast import ops\nfrom lib.settings import UserError", set()),
        ("prepare.py", "try:\n    pass\nexcept ImportError:\n    import checkpoint", {"checkpoint"}),
        ("app.py", "class A:\n    import train", {"train"}),
        ("sample.py", "def main():\n    import train", set()),  # in a function it costs nothing before it is called
    ],
)
def test_control_imports(file, source, found):
    """The test above must find a forbidden import wherever it stands at the top level."""
    assert forbidden_imports(file, source) == found


def lines_of(file: str) -> int:
    return len((ROOT / file).read_text(encoding="utf-8").splitlines())


def test_files_stay_within_their_lines():
    """A long file is not read. Whoever adds something takes something away first."""
    files = [f for f in [*python_files(), "fast/decode.c"] if lines_of(f)]
    assert set(files) == set(LINES), f"without a budget, or gone: {set(files) ^ set(LINES)}"
    over = {f: (lines_of(f), LINES[f]) for f in files if lines_of(f) > LINES[f]}
    assert not over, f"(lines, limit): {over}"


def test_totals():
    """What the files have together: lines of Python, of the core and of the tests; words of README and docs."""
    text = {f: (ROOT / f).read_text(encoding="utf-8") for f in CORE}
    words = lambda files: sum(len(f.read_text(encoding="utf-8").split()) for f in files)
    found = {
        "python": sum(map(lines_of, python_files())),
        "core lines": sum(map(lines_of, CORE)),
        "core characters": sum(map(len, text.values())),
        "tests": sum(lines_of(str(f.relative_to(ROOT))) for f in (ROOT / "tests").rglob("*.py")),
        "README words": words([ROOT / "README.md"]),
        "docs words": words((ROOT / "docs").glob("*.md")),
    }
    over = {key: (count, TOTALS[key]) for key, count in found.items() if count > TOTALS[key]}
    assert not over, f"(found, limit): {over}"


def body_lines(function) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_functions_and_lines_stay_short():
    """60 lines a function, 200 for train(); 120 columns a line, also in C."""
    for file in [*python_files(), "fast/decode.c"]:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert max(map(len, source.splitlines()), default=0) <= 120, file
        for node in ast.walk(ast.parse(source)) if file.endswith(".py") else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                limit = 200 if (file, node.name) == ("train.py", "train") else 60
                assert body_lines(node) <= limit, f"{file}: {node.name} has {body_lines(node)} lines"


@pytest.mark.parametrize(
    "statement, absent, present",
    [("import prepare, plot", "torch", "tokenizers"), ("import sample, train", "transformers", "torch")],
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


COMMANDS = [f for f in python_files() if "/" not in f and "run_main(main)" in (ROOT / f).read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", sorted({f.removesuffix(".py") for f in COMMANDS} - {"prepare", "plot"}))
def test_threads_are_told_how_to_wait_before_torch_is_loaded(script):
    """libgomp reads its setting once, when torch is loaded: a script that imports torch first would spin for
    milliseconds beside other programs. What the user has set is left alone."""
    if script == "app":
        pytest.importorskip("gradio")
    assert spin_when_torch_loads(f"import {script}") == "20000"


def test_the_users_own_way_of_waiting_is_left_alone():
    assert spin_when_torch_loads("import sample", GOMP_SPINCOUNT="7") == "7"
    assert spin_when_torch_loads("import sample", OMP_WAIT_POLICY="passive") == "None"


def test_the_lines_that_the_readme_counts_are_nearly_there():
    """A reader chooses by them what to read: none is off by more than a twentieth."""
    counted = 0
    for names, lines in re.findall(r"^\| (\[[^|]+) \| (\d+(?: \+ \d+)*) \|", (ROOT / "README.md").read_text(), re.M):
        files = re.findall(r"\]\(([\w./]+)\)", names)
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


def test_the_tests_that_the_proofs_name_exist():
    """docs/proofs.md names them as file.py::test, test; file.py::test."""
    named, file = 0, ""
    for word in re.findall(r"\btest_\w+(?:\.py)?", (ROOT / "docs/proofs.md").read_text()):
        if word.endswith(".py"):
            file = word
        else:
            assert re.search(rf"^def {word}\(", (ROOT / "tests" / file).read_text(), re.M), f"{file} has no {word}"
            named += 1
    assert named > 25


def test_the_readme_shows_the_lines_that_use_model_py_alone():
    """tests/test_core_alone.py runs them."""
    assert TEN_LINES.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("flag", ["--seed=3", "--out_dir=out/mine"])
def test_a_sweep_gives_each_run_its_own_seed_and_folder(flag):
    """A flag that every run would have in common is refused before the first of them."""
    tool = [sys.executable, ROOT / "tests/tools/sweep.py", "config/tiny_shakespeare.py", "/", flag]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"{flag}: sweep.py gives each run its own" in done.stderr and not done.stdout
