"""
The playground: write with a model, look inside it, compare two, watch one learn.

    python app.py                                        # the newest run under out/, at http://127.0.0.1:7860
    python app.py --model=HuggingFaceTB/SmolLM2-135M     # a downloaded model, beside the runs
    python app.py --share=true --auth=ada:a-long-secret  # a public link (gradio's tunnel) that asks for a login

    from gradio_client import Client                     # the same from a program
    Client("http://127.0.0.1:7860").predict("ROMEO:", max_new_tokens=50, seed=1, api_name="/generate")

One generation runs at a time, the others wait in a queue; each has a cache and a random generator of its own. Visitors
choose among the runs under out/ and --model, and cannot name another path. Nothing is fetched from another host.
"""

import html
import json
import os
import random
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import gradio as gr
import pandas as pd

from config import UserError, guard, override
from model import ModelError
from sample import file_sha256, find, generate, load, metadata, newest_run, pick_device, pick_dtype, stream_text


@dataclass
class Settings:
    model: str = ""  # model directory or hub id; empty: the newest run under out/
    device: str = "auto"  # cuda, mps, cpu; auto takes the first there is
    dtype: str = "auto"  # float32 or bfloat16; auto is what the file holds
    port: int = 7860  # of 127.0.0.1, the only address the page is served on
    share: bool = False  # a public link through gradio's tunnel; only with --auth
    auth: str = ""  # user:password that the page and the API ask for; empty: no login


RUNS = Path("out")
MAX_PROMPT = 4000  # characters; of a longer prompt the end is read
MAX_WAITING = 16  # requests in the queue; the next one is told to come back later
REFRESH = 3  # seconds between looks at the disk, for new runs and new lines in a log
LOADED_AT_ONCE = 2  # models kept in memory: the two that Compare wants
# Every number a visitor can send: lowest, highest, default, step, name, help. The page and the server both go by this.
KNOBS = dict(
    max_new_tokens=(10, 1024, 200, 1, "Length", "At most so many tokens (pieces of words); the model may end sooner."),
    temperature=(0.0, 2.0, 0.8, 0.05, "Temperature", "0 always takes the likeliest token; 1 is lively; 2 is noise."),
    top_k=(0, 200, 0, 1, "Top-k", "Choose among this many of the likeliest tokens only. 0 is off."),
    top_p=(0.05, 1.0, 1.0, 0.05, "Top-p", "Choose among the likeliest tokens that make up this share. 1 is off."),
    min_p=(0.0, 0.5, 0.0, 0.01, "Min-p", "Drop tokens this much less likely than the likeliest. 0 is off."),
    repetition_penalty=(1.0, 2.0, 1.0, 0.05, "Repetition penalty", "Above 1, words already used become less likely."),
    seed=(0, 2**31 - 1, 0, 1, "Seed", "The same number gives the same text again. 0 draws a new one each time."),
)  # fmt: skip
EXAMPLES = ["ROMEO:", "To be, or not to be,", "Once upon a time", "The sea was calm and"]


def clamp(name: str, value) -> int | float:
    """`value` moved into the range of its knob; UserError if it is no number."""
    low, high, default, *_ = KNOBS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise UserError(f"{name}={value!r}: expected a number from {low} to {high}.")
    return type(default)(min(max(value, low), high))


