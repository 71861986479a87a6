"""
Conversations: a model's chat template, and the ids and the loss mask of a conversation.

    from lib.conversations import Template, messages_of
    template = Template.of(Path("out/SmolLM2-135M-Instruct"), tokenizer)
    ids, loss_mask = template.encode([messages])[0]

A conversation is a list of {"role": "system", "user" or "assistant", "content": text}. The template that comes with a
model (Jinja, in chat_template.jinja or tokenizer_config.json) writes it as one text. What the template puts around the
messages may be special tokens; what the messages contain is always encoded as text, whatever it spells.
"""

import json
import re
from bisect import bisect_left
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from lib.files import first_line, read_errors_as_user_error, read_json
from lib.settings import UserError, is_text

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ROLES = "system", "user", "assistant"
# For models without a template: ChatML, as in SmolLM2-Instruct, without its default system message.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def check_messages(messages) -> list[dict]:
    """Return the messages, each with its role and content only. UserError names the first message that is wrong."""
    if not isinstance(messages, list) or not messages:
        raise UserError("expected a list of messages")
    for i, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or not is_text(content):
            raise UserError(f"message {i} is not an object with a role and a content of text")
        if message.get("role") not in ROLES:
            raise UserError(f"message {i} has the role {message.get('role')!r}, expected {', '.join(ROLES)}")
        if message["role"] == "system" and i > 1:
            raise UserError(f"message {i} is a system message; only the first message can be one")
    return [dict(role=m["role"], content=m["content"]) for m in messages]


def messages_of(row) -> list[dict]:
    """Return the messages of a row of data: of {"messages": [...]} as they are, of {"prompt": text, "completion":
    text}, or of ShareGPT's {"conversations": [{"from", "value"}, ...]}. UserError says what is wrong with the row;
    KeyError or TypeError if it is none of these."""
    if "messages" in row:
        messages = row["messages"]
    elif "completion" in row:
        messages = [dict(role="user", content=row.get("prompt")), dict(role="assistant", content=row["completion"])]
    else:
        roles = dict(human="user", gpt="assistant")
        messages = [dict(role=roles.get(t["from"], t["from"]), content=t["value"]) for t in row["conversations"]]
    messages = check_messages(messages)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise UserError("the assistant says nothing, so there is nothing to train on")
    return messages


def read_chat_template(path: Path) -> str | None:
    """Return the chat template of a model directory, from either of the two files, or None for a base model."""
    files = path / "chat_template.jinja", path / "tokenizer_config.json"
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    with read_errors_as_user_error(file):
        template = read_json(file).get("chat_template") if file.suffix == ".json" else file.read_text(encoding="utf-8")
        if isinstance(template, list):  # several named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not (isinstance(template, str) and is_text(template)):
            raise ValueError("chat_template is not text")
        return template


class Generation(Extension):
    """Accepts {% generation %}, with which transformers marks an answer, and writes what is inside."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """A template's namespace(), which refuses names such as __call__: Python gives those a meaning."""

    def __init__(self, /, **values):
        super().__init__()
        for name in values:
            self[name] = values[name]

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name}")
        super().__setitem__(name, value)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


@lru_cache
def compile_template(text: str) -> jinja2.Template:
    """Compile a template in Jinja's sandbox, with the options, functions and filters that transformers gives it. A
    template comes with a model, from anyone: the sandbox keeps it from files, processes and Python's internals."""
    options = dict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment = ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    strftime_now = lambda format: datetime.now().strftime(format)
    environment.globals |= dict(raise_exception=raise_exception, strftime_now=strftime_now, namespace=Namespace)
    return environment.from_string(text)


def render(template: str, conversations: list[dict]) -> list[str]:
    """Render a Jinja template once with each of these sets of values. UserError if it fails."""
    try:
        compiled = compile_template(template)
        return [compiled.render(values) for values in conversations]
    except Exception as error:  # whatever its expressions raise
        raise UserError(f"the chat template cannot be rendered ({first_line(error):.200}).") from None


class Template:
    """A chat template with the tokenizer whose special tokens it writes.

    encode() gives the ids that transformers' apply_chat_template gives, except for messages that spell a special token:
    there a user's message could end its turn and begin another one, here it stays text.
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
        """Read the template of a model directory. UserError if the model has none."""
        text = read_chat_template(path)
        if text is None:
            remedy = "Use an -Instruct model, or fine-tune one: python train.py config/chat_smollm2.py"
            raise UserError(f"{path} has no chat template; it only continues text (sample.py). {remedy}")
        file = path / "tokenizer_config.json"
        return cls(text, tokenizer, read_json(file) if file.is_file() else {})

    def encode(self, conversations: list[list[dict]], answer: bool = False) -> list[tuple[list[int], list[int]]]:
        """Return (ids, loss_mask) of each conversation. loss_mask[i] is 1 if ids[i] belongs to what the assistant says,
        or is the special token that ends it. answer: also write the beginning of the assistant's next turn.

        Each conversation is rendered twice, once with a mark in place of each message. So it is known what the template
        adds, and the two texts must agree: UserError if the template does more to a message than strip it.
        """
        marked = [[m | {"content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)] for messages in conversations]
        both = [self.values | dict(messages=m, add_generation_prompt=answer) for m in (*marked, *conversations)]
        texts, n = render(self.text, both), len(conversations)
        return [self.encode_one(*three) for three in zip(conversations, texts[:n], texts[n:])]

    def encode_one(self, messages: list[dict], skeleton: str, whole: str) -> tuple[list[int], list[int]]:
        parts = re.split("\ue000(\\d+)\ue001", skeleton)  # template, number, template, number, ..., template
        contents = [m["content"] for m in messages]
        for said in (contents, [c.strip() for c in contents]):
            filled = [part if k % 2 == 0 else said[int(part)] for k, part in enumerate(parts)]
            if "".join(filled) == whole and parts[1::2] == [str(i) for i in range(len(messages))]:
                break
        else:
            raise UserError("the chat template changes what the messages say, so the tokens in the loss are unknown.")

        ids, loss_mask = [], []
        text, answers = "", []  # the text since the last special token, and where the assistant speaks in it

        def end_of_text():
            nonlocal text, answers
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ids.extend(encoding.ids)
            loss_mask.extend(int(any(a <= start < b for a, b in answers)) for start, _ in encoding.offsets)
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
                    loss_mask.append(int(ends_answer))
                else:
                    text += piece
        end_of_text()
        return ids, loss_mask

    def fit(self, messages: list[dict], context: int, room: int, left_out: int = 0) -> tuple[list[int], int]:
        """Return the ids of a conversation up to where the assistant is to speak, and how many messages they leave out:
        the first `left_out` after the system message, and as many more questions with their answers as it takes to
        keep `room` positions of the context free, but never the last question. The last message is the user's."""
        first = int(messages[0]["role"] == "system")
        cuts = range(left_out, len(messages) - first, 2)

        def ids(cut: int) -> list[int]:
            return self.encode([messages[:first] + messages[first + cut :]], answer=True)[0][0]

        fits = lambda cut: len(ids(cut)) + room <= context
        cut = left_out if fits(left_out) else cuts[bisect_left(cuts[:-1], True, key=fits)]
        return ids(cut), cut
