"""
Faster equivalents of what model.py computes. This folder can be deleted: everything still works, slower.

    import fast
    fast.speed_up(model)        # in place; checkpoint.load() and train.py do it

The subclasses here replace some methods of model.py's classes. speed_up() gives a model these classes, in place: the
weights and their names stay as they are. If model.py was changed and fast/ was not, model.py's version is used.
"""

from functools import cache

import torch
import torch.nn.functional as F

from fast import ops
from fast.decode import MAX_ROWS, Decoder, plain_step, reason_against, trusted, warn_once
from fast.graphs import GpuDecoder
from model import MLP, KVCache, SmolLM2, SmolLM2Config


class FastMLP(MLP):
    def forward(self, x):
        """Compute SwiGLU in place if no gradients are needed: writing to fresh memory takes longer than the sums."""
        if torch.is_grad_enabled():
            return super().forward(x)
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class FastSmolLM2(SmolLM2):
    def run_blocks(self, x, *rest):
        if self.training or not ops.worth_widening(x):
            return super().run_blocks(x, *rest)
        return ops.run_widened(self, x, *rest)

    def head_loss(self, x, targets):
        weight = (self.lm_head or self.embed_tokens).weight
        if "loss" in changed() or not weight.is_floating_point():  # int8 numbers mean nothing without their scales
            return super().head_loss(x, targets)
        return ops.cross_entropy_in_pieces(x, weight, targets)

    def make_decoder(self, rows: int):
        """Return what computes the next token of so many texts: a CUDA graph on a GPU, decode.c on a CPU, or None."""
        if self.device.type == "cuda":
            return GpuDecoder(self)
        if self.device.type != "cpu" or rows > MAX_ROWS or not trusted.get(self, True) or "architecture" in changed():
            return None
        if reason := reason_against(self):
            return warn_once(f"note: using model.py instead of decode.c (slower): {reason}")
        return Decoder(self)


@cache
def changed() -> set[str]:
    """Return what model.py computes differently, tried on a tiny model: an architecture or a loss that was edited there
    must not be replaced by the old one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = SmolLM2(SmolLM2Config(32, 8, 16, 1, 2, 1, 4, 16, initializer_range=1.0))
        x, targets, mlp = torch.randn(1, 6, 8), torch.randint(0, 32, (1, 6)), plain.layers[0].mlp
        cache, tokens = KVCache(plain.config, 1), torch.tensor([3])
        ours = {
            "MLP": lambda: FastMLP.forward(mlp, x) - mlp(x),
            "loss": lambda: (
                ops.cross_entropy_in_pieces(x, plain.embed_tokens.weight, targets) - plain.head_loss(x, targets)
            ),
        }
        if not reason_against(plain):
            plain(targets, cache=cache)
            decode = Decoder(plain, check=False)
            ours["architecture"] = lambda: plain_step(plain, tokens, cache, 6) - decode(tokens, cache, 6)
        found = set()
        for name, difference in ours.items():
            try:
                same = bool(difference().abs().max() < 1e-4)
            except (AttributeError, RuntimeError):
                same = False
            if not same:
                found.add(name)
                warn_once(f"note: the {name} in model.py is not the one in fast/, so model.py's is used (slower)")
    return found


def speed_up(model: SmolLM2) -> SmolLM2:
    """Replace slow methods of a model, in place; return it. Calling it again changes nothing."""
    model.__class__ = FastSmolLM2
    for layer in model.layers if "MLP" not in changed() else ():
        layer.mlp.__class__ = FastMLP
    return model
