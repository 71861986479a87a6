"""
The same weights in transformers and here: do they agree, and how closely? One table; the exit code is 1 if a row fails.

    python verify_hf.py                                             # random weights in the 135M shape, offline
    python verify_hf.py --model=out/tiny_shakespeare                # a trained run, or any SmolLM2 directory
    python verify_hf.py --model=HuggingFaceTB/SmolLM2-360M --context=2048

Without --model, transformers builds a random LlamaForCausalLM of a released shape and saves it to a temporary
directory, which is then read like any other. Both sides load the same files, in fp32. Two correct implementations
still differ in the last digits, since they add the same numbers in another order. How much is normal is measured too:
transformers' two attentions, "eager" (the textbook formula) and "sdpa" (PyTorch's fused kernel), are compared with
each other, and twice their difference is allowed where that is more than 5e-5.
"""

import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import checkpoint
from config import Seed, UserError, Within, guard, override
from decode import Decoder, reason_against
from device import keep_freed_memory, pick_device
from model import PRESETS, KVCache, SmolLM2, SmolLM2Config, rotate
from prepare import PLAY
from quantize import quantize
from sample import generate

Context = Annotated[int, Within(least=16)]


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: random weights, made on the spot
    shape: Literal["135M", "360M", "1.7B"] = "135M"  # which released shape the random weights take
    seed: Seed | None = None  # of the random weights and of the tokens; none draws a new one, which is printed
    context: Context = 8192  # compare up to this many positions, or the model's own context if that is less
    text: str = str(PLAY)  # a text, for the bits per byte that int8 costs; its beginning is read
    device: str = "cpu"  # where both sides run: cpu, cuda, mps, or auto


# the largest differences allowed
FP32 = 5e-5  # of a logit, over 30 layers; or twice what transformers' two attentions differ by, if that is more
PART = 5e-6  # the same for one part alone, in units of its largest output
GRADIENT = 1e-4  # the same for a gradient, in units of the parameter's largest
BF16 = 1.5  # our rounding error in bf16, in units of transformers' own
INT8 = 4.0  # our rounding error in int8, in the same units: measured 2.3 on random weights
BITS = 0.01  # bits per byte that a text may cost more in bf16 or int8


# ----------------------------------------------------------------------------------------------------------------------
# the table


@dataclass
class Row:
    name: str
    cells: tuple = ()  # up to four, under the columns of their section
    ok: bool | None = None  # None: reported, not judged
    note: str = ""  # a line below the row


def difference(name: str, theirs, ours, allowed: float | None) -> Row:
    """A row of largest difference, mean difference and agreement of the argmax, for logits (..., V). NaN fails."""
    d = (theirs.float() - ours.float()).abs()
    same = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    cells = (f"{d.max():.1e}", f"{d.mean():.1e}", f"{same:.2%}", "" if allowed is None else f"{allowed:.1e}")
    return Row(name, cells, None if allowed is None else bool(d.max() <= allowed))


def print_section(title: str, columns: tuple, rows: Iterator[Row]) -> list[Row]:
    """Print each row as soon as it is known."""

    def line(name, cells, result=""):
        cells = [f"{c:.6g}" if isinstance(c, float) else str(c) for c in cells] + [""] * (4 - len(cells))
        print((f"{name:<48}" + "".join(f"{c:>14}" for c in cells) + f"{result:>6}").rstrip(), flush=True)

    print()
    line(title, columns)
    done = []
    for row in rows:
        line("  " + row.name, row.cells, {True: "ok", False: "FAIL", None: "-"}[row.ok])
        if row.note:
            print("    " + row.note, flush=True)
        done.append(row)
    return done


# ----------------------------------------------------------------------------------------------------------------------
# the two sides


