"""
The playground: chat with a model, write with one or two, look inside, and watch a run learn.

    python app.py                                        # the newest run under out/, at http://127.0.0.1:7860
    python app.py --model=HuggingFaceTB/SmolLM2-135M     # a downloaded model, listed before the runs
    python app.py --auth=FILE:login.txt                  # ask for the login in this file

    from gradio_client import Client                     # the Write tab from a program: the text comes first
    Client("http://127.0.0.1:7860").predict("ROMEO:", max_new_tokens=50, seed=1, api_name="/generate")[0]

One text is generated at a time; the others wait in a queue. Visitors choose among --model and the runs under out/. The
page is served to this machine only; from another one: ssh -L 7860:localhost:7860 HOST
"""

import json
import logging
import os
import random
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from html import escape, unescape
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Literal

from lib.conversations import Template, check_messages, read_chat_template
from lib.device import pick_device, pick_dtype
from lib.files import read_errors_as_user_error
from lib.settings import UserError, Within, override, run_main

import gradio as gr
import pandas as pd
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from checkpoint import find, load, metadata, newest_run
from sample import encode_prompt, generate, stream_text


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    device: str = "auto"  # cuda, mps, cpu; auto takes the first that is available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto keeps the dtype of the file
    port: Annotated[int, Within(least=1, most=65535)] = 7860  # on 127.0.0.1, the only address that is served
    auth: str = ""  # user:password for the page and the API; FILE:login.txt reads it from a file, so that ps hides it


RUNS = Path("out")
MAX_PROMPT = 4000  # characters; of a longer prompt only the end is read
MAX_QUESTION = 20_000  # characters of a message in a chat
MAX_MESSAGES = 99  # of a longer conversation only the end is read
MAX_WAITING = 16  # requests in the queue; the next one is refused
MAX_LOADED = 2  # models in memory: Write can use two
DRAW_EVERY = 0.04  # seconds, at least, between two updates of a text: browsers fall behind a fast model otherwise
REFRESH = 3  # seconds between checks for new runs and new lines in a log
LOG_TAIL = 4_000_000  # bytes; of a longer log only the end is read
# Every number that a visitor can send: lowest, highest, default, step, label, help. gradio refuses others.
KNOBS = dict(
    max_new_tokens=(10, 1024, 200, 1, "Length", "At most this many tokens (pieces of words)."),
    temperature=(0.0, 2.0, 0.8, 0.05, "Temperature", "0 always takes the likeliest token; 2 is noise."),
    top_k=(0, 200, 0, 1, "Top-k", "Choose among this many of the likeliest tokens. 0 is off."),
    top_p=(0.0, 1.0, 1.0, 0.05, "Top-p", "Choose among the likeliest that hold this much probability. 1 is off."),
    min_p=(0.0, 0.5, 0.0, 0.01, "Min-p", "Drop tokens below this fraction of the likeliest. 0 is off."),
    repetition_penalty=(1.0, 2.0, 1.0, 0.05, "Repetition penalty", "Above 1, tokens already used become less likely."),
    seed=(0, 2**31 - 1, 0, 1, "Seed", "The same seed gives the same text. 0 draws a new one each time."),
)  # fmt: skip
CHAT_KNOBS = dict(max_new_tokens=512, temperature=0.2, top_p=0.9)  # defaults for a chat model, as in chat.py
OFF = dict(top_k=[0], top_p=[0, 1], min_p=[0])  # values that mean None to generate()


# ----------------------------------------------------------------------------------------------------------------------
# models and their texts


def newest_first(name: str) -> list[str]:
    """Lists the runs that have a file of this name, the one written last first."""
    found = []
    for file in RUNS.glob(f"*/{name}"):
        with suppress(OSError):  # a run may be deleted at any moment
            found.append((file.stat().st_mtime, str(file.parent)))
    return [run for _, run in sorted(found, reverse=True)]


