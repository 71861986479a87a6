"""
How fast, beside which others, and how near the machine's own limit.

    python bench.py                                     # the usual works: ten to fifteen minutes on two cores
    python bench.py --only=decode,decode_int8 --vs=llamacpp --llama_bench=llama.cpp/build/bin/llama-bench
    python bench.py --model=out/smol_shakespeare --vs=none

Each contender (ours, transformers, llama.cpp, OpenVINO) runs in a process of its own and is warmed up. Then they take
turns, A B C A B C, so that a drift of the machine's speed touches all of them alike. The card shows the median of the
rounds, the lowest and the highest, and what the hardware allows, measured in the same run: training and prefill are
bound by matrix products (MFU: useful floating-point operations per second over those of a large product), decoding by
memory (bytes of weights, keys and values per second over those of a plain read). The limits are from the best that the
machine showed during the whole run, so that a slow moment of it bounds nothing. Compiling is timed separately, as
"setup".

The last line of stdout is one JSON object.
"""

import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lib.device import (
    GPU_WAITS,
    Replay,
    compile_for_training,
    launch_share,
    peak_flops,
    pick_autocast,
    pick_device,
    prepare_process,
)
from lib.files import write_json
from lib.settings import Count, UserError, override, run_main

import torch

import prepare
from checkpoint import config_to_dict, find, from_pretrained, read_tokenizer, save_pretrained, tokenizer_config
from fast.quantize import quantize
from model import PRESETS, KVCache, SmolLM2
from optimizer import make_optimizer
from sample import generate, prefill


@dataclass
class Settings:
    only: str = ""  # which work, comma-separated: train, train_full_vocab, prefill, decode, decode_2048, decode_int8,
    #                 encode, startup, busy; empty: these. Also prefill_int8, decode_8_rows, decode_512, decode_4000,
    #                 decode_int8_512, decode_int8_2048, decode_int8_4000
    vs: str = "hf,llamacpp,openvino"  # beside which others: these, or none
    llama_bench: str = (
        ""  # llama-bench of a native build of llama.cpp, measured beside the wheel where --vs has llamacpp;
    )
    #                        empty: that on PATH, if there is one
    model: str = ""  # model directory or hub id for prefill, decode, startup and busy; empty: random weights, 135M
    repeats: Count = 3  # rounds
    device: Literal["cpu", "cuda"] = "cpu"  # what is measured


WORKS = "train train_full_vocab prefill decode decode_2048 decode_int8 encode startup busy".split()
# measured only when asked for
MORE = "prefill_int8 decode_8_rows decode_512 decode_4000 decode_int8_512 decode_int8_2048 decode_int8_4000".split()
UNITS = dict.fromkeys(WORKS + MORE, "tok/s") | {"encode": "MB/s", "startup": "s", "busy": "x"}
TRAIN_SHAPE = {"train": (5000, 4, 256), "train_full_vocab": (49152, 2, 512)}  # vocabulary, rows, tokens per row
GPU_TRAIN_SHAPE = TRAIN_SHAPE | {"train_full_vocab": (49152, 16, 2048)}  # a micro-batch of config/smol_135m.py
PREFILL = 512  # tokens
READ = "prefill", "prefill_int8"
NEW = 64  # decoding: tokens generated
DECODE = {  # tokens of prompt, rows
    "decode": (16, 1), "decode_512": (512, 1), "decode_2048": (2048, 1), "decode_4000": (4000, 1),
    "decode_int8": (16, 1), "decode_int8_512": (512, 1), "decode_int8_2048": (2048, 1), "decode_int8_4000": (4000, 1),
    "decode_8_rows": (16, 8),
}  # fmt: skip
BUSY = "training reading writing".split()
SPINNING = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with its parent
OURS = ["ours", "ours_eager", "ours_plain", *BUSY]
PEERS = "hf hf_compiled llamacpp llama_bench openvino tokenizers".split()
# what peers that read GGUF files need (pip install ...), and the files, of which OpenVINO does not take bf16
PACKAGES = {"llamacpp": "gguf xllamacpp", "openvino": "gguf openvino-genai"}
FILES = {"llamacpp": ("bf16", "q8_0"), "openvino": ("f16", "q8_0")}


