"""
The playground: chat with a model, write with it, look inside it, compare two, watch one learn.

    python app.py                                        # the newest run under out/, at http://127.0.0.1:7860
    python app.py --model=HuggingFaceTB/SmolLM2-135M     # a downloaded model, beside the runs
    python app.py --share=true --auth=FILE:login.txt     # a public link (gradio's tunnel) that asks for a login

    from gradio_client import Client                     # the same from a program
    Client("http://127.0.0.1:7860").predict("ROMEO:", max_new_tokens=50, seed=1, api_name="/generate")
    Client("http://127.0.0.1:7860").predict([{"role": "user", "content": "Who are you?"}], api_name="/chat")

One generation runs at a time, the others wait in a queue; each has a cache and a random generator of its own. Visitors
choose among the runs under out/ and --model, and cannot name another path. Nothing is fetched from another host, and
other sites that a visitor's browser has open cannot reach it.
"""

import json
import os
import random
import re
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html import escape, unescape
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from lib.conversations import Template, check_messages, read_chat_template
from lib.device import pick_device, pick_dtype
from lib.files import file_sha256, read_errors_as_user_error
from lib.settings import UserError, Within, is_text, leave_stdout, override, run_main

import gradio as gr
import pandas as pd
from gradio.tunneling import CURRENT_TUNNELS
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from checkpoint import find, load, metadata, newest_run
from sample import encode_prompt, generate, stream_text


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto is what the file holds
    port: Annotated[int, Within(least=1, most=65535)] = 7860  # of 127.0.0.1, the only address the page is served on
    share: bool = False  # a public link through gradio's tunnel; only with --auth
    auth: str = ""  # user:password that the page and the API ask for; FILE:login.txt reads it from a file, out of sight


RUNS = Path("out")
MAX_PROMPT = 4000  # characters; of a longer prompt the end is read
MAX_CHAT, MAX_MESSAGES = 20_000, 199  # characters and messages; of a longer conversation the oldest turns are left out
MAX_WAITING = 16  # requests in the queue; the next one is told to come back later
DRAW_EVERY = 0.04  # seconds between two drawings of a text; a browser falls behind a fast model otherwise
PATIENCE = 10  # seconds of work on a text that nobody has begun to fetch
REFRESH = 3  # seconds between looks at the disk, for new runs and new lines in a log
LOG_TAIL = 4_000_000  # bytes; of a longer log the last part is read
LOADED_AT_ONCE = 2  # models kept in memory: the two that Compare needs
EXAMPLES = ["ROMEO:", "To be, or not to be,", "Once upon a time", "The sea was calm and"]
# Every number a visitor can send: lowest, highest, default, step, label, help. The page and the server both use this.
KNOBS = dict(
    max_new_tokens=(10, 1024, 200, 1, "Length", "At most so many tokens (pieces of words); the model may end sooner."),
    temperature=(0.0, 2.0, 0.8, 0.05, "Temperature", "0 always takes the likeliest; chat: 0.2; 1 is lively, 2 noise."),
    top_k=(0, 200, 0, 1, "Top-k", "Choose among this many of the likeliest tokens only. 0 is off."),
    top_p=(0.0, 1.0, 1.0, 0.05, "Top-p", "Choose among the likeliest that make up this share; chat: 0.9. 1 is off."),
    min_p=(0.0, 0.5, 0.0, 0.01, "Min-p", "Drop tokens this much less likely than the likeliest. 0 is off."),
    repetition_penalty=(1.0, 2.0, 1.0, 0.05, "Repetition penalty", "Above 1, words already used become less likely."),
    seed=(0, 2**31 - 1, 0, 1, "Seed", "The same number gives the same text again. 0 draws a new one each time."),
)  # fmt: skip
CHAT = dict(max_new_tokens=512, temperature=0.2, top_p=0.9)  # defaults with a chat model, as in chat.py
OFF = dict(top_k=(0,), top_p=(0, 1), min_p=(0,))  # values that mean None to generate()


def clamp(name: str, value) -> int | float:
    """`value` moved into the range of the knob `name`; UserError if it is not a number."""
    low, high, default, *_ = KNOBS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # the last is NaN
        raise UserError(f"{name}={value!r}: expected a number from {low} to {high}.")
    return type(default)(min(max(value, low), high))


def stamp(file: Path) -> tuple[int, int]:
    """Time of the last change and size: different once a file has been written again."""
    return file.stat().st_mtime_ns, file.stat().st_size


def newest_first(name: str) -> list[str]:
    """The runs that have a file of this name, the one written last first."""
    found = []
    for file in RUNS.glob(f"*/{name}"):
        with suppress(OSError):  # a run may be deleted at any moment
            if file.is_file() and is_text(str(file)):  # JSON cannot hold a name that is not UTF-8
                found.append((file.stat().st_mtime, str(file.parent)))
    return [run for _, run in sorted(found, reverse=True)]


def first(names: list[str]) -> str | None:
    return names[0] if names else None


# ----------------------------------------------------------------------------------------------------------------------
# models


