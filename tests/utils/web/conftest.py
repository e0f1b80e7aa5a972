"""Runs that the page is tested with, trained for two steps."""

import contextlib
import os
import shutil

import pytest

import train_sampler
import train_vqgan
from helpers import ON_DIGITS
from hparams import get_page_hparams
from utils.evaluation.experiment import experiment
from utils.web.studio import Studio

VQGAN = (
    f"{ON_DIGITS} --img_size 16 --ch_mult 1 1 --attn_resolutions 8 --emb_dim 8 "
    "--codebook_size 16 --ndf 8 --disc_layers 1 --batch_size 4 --no_visdom --train_steps 2"
)
SAMPLER = (
    f"{ON_DIGITS} --ae_load_dir ae --ae_load_step 2 --bert_n_emb 32 --bert_n_head 4 "
    "--bert_n_layers 1 --total_steps 16 --sample_steps 8 --batch_size 8 --no_visdom "
    "--train_steps 2 --sampler"
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the runs `ae`, `demo_absorbing`, `free`, which has no absolute positions, and
    `causal`."""
    folder, here = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(folder)
    try:
        train_vqgan.main([*VQGAN.split(), "--log_dir", "ae", "--ema"])
        for name, flags in {"demo_absorbing": "absorbing --ema --position rpb absolute",
                            "free": "absorbing --position rpb", "causal": "autoregressive"}.items():
            train_sampler.main([*SAMPLER.split(), *flags.split(), "--log_dir", name])
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def workplace(trained, tmp_path, monkeypatch):
    """The working directory: a folder of one's own that holds the runs."""
    shutil.copytree(trained / "logs", tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def studio_of(workplace):
    """A function that gives the Studio of a run."""
    with contextlib.ExitStack() as stack:
        def open_studio(name="demo_absorbing", flags=""):
            argv = f"--load_dir {name} --load_step 2 --log_dir page_{name} {flags}".split()
            run = stack.enter_context(experiment(get_page_hparams(argv), "page", several=False))
            run.load_sampler()
            return Studio(run)

        yield open_studio


@pytest.fixture
def studio(studio_of):
    return studio_of()
