"""experiments/reconstruct.py: its figures against independent ones, its picture, wrong input."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import train_sampler
import train_vqgan
from experiments import reconstruct
from hparams import UserError, get_vqgan_hparams
from models.autoencoder.autoencoder import VQAutoEncoder
from models.autoencoder.perceptual import PerceptualDistance, lpips_input
from utils.data.pixels import to_float, to_square
from utils.data.split import new_split, sides
from utils.evaluation import pairs as pair_measures
from utils.evaluation.experiment import read_results
from utils.evaluation.reconstruction import ReconstructionDistance
from utils.files import save_file
from utils.runs.folder import RunFolder
from utils.training.build import efficientnet_distance

SIZES = ("--preset small --img_size 32 --nf 8 --ch_mult 1 1 --emb_dim 4 --codebook_size 24 --ndf 8 "
         "--batch_size 4 --num_workers 0 --no_visdom")
LOAD = "--load_dir ae --load_step best --ema --no_visdom --num_workers 0"
EFFICIENTNET = "perceptual distance (efficientnet_lite0)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with 30 photographs of odd sizes and the runs `ae` and `prior` that learned them."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    (folder / "photos").mkdir()
    rng = np.random.RandomState(0)
    for number in range(30):
        corners = Image.fromarray(rng.randint(0, 256, (3, 3, 3), dtype=np.uint8))
        size = rng.randint(20, 70, 2).tolist()
        corners.resize(size, Image.Resampling.BICUBIC).save(folder / "photos" / f"{number}.png")
    os.chdir(folder)
    try:
        data = f"--dataset custom --custom_dataset_path {folder / 'photos'}"
        train_vqgan.main(f"{data} {SIZES} --ema --train_steps 3 --codebook_start_step 0 "
                         "--log_dir ae".split())
        train_sampler.main(f"{data} --sampler absorbing --ae_load_dir ae --ae_load_step 3 "
                           "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1 --train_steps 1 "
                           "--log_dir prior --no_visdom --num_workers 0".split())
    finally:
        os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def workplace(trained, tmp_path, monkeypatch):
    """A folder of one's own that holds the runs and the photographs."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(flags, load=LOAD):
    """Run the script; the last entry of logs/out/results.json."""
    reconstruct.main([*load.split(), *flags.split(), "--log_dir", "out"])
    return list(read_results(RunFolder("out").results).values())[-1]


def autoencoder():
    """The autoencoder of `ae`, loaded from its file by hand."""
    H = get_vqgan_hparams(f"--dataset custom --custom_dataset_path photos {SIZES}".split())
    step = json.loads(RunFolder("ae").best.read_text())["step"]
    state = torch.load(RunFolder("ae").model("vqgan_ema", step))
    network = VQAutoEncoder(H)
    network.load_state_dict({k[3:]: v for k, v in state.items() if k.startswith("ae.")})
    return network.eval()


@torch.no_grad()
def by_hand(names):
    """(images, reconstructions, both [n, C, S, S] of whole levels, ids) of files."""
    images = torch.stack([to_float(to_square(Image.open(name), 32, 3)) for name in names])
    output, _, _, ids = autoencoder()(images)
    return images, (output.clamp(0, 1) * 255).round() / 255, ids


