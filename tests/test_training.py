"""Both stages from end to end on tiny settings: resume to the bit, errors, Ctrl-C, latents."""

import base64
import json
import os
import re
import shutil
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import train_sampler
import train_vqgan
from experiments import digits_report, generate_big_samples, get_samples, inpaint
from helpers import ON_DIGITS, ROOT, one_thread, started, wait_until
from hparams import get_vqgan_hparams
from models import AbsorbingDiffusion
from utils.data.datasets import load_dataset
from utils.data.pixels import to_uint8
from utils.data.split import train_validation_split
from utils.evaluation.inpainting import hidden_ids
from utils.runs.folder import RunFolder
from utils.runs.script import run_script
from utils.training import precision

COMMON = ("--no_visdom --steps_per_log 2 --steps_per_display_output 0 "
          "--steps_per_save_output 0 --validation_images 8")
VQGAN = (
    f"{ON_DIGITS} --img_size 16 --ch_mult 1 1 --attn_resolutions 8 --emb_dim 8 "
    f"--codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 4 --steps_per_eval 4 {COMMON}"
)
SAMPLER = (
    f"--sampler absorbing {ON_DIGITS} --ae_load_dir ae --ae_load_step 2 --bert_n_emb 32 "
    f"--bert_n_head 4 --bert_n_layers 2 --total_steps 16 --sample_steps 8 --batch_size 8 "
    f"--warmup_iters 3 --steps_per_eval 4 {COMMON}"
)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bfloat16(monkeypatch):
    """--amp computes in bfloat16 even where the CPU has no units for it."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)


def vqgan(flags):
    train_vqgan.main([*VQGAN.split(), *flags.split()])


def sampler(flags):
    train_sampler.main([*SAMPLER.split(), *flags.split()])


def files_of(run, step):
    paths = sorted(RunFolder(run).models.glob(f"*_{step}.th"))
    return {path.name: torch.load(path, weights_only=True) for path in paths}


def lines_of(run):
    """The lines of a run's metrics.jsonl, without one that is being written."""
    path = RunFolder(run).metrics
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def assert_identical(left, right, where=""):
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_identical(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right)):
            assert_identical(one, other, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.fixture
def compiled_anew():
    """Nothing is compiled before, nor stays so."""
    torch._dynamo.reset()
    yield torch._dynamo.reset
    torch._dynamo.reset()


@pytest.mark.parametrize("quantizer", [
    "nearest", "gumbel", "nearest --accumulate 2 --checkpoint_blocks",
    pytest.param("nearest --compile", marks=pytest.mark.slow),
])
def test_vqgan_resumes_to_the_bit(bfloat16, compiled_anew, quantizer):
    flags = (
        f"--amp --ema --ema_beta 0.9 --num_workers 2 --diff_aug --disc_start_step 3 "
        f"--horizontal_flip --steps_per_checkpoint 3 --quantizer {quantizer}"
    )
    vqgan(f"{flags} --log_dir through --train_steps 6")
    vqgan(f"{flags} --log_dir parts --train_steps 3")
    compiled_anew()
    vqgan(f"{flags} --log_dir parts --train_steps 6 --load_dir parts --load_step 3")
    through, parts = files_of("through", 6), files_of("parts", 6)
    names = {f"{name}_6.th" for name in ("vqgan", "vqgan_ema", "ae_optim", "disc_optim")}
    assert set(through) == set(parts) == names
    assert_identical(through, parts)
    before, after = files_of("through", 3)["vqgan_3.th"], through["vqgan_6.th"]
    for part in ("ae.encoder.blocks.0.weight", "disc.main.0.weight"):
        assert not torch.equal(before[part], after[part])
    ema = through["vqgan_ema_6.th"]["ae.encoder.blocks.0.weight"]
    assert not torch.equal(ema, after["ae.encoder.blocks.0.weight"])


@pytest.mark.parametrize("kind", [
    "--sampler absorbing --optimizer muon",
    "--sampler absorbing --optimizer adam --mask_schedule fixed --t_sampling uniform",
    "--sampler autoregressive",
    pytest.param("--sampler absorbing --compile", marks=pytest.mark.slow),
    "--sampler absorbing --accumulate 2 --checkpoint_blocks",
])
def test_sampler_resumes_to_the_bit(bfloat16, compiled_anew, kind):
    vqgan("--log_dir ae --train_steps 2 --ema")
    flags = (
        f"{kind} --amp --ema --horizontal_flip --resid_pdrop 0.1 --num_workers 2 "
        f"--clip_grad_norm 1 --steps_per_checkpoint 4"
    )
    sampler(f"{flags} --log_dir through --train_steps 8")
    sampler(f"{flags} --log_dir parts --train_steps 4")
    compiled_anew()
    sampler(f"{flags} --log_dir parts --train_steps 8 --load_dir parts --load_step 4")
    through, parts = files_of("through", 8), files_of("parts", 8)
    assert len(through) == 3
    assert_identical(through, parts)
    lines = lines_of("parts")
    assert [line["step"] for line in lines if line["group"] == "train"] == [2, 4, 6, 8]


def test_a_loaded_optimizer_takes_the_learning_rate_of_the_command():
    vqgan("--log_dir a --train_steps 2")
    vqgan("--log_dir b --load_dir a --load_step 2 --train_steps 3 --lr 0.25")
    (group,) = files_of("b", 3)["ae_optim_3.th"]["param_groups"]
    assert group["lr"] == 0.25


def test_a_missing_autoencoder_is_found_out_before_anything_is_said_of_it(
    capsys, monkeypatch, two_runs
):
    says = sentence(train_sampler.main, f"{SAMPLER} --ae_load_step 3 --log_dir a --train_steps 9",
                    capsys, monkeypatch)
    assert "vqgan is there at steps 2" in says
    assert "trained" not in RunFolder("a").log.read_text().replace(says, "")


def test_a_run_that_is_longer_already_says_so(two_runs):
    sampler("--log_dir prior --train_steps 1 --resume")
    log = RunFolder("prior").log.read_text()
    assert re.search(r"WARN\w* *.*step 2 leaves nothing to train: train_steps is 1", log)


def test_a_sampler_refuses_another_autoencoder(capsys, monkeypatch, two_runs):
    vqgan("--log_dir other --train_steps 2 --seed 5")
    flags = "--load_dir prior --load_step 2 --no_visdom --ae_load_dir other"
    line = sentence(get_samples.main, flags, capsys, monkeypatch)
    assert "trained on the ids of another autoencoder" in line
    flags = f"{SAMPLER} --load_dir prior --load_step 2 --train_steps 3 --ae_load_dir other"
    assert "another autoencoder" in sentence(train_sampler.main, flags, capsys, monkeypatch)


def test_unreadable_images_are_named_and_counted(workplace):
    (workplace / "photos").mkdir()
    for index in range(8):
        Image.new("L", (20, 20), 30 * index).save(workplace / "photos" / f"{index}.png")
    (workplace / "photos" / "broken.png").write_bytes(b"no image")
    data = "--dataset custom --custom_dataset_path photos --n_channels 1 --nf 32 --res_blocks 1"
    small = VQGAN.replace(ON_DIGITS, data) + " --perceptual_weight 0 --steps_per_eval 0"
    train_vqgan.main([*small.split(), *"--log_dir ae --train_steps 6".split()])
    log = RunFolder("ae").log.read_text()
    assert log.count("broken.png: it is no image") == 1 and "1 images could not be read" in log
    small = SAMPLER.replace(ON_DIGITS, data) + " --steps_per_eval 0 --ae_load_step 6"
    for run in ("encoded", "cached"):
        train_sampler.main([*small.split(), *f"--log_dir {run} --train_steps 1".split()])
        log = RunFolder(run).log.read_text()
        assert log.count("1 of 9 images to encode could not be read") == 1


def test_unreadable_validation_images_end_a_run_before_its_first_step(
    capsys, monkeypatch, workplace
):
    (workplace / "photos").mkdir()
    for index in range(12):
        Image.new("L", (20, 20), 20 * index).save(workplace / "photos" / f"{index:02}.png")
    data = "--dataset custom --custom_dataset_path photos --n_channels 1 --nf 32 --res_blocks 1"
    small = VQGAN.replace(ON_DIGITS, data) + " --perceptual_weight 0 --train_steps 8"
    _, held_out = train_validation_split(load_dataset(get_vqgan_hparams(small.split())))
    for index in range(len(held_out)):
        (workplace / held_out.path(index)).write_bytes(b"no image")
    line = sentence(train_vqgan.main, f"{small} --log_dir a", capsys, monkeypatch)
    assert "can be read" in line and not lines_of("a")



def test_saving_images_does_not_change_training():
    vqgan("--log_dir ae --train_steps 2")
    sampler("--log_dir plain --train_steps 4 --ema")
    sampler("--log_dir shown --train_steps 4 --ema --steps_per_save_output 1 --save_individually")
    assert_identical(files_of("plain", 4), files_of("shown", 4))
    images = RunFolder("shown").images
    assert len(list((images / "samples_2").glob("*.png"))) == 8
    vqgan("--log_dir shown_ae --train_steps 2 --steps_per_save_output 1")
    assert_identical(files_of("ae", 2), files_of("shown_ae", 2))
    assert (RunFolder("shown_ae").images / "reconstructions_2.png").exists()


def test_equal_seeds_give_equal_weights():
    vqgan("--log_dir a --train_steps 2")
    vqgan("--log_dir b --train_steps 2")
    vqgan("--log_dir c --train_steps 2 --seed 1")
    key = "ae.encoder.blocks.0.weight"
    weights = [files_of(run, 2)["vqgan_2.th"][key] for run in "abc"]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_checkpoint_of_models_alone_loads():
    """Published checkpoints hold models only; the log says what was not there."""
    vqgan("--log_dir published --train_steps 2")
    folder = RunFolder("published")
    for path in (folder.model("ae_optim", 2), folder.model("disc_optim", 2), folder.stats(2),
                 folder.hparams, folder.manifest(2)):
        path.unlink()
    vqgan("--log_dir next --load_dir published --load_step 2 --train_steps 3 --ema")
    log = RunFolder("next").log.read_text()
    for name in ("vqgan_ema_2.th", "ae_optim_2.th", "disc_optim_2.th", "stats_2", "hparams.yaml"):
        assert f"{name} is not there" in log


def test_latents_are_cached_until_something_changes(workplace, monkeypatch):
    vqgan("--log_dir ae --train_steps 2")
    vqgan("--log_dir other --train_steps 2 --seed 5")

    def cached():
        return {path.name for path in (workplace / "latents").glob("*.pt")}

    sampler("--log_dir prior --train_steps 1")
    first = cached()
    assert len(first) == 2  # training and validation
    encodings = []
    encode = train_sampler.load_latents.__globals__["encode"]
    monkeypatch.setitem(
        train_sampler.load_latents.__globals__, "encode",
        lambda *arguments: encodings.append(1) or encode(*arguments),
    )
    sampler("--log_dir prior --overwrite --train_steps 1")
    assert cached() == first and not encodings
    sampler("--log_dir prior --overwrite --train_steps 1 --horizontal_flip")
    assert len(cached() - first) == 1  # validation is never flipped
    sampler("--log_dir prior --overwrite --train_steps 1 --ae_load_dir other")
    assert len(cached() - first) == 3 and len(encodings) == 3
    assert not list((workplace / "latents").glob("*part*"))
    path = workplace / "latents" / sorted(first)[0]
    path.write_bytes(path.read_bytes()[:100])
    sampler("--log_dir prior --overwrite --train_steps 1")
    assert len(encodings) == 4 and "is not used" in RunFolder("prior").log.read_text()


def test_get_samples_is_repeatable(workplace):
    vqgan("--log_dir ae --train_steps 2 --ema")
    sampler("--log_dir prior --train_steps 2 --ema")
    flags = "--load_dir prior --load_step 2 --n_samples 5 --batch_size 3 --no_visdom"
    get_samples.main([*flags.split(), "--log_dir", "out", "--save_individually"])
    images = RunFolder("out").images
    assert (images / "samples_2.png").exists()
    singles = sorted((images / "samples_2").glob("*.png"))
    assert len(singles) == 5
    assert Image.open(singles[0]).size == (16, 16)
    assert "prior_2" not in RunFolder("out").log.read_text()
    assert "absorbing_ema_2.th" in RunFolder("out").log.read_text()
    get_samples.main([*flags.split(), "--log_dir", "again", "--save_individually"])
    again = sorted((RunFolder("again").images / "samples_2").glob("*.png"))
    assert [p.read_bytes() for p in singles] == [p.read_bytes() for p in again]


def test_digits_report(workplace):
    vqgan("--log_dir ae --train_steps 2")
    sampler("--log_dir prior --train_steps 4")
    flags = "--load_dir prior --load_step 4 --n_samples 12 --no_visdom --log_dir report"
    digits_report.main(flags.split())
    [result] = json.loads(RunFolder("report").results.read_text()).values()
    table = result["figures"]
    assert table["classifier: accuracy on held-out digits"] > 0.97
    assert all(value is not None for value in table.values())
    path = RunFolder("report").images / "report_4.png"
    picture = Image.open(path)
    assert picture.width > picture.height
    page = RunFolder("report").report.read_text()
    assert "classifier: accuracy on held-out digits" in page
    assert base64.b64encode(path.read_bytes()).decode() in page
    assert RunFolder("report").log.read_text().endswith("on one page: logs/report/report.html\n")
    get_samples.main(flags.split())
    assert re.findall("<h2>(.*)</h2>", RunFolder("report").report.read_text()) == [
        "samples", "digits"
    ]


def test_inpaint(two_runs, workplace):
    flags = "--load_dir prior --load_step 2 --n_samples 3 --no_visdom --image_index 4 --log_dir out"
    inpaint.main([*flags.split(), "--box", "4", "2", "10", "9", "--save_individually"])
    image = to_uint8(load_digits_at(16, 4))
    singles = sorted((RunFolder("out").images / "inpaint_2").glob("*.png"))
    assert len(singles) == 3
    page = RunFolder("out").report.read_text()  # of an experiment without figures
    assert page.count("<img ") == 1 and "<h2>inpainting</h2>" in page
    for path in singles:
        result = torch.from_numpy(np.array(Image.open(path)))[None]
        kept = torch.ones(16, 16, dtype=torch.bool)
        kept[2:9, 4:10] = False
        assert torch.equal(result[0][kept], image[0][kept]), "kept pixels stay as they are"
        assert not torch.equal(result, image)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[2:9, 4:10] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(image[0].numpy()).save("image.png")
    again = flags.replace("--image_index 4", "--image image.png").replace("out", "again")
    inpaint.main([*again.split(), "--mask", "mask.png", "--save_individually"])
    others = sorted((RunFolder("again").images / "inpaint_2").glob("*.png"))
    assert [p.read_bytes() for p in singles] == [p.read_bytes() for p in others]


def load_digits_at(img_size, index):
    return load_dataset(get_vqgan_hparams(f"--dataset digits --img_size {img_size} --ch_mult 1 1 "
                                          "--attn_resolutions 8".split())).load(index)


def test_ids_outside_the_mask_are_kept():
    hidden = torch.zeros(16, 16, dtype=torch.bool)
    hidden[3, 5] = True
    unknown = hidden_ids(hidden, (8, 8)).view(8, 8)
    assert unknown.nonzero().tolist() == [[1, 2]]


def test_inpainting_draws_only_what_is_hidden(two_runs, workplace, monkeypatch):
    asked = []
    sample = AbsorbingDiffusion.sample

    def spy(self, *arguments, **options):
        drawn = sample(self, *arguments, **options)
        asked.append((options["known"], drawn, self.mask_id))
        return drawn

    monkeypatch.setattr(AbsorbingDiffusion, "sample", spy)
    inpaint.main("--load_dir prior --load_step 2 --n_samples 3 --batch_size 2 --no_visdom "
                 "--image_index 4 --log_dir out --box 4 2 10 9".split())
    hidden = torch.zeros(16, 16, dtype=torch.bool)
    hidden[2:9, 4:10] = True
    unknown = hidden_ids(hidden, (8, 8))
    assert [len(known) for known, _, _ in asked] == [2, 1]
    for known, drawn, mask_id in asked:
        assert torch.equal(known == mask_id, unknown.expand_as(known))
        assert torch.equal(known[:, ~unknown], drawn[:, ~unknown])
        assert torch.equal(known[0], asked[0][0][0]) and drawn.max() < mask_id


@pytest.mark.parametrize("canvas", ["windows", "native"])
def test_big_samples(canvas, workplace):
    vqgan("--log_dir ae --train_steps 2")
    sampler("--log_dir prior --train_steps 2 --position rpb")
    flags = f"--load_dir prior --load_step 2 --n_samples 2 --no_visdom --canvas {canvas}"
    generate_big_samples.main([*flags.split(), "--shape", "10", "13", "--log_dir", "out",
                               "--save_individually"])
    singles = sorted((RunFolder("out").images / "big_2").glob("*.png"))
    assert [Image.open(path).size for path in singles] == [(26, 20)] * 2


# --- wrong input -------------------------------------------------------------------------------


def sentence(main, flags, capsys, monkeypatch):
    """The one line that a script with `flags` ends with, its exit status 1 or 2."""
    monkeypatch.setattr(sys, "argv", ["script.py", *flags.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "script.py: error" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("script, flags, says", [
    (train_vqgan, "--dataset custom --custom_dataset_path nowhere", "there is no folder nowhere"),
    (train_vqgan, "--dataset custom --custom_dataset_path empty", "there is no image"),
    (train_vqgan, "--dataset churches", "there is no folder"),
    (train_vqgan, f"{VQGAN} --load_dir ae --load_step 7", "vqgan_7.th: vqgan is there at steps 2"),
    (train_vqgan, f"{VQGAN} --load_dir none --load_step 7", "check the run's name"),
    (train_vqgan, f"{VQGAN} --load_dir ae --load_step 2 --codebook_size 32", "contradicts"),
    (train_vqgan, f"{VQGAN} --device cuda:99", "--device cuda:99 is not usable here"),
    (train_vqgan, f"{VQGAN} --perceptual_weight 1 --vgg_weights none.pth", "no file none.pth"),
    (train_vqgan, "--dataset digits --nf 3200000", "there is not enough memory"),
    (train_vqgan, "--dataset digits --visdom_server http://[", "visdom_server is not an address"),
    (train_sampler, f"{SAMPLER} --ae_load_dir none", "vqgan_2.th"),
    (train_sampler, f"{SAMPLER} --ae_load_step 3", "vqgan is there at steps 2"),
    (train_sampler, f"{SAMPLER} --codebook_size 32", "32 contradicts codebook_size 16"),
    (train_sampler, f"{SAMPLER} --kernel_sizes 3 9", "larger than the 8x8 grid"),
    (get_samples, "--load_dir ae --load_step 2 --n_samples 1", "hparams.yaml names no sampler"),
    (train_sampler, f"{SAMPLER} --load_dir prior --load_step 2 --attention full", "contradicts"),
    (train_sampler, f"{SAMPLER} --load_dir prior --load_step 9", "absorbing is there at steps 2"),
    (get_samples, "--load_dir prior --load_step 9 --no_visdom", "absorbing is there at steps 2"),
    (get_samples, "--load_dir prior --load_step 2 --ema --no_visdom", "absorbing_ema_2.th"),
    (get_samples, "--load_dir prior --no_visdom", "--load_step must name the checkpoint"),
    (get_samples, "--load_dir none --load_step 2", "there is no run folder logs/none"),
    (inpaint, "--load_dir prior --load_step 2", "either --mask or --box"),
    (inpaint, "--load_dir prior --load_step 2 --box 3 3 3 9", "--box is x0 y0 x1 y1"),
    (inpaint, "--load_dir prior --load_step 2 --box 3 3 4 17", "an image of 16 pixels"),
    (inpaint, "--load_dir prior --load_step 2 --mask no.png --no_visdom", "no.png"),
    (inpaint, "--load_dir prior --load_step 2 --box 0 0 4 4 --image_index 1797 --no_visdom",
     "there are 1797 images"),
    (generate_big_samples, "--load_dir prior --load_step 2", "shape"),
    (generate_big_samples, "--load_dir prior --load_step 2 --shape 7 9", "smaller than the 8 8"),
    (generate_big_samples, "--load_dir prior --load_step 2 --shape 9 9 --canvas native",
     "without absolute positions"),
])
def test_wrong_input_is_one_sentence(script, flags, says, capsys, monkeypatch, two_runs):
    if script in (train_vqgan, train_sampler) and "--train_steps" not in flags:
        flags += " --train_steps 20"  # a refusal that does not come must not train for ever
    assert says in sentence(script.main, flags, capsys, monkeypatch)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the runs `ae` and `prior`, trained for two steps without EMA."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    try:
        vqgan("--log_dir ae --train_steps 2")
        sampler("--log_dir prior --train_steps 2")
        (folder / "empty").mkdir()
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def two_runs(trained, workplace):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)


@pytest.mark.parametrize("content, says", [
    (b"this is text", "vqgan_2.th"),
    ("compressed", "torch does not compress"),
    ("keys", "'3' names no tensor"),
    (b"", "cannot be read"),
    ("truncated", "cannot be read"),
    ("code", "is refused"),
    ("other", "is another model's file"),
    ("list", "holds no state dict"),
    ("shape", "does not fit: ae.encoder.blocks.0.weight has shape"),
])
def test_hostile_model_files_are_refused(content, says, capsys, monkeypatch, workplace):
    vqgan("--log_dir ae --train_steps 2")
    path = RunFolder("ae").model("vqgan", 2)
    RunFolder("ae").manifest(2).unlink()  # a published file has none
    state = torch.load(path, weights_only=True)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "code":
        torch.save(Malicious(), path)
    elif content == "other":
        torch.save({"layer.weight": torch.zeros(3)}, path)
    elif content == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 20))
    elif content == "keys":
        torch.save({3: torch.zeros(3)}, path)
    elif content == "list":
        torch.save([torch.zeros(3)], path)
    elif content == "shape":
        torch.save({**state, "ae.encoder.blocks.0.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    flags = f"{VQGAN} --load_dir ae --load_step 2 --train_steps 4"
    line = sentence(train_vqgan.main, flags, capsys, monkeypatch)
    assert says in line and "vqgan_2.th" in line
    assert not (workplace / "owned").exists()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_of_another_attention_names_the_flag(capsys, monkeypatch):
    vqgan("--log_dir ae --train_steps 2")
    sampler("--log_dir prior --train_steps 2 --attention full")
    RunFolder("prior").hparams.unlink()
    flags = f"{SAMPLER} --load_dir prior --load_step 2"
    assert "--attention full" in sentence(train_sampler.main, flags, capsys, monkeypatch)


@pytest.mark.parametrize("number", [
    "SIGINT", "SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow),
    pytest.param("SIGUSR1", marks=pytest.mark.slow),
])
def test_a_signal_to_the_whole_group_saves_and_the_run_resumes_to_the_bit(workplace, number):
    """As terminals and schedulers send it: the workers that read images get it too."""
    command = [sys.executable, str(ROOT / "train_vqgan.py"), *VQGAN.split(), "--log_dir", "parts",
               "--steps_per_log", "1", "--num_workers", "2"]
    with started(command) as process:
        wait_until(lambda: lines_of("parts") or process.poll() is not None, seconds=120)
        os.killpg(process.pid, getattr(signal, number))
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + getattr(signal, number) and "Traceback" not in output
    *_, step = RunFolder("parts").steps("vqgan")  # a validation before it may have kept its own
    message = f"interrupted: saved step {step}; go on with --resume"
    assert output.splitlines()[-1].endswith(
        f"train_vqgan.py: {message}, or with --load_dir parts --load_step {step}"
    )
    assert message in RunFolder("parts").log.read_text()
    with one_thread():
        vqgan(f"--log_dir parts --load_dir parts --load_step {step} --train_steps {step + 2}")
        vqgan(f"--log_dir through --train_steps {step + 2}")
    assert_identical(files_of("parts", step + 2), files_of("through", step + 2))


def start(script, flags, port):
    """A training script in a process of its own that draws on the server at `port`."""
    flags = flags.replace("--no_visdom", f"--visdom_port {port}")
    flags = flags.replace("--steps_per_display_output 0", "--steps_per_display_output 4")
    return started([sys.executable, str(ROOT / script), *flags.split(), "--log_dir", script])


@pytest.mark.parametrize("script, flags, windows", [
    ("train_vqgan.py", VQGAN, ["metric: Loss", "metric: Reconstruction PSNR, dB",
                               "bars: codebook_use", "image: reconstructions", "text: settings",
                               "text: health"]),
    pytest.param("train_sampler.py", SAMPLER, [
        "metric: Loss", "metric: Bits per token", "image: samples", "bars: loss_per_timestep",
        "text: settings",
    ], marks=pytest.mark.slow),
])
def test_training_continues_while_visdom_restarts(server, script, flags, windows, two_runs):
    """A real server has the windows, is stopped, started again, and has them all again."""
    server.start()
    with start(script, flags, server.port) as process:
        wait_until(lambda: set(windows) <= set(server.windows(script)), seconds=60)
        server.kill()
        before = lines_of(script)[-1]["step"]
        wait_until(lambda: lines_of(script)[-1]["step"] > before + 20, seconds=60)
        server.start()  # knows nothing of what was there before
        wait_until(lambda: set(windows) <= set(server.windows(script)), seconds=60)
        steps = server.windows(script)["metric: Loss"]["content"]["data"][0]["x"]
        assert steps[0] == 2 and steps[-1] > before + 20
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in output
    warnings = [line for line in output.splitlines() if " WARNING " in line]
    assert len(warnings) == 1, warnings
