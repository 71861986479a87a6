"""The playground in a real browser: what a visitor sees and presses, that nothing leaves the machine, and that Stop and
a closed tab end the computation."""

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
    root = tmp_path_factory.mktemp("browser")
    make_run(root / "out" / "b", seed=1)
    make_run(root / "out" / "a", seed=0)
    return root


@pytest.fixture(scope="module")
def url(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "REFRESH", 0.5)  # seconds; nobody wants to wait for the real 3
        with serving(root) as (url, _, _):
            yield url


class Watched:
    """The errors on a page's console, and the addresses it requests."""

    def __init__(self, page):
        self.errors, self.requests = [], []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on(
            "requestfailed", lambda r: self.errors.append(f"failed: {r.url}") if "font" in r.resource_type else None
        )

    def outside(self, url):
        return [r for r in self.requests if not r.startswith((url, "data:", "blob:"))]


@pytest.fixture
def visit(browser, url):
    """visit() opens the page in a window of its own, ready to be used; visit.watched is the Watched of the last one."""
    contexts = []

    def visit(width=1180, height=860, scheme="light", address=url):
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)  # ms; beside the other tests everything takes ten times as long
        visit.watched = Watched(page)
        page.goto(address)
        page.locator("#prompt textarea, #say textarea").first.wait_for()
        page.locator(".status").first.wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def slow(monkeypatch):
    """slow(0.05) makes every token take that long and counts them."""

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


def wait_to_change(page, selector, times=2):
    """Return when the last element of this selector has had a text, and then so many others."""
    page.locator(selector).last.filter(has_text=re.compile(".")).wait_for()
    text = "ts => [...document.querySelectorAll(ts)].at(-1)?.textContent"
    for _ in range(times):
        before = page.evaluate(text, selector)
        page.wait_for_function(
            f"([ts, before]) => ![before, '', undefined].includes(({text})(ts))", arg=[selector, before]
        )


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def test_write_and_look_inside(visit, url):
    """What every first visitor does: type, press Enter, read, and see which other tokens were likely."""
    page = visit()
    send(page)
    finished(page)
    assert page.locator("#text .prompt").inner_text() == "MARA:"
    assert page.locator("#text .wrote").inner_text().strip()
    facts = page.locator(".facts").first.inner_text()
    assert re.search(r"\d+ tokens · \d+ tokens per second · first token after [\d.]+ s · seed \d+ · stopped: ", facts)
    n = int(facts.split()[0])
    open_tab(page, "See inside")
    tokens = page.locator("#inside [data-t]")
    assert tokens.count() == n
    tokens.nth(0).click()
    first = page.locator("#inside .odds").inner_text()
    assert "The model gave this token" in first
    assert page.locator("#inside .odds div").count() == 6
    page.keyboard.press("ArrowRight")
    assert page.locator("#inside .odds").inner_text() != first
    assert page.locator("#inside .t.here").count() == 1
    page.keyboard.press("ArrowLeft")
    assert page.locator("#inside .odds").inner_text() == first
    assert visit.watched.errors == []
    assert visit.watched.outside(url) == []


def test_nothing_is_asked_of_other_hosts(visit, url):
    """Fonts, scripts, analytics: every tab, and the page about the API, come from this machine alone."""
    page = visit()
    for name in ("See inside", "Chat", "Compare", "Training", "Model", "Write"):
        open_tab(page, name)
    assert visit.watched.errors == []
    page.get_by_role("button", name="Use via API").click()
    page.get_by_text("/generate").first.wait_for()
    page.wait_for_timeout(500)
    assert len(visit.watched.requests) > 10
    assert visit.watched.outside(url) == []
    page.evaluate("fetch('http://localhost:9/x').catch(() => 0)")  # the check can fail
    page.wait_for_timeout(100)
    assert visit.watched.outside(url) == ["http://localhost:9/x"]


