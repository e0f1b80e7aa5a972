"""Recipes and presets: which defaults they give, what follows from --train_steps, loaded runs."""

import pytest

from hparams import get_sampler_hparams, get_vqgan_fid_hparams, get_vqgan_hparams
from hparams.defaults import levels
from utils.runs.folder import RunFolder

CUSTOM = ["--dataset", "custom", "--custom_dataset_path", "photos"]
SAMPLER = ["--sampler", "absorbing", "--ae_load_dir", "ae", "--ae_load_step", "5"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save_run(H, name, without=()):
    lines = H.as_yaml().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(":")[0] not in without]
    RunFolder(name).create().hparams.write_text("".join(kept))


@pytest.mark.parametrize("dataset, recipe, preset", [
    ("ffhq", "published", "published"), ("bedrooms", "published", "published"),
    ("digits", "modern", "small"), ("real_fake_faces", "modern", "small"),
])
def test_each_dataset_has_its_recipe(dataset, recipe, preset):
    for H in (get_vqgan_hparams(["--dataset", dataset]),
              get_sampler_hparams(["--dataset", dataset, *SAMPLER])):
        assert (H.recipe, H.preset) == (recipe, preset)


def test_custom_images_with_the_published_recipe_share_the_defaults_of_ffhq():
    published = get_vqgan_hparams(["--dataset", "ffhq"])
    H = get_vqgan_hparams([*CUSTOM, "--recipe", "published"])
    differing = {name for name in vars(H) if vars(H)[name] != vars(published)[name]}
    assert differing <= {"dataset", "custom_dataset_path", "command"}


def test_parts_of_a_recipe_and_sizes_of_a_preset_are_flags():
    H = get_vqgan_hparams([*CUSTOM, "--disc_norm", "spectral", "--nf", "64", "--lr", "2e-3"])
    assert (H.disc_norm, H.nf, H.lr) == ("spectral", 64, 2e-3)
    H = get_vqgan_hparams([*CUSTOM, "--recipe", "published", "--preset", "small"])
    assert (H.img_size, H.nf, H.norm_groups) == (64, 32, 8)  # sizes of one, training of the other
    assert (H.disc_norm, H.lr_schedule, H.lr) == ("batch", "constant", 4.5e-6 * H.batch_size)


@pytest.mark.parametrize("flags, weight", [
    ("", 0.15), ("--perceptual lpips", 1.0), ("--perceptual none", 0.0),
    ("--perceptual_weight 0.3", 0.3), ("--recipe published", 1.0),
])
def test_the_weight_of_the_perceptual_distance_follows_which_it_is(flags, weight):
    assert get_vqgan_hparams([*CUSTOM, *flags.split()]).perceptual_weight == weight


def test_a_sampler_has_the_preset_of_its_autoencoder_where_the_recipe_is_the_same(capsys):
    def sampler(*flags):
        H = get_sampler_hparams([*CUSTOM, *SAMPLER, *flags])
        return H.preset, H.bert_n_emb, H.batch_size

    save_run(get_vqgan_hparams([*CUSTOM, "--preset", "medium"]), "ae")
    assert sampler() == ("medium", 384, 32)
    assert sampler("--preset", "small", "--batch_size", "3") == ("small", 128, 3)
    assert sampler("--recipe", "published") == ("published", 512, 20)
    save_run(get_vqgan_hparams([*CUSTOM, "--recipe", "published"]), "ae")
    assert sampler() == ("small", 128, 16)
    save_run(get_vqgan_hparams(["--dataset", "digits", "--preset", "medium"]), "ae")
    H = get_sampler_hparams(["--dataset", "digits", *SAMPLER])
    assert (H.preset, H.bert_n_emb, H.img_size) == ("medium", 384, 128)
    save_run(get_vqgan_hparams([*CUSTOM, "--preset", "medium"]), "ae", without=("preset",))
    assert sampler() == ("small", 128, 16)
    with open(RunFolder("ae").hparams, "a") as file:
        file.write("preset: huge\n")
    with pytest.raises(SystemExit):
        sampler()
    assert "logs/ae/hparams.yaml: preset must be one of" in capsys.readouterr().err


