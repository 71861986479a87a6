"""
The same mathematics, sooner. What has a plain twin names it, and tests hold the two together.

A training step or a long prompt spends its time in matrix products and in moving what is around them. swiglu and
cross_entropy_in_pieces keep large intermediate tensors out of memory; worth_widening says when a bfloat16 or int8 model
is better computed in fp32.

Shapes: B batch, T time, C hidden, V vocabulary, N = B * T.
"""

from lib.device import bfloat16_speed

import torch
import torch.nn.functional as F

WIDEN_FROM = 64  # from this many tokens on, layers run in fp32 where its products are faster (docs/performance.md)
# tokens whose logits are held at once. On a CPU 512 are no faster, and take 50 MB more at a vocabulary of 49,152; on a
# GPU, where 512 were slower than 4,096, 2,048 take a gigabyte there
LOSS_ROWS = {"cpu": 256, "cuda": 2048}
OTHER_LOSS_ROWS = 512  # as on a GPU before it was measured there
SOFTMAX_ROWS = 32  # of these, how many go through the softmax at a time on a CPU: 6 MB at a vocabulary of 49,152


# ----------------------------------------------------------------------------------------------------------------------
# SwiGLU


def swiglu(gate, up):
    """silu(gate) * up, of one shape. Plain twin: that formula, which this is while gradients are wanted.

    Without gradients it is computed in place: writing to fresh memory takes longer than the arithmetic.
    """
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


# ----------------------------------------------------------------------------------------------------------------------
# products of bfloat16 on a CPU


def worth_widening(x) -> bool:
    """Whether to run the layers on x (B, T, C) in fp32 on a CPU, though the weights are bfloat16 or int8: where its
    products of fp32 are the faster ones, there are enough tokens to pay for the widening, and no gradients."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.size(0) * x.size(1) < WIDEN_FROM:
        return False
    return bfloat16_speed() < 0.8  # where the two are close, no two processes should decide differently


# ----------------------------------------------------------------------------------------------------------------------
# the loss


def cross_entropy_in_pieces(x, weight, targets):
    """Mean cross entropy of softmax(x @ weight.T) against targets, as a fp32 scalar in nats; -100 is not counted.

    x (B, T, C), weight (V, C), targets (B, T). Plain twin: F.cross_entropy((x @ weight.T).float(), targets).
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        # inside forward() gradients are always off, so whether they are wanted is asked here
        return CrossEntropyInPieces.apply(x.flatten(0, 1), weight, targets.flatten(), dtype, torch.is_grad_enabled())


def add_loss(total, logits, target, counted, want_grad: bool):  # (), (N, V), (N, 1), (N, 1)
    """Add the loss of the counted rows to `total`; where the gradient is wanted, softmax - one_hot replaces the logits
    of every row. In fp32; on a CPU as many rows at a time as stay in its cache."""
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
    """What add_loss does, in half as many trips of the logits through the GPU's memory."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    chosen = log_p.gather(1, target)
    total -= (chosen * counted).sum()
    if want_grad:  # the probabilities, and p - 1 for the target, from its exact p
        torch.exp(log_p, out=logits)
        logits.scatter_(1, target, (chosen.exp() - 1).to(logits.dtype))


class CrossEntropyInPieces(torch.autograd.Function):
    """The loss of some of the tokens at a time (LOSS_ROWS), and its gradient in the same pass.

    At a vocabulary of 49,152 the logits of 1,024 tokens are 200 MB in fp32, and the plain way holds them, their
    softmax and their gradient at once. Here the gradient of each piece is taken while its logits are at hand, and is
    written in their place. So nothing of size V outlives a piece, and backward is one multiplication. Products run in
    `dtype` (what autocast would choose); everything after them, and the sum of the weight's gradient, in fp32.

    The gradient kept is that of the sum. The division by the count waits for backward, where it meets the factor of a
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
        kind = h.device.type
        size, add = LOSS_ROWS.get(kind, OTHER_LOSS_ROWS), add_loss_on_cuda if kind == "cuda" else add_loss
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
