"""FID of a VQGAN: how far its reconstructions lie from the images themselves.

    python experiments/calc_VQGAN_FID.py --dataset ffhq --log_dir FID_log --load_dir vqgan_ffhq \
        --load_step 2200000 --ema

All images of the dataset are reconstructed, and all are the reference: no sampler on these ids can
be expected to do better. Otherwise as calc_FID.py.
"""

import torch

from hparams import get_vqgan_fid_hparams
from hparams.runs import RunFolder
from utils.data import load_dataset
from utils.experiment import experiment
from utils.features import dataset_images, rebatch
from utils.fidelity import fid_figures
from utils.image_files import to_uint8
from utils.metrics import psnr
from utils.sampling import DECODED
from utils.scripts import run_script


@torch.no_grad()
def reconstructions(run, dataset, quality):
    """Iterator of a dataset's reconstructions uint8 [b, C, S, S]; their PSNRs [b] are appended to
    the list `quality`."""
    for images in rebatch(dataset_images(dataset, run.H, run.device, run.log), DECODED):
        decoded = to_uint8(run.autoencoder(images.to(run.device) / 255)[0])
        quality.append(psnr(images / 255, decoded / 255))
        yield decoded


def main(argv=None):
    H = get_vqgan_fid_hparams(argv)
    with experiment(H, "VQGAN FID") as run:
        dataset = load_dataset(H)
        run.note_data(dataset)
        name = "vqgan_ema" if H.ema else "vqgan"
        run.load_autoencoder(RunFolder(H.load_dir).model(name, H.load_step), H.load_step)
        quality = []
        images = run.written(reconstructions(run, dataset, quality), "reconstructions")
        figures = fid_figures(run, dataset, images, len(dataset))
        run.report({**figures, "PSNR (dB)": torch.cat(quality).mean().item()})


if __name__ == "__main__":
    run_script(main)
