"""
The optimizers, AdamW and Muon, and the learning rate at each step.

    optimizers = make_optimizers(model, "muon", learning_rate=4e-3, weight_decay=0.1, betas=(0.9, 0.95))
    lr = learning_rate_at(step, s)                      # s: train.py's Settings
"""

import math

import torch


def make_optimizers(
    model, kind: str, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Return [AdamW] for all parameters, or [Muon, AdamW]: Muon for the blocks' matrices, AdamW for the embedding, an
    untied head and the norms. Matrices have weight decay, norms have none."""
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    norms = [p for p in model.parameters() if p.dim() < 2]
    in_muon = {name: p for name, p in matrices.items() if kind == "muon" and name.startswith("layers.")}
    others = [p for name, p in matrices.items() if name not in in_muon]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    fused = model.device.type in ("cpu", "cuda")  # one kernel for all; on a CPU three to six times as fast
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)
    return [Muon(in_muon.values(), learning_rate, weight_decay), adamw] if in_muon else [adamw]


class Muon(torch.optim.Optimizer):
    """Moves each matrix by its momentum made orthogonal, so by about the same amount in every direction
    (https://kellerjordan.github.io/posts/muon/).

    Equals torch.optim.Muon, but orthogonalizes matrices of one shape together, and in fp32 on a CPU, where bfloat16 may
    be slower. Every process computes all updates, so their weights stay equal if their processors are of one kind.
    The update is scaled to the size of AdamW's, so that both share a learning rate (https://arxiv.org/abs/2502.16982,
    section 2.2).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    average = self.state[p]["momentum_buffer"]
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]))  # Nesterov's: one step ahead
                updates = orthogonalize(torch.stack(updates)).to(params[0].dtype)
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalize(x):  # (matrices, rows, columns) -> the same
    """Replace each matrix U S V^T by about U V^T: singular values become 0.7 to 1.2, except those below 1/500 of the
    norm. Five steps of a Newton-Schulz iteration, with coefficients that lift small singular values fast."""
    x = x if x.device.type == "cpu" else x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    return x.mT if tall else x


# ----------------------------------------------------------------------------------------------------------------------
# the schedule


def learning_rate_at(step: int, s) -> float:
    """Return the learning rate of step 0, 1, ... of a schedule that reaches min_lr at step lr_decay_iters."""
    # 1) after the end of the schedule: min_lr
    if step >= s.lr_decay_iters and s.lr_schedule != "constant":
        return s.min_lr
    # 2) linear warmup
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    # 3) in between: constant, cosine, or wsd (stable, then linear decay)
    if s.lr_schedule == "constant":
        return s.learning_rate
    if s.lr_schedule == "cosine":
        progress = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)
        return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)
    assert s.lr_schedule == "wsd", s.lr_schedule
    decay = s.lr_decay_iters - decay_begins(s)
    return s.min_lr + min(1.0, (s.lr_decay_iters - step) / decay) * (s.learning_rate - s.min_lr)


def decay_begins(s) -> int:
    """Return the step at which the decay of a wsd schedule begins."""
    return s.lr_decay_iters - max(1, round(s.decay_fraction * s.lr_decay_iters))


def noise_ends(s) -> float:
    """Return the first step whose inputs have no noise, or inf. Counted from the end, as decay_begins() counts, so that
    noise_until=0.8 fits decay_fraction=0.2: 1 - 0.8 alone is not 0.2 to the last bit."""
    without = round(round(1 - s.noise_until, 9) * s.lr_decay_iters)
    return s.lr_decay_iters - without if s.noise_until < 1 else math.inf


def check_schedule(s) -> list[str]:
    """Return warnings about a schedule that makes little sense."""
    warnings = []
    if s.min_lr > s.learning_rate and s.lr_schedule != "constant":
        warnings.append(f"--min_lr={s.min_lr:g} is above --learning_rate={s.learning_rate:g}: the rate rises to it")
    if s.warmup_iters > s.max_iters > 0:
        warnings.append(f"--warmup_iters={s.warmup_iters}: a run of {s.max_iters:,} steps never reaches the full rate")
    if s.lr_decay_iters < s.max_iters and s.lr_schedule != "constant":
        rest = f"the learning rate is {s.min_lr:g} from step {s.lr_decay_iters:,} on"
        warnings.append(f"{rest}; --lr_decay_iters={s.max_iters} stretches the schedule")
    return warnings
