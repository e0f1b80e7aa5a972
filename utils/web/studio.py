"""What the page computes with a trained run: samples, completions, canvases, views of an image.

Nothing here knows of a browser. What takes long is a generator that yields a `Step` now and then
and its result last; closing it ends the work. Wrong input raises UserError, with one sentence.

Shapes: n samples of N ids each on a grid h x w; images uint8 [n, C, S, S].
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hparams.scripts import NOT_NATIVE, runs_on_any_grid
from models.autoencoder.quantizers import embed_grid
from utils.data.batches import RepeatedBatches
from utils.data.datasets import load_dataset
from utils.data.pixels import UnreadableImage, to_float, to_square, to_uint8
from utils.data.split import sample_of
from utils.errors import UserError
from utils.evaluation.canvas import draw_canvases
from utils.evaluation.inpainting import as_png_holds, complete, lay_back, scaled
from utils.evaluation.neighbours import NearestNeighbours
from utils.evaluation.samples import CHUNK, decode, draw_chunks
from utils.logging.images import to_pil
from utils.runs.trained_on import images_trained_on
from utils.web.pictures import palette, veiled
from utils.web.records import command_for, record, sampling_flags
from utils.web.stepwise import Step, Worker, stepwise
from utils.web.uploads import read_upload, square_of

MOST_SAMPLES = CHUNK  # more have noise of their own in get_samples.py
MOST_COMPLETIONS, MOST_CANVASES, MOST_COMPARED = 16, 4, 16
MOST_TOGETHER = 32_000_000  # pixels of all completions of an image
MOST_STEPS = 1024
MOST_TIMES = 4  # a side of a canvas, in sides of the grid trained on
LARGEST_SEED = 2**32 - 1
NEIGHBOURS, NEIGHBOURS_AMONG = 7, 10_000  # shown; training images that are looked through at most


class Drawn(NamedTuple):
    """Images that were drawn: uint8 [n, C, H, W], or PIL images; their ids, where there are any,
    and how they came about."""

    images: Any
    ids: Any
    seconds: float
    calls: int
    record: dict


class View(NamedTuple):
    """The inside of an image uint8 [C, S, S]: its ids [N], what they decode to, `means_of_codes`,
    the nearest training images, their distances and numbers."""

    image: Any
    reconstruction: Any
    ids: Any
    patches: dict
    neighbours: Any
    distances: list
    numbers: list


class Choice(NamedTuple):
    """What a visitor chooses about sampling."""

    count: int
    method: str
    steps: int
    temp: float
    seed: int


def number(name, value, least, most, whole=True):
    """`value` as a number from `least` to `most`; UserError where it is none."""
    try:
        found = int(value) if whole else float(value)
        if found == value and least <= found <= most:
            return found
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"{name} must be a {'whole ' if whole else ''}number from {least} to {most}, "
                    f"not {str(value)[:40]}")


def names_only(sentence):
    """A sentence with the names of files alone, not the folders of this machine that hold them."""
    return re.sub(r"(?<![\w.:/])~?/(?:[^\s/]+/)*(?=[^\s/])", "", sentence)


def check_size(count, size):
    """Raise UserError where `count` images of `size` (width, height) would take long to write."""
    width, height = size
    if count * width * height > MOST_TOGETHER:
        fit = MOST_TOGETHER // (width * height)
        raise UserError(f"{count} completions of {width}x{height} pixels are more than "
                        f"{MOST_TOGETHER // 10**6} megapixels together: ask for {fit} at most, or "
                        f"give a smaller image")


def means_of_codes(image, ids):
    """{id: mean uint8 [C, p, p] of the patches of an image [C, h*p, w*p] where a grid of ids [h, w]
    has it}."""
    height, width = image.shape[1] // ids.shape[0], image.shape[2] // ids.shape[1]
    patches = image.unfold(1, height, height).unfold(2, width, width)  # [C, h, w, p, p]
    return {int(code): patches[:, ids == code].float().mean(1).round().to(torch.uint8)
            for code in ids.unique()}


class Studio:
    """A trained run, an Experiment whose sampler is loaded, to be played with.

    One piece of work runs at a time; others wait for it.
    """

    def __init__(self, run):
        self.run, self.worker = run, Worker()
        self.network = run.sampler.transformer
        self.shape, self.tokens = run.sampler.shape, run.sampler.tokens
        self.codebook = run.autoencoder.codebook.detach().cpu().float()
        self.colours = palette(self.codebook)  # uint8 [K+1, 3]
        self.blank = len(self.codebook)  # the id of what is not drawn yet
        self.is_absorbing = run.H.sampler == "absorbing"
        self.learned = None
        try:
            self.dataset, self.no_dataset = load_dataset(run.H), None
        except UserError as error:
            self.dataset, self.no_dataset = None, names_only(str(error))

    @property
    def is_native(self):
        """Whether the denoiser runs on canvases of any size."""
        return self.is_absorbing and runs_on_any_grid(self.run.H)

    # --- settings

    def with_settings(self, settings, most):
        """The run with what a visitor has chosen, of `most` samples at most; UserError."""
        changes = dict(
            n_samples=number("the number of images", settings.count, 1, most),
            temp=number("the temperature", settings.temp, 0.01, 10, whole=False),
            seed=number("the seed", settings.seed, 0, LARGEST_SEED),
        )
        if self.is_absorbing:
            most_steps = max(MOST_STEPS, self.run.H.sample_steps)
            changes["sample_steps"] = number("the number of steps", settings.steps, 1, most_steps)
            changes["sample_type"] = settings.method
        return self.run.with_settings(**changes)

    def check_absorbing(self, what):
        """Raise UserError where the sampler can draw in one order only."""
        if not self.is_absorbing:
            raise UserError(f"{what} needs an absorbing sampler: this one draws ids in one order "
                            f"only, row by row")

    def follow(self, work, finish):
        """The Steps of `work(progress)`, and last what `finish` makes of its Finished."""
        for item in stepwise(work, self.network, self.worker):
            yield item if isinstance(item, Step) else finish(item)

    # --- samples

    def draw(self, run, progress):
        """(ids [n, N], images) as experiments/get_samples.py draws them; `progress` gets ids
        [n, N], those not drawn yet `blank`."""
        def told(done, total, ids):  # [n, done] of an autoregressive sampler
            to_come = self.tokens - ids.shape[1]
            progress(done, total, torch.nn.functional.pad(ids, (0, to_come), value=self.blank))

        H, options = run.H, {}
        if self.is_absorbing:
            options = dict(sample_type=H.sample_type, sample_steps=H.sample_steps)
        [part] = draw_chunks(H, run.sampler, run.precision, [(0, H.n_samples)], torch.int32,
                             progress=told, **options)
        ids = part["ids"].long()
        return ids, decode(run.decoder, ids.to(run.device), as_bytes=True)

    def sample(self, settings, most=MOST_SAMPLES):
        """Steps with the ids so far, and the Drawn samples."""
        run = self.with_settings(settings, most)

        def finish(finished):
            ids, images = finished.result
            facts = record(run, "samples", self.command_of_samples(run), finished, ids=ids.tolist())
            return Drawn(images, ids, finished.seconds, finished.calls, facts)

        yield from self.follow(lambda progress: self.draw(run, progress), finish)

    def command_of_samples(self, run):
        """The command line that draws the samples of a run."""
        return command_for(run.H, "get_samples", **sampling_flags(run.H), log_dir="samples")

    @torch.no_grad()
    def partial(self, ids):
        """Images of ids [n, N] some of which are `blank`: their patches are veiled, and decoded as
        the mean of the codebook so that the others can be."""
        vectors = torch.cat((self.codebook, self.codebook.mean(0, keepdim=True)))
        grids = embed_grid(vectors, ids, self.shape)
        images = torch.cat([
            self.run.decoder.generator(part.to(self.run.device)).float().cpu()
            for part in grids.split(16)
        ])
        missing = (ids == self.blank).unflatten(1, self.shape)
        return to_uint8(veiled(images.clamp(0, 1), missing))

    def compare(self, first, second):
        """(0 or 1, Step or Drawn) of two settings, one after the other."""
        for side, settings in enumerate((first, second)):
            for item in self.sample(settings, MOST_COMPARED):
                yield side, item

    # --- canvases

    def canvas(self, settings, height, width, mode):
        """Steps, and the Drawn canvases of height x width ids; `mode` is windows or native."""
        self.check_absorbing("a larger canvas")
        sides = [number(name, value, trained, MOST_TIMES * trained) for name, value, trained in zip(
            ("the height in ids", "the width in ids"), (height, width), self.shape)]
        if mode not in ("windows", "native") or mode == "native" and not self.is_native:
            raise UserError(NOT_NATIVE)
        run = self.with_settings(settings, MOST_CANVASES)

        def work(progress):
            ids, images = draw_canvases(run, sides, mode, progress)
            return ids, to_uint8(images)

        def finish(finished):
            ids, images = finished.result
            command = command_for(run.H, "generate_big_samples", **sampling_flags(run.H),
                                  shape=sides, canvas=mode, log_dir="big")
            facts = record(run, "canvases", command, finished, shape=sides, canvas=mode,
                           ids=ids.tolist())
            return Drawn(images, ids, finished.seconds, finished.calls, facts)

        yield from self.follow(work, finish)

    # --- images that are given

    def photograph(self, path, index):
        """The PIL image in a visitor's file, or the one of the dataset where there is none."""
        if path:
            return read_upload(path)
        if self.dataset is None:
            raise UserError(f"there is no dataset to take an image of ({self.no_dataset}): give a "
                            f"file")
        index = number("the number of the image", index, 0, len(self.dataset) - 1)
        try:
            if self.dataset.embedded:
                return to_pil(self.dataset.pixels(index))
            return self.dataset.open(index)
        except UnreadableImage as error:
            raise UnreadableImage(Path(error.path).name, error.reason) from None

    def pixels(self, photograph):
        """A PIL image as the model sees it: uint8 [C, S, S]."""
        return to_square(photograph, self.run.H.img_size, self.run.H.n_channels)

    def fill_in(self, settings, photograph, mask, source):
        """Steps with the ids of the completions so far, and Drawn completions of a PIL image, PIL
        images of its size, whose pixels outside the mask bool [h, w] are untouched.

        `source` are the flags of experiments/inpaint.py that name the image.
        """
        self.check_absorbing("filling in")
        run, square = self.with_settings(settings, MOST_COMPLETIONS), square_of(mask)
        image = to_float(self.pixels(photograph))
        hidden = torch.from_numpy(scaled(square, run.H.img_size))
        original = as_png_holds(photograph)
        check_size(run.H.n_samples, original.size)
        at_full_size = scaled(square, min(original.size))

        def work(progress):
            completions = complete(run, image, hidden, progress)
            return [lay_back(original, completion, at_full_size) for completion in completions]

        def finish(finished):
            command = command_for(run.H, "inpaint", **source, mask="mask.png",
                                  **sampling_flags(run.H), log_dir="inpaint")
            facts = record(run, "completions", command, finished,
                           hidden_pixels=int(at_full_size.sum()), size=list(original.size))
            return Drawn(finished.result, None, finished.seconds, finished.calls, facts)

        yield from self.follow(work, finish)

    # --- the inside of an image

    @torch.no_grad()
    def inside(self, image, progress=None):
        """The View of an image uint8 [C, S, S]."""
        run = self.run
        ids = run.autoencoder.encode(to_float(image)[None].to(run.device))[-1]  # [1, N]
        reconstruction = decode(run.decoder, ids, as_bytes=True)[0]
        patches = means_of_codes(reconstruction, ids[0].cpu().view(self.shape))
        return View(image, reconstruction, ids[0].cpu(), patches,
                    *self.neighbours(image, progress))

    def neighbours(self, image, progress=None):
        """(images [m, C, S, S], distances, numbers in the dataset) of the training images nearest
        to an image uint8 [C, S, S] by the Euclidean distance of pixels in [0, 1]."""
        run = self.run
        if self.dataset is None:
            return torch.empty(0, *image.shape, dtype=torch.uint8), [], []
        if self.learned is None:
            learned = images_trained_on(run.H, self.dataset, run.log)
            self.learned = sample_of(learned, NEIGHBOURS_AMONG)
            self.batches = RepeatedBatches(
                self.learned, 64, 0, torch.device("cpu"), run.log.passed_over
            )
        nearest = NearestNeighbours(to_float(image).flatten()[None], NEIGHBOURS)
        seen = 0
        for images, places in self.batches:
            nearest.add(images.flatten(1), places)
            seen += len(images)
            if progress:
                progress(seen, len(self.learned))
        places = nearest.indices[0].tolist()
        numbers = [self.number_in_dataset(place) for place in places]
        found = torch.stack([self.learned.pixels(place) for place in places])
        return found, nearest.distances[0].sqrt().tolist(), numbers

    def number_in_dataset(self, place):
        """The number in the whole dataset of the image at a place among those looked through."""
        part = self.learned
        while part is not self.dataset:
            part, place = part.dataset, int(part.indices[place])
        return place

    def look(self, photograph, source):
        """Steps, and (View, record) of a PIL image; `source` says which it is."""
        image = self.pixels(photograph)
        for item in self.views(self.run, lambda progress: image, source):
            if not isinstance(item, Step):
                item[1].pop("samples", None)  # nothing is drawn
            yield item

    def look_at_sample(self, settings):
        """Steps, and (View, record) of a sample."""
        run = self.with_settings(settings, 1)
        source = {"command of the sample": self.command_of_samples(run)}
        yield from self.views(run, lambda progress: self.draw(run, progress)[1][0], source)

    def views(self, run, image, source):
        """Steps, and (View, record) of what `image(progress)` gives, uint8 [C, S, S]; `run` has the
        settings that it is drawn by."""
        def work(progress):
            return self.inside(image(progress), progress)

        def finish(finished):
            view = finished.result
            facts = record(run, "inside of an image", None, finished, **source,
                           ids=view.ids.unflatten(0, self.shape).tolist(),
                           neighbours=dict(zip(map(str, view.numbers), view.distances)))
            return view, facts

        yield from self.follow(work, finish)