def save_random_model(path, config: SmolLM2Config, seed: int):
    """A LlamaForCausalLM of that shape with random weights, built and written by transformers."""
    settings = checkpoint.config_to_dict(config, torch.float32)
    for key in ("architectures", "dtype", "torch_dtype", "rope_theta"):
        del settings[key]
    # a wide distribution: where attention is nearly uniform, mistakes in it do not show
    settings["initializer_range"] = config.hidden_size**-0.5
    torch.manual_seed(seed)
    hf = LlamaForCausalLM(LlamaConfig(**settings))
    for p in hf.parameters():
        if p.dim() == 1:  # a norm weight, which begins as ones: a norm that ignores its weight would not show
            torch.nn.init.normal_(p, 1.0, 0.1)
    hf.save_pretrained(path)


def load_original(path, dtype=torch.float32, device="cpu") -> tuple[LlamaForCausalLM, list[str]]:
    """transformers' model, and what it found wrong with the tensors: a warning there, a failed row here."""
    hf, found = LlamaForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    assert hf.dtype == dtype, f"transformers loaded {hf.dtype}, asked for {dtype}"
    # without the sampling settings and the end token that generation_config.json may hold: decoding here is greedy
    hf.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return hf.to(device).eval(), [f"{kind}: {name}" for kind, names in found.items() for name in sorted(names)]


def token_ids(model, B: int, T: int, seed: int):
    """Random ids (B, T). The arithmetic does not depend on whether they are a text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator).to(model.device)


@torch.no_grad()
def hf_logits(hf, ids, attention: str = "eager"):
    """transformers' logits of ids (B, T), by the attention of that name: (B, T, V)."""
    hf.set_attn_implementation(attention)
    return hf(ids, use_cache=False).logits


@torch.no_grad()
def cached_logits(model, ids, sizes):
    """Our logits of the first sum(sizes) of ids (B, T), read through a KV cache in pieces of these sizes."""
    cache, out, start = KVCache(model.config, len(ids), model.device, model.dtype), [], 0
    for size in sizes:
        out.append(model(ids[:, start : start + size], cache=cache, start=start)[0])
        start += size
    return torch.cat(out, dim=1)


def decoded_logits(model, ids):
    """Logits of ids (B, T), row by row and token by token through decode.c."""
    out = []
    for row in ids.tolist():
        decoder = Decoder(model, check=False)  # the table compares it, and shows by how much it differs
        cache = KVCache(model.config, 1, model.device, model.dtype)
        out.append(torch.stack([decoder(i, cache, position) for position, i in enumerate(row)], dim=1))
    return torch.cat(out)


# ----------------------------------------------------------------------------------------------------------------------
# the checks: each yields its rows one by one, as they are computed


def architecture(hf, model) -> Iterator[Row]:
    """Every setting as each side understood it."""
    rope = hf.config.rope_parameters
    for f in fields(SmolLM2Config):
        theirs = rope["rope_theta"] if f.name == "rope_theta" else getattr(hf.config, f.name)
        ours = getattr(model.config, f.name)
        yield Row(f.name, (theirs, ours), theirs == ours)
    fixed = (  # settings of which model.py implements one value
        ("hidden_act", hf.config.hidden_act, "silu"),
        ("attention_bias", hf.config.attention_bias, False),
        ("mlp_bias", hf.config.mlp_bias, False),
        ("rope_type", rope["rope_type"], "default"),
    )
    for name, theirs, ours in fixed:
        yield Row(name, (theirs, ours), theirs == ours)
    theirs, ours = hf.num_parameters(), model.num_parameters()["total"]
    yield Row("parameters", (f"{theirs:,}", f"{ours:,}"), theirs == ours)


