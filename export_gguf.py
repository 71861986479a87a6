"""
Export a model directory as one GGUF file for llama.cpp, Ollama and everything else built on ggml, with a Modelfile.

    python export_gguf.py                                                   # the newest run under out/, as q8_0
    python export_gguf.py --model=out/smol_shakespeare --outtype=bf16
    python export_gguf.py --model=HuggingFaceTB/SmolLM2-135M-Instruct       # written to out/SmolLM2-135M-Instruct-gguf/

    llama-completion -m out/smol_shakespeare/smol_shakespeare-q8_0.gguf -no-cnv -p "ROMEO:"
    cd out/smol_shakespeare && ollama create smol_shakespeare -f Modelfile && ollama run smol_shakespeare "ROMEO:"

What GGUF or llama.cpp cannot represent is refused: llama.cpp would load such a file without an error and write fluent
nonsense.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib.conversations import read_chat_template, render
from lib.files import atomic, read_errors_as_user_error, read_json
from lib.gguf_format import PRE_TOKENIZERS, ggml_name, gguf_package, write_gguf
from lib.settings import UserError, check, override, run_main

import torch
from filelock import FileLock

from checkpoint import find, hf_name, load, newest_run


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    outtype: Literal["q8_0", "f16", "bf16", "f32"] = "q8_0"  # q8_0: int8 in blocks of 32, 8.5 bits per weight in all
    out_dir: str = ""  # folder for the two files; empty: the model's own, or out/NAME-gguf for a hub id


# ----------------------------------------------------------------------------------------------------------------------
# what llama.cpp would silently get wrong is refused


def check_weights(model, outtype: str, source: Path):
    """Raise UserError if GGUF has no name for a weight, or `outtype` cannot hold it: odd rows, inf, nan, too large."""
    odd = sorted({p.size(1) for p in model.parameters() if p.dim() == 2 and p.size(1) % 32})
    if outtype == "q8_0" and odd:
        raise UserError(
            f"{source}: q8_0 packs rows in blocks of 32, and this model has rows of {', '.join(map(str, odd))}. "
            "Use --outtype=f16, or train with widths that are multiples of 32."
        )
    for name, p in model.named_parameters():
        ggml_name(name)  # raises UserError if there is none
        largest = float(torch.linalg.vector_norm(p.detach(), float("inf")))
        if not largest < float("inf"):  # also true for nan
            raise UserError(f"{source}: {hf_name(name)} holds weights that are not finite. Train the model again.")
        if outtype == "f16" and largest > 65504:
            raise UserError(f"{source}: {hf_name(name)} holds {largest:.3g}, too large for f16. Use --outtype=bf16.")


def check_tokenizer(spec: dict, tokenizer, file: Path) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json, whose content is `spec`. Raise UserError if
    llama.cpp would tokenize differently."""
    wrong = []
    if spec["model"].get("type") != "BPE":
        wrong.append(f"a model of type {spec['model'].get('type')} (only BPE can be exported)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if spec["model"].get(key):
            wrong.append(f"{key}={spec['model'][key]!r}")
    if spec.get("normalizer"):
        wrong.append(f"a normalizer ({spec['normalizer'].get('type')})")
    if tokenizer.num_special_tokens_to_add(False):
        wrong.append(f"a post-processor ({spec['post_processor'].get('type')}) that adds tokens to every text")
    pre = spec.get("pre_tokenizer") or {}  # a sequence, one step or none
    steps = [step for step in pre.get("pretokenizers", [pre]) if step]
    kinds = tuple(step["type"] for step in steps)
    if kinds not in PRE_TOKENIZERS or steps[-1].get("add_prefix_space") or not steps[-1].get("use_regex", True):
        wrong.append(f"the pre-tokenizer {' + '.join(kinds) or 'none'} (expected Digits + ByteLevel, or ByteLevel)")
    elif kinds[0] == "Digits" and not steps[0].get("individual_digits"):
        wrong.append("numbers that are not split into single digits")
    for token in spec.get("added_tokens") or []:
        wrong += [f"{token['content']} with {key}" for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
    if wrong:
        raise UserError(f"{file} has what llama.cpp would tokenize differently: {'; '.join(wrong)}.")
    return PRE_TOKENIZERS[kinds]


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer


def read_vocabulary(file: Path, tokenizer, vocab_size: int) -> dict:
    """Read what GGUF stores of a tokenizer from its tokenizer.json: pre, tokens, types, merges.

    tokenizer: the same file as the tokenizers library read it.
    """
    with read_errors_as_user_error(file):
        spec = read_json(file)
        pre = check_tokenizer(spec, tokenizer, file)
        added = {token["id"]: token for token in spec.get("added_tokens") or []}
        by_id = {i: token for token, i in spec["model"]["vocab"].items()}
        by_id |= {i: token["content"] for i, token in added.items()}
        tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]  # a model may have more rows than tokens
        if len(set(tokens)) != vocab_size:
            raise ValueError("the same text for two token ids")
        kinds = gguf_package().TokenType
        types = [kinds.NORMAL if i in by_id else kinds.UNUSED for i in range(vocab_size)]
        for i, token in added.items():
            types[i] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return dict(pre=pre, tokens=tokens, types=types, merges=merges)


# ----------------------------------------------------------------------------------------------------------------------
# the Modelfile


def chatml_system(template: str) -> str | None:
    """Return the system message that a ChatML template adds by itself ("" for none), or None if it is not ChatML.

    Ollama's templates are not Jinja, so the template cannot be copied. Instead it is rendered, and the text compared
    with what ChatML would give.
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
    """Write Ollama's Modelfile: which file, what ends a text, how a conversation is written.

    The format: https://docs.ollama.com/modelfile
    """
    stops = [tokenizer.id_to_token(i) or f"[PAD{i}]" for i in sorted(model.config.eos_ids)]
    lines = [f"# ollama create NAME -f Modelfile      then: ollama run NAME\nFROM ./{gguf_name}"]
    system = chatml_system(template) if template else None
    if template and system is not None:
        stops += [token for token in ("<|im_start|>", "<|im_end|>") if token not in stops]
        lines.append(
            'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}'
            '<|im_start|>assistant\n"""'
        )
        if system:
            if '"""' in system or system.strip('"') != system:
                raise UserError(f"the chat template's system message has quotes that would end it: {system[:80]!r}.")
            lines.append(f'SYSTEM """{system}"""')
    elif template:
        lines.append("# The chat template is not ChatML; Ollama has to recognize the one in the GGUF file by itself.")
    else:  # a base model continues a text; without this line Ollama would make it a conversation
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    odd = [text for text in (gguf_name, *stops) if '"' in text or not text.isprintable()]
    if odd:  # text after a quote or a line break would be read as a command of the Modelfile
        raise UserError(f"a Modelfile cannot hold {odd[0]!r}: it has quotes, or characters that cannot be printed.")
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    # Beyond the positions it was trained on a model writes nonsense. Up to 8,192 of them take little memory.
    lines.append(f"PARAMETER num_ctx {min(model.config.max_position_embeddings, 8192)}")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# the command


