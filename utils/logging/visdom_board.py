"""Live plots on a visdom server, sent from a thread of their own.

Training only writes into the board's memory. The thread sends each window that changed, whole and
at most once an interval; after an outage it sends all of them.

The board speaks visdom's HTTP interface itself (visdom 0.2), because visdom's own client has no
timeouts and prints tracebacks when the server is away.
"""

import base64
import http.client
import json
import math
import re
import threading
import uuid
from functools import partial
from urllib.parse import quote, unquote, urlsplit

from utils.errors import SettingsError
from utils.logging import curves
from utils.logging.images import to_pil
from utils.logging.panes import (
    bars_pane, curves_pane, health_pane, picture_pane, settings_pane, table_pane,
)

CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
MAX_POINTS = 2000  # kept per curve, an even number: a window is a few hundred pixels wide
OURS = re.compile(r"(metric|bars|image|table|text): ")  # how the names of a board's windows begin
FOREIGN = "does not answer as visdom does"


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


class Outage(Exception):
    """The server cannot be used at the moment; the message says why."""


class VisdomBoard:
    """Windows of one visdom environment; no method waits for the server or fails without it.

    `server` is a host or a URL (a port or a path in it counts), localhost where it is None;
    `env` names the environment, with "/" as "_" because visdom has no nested ones. Nothing is
    sent before `start`. Curves keep at most 2000 points each, thinned evenly. `interval`,
    `retry` and `timeout` are seconds: between two sendings, between two attempts to reach a
    lost server, and for one answer. Raises SettingsError for a server that is no address.

    `curves.py` says which metric is drawn where, and in which order windows stand. Visdom puts a
    new window last, so where one belongs before others, all are closed and sent again in order. A
    window that is sent again has a new name on the server: a page that is open answers the closing
    of a window by closing it once more, perhaps after it was sent again.
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
        self._curves = {}  # curves.Window -> {(metric, group): _Curve}
        self._windows = {}  # window -> (rank, function that gives what it shows or None)
        self._changed = {}  # windows to send, an ordered set
        self._settings = {}
        self._sent = {}  # window -> its name on the server; of the sending thread alone
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
        """Add a point to the curve `group` of a metric; non-finite values are gaps."""
        if not curves.is_drawn(name):
            return
        window = curves.window_of(name)
        with self._lock:
            if window not in self._curves:
                self._curves[window] = {}
                rank = curves.rank(window.part, window.title)
                self._windows[f"metric: {window.title}"] = rank, partial(self._plot, window)
            self._curves[window].setdefault((name, group), _Curve()).add(step, value)
            self._changed[f"metric: {window.title}"] = True

    def clear(self):
        """Forget all windows, which close unless they are shown again."""
        with self._lock:
            self._changed |= dict.fromkeys(self._windows, True)
            self._curves, self._windows, self._settings = {}, {}, {}

    def bars(self, name, step, values):
        """Show a list of numbers, None for one that is unknown, as bars over their index, in place
        of the last ones."""
        bars = curves.bars_of(name)
        content = partial(bars_pane, bars, step, list(values))
        self._show(f"bars: {name}", bars.part, bars.title, content)

    def image(self, name, step, image):
        """Show one image [C, H, W], floats in [0, 1] or uint8, in place of the last one."""
        self.picture(name, step, to_pil(image).copy())  # training may reuse the memory

    def picture(self, name, step, picture):
        """Show a PIL image, which is not changed afterwards, in place of the last one."""
        title = f"{curves.PICTURES.get(name, name)}, step {step}"
        self._show(f"image: {name}", "pictures", name, partial(picture_pane, title, picture))

    def table(self, name, rows):
        """Show a dict of strings, such as the figures of an experiment, as two columns."""
        self._show(f"table: {name}", "results", name, partial(table_pane, name, dict(rows)))

    def health(self, step, sentences):
        """Show how the training goes, a list of sentences, in place of the last ones."""
        content = partial(health_pane, curves.HEALTH[1], step, list(sentences))
        self._show("text: health", *curves.HEALTH, content)

    def settings(self, settings, defaults):
        """Show the settings of the run, a dict: what differs from `defaults` first."""
        title = curves.SETTINGS[1]
        content = partial(settings_pane, title, dict(settings), dict(defaults))
        self._show("text: settings", *curves.SETTINGS, content)
        with self._lock:
            self._settings = dict(settings)
            self._changed |= {f"metric: {window.title}": True for window in self._curves}

    def _show(self, window, part, title, content):
        with self._lock:
            self._windows[window] = curves.rank(part, title), content
            self._changed[window] = True

    # The sending thread.

    def _run(self):
        lost = stopping = False
        while not stopping:
            stopping = self._stop.is_set()  # asked before sending: what came last is sent too
            connected = self._connection.sock is not None
            try:
                self.send(everything=not connected)
            except Exception as error:  # whatever happens here must not reach training
                self._connection.close()
                if connected:
                    # A server that was restarted has closed the connection, which is found on
                    # the first request: one new attempt is made at once.
                    stopping = False
                    continue
                if not lost:
                    reason = error if isinstance(error, Outage) else f"cannot be used ({error!r})"
                    self._on_warning(
                        f"no plots for now, the visdom server at {self.address} {reason};"
                        " all plots follow when it answers"
                    )
                lost = True
            else:
                if lost:
                    self._on_info(f"the visdom server at {self.address} answers, plots are sent")
                lost = False
            self._stop.wait(self._retry if lost else self._interval)
        self._connection.close()

    def send(self, everything=True):
        """Send the changed windows, or `everything` over a new connection to a server that may
        have forgotten all, in the order of their ranks. Raises Outage."""
        if everything:
            self._meet()
        with self._lock:
            known = dict(self._windows)
            wanted = [*known, *self._sent] if everything else self._changed
            changed, self._changed = dict.fromkeys(wanted), {}
        messages = {window: self._message(known, window) for window in changed}
        new = [known[window][0] for window, message in messages.items()
               if message and window not in self._sent]
        if new and any(known[window][0] > min(new) for window in self._sent if window in known):
            self._close(*self._sent)
            messages = {window: self._message(known, window) for window in known}
        for window in sorted(messages, key=lambda window: known.get(window, [()])[0]):
            message = messages[window]
            if message is None:
                self._close(*({window} & self._sent.keys()))
                continue
            name = self._sent.setdefault(window, f"{window} #{uuid.uuid4().hex[:8]}")
            if self._post("events", win=name, **message) != name:
                raise Outage(FOREIGN)

    def probe(self):
        """Find out whether a visdom server answers, without a change to it. Raises Outage."""
        if self._post("win_exists", win="") not in ("true", "false"):
            raise Outage(FOREIGN)

    def _meet(self):
        """Find out whether a visdom server answers and still has what was sent; close what an
        earlier process has drawn of this run."""
        self.probe()
        found = []
        if self.env in self._names("env_state"):
            found = self._names("win_data", win=None)
        found = {window for window in found if OURS.match(window)}
        if not found >= set(self._sent.values()):
            self._sent = {}
        for window in found - set(self._sent.values()):
            self._post("close", win=window)

    def _names(self, endpoint, **message):
        """The names, strings, in the server's answer, a list or an object of JSON; raises
        Outage."""
        try:
            answer = json.loads(self._post(endpoint, **message))
        except (ValueError, RecursionError):
            raise Outage(FOREIGN) from None
        if not isinstance(answer, (list, dict)):
            raise Outage(FOREIGN)
        return [name for name in answer if isinstance(name, str)]

    def _close(self, *windows):
        for window in windows:
            self._post("close", win=self._sent.pop(window))

    def _message(self, known, window):
        """What the window shows, as visdom has it; None where there is nothing."""
        return known[window][1]() if window in known else None

    def _plot(self, window):
        with self._lock:
            found = self._curves.get(window, {})
            found = {key: list(curve.points) for key, curve in found.items()}
            settings, superfluous = self._settings, curves.is_superfluous(window, self._curves)
        plot = None if superfluous else curves.plot(window, found, settings)
        return plot and curves_pane(plot, window.tall)

    def _post(self, endpoint, **message):
        """Send one message and give back the answer's text; raises Outage."""
        body = json.dumps({"eid": self.env, **message}, allow_nan=False)
        try:
            self._connection.request("POST", f"{self._path}/{endpoint}", body, self._headers)
            response = self._connection.getresponse()
            text = response.read().decode(errors="replace")
        except TimeoutError:
            raise Outage(f"does not answer within {self._timeout:g} seconds") from None
        except ConnectionRefusedError:
            raise Outage("does not run (connection refused)") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or error
            raise Outage(f"cannot be reached ({reason})") from None
        if response.status != 200:
            raise Outage(f"answers with HTTP status {response.status}")
        return text


def _finite(value):
    """A number short enough to send, or None where there is none to draw."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
