"""A page to play with a trained model, in a browser: samples, filling in, canvases, the inside.

    make web
    python experiments/web_demo.py --load_dir demo_absorbing --load_step 2200 --ema --port 7860

Loads a trained sampler and its autoencoder, the demo's by default and the newest step, and trains
nothing. The page is for this machine alone, at http://127.0.0.1:7860; `--host 0.0.0.0` lets others
in, who have to type the password that the variable HYDRA_PASSWORD holds. Ends with Ctrl-C.
"""

import argparse
import errno
import os
import shlex
import shutil
import socket
import sys
import tempfile
import threading

from hparams import UserError, get_page_hparams
from utils.evaluation.experiment import experiment
from utils.runs.folder import RunFolder, listed_runs, run_names
from utils.runs.script import run_script
from utils.signals import Stopped

DEMO = "demo_absorbing"
SAMPLERS = ("absorbing", "autoregressive")  # names of their files


def with_run(argv):
    """The flags with the demo's run, or the newest step of a run, where they name none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--load_dir", "--load_step"):
        parser.add_argument(name)
    given, _ = parser.parse_known_args(argv)
    if {"-h", "--help", "--help_all"} & set(argv) or given.load_step:
        return argv if given.load_dir else ["--load_dir", DEMO, *argv]
    folder = RunFolder(given.load_dir or DEMO)
    steps = folder.complete_steps() or folder.trained_steps()
    if not steps:
        raise UserError(f"there is no trained run in {folder.path}: {what_to_load()}")
    if holds(folder, "vqgan") and not holds(folder, *SAMPLERS):
        raise UserError(f"{folder.path} holds an autoencoder, and the page shows samplers: "
                        f"{what_to_load()}")
    defaults = [] if given.load_dir else ["--load_dir", DEMO]
    return [*defaults, "--load_step", str(steps[-1]), *argv]


def holds(folder, *models):
    """Whether a run folder holds one of the models of these names, or its EMA."""
    return any(folder.steps(name) or folder.steps(f"{name}_ema") for name in models)


def what_to_load():
    """Which runs the page could show, in words."""
    found = [name for name in run_names() if holds(RunFolder(name), *SAMPLERS)]
    if not found:
        return "`make demo` makes one in minutes"
    return ("`make demo` makes one in minutes, or name another one with --load_dir: there are "
            f"{listed_runs(found)}")


def check_port(host, port):
    """Raise UserError where the page cannot listen on a port, before anything is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    except UnicodeError:  # a part of the name is empty, or longer than 63 letters
        raise UserError(f"{host} is no name of a machine: give another one with --host") from None


def cannot_listen(host, port, error):
    """The UserError that says why the page cannot listen, and by which flag it could."""
    flag = "--port" if error.errno in (None, errno.EADDRINUSE, errno.EACCES) else "--host"
    reason = error.strerror or str(error).partition(". ")[0]  # gradio's own go on about gradio
    return UserError(f"port {port} of {host} cannot be used ({reason.partition(' (')[0]}): give "
                     f"another one with {flag}")


def without_password(command):
    """A command line without the password, for the log."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        if word == "--password":
            words[place + 1 : place + 2] = ["..."]
        elif word.startswith("--password="):
            words[place] = "--password=..."
    return shlex.join(words)


def gradio_is_missing():
    """The sentence about gradio where it is not installed."""
    return UserError("the page needs gradio: `make web` installs it, as does "
                     "`pip install -e \".[web]\"` in .venv")


def main(argv=None):
    H = get_page_hparams(with_run(sys.argv[1:] if argv is None else argv))
    H.command = without_password(H.command)
    with experiment(H, "page", several=False) as run:
        folder = tempfile.mkdtemp(prefix="page_", dir=run.log.folder.path.resolve())
        try:
            show_page(run, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def show_page(run, folder):
    """Load the models, and serve the page until the process is asked to end; gradio's files lie in
    `folder`."""
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False",
                   "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        from utils.web.page import build_page, serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise gradio_is_missing() from None
    from utils.web.studio import Studio

    H = run.H
    check_port(H.host, H.port)
    run.load_sampler()
    page = build_page(Studio(run))
    try:
        address = serve(page, H.host, H.port, H.password)
    except OSError as error:
        check_port(H.host, H.port)  # which says more, such as that it was taken since then
        raise cannot_listen(H.host, H.port, error) from None
    try:
        everywhere = H.host in ("0.0.0.0", "::", "")
        others = f", and port {H.port} of all names of this machine" if everywhere else ""
        run.log.info(f"the page: {address}{others} (Ctrl-C ends it)")
        threading.Event().wait()
    except (KeyboardInterrupt, Stopped):
        run.log.info("the page is closed")
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    run_script(main, keep_memory=False)
