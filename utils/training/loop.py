"""The steps of a training run: what is due after each, interrupts, and bad steps."""

import contextlib
import signal
import time

import torch

from hparams.defaults import ENDLESS
from utils.data.batches import stream_positions
from utils.errors import DiskError, UserError
from utils.logging.logger import ProgressBar
from utils.signals import Stopped, handle_signals, stop_at_once
from utils.training.precision import seed_step
from utils.training.step import is_asynchronous

STEPS_PER_SIGNAL = 10  # after which several processes ask each other who was interrupted
STEPS_PER_REDUCE = 1000  # after which they reduce their sums, if nothing is due before


def due(step, interval):
    """Whether something done every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0


@contextlib.contextmanager
def tolerate_full_disk(log, unless=False):
    """Log a DiskError and go on, `unless` the file will not be written again later."""
    try:
        yield
    except DiskError as error:
        if unless:
            raise
        log.warning(f"{error}; training goes on, and the next time will be another attempt")


def as_one_line(figures):
    """Figures, a dict of numbers, in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


class Means:
    """Means of named numbers over what has them, such as steps or images."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, stats, weight=1):
        """Add a dict of 0-d tensors or floats, each a mean over `weight` things."""
        for name, value in stats.items():
            self.sums[name] = self.sums.get(name, 0) + value * weight
            self.counts[name] = self.counts.get(name, 0) + weight

    def take(self):
        """The means, a dict of floats, of all that was added since the last call."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


def on_host(dicts):
    """Dicts of 0-d tensors or floats as dicts of floats: the device is waited for once."""
    tensors = [v for stats in dicts for v in stats.values() if torch.is_tensor(v)]
    values = iter(torch.stack([v.float() for v in tensors]).tolist() if tensors else [])
    return [
        {name: next(values) if torch.is_tensor(v) else v for name, v in stats.items()}
        for stats in dicts
    ]


def mean_of(dicts):
    """The means of dicts of numbers with the same names."""
    if len(dicts) == 1:
        return dicts[0]
    return {name: sum(stats[name] for stats in dicts) / len(dicts) for name in dicts[0]}


class _GivenUp(Exception):
    """Ends a block of `TrainingLoop.interruptible` before it is done."""


