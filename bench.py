"""
Measures speed (training, reading a prompt, generating, encoding, starting) next to peers and to the machine's limit.

    python bench.py                                     # the usual workloads: ten to fifteen minutes on two cores
    python bench.py --only=decode,decode_int8 --vs=llamacpp --llama_bench=llama.cpp/build/bin/llama-bench
    python bench.py --model=out/smol_shakespeare --vs=none

Each contender (ours, transformers, llama.cpp, OpenVINO) runs in its own process and is warmed up. Then they take turns,
A B C A B C, so that a drift of the machine's speed affects all of them alike. The card shows the median of the rounds,
the lowest and the highest, and what the hardware allows, measured in the same run. Matrix products limit training and
prefill (MFU: useful floating-point operations per second over those of a large product); memory limits decoding (bytes
of weights, keys and values per second over those of a plain read). A limit is computed from the best that the machine
showed in the whole run, so one slow moment does not lower it. Compiling is timed separately, as "setup". The last
line of stdout is one JSON object.
"""

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
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

from lib.device import compile_for_training, pick_autocast, pick_device, prepare_process
from lib.files import write_json
from lib.settings import Count, UserError, override, run_main

import torch

import prepare
from checkpoint import config_to_dict, find, load, save_pretrained, speed_up, tokenizer_config
from fast.graphs import GPU_WAITS, Replay, launch_share
from model import PRESETS, SmolLM2
from optimizer import make_optimizers
from sample import generate


@dataclass
class Settings:
    only: str = ""  # workloads, comma-separated: train, train_full_vocab, prefill, decode, decode_2048, decode_int8,
    #                 encode, startup, busy; empty: all of these. Also prefill_int8, decode_8_rows, decode_512,
    #                 decode_int8_512, decode_int8_2048
    vs: str = "hf,llamacpp,openvino"  # peers, comma-separated, or none
    llama_bench: str = ""  # llama-bench of a native build of llama.cpp; empty: the one on PATH, if any
    model: str = ""  # model directory or hub id for prefill, decode, startup and busy; empty: random weights, 135M
    repeats: Count = 3  # rounds
    device: Literal["cpu", "cuda"] = "cpu"


USUAL = "train train_full_vocab prefill decode decode_2048 decode_int8 encode startup busy".split()
TRAIN = {  # vocabulary, rows, tokens per row
    "cpu": {"train": (5000, 4, 256), "train_full_vocab": (49152, 2, 512)},
    "cuda": {"train": (5000, 4, 256), "train_full_vocab": (49152, 16, 2048)},  # a micro-batch of config/smol_135m.py
}
GENERATE = {  # tokens of the prompt, new tokens, rows; with one new token it is the prompt that is timed
    "prefill": (512, 1, 1), "prefill_int8": (512, 1, 1), "decode_8_rows": (16, 64, 8),
    "decode": (16, 64, 1), "decode_512": (512, 64, 1), "decode_2048": (2048, 64, 1),
    "decode_int8": (16, 64, 1), "decode_int8_512": (512, 64, 1), "decode_int8_2048": (2048, 64, 1),
}  # fmt: skip
ALL = [*TRAIN["cpu"], *GENERATE, "encode", "startup", "busy"]
UNITS = {"encode": "MB/s", "startup": "s", "busy": "x"}  # of the others: tokens per second
SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # stops when its parent has ended
PACKAGES = {"llamacpp": ("gguf", "xllamacpp"), "openvino": ("gguf", "openvino-genai")}
FILES = {"llamacpp": ("bf16", "q8_0"), "openvino": ("f16", "q8_0")}  # GGUF without and with int8; OpenVINO has no bf16


# ----------------------------------------------------------------------------------------------------------------------
# contenders: generators that set up and yield once; then each next() measures one round and yields the figure


def repeat(measure):
    """Warm up, and then measure again and again."""
    measure()
    yield
    while True:
        yield measure()


