"""What each dataset changes of the declared defaults, for each of the two stages."""

# Small enough to train on two CPU cores in minutes. Without a discriminator: L1 alone draws digits
# well, and sharper ones would take longer.
DIGITS = dict(
    num_workers=0, img_size=32, n_channels=1, nf=32, ch_mult=[1, 1, 2], res_blocks=1,
    attn_resolutions=[8], emb_dim=32, codebook_size=16, ndf=16, disc_layers=2,
    perceptual_weight=0.0, disc_start_step=100000001, batch_size=32, ema_beta=0.99,
    steps_per_update_ema=1, steps_per_eval=200, steps_per_display_output=500,
    steps_per_save_output=500, steps_per_checkpoint=500,
)

# Photographs of surfaces, 16x16 ids.
TEXTURES = dict(
    DIGITS, img_size=64, attn_resolutions=[], codebook_size=256, batch_size=8,
)

# Where a thing stands says nothing in these images: hydra attention has no absolute positions by
# default, and runs on larger canvases as it is.
UNALIGNED = {"textures"}

VQGAN_DEFAULTS = {
    "*": dict(batch_size=3),
    "digits": dict(DIGITS, lr=1e-3),
    "textures": dict(TEXTURES, lr=1e-3),
}

# The denoiser is not told the time, so more steps of sampling than 64 ids cost no more network
# calls: they make it rarer that two ids are drawn at once.
SAMPLER_DEFAULTS = {
    "*": dict(batch_size=20, lr=1e-4, warmup_iters=30000),
    "churches": dict(lr=2e-4, warmup_iters=10000),
    "bedrooms": dict(lr=2e-4, warmup_iters=10000),
    "digits": dict(
        DIGITS, bert_n_emb=128, bert_n_layers=4, optimizer="muon", lr=3e-3, warmup_iters=50,
        embd_pdrop=0.1, resid_pdrop=0.1, t_sampling="low_discrepancy", sample_steps=512, temp=0.8,
    ),
    "textures": dict(
        TEXTURES, bert_n_emb=128, bert_n_layers=4, optimizer="muon", lr=3e-3, warmup_iters=50,
        t_sampling="low_discrepancy", sample_steps=256,
    ),
}
