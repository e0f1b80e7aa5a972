"""Draw samples from a trained sampler and save them as PNG.

    python experiments/get_samples.py --load_dir absorbing_digits --load_step 2200 --ema \
        --n_samples 64 --log_dir samples_digits

Everything else (dataset, autoencoder, architecture) is read from the run's hparams.yaml; runs
without one, such as published checkpoints, need the flags that train_sampler.py was given.
Writes logs/<log_dir>/images/samples_<step>.png, the first hundred side by side, and
logs/<log_dir>/ids_<step>.pt, the ids of all, which --latents_path of the measuring scripts takes.
An interrupted command goes on where it stopped when it is given again, and torchrun's processes
divide the samples among them.
"""

import torch

from hparams import get_samples_hparams
from utils.evaluation.experiment import experiment
from utils.files import save_file
from utils.runs.script import run_script

SHOWN = 100


def main(argv=None):
    H = get_samples_hparams(argv)
    with experiment(H, "samples") as run:
        run.load_sampler()
        shown, count = [], 0
        for images in run.samples():
            shown.append(images[: max(0, SHOWN - count)])
            count += len(images)
        run.show_images("samples", torch.cat(shown))
        ids = torch.cat([run.ids.part(*span)["ids"] for span in run.ids.spans])
        path = run.log.folder.path / f"ids_{H.load_step}.pt"
        save_file(ids.int(), path)
        run.log.info(f"samples are in {run.log.folder.images}, their ids in {path}")
        run.report({"samples": count, "of them different": len(ids.unique(dim=0))})


if __name__ == "__main__":
    run_script(main)
