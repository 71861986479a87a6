"""export_gguf.py: the file holds the model, and llama.cpp computes the same text and probabilities from it."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lib.files import read_json, write_json
from lib.settings import UserError

import pytest
import torch
from conftest import ROOT, TINY, run_script, save_hf_directory, tiny_hf
from tokenizers import processors
from trained import PLAY, copy_of_run

from checkpoint import load, read_tokenizer, save_pretrained
from prepare import train_bpe
from sample import generate

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (requirements-dev.txt)")
from lib import conversations  # noqa: E402

import export_gguf  # noqa: E402
from export_gguf import export  # noqa: E402

# widths that are multiples of 32, which q8_0 wants, and 3:1 grouping; large weights keep greedy text from looping
SHAPE = dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, head_dim=16, initializer_range=0.2)
TYPES = dict(f32=("F32", torch.float32), f16=("F16", torch.float16), bf16=("BF16", torch.bfloat16), q8_0=("Q8_0", None))
HARD = [
    "It's 2 late,\r\n\r\n  we've  12 owls 🦉🏽 漢字かな １２\t½ \0 l'été n'est-ce\n\n\n 7 !!! naïve",
    "a  12", "x\n\n12", "  3", "²³½Ⅷ٣٤", "    indented\n\t\ttabs \t mixed", "...!?;:--", "'s 'S 'LL 'll don't",
    " ", "\n", "\r", "word", " word", "word ", "<|endoftext|> spelled <|im_start|>", "e\u0301 \u200d \ufeff",
]  # fmt: skip
SMOLLM2_TEMPLATE = (  # as published with SmolLM2-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def directory(tmp_path):
    return save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE))


def edit_json(file, **changes):
    write_json(file, read_json(file) | changes)


def stored(file) -> tuple[dict, dict]:
    """Tensors of a GGUF file by name, dequantised, as torch tensors; and the names of their types."""
    tensors = gguf.GGUFReader(file).tensors
    values = {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)).view(list(t.shape)[::-1]) for t in tensors
    }
    return values, {t.name: t.tensor_type.name for t in tensors}


# ----------------------------------------------------------------------------------------------------------------------
# the file


@pytest.mark.parametrize("outtype", TYPES)
def test_tensors_are_the_models(directory, outtype):
    """Name, shape, type and value of every tensor, against transformers' weights; q and k row by row as ggml wants."""
    from transformers import AutoModelForCausalLM

    values, types = stored(export(directory, outtype))
    hf = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    pairs = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    parts = dict(
        q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output", gate_proj="ffn_gate",
        up_proj="ffn_up", down_proj="ffn_down", input_layernorm="attn_norm", post_attention_layernorm="ffn_norm",
    )  # fmt: skip
    for name in hf:
        if match := re.fullmatch(r"model\.layers\.(\d)\.(?:self_attn\.|mlp\.)?(\w+)\.weight", name):
            pairs[name] = f"blk.{match[1]}.{parts[match[2]]}.weight"
    assert set(values) == set(pairs.values()), "a tied model has no output.weight, and nothing else is left out"
    kind, dtype = TYPES[outtype]
    for theirs, ours in pairs.items():
        expected = hf[theirs]
        if "q_proj" in theirs or "k_proj" in theirs:
            rows = [h * 16 + half * 8 + i for h in range(expected.size(0) // 16) for i in range(8) for half in (0, 1)]
            expected = expected[rows]
        if expected.dim() == 1:
            assert types[ours] == "F32" and torch.equal(values[ours], expected), ours
        elif dtype is not None:
            assert types[ours] == kind and torch.equal(values[ours], expected.to(dtype).float()), ours
        else:
            step = expected.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            error = (values[ours] - expected).reshape(-1, 32).abs() / step
            assert types[ours] == kind and 0.3 < error.max() < 0.57, f"{ours}: half a step, and the scale's rounding"


def test_untied_head_is_written(tmp_path):
    """Without output.weight llama.cpp would tie the head by itself, and the text would be nonsense."""
    directory = save_hf_directory(tmp_path / "untied", tiny_hf(**SHAPE, tie_word_embeddings=False))
    values, _ = stored(export(directory, "f32"))
    model, _ = load(directory)
    assert torch.equal(values["output.weight"], model.lm_head.weight)
    assert not torch.equal(values["output.weight"], values["token_embd.weight"])


def test_fields_are_complete(directory):
    """Every key a llama.cpp loader reads, with its type: a missing one is a default there, not an error."""
    fields = gguf.GGUFReader(export(directory, "f16")).fields
    kinds = gguf.GGUFValueType
    expected = {
        "general.architecture": ("llama", kinds.STRING),
        "general.name": ("tiny", kinds.STRING),
        "general.type": ("model", kinds.STRING),
        "general.file_type": (1, kinds.UINT32),
        "general.quantization_version": (2, kinds.UINT32),
        "llama.vocab_size": (512, kinds.UINT32),
        "llama.context_length": (64, kinds.UINT32),
        "llama.embedding_length": (96, kinds.UINT32),
        "llama.feed_forward_length": (160, kinds.UINT32),
        "llama.block_count": (2, kinds.UINT32),
        "llama.attention.head_count": (6, kinds.UINT32),
        "llama.attention.head_count_kv": (2, kinds.UINT32),
        "llama.attention.key_length": (16, kinds.UINT32),
        "llama.attention.value_length": (16, kinds.UINT32),
        "llama.rope.dimension_count": (16, kinds.UINT32),
        "llama.rope.freq_base": (100000.0, kinds.FLOAT32),
        "llama.attention.layer_norm_rms_epsilon": (pytest.approx(1e-5), kinds.FLOAT32),
        "tokenizer.ggml.model": ("gpt2", kinds.STRING),
        "tokenizer.ggml.pre": ("smollm", kinds.STRING),
        "tokenizer.ggml.bos_token_id": (0, kinds.UINT32),
        "tokenizer.ggml.eos_token_id": (0, kinds.UINT32),
        "tokenizer.ggml.add_bos_token": (False, kinds.BOOL),
        "tokenizer.ggml.add_eos_token": (False, kinds.BOOL),
    }
    lists = {"tokenizer.ggml.tokens": 512, "tokenizer.ggml.token_type": 512, "tokenizer.ggml.merges": None}
    found = {key: field for key, field in fields.items() if not key.startswith("GGUF.")}
    assert set(found) == set(expected) | set(lists), "no key missing, and none that no reader knows"
    for key, (value, kind) in expected.items():
        assert found[key].contents() == value and found[key].types[0] == kind, key
    for key, length in lists.items():
        assert length in (None, len(found[key].contents())), key


def test_token_types(tmp_path):
    """Special tokens must be hidden, rows without a token unused; an added word that is not special is user-defined."""
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, vocab_size=576))
    spec = read_json(directory / "tokenizer.json")
    size = len(spec["model"]["vocab"])
    word = dict(id=size, content="SHIP", special=False, lstrip=False, rstrip=False, single_word=False, normalized=False)
    edit_json(directory / "tokenizer.json", added_tokens=spec["added_tokens"] + [word])
    fields = gguf.GGUFReader(export(directory, "f32")).fields
    tokens, types = (fields["tokenizer.ggml." + key].contents() for key in ("tokens", "token_type"))
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and types[:3] == [3, 3, 3]
    assert size < 575 and types[3:size] == [1] * (size - 3)
    assert (tokens[size], types[size]) == ("SHIP", 4)
    assert tokens[-1] == "[PAD575]" and types[size + 1 :] == [5] * (575 - size)


