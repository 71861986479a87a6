"""
How every script gets its settings: defaults, recipe files, flags. The other files of this folder are the recipes.

    python train.py config/tiny_shakespeare.py --max_iters=500 --learning_rate=1e-3

A script keeps its defaults in a dataclass called Settings, one per line, with a comment that --help prints. Positional
arguments are recipes: Python files of plain assignments, each run in a namespace of its own. Flags come after all the
recipes, and of two values for one setting the later wins. Unknown settings, wrong types and values out of their range
are reported all at once, with exit code 2, and nothing is started.
"""

import ast
import difflib
import math
import numbers
import os
import re
import runpy
import signal
import sys
import types
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated

# How threads wait for each other between the parts of a matrix product. By default they spin on their cores for
# milliseconds, even where another program needs the core to let the last of them arrive, and a training step beside two
# busy processes takes several times as long. A short spin costs a few percent at most on a quiet machine
# (docs/performance.md).
# libgomp reads this when torch is loaded, so every script imports this module first; what the user set is left alone.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


class UserError(Exception):
    """The user's mistake, in a line or two: what was given, what was expected, and what to do. run_main() prints it."""


@dataclass(frozen=True)
class Within:
    """The numbers that a setting may be, declared in its type: Annotated[float, Within(above=0, most=1)]."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value) -> bool:  # not NaN, which compares false; not infinite
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self):
        ends = dict(least="of at least", above="above", most="at most", below="below")
        ends = {word: getattr(self, key) for key, word in ends.items()}
        return " and ".join(f"{word} {end:,}" for word, end in ends.items() if abs(end) < 2**63 - 1)


# The kinds of number that most settings are. A choice among words is a typing.Literal.
Count = Annotated[int, Within(least=1, most=2**63 - 1)]
NonNegativeInt = Annotated[int, Within(least=0, most=2**63 - 1)]
Seed = Annotated[int, Within(least=0, most=2**63 - 1)]
Positive = Annotated[float, Within(above=0)]
NonNegative = Annotated[float, Within(least=0)]
Fraction = Annotated[float, Within(least=0, below=1)]

# What nanoGPT calls some of these settings, for those who come from there.
NANOGPT = dict(
    n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size", batch_size="global_batch_size",
    gradient_accumulation_steps="global_batch_size", eval_iters="eval_rows", decay_lr="lr_schedule", start="prompt",
    out_dir="model",
)  # fmt: skip
NOT_HERE = dict(
    bias="SmolLM2 has none", eval_only="python evaluate.py measures a model",
    always_save_checkpoint="state.pt is saved at every evaluation, the model when it is the best",
    wandb_log="log.jsonl in the run's folder has every figure, and app.py draws it", backend="chosen by the device",
)  # fmt: skip


def override(argv: list[str], *Settings: type, doc: str = "", shared_with: str | None = None) -> list:
    """An instance of each Settings class, with the recipes and flags of argv applied. With --help among them it prints
    the help and exits with 0; where anything is wrong it prints all of it and exits with 2.

    One recipe may serve several scripts. train.py passes its own Settings and prepare.py's. prepare.py must not import
    train.py, so it passes that script's path as `shared_with`: its keys are then accepted in recipes, and ignored.
    """
    if any(arg in ("-h", "--help", "help") for arg in argv):
        print(doc.strip() + "\n\nsettings, with their defaults:\n" + "\n".join(map(describe, Settings)))
        raise SystemExit(0)
    known = {f.name: f for cls in Settings for f in fields(cls)}
    other_keys = documented_settings(shared_with) if shared_with else {}
    problems, chosen = [], {}

    def take(key, value, source, ignored=()):
        if key in known:
            try:
                chosen[key] = convert(value, known[key], is_flag=source.startswith("-"))
            except ValueError as error:
                problems.append(f"{source}: {error}")
        elif key not in ignored:
            near = (
                [NANOGPT[key]] if NANOGPT.get(key) in known else difflib.get_close_matches(key, [*known, *ignored], n=1)
            )
            hint = NOT_HERE[key] + "." if key in NOT_HERE else f"Did you mean {near[0]}?" if near else ""
            problems.append(f"{source}: no such setting. {hint}".strip())

    for arg in argv:  # the recipes first, wherever they are among the flags
        if not arg.startswith("-"):
            for key, value in read_recipe(arg, problems).items():
                take(key, value, f"{arg}: {key}", other_keys)
    for arg in argv:
        if not is_text(arg):
            problems.append(f"{ascii(arg)}: not UTF-8 text.")
        elif arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if equals:
                take(key.replace("-", "_"), value, f"{arg:.80}")
            else:
                problems.append(f"{arg}: write --key=value.")
        elif arg.startswith("-"):
            problems.append(f"{arg}: write --key=value.")
    if problems:
        script = Path(sys.argv[0]).name
        print("\n".join(problems) + f"\nNothing was started. All settings: python {script} --help", file=sys.stderr)
        raise SystemExit(2)
    return [cls(**{f.name: chosen[f.name] for f in fields(cls) if f.name in chosen}) for cls in Settings]


def flags_in(argv: list[str]) -> set[str]:
    """The settings that argv names in flags, and not in a recipe."""
    return {arg[2:].partition("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}


def convert(value, field, is_flag: bool = False):
    """`value`, of a recipe or the text of a flag, as the type of the field; ValueError says what was expected."""
    union = typing.get_origin(field.type) in (types.UnionType, typing.Union)  # Count | None
    alternatives = typing.get_args(field.type) if union else (field.type,)
    optional = types.NoneType in alternatives
    if optional and (value is None or (is_flag and value.lower() in ("none", ""))):
        return None
    kind = next(t for t in alternatives if t is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        words = typing.get_args(kind)
        if "on" in words:  # for those who write it as in nanoGPT
            value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
        if value not in words:
            words = [word or "nothing" for word in words]
            raise ValueError(f"got {value!r:.80}, expected {', '.join(words[:-1])} or {words[-1]}.")
        return value
    kind, within = typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind, Within())
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    expected = f"{name} {within}".strip() + (", or none" if optional else f" like the default {field.default!r}")
    problem = ValueError(f"got {value!r:.80}, expected {expected}.")
    if is_flag and kind is not str:
        text = value.replace("_", "") if kind in (int, float) else value.lower()
        try:
            value = {"true": True, "1": True, "false": False, "0": False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise problem from None
    elif not isinstance(value, bool):  # NumPy's numbers, too
        if kind is float and isinstance(value, numbers.Real) and abs(value) < 2**63:
            value = float(value)
        elif kind is int and isinstance(value, numbers.Integral):
            value = int(value)
    if type(value) is not kind or (kind in (int, float) and value not in within):
        raise problem
    return value


def check(Settings: type, **values):
    """UserError, all problems at once, where a value is none that the setting of its name may have."""
    known, problems = {f.name: f for f in fields(Settings)}, []
    for key, value in values.items():
        try:
            convert(value, known[key])
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise UserError("\n".join(problems))


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: bytes of a command line that are not UTF-8, and "\\ud800" in JSON, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_recipe(path: str, problems: list[str]) -> dict:
    """The assignments of a recipe, but for imports and names that start with an underscore: those are for its own
    arithmetic. What is wrong with the file is appended to `problems`."""
    if not Path(path).is_file():
        here = sorted(file.name for file in (Path(__file__).parents[1] / "config").glob("*.py"))
        hint = f"recipes in config/: {', '.join(here)}; settings are written --key=value"
        problems.append(f"{path}: no such file ({hint}).")
        return {}
    try:
        found = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        problems.append(f"{path}: {type(error).__name__}: {error}")
        return {}
    return {k: v for k, v in found.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


def documented_settings(script: str) -> dict[str, str]:
    """Name and comment of every setting in a script's Settings, read from its source text without importing it."""
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            comments = [lines[node.end_lineno - 1].partition("  # ")[2]]
            for line in lines[node.end_lineno :]:  # a comment may continue, indented, on the lines below
                more = re.fullmatch(r"\s+#\s{3,}(\S.*)", line)
                if not more:
                    break
                comments.append(more[1])
            found[node.target.id] = " ".join(comments).strip()
    return found


