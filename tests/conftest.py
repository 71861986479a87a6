"""What the tests share: a tiny model made by transformers, with a tokenizer, in a directory. Offline, CPU, fp32."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network, whatever cache this machine has
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread slows down models this small

import pytest  # noqa: E402
import torch  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, processes inherit that it is ignored

ROOT = Path(__file__).parent.parent
# These send Unix signals, limit resources and open pseudo-terminals.
collect_ignore = ["test_train.py", "test_prepare.py"] if os.name == "nt" else []
sys.path.insert(0, str(ROOT))

TINY = dict(  # SmolLM2's 3:1 grouping and theta at a size that runs in milliseconds
    vocab_size=512, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
    initializer_range=0.15, bos_token_id=0, eos_token_id=0, attention_bias=False, mlp_bias=False,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
)  # fmt: skip

TEXT = (ROOT / "data/shakespeare/play.txt").read_text(encoding="utf-8")[:30000]


@pytest.fixture(autouse=True)
def fresh_torch_state():
    """Start every test with a fixed seed and the default dtype, whatever the test before it changed."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(**changes):
    """Return a random SmolLM2 of the TINY shape (with `changes` to its config), fp32, in eval mode."""
    from checkpoint import config_from_dict
    from model import SmolLM2

    torch.manual_seed(0)
    return SmolLM2(config_from_dict({"model_type": "llama"} | TINY | changes)).eval()


def tiny_hf(seed: int = 0, **changes):
    """Return a random LlamaForCausalLM of the TINY shape (with `changes` to its config), fp32, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(TINY | changes))).eval()


def save_hf_directory(path, hf=None, **save_arguments) -> Path:
    """Write a complete directory as transformers does, plus a 512-token tokenizer; return the path."""
    from lib.files import write_json

    from checkpoint import tokenizer_config
    from prepare import train_bpe

    hf = hf or tiny_hf()
    path = Path(path)
    hf.save_pretrained(path, **save_arguments)
    train_bpe([TEXT], 512).save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", tokenizer_config("<|endoftext|>", 64))
    return path


@pytest.fixture
def hf_directory(tmp_path) -> Path:
    """Write a directory with a tiny random model of transformers (fp32, tied head) and a tokenizer; return the path."""
    return save_hf_directory(tmp_path / "model")


def run_script(*arguments, cwd=ROOT, timeout=120, **environment) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ...` as a user would; return its exit code and output. SCRIPT is relative to the repository,
    whatever the working directory is."""
    script, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=cwd, timeout=timeout, capture_output=True, text=True, encoding="utf-8",
        env=os.environ | {"PYTHONUTF8": "1"} | environment,
    )  # fmt: skip