def stamp(file: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    return file.stat().st_mtime_ns, file.stat().st_size


def newest_first(name: str) -> list[str]:
    """The runs that have a file of this name, the one written last first."""
    found = []
    for file in RUNS.glob(f"*/{name}"):
        with suppress(OSError):  # a run may be deleted at any moment
            found.append((file.stat().st_mtime, str(file.parent)))
    return [run for _, run in sorted(found, reverse=True)]


# ----------------------------------------------------------------------------------------------------------------------
# models


class Models:
    """The models a visitor may choose, loaded at first use and shared. A change on disk is noticed at the next use."""

    def __init__(self, given: str, device: str, dtype):
        self.given_folder = find(given) if given else None  # a hub id touches the network here or never
        self.given = str(Path(given)) if given and Path(given).is_dir() else given
        self.device, self.dtype = device, dtype
        self.loaded = {}  # (name, int8) -> (files on disk, model, tokenizer), the latest used last
        self.lock = threading.Lock()

    def names(self) -> list[str]:
        """What can be chosen: --model first, then the runs, the newest first."""
        return list(dict.fromkeys(filter(None, [self.given, *newest_first("model.safetensors")])))

    def folder(self, name: str) -> Path:
        if name and name == self.given:
            return self.given_folder
        if not name or name not in self.names():
            newest_run(RUNS)  # says what to run if there is no model at all
            raise UserError(f"{name or '?'}: no such model here (any more). Choose one of: {', '.join(self.names())}.")
        return Path(name)

    def get(self, name: str, int8: bool = False):
        """Model, tokenizer; ModelError or UserError where it has gone or is damaged: never another one in its place."""
        with self.lock:
            folder = self.folder(name)
            weights = sorted(folder.glob("*.safetensors"))
            if not weights:
                self.loaded.pop((name, int8), None)
                raise ModelError(f"{name} has gone from the disk. Choose another model, or train it again.")
            files = [(f.name, *stamp(f)) for f in [*weights, *sorted(folder.glob("*.json"))]]
            if "untrained" in metadata(folder):
                raise UserError(f"{name} has not been trained yet: it holds random weights until its first evaluation.")
            old = self.loaded.pop((name, int8), None)
            if old is None or old[0] != files:
                while len(self.loaded) >= LOADED_AT_ONCE:
                    del self.loaded[next(iter(self.loaded))]
                new = (files, *load(folder, self.device, self.dtype, "int8" if int8 else ""))
                if old:
                    gr.Info(f"{name} has changed on disk and was loaded again.")
                old = new
            self.loaded[name, int8] = old
            return old[1:]


# ----------------------------------------------------------------------------------------------------------------------
# one request


@dataclass
class Token:
    text: str
    ends: bool  # it is one that ends a text
    p: float  # the model's own probability, before temperature and the filters
    others: list[tuple[str, float]]  # the likeliest tokens at this place, with their probabilities


@dataclass
class Record:
    """One continuation, filled while it is made; the page is drawn from it."""

    prompt: str = ""
    tokens: list[Token] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # the model's time for each token
    seed: int = 0
    stopped: bool = False  # somebody wants it to end
    why: str = ""  # it ended; empty while it goes on

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def spell(tokenizer, i: int) -> str:
    """A token of its own, for the list of alternatives, with white space made visible."""
    text = tokenizer.decode([i], skip_special_tokens=False)
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "(nothing)"


def write(models: Models, record: Record, name: str, int8: bool, prompt: str, **numbers):
    """Fill `record` with a continuation of `prompt`. Yields after every token, so that closing this iterator, or
    setting record.stopped, ends the computation with the token at hand."""
    numbers = {key: clamp(key, value) for key, value in numbers.items()}
    if not isinstance(prompt, str):
        raise UserError("the prompt must be text.")
    record.seed = numbers["seed"] = numbers["seed"] or random.randrange(1, 2**31)
    record.prompt = prompt[-MAX_PROMPT:]
    model, tokenizer = models.get(name, int8)
    # an empty prompt begins where a text begins: after a line break, as in sample.py
    prompt_ids = tokenizer.encode(record.prompt or "\n", add_special_tokens=False).ids
    numbers["top_k"] = numbers["top_k"] or None  # 0 is how the page says "off"
    steps = generate(model, prompt_ids, **numbers, with_logits=True)

    def recorded():
        while not record.stopped:
            started = time.perf_counter()
            step = next(steps, None)
            if step is None:
                ended = record.tokens[-1].ends
                record.why = "the model ended the text" if ended else "it reached the length that was set"
                return
            new, logits = step
            probability = logits[0].float().softmax(-1)
            top = probability.topk(min(6, len(probability)))
            others = [(spell(tokenizer, i), p) for i, p in zip(top.indices.tolist(), top.values.tolist())]
            record.tokens.append(Token("", int(new) in model.config.eos_ids, float(probability[new[0]]), others))
            record.seconds.append(time.perf_counter() - started)
            yield new
        record.why = "you stopped it"

    for piece in stream_text(tokenizer, recorded()):
        record.tokens[-1].text += piece  # a character that spans tokens belongs to the last of them
        yield


@contextmanager
def toasts():
    """A mistake becomes a message in the corner of the page, or an AppError in gradio_client; the app goes on."""
    try:
        yield
    except (UserError, ModelError, OSError) as error:
        raise gr.Error(html.escape(str(error), quote=False), duration=20, print_exception=False) from None


# ----------------------------------------------------------------------------------------------------------------------
# HTML: everything that came from a model, a file or a visitor goes through escape()

escape = html.escape


def bad(message) -> str:
    return f'<p class="status bad">{escape(str(message))}</p>'


def page(record: Record | None) -> str:
    """The prompt, set off, and what the model wrote."""
    if record is None:
        return '<div class="paper empty">The text will appear here.</div>'
    caret = "" if record.why else '<span class="caret"></span>'
    text = f'<span class="prompt">{escape(record.prompt)}</span><span class="wrote">{escape(record.text)}</span>{caret}'
    return f'<div class="paper follow" tabindex="0" role="region" aria-label="The text"><div>{text}</div></div>'


def summary(record: Record | None) -> str:
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


def inside(record: Record | None) -> str:
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


def table(rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}<small>{escape(c)}</small></td></tr>" for a, b, c in rows)
    return f'<table class="card">{cells}</table>'


def facts(models: Models, name: str, int8: bool) -> tuple[str, str]:
    """A line for the top of the page and the table of the Model tab, from the files and the loaded model alone."""
    try:
        model, tokenizer = models.get(name, int8)
        folder = models.folder(name)
        meta, c, n = metadata(folder), model.config, model.num_parameters()
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6
        sha256 = file_sha256(folder / "tokenizer.json")
    except (UserError, ModelError, OSError) as error:
        return bad(error), bad(error)
    line, number = [name, f"{n['total'] / 1e6:.1f} million parameters"], "{:,}".format
    rows = [
        ("Directory", str(folder), "everything below is read from the files there"),
        ("Parameters", number(n["total"]), f"of these {number(n['embeddings'])} in the table of tokens"),
        ("Layers", number(c.num_hidden_layers), "each lets a token look back at the others, then works on it alone"),
        ("Width", number(c.hidden_size), f"numbers that stand for a token; {c.intermediate_size} inside an MLP"),
        ("Heads", f"{c.num_attention_heads} for queries, {c.num_key_value_heads} for keys", f"each {c.head_dim} wide"),
        ("Context", f"{number(c.max_position_embeddings)} tokens", "how far back it can look in a text"),
        ("Vocabulary", f"{number(tokenizer.get_vocab_size())} tokens", f"tokenizer.json, sha256 {sha256[:12]}"),
        ("Weights", f"{'int8' if int8 else str(model.dtype)[6:]} on {model.device}", f"{size:.1f} MB on disk"),
    ]  # fmt: skip
    if "step" in meta:
        line.append(f"step {int(meta['step']):,}")
        rows.append(("Training step", number(int(meta["step"])), "the one with the lowest validation loss so far"))
    if "val_bpb" in meta:
        bpb = f"{float(meta['val_bpb']):.3f} bits per byte"
        line.append(bpb)
        rows.append(("Validation", bpb, "what it takes to encode text it never saw; less is better"))
    return f'<p class="status">{escape(" · ".join(line))}</p>', table(rows)


# ----------------------------------------------------------------------------------------------------------------------
# training


def read_log(run: str) -> list[dict]:
    """The lines of log.jsonl. The last may be half written while the run goes on: what does not parse is left out."""
    rows = []
    for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def curve(rows: list[dict], key: str, name: str, most: int = 400) -> list[tuple[int, float, str]]:
    """(step, value, name) of one curve, thinned to about `most` points: a page cannot show more."""
    points = [(r["step"], r[key], name) for r in rows if isinstance(r.get(key), int | float) and r[key] == r[key]]
    every = max(1, len(points) // most)
    return points[::every] + points[-1:] * (every > 1)


def training(run: str):
    """What the Training tab shows of a run: a line of facts, three tables of points, the samples of text."""
    rows = read_log(run)
    evals = [r for r in rows if "val_loss" in r]
    loss = curve(rows, "loss", "training") + curve(evals, "val_loss", "validation")
    line = [run, f"step {max((r['step'] for r in rows), default=0):,}"]
    if evals:
        best = min(evals, key=lambda r: r["val_loss"])
        ys = [y for _, y, _ in loss]
        loss += [(best["step"], min(ys), "best"), (best["step"], max(ys), "best")]  # two points: an upright line
        line.append(f"best at step {best['step']:,}: validation loss {best['val_loss']:.3f}")
        if "val_bpb" in best:
            line.append(f"{best['val_bpb']:.3f} bits per byte")
    samples = "".join(
        f"<dt>step {r['step']:,}</dt><dd>{escape(str(r['sample']))}</dd>" for r in rows if r.get("sample")
    ) or "<dd>No samples in this log: train with --sample_interval=500, say.</dd>"  # fmt: skip
    rate, speed = curve(rows, "lr", "learning rate"), curve(rows, "tok_per_s", "throughput")
    named = ((loss, "loss"), (rate, "learning rate"), (speed, "tokens per second"))
    frames = [pd.DataFrame(points, columns=["step", y, "curve"]) for points, y in named]
    return f'<p class="status">{escape(" · ".join(line))}</p>', *frames, f'<dl class="samples">{samples}</dl>'


# ----------------------------------------------------------------------------------------------------------------------
# the page

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
@media (max-width: 768px) { .tab-container button { padding: 0 .35rem !important; font-size: .82rem !important; } }
:focus-visible { outline: 2px solid var(--primary-600) !important; outline-offset: 1px; }
"""

# On a phone the sidebar would lie over the page; it starts closed there, one tap away.
NARROW_JS = "() => { if (innerWidth < 768) document.querySelector('.sidebar.open .toggle-button')?.click(); }"


def build(models: Models) -> gr.Blocks:
    """The whole page. Nothing is loaded and nothing served until it is launched and used."""
    names = models.names()
    one_at_a_time = dict(concurrency_id="model", concurrency_limit=1)
    private = dict(api_visibility="private")  # the page's own events; programs have /generate
    quiet = dict(queue=False, show_progress="hidden", **private)
    ask = dict(label="Prompt", lines=1, max_lines=8)
    begin = "Begin a text; the model goes on. Enter sends, Shift+Enter makes a new line."
    with gr.Blocks(title="nanoSmol playground", fill_width=True, analytics_enabled=False) as demo:
        with gr.Sidebar(width=300):
            model = gr.Dropdown(names, label="Model", info="The runs under out/, the newest first.")
            int8 = gr.Checkbox(False, label="int8 weights", info="A quarter of the memory; a little less exact.")
            knobs = []
            for low, high, default, step, label, hint in KNOBS.values():
                a = dict(minimum=low, maximum=high, value=default, step=step, label=label, info=hint)
                knobs.append(gr.Number(**a, precision=0) if label == "Seed" else gr.Slider(**a, buttons=[]))
        gr.Markdown("# nanoSmol playground")
        status = gr.HTML()
        with gr.Tabs():
            with gr.Tab("Write"):
                prompt = gr.Textbox(**ask, placeholder=begin, autofocus=True, elem_id="prompt")
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=80)
                    stop = gr.Button("Stop", min_width=80)
                    clear = gr.Button("Clear", min_width=80)
                text, stats = gr.HTML(page(None), elem_id="text"), gr.HTML(summary(None))
                gr.Examples(EXAMPLES, prompt, label="Or begin with one of these")
            with gr.Tab("See inside"):
                gr.Markdown(
                    "A language model gives every token it knows a probability of coming next, and draws one. Here "
                    "is the text of the Write tab, each token on the colour of the probability it had."
                )
                view = gr.HTML(inside(None), js_on_load=INSIDE_JS, elem_id="inside")
            with gr.Tab("Compare"):
                gr.Markdown("The same prompt, the same settings and the same seed, through two models.")
                both_prompt = gr.Textbox(**ask, placeholder=begin, elem_id="both")
                with gr.Row():
                    both_go = gr.Button("Compare", variant="primary", min_width=80)
                    both_stop = gr.Button("Stop", min_width=80)
                sides, both_outputs = [], []
                with gr.Row():
                    for label, name in zip(("Left", "Right"), (names * 2)[: 2 * bool(names)] or (None, None)):
                        with gr.Column(min_width=280):
                            sides.append(gr.Dropdown(names, value=name, label=label))
                            both_outputs += [gr.HTML(page(None)), gr.HTML(summary(None))]
            with gr.Tab("Training"):
                run = gr.Dropdown(
                    newest_first("log.jsonl"), value=None, label="Run", info="Redrawn while the run goes on."
                )
                run_line = gr.HTML()
                colors = {"training": "#8aa0a8", "validation": "#0d9488", "best": "#ea580c"}
                looks = dict(color="curve", color_title=" ", color_map=colors, height=300, elem_id="loss")
                plots, axes = [gr.LinePlot(x="step", y="loss", **looks)], dict(x="step", min_width=280, y_lim=[0, None])
                with gr.Row():
                    plots += [gr.LinePlot(**axes, y=y, height=220) for y in ("learning rate", "tokens per second")]
                gr.Markdown("### What it wrote on the way")
                samples = gr.HTML()
            with gr.Tab("Model"):
                card = gr.HTML()

        def connect(triggers, prompt, choices, outputs, view=None):
            """Make `triggers` write with the chosen models, side by side, into outputs = [page, summary] * models, and
            the first of them into `view`. Returns the running event and the function and box that stop it."""
            box = gr.State([])  # this visitor's records; a list, so that Stop sees them while they are being filled
            shown = [*outputs, view] if view else outputs

            def draw(records, with_view=True):
                parts = [f(r) for r in records or [None] * len(choices) for f in (page, summary)]
                return parts + ([inside(records[0] if records else None) if with_view else gr.skip()] if view else [])

            def write_all(box, int8, prompt, *rest):
                chosen, numbers = rest[: len(choices)], dict(zip(KNOBS, rest[len(choices) :]))
                records = box[:] = [Record() for _ in chosen]
                if len(prompt) > MAX_PROMPT:
                    gr.Info(f"Of a prompt longer than {MAX_PROMPT:,} characters only the end is read.")
                drawn = time.perf_counter()
                with toasts():
                    numbers["seed"] = clamp("seed", numbers["seed"]) or random.randrange(1, 2**31)  # one for all
                    writers = [write(models, r, name, int8, prompt, **numbers) for r, name in zip(records, chosen)]
                    for _ in zip_longest(*writers):
                        late = time.perf_counter() - drawn > 0.5  # the coloured view is large: not at every token
                        drawn = time.perf_counter() if late else drawn
                        yield draw(records, late)
                    yield draw(records)

            def halt(box, forget=False):
                for record in box:
                    record.stopped, record.why = True, record.why or "you stopped it"
                return draw([] if forget else box)

            event = gr.on(
                triggers, write_all, [box, int8, prompt, *choices, *knobs], shown, **one_at_a_time, **private,
                show_progress="minimal", show_progress_on=outputs[::2],
            )  # fmt: skip
            return event, halt, box, shown

        event, halt, box, shown = connect([go.click, prompt.submit], prompt, [model], [text, stats], view)
        stop.click(halt, box, shown, cancels=event, **quiet)
        clear.click(lambda box: ["", *halt(box, forget=True)], box, [prompt, *shown], cancels=event, **quiet)
        both, halt_both, box, shown = connect([both_go.click, both_prompt.submit], both_prompt, sides, both_outputs)
        both_stop.click(halt_both, box, shown, cancels=both, **quiet)

        about = dict(inputs=[model, int8], outputs=[status, card], concurrency_limit=None, **private)
        about |= dict(fn=lambda name, int8: facts(models, name, int8), show_progress="hidden")
        gr.on([demo.load, model.change, int8.change], **about)
        event.then(**about)  # the model may have been loaded again

        seen = gr.State({})

        def refresh(seen, run, *chosen):
            """Redraw what is out of date: the lists of models and runs, and the curves of the run that is shown."""
            names, runs = models.names(), newest_first("log.jsonl")
            if run not in runs:
                run = chosen[0] if chosen[0] in runs else next(iter(runs), None)
            now, lists, drawn = dict(lists=[sorted(names), sorted(runs)]), [gr.skip()] * 4, [gr.skip()] * 5
            if now["lists"] != seen.get("lists"):
                # what a visitor has chosen stays in the list: if it has gone, using it says so
                choices, first = list(dict.fromkeys([*names, *filter(None, chosen)])), next(iter(names), None)
                lists = [gr.update(choices=choices, value=name or first) for name in chosen]
                lists.append(gr.update(choices=runs, value=run))
            if run is None:
                drawn[0] = bad("No training log under out/ yet. Start one: python train.py config/tiny_shakespeare.py")
            else:
                with suppress(OSError):  # deleted since; the next look will see it
                    now["log"] = run, *stamp(Path(run) / "log.jsonl")
                    drawn = drawn if now["log"] == seen.get("log") else training(run)
            seen.clear()
            seen.update(now)
            return *lists, *drawn

        gr.on(
            [demo.load, gr.Timer(REFRESH).tick, run.input], refresh, [seen, run, model, *sides],
            [model, *sides, run, run_line, *plots, samples], **quiet,
        )  # fmt: skip

        def generate_api(
            prompt: str, max_new_tokens: int = 200, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
            min_p: float = 0.0, repetition_penalty: float = 1.0, seed: int = 0, model: str = "", int8: bool = False,
        ) -> str:  # fmt: skip
            """Continue `prompt`, of which the last 4,000 characters are read; streams the text so far, without the
            prompt. model: a name from the page's list, empty for the first. Numbers are moved into their range; seed 0
            draws one, top_k 0 and min_p 0 are off."""
            record = Record()
            numbers = (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
            with toasts():
                name = model or next(iter(models.names()), "")
                for _ in write(models, record, name, bool(int8), prompt, **dict(zip(KNOBS, numbers))):
                    yield record.text
                yield record.text

        gr.api(generate_api, api_name="generate", **one_at_a_time)
    return demo.queue(max_size=MAX_WAITING)


def launch_arguments(s: Settings) -> dict:
    """How the page is served. All that gradio would otherwise take from environment variables is said here."""
    user, colon, password = s.auth.partition(":")
    if s.auth and not (user and password):
        raise UserError(f"--auth={s.auth}: write --auth=user:password.")
    if s.share and not s.auth:
        raise UserError("--share=true makes a public link, so it wants a login: add --auth=user:password.")
    return dict(
        server_name="127.0.0.1", server_port=s.port, share=s.share, auth=(user, password) if s.auth else None,
        allowed_paths=[], blocked_paths=[Path.cwd().anchor], max_file_size="1kb", root_path="", enable_monitoring=False,
        run_history=False, ssr_mode=False, mcp_server=False, pwa=False, num_workers=1, debug=False, show_error=False,
        footer_links=["api"], theme=THEME, css=CSS, js=NARROW_JS, quiet=True,
    )  # fmt: skip


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    arguments = launch_arguments(s)
    models = Models(s.model, pick_device(s.device), pick_dtype(s.dtype))
    name = next(iter(models.names()), None)
    if name:
        started = time.perf_counter()
        print(f"loading {name} ... ", end="", flush=True)
        model, _ = models.get(name)
        print(f"{model.num_parameters()['total']:,} parameters in {time.perf_counter() - started:.1f} s", flush=True)
    else:
        print("no trained model under out/ yet; the page says how to make one", flush=True)
    demo = build(models)
    try:
        os.environ.pop("GRADIO_ALLOWED_PATHS", None)  # an empty list of ours would let it speak
        demo.launch(**arguments, prevent_thread_lock=True)
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise UserError(f"port {s.port} is taken, perhaps by another playground. Try: --port={s.port + 1}") from None
    print(f"the playground is at http://127.0.0.1:{s.port} (Ctrl-C ends it)", flush=True)
    if s.share:
        print(f"and, with the login, at {demo.share_url or '... no, the tunnel could not be had'}", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    guard(main, ModelError)
