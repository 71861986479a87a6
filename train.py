"""
Train SmolLM2 from scratch, or from released weights, on what prepare.py made. Stop it any time; it goes on from there.

    python train.py config/tiny_shakespeare.py                  # a small model, two minutes on two CPU cores
    python train.py config/smol_shakespeare.py                  # the full 135M shape, about 27 minutes
    python train.py config/smol_shakespeare.py                  # the same again: it goes on where it stopped
    python train.py config/finetune_smollm2.py                  # from the released weights
    torchrun --standalone --nproc_per_node=8 train.py config/smol_135m.py

Once a run has begun, out/RUN/ is at every moment a Hugging Face model directory with the best model so far (lowest
validation loss); beside it lie state.pt, everything a resume needs, log.jsonl, and with a wsd schedule stable.pt, from
where its decay began.
The data are prepared first if they are not there.

A step is `global_batch_size` rows of `block_size` tokens, however many processes and micro-batches share the work: the
rows are a function of seed and step alone, so splitting them otherwise changes nothing but rounding (and what dropout
drops), and stopping and going on changes nothing at all.
"""

import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from lib.device import (
    DTYPES,
    broadcast_from_rank0,
    compile_for_training,
    join_processes,
    peak_flops,
    pick_autocast,
    pick_compile,
    pick_device,
    prepare_process,
)
from lib.files import Busy, Log, exclusive, file_sha256
from lib.settings import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Seed,
    UserError,
    Within,
    flags_in,
    override,
    print_safe,
    run_main,
)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import prepare
from dataloader import Conversations, Rows, text_rows, to_device, validation_conversations, validation_rows
from evaluate import evaluate, read_ids
from gradients import forward_backward, micro_batches, rehearse, seed_dropout
from model import SmolLM2, SmolLM2Config
from optimizer import check_schedule, decay_begins, learning_rate_at, make_optimizer, noise_ends
from resume import FIXED, Progress, changes_accepted, check_settings, goes_on, resume
from sample import generate


@dataclass
class Settings:
    # the run
    out_dir: str = "out/run"  # the run's folder
    init_from: str = "auto"  # auto: go on if out_dir has a state.pt, else scratch; resume; scratch (starts over);
    #                          or a model directory or hub id to fine-tune
    accept_changes: str = ""  # settings, comma-separated, that may differ from those of the run that is resumed
    eval_interval: Count = 100  # steps between evaluations; each saves state.pt, and the model if it is the best so far
    eval_rows: Count = 2000  # at most this many validation rows, spread evenly; all of them if there are fewer
    also_eval: str = ""  # text files, comma-separated, measured at the end, and before step 1 of fine-tuning
    patience: NonNegativeInt = 0  # stop after this many evaluations without improvement; 0 never
    log_interval: Count = 10  # steps between log lines
    sample_interval: NonNegativeInt = 0  # steps between printed samples of text; 0 none
    # a step
    global_batch_size: Count = 16  # rows per optimizer step, all processes together: this decides the result
    micro_batch_size: Count = 16  # rows per forward pass: whatever fits in memory and is fast
    block_size: Count = 256  # tokens per row
    # the optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices, AdamW for the rest
    max_iters: NonNegativeInt = 1000  # steps
    max_epochs: NonNegative = 0.0  # at most so many passes over the training data, with warmup and intervals to match;
    #                                0 no limit
    learning_rate: Positive = 1e-3  # the peak, after warmup
    min_lr: NonNegative = 1e-4  # where the schedule ends
    warmup_iters: NonNegativeInt = 50  # steps from 0 to the peak
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # wsd: warmup, stable, linear decay, SmolLM2's own
    lr_decay_iters: NonNegativeInt = 0  # the step at which the schedule reaches min_lr; 0 is max_iters at the start
    decay_fraction: Annotated[float, Within(above=0, most=1)] = 0.2  # wsd: how much of the run decays
    token_noise: Fraction = 0.0  # share of input tokens replaced by random ones: against memorizing a short text
    noise_until: Annotated[float, Within(above=0, most=1)] = 1.0  # share of the schedule that has this noise; after it
    #                                the model reads the text as it is
    dropout: Fraction = 0.0  # share of what attention and MLP add that is set to 0 in training: against memorizing, too
    weight_decay: NonNegative = 0.1  # on matrices only; norm weights are left alone
    beta1: Fraction = 0.9  # decay of AdamW's average of the gradient
    beta2: Fraction = 0.95  # decay of its average of the squared gradient: 0.999 is usual, less is steadier here
    grad_clip: NonNegative = 1.0  # largest gradient norm; 0 leaves it as it is
    seed: Seed = 1337  # of the first weights, the order of the rows, noise and dropout
    # the machine
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the products; weights are float32 always
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of the blocks; auto where it pays within the run
    #                                                 (off records no CUDA graph, either)
    peak_tflops: NonNegative = 0.0  # of one device in this dtype, for MFU; 0: known (some GPUs) or measured (CPU)
    # the architecture, when from scratch: SmolLM2-135M; the vocabulary comes with the data
    hidden_size: Count = 576
    intermediate_size: Count = 1536
    num_hidden_layers: Count = 30
    num_attention_heads: Count = 9
    num_key_value_heads: Count = 3
    head_dim: NonNegativeInt = 0  # 0 is hidden_size / num_attention_heads
    max_position_embeddings: NonNegativeInt = 0  # the model's context; 0 is block_size, which it is trained on
    rope_theta: Positive = 100000.0
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: NonNegative = 0.0  # 0 is 1 / sqrt(hidden_size), which for 576 is the released 0.0417


