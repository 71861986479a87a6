"""export_gguf.py: the file holds the model, and llama.cpp computes the same text and probabilities from it."""

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from lib import gguf_format
from lib.files import read_json, write_json
from lib.settings import UserError

import pytest
import torch
from conftest import ROOT, run_script, save_hf_directory, tiny_hf
from tokenizers import pre_tokenizers
from trained import PLAY, copy_of_run

from checkpoint import load, read_tokenizer, save_pretrained
from prepare import train_bpe
from sample import generate

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed (requirements-dev.txt)")
import export_gguf  # noqa: E402
from export_gguf import export  # noqa: E402

# widths that are multiples of 32, which q8_0 needs, and 3:1 grouping; large weights keep greedy text from looping
SHAPE = dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, head_dim=16, initializer_range=0.2)
DTYPES = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)
HARD = [
    "It's 2 late,\r\n\r\n  we've  12 owls 🦉🏽 漢字かな １２\t½ \0 l'été n'est-ce\n\n\n 7 !!! naïve",
    "a  12", "x\n\n12", "  3", "²³½Ⅷ٣٤", "    indented\n\t\ttabs \t mixed", "...!?;:--", "'s 'S 'LL 'll don't",
    " ", "\n", "\r", "word", " word", "word ", "<|endoftext|> spelled <|im_start|>", "e\u0301 \u200d \ufeff",
]  # fmt: skip
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2_TEMPLATE = (  # as published with SmolLM2-Instruct
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM + "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip


@pytest.fixture
def directory(tmp_path):
    return save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE))


def edit_json(file, **changes):
    write_json(file, read_json(file) | changes)


# ----------------------------------------------------------------------------------------------------------------------
# the file


