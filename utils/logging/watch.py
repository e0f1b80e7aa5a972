"""Draw the curves of a run as a picture, logs/RUN/curves.png, without any server.

    python -m utils.logging.watch demo_absorbing
    python -m utils.logging.watch demo_absorbing --every 30

The windows, words and units are those of the dashboard. With --every it draws again and again until
the run has ended.
"""

import argparse
import math
import time
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hparams.parser import LOGS, run_name
from utils.errors import SettingsError, UserError, run_tool
from utils.files import whole_file
from utils.logging.curves import GROUPS, plots
from utils.logging.logger import read_metrics
from utils.logging.panes import COLOURS
from utils.logging.replay import settings_of
from utils.runs.folder import RunFolder, listed_runs, run_names
from utils.runs.script import unless_in_use

COLUMNS = 3
SIZE = 4.6, 3.4  # inches of a window
DPI = 100


def find_run(text, logs=LOGS):
    """The RunFolder of the run that a person names; UserError with the runs there are."""
    try:
        folder = RunFolder(run_name(text), logs) if text else None
    except SettingsError:
        folder = None
    if folder is not None and folder.metrics.exists():
        return folder
    names = run_names(logs)
    problem = f"{logs / text} holds no metrics.jsonl" if text else "name the run to draw"
    raise UserError(f"{problem}: runs under {logs}/ are {listed_runs(names)}" if names else
                    f"{problem}, and no run under {logs}/ does")


def draw(name, shown, step):
    """A matplotlib Figure of the Plots `shown` of the run `name`, at a step."""
    rows = math.ceil(len(shown) / COLUMNS)
    columns = min(COLUMNS, len(shown))
    figure = Figure((SIZE[0] * columns, SIZE[1] * rows + 0.4), layout="constrained")
    figure.suptitle(f"{name}, step {step}", parse_math=False)
    for axes, plot in zip(figure.subplots(rows, columns, squeeze=False).flat, shown):
        draw_plot(axes, plot)
    for axes in figure.axes[len(shown) :]:
        axes.set_axis_off()
    return figure


def draw_plot(axes, plot):
    """Draw one Plot on matplotlib's axes."""
    for trace in plot.traces:
        values = [math.nan if value is None else value for value in trace.values]
        axes.plot(trace.steps, values, label=trace.label, marker="o" if trace.is_short else "",
                  color=COLOURS[trace.stat % len(COLOURS)], markersize=3,
                  linestyle="dotted" if trace.dashed else "solid")
    axes.set_title(plot.title, parse_math=False)
    axes.set_xlabel("step")
    axes.set_ylabel(plot.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.3)
    if plot.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif plot.from_zero:
        axes.set_ylim(bottom=0)
    if plot.legend:  # below the axis: inside it would hide curves
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2,
                    frameon=False)


def draw_run(folder):
    """Write the curves of a run into its curves.png; returns (path, step), None where nothing is
    recorded yet."""
    lines = read_metrics(folder.metrics)
    shown = plots(lines, settings_of(folder))
    if not shown:
        return None
    step, path = max(line["step"] for line in lines), folder.curves
    with whole_file(path, durable=False) as file:
        draw(folder.path.as_posix(), shown, step).savefig(file, format="png", dpi=DPI)
    return path, step


def nothing_to_draw(folder):
    """Why a run has no curves, in words."""
    groups = {line["group"] for line in read_metrics(folder.metrics)}
    if groups and not groups & set(GROUPS):
        return (f"{folder.path} is the run of an experiment, which has figures instead of curves: "
                f"they are on its page, {folder.report}")
    return f"{folder.metrics} holds no curve yet"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m utils.logging.watch", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", nargs="?", default="", help="name of a run below logs/")
    parser.add_argument("--every", type=float, default=0, metavar="SECONDS",
                        help="draw again after so many seconds, until the run has ended")
    parser.add_argument("--logs", type=Path, default=LOGS, help="the folder of the runs")
    flags = parser.parse_args(argv)
    if not 0 <= flags.every < math.inf:
        parser.error("--every must be a number of seconds, 0 or more")
    folder = find_run(flags.run, flags.logs)
    while True:
        with unless_in_use(folder) as has_ended:  # asked first: what is written last is drawn too
            goes_on = not has_ended
        drawn = draw_run(folder)
        if drawn:
            print(f"{drawn[0]}: the curves until step {drawn[1]}", flush=True)
        elif not (flags.every and goes_on):
            raise UserError(nothing_to_draw(folder))
        if not (flags.every and goes_on):
            return
        time.sleep(flags.every)


if __name__ == "__main__":
    run_tool(main)
