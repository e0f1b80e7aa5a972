"""What the windows of the dashboard show, as visdom's messages have it."""

import base64
import html
import io

from hparams.settings import show

WIDTH = 400  # pixels of a window: three stand side by side on a screen of 1280
BETWEEN = 10  # pixels from one window to the next
HEIGHT = 300  # pixels of curves and bars
TALL = 435  # pixels of pictures and of what stands beside them: a title bar and a square
LINE = 17  # pixels of a row of a table
TITLE_BAR = 35  # pixels that visdom takes from the height of an image's window
LARGEST_PICTURE = 2000  # pixels of the longer side, beyond which a picture is sent smaller
COLOURS = ("#1f77b4", "#d95f02", "#2a9d4a", "#c0399f", "#7f7f7f", "#8c6d31")


def curves_pane(plot, tall=False):
    """A `curves.Plot` over the step."""
    traces = []
    for trace in plot.traces:
        traces.append({
            "type": "scatter", "name": trace.label, "x": trace.steps, "y": trace.values,
            "mode": "lines+markers" if trace.is_short else "lines",
            "line": {"color": COLOURS[trace.stat % len(COLOURS)], "width": 2,
                     "dash": "dot" if trace.dashed else "solid"},
        })
    axis = {"title": {"text": plot.axis, "standoff": 5}}
    if plot.logarithmic:
        axis |= {"type": "log", "dtick": "D2", "tickformat": "~g"}  # labels at 1, 2 and 5
    elif plot.from_zero:
        axis |= {"rangemode": "tozero"}
    return _plot(plot.title, traces, "step", axis, plot.legend, tall)


def bars_pane(bars, step, values):
    """A list of numbers, or None, as bars over their index."""
    values = [None if value is None else value * bars.scale for value in values]
    if bars.sort:
        values = sorted(values, key=lambda value: -1 if value is None else value, reverse=True)
    index = list(range(bars.first, bars.first + len(values)))
    trace = {"type": "bar", "x": index, "y": values, "marker": {"color": COLOURS[0]}}
    axis = {"title": {"text": bars.axis, "standoff": 5}}
    return _plot(f"{bars.title}, step {step}", [trace], bars.index, axis)


def _plot(title, traces, x_title, y_axis, legend=False, tall=False):
    layout = {
        "showlegend": legend,
        # below the axis: inside it would hide curves
        "legend": {"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 11}},
        "margin": {"l": 60, "r": 15, "t": 35, "b": 50},
        "xaxis": {"title": {"text": x_title, "standoff": 5}},
        "yaxis": {"exponentformat": "e", "automargin": True, **y_axis},
    }
    size = {"width": WIDTH, "height": TALL if tall else HEIGHT}
    return {"data": traces, "layout": layout, "opts": {"title": title, **size}}


def picture_pane(title, picture):
    """A PIL image, in a window of its shape, which a wide one makes wide."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    columns = min(3, max(1, round(picture.width / picture.height)))
    scale = min((columns * (WIDTH + BETWEEN) - BETWEEN) / picture.width, WIDTH / picture.height)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return {
        "data": [{"type": "image", "content": {"src": source, "caption": None}}],
        "opts": {"title": title, "width": width, "height": height + TITLE_BAR},
    }


def table_pane(title, rows):
    """A dict of strings as a table of two columns."""
    content = _table("".join(_row(name, value) for name, value in rows.items()))
    return _text(title, content, max(TALL, LINE * (len(rows) + 2)))


def health_pane(title, step, sentences):
    """Sentences on how the training goes."""
    rows = "".join(_row(sentence) for sentence in sentences)
    return _text(f"{title} Step {step}", _table(rows, 15), HEIGHT)


def settings_pane(title, settings, defaults):
    """Settings, a dict, as a table: what differs from `defaults` first, then the rest."""
    other = {name for name, value in settings.items() if defaults.get(name, value) != value}
    rows = "".join(
        _row(name, f"{show(settings[name])} (default {show(defaults[name])})")
        for name in settings if name in other
    )
    if rows:
        rows = _row("differ from the defaults", head=True) + rows
        rows += _row("the others", head=True)
    rows += "".join(_row(name, show(settings[name])) for name in settings if name not in other)
    return _text(title, _table(rows))


def _row(*cells, head=False):
    style = "padding: 1px 1em 1px 0; vertical-align: top"
    if head:
        style = "padding: 8px 0 2px 0; font-weight: bold"
    span = "colspan='2' " if head else ""
    cells = "".join(f"<td {span}style='{style}'>{html.escape(str(cell))}</td>" for cell in cells)
    return f"<tr>{cells}</tr>"


def _table(rows, letters=12):
    style = f"font-size: {letters}px; margin: 8px; color: #222; overflow-wrap: break-word"
    return f"<table style='{style}'>{rows}</table>"


def _text(title, content, height=TALL):
    size = {"width": WIDTH, "height": height}
    return {"data": [{"type": "text", "content": content}], "opts": {"title": title, **size}}
