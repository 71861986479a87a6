"""
The settings of every script: defaults, then recipes, then flags. Also UserError, and how a script ends.

    python train.py config/tiny_shakespeare.py --max_iters=500 --learning_rate=1e-3

A script keeps its defaults in a dataclass called Settings, one per line, with a comment that --help prints. Positional
arguments are recipes: Python files of plain assignments, each run in its own namespace. Flags override recipes, and
later values earlier ones. All unknown names, wrong types and values out of range are reported before anything starts.
"""

import difflib
import math
import numbers
import os
import re
import runpy
import signal
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from tqdm import tqdm

# Threads spin while they wait for each other, by default for milliseconds, and so take cores from other programs and
# from the very thread they wait for: next to two busy processes a training step takes several times as long. A short
# spin costs a few percent. libgomp reads this when torch is loaded, so every script imports this module first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")


class UserError(Exception):
    """A mistake of the user, in one or two lines: what was given, what was expected, and the command that fixes it."""


@dataclass(frozen=True)
class Within:
    """The range of a number, declared in its type: Annotated[float, Within(above=0, most=1)]."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value) -> bool:  # false for NaN and infinities
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self):
        ends = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {end:,}" for word, end in ends.items() if abs(end) < 2**63 - 1)


# The usual kinds of number. A choice among words is a typing.Literal.
Count = Annotated[int, Within(least=1, most=2**63 - 1)]
Seed = Natural = Annotated[int, Within(least=0, most=2**63 - 1)]
Positive = Annotated[float, Within(above=0)]
NonNegative = Annotated[float, Within(least=0)]
Fraction = Annotated[float, Within(least=0, below=1)]

# For nanoGPT users: what its settings are called here, or a sentence about what to use instead.
NANOGPT = dict(
    n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size", batch_size="global_batch_size",
    gradient_accumulation_steps="global_batch_size", eval_iters="eval_rows", decay_lr="lr_schedule", start="prompt",
    out_dir="model", eval_only="python evaluate.py measures a model",
    wandb_log="log.jsonl in the run's folder has every figure, and plot.py draws it",
)  # fmt: skip


def override(argv: list[str], *Settings: type, **options) -> list:
    """Return an instance of each Settings class with the recipes and flags of argv applied. options: see parse()."""
    return parse(argv, *Settings, **options)[0]


def parse(argv: list[str], *Settings: type, doc: str = "", shared_with: str | None = None) -> tuple[list, dict]:
    """Return an instance of each Settings class, and "recipe" or "flag" for each setting that argv gives.

    Prints the help and exits with 0 if argv asks for it. Prints all problems and exits with 2 if there are any.
    shared_with: path of a script that takes the same recipes; its settings are accepted in them, and ignored.
    """
    if any(arg in ("-h", "--help", "help") for arg in argv):
        print(doc.strip() + "\n\nsettings, with their defaults:\n" + "\n".join(map(describe, Settings)))
        raise SystemExit(0)
    recipes, flags, problems = [], [], []
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if not is_text(arg):
            problems.append(f"{ascii(arg)}: not UTF-8 text.")
        elif arg.startswith("--") and equals:
            flags.append(("flag", f"{arg:.80}", key.replace("-", "_"), value))
        elif arg.startswith("-"):
            problems.append(f"{arg}: write --key=value.")
        elif not Path(arg).is_file():
            problems.append(f"{arg}: no such file. The recipes are in config/, settings are written --key=value.")
        else:
            recipes += [("recipe", f"{arg}: {key}", key, value) for key, value in read_recipe(arg, problems).items()]

    known = {f.name: f for cls in Settings for f in fields(cls)}
    ignored = documented_settings(shared_with) if shared_with else {}
    values, given = {}, {}
    for source, shown, key, value in [*recipes, *flags]:
        allowed = known | ignored if source == "recipe" else known
        if key in known:
            try:
                values[key], given[key] = convert(value, known[key], source == "flag"), source
            except ValueError as error:
                problems.append(f"{shown}: {error}")
        elif key not in allowed:
            meant = NANOGPT.get(key, "")
            near = [meant] if meant in known else difflib.get_close_matches(key, allowed, n=1)
            hint = f"{meant}." if " " in meant else f"Did you mean {near[0]}?" if near else ""
            problems.append(f"{shown}: no such setting. {hint}".strip())
    if problems:
        problems.append(f"Nothing was started. All settings: python {Path(sys.argv[0]).name} --help")
        print("\n".join(problems), file=sys.stderr)
        raise SystemExit(2)
    return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in Settings], given


def read_recipe(path: str, problems: list[str]) -> dict:
    """Return a recipe's assignments, except imports, functions and names with an underscore, which serve arithmetic."""
    try:
        found = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        problems.append(f"{path}: {type(error).__name__}: {error}")
        return {}
    return {k: v for k, v in found.items() if not (k.startswith("_") or isinstance(v, types.ModuleType) or callable(v))}