# ----------------------------------------------------------------------------------------------------------------------
# contenders: generators that set up and yield once; then each next() does one round of work and yields its figure


def training(who: str, device: str, vocab: int, rows: int, T: int, dtype: torch.dtype):
    """Whole optimizer steps in `dtype` autocast with fp32 weights, clipping and fused AdamW, on random tokens. ours and
    hf_compiled have their blocks compiled, one by one; ours_eager and hf run as they are written. On a GPU that waits
    for Python ours replays a recorded step, as train.py does."""
    config = replace(PRESETS["135M"], vocab_size=vocab, max_position_embeddings=T)
    torch.manual_seed(0)
    if who.startswith("ours"):
        prepare_process()  # as train.py does
        model = SmolLM2(config).to(device).train()
        if who == "ours":
            compile_for_training(model)

        def loss_of(ids):
            return model(ids[:, :-1], ids[:, 1:], loss_only=True)[1]
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**config_to_dict(config, torch.float32))).to(device).train()
        if who == "hf_compiled":
            compile_for_training(model.model)  # its blocks are called layers, too

        def loss_of(ids):
            return model(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss  # as transformers' Trainer has it

    optimizer = make_optimizer(model, "adamw", 1e-4, 0.1, (0.9, 0.95))
    ids = torch.randint(0, vocab, (rows, T + 1), device=device)

    def loss_and_gradients(ids):
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(ids)
        loss.backward()
        return loss.detach()

    def rate(n, compute=loss_and_gradients):
        started = time.perf_counter()
        for _ in range(n):
            loss = compute(ids)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=compute is loss_and_gradients)
            loss.item()  # waits for a GPU
        return n * rows * T / (time.perf_counter() - started)

    rate(2)
    compute, steps = loss_and_gradients, 2 if device == "cpu" else 10
    if who == "ours" and device != "cpu":
        if launch_share(lambda: loss_and_gradients(ids)) > GPU_WAITS:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            compute = Replay(loss_and_gradients, ids)
            rate(2, compute)
    yield
    while True:
        yield rate(steps, compute)


def prefilling(who: str, device: str, folder: str, int8: bool, dtype: torch.dtype):
    """A prompt of PREFILL tokens, batch 1, into an empty cache; bf16 or int8 weights. dtype: of the products that are
    fastest here."""
    ids = torch.randint(0, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0)).to(device)
    if who in FILES:
        engine = engine_for(who, folder, int8, dtype, paged=True)
        yield
        while True:
            # two tokens: OpenVINO's time per token needs a second one
            yield engine.complete(ids[0].tolist(), 2)["prompt_per_second"]
    if who == "hf":
        model = load_hf(folder, device)

        def run():
            with torch.inference_mode():
                model(ids, use_cache=True, logits_to_keep=1)
    else:
        prepare_process()  # as sample.py does
        model = from_pretrained(folder, device, torch.bfloat16)
        if int8:
            quantize(model, "int8")

        def run():
            prefill(model, ids, KVCache(model.config, 1, device, torch.bfloat16))

    def rate():
        started = time.perf_counter()
        run()
        synchronize(device)
        return PREFILL / (time.perf_counter() - started)

    rate()
    yield
    while True:
        yield rate()


