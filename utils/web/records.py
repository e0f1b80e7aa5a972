"""How a picture came about: a dict that is saved beside it, with the command that makes it again.
"""

import io
import json
import shlex
import sys
import zipfile
from pathlib import Path

from hparams.experiment_groups import Page
from hparams.groups import SamplingMethod
from hparams.settings import names_of
from utils.evaluation.experiment import only_finite

OWN = names_of(Page) | names_of(SamplingMethod) | {"seed"}  # flags that are no part of the model


def given_flags(command):
    """[(name, values)] of the flags of a command line."""
    flags = []
    for token in shlex.split(command)[1:]:
        if token.startswith("--"):
            name, _, value = token[2:].partition("=")
            flags.append((name, [value] if value else []))
        elif flags:
            flags[-1][1].append(token)
    return flags


def model_flags(command):
    """Of the flags of the page's command line, those that say which model it loads, once each."""
    return {name: values for name, values in given_flags(command) if name not in OWN}


def command_for(H, script, **settings):
    """The command line of a script that does the same with the page's model; of the `settings`
    those that are None are left out. Steps are numbers: `best` may be another one tomorrow."""
    flags = model_flags(H.command)
    settings |= {name: getattr(H, name) for name in ("load_step", "ae_load_step") if name in flags}
    flags |= {name: list(map(str, value)) if isinstance(value, list) else [str(value)]
              for name, value in settings.items() if value is not None}
    words = [f"experiments/{script}.py"]
    for name, values in flags.items():
        words += [f"--{name}", *values]
    return shlex.join([python(), *words])


def python():
    """How a command of these pages names this Python: as the documentation does where it is that
    of `make install`."""
    ours = Path(sys.prefix).resolve() == Path(".venv").resolve()
    return ".venv/bin/python" if ours else "python"


def sampling_flags(H):
    """The settings by which samples are drawn, as flags; those that would do nothing are None."""
    flags = {"seed": H.seed, "n_samples": H.n_samples}
    for name, field in SamplingMethod.__dataclass_fields__.items():
        only_with = field.metadata["only_with"]
        if name in ("sample_type", "sample_steps"):
            only_with = ("sampler", "absorbing")
        counts = only_with is None or getattr(H, only_with[0]) in only_with[1:]
        flags[name] = getattr(H, name) if counts else None
    return flags


def record(run, what, command, finished, **details):
    """How a picture came about, a dict that JSON takes: `what` it shows, the command that makes it
    again (None: that of the page), models with their hashes, settings, versions; `details` are the
    picture's own."""
    manifest = run.manifest()
    manifest.pop("hyperparameters")  # those of the page, its password too
    checkpoints = {
        name: {key: value for key, value in facts.items() if key != "trained_on"}
        for name, facts in manifest.pop("checkpoints").items()
    }
    costs = {"seconds": round(finished.seconds, 3), "network_calls": finished.calls}
    return only_finite({
        "what": what, **manifest, "command": command or manifest["command"], "run": run.H.load_dir,
        "step": run.H.load_step, "checkpoints": checkpoints, **costs, **details,
    })


def as_json(facts):
    """The bytes of a record's file."""
    return json.dumps(facts, indent=1, allow_nan=False).encode()


def as_png(image):
    """The bytes of a PIL image as PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")  # with the profile of its colours
    return file.getvalue()


def as_zip(files):
    """The bytes of a ZIP archive of `files`, {name: bytes}."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()