# ----------------------------------------------------------------------------------------------------------------------
# the check after writing, and what is refused


def break_permutation(monkeypatch):
    monkeypatch.setattr(export_gguf, "permute", lambda weight, head_dim: weight)


def break_names(monkeypatch):
    right = export_gguf.tensors_of
    swap = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
    pattern = re.compile("ffn_gate|ffn_up")
    monkeypatch.setattr(
        export_gguf, "tensors_of", lambda m: ((pattern.sub(lambda k: swap[k[0]], n), t) for n, t in right(m))
    )


def break_rounding(monkeypatch):
    right = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda piece, kind: right(piece * 1.02, kind))


def break_tokens(monkeypatch):
    right = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda self, tokens: right(self, tokens[:3] + tokens[:2:-1]))


def break_types(monkeypatch):
    right = gguf.GGUFWriter.add_token_types
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_types", lambda self, types: right(self, [1] * len(types)))


@pytest.mark.parametrize("outtype", ["f32", "q8_0"])
@pytest.mark.parametrize("fault", [break_permutation, break_names, break_rounding, break_tokens, break_types])
def test_check_notices_a_wrong_file(directory, monkeypatch, fault, outtype):
    """The read-back must notice each kind of mistake in writing, and the earlier file must stay as it was."""
    file = export(directory, outtype)
    before = file.read_bytes()
    fault(monkeypatch)
    with pytest.raises(AssertionError, match="not stored as|token|type"):
        export(directory, outtype)
    assert file.read_bytes() == before and not list(directory.glob("*.tmp"))