def decoding(who: str, device: str, folder: str, int8: bool, depth: int, rows: int):
    """NEW tokens a row after a prompt of `depth`, greedy, in bf16 or int8; the time of the prompt is not counted.
    ours_plain goes through model.py where ours goes through decode.c."""
    prompt = torch.randint(0, 1000, (rows, depth), generator=torch.Generator().manual_seed(0)).to(device)
    if who in FILES:
        engine = engine_for(who, folder, int8, torch.bfloat16, paged=not int8)
        yield
        while True:
            yield engine.complete(prompt[0].tolist(), NEW)["predicted_per_second"]
    if who == "hf":
        model = load_hf(folder, device)

        class Clock:  # generate() hands each token to its streamer
            def put(self, _):
                self.times.append(time.perf_counter())

            def end(self):
                pass

        clock = Clock()

        def token_times():
            clock.times = []
            model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, streamer=clock)
            return clock.times[1:]  # the first call brings the prompt
    else:
        model = from_pretrained(folder, device, torch.bfloat16)
        if depth + NEW > model.config.max_position_embeddings:  # generate() would read the end of the prompt alone
            raise UserError(f"{depth + NEW} positions are beyond the model's {model.config.max_position_embeddings}")
        if int8:
            quantize(model, "int8")

        def token_times():
            times = []
            for _ in generate(model, prompt, NEW, temperature=0, stop_ids=[], fast=who == "ours"):
                synchronize(device)
                times.append(time.perf_counter())
            return times

    def rate():
        times = token_times()
        return rows * (len(times) - 1) / (times[-1] - times[0])

    rate()
    yield
    while True:
        yield rate()


def native(program: str, file: str, prompt: int, new: int, depth: int):
    """A native build of llama.cpp: `prompt` or `new` tokens after `depth`, by its llama-bench, a process a round."""
    flags = dict(m=file, p=prompt, n=new, d=depth, t=torch.get_num_threads(), ngl=0, fa=1, r=1, o="json")
    command = [program, *(part for key, value in flags.items() for part in (f"-{key}", str(value)))]
    surroundings = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}  # which is ours
    yield
    while True:
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{program} failed")
        yield json.loads(done.stdout)[0]["avg_ts"]


def encoding(who: str):
    """Text to tokens, on all cores, with one tokenizer for both contenders."""
    text = prepare.PLAY.read_text(encoding="utf-8")
    tokenizer = prepare.train_bpe([text], 4000)
    tokenizer.encode_special_tokens = True
    documents = text.split("\n\n") * 40
    size = sum(len(d.encode()) for d in documents) / 1e6
    encode = prepare.make_encoder(tokenizer, text)
    yield
    while True:
        started = time.perf_counter()
        if who == "ours":  # in the pieces that prepare.py reads
            pieces = ("\n\n".join(documents[i : i + 8000]) for i in range(0, len(documents), 8000))
            for _ in prepare.encode_all(encode, ((piece,) for piece in pieces)):
                pass
        else:
            tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        yield size / (time.perf_counter() - started)


def starting(who: str, folder: str):
    """Seconds from nothing to the first token, as a whole process."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast as T;"
        "d = sys.argv[1];"
        "t = T.from_pretrained(d); m = AutoModelForCausalLM.from_pretrained(d, dtype=torch.bfloat16);"
        "print(t.decode(m.generate(**t('ROMEO:', return_tensors='pt'), max_new_tokens=1, do_sample=False)[0]))"
    )
    ours = [str(Path(__file__).with_name("sample.py")), f"--model={folder}", "--prompt=ROMEO:", "--max_new_tokens=1"]
    command = [sys.executable, *(ours if who == "ours" else ["-c", code, folder])]
    yield
    while True:
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        yield time.perf_counter() - started


def beside_others(who: str, device: str, folder: str, dtype: torch.dtype):
    """How many times as long a work takes beside two programs that compute all the time. On two cores a fair share
    would be 2 x; threads that wait for each other the wrong way make it 40 x."""
    work = {
        "training": lambda: training("ours_eager", device, 5000, 1, 128, dtype),
        "reading": lambda: prefilling("ours", device, folder, False, dtype),
        "writing": lambda: decoding("ours", device, folder, False, 16, 1),
    }[who]()
    next(work)
    yield
    while True:
        quiet = next(work)
        others = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(2)]
        try:
            time.sleep(0.5)
            busy = next(work)
        finally:
            for other in others:
                other.kill()
                other.wait()
        yield quiet / busy


def machine(device: str):
    """GFLOP/s of matrix products and GB/s of reading memory: the best of each round."""
    # 256 MiB, about the weights in bf16; a cache may hold those in int8. More for a GPU, which reads that in no time
    big = torch.ones(1 << (26 if device == "cpu" else 30), device=device)
    yield
    while True:
        bfloat16, float32 = (product_rate(device, dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32))
        memory = 0.0
        for _ in range(8):
            started = time.perf_counter()
            big.sum()
            synchronize(device)
            memory = max(memory, big.numel() * 4 / (time.perf_counter() - started) / 1e9)
        yield dict(bfloat16=bfloat16, float32=float32, memory=memory)


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, measured."""
    if device == "cpu":
        return peak_flops(device, dtype)[0]
    n, best = 8192, 0.0
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)  # a product of ones takes less power, and is faster
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


