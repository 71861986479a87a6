"""
A model directory as one GGUF file for llama.cpp, Ollama and whatever else is built on ggml, and a Modelfile for Ollama.

    python export_gguf.py                                                   # the newest run under out/, as q8_0
    python export_gguf.py --model=out/smol_shakespeare --outtype=bf16
    python export_gguf.py --model=HuggingFaceTB/SmolLM2-135M-Instruct       # written to out/SmolLM2-135M-Instruct-gguf/

    llama-completion -m out/smol_shakespeare/smol_shakespeare-q8_0.gguf -no-cnv -p "ROMEO:"
    cd out/smol_shakespeare && ollama create smol_shakespeare -f Modelfile && ollama run smol_shakespeare "ROMEO:"

Needs the gguf package (pip install "gguf>=0.17,<1"). Tensors are copied from disk to disk in pieces, so a model that
fits in memory once can be exported. The file is read back and compared with the model and the tokenizer before it
replaces an earlier one. What GGUF or llama.cpp cannot represent is refused: llama.cpp would load a file with a wrong
value without an error, and write fluent nonsense.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.conversations import read_chat_template, render
from lib.files import atomic, read_errors_as_user_error, read_json
from lib.gguf_format import (
    CONTROL,
    NORMAL,
    PERMUTED,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    ggml_name,
    need_gguf,
    permute,
    read_header,
)
from lib.settings import UserError, override, run_main

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import find, hf_name, load, newest_run


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    outtype: Literal["q8_0", "f16", "bf16", "f32"] = "q8_0"  # q8_0: int8 in blocks of 32, 8.5 bits a weight in all
    out_dir: str = ""  # folder for the two files; empty: the model's own, for a hub id out/NAME-gguf


PIECE = 1 << 18  # weights converted at a time: the export takes a few times this much memory besides the model
CHATML = ("<|im_start|>", "<|im_end|>")
OUTTYPES = {"q8_0": "MOSTLY_Q8_0", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}  # general.file_type


# ----------------------------------------------------------------------------------------------------------------------
# tensors


def tensors_of(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(GGUF name, tensor) of every parameter. A tied head is no parameter: llama.cpp ties it where it is absent."""
    for name, p in model.named_parameters():
        p = p.detach()
        if name.endswith(PERMUTED):
            p = permute(p, model.config.head_dim)
        yield ggml_name(name), p


def ggml_type(tensor, outtype: str):
    """The type a tensor is stored in. Norm weights stay fp32: they are few, and ggml's kernels need them so."""
    kind = need_gguf().GGMLQuantizationType
    return kind.F32 if tensor.dim() == 1 else kind[outtype.upper()]


