"""
How fast, beside whom, and how near the machine's own limit.

    python bench.py                                     # everything, in under ten minutes on two CPU cores
    python bench.py --only=decode,decode_int8 --vs=llamacpp
    python bench.py --model=out/smol_shakespeare --vs=none

Each contender (ours, transformers, llama.cpp) lives in a process of its own, is warmed up, and then they take turns,
A B C A B C, so that a machine whose speed drifts drifts for all of them; the median of the rounds is reported, with
the lowest and highest. Beside it stands what the hardware allows, measured in the same run: training and prefill are
bound by matrix products (MFU: useful floating-point operations per second over those of a large bf16 product), decoding
by memory (bytes of weights per second over those of a plain read). Compiling is timed apart, as "setup".

The last line of stdout is one JSON object.
"""

import importlib.metadata
import json
import multiprocessing
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import prepare
from config import UserError, guard, override
from model import PRESETS, KVCache, ModelError, SmolLM2, keep_freed_memory, write_json
from sample import find, generate, pick_device, prefill, read_tokenizer
from train import make_optimizer, peak_flops


@dataclass
class Settings:
    only: str = (
        ""  # which work, comma-separated: train, train_full_vocab, prefill, decode, decode_int8, encode, startup
    )
    vs: str = "hf,llamacpp"  # beside whom: hf, llamacpp, none
    model: str = ""  # model directory or hub id for prefill, decode and startup; empty: random weights, 135M
    repeats: int = 5  # rounds
    device: str = "cpu"  # cpu or cuda


WORKS = "train train_full_vocab prefill decode decode_int8 encode startup".split()
UNITS = dict.fromkeys(WORKS, "tok/s") | {"encode": "MB/s", "startup": "s"}
PROMPT, NEW = 16, 64  # decoding: tokens of prompt, tokens generated
PREFILL = 512


# ----------------------------------------------------------------------------------------------------------------------
# contenders: generators that set up, yield once, and then do one round of work per next(), yielding units per second


def training(who: str, device: str, vocab: int, rows: int, T: int):
    """Whole optimizer steps in bf16 autocast with fp32 weights, clipping and fused AdamW, on random tokens."""
    config = replace(PRESETS["135M"], vocab_size=vocab, max_position_embeddings=T)
    torch.manual_seed(0)
    if who.startswith("ours"):
        keep_freed_memory()  # as train.py does
        model = SmolLM2(config).to(device).train()
        if who == "ours":
            model.compile_for_training()

        def loss_of(ids):
            return model(ids[:, :-1], ids[:, 1:], logits_to_keep=-1)[1]
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(**config.to_dict(torch.float32))).to(device).train()

        def loss_of(ids):
            return model(ids[:, :-1], labels=ids[:, :-1]).loss

    optimizer = make_optimizer(model, 1e-4, 0.1, (0.9, 0.95))
    ids = torch.randint(0, vocab, (rows, T + 1), device=device)

    def steps(n):
        started = time.perf_counter()
        for _ in range(n):
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # waits for a GPU
        return n * rows * T / (time.perf_counter() - started)

    steps(2)
    yield
    while True:
        yield steps(2)


def prefilling(who: str, device: str, folder: str):
    ids = torch.randint(0, 1000, (1, PREFILL), generator=torch.Generator().manual_seed(0)).to(device)
    if who == "llamacpp":
        llama = LlamaCpp(Path(folder) / "bf16.gguf")
        yield
        while True:
            yield llama.complete(ids[0].tolist(), 1)["prompt_per_second"]
    run = None
    if who == "hf":
        model = load_hf(folder, device)

        def run():
            with torch.inference_mode():
                model(ids, use_cache=True, logits_to_keep=1)
    else:
        keep_freed_memory()  # as sample.py does
        model = SmolLM2.from_pretrained(folder, device, torch.bfloat16)

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
        yield max(rate() for _ in range(2))


