"""Is it going well? What a person who knows would say of a training at each validation.

`training` are means over the steps since the last validation, as they are logged, `validation` the
figures of the images held out. docs/training.md explains each sentence.
"""

import math

PER_CODE = 4  # ids that a validation must see for each code, or unused ones mean nothing
FEW_CODES = 0.5  # share of the codebook in use
FEW_OF_BATCH = 0.1  # perplexity of a batch's ids over the codes, or the ids, that there are
WINS, IDLE = 0.95, 0.55  # share of what a discriminator is shown that it takes for what it is
AT_LIMIT = 0.95
BEHIND = 1.1  # error of the EMA over that of the weights
PARTED = 1.25  # error on images held out over that on those trained on


def autoencoder_health(H, step, validation, training, bad_steps):
    """The sentences, a list, on an autoencoder after a step; none where all is well.

    `validation` holds `codes_used`, `ids_seen`, `l1`, and `of_weights`, the L1 of the weights that
    an EMA averages.
    """
    return [sentence for sentence in (
        not_finite(bad_steps),
        only_warm_up(H),
        few_codes(H, step, validation, training),
        discriminator(H, step, training),
        weight_at_limit(H, step, training),
        ema_behind(H, "L1", validation["l1"], validation["of_weights"]),
        parted("L1", training.get("l1"), validation["of_weights"]),
    ) if sentence]


def sampler_health(H, validation, training, bad_steps):
    """The sentences, a list, on a sampler; none where all is well.

    `validation` holds `bits_per_token`, and `of_weights`, those of the weights that an EMA
    averages.
    """
    return [sentence for sentence in (
        not_finite(bad_steps),
        only_warm_up(H),
        ema_behind(H, "bits per token", validation["bits_per_token"], validation["of_weights"]),
        parted("bits per token", training.get("bits_per_token"), validation["of_weights"]),
    ) if sentence]


def not_finite(bad_steps):
    if bad_steps:
        which = "1 step" if bad_steps == 1 else f"{bad_steps} steps"
        return (f"{which} since the last validation {'was' if bad_steps == 1 else 'were'} not "
                f"finite: lower --lr, or give --clip_grad_norm 1")


def only_warm_up(H):
    if H.train_steps < H.warmup_iters:
        return (f"the learning rate still rises when this run ends, at "
                f"{H.train_steps / H.warmup_iters:.1%} of --lr: give a --warmup_iters far below "
                f"{H.train_steps}")


def few_codes(H, step, validation, training):
    """By the images held out where they have enough ids, and else by the batches."""
    used, codes = validation["codes_used"], H.codebook_size
    if step <= H.codebook_start_step:
        return None
    few = used < FEW_CODES * codes
    told = f"only {used} of {codes} codes are in use"
    if validation["ids_seen"] < PER_CODE * codes:
        ids = H.batch_size * math.prod(H.latent_shape)
        perplexity = training.get("perplexity", codes)
        few = perplexity < FEW_OF_BATCH * min(codes, ids)
        told = f"the {ids} ids of a batch are only about {perplexity:.0f} of {codes} codes"
    if few:
        remedy = "give --codebook_revival 50"
        if H.quantizer != "nearest" or H.codebook_revival:
            remedy = "wait"
        return f"{told}: {remedy}, or, in a new run, a smaller --codebook_size"


def discriminator(H, step, training):
    """How the discriminator does where it has learned at all; idle it may be before it counts."""
    if "d_real_right" not in training:
        return None
    real, fake = training["d_real_right"], training["d_fake_right"]
    told = f"it is right on {real:.0%} of the images and {fake:.0%} of the reconstructions"
    if (real + fake) / 2 > WINS:
        smaller = "in a new run, a smaller --ndf"
        remedy = smaller if H.diff_aug else f"--diff_aug, or, {smaller}"
        return (f"the discriminator wins, {told}, so that its loss may say little: where frechet "
                f"no longer falls, give {remedy}")
    if (real + fake) / 2 < IDLE and step > H.disc_start_step + H.disc_lead_steps:
        return (f"the discriminator is idle, {told}, so that its loss is noise: give it more "
                f"steps before it counts, --disc_lead_steps, or, in a new run, a larger --ndf")


def weight_at_limit(H, step, training):
    full = H.disc_start_step + H.disc_lead_steps + H.disc_fade_steps
    limit = H.disc_weight * H.disc_weight_max
    if step > full and limit and training.get("d_weight", 0) > AT_LIMIT * limit:
        return (f"the weight of the adversarial loss is at its limit, {limit:g}: where pictures "
                f"get worse, lower --disc_weight_max")


def ema_behind(H, what, average, weights):
    if average > BEHIND * weights:
        remedy = "a lower --ema_beta" if H.ema_warmup else "--ema_warmup, or a lower --ema_beta"
        return (f"the EMA is behind the weights that it averages ({what} {average:.3g}, of the "
                f"weights {weights:.3g}): give {remedy}")


def parted(what, trained_on, held_out):
    if trained_on is not None and held_out > PARTED * trained_on:
        return (f"images held out do worse than those trained on ({what} {held_out:.3g}, trained "
                f"on {trained_on:.3g}): it learns them by heart; give more images, "
                f"--horizontal_flip or --crops, or take the best checkpoint")
