"""What a run was trained on is kept with its checkpoints, and later commands keep to it."""

import json
import shutil

import pytest
import torch
from PIL import Image

import train_sampler
import train_vqgan
from experiments import calc_approximate_ELBO, digits_report
from helpers import ON_DIGITS
from test_training import SAMPLER, VQGAN, sentence, trained, two_runs, workplace
from utils.runs.folder import RunFolder

__all__ = ["trained", "two_runs", "workplace"]  # fixtures of this file too

DATA = "--dataset custom --custom_dataset_path photos --n_channels 1 --nf 32 --res_blocks 1"
PHOTOS = VQGAN.replace(ON_DIGITS, DATA) + " --perceptual_weight 0 --num_workers 0"
DATA = "--dataset custom --custom_dataset_path photos --num_workers 0"
SAMPLES = SAMPLER.replace(ON_DIGITS, DATA)


@pytest.fixture
def photos(workplace):
    (workplace / "photos").mkdir()
    add_photos(range(30))
    return workplace / "photos"


def add_photos(numbers):
    for number in numbers:
        torch.manual_seed(number)
        noise = torch.randint(256, (20, 20), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(f"photos/{number:03}.png")


def train(flags, script=train_vqgan, data=PHOTOS):
    script.main([*data.split(), *flags.split()])


def kept(run, step):
    return torch.load(RunFolder(run).stats(step), weights_only=True)["split"]


def elbo(flags, *says):
    """The entry in results.json of an ELBO, whose log must hold what `says`."""
    shutil.rmtree("logs/out", ignore_errors=True)
    flags = f"--load_dir prior --load_step 2 --train_steps 2 --elbo_samples 2 --no_visdom {flags}"
    calc_approximate_ELBO.main(f"{flags} --num_workers 0 --log_dir out".split())
    log = RunFolder("out").log.read_text()
    assert all(words in log for words in says), log
    [result] = json.loads(RunFolder("out").results.read_text()).values()
    return result


def test_images_that_come_and_go_move_no_other_to_the_other_side(photos):
    train("--log_dir ae --train_steps 2")
    train("--log_dir prior --train_steps 2", train_sampler, SAMPLES)
    before = elbo("")
    assert before["held_out"] == {"ae": True, "prior": True}
    count = before["figures"]["validation images"]
    assert count == kept("ae", 2)["held_out"] == kept("prior", 2)["held_out"]
    add_photos(range(30, 300))
    result = elbo("")
    assert result["held_out"] == {"ae": True, "prior": True}
    assert result["figures"]["validation images"] > count
    train_vqgan.main("--log_dir ae --resume --train_steps 4".split())
    assert kept("ae", 4)["share"] == kept("ae", 2)["share"]
    assert kept("ae", 4)["trained_on"] + kept("ae", 4)["held_out"] == 300


def test_a_sampler_holds_out_what_its_autoencoder_does(photos):
    train("--log_dir ae --train_steps 2")
    add_photos(range(30, 60))
    train("--log_dir prior --train_steps 2", train_sampler, SAMPLES)
    assert kept("prior", 2)["share"] == kept("ae", 2)["share"]


def test_what_was_trained_on_is_never_called_held_out(photos, capsys, monkeypatch):
    train("--log_dir ae --train_steps 2 --steps_per_eval 0")
    train("--log_dir prior --train_steps 2", train_sampler, SAMPLES)
    assert "ae was trained on all images of custom" in RunFolder("prior").log.read_text()
    result = elbo("", "ae may have been trained on the validation images too (trained on 30 images")
    assert result["held_out"] == {"ae": False, "prior": True}
    flags = "--log_dir ae --resume --train_steps 4 --steps_per_eval 2"
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert "was trained on all images of custom, so none can be held out" in line
    shutil.move("photos", "nested/photos")
    result = elbo("--custom_dataset_path nested", "prior may have been trained on the validation")
    assert result["held_out"] == {"ae": False, "prior": None}


def test_a_run_of_an_earlier_version_is_split_by_order(photos):
    train("--log_dir ae --train_steps 2")
    path = RunFolder("ae").stats(2)
    stats = torch.load(path, weights_only=True)
    del stats["split"], stats["architecture"]
    torch.save(stats, path)
    RunFolder("ae").manifest(2).unlink()
    train("--log_dir new --load_dir ae --load_step 2 --train_steps 3")
    assert kept("new", 3)["by"] == "order" and kept("new", 3)["held_out"] == 3
    assert "may have come or gone since ae was trained" in RunFolder("new").log.read_text()


def test_a_sampler_on_other_images_than_its_autoencoders_is_warned_of(photos, two_runs):
    train("--log_dir other --train_steps 1", train_sampler, SAMPLES)
    log = RunFolder("other").log.read_text()
    assert "the autoencoder ae was trained on 1618 images of digits" in log
    assert f"this sampler learns from {photos.resolve()}" in log
    assert "it reconstructs 16 of these images with a PSNR of" in log


def test_a_changed_hparams_yaml_cannot_make_another_model_of_the_weights(
    two_runs, capsys, monkeypatch
):
    """Dilations are in no weight's shape."""
    path = RunFolder("prior").hparams
    path.write_text(path.read_text().replace("dilations: [1, 1]", "dilations: [2, 1]"))
    flags = f"{SAMPLER} --load_dir prior --load_step 2 --train_steps 3"
    line = sentence(train_sampler.main, flags, capsys, monkeypatch)
    assert "was trained with dilations 1 1, not 2 1" in line


def test_renamed_images_are_not_called_held_out(photos):
    train("--log_dir ae --train_steps 2")
    train("--log_dir prior --train_steps 2", train_sampler, SAMPLES)
    for path in sorted(photos.iterdir()):
        path.rename(photos / f"img_{path.name}")
    result = elbo("", "ae may have been trained on the validation images too")
    assert result["held_out"] == {"ae": None, "prior": None}


def test_images_that_an_earlier_run_of_a_chain_may_have_seen_are_not_called_held_out(photos):
    train("--log_dir first --train_steps 2")
    shutil.copytree("photos", "nested/photos")  # the same images under other names
    nested = PHOTOS.replace("path photos", "path nested")
    train("--log_dir ae --load_dir first --load_step 2 --train_steps 3", data=nested)
    assert "may be among what first was trained on" in RunFolder("ae").log.read_text()
    train_vqgan.main("--log_dir ae --resume --train_steps 4".split())  # which does not forget
    samples = SAMPLES.replace("path photos", "path nested")
    train("--log_dir prior --train_steps 2 --ae_load_step 4", train_sampler, samples)
    result = elbo("", "ae may have been trained on the validation images too")
    assert result["held_out"]["ae"] is None


def test_the_digits_report_says_whether_its_digits_were_held_out(workplace):
    train("--log_dir ae --train_steps 2 --steps_per_eval 0", data=VQGAN)
    train("--log_dir prior --train_steps 2", train_sampler, SAMPLER)
    flags = "--load_dir prior --load_step 2 --n_samples 12 --no_visdom --log_dir report"
    digits_report.main(flags.split())
    [result] = json.loads(RunFolder("report").results.read_text()).values()
    assert result["held_out"] == {"ae": False, "prior": True}


def test_an_autoencoder_in_the_default_folder_is_not_taken_for_the_run_that_goes_on(photos):
    """`test` is the default of --load_dir too."""
    train("--log_dir test --train_steps 2 --steps_per_eval 0")
    train("--log_dir prior --ae_load_dir test --train_steps 2", train_sampler, SAMPLES)
    assert "test was trained on all images of custom" in RunFolder("prior").log.read_text()


def test_a_new_sampler_has_seen_nothing_though_its_autoencoder_may_have(photos):
    train("--log_dir ae --train_steps 2")
    (photos / "000.png").rename(photos / "renamed.png")
    train("--log_dir prior --train_steps 2", train_sampler, SAMPLES)
    assert elbo("")["held_out"] == {"ae": None, "prior": True}
