"""Draw samples from a trained sampler and save them as PNG.

    python experiments/get_samples.py --load_dir absorbing_digits --load_step 1500 --ema \
        --n_samples 64 --log_dir samples_digits

Everything else (dataset, autoencoder, architecture) is read from the run's hparams.yaml; runs
without one, such as published checkpoints, need the flags that train_sampler.py was given.
"""

from hparams import get_samples_hparams
from utils.assemble import load_autoencoder, load_sampler
from utils.sampling import draw_samples
from utils.scripts import run_script, start_run
from utils.training import Precision, resolve_device


def main(argv=None):
    H = get_samples_hparams(argv)
    device = resolve_device(H.device)
    with start_run(H, device) as log:
        autoencoder = load_autoencoder(H, device, log)
        sampler = load_sampler(H, autoencoder, device, log)
        images = draw_samples(H, sampler, autoencoder, Precision(H.amp, device))
        log.images(H.load_step, "samples", images)
        if H.save_individually:
            log.images(H.load_step, "samples", images, display=False, individually=True)
        log.info(f"{len(images)} samples are in {log.folder.images}")


if __name__ == "__main__":
    run_script(main)
