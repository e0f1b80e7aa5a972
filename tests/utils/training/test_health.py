"""What is said of a training: each sentence on figures that call for it, and on none beside."""

import pytest

from hparams import get_vqgan_hparams
from utils.training.health import autoencoder_health, sampler_health


def settings(flags=""):
    return get_vqgan_hparams(f"--dataset digits --recipe modern --codebook_size 100 "
                             f"--disc_weight 1 --disc_start_step 50 --train_steps 200 "
                             f"{flags}".split())


HEALTHY = dict(
    validation=dict(l1=0.05, of_weights=0.05, codes_used=90, ids_seen=5000),
    training=dict(l1=0.05, d_real_right=0.8, d_fake_right=0.7, d_weight=0.4), bad_steps=0,
)


def said(flags="", step=150, bad_steps=0, validation=(), training=()):
    return autoencoder_health(
        settings(flags), step, HEALTHY["validation"] | dict(validation),
        HEALTHY["training"] | dict(training), bad_steps,
    )


def test_a_healthy_run_is_left_in_peace():
    assert said() == []
    known = dict(bits_per_token=2.0, of_weights=2.1)
    assert sampler_health(settings(), known, {"bits_per_token": 1.9}, 0) == []


@pytest.mark.parametrize("case, says, flag", [
    (dict(bad_steps=3), "3 steps since the last validation were not finite", "--clip_grad_norm"),
    (dict(validation=dict(codes_used=40), flags="--codebook_revival 0"),
     "only 40 of 100 codes are in use", "--codebook_revival"),
    (dict(bad_steps=1), "1 step since the last validation was not finite", "--lr"),
    (dict(validation=dict(codes_used=40)), "only 40 of 100 codes are in use", "--codebook_size"),
    (dict(training=dict(d_real_right=0.99, d_fake_right=0.98)),
     "the discriminator wins, it is right on 99% of the images and 98%", "--diff_aug"),
    (dict(training=dict(d_real_right=0.06, d_fake_right=0.94)), "the discriminator is idle",
     "--disc_lead_steps"),
    (dict(flags="--warmup_iters 400"), "the learning rate still rises when this run ends, at 50.0%",
     "--warmup_iters far below 200"),
    (dict(training=dict(d_weight=1.0)), "at its limit, 1", "--disc_weight_max"),
    (dict(validation=dict(l1=0.2)), "the EMA is behind", "a lower --ema_beta"),
    (dict(validation=dict(l1=0.2), flags="--ema --no_ema_warmup"), "the EMA is behind",
     "--ema_warmup"),
    (dict(validation=dict(codes_used=3, ids_seen=80), training=dict(perplexity=2.5)),
     "the 512 ids of a batch are only about 2 of 100 codes", "--codebook_size"),
    (dict(validation=dict(of_weights=0.08), training=dict(l1=0.05)),
     "images held out do worse than those trained on", "--horizontal_flip"),
])
def test_each_sentence_names_the_flag_that_helps(case, says, flag):
    [sentence] = said(**case)
    assert says in sentence and flag in sentence


@pytest.mark.parametrize("case", [
    dict(step=5, validation=dict(codes_used=1)),  # the codebook has not begun
    dict(validation=dict(codes_used=40, ids_seen=300)),  # too few ids to tell
    dict(step=60, training=dict(d_weight=1.0)),  # its loss is being faded in
    dict(step=60, training=dict(d_real_right=0.5, d_fake_right=0.5)),  # it has just begun
])
def test_what_cannot_be_told_is_not_said(case):
    assert said(**case, flags="--codebook_start_step 10") == []


def test_without_a_discriminator_nothing_is_said_of_it():
    assert autoencoder_health(settings(), 40, HEALTHY["validation"], {"l1": 0.05}, 0) == []


def test_a_sampler_that_learns_its_ids_by_heart_and_an_ema_behind():
    known = dict(bits_per_token=4.0, of_weights=3.0)
    sentences = sampler_health(settings(), known, {"bits_per_token": 1.0}, 2)
    assert ["not finite" in sentences[0], "EMA is behind" in sentences[1],
            "held out do worse" in sentences[2]] == [True] * 3
