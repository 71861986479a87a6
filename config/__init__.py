"""
Settings: how every script takes its defaults, recipe files and flags. The other files of this folder are the recipes.

    python train.py config/tiny_shakespeare.py --max_iters=500 --learning_rate=1e-3

A script keeps its defaults in a dataclass called Settings, one per line, the comment beside each being its help.
Positional arguments are recipes, Python files of plain assignments, run in a namespace of their own; then come the
flags. The later wins. Whatever does not fit is listed, all of it at once, and nothing is started.
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
    """A mistake of the user's: what was given, what was expected, and the command that mends it, in a line or two."""


def override(argv: list[str], *Settings: type, doc: str = "", shared_with: str | None = None) -> list:
    """Instances of the Settings classes with recipes and flags applied; prints help or problems and exits otherwise.

    A recipe serves several scripts: train.py hands in its own Settings and prepare.py's, and prepare.py, which must
    not import train.py, names it in `shared_with`: that script's keys are then accepted, unused, in recipes.
    """
    if any(arg in ("-h", "--help", "help") for arg in argv):
        print(doc.strip() + "\n\nsettings, with their defaults:\n" + "\n".join(map(describe, Settings)))
        raise SystemExit(0)
    known = {f.name: f for cls in Settings for f in fields(cls)}
    elsewhere = documented_settings(shared_with) if shared_with else {}
    problems, chosen = [], {}

    def take(key, value, source, extra=()):
        if key in known:
            try:
                chosen[key] = convert(value, known[key])
            except ValueError as error:
                problems.append(f"{source}: {error}")
        elif key not in extra:
            near = difflib.get_close_matches(key, [*known, *extra], n=1)
            problems.append(f"{source}: no such setting." + (f" Did you mean {near[0]}?" if near else ""))

    for arg in argv:  # recipes first, wherever they stand, then the flags
        if not arg.startswith("-"):
            for key, value in read_recipe(arg, problems).items():
                take(key, value, f"{arg}: {key}", elsewhere)
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
    kinds = [t for t in (typing.get_args(field.type) or (field.type,)) if t is not types.NoneType]
    optional = len(kinds) < len(typing.get_args(field.type))
    kind = kinds[0]
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
    """The assignments of a recipe. Names that start with an underscore are its own, for arithmetic; so are imports."""
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
    """Name and comment of every setting in a script's Settings, read from its text so that nothing is imported."""
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            comments = [lines[node.end_lineno - 1].partition("  # ")[2]]
            for line in lines[node.end_lineno :]:  # a comment may go on, indented, on the lines below
                more = re.fullmatch(r"\s+#\s{3,}(\S.*)", line)
                if not more:
                    break
                comments.append(more[1])
            found[node.target.id] = " ".join(comments).strip()
    return found


def describe(Settings: type) -> str:
    comments = documented_settings(sys.modules[Settings.__module__].__file__)
    rows = []
    for f in fields(Settings):
        default = "required" if f.default is MISSING else repr(f.default)
        rows.append(f"  --{f.name}={default}".ljust(38) + "  " + comments[f.name])
    return "\n".join(rows)


def guard(main, *expected: type[Exception]):
    """Run a script's main(); a UserError (or one of `expected`) ends it with its message and exit code 1."""
    try:
        main()
    except (UserError, *expected) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `python sample.py | head` is no error
        sys.stderr.close()
        raise SystemExit(0) from None
