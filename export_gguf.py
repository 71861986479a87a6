"""
A model directory as one GGUF file for llama.cpp, Ollama and whatever else is built on ggml, and a Modelfile for Ollama.

    python export_gguf.py                                                   # the newest run under out/, as q8_0
    python export_gguf.py --model=out/smol_shakespeare --outtype=bf16
    python export_gguf.py --model=HuggingFaceTB/SmolLM2-135M-Instruct       # written to out/SmolLM2-135M-Instruct-gguf/

    llama-completion -m out/smol_shakespeare/smol_shakespeare-q8_0.gguf -no-cnv -p "ROMEO:"
    cd out/smol_shakespeare && ollama create smol_shakespeare -f Modelfile && ollama run smol_shakespeare "ROMEO:"

Needs the gguf package (pip install "gguf>=0.17,<1"). Tensors go from disk to disk in pieces, so a model that fits in
memory once can be exported. Before the file takes its name it is read back and compared with the model and the
tokenizer. What GGUF or llama.cpp cannot represent faithfully is refused, for there a wrong value is no error but
fluent nonsense.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import UserError, guard, override
from model import ModelError, atomic, hf_name, read_json
from sample import find, load, newest_run


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    outtype: str = "q8_0"  # f32, f16, bf16, or q8_0: int8 in blocks of 32 with an fp16 scale, 8.5 bits a weight
    out_dir: str = ""  # folder for the two files; empty: the model's own, for a hub id out/NAME-gguf


OUTTYPES = ("q8_0", "f16", "bf16", "f32")
PIECE = 1 << 18  # weights converted at a time: what the memory holds besides the model is a few times this
CHATML = ("<|im_start|>", "<|im_end|>")


def need_gguf():
    try:
        import gguf
    except ImportError:
        raise UserError(
            'GGUF files are written with the gguf package. Get it with: pip install "gguf>=0.17,<1"'
        ) from None
    return gguf


# ----------------------------------------------------------------------------------------------------------------------
# tensors


def ggml_name(name: str) -> str:
    """Our parameter's name in a GGUF file: layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    names = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    *path, module, weight = name.split(".")
    block = f"blk.{path[1]}." if path else ""
    return f"{block}{names[module]}.{weight}"


def permute(weight, head_dim: int):  # (heads * D, C) -> (heads * D, C)
    """Rows of q_proj or k_proj from Hugging Face's order to ggml's. RoPE turns pairs of dimensions: here dimension i
    with i + D/2, in ggml 2i with 2i + 1. Without this llama.cpp loads the file, warns of nothing, writes nonsense."""
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def tensors_of(model):
    """(GGUF name, tensor) of every parameter; a tied head is no parameter, and llama.cpp ties it by its absence."""
    for name, p in model.named_parameters():
        p = p.detach()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            p = permute(p, model.config.head_dim)
        yield ggml_name(name), p


def ggml_type(tensor, outtype: str):
    """Norm weights stay fp32: they are few, and ggml's kernels want them so."""
    kind = need_gguf().GGMLQuantizationType
    return kind.F32 if tensor.dim() == 1 else kind[outtype.upper()]


