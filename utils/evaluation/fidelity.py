"""FID of generated images against a dataset, and what else is measured on the same features."""

import torch
from torch_fidelity import metric_isc, metric_kid, metric_prc

from utils.errors import UserError
from utils.evaluation.features import (
    Extractor, features_of, real_subset, reference_features, reference_statistics,
)
from utils.evaluation.metrics import FeatureStatistics, frechet_distance


def fid_extractor(run):
    """The Extractor of `--feature_extractor` with the layers that are measured, for `run`, an
    Experiment, whose manifest then names it."""
    H = run.H
    extractor = Extractor(
        H.feature_extractor, H.feature_extractor_weights, run.device,
        ["fid", "isc"] if H.isc else ["fid"],
    )
    run.facts["extractor"] = extractor.facts
    return extractor


def fid_figures(run, dataset, extractor, fake):
    """The figures, a dict, of generated images, of whose features `fake` are the Parts.

    FID compares with the whole dataset; KID, precision and recall with as many images of it.
    Of several processes the first one alone returns.
    """
    H, log = run.H, run.log
    most = min(fake.count, len(dataset))
    if H.kid and H.kid_subset_size > most:
        raise UserError(
            f"--kid_subset_size {H.kid_subset_size} is more than the {most} images there are"
        )
    whole = reference_statistics(dataset, extractor, H, run.device, log)
    needed, keeps = [whole, fake], H.kid or H.prc
    if keeps:
        real = reference_features(
            real_subset(dataset, fake.count), extractor, "fid", H, run.device, log
        )
        needed.append(real)
    run.divide(*needed)
    reference = FeatureStatistics.from_state(whole.get())
    log.info(f"statistics of {reference.count} real images in {whole.path}")
    if keeps:
        real = real.get()
    statistics, vectors = FeatureStatistics(), []
    for features in features_of(fake, "fid"):
        statistics.update(features)
        if keeps:
            vectors.append(features)
    moments = statistics.finish()
    width = len(moments[0])
    if statistics.count <= width:
        log.warning(f"{statistics.count} images are few for {width} features: compare this FID "
                    f"with those of as many images only")
    distance = frechet_distance(*reference.finish(), *moments)
    figures = {"FID": distance, "images": statistics.count, "real images": reference.count}
    if H.kid:
        kid = metric_kid.kid_features_to_metric(
            torch.cat(vectors), real, kid_subset_size=H.kid_subset_size, verbose=False
        )
        figures["KID"] = kid[metric_kid.KEY_METRIC_KID_MEAN]
        figures["KID, deviation"] = kid[metric_kid.KEY_METRIC_KID_STD]
    if H.isc:
        isc = metric_isc.isc_features_to_metric(torch.cat(list(features_of(fake, "isc"))))
        figures["IS"] = isc[metric_isc.KEY_METRIC_ISC_MEAN]
        figures["IS, deviation"] = isc[metric_isc.KEY_METRIC_ISC_STD]
    if H.prc:
        prc = metric_prc.prc_features_to_metric(
            torch.cat(vectors), real, save_cpu_ram=True, prc_batch_size=1000, verbose=False
        )
        figures["precision"] = prc[metric_prc.KEY_METRIC_PRECISION]
        figures["recall"] = prc[metric_prc.KEY_METRIC_RECALL]
    return figures
