"""
decode.c from Python: one token of one text on a CPU, without a call into PyTorch for each small step.

    from decode import Decoder
    logits = Decoder(model)(token_id, cache, position)      # (1, V) fp32, and the cache holds the new position

sample.generate() uses it wherever it can: one row, on a CPU, where there is a C compiler. The weights stay where they
are, in the model, whether fp32, bf16 or int8; activations are fp32. tests/test_decode.py holds it to the plain forward
pass of model.py, which everything else uses.
"""

import ctypes
import hashlib
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

import torch

from model import KVCache, ModelError, SmolLM2

SOURCE = Path(__file__).with_name("decode.c")
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("scale", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int) for name in "kind rows columns".split()]


class Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in "input_layernorm post_attention_layernorm".split()]
    _fields_ += [(n + "_proj", Matrix) for n in "q k v o gate up down".split()]
    _fields_ += [(name, ctypes.c_void_p) for name in "keys values".split()]


class Model(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "C I L H K D V capacity cache_kind threads".split()]
    _fields_ += [("eps", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_void_p) for name in "norm cos sin".split()]
    _fields_ += [("embed_tokens", Matrix), ("head", Matrix), ("layers", ctypes.POINTER(Layer))]
    _fields_ += [(name, ctypes.c_void_p) for name in "x q attended hidden".split()]


@cache
def library():
    """decode.c, compiled for this processor and loaded. The result is kept in __pycache__, under a name that changes
    with the source, the compiler and the processor. Raises OSError or CalledProcessError."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if os.name == "nt" or compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc or clang) was found")
    # -fassociative-math and the two that it needs let sums be taken in parts. -ffast-math, which has them too, would
    # also change how the whole process treats subnormal numbers.
    flags = "-O3 -march=native -fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno -shared -fPIC"
    flags = flags.split()
    if platform.system() == "Linux":  # Apple's clang comes without OpenMP: one thread there
        flags.append("-fopenmp")
    if platform.machine() == "x86_64":
        flags.append("-mprefer-vector-width=512")
    processor = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    key = SOURCE.read_bytes() + repr((compiler, flags, processor)).encode()
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
    if any(n % 4 for n in (c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim)):
        return "decode.c needs sizes that are multiples of 4"
    try:
        library()
    except subprocess.CalledProcessError as error:
        return f"decode.c did not compile: {error.stderr.strip().splitlines()[0]}"
    except OSError as error:
        return str(error)
    return ""


# how far logits may differ on a first token, relative to their standard deviation: model.py rounds activations to bf16
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.15}
proven = weakref.WeakSet()  # the models whose first token has been computed both ways


class Decoder:
    """decoder(token, cache, position) is model(token, cache=cache, start=position), for one row: logits (1, V), fp32.

    The first token of every model is computed by model.py as well. ModelError where the two differ by more than
    rounding: so whoever changes the architecture in model.py hears of it, and is not answered by the old one.
    """

    def __init__(self, model: SmolLM2):
        c, self.model, self.keep = model.config, model, []
        self.layers = (Layer * c.num_hidden_layers)()
        for ours, layer in zip(self.layers, model.layers):
            ours.input_layernorm = self.floats(layer.input_layernorm.weight)
            ours.post_attention_layernorm = self.floats(layer.post_attention_layernorm.weight)
            for part, names in (layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down")):
                for name in names:
                    setattr(ours, f"{name}_proj", self.matrix(getattr(part, f"{name}_proj")))
        C, H, K, D = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        embedding = self.matrix(model.embed_tokens)
        self.c = Model(
            C=C, I=c.intermediate_size, L=c.num_hidden_layers, H=H, K=K, D=D, V=c.vocab_size,
            cache_kind=KINDS[model.dtype], threads=1, eps=c.rms_norm_eps,
            norm=self.floats(model.norm.weight), embed_tokens=embedding, layers=self.layers,
            head=embedding if c.tie_word_embeddings else self.matrix(model.lm_head),
            x=self.room(C), q=self.room(H * D), attended=self.room(H * D), hidden=self.room(c.intermediate_size),
        )  # fmt: skip
        self.cache = None
        self.alone_took, self.alone_for, self.pause = None, 0, 16  # see step()

    def step(self, token: int, position: int, logits):
        """Threads wait for each other five times a layer. On a machine with other work a wait can last as long as the
        other program's turn, and one thread alone is many times faster. So the first token is timed on one; where all
        together then take twice as long, the next 16 are computed alone, then 32, 64, ... until it pays again."""
        alone = self.alone_took is None or self.alone_for > 0
        self.c.threads = 1 if alone else torch.get_num_threads()
        started = time.perf_counter()
        library().step(ctypes.byref(self.c), token, position, ctypes.c_void_p(logits.data_ptr()))
        took = time.perf_counter() - started
        if self.alone_took is None:
            self.alone_took = took
        elif self.alone_for:
            self.alone_for -= 1
        elif took > 2 * self.alone_took:  # short of that it may have been a hiccup
            self.alone_for, self.pause = self.pause, min(2 * self.pause, 1024)
        else:
            self.pause = 16

    def floats(self, tensor) -> int:  # the address of a fp32 copy, or of the tensor itself where it is fp32
        self.keep.append(tensor.detach().float().contiguous())
        return self.keep[-1].data_ptr()

    def room(self, n: int) -> int:
        return self.floats(torch.empty(n))

    def matrix(self, module) -> Matrix:
        weight, scale = module.weight, getattr(module, "scale", None)
        assert weight.is_contiguous() and weight.dtype in KINDS, f"{weight.dtype}, strides {weight.stride()}"
        self.keep.append(weight)
        scale = None if scale is None else self.floats(scale)
        return Matrix(weight.data_ptr(), scale, KINDS[weight.dtype], *weight.shape)

    @torch.inference_mode()
    def __call__(self, token: int, cache: KVCache, position: int):
        cache.reserve(position + 1)
        buffers = cache.layers[0][0]
        if buffers is not self.cache:  # another cache, or this one has grown
            assert len(buffers) == 1 and buffers.dtype == self.model.dtype, f"{len(buffers)} rows of {buffers.dtype}"
            self.cache, self.c.capacity = buffers, buffers.size(2)
            for ours, (keys, values) in zip(self.layers, cache.layers):
                ours.keys, ours.values = keys.data_ptr(), values.data_ptr()
        row = position * self.c.D * 4
        self.c.cos, self.c.sin = self.model.rotary.cos.data_ptr() + row, self.model.rotary.sin.data_ptr() + row
        logits = torch.empty(1, self.c.V)
        prove = self.model not in proven
        if prove:  # first, so that what it writes into the cache is overwritten and every text is computed alike
            with torch.autocast("cpu", enabled=False):  # train.py prints samples inside one
                plain, _ = self.model(torch.tensor([[token]]), cache=cache, start=position)
        self.step(token, position, logits)
        if prove:
            error, spread = float((logits - plain[:, -1]).std()), float(plain.float().std())
            if not error <= ROUNDING[self.model.dtype] * spread + 1e-6:
                raise ModelError(
                    f"decode.c and model.py disagree: their logits differ by {error / spread:.1%} of their spread, "
                    f"expected below {ROUNDING[self.model.dtype]:.1%}. Was one changed and not the other? Bring "
                    "decode.c up to date, or go without it: --use_c=False (in Python, generate(..., use_c=False))."
                )
            proven.add(self.model)
        return logits
