"""
decode.c called from Python: the next token of up to sixteen texts on a CPU, with a C compiler.

    from fast.decode import Decoder
    logits = Decoder(model)(tokens, cache, position)    # tokens (B,) -> (B, V); the cache gains this position

generate() gets one from model.make_decoder(). decode.c reads the weights where they are, in the model, in fp32, bf16 or
int8. Activations are fp32, and int8 when they meet int8 weights. tests/test_decode.py compares it with model.py, and so
does every process, on the first token of each model: if they disagree, model.py is used.
"""

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from model import KVCache, SmolLM2

SOURCE = Path(__file__).with_name("decode.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
BLOCK = 128  # positions per piece of attention work
MAX_ROWS = 16  # texts at a time: their activations are on each thread's stack

# The largest error of a first token's logits, in units of their spread. model.py rounds activations to bf16 if the
# weights are bf16 or int8; decode.c keeps them in fp32, or rounds them to int8. On random and on the released weights
# bf16 was off by at most 0.03 and int8 by 0.08; ReLU instead of SiLU is off by at least 0.2.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.int8: 0.15}
READ = {f"{name}_proj" for name in "q k v o gate up down".split()}
READ |= set("embed_tokens lm_head norm input_layernorm post_attention_layernorm".split())
trusted = weakref.WeakKeyDictionary()  # model: whether decode.c agreed with model.py on its first token


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
    """Compile decode.c for this processor and load it. The result stays in __pycache__, under a name that changes with
    the source, the compiler (or an update of it) and the processor. Raises OSError or CalledProcessError."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if os.name == "nt" or compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) was found")
    # -fassociative-math and the two flags that it needs allow sums to be computed in parts. -ffast-math includes them,
    # but would also change how the whole process treats subnormal numbers.
    flags = "-O3 -march=native -fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno -shared -fPIC"
    flags = [*flags.split(), f"-DBLOCK={BLOCK}"]
    if platform.system() == "Linux":  # Apple's clang comes without OpenMP: one thread there
        flags.append("-fopenmp")
    if platform.machine() == "x86_64":
        # on AMD, GCC would fuse multiply and add in the loop of eight sums, but not in that of one: then a text would
        # have other bits in a batch than alone
        flags += ["-mprefer-vector-width=512", "--param=avoid-fma-max-bits=0"]
    processor = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    binary = Path(compiler).resolve()
    version = str(binary), binary.stat().st_size, binary.stat().st_mtime_ns  # faster than asking it
    key = SOURCE.read_bytes() + repr((version, flags, processor)).encode()
    file = SOURCE.parent / "__pycache__" / f"decode.{hashlib.sha256(key).hexdigest()[:16]}.so"
    with suppress(OSError):  # missing or damaged: compile it
        return ctypes.CDLL(str(file))
    try:
        file.parent.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(dir=file.parent)
    except OSError:  # not writable: compile for this process alone
        folder = tempfile.mkdtemp()
    try:
        made = Path(folder, file.name)
        subprocess.run([compiler, *flags, SOURCE, "-o", made, "-lm"], check=True, capture_output=True, text=True)
        loaded = ctypes.CDLL(str(made))
        with suppress(OSError):  # a rename: another process finds all of it or nothing
            os.replace(made, file)
        return loaded
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reason_against(model: SmolLM2) -> str:
    """Say why decode.c cannot run this model, or return an empty text."""
    if model.device.type != "cpu":
        return f"the model is on {model.device.type}, decode.c is for a CPU"
    if model.dtype not in KINDS:
        return f"decode.c reads float32, bfloat16 and int8, not {str(model.dtype)[6:]}"
    c = model.config
    sizes = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    if other := READ ^ {"lm_head", *(name.split(".")[-2] for name, _ in model.named_parameters())}:
        return f"decode.c is for another architecture ({', '.join(sorted(other))})"
    if any(n % 4 for n in sizes):
        return "decode.c needs sizes that are multiples of 4"
    if max(sizes) > 16384:  # it keeps MAX_ROWS of these on a thread's stack
        return "decode.c is for widths up to 16,384"
    return compile_error()


@cache
def compile_error() -> str:
    """Say why decode.c could not be compiled, or return an empty text. Cached, since each attempt is slow."""
    try:
        library()
    except subprocess.CalledProcessError as error:
        return f"decode.c did not compile: {(error.stderr.strip() or str(error)).splitlines()[0]}"
    except OSError as error:
        return str(error)
    return ""


class Decoder:
    """Compute what plain_step() computes, in fp32. check: compare the first token of each model with model.py."""

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
        self.keys = None  # of the cache's first layer: another tensor means another cache, or one that has grown

    def floats(self, tensor) -> int:
        """Return the address of the tensor's numbers as fp32, in a copy if they have another dtype."""
        self.keep.append(tensor.detach().float().contiguous())
        return self.keep[-1].data_ptr()

    def matrix(self, module) -> Matrix:
        weight, scale = module.weight, getattr(module, "scale", None)
        assert weight.is_contiguous() and weight.dtype in KINDS, f"{weight.dtype}, strides {weight.stride()}"
        self.keep.append(weight)
        scale = None if scale is None else self.floats(scale)
        return Matrix(weight.data_ptr(), scale, KINDS[weight.dtype], *weight.shape)

    @torch.inference_mode()
    def __call__(self, tokens, cache: KVCache, position: int):  # (B,) -> (B, V)
        ids = tokens.tolist()
        if not ids or not 0 <= min(ids) <= max(ids) < self.c.V or position < 0:  # decode.c would read other memory
            raise IndexError(f"tokens {ids} at position {position}: the vocabulary is 0 .. {self.c.V - 1}")
        if len(ids) != (rows := cache.layers[0].keys.size(0)):
            raise IndexError(f"{len(ids)} tokens for a cache of {rows} rows")
        cache.reserve(position + 1)
        self.attach(cache)
        if self.check and self.model not in trusted:
            with torch.autocast("cpu", enabled=False):  # train.py prints samples inside one
                plain = plain_step(self.model, tokens, cache, position)
            logits = self.step(ids, position)  # second, so that the cache holds decode.c's keys and values from here on
            allowed = ROUNDING[self.model.embed_tokens.weight.dtype]
            trusted[self.model] = agrees(logits, plain, allowed, "fast/decode.c")
            return logits if trusted[self.model] else plain_step(self.model, tokens, cache, position)
        if self.check and not trusted[self.model]:
            return plain_step(self.model, tokens, cache, position)
        return self.step(ids, position)

    def attach(self, cache: KVCache):
        """Point each layer at its keys and values, unless they are where they were at the last token."""
        keys, c = cache.layers[0].keys, self.c
        if keys is self.keys:
            return
        assert keys.dtype == self.model.dtype, f"a cache of {keys.dtype}"
        self.keys = keys
        if c.B != len(keys):  # see pick_threads(): more rows take longer
            self.alone_took, self.alone_for, self.pause = None, 0, 16
        c.B, c.capacity = len(keys), cache.capacity
        sizes = dict(x=c.C, q=c.H * c.D, hidden=c.I, parts=-(-c.capacity // BLOCK) * c.H * (c.D + 2))
        # decode.c's activations, for as many rows as the cache has
        self.workspace = {name: torch.empty(c.B * size, dtype=torch.float32) for name, size in sizes.items()}
        for name, space in self.workspace.items():
            setattr(c, name, space.data_ptr())
        for ours, layer in zip(self.layers, cache.layers):
            ours.keys, ours.values = layer.keys.data_ptr(), layer.values.data_ptr()

    def step(self, ids: list[int], position: int):
        """Call decode.c once: return logits (B, V), and write the keys and values of this position to the cache."""
        cos, sin = self.model.rotary.at(slice(position, position + 1), self.model.device)
        self.c.cos, self.c.sin = cos.data_ptr(), sin.data_ptr()
        logits = torch.empty(self.c.B, self.c.V, dtype=torch.float32)
        self.c.threads = self.pick_threads()
        started = time.perf_counter()
        array = (ctypes.c_int * len(ids))(*ids)
        library().step(ctypes.byref(self.c), array, position, ctypes.c_void_p(logits.data_ptr()))
        self.learn_from(time.perf_counter() - started)
        return logits

    def pick_threads(self) -> int:
        """Choose one thread or all of them. Threads wait for each other five times a layer, and on a machine with other
        work a wait can last as long as the other program's turn; then one thread alone is many times faster. So the
        first token is timed on one thread. If all threads together take twice as long, the next 16 tokens are computed
        on one, then 32, 64, ... until all threads are faster again."""
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


def plain_step(model: SmolLM2, tokens, cache: KVCache, position: int):  # (B,) -> (B, V)
    """Compute, by model.py, the logits that follow one token of each of B texts, all at the same position."""
    return model(tokens[:, None], cache=cache, start=position)[0][:, -1]


def agrees(logits, plain, allowed: float, name: str) -> bool:
    """Compare a decoder's logits with model.py's. If they differ by more than rounding, warn: whoever changes the
    architecture in model.py must not get the text of the old one."""
    # in units of plain's spread: infinite if only one side is finite; if neither is, sample.next_token() has a message
    error, spread = float((logits - plain).float().std()), float(plain.float().std())
    if error <= 1e-6 or not (math.isfinite(spread) or logits.isfinite().all()):
        return True
    error = error / (spread + 1e-30) if math.isfinite(spread) and math.isfinite(error) else math.inf
    if error <= allowed:
        return True
    warn_once(
        f"warning: {name} and model.py disagree: their logits differ by {error:.0%} of their spread (at most "
        f"{allowed:.1%} is rounding). model.py is used, which is slower. If you changed it, update {name}, too.", name
    )  # fmt: skip
    return False


warned = set()


def warn_once(text: str, key: str = ""):
    """Print a line to stderr, once per process and key (by default the line itself)."""
    if (key or text) not in warned:
        warned.add(key or text)
        print(text, file=sys.stderr)
