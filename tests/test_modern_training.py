"""The modern recipe from end to end on tiny settings: resume to the bit, codebook, defaults."""

import json
import math
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train_sampler
import train_vqgan
from experiments import calc_VQGAN_FID, get_samples
from helpers import at_the_end_of_steps, on_processes
from hparams import get_sampler_hparams, get_vqgan_fid_hparams
from models import VQGAN
from models.autoencoder.quantizers import NearestQuantizer
from test_training import assert_identical, files_of, lines_of, workplace
from utils.evaluation.reconstruction import ReconstructionDistance
from utils.runs.folder import RunFolder
from utils.signals import Stopped
from utils.training import precision
from utils.training.codebook import CodebookCare
from utils.training.processes import Processes

__all__ = ["workplace"]  # a fixture of this file too

SIZES = ("--preset small --img_size 32 --nf 8 --ch_mult 1 1 --emb_dim 4 --codebook_size 24 --ndf 8 "
         "--batch_size 4 --num_workers 0 --no_visdom")
MODERN = (
    "--recipe modern --ema --amp --horizontal_flip --train_steps 14 --codebook_start_step 3 "
    "--codebook_revival 2 --entropy_weight 0.01 --disc_start_step 5 --disc_lead_steps 1 "
    "--disc_fade_steps 3 --steps_per_checkpoint 100 --steps_per_log 1"
)


@pytest.fixture
def photos(workplace):
    """16 images of colours that change smoothly."""
    folder = workplace / "photos"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for number in range(16):
        corners = Image.fromarray(rng.randint(0, 256, (3, 3, 3), dtype=np.uint8))
        corners.resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return f"--dataset custom --custom_dataset_path {folder} --crops 2 {SIZES}"


def train(flags):
    train_vqgan.main(flags.split())