class Run:
    """What a run is made of: data, model and optimizer, resumed or new. The run's folder is not written to yet."""

    def __init__(self, s: Settings, data: prepare.Settings, rank: int, world: int, device: str):
        self.s, self.rank, self.world, self.device = s, rank, world, device
        self.say = print_safe if rank == 0 else lambda _: None
        self.out_dir = Path(s.out_dir)

        # the data
        self.folder, self.meta = prepare.DATA / data.dataset, prepare.read_meta(data.dataset)
        train, val, self.chat = self.folder / "train.bin", self.folder / "val.bin", "train_loss_tokens" in self.meta
        vocab_size = self.meta["vocab_size"]
        if self.chat and s.token_noise:
            raise UserError("--token_noise is for text: conversations are learnt as they are.")
        if self.chat:
            self.rows = Conversations(train, s.block_size, s.seed, vocab_size)
            self.val_rows = validation_conversations(val, s.block_size, s.eval_rows, vocab_size)
        else:
            self.rows = Rows(train, self.meta["train_tokens"], s.block_size, s.seed, s.token_noise, vocab_size)
            self.val_rows = validation_rows(val, self.meta["val_tokens"], s.block_size, s.eval_rows, vocab_size)
        self.tokenizer = checkpoint.read_tokenizer(self.folder)
        names = [name.strip() for name in s.also_eval.split(",") if name.strip()]
        self.other_texts = {name: read_ids(self.tokenizer, Path(name)) for name in names}
        facts = "tokenizer_sha256 source_sha256 train_tokens val_tokens vocab_size".split()
        self.facts = {key: self.meta[key] for key in facts}  # what must be the same on a resume
        if self.chat:
            self.facts["conversations"] = "packed"  # before 26 November 2026 each had a row to itself

        self.asked = replace(s)  # before the limit in epochs shortens it: what state.pt keeps
        shorten(s, most=s.max_epochs * self.rows.per_epoch / s.global_batch_size)
        self.shortened = s.max_iters < self.asked.max_iters

        # the state to resume from, if there is one
        self.state_file, state = self.out_dir / "state.pt", None
        self.p = Progress(lr_decay_iters=s.lr_decay_iters or s.max_iters, warmup_iters=s.warmup_iters)
        self.resumed = goes_on(s)
        self.origin, self.saved = s.init_from, None  # what the run began from; the step that state.pt is of
        self.kept_loss, self.kept_step = math.inf, -1  # of the model that out_dir holds
        self.sound = -1  # the step that check_sound() found sound
        self.replay = None  # the CUDA graph of record()
        self.steady = True  # a wsd schedule's decay is still to come, so stable.pt is to be written there
        if self.resumed:
            state = resume(self)
        for warning in check_schedule(s, self.p.lr_decay_iters):
            self.say(f"!! {warning}")

        # the model: resumed, new, or read from the directory that is fine-tuned
        torch.manual_seed(s.seed)
        self.model, self.source_dir = make_model(s, self.meta, self.folder, state)
        self.model.to(device).train()
        for layer in self.model.layers:
            layer.dropout = s.dropout

        # the optimizer and the precision of matrix products; weights are float32
        self.optimizer = make_optimizer(self.model, s.optimizer, s.learning_rate, s.weight_decay, (s.beta1, s.beta2))
        if s.dtype == "auto" and device == "cpu" and self.p.cpu_dtype and "dtype" not in changes_accepted(s):
            self.dtype, self.dtype_reason = DTYPES[self.p.cpu_dtype], "as when this run began"
        else:
            self.dtype, self.dtype_reason = pick_autocast(s.dtype, device)
        if s.dtype == "auto" and device == "cpu":  # the first process has measured for all
            self.dtype = broadcast_from_rank0(self.dtype, world)
        kind = torch.device(device).type
        self.autocast = partial(torch.autocast, kind, self.dtype) if self.dtype != torch.float32 else nullcontext
        self.scaler = torch.amp.GradScaler(kind, enabled=self.dtype == torch.float16)
        torch.set_float32_matmul_precision("high" if kind == "cuda" else "highest")  # TF32 for what stays in fp32
        if self.resumed:
            checkpoint.restore(state, self.state_file, self.model, self.optimizer, self.scaler)

        # rows of a step: all, this process's share, and how many go through the model at a time
        self.step_tokens = s.global_batch_size * s.block_size
        self.rows_here = s.global_batch_size // world
        self.micro = min(s.micro_batch_size, self.rows_here)

        # how fast the device could be, and whether compiling pays
        self.peak, self.peak_source = peak_flops(device, self.dtype, s.peak_tflops)
        work = s.max_iters * self.step_tokens * self.model.flops_per_token(s.block_size) / world
        self.compiled, self.compile_reason = pick_compile(s.compile, device, work, self.peak)
        if s.compile == "auto" and self.p.compile is not None:
            other = "on" if self.compiled else "off"
            other = f" (begun today it would be {other}: {self.compile_reason}; --compile={other} changes it)"
            self.compile_reason = "as when this run began" + (other if self.compiled != self.p.compile else "")
            self.compiled = self.p.compile
        if s.compile == "auto":  # each process may have measured another peak
            self.compiled = broadcast_from_rank0(self.compiled, world)

    def again(self, **changes) -> str:
        """The command that goes on with this run, with some of its settings changed, or left out where None."""
        if self.s.init_from == "scratch":  # which would begin anew
            changes["init_from"] = "auto"
        if "accept_changes" in changes:
            changes["accept_changes"] = ",".join(dict.fromkeys([*changes_accepted(self.s), changes["accept_changes"]]))
        kept = [arg for arg in sys.argv if arg.lstrip("-").partition("=")[0].replace("-", "_") not in changes]
        line = shlex.join([*kept, *(f"--{key}={value}" for key, value in changes.items() if value is not None)])
        return f"python {line}" if self.world == 1 else f"torchrun, as before, with {line}"


