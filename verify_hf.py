"""
The same weights in transformers and here: do they agree, and how closely? One table; the exit code is 1 if a row fails.

    python verify_hf.py                                             # random weights in the 135M shape, offline
    python verify_hf.py --model=out/SmolLM2-135M-Instruct           # a trained run, or any SmolLM2 directory
    python verify_hf.py --model=HuggingFaceTB/SmolLM2-360M --context=2048

Two correct implementations differ in the last digits, and by how much depends on the weights: the released ones have
activations in the thousands. So the judge is transformers' model in float64, "the truth": ours may be twice as far from
it as transformers' own fp32, by the worse of its attentions, "eager" (the textbook formula) and "sdpa" (PyTorch's fused
kernel). Far along a text, where float64 takes minutes, it may be twice as far from transformers' nearest answer as they
(whole or cached, eager or sdpa) are from each other. A large model is compared part by part in every layer, and from
end to end with some of its layers. The input is a portion of --text where there is a tokenizer, else random ids.
"""

import copy
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from lib.device import pick_device, prepare_process
from lib.settings import Seed, UserError, Within, override, run_main

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import checkpoint
from fast.decode import Decoder, GpuDecoder, reason_against
from fast.ops import WIDEN_FROM
from fast.quantize import quantize
from model import PRESETS, KVCache, SmolLM2, SmolLM2Config, rotate
from prepare import PLAY
from sample import generate

Context = Annotated[int, Within(least=16)]


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: random weights, made on the spot
    shape: Literal["135M", "360M", "1.7B"] = "135M"  # which released shape the random weights take
    seed: Seed | None = None  # of random weights and of the portion of the text; none draws a new one, and prints it
    context: Context = 8192  # compare up to this many positions, or the model's own context if that is less
    text: str = str(PLAY)  # a text to read, and to measure in bits per byte; its first million characters
    tokens: Annotated[int, Within(least=0)] = 2048  # of the text, for the bits per byte; 0: all
    device: str = "cpu"  # where both sides run: cpu, cuda, mps, or auto


# what is allowed
WORSE = 2.0  # our error, in units of transformers' own
FLOOR = 2 * torch.finfo(torch.float32).eps  # and what is always allowed, in units of the largest value: four roundings
AFFORDABLE = 110e6  # weights of the layers that are compared end to end: all those of 135M
BITS = 0.01  # bits per byte that a text may cost more in bf16 or int8: a price, not a tolerance


# ----------------------------------------------------------------------------------------------------------------------
# the table


@dataclass
class Row:
    name: str
    cells: tuple = ()  # up to four, under the columns of their section
    ok: bool | None = None  # None: reported, not judged
    note: str = ""  # a line below the row
    ratio: float = 0.0  # our error in units of the allowed one


JUDGED = "original", "ours", "allowed"  # the first columns of a judged row
ATTENTIONS = "eager", "sdpa"


def judged(name: str, theirs: float, ours: float, floor=0.0, more: str = "", worse=WORSE) -> Row:
    """A row of two errors, transformers' and ours. NaN fails. Most floors are FLOOR times the largest value: where
    transformers is right to the last bit, ours may still round."""
    allowed = max(worse * theirs, floor)
    ratio = ours / allowed if allowed else 0.0 if ours == 0 else math.inf
    return Row(name, (f"{theirs:.1e}", f"{ours:.1e}", f"{allowed:.1e}", more), ratio <= 1, ratio=ratio)


def error(truth, x) -> float:
    """Of logits (..., V): the largest error of a position, averaged over the positions. The average, since a few
    positions, the second one often, err ten times as much as the rest, by luck. NaN counts as infinite."""
    return (x.to(truth) - truth).abs().amax(-1).mean().nan_to_num(torch.inf).item()


def measure(truth, x) -> float:
    """The largest error, in units of the largest value. NaN counts as infinite."""
    largest = (x.to(truth) - truth).abs().max().nan_to_num(torch.inf).item()
    return largest / (truth.abs().max().item() or 1.0)


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


