"""The playground in a real browser: what a visitor sees and presses, and that nothing leaves the machine."""

import json
import re
import shutil

import pytest

pytest.importorskip("gradio", reason="the playground needs gradio: pip install -r requirements.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt brings playwright")

from playground import SlowGenerate, make_chat_run, make_run, serving  # noqa: E402

import app  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # one Chromium at a time
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Make out/a and out/b, which continue texts, and out/c, the newest, which can chat."""
    root = tmp_path_factory.mktemp("browser")
    make_run(root / "out" / "b", seed=1)
    make_run(root / "out" / "a", seed=0)
    make_chat_run(root / "out" / "c", seed=0)
    return root


@pytest.fixture(scope="module")
def urls(root):
    """Serve a page that starts with out/a and one that starts with out/c; yield their addresses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "REFRESH", 0.5)  # seconds instead of 3, so that the tests wait less
        with serving(root, "out/a") as (write, *_), serving(root, "out/c") as (chat, *_):
            yield dict(write=write, chat=chat)


@pytest.fixture
def visit(browser, urls):
    """Return visit(), which opens a page in its own window and waits until it is ready. No page may print an error to
    its console or send a request to another host."""
    contexts, errors, requests = [], [], []

    def visit(start="write", width=1180, height=860, scheme="light", address=""):
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)  # ms; while other tests run, everything takes ten times as long
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "responded" not in m.text else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address or urls[start])
        page.locator("#prompt textarea, #say textarea").first.wait_for()
        page.locator(".note", has_text=re.compile(".")).first.wait_for()
        return page

    yield visit
    assert errors == []
    assert len(requests) > 10 and [r for r in requests if not re.match(r"http://127\.0\.0\.1:|data:|blob:", r)] == []
    for context in contexts:
        context.close()


@pytest.fixture
def slow(monkeypatch):
    """Return slow(): slow(0.05) makes every token take that long, and counts the tokens."""

    def start(pause):
        stand_in = SlowGenerate(pause)
        monkeypatch.setattr(app, "generate", stand_in)
        return stand_in

    return start


def send(page, text="MARA:", box="#prompt"):
    page.locator(f"{box} textarea").fill(text)
    page.locator(f"{box} textarea").press("Enter")


def finished(page, why="stopped: ", count=1):
    page.wait_for_function("([why, n]) => document.body.innerText.split(why).length > n", arg=[why, count])


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def choose(page, label, option):
    page.get_by_role("combobox", name=label, exact=True).click()
    page.get_by_role("option", name=option).click()


def text_of(page, n=1):
    return page.locator(f"#text{n} textarea").input_value()


def grows(page, expression, times=3):
    """Wait until the value of an expression has changed this many times."""
    for _ in range(times):
        before = page.evaluate(expression)
        page.wait_for_function(f"before => ({expression}) !== before", arg=before)


def messages(page):
    return page.locator(".talk .message .md").all_text_contents()


def wait_for_messages(page, count):
    """Wait for this many messages: the page draws them a moment after the server has sent them."""
    page.wait_for_function("n => document.querySelectorAll('.talk .message .md').length === n", arg=count)


def press(page, button, happened, arg=None):
    """Call button() until `happened` is true: the page ignores it until the end of an answer has arrived."""
    for _ in range(100):
        button()
        try:
            return page.wait_for_function(happened, arg=arg, timeout=500)
        except sync_api.TimeoutError:
            pass
    raise AssertionError(f"pressed 100 times, and still not: {happened}")


def say(page, text):
    """Send a message and wait until it has been answered."""
    box, count = page.locator("#say textarea"), len(messages(page))
    box.fill(text)
    press(page, lambda: box.press("Enter"), "document.querySelector('#say textarea').value === ''")
    wait_for_messages(page, count + 2)
    finished(page)


# ----------------------------------------------------------------------------------------------------------------------
# Write, See inside


def test_write_and_look_inside(visit):
    """What every first visitor does: type, press Enter, read, and see which other tokens were likely."""
    page = visit()
    send(page)
    finished(page)
    assert text_of(page).startswith("MARA:") and len(text_of(page)) > 10
    note = page.locator(".note", has_text="stopped").first.inner_text()
    n = int(re.fullmatch(r"(\d+) tokens · \d+ a second after [\d.]+ s · seed \d+ · stopped: .*", note)[1])
    open_tab(page, "See inside")
    assert 0.9 * n < page.locator("#inside .token").count() <= n + 1  # gradio draws no span for some white space
    tokens = page.locator("#inside .token")
    # a token of plain ASCII, since an untrained model also writes white space and halves of letters
    token = next(tokens.nth(i) for i in range(1, n) if re.fullmatch(r"\s*[!-~]+", tokens.nth(i).inner_text()))
    token.click()
    page.locator("#odds dd").first.wait_for()
    assert token.inner_text().strip() in page.locator("#odds").inner_text()
    assert "%" in page.locator("#odds").inner_text()


