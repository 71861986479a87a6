"""
SmolLM2 in plain PyTorch: the whole architecture, its KV cache, and the reading and writing of model directories.

    python model.py                          # parameter counts of the three released shapes
    from model import SmolLM2
    model = SmolLM2.from_pretrained("out/smol_shakespeare")     # any Hugging Face directory of the SmolLM2 family

SmolLM2 is a Llama: token embedding, then blocks of (RMSNorm, grouped-query attention with rotary positions,
RMSNorm, SwiGLU MLP) around a residual stream, a last RMSNorm, and the embedding once more as the output head.
The names of weights and settings are Hugging Face's, so that a checkpoint reads in and writes out unchanged.

References
  SmolLM2: https://arxiv.org/abs/2502.02737            Llama: https://arxiv.org/abs/2302.13971
  RoPE:    https://arxiv.org/abs/2104.09864            GQA:   https://arxiv.org/abs/2305.13245
  SwiGLU:  https://arxiv.org/abs/2002.05202            RMSNorm: https://arxiv.org/abs/1910.07467

Shapes: B batch, T time (tokens in this call), S all positions seen so far, C hidden, H query heads, K key/value
heads, G = H / K query heads per key/value head, D head dim, V vocabulary.
"""

import ctypes
import json
import math
import os
import platform
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class ModelError(ValueError):
    """A model directory, or what was asked of a model, is not what this file implements; says what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# configuration


@dataclass
class SmolLM2Config:  # the defaults are SmolLM2-135M
    vocab_size: int = 49152
    hidden_size: int = 576  # C
    intermediate_size: int = 1536  # width of the MLP: 8/3 of C, the SwiGLU paper's choice
    num_hidden_layers: int = 30  # deep and narrow: what the paper found best at this size
    num_attention_heads: int = 9  # H
    num_key_value_heads: int = 3  # K: three query heads share one key/value head, so the cache is a third
    head_dim: int = 64  # D
    max_position_embeddings: int = 8192
    rope_theta: float = 100000.0  # the released weights' base; 10000, the usual one, gives fluent nonsense
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True  # the head is the embedding; at 135M it would be a fifth of the weights again
    initializer_range: float = 1 / 24  # 1 / sqrt(576)
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self):
        H, K = self.num_attention_heads, self.num_key_value_heads
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and (not isinstance(value, int) or value < 1):
                raise ModelError(f"{f.name}={value!r}: expected a whole number of at least 1.")
        if H % K:
            raise ModelError(f"num_attention_heads={H} must be a multiple of num_key_value_heads={K}.")
        if self.head_dim % 2:
            raise ModelError(f"head_dim={self.head_dim} must be even: RoPE turns the dimensions in pairs.")

    @property
    def eos_ids(self) -> set[int]:
        """The ids that end a text. config.json may hold one, a list, or none."""
        eos = self.eos_token_id
        return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)

    @classmethod
    def from_dict(cls, hf: dict, source: str = "config.json") -> "SmolLM2Config":
        """Read a parsed config.json as transformers 4 or 5 writes it. ModelError names whatever we do not implement."""
        wrong = []
        must_be = dict(
            model_type="llama", hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None,
            rope_interleaved=False, sliding_window=None, attention_dropout=0.0, pretraining_tp=1,
            quantization_config=None,
        )  # fmt: skip
        for key, only in must_be.items():
            if hf.get(key, only) != only:
                wrong.append(f"{key}={hf[key]!r} (only {only!r} is implemented)")
        if "model_type" not in hf:
            wrong.append("model_type is missing (expected 'llama')")
        rope = hf.get("rope_parameters") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))  # `type` is its older name, still honoured
        if rope_type != "default":
            wrong.append(f"rope_type={rope_type!r} (only 'default' is implemented)")
        # transformers 5 keeps theta in rope_parameters and lets it win, transformers 4 beside the others. A default
        # here would build a wrong model without a word, so a config without theta is refused.
        theta = rope.get("rope_theta", hf.get("rope_theta"))
        if theta is None:
            wrong.append('rope_theta is missing (SmolLM2-135M: "rope_theta": 100000)')
        required = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
        wrong += [f"{key} is missing" for key in required if key not in hf]
        if wrong:
            raise ModelError(f"{source} is not a model this code can run: " + "; ".join(wrong) + ".")
        heads = hf["num_attention_heads"]
        defaults = dict(  # what transformers takes where a key is absent
            num_key_value_heads=heads, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False,
            initializer_range=0.02, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        known = {f.name for f in fields(cls)}
        settings = defaults | {k: v for k, v in hf.items() if k in known}
        settings["head_dim"] = hf.get("head_dim") or hf["hidden_size"] // heads
        settings["num_key_value_heads"] = settings["num_key_value_heads"] or heads
        settings["rope_theta"] = float(theta)
        return cls(**settings)

    def to_dict(self, dtype: torch.dtype) -> dict:
        """A config.json that transformers 5 and 4.57, vLLM and llama.cpp read alike: v4 wants rope_theta and
        torch_dtype, v5 rope_parameters and dtype, and each falls back silently where its own key is absent."""
        name = str(dtype).removeprefix("torch.")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": name,
            "torch_dtype": name,
        }


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
# the parts, from the smallest to the whole


def linear(x, weight, scale=None):  # (..., C), (N, C) -> (..., N); int8 weights come with a scale (N,) per row
    """x @ weight.T, the one place where the way to multiply is chosen. All ways agree (tests/test_model.py).

    int8 weights are widened first, which many rows pay for. A few rows on a CPU take a kernel that reads them as they
    are, if the matrix is made of whole vectors: beyond others it would read on. (One row at a time on a CPU, which is
    what generating text is, has a faster way around all of this: decode.c.)
    """
    if scale is None:
        return F.linear(x, weight)
    if x.device.type == "cpu" and x.numel() < 8 * x.size(-1) and not (weight.size(0) % 32 or weight.size(1) % 32):
        y = torch._weight_int8pack_mm(x.reshape(-1, x.size(-1)), weight, scale)
        return y.view(*x.shape[:-1], len(weight))
    return F.linear(x, weight.to(x.dtype)) * scale


class Linear(nn.Linear):
    """A matrix without bias, multiplied by linear(). Filled by SmolLM2.init_weights, or from a file."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self):
        pass  # the default would draw numbers only for them to be replaced

    def forward(self, x):
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        pass


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside whatever the dtype of x:
    a sum of 576 squares in bf16 would keep two or three digits. F.rms_norm is that formula in one kernel."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):  # (..., C) -> (..., C)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(config: SmolLM2Config, device=None):
    """cos and sin of every position's rotation angles, fp32, (max_position_embeddings, D) each.

    Pair i of the D/2 pairs turns by position * theta^(-2i/D) radians: the first pairs turn fast and tell neighbours
    apart, the last ones turn once in thousands of tokens. The arithmetic, fp32 and in this order, is transformers'.
    """
    D = config.head_dim
    frequency = 1.0 / (config.rope_theta ** (torch.arange(0, D, 2, device=device, dtype=torch.float32) / D))
    position = torch.arange(config.max_position_embeddings, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (S, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (S, D): dimension i pairs with i + D/2, "split-half"
    return angle.cos(), angle.sin()


class RotaryEmbedding(nn.Module):
    """Holds the tables of rope_tables in buffers that move with the model but are not saved, nor ever rounded."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.config = config
        here = torch.empty(0).device  # what `with torch.device(...)` asks for; tables are cheap, so never on "meta"
        cos, sin = rope_tables(config, "cpu" if here.type == "meta" else here)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn, recurse=True):
        # model.to(torch.bfloat16) casts buffers too, and in bf16 the angles of 2047 and 2048 are one and the same.
        # Let it move them, then put back what it rounded.
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = rope_tables(self.config, self.cos.device)
        return self


def rotate(x, cos, sin):  # x (B, heads, T, D), cos and sin (T, D) fp32 -> (B, heads, T, D) in the dtype of x
    """Turn each pair (x[i], x[i + D/2]) by its angle. The checkpoint's q_proj and k_proj rows are laid out for this
    split-half pairing; Meta's original code and ggml pair neighbours (x[2i], x[2i+1]) and permute those rows."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def attend(q, k, v, start: int):
    """Causal grouped-query attention: q (B, H, T, D) at positions start .. start+T-1 over k, v (B, K, S, D), the keys
    and values of positions 0 .. S-1, where S = start + T. Returns (B, H, T, D). Position p sees positions <= p.
    Two ways, one result: tests/test_model.py compares them."""
    return attend_in_blocks(q, k, v, start) if q.device.type == "cpu" else attend_fused(q, k, v, start)


def attend_fused(q, k, v, start: int):
    """PyTorch's fused attention, which never writes the T x S scores to memory: flash attention on a GPU."""
    T, S = q.size(2), k.size(2)
    # is_causal masks from the top left, right only when nothing is cached; one query alone may see all keys
    mask = None
    if T > 1 and start > 0:
        mask = torch.arange(S, device=q.device) <= torch.arange(start, S, device=q.device)[:, None]  # (T, S)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T > 1 and start == 0, enable_gqa=grouped)


QUERY_BLOCK = 256  # queries whose scores are held at once: about as many as stay in a CPU's cache


def attend_in_blocks(q, k, v, start: int):
    """Plain matrix products, faster on a CPU: a block of queries at a time, over the keys that the block may see. The G
    query heads that share a key/value head are stacked as rows of one product, so keys and values are not repeated."""
    (B, H, T, D), K, out = q.shape, k.size(1), []
    G = H // K
    q = (q * D**-0.5).view(B, K, G, T, D)
    for a in range(0, T, QUERY_BLOCK):
        t = min(QUERY_BLOCK, T - a)
        s = start + a + t  # the keys that the last query of this block sees
        scores = q[:, :, :, a : a + t].reshape(B, K, G * t, D) @ k[:, :, :s].transpose(-1, -2)  # (B, K, G*t, s)
        if t > 1:  # among the block's own keys, those after a query
            future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
            scores.view(B, K, G, t, s)[..., s - t :].masked_fill_(future, -math.inf)
        out.append((scores.softmax(-1) @ v[:, :, :s]).view(B, H, t, D))  # softmax computes in fp32 whatever it is given
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


class Attention(nn.Module):
    def __init__(self, config: SmolLM2Config):
        super().__init__()
        C, self.H, self.K, self.D = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.q_proj = Linear(C, self.H * self.D)
        self.k_proj = Linear(C, self.K * self.D)
        self.v_proj = Linear(C, self.K * self.D)
        self.o_proj = Linear(self.H * self.D, C)

    def forward(self, x, cos, sin, cache=None, start: int = 0):  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.K, self.D).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.K, self.D).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = remember(cache, k, v, start)  # (B, K, S, D) each
        y = attend(q, k, v, start)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). The gate decides, feature by feature, how much of `up` passes."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():  # the same in place: fresh memory takes longer than the arithmetic
            return self.down_proj(F.silu(gate, inplace=True).mul_(up))
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy of the residual stream and adds to the stream itself."""

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, start: int = 0):  # (B, T, C) -> (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class KVCache:
    """The keys and values of the positions a model has seen, so that a new token costs one row of work, not S.

    One pair of (B, K, capacity, D) buffers per layer. The capacity doubles as the text grows, up to the context, so a
    50-token answer does not pay for 8,192 positions. Positions are explicit: a caller writes rows start .. start+T-1
    and sees rows 0 .. start+T-1; rows beyond are never read, whatever they hold.
    """

    def __init__(self, config: SmolLM2Config, batch_size: int, device=None, dtype=torch.float32):
        self.config = config
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        self.layers = [
            tuple(torch.empty(shape, device=device, dtype=dtype) for _ in "kv") for _ in range(config.num_hidden_layers)
        ]

    def reserve(self, length: int):
        """Make room for `length` positions. ModelError where that is more than the model's context."""
        capacity, limit = self.layers[0][0].size(2), self.config.max_position_embeddings
        if length > limit:
            raise ModelError(f"{length} positions asked of a model with a context of {limit}; generate() slides along.")
        if length > capacity:
            extra = min(limit, max(2 * capacity, 64 * math.ceil(length / 64))) - capacity
            self.layers = [tuple(F.pad(buffer, (0, 0, 0, extra)) for buffer in pair) for pair in self.layers]


