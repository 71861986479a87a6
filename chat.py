"""
Chats in the terminal with any model that has a chat template.

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

from lib.conversations import Template, read_chat_template
from lib.device import pick_device, pick_dtype, prepare_process
from lib.settings import Count, Seed, override, run_main

from checkpoint import find, load, newest_run
from model import KVCache
from sample import Penalty, Temperature, TopP, generate, stream_text


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest under out/ that can chat
    system: str = ""  # the system message; empty: the one in the model's template, if any
    max_new_tokens: Count = 512  # at most this many tokens per answer
    temperature: Temperature = 0.2  # with top_p=0.9 what SmolLM2-Instruct's authors advise; 0 takes the likeliest token
    top_p: TopP | None = 0.9  # sample from the fewest tokens that hold this much of the probability
    repetition_penalty: Penalty = 1.0  # above 1: tokens that have occurred become less likely
    seed: Seed = 1337  # of the first answer; each further answer takes the next one
    device: str = "auto"  # cuda, mps or cpu; auto takes the first that is available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as in the model's file
    quantize: Literal["", "int8"] = ""  # int8: one byte per weight


class Chat:
    """A conversation with a model. It keeps its KV cache, so each turn processes only the new tokens."""

    def __init__(self, path, system: str = "", device="cpu", dtype=None, quantize: str = ""):
        self.model, self.tokenizer = load(path, device, dtype, quantize)
        self.template = Template.of(find(path), self.tokenizer)
        self.reset(system)

    def reset(self, system: str = ""):
        """Start over, with this system message or the template's own."""
        self.messages = [dict(role="system", content=system)] if system else []
        self.left_out = 0  # messages that no longer fit into the context
        self.cache, self.cached_ids = KVCache(self.model.config, 1, self.model.device, self.model.dtype), []

    def undo(self):
        """Forget the last question and its answer."""
        self.left_out = 0
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                return

    def answer(self, question: str, max_new_tokens: int = 512, **sampling) -> Iterator[str]:
        """Yield the answer piece by piece, as sample.stream_text does. What has come when the iterator is closed, or
        when Ctrl-C interrupts it, stays in the conversation as the answer."""
        context = self.model.config.max_position_embeddings
        messages = [*self.messages, dict(role="user", content=question)]
        ids, self.left_out = self.template.fit(messages, context, min(max_new_tokens, context // 4), self.left_out)
        self.messages = messages
        cached = len(os.path.commonprefix([self.cached_ids, ids])) if len(ids) <= context else 0
        self.cached_ids = ids[:cached]  # the rest counts once it has been processed
        new, text = [], ""
        steps = generate(self.model, ids, max_new_tokens, cache=self.cache, cached=cached, **sampling)
        try:
            for piece in stream_text(self.tokenizer, (new.append(int(token)) or token for token in steps)):
                text += piece
                yield piece
        finally:
            self.messages.append(dict(role="assistant", content=text))
            processed = ids + new[:-1] if new else self.cached_ids  # the last token was chosen, but not processed
            self.cached_ids = processed if len(processed) < context else []  # generate() restarts a full cache


HELP = "/reset: start over; /system TEXT: with this system message; /undo: forget the last turn; Ctrl-D: quit"


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    prepare_process()
    sys.stdin.reconfigure(errors="replace")
    path = s.model or newest_run(wanted=read_chat_template)
    chat = Chat(path, s.system, pick_device(s.device), pick_dtype(s.dtype), s.quantize)
    sampling = dict(temperature=s.temperature, top_p=s.top_p, repetition_penalty=s.repetition_penalty)
    print(f"{path}: {HELP}; Ctrl-C: stop an answer", file=sys.stderr)
    while True:
        # a question, or a command
        try:
            question = input("\n> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            question = ""  # prints the help
        command, _, rest = question.partition(" ")
        if command in ("/reset", "/system"):
            chat.reset(rest.strip() if command == "/system" else s.system)
        elif command == "/undo":
            chat.undo()
        elif command.startswith("/") or not question:
            print(f"\n{HELP}", file=sys.stderr)
        else:
            # the answer, as it comes
            try:
                for piece in chat.answer(question, s.max_new_tokens, seed=s.seed, **sampling):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                print(" ...", end="")
            print()
            s.seed = (s.seed + 1) % 2**63


if __name__ == "__main__":
    run_main(main)
