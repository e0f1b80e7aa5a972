"""Draw the runs of a folder on a visdom server: finished ones, which draw nothing themselves.

    python -m utils.logging.restore
    python -m utils.logging.restore --logs logs --server http://localhost --port 8097

`make visdom` does this whenever the server starts. A run that is training is left out: it draws all
it has by itself, as soon as it finds the server.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from urllib.parse import quote

from hparams.parser import LOGS
from utils.errors import UserError, run_tool
from utils.logging.logger import read_metrics
from utils.logging.replay import replay, settings_of
from utils.logging.visdom_board import Outage, VisdomBoard
from utils.runs.folder import RunFolder, run_names
from utils.runs.script import unless_in_use

WAIT = 60  # seconds for the server to start


def draw_run(name, logs, server, port):
    """Draw the run `name`, a folder below `logs`, on the server; raises Outage.

    Returns the address of its page; None for a run that draws by itself, which is left out.
    """
    folder = RunFolder(name, logs)
    board = VisdomBoard(server, port, env=name)
    with unless_in_use(folder) as is_free:  # nobody begins to train while its files are read
        if draws_by_itself(folder, is_free):
            return None
        replay(folder, read_metrics(folder.metrics), board, math.inf)
    board.send()  # which takes so long that the run may have begun to train again
    with unless_in_use(folder) as is_free:
        begun = draws_by_itself(folder, is_free)
    if begun:
        board.clear()
        board.send(everything=False)  # closes what was sent
        return None
    return f"{board.address}/env/{quote(board.env)}"


def draws_by_itself(folder, is_free):
    """Whether a run that is in use unless it `is_free` has a board of its own."""
    return not is_free and not settings_of(folder).get("no_visdom")


def wait_for_server(server, port):
    """Wait until a visdom server answers; raises UserError after a minute."""
    end = time.monotonic() + WAIT
    while True:
        try:
            return VisdomBoard(server, port).probe()
        except Outage as error:
            if time.monotonic() > end:
                raise UserError(f"the visdom server on port {port} {error}") from None
        time.sleep(0.3)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--server", default="http://localhost", help="address of the server")
    parser.add_argument("--port", type=int, default=8097, help="port of the server")
    parser.add_argument("--logs", type=Path, default=LOGS, help="the folder of the runs")
    flags = parser.parse_args(argv)
    wait_for_server(flags.server, flags.port)
    drawn = []
    for name in run_names(flags.logs):
        try:
            drawn.append(draw_run(name, flags.logs, flags.server, flags.port))
        except Outage as error:
            raise UserError(f"not all runs are drawn, the server {error}") from None
        except Exception as error:  # a broken run must not keep the others away
            print(f"{flags.logs / name} is not drawn: {error}", file=sys.stderr)
    if drawn := list(filter(None, drawn)):
        print(f"{len(drawn)} runs of {flags.logs}/ are on the page, the newest at {drawn[0]}",
              flush=True)


if __name__ == "__main__":
    run_tool(main)
