"""
Do the same weights give the same numbers in transformers and here? One table; the exit code is 1 if a row fails.

    python verify_hf.py                                             # random weights in the 135M shape, offline
    python verify_hf.py --model=out/SmolLM2-135M-Instruct           # a trained run, or any SmolLM2 directory
    python verify_hf.py --model=HuggingFaceTB/SmolLM2-360M --context=2048

Two correct implementations differ in the last digits, and by how much depends on the weights: the released ones have
activations in the thousands. So the judge is transformers' model in float64, "the truth": our error may be twice that
of transformers' own fp32, by the worse of its attentions, "eager" (the textbook formula) and "sdpa" (PyTorch's fused
kernel). Far along a text, where float64 takes minutes, our distance from transformers' nearest answer may be twice the
distance between transformers' own answers. A large model is compared part by part in every layer, and from end to end
with its first layers. The input is a portion of the bundled play if there is a tokenizer, else random ids.
"""

import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from lib.device import pick_device, prepare_process
from lib.settings import Seed, Within, override, run_main

import torch
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

import checkpoint
from fast.decode import Decoder, reason_against
from fast.graphs import GpuDecoder
from fast.quantize import quantize
from model import PRESETS, KVCache, SmolLM2, SmolLM2Config, rotate
from prepare import PLAY
from sample import generate


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: random weights
    shape: Literal["135M", "360M", "1.7B"] = "135M"  # the released shape of the random weights
    seed: Seed | None = None  # of random weights and of the portion of the play; none draws a new one, and prints it
    context: Annotated[int, Within(least=16)] = 8192  # compare up to this many positions, at most the model's context
    device: str = "cpu"  # of both sides: cpu, cuda, mps, or auto


# what is allowed
WORSE = 2.0  # our error, in units of transformers' own
FLOOR = 2 * torch.finfo(torch.float32).eps  # and what is always allowed, in units of the largest value: four roundings
AFFORDABLE = 110e6  # weights of the layers that are compared end to end: all those of 135M
SHORT = 32  # positions of a short piece: fewer than fast/ takes for a prompt that is worth computing in fp32


# ----------------------------------------------------------------------------------------------------------------------
# the table


@dataclass
class Row:
    name: str
    cells: tuple  # up to four, under the columns of their section
    ok: bool
    note: str = ""  # printed below the row


JUDGED = "original", "ours", "allowed"  # the first columns of a judged row
ATTENTIONS = "eager", "sdpa"


def judged(name: str, theirs: float, ours: float, floor=0.0, more: str = "") -> Row:
    """Compare two errors, transformers' and ours. NaN fails. The floor lets ours round if transformers' answer is right
    to the last bit; most floors are FLOOR times the largest value."""
    allowed = max(WORSE * theirs, floor)
    return Row(name, (f"{theirs:.1e}", f"{ours:.1e}", f"{allowed:.1e}", more), ours <= allowed)


def error(truth, x) -> float:
    """Return the mean over positions of the largest error of logits (..., V). A mean, since a few positions, often the
    second one, have ten times the error of the others by chance. NaN counts as infinite."""
    return (x.to(truth) - truth).abs().amax(-1).mean().nan_to_num(torch.inf).item()


def measure(truth, x) -> float:
    """Return the largest error in units of the largest value. NaN counts as infinite."""
    largest = (x.to(truth) - truth).abs().max().nan_to_num(torch.inf).item()
    return largest / (truth.abs().max().item() or 1.0)


def print_section(done: list[Row], title: str, columns: tuple, rows: Iterator[Row]):
    """Print each row as soon as it is known, and append it to `done`."""
    line = "{:<48}" + "{:>14}" * 4 + "{:>6}"
    print("\n" + line.format(title, *columns, *[""] * (5 - len(columns))).rstrip(), flush=True)
    for row in rows:
        cells = [f"{c:.6g}" if isinstance(c, float) else str(c) for c in row.cells] + [""] * (4 - len(row.cells))
        print(line.format("  " + row.name, *cells, "ok" if row.ok else "FAIL"), flush=True)
        if row.note:
            print("    " + row.note, flush=True)
        done.append(row)


# ----------------------------------------------------------------------------------------------------------------------
# the two sides


def save_random_model(path: Path, config: SmolLM2Config, seed: int) -> Path:
    """Build a LlamaForCausalLM of that shape with random weights, and save it, all by transformers."""
    torch.manual_seed(seed)
    # a wide distribution, since mistakes in attention do not show if it is nearly uniform
    changes = {"initializer_range": config.hidden_size**-0.5}
    hf = LlamaForCausalLM(LlamaConfig(**checkpoint.config_to_dict(config, torch.float32) | changes))
    for p in hf.parameters():
        if p.dim() == 1:  # norm weights start as ones: a norm that ignores its weight would not show
            torch.nn.init.normal_(p, 1.0, 0.1)
    hf.save_pretrained(path)
    return path


