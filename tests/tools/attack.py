"""
Every script against flags, files and moments that should never come: a table of cases, each with how it must end.

    python tests/tools/attack.py                      # all of it, a few minutes on two cores
    python tests/tools/attack.py --only=flags,state   # these groups, or single cases as --list=true names them
    python tests/tools/attack.py --list=true          # the table, and nothing is run

Each case runs one command in a copy of a folder with a text, its tokens and two tiny trained runs, after damaging that
copy. It falls on a traceback, a hang, more than 2 GB, the wrong exit code, a message that is long or does not name what
is wrong, and on anything left behind: a temporary file, a process, a file of the folder that was not to change.

Most cases fork from here, where torch is loaded already, and run the script as the command line would; those that are
about starting, printing and signals (`real`) are commands of their own. For Linux: memory is read from /proc.
"""

import atexit
import contextlib
import fnmatch
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lib.settings import Count, UserError, override, run_main  # noqa: E402


@dataclass
class Settings:
    only: str = ""  # groups, or cases as GROUP/TITLE, comma-separated; empty: all
    list: bool = False  # print the cases instead of running them
    seconds: Count = 20  # a case that takes longer hangs
    jobs: Count = 2  # cases at a time


@dataclass
class Case:
    """A command, and how it must end. Paths are those of the case's own copy of the folder that make_folder() makes."""

    group: str
    title: str
    command: str  # SCRIPT --flag ..., as a shell would split it
    codes: int | tuple  # the exit code, or those that will do; minus the number of the signal that ended it
    says: tuple = ()  # each in what is printed, on stderr where it fails: "one|or another", "!never this"
    setup: Callable | tuple = ()  # damages the copy, in it
    leaves: str = ""  # globs of the files that may be new or changed
    real: bool = False  # a command of its own instead of a fork
    out: str = "file"  # where stdout goes: file; full (a full disk), gone (a reader that has ended), closed
    env: dict | None = None
    kill: tuple = ()  # (signal, true of (what was printed, temporary folder) when it is time, at most so much later)
    check: Callable | None = None  # in the folder, afterwards: what is wrong there, or nothing

    def __str__(self):
        return f"{self.group}/{self.title}"


# ----------------------------------------------------------------------------------------------------------------------
# the judge

MEMORY = 2 << 30  # bytes, of a case's processes together
CRASHES = r"Traceback \(most|panicked at|Fatal Python error|Segmentation fault|terminate called|Exception ignored"


@dataclass
class Ended:
    code: int = 0
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    memory: int = 0
    hung: bool = False
    signalled: bool = False
    left: int = 0  # processes