def training(who: str, device: str, vocab: int, rows: int, T: int, dtype: torch.dtype):
    """Measure whole optimizer steps: autocast to `dtype`, fp32 weights, clipping, fused AdamW, random tokens. The
    blocks of ours and hf_compiled are compiled; ours_eager and hf run as written. If a GPU waits for Python, ours
    replays a CUDA graph, as train.py does."""
    config = replace(PRESETS["135M"], vocab_size=vocab, max_position_embeddings=T)
    torch.manual_seed(0)
    if who.startswith("ours"):
        prepare_process()  # as train.py does
        model = speed_up(SmolLM2(config).to(device).train())
        if who == "ours":
            compile_for_training(model)
        loss_of = lambda ids: model(ids[:, :-1], ids[:, 1:], loss_only=True)[1]
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**config_to_dict(config, torch.float32))).to(device).train()
        if who == "hf_compiled":
            compile_for_training(model.model)  # it calls its blocks layers, as model.py does
        # transformers' Trainer also passes the inputs as labels; the model shifts them
        loss_of = lambda ids: model(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
    (optimizer,) = make_optimizers(model, "adamw", 1e-4, 0.1, (0.9, 0.95))
    ids = torch.randint(0, vocab, (rows, T + 1), device=device)

    def forward_backward(ids):
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(ids)
        loss.backward()
        return loss.detach()

    def rate(steps, compute):
        started = time.perf_counter()
        for _ in range(steps):
            loss = compute(ids)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=compute is forward_backward)  # a graph adds to the same gradients
            loss.item()  # waits for a GPU
        return steps * rows * T / (time.perf_counter() - started)

    compute = forward_backward
    rate(2, compute)
    if who == "ours" and device != "cpu" and launch_share(lambda: forward_backward(ids)) > GPU_WAITS:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        compute = Replay(forward_backward, ids)
    yield from repeat(lambda: rate(2 if device == "cpu" else 10, compute))


def generating(who: str, device: str, folder: str, int8: bool, depth: int, new: int, rows: int, dtype: torch.dtype):
    """Measure reading a prompt of `depth` tokens (if `new` is 1) or writing `new` greedy tokens after it, without the
    time of the prompt. The weights are bf16 or int8; dtype: of the fastest products on this machine. ours uses
    fast/, ours_plain only model.py."""
    prompt = torch.randint(0, 1000, (rows, depth), generator=torch.Generator().manual_seed(0)).to(device)
    reading, times = new == 1, []
    if who in FILES:
        file = Path(folder) / f"{FILES[who][int8]}.gguf"
        engine = LlamaCpp(file) if who == "llamacpp" else OpenVino(file, reading and dtype, reading or not int8)
        # two new tokens at least, since OpenVINO's time per token needs a second one
        yield from repeat(lambda: engine.complete(prompt[0].tolist(), max(new, 2))[0 if reading else 1])
    elif who == "hf":
        from transformers import LlamaForCausalLM, logging

        logging.disable_progress_bar()
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        clock = lambda ids, scores, **_: times.append(time.perf_counter()) or False  # called after each token

        def write():
            model.generate(prompt, max_new_tokens=new, do_sample=False, min_new_tokens=new, stopping_criteria=[clock])
    else:
        prepare_process()  # as sample.py does
        model, _ = load(folder, device, torch.bfloat16, quantize="int8" if int8 else "", fast=who == "ours")
        if depth + new > model.config.max_position_embeddings:  # generate() would drop the beginning of the prompt
            raise UserError(f"{depth + new} positions exceed the context of {model.config.max_position_embeddings}")

        def write():
            for _ in generate(model, prompt, new, temperature=0, stop_ids=[], fast=not reading):  # nothing to decode
                synchronize(device)
                times.append(time.perf_counter())

    def rate():
        times[:] = [time.perf_counter()]
        write()
        return rows * (depth / (times[1] - times[0]) if reading else (new - 1) / (times[-1] - times[1]))

    yield from repeat(rate)


def native(program: str, file: str, prompt: int, new: int, depth: int):
    """Measure a native build of llama.cpp by its llama-bench: `prompt` or `new` tokens after `depth`, one process per
    round, which warms up by itself."""
    flags = dict(m=file, p=prompt, n=new, d=depth, t=torch.get_num_threads(), ngl=0, fa=1, r=1, o="json")
    command = [program, *(part for key, value in flags.items() for part in (f"-{key}", str(value)))]
    yield
    while True:
        yield json.loads(run_command(command))[0]["avg_ts"]