def in_double(module):
    """A copy of a module of transformers that computes in float64 throughout: the truth. Its norms and its eager
    attention would round to fp32 inside. The tables of RoPE stay what fp32 makes them: they are part of the model."""
    device = next(module.parameters()).device
    exact = copy.deepcopy(module).to("cpu" if device.type == "mps" else device, torch.float64)  # mps has no float64
    for m in exact.modules():
        if isinstance(m, LlamaRMSNorm):
            m.forward = partial(F.rms_norm, normalized_shape=m.weight.shape, weight=m.weight, eps=m.variance_epsilon)
        if hasattr(m, "config"):  # the copy's own
            m.config._attn_implementation = "sdpa"
    return exact


def token_ids(model, B: int, T: int, seed: int, text=None):
    """Ids (B, T): a portion of the text's ids, which begins again at its end; random ones without a text."""
    generator = torch.Generator().manual_seed(seed)
    if text is None:
        return torch.randint(model.config.vocab_size, (B, T), generator=generator).to(model.device)
    first = torch.randint(len(text), (), generator=generator)
    return torch.tensor(text)[(first + torch.arange(B * T)) % len(text)].view(B, T).to(model.device)


@torch.no_grad()
def hf_logits(hf, ids, attention: str = "eager"):
    """transformers' logits of ids (B, T), by the attention of that name: (B, T, V)."""
    hf.set_attn_implementation(attention)
    return hf(ids.to(hf.device), use_cache=False).logits


def true_logits(hf, exact, ids, at=...):
    """The logits of ids (B, T) in float64, at an index of (B, T), and transformers' error there in fp32."""
    truth = hf_logits(exact, ids, "sdpa")[at]
    return truth, max(error(truth, hf_logits(hf, ids, attention)[at]) for attention in ATTENTIONS)


def against(name: str, truth, theirs: float, x) -> Row:
    """The row of our logits x (..., V)."""
    floor = FLOOR * truth.abs().max().item()
    same = (truth.argmax(-1) == x.to(truth).argmax(-1)).float().mean().item()
    return judged(name, theirs, error(truth, x), floor, f"{same:.2%}")


@torch.no_grad()
def cached_logits(model, ids, sizes, cache=None, start: int = 0):
    """Our logits of the sum(sizes) tokens of ids (B, T) from `start`, read through a KV cache in pieces of these sizes;
    `cache` holds what came before."""
    cache, out = cache or KVCache(model.config, len(ids), model.device, model.dtype), []
    for size in sizes:
        out.append(model(ids[:, start : start + size], cache=cache, start=start)[0])
        start += size
    return torch.cat(out, dim=1)


def fast_path(model) -> str:
    """What generate() takes after a prompt."""
    return "CUDA graph" if model.device.type == "cuda" else "model.py" if reason_against(model) else "decode.c"


