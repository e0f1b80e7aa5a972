"""Has the model learned its training images by heart? Those nearest to samples.

    python experiments/calc_nearest_neighbours.py --load_dir absorbing_digits --load_step 2200 \
        --ema --n_samples 16 --k_nearest 10 --log_dir neighbours_digits

Nearest by LPIPS, which sees the images as `--perceptual_range` says (by default as the autoencoder
was trained), and by the Euclidean distance between pixels in [0, 1]. Training images go by in
blocks of `--batch_size`, so their number does not matter for memory. LPIPS' VGG16 comes from
`--vgg_weights`, the autoencoder's own file, or a download; `--spaces pixels` does without.

Writes logs/<log_dir>/images/neighbours_<space>_<step>.png, each row a sample and its neighbours,
and into results.json their distances, their indices in the dataset and where they lie.
"""

import torch
from tqdm import tqdm

from hparams import get_nearest_neighbours_hparams
from models.autoencoder.perceptual import lpips_input
from utils.data.batches import evaluation_batches
from utils.data.datasets import load_dataset
from utils.data.pixels import to_float
from utils.evaluation.experiment import experiment
from utils.evaluation.neighbours import NearestNeighbours
from utils.files import weights_hash
from utils.runs.script import run_script
from utils.runs.trained_on import images_trained_on
from utils.training.build import load_perceptual


def embeddings(run):
    """{space: function from images [B, C, S, S] in [0, 1] to vectors [B, M]} of `--spaces`."""
    found = {}
    if "lpips" in run.H.spaces:
        perceptual = load_perceptual(run.H, run.device, run.log)
        run.facts["lpips"] = {"weights": weights_hash(perceptual)}
        found["lpips"] = lambda x: perceptual.vectors(lpips_input(x, run.H.perceptual_range))
    if "pixels" in run.H.spaces:
        found["pixels"] = lambda x: x.flatten(1)
    return found


@torch.no_grad()
def find_neighbours(run, embed, samples, dataset):
    """{space: NearestNeighbours} of samples [n, C, S, S] in [0, 1] among a dataset's images."""
    H, nearest = run.H, {}
    for space, vectors in embed.items():
        parts = [vectors(part.to(run.device)) for part in samples.split(H.batch_size)]
        nearest[space] = NearestNeighbours(torch.cat(parts), H.k_nearest)
    batches = evaluation_batches(
        dataset, H.batch_size, H.num_workers, run.device, run.log.passed_over
    )
    with tqdm(total=len(dataset), desc="training set", unit="image", dynamic_ncols=True) as bar:
        for images, places in batches:
            for space, vectors in embed.items():
                nearest[space].add(vectors(images), places)
            bar.update(len(images))
    return nearest


def main(argv=None):
    H = get_nearest_neighbours_hparams(argv)
    with experiment(H, "nearest neighbours") as run:
        dataset = load_dataset(H, run.log)
        learned = images_trained_on(H, dataset, run.log)
        run.note_data(learned)
        run.load_sampler()
        embed = embeddings(run)
        samples = to_float(torch.cat(list(run.samples())))
        figures, neighbours = {}, {}
        for space, nearest in find_neighbours(run, embed, samples, learned).items():
            # LPIPS is itself a squared distance of its vectors.
            distances = nearest.distances if space == "lpips" else nearest.distances.sqrt()
            figures[f"{space}: distance to the nearest (median)"] = distances[:, 0].median().item()
            figures[f"{space}: distance to the nearest (smallest)"] = distances[:, 0].min().item()
            neighbours[space], shown = [], []
            for sample, *row in zip(samples, distances.tolist(), nearest.indices.tolist()):
                shown += [sample, *(learned.load(place) for place in row[1])]
                neighbours[space].append([
                    {"distance": distance, "index": int(learned.indices[place]),
                     "path": learned.path(place)}
                    for distance, place in zip(*row)
                ])
            columns = 1 + distances.shape[1]
            run.show_images(f"neighbours_{space}", torch.stack(shown), columns)
        run.report(figures, neighbours=neighbours)
        run.log.info(f"each sample and its neighbours: {run.log.folder.images}/neighbours_*.png")


if __name__ == "__main__":
    run_script(main)