class Models:
    """The models a visitor may choose, loaded at first use and shared. A change on disk is noticed at the next use."""

    def __init__(self, extra: str, device: str, dtype):
        """extra: the directory or hub id of --model, which may lie outside out/; empty for none."""
        self.extra_folder = find(extra) if extra else None  # the only place where a hub id may be downloaded
        self.extra = extra  # what it is called in the lists: out/NAME, a hub id, or the last part of another path
        if extra and Path(extra).is_dir():
            folder = Path(os.path.abspath(extra))
            self.extra = str(RUNS / folder.name) if folder.parent == RUNS.absolute() else folder.name
        self.device, self.dtype = device, dtype
        self.loaded = {}  # (name, int8) -> (files on disk, model, tokenizer), the latest used last
        self.lock = threading.Lock()

    def names(self) -> list[str]:
        """What can be chosen: --model first, then the runs, the newest first."""
        runs = [run for run in newest_first("model.safetensors") if run != self.extra]
        return [self.extra, *runs] if self.extra else runs

    def folder(self, name: str) -> Path:
        """Where the model is; UserError for a name that is not in the list."""
        if name and name == self.extra:
            return self.extra_folder
        if not name or name not in self.names():
            newest_run(RUNS)  # its own UserError, with the command to run, if there is no model at all
            raise UserError(f"{name or '?'}: no such model here (any more). Choose one of: {', '.join(self.names())}.")
        return Path(name)

    def get(self, name: str, int8: bool = False):
        """Model and tokenizer. UserError where it has gone or is damaged; no other model is put in its place."""
        with self.lock:
            folder = self.folder(name)
            weights = sorted(folder.glob("*.safetensors"))
            if not weights:
                self.loaded.pop((name, int8), None)
                raise UserError(f"{name} has gone from the disk. Choose another model, or train it again.")
            files = [(f.name, *stamp(f)) for f in [*weights, *sorted(folder.glob("*.json"))]]
            if "untrained" in metadata(folder):
                raise UserError(f"{name} has not been trained yet: it holds random weights until its first evaluation.")
            entry = self.loaded.pop((name, int8), None)
            if entry is None or entry[0] != files:
                changed = entry is not None
                while len(self.loaded) >= LOADED_AT_ONCE:
                    del self.loaded[next(iter(self.loaded))]  # the one that was not used for the longest time
                entry = (files, *load(folder, self.device, self.dtype, "int8" if int8 else ""))
                if changed:
                    gr.Info(f"{name} has changed on disk and was loaded again.")
            self.loaded[name, int8] = entry
            _, model, tokenizer = entry
            return model, tokenizer

    def template(self, name: str, tokenizer) -> Template:
        """How the model is to be talked to; UserError where it only continues text."""
        folder = self.folder(name)
        if read_chat_template(folder) is None:
            raise UserError(
                f"{name} has no chat template, so it only continues texts. Choose another, or make one that can chat: "
                "python import_gguf.py, or python train.py config/chat_smollm2.py"
            )
        return Template.of(folder, tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# one request


@dataclass
class Token:
    text: str
    ends: bool  # whether it is a token that ends a text
    p: float  # the model's own probability, before temperature and the filters
    others: list[tuple[str, float]]  # the likeliest tokens at this place, with their probabilities


@dataclass
class Record:
    """One continuation, filled while it is made; the page is drawn from it."""

    prompt: str = ""
    tokens: list[Token] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # the model's time for each token
    seed: int = 0
    stopped: bool = False  # set from outside to end it
    why: str = ""  # the reason why it ended; empty while it goes on

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def spell(tokenizer, i: int) -> str:
    """The text of token `i` alone, for the list of alternatives, with white space made visible."""
    text = tokenizer.decode([i], skip_special_tokens=False)
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(nothing)"


def chat_ids(template: Template, messages: list[dict], context: int, room: int) -> list[int]:
    """The ids of a conversation up to where the answer begins. The oldest turns of a long one are left out, until
    `room` positions of the context are free for the answer; the system message and the last question stay.

    All of it is read anew for every answer: caches that wait for visitors who may not come back would fill the memory.
    """
    first = int(messages[0]["role"] == "system")
    head, turns = messages[:first], messages[first:][-MAX_MESSAGES:]
    while sum(len(m["content"]) for m in head + turns) > MAX_CHAT and len(turns) > 2:
        turns = turns[2:]
    if sum(len(m["content"]) for m in head + turns) > MAX_CHAT:
        raise UserError(f"the message, with the system message, is longer than {MAX_CHAT:,} characters.")
    return template.fit(head + turns, context, room)[0]


def write(models: Models, record: Record, name: str, int8: bool, prompt: str, messages=None, **numbers):
    """Fill `record` with a continuation of `prompt` by the model `name`, or, where there are messages, with its answer
    to the last of them. numbers: a value for each of KNOBS.

    Yields after every token. Closing this iterator, or setting record.stopped, ends the work with the token at hand.
    """
    numbers = {key: clamp(key, value) for key, value in numbers.items()}
    if messages is not None:
        try:
            messages = check_messages(messages)
            if messages[-1]["role"] != "user":
                raise UserError("the last message must be the user's, so that there is something to answer")
        except UserError as error:
            raise UserError(f"messages: {error}.") from None
        prompt = messages[-1]["content"] + "\n"  # what is shown before the answer
    if not all(isinstance(text, str) and is_text(text) for text in (prompt, name or "")):
        raise UserError("the prompt and the model's name must be text, and without half a surrogate pair.")
    if not isinstance(int8, bool):
        raise UserError(f"int8={int8!r}: expected true or false.")
    record.seed = numbers["seed"] = numbers["seed"] or random.randrange(1, 2**31)
    record.prompt = prompt[-MAX_PROMPT:]
    model, tokenizer = models.get(name, int8)
    context = model.config.max_position_embeddings
    if messages is None:
        prompt_ids = encode_prompt(tokenizer, record.prompt, context)
    else:
        room = min(numbers["max_new_tokens"], context // 4)
        prompt_ids = chat_ids(models.template(name, tokenizer), messages, context, room)
    numbers = {key: None if value in OFF.get(key, ()) else value for key, value in numbers.items()}
    steps = generate(model, prompt_ids, **numbers, with_logits=True)
    for piece in stream_text(tokenizer, recorded(steps, record, tokenizer, model.config.eos_ids)):
        record.tokens[-1].text += piece  # a character that spans tokens belongs to the last of them
        yield


def recorded(steps, record: Record, tokenizer, eos_ids):
    """Yield the ids of `steps`, adding each token to `record` without its text, until they end or record.stopped."""
    while not record.stopped:
        started = time.perf_counter()
        step = next(steps, None)
        if step is None:
            ended = record.tokens[-1].ends
            record.why = "the model ended the text" if ended else "it reached the length that was set"
            return
        new, logits = step  # (1,), (1, V)
        probability = logits[0].float().softmax(-1)
        top = probability.topk(min(6, len(probability)))
        others = [(spell(tokenizer, i), p) for i, p in zip(top.indices.tolist(), top.values.tolist())]
        record.tokens.append(Token("", int(new) in eos_ids, float(probability[new[0]]), others))
        record.seconds.append(time.perf_counter() - started)
        yield new
    record.why = "you stopped it"


def unheard(request: gr.Request, record: Record, sent: int) -> bool:
    """Whether PATIENCE seconds have gone into a text, and the message that it has begun and the `sent` with its tokens
    all lie in gradio's queue still.
    A client that has begun to read and goes away needs no such look: gradio closes the iterator."""
    unread = request.request.app.get_blocks()._queue.pending_messages_per_session.get(request.session_hash)
    return sum(record.seconds) > PATIENCE and unread is not None and unread.qsize() > sent


@contextmanager
def errors_as_toasts():
    """A user's mistake becomes a message in the corner of the page, or an AppError in gradio_client."""
    try:
        yield
    except (UserError, OSError) as error:
        raise gr.Error(escape(str(error), quote=False), duration=20, print_exception=False) from None


# ----------------------------------------------------------------------------------------------------------------------
# HTML: everything that came from a model, a file or a visitor goes through escape()


def status_html(facts: list[str]) -> str:
    return f'<p class="status">{escape(" · ".join(facts))}</p>'


def error_html(message) -> str:
    return f'<p class="status bad">{escape(str(message))}</p>'


def text_html(record: Record | None) -> str:
    """The prompt, set off, and what the model wrote."""
    if record is None:
        return '<div class="paper empty">The text will appear here.</div>'
    caret = "" if record.why else '<span class="caret"></span>'
    text = f'<span class="prompt">{escape(record.prompt)}</span><span class="wrote">{escape(record.text)}</span>{caret}'
    return f'<div class="paper follow" tabindex="0" role="region" aria-label="The text"><div>{text}</div></div>'


def facts_html(record: Record | None) -> str:
    """The line below a text: length, speed, seed, and why it stopped."""
    if record is None or not record.tokens:
        return f'<p class="facts">{escape(record.why if record else "")}</p>'
    facts = [f"{len(record.tokens)} tokens"]
    if len(record.tokens) > 1:
        facts.append(f"{(len(record.tokens) - 1) / sum(record.seconds[1:]):.0f} tokens per second")
    facts += [f"first token after {record.seconds[0]:.2f} s", f"seed {record.seed}"]
    if record.why:
        facts.append(f"stopped: {record.why}")
    return f'<p class="facts">{escape(" · ".join(facts))}</p>'


SHADES = ((0.8, "almost certain"), (0.5, "likely"), (0.2, "one of a few"), (0.05, "unusual"), (0.0, "a long shot"))


def tokens_html(record: Record | None) -> str:
    """Each token on the colour of its probability, with its alternatives as data for INSIDE_JS."""
    if record is None or not record.tokens:
        return '<div class="paper empty">Write something first: the text appears here again, token by token.</div>'
    legend = "".join(f'<span class="t p{i}">{name}</span> ' for i, (_, name) in enumerate(SHADES))
    spans = []
    for token in record.tokens:
        shade = next(i for i, (least, _) in enumerate(SHADES) if token.p >= least)
        data = escape(json.dumps([round(token.p, 4), [[text, round(p, 4)] for text, p in token.others]]))
        text = escape(token.text).replace("\n", "\u21b5\n") or ("[end of text]" if token.ends else "\u00b7")
        spans.append(f'<span class="t p{shade}" data-t="{data}">{text}</span>')
    return (
        f'<div class="legend" aria-hidden="true">How sure was the model? {legend}</div>'
        '<div class="paper" tabindex="0" role="region" aria-label="The tokens; walk through them with the arrow keys">'
        f'<span class="prompt">{escape(record.prompt)}</span>{"".join(spans)}</div>'
        '<div class="odds" aria-live="polite">Point at a token, tap it, or walk along with the arrow keys, to see what '
        "else the model considered there.</div>"
    )


def model_html(models: Models, name: str, int8: bool) -> tuple[str, str]:
    """The line at the top of the page and the table of the Model tab, from the files and the loaded model alone."""
    try:
        model, tokenizer = models.get(name, int8)
        folder = models.folder(name)
        meta, c, count = metadata(folder), model.config, model.num_parameters()
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
        sha256 = file_sha256(folder / "tokenizer.json")
        with read_errors_as_user_error(folder / "model.safetensors"):
            step = f"{int(meta['step']):,}" if "step" in meta else ""
            bits = f"{float(meta['val_bpb']):.3f} bits per byte" if "val_bpb" in meta else ""
    except (UserError, OSError) as error:
        return error_html(error), error_html(error)
    kind = "int8" if int8 else str(model.dtype).removeprefix("torch.")
    line = [name, f"{count['total'] / 1e6:.1f} million parameters"]
    rows = [
        ("Directory", str(folder), "everything below is read from the files there"),
        ("Parameters", f"{count['total']:,}", f"of these {count['embeddings']:,} in the table of tokens"),
        ("Layers", f"{c.num_hidden_layers:,}", "each lets a token look back at the others, then works on it alone"),
        ("Width", f"{c.hidden_size:,}", f"numbers that stand for a token; {c.intermediate_size} inside an MLP"),
        ("Heads", f"{c.num_attention_heads} for queries, {c.num_key_value_heads} for keys", f"each {c.head_dim} wide"),
        ("Context", f"{c.max_position_embeddings:,} tokens", "how far back it can look in a text"),
        ("Vocabulary", f"{tokenizer.get_vocab_size():,} tokens", f"tokenizer.json, sha256 {sha256[:12]}"),
        ("Weights", f"{kind} on {model.device}", f"{size:.1f} MB on disk"),
    ]
    if step:
        line.append(f"step {step}")
        rows.append(("Training step", step, "the one with the lowest validation loss so far"))
    if bits:
        line.append(bits)
        rows.append(("Validation", bits, "what it takes to encode text it never saw; less is better"))
    cells = "".join(
        f"<tr><th>{escape(label)}</th><td>{escape(value)}<small>{escape(hint)}</small></td></tr>"
        for label, value, hint in rows
    )
    return status_html(line), f'<table class="card">{cells}</table>'


def note_html(models: Models, name: str, int8: bool) -> str:
    """The line at the top of the Chat tab: why the model cannot chat, and what to do."""
    try:
        models.template(name, models.get(name, int8)[1])
        return ""
    except (UserError, OSError) as error:
        return error_html(error)


def is_number(value) -> bool:
    """Whether it can be drawn: NaN, infinity and integers that a browser would round cannot."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def read_log(run: str) -> tuple[list[dict], list[str]]:
    """The last LOG_TAIL bytes of log.jsonl as rows, each with a numeric step, and what to say about what is missing.
    A value that is not what training_view() draws is left out of its row: a gap in one curve."""
    with open(Path(run) / "log.jsonl", "rb") as f:
        start = max(0, f.seek(0, os.SEEK_END) - LOG_TAIL)
        f.seek(start)
        lines = f.read(LOG_TAIL).split(b"\n")[bool(start) : -1]  # without half a line at either end
    rows, gaps = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not is_number(row.get("step")):
            gaps += 1
            continue
        bad = [k for k in ("loss", "val_loss", "val_bpb", "lr", "tok_per_s") if k in row and not is_number(row[k])]
        if "sample" in row and not (isinstance(row["sample"], str) and is_text(row["sample"])):
            bad.append("sample")
        gaps += len(bad)
        rows.append({key: value for key, value in row.items() if key not in bad})
    notes = [f"only the last {LOG_TAIL / 1e6:g} MB of the log are shown"] if start else []
    return rows, notes + ([f"gaps in the log: {gaps:,}"] if gaps else [])


def curve(rows: list[dict], key: str, name: str, most: int = 400) -> list[tuple[int, float, str]]:
    """(step, value, name) of one curve, thinned to at most 2 * `most` points, the last one included."""
    points = [(r["step"], r[key], name) for r in rows if key in r]
    every = max(1, len(points) // most)
    return points if every == 1 else [*points[::every], points[-1]]


def training_view(run: str):
    """A line of facts; tables of (step, value, curve) for loss, learning rate and speed; the samples of text."""
    rows, notes = read_log(run)
    evals = [r for r in rows if "val_loss" in r]
    line = [run, f"step {max((r['step'] for r in rows), default=0):,}"]
    loss = curve(rows, "loss", "training") + curve(evals, "val_loss", "validation")
    if evals:
        best = min(evals, key=lambda r: r["val_loss"])
        line.append(f"best at step {best['step']:,}: validation loss {best['val_loss']:.3f}")
        if "val_bpb" in best:
            line.append(f"{best['val_bpb']:.3f} bits per byte")
        ys = [y for _, y, _ in loss]
        loss += [(best["step"], min(ys), "best"), (best["step"], max(ys), "best")]  # two points: an upright line
    tables = (
        pd.DataFrame(loss, columns=["step", "loss", "curve"]),
        pd.DataFrame(curve(rows, "lr", "learning rate"), columns=["step", "learning rate", "curve"]),
        pd.DataFrame(curve(rows, "tok_per_s", "throughput"), columns=["step", "tokens per second", "curve"]),
    )
    last = [r for r in rows if r.get("sample")][-50:]
    samples = "".join(f"<dt>step {r['step']:,}</dt><dd>{escape(r['sample'][:MAX_PROMPT])}</dd>" for r in last)
    samples = samples or "<dd>No samples in this log: train with --sample_interval=500, say.</dd>"
    return status_html(line + notes), *tables, f'<dl class="samples">{samples}</dl>'


# ----------------------------------------------------------------------------------------------------------------------
# the page: each part of the layout returns the components that the events below need


@dataclass
class Panel:
    """A prompt with its buttons and the texts of the models that continue it: one in Write, two in Compare."""

    prompt: gr.Textbox
    go: gr.Button
    stop: gr.Button
    models: list[gr.Dropdown]
    texts: list[gr.HTML]  # one per model, as are the facts
    facts: list[gr.HTML]
    clear: gr.Button | None = None  # in Write alone, as is the next
    tokens: gr.HTML | None = None  # the view of See inside

    def shown(self) -> list[gr.HTML]:
        return [*self.texts, *self.facts] + ([] if self.tokens is None else [self.tokens])

    def draw(self, records: list[Record], with_tokens: bool = True) -> list:
        """Values for shown(): of no records the empty page; without with_tokens that view stays as it is."""
        records = records or [None] * len(self.models)
        values = [text_html(record) for record in records] + [facts_html(record) for record in records]
        if self.tokens is not None:
            values.append(tokens_html(records[0]) if with_tokens else gr.skip())
        return values


@dataclass
class Talk:
    """A visitor's conversation: the messages with the model, and with the one beside it; the questions are the same."""

    threads: list[list[dict]] = field(default_factory=lambda: [[], []])
    records: list[Record] = field(default_factory=list)  # of the last answers, one or two

    def question(self, event: gr.EventData) -> tuple[int, str | None]:
        """Place and text, as edited, of the question that the page's event is about; the end and None if about none."""
        data, thread = event._data if isinstance(event._data, dict) else {}, self.threads[0]
        at = data.get("index")
        if at is None:
            return len(thread), None
        if type(at) is not int or not 0 <= at < len(thread):
            raise UserError("that message is no longer in the conversation.")
        at -= at % 2
        edited = data.get("value") if "previous_value" in data else None
        return at, unescape(edited) if isinstance(edited, str) else thread[at]["content"]  # escaped by draw()

    def end(self, at: int | None = None):
        """Stop what is being written. With a place: forget all from there on."""
        for record in self.records:
            record.stopped, record.why = True, record.why or "you stopped it"
        self.threads = [thread[:at] for thread in self.threads]
        self.records = list(self.records) if at is None else []  # another list, by which answer() knows

    def draw(self, with_tokens: bool = True) -> list:
        """Chatbot, facts and tokens of each model. A Chatbot shows HTML, pictures of other hosts too, also where it is
        told to sanitize and not to render Markdown; and of a string, not of a dictionary, it strips the indentation."""
        values = []
        for thread, record in zip(self.threads, [*self.records, None, None]):
            values.append([m | dict(content=dict(type="text", text=escape(m["content"], quote=False))) for m in thread])
            values += [facts_html(record), tokens_html(record) if with_tokens else gr.skip()]
        return values


def sidebar(names: list[str], defaults: dict):
    with gr.Sidebar(width=300):
        model = gr.Dropdown(names, label="Model", info="The runs under out/, the newest first.")
        int8 = gr.Checkbox(False, label="int8 weights", info="A quarter of the memory; a little less exact.")
        knobs = []
        for name, (low, high, default, step, label, hint) in KNOBS.items():
            looks = dict(
                minimum=low, maximum=high, value=defaults.get(name, default), step=step, label=label, info=hint
            )
            knobs.append(gr.Number(**looks, precision=0) if name == "seed" else gr.Slider(**looks, buttons=[]))
    return model, int8, knobs


def prompt_box(**more) -> gr.Textbox:
    hint = "Begin a text; the model goes on. Enter sends, Shift+Enter makes a new line."
    return gr.Textbox(label="Prompt", lines=1, max_lines=8, placeholder=hint, **more)


def chat_tab(models: Models, names: list[str], model: gr.Dropdown, int8: gr.Checkbox, knobs: list, autofocus: bool):
    """Returns the line for models that cannot chat and the list of second models, which other events fill."""
    with gr.Tab("Chat"):
        note, bots, shown = gr.HTML(), [], []
        looks = dict(
            render_markdown=False, sanitize_html=True, allow_tags=False, latex_delimiters=[], editable="user",
            group_consecutive_messages=False, buttons=[], feedback_options=None, height="46vh",
            placeholder="Ask something. The model may be wrong, and sound sure.", elem_classes="talk",
        )  # fmt: skip
        with gr.Row():
            for label in ("Conversation", "The same, beside it"):
                with gr.Column(min_width=280, visible=not bots) as second:
                    bots.append(gr.Chatbot(label=label, show_label=False, **looks))
                    facts = gr.HTML(facts_html(None))
                    with gr.Accordion("See inside the last answer", open=False):
                        tokens = gr.HTML(tokens_html(None), js_on_load=INSIDE_JS, elem_classes="inside")
                    shown += [bots[-1], facts, tokens]
        hint = "Enter sends, Shift+Enter makes a new line."
        box = dict(lines=1, max_lines=8, placeholder=hint, elem_id="say", autofocus=autofocus)
        prompt = gr.Textbox(label="Message", **box)
        with gr.Row():
            go = gr.Button("Send", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
        with gr.Row():
            hint = "Who the model is, or how it should answer. Empty: what its template says."
            system = gr.Textbox(label="System message", info=hint, lines=1, max_lines=8, elem_id="system")
            hint = "A second model that answers the same questions."
            beside = gr.Dropdown([NOBODY, *names], value="", label="And beside it", info=hint)
        beside.change(lambda name: gr.update(visible=bool(name)), beside, second, **QUIET)
        inputs = [prompt, system, model, beside, int8, *knobs]
        # within the tab: what it adds between two tabs, the page would count as one
        connect_chat(models, bots, shown, [go.click, prompt.submit], stop, inputs)
    return note, beside


def write_tabs(model: gr.Dropdown, autofocus: bool) -> Panel:
    """Write and See inside: two views of one text."""
    with gr.Tab("Write"):
        prompt = prompt_box(autofocus=autofocus, elem_id="prompt")
        with gr.Row():
            go = gr.Button("Generate", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
            clear = gr.Button("Clear", min_width=80)
        text, facts = gr.HTML(text_html(None), elem_id="text"), gr.HTML(facts_html(None))
        gr.Examples(EXAMPLES, prompt, label="Or begin with one of these")
    with gr.Tab("See inside"):
        gr.Markdown(
            "A language model gives every token it knows a probability of coming next, and draws one. Here "
            "is the text of the Write tab, each token on the colour of the probability it had."
        )
        tokens = gr.HTML(tokens_html(None), js_on_load=INSIDE_JS, elem_id="inside")
    return Panel(prompt, go, stop, [model], [text], [facts], clear, tokens)


def compare_tab(names: list[str]) -> Panel:
    with gr.Tab("Compare"):
        gr.Markdown("The same prompt, the same settings and the same seed, through two models.")
        prompt = prompt_box(elem_id="both")
        with gr.Row():
            go = gr.Button("Compare", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
        panel = Panel(prompt, go, stop, models=[], texts=[], facts=[])
        left = first(names)
        right = names[1] if len(names) > 1 else left
        with gr.Row():
            for label, name in (("Left", left), ("Right", right)):
                with gr.Column(min_width=280):
                    panel.models.append(gr.Dropdown(names, value=name, label=label))
                    panel.texts.append(gr.HTML(text_html(None)))
                    panel.facts.append(gr.HTML(facts_html(None)))
    return panel


def training_tab():
    """The choice of a run, and what is drawn of it: a component for each output of training_view()."""
    colors = {"training": "#8aa0a8", "validation": "#0d9488", "best": "#ea580c"}
    colored = dict(color="curve", color_title=" ", color_map=colors, height=300, elem_id="loss")
    small = dict(x="step", min_width=280, y_lim=[0, None], height=220)
    with gr.Tab("Training"):
        run = gr.Dropdown(newest_first("log.jsonl"), value=None, label="Run", info="Redrawn while the run goes on.")
        line = gr.HTML()
        loss = gr.LinePlot(x="step", y="loss", **colored)
        with gr.Row():
            rate, speed = gr.LinePlot(y="learning rate", **small), gr.LinePlot(y="tokens per second", **small)
        gr.Markdown("### What it wrote on the way")
        samples = gr.HTML()
    return run, [line, loss, rate, speed, samples]


def build(models: Models) -> gr.Blocks:
    """The whole page. Nothing is loaded and nothing served until it is launched and used."""
    names = models.names()
    talks = False  # whether the first model can chat; then that is the first tab
    with suppress(UserError):
        talks = bool(names) and read_chat_template(models.folder(names[0])) is not None
    with gr.Blocks(title="nanoSmol playground", fill_width=True, analytics_enabled=False) as demo:
        model, int8, knobs = sidebar(names, CHAT if talks else {})
        gr.Markdown("# nanoSmol playground")
        status = gr.HTML()
        with gr.Tabs():
            chat = chat_tab(models, names, model, int8, knobs, autofocus=True) if talks else None
            writing = write_tabs(model, autofocus=not talks)
            note, beside = chat or chat_tab(models, names, model, int8, knobs, autofocus=False)
            comparing = compare_tab(names)
            run, drawing = training_tab()
            with gr.Tab("Model"):
                card = gr.HTML()
        generation = connect_panel(writing, models, int8, knobs)
        connect_panel(comparing, models, int8, knobs)
        describe = dict(
            fn=lambda name, int8: (*model_html(models, name, int8), note_html(models, name, int8)),
            inputs=[model, int8], outputs=[status, card, note],
            concurrency_limit=None, show_progress="hidden", **PRIVATE,
        )  # fmt: skip
        gr.on([demo.load, model.change, int8.change], **describe)
        generation.then(**describe)  # the model may have been loaded again
        connect_refresh(demo, models, run, drawing, [model, *comparing.models], beside)
        add_api(models)
    return demo.queue(max_size=MAX_WAITING, api_open=False)  # open, /run and /api would compute beside the queue


# ----------------------------------------------------------------------------------------------------------------------
# events

ONE_AT_A_TIME = dict(concurrency_id="model", concurrency_limit=1)  # shared by all that generate
PRIVATE = dict(api_visibility="private")  # the page's own events; programs have /generate and /chat
QUIET = dict(queue=False, show_progress="hidden", **PRIVATE)
NOBODY = ("none", "")  # in the list of second models


def together(request: gr.Request, records: list[Record], writers: list):
    """A token of each writer in turn, until nobody listens. Yields whether the text is to be drawn now, and whether the
    coloured view, which is large, with it."""
    drawn, colored, sent = -DRAW_EVERY, time.perf_counter(), 0
    try:
        for _ in zip_longest(*writers):
            if unheard(request, records[0], sent):
                return
            now = time.perf_counter()
            draw = now - drawn >= DRAW_EVERY
            color = draw and now - colored > 0.5
            if draw:
                drawn, sent = now, sent + 1
            if color:
                colored = now
            yield draw, color
    except Exception:
        if sent:  # show all that there is, beside the message
            for record in records:
                record.why = record.why or "an error"
            yield True, True
        raise
    yield True, True


def connect_panel(panel: Panel, models: Models, int8: gr.Checkbox, knobs: list):
    """Make the buttons of a panel write, stop and clear. Returns the event of generating."""
    box = gr.State([])  # this visitor's records; a list, so that Stop sees them while they are being filled

    def write_all(request: gr.Request, box, int8, prompt, *rest):
        names, numbers = rest[: len(panel.models)], dict(zip(KNOBS, rest[len(panel.models) :]))
        records = [Record() for _ in names]
        box[:] = records
        if len(prompt or "") > MAX_PROMPT:
            gr.Info(f"Of a prompt longer than {MAX_PROMPT:,} characters only the end is read.")
        with errors_as_toasts():
            numbers["seed"] = clamp("seed", numbers["seed"]) or random.randrange(1, 2**31)  # one for all
            writers = [write(models, r, name, int8, prompt, **numbers) for r, name in zip(records, names)]
            for draw, color in together(request, records, writers):
                if draw:
                    yield panel.draw(records, with_tokens=color)

    def stop(box):
        for record in box:
            record.stopped, record.why = True, record.why or "you stopped it"
        return panel.draw(box)

    def clear(box):
        stop(box)
        box.clear()  # or Stop would draw the text again
        return ["", *panel.draw([])]

    generation = gr.on(
        [panel.go.click, panel.prompt.submit], write_all, [box, int8, panel.prompt, *panel.models, *knobs],
        panel.shown(), show_progress="minimal", show_progress_on=panel.texts, **ONE_AT_A_TIME, **PRIVATE,
    )  # fmt: skip
    stopped = panel.stop.click(stop, box, panel.shown(), cancels=generation, **QUIET)
    stopped.then(panel.draw, box, panel.shown(), **QUIET)  # again: a token on its way may have been drawn over it
    if panel.clear is not None:
        panel.clear.click(clear, box, [panel.prompt, *panel.shown()], cancels=generation, **QUIET)
    return generation


def connect_chat(models: Models, bots: list[gr.Chatbot], shown: list, sends: list, stop: gr.Button, inputs: list):
    """Make the conversation go on, stop, be taken back, and change at any question. shown: what Talk.draw() draws."""
    state = gr.State(Talk())  # this visitor's; it changes in place, so Stop sees it while it is being filled

    def answer(request: gr.Request, event: gr.EventData, talk, prompt, system, name, beside, int8, *numbers):
        """Answer what is in the box, or a question that is there, again or as edited; what followed it is forgotten."""
        numbers, names = dict(zip(KNOBS, numbers)), [name, beside] if beside else [name]
        with errors_as_toasts():
            at, old = talk.question(event)
            question = prompt if old is None else old
            if not isinstance(question, str) or not question.strip():
                raise UserError("the message is empty: write one first.")
            numbers["seed"] = clamp("seed", numbers["seed"]) or random.randrange(1, 2**31)  # one for all
            talk.end()
            talk.records = records = [Record() for _ in names]
            head = [dict(role="system", content=system)] if system else []
            threads = [[*thread[:at], dict(role="user", content=question)] for thread in talk.threads]
            asked = zip(records, names, threads)
            writers = [write(models, r, name, int8, "", [*head, *thread], **numbers) for r, name, thread in asked]
            # emptied once, with the first token: from then on the next question may be typed in it
            box = "" if old is None else gr.skip()
            for draw, color in together(request, records, writers):
                if talk.records is not records:  # stopped or taken back, and the page has been drawn so
                    return
                texts = records[0].text, records[-1].text  # the first model speaks for a second that may join later
                talk.threads = [[*t, dict(role="assistant", content=text)] for t, text in zip(threads, texts)]
                if draw:
                    yield [box, *talk.draw(with_tokens=color)]
                    box = gr.skip()

    def halt(talk):
        talk.end()
        return talk.draw()

    def undo(event: gr.EventData, talk):
        """The question goes back into its box."""
        with errors_as_toasts():
            at, question = talk.question(event)
        talk.end(at)
        return [question, *talk.draw()]

    def begin_anew(talk):
        talk.end(0)
        return talk.draw()

    outputs = [inputs[0], *shown]
    looks = dict(show_progress="minimal", show_progress_on=shown[1], **ONE_AT_A_TIME, **PRIVATE)
    again = [event for bot in bots for event in (bot.retry, bot.edit)]
    answers = gr.on([*sends, *again], answer, [state, *inputs], outputs, **looks)
    stopped = stop.click(halt, state, shown, cancels=answers, **QUIET)
    stopped.then(lambda talk: talk.draw(), state, shown, **QUIET)  # as in connect_panel()
    gr.on([bot.undo for bot in bots], undo, state, outputs, cancels=answers, **QUIET)
    gr.on([bot.clear for bot in bots], begin_anew, state, shown, cancels=answers, **QUIET)


def connect_refresh(demo, models: Models, run: gr.Dropdown, drawing: list, model_lists: list[gr.Dropdown], beside):
    """Every REFRESH seconds redraw what is out of date: the lists of models and runs, and the curves of the run."""
    seen = gr.State({})  # what this visitor's page was last drawn from

    def refresh(seen, run, beside, *chosen):
        names, runs = models.names(), newest_first("log.jsonl")
        if run not in runs:  # none is chosen yet, or it has gone
            run = chosen[0] if chosen[0] in runs else first(runs)
        now = dict(lists=[sorted(names), sorted(runs)])
        lists, drawn = [gr.skip()] * (len(chosen) + 2), [gr.skip()] * len(drawing)
        if now["lists"] != seen.get("lists"):
            # a chosen model that has gone stays in the list, and using it gives the error; no other is put in its place
            choices = list(dict.fromkeys([*names, *filter(None, [*chosen, beside])]))
            lists = [gr.update(choices=choices, value=name or first(names)) for name in chosen]
            lists += [gr.update(choices=[NOBODY, *choices], value=beside), gr.update(choices=runs, value=run)]
        try:
            if run is None:
                raise UserError("No log under out/ yet. Start one: python train.py config/tiny_shakespeare.py")
            now["log"] = run, *stamp(Path(run) / "log.jsonl")
            if now["log"] != seen.get("log"):
                drawn = training_view(run)
        except (UserError, OSError) as error:  # empty curves: another run's must not stay below this one's name
            now["log"] = str(error)
            if now["log"] != seen.get("log"):
                drawn = [error_html(error), None, None, None, ""]
        seen.clear()
        seen.update(now)
        return *lists, *drawn

    gr.on(
        [demo.load, gr.Timer(REFRESH).tick, run.input], refresh, [seen, run, beside, *model_lists],
        [*model_lists, beside, run, *drawing], **QUIET,
    )  # fmt: skip


def add_api(models: Models):
    """The endpoints for programs, /generate and /chat. gradio shows their signatures and docstrings."""

    def streamed(request, model, int8, prompt, messages, numbers):
        record = Record()
        with errors_as_toasts():
            name = model or first(models.names()) or ""
            for _ in write(models, record, name, int8, prompt, messages, **numbers):
                if unheard(request, record, len(record.tokens) - 1):
                    return
                yield record.text
            yield record.text

    def generate_api(
        request: gr.Request, prompt: str, max_new_tokens: int = 200, temperature: float = 0.8, top_k: int = 0,
        top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0, model: str = "",
        int8: bool = False,
    ) -> str:  # fmt: skip
        """Continue `prompt`, of which the last 4,000 characters are read; streams the text so far, without the
        prompt. model: a name from the page's list, empty for the first. Numbers are moved into their range; seed 0
        draws one; top_k 0, min_p 0 and top_p 0 or 1 are off."""
        numbers = {name: value for name, value in locals().items() if name in KNOBS}
        yield from streamed(request, model, int8, prompt, None, numbers)

    def chat_api(
        request: gr.Request, messages: list[dict], max_new_tokens: int = 512, temperature: float = 0.2, top_k: int = 0,
        top_p: float = 0.9, min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0, model: str = "",
        int8: bool = False,
    ) -> str:  # fmt: skip
        """Answer `messages`, a list of {"role": "system", "user" or "assistant", "content": text}; streams the answer
        so far. The oldest turns are left out where there are more than 20,000 characters, or than the model's context
        holds. model: one with a chat template. The rest is as in /generate."""
        numbers = {name: value for name, value in locals().items() if name in KNOBS}
        yield from streamed(request, model, int8, "", messages or [], numbers)

    gr.api(generate_api, api_name="generate", **ONE_AT_A_TIME)
    gr.api(chat_api, api_name="chat", **ONE_AT_A_TIME)


# ----------------------------------------------------------------------------------------------------------------------
# theme, CSS and JavaScript

THEME = gr.themes.Base(
    primary_hue="teal", neutral_hue="stone", radius_size="sm",
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"],
).set(
    body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950", block_shadow="none",
    body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
    input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white", button_primary_text_color_dark="white",
)  # fmt: skip

CSS = """
main.contain { max-width: 62rem; }
.html-container { padding: 0 !important; }
.sidebar .head { display: grid !important; grid-template-columns: 1fr 5.5rem; align-items: center; }
.sidebar .head label { display: contents; }
.sidebar .head .info-text { grid-column: 1 / -1; order: 3; }
.sidebar .min_value, .sidebar .max_value { display: none; }
.paper { font: 1.06rem/1.55 ui-serif, Georgia, Cambria, serif; white-space: pre-wrap; overflow-wrap: anywhere;
  min-height: 15rem; max-height: 44vh; overflow-y: auto; padding: 1.1rem 1.3rem; border-radius: 6px;
  background: var(--background-fill-primary); border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); }
.paper.follow { display: flex; flex-direction: column-reverse; } /* keeps the newest line in view */
.paper.follow > div { margin-bottom: auto; }
.paper.empty { color: var(--body-text-color-subdued); font-style: italic; }
.prompt { color: var(--body-text-color-subdued); background: var(--background-fill-secondary); border-radius: 3px; }
.caret { border-right: .5em solid var(--primary-600); margin-left: 2px; animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .caret { animation: none; } }
.talk .message-content .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.inside .paper { min-height: 5rem; }
.talk [class*=placeholder] { padding: 0 1rem; text-align: center; }
.facts, .status { color: var(--body-text-color-subdued); font-size: .88rem; min-height: 1.3em; margin: 0; }
.status.bad { color: var(--body-text-color); border-left: 4px solid #c2410c; padding: .4rem .8rem; }
.t { border-radius: 3px; padding: 1px 0; cursor: pointer; --hot: 234, 88, 12; }
.p0 { background: none; } .p1 { background: rgba(var(--hot), .12); } .p2 { background: rgba(var(--hot), .26); }
.p3 { background: rgba(var(--hot), .45); } .p4 { background: rgba(var(--hot), .68); }
.t.here { outline: 2px solid var(--primary-600); }
.legend { font-size: .85rem; margin-bottom: .6rem; color: var(--body-text-color-subdued); line-height: 2; }
.legend .t { padding: 2px 7px; color: var(--body-text-color); border: 1px solid var(--border-color-primary); }
.odds { min-height: 12.5rem; font-size: .9rem; padding: .8rem 0; color: var(--body-text-color-subdued); }
.odds p { margin: 0 0 .4rem; }
.odds div { display: grid; grid-template-columns: 8rem 1fr 3.5rem; gap: .6rem; align-items: center; }
.odds code { overflow: hidden; text-overflow: ellipsis; white-space: pre; color: var(--body-text-color); }
.odds i { height: .7rem; border-radius: 2px; background: var(--background-fill-secondary); }
.odds i::before { content: ""; display: block; height: 100%; width: var(--w); background: var(--primary-600); }
.card { width: 100%; border-collapse: collapse; }
.card th { text-align: left; vertical-align: top; width: 9rem; color: var(--body-text-color-subdued); }
.card, .card tr, .card th, .card td { border: 0 !important; }
.card tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.card th, .card td { padding: .55rem .4rem !important; overflow-wrap: anywhere; }
.card small { display: block; color: var(--body-text-color-subdued); }
.samples { max-height: 34rem; overflow-y: auto; }
.samples dt { font-size: .85rem; color: var(--primary-600); margin-top: .8rem; }
.samples dd { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.5 ui-serif, serif; }
@media (max-width: 768px) { .talk { height: 38vh !important; } }
@media (max-width: 768px) { .tab-container button { padding: 0 .35rem !important; font-size: .82rem !important; } }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 1px; }
"""

# The See inside view; gradio runs this with `element` bound to it. Each token's data-t holds its probability and the
# likeliest tokens at its place, as tokens_html() wrote them.
INSIDE_JS = """
let at = -1;
const show = (token, pinned) => {
    const [p, others] = JSON.parse(token.dataset.t), box = element.querySelector('.odds');
    element.querySelectorAll('.t.here').forEach(t => t.classList.remove('here'));
    token.classList.add('here');
    if (pinned) at = [...element.querySelectorAll('[data-t]')].indexOf(token);
    const percent = x => x >= 0.1 ? Math.round(100 * x) + '%' : (100 * x).toPrecision(2) + '%';
    const head = document.createElement('p');
    head.textContent = 'The model gave this token ' + percent(p) + '. Its first choices here were:';
    const rows = others.map(([text, q]) => {
        const row = document.createElement('div'), bar = document.createElement('i');
        row.append(Object.assign(document.createElement('code'), {textContent: text}), bar, percent(q));
        bar.style.setProperty('--w', 100 * q + '%');
        return row;
    });
    box.replaceChildren(head, ...rows);
};
element.addEventListener('mouseover', e => { if (e.target.dataset.t) show(e.target, false); });
element.addEventListener('click', e => { if (e.target.dataset.t) show(e.target, true); });
element.addEventListener('keydown', e => {
    const tokens = element.querySelectorAll('[data-t]'), step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
    if (!step || !tokens.length) return;
    e.preventDefault();
    at = Math.min(Math.max(at + step, 0), tokens.length - 1);
    show(tokens[at], true);
    tokens[at].scrollIntoView({block: 'nearest'});
});
"""

# On a phone the sidebar would lie over the page; it starts closed there, one tap away.
NARROW_JS = "() => { if (innerWidth < 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }"


# ----------------------------------------------------------------------------------------------------------------------
# serving


class Gate:
    """ASGI middleware: refuses what a foreign page in the visitor's browser sends, and what this page never sends.

    The Host must be a name of this machine, or the public link's: by DNS a foreign name can lead here, too. Its port is
    not looked at, because `ssh -L 8000:localhost:7860` is a usual way to this page.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        public = urlsplit(scope["app"].get_blocks().share_url or "").netloc
        refused = ""
        if re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost", "[::1]") and (not public or host != public):
            refused = "this Host is not served here: open http://127.0.0.1 with the port that app.py printed"
        elif origin and origin.partition("://")[2] != host:
            refused = "pages of other origins may not call the playground"
        elif headers.get("content-type", "").lower().startswith("multipart/") and scope["path"] != "/login":
            refused = "nothing can be uploaded here"

        async def unframed(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-frame-options"] = "DENY"
                MutableHeaders(scope=message)["content-security-policy"] = "frame-ancestors 'none'"
            await send(message)

        await (PlainTextResponse(refused, 403) if refused else self.app)(scope, receive, unframed)


def launch_arguments(s: Settings) -> dict:
    """How the page is served: everything that gradio would otherwise read from environment variables is set here."""
    auth = s.auth
    if auth.startswith("FILE:"):
        with read_errors_as_user_error(auth[5:], "It should hold one line, user:password."):
            auth = Path(auth[5:]).read_text(encoding="utf-8").strip()
    user, _, password = auth.partition(":")
    if s.auth and not (user and password):
        raise UserError("--auth: write --auth=user:password, or --auth=FILE:name for a file that holds user:password.")
    if s.share and not s.auth:
        raise UserError("--share=true makes a public link, so it wants a login: add --auth=user:password.")
    return dict(
        server_name="127.0.0.1", server_port=s.port, share=s.share, auth=(user, password) if s.auth else None,
        allowed_paths=[], blocked_paths=[Path.cwd().anchor], max_file_size="1kb", root_path="", enable_monitoring=False,
        run_history=False, ssr_mode=False, mcp_server=False, pwa=False, debug=False, footer_links=["api"], theme=THEME,
        num_workers=0,  # 1 is a second server on the next port, a process that outlives this one
        show_error=True,  # or the answer to what gradio itself finds wrong in a request is {"error": null}
        app_kwargs=dict(middleware=[Middleware(Gate)]), css=CSS, js=NARROW_JS, quiet=True,
    )  # fmt: skip


def serve(demo: gr.Blocks, arguments: dict):
    """The page, until Ctrl-C or a signal; then the port is free at once, whoever is connected or computing."""
    port = arguments["server_port"]
    try:
        demo.launch(**arguments, prevent_thread_lock=True)
        print(f"the playground is at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
        if arguments["share"]:
            print(f"and, with the login, at {demo.share_url or '... no, the tunnel could not be had'}", flush=True)
        while True:
            time.sleep(0.1)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        other = f"--port={port % 65535 + 1}"
        raise UserError(f"port {port} is taken, perhaps by another playground. Try: {other}") from None
    except (KeyboardInterrupt, SystemExit) as end:
        # Not the ordinary way out: a thread in the midst of a computation cannot be ended, and Python aborts over it.
        for tunnel in CURRENT_TUNNELS:
            tunnel.kill()
        leave_stdout()
        print(flush=True)  # the shell's prompt after ^C
        os._exit(end.code if isinstance(end, SystemExit) else 130)


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    arguments = launch_arguments(s)

    # the first model, so that the first visitor does not wait for it
    models = Models(s.model, pick_device(s.device), pick_dtype(s.dtype))
    name = first(models.names())
    if name:
        started = time.perf_counter()
        print(f"loading {name} ... ", end="", flush=True)
        model, _ = models.get(name)
        print(f"{model.num_parameters()['total']:,} parameters in {time.perf_counter() - started:.1f} s", flush=True)
    else:
        print("no trained model under out/ yet; the page says how to make one", flush=True)

    serve(build(models), arguments)


if __name__ == "__main__":
    run_main(main)
