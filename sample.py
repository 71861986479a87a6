"""
Text from a model: from logits to the next token, generate(), and the command that prints text as it comes.

    python sample.py                                                    # the newest run under out/
    python sample.py --model=out/tiny_shakespeare --prompt="ROMEO:" --num_samples=3 --temperature=0.7 --top_k=50
    python sample.py --model=HuggingFaceTB/SmolLM2-135M --prompt="Gravity is" --dtype=bfloat16

    from checkpoint import load
    from sample import generate
    model, tokenizer = load("out/tiny_shakespeare")
    for ids in generate(model, tokenizer.encode("ROMEO:").ids, max_new_tokens=100): ...     # (B,) ids a step

generate() is the only sampler: chat.py, app.py, bench.py, train.py and the tests share it.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from lib.device import pick_device, pick_dtype, prepare_process
from lib.files import read_errors_as_user_error
from lib.settings import Count, Seed, UserError, Within, check, is_text, override, run_main

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from checkpoint import find, load, metadata, newest_run
from fast.decode import pick_decoder, reason_against
from model import KVCache

Temperature, Penalty = Annotated[float, Within(least=0, most=100)], Annotated[float, Within(least=0.01, most=100)]
TopP, MinP = Annotated[float, Within(above=0, most=1)], Annotated[float, Within(least=0, most=1)]


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    prompt: str = "\n"  # the text to go on from; FILE:notes.txt reads it from a file
    num_samples: Count = 1  # how many continuations, one after the other
    max_new_tokens: Count = 200  # at most this many tokens each; fewer where the model ends the text
    temperature: Temperature = 0.8  # 0 takes the likeliest token each time; 1 the model's own odds; higher is wilder
    top_k: Count | None = None  # choose among the k likeliest tokens only; none is off
    top_p: TopP | None = None  # ... among the fewest tokens that hold this much of the probability
    min_p: MinP | None = None  # ... among tokens at least this fraction as likely as the likeliest
    repetition_penalty: Penalty = 1.0  # above 1 makes tokens that have occurred less likely; 1.1 is a lot
    seed: Seed = 1337  # sample i uses seed + i, so one sample can be had again alone
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is what the file holds
    fast: bool = True  # tokens after the prompt: by decode.c on a CPU, by a CUDA graph on a GPU; False: by model.py as
    #                     it is written, several times slower
    quantize: Literal["", "int8"] = ""  # int8: weights of one byte, so that decode.c reads half of what bfloat16 takes


# ----------------------------------------------------------------------------------------------------------------------
# from logits to the next token: each of these takes and returns logits (B, V), fp32; -inf marks a token as impossible


def penalize_repetition(logits, seen, penalty: float):
    """Scale down the tokens already in `seen` (B, S): positive logits are divided, negative ones multiplied
    (CTRL, https://arxiv.org/abs/1909.05858, section 4.1)."""
    score = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(score > 0, score / penalty, score * penalty))