def encoding(who: str):
    """Measure MB/s of text to tokens on all cores, with the same tokenizer for both contenders."""
    text = prepare.PLAY.read_text(encoding="utf-8")
    tokenizer = prepare.train_bpe([text], 4000)
    tokenizer.encode_special_tokens = True
    documents = text.split("\n\n") * 40
    size = sum(len(d.encode()) for d in documents) / 1e6
    encode = prepare.make_encoder(tokenizer, text)
    pieces = ["\n\n".join(documents[i : i + 8000]) for i in range(0, len(documents), 8000)]  # as prepare.py reads them
    if who == "ours":
        work = lambda: list(prepare.encode_all(encode, ((piece,) for piece in pieces)))
    else:
        work = lambda: tokenizer.encode_batch_fast(documents, add_special_tokens=False)
    yield from repeat(lambda: size / seconds_of(work))


def starting(who: str, folder: str):
    """Measure the seconds from starting Python to the first token."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, PreTrainedTokenizerFast as T;"
        "t, m = T.from_pretrained(sys.argv[1]), M.from_pretrained(sys.argv[1], dtype=torch.bfloat16);"
        "print(t.decode(m.generate(**t('ROMEO:', return_tensors='pt'), max_new_tokens=1, do_sample=False)[0]))"
    )
    ours = [str(Path(__file__).with_name("sample.py")), f"--model={folder}", "--prompt=ROMEO:", "--max_new_tokens=1"]
    command = [sys.executable, *(ours if who == "ours" else ["-c", code, folder])]
    yield from repeat(lambda: seconds_of(lambda: run_command(command)))


def beside_others(who: str, device: str, folder: str, dtype: torch.dtype):
    """Measure how many times as long a workload takes next to two programs that compute all the time. On two cores a
    fair share would be 2 x; threads that wait for each other the wrong way make it 40 x."""
    if who == "training":
        work = training("ours_eager", device, 5000, 1, 128, dtype)
    else:
        shape = GENERATE["prefill" if who == "reading" else "decode"]
        work = generating("ours", device, folder, False, *shape, dtype)
    next(work)
    yield
    while True:
        quiet = next(work)
        others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2)]
        try:
            time.sleep(0.5)
            busy = next(work)
        finally:
            for other in others:
                other.kill()
                other.wait()
        yield quiet / busy


def machine(device: str):
    """Measure GFLOP/s of matrix products and GB/s of reading memory: the best of each round. The products are of random
    numbers, since products of ones take less power and can be faster."""
    n = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n, device=device)
    # 256 MiB, about the weights in bf16: a cache could hold less. A GPU needs more to be timed
    big = torch.ones(1 << (26 if device == "cpu" else 30), device=device)
    yield
    while True:
        found = {"memory": big.numel() * 4 / min(seconds_of(big.sum, device) for _ in range(8)) / 1e9}
        for dtype in (torch.bfloat16, torch.float32):
            x, y = a.to(dtype), b.to(dtype)
            seconds = min(seconds_of(lambda x=x, y=y: x @ y, device) for _ in range(50))
            found[str(dtype)[6:]] = 2 * n**3 / seconds / 1e9
        yield found


def seconds_of(work, device: str = "cpu") -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str):
    """Wait until a GPU has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def run_command(command: list[str]) -> str:
    """Run a program, without lib/settings.py's setting for threads, and return its output. UserError if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError((done.stderr.strip() or f"{command[0]} failed").splitlines()[-1])
    return done.stdout


class OpenVino:
    """OpenVINO GenAI. paged: which of its two attentions; the caller passes the faster one."""

    def __init__(self, file, dtype, paged: bool):
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False  # each round reads its prompt
        settings = {"scheduler_config": scheduler} if paged else {"ATTENTION_BACKEND": "SDPA"}
        settings["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        if dtype == torch.float32:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.LLMPipeline(str(file), "CPU", **settings)

    def complete(self, ids: list[int], n: int) -> tuple[float, float]:
        """Tokens per second of the prompt `ids` and of n greedy tokens after it, by its own clock."""
        import openvino
        import openvino_genai

        prompt = torch.tensor([ids])
        ids_and_mask = (openvino.Tensor(tensor.numpy()) for tensor in (prompt, torch.ones_like(prompt)))
        inputs = openvino_genai.TokenizedInputs(*ids_and_mask)
        made = self.pipeline.generate(inputs, max_new_tokens=n, ignore_eos=True, do_sample=False)
        first, each = made.perf_metrics.get_ttft().mean, made.perf_metrics.get_tpot().mean  # ms
        return len(ids) / first * 1e3, 1e3 / each


class LlamaCpp:
    """llama.cpp's server in this process, by the xllamacpp wheel."""

    def __init__(self, file):
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path = str(file)
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_parallel, p.n_gpu_layers = 4096, 512, 512, 1, 0
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        p.warmup, p.fit_params, p.cache_ram_mib, p.verbosity = True, False, 0, 0
        self.server = xllamacpp.Server(p)

    def complete(self, ids: list[int], n: int) -> tuple[float, float]:
        """The same by the server's clock; it has cached nothing of the prompt."""
        body = dict(prompt=ids, n_predict=n, ignore_eos=True, cache_prompt=False, samplers=["top_k"], top_k=1)
        url, header = self.server.listening_address + "/completion", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), header)) as reply:
            timings = json.loads(reply.read())["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]


def write_ggufs(folder: Path, to: Path, vs: list[str]) -> list[str]:
    """Write the model in `folder` as GGUF files for the peers that read those. Returns `vs` without the peers that are
    not installed."""
    lacking = lambda who: [p for p in PACKAGES.get(who, ()) if not importlib.util.find_spec(p.replace("-", "_"))]
    for who in filter(lacking, vs):
        print(f"{who} is left out. It needs: pip install {' '.join(lacking(who))}", file=sys.stderr)
    vs = [who for who in vs if not lacking(who)]
    for kind in {kind for v in vs if v in FILES for kind in FILES[v]}:
        script = str(Path(__file__).with_name("export_gguf.py"))
        run_command([sys.executable, script, f"--model={folder}", f"--outtype={kind}", f"--out_dir={to / kind}"])
        next((to / kind).glob("*.gguf")).rename(to / f"{kind}.gguf")
    return vs


# ----------------------------------------------------------------------------------------------------------------------
# taking turns


def serve(connection, contender, arguments):
    """Run a contender in its own process. Sends the seconds that setting up took, a figure for each True received, and
    its peak memory at False; the text of an error instead."""
    try:
        started = time.perf_counter()
        rounds = contender(*arguments)
        next(rounds)
        connection.send(time.perf_counter() - started)
        while connection.recv():
            connection.send(next(rounds))
        connection.send(None if contender in (native, starting) else peak_mb())  # those start other processes
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])