class TrainingLoop:
    """Context and iterator of the steps after `start`, up to `H.train_steps`.

    Every step is seeded by its number. Its body trains and `count`s its Outcome and its stats; then
    `must_record` says whether it was known to be the first that trained, and after `end_step`,
    `must_validate`, `must_show`, `must_save_images` and `must_save` say what is due. They are true
    on rank 0 only, and after finite steps only, but for `must_save` where the loop `ends` and has
    trained anything. `must_reduce` is true on every rank when the ranks' own sums must be reduced:
    at each log entry, before anything above, and every STEPS_PER_REDUCE steps. The loop ends after
    the last step, or raises Stopped soon after any rank gets one of SIGNALS, or UserError where no
    step was finite. `images` is the size of the training set, `seconds` what training took before
    `start`, and `hint` how an interrupted run goes on. Of TrainingBatches that are given as
    `batches` it logs how long they were waited for.

    On a GPU the host is ahead of the device, and finds out what became of the steps, by `settle`,
    only when something is due that depends on it.
    """

    PATIENCE = 30  # seconds after which a second signal ends the run amid a step

    def __init__(
        self, H, log, processes, images, start, seconds=0.0, hint=None, batches=None
    ):
        self.H, self.log, self.processes = H, log, processes
        self.images, self.start, self.step, self.hint = images, start, start, hint
        self.batches, self.waited = batches, 0.0
        self.signal, self.finite_steps, self.validation = None, 0, ""
        self.pending, self.late = [], is_asynchronous(processes.device)
        self.bar = ProgressBar(
            total=H.train_steps if H.train_steps < ENDLESS else None, initial=start,
            desc=H.log_dir, unit="step", dynamic_ncols=True, mininterval=0.5,
            disable=not processes.is_first,
        )
        self.started = time.perf_counter() - seconds
        self.means, self.training_time = Means(), 0.0  # since the last log entry
        self.logged = start  # the step of that
        self.recent, self.recent_bad_steps = Means(), 0  # since the last validation
        self.bad_steps = 0  # in a row
        self.must_record = False

    def __enter__(self):
        self.handlers = handle_signals(self.interrupt)
        self.handlers.__enter__()
        return self

    def interrupt(self, number, frame):
        """Signal handler: the step ends first, unless a person repeats Ctrl-C, or it takes long.

        torchrun repeats signals itself, and a closing terminal does.
        """
        if self.signal is None:
            self.signal, self.signalled = number, time.monotonic()
        elif self.processes.size == 1 and (
            number == signal.SIGINT or time.monotonic() - self.signalled > self.PATIENCE
        ):
            stop_at_once(number, frame)

    def __exit__(self, *exception):
        self.handlers.__exit__(*exception)
        self.bar.close()

    def __iter__(self):
        H, log = self.H, self.log
        for self.step in range(self.start + 1, H.train_steps + 1):
            self.began_step = time.perf_counter()
            self.is_last = self.step == H.train_steps
            seed_step(H.seed, self.step, self.processes.noise_purpose)
            yield self.step
            if self.first_is_busy:
                self.processes.wait()
            if self.ends and not self.is_last:
                hint = self.hint or (
                    f"go on with --resume, or with --load_dir {H.log_dir} --load_step {self.step}"
                )
                message = f"interrupted: saved step {self.step}; {hint}"
                if not self.finite_steps:
                    message = f"interrupted before a step was trained: {log.folder.last_saved()}"
                self.processes.wait()  # for rank 0 to save: torchrun ends all where one has left
                raise Stopped(self.signal or signal.SIGTERM, message)
        if self.step > self.start and not self.finite_steps:
            raise UserError(f"none of the steps was finite, so nothing is saved: lower the "
                            f"learning rate, or clip gradients ({log.folder.last_saved()})")
        if self.start >= H.train_steps:
            tell = log.warning if self.start > H.train_steps else log.info
            tell(f"step {self.start} leaves nothing to train: train_steps is {H.train_steps}")
        log.info(f"trained to step {self.step}: checkpoints are in {log.folder.models}")

    def count(self, outcome, **stats):
        """Note the step's Outcome, and 0-d tensors or floats, among them `loss`, to be logged."""
        self.pending.append((self.step, outcome, stats))
        self.must_record = False
        enough = len(self.pending) > self.H.max_bad_steps  # to end the run, were they all bad
        if enough or not (self.late and self.finite_steps):
            self.settle()

    def settle(self):
        """Find out what became of the steps since the last call, for which the device is waited.

        Bad ones are logged with their images. Raises UserError where more than `max_bad_steps` in a
        row are bad.
        """
        pending, self.pending = self.pending, []
        outcomes = on_host([{"bad": outcome.bad} for _, outcome, _ in pending])
        good = []
        for (step, outcome, stats), known in zip(pending, outcomes):
            if known["bad"]:
                self.pass_over(step, outcome.values.tolist())
            else:
                self.bad_steps = 0
                self.finite_steps += 1
                self.must_record |= self.processes.is_first and self.finite_steps == 1
                good.append(stats)
        for stats in on_host(good):
            self.means.add(stats)
            self.recent.add(stats)

    def pass_over(self, step, values):
        """Log a bad step, and count it; `values` are those of its Outcome."""
        H = self.H
        self.bad_steps += 1
        self.recent_bad_steps += 1
        batch_size = H.batch_size * self.processes.size
        indices, _ = stream_positions(self.images, batch_size, H.seed, step - 1)
        indices = " ".join(map(str, indices))
        shown = ", ".join(f"{value:.3g}" for value in values)
        self.log.warning(
            f"step {step} is passed over, it is not finite (losses, then norms of gradients: "
            f"{shown}); images of its batch: {indices}"
        )
        if self.bad_steps > H.max_bad_steps:
            raise UserError(
                f"{self.bad_steps} steps in a row up to step {step} were not finite, which "
                f"--max_bad_steps {H.max_bad_steps} does not allow: lower the learning rate, or "
                f"clip gradients ({self.log.folder.last_saved()})"
            )

    def end_step(self):
        """Log the means every `steps_per_log`, and find out what is due."""
        H, step, processes = self.H, self.step, self.processes
        self.bar.update()
        logs, checkpoint = due(step, H.steps_per_log), due(step, H.steps_per_checkpoint)
        validation = self.due(H.steps_per_eval)
        shown = not H.no_visdom and self.due(H.steps_per_display_output)
        images = self.due(H.steps_per_save_output)
        self.ends = self.is_last
        if processes.size == 1 or logs or due(step, STEPS_PER_SIGNAL):
            interrupted = self.signal is not None or processes.is_orphan
            self.ends |= processes.any(interrupted)
        # the others wait for rank 0, for as long as it takes
        self.first_is_busy = validation or shown or images or checkpoint or self.ends
        self.must_reduce = logs or self.first_is_busy or due(step, STEPS_PER_REDUCE)
        if logs or self.first_is_busy:
            self.settle()
        if logs and self.means.counts:
            self.log_means()
        else:
            self.training_time += time.perf_counter() - self.began_step
        finite = processes.is_first and not self.bad_steps
        self.must_validate = finite and validation
        self.must_show, self.must_save_images = finite and shown, finite and images
        trained = processes.is_first and self.finite_steps > 0
        self.must_save = trained and (self.ends or (finite and checkpoint))

    def due(self, interval):
        """Whether something done every `interval` steps (0: never), and at the end, is due."""
        return due(self.step, interval) or (interval > 0 and self.is_last)

    def log_means(self):
        """Log the means since the last time, images/s and steps/s of training alone, and seconds
        in all."""
        steps, self.logged = self.step - self.logged, self.step
        images = steps * self.H.batch_size * self.processes.size
        means = self.processes.mean(self.means.take())
        seconds = self.training_time + time.perf_counter() - self.began_step
        speed = images / seconds
        metrics = {**means, "images_per_second": speed, "steps_per_second": steps / seconds,
                   "seconds": self.seconds}
        if self.batches is not None:
            before, self.waited = self.waited, self.batches.seconds_waited
            metrics["waiting_for_data"] = (self.waited - before) / seconds  # a share
        self.log.metrics(self.step, metrics)
        if self.step // 100 > (self.step - self.H.steps_per_log) // 100:
            self.log.to_file("INFO", f"step {self.step}: {as_one_line(means)}")
        self.bar.set_postfix_str(
            f"loss {means['loss']:.4f}, {speed:.0f} images/s{self.validation}"
        )
        self.training_time = 0.0

    def report_validation(self, figures, diagnose):
        """Log figures of the held-out images, a dict, and keep them on the progress bar.

        `diagnose(means, bad steps)`, both since the last validation, gives sentences on what does
        not go well.
        """
        self.log.metrics(self.step, figures, group="validation")
        self.log.info(f"step {self.step}, validation: {as_one_line(figures)}")
        self.validation = f"; validation: {as_one_line(figures)}"
        sentences = diagnose(self.recent.take(), self.recent_bad_steps)
        self.recent_bad_steps = 0
        for sentence in sentences:
            self.log.warning(f"step {self.step}: {sentence}")
        if not sentences:
            self.log.info(f"step {self.step}: training goes well")
        self.log.health(self.step, sentences or ["training goes well"])

    @contextlib.contextmanager
    def interruptible(self, what):
        """A block of this process alone that takes a while, of which the progress bar says how far
        it is, and which the training can do without: a signal ends it, but for the last step's.

        Gives a `progress` (see models/sampling/samplers.py) that the block has to call.
        """
        before, shown = self.bar.postfix or "", time.monotonic()

        def progress(done, total, *_):
            nonlocal shown
            if self.signal is not None and not self.is_last:
                raise _GivenUp
            if time.monotonic() - shown > self.bar.mininterval:
                shown = time.monotonic()
                self.bar.set_postfix_str(f"{what}: {done} of {total}")

        try:
            yield progress
        except _GivenUp:
            self.log.info(f"step {self.step}: {what} is given up for the signal")
        finally:
            self.bar.set_postfix_str(before)

    @property
    def seconds(self):
        """Seconds of training so far, those of the loaded run included."""
        return time.perf_counter() - self.started
