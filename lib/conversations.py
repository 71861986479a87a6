"""
Conversations: a model's chat template, and the ids and the loss mask of a conversation.

    from lib.conversations import Template, messages_of
    template = Template.of(Path("out/SmolLM2-135M-Instruct"), tokenizer)
    ids, learnt = template.encode([messages])[0]

A conversation is a list of {"role": "system", "user" or "assistant", "content": text}. The template that came with the
model (Jinja, in chat_template.jinja or tokenizer_config.json) writes it as one text; what it puts around the messages
may be special tokens, what the messages contain is always text, whatever it spells.
"""

import json
import re
import subprocess
import sys
from bisect import bisect_left
from functools import cache
from pathlib import Path

from lib.files import read_errors_as_user_error, read_json
from lib.settings import UserError, is_text

from tokenizers import Tokenizer

ROLES = "system", "user", "assistant"
# for a model of one's own that has no template: ChatML, as SmolLM2-Instruct has it, without its default system message
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ----------------------------------------------------------------------------------------------------------------------
# what a line of data holds


def check_messages(messages) -> list[dict]:
    """The same messages, each with its role and content alone. UserError says what is wrong with them."""
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
            raise UserError(f"message {i} holds what UTF-8 cannot: half a surrogate pair")
    return [dict(role=m["role"], content=m["content"]) for m in messages]


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
    messages = check_messages(messages)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise UserError("the assistant says nothing, so there is nothing to learn")
    return messages


# ----------------------------------------------------------------------------------------------------------------------
# the template


def read_chat_template(path: Path) -> str | None:
    """The Jinja chat template of a model directory, from either of the two places; None for a base model."""
    files = path / "chat_template.jinja", path / "tokenizer_config.json"
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    with read_errors_as_user_error(file):
        template = read_json(file).get("chat_template") if file.suffix == ".json" else file.read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is not None and not (isinstance(template, str) and is_text(template)):
            raise ValueError("chat_template is no text")
        return template


TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 1 << 29  # what rendering may take
RENDER = """
import json, os, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.ext import Extension
if not (given := sys.stdin.read()):
    raise SystemExit  # it was not needed
template, conversations, seconds, size = json.loads(given)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except (ImportError, ValueError, OSError):  # Windows has no such limits, and macOS not the second
    pass
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
sys.stdout.flush()
os._exit(0)  # somebody waits for the end, and tidying up would take 10 ms
"""


def start_renderer() -> subprocess.Popen:
    """A process that renders one template and ends. It needs a tenth of a second before it can begin, and then waits.
    The terminal's Ctrl-C does not reach it, but on Windows; it ends with the process that started it, since then its
    input ends."""
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([sys.executable, "-P", "-c", RENDER], start_new_session=True, **options)


def render(template: str, conversations: list[dict], renderer: subprocess.Popen | None = None) -> list[str]:
    """The text that a Jinja template writes with each of these sets of values, which are what JSON can hold. UserError
    where it fails. `renderer` is of start_renderer(), if one was started ahead.

    A template comes with a model, from anyone. Jinja's sandbox keeps it from the machine, but not from looping for ever
    or filling the memory, so it is rendered in a process of its own, whose time and memory are bounded.
    """
    if len(template) > 1_000_000:
        raise UserError(f"the chat template has {len(template):,} characters; a million is the most.")
    given = json.dumps([template, conversations, TEMPLATE_SECONDS, TEMPLATE_BYTES])
    with renderer if renderer and renderer.poll() is None else start_renderer() as process:
        try:
            out, errors = process.communicate(given, timeout=TEMPLATE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise UserError(f"the chat template was not rendered within {TEMPLATE_SECONDS} seconds.") from None
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"it was ended with exit code {process.returncode}"])[-1][:200]
        raise UserError(f"the chat template cannot be rendered ({reason}).")
    return json.loads(out)


class Template:
    """A chat template with the tokenizer whose special tokens it writes.

    encode() gives the ids that transformers' apply_chat_template gives, but for messages that spell a special token:
    there a message of the user could end its turn and begin another, here it stays text.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, settings: dict):
        """settings: the model's tokenizer_config.json, for bos_token, eos_token and the like."""
        self.text, self.tokenizer = text, tokenizer
        self.renderer: subprocess.Popen | None = None  # one that chat.py has started ahead
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
        renderer, self.renderer = self.renderer, None
        texts = render(self.text, both, renderer)
        n = len(conversations)
        return [self.encode_one(*three) for three in zip(conversations, texts[:n], texts[n:])]

    def fit(self, messages: list[dict], context: int, room: int, left_out: int = 0) -> tuple[list[int], int]:
        """The ids of a conversation up to where the assistant is to speak, and how many messages are left out of them:
        the first `left_out` after the system message, then as many more questions with their answers as it takes to
        leave `room` positions of the context, but never the last question. The last message is the user's."""
        first = int(messages[0]["role"] == "system")
        cuts = range(left_out, len(messages) - first, 2)

        @cache
        def ids(cut: int) -> list[int]:
            return self.encode([messages[:first] + messages[first + cut :]], answer=True)[0][0]

        def fits(cut: int) -> bool:
            return len(ids(cut)) + room <= context

        for cut in cuts[:2]:  # in a chat that goes on, one turn more is enough
            if fits(cut) or cut == cuts[-1]:
                return ids(cut), cut
        cut = cuts[bisect_left(cuts[:-1], True, lo=2, key=fits)]
        return ids(cut), cut

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