def main():
    s, data = override(sys.argv[1:], Settings, prepare.Settings, doc=__doc__)
    check_settings(s)
    prepare_data(s, data)
    prepare.check_flags(data, flags_in(sys.argv[1:]))
    prepare_process()
    rank, world, device = join_processes(pick_device(s.device))
    try:
        if s.global_batch_size % world:
            raise UserError(f"--global_batch_size={s.global_batch_size} cannot be shared evenly by {world} processes.")
        with exclusive(Path(s.out_dir), "being trained in") if rank == 0 else nullcontext():
            signalled = train(s, data, rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
    if signalled:  # as of a process that the signal has ended, so that `train.py && ...` goes no further
        raise SystemExit(128 + signalled)


def prepare_data(s: Settings, data: prepare.Settings):
    """Prepare the data if they are not there. The first process of each machine prepares, and the others look for its
    last file: processes that have joined already would give up waiting for each other after some minutes."""
    if s.init_from not in ("auto", "resume", "scratch"):
        if not goes_on(s):  # else the model is not needed any more
            checkpoint.find(s.init_from)
        if data.tokenizer == "bpe":
            data.tokenizer = str(Path(s.init_from))  # no other fits the weights
    ready, several = prepare.DATA / data.dataset / "meta.json", "RANK" in os.environ
    if not ready.is_file() and (not several or os.environ.get("LOCAL_RANK", "0") == "0"):
        try:
            prepare.prepare(data)
        except Busy:  # by the first process of another machine, on a disk that both share
            if not several:
                raise
    while not ready.is_file():
        time.sleep(0.5)


def train(s: Settings, data: prepare.Settings, rank: int, world: int, device: str) -> int:
    """One run, or what is left of it; the number of the signal that stopped it, or 0. A function of its own, so that
    DDP is gone before the processes part."""
    run = Run(s, data, rank, world, device)
    if world > 1:
        seen = [None] * world
        dist.all_gather_object(seen, (run.resumed, asdict(run.p), run.facts, run.kept_loss, run.kept_step))
        if any(other != seen[0] for other in seen):
            raise UserError(f"the processes do not see the same run in {run.out_dir}: all need one disk for it.")
    announce(run)
    if already_finished(run):
        return 0
    set_up(run)
    if run.p.step < s.max_iters:  # else only an evaluation is left
        rehearse(run)
    try:
        begin(run)
    except OSError as error:
        raise UserError(f"{run.out_dir} could not be written ({error}).") from None
    signalled = loop(run)
    if world > 1:
        dist.barrier()  # the first process may still be saving, or printing a sample
    return signalled


# ----------------------------------------------------------------------------------------------------------------------
# the loop


def loop(run: Run) -> int:
    """Steps and evaluations until max_iters, patience, or a signal, whose number is returned."""
    s, p, say, optimizer, scaler = run.s, run.p, run.say, run.optimizer, run.scaler
    bad_steps = 0
    shown_at, shown_step = time.perf_counter(), p.step
    while True:
        # print a sample, evaluate, keep the best model, save what a resume needs
        if sample_is_due(run):
            print_sample(run)
            shown_at, shown_step = time.perf_counter(), p.step
        if evaluation_is_due(run):
            if run.saved is None and p.step > 0:
                save(run)  # first, so that no trained model is ever without the state it came from
            if not evaluation(run):
                break  # a signal cut it short
            save(run)
            shown_at, shown_step = time.perf_counter(), p.step
            if s.patience and p.since_best >= s.patience:
                say(f"stopping: no better validation loss in {s.patience} evaluations, since {p.best_step:,}")
                finish(run)
                return 0
        if p.step >= s.max_iters:
            finish(run)
            return 0
        if run.steady and s.lr_schedule == "wsd" and p.step == decay_begins(s, p.lr_decay_iters):
            save(run, "stable.pt")  # a run that is prolonged goes on from here
            shown_at, shown_step = time.perf_counter(), p.step
        started = time.perf_counter()

        # set the learning rate of this step, and the noise on its inputs
        lr = learning_rate_at(p.step, s, p.lr_decay_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if s.token_noise:
            run.rows.noise = s.token_noise if p.step < noise_ends(s, p.lr_decay_iters) else 0.0

        # forward and backward, one micro-batch after the other; their gradients add up
        loss = torch.zeros((), device=run.device)
        batches = micro_batches(run, p.step)
        for batch in batches:
            loss += forward_backward(run, batch, last=batch is batches[-1])

        # clip the gradient
        scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.grad_clip or math.inf))

        # agree with the other processes on the loss, and on whether one of them was asked to stop
        loss, stopping = agree(run, loss)

        # take the step, or skip it where the numbers are not finite: float16 overflows now and then, and its scaler
        # then halves the scale
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
            bad_steps = 0
            p.recent_loss = loss if p.recent_loss is None else 0.9 * p.recent_loss + 0.1 * loss
        else:
            if not math.isfinite(loss) or scaler.get_scale() <= 1:  # 1 where there is no scaler
                bad_steps += 1
            p.skipped += 1
            say(f"!! step {p.step}: loss {loss}, gradient norm {norm}; skipped ({p.skipped} so far)")
            if bad_steps == 5:
                raise UserError(f"five steps in a row without a finite loss or gradient. {last_good(run)}")
        scaler.update()
        optimizer.zero_grad(set_to_none=run.replay is None)  # a replay adds to the tensors it was recorded with
        p.step += 1
        p.seconds += time.perf_counter() - started

        # log
        if p.step % s.log_interval == 0:
            log_step(run, loss, lr, norm, time.perf_counter() - shown_at, p.step - shown_step)
            shown_at, shown_step = time.perf_counter(), p.step
        if stopping:
            break
    save(run)
    check_saved(run)
    say(f"stopped at step {p.step:,}, saved. Go on with: {run.again()}")
    return run.stop.asked or signal.SIGTERM  # where another process was asked