def remember(cache, k, v, start: int):
    """Write k, v (B, K, T, D) into a layer's buffers at `start`; return what is known up to there: (B, K, S, D)."""
    end = start + k.size(2)
    for buffer, new in zip(cache, (k, v)):
        buffer[:, :, start:end] = new
    return cache[0][:, :, :end], cache[1][:, :, :end]


class SmolLM2(nn.Module):
    """The language model. Built with random weights; from_pretrained() reads a directory.

    model = SmolLM2(PRESETS["135M"])
    logits, loss = model(input_ids, targets)
    """

    def __init__(self, config: SmolLM2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if not self.norm.weight.is_meta:  # on the meta device there is nothing to fill
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with std initializer_range; the two projections that write to the residual stream are divided by
        sqrt(2 * layers), so that its variance does not grow with depth. So SmolLM2 was begun: nanotron,
        scaling/parametrization.py, StandardParametrizator. Norm weights start at one."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * self.config.num_hidden_layers) ** -0.5 if into_stream else 1.0
            parameter.normal_(0.0, self.config.initializer_range * scale)

    def forward(self, input_ids, targets=None, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0):
        """input_ids (B, T) int64 -> logits (B, T, V) and the loss, a fp32 scalar, or None without targets.

        targets (B, T): the token that follows each input; -100 is left out of the mean. The loss is in nats.
        cache, start: input_ids stand at positions start .. start+T-1; what came before is in the cache.
        logits_to_keep: 0 for all positions, n for the last n alone; -1 for none, when only the loss is wanted: it is
        then computed in pieces, without ever holding the B*T*V logits, the largest tensor of a training step.
        """
        T = input_ids.size(1)
        if start + T > self.config.max_position_embeddings:
            raise ModelError(
                f"positions up to {start + T} in a model with a context of {self.config.max_position_embeddings}."
            )
        if cache is not None:
            cache.reserve(start + T)
        x = self.embed_tokens(input_ids)  # (B, T, C)
        cos, sin = self.rotary.cos[start : start + T], self.rotary.sin[start : start + T]  # (T, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache.layers[i] if cache is not None else None, start)
        x = self.norm(x)
        if logits_to_keep == -1 and targets is not None:
            weight = self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
            return None, chunked_cross_entropy(x, weight, targets)
        logits = self.head(x[:, -logits_to_keep:])  # -0 keeps all
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())  # ignore_index is -100
        return logits, loss

    def head(self, x):  # (B, T, C) -> (B, T, V): the embedding read backwards, or a matrix of its own
        if not self.config.tie_word_embeddings:
            return self.lm_head(x)
        if isinstance(self.embed_tokens, Int8Embedding):
            return linear(x, self.embed_tokens.weight, self.embed_tokens.scale)
        return linear(x, self.embed_tokens.weight)

    # ------------------------------------------------------------------------------------------------------------------
    # facts

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def num_parameters(self) -> dict[str, int]:
        """Total, embeddings (with an untied head), and backbone. A tied head is counted once."""
        total = sum(t.numel() for name, t in self.state_dict().items() if name.endswith("weight"))
        embeddings = self.config.vocab_size * self.config.hidden_size * (1 if self.config.tie_word_embeddings else 2)
        return dict(total=total, embeddings=embeddings, backbone=total - embeddings)

    def flops_per_token(self, T: int) -> int:
        """Floating-point operations to train on one token at block size T: 6 per weight that is multiplied, and
        attention's 12 L H D T (PaLM, https://arxiv.org/abs/2204.02311, appendix B; recomputation is not counted)."""
        c = self.config
        matmul = self.num_parameters()["backbone"] + c.vocab_size * c.hidden_size
        return 6 * matmul + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T

    # ------------------------------------------------------------------------------------------------------------------
    # speed

    def compile_for_training(self):
        """torch.compile each block in place: no name changes, and all blocks share one compiled graph, so it takes some
        twenty seconds, not the minute of compiling thirty. The first call compiles, and fails if there is no compiler.
        """
        for layer in self.layers:
            layer.compile(dynamic=False)

    def compile_for_generation(self):
        """The same for generate() on a GPU: the lengths may change without compiling again. (A CPU has decode.c.)"""
        for layer in self.layers:
            layer.compile(dynamic=True)
        self.head = torch.compile(self.head, dynamic=True)

    @torch.no_grad()
    def quantize(self, kind: str = "int8") -> "SmolLM2":
        """Make every matrix int8, with a scale per row, in place; activations run in bfloat16. For inference only."""
        if kind != "int8":
            raise ModelError(f"quantize={kind!r}: only 'int8' is implemented.")
        self.to(torch.bfloat16)
        self.embed_tokens = Int8Embedding(self.embed_tokens.weight)
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear):
                    setattr(parent, name, Int8Linear(child.weight))
        return self

    # ------------------------------------------------------------------------------------------------------------------
    # the Hugging Face directory

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype: torch.dtype | None = None, copy: bool = True) -> "SmolLM2":
        """Read config.json and the safetensors of a directory, one file or shards. dtype None keeps the file's.

        copy False leaves the weights in the file, mapped, for a reader of one pass. Tokens come a tenth faster from
        memory of our own, where tensors begin at even addresses and no one can change them.
        Every tensor is accounted for by name and shape: ModelError lists the missing, the unknown and the misshapen.
        """
        path = Path(path)
        config = SmolLM2Config.from_dict(read_json(path / "config.json"), str(path / "config.json"))
        tensors = read_tensors(path)
        with torch.device("meta"):  # no memory, no random numbers for weights that are about to be replaced
            model = cls(config)
        expected = {hf_name(name): p.shape for name, p in model.named_parameters()}
        if config.tie_word_embeddings and "lm_head.weight" in tensors:  # some tools write the tied head a second time
            if not torch.equal(tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight", torch.empty(0))):
                raise ModelError(
                    f"{path}: config.json ties the head to the embedding, but lm_head.weight is a different matrix. "
                    'Set "tie_word_embeddings": false there if the head is meant.'
                )
        wrong = [f"{name} is missing" for name in expected if name not in tensors]
        wrong += [f"{name} is not part of this model" for name in tensors if name not in expected]
        wrong += [
            f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ]
        if wrong:
            more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
            raise ModelError(f"{path} does not hold the model its config.json describes: {'; '.join(wrong[:5])}{more}.")
        own = {name: tensors[hf_name(name)] for name, _ in model.named_parameters()}
        model.load_state_dict(own, assign=True)
        model.to(device=device, dtype=dtype)
        for name, p in model.named_parameters() if copy else ():
            if p.data_ptr() == own[name].data_ptr():  # neither moved nor converted: still in the mapped file
                p.data = p.data.clone()
        return model.requires_grad_(True).eval()

    def save_pretrained(self, path, metadata: dict[str, str] | None = None):
        """Write config.json, generation_config.json and model.safetensors, each of them whole or not at all.

        metadata: strings kept in the header of the safetensors file (train.py: step, validation loss, tokenizer hash).
        Raises OSError, and leaves what was there, if the disk is full.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        special = {k: getattr(self.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(path / "config.json", self.config.to_dict(self.dtype))
        write_json(path / "generation_config.json", {k: v for k, v in special.items() if v is not None})
        tensors = {hf_name(name): p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        header = {"format": "pt", "crc32": checksum(tensors)} | (metadata or {})
        with atomic(path / "model.safetensors") as temporary:
            try:
                save_file(tensors, temporary, metadata=header)
            except SafetensorError as error:  # how the library reports a full disk
                raise OSError(str(error)) from error


def hf_name(name: str) -> str:
    """Our parameter's name in a checkpoint: transformers nests all but the head in a module called `model`."""
    return name if name.startswith("lm_head.") else "model." + name


# ----------------------------------------------------------------------------------------------------------------------
# int8 weights: decoding reads every weight once per token and does little else, so half the bytes is half the time


def int8_rows(weight):  # (N, C) -> int8 (N, C) and bf16 (N,): weight is about int8 * scale, row by row
    """The scale is rounded to bf16 first, upwards, and the weights are quantised with what came of it, so that the
    rounding of the scale costs nothing and no weight needs more than 127 steps."""
    exact = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    scale = exact.to(torch.bfloat16)
    scale = torch.where(scale.float() < exact, scale * (1 + 2**-7), scale)
    return (weight.float() / scale.float()[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        for name, tensor in zip(("weight", "scale"), int8_rows(weight)):
            self.register_buffer(name, tensor)

    def forward(self, x):
        return linear(x, self.weight, self.scale)


class Int8Embedding(Int8Linear):
    def forward(self, ids):  # (B, T) -> (B, T, C)
        return self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]


# ----------------------------------------------------------------------------------------------------------------------
# the loss, in pieces


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of softmax(hidden @ weight.T) against targets, a few hundred rows at a time.

    At a vocabulary of 49,152 the logits of 1,024 tokens are 200 MB in fp32, and the plain way holds them, their
    softmax and their gradient at once. Here each chunk's gradient is taken while its logits are at hand, and takes
    their place, so nothing of size V outlives the chunk and the backward pass is one multiplication. Products run in
    `dtype` (what autocast would choose), everything after them, and the sum of the weight's gradient, in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):  # (N, C), (V, C), (N,) -> fp32 scalar
        want_grad = hidden.requires_grad or weight.requires_grad
        h, w = hidden.to(dtype), weight.to(dtype)
        counted = targets != -100
        count = counted.sum()
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(h) if want_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_grad else None
        for a in range(0, len(h), LOSS_ROWS):
            chunk = slice(a, a + LOSS_ROWS)
            logits = h[chunk] @ w.T  # (LOSS_ROWS, V)
            rows = SOFTMAX_ROWS if h.device.type == "cpu" else LOSS_ROWS
            for b in range(0, len(logits), rows):  # in fp32, as many as stay in the cache
                part = slice(b, b + rows)
                target = targets[chunk][part].clamp(min=0)[:, None]  # -100 reads class 0 and is masked below
                mask = counted[chunk][part][:, None]
                exact = logits[part].float()
                largest = exact.amax(-1, keepdim=True)
                chosen = exact.gather(1, target) - largest
                exact.sub_(largest).exp_()
                z = exact.sum(-1, keepdim=True)
                total += ((z.log() - chosen) * mask).sum()
                if want_grad:  # d loss / d logits = (softmax - one_hot) / count
                    share = mask / count
                    logits[part] = exact.mul_(share / z).scatter_add_(1, target, -share)
            if want_grad:
                grad_hidden[chunk] = logits @ w
                grad_weight += logits.T @ h[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        # in place, for the second is as large as the embedding: going back twice raises an error
        return grad_hidden.mul_(grad).to(ctx.dtypes[0]), grad_weight.mul_(grad).to(ctx.dtypes[1]), None, None


LOSS_ROWS = 512  # tokens per piece
SOFTMAX_ROWS = 32  # of these, how many at a time go through the softmax on a CPU: 6 MB at a vocabulary of 49,152


def chunked_cross_entropy(x, weight, targets):  # (B, T, C), (V, C), (B, T) -> fp32 scalar
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), dtype)


def keep_freed_memory():
    """Have malloc keep what is freed and take it again. By default glibc gives large blocks back to the system at once,
    and every step has the same gigabytes mapped, and zeroed page by page, anew: up to a tenth of a training step.
    For a process of ours, at its start; does nothing where the C library is another."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the heap cut short when its end is free


# ----------------------------------------------------------------------------------------------------------------------
# files


@contextmanager
def atomic(path):
    """`with atomic(path) as temporary:` write the temporary file; it takes path's name when all of it is on the disk.

    A crash at any instant leaves either the old file or the new one. The folder is synced as well: without that the
    rename itself can be lost. If the body raises, the temporary file is removed and the old one stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name != "nt":  # Windows has no handle on a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value: dict):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} not found: {path.parent} is not a model directory.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is damaged ({error}). Copy it again from where it came.") from None


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of all tensors' bytes in the order of their names: the format itself would not notice a flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names. ModelError names the
    file that is missing, cut short or, where save_pretrained left a checksum, altered."""
    index = path / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors = {}
    for name in names:
        try:
            with safe_open(path / name, framework="pt") as f:
                found = {key: f.get_tensor(key) for key in f.keys()}
                crc = (f.metadata() or {}).get("crc32")
        except FileNotFoundError:
            raise ModelError(f"{path / name} not found: {path} holds no complete model.") from None
        except SafetensorError as error:
            raise ModelError(f"{path / name} is damaged ({error}). Copy it again, or train again.") from None
        if crc and crc != checksum(found):
            raise ModelError(f"{path / name} has been altered since it was written (wrong checksum). Copy it again.")
        tensors |= found
    return tensors


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            n = SmolLM2(preset).num_parameters()
        print(
            f"SmolLM2-{name}: {n['total']:,} parameters = {n['embeddings']:,} embeddings + {n['backbone']:,} backbone"
        )
