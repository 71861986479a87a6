"""
Generate text from a model.

    python sample.py                        # the newest run under out/
    python sample.py --model=out/tiny_shakespeare --prompt="ROMEO:" --num_samples=3 --temperature=0.7 --top_k=50

    from checkpoint import load
    from sample import generate
    model, tokenizer = load("out/tiny_shakespeare")
    for ids in generate(model, tokenizer.encode("ROMEO:").ids, max_new_tokens=100): ...  # (B,) ids a step
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from lib.device import pick_device, pick_dtype, prepare_process
from lib.files import read_errors_as_user_error
from lib.settings import Count, Seed, UserError, Within, check, is_text, override, run_main

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from checkpoint import find, load, metadata, newest_run
from model import KVCache

Temperature, Penalty = Annotated[float, Within(least=0, most=100)], Annotated[float, Within(least=0.01, most=100)]
TopP, MinP = Annotated[float, Within(above=0, most=1)], Annotated[float, Within(least=0, most=1)]


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    prompt: str = "\n"  # the text to continue; FILE:notes.txt reads it from a file
    num_samples: Count = 1  # how many continuations, one after the other
    max_new_tokens: Count = 200  # at most this many tokens each; fewer if the model ends the text
    temperature: Temperature = 0.8  # 0 takes the likeliest token each time, 1 the model's own odds; higher is wilder
    top_k: Count | None = None  # choose among the k likeliest tokens only; none is off
    top_p: TopP | None = None  # ... among the fewest tokens that hold this much of the probability
    min_p: MinP | None = None  # ... among tokens at least this fraction as likely as the likeliest
    repetition_penalty: Penalty = 1.0  # above 1 makes tokens that have occurred less likely; 1.1 is a lot
    seed: Seed = 1337  # sample i uses seed + i, so that each can be repeated alone
    device: str = "auto"  # cuda, mps, cpu; auto takes the first that is available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto keeps the file's
    fast: bool = True  # False: model.py as it is, several times slower than decode.c or CUDA graphs
    quantize: Literal["", "int8"] = ""  # int8: one byte per weight


# From logits to the next token. Logits are (B, V), fp32; -inf marks a token as impossible.


def penalize_repetition(logits, seen, penalty: float):
    """Scale down the tokens already in `seen` (B, S) (https://arxiv.org/abs/1909.05858, section 4.1)."""
    score = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(score > 0, score / penalty, score * penalty))


