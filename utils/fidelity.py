"""FID of a stream of images against a dataset, and what else is measured on the same features."""

import torch
from torch_fidelity import metric_isc, metric_kid, metric_prc

from hparams.errors import UserError
from utils.features import (
    Extractor, features_of, real_subset, reference_features, reference_statistics,
)
from utils.metrics import FeatureStatistics, frechet_distance


def fid_figures(run, dataset, batches, n):
    """The figures, a dict, of `n` images uint8 [b, C, S, S] in a stream; `run` is an Experiment.

    FID compares with the whole dataset; KID, precision and recall with `n` images of it.
    """
    H = run.H
    most = min(n, len(dataset))
    if H.kid and H.kid_subset_size > most:
        raise UserError(
            f"--kid_subset_size {H.kid_subset_size} is more than the {most} images there are"
        )
    extractor = Extractor(
        H.feature_extractor, H.feature_extractor_weights, run.device,
        ["fid", "isc"] if H.isc else ["fid"],
    )
    run.facts["extractor"] = extractor.facts
    reference = reference_statistics(dataset, extractor, H, run.device, run.log)
    keeps = H.kid or H.prc
    if keeps:
        real = reference_features(
            real_subset(dataset, n), extractor, "fid", H, run.device, run.log
        )
    statistics, vectors, logits = FeatureStatistics(), [], []
    for features in features_of(batches, extractor, H.batch_size):
        statistics.update(features["fid"])
        if keeps:
            vectors.append(features["fid"])
        if H.isc:
            logits.append(features["isc"])
    moments = statistics.finish()
    width = len(moments[0])
    if statistics.count <= width:
        run.log.warning(f"{statistics.count} images are few for {width} features: compare this "
                        f"FID with those of as many images only")
    distance = frechet_distance(*reference.finish(), *moments)
    figures = {"FID": distance, "images": statistics.count, "real images": reference.count}
    if H.kid:
        kid = metric_kid.kid_features_to_metric(
            torch.cat(vectors), real, kid_subset_size=H.kid_subset_size, verbose=False
        )
        figures["KID"] = kid[metric_kid.KEY_METRIC_KID_MEAN]
        figures["KID, deviation"] = kid[metric_kid.KEY_METRIC_KID_STD]
    if H.isc:
        isc = metric_isc.isc_features_to_metric(torch.cat(logits))
        figures["IS"] = isc[metric_isc.KEY_METRIC_ISC_MEAN]
        figures["IS, deviation"] = isc[metric_isc.KEY_METRIC_ISC_STD]
    if H.prc:
        prc = metric_prc.prc_features_to_metric(
            torch.cat(vectors), real, save_cpu_ram=True, prc_batch_size=1000, verbose=False
        )
        figures["precision"] = prc[metric_prc.KEY_METRIC_PRECISION]
        figures["recall"] = prc[metric_prc.KEY_METRIC_RECALL]
    return figures