def load_ours(path: Path, device="cpu") -> SmolLM2:
    """Load our model in fp32, as users run it. load() also checks that a tokenizer belongs to the weights."""
    if (path / "tokenizer.json").is_file():
        return checkpoint.load(path, device, torch.float32, copy=False)[0]  # not copied: memory for the rest
    return checkpoint.speed_up(checkpoint.from_pretrained(path, device, torch.float32, copy=False))


def load_original(path, device="cpu") -> tuple[LlamaForCausalLM, list[str]]:
    """Load transformers' model in fp32, and list the problems with its tensors: warnings there, a failed row here."""
    settings = dict(dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True)
    hf, found = LlamaForCausalLM.from_pretrained(path, **settings)
    # greedy decoding, whatever sampling settings and end token generation_config.json has
    hf.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return hf.to(device).eval(), [f"{kind}: {name}" for kind, names in found.items() for name in sorted(names)]


def in_double(module):
    """Copy a module of transformers so that it computes in float64 throughout: the truth. Without changes its norms and
    its eager attention would round to fp32. RoPE's tables keep their fp32 numbers: they are part of the model."""
    device = next(module.parameters()).device
    exact = copy.deepcopy(module).to("cpu" if device.type == "mps" else device, torch.float64)  # mps has no float64
    for m in exact.modules():
        if isinstance(m, LlamaRMSNorm):
            m.forward = partial(F.rms_norm, normalized_shape=m.weight.shape, weight=m.weight, eps=m.variance_epsilon)
        if hasattr(m, "config"):  # a copy, too
            m.config._attn_implementation = "sdpa"
    return exact


def token_ids(model, B: int, T: int, seed: int, text=None):
    """Return ids (B, T): a portion of the text's ids, which starts over at its end; random ids without a text."""
    generator = torch.Generator().manual_seed(seed)
    if text is None:
        return torch.randint(model.config.vocab_size, (B, T), generator=generator).to(model.device)
    first = torch.randint(len(text), (), generator=generator)
    return torch.tensor(text)[(first + torch.arange(B * T)) % len(text)].view(B, T).to(model.device)


def hf_logits(hf, ids, attention: str = "eager"):
    """Return transformers' logits (B, T, V) of ids (B, T), computed by the attention of that name."""
    hf.set_attn_implementation(attention)
    return hf(ids.to(hf.device), use_cache=False).logits


def true_logits(hf, exact, ids):
    """Return the float64 logits of ids (B, T), and transformers' error in fp32."""
    truth = hf_logits(exact, ids, "sdpa")
    return truth, max(error(truth, hf_logits(hf, ids, attention)) for attention in ATTENTIONS)


def against(name: str, truth, theirs: float, x) -> Row:
    """Judge our logits x (..., V)."""
    floor = FLOOR * truth.abs().max().item()
    same = (truth.argmax(-1) == x.to(truth).argmax(-1)).float().mean().item()
    return judged(name, theirs, error(truth, x), floor, f"{same:.2%}")


@torch.no_grad()
def cached_logits(model, ids, sizes, cache=None, start: int = 0):
    """Return our logits of the sum(sizes) tokens of ids (B, T) from `start`, read through a KV cache in pieces of these
    sizes; `cache` holds the tokens before `start`."""
    cache, out = cache or KVCache(model.config, len(ids), model.device, model.dtype), []
    for size in sizes:
        out.append(model(ids[:, start : start + size], cache=cache, start=start)[0])
        start += size
    return torch.cat(out, dim=1)


def fast_path(model) -> str:
    """Name what computes the tokens after a prompt in generate()."""
    return "CUDA graph" if model.device.type == "cuda" else "model.py" if reason_against(model) else "decode.c"


def decoded_logits(model, ids):
    """Return logits of ids (1, T), token by token through fast_path(). NaN if that has fallen back to model.py."""
    decoder = GpuDecoder(model) if model.device.type == "cuda" else Decoder(model, check=False)
    cache = KVCache(model.config, 1, model.device, model.dtype)
    logits = torch.stack([decoder(i[None], cache, position) for position, i in enumerate(ids[0])], dim=1)
    return logits if model.device.type == "cpu" or decoder.recording.trusted else logits * torch.nan


# ----------------------------------------------------------------------------------------------------------------------
# the checks: each yields its rows one by one, as they are computed