class Models:
    """Loads the models that visitors may choose, once for all of them, and again when their files change."""

    def __init__(self, path: str, device: str, dtype):
        """path: of --model. No other hub id is ever downloaded."""
        self.given = {str(Path(path)): find(path)} if path else {}
        self.device, self.dtype = device, dtype
        self.loaded = {}  # {(name, int8): (files, model, tokenizer)}, the latest used last
        self.lock = threading.Lock()

    def choices(self) -> dict[str, Path]:
        """Returns {name: folder}: --model first, then the runs, the newest first."""
        return self.given | {run: Path(run) for run in newest_first("model.safetensors")}

    def get(self, name: str, int8: bool = False):
        """Returns folder, model and tokenizer. Raises UserError if the model is gone, untrained or damaged."""
        with self.lock:
            choices = self.choices()
            if not choices:
                newest_run(RUNS)  # raises a UserError that says how to train one
            if name not in list(choices):
                raise UserError(f"{name!r}: no such model here (any more). Choose one of: {', '.join(choices)}.")
            folder = choices[name]
            if "untrained" in metadata(folder):
                raise UserError(f"{name} has not been trained yet: it holds random weights until its first evaluation.")
            kept = [file for file in sorted(folder.glob("*")) if file.suffix in (".json", ".safetensors")]
            files = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in kept]
            entry = self.loaded.pop((name, int8), None)
            if entry is None or entry[0] != files:
                while len(self.loaded) >= MAX_LOADED:
                    del self.loaded[next(iter(self.loaded))]  # the least recently used
                entry = (files, *load(folder, self.device, self.dtype, "int8" if int8 else ""))
            self.loaded[name, int8] = entry
            return folder, *entry[1:]


@dataclass
class Token:
    text: str  # empty for a special token
    name: str  # with white space and special tokens made visible
    p: float  # the model's own probability, before temperature and filters
    odds: dict[str, float]  # the likeliest tokens at this place, by name


