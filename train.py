"""
Train SmolLM2 from scratch, or from released weights, on what prepare.py made. Stop it any time; it goes on from there.

    python train.py config/tiny_shakespeare.py                  # a small model, four minutes on two CPU cores
    python train.py config/smol_shakespeare.py                  # the full 135M shape, twenty minutes
    python train.py config/smol_shakespeare.py --max_iters=5000 # the same run again, longer: it resumes
    python train.py config/finetune_smollm2.py                  # from the released weights
    torchrun --standalone --nproc_per_node=8 train.py config/smol_135m.py

out/RUN/ is at every moment a Hugging Face model directory with the best model so far (lowest validation loss); beside
it lie state.pt, everything a resume needs, and log.jsonl. The data are prepared first if they are not there.

A step is `global_batch_size` rows of `block_size` tokens, however many processes and micro-batches share the work: the
rows are a function of seed and step alone, so splitting them otherwise, or stopping and going on, changes nothing.
"""

import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import prepare
from config import UserError, guard, override
from model import ModelError, SmolLM2, SmolLM2Config, atomic, keep_freed_memory, read_json, write_json
from sample import file_sha256, find, generate, load, pick_device, read_tokenizer


@dataclass
class Settings:
    # the run
    out_dir: str = "out/run"  # the run's folder
    init_from: str = "auto"  # auto: go on if out_dir has a state.pt, else scratch; resume; scratch (starts over);
    #                          or a model directory or hub id to fine-tune
    accept_changes: str = ""  # settings, comma-separated, that may differ from those of the run that is resumed
    eval_interval: int = 100  # steps between evaluations; each saves state.pt, and the model if it is the best so far
    eval_rows: int = 2000  # evaluate on all of the validation split, or on this many rows spread evenly over it
    patience: int = 0  # stop after this many evaluations without improvement; 0 never
    log_interval: int = 10  # steps between log lines
    sample_interval: int = 0  # steps between printed samples of text, a multiple of eval_interval; 0 none
    # a step
    global_batch_size: int = 16  # rows per optimizer step, all processes together: this decides the result
    micro_batch_size: int = 16  # rows per forward pass: whatever fits in memory and is fast
    block_size: int = 256  # tokens per row
    # the optimizer: AdamW
    max_iters: int = 1000  # steps
    learning_rate: float = 1e-3  # the peak, after warmup
    min_lr: float = 1e-4  # where the schedule ends
    warmup_iters: int = 50  # steps from 0 to the peak
    lr_schedule: str = "cosine"  # cosine; wsd (warmup, stable, linear decay: SmolLM2's own); constant
    lr_decay_iters: int = 0  # the step at which the schedule reaches min_lr; 0 is max_iters of the first start
    decay_fraction: float = 0.2  # wsd: how much of the run decays; SmolLM2 took the last fifth
    token_noise: float = 0.0  # share of input tokens replaced by random ones: against learning a short text by heart
    weight_decay: float = 0.1  # on matrices only; norm weights are left alone
    beta1: float = 0.9  # memory of the gradient
    beta2: float = 0.95  # shorter memory than the usual 0.999: steadier where batches are small
    grad_clip: float = 1.0  # largest gradient norm; 0 leaves it as it is
    seed: int = 1337  # of the first weights and the order of the rows
    # the machine
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: str = "auto"  # float32, bfloat16, float16 of the products; weights are float32 always
    compile: str = "auto"  # torch.compile of the blocks: on, off; auto where it will pay within the run
    peak_tflops: float = 0.0  # of one device in this dtype, for MFU; 0: known (some GPUs) or measured (CPU)
    # the architecture, when from scratch: SmolLM2-135M; the vocabulary comes with the data
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 0  # 0 is hidden_size / num_attention_heads
    max_position_embeddings: int = 0  # the model's context; 0 is block_size, all it will have been trained on
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    initializer_range: float = 0.0  # 0 is 1 / sqrt(hidden_size), which for 576 is the released 0.0417


# What may change between a stop and a resume without leave: none of it touches which steps are taken. max_iters may
# rise, which adds steps at the end of the schedule; everything else must be named in accept_changes.
FREE = (
    "out_dir init_from accept_changes eval_interval log_interval sample_interval patience micro_batch_size max_iters "
    "device compile peak_tflops"
).split()

