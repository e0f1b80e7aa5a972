"""What does a trained autoencoder make of images? Pairs in a picture, and figures.

    python experiments/reconstruct.py --load_dir vqgan_digits --load_step best --ema \
        --log_dir reconstructions
    python experiments/reconstruct.py --load_dir my_vqgan --load_step best --ema \
        --images holiday.jpg pictures/cats --log_dir reconstructions

Without --images those of the run's dataset are taken, as the run takes them: only the ones held out
where it is what the run learned from. Writes logs/<log_dir>/images/pairs_<step>.png, up to 20
images, spread over all, each above its reconstruction; prints the measures of these and of all, and
keeps them in results.json. With --save_individually each reconstruction is a file too.
"""

import os
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hparams import UserError, get_reconstruct_hparams
from models.autoencoder.autoencoder import VQAutoEncoder
from utils.data.batches import UnreadableFiles, evaluation_batches
from utils.data.datasets import load_dataset
from utils.data.folders import EXTENSIONS, scan
from utils.data.images import ImageFiles
from utils.data.pixels import UnreadableImage, to_float, to_uint8
from utils.data.split import Subset, sides
from utils.evaluation.experiment import experiment, table
from utils.evaluation.pairs import PairMeasures
from utils.evaluation.reconstruction import ENOUGH
from utils.logging.images import labelled_rows, to_pil
from utils.runs.folder import RunFolder
from utils.runs.manifest import is_saved
from utils.runs.script import run_script
from utils.runs.trained_on import is_held_out, split_of

SHOWN, COLUMNS = 20, 10
BATCH = 16  # images reconstructed together


def images_in(paths, H):
    """The images in files and folders, each once, an ImageFiles; UserError where there are none."""
    found, once = [], {}
    for path in map(Path, map(os.path.expanduser, paths)):
        if path.is_dir():
            inside = scan(path)
            if not inside:
                raise UserError(f"--images: there is no image ({', '.join(EXTENSIONS)}) in {path}")
            found += [((path / name).as_posix(), *status) for name, *status in inside]
        elif path.exists():
            status = path.stat()
            found.append((path.as_posix(), status.st_size, status.st_mtime_ns))
        else:
            raise UserError(f"--images: there is no file or folder {path}")
    for file in found:
        once.setdefault(os.path.realpath(file[0]), file)
    return ImageFiles("images", H.img_size, H.n_channels, ".", list(once.values()))


def images_of_dataset(run):
    """The run's dataset, only the images that were held out where it is what was trained on."""
    H = run.H
    dataset = load_dataset(H, run.log)
    run.note_data(dataset)
    split = split_of(H.load_dir, H.load_step, run.log)
    if is_held_out(dataset, split):
        return Subset(dataset, np.flatnonzero(sides(dataset, split)))
    run.log.info(f"all {len(dataset)} images are reconstructed: none of them are known to be held "
                 f"out by {H.load_dir}")
    return dataset


def model_path(H):
    """The file of the autoencoder of `--load_dir`; UserError where that is no autoencoder's run."""
    folder = RunFolder(H.load_dir)
    path = folder.model("vqgan_ema" if H.ema else "vqgan", H.load_step)
    others = set(folder.trained_steps()) - {*folder.steps("vqgan"), *folder.steps("vqgan_ema")}
    if others and not is_saved(path):
        raise UserError(f"{H.load_dir} is the run of a sampler: --load_dir is that of an "
                        f"autoencoder, as train_vqgan.py makes it")
    return path


def unreadable_images(run):
    """UnreadableFiles that raises UnreadableImage for a file that --images names itself."""
    named = {os.path.realpath(os.path.expanduser(path)) for path in run.H.images or ()}

    def on_new(path, reason):
        if os.path.realpath(path) in named:
            raise UnreadableImage(path, reason)
        run.log.passed_over(path, reason)

    return UnreadableFiles(on_new)


@torch.no_grad()
def reconstruct(run, dataset, measures):
    """(the pairs to show, uint8 [n, 2, C, S, S], the measures of each, dicts) of a dataset, all of
    whose images are added to `measures`."""
    H, pairs, rows = run.H, [], []
    chosen = np.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).round().astype(int)
    batches = evaluation_batches(
        dataset, BATCH, H.num_workers, run.device, unreadable_images(run)
    )
    run.remove_images("reconstructions")
    with tqdm(total=len(dataset), desc="images", unit="image", dynamic_ncols=True) as bar:
        for images, places in batches:
            output, _, _, ids = run.decoder(images)
            reconstructions = to_uint8(output)
            run.save_images("reconstructions", reconstructions, measures.count)
            values = measures.add(images, to_float(reconstructions), ids)
            picked = np.isin(places.numpy(), chosen)
            picked[0] |= not pairs  # or there might be none, where those chosen cannot be read
            for row in np.flatnonzero(picked).tolist():
                pairs.append(torch.stack((to_uint8(images[row]), reconstructions[row])).cpu())
                rows.append({"image": dataset.path(int(places[row])),
                             **{name: value[row].item() for name, value in values.items()}})
            bar.update(len(images))
    return torch.stack(pairs), rows


def report(run, figures, rows):
    """Show the measures of single images above those of all, and keep both."""
    names = [name for name in rows[0] if name != "image"]
    cells = [[row["image"].replace("|", "/"), *(format(row[name], ".4g") for name in names)]
             for row in rows]
    mean = "all" if figures["images"] > len(rows) else "together"
    cells.append([mean, *(format(figures[name], ".4g") for name in names)])
    run.log.info("image by image", table(["", *names], cells))
    run.report(figures, images=rows)


def main(argv=None):
    H = get_reconstruct_hparams(argv)
    with experiment(H, "reconstruction", several=False, build=VQAutoEncoder) as run:
        path = model_path(H)
        dataset = None if H.images else images_of_dataset(run)
        run.load_autoencoder(path, H.load_step)
        if H.images:
            dataset = images_in(H.images, H)
            run.note_data(dataset)
        run.facts["data"] |= {"images": len(dataset), "fingerprint": dataset.fingerprint()}
        measures = PairMeasures(H, path, run.device)
        run.facts["extractor"] = measures.extract.facts
        pairs, rows = reconstruct(run, dataset, measures)
        if measures.count < ENOUGH:
            run.log.info(f"{measures.count} images are too few for a Fréchet distance: "
                         f"{ENOUGH} are enough")
        report(run, measures.figures(), rows)
        rows = labelled_rows({"image": pairs[:, 0], "reconstruction": pairs[:, 1]}, COLUMNS)
        picture = run.show("pairs", run.log.picture(H.load_step, "pairs", to_pil(rows)))
        run.log.info(f"images above their reconstructions: {picture}")


if __name__ == "__main__":
    run_script(main)