def weights(hf, model, loading: list[str], path) -> Iterator[Row]:
    """Every tensor. Names are compared as well, since transformers only warns of a tensor that it did not find, and
    goes on with random numbers."""
    yield Row("tensors missing, unexpected or misshapen", (len(loading), 0), not loading, "; ".join(loading[:3]))
    theirs, ours = dict(hf.named_parameters()), {checkpoint.hf_name(n): p for n, p in model.named_parameters()}
    stored = set(checkpoint.read_tensors(path))
    if model.config.tie_word_embeddings:
        stored.discard("lm_head.weight")  # some tools write the tied head a second time
    unmatched = (set(theirs) ^ set(ours)) | (stored ^ set(ours))
    yield Row("tensors, by name", (len(theirs), len(ours)), not unmatched, ", ".join(sorted(unmatched)[:3]))
    unequal = [n for n, p in ours.items() if n not in theirs or not torch.equal(p, theirs[n])]
    yield Row("of these bit-equal", (len(theirs), len(ours) - len(unequal)), not unequal, ", ".join(unequal[:3]))


@torch.no_grad()
def parts(hf, model, seed: int) -> Iterator[Row]:
    """Each kind of part in every layer, on the input it gets there; the row is the layer that agrees least."""
    config = model.config
    context = config.max_position_embeddings
    T = min(64, context)
    x = hf.model.embed_tokens(token_ids(model, 2, T, seed))  # (B, T, C)
    every = torch.arange(context, device=x.device)[None]
    theirs = torch.stack(hf.model.rotary_emb(x, every))[:, 0]  # cos and sin, (2, S, D)
    ours = torch.stack((model.rotary.cos, model.rotary.sin))
    worst = {f"RoPE tables, positions 0 to {context - 1}": measure(theirs, ours)}

    last = slice(context - T, context)  # the last positions there are, where a wrong theta shows most
    cos, sin = theirs[:, last]
    our_cos, our_sin = ours[:, last]
    causal = torch.full((T, T), -torch.inf, device=x.device).triu(1)[None, None]
    hf.set_attn_implementation("eager")
    for theirs, ours in zip(hf.model.layers, model.layers):
        normed = theirs.input_layernorm(x)
        q = theirs.self_attn.q_proj(normed).view(2, T, config.num_attention_heads, -1).transpose(1, 2)
        middle = theirs.post_attention_layernorm(x)
        pairs = {
            "RMSNorm": (normed, ours.input_layernorm(x)),
            "RoPE": (apply_rotary_pos_emb(q, q, cos[None], sin[None])[0], rotate(q, our_cos, our_sin)),
            "attention": (
                theirs.self_attn(normed, position_embeddings=(cos[None], sin[None]), attention_mask=causal)[0],
                ours.self_attn(normed, our_cos, our_sin),
            ),
            "MLP": (theirs.mlp(middle), ours.mlp(middle)),
        }
        after = theirs(x, attention_mask=causal, position_embeddings=(cos[None], sin[None]))
        pairs["block"] = (after, ours(x, our_cos, our_sin))
        for name, pair in pairs.items():
            worst[name] = max(worst.get(name, (0.0, 0.0)), measure(*pair), key=lambda m: m[1])
        x = after
    worst["last RMSNorm"] = measure(hf.model.norm(x), model.norm(x))
    for name, (largest, relative) in worst.items():
        yield Row(name, (f"{largest:.1e}", f"{relative:.1e}", f"{PART:.0e}"), relative <= PART)


def measure(theirs, ours) -> tuple[float, float]:
    """The largest difference, and the same in units of the largest value. NaN counts as an infinite difference."""
    largest = (theirs - ours).abs().max().nan_to_num(torch.inf).item()
    return largest, largest / theirs.abs().max().item()


def logits(hf, model, allowed: float, normal: Row, ids) -> Iterator[Row]:
    """A whole forward pass, of one row and of several. `normal`: how far transformers is from itself."""
    yield normal
    for batch in (ids[:1], ids):
        B, T = batch.shape
        with torch.no_grad():
            yield difference(f"{B} x {T} positions, against eager", hf_logits(hf, batch), model(batch)[0], allowed)