# Dense bf16/fp16 peaks from the vendors' data sheets. A device that is not here gets no MFU rather than a wrong one.
KNOWN_PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 3090": 71}


# ----------------------------------------------------------------------------------------------------------------------
# data


class Rows:
    """Training rows: row i of a run is a pure function of (seed, i). There is no state to save, and nothing for the
    number of processes or the micro-batch to disturb.

    Each epoch cuts the text into blocks from an offset of its own, wrapping round at the end, and visits them in an
    order of its own. Over an epoch every token is predicted once, but for a remainder shorter than a block.

    noise: the share of the inputs, never of the targets, that becomes a token drawn from the whole vocabulary, another
    in every epoch: "blank noising" without the blank (https://arxiv.org/abs/1703.02573). A text that is read many times
    is then never the same twice.
    """

    def __init__(self, file, tokens: int, block_size: int, seed: int, noise: float = 0.0, vocab_size: int = 0):
        if tokens < block_size + 1:
            raise UserError(
                f"{file} has {tokens:,} tokens; --block_size={block_size} needs {block_size + 1:,}. Use more text, or "
                f"--block_size={max(1, tokens - 1)} or less."
            )
        self.file = open(file, "rb")  # read by position, not mapped: a mapped file seems to fill the memory
        self.tokens, self.T, self.seed, self.noise, self.vocab_size = tokens, block_size, seed, noise, vocab_size
        self.per_epoch = tokens // block_size
        self.epoch = -1

    def read(self, start: int, count: int) -> np.ndarray:
        self.file.seek(2 * start)
        return np.frombuffer(self.file.read(2 * count), dtype="<u2").astype(np.int64)

    def __getitem__(self, row: int) -> np.ndarray:  # (T + 1,) int64
        epoch, i = divmod(row, self.per_epoch)
        if epoch != self.epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self.offset, self.order, self.epoch = (
                random.integers(self.tokens),
                random.permutation(self.per_epoch),
                epoch,
            )
        start = (self.offset + self.order[i] * self.T) % self.tokens
        first = min(self.T + 1, self.tokens - start)
        return np.concatenate((self.read(start, first), self.read(0, self.T + 1 - first)))

    def batch(self, rows: range, device) -> tuple[torch.Tensor, torch.Tensor]:  # inputs, targets: (B, T) int64
        data = np.stack([self[row] for row in rows])
        inputs = data[:, :-1].copy()
        for i, row in enumerate(rows if self.noise else ()):
            random = np.random.Generator(np.random.PCG64([self.seed, row, 1]))
            hit = random.random(self.T) < self.noise
            inputs[i, hit] = random.integers(self.vocab_size, size=hit.sum())
        return move(torch.from_numpy(inputs), device), move(torch.from_numpy(data[:, 1:]), device)


def validation_rows(file, tokens: int, block_size: int, limit: int) -> torch.Tensor:
    """All of the validation split as rows (N, T + 1), the last one filled up with -100, which no loss counts; if there
    are more than `limit`, that many of them at even distances. Always the same rows in the same order."""
    data = np.fromfile(file, dtype="<u2").astype(np.int64)
    assert len(data) == tokens, f"{file} changed under our hands"
    n = math.ceil((tokens - 1) / block_size)
    rows = np.full((n, block_size + 1), -100, dtype=np.int64)
    for i in range(n):
        piece = data[i * block_size : (i + 1) * block_size + 1]
        rows[i, : len(piece)] = piece
    if n > limit:
        rows = rows[np.linspace(0, n - 1, limit).round().astype(int)]
    return torch.from_numpy(rows)


def move(tensor: torch.Tensor, device) -> torch.Tensor:
    if torch.device(device).type == "cuda":  # from pinned memory the copy runs beside the computation
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@torch.no_grad()
def evaluate(model, rows, batch_size, autocast, rank=0, world=1, stopping=lambda: False) -> float | None:
    """Mean loss in nats per token over `rows`, the same number however the rows are shared out; None if stopped."""
    total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
    mine = rows[rank::world]
    for a in range(0, len(mine), batch_size):
        if stopping():
            break
        batch = mine[a : a + batch_size]
        if len(batch) < batch_size:  # one shape for all, so that a compiled model compiles once
            batch = torch.cat((batch, torch.full((batch_size - len(batch), batch.size(1)), -100)))
        inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:]
        count = int((targets != -100).sum())
        with autocast():
            _, loss = model(move(inputs, model.device), move(targets, model.device), logits_to_keep=-1)
        total += torch.tensor([float(loss) * count, count], dtype=torch.float64)
    if world > 1:
        reduced = torch.cat((total, torch.tensor([float(stopping())], dtype=torch.float64))).to(model.device)
        dist.all_reduce(reduced)
        if reduced[2] > 0:
            return None
        total = reduced[:2].cpu()
    return None if stopping() else float(total[0] / total[1])