def spoil_weights(value):
    def spoil(directory):
        model, _ = load(directory)
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[3, 5] = value
        save_pretrained(model, directory)

    return spoil


def spoil_tokenizer(**changes):
    return lambda directory: edit_json(directory / "tokenizer.json", **changes)


def spoil_settings(**changes):
    return lambda directory: edit_json(directory / "tokenizer_config.json", **changes)


def spoil_surrogate(directory):
    """JSON can spell what UTF-8, and so a GGUF file, cannot hold."""
    (directory / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')


def spoil_config(**changes):
    return lambda directory: edit_json(directory / "config.json", **changes)


def spoil_special_token(directory):
    spec = read_json(directory / "tokenizer.json")
    spec["added_tokens"][0]["lstrip"] = True
    write_json(directory / "tokenizer.json", spec)


def spoil_bos(directory):
    """A tokenizer that begins every text with a token, as Llama's do."""
    tokenizer = read_tokenizer(directory)
    start = "<|im_start|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def spoil_part(key, value):
    def spoil(directory):
        spec = read_json(directory / "tokenizer.json")
        spec["pre_tokenizer"]["pretokenizers"][0][key] = value
        write_json(directory / "tokenizer.json", spec)

    return spoil


def spoil_digits(directory):
    spec = read_json(directory / "tokenizer.json")
    spec["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    write_json(directory / "tokenizer.json", spec)


@pytest.mark.parametrize(
    "outtype, spoil, message",
    [
        ("f16", spoil_weights(1e5), "up_proj.*1e\\+05.*--outtype=bf16"),
        ("f32", spoil_weights(math.nan), "up_proj.*not finite"),
        ("q8_0", spoil_weights(math.inf), "up_proj.*not finite"),
        ("f32", spoil_tokenizer(normalizer={"type": "NFC"}), "normalizer \\(NFC\\)"),
        ("f32", spoil_tokenizer(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace"),
        ("f32", spoil_tokenizer(pre_tokenizer=None), "pre-tokenizer none"),
        ("f32", spoil_digits, "digits"),
        ("f32", spoil_bos, "post-processor \\(TemplateProcessing\\) that adds tokens"),
        ("f32", spoil_part("type", None), "tokenizer.json"),
        ("f32", spoil_tokenizer(model=None), "tokenizer.json"),
        ("f32", spoil_tokenizer(added_tokens={"a": 1}), "tokenizer.json"),
        ("f32", spoil_settings(chat_template=5), "tokenizer_config.json is damaged.*is no text"),
        ("f32", spoil_surrogate, "tokenizer_config.json is damaged.*is no text"),
        ("f32", spoil_settings(chat_template=[1]), "tokenizer_config.json is damaged"),
        ("f32", spoil_special_token, "<\\|endoftext\\|> with lstrip"),
        ("f32", spoil_config(eos_token_id=None), "eos_token_id=None"),
        ("f32", spoil_config(eos_token_id=[0, 1, 2]), "one or two"),
    ],
)
def test_refuses_what_it_cannot_represent(directory, outtype, spoil, message):
    """Each of these would load in llama.cpp without an error and give other text. Nothing may be written."""
    spoil(directory)
    with pytest.raises(UserError, match=message):
        export(directory, outtype)
    assert not list(directory.glob("*.gguf*")) and not (directory / "Modelfile").exists()


def test_odd_structure_is_one_line(directory, monkeypatch):
    """What the tokenizers library would read and this would not: no KeyError, but the name of the file."""
    _, tokenizer = load(directory)
    monkeypatch.setattr(export_gguf, "load", lambda *a, **k: (load(directory)[0], tokenizer))
    for wrong in (dict(model=None), dict(model=[]), dict(added_tokens=[1]), dict(pre_tokenizer=5), dict(model={})):
        edit_json(directory / "tokenizer.json", **wrong)
        with pytest.raises(UserError, match="tokenizer.json"):
            export(directory, "f32")


@pytest.mark.parametrize(
    "post",
    [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single="$A", pair="$A $B"),
     processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(single="$A", pair="$A $B")])],
    ids=["ByteLevel", "TemplateProcessing", "Sequence"],
)  # fmt: skip
def test_a_post_processor_that_adds_nothing_is_no_obstacle(directory, post):
    """transformers saves tokenizers with one; the tokens are the same with and without it."""
    tokenizer = read_tokenizer(directory)
    tokenizer.post_processor = post
    tokenizer.save(str(directory / "tokenizer.json"))
    assert export(directory, "f32").is_file()


def test_a_tokenizer_that_transformers_saved(directory, tmp_path):
    """Read and saved again by transformers it is written as before, byte by byte."""
    from transformers import AutoTokenizer

    before = export(directory, "f32").read_bytes()
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    assert read_json(directory / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    assert export(directory, "f32").read_bytes() == before


@pytest.mark.slow
def test_the_check_holds_without_assertions(directory):
    """`python -O` drops assert statements: a wrong file would then be said to have been checked."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import export_gguf\n"
        "export_gguf.permute = lambda weight, head_dim: weight\n"
        "export_gguf.export(sys.argv[2], 'f32')\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code, str(ROOT), directory], capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError: blk.0.attn_" in done.stderr
    assert not list(directory.glob("*.gguf*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_what_is_stopped_leaves_no_half_file(directory):
    """A real SIGTERM while the file is checked: the earlier file stays, and the new one's temporary file goes."""
    file = export(directory, "f32")
    before = file.read_bytes()
    code = (
        "import sys, time; sys.path.insert(0, sys.argv.pop(1))\n"
        "import export_gguf; from lib import settings as config\n"
        "export_gguf.check = lambda *a: print('ready', flush=True) or time.sleep(60)\n"
        "config.run_main(export_gguf.main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), f"--model={directory}", "--outtype=f32"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n" and list(directory.glob("*.tmp"))
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + 15 and "Traceback" not in err
    assert not list(directory.glob("*.tmp")) and file.read_bytes() == before


def test_q8_0_wants_multiples_of_32(tmp_path):
    """Blocks of 32 do not fit rows of 48; the message names the way out, and the way out works."""
    directory = save_hf_directory(tmp_path / "odd", tiny_hf())
    assert TINY["hidden_size"] == 48
    with pytest.raises(UserError, match="rows of 48, 80.*--outtype=f16"):
        export(directory)
    assert export(directory, "f16").name == "odd-f16.gguf"


@pytest.mark.slow
def test_mistakes_end_with_a_message(directory, monkeypatch, tmp_path):
    """A wrong type, a missing directory, a folder that cannot be made, no gguf package: one line, exit code not 0."""
    done = run_script("export_gguf.py", f"--model={directory}", "--outtype=q4_k")
    assert done.returncode == 2 and "--outtype=q4_k: got 'q4_k', expected q8_0" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="expected one of q8_0"):
        export(directory, "q4_k")
    with pytest.raises(UserError, match="no such directory"):
        export(tmp_path / "nothing")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--out_dir="):
        export(directory, "f32", tmp_path / "file" / "below")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"):
        export(directory, "f32")


@pytest.mark.slow
def test_command_prints_what_to_do_next(directory):
    """The command as a user runs it, to another folder; the paths it prints exist."""
    done = run_script("export_gguf.py", f"--model={directory}", f"--out_dir={directory.parent / 'gguf'}")
    assert done.returncode == 0, done.stderr
    file = directory.parent / "gguf" / "tiny-q8_0.gguf"
    assert file.is_file() and str(file) in done.stdout and "ollama create" in done.stdout
    assert not list(directory.glob("*.gguf"))


@pytest.mark.slow
def test_memory_stays_near_the_models_size(tmp_path):
    """Writing f32 from a bf16 model, whose output alone is twice the model: at most 1.3 times the model in memory,
    beyond what the export of a tiny model takes. The lower bound shows that the measurement works."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which only Linux has")
    small = save_hf_directory(tmp_path / "small", tiny_hf())
    hf = tiny_hf(hidden_size=768, head_dim=128, intermediate_size=2048, num_hidden_layers=4, vocab_size=16384)
    directory = save_hf_directory(tmp_path / "big", hf.to(torch.bfloat16))
    size = (directory / "model.safetensors").stat().st_size
    assert size > 70e6, "too small a model to tell it from the interpreter's own memory"
    del hf
    code = f"""
import json, re, sys
sys.path.insert(0, {str(ROOT)!r})
import export_gguf, gguf
peak = lambda: 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])
export_gguf.export({str(small)!r}, "f16")  # what it imports and opens by itself
before = peak()
export_gguf.export({str(directory)!r}, sys.argv[1])
print(json.dumps(peak() - before))
"""
    for outtype in ("f32", "q8_0"):
        done = subprocess.run([sys.executable, "-c", code, outtype], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used = json.loads(done.stdout.splitlines()[-1])
        assert 0.9 * size < used < 1.3 * size, f"{outtype}: {used / size:.2f} times the model"


# ----------------------------------------------------------------------------------------------------------------------
# the Modelfile


def test_modelfile_of_a_base_model(directory):
    """A base model continues the text as it is; it stops at its end-of-text token, within its own context."""
    file = export(directory)
    lines = (directory / "Modelfile").read_text().splitlines()
    assert f"FROM ./{file.name}" in lines
    assert 'TEMPLATE """{{ .Prompt }}"""' in lines
    assert [line for line in lines if "stop" in line] == ['PARAMETER stop "<|endoftext|>"']
    assert "PARAMETER num_ctx 64" in lines and not any(line.startswith("SYSTEM") for line in lines)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_modelfile_of_a_chat_model(directory, place):
    """SmolLM2-Instruct's Jinja template, from either place, becomes Ollama's, with the system message it adds."""
    edit_json(directory / "config.json", eos_token_id=2)
    if place == "tokenizer_config.json":
        edit_json(directory / place, chat_template=SMOLLM2_TEMPLATE)
    else:
        (directory / place).write_text(SMOLLM2_TEMPLATE)
    file = export(directory)
    text = (directory / "Modelfile").read_text()
    template = (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    assert f'TEMPLATE """{template}"""' in text
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""' in text
    assert re.findall(r"PARAMETER stop (.*)", text) == ['"<|im_end|>"', '"<|im_start|>"']
    assert gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents() == SMOLLM2_TEMPLATE


@pytest.mark.parametrize(
    "template, system",
    [
        (SMOLLM2_TEMPLATE, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        (SMOLLM2_TEMPLATE.replace("loop.first and", "false and"), ""),
        (SMOLLM2_TEMPLATE.replace("<|im_end|>", "</s>"), None),
        (SMOLLM2_TEMPLATE.replace("assistant\n", "model\n"), None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ messages[0].__class__.__mro__ }}", None),
        ("{% for", None),
        ("{% if true %}{% continue %}{% endif %}", None),
    ],
)
def test_chat_template_is_recognised_by_what_it_writes(template, system):
    """A template that only resembles ChatML must not be passed to Ollama as ChatML; malicious code must not run."""
    assert export_gguf.chatml_system(template) == system


HOSTILE = {
    "a loop": "{% for i in range(10**9) %}{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a wide text": "{{ 'a'.center(10**10) }}{{ '%01000000000d' % 7 }}",
    "a filter": "{{ 'a' | center(10**10) }}",
    "a large number": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "words": "{{ lipsum(n=10**7) }}",
    "size": "a" * 3_000_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_costs_little(kind, monkeypatch):
    """A template comes with a model, from anyone: it must not take the machine's time or memory, here or in the process
    that renders it. The limits are tightened, so that the test ends soon."""
    monkeypatch.setattr(conversations, "TEMPLATE_SECONDS", 3)
    with pytest.raises(UserError, match="chat template") as refused:
        conversations.render(HOSTILE[kind], [dict(messages=[])])
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)
    assert export_gguf.chatml_system(HOSTILE[kind]) is None


def test_templates_render_as_in_transformers(hf_directory):
    """The same text from its own renderer, with blocks trimmed and loops that can be left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_directory)
    messages = [dict(role="user", content="naïve 🦉 <b>\n"), dict(role="assistant", content="yes")]
    looping = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n  {{ m.content }}\n{% endfor %}"
    )
    for template in (SMOLLM2_TEMPLATE, looping):
        expected = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        found = conversations.render(template, [dict(messages=messages, add_generation_prompt=True)])[0]
        assert found == expected and "naïve 🦉 <b>" in found