@torch.no_grad()
def far_logits(hf, model, allowed: float, context: int, seed: int) -> Iterator[Row]:
    """One row of `context` tokens through every layer, in one pass; then its end once more, with the rest cached."""
    ids = token_ids(model, 1, context, seed)
    near, end = min(2048, context) - 1, context - 1
    tail = min(8, context)
    positions = torch.tensor([0, 1, near, *range(context - tail, context)], device=ids.device)
    hf.set_attn_implementation("sdpa")
    found = hf(ids, use_cache=True, logits_to_keep=positions)
    theirs, past = found.logits, found.past_key_values
    cache, hidden = KVCache(model.config, 1, model.device, model.dtype), []
    hook = model.norm.register_forward_hook(lambda module, inputs, x: hidden.append(x[:, positions]))
    model(ids, cache=cache, logits_to_keep=1)
    hook.remove()
    ours = model.head(hidden[0])
    for position, i in {0: 0, 1: 1, near: 2, end: -1}.items():
        yield difference(f"position {position}", theirs[:, i], ours[:, i], allowed)

    # A product of one row adds in another order than one of thousands. Over 8,192 keys that shows, on both sides.
    past.crop(-1)
    alone = hf(ids[:, -1:], past_key_values=past).logits[:, -1]
    yield difference(f"transformers alone: position {end} cached", theirs[:, -1], alone, None)
    allowed = max(allowed, 2 * (theirs[:, -1] - alone).abs().max().item())
    for name, size in ((f"position {end}, cached", 1), (f"positions {context - tail} to {end}, cached", tail)):
        ours = model(ids[:, -size:], cache=cache, start=context - size)[0]
        yield difference(name, theirs[:, -size:], ours, allowed)


def gradients(hf, model, ids) -> Iterator[Row]:
    """Loss and the gradient of every parameter, some targets masked, by both of our ways to compute the loss."""
    labels = ids.clone()
    labels[0, :5] = -100
    hf.set_attn_implementation("eager")
    theirs = hf(ids, labels=labels, use_cache=False).loss
    theirs.backward()
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # transformers shifts its labels itself
    for name, loss_only in (("from the logits", False), ("in pieces", True)):
        ours = model(ids, targets, loss_only=loss_only)[1]
        d = abs(theirs.item() - ours.item())
        cells = f"{theirs.item():.6f}", f"{ours.item():.6f}", f"{d:.1e}", f"{FP32 / 5:.0e}"
        yield Row(f"loss, {name}", cells, d <= FP32 / 5)
        found = {}

        def take(parameter, name, found=found):  # compare a gradient and free it: memory for one set, not two
            reference = hf.get_parameter(checkpoint.hf_name(name)).grad
            found[name] = measure(reference, parameter.grad) if reference.any() else (0.0, 0.0)
            parameter.grad = None

        hooks = [p.register_post_accumulate_grad_hook(partial(take, name=n)) for n, p in model.named_parameters()]
        ours.backward()
        for hook in hooks:
            hook.remove()
        expected = [n for n, _ in model.named_parameters()]
        lost = [n for n in expected if n not in found]
        worst = max(found, key=lambda n: found[n][1])
        cells = len(expected), len(found), f"{found[worst][1]:.1e}", f"{GRADIENT:.0e}"
        ok = not lost and found[worst][1] <= GRADIENT
        yield Row("gradient of every parameter, worst of largest", cells, ok, "" if ok else (lost or [worst])[0])
    hf.zero_grad()


