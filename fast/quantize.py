"""
int8 weights: one byte per weight instead of two.

    from fast.quantize import quantize
    quantize(model)                                  # in place, for inference only; sample.py --quantize=int8

Generating a token reads every weight once and does little else, so half the bytes take half the time: in decode.c,
which reads the int8 numbers as they are. Each matrix becomes int8 numbers with one scale per row, and its module is
replaced by one that converts the matrix before each product, which saves memory but no time.

Shapes: N rows, C columns of a matrix; B batch, T time, V vocabulary.
"""

from lib.settings import UserError

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SmolLM2


def int8_rows(weight):  # (N, C) -> int8 (N, C) and bf16 (N,): weight is about int8 * scale, row by row
    """Round each row to 127 steps on either side of 0. The scale is rounded to bf16 first, and upwards: then its
    rounding adds no error, and no weight needs more than 127 steps."""
    exact = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    scale = exact.to(torch.bfloat16)
    scale = torch.where(scale.float() < exact, scale * (1 + 2**-7), scale)  # one step of bf16 up
    return (weight.float() / scale.float()[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """x @ weight.T with weight (N, C) int8 and scale (N,) bf16. Plain: nn.Linear(bias=False)."""

    def __init__(self, weight, scale):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):  # (..., C) -> (..., N)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Int8Embedding(nn.Module):
    """Rows of weight (V, C) int8 times scale (V,) bf16. Plain: nn.Embedding."""

    def __init__(self, weight, scale):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, ids):  # (B, T) -> (B, T, C)
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]


@torch.no_grad()
def quantize(model: SmolLM2, kind: str = "int8") -> SmolLM2:
    """Convert every matrix of `model` to int8, in place; return it. A tied head shares the embedding's numbers."""
    if kind != "int8":
        raise UserError(f"quantize={kind!r}: only 'int8' is implemented.")
    model.to(torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(*int8_rows(child.weight)))
    embedding = Int8Embedding(*int8_rows(model.embed_tokens.weight))
    if model.lm_head is None:
        model.lm_head = Int8Linear(embedding.weight, embedding.scale)
        model.lm_head.weight = embedding.weight  # one parameter, counted once
    model.embed_tokens = embedding
    return model
