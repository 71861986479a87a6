"""
Pictures of the playground's tabs for the README: light, dark and on a phone, as small PNGs.

    python tests/tools/screenshots.py --model=out/tiny_shakespeare --chat=out/chat_smollm2         # into docs/

Needs playwright and a Chromium (Debian: apt-get install chromium), and Pillow, which gradio brings.
"""

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lib.settings import UserError, override, run_main  # noqa: E402

from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

import app  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOST_BYTES = 150_000
QUESTIONS = ["Who are you, and what do you do?", "What does a crossing cost?"]  # of the Chat tab


@dataclass
class Settings:
    model: str = "out/tiny_shakespeare"  # the trained run to show; its log.jsonl fills the Training tab
    chat: str = ""  # a model that can chat, for the pictures of that tab; empty: none are taken
    other: str = ""  # the right side of Compare; empty: the same model
    out_dir: str = "docs"  # where the pictures go
    prompt: str = "ROMEO:"  # of Write and Compare
    seed: int = 7  # of the text
    length: int = 64  # tokens of it


def save(page, path: Path):
    """Write a PNG of what the window shows, with as many colours as fit into MOST_BYTES."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colors in (256, 128, 64, 32):
        image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            break
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size:,} bytes")


def tab(page, name: str):
    """Open a tab; in a narrow window it may be in the menu beside the tabs."""
    button = page.get_by_role("tab", name=name)
    if not button.is_visible():
        page.locator(".overflow-menu > button").click()
        button = page.locator(".overflow-dropdown button", has_text=name)
    button.click()
    page.wait_for_timeout(700)


def enter(page, label: str, value):
    """Put a number into a box, without scrolling to it."""
    box = page.get_by_label(label, exact=True)
    box.evaluate("(e, value) => { e.value = value; e.dispatchEvent(new Event('input')) }", value)
    box.evaluate("e => e.dispatchEvent(new Event('blur'))")


def write(page, s: Settings):
    """Generate a text with the seed of the settings and wait for its end."""
    enter(page, "Seed", s.seed)
    enter(page, "number input for Length", s.length)
    page.locator("#prompt textarea").fill(s.prompt)
    page.locator("#prompt textarea").press("Enter")
    page.get_by_text("stopped:").first.wait_for(timeout=120_000)
    page.wait_for_timeout(300)


def take_pictures(browser, url: str, s: Settings, out: Path, scheme: str, width: int, height: int, names: list[str]):
    """Write a text in a window of this size and colour scheme, then save a picture of each of the tabs `names`."""
    page = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
    page.goto(url)
    page.locator("#prompt textarea").wait_for()
    page.locator(".status").first.wait_for()
    kind = "phone" if width < 768 else scheme
    write(page, s)
    for name in names:
        tab(page, name)
        if name == "See inside":
            tokens = page.locator("#inside [data-t]")
            tokens.nth(min(9, tokens.count() - 1)).click()
        elif name == "Compare":
            if s.other:
                page.get_by_role("combobox", name="Right").click()
                page.get_by_role("option", name=s.other).click()
            page.locator("#both textarea").fill(s.prompt)
            page.locator("#both textarea").press("Enter")
            page.wait_for_function("document.body.innerText.split('stopped:').length >= 3", timeout=240_000)
        elif name == "Training":
            page.locator("#loss canvas, #loss svg").first.wait_for()
            page.wait_for_timeout(1500)
        page.wait_for_timeout(300)
        save(page, out / f"app-{name.lower().replace(' ', '-')}-{kind}.png")
    page.close()


def talk(browser, url: str, s: Settings, out: Path, kind: str, width: int, height: int):
    """A picture of a conversation of two turns, in a wide window with the probabilities of the last answer."""
    page = browser.new_page(viewport=dict(width=width, height=height))
    page.goto(url)
    page.locator("#say textarea").wait_for()
    page.locator(".status").first.wait_for()
    enter(page, "Seed", s.seed)
    for n, question in enumerate(QUESTIONS, 1):
        page.locator("#say textarea").fill(question)
        page.locator("#say textarea").press("Enter")
        ended = "[...document.querySelectorAll('.facts')].some(f => f.innerText.includes('stopped'))"
        said = f"document.querySelectorAll('.talk .message .md').length == {2 * n}"
        page.wait_for_timeout(1500)
        page.wait_for_function(f"{said} && {ended} && !!document.querySelector('button[title=Retry]')", timeout=240_000)
    if width > 800:
        page.get_by_text("See inside the last answer").first.click()
        page.wait_for_timeout(400)
        tokens = page.locator(".inside [data-t]")
        tokens.nth(min(6, tokens.count() - 1)).click()
        page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(800)
    save(page, out / f"app-chat-{kind}.png")
    page.close()


def served(model: str):
    """The playground with this model, running, and its address."""
    demo = app.build(app.Models(model, "cpu", None))
    arguments = app.launch_arguments(app.Settings()) | dict(server_port=None)
    _, url, _ = demo.launch(**arguments, prevent_thread_lock=True)
    demo.server.force_exit = True  # it does not wait for pages that are still open
    return demo, url


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    if CHROMIUM is None:
        raise UserError("no Chromium found. On Debian: apt-get install chromium")
    out = Path(s.out_dir)
    out.mkdir(exist_ok=True)
    demo, url = served(s.model)
    everything = ["Write", "See inside", "Compare", "Training", "Model"]
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            take_pictures(browser, url, s, out, "light", 1180, 860, everything)
            take_pictures(browser, url, s, out, "dark", 1180, 860, everything)
            take_pictures(browser, url, s, out, "light", 390, 844, everything)
            browser.close()
    finally:
        demo.close()
    if not s.chat:
        return
    demo, url = served(s.chat)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            talk(browser, url, s, out, "light", 1180, 900)
            talk(browser, url, s, out, "phone", 390, 844)
            browser.close()
    finally:
        demo.close()


if __name__ == "__main__":
    run_main(main)
