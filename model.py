"""
SmolLM2 in plain PyTorch, in one file that needs nothing else of this project.

    model = SmolLM2(PRESETS["135M"])                    # random weights; checkpoint.py loads trained ones
    logits, loss = model(input_ids, targets)

SmolLM2 is a Llama: a token embedding, then blocks of (RMSNorm, grouped-query attention with rotary positions, RMSNorm,
SwiGLU MLP) around a residual stream, a final RMSNorm, and the embedding again as the output head. Weights and settings
have Hugging Face's names, so checkpoints need no renaming.
Papers: SmolLM2 https://arxiv.org/abs/2502.02737, Llama 2302.13971, RoPE 2104.09864, GQA 2305.13245, SwiGLU 2002.05202.

Shapes: B batch, T time (tokens in this call), S positions seen so far, C hidden, H query heads, K key/value heads,
D head dim, V vocabulary. G = H / K query heads share one key/value head.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class SmolLM2Config:  # the defaults are SmolLM2-135M
    vocab_size: int = 49152  # V
    hidden_size: int = 576  # C
    intermediate_size: int = 1536  # width of the MLP: 8/3 of C, the SwiGLU paper's choice
    num_hidden_layers: int = 30  # deep and narrow: what the SmolLM2 paper found best at this size
    num_attention_heads: int = 9  # H
    num_key_value_heads: int = 3  # K: three query heads share one key/value head, so the cache is a third as large
    head_dim: int = 64  # D
    max_position_embeddings: int = 8192  # the context: positions the model was trained on
    rope_theta: float = 100000.0  # the released weights' base; with the usual 10000 the loss is 0.2 nats higher
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True  # the head is the embedding; at 135M a separate one would add a fifth
    initializer_range: float = 1 / 24  # 1 / sqrt(576)
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self):
        H, K, D = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if H % K:
            raise ValueError(f"num_attention_heads={H} must be a multiple of num_key_value_heads={K}.")
        if D % 2:
            raise ValueError(f"head_dim={D} must be even: RoPE rotates the dimensions in pairs.")

    @property
    def eos_ids(self) -> set[int]:
        """The ids that end a text. config.json may hold one, a list, or none."""
        eos = self.eos_token_id
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


# The released shapes: vocab_size, hidden_size, intermediate_size, layers, query heads, key/value heads.
PRESETS = {
    "135M": SmolLM2Config(),
    "360M": SmolLM2Config(49152, 960, 2560, 32, 15, 5, initializer_range=0.02),
    "1.7B": SmolLM2Config(49152, 2048, 8192, 24, 32, 32, rope_theta=130000.0, initializer_range=0.02),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight. F.rms_norm computes it in fp32 inside: bf16 sums are inaccurate."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # (..., C) -> (..., C)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryEmbedding:
    """Hold cos and sin of every position's rotation angles, fp32, (max_position_embeddings, D) each.

    Pair i of the D/2 pairs rotates by position * theta^(-2i/D) radians: the first pairs turn once in 6 tokens, the last
    ones once in 400,000. Not a module: model.to(torch.bfloat16) would round them, and slow pairs could not tell
    neighbours apart. They are computed on the CPU, so a model has the same ones on every device.
    """

    def __init__(self, config: SmolLM2Config):
        D = config.head_dim
        frequency = 1.0 / (config.rope_theta ** (torch.arange(0, D, 2, device="cpu", dtype=torch.float32) / D))
        position = torch.arange(config.max_position_embeddings, device="cpu", dtype=torch.float32)
        angle = torch.outer(position, frequency)  # (positions, D/2)
        angle = torch.cat((angle, angle), dim=-1)  # (positions, D): dimension i pairs with i + D/2, "split-half"
        self.cos, self.sin = angle.cos(), angle.sin()

    def at(self, positions, device):
        """Return cos and sin of some positions, a slice or a tensor, on a device."""
        if self.cos.device != device:
            with torch.inference_mode(False):  # otherwise tables moved in generate() could not be used in training
                self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self.cos[positions], self.sin[positions]


def rotate(x, cos, sin):  # x (B, heads, T, D), cos and sin (T, D) fp32 -> (B, heads, T, D) in the dtype of x
    """Rotate each pair (x[i], x[i + D/2]) by its angle. The checkpoint's q_proj and k_proj rows are laid out for this
    split-half pairing; Meta's original code and ggml pair neighbours (x[2i], x[2i+1]) and permute those rows."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def attend(q, k, v, attn_mask=None):
    """Grouped-query attention, softmax(q k^T / sqrt(D)) v, by PyTorch's fused kernels, which never store the (T, S)
    scores.

    q (B, H, T, D) holds the last T of the S positions of k and v (B, K, S, D). Returns (B, H, T, D).
    attn_mask: (T, S) or (B, 1, T, S), true if a query may attend to a key. The default is causal.
    """
    causal, grouped = attn_mask is None and q.size(2) > 1, q.size(1) != k.size(1)
    if grouped and q.device.type == "cuda":
        # Here only flash attention lets heads share keys and values, which takes no mask, no fp32 and no GPU before
        # Ampere. For anything else PyTorch would silently fall back to storing the T x S scores.
        major = torch.cuda.get_device_properties(q.device).major
        grouped = attn_mask is None and q.dtype != torch.float32 and major >= 8
    if not grouped:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))  # (B, H, S, D) each
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=causal, enable_gqa=grouped)


