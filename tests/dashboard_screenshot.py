"""Take a picture of a visdom environment in a real Chromium (apt-get install chromium).

    python tests/dashboard_screenshot.py --port 8097 --env ENV --out assets/dashboard.png

Waits until the page shows every window that the server holds, and fails where it does not.
It needs the browser and the scripts of visdom's page:
`python -m utils.logging.visdom_server --scripts_from_npm` gets those where only npm can be reached.
"""

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

import websocket  # websocket-client, which visdom brings along

CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
    " --hide-scrollbars --remote-debugging-port=0 --remote-allow-origins=*"
).split()
WAIT = 60  # seconds for the browser to start, and for the page to show everything

# Windows with something drawn in them: a plot that is not empty, an image that has loaded, text.
DRAWN = """[...document.querySelectorAll('.react-grid-item')].filter(pane =>
    pane.querySelector('.main-svg .trace') || pane.querySelector('.content-text')
    || [...pane.querySelectorAll('img')].some(image => image.complete && image.naturalWidth)
).length"""
# The page scrolls inside the body: the height that shows all windows without scrolling.
BOTTOM = """Math.max(...[...document.querySelectorAll('.react-grid-item')].map(
    pane => pane.getBoundingClientRect().bottom))"""

# Titles of the windows, those of a row from left to right.
TITLES = """JSON.stringify([...document.querySelectorAll('.react-grid-item')].map(pane => {
    const place = pane.getBoundingClientRect();
    return [place.top, place.left, pane.querySelector('.bar').innerText.trim().split('\\n').pop()];
}).sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(found => found[2]))"""


class Page:
    """One tab of a headless Chromium, driven over its DevTools protocol."""

    def __init__(self, profile, width, height):
        binary = shutil.which("chromium") or shutil.which("google-chrome")
        if binary is None:
            sys.exit("error: no chromium found: apt-get install chromium")
        command = [binary, *CHROMIUM, f"--user-data-dir={profile}"]
        command += [f"--window-size={width},{height}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **quiet)
        self.calls = 0
        try:
            port_file = Path(profile) / "DevToolsActivePort"
            wait_for(lambda: port_file.exists() and port_file.read_text().strip(), "chromium")
            port = port_file.read_text().split()[0]
            tabs = json.load(urlopen(f"http://127.0.0.1:{port}/json/list", timeout=WAIT))
            tab = next(tab for tab in tabs if tab["type"] == "page")
            self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=WAIT)
        except BaseException:
            self.close()
            raise

    def call(self, method, **parameters):
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters}
        self.socket.send(json.dumps(message))
        while True:  # events of the page come in between
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.calls:
                if "error" in answer:
                    sys.exit(f"error: chromium does not do {method}: {answer['error']['message']}")
                return answer["result"]

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def wait_for(condition, what):
    """Ask until the condition holds; exits with an error after a minute."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"error: waited {WAIT} seconds for {what}")
        time.sleep(0.2)


def count_windows(server, env):
    """Number of windows the server holds for an environment."""
    body = json.dumps({"win": None, "eid": env}).encode()
    with urlopen(Request(f"{server}/win_data", data=body), timeout=WAIT) as answer:
        return len(json.load(answer))


def take(server, env, out, width=1280):
    """Write a picture of an environment; returns the titles of its windows, row by row."""
    env = env.replace("/", "_")
    try:
        windows = count_windows(server, env)
    except (OSError, ValueError) as error:
        sys.exit(f"error: there is no visdom server at {server}, or no environment {env!r} on it "
                 f"({error})")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        page = Page(profile, width, 900)
        try:
            page.call("Page.navigate", url=f"{server}/env/{quote(env)}")
            wait_for(lambda: page.evaluate(DRAWN) == windows, f"{windows} windows to be drawn: "
                     "does the server have the page's scripts?")
            height = int(page.evaluate(BOTTOM)) + 20
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
            time.sleep(2)  # panes glide to their places
            titles = json.loads(page.evaluate(TITLES))
            picture = page.call("Page.captureScreenshot", format="png")["data"]
        finally:
            page.close()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(base64.b64decode(picture))
    print(f"{out}: {windows} windows, {width}x{height} pixels")
    return titles


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8097, help="of the visdom server (8097)")
    parser.add_argument("--env", required=True, help="environment: the run's --log_dir")
    parser.add_argument("--out", type=Path, default=Path("assets/dashboard.png"))
    parser.add_argument("--width", type=int, default=1280, help="pixels (1280)")
    flags = parser.parse_args()
    take(f"http://127.0.0.1:{flags.port}", flags.env, flags.out, flags.width)


if __name__ == "__main__":
    main()
