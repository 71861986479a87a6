"""
How every script gets its settings: defaults, recipe files, flags. The other files of this folder are the recipes.

    python train.py config/tiny_shakespeare.py --max_iters=500 --learning_rate=1e-3

A script keeps its defaults in a dataclass called Settings, one per line, with a comment that --help prints. Positional
arguments are recipes: Python files of plain assignments, each run in a namespace of its own. Flags come after all the
recipes, and of two values for one setting the later wins. Unknown settings and wrong types are reported all at once,
with exit code 2, and nothing is started.
"""

import ast
import difflib
import re
import runpy
import sys
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path


class UserError(Exception):
    """The user's mistake, in a line or two: what was given, what was expected, and what to do. guard() prints it."""


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
                chosen[key] = convert(value, known[key])
            except ValueError as error:
                problems.append(f"{source}: {error}")
        elif key not in ignored:
            near = difflib.get_close_matches(key, [*known, *ignored], n=1)
            problems.append(f"{source}: no such setting." + (f" Did you mean {near[0]}?" if near else ""))

    for arg in argv:  # the recipes first, wherever they are among the flags
        if not arg.startswith("-"):
            for key, value in read_recipe(arg, problems).items():
                take(key, value, f"{arg}: {key}", other_keys)
    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if equals:
                take(key.replace("-", "_"), value, arg)
            else:
                problems.append(f"{arg}: write --key=value.")
        elif arg.startswith("-"):
            problems.append(f"{arg}: write --key=value.")
    if problems:
        script = Path(sys.argv[0]).name
        print("\n".join(problems) + f"\nNothing was started. All settings: python {script} --help", file=sys.stderr)
        raise SystemExit(2)
    return [cls(**{f.name: chosen[f.name] for f in fields(cls) if f.name in chosen}) for cls in Settings]


def convert(value, field):
    """`value`, from a recipe or the text of a flag, as the type of the field; ValueError says what was expected."""
    alternatives = typing.get_args(field.type) or (field.type,)  # (int, NoneType) of an `int | None`
    optional = types.NoneType in alternatives
    kind = next(t for t in alternatives if t is not types.NoneType)
    if optional and (value is None or str(value).lower() in ("none", "")):
        return None
    if isinstance(value, str) and kind is not str:  # a flag
        text = value.replace("_", "") if kind in (int, float) else value.lower()
        try:
            if kind is bool:
                return {"true": True, "1": True, "false": False, "0": False}[text]
            return kind(text)
        except (ValueError, KeyError):
            pass
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ValueError(f"got {value!r}, expected {name} like the default {field.default!r}.")


def read_recipe(path: str, problems: list[str]) -> dict:
    """The assignments of a recipe, but for imports and names that start with an underscore: those are for its own
    arithmetic. What is wrong with the file is appended to `problems`."""
    if not Path(path).is_file():
        hint = "recipes are files such as config/tiny_shakespeare.py; settings are written --key=value"
        problems.append(f"{path}: no such file ({hint}).")
        return {}
    try:
        found = runpy.run_path(path)
    except Exception as error:
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
        rows.append(f"  --{f.name}={default}".ljust(38) + "  " + comments[f.name])
    return "\n".join(rows)


def guard(main, *expected: type[Exception]):
    """Run a script's main(). A UserError, or one of `expected`, is printed without a traceback, and the exit code is 1;
    after Ctrl-C it is 130."""
    try:
        main()
    except (UserError, *expected) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output ended first, as in `python sample.py | head`: not an error
        sys.stderr.close()
        raise SystemExit(0) from None