@pytest.mark.parametrize("parts", [
    "--optimizer muon --disc_input features", "--optimizer muon --disc_input pixels",
    "--optimizer adamw --disc_input pixels --disc_norm spectral --disc_blur",
])
def test_a_modern_run_resumes_to_the_bit(parts, photos, monkeypatch):
    """Interrupted before the codebook begins, before and after the discriminator does."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)
    flags = f"{photos} {MODERN} {parts}"
    train(f"{flags} --log_dir through")
    stops = {2, 4, 6, 9}

    def interrupt(loop):
        if loop.step in stops:
            stops.discard(loop.step)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        at_the_end_of_steps(patched, interrupt)
        while stops:
            with pytest.raises(Stopped):
                train(f"{flags} --log_dir parts --resume")
        train(f"{flags} --log_dir parts --resume")
    assert_identical(files_of("through", 14), files_of("parts", 14))
    state = files_of("through", 14)["vqgan_14.th"]
    assert state["ae.quantize.uses"].sum() > 0
    assert not any("perceptual." in key or "network." in key for key in state)


def test_the_codebook_begins_as_vectors_of_the_encoder(photos):
    train(f"{photos} {MODERN} --log_dir a --steps_per_checkpoint 1 --keep_checkpoints 0")
    before, after = (files_of("a", step) for step in (2, 3))
    for name in ("vqgan", "vqgan_ema"):
        codebooks = [files[f"{name}_{step}.th"]["ae.quantize.embedding.weight"]
                     for step, files in ((2, before), (3, after))]
        assert codebooks[0].abs().max() <= 1 / 24 and codebooks[1].abs().max() > 0.1
    train_lines = [line for line in lines_of("a") if line["group"] == "train"]
    losses = [line["codebook_loss"] for line in train_lines]
    assert losses[:2] == [0, 0] and all(loss > 0 for loss in losses[2:])
    assert [line["d_weight"] > 0 for line in train_lines] == [False] * 5 + [True] * 9


def test_entries_that_are_not_used_are_revived_until_the_last_steps(photos):
    train(f"{photos} {MODERN} --log_dir a --steps_per_checkpoint 1 --keep_checkpoints 0 "
          f"--codebook_size 500")
    changed = {}
    for step in range(4, 15):
        states = [files_of("a", s)[f"vqgan_{s}.th"] for s in (step - 1, step)]
        books = [state["ae.quantize.embedding.weight"] for state in states]
        jumps = (books[1] - books[0]).abs().amax(1) > 0.05  # further than the learning rate goes
        changed[step] = int(jumps.sum())
        if step in (5, 7, 9, 11):
            assert states[1]["ae.quantize.uses"].sum() == 0  # counted anew
    assert {step for step, count in changed.items() if count} <= {5, 7, 9, 11}
    assert sum(changed.values()) > 0


def test_two_processes_keep_one_codebook(photos):
    flags = f"{photos} {MODERN} --batch_size 2"
    assert on_processes(2, train_vqgan.main, f"{flags} --log_dir two") == [0, 0]
    state = files_of("two", 14)["vqgan_14.th"]
    assert state["ae.quantize.embedding.weight"].abs().max() > 0.1


def an_entry_that_another_process_uses(argv):
    from utils.training.processes import init_processes

    processes = init_processes("cpu")
    quantizer = NearestQuantizer(6, 2, 0.25, count_uses=True)
    entries = torch.arange(12.0).view(6, 2)
    H = SimpleNamespace(quantizer="nearest", codebook_start_step=0, codebook_revival=4,
                        train_steps=100, seed=0)
    vqgan = SimpleNamespace(ae=SimpleNamespace(quantize=quantizer))
    care = CodebookCare(H, vqgan, None, None, processes, None)
    loop = SimpleNamespace(bad_steps=0, settle=lambda: None)
    with torch.no_grad():
        quantizer.codebook.copy_(entries)
        quantizer.uses[5] = processes.rank  # as a checkpoint of rank 0 would not hold it
        care.restored()
        for step in range(1, 5):
            mine = entries[[2 * processes.rank, 2 * processes.rank + 1]]
            quantizer(mine.t().reshape(1, 2, 1, 2))
            if step == 2:
                care.gather_uses()  # as before a checkpoint
            care.after(step, loop)
    moved = (quantizer.codebook != entries).any(1)
    assert moved.tolist() == [False] * 4 + [True] * 2
    assert quantizer.uses.sum() == 0


def test_an_entry_that_only_another_process_uses_is_not_revived():
    assert on_processes(2, an_entry_that_another_process_uses) == [0, 0]


def test_the_average_of_revived_entries_has_no_graph():
    quantizer, average = (NearestQuantizer(4, 2, 0.25, count_uses=uses) for uses in (True, False))
    average.requires_grad_(False)
    H = SimpleNamespace(quantizer="nearest", codebook_start_step=0, codebook_revival=1,
                        train_steps=100, seed=0)
    vqgan, ema = (SimpleNamespace(ae=SimpleNamespace(quantize=q)) for q in (quantizer, average))
    care = CodebookCare(H, vqgan, ema, None, Processes(), None)
    quantizer(quantizer.codebook[:1].detach().t().reshape(1, 2, 1, 1))
    care.after(1, SimpleNamespace(bad_steps=0, settle=lambda: None))
    assert torch.equal(average.codebook[1:], quantizer.codebook[1:])
    assert average.codebook.is_leaf and not average.codebook.requires_grad


def copied(argv):
    from utils.training.processes import init_processes

    processes = init_processes("cpu")
    tensor = torch.full((3,), float(processes.rank))
    processes.copy_from_first(tensor)
    assert tensor.tolist() == [0, 0, 0]


def test_ranks_get_the_tensor_of_the_first():
    assert on_processes(2, copied) == [0, 0]


@pytest.mark.usefixtures("few_are_enough")
def test_the_defaults_alone_write_pictures_validate_and_keep_the_last_checkpoints(photos):
    train(f"{photos} --train_steps 30 --ema --log_dir a")
    folder = RunFolder("a")
    pictures = {int(re.search(r"(\d+)\.png", path.name)[1]) for path in folder.images.iterdir()}
    assert pictures == set(range(3, 31, 3))
    validated = [line["step"] for line in lines_of("a") if line["group"] == "validation"]
    assert validated == list(range(3, 31, 3))
    lines = [line for line in lines_of("a") if line["group"] == "validation"]
    best = min(lines, key=lambda line: line["frechet"])["step"]
    assert folder.complete_steps() == sorted({24, 27, 30, best})  # the last three, and the best


AT_ONCE = "--disc_input pixels --disc_start_step 1 --disc_lead_steps 0 --disc_fade_steps 0"
L1_ONLY = "--img_size 16 --perceptual none --disc_start_step 1000 --lr 3e-3"


@pytest.mark.parametrize("flags, says", [
    ("--train_steps 20 --disc_start_step 1000", "training goes well"),
    ("--train_steps 6 --codebook_start_step 0 --codebook_revival 0 --codebook_size 500",
     "the 1024 ids of a batch are only about"),
    (f"--train_steps 8 {AT_ONCE} --disc_lr 1e-12", "the discriminator is idle"),
    (f"--train_steps 40 {AT_ONCE} --disc_lr 1e-2 --lr 1e-9", "the discriminator wins"),
    (f"--train_steps 8 {AT_ONCE} --disc_weight_max 1e-6",
     "the weight of the adversarial loss is at its limit"),
    (f"--train_steps 60 {L1_ONLY} --ema --ema_beta 0.9999 --no_ema_warmup", "the EMA is behind"),
    (f"--train_steps 120 {L1_ONLY} --crops 0 --codebook_start_step 1000 --steps_per_eval 40",
     "images held out do worse"),
    ("--train_steps 6 --disc_start_step 1000", "1 step since the last validation was not finite"),
])
def test_each_sentence_is_said_of_a_run_that_shows_it(flags, says, photos, workplace, monkeypatch):
    """In the log and on the dashboard, at the validation after the last step."""
    if "do worse" in says:
        keep_four(workplace / "photos")
    if "not finite" in says:
        monkeypatch.setattr(VQGAN, "generator_losses", not_finite_in_step_2)
    train(f"{photos} --log_dir a --steps_per_eval {flags.split()[1]} {flags}")
    sentences = json.loads(RunFolder("a").board.read_text())["health"]["sentences"]
    assert any(sentence.startswith(says) for sentence in sentences)
    log = RunFolder("a").log.read_text()
    assert says in log and re.search(r"the loader reads \d+ images/s alone", log)


def keep_four(folder):
    """So few images are learned by heart."""
    for number in range(4, 16):
        (folder / f"{number}.png").unlink()


def not_finite_in_step_2(vqgan, x, step, *arguments, losses=VQGAN.generator_losses):
    loss, *others = losses(vqgan, x, step, *arguments)
    return (loss * (math.nan if step == 2 else 1), *others)


@pytest.mark.parametrize("flags, says", [
    ("--train_steps 60 --ema --ema_beta 0.9999 --no_ema_warmup", "the EMA is behind"),
    ("--train_steps 150 --crops 0 --steps_per_eval 50", "images held out do worse"),
    ("--train_steps 4 --recipe published", "the learning rate still rises when this run ends"),
])
def test_each_sentence_is_said_of_a_sampler_that_shows_it(flags, says, photos, workplace):
    if "do worse" in says:
        keep_four(workplace / "photos")
    train(f"{photos} --log_dir ae --train_steps 2 --codebook_start_step 0")
    train_sampler.main(f"{prior_flags(photos)} --steps_per_eval {flags.split()[1]} {flags}".split())
    sentences = json.loads(RunFolder("prior").board.read_text())["health"]["sentences"]
    assert any(sentence.startswith(says) for sentence in sentences), sentences


def prior_flags(photos, name="prior"):
    """The flags of a tiny sampler on the autoencoder `ae` of the photos."""
    return (f"{photos.partition('--preset')[0]} --sampler absorbing --preset small --no_visdom "
            f"--num_workers 0 --bert_n_emb 32 --bert_n_head 4 --bert_n_layers 1 --sample_steps 4 "
            f"--batch_size 2 --ae_load_dir ae --ae_load_step best --log_dir {name}")


@pytest.fixture
def few_are_enough(monkeypatch):
    monkeypatch.setattr(train_vqgan, "ENOUGH_TO_COMPARE", 2)


def test_few_images_held_out_are_judged_by_the_loss(photos):
    train(f"{photos} --train_steps 6 --steps_per_eval 2 --log_dir a")
    lines = [line for line in lines_of("a") if line["group"] == "validation"]
    best = json.loads(RunFolder("a").best.read_text())
    assert best["figure"] == "loss" and best["value"] == min(line["loss"] for line in lines)
    assert "held out are too few for a Fréchet distance" in RunFolder("a").log.read_text()


@pytest.mark.usefixtures("few_are_enough")
def test_the_best_checkpoint_is_named_and_loads(photos, monkeypatch, capsys):
    """By the Fréchet distance of reconstructions, which here is best where the test says so."""
    distances = iter([9.0, 5.0, 7.0, 8.0, 6.0])
    flags = f"{photos} --log_dir a --ema --codebook_start_step 0 --steps_per_eval 2"
    with monkeypatch.context() as patched:
        patched.setattr(ReconstructionDistance, "add", lambda *_: None)
        patched.setattr(ReconstructionDistance, "take", lambda _: {"frechet": next(distances)})
        train(f"{flags} --train_steps 6 --keep_checkpoints 1 --steps_per_checkpoint 6")
        assert RunFolder("a").complete_steps() == [4, 6]
        assert json.loads(RunFolder("a").best.read_text()) == {
            "step": 4, "figure": "frechet", "value": 5.0, "extra": True
        }
        train(f"{flags} --train_steps 10 --resume")
    assert RunFolder("a").complete_steps() == [4, 10]
    H = get_vqgan_fid_hparams("--load_dir a --load_step best --log_dir m".split())
    assert H.load_step == 4
    calc_VQGAN_FID.main("--load_dir a --load_step best --log_dir m --ema --no_visdom "
                        "--feature_extractor efficientnet_lite0".split())
    assert "vqgan_ema_4.th" in RunFolder("m").log.read_text()
    RunFolder("a").best.write_text("[]")
    with pytest.raises(SystemExit):
        get_vqgan_fid_hparams("--load_dir a --load_step best --log_dir m".split())
    assert "cannot read logs/a/saved_stats/best.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        get_vqgan_fid_hparams("--load_dir m --load_step best --log_dir m".split())
    assert "logs/m has no best checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        get_vqgan_fid_hparams("--load_dir b --load_step best --log_dir m".split())
    assert "there is no run folder logs/b" in capsys.readouterr().err


@pytest.mark.usefixtures("few_are_enough")
def test_a_best_checkpoint_beside_all_others_goes_once_there_is_a_better_one(photos, monkeypatch):
    distances = iter([9.0, 5.0, 7.0, 4.0, 6.0])
    flags = f"{photos} --codebook_start_step 0 --steps_per_eval 2 --steps_per_checkpoint 5"
    monkeypatch.setattr(ReconstructionDistance, "add", lambda *_: None)
    monkeypatch.setattr(ReconstructionDistance, "take", lambda _: {"frechet": next(distances)})
    train(f"{flags} --log_dir a --train_steps 10 --keep_checkpoints 0")
    assert RunFolder("a").complete_steps() == [5, 8, 10]


@pytest.mark.usefixtures("few_are_enough")
def test_the_autoencoder_of_a_sampler_is_kept_and_stays_the_best_for_it(photos, monkeypatch):
    distances = iter([5.0, 9.0, 4.0, 9.0])
    flags = f"{photos} --codebook_start_step 0 --keep_checkpoints 1 --log_dir ae"
    monkeypatch.setattr(ReconstructionDistance, "add", lambda *_: None)
    monkeypatch.setattr(ReconstructionDistance, "take", lambda _: {"frechet": next(distances)})
    train(f"{flags} --train_steps 4 --steps_per_eval 2")
    prior = prior_flags(photos)
    train_sampler.main(f"{prior} --train_steps 2".split())
    train(f"{flags} --train_steps 8 --steps_per_eval 2 --resume")
    assert RunFolder("ae").complete_steps() == [2, 6, 8]  # 6 is the best by now
    train_sampler.main(f"{prior} --train_steps 3 --resume".split())
    assert get_sampler_hparams(f"{prior} --train_steps 4 --resume".split()).ae_load_step == 2
    other = f"{prior_flags(photos, 'other')} --train_steps 2"
    assert get_sampler_hparams(other.split()).ae_load_step == 6
    get_samples.main("--load_dir prior --load_step 3 --ae_load_dir ae --ae_load_step best "
                     "--n_samples 2 --log_dir s --no_visdom".split())
    assert "saved_models/vqgan_2.th" in RunFolder("s").log.read_text()


@pytest.mark.usefixtures("few_are_enough")
def test_going_back_before_the_best_step_forgets_it(photos):
    flags = f"{photos} --log_dir a --codebook_start_step 0 --steps_per_checkpoint 2"
    train(f"{flags} --train_steps 4 --steps_per_eval 4")
    assert json.loads(RunFolder("a").best.read_text())["step"] == 4
    RunFolder("a").manifest(4).write_text("")  # damaged: the run goes on before it
    train(f"{flags} --train_steps 3 --steps_per_eval 0 --resume")
    assert not RunFolder("a").best.exists()


def test_validations_have_a_perceptual_distance_where_the_loss_has_none(photos):
    train(f"{photos} --log_dir a --train_steps 2 --steps_per_eval 2 --perceptual none")
    lines = {line["group"]: line for line in lines_of("a")}
    assert lines["validation"]["perceptual"] > 0.1
    assert lines["validation"]["loss"] == lines["validation"]["l1"]


def test_the_last_pictures_are_written_whatever_the_interval(photos):
    train(f"{photos} --train_steps 3 --steps_per_save_output 100 --log_dir a")
    assert [path.name for path in RunFolder("a").images.iterdir()] == ["reconstructions_3.png"]
