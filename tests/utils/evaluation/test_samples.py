"""Samples: chunks drawn together, images decoded together, and how many by a device's memory."""

from types import SimpleNamespace

import pytest
import torch

from helpers import ON_DIGITS, Log
from hparams import get_sampler_hparams
from models import AbsorbingDiffusion, AutoregressiveTransformer, Transformer
from models.autoencoder.autoencoder import VQAutoEncoder
from utils.data import device as devices
from utils.data.device import bytes_of_image, number_that_fits
from utils.evaluation import samples
from utils.evaluation.samples import decode, drawn_ids
from utils.training.precision import Precision, seed_step

FLAGS = (
    f"{ON_DIGITS} --ae_load_dir none --ae_load_step 1 --codebook_size 12 "
    "--bert_n_emb 32 --bert_n_head 4 --bert_n_layers 1 --sampler"
).split()
CPU = torch.device("cpu")


def sampler_of(kind):
    torch.manual_seed(0)
    H = get_sampler_hparams([*FLAGS, kind, "--sample_steps", "6"])
    if kind == "absorbing":
        return H, AbsorbingDiffusion(H, Transformer(H), 12, torch.zeros(12, 4)).eval()
    return H, AutoregressiveTransformer(H, torch.zeros(12, 4)).eval()


@pytest.mark.parametrize("kind", ["absorbing", "autoregressive"])
def test_chunks_have_the_same_ids_however_many_are_drawn_together(kind, tmp_path, monkeypatch):
    H, sampler = sampler_of(kind)
    H, calls = SimpleNamespace(**vars(H), n_samples=150), []
    draw_chunks = samples.draw_chunks

    def spy(H, sampler, precision, spans, integer):
        calls.append(len(spans))
        return draw_chunks(H, sampler, precision, spans, integer)

    monkeypatch.setattr(samples, "draw_chunks", spy)
    found = []
    for together in (1, 2):
        monkeypatch.setattr(samples, "number_that_fits", lambda *arguments: together)
        precision, folder = Precision(False, CPU), tmp_path / str(together)
        parts = drawn_ids(H, sampler, precision, {"seed": 0}, folder, Log())
        found.append(torch.cat([part["ids"] for part in parts]))
    assert calls == [1, 1, 1, 2, 1] and torch.equal(*found)
    seed_step(H.seed, 64, "samples")  # by torch's own generator
    alone = sampler.sample(64, H.temp)
    assert torch.equal(found[0][64:128].long(), alone)


def test_decoded_images_are_floats_or_the_bytes_of_them():
    H = get_sampler_hparams([*FLAGS, "absorbing"])
    torch.manual_seed(0)
    autoencoder = VQAutoEncoder(H).eval()
    ids = torch.randint(12, (20, 64))
    images = decode(autoencoder, ids)
    expected = [autoencoder.decode_indices(part) for part in ids.split(16)]
    assert torch.equal(images, torch.cat(expected).clamp(0, 1))
    assert images.dtype == torch.float32 and images.std() > 0
    as_bytes = decode(autoencoder, ids, as_bytes=True)
    assert torch.equal(as_bytes, images.mul(255).round().to(torch.uint8))


def test_the_number_that_fits_is_a_power_of_two_in_a_quarter_of_the_memory(monkeypatch):
    assert number_that_fits(CPU, 10**12, 16, 128) == 16
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "free_memory", lambda device: 4000)
    assert [number_that_fits(gpu, each, 1, 16) for each in (10, 62, 63, 500, 501, 10**6)] == [
        16, 16, 8, 2, 1, 1
    ]
    assert number_that_fits(gpu, 20, 16, 128) == 32


def test_the_bytes_of_an_image_follow_its_largest_map():
    H = get_sampler_hparams([*FLAGS, "absorbing"])  # 32 pixels, nf 32, 3 levels 1, 1, 2
    autoencoder = VQAutoEncoder(H)
    assert bytes_of_image(autoencoder.generator, 8 * 8) == 4 * devices.LIVE_MAPS * 32 * 32 * 32
    assert bytes_of_image(autoencoder.encoder, 32 * 32) == 4 * devices.LIVE_MAPS * 32 * 32 * 32


def test_what_cuda_graphs_keep_is_not_free(monkeypatch):
    def segment(device, pool, total, allocated):
        return dict(device=device, segment_pool_id=pool, total_size=total, allocated_size=allocated)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: [
        segment(0, (0, 0), 50, 20), segment(0, (0, 1), 400, 0), segment(1, (0, 0), 70, 0),
    ])
    assert devices.free_memory(torch.device("cuda", 0)) == 130

    def not_told():
        raise RuntimeError("CUDA's allocator keeps no segments")

    monkeypatch.setattr(torch.cuda, "memory_snapshot", not_told)
    assert devices.free_memory(torch.device("cuda", 0)) == 100
