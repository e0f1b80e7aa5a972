"""Train a prior over the ids of a trained VQGAN: absorbing diffusion or autoregressive.

    python train_sampler.py --sampler absorbing --dataset digits --log_dir absorbing_digits \
        --ae_load_dir vqgan_digits --ae_load_step 500 --train_steps 1500 --ema
"""

import torch

from hparams import get_sampler_hparams
from utils.runs.folder import RunFolder
from utils.training.assemble import build_sampler, check_autoencoder, load_autoencoder
from utils.training.checkpoints import Checkpoints, choose_checkpoint, weights_hash
from utils.data.datasets import load_dataset, train_validation_split
from utils.training.processes import join
from utils.data.latents import latent_batches, load_latents
from utils.data.batches import stream_positions
from utils.training.muon import MuonWithAdamW
from utils.evaluation.samples import decode
from utils.runs.script import log_changed_settings, record_settings, run_script, start_run
from utils.training.loop import (
    EMA, Precision, backward, buffers_kept, due, learning_rate, seed_step, set_learning_rate,
    step_seed, take_step, training_loop,
)

VALIDATION_DRAWS = 8


def build_optimizer(sampler, H):
    """Adam over all parameters, as published, or Muon with AdamW."""
    if H.optimizer == "muon":
        return MuonWithAdamW(sampler, H.lr, H.weight_decay)
    return torch.optim.Adam(sampler.parameters(), lr=H.lr)


def train_step(sampler, model, ema, optimizer, ids, step, H, precision, world):
    """One step on ids [B, N], this process's share; `model` is `sampler` as the world wraps it."""
    sampler.train()
    set_learning_rate(optimizer, learning_rate(H, step))
    noise = None
    if world.size > 1:  # the processes draw the same, that of the whole batch
        noise = torch.Generator(ids.device).manual_seed(step_seed(H.seed, step))
    with buffers_kept(sampler):
        with precision.autocast():
            stats = model(ids, noise, (world.rank, world.size))
        backward(stats["loss"], optimizer, precision)
        take_step([stats["loss"]], [optimizer], precision, world, H.clip_grad_norm)
    if ema is not None and due(step, H.steps_per_update_ema):
        ema.update(sampler)
    return {name: value.detach() for name, value in stats.items()}


@torch.no_grad()
def validate(sampler, ids, H, precision):
    """Bits per token of held-out ids [n, N], each seen VALIDATION_DRAWS times.

    The times are spread evenly over 1..T and the noise is always the same.
    """
    device = next(sampler.parameters()).device
    seed_step(0, 0, "validation")
    bits = []
    with precision.autocast():
        for part in ids.repeat(VALIDATION_DRAWS, 1).split(max(H.batch_size, 64)):
            bits.append(sampler.bits_per_token(part.to(device)))
    return {"bits_per_token": float(torch.cat(bits).double().mean())}


def main(argv=None):
    H = get_sampler_hparams(argv)
    world = join(H.device)
    device = world.device
    with start_run(H, device, world) as log:
        choose_checkpoint(H, log, world)
        dataset = load_dataset(H)
        autoencoder = load_autoencoder(H, device, log)
        train_set, validation_set = dataset, None
        if H.steps_per_eval:
            train_set, validation_set = train_validation_split(dataset)
        flip, workers = H.horizontal_flip, H.num_workers
        ids = load_latents(train_set, autoencoder, flip, workers, device, log, world)
        if validation_set is not None and world.is_first:
            held_out = load_latents(validation_set, autoencoder, False, workers, device, log)
            held_out = held_out[:, 0].long()  # [n, N]

        seed_step(H.seed, 0, "weights")
        sampler = build_sampler(H, autoencoder).to(device)
        ema = EMA(sampler, H.ema_beta) if H.ema and world.is_first else None
        best = ema.model if ema else sampler
        optimizer = build_optimizer(sampler, H)
        precision = Precision(H.amp, device)
        log.info(f"precision: {precision.description}")
        models = {H.sampler: sampler, **({f"{H.sampler}_ema": ema.model} if ema else {})}
        checkpoints = Checkpoints(
            log.folder, models, {f"{H.sampler}_optim": optimizer}, precision.scaler,
            H.keep_checkpoints,
        )
        stats = {}
        if H.load_step:
            run = RunFolder(H.load_dir)
            stats = checkpoints.restore(run, H.load_step, log, optimizers=H.load_optim)
            check_autoencoder(autoencoder, stats, run.model(H.sampler, H.load_step))
            log_changed_settings(H, run, log)
        model = world.wrap(sampler)
        if world.is_first:
            record_settings(H, log)
        identity = {"autoencoder": weights_hash(autoencoder)}
        share = world.rank, world.size
        batches = latent_batches(ids, H.batch_size, H.seed, H.load_step, device, share)

        def step_of_training(step):
            return train_step(
                sampler, model, ema, optimizer, next(batches), step, H, precision, world
            )

        def batch(step):
            return stream_positions(len(ids), H.batch_size * world.size, H.seed, step - 1)[0]

        def run_validation(step):
            best.eval()
            log.metrics(step, validate(best, held_out, H, precision), group="validation")

        def display(step, save, show):
            best.eval()
            seed_step(H.seed, step, "samples")
            with torch.no_grad(), precision.autocast():
                samples = best.sample(min(H.batch_size, 64), H.temp)
            images = decode(best, autoencoder, samples)
            log.images(step, "samples", images, save=save, display=show,
                       individually=H.save_individually)
            if H.sampler == "absorbing" and show:
                log.bars(step, "loss_per_timestep", sampler.loss_history[1:])

        training_loop(
            H, log, world, stats.get("seconds", 0.0), step_of_training,
            batch=batch, validate=run_validation, display=display,
            save=lambda step, so_far: checkpoints.save(step, {**so_far, **identity}),
        )


if __name__ == "__main__":
    run_script(main)
