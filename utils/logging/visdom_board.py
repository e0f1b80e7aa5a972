"""Live plots on a visdom server, sent from a thread of their own.

Training only writes into the board's memory. The thread sends each window that changed, whole and
at most once an interval; after an outage it sends all of them.

The board speaks visdom's HTTP interface itself (visdom 0.2), because visdom's own client has no
timeouts and prints tracebacks when the server is away.
"""

import base64
import html
import http.client
import io
import json
import math
import threading
from functools import partial
from urllib.parse import quote, unquote, urlsplit

from utils.errors import SettingsError
from utils.logging.images import to_pil

CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
MAX_POINTS = 2000  # kept per curve, an even number: a window is a few hundred pixels wide
WINDOW = {"width": 400, "height": 300}  # pixels of curves and bars
IMAGE_SIDE = 400  # pixels of the longer side of an image
TITLE_BAR = 35  # pixels that visdom takes from the height of an image's window


class _Curve:
    """Points of one curve, the last among them; when there are too many, every other one goes."""

    def __init__(self):
        self.points = []  # (step, value or None)
        self.stride = 1  # every stride-th point is kept, and the last
        self.count = 0

    def add(self, step, value):
        if (self.count - 1) % self.stride != 0:
            self.points.pop()  # it was there as the last one only
        self.points.append((step, _finite(value)))
        self.count += 1
        if len(self.points) > MAX_POINTS:
            self.points = self.points[::2]  # both ends of an odd number of points stay
            self.stride *= 2


class _Outage(Exception):
    """The server cannot be used at the moment; the message says why."""


class VisdomBoard:
    """Windows of one visdom environment; no method waits for the server or fails without it.

    `server` is a host or a URL (a port or a path in it counts), localhost where it is None;
    `env` names the environment, with "/" as "_" because visdom has no nested ones. Nothing is
    sent before `start`. Curves keep at most 2000 points each, thinned evenly. `interval`,
    `retry` and `timeout` are seconds: between two sendings, between two attempts to reach a
    lost server, and for one answer. Raises SettingsError for a server that is no address.
    """

    def __init__(self, server=None, port=8097, env="main", *, interval=2.0, retry=5.0, timeout=5.0):
        server = server or "localhost"
        try:
            url = urlsplit(server if "://" in server else f"http://{server}")
            port = url.port or port
            if not url.hostname:
                raise ValueError("there is no host in it")
            # which connects at the first request
            self._connection = CONNECTIONS[url.scheme](url.hostname, port, timeout=timeout)
        except (ValueError, KeyError, http.client.InvalidURL):
            raise SettingsError(
                "--visdom_server is not an address: give a host or a URL like http://localhost"
            ) from None
        self._path = quote(url.path.rstrip("/"), safe="/%")
        self._headers = {"Content-Type": "application/json"}
        if url.username:
            login = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        # What messages may show: without the login.
        self.address = f"{url.scheme}://{url.hostname}:{port}{self._path}"
        self.env = env.replace("/", "_")
        self._interval, self._retry, self._timeout = interval, retry, timeout

        self._lock = threading.Lock()  # guards the windows; never held while sending
        # Window -> its curves {group: _Curve}, or a function that gives what it shows; the order
        # is that on the dashboard.
        self._windows = {}
        self._changed = {}  # windows to send, an ordered set
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="visdom", daemon=True)

    def start(self, on_info, on_warning):
        """Begin to send; the callbacks get one sentence each, from the sending thread.

        `on_warning` is called once each time the server is lost, `on_info` when it is back.
        """
        self._on_info, self._on_warning = on_info, on_warning
        self._thread.start()

    def close(self, timeout=5.0):
        """Send what is left, for at most `timeout` seconds, and end the thread."""
        self._stop.set()
        self._thread.join(timeout)

    # Called by training: these only write into memory.

    def curve(self, name, step, value, group="train"):
        """Add a point to the curve `group` of the window `name`; non-finite values are gaps."""
        window = f"metric: {name}"
        with self._lock:
            curves = self._windows.setdefault(window, {})
            curves.setdefault(group, _Curve()).add(step, value)
            self._changed[window] = True

    def clear_curves(self):
        """Forget all curves; their windows close unless points are added again."""
        with self._lock:
            for window in [w for w, shown in self._windows.items() if isinstance(shown, dict)]:
                del self._windows[window]
                self._changed[window] = True

    def bars(self, name, step, values):
        """Show a list of numbers as bars over their index, in place of the last ones."""
        heights = [_finite(value) for value in values]
        trace = {"type": "bar", "x": list(range(len(values))), "y": heights}
        self._show(f"bars: {name}", partial(_plot, f"{name}, step {step}", [trace], "index"))

    def image(self, name, step, image):
        """Show one image [C, H, W], floats in [0, 1] or uint8, in place of the last one."""
        picture = to_pil(image).copy()  # training may reuse the memory
        self._show(f"image: {name}", partial(_picture, f"{name}, step {step}", picture))

    def table(self, name, rows):
        """Show a dict, such as the hyperparameters, as a table of two columns."""
        rows = {str(key): str(value) for key, value in rows.items()}
        self._show(f"table: {name}", partial(_table, name, rows))

    def _show(self, window, content):
        with self._lock:
            self._windows[window] = content
            self._changed[window] = True

    # The sending thread.

    def _run(self):
        lost = stopping = False
        while not stopping:
            stopping = self._stop.is_set()  # asked before sending: what came last is sent too
            connected = self._connection.sock is not None
            try:
                self._send_windows(everything=not connected)
            except Exception as error:  # whatever happens here must not reach training
                self._connection.close()
                if connected:
                    # A server that was restarted has closed the connection, which is found on
                    # the first request: one new attempt is made at once.
                    stopping = False
                    continue
                if not lost:
                    reason = error if isinstance(error, _Outage) else f"cannot be used ({error!r})"
                    self._on_warning(
                        f"no plots for now, the visdom server at {self.address} {reason};"
                        " training goes on, and all plots follow when the server answers"
                    )
                lost = True
            else:
                if lost:
                    self._on_info(f"the visdom server at {self.address} answers, plots are sent")
                lost = False
            self._stop.wait(self._retry if lost else self._interval)
        self._connection.close()

    def _send_windows(self, everything):
        """Send the changed windows, or `everything` over a new connection to a server that may
        have forgotten all."""
        if everything and self._post("win_exists", win="") not in ("true", "false"):
            raise _Outage("does not answer as visdom does")
        with self._lock:
            changed = list(self._windows if everything else self._changed)
            self._changed = {}
        for window in changed:
            with self._lock:
                shown = self._windows.get(window)
                if isinstance(shown, dict):
                    shown = _curves(window.removeprefix("metric: "), shown)
            if shown is None:
                self._post("close", win=window)
            elif self._post("events", win=window, **shown()) != window:
                raise _Outage("does not answer as visdom does")

    def _post(self, endpoint, **message):
        """Send one message and give back the answer's text; raises _Outage."""
        body = json.dumps({"eid": self.env, **message}, allow_nan=False)
        try:
            self._connection.request("POST", f"{self._path}/{endpoint}", body, self._headers)
            response = self._connection.getresponse()
            text = response.read().decode(errors="replace")
        except TimeoutError:
            raise _Outage(f"does not answer within {self._timeout:g} seconds") from None
        except ConnectionRefusedError:
            raise _Outage("does not run (connection refused)") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            raise _Outage(f"cannot be reached ({reason})") from None
        if response.status != 200:
            raise _Outage(f"answers with HTTP status {response.status}")
        return text