def decoded_logits(model, ids):
    """Logits of ids (1, T), token by token through fast_path(), unchecked: the table shows by how much it differs."""
    decoder = (GpuDecoder if model.device.type == "cuda" else Decoder)(model, check=False)
    cache = KVCache(model.config, 1, model.device, model.dtype)
    return torch.stack([decoder([i], cache, position) for position, i in enumerate(ids[0].tolist())], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# the checks: each yields its rows one by one, as they are computed


def architecture(hf, model) -> Iterator[Row]:
    """Every setting as each side understood it."""
    rope = hf.config.rope_parameters
    theirs = {f.name: getattr(hf.config, f.name, rope.get(f.name)) for f in fields(SmolLM2Config)}
    ours = {f.name: getattr(model.config, f.name) for f in fields(SmolLM2Config)}
    fixed = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_type="default")  # model.py has one value
    theirs |= {name: getattr(hf.config, name, rope.get(name)) for name in fixed}
    theirs["parameters"], ours["parameters"] = f"{hf.num_parameters():,}", f"{model.num_parameters()['total']:,}"
    for name, value in (ours | fixed).items():
        yield Row(name, (theirs[name], value), theirs[name] == value)


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
def parts(hf, model, ids) -> Iterator[Row]:
    """Each kind of part in every layer, on the input it gets there from ids (B, T): the largest error of all layers, in
    units of the largest value, and how many of the numbers are those of eager to the last bit."""
    config, (B, T) = model.config, ids.shape
    context = config.max_position_embeddings
    x = hf.model.embed_tokens(ids)  # (B, T, C)
    every = torch.arange(context, device=x.device)[None]
    theirs = torch.stack(hf.model.rotary_emb(x, every))[:, 0]  # cos and sin, (2, S, D)
    tables = torch.stack((model.rotary.cos, model.rotary.sin))
    off, same = measure(theirs, tables), (theirs == tables).float().mean().item()
    yield judged(f"RoPE tables, positions 0 to {context - 1}", 0.0, off, FLOOR, f"{same:.2%}")

    cos, sin = theirs[:, None, context - T :]  # the last positions there are, where a wrong theta shows most
    place = tables[:, context - T :]
    causal = torch.full((T, T), -torch.inf, device=x.device).triu(1)[None, None]
    where = lambda x: dict(position_embeddings=(cos.to(x), sin.to(x)), attention_mask=causal.to(x))
    found = {}  # name: their error, our error and the share of equal bits in each layer

    def compare(name, part, layer, exact, x, ours):  # part: how a layer of transformers computes it from x
        truth, ways = part(exact, x.to(next(exact.parameters()))), []
        for attention in ATTENTIONS[::-1]:
            hf.set_attn_implementation(attention)
            ways.append(part(layer, x))
        same = (ways[-1] == ours).float().mean().item()
        found.setdefault(name, []).append((max(measure(truth, y) for y in ways), measure(truth, ours), same))
        return ways[-1]  # eager's

    for layer, ours in zip(hf.model.layers, model.layers):
        both = layer, in_double(layer)
        normed = compare("RMSNorm", lambda its, x: its.input_layernorm(x), *both, x, ours.input_layernorm(x))
        q = layer.self_attn.q_proj(normed).view(B, T, config.num_attention_heads, -1).transpose(1, 2)
        compare("RoPE", lambda _, q: apply_rotary_pos_emb(q, q, cos.to(q), sin.to(q))[0], *both, q, rotate(q, *place))
        attended = ours.self_attn(normed, *place)
        compare("attention", lambda its, x: its.self_attn(x, **where(x))[0], *both, normed, attended)
        middle = layer.post_attention_layernorm(x)
        compare("MLP", lambda its, x: its.mlp(x), *both, middle, ours.mlp(middle))
        x = compare("block", lambda its, x: its(x, **where(x)), *both, x, ours(x, *place))
    norm = hf.model.norm
    compare("last RMSNorm", lambda its, x: its(x), norm, in_double(norm), x, model.norm(x))
    for name, layers in found.items():
        theirs, ours, same = zip(*layers)
        yield judged(name, max(theirs), max(ours), FLOOR, f"{sum(same) / len(same):.2%}")


@torch.no_grad()
def logits(hf, model, exact, ids) -> Iterator[Row]:
    """A whole forward pass, of one row and of several; the last column is the share of eager's bits."""
    for batch in (ids[:1], ids):
        ours, name = model(batch)[0], f"{len(batch)} x {batch.size(1)} positions"
        row = against(name, *true_logits(hf, exact, batch), ours)
        same = (ours == hf_logits(hf, batch)).float().mean().item()
        yield replace(row, cells=(*row.cells[:3], f"{same:.2%}"))


