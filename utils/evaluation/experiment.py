"""What all experiments share: a trained run, its samples, and results that say how they came
about.

    with experiment(get_fid_hparams(argv), "FID") as run:
        run.load_sampler()
        for images in run.samples():  # uint8 [b, C, S, S], n_samples in all
            ...
        run.report({"FID": ...})

Ids are stored as they are drawn: an interrupted experiment draws only what is missing. Several
ranks divide samples and images among them; then rank 0 goes on alone.
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import time

import torch

from models.autoencoder.formats import in_precision
from utils.data.batches import UnreadableFiles
from utils.errors import DiskError, UserError
from utils.evaluation.features import ImageStream
from utils.evaluation.report import add_result
from utils.evaluation.samples import CHUNK, decode, drawn_ids, given_ids, sampling_settings
from utils.files import file_hash, remove_leftovers, whole_file
from utils.logging.curves import PICTURES, in_words
from utils.logging.images import remove_images, save_images_individually
from utils.runs.folder import RunFolder
from utils.runs.script import command_of, start_run, without_credentials
from utils.runs.trained_on import note_training
from utils.training.build import (
    autoencoder_path, build_both, check_models, load_autoencoder, load_sampler, sampler_path,
)
from utils.training.precision import Precision
from utils.training.processes import init_processes, single_process

LIBRARIES = ("torch", "torchvision", "torch-fidelity", "lpips", "numpy", "scipy", "pillow")
NAMED = 10  # unknown numbers that a warning names
# where a measurement runs and is shown, which is no part of what is measured
NOT_MEASURED = {"log_dir", "visdom_server", "visdom_port", "no_visdom", "num_workers",
                "save_individually", "resume"}


class WorkerDone(Exception):
    """This rank has done its part; rank 0 goes on alone."""


@contextlib.contextmanager
def experiment(H, name, several=True, build=build_both):
    """Open the log of an experiment called `name`; gives its `Experiment`.

    One that cannot use `several` processes refuses torchrun. `build`: see `check_models`.
    """
    check_models(H, build)
    if RunFolder(H.log_dir).holds_run():
        raise UserError(f"--log_dir {H.log_dir} is the run of a training, whose pictures and log "
                        f"would be mixed with those of an experiment: give another name")
    processes = init_processes(H.device) if several else single_process(H.device)
    with start_run(H, processes) as log, contextlib.suppress(WorkerDone):
        for folder in (log.folder.path, log.folder.images):
            remove_leftovers(folder)
        if H.resume:
            log.info(f"--resume: going on with the samples that {log.folder.path} holds")
        run = Experiment(H, name, processes, log)
        yield run
        if processes.is_first:
            run.write_page()


class Experiment:
    """A trained run to be measured: `autoencoder` and `sampler` once loaded.

    `facts` is all that results depend on beside the settings, for their manifest.
    """

    def __init__(self, H, name, processes, log):
        self.H, self.name, self.processes, self.log = H, name, processes, log
        self.device = processes.device
        self.precision = Precision(H.amp, self.device)
        self.facts = {"checkpoints": {}}
        self.figures, self.pictures = {}, []  # what the page of the results shows
        self.began = time.perf_counter()
        self.autoencoder = self.sampler = self.dataset = None

    def load_autoencoder(self, path=None, step=None):
        """Load the autoencoder that `--ae_load_dir` names, or the one in `path`."""
        path, step = path or autoencoder_path(self.H), step or self.H.ae_load_step
        self.autoencoder = load_autoencoder(self.H, self.device, self.log, path)
        self.note_model("autoencoder", path, step)

    def load_sampler(self):
        """Load the sampler that `--load_dir` names, and its autoencoder; `facts` then say what
        samples are made of: settings of sampling, or the file of `--latents_path`."""
        H = self.H
        self.load_autoencoder()
        self.sampler = self.precision.frozen(
            load_sampler(H, self.autoencoder, self.device, self.log)
        )
        self.note_model("sampler", sampler_path(H), H.load_step)
        if latents := getattr(H, "latents_path", None):
            self.facts["samples"] = {"latents": latents, "sha256": file_hash(latents)}
        else:
            checkpoint = self.facts["checkpoints"]["sampler"]["sha256"]
            self.facts["samples"] = sampling_settings(H, checkpoint, self.precision)

    def with_settings(self, **changes):
        """This experiment with other settings of sampling, on the same models; SettingsError."""
        run = copy.copy(self)
        run.H = dataclasses.replace(self.H, **changes)
        run.H.validate()
        run.H.command, run.began = self.H.command, time.perf_counter()
        checkpoint = self.facts["checkpoints"]["sampler"]["sha256"]
        run.facts = {**self.facts, "samples": sampling_settings(run.H, checkpoint, self.precision)}
        return run

    def note_checkpoint(self, name, path, step):
        """Put a model's file into the manifest."""
        facts = {"path": str(path), "step": step, "sha256": file_hash(path)}
        self.facts["checkpoints"][name] = facts

    def note_model(self, name, path, step):
        """Put a model's file, and what it was trained on, into the manifest."""
        self.note_checkpoint(name, path, step)
        split = note_training(path, step, name, self.dataset, self.log)
        self.facts["checkpoints"][name]["trained_on"] = split

    def note_data(self, dataset):
        """Put a dataset into the manifest; before models are loaded, which are compared with it."""
        self.dataset = dataset
        self.facts["data"] = {
            "dataset": dataset.name, "images": len(dataset), "fingerprint": dataset.fingerprint()
        }

    def unreadable_files(self):
        """UnreadableFiles that the log names."""
        return UnreadableFiles(self.log.passed_over)

    @functools.cached_property
    def ids(self):
        """Parts of the ids of `n_samples` samples: drawn, or read from `--latents_path`."""
        sampler, log, facts = self.sampler, self.log, self.facts["samples"]
        if "latents" in facts:
            return given_ids(self.H, sampler.tokens, log)
        return drawn_ids(self.H, sampler, self.precision, facts, log.folder.samples, log)

    def continue_on_rank_0(self):
        """End the block of `experiment` on all ranks but 0."""
        if not self.processes.is_first:
            raise WorkerDone

    def image_folder(self, name):
        """Where `--save_individually` puts single images."""
        return self.log.folder.images / f"{name}_{self.H.load_step}"

    def remove_images(self, name):
        """With `--save_individually`, remove those of an earlier command; all ranks call this."""
        if self.H.save_individually:
            if self.processes.is_first:
                remove_images(self.image_folder(name))
            self.processes.wait()

    def save_images(self, name, images, first):
        """With `--save_individually`, save images [b, C, S, S], the first one as number `first`."""
        if self.H.save_individually:
            save_images_individually(images, self.image_folder(name), first)

    @functools.cached_property
    def decoder(self):
        """The autoencoder in the precision of this experiment, to decode samples with."""
        return in_precision(self.autoencoder, self.precision.dtype)

    def decode(self, part, first):
        """Images uint8 [b, C, S, S] of the part of `ids` from number `first` on."""
        images = decode(self.decoder, part["ids"].long().to(self.device), as_bytes=True)
        self.save_images("samples", images, first)
        return images

    def samples(self):
        """Iterator of images uint8 [b, C, S, S], `n_samples` in all, on rank 0 alone."""
        self.ids.divide(self.processes)
        self.remove_images("samples")
        self.continue_on_rank_0()
        for (first, _), part in zip(self.ids.spans, self.ids):
            yield self.decode(part, first)

    def sample_stream(self):
        """The ImageStream of the samples."""
        self.ids.prepare()

        def batches(first, n, on_unreadable):
            following = self.ids.after(first, n, self.processes.size)
            ids = self.ids.part(first, n, following=following)
            return self.decode(ids, first).split(self.H.batch_size)

        data = {**self.facts["samples"], **self.facts["checkpoints"]}
        if self.precision.dtype != torch.float32:
            data["decoded in"] = str(self.precision.dtype)
        return ImageStream(
            self.ids.count, CHUNK, batches, data, "samples", lambda: self.remove_images("samples")
        )

    def report(self, figures, **details):
        """Print the figures, a dict, as a table, show them, and keep them in results.json.

        It maps "<name> <key>" to the figures, the `details` (anything that JSON takes) and the
        manifest. Measuring the same again, with the same settings and `facts`, replaces the entry.
        Numbers that are not finite are unknown: null in the file, and named in a warning.
        """
        unknown = []
        figures, details = only_finite(figures, unknown), only_finite(details, unknown)
        if unknown:
            more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
            self.log.warning(f"not finite, and so unknown: {'; '.join(unknown[:NAMED])}{more}")
        self.figures = figures
        key, manifest = f"{self.name} {self.identity()}", self.manifest()
        path = self.log.folder.results
        results = only_finite(read_results(path))  # earlier versions wrote NaN
        results.pop(key, None)  # the newest comes last
        results[key] = {"figures": figures, **details, "manifest": manifest}
        with whole_file(path) as file:
            file.write(json.dumps(results, indent=1, allow_nan=False).encode())
        self.log.info(self.name, markdown_table(figures))
        self.log.info(f"kept as {key!r} in {path}")
        self.log.metrics(self.H.load_step, figures, group=self.name)  # a table on the board

    def identity(self):
        """A hash of what is measured: the same for the same settings and `facts`."""
        settings = dataclasses.asdict(without_credentials(self.H))
        measured = {k: v for k, v in settings.items() if k not in NOT_MEASURED}
        identity = json.dumps([self.name, measured, self.facts], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def manifest(self):
        """How the results came about, a dict that JSON takes."""
        return {
            "command": command_of(self.H),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.perf_counter() - self.began, 1),
            "device": str(self.device),
            "precision": self.precision.description,
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in LIBRARIES},
            **self.facts,
            "hyperparameters": dataclasses.asdict(without_credentials(self.H)),
        }

    def show_images(self, name, images, columns=None):
        """Save and show images [N, C, H, W] as the grid `name`, here and on the results' page."""
        self.log.images(self.H.load_step, name, images, columns=columns)
        self.show(name, self.log.folder.picture(name, self.H.load_step))

    def show(self, name, path):
        """Put the PNG file `path` on the results' page, and give it back."""
        self.pictures.append((PICTURES.get(name, name), path))
        return path

    def write_page(self):
        """Add the figures and pictures to the page of the results, report.html."""
        if not (self.figures or self.pictures):
            return
        path = self.log.folder.report
        try:
            add_result(path, self.identity(), self.name, in_words(self.figures), self.pictures,
                       self.manifest(), self.log.warning)
        except DiskError as error:  # results.json has them
            self.log.warning(str(error))
        else:
            self.log.info(f"figures and pictures are on one page: {path}")


def only_finite(value, unknown=None, name=""):
    """A copy of `value`, anything that JSON takes, with None for every number that is not finite;
    their names, such as "neighbours/pixels/0/distance", are added to the list `unknown`."""
    if isinstance(value, dict):
        return {key: only_finite(item, unknown, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [only_finite(item, unknown, f"{name}/{i}") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        if unknown is not None:
            unknown.append(name.removeprefix("/"))
        return None
    return value


def markdown_table(figures):
    """Figures, a dict of numbers or None, as a Markdown table of two columns."""
    return table(["", ""], in_words(figures).items())


def table(head, rows):
    """Rows of cells as a Markdown table."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


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