# ----------------------------------------------------------------------------------------------------------------------
# the machine


def pick_autocast(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of matrix products and why: bf16 where the processor has it, by capability, since some accept it and
    emulate. A wrong name raises UserError."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in dtypes:
            raise UserError(f"--dtype={name}: expected auto, {', '.join(dtypes)}.")
        return dtypes[name], "as asked"
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"CUDA capability {major}.{minor} has bfloat16"
        return torch.float16, f"CUDA capability {major}.{minor} has no bfloat16; float16 with loss scaling"
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        for feature in ("amx_bf16", "avx512_bf16", "bf16"):
            if has.get(feature):
                return torch.bfloat16, f"the CPU has {feature}"
        return torch.float32, "the CPU has no bfloat16"
    return torch.float32, f"float32 is the safe choice on {device}"


def peak_flops(device: str, dtype: torch.dtype, given_tflops: float = 0.0) -> tuple[float, str]:
    """Floating-point operations per second the device could do, and where the figure is from; 0 if nobody knows."""
    if given_tflops:
        return given_tflops * 1e12, "as given"
    if device == "cpu":
        a, b = (torch.ones(1024, 1024, dtype=dtype) for _ in "ab")
        best, started = math.inf, time.perf_counter()
        while time.perf_counter() - started < 0.3:
            before = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - before)
        return 2 * 1024**3 / best, "measured"
    if device.startswith("cuda") and dtype != torch.float32:
        name = torch.cuda.get_device_name()
        for key, tflops in KNOWN_PEAK_TFLOPS.items():
            if key in name:
                return tflops * 1e12, f"data sheet of {key}"
    return 0.0, "unknown"


def pick_compile(choice: str, device: str, flops: float, peak: float) -> tuple[bool, str]:
    """Compile the blocks or not, and why. `flops` is the work of the whole run. All blocks share one compiled graph,
    so it costs some 20 seconds the first time, not the minute of compiling 30 of them."""
    if choice not in ("auto", "on", "off"):
        raise UserError(f"--compile={choice}: expected auto, on or off.")
    if choice != "auto":
        return choice == "on", "as asked"
    if sys.platform == "win32":
        return False, "not tried on Windows"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return False, "there is no C++ compiler"
    if device.startswith("cuda") and torch.cuda.get_device_capability() < (7, 0):
        return False, "this GPU is too old for Triton"
    if device not in ("cpu",) and not device.startswith("cuda"):
        return False, f"compiled training is not reliable on {device}"
    minutes = flops / (0.5 * peak) / 60 if peak else math.inf
    if minutes < 5:
        return False, f"the run is about {minutes:.1f} minutes of work, too short to earn the compiling back"
    return True, "the run is long enough to earn the compiling back"


def make_optimizer(model: SmolLM2, learning_rate: float, weight_decay: float, betas: tuple[float, float]):
    """AdamW with decay on the matrices and none on the norm weights; every parameter in exactly one group."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = model.device.type in ("cpu", "cuda")  # one kernel for all; on a CPU three to six times the plain one
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)


def learning_rate_at(step: int, s: Settings, decay_iters: int) -> float:
    """The learning rate of step 0, 1, ...: (1) warmup, (2) after the schedule's end min_lr, (3) in between."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / s.warmup_iters
    if s.lr_schedule == "constant":
        return s.learning_rate
    if step >= decay_iters:
        return s.min_lr
    if s.lr_schedule == "cosine":
        progress = (step - s.warmup_iters) / (decay_iters - s.warmup_iters)
        return s.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.min_lr)
    decay = max(1, round(s.decay_fraction * decay_iters))  # wsd
    return s.min_lr + min(1.0, (decay_iters - step) / decay) * (s.learning_rate - s.min_lr)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_state(path: Path, model, optimizer, scaler, progress: dict, settings: Settings, facts: dict):
    """state.pt: plain numbers, text and tensors, so that it loads with weights_only=True and nothing in it can run.
    Raises OSError, and leaves the old one, if the disk is full."""
    state = dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        progress=progress,
        settings=asdict(settings),
        facts=facts,
        rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    )
    with atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error