@pytest.mark.parametrize("system", ['hi"""\nADAPTER ./evil\nSYSTEM """', 'he said "yes"', '"'])
def test_a_system_message_cannot_leave_its_quotes(directory, system):
    """What follows the quotes would be a line of the Modelfile: ADAPTER, or FROM another model."""
    template = SMOLLM2_TEMPLATE.replace("You are a helpful AI assistant named SmolLM, trained by Hugging Face", system)
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="quotes that would end it"):
        export(directory)
    assert not list(directory.glob("*.gguf*")) and not (directory / "Modelfile").exists()


def rename_end_token(directory, text):
    spec = read_json(directory / "tokenizer.json")
    old = spec["added_tokens"][0]["content"]
    spec["added_tokens"][0]["content"] = text
    spec["model"]["vocab"][text] = spec["model"]["vocab"].pop(old)
    write_json(directory / "tokenizer.json", spec)


@pytest.mark.parametrize("text", ['</s>"\nADAPTER ./evil', 'a"b', "a\nb", "a\x00b"])
def test_an_end_token_cannot_leave_its_line(directory, text):
    rename_end_token(directory, text)
    with pytest.raises(UserError, match="a Modelfile cannot hold"):
        export(directory)
    assert not list(directory.glob("*.gguf*")) and not (directory / "Modelfile").exists()


