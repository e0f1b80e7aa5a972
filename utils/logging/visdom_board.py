"""Live plots on a visdom server, sent from a thread of their own.

Training only ever writes into the board's memory. The thread sends every window that changed,
whole and at most once an interval, so however many steps pass between two sendings there is one
request for each window. Whole windows make recovery simple as well: when the server was away,
everything the board knows is sent again.

The board speaks visdom's HTTP interface itself (visdom 0.2). Visdom's own client has no timeouts
and prints tracebacks when the server is away; besides, a machine that trains without plots then
needs no visdom installed.
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

DEFAULT_SERVER = "http://localhost"
DEFAULT_PORT = 8097
MAX_POINTS = 2000  # kept per curve: a window is a few hundred pixels wide
WINDOW = {"width": 400, "height": 300}  # pixels of curves, bars and texts
IMAGE_SIDE = 400  # pixels of the longer side of an image
TITLE_BAR = 35  # pixels that visdom takes from the height of an image's window


class _Curve:
    """Points of one curve; when there are too many, every other one is dropped for good."""

    def __init__(self):
        self.points = []  # (step, value or None)
        self.last = None  # always shown, even where thinning skips it
        self.stride = 1  # every stride-th point is kept
        self.count = 0

    def add(self, step, value):
        self.last = (step, _finite(value))
        if self.count % self.stride == 0:
            self.points.append(self.last)
            if len(self.points) >= MAX_POINTS:
                self.points = self.points[::2]
                self.stride *= 2
        self.count += 1

    def trace(self, name):
        points = self.points if self.points[-1] is self.last else [*self.points, self.last]
        steps, values = zip(*points)
        return {"type": "scatter", "mode": "lines", "name": name, "x": steps, "y": values}


class _Curves:
    """The window of one metric, with a curve for each group that has it."""

    def __init__(self, title):
        self.title = title
        self.groups = {}

    def traces(self):
        return [curve.trace(group) for group, curve in self.groups.items()]


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

    def __init__(
        self, server=None, port=DEFAULT_PORT, env="main", *, interval=2.0, retry=5.0, timeout=5.0
    ):
        server = server or DEFAULT_SERVER
        try:
            url = urlsplit(server if "://" in server else f"http://{server}")
            self._port = url.port or port
        except ValueError:
            url = None
        if url is None or not url.hostname or url.scheme not in ("http", "https"):
            raise SettingsError(
                "--visdom_server is not an address: give a host or a URL like http://localhost"
            )
        self._scheme, self._host = url.scheme, url.hostname
        self._path = quote(url.path.rstrip("/"), safe="/%")
        self._headers = {"Content-Type": "application/json"}
        if url.username:
            login = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        # What messages may show: without the login.
        self.address = f"{self._scheme}://{self._host}:{self._port}{self._path}"
        self.env = env.replace("/", "_")
        self._interval, self._retry, self._timeout = interval, retry, timeout

        self._lock = threading.Lock()  # guards the windows; never held while sending
        self._windows = {}  # window -> what it shows; the order is that on the dashboard
        self._changed = {}  # windows to send, an ordered set
        self._connection = None  # of the thread only
        self._stop = threading.Event()
        self._thread = None

    def start(self, on_info=None, on_warning=None):
        """Begin to send; the callbacks get one sentence each, from the sending thread.

        `on_warning` is called once each time the server is lost, `on_info` when it is back.
        """
        if self._thread is None:
            self._on_info = on_info or (lambda message: None)
            self._on_warning = on_warning or (lambda message: None)
            self._thread = threading.Thread(target=self._run, name="visdom", daemon=True)
            self._thread.start()
        return self

    def close(self, timeout=5.0):
        """Send what is left, for at most `timeout` seconds, and end the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)

    # Called by training: these only write into memory.

    def curve(self, name, step, value, group="train"):
        """Add a point to the curve `group` of the window `name`; non-finite values are gaps."""
        with self._lock:
            window = self._windows.setdefault(f"metric: {name}", _Curves(name))
            window.groups.setdefault(group, _Curve()).add(step, value)
            self._changed[f"metric: {name}"] = True

    def clear_curves(self):
        """Forget all curves; their windows close unless points are added again."""
        with self._lock:
            for window in [w for w, shown in self._windows.items() if isinstance(shown, _Curves)]:
                del self._windows[window]
                self._changed[window] = True

    def bars(self, name, step, values):
        """Show a list of numbers as bars over their index, in place of the last ones."""
        title = f"{name}, step {step}"
        trace = {"type": "bar", "x": list(range(len(values)))}
        trace["y"] = [_finite(value) for value in values]
        self._show(f"bars: {name}", partial(_plot, title, [trace], "index"))

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
            try:
                self._send_changes()
            except Exception as error:  # whatever happens here must not reach training
                self._disconnect()
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
        self._disconnect()

    def _send_changes(self):
        """Send the changed windows, or all of them over a new connection.

        A server that was restarted has forgotten everything, and shows it by having closed the
        connection. That is found on the first request, and one new attempt is made at once.
        """
        kept_alive = self._connection is not None
        try:
            self._send_windows()
        except _Outage:
            if not kept_alive:
                raise
            self._disconnect()
            self._send_windows()

    def _send_windows(self):
        everything = self._connection is None or self._connection.sock is None
        if everything:
            self._connect()
        with self._lock:
            changed = list(self._windows) if everything else list(self._changed)
            self._changed = {}
        for window in changed:
            with self._lock:
                shown = self._windows.get(window)
                if isinstance(shown, _Curves):
                    shown = partial(_plot, shown.title, shown.traces(), "step")
            if shown is None:
                self._post("close", {"win": window, "eid": self.env})
            elif self._post("events", {"win": window, "eid": self.env, **shown()}) != window:
                raise _Outage("does not answer as visdom does")

    def _connect(self):
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self._disconnect()
        self._connection = kinds[self._scheme](self._host, self._port, timeout=self._timeout)
        if self._post("win_exists", {"win": "", "eid": self.env}) not in ("true", "false"):
            raise _Outage("does not answer as visdom does")

    def _disconnect(self):
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, endpoint, message):
        """Send one message and give back the answer's text; raises _Outage."""
        body = json.dumps(message, allow_nan=False)
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
    lines = (
        f"<tr><td style='padding-right: 1em'>{html.escape(key)}</td>"
        f"<td>{html.escape(value)}</td></tr>"
        for key, value in rows.items()
    )
    content = f"<table style='font-size: 12px; margin: 8px'>{''.join(lines)}</table>"
    size = {"width": WINDOW["width"], "height": IMAGE_SIDE + TITLE_BAR}  # in a row with images
    return {"data": [{"type": "text", "content": content}], "opts": {"title": title, **size}}
