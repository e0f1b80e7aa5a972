"""The tables of datasets, samplers and metrics hold what the flags offer, and nothing else."""

import dataclasses

import pytest

from hparams import experiment_groups, groups
from models import SAMPLERS
from utils.data.datasets import DATASETS
from utils.evaluation.metrics import METRICS, Metric


def declared(group):
    """The fields of a group of settings by name."""
    return {field.name: field for field in dataclasses.fields(group)}


@pytest.mark.parametrize("table, choices", [
    (DATASETS, groups.DATASETS),
    (SAMPLERS, declared(groups.Sampler)["sample_type"].metadata["choices"]),
])
def test_a_table_has_an_entry_for_every_choice_of_its_flag(table, choices):
    assert len(choices) == len(set(choices)) and set(table) == set(choices)


def test_the_declared_datasets_are_the_first_choices_of_the_flag():
    choices = list(declared(groups.Data)["dataset"].metadata["choices"])
    assert choices[: len(groups.DATASETS)] == groups.DATASETS  # datasets.yaml may add others


def test_every_measure_beside_fid_has_a_metric_and_names_what_it_needs():
    flags = {name for name, field in declared(experiment_groups.FID).items() if field.type is bool}
    assert flags and flags < set(METRICS) and "fid" in METRICS
    for metric in METRICS.values():
        assert issubclass(metric, Metric) and metric.finish is not Metric.finish
        assert metric.real in ("statistics", "features", None)
