"""
The machine: which device and dtype, how fast it could be, whether to compile, and joining several processes.

    from lib.device import pick_device, pick_dtype
    device, dtype = pick_device("auto"), pick_dtype("auto")
"""

import ctypes
import importlib
import math
import os
import platform
import re
import shutil
import sys
import time
from functools import cache

from lib.settings import UserError

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Dense bf16/fp16 peaks from the vendors' data sheets, by whole words of the device's name; the first that fits counts.
# A device that is not here gets no MFU rather than a wrong one, and so does a slice (MIG) or a laptop's GPU.
KNOWN_PEAK_TFLOPS = {
    "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# device and dtype


def pick_device(device: str) -> str:
    """ "auto" is the first of cuda, mps, cpu that is there; any other name is checked and returned as it is."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):  # torch knows more: on "meta" nothing is computed
            raise RuntimeError("expected auto, cuda, cuda:1, mps or cpu")
        torch.empty(1, device=device)
        if device.startswith("cuda:"):  # what is recorded and waited for is that of the current one
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device={device} cannot be used here ({reason}). Without the flag the best is taken."
        ) from None
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The dtype that weights are loaded in: "auto" is None, the file's own; otherwise the dtype of that name."""
    names = {"auto": None} | DTYPES
    if name not in names:
        raise UserError(f"--dtype={name}: expected one of {', '.join(names)}.")
    return names[name]


def pick_autocast(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of matrix products in training, and why. "auto" is bf16 where the processor has it, by its capability,
    since some accept bf16 and emulate it; on a CPU its products must be faster, too: some Intel Xeons have the
    instruction and take twice as long. UserError for an unknown name."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"--dtype={name}: expected auto, {', '.join(DTYPES)}.")
        return DTYPES[name], "as asked"
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"CUDA capability {major}.{minor} has bfloat16"
        return torch.float16, f"CUDA capability {major}.{minor} has no bfloat16; float16 with loss scaling"
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        for feature in ("amx_bf16", "avx512_bf16", "bf16"):
            if has.get(feature):
                speed = bfloat16_speed()
                dtype = torch.float32 if speed < 1 else torch.bfloat16
                return dtype, f"the CPU has {feature}, at {speed:.1f} times the speed of float32"
        return torch.float32, "the CPU has no bfloat16"
    return torch.float32, f"float32 is the safe choice on {device}"


# ----------------------------------------------------------------------------------------------------------------------
# speed


@cache
def bfloat16_speed() -> float:
    """How fast products of bfloat16 are on this CPU, those of fp32 being 1. Some processors do bfloat16 at twice the
    speed, some at half: an Intel Xeon with AVX512-BF16 and without AMX. 30 ms, once a process."""
    took = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        took[dtype] = min(times)
    return took[torch.float32] / took[torch.bfloat16]


def peak_flops(device: str, dtype: torch.dtype, given_tflops: float = 0.0) -> tuple[float, str]:
    """Floating-point operations per second the device could do, and where the figure is from; 0 if it is not known."""
    if given_tflops:
        return given_tflops * 1e12, "as given"
    if device == "cpu":
        n = 1024
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        best, started = math.inf, time.perf_counter()
        while time.perf_counter() - started < 0.3:
            before = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - before)
        return 2 * n**3 / best, "measured"
    if device.startswith("cuda") and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for key, tflops in KNOWN_PEAK_TFLOPS.items():
            if re.search(rf"\b{key}\b(?! (?:Ti|D)\b)(?!.*\b(?:MIG|Laptop)\b)", name):
                return tflops * 1e12, f"data sheet of {key}"
    return 0.0, "unknown"


def pick_compile(choice: str, device: str, flops: float, peak: float) -> tuple[bool, str]:
    """Compile the blocks for training or not, and why. `flops` is the work of the whole run, `peak` what the device can
    do in a second. UserError for an unknown choice."""
    if choice not in ("auto", "on", "off"):
        raise UserError(f"--compile={choice}: expected auto, on or off.")
    if choice != "auto":
        return choice == "on", "as asked"
    if sys.platform == "win32":
        return False, "not tried on Windows"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return False, "there is no C++ compiler"
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) < (7, 0):
        return False, "this GPU is too old for Triton"
    if device != "cpu" and not device.startswith("cuda"):
        return False, f"compiled training is not reliable on {device}"
    if not peak:
        return True, "how long the run takes is not known"
    minutes = flops / (0.5 * peak) / 60
    if minutes < 5:
        return False, f"the run is about {minutes:.1f} minutes of work, too short to earn the compiling back"
    return True, "the run is long enough to earn the compiling back"