@dataclass
class Record:
    """A text while it is generated, and afterwards. The page is drawn from it."""

    prompt: str = ""
    tokens: list[Token] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # the model's time for each token
    seed: int = 0
    why: str = ""  # the reason why it ended; to end it early, set this

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def write(models: Models, record: Record, name: str, int8: bool, prompt: str, messages=None, **knobs):
    """Returns an iterator that fills `record`, a token at a step: a continuation of `prompt`, or, if there are
    messages, the answer to the last of them. Loads the model and checks everything before it returns."""
    record.seed = knobs["seed"] = knobs["seed"] or random.randrange(1, 2**31)
    length = knobs["max_new_tokens"] = int(knobs["max_new_tokens"])
    knobs = {key: None if value in OFF.get(key, []) else value for key, value in knobs.items()}
    folder, model, tokenizer = models.get(name, int8)
    context = model.config.max_position_embeddings
    if messages is None:
        record.prompt = prompt[-MAX_PROMPT:]
        ids = encode_prompt(tokenizer, record.prompt, context)
    else:
        record.prompt = messages[-1]["content"] + "\n"
        template = Template.of(folder, tokenizer)
        ids, _ = template.fit(check_messages(messages), context, min(length, context // 4))
    return fill(record, generate(model, ids, **knobs, with_logits=True), tokenizer, length)


def fill(record: Record, steps, tokenizer, length: int):
    """Adds each token of `steps` to `record`, then yields. Ends once record.why is set."""

    def name(i: int) -> str:
        text = tokenizer.decode([i], skip_special_tokens=False)
        return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(nothing)"

    def ids():
        started = time.perf_counter()
        for new, logits in steps:  # (1,), (1, V)
            probability = logits[0].float().softmax(-1)
            top = probability.topk(min(6, len(probability)))
            likely = zip(reversed(top.indices.tolist()), reversed(top.values.tolist()))  # the first of two alike stays
            odds = {name(i): p for i, p in likely}
            record.tokens.append(Token("", name(int(new)), float(probability[new[0]]), odds))
            record.seconds.append(time.perf_counter() - started)
            yield new
            if record.why:
                return
            started = time.perf_counter()
        record.why = "the model ended the text" if len(record.tokens) < length else "it reached the length that was set"

    for piece in stream_text(tokenizer, ids()):
        record.tokens[-1].text += piece  # a character that spans tokens belongs to the last of them
        yield


def paced(records: list[Record], writers: list):
    """Runs the writers a token each in turn. Yields when it is time to draw: at first, at the end or after an error,
    and between them so that drawing takes a fifth of the time at most."""
    yield
    due = time.perf_counter() + DRAW_EVERY
    try:
        for _ in zip_longest(*writers):
            started = time.perf_counter()
            if started >= due:
                yield
                drawn = time.perf_counter()
                due = drawn + max(DRAW_EVERY, 4 * (drawn - started))
    except Exception:
        for record in records:
            record.why = record.why or "an error"
        yield
        raise
    yield


@contextmanager
def errors_as_toasts():
    """Turns a user's mistake into a message in the corner of the page, or an AppError in gradio_client."""
    try:
        yield
    except (UserError, OSError) as error:
        raise gr.Error(escape(str(error), quote=False), duration=20, print_exception=False) from None


# ----------------------------------------------------------------------------------------------------------------------
# what the page shows


def note_html(*facts, bad: bool = False) -> str:
    """A line of small print, or an error."""
    return f'<p class="note{" bad" * bad}">{escape(" · ".join(facts))}</p>'


def shown_text(record: Record | None) -> tuple[str, str]:
    """The text with its prompt, and a line about it: length, speed, seed, and why it stopped."""
    if record is None:
        return "", note_html()
    facts, n = [f"seed {record.seed}"], len(record.tokens)
    if n > 1:
        speed = (n - 1) / sum(record.seconds[1:])
        facts = [f"{n} tokens", f"{speed:.0f} a second after {record.seconds[0]:.2f} s", *facts]
    if record.why:
        facts.append(f"stopped: {record.why}")
    return record.prompt + record.text, note_html(*facts)


SHADES = {"almost certain": 0.8, "likely": 0.5, "one of a few": 0.2, "unusual": 0.05, "a long shot": 0.0}  # at least
COLORS = dict(zip(SHADES, ["transparent", "#fdba74", "#fb923c", "#f97316", "#dc2626"]))


def shown_tokens(record: Record | None) -> list[tuple[str, str | None]]:
    """The prompt, then each token with the name of its color."""
    if record is None:
        return []
    shade = lambda p: next(name for name, least in SHADES.items() if p >= least)
    return [(record.prompt, None), *((token.text or token.name, shade(token.p)) for token in record.tokens)]


def describe(models: Models, name: str, int8: bool) -> tuple[str, dict]:
    """The line at the top of the page and the facts of the Model tab, all from the files."""
    try:
        folder, model, _ = models.get(name, int8)
        facts, count = metadata(folder), model.num_parameters()["total"]
    except (UserError, OSError) as error:
        return note_html(str(error), bad=True), {}
    line = [f"{key} {facts[key]:.6}" for key in ("step", "val_loss", "val_bpb") if key in facts]
    weights = f"{'int8' if int8 else model.dtype} on {model.device}"
    card = dict(directory=str(folder), parameters=count, weights=weights, **asdict(model.config), **facts)
    return note_html(name, f"{count / 1e6:.1f} million parameters", *line), card


def training_view(run: str | None):
    """A line of facts; tables for the curves of loss, learning rate and speed; the samples. All from log.jsonl."""
    if run is None:
        raise UserError("No log under out/ yet. Start a run: python train.py config/tiny_shakespeare.py")
    rows = []
    with open(Path(run) / "log.jsonl", "rb") as f:
        start = max(0, f.seek(0, os.SEEK_END) - LOG_TAIL)
        f.seek(start)
        for line in f.read(LOG_TAIL).split(b"\n")[bool(start) : -1]:  # without half a line at either end
            with suppress(ValueError):
                rows.append(json.loads(line))
    log = pd.DataFrame(rows, columns=["step", "loss", "val_loss", "val_bpb", "lr", "tok_per_s"])
    log = log.apply(pd.to_numeric, errors="coerce")
    log = log.where(log.abs() < 2**53)  # what cannot be drawn becomes a gap
    samples = [f"step {row['step']}\n{row['sample']}\n" for row in rows if "sample" in row]

    facts = [run, f"step {log.step.max():,.0f}"]
    loss = log.rename(columns=dict(loss="training", val_loss="validation"))
    loss = loss.melt("step", ["training", "validation"], "curve", "loss").dropna()
    if log.val_loss.notna().any():
        best = log.loc[log.val_loss.idxmin()]
        facts.append(f"best at step {best.step:,.0f}: {best.val_loss:.3f} nats, {best.val_bpb:.3f} bits per byte")
    tables = [table.dropna() for table in (loss, log[["step", "lr"]], log[["step", "tok_per_s"]])]
    return note_html(*facts), *(table[:: 1 + len(table) // 800] for table in tables), "\n".join(samples[-50:])


# ----------------------------------------------------------------------------------------------------------------------
# the page: one function a tab, with its layout first and its events below

ONE_AT_A_TIME = dict(concurrency_id="model", concurrency_limit=1)  # shared by everything that generates
QUIET = dict(queue=False, show_progress="hidden", api_visibility="private")
NOBODY = ("none", "")  # in the list of second models
BOX = dict(lines=1, max_lines=8, submit_btn=True, stop_btn=True)


@dataclass
class Visit:
    """What a visitor's page shows. It changes in place, so that Stop sees a text while it is generated."""

    messages: list[dict] = field(default_factory=list)  # of Chat, up to the last question
    answer: Record | None = None  # to the last question
    texts: list[Record] = field(default_factory=list)  # of Write: one or two
    last: Record | None = None  # in See inside

    def stop(self):
        for record in filter(None, [self.answer, *self.texts]):
            record.why = record.why or "you stopped it"
        return self

    def conversation(self) -> list[dict]:
        answer = [dict(role="assistant", content=self.answer.text)] if self.answer else []
        return self.messages + answer

    def cut(self, at: int):
        """Forgets the conversation from message `at` on."""
        self.messages, self.answer = self.stop().conversation()[:at], None
        return self

    def draw_chat(self) -> list:
        """A Chatbot renders HTML even if it is told not to render Markdown, so messages are escaped; and of a plain
        string, unlike of a dictionary, it strips the indentation."""
        escaped = lambda text: dict(type="text", text=escape(text, quote=False))
        shown = [dict(role=m["role"], content=escaped(m["content"])) for m in self.conversation()]
        return [shown, shown_text(self.answer)[1], shown_tokens(self.answer)]

    def draw_texts(self) -> list:
        first, second = [*self.texts, None, None][:2]
        return [*shown_text(first), *shown_text(second), shown_tokens(first)]


def build(models: Models) -> gr.Blocks:
    """The whole page. Nothing is loaded or served before it is launched."""
    names, can_chat = list(models.choices()), False
    with suppress(UserError):
        can_chat = bool(names) and read_chat_template(models.choices()[names[0]]) is not None
    with gr.Blocks(title="nanoSmol playground", fill_width=True, analytics_enabled=False) as demo:
        visit, clock = gr.State(Visit()), gr.Timer(REFRESH)  # in a tab, it would tick in that tab only
        with gr.Sidebar(width=320):
            model = gr.Dropdown(names, label="Model", info="The runs under out/, the newest first.")
            int8 = gr.Checkbox(False, label="int8 weights", info="A quarter of the memory; slightly less exact.")
            chosen = [model, int8]  # what a text is made with
            for name, (low, high, default, step, label, hint) in KNOBS.items():
                value = CHAT_KNOBS.get(name, default) if can_chat else default
                looks = dict(minimum=low, maximum=high, value=value, step=step, label=label, info=hint)
                chosen.append(gr.Number(**looks, precision=0) if name == "seed" else gr.Slider(**looks, buttons=[]))
        gr.Markdown("# nanoSmol playground")
        status = gr.HTML()
        label = "The last text of Chat or Write. Select a token to see what else was likely at its place."
        tokens = gr.HighlightedText(label=label, color_map=COLORS, show_legend=True, elem_id="inside", render=False)
        with gr.Tabs(selected="chat" if can_chat else "write"):
            with gr.Tab("Chat", id="chat"):
                chat_tab(models, visit, chosen, tokens, autofocus=can_chat)
            with gr.Tab("Write", id="write"):
                beside = write_tab(models, visit, names, chosen, tokens, autofocus=not can_chat)
            with gr.Tab("See inside"):
                tokens.render()
                odds = gr.Label(label="What else was likely", show_heading=False, elem_id="odds")
            with gr.Tab("Training"):
                training_tab([demo.load, clock.tick], models, model, beside)
            with gr.Tab("Model"):
                card = gr.JSON(show_label=False, open=True)

        def alternatives(event: gr.SelectData, visit):
            token = visit.last.tokens[max(event.index - 1, 0)]  # 0 is the prompt
            return token.odds | {token.name: token.p}

        tokens.select(alternatives, visit, odds, **QUIET)
        about = lambda name, int8: describe(models, name, int8)
        gr.on([demo.load, model.change, int8.change], about, [model, int8], [status, card], **QUIET)
    return demo.queue(max_size=MAX_WAITING, api_open=False)  # open, /run and /api would compute beside the queue


def chat_tab(models: Models, visit: gr.State, chosen: list, tokens: gr.HighlightedText, autofocus: bool):
    """A conversation. The Chatbot brings the buttons for retry, undo, edit and clear."""
    bot = gr.Chatbot(
        show_label=False, render_markdown=False, allow_tags=False, latex_delimiters=[], editable="user",
        group_consecutive_messages=False, buttons=[], feedback_options=None, height="50vh", elem_classes="talk",
        placeholder="Ask something. The model may be wrong, and sound sure.",
    )  # fmt: skip
    note = gr.HTML(note_html())
    hint = "Enter sends, Shift+Enter makes a new line."
    prompt = gr.Textbox(label="Message", placeholder=hint, elem_id="say", autofocus=autofocus, **BOX)
    hint = "Who the model is, or how it should answer. Empty: what its template says."
    system = gr.Textbox(label="System message", placeholder=hint, lines=1, max_lines=8)
    sent = gr.Textbox(visible=False)  # a number and the message that is being answered

    def answer(visit, at, question, system, name, int8, *knobs):
        """Answers `question` as message `at` and forgets what followed it."""
        with errors_as_toasts():
            if not question.strip() or len(question) > MAX_QUESTION:
                raise UserError(f"the message is empty or longer than {MAX_QUESTION:,} characters.")
            record, messages = Record(), [*visit.conversation()[:at], dict(role="user", content=question)]
            read = [dict(role="system", content=system)] * bool(system) + messages[-MAX_MESSAGES:]
            writer = write(models, record, name, int8, "", read, **dict(zip(KNOBS, knobs)))
            visit.messages, visit.answer, visit.last = messages, record, record
            for _ in paced([record], [writer]):
                yield visit.draw_chat()

    def send(visit, prompt, *rest):
        number = time.monotonic_ns()
        for drawn in answer(visit, len(visit.conversation()), prompt, *rest):
            yield [f"{number} {prompt}", *drawn]

    def again(event: gr.EventData, visit, *rest):
        """Retry, or a question that was edited."""
        yield from answer(visit, event.index - event.index % 2, unescape(event.value), *rest)

    def undo(event: gr.UndoData, visit, prompt):
        """The question goes back into its box, above what was typed there meanwhile."""
        visit.cut(event.index - event.index % 2)
        return ["\n".join(filter(None, [unescape(event.value), prompt])), *visit.draw_chat()]

    stop, clear = lambda visit: visit.stop().draw_chat(), lambda visit: visit.cut(0).draw_chat()
    shown = [bot, note, tokens]
    looks = dict(show_progress="minimal", show_progress_on=note, api_visibility="private", **ONE_AT_A_TIME)
    answers = [
        prompt.submit(send, [visit, prompt, system, *chosen], [sent, *shown], **looks),
        gr.on([bot.retry, bot.edit], again, [visit, system, *chosen], shown, **looks),
    ]
    # The box is emptied when its message is being answered, unless something else has been typed by then.
    js = "(sent, box) => box === sent.slice(sent.indexOf(' ') + 1) ? '' : box"
    sent.change(None, [sent, prompt], prompt, js=js, **QUIET)
    # twice, because a token on its way may be drawn over the first
    prompt.stop(stop, visit, shown, cancels=answers, **QUIET).then(stop, visit, shown, **QUIET)
    bot.undo(undo, [visit, prompt], [prompt, *shown], cancels=answers, **QUIET)
    bot.clear(clear, visit, shown, cancels=answers, **QUIET)


def write_tab(models: Models, visit: gr.State, names: list[str], chosen: list, tokens, autofocus: bool) -> gr.Dropdown:
    """A text, or two side by side. Returns the list of second models."""
    hint = "Begin a text; the model continues it. Enter sends, Shift+Enter makes a new line."
    prompt = gr.Textbox(label="Prompt", placeholder=hint, elem_id="prompt", autofocus=autofocus, **BOX)
    shown, looks = [], dict(lines=10, max_lines=10, interactive=False, buttons=["copy"])
    with gr.Row():
        for n in (1, 2):
            with gr.Column(min_width=280, visible=n == 1) as column:
                shown += [gr.Textbox(label="Text", elem_id=f"text{n}", **looks), gr.HTML(note_html())]
    gr.Examples(["ROMEO:", "To be, or not to be,", "Once upon a time", "The sea was calm and"], prompt)
    hint = "A second model continues the same prompt with the same settings and seed."
    beside = gr.Dropdown([NOBODY, *names], value="", label="Compare with", info=hint)
    shown.append(tokens)

    def start(
        visit, prompt, beside, model, int8, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed
    ):  # gradio shows these names to programs
        knobs = {key: value for key, value in locals().items() if key in KNOBS}
        with errors_as_toasts():
            knobs["seed"] = seed or random.randrange(1, 2**31)  # one for both
            pairs = [(Record(), name) for name in [model] + [beside] * bool(beside)]
            writers = [write(models, record, name, int8, prompt, **knobs) for record, name in pairs]
            visit.stop().texts = [record for record, _ in pairs]
            visit.last = visit.texts[0]
            for _ in paced(visit.texts, writers):
                yield visit.draw_texts()

    stop = lambda visit: visit.stop().draw_texts()
    beside.change(lambda name: gr.update(visible=bool(name)), beside, column, **QUIET)
    looks = dict(show_progress="minimal", show_progress_on=shown[1], api_name="generate", **ONE_AT_A_TIME)
    writing = prompt.submit(start, [visit, prompt, beside, *chosen], shown, **looks)
    prompt.stop(stop, visit, shown, cancels=writing, **QUIET).then(stop, visit, shown, **QUIET)
    return beside


def training_tab(ticks: list, models: Models, model: gr.Dropdown, beside: gr.Dropdown):
    """The curves of a run. Its timer also keeps the lists of models up to date."""
    run = gr.Dropdown(newest_first("log.jsonl"), value=None, label="Run", info="Redrawn while the run continues.")
    note = gr.HTML()
    colors = {"training": "#8aa0a8", "validation": "#0d9488"}
    loss = gr.LinePlot(x="step", y="loss", color="curve", color_title=" ", color_map=colors, height=300, elem_id="loss")
    with gr.Row():
        small = dict(x="step", min_width=280, y_lim=[0, None], height=220)
        rate = gr.LinePlot(y="lr", y_title="learning rate", **small)
        speed = gr.LinePlot(y="tok_per_s", y_title="tokens per second", **small)
    samples = gr.Textbox(label="Samples during training", lines=8, max_lines=20, interactive=False, elem_id="samples")
    seen = gr.State({})  # what this visitor's page was last drawn from

    def refresh(seen, run, name, beside):
        names, runs = list(models.choices()), newest_first("log.jsonl")
        if run not in runs:  # none is chosen yet, or it has been deleted
            run = name if name in runs else next(iter(runs), None)
        lists, drawn = [gr.skip()] * 3, [gr.skip()] * 5
        if [names, runs] != seen.get("lists"):
            # a chosen model that was deleted stays in the list, and using it is an error; none replaces it
            choices = list(dict.fromkeys([*names, *filter(None, [name, beside])]))
            lists = [choices, name or next(iter(names), None)], [[NOBODY, *choices], beside], [runs, run]
            lists = [gr.update(choices=choices, value=value) for choices, value in lists]
        try:
            log = run, run and (Path(run) / "log.jsonl").stat().st_mtime_ns
            if log != seen.get("log"):
                drawn = training_view(run)
        except (UserError, OSError) as error:  # empty curves: another run's must not stay below this one's name
            log, drawn = None, [note_html(str(error), bad=True), None, None, None, ""]
        seen.update(lists=[names, runs], log=log)
        return *lists, *drawn

    shown = [model, beside, run, note, loss, rate, speed, samples]
    gr.on([*ticks, run.input], refresh, [seen, run, model, beside], shown, **QUIET)


FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # the machine's own
THEME = gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="sm", **FONTS)
THEME.set(block_info_text_color="*neutral_500", input_placeholder_color_dark="*neutral_400")
CSS = """
main.contain { max-width: 62rem; }
.html-container { padding: 0 !important; }
.note { font-size: .88rem; min-height: 1.3em; margin: 0; opacity: .85; }
.note.bad { border-left: 4px solid #c2410c; padding: .4rem .8rem; opacity: 1; }
#text1 textarea, #text2 textarea, #samples textarea { font: 1.06rem/1.55 ui-serif, Georgia, serif; }
.talk .message-content .md { white-space: pre-wrap; overflow-wrap: anywhere; }
.submit-button, .stop-button { margin-left: .4rem !important; }
.talk [class*=placeholder] { padding: 0 1rem; text-align: center; }
#inside * { color: var(--body-text-color) !important; }
@media (max-width: 768px) { .talk { height: 38vh !important; }
  .tab-container button { padding: 0 .35rem !important; font-size: .82rem !important; } }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 1px; }
"""

# On a phone the sidebar would cover the page, so it starts closed there.
NARROW_JS = "() => { if (innerWidth < 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }"


# ----------------------------------------------------------------------------------------------------------------------
# serving


def gate(app):
    """Wraps an ASGI app against other sites that are open in a visitor's browser: they can send requests to 127.0.0.1,
    or show this page invisibly on top of theirs. The policy also keeps the page from loading anything elsewhere."""
    policy = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"

    async def gated(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["content-security-policy"] = policy
            await send(message)

        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        foreign = headers.get("origin") not in (None, f"http://{headers.get('host')}")
        answer = PlainTextResponse("pages of other origins may not call the playground", 403) if foreign else app
        await answer(scope, receive, send_with_policy)

    return gated


def launch_arguments(s: Settings) -> dict:
    """How the page is served. Sets everything that gradio would otherwise read from environment variables."""
    auth = s.auth
    if auth.startswith("FILE:"):
        with read_errors_as_user_error(auth[5:], "It should hold one line, user:password."):
            auth = Path(auth[5:]).read_text(encoding="utf-8").strip()
    user, _, password = auth.partition(":")
    if s.auth and not (user and password):
        raise UserError("--auth: write --auth=user:password, or --auth=FILE:name for a file that holds user:password.")
    # DNS rebinding: by its own name another site can lead here, too. Any port is right, because of ssh -L.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"], www_redirect=False)
    return dict(
        server_name="127.0.0.1", server_port=s.port, share=False, auth=(user, password) if s.auth else None,
        allowed_paths=[], blocked_paths=[Path.cwd().anchor], max_file_size="1kb", root_path="", enable_monitoring=False,
        run_history=False, ssr_mode=False, mcp_server=False, pwa=False, debug=False, footer_links=["api"], theme=THEME,
        num_workers=0,  # 1 starts a second server on the next port, a process that outlives this one
        show_error=True,  # otherwise a request that gradio refuses gets {"error": null}
        app_kwargs=dict(middleware=[hosts, Middleware(gate)]), css=CSS, js=NARROW_JS, quiet=True,
    )  # fmt: skip


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    arguments = launch_arguments(s)
    models = Models(s.model, pick_device(s.device), pick_dtype(s.dtype))
    for name in list(models.choices())[:1]:
        print(f"loading {name} ...", flush=True)
        models.get(name)  # now, so that the first visitor does not wait for it
    demo = build(models)
    try:
        demo.launch(**arguments, prevent_thread_lock=True)
        print(f"the playground is at http://127.0.0.1:{s.port} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(1)
    except OSError:
        raise UserError(f"port {s.port} is taken, perhaps by another playground. Try: --port={s.port + 1}") from None
    finally:  # Ctrl-C, or a signal, which run_main() turns into an exception
        if demo.is_running:
            logging.disable()  # no traceback for each connection that is cut
            demo.server.force_exit = True  # does not wait for pages that are open
            demo.close(verbose=False)


if __name__ == "__main__":
    run_main(main)
