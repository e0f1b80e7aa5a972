"""Visit the page of experiments/web_demo.py in a real Chromium, and take pictures of its tabs.

    python tests/page_visit.py --port 7860 --out docs/pictures

Needs `pip install playwright` and Debian's browser (apt-get install chromium); tests/utils/web uses
what is here.
"""

import argparse
import contextlib
import re
import shutil
from pathlib import Path

FLAGS = ["--no-sandbox", "--disable-quic", "--enable-unsafe-swiftshader", "--hide-scrollbars"]
WAIT = 120_000  # milliseconds
TABS = {  # name of the picture: (tab, button, what the line says at the end)
    "web_sample": ("Sample", "Draw", "images in"),
    "web_fill_in": ("Fill in", "Fill in", "completions of"),
    "web_canvas": ("Canvas", "Draw", "canvas of"),
    "web_compare": ("Compare", "Compare", "fast."),
    "web_look_inside": ("Look inside", "Look", "PSNR"),
}
# In the browser, where nothing that is shown for a moment only is missed.
NOTE_ALL = """panel => {
    const seen = window.seen = {lines: new Set(), pictures: new Set()};
    const note = () => {
        panel.querySelectorAll('.told').forEach(line => seen.lines.add(line.innerText));
        panel.querySelectorAll('.pixels img').forEach(image => seen.pictures.add(image.src));
    };
    new MutationObserver(note).observe(panel, {
        subtree: true, childList: true, characterData: true, attributeFilter: ['src']});
    note();
}"""
PRESS_AT = """(panel, [words, name, wait]) => new Promise((resolve, reject) => {
    const look = () => {
        if (![...panel.querySelectorAll('.told')].some(line => line.innerText.includes(words)))
            return;
        observer.disconnect();
        [...panel.querySelectorAll('button')].find(one => one.innerText.trim() == name).click();
        resolve();
    };
    const observer = new MutationObserver(look);
    observer.observe(panel, {subtree: true, childList: true, characterData: true});
    setTimeout(() => reject(`no line said: ${words}`), wait);
    look();
})"""


def browser_path():
    """Where the browser is; None without one."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Visit:
    """A visitor of the page at `address`: what the browser says is wrong, and all it asks of other
    machines, is in `complaints`."""

    def __init__(self, browser, address):
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(WAIT)
        self.complaints = []
        self.page.on("request", self.note_request)
        self.page.on("console", self.note_message)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.goto(address)
        self.page.get_by_role("tab", name="Sample").wait_for()

    def note_request(self, request):
        if not re.match(r"(https?://127\.0\.0\.1[:/]|data:|blob:)", request.url):
            self.complaints.append(f"request: {request.url}")

    def note_message(self, message):
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    @property
    def panel(self):
        """The tab that is open."""
        return self.page.locator("[role=tabpanel]:visible")

    def open(self, tab):
        self.page.get_by_role("tab", name=tab, exact=True).click()

    def press(self, name):
        self.panel.get_by_role("button", name=name, exact=True).click()

    def press_at(self, words, name):
        """Press a button as soon as a line of the open tab says the words."""
        self.panel.evaluate(PRESS_AT, [words, name, WAIT])

    def note_all(self):
        """Note from now on, in `seen`, what the open tab shows, however short."""
        self.panel.evaluate(NOTE_ALL)

    def seen(self):
        """(lines, addresses of pictures) that the tab has shown since `note_all`."""
        return [self.page.evaluate(f"[...window.seen.{what}]") for what in ("lines", "pictures")]

    def give(self, path):
        """Give a file of one's own."""
        self.panel.locator("input[type=file]:not([accept])").set_input_files(path)

    def told(self):
        """What the lines of the open tab say."""
        return " | ".join(self.panel.locator(".told").all_inner_texts())

    def wait_for(self, words):
        """Wait until a line of the open tab says the words."""
        self.panel.locator(".told.done, .told.wrong").filter(has_text=words).first.wait_for()

    def paint(self, across=0.5, down=0.15):
        """Paint a line over a part of the image in the editor, below its middle: `across` and
        `down` are shares of the width and height of the editor."""
        canvas = self.page.locator("#mask canvas").first
        canvas.wait_for()
        self.page.wait_for_timeout(2000)  # the editor fits the image in
        box, mouse = canvas.bounding_box(), self.page.mouse
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * (0.5 + down)
        reach = box["width"] * across / 2
        mouse.move(x - reach, y)
        mouse.down()
        mouse.move(x, y + 8, steps=8)
        mouse.move(x + reach, y, steps=8)
        mouse.up()
        self.page.wait_for_timeout(1000)  # it sends what is painted

    def saved(self, button, folder):
        """The path of the file that a button saves."""
        button = self.panel.get_by_role("button", name=button)
        button.and_(self.page.locator(":not([disabled])")).wait_for()
        with self.page.expect_download() as download:
            button.click()
        path = Path(folder) / download.value.suggested_filename
        download.value.save_as(path)
        return path


@contextlib.contextmanager
def visit(address):
    """A Visit of the page at an address."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        try:
            yield Visit(browser, address)
        finally:
            browser.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=7860, help="of the page (7860)")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    with visit(f"http://127.0.0.1:{flags.port}") as visitor:
        for name, (tab, button, words) in TABS.items():
            visitor.open(tab)
            if tab == "Fill in":
                visitor.paint()
            visitor.press(button)
            visitor.wait_for(words)
            visitor.page.mouse.move(1270, 10)
            visitor.page.wait_for_timeout(2000)  # pictures fade in
            path = flags.out / f"{name}.png"
            visitor.page.screenshot(path=path, full_page=True)
            print(f"{path}: {path.stat().st_size} bytes, {visitor.told()}")
    print("\n".join(visitor.complaints) or "no errors, no request to elsewhere")


if __name__ == "__main__":
    main()
