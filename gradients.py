"""
A step's forward and backward, however the rows are split, compiled or replayed; and the rehearsal before the first one.

    rehearse(run)                           # out of memory, no compiler: mended before anything is written
    batches = micro_batches(run, step)
    for batch in batches:                   # gradients add up in .grad
        loss += forward_backward(run, batch, last=batch is batches[-1])

`run` is always train.py's Run. Whichever way is taken, the numbers differ by rounding alone (and what dropout drops).
"""

import time
from contextlib import nullcontext
from functools import partial

from lib.device import GPU_WAITS, Replay, launch_share, undo_compile
from lib.settings import UserError

import torch

# ----------------------------------------------------------------------------------------------------------------------
# forward and backward


def micro_batches(run, step: int) -> list[range]:
    """The row numbers of this process's share of a step, micro-batch by micro-batch; the last may be shorter."""
    begin = step * run.s.global_batch_size + run.rank * run.rows_here
    end = begin + run.rows_here
    return [range(a, min(a + run.micro, end)) for a in range(begin, end, run.micro)]


def forward_backward(run, batch: range, last: bool) -> torch.Tensor:
    """Add one micro-batch's gradients to .grad and return its loss, detached; both weighted by its share of the tokens
    that the step learns."""
    rows = run.rows.batch(batch, run.device)
    seed_dropout(run, batch.start)
    if run.replay and len(batch) == run.micro:  # a whole micro-batch of text, as recorded: its share is always the same
        return run.replay(*rows)
    # the loss of a step is a mean over what it learns; DDP divides by the number of processes
    first = run.p.step * run.s.global_batch_size
    whole = run.rows.weight(range(first, first + run.s.global_batch_size))
    share = run.world * run.rows.weight(batch) / whole
    # DDP averages gradients over the processes; before each forward it must know whether to wait for more
    with nullcontext() if run.world == 1 or last else run.trained.no_sync():
        return loss_and_gradients(run, share, *rows)


def loss_and_gradients(run, share: float, *rows: torch.Tensor) -> torch.Tensor:
    """Forward and backward of rows on the device."""
    with run.autocast():
        _, loss = run.trained(*rows, loss_only=True)
    loss = loss * share
    run.scaler.scale(loss).backward()
    return loss.detach()


def seed_dropout(run, row: int):
    """What a forward pass drops is a function of the seed and its first row, so that a resume drops the same."""
    if run.s.dropout:
        torch.manual_seed(run.s.seed + row)


# ----------------------------------------------------------------------------------------------------------------------
# the rehearsal


def rehearse(run):
    """Try forward and backward before the first evaluation, and discard the gradients. Where memory is too small or
    compiling fails, that shows here, and is mended with a message."""
    started = time.perf_counter()
    new_groups = [] if run.resumed else run.optimizer.param_groups
    while True:
        batches = micro_batches(run, run.p.step)
        try:
            # room for what the optimizer keeps from its first step on: AdamW two averages, Muon one. On a CPU it costs
            # nothing yet
            kept = [torch.empty_like(p) for g in new_groups for p in g["params"] for _ in range(1 + ("betas" in g))]
            # the first two, since the second runs beside the gradients of the first; the last may be shorter
            for batch in batches[:2] + batches[2:][-1:]:
                forward_backward(run, batch, last=True)
            if run.compiled:
                compare_with_eager(run, batches[0])
            break
        except Exception as error:
            recover(run, error)
        kept = None
        run.optimizer.zero_grad(set_to_none=True)
        if run.device.startswith("cuda"):
            torch.cuda.empty_cache()
    run.optimizer.zero_grad(set_to_none=True)
    if can_replay(run):
        record(run)
    del kept
    run.p.compile = run.compiled
    if run.device == "cpu":
        run.p.cpu_dtype = str(run.dtype)[6:]
    run.p.seconds += time.perf_counter() - started
    if run.compiled:
        run.say(f"         compiled and tried in {time.perf_counter() - started:.0f} s")


