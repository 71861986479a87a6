"""
Train SmolLM2 from scratch, or fine-tune a model, on the tokens that prepare.py made.

    python train.py config/tiny_shakespeare.py              # a small model, two minutes on two CPU cores
    python train.py --out_dir=out/tiny_shakespeare          # resume; the original command does so, too
    python train.py config/finetune_smollm2.py              # start from released weights
    torchrun --standalone --nproc_per_node=8 train.py config/smol_135m.py

You can stop it at any time: Ctrl-C saves and ends, a second one quits at once; the same command resumes. out/RUN is at
every moment a Hugging Face model directory with the best model so far (the lowest validation loss). Next to it are
log.jsonl; state.pt, from which a resume continues; with a wsd schedule stable.pt, the state at the start of the decay.

A step is `global_batch_size` rows of `block_size` tokens, and row i is a function of the seed and i alone. Sharing the
rows among processes and micro-batches affects only rounding (and dropout masks); stopping and resuming affects nothing.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from lib import device as machine
from lib.files import exclusive, file_sha256, first_line
from lib.parallel import StopSignal, broadcast_from_rank0, join_processes, save_on_rank0
from lib.settings import Count, Fraction, Natural, NonNegative, Positive, UserError, Within, parse, print_safe, run_main
from lib.track import Log, report_evaluation, report_step

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import prepare
from dataloader import open_data
from evaluate import evaluate
from model import SmolLM2, SmolLM2Config
from optimizer import check_schedule, decay_begins, learning_rate_at, make_optimizers, noise_ends
from sample import generate


@dataclass
class Settings:
    # the run
    out_dir: str = "out/run"  # the run's folder
    init_from: str = "auto"  # auto: resume if out_dir has a state.pt, otherwise scratch; resume; scratch: replace the
    #                          run in out_dir; or a model directory or hub id to fine-tune
    eval_interval: Count = 100  # steps between evaluations; each saves state.pt, and the model if it is the best so far
    eval_rows: Count = 2000  # evaluate at most this many validation rows, evenly spread
    patience: Natural = 0  # stop after this many evaluations without improvement; 0 never
    log_interval: Count = 10  # steps between log lines
    sample_interval: Natural = 0  # steps between printed samples of text; 0 none
    # a step
    global_batch_size: Count = 16  # rows per optimizer step, over all processes: this determines the result
    micro_batch_size: Count = 16  # rows per forward pass: whatever fits into memory and is fast
    block_size: Count = 256  # tokens per row
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    max_iters: Natural = 1000  # steps
    max_epochs: NonNegative = 0.0  # stop after this many epochs, with warmup and intervals scaled down; 0 no limit
    learning_rate: Positive = 1e-3  # the peak, after warmup
    min_lr: NonNegative = 1e-4  # the learning rate at the end of the schedule
    warmup_iters: Natural = 50  # steps from 0 to the peak
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warmup, stable, linear decay, as SmolLM2's
    lr_decay_iters: Natural = 0  # the step at which the schedule reaches min_lr; 0 is max_iters
    decay_fraction: Annotated[float, Within(above=0, most=1)] = 0.2  # wsd: the fraction of the schedule that decays
    token_noise: Fraction = 0.0  # fraction of input tokens replaced by random ones, against overfitting
    noise_until: Annotated[float, Within(above=0, most=1)] = 1.0  # the fraction of the schedule that has it
    dropout: Fraction = 0.0  # on the outputs of attention and MLP, against overfitting
    weight_decay: NonNegative = 0.1  # on matrices only, not on norm weights
    beta1: Fraction = 0.9  # AdamW: decay of the average gradient
    beta2: Fraction = 0.95  # AdamW: decay of the average squared gradient; 0.999 is usual, less is steadier here
    grad_clip: NonNegative = 1.0  # largest gradient norm; 0 does not clip
    seed: Natural = 1337  # of the initial weights, the order of the rows, noise and dropout
    # the machine
    device: str = "auto"  # cuda, mps, cpu; auto takes the first that is available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights are always float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the blocks; auto in long runs; off: no CUDA graph
    peak_tflops: NonNegative = 0.0  # of one device in this dtype, for MFU; 0: known (some GPUs) or measured (CPU)
    # the architecture of a new model: SmolLM2-135M; the vocabulary comes from the data set
    hidden_size: Count = 576
    intermediate_size: Count = 1536
    num_hidden_layers: Count = 30
    num_attention_heads: Count = 9
    num_key_value_heads: Count = 3
    head_dim: Natural = 0  # 0 is hidden_size / num_attention_heads
    max_position_embeddings: Natural = 0  # the model's context; 0 is block_size, which it is trained on
    rope_theta: Positive = 100000.0
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: NonNegative = 0.0  # 0 is 1 / sqrt(hidden_size), which for 576 is the released 0.0417


# On a resume these settings cannot change: another shape is another model, another optimizer has another state.
SHAPE = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_theta rms_norm_eps tie_word_embeddings initializer_range"
).split()
FIXED = ["optimizer", "init_from", *SHAPE]
# These do not affect what a step computes, so they follow the command and its recipe; only flags change the others. The
# data set may have another name, since its contents are compared.
FOLLOW = (
    "eval_interval log_interval sample_interval patience micro_batch_size max_iters device compile peak_tflops dataset"
).split()


@dataclass
class Progress:
    """The mutable state of a run, stored in state.pt."""

    step: int = 0  # optimizer steps done
    rows: int = 0  # training rows read so far, which is the number of the next one
    evaluated: int = -1  # the step of the last evaluation
    sampled: int = -1  # the step of the last printed sample
    best_val_loss: float = math.inf  # nats per token
    best_step: int = -1
    since_best: int = 0  # evaluations since then
    skipped: int = 0  # steps whose loss or gradient was not finite
    seconds: float = 0.0  # spent in steps, and in compiling
    recent_loss: float | None = None  # moving average of the training loss
    # chosen when the run began and kept on every resume
    compile: bool | None = None  # whether the blocks are compiled
    cpu_dtype: str | None = None  # the dtype of matrix products on a CPU
    warmup_iters: int = 0
    lr_decay_iters: int = 0


def main():
    (s, data), given = parse(sys.argv[1:], Settings, prepare.Settings, doc=__doc__)
    state_file, notes, changes = Path(s.out_dir, "state.pt"), [], {}
    found = state_file.is_file()
    resumed = found and s.init_from != "scratch"
    if resumed:
        s, data, notes, changes = resumed_settings(s, data, given, checkpoint.load_state(state_file)["settings"])
    else:
        check_folder(s, given)
        was = "auto"
        with suppress(UserError):  # a run without a state, or with a damaged one
            was = checkpoint.load_state(state_file)["settings"]["init_from"]
        if was != "auto":
            remedy = "--init_from=scratch would train random weights. Use another --out_dir."
            raise UserError(f"{s.out_dir} was fine-tuned from {was}: {remedy}")
        notes += [f"the run in {s.out_dir} is replaced"] if found else []
        s.init_from = "auto" if s.init_from == "scratch" else s.init_from
        if s.init_from != "auto":
            checkpoint.find(s.init_from)  # downloads a hub id
            data.tokenizer = data.tokenizer if "tokenizer" in given else s.init_from  # no other fits the weights
    meta = prepare.resolve(data, given)  # prepares the data set if it does not exist
    machine.prepare_process()
    rank, world, device = join_processes(machine.pick_device(s.device))
    try:
        if s.global_batch_size % world:
            raise UserError(f"--global_batch_size={s.global_batch_size} cannot be divided by {world} processes.")
        with exclusive(Path(s.out_dir), "being trained in") if rank == 0 else nullcontext():
            if rank == 0 and state_file.is_file() != found:
                raise UserError(f"{state_file} was written by another process just now. Run the command again.")
            signalled = train(s, data, meta, given, resumed, notes, changes, rank, world, device)
    except UserError as error:  # its traceback keeps the DDP wrapper alive after the group is destroyed, which can hang
        raise error.with_traceback(None) from None
    finally:
        if world > 1:
            dist.destroy_process_group()
    if signalled:  # exit as if the signal had ended the process, so that `train.py && ...` does not continue
        raise SystemExit(128 + signalled)


def train(s: Settings, data, meta, given, resumed, notes, changes, rank: int, world: int, device: str) -> int:
    """Train to the end, or until a signal; return its number or 0. This is separate from main() so that the DDP wrapper
    is freed before the process group is destroyed. given: see parse(); notes, changes: see resumed_settings()."""
    say = print_safe if rank == 0 else lambda _: None
    out_dir, folder, chat = Path(s.out_dir), prepare.DATA / data.dataset, "train_loss_tokens" in meta
    state_file = out_dir / "state.pt"
    state = checkpoint.load_state(state_file) if resumed else None
    p = Progress(**state["progress"]) if resumed else Progress()

    # data: row i is a function of (seed, i), so the order needs no saved state
    rows, val_rows = open_data(folder, meta, s.block_size, s.seed, s.token_noise, s.eval_rows)
    facts = {key: meta[key] for key in "tokenizer_sha256 source_sha256 train_tokens val_tokens vocab_size".split()}
    if resumed and facts != state["facts"]:
        remedy = "Name that one, or make it again, with --dataset; or use another --out_dir."
        raise UserError(f"{folder} is not the data set that {out_dir} was trained on. {remedy}")
    say(f"data     {folder}: {meta['source']}, {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens")
    settings = asdict(s) | asdict(data)  # as asked for, before max_epochs
    steps_per_epoch = rows.per_epoch / s.global_batch_size
    limit_epochs(s, steps_per_epoch, p, changes)
    for note in [*notes, *prepare.warnings(data.dataset, meta), *check_schedule(s)]:
        say(f"!! {note}")

    # model: new, fine-tuned, or resumed; weights are always float32
    model, source = make_model(s, given, meta, folder, state)
    checkpoint.speed_up(model.to(device).train())
    say("model    {total:,} parameters, {embeddings:,} of them embeddings".format(**model.num_parameters()))

    # optimizer, and the dtype of matrix products; rank 0 chooses for all
    optimizers = make_optimizers(model, s.optimizer, s.learning_rate, s.weight_decay, (s.beta1, s.beta2))
    kind = torch.device(device).type
    measured = kind == "cpu" and s.dtype == "auto"
    choice = machine.pick_autocast(s.dtype, device, p.cpu_dtype if measured else None)
    dtype, dtype_reason = broadcast_from_rank0(choice, world)
    p.cpu_dtype = machine.dtype_name(dtype) if measured else p.cpu_dtype
    autocast = partial(torch.autocast, kind, dtype) if dtype != torch.float32 else nullcontext
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    torch.set_float32_matmul_precision("high" if kind == "cuda" else "highest")  # TF32 for what stays in float32

    # resume: weights, optimizer state, and the best model so far
    saved_step, kept_loss, kept_step = None, math.inf, -1  # kept: the model that is in out_dir
    if resumed:
        say(f"resume   {state_file} at step {p.step:,}, best validation loss {p.best_val_loss:.4f}")
        checkpoint.restore(state, state_file, model, optimizers, scaler)
        header, saved_step = checkpoint.metadata(out_dir), None if changes else p.step
        if changes.keys() & {"eval_rows", "block_size"}:  # losses of other validation rows cannot be compared
            p.best_val_loss, p.best_step, p.since_best = math.inf, -1, 0
        if p.best_step >= 0:
            kept_loss, kept_step = float(header.get("val_loss", "inf")), int(header.get("step", -1))
    del state
    if broadcast_from_rank0((p, facts, kept_loss), world) != (p, facts, kept_loss):
        raise UserError(f"the processes see different files in {out_dir}: all of them need the same disk.")

    # compile the blocks in place, so that no weight's name changes
    peak, peak_source = machine.peak_flops(device, dtype, s.peak_tflops)
    rows_here = s.global_batch_size // world
    flops = model.flops_per_token(s.block_size)
    choice = machine.pick_compile(s.compile, device, s.max_iters * rows_here * s.block_size * flops, peak)
    if s.compile == "auto" and p.compile is not None:
        choice = p.compile, "as when this run began"
    compiled, compile_reason = broadcast_from_rank0(choice, world)
    say(f"device   {device}, {torch.get_num_threads()} threads; {machine.dtype_name(dtype)}: {dtype_reason}")
    say(f"compile  {'on' if compiled else 'off'}: {compile_reason}")
    say(f"peak     {peak / 1e9:,.0f} GFLOP/s, {peak_source}" if peak else "peak     unknown: --peak_tflops gives MFU")
    if compiled:
        machine.compile_for_training(model)
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    # a micro-batch's forward and backward pass
    micro, replay = min(s.micro_batch_size, rows_here), None  # replay: the same, recorded as a CUDA graph

    def gradients(batch: range, last: bool = True) -> torch.Tensor:
        """Add a micro-batch's gradients to .grad; return its part of the step's loss, a mean over the step's tokens."""
        inputs = rows.batch(batch, device)
        if s.dropout:
            torch.manual_seed(s.seed + batch.start)  # dropout masks depend on the row, so a resume repeats them
        if replay and len(batch) == micro:
            return replay(*inputs)
        share = rows.weight(batch) / rows.weight(range(p.rows, p.rows + s.global_batch_size))
        with nullcontext() if world == 1 or last else trained.no_sync():
            return forward_backward(trained, inputs, world * share, autocast, scaler)  # DDP averages over processes

    # try a step
    started, first = time.perf_counter(), p.rows + rank * rows_here
    if p.step < s.max_iters:
        micro, compiled = try_step(gradients, model, first, rows_here, micro, compiled, s, world, say)
        p.compile = compiled
        if kind == "cuda" and world == 1 and not chat and s.compile != "off" and checkpoint.HAS_FAST:
            from fast.graphs import record_step

            compute = lambda *inputs: forward_backward(model, inputs, micro / s.global_batch_size, autocast, scaler)
            batches = [rows.batch(range(a, a + micro), device) for a in (first, first + micro)]
            replay = record_step(compute, *batches, list(model.parameters()), machine.same_gradients, say)
    p.seconds += time.perf_counter() - started
    say(f"step     {s.global_batch_size} rows of {s.block_size} tokens, micro-batches of {micro}, processes: {world}")
    say(f"run      {s.max_iters:,} steps = {s.max_iters / steps_per_epoch:.1f} epochs of {rows.describe()}")

    # make the folder a model directory of this run
    write_state = lambda path: checkpoint.save_state(path, model, optimizers, scaler, asdict(p), settings, facts)
    save = partial(save_on_rank0, rank=rank, world=world, say=say)
    log = Log(out_dir / "log.jsonl", rank == 0)
    if rank == 0:
        checkpoint.start_run(out_dir, model, folder, meta, source, resumed)
        log.drop_after(p.step, val_loss=p.evaluated, sample=p.sampled)  # what is about to be repeated
    for key, (old, new) in changes.items():
        log.write(step=p.step, setting=key, old=old, new=new)
    stop, stopping, bad_steps, logged = StopSignal(rank), False, 0, replace(p)
    bar = tqdm(total=s.max_iters, initial=p.step, unit="step", disable=None if rank == 0 else True, leave=False)

    while not stopping:
        # print a sample
        untrained = p.step == 0 and s.init_from == "auto"
        if s.sample_interval and p.step % s.sample_interval == 0 and p.sampled < p.step and not untrained:
            p.sampled = p.step
            if rank == 0:
                print_sample(model, folder, meta, val_rows if chat else None, autocast, p.step, log)

        # evaluate, keep the best model, save what a resume needs
        if (p.step % s.eval_interval == 0 or p.step >= s.max_iters) and p.evaluated < p.step and not untrained:
            loss = evaluate(model, val_rows, micro, autocast, rank, world, lambda: stop.asked)
            if loss is None:  # a signal interrupted it
                stopping = True
                break
            check_finite(model, loss, p.step, out_dir)
            if saved_step is None and p.step and save(state_file, write_state):
                saved_step = p.step  # before the first trained model
            p.evaluated, p.since_best = p.step, p.since_best + 1
            if loss < p.best_val_loss:
                p.best_val_loss, p.best_step, p.since_best = loss, p.step, 0
            bpb = loss / math.log(2) * meta.get("val_loss_tokens", meta["val_tokens"]) / meta["val_bytes"]
            if loss < kept_loss and (saved_step is not None or p.step == 0):
                header = dict(step=str(p.step), val_loss=repr(loss), val_bpb=f"{bpb:.6f}")
                header["tokenizer_sha256"] = meta["tokenizer_sha256"]
                if save(out_dir, partial(checkpoint.save_pretrained, model, metadata=header)):
                    kept_loss, kept_step = loss, p.step
            best = (kept_loss, kept_step) == (loss, p.step) and loss <= p.best_val_loss
            report_evaluation(loss, bpb, best, p, kept_step, say, log)
            if save(state_file, write_state):
                saved_step = p.step
        if p.step >= s.max_iters or (s.patience and p.since_best >= s.patience):
            break
        if s.lr_schedule == "wsd" and p.step == decay_begins(s):
            check_finite(model, 0.0, p.step, out_dir)
            save(out_dir / "stable.pt", write_state)  # a longer schedule can continue from here: docs/recipes.md

        # set the learning rate of this step, and the noise on its inputs
        started = time.perf_counter()
        lr = learning_rate_at(p.step, s)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr
        rows.noise = s.token_noise if p.step < noise_ends(s) else 0.0

        # forward and backward, one micro-batch after the other; gradients add up
        loss = torch.zeros((), device=device)
        batches = split(p.rows + rank * rows_here, rows_here, micro)
        for batch in batches:
            loss += gradients(batch, last=batch is batches[-1])

        # clip the gradient; agree on the loss, and on whether one of the processes was asked to stop
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf))
        shared = torch.stack((loss / world, torch.tensor(float(stop.asked > 0), device=device)))
        if world > 1:
            dist.all_reduce(shared)
        loss, stopping = float(shared[0]), bool(shared[1])

        # step, or skip if the numbers are not finite: float16 overflows now and then, and its scale is halved
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in optimizers:
                scaler.step(optimizer)
            bad_steps = 0
            p.recent_loss = loss if p.recent_loss is None else 0.9 * p.recent_loss + 0.1 * loss
        else:
            bad_steps += not math.isfinite(loss) or scaler.get_scale() <= 1  # the scale is 1 without a scaler
            p.skipped += 1
            say(f"!! step {p.step}: loss {loss}, gradient norm {norm}; skipped ({p.skipped} so far)")
            if bad_steps == 5:
                diverged("five steps without a finite loss or gradient", out_dir)
        scaler.update()
        model.zero_grad(set_to_none=replay is None)  # a replay adds to the tensors it was recorded with
        p.step, p.rows = p.step + 1, p.rows + s.global_batch_size
        p.seconds += time.perf_counter() - started

        # log; in a terminal the progress line shows every step
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        bar.update()
        if p.step % s.log_interval == 0:
            tokens, peak_of_all = rows.size(range(logged.rows, p.rows)), 0 if chat else world * peak
            report_step(loss, lr, norm, tokens, flops, peak_of_all, logged, p, s, say, log)
            logged = replace(p)

    # save what is not saved yet; the run has reached its end, or a signal stopped it
    bar.close()
    if saved_step != p.step:
        check_finite(model, 0.0, p.step, out_dir)
        if not save(state_file, write_state):
            raise UserError(f"step {p.step:,} could not be saved (see above).")
    if not stopping:
        report_end(s, p, kept_loss, kept_step, chat, say)
        return 0
    say(f"stopped at step {p.step:,}, saved. Resume with: python train.py --out_dir={out_dir}")
    return stop.asked or signal.SIGTERM  # if another process was asked


