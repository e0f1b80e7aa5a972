"""Are a sampler's digits like real ones, and new? Pictures, a classifier, distances.

    python experiments/digits_report.py --load_dir demo_absorbing --load_step 2200 --ema \
        --n_samples 500 --log_dir demo

Writes logs/<log_dir>/images/report_<step>.png (real digits, reconstructions of held-out digits,
samples), prints a table of measured figures and keeps it as logs/<log_dir>/results.json. Both are
on the page logs/<log_dir>/report.html.
"""

import warnings

import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from hparams import SettingsError, UserError, get_digits_report_hparams
from utils.data.datasets import load_dataset
from utils.data.pixels import to_float, to_uint8
from utils.evaluation.experiment import experiment
from utils.evaluation.metrics import frechet_distance_of_features, psnr
from utils.logging.images import image_grid, panels
from utils.logging.logger import read_metrics
from utils.runs.folder import RunFolder
from utils.runs.script import run_script
from utils.runs.trained_on import images_held_out

SIDE = 8  # the pixels of scikit-learn's digits, to which images are reduced again
CONFIDENT = 0.8


def reduce(images):
    """Digits [n, 1, S, S] to the vectors [n, 64] of 8x8 pixels that they were enlarged from."""
    return torch.nn.functional.interpolate(images, size=(SIDE, SIDE), mode="area").flatten(1)


def recognise(classifier, images):
    """(classes [n], confidences [n]) that the classifier gives digits [n, 64]."""
    confidence, classes = torch.from_numpy(classifier.predict_proba(images.numpy())).max(1)
    return classes, confidence


def strict_figures(training, labels, parts):
    """The figures of a second, stricter classifier, SVC(probability=True), and the Fréchet distance
    of the 64 pixels to all real digits; `parts` names digits [n, 64] that are judged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions would calibrate it
        classifier = SVC(probability=True, random_state=0).fit(training.numpy(), labels)
    real, figures = torch.cat((training, parts["held-out digits"])), {}
    for name, digits in parts.items():
        _, confidence = recognise(classifier, digits)
        figures[f"strict classifier: {name} with confidence >= {CONFIDENT}"] = (
            (confidence >= CONFIDENT).double().mean().item()
        )
    for name, digits in parts.items():
        figures[f"Fréchet distance of 8x8 pixels to real digits: {name}"] = (
            frechet_distance_of_features(digits, real)
        )
    return figures


def all_images(dataset):
    return torch.stack([dataset.load(index) for index in range(len(dataset))])


def metrics_at(run, step):
    """All metrics of a run as they were last logged until `step`; {} without a metrics.jsonl."""
    found = {}
    for line in read_metrics(run.metrics):
        if line["step"] <= step:
            prefix = "validation " if line["group"] == "validation" else ""
            found.update({prefix + name: value for name, value in line.items()})
    return found


def nearest_other(images):
    """Euclidean distance of each image [n, 64] to the nearest other one: [n]."""
    return torch.cdist(images, images).fill_diagonal_(float("inf")).amin(1)


@torch.no_grad()
def measure(H, real, held_out, labels, reconstructions, samples):
    """The table: name -> value. `labels` are (those of real, those of held_out)."""
    training, validation, drawn = map(reduce, (real, held_out, samples))  # [n, 64] each
    parts = {"held-out digits": validation, "reconstructions": reduce(reconstructions),
             "samples": drawn}
    # a support vector machine, its confidence calibrated on folds
    classifier = CalibratedClassifierCV(SVC(C=10), method="isotonic", cv=10, ensemble=False)
    classifier.fit(training.numpy(), labels[0])
    classes, confidence = recognise(classifier, validation)
    sample_classes, sample_confidence = recognise(classifier, drawn)
    recognised = sample_confidence >= CONFIDENT
    shares = torch.bincount(sample_classes, minlength=10) / len(samples)
    sample_distance, real_distance = (
        torch.cdist(part, training).amin(1) for part in (drawn, validation)
    )
    autoencoder_run = metrics_at(RunFolder(H.ae_load_dir), H.ae_load_step)
    sampler_run = metrics_at(RunFolder(H.load_dir), H.load_step)
    count = min(len(samples), len(held_out))  # the nearest of more is nearer
    among = [nearest_other(part[:count]) for part in (validation, drawn)]
    return {
        "reconstruction PSNR of held-out digits (dB)":
            psnr(held_out, reconstructions).mean().item(),
        "validation bits per token": sampler_run.get("validation bits_per_token"),
        "seconds to train the autoencoder": autoencoder_run.get("seconds"),
        "seconds to train the sampler": sampler_run.get("seconds"),
        "classifier: accuracy on held-out digits":
            (classes == torch.tensor(labels[1])).double().mean().item(),
        f"classifier: held-out digits with confidence >= {CONFIDENT}":
            (confidence >= CONFIDENT).double().mean().item(),
        f"classifier: samples with confidence >= {CONFIDENT}": recognised.double().mean().item(),
        **strict_figures(training, labels[0], parts),
        "classifier: share of the rarest class among samples": shares.min().item(),
        "classifier: share of the commonest class among samples": shares.max().item(),
        "distance to nearest training digit, held-out (median)": real_distance.median().item(),
        "distance to nearest training digit, samples (median)": sample_distance.median().item(),
        "distance to nearest training digit, held-out (5%)": real_distance.quantile(0.05).item(),
        "distance to nearest training digit, samples (5%)": sample_distance.quantile(0.05).item(),
        f"distance to nearest other, among {count} held-out (median)": among[0].median().item(),
        f"distance to nearest other, among {count} samples (median)": among[1].median().item(),
        f"distance to nearest other, among {count} held-out (smallest)": among[0].min().item(),
        f"distance to nearest other, among {count} samples (smallest)": among[1].min().item(),
    }


def picture(held_out, reconstructions, samples):
    """Three panels of digits uint8 [n, 1, S, S], each with its title, as a PIL image."""
    count = min(60, len(held_out), len(samples))
    shown = {"real digits, held out": held_out, "their reconstructions": reconstructions,
             "samples": samples}
    return panels({title: image_grid(part[:count], 10) for title, part in shown.items()})


def main(argv=None):
    H = get_digits_report_hparams(argv)
    if H.dataset != "digits":
        raise UserError(f"digits_report judges runs on the digits, not on {H.dataset}")
    if H.n_samples < 2:
        raise SettingsError(f"--n_samples {H.n_samples} is too few for distances among samples: "
                            f"give 2 or more")
    with experiment(H, "digits") as run:
        dataset = load_dataset(H, run.log)
        train_set, validation_set, known = images_held_out(H, dataset, run.log)
        targets = load_digits().target
        labels = [targets[part.indices] for part in (train_set, validation_set)]
        real, held_out = all_images(train_set), all_images(validation_set)
        run.note_data(dataset)
        run.load_sampler()
        with torch.no_grad():
            reconstructions = run.autoencoder(held_out.to(run.device))[0].clamp(0, 1).cpu()
        samples = to_float(torch.cat(list(run.samples())))
        figures = measure(H, real, held_out, labels, reconstructions, samples)
        run.report(figures, held_out=known)
        shown = picture(*map(to_uint8, (held_out, reconstructions, samples)))
        path = run.show("report", run.log.picture(H.load_step, "report", shown))
        run.log.info(f"real digits | reconstructions | samples: {path}")


if __name__ == "__main__":
    run_script(main)