def synchronize(device: str):
    """Wait until a GPU has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def load_hf(folder, device):
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()


def engine_for(who: str, folder: str, int8: bool, dtype: torch.dtype, paged: bool):
    """A peer that reads GGUF files, with the file in `folder` of the precision asked for."""
    file = Path(folder) / f"{FILES[who][int8]}.gguf"
    return LlamaCpp(file) if who == "llamacpp" else OpenVino(file, dtype, paged)


class OpenVino:
    """OpenVINO GenAI's pipeline. dtype: of the products. Its attention is paged or "SDPA", whichever was the faster."""

    def __init__(self, file, dtype: torch.dtype, paged: bool):
        import openvino_genai

        settings: dict = dict(INFERENCE_NUM_THREADS=torch.get_num_threads())
        if paged:
            settings["scheduler_config"] = openvino_genai.SchedulerConfig()
            settings["scheduler_config"].enable_prefix_caching = False  # each round reads its prompt
        else:
            settings["ATTENTION_BACKEND"] = "SDPA"
        if dtype == torch.float32:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.LLMPipeline(str(file), "CPU", **settings)
        self.complete([1, 2, 3], 8)

    def complete(self, ids: list[int], n: int) -> dict:
        """Its own timings of n greedy tokens after the prompt `ids`, under the names of LlamaCpp's."""
        import openvino
        import openvino_genai

        prompt = openvino.Tensor(torch.tensor([ids]).numpy()), openvino.Tensor(torch.ones(1, len(ids)).long().numpy())
        made = self.pipeline.generate(
            openvino_genai.TokenizedInputs(*prompt), max_new_tokens=n, ignore_eos=True, do_sample=False
        )
        first, each = made.perf_metrics.get_ttft().mean, made.perf_metrics.get_tpot().mean  # ms
        return {"prompt_per_second": len(ids) / first * 1e3, "predicted_per_second": 1e3 / each}