def peak_mb() -> float | None:
    """Return the peak memory of this process (getrusage adds what the parent held), or of the GPU if one was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024 if status.exists() else None


def take_turns(contenders: dict[str, tuple], repeats: int) -> dict:
    """Run (function, *arguments) contenders in turns. Returns rounds, setup_s and peak_mb of each, or why it failed."""
    context, found, running = multiprocessing.get_context("spawn"), {}, {}

    def receive(name: str):
        try:
            value = running[name][0].recv()
        except EOFError:
            value = "its process died"
        if isinstance(value, str):
            found[name] = dict(failed=value)
            del running[name]
        return value

    for name, (function, *arguments) in contenders.items():  # one after the other, since setting up uses all cores
        connection, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        found[name], running[name] = dict(rounds=[]), (connection, process)
        found[name]["setup_s"] = receive(name)
    for _ in range(repeats):
        for name in list(running):
            running[name][0].send(True)
            found[name]["rounds"].append(receive(name))
    for name, (connection, process) in list(running.items()):
        connection.send(False)
        found[name]["peak_mb"] = receive(name)
        process.join(5)
        process.kill()
    return found


def contenders_for(work, vs, device, folder: str, ggufs: str, dtype=None, llama_bench="") -> dict[str, tuple]:
    """Return who takes part in a workload: (function, *arguments) by name. folder holds the model, ggufs the same model
    as GGUF files; dtype: of the fastest products on this machine; llama_bench: the program, or empty."""
    if work in TRAIN[device]:
        names = ["ours", *(["ours_eager"] if work == "train" else []), *(["hf", "hf_compiled"] if "hf" in vs else [])]
        return {who: (training, who, device, *TRAIN[device][work], dtype) for who in names}
    if work == "encode":
        return {who: (encoding, who) for who in ("ours", "tokenizers")}
    if work == "startup":
        return {who: (starting, who, folder) for who in ("ours", *vs) if who not in FILES}
    if work == "busy":
        return {who: (beside_others, who, device, folder, dtype) for who in ("training", "reading", "writing")}
    int8, (depth, new, rows) = "int8" in work, GENERATE[work]
    names = ["ours", *(["ours_plain"] if work in ("decode", "decode_int8") else []), *vs]
    # transformers has no int8 of this kind, and the engines take rows from different users
    names = [who for who in names if not (int8 and who == "hf" or rows > 1 and who in FILES)]
    at = lambda who: ggufs if who in FILES else folder
    found = {who: (generating, who, device, at(who), int8, depth, new, rows, dtype) for who in names}
    if llama_bench and "llamacpp" in vs and rows == 1:
        work = (depth, 0, 0) if new == 1 else (0, new, depth)
        found["llama_bench"] = native, llama_bench, f"{ggufs}/{'q8_0' if int8 else 'bf16'}.gguf", *work
    return found


# ----------------------------------------------------------------------------------------------------------------------
# results


def summary(work: str, found: dict) -> dict:
    """Return medians and spreads, and the ratio to the best peer: above 1 is better, for seconds too."""
    unit, done = UNITS.get(work, "tok/s"), {name: one for name, one in found.items() if "failed" not in one}
    result = {"unit": unit} | {name: None for name in found}
    result |= {name: round(statistics.median(one["rounds"]), 2) for name, one in done.items()}
    result["failed"] = {name: one["failed"] for name, one in found.items() if "failed" in one}
    result["spread"] = {name: [round(end(one["rounds"]), 2) for end in (min, max)] for name, one in done.items()}
    result["setup_s"] = {name: round(one["setup_s"], 1) for name, one in done.items()}
    result["peak_mb"] = {name: one["peak_mb"] and round(one["peak_mb"]) for name, one in done.items()}
    ours, peers = result.get("ours"), {name: result[name] for name in done if not name.startswith("ours")}
    best = result["best_peer"] = (min if unit == "s" else max)(peers, key=peers.get, default=None) if ours else None
    result["ratio"] = best and round(peers[best] / ours if unit == "s" else ours / peers[best], 2)
    return result


def hardware_limit(work: str, limits: dict, weights: dict, device: str = "cpu") -> float | None:
    """Tokens per second that machine()'s figures allow; None for a workload without such a limit. weights:
    num_parameters() of the model, and "cached", the numbers that its cache holds per position."""
    if not limits or work not in (*TRAIN[device], *GENERATE) or work == "prefill_int8":  # no limit of int8 is measured
        return None
    product = max(limits["bfloat16"], limits["float32"]) * 1e9
    if work in TRAIN[device]:
        vocab, _, T = TRAIN[device][work]
        with torch.device("meta"):
            model = SmolLM2(replace(PRESETS["135M"], vocab_size=vocab))
        return product / model.flops_per_token(T)
    depth, new, rows = GENERATE[work]
    if new == 1:
        return product / (2 * weights["backbone"])
    cached = (depth + new / 2) * weights["cached"] * 2  # bytes of a row's keys and values
    memory = limits["memory"] * 1e9 / (weights["total"] * (1 if "int8" in work else 2) / rows + cached)
    return min(memory, product / (2 * weights["total"]))


def print_card(work: str, r: dict):
    """Print the figures of summary()."""
    print(work)
    for name in (n for n in r if n in r["spread"] or n in r["failed"]):
        if r[name] is None:
            print(f"  {name:<11} failed: {r['failed'][name]}")
            continue
        low, high = r["spread"][name]
        memory = f", peak {r['peak_mb'][name]:,} MB" if r["peak_mb"][name] else ""
        figures = f"{r[name]:>10,.1f} {r['unit']:<6} ({low:,.1f} to {high:,.1f})"
        print(f"  {name:<11}{figures}   setup {r['setup_s'][name]:.1f} s{memory}")
    print(f"  {r['ratio']:.2f} x {r['best_peer']}, the best peer\n" if r["ratio"] else "", flush=True)


def report(s, device, only, vs, folder, temporary, weights, started):
    """Run each workload and print its card; then the limits, the machine, and everything as one JSON object."""
    results, limits, (dtype, _) = {}, {}, pick_autocast("auto", device)
    program = "llamacpp" in vs and (s.llama_bench or shutil.which("llama-bench")) or ""
    for work in only:
        contenders = contenders_for(work, vs, device, str(folder), str(temporary), dtype, program)
        if work not in ("encode", "startup", "busy"):
            contenders["machine"] = (machine, device)
        print(f"{work}: {', '.join(contenders)} ...", flush=True, file=sys.stderr)
        found = take_turns(contenders, s.repeats)
        for speeds in found.pop("machine", {}).get("rounds", []):
            limits = {key: max(value, limits.get(key, 0)) for key, value in speeds.items()}
        results[work] = summary(work, found)
        print_card(work, results[work])
    for work, r in results.items():
        limit = hardware_limit(work, limits, weights, device)
        r["limit"] = limit and round(limit, 1)
        r["limit_fraction"] = round(r["ours"] / limit, 3) if r.get("ours") and limit else None
        if r["limit_fraction"]:
            print(f"{work}: {r['limit_fraction']:.0%} of the {limit:,.0f} {r['unit']} that the hardware allows")
    info = {"device": torch.cuda.get_device_name() if device != "cpu" else torch.cpu.get_capabilities().get("cpu_name")}
    info |= {"dtype": str(dtype)[6:], "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
    info |= {f"{key}_{'gb_s' if key == 'memory' else 'gflops'}": round(value, 1) for key, value in limits.items()}
    packages = "torch", "transformers", "tokenizers", "xllamacpp", "openvino-genai"
    info |= {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
    info |= {"llama_bench": program, "seconds": round(time.time() - started)}
    print("machine: " + ", ".join(f"{key} {value}" for key, value in info.items() if value))
    print(json.dumps({"machine": info} | results))


# ----------------------------------------------------------------------------------------------------------------------
# the command


def make_model(folder: Path) -> Path:
    """Save random bf16 weights in the 135M shape, with a tokenizer, so that every contender can load the folder."""
    torch.manual_seed(0)
    save_pretrained(SmolLM2(PRESETS["135M"]).to(torch.bfloat16), folder)
    prepare.train_bpe([prepare.PLAY.read_text(encoding="utf-8")], 4000).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(prepare.END, 8192))
    return folder


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    only = [w.strip() for w in s.only.split(",") if w.strip()] or USUAL
    vs = [v.strip() for v in s.vs.split(",") if v.strip() not in ("", "none")]
    problems = [f"--only={w}: expected some of {', '.join(ALL)}." for w in only if w not in ALL]
    problems += [f"--vs={v}: expected hf, llamacpp, openvino or none." for v in vs if v not in ("hf", *FILES)]
    if s.llama_bench and not shutil.which(s.llama_bench):
        problems.append(f"--llama_bench={s.llama_bench}: no such program.")
    if problems:
        raise UserError("\n".join(problems))
    device = pick_device(s.device)
    started = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder, weights = Path(temporary), {}
        if {*GENERATE, "startup", "busy"} & set(only):
            folder = find(s.model) if s.model else make_model(folder)
            model, _ = load(folder)
            c = model.config
            weights = model.num_parameters() | {"cached": 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim}
            vs = write_ggufs(folder, Path(temporary), vs)
        report(s, device, only, vs, folder, Path(temporary), weights, started)


if __name__ == "__main__":
    run_main(main)
