"""
Conversations: a model's chat template, and the ids and the loss mask of a conversation.

    template = Template.of(Path("out/SmolLM2-135M-Instruct"), tokenizer)
    ids, loss_mask = template.encode([messages])[0]

A conversation is a list of {"role": "system", "user" or "assistant", "content": text}. The template that comes with a
model (Jinja, in chat_template.jinja or tokenizer_config.json) writes it as one text. What the template puts around the
messages may be special tokens; what the messages contain is always encoded as text, whatever it spells.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path

from lib.files import first_line, read_errors_as_user_error, read_json
from lib.settings import UserError, is_text

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

ROLES = dict(system="system", user="user", assistant="assistant", human="user", gpt="assistant")  # and ShareGPT's
CALLS = {"tool", "function", "observation", "function_call", "tool_call", "tool_response"}  # roles around a tool call
NOT_TAUGHT = dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), "tool calls")  # key: what it holds
NOT_TAUGHT |= dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "images or recordings")
# For models without a template: ChatML, as in SmolLM2-Instruct, without its default system message.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Unlearnable(UserError):
    """A conversation that is well-formed, but has what is not taught here, or nothing to learn."""


def check_messages(messages, row: dict | None = None) -> list[dict]:
    """Return messages with role and content only: names of roles become ours, and parts of text one text. UserError
    names the first that is wrong. row: the row of data they are from; Unlearnable says why it teaches nothing."""
    system = dict(role="system", content=row and (row.get("system") or row.get("system_prompt")))
    checked, messages = [], messages if not system["content"] or messages[:1] == [system] else [system, *messages]
    for i, m in enumerate(messages, 1):
        m = m if isinstance(m, dict) else {}
        role, content = str(m.get("role", m.get("from"))), m.get("content", m.get("value"))
        held = [what for key, what in NOT_TAUGHT.items() if any(str(x.get(key) or "")[2:] for x in (m, row or {}))]
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            held += ["images or recordings" for part in content if part.get("type") != "text"]
            content = "".join(str(part.get("text")) for part in content)
        if held or role in CALLS:
            raise Unlearnable(held[0] if held else "tool calls")
        if not isinstance(content, str) or not is_text(content) or role not in ROLES:
            raise UserError(f"message {i} is not an object with a content of text and a role of {', '.join(ROLES)}")
        checked.append(dict(role=ROLES[role], content=content))
    answers = [m["content"].strip() for m in checked if m["role"] == "assistant"]
    if row is not None and not (answers and all(answers)):
        raise Unlearnable("an empty assistant turn" if answers else "no assistant turn")
    return checked


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
        self.values = dict(tools=None, documents=None) | {k: v for k, v in named.items() if isinstance(v, str)}
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


def conversation_encoder(tokenizer: Tokenizer, file: Path | None) -> tuple[Callable, str, str]:
    """Return a function from a conversation, as JSON, to its ids, mask and answers; the token that ends an answer; and
    the chat template: the one beside the tokenizer's file, or ChatML."""
    own = file and read_chat_template(file.parent) is not None
    template = Template.of(file.parent, tokenizer) if own else Template(CHATML, tokenizer, {})
    tokenizer.encode_special_tokens = True

    def encode(text: str) -> tuple[np.ndarray, bytes, str]:
        messages = json.loads(text)
        ids, loss_mask = template.encode([messages])[0]
        said = "".join(m["content"] for m in messages if m["role"] == "assistant")
        return np.array(ids), bytes([2, *loss_mask[1:]]), said

    ids, mask, _ = encode('[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]')
    if (end := int(ids[mask.rfind(1)])) not in template.special.values():
        raise UserError("the chat template has no special token after an answer: a model would not learn to stop.")
    return encode, tokenizer.id_to_token(end), template.text
