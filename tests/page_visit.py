"""Visit the page of experiments/web_demo.py in a real Chromium.

    python tests/page_visit.py --port 7860 --out docs/pictures
    python tests/page_visit.py --port 7861 --start --load_dir demo_absorbing --ema

The first takes pictures of the tabs of a page that runs. The second starts a page, with the flags
that this script has not, draws on it, and prints the seconds from the start to the first picture.
Needs `pip install playwright` and Debian's browser (apt-get install chromium); tests/utils/web uses
what is here.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

WEB_DEMO = Path(__file__).resolve().parent.parent / "experiments" / "web_demo.py"
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
def chromium():
    """A browser of playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(address):
    """A Visit of the page at an address."""
    with chromium() as browser:
        yield Visit(browser, address)


def seconds_to_first_picture(port, flags=(), **options):
    """Start a page, with flags of its script, and draw on it as soon as a browser shows it: seconds
    from the start until {the page, the first picture, all images} are there.

    `options` are those of subprocess.Popen. Exits where the page does not start.
    """
    address, seconds = f"http://127.0.0.1:{port}", {}
    with chromium() as browser:  # which was there before
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(WEB_DEMO), *flags, "--port", str(port)], **options)
        try:
            wait_for_page(address, process)
            visitor = Visit(browser, address)
            seconds["the page"] = time.perf_counter() - begin
            visitor.press("Draw")
            visitor.panel.locator(".pixels img").nth(1).wait_for()  # the first one shows ids
            seconds["the first picture"] = time.perf_counter() - begin
            visitor.wait_for("images in")
            seconds["all images"] = time.perf_counter() - begin
        finally:
            process.terminate()
            process.wait(30)
    return seconds


def wait_for_page(address, process):
    """Wait until the page of a process answers."""
    end = time.monotonic() + WAIT / 1000
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            return urlopen(address, timeout=WAIT / 1000).close()
        time.sleep(0.05)
    sys.exit(f"error: no page at {address}")


def take_pictures(address, out):
    """Take a picture of each tab of the page at an address, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with visit(address) as visitor:
        for name, (tab, button, words) in TABS.items():
            visitor.open(tab)
            if tab == "Fill in":
                visitor.paint()
            visitor.press(button)
            visitor.wait_for(words)
            visitor.page.mouse.move(1270, 10)
            visitor.page.wait_for_timeout(2000)  # pictures fade in
            path = out / f"{name}.png"
            visitor.page.screenshot(path=path, full_page=True)
            print(f"{path}: {path.stat().st_size} bytes, {visitor.told()}")
    print("\n".join(visitor.complaints) or "no errors, no request to elsewhere")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--port", type=int, default=7860, help="of the page (7860)")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--start", action="store_true",
                        help="start a page, and print the seconds until the first picture")
    arguments, flags = parser.parse_known_args()
    if arguments.start:
        for what, seconds in seconds_to_first_picture(arguments.port, flags).items():
            print(f"seconds from the start to {what}: {seconds:.1f}")
    elif flags:
        parser.error(f"unknown flags without --start: {' '.join(flags)}")
    else:
        take_pictures(f"http://127.0.0.1:{arguments.port}", arguments.out)


if __name__ == "__main__":
    main()