def architecture(hf, model) -> Iterator[Row]:
    """Compare every setting as each side understood it. (checkpoint.py refuses what model.py has no setting for.)"""
    theirs = {f.name: getattr(hf.config, f.name, hf.config.rope_parameters.get(f.name)) for f in fields(SmolLM2Config)}
    theirs["parameters"] = f"{hf.num_parameters():,}"
    ours = asdict(model.config) | {"parameters": f"{model.num_parameters()['total']:,}"}
    for name, value in ours.items():
        yield Row(name, (theirs[name], value), theirs[name] == value)


def weights(hf, model, loading: list[str]) -> Iterator[Row]:
    """Compare every tensor. transformers only warns about a tensor that it did not find, and continues with random
    numbers; `loading` has these warnings."""
    yield Row("tensors missing, unexpected or misshapen", (len(loading), 0), not loading, "; ".join(loading[:3]))
    theirs, ours = dict(hf.named_parameters()), {checkpoint.hf_name(n): p for n, p in model.named_parameters()}
    unmatched = sorted(set(theirs) ^ set(ours))
    yield Row("tensors, by name", (len(theirs), len(ours)), not unmatched, ", ".join(unmatched[:3]))
    unequal = [n for n, p in ours.items() if n not in theirs or not torch.equal(p, theirs[n])]
    yield Row("of these bit-equal", (len(theirs), len(ours) - len(unequal)), not unequal, ", ".join(unequal[:3]))


@torch.no_grad()
def parts(hf, model, ids) -> Iterator[Row]:
    """Compare each kind of part in every layer, on the input that it gets there from ids (B, T): the largest error of
    all layers, in units of the largest value."""
    config, (B, T) = model.config, ids.shape
    context = config.max_position_embeddings
    x = hf.model.embed_tokens(ids)  # (B, T, C)
    every = torch.arange(context, device=x.device)[None]
    theirs = torch.stack(hf.model.rotary_emb(x, every))[:, 0]  # cos and sin, (2, S, D)
    tables = torch.stack(model.rotary.at(slice(None), x.device))
    yield judged(f"RoPE tables, positions 0 to {context - 1}", 0.0, measure(theirs, tables), FLOOR)

    cos, sin = theirs[:, None, context - T :]  # at the last positions a wrong theta shows most
    place = tables[:, context - T :]
    causal = torch.full((T, T), -torch.inf, device=x.device).triu(1)[None, None]
    at = lambda x: dict(position_embeddings=(cos.to(x), sin.to(x)), attention_mask=causal.to(x))
    rotated = lambda its, q: apply_rotary_pos_emb(q, q, cos.to(q), sin.to(q))[0]
    found = {}  # name: (their error, our error) of each layer

    def compare(name, part, layer, exact, x, ours):  # part: computes it from x in a layer of transformers
        truth, ways = part(exact, x.to(next(exact.parameters()))), []
        for attention in ATTENTIONS[::-1]:
            hf.set_attn_implementation(attention)
            ways.append(part(layer, x))
        found.setdefault(name, []).append((max(measure(truth, y) for y in ways), measure(truth, ours)))
        return ways[-1]  # eager's

    for layer, ours in zip(hf.model.layers, model.layers):
        both = layer, in_double(layer)
        normed = compare("RMSNorm", lambda its, x: its.input_layernorm(x), *both, x, ours.input_layernorm(x))
        q = layer.self_attn.q_proj(normed).view(B, T, config.num_attention_heads, -1).transpose(1, 2)
        compare("RoPE rotation", rotated, *both, q, rotate(q, *place))
        attended = ours.self_attn(normed, *place)
        compare("attention", lambda its, x: its.self_attn(x, **at(x))[0], *both, normed, attended)
        middle = layer.post_attention_layernorm(x)
        compare("MLP", lambda its, x: its.mlp(x), *both, middle, ours.mlp(middle))
        x = compare("block", lambda its, x: its(x, **at(x)), *both, x, ours(x, *place))
    norm = hf.model.norm
    compare("last RMSNorm", lambda its, x: its(x), norm, in_double(norm), x, model.norm(x))
    for name, layers in found.items():
        theirs, ours = map(max, zip(*layers))
        yield judged(name, theirs, ours, FLOOR)


@torch.no_grad()
def logits(hf, model, exact, ids) -> Iterator[Row]:
    """Compare a whole forward pass of one row and of several."""
    for batch in (ids[:1], ids):
        yield against(f"{len(batch)} x {batch.size(1)} positions", *true_logits(hf, exact, batch), model(batch)[0])


