"""
SmolLM2 in plain PyTorch: the architecture, from RMSNorm to the whole model, with its KV cache.

    python model.py                          # parameter counts of the three released shapes

    from checkpoint import load              # the weights come from a directory; checkpoint.py reads and writes those
    model, tokenizer = load("out/tiny_shakespeare")
    logits, loss = model(input_ids, targets)

SmolLM2 is a Llama: token embedding, then blocks of (RMSNorm, grouped-query attention with rotary positions,
RMSNorm, SwiGLU MLP) around a residual stream, a last RMSNorm, and the embedding once more as the output head.
Weights and settings have Hugging Face's names, so a checkpoint is read and written without renaming.

References
  SmolLM2: https://arxiv.org/abs/2502.02737            Llama: https://arxiv.org/abs/2302.13971
  RoPE:    https://arxiv.org/abs/2104.09864            GQA:   https://arxiv.org/abs/2305.13245
  SwiGLU:  https://arxiv.org/abs/2002.05202            RMSNorm: https://arxiv.org/abs/1910.07467

Shapes: B batch, T time (tokens in this call), S all positions seen so far, C hidden, H query heads, K key/value
heads, D head dim, V vocabulary. G = H / K query heads share a key/value head.
"""

import math
from dataclasses import dataclass, fields
from typing import Annotated

from lib.settings import Positive, UserError, Within, check

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fast import ops

# ----------------------------------------------------------------------------------------------------------------------
# configuration

# far beyond any model of this family, so that a config.json with 10^9 layers is refused and not built
Size, Layers = Annotated[int, Within(least=1, most=2**20)], Annotated[int, Within(least=1, most=1024)]
MAX_WEIGHTS, MAX_TABLE = 2**37, 2**26  # in all; numbers in a table of RoPE


@dataclass
class SmolLM2Config:  # the defaults are SmolLM2-135M
    vocab_size: Size = 49152  # V
    hidden_size: Size = 576  # C
    intermediate_size: Size = 1536  # width of the MLP: 8/3 of C, the SwiGLU paper's choice
    num_hidden_layers: Layers = 30  # deep and narrow: what the paper found best at this size
    num_attention_heads: Size = 9  # H
    num_key_value_heads: Size = 3  # K: three query heads share one key/value head, so the cache is a third
    head_dim: Size = 64  # D
    max_position_embeddings: Size = 8192  # the context: positions the model was trained on
    rope_theta: Positive = 100000.0  # the released weights' base; 10000, the usual one, gives fluent nonsense
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = True  # the head is the embedding; at 135M it would be a fifth of the weights again
    initializer_range: Positive = 1 / 24  # 1 / sqrt(576)
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self):
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        eos = values.pop("eos_token_id")
        check(SmolLM2Config, **values)
        for i in eos if isinstance(eos, list) else [] if eos is None else [eos]:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                raise UserError(f"eos_token_id={eos!r}: expected a token id below {self.vocab_size}, a list, or none.")
        C, H, K, D = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if H % K:
            raise UserError(f"num_attention_heads={H} must be a multiple of num_key_value_heads={K}.")
        if D % 2:
            raise UserError(f"head_dim={D} must be even: RoPE turns the dimensions in pairs.")
        weights = C * (self.vocab_size + self.num_hidden_layers * (2 * (H + K) * D + 3 * self.intermediate_size))
        if weights > MAX_WEIGHTS or self.max_position_embeddings * D > MAX_TABLE:
            positions = f"{self.max_position_embeddings:,} positions of head_dim={D}"
            raise UserError(f"{weights:,} weights, {positions}: beyond any model of this family. A digit too many?")

    @property
    def eos_ids(self) -> set[int]:
        """The ids that end a text. config.json may hold one, a list, or none."""
        eos = self.eos_token_id
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