def test_figures_of_named_files_are_those_of_scikit_image_and_of_validation():
    names = [f"photos/{number}.png" for number in (3, 1, 4)]
    result = run(f"--images {' '.join(names)}")
    images, reconstructions, ids = by_hand(names)
    assert [row["image"] for row in result["images"]] == names
    for row, x, y, i in zip(result["images"], images.numpy(), reconstructions.numpy(), ids):
        similarity = structural_similarity(
            x.astype(float), y.astype(float), data_range=1, channel_axis=0, gaussian_weights=True,
            sigma=1.5, use_sample_covariance=False,
        )
        assert row["SSIM"] == pytest.approx(similarity, abs=1e-6)
        assert row["PSNR (dB)"] == pytest.approx(peak_signal_noise_ratio(x, y), abs=1e-3)
        assert row["codes used"] == len(set(i.tolist()))
    figures = result["figures"]
    with torch.no_grad():
        distance = efficientnet_distance()(images, reconstructions).mean().item()
    assert figures[EFFICIENTNET] == pytest.approx(distance, rel=1e-4)
    mean = np.mean([row["SSIM"] for row in result["images"]])
    assert figures["SSIM"] == pytest.approx(mean) and figures["images"] == 3
    frequency = np.bincount(ids.flatten().numpy(), minlength=24) / ids.numel()
    assert figures["codes used"] == (frequency > 0).sum() and figures["codes there are"] == 24
    entropy = -(frequency[frequency > 0] * np.log(frequency[frequency > 0])).sum()
    assert figures["perplexity of codes"] == pytest.approx(np.exp(entropy))
    assert figures["Fréchet distance (efficientnet_lite0)"] is None
    log = RunFolder("out").log.read_text()
    assert "| photos/4.png | " in log and "3 images are too few for a Fréchet distance" in log


def test_a_folder_is_read_whole_and_has_the_frechet_distance_of_validation(monkeypatch):
    monkeypatch.setattr(pair_measures, "ENOUGH", 30)
    figures = run("--images photos")["figures"]
    names = [f"photos/{number}.png" for number in range(30)]
    images, reconstructions, _ = by_hand(names)
    distance = ReconstructionDistance(torch.device("cpu"))
    distance.add(images, reconstructions)
    expected = distance.take()["frechet"]
    assert figures["images"] == 30
    found = figures["Fréchet distance (efficientnet_lite0)"]
    assert found == pytest.approx(expected, rel=1e-3)


def test_an_image_that_is_named_twice_counts_once(workplace):
    os.symlink("1.png", "photos/again.png")
    names = "photos/3.png ./photos/3.png photos/again.png photos/1.png"
    result = run(f"--images {names} {workplace / 'photos/3.png'}")
    assert [row["image"] for row in result["images"]] == ["photos/3.png", "photos/again.png"]
    assert result["figures"]["images"] == 2


