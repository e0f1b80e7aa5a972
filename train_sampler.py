"""Train a prior over the ids of a trained VQGAN: absorbing diffusion or autoregressive.

    python train_sampler.py --sampler absorbing --dataset digits --log_dir absorbing_digits \
        --ae_load_dir vqgan_digits --ae_load_step 500 --train_steps 1500 --ema
"""

from functools import partial

import torch

from hparams import get_sampler_hparams
from hparams.scripts import SAMPLER_ARCHITECTURE
from models.autoencoder.formats import in_precision
from utils.data.batches import evaluation_batches
from utils.data.datasets import load_dataset
from utils.data.images import augmented
from utils.data.latents import latent_batches, load_latents
from utils.data.pixel_cache import cached_pixels
from utils.data.split import apply_split, describe, sample_of, shuffled
from utils.evaluation.metrics import psnr
from utils.evaluation.samples import decode
from utils.runs.resume import choose_checkpoint, record_settings
from utils.runs.script import run_script, start_run
from utils.runs.trained_on import choose_split, is_of_other_images
from utils.training.build import (
    build_both, build_sampler, check_autoencoder, check_models, load_autoencoder, sampler_path,
)
from utils.training.checkpoints import Checkpoints, architecture_of
from utils.training.compile import compiles, only_compiled
from utils.training.cuda_graphs import capture, captures, parts_of_sampler
from utils.training.ema import EMA
from utils.training.health import sampler_health
from utils.training.loop import Means, TrainingLoop, due, mean_of, tolerate_full_disk
from utils.training.optimizers import (
    build_optimizer, is_matrix_of_block, learning_rate, set_learning_rate,
)
from utils.training.precision import (
    Precision, measuring_arithmetic, seed_step, step_seed, training_arithmetic,
)
from utils.training.processes import init_processes
from utils.training.step import backward, take_step

VALIDATION_DRAWS = 8