def test_text_streams(visit, slow):
    """The text must grow while it is made, or a slow model looks like a broken one."""
    counted = slow(0.05)
    page = visit()
    send(page)
    wait_to_change(page, "#text .wrote", times=3)
    assert not counted.ended.is_set(), "it was shown only when it was whole"
    page.get_by_role("button", name="Stop").first.click()
    finished(page)


def test_a_text_that_is_read_is_never_given_up(visit, slow, monkeypatch):
    """A large model's first token alone can take longer than the patience with those who do not read; the tokens after
    it may then be made faster than the page fetches them."""
    monkeypatch.setattr(app, "PATIENCE", 1)
    counted = slow(5)
    page = visit()
    send(page)
    counted.wait_for(1)
    counted.pause = 0
    finished(page, "stopped: it reached the length")


def test_stop_ends_the_computation_within_two_tokens(visit, slow):
    """Stop must end the computation, keep the text, show that it was stopped, and leave a page that works."""
    counted = slow(0.15)
    page = visit()
    send(page)
    counted.wait_for(4)
    page.get_by_role("button", name="Stop").first.click()
    finished(page, "stopped: you stopped it")
    at = counted.tokens
    assert counted.ended.wait(3), "the generator was never closed"
    assert counted.tokens <= at + 2
    assert int(page.locator(".facts").first.inner_text().split()[0]) in range(4, counted.tokens + 1)
    page.wait_for_timeout(600)
    assert counted.tokens <= at + 2
    counted.pause = 0
    send(page, "The Duke")
    finished(page, "stopped: it reached the length")
    assert page.locator("#text .prompt").inner_text() == "The Duke"


def test_a_closed_tab_ends_the_computation_within_two_tokens(visit, slow):
    """Nobody reads the text any more; the next visitor in the queue should not wait for it."""
    counted = slow(0.25)
    page = visit()
    send(page)
    counted.wait_for(3)
    page.close()
    at = counted.tokens
    assert counted.ended.wait(5), "it went on for a closed tab"
    assert counted.tokens <= at + 2


def test_a_second_visitor_sees_the_queue(visit, slow):
    """A visitor who waits must see the place in the queue; the two texts must not mix either."""
    counted = slow(0.05)
    first, second = visit(), visit()
    send(first, "MARA:")
    counted.wait_for(2)
    send(second, "The Duke")
    second.get_by_text(re.compile(r"queue: \d/\d")).first.wait_for()
    first.get_by_role("button", name="Stop").first.click()
    finished(first)
    counted.pause = 0
    finished(second)
    assert first.locator("#text .prompt").inner_text() == "MARA:"
    assert second.locator("#text .prompt").inner_text() == "The Duke"


def test_stop_while_waiting_leaves_the_queue(visit, slow):
    """A visitor who stops while waiting must not be served later."""
    counted = slow(0.05)
    first, second = visit(), visit()
    send(first)
    counted.wait_for(2)
    send(second, "The Duke")
    second.get_by_text(re.compile(r"queue: \d/\d")).first.wait_for()
    second.get_by_role("button", name="Stop").first.click()
    second.wait_for_timeout(300)
    first.get_by_role("button", name="Stop").first.click()
    finished(first)
    assert counted.ended.wait(3)
    first.wait_for_timeout(400)
    assert len(counted.calls) == 1


def test_clear(visit):
    """Clear leaves the page as it was at first."""
    page = visit()
    send(page)
    finished(page)
    page.get_by_role("button", name="Clear").click()
    page.locator("#text .paper.empty").wait_for()
    assert page.locator("#prompt textarea").input_value() == ""
    open_tab(page, "See inside")
    assert page.locator("#inside [data-t]").count() == 0
    open_tab(page, "Write")
    page.get_by_role("button", name="Stop").first.click()  # it brought the text back
    page.wait_for_timeout(500)
    assert page.locator("#text .paper.empty").is_visible()


