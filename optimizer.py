"""
The optimizers, AdamW and Muon, and the learning rate at every step.

    optimizer = make_optimizer(model, "muon", learning_rate=4e-3, weight_decay=0.1, betas=(0.9, 0.95))
    lr = learning_rate_at(step, s, decay_iters)

`s` is always train.py's Settings.
"""

import math

from lib.settings import UserError

import torch


def make_optimizer(model, kind: str, learning_rate: float, weight_decay: float, betas: tuple[float, float]):
    """AdamW for all; or, of kind "muon", for the embedding (an untied head, too) and the norms alone, and Muon for the
    blocks' matrices. Decay on matrices and none on the norm weights; every parameter in exactly one group."""
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    norms = [p for p in model.parameters() if p.dim() < 2]
    of_blocks = [p for name, p in matrices.items() if kind == "muon" and name.startswith("layers.")]
    others = [p for name, p in matrices.items() if kind != "muon" or not name.startswith("layers.")]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]
    fused = model.device.type in ("cpu", "cuda")  # one kernel for all; on a CPU three to six times the plain one
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)
    return Together(Muon(of_blocks, learning_rate, weight_decay), adamw) if of_blocks else adamw


class Muon(torch.optim.Optimizer):
    """Each matrix moves by its momentum made orthogonal: in all directions but the weakest by about the same length
    (https://kellerjordan.github.io/posts/muon/). The numbers of torch.optim.Muon, but matrices of one shape are made
    orthogonal together, and on a CPU in fp32, where bfloat16 may be the slower one. Every process computes the whole
    update, and the weights stay equal where all have the same kind of processor.

    The update is scaled to the size that AdamW's would have, so that one learning rate serves both
    (https://arxiv.org/abs/2502.16982, section 2.2).
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            of_shape = {}
            for p in group["params"]:
                of_shape.setdefault(p.shape, []).append(p)
            for shape, params in of_shape.items():
                updates = []
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    average = self.state[p]["momentum_buffer"]
                    average.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(average, group["momentum"]))  # Nesterov's: one step ahead
                updates = orthogonal(torch.stack(updates)).to(p.dtype)
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update, alpha=group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(x):  # (matrices, rows, columns) -> the same
    """About U V^T of each matrix U S V^T: singular values of about 0.7 to 1.2, but for those below 1/500 of the norm.
    Five steps of a Newton-Schulz iteration, whose polynomial was chosen to lift small singular values fast."""
    x = x if x.device.type == "cpu" else x.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        quintic = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, quintic, x, beta=3.4445)
    return x.mT if tall else x


class Together:
    """Several optimizers of different parameters as one, as far as train.py, GradScaler and state.pt are concerned."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        """As of one optimizer: the parameters are numbered through all parts."""
        state, groups, first = {}, [], 0
        for part in self.parts:
            of_part = part.state_dict()
            state |= {first + i: entry for i, entry in of_part["state"].items()}
            groups += [group | {"params": [first + i for i in group["params"]]} for group in of_part["param_groups"]]
            first += sum(len(group["params"]) for group in part.param_groups)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict):
        groups, first = list(state["param_groups"]), 0
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            numbers = [i for group in own for i in group["params"]]
            own = [group | {"params": [i - first for i in group["params"]]} for group in own]
            entries = {i - first: state["state"][i] for i in numbers if i in state["state"]}
            part.load_state_dict({"state": entries, "param_groups": own})
            first += len(numbers)


# ----------------------------------------------------------------------------------------------------------------------
# the schedule


def learning_rate_at(step: int, s, decay_iters: int) -> float:
    """The learning rate of step 0, 1, ...: (1) after the schedule's end min_lr, (2) warmup, (3) in between."""
    if step >= decay_iters and s.lr_schedule != "constant":
        return s.min_lr
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    if s.lr_schedule == "constant":
        return s.learning_rate
    if s.lr_schedule == "cosine":
        progress = (step - s.warmup_iters) / (decay_iters - s.warmup_iters)
        return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)
    decay = decay_iters - decay_begins(s, decay_iters)  # wsd
    return s.min_lr + min(1.0, (decay_iters - step) / decay) * (s.learning_rate - s.min_lr)


def decay_begins(s, decay_iters: int) -> int:
    """wsd: the step at which the stable phase ends."""
    return decay_iters - max(1, round(s.decay_fraction * decay_iters))


def noise_ends(s, decay_iters: int) -> float:
    """The first step whose inputs have no noise; inf where the noise has no end. It is counted from the end, as
    decay_begins() counts, so that noise_until=0.8 fits decay_fraction=0.2: 1 - 0.8 alone is not 0.2 to the last bit."""
    return decay_iters - round(round(1 - s.noise_until, 9) * decay_iters) if s.noise_until < 1 else math.inf


def check_schedule(s, decay_iters: int) -> list[str]:
    """Warnings about a schedule that makes little sense; UserError where noise ends too early."""
    if s.lr_schedule == "wsd" and s.token_noise and noise_ends(s, decay_iters) < decay_begins(s, decay_iters):
        raise UserError(
            f"--noise_until={s.noise_until:g} ends the noise before the decay begins (--decay_fraction="
            f"{s.decay_fraction:g}), so the run could not be prolonged from there. Use a larger --noise_until."
        )
    warnings = []
    end = min(s.max_iters, decay_iters) if s.lr_schedule != "constant" else s.max_iters
    if s.warmup_iters >= end > 0:
        warnings.append(f"--warmup_iters={s.warmup_iters}: at step {end:,}, the last, the rate has only risen")
    elif s.lr_schedule == "wsd" and s.warmup_iters > decay_begins(s, decay_iters) and end > 0:
        warnings.append(
            f"--warmup_iters={s.warmup_iters}: by its end the decay has begun (--decay_fraction={s.decay_fraction:g} "
            f"of {decay_iters:,} steps), and the rate drops at once"
        )
    if s.min_lr > s.learning_rate and s.lr_schedule != "constant":
        warnings.append(f"--min_lr={s.min_lr:g} is above --learning_rate={s.learning_rate:g}: the rate will rise")
    return warnings