def load_state(path: Path) -> dict:
    """Read state.pt. UserError where it is missing, cut short, altered (its zip entries carry checksums), or holds
    anything but plain data."""
    if not path.is_file():
        raise UserError(f"{path} not found: nothing to resume. Without --init_from=resume the run starts from scratch.")
    way_out = (
        f"The best model in {path.parent} is not touched by this. Start over with --init_from=scratch, or fine-tune "
        f"from it with --init_from={path.parent} --out_dir=another."
    )
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise zipfile.BadZipFile(f"{broken} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
        pickle.UnpicklingError,
    ) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} is damaged or not a state of ours: {reason}\n{way_out}") from None
    if set(state) != set("model optimizer scaler progress settings facts rng cuda_rng".split()):
        raise UserError(f"{path} was not written by this version of train.py.\n{way_out}")
    return state


def check_resume(state: dict, s: Settings, facts: dict, path: Path):
    """UserError naming every setting and every fact about the data that differs from the run in `state`."""
    accepted = [key.strip() for key in s.accept_changes.split(",") if key.strip()]
    then, now = state["settings"], asdict(s)
    changed = [k for k in now if k not in FREE and k not in accepted and now[k] != then.get(k)]
    problems = [f"{key} was {then.get(key)!r}, is {now[key]!r}" for key in changed]
    for key, value in facts.items():
        if state["facts"].get(key) != value:
            problems.append(
                f"the {key.replace('_', ' ')} was {str(state['facts'].get(key))[:12]}, is {str(value)[:12]}"
            )
    if problems:
        remedy = f"Use the old values, another --out_dir, or --init_from=scratch to start {path.parent} over."
        if changed:
            remedy += f" To go on all the same: --accept_changes={','.join(changed)}"
        raise UserError(f"{path} is of a run with other settings: {'; '.join(problems)}.\n{remedy}")


