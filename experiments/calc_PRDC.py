"""Precision, recall, density and coverage of a trained sampler (Naeem et al., 2002.09797).

    python experiments/calc_PRDC.py --sampler absorbing --dataset churches --log_dir PRDC_log \
        --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches \
        --load_step 2000000 --ema --n_samples 50000 --temp 0.9

Compares the features of --n_samples samples with those of as many images of the dataset (all,
where it has no more). --fake_images_path measures a folder of images instead. Features are kept
where --real_feats and --fake_feats say, and made again when they belong to other images, another
extractor or another checkpoint. An interrupted command goes on where it stopped when it is given
again, and torchrun's processes divide samples and images among them.
"""

import torch
from tqdm import tqdm

from hparams import UserError, get_prdc_hparams
from utils.training.checkpoints import file_hash
from utils.data.datasets import ImageFiles, load_dataset, scan
from utils.evaluation.experiment import experiment
from utils.evaluation.features import (
    PART, Extractor, KeptFeatures, dataset_images, features_key, features_of, real_subset,
    reference_features,
)
from utils.evaluation.metrics import prdc, prdc_blocks
from utils.runs.script import run_script


def images_of_folder(H):
    """The `n_samples` images of `--fake_images_path`; UserError where there are fewer."""
    found = scan(H.fake_images_path)
    if len(found) < H.n_samples:
        raise UserError(
            f"--fake_images_path {H.fake_images_path} holds {len(found)} images, fewer than "
            f"--n_samples {H.n_samples}"
        )
    return ImageFiles(
        "fake", H.img_size, H.n_channels, H.fake_images_path, found[: H.n_samples]
    )


def fake_features(run, extractor):
    """Parts of the features of samples, or of the images of `--fake_images_path`."""
    H = run.H
    if not H.fake_images_path:
        return run.sample_features(extractor)
    folder = images_of_folder(H)
    fingerprint = folder.fingerprint()
    run.facts["samples"] = {"folder": H.fake_images_path, "fingerprint": fingerprint}
    return run.temporary_features(
        dataset_images(folder, H, run.device), extractor, len(folder), PART,
        features_key(fingerprint, extractor, "prc"), "images to measure",
    )


def main(argv=None):
    H = get_prdc_hparams(argv)
    with experiment(H, "PRDC") as run:
        dataset = load_dataset(H)
        run.note_data(dataset)
        if not H.fake_images_path:
            run.load_sampler()
        extractor = Extractor(
            H.feature_extractor, H.feature_extractor_weights, run.device, ["prc"]
        )
        run.facts["extractor"] = extractor.facts
        real = reference_features(
            real_subset(dataset, H.n_samples), extractor, "prc", H, run.device, run.log,
            H.real_feats,
        )
        fake = fake_features(run, extractor)
        if H.fake_feats:
            fake = KeptFeatures(H.fake_feats, fake, "prc")
        run.divide(real, fake)
        real = real.get()
        fake = fake.get() if H.fake_feats else torch.cat(list(features_of(fake, "prc")))
        # such a file may be somebody's own, of which nothing else is known
        run.facts["features"] = {
            path: file_hash(path) for path in (H.real_feats, H.fake_feats) if path
        }
        if real.shape[1] != fake.shape[1]:
            raise UserError(f"--real_feats hold {real.shape[1]} numbers an image, --fake_feats "
                            f"{fake.shape[1]}: they are of different extractors")
        fewest = min(len(real), len(fake))
        if fewest <= H.nearest_k:
            raise UserError(f"--nearest_k {H.nearest_k} needs more images than {fewest}")
        blocks = prdc_blocks(len(real), len(fake))
        with tqdm(total=blocks, desc="distances", unit="block", dynamic_ncols=True) as bar:
            figures = prdc(
                real.to(run.device), fake.to(run.device), H.nearest_k, progress=bar.update
            )
        run.report({**figures, "real images": len(real), "samples": len(fake)})


if __name__ == "__main__":
    run_script(main)
