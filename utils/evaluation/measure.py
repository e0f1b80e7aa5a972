"""Measure generated images: their features stream into the metrics that are asked for."""

from utils.evaluation.features import Extractor, stream_features
from utils.evaluation.metrics import METRICS
from utils.evaluation.reference import is_own, real_features, real_statistics, stored_features


def measure(run, dataset, generated, names, extract=None, real_path=None, generated_path=None):
    """The figures, a dict, of an ImageStream against a dataset, by the METRICS called `names`.

    `extract(extractor)` may give another function of a batch than the extractor itself. The .npy
    files `real_path` and `generated_path` keep features of a single metric. Of several ranks the
    first alone returns. Raises UserError where there are too few images: before any is drawn, and
    again once those that can be read are counted.
    """
    metrics = [METRICS[name](run.H, run.device) for name in names]
    # a file of somebody's own may hold any number of images
    known = None if generated_path and is_own(generated_path) else generated.count
    in_dataset = None if real_path and is_own(real_path) else len(dataset)
    for metric in metrics:
        metric.check(known, in_dataset)
    layers = list(dict.fromkeys(metric.layer for metric in metrics if metric.layer != "psnr"))
    extractor = Extractor(run.H, run.device, layers)
    run.facts["extractor"] = extractor.facts
    real = real_of(run, dataset, generated, metrics, extractor, real_path)
    check_counts(run, metrics, known, real)
    extract = extract(extractor) if extract else extractor
    if generated_path:
        [metric] = metrics
        key = extractor.key(generated.data, *extractor.layers)
        features = stored_features(run, generated, extract, metric.layer, key, generated_path)
        chunks = [{metric.layer: features}] if run.processes.is_first else []
    else:
        chunks = stream_features(generated, extract, run.processes, run.unreadable_files())
    count = 0
    for chunk in chunks:
        count += len(chunk[metrics[0].layer])
        for metric in metrics:
            metric.update(chunk[metric.layer])
    run.continue_on_rank_0()
    check_counts(run, metrics, count, real)
    figures = {}
    for metric in metrics:
        figures |= metric.finish(real[metric.real, metric.layer], run.log)
    return figures


def check_counts(run, metrics, generated, real):
    """Check the metrics again with what `real_of` has found, which rank 0 alone has."""
    for metric in metrics if run.processes.is_first else ():
        found = real[metric.real, metric.layer]
        metric.check(generated, None if found is None else len(found))


def real_of(run, dataset, generated, metrics, extractor, path):
    """{(what of real images, layer): it} for all that the metrics need."""
    real = dict.fromkeys((metric.real, metric.layer) for metric in metrics)
    for kind, layer in real:
        if kind == "statistics":
            real[kind, layer] = real_statistics(run, dataset, extractor)
        elif kind == "features":
            count = generated.count
            real[kind, layer] = real_features(run, dataset, count, extractor, layer, path)
    return real