class LlamaCpp:
    """llama.cpp's server, in this process through the xllamacpp wheel, with a GGUF of the same weights."""

    def __init__(self, file):
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path = str(file)
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_parallel, p.n_gpu_layers = 4096, 512, 512, 1, 0
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        p.warmup, p.fit_params, p.cache_ram_mib, p.verbosity = True, False, 0, 0
        self.server = xllamacpp.Server(p)
        self.complete([1, 2, 3], 8)

    def complete(self, ids: list[int], n: int) -> dict:
        """The server's timings of n greedy tokens after the prompt `ids`, none of which it has cached."""
        body = dict(prompt=ids, n_predict=n, ignore_eos=True, cache_prompt=False, samplers=["top_k"], top_k=1)
        request = urllib.request.Request(
            self.server.listening_address + "/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.loads(reply.read())["timings"]


# ----------------------------------------------------------------------------------------------------------------------
# taking turns


def serve(connection, contender, arguments):
    """What a contender's process does: set up and send "ready", do a round for each True that it receives, and send the
    peak of its memory at False."""
    try:
        started = time.perf_counter()
        rounds = contender(*arguments)
        next(rounds)
        connection.send(("ready", time.perf_counter() - started))
        while connection.recv():
            connection.send(("round", next(rounds)))
        connection.send(("peak", peak_mb()))
    except Exception as error:
        connection.send(("failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))


def peak_mb() -> float:
    """The most memory this process has held, of a GPU where it used one; NaN on Windows. (Linux' getrusage counts what
    its parent held.)"""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def take_turns(contenders: dict[str, tuple], repeats: int) -> dict:
    """Run (function, *arguments) contenders in turns. For each: rounds, setup_s and peak_mb, or why it failed."""
    found, alive = {}, {}
    context = multiprocessing.get_context("spawn")
    # start them, one after the other, since setting up uses all cores
    for name, (function, *arguments) in contenders.items():
        print(f"  {name} ...", end=" ", flush=True, file=sys.stderr)
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        kind, value = receive(ours)
        found[name] = dict(rounds=[], setup_s=value) if kind == "ready" else dict(failed=value)
        if kind == "ready":
            alive[name] = ours, process
    # the rounds
    for _ in range(repeats):
        for name in list(alive):
            alive[name][0].send(True)
            kind, value = receive(alive[name][0])
            if kind == "round":
                found[name]["rounds"].append(value)
            else:
                found[name] = dict(failed=value)
                alive.pop(name)
    # their memory, and the end
    for name, (connection, process) in alive.items():
        connection.send(False)
        found[name]["peak_mb"] = receive(connection)[1]
        process.join(5)
        process.kill()
    print(file=sys.stderr)
    return found


def receive(connection) -> tuple:
    """The next message of a contender's process: what it is, and its value."""
    try:
        return connection.recv()
    except EOFError:
        return "failed", "its process died"


def contenders_for(
    work: str, vs: list[str], device: str, folder: str, ggufs: str, dtype=None, llama_bench: str = ""
) -> dict[str, tuple]:
    """Who does this work: (function, *arguments) by name. folder: of the model; ggufs: of the same as GGUF files;
    dtype: of the products that are fastest here; llama_bench: the program, or empty."""

    def folder_of(who):
        return ggufs if who in FILES else folder

    if work in TRAIN_SHAPE:
        names = ["ours", *(["ours_eager"] if work == "train" else []), *(["hf", "hf_compiled"] if "hf" in vs else [])]
        return {who: (training, who, device, *train_shape(work, device), dtype) for who in names}
    if work == "encode":
        return {who: (encoding, who) for who in ("ours", "tokenizers")}
    if work == "startup":
        return {who: (starting, who, folder) for who in ("ours", *vs) if who not in FILES}
    if work == "busy":
        return {who: (beside_others, who, device, folder, dtype) for who in BUSY}
    reads = work in READ
    int8, (depth, rows) = "int8" in work, (0, 1) if reads else DECODE[work]
    names = ["ours", *(["ours_plain"] if work in ("decode", "decode_int8") else []), *vs]
    if int8:  # transformers has no int8 of this kind
        names = [who for who in names if who != "hf"]
    if rows > 1:  # these take their rows from several visitors
        names = [who for who in names if who not in FILES]
    if reads:
        found = {who: (prefilling, who, device, folder_of(who), int8, dtype) for who in names}
    else:
        found = {who: (decoding, who, device, folder_of(who), int8, depth, rows) for who in names}
    if llama_bench and "llamacpp" in vs and rows == 1:
        file = f"{ggufs}/{'q8_0' if int8 else 'bf16'}.gguf"
        found["llama_bench"] = native, llama_bench, file, *((PREFILL, 0) if reads else (0, NEW)), depth
    return found


def summary(work: str, found: dict) -> dict:
    """Medians and spreads; ratio to the best peer, which is named (above 1 is better, for seconds too)."""
    unit, result = UNITS[work], {"unit": UNITS[work]}
    for name, one in found.items():
        if "failed" in one:
            result[name] = None
            result.setdefault("failed", {})[name] = one["failed"]
            continue
        result[name] = round(statistics.median(one["rounds"]), 2)
        result.setdefault("spread", {})[name] = [round(min(one["rounds"]), 2), round(max(one["rounds"]), 2)]
        result.setdefault("setup_s", {})[name] = round(one["setup_s"], 1)
        known = math.isfinite(one["peak_mb"]) and name != "llama_bench"  # whose memory is that of other processes
        result.setdefault("peak_mb", {})[name] = round(one["peak_mb"]) if known else None
    ours, peers = result.get("ours"), {name: result[name] for name in PEERS if result.get(name)}
    result["ratio"] = result["best_peer"] = None
    if ours and peers:
        best = result["best_peer"] = (min if unit == "s" else max)(peers, key=peers.get)
        result["ratio"] = round(peers[best] / ours if unit == "s" else ours / peers[best], 2)
    return result


def add_limit(work: str, result: dict, limits: dict, weights: dict, device: str = "cpu"):
    """What the hardware allows, and our share of it, once the whole run has shown what that is."""
    limit = hardware_limit(work, limits, weights, device) if limits else None
    result["limit"] = limit and round(limit, 1)
    result["limit_fraction"] = round(result["ours"] / limit, 3) if result.get("ours") and limit else None


def train_shape(work: str, device: str) -> tuple[int, int, int]:
    return (TRAIN_SHAPE if device == "cpu" else GPU_TRAIN_SHAPE)[work]


def hardware_limit(work: str, limits: dict, weights: dict, device: str = "cpu") -> float | None:
    """Tokens per second that machine()'s figures allow; None for what has no such limit. weights: num_parameters() of
    the model, and "cached", the numbers that its cache holds for a position."""
    product = max(limits["bfloat16"], limits["float32"]) * 1e9
    if work in TRAIN_SHAPE:
        vocab, _, T = train_shape(work, device)
        with torch.device("meta"):
            model = SmolLM2(replace(PRESETS["135M"], vocab_size=vocab))
        return product / model.flops_per_token(T)
    if work == "prefill":  # in int8 some peers multiply bytes, for which no limit is measured
        return product / (2 * weights["backbone"])
    if work in DECODE:
        depth, rows = DECODE[work]
        cached = (depth + NEW / 2) * weights["cached"] * 2  # bytes of a row's keys and values
        memory = limits["memory"] * 1e9 / (weights["total"] * (1 if "int8" in work else 2) / rows + cached)
        return min(memory, product / (2 * weights["total"]))
    return None


def make_model(folder: Path):
    """Random weights of the 135M shape in bf16, with a tokenizer, so that every script and tool reads the directory."""
    torch.manual_seed(0)
    save_pretrained(SmolLM2(PRESETS["135M"]).to(torch.bfloat16), folder)
    prepare.train_bpe([prepare.PLAY.read_text(encoding="utf-8")], 4000).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(prepare.END, 8192))


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    only = [w.strip() for w in s.only.split(",") if w.strip()] or WORKS
    vs = [v.strip() for v in s.vs.split(",") if v.strip() not in ("", "none")]
    problems = [f"--only={w}: expected some of {', '.join(WORKS + MORE)}." for w in only if w not in WORKS + MORE]
    problems += [f"--vs={v}: expected hf, llamacpp, openvino or none." for v in vs if v not in ("hf", *FILES)]
    if problems:
        raise UserError("\n".join(problems))
    if s.llama_bench and not shutil.which(s.llama_bench):
        raise UserError(f"--llama_bench={s.llama_bench}: no such program.")
    device = pick_device(s.device)
    started = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder, weights = Path(temporary), {}
        if {*READ, *DECODE, "startup", "busy"} & set(only):
            if s.model:
                folder = find(s.model)
            else:
                make_model(folder)
            model = from_pretrained(folder)
            c = model.config
            weights = model.num_parameters() | {"cached": 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim}
            read_tokenizer(folder)  # refused here, and not in a contender's process
            vs = write_ggufs(folder, Path(temporary), vs)
        report(s, device, only, vs, folder, Path(temporary), weights, started)


def write_ggufs(folder: Path, temporary: Path, vs: list[str]) -> list[str]:
    """Write the same weights for the peers that read GGUF files; return `vs` without those that are not installed."""
    for who in [v for v in vs if v in FILES]:
        try:
            for package in PACKAGES[who].split():
                importlib.import_module(package.replace("-", "_"))
        except ImportError as error:
            print(f"{who} is left out: {error}. pip install {PACKAGES[who]}", file=sys.stderr)
            vs = [v for v in vs if v != who]
    kinds = {kind for v in vs if v in FILES for kind in FILES[v]}
    if kinds:
        from export_gguf import export  # which needs gguf

        for kind in kinds:
            made = export(folder, kind, temporary / kind)
            made.rename(temporary / f"{kind}.gguf")
    return vs


def report(s, device, only, vs, folder, temporary, weights, started):
    """Run each work and print its card; then the limits, the machine, and everything as one JSON object."""
    results, limits, (dtype, reason) = {}, {}, pick_autocast("auto", device)
    print(f"training in {str(dtype)[6:]}: {reason}", file=sys.stderr)
    program = "llamacpp" in vs and (s.llama_bench or shutil.which("llama-bench")) or ""
    for work in only:
        print(f"{work}:", end="", flush=True, file=sys.stderr)
        contenders = contenders_for(work, vs, device, str(folder), str(temporary), dtype, program)
        if work not in ("encode", "startup", "busy"):
            contenders["machine"] = (machine, device)
        found = take_turns(contenders, s.repeats)
        for seen in found.pop("machine", {}).get("rounds", []):
            limits = {key: max(value, limits.get(key, 0)) for key, value in seen.items()}
        results[work] = summary(work, found)
        print_card(work, results[work])
    for work, r in results.items():
        add_limit(work, r, limits, weights, device)
        if r["limit_fraction"]:
            print(f"{work}: {r['limit_fraction']:.0%} of the {r['limit']:,.0f} {r['unit']} that the hardware allows")
    info = machine_info(device, limits, vs) | {"llama_bench": program, "seconds": round(time.time() - started)}
    print(
        f"machine: {info['device']}, {info['threads']} threads, bf16 product {info['gflops'].get('bfloat16', 0):,.0f} "
        f"GFLOP/s, fp32 {info['gflops'].get('float32', 0):,.0f}, memory {info['memory_gb_s']:.1f} GB/s, "
        + ", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)
        + f", {info['date']}, {info['seconds']} s in all"
        + (f"; llama.cpp compiled for {info['llamacpp']}" if info["llamacpp"] else "")
        + (f"; llama_bench is {program}" if program else "")
    )
    print(json.dumps({"machine": info} | results))


def machine_info(device: str, limits: dict, vs: list[str]) -> dict:
    """What was measured on: device, threads, date, speed, and the versions of what took part."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("transformers", "xllamacpp", "openvino-genai", "tokenizers", "tiktoken"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    peer = None
    if "llamacpp" in vs and versions["xllamacpp"]:
        import xllamacpp

        peer = xllamacpp.get_system_info().strip(" |")
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return dict(
        device=torch.cuda.get_device_name() if device != "cpu" else cpu,
        threads=torch.get_num_threads(),
        date=time.strftime("%Y-%m-%d"),
        gflops={key: round(value, 1) for key, value in limits.items() if key != "memory"},
        memory_gb_s=round(limits.get("memory", 0), 1),
        versions=versions,
        llamacpp=peer,  # which instructions it was compiled for
    )


def print_card(work: str, r: dict):
    """The figures of summary() for people."""
    print(work)
    for name in (n for n in r if n in OURS + PEERS):
        if r[name] is None:
            print(f"  {name:<11} failed: {r['failed'][name]}")
            continue
        low, high = r["spread"][name]
        memory = f", peak {r['peak_mb'][name]:,} MB" if r["peak_mb"][name] else ""
        compiled = ", compiled" if work in TRAIN_SHAPE and name in ("ours", "hf_compiled") else ""
        print(
            f"  {name:<11}{r[name]:>10,.1f} {r['unit']:<6} ({low:,.1f} to {high:,.1f})   "
            f"setup {r['setup_s'][name]:.1f} s{memory}{compiled}"
        )
    if r["ratio"]:
        print(f"  {r['ratio']:.2f} x {r['best_peer']}, the best peer\n", flush=True)
    else:
        print("  (how many times as long beside two busy programs)\n" if work == "busy" else "  no peer\n", flush=True)


if __name__ == "__main__":
    run_main(main)
