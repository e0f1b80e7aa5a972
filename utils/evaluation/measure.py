"""Measure generated images: their features stream into the metrics that are asked for."""

from utils.evaluation.features import Extractor, stream_features
from utils.evaluation.metrics import METRICS
from utils.evaluation.reference import real_features, real_statistics, stored_features


def measure(run, dataset, generated, names, extract=None, real_path=None, generated_path=None):
    """The figures, a dict, of an ImageStream against a dataset, by the METRICS called `names`.

    `extract(extractor)` may give another function of a batch than the extractor itself. The .npy
    files `real_path` and `generated_path` keep features of a single metric. Of several ranks the
    first alone returns.
    """
    metrics = [METRICS[name](run.H, run.device) for name in names]
    if not (real_path or generated_path):  # such files may hold any number of images
        for metric in metrics:
            metric.check(generated.count, len(dataset))
    layers = list(dict.fromkeys(metric.layer for metric in metrics if metric.layer != "psnr"))
    extractor = Extractor(run.H, run.device, layers)
    run.facts["extractor"] = extractor.facts
    real = real_of(run, dataset, generated, metrics, extractor, real_path)
    extract = extract(extractor) if extract else extractor
    if generated_path:
        [metric] = metrics
        key = extractor.key(generated.data, *extractor.layers)
        features = stored_features(run, generated, extract, metric.layer, key, generated_path)
        chunks = [{metric.layer: features}] if run.processes.is_first else []
    else:
        chunks = stream_features(generated, extract, run.processes, run.unreadable_files())
    for chunk in chunks:
        for metric in metrics:
            metric.update(chunk[metric.layer])
    run.continue_on_rank_0()
    figures = {}
    for metric in metrics:
        figures |= metric.finish(real[metric.real, metric.layer], run.log)
    return figures


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
