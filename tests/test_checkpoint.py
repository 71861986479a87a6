"""checkpoint.py and files.py: all that can be wrong with a model directory, and files that are whole or not there."""

import json
import os
import subprocess
import sys

from lib.files import atomic, exclusive, file_sha256, read_json, write_json
from lib.settings import UserError

import pytest
import torch
from conftest import ROOT, TEXT, run_script, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import from_pretrained, load, save_pretrained
from prepare import train_bpe


def test_saved_and_loaded_is_bit_equal(tmp_path):
    """Config and logits, tied and untied; loaded as bf16, the tables of RoPE stay fp32."""
    for tied in (True, False):
        model = tiny(tie_word_embeddings=tied)
        save_pretrained(model, tmp_path)
        again = from_pretrained(tmp_path)
        ids = torch.randint(0, 512, (2, 20))
        assert again.config == model.config and torch.equal(again(ids)[0], model(ids)[0])
        half = from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.rotary.cos.dtype == torch.float32


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of a file")
def test_a_full_disk_is_an_oserror_and_leaves_the_old_weights(tmp_path):
    """safetensors reports a full disk as an error class of its own; callers must be able to catch OSError. The kernel
    ends a write at a file's size limit as it does where the disk ends."""
    import resource

    model = tiny()
    save_pretrained(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.norm.weight += 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError):
            save_pretrained(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not [f for f in os.listdir(tmp_path) if "tmp" in f]


def test_equal_models_are_equal_files_with_the_rights_of_others(tmp_path):
    """The safetensors library writes the header's keys in an order that changes from one write to the next, and makes
    the file readable to its owner alone; it must still read ours. Negative control: its own eight files differ."""
    for i in range(8):
        save_pretrained(tiny(), tmp_path / str(i), dict(step="3", val_loss="1.5", note="naïve ☃"))
    files = [tmp_path / str(i) / "model.safetensors" for i in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    assert checkpoint.metadata(tmp_path / "0")["note"] == "naïve ☃"
    assert files[0].stat().st_mode == (tmp_path / "0/config.json").stat().st_mode
    with safe_open(files[0], framework="pt") as f:
        assert torch.equal(f.get_tensor("model.norm.weight"), tiny().norm.weight)
    for file in files:
        save_file(load_file(file), file, checkpoint.metadata(file.parent))
    assert len({file.read_bytes() for file in files}) > 1


def test_the_single_file_wins_over_a_stale_index(tmp_path):
    """As in transformers: a folder that once held shards, and then got one file."""
    save_pretrained(tiny(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="gone.safetensors not found"):
        from_pretrained(tmp_path)
    for index, message in (
        ("[]", "index.json is damaged"),
        ("{}", "weight_map"),
        ('{"weight_map": {"x": "../y.safetensors"}}', "in another folder"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=message):
            from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.float64])
def test_numbers_of_another_kind_are_refused(tmp_path, dtype):
    """An integer or fp8 matrix would fail in the middle of a forward pass; a mixture must be told what to become."""
    save_pretrained(tiny(), tmp_path)
    alter(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with pytest.raises(UserError, match="model.norm.weight is of another type"):
        from_pretrained(tmp_path)
    alter(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.bfloat16)}))
    with pytest.raises(UserError, match="mixes bfloat16 and float32"):
        from_pretrained(tmp_path)
    assert from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rope_parameters=[1]), r"rope_parameters=\[1\]"),
        (dict(hidden_size="48"), "hidden_size|damaged"),
        (dict(num_attention_heads=0), "damaged|num_attention_heads"),
        (dict(rope_parameters=None, rope_theta="big"), "damaged"),
    ],
)
def test_a_damaged_config_is_one_line_that_names_the_file(tmp_path, change, message):
    """Text for a number, a list for an object: whatever it is, a UserError that names config.json."""
    save_pretrained(tiny(), tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=message) as refused:
        from_pretrained(tmp_path)
    assert "config.json" in str(refused.value)
    for text in ("[]", "3", "", "{" * 10**5, '{"a":' * 10**5):
        file.write_text(text)
        with pytest.raises(UserError, match="config.json is damaged"):
            from_pretrained(tmp_path)


def alter(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is not part of this model"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"has shape \[7\], expected \[48\]"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(512, 48)}), "a different matrix"),
    ],
)
def test_a_directory_with_other_tensors_is_refused(hf_directory, change, message):
    """transformers only warns; random weights in place of a missing tensor are the worst of the silent failures."""
    alter(hf_directory, change)
    with pytest.raises(UserError, match=message):
        load(hf_directory)


def test_a_tied_head_written_twice_is_accepted_if_it_is_the_same(hf_directory):
    alter(hf_directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load(hf_directory)


def test_damage_is_named(hf_directory, tmp_path):
    """Cut short, altered, missing: each file by name, each time with a way out."""
    model, _ = load(hf_directory)
    save_pretrained(model, hf_directory)
    file = hf_directory / "model.safetensors"
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    for bad, message in ((good[: len(good) // 2], "is damaged"), (bytes(flipped), "has been altered")):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=message):
            load(hf_directory)
    file.write_bytes(good)
    load(hf_directory)
    (hf_directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load(hf_directory)
    (hf_directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json not found"):
        load(hf_directory)
    (hf_directory / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(UserError, match="config.json is damaged"):
        from_pretrained(hf_directory)


def test_a_tokenizer_of_another_run_is_refused(hf_directory):
    """By size, and, where the run left its hash, by content: same size and another order of merges is enough."""
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


@pytest.mark.slow
def test_what_is_not_there_is_said_with_the_command_that_makes_it(tmp_path):
    """No fallback to random weights or to a hub: a missing directory is an error of one line."""
    for arguments in (["--model=out/nothing"], [], ["--model=./x"]):
        (tmp_path / "out").mkdir(exist_ok=True)
        done = run_script("sample.py", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and "python train.py" in done.stderr and "Traceback" not in done.stderr
    done = run_script("sample.py", "--model=someone/nothing", cwd=tmp_path)
    assert done.returncode == 1 and "huggingface.co" in done.stderr and "Traceback" not in done.stderr


def test_the_written_config_is_read_alike_by_both_generations_of_transformers(hf_directory):
    """transformers 4 wants rope_theta and torch_dtype, 5 rope_parameters and dtype; each silently falls back."""
    model, _ = load(hf_directory)
    save_pretrained(model, hf_directory)
    written = json.loads((hf_directory / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 100000.0
    assert written["dtype"] == written["torch_dtype"] == "float32"
    for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings", "head_dim", "num_key_value_heads"):
        assert key in written


def test_an_atomic_file_is_the_old_one_or_the_new_one(tmp_path):
    """While it is written, and where writing fails, the old content stays and no temporary file is left behind."""
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(OSError, match="no room"), atomic(file) as temporary:
        temporary.write_text("half of")
        assert read_json(file) == {"a": 1}
        raise OSError("no room")
    assert read_json(file) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]
    with atomic(file) as temporary:
        temporary.write_text('{"a": 2}')
    assert read_json(file) == {"a": 2} and os.listdir(tmp_path) == ["x.json"]


def test_a_folder_is_locked_for_one_process_and_released_by_its_death(tmp_path):
    """The lock is the operating system's: kill -9 releases it. Negative control: another folder is free."""
    code = (
        "import sys, time; from pathlib import Path; from lib.files import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'in use'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is in use by another process"), exclusive(tmp_path / "a", "in use"):
        pass
    with exclusive(tmp_path / "b", "in use"):
        pass
    holder.kill()
    holder.wait()
    with exclusive(tmp_path / "a", "in use"):
        pass
