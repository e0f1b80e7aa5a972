"""FID of a VQGAN: how far its reconstructions lie from the images themselves.

    python experiments/calc_VQGAN_FID.py --dataset ffhq --log_dir FID_log --load_dir vqgan_ffhq \
        --load_step 2200000 --ema

All images of the dataset are reconstructed, and all are the reference: no sampler on these ids can
be expected to do better. Otherwise as calc_FID.py.
"""

import torch

from hparams import get_vqgan_fid_hparams
from utils.runs.folder import RunFolder
from utils.data.datasets import load_dataset
from utils.evaluation.experiment import experiment
from utils.evaluation.features import PART, dataset_images, features_key, features_of, rebatch
from utils.evaluation.fidelity import fid_extractor, fid_figures
from utils.logging.images import save_images_individually, to_uint8
from utils.evaluation.metrics import psnr
from utils.evaluation.samples import DECODED
from utils.runs.script import run_script


def reconstruction_features(run, dataset, extractor):
    """Parts of the features of a dataset's reconstructions, and of their `psnr` [b]."""
    folder, images = run.image_folder("reconstructions"), dataset_images(dataset, run.H, run.device)

    @torch.no_grad()
    def batches(first, n, on_unreadable):
        for originals in rebatch(images(first, n, on_unreadable), DECODED):
            reconstructions = to_uint8(run.autoencoder(originals.to(run.device) / 255)[0])
            if folder:
                save_images_individually(reconstructions, folder, first)
            first += len(originals)
            yield torch.stack((originals, reconstructions), dim=1)  # [b, 2, C, S, S]

    def extract(pairs):
        originals, reconstructions = pairs.unbind(1)
        return {**extractor(reconstructions), "psnr": psnr(originals / 255, reconstructions / 255)}

    data = [dataset.fingerprint(), run.facts["checkpoints"]]
    key = features_key(data, extractor, *extractor.layers)
    return run.temporary_features(
        batches, extract, len(dataset), PART, key, "images to reconstruct", folder
    )


def main(argv=None):
    H = get_vqgan_fid_hparams(argv)
    with experiment(H, "VQGAN FID") as run:
        dataset = load_dataset(H)
        run.note_data(dataset)
        name = "vqgan_ema" if H.ema else "vqgan"
        run.load_autoencoder(RunFolder(H.load_dir).model(name, H.load_step), H.load_step)
        extractor = fid_extractor(run)
        reconstructions = reconstruction_features(run, dataset, extractor)
        figures = fid_figures(run, dataset, extractor, reconstructions)
        quality = torch.cat(list(features_of(reconstructions, "psnr")))
        run.report({**figures, "PSNR (dB)": quality.mean().item()})


if __name__ == "__main__":
    run_script(main)
