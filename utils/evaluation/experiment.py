"""What all experiments share: a trained run, its samples in a stream, and results that say how
they came about.

    with experiment(get_fid_hparams(argv), "FID") as run:
        run.load_sampler()
        for images in run.samples():  # uint8 [b, C, S, S], n_samples in all
            ...
        run.report({"FID": ...})

Ids of samples are kept as they are drawn, and features of images as they are computed, so that an
interrupted experiment goes on where it stopped. The processes that torchrun starts divide both
among them; then the first one goes on alone.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import time

from utils.errors import UserError
from utils.runs.files import remove_leftovers, whole_file
from utils.training.assemble import autoencoder_path, load_autoencoder, load_sampler, sampler_path
from utils.training.checkpoints import file_hash
from utils.training.processes import World, alone, join
from utils.evaluation.features import features_in_parts, features_key
from utils.logging.images import remove_images, save_images_individually, to_uint8
from utils.evaluation.samples import CHUNK, decode, drawn_ids, given_ids, sampling_settings
from utils.runs.script import address_of, command_of, start_run
from utils.training.loop import Precision

LIBRARIES = ("torch", "torchvision", "torch-fidelity", "lpips", "numpy", "scipy", "pillow")
# where a measurement runs and is shown, which is no part of what is measured
ELSEWHERE = {"log_dir", "visdom_server", "visdom_port", "no_visdom", "num_workers",
             "save_individually", "resume"}


class ShareIsDone(Exception):
    """This process has done its share; the first one goes on alone."""


@contextlib.contextmanager
def experiment(H, name, shared=True):
    """The run of an experiment: opens its log, gives an `Experiment` called `name`.

    An experiment that is not `shared` refuses to be run by torchrun.
    """
    world = join(H.device) if shared else World(device=alone(H.device))
    with start_run(H, world.device, world) as log, contextlib.suppress(ShareIsDone):
        for folder in (log.folder.path, log.folder.images):
            remove_leftovers(folder)
        if H.resume:
            log.info(f"--resume: going on with what is kept in {log.folder.path}")
        yield Experiment(H, name, world, log)


class Experiment:
    """A trained run to be measured: `autoencoder`, `sampler` once loaded, and what is known of
    them.

    `facts` is what belongs into the results' manifest beside the settings: checkpoints, data,
    samples. Whatever a result depends on is put there before `report`.
    """

    def __init__(self, H, name, world, log):
        self.H, self.name, self.world, self.log = H, name, world, log
        self.device = world.device
        self.precision = Precision(H.amp, self.device)
        self.facts = {"checkpoints": {}}
        self.began = time.perf_counter()
        self.autoencoder = self.sampler = None
        self.temporary = []  # Parts that go once the results are there

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

    @functools.cached_property
    def ids(self):
        """Parts of the ids of `n_samples` samples: drawn and kept, or read from
        `--latents_path`."""
        H, sampler, log, facts = self.H, self.sampler, self.log, self.facts["samples"]
        if "latents" in facts:
            return given_ids(H, sampler.tokens, log)
        return drawn_ids(H, sampler, self.precision, facts, log.folder.samples, log)

    def divide(self, *things):
        """Let each of torchrun's processes make its share of Parts or Wholes.

        The first one then goes on, the others leave the block of `experiment`.
        """
        for thing in things:
            thing.share(self.world)
        if not self.world.is_first:
            raise ShareIsDone

    def image_folder(self, name):
        """With `--save_individually` the folder images/<name>_<step>/; None without."""
        if not self.H.save_individually:
            return None
        return self.log.folder.images / f"{name}_{self.H.load_step}"

    def decode(self, part):
        """Images uint8 [b, C, S, S] of a part of `ids`."""
        ids = part["ids"].long().to(self.device)
        return to_uint8(decode(self.sampler, self.autoencoder, ids))

    def samples(self):
        """Iterator of images uint8 [b, C, S, S], `n_samples` in all.

        With `--save_individually` they are written on their way. Of several processes the first
        one alone gets them.
        """
        self.divide(self.ids)
        if folder := self.image_folder("samples"):
            remove_images(folder)  # those of an earlier command
        for (first, _), part in zip(self.ids.spans, self.ids):
            images = self.decode(part)
            if folder:
                save_images_individually(images, folder, first)
            yield images

    def sample_features(self, extractor):
        """Parts of what `extractor` gives for the samples, which `--save_individually` writes."""
        folder = self.image_folder("samples")

        def batches(first, n, on_unreadable):
            images = self.decode(self.ids.part(first, n))
            if folder:
                save_images_individually(images, folder, first)
            return images.split(self.H.batch_size)

        data = {**self.facts["samples"], **self.facts["checkpoints"]}
        key = features_key(data, extractor, *extractor.layers)
        return self.temporary_features(
            batches, extractor, self.ids.count, CHUNK, key, "samples", folder
        )

    def temporary_features(
        self, batches, extract, count, size, key, description, images=None
    ):
        """`features_in_parts` that are kept in the run's folder until the results are there.

        `images` is the folder that `batches` writes images to, if it does. All are then written
        anew, in place of those of an earlier command, and so are the features.
        """
        folder = self.log.folder.features / key[:16]
        parts = features_in_parts(
            batches, extract, count, size, lambda first, n: folder / f"{first:06d}_{n}.pt", key,
            self.log, description,
        )

        def begin_anew():
            if self.world.is_first:
                remove_images(images)
                parts.remove()
            self.world.wait()

        if images:
            parts.begin = begin_anew
        self.temporary.append(parts)
        return parts

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
        for parts in self.temporary:
            parts.remove()
        self.log.info(self.name, markdown_table(figures))
        self.log.info(f"kept as {key!r} in {path}")
        self.log.table(self.name, figures)
        numbers = {name: value for name, value in figures.items() if value is not None}
        self.log.metrics(self.H.load_step, numbers, group=self.name)


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