def describe(Settings: type) -> str:
    """The settings of a class for --help, one per line: flag, default, comment."""
    comments = documented_settings(sys.modules[Settings.__module__].__file__)
    rows = []
    for f in fields(Settings):
        default = "required" if f.default is MISSING else repr(f.default)
        words = typing.get_args(f.type) if typing.get_origin(f.type) is typing.Literal else ()
        choice = f" ({', '.join(filter(None, words))})" if words else ""
        rows.append(f"  --{f.name}={default}".ljust(38) + "  " + comments[f.name] + choice)
    return "\n".join(rows)


def run_main(main):
    """Run a script's main(). A UserError, or what the operating system refuses, is printed without a traceback, and the
    exit code is 1; after Ctrl-C it is 130. SIGTERM and a lost terminal end it in order: temporary files are removed."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a terminal that lacks a letter shows its number
        stream.reconfigure(errors="backslashreplace")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup has it ignored
        if number and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # the reader of our output ended first, as in `python sample.py | head`: not an error
        leave_stdout()
    except (UserError, OSError) as error:
        leave_stdout()
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        leave_stdout()
        print(file=sys.stderr)
        raise SystemExit(130) from None


def print_safe(text: str, end: str = "\n"):
    """Print a line. A terminal, pipe or disk that has gone does not end the work: long runs print with this."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        leave_stdout()


def leave_stdout():
    """Write out what is left to print. Where that fails, the terminal, the pipe or the disk behind it has gone: what is
    printed from here on goes nowhere, and no error comes of it."""
    try:
        print(end="", flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
