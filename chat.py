"""
Conversations: a model's chat template, the ids and the loss mask of a conversation, and a chat in the terminal.

    python chat.py                                              # the newest run under out/ that can chat
    python chat.py --model=out/SmolLM2-135M-Instruct --system="You are a ferryman."

    from chat import Chat
    chat = Chat("out/SmolLM2-135M-Instruct")
    for piece in chat.answer("Why is the sky blue?"): print(piece, end="")

A conversation is a list of {"role": "system", "user" or "assistant", "content": text}. The template that came with the
model (Jinja, in chat_template.jinja or tokenizer_config.json) writes it as one text; what it puts around the messages
may be special tokens, what the messages contain is always text, whatever it spells.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from checkpoint import find, load, newest_run
from config import Count, Seed, UserError, guard, is_text, override
from device import keep_freed_memory, pick_device, pick_dtype
from files import damage_named, read_json
from model import KVCache
from sample import Heat, Penalty, TopP, generate, stream_text

ROLES = "system", "user", "assistant"
# for a model of one's own that has no template: ChatML, as SmolLM2-Instruct has it, without its default system message
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest under out/ that can chat
    system: str = ""  # a system message at the beginning; empty: what the model's template has
    max_new_tokens: Count = 512  # at most this many tokens an answer
    temperature: Heat = 0.2  # what SmolLM2-Instruct's authors advise, with top_p=0.9; 0 takes the likeliest token
    top_p: TopP | None = 0.9  # choose among the fewest tokens that hold this much of the probability
    repetition_penalty: Penalty = 1.0  # above 1 makes tokens that have occurred less likely
    seed: Seed = 1337  # of the first answer; each answer takes the next
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is what the file holds
    quantize: Literal["", "int8"] = ""  # int8: weights of one byte each


# ----------------------------------------------------------------------------------------------------------------------
# the template


def read_chat_template(path: Path) -> str | None:
    """The Jinja chat template of a model directory, from either of the two places; None for a base model."""
    files = path / "chat_template.jinja", path / "tokenizer_config.json"
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    with damage_named(file):
        template = read_json(file).get("chat_template") if file.suffix == ".json" else file.read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not (isinstance(template, str) and is_text(template)):
            raise ValueError("chat_template is no text")
        return template


TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 1 << 29  # what rendering may take
RENDER = """
import json, sys
given = sys.stdin.read()
template, conversations, seconds, size = json.loads(given)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except (ImportError, ValueError, OSError):  # Windows has no such limits, and macOS not the second
    pass
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.ext import Extension
class Generation(Extension):  # what transformers has to mark an answer: here it marks nothing
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)
def raise_exception(message): raise ValueError(message)
extensions = ["jinja2.ext.loopcontrols", Generation]
options = dict(trim_blocks=True, lstrip_blocks=True, extensions=extensions)  # as in transformers
environment = ImmutableSandboxedEnvironment(**options)
environment.globals["raise_exception"] = raise_exception
compiled = environment.from_string(template)
texts = [compiled.render(values) for values in conversations]
if sum(map(len, texts)) > 500_000 + 10 * len(given):
    raise OverflowError("many times the text that was put in")