class Linear(nn.Linear):
    """A linear layer without bias and without PyTorch's slow default initialization, which would be overwritten."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        pass


class Attention(nn.Module):
    def __init__(self, config: SmolLM2Config):
        super().__init__()
        C = config.hidden_size
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(C, self.H * self.D)
        self.k_proj = Linear(C, self.K * self.D)
        self.v_proj = Linear(C, self.K * self.D)
        self.o_proj = Linear(self.H * self.D, C)

    def forward(self, x, cos, sin, cache=None, start: int = 0, attn_mask=None):  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.K, self.D).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.K, self.D).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, start)  # (B, K, S, D) each
        y = attend(q, k, v, attn_mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class LayerCache:
    def __init__(self, keys, values):  # (B, K, capacity, D) each
        self.keys, self.values = keys, values

    def update(self, k, v, start: int):
        """Write k and v (B, K, T, D) at `start`; return all positions up to there, (B, K, start + T, D) each."""
        end = start + k.size(2)
        self.keys[:, :, start:end], self.values[:, :, start:end] = k, v
        return self.keys[:, :, :end].to(k.dtype), self.values[:, :, :end].to(k.dtype)


class KVCache:
    """Hold the keys and values of the positions seen so far, so that a new token costs one row of work instead of S.

    The capacity doubles as the text grows, up to the context, so a 50-token answer does not pay for 8,192 positions.
    """

    def __init__(self, config: SmolLM2Config, batch_size: int, device=None, dtype=torch.float32):
        self.config = config
        empty = torch.empty(batch_size, config.num_key_value_heads, 0, config.head_dim, device=device, dtype=dtype)
        self.layers = [LayerCache(empty, empty.clone()) for _ in range(config.num_hidden_layers)]

    @property
    def capacity(self) -> int:
        return self.layers[0].keys.size(2)

    def reserve(self, length: int):
        """Make room for `length` positions."""
        limit = self.config.max_position_embeddings
        assert length <= limit, f"{length} positions, but the model's context is {limit}"
        if length > self.capacity:
            extra = min(limit, max(2 * self.capacity, length + -length % 64)) - self.capacity
            for layer in self.layers:
                layer.keys, layer.values = (F.pad(x, (0, 0, 0, extra)) for x in (layer.keys, layer.values))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The gate scales each feature of `up`."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm: attention and MLP each read a normalized copy of the residual stream and add to the stream itself."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = 0.0  # fraction of both outputs that is zeroed in training; train.py's --dropout

    def forward(self, x, cos, sin, cache=None, start: int = 0, attn_mask=None):  # (B, T, C) -> (B, T, C)
        attended = self.self_attn(self.input_layernorm(x), cos, sin, cache, start, attn_mask)
        x = x + F.dropout(attended, self.dropout, self.training)
        return x + F.dropout(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)


class SmolLM2(nn.Module):
    """The language model, built with random weights. fast/ replaces some of its methods by faster equivalents."""

    make_decoder = None  # fast/: a function that returns a decoder of single tokens; sample.generate uses it

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, C, _weight=torch.empty(V, C))  # uninitialized, like Linear
        self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(C, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(C, V)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Initialize as SmolLM2 was (nanotron, scaling/parametrization.py): normal with std initializer_range, divided
        by sqrt(2 * layers) for what writes to the residual stream, whose variance then does not grow with depth."""
        for name, parameter in self.named_parameters():
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * self.config.num_hidden_layers) ** -0.5 if into_stream else 1.0
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif not parameter.is_meta:  # on the meta device the weights are loaded later
                parameter.normal_(0.0, self.config.initializer_range * scale)

    def forward(
        self, input_ids, targets=None, documents=None, cache: KVCache | None = None, start: int = 0,
        logits_to_keep: int = 0, loss_only: bool = False,
    ):  # fmt: skip
        """Map input_ids (B, T) int64 to logits (B, T, V) and the loss, a fp32 scalar in nats, or None without targets.

        targets (B, T): the token that follows each input; -100 is excluded from the mean.
        documents (B, T): the number of each token's document; tokens attend only within theirs. Positions go on through
        the row, which changes nothing: with RoPE only distances matter.
        cache, start: input_ids are at positions start .. start+T-1, and the cache holds what came before.
        logits_to_keep: 0 returns the logits of all positions, n only those of the last n.
        loss_only: return None for the logits, the largest tensor of a training step; fast/ never stores all of them.
        """
        T, limit = input_ids.size(1), self.config.max_position_embeddings
        if start + T > limit:
            raise ValueError(f"positions up to {start + T}, but the model's context is {limit}.")

        # embed the tokens, look up the rotations of their positions, and build the mask once for all layers
        x = self.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = self.rotary.at(slice(start, start + T), x.device)  # (T, D) each
        attn_mask = None
        if documents is not None:
            attn_mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        elif start > 0 and T > 1:  # is_causal assumes that the first query is at the first key
            attn_mask = torch.ones(T, start + T, dtype=torch.bool, device=x.device).tril(start)  # (T, S)
        if cache is not None:
            cache.reserve(start + T)

        x = self.norm(self.run_blocks(x, cos, sin, cache, start, attn_mask))
        if loss_only:
            if documents is not None:  # about half of a conversation's tokens have no loss and need no logits
                counted = targets != -100
                x, targets = x[counted][None], targets[counted][None]
            return None, self.head_loss(x, targets)
        logits = self.head(x[:, -logits_to_keep:])  # x[:, -0:] is all of x
        return logits, None if targets is None else cross_entropy(logits, targets)

    def run_blocks(self, x, cos, sin, cache=None, start: int = 0, attn_mask=None):  # (B, T, C) -> (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache.layers[i] if cache is not None else None, start, attn_mask)
        return x

    def head(self, x):  # (B, T, C) -> (B, T, V): a matrix of its own, or the embedding again
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)

    def head_loss(self, x, targets):  # (B, T, C), (B, T) -> a fp32 scalar
        return cross_entropy(self.head(x), targets)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype  # the matrices may be int8

    def num_parameters(self) -> dict[str, int]:
        """Count all parameters, the embeddings (with an untied head), and the rest. A tied head is counted once."""
        total, c = sum(p.numel() for p in self.parameters()), self.config
        embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        return dict(total=total, embeddings=embeddings, backbone=total - embeddings)

    def flops_per_token(self, T: int) -> int:
        """Return the training FLOPs per token at block size T (PaLM, https://arxiv.org/abs/2204.02311, B)."""
        c = self.config
        multiplied = self.num_parameters()["backbone"] + c.vocab_size * c.hidden_size
        return 6 * multiplied + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T


def cross_entropy(logits, targets):  # (B, T, V), (B, T) -> the mean over targets other than -100, fp32
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
