"""
Faster equivalents of plain PyTorch code. Each names its plain version; tests/test_ops.py checks that they agree.

A training step or a long prompt spends its time in matrix products and in moving what is around them through memory.
cross_entropy_in_pieces never stores all logits; run_widened computes a bf16 or int8 model in fp32 if that is faster.

Shapes: B batch, T time, C hidden, V vocabulary, N = B * T.
"""

from types import SimpleNamespace

from lib.device import bfloat16_speed

import torch

from model import Block, SmolLM2

WIDEN_FROM = 64  # from this many tokens on, blocks run in fp32 if its products are faster (docs/experiments.md)
# Tokens whose logits are stored at once. On a CPU 512 are no faster, and take 50 MB more at a vocabulary of 49,152; on
# a GPU 4,096 were faster than 512, and 2,048 take a gigabyte there.
LOSS_ROWS = {"cpu": 256, "cuda": 2048, "mps": 512}
SOFTMAX_ROWS = 32  # of these, how many go through the softmax at once on a CPU: 6 MB at a vocabulary of 49,152


def worth_widening(x) -> bool:
    """Decide whether to run the blocks on x (B, T, C) in fp32 though the weights are bf16 or int8: if the CPU's fp32
    products are faster, there are enough tokens to pay for converting the weights, and no gradients are needed."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.size(0) * x.size(1) < WIDEN_FROM:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return bfloat16_speed() < 0.8  # if the two are close, no two processes should decide differently


def run_widened(model: SmolLM2, x, *rest):  # (B, T, C) bf16 -> (B, T, C) bf16. Plain: model.run_blocks(x, *rest)
    return SmolLM2.run_blocks(SimpleNamespace(layers=widened_layers(model)), x.float(), *rest).to(x.dtype)


def widened_layers(model: SmolLM2):
    """Yield the layers in fp32: a single block, which takes the weights of each in turn and so stays in the processor's
    cache (at 135M: 14 MB)."""
    wide = Block(model.config).float().requires_grad_(False).eval()
    for layer in model.layers:
        for name, ours in wide.named_parameters():
            ours.copy_(layer.get_parameter(name))
            module = layer.get_submodule(name.rpartition(".")[0])
            if hasattr(module, "scale"):  # int8
                ours.mul_(module.scale[:, None])
        yield wide


def cross_entropy_in_pieces(x, weight, targets):
    """Return the mean cross entropy of softmax(x @ weight.T) against targets, a fp32 scalar in nats; -100 is excluded.

    x (B, T, C), weight (V, C), targets (B, T). Plain: F.cross_entropy((x @ weight.T).float(), targets).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        # gradients are always off inside forward(), so it is told here whether they are needed
        return CrossEntropyInPieces.apply(x.flatten(0, 1), weight, targets.flatten(), dtype, torch.is_grad_enabled())


def add_loss(total, logits, target, counted, want_grad: bool):  # (), (N, V), (N, 1), (N, 1)
    """Add the loss of the counted rows to `total`; if the gradient is wanted, replace the logits by softmax - one_hot.
    In fp32; on a CPU with as many rows at a time as stay in its cache."""
    size = SOFTMAX_ROWS if logits.device.type == "cpu" else len(logits)
    for a in range(0, len(logits), size):
        rows = slice(a, a + size)
        exact = logits[rows].float()
        largest = exact.amax(-1, keepdim=True)
        chosen = exact.gather(1, target[rows]) - largest
        exact.sub_(largest).exp_()
        z = exact.sum(-1, keepdim=True)
        total += ((z.log() - chosen) * counted[rows]).sum()
        if want_grad:
            exact.mul_(1 / z)
            logits[rows] = exact.scatter_add_(1, target[rows], -torch.ones_like(z))


def add_loss_on_cuda(total, logits, target, counted, want_grad: bool):  # (), (N, V), (N, 1), (N, 1)
    """Do what add_loss does, in half as many trips of the logits through the GPU's memory."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    chosen = log_p.gather(1, target)
    total -= (chosen * counted).sum()
    if want_grad:  # the probabilities, and p - 1 for the target, from its exact p
        torch.exp(log_p, out=logits)
        logits.scatter_(1, target, (chosen.exp() - 1).to(logits.dtype))


class CrossEntropyInPieces(torch.autograd.Function):
    """Compute the loss of LOSS_ROWS tokens at a time, and its gradient in the same pass.

    At a vocabulary of 49,152 the logits of 1,024 tokens take 200 MB in fp32, and the plain way stores them, their
    softmax and their gradient at once. Here the gradient of each piece overwrites its logits, nothing of size V
    outlives a piece, and backward is one multiplication. Products run in `dtype` (autocast's choice); everything after
    them, and the sum of the weight's gradient, in fp32.

    The stored gradient is that of the sum. The division by the count waits for backward, where it meets the factor of a
    GradScaler: a probability divided by the count here would be too small for float16.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, grad_enabled: bool):  # (N, C), (V, C), (N,) -> fp32 scalar
        want_grad = grad_enabled and (x.requires_grad or weight.requires_grad)
        h, w = x.to(dtype), weight.to(dtype)
        counted = (targets != -100)[:, None]
        count = counted.sum()
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(h) if want_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_grad else None
        size, add = LOSS_ROWS[h.device.type], add_loss_on_cuda if h.device.type == "cuda" else add_loss
        for a in range(0, len(h), size):
            piece = slice(a, a + size)
            logits = h[piece] @ w.T  # (size, V)
            target = targets[piece].clamp(min=0)[:, None]  # -100 reads class 0 and is not counted
            add(total, logits, target, counted[piece], want_grad)
            if want_grad:
                grad_x[piece] = (logits @ w).mul_(counted[piece])
                h_counted = h[piece] * counted[piece]
                if dtype == torch.float32:
                    torch.addmm(grad_weight, logits.T, h_counted, out=grad_weight)  # no second tensor of that size
                else:
                    grad_weight += logits.T @ h_counted
        ctx.save_for_backward(grad_x, grad_weight, count)
        ctx.dtypes = x.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight, count = ctx.saved_tensors
        grad = grad / count
        # in place, since the second is as large as the embedding; a second backward therefore raises an error
        return grad_x.mul_(grad).to(ctx.dtypes[0]), grad_weight.mul_(grad).to(ctx.dtypes[1]), None, None, None