def test_nor_can_the_name_of_the_folder(directory):
    odd = directory.rename(directory.with_name("x\nADAPTER evil"))
    with pytest.raises(UserError, match="a Modelfile cannot hold"):
        export(odd)


def test_modelfile_of_another_template(directory):
    """Not ChatML: no template is invented."""
    edit_json(directory / "tokenizer_config.json", chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    export(directory)
    text = (directory / "Modelfile").read_text()
    assert "\nTEMPLATE" not in text and "not ChatML" in text


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp


@pytest.fixture
def llama():
    """A function that starts llama.cpp on a GGUF file."""
    pytest.importorskip("xllamacpp", reason="the xllamacpp wheel is not installed (requirements-dev.txt)")
    from llamacpp import LlamaCpp

    return LlamaCpp


def ours(model, ids, n):
    return [int(step) for step in generate(model, ids, n, temperature=0)]


def prompts(tokenizer):
    texts = ("MARA:\nWhat", "The", "12 ships", "beyond the reef?\n\n", "OLD TAM:\nWhat news")
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("case", [pytest.param("trained", marks=pytest.mark.slow), "tied", "untied"])
def test_llamacpp_writes_the_same_text(tmp_path, llama, monkeypatch, case):
    """f32, greedy: the same tokens, and the same log-probabilities to 1e-4. Negative control: without the permutation
    of q and k the file loads as well, but tokens and log-probabilities must differ."""
    if case == "trained":
        directory = copy_of_run(tmp_path / "run")
    else:
        directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, tie_word_embeddings=case == "tied"))
    model, tokenizer = load(directory)
    expected = [ours(model, ids, 24) for ids in prompts(tokenizer)]
    assert all(len(set(ids)) > 4 for ids in expected), "the model's text is too dull to tell models apart"
    text = tokenizer.encode(PLAY.read_text(encoding="utf-8")[2000:]).ids[:30]
    with torch.no_grad():
        odds = model(torch.tensor([text]))[0][0].log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]

    def differences():
        client = llama(export(directory, "f32"))
        tokens = [client.greedy(ids, 24) for ids in prompts(tokenizer)]
        theirs = client.log_probabilities(text, model.config.vocab_size, tokenizer.token_to_id("a"))
        return sum(a != b for a, b in zip(tokens, expected)), (torch.tensor(theirs) - odds).abs().max()

    different, error = differences()
    assert different == 0 and error < 1e-4
    monkeypatch.setattr(export_gguf, "permute", lambda weight, head_dim: weight)
    monkeypatch.setattr(export_gguf, "check", lambda *a: None)
    different, error = differences()
    assert different == len(expected) and error > 0.1, f"{different} texts differ, by up to {error:.3f} nats"


