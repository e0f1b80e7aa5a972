"""How good and how varied are samples? Precision, recall, density, coverage (2002.09797).

    python experiments/calc_PRDC.py --sampler absorbing --dataset churches --log_dir PRDC_log \
        --ae_load_dir vqgan_churches --ae_load_step 2200000 --load_dir absorbing_churches \
        --load_step 2000000 --ema --n_samples 50000 --temp 0.9

Compares the features of --n_samples samples with those of as many images of the dataset (all,
where it has no more). --fake_images_path measures a folder of images instead. Features are kept
where --real_feats and --fake_feats say, and made again when they belong to other images, another
extractor or another checkpoint. When an interrupted command is given again, the samples that were
drawn need not be drawn again; torchrun's processes divide samples and images among them.
"""

from hparams import UserError, get_prdc_hparams
from utils.data.datasets import load_dataset
from utils.data.folders import scan
from utils.data.images import ImageFiles
from utils.evaluation.experiment import experiment
from utils.evaluation.features import dataset_stream
from utils.evaluation.measure import measure
from utils.files import file_hash
from utils.runs.script import run_script


def generated_images(run):
    """The ImageStream of samples, or of the first `n_samples` images of `--fake_images_path`."""
    H, folder = run.H, run.H.fake_images_path
    if not folder:
        run.load_sampler()
        return run.sample_stream()
    found = scan(folder)
    if len(found) < H.n_samples:
        raise UserError(f"--fake_images_path {folder} holds {len(found)} images, fewer than "
                        f"--n_samples {H.n_samples}")
    files = ImageFiles("fake", H.img_size, H.n_channels, folder, found[: H.n_samples])
    images = dataset_stream(files, H, run.device, "images to measure")
    run.facts["samples"] = {"folder": folder, "fingerprint": images.data}
    return images


def main(argv=None):
    H = get_prdc_hparams(argv)
    with experiment(H, "PRDC") as run:
        dataset = load_dataset(H, run.log)
        run.note_data(dataset)
        figures = measure(
            run, dataset, generated_images(run), ["prdc"], real_path=H.real_feats,
            generated_path=H.fake_feats,
        )
        # such a file may be somebody's own, of which nothing else is known
        run.facts["features"] = {
            path: file_hash(path) for path in (H.real_feats, H.fake_feats) if path
        }
        run.report(figures)


if __name__ == "__main__":
    run_script(main)
