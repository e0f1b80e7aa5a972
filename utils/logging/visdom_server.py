"""Start the visdom server that shows the plots of a run, with or without the internet.

    python -m utils.logging.visdom_server
    python -m utils.logging.visdom_server --scripts_from_npm    # where only npm can be reached

The `visdom` command dies where it cannot download the scripts of its web page. The same server
starts here anyway: it receives plots, and the page works once the scripts are there. It shows all
runs under logs/, finished ones too, which a process of its own draws (utils/logging/restore.py).
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import visdom
import visdom.server.app
from visdom.server.defaults import DEFAULT_ENV_PATH
from visdom.server.run_server import start_server

from hparams.environment import is_loopback
from hparams.parser import LOGS
from utils.errors import UserError, run_tool

STATIC = Path(visdom.__file__).parent / "static"
DOWNLOAD_SECONDS = 30

# What the page loads, as in visdom/server/build.py: file in STATIC -> npm package/file in it.
_BOOTSTRAP = "bootstrap@3.3.7/dist"
_FONT = "fonts/glyphicons-halflings-regular"
_FONTS = [f"{_FONT}.{kind}" for kind in ("eot", "woff2", "woff", "ttf")]
_MATHJAX = (
    "MathJax.js", "config/Safe.js", "config/TeX-AMS-MML_HTMLorMML.js", "extensions/Safe.js",
    "jax/output/SVG/config.js", "jax/output/SVG/fonts/TeX/Size1/Regular/Main.js",
    "jax/output/SVG/fonts/TeX/fontdata.js", "jax/output/SVG/jax.js",
)
SCRIPTS = {
    "js/jquery.min.js": "jquery@3.1.1/dist/jquery.min.js",
    "js/bootstrap.min.js": f"{_BOOTSTRAP}/js/bootstrap.min.js",
    "css/bootstrap.min.css": f"{_BOOTSTRAP}/css/bootstrap.min.css",
    **{font: f"{_BOOTSTRAP}/{font}" for font in _FONTS},
    # The page asks for the name with the anchor in it.
    f"{_FONT}.svg#glyphicons_halflingsregular": f"{_BOOTSTRAP}/{_FONT}.svg",
    "js/react-react.min.js": "react@16.2.0/umd/react.production.min.js",
    "js/react-dom.min.js": "react-dom@16.2.0/umd/react-dom.production.min.js",
    "js/react-modal.min.js": "react-modal@3.1.10/dist/react-modal.min.js",
    "js/plotly-plotly.min.js": "plotly.js-dist-min@2.11.1/plotly.min.js",
    "js/sjcl.js": "sjcl@1.0.7/sjcl.js",
    "js/layout_bin_packer.js": "layout-bin-packer@1.4.0/dist/layout-bin-packer.js",
    "js/layout-bin-packer.js.map": "layout-bin-packer@1.4.0/dist/layout-bin-packer.js.map",
    "js/d3.v3.min.js": "d3@3.5.17/d3.min.js",
    "js/d3-selection-multi.v1.js": "d3-selection-multi@1.0.1/build/d3-selection-multi.js",
    "js/saveSvgAsPng.js": "save-svg-as-png@1.4.17/lib/saveSvgAsPng.js",
    "css/react-resizable-styles.css": "react-resizable@1.4.6/css/styles.css",
    "css/react-grid-layout-styles.css": "react-grid-layout@0.16.3/css/styles.css",
    "fonts/classnames": "classnames@2.2.5/index.js",  # there, because visdom puts it there
    **{f"js/mathjax/2.7.5/{name}": f"mathjax@2.7.5/{name}" for name in _MATHJAX},
}


def scripts_are_there():
    """Whether all scripts of this version of visdom are in its static folder."""
    built = STATIC / "version.built"  # written last: without it a download was cut off
    if not built.exists() or built.read_text().strip() != visdom.__version__:
        return False
    return all((STATIC / name).exists() for name in SCRIPTS)


def download_scripts():
    """Let visdom download its scripts, for at most 30 seconds; returns whether all are there."""
    # In a process of its own, because visdom sets no time limit and prints its failures.
    command = [sys.executable, "-c", "import visdom.server.build as b; b.download_scripts()"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, capture_output=True, timeout=DOWNLOAD_SECONDS)
    return scripts_are_there()


def fetch_scripts_from_npm():
    """Put the scripts into visdom's static folder with `npm pack`.

    Raises UserError where npm is missing, does not get a package, or the folder is read-only.
    """
    packages = {source.partition("/")[0] for source in SCRIPTS.values()}
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--loglevel=error", *sorted(packages)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        except FileNotFoundError:
            raise UserError("--scripts_from_npm needs the npm command: install npm") from None
        if done.returncode != 0:
            reason = "; ".join(done.stderr.splitlines()[:2]) or "no reason given"
            raise UserError(f"npm does not give the page's scripts: {reason}")
        for name, source in SCRIPTS.items():
            package, _, inside = source.partition("/")
            try:
                with tarfile.open(Path(folder) / f"{package.replace('@', '-')}.tgz") as archive:
                    content = archive.extractfile(f"package/{inside}").read()
                (STATIC / name).parent.mkdir(parents=True, exist_ok=True)
                (STATIC / name).write_bytes(content)
            except KeyError as error:
                raise UserError(f"the npm package {package} is not as expected: {error}") from None
            except OSError as error:
                raise UserError(f"cannot write into {STATIC}: {error.strerror}") from None
    (STATIC / "version.built").write_text(visdom.__version__)


@contextlib.contextmanager
def drawn_runs(port, logs):
    """Draw the runs of the folder `logs` from another process, which waits for the server."""
    if not Path(logs).is_dir():
        yield
        return
    command = [sys.executable, "-m", "utils.logging.restore", "--logs", str(logs)]
    process = subprocess.Popen([*command, "--server", "http://127.0.0.1", "--port", str(port)])
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def main(argv=None):
    """Read the flags (`argv` or the command line) and serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--port", "-p", type=int, default=8097, help="port")
    parser.add_argument("--hostname", default="127.0.0.1",
                        help="the default is for this machine only; any other name opens the "
                        "server, which asks for no password, to all networks of the machine")
    parser.add_argument("--env_path", default=DEFAULT_ENV_PATH, help="where plots are kept")
    parser.add_argument("--logs", default=LOGS, help="the folder whose runs are shown")
    scripts = parser.add_mutually_exclusive_group()
    scripts.add_argument("--no_download", action="store_true",
                         help="do not try to download the page's scripts")
    scripts.add_argument("--scripts_from_npm", action="store_true",
                         help="get the page's scripts with npm, once")
    flags = parser.parse_args(argv)

    if not scripts_are_there():
        if flags.scripts_from_npm:
            fetch_scripts_from_npm()
        elif flags.no_download or not download_scripts():
            print(
                "The page's scripts are not all there: plots are received, and the page shows them"
                " once the server was started with the internet or with --scripts_from_npm.",
                flush=True,
            )
    # Visdom turns on tornado's debug mode, which restarts the server, and so loses the plots,
    # whenever a source file changes.
    visdom.server.app.tornado_settings["autoreload"] = False
    try:
        Path(flags.env_path).mkdir(parents=True, exist_ok=True)
        with drawn_runs(flags.port, flags.logs):
            start_server(
                flags.port, flags.hostname, base_url="", bind_local=is_loopback(flags.hostname),
                env_path=os.path.join(flags.env_path, ""),
            )
    except OSError as error:
        raise UserError(
            f"cannot serve port {flags.port} with plots in {flags.env_path} ({error.strerror}):"
            " try another --port or --env_path"
        ) from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    run_tool(main)