def keep_top_k(logits, k: int):
    """Keep exactly the k largest, even if several equal the k-th."""
    values, ids = logits.topk(min(k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(1, ids, values)


def keep_top_p(logits, p: float):
    """Keep the fewest tokens that together have probability p (https://arxiv.org/abs/1904.09751, section 3.1)."""
    values, ids = logits.sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of the likelier ones together; 0 for the first
    return torch.full_like(logits, -torch.inf).scatter(1, ids, values.masked_fill(before >= p, -torch.inf))


def keep_min_p(logits, p: float):
    """Keep tokens at least p times as likely as the likeliest (https://arxiv.org/abs/2407.01082, section 3)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def next_token(
    logits, seen=None, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, generator=None
):
    """Draw one token per row: logits (B, V) -> ids (B,), -1 if they are not finite. The order is transformers'."""
    logits = logits.float()
    if repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, repetition_penalty)
    greedy = temperature < 1e-5  # the rest then has probability 0, and the division could overflow
    logits = logits if greedy else logits / temperature
    largest, likeliest = logits.max(dim=-1)
    if greedy:
        return torch.where(largest.isfinite(), likeliest, -1)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    # Look up one random number per row in the cumulative probabilities. torch.multinomial draws one for every token,
    # which takes a millisecond at 49,152.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
    up_to = logits.to(wide).softmax(-1).cumsum(-1)
    draw = torch.rand(len(logits), 1, dtype=wide, device=logits.device, generator=generator)
    drawn = torch.searchsorted(up_to, draw * up_to[:, -1:], right=True)[:, 0]
    return torch.where(largest.isfinite(), drawn, -1)


PREFILL_CHUNK = 2048  # prompt tokens per forward pass: 25 MB of the MLP's features at 135M, in fp32


@torch.inference_mode()
def prefill(model, ids, cache, start: int = 0):
    """Run ids (B, T) through the model into the cache, in chunks; return the logits of the last position, (B, V)."""
    for chunk in ids.split(max(1, PREFILL_CHUNK // len(ids)), dim=1):
        logits, _ = model(chunk, cache=cache, start=start, logits_to_keep=1)
        start += chunk.size(1)
    return logits[:, -1]


def generate(
    model, prompt_ids, max_new_tokens=200, temperature=0.8, top_k=None, top_p=None, min_p=None,
    repetition_penalty=1.0, seed=None, stop_ids=None, with_logits=False, fast=True, cache=None, cached=0,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Yield the next token ids, (B,) int64 on the model's device, one tensor a step; with_logits: (ids, logits (B, V)).

    prompt_ids: a list of ids, or (B, T) rows of one length. A prompt longer than the context loses its beginning.
    temperature 0 is greedy. seed None draws a new one. Calls do not disturb each other or the caller's random numbers.
    stop_ids: the ids that end a text, by default the model's. A row ends with one, and repeats it until all have ended.
    fast: use what fast.speed_up attached; the logits are the same up to rounding.
    cache, cached: a cache that already holds the first `cached` ids of the prompt, such as a conversation's.

    When the context is full, its newer half is read again from position 0, and generation continues.
    """
    # check the arguments
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    filters["repetition_penalty"] = repetition_penalty
    check(Settings, max_new_tokens=max_new_tokens, seed=seed or 0, **filters)
    context, V = model.config.max_position_embeddings, model.config.vocab_size
    ids = torch.atleast_2d(torch.as_tensor(prompt_ids, dtype=torch.int64, device=model.device))  # (B, T)
    if ids.numel() == 0 or not 0 <= int(ids.min()) <= int(ids.max()) < V:
        raise UserError(f"a prompt is one or more ids from 0 to {V - 1}: was it encoded by another tokenizer?")

    # what this call owns: stop ids, a random generator, a cache, a decoder of single tokens
    stop = torch.tensor(sorted(model.config.eos_ids if stop_ids is None else stop_ids), device=ids.device)
    generator = torch.Generator(device=ids.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    cached = min(cached, ids.size(1) - 1) if ids.size(1) <= context else 0  # at least one is read, for its logits
    cache = cache or KVCache(model.config, len(ids), model.device, model.dtype)
    decoder = model.make_decoder(len(ids)) if fast and model.make_decoder else None

    # read the prompt
    held = min(ids.size(1), context)  # how many of the ids the cache holds: the last ones
    logits = prefill(model, ids[:, cached - held :], cache, cached)

    for n in range(max_new_tokens):
        # choose the next token of each row
        with torch.inference_mode():
            new = torch.where(ended, ids[:, -1], next_token(logits, ids, **filters, generator=generator))
            ended = ended | torch.isin(new, stop)
            lowest, all_ended = torch.stack((new.min(), ended.all())).tolist()  # the only GPU synchronization
        if lowest < 0:
            raise UserError("the model's logits are not finite: its weights are damaged, or its training has diverged.")
        yield (new, logits) if with_logits else new
        if n == max_new_tokens - 1 or all_ended:
            return

        # compute the logits that follow it
        ids = torch.cat((ids, new[:, None]), dim=1)
        if held == context:
            held = context // 2 + 1
            logits = prefill(model, ids[:, -held:], cache)
        else:
            logits = decoder(new, cache, held) if decoder else prefill(model, new[:, None], cache, held)
            held += 1


def stream_text(tokenizer: Tokenizer, steps: Iterator[torch.Tensor]) -> Iterator[str]:
    """Yield the text of row 0, one piece per step: "" for special tokens, and for all but the last token of a character
    whose bytes span several."""
    stream, shown, ids = DecodeStream(skip_special_tokens=True), 0, []
    for step in steps:
        ids.append(int(step[0]))
        piece = stream.step(tokenizer, ids[-1]) or ""
        shown += len(piece)
        yield piece
    if rest := tokenizer.decode(ids, skip_special_tokens=True)[shown:]:  # a character cut off by the end
        yield rest


def encode_prompt(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    """Encode a prompt, or a line break if it is empty; of a long one the end, more than enough for the context."""
    if not is_text(prompt):
        raise UserError(f"the prompt is not valid text: {ascii(prompt)[:80]}.")
    return tokenizer.encode(prompt[-64 * context :] or "\n", add_special_tokens=False).ids


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    prepare_process()
    prompt = s.prompt
    if prompt.startswith("FILE:"):
        with read_errors_as_user_error(prompt[5:], "--prompt=FILE:name reads a text in UTF-8."):
            prompt = Path(prompt[5:]).read_text(encoding="utf-8")

    # the model, and a line about it on stderr: stdout gets the text alone
    path, device = s.model or newest_run(), pick_device(s.device)
    model, tokenizer = load(path, device, pick_dtype(s.dtype), s.quantize, fast=s.fast)
    facts = [f"{model.num_parameters()['total']:,} parameters", device, s.quantize or str(model.dtype)[6:]]
    header = metadata(find(path))
    facts += [f"{key} {header[key]}" for key in ("step", "val_bpb", "untrained") if key in header]
    print(f"{path}: " + ", ".join(facts), file=sys.stderr)

    # the samples, each followed by its speed on stderr
    prompt_ids = encode_prompt(tokenizer, prompt, model.config.max_position_embeddings)
    for i in range(s.num_samples):
        print(prompt, end="", flush=True)
        times = [time.perf_counter()]
        filters = s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty
        steps = generate(model, prompt_ids, s.max_new_tokens, *filters, seed=(s.seed + i) % 2**63, fast=s.fast)
        for piece in stream_text(tokenizer, (times.append(time.perf_counter()) or ids for ids in steps)):
            print(piece, end="", flush=True)
        print()
        first, n = times[1] - times[0], len(times) - 1
        rate = f", {(n - 1) / (times[-1] - times[1]):.1f} tokens/s" if n > 1 else ""
        print(f"[{n} tokens, the first after {first:.2f} s{rate}]", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