def decoding(who: str, device: str, folder: str, int8: bool = False):
    prompt = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    if who == "llamacpp":
        llama = LlamaCpp(Path(folder) / ("q8_0.gguf" if int8 else "bf16.gguf"))
        yield
        while True:
            yield llama.complete(prompt[0].tolist(), NEW)["predicted_per_second"]
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
            return clock.times[1:]  # the first call is the prompt
    else:
        model = SmolLM2.from_pretrained(folder, device, torch.bfloat16)
        if int8:
            model.quantize("int8")
        if device != "cpu":
            model.compile_for_generation()

        def token_times():
            steps = generate(model, prompt, NEW, temperature=0, stop_ids=[], use_c=who == "ours")
            return [synchronize(device) or time.perf_counter() for _ in steps]

    def rate():
        times = token_times()
        return (len(times) - 1) / (times[-1] - times[0])

    rate()
    yield
    while True:
        yield rate()


def encoding(who: str):
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


def machine(device: str):
    """GFLOP/s of matrix products and GB/s of reading memory: the best of each round."""
    big = torch.ones(1 << 26, device=device)  # 256 MB, beyond any cache
    yield
    while True:
        found = {str(d)[6:]: product_rate(device, d) / 1e9 for d in (torch.bfloat16, torch.float32)}
        best = 0.0
        for _ in range(8):
            started = time.perf_counter()
            big.sum()
            synchronize(device)
            best = max(best, big.numel() * 4 / (time.perf_counter() - started) / 1e9)
        yield found | {"memory": best}


def product_rate(device, dtype):
    if device == "cpu":
        return peak_flops(device, dtype)[0]
    a, b = (torch.ones(8192, 8192, device=device, dtype=dtype) for _ in "ab")
    best = 0.0
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * 8192**3 / (time.perf_counter() - started))
    return best


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize()


def load_hf(folder, device):
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()


