"""The machine: device, dtype, peak speed, whether to compile, and a check of the compiled code."""

import ctypes
import platform
import re
import shutil
import timeit
from functools import cache

from lib.files import first_line
from lib.settings import UserError

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
dtype_name = lambda dtype: str(dtype).removeprefix("torch.")  # torch.float32 -> "float32"
pick_dtype = DTYPES.get  # None for "auto": the weights keep the dtype of their file

# Dense bf16/fp16 peaks from the vendors' data sheets, by words of the device's name; the first that fits counts. Other
# devices, slices (MIG) and laptop GPUs get no MFU rather than a wrong one.
KNOWN_PEAK_TFLOPS = {
    "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def pick_device(device: str) -> str:
    """Return the first available of cuda, mps and cpu for "auto", and any other device as it is, once checked."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        assert re.fullmatch(r"cpu|mps|cuda(:\d+)?", device), "expected auto, cuda, cuda:1, mps or cpu"
        assert device != "cuda" or torch.cuda.is_available(), "no CUDA GPU"
        torch.empty(1, device="cpu" if device == "cuda" else device)  # a process of torchrun has no GPU of its own yet
        if device.startswith("cuda:"):  # CUDA graphs and synchronize() use the current device
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={device} is not available here ({first_line(error)}).") from None
    return device


def pick_autocast(name: str, device: str, began: str | None = None) -> tuple[torch.dtype, str]:
    """Return the dtype of matrix products in training, and why. "auto" is bfloat16 if the hardware has it (older GPUs
    emulate it) and, on a CPU, if it is faster: some Intel Xeons take twice as long. began: what a resumed run uses."""
    if began or name != "auto":
        return DTYPES[began or name], "as when this run began" if began else "as asked"
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16, f"for CUDA capability {major}.{minor}"
    has = torch.cpu.get_capabilities() if device == "cpu" else {}
    if not any(has.get(feature) for feature in ("amx_bf16", "avx512_bf16", "bf16")):
        return torch.float32, f"no bfloat16 on this {device}"
    speed = bfloat16_speed()
    return torch.float32 if speed < 1 else torch.bfloat16, f"bfloat16 is {speed:.1f} times as fast as float32 here"


@cache
def bfloat16_speed() -> float:
    """Measure how fast this CPU multiplies bfloat16 matrices, relative to float32: 2 on some, 0.5 on others. 30 ms."""
    return matmul_seconds(256, torch.float32) / matmul_seconds(256, torch.bfloat16)


def matmul_seconds(n: int, dtype: torch.dtype) -> float:
    """Measure the product of (n, 1024) and (1024, 1024) random matrices on the CPU."""
    own = torch.Generator().manual_seed(0)  # leaves the global one alone, which draws the weights
    a, b = (torch.rand(rows, 1024, generator=own).to(dtype) for rows in (n, 1024))
    return min(timeit.repeat(lambda: a @ b, number=1, repeat=8))


def peak_flops(device: str, dtype: torch.dtype, given_tflops: float = 0.0) -> tuple[float, str]:
    """Return the floating-point operations per second that the device could do, and the source; 0 if unknown."""
    if given_tflops:
        return given_tflops * 1e12, "as given"
    if device == "cpu":
        return 2 * 1024**3 / matmul_seconds(1024, dtype), "measured"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") and dtype != torch.float32 else ""
    for key, tflops in KNOWN_PEAK_TFLOPS.items():
        if re.search(rf"\b{key}\b(?! (?:Ti|D)\b)(?!.*\b(?:MIG|Laptop)\b)", name):
            return tflops * 1e12, f"data sheet of {key}"
    return 0.0, "unknown"


def pick_compile(choice: str, device: str, flops: float, peak: float) -> tuple[bool, str]:
    """Return whether to compile the blocks for training, and why. flops: the work of the whole run; peak: what the
    device can do in a second."""
    if choice != "auto":
        return choice == "on", "as asked"
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return False, "no C++ compiler found"
    if device == "mps":
        return False, "compiled training is not reliable on mps"
    if peak and (minutes := flops / (0.5 * peak) / 60) < 5:
        return False, f"the run is about {minutes:.1f} minutes of work, too short to earn back the compile time"
    return True, "the run is long enough to earn back the compile time"


def compile_for_training(model):
    """Compile each block in place: no name changes, and all blocks share one graph, so that it takes 20 seconds instead
    of a minute for 30 blocks. The first call compiles, and fails without a compiler."""
    import torch._inductor.config  # takes a second

    torch._inductor.config.fallback_random = True  # the same dropout masks as in eager mode
    for layer in model.layers:
        layer.compile(dynamic=False)


def undo_compile(model):
    """Run the blocks in eager mode again."""
    for layer in model.layers:
        layer._compiled_call_impl = None


def check_compiled(gradients, model):
    """Raise RuntimeError if the compiled blocks have other gradients than the plain ones. gradients() adds them to
    .grad. Seen once: NaN in the keys' gradient on one kind of processor."""

    def norms():
        model.zero_grad(set_to_none=True)
        gradients()
        return torch.stack([p.grad.norm() for p in model.parameters()])

    compiled = norms()
    with torch.compiler.set_stance("force_eager"):
        if not same_gradients(compiled, norms()):
            raise RuntimeError("the compiled blocks have other gradients than the plain ones on this machine")


def same_gradients(norms: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare norms of gradients up to rounding: a few percent in bfloat16. A wrong kernel changes one entirely."""
    both_overflow = ~torch.isfinite(norms) & ~torch.isfinite(expected)  # float16, before its scale is found
    close = (norms - expected).abs() <= 0.2 * expected + 1e-6 * expected.nan_to_num(0, 0, 0).max()
    return bool((close | both_overflow).all())


def out_of_memory(error: Exception) -> bool:
    """Recognize out-of-memory errors however the library phrases them."""
    phrases = "out of memory", "not enough memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(phrase in str(error) for phrase in phrases)


def prepare_process():
    """Make a process faster on a CPU. Call it before torch computes anything: threads inherit the first setting."""
    # flush denormals to zero: they are slow, and peaked attention has many (a third of a step's time)
    torch.set_flush_denormal(True)
    # keep freed memory: otherwise every step maps and zeroes the same gigabytes again (up to a tenth of its time)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings for single blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap stays when it is free