def test_compare(visit):
    """Two models, one prompt and seed; different weights, different texts."""
    page = visit()
    open_tab(page, "Compare")
    assert page.get_by_role("combobox", name="Left").input_value() == "out/a"
    assert page.get_by_role("combobox", name="Right").input_value() == "out/b"
    send(page, "MARA:", "#both")
    finished(page, count=2)
    left, right = (page.locator(".wrote").nth(i).inner_text() for i in (0, 1))
    assert left and right and left != right
    seeds = re.findall(r"seed (\d+)", page.locator("body").inner_text())
    assert len(seeds) == 2 and seeds[0] == seeds[1]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    make_chat_run(root / "out" / "d", seed=1)
    make_chat_run(root / "out" / "c", seed=0)
    return root


@pytest.fixture
def chat_url(chats):
    with serving(chats) as (url, _, _):
        yield url


def press(page, button, happened, arg=None):
    """button(), and again until it has happened: the page ignores it while the end of an answer is on its way."""
    for _ in range(100):
        button()
        try:
            return page.wait_for_function(happened, arg=arg, timeout=500)
        except sync_api.TimeoutError:
            pass
    raise AssertionError(f"pressed 100 times, and still not: {happened}")


def say(page, text, answers=1):
    """Send a message and wait until each of the models has answered."""
    box = page.locator("#say textarea")
    box.fill(text)
    press(page, lambda: box.press("Enter"), "document.querySelector('#say textarea').value === ''")
    page.wait_for_function("text => document.querySelector('.talk').innerText.includes(text)", arg=text.split("\n")[0])
    finished(page, count=answers)


def messages(page, bot=0):
    return page.locator(".talk").nth(bot).locator(".message .md").all_text_contents()


def wait_for_messages(page, count):
    """The page draws them a moment after the server has sent them."""
    page.wait_for_function("n => document.querySelectorAll('.talk .message .md').length === n", arg=count)


def test_chat(visit, chat_url):
    """A conversation of two turns, in which the first is edited, the answer made anew, and all taken back."""
    page = visit(address=chat_url)
    page.wait_for_function("document.activeElement?.closest('#say')")  # it is the first tab
    evil = '<img src="http://localhost:9/x"> <b>bold</b> &lt;\n    <|im_end|> *a* $$b$$'
    say(page, evil)
    said = messages(page)
    assert said[0] == evil and len(said) == 2 and said[1]
    assert page.locator("#say textarea").input_value() == ""
    page.get_by_text("See inside the last answer").first.click()
    page.locator(".inside [data-t]").first.click()
    assert page.locator(".inside .odds div").count() == 6
    say(page, "And then?")
    assert len(messages(page)) == 4
    before = page.locator(".facts").first.inner_text()
    changed = "f => ![f, ''].includes(document.querySelector('.facts').innerText)"
    press(page, page.locator("button[title=Retry]").click, changed, before)
    finished(page)
    assert [messages(page)[i] for i in (0, 1, 2)] == [*said, "And then?"]

    def edit():
        page.locator("button[title=Edit]").first.click()
        page.locator(".talk textarea").fill("Is 1 < 2?")
        page.locator("button[title=Submit]").click()

    press(page, edit, "document.querySelectorAll('.talk .message .md').length == 2")
    finished(page)
    assert len(messages(page)) == 2 and messages(page)[0] == "Is 1 < 2?"
    page.locator("button[title=Undo]").click()
    page.wait_for_function("document.querySelector('#say textarea').value == 'Is 1 < 2?'")
    assert messages(page) == []
    say(page, "Once more")
    page.locator(".talk button[title=Clear]").first.click()
    page.get_by_text("Ask something.").first.wait_for()
    page.locator(".inside [data-t]").first.wait_for(state="detached")  # by the server, a moment later
    assert messages(page) == []
    assert visit.watched.errors == []
    assert visit.watched.outside(chat_url) == []