def keep_top_k(logits, k: int):
    """Exactly the k largest stay, also where several are equal to the k-th; k beyond the vocabulary keeps all."""
    values, ids = logits.topk(min(k, logits.size(-1)), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(1, ids, values)


def keep_top_p(logits, p: float):
    """The fewest tokens whose probabilities add up to at least p (https://arxiv.org/abs/1904.09751, section 3.1)."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier ones hold together; 0 for the first
    return torch.full_like(logits, -torch.inf).scatter(1, ids, values.masked_fill(before >= p, -torch.inf))


def keep_min_p(logits, p: float):
    """Tokens at least p times as likely as the likeliest (https://arxiv.org/abs/2407.01082, section 3)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def next_token(
    logits, seen=None, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, generator=None
):
    """Draw one token per row: logits (B, V) -> ids (B,). The order of the steps is transformers'."""
    logits = logits.float()
    if repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, repetition_penalty)
    greedy = temperature < 1e-5  # so little leaves no other token a chance, and dividing by it could overflow
    logits = logits if greedy else logits / temperature
    largest, likeliest = logits.max(dim=-1)
    if not bool(torch.isfinite(largest).all()):
        raise UserError("the model's logits are not finite: its weights are damaged, or its training has diverged.")
    if greedy:
        return likeliest
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    # Draw one random number per row and take the token in whose stretch of the cumulative probabilities it falls; a
    # token of probability 0 has no stretch. (torch.multinomial draws one for every token: a millisecond at 49,152.)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no fp64
    up_to = logits.to(wide).softmax(-1).cumsum(-1)
    draw = torch.rand(len(logits), 1, dtype=wide, device=logits.device, generator=generator)
    return torch.searchsorted(up_to, draw * up_to[:, -1:], right=True)[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# generating

MAX_PROMPT = 10_000_000  # characters
PREFILL_CHUNK = 2048  # prompt tokens per forward pass: 25 MB of the MLP's features at 135M, in fp32


@torch.inference_mode()
def prefill(model, ids, cache, start: int = 0):
    """Run ids (B, T) through the model into the cache, in chunks; the logits of the last position, (B, V)."""
    width = max(1, PREFILL_CHUNK // len(ids))
    for a in range(0, ids.size(1), width):
        chunk = ids[:, a : a + width]
        logits, _ = model(chunk, cache=cache, start=start + a, logits_to_keep=1)
    return logits[:, -1]


def generate(
    model, prompt_ids, max_new_tokens: int = 200, temperature: float = 0.8, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
    seed: int | None = None, stop_ids=None, with_logits: bool = False, fast: bool = True,
    cache: KVCache | None = None, cached: int = 0,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Yield the next token ids, (B,) int64 on the model's device, one tensor a step; with_logits: (ids, logits (B, V)).

    prompt_ids: a list of ids, or (B, T) rows of one length. temperature 0 is greedy. seed None draws a new one; a
    request has a generator and a cache of its own, so requests do not disturb each other or the caller's RNG.
    fast: after the prompt, rows on a CPU go through decode.c (up to decode.MAX_ROWS) and rows on a GPU through a CUDA
    graph, with the same logits to rounding; False: through model.py as it is written.
    cache, cached: a cache that holds the first `cached` of the prompt's ids already, as a conversation's does; what is
    read goes there. By default a new one.
    stop_ids: the ids that end a text, by default the model's eos_token_id. The id itself is yielded; a row that has
    ended yields it again until the other rows have ended too.

    Past the context: when all max_position_embeddings positions are taken, the newer half of them is kept and read
    again from position 0, and generation goes on. A prompt longer than the context is cut at its beginning likewise.
    """
    # check what was asked
    filters = dict(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )  # fmt: skip
    check(Settings, max_new_tokens=max_new_tokens, **filters, **({} if seed is None else {"seed": seed}))
    context = model.config.max_position_embeddings
    ids = torch.as_tensor(prompt_ids, dtype=torch.int64, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids  # (B, T)
    if ids.dim() != 2 or ids.size(1) == 0:
        raise UserError("an empty prompt: the model needs at least one token to go on from.")
    if int(ids.max()) >= model.config.vocab_size or int(ids.min()) < 0:
        raise UserError(f"prompt ids must be 0 .. {model.config.vocab_size - 1}: was it encoded by another tokenizer?")

    # what this request owns: a random generator, the ids that end a row, a cache
    stop = torch.tensor(sorted(model.config.eos_ids if stop_ids is None else stop_ids), device=ids.device)
    generator = torch.Generator(device=ids.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    window = ids[:, -context:]  # what the cache stands for: position p holds window[:, p]
    cached = min(cached, ids.size(1) - 1) if ids.size(1) <= context else 0  # one is left to read, for its logits
    cache = cache or KVCache(model.config, len(ids), model.device, model.dtype)
    decoder = pick_decoder(model, len(ids)) if fast else None

    # read the prompt, all of it at once
    logits = prefill(model, window[:, cached:], cache, cached)

    for n in range(max_new_tokens):
        # choose the next token of each row
        with torch.inference_mode():
            new = next_token(logits, ids, **filters, generator=generator)
            if n > 0:
                new = torch.where(ended, ids[:, -1], new)
            ended = ended | torch.isin(new, stop)
        yield (new, logits) if with_logits else new
        if n == max_new_tokens - 1 or bool(ended.all()):
            return

        # compute the logits that follow it, from what is cached; a full window starts again with its newer half
        ids = torch.cat((ids, new[:, None]), dim=1)
        if window.size(1) == context:
            window = torch.cat((window[:, -(context // 2) :], new[:, None]), dim=1)[:, -context:]
            logits = prefill(model, window, cache)
        else:
            window = torch.cat((window, new[:, None]), dim=1)
            start = window.size(1) - 1
            logits = decoder(new.tolist(), cache, start) if decoder else prefill(model, new[:, None], cache, start)


def stream_text(tokenizer: Tokenizer, steps: Iterator[torch.Tensor]) -> Iterator[str]:
    """Text of row 0 as it grows, one piece per step. A character whose bytes span tokens comes out whole, when its last
    token is there, and special tokens have no text: those steps yield "", so that a caller can still stop there."""
    stream, shown, ids = DecodeStream(skip_special_tokens=True), 0, []
    for step in steps:
        ids.append(int(step[0]))
        piece = stream.step(tokenizer, ids[-1]) or ""
        shown += len(piece)
        yield piece
    rest = tokenizer.decode(ids, skip_special_tokens=True)[shown:]  # a character cut off by the end
    if rest:
        yield rest


# ----------------------------------------------------------------------------------------------------------------------
# the command


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    prepare_process()
    prompt = read_prompt(s.prompt)

    # the model, and a line about it on stderr: the text alone goes to stdout
    path = s.model or newest_run()
    device = pick_device(s.device)
    model, tokenizer = load(path, device, pick_dtype(s.dtype), s.quantize)
    facts = [f"{model.num_parameters()['total']:,} parameters", device, s.quantize or str(model.dtype)[6:]]
    meta = metadata(find(path))
    facts += [f"{key} {meta[key]}" for key in ("step", "val_bpb") if key in meta]
    if "untrained" in meta:
        facts.append("NOT TRAINED YET: these are the random weights the run began with")
    print(f"{path}: " + ", ".join(facts), file=sys.stderr)
    if s.fast and device == "cpu" and (reason := reason_against(model)):
        print(f"slower than it need be, by model.py alone: {reason}", file=sys.stderr)

    # the samples, each with its speed on stderr
    prompt_ids = encode_prompt(tokenizer, prompt, model.config.max_position_embeddings)
    for i in range(s.num_samples):
        print(prompt, end="", flush=True)
        started, times = time.perf_counter(), []
        steps = generate(
            model, prompt_ids, s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty,
            seed=(s.seed + i) % 2**63, fast=s.fast,
        )  # fmt: skip
        for piece in stream_text(tokenizer, timed(steps, times)):
            print(piece, end="", flush=True)
        print()
        rate = f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else "one token"
        print(f"[{len(times)} tokens, {rate}, the first after {times[0] - started:.2f} s]", file=sys.stderr)


def read_prompt(prompt: str) -> str:
    """The text of --prompt, or of the file that FILE:name names."""
    if prompt.startswith("FILE:"):
        with read_errors_as_user_error(prompt[5:], "--prompt=FILE:name reads a text in UTF-8."):
            with open(prompt[5:], encoding="utf-8") as f:
                prompt = f.read(MAX_PROMPT + 1)
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt is longer than {MAX_PROMPT:,} characters; a model sees the last few thousand.")
    return prompt


def encode_prompt(tokenizer: Tokenizer, prompt: str, context: int) -> list[int]:
    """The ids of a prompt, of a line break for an empty one. A long one is cut to what more than fills the context."""
    if not is_text(prompt):
        raise UserError(f"the prompt holds what UTF-8 cannot: {ascii(prompt)[:80]}.")
    return tokenizer.encode(prompt[-64 * context :] or "\n", add_special_tokens=False).ids


def timed(steps: Iterator, times: list[float]) -> Iterator:
    """The same steps; the time at which each came is appended to `times`."""
    for step in steps:
        times.append(time.perf_counter())
        yield step


if __name__ == "__main__":
    run_main(main)
