"""What the dashboard and `make watch` show, in the order in which one looks: the one place where a
recorded stat gets its window, its words and its unit.

To add a stat, log it (`RunLogger.metrics`, `bars`, `images`) and enter it in CURVES, BARS or
PICTURES. One without an entry has a window under its own name, behind the others.
"""

import dataclasses
import functools
import math

LINE_KEYS = ("step", "group", "time")  # keys of a line of metrics.jsonl that are no metrics

# Parts of the dashboard, in the order in which one looks.
PARTS = ("pictures", "results", "loss", "validation", "health", "speed", "others", "settings")
GROUPS = {"train": "training", "validation": "validation"}
# A curve of so few points, such as of validations, is drawn with a mark at each.
FEW_POINTS = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A window of curves over the step.

    `axis` says what the values are, with their unit, `stats` how each metric is called in the
    legend: a word, or one for each group. Values are multiplied by `scale`. The title ends with
    the setting `of`, where that is known, such as the size of the codebook. `tall` windows stand
    beside pictures. Where the metric `unless` is recorded, the window would say the same.
    """

    part: str
    title: str
    axis: str
    stats: dict
    scale: float = 1.0
    logarithmic: bool = False
    of: str = ""
    tall: bool = False
    unless: str = ""


@dataclasses.dataclass(frozen=True)
class Bars:
    """A window of bars over an index that begins with `first`, or falling where `sort`."""

    part: str
    title: str
    index: str
    axis: str
    scale: float = 1.0
    first: int = 0
    sort: bool = False


@dataclasses.dataclass(frozen=True)
class Trace:
    """A curve as it is drawn: `stat` is its number in the window, which gives its colour."""

    label: str
    stat: int
    dashed: bool
    steps: tuple
    values: tuple  # None where there is nothing to draw

    @property
    def is_short(self):
        """Whether its points are so few that each is marked."""
        return len(self.values) - self.values.count(None) <= FEW_POINTS


@dataclasses.dataclass(frozen=True)
class Plot:
    """The curves of a window as they are drawn; the axis begins with zero where `from_zero`."""

    title: str
    axis: str
    logarithmic: bool
    from_zero: bool
    legend: bool
    traces: list


PICTURES = {
    "reconstructions": "Images, each beside its reconstruction",
    "samples": "Samples",
    "report": "Real digits, reconstructions, samples",
    "pairs": "Images, each above its reconstruction",
    "big": "Samples on a larger canvas",
    "inpaint": "Image, mask, what is given, and completions",
    "neighbours_pixels": "Samples, each beside the nearest training images (pixels)",
    "neighbours_lpips": "Samples, each beside the nearest training images (LPIPS)",
}

CURVES = (
    Window("loss", "Bits per token", "bits per token",
           {"bits_per_token": "bits per token"}, tall=True),
    Window("loss", "Loss", "loss",
           {"loss": {"train": "training", "validation": "validation, reconstruction alone"}},
           tall=True),
    Window("loss", "Parts of the loss", "loss, before its weight",
           {"l1": "L1", "perceptual": "perceptual", "codebook_loss": "codebook"},
           logarithmic=True, tall=True),
    Window("loss", "Adversarial loss", "loss",
           {"g_loss": "generator", "d_loss": "discriminator"}),
    Window("validation", "Reconstruction PSNR, dB", "dB", {"psnr": "PSNR"}),
    Window("validation", "Fréchet distance of reconstructions", "distance, without a unit",
           {"frechet": "Fréchet distance"}),
    Window("validation", "Bits per token, summed over all times", "bits per token",
           {"ids: bits per token": "bits per token"}),
    Window("validation", "Bits per dimension", "bits per dimension", {
        "total, 8 bits, whole levels: bits per dimension": "total, whole levels",
        "total, 8 bits: bits per dimension": "total, 8 bits",
        "total, 5 bits: bits per dimension": "total, 5 bits",
        "pixels given ids, whole levels: bits per dimension": "pixels, whole levels",
        "pixels given ids, density: bits per dimension": "pixels, density",
        "ids: bits per dimension": "ids",
    }),
    Window("health", "Codes in use", "codes",
           {"codes_used": "by the validation images",
            "perplexity": "by a training batch, as perplexity"}, of="codebook_size"),
    Window("health", "Discriminator is right about", "% of them",
           {"d_real_right": "images", "d_fake_right": "reconstructions"}, scale=100.0),
    Window("health", "Weight of the adversarial loss", "weight", {"d_weight": "weight"}),
    Window("speed", "Steps per second", "steps per second", {"steps_per_second": "steps"}),
    Window("speed", "Images per second", "images per second", {"images_per_second": "images"},
           unless="steps_per_second"),
    Window("speed", "Waiting for data", "% of the time", {"waiting_for_data": "waiting"},
           scale=100.0),
    Window("speed", "Time of training", "minutes", {"seconds": "minutes"}, scale=1 / 60),
)

BARS = {
    "loss_per_timestep": Bars("loss", "Loss at each time t", "time t", "loss", first=1),
    "codebook_use": Bars("health", "How often each code is used",
                         "codes, the commonest first", "% of the ids", scale=100.0, sort=True),
}

# Windows of text: (part, title).
HEALTH = ("health", "Is it going well?")
SETTINGS = ("settings", "Settings")

# Figures of metrics.jsonl that are no curves: counts, and errors of other figures.
NOT_DRAWN = {"validation images"}
ERRORS = " (standard error)"

_WINDOWS = {stat: window for window in CURVES for stat in window.stats}
_RANKS = {window.title: rank for rank, window in enumerate(CURVES, start=1)}


@functools.cache
def window_of(stat):
    """The Window of a metric: that of the table, or one of its own name."""
    return _WINDOWS.get(stat) or Window("others", stat, "", {stat: stat})


def is_drawn(stat):
    """Whether a metric has a curve at all."""
    return stat not in NOT_DRAWN and not stat.endswith(ERRORS)


def bars_of(name):
    """The Bars of a name: those of the table, or of its own name."""
    return BARS.get(name) or Bars("others", name, "index", "")


def rank(part, title):
    """A key that sorts windows in the order in which one looks."""
    order = 0 if (part, title) == HEALTH else _RANKS.get(title, len(CURVES) + 1)
    return PARTS.index(part), order, title


def plot(window, curves, settings):
    """The Plot of a window; None where none of its curves is alive.

    `curves` is {(metric, group): [(step, value or None)]} of the window's metrics, `settings` a
    dict of the run's settings.
    """
    alive = {key: points for key, points in curves.items() if is_alive(key[1], points)}
    if not alive:
        return None
    stats = list(window.stats)
    groups = {stat: [group for name, group in alive if name == stat] for stat, _ in alive}
    traces = []
    for stat, group in sorted(alive, key=lambda key: (stats.index(key[0]), key[1])):
        label = window.stats[stat]
        if isinstance(label, dict):
            label = label.get(group, group)
        elif len(stats) == 1:
            label = GROUPS.get(group, group)
        elif len(groups[stat]) > 1:
            label = f"{label}, {GROUPS.get(group, group)}"
        steps, values = zip(*alive[stat, group])
        values = tuple(_scaled(value, window) for value in values)
        dashed = group != "train" and len(groups[stat]) > 1
        traces.append(Trace(label, stats.index(stat), dashed, steps, values))
    title = window.title
    if isinstance(settings.get(window.of), int):
        title += f" of {settings[window.of]:,}"
    from_zero = window.part in ("health", "speed")  # their values are counts and shares
    legend = len(stats) > 1 or len(traces) > 1
    return Plot(title, window.axis, window.logarithmic, from_zero, legend, traces)


def is_alive(group, points):
    """Whether a curve has something to show: a number that is not zero, and, where it is the figure
    of an experiment, which its table shows, more than one step."""
    if group not in GROUPS and len({step for step, _ in points}) < 2:
        return False
    return any(value for _, value in points)


def is_superfluous(window, windows):
    """Whether a window says the same as another one of `windows`."""
    return bool(window.unless) and window_of(window.unless) in windows


def plots(lines, settings):
    """The Plots of the lines of a metrics.jsonl, dicts, in the order in which one looks."""
    curves = {}
    for line in lines:
        for stat, value in metrics_in(line):
            points = curves.setdefault(window_of(stat), {}).setdefault((stat, line["group"]), [])
            points.append((line["step"], value if math.isfinite(value) else None))
    shown = (plot(window, curves[window], settings)
             for window in sorted(curves, key=lambda window: rank(window.part, window.title))
             if not is_superfluous(window, curves))
    return [found for found in shown if found is not None]


def in_words(figures):
    """Figures, a dict of numbers or None, as a dict of strings; what is not finite is unknown."""
    return {name: "unknown" if value is None or not math.isfinite(value) else f"{value:.6g}"
            for name, value in figures.items()}


def metrics_in(line):
    """(name, value) of the metrics with a curve in a line of metrics.jsonl."""
    for name, value in line.items():
        if name not in LINE_KEYS and is_drawn(name):
            yield name, float(value)


def _scaled(value, window):
    """A value as it is drawn, with six digits; None where a logarithm has no place for it."""
    if value is None or window.logarithmic and value <= 0:
        return None
    return float(f"{value * window.scale:.6g}")