def test_two_models_write_side_by_side(visit):
    """With one prompt and seed, different weights write different texts."""
    page = visit()
    choose(page, "Compare with", "out/b")
    page.locator("#text2").wait_for()
    send(page)
    finished(page, count=2)
    assert text_of(page, 1)[:5] == text_of(page, 2)[:5] == "MARA:" and text_of(page, 1) != text_of(page, 2)
    seeds = re.findall(r"seed (\d+)", page.locator("body").inner_text())
    assert len(seeds) == 2 and seeds[0] == seeds[1]


def test_a_second_visitor_waits_and_may_leave_the_queue(visit, slow):
    """A waiting visitor sees the place in the queue; after Stop nothing is generated for them; texts never mix."""
    counted = slow(0.05)
    first, second, third = visit(), visit(), visit()
    send(first)
    counted.wait_for(2)
    for page, prompt in ((second, "The Duke"), (third, "nobody")):
        send(page, prompt)
        page.get_by_text(re.compile(r"queue: \d/\d")).first.wait_for()
    third.locator("#prompt .stop-button").click()
    third.wait_for_timeout(300)
    first.locator("#prompt .stop-button").click()
    counted.pause = 0
    finished(first)
    finished(second)
    assert text_of(first).startswith("MARA:") and text_of(second).startswith("The Duke") and text_of(third) == ""
    assert len(counted.calls) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Chat


def test_chat(visit):
    """Take two turns, retry the second, edit the first question, undo it, and clear the chat."""
    page = visit("chat")
    page.wait_for_function("document.activeElement?.closest('#say')")  # it is the first tab
    evil = '<img src="http://localhost:9/x"> <b>bold</b> &lt;\n    <|im_end|> *a* $$b$$'
    say(page, evil)
    said = messages(page)
    assert said[0] == evil and len(said) == 2 and said[1]
    say(page, "And then?")
    page.locator("button[title=Retry]").click()
    finished(page)
    assert messages(page)[:3] == [*said, "And then?"]

    def edit():
        page.locator("button[title=Edit]").first.click()
        page.locator(".talk textarea").fill("Is 1 < 2?")
        page.locator("button[title=Submit]").click()

    press(page, edit, "document.querySelectorAll('.talk .message .md').length == 2")
    finished(page)
    assert messages(page)[0] == "Is 1 < 2?"
    open_tab(page, "See inside")
    assert page.locator("#inside .token").first.inner_text().strip() == "Is 1 < 2?"
    open_tab(page, "Chat")
    page.locator("button[title=Undo]").click()
    page.wait_for_function("document.querySelector('#say textarea').value == 'Is 1 < 2?'")
    say(page, "Once more")
    page.locator(".talk button[title=Clear]").first.click()
    page.get_by_text("Ask something.").first.wait_for()
    assert messages(page) == []


def test_typing_while_an_answer_comes(visit, slow):
    """The next question is often typed during an answer: neither a new token nor Enter may lose it. Stop must end the
    computation and keep the partial answer."""
    counted = slow(0.1)
    page, last = visit("chat"), "[...document.querySelectorAll('.talk .message .md')].at(-1).textContent"
    box = page.locator("#say textarea")
    send(page, "Hello", "#say")
    wait_for_messages(page, 2)
    page.wait_for_function("document.querySelector('#say textarea').value === ''")
    box.fill("And you?")
    grows(page, last)
    box.press("Enter")  # too early
    grows(page, last)
    assert box.input_value() == "And you?" and not counted.ended.is_set()
    page.locator("#say .stop-button").click()
    finished(page, "stopped: you stopped it")
    at = counted.tokens
    assert counted.ended.wait(3), "the generator was never closed"
    assert counted.tokens <= at + 2 and len(messages(page)) == 2
    counted.pause = 0
    say(page, "And you?")
    assert [messages(page)[i] for i in (0, 2)] == ["Hello", "And you?"] and len(messages(page)) == 4


