"""
Run every script on what goes wrong in real use: mistyped flags, damaged files, stopped processes.

    python tests/tools/attack.py                      # all cases, about six minutes on two cores
    python tests/tools/attack.py --only=flags,runs    # these groups, or single cases as --list=true names them
    python tests/tools/attack.py --list=true          # print the cases and run nothing

Each case damages a copy of a folder that holds a text, its tokens, two tiny trained runs and a GGUF file, and runs one
command there. A case fails on a traceback, a hang, the wrong exit code, a long message or one that does not name what
is wrong, and on anything left behind: a temporary file, a process, a file that should not have changed. Linux only.
"""

import fnmatch
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from lib.settings import Count, UserError, override, run_main  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


@dataclass
class Settings:
    only: str = ""  # groups, or cases as GROUP/TITLE, comma-separated; empty: all
    list: bool = False  # print the cases instead of running them
    seconds: Count = 60  # a case that takes longer counts as hung
    jobs: Count = 2  # cases at a time


@dataclass
class Case:
    name: str  # GROUP/TITLE
    command: str  # SCRIPT --flag ..., as typed into a shell
    codes: int | tuple  # the allowed exit codes; minus the number of the signal that ended it
    says: str = ""  # comma-separated words that it must print, on stderr if it fails; a|b: a or b
    damage: Callable | tuple = ()  # called with the case's folder before the command runs
    leaves: str = ""  # globs of the files that may be new or changed
    env: dict | None = None
    kill: tuple = ()  # (signal, what is printed before it is sent, seconds to wait at most after that)
    check: Callable | None = None  # called with the folder afterwards; returns what is wrong there, or nothing


# ----------------------------------------------------------------------------------------------------------------------
# running and judging one case

CRASHES = r"Traceback \(most|panicked at|Fatal Python error|Segmentation fault|terminate called|Exception ignored"


