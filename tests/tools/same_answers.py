"""
Check that a chat model gives the same answers everywhere. Conversations of several turns are answered greedily in fp32
by chat.py, by the playground, by transformers' pipeline, and by llama.cpp's /v1/chat/completions from the exported GGUF
file. Each of them turns the messages into ids with its own code. Needs gguf, transformers and the xllamacpp wheel.

    python tests/tools/same_answers.py --model=out/chat_smollm2            # ten conversations, a few minutes

The questions are from data/chat/heldout.jsonl; the answers between them are the model's own. Exit code 0 if all agree.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from lib.settings import Count, UserError, override, run_main

import torch

import app
import export_gguf
from chat import Chat

ROOT = Path(__file__).parents[2]


@dataclass
class Settings:
    model: str = ""  # a model directory with a chat template
    conversations: Count = 10
    max_new_tokens: Count = 64  # per answer; most are shorter


def questions(count: int) -> list[tuple[str, list[str]]]:
    """Return (system message or "", the user's messages) of held-out conversations with two or more turns."""
    lines = (ROOT / "data" / "chat" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for messages in (json.loads(line)["messages"] for line in lines):
        texts = {role: [m["content"] for m in messages if m["role"] == role] for role in ("system", "user")}
        if len(texts["user"]) > 1:
            found.append(("".join(texts["system"]), texts["user"]))
    return found[:count]


class Clients:
    """One model in four programs. Each function in `answer` takes the messages so far and returns the next text."""

    def __init__(self, model: str, folder: str, length: int):
        """Load the model in all four; the GGUF file goes to `folder`."""
        from llamacpp import LlamaCpp
        from transformers import pipeline

        self.length = length
        self.chat = Chat(model, dtype=torch.float32)
        self.models = app.Models(model, "cpu", torch.float32)
        self.pipeline = pipeline("text-generation", model=model, dtype=torch.float32, device="cpu")
        self.llamacpp = LlamaCpp(export_gguf.export(model, "f32", folder), context=2048, threads=2)
        self.answer = {
            "chat.py": self.by_chat, "app.py": self.by_app, "transformers": self.by_transformers,
            "llama.cpp": self.by_llamacpp,
        }  # fmt: skip

    def by_chat(self, messages) -> str:
        if len(messages) < 3:  # a new conversation; otherwise the chat has cached its beginning
            self.chat.reset(messages[0]["content"] if messages[0]["role"] == "system" else "")
        return "".join(self.chat.answer(messages[-1]["content"], self.length, temperature=0.0))

    def by_app(self, messages) -> str:
        record, numbers = app.Record(), {name: default for name, (_, _, default, *_) in app.KNOBS.items()}
        numbers |= dict(temperature=0, max_new_tokens=self.length)
        for _ in app.write(self.models, record, next(iter(self.models.choices())), False, "", messages, **numbers):
            pass
        return record.text

    def by_transformers(self, messages) -> str:
        done = self.pipeline(messages, max_new_tokens=self.length, do_sample=False)
        return done[0]["generated_text"][-1]["content"]

    def by_llamacpp(self, messages) -> str:
        done = self.llamacpp.post("/v1/chat/completions", messages=messages, max_tokens=self.length, temperature=0)
        return done["choices"][0]["message"]["content"]


def compare(model: str, count: int, length: int) -> tuple[int, list[str]]:
    """Return the number of answers compared, and a line for each that differs from chat.py's."""
    with tempfile.TemporaryDirectory() as folder:
        clients, compared, different = Clients(model, folder, length), 0, []
        for system, asked in questions(count):
            messages = [dict(role="system", content=system)] if system else []
            for question in asked:
                messages.append(dict(role="user", content=question))
                answers = {name: answer(messages) for name, answer in clients.answer.items()}
                ours = answers.pop("chat.py")
                compared += len(answers)
                others = [(name, text) for name, text in answers.items() if text != ours]
                different += [f"{name}: {question!r} -> {text!r}, chat.py: {ours!r}" for name, text in others]
                messages.append(dict(role="assistant", content=ours))
        return compared, different


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    if not s.model:
        raise UserError("--model is missing. It takes a model directory with a chat template.")
    compared, different = compare(s.model, s.conversations, s.max_new_tokens)
    print("\n".join(different) or f"all {compared} answers are those of chat.py")
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
