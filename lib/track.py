"""
What a run reports: lines on the terminal, and log.jsonl, with a JSON line for each log step, evaluation, sample and
changed setting.

    log = Log(Path("out/run/log.jsonl"), enabled=rank == 0)
    log.write(step=10, loss=3.2)
"""

import json
import math
from contextlib import suppress
from pathlib import Path

from lib.files import atomic
from lib.settings import print_safe


class Log:
    def __init__(self, path: Path, enabled: bool = True):
        self.path, self.enabled = path, enabled

    def drop_after(self, step: int, **last: int):
        """Drop what a resume at `step` is about to repeat: lines after `step`, and lines that hold a key of `last`
        and come after last[key]."""
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.is_file() else ():
            with suppress(ValueError, KeyError, TypeError):  # a kill may leave half a line
                entry = json.loads(line)
                if entry["step"] <= min([step, *(last[key] for key in last if key in entry)]):
                    kept.append(line + "\n")
        with atomic(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def write(self, **entry):
        """Append a line. A full disk does not end the run."""
        if not self.enabled:
            return
        for key, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[key] = None  # JSON has no NaN
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as error:
            print_safe(f"!! {self.path} could not be written ({error}); training continues")


def report_step(loss, lr, norm, tokens: int, flops: int, peak: float, before, p, s, say, log: Log):
    """Print and log a step, with the speed since the line before, when train.py's Progress was `before`. tokens: read
    since then; flops: operations per token; peak: operations per second of all devices, or 0 if unknown."""
    rate = tokens / (p.seconds - before.seconds)
    mfu = flops * rate / peak if peak else None
    seconds = (p.seconds - before.seconds) / (p.step - before.step)
    eta = int((s.max_iters - p.step) * seconds)
    say(
        f"step {p.step:>6} | loss {loss:.4f} | lr {lr:.2e} | grad {norm:.2f} | {1000 * seconds:,.0f} ms | "
        f"{rate:,.0f} tok/s | mfu {f'{mfu:.1%}' if mfu else 'n/a'} | eta {eta // 60}m{eta % 60:02d}s"
    )
    speed = dict(tok_per_s=round(rate, 1), mfu=mfu and round(mfu, 4), seconds=round(p.seconds, 1))
    log.write(step=p.step, loss=loss, lr=lr, grad_norm=norm, **speed)


def report_evaluation(loss: float, bpb: float, best: bool, p, kept_step: int, say, log: Log):
    """Print and log an evaluation, and warn of overfitting. loss: nats per token; bpb: bits per byte of text."""
    perplexity = math.exp(min(loss, 99))
    gap = "" if p.recent_loss is None else f" | train {p.recent_loss:.4f} | gap {loss - p.recent_loss:+.4f}"
    gap += " | best so far" if best else ""
    say(f"eval {p.step:>6} | val {loss:.4f} | ppl {perplexity:.2f} | {bpb:.4f} bits per byte{gap}")
    if p.since_best >= 3 and kept_step >= 0:
        say(f"     overfitting since step {p.best_step:,}; the model of step {kept_step:,} is kept")
    figures = dict(val_loss=loss, val_ppl=perplexity, val_bpb=bpb, train_loss=p.recent_loss)
    log.write(step=p.step, **figures, best=best, seconds=round(p.seconds, 1))
