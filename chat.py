"""
A chat in the terminal, with any model that has a chat template.

    python chat.py                                              # the newest run under out/ that can chat
    python chat.py --model=out/SmolLM2-135M-Instruct --system="You are a ferryman."

    from chat import Chat
    chat = Chat("out/SmolLM2-135M-Instruct")
    for piece in chat.answer("Why is the sky blue?"): print(piece, end="")
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lib.conversations import Template, read_chat_template, start_renderer
from lib.device import pick_device, pick_dtype, prepare_process
from lib.settings import Count, Seed, is_text, override, run_main

from checkpoint import find, load, newest_run
from model import KVCache
from sample import Penalty, Temperature, TopP, generate, stream_text


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest under out/ that can chat
    system: str = ""  # a system message at the beginning; empty: what the model's template has
    max_new_tokens: Count = 512  # at most this many tokens an answer
    temperature: Temperature = 0.2  # as SmolLM2-Instruct's authors advise, with top_p=0.9; 0 takes the likeliest token
    top_p: TopP | None = 0.9  # choose among the fewest tokens that hold this much of the probability
    repetition_penalty: Penalty = 1.0  # above 1 makes tokens that have occurred less likely
    seed: Seed = 1337  # of the first answer; each answer takes the next
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is what the file holds
    quantize: Literal["", "int8"] = ""  # int8: weights of one byte each


# ----------------------------------------------------------------------------------------------------------------------
# a chat


class Chat:
    """A conversation with a model, which keeps what the model has read: for the next turn only what is new is read."""

    def __init__(self, path, system: str = "", device="cpu", dtype=None, quantize: str = ""):
        self.model, self.tokenizer = load(path, device, dtype, quantize)
        self.template = Template.of(find(path), self.tokenizer)
        self.template.renderer = start_renderer()
        self.reset(system)

    def reset(self, system: str = ""):
        """Begin anew, with a system message or the template's own."""
        self.messages = [dict(role="system", content=system)] if system else []
        self.left_out = 0  # messages that the context has no room for any more
        self.cache, self.read = KVCache(self.model.config, 1, self.model.device, self.model.dtype), []

    def undo(self):
        """Forget the last question and its answer."""
        self.left_out = 0
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                return

    def answer(self, question: str, max_new_tokens: int = 512, **sampling) -> Iterator[str]:
        """The answer, piece by piece as sample.stream_text gives it. What was said when the iterator is closed, or by
        Ctrl-C, stays as the answer."""
        context, before = self.model.config.max_position_embeddings, self.messages
        self.messages = [*before, dict(role="user", content=question)]
        try:
            room = min(max_new_tokens, context // 4)
            ids, self.left_out = self.template.fit(self.messages, context, room, self.left_out)
        except BaseException:
            self.messages = before
            raise
        known = len(os.path.commonprefix([self.read, ids])) if len(ids) <= context else 0
        self.read = self.read[:known]  # until the rest is read
        new, text = [], ""

        def noted(steps):
            for step in steps:
                new.append(int(step))
                yield step

        steps = generate(self.model, ids, max_new_tokens, cache=self.cache, cached=known, **sampling)
        try:
            for piece in stream_text(self.tokenizer, noted(steps)):
                text += piece
                yield piece
        finally:
            self.messages.append(dict(role="assistant", content=text))
            if new:
                self.read = ids + new[:-1]  # the last token was chosen, and not read
            if len(self.read) >= context:  # generate() has begun the cache anew, or was about to
                self.read = []
            self.template.renderer = start_renderer()  # ready when the next question comes


# ----------------------------------------------------------------------------------------------------------------------
# the command

HELP = "/reset: start over; /system TEXT: with that system message; /undo: forget the last turn; Ctrl-D: quit"


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    prepare_process()
    sys.stdin.reconfigure(errors="surrogateescape")
    path = s.model or newest_run(wanted=read_chat_template)
    chat = Chat(path, s.system, pick_device(s.device), pick_dtype(s.dtype), s.quantize)
    print(f"{path}: {HELP}; Ctrl-C ends an answer", file=sys.stderr)
    turn = 0
    while True:
        # a question, or a command
        try:
            question = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the chat)", file=sys.stderr)
            continue
        if not is_text(question):
            print("that is not UTF-8 text", file=sys.stderr)
            continue
        command, _, rest = question.partition(" ")
        if command in ("/reset", "/system"):
            chat.reset(rest.strip() if command == "/system" else s.system)
        elif command == "/undo":
            chat.undo()
        elif command.startswith("/") or not question:
            print(HELP, file=sys.stderr)
        else:
            # the answer, as it comes
            sampling = dict(temperature=s.temperature, top_p=s.top_p, repetition_penalty=s.repetition_penalty)
            try:
                for piece in chat.answer(question, s.max_new_tokens, seed=(s.seed + turn) % 2**63, **sampling):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" ...", end="")
            print()
            turn += 1


if __name__ == "__main__":
    run_main(main)
