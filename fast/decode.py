"""
One token of each text, without a call from Python for each small step: decode.c on a CPU, a CUDA graph on a GPU.

    from fast.decode import pick_decoder
    decoder = pick_decoder(model)                       # None where there is neither: then model.py itself
    logits = decoder([token_id], cache, position)       # (1, V), and the cache holds the new position

sample.generate() uses them wherever it can.

decode.c: up to MAX_ROWS texts, with a C compiler. The weights stay where they are, in the model, whether fp32, bf16 or
int8; activations are fp32, and int8 where they meet int8 weights. tests/test_decode.py compares it with the plain
forward pass of model.py, which everything else uses; so does every process, on the first token of each model.

The CUDA graph: model.py itself, recorded (device.Replay) and compared whenever it is recorded. tests/test_gpu.py.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path

from lib.device import Replay
from lib.settings import UserError

import torch

from model import KVCache, SmolLM2

SOURCE = Path(__file__).with_name("decode.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
BLOCK = 128  # positions that attention goes through at a time
MAX_ROWS = 16  # texts at a time, since their activations are on each thread's stack
ROOM = 512  # positions that a GPU's cache begins with, since each longer one is recorded again


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scale", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int) for name in "kind rows columns".split()]


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "input_layernorm post_attention_layernorm".split()]
    _fields_ += [(n + "_proj", Matrix) for n in "q k v o gate up down".split()]
    _fields_ += [(name, ctypes.c_void_p) for name in "keys values".split()]


class Model(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "B C I L H K D V capacity cache_kind threads".split()]
    _fields_ += [("eps", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_void_p) for name in "norm cos sin".split()]
    _fields_ += [("embed_tokens", Matrix), ("head", Matrix), ("layers", ctypes.POINTER(Layer))]
    _fields_ += [(name, ctypes.c_void_p) for name in "x q hidden parts".split()]


@cache
def library():
    """decode.c, compiled for this processor and loaded. The result is kept in __pycache__, under a name that changes
    with the source, the compiler (an update of it, too) and the processor. Raises OSError or CalledProcessError."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if os.name == "nt" or compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) was found")
    # -fassociative-math and the two that it needs let sums be taken in parts. -ffast-math, which has them too, would
    # also change how the whole process treats subnormal numbers.
    flags = "-O3 -march=native -fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno -shared -fPIC"
    flags = [*flags.split(), f"-DBLOCK={BLOCK}"]
    if platform.system() == "Linux":  # Apple's clang comes without OpenMP: one thread there
        flags.append("-fopenmp")
    if platform.machine() == "x86_64":
        # on AMD GCC would multiply and add in one step with eight sums, but not with one: then a text has other bits in
        # company than alone
        flags += ["-mprefer-vector-width=512", "--param=avoid-fma-max-bits=0"]
    processor = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    binary = Path(compiler).resolve()
    version = str(binary), binary.stat().st_size, binary.stat().st_mtime_ns  # asking it would take longer
    key = SOURCE.read_bytes() + repr((version, flags, processor)).encode()
    file = SOURCE.parent / "__pycache__" / f"decode.{hashlib.sha256(key).hexdigest()[:16]}.so"
    with suppress(OSError):  # not there yet, or damaged: compile it
        return ctypes.CDLL(str(file))
    try:
        file.parent.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(dir=file.parent)
    except OSError:  # not ours to write in: compile for this process alone
        folder = tempfile.mkdtemp()
    try:
        made = Path(folder, file.name)
        subprocess.run([compiler, *flags, SOURCE, "-o", made, "-lm"], check=True, capture_output=True, text=True)
        loaded = ctypes.CDLL(str(made))
        with suppress(OSError):  # a rename, so that another process finds all of it or nothing
            os.replace(made, file)
        return loaded
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reason_against(model: SmolLM2) -> str:
    """Why decode.c cannot run this model; empty where it can."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, decode.c is for a CPU"
    if model.dtype not in KINDS:
        return f"decode.c reads float32, bfloat16 and int8, not {str(model.dtype)[6:]}"
    c = model.config
    sizes = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    if any(n % 4 for n in sizes):
        return "decode.c needs sizes that are multiples of 4"
    if max(sizes) > 16384:  # of which it keeps MAX_ROWS on a thread's stack
        return "decode.c is for widths up to 16,384"
    return compiling_fails()


@cache
def compiling_fails() -> str:
    """Why there is no library() here; empty where there is. Asked once a process: failing takes as long each time."""
    try:
        library()
    except subprocess.CalledProcessError as error:
        return f"decode.c did not compile: {(error.stderr.strip() or str(error)).splitlines()[0]}"
    except OSError as error:
        return str(error)
    return ""


class Decoder:
    """decoder(tokens, cache, position): the logits (B, V), fp32, that follow B texts' tokens, one of each, all at
    `position`. It is model(tokens (B, 1), cache=cache, start=position).

    check: compute the first token of each model by model.py as well, and compare (first_token).
    """

    def __init__(self, model: SmolLM2, check: bool = True):
        c, self.model, self.check, self.keep = model.config, model, check, []
        self.layers = (Layer * c.num_hidden_layers)()
        for ours, layer in zip(self.layers, model.layers):
            ours.input_layernorm = self.floats(layer.input_layernorm.weight)
            ours.post_attention_layernorm = self.floats(layer.post_attention_layernorm.weight)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(ours, name, self.matrix(getattr(layer.self_attn, name)))
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(ours, name, self.matrix(getattr(layer.mlp, name)))
        C, H, K, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        embedding = self.matrix(model.embed_tokens)
        self.c = Model(
            B=0, C=C, I=c.intermediate_size, L=c.num_hidden_layers, H=H, K=K, D=D, V=c.vocab_size,
            cache_kind=KINDS[model.dtype], threads=1, eps=c.rms_norm_eps,
            norm=self.floats(model.norm.weight), embed_tokens=embedding, layers=self.layers,
            head=embedding if model.lm_head is None else self.matrix(model.lm_head),
        )  # fmt: skip
        self.buffers = None  # the keys of the cache's first layer, by which a cache that has grown is recognised
        self.room = {}  # what decode.c works in, for as many rows as the cache has
        self.alone_took, self.alone_for, self.pause = None, 0, 16  # see pick_threads()

    def floats(self, tensor) -> int:
        """The address of the tensor's numbers as fp32: a copy, or the tensor itself where it is fp32."""
        self.keep.append(tensor.detach().float().contiguous())
        return self.keep[-1].data_ptr()

    def matrix(self, module) -> Matrix:
        weight, scale = module.weight, getattr(module, "scale", None)
        assert weight.is_contiguous() and weight.dtype in KINDS, f"{weight.dtype}, strides {weight.stride()}"
        self.keep.append(weight)
        scale = None if scale is None else self.floats(scale)
        return Matrix(weight.data_ptr(), scale, KINDS[weight.dtype], *weight.shape)

    @torch.inference_mode()
    def __call__(self, tokens: list[int], cache: KVCache, position: int):
        # decode.c would leave the tensors
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.c.V or position < 0:
            raise IndexError(f"tokens {tokens} at position {position}: the vocabulary is 0 .. {self.c.V - 1}")
        if len(tokens) != (rows := cache.layers[0][0].size(0)):
            raise IndexError(f"{len(tokens)} tokens for a cache of {rows} rows")
        cache.reserve(position + 1)
        self.attach(cache)
        if self.check and self.model not in checked:
            return first_token(self, tokens, cache, position)
        return self.step(tokens, position)

    def attach(self, cache: KVCache):
        """Point each layer at its keys and values, unless they are where they were at the last token."""
        buffers = cache.layers[0][0]
        if buffers is self.buffers:
            return
        assert buffers.dtype == self.model.dtype, f"a cache of {buffers.dtype}"
        self.buffers, c = buffers, self.c
        if c.B not in (0, len(buffers)):
            self.alone_took, self.alone_for, self.pause = None, 0, 16  # more rows take longer
        c.B, c.capacity = len(buffers), buffers.size(2)
        sizes = dict(x=c.C, q=c.H * c.D, hidden=c.I, parts=-(-c.capacity // BLOCK) * c.H * (c.D + 2))
        self.room = {name: torch.empty(c.B * size, dtype=torch.float32) for name, size in sizes.items()}
        for name, room in self.room.items():
            setattr(c, name, room.data_ptr())
        for ours, (keys, values) in zip(self.layers, cache.layers):
            ours.keys, ours.values = keys.data_ptr(), values.data_ptr()

    def step(self, tokens: list[int], position: int):
        """One call of decode.c: logits (B, V), and the keys and values of this position in the cache."""
        row = position * self.c.D * 4  # bytes
        self.c.cos, self.c.sin = self.model.rotary.cos.data_ptr() + row, self.model.rotary.sin.data_ptr() + row
        logits = torch.empty(self.c.B, self.c.V, dtype=torch.float32)
        self.c.threads = self.pick_threads()
        started = time.perf_counter()
        ids = (ctypes.c_int * len(tokens))(*tokens)
        library().step(ctypes.byref(self.c), ids, position, ctypes.c_void_p(logits.data_ptr()))
        self.learn_from(time.perf_counter() - started)
        return logits

    def pick_threads(self) -> int:
        """One thread, or all of them. Threads wait for each other five times a layer. On a machine with other work a
        wait can last as long as the other program's turn, and one thread alone is then many times faster. So the first
        token is timed on one thread; where all threads together then take twice as long, the next 16 tokens are
        computed on one, then 32, 64, ... until all threads are faster again."""
        return 1 if self.alone_took is None or self.alone_for > 0 else torch.get_num_threads()

    def learn_from(self, took: float):  # seconds that the last token took, on the threads that pick_threads chose
        if self.alone_took is None:
            self.alone_took = took
        elif self.alone_for:
            self.alone_for, self.alone_took = self.alone_for - 1, took  # it takes longer as the text grows
        elif took > 2 * self.alone_took:  # less than that may have been a hiccup
            self.alone_for, self.pause = self.pause, min(2 * self.pause, 1024)
        else:
            self.pause = 16


# how far the logits of a first token may differ, relative to their standard deviation: model.py rounds activations to
# bfloat16 for bfloat16 and int8 weights, decode.c keeps them in fp32, or rounds them to int8 where they meet int8
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.int8: 0.6}  # int8: 0.42 was seen
WITHOUT = "python sample.py --fast=False, or generate(..., fast=False) in Python"
checked = weakref.WeakSet()  # models whose first token has been compared


def first_token(decoder: Decoder, tokens: list[int], cache: KVCache, position: int):
    """The logits of decode.c, compared with those of model.py. UserError where they differ by more than rounding: so
    whoever changes the architecture in model.py is told, and does not get tokens of the old one."""
    model = decoder.model
    with torch.autocast("cpu", enabled=False):  # train.py prints samples inside one
        plain, _ = model(torch.tensor(tokens)[:, None], cache=cache, start=position)
    logits = decoder.step(tokens, position)  # second, so that the cache holds decode.c's keys and values from here on
    error, allowed = difference(logits, plain[:, -1]), ROUNDING[model.embed_tokens.weight.dtype]
    if not error <= allowed:  # NaN, too
        raise UserError(
            f"decode.c and model.py disagree: {by_how_much(error, allowed)}. Was one changed and not the other? Bring "
            f"decode.c up to date, or go without it: {WITHOUT}."
        )
    checked.add(model)
    return logits


def difference(logits, plain) -> float:
    """How far logits are from those of model.py, in units of their spread. Not finite where only one of them is finite;
    0 where neither is, since sample.next_token() has a message for that."""
    error, spread = float((logits - plain).float().std()), float(plain.float().std())
    if error <= 1e-6 or not (math.isfinite(spread) or logits.isfinite().all()):
        return 0.0
    return error / (spread + 1e-30) if math.isfinite(spread) else math.inf


def by_how_much(error: float, allowed: float) -> str:
    if not math.isfinite(error):
        return "the logits of one are finite, those of the other are not finite (damaged weights?)"
    return f"their logits differ by {error:.1%} of their spread, expected below {allowed:.1%}"


class GpuDecoder:
    """model.py on a GPU, recorded once for each length of the cache and then replayed token by token: starting a small
    model's kernels from Python takes longer than running them.

    logits = GpuDecoder(model)(token_ids, cache, position)    # (B, V), and the cache holds the new position

    Each recording is compared with model.py at its first token, unless check=False.
    """

    def __init__(self, model: SmolLM2, check: bool = True):
        self.model, self.check, self.replay, self.recorded = model, check, None, None

    @torch.inference_mode()
    def __call__(self, tokens: list[int], cache: KVCache, position: int):
        assert len(tokens) == len(cache.layers[0][0]), "one token of each text in the cache"
        cache.reserve(max(position + 1, min(ROOM, self.model.config.max_position_embeddings)))
        new = torch.tensor(tokens, device=self.model.device)[:, None]  # (B, 1)
        at = torch.tensor([position], device=self.model.device)
        if self.recorded is not cache.layers:  # reserve() makes new ones of a longer cache
            self.record(new, at, cache)
        return self.replay(new, at).clone()  # the next replay writes over it

    def record(self, new, at, cache: KVCache):  # (B, 1), (1,)
        """UserError where that fails, or where a replay has other logits."""
        step = lambda new, at: self.model(new, cache=cache, start=at)[0][:, -1]
        plain = step(new, at)
        try:  # with another token at another place, or the comparison could not see that it keeps them
            self.replay, self.recorded = Replay(step, new ^ 1, at ^ 1), cache.layers
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"no CUDA graph could be recorded ({reason}). Go without one: --device=cpu, or {WITHOUT}."
            ) from None
        error, allowed = difference(self.replay(new, at), plain), 0.05  # the same kernels, perhaps in another order
        if self.check and not error <= allowed:
            raise UserError(
                f"the CUDA graph and model.py disagree: {by_how_much(error, allowed)}. Go without the graph: "
                f"--device=cpu, or {WITHOUT}."
            )


def pick_decoder(model: SmolLM2, rows: int = 1) -> Decoder | GpuDecoder | None:
    """What computes the tokens of so many texts after their prompts: a CUDA graph on a GPU, decode.c on a CPU; None
    where neither can."""
    if model.device.type == "cuda":
        return GpuDecoder(model)
    return Decoder(model) if rows <= MAX_ROWS and not reason_against(model) else None