def test_llamacpp_stops_at_the_models_end_token(tmp_path, llama):
    """eos_token_id 2 must reach llama.cpp; where the key is missing it takes token 11."""
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, eos_token_id=2, bos_token_id=1))
    (directory / "chat_template.jinja").write_text(SMOLLM2_TEMPLATE)
    properties = llama(export(directory, "f32")).properties()
    assert (properties["bos_token"], properties["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert properties["chat_template"] == SMOLLM2_TEMPLATE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
def test_llamacpp_tokenizes_alike(tmp_path, llama, monkeypatch, kind):
    """Hard strings and this repository's own text, through llama.cpp and through tokenizers; and back to text.
    Negative control: with another name for the pre-tokenizer the ids must differ."""
    from tokenizers import pre_tokenizers

    texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))] + [
        PLAY.read_text(encoding="utf-8")
    ]
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, vocab_size=2048))
    made = train_bpe(texts + HARD, 2048)
    if kind == "gpt-2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(directory / "tokenizer.json"))
    _, tokenizer = load(directory)
    chunks = [text[at : at + 700] for text in texts for at in range(0, len(text), 1500)] + HARD

    def differing():
        client = llama(export(directory, "f32"))
        return client, sum(client.tokenize(text) != tokenizer.encode(text).ids for text in chunks)

    client, different = differing()
    assert different == 0 and len(chunks) > 80
    assert client.tokenize("<|im_end|>x", special=True)[0] == 2
    if kind == "smollm":  # as "gpt-2" llama.cpp deletes spaces before punctuation in what it prints, in any GGUF file
        for text in chunks:
            assert client.detokenize(tokenizer.encode(text).ids) == text
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tokenizer_pre", lambda self, pre: self.add_string("tokenizer.ggml.pre", "default")
    )
    assert differing()[1] > 40