def test_what_is_typed_before_the_answer_begins_stays(visit, slow):
    """The box is cleared only if it still holds the message being answered: a visitor in the queue may type on."""
    counted = slow(0.05)
    first, second = visit(), visit("chat")
    with first.expect_response(re.compile("queue/join")):
        send(first)
    counted.wait_for(1)
    send(second, "Hello", "#say")
    second.locator("#say textarea").fill("Hello again")
    second.wait_for_timeout(500)  # on a busy machine gradio takes over late what was typed
    counted.pause = 0
    wait_for_messages(second, 2)
    finished(second)
    assert second.locator("#say textarea").input_value() == "Hello again" and messages(second)[0] == "Hello"


# ----------------------------------------------------------------------------------------------------------------------
# Training, Model, the page as a whole


def points_of(page):
    """Count the points of the drawn loss curves, from the paths of the plot."""
    paths = page.locator("#loss svg .mark-line path").evaluate_all("ps => ps.map(p => p.getAttribute('d') || '')")
    return sum(len(re.findall(r"[ML]", d)) for d in paths)


def test_training_is_drawn_and_follows_the_run(visit, root):
    """The curves show log.jsonl, and are drawn again when a line is added."""
    page = visit()
    open_tab(page, "Training")
    page.locator("#loss svg .mark-line path").first.wait_for()
    assert points_of(page) == 30 + 4  # log lines and evaluations
    assert page.get_by_text("best at step 200").is_visible()
    assert "<b>MARA</b>" in page.locator("#samples textarea").input_value()
    with open(root / "out" / "a" / "log.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(step=400, loss=1.5, lr=1e-4, tok_per_s=900.0)) + "\n")
    page.get_by_text("step 400").first.wait_for()
    page.wait_for_timeout(500)
    assert points_of(page) == 35


def test_runs_come_and_go(visit, root):
    """The page may stay open for days while runs appear and disappear; it shows the facts of the chosen model."""
    page = visit()
    make_run(root / "out" / "later", seed=3)
    page.wait_for_timeout(1500)  # a few refreshes
    choose(page, "Model", "out/later")
    page.locator(".note", has_text="out/later").wait_for()
    page.get_by_label("int8 weights").check()
    open_tab(page, "Model")
    page.get_by_text("int8 on cpu").wait_for()
    shutil.rmtree(root / "out" / "later")
    page.wait_for_timeout(1500)
    open_tab(page, "Write")
    send(page)
    page.get_by_text("no such model here (any more). Choose one of").first.wait_for()
    choose(page, "Model", "out/a")
    send(page, "The Duke")
    finished(page)  # the page still works


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visit, scheme):
    """At a width of 360 pixels nothing overflows, and the settings are closed but can be opened."""
    page = visit("chat", 360, 740, scheme)
    page.locator(".sidebar:not(.open)").wait_for(state="attached")
    assert page.locator("#say").bounding_box()["y"] < 740 - 80
    say(page, "x" * 200 + " <b>\n" + " " * 300 + "y")
    assert page.evaluate("document.querySelector('.talk .bubble-wrap').scrollWidth") <= 360
    for name in ("Chat", "Write", "See inside"):
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    open_tab(page, "Write")
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("Seed").scroll_into_view_if_needed()


def test_no_model_yet_and_no_mouse(visit, tmp_path):
    """In a fresh checkout the page opens and shows what to run. It and the API page request nothing remote."""
    with serving(tmp_path) as (address, _, _):
        page = visit(address=address)
        assert "python train.py config/tiny_shakespeare.py" in page.locator(".note.bad").first.inner_text()
        page.wait_for_function("document.activeElement?.tagName === 'TEXTAREA'")
        page.keyboard.type("MARA:")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("What")
        assert page.locator("#prompt textarea").input_value() == "MARA:\nWhat"
        page.keyboard.press("Enter")
        page.get_by_text("Make one with: python train.py").nth(1).wait_for()  # the toast, beside the line at the top
        assert page.locator("#prompt textarea").input_value() == "MARA:\nWhat"
        for name in ("Chat", "See inside", "Model", "Training"):
            open_tab(page, name)
        assert "python train.py" in page.locator(".note.bad:visible").last.inner_text()
        page.get_by_role("button", name="Use via API").click()
        page.get_by_text("/generate").first.wait_for()
        page.wait_for_timeout(500)