def test_the_picture_shows_images_above_their_reconstructions():
    result = run("--images photos --save_individually")
    step = result["manifest"]["checkpoints"]["autoencoder"]["step"]
    folder = RunFolder("out").images
    picture = np.asarray(Image.open(folder / f"pairs_{step}.png"))
    assert len(list((folder / f"reconstructions_{step}").iterdir())) == 30
    shown = [row["image"] for row in result["images"]]
    assert shown[0] == "photos/0.png" and len(set(shown)) == 20
    images, reconstructions, _ = by_hand(shown)
    side = 64 + 2  # images of 32 pixels are shown twice as large
    label = picture.shape[1] - 10 * side - 2
    assert picture.shape[0] == 4 * (side + 2) and (picture[:, :label] < 128).any()

    def cell(row, column):
        top, left = row * (side + 2) + 2, label + 2 + column * side
        return picture[top : top + 64 : 2, left : left + 64 : 2]

    for index in (0, 9, 10, 19):
        row, column = 2 * (index // 10), index % 10
        for line, part in ((row, images), (row + 1, reconstructions)):
            expected = (part[index].permute(1, 2, 0) * 255).round().numpy()
            assert np.abs(cell(line, column) - expected).max() <= 1


def test_without_images_the_held_out_part_of_the_dataset_is_taken(workplace):
    names = reconstruct.images_in(["photos"], get_vqgan_hparams(
        f"--dataset custom --custom_dataset_path photos {SIZES}".split()))
    names.root, names.found = workplace / "photos", [
        (name.removeprefix("photos/"), *status) for name, *status in names.found
    ]
    held_out = {names.identifier(i) for i in np.flatnonzero(sides(names, new_split(names)))}
    result = run("")
    assert {os.path.basename(row["image"]) for row in result["images"]} == held_out
    assert result["figures"]["images"] == len(held_out)
    # of another dataset nothing was learned
    shutil.copytree("photos", "more")
    for number in range(30):
        os.remove(f"more/{number}.png") if number > 20 else os.rename(
            f"more/{number}.png", f"more/{number}_new.png")
    result = run("--dataset custom --custom_dataset_path more")
    assert result["figures"]["images"] == 21


def test_amp_and_batches_change_little(monkeypatch):
    names = "PSNR (dB)", "SSIM", EFFICIENTNET, "perplexity of codes"
    flags = "--images photos/1.png photos/2.png photos/3.png"
    figures = run(flags)["figures"]
    monkeypatch.setattr(reconstruct, "BATCH", 2)
    other = run(flags)["figures"]
    assert [other[name] for name in names] == pytest.approx([figures[n] for n in names], rel=1e-4)
    monkeypatch.setattr("utils.training.precision.cpu_has_bfloat16", lambda: True)
    half = run(f"{flags} --amp")["figures"]
    assert half["PSNR (dB)"] == pytest.approx(figures["PSNR (dB)"], abs=0.5)
    assert half != figures


def test_lpips_is_measured_with_the_weights_of_the_run(monkeypatch):
    path, names = RunFolder("ae").path / "hparams.yaml", ["photos/1.png", "photos/2.png"]
    path.write_text(path.read_text().replace("perceptual: efficientnet_lite0", "perceptual: lpips"))
    torch.manual_seed(0)
    lpips = PerceptualDistance()
    step = json.loads(RunFolder("ae").best.read_text())["step"]
    model = RunFolder("ae").model("vqgan_ema", step)
    weights = {f"perceptual.{name}": value for name, value in lpips.state_dict().items()}
    save_file(torch.load(model) | weights, model)
    RunFolder("ae").manifest(step).unlink()
    figures = run(f"--images {' '.join(names)}")["figures"]
    images, reconstructions, _ = by_hand(names)
    with torch.no_grad():
        expected = lpips(*(lpips_input(part, "0_1") for part in (images, reconstructions)))
    assert figures["perceptual distance (lpips)"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_small_images_do_without_what_needs_larger_ones(monkeypatch):
    monkeypatch.setitem(pair_measures.SMALLEST, "efficientnet_lite0", 33)
    monkeypatch.setattr(pair_measures, "SSIM_WINDOW", 33)
    figures = run("--images photos/1.png")["figures"]
    assert "PSNR (dB)" in figures and "SSIM" not in figures and EFFICIENTNET not in figures


@pytest.mark.parametrize("flags, says", [
    ("--images nowhere.png", "--images: there is no file or folder nowhere.png"),
    ("--images photos nowhere", "--images: there is no file or folder nowhere"),
    ("--images empty", r"--images: there is no image \(.jpg, .*\) in empty"),
    ("--images photos/1.png text.png", "cannot read the image text.png: it is no image"),
    ("--images broken", "none of the 1 images of images can be read"),
])
def test_wrong_images_are_refused_in_one_sentence(flags, says, workplace):
    (workplace / "empty").mkdir()
    (workplace / "broken").mkdir()
    for name in ("text.png", "broken/text.png"):
        (workplace / name).write_text("no image")
    with pytest.raises(UserError, match=says) as error:
        run(flags)
    assert "\n" not in str(error.value) and not RunFolder("out").results.exists()


def test_an_unreadable_image_in_a_folder_is_passed_over(workplace):
    (workplace / "photos" / "a.png").write_text("no image")
    assert run("--images photos")["figures"]["images"] == 30
    assert "passed over photos/a.png" in RunFolder("out").log.read_text()
    with pytest.raises(UserError, match="cannot read the image photos/a.png"):  # it is named too
        run(f"--images photos {workplace / 'photos' / 'a.png'}")


def test_what_is_no_autoencoder_is_refused(capsys):
    with pytest.raises(UserError, match="prior is the run of a sampler: --load_dir is that of an"):
        run("--images photos", "--load_dir prior --load_step 1 --no_visdom")
    with pytest.raises(SystemExit):
        run("--images photos --crops 3")
    assert "--crops would do nothing" in capsys.readouterr().err
