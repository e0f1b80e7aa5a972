"""How far do a VQGAN's reconstructions lie from the images themselves? FID.

    python experiments/calc_VQGAN_FID.py --dataset ffhq --log_dir FID_log --load_dir vqgan_ffhq \
        --load_step 2200000 --ema

All images of the dataset are reconstructed, and all are the reference: no sampler on these ids can
be expected to do better. The flags are otherwise those of calc_FID.py.
"""

import dataclasses

import torch

from hparams import get_vqgan_fid_hparams
from models.autoencoder.autoencoder import VQAutoEncoder
from utils.data.datasets import load_dataset
from utils.data.pixels import to_float, to_uint8
from utils.evaluation.experiment import experiment
from utils.evaluation.features import PART, ImageStream, dataset_stream
from utils.evaluation.measure import measure
from utils.evaluation.metrics import metrics_asked_for, psnr
from utils.evaluation.samples import DECODED
from utils.runs.folder import RunFolder
from utils.runs.script import run_script


def reconstruction_stream(run, dataset):
    """The ImageStream of a dataset's images, each with its reconstruction: [b, 2, C, S, S]."""
    H = dataclasses.replace(run.H, batch_size=DECODED)
    originals = dataset_stream(dataset, H, run.device, "images to reconstruct")

    @torch.no_grad()
    def batches(first, n, on_unreadable):
        for images in originals.batches(first, n, on_unreadable):
            reconstructions = to_uint8(run.autoencoder(to_float(images))[0])
            run.save_images("reconstructions", reconstructions, first)
            first += len(images)
            yield torch.stack((images, reconstructions), dim=1)

    data = [originals.data, run.facts["checkpoints"]]
    return ImageStream(len(dataset), PART, batches, data, originals.description,
                       lambda: run.remove_images("reconstructions"))


def of_pairs(extractor):
    """The features of the reconstructions in pairs [b, 2, C, S, S], and their PSNR in dB."""
    def extract(pairs):
        images, reconstructions = pairs.unbind(1)
        quality = psnr(to_float(images), to_float(reconstructions))
        return {**extractor(reconstructions), "psnr": quality.cpu()}

    return extract


def main(argv=None):
    H = get_vqgan_fid_hparams(argv)
    with experiment(H, "VQGAN FID", build=VQAutoEncoder) as run:
        dataset = load_dataset(H, run.log)
        run.note_data(dataset)
        name = "vqgan_ema" if H.ema else "vqgan"
        run.load_autoencoder(RunFolder(H.load_dir).model(name, H.load_step), H.load_step)
        names = ["fid", *metrics_asked_for(H), "psnr"]
        run.report(measure(run, dataset, reconstruction_stream(run, dataset), names, of_pairs))


if __name__ == "__main__":
    run_script(main)