def compare_with_eager(run, batch: range):
    """RuntimeError where the compiled blocks have other gradients than the same blocks as they are written: a compiler
    may be wrong on one processor and right on all others."""
    compiled = gradient_norms(run, batch)
    with torch.compiler.set_stance("force_eager"):
        eager = gradient_norms(run, batch)
    if not alike(compiled, eager):
        raise RuntimeError("the compiled blocks have other gradients than the plain ones on this machine")


def gradient_norms(run, batch: range) -> torch.Tensor:
    """The norm of every parameter's gradient for this micro-batch alone."""
    run.optimizer.zero_grad(set_to_none=run.replay is None)
    forward_backward(run, batch, last=True)
    return torch.stack([p.grad.norm() for p in run.model.parameters()])


def alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether norms of gradients are the same but for rounding, which moves one by a few percent in bfloat16; a wrong
    kernel moves it by all of it."""
    both_overflow = ~torch.isfinite(found) & ~torch.isfinite(expected)  # float16, whose scale is still to be found
    close = (found - expected).abs() <= 0.2 * expected + 1e-6 * expected.nan_to_num(0, 0, 0).max()
    return bool((close | both_overflow).all())


def can_replay(run) -> bool:
    """Whether a CUDA graph may be tried: conversations change in shape, several processes exchange gradients on the
    way, and --compile=off asks for the plain way."""
    return run.device.startswith("cuda") and run.world == 1 and not run.chat and run.s.compile != "off"


def record(run):
    """Record forward and backward of a micro-batch as a CUDA graph (run.replay) where the GPU would otherwise wait for
    Python. Without it where memory does not suffice, or where it has other gradients for rows that it was not recorded
    with. UserError where it cannot be recorded, which can leave the GPU's random numbers unusable."""
    (batch, *_), (other, *_) = (micro_batches(run, step) for step in (run.p.step, run.p.step + 1))
    rows, params = run.rows.batch(batch, run.device), list(run.model.parameters())
    share = len(batch) / run.s.global_batch_size
    launching = launch_share(partial(forward_backward, run, batch, True))
    if launching < GPU_WAITS:
        run.optimizer.zero_grad(set_to_none=True)
        return run.say(f"replay   off: Python takes {launching:.0%} of a micro-batch's time to start its kernels")
    reason = ""
    try:
        expected = gradient_norms(run, other)
        for p in params:  # a replay adds to these
            p.grad = torch.zeros_like(p)
        run.replay = Replay(partial(loss_and_gradients, run, share), *rows)
        if not alike(gradient_norms(run, other), expected):
            reason = "it has other gradients"
        with run.autocast():  # check_sound() does this while the graph keeps its memory: both must fit
            torch.autograd.grad(run.model(*rows, loss_only=True)[1], params)
    except RuntimeError as error:
        if not out_of_memory(error):
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"no CUDA graph could be recorded ({text}). Train without: --compile=off") from None
        reason = "there is not enough memory for it"
    if reason:
        run.replay = None
    run.optimizer.zero_grad(set_to_none=run.replay is None)
    if reason:
        torch.cuda.empty_cache()
        return run.say(f"replay   off: {reason}")
    run.say(f"replay   on: Python takes {launching:.0%} of a micro-batch's time to start its kernels")


def out_of_memory(error: Exception) -> bool:
    """Also where a library has its own words for it."""
    phrases = "out of memory", "not enough memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in phrases)


def recover(run, error: Exception):
    """Halve the micro-batch after running out of memory; go on without compiling where it was not asked for. Any other
    error is raised again, and so is every error of one process among several."""
    s = run.s
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    memory = out_of_memory(error)
    if memory and run.micro > 1 and run.world == 1:
        run.micro //= 2
        run.say(f"!! out of memory: micro-batch {run.micro} from here on, still {s.global_batch_size} rows a step")
    elif memory:
        smaller = "--micro_batch_size" if run.micro > 1 else "--block_size (of a new run), or a smaller model"
        raise UserError(f"out of memory ({text}). Try a smaller {smaller}.") from None
    elif run.compiled and s.compile == "auto" and run.world == 1:
        run.compiled = False
        undo_compile(run.model)
        run.say(f"!! compiling failed ({type(error).__name__}: {text}); going on without")
    elif run.compiled:
        raise UserError(f"compiling failed here ({text}). Train without: --compile=off") from None
    else:
        raise error