@torch.no_grad()
def cache(model, allowed: float, ids) -> Iterator[Row]:
    """Ours with a cache against ours without."""
    whole = model(ids)[0]
    T = ids.size(1)
    ways = {"one prefill": (T,), f"chunks of 5, 7, 1, {T - 13}": (5, 7, 1, T - 13), "token by token": (1,) * T}
    for name, sizes in ways.items():
        yield difference(f"{name}, {len(ids)} x {T} positions", whole, cached_logits(model, ids, sizes), allowed)
    if reason := reason_against(model):
        yield Row(f"decode.c: {reason}", ok=None)
    else:
        yield difference(f"decode.c, token by token, {T} positions", whole[:1], decoded_logits(model, ids[:1]), allowed)

    # the same weights with a context so short that the text outgrows it after a few tokens
    count, short = 8, min(32, model.config.max_position_embeddings)
    with torch.device("meta"):
        short_model = SmolLM2(replace(model.config, max_position_embeddings=short))
    short_model.load_state_dict(model.state_dict(), assign=True)
    short_model.rotary.to(model.device)
    for T in (short // 2, short - 1, short, short + 1, 2 * short + 6):
        prompt = ids.flatten()[:T]
        steps = list(generate(short_model, prompt, count, temperature=0, stop_ids=[], with_logits=True, use_c=False))
        new, cached = [int(i) for i, _ in steps], torch.cat([x for _, x in steps])
        whole, expected = without_cache(short_model, prompt, count)
        row = difference(f"a context of {short}, prompt of {T}, {count} tokens", whole, cached, allowed)
        yield replace(row, ok=row.ok and new == expected)


def without_cache(model, prompt, count: int):
    """What generate() documents, with a full pass for each token: logits (count, V) and the greedy ids."""
    context = model.config.max_position_embeddings
    window, out = prompt[-context:], []
    for _ in range(count):
        out.append(model(window[None], logits_to_keep=1)[0][0])
        if len(window) == context:  # full: the newer half stays
            window = window[-(context // 2) :]
        window = torch.cat((window, out[-1].argmax(-1)))
    out = torch.cat(out)
    return out, out.argmax(-1).tolist()


def greedy(hf, model, ids) -> Iterator[Row]:
    """The likeliest tokens after the prompts ids (B, T), by transformers' generate() and ours."""
    T = ids.size(1)
    count = min(64, model.config.max_position_embeddings - T)  # transformers does not stop at the end of the context
    hf.set_attn_implementation("eager")
    mask = torch.ones_like(ids)
    theirs = hf.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)[:, T:]
    steps = list(generate(model, ids, count, temperature=0, stop_ids=[], with_logits=True))
    ours = torch.stack([i for i, _ in steps], dim=1)
    first, second = torch.stack([x for _, x in steps]).topk(2).values.unbind(-1)
    same = int((theirs == ours).sum()) if theirs.shape == ours.shape else 0
    cells = theirs.numel(), same, f"{(first - second).min():.1e}"  # how close a choice of token ever was
    yield Row(f"{len(ids)} prompts, {count} tokens each", cells, same == theirs.numel() == len(ids) * count)
    name = f"the first prompt alone ({'model.py' if reason_against(model) else 'decode.c'})"
    try:
        alone = [int(i) for i in generate(model, ids[0], count, temperature=0, stop_ids=[])]
    except UserError as error:  # decode.c and model.py disagree on the first token
        yield Row(name, (count, 0), False, str(error))
        return
    same = sum(a == b for a, b in zip(theirs[0].tolist(), alone))
    yield Row(name, (count, same), same == count)


STRINGS = [  # where tokenizers go wrong
    "Hello, world!", "  two  spaces  ", "a  12", "x\n\n12", "   3", "2024-01-31 0.00001", "1st 22nd 333rd 4444",
    "\ttabs\tand\r\nreturns\r\n\r\n", "naïve façade Ærøskøbing", "Привет, мир", "你好，世界", "مرحبا ١٢٣", "²³½Ⅷ٣٤",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301", "don't we'll I'VE", "def f(x):\n    return x**2  # é", "http://a.b/c?d=1&e=%20", " ", "",
]  # fmt: skip


def tokenizer(path) -> Iterator[Row]:
    """Ids of strings that are easy to get wrong. transformers 5 builds some tokenizers from their class instead of
    from tokenizer.json (GPT2Tokenizer loses its Digits step), so AutoTokenizer's ids are reported and not judged."""
    file = str(Path(path) / "tokenizer.json")
    if not Path(file).is_file():
        yield Row("no tokenizer in this directory")
        return
    ours = [checkpoint.read_tokenizer(path).encode(s, add_special_tokens=False).ids for s in STRINGS]
    plain = Tokenizer.from_file(file)
    theirs = [plain.encode(s, add_special_tokens=False).ids for s in STRINGS]
    yield strings_row("against tokenizers", theirs, ours)
    fast = PreTrainedTokenizerFast(tokenizer_file=file)
    yield strings_row("against PreTrainedTokenizerFast", encode_hf(fast), ours)
    try:
        auto = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of any class: it reads many kinds of files
        yield Row("against AutoTokenizer", note=f"cannot load it: {str(error).splitlines()[0][:90]}")
        return
    row = strings_row(f"against AutoTokenizer, a {type(auto).__name__}", encode_hf(auto), ours)
    yield row if row.ok else replace(row, ok=None, note=row.note + ": believe tokenizer.json")


def encode_hf(tokenizer) -> list[list[int]]:
    return [tokenizer(s, add_special_tokens=False).input_ids for s in STRINGS]


def strings_row(name: str, theirs, ours) -> Row:
    unequal = [s for s, a, b in zip(STRINGS, theirs, ours) if a != b]
    note = f"differs on {', '.join(map(repr, unequal[:5]))}" if unequal else ""
    return Row(name, (len(STRINGS), len(STRINGS) - len(unequal)), not unequal, note)


@torch.no_grad()
def round_trip(hf, model, ids, folder) -> Iterator[Row]:
    """What save_pretrained writes, read again by both sides: not one bit may change."""
    checkpoint.save_pretrained(model, folder)
    again = checkpoint.from_pretrained(folder, device=model.device)
    hf_again, loading = load_original(folder, device=model.device)
    config = hf_again.config
    same = again.config == model.config and (config.rope_parameters, config.eos_token_id) == (
        hf.config.rope_parameters, hf.config.eos_token_id,
    )  # fmt: skip
    yield Row("config.json", ok=same)
    for name, before, after in (("transformers", hf, hf_again), ("ours", model, again)):
        a, b = dict(before.named_parameters()), dict(after.named_parameters())
        equal = sum(torch.equal(p, b[n]) for n, p in a.items() if n in b)
        yield Row(f"tensors, {name}", (len(a), equal), a.keys() == b.keys() and equal == len(a) and not loading)
    yield bit_equal("logits, transformers", hf_logits(hf, ids), hf_logits(hf_again, ids))
    yield bit_equal("logits, ours", model(ids)[0], again(ids)[0])


def bit_equal(name: str, before, after) -> Row:
    return Row(name, (f"{before.numel():,}", f"{int((before == after).sum()):,}"), torch.equal(before, after))


@torch.no_grad()
def precision(path, exact, ids, device) -> Iterator[Row]:
    """How far rounding to bf16 and int8 moves the logits, which is far more than any difference above. The measure of
    what is normal is transformers' own error in bf16, for int8 too, which transformers does not have."""

    def error(x):  # rms error of logits in units of their rms
        return ((x.float() - exact[:, : x.size(1)]).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()).item()

    def agreement(x):  # how often the likeliest token is that of fp32
        return f"{(x.argmax(-1) == exact[:, : x.size(1)].argmax(-1)).float().mean().item():.1%}"

    # the two parts whose arithmetic stays in fp32: the norms and the tables of RoPE
    hf, _ = load_original(path, torch.bfloat16, device)
    model = checkpoint.from_pretrained(path, device=device, dtype=torch.bfloat16)
    x = hf.model.embed_tokens(ids)  # (B, T, C) bf16
    x = (x / x.float().std()).to(torch.bfloat16)
    norm = hf.model.norm
    weight, wide = norm.weight.double(), x.double()
    true = wide / (wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * weight
    theirs, ours = ((y.double() - true).abs().mean().item() for y in (norm(x), model.norm(x)))
    cells = f"{theirs:.1e}", f"{ours:.1e}", "", f"{1.02 * theirs:.1e}"
    yield Row("RMSNorm of bf16, mean error", cells, ours <= 1.02 * theirs)

    tables = torch.stack((model.rotary.cos, model.rotary.sin)).float()
    every = torch.arange(len(model.rotary.cos), device=x.device)[None]
    off = (tables - torch.stack(hf.model.rotary_emb(tables[0], every))[:, 0]).abs().max().item()
    yield Row("RoPE tables of a bf16 model, error", ("", f"{off:.1e}", "", f"{PART:.0e}"), off <= PART)

    # the logits in bf16
    theirs, x = error(hf_logits(hf, ids)), model(ids)[0]
    T, few = ids.size(1), min(ids.size(1), 32)
    cells = f"{theirs:.2%}", f"{error(x):.2%}", agreement(x), f"{BF16 * theirs:.2%}"
    yield Row(f"bf16 logits, {T} positions", cells, error(x) <= BF16 * theirs)
    in_c = not reason_against(model)
    if in_c:
        x = decoded_logits(model, ids[:, :few])
        cells = "", f"{error(x):.2%}", agreement(x), f"{BF16 * theirs:.2%}"
        yield Row(f"decode.c, bf16 logits, {few} one by one", cells, error(x) <= BF16 * theirs)

    # and in int8: one pass, token by token, and decode.c each round at other places
    quantize(model, "int8")
    found = {
        f"{T} positions": cached_logits(model, ids, (T,)),
        f"{few} one by one": cached_logits(model, ids, (1,) * few),
    }
    if in_c:
        found["in decode.c"] = decoded_logits(model, ids[:, :few])
    for name, x in found.items():
        cells = "", f"{error(x):.2%}", agreement(x), f"{INT8 * theirs:.2%}"
        yield Row(f"int8 logits, {name}", cells, error(x) <= INT8 * theirs)


@torch.no_grad()
def bits_per_byte(path, text: str, device) -> Iterator[Row]:
    """What fewer bits cost on a real text: its bits per byte, and how often the likeliest next token stays the same.
    Random weights have no tokenizer, and predict no text."""
    if not (path / "tokenizer.json").is_file():
        yield Row("no tokenizer in this directory", ok=None)
        return
    model, tokenizer = checkpoint.load(path, device, torch.float32)
    ids, T = tokenizer.encode(text, add_special_tokens=False).ids, min(512, model.config.max_position_embeddings)
    B = max(1, min(2048, len(ids) - 1) // T)
    ids = ids[: B * T + 1]
    size = len(tokenizer.decode(ids[1:]).encode())
    ids = torch.tensor(ids, device=device)
    x, y = ids[:-1].view(B, -1), ids[1:].view(B, -1)

    def measured(model):
        logits = model(x)[0].float()
        nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        return nats / math.log(2) / size, logits.argmax(-1)

    exact, best = measured(model)
    yield Row(f"float32, {y.numel():,} tokens", (f"{exact:.4f}",))
    for name in ("bfloat16", "int8"):
        if name == "int8":
            quantize(model)
        else:
            model.to(torch.bfloat16)
        bits, likeliest = measured(model)
        same = (likeliest == best).float().mean().item()
        yield Row(name, (f"{bits:.4f}", f"{bits - exact:+.4f}", f"{same:.1%}", f"{BITS}"), bits - exact <= BITS)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def verify(s: Settings, folder: Path) -> list[Row]:
    """Print the table and return its rows; `folder` is scratch space for a few copies of the model."""
    started = time.perf_counter()
    text = read_text(s.text)
    seed = s.seed if s.seed is not None else time.time_ns() % 100_000
    device = pick_device(s.device)
    what = f"{s.model or f'random weights in the {s.shape} shape'}, seed {seed}"
    print(f"verify_hf: {what}\ntransformers {transformers.__version__}, torch {torch.__version__}, {device}, ", end="")
    print(f"{torch.get_num_threads()} threads; float32 on both sides unless a row says otherwise", flush=True)

    # the same files on both sides
    if s.model:
        path = checkpoint.find(s.model)
    else:
        path = folder / "random"
        save_random_model(path, PRESETS[s.shape], seed)
    if (path / "tokenizer.json").is_file():
        model, _ = checkpoint.load(path, device, torch.float32, copy=False)  # not copied: memory for what is compared
    else:  # weights can be compared without a tokenizer; its row says that there is none
        model = checkpoint.from_pretrained(path, device, torch.float32, copy=False)
    hf, loading = load_original(path, device=device)
    context = min(s.context, model.config.max_position_embeddings)
    if context < 16:
        raise UserError(f"a context of {context}: expected at least 16 positions to compare.")
    ids = token_ids(model, 3, min(128, context), seed)
    few = ids[:, :24]

    # how far apart two correct implementations are
    first, second = hf_logits(hf, ids, "eager"), hf_logits(hf, ids, "sdpa")
    normal = difference("transformers alone: eager against sdpa", first, second, None)
    allowed = max(FP32, 2 * (first - second).abs().max().item())
    del first, second

    # the table
    rows = []

    def section(title, columns, found):
        rows.extend(print_section(title, columns, found))

    numbers = "max diff", "mean diff", "same argmax", "allowed"
    section("architecture", ("original", "ours"), architecture(hf, model))
    section("weights", ("original", "ours"), weights(hf, model, loading, path))
    section("each part alone, the worst of all layers", ("max diff", "of largest", "allowed"), parts(hf, model, seed))
    section("logits", numbers, logits(hf, model, allowed, normal, ids))
    section(f"logits along {context:,} tokens", numbers, far_logits(hf, model, allowed, context, seed + 1))
    section("training", ("original", "ours", "diff", "allowed"), gradients(hf, model, ids[:2, :64]))
    section("KV cache against none", numbers, cache(model, allowed, few))
    prompts = ids[:, : min(17, context // 2)]
    section("greedy text against generate()", ("tokens", "equal", "closest call"), greedy(hf, model, prompts))
    section("tokenizer", ("strings", "equal"), tokenizer(path))
    section("saved and read again", ("before", "bit-equal"), round_trip(hf, model, few, folder / "again"))
    exact = hf_logits(hf, ids[:1])
    del hf, model  # memory for their bf16 copies
    columns = "original", "ours", "same argmax", "allowed"
    section("fewer bits: error against float32", columns, precision(path, exact, ids[:1], device))
    columns = "bits/byte", "more", "same argmax", "allowed"
    section(f"fewer bits: {Path(s.text).name}", columns, bits_per_byte(path, text, device))

    failed = [row.name for row in rows if row.ok is False]
    seconds = f"{time.perf_counter() - started:.0f} s"
    if failed:
        print(f"\n{len(failed)} of {len(rows)} rows FAIL ({seconds}): " + "; ".join(failed))
    else:
        print(f"\nall {sum(row.ok is not None for row in rows)} rows agree ({seconds})")
    return rows


def read_text(file: str) -> str:
    """The beginning of the text that --text names. UserError where it cannot be read or is too short to measure on."""
    try:
        text = Path(file).read_text(encoding="utf-8")[:20_000]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text={file}: {error}") from None
    if len(text) < 100:
        raise UserError(f"--text={file} has {len(text)} characters: expected at least 100 to measure on.")
    return text


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    warnings.simplefilter("ignore", FutureWarning)  # an argument is renamed in 5.24; the old name works until 5.40
    keep_freed_memory()
    transformers.logging.set_verbosity_error()  # its warnings are rows here
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="verify_hf_") as folder:
        rows = verify(s, Path(folder))
    if any(row.ok is False for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    guard(main)