def test_a_preset_that_is_given_comes_after_the_dataset():
    assert get_vqgan_hparams(["--dataset", "digits"]).batch_size == 32
    assert get_vqgan_hparams(["--dataset", "textures"]).batch_size == 8
    assert get_vqgan_hparams(["--dataset", "digits", "--preset", "small"]).img_size == 32
    H = get_vqgan_hparams(["--dataset", "digits", "--preset", "medium"])
    assert H.img_size == 128 and H.n_channels == 1


@pytest.mark.parametrize("steps", [200, 2000, 20000])
def test_intervals_follow_the_steps(steps):
    for H in (get_vqgan_hparams([*CUSTOM, "--train_steps", str(steps)]),
              get_sampler_hparams([*CUSTOM, *SAMPLER, "--train_steps", str(steps)])):
        for name in ("steps_per_eval", "steps_per_save_output", "steps_per_checkpoint"):
            assert getattr(H, name) == steps // 10
        assert H.warmup_iters == min(steps // 20, 1000 if hasattr(H, "sampler") else 70)
        assert 1 / (1 - H.ema_beta) == pytest.approx(max(10, 0.03 * steps), rel=0.01)
        assert H.validation_images >= 64
    H = get_vqgan_hparams([*CUSTOM, "--train_steps", str(steps)])
    assert 0 < H.codebook_start_step < H.disc_start_step < steps
    assert H.disc_start_step + H.disc_lead_steps + H.disc_fade_steps < steps


def test_endless_runs_have_the_intervals_of_long_ones():
    H = get_vqgan_hparams(CUSTOM)
    assert H.steps_per_checkpoint == 20000 and H.warmup_iters == H.codebook_start_step == 70
    assert get_sampler_hparams([*CUSTOM, *SAMPLER]).warmup_iters == 1000
    given = get_vqgan_hparams([*CUSTOM, "--steps_per_eval", "0", "--train_steps", "200"])
    assert given.steps_per_eval == 0


@pytest.mark.parametrize("size, grid", [
    (32, 8), (48, 12), (64, 16), (96, 12), (100, 25), (128, 16), (200, 25), (256, 16),
])
def test_sizes_from_32_to_256_make_a_grid(size, grid):
    H = get_vqgan_hparams([*CUSTOM, "--img_size", str(size)])
    assert H.latent_shape == [1, grid, grid]
    assert len(levels(size)) == len(H.ch_mult)


@pytest.mark.parametrize("size, others", [
    (33, "32 or 36"), (130, "128 or 144"), (250, "240 or 256"),
])
def test_sizes_that_make_large_grids_are_refused_with_those_that_do_not(size, others, capsys):
    with pytest.raises(SystemExit):
        get_vqgan_hparams([*CUSTOM, "--img_size", str(size)])
    assert f"--img_size {size} cannot be halved often enough" in (said := capsys.readouterr().err)
    assert others in said
    H = get_vqgan_hparams([*CUSTOM, "--img_size", "250", "--ch_mult", "1", "2"])
    assert H.latent_shape == [1, 125, 125]


def test_runs_of_before_there_were_recipes_go_on_as_they_were():
    flags = ["--dataset", "digits", "--log_dir", "a"]
    H = get_vqgan_hparams([*flags, "--recipe", "published", "--lr", "0.01"])
    save_run(H, "a", without={"recipe", "preset", "norm_groups", "disc_norm", "codebook_revival"})
    for goes_on in ("--load_dir a --load_step 5", "--resume"):
        (RunFolder("a").saved_stats / "manifest_5.json").touch()
        resumed = get_vqgan_hparams([*flags, *goes_on.split()])
        assert (resumed.recipe, resumed.preset) == ("published", "published")
        assert (resumed.norm_groups, resumed.disc_norm) == (32, "batch")
        assert resumed.codebook_revival == 0
        assert resumed.lr == 0.01
    measured = get_vqgan_fid_hparams(["--load_dir", "a", "--load_step", "5", "--log_dir", "m"])
    assert measured.norm_groups == 32


def test_a_run_of_before_there_were_features_keeps_its_discriminator():
    flags = [*CUSTOM, "--log_dir", "a"]
    H = get_vqgan_hparams([*flags, "--disc_input", "pixels"])
    assert get_vqgan_hparams(flags).disc_input == "features"
    save_run(H, "a", without={"disc_input"})
    (RunFolder("a").saved_stats / "manifest_5.json").touch()
    resumed = get_vqgan_hparams([*flags, "--resume"])
    assert (resumed.recipe, resumed.disc_input) == ("modern", "pixels")


def test_a_resumed_run_keeps_its_recipe_and_what_followed_from_its_steps():
    flags = [*CUSTOM, "--log_dir", "a"]
    H = get_vqgan_hparams([*flags, "--recipe", "modern", "--train_steps", "1000"])
    save_run(H, "a")
    (RunFolder("a").saved_stats / "manifest_5.json").touch()
    resumed = get_vqgan_hparams([*flags, "--resume", "--train_steps", "9000"])
    assert resumed.recipe == "modern" and resumed.disc_start_step == 500
    begun = get_vqgan_hparams([*CUSTOM, "--log_dir", "b", "--load_dir", "a", "--load_step", "5",
                               "--train_steps", "9000"])
    assert begun.recipe == "modern" and begun.disc_start_step == 4500 and begun.nf == H.nf


@pytest.mark.parametrize("get, more", [(get_vqgan_hparams, []), (get_sampler_hparams, SAMPLER)])
def test_intervals_and_ema_follow_the_steps_that_a_run_goes_on_to(get, more):
    flags = [*CUSTOM, *more, "--log_dir", "a"]
    save_run(get([*flags, "--train_steps", "200", "--steps_per_eval", "50"]), "a")
    (RunFolder("a").saved_stats / "manifest_5.json").touch()
    before = get([*flags, "--resume"])
    assert (before.steps_per_checkpoint, before.ema_beta, before.validation_images) == (20, 0.9, 64)
    longer = get([*flags, "--resume", "--train_steps", "20000"])
    assert (longer.steps_per_checkpoint, longer.steps_per_eval) == (2000, 50)  # 50 was a flag
    assert longer.ema_beta == pytest.approx(1 - 1 / 600, abs=1e-6)
    kept = get([*flags, "--resume", "--train_steps", "20000", "--ema", "--ema_beta", "0.5"])
    assert kept.ema_beta == 0.5


@pytest.mark.parametrize("flag", ["--recipe published", "--preset medium"])
def test_a_run_that_goes_on_cannot_change_its_recipe(flag, capsys):
    flags = [*CUSTOM, "--log_dir", "a"]
    save_run(get_vqgan_hparams(flags), "a")
    (RunFolder("a").saved_stats / "manifest_5.json").touch()
    get_vqgan_hparams([*flags, "--resume", "--recipe", "modern", "--preset", "small"])
    with pytest.raises(SystemExit):
        get_vqgan_hparams([*flags, "--resume", *flag.split()])
    assert f"{flag} contradicts" in capsys.readouterr().err
    other = get_vqgan_hparams([*CUSTOM, "--log_dir", "b", "--load_dir", "a", "--load_step", "5",
                               *flag.split()])
    assert other.nf == 32  # of the model that is loaded


def test_a_sampler_takes_the_autoencoder_as_it_is_and_has_a_recipe_of_its_own():
    save_run(get_vqgan_hparams([*CUSTOM, "--recipe", "published", "--log_dir", "ae", "--crops",
                                "3"]), "ae")
    H = get_sampler_hparams([*CUSTOM, *SAMPLER])
    assert (H.recipe, H.optimizer) == ("modern", "muon")
    assert (H.norm_groups, H.nf, H.disc_norm) == (32, 128, "batch")
    assert H.crops == 3  # the images that the autoencoder knows
    assert get_sampler_hparams(["--dataset", "digits", *SAMPLER]).crops == 0