@torch.no_grad()
def far_logits(hf, model, exact, ids) -> Iterator[Row]:
    """Compare a long row, ids (1, S), in one pass; then its end again, with the rest cached. The truth judges the
    beginning; the distances between transformers' own ways to compute the end judge the end."""
    S = ids.size(1)
    few, tail = min(128, S // 2), min(8, S // 4)
    positions = torch.cat([torch.arange(few), torch.arange(S - tail, S)])
    hf.set_attn_implementation("sdpa")
    found = hf(ids, use_cache=True, logits_to_keep=positions.to(ids.device))
    (first, whole), past = found.logits.split((few, tail), dim=1), found.past_key_values
    cache = KVCache(model.config, 1, model.device, model.dtype)
    with model.norm.register_forward_hook(lambda module, inputs, x: x[:, positions]):  # not the logits of all
        ours, end = model(ids, cache=cache)[0].split((few, tail), dim=1)
    truth, theirs = true_logits(hf, exact, ids[:, :few])
    yield against(f"positions 0 to {few - 1}", truth, max(theirs, error(truth, first)), ours)

    ways = [whole]
    for attention, size in (("eager", tail), ("sdpa", tail), ("sdpa", 1)):
        hf.set_attn_implementation(attention)
        past.crop(S - tail - past.get_seq_length())
        pieces = ids[:, S - tail :].split(size, dim=1)
        ways.append(torch.cat([hf(piece, past_key_values=past).logits for piece in pieces], dim=1))
    spread = max(error(a, b) for a, b in combinations(ways, 2))
    chunk, single = (cached_logits(model, ids, sizes, cache, S - tail) for sizes in ((tail,), (1,) * tail))
    for how, x in (("", end), (", cached", chunk), (", one by one", single)):
        nearest = min(ways, key=lambda way: error(way, x))
        yield against(f"positions {S - tail} to {S - 1}{how}", nearest, spread, x)


def gradients(hf, model, exact, ids) -> Iterator[Row]:
    """Compare the loss and every gradient, with some targets masked, for both of our ways to compute the loss. The
    error of a gradient is in units of its largest value; if transformers' is below its median, the median counts."""
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    targets[0, :4] = -100
    true = dict(exact.named_parameters())

    def loss_of(hf, attention):
        return F.cross_entropy(hf_logits(hf, ids, attention).flatten(0, 1), targets.flatten().to(hf.device))

    def errors(side, loss):  # of the loss and of every gradient; frees the gradients
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
        # the row is that of the parameter that is closest to what is allowed
        worst = max(ours, key=lambda name: ours[name] / max(theirs[name], FLOOR))
        row = judged(f"gradient of every parameter, {name}", theirs[worst], ours[worst], FLOOR, f"{len(ours)}")
        yield row if row.ok else replace(row, note=worst)
    exact.zero_grad()


@torch.no_grad()
def cache(hf, model, exact, ids) -> Iterator[Row]:
    """Compare ids (B, T) through our KV cache; transformers' error is its error without a cache."""
    T = ids.size(1)
    truth, theirs = true_logits(hf, exact, ids)
    ways = {"one prefill": (T,), f"chunks of 5, 7, 1, {T - 13}": (5, 7, 1, T - 13), "token by token": (1,) * T}
    for name, sizes in ways.items():
        yield against(f"{name}, {len(ids)} x {T} positions", truth, theirs, cached_logits(model, ids, sizes))
    if fast_path(model) != "model.py":
        name = f"{fast_path(model)}, token by token, {T} positions"
        yield against(name, truth[:1], theirs, decoded_logits(model, ids[:1]))


def greedy(hf, model, ids) -> Iterator[Row]:
    """Compare the greedy text after the prompts ids (B, T): transformers' generate() against ours."""
    T = ids.size(1)
    count = min(64, model.config.max_position_embeddings - T)  # transformers does not stop at the end of the context
    hf.set_attn_implementation("eager")
    theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)[:, T:]
    for way, fast in {"model.py": False, fast_path(model): True}.items():
        ours = torch.stack(list(generate(model, ids, count, temperature=0, stop_ids=[], fast=fast)), dim=1)
        same = int((theirs == ours).sum())
        yield Row(f"{len(ids)} prompts, {count} tokens each, {way}", (len(ids) * count, same), same == len(ids) * count)


