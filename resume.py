"""
What a run may go on from: its numbers, which settings may have changed, and what stands in the way.

    from resume import Progress, check_settings, goes_on, resume

`s` is always train.py's Settings. The states themselves are read and written by checkpoint.py.
"""

import math
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from lib.files import read_errors_as_user_error
from lib.settings import UserError

import checkpoint
from optimizer import decay_begins, learning_rate_at

# Settings that may differ between a stop and a resume: none of them changes what a step does, but for rounding (another
# device or micro-batch) and for what dropout drops there. max_iters and max_epochs say where the run ends. Every other
# change must be named in accept_changes. What FIXED names cannot change: another shape is another model, and another
# optimizer has another state.
MAY_CHANGE = (
    "out_dir init_from accept_changes also_eval eval_interval log_interval sample_interval patience micro_batch_size "
    "max_iters max_epochs device compile peak_tflops"
).split()
FIXED = (
    "optimizer hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings initializer_range"
).split()


@dataclass
class Progress:
    """The numbers of a run that change as it goes on; state.pt keeps them."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # the step of the last evaluation
    sampled: int = -1  # the step of the last printed sample
    best_val_loss: float = math.inf  # nats per token
    best_step: int = -1
    since_best: int = 0  # evaluations since then
    skipped: int = 0  # steps without a finite loss and gradient
    seconds: float = 0.0  # spent in steps, and in compiling
    recent_loss: float | None = None  # moving average of the training loss
    lr_decay_iters: int = 0  # the step at which the schedule ends
    warmup_iters: int | None = None  # the step at which it reaches its peak; None in states of before 26 November 2026
    compile: bool | None = None  # whether the run began with compiled blocks
    other_texts: dict = field(default_factory=dict)  # bits per byte of the texts of also_eval before fine-tuning
    cpu_dtype: str | None = None  # what its products were in on a CPU, where "auto" goes by measured speed


def check_settings(s):
    """UserError where settings do not fit each other, or the folder: before anything is prepared or written."""
    named = changes_accepted(s)
    unknown = [key for key in named if key not in {f.name for f in fields(s)}]
    if unknown:
        raise UserError(f"--accept_changes: {', '.join(unknown)}: no such setting.")
    if shape := [key for key in named if key in FIXED]:
        raise UserError(
            f"--accept_changes: {', '.join(shape)}: a run cannot change its model's shape, nor its optimizer. Use "
            "another --out_dir."
        )
    out_dir = Path(s.out_dir)
    if not s.out_dir.strip():
        raise UserError("--out_dir is empty: expected a folder for the run, such as out/run.")
    if s.init_from == "scratch" or goes_on(s):
        return
    if s.init_from == "resume":
        raise UserError(f"{out_dir}/state.pt not found: nothing to resume. Without --init_from=resume the run begins.")
    # weights of step 0 are those that a run began with; all others are somebody's work
    weights = [f.name for pattern in ("*.safetensors", "pytorch_model*.bin") for f in out_dir.glob(pattern)]
    if weights and (weights != [checkpoint.WEIGHTS] or checkpoint.metadata(out_dir).get("step") != "0"):
        raise UserError(
            f"{out_dir} holds a model and no state.pt to go on from: a run there would overwrite it. Use another "
            f"--out_dir (with --init_from={out_dir} to fine-tune that model), or --init_from=scratch to start over "
            "from random weights."
        )


def goes_on(s) -> bool:
    """Whether there is a run to go on with, and nothing else was asked for."""
    return s.init_from != "scratch" and Path(s.out_dir, "state.pt").is_file()


def changes_accepted(s) -> list[str]:
    return [key.strip() for key in s.accept_changes.split(",") if key.strip()]


def resume(run) -> dict:
    """Read the state that train.py's Run goes on from, and take its numbers. UserError where it is damaged, or of a
    run with other settings or data."""
    s, accepted = run.s, changes_accepted(run.s)
    state = checkpoint.load_state(run.state_file)
    # a setting that an earlier version of train.py did not have was what its default is
    state["settings"] = asdict(type(s)()) | state["settings"]
    run.p, then = read_progress(state, run.state_file), state["settings"]
    # a limit in epochs may change, and with it what it shortens: the warmup that was begun stays
    asked, warmup = run.asked, run.p.warmup_iters
    if warmup is None:  # of an earlier version, which kept what a limit in epochs had shortened it to
        warmup = then["warmup_iters"]
        asked = replace(s, warmup_iters=warmup) if s.max_epochs or then["max_epochs"] else s
    check_resume(state, asked, run.facts, run.state_file)
    if "warmup_iters" not in accepted and run.p.step:
        s.warmup_iters = warmup
    run.saved, run.origin = run.p.step, then["init_from"]
    if s.max_iters < run.p.step:
        limit = f"max_epochs={s.max_epochs:g} (--max_epochs=0 lifts it)" if run.shortened else "--max_iters"
        raise UserError(f"{run.out_dir} is at step {run.p.step:,} already; {limit} ends it at {s.max_iters:,}.")
    same = ("lr_schedule", "decay_fraction", "learning_rate", "min_lr")
    state = resume_schedule(run, state, replace(s, **{key: then[key] for key in same}, warmup_iters=warmup))
    begun = state["settings"]  # stable.pt's may be others than state.pt's
    before, now = (run.p.step * batch for batch in (begun["global_batch_size"], s.global_batch_size))
    if begun["block_size"] != s.block_size:
        run.say("!! another block_size: the text is cut into other rows, in another order, some of it read already")
    elif before != now:
        between = "left out" if now > before else "read again"
        run.say(
            f"!! another global_batch_size: the next row is number {now:,} instead of {before:,}; between: {between}"
        )
    if any(of.get(key) != getattr(s, key) for key in ("eval_rows", "block_size") for of in (then, begun)):
        run.say("!! other validation rows: losses cannot be compared with those before, and the best is sought anew")
        run.p.best_val_loss, run.p.best_step, run.p.since_best = math.inf, -1, 0
        run.p.other_texts = {}
    else:
        kept = checkpoint.metadata(run.out_dir)
        run.kept_loss, run.kept_step = float(kept.get("val_loss", "inf")), int(kept.get("step", -1))
    return state


def resume_schedule(run, state: dict, before) -> dict:
    """The schedule ends where it ended, unless lr_decay_iters may change. before: the settings it has had until now.

    A wsd schedule that is stretched after its decay has begun is stretched from stable.pt, the state at the beginning
    of the decay, whose contents are returned then. The folder keeps the better model of the two ends.
    """
    s, stable = run.s, run.out_dir / "stable.pt"
    asked = s.lr_decay_iters or s.max_iters
    ended = run.p.lr_decay_iters if run.p.step else asked  # before its first step a run has no schedule yet
    end = asked if "lr_decay_iters" in changes_accepted(s) else ended
    begun = before.lr_schedule == "wsd" and run.p.step > decay_begins(before, ended)
    if s.lr_schedule == "wsd" and begun and end > ended:
        if stable.is_file():
            run.say(f"         the schedule is stretched: back from step {run.p.step:,} to where its decay began")
            state.clear()  # its memory, before the other is read
            run.state_file, state, begun = stable, checkpoint.load_state(stable), False
            run.p = read_progress(state, stable)
        else:
            run.say(f"!! {stable} is missing: the rate rises again from a state that has decayed")
    run.steady = not begun or run.p.step <= decay_begins(s, end)
    rates = [f"{learning_rate_at(run.p.step, *of):.3g}" for of in ((before, ended), (s, end))]
    if rates[0] != rates[1] and run.p.step < s.max_iters:
        run.say(f"         the learning rate goes from {rates[0]} to {rates[1]}")
    run.p.lr_decay_iters, run.p.warmup_iters = end, s.warmup_iters
    return state


def read_progress(state: dict, file: Path) -> Progress:
    with read_errors_as_user_error(file, checkpoint.way_out_of(file)):
        # earlier versions of train.py did not keep these
        added = {"sampled": -1, "other_texts": {}, "cpu_dtype": None, "warmup_iters": None}
        p = Progress(**added | state["progress"])
        if p.cpu_dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(f"cpu_dtype {p.cpu_dtype}")
        if not all(isinstance(bits, float) for bits in p.other_texts.values()):
            raise ValueError("other_texts holds what is no number")
        for f in fields(Progress):
            kinds = set(typing.get_args(f.type) or (f.type,))
            if f.name not in state["progress"].keys() | added.keys() or type(getattr(p, f.name)) not in kinds:
                raise ValueError(f"{f.name} is missing, or no number of its kind")
        if not 0 <= p.step < 2**40:
            raise ValueError(f"step {p.step}")
    return p


def check_resume(state: dict, s, facts: dict, path: Path):
    """UserError naming every setting and every fact about the data that differs from the run in `state`."""
    accepted = changes_accepted(s)
    then, now = state["settings"], asdict(s)
    changed = [k for k in now if k not in MAY_CHANGE and k not in accepted and now[k] != then.get(k)]
    problems = [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in changed]
    if s.init_from not in ("auto", "resume") and Path(s.init_from) != Path(str(then.get("init_from"))):
        problems.append(f"it began with init_from={then.get('init_from')}, not {s.init_from}")
    for key, value in facts.items():
        before = state["facts"].get(key)
        if before != value:
            problems.append(f"the {key.replace('_', ' ')} was {str(before)[:12]}, is {str(value)[:12]}")
    if problems:
        remedy = f"Use the old values, another --out_dir, or delete {path.parent} to start it over."
        if changed and not set(changed) & set(FIXED):
            remedy += f" To go on all the same: --accept_changes={','.join([*accepted, *changed])}"
        raise UserError(f"{path} is of a run with other settings: {'; '.join(problems)}.\n{remedy}")