# ----------------------------------------------------------------------------------------------------------------------
# settings, data and model of a new or resumed run


def check_folder(s: Settings, given: dict):
    """Raise UserError if a new run cannot start in this folder. given: see parse()."""
    if not s.out_dir.strip():
        raise UserError("--out_dir is empty: expected a folder.")
    weights = [file for file in Path(s.out_dir).glob("*model*") if file.suffix in (".safetensors", ".bin")]
    # step 0 is a run's initial model; others are worth keeping
    if weights and s.init_from != "scratch" and checkpoint.metadata(Path(s.out_dir)).get("step") != "0":
        remedy = f"Use another --out_dir, with --init_from={s.out_dir} to fine-tune that model."
        raise UserError(f"{s.out_dir} holds a model and no state.pt: a run would overwrite it. {remedy}")
    # a new run says what it trains: these settings alone are those of a resume
    resume = "out_dir" in given and set(given) <= {"out_dir", "lr_decay_iters", "max_epochs", *FOLLOW}
    if s.init_from == "resume" or resume:
        raise UserError(f"{s.out_dir}/state.pt not found: nothing to resume. A new run needs a recipe.")


def resumed_settings(s: Settings, data, given: dict, run: dict) -> tuple[Settings, object, list[str], dict]:
    """Return the settings of a resumed run, train.py's and prepare.py's; how recipe and flags differ, as text; and the
    changes, {setting: (old, new)}. run: the settings so far. UserError if a fixed one would change."""
    notes, changes, refused, requested = [], {}, [], asdict(s) | asdict(data)
    run = asdict(Settings()) | asdict(prepare.Settings()) | run  # settings may have been added since
    for key, source in given.items():
        old, new = run[key], requested[key]
        same_source = key == "init_from" and (new in ("auto", "resume") or Path(new) == Path(old))
        if new == old or key == "out_dir" or same_source:
            continue
        if key in FIXED:
            refused.append(f"{key} was {old}, the {source} says {new}")
        elif source == "flag" or key in FOLLOW:
            run[key], changes[key] = new, (old, new)
            best = "; the next evaluation replaces the best model" if key in ("eval_rows", "block_size") else ""
            notes.append(f"{key}: {old} -> {new} ({source}){best}")
        elif key in asdict(s):  # prepare.py's settings only serve to make a data set
            notes.append(f"{key}: {old} kept, the recipe says {new}; --{key}={new} changes it")
    if refused:
        remedy = f"Use another --out_dir, or continue as it was: python train.py --out_dir={s.out_dir}"
        raise UserError(f"{s.out_dir} cannot be resumed: {'; '.join(refused)}. {remedy}")
    run["out_dir"] = s.out_dir  # the folder may have been renamed
    pick = lambda cls: cls(**{field.name: run[field.name] for field in fields(cls)})
    return pick(Settings), pick(prepare.Settings), notes, changes