@torch.no_grad()
def precision(hf, model, truth, ids) -> Iterator[Row]:
    """Compare how far rounding the weights to bf16 and int8 moves the logits of ids (B, T): the rms error in units of
    their rms. transformers has no such int8, so its matrices are rounded here. Changes both models."""
    # one pass (which fast/ may compute in fp32), short pieces, token by token and decode.c round in different places
    T = ids.size(1)
    few = min(T, SHORT)
    pieces = [piece.size(1) for piece in ids.split(few, dim=1)]
    for bits in ("bf16", "int8"):
        model = model.to(torch.bfloat16) if bits == "bf16" else quantize(model, "int8")
        for p in hf.parameters():  # not hf.to(), which would round RoPE's tables as well
            if bits == "bf16":
                p.data = p.to(torch.bfloat16)
            elif p.dim() == 2:
                step = p.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # to the largest of a row
                p.copy_((p / step).round() * step)
        theirs = [hf_logits(hf, ids, attention) for attention in ATTENTIONS]
        ways = {f"{T} positions": model(ids)[0], f"{T} in pieces of {few}": cached_logits(model, ids, pieces)}
        ways[f"{few} one by one"] = cached_logits(model, ids, (1,) * few)
        if fast_path(model) != "model.py":
            ways[f"{few} in {fast_path(model)}"] = decoded_logits(model, ids[:, :few])
        for name, x in ways.items():
            at = slice(len(x)), slice(x.size(1))
            true = truth[at]
            *normal, off = (((y[at].to(true) - true).norm() / true.norm()).item() for y in (*theirs, x))
            same = (true.argmax(-1) == x.to(true).argmax(-1)).float().mean().item()
            yield judged(f"{bits} logits, {name}", max(normal), off, more=f"{same:.1%}")


# ----------------------------------------------------------------------------------------------------------------------
# the command


def verify(s: Settings, folder: Path) -> list[str]:
    """Print the table and return the names of the rows that fail; `folder` is scratch space for random weights."""
    started = time.perf_counter()
    seed = s.seed if s.seed is not None else time.time_ns() % 100_000
    device = pick_device(s.device)
    what = f"{s.model or f'random weights in the {s.shape} shape'}, seed {seed}"
    print(f"verify_hf: {what}\ntransformers {transformers.__version__}, torch {torch.__version__}, {device}, float32")

    # the same files on both sides
    path = checkpoint.find(s.model) if s.model else save_random_model(folder / "random", PRESETS[s.shape], seed)
    text_ids = None
    if (path / "tokenizer.json").is_file():
        text_ids = checkpoint.read_tokenizer(path).encode(PLAY.read_text(encoding="utf-8")).ids
    model = load_ours(path, device)
    hf, loading = load_original(path, device=device)
    context = min(s.context, model.config.max_position_embeddings)
    ids = token_ids(model, 3, min(128, context), seed, text_ids)

    # the table
    rows = []
    section = partial(print_section, rows)
    section("architecture", ("original", "ours"), architecture(hf, model))
    section("weights", ("original", "ours"), weights(hf, model, loading))
    section("each part alone: worst error of all layers", JUDGED, parts(hf, model, ids[:2, :64]))
    count = max(2, int(AFFORDABLE / model.num_parameters()["backbone"] * len(model.layers)))
    if count < len(model.layers):
        print(f"\nfrom here to the end: the first {count} of {len(model.layers)} layers", flush=True)
        model.layers, hf.model.layers = model.layers[:count], hf.model.layers[:count]
        model.config, hf.config.num_hidden_layers = replace(model.config, num_hidden_layers=count), count
    exact = in_double(hf)
    columns = (*JUDGED, "same argmax")
    section("logits: error against float64", columns, logits(hf, model, exact, ids))
    far = token_ids(model, 1, context, seed + 1, text_ids)
    section(f"logits along {context:,} tokens: error, or spread", columns, far_logits(hf, model, exact, far))
    section("training: error against float64", (*JUDGED, "value"), gradients(hf, model, exact, ids[:2, :64]))
    section("KV cache: error against float64", columns, cache(hf, model, exact, ids[:, :24]))
    prompts = ids[:, : min(17, context // 2)]
    section("greedy text against generate()", ("tokens", "equal"), greedy(hf, model, prompts))
    truth = hf_logits(exact, ids[:1], "sdpa").detach()
    section("fewer bits: error against float64", columns, precision(hf, model, truth, ids[:1]))

    failed, seconds = [row.name for row in rows if not row.ok], f"({time.perf_counter() - started:.0f} s)"
    result = f"{len(failed)} of {len(rows)} rows FAIL {seconds}: {'; '.join(failed)}"
    print(f"\n{result if failed else f'all {len(rows)} rows agree {seconds}'}")
    return failed


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    warnings.simplefilter("ignore", FutureWarning)  # an argument is renamed in 5.24; the old name works until 5.40
    prepare_process()
    transformers.logging.set_verbosity_error()  # its warnings are rows here
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="verify_hf_") as folder:
        if verify(s, Path(folder)):
            raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