def _finite(value):
    """A number short enough to send, or None where there is none to draw."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# What windows show, as visdom's messages have it.


def _curves(title, curves):
    """A function that gives the plot of `curves` {group: _Curve} as they are now."""
    traces = []
    for group, curve in curves.items():
        steps, values = zip(*curve.points)
        trace = {"type": "scatter", "mode": "lines", "name": group, "x": steps, "y": values}
        traces.append(trace)
    return partial(_plot, title, traces, "step")


def _plot(title, traces, x_title):
    layout = {
        "showlegend": len(traces) > 1,
        "legend": {"x": 1, "xanchor": "right", "y": 1, "bgcolor": "rgba(255, 255, 255, 0.7)"},
        "margin": {"l": 60, "r": 15, "t": 35, "b": 55},
        "xaxis": {"title": {"text": x_title, "standoff": 5}},
        "yaxis": {"exponentformat": "e"},
    }
    return {"data": traces, "layout": layout, "opts": {"title": title, **WINDOW}}


def _picture(title, picture):
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    scale = IMAGE_SIDE / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    return {
        "data": [{"type": "image", "content": {"src": source, "caption": None}}],
        "opts": {"title": title, "width": width, "height": height + TITLE_BAR},
    }


def _table(title, rows):
    lines = "".join(
        f"<tr><td style='padding-right: 1em'>{html.escape(key)}</td>"
        f"<td>{html.escape(value)}</td></tr>"
        for key, value in rows.items()
    )
    content = f"<table style='font-size: 12px; margin: 8px'>{lines}</table>"
    size = {"width": WINDOW["width"], "height": IMAGE_SIDE + TITLE_BAR}  # in a row with images
    return {"data": [{"type": "text", "content": content}], "opts": {"title": title, **size}}