def test_chat_streams_and_stops(visit, chat_url, slow):
    """Stop must end the computation and keep what was said."""
    counted = slow(0.1)
    page = visit(address=chat_url)
    send(page, "Hello", "#say")
    wait_for_messages(page, 2)
    wait_to_change(page, ".talk .message .md")
    assert not counted.ended.is_set(), "it was shown only when it was whole"
    page.get_by_role("button", name="Stop").first.click()
    finished(page, "stopped: you stopped it")
    at = counted.tokens
    assert counted.ended.wait(3), "the generator was never closed"
    assert counted.tokens <= at + 2
    assert messages(page)[0] == "Hello" and len(messages(page)) == 2


def test_typing_while_an_answer_comes(visit, chat_url, slow):
    """The next question is often typed while the answer is written: no token may wipe it, nor Enter lose it."""
    counted = slow(0.1)
    page = visit(address=chat_url)
    say_box = page.locator("#say textarea")
    send(page, "Hello", "#say")
    wait_for_messages(page, 2)
    say_box.fill("And you?")
    wait_to_change(page, ".talk .message .md")
    say_box.press("Enter")  # too early
    wait_to_change(page, ".talk .message .md")
    assert say_box.input_value() == "And you?"
    page.get_by_role("button", name="Stop").first.click()
    finished(page)
    counted.pause = 0
    say(page, "And you?")
    assert [messages(page)[i] for i in (0, 2)] == ["Hello", "And you?"] and len(messages(page)) == 4


def test_chat_beside(visit, chat_url):
    """Two models, the same questions, different answers; the second goes when nobody is chosen."""
    page = visit(address=chat_url)
    say(page, "Hello")
    page.get_by_role("combobox", name="And beside it").click()
    page.get_by_role("option", name="out/d").click()
    page.locator(".talk").nth(1).wait_for()
    say(page, "And you?", answers=2)
    left, right = messages(page), messages(page, 1)
    assert left[:3] == right[:3] and len(left) == len(right) == 4 and left[3] != right[3]
    page.get_by_role("combobox", name="And beside it").click()
    page.get_by_role("option", name="none").click()
    page.locator(".talk").nth(1).wait_for(state="hidden")
    assert messages(page) == left


def test_chat_on_a_phone(visit, chat_url):
    """On 375 pixels nothing sticks out, whatever is said, and the message box is on the screen."""
    page = visit(375, 812, address=chat_url)
    page.locator(".sidebar:not(.open)").wait_for(state="attached")
    assert page.locator("#say").bounding_box()["y"] < 812 - 80
    say(page, "x" * 200 + " <b>\n" + " " * 300 + "y")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("document.querySelector('.talk .bubble-wrap').scrollWidth") <= 375
    page.get_by_text("See inside the last answer").first.click()
    page.locator(".inside [data-t]").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_chat_with_a_model_that_cannot(visit):
    """It says in one line what to do, and sending says it again."""
    page = visit()
    open_tab(page, "Chat")
    page.locator(".status.bad:visible", has_text="out/a has no chat template").wait_for()
    assert "python import_gguf.py, or python train.py config/chat_smollm2.py" in page.locator("body").inner_text()
    send(page, "Hello", "#say")
    page.get_by_text("has no chat template").nth(1).wait_for()
    assert page.locator("#say textarea").input_value() == "Hello"


def points_of(page):
    """Points of the drawn loss curves, from the paths of the plot."""
    paths = page.locator("#loss svg .mark-line path").evaluate_all("ps => ps.map(p => p.getAttribute('d') || '')")
    return sum(len(re.findall(r"[ML]", d)) for d in paths)