class SamplerTraining:
    """Everything that is trained, and the loop that trains it."""

    def __init__(self, H, log, processes):
        self.H, self.log, self.processes = H, log, processes
        self.autoencoder = load_autoencoder(H, processes.device, log)
        dataset = cached_pixels(load_dataset(H, log), H, processes, log)
        train_set, validation_set, split = apply_split(
            dataset, choose_split(H, dataset, log, autoencoder=True)
        )
        log.info(describe(split))
        self.facts = {  # kept with every checkpoint
            "split": split, "autoencoder": self.autoencoder.weights_hash,
            "architecture": architecture_of(H, SAMPLER_ARCHITECTURE),
        }
        if is_of_other_images(H, dataset, log):
            self.log_reconstruction(sample_of(dataset, 16))
        self.ids = load_latents(
            augmented(train_set, H), self.autoencoder, H, H.horizontal_flip, processes, log
        )  # [n, orientations, N]
        if validation_set:
            held_out = load_latents(validation_set, self.autoencoder, H, False, processes, log)
            chosen = shuffled(len(held_out))[: H.validation_images or len(held_out)]
            self.looked_at = held_out[chosen, 0].long()  # [n, N]

        seed_step(H.seed, 0, "weights")
        self.sampler = build_sampler(H, self.autoencoder.codebook).to(processes.device)
        self.best, self.ema = self.sampler, None
        models = {H.sampler: self.sampler}
        if H.ema and processes.is_first:
            self.ema = EMA(self.sampler, H.ema_beta, ["embedding_weight"], H.ema_warmup)
            self.best = models[f"{H.sampler}_ema"] = self.ema.model
        self.precision = Precision(H.amp, processes.device)
        self.optimizer = build_optimizer(
            self.sampler, H, is_matrix_of_block, self.precision.dtype
        )
        self.decoder = in_precision(self.autoencoder, self.precision.dtype)
        log.info(f"precision: {self.precision.description}")
        self.checkpoints = Checkpoints(
            log.folder, models, {f"{H.sampler}_optim": self.optimizer}, self.precision.scaler,
            H.keep_checkpoints,
        )
        stats = self.checkpoints.restore(H, log)
        check_autoencoder(self.autoencoder, stats, sampler_path(H))
        self.seconds = stats.get("seconds", 0.0)
        self.prepare_network(log)

    def prepare_network(self, log):
        """Make of the sampler what a step calls, as H wants it compiled, captured and spread."""
        H, processes = self.H, self.processes
        transformer = self.sampler.transformer
        transformer.checkpoint_blocks = H.checkpoint_blocks
        self.compiled = compiles(H, processes.device, log)
        if self.compiled:
            transformer.compile_blocks(fullgraph=bool(H.compile))
        if captures(H, processes, log):
            with training_arithmetic(H):
                capture(parts_of_sampler(self.sampler, H.batch_size, self.precision), log,
                        H.cuda_graphs)
        self.loss = processes.wrap(self.sampler)

    @torch.no_grad()
    def log_reconstruction(self, dataset):
        """Log how well the autoencoder reconstructs images that it was not trained for."""
        values = []
        for images, _ in evaluation_batches(
            dataset, len(dataset), 0, self.processes.device, self.log.passed_over
        ):
            values.append(psnr(images, self.autoencoder(images)[0].clamp(0, 1)))
        self.log.warning(f"it reconstructs {len(torch.cat(values))} of these images with a PSNR of "
                         f"{torch.cat(values).mean():.1f} dB, beyond which no sample can come")

    def train(self):
        """Train to `H.train_steps`."""
        H, sampler, processes = self.H, self.sampler, self.processes
        batches = latent_batches(self.ids, H, H.load_step, processes)
        with training_arithmetic(H), TrainingLoop(
            H, self.log, processes, len(self.ids), H.load_step, self.seconds
        ) as loop:
            for step in loop:
                sampler.train()
                set_learning_rate(self.optimizer, learning_rate(H, step))
                losses, stats = self.gradients(step, next(batches))
                outcome = take_step(losses, [self.optimizer], self.precision, processes,
                                    H.clip_grad_norm)
                sampler.end_step(outcome.bad)
                if self.ema and due(step, H.steps_per_update_ema):
                    self.ema.update(step // H.steps_per_update_ema, outcome.bad)
                loop.count(outcome, **stats)
                if loop.must_record:
                    record_settings(H, self.log)
                loop.end_step()
                if loop.must_reduce:
                    self.update_histories()
                best = self.judge(step, loop) if loop.must_validate else None
                if loop.must_show or loop.must_save_images:
                    with loop.interruptible("drawing samples") as progress:
                        self.show_samples(step, loop.must_save_images, loop.must_show, progress)
                if loop.must_save or best:
                    with tolerate_full_disk(self.log, unless=loop.ends):
                        stats = {"seconds": loop.seconds, **self.facts}
                        self.checkpoints.save(step, stats, best, extra=not loop.must_save)

    def gradients(self, step, ids):
        """Compute the gradients of ids [B, N] in `H.accumulate` parts.

        Returns (the loss of each part, the means of what the parts have to log).
        """
        parts, all_stats = ids.chunk(self.H.accumulate), []
        self.optimizer.zero_grad()
        for index, part in enumerate(parts):
            with self.processes.adds_up(self.loss, index + 1 == len(parts)):
                with self.precision.autocast():
                    stats = self.loss(part, **self.noise_of(step, index, len(parts)))
                backward(stats["loss"] / len(parts), self.precision)
            all_stats.append({name: value.detach() for name, value in stats.items()})
        return [stats["loss"] for stats in all_stats], mean_of(all_stats)

    def noise_of(self, step, index, parts):
        """Arguments with which every part of every rank draws the whole batch's noise and takes its
        own."""
        processes = self.processes
        if processes.size * parts == 1:
            return {}
        rng = torch.Generator(processes.device).manual_seed(step_seed(self.H.seed, step))
        part = processes.rank * parts + index, processes.size * parts
        return dict(rng=rng, part=part)

    def update_histories(self):
        """Bring the losses of each time up to date, with those of all ranks."""
        self.sampler.update_histories(self.processes.sum)
        if self.ema:
            self.ema.copy_buffers()

    def judge(self, step, loop):
        """Validate, and say how it goes; returns the record of the best step if it is this one."""
        with measuring_arithmetic():
            figures, known = self.validate()
        loop.report_validation(figures, partial(sampler_health, self.H, known))
        return self.checkpoints.better(step, figures, "bits_per_token")

    @torch.no_grad()
    def validate(self):
        """({"bits_per_token"} of held-out ids, what `sampler_health` must know).

        Each grid is seen VALIDATION_DRAWS times, with times spread evenly over 1..T and always the
        same noise.
        """
        bits, of_weights = Means(), Means()
        draws = self.looked_at.repeat(VALIDATION_DRAWS, 1)
        for model, means in {self.sampler: of_weights, self.best: bits}.items():
            model.eval()
            seed_step(0, 0, "validation")
            with self.precision.autocast(), only_compiled(self.compiled):
                for ids in draws.split(max(self.H.batch_size, 64)):
                    values = model.bits_per_token(ids.to(self.processes.device)).double()
                    means.add({"bits_per_token": values.mean()}, len(values))
        figures = bits.take()
        of_weights = (of_weights.take() or figures)["bits_per_token"]
        return figures, dict(figures, of_weights=of_weights)

    @torch.no_grad()
    def show_samples(self, step, save, display, progress):
        """Samples of the EMA where there is one, and the loss of each time step; `progress` is
        that of `models.sampling.samplers`."""
        H = self.H
        self.best.eval()
        seed_step(H.seed, step, "samples")
        with self.precision.autocast(), only_compiled(self.compiled):
            ids = self.best.sample(min(H.batch_size, 64), H.temp, progress=progress)
        images = decode(self.decoder, ids)
        with tolerate_full_disk(self.log):
            self.log.images(step, "samples", images, save=save, display=display,
                            individually=H.save_individually)
        if H.sampler == "absorbing":
            self.log.bars(step, "loss_per_timestep", self.sampler.loss_history[1:])


def main(argv=None):
    H = get_sampler_hparams(argv)
    check_models(H, build_both)
    processes = init_processes(H.device)
    with start_run(H, processes) as log:
        choose_checkpoint(H, log, processes)
        training = SamplerTraining(H, log, processes)
        training.train()


if __name__ == "__main__":
    run_script(main)
