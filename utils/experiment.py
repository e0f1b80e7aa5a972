"""What all experiments share: a trained run, its samples in a stream, and results that say how
they came about.

    with experiment(get_fid_hparams(argv), "FID") as run:
        run.load_sampler()
        for images in run.samples():  # uint8 [b, C, S, S], n_samples in all
            ...
        run.report({"FID": ...})
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import time

from hparams.errors import UserError
from hparams.files import whole_file
from utils.assemble import autoencoder_path, load_autoencoder, load_sampler, sampler_path
from utils.checkpoints import file_hash
from utils.image_files import remove_images, save_images_individually
from utils.sampling import CHUNK, decoded, read_ids, sample_ids, sampling_settings
from utils.scripts import address_of, command_of, start_run
from utils.training import Precision, resolve_device

LIBRARIES = ("torch", "torchvision", "torch-fidelity", "lpips", "numpy", "scipy", "pillow")
# where a measurement runs and is shown, which is no part of what is measured
ELSEWHERE = {"log_dir", "visdom_server", "visdom_port", "no_visdom", "num_workers",
             "save_individually"}


@contextlib.contextmanager
def experiment(H, name):
    """The run of an experiment: opens its log, gives an `Experiment` called `name`."""
    device = resolve_device(H.device)
    with start_run(H, device) as log:
        yield Experiment(H, name, device, log)


class Experiment:
    """A trained run to be measured: `autoencoder`, `sampler` once loaded, and what is known of
    them.

    `facts` is what belongs into the results' manifest beside the settings: checkpoints, data,
    samples. Whatever a result depends on is put there before `report`.
    """

    def __init__(self, H, name, device, log):
        self.H, self.name, self.device, self.log = H, name, device, log
        self.precision = Precision(H.amp, device)
        self.facts = {"checkpoints": {}}
        self.began = time.perf_counter()
        self.autoencoder = self.sampler = None

    def load_autoencoder(self, path=None, step=None):
        """Load the autoencoder that `--ae_load_dir` names, or the one in `path`."""
        path, step = path or autoencoder_path(self.H), step or self.H.ae_load_step
        self.autoencoder = load_autoencoder(self.H, self.device, self.log, path)
        self.note_checkpoint("autoencoder", path, step)

    def load_sampler(self):
        """Load the sampler that `--load_dir` names, and its autoencoder.

        From then on the manifest says what `samples` are made of: settings of sampling, or the
        file of `--latents_path` where the script has that flag.
        """
        H, path, latents = self.H, sampler_path(self.H), getattr(self.H, "latents_path", None)
        self.load_autoencoder()
        self.sampler = load_sampler(H, self.autoencoder, self.device, self.log)
        self.note_checkpoint("sampler", path, H.load_step)
        if latents:
            self.facts["samples"] = {"latents": latents, "sha256": file_hash(latents)}
        else:
            checkpoint = self.facts["checkpoints"]["sampler"]["sha256"]
            self.facts["samples"] = sampling_settings(H, checkpoint, self.precision)

    def note_checkpoint(self, name, path, step):
        """Put a model's file into the manifest."""
        self.facts["checkpoints"][name] = {
            "path": str(path), "step": step, "sha256": file_hash(path)
        }

    def note_data(self, dataset):
        """Put a dataset into the manifest."""
        self.facts["data"] = {
            "dataset": dataset.name, "images": len(dataset), "fingerprint": dataset.fingerprint()
        }

    def sample_ids(self):
        """Iterator of ids int64 [b, N], `n_samples` in all: read from `--latents_path`, or else
        drawn, or kept from an earlier start."""
        H, facts = self.H, self.facts["samples"]
        if "latents" in facts:
            ids = read_ids(H.latents_path, H.n_samples, self.sampler.tokens, H.codebook_size)
            return iter(ids.split(CHUNK))
        return sample_ids(
            H, self.sampler, self.precision, facts, H.n_samples, self.log.folder.samples, self.log
        )

    def samples(self):
        """Iterator of images uint8 [b, C, S, S], `n_samples` in all, of `sample_ids`.

        With `--save_individually` they are `written` on their way.
        """
        ids = self.sample_ids()
        return self.written(
            decoded(self.sampler, self.autoencoder, ids, self.H.n_samples), "samples"
        )

    def written(self, batches, name):
        """The images of an iterator of batches, with `--save_individually` also written to
        images/<name>_<step>/ on their way."""
        if not self.H.save_individually:
            return batches
        folder = self.log.folder.images / f"{name}_{self.H.load_step}"
        return save_on_the_way(batches, folder)

    def report(self, figures, **details):
        """Print the figures, a dict, as a table, show them, and keep them in results.json.

        results.json maps "<name> <key>" to the figures, the `details` (anything that JSON takes)
        and the manifest. The key changes with whatever was measured: settings, checkpoints, data;
        measuring the same again replaces the entry.
        """
        settings = dataclasses.asdict(self.H) | {"visdom_server": address_of(self.H)}
        measured = {k: v for k, v in settings.items() if k not in ELSEWHERE}
        identity = json.dumps([self.name, measured, self.facts], sort_keys=True)
        key = f"{self.name} {hashlib.sha256(identity.encode()).hexdigest()[:12]}"
        manifest = {
            "command": command_of(self.H),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.perf_counter() - self.began, 1),
            "device": str(self.device),
            "precision": self.precision.description,
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in LIBRARIES},
            **self.facts,
            "hyperparameters": settings,
        }
        path = self.log.folder.results
        results = read_results(path)
        results.pop(key, None)  # the newest comes last
        results[key] = {"figures": figures, **details, "manifest": manifest}
        with whole_file(path) as file:
            file.write(json.dumps(results, indent=1).encode())
        self.log.info(self.name, markdown_table(figures))
        self.log.info(f"kept as {key!r} in {path}")
        self.log.table(self.name, figures)
        numbers = {name: value for name, value in figures.items() if value is not None}
        self.log.metrics(self.H.load_step, numbers, group=self.name)


def save_on_the_way(batches, folder):
    """The batches [b, C, S, S] of an iterator, each written to `folder` as single images before it
    is handed on; images of an earlier command go first."""
    remove_images(folder)
    done = 0
    for images in batches:
        save_images_individually(images, folder, done)
        done += len(images)
        yield images


def markdown_table(figures):
    """Figures, a dict of numbers or None, as a Markdown table of two columns."""
    rows = [
        f"| {name} | {'unknown' if value is None else format(value, '.6g')} |"
        for name, value in figures.items()
    ]
    return "\n".join(["| | |", "|---|---:|", *rows])


def read_results(path):
    """The dict in a results.json, {} where there is none; UserError where it is no such file."""
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): move it away") from None
    if not isinstance(results, dict):
        raise UserError(f"{path} holds no results by name: move it away")
    return results