def limit_epochs(s: Settings, steps_per_epoch: float, p: Progress, changes: dict):
    """Apply max_epochs: fewer steps, with a schedule and intervals that fit them. A schedule that has begun stays,
    unless a flag changes it."""
    asked, limit = replace(s), math.ceil(min(s.max_epochs * steps_per_epoch, s.max_iters))
    if 0 < limit < s.max_iters:
        s.max_iters, s.lr_decay_iters = limit, min(s.lr_decay_iters, limit)
        for key, parts in dict(warmup_iters=4, eval_interval=4, sample_interval=4, log_interval=10).items():
            at_ends = key != "warmup_iters" and getattr(asked, key) >= asked.max_iters  # only at start and end
            setattr(s, key, limit if at_ends else min(getattr(asked, key), max(1, limit // parts)))
    if s.max_iters < p.step:
        raise UserError(f"{s.out_dir} is at step {p.step:,}, after the {s.max_iters:,} steps asked for.")
    s.lr_decay_iters = s.lr_decay_iters or s.max_iters
    for key in ("warmup_iters", "lr_decay_iters"):
        if p.step and key not in changes:
            setattr(s, key, getattr(p, key))
        setattr(p, key, getattr(s, key))


def make_model(s: Settings, given: dict, meta: dict, folder: Path, state: dict | None) -> tuple[SmolLM2, Path | None]:
    """Return the model in float32 (if resumed, without its weights yet), and the directory it is fine-tuned from."""
    torch.manual_seed(s.seed)
    source = None
    if state is not None:
        model = SmolLM2(state["config"])
    elif s.init_from == "auto":
        shape, eos = {key: getattr(s, key) for key in SHAPE}, meta["eos_token_id"]
        shape["head_dim"] = s.head_dim or s.hidden_size // s.num_attention_heads
        shape["max_position_embeddings"] = s.max_position_embeddings or s.block_size
        shape["initializer_range"] = s.initializer_range or s.hidden_size**-0.5
        try:
            model = SmolLM2(SmolLM2Config(**shape, vocab_size=meta["vocab_size"], bos_token_id=eos, eos_token_id=eos))
        except ValueError as error:  # 7 heads with 3 key/value heads, an odd head_dim
            raise UserError(str(error)) from None
    else:
        source = checkpoint.find(s.init_from)
        model, _ = checkpoint.load(source, dtype=torch.float32, fast=False)
        if file_sha256(source / "tokenizer.json") != meta["tokenizer_sha256"]:
            remedy = f"Make another --dataset with --input and --tokenizer={s.init_from}."
            raise UserError(f"{folder} was made with another tokenizer than {s.init_from} has. {remedy}")
        shape = {key: getattr(model.config, key) for key in SHAPE if key in given}
        if wrong := [f"{key}={getattr(s, key)} (it has {has})" for key, has in shape.items() if getattr(s, key) != has]:
            raise UserError(f"{s.init_from} is fine-tuned in its own shape: leave out {', '.join(wrong)}.")
        if meta["eos_token_id"] not in model.config.eos_ids:  # -Instruct models end turns alone; documents end, too
            model.config.eos_token_id = [*sorted(model.config.eos_ids), meta["eos_token_id"]]
    if s.block_size > (limit := model.config.max_position_embeddings):
        raise UserError(f"--block_size={s.block_size} is longer than the model's context of {limit} positions.")
    for layer in model.layers:
        layer.dropout = s.dropout
    return model, source


# ----------------------------------------------------------------------------------------------------------------------
# a step


def split(first: int, count: int, micro: int) -> list[range]:
    """Split the rows first .. first + count - 1 into micro-batches; the last may be shorter."""
    return [range(a, min(a + micro, first + count)) for a in range(first, first + count, micro)]


def forward_backward(model, inputs, share: float, autocast, scaler) -> torch.Tensor:
    """Add a micro-batch's gradients to .grad, and return its share of the step's loss."""
    with autocast():
        _, loss = model(*inputs, loss_only=True)
    loss = loss * share
    scaler.scale(loss).backward()
    return loss.detach()


def try_step(gradients, model, first, rows_here, micro, compiled, s, world, say) -> tuple[int, bool]:
    """Run forward and backward passes, so that out-of-memory and compile errors surface before anything is written.
    Return the micro-batch that fits into memory, and whether the blocks stay compiled."""
    while True:
        batches, moments = split(first, rows_here, micro), []
        try:
            if first < s.global_batch_size:  # room for the optimizer's averages, which a resumed run has already
                moments += [torch.empty_like(p) for p in model.parameters() for _ in range(2)]
            # two, since the second needs memory for the gradients of the first; the last may be shorter
            for batch in batches[:2] + batches[2:][-1:]:
                gradients(batch)
            if compiled:
                machine.check_compiled(partial(gradients, batches[0]), model)
            return micro, compiled
        except Exception as error:
            text = first_line(error)
            if machine.out_of_memory(error) and micro > 1 and world == 1:
                micro //= 2
                say(f"!! out of memory: micro-batch {micro}, still {s.global_batch_size} rows a step")
            elif machine.out_of_memory(error):
                smaller = "--micro_batch_size" if micro > 1 else "--block_size, or a smaller model"
                raise UserError(f"out of memory ({text}). Try a smaller {smaller}.") from None
            elif not compiled:
                raise
            elif s.compile == "on" or world > 1:
                raise UserError(f"compiling failed ({text}). Train without: --compile=off") from None
            else:
                compiled = False
                machine.undo_compile(model)
                say(f"!! compiling failed ({type(error).__name__}: {text}); continuing without")
        finally:
            moments.clear()
            model.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------------------------
# what is checked, printed and logged


def check_finite(model, loss: float, step: int, out_dir: Path):
    """Raise UserError if a weight or the loss is not finite, so that no such model is ever saved."""
    if not (math.isfinite(loss) and all(bool(torch.isfinite(w).all()) for w in model.parameters())):
        diverged(f"weights or loss are not finite at step {step:,}", out_dir)


def diverged(problem: str, out_dir: Path):
    again = "Resume from state.pt" if Path(out_dir, "state.pt").is_file() else "Start again"
    raise UserError(f"{problem}, and nothing was saved. {again} with a lower --learning_rate and --out_dir={out_dir}.")


def report_end(s, p, kept_loss, kept_step, chat, say):
    """Report what the run has reached, and print the commands that continue it and use its model."""
    say(f"done: {p.step:,} steps in {p.seconds / 60:.1f} minutes{', out of patience' if p.step < s.max_iters else ''}")
    if kept_step >= 0:
        say(f"the model kept has validation loss {kept_loss:.4f}, of step {kept_step:,}")
    longer = f"--max_iters={2 * p.step} --lr_decay_iters={2 * p.step} --max_epochs=0 --patience=0"
    longer = f"python train.py --out_dir={s.out_dir} {longer}"
    say(f"train longer: {'from stable.pt, see docs/recipes.md' if s.lr_schedule == 'wsd' else longer}")
    say(f"try it: python {'chat' if chat else 'sample'}.py --model={s.out_dir}")
    say(f"plot it: python plot.py --run={s.out_dir}")


def print_sample(model, folder: Path, meta: dict, val_rows, autocast, step: int, log):
    """Print and log 100 tokens after a line break, or the answer to a held-out question, without fast/."""
    tokenizer = checkpoint.read_tokenizer(folder)
    prompt = tokenizer.encode("\n", add_special_tokens=False).ids or [meta["eos_token_id"]]
    if val_rows is not None:  # conversations: the last row has one of the shorter ones
        inputs, targets = (rows[-1] for rows in val_rows[:2])
        prompt = inputs[: int((targets != -100).nonzero()[0]) + 1].tolist()
    model.eval()
    with torch.compiler.set_stance("force_eager"), autocast():
        steps = generate(model, prompt, max_new_tokens=100, seed=step, fast=False)
        text = tokenizer.decode([int(ids) for ids in steps])
    model.train()
    print_safe("     " + text.strip().replace("\n", "\n     "))
    log.write(step=step, sample=text)


if __name__ == "__main__":
    run_main(main)