def pieces(tensor) -> Iterator[np.ndarray]:
    """A tensor's rows as fp32 arrays of about PIECE weights; a vector is one row."""
    rows = tensor if tensor.dim() == 2 else tensor[None]
    for part in rows.split(max(1, PIECE // rows.size(1))):
        yield part.float().numpy()


def check_representable(model, outtype: str, source: Path):
    """UserError where the type cannot hold a weight: a row that blocks do not fit, inf or nan, too large for fp16."""
    widths = {p.size(1) for p in model.parameters() if p.dim() == 2}
    odd = sorted(width for width in widths if width % 32)
    if outtype == "q8_0" and odd:
        raise UserError(
            f"{source}: q8_0 packs rows in blocks of 32, and this model has rows of {', '.join(map(str, odd))}. "
            "Use --outtype=f16, or train with widths that are multiples of 32."
        )
    for name, p in model.named_parameters():
        largest = float(torch.linalg.vector_norm(p.detach(), float("inf")))
        if not largest < float("inf"):  # true for nan as well
            raise UserError(f"{source}: {hf_name(name)} holds weights that are not finite. Train again.")
        if outtype == "f16" and largest > 65504:
            raise UserError(
                f"{source}: {hf_name(name)} holds a weight of {largest:.3g}; fp16 ends at 65504. Use --outtype=bf16."
            )


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer


def read_vocabulary(file: Path, tokenizer, vocab_size: int) -> dict:
    """pre (a name of PRE_TOKENIZERS), tokens, types and merges as GGUF stores them, from tokenizer.json, which
    `tokenizer` was read from. UserError where llama.cpp would not tokenize as it does."""
    spec = read_json(file)
    model, pre = spec["model"], spec.get("pre_tokenizer") or {}
    added = {token["id"]: token for token in spec.get("added_tokens") or []}

    # what llama.cpp has no counterpart for
    wrong = []
    if model.get("type") != "BPE":
        wrong.append(f"a model of type {model.get('type')} (only BPE can be exported)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            wrong.append(f"{key}={model[key]!r}")
    if spec.get("normalizer"):
        wrong.append(f"a normalizer ({spec['normalizer'].get('type')})")
    if tokenizer.num_special_tokens_to_add(False):
        wrong.append(f"a post-processor ({spec['post_processor'].get('type')}) that adds tokens to every text")
    steps = [step for step in pre.get("pretokenizers", [pre]) if step]
    kinds = tuple(step["type"] for step in steps)
    name = PRE_TOKENIZERS.get(kinds)
    if name is None or steps[-1].get("add_prefix_space") or not steps[-1].get("use_regex", True):
        wrong.append(f"the pre-tokenizer {' + '.join(kinds) or 'none'} (known are Digits + ByteLevel and ByteLevel)")
    elif name == "smollm" and not steps[0].get("individual_digits"):
        wrong.append("digits that are not split one by one")
    for token in added.values():
        wrong += [f"{token['content']} with {key}" for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
    if wrong:
        raise UserError(
            f"{file} has what llama.cpp would tokenize otherwise: {'; '.join(wrong)}. "
            "A tokenizer made by prepare.py, or SmolLM2's own, can be exported."
        )

    by_id = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]  # a model may have more rows than tokens
    if len(set(tokens)) != vocab_size:
        raise UserError(f"{file} gives the same text to two token ids.")
    types = [NORMAL if i in by_id else UNUSED for i in range(vocab_size)]
    for i, token in added.items():
        types[i] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return dict(pre=name, tokens=tokens, types=types, merges=merges)


def end_tokens(config, source: Path) -> list[int]:
    """eos_token_id as a list of one or two ids, first the one that ends a document. GGUF has a place for two."""
    eos = config.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if not 1 <= len(ids) <= 2 or not all(0 <= i < config.vocab_size for i in ids):
        raise UserError(
            f"{source / 'config.json'}: eos_token_id={eos!r}, expected one or two token ids. GGUF has no way to say "
            "that nothing ends a text: llama.cpp would end it at token 11."
        )
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# the GGUF file


def write(file: Path, model, vocabulary: dict, template: str | None, ends: list[int], name: str, outtype: str):
    """Write the GGUF file: its fields, the table of its tensors, then the tensors piece by piece."""
    gguf = need_gguf()
    w = gguf.GGUFWriter(file, "llama")
    add_fields(w, model.config, vocabulary, template, ends, name, outtype)
    total = 0
    for tensor_name, tensor in tensors_of(model):
        kind = ggml_type(tensor, outtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]  # weights in a block, bytes of a block
        nbytes = tensor.numel() // block * size
        w.add_tensor_info(tensor_name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        total += nbytes
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    out = w.fout[0]
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"writing {outtype}", disable=None) as bar:
        for _, tensor in tensors_of(model):
            w.write_padding(out, out.tell())
            kind = ggml_type(tensor, outtype)
            for piece in pieces(tensor):
                bar.update(out.write(gguf.quants.quantize(piece, kind).tobytes()))
    w.write_padding(out, out.tell())
    w.close()


def add_fields(w, config, vocabulary: dict, template: str | None, ends: list[int], name: str, outtype: str):
    """Every field that llama.cpp reads of a llama: a missing one is no error there but a default."""
    gguf = need_gguf()
    w.add_type(gguf.GGUFType.MODEL)
    w.add_name(name)
    w.add_file_type(gguf.LlamaFileType[OUTTYPES[outtype]])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)

    w.add_vocab_size(config.vocab_size)
    w.add_context_length(config.max_position_embeddings)
    w.add_embedding_length(config.hidden_size)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_key_length(config.head_dim)
    w.add_value_length(config.head_dim)
    w.add_rope_dimension_count(config.head_dim)
    w.add_rope_freq_base(config.rope_theta)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)

    w.add_tokenizer_model("gpt2")  # ggml's name for any byte-level BPE
    w.add_tokenizer_pre(vocabulary["pre"])
    w.add_token_list(vocabulary["tokens"])
    w.add_token_types(vocabulary["types"])
    w.add_token_merges(vocabulary["merges"])
    w.add_eos_token_id(ends[0])
    if len(ends) == 2:
        w.add_eot_token_id(ends[1])
    # never put before a text, but llama.cpp would take token 11 for it where the field is missing
    w.add_bos_token_id(config.bos_token_id if config.bos_token_id in range(config.vocab_size) else ends[0])
    if config.pad_token_id in range(config.vocab_size):
        w.add_pad_token_id(config.pad_token_id)
    w.add_add_bos_token(False)  # SmolLM2 was trained without one
    w.add_add_eos_token(False)
    if template:
        w.add_chat_template(template)


def must(condition: bool, otherwise: str):
    """An assertion that holds under `python -O` as well."""
    if not condition:
        raise AssertionError(otherwise)


def check(file: Path, model, tokenizer, vocabulary: dict, outtype: str):
    """Read `file` back and compare it with the model and the tokenizer it was made from. AssertionError: a bug of ours.

    The tokens come from the tokenizer rather than from its file, so that a mistake in reading the file shows.
    """
    fields, stored = read_header(file)
    check_tensors(file, stored, model, outtype)
    vocab_size = model.config.vocab_size
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = tokenizer.get_added_tokens_decoder()
    must(len(tokens) == len(types) == vocab_size, f"{len(tokens)} tokens for a vocabulary of {vocab_size}")
    for i, (token, kind) in enumerate(zip(tokens, types)):
        known = tokenizer.id_to_token(i)
        must(known in (token, None), f"token {i} is {known!r} in the tokenizer and {token!r} in the file")
        if known is None:
            expected = UNUSED
        elif i not in special:
            expected = NORMAL
        else:
            expected = CONTROL if special[i].special else USER_DEFINED
        must(kind == expected, f"token {i} ({token!r}) has type {kind}, expected {expected}")
    must(fields["tokenizer.ggml.merges"] == vocabulary["merges"], "the merges differ")


def check_tensors(file: Path, stored: dict, model, outtype: str):
    """AssertionError where a tensor of `file` is not the model's, but for the rounding of the type.

    The rows of q and k are looked up one by one in ggml's order instead of calling permute(), so that a mistake there
    shows.
    """
    gguf, D = need_gguf(), model.config.head_dim
    names = {ggml_name(name) for name, _ in model.named_parameters()}
    must(set(stored) == names, f"tensors differ by {set(stored) ^ names}")
    total = sum(p.numel() for p in model.parameters())
    with open(file, "rb") as f, tqdm(total=total, unit_scale=True, desc="checking", disable=None) as bar:
        for name, p in model.named_parameters():
            shape, kind, offset = stored[ggml_name(name)]
            kind, p = gguf.GGMLQuantizationType(kind), p.detach()
            must(shape == list(p.shape), f"{ggml_name(name)} has shape {shape}")
            if name.endswith(PERMUTED):
                row = torch.arange(p.size(0))
                head, i = row // D, row % D
                p = p[head * D + i // 2 + (i % 2) * (D // 2)]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            f.seek(offset)
            for ours in pieces(p):
                raw = np.fromfile(f, np.uint8, ours.size // block * size).reshape(len(ours), -1)
                theirs = gguf.quants.dequantize(raw, kind)
                if outtype == "q8_0" and p.dim() == 2:
                    # within half a step of its block, and the rounding of the block's scale to fp16
                    largest = np.abs(ours).reshape(-1, 32).max(1, keepdims=True)
                    error = np.abs(theirs - ours).reshape(-1, 32)
                    equal = error <= largest * (0.5 / 127 + 2**-11) + 127 * 2**-25
                else:
                    kept = {"f16": torch.float16, "bf16": torch.bfloat16}.get(outtype if p.dim() == 2 else "f32")
                    equal = theirs == torch.from_numpy(ours).to(kept or torch.float32).float().numpy()
                must(equal.all(), f"{ggml_name(name)} was not stored as it is in the model")
                bar.update(ours.size)


# ----------------------------------------------------------------------------------------------------------------------
# the Modelfile


def chatml_system(template: str) -> str | None:
    """The system message that a ChatML template adds by itself ("" for none); None if the template is not ChatML.

    Ollama has a template language of its own, so a Jinja template cannot be passed on. It is rendered instead, and
    compared with what ChatML would give.
    """
    turns = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    messages = [dict(role=role, content=content) for role, content in turns]
    body = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns) + "<|im_start|>assistant\n"
    values = dict(messages=messages, add_generation_prompt=True, bos_token="", eos_token="<|im_end|>")
    try:
        text = render(template, [values])[0]
    except UserError:
        return None
    head, found, tail = text.partition(body)
    if not found or tail:
        return None
    system = head.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    return system if head == (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "") else None


def modelfile(gguf_name: str, model, tokenizer, template: str | None) -> str:
    """https://docs.ollama.com/modelfile: which file, what ends a text, and how a conversation is written."""
    stops = [tokenizer.id_to_token(i) or f"[PAD{i}]" for i in sorted(model.config.eos_ids)]
    lines = [f"# ollama create NAME -f Modelfile      then: ollama run NAME\nFROM ./{gguf_name}"]
    system = chatml_system(template) if template else None
    if template and system is not None:
        stops += [token for token in CHATML if token not in stops]
        lines.append(
            'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
            '<|im_start|>assistant\n"""'
        )
        if system:
            if '"""' in system or system.strip('"') != system:
                raise UserError(f"the chat template's system message has quotes that would end it: {system[:80]!r}.")
            lines.append(f'SYSTEM """{system}"""')
    elif template:
        lines.append("# The chat template is not ChatML; Ollama has to recognise the one in the GGUF file by itself.")
    else:  # a base model continues the text as it is; without this line Ollama would make a conversation of it
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    odd = [text for text in (gguf_name, *stops) if '"' in text or not text.isprintable()]
    if odd:  # what follows a quote or a line break would be read as a line of the Modelfile's own
        raise UserError(f"a Modelfile cannot hold {odd[0]!r}: it has quotes, or characters that cannot be printed.")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    # Past the positions it was trained on a model writes nonsense. Up to 8,192 of them take little memory.
    lines.append(f"PARAMETER num_ctx {min(model.config.max_position_embeddings, 8192)}")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# the command


def export(path, outtype: str = "q8_0", out_dir="") -> Path:
    """Write NAME-OUTTYPE.gguf and Modelfile for a model directory or hub id; returns the path of the first.

    An existing file keeps its content until the new one has been checked. UserError says what cannot be exported and
    what would help.
    """
    need_gguf()
    if outtype not in OUTTYPES:
        raise UserError(f"--outtype={outtype}: expected one of {', '.join(OUTTYPES)}.")
    source = find(path)
    local = Path(path).is_dir()
    name = Path(path).resolve().name if local else str(path).split("/")[1]
    folder = Path(out_dir) if out_dir else source if local else Path("out") / f"{name}-gguf"
    model, tokenizer = load(source, copy=False)
    with read_errors_as_user_error(source / "tokenizer.json"):
        vocabulary = read_vocabulary(source / "tokenizer.json", tokenizer, model.config.vocab_size)
    template = read_chat_template(source)
    ends = end_tokens(model.config, source)
    check_representable(model, outtype, source)
    file = folder / f"{name}-{outtype}.gguf"
    for_ollama = modelfile(file.name, model, tokenizer, template)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(file) as temporary:
            write(temporary, model, vocabulary, template, ends, name, outtype)
            check(temporary, model, tokenizer, vocabulary, outtype)
        with atomic(folder / "Modelfile") as temporary:
            temporary.write_text(for_ollama, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} could not be written ({error}). Choose another place with --out_dir=FOLDER.") from None
    return file


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    file = export(s.model or newest_run(), s.outtype, s.out_dir)
    print(f"{file}: {file.stat().st_size:,} bytes, read back and checked against the model and its tokenizer")
    print(f"{file.with_name('Modelfile')}: for Ollama")
    print(f"\n  llama-completion -m {file} -no-cnv -p TEXT")
    print(f"  ollama create {file.parent.name} -f {file.with_name('Modelfile')} && ollama run {file.parent.name}")


if __name__ == "__main__":
    run_main(main)