def differing(file, directory, outtype: str) -> list[str]:
    """Compare a GGUF file's tensors with transformers' weights and list the names of those that differ.

    Written independently of lib/gguf_format.py: it has its own names, and looks up the rows of q and k one by one.
    """
    from transformers import AutoModelForCausalLM

    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    parts = dict(
        q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output", gate_proj="ffn_gate",
        up_proj="ffn_up", down_proj="ffn_down", input_layernorm="attn_norm", post_attention_layernorm="ffn_norm",
    )  # fmt: skip
    weights = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name in weights:
        if match := re.fullmatch(r"model\.layers\.(\d)\.(?:self_attn\.|mlp\.)?(\w+)\.weight", name):
            names[f"blk.{match[1]}.{parts[match[2]]}.weight"] = name
    tensors = gguf.GGUFReader(file).tensors
    wrong = sorted({t.name for t in tensors} ^ set(names))  # a tied head is left out, and nothing else
    for t in tensors:
        values, kind = torch.tensor(gguf.dequantize(t.data, t.tensor_type)), t.tensor_type.name
        expected = weights[names[t.name]]
        if "attn_q" in t.name or "attn_k" in t.name:
            heads = range(len(expected) // 16)
            expected = expected[[h * 16 + half * 8 + i for h in heads for i in range(8) for half in (0, 1)]]
        if expected.dim() == 1:
            same = kind == "F32" and torch.equal(values, expected)
        elif outtype in DTYPES:
            same = kind == outtype.upper() and torch.equal(values, expected.to(DTYPES[outtype]).float())
        else:  # off by half a step plus the rounding of the block's scale; exact values would be suspicious
            step = expected.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            same = kind == "Q8_0" and 0.3 < ((values - expected).reshape(-1, 32).abs() / step).max() < 0.57
        wrong += [] if same else [t.name]
    return wrong


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_tensors_are_the_models(directory, monkeypatch, outtype):
    """Name, shape, type and value of every tensor. Negative controls: each kind of mistake in writing is noticed."""
    assert differing(export(directory, outtype), directory, outtype) == []
    right, names = gguf.quantize, gguf_format.GGML_NAMES
    faults = {
        "blk.0.attn_q.weight": (gguf_format, "permute", lambda weight, head_dim: weight),
        "blk.1.ffn_up.weight": (gguf_format, "GGML_NAMES", names | dict(up_proj="ffn_gate", gate_proj="ffn_up")),
        "token_embd.weight": (gguf, "quantize", lambda data, kind: right(data * 1.02, kind)),
    }
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(*fault)
            assert name in differing(export(directory, outtype), directory, outtype)


def test_a_tokenizer_that_transformers_saved(directory):
    """Read and saved again by transformers, it gives the same file."""
    from transformers import AutoTokenizer

    before = export(directory, "f32").read_bytes()
    AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
    assert read_json(directory / "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    assert export(directory, "f32").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------------------
# what is refused


def weight(value):
    def spoil(directory):
        model, _ = load(directory)
        with torch.no_grad():
            model.layers[1].mlp.up_proj.weight[3, 5] = value
        save_pretrained(model, directory)

    return spoil


def change(file: str, **changes):
    return lambda directory: edit_json(directory / f"{file}.json", **changes)


REFUSED = {
    "too large for fp16": ("f16", weight(1e5), "--outtype=bf16"),
    "nan": ("f32", weight(float("nan")), "not finite"),
    "a normalizer": ("f32", change("tokenizer", normalizer={"type": "NFC"}), "NFC"),
    "another pre-tokenizer": ("f32", change("tokenizer", pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    "no pre-tokenizer": ("f32", change("tokenizer", pre_tokenizer=None), "none"),
    "numbers in one piece": ("f32", change("tokenizer", pre_tokenizer=dict(type="Sequence", pretokenizers=[
        dict(type="Digits", individual_digits=False), dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True),
    ])), "digits"),
    "a token before every text": ("f32", change("tokenizer", post_processor=dict(
        type="BertProcessing", cls=["<|im_start|>", 1], sep=["<|im_end|>", 2],
    )), "BertProcessing"),
    "a token that takes spaces": ("f32", change("tokenizer", added_tokens=[
        dict(id=0, content="<|endoftext|>", special=True, normalized=False, lstrip=True, rstrip=True, single_word=False)
    ]), "lstrip"),
    "no end token": ("f32", change("config", eos_token_id=None), "eos_token_id=None"),
    "three end tokens": ("f32", change("config", eos_token_id=[0, 1, 2]), "one or two"),
    "rows that do not fit blocks of 32": (
        "q8_0", lambda directory: save_hf_directory(directory, tiny_hf()), "rows of 48, 80.*--outtype=f16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_represent(directory, case):
    """Each of these would load in llama.cpp or Ollama without an error and give wrong text. No file may be written."""
    outtype, spoil, message = REFUSED[case]
    spoil(directory)
    with pytest.raises(UserError, match=message):
        export(directory, outtype)
    assert not list(directory.glob("*.gguf*")) and not (directory / "Modelfile").exists()


def test_a_parameter_that_gguf_has_no_name_for_is_named(directory, monkeypatch):
    """For example, after a norm of the queries is added to model.py. Negative control: without it a file is written."""
    model, tokenizer = load(directory)
    monkeypatch.setattr(export_gguf, "load", lambda *_, **__: (model, tokenizer))
    model.layers[1].self_attn.q_norm = torch.nn.RMSNorm(16)
    with pytest.raises(UserError, match=r"parameter layers\.1\.self_attn\.q_norm\.weight: "):
        export(directory, "f32", directory / "new")
    assert not (directory / "new").exists()
    del model.layers[1].self_attn.q_norm
    assert export(directory, "f32").is_file()
    for name in ("layers.0.self_attn.q_proj.bias", "scale", "head.norm.weight"):
        with pytest.raises(UserError, match=name):
            gguf_format.ggml_name(name)


def test_what_is_stopped_leaves_no_half_file(directory, monkeypatch):
    """After Ctrl-C while the file is written, the earlier file stays, and the temporary one is deleted."""
    file = export(directory, "f32")
    before = file.read_bytes()

    def stopped(temporary, *arguments):
        temporary.write_bytes(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(export_gguf, "write_gguf", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(directory, "f32")
    assert not list(directory.glob("*.tmp")) and file.read_bytes() == before


@pytest.mark.slow
def test_two_exports_at_once_take_turns(directory, monkeypatch):
    """Their temporary files have the same name, so one would write to the other's, or rename it. Negative control:
    without the lock both write at once."""
    real, real_lock, writing = export_gguf.write_gguf, export_gguf.FileLock, []

    def slow(*arguments):
        writing.append(1)
        both.set() if len(writing) == 2 else both.wait(seconds)
        real(*arguments)
        writing.pop()

    monkeypatch.setattr(export_gguf, "write_gguf", slow)
    for lock, seconds in ((real_lock, 0.3), (lambda _: threading.Lock(), 30)):
        both = threading.Event()
        monkeypatch.setattr(export_gguf, "FileLock", lock)
        with ThreadPoolExecutor(2) as pool:
            exports = [pool.submit(export, directory, "f32") for _ in range(2)]
        assert both.is_set() if seconds == 30 else not both.is_set() and exports[0].result() == exports[1].result()


@pytest.mark.slow
def test_the_command(directory, monkeypatch, tmp_path):
    """Run it as a user would: it exports to another folder and prints the paths; mistakes end with a message."""
    done = run_script("export_gguf.py", f"--model={directory}", f"--out_dir={tmp_path / 'gguf'}")
    file = tmp_path / "gguf" / "tiny-q8_0.gguf"
    assert file.is_file() and str(file) in done.stdout and "ollama create" in done.stdout, done.stderr
    assert not list(directory.glob("*.gguf"))
    done = run_script("export_gguf.py", f"--model={directory}", "--outtype=q4_k")
    assert done.returncode == 2 and "expected q8_0" in done.stderr and "Traceback" not in done.stderr
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"):
        export(directory, "f32")


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


def test_modelfile_of_a_chat_model(directory):
    """SmolLM2-Instruct's Jinja template becomes Ollama's, with the system message it adds, if it adds one. A template
    that only resembles ChatML must not be passed to Ollama as ChatML."""
    edit_json(directory / "config.json", eos_token_id=2)
    edit_json(directory / "tokenizer_config.json", chat_template=SMOLLM2_TEMPLATE)
    file = export(directory)
    text = (directory / "Modelfile").read_text()
    template = (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    assert f'TEMPLATE """{template}"""' in text
    assert f'SYSTEM """{SYSTEM}"""' in text
    assert re.findall(r"PARAMETER stop (.*)", text) == ['"<|im_end|>"', '"<|im_start|>"']
    assert gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents() == SMOLLM2_TEMPLATE
    for old, new, kept in (
        ("loop.first and", "false and", template),
        ("<|im_end|>", "</s>", None),
        ("assistant\n", "model\n", None),
        ("{% endif %}", "", None),
    ):
        edit_json(directory / "tokenizer_config.json", chat_template=SMOLLM2_TEMPLATE.replace(old, new))
        export(directory)
        written = re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""', (directory / "Modelfile").read_text(), re.M | re.S)
        assert written == ([("TEMPLATE", kept)] if kept else [])


# ----------------------------------------------------------------------------------------------------------------------
# llama.cpp


@pytest.fixture
def llama():
    """Return the class that runs llama.cpp on a GGUF file."""
    return pytest.importorskip("llamacpp", reason="xllamacpp is not installed (requirements-dev.txt)").LlamaCpp


def next_tokens(model, tokenizer) -> list[list[int]]:
    return [[int(step) for step in generate(model, ids, 24, temperature=0)] for ids in prompts(tokenizer)]


def prompts(tokenizer) -> list[list[int]]:
    texts = ("MARA:\nWhat", "The", "12 ships", "beyond the reef?\n\n", "OLD TAM:\nWhat news")
    return [tokenizer.encode(text).ids for text in texts]


def nats_apart(client, model, tokenizer) -> torch.Tensor:
    """Return llama.cpp's log-probability minus ours, for each token of a text but the first."""
    ids = tokenizer.encode(PLAY.read_text(encoding="utf-8")[2000:]).ids[:50]
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0][0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    theirs = client.log_probabilities(ids, model.config.vocab_size, tokenizer.token_to_id("a"))
    return torch.tensor(theirs) - ours


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llamacpp_writes_the_same_text(tmp_path, llama, monkeypatch, tied):
    """f32, greedy: the same tokens, and the same log-probabilities to 1e-4. Negative control: without the permutation
    of q and k the file still loads, but tokens and log-probabilities must differ."""
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, tie_word_embeddings=tied))
    model, tokenizer = load(directory)
    expected = next_tokens(model, tokenizer)
    assert all(len(set(ids)) > 4 for ids in expected), "the model's text is too repetitive to tell models apart"
    client = llama(export(directory, "f32"))
    assert [client.greedy(ids, 24) for ids in prompts(tokenizer)] == expected
    assert nats_apart(client, model, tokenizer).abs().max() < 1e-4
    monkeypatch.setattr(gguf_format, "permute", lambda weight, head_dim: weight)
    client = llama(export(directory, "f32"))
    assert all(client.greedy(ids, 24) != text for ids, text in zip(prompts(tokenizer), expected))
    assert nats_apart(client, model, tokenizer).abs().max() > 0.1


@pytest.mark.slow
def test_llamacpp_runs_every_type(tmp_path, llama):
    """Train, export and run, as a user does. Each type loads, and its log-probabilities are ours up to rounding, which
    must show in the three types that round, and average out to almost nothing."""
    directory = copy_of_run(tmp_path / "run")
    model, tokenizer = load(directory)
    for outtype, (least, most) in dict(f32=(0, 1e-5), f16=(1e-5, 0.02), bf16=(1e-4, 0.1), q8_0=(1e-4, 0.1)).items():
        client = llama(export(directory, outtype))
        apart = nats_apart(client, model, tokenizer)
        assert least <= apart.abs().max() < most and apart.mean().abs() < 0.01, f"{outtype}: {apart}"
        if outtype == "f32":
            assert [client.greedy(ids, 24) for ids in prompts(tokenizer)] == next_tokens(model, tokenizer)


def test_llamacpp_stops_at_the_models_end_token(tmp_path, llama):
    """eos_token_id 2 must reach llama.cpp; if the key is missing it assumes token 11."""
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, eos_token_id=2, bos_token_id=1))
    (directory / "chat_template.jinja").write_text(SMOLLM2_TEMPLATE)
    properties = llama(export(directory, "f32")).post("/props")
    assert (properties["bos_token"], properties["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert properties["chat_template"] == SMOLLM2_TEMPLATE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm", "gpt-2"])
def test_llamacpp_tokenizes_alike(tmp_path, llama, monkeypatch, kind):
    """llama.cpp gives the ids of tokenizers for hard strings and this repository's files, and decodes them to the text.
    Negative control: with another name for the pre-tokenizer the ids must differ."""
    texts = [path.read_text(encoding="utf-8") for path in (*sorted(ROOT.glob("*.py")), PLAY)]
    chunks = [text[at : at + 700] for text in texts for at in range(0, len(text), 1500)] + HARD
    directory = save_hf_directory(tmp_path / "tiny", tiny_hf(**SHAPE, vocab_size=2048))
    tokenizer = train_bpe(texts + HARD, 2048)
    if kind == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer = read_tokenizer(directory)
    client = llama(export(directory, "f32"))
    for text in chunks:
        ids = tokenizer.encode(text).ids
        assert client.tokenize(text) == ids
        if kind == "smollm":  # as "gpt-2" llama.cpp deletes spaces before punctuation in what it prints
            assert client.post("/detokenize", tokens=ids)["content"] == text
    assert client.tokenize("<|im_end|>x", special=True)[0] == 2
    monkeypatch.setitem(gguf_format.PRE_TOKENIZERS, ("Digits", "ByteLevel")[kind == "gpt-2" :], "default")
    client = llama(export(directory, "f32"))
    assert sum(client.tokenize(text) != tokenizer.encode(text).ids for text in chunks) > 40
