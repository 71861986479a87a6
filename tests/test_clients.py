"""Clients that people deploy and fine-tune with, on a run of train.py: transformers' pipeline and Trainer, and peft."""

import shutil

from lib.files import read_json, write_json

import pytest
import torch
from conftest import run_script
from trained import copy_of_run

from checkpoint import load
from sample import generate

transformers = pytest.importorskip("transformers", reason="transformers is not installed (requirements.txt)")
pytestmark = pytest.mark.slow  # each of them needs a trained run

PROMPTS = ("EVANDER:\nI", "The", "12 ships", "\n")
NEW_TEXT = "".join(  # unlike the training text, and quickly learned
    f"{name}:\nWhat news {when}, and {n} ships {where}?\n\n"
    for n, name in enumerate(("MARA", "OLD TAM", "The Duke", "First Sailor", "BRINE", "Josse") * 8)
    for when, where in (("tonight", "in the harbour"), ("of the king", "beyond the reef"))
)


@pytest.fixture
def run(tmp_path):
    return copy_of_run(tmp_path / "run")


def ours(path, prompt: str, n: int) -> list[int]:
    model, tokenizer = load(path)
    return [int(step) for step in generate(model, tokenizer.encode(prompt).ids, n, temperature=0)]


def rows(path, size: int = 32) -> torch.Tensor:
    """Return NEW_TEXT in rows of `size` tokens, (rows, size): the clients fine-tune on it."""
    _, tokenizer = load(path)
    ids = torch.tensor(tokenizer.encode(NEW_TEXT).ids)
    return ids[: len(ids) // size * size].view(-1, size)


@torch.no_grad()
def loss_of(path, data) -> float:
    model, _ = load(path)
    return float(model(data[:, :-1], data[:, 1:])[1])


def test_pipeline_writes_the_same_text(run):
    """pipeline("text-generation", model=DIR), with no other setting, finds model and tokenizer, and its greedy text is
    sample.py's. Negative control: with another RoPE base in config.json it is not."""
    pipe = transformers.pipeline("text-generation", model=str(run), device="cpu")

    def differing(pipe):
        found = 0
        for prompt in PROMPTS:
            reply = pipe(prompt, max_new_tokens=24, do_sample=False, return_tensors=True)
            prompt_ids = load(run)[1].encode(prompt).ids
            ids = reply[0]["generated_token_ids"]
            assert ids[: len(prompt_ids)] == prompt_ids, "the prompt itself has other tokens"
            found += ids[len(prompt_ids) :] != ours(run, prompt, 24)
        return found

    assert differing(pipe) == 0
    text = pipe(PROMPTS[0], max_new_tokens=24, do_sample=False)[0]["generated_text"]
    assert text == PROMPTS[0] + load(run)[1].decode(ours(run, PROMPTS[0], 24))
    wrong = shutil.copytree(run, run.with_name("wrong"))
    config = read_json(wrong / "config.json")
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10.0
    write_json(wrong / "config.json", config)
    assert differing(transformers.pipeline("text-generation", model=str(wrong), device="cpu")) > 0


def test_lora_learns_and_merges_back(run):
    """peft: a LoRA on all projections lowers the loss on new text; load() reads the merged and saved model and gives
    peft's loss. The run itself has not changed."""
    peft = pytest.importorskip("peft", reason="peft is not installed (requirements-dev.txt)")
    data = rows(run)
    before = loss_of(run, data)
    hf = transformers.AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    model = peft.get_peft_model(hf, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 0.5 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for step in range(15):
        batch = data[8 * step % len(data) :][:8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    merged = run.with_name("merged")
    with torch.no_grad():
        theirs = float(model.eval()(input_ids=data, labels=data).loss)
    model.merge_and_unload().save_pretrained(merged)
    shutil.copy(run / "tokenizer.json", merged)
    after = loss_of(merged, data)
    assert after < before - 0.5, f"{before:.3f} -> {after:.3f}"
    assert after == pytest.approx(theirs, abs=1e-4)
    assert loss_of(run, data) == before


def test_trainer_output_is_a_run(run):
    """transformers' Trainer fine-tunes the run and saves model and tokenizer; sample.py runs the result as it is, with
    the text of the fine-tuned model, not of the run."""
    pytest.importorskip("accelerate", reason="accelerate is not installed (requirements-dev.txt)")
    data = rows(run)
    before = loss_of(run, data)
    tuned = run.with_name("tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    tokenizer.pad_token = tokenizer.eos_token  # a base model has none, and the Trainer's collator asks for one
    trainer = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32),
        args=transformers.TrainingArguments(
            output_dir=str(run.with_name("trainer")), max_steps=15, per_device_train_batch_size=8, learning_rate=5e-3,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        ),
        train_dataset=[dict(input_ids=row, labels=row) for row in data],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tuned))
    after = loss_of(tuned, data)
    assert after < before - 0.5, f"{before:.3f} -> {after:.3f}"
    texts = []
    for path in (run, tuned):
        done = run_script("sample.py", f"--model={path}", "--prompt=What", "--temperature=0", "--max_new_tokens=20")
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[1].startswith("What news") and texts[0] != texts[1]
