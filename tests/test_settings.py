"""lib/settings.py: recipes and flags; unknown settings and wrong types are reported at once, with nothing started."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lib.settings import Count, UserError, Within, check, documented_settings, override, parse

import pytest
from conftest import ROOT

import prepare
import train
from model import SmolLM2Config


@dataclass
class Settings:
    steps: int = 10  # how many
    rate: float = 0.1  # how fast
    name: str = "a"  # what it
    #                  is called
    flag: bool = False  # whether
    limit: int | None = None  # at most
    rows: Count = 4  # 1 or more
    top: Annotated[float, Within(above=0, most=1)] | None = None  # a share
    way: Literal["up", "down"] = "up"  # which


def take(*argv, **kw):
    return override(list(argv), Settings, **kw)[0]


def test_flags_convert_to_the_type_of_the_default():
    """A float accepts an int, text keeps its '=', and None can be given."""
    s = take("--steps=1_000", "--rate=1", "--name=a=b", "--flag=true", "--limit=5")
    assert (s.steps, s.rate, s.name, s.flag, s.limit) == (1000, 1.0, "a=b", True, 5)
    assert type(s.rate) is float
    assert take("--limit=none").limit is None and take("--top=none").top is None
    assert take("--top=1").top == 1.0 and take("--way=down").way == "down"
    assert take("--rate=3e-4").rate == 3e-4


@pytest.mark.parametrize("given, meant", [("True", "on"), ("false", "off"), ("auto", "auto"), ("on", "on")])
def test_compile_is_written_as_in_nanogpt_too(given, meant, tmp_path):
    """--compile=False is the first flag that a user of nanoGPT types on a laptop. A recipe may say it, too."""
    (tmp_path / "r.py").write_text(f"compile = {given}" if given == "True" else f"compile = {given!r}")
    for argv in ([f"--compile={given}"], [str(tmp_path / "r.py")]):
        assert override(argv, train.Settings)[0].compile == meant
    with pytest.raises(SystemExit):
        override(["--compile=yes"], train.Settings)


def test_nanogpts_names_lead_to_ours(capsys):
    """For a setting of nanoGPT the error gives its name here, or what replaces it."""
    for key, hint in (("wandb_log", "log.jsonl"), ("n_layer", "Did you mean num_hidden_layers?")):
        with pytest.raises(SystemExit):
            override([f"--{key}=1"], train.Settings)
        assert f"--{key}=1: no such setting." in (printed := capsys.readouterr().err) and hint in printed


def test_later_wins_and_recipes_come_before_flags(tmp_path):
    """Recipes apply in order, then the flags, wherever they are. Names that begin with _ are private to the recipe."""
    (tmp_path / "a.py").write_text("steps = 1\nrate = 2\n_x = 3\nimport math\n")
    (tmp_path / "b.py").write_text("steps = 2\n")
    s = take("--name=z", str(tmp_path / "a.py"), str(tmp_path / "b.py"))
    assert (s.steps, s.rate, s.name) == (2, 2.0, "z") and "steps" not in globals(), "a recipe has its own namespace"
    assert take(str(tmp_path / "a.py"), "--steps=9").steps == 9


def test_parse_tells_where_a_setting_came_from(tmp_path):
    """A resumed run treats a flag and a recipe differently; a value that equals the default counts as given, too."""
    (tmp_path / "a.py").write_text("steps = 10\nrate = 2\n")
    (s,), given = parse([str(tmp_path / "a.py"), "--rate=3", "--way=up"], Settings)
    assert given == {"steps": "recipe", "rate": "flag", "way": "flag"} and s.rate == 3.0


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--stepz=3", "Did you mean steps?"), ("--steps=8.5", "expected a whole number like the default 10"),
        ("--rate=inf", "got 'inf', expected a number"), ("--flag=maybe", "expected true or false"),
        ("--rows=0", "expected a whole number of at least 1 like the default 4"), ("--name=\udcff", "not UTF-8"),
        ("--top=nan", "expected a number above 0 and at most 1"), ("--way=left", "got 'left', expected up or down"),
        ("--steps", "write --key=value"), ("no_such.py", "no such file"),
    ],
)  # fmt: skip
def test_a_wrong_setting_exits_2_and_says_why(argument, message, capsys):
    """A typo must never become a silent default."""
    with pytest.raises(SystemExit) as stop:
        take(argument)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_values_given_in_python_are_held_to_the_same_ranges():
    """check() is for arguments of functions: it raises one UserError with all problems, or does nothing."""
    check(Settings, rows=1, top=None, rate=3)
    with pytest.raises(UserError) as refused:
        check(Settings, rows=0, top=float("nan"), way="left", steps=True, rate="0.5")
    assert all(f"{key}: got" in str(refused.value) for key in ("rows", "top", "way", "steps", "rate"))


def guarded(body: str, **kw) -> subprocess.CompletedProcess:
    """Run a script whose main() prints 200,000 lines and then runs this body."""
    lines = f"import os, sys, signal; sys.path.insert(0, {str(ROOT)!r}); from lib.settings import *"
    # as in a terminal: in the background, or under nohup, the tests inherit that these signals are ignored
    signals = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"{lines}\n{signals}\ndef main():\n    for i in range(200_000): print('line', i)\n    {body}\nrun_main(main)"
    return subprocess.run([sys.executable, "-c", code], capture_output="stdout" not in kw, text=True, **kw)


@pytest.mark.slow
def test_what_ends_a_script_is_one_line_and_its_exit_code(tmp_path):
    """Exit code 1 for a mistake or a full disk, 130 for Ctrl-C, 143 for SIGTERM, after cleaning up; no traceback."""
    done = guarded("raise UserError('bad ' + chr(0xdcff))")
    assert done.returncode == 1 and done.stderr == "-c: bad \\udcff\n" and "line 199999" in done.stdout
    for number, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):
        cleaned = f"finally: os.mkdir({str(tmp_path / number)!r})"
        done = guarded(f"try: os.kill(os.getpid(), signal.{number}); signal.pause()\n    {cleaned}")
        assert done.returncode == code and "Traceback" not in done.stderr and (tmp_path / number).is_dir()
    with open("/dev/full", "w") as full:
        done = guarded("pass", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has seen enough
    done = guarded("pass", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""


def test_all_problems_of_recipe_and_flags_are_reported_at_once(tmp_path, capsys):
    """A typo in a recipe, which nanoGPT accepts, counts like one in a flag."""
    (tmp_path / "a.py").write_text("stepps = 1\nrate = 'fast'\nflag = 1\n")
    (tmp_path / "b.py").write_text("steps = \n")
    with pytest.raises(SystemExit):
        take(str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--nmae=x")
    err = capsys.readouterr().err
    for part in ("stepps", "Did you mean steps?", "rate", "flag", "b.py: SyntaxError", "Did you mean name?"):
        assert part in err


def test_help_lists_every_setting_with_its_comment(capsys):
    """Comments that continue on the next line are printed whole."""
    with pytest.raises(SystemExit) as stop:
        override(["--help"], Settings, doc="what it does")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "what it does" in out
    assert "--steps=10" in out and "how many" in out and "what it is called" in out


@pytest.mark.parametrize("script", ["train.py", "prepare.py", "sample.py"])
def test_every_setting_of_every_script_is_explained(script):
    """--help prints the comments. Architecture keys explain themselves."""
    for key, comment in documented_settings(str(ROOT / script)).items():
        assert comment or key in SmolLM2Config.__dataclass_fields__, f"{script}: {key} has no comment"


@pytest.mark.parametrize("recipe", sorted(Path(ROOT, "config").glob("*.py")), ids=lambda p: p.name)
def test_every_recipe_fits_both_scripts(recipe):
    """A recipe works for prepare.py and train.py: neither refuses the other's keys."""
    _, data = override([str(recipe)], train.Settings, prepare.Settings)
    (alone,) = override([str(recipe)], prepare.Settings, shared_with=str(ROOT / "train.py"))
    assert alone == data


def test_the_shared_keys_are_read_without_importing(tmp_path, capsys):
    """prepare.py must accept train.py's keys without importing it and torch; an unknown key is still refused."""
    (tmp_path / "a.py").write_text("learning_rate = 1e-3\nlerning_rate = 1\n")
    with pytest.raises(SystemExit):
        override([str(tmp_path / "a.py")], prepare.Settings, shared_with=str(ROOT / "train.py"))
    err = capsys.readouterr().err
    assert "lerning_rate" in err and "Did you mean learning_rate?" in err and err.count("no such setting") == 1