def convert(value, field, is_flag: bool = False):
    """Convert a recipe's value, or the text of a flag, to the type of a field. ValueError says what was expected."""
    kind, optional = field.type, types.NoneType in get_args(field.type)
    if optional:  # Count | None
        kind = get_args(kind)[0]
        if value is None or (is_flag and value.lower() in ("none", "")):
            return None
    if get_origin(kind) is Literal:
        words = get_args(kind)
        if "on" in words:  # nanoGPT writes --compile=False
            value = {"true": "on", "false": "off"}.get(str(value).lower(), value)
        if value not in words:
            raise ValueError(f"got {value!r:.80}, expected {' or '.join(word or 'nothing' for word in words)}.")
        return value
    kind, within = get_args(kind) if get_origin(kind) is Annotated else (kind, Within())
    number = {float: numbers.Real, int: numbers.Integral}.get(kind, ())
    result, yes_no = value, {"true": True, "1": True, "false": False, "0": False}
    try:
        if is_flag:
            result = yes_no[value.lower()] if kind is bool else kind(value)
        elif isinstance(value, number) and not isinstance(value, bool):
            result = kind(value)  # an int for a float, or NumPy's numbers
    except (KeyError, ValueError, OverflowError):
        result = None
    if type(result) is not kind or (number and result not in within):
        expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
        default = ", or none" if optional else f" like the default {field.default!r}"
        raise ValueError(f"got {value!r:.80}, expected {f'{expected} {within}'.strip()}{default}.")
    return result


def check(Settings: type, **values):
    """Check values by the types of the settings with these names. UserError lists all problems at once."""
    known, problems = {f.name: f for f in fields(Settings)}, []
    for key, value in values.items():
        try:
            convert(value, known[key])
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise UserError("\n".join(problems))


def is_text(text: str) -> bool:
    """Return whether UTF-8 can encode it, unlike the lone surrogates of undecodable flags or of JSON's "\\ud800"."""
    return text == text.encode(errors="ignore").decode()


def documented_settings(script: str) -> dict[str, str]:
    """Return the comment of every setting in a script's Settings, from its source text, without importing it."""
    body = re.search(r"^class Settings:\n(.*?)^\S", Path(script).read_text(encoding="utf-8"), re.M | re.S)[1]
    body = re.sub(r"\n +#   +", " ", body)  # a comment may continue, indented, on the next lines
    return dict(re.findall(r"^    (\w+): [^#\n]*(?:# (.*))?$", body, re.M))


def describe(Settings: type) -> str:
    """Return the lines of --help for a Settings class: flag, default, comment."""
    comments = documented_settings(sys.modules[Settings.__module__].__file__)
    choice = lambda f: f" ({', '.join(filter(None, get_args(f.type)))})" if get_origin(f.type) is Literal else ""
    line = lambda f: f"  --{f.name}={f.default!r}".ljust(38) + f"  {comments[f.name]}{choice(f)}"
    return "\n".join(map(line, fields(Settings)))


def run_main(main):
    """Run a script's main(). A UserError or OSError is printed without a traceback, with exit code 1; Ctrl-C exits with
    130. SIGTERM and a lost terminal raise SystemExit, so that temporary files are removed."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # characters it cannot encode are shown as escapes
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows has no SIGHUP
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP, and so do we
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    message, code = "", 0
    try:
        main()
        print(end="", flush=True)
    except BrokenPipeError:  # as in `python sample.py | head`: not an error
        pass
    except (UserError, OSError) as error:
        message, code = f"{Path(sys.argv[0]).name}: {error}", 1
    except KeyboardInterrupt:
        code = 130
    print_safe("", end="")
    if code:
        print(message, file=sys.stderr)
        raise SystemExit(code)


def print_safe(text: str, end: str = "\n"):
    """Print a line, above a progress line. If stdout is gone (closed pipe, full disk), use /dev/null from now on."""
    try:
        with tqdm.external_write_mode():
            print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