def judge(case: Case, template: Path, seconds: float = 20, memory: int = MEMORY) -> str:
    """Run a case in a copy of `template`; what is wrong with how it ended, empty if nothing."""
    place = Path(tempfile.mkdtemp(prefix="attack"))
    here, temporary = place / "here", place / "tmp"
    try:
        shutil.copytree(template, here, symlinks=True)
        temporary.mkdir()
        with contextlib.chdir(here):
            for damage in case.setup if isinstance(case.setup, tuple) else (case.setup,):
                damage()
            before = snapshot(here)
            ended = run(case, place, seconds, memory)
            wrong = problems(case, ended, memory)
            wrong += left_behind(case, before, snapshot(here)) if not ended.hung else []
            kept = [file.name for file in temporary.iterdir() if not file.name.startswith(("torchinductor_", "gradio"))]
            wrong += (
                [f"left {kept[0]} in TMPDIR"] if kept and not ended.hung else []
            )  # those two are caches of the libraries
            if case.check and not wrong:
                wrong += filter(None, [case.check()])
        return "; ".join(wrong)
    except Exception as error:
        return f"the case itself is broken: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def problems(case: Case, ended: Ended, memory: int) -> list[str]:
    """What is wrong with a case's end and with what it printed."""
    codes, wrong = case.codes if isinstance(case.codes, tuple) else (case.codes,), []
    last = next((line for line in ended.err.splitlines()[::-1] if line.strip()), "")[:150]
    if ended.memory > memory:
        wrong.append(f"took {ended.memory / 2**30:.1f} GB")
    elif ended.hung:
        wrong.append(f"hung: no end within {ended.seconds:.0f} s")
    elif case.kill and not ended.signalled:
        wrong.append(f"ended before its signal, exit code {ended.code}: {last}")
    elif ended.code not in codes:
        nonsense = " on nonsense" if ended.code == 0 else ""
        wrong.append(f"exit code {ended.code}{nonsense}, expected {' or '.join(map(str, codes))}: {last}")
    if re.search(CRASHES, ended.err + ended.out):
        wrong.append(f"traceback: {last}" if not wrong else "traceback")
    elif not wrong:
        failed = ended.code != 0
        text = ended.err if failed and not case.kill else ended.out + ended.err
        if failed and not case.kill and (len(ended.err.strip().splitlines()) > 6 or len(ended.err) > 2000):
            lines = len(ended.err.strip().splitlines())
            wrong.append(f"a message of {lines} lines, {len(ended.err):,} characters: {last}")
        for one in case.says:
            found = any(part.lower() in text.lower() for part in one.removeprefix("!").split("|"))
            if found == one.startswith("!"):
                wrong.append(f"says {one[1:]!r}: {last}" if found else f"does not say {one!r}: {last}")
    if ended.left:
        wrong.append(f"left {ended.left} processes running")
    return wrong


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder and what it holds, but for locks, which are the operating system's."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.name == ".lock" or "__pycache__" in path.parts or not path.is_file():
            continue
        found[os.fsdecode(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def left_behind(case: Case, before: dict, after: dict) -> list[str]:
    """Files that are new, changed or gone and may not be; a temporary file never may."""
    changed = {"new": after.keys() - before.keys(), "gone": before.keys() - after.keys()}
    changed["changed"] = {name for name in after.keys() & before.keys() if after[name] != before[name]}
    found = []
    for what, names in changed.items():
        names = [n for n in sorted(names) if n.endswith(".tmp") or not allowed(n, case.leaves)]
        found += [f"{what}: {', '.join(names[:4])}"] if names else []
    return found


def allowed(name: str, globs: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in globs.split())


# ----------------------------------------------------------------------------------------------------------------------
# running one case


def run(case: Case, place: Path, seconds: float, memory: int) -> Ended:
    """Start a case's command in a session of its own, watch it until it ends or must be ended, and leave nothing."""
    out, err, started = place / "stdout", place / "stderr", time.monotonic()
    ended, due, looked = Ended(), None, 0.0
    pid = os.fork()
    if pid == 0:
        become(case, place)
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        now = time.monotonic()
        if done:
            break
        if now - looked > 0.1:  # resident memory of all its processes, read now and then
            looked, ended.memory = now, max(ended.memory, sum(size for _, size in session(pid)))
        if case.kill and not ended.signalled:
            number, when, later = case.kill
            if due is None and when(out.read_text(errors="replace") if out.exists() else "", place / "tmp"):
                due = now + later * random.random()
            if due is not None and now >= due:
                os.kill(pid, number)
                ended.signalled, started = True, now  # how long it took to get there says nothing
        limit = seconds if ended.signalled or not case.kill else 6 * seconds
        if now - started > limit or ended.memory > memory:
            ended.hung = now - started > limit
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.005)
    ended.seconds, ended.code = time.monotonic() - started, os.waitstatus_to_exitcode(status)
    ended.memory = max(ended.memory, usage.ru_maxrss * 1024)
    for _ in range(20):  # a helper process may take a moment to see that it is alone
        ended.left = len(session(pid))
        if not ended.left:
            break
        time.sleep(0.1)
    for other, _ in session(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(other, signal.SIGKILL)
    ended.out = out.read_text(errors="replace") if out.exists() else ""
    ended.err = err.read_text(errors="replace") if err.exists() else ""
    return ended


def session(leader: int) -> list[tuple[int, int]]:
    """(process, resident bytes) of all living processes of a session."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader and fields[0] not in "ZX":
                    found.append((int(entry.name), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")))
    return found


def become(case: Case, place: Path):
    """In the fork: be the command, in its folder and with its streams. Never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(place / "here")
        for number, handler in [(signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)]:
            signal.signal(number, handler)
        create = os.O_WRONLY | os.O_CREAT
        if case.out == "gone":
            reader, writer = os.pipe()
            os.close(reader)
        else:
            writer = os.open("/dev/full", os.O_WRONLY) if case.out == "full" else os.open(place / "stdout", create)
        for have, want in [(os.open(os.devnull, os.O_RDONLY), 0), (writer, 1), (os.open(place / "stderr", create), 2)]:
            os.dup2(have, want)
        if case.out == "closed":
            os.close(1)
        script, *arguments = shlex.split(case.command)
        argv = [str(ROOT / script), *arguments]
        os.environ.update({"TMPDIR": str(place / "tmp"), "PYTHONUNBUFFERED": "1"} | (case.env or {}))
        if case.real:
            os.execv(sys.executable, [sys.executable, *argv])
        code = as_main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code & 255)


def as_main(argv: list[str]) -> int:
    """Run a script in this process as `python SCRIPT ...` would; the exit code."""
    sys.stdin, sys.stdout, sys.stderr = (open(i, mode, closefd=False) for i, mode in enumerate("rww"))
    atexit._clear()  # what the process before the fork would tidy up is not ours
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False
    tempfile.tempdir, sys.argv, sys.path[0] = None, argv, str(ROOT)
    for name in [path.stem for path in ROOT.glob("*.py")] + ["config"]:
        sys.modules.pop(name, None)
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
        print(*[leave.code] * isinstance(leave.code, str), sep="", end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    return code


# ----------------------------------------------------------------------------------------------------------------------
# the folder that each case gets a copy of, and ways to damage it

TINY = (
    "train.py --input=t.txt --dataset=t --vocab_size=300 --hidden_size=32 --intermediate_size=64 --num_hidden_layers=2 "
    "--num_attention_heads=4 --num_key_value_heads=2 --block_size=32 --global_batch_size=4 --micro_batch_size=4 "
    "--max_iters=8 --eval_interval=4 --eval_rows=8 --log_interval=1 --warmup_iters=2 --learning_rate=1e-2 "
    "--dtype=float32 --compile=off --peak_tflops=1"
)
NEW = TINY + " --out_dir=out/n"  # a run that does not exist yet
RESUME = TINY + " --out_dir=out/t --max_iters=10"  # two steps more of one that does
FINE = TINY + " --dataset=f --tokenizer=out/t --out_dir=out/f"  # beside --init_from
SAMPLE = "sample.py --model=out/t --max_new_tokens=3 --prompt=aa"
PREPARE = "prepare.py --input=t.txt --dataset=x --vocab_size=300"
EXPORT = "export_gguf.py --model=out/t"
SCRIPTS = dict(
    train=NEW, prepare=PREPARE, sample=SAMPLE, export_gguf=EXPORT, verify_hf="verify_hf.py --model=out/t",
    evaluate="evaluate.py --model=out/t --text=t.txt", bench="bench.py --model=out/t --only=decode --repeats=1",
    app="app.py",
)  # fmt: skip
CONFIG, WEIGHTS, STATE, META = "out/t/config.json", "out/t/model.safetensors", "out/t/state.pt", "data/t/meta.json"
PLAY = (ROOT / "data/shakespeare/play.txt").read_text(encoding="utf-8")
BYTES = bytes(range(256))
DEEP = "[" * 100_000  # JSON deeper than any parser's stack


def make_folder(folder: Path):
    """t.txt, data/t; out/t, a run of 8 steps; out/f, one fine-tuned from it."""
    folder.mkdir()
    (folder / "t.txt").write_text(PLAY[:8000], encoding="utf-8")
    for command in (TINY + " --out_dir=out/t", FINE + " --init_from=out/t"):
        done = subprocess.run(
            [sys.executable, *f"{ROOT}/{command}".split()], cwd=folder, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise UserError(f"the runs to attack could not be made: {done.stderr[-1000:]}")


def put(path, data, again=1):
    """Write a file, text or bytes, `again` times the same."""

    def damage():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes((data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")) * again)

    return damage


def change(path, what: Callable):
    """Replace a file's bytes by a function of them."""
    return lambda: Path(path).write_bytes(what(Path(path).read_bytes()))


def cut(path):
    return change(path, lambda data: data[: len(data) // 2])


def flip(path):
    return change(path, lambda data: data[: (n := len(data) // 2)] + bytes([data[n] ^ 4]) + data[n + 1 :])


def remove(*paths):
    return lambda: [shutil.rmtree(p) if Path(p).is_dir() else os.unlink(p) for p in paths]


def as_folder(path):
    return lambda: (os.unlink(path) if os.path.exists(path) else 0, os.makedirs(path))


def damaged_json(path) -> dict[str, Callable]:
    """What any JSON file may be instead of an object."""
    texts = {
        "empty": "", "list": "[]", "number": "5", "null": "null", "no JSON": "{'a': 1}", "not UTF-8": b'{"a": "\xff"}',
        "deep": DEEP, "deep object": '{"a":' * 100_000, "digits": '{"a": ' + "9" * 9999 + "}",
    }  # fmt: skip
    return {k: put(path, v) for k, v in texts.items()} | {"cut": cut(path), "folder": as_folder(path)}


def edit(path, what: Callable):
    """Change the object in a JSON file."""

    def damage():
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        what(found)
        Path(path).write_text(json.dumps(found), encoding="utf-8")

    return damage


def keys(path, **values):
    """Set keys of a JSON object; `...` removes one."""
    return edit(path, lambda found: [found.update({k: v}) if v is not ... else found.pop(k) for k, v in values.items()])


def tensors(what: Callable = lambda t: None):
    """Change a model's tensors, and save them without train.py's checksums, as another tool would."""

    def damage():
        from safetensors.torch import load_file, save_file

        found = load_file(WEIGHTS)
        what(found)
        save_file(found, WEIGHTS, {"format": "pt"})

    return damage


def header(what: Callable):
    """Change the JSON that a safetensors file begins with."""

    def again(data):
        n = int.from_bytes(data[:8], "little")
        what(found := json.loads(data[8 : 8 + n]))
        return struct.pack("<Q", len(json.dumps(found))) + json.dumps(found).encode() + data[8 + n :]

    return change(WEIGHTS, again)


def state(what: Callable):
    """Change what state.pt holds; what is returned, if anything is, takes its place."""

    def damage():
        import torch

        found = torch.load(STATE, weights_only=True)
        new = what(found)
        torch.save(found if new is None else new, STATE)

    return damage


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def zip_bomb():
    with zipfile.ZipFile(STATE, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        with z.open("state/data.pkl", "w", force_zip64=True) as f:
            for _ in range(5 << 10):  # 5 GB of zeros in 22 MB
                f.write(bytes(1 << 20))


def big_model():
    """Weights large enough that exporting them takes a moment."""
    keys(CONFIG, hidden_size=512, intermediate_size=8192, head_dim=128)()
    wide = {32: 512, 64: 8192, 16: 256}
    tensors(lambda t: t.update({k: v.new_ones([wide.get(n, n) for n in v.shape]) for k, v in t.items()}))()


def finite(run):
    """A check: the weights that a run keeps are numbers."""

    def wrong():
        import torch
        from safetensors.torch import load_file

        found = [torch.load(f"{run}/state.pt", weights_only=True)["model"]] if Path(run, "state.pt").exists() else []
        found += [load_file(f"{run}/model.safetensors")] if Path(run, "model.safetensors").exists() else []
        return "" if all(t.isfinite().all() for f in found for t in f.values()) else "saved weights that are not finite"

    return wrong


def reached(step, run="out/t"):
    """A check: a run's state is of this step."""

    def wrong():
        import torch

        at = torch.load(f"{run}/state.pt", weights_only=True)["progress"]["step"]
        return "" if at == step else f"state.pt is of step {at}, expected {step}"

    return wrong


def documents(n):
    """A check: data/x is complete, and of so many documents."""
    return lambda: (
        f"{found} documents, expected {n}"
        if (found := json.loads(Path("data/x/meta.json").read_text())["documents"]) != n
        else ", ".join(f"no {part}.bin" for part in ("train", "val") if not Path(f"data/x/{part}.bin").is_file())
    )


# ----------------------------------------------------------------------------------------------------------------------
# the table

WRONG, FAILS, EITHER, ODD = 2, 1, (1, 2), (0, 1)  # a flag by itself; anything else; two flags together; odd but valid


def rows(group: str, command: str, codes, says: str, damages: dict, **rest) -> list[Case]:
    """A case for each of these damages: they end alike. `says`: what the message holds, parts in two commas."""
    return [Case(group, k, command, codes, tuple(says.split(",,")), v, **rest) for k, v in damages.items()]


def flags(script: str, codes, text: str, says="", **rest) -> list[Case]:
    """A case for each of these flags alone: the message names it, or its value where that was looked for in vain."""
    cases = []
    for flag in shlex.split(text):
        key, _, value = flag.lstrip("-").partition("=")
        named = says or (f"{key}|{value}" if codes == FAILS and value else key)
        title, command = f"{script} {flag}"[:70], f"{SCRIPTS[script]} {shlex.quote(flag)}"
        cases.append(Case("flags", title, command, codes, (named,), **rest))
    return cases


def each(names: str, *values) -> str:
    return "".join(f" --{name}={value}" for name in names.split() for value in values)


# fmt: off


def flag_cases() -> list[Case]:
    floats = ("learning_rate min_lr decay_fraction token_noise weight_decay beta1 beta2 grad_clip peak_tflops "
              "rope_theta rms_norm_eps initializer_range")
    counts = ("eval_interval eval_rows log_interval global_batch_size micro_batch_size block_size hidden_size "
              "intermediate_size num_hidden_layers num_attention_heads num_key_value_heads")
    wholes = "patience sample_interval max_iters warmup_iters lr_decay_iters seed head_dim max_position_embeddings"
    cases = []
    for script in SCRIPTS:
        cases += flags(script, WRONG, "--nonsense=1 -x --modell --=5 config/missing.py --device nonsense")
        cases += flags(script, WRONG, "--model=\udcff", "utf-8")
        cases += flags(script, 0, "--help", "settings, with their defaults")
    for theirs, ours in dict(n_layer="num_hidden_layers", n_head="num_attention_heads", n_embd="hidden_size",
                             batch_size="global_batch_size", gradient_accumulation_steps="global_batch_size",
                             decay_lr="lr_schedule", learning_rat="learning_rate").items():
        cases += flags("train", WRONG, f"--{theirs}=2", ours)
    return [
        *cases,
        *flags("train", WRONG, each(floats, "nan", "inf", -1) + each("beta1 beta2 token_noise", 1, 2)),
        *flags("train", WRONG, each("learning_rate beta1 rope_theta", "", "x") + each("rope_theta rms_norm_eps", 0)),
        *flags("train", WRONG, each(counts, -1, 0) + each(wholes, -1)),
        *flags("train", WRONG, each("max_iters seed block_size", 1.5, "", "x", "1e3", "nan", "true")),
        *flags("train", WRONG, f"--seed={10**30} --seed={'9' * 20000} --tie_word_embeddings=maybe"),
        *flags("train", WRONG, "--dtype=float8 --dtype= --compile=maybe --lr_schedule= --lr_schedule=linear"),
        *flags("train", EITHER, "--device=meta --device=nonsense --device= --accept_changes=nonsense --out_dir="),
        Case("flags", "train the first wrong", NEW + " --seed=x --seed=1", WRONG, ("seed",)),
        Case("flags", "train several", NEW + " --bogus=1 --seed=x --beta1=7", WRONG, ("bogus", "seed=x", "beta1=7")),
        Case("flags", "train the later wins", NEW + " --seed=1 --seed=2", 0, ("done",), leaves="out/n/*"),
        Case("flags", "train 1_0, dashes", NEW + " --max-iters=1_0", 0, leaves="out/n/*", check=reached(10, "out/n")),
        *flags("prepare", WRONG, each("val_fraction", "nan", "inf", -1, 0, 1, "x") + each("vocab_size", "x", "1e5")),
        *flags("prepare", EITHER, each("vocab_size", -1, 0, 10, 65537) + each("dataset", "", "../x", "/x", ".",
               "a/b")),
        *flags("prepare", FAILS, each("tokenizer", "missing", "missing.json", "t.txt", "/dev/null", "a/b/c", "../")),
        *flags("prepare", FAILS, "'--tokenizer=a b/c' --tokenizer=gpt2 --tokenizer="),
        *flags("sample", WRONG, each("temperature repetition_penalty", "nan", "inf", -1, "x", "")),
        *flags("sample", WRONG, each("top_p min_p", "nan", -1, 2) + each("top_k", -1, 1.5) + " --repetition_penalty=0"),
        *flags("sample", WRONG, each("num_samples max_new_tokens", -1, 0) + each("seed", -1, 10**30)),
        *flags("sample", WRONG, "--fast=maybe --quantize=int3 --dtype=float64 --dtype=x"),
        *flags("sample", EITHER, each("device", "meta", "x", "", "cuda:99")),
        *flags("sample", FAILS, each("prompt", "FILE:missing", "FILE:")),
        *flags("sample", FAILS, "--prompt=FILE:out", "out"),
        *flags("sample", FAILS, each("model", "missing", "t.txt", "/", "a/b", "a/b/c") + " '--model=a b/c'"),
        *flags("sample", FAILS, "--model=data/t", "config.json"),
        *flags("sample", 0, f"--prompt= --top_k={10**12} '--prompt=\\0 \t' --top_k=none", "tokens"),
        *flags("sample", (0, 1, 2), "--temperature=1e-300 --repetition_penalty=1e-300", "tokens|temp|penalty"),
        Case("flags", "sample 100,000 letters", f"{SAMPLE} --prompt={'ab ' * 33000!r}", 0, ("tokens",)),
        Case("flags", "sample no run", "sample.py", FAILS, ("out",), remove("out")),
        *flags("train", FAILS, "--also_eval=missing --also_eval=out --also_eval=/dev/null"),
        *flags("evaluate", WRONG, each("block_size batch_size", -1, "x") + " --batch_size=0 --dtype=float8"),
        *flags("evaluate", FAILS, "--text=missing --text=out --dataset=missing --model=missing --block_size=1"),
        *flags("export_gguf", WRONG, "--outtype=q9 --outtype="),
        *flags("export_gguf", FAILS, "--model=missing --model=t.txt" + each("out_dir", "t.txt", "t.txt/x", "/proc/x")),
        *flags("verify_hf", EITHER, "--shape=9B --context=-1 --context=0 --context=x --seed=-1 --device=meta"),
        *flags("verify_hf", FAILS, "--model=missing --text=missing"),
        *flags("bench", EITHER, "--only=nonsense --vs=nonsense --repeats=0 --repeats=x --device=meta"),
        *flags("bench", FAILS, "--model=missing --model=t.txt --llama_bench=missing"),
        *flags("app", EITHER, "--port=-1 --port=0 --port=70000 --port=x --auth=nocolon --share=true --device=meta"),
        *flags("app", EITHER, "--dtype=x --model=missing"),
    ]


def combination_cases() -> list[Case]:
    def together(flags, *says, codes=EITHER, **rest):
        return Case("combinations", flags[:70], f"{NEW} {flags}", codes, says, **rest)

    fine, run = " --dataset=f --tokenizer=out/t", {"leaves": "out/n/*"}
    return [
        together("--warmup_iters=20", "warmup", codes=(0, 1, 2), **run),  # refused, or a warning
        together("--lr_decay_iters=2 --warmup_iters=4", "warmup", codes=(0, 1, 2), **run),
        together("--warmup_iters=5 --lr_schedule=wsd --decay_fraction=0.9", "warmup", codes=0, **run),
        *[together(f"--{f}", "block_size") for f in ("max_position_embeddings=16", "block_size=1000000")],
        *[together(f"--num_key_value_heads={n}", "num_key_value_heads") for n in (3, 8)],
        together("--num_attention_heads=3", "num_attention_heads|num_key_value_heads"),
        together("--head_dim=7", "head_dim"),
        together("--num_attention_heads=32 --num_key_value_heads=32", "head_dim|num_attention_heads"),
        *[together(f"--{f}", f.split("=")[0]) for f in ("vocab_size=400", "tokenizer=gpt2", "dataset=../t")],
        together("--dataset=missing --input=", "missing"),
        together("--init_from=resume", "state.pt"),
        *[together(f"--init_from={name}{fine}", name) for name in ("missing", "t.txt", "a/b")],
        together(f"--init_from=out/t{fine} --block_size=64", "block_size"),
        *[together(f"--{key}={10**9}", key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")],
        *[together(f"--{key}={10**9}", key) for key in ("head_dim", "max_position_embeddings", "num_attention_heads")],
        together(f"--num_attention_heads={10**9} --num_key_value_heads={10**9} --head_dim=8", "num_attention_heads"),
        together(f"--micro_batch_size={10**9} --eval_rows={10**9} --patience={10**9}", "done", codes=0, **run),
        together("--min_lr=1", "min_lr", codes=(0, 1, 2), **run),
        together("--learning_rate=1e30", codes=ODD, check=finite("out/n"), **run),
        together("--lr_schedule=wsd --sample_interval=3", "done", codes=0, **run),
        together("--eval_interval=3 --max_iters=4 --grad_clip=0", "done", codes=0, **run),
    ]


def recipe_cases() -> list[Case]:
    command = NEW + " r.py"
    texts = {
        "syntax error": "seed = = 1", "raises": "1 / 0", "leaves": "import sys; sys.exit(0)", "NUL": b"seed = 1\0",
        "recursion": "def f(): f()\nf()", "deeply nested": "seed = " + "(" * 5000,
        "missing import": "import nothing_of",
        "not UTF-8": b"init_from = '\xff\xfe'", "binary": BYTES, "bool for a number": "seed = True",
        "huge": "seed = 10**400", "object": "seed = object()", "nan": "learning_rate = float('nan')",
    }
    valid = {"empty": put("r.py", ""), "arithmetic": put("r.py", "import math\n_a = 4\nmax_iters = _a * 2")}
    return [
        *rows("recipes", command, WRONG, "r.py", {k: put("r.py", v) for k, v in texts.items()}),
        *rows("recipes", command, WRONG, "r.py", {"folder": lambda: os.mkdir("r.py")}),
        *rows("recipes", command, WRONG, "sead,,bogus,,seed", {"unknown": put("r.py", "sead = 1\nbogus = 2")}),
        *rows("recipes", command, WRONG, "seed,,beta1", {"types": put("r.py", "seed = 'x'\nbeta1 = [1]")}),
        *rows("recipes", command, WRONG, "num_hidden_layers", {"nanoGPT": put("r.py", "n_layer = 2")}),
        *rows("recipes", command, EITHER, "init_from|out/", {"surrogate": put("r.py", "init_from = 'out/\\ud800'")}),
        *rows("recipes", command, 0, "done", valid, leaves="out/n/*"),
    ]


def text_cases() -> list[Case]:
    def text(title, name, setup, codes=FAILS, *says, n=1):
        good = dict(leaves="data/x/*", check=documents(n) if codes == 0 else None) if codes != FAILS else {}
        command = PREPARE.replace("t.txt", shlex.quote(name))
        return Case("texts", title, command, codes, says or (("train",) if codes == 0 else (name,)), setup, **good)

    def tree(*names, data=PLAY):
        return tuple(put(f"x/{name}", data) for name in names)

    line, loop = json.dumps({"text": PLAY[:500]}) + "\n", (*tree("a.txt"), lambda: os.symlink("../x", "x/loop"))
    broken = {"empty": "", "one byte": "a", "only a BOM": b"\xef\xbb\xbf", "cut character": PLAY.encode() + b"\xe2\x82",
              "binary": BYTES * 100, "latin1": b"\xe9" * 999, "UTF-16": PLAY.encode("utf-16"),
              "surrogate": PLAY + "\ud800"}
    fine = {"NUL": PLAY + "\0" * 999, "BOM": "\ufeff" + PLAY, "CRLF": PLAY.replace("\n", "\r\n"),
            "special tokens": PLAY + "<|endoftext|>" * 99, "2 MB of letters": "ab" * 10**6,
            "200,000 letters": "a" * 200_000,
            "200,000 spaces": " " * 200_000, "1 MB of emoji": "🦉🏽😀" * 90_000,
            "2 MB of digits": "1234567890" * 200_000,
            "one long line": "word " * 400_000}
    second = {"lone surrogate": '{"text": "a\\ud800"}', "deep": DEEP, "deep value": '{"text": ' + DEEP,
        "no field": "{}",
              "list": "[1]", "number": '{"text": 5}', "null": '{"text": null}', "no JSON": "hello",
              "huge number": f'{{"text": {"9" * 9999}}}'}
    return [
        *[text(title, "x.txt", put("x.txt", data)) for title, data in broken.items()],
        *[text(title, "x.txt", put("x.txt", data), 0) for title, data in fine.items()],
        *[text(f"jsonl {k}", "x.jsonl", put("x.jsonl", f"{line}{v}\n"), 1, "x.jsonl", "line 2") for k,
               v in second.items()],
        text("jsonl huge number beside", "x.jsonl", put("x.jsonl", f'{line}{{"text": "a", "n": {"9" * 9999}}}\n'), ODD),
        text("jsonl blank", "x.jsonl", put("x.jsonl", "\n\n \n")),
        text("capital suffix", "X.JSONL", put("X.JSONL", line * 3), 0, n=3),
        text("gzip", "x.txt.gz", put("x.txt.gz", b"\x1f\x8b\x08\0" + BYTES[128:] * 9), 1, "x.txt.gz", "!iconv"),
        text("hidden files", "x", tree(".git/a.txt", ".a.txt")),
        text("hidden beside", "x", tree(".git/a.txt", "b/c.txt", "d.txt"), 0, n=2),
        text("empty folder", "x", lambda: os.mkdir("x")),
        text("folder of empty", "x", tree("a.txt", "b.txt", data="")),
        text("binary in folder", "x", (*tree("a.txt"), put("x/b.png", BYTES)), 1, "b.png"),
        text("symlink loop", "x", loop, 0),
        text("loop and glob", "x/**/*.txt", loop, 0),
        text("link to itself", "x.txt", lambda: os.symlink("x.txt", "x.txt")),
        text("dangling link", "x", (lambda: os.mkdir("x"), lambda: os.symlink("none", "x/a.txt"))),
        text("pipe", "x.txt", lambda: os.mkfifo("x.txt")),
        text("pipe in folder", "x", (*tree("a.txt"), lambda: os.mkfifo("x/p.txt")), 0),
        text("odd name", "x", tree("a\udcff.txt"), ODD, "x"),
        text("brackets", "x[1].txt", put("x[1].txt", PLAY), 0),
        *[text(f"no {name}", name, ()) for name in ("/dev/zero", "*.md", "[", "x.txt")],
        text("dataset is a file", "t.txt", put("data/x", "y"), 1, "data/x"),
        text("meta.json is a folder", "t.txt", as_folder("data/x/meta.json"), 1, "meta.json"),
    ]


def tokenizer_cases() -> list[Case]:
    path, there = "data/t/tokenizer.json", "out/t/tokenizer.json"
    grow = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6}] * 3

    vocabulary = lambda **ids: edit(path, lambda spec: spec["model"]["vocab"].update(ids))
    damages = damaged_json(path) | {
        "no model": keys(path, model=...), "model null": keys(path, model=None), "id -1": vocabulary(zz=-1),
        "vocab is a list": edit(path, lambda spec: spec["model"].update(vocab=[1])), "id 2^40": vocabulary(zz=2**40),
        "merge of unknown": edit(path, lambda spec: spec["model"]["merges"].append(["nix", "nie"])),
        "id 10^6": vocabulary(zz=10**6), "70,000 tokens": vocabulary(**{f"word{i}": 1000 + i for i in range(70_000)}),
        "growing": keys(path, normalizer={"type": "Sequence", "normalizers": grow}),
    }
    no_end = change(path, lambda data: data.replace(b"<|endoftext|>", b"<|nothing|>"))
    beside = {k: (v, lambda: shutil.copy(path, there), tensors()) for k, v in damages.items() if k != "folder"}
    space = change(there, lambda data: data.replace(b'"id": 2,', b'"id":  2,'))
    return [  # damaged beside a model that has our hash of it, and beside one that has not
        *rows("tokenizers", PREPARE + " --tokenizer=data/t", 1, "tokenizer", prefixed("prepare", damages)),
        *rows("tokenizers", PREPARE + " --tokenizer=data/t", 1, "endoftext", {"prepare no end": no_end}),
        *rows("tokenizers", SAMPLE, 1, "tokenizer.json", prefixed("sample", beside)),
        *rows("tokenizers", EXPORT, 1, "tokenizer", prefixed("export", beside)),
        *rows("tokenizers", SAMPLE, 1, "tokenizer.json", {"another run's": space, "missing": remove(there)}),
    ]


def prefixed(word: str, damages: dict) -> dict:
    return {f"{word} {title}": damage for title, damage in damages.items()}


def config_cases() -> list[Case]:
    sizes = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings "
             "num_key_value_heads head_dim").split()

    def sets(key, *values, codes=1, says=None):
        more = {"rope_parameters": None} if key == "rope_theta" else {}
        damages = {f"{key}={v!r}"[:60]: keys(CONFIG, **{key: v} | more) for v in values}
        says = "tokens" if codes == 0 else f"config.json,,{key}" if says is None else says
        return rows("config", SAMPLE, codes, says, damages)

    cases = [case for key in sizes for case in sets(key, "text", True, math.nan, -1, 1.5, [1])]
    cases += [case for key in sizes for case in sets(key, 10**9, says="config.json")]
    cases += [case for key in sizes[:6] for case in sets(key, None)]
    cases += [case for k in ("rope_theta", "rms_norm_eps") for case in sets(k, "x", None, True, math.nan, -1,
        math.inf, [])]
    for key, values in dict(rope_theta=(0, ...), num_attention_heads=(0, 10**400), hidden_size=(...,), head_dim=(7,),
                            num_key_value_heads=(3,), num_hidden_layers=(0,), rope_parameters=([1], "x", 5),
                            eos_token_id=("x", [[1]], -1, 10**9, {"a": 1}, 1.5), mlp_bias=("x",), hidden_act=("gelu",),
                            rope_scaling=("linear", {"type": "linear", "factor": 2.0}, [1]), attention_bias=(True,),
                            model_type=("gpt2", 5, None, ..., "x" * 10**5), tie_word_embeddings=("yes", 5, None),
                            quantization_config=({"bits": 4},)).items():
        cases += sets(key, *values)
    rope = [{"rope_theta": v} for v in ("x", [], math.nan)]
    return [
        *cases,
        *sets("rope_parameters", {"rope_type": 5}, {"rope_type": "yarn"}, says="config.json,,rope_type"),
        *sets("rope_parameters", *rope, says="config.json,,rope_theta"),
        *sets("eos_token_id", None, [0, 1], codes=0),
        *sets("head_dim", None, codes=0),
        *sets("num_key_value_heads", None, says="config.json"),
        *rows("config", SAMPLE, 1, "config.json", damaged_json(CONFIG)),
        *rows("config", SAMPLE, 1, "config.json", {"missing": remove(CONFIG), "no keys": put(CONFIG, "{}")}),
        *rows("config", SAMPLE, 1, "config.json", {"loop": (remove(CONFIG), lambda: os.symlink("config.json",
               CONFIG))}),
        *rows("config", EXPORT, 1, "config.json", {"export list": put(CONFIG, "[]")}),
        *rows("config", f"{FINE} --init_from=out/t --out_dir=out/n", 1, "config.json", {"train list": put(CONFIG,
               "[]")}),
        *rows("config", "app.py --model=out/t", 1, "eos_token_id", {"app eos": keys(CONFIG, eos_token_id="x")}),
        *rows("config", SCRIPTS["verify_hf"], 1, "config.json", {"verify layers": keys(CONFIG,
               num_hidden_layers=10**9)}),
        *rows("config", SCRIPTS["bench"], 1, "hidden_size", {"bench text": keys(CONFIG, hidden_size="x")}),
    ]


def weight_cases() -> list[Case]:
    import torch

    embedding, norm, q = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    index, shard = WEIGHTS + ".index.json", "model-00001-of-00001.safetensors"

    size = lambda n: change(WEIGHTS, lambda data: struct.pack("<Q", n) + data[8:])
    head = lambda text: put(WEIGHTS, struct.pack("<Q", len(text)) + text)
    lie = lambda **entry: header(lambda h: h[norm].update(entry))
    replace = lambda name, what: tensors(lambda t: t.update({name: what(t[name])}))
    convert = lambda dtype: tensors(lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    def indexed(**values):
        return {f"index {title}": (lambda: os.rename(WEIGHTS, f"out/t/{shard}"), put(index, json.dumps(value)))
                for title, value in values.items()}

    mapping = lambda to: {"metadata": {}, "weight_map": dict.fromkeys((embedding, norm, q), to)}
    nan = replace(norm, lambda t: t * math.nan)
    files = {
        "missing": remove(WEIGHTS), "empty": put(WEIGHTS, ""), "folder": as_folder(WEIGHTS), "cut": cut(WEIGHTS),
        "short": change(WEIGHTS, lambda d: d[:-1]), "longer": change(WEIGHTS, lambda d: d + bytes(64)),
        "flipped bit": flip(WEIGHTS), "git-lfs": put(WEIGHTS,
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "header beyond the file": size(1 << 40), "header of 2^64": size((1 << 64) - 1), "header of 0": size(0),
        "header a list": head(b"[]"), "header no JSON": head(b"nonsense"), "header deep": head(DEEP.encode()),
        "offsets overlap": header(lambda h: h[norm].update(data_offsets=h[q]["data_offsets"])),
        "offsets beyond": lie(data_offsets=[0, 1 << 40]), "offsets reversed": lie(data_offsets=[128, 0]),
        "unknown dtype": lie(dtype="F99"), "crc32 of text": header(lambda h: h.update(__metadata__={"crc32": "x"})),
        "metadata of numbers": header(lambda h: h.update(__metadata__={"step": 5})),
    }
    shapes = {
        "missing tensor": tensors(lambda t: t.pop(norm)), "wrong shape": replace(norm, lambda t: t[1:].clone()),
        "scalar": replace(norm, lambda t: t.sum()), "integers in one": lie(dtype="I32"),
    }
    types = {k: convert(getattr(torch, k)) for k in ("int32", "int8", "bool", "float8_e4m3fn", "complex64")}
    lost = {
        "NaN": nan, "inf": replace(q, lambda t: t / 0),
        "one NaN": replace(q, lambda t: torch.where(torch.arange(t.size(1)) == 5, math.nan, t)),
    }
    odd = {"mixed": replace(q, lambda t: t.bfloat16()), "1e38": replace(q, lambda t: t * 0 + 1e38),
        "float64": convert(torch.float64)}
    fine = {"bfloat16": convert(torch.bfloat16), "float16": convert(torch.float16), "0": replace(q, lambda t: t * 0),
            "stale index": put(index, json.dumps(mapping("gone.safetensors"))), "broken index": put(index, "[1]")}
    return [
        *rows("weights", SAMPLE, 1, "safetensors", files),
        *rows("weights", SAMPLE, 1, norm, shapes),
        *rows("weights", SAMPLE, 1, "type", types),
        *rows("weights", SAMPLE, 1, "finite|nan", lost),
        *rows("weights", SAMPLE, 1, "out/t", {"no tensors": head(b"{}")}),
        *rows("weights", SAMPLE, 1, "more", {"a tensor more": tensors(lambda t: t.update(more=torch.zeros(2)))}),
        *rows("weights", SAMPLE, 1, embedding, {"transposed": replace(embedding, lambda t: t.T.contiguous())}),
        *rows("weights", SAMPLE, 1, "lm_head",
              {"another head": tensors(lambda t: t.update({"lm_head.weight": t[embedding] + 1}))}),
        *rows("weights", SAMPLE, ODD, "type|tokens|finite", odd),
        *rows("weights", SAMPLE, 0, "tokens", fine),
        *rows("weights", EXPORT, 1, "finite|nan", {"export NaN": nan}),
        *rows("weights", EXPORT, 1, "type", {"export int32": types["int32"]}),
        *rows("weights", f"{FINE} --init_from=out/t --out_dir=out/n", 1, "finite|nan", {"train from NaN": nan}),
        *rows("weights", "app.py --model=out/t", 1, "safetensors", {"app cut": cut(WEIGHTS)}),
        *rows("weights", SAMPLE, 0, "tokens", indexed(good=mapping(shard))),
        *rows("weights", SAMPLE, 1, "index.json", indexed(
            list=[1], number=5, keys={"metadata": {}}, names={"weight_map": [shard]}, numbers=mapping(5),
            lists=mapping([shard]), above=mapping("../f/model.safetensors"), absolute=mapping("/etc/passwd"))),
        *rows("weights", SAMPLE, 1, "index.json|out/t", indexed(
            empty={"weight_map": {}}, folder=mapping("."), NUL=mapping("a\0b"), surrogate=mapping("a\ud800"))),
        *rows("weights", SAMPLE, 1, "model-2.safetensors", indexed(missing=mapping("model-2.safetensors"))),
    ]


def export_cases() -> list[Case]:
    jinja, config, file = "out/t/chat_template.jinja", "out/t/tokenizer_config.json", "out/t/t-q8_0.gguf"
    made = {"leaves": f"{file} out/t/Modelfile"}
    chatml = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    system = '<|im_start|>system\nhi"""\nADAPTER /etc/passwd\nSYSTEM """<|im_end|>\n'
    hostile = {
        "loops": "{% for a in range(9999) %}" * 4 + "x" + "{% endfor %}" * 4, "10^10 letters": "{{ 'a' * 10**10 }}",
        "range": "{% for i in range(10**9) %}x{% endfor %}", "power": "{{ 9 ** 9 ** 9 }}",
        "width": "{{ '%9999999999d' % 1 }}",
        "doubles": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "pads": "{{ 'a'.center(10**10) }}", "recurses": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "empty": "",
        "divides by 0": "{{ 1 / 0 }}", "wrong types": "{{ messages['x'] + 5 }}{{ 'a' + 1 }}",
        "syntax error": "{% if %}",
        "raises": "{{ raise_exception('no') }}", "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "nested": "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "of 5 MB": "x" * 5_000_000,
    }

    def injected():
        text = Path("out/t/Modelfile").read_text() if Path("out/t/Modelfile").exists() else ""
        return "a line was put into the Modelfile" if re.search("^ADAPTER", text, re.M) else ""

    return [
        *rows("export", EXPORT, 0, "t-q8_0.gguf", {"as it is": (), "ChatML": put(jinja, chatml)}, **made),
        *rows("export", EXPORT, ODD, "", {f"template {k}": put(jinja, v) for k, v in hostile.items()}, **made),
        *rows("export", EXPORT, ODD, "", {"template injects": put(jinja, system + chatml)}, check=injected, **made),
        *rows("export", EXPORT, ODD, "", {"template folder": as_folder(jinja)}, **made),
        *rows("export", EXPORT, 1, "chat_template.jinja", {"template not UTF-8": put(jinja, b"\xff\xfe\0")}),
        *rows("export", EXPORT, 1, "tokenizer_config", prefixed("config", damaged_json(config)), **made),
        *rows("export", EXPORT, 1, "tokenizer_config", {"template 5": keys(config, chat_template=5)}),
        *rows("export", EXPORT, 1, "tokenizer_config", {"template list": keys(config, chat_template=[1, {"name": 2}])}),
        *rows("export", EXPORT, 1, "eos_token_id", {"no end": keys(CONFIG, eos_token_id=None)}),
        *rows("export", EXPORT, 1, "t-q8_0.gguf", {"folder in its place": as_folder(file)}),
    ]


def state_cases() -> list[Case]:
    import torch

    parts, damages = "model optimizer progress settings facts".split(), {}
    for part in parts:
        damages[f"{part} missing"] = state(lambda s, k=part: s.pop(k) and None)
        for title, value in (("empty", {}), ("a list", [1]), ("a number", 5), ("text", "x")):
            damages[f"{part} {title}"] = state(lambda s, k=part, v=value: s.update({k: v}))
    for key, value in dict(step="x", nonsense=1, best_val_loss="x", evaluated=None, seconds=[1]).items():
        damages[f"{key} {value!r}"] = state(lambda s, k=key, v=value: s["progress"].update({k: v}))
    for value in (-5, math.nan, 10**30, 2.5, True):
        damages[f"step {value!r}"] = state(lambda s, v=value: s["progress"].update(step=v))
    for key, value in dict(param_groups=[], state={0: "x"}).items():
        damages[f"optimizer {key} {value!r}"] = state(lambda s, k=key, v=value: s["optimizer"].update({k: v}))

    weights = lambda what: state(lambda s: s.update(model={k: what(t) for k, t in s["model"].items()}))
    damages |= {
        "groups of text": state(lambda s: s["optimizer"].update(param_groups="x")), "cut": cut(STATE),
        "flip": flip(STATE),
        "empty": put(STATE, ""), "text": put(STATE, "hello"), "zeros": put(STATE, bytes(9999)), "zip bomb": zip_bomb,
        "a model": lambda: shutil.copy(WEIGHTS, STATE), "evil pickle": state(lambda s: {"model": Evil()}),
        "empty zip": lambda: zipfile.ZipFile(STATE, "w").close(), "a list": state(lambda s: [1]),
        "a number": state(lambda s: 5), "a tensor": state(lambda s: torch.ones(3)), "nothing": state(lambda s: {}),
        "other shapes": weights(lambda t: torch.zeros([n + 1 for n in t.shape])),
        "integers": weights(lambda t: t.int()),
        "a weight more": state(lambda s: s["model"].update(more=torch.ones(1))),
    }
    moments = lambda s: [m["exp_avg"].fill_(math.nan) for m in s["optimizer"]["state"].values()] and None
    lost = {"NaN": weights(lambda t: t * math.nan), "NaN moments": state(moments)}
    changed = dict(hidden_size=64, num_hidden_layers=3, rope_theta=5, num_key_value_heads=4,
        tie_word_embeddings="false")
    rate = RESUME + " --accept_changes=learning_rate --learning_rate="
    cases = [Case("state", f"{k} accepted", f"{RESUME} --{k}={v} --accept_changes={k}", EITHER, (k,))
             for k, v in changed.items()]
    return [
        *cases,
        *rows("state", RESUME, 1, "state.pt", damages),
        *rows("state", RESUME, 1, "finite|nan", lost, leaves="out/t/log.jsonl"),
        *rows("state", RESUME + " --init_from=resume", 1, "state.pt", {"folder": as_folder(STATE)}),
        *rows("state", RESUME + " --seed=7", EITHER, "seed", {"other seed": ()}),
        *rows("state", RESUME, 1, "state.pt", {"other text": (remove("data"), put("t.txt", "a b " * 999))},
               leaves="data/t/*"),
        *rows("state", rate + "1e30", ODD, "", {"rate 1e30": ()}, leaves="out/t/*", check=finite("out/t")),
        *rows("state", rate + "inf", WRONG, "learning_rate", {"rate inf": ()}),
        *rows("state", RESUME + " --learning_rate=1", EITHER, "learning_rate", {"rate changed": ()}),
        *rows("state", RESUME, 0, "done", {"as it is": ()}, leaves="out/t/*", check=reached(10)),
        *rows("state", RESUME, ODD, "done|config.json", {"no config.json": remove(CONFIG)}, leaves="out/t/*"),
    ]


def run_cases() -> list[Case]:
    """out_dir, init_from and log.jsonl."""
    ours, fine = "out/t/log.jsonl", " --dataset=f --tokenizer=out/t --out_dir=out/f"

    def case(title, setup, flags, codes, *says, **rest):
        return Case("runs", title, f"{TINY} {flags}", codes, says, setup, **rest)

    logs = {
        "garbage": change(ours, lambda d: b"garbage\n\xff\xfe\n" + d), "half a line": change(ours, lambda d: d[:-20]),
        "text for a step": change(ours, lambda d: d + b'{"step": "x"}\n'), "missing": remove(ours), "deep": put(ours,
        DEEP),
        "null for a step": change(ours, lambda d: d + b'{"step": null}\n{"step": NaN}\n{"step": [1]}\n'),
        "no objects": put(ours, '5\n"x"\nnull\n[1]\n\n'), "huge number": put(ours, '{"step": ' + "9" * 9999 + "}\n"),
    }
    downloaded, unasked = (remove(STATE, ours), tensors()), (1, "out/t", "init_from")
    shards = (*downloaded, lambda: os.rename(WEIGHTS, "out/t/model-1.safetensors"), put(WEIGHTS + ".index.json", "{}"))
    return [
        *[case(f"out_dir {name}", (), f"--out_dir={name}", 1, name) for name in ("t.txt", "t.txt/x", "/proc/x")],
        case("out_dir in quotes", (), "'--out_dir=out/a b'", 0, "'out/a b'|='out/a b'|'--model=out/a b'",
            leaves="out/a?b/*"),
        case("no state.pt", remove(STATE), "--out_dir=out/t", *unasked),
        case("downloaded model", downloaded, "--out_dir=out/t", *unasked),
        case("downloaded shards", shards, "--out_dir=out/t", *unasked),
        case("fine-tune onto itself", downloaded, f"--init_from=out/t{fine} --out_dir=out/t", *unasked),
        case("scratch, as asked", (), "--init_from=scratch --out_dir=out/t", 0, "done", leaves="out/t/*",
            check=reached(8)),
        case("other source", lambda: shutil.copytree("out/t", "out/b"), f"--init_from=out/b{fine}", EITHER,
            "init_from"),
        case("a source where there was none", (), f"--init_from=out/f{fine} --out_dir=out/t", EITHER, "init_from"),
        case("same source", (), f"--init_from=out/t --max_iters=10{fine}", 0, "done", leaves="out/f/*"),
        case("other tokenizer", put("out/t/tokenizer.json", "{}"), f"--init_from=out/t{fine} --out_dir=out/n", 1,
            "tokenizer"),
        *rows("runs", RESUME, 0, "done", prefixed("log", logs), leaves="out/t/*", check=reached(10)),
        *rows("runs", RESUME, ODD, "", {"log folder": as_folder(ours)}, leaves="out/t/*"),
    ]


def data_cases() -> list[Case]:
    numbers = "train_tokens val_tokens vocab_size eos_token_id val_bytes".split()
    train, val, tokenizer = "data/t/train.bin", "data/t/val.bin", "data/t/tokenizer.json"
    many = lambda data: b"\xff" * len(data)
    wrong = {f"{k}={v!r}": keys(META, **{k: v}) for k in numbers for v in ("x", -5, None, 1.5, ...)}
    wrong |= {f"{k}=10^12": keys(META, **{k: 10**12}) for k in numbers[:4]}
    wrong |= {f"{k} missing": keys(META, **{k: ...}) for k in ("tokenizer_sha256", "eos_token", "vocab_size_asked")}
    broken = {"cut": cut(train), "missing": remove(train), "folder": as_folder(train)}
    return [
        *[case for k, v in wrong.items() for case in rows("data", NEW, 1, f"{re.split('[= ]', k)[0]}|meta.json",
               {k: v})],
        *rows("data", NEW, 1, "meta.json", damaged_json(META) | {"no keys": put(META, "{}")}),
        *rows("data", NEW, 1, "vocab|tokenizer", {"vocabulary of 100": keys(META, vocab_size=100)}),
        *rows("data", NEW, 1, "train.bin", prefixed("train.bin", broken)),
        *rows("data", NEW, 1, "train.bin", {"train.bin ids": change(train, many)}, leaves="out/n/*"),
        *rows("data", NEW, 1, "val.bin", {"val.bin ids": change(val, many)}, leaves="out/n/*"),
        *rows("data", NEW, 1, "val.bin", {"val.bin empty": put(val, "")}),
        *rows("data", NEW, 1, "tokenizer.json", {"no tokenizer": remove(tokenizer),
               "other tokenizer": flip(tokenizer)}),
    ]


def stdout_cases() -> list[Case]:
    new, x = {"leaves": "out/n/*", "check": reached(8, "out/n")}, {"leaves": "data/x/*"}
    owl, owls = SAMPLE.replace("=aa", "='🦉 naïve 漢字'"), PREPARE.replace("t.txt", "🦉.txt")

    def printed(title, command, codes, *wheres, **rest):
        return [Case("stdout", f"{title} {w}", command, codes, out=w, real=True, **rest) for w in wheres]

    def encoded(title, command, *says, **rest):
        envs = dict(C=dict(LC_ALL="C"), ascii=dict(PYTHONIOENCODING="ascii"), latin1=dict(PYTHONIOENCODING="latin1"))
        envs["C alone"] = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        return [Case("stdout", f"{title} {k}", command, 0, says, env=v, real=True, **rest) for k, v in envs.items()
                if command.isascii() or k != "C alone"]

    return [
        *printed("train", NEW, 0, "full", "gone", "closed", **new),
        *printed("sample", SAMPLE, (1, 74, 120), "full"),
        *printed("sample", SAMPLE, ODD, "gone", "closed"),
        *printed("prepare", PREPARE, ODD, "full", "gone", "closed", **x),
        *printed("export", EXPORT, ODD, "full", leaves="out/t/t-*.gguf out/t/Modelfile"),
        *printed("help", "train.py --help", ODD, "gone"),
        *printed("help", "sample.py --help", (1, 74, 120), "full"),
        *encoded("sample", owl, "tokens"),
        *encoded("train", f"{NEW} --sample_interval=4", "done", **new),
        *encoded("prepare", owls, "train", setup=lambda: os.rename("t.txt", "🦉.txt"), **x),
        Case("stdout", "sample byte flag", SAMPLE + " '--prompt=\udcff'", WRONG, ("utf-8",), real=True),
    ]


def signal_cases() -> list[Case]:
    train = NEW + " --max_iters=1000000"
    prepare = "prepare.py --input=x.txt --dataset=x --vocab_size=3000"
    words = put("x.txt", "".join(f"{i:x} {i * i:x}\n" for i in range(200_000)))

    def hit(title, command, number, when, later, codes, *says, **rest):
        name = signal.Signals(number).name
        return Case("signals", f"{title} {name}", command, codes, says, kill=(number, when, later), real=True, **rest)

    said = lambda word: lambda text, tmp: word in text
    writing = lambda text, tmp: any(Path("out/t").glob("*.tmp"))
    saved = lambda: ", ".join(f"no {name}" for name in ("state.pt", "config.json") if not Path("out/n", name).is_file())
    at_once = lambda text, tmp: True  # while Python imports, Ctrl-C is Python's own, traceback and all
    cases, ends = [], [(signal.SIGTERM, (143, -15)), (signal.SIGINT, (130, -2)), (signal.SIGHUP, (129, -1))]
    for port, (number, codes) in enumerate(ends, 7981):
        cases += [
            hit("train starting", train, number, said("data  "), 0.1, (0, *codes), leaves="out/n/*"),
            hit("train stepping", train, number, said("| loss"), 0.5, 128 + number, "Go on with", leaves="out/n/*",
                check=saved),
            hit("prepare training", prepare, number, said("training a"), 1.0, codes, setup=words),
            hit("sample talking", SAMPLE + " --num_samples=999999", number, said("aa"), 1.0, (0, *codes)),
            hit("export writing", EXPORT, number, writing, 0.3, codes, setup=big_model),
            hit("verify comparing", SCRIPTS["verify_hf"], number, lambda _, tmp: any(tmp.iterdir()), 1.0, codes),
            hit("app serving", f"app.py --model=out/t --port={port}", number, said("http://"), 0.5, (0, *codes)),
        ]
        if number != signal.SIGINT:
            cases += [
                hit("train importing", train, number, at_once, 1.2, (0, *codes), leaves="out/n/*"),
                hit("prepare importing", prepare, number, at_once, 0.6, codes, setup=words),
                hit("export importing", EXPORT, number, at_once, 1.2, codes),
            ]
    return cases


def table() -> list[Case]:
    groups = (flag_cases, combination_cases, recipe_cases, text_cases, tokenizer_cases, config_cases, weight_cases,
              export_cases, state_cases, run_cases, data_cases, stdout_cases, signal_cases)
    cases = [case for group in groups for case in group()]
    twice = [name for name, n in Counter(map(str, cases)).items() if n > 1]
    assert not twice, f"two cases of one name: {twice}"
    return cases


# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# the command


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    chosen, cases = [word.strip() for word in s.only.split(",") if word.strip()], table()
    unknown = [word for word in chosen if word not in {c.group for c in cases} | set(map(str, cases))]
    if unknown:
        raise UserError(
            f"--only: no group or case {', '.join(unknown)}. Groups: {', '.join({c.group for c in cases})}."
        )
    cases = [case for case in cases if not chosen or case.group in chosen or str(case) in chosen]
    if s.list:
        print("\n".join(f"{case}   exit code {case.codes}" for case in cases) + f"\n{len(cases)} cases")
        return
    started, place = time.monotonic(), Path(tempfile.mkdtemp(prefix="attack"))
    try:
        make_folder(place / "folder")
        preload(cases)
        fallen = dict.fromkeys((case.group for case in cases), 0)
        fork, shared = multiprocessing.get_context("fork"), (cases, place / "folder", s.seconds)
        with ProcessPoolExecutor(s.jobs, fork, initializer=share, initargs=shared) as pool:
            for done in as_completed([pool.submit(one, i) for i in range(len(cases))]):
                i, wrong = done.result()
                if wrong:
                    fallen[cases[i].group] += 1
                    print(f"FELL {cases[i]}: {wrong}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for group, n in fallen.items():
        print(f"{group:<14} {sum(case.group == group for case in cases):>4} cases, {n} fell")
    total = sum(fallen.values())
    print(f"{len(cases)} cases, {total} fell, {time.monotonic() - started:.0f} s")
    raise SystemExit(1 if total else 0)


def preload(cases: list[Case]):
    """Import what the scripts import, once for all forks, and none of the scripts."""
    names = "torch numpy tqdm tiktoken tokenizers.decoders safetensors.torch huggingface_hub filelock gguf jinja2"
    names += " transformers.models.llama.modeling_llama" * any("verify_hf.py" in case.command for case in cases)
    names += " pandas gradio" * any(case.command.startswith("app.py") for case in cases)
    for name in names.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def share(*what):
    global SHARED
    SHARED = what
    random.seed(os.getpid())


def one(i: int) -> tuple[int, str]:
    cases, template, seconds = SHARED
    return i, judge(cases[i], template, seconds)


if __name__ == "__main__":
    run_main(main)
