"""How much a device does together, by its memory, and copies while it computes."""

import torch
from torch import nn

from models.autoencoder.autoencoder import Upsample
from models.devices import to_device

LIVE_MAPS = 6  # of the largest feature map of an image, as many are in memory at once


def free_memory(device):
    """Bytes of a CUDA device that this process can still have, those that torch keeps included, but
    for what CUDA graphs keep for themselves."""
    free, _ = torch.cuda.mem_get_info(device)
    index = torch.device(device).index or 0
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # CUDA's own allocator does not tell
        return free
    kept = [segment["total_size"] - segment["allocated_size"] for segment in segments
            if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)]
    return free + sum(kept)


def number_that_fits(device, each, least, most):
    """How many things of `each` bytes a device does together: `least` on CPUs; on a GPU `least`
    times the largest power of two that takes a quarter of the free memory at most, up to `most`."""
    number = least
    if device.type == "cuda" and torch.cuda.is_available():
        limit = free_memory(device) / 4
        while 2 * number <= most and 2 * number * each <= limit:
            number *= 2
    return number


def bytes_of_image(network, cells):
    """An estimate of the bytes that an `Encoder` or `Generator` takes for an image, without
    gradients: LIVE_MAPS times its largest feature map in float32; `cells` is h * w of its input."""
    largest = 0
    for module in network.modules():
        if isinstance(module, Upsample):
            cells *= 4
        elif isinstance(module, nn.Conv2d):
            largest = max(largest, cells * max(module.in_channels, module.out_channels))
            cells //= module.stride[0] * module.stride[1]
    return 4 * LIVE_MAPS * largest


def copied_ahead(batches, device):
    """The tensors `batches` on a device; on a GPU the next one is copied, by a stream of its own,
    while work goes on with the one before."""
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            copy = to_device(batch.numpy(), device)
            copied = stream.record_event()
        if ahead is not None:
            yield _handed_over(*ahead)
        ahead = copy, copied
    if ahead is not None:
        yield _handed_over(*ahead)


def _handed_over(tensor, copied):
    """A tensor that another stream copies, for work of this stream after the event `copied`."""
    stream = torch.cuda.current_stream(tensor.device)
    stream.wait_event(copied)
    tensor.record_stream(stream)
    return tensor
