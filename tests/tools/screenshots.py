"""
Take pictures of the playground's tabs for the docs: light, dark and on a phone, as small PNGs.

    python tests/tools/screenshots.py --model=out/chat_smollm2 --run=out/tiny_shakespeare         # into docs/

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
MAX_BYTES = 150_000
QUESTIONS = ["Tell me your name and your trade.", "My hands are always cold. What can I do?"]
USED = (  # what README and docs/playground.md show
    "chat-light chat-phone see-inside-light see-inside-dark see-inside-phone write-light write-phone training-dark "
    "training-phone model-dark"
).split()
WINDOWS = dict(light=(1180, 860), dark=(1180, 860), phone=(390, 844))


@dataclass
class Settings:
    model: str = "out/chat_smollm2"  # a model that can chat
    run: str = "out/tiny_shakespeare"  # the run of the Training tab, and the second model of Write
    out_dir: str = "docs"  # for the pictures
    prompt: str = "ROMEO:"  # for the Write tab
    seed: int = 7
    length: int = 64  # tokens


def save(page, path: Path):
    """Write a PNG of what the window shows, with as many colors as fit into MAX_BYTES."""
    page.wait_for_timeout(1000)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for colors in (256, 128, 64, 32):
        image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            break
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size:,} bytes")


def enter(page, label: str, value):
    """Put a number into a box, without scrolling to it."""
    box = page.get_by_label(label, exact=True)
    box.evaluate("(e, value) => { e.value = value; e.dispatchEvent(new Event('input')) }", value)
    box.evaluate("e => e.dispatchEvent(new Event('blur'))")


def send(page, box: str, text: str, texts: int = 1):
    """Send a text and wait until this many texts have ended."""
    page.locator(f"{box} textarea").fill(text)
    page.locator(f"{box} textarea").press("Enter")
    page.wait_for_timeout(1500)
    ended = "n => [...document.querySelectorAll('.note')].filter(e => e.innerText.includes('stopped')).length >= n"
    page.wait_for_function(ended, arg=texts, timeout=240_000)
    page.wait_for_timeout(1000)


def choose(page, label: str, option: str):
    page.get_by_role("combobox", name=label, exact=True).click()
    page.get_by_role("option", name=option).click()


def take_pictures(page, s: Settings, kind: str):
    """Chat, write, and save a picture of each tab."""

    def tab(name: str):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(700)

    def picture(name: str):
        if f"{name}-{kind}" in USED:
            save(page, Path(s.out_dir) / f"app-{name}-{kind}.png")

    enter(page, "Seed", s.seed)
    enter(page, "number input for Length", s.length)
    for question in QUESTIONS:
        send(page, "#say", question)
    picture("chat")
    tab("See inside")
    page.locator("#inside .token").nth(6).click()
    if kind != "phone":  # README shows it at half of its width, so without the settings
        page.locator(".sidebar.open .toggle-button").click()
        page.set_viewport_size(dict(width=720, height=480))
    picture("see-inside")
    if kind != "phone":
        page.set_viewport_size(dict(zip(("width", "height"), WINDOWS[kind])))
        page.locator(".sidebar .toggle-button").click()
    tab("Write")
    if kind != "phone":
        choose(page, "Compare with", s.run)
    send(page, "#prompt", s.prompt, 2 if kind == "phone" else 3)
    picture("write")
    tab("Training")
    choose(page, "Run", s.run)
    page.locator("#loss svg").first.wait_for()
    picture("training")
    tab("Model")
    picture("model")


def main():
    (s,) = override(sys.argv[1:], Settings, doc=__doc__)
    if CHROMIUM is None:
        raise UserError("no Chromium found. On Debian: apt-get install chromium")
    Path(s.out_dir).mkdir(exist_ok=True)
    demo = app.build(app.Models(s.model, "cpu", None))
    arguments = app.launch_arguments(app.Settings()) | dict(server_port=None)
    _, url, _ = demo.launch(**arguments, prevent_thread_lock=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for kind, (width, height) in WINDOWS.items():
            scheme = "dark" if kind == "dark" else "light"
            page = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
            page.goto(url)
            page.locator("#say textarea").wait_for()
            page.locator(".note").first.wait_for()
            page.wait_for_timeout(1500)
            take_pictures(page, s, kind)
            page.close()
        browser.close()
    demo.close(verbose=False)


if __name__ == "__main__":
    run_main(main)
