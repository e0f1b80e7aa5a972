"""What each dataset changes of the declared defaults, for each of the two stages."""

DIGITS = dict(
    num_workers=0, img_size=32, n_channels=1, nf=32, ch_mult=[1, 1, 2], res_blocks=1,
    attn_resolutions=[8], emb_dim=32, codebook_size=64, ndf=16, disc_layers=2,
    perceptual_weight=0.0, steps_per_display_output=250, steps_per_save_output=250,
    steps_per_checkpoint=500, steps_per_eval=250, ema_beta=0.99, steps_per_update_ema=1,
)

VQGAN_DEFAULTS = {
    "*": dict(batch_size=3),
    "digits": dict(DIGITS, batch_size=32, lr=1e-3, disc_start_step=100000001),
}

SAMPLER_DEFAULTS = {
    "*": dict(batch_size=20, lr=1e-4, warmup_iters=30000),
    "churches": dict(lr=2e-4, warmup_iters=10000),
    "bedrooms": dict(lr=2e-4, warmup_iters=10000),
    "digits": dict(
        DIGITS, batch_size=64, lr=2e-3, warmup_iters=50, bert_n_emb=128, bert_n_head=8,
        bert_n_layers=4, total_steps=64, sample_steps=64, optimizer="muon",
        t_sampling="low_discrepancy", temp=0.9,
    ),
}


def dataset_defaults(table, dataset):
    """The values of `table` for a dataset: those of all datasets, then its own."""
    return {**table["*"], **table.get(dataset, {})}