def finish(run: Run):
    """What the run has come to, and the command that uses it. UserError where its end was not saved."""
    took = f"done: {run.p.step:,} steps in {run.p.seconds / 60:.1f} minutes"
    if run.kept_loss < math.inf:
        run.say(f"{took}, the model kept has validation loss {run.kept_loss:.4f}, of step {run.kept_step:,}")
        report_other_texts(run)
        script = "chat" if run.chat else "sample"
        run.say(f"{script}: python {script}.py --model={shlex.quote(run.s.out_dir)}")
    else:
        run.say(f"{took}, and no model of them was kept")
    if run.p.evaluated == run.p.step:  # with max_iters=0 there is nothing to evaluate, nor to save
        check_saved(run)


def check_saved(run: Run):
    """UserError where the last step is not in state.pt."""
    if run.saved != run.p.step:
        earlier = f"Go on from step {run.saved:,} with: {run.again()}" if run.saved is not None else "Nothing was, yet."
        raise UserError(f"ended at step {run.p.step:,}, which was not saved (see above). {earlier}")


def agree(run: Run, loss: torch.Tensor) -> tuple[float, bool]:
    """The mean loss of all processes, and whether any of them was asked to stop: one small exchange a step."""
    shared = torch.stack((loss / run.world, torch.tensor(float(run.stop.asked > 0), device=run.device)))
    if run.world > 1:
        dist.all_reduce(shared)
    return float(shared[0]), bool(shared[1])