def judge(case: Case, template: Path, seconds: float) -> str:
    """Run a case in a copy of the folder `template` and return what is wrong with how it ended, "" if nothing is."""
    place = Path(tempfile.mkdtemp(prefix="attack"))
    try:
        here = shutil.copytree(template, place / "here")
        (place / "tmp").mkdir()
        for damage in case.damage if isinstance(case.damage, tuple) else (case.damage,):
            damage(here)
        before = snapshot(here)
        code, wrong = run(case, place, seconds)
        if code is not None:
            wrong += problems(case, code, *((place / name).read_text(errors="replace") for name in ("out", "err")))
            after, allowed = snapshot(here), case.leaves.split()
            touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            touched = [n for n in touched if n.endswith(".tmp") or not any(fnmatch.fnmatch(n, g) for g in allowed)]
            wrong += [f"touched: {', '.join(touched[:4])}"] if touched else []
            left = [f.name for f in (place / "tmp").iterdir() if not f.name.startswith(("torchinductor_", "gradio"))]
            wrong += [f"left {left[0]} in TMPDIR"] if left else []
        if case.check and not wrong:
            wrong += filter(None, [case.check(here)])
        return "; ".join(wrong)
    except Exception as error:
        return f"the case itself is broken: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def snapshot(folder: Path) -> dict[str, str]:
    """Hash every file below a folder, except for lock files."""
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.endswith(".lock")]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def run(case: Case, place: Path, seconds: float) -> tuple[int | None, list[str]]:
    """Run a case's command in its own session, leave no process; return its exit code, None if it hung, and errors."""
    fixed = dict(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    environment = os.environ | fixed | dict(TMPDIR=str(place / "tmp")) | (case.env or {})
    with open(place / "out", "w") as out, open(place / "err", "w") as err:
        process = subprocess.Popen(
            f"exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}/{case.command}", shell=True,
            executable="/bin/bash", cwd=place / "here", env=environment, stdin=subprocess.DEVNULL, stdout=out,
            stderr=err, start_new_session=True,
        )  # fmt: skip
    signalled, code, wrong = not case.kill, None, []
    if case.kill:
        number, awaited, later = case.kill
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not signalled:
            time.sleep(0.005)
            if awaited in (place / "out").read_text(errors="replace"):
                time.sleep(later * random.random())
                process.send_signal(number)
                signalled = True
    try:
        code = process.wait(seconds)
        wrong += [] if signalled else [f"ended before its signal, exit code {code}"]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        wrong.append(f"hung: no end within {seconds} s")
    process.wait()
    end = time.monotonic() + 2  # a helper process may need a moment to notice that its parent is gone
    while (left := living(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return code, wrong + ([f"left {len(left)} processes running"] if left else [])


def living(session: int) -> list[int]:
    """List the living processes of a session."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, leader = file.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        found += [int(file.parent.name)] if int(leader) == session and state not in "ZX" else []
    return found


def problems(case: Case, code: int, out: str, err: str) -> list[str]:
    """List what is wrong with a case's exit code and with what it printed."""
    codes, says = case.codes if isinstance(case.codes, tuple) else (case.codes,), case.says.split(",")
    lines = err.strip().splitlines()
    last = lines[-1][:150] if lines else ""
    if re.search(CRASHES, err + out):
        return [f"traceback: {last}"]
    if code not in codes:
        return [f"exit code {code}, expected {' or '.join(map(str, codes))}: {last}"]
    failed = code != 0 and not case.kill
    if failed and (len(lines) > 6 + len(says) or len(err) > 3000):
        return [f"a message of {len(lines)} lines, {len(err):,} characters: {last}"]
    text = (err if failed else out + err).lower()
    missing = [word for word in says if not any(part.lower() in text for part in word.split("|"))]
    return [f"does not say {word!r}: {last}" for word in missing]


# ----------------------------------------------------------------------------------------------------------------------
# the folder that each case gets a copy of, and ways to damage it

TINY = (
    "train.py --input=t.txt --dataset=t --vocab_size=300 --hidden_size=32 --intermediate_size=64 --num_hidden_layers=2 "
    "--num_attention_heads=4 --num_key_value_heads=2 --block_size=32 --global_batch_size=4 --micro_batch_size=4 "
    "--max_iters=8 --eval_interval=4 --eval_rows=8 --log_interval=1 --warmup_iters=2 --learning_rate=1e-2 "
    "--dtype=float32 --compile=off --peak_tflops=1 --device=cpu"
)
NEW = TINY + " --out_dir=out/n"  # a run that does not exist yet
RESUME = TINY + " --out_dir=out/t --max_iters=10"  # two more steps of one that does
FINE = TINY + " --dataset=f --tokenizer=out/t --out_dir=out/f"  # with --init_from
SAMPLE = "sample.py --model=out/t --max_new_tokens=3 --prompt=aa --device=cpu"
PREPARE = "prepare.py --input=t.txt --dataset=x --vocab_size=300"
EXPORT = "export_gguf.py --model=out/t"
IMPORT = "import_gguf.py --gguf=t.gguf --out=out/g"
COMMANDS = dict(
    train=NEW, prepare=PREPARE, sample=SAMPLE, chat="chat.py --model=out/t", verify_hf="verify_hf.py --model=out/t",
    evaluate="evaluate.py --model=out/t --text=t.txt", bench="bench.py --model=out/t --only=decode --repeats=1",
    app="app.py --model=out/t", export_gguf=EXPORT, import_gguf=IMPORT,
)  # fmt: skip
CONFIG, WEIGHTS, STATE, META = "out/t/config.json", "out/t/model.safetensors", "out/t/state.pt", "data/t/meta.json"
PLAY = (ROOT / "data/shakespeare/play.txt").read_text(encoding="utf-8")
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def make_folder(folder: Path):
    """Make t.txt, data/t; out/t, a run of 8 steps; out/f, fine-tuned from it; t.gguf, exported from it."""
    folder.mkdir()
    (folder / "t.txt").write_text(PLAY[:8000], encoding="utf-8")
    for command in (f"{TINY} --out_dir=out/t", f"{FINE} --init_from=out/t", f"{EXPORT} --out_dir=gguf"):
        argv = [sys.executable, *f"{ROOT}/{command}".split()]
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise UserError(f"{command}: the folder for the cases could not be made: {done.stderr[-1000:]}")
    os.rename(next(folder.glob("gguf/*.gguf")), folder / "t.gguf")
    shutil.rmtree(folder / "gguf")


def put(path, data):
    """Write a file, text or bytes."""

    def damage(here):
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(data if isinstance(data, bytes) else data.encode())

    return damage


def weight(name, what: Callable):
    """Change a tensor."""

    def damage(here):
        found = load_file(here / WEIGHTS)
        save_file(found | {name: what(found[name])}, here / WEIGHTS)

    return damage


change = lambda path, what: lambda here: (here / path).write_bytes(what((here / path).read_bytes()))
cut = lambda path: change(path, lambda data: data[: len(data) // 2])
move = lambda old, new: lambda here: shutil.move(here / old, here / new)
remove = lambda *paths: tuple(move(path, "../removed" + path.replace("/", "_")) for path in paths)
config = lambda **values: change(CONFIG, lambda data: json.dumps(json.loads(data) | values).encode())


def reached(step):
    """Return a check that the run's state is at this step."""

    def wrong(here):
        at = torch.load(here / STATE, weights_only=True)["progress"]["step"]
        return "" if at == step else f"state.pt is at step {at}, expected {step}"

    return wrong


# ----------------------------------------------------------------------------------------------------------------------
# the table

FLAGS = """
train 2 --n_layer=2 --n_head=2 --n_embd=2 --learning_rat=1 --decay_lr=true --gradient_accumulation_steps=2
train 2 --learning_rate=nan --min_lr=-1 --weight_decay=inf --grad_clip=-1 --beta1=1 --beta2=2 --dropout=1 --rope_theta=0
train 2 --seed=-1 --max_iters= --patience=nan --sample_interval=true --tie_word_embeddings=maybe --warmup_iters=-5
train 2 --dtype=float8 --compile=maybe --lr_schedule=linear --optimizer=sgd --decay_fraction=0 --token_noise=2
train 1,2 --out_dir=t.txt --out_dir=t.txt/x --out_dir=/proc/x --dataset=../t --tokenizer=gpt2 --vocab_size=400
train 1,2 --block_size=1000000 --max_position_embeddings=16 --num_attention_heads=3 --num_key_value_heads=3 --head_dim=7
train 1,2 --init_from=resume --init_from=missing --init_from=t.txt --init_from=a/b
prepare 2 --val_fraction=1 --vocab_size=1e5 --show=-1
prepare 1,2 --vocab_size=10 --vocab_size=65537 --dataset= --dataset=../x --dataset=a/b
prepare 1 --tokenizer=missing --tokenizer=missing.json --tokenizer=t.txt --tokenizer=a/b/c --input=no.txt --input=*.md
sample 2 --temperature=nan --repetition_penalty=0 --top_p=2 --min_p=-1 --top_k=1.5 --num_samples=0 --seed=-1
sample 1 --prompt=FILE:missing --prompt=FILE:out --model=missing --model=t.txt --model=a--b/c --model=a/b --model=data/t
evaluate 1 --text=missing --text=out --dataset=missing --model=missing --model=out/t,missing
export_gguf 1 --model=missing --model=t.txt --out_dir=t.txt --out_dir=/proc/x
import_gguf 1 --gguf=missing --gguf=out --gguf=t.txt --gguf=out/t/model.safetensors
verify_hf 1,2 --shape=9B --context=0 --model=missing
bench 1,2 --only=nonsense --repeats=0 --model=missing --llama_bench=missing
app 1,2 --port=70000 --auth=nocolon --model=missing
"""  # exit code 2: one case with all flags of a line, which must all be named; else a case for each flag


def rows(group: str, command: str, codes, says: str, damages: dict, **rest) -> list[Case]:
    """Make a case for each of these damages; all of them must end the same way."""
    return [Case(f"{group}/{title}", command, codes, says, damage, **rest) for title, damage in damages.items()]


def flag_cases() -> list[Case]:
    cases = []
    for line in FLAGS.strip().splitlines():
        script, codes, *flags = line.split()
        for together in [flags] if codes == "2" else [[flag] for flag in flags]:
            says = [flag.strip("-").split("=")[0] for flag in together]
            says = says if codes == "2" else [f"{says[0]}|{re.split('[=,:]', together[0])[-1] or says[0]}"]
            name, command = f"flags/{script} {together[0]}", f"{COMMANDS[script]} {' '.join(together)}"
            cases.append(Case(name, command, tuple(map(int, codes.split(","))), ",".join(says)))
    for script, command in COMMANDS.items():
        nonsense = f"{command} --nonsense=1 -x --modell config/missing.py"
        cases.append(Case(f"flags/{script} nonsense", nonsense, 2, "nonsense,-x,modell,missing.py"))
        cases.append(Case(f"flags/{script} --help", f"{command} --help", 0, "settings,defaults"))
    recipes = {"syntax error": "seed = = 1", "mistyped": "sead = 1", "nanoGPT": "n_layer = 2", "a flag": "seed = True"}
    return [
        *cases,
        *rows("recipes", f"{NEW} r.py", 2, "r.py", {k: put("r.py", v) for k, v in recipes.items()}),
        Case("flags/no run", "sample.py", 1, "out", remove("out")),
    ]


def text_cases() -> list[Case]:
    """Make the cases for the files that prepare.py reads."""
    line, ask = json.dumps({"text": PLAY[:500]}), '{"messages": [{"role": "user", "content": "Hi"}, %s]}'
    answer = '{"role": "assistant", "content": "Ho"}'
    wrong = {
        "empty": "", "one byte": "a", "cut character": PLAY.encode() + b"\xe2\x82", "binary": bytes(range(256)),
        "latin1": b"\xe9" * 999, "PDF": b"%PDF-1.7\n%" + bytes(range(128, 256)),
    }  # fmt: skip
    fine = {"CRLF": PLAY.replace("\n", "\r\n"), "one line": "word " * 100_000, "UTF-16": PLAY.encode("utf-16")}
    talks = [ask % answer, '{"prompt": "Hi", "completion": "Ho"}', '{"instruction": "Hi", "output": "Ho"}']
    bad_lines = ["{}", '{"text": 5}', '{"text": null}', "hello", line[:-9]]
    bad_talks = ["null", '{"role": "bot", "content": "Ho"}', answer.replace('"Ho"', "null"), answer.replace("Ho", "")]
    text, lines = (f"{PREPARE} --input={name}" for name in ("x.txt", "x.jsonl --tokenizer=out/t"))
    jsonl = lambda first, others: {f"jsonl {o[-40:]}": put("x.jsonl", f"{first or o}\n{o}\n") for o in others}
    return [
        *rows("texts", text, 1, "x.txt", {k: put("x.txt", v) for k, v in wrong.items()}),
        *rows("texts", text, 0, "train", {k: put("x.txt", v) for k, v in fine.items()}, leaves="data/x/*"),
        *rows("texts", lines, 1, "x.jsonl,line 2", jsonl(line, bad_lines)),
        *rows("texts", lines, 1, "x.jsonl,line 2", jsonl(talks[0], [ask % message for message in bad_talks])),
        *rows("texts", lines, 0, "2 conversations", jsonl("", talks), leaves="data/x/*"),
    ]


def model_cases() -> list[Case]:
    """Make the cases for model directories and GGUF files."""
    norm, tokenizer = "model.norm.weight", "out/t/tokenizer.json"
    index = put(f"{WEIGHTS}.index.json", json.dumps({"weight_map": {norm: "model-1.safetensors"}}))
    configs = [
        dict(hidden_size="text"), dict(num_key_value_heads=3), dict(head_dim=7), dict(vocab_size=None),
        dict(model_type="gpt2"), dict(rope_parameters={"rope_type": "yarn"}),
    ]  # fmt: skip
    weights = {
        "missing": remove(WEIGHTS), "empty": put(WEIGHTS, ""), "cut": cut(WEIGHTS), "git-lfs": put(WEIGHTS, LFS),
        "web page": put(WEIGHTS, "<!doctype html>" * 99), "pickle": move(WEIGHTS, "out/t/pytorch_model.bin"),
        "a shard missing": (*remove(WEIGHTS), index), "wrong shape": weight(norm, lambda t: t[1:].clone()),
        "NaN": weight(norm, lambda t: t * math.nan),
    }  # fmt: skip
    tokenizers = {"tokenizer cut": cut(tokenizer), "no tokenizer": remove(tokenizer)}
    users = [command for command in COMMANDS.values() if "--model=out/t" in command and command != SAMPLE]
    return [
        *rows("models", SAMPLE, 1, "config.json", {str(values)[1:-1]: config(**values) for values in configs}),
        *rows("models", SAMPLE, 1, "config.json", {"config cut": cut(CONFIG), "no config": remove(CONFIG)}),
        *rows("models", SAMPLE, 1, "safetensors|out/t|finite", weights),
        *rows("models", SAMPLE, 1, "tokenizer.json", tokenizers),
        *[Case(f"models/{c.split('.')[0]}: cut", c, 1, "safetensors", cut(WEIGHTS)) for c in users],
        *rows("models", f"{FINE} --init_from=out/t --out_dir=out/n", 1, "safetensors", {"train: cut": cut(WEIGHTS)}),
        *rows("models", EXPORT, 0, "", {"export": ()}, leaves="out/t/*.gguf out/t/Modelfile"),
        *rows("models", IMPORT, 0, "", {"import": ()}, leaves="out/g/*"),
        *rows("models", IMPORT, 1, "t.gguf", {"import cut": cut("t.gguf")}),
    ]


def run_cases() -> list[Case]:
    """Make the cases for resumed runs and their data."""
    log, train, alone = "out/t/log.jsonl", "data/t/train.bin", "train.py --out_dir=out/t"
    states = {
        "cut": cut(STATE), "empty": put(STATE, ""), "weights": move(WEIGHTS, STATE),
        "pickle": put(STATE, b"cos\nsystem\n(S'touch pwned'\ntR."),
    }  # fmt: skip
    logs = {"log garbage": change(log, lambda d: b"{\n\xff\xfe\n" + d), "log cut": cut(log), "log missing": remove(log)}
    bins = {"train.bin cut": cut(train), "train.bin missing": remove(train), "meta.json cut": cut(META)}
    fixed, free = "hidden_size=64 optimizer=muon".split(), "learning_rate=0.001 eval_interval=5 patience=9".split()
    grown = dict(codes=0, says="done", leaves="out/t/*", check=reached(10))
    return [
        *rows("runs", RESUME, 1, "state.pt|finite", {f"state.pt: {k}": v for k, v in states.items()}, leaves=log),
        *[Case(f"runs/fixed {flag}", f"{RESUME} --{flag}", (1, 2), flag.split("=")[0]) for flag in fixed],
        *[Case(f"runs/changed {flag}", f"{RESUME} --{flag}", **grown) for flag in free],
        *rows("runs", f"{alone} --max_iters=10", damages={"as it was": ()}, **grown),
        *rows("runs", RESUME, damages=logs, **grown),
        *rows("runs", alone, 1, "out/t,init_from", {"a downloaded model": remove(STATE, log)}),
        *rows("runs", NEW, 1, "data/t", bins),
    ]


def ending_cases() -> list[Case]:
    """Make the cases for output streams and signals."""
    owl, made = f"{SAMPLE} --prompt='🦉 naïve 漢字'", dict(leaves="out/n/*")
    plain = {"C": dict(LC_ALL="C"), "latin1": dict(PYTHONIOENCODING="latin1"), "ascii": dict(PYTHONIOENCODING="ascii")}
    cases = [Case(f"output/sample {k}", owl, 0, "tokens", env=v) for k, v in plain.items()]
    cases += [Case(f"output/sample {out}", f"{SAMPLE} {out}", (0, 1, 74, 120)) for out in ("> /dev/full", "> >(:)")]
    long, big = f"{NEW} --max_iters=1000000", "prepare.py --input=x.txt --dataset=x --vocab_size=3000"
    words = put("x.txt", "".join(f"{i:x} {i * i:x}\n" for i in range(200_000)))
    for port, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), 7981):
        by, ends = signal.Signals(number).name, (0, 128 + number, -number)
        say, app = f"{SAMPLE} --num_samples=999999", f"{COMMANDS['app']} --port={port}"
        cases += [
            Case(f"signals/starting {by}", long, ends, kill=(number, "data  ", 0.1), **made),
            Case(f"signals/stepping {by}", long, 128 + number, "Resume with", kill=(number, "| loss", 0.5), **made),
            Case(f"signals/prepare {by}", big, ends[1:], damage=words, kill=(number, "training a", 1.0)),
            Case(f"signals/sample {by}", say, ends, kill=(number, "aa", 1.0)),
            Case(f"signals/app {by}", app, ends, kill=(number, "http://", 0.5)),
        ]
    return cases


# ----------------------------------------------------------------------------------------------------------------------
# the command


def table() -> list[Case]:
    cases = [*flag_cases(), *text_cases(), *model_cases(), *run_cases(), *ending_cases()]
    assert len({case.name for case in cases}) == len(cases), "two cases have the same name"
    return cases


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    chosen = [word.strip() for word in s.only.split(",") if word.strip()]
    cases = [c for c in table() if not chosen or c.name in chosen or c.name.split("/")[0] in chosen]
    unknown = [word for word in chosen if not any(c.name == word or c.name.startswith(f"{word}/") for c in cases)]
    if unknown:
        raise UserError(f"--only: no group or case {', '.join(unknown)}. The cases: python {__file__} --list=true")
    if s.list:
        print("\n".join(f"{case.name}   exit code {case.codes}" for case in cases) + f"\n{len(cases)} cases")
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else child processes of a background job would ignore it
    started, failed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="attack") as place, ThreadPool(s.jobs) as pool:
        make_folder(template := Path(place, "folder"))
        for case, wrong in pool.imap_unordered(lambda case: (case, judge(case, template, s.seconds)), cases):
            failed += bool(wrong)
            if wrong:
                print(f"FAILED {case.name}: {wrong}", flush=True)
    print(f"{len(cases)} cases, {failed} failed, {time.monotonic() - started:.0f} s")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    run_main(main)