def pieces(tensor):
    """A tensor's rows as fp32 numpy arrays, PIECE weights or so at a time; a vector counts as one row."""
    rows = tensor if tensor.dim() == 2 else tensor[None]
    for part in rows.split(max(1, PIECE // rows.size(1))):
        yield part.float().numpy()


def check_representable(model, outtype: str, source: Path):
    """ModelError where a weight has no counterpart in the type asked for."""
    widths = {p.size(1) for p in model.parameters() if p.dim() == 2}
    odd = sorted(width for width in widths if width % 32)
    if outtype == "q8_0" and odd:
        raise ModelError(
            f"{source}: q8_0 packs rows in blocks of 32, and this model has rows of {', '.join(map(str, odd))}. "
            "Use --outtype=f16, or train with widths that are multiples of 32."
        )
    for name, p in model.named_parameters():
        largest = float(torch.linalg.vector_norm(p.detach(), float("inf")))
        if not largest < float("inf"):  # true for nan as well
            raise ModelError(f"{source}: {hf_name(name)} holds weights that are not finite. Train again.")
        if outtype == "f16" and largest > 65504:
            raise ModelError(
                f"{source}: {hf_name(name)} holds a weight of {largest:.3g}; fp16 ends at 65504. Use --outtype=bf16."
            )


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer


def read_vocabulary(path: Path, vocab_size: int) -> dict:
    """pre, tokens, types and merges as GGUF holds them. ModelError where llama.cpp would not split or merge alike.

    llama.cpp knows pre-tokenizers by name only: "smollm" is SmolLM2's digits, then GPT-2's words; "gpt-2" the words
    alone. Token types: 1 an ordinary token, 3 a special one, 4 one added to the vocabulary but not special, 5 no token.
    """
    spec = read_json(path / "tokenizer.json")
    model, pre, post = spec["model"], spec.get("pre_tokenizer") or {}, spec.get("post_processor") or {}
    wrong = []
    if model.get("type") != "BPE":
        wrong.append(f"a model of type {model.get('type')} (only BPE can be exported)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(key):
            wrong.append(f"{key}={model[key]!r}")
    if spec.get("normalizer"):
        wrong.append(f"a normalizer ({spec['normalizer'].get('type')})")
    if post.get("type", "ByteLevel") != "ByteLevel":
        wrong.append(f"a post-processor ({post['type']}) that may add tokens")
    steps = [step for step in pre.get("pretokenizers", [pre]) if step]
    kinds = tuple(step["type"] for step in steps)
    name = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}.get(kinds)
    if name is None or steps[-1].get("add_prefix_space") or not steps[-1].get("use_regex", True):
        wrong.append(f"the pre-tokenizer {' + '.join(kinds) or 'none'} (known are Digits + ByteLevel and ByteLevel)")
    elif name == "smollm" and not steps[0].get("individual_digits"):
        wrong.append("digits that are not split one by one")
    added = {token["id"]: token for token in spec.get("added_tokens") or []}
    for token in added.values():
        wrong += [f"{token['content']} with {key}" for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
    if wrong:
        raise ModelError(
            f"{path / 'tokenizer.json'} has what llama.cpp would tokenize otherwise: {'; '.join(wrong)}. "
            "A tokenizer made by prepare.py, or SmolLM2's own, can be exported."
        )
    by_id = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]  # a model may have more rows than tokens
    if len(set(tokens)) != vocab_size:
        raise ModelError(f"{path / 'tokenizer.json'} gives the same text to two token ids.")
    types = [1 if i in by_id else 5 for i in range(vocab_size)]
    for i, token in added.items():
        types[i] = 3 if token["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return dict(pre=name, tokens=tokens, types=types, merges=merges)


def read_chat_template(path: Path) -> str | None:
    """The Jinja chat template of a model directory, from either of the two places; None for a base model."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = path / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def end_tokens(config, source: Path) -> list[int]:
    """eos_token_id as a list of one or two, first the one that ends a document. GGUF has a place for two."""
    eos = config.eos_token_id
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if not 1 <= len(ids) <= 2 or not all(0 <= i < config.vocab_size for i in ids):
        raise ModelError(
            f"{source / 'config.json'}: eos_token_id={eos!r}, expected one or two token ids. GGUF has no way to say "
            "that nothing ends a text: llama.cpp would end it at token 11."
        )
    return ids


# ----------------------------------------------------------------------------------------------------------------------
# the GGUF file


def write(file: Path, model, vocabulary: dict, template: str | None, name: str, outtype: str, source: Path):
    gguf = need_gguf()
    c = model.config
    file_types = dict(f32="ALL_F32", f16="MOSTLY_F16", bf16="MOSTLY_BF16", q8_0="MOSTLY_Q8_0")
    w = gguf.GGUFWriter(file, "llama")
    w.add_type(gguf.GGUFType.MODEL)
    w.add_name(name)
    w.add_file_type(gguf.LlamaFileType[file_types[outtype]])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)

    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)

    w.add_tokenizer_model("gpt2")  # ggml's name for any byte-level BPE
    w.add_tokenizer_pre(vocabulary["pre"])
    w.add_token_list(vocabulary["tokens"])
    w.add_token_types(vocabulary["types"])
    w.add_token_merges(vocabulary["merges"])
    ends = end_tokens(c, source)
    w.add_eos_token_id(ends[0])
    if len(ends) == 2:
        w.add_eot_token_id(ends[1])
    w.add_bos_token_id(ends[0] if c.bos_token_id is None else c.bos_token_id)  # never added, but 11 where absent
    w.add_add_bos_token(False)  # SmolLM2 was trained without one
    w.add_add_eos_token(False)
    if template:
        w.add_chat_template(template)

    total = 0
    for tensor_name, tensor in tensors_of(model):
        kind = ggml_type(tensor, outtype)
        block, size = gguf.GGML_QUANT_SIZES[kind]
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


def read_back(file: Path) -> tuple[dict, dict]:
    """Fields and tensors of a GGUF file: key -> value, name -> (shape as torch has it, ggml type, byte offset). A few
    lines of our own, since the gguf package's reader takes a hundred times the memory of a vocabulary."""
    formats = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
    with open(file, "rb") as f:

        def number(format):
            return struct.unpack(format, f.read(struct.calcsize(format)))[0]

        def value(kind):
            if kind == 8:  # a string
                return f.read(number("<Q")).decode()
            if kind == 9:  # an array
                kind, length = number("<I"), number("<Q")
                return [value(kind) for _ in range(length)]
            return number(formats[kind])

        assert f.read(4) == b"GGUF" and number("<I") == 3, "not a GGUF file of version 3"
        n_tensors, n_fields = number("<Q"), number("<Q")
        fields = {value(8): value(number("<I")) for _ in range(n_fields)}
        tensors = {}
        for _ in range(n_tensors):
            name, dimensions = value(8), number("<I")
            tensors[name] = [number("<Q") for _ in range(dimensions)][::-1], number("<I"), number("<Q")
        start = f.tell() + -f.tell() % 32
    return fields, {name: (shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}


def check(file: Path, model, tokenizer, vocabulary: dict, outtype: str):
    """Read `file` back and compare it with the model and the tokenizer it was made from. AssertionError: a bug of ours.

    The rows of q and k are looked up one by one in ggml's order rather than permuted again, and the tokens come from
    the tokenizer rather than from its file, so that a mistake in writing is not repeated here.
    """
    gguf = need_gguf()
    c, (fields, stored) = model.config, read_back(file)
    names = {ggml_name(name) for name, _ in model.named_parameters()}
    assert set(stored) == names, f"tensors differ by {set(stored) ^ names}"
    total = sum(p.numel() for p in model.parameters())
    with open(file, "rb") as f, tqdm(total=total, unit_scale=True, desc="checking", disable=None) as bar:
        for name, p in model.named_parameters():
            shape, kind, offset = stored[ggml_name(name)]
            kind, p = gguf.GGMLQuantizationType(kind), p.detach()
            assert shape == list(p.shape), f"{ggml_name(name)} has shape {shape}"
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                row = torch.arange(p.size(0))
                head, i = row // c.head_dim, row % c.head_dim
                p = p[head * c.head_dim + i // 2 + (i % 2) * (c.head_dim // 2)]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            f.seek(offset)
            for ours in pieces(p):
                raw = np.fromfile(f, np.uint8, ours.size // block * size).reshape(len(ours), -1)
                theirs = gguf.quants.dequantize(raw, kind)
                if (
                    outtype == "q8_0" and p.dim() == 2
                ):  # within half a step of a block, and its scale's rounding to fp16
                    largest = np.abs(ours).reshape(-1, 32).max(1, keepdims=True)
                    error = np.abs(theirs - ours).reshape(-1, 32)
                    right = error <= largest * (0.5 / 127 + 2**-11) + 127 * 2**-25
                else:
                    kept = {"f16": torch.float16, "bf16": torch.bfloat16}.get(outtype if p.dim() == 2 else "f32")
                    right = theirs == torch.from_numpy(ours).to(kept or torch.float32).float().numpy()
                assert right.all(), f"{ggml_name(name)} was not stored as it is in the model"
                bar.update(ours.size)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = tokenizer.get_added_tokens_decoder()
    assert len(tokens) == len(types) == c.vocab_size, f"{len(tokens)} tokens for a vocabulary of {c.vocab_size}"
    for i, (token, kind) in enumerate(zip(tokens, types)):
        known = tokenizer.id_to_token(i)
        assert known in (token, None), f"token {i} is {known!r} in the tokenizer and {token!r} in the file"
        expected = 5 if known is None else 1 if i not in special else 3 if special[i].special else 4
        assert kind == expected, f"token {i} ({token!r}) has type {kind}, expected {expected}"
    assert fields["tokenizer.ggml.merges"] == vocabulary["merges"], "the merges differ"


# ----------------------------------------------------------------------------------------------------------------------
# the Modelfile


def chatml_system(template: str) -> str | None:
    """The system message that a ChatML template puts of itself ("" for none); None if the template is not ChatML.

    Ollama has a template language of its own, so a Jinja template cannot be handed over. It is rendered instead, in
    Jinja's sandbox, and compared with what ChatML would give.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    talk = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    messages = [dict(role=role, content=content) for role, content in talk]
    body = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in talk) + "<|im_start|>assistant\n"
    try:
        compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        text = compiled.render(messages=messages, add_generation_prompt=True, bos_token="", eos_token="<|im_end|>")
    except TemplateError:
        return None
    head, found, tail = text.partition(body)
    if not found or tail:
        return None
    system = head.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    return system if head == (f"<|im_start|>system\n{system}<|im_end|>\n" if system else "") else None


def modelfile(gguf_name: str, model, tokenizer, template: str | None) -> str:
    """https://docs.ollama.com/modelfile: which file, what ends a text, and how a conversation is written down."""
    stops = [tokenizer.id_to_token(i) for i in sorted(model.config.eos_ids)]
    lines = [f"# ollama create NAME -f Modelfile      then: ollama run NAME\nFROM ./{gguf_name}"]
    system = chatml_system(template) if template else None
    if template and system is not None:
        stops += [token for token in CHATML if token not in stops]
        lines.append(
            'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
            '<|im_start|>assistant\n"""'
        )
        if system:
            lines.append(f'SYSTEM """{system}"""')
    elif template:
        lines.append("# The chat template is not ChatML; Ollama has to recognise the one in the GGUF file by itself.")
    else:  # a base model goes on from the text as it stands; without this Ollama would make a conversation of it
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    # past the positions it was trained on a model writes nonsense; up to 8,192 of them memory is no reason to ask less
    lines.append(f"PARAMETER num_ctx {min(model.config.max_position_embeddings, 8192)}")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# the command


def export(path, outtype: str = "q8_0", out_dir="") -> Path:
    """Write NAME-OUTTYPE.gguf and Modelfile for a model directory or hub id; returns the path of the first.

    An existing file keeps its content until the new one has been checked. UserError or ModelError says what cannot be
    exported and what would help.
    """
    need_gguf()
    if outtype not in OUTTYPES:
        raise UserError(f"--outtype={outtype}: expected one of {', '.join(OUTTYPES)}.")
    source = find(path)
    local = Path(path).is_dir()
    name = Path(path).resolve().name if local else str(path).split("/")[1]
    folder = Path(out_dir) if out_dir else source if local else Path("out") / f"{name}-gguf"
    model, tokenizer = load(source, copy=False)
    vocabulary, template = read_vocabulary(source, model.config.vocab_size), read_chat_template(source)
    end_tokens(model.config, source)
    check_representable(model, outtype, source)
    file = folder / f"{name}-{outtype}.gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(file) as temporary:
            write(temporary, model, vocabulary, template, name, outtype, source)
            check(temporary, model, tokenizer, vocabulary, outtype)
        with atomic(folder / "Modelfile") as temporary:
            temporary.write_text(modelfile(file.name, model, tokenizer, template), encoding="utf-8")
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
    guard(main, ModelError)