def compile_for_training(model):
    """torch.compile each block in place: no name changes, and all blocks share one compiled graph, so it takes some
    twenty seconds instead of a minute for thirty. The first call compiles, and fails if there is no compiler."""
    import torch._inductor.config  # here, since it takes a second

    torch._inductor.config.fallback_random = True  # dropout drops what it would drop without compiling
    for layer in model.layers:
        layer.compile(dynamic=False)


def undo_compile(model):
    """Run the blocks as they are written again."""
    for layer in model.layers:
        layer._compiled_call_impl = None


class Replay:
    """A computation on a GPU, recorded once as a CUDA graph and then replayed with other inputs of the same shapes. A
    small model's kernels run for microseconds, and Python takes longer to start one.

    compute(*inputs) must have run before, since what is set up at a first call cannot be recorded. It returns a tensor,
    which the next replay overwrites, and may add to others, such as gradients: those stay where they were at the
    recording, so zero them and do not replace them. What it draws at random, a replay draws from the generator's seed
    of that moment. RuntimeError where it cannot be recorded; unless memory was the reason, this process should
    compute nothing more.
    """

    def __init__(self, compute, *inputs: torch.Tensor):
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: what another thread does meanwhile (app.py may load a model) is no part of it, and no error
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = compute(*self.inputs)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.result


GPU_WAITS = 0.7  # from this launch_share() on a replay is taken to be faster: a guess, small models were seen at 1.0


def launch_share(compute) -> float:
    """Of the time that compute() takes on a GPU, the share until Python has started its last kernel: near 1 where the
    GPU waits for Python."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    compute()
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    return launched / (time.perf_counter() - started)


def prepare_process():
    """Two settings of the process that make work on a CPU faster. Call it before torch computes anything: threads take
    the first from the one that starts them.

    Numbers below 1.2e-38 are zero. Attention that has become sharp has many of them among its probabilities, and a
    processor takes many times as long for each as for others: a third of a training step, where it was measured.

    What is freed, malloc keeps and uses again. By default glibc returns large blocks to the system at once, and every
    step maps and zeroes the same gigabytes again: up to a tenth of a training step. Nothing is done where the C library
    is another."""
    torch.set_flush_denormal(True)
    if platform.libc_ver()[0] == "glibc":
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap is not cut short when its end is free


# ----------------------------------------------------------------------------------------------------------------------
# several processes


def join_processes(device: str) -> tuple[int, int, str]:
    """This process's number, how many there are, and its device, which on GPUs is one of its own.

    torchrun says in the environment who is who; a process started without it is alone: (0, 1, device). The processes
    exchange gradients through NCCL on GPUs and through gloo elsewhere. End with dist.destroy_process_group().
    """
    names = "RANK", "WORLD_SIZE", *(["LOCAL_RANK"] if device == "cuda" else [])
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, device
    try:
        rank, world, *local = (int(os.environ[name]) for name in names)
        if not 0 <= rank < world:
            raise ValueError
    except (KeyError, ValueError):
        said = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
        raise UserError(f"{said}: not what torchrun sets. Start with torchrun, or unset these to go alone.") from None
    if world > 1:
        if device.startswith("cuda:"):
            raise UserError(f"--device={device}: each of {world} processes takes a GPU of its own. Use --device=cuda.")
        # torch._dynamo, which the first optimizer loads, imports this module, whose functions have the group of that
        # moment as a default. Imported while there is none, it does not keep ours alive past its end, when gloo's
        # threads can abort the process.
        importlib.import_module("torch.distributed.nn")
        if local:
            device = f"cuda:{local[0]}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return rank, world, device


def broadcast_from_rank0(value, world: int):
    """The first process's value, in all of them; each must call it at the same point."""
    shared = [value]
    if world > 1:
        dist.broadcast_object_list(shared)
    return shared[0]
