"""checkpoint.py and files.py: everything that can be wrong with a model directory, and writing files atomically."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

from lib.files import atomic, exclusive, file_sha256, read_json, write_json
from lib.settings import UserError

import pytest
import torch
from conftest import ROOT, TEXT, run_script, tiny
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import from_pretrained, load, save_pretrained
from optimizer import make_optimizers
from prepare import train_bpe


def test_saved_and_loaded_is_bit_equal(tmp_path):
    """Config and logits are equal, tied and untied. The RoPE tables stay fp32 when a model is loaded as bf16."""
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)
        save_pretrained(model, tmp_path)
        again = from_pretrained(tmp_path)
        ids = torch.randint(0, 512, (2, 20))
        assert again.config == model.config and torch.equal(again(ids)[0], model(ids)[0])
        written = read_json(tmp_path / "config.json")  # without its own key, transformers 4 or 5 takes a default
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 100000.0
        assert written["dtype"] == written["torch_dtype"] == "float32"
        half = from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.rotary.cos.dtype == torch.float32


def test_equal_models_are_equal_files(tmp_path):
    """They have normal permissions, and safetensors reads them. Negative control: eight files that it saves differ."""
    for i in range(8):
        save_pretrained(tiny(), tmp_path / str(i), dict(step="3", val_loss="1.5", note="naïve ☃"))
    files = [tmp_path / str(i) / "model.safetensors" for i in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    assert checkpoint.metadata(tmp_path / "0")["note"] == "naïve ☃"
    assert files[0].stat().st_mode == (tmp_path / "0/config.json").stat().st_mode
    for file in files:
        save_file(load_file(file), file, checkpoint.metadata(file.parent))
    assert len({file.read_bytes() for file in files}) > 1


def test_the_single_file_wins_over_a_stale_index(tmp_path):
    """As in transformers, for a folder that held shards before it got a single file."""
    save_pretrained(tiny(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="gone.safetensors not found"):
        from_pretrained(tmp_path)


def test_other_dtypes_are_refused_and_mixtures_must_be_told_what_to_become(tmp_path):
    """An integer or fp8 matrix would fail in the middle of a forward pass."""
    save_pretrained(tiny(), tmp_path)
    for dtype, message in (
        (torch.int32, "model.norm.weight"), (torch.float8_e4m3fn, "model.norm.weight"),
        (torch.bfloat16, "mixes bfloat16 and float32"),
    ):  # fmt: skip
        alter(tmp_path, lambda t, dtype=dtype: t.update({"model.norm.weight": torch.ones(48).to(dtype)}))
        with pytest.raises(UserError, match=message):
            from_pretrained(tmp_path)
    assert from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [(dict(rope_parameters=[1]), "list"), (dict(hidden_size="48"), "hidden_size='48'"),
     (dict(num_attention_heads=0), "num_attention_heads=0"), (dict(num_hidden_layers=10**9), "num_hidden_layers="),
     (dict(rope_parameters=None, rope_theta="big"), "big")],
)  # fmt: skip
def test_a_damaged_config_is_one_line_that_names_the_file(tmp_path, change, message):
    """Text instead of a number, a list instead of an object, a number that is far too large."""
    save_pretrained(tiny(), tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for text, named in ((json.dumps(good | change), message), ("[]", ""), ("", ""), ('{"a":' * 10**5, "")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json is damaged.*{named}"):
            from_pretrained(tmp_path)


def alter(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [(lambda t: t.pop("model.norm.weight"), r"Missing key.*norm\.weight"),
     (lambda t: t.update(extra=torch.zeros(2)), "Unexpected key.*extra"),
     (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"norm\.weight.*\[7\].*\[48\]"),
     (lambda t: t.update({"lm_head.weight": torch.zeros(512, 48)}), r"Unexpected key.*lm_head\.weight")],
)  # fmt: skip
def test_a_directory_with_other_tensors_is_refused(hf_directory, change, message):
    """transformers only warns, and uses random weights for a missing tensor, the worst kind of silent failure."""
    alter(hf_directory, change)
    with pytest.raises(UserError, match=message):
        load(hf_directory)


def test_damage_is_named(hf_directory):
    """The error names the file that is cut short, altered or missing."""
    save_pretrained(load(hf_directory)[0], hf_directory)
    good = (hf_directory / "model.safetensors").read_bytes()
    flipped = good[:-100] + bytes([good[-100] ^ 1]) + good[-99:]
    for name, data, message in (
        ("model.safetensors", good[: len(good) // 2], "model.safetensors is damaged"),
        ("model.safetensors", flipped, "model.safetensors has been altered"),
        ("model.safetensors", good, None),
        ("tokenizer.json", b"{}", "tokenizer.json is damaged"),
        ("tokenizer.json", None, "tokenizer.json not found"),
    ):
        (hf_directory / name).unlink() if data is None else (hf_directory / name).write_bytes(data)
        with pytest.raises(UserError, match=message) if message else nullcontext():
            load(hf_directory)


def test_a_tokenizer_of_another_run_is_refused(hf_directory):
    """By its size and, if the run stored its hash, by its content, so that the same size does not hide it."""
    train_bpe([TEXT, "zq" * 999], 512).save(str(hf_directory / "other.json"))
    model, _ = load(hf_directory)
    save_pretrained(model, hf_directory, {"tokenizer_sha256": file_sha256(hf_directory / "tokenizer.json")})
    load(hf_directory)
    (hf_directory / "other.json").replace(hf_directory / "tokenizer.json")
    with pytest.raises(UserError, match="not the one this model was trained with"):
        load(hf_directory)
    train_bpe([TEXT], 513).save(str(hf_directory / "tokenizer.json"))
    with pytest.raises(UserError, match="513 tokens, the model 512"):
        load(hf_directory)


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def stopped(tmp_path):
    """Return a model and its optimizers after one step, and save them in state.pt."""
    model = tiny().train()
    optimizers = make_optimizers(model, "muon", 0.01, 0.1, (0.9, 0.95))
    model(*torch.randint(512, (2, 2, 20)))[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    checkpoint.save_state(tmp_path / "state.pt", model, optimizers, NO_SCALER, {"step": 1}, dict(max_iters=50), {})
    return model, optimizers


def test_a_state_comes_back_to_the_last_bit(tmp_path, stopped):
    """Model and moments are restored into new optimizers, which keep their own learning rate."""
    state = checkpoint.load_state(tmp_path / "state.pt")
    assert state["config"] == stopped[0].config and state["progress"] == {"step": 1}
    assert state["settings"] == dict(max_iters=50)
    model = tiny()
    optimizers = make_optimizers(model, "muon", 0.5, 0.1, (0.9, 0.95))
    checkpoint.restore(state, tmp_path / "state.pt", model, optimizers, NO_SCALER)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stopped[0].parameters()))
    for new, old in zip(optimizers, stopped[1], strict=True):
        assert all(group["lr"] == 0.5 for group in new.param_groups) and len(new.state) == len(old.state) > 0
        for a, b in zip(new.state.values(), old.state.values()):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "change", [lambda m: m["exp_avg"].fill_(float("inf")), lambda m: m.update(exp_avg=torch.ones(3))]
)
def test_a_state_with_damaged_moments_is_refused(tmp_path, stopped, change):
    """Moments that are not finite or have another shape end in one UserError, whose advice overwrites nothing.
    test_train.py has all other kinds of damage."""
    state, bad = torch.load(tmp_path / "state.pt", weights_only=True), tmp_path / "bad.pt"
    change(state["optimizers"][1]["state"][0])
    torch.save(state, bad)
    with pytest.raises(UserError, match="bad.pt is damaged.*--out_dir=out/new"):
        checkpoint.restore(checkpoint.load_state(bad), bad, *stopped, NO_SCALER)


@pytest.mark.slow
def test_a_missing_model_is_an_error_with_the_command_that_makes_one(tmp_path):
    """No fallback to random weights or to a hub."""
    for argument, named in (("--model=out/nothing", "python train.py"), ("--seed=1", "python train.py"),
                            ("--model=someone/nothing", "hf download")):  # fmt: skip
        done = run_script("sample.py", argument, cwd=tmp_path)
        assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr


def test_an_atomic_file_is_the_old_one_or_the_new_one(tmp_path):
    """While it is written, and if writing fails, the old content stays and no temporary file is left behind."""
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(OSError, match="no room"), atomic(file) as temporary:
        temporary.write_text("half of")
        assert read_json(file) == {"a": 1}
        raise OSError("no room")
    assert read_json(file) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_a_folder_is_locked_for_one_process_and_released_by_its_death(tmp_path):
    """The operating system holds the lock, so kill -9 releases it. Negative control: another folder is free."""
    code = (
        "import sys, time; from pathlib import Path; from lib.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'in use'): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"), exclusive(tmp_path / "a", "in use"):
            pass
        with exclusive(tmp_path / "b", "in use"):
            holder.kill()
    with exclusive(tmp_path / "a", "in use"):
        pass
