"""
GGUF, the file format of llama.cpp and Ollama: tensor names, pre-tokenizers, the order of rows, and the writer.

    ggml_name("layers.3.self_attn.q_proj.weight")         # blk.3.attn_q.weight
    write_gguf(Path("model.gguf"), model, "q8_0", vocabulary, end_ids=[2], name="mine", template=None)

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from pathlib import Path

from lib.settings import UserError

from tqdm import tqdm

GGML_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
PERMUTED = ("q_proj.weight", "k_proj.weight")  # weights whose rows have another order in GGUF, see permute()

# llama.cpp knows pre-tokenizers by name only. "smollm" is SmolLM2's: single digits, then GPT-2's split into words.
PRE_TOKENIZERS = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}


def gguf_package():
    """Import the gguf package, or raise a UserError that says how to install it."""
    try:
        import gguf
    except ImportError:
        raise UserError('GGUF files need the gguf package. Install it with: pip install "gguf>=0.17,<1"') from None
    return gguf


def ggml_name(name: str) -> str:
    """Return the GGUF name of one of our parameters: layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    *path, module = name.rpartition(".")[0].split(".")
    if module not in GGML_NAMES or path[:1] not in ([], ["layers"]) or not name.endswith(".weight"):
        raise UserError(f"GGUF has no name for the parameter {name}: the llama of llama.cpp has none like it.")
    block = f"blk.{path[1]}." if path else ""
    return f"{block}{GGML_NAMES[module]}.weight"


def permute(weight, head_dim: int):  # (heads * D, C) -> (heads * D, C)
    """Reorder the rows of q_proj or k_proj from Hugging Face's order to ggml's.

    RoPE rotates pairs of dimensions: i and i + D/2 in Hugging Face's order, 2i and 2i + 1 in ggml's. Without this,
    llama.cpp loads the file without a warning and writes nonsense.
    """
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def unpermute(weight, head_dim: int):  # (heads * D, C) -> (heads * D, C)
    """Reorder the rows of attn_q or attn_k from ggml's order to Hugging Face's: the inverse of permute()."""
    return weight.view(-1, head_dim // 2, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, model, outtype: str, vocabulary: dict, end_ids: list[int], name: str, template: str | None):
    """Write a model as a GGUF file, with weights of type `outtype`: q8_0, f16, bf16 or f32.

    vocabulary: pre (a name from PRE_TOKENIZERS), tokens, types and merges. end_ids: the one or two that end a text.
    """
    gguf, c = gguf_package(), model.config
    ids = range(c.vocab_size)
    # Every field that llama.cpp reads for a llama. If one is missing, it takes a default without a warning.
    fields = dict(
        type=gguf.GGUFType.MODEL, name=name,
        file_type=gguf.LlamaFileType["ALL_F32" if outtype == "f32" else f"MOSTLY_{outtype.upper()}"],
        quantization_version=gguf.GGML_QUANT_VERSION,

        vocab_size=c.vocab_size, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
        feed_forward_length=c.intermediate_size, block_count=c.num_hidden_layers, head_count=c.num_attention_heads,
        head_count_kv=c.num_key_value_heads, key_length=c.head_dim, value_length=c.head_dim,
        rope_dimension_count=c.head_dim, rope_freq_base=c.rope_theta, layer_norm_rms_eps=c.rms_norm_eps,

        tokenizer_model="gpt2",  # ggml's name for every byte-level BPE
        tokenizer_pre=vocabulary["pre"], token_list=vocabulary["tokens"], token_types=vocabulary["types"],
        token_merges=vocabulary["merges"], eos_token_id=end_ids[0], eot_token_id=end_ids[1] if end_ids[1:] else None,
        # Nothing puts this token before a text, but without the field llama.cpp would assume token 11.
        bos_token_id=c.bos_token_id if c.bos_token_id in ids else end_ids[0],
        pad_token_id=c.pad_token_id if c.pad_token_id in ids else None,
        add_bos_token=False, add_eos_token=False,  # SmolLM2 was trained without
        chat_template=template or None,
    )  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in fields.items():
        if value is not None:
            getattr(writer, f"add_{key}")(value)
    # A tied head is not among the parameters: llama.cpp ties the head if output.weight is absent.
    for parameter, p in tqdm(list(model.named_parameters()), desc=f"converting to {outtype}", disable=None):
        p = p.detach()
        if parameter.endswith(PERMUTED):
            p = permute(p, c.head_dim)
        # Norm weights stay in fp32: there are few, and ggml's kernels expect it.
        kind = gguf.GGMLQuantizationType["F32" if p.dim() == 1 else outtype.upper()]
        writer.add_tensor(ggml_name(parameter), gguf.quantize(p.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