@torch.no_grad()
def far_logits(hf, model, exact, ids) -> Iterator[Row]:
    """A long row, ids (1, S), in one pass; then its end once more, with the rest cached. The beginning is judged by the
    truth; what is far by how much transformers differs from itself: all in one pass, the end by eager and sdpa after a
    cached rest, and token by token."""
    S = ids.size(1)
    few, tail, near = min(128, S // 2), min(8, S // 4), min(2048, S * 3 // 4)
    positions = torch.cat([torch.arange(few), torch.arange(near - tail, near), torch.arange(S - tail, S)])
    cut = lambda x: x.split((few, tail, tail), dim=1)
    hf.set_attn_implementation("sdpa")
    found = hf(ids, use_cache=True, logits_to_keep=positions.to(ids.device))
    (first, *whole), past = cut(found.logits), found.past_key_values
    cache = KVCache(model.config, 1, model.device, model.dtype)
    with model.norm.register_forward_hook(lambda module, inputs, x: x[:, positions]):  # not the logits of all
        ours, middle, end = cut(model(ids, cache=cache)[0])

    truth, theirs = true_logits(hf, exact, ids[:, :few])
    yield against(f"positions 0 to {few - 1}", truth, max(theirs, error(truth, first)), ours)

    ways = {}
    for stop, x in zip((S, near), reversed(whole)):  # backwards, since what is cropped is gone
        ways[stop] = [x]
        for attention, size in (("eager", tail), ("sdpa", tail), ("sdpa", 1)):
            hf.set_attn_implementation(attention)
            past.crop(stop - tail - past.get_seq_length())
            pieces = ids[:, stop - tail : stop].split(size, dim=1)
            ways[stop].append(torch.cat([hf(piece, past_key_values=past).logits for piece in pieces], dim=1))
    chunk, single = (cached_logits(model, ids, sizes, cache, S - tail) for sizes in ((tail,), (1,) * tail))
    for how, stop, x in (("", near, middle), ("", S, end), (", cached", S, chunk), (", one by one", S, single)):
        spread = max(error(a, b) for a, b in combinations(ways[stop], 2))
        nearest = min(ways[stop], key=lambda way: error(way, x))
        yield against(f"positions {stop - tail} to {stop - 1}{how}", nearest, spread, x)


def gradients(hf, model, exact, ids) -> Iterator[Row]:
    """Loss and the gradient of every parameter, some targets masked, by both of our ways to compute the loss. Errors of
    a gradient are in units of its largest value, and compared parameter by parameter, with transformers' median where
    its own is less; the row is the parameter that is closest to what is allowed."""
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[0, :4] = -100
    true = dict(exact.named_parameters())

    def loss_of(hf, attention):
        hf.set_attn_implementation(attention)
        logits = hf(ids.to(hf.device), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(hf.device))

    def errors(side, loss):  # of the loss, and of every gradient, which is freed
        loss.backward()
        found = {"loss": abs(loss.item() - truth.item())}
        for name, p in side.named_parameters():
            name = name if side is hf else checkpoint.hf_name(name)
            found[name] = torch.inf if p.grad is None else measure(true[name].grad, p.grad)
            p.grad = None
        return found

    truth = loss_of(exact, "sdpa")
    truth.backward()
    eager, sdpa = (errors(hf, loss_of(hf, attention)) for attention in ATTENTIONS)
    median = sorted(eager.values())[len(eager) // 2]
    theirs = {name: max(eager[name], sdpa[name], median * (name != "loss")) for name in eager}
    for name, loss_only in (("from the logits", False), ("in pieces", True)):
        loss = model(ids, targets, loss_only=loss_only)[1]
        ours = errors(model, loss)
        floor = 4 * FLOOR * truth.item()
        yield judged(f"loss, {name}", theirs["loss"], ours.pop("loss"), floor, f"{loss.item():.6f}")
        worst = max(ours, key=lambda name: ours[name] / max(theirs[name], FLOOR))
        row = judged(f"gradient of every parameter, {name}", theirs[worst], ours[worst], FLOOR, f"{len(ours)}")
        yield row if row.ok else replace(row, note=worst)
    exact.zero_grad()


@torch.no_grad()
def cache(hf, model, exact, ids) -> Iterator[Row]:
    """Ours through a KV cache, of ids (B, T); transformers' error is that without one."""
    T = ids.size(1)
    truth, theirs = true_logits(hf, exact, ids)
    ways = {"one prefill": (T,), f"chunks of 5, 7, 1, {T - 13}": (5, 7, 1, T - 13), "token by token": (1,) * T}
    for name, sizes in ways.items():
        yield against(f"{name}, {len(ids)} x {T} positions", truth, theirs, cached_logits(model, ids, sizes))
    if fast_path(model) == "model.py":
        yield Row(f"decode.c: {reason_against(model)}", ok=None)
    else:
        name = f"{fast_path(model)}, token by token, {T} positions"
        yield against(name, truth[:1], theirs, decoded_logits(model, ids[:1]))

    # the same weights with a context so short that the text outgrows it after a few tokens
    count, short = 4, min(32, model.config.max_position_embeddings)
    with torch.device("meta"):
        short_model = SmolLM2(replace(model.config, max_position_embeddings=short))
    short_model.load_state_dict(model.state_dict(), assign=True)
    short_model.rotary.to(model.device)
    for T in (short // 2, short - 1, short, short + 1, 2 * short + 6):
        prompt = ids.flatten()[:T]
        steps = list(generate(short_model, prompt, count, temperature=0, stop_ids=[], with_logits=True, fast=False))
        new, x = torch.cat([i for i, _ in steps]), torch.cat([x for _, x in steps])
        windows, last = windows_of(prompt, new, short)
        truth, theirs = true_logits(hf, exact, windows, (torch.arange(count), last))
        row = against(f"a context of {short}, prompt of {T}, {count} tokens", truth, theirs, x)
        yield replace(row, ok=row.ok and torch.equal(truth.argmax(-1).to(new.device), new))


def windows_of(prompt, new, context: int):
    """What generate() documents that each of the `new` tokens follows, padded (count, at most context), and the index
    of the last id of each. Where the context is full, its newer half stays."""
    windows, window = [], prompt[-context:]
    for token in new:
        windows.append(window)
        window = torch.cat((window[-(context // 2) :] if len(window) == context else window, token[None]))
    return torch.nn.utils.rnn.pad_sequence(windows, batch_first=True), torch.tensor([len(w) - 1 for w in windows])


def greedy(hf, model, ids) -> Iterator[Row]:
    """The likeliest tokens after the prompts ids (B, T), by transformers' generate() and ours."""
    T = ids.size(1)
    count = min(64, model.config.max_position_embeddings - T)  # transformers does not stop at the end of the context
    hf.set_attn_implementation("eager")
    theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[:, T:]
    steps = list(generate(model, ids, count, temperature=0, stop_ids=[], with_logits=True, fast=False))
    ours = torch.stack([i for i, _ in steps], dim=1)
    first, second = torch.stack([x for _, x in steps]).topk(2).values.unbind(-1)
    same = int((theirs == ours).sum()) if theirs.shape == ours.shape else 0
    cells = theirs.numel(), same, f"{(first - second).min():.1e}"  # how close a choice of token ever was
    yield Row(f"{len(ids)} prompts, {count} tokens each", cells, same == theirs.numel() == len(ids) * count)
    by = fast_path(model)
    for name, prompts in ((f"the same ({by})", ids), (f"the first prompt alone ({by})", ids[:1])):
        cells = len(prompts) * count
        try:
            found = torch.stack(list(generate(model, prompts, count, temperature=0, stop_ids=[])), dim=1)
        except UserError as error:  # the fast path and model.py disagree on a first token
            yield Row(name, (cells, 0), False, str(error))
            continue
        same = int((theirs[: len(prompts)] == found).sum()) if len(found.T) == count else 0
        yield Row(name, (cells, same), same == cells)


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
    encoded = lambda its: [its(s, add_special_tokens=False).input_ids for s in STRINGS]
    yield strings_row("against tokenizers", [plain.encode(s, add_special_tokens=False).ids for s in STRINGS], ours)
    fast = PreTrainedTokenizerFast(tokenizer_file=file)
    yield strings_row("against PreTrainedTokenizerFast", encoded(fast), ours)
    try:
        auto = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # of any class: it reads many kinds of files
        yield Row("against AutoTokenizer", note=f"cannot load it: {str(error).splitlines()[0][:90]}")
        return
    row = strings_row(f"against AutoTokenizer, a {type(auto).__name__}", encoded(auto), ours)
    yield row if row.ok else replace(row, ok=None, note=row.note + ": believe tokenizer.json")


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
    read = lambda hf: (hf.config.rope_parameters, hf.config.eos_token_id)
    yield Row("config.json", ok=again.config == model.config and read(hf) == read(hf_again))
    for name, before, after in (("transformers", hf, hf_again), ("ours", model, again)):
        a, b = dict(before.named_parameters()), dict(after.named_parameters())
        equal = sum(torch.equal(p, b[n]) for n, p in a.items() if n in b)
        yield Row(f"tensors, {name}", (len(a), equal), a.keys() == b.keys() and equal == len(a) and not loading)
    yield bit_equal("logits, transformers", hf_logits(hf, ids), hf_logits(hf_again, ids))
    yield bit_equal("logits, ours", model(ids)[0], again(ids)[0])


def bit_equal(name: str, before, after) -> Row:
    return Row(name, (f"{before.numel():,}", f"{int((before == after).sum()):,}"), torch.equal(before, after))


@torch.no_grad()
def precision(path, truth, ids, device) -> Iterator[Row]:
    """How far rounding to bf16 and int8 moves the logits of ids (B, T): the rms error in units of their rms. For int8,
    which transformers does not have, its matrices are rounded here, by the plain rule: 127 steps to a row's largest."""
    hf, _ = load_original(path, torch.bfloat16, device)
    model = checkpoint.from_pretrained(path, device=device, dtype=torch.bfloat16)

    # the two parts whose arithmetic stays in fp32: the norms and the tables of RoPE
    x = hf.model.embed_tokens(ids)  # (B, T, C) bf16
    x = (x / x.float().std()).to(torch.bfloat16)
    exact = in_double(hf.model.norm)
    true = exact(x.to(exact.weight))
    theirs, ours = ((norm(x).to(true) - true).abs().mean().item() for norm in (hf.model.norm, model.norm))
    yield judged("RMSNorm of bf16, mean error", theirs, ours, worse=1.02)  # both round once; a sum in bf16 shows
    tables = torch.stack((model.rotary.cos, model.rotary.sin)).float()
    every = torch.arange(tables.size(1), device=x.device)[None]
    off = measure(torch.stack(hf.model.rotary_emb(tables[0], every))[:, 0], tables)
    yield judged("RoPE tables of a bf16 model", 0.0, off, FLOOR)

    # one pass (which a CPU may compute in fp32: ops.worth_widening), passes too short for that, token by token, and
    # decode.c each round at other places
    T = ids.size(1)
    few = min(T, WIDEN_FROM // 2)
    pieces = [min(few, T - start) for start in range(0, T, few)]
    for bits in ("bf16", "int8"):
        if bits == "int8":
            quantize(model, "int8")
            for p in hf.parameters():
                if p.dim() == 2:
                    step = p.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
                    p.copy_((p / step).round() * step)
        theirs = [hf_logits(hf, ids, attention) for attention in ATTENTIONS]
        ways = {f"{T} positions": model(ids)[0]}
        if len(pieces) > 1:
            ways[f"{T} in pieces of {few}"] = cached_logits(model, ids, pieces)
        ways[f"{few} one by one"] = cached_logits(model, ids, (1,) * few)
        if fast_path(model) != "model.py":
            ways[f"{few} in {fast_path(model)}"] = decoded_logits(model, ids[:, :few])
        for name, x in ways.items():
            at = slice(len(x)), slice(x.size(1))
            true = truth[at]
            *normal, off = (((y[at].to(true) - true).norm() / true.norm()).item() for y in (*theirs, x))
            same = (true.argmax(-1) == x.to(true).argmax(-1)).float().mean().item()
            yield judged(f"{bits} logits, {name}", max(normal), off, more=f"{same:.1%}")


@torch.no_grad()
def bits_per_byte(path, text: str, device, tokens: int = 2048) -> Iterator[Row]:
    """What fewer bits cost on the beginning of a text: its bits per byte, and how often the likeliest next token stays
    the same. Random weights have no tokenizer, and predict no text."""
    if not (path / "tokenizer.json").is_file():
        yield Row("no tokenizer in this directory", ok=None)
        return
    model, tokenizer = checkpoint.load(path, device, torch.float32)
    ids, T = tokenizer.encode(text, add_special_tokens=False).ids, min(512, model.config.max_position_embeddings)
    B = max(1, min(tokens or len(ids), len(ids) - 1) // T)
    ids = ids[: B * T + 1]
    size = len(tokenizer.decode(ids[1:]).encode())
    ids = torch.tensor(ids, device=device)
    x, y = ids[:-1].view(B, -1), ids[1:].view(B, -1)

    def measured(model):
        nats, likeliest = 0.0, []
        for row, following in zip(x, y):
            logits = model(row[None])[0][0].float()
            nats += F.cross_entropy(logits, following, reduction="sum").item()
            likeliest.append(logits.argmax(-1))
        return nats / math.log(2) / size, torch.cat(likeliest)

    exact, best = measured(model)
    note = f"the first {size:,} of {len(text.encode()):,} bytes"
    yield Row(f"float32, {y.numel():,} tokens", (f"{exact:.4f}",), note=note)
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


def fewer_layers(path: Path, count: int, folder: Path) -> str:
    """Write a copy of the model with `count` of its layers, from the first to the last; returns which."""
    model = checkpoint.from_pretrained(path, dtype=torch.float32, copy=False)
    total = len(model.layers)
    keep = sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})
    model.layers = torch.nn.ModuleList(model.layers[i] for i in keep)
    model.config = replace(model.config, num_hidden_layers=len(keep))
    checkpoint.save_pretrained(model, folder)
    return f"layers {', '.join(map(str, keep))} of {total}"


def verify(s: Settings, folder: Path) -> list[Row]:
    """Print the table and return its rows; `folder` is scratch space for a few copies of the model."""
    started, busy = time.perf_counter(), time.process_time()
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
    load, text_ids = checkpoint.from_pretrained, None  # weights can be compared without a tokenizer: a row says so
    if (path / "tokenizer.json").is_file():
        load = lambda *a, **k: checkpoint.load(*a, **k)[0]
        text_ids = checkpoint.read_tokenizer(path).encode(text, add_special_tokens=False).ids
    model = load(path, device, torch.float32, copy=False)  # not copied: memory for the rest
    hf, loading = load_original(path, device=device)
    context = min(s.context, model.config.max_position_embeddings)
    if context < 16:
        raise UserError(f"a context of {context}: expected at least 16 positions to compare.")
    ids = token_ids(model, 3, min(128, context), seed, text_ids)
    few = ids[:, :24]

    # the table
    rows = []

    def section(title, columns, found):
        rows.extend(print_section(title, columns, found))

    section("architecture", ("original", "ours"), architecture(hf, model))
    section("weights", ("original", "ours"), weights(hf, model, loading, path))
    bits, columns = (*JUDGED, "equal bits"), (*JUDGED, "same argmax")
    section("each part alone: worst error of all layers", bits, parts(hf, model, ids[:2, :64]))
    whole, count = path, max(2, int(AFFORDABLE / model.num_parameters()["backbone"] * len(model.layers)))
    if count < len(model.layers):
        path = folder / "fewer"
        print(f"\nfrom here to the end: {fewer_layers(whole, count, path)}", flush=True)
        model = checkpoint.from_pretrained(path, device, torch.float32, copy=False)
        hf, _ = load_original(path, device=device)
    exact = in_double(hf)
    section("logits: error against float64", bits, logits(hf, model, exact, ids))
    far = token_ids(model, 1, context, seed + 1, text_ids)
    section(f"logits along {context:,} tokens: error, or spread", columns, far_logits(hf, model, exact, far))
    section("training: error against float64", (*JUDGED, "value"), gradients(hf, model, exact, ids[:2, :64]))
    section("KV cache: error against float64", columns, cache(hf, model, exact, few))
    truth = hf_logits(exact, ids[:1], "sdpa")
    del exact
    prompts = ids[:, : min(17, context // 2)]
    section("greedy text against generate()", ("tokens", "equal", "closest call"), greedy(hf, model, prompts))
    section("tokenizer", ("strings", "equal"), tokenizer(whole))
    section("saved and read again", ("before", "bit-equal"), round_trip(hf, model, few, folder / "again"))
    del hf, model  # memory for their bf16 copies
    section("fewer bits: error against float64", columns, precision(path, truth, ids[:1], device))
    columns = "bits/byte", "more", "same argmax", "allowed"
    section(f"fewer bits: {Path(s.text).name}", columns, bits_per_byte(whole, text, device, s.tokens))

    failed = [row.name for row in rows if row.ok is False]
    seconds = f"{time.perf_counter() - started:.0f} s, {time.process_time() - busy:.0f} of CPU"
    close = max(rows, key=lambda row: row.ratio)
    if failed:
        print(f"\n{len(failed)} of {len(rows)} rows FAIL ({seconds}): " + "; ".join(failed))
    else:
        print(f"\nall {sum(row.ok is not None for row in rows)} rows agree ({seconds})")
        print(f"  the closest call: {close.name}, at {close.ratio:.0%} of what is allowed")
    return rows


def read_text(file: str) -> str:
    """The text that --text names, up to a million characters. UserError where there is none, or too little."""
    try:
        text = Path(file).read_text(encoding="utf-8")[:1_000_000]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text={file}: {error}") from None
    if len(text) < 100:
        raise UserError(f"--text={file} has {len(text)} characters: expected at least 100 to measure on.")
    return text


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    warnings.simplefilter("ignore", FutureWarning)  # an argument is renamed in 5.24; the old name works until 5.40
    prepare_process()
    transformers.logging.set_verbosity_error()  # its warnings are rows here
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="verify_hf_") as folder:
        rows = verify(s, Path(folder))
    if any(row.ok is False for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
