"""Names that a user adds to datasets.yaml are choices of --dataset, with the defaults of custom."""

import dataclasses

import pytest

from hparams import get_sampler_hparams, get_samples_hparams, get_vqgan_hparams, groups, registry
from utils.data.datasets import load_dataset
from utils.errors import SettingsError
from utils.runs.folder import RunFolder

SAMPLER = "--sampler absorbing --ae_load_dir ae --ae_load_step 5".split()


@pytest.fixture
def datasets_yaml(tmp_path, monkeypatch):
    """The path of a datasets.yaml, which is not there yet, in place of the repository's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "DATASETS_YAML", tmp_path / "datasets.yaml")
    return tmp_path / "datasets.yaml"


def output(capsys, parse, argv, status):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


@pytest.mark.parametrize("parse, more", [(get_vqgan_hparams, []), (get_sampler_hparams, SAMPLER)])
def test_a_registered_name_has_the_defaults_of_custom(datasets_yaml, parse, more):
    datasets_yaml.write_text("mine: photos\n")
    mine = dataclasses.asdict(parse(["--dataset", "mine", *more]))
    other = parse(["--dataset", "custom", "--custom_dataset_path", "photos", *more])
    different = {name for name, value in dataclasses.asdict(other).items() if mine[name] != value}
    assert different == {"dataset", "custom_dataset_path"}


def test_help_shows_the_plain_names_of_the_file_after_the_built_in_ones(datasets_yaml, capsys):
    datasets_yaml.write_text("mine: a\nffhq: b\nmy photos: c\n'[x': d\n100%: e\n2024: f\n")
    text = output(capsys, get_vqgan_hparams, ["--help"], 0)
    assert "{" + ",".join([*groups.DATASETS, "mine", "2024"]) + "}" in text
    assert "my photos" not in text


@pytest.mark.parametrize("content", [None, b"a: [", b"\xff\xfe", b"- a", b"", b"&a a: *b", b"3"])
def test_a_broken_file_concerns_only_the_names_that_it_would_give(datasets_yaml, capsys, content):
    if content is not None:
        datasets_yaml.write_bytes(content)
    for name in ("digits", "ffhq"):  # where ffhq lies is asked when it is opened
        assert get_vqgan_hparams(["--dataset", name]).dataset == name
    text = output(capsys, get_vqgan_hparams, ["--help"], 0)
    assert "{" + ",".join(groups.DATASETS) + "}" in text
    said = output(capsys, get_vqgan_hparams, ["--dataset", "mine"], 2)
    assert "there is no dataset 'mine'" in said and str(datasets_yaml) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name, says", [
    ("digit", "there is no dataset 'digit': did you mean 'digits'?"),
    ("mnie", "there is no dataset 'mnie': did you mean 'mine'?"),
    ("xyz", "gives no path for xyz: add a line `xyz: path`"),
    ("empty", "gives no path for empty"), ("nested", "gives no path for nested"),
    ("my photos", "'my photos', which goes into names of files"), ("", "there is no dataset ''"),
])
def test_an_unknown_name_is_refused_in_one_sentence(datasets_yaml, capsys, name, says):
    datasets_yaml.write_text("mine: a\nmy photos: b\nempty:\nnested: {a: b}\n")
    said = output(capsys, get_vqgan_hparams, ["--dataset", name], 2)
    assert says in said and len(said.splitlines()) == 1


def test_a_registered_name_takes_no_custom_dataset_path(datasets_yaml, capsys):
    datasets_yaml.write_text("mine: photos\n")
    flags = ["--dataset", "mine", "--custom_dataset_path", "x"]
    assert "is for --dataset custom, not mine" in output(capsys, get_vqgan_hparams, flags, 2)


def test_an_experiment_takes_the_registered_name_from_its_run(datasets_yaml, capsys):
    datasets_yaml.write_text("mine: photos\n")
    H = get_sampler_hparams(["--dataset", "mine", *SAMPLER])
    RunFolder("prior").create().hparams.write_text(H.as_yaml())
    flags = ["--load_dir", "prior", "--load_step", "5"]
    assert get_samples_hparams(flags).dataset == "mine"
    datasets_yaml.write_text("other: photos\n")
    H = get_samples_hparams(flags)  # of another machine: a script that reads no image needs none
    assert H.dataset == "mine"
    with pytest.raises(SettingsError, match="gives no path for mine"):
        load_dataset(H)