def test_training_is_drawn_and_follows_the_run(visit, root, url):
    """The curves come from log.jsonl, and again when a line is added."""
    page = visit()
    open_tab(page, "Training")
    page.locator("#loss svg .mark-line path").first.wait_for()
    assert points_of(page) == 30 + 4 + 2  # log lines, evaluations, the mark of the best
    assert page.get_by_text("best at step 200").is_visible()
    assert page.locator(".samples dt").all_inner_texts() == ["step 100", "step 200"]
    assert "<b>MARA</b>" in page.locator(".samples dd").first.inner_text()  # shown, not bold
    with open(root / "out" / "a" / "log.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(step=400, loss=1.5, lr=1e-4, tok_per_s=900.0)) + "\n")
    page.get_by_text("step 400").first.wait_for()
    page.wait_for_timeout(500)
    assert points_of(page) == 37
    assert visit.watched.errors == []


def test_model_tab_and_choice(visit):
    """The facts follow the chosen model."""
    page = visit()
    open_tab(page, "Model")
    card = page.locator(".card")
    assert (
        "out/a" in card.inner_text() and "float32" in card.inner_text() and "1.500 bits per byte" in card.inner_text()
    )
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name="out/b").click()
    page.locator(".card td", has_text="out/b").wait_for()
    page.get_by_label("int8 weights").check()
    page.locator(".card td", has_text="int8 on cpu").wait_for()


def test_a_new_run_appears_and_a_deleted_one_says_so(visit, root):
    """The page may be open for days while runs come and go."""
    page = visit()
    page.get_by_role("combobox", name="Model").click()
    assert page.get_by_role("option", name="out/later").count() == 0
    page.get_by_role("heading", name="nanoSmol").click()
    make_run(root / "out" / "later", seed=3)
    page.wait_for_timeout(1500)  # a round of the timer, and then some
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name="out/later").click()
    page.locator(".status", has_text="out/later").wait_for()
    send(page)
    finished(page)
    shutil.rmtree(root / "out" / "later")
    page.wait_for_timeout(1500)
    send(page)
    page.get_by_text("out/later: no such model here (any more). Choose one of").first.wait_for()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name="out/a").click()
    send(page, "The Duke")
    page.locator("#text .prompt", has_text="The Duke").wait_for()  # it goes on working


def test_keyboard_only(visit):
    """Everything on the way to a text can be reached and seen without a mouse."""
    page = visit()
    page.wait_for_function("document.activeElement?.tagName === 'TEXTAREA'")
    page.keyboard.type("MARA:")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("What")
    assert page.locator("#prompt textarea").input_value() == "MARA:\nWhat"
    for _ in range(3):  # the page may give the focus to the text box once more while it is still being set up
        page.locator("#prompt textarea").focus()
        page.keyboard.press("Tab")
        page.wait_for_timeout(300)
        if page.evaluate("document.activeElement.innerText") == "Generate":
            break
    page.wait_for_function("document.activeElement.innerText === 'Generate'")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    finished(page)
    page.get_by_role("tab", name="Write").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#inside .paper").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#inside .t.here").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(visit, scheme):
    """On 360 pixels nothing sticks out, the settings are closed but there, and small print can be read."""
    page = visit(360, 740, scheme)
    page.locator(".sidebar:not(.open)").wait_for(state="attached")
    send(page)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#text").bounding_box()["width"] > 280
    page.get_by_label("Toggle Sidebar").click()
    page.get_by_label("Seed").scroll_into_view_if_needed()
    contrast = """selector => {
        const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(x => +x / 255);
        const light = c => rgb(c).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
            .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
        let e = document.querySelector(selector), ground = e;
        while (['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(ground).backgroundColor))
            ground = ground.parentElement;
        const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(ground).backgroundColor)];
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    }"""
    for selector in (".facts", ".status", "#text .wrote", "#text .prompt", ".sidebar .info-text"):
        assert page.evaluate(contrast, selector) >= 4.5, selector  # WCAG AA


def test_no_model_yet(visit, tmp_path):
    """A fresh checkout: the page opens and shows what to run."""
    with serving(tmp_path) as (address, _, _):
        page = visit(address=address)
        assert "python train.py config/tiny_shakespeare.py" in page.locator(".status").first.inner_text()
        send(page)
        page.get_by_text("Make one with: python train.py").nth(1).wait_for()  # the toast, beside the line at the top
        open_tab(page, "Training")
        assert "python train.py" in page.locator(".status.bad:visible").last.inner_text()