def bits_per_byte(client, model, tokenizer, text: str) -> float:
    """Of a text, from llama.cpp's probabilities, in rows of 64 tokens; the first token of a row is not counted."""
    ids = tokenizer.encode(text).ids
    nats, size = 0.0, 0
    for at in range(0, len(ids) - 1, 63):
        row = ids[at : at + 64]
        nats -= sum(client.log_probabilities(row, model.config.vocab_size, tokenizer.token_to_id("a")))
        size += len(tokenizer.decode(row[1:]).encode())
    return nats / math.log(2) / size


@pytest.mark.slow
def test_q8_0_costs_next_to_nothing(tmp_path, llama, capsys):
    """llama.cpp on f32 and on q8_0 of a trained run: bits per byte of text, from llama.cpp's own probabilities with
    its usual settings. Negative control: noise of 15% on every weight must cost more than is allowed."""
    directory = copy_of_run(tmp_path / "run")
    model, tokenizer = load(directory)
    text = PLAY.read_text(encoding="utf-8")[-1200:]  # from the validation tenth
    bpb = {k: bits_per_byte(llama(export(directory, k), exact=False), model, tokenizer, text) for k in ("f32", "q8_0")}
    with capsys.disabled():
        print(f"\nllama.cpp, bits per byte: f32 {bpb['f32']:.4f}, q8_0 {bpb['q8_0']:.4f}")
    assert 1.0 < bpb["f32"] < 4.0, "the run has learnt something"
    assert abs(bpb["q8_0"] - bpb["f32"]) < 0.005
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rough = tmp_path / "rough"
    shutil.copytree(directory, rough)
    save_pretrained(model, rough)
    assert bits_per_byte(llama(export(rough, "f32")), model, tokenizer, text) - bpb["f32"] > 0.005


@pytest.mark.slow
def test_llamacpp_runs_every_type(tmp_path, llama):
    """What a user does: train, export, run. Each type loads, and the log-probabilities are ours up to its rounding,
    which must be seen in the three types that round."""
    directory = copy_of_run(tmp_path / "run")
    model, tokenizer = load(directory)
    ids = tokenizer.encode(PLAY.read_text(encoding="utf-8")[3000:]).ids[:40]
    with torch.no_grad():
        odds = model(torch.tensor([ids]))[0][0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for outtype, (least, most) in dict(f32=(0, 1e-5), f16=(1e-5, 0.02), bf16=(1e-4, 0.1), q8_0=(1e-4, 0.1)).items():
        client = llama(export(directory, outtype))
        theirs = client.log_probabilities(ids, model.config.vocab_size, tokenizer.token_to_id("a"))
        error = float((torch.tensor(theirs) - odds).abs().max())
        assert least <= error < most, f"{outtype}: off by {error:.1e} nats"