class Log:
    """log.jsonl: one line per log step, evaluation and sample. After a resume, lines beyond its step are dropped: those
    steps are about to happen again."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if self.step_of(line) <= step]
            with atomic(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    @staticmethod
    def step_of(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            return math.inf  # half a line, from a kill

    def write(self, **entry):
        entry = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()
        }  # JSON has no NaN
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
        except OSError as error:
            print(f"!! {self.path} could not be written ({error}); training goes on")


# ----------------------------------------------------------------------------------------------------------------------
# the run


def main():
    s, data = override(sys.argv[1:], Settings, prepare.Settings, doc=__doc__)
    check_settings(s)
    keep_freed_memory()

    # one process, or one of many: torchrun says which
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(s.device)
    if world > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        if s.global_batch_size % world:
            raise UserError(f"--global_batch_size={s.global_batch_size} cannot be shared evenly by {world} processes.")
    out_dir = Path(s.out_dir)
    master = rank == 0

    def say(text=""):
        if master:
            print(text, flush=True)

    with prepare.exclusive(out_dir, "being trained in") if master else nullcontext():
        try:
            run(s, data, out_dir, device, rank, world, say)
        finally:
            if world > 1:
                dist.destroy_process_group()


def check_settings(s: Settings):
    problems = []
    for f in fields(s):
        if f.type is int and getattr(s, f.name) < 0:
            problems.append(f"--{f.name}={getattr(s, f.name)}: expected 0 or more.")
    for name in "eval_interval eval_rows log_interval global_batch_size micro_batch_size block_size".split():
        if getattr(s, name) == 0:
            problems.append(f"--{name}=0: expected at least 1.")
    if s.lr_schedule not in ("cosine", "wsd", "constant"):
        problems.append(f"--lr_schedule={s.lr_schedule}: expected cosine, wsd or constant.")
    if s.eval_interval and s.sample_interval % s.eval_interval:
        problems.append(
            f"--sample_interval={s.sample_interval}: expected a multiple of eval_interval={s.eval_interval}."
        )
    if not 0 <= s.token_noise < 1:
        problems.append(f"--token_noise={s.token_noise}: expected a share of 0 or more and below 1.")
    unknown = [k for k in s.accept_changes.split(",") if k.strip() and k.strip() not in {f.name for f in fields(s)}]
    if unknown:
        problems.append(f"--accept_changes: {', '.join(unknown)}: no such setting.")
    if problems:
        raise UserError("\n".join(problems) + "\nNothing was started.")


def run(s: Settings, data: prepare.Settings, out_dir: Path, device: str, rank: int, world: int, say):
    master = rank == 0
    # the data, made now if they are not there
    folder = prepare.DATA / data.dataset
    if master and not (folder / "meta.json").is_file():
        prepare.prepare(data)
    if world > 1:
        dist.barrier()
    meta = prepare.read_meta(data.dataset)
    for key, asked in (("tokenizer", data.tokenizer), ("vocab_size", data.vocab_size)):
        made = meta["tokenizer"] if key == "tokenizer" else meta["vocab_size_asked"]
        if asked != made and not (key == "vocab_size" and data.tokenizer != "bpe"):
            raise UserError(
                f"{folder} was prepared with {key}={made}, asked is {asked}. Prepare it anew with: python prepare.py "
                f"--dataset={data.dataset} --{key}={asked} (and --input), or use another --dataset."
            )
    train_file, tokens = folder / "train.bin", meta["train_tokens"]
    rows = Rows(train_file, tokens, s.block_size, s.seed, s.token_noise, meta["vocab_size"])
    val = validation_rows(folder / "val.bin", meta["val_tokens"], s.block_size, s.eval_rows)

    # the model: resumed, fine-tuned or new
    state_file = out_dir / "state.pt"
    resuming = s.init_from == "resume" or (s.init_from != "scratch" and state_file.is_file())
    facts = {k: meta[k] for k in ("tokenizer_sha256", "source_sha256", "train_tokens", "val_tokens", "vocab_size")}
    progress = dict(step=0, evaluated=-1, best_val_loss=math.inf, best_step=-1, since_best=0, skipped=0, seconds=0.0)
    progress |= dict(recent_loss=None, lr_decay_iters=s.lr_decay_iters or s.max_iters, compile=None)
    torch.manual_seed(s.seed)
    state = source_dir = None
    if resuming:
        state = load_state(state_file)
        check_resume(state, s, facts, state_file)
        progress = state["progress"]
        # the weights are in state.pt; the directory holds the best model, which may be an older one
        progress["lr_decay_iters"] = s.lr_decay_iters or progress["lr_decay_iters"]
        config = SmolLM2Config.from_dict(read_json(out_dir / "config.json"))
        model = SmolLM2(config)
        model.load_state_dict(state["model"])
    elif s.init_from in ("auto", "scratch"):
        model = SmolLM2(
            SmolLM2Config(
                vocab_size=meta["vocab_size"], bos_token_id=meta["eos_token_id"], eos_token_id=meta["eos_token_id"],
                head_dim=s.head_dim or s.hidden_size // s.num_attention_heads,
                max_position_embeddings=s.max_position_embeddings or s.block_size,
                initializer_range=s.initializer_range or s.hidden_size**-0.5,
                **{k: getattr(s, k) for k in "hidden_size intermediate_size num_hidden_layers num_attention_heads "
                   "num_key_value_heads rope_theta rms_norm_eps tie_word_embeddings".split()},
            )
        )  # fmt: skip
    else:
        source_dir = find(s.init_from)
        model, _ = load(source_dir, dtype=torch.float32)  # fp32 master weights, whatever the file holds
        if file_sha256(source_dir / "tokenizer.json") != meta["tokenizer_sha256"]:
            raise UserError(
                f"{folder} was made with another tokenizer than {s.init_from} has. Make it with: python prepare.py "
                f"--dataset={data.dataset} --tokenizer={s.init_from}"
            )
    if s.block_size > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise UserError(f"--block_size={s.block_size} is beyond the model's context of {limit} positions.")
    model.to(device).train()
    optimizer = make_optimizer(model, s.learning_rate, s.weight_decay, (s.beta1, s.beta2))
    dtype, dtype_reason = pick_autocast(s.dtype, device)
    kind = torch.device(device).type
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    torch.set_float32_matmul_precision("high" if kind == "cuda" else "highest")  # TF32 for what stays in fp32
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if kind == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        del state

    def autocast():
        return torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()

    # what is about to happen, in numbers
    T, micro = s.block_size, min(s.micro_batch_size, s.global_batch_size // world)
    step_tokens, mine = s.global_batch_size * T, s.global_batch_size // world
    n = model.num_parameters()
    steps_per_epoch = meta["train_tokens"] / step_tokens
    peak, peak_source = peak_flops(device, dtype, s.peak_tflops)
    token_flops = model.flops_per_token(T)
    compiled, compile_reason = pick_compile(s.compile, device, s.max_iters * step_tokens * token_flops / world, peak)
    if s.compile == "auto" and progress["compile"] is not None:
        compiled, compile_reason = progress["compile"], "as this run began"
    say(f"data     {folder}: {meta['source']}, {meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens")
    say(f"model    {n['total']:,} parameters = {n['embeddings']:,} embeddings + {n['backbone']:,} backbone")
    say(
        f"step     micro-batch {micro} x accumulation {math.ceil(mine / micro)} x processes {world} = "
        f"{s.global_batch_size} rows x {T} tokens = {step_tokens:,} tokens"
    )
    say(f"epochs   {steps_per_epoch:.1f} steps each, {s.max_iters / steps_per_epoch:.1f} in {s.max_iters:,} steps")
    say(f"device   {device}, {torch.get_num_threads()} threads; {str(dtype)[6:]}: {dtype_reason}")
    say(f"compile  {'on' if compiled else 'off'}: {compile_reason}")
    say(f"peak     {peak / 1e9:,.0f} GFLOP/s, {peak_source}" if peak else "peak     unknown, so no MFU: --peak_tflops")
    again = "python " + " ".join(sys.argv) if world == 1 else f"the same torchrun command ({' '.join(sys.argv)})"
    if resuming:
        say(f"resume   {state_file} at step {progress['step']:,}, best validation loss {progress['best_val_loss']:.4f}")
        if s.max_iters > progress["lr_decay_iters"] and s.lr_schedule != "constant":
            say(f"         the schedule ended at step {progress['lr_decay_iters']:,}; the rest runs at {s.min_lr:g}")
    if progress["step"] >= s.max_iters and progress["evaluated"] == progress["step"]:
        say(f"finished at step {progress['step']:,}. More steps: {again} --max_iters={2 * s.max_iters}")
        return
    if resuming and s.patience and progress["since_best"] >= s.patience:
        say(f"stopped by patience at step {progress['step']:,}. To go on: {again} --patience={2 * s.patience}")
        return
    first_save = min(s.max_iters, (progress["step"] // s.eval_interval + 1) * s.eval_interval)
    say(f"saves    to {out_dir}, first at step {first_save:,}, then every {s.eval_interval:,} steps")

    # the folder: a complete model directory from the first minute on
    if master and not resuming:
        state_file.unlink(missing_ok=True)
        (out_dir / "log.jsonl").unlink(missing_ok=True)
        copy_tokenizer(folder, source_dir, out_dir, meta["eos_token"], model.config.max_position_embeddings)
        first_weights = dict(step="0", tokenizer_sha256=meta["tokenizer_sha256"])
        model.save_pretrained(out_dir, first_weights if source_dir else first_weights | {"untrained": "true"})
    for stale in out_dir.glob("*.tmp") if master else ():
        stale.unlink()
    log = Log(out_dir / "log.jsonl", progress["step"]) if master else None
    tokenizer = read_tokenizer(folder)

    # we train with `trained`; `model` is the bare module that is saved and sampled from. They share the weights, and
    # blocks are compiled in place, so no name ever gets a prefix.
    if compiled:
        model.compile_for_training()
    trained = DistributedDataParallel(model, gradient_as_bucket_view=True) if world > 1 else model

    # stopping: the first signal asks, at the next safe point all processes agree, save and leave; the second insists
    asked_to_stop = []

    def on_signal(number, frame):
        if asked_to_stop:
            os._exit(128 + number)
        asked_to_stop.append(number)
        say(f"\n{signal.Signals(number).name}: saving at the end of this step; once more to quit at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def save():
        if not master:
            return
        try:
            save_state(state_file, model, optimizer, scaler, progress, s, facts)
        except OSError as error:
            say(f"!! {state_file} could not be written ({error}); the previous one is kept and training goes on")

    def accumulate(step):
        """Forward and backward over this process's share of a step's rows; returns the summed loss of all processes."""
        nonlocal micro
        begin = step * s.global_batch_size + rank * mine
        total = torch.zeros((), device=device)
        for a in range(0, mine, micro):
            batch = range(begin + a, begin + min(a + micro, mine))
            inputs, targets = rows.batch(batch, device)
            last = a + micro >= mine
            # DDP averages over processes; the flag that it waits for the last micro-batch must be set before forward
            with trained.no_sync() if world > 1 and not last else nullcontext():
                with autocast():
                    _, loss = trained(inputs, targets, logits_to_keep=-1)
                loss = loss * (len(batch) / mine)
                scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def first_step(step):
        """The first step may run out of memory, or find that compiling does not work here. Both are mended, aloud."""
        nonlocal micro, compiled
        while True:
            try:
                return accumulate(step)
            except Exception as error:
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                memory = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "alloc" in text
                if memory and micro > 1 and world == 1:
                    micro //= 2
                    say(f"!! out of memory: micro-batch {micro} from here on, still {s.global_batch_size} rows a step")
                elif memory:
                    raise UserError(
                        f"out of memory ({text}). Try a smaller --micro_batch_size or --block_size."
                    ) from None
                elif compiled and s.compile == "auto" and world == 1:
                    compiled = False
                    say(f"!! compiling failed ({type(error).__name__}: {text}); going on without")
                    for layer in model.layers:
                        layer._compiled_call_impl = None
                elif compiled:
                    raise UserError(f"--compile=on failed here ({text}). Train without: --compile=off") from None
                else:
                    raise
            optimizer.zero_grad(set_to_none=True)
            if kind == "cuda":
                torch.cuda.empty_cache()

    def evaluation(step) -> bool:
        """Evaluate, keep the model if it is the best, print a sample; False if a signal cut it short."""
        started = time.perf_counter()
        model.eval()
        loss = evaluate(model, val, micro, autocast, rank, world, lambda: bool(asked_to_stop))
        model.train()
        if loss is None:
            return False
        best = loss < progress["best_val_loss"]
        bpb = loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"]
        progress["evaluated"] = step
        progress["since_best"] = 0 if best else progress["since_best"] + 1
        if best:
            progress["best_val_loss"], progress["best_step"] = loss, step
        recent = progress["recent_loss"]
        gap = f" | train {recent:.4f} | gap {loss - recent:+.4f}" if recent is not None else ""
        say(
            f"eval {step:>6} | val {loss:.4f} | ppl {math.exp(min(loss, 99)):.2f} | {bpb:.4f} bits per byte{gap} | "
            f"{time.perf_counter() - started:.1f} s" + (" | best so far" if best else "")
        )
        if not master:
            return True
        log.write(
            step=step, val_loss=loss, val_ppl=math.exp(min(loss, 99)), val_bpb=bpb, train_loss=recent, best=best,
            seconds=round(progress["seconds"], 1),
        )  # fmt: skip
        if best:
            facts_of_best = dict(
                step=step, val_loss=f"{loss:.6f}", val_bpb=f"{bpb:.6f}", tokenizer_sha256=meta["tokenizer_sha256"]
            )
            try:
                model.save_pretrained(out_dir, {k: str(v) for k, v in facts_of_best.items()})
            except OSError as error:
                say(f"!! the best model could not be written ({error}); the previous one is kept and training goes on")
        elif progress["since_best"] >= 3:
            say(f"     overfitting since step {progress['best_step']:,}: that model, the best, is what {out_dir} holds")
        if s.sample_interval and step % s.sample_interval == 0:
            prompt = tokenizer.encode("\n", add_special_tokens=False).ids or [meta["eos_token_id"]]
            model.eval()
            with torch.compiler.set_stance("force_eager"), autocast():
                # by model.py itself, whatever is being tried in it
                ids = [int(i) for i in generate(model, prompt, max_new_tokens=100, seed=step, use_c=False)]
            model.train()
            text = tokenizer.decode(ids)
            say("     " + text.strip().replace("\n", "\n     "))
            log.write(step=step, sample=text)
        return True

    # the loop
    bad_steps, first = 0, True
    shown_at, shown_step = time.perf_counter(), progress["step"]
    while True:
        step = progress["step"]
        due = step % s.eval_interval == 0 or step >= s.max_iters
        if due and progress["evaluated"] < step and (step > 0 or source_dir):
            if not evaluation(step):
                break
            save()
            shown_at, shown_step = time.perf_counter(), step
            if s.patience and progress["since_best"] >= s.patience:
                say(f"stopping: no better validation loss in {s.patience} evaluations, since {progress['best_step']:,}")
                return
        if step >= s.max_iters:
            say(
                f"done: {step:,} steps in {progress['seconds'] / 60:.1f} minutes, best validation loss "
                f"{progress['best_val_loss']:.4f} at step {progress['best_step']:,}\n"
                f"sample: python sample.py --model={out_dir}"
            )
            return

        lr = learning_rate_at(step, s, progress["lr_decay_iters"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        before = time.perf_counter()
        loss = first_step(step) if first else accumulate(step)
        scaler.unscale_(optimizer)
        limit = s.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        # one small exchange a step: the mean loss of all processes, and whether any was asked to stop
        shared = torch.stack((loss / world, torch.tensor(float(bool(asked_to_stop)), device=device)))
        if world > 1:
            dist.all_reduce(shared)
        loss, stopping, norm = float(shared[0]), bool(shared[1]), float(norm)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite or (scaler.is_enabled() and math.isfinite(loss)):  # an overflow of float16 is the scaler's to handle
            scaler.step(optimizer)
            scaler.update()
            bad_steps = 0
            recent = progress["recent_loss"]
            progress["recent_loss"] = loss if recent is None else 0.9 * recent + 0.1 * loss
        else:
            scaler.update()
            bad_steps += 1
            progress["skipped"] += 1
            say(f"!! step {step}: loss {loss}, gradient norm {norm}; skipped ({progress['skipped']} so far)")
            if bad_steps == 5:
                raise UserError(
                    f"five steps in a row without a finite loss or gradient. {out_dir} still holds the last good "
                    "checkpoint; go on from it with a lower --learning_rate and --accept_changes=learning_rate."
                )
        optimizer.zero_grad(set_to_none=True)
        progress["step"] = step + 1
        progress["seconds"] += time.perf_counter() - before
        if first:
            progress["compile"] = compiled
            if compiled:
                say(f"         first step, with compiling: {time.perf_counter() - before:.0f} s")

        if (step + 1) % s.log_interval == 0:
            # the first step compiles and warms up, so it says nothing about speed; it is left out of the average too
            each = (time.perf_counter() - shown_at) / (step + 1 - shown_step) if step + 1 > shown_step else None
            rate = step_tokens / each if each and not first else None
            mfu = rate * token_flops / (peak * world) if rate and peak else None
            line = f"step {step + 1:>6} | loss {loss:.4f} | lr {lr:.2e} | grad {norm:.2f}"
            if rate:
                eta = int((s.max_iters - step - 1) * each)
                line += f" | {1000 * each:,.0f} ms | {rate:,.0f} tok/s | mfu {f'{mfu:.1%}' if mfu else 'n/a'}"
                line += f" | eta {eta // 60}m{eta % 60:02d}s"
            say(line)
            if master:
                log.write(
                    step=step + 1, tokens=(step + 1) * step_tokens, loss=loss, lr=lr, grad_norm=norm,
                    tok_per_s=rate and round(rate, 1), mfu=mfu and round(mfu, 4), seconds=round(progress["seconds"], 1),
                )  # fmt: skip
        if first or (step + 1) % s.log_interval == 0:
            shown_at, shown_step = time.perf_counter(), step + 1
        first = False
        if stopping:
            break
    save()
    say(f"stopped at step {progress['step']:,}, saved. Go on with: {again}")


def copy_tokenizer(folder: Path, source_dir: Path | None, out_dir: Path, eos_token: str, context: int):
    """tokenizer.json as it is; tokenizer_config.json (and chat template) of the model fine-tuned from, or our own."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic(out_dir / "tokenizer.json") as temporary:
        shutil.copyfile(folder / "tokenizer.json", temporary)
    settings = prepare.tokenizer_config(eos_token, context)
    if source_dir and (source_dir / "tokenizer_config.json").is_file():
        # the class they name may be GPT2Tokenizer, under which transformers 5 forgets to split digits
        theirs = read_json(source_dir / "tokenizer_config.json")
        settings = theirs | {"tokenizer_class": settings["tokenizer_class"]}
    write_json(out_dir / "tokenizer_config.json", settings)
    if source_dir and (source_dir / "chat_template.jinja").is_file():
        shutil.copyfile(source_dir / "chat_template.jinja", out_dir / "chat_template.jinja")


if __name__ == "__main__":
    guard(main, ModelError, OSError)
