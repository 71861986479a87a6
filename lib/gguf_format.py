"""
GGUF, the file format of ggml (llama.cpp, Ollama): what export_gguf.py and import_gguf.py share. How a file names and
orders a llama's tensors, which tokenizers it can describe, and the one reader of its header.

    fields, tensors = read_header(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from pathlib import Path

from lib.files import read_errors_as_user_error
from lib.settings import UserError


def need_gguf():
    """The gguf package, imported here alone so that nothing else needs it. UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(
            'GGUF files are read and written with the gguf package. Get it with: pip install "gguf>=0.17,<1"'
        ) from None
    return gguf


# ----------------------------------------------------------------------------------------------------------------------
# how GGUF names and orders things

GGML_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
PERMUTED = ("q_proj.weight", "k_proj.weight")  # ends of the names of weights whose rows have another order there

# llama.cpp knows pre-tokenizers by name only. "smollm" is SmolLM2's: digits one by one, then GPT-2's split into words.
PRE_TOKENIZERS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types: ordinary, special, added but not special, no token


def ggml_name(name: str) -> str:
    """Our parameter's name in a GGUF file: layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    *path, module, weight = name.split(".")
    block = f"blk.{path[1]}." if path else ""
    return f"{block}{GGML_NAMES[module]}.{weight}"


def permute(weight, head_dim: int):  # (heads * D, C) -> (heads * D, C)
    """Rows of q_proj or k_proj from Hugging Face's order to ggml's. RoPE rotates pairs of dimensions: here dimension i
    with i + D/2, in ggml 2i with 2i + 1. llama.cpp would load the file without this, warn of nothing, and write
    nonsense."""
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def unpermute(weight, head_dim: int):  # (heads * D, C) -> (heads * D, C)
    """The inverse: rows of attn_q or attn_k from ggml's order to Hugging Face's."""
    return weight.view(-1, head_dim // 2, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


# ----------------------------------------------------------------------------------------------------------------------
# reading a header

# struct formats of the types of a field's value; two more have a length, so no format of their own
VALUE_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
HEADER_BYTES = 1 << 26  # four times the header of the largest vocabularies; what is longer is no model's


def read_header(file: Path) -> tuple[dict, dict]:
    """Fields and tensors of a GGUF file: key -> value, name -> (shape as torch has it, ggml type, byte offset).

    The gguf package's own reader takes a hundred times the memory of a vocabulary, and believes what a file says of
    itself. Here every length is compared with the bytes that are left, and every tensor lies in the file, apart from
    the others. UserError names the file that is cut short, damaged, or of another kind or version.
    """
    with read_errors_as_user_error(file), open(file, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        left = min(size, HEADER_BYTES)

        def take(n):
            nonlocal left
            left -= n
            if left < 0:
                raise ValueError("its header is cut short, or names a length beyond any model's")
            return f.read(n)

        def number(format):
            return struct.unpack(format, take(struct.calcsize(format)))[0]

        def value(kind):
            if kind == STRING:
                return take(number("<Q")).decode()
            if kind == ARRAY:
                kind, length = number("<I"), number("<Q")
                if kind == STRING:
                    return [take(number("<Q")).decode() for _ in range(length)]  # ends where the bytes do
                format = VALUE_FORMATS[kind][1]  # no arrays of arrays: no model has any
                data = take(length * struct.calcsize("<" + format))
                return list(struct.unpack(f"<{length}{format}", data))
            return number(VALUE_FORMATS[kind])

        if size < 8 or f.read(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        version = number("<I")
        if version != 3:
            reason = "big-endian" if not version % 2**16 else f"of version {version}"
            raise UserError(f"{file} is {reason}; only GGUF of version 3, little-endian, is read. Convert it again.")
        n_tensors, n_fields = number("<Q"), number("<Q")
        fields = {}
        for _ in range(n_fields):
            key = value(STRING)
            if key in fields:
                raise ValueError(f"the field {key[:80]} is there twice")
            fields[key] = value(number("<I"))
        found = []  # name, shape, type, offset among the tensors
        for _ in range(n_tensors):
            name, dimensions = value(STRING), number("<I")
            if dimensions > 4:
                raise ValueError(f"{name[:80]} has {dimensions} dimensions")
            found.append((name, [number("<Q") for _ in range(dimensions)][::-1], number("<I"), number("<Q")))
        alignment = fields.get("general.alignment", 32)
        start = f.tell() + -f.tell() % alignment  # of the tensors
        tensors = {name: (shape, kind, start + offset) for name, shape, kind, offset in found}
        if len(tensors) < len(found):
            raise ValueError("two tensors have one name")
        check_places(file, tensors, size)
    return fields, tensors


def check_places(file: Path, tensors: dict, size: int):
    """ValueError where a tensor ends beyond the file or begins in another one; UserError for types nobody knows."""
    gguf, end, last = need_gguf(), 0, ""
    for name, (shape, kind, offset) in sorted(tensors.items(), key=lambda item: item[1][2]):
        try:
            block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise UserError(
                f"{file}: {name[:80]} is of the type {kind}, unknown here. A newer gguf package may know it: "
                "pip install -U gguf"
            ) from None
        if shape[-1] % block:
            raise ValueError(f"{name[:80]} has rows of {shape[-1]} in blocks of {block}")
        if offset < end:
            raise ValueError(f"{name[:80]} begins inside {last[:80]}")
        end, last = offset + math.prod(shape) // block * nbytes, name
        if end > size:
            raise ValueError(f"it is cut short: {name[:80]} ends at byte {end:,} of {size:,}")