class LlamaCpp:
    """llama.cpp's server, inside this process through the xllamacpp wheel, on a GGUF of the same weights."""

    def __init__(self, file):
        import xllamacpp

        p = xllamacpp.CommonParams()
        p.model.path = str(file)
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_parallel, p.n_gpu_layers = 1024, 512, 512, 1, 0
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        p.warmup, p.fit_params, p.cache_ram_mib, p.verbosity = True, False, 0, 0
        self.server = xllamacpp.Server(p)
        self.complete([1, 2, 3], 8)

    def complete(self, ids: list[int], n: int) -> dict:
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
    """The life of a contender's process: set up, say so, do a round whenever asked, tell the peak memory at the end."""
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
    """The most memory this process has held. (getrusage would count what its parent held when it was started.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def take_turns(contenders: dict[str, tuple], repeats: int) -> dict:
    """Run (function, *arguments) contenders in turns. For each: rounds, setup_s and peak_mb, or why it failed."""
    found, alive = {}, {}
    context = multiprocessing.get_context("spawn")
    for name, (function, *arguments) in contenders.items():  # one after the other: setting up uses all cores
        print(f"  {name} ...", end=" ", flush=True, file=sys.stderr)
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        kind, value = receive(ours)
        found[name] = dict(rounds=[], setup_s=value) if kind == "ready" else dict(failed=value)
        if kind == "ready":
            alive[name] = ours, process
    for _ in range(repeats):
        for name in list(alive):
            alive[name][0].send(True)
            kind, value = receive(alive[name][0])
            if kind == "round":
                found[name]["rounds"].append(value)
            else:
                found[name] = dict(failed=value)
                alive.pop(name)
    for name, (connection, process) in alive.items():
        connection.send(False)
        found[name]["peak_mb"] = receive(connection)[1]
        process.join(5)
        process.kill()
    print(file=sys.stderr)
    return found


def receive(connection):
    try:
        return connection.recv()
    except EOFError:
        return "failed", "its process died"


def contenders_for(work: str, vs: list[str], device: str, folder: str, ggufs: str) -> dict[str, tuple]:
    if work in ("train", "train_full_vocab"):
        shape = (5000, 4, 256) if work == "train" else (49152, 2, 512)
        return {
            who: (training, who, device, *shape)
            for who in ("ours", "ours_eager", "hf")
            if who == "ours" or who in vs or (who == "ours_eager" and work == "train")
        }
    if work == "prefill":
        return {who: (prefilling, who, device, ggufs if who == "llamacpp" else folder) for who in ("ours", *vs)}
    if work in ("decode", "decode_int8"):
        names = ("ours", "ours_plain", *(v for v in vs if v == "llamacpp" or work == "decode"))
        return {
            who: (decoding, who, device, ggufs if who == "llamacpp" else folder, work == "decode_int8") for who in names
        }
    if work == "encode":
        return {"ours": (encoding, "ours"), "tokenizers": (encoding, "tokenizers")}
    return {who: (starting, who, folder) for who in ("ours", *(v for v in vs if v == "hf"))}


def summary(work: str, found: dict, limits: dict, weights: dict) -> dict:
    """Medians and spreads; ratio to the best peer (above 1 is better, for seconds too); share of the limit."""
    unit, result = UNITS[work], {"unit": UNITS[work]}
    for name, one in found.items():
        if "failed" in one:
            result[name] = None
            result.setdefault("failed", {})[name] = one["failed"]
            continue
        result[name] = round(statistics.median(one["rounds"]), 2)
        result.setdefault("spread", {})[name] = [round(min(one["rounds"]), 2), round(max(one["rounds"]), 2)]
        result.setdefault("setup_s", {})[name] = round(one["setup_s"], 1)
        result.setdefault("peak_mb", {})[name] = round(one["peak_mb"])
    peers = [result[n] for n in found if not n.startswith("ours") and result[n]]
    ours = result.get("ours")
    result["ratio"] = None
    if ours and peers:
        result["ratio"] = round(min(peers) / ours if unit == "s" else ours / max(peers), 2)
    limit = None
    if work.startswith("train"):
        config = replace(PRESETS["135M"], vocab_size=5000 if work == "train" else 49152)
        with torch.device("meta"):
            limit = limits["bfloat16"] * 1e9 / SmolLM2(config).flops_per_token(256 if work == "train" else 512)
    elif work == "prefill":
        limit = limits["bfloat16"] * 1e9 / (2 * weights["backbone"])
    elif work.startswith("decode"):
        limit = limits["memory"] * 1e9 / (weights["total"] * (1 if work == "decode_int8" else 2))
    result["limit"] = limit and round(limit, 1)
    result["limit_fraction"] = round(ours / limit, 3) if ours and limit else None
    return result


def make_model(folder: Path):
    """Random weights of the 135M shape in bf16, with a tokenizer, so that every script and tool reads the directory."""
    torch.manual_seed(0)
    SmolLM2(PRESETS["135M"]).to(torch.bfloat16).save_pretrained(folder)
    prepare.train_bpe([prepare.PLAY.read_text(encoding="utf-8")], 4000).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", prepare.tokenizer_config(prepare.END, 8192))


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    only = [w.strip() for w in s.only.split(",") if w.strip()] or WORKS
    vs = [v.strip() for v in s.vs.split(",") if v.strip() not in ("", "none")]
    problems = [f"--only={w}: expected some of {', '.join(WORKS)}." for w in only if w not in WORKS]
    problems += [f"--vs={v}: expected hf, llamacpp or none." for v in vs if v not in ("hf", "llamacpp")]
    if s.repeats < 1:
        problems.append(f"--repeats={s.repeats}: expected at least 1.")
    if problems:
        raise UserError("\n".join(problems))
    device = pick_device(s.device)
    started = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        folder, weights = Path(temporary), {}
        if {"prefill", "decode", "decode_int8", "startup"} & set(only):
            if s.model:
                folder = find(s.model)
            else:
                make_model(folder)
            weights = SmolLM2.from_pretrained(folder).num_parameters()
            read_tokenizer(folder)
            if "llamacpp" in vs:
                vs = write_ggufs(folder, Path(temporary), vs)
        report(s, device, only, vs, folder, Path(temporary), weights, started)


def write_ggufs(folder: Path, temporary: Path, vs: list[str]) -> list[str]:
    """The same weights for llama.cpp; without its packages it is left out, and the card says how to get them."""
    try:
        import gguf  # noqa: F401
        import xllamacpp  # noqa: F401
    except ImportError as error:
        print(f"llamacpp is left out: {error.name} is not installed. pip install gguf xllamacpp", file=sys.stderr)
        return [v for v in vs if v != "llamacpp"]
    from export_gguf import export

    for kind in ("bf16", "q8_0"):
        made = export(folder, kind, temporary / kind)
        made.rename(temporary / f"{kind}.gguf")
    return vs


def report(s, device, only, vs, folder, temporary, weights, started):
    results, limits = {}, {}
    for work in only:
        print(f"{work}:", end="", flush=True, file=sys.stderr)
        contenders = contenders_for(work, vs, device, str(folder), str(temporary))
        if work not in ("encode", "startup"):
            contenders["machine"] = (machine, device)
        found = take_turns(contenders, s.repeats)
        here = found.pop("machine", {}).get("rounds", [])
        # the limit is the best that the machine showed during this work: a slow moment is not the hardware's bound
        here = {k: max(r[k] for r in here) for k in here[0]} if here else {}
        limits = {k: max(v, limits.get(k, 0)) for k, v in here.items()} or limits
        results[work] = summary(work, found, here, weights)
        print_card(work, results[work])
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("transformers", "xllamacpp", "tokenizers", "tiktoken"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cpu = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    info = dict(
        device=torch.cuda.get_device_name() if device != "cpu" else cpu,
        threads=torch.get_num_threads(),
        date=time.strftime("%Y-%m-%d"),
        gflops={k: round(v, 1) for k, v in limits.items() if k != "memory"},
        memory_gb_s=round(limits.get("memory", 0), 1),
        versions=versions,
        seconds=round(time.time() - started),
    )
    print(
        f"machine: {info['device']}, {info['threads']} threads, bf16 product {info['gflops'].get('bfloat16', 0):,.0f} "
        f"GFLOP/s, fp32 {info['gflops'].get('float32', 0):,.0f}, memory {info['memory_gb_s']:.1f} GB/s, "
        + ", ".join(f"{k} {v}" for k, v in versions.items() if v)
        + f", {info['date']}, {info['seconds']} s in all"
    )
    print(json.dumps({"machine": info} | results))


def print_card(work: str, r: dict):
    names = [n for n in r if n in ("ours", "ours_eager", "ours_plain", "hf", "llamacpp", "tokenizers")]
    rows = []
    for name in names:
        if r[name] is None:
            rows.append(f"  {name:<11} failed: {r['failed'][name]}")
            continue
        low, high = r["spread"][name]
        rows.append(
            f"  {name:<11}{r[name]:>10,.1f} {r['unit']:<6} ({low:,.1f} to {high:,.1f})   "
            f"setup {r['setup_s'][name]:.1f} s, peak {r['peak_mb'][name]:,} MB"
        )
    tail = f"  {r['ratio']:.2f} x the best peer" if r["ratio"] else "  no peer"
    if r["limit_fraction"]:
        tail += f"; {r['limit_fraction']:.0%} of the {r['limit']:,.0f} {r['unit']} that the hardware allows"
    print(f"{work}\n" + "\n".join(rows) + f"\n{tail}\n", flush=True)


if __name__ == "__main__":
    guard(main, ModelError)
