"""Hyperparameters: derived parsers, defaults, checks, and runs that set the architecture."""

import dataclasses
import re

import pytest
import yaml

from hparams import (
    get_elbo_hparams, get_fid_hparams, get_nearest_neighbours_hparams, get_page_hparams,
    get_prdc_hparams, get_reconstruct_hparams, get_sampler_hparams, get_samples_hparams,
    get_vqgan_fid_hparams, get_vqgan_hparams,
)
from hparams.scripts import (
    ELBOSettings, FIDSettings, NearestNeighboursSettings, PageSettings, ReconstructSettings,
    SamplerSettings, SamplesSettings, VQGANFIDSettings, VQGANSettings, default_settings,
)
from utils.runs.folder import RunFolder

VQGAN = ["--dataset", "digits"]
SAMPLER = [*VQGAN, "--sampler", "absorbing", "--ae_load_dir", "ae", "--ae_load_step", "5"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(capsys, parse, argv):
    """The one sentence with which `parse` refuses `argv`, exit status 2."""
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def save_run(H, name):
    RunFolder(name).create().hparams.write_text(H.as_yaml())


@pytest.mark.parametrize("dataset", ["ffhq", "churches", "bedrooms"])
def test_published_defaults(dataset):
    published = dict(
        img_size=256, n_channels=3, nf=128, ch_mult=[1, 1, 2, 2, 4], res_blocks=2,
        attn_resolutions=[16], emb_dim=256, codebook_size=1024, latent_shape=[1, 16, 16],
        quantizer="nearest", beta=0.25, gumbel_kl_weight=1e-8, perceptual_weight=1.0, ndf=64,
        disc_layers=3, disc_weight_max=1, disc_start_step=30001, base_lr=4.5e-6, batch_size=3,
        ema_beta=0.995, steps_per_update_ema=10, load_dir="test", load_step=0, log_dir="test",
        train_steps=100000000, steps_per_checkpoint=25000, steps_per_display_output=5000,
        steps_per_eval=0, steps_per_log=10, steps_per_save_output=5000, visdom_port=8097,
    )
    H = get_vqgan_hparams(["--dataset", dataset])
    assert {name: getattr(H, name) for name in published} == published
    assert H.lr == pytest.approx(4.5e-6 * 3)
    published = dict(
        batch_size=20, bert_n_emb=512, bert_n_head=8, bert_n_layers=24, block_size=256,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, loss_type="reweighted_elbo",
        mask_schedule="random", total_steps=256, sample_steps=256, sample_type="diffusion",
        temp=1.0, lr=1e-4 if dataset == "ffhq" else 2e-4, attention="hydra", optimizer="adam",
        warmup_iters=30000 if dataset == "ffhq" else 10000, t_sampling="uniform",
        lr_schedule="constant",
    )
    H = get_sampler_hparams(["--dataset", dataset, *SAMPLER[2:]])
    assert {name: getattr(H, name) for name in published} == published


def test_misspelt_attributes_raise():
    H = get_vqgan_hparams(VQGAN)
    with pytest.raises(AttributeError, match="did you mean 'codebook_size'"):
        H.codebok_size
    with pytest.raises(AttributeError, match="did you mean 'codebook_size'"):
        H.codebok_size = 3
    assert not hasattr(H, "use_hydra_na")


@pytest.mark.parametrize("settings, parse", [
    (VQGANSettings, get_vqgan_hparams),
    (SamplerSettings, get_sampler_hparams),
    (SamplesSettings, get_samples_hparams),
    (FIDSettings, get_fid_hparams),
    (ELBOSettings, get_elbo_hparams),
    (NearestNeighboursSettings, get_nearest_neighbours_hparams),
    (PageSettings, get_page_hparams),
    (VQGANFIDSettings, get_vqgan_fid_hparams),
    (ReconstructSettings, get_reconstruct_hparams),
])
def test_every_setting_has_help_and_a_flag(settings, parse, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help_all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(settings):
        has_flag = re.search(rf"--{field.name}\b", text) is not None
        assert has_flag == (field.name not in settings.without_flag)
        assert len(field.metadata["help"]) > 5


@pytest.mark.parametrize("parse, usage, hidden, shown", [
    (get_vqgan_hparams, "--dataset ... [flags]", [], ["nf", "lr", "overwrite"]),
    (get_sampler_hparams, "--ae_load_dir ... --ae_load_step ... --dataset ... --sampler ... [flags",
     ["nf", "beta", "base_lr"], ["bert_n_emb", "kernel_sizes"]),
    (get_fid_hparams, "--load_dir ... --load_step ... --n_samples ... [flags]",
     ["nf", "bert_n_emb", "kernel_sizes", "sampler"], ["kid", "dataset", "sample_steps"]),
])
def test_help_shows_what_a_script_decides(parse, usage, hidden, shown, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    head, _, text = capsys.readouterr().out.partition("\n\n")
    assert usage in " ".join(head.split()) and head.count("\n") < 3
    for name in hidden:
        assert re.search(rf"--{name}\b", text) is None
    for name in shown:
        assert re.search(rf"--{name}\b", text)


def test_help_tells_what_is_required_from_what_comes_from_a_run(capsys):
    with pytest.raises(SystemExit):
        get_fid_hparams(["--help_all"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("load_dir NAME", "load_step N", "n_samples N"):
        assert re.search(rf"--{name} [^\[]*\[required\]", text), name
    for name in ("sampler {absorbing,autoregressive}", "ae_load_step N", "nf N", "dataset {"):
        assert re.search(rf"--{re.escape(name)}[^\[]*\[that of the loaded run\]", text), name


def test_flags_reach_the_object():
    argv = [*VQGAN, "--ema", "--ch_mult", "1", "2", "--latent_shape", "1", "16", "16", "--lr",
            "0.5", "--attn_resolutions", "16"]
    H = get_vqgan_hparams(argv)
    assert H.ema is True and H.ch_mult == [1, 2] and H.lr == 0.5
    assert get_vqgan_hparams([*argv, "--no_ema"]).ema is False


def test_yaml_round_trip():
    H = get_sampler_hparams(SAMPLER)
    assert yaml.safe_load(H.as_yaml()) == dataclasses.asdict(H)


@pytest.mark.parametrize("flags, says", [
    ("--n_channels 2", "n_channels: invalid choice: 2"),
    ("--ema_beta 1", "ema_beta must be less than 1"),
    ("--batch_size 0", "batch_size must be at least 1"),
    ("--batch_size x", "invalid int value"),
    ("--load_step last", "--load_step: it must be a step or best, not 'last'"),
    ("--lr nan", "lr must be a number"),
    ("--lr inf", "lr must be a number"),
    ("--quantizer vq", "invalid choice"),
    ("--load_step 5 --train_steps 5", "leaves nothing to train"),
    ("--colour", "unrecognized arguments: --colour"),
    ("--train_step 10", "unrecognized arguments: --train_step 10: did you mean '--train_steps'?"),
    ("--ema_beta 0.9", "--ema_beta would do nothing: it is for --ema ("),
    ("--perceptual efficientnet_lite0 --vgg_weights vgg.pth",
     "--vgg_weights would do nothing: it is for --perceptual lpips, at a weight above 0"),
    ("--perceptual lpips --perceptual_weight 0 --perceptual_range=-1_1",
     "--perceptual_range would do nothing"),
    ("--perceptual lpips --perceptual_weight 0 --vgg_weights vgg.pth", "would do nothing"),
    ("--distorted_copies 0 --distortion 0.3",
     "--distortion would do nothing: it is for --distorted_copies"),
])
def test_wrong_flags_of_train_vqgan_are_refused(flags, says, capsys):
    assert says in refusal(capsys, get_vqgan_hparams, [*VQGAN, *flags.split()])


def test_a_run_that_is_not_there_cannot_go_on(capsys):
    says = refusal(capsys, get_vqgan_hparams, "--log_dir misspelt --resume".split())
    assert "--dataset is required (logs/misspelt holds no run to go on with)" in says


@pytest.mark.parametrize("flags, says", [
    ("--attention full --kernel_sizes 3", "would do nothing: it is for --attention hydra"),
    ("--top_k 5", "--top_k would do nothing: it is for --sampler autoregressive, not absorbing"),
    ("--sample_type mlm --remask 0.1",
     "--remask would do nothing: it is for --sample_type remdm, not mlm"),
    ("--optimizer adam --weight_decay 1", "it is for --optimizer adamw or muon, not adam"),
    ("--temp 0", "temp must be more than 0"),
    ("--vgg_weights vgg.pth", "--vgg_weights would do nothing: the autoencoder is trained"),
    ("--ae_load_step 0", "ae_load_step must be at least 1"),
    ("--dataset custom", "needs --custom_dataset_path"),
])
def test_wrong_flags_of_train_sampler_are_refused(flags, says, capsys):
    assert says in refusal(capsys, get_sampler_hparams, [*SAMPLER, *flags.split()])


def test_what_is_off_may_be_switched_off():
    assert not get_vqgan_hparams([*VQGAN, "--no_ema", "--no_ema_warmup"]).ema_warmup


def test_a_forgotten_sampler_is_named_though_the_autoencoder_is_there(capsys):
    save_run(get_vqgan_hparams(VQGAN), "ae")
    flags = [*VQGAN, "--ae_load_dir", "ae", "--ae_load_step", "5"]
    assert "--sampler is required" in refusal(capsys, get_sampler_hparams, flags)
    flags = ["--log_dir", "misspelt", "--resume", *flags[2:], "--sampler", "absorbing"]
    says = "--dataset is required (logs/misspelt holds no run to go on with)"
    assert says in refusal(capsys, get_sampler_hparams, flags)


def test_missing_required_flags_are_named(capsys):
    assert "--dataset is required" in refusal(capsys, get_vqgan_hparams, [])
    assert "--ae_load_dir is required" in refusal(
        capsys, get_sampler_hparams, [*VQGAN, "--sampler", "absorbing"]
    )


def test_attention_position_and_groups_are_derived():
    H = get_sampler_hparams([*SAMPLER, "--sampler", "autoregressive"])
    assert (H.attention, H.position) == ("full", ["absolute"])
    H = get_sampler_hparams([*SAMPLER, "--recipe", "published"])
    assert (H.attention, H.position) == ("hydra", ["rope", "absolute"])
    H = get_sampler_hparams(SAMPLER)
    assert (H.attention, H.position) == ("hydra", ["absolute"])  # enough for 4x4 digits
    assert H.block_size == 16 and len(H.dilations) == len(H.kernel_sizes)
    H = get_sampler_hparams([*SAMPLER, "--kernel_sizes", "3", "--dilations", "1", "2"])
    assert (H.kernel_sizes, H.dilations) == ([3, 3], [1, 2])


def test_a_sampler_takes_the_autoencoders_architecture_from_its_run(capsys):
    changes = ["--codebook_size", "48", "--img_size", "64", "--attn_resolutions", "16"]
    save_run(get_vqgan_hparams([*VQGAN, *changes]), "ae")
    H = get_sampler_hparams(SAMPLER)
    assert (H.codebook_size, H.img_size, H.latent_shape) == (48, 64, [1, 8, 8])
    assert get_sampler_hparams([*SAMPLER, "--codebook_size", "48"]).codebook_size == 48
    sentence = refusal(capsys, get_sampler_hparams, [*SAMPLER, "--codebook_size", "49"])
    assert "49" in sentence and "48" in sentence and "hparams.yaml" in sentence


def test_a_loaded_run_sets_the_architecture_only(capsys):
    save_run(get_sampler_hparams([*SAMPLER, "--bert_n_layers", "2", "--lr", "0.5"]), "prior")
    resume = [*SAMPLER, "--load_dir", "prior", "--load_step", "7"]
    H = get_sampler_hparams(resume)
    assert H.bert_n_layers == 2
    assert H.lr != 0.5  # only the architecture is taken over
    assert "contradicts bert_n_layers 2" in refusal(
        capsys, get_sampler_hparams, [*resume, "--bert_n_layers", "3"]
    )


def test_an_autoencoder_older_than_recipes_keeps_its_groups():
    save_run(get_vqgan_hparams([*VQGAN, "--recipe", "published"]), "ae")
    path = RunFolder("ae").hparams
    lines = path.read_text().splitlines(keepends=True)
    newer = ("recipe", "preset", "norm_groups")
    path.write_text("".join(line for line in lines if line.partition(":")[0] not in newer))
    assert get_sampler_hparams(SAMPLER).norm_groups == 32
    with pytest.raises(SystemExit):
        get_sampler_hparams([*SAMPLER, "--norm_groups", "8"])


def test_equivalent_flags_do_not_contradict_a_loaded_run(capsys):
    """Flags that say the same in other words do not contradict."""
    flags = [*SAMPLER, "--kernel_sizes", "3", "7", "--dilations", "1",
             "--position", "absolute", "rpb"]
    save_run(get_sampler_hparams(flags), "prior")
    resume = [*flags, "--load_dir", "prior", "--load_step", "7"]
    assert get_sampler_hparams(resume).dilations == [1, 1]
    assert "contradicts dilations 1 1" in refusal(
        capsys, get_sampler_hparams, [*resume, "--dilations", "2"]
    )


def test_experiments_take_missing_settings_from_the_loaded_run():
    save_run(get_vqgan_hparams([*VQGAN, "--codebook_size", "48"]), "ae")
    save_run(get_sampler_hparams([*SAMPLER, "--bert_n_layers", "2"]), "prior")
    H = get_samples_hparams(["--load_dir", "prior", "--load_step", "7"])
    assert (H.dataset, H.ae_load_dir, H.ae_load_step) == ("digits", "ae", 5)
    assert (H.bert_n_layers, H.codebook_size, H.n_samples) == (2, 48, 64)


def test_experiments_sample_as_the_run_says_unless_a_flag_does():
    save_run(get_vqgan_hparams(VQGAN), "ae")
    save_run(get_sampler_hparams([*SAMPLER, "--sample_type", "halton", "--temp", "0.7"]), "prior")
    run = ["--load_dir", "prior", "--load_step", "7"]
    H = get_samples_hparams(run)
    assert (H.sample_type, H.temp) == ("halton", 0.7)
    H = get_samples_hparams([*run, "--sample_type", "mlm", "--temp", "0.9"])
    assert (H.sample_type, H.temp) == ("mlm", 0.9)


def test_an_experiment_may_override_settings_that_shape_no_model():
    lpips = ["--perceptual", "lpips", "--perceptual_weight", "1", "--vgg_weights", "old.pth"]
    save_run(get_vqgan_hparams([*VQGAN, *lpips]), "ae")
    save_run(get_sampler_hparams([*SAMPLER, "--ema"]), "prior")
    flags = ["--load_dir", "prior", "--load_step", "7"]
    H = get_nearest_neighbours_hparams(flags)
    assert H.vgg_weights == "old.pth" and H.ema
    H = get_nearest_neighbours_hparams([*flags, "--vgg_weights", "new.pth", "--no_ema"])
    assert H.vgg_weights == "new.pth" and not H.ema
    save_run(get_vqgan_hparams([*VQGAN, "--perceptual", "efficientnet_lite0"]), "ae")
    H = get_nearest_neighbours_hparams([*flags, "--vgg_weights", "new.pth",
                                        "--perceptual_range=-1_1"])
    assert H.perceptual_range == "-1_1"  # of the LPIPS that it measures with


PUBLISHED = (
    "--sampler absorbing --dataset churches --log_dir FID_log --ae_load_dir vqgan_churches "
    "--ae_load_step 2200000 --load_dir absorbing_churches --load_step 2000000 --ema"
).split()


def test_published_experiment_commands_are_accepted():
    RunFolder("absorbing_churches").create()  # its checkpoints come without a hparams.yaml
    H = get_fid_hparams([*PUBLISHED, "--n_samples", "50000", "--temp", "0.9"])
    assert (H.n_samples, H.temp, H.ema, H.feature_extractor) == (50000, 0.9, True, "inception")
    assert get_prdc_hparams([*PUBLISHED, "--n_samples", "50000"]).nearest_k == 3
    H = get_elbo_hparams([*PUBLISHED, "--steps_per_eval", "5000", "--train_steps", "10000"])
    assert (H.train_steps, H.steps_per_eval, H.load_step) == (10000, 5000, 2000000)
    RunFolder("vqgan_ffhq").create()
    flags = "--dataset ffhq --log_dir x --load_dir vqgan_ffhq --load_step 2200000"
    assert get_vqgan_fid_hparams(flags.split()).ema is False


@pytest.mark.parametrize("flags, says", [
    ("", "--n_samples is required"),
    ("--n_samples 1", "n_samples must be at least 2"),
    ("--n_samples 9 --lr 1", "unrecognized arguments: --lr"),
])
def test_wrong_flags_of_an_experiment_are_refused(flags, says, capsys):
    RunFolder("absorbing_churches").create()
    assert says in refusal(capsys, get_fid_hparams, [*PUBLISHED, *flags.split()])


def test_wrong_settings_files_are_refused(capsys):
    folder = RunFolder("ae").create()
    folder.hparams.write_text("codebok_size: 3\n")
    sentence = refusal(capsys, get_sampler_hparams, SAMPLER)
    assert "unknown setting 'codebok_size'" in sentence and "codebook_size" in sentence
    folder.hparams.write_text("codebook_size: many\n")
    assert "codebook_size must be of type int" in refusal(capsys, get_sampler_hparams, SAMPLER)
    folder.hparams.write_text("- a list\n")
    assert "does not hold settings" in refusal(capsys, get_sampler_hparams, SAMPLER)
    folder.hparams.write_text("x: !!python/object/apply:os.system ['true']\n")
    assert "cannot read" in refusal(capsys, get_sampler_hparams, SAMPLER)


@pytest.mark.parametrize("text, says", [
    ("nf: &a [1]\nch_mult: *a", "it uses aliases"),
    ("nf: " + "[" * 5000, "cannot read"),
    ("nf: " + "9" * 5000, "cannot read"),
    ("nf: 0x" + "f" * 5000, "nf must be a number, and below"),
    ("nf: 2024-99-99", "cannot read"),
    ("nf: [1, 2]", "nf cannot be [1, 2]"),
    ("ch_mult: {1: 2}", "ch_mult cannot be"),
    ("img_size: .inf", "img_size must be of type int"),
    ("nf: " + " " * (1 << 20), "more than 1048576 bytes"),
    ("\x00", "cannot read"),
])
def test_a_hostile_settings_file_is_named_in_one_sentence(text, says, capsys):
    folder = RunFolder("ae").create()
    folder.hparams.write_text(text)
    sentence = refusal(capsys, get_sampler_hparams, SAMPLER)
    assert says in sentence and "hparams.yaml" in sentence and len(sentence) < 1000


def test_resume_takes_the_architecture_from_the_runs_own_hparams_yaml(capsys):
    flags = [*SAMPLER, "--log_dir", "prior", "--resume"]
    assert get_sampler_hparams(flags).bert_n_layers == 4  # there is no record yet
    save_run(get_sampler_hparams([*SAMPLER, "--bert_n_layers", "2"]), "prior")
    assert get_sampler_hparams([*flags, "--bert_n_layers", "3"]).bert_n_layers == 3
    RunFolder("prior").manifest(7).touch()  # now there is a checkpoint to resume
    assert get_sampler_hparams(flags).bert_n_layers == 2
    assert "contradicts bert_n_layers 2" in refusal(
        capsys, get_sampler_hparams, [*flags, "--bert_n_layers", "3"]
    )


def test_a_lone_variable_of_torchrun_does_not_silence_errors(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as some clusters do
    assert "--dataset is required" in refusal(capsys, get_vqgan_hparams, [])


def test_parsers_take_no_abbreviations(capsys):
    assert "unrecognized" in refusal(capsys, get_vqgan_hparams, [*VQGAN, "--batch", "3"])


def test_textures_default_to_relative_positions_where_the_attention_has_them():
    flags = "--dataset textures --ae_load_dir none --ae_load_step 1 --sampler"
    for rest, position in (
        ("absorbing", ["rope"]), ("absorbing --attention full", ["absolute"]),
        ("absorbing --position rope absolute", ["rope", "absolute"]),
        ("autoregressive", ["absolute"]),
    ):
        assert get_sampler_hparams(f"{flags} {rest}".split()).position == position


def test_base_lr_is_refused_where_it_would_do_nothing(capsys):
    says = "--base_lr would do nothing: lr is"
    assert says in refusal(capsys, get_vqgan_hparams, [*VQGAN, "--lr", "1e-3"][:-2] + [
        "--dataset", "digits", "--base_lr", "1e-3"])
    flags = ["--dataset", "ffhq", "--base_lr", "1e-3", "--batch_size", "4"]
    assert get_vqgan_hparams(flags).lr == pytest.approx(4e-3)
    assert get_vqgan_hparams([*flags, "--lr", "1"]).lr == 1


def test_a_run_on_custom_images_may_be_measured_against_another_dataset():
    photos = ["--dataset", "custom", "--custom_dataset_path", "photos"]
    save_run(get_vqgan_hparams(photos), "ae")
    H = get_vqgan_fid_hparams(["--load_dir", "ae", "--load_step", "2", "--dataset", "digits"])
    assert (H.dataset, H.custom_dataset_path) == ("digits", None)
    H = get_vqgan_fid_hparams(["--load_dir", "ae", "--load_step", "2"])
    assert (H.dataset, H.custom_dataset_path) == ("custom", "photos")


@pytest.mark.parametrize("flags, different", [
    ("--dataset digits --amp --log_dir a --no_visdom --train_steps 300", {"amp": (True, False)}),
    ("--dataset digits --recipe modern --disc_lr 0.01", {"disc_lr": (0.01, 0.001)}),
    ("--dataset digits --preset small", {}),
    ("--dataset digits --preset medium", {}),
    ("--dataset ffhq --batch_size 6", {"batch_size": (6, 3), "lr": (2.7e-5, 1.35e-5)}),
    ("--dataset custom --custom_dataset_path x --preset medium --ndf 8", {"ndf": (8, 64)}),
    ("--dataset digits --sampler absorbing --ae_load_dir x --ae_load_step 3 --temp 0.5",
     {"temp": (0.5, 1.0)}),
])
def test_settings_that_differ_from_the_defaults(flags, different):
    parse = get_sampler_hparams if "--sampler" in flags else get_vqgan_hparams
    settings = dataclasses.asdict(parse(flags.split()))
    defaults = default_settings(settings)
    found = {name: (value, defaults[name]) for name, value in settings.items()
             if value != defaults[name]}
    assert found == {name: pytest.approx(pair) for name, pair in different.items()}
    older = {name: value for name, value in settings.items() if name not in ("recipe", "preset")}
    published = {"recipe": "published", "preset": "published"}
    assert default_settings(older) == default_settings(older | published)