def export(path, outtype: str = "q8_0", out_dir="") -> Path:
    """Write NAME-OUTTYPE.gguf and Modelfile for a model directory or hub id; return the path of the first."""
    gguf_package()  # before anything slow
    check(Settings, outtype=outtype)
    source = find(path)
    local = Path(path).is_dir()
    name = Path(path).resolve().name if local else str(path).split("/")[1]
    folder = Path(out_dir) if out_dir else source if local else Path("out") / f"{name}-gguf"

    # everything that can be refused is refused before a file is written
    model, tokenizer = load(source, copy=False)
    vocabulary = read_vocabulary(source / "tokenizer.json", tokenizer, model.config.vocab_size)
    template = read_chat_template(source)
    eos = model.config.eos_token_id
    end_ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if not 1 <= len(end_ids) <= 2:  # GGUF has a field for each, and llama.cpp assumes token 11 if there is none
        raise UserError(f"{source / 'config.json'}: eos_token_id={eos!r}, expected one or two token ids.")
    check_weights(model, outtype, source)
    file = folder / f"{name}-{outtype}.gguf"
    for_ollama = modelfile(file.name, model, tokenizer, template)

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".export.lock"):  # two exports would write to the same temporary files
        with atomic(file) as temporary:
            write_gguf(temporary, model, outtype, vocabulary, end_ids, name, template)
        with atomic(folder / "Modelfile") as temporary:
            temporary.write_text(for_ollama, encoding="utf-8")
    return file


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    file = export(s.model or newest_run(), s.outtype, s.out_dir)
    print(f"{file}: {file.stat().st_size:,} bytes")
    print(f"{file.with_name('Modelfile')}: for Ollama")
    print(f"\n  llama-completion -m {file} -no-cnv -p TEXT")
    print(f"  ollama create {file.parent.name} -f {file.with_name('Modelfile')} && ollama run {file.parent.name}")


if __name__ == "__main__":
    run_main(main)