json.dump(texts, sys.stdout)
"""


def render(template: str, conversations: list[dict]) -> list[str]:
    """The text that a Jinja template writes with each of these sets of values, which are what JSON can hold. UserError
    where it fails.

    A template comes with a model, from anyone. Jinja's sandbox keeps it from the machine, but not from looping for ever
    or filling the memory, so it is rendered in a process of its own, whose time and memory are bounded.
    """
    if len(template) > 1_000_000:
        raise UserError(f"the chat template has {len(template):,} characters; a million is the most.")
    given = json.dumps([template, conversations, TEMPLATE_SECONDS, TEMPLATE_BYTES])
    options = dict(input=given, capture_output=True, text=True, encoding="utf-8", timeout=TEMPLATE_SECONDS)
    try:
        done = subprocess.run([sys.executable, "-P", "-c", RENDER], **options)
    except subprocess.TimeoutExpired:
        raise UserError(f"the chat template was not rendered within {TEMPLATE_SECONDS} seconds.") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it was ended with exit code {done.returncode}"])[-1][:200]
        raise UserError(f"the chat template cannot be rendered ({reason}).")
    return json.loads(done.stdout)


class Template:
    """A chat template with the tokenizer whose special tokens it writes.

    encode() gives the ids that transformers' apply_chat_template gives, but for messages that spell a special token:
    there a message of the user could end its turn and begin another, here it stays text.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, settings: dict):
        """settings: the model's tokenizer_config.json, for bos_token, eos_token and the like."""
        self.text, self.tokenizer = text, tokenizer
        named = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
        self.values = {k: v for k, v in named.items() if isinstance(v, str)}
        self.special = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self.split = re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) + ")")

    @classmethod
    def of(cls, path: Path, tokenizer: Tokenizer) -> "Template":
        """That of a model directory. UserError where the model has none."""
        text = read_chat_template(path)
        if text is None:
            raise UserError(
                f"{path} has no chat template: it continues text, as sample.py shows. Chat with an -Instruct model, or "
                "tune one: python train.py config/chat_smollm2.py"
            )
        file = path / "tokenizer_config.json"
        return cls(text, tokenizer, read_json(file) if file.is_file() else {})

    def encode(self, conversations: list[list[dict]], answer: bool = False) -> list[tuple[list[int], list[int]]]:
        """(ids, learnt) of each conversation; learnt[i] is 1 where ids[i] belongs to what the assistant says, or is the
        special token that ends it. answer: the next turn is the assistant's, so its beginning is written, too.

        A mark stands for each message while the template is rendered, so what it adds is known; then the messages are
        put in place of the marks. UserError where the template does more to a message than to strip it.
        """
        marked = [[m | {"content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)] for messages in conversations]
        both = [self.values | dict(messages=m, add_generation_prompt=answer) for m in (*marked, *conversations)]
        texts = render(self.text, both)
        n = len(conversations)
        return [self.encode_one(*three) for three in zip(conversations, texts[:n], texts[n:])]

    def encode_one(self, messages: list[dict], skeleton: str, whole: str) -> tuple[list[int], list[int]]:
        parts = re.split("\ue000(\\d+)\ue001", skeleton)  # template, number, template, number, ..., template
        contents = [m["content"] for m in messages]
        order = [int(i) for i in parts[1::2]]
        for said in (contents, [c.strip() for c in contents]):
            filled = [part if k % 2 == 0 else said[int(part)] for k, part in enumerate(parts)]
            if "".join(filled) == whole and order == list(range(len(messages))):
                break
        else:
            raise UserError("the chat template changes what the messages say, so what is to be learnt is not known.")

        ids, learnt = [], []
        text, answers = "", []  # since the last special token, and where the assistant speaks in it

        def end_of_text():
            nonlocal text, answers
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ids.extend(encoding.ids)
            learnt.extend(int(any(a <= start < b for a, b in answers)) for start, _ in encoding.offsets)
            text, answers = "", []

        for k, part in enumerate(filled):
            if k % 2:
                if messages[k // 2]["role"] == "assistant":
                    answers.append((len(text), len(text) + len(part)))
                text += part
                continue
            for piece in self.split.split(part):
                if piece in self.special:
                    ends_answer = bool(answers) and answers[-1][1] == len(text)
                    end_of_text()
                    ids.append(self.special[piece])
                    learnt.append(int(ends_answer))
                else:
                    text += piece
        end_of_text()
        return ids, learnt


def template_for(name: str, tokenizer: Tokenizer) -> Template:
    """The template of the model directory or hub id that a tokenizer comes from; ChatML where there is none."""
    file = Path(name).is_file()
    folder = Path(name).parent if file else Path(name) if Path(name).is_dir() or name in ("bpe", "gpt2") else find(name)
    text = read_chat_template(folder)
    if text is None:
        return Template(CHATML, tokenizer, {})
    return Template.of(folder, tokenizer)


def messages_of(row) -> list[dict]:
    """The messages of a line of data: [{"role", "content"}, ...]. From {"messages": [...]} as they are, from
    {"prompt": text, "completion": text}, or from ShareGPT's {"conversations": [{"from", "value"}, ...]}. UserError says
    what is wrong with it."""
    if not isinstance(row, dict):
        raise UserError("expected a JSON object")
    if "messages" in row:
        messages = row["messages"]
    elif "completion" in row:
        messages = [dict(role="user", content=row.get("prompt")), dict(role="assistant", content=row["completion"])]
    else:
        names = dict(human="user", gpt="assistant")
        messages = [
            dict(role=names.get(m.get("from"), m.get("from")), content=m.get("value")) for m in row["conversations"]
        ]
    if not isinstance(messages, list) or not messages:
        raise UserError("expected a list of messages")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"message {i} is not an object with a role and a content of text")
        if message.get("role") not in ROLES:
            raise UserError(f"message {i} has the role {message.get('role')!r}, expected {', '.join(ROLES)}")
        if message["role"] == "system" and i > 1:
            raise UserError(f"message {i} is a system message: it can only be the first")
        if not is_text(message["content"]):
            raise UserError(f"message {i} holds what UTF-8 cannot")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise UserError("the assistant says nothing, so there is nothing to learn")
    return [dict(role=m["role"], content=m["content"]) for m in messages]


# ----------------------------------------------------------------------------------------------------------------------
# a chat


class Chat:
    """A conversation with a model, which keeps what the model has read: for the next turn only what is new is read."""

    def __init__(self, path, system: str = "", device="cpu", dtype=None, quantize: str = ""):
        self.model, self.tokenizer = load(path, device, dtype, quantize)
        self.template = Template.of(find(path), self.tokenizer)
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

    def fit(self, room: int) -> list[int]:
        """The ids of the conversation, up to where the assistant is to speak. Where they leave less than `room`
        positions of the context, the oldest question and answer are left out, and the next, but never the last."""
        messages, first = list(self.messages), int(self.messages[0]["role"] == "system")
        del messages[first : first + self.left_out]
        while True:
            ids, _ = self.template.encode([messages], answer=True)[0]
            if len(ids) + room <= self.model.config.max_position_embeddings or len(messages) - first <= 1:
                return ids
            del messages[first : first + 2]
            self.left_out += 2

    def answer(self, question: str, max_new_tokens: int = 512, **sampling) -> Iterator[str]:
        """The answer, piece by piece as sample.stream_text gives it. What was said when the iterator is closed, or by
        Ctrl-C, stays as the answer."""
        context, before = self.model.config.max_position_embeddings, self.messages
        self.messages = [*before, dict(role="user", content=question)]
        try:
            ids = self.fit(min(max_new_tokens, context // 4))
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


# ----------------------------------------------------------------------------------------------------------------------
# the command

HELP = "/reset: start over; /system TEXT: with that system message; /undo: forget the last turn; Ctrl-D: quit"


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    keep_freed_memory()
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
    guard(main)