# The released shapes. All share the vocabulary, the tied head and a context of 8,192.
PRESETS = {
    "135M": SmolLM2Config(),
    "360M": SmolLM2Config(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5,
        initializer_range=0.02,
    ),
    "1.7B": SmolLM2Config(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32,
        rope_theta=130000.0, initializer_range=0.02,
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# normalisation


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside whatever the dtype of x:
    a sum of 576 squares in bf16 would keep two or three digits. F.rms_norm is that formula in one kernel."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # (..., C) -> (..., C)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ----------------------------------------------------------------------------------------------------------------------
# rotary positions


def rope_tables(config: SmolLM2Config):
    """cos and sin of every position's rotation angles, fp32 on the CPU, (max_position_embeddings, D) each.

    Pair i of the D/2 pairs turns by position * theta^(-2i/D) radians: the first pairs turn once in 6 tokens and tell
    neighbours apart, the last ones once in 400,000. The arithmetic, fp32 and in this order, is transformers'.
    On the CPU, since a GPU's power function rounds otherwise: a model has the same tables wherever it is moved.
    """
    D = config.head_dim
    frequency = 1.0 / (config.rope_theta ** (torch.arange(0, D, 2, device="cpu", dtype=torch.float32) / D))
    position = torch.arange(config.max_position_embeddings, device="cpu", dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (positions, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (positions, D): dimension i pairs with i + D/2, "split-half"
    return angle.cos(), angle.sin()


class RotaryEmbedding(nn.Module):
    """Holds the tables of rope_tables in buffers that move with the model, are not saved, and stay fp32."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.config = config
        here = torch.empty(0).device  # what `with torch.device(...)` asks for; tables are cheap, so never on "meta"
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table if here.type == "meta" else table.to(here), persistent=False)

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) would cast these buffers too. bf16 keeps two or three digits of cos and sin, so the
        # slow pairs, which turn by less than a thousandth of a radian a position, would not tell neighbours apart.
        # Let it move the buffers, then compute again what it rounded.
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = (table.to(self.cos.device) for table in rope_tables(self.config))
        return self


def rotate(x, cos, sin):  # x (B, heads, T, D), cos and sin (T, D) fp32 -> (B, heads, T, D) in the dtype of x
    """Turn each pair (x[i], x[i + D/2]) by its angle. The checkpoint's q_proj and k_proj rows are laid out for this
    split-half pairing; Meta's original code and ggml pair neighbours (x[2i], x[2i+1]) and permute those rows."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# attention


def attend(q, k, v, start: int, walls=None):
    """Causal grouped-query attention, softmax(q k^T / sqrt(D)) v: position p sees positions <= p, but for those that
    `walls` hides. By PyTorch's fused kernels, which keep no (T, S) scores.

    q (B, H, T, D) stands at positions start .. start+T-1; k and v (B, K, S, D) are those of positions 0 .. S-1, where
    S = start + T, or all that the cache has room for where start is a tensor and `walls` hides the rest. walls
    (B, 1, T, S), in the dtype of q: 0 where a query sees a key, else -inf. Returns (B, H, T, D).
    """
    T, S = q.size(2), k.size(2)
    # is_causal masks from the top left, right only when nothing is cached; one query alone may see all keys
    mask = walls
    if walls is None and T > 1 and start > 0:
        mask = torch.arange(S, device=q.device) <= torch.arange(start, S, device=q.device)[:, None]  # (T, S)
    if q.size(1) != k.size(1) and not takes_groups(q, mask):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # (B, H, S, D) each
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and mask is None, enable_gqa=grouped)


def walls_where(hidden, x):  # bool (B, 1, T, S) -> the same shape: -inf where hidden, else 0
    """In the dtype that queries have when the activations are x: autocast's, or that of x."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return torch.zeros(hidden.shape, dtype=dtype, device=x.device).masked_fill_(hidden, -math.inf)


def takes_groups(q, mask) -> bool:
    """Whether heads may share keys and values. On CUDA only flash attention lets them, which takes no mask, no fp32 and
    no GPU before Ampere. The memory-efficient kernel takes all those, but no groups; PyTorch would then write out the
    T x S scores, without a word."""
    flash = mask is None and q.dtype != torch.float32
    return q.device.type != "cuda" or (flash and torch.cuda.get_device_properties(q.device).major >= 8)


class Attention(nn.Module):
    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.H * self.D, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.K * self.D, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.K * self.D, bias=False)
        self.o_proj = nn.Linear(self.H * self.D, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache=None, start: int = 0, walls=None):  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.K, self.D).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.K, self.D).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = update_cache(cache, k, v, start)  # (B, K, S, D) each
        y = attend(q, k, v, start, walls)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class KVCache:
    """The keys and values of the positions a model has seen, so that a new token costs one row of work, not S.

    One pair of (B, K, capacity, D) buffers per layer. The capacity doubles as the text grows, up to the context, so a
    50-token answer does not pay for 8,192 positions. Positions are explicit: a caller writes rows start .. start+T-1
    and sees rows 0 .. start+T-1; rows beyond are not read, or (where start is a tensor) read and hidden, so they must
    be finite.
    """

    def __init__(self, config: SmolLM2Config, batch_size: int, device=None, dtype=torch.float32):
        self.config = config
        self.layers = []  # (keys, values) of each layer
        for _ in range(config.num_hidden_layers):
            empty = torch.empty(batch_size, config.num_key_value_heads, 0, config.head_dim, device=device, dtype=dtype)
            self.layers.append((empty, empty.clone()))

    def reserve(self, length: int):
        """Make room for `length` positions. UserError where that is more than the model's context."""
        capacity, limit = self.layers[0][0].size(2), self.config.max_position_embeddings
        if length > limit:
            raise UserError(f"{length} positions asked of a model with a context of {limit}; generate() slides along.")
        if length > capacity:
            extra = min(limit, max(2 * capacity, 64 * math.ceil(length / 64))) - capacity
            self.layers = [tuple(F.pad(buffer, (0, 0, 0, extra)) for buffer in pair) for pair in self.layers]


def update_cache(cache, k, v, start: int | torch.Tensor):
    """Write k, v (B, K, T, D) into a layer's pair of buffers at `start`; return all up to there: (B, K, S, D) each, in
    the dtype of k. Where start is a tensor (1,): all of the buffers, written at that position."""
    if isinstance(start, torch.Tensor):
        for buffer, new in zip(cache, (k, v)):
            buffer.index_copy_(2, start, new.to(buffer.dtype))
        return tuple(buffer.to(k.dtype) for buffer in cache)
    end = start + k.size(2)
    for buffer, new in zip(cache, (k, v)):
        buffer[:, :, start:end] = new
    return tuple(buffer[:, :, :end].to(k.dtype) for buffer in cache)


# ----------------------------------------------------------------------------------------------------------------------
# MLP and block


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The gate decides, feature by feature, how much of `up` passes."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy of the residual stream and adds to the stream itself."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = 0.0  # share of what each half adds that training sets to 0; train.py's --dropout

    def forward(self, x, cos, sin, cache=None, start: int = 0, walls=None):  # (B, T, C) -> (B, T, C)
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cache, start, walls)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


# ----------------------------------------------------------------------------------------------------------------------
# the model


class NoDefaultInit(TorchFunctionMode):
    """Inside `with NoDefaultInit():` new modules keep their memory as it is. PyTorch's own random numbers would only be
    replaced by init_weights() or by a file, and would take longer than either."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]  # as it is
        return function(*args, **(kwargs or {}))


class SmolLM2(nn.Module):
    """The language model. Built with random weights; checkpoint.from_pretrained() reads a directory.

    model = SmolLM2(PRESETS["135M"])
    logits, loss = model(input_ids, targets)
    """

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.config = config
        with NoDefaultInit():
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.rotary = RotaryEmbedding(config)
            self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            tied = config.tie_word_embeddings
            self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with std initializer_range; the two projections that write to the residual stream are divided by
        sqrt(2 * layers), so that its variance does not grow with depth. Norm weights start at one. This is how
        SmolLM2 was begun: nanotron, scaling/parametrization.py, StandardParametrizator."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # a skeleton for weights that are about to be read
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * self.config.num_hidden_layers) ** -0.5 if into_stream else 1.0
            parameter.normal_(0.0, self.config.initializer_range * scale)

    def forward(
        self, input_ids, targets=None, documents=None, cache: KVCache | None = None, start: int | torch.Tensor = 0,
        logits_to_keep: int = 0, loss_only: bool = False,
    ):  # fmt: skip
        """input_ids (B, T) int64 -> logits (B, T, V) and the loss, a fp32 scalar, or None without targets.

        targets (B, T): the token that follows each input; -100 is left out of the mean. The loss is in nats.
        documents (B, T): a number for each token; it sees only tokens of its own number, as if each document had a row
        to itself. Their positions go on through the row: RoPE makes attention a function of distances alone.
        cache, start: input_ids stand at positions start .. start+T-1; what came before is in the cache. For one token
        a row, start may be a tensor (1,), so that one computation serves every position that the cache has room for.
        logits_to_keep: 0 for the logits of all positions, n for those of the last n alone.
        loss_only: return None for the logits, which are then never held all at once: at a large vocabulary they are
        the largest tensor of a training step.
        """
        T, limit, layers, walls = input_ids.size(1), self.config.max_position_embeddings, self.layers, None
        x = self.embed_tokens(input_ids)  # (B, T, C)
        if isinstance(start, torch.Tensor):
            assert T == 1 and cache is not None, "a position in a tensor is for one token and a cache"
            positions = start
            walls = self.walls_after(start, cache, x)
        else:
            if start + T > limit:
                raise UserError(f"positions up to {start + T} in a model with a context of {limit}.")
            if cache is not None:
                cache.reserve(start + T)
            positions = slice(start, start + T)
        cos, sin = self.rotary.cos[positions], self.rotary.sin[positions]  # (T, D)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not self.training and ops.worth_widening(x):
            x, layers = x.float(), self.widened_layers()
        if documents is not None:
            assert cache is None, "documents are for rows that are whole"
            walls = self.walls(documents, x)
        for i, layer in enumerate(layers):
            x = layer(x, cos, sin, cache.layers[i] if cache is not None else None, start, walls)
        x = self.norm(x.to(self.dtype))
        if loss_only:
            assert targets is not None, "loss_only needs targets"
            if documents is not None:  # conversations, half of whose tokens are not learnt and need no logits
                counted = targets != -100
                x, targets = x[counted][None], targets[counted][None]
            weight = (self.lm_head or self.embed_tokens).weight
            if weight.is_floating_point():  # int8 weights need their scales, so they go through head()
                return None, ops.cross_entropy_in_pieces(x, weight, targets)
        logits = self.head(x[:, -logits_to_keep:])  # x[:, -0:] is all of x
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())  # ignore_index is -100
        return None if loss_only else logits, loss

    @staticmethod
    def walls(documents, x):  # (B, T), and x for its dtype -> (B, 1, T, T), one for all layers: 0 where seen, else -inf
        return walls_where(~(documents[:, :, None] == documents[:, None, :]).tril()[:, None], x)

    @staticmethod
    def walls_after(start, cache, x):  # (1,), and x for its dtype -> (1, 1, 1, S): 0 up to that position, -inf after it
        return walls_where((torch.arange(cache.layers[0][0].size(2), device=x.device) > start)[None, None, None], x)

    def widened_layers(self):
        """The layers one by one, in fp32: a single block, which takes the weights of each in its turn and so stays in
        the processor's cache (at 135M: 14 MB). For bfloat16 and int8 weights (ops.worth_widening)."""
        with NoDefaultInit():
            wide = Block(self.config).float().requires_grad_(False).eval()
        for layer in self.layers:
            for name, ours in wide.named_modules():
                theirs = layer.get_submodule(name)
                if hasattr(ours, "weight"):
                    ours.weight.copy_(theirs.weight)
                if hasattr(theirs, "scale"):  # int8
                    ours.weight.mul_(theirs.scale[:, None])
            yield wide

    def head(self, x):  # (B, T, C) -> (B, T, V): a matrix of its own, or the embedding once more
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    # ------------------------------------------------------------------------------------------------------------------
    # facts

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: that of the weights, or bfloat16 where the weights are int8. (A long prompt may be
        computed in fp32: ops.worth_widening.)"""
        return self.norm.weight.dtype

    def num_parameters(self) -> dict[str, int]:
        """Total, embeddings (with an untied head), and backbone. A tied head is counted once."""
        total = sum(p.numel() for p in self.parameters())
        embeddings = self.config.vocab_size * self.config.hidden_size * (1 if self.config.tie_word_embeddings else 2)
        return dict(total=total, embeddings=embeddings, backbone=total - embeddings)

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one token at block size T: 6 per weight that is multiplied, and
        attention's 12 L H D T (PaLM, https://arxiv.org/abs/2204.02311, appendix B; recomputation is not counted)."""
        c = self.config
        multiplied = self.num_parameters()["backbone"] + c.vocab_size * c.hidden_size
        return 6 * multiplied + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            n = SmolLM2(preset).num_parameters()
        print(
            f"SmolLM2-{name}: {n['total']:,} parameters = {n['embeddings']:,} embeddings + {n['backbone']:,} backbone"
        )