def log_step(run: Run, loss: float, lr: float, norm: float, seconds: float, steps: int):
    """A line on the terminal and one in log.jsonl. `seconds`: what the `steps` since the last line took together."""
    s, p = run.s, run.p
    rows = range((p.step - steps) * s.global_batch_size, p.step * s.global_batch_size)
    rate, speed = run.rows.size(rows) / seconds, run.model.flops_per_token(s.block_size)
    if run.chat:  # the head is for what is learnt alone
        head = 6 * run.model.config.vocab_size * run.model.config.hidden_size
        speed -= head * (1 - run.rows.weight(rows) / run.rows.size(rows))
    speed *= rate / run.world
    seconds /= steps
    if run.peak_source == "measured":  # perhaps while the machine was busy: a faster step corrects it
        run.peak = max(run.peak, speed)
    mfu = speed / run.peak if run.peak else None
    eta = int((s.max_iters - p.step) * seconds)
    run.say(
        f"step {p.step:>6} | loss {loss:.4f} | lr {lr:.2e} | grad {norm:.2f} | {1000 * seconds:,.0f} ms | "
        f"{rate:,.0f} tok/s | mfu {f'{mfu:.1%}' if mfu else 'n/a'} | eta {eta // 60}m{eta % 60:02d}s"
    )
    if run.rank == 0:
        run.log.write(
            step=p.step, loss=loss, lr=lr, grad_norm=norm, tok_per_s=round(rate, 1), mfu=mfu and round(mfu, 4),
            seconds=round(p.seconds, 1),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluation_is_due(run: Run) -> bool:
    """Every eval_interval steps and at the end; before step 1 only where there is a model worth measuring."""
    s, p = run.s, run.p
    now = p.step % s.eval_interval == 0 or p.step >= s.max_iters
    return now and p.evaluated < p.step and (p.step > 0 or run.origin not in ("auto", "scratch"))


def evaluation(run: Run) -> bool:
    """Evaluate, keep the model if it is the best, print a sample; False if a signal cut it short."""
    p, meta = run.p, run.meta
    check_sound(run)
    if p.step == 0:
        p.other_texts = other_texts(run, run.model)
    started = time.perf_counter()
    run.model.eval()
    loss = evaluate(run.model, run.val_rows, run.micro, run.autocast, run.rank, run.world, lambda: run.stop.asked)
    run.model.train()
    if loss is None:
        return False
    took = time.perf_counter() - started
    p.evaluated, p.since_best = p.step, p.since_best + 1
    if loss < p.best_val_loss:
        p.best_val_loss, p.best_step, p.since_best = loss, p.step, 0
    bpb = loss / math.log(2) * meta.get("val_loss_tokens", meta["val_tokens"]) / meta["val_bytes"]
    perplexity = math.exp(min(loss, 99))
    kept = keep_best(run, loss, bpb)
    gap = "" if p.recent_loss is None else f" | train {p.recent_loss:.4f} | gap {loss - p.recent_loss:+.4f}"
    run.say(
        f"eval {p.step:>6} | val {loss:.4f} | ppl {perplexity:.2f} | {bpb:.4f} bits per byte{gap} | {took:.1f} s"
        + (" | best so far" if kept else "")
    )
    if p.since_best >= 3 and run.kept_step >= 0:
        run.say(f"     overfitting since step {p.best_step:,}; {run.out_dir} holds the model of step {run.kept_step:,}")
    if run.rank == 0:
        run.log.write(
            step=p.step, val_loss=loss, val_ppl=perplexity, val_bpb=bpb, train_loss=p.recent_loss, best=kept,
            seconds=round(p.seconds, 1),
        )  # fmt: skip
    return True


def keep_best(run: Run, loss: float, bpb: float) -> bool:
    """Write the model unless the folder holds one as good: of an earlier evaluation, or of the end of a wsd schedule
    that was stretched. Whether it holds this one then."""
    step = run.p.step
    if loss < run.kept_loss and (run.saved is not None or step == 0):
        header = dict(step=str(step), val_loss=repr(loss), val_bpb=f"{bpb:.6f}")
        header["tokenizer_sha256"] = run.meta["tokenizer_sha256"]
        try:
            if run.rank == 0:
                checkpoint.save_pretrained(run.model, run.out_dir, header)
            written = True
        except OSError as error:
            run.say(f"!! the model could not be written ({error}); the previous one is kept and training goes on")
            written = False
        if broadcast_from_rank0(written, run.world):
            run.kept_loss, run.kept_step = loss, step
    # the same loss again: after a kill between model and state.pt. A worse one than the best: that could not be written
    return run.kept_step == step and run.kept_loss == loss <= run.p.best_val_loss


def other_texts(run: Run, model: SmolLM2) -> dict[str, float]:
    """Bits per byte of each text of also_eval, over at most eval_rows rows; of those alone that have such a figure: a
    signal cuts some short, and float16 may overflow."""
    found = {}
    model.eval()
    for file, (ids, size) in run.other_texts.items():
        rows = text_rows(ids, run.s.block_size, run.s.block_size, run.s.eval_rows)
        loss = evaluate(model, rows, run.micro, run.autocast, run.rank, run.world, lambda: run.stop.asked)
        if loss is not None and math.isfinite(loss):
            found[file] = loss / math.log(2) * len(ids) / size
    model.train()
    return found


def report_other_texts(run: Run):
    """What the kept model makes of the texts of also_eval, beside what the first one made of them."""
    if not run.other_texts:
        return
    if run.world > 1:
        dist.barrier()  # the first process may still be writing it
    kept = run.model
    if run.kept_step != run.p.step or run.kept_loss != run.p.best_val_loss:
        kept, _ = checkpoint.load(run.out_dir, run.device, torch.float32)
    for file, bits in other_texts(run, kept).items():
        before = run.p.other_texts.get(file)
        change = f", {before:.4f} before ({bits / before - 1:+.1%})" if before else ""
        run.say(f"also     {file}: {bits:.4f} bits per byte{change}")


def sample_is_due(run: Run) -> bool:
    """Every sample_interval steps; before step 1 only where there is a model worth reading."""
    s, p = run.s, run.p
    now = s.sample_interval and p.step % s.sample_interval == 0
    return bool(now) and p.sampled < p.step and (p.step > 0 or run.origin not in ("auto", "scratch"))


def print_sample(run: Run):
    """A hundred tokens after a line break, by model.py itself, so that a change of the architecture shows."""
    run.p.sampled = run.p.step
    if run.rank > 0:
        return
    prompt = run.tokenizer.encode("\n", add_special_tokens=False).ids or [run.meta["eos_token_id"]]
    if run.chat:  # a held-out question, of one of the shorter conversations
        inputs, targets = (rows[-1] for rows in run.val_rows[:2])
        prompt = inputs[: int((targets != -100).nonzero()[0]) + 1].tolist()
    run.model.eval()
    with torch.compiler.set_stance("force_eager"), run.autocast():
        steps = generate(run.model, prompt, max_new_tokens=100, seed=run.p.step, fast=False)
        text = run.tokenizer.decode([int(ids) for ids in steps])
    run.model.train()
    run.say("     " + text.strip().replace("\n", "\n     "))
    run.log.write(step=run.p.step, sample=text)


# ----------------------------------------------------------------------------------------------------------------------
# before the loop


def shorten(s: Settings, most: float):
    """Where the data are short: fewer steps, and a schedule and intervals that fit them. most: steps; 0, no limit."""
    asked = s.max_iters
    if not 0 < most <= asked - 1:  # rounded up, it would be no fewer
        return
    s.max_iters = math.ceil(most)
    s.lr_decay_iters = min(s.lr_decay_iters, s.max_iters)
    for key, parts in dict(warmup_iters=4, eval_interval=4, sample_interval=4, log_interval=10).items():
        at_ends = key != "warmup_iters" and getattr(s, key) >= asked  # asked for at both ends alone
        setattr(s, key, s.max_iters if at_ends else min(getattr(s, key), max(1, s.max_iters // parts)))


def make_model(s: Settings, meta: dict, folder: Path, state: dict | None) -> tuple[SmolLM2, Path | None]:
    """The model in fp32, and the directory it is fine-tuned from, None where it is resumed or new. The weights of a
    state follow when there is an optimizer to take its part."""
    source_dir = None
    if state is not None:
        model = SmolLM2(state["config"])
    elif s.init_from in ("auto", "scratch"):
        same = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
        same += "rope_theta rms_norm_eps tie_word_embeddings".split()
        config = SmolLM2Config(
            **{key: getattr(s, key) for key in same},
            vocab_size=meta["vocab_size"], bos_token_id=meta["eos_token_id"], eos_token_id=meta["eos_token_id"],
            head_dim=s.head_dim or s.hidden_size // s.num_attention_heads,
            max_position_embeddings=s.max_position_embeddings or s.block_size,
            initializer_range=s.initializer_range or s.hidden_size**-0.5,
        )  # fmt: skip
        model = SmolLM2(config)
    else:
        source_dir = checkpoint.find(s.init_from)
        model, _ = checkpoint.load(source_dir, dtype=torch.float32)  # whatever the file holds
        if file_sha256(source_dir / "tokenizer.json") != meta["tokenizer_sha256"]:
            raise UserError(
                f"{folder} was made with another tokenizer than {s.init_from} has. Give another --dataset, with "
                f"--input and --tokenizer={s.init_from}: train.py makes it."
            )
        new, has = asdict(Settings()), vars(model.config)  # what differs from the default was given: not to be ignored
        shape = [key for key in FIXED if key in has and getattr(s, key) not in (new[key], has[key])]
        if shape:
            given = "; ".join(f"--{key}={getattr(s, key)} was given, it has {has[key]}" for key in shape)
            raise UserError(f"{s.init_from} is fine-tuned as it is: {given}. Leave them out, or give its own.")
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise UserError(f"{s.init_from} holds weights that are not finite.")
        if meta["eos_token_id"] not in model.config.eos_ids:  # an -Instruct model ends a turn, our documents end too
            model.config.eos_token_id = [*sorted(model.config.eos_ids), meta["eos_token_id"]]
    limit = model.config.max_position_embeddings
    if s.block_size > limit:
        raise UserError(f"--block_size={s.block_size} is beyond the model's context of {limit} positions.")
    return model, source_dir


def announce(run: Run):
    """What is about to happen, in numbers."""
    s, p, say, meta = run.s, run.p, run.say, run.meta
    n = run.model.num_parameters()
    steps_per_epoch = run.rows.per_epoch / s.global_batch_size
    accumulation = math.ceil(run.rows_here / run.micro)
    say(
        f"data     {run.folder}: {meta['source']}, {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens"
    )
    warn_of_text(run)
    if run.chat:
        say(f"talks    {run.rows.describe()}")
    say(f"model    {n['total']:,} parameters = {n['embeddings']:,} embeddings + {n['backbone']:,} backbone")
    say(
        f"step     micro-batch {run.micro} x accumulation {accumulation} x processes {run.world} = "
        f"{s.global_batch_size} rows x {s.block_size} tokens = {run.step_tokens:,} tokens"
    )
    limit = f": max_epochs={s.max_epochs:g}, instead of {run.asked.max_iters:,}" if run.shortened else ""
    epochs = s.max_iters / steps_per_epoch
    say(f"epochs   {steps_per_epoch:.1f} steps each, {epochs:.1f} in {s.max_iters:,} steps{limit}")
    if s.token_noise:
        until = f" until step {noise_ends(s, p.lr_decay_iters):,}" if s.noise_until < 1 else ""
        say(f"noise    {100 * s.token_noise:g}% of the input tokens{until}")
    # config/smol_shakespeare.py has 364 on Tiny Shakespeare, the tiny recipe 2
    scratch, per_token = p.step == 0 and run.origin in ("auto", "scratch"), n["total"] / meta["train_tokens"]
    if scratch and per_token > 100 and epochs > 1:
        advice = "config/tiny_shakespeare.py suits a short text" if n["total"] > 10**7 else "more text would help most"
        say(
            f"!! {per_token:,.0f} parameters for each token of the text: within a few epochs the model knows it by "
            f"heart. What is kept is the best model on the way; {advice}."
        )
    elif scratch and not run.chat and not s.dropout and per_token > 10 and epochs > 4:
        say(
            "!! a text this short is soon known by heart. More is learnt of it with a smaller model, as "
            "config/ten_seconds.py has, or with --dropout=0.1 --token_noise=0.1 --weight_decay=1.5 --max_epochs=15."
        )
    say(f"device   {run.device}, {torch.get_num_threads()} threads; {str(run.dtype)[6:]}: {run.dtype_reason}")
    say(f"compile  {'on' if run.compiled else 'off'}: {run.compile_reason}")
    if run.peak:
        say(f"peak     {run.peak / 1e9:,.0f} GFLOP/s, {run.peak_source}")
    else:
        say("peak     unknown, so no MFU: --peak_tflops")
    if run.resumed:
        best = min(p.best_val_loss, run.kept_loss)
        say(f"resume   {run.state_file} at step {p.step:,}, best validation loss {best:.4f}")
        if s.max_iters > p.lr_decay_iters and s.lr_schedule != "constant":
            stretched = run.again(lr_decay_iters=s.max_iters, accept_changes="lr_decay_iters")
            say(
                f"!! the schedule ends at step {p.lr_decay_iters:,}, and the rest runs at min_lr={s.min_lr:g}. To "
                f"stretch it: {stretched}"
            )
        cut = p.step < s.max_iters < p.lr_decay_iters != run.asked.lr_decay_iters
        if cut and s.lr_schedule != "constant":
            limit, whole = "max_iters", run.again(lr_decay_iters=s.max_iters, accept_changes="lr_decay_iters")
            remedy = f"To end the schedule there, too: {whole}"
            if run.shortened:
                limit, whole = f"max_epochs={s.max_epochs:g}", dict(max_epochs=0, max_iters=p.lr_decay_iters)
                remedy = f"To go on to there: {run.again(**whole, eval_interval=s.eval_interval)}"
            say(
                f"!! {limit} ends the run at step {s.max_iters:,}, before its schedule ends at {p.lr_decay_iters:,}. "
                + remedy
            )


def warn_of_text(run: Run):
    """Where the data are not of the text that one would expect: of the play, or of an input that has changed since."""
    name, meta = run.folder.name, run.meta
    anew = prepare.command(name, meta)
    if meta["source"] == prepare.PLAY.name and meta.get("input", "") in ("", "shakespeare"):
        run.say(f"!! this is the play, taken without a network. For Tiny Shakespeare: {anew} (and another --out_dir)")
    if run.rank == 0 and prepare.text_changed(name, meta):
        run.say(
            f"!! {run.folder} was made of the text as it was, its input has changed since, and this run takes the old "
            f"one. For the new one: {anew} (and another --out_dir, or delete {run.out_dir})"
        )


def already_finished(run: Run) -> bool:
    """Whether the run had come to its end before; prints what would continue it."""
    s, p = run.s, run.p
    if p.step >= s.max_iters and p.evaluated == p.step:
        longer = dict(max_iters=2 * s.max_iters) | (dict(max_epochs=0) if s.max_epochs else {})
        if run.shortened:
            longer |= dict(eval_interval=s.eval_interval)
        if s.lr_schedule != "constant" and p.lr_decay_iters < longer["max_iters"]:
            longer |= dict(lr_decay_iters=longer["max_iters"], accept_changes="lr_decay_iters")
        if not s.max_iters:  # an evaluation alone: the recipe's own steps are left
            longer = dict(max_iters=None)
        run.say(f"finished at step {p.step:,}. More steps: {run.again(**longer)}")
        return True
    if run.resumed and s.patience and p.since_best >= s.patience:
        run.say(f"stopped by patience at step {p.step:,}. To go on: {run.again(patience=2 * s.patience)}")
        return True
    return False


def set_up(run: Run):
    """Make everything ready for the first step; nothing is written yet."""
    if run.compiled:  # in place, so no name gets a prefix
        compile_for_training(run.model)
    run.trained = run.model  # what forward is called on: the model, or DDP's wrapper around it
    if run.world > 1:
        torch._dynamo.config.optimize_ddp = False  # it would cut each compiled block in pieces
        run.trained = DistributedDataParallel(run.model, gradient_as_bucket_view=True, broadcast_buffers=False)
    run.stop = StopSignal(run.rank)


def begin(run: Run):
    """Make the folder a complete model directory of this run: what an earlier one left goes, what a killed one left
    half-written, and log.jsonl's lines after the step that it goes on from."""
    s, p, out_dir, model = run.s, run.p, run.out_dir, run.model
    first_save = p.step if evaluation_is_due(run) else (p.step // s.eval_interval + 1) * s.eval_interval
    every = f"first at step {min(s.max_iters, first_save):,}, then every {s.eval_interval:,} steps"
    run.say(f"saves    to {out_dir}, {every}")
    if run.rank == 0:
        for name in ("state.pt", "stable.pt", "log.jsonl", *checkpoint.FILES):
            (out_dir / f"{name}.tmp").unlink(missing_ok=True)
        for name in ("state.pt", "stable.pt", "log.jsonl", "model.safetensors") if not run.resumed else ():
            (out_dir / name).unlink(missing_ok=True)
    if run.state_file.name == "stable.pt" and not save(run):  # log.jsonl is about to lose what comes after its step
        raise UserError("state.pt must be written to go back to that step. Nothing has changed.")
    if run.steady and s.lr_schedule == "wsd" and 0 <= decay_begins(s, p.lr_decay_iters) < p.step:
        save(run, "stable.pt")  # a shorter schedule: the loop comes too late for it
    if run.rank > 0:
        return
    if not run.resumed or not (out_dir / "tokenizer.json").is_file():
        tokenizer, eos = run.folder / "tokenizer.json", run.meta["eos_token"]
        template = run.folder / "chat_template.jinja" if run.chat else None
        context = model.config.max_position_embeddings
        checkpoint.save_tokenizer(out_dir, tokenizer, eos, context, run.source_dir, template)
    if not run.resumed:
        first_weights = dict(step="0", tokenizer_sha256=run.meta["tokenizer_sha256"])
        if run.source_dir is None:
            first_weights["untrained"] = "true"
        checkpoint.save_pretrained(model, out_dir, first_weights)
    run.log = Log(out_dir / "log.jsonl", p.step, p.evaluated, p.sampled, run.say)


# ----------------------------------------------------------------------------------------------------------------------
# stopping and saving


class StopSignal:
    """Ctrl-C, SIGTERM or a lost terminal: the first asks the run to save and end at the next safe point, the second
    quits at once."""

    def __init__(self, rank: int):
        self.asked, self.rank = 0, rank  # asked: the signal's number, 0 if there was none
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP; nohup has it ignored
            if number and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.asked:
            os._exit(128 + number)
        self.asked = number
        text = f"\n{signal.Signals(number).name}: saving at the end of this step; once more to quit at once\n"
        if self.rank == 0:
            with suppress(OSError):
                os.write(1, text.encode())  # not print(), which the signal may have interrupted


def check_sound(run: Run):
    """UserError where there is nothing to go on from: a weight is not finite, or neither the next rows nor validation
    rows have a finite loss and gradient. Finite weights that are far too large have a finite loss and no gradient."""
    if run.sound == run.p.step:
        return
    first = run.p.step * run.s.global_batch_size  # the same rows in every process, so that all decide alike
    finite = all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    tried = (lambda: run.rows.batch(range(first, first + run.micro), run.device), lambda: validation_batch(run))
    for rows in tried if finite else ():
        seed_dropout(run, first)
        with run.autocast():
            _, loss = run.model(*rows(), loss_only=True)
        numbers = (loss, *torch.autograd.grad(loss, list(run.model.parameters())))
        if all(bool(torch.isfinite(t).all()) for t in numbers):
            run.sound = run.p.step
            return
    raise UserError(
        f"weights, loss or gradient are not finite at step {run.p.step:,}, so nothing was saved. {last_good(run)}"
    )


def validation_batch(run: Run) -> tuple[torch.Tensor, ...]:
    """A micro-batch of validation rows, repeated where there are fewer, so that it has the shape of the others."""
    chosen = torch.arange(run.micro) % len(run.val_rows[0])
    return tuple(to_device(rows[chosen], run.device) for rows in run.val_rows)


def last_good(run: Run) -> str:
    """What is left of a run whose numbers went wrong, and how to go on."""
    if run.saved is None:
        return f"{run.out_dir} has no checkpoint yet: start over with a lower --learning_rate."
    return (
        f"{run.out_dir}/state.pt is of step {run.saved:,} and whole; go on from it with a lower --learning_rate and "
        "--accept_changes=learning_rate."
    )


def save(run: Run, name: str = "state.pt") -> bool:
    """state.pt, or another file of its kind, by the first process. A full disk is said and ends no run before its last
    step: False then, in all processes."""
    check_sound(run)
    file, written = run.out_dir / name, True
    try:
        if run.rank == 0:
            settings = asdict(run.asked) | {"init_from": run.origin}
            checkpoint.save_state(file, run.model, run.optimizer, run.scaler, asdict(run.p), settings, run.facts)
    except OSError as error:
        earlier = "the previous one is kept" if file.is_file() else "there is none yet"
        run.say(f"!! {file} could not be written ({error}); {earlier}")
        written = False
    written = broadcast_from_rank0(written, run.world)
    if written and name == "state.pt":
        run.saved = run.p.step
    return written


if __name__ == "__main__":
    run_main(main)
